//! The engine under load, through its public session API alone.
//!
//! ```text
//!   memory ─▶ channels threads: Publisher::lease, fill, publish ─┐
//!                                                                ├─▶ LoadSession ─▶ sinks
//!   sockets ─▶ LoadSession's own channels ───────────────────────┘
//! ```

use std::{
    fs::File,
    io,
    sync::{Arc, Barrier, OnceLock},
    thread,
    time::Instant,
};

use vfio_migration::{
    Backend, Channel, DeviceId, LoadSession, Report, SaveSession, Settings, Stats, Writer,
    wire::{self, PacketHeader},
};

use crate::{
    measure::{Mark, Sample},
    plan::{Plan, Tickets},
    sink::{self, Ended, Sink},
    source::{self, Source, Wire},
};

/// What a round of the engine gave.
#[derive(Debug)]
pub struct Outcome {
    /// What it took.
    pub sample: Sample,
    /// The engine's own counters.
    pub stats: Stats,
}

/// A [`Writer`] on the command line.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum WriterArgument {
    /// The I/O thread, through its ring.
    Ring,
    /// A channel, while the device is quick.
    Auto,
}

impl From<WriterArgument> for Writer {
    fn from(argument: WriterArgument) -> Self {
        match argument {
            WriterArgument::Ring => Self::Ring,
            WriterArgument::Auto => Self::Auto,
        }
    }
}

/// Which thread writes, where somebody has said it.
static WRITER: OnceLock<Writer> = OnceLock::new();

/// Has all loads of this process and its children write so, instead of by default. The first call counts.
pub fn write_by(writer: Writer) {
    let _said_before = WRITER.set(writer);
}

/// What a child is to be told of [`write_by`], behind its role.
pub(crate) fn writer_arguments() -> &'static [&'static str] {
    match WRITER.get() {
        None => &[],
        Some(Writer::Ring) => &["--writer", "ring"],
        Some(_) => &["--writer", "auto"],
    }
}

/// The settings that are measured: the defaults, but for [`write_by`].
#[must_use]
pub fn settings() -> Settings {
    let mut settings = Settings::default();
    if let Some(writer) = WRITER.get() {
        settings.writer = *writer;
    }
    settings
}

/// The same with this backend.
#[must_use]
pub fn with_backend(backend: Backend) -> Settings {
    let mut settings = settings();
    settings.backend = backend;
    settings
}

/// A load that is ready for its first packet: the switchover has started.
///
/// # Panics
///
/// Where it cannot be started.
pub fn start_load(
    ids: &[DeviceId],
    sinks: &[Sink],
    settings: Settings,
    channels: Vec<Channel>,
) -> (LoadSession, Vec<Arc<Ended>>) {
    let mut builder = LoadSession::builder().settings(settings);
    let mut ended = Vec::new();
    for (id, sink) in ids.iter().zip(sinks) {
        let (device, end) = sink::device(id, sink, 0);
        builder = builder.device(device);
        ended.push(end);
    }
    for channel in channels {
        builder = builder.channel(channel);
    }
    let session = builder.start().expect("a load starts");
    session.switchover_start();
    (session, ended)
}

/// Checks that all bytes went over the ring that was asked for, and returns the counters.
fn check(report: Report, asked: Backend) -> Stats {
    report.result.expect("the migration succeeds");
    let stats = report.stats;
    let expected = match asked {
        Backend::Blocking => "blocking",
        _ => "uring",
    };
    assert_eq!(stats.backend, expected, "not the backend that ships");
    for device in &stats.devices {
        assert!(device.entries > 0, "a transfer outside the ring");
    }
    assert_eq!(stats.late_wakeups, 0, "a lost wake-up");
    stats
}

/// When the last of them was loaded.
fn end(ended: &[Arc<Ended>]) -> Mark {
    let marks = ended.iter().map(|end| end.loaded().expect("it was loaded"));
    marks.reduce(Mark::later).expect("a device at least")
}

/// One channel's packets from memory, and how long each publish took.
fn publish_all(
    session: &LoadSession,
    plan: &Plan,
    ids: &[DeviceId],
    source: &Source,
    tickets: &Tickets,
    start: &Barrier,
) -> Vec<u64> {
    let config = wire::wrap_config(&[]);
    let mut publisher = session.publisher();
    let mut times = Vec::with_capacity(plan.count() as usize);
    start.wait();
    loop {
        let number = tickets.take(1);
        let Some(place) = plan.place(number) else {
            return times;
        };
        let data = if place.config {
            &config
        } else {
            source.packet(number, plan.packet)
        };
        let header = PacketHeader {
            index: place.index,
            config: place.config,
        };
        let mut lease = publisher
            .lease(&ids[place.device], header, data.len())
            .expect("memory comes");
        lease.bytes_mut().copy_from_slice(data);
        let since = Instant::now();
        lease.publish().expect("a good packet");
        if !place.config {
            times.push(nanos(since));
        }
    }
}

/// Nanoseconds since then.
pub(crate) fn nanos(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// Loads from memory: each channel's thread leases, copies a packet in, and publishes.
///
/// # Panics
///
/// Where the load fails, or a transfer was made outside the ring.
#[must_use]
pub fn load_memory(plan: &Plan, sinks: &[Sink], source: &Source, settings: Settings) -> Outcome {
    load_memory_but(0, plan, sinks, source, settings)
}

/// As [`load_memory`], but the first `others` devices may be loaded whenever they like: what is measured ends with the
/// last of the rest.
///
/// # Panics
///
/// As [`load_memory`].
#[must_use]
pub fn load_memory_but(
    others: usize,
    plan: &Plan,
    sinks: &[Sink],
    source: &Source,
    settings: Settings,
) -> Outcome {
    let backend = settings.backend;
    let ids = plan.ids();
    let (session, ended) = start_load(&ids, sinks, settings, Vec::new());
    let start = Barrier::new(plan.channels as usize + 1);
    let tickets = Tickets::default();
    let (begun, times) = thread::scope(|scope| {
        let publish = || publish_all(&session, plan, &ids, source, &tickets, &start);
        let channels: Vec<_> = (0..plan.channels).map(|_| scope.spawn(publish)).collect();
        let begun = release(&start);
        let times = channels
            .into_iter()
            .map(|channel| channel.join().expect("it publishes"));
        (begun, times.collect())
    });
    session.no_more_channels();
    let stats = check(session.join(), backend);
    Outcome {
        sample: Sample::between(begun, end(&ended[others..]), plan.bytes()).with_publishes(times),
        stats,
    }
}

/// Lets everybody begin, who are all there already.
pub(crate) fn release(start: &Barrier) -> Mark {
    // Long enough for all to have come to the barrier, so that what is measured is not their start.
    thread::sleep(std::time::Duration::from_millis(2));
    let begun = Mark::now();
    start.wait();
    begun
}

/// Loads from sockets, each with a feeder.
///
/// # Panics
///
/// Where the load fails, or a transfer was made outside the ring.
pub fn load_sockets(
    plan: &Plan,
    sinks: &[Sink],
    source: &Source,
    wire: Wire,
    settings: Settings,
) -> Outcome {
    let backend = settings.backend;
    let ids = plan.ids();
    let (mut near, far) = source::connect(wire, plan.channels).expect("sockets");
    for (number, stream) in (0..).zip(&mut near) {
        source::greet(stream, number).expect("a hello fits a socket");
    }
    let channels = far.into_iter().map(Channel::from).collect();
    let (session, ended) = start_load(&ids, sinks, settings, channels);
    let start = Barrier::new(near.len() + 1);
    let begun = feed_all(plan, near, source, &start);
    let stats = check(session.join(), backend);
    Outcome {
        sample: Sample::between(begun, end(&ended), plan.bytes()),
        stats,
    }
}

/// Feeds all sockets, each from a thread of its own, beginning at `start`, where everybody else has
/// come; returns when that was.
///
/// # Panics
///
/// Where a receiver hangs up.
pub(crate) fn feed_all(
    plan: &Plan,
    streams: Vec<source::Stream>,
    source: &Source,
    start: &Barrier,
) -> Mark {
    let keys = source::keys(plan);
    let tickets = Tickets::default();
    thread::scope(|scope| {
        for mut stream in streams {
            let (keys, tickets) = (&keys, &tickets);
            let feeder = thread::Builder::new().name("feeder".to_owned());
            let fed = feeder.spawn_scoped(scope, move || {
                start.wait();
                source::feed(&mut stream, plan, source, keys, tickets).expect("a receiver");
            });
            fed.expect("a thread is to be had");
        }
        release(start)
    })
}

/// Saves from `sinks` over channels that end in `/dev/null`.
///
/// # Panics
///
/// Where the save fails, or a transfer was made outside the ring.
#[must_use]
pub fn save_null(plan: &Plan, sinks: &[Sink]) -> Outcome {
    let mut settings = settings();
    settings.data_len = Some(plan.packet);
    let mut builder = SaveSession::builder().settings(settings);
    for (id, sink) in plan.ids().iter().zip(sinks) {
        builder = builder.device(sink::device(id, sink, plan.device_bytes()).0);
    }
    for _ in 0..plan.channels {
        let null = null().expect("a null device");
        builder = builder.channel(Channel::from_stream(null, || {}));
    }
    let prepared = builder.prepare(plan.devices as usize, plan.packet);
    prepared.expect("there is memory");
    // What can be made before the VM stops is there. The devices are read from within `start`.
    let begun = Mark::now();
    let session = builder.start().expect("a save starts");
    let report = session.join();
    let end = Mark::now();
    Outcome {
        sample: Sample::between(begun, end, plan.bytes()),
        stats: check(report, Backend::Auto),
    }
}

/// `/dev/null`, for reading and writing.
pub(crate) fn null() -> io::Result<File> {
    File::options().read(true).write(true).open("/dev/null")
}
