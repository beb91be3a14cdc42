//! `receive`: the destination's side of a migration between two processes.
//!
//! ```text
//!   listen ─▶ main channel ─▶ Incoming, RESUMING ─▶ the same devices? ─▶ pong
//!     ─▶ N channels ─▶ outgoing start ─▶ all loaded ─▶ EOF ─▶ shut 0 ─▶ what came
//! ```
//!
//! See `main_channel` for what is said, and `reader` for who reads it. The first connection that says `QEVM` is the main channel,
//! those with the multifd magic are channels; anything else is closed.
//!
//! # Threads
//!
//! One thread reads the main channel and tells the session what it says. The main thread accepts
//! connections, says once a second that it is still there, and ends both.

mod reader;

use std::{
    net::Shutdown,
    os::fd::AsFd,
    sync::{OnceLock, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail, ensure};
use vfio_migration::{
    Channel, Device, Error, ErrorKind, LoadSession, Settings, Side, Stats, Violation,
    migration::{DeviceSettings, Incoming, Loaded, MigratableDevice, OnOffAuto, vm},
    stream::Reply,
};
use vfio_migration_uring::{deadline, thread::spawn_scoped};

use self::reader::MainChannel;
use crate::{
    Interrupted,
    acceptor::{self, Acceptor, Identified},
    args::{self, BackendArg, CapabilitiesArgs, SpillArgs, WriterArg},
    device::{self, Checked, Spec, Subject},
    host_memory::{NO_THREAD, Need, of_load},
    interrupt, limits,
    listen::Listener,
    main_channel::{self, EXPLANATION, HEARTBEAT, LINGER, ReturnPath, is_the_peers, main_failed},
    moved::{Times, Transfer},
    network::{self, Address, Connection, Peek, TICK},
    observe::{ObserveArgs, Observer},
    output::{say, say_of_stranger},
    progress::Progress,
    tls::WhoArgs,
};

/// Receive devices' states from a `vfio-migrate send`
///
/// Listens on ADDR for one source, which connects a main channel and N multifd channels. When all
/// devices are loaded it prints for each device the packets, and the bytes and sha256 of the state and
/// of the config (framing tags included). The source prints the same values.
///
/// Without --tls-cert there is no authentication: anyone who can connect can send. Then it listens on a loopback
/// address or a unix socket only, or with --insecure.
#[derive(Debug, clap::Args)]
#[command(after_help = device::HELP)]
pub(crate) struct Options {
    /// Where to listen: HOST:PORT (port 0: any that is free), unix:PATH, or stdin: a socket that listens
    /// already, as a service manager passes it
    #[arg(long, value_name = "ADDR")]
    listen: Address,
    #[command(flatten)]
    who: WhoArgs,
    /// A device, as below; once for each
    #[arg(long = "device", value_name = "SPEC", required = true, num_args = 1..)]
    devices: Vec<Spec>,
    /// The number of multifd channels; the source must make as many
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=255))]
    channels: u32,
    /// The memory in which packets may wait [default: 32MiB; more from 33 devices on, 128MiB for 1024]
    #[arg(long, value_name = "SIZE", value_parser = args::memory)]
    budget: Option<usize>,
    #[command(flatten)]
    spill: SpillArgs,
    /// The largest accepted packet (at least 1MiB)
    #[arg(long, value_name = "SIZE", default_value = "4MiB", value_parser = args::packet)]
    max_packet: usize,
    /// What moves the bytes into the devices
    #[arg(long, value_enum, default_value_t)]
    backend: BackendArg,
    /// Which thread writes to the devices
    #[arg(long, value_enum, default_value_t)]
    writer: WriterArg,
    #[command(flatten)]
    capabilities: CapabilitiesArgs,
    /// The longest time without progress, or without a sign of the source, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = args::seconds)]
    timeout: Duration,
    /// How long to wait for a source to connect, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "600", value_parser = args::seconds)]
    accept_timeout: Duration,
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
        settings.writer = self.writer.into();
        settings.budget = self.budget;
        self.spill.set(&mut settings);
        settings.channels = self.channels;
        let packet = u32::try_from(self.max_packet).unwrap_or(u32::MAX);
        settings.max_packet = packet.saturating_add(12); // the header inside
        settings.no_progress = self.timeout;
        settings.hello_timeout = acceptor::hello_timeout(self.timeout);
        settings
    }
}

// -------------------------------------------------------------------------------- connections

/// The source's connections, as they come.
struct SourceConnections<'a> {
    options: &'a Options,
    acceptor: Acceptor,
    /// Channels that came before the main channel.
    early: Vec<Channel>,
}

impl SourceConnections<'_> {
    /// Waits for the main channel.
    fn main(&mut self) -> anyhow::Result<Connection> {
        let deadline = deadline(self.options.accept_timeout);
        loop {
            match self.acceptor.answer()? {
                Some(Identified::Main(connection)) => return Ok(connection),
                Some(Identified::Channel(channel)) => {
                    ensure!(
                        self.early.len() < self.options.channels as usize,
                        "more than {} multifd channels and no main channel",
                        self.options.channels
                    );
                    self.early.push(channel);
                    continue;
                }
                None => {}
            }
            if interrupt::requested() {
                bail!(Interrupted);
            }
            ensure!(
                Instant::now() < deadline,
                "no source has connected within {} s",
                self.options.accept_timeout.as_secs_f64()
            );
            network::tick(TICK, &[], self.acceptor.fds())?;
        }
    }

    /// A multifd channel, if one has come.
    fn channel(&mut self) -> anyhow::Result<Option<Channel>> {
        if let Some(channel) = self.early.pop() {
            return Ok(Some(channel));
        }
        match self.acceptor.answer()? {
            Some(Identified::Channel(channel)) => Ok(Some(channel)),
            Some(Identified::Main(_)) => {
                say_of_stranger("a second main channel was closed");
                Ok(None)
            }
            None => Ok(None),
        }
    }
}

// --------------------------------------------------------------------------------------- load

/// The main thread's part, until all is loaded and the main channel has ended, or all has failed.
struct Supervisor<'a> {
    options: &'a Options,
    observer: &'a Observer,
    incoming: &'a Incoming,
    path: &'a ReturnPath,
    connections: SourceConnections<'a>,
    announced: &'a OnceLock<()>,
    channels: u32,
    deadline: Instant,
    said: Instant,
}

impl Supervisor<'_> {
    /// Takes in the channels that have come. `all` says that no more can come.
    fn admit(&mut self, all: bool) -> anyhow::Result<()> {
        let expected = self.options.channels;
        // Ends: each round is a channel, and they are counted.
        while let Some(channel) = self.connections.channel()? {
            ensure!(
                self.channels < expected,
                "the source makes more than {expected} multifd channels: --channels must be the \
                 same on both sides"
            );
            self.incoming.add_channel(channel)?;
            self.channels += 1;
        }
        ensure!(
            self.channels == expected || !all,
            "the source has made {} multifd channels, not {expected}: --channels must be the same \
             on both sides",
            self.channels
        );
        ensure!(
            self.channels == expected || Instant::now() < self.deadline,
            "{} of {expected} multifd channels have come within {} s",
            self.channels,
            self.options.timeout.as_secs_f64()
        );
        Ok(())
    }

    fn round(&mut self) -> anyhow::Result<()> {
        self.admit(false)?;
        if self.said.elapsed() >= HEARTBEAT {
            self.said = Instant::now();
            self.path.beat();
        }
        let loading: Vec<_> = self
            .incoming
            .session()
            .map(AsFd::as_fd)
            .into_iter()
            .collect();
        network::tick(
            self.observer.tick(),
            &loading,
            self.connections.acceptor.fds(),
        )?;
        Ok(())
    }

    fn run(
        &mut self,
        progress: Option<&Progress>,
        is_read: impl Fn() -> bool,
    ) -> anyhow::Result<Option<Instant>> {
        let mut ended = None;
        loop {
            if self.incoming.is_finished() {
                ended.get_or_insert_with(Instant::now);
                if is_read() && self.incoming.failure().is_none() {
                    // The source has said that all is sent: all its connections are made. What it has
                    // announced is on its way.
                    self.admit(self.announced.get().is_none())?;
                    if self.channels == self.options.channels {
                        return Ok(ended);
                    }
                }
            }
            if interrupt::requested() {
                self.incoming.cancel();
            }
            if self.incoming.failure().is_some() {
                // One channel too many may be why: the session could not know.
                if self.channels == self.options.channels && !interrupt::requested() {
                    self.admit(false)?;
                }
                return Ok(None);
            }
            if let Some(progress) = progress {
                progress.update(&self.incoming.stats());
            }
            let stats = || vec![(Side::Destination, self.incoming.stats())];
            self.observer.look(stats);
            self.round()?;
        }
    }
}

/// Behind the description the source says nothing, until it knows that all is loaded.
fn nothing_behind_the_end(main: &Connection) -> anyhow::Result<()> {
    match main.peek()? {
        Peek::Nothing | Peek::End => Ok(()),
        Peek::Part | Peek::Whole(_) => bail!("the main channel goes on behind its end"),
    }
}

fn load(
    observer: &Observer,
    connections: SourceConnections<'_>,
    devices: Vec<Device>,
    subjects: &[Subject],
    main: &Connection,
    path: &ReturnPath,
) -> anyhow::Result<(Loaded, Duration)> {
    let options = connections.options;
    let mut settings = DeviceSettings::default();
    settings.transfer = OnOffAuto::On;
    let devices = devices.into_iter();
    let incoming = Incoming::setup(
        devices
            .map(|it| MigratableDevice::new(it, settings.clone()))
            .collect(),
        &options.capabilities.capabilities(),
        LoadSession::builder().settings(options.settings()),
        Box::new(|| Ok(())),
    )
    .map_err(Error::from)?;
    let (switched, enough, announced) = (OnceLock::new(), OnceLock::new(), OnceLock::new());
    let reader = MainChannel {
        options,
        connection: main,
        path,
        incoming: &incoming,
        subjects,
        switched: &switched,
        announced: &announced,
        enough: &enough,
    };
    let mut watch = Supervisor {
        options,
        observer,
        incoming: &incoming,
        path,
        connections,
        announced: &announced,
        channels: 0,
        deadline: deadline(options.timeout),
        said: Instant::now(),
    };
    let names: Vec<_> = subjects
        .iter()
        .map(|subject| (subject.id.clone(), None))
        .collect();
    let progress = Progress::new(!options.json, &names);
    let (watched, read) = thread::scope(|scope| {
        let reading = match spawn_scoped(scope, "reader", || reader.run()) {
            Ok(reading) => reading,
            Err(error) => {
                incoming.fail(main_failed());
                return (Err(anyhow!(error).context(NO_THREAD)), None);
            }
        };
        let watched = watch.run(progress.as_ref(), || reading.is_finished());
        if watched.is_err() {
            incoming.fail(main_failed());
        }
        let ends_within = |patience| {
            let until = deadline(patience);
            while !reading.is_finished() && Instant::now() < until {
                thread::sleep(Duration::from_millis(5));
            }
            reading.is_finished()
        };
        // The source may know why a channel has failed. What the reader says after that is our own
        // doing.
        let ask = incoming.failure().as_ref().is_some_and(is_the_peers);
        let by_itself = ends_within(if ask { EXPLANATION } else { Duration::ZERO });
        enough.get_or_init(|| ());
        // Only within an event that does not go on: what is shut down breaks the source's writes,
        // and it could not be listened to any more while it takes in our last words.
        if !ends_within(4 * TICK) {
            main.shutdown(Shutdown::Read);
        }
        let read = reading
            .join()
            .unwrap_or_else(|_| Err(anyhow!("a thread panicked")));
        let read = read.and_then(|()| nothing_behind_the_end(main));
        let by_itself = |error: &anyhow::Error| by_itself && !error.is::<Interrupted>();
        (watched, read.err().filter(by_itself))
    });
    if read.is_some() {
        incoming.fail(main_failed());
    }
    drop(progress);
    observer.look(|| vec![(Side::Destination, incoming.stats())]);
    let loaded = finish(incoming);
    let ended = watched?;
    if interrupt::requested() && read.is_none() && loaded.is_err() {
        bail!(Interrupted);
    }
    let (loaded, failure) = match loaded {
        Ok(loaded) => (Some(loaded), None),
        Err(error) => (None, Some(error)),
    };
    let differs = failure.as_ref().and_then(|error| match error.kind() {
        ErrorKind::Protocol(Violation::ChannelId { .. }) => Some("--channels"),
        ErrorKind::Protocol(Violation::PrecopyOverChannels { .. }) => {
            Some("--precopy-over-channels")
        }
        ErrorKind::Protocol(Violation::ConfigAfterIterables { .. }) => {
            Some("--config-after-iterables")
        }
        _ => None,
    });
    let result = main_channel::join(failure, read);
    match differs {
        Some(option) => {
            result.with_context(|| format!("{option} must be the same on both sides"))?;
        }
        None => result?,
    }
    let ended = ended.unwrap_or_else(Instant::now);
    let took = switched
        .get()
        .map_or(Duration::ZERO, |at| ended.saturating_duration_since(*at));
    Ok((loaded.context("what was loaded has its devices")?, took))
}

/// Waits until all is loaded, and starts the devices. The channels need not have ended: a source, or
/// a relay on the way, may end them only when it knows that all is loaded.
fn finish(incoming: Incoming) -> vfio_migration::Result<Loaded> {
    let mut loaded = incoming.finish()?;
    vm::start(loaded.devices_mut())?;
    Ok(loaded)
}

/// Does everything that can still fail, before the source is told that all is loaded. Meanwhile the
/// source hears that this side is still there: a disk may take its time.
fn keep<'a>(
    subjects: &'a [Subject],
    stats: &Stats,
    main: &Connection,
    path: &ReturnPath,
) -> anyhow::Result<Vec<Checked<'a>>> {
    let (keeping, kept) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let beat = move || {
            while kept.recv_timeout(HEARTBEAT) == Err(mpsc::RecvTimeoutError::Timeout) {
                path.beat();
            }
        };
        spawn_scoped(scope, "heartbeat", beat).context(NO_THREAD)?;
        let keep = || {
            let mut checked = device::check(subjects, stats)?;
            if interrupt::requested() {
                bail!(Interrupted);
            }
            ensure!(
                matches!(main.peek()?, Peek::Nothing | Peek::End),
                "the source has given up: it says more behind its end"
            );
            device::keep(&mut checked)?;
            Ok(checked)
        };
        let result = keep();
        drop(keeping);
        result
    })
}

/// Runs `receive`.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let _in_order = interrupt::in_order();
    let files = limits::allow_migration(options.channels, options.devices.len())?;
    let need = Need {
        budgets: of_load(options.budget, options.devices.len()),
        devices: options.devices.len(),
        behind: options.devices.len(),
        channels: options.channels as usize,
    };
    need.check(&options.settings())?;
    let observer = options.observe.start()?;
    let (devices, subjects): (Vec<_>, Vec<_>) =
        device::open(&options.devices, false)?.into_iter().unzip();
    let listener = Listener::bind(&options.listen, &options.who)?;
    say(&format!("listening on {}", listener.address()));
    let mut connections = SourceConnections {
        options,
        acceptor: Acceptor::new(listener, options.timeout, limits::strangers(files)),
        early: Vec::new(),
    };
    let mut main = connections.main()?;
    let path = ReturnPath::new(main.try_clone()?);
    let loaded = load(&observer, connections, devices, &subjects, &main, &path).and_then(
        |(loaded, took)| {
            let stats = loaded.stats();
            observer.look(|| vec![(Side::Destination, stats.clone())]);
            match keep(&subjects, &stats, &main, &path) {
                Ok(checked) => Ok((checked, stats, took, loaded)),
                Err(error) => {
                    // The source goes on: nothing may run here when it hears of that.
                    let _stopped = loaded.abort();
                    Err(error)
                }
            }
        },
    );
    match &loaded {
        Ok(_) => {
            if path.reply(&Reply::Shut(0)).is_err() {
                say(
                    "all is loaded and kept, but the source cannot be told: it is gone. Where it \
                     reports a failure, this side is right",
                );
            }
        }
        Err(error) => path.refuse(error),
    }
    if loaded.is_ok() {
        interrupt::settled("all is loaded, and the source knows");
    }
    main.linger(LINGER);
    observer.finish(loaded.as_ref().err());
    let (checked, stats, took, loaded) = loaded?;
    if let Err(failed) = loaded.join() {
        let error = anyhow!(failed.error);
        say(&format!(
            "warning: all is loaded, but afterwards: {error:#}"
        ));
    }
    let devices = device::describe(checked, |id| Times::new(None, stats.device(id)));
    Transfer::new("received", devices, &stats, took).tell(options.json);
    Ok(())
}
