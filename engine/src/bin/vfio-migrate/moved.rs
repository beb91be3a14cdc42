//! What was moved: of each device, over each channel, in all. The same fields in every command's output.
//!
//! ```text
//!   Stats of one side, or of both ──▶ Times of a device, Channel, Totals ──▶ lines, or fields of the object
//!   Moved: a device's digests     ──▶
//! ```
//!
//! All times are in seconds, all sizes in bytes. `docs/json.md` says what each field means.
//!
//! Called from the command's main thread.

use std::time::Duration;

use serde::{Serialize, Serializer, ser::SerializeMap};
use vfio_migration::{ChannelStats, DeviceStats, Phases, Side, Stats};

use crate::{
    args::show,
    json,
    output::{print, rate, spilled, table, time, warn},
};

/// Where one side's share of a device's downtime went; see `vfio_migration::Phases`.
#[derive(Clone, Copy, Debug)]
struct Share {
    side: Side,
    phases: Phases,
}

impl Share {
    const fn source(stats: &DeviceStats) -> Self {
        Self {
            side: Side::Source,
            phases: stats.phases,
        }
    }

    const fn destination(stats: &DeviceStats) -> Self {
        Self {
            side: Side::Destination,
            phases: stats.phases,
        }
    }

    fn named(&self) -> impl Iterator<Item = (&'static str, Duration)> + use<> {
        self.side.phases(&self.phases)
    }

    /// The phases that took any time, for people.
    fn text(&self) -> String {
        let took = self.named().filter(|(_, phase)| !phase.is_zero());
        let all: Vec<_> = took
            .map(|(name, phase)| format!("{name} {}", time(phase)))
            .collect();
        all.join(", ")
    }
}

impl Serialize for Share {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (name, phase) in self.named() {
            map.serialize_entry(&name.replace(' ', "_"), &phase.as_secs_f64())?;
        }
        map.end()
    }
}

/// A device's phases, by side.
#[derive(Clone, Copy, Debug, Serialize)]
struct Sides {
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<Share>,
    #[serde(skip_serializing_if = "Option::is_none")]
    destination: Option<Share>,
}

/// A device's times, on the sides that are known.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Times {
    #[serde(skip_serializing_if = "Option::is_none")]
    blocked_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reading_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    starved_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    writing_seconds: Option<f64>,
    phases: Sides,
}

impl Times {
    pub(crate) fn new(source: Option<&DeviceStats>, destination: Option<&DeviceStats>) -> Self {
        let seconds = |stats: Option<&DeviceStats>, of: fn(&DeviceStats) -> Duration| {
            stats.map(|stats| of(stats).as_secs_f64())
        };
        Self {
            blocked_seconds: seconds(source, |it| it.starved),
            reading_seconds: seconds(source, |it| it.transfers.total),
            starved_seconds: seconds(destination, |it| it.starved),
            writing_seconds: seconds(destination, |it| it.transfers.total),
            phases: Sides {
                source: source.map(Share::source),
                destination: destination.map(Share::destination),
            },
        }
    }

    /// The phases of the sides that are known, for people.
    fn text(&self) -> String {
        let sides = [self.phases.source, self.phases.destination];
        let texts: Vec<_> = sides.iter().flatten().map(Share::text).collect();
        texts.join(", ")
    }
}

/// A table of all devices' phases on one side.
fn phases(header: &'static str, devices: &[(&str, Share)]) -> String {
    let Some((_, first)) = devices.first() else {
        return String::new();
    };
    let header: Vec<_> = [header]
        .into_iter()
        .chain(first.named().map(|(name, _)| name))
        .collect();
    let rows = devices.iter().map(|(name, side)| {
        let times = side.named().map(|(_, phase)| time(phase));
        [(*name).to_owned()].into_iter().chain(times).collect()
    });
    table(&header, &rows.collect::<Vec<_>>())
}

/// A table for each side of all devices' phases.
pub(crate) fn phase_tables<'a>(devices: impl Iterator<Item = (&'a str, Times)>) -> String {
    let devices: Vec<_> = devices.collect();
    let side = |of: fn(&Sides) -> Option<Share>| -> Vec<_> {
        let known = |(name, times): &(&'a str, Times)| Some((*name, of(&times.phases)?));
        devices.iter().filter_map(known).collect()
    };
    let source = phases("source", &side(|sides| sides.source));
    let destination = phases("destination", &side(|sides| sides.destination));
    format!("{source}\n{destination}")
}

/// What went over one channel.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Channel {
    /// In the order in which they came.
    pub(crate) channel: u32,
    /// Of `replay`: the file, and what the channel calls itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<u8>,
    /// Device-state packets, and their bytes.
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
    pub(crate) ram_packets: u64,
    pub(crate) syncs: u64,
    /// None where nobody waited, for there was no session.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) blocked_seconds: Option<f64>,
}

impl From<&ChannelStats> for Channel {
    fn from(stats: &ChannelStats) -> Self {
        Self {
            channel: stats.channel,
            file: None,
            id: None,
            packets: stats.packets,
            bytes: stats.bytes,
            ram_packets: stats.ram_packets,
            syncs: stats.syncs,
            blocked_seconds: Some(stats.blocked.as_secs_f64()),
        }
    }
}

/// All channels of a session.
pub(crate) fn channels(stats: &Stats) -> Vec<Channel> {
    stats.channels.iter().map(Channel::from).collect()
}

/// A table of channels.
pub(crate) fn channel_table(channels: &[Channel]) -> String {
    let is_replay = channels.iter().any(|channel| channel.file.is_some());
    let rows = channels.iter().map(|channel| {
        let mut row = match (&channel.file, channel.id) {
            (Some(file), Some(id)) => vec![file.clone(), id.to_string()],
            _ => vec![channel.channel.to_string()],
        };
        let counts = [
            channel.packets,
            channel.bytes,
            channel.ram_packets,
            channel.syncs,
        ];
        row.extend(counts.map(|count| count.to_string()));
        row
    });
    let mut header = vec!["channel", "device packets", "bytes", "RAM", "SYNC"];
    if is_replay {
        header.insert(1, "id");
    }
    table(&header, &rows.collect::<Vec<_>>())
}

/// What a session has moved in all, and with which memory.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Totals {
    /// Of states and configs, the packets' 12-byte headers included.
    pub(crate) bytes: u64,
    pub(crate) packets: u64,
    /// The devices' states alone; none where only their packets are seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) state_bytes: Option<u64>,
    /// Of the states, what was sent while the devices still ran. The source knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) precopy_bytes: Option<u64>,
    /// From the switchover's start to the last device's end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) seconds: Option<f64>,
    /// 10^9 bytes of state in a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) gb_per_second: Option<f64>,
    pub(crate) budget: u64,
    pub(crate) held_high: u64,
    /// What went to a file on its way.
    pub(crate) spilled_bytes: u64,
    pub(crate) late_wakeups: u64,
}

impl Totals {
    /// Of a session that has taken so long, with so many bytes of state.
    pub(crate) fn new(stats: &Stats, moved: Option<(u64, Duration)>) -> Self {
        let devices = stats.devices.iter();
        Self {
            bytes: devices.clone().map(|device| device.bytes).sum(),
            packets: devices.map(|device| device.packets).sum(),
            state_bytes: moved.map(|(bytes, _)| bytes),
            precopy_bytes: None,
            seconds: moved.map(|(_, took)| took.as_secs_f64()),
            gb_per_second: moved.map(|(bytes, took)| rate(bytes, took)),
            budget: stats.budget,
            held_high: stats.held_high,
            spilled_bytes: stats.spill.written,
            late_wakeups: stats.late_wakeups,
        }
    }
}

/// What moved of one device.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Moved {
    pub(crate) idstr: String,
    pub(crate) instance: u32,
    /// The config packet included.
    pub(crate) packets: u64,
    pub(crate) state_bytes: u64,
    /// Of a device of the kernel's nobody but its driver sees the state.
    pub(crate) state_sha256: Option<String>,
    /// The config packet's data: framing tags included.
    pub(crate) config_bytes: u64,
    pub(crate) config_sha256: String,
    /// The file that the state was written to, where `replay --out` has chosen it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) state_file: Option<String>,
    /// None where nothing was stopped: of a replay.
    #[serde(flatten)]
    pub(crate) times: Option<Times>,
}

impl Moved {
    /// A paragraph for people.
    pub(crate) fn text(&self) -> String {
        let Self {
            idstr,
            instance,
            packets,
            state_bytes,
            config_bytes,
            ..
        } = self;
        let mut text = format!(
            "{idstr:?}, instance {instance}: {packets} packets\n  \
             state   {:>12} bytes  sha256 {}\n  \
             config  {:>12} bytes  sha256 {}\n",
            state_bytes,
            self.state_sha256.as_deref().unwrap_or("(not known)"),
            config_bytes,
            self.config_sha256
        );
        if let Some(times) = &self.times {
            text.push_str(&format!("  phases  {}\n", times.text()));
        }
        if let Some(file) = &self.state_file {
            text.push_str(&format!("  in      {file:?}\n"));
        }
        text
    }
}

/// A peer's whole transfer.
#[derive(Debug, Serialize)]
pub(crate) struct Transfer {
    pub(crate) backend: &'static str,
    pub(crate) devices: Vec<Moved>,
    pub(crate) channels: Vec<Channel>,
    pub(crate) totals: Totals,
    /// `sent` or `received`, for people.
    #[serde(skip)]
    pub(crate) done: &'static str,
    #[serde(skip)]
    pub(crate) took: Duration,
}

impl Transfer {
    pub(crate) fn new(
        done: &'static str,
        devices: Vec<Moved>,
        stats: &Stats,
        took: Duration,
    ) -> Self {
        let bytes = devices.iter().map(|device| device.state_bytes).sum();
        Self {
            backend: stats.backend,
            devices,
            channels: channels(stats),
            totals: Totals::new(stats, Some((bytes, took))),
            done,
            took,
        }
    }

    /// Prints it where the migration has passed, on both sides: what fails now is said, and no status.
    pub(crate) fn tell(&self, json: bool) {
        warn("all is loaded", self.print(json));
    }

    fn print(&self, json: bool) -> anyhow::Result<()> {
        if json {
            return json::print(self);
        }
        print(&self.text())
    }

    fn text(&self) -> String {
        let mut text: String = self.devices.iter().map(Moved::text).collect();
        let bytes = self.totals.state_bytes.unwrap_or(0);
        text.push_str(&format!(
            "{}: {} devices, {}, {:.2} s, {:.2} GB/s, {} channels, backend {}\n",
            self.done,
            self.devices.len(),
            show(bytes),
            self.took.as_secs_f64(),
            rate(bytes, self.took),
            self.channels.len(),
            self.backend,
        ));
        if let Some(bytes @ 1..) = self.totals.precopy_bytes {
            text.push_str(&format!("{} of it went before they stopped\n", show(bytes)));
        }
        text.push_str(&spilled(self.totals.spilled_bytes));
        text
    }
}

/// A save or a restore, and its file.
#[derive(Debug, Serialize)]
pub(crate) struct Kept {
    #[serde(flatten)]
    pub(crate) transfer: Transfer,
    pub(crate) file: String,
    pub(crate) file_bytes: u64,
    /// Of the whole file but its last packet, which says it.
    pub(crate) file_sha256: String,
}

impl Kept {
    /// Prints it where all has passed: what fails now is said, and no status.
    pub(crate) fn tell(&self, json: bool) {
        let printed = if json {
            json::print(self)
        } else {
            let mut text = self.transfer.text();
            text.push_str(&format!(
                "{:?}: {} bytes, sha256 {}\n",
                self.file, self.file_bytes, self.file_sha256
            ));
            print(&text)
        };
        warn("all is done", printed);
    }
}
