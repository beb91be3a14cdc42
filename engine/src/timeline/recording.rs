//! What a timeline keeps of one side: its counters, some hundred times in a second, and no more of them than
//! fit.

use std::time::{Duration, Instant};

use crate::stats::{Side, Stats};

/// The most numbers that a side's samples have.
const NUMBERS: usize = 1 << 20;

/// The fewest samples that are kept, however many devices there are.
const FEWEST: usize = 64;

/// The most samples of a side.
const MOST: usize = 4096;

/// The shortest time between two samples.
const SHORTEST: Duration = Duration::from_millis(1);

/// One device's counters in a sample. Times are in nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct DeviceSample {
    pub(super) bytes: u64,
    pub(super) starved: u64,
    pub(super) busy: u64,
}

/// One channel's.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ChannelSample {
    pub(super) bytes: u64,
    pub(super) blocked: u64,
}

/// One side's counters at one time.
#[derive(Debug)]
pub(super) struct Sample {
    pub(super) at: Instant,
    pub(super) devices: Vec<DeviceSample>,
    pub(super) channels: Vec<ChannelSample>,
    pub(super) held: u64,
    pub(super) spilled: u64,
}

pub(super) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Sample {
    pub(super) fn new(at: Instant, stats: &Stats) -> Self {
        let devices = stats.devices.iter().map(|device| DeviceSample {
            bytes: device.bytes,
            starved: nanos(device.starved),
            busy: nanos(device.transfers.total),
        });
        let channels = stats.channels.iter().map(|channel| ChannelSample {
            bytes: channel.bytes,
            blocked: nanos(channel.blocked),
        });
        Self {
            at,
            devices: devices.collect(),
            channels: channels.collect(),
            held: stats.held,
            spilled: stats.spill.held,
        }
    }

    fn numbers(&self) -> usize {
        3 * self.devices.len() + 2 * self.channels.len() + 2
    }
}

/// One side's counters over time.
#[derive(Debug)]
pub(super) struct Recording {
    pub(super) side: Side,
    pub(super) samples: Vec<Sample>,
    /// How far apart samples are, at least.
    apart: Duration,
    /// The counters as they were last, and when.
    pub(super) last: (Instant, Stats),
}

impl Recording {
    pub(super) fn new(side: Side, at: Instant, stats: Stats) -> Self {
        Self {
            side,
            samples: vec![Sample::new(at, &stats)],
            apart: SHORTEST,
            last: (at, stats),
        }
    }

    pub(super) fn add(&mut self, at: Instant, stats: Stats) {
        let due = self
            .samples
            .last()
            .is_none_or(|last| at.duration_since(last.at) >= self.apart);
        if due {
            let sample = Sample::new(at, &stats);
            let most = (NUMBERS / sample.numbers()).clamp(FEWEST, MOST);
            if self.samples.len() >= most {
                let mut number = 0_usize;
                self.samples.retain(|_| {
                    number += 1;
                    number % 2 == 1
                });
                self.apart *= 2;
            }
            self.samples.push(sample);
        }
        self.last = (at, stats);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{id::DeviceId, stats::DeviceCounters};

    #[test]
    fn however_long_it_is_what_is_kept_is_bounded_and_spans_all_of_it() {
        let counters = DeviceCounters::default();
        for devices in [1, 100, 2000] {
            let mut stats = Stats::main_channel_alone();
            let id = DeviceId::new("d", 0).expect("a name");
            stats.devices = vec![counters.snapshot(&id); devices];
            let began = Instant::now();
            let mut recording = Recording::new(Side::Source, began, stats.clone());
            let most = (NUMBERS / (3 * devices + 2)).clamp(FEWEST, MOST);
            let rounds = u32::try_from(3 * most).expect("few");
            for round in 1..=rounds {
                recording.add(began + 2 * SHORTEST * round, stats.clone());
                assert!(recording.samples.len() <= most);
            }
            let (first, last) = (
                &recording.samples[0],
                recording.samples.last().expect("some"),
            );
            assert_eq!(first.at, began);
            let end = began + 2 * SHORTEST * rounds;
            assert!(end.duration_since(last.at) <= recording.apart);
            assert_eq!(recording.last.0, end);
            assert!(
                recording.samples.len() >= most / 2,
                "no more detail is lost than must be"
            );
        }
    }
}
