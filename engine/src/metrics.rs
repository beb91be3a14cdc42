//! A session's counters as OpenMetrics text, for Prometheus and all that reads its format.
//!
//! ```text
//!   Stats of each side ──▶ Metrics ──▶ Display: OpenMetrics text
//! ```
//!
//! | rule | |
//! |---|---|
//! | names | begin with `vfio_migration_`; what counts devices or channels goes on with `device_` or `channel_` |
//! | units | seconds and bytes, in the name, as `# UNIT` says too |
//! | counters | end in `_total`, and only grow; what is now, or was at most, is a gauge |
//! | labels | `migration`: which one; `side`: source, destination or relay; `idstr` and `instance`, or `channel`; `phase` |
//!
//! The caller's thread does the work. Nothing is kept between two texts.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, MetricEncoder, NoLabelSet, text},
    metrics::MetricType,
    registry::{Registry, Unit},
};

use crate::stats::{ChannelStats, DeviceStats, Side, Stats};

/// Counters of a migration's sessions, which [`Display`](fmt::Display) writes as OpenMetrics text.
///
/// ```
/// use vfio_migration::{Side, Stats, metrics::Metrics};
///
/// fn text(stats: Stats) -> String {
///     Metrics::new("vm7").with(Side::Destination, stats).to_string()
/// }
/// ```
///
/// The content type is `application/openmetrics-text; version=1.0.0; charset=utf-8`.
#[derive(Clone, Debug)]
pub struct Metrics {
    migration: String,
    sessions: Vec<(Side, Stats)>,
}

impl Metrics {
    /// Counters of the migration of this name, which tells its samples from those of another migration on
    /// the same host.
    #[must_use]
    pub fn new(migration: impl Into<String>) -> Self {
        Self {
            migration: migration.into(),
            sessions: Vec::new(),
        }
    }

    /// Adds a session's counters. A side has one session.
    #[must_use]
    pub fn with(mut self, side: Side, stats: Stats) -> Self {
        self.sessions.push((side, stats));
        self
    }
}

impl fmt::Display for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let label = ("migration".into(), self.migration.clone().into());
        let mut registry =
            Registry::with_prefix_and_labels("vfio_migration", std::iter::once(label));
        registry.register_collector(Box::new(Sessions(self.sessions.clone())));
        text::encode(f, &registry)
    }
}

/// What a sample's value is.
#[derive(Clone, Copy)]
enum Value {
    Count(u64),
    Seconds(f64),
}

impl From<u64> for Value {
    fn from(count: u64) -> Self {
        Self::Count(count)
    }
}

impl From<std::time::Duration> for Value {
    fn from(time: std::time::Duration) -> Self {
        Self::Seconds(time.as_secs_f64())
    }
}

/// A family: its name, what it means, and its unit.
type Family = (&'static str, &'static str, Option<Unit>);

#[derive(Debug)]
struct Sessions(Vec<(Side, Stats)>);

/// Writes one sample.
fn sample(
    encoder: &mut MetricEncoder<'_>,
    labels: &impl EncodeLabelSet,
    kind: MetricType,
    value: Value,
) -> fmt::Result {
    let mut encoder = encoder.encode_family(labels)?;
    match (kind, value) {
        (MetricType::Counter, Value::Count(count)) => {
            encoder.encode_counter::<NoLabelSet, _, f64>(&count, None)
        }
        (MetricType::Counter, Value::Seconds(seconds)) => {
            encoder.encode_counter::<NoLabelSet, _, f64>(&seconds, None)
        }
        (_, Value::Count(count)) => encoder.encode_gauge(&count),
        (_, Value::Seconds(seconds)) => encoder.encode_gauge(&seconds),
    }
}

impl Sessions {
    fn of_session<V: Into<Value>>(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        kind: MetricType,
        (name, help, unit): Family,
        of: fn(&Stats) -> V,
    ) -> fmt::Result {
        let mut encoder = encoder.encode_descriptor(name, help, unit.as_ref(), kind)?;
        for (side, stats) in &self.0 {
            let labels = [("side", side.name())];
            sample(&mut encoder, &labels, kind, of(stats).into())?;
        }
        Ok(())
    }

    fn of_device<V: Into<Value>>(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        kind: MetricType,
        (name, help, unit): Family,
        of: fn(&DeviceStats) -> V,
    ) -> fmt::Result {
        let mut encoder = encoder.encode_descriptor(name, help, unit.as_ref(), kind)?;
        for (side, stats) in &self.0 {
            for device in &stats.devices {
                let instance = device.device.instance().to_string();
                let labels = [
                    ("side", side.name()),
                    ("idstr", device.device.idstr()),
                    ("instance", &*instance),
                ];
                sample(&mut encoder, &labels, kind, of(device).into())?;
            }
        }
        Ok(())
    }

    fn of_channel<V: Into<Value>>(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        (name, help, unit): Family,
        of: fn(&ChannelStats) -> V,
    ) -> fmt::Result {
        let kind = MetricType::Counter;
        let mut encoder = encoder.encode_descriptor(name, help, unit.as_ref(), kind)?;
        for (side, stats) in &self.0 {
            for channel in &stats.channels {
                let number = channel.channel.to_string();
                let labels = [("side", side.name()), ("channel", &*number)];
                sample(&mut encoder, &labels, kind, of(channel).into())?;
            }
        }
        Ok(())
    }

    fn phases(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let kind = MetricType::Gauge;
        let help = "How long a phase of the device's downtime took. Phases overlap.";
        let unit = Some(Unit::Seconds);
        let mut encoder = encoder.encode_descriptor("device_phase", help, unit.as_ref(), kind)?;
        for (side, stats) in &self.0 {
            for device in &stats.devices {
                let instance = device.device.instance().to_string();
                for (phase, took) in side.phases(&device.phases) {
                    let phase = phase.replace(' ', "_");
                    let labels = [
                        ("side", side.name()),
                        ("idstr", device.device.idstr()),
                        ("instance", &*instance),
                        ("phase", &*phase),
                    ];
                    sample(&mut encoder, &labels, kind, took.into())?;
                }
            }
        }
        Ok(())
    }
}

const BYTES: Option<Unit> = Some(Unit::Bytes);
const SECONDS: Option<Unit> = Some(Unit::Seconds);

impl Collector for Sessions {
    #[rustfmt::skip] // a table
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        use MetricType::{Counter, Gauge};
        let to = &mut encoder;
        self.of_device(to, Counter, ("device", "Bytes transferred over the channels, headers and config included.", BYTES), |it| it.bytes)?;
        self.of_device(to, Counter, ("device_main_channel", "Bytes of data on the main channel.", BYTES), |it| it.main_bytes)?;
        self.of_device(to, Counter, ("device_packets", "Packets transferred, config included.", None), |it| it.packets)?;
        self.of_device(to, Gauge, ("device_queued_packets", "Packets that wait.", None), |it| it.queued)?;
        self.of_device(to, Gauge, ("device_queued_packets_max", "The most packets that waited at one time.", None), |it| it.queued_high)?;
        self.of_device(to, Counter, ("device_starved", "Time without work for the data fd: for want of the next packet (destination) or of memory (source).", SECONDS), |it| it.starved)?;
        self.of_device(to, Counter, ("device_transfers", "Transfers on the data fd.", None), |it| it.transfers.count)?;
        self.of_device(to, Counter, ("device_transfer", "Time in transfers on the data fd, from submission to completion.", SECONDS), |it| it.transfers.total)?;
        self.of_device(to, Gauge, ("device_transfer_max", "The longest transfer on the data fd.", SECONDS), |it| it.transfers.max)?;
        self.of_device(to, Counter, ("device_ring_entries", "Ring entries for the data fd.", None), |it| it.entries)?;
        self.of_device(to, Counter, ("device_written_through", "Bytes of data that channels have written to the data fd themselves.", BYTES), |it| it.written_through)?;
        self.phases(to)?;
        self.of_channel(to, ("channel", "Bytes of device-state packets, headers included.", BYTES), |it| it.bytes)?;
        self.of_channel(to, ("channel_packets", "Device-state packets.", None), |it| it.packets)?;
        self.of_channel(to, ("channel_ram_packets", "RAM packets.", None), |it| it.ram_packets)?;
        self.of_channel(to, ("channel_syncs", "SYNC packets.", None), |it| it.syncs)?;
        self.of_channel(to, ("channel_blocked", "Time in which the channel waited for the budget (destination) or for a packet (source).", SECONDS), |it| it.blocked)?;
        self.of_session(to, Gauge, ("budget", "All memory in which packets are held.", BYTES), |it| it.budget)?;
        self.of_session(to, Gauge, ("held", "How much of the budget is in use.", BYTES), |it| it.held)?;
        self.of_session(to, Gauge, ("held_max", "The most of the budget that was in use at one time.", BYTES), |it| it.held_high)?;
        self.of_session(to, Gauge, ("spill_limit", "The most that the spill file may hold.", BYTES), |it| it.spill.limit)?;
        self.of_session(to, Gauge, ("spill_held", "The spill file's space in use.", BYTES), |it| it.spill.held)?;
        self.of_session(to, Gauge, ("spill_held_max", "The most of the spill file's space that was in use at one time.", BYTES), |it| it.spill.held_high)?;
        self.of_session(to, Counter, ("spilled_packets", "Packets written to the spill file.", None), |it| it.spill.packets)?;
        self.of_session(to, Counter, ("spill_written", "Bytes of packets written to the spill file.", BYTES), |it| it.spill.written)?;
        self.of_session(to, Counter, ("spill_read", "Bytes of packets read back from the spill file.", BYTES), |it| it.spill.read)?;
        self.of_session(to, Counter, ("dropped_packets", "Packets for unplugged devices.", None), |it| it.dropped_packets)?;
        self.of_session(to, Counter, ("dropped", "Bytes of data of packets for unplugged devices.", BYTES), |it| it.dropped_bytes)?;
        self.of_session(to, Counter, ("ring_calls", "Calls of the I/O thread into its ring.", None), |it| it.ring_calls)?;
        self.of_session(to, Counter, ("late_wakeups", "Lost wake-ups. Must be 0.", None), |it| it.late_wakeups)?;
        self.of_session(to, Counter, ("leaked_transfers", "Transfers that the kernel did not return within the grace time.", None), |it| it.leaked_transfers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{id::DeviceId, stats::DeviceCounters};

    #[test]
    fn a_peers_name_is_a_labels_value_whatever_is_in_it() {
        let counters = DeviceCounters::default();
        counters.bytes.add(7);
        counters
            .phases
            .read
            .add_passed(std::time::Duration::from_millis(1500));
        let id = DeviceId::new("a\"} 1\\", 3).expect("a name");
        let mut stats = Stats::main_channel_alone();
        stats.devices = vec![counters.snapshot(&id)];
        let text = Metrics::new("x\ny").with(Side::Source, stats).to_string();
        let labels = r#"migration="x\ny",side="source",idstr="a\"} 1\\",instance="3""#;
        for line in [
            "# TYPE vfio_migration_device_bytes counter".to_owned(),
            "# UNIT vfio_migration_device_bytes bytes".to_owned(),
            format!("vfio_migration_device_bytes_total{{{labels}}} 7"),
            format!("vfio_migration_device_phase_seconds{{{labels},phase=\"read\"}} 1.5"),
            "# EOF".to_owned(),
        ] {
            assert!(text.lines().any(|it| it == line), "{line}: {text}");
        }
    }
}
