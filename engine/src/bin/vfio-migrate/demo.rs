//! `demo`: simulated devices migrate within this process, over loopback TCP.
//!
//! ```text
//!   SimDevice ─▶ Outgoing ══ N × TCP over 127.0.0.1 ══▶ Incoming ─▶ SimDevice
//!       │                                                                 │
//!       └────── state and config digests, when all is over: equal? ───────┘
//! ```
//!
//! Both sessions run on their own threads; the main thread draws, and looks for Ctrl-C and for a
//! failure of one side, which ends the other.

use std::{
    io,
    net::{TcpListener, TcpStream},
    os::fd::AsFd,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail, ensure};
use serde::Serialize;
use vfio_migration::{
    Backend, Device, DeviceId, DeviceStats, Error, ErrorKind, LoadSession, SaveSession, Settings,
    Side, SourceChannels, Stats,
    migration::{
        DeviceSettings, Incoming, MigratableDevice, OnOffAuto, Outgoing, OutgoingDevice,
        SwitchoverAck, SwitchoverAcks, vm,
    },
    sim::{SimConfig, SimDevice, SimHandle},
};

use crate::{
    Interrupted, Usage,
    args::{self, BackendArg, CapabilitiesArgs, SpillArgs, WriterArg, show},
    failure::{About, Failure},
    host_memory::{Need, of_load, of_save},
    interrupt, json,
    moved::{self, Channel, Times, Totals},
    network,
    observe::{ObserveArgs, Observer},
    output::{self, rate, time},
    progress::Progress,
};

/// Migrate simulated devices within this process, and compare
///
/// A source and a destination run side by side, connected by TCP over loopback. At the end the state and
/// config of each destination device are compared with the source's; `verified` is printed only if all
/// are equal.
///
/// The table shows for each device:
///   bytes, packets   what went over the channels: the state in pieces, and the config
///   time, GB/s       from the switchover's start to the last byte in the destination
///   starved          time in which the destination had nothing to write: the next packet was missing
///   blocked          time in which the source could not read: all of its memory was in use
///   writing          time in which writes into the destination were under way
///
/// Below it a table for each side has the phases of each device's downtime. They overlap:
///   stop             the device is stopped, by way of its P2P state if it has one
///   set state        it goes to STOP_COPY; on the destination, before the downtime, to RESUMING
///   first byte out   from STOP_COPY to the end of the first packet sent
///   read             from STOP_COPY to the last byte read from it
///   wire             from the first packet's queueing to the last packet's last byte
///   first byte in    from the switchover's start to the first packet: the first part of `wait`
///   wait             time in which its next packet was missing
///   write            from the switchover's start to the last byte written into it, without `wait`
///   config           its config is saved, or loaded
///   resume           it goes to STOP, which makes the driver check the state, and starts
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Options {
    /// The number of devices
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1024))]
    devices: u32,
    /// The size of each device's state (at least the 24 bytes of its header)
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = args::state)]
    state: u64,
    /// The number of connections
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=255))]
    channels: u32,
    /// The most data in a packet
    #[arg(long, value_name = "SIZE", default_value = "1MiB", value_parser = args::packet)]
    packet: usize,
    /// The memory in which packets may wait, on the source and on the destination each
    ///
    /// Default: 32MiB, and more for many devices: up to 128MiB on the destination, 256MiB on the source.
    /// The minimum is 4KiB for each device, and one packet with its headers.
    #[arg(long, value_name = "SIZE", value_parser = args::memory)]
    budget: Option<usize>,
    #[command(flatten)]
    spill: SpillArgs,
    /// What moves the bytes in and out of the devices
    #[arg(long, value_enum, default_value_t)]
    backend: BackendArg,
    /// Which thread writes to the devices
    #[arg(long, value_enum, default_value_t)]
    writer: WriterArg,
    #[command(flatten)]
    observe: ObserveArgs,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            devices: 4,
            state: 256 << 20,
            channels: 4,
            packet: 1 << 20,
            budget: None,
            spill: SpillArgs::default(),
            backend: BackendArg::Auto,
            writer: WriterArg::Ring,
            observe: ObserveArgs::default(),
            json: false,
        }
    }
}

impl Options {
    fn settings(&self) -> Settings {
        let mut settings = Settings::default();
        settings.backend = Backend::from(self.backend);
        settings.writer = self.writer.into();
        settings.budget = self.budget;
        self.spill.set(&mut settings);
        settings.channels = self.channels;
        let packet = u32::try_from(self.packet).unwrap_or(u32::MAX);
        settings.max_packet = settings.max_packet.max(packet.saturating_add(12));
        settings
    }
}

/// One device, seen from both sides.
struct Pair {
    id: DeviceId,
    source: SimHandle,
    destination: SimHandle,
}

impl Pair {
    /// What differs, if anything does.
    fn difference(&self) -> Option<&'static str> {
        let (source, destination) = (&self.source, &self.destination);
        if !destination.has_loaded() {
            Some("was not loaded")
        } else if source.digest() != destination.digest() {
            Some("has another state than its source")
        } else if source.config_digest() != destination.config_digest() {
            Some("has another config than its source")
        } else {
            None
        }
    }
}

/// A device's row.
#[derive(Serialize)]
struct Row {
    idstr: String,
    instance: u32,
    state_bytes: u64,
    /// Over the channels, the packets' 12-byte headers and the config included.
    bytes: u64,
    packets: u64,
    seconds: f64,
    gb_per_second: f64,
    #[serde(flatten)]
    times: Times,
    verified: bool,
    /// What is wrong where it is not.
    #[serde(skip)]
    difference: Option<&'static str>,
    #[serde(skip)]
    device: String,
    #[serde(skip)]
    shown: [Duration; 4],
}

impl Row {
    fn new(pair: &Pair, saved: &DeviceStats, loaded: &DeviceStats) -> Self {
        let transfer = loaded.phases.wait + loaded.phases.write;
        let state_bytes = pair.source.image().len();
        let difference = pair.difference();
        Self {
            idstr: pair.id.idstr().to_owned(),
            instance: pair.id.instance(),
            state_bytes,
            bytes: loaded.bytes,
            packets: loaded.packets,
            seconds: transfer.as_secs_f64(),
            gb_per_second: rate(state_bytes, transfer),
            times: Times::new(Some(saved), Some(loaded)),
            verified: difference.is_none(),
            difference,
            device: pair.id.to_string(),
            shown: [
                transfer,
                loaded.starved,
                saved.starved,
                loaded.transfers.total,
            ],
        }
    }

    fn cells(&self) -> Vec<String> {
        let [transfer, starved, blocked, writing] = self.shown.map(time);
        vec![
            self.device.clone(),
            self.bytes.to_string(),
            self.packets.to_string(),
            transfer,
            format!("{:.2}", self.gb_per_second),
            starved,
            blocked,
            writing,
        ]
    }
}

#[derive(Serialize)]
struct Output {
    backend: &'static str,
    devices: Vec<Row>,
    channels: Vec<Channel>,
    totals: Totals,
    verified: bool,
    /// Why it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Failure>,
    #[serde(skip)]
    state_bytes: u64,
    #[serde(skip)]
    took: Duration,
}

impl Output {
    fn text(&self) -> String {
        let rows: Vec<_> = self.devices.iter().map(Row::cells).collect();
        let mut text = output::table(
            &[
                "device", "bytes", "packets", "time", "GB/s", "starved", "blocked", "writing",
            ],
            &rows,
        );
        text.push('\n');
        let devices = self.devices.iter();
        let devices = devices.map(|row| (&*row.device, row.times));
        text.push_str(&moved::phase_tables(devices));
        text.push_str(&format!(
            "\n{} in {:.2} s, {:.2} GB/s, {} channels, backend {}; \
             the destination held at most {} of its budget of {}\n",
            show(self.state_bytes),
            self.took.as_secs_f64(),
            rate(self.state_bytes, self.took),
            self.channels.len(),
            self.backend,
            show(self.totals.held_high),
            show(self.totals.budget),
        ));
        text.push_str(&output::spilled(self.totals.spilled_bytes));
        text
    }
}

fn pairs(options: &Options) -> anyhow::Result<Vec<(Pair, Device, Device)>> {
    let pair = |number: u32| {
        // As a PCI bus would name them.
        let (bus, slot) = (number / 32, number % 32);
        let id = DeviceId::new(format!("0000:{bus:02x}:{slot:02x}.0/vfio"), 0)?;
        let device = |seed| {
            SimDevice::new(SimConfig {
                seed,
                len: options.state,
                ..SimConfig::default()
            })
        };
        let source = device(u64::from(number) + 1)?;
        // Another state before, or what follows would prove nothing.
        let destination = device(u64::from(number) + (1 << 32))?;
        let pair = Pair {
            id: id.clone(),
            source: source.handle(),
            destination: destination.handle(),
        };
        let source = Device::new(id.clone(), Box::new(source))?;
        let destination = Device::new(id, Box::new(destination))?;
        Ok((pair, source, destination))
    };
    (0..options.devices).map(pair).collect()
}

fn connect(listener: &TcpListener) -> anyhow::Result<(TcpStream, TcpStream)> {
    // Loopback: the listener's backlog takes it at once.
    let near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    near.set_nodelay(true)?;
    Ok((near, far))
}

/// What is to be said of both sides' ends: the failure that caused the other's.
fn failure<S, L>(
    saved: vfio_migration::Result<S>,
    loaded: vfio_migration::Result<L>,
) -> anyhow::Result<(S, L)> {
    let follows = |kind: &ErrorKind| {
        matches!(
            kind,
            ErrorKind::Channel | ErrorKind::Cancelled | ErrorKind::Missing | ErrorKind::Protocol(_)
        )
    };
    match (saved, loaded) {
        (Ok(saved), Ok(loaded)) => Ok((saved, loaded)),
        (Err(save), Err(load)) if follows(save.kind()) && !load.is_cancelled() => {
            Err(load).context("destination")
        }
        (Err(error), _) => Err(error).context("source"),
        (_, Err(error)) => Err(error).context("destination"),
    }
}

/// What a migration has come to.
struct Migrated {
    pairs: Vec<Pair>,
    saved: Stats,
    loaded: Stats,
    took: Duration,
}

fn migrate(options: &Options, observer: &Observer) -> anyhow::Result<Migrated> {
    let settings = options.settings();
    let count = options.devices as usize;
    let budgets = [
        of_load(options.budget, count),
        of_save(options.budget, count),
    ];
    let need = Need {
        budgets: budgets[0].saturating_add(budgets[1]),
        devices: 2 * count,
        behind: 2 * count,
        channels: options.channels as usize,
    };
    need.check(&settings)?;
    let mut load = LoadSession::builder().settings(settings.clone());
    let mut device_settings = DeviceSettings::default();
    device_settings.transfer = OnOffAuto::On;
    device_settings.buffer_len = Some(options.packet);
    let (mut pairs_only, mut devices) = (Vec::new(), Vec::new());
    let mut sources = Vec::new();
    let (capabilities, acks) = (
        CapabilitiesArgs::default().capabilities(),
        SwitchoverAcks::new(SwitchoverAck::Off),
    );
    for (pair, source, destination) in pairs(options)? {
        pairs_only.push(pair);
        let source = MigratableDevice::new(source, device_settings.clone());
        // There is no main channel between two sides of one process.
        let source = OutgoingDevice::setup(source, &capabilities, &acks, io::sink());
        sources.push(source.map_err(Error::from).context("source")?);
        devices.push(MigratableDevice::new(destination, device_settings.clone()));
    }
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("cannot listen on loopback")?;
    let mut channels = Vec::new();
    for _ in 0..options.channels {
        let (near, far) = connect(&listener).context("cannot connect over loopback")?;
        channels.push(near.into());
        load = load.channel(far);
    }
    let channels = SourceChannels::greet(channels, &settings).context("source")?;
    let load = Incoming::setup(devices, &capabilities, load, Box::new(|| Ok(())));
    let load = load.map_err(Error::from).context("destination")?;
    let save = SaveSession::builder().settings(settings);
    let mut save = save.greeted_channels(channels);
    Outgoing::prepare(&sources, &mut save).context("source")?;
    let began = Instant::now();
    vm::stop(&mut sources, vm::Reason::FinishMigration).context("source")?;
    let save = Outgoing::begin(sources, save);
    let save = save.map_err(Error::from).context("source")?;
    load.switchover_start().context("destination")?;
    let lens = pairs_only
        .iter()
        .map(|pair| (pair.id.clone(), Some(pair.source.image().len())));
    let lens: Vec<_> = lens.collect();
    let progress = Progress::new(!options.json, &lens);
    let look = |save: &Outgoing, load: &Incoming| {
        let both = || {
            let (saved, loaded) = (save.stats(), load.stats());
            vec![(Side::Source, saved), (Side::Destination, loaded)]
        };
        observer.look(both);
    };
    look(&save, &load);
    let mut ended = None;
    while !(load.is_finished() && save.is_finished()) {
        if load.is_finished() {
            ended.get_or_insert_with(|| began.elapsed());
        }
        if interrupt::requested() || save.failure().is_some() || load.failure().is_some() {
            save.cancel();
            load.cancel();
        }
        if let Some(progress) = &progress {
            progress.update(&load.stats());
        }
        look(&save, &load);
        let sessions = [
            load.session().map(AsFd::as_fd),
            save.session().map(AsFd::as_fd),
        ];
        let sessions: Vec<_> = sessions.into_iter().flatten().collect();
        network::tick(observer.tick(), &sessions, Vec::new())?;
    }
    look(&save, &load);
    let took = ended.unwrap_or_else(|| began.elapsed());
    if let Some(progress) = &progress {
        progress.update(&load.stats());
    }
    drop(progress);
    let saved = save.finish().map_err(Error::from);
    let loaded = load.finish().map_err(Error::from);
    if interrupt::requested() && (saved.is_err() || loaded.is_err()) {
        bail!(Interrupted);
    }
    let (saved, mut loaded) = failure(saved, loaded)?;
    let started = vm::start(loaded.devices_mut());
    started.context("destination")?;
    let migrated = Migrated {
        pairs: pairs_only,
        saved: saved.stats().clone(),
        loaded: loaded.stats(),
        took,
    };
    observer.look(|| {
        let (saved, loaded) = (migrated.saved.clone(), migrated.loaded.clone());
        vec![(Side::Source, saved), (Side::Destination, loaded)]
    });
    // Out of downtime.
    let stopped = saved.cleanup().map_err(Error::from);
    let joined = loaded.join().map_err(Error::from);
    let _devices = failure(stopped, joined)?;
    Ok(migrated)
}

/// Runs `demo`.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    if options.state.checked_mul(options.devices.into()).is_none() {
        bail!(Usage(
            "--devices times --state is more than 2^64 bytes".into()
        ));
    }
    let in_order = interrupt::in_order();
    let observer = options.observe.start()?;
    let migrated = migrate(options, &observer);
    observer.finish(migrated.as_ref().err());
    drop(in_order);
    let Migrated {
        pairs,
        saved,
        loaded,
        took,
    } = migrated?;
    let mut rows = Vec::new();
    for (pair, (saved, loaded)) in (pairs.iter()).zip(saved.devices.iter().zip(&loaded.devices)) {
        ensure!(
            saved.device == pair.id && loaded.device == pair.id,
            "the sessions' devices are not in the order given"
        );
        rows.push(Row::new(pair, saved, loaded));
    }
    let state_bytes = rows.iter().map(|row| row.state_bytes).sum();
    let mut totals = Totals::new(&loaded, Some((state_bytes, took)));
    totals.late_wakeups += saved.late_wakeups;
    let verified = rows.len() == pairs.len() && rows.iter().all(|row| row.verified);
    let differs = pairs.iter().zip(&rows).find_map(|(pair, row)| {
        Some(About {
            device: pair.id.clone(),
            what: format!("not verified: device {} {}", pair.id, row.difference?),
        })
    });
    let differs = differs.map(|about| anyhow!(about));
    let output = Output {
        backend: loaded.backend,
        devices: rows,
        channels: moved::channels(&loaded),
        totals,
        verified,
        error: differs.as_ref().map(Failure::new),
        state_bytes,
        took,
    };
    if options.json {
        json::print(&output)?;
    } else {
        output::print(&output.text())?;
    }
    if let Some(error) = differs {
        return Err(error);
    }
    if !options.json {
        output::print("verified\n")?;
    }
    Ok(())
}
