//! Counters, as they were at one moment.

#![expect(unsafe_code, reason = "the functions' names are exported")]

use std::{
    ffi::{CString, c_char},
    mem::MaybeUninit,
    ptr,
    time::Duration,
};

use vfio_migration::{ChannelStats, DeviceStats, Stats};

use crate::{border::quiet, failure::c_text};

/// A session's counters, with `vfm_stats_get`. Bytes, or numbers.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub enum Counter {
    /// The budget, in bytes.
    Budget = 0,
    /// How much of it is in use.
    Held = 1,
    /// The most that was in use.
    HeldHigh = 2,
    /// Load: packets that were spilled.
    SpilledPackets = 3,
    /// Load: their bytes.
    SpilledBytes = 4,
    /// Load: packets for unplugged devices.
    DroppedPackets = 5,
    /// Load: their bytes.
    DroppedBytes = 6,
    /// Calls into the ring.
    RingCalls = 7,
    /// Wake-ups that were lost: must be 0.
    LateWakeups = 8,
    /// Transfers that a driver has not given back: each leaks.
    LeakedTransfers = 9,
}

/// A device's counters, with `vfm_stats_device`. Bytes, numbers, or times in nanoseconds.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub enum DeviceCounter {
    /// Bytes over the channels, packet headers and config included.
    Bytes = 0,
    /// Bytes of data over the main channel.
    MainBytes = 1,
    /// Packets, config included.
    Packets = 2,
    /// Packets that wait now.
    Queued = 3,
    /// The most that waited.
    QueuedHigh = 4,
    /// How long the data fd had nothing to do.
    StarvedTime = 5,
    /// Transfers on the data fd.
    Transfers = 6,
    /// How long they took together.
    TransferTime = 7,
    /// The longest one.
    TransferTimeMax = 8,
    /// Downtime, source: stopping the device.
    StopTime = 9,
    /// Downtime, source: setting STOP_COPY; destination: RESUMING, before the downtime.
    SetStateTime = 10,
    /// Downtime, source: to the first packet sent.
    FirstOutTime = 11,
    /// Downtime, source: to the last byte read.
    ReadTime = 12,
    /// Downtime, source: from the first packet queued to the last one sent.
    WireTime = 13,
    /// Downtime, destination: to the first packet.
    FirstInTime = 14,
    /// Downtime, destination: waiting for packets.
    WaitTime = 15,
    /// Downtime, destination: writing.
    WriteTime = 16,
    /// Downtime: the config callback.
    ConfigTime = 17,
    /// Downtime, destination: the driver's check, and the start.
    ResumeTime = 18,
    /// Load: bytes of data that channels have written themselves (VFM_SETTING_WRITER).
    WrittenThrough = 19,
}

/// A channel's counters, with `vfm_stats_channel`. Bytes, numbers, or times in nanoseconds.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub enum ChannelCounter {
    /// Bytes of device state, headers included.
    Bytes = 0,
    /// Packets of device state.
    Packets = 1,
    /// RAM packets.
    RamPackets = 2,
    /// SYNC packets.
    Syncs = 3,
    /// How long it waited for the budget, or for a packet.
    BlockedTime = 4,
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn counter(stats: &Stats, key: u32) -> Option<u64> {
    let values = [
        stats.budget,
        stats.held,
        stats.held_high,
        stats.spill.packets,
        stats.spill.written,
        stats.dropped_packets,
        stats.dropped_bytes,
        stats.ring_calls,
        stats.late_wakeups,
        stats.leaked_transfers,
    ];
    values.get(key as usize).copied()
}

fn device_counter(stats: &DeviceStats, key: u32) -> Option<u64> {
    let phases = &stats.phases;
    let values = [
        stats.bytes,
        stats.main_bytes,
        stats.packets,
        stats.queued,
        stats.queued_high,
        nanos(stats.starved),
        stats.transfers.count,
        nanos(stats.transfers.total),
        nanos(stats.transfers.max),
        nanos(phases.stop),
        nanos(phases.set_state),
        nanos(phases.first_out),
        nanos(phases.read),
        nanos(phases.wire),
        nanos(phases.first_in),
        nanos(phases.wait),
        nanos(phases.write),
        nanos(phases.config),
        nanos(phases.resume),
        stats.written_through,
    ];
    values.get(key as usize).copied()
}

fn channel_counter(stats: &ChannelStats, key: u32) -> Option<u64> {
    let values = [
        stats.bytes,
        stats.packets,
        stats.ram_packets,
        stats.syncs,
        nanos(stats.blocked),
    ];
    values.get(key as usize).copied()
}

/// Counters, as they were when they were asked for. Any number of threads may read them. Free them with
/// `vfm_stats_free`.
pub struct StatsHandle {
    stats: Stats,
    names: Vec<CString>,
    backend: CString,
}

impl StatsHandle {
    pub(crate) fn new(stats: Stats) -> Self {
        let names = stats.devices.iter();
        Self {
            names: names.map(|it| c_text(it.device.idstr())).collect(),
            backend: c_text(stats.backend),
            stats,
        }
    }
}

/// Returns a counter (`enum vfm_counter`); 0 for one that is none. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_stats_get(stats: Option<&StatsHandle>, which: u32) -> u64 {
    quiet(0, || {
        stats.and_then(|it| counter(&it.stats, which)).unwrap_or(0)
    })
}

/// Returns how many devices there are. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_stats_devices(stats: Option<&StatsHandle>) -> usize {
    quiet(0, || stats.map_or(0, |it| it.stats.devices.len()))
}

/// Returns the idstr of device `at`, counted from 0, and writes its instance id; NULL for one that is none. The text
/// is the handle's. `instance` may be NULL. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_stats_device_name(
    stats: Option<&StatsHandle>,
    at: usize,
    instance: Option<&mut MaybeUninit<u32>>,
) -> *const c_char {
    quiet(ptr::null(), || {
        let Some((stats, device)) = stats.and_then(|it| Some((it, it.stats.devices.get(at)?)))
        else {
            return ptr::null();
        };
        if let Some(instance) = instance {
            instance.write(device.device.instance());
        }
        stats.names[at].as_ptr()
    })
}

/// Returns a counter (`enum vfm_device_counter`) of device `at`; 0 for one that is none. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_stats_device(stats: Option<&StatsHandle>, at: usize, which: u32) -> u64 {
    quiet(0, || {
        let device = stats.and_then(|it| it.stats.devices.get(at));
        device.and_then(|it| device_counter(it, which)).unwrap_or(0)
    })
}

/// Returns how many channels there are. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_stats_channels(stats: Option<&StatsHandle>) -> usize {
    quiet(0, || stats.map_or(0, |it| it.stats.channels.len()))
}

/// Returns a counter (`enum vfm_channel_counter`) of channel `at`; 0 for one that is none. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_stats_channel(stats: Option<&StatsHandle>, at: usize, which: u32) -> u64 {
    quiet(0, || {
        let channel = stats.and_then(|it| it.stats.channels.get(at));
        channel
            .and_then(|it| channel_counter(it, which))
            .unwrap_or(0)
    })
}

/// Returns what moves the bytes: "uring", "blocking", or "main channel" where no device uses the channels. The
/// text is the handle's; NULL for NULL. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_stats_backend(stats: Option<&StatsHandle>) -> *const c_char {
    quiet(ptr::null(), || {
        stats.map_or(ptr::null(), |it| it.backend.as_ptr())
    })
}

/// Frees counters. NULL is nothing. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_stats_free(stats: Option<Box<StatsHandle>>) {
    quiet((), || drop(stats));
}
