//! The counters in words, for a log: what moved, what it waited for, where the downtime went. Sizes in powers of two.
//!
//! Pure; any thread.

use std::fmt;

use super::{ChannelStats, DeviceStats, Latency, Phases, SpillStats, Stats};

/// A size, with one decimal from 1 KiB on.
struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        if self.0 < 1 << 10 {
            return write!(f, "{} B", self.0);
        }
        let power = self.0.ilog2() / 10;
        // In tenths, so that nothing is rounded up to a unit's end; 2^64 tenths fit.
        let tenths = (u128::from(self.0) * 10) >> (10 * power);
        let unit = UNITS[power as usize - 1];
        write!(f, "{}.{} {unit}", tenths / 10, tenths % 10)
    }
}

impl fmt::Display for Latency {
    /// `300 transfers, 1.2ms each, 5.1ms at most`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = u32::try_from(self.count.max(1)).unwrap_or(u32::MAX);
        let (each, max) = (self.total / count, self.max);
        write!(
            f,
            "{} transfers, {each:.1?} each, {max:.1?} at most",
            self.count
        )
    }
}

impl fmt::Display for Phases {
    /// Those that took time, in the order of a migration: `stop 1.2ms, set state 3.0ms, read 80.1ms`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = self.named().into_iter();
        let mut separator = "";
        for (name, took) in named.filter(|(_, took)| !took.is_zero()) {
            write!(f, "{separator}{name} {took:.1?}")?;
            separator = ", ";
        }
        if separator.is_empty() {
            f.write_str("no phase measured")?;
        }
        Ok(())
    }
}

impl fmt::Display for DeviceStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (bytes, main) = (Size(self.bytes), Size(self.main_bytes));
        write!(
            f,
            "device {}: {bytes} in {} packets",
            self.device, self.packets
        )?;
        if self.main_bytes > 0 {
            write!(f, ", {main} on the main channel")?;
        }
        if self.queued > 0 {
            write!(f, ", {} packets queued", self.queued)?;
        }
        if self.written_through > 0 {
            write!(f, ", {} by the channels", Size(self.written_through))?;
        }
        write!(
            f,
            "; {}; starved for {:.1?}; {}",
            self.transfers, self.starved, self.phases
        )
    }
}

impl fmt::Display for ChannelStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = Size(self.bytes);
        write!(
            f,
            "channel {}: {bytes} in {} packets",
            self.channel, self.packets
        )?;
        if self.ram_packets > 0 {
            write!(f, ", {} RAM packets", self.ram_packets)?;
        }
        write!(
            f,
            ", {} SYNCs, blocked for {:.1?}",
            self.syncs, self.blocked
        )
    }
}

impl fmt::Display for SpillStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [written, high, limit] = [self.written, self.held_high, self.limit].map(Size);
        write!(
            f,
            "spilled {} packets, {written}; {high} of {limit} at most",
            self.packets
        )
    }
}

impl fmt::Display for Stats {
    /// A line for the session, one for each device and channel, and one for the spill file if it was used. The last
    /// line has no end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [high, budget] = [self.held_high, self.budget].map(Size);
        write!(
            f,
            "{}: {high} of {budget} held at most, {} calls into the ring",
            self.backend, self.ring_calls
        )?;
        for (count, what) in [
            (self.dropped_packets, "packets of unplugged devices"),
            (self.leaked_transfers, "transfers leaked"),
            (self.late_wakeups, "wake-ups lost"),
        ] {
            if count > 0 {
                write!(f, ", {count} {what}")?;
            }
        }
        for device in &self.devices {
            write!(f, "\n{device}")?;
        }
        for channel in &self.channels {
            write!(f, "\n{channel}")?;
        }
        if self.spill.packets > 0 {
            write!(f, "\n{}", self.spill)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{id::DeviceId, stats::PhaseStarts};

    #[test]
    fn sizes_have_one_decimal_and_are_not_rounded_up() {
        let text = |size| Size(size).to_string();
        assert_eq!(text(0), "0 B");
        assert_eq!(text(1023), "1023 B");
        assert_eq!(text(1024), "1.0 KiB");
        assert_eq!(text((1 << 20) - 1), "1023.9 KiB");
        assert_eq!(text(5 << 29), "2.5 GiB");
        assert_eq!(text(u64::MAX), "15.9 EiB");
    }

    #[test]
    fn each_part_says_what_it_counts_and_leaves_out_what_was_not() {
        let mut stats = Stats::main_channel_alone();
        stats.devices.push(DeviceStats {
            device: DeviceId::new("nic", 0).unwrap(),
            bytes: 3 << 20,
            main_bytes: 0,
            packets: 4,
            queued: 0,
            queued_high: 2,
            starved: Duration::from_millis(7),
            transfers: Latency {
                count: 3,
                total: Duration::from_millis(6),
                max: Duration::from_millis(3),
            },
            entries: 9,
            starts: PhaseStarts::default(),
            written_through: 1 << 19,
            phases: Phases {
                stop: Duration::from_millis(1),
                read: Duration::from_millis(80),
                ..Phases::default()
            },
        });
        stats.channels.push(ChannelStats {
            channel: 1,
            bytes: 512,
            packets: 2,
            syncs: 1,
            ..ChannelStats::default()
        });
        assert_eq!(
            stats.to_string(),
            "main channel: 0 B of 0 B held at most, 0 calls into the ring\n\
             device nic: 3.0 MiB in 4 packets, 512.0 KiB by the channels; 3 transfers, 2.0ms each, 3.0ms at most; \
             starved for 7.0ms; stop 1.0ms, read 80.0ms\n\
             channel 1: 512 B in 2 packets, 1 SYNCs, blocked for 0.0ns"
        );
        stats.spill.packets = 2;
        stats.late_wakeups = 1;
        let text = stats.to_string();
        assert!(text.contains(", 1 wake-ups lost\n"), "{text}");
        assert!(
            text.ends_with("\nspilled 2 packets, 0 B; 0 B of 0 B at most"),
            "{text}"
        );
        assert_eq!(Phases::default().to_string(), "no phase measured");
    }
}
