//! `send`: the source's side of a migration between two processes.
//!
//! ```text
//!   connect ─▶ main channel: which devices ─▶ pong ─▶ N channels, greeted ─▶ (PRE_COPY data, over them)
//!     ─▶ the devices stop, STOP_COPY ─▶ outgoing start ─▶ all sent ─▶ EOF ─▶ shut 0
//!     ─▶ devices STOP ─▶ what was moved
//! ```
//!
//! `main_channel` has the protocol. After a failure on either side the devices go back to the state in
//! which they
//! came. If the end was sent and the destination has not reported the result, the devices stay stopped. The
//! main
//! thread does everything except reading the return path. While it sends PRE_COPY data, another thread
//! watches for
//! Ctrl-C.

use std::{
    net::Shutdown,
    os::fd::AsFd,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail};
use vfio_migration::{
    Canceller, Channel, Device, Error, Failed, SaveSession, Settings, Side, SourceChannels, Stats,
    migration::{
        DeviceSettings, MigratableDevice, OnOffAuto, Outgoing, OutgoingDevice, Saved,
        SwitchoverAck, SwitchoverAcks, vm,
    },
    stream::{Command, SectionKind},
};
use vfio_migration_uring::{deadline, thread::spawn_scoped};

use crate::{
    Interrupted,
    args::{self, BackendArg, CapabilitiesArgs},
    connect::connect,
    device::{self, Left, Spec, Subject},
    host_memory::{NO_THREAD, Need, of_save},
    interrupt, limits,
    main_channel::{
        self, EXPLANATION, HEARTBEAT, LINGER, MainChannelWriter, PING, Replies, ReturnPathEvent,
        STILL_HERE, interrupted, is_the_peers, main_failed, timed_out,
    },
    moved::{Times, Transfer},
    network::{self, Address, Connection, TICK},
    observe::{ObserveArgs, Observer},
    output::say,
    progress::Progress,
    tls::{self, TlsArgs},
};

/// Send devices' states to a `vfio-migrate receive`
///
/// Connects a main channel and N multifd channels to ADDR, and sends every device's state and config
/// over them. It succeeds when the destination has reported that all is loaded. Then it prints for
/// each device the packets, and the bytes and sha256 of the state and of the config (framing tags
/// included). The destination prints the same values.
///
/// If the destination fails, the devices go back to the state in which they came. If everything was
/// sent and the destination does not report the result, the devices stay stopped: they may run there.
#[derive(Debug, clap::Args)]
#[command(after_help = device::HELP)]
pub(crate) struct Options {
    /// Where the destination listens: HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR")]
    to: Address,
    #[command(flatten)]
    tls: TlsArgs,
    /// A device, as below; once for each
    #[arg(long = "device", value_name = "SPEC", required = true, num_args = 1..)]
    devices: Vec<Spec>,
    /// The number of multifd channels; the destination must expect as many
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=255))]
    channels: u32,
    /// The most data in a packet [default: the state's size, 64KiB to 1MiB]
    #[arg(long, value_name = "SIZE", value_parser = args::packet)]
    packet: Option<usize>,
    /// The memory in which packets may wait
    #[arg(long, value_name = "SIZE", value_parser = args::memory)]
    budget: Option<usize>,
    /// What moves the bytes out of the devices
    #[arg(long, value_enum, default_value_t)]
    backend: BackendArg,
    #[command(flatten)]
    capabilities: CapabilitiesArgs,
    /// The longest time without progress, or without a sign of the destination, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = args::seconds)]
    timeout: Duration,
    /// The longest time for connecting the main channel and all others together, in seconds
    ///
    /// Within this time every connection is tried again if nobody listens yet, the destination is busy,
    /// or a packet was lost. The time that the destination needs in between to get ready does not count.
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = args::seconds)]
    connect_timeout: Duration,
    #[command(flatten)]
    observe: ObserveArgs,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

impl Options {
    fn settings(&self) -> Settings {
        let mut settings = Settings::default();
        settings.backend = self.backend.into();
        settings.budget = self.budget;
        settings.no_progress = self.timeout;
        settings
    }

    fn device_settings(&self) -> DeviceSettings {
        let mut settings = DeviceSettings::default();
        settings.transfer = OnOffAuto::On;
        settings.buffer_len = self.packet;
        settings
    }
}

/// Sets the devices up, and asks the destination whether it has the same, and is ready.
fn greet(
    options: &Options,
    devices: Vec<Device>,
    words: &mut MainChannelWriter,
    replies: &mut Replies<'_>,
) -> anyhow::Result<Vec<OutgoingDevice>> {
    let (capabilities, acks) = (
        options.capabilities.capabilities(),
        SwitchoverAcks::new(SwitchoverAck::Off),
    );
    let mut sources = Vec::with_capacity(devices.len());
    for (number, device) in (0..).zip(devices) {
        let id = device.id().clone();
        let migratable = MigratableDevice::new(device, options.device_settings());
        let source = words.section(SectionKind::Start, number, &id, |body| {
            Ok(OutgoingDevice::setup(
                migratable,
                &capabilities,
                &acks,
                body,
            )?)
        })?;
        sources.push(source);
    }
    words.command(Command::Ping(PING))?;
    let deadline = deadline(options.timeout);
    while !replies.ponged {
        replies.wait()?;
        if interrupt::requested() {
            bail!(Interrupted);
        }
        if Instant::now() > deadline {
            bail!(
                "the destination was not ready within {} s",
                options.timeout.as_secs_f64()
            );
        }
    }
    Ok(sources)
}

/// Connects the channels within `patience`; meanwhile says that the source is still there, and listens.
fn connect_channels(
    options: &Options,
    tls: Option<&tls::Client>,
    patience: Duration,
    words: &mut MainChannelWriter,
    replies: &mut Replies<'_>,
) -> anyhow::Result<Vec<Channel>> {
    let mut said = Instant::now();
    let channels = connect(
        &options.to,
        tls,
        options.channels as usize,
        patience,
        options.timeout,
        Some(&mut || {
            if said.elapsed() >= HEARTBEAT {
                said = Instant::now();
                words.command(Command::Ping(STILL_HERE))?;
            }
            replies.look()
        }),
    )?;
    let channels = channels.into_iter().map(Connection::into_channel);
    Ok(channels.collect::<Result<_, _>>()?)
}

/// Sends what the devices give while they still run, over the channels. Returns how many bytes.
fn iterate(
    sources: &mut [OutgoingDevice],
    channels: &mut SourceChannels,
    words: &mut MainChannelWriter,
    replies: &mut Replies<'_>,
) -> anyhow::Result<u64> {
    let mut sent = 0;
    // Ends: what is read lowers a device's estimate, which is not asked for anew, and one that has
    // nothing for now has none.
    while sources
        .iter()
        .any(|source| source.pending_estimate().precopy() > 0)
    {
        for (number, source) in (0..).zip(&mut *sources) {
            if source.pending_estimate().precopy() == 0 {
                continue;
            }
            let id = source.id().clone();
            let iteration = words.section(SectionKind::Part, number, &id, |body| {
                source.iterate_over(channels, body)
            })?;
            sent += iteration.bytes as u64;
        }
        replies.look()?;
        if interrupt::requested() {
            bail!(Interrupted);
        }
    }
    Ok(sent)
}

/// Looks for Ctrl-C while another thread sends, which waits for as long as the destination takes
/// nothing. Ends with it, or when `sent` is dropped.
fn cancel_on_interrupt(canceller: &Canceller, sent: &mpsc::Receiver<()>) {
    while sent.recv_timeout(TICK) == Err(mpsc::RecvTimeoutError::Timeout) {
        if interrupt::requested() {
            canceller.cancel();
            return;
        }
    }
}

/// As [`iterate`], and to be interrupted.
fn send_precopy(
    sources: &mut [OutgoingDevice],
    channels: &mut SourceChannels,
    words: &mut MainChannelWriter,
    replies: &mut Replies<'_>,
) -> anyhow::Result<u64> {
    let canceller = channels.canceller();
    let (sending, sent) = mpsc::channel();
    let result = thread::scope(|scope| {
        let watching = spawn_scoped(scope, "interrupt", || {
            let sent = sent;
            cancel_on_interrupt(&canceller, &sent);
        });
        watching.context(NO_THREAD)?;
        let result = iterate(sources, channels, words, replies);
        drop(sending);
        result
    });
    match result {
        Err(error) if error.downcast_ref().is_some_and(Error::is_cancelled) => bail!(Interrupted),
        result => result,
    }
}

/// Says that the loads may begin, and all that follows but the end.
fn switch_over(
    subjects: &[Subject],
    outgoing: &mut Outgoing,
    words: &mut MainChannelWriter,
) -> anyhow::Result<()> {
    words.command(Command::SwitchoverStart)?;
    for (number, Subject { id, .. }) in (0..).zip(subjects) {
        words.section(SectionKind::End, number, id, |body| {
            outgoing.write_state(id, body)
        })?;
    }
    for (number, Subject { id, .. }) in (0..).zip(subjects) {
        words.section(SectionKind::Full, number, id, |body| {
            outgoing.write_config(id, body)
        })?;
    }
    Ok(())
}

/// Watches over the save until everything has been sent, or has failed.
fn send_all(
    options: &Options,
    observer: &Observer,
    mut save: Outgoing,
    subjects: &[Subject],
    words: &mut MainChannelWriter,
    replies: &mut Replies<'_>,
) -> (
    Result<Saved, Failed<Vec<MigratableDevice>>>,
    Option<anyhow::Error>,
) {
    let lens: Vec<_> = subjects
        .iter()
        .map(|subject| (subject.id.clone(), subject.len))
        .collect();
    let progress = Progress::new(!options.json, &lens);
    let mut main = switch_over(subjects, &mut save, words).err();
    let mut said = Instant::now();
    while main.is_none() && !save.is_finished() && save.failure().is_none() {
        if interrupt::requested() {
            save.cancel();
            break;
        }
        if let Some(progress) = &progress {
            progress.update(&save.stats());
        }
        observer.look(|| vec![(Side::Source, save.stats())]);
        if said.elapsed() >= HEARTBEAT {
            said = Instant::now();
            if let Err(error) = words.command(Command::Ping(STILL_HERE)) {
                main = Some(anyhow!(error).context("the destination has gone away"));
            }
        }
        if let Err(error) = replies.look() {
            main = Some(error);
        }
        let sending: Vec<_> = save.session().map(AsFd::as_fd).into_iter().collect();
        if let Err(error) = network::tick(observer.tick(), &sending, Vec::new()) {
            main = Some(anyhow!(error));
        }
    }
    // Its peer may know why.
    let until = deadline(interrupt::patience(EXPLANATION));
    while main.is_none()
        && save.failure().as_ref().is_some_and(is_the_peers)
        && Instant::now() < until
    {
        main = replies.wait().err();
    }
    if main.is_some() {
        save.fail(main_failed());
    }
    observer.look(|| vec![(Side::Source, save.stats())]);
    (save.finish(), main)
}

/// Waits for the destination's last word. Where there comes none, nobody here can know whether it has
/// loaded all: then the error says whose status is to be believed.
fn confirm(replies: &mut Replies<'_>) -> anyhow::Result<()> {
    // Ends: with that word, the destination's silence for the time-out or its end, both of which
    // the reading thread tells, or Ctrl-C.
    while !replies.done {
        let heard = replies.wait();
        let refused = replies.refused;
        let unknown = |error: anyhow::Error| {
            if refused {
                error
            } else {
                error.context(
                    "all was sent, and the destination's status alone says what came of it",
                )
            }
        };
        heard.map_err(unknown)?;
        if interrupt::requested() && !replies.done {
            return Err(unknown(Interrupted.into()));
        }
    }
    Ok(())
}

/// What a migration has come to.
struct Sent {
    stats: Stats,
    /// What was sent before the devices stopped, where that was agreed on.
    precopy: Option<u64>,
    /// From then on.
    took: Duration,
}

fn migrate(
    options: &Options,
    (tls, observer): (Option<&tls::Client>, &Observer),
    patience: Duration,
    devices: Vec<Device>,
    subjects: &[Subject],
    words: &mut MainChannelWriter,
    replies: &mut Replies<'_>,
) -> anyhow::Result<Sent> {
    let mut sources = greet(options, devices, words, replies)?;
    let channels = connect_channels(options, tls, patience, words, replies)?;
    let settings = options.settings();
    let mut channels = SourceChannels::greet(channels, &settings)?;
    let precopy = if options.capabilities.precopy_over_channels {
        Some(send_precopy(&mut sources, &mut channels, words, replies)?)
    } else {
        None
    };
    let session = SaveSession::builder().settings(settings);
    let mut session = session.greeted_channels(channels);
    Outgoing::prepare(&sources, &mut session)?;
    let began = Instant::now();
    vm::stop(&mut sources, vm::Reason::FinishMigration)?;
    let outgoing = Outgoing::begin(sources, session).map_err(Error::from)?;
    let (saved, main) = send_all(options, observer, outgoing, subjects, words, replies);
    if interrupt::requested() && main.is_none() && saved.is_err() {
        bail!(Interrupted);
    }
    let (saved, failure) = match saved {
        Ok(saved) => (Some(saved), None),
        Err(failed) => (None, Some(failed.error)),
    };
    let stats = saved.as_ref().map(|saved| saved.stats().clone());
    if let Some(stats) = &stats {
        observer.look(|| vec![(Side::Source, stats.clone())]);
    }
    // Whether the destination may have the end, with which its devices may start.
    let mut ended = false;
    let result = main_channel::join(failure, main)
        .and_then(|()| stats.context("what was saved has its counters"))
        .and_then(|stats| {
            // What was read is all there was: said before the destination believes it.
            device::check(subjects, &stats)?;
            replies.look()?;
            let description = description(subjects, &stats)?;
            replies.all_is_sent = true;
            ended = true;
            words.end(description)?;
            confirm(replies)?;
            Ok(stats)
        });
    let took = began.elapsed();
    match (result, saved) {
        (Ok(stats), Some(saved)) => {
            // Out of downtime.
            if let Err(failed) = saved.cleanup() {
                let (error, back) = failed.into_parts();
                let error = anyhow!(error);
                let left = told(&back);
                say(&format!("all was sent, but afterwards: {error:#} ({left})"));
            }
            Ok(Sent {
                stats,
                precopy,
                took,
            })
        }
        (Err(error), Some(saved)) if ended && !replies.refused => {
            let held = told(&saved.in_doubt());
            Err(error.context(format!(
                "the devices stay stopped ({held}): they may run on the destination"
            )))
        }
        (result, saved) => {
            let back = saved.map(Saved::abort).unwrap_or_default();
            let result = if back.iter().map(Left::from).all(|it| it.is_whole()) {
                result
            } else {
                result.with_context(|| told(&back))
            };
            result.map(|stats| Sent {
                stats,
                precopy,
                took,
            })
        }
    }
}

/// Where the devices are, and what is to be done about those that something is to be done about.
fn told(devices: &[MigratableDevice]) -> String {
    device::told(devices.iter().map(Left::from))
}

/// What stands behind the end, for people.
fn description(subjects: &[Subject], stats: &Stats) -> anyhow::Result<Vec<u8>> {
    let devices = subjects.iter().zip(&stats.devices);
    let devices = devices.map(|(subject, stats)| {
        serde_json::json!({
            "name": subject.id.idstr(),
            "instance_id": subject.id.instance(),
            "packets": stats.packets,
            "bytes": stats.bytes,
        })
    });
    let devices: Vec<_> = devices.collect();
    Ok(serde_json::to_vec(
        &serde_json::json!({ "channels": stats.channels.len(), "devices": devices }),
    )?)
}

/// Talks to the destination until all is over. The channels are connected within `patience`.
fn talk(
    options: &Options,
    (tls, observer): (Option<&tls::Client>, &Observer),
    patience: Duration,
    devices: Vec<Device>,
    subjects: &[Subject],
    main: &Connection,
) -> anyhow::Result<Sent> {
    let mut last = main.try_clone().context("cannot use a connection")?;
    let listening = main.try_clone().context("cannot use a connection")?;
    let heard = ReturnPathEvent::default();
    let mut replies = Replies::new(&heard);
    thread::scope(|scope| {
        let listen = || main_channel::listen(listening, options.timeout, &heard);
        spawn_scoped(scope, "listener", listen).context(NO_THREAD)?;
        let result = main
            .try_clone()
            .context("cannot use a connection")
            .and_then(MainChannelWriter::open)
            .and_then(|mut words| {
                let result = migrate(
                    options,
                    (tls, observer),
                    patience,
                    devices,
                    subjects,
                    &mut words,
                    &mut replies,
                );
                result.inspect_err(|error| words.give_up(error))
            })
            // What the destination said last may be why the words did not get through.
            .map_err(|error| explain(error, options.timeout, &mut replies));
        if result.is_err() {
            last.linger(LINGER);
        }
        main.shutdown(Shutdown::Both);
        result
    })
}

/// A broken connection is explained by what the destination has said before.
fn explain(error: anyhow::Error, timeout: Duration, replies: &mut Replies<'_>) -> anyhow::Error {
    let broken = error.downcast_ref::<Error>().is_some_and(is_the_peers);
    if error.downcast_ref::<Error>().is_some_and(interrupted) {
        return anyhow!(Interrupted);
    }
    let error = if error.downcast_ref::<Error>().is_some_and(timed_out) {
        anyhow!(
            "the destination has taken nothing for {} s",
            timeout.as_secs_f64()
        )
    } else {
        error
    };
    let until = deadline(interrupt::patience(EXPLANATION));
    while broken && Instant::now() < until {
        if let Err(reason) = replies.wait() {
            return main_channel::both(error, &reason);
        }
    }
    error
}

/// Runs `send`.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let _in_order = interrupt::in_order();
    limits::allow_migration(options.channels, options.devices.len())?;
    let need = Need {
        budgets: of_save(options.budget, options.devices.len()),
        devices: options.devices.len(),
        behind: options.devices.len(),
        channels: options.channels as usize,
    };
    need.check(&options.settings())?;
    let observer = options.observe.start()?;
    let (devices, subjects): (Vec<_>, Vec<_>) =
        device::open(&options.devices, true)?.into_iter().unzip();
    let begun = Instant::now();
    let tls = options.tls.client(&options.to)?;
    let main = connect(
        &options.to,
        tls.as_ref(),
        1,
        options.connect_timeout,
        options.timeout,
        None,
    )?
    .remove(0);
    let patience = options.connect_timeout.saturating_sub(begun.elapsed());
    let sent = talk(
        options,
        (tls.as_ref(), &observer),
        patience,
        devices,
        &subjects,
        &main,
    );
    observer.finish(sent.as_ref().err());
    let Sent {
        stats,
        precopy,
        took,
    } = sent?;
    interrupt::settled("all is loaded, and the destination has said so");
    drop(main);
    // The destination has it all: what cannot be said of it here is no failure.
    let devices = match device::check(&subjects, &stats) {
        Ok(checked) => device::describe(checked, |id| Times::new(stats.device(id), None)),
        Err(error) => {
            say(&format!(
                "warning: all is loaded, but afterwards: {error:#}"
            ));
            Vec::new()
        }
    };
    let mut sent = Transfer::new("sent", devices, &stats, took);
    sent.totals.precopy_bytes = precopy;
    sent.tell(options.json);
    Ok(())
}
