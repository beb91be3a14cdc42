//! Counters that any thread may read while the threads that keep them run.
//!
//! ```text
//!   Counters of a device    published ─▶ by the channels (load) or the I/O thread (save)
//!                           taken … writes ─▶ by the I/O thread (load) or the channels (save)
//!   Counters of a channel   by its thread
//!                  │
//!                  ▼ snapshot: any thread
//!   Stats { devices: [DeviceStats], channels: [ChannelStats], … }: plain values
//! ```
//!
//! A packet is counted as published before it is published, and as taken after it was taken. The snapshot
//! reads the two counts in the opposite order. So a snapshot never shows more packets taken than published.
//!
//! # Edges
//!
//! | edge  | release side               | acquire side                  | what it carries            |
//! |-------|----------------------------|-------------------------------|----------------------------|
//! | count | [`DeviceCounters::taken`]  | [`DeviceCounters::snapshot`]  | the counts of `published`  |

mod display;

use std::{
    sync::OnceLock,
    time::{Duration, Instant},
};

use crossbeam_utils::CachePadded;

use crate::{
    id::DeviceId,
    sync::atomic::{
        AtomicU64,
        Ordering::{Acquire, Relaxed, Release},
    },
};

/// Nanoseconds, for as long as a machine lives.
fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A counter that one or more threads add to.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to it.
    pub fn add(&self, count: u64) {
        // Relaxed: a counter.
        self.0.fetch_add(count, Relaxed);
    }

    /// Adds a time.
    pub fn add_time(&self, duration: Duration) {
        self.add(nanos(duration));
    }

    /// Raises it to `value`, if that is more.
    pub fn raise(&self, value: u64) {
        // Relaxed: a counter.
        if value > self.0.load(Relaxed) {
            self.0.fetch_max(value, Relaxed);
        }
    }

    /// Raises it to a time.
    pub fn raise_time(&self, duration: Duration) {
        self.raise(nanos(duration));
    }

    /// What it says.
    #[must_use]
    pub fn get(&self) -> u64 {
        // Relaxed: a counter.
        self.0.load(Relaxed)
    }

    /// What it says, as a time.
    #[must_use]
    pub fn get_time(&self) -> Duration {
        Duration::from_nanos(self.get())
    }
}

/// How many transfers there were on a data fd, and how long they took from submission to
/// completion. A linked chain counts as one.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Latency {
    /// How many.
    pub count: u64,
    /// All of them together.
    pub total: Duration,
    /// The longest.
    pub max: Duration,
}

/// Where one device's share of the downtime went. The phases of several devices overlap. So do some of one
/// device's: the wire is at work while the data fd is read.
///
/// `stop` and `resume` are measured only if the VM's state changes go through [`migration`](crate::migration).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Phases {
    /// Source: stopping the device, by way of its P2P state if it has one.
    pub stop: Duration,
    /// Setting STOP_COPY; on the destination, before the downtime, RESUMING.
    pub set_state: Duration,
    /// Source: from STOP_COPY to the last byte of the first packet sent: the switchover's cost beside its
    /// bytes.
    pub first_out: Duration,
    /// Source: from STOP_COPY to the last byte from the data fd.
    pub read: Duration,
    /// Source: from the first packet's queueing to the last packet's last byte.
    pub wire: Duration,
    /// Destination: from the switchover's start to the first packet. This is the first part of `wait`.
    pub first_in: Duration,
    /// Destination: the time spent waiting for the next packet, from the switchover's start on.
    pub wait: Duration,
    /// Destination: from the switchover's start to the last byte into the data fd, without `wait`.
    pub write: Duration,
    /// The config callback.
    pub config: Duration,
    /// Destination: setting STOP, with which the driver checks the state, and the VM's start.
    pub resume: Duration,
}

impl Phases {
    /// Returns all phases with their names, in the order of a migration.
    #[must_use]
    pub const fn named(&self) -> [(&'static str, Duration); 10] {
        [
            ("stop", self.stop),
            ("set state", self.set_state),
            ("first byte out", self.first_out),
            ("read", self.read),
            ("wire", self.wire),
            ("first byte in", self.first_in),
            ("wait", self.wait),
            ("write", self.write),
            ("config", self.config),
            ("resume", self.resume),
        ]
    }
}

/// When each phase of [`Phases`] began. `None` if it has not, or if nobody has measured it. `wait` is the sum of
/// many waits, and has no beginning of its own.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct PhaseStarts {
    /// The first part of it.
    pub stop: Option<Instant>,
    /// Its call.
    pub set_state: Option<Instant>,
    /// STOP_COPY.
    pub first_out: Option<Instant>,
    /// STOP_COPY.
    pub read: Option<Instant>,
    /// The first packet's queueing.
    pub wire: Option<Instant>,
    /// The switchover's start.
    pub first_in: Option<Instant>,
    /// The switchover's start.
    pub write: Option<Instant>,
    /// Its callback.
    pub config: Option<Instant>,
    /// The first part of it.
    pub resume: Option<Instant>,
}

impl PhaseStarts {
    /// Returns all of them with the phases' names, in the order of [`Phases::named`].
    #[must_use]
    pub const fn named(&self) -> [(&'static str, Option<Instant>); 10] {
        [
            ("stop", self.stop),
            ("set state", self.set_state),
            ("first byte out", self.first_out),
            ("read", self.read),
            ("wire", self.wire),
            ("first byte in", self.first_in),
            ("wait", None),
            ("write", self.write),
            ("config", self.config),
            ("resume", self.resume),
        ]
    }
}

/// What a session does in a migration.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Side {
    /// It saves.
    Source,
    /// It loads.
    Destination,
    /// It passes on.
    Relay,
}

impl Side {
    /// Its name: `source`, `destination` or `relay`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
            Self::Relay => "relay",
        }
    }

    /// The phases that this side has, with their names.
    pub fn phases(self, phases: &Phases) -> impl Iterator<Item = (&'static str, Duration)> + use<> {
        let has = move |name| match name {
            "set state" | "config" => self != Self::Relay,
            "stop" | "first byte out" | "read" | "wire" => self == Self::Source,
            _ => self == Self::Destination,
        };
        phases
            .named()
            .into_iter()
            .filter(move |(name, _)| has(*name))
    }
}

/// One device's counters, as they were at one moment.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct DeviceStats {
    /// Which device.
    pub device: DeviceId,
    /// Bytes transferred, the 12-byte packet headers included, config included.
    pub bytes: u64,
    /// Bytes of data on the main channel: those read in PRE_COPY, or all if no multifd channels are used.
    pub main_bytes: u64,
    /// Packets transferred, config included.
    pub packets: u64,
    /// Packets published and not yet taken.
    pub queued: u64,
    /// The highest value of `queued`.
    pub queued_high: u64,
    /// How long the data fd had nothing to do: on load because the next packet was missing, on save because
    /// memory was.
    pub starved: Duration,
    /// The transfers on the data fd.
    pub transfers: Latency,
    /// Ring entries for the data fd.
    pub entries: u64,
    /// Load: bytes of data that channels have written themselves; all others went through the ring. See
    /// [`Settings::writer`](crate::Settings::writer).
    pub written_through: u64,
    /// The split of the downtime.
    pub phases: Phases,
    /// When its parts began: moments of this process, which mean nothing to another.
    #[cfg_attr(feature = "serde", serde(skip))]
    pub starts: PhaseStarts,
}

/// One channel's counters, as they were at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct ChannelStats {
    /// Which channel, in the order given to the session.
    pub channel: u32,
    /// Bytes of device-state packets, headers included.
    pub bytes: u64,
    /// Device-state packets.
    pub packets: u64,
    /// RAM packets handed to the sink.
    pub ram_packets: u64,
    /// SYNC packets.
    pub syncs: u64,
    /// How long it waited for the budget (load), or for a packet to send (save).
    pub blocked: Duration,
}

/// What a load's spill file has taken and given back, as it was at one moment. Sizes are in bytes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct SpillStats {
    /// The most that the file may hold. 0 if there is no spill file.
    pub limit: u64,
    /// Packets written to it.
    pub packets: u64,
    /// Bytes of packets written to it.
    pub written: u64,
    /// Bytes of packets read back.
    pub read: u64,
    /// The space in use now, in whole chunks of 64 KiB.
    pub held: u64,
    /// The most that was in use at one time.
    pub held_high: u64,
}

/// A session's counters, as they were at one moment.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Stats {
    /// By device.
    pub devices: Vec<DeviceStats>,
    /// By channel.
    pub channels: Vec<ChannelStats>,
    /// The budget in bytes: all memory in which packets are held.
    pub budget: u64,
    /// How much of the budget is in use, in whole buffers and without the devices' reserves. In a report: what
    /// the kernel still holds.
    pub held: u64,
    /// The most of the budget that was in use at one time, in whole buffers.
    pub held_high: u64,
    /// Load: packets that went to a file.
    pub spill: SpillStats,
    /// Load: packets for unplugged devices, skipped in whole or in part.
    pub dropped_packets: u64,
    /// Load: the bytes of data of the skipped packets.
    pub dropped_bytes: u64,
    /// The backend in use: `uring` or `blocking`; `main channel` if no device uses the channels.
    pub backend: &'static str,
    /// Calls that the I/O thread made into its ring: each submits what is queued and waits.
    pub ring_calls: u64,
    /// Lost wake-ups, found by the periodic re-check of all sleeps. Must be 0.
    pub late_wakeups: u64,
    /// Transfers that the kernel did not return within the grace time. Each leaks its buffer; the device and
    /// its data fd are leaked too.
    pub leaked_transfers: u64,
}

impl Stats {
    /// One device's counters, if the session has the device.
    #[must_use]
    pub fn device(&self, id: &DeviceId) -> Option<&DeviceStats> {
        self.devices.iter().find(|stats| stats.device == *id)
    }

    /// Of a migration in which no session moves bytes.
    pub(crate) const fn main_channel_alone() -> Self {
        Self {
            devices: Vec::new(),
            channels: Vec::new(),
            budget: 0,
            held: 0,
            held_high: 0,
            spill: SpillStats {
                limit: 0,
                packets: 0,
                written: 0,
                read: 0,
                held: 0,
                held_high: 0,
            },
            dropped_packets: 0,
            dropped_bytes: 0,
            backend: "main channel",
            leaked_transfers: 0,
            ring_calls: 0,
            late_wakeups: 0,
        }
    }
}

/// What a device's threads count.
#[derive(Debug, Default)]
pub struct DeviceCounters {
    published: CachePadded<Counter>,
    taken: CachePadded<AtomicU64>,
    /// Bytes transferred.
    pub bytes: Counter,
    /// Bytes of data on the main channel.
    pub main_bytes: Counter,
    /// Highest queue depth seen.
    queued_high: Counter,
    /// Time without work on the data fd.
    pub starved: Counter,
    /// Ring entries for the data fd.
    pub entries: Counter,
    /// See [`DeviceStats::written_through`].
    pub written_through: Counter,
    /// How long those writes took.
    pub through_time: Counter,
    transfers: Counter,
    transfer_total: Counter,
    transfer_max: Counter,
    /// Times of the phases.
    pub phases: PhaseCounters,
}

/// One phase: when it began, and how long it took. Set by the thread that runs it; a phase that has taken
/// nothing so far has not ended.
#[derive(Debug, Default)]
pub struct PhaseCounter {
    began: OnceLock<Instant>,
    took: Counter,
}

impl PhaseCounter {
    /// It begins, if it has not begun.
    pub fn begin(&self, at: Instant) {
        self.began.get_or_init(|| at);
    }

    /// It begins now, if it has not begun.
    pub fn begin_now(&self) {
        self.began.get_or_init(Instant::now);
    }

    /// Adds a time that it does not begin with.
    pub fn add(&self, took: Duration) {
        self.took.add_time(took);
    }

    /// Adds what has passed since then.
    pub fn add_since(&self, since: Instant) {
        self.begin(since);
        self.add(since.elapsed());
    }

    /// Adds a time that has just passed.
    pub fn add_passed(&self, took: Duration) {
        self.begin(just_before(took));
        self.add(took);
    }

    /// Lets it last until now, if it has begun.
    pub fn reach(&self) {
        if let Some(began) = self.began.get() {
            self.took.raise_time(began.elapsed());
        }
    }

    /// It ends here, if it has begun and has not ended.
    pub fn end_once(&self) {
        if let Some(began) = self.began.get()
            && self.took.get() == 0
        {
            // Of two that come first one is.
            let took = nanos(began.elapsed()).max(1);
            self.took.raise(took);
        }
    }

    fn began(&self) -> Option<Instant> {
        self.began.get().copied()
    }
}

/// So long ago, as far as the clock goes back.
fn just_before(took: Duration) -> Instant {
    let now = Instant::now();
    now.checked_sub(took).unwrap_or(now)
}

/// Times of a device's phases.
#[derive(Debug, Default)]
pub struct PhaseCounters {
    /// See [`Phases::stop`].
    pub stop: PhaseCounter,
    /// See [`Phases::set_state`].
    pub set_state: PhaseCounter,
    /// See [`Phases::first_out`].
    pub first_out: PhaseCounter,
    /// See [`Phases::read`].
    pub read: PhaseCounter,
    /// See [`Phases::wire`].
    pub wire: PhaseCounter,
    /// See [`Phases::first_in`].
    pub first_in: PhaseCounter,
    /// See [`Phases::wait`].
    pub wait: PhaseCounter,
    /// See [`Phases::write`].
    pub write: PhaseCounter,
    /// See [`Phases::config`].
    pub config: PhaseCounter,
    /// See [`Phases::resume`].
    pub resume: PhaseCounter,
}

impl PhaseCounters {
    /// When they began, as far as they have.
    #[must_use]
    pub fn starts(&self) -> PhaseStarts {
        PhaseStarts {
            stop: self.stop.began(),
            set_state: self.set_state.began(),
            first_out: self.first_out.began(),
            read: self.read.began(),
            wire: self.wire.began(),
            first_in: self.first_in.began(),
            write: self.write.began(),
            config: self.config.began(),
            resume: self.resume.began(),
        }
    }

    /// All of them, as they are now.
    #[must_use]
    pub fn snapshot(&self) -> Phases {
        Phases {
            stop: self.stop.took.get_time(),
            set_state: self.set_state.took.get_time(),
            first_out: self.first_out.took.get_time(),
            read: self.read.took.get_time(),
            wire: self.wire.took.get_time(),
            first_in: self.first_in.took.get_time(),
            wait: self.wait.took.get_time(),
            write: self.write.took.get_time(),
            config: self.config.took.get_time(),
            resume: self.resume.took.get_time(),
        }
    }
}

impl DeviceCounters {
    /// Counts a packet, before it is published.
    pub fn published(&self) {
        self.published.add(1);
    }

    /// Counts packets that were taken, after they were.
    pub fn taken(&self, count: u64) {
        // count edge, release side: whoever sees them taken sees them published.
        let taken = self.taken.fetch_add(count, Release) + count;
        self.queued_high
            .raise(self.published.get().saturating_sub(taken) + count);
    }

    /// Counts one transfer that was submitted at `since`.
    pub fn transfer(&self, since: Instant) {
        self.took(since.elapsed());
    }

    /// Counts what a channel has written itself.
    pub fn wrote_through(&self, bytes: usize, took: Duration) {
        self.took(took);
        self.through_time.add_time(took);
        self.written_through.add(bytes as u64);
    }

    fn took(&self, took: Duration) {
        let took = nanos(took);
        self.transfers.add(1);
        self.transfer_total.add(took);
        self.transfer_max.raise(took);
    }

    /// How many were published and taken, in that order.
    #[must_use]
    pub fn packets(&self) -> (u64, u64) {
        // count edge, acquire side.
        let taken = self.taken.load(Acquire);
        (self.published.get(), taken)
    }

    /// All of them, as they are now.
    #[must_use]
    pub fn snapshot(&self, device: &DeviceId) -> DeviceStats {
        let (published, taken) = self.packets();
        DeviceStats {
            device: device.clone(),
            bytes: self.bytes.get(),
            main_bytes: self.main_bytes.get(),
            packets: taken,
            queued: published - taken,
            queued_high: self.queued_high.get(),
            starved: self.starved.get_time(),
            transfers: Latency {
                count: self.transfers.get(),
                total: self.transfer_total.get_time(),
                max: self.transfer_max.get_time(),
            },
            entries: self.entries.get(),
            written_through: self.written_through.get(),
            phases: self.phases.snapshot(),
            starts: self.phases.starts(),
        }
    }
}

/// What a channel's thread counts.
#[derive(Debug, Default)]
pub struct ChannelCounters {
    /// See [`ChannelStats::bytes`].
    pub bytes: Counter,
    /// See [`ChannelStats::packets`].
    pub packets: Counter,
    /// See [`ChannelStats::ram_packets`].
    pub ram_packets: Counter,
    /// See [`ChannelStats::syncs`].
    pub syncs: Counter,
    /// See [`ChannelStats::blocked`].
    pub blocked: Counter,
}

impl ChannelCounters {
    /// All of them, as they are now.
    #[must_use]
    pub fn snapshot(&self, channel: u32) -> ChannelStats {
        ChannelStats {
            channel,
            bytes: self.bytes.get(),
            packets: self.packets.get(),
            ram_packets: self.ram_packets.get(),
            syncs: self.syncs.get(),
            blocked: self.blocked.get_time(),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_says_what_was_counted() {
        let counters = DeviceCounters::default();
        for _ in 0..5 {
            counters.published();
        }
        counters.taken(2);
        counters.bytes.add(100);
        counters.transfer(Instant::now());
        let device = DeviceId::new("d", 0).expect("a good name");
        let stats = counters.snapshot(&device);
        assert_eq!((stats.packets, stats.queued, stats.queued_high), (2, 3, 5));
        assert_eq!((stats.bytes, stats.transfers.count), (100, 1));
    }
}
