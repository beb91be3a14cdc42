//! `probe --measure`: a device is saved to nowhere, and what that says of a migration.
//!
//! ```text
//!   RUNNING ─▶ PRE_COPY, read ─▶ STOP_COPY, read ─▶ RUNNING        what is read is thrown away
//!      │           precopy             │  stop            │
//!      ╰───────────────────────────────┴──────────────────╯──▶ sizes, times ──▶ downtime at a bandwidth
//! ```
//!
//! The engine reads as a source would (`save::write`), into a channel that takes everything at once. So what is
//! left is the device's own time. Runs on the command's main thread and a session's. The device goes back to
//! the state in which it came, also after Ctrl-C.

use std::{
    fmt::Write as _,
    io::{self, IoSlice, Read, Write},
    time::Duration,
};

use anyhow::{Context, anyhow};
use serde::Serialize;
use vfio_migration::{Channel, Settings};

use crate::{
    args::show,
    device::{self, Spec, Subject},
    interrupt,
    output::{rate, time},
    save::{self, Plan, Written},
};

/// Takes everything at once.
struct Nowhere;

impl Write for Nowhere {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        Ok(buffers.iter().map(|buffer| buffer.len()).sum())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Nowhere {
    fn read(&mut self, _bytes: &mut [u8]) -> io::Result<usize> {
        Ok(0)
    }
}

/// Reads a bandwidth in Gbit/s.
pub(crate) fn gbit(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(gbit) if (0.001..=1_000_000.0).contains(&gbit) => Ok(gbit),
        _ => Err("a bandwidth is a number of Gbit/s, like 25 or 0.5".into()),
    }
}

/// What a bandwidth means.
#[derive(Clone, Debug, Serialize)]
struct Downtime {
    gbit_per_second: f64,
    /// The source's part, and the network's: what the destination adds behind the last byte is not in it.
    seconds: f64,
    /// `device`, where the state is read more slowly than it is sent; or `network`.
    bound_by: &'static str,
    /// So many keep the network busy.
    channels: u32,
    /// QEMU's `avail-switchover-bandwidth`, in bytes per second.
    avail_switchover_bandwidth: u64,
    /// QEMU's `downtime-limit`, in milliseconds: the least with which this device may switch over.
    downtime_limit: u64,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Measured {
    /// Read while the device still ran.
    precopy_bytes: u64,
    precopy_seconds: f64,
    /// Read once it had stopped: what a switchover moves.
    stop_copy_bytes: u64,
    /// From the first call that stops the device to the first byte.
    stop_seconds: f64,
    /// From there to the last byte.
    read_seconds: f64,
    /// 10^9 bytes in a second, of that.
    read_gb_per_second: f64,
    packets: u64,
    /// Whether `--precopy-over-channels` shortens the downtime.
    precopy_over_channels: bool,
    downtime: Vec<Downtime>,
}

/// What one TCP connection is counted on to carry, in Gbit/s: a core's worth of copying.
const CHANNEL: f64 = 10.0;

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "numbers of a size, made of a positive bandwidth"
)]
fn at(gbit: f64, bytes: u64, stop: Duration, read: Duration) -> Downtime {
    let per_second = gbit * 1e9 / 8.0;
    let wire = bytes as f64 / per_second;
    let read = read.as_secs_f64();
    let seconds = stop.as_secs_f64() + wire.max(read);
    Downtime {
        gbit_per_second: gbit,
        seconds,
        bound_by: if read > wire { "device" } else { "network" },
        channels: (gbit / CHANNEL).ceil().clamp(2.0, 16.0) as u32,
        avail_switchover_bandwidth: per_second as u64,
        downtime_limit: ((seconds * 1e3).ceil() as u64).max(1),
    }
}

impl Measured {
    /// Measures the device of a SPEC.
    pub(crate) fn of(spec: &str, bandwidths: &[f64], progress: bool) -> anyhow::Result<Self> {
        let _in_order = interrupt::in_order();
        let spec: Spec = spec.parse().map_err(|error: String| anyhow!(error))?;
        let (devices, subjects): (Vec<_>, Vec<Subject>) =
            device::open(&[spec], true)?.into_iter().unzip();
        let plan = Plan {
            settings: Settings::default(),
            packet: None,
            progress,
        };
        let channel = Channel::from_stream(Nowhere, || {});
        let written = save::write(&plan, devices, &subjects, channel)?;
        let state = device::check(&subjects, &written.stats)?[0].state_bytes();
        Self::new(&written, state, bandwidths)
    }

    /// `state` is the length of all that was read.
    fn new(written: &Written, state: u64, bandwidths: &[f64]) -> anyhow::Result<Self> {
        let stats = written.stats.devices.first();
        let stats = stats.context("a device without counters")?;
        let phases = stats.phases;
        let bytes = state.saturating_sub(written.precopy);
        let stop = phases.stop + phases.set_state + phases.first_out;
        let read = written.took.saturating_sub(stop);
        let bandwidths = match bandwidths {
            [] => &[10.0, 25.0, 100.0],
            given => given,
        };
        let downtime = bandwidths.iter().map(|gbit| at(*gbit, bytes, stop, read));
        Ok(Self {
            precopy_bytes: written.precopy,
            precopy_seconds: written.precopy_took.as_secs_f64(),
            stop_copy_bytes: bytes,
            stop_seconds: stop.as_secs_f64(),
            read_seconds: read.as_secs_f64(),
            read_gb_per_second: rate(bytes, read),
            packets: stats.packets,
            precopy_over_channels: written.precopy > 0,
            downtime: downtime.collect(),
        })
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        let seconds = |seconds| time(Duration::from_secs_f64(seconds));
        let mut text = String::from("measured, with nobody to send to:\n");
        // A String takes whatever is written.
        let mut line = |name: &str, what: String| {
            let _infallible = writeln!(text, "  {name:<12} {what}");
        };
        if self.precopy_over_channels {
            line(
                "PRE_COPY",
                format!(
                    "{} in {}, while it ran: --precopy-over-channels takes them out of the downtime",
                    show(self.precopy_bytes),
                    seconds(self.precopy_seconds)
                ),
            );
        }
        line(
            "STOP_COPY",
            format!(
                "{} in {}, {:.2} GB/s, in {} packets",
                show(self.stop_copy_bytes),
                seconds(self.read_seconds),
                self.read_gb_per_second,
                self.packets
            ),
        );
        line(
            "stop",
            format!("{} to the first byte", seconds(self.stop_seconds)),
        );
        for it in &self.downtime {
            line(
                &format!("{} Gbit/s", it.gbit_per_second),
                format!(
                    "downtime {} and the destination's end of it, bound by the {}; --channels {}; QEMU: \
                     avail-switchover-bandwidth {}, downtime-limit {}",
                    seconds(it.seconds),
                    it.bound_by,
                    it.channels,
                    it.avail_switchover_bandwidth,
                    it.downtime_limit
                ),
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_downtime_is_bound_by_whoever_is_slower() {
        let (stop, read) = (Duration::from_millis(100), Duration::from_secs(1));
        // 5 GB: 4 s at 10 Gbit/s, 0.4 s at 100.
        let slow = at(10.0, 5_000_000_000, stop, read);
        assert_eq!(
            (slow.bound_by, slow.downtime_limit, slow.channels),
            ("network", 4100, 2)
        );
        assert_eq!(slow.avail_switchover_bandwidth, 1_250_000_000);
        let fast = at(100.0, 5_000_000_000, stop, read);
        assert_eq!(
            (fast.bound_by, fast.downtime_limit, fast.channels),
            ("device", 1100, 10)
        );
        let nothing = at(0.001, 0, Duration::ZERO, Duration::ZERO);
        assert_eq!((nothing.downtime_limit, nothing.channels), (1, 2));
    }

    #[test]
    fn a_simulated_device_is_measured_and_says_so() {
        let spec = "sim:id=a,size=3MiB,precopy=1MiB";
        let measured = Measured::of(spec, &[40.0], false).expect("it can be saved");
        assert_eq!(measured.precopy_bytes, 1 << 20);
        let rest = measured.stop_copy_bytes;
        assert!((2 << 20..(2 << 20) + 1000).contains(&rest), "{rest}");
        assert!(measured.precopy_over_channels);
        assert_eq!(measured.downtime.len(), 1);
        let text = measured.text();
        for part in ["PRE_COPY", "STOP_COPY", "40 Gbit/s", "downtime-limit"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(gbit("0").is_err() && gbit("x").is_err() && gbit("NaN").is_err());
        assert_eq!(gbit("25"), Ok(25.0));
    }
}
