//! What a timeline shows: times as seconds from the moment at which the VM stopped, on one axis.
//!
//! ```text
//!   samples of a counter of time ──▶ spread ──▶ spans: when it was so
//!   phases                       ──▶ bars
//!   samples of bytes             ──▶ rates
//! ```
//!
//! A counter of time is raised when a wait, or a transfer, ends. So a wait that is longer than the time between
//! two samples shows up at its end, all at once: [`spread`] puts it back to where it was.

use std::time::{Duration, Instant};

use super::recording::{ChannelSample, DeviceSample, Recording, Sample};
use crate::{
    id::DeviceId,
    stats::{DeviceStats, Side, Stats},
};

/// From when until when, in seconds.
pub(super) type Span = (f64, f64);

/// A phase of a device, on one side.
#[derive(Clone, Debug)]
pub(super) struct Bar {
    pub(super) name: &'static str,
    pub(super) span: Span,
    /// Whether the phase has not ended.
    pub(super) open: bool,
}

/// One device on one side.
#[derive(Debug)]
pub(super) struct DeviceSide {
    pub(super) side: Side,
    pub(super) bars: Vec<Bar>,
    /// When its data fd had nothing to do.
    pub(super) starved: Vec<Span>,
    /// When transfers were under way.
    pub(super) busy: Vec<Span>,
    pub(super) stats: DeviceStats,
}

impl DeviceSide {
    pub(super) fn bar(&self, name: &str) -> Option<&Bar> {
        self.bars.iter().find(|bar| bar.name == name)
    }

    /// When its last phase ended, if all have.
    pub(super) fn end(&self) -> Option<f64> {
        let open = self.bars.iter().any(|bar| bar.open);
        let ends = self.bars.iter().map(|bar| bar.span.1);
        ends.reduce(f64::max).filter(|_| !open)
    }

    /// What its transfers took, as far as they are in the picture.
    pub(super) fn length(spans: &[Span]) -> f64 {
        // A sum of nothing would be -0.
        spans
            .iter()
            .fold(0.0, |all, (began, ended)| all + ended - began)
    }
}

/// One device.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) id: DeviceId,
    pub(super) sides: Vec<DeviceSide>,
}

impl Device {
    pub(super) fn side(&self, side: Side) -> Option<&DeviceSide> {
        self.sides.iter().find(|it| it.side == side)
    }

    /// When all of its state was in the destination.
    pub(super) fn loaded(&self) -> Option<f64> {
        let side = self.side(Side::Destination)?;
        let bars = [side.bar("write"), side.bar("config")];
        let ends = bars.into_iter().flatten().map(|bar| bar.span.1);
        ends.reduce(f64::max)
    }

    /// When it was done, if it was: on the destination, where that is known.
    pub(super) fn end(&self) -> Option<f64> {
        let sides = self.sides.iter().map(DeviceSide::end);
        let ends: Option<Vec<_>> = sides.collect();
        ends?.into_iter().reduce(f64::max)
    }
}

/// One channel on one side.
#[derive(Debug)]
pub(super) struct Channel {
    pub(super) side: Side,
    pub(super) number: u32,
    pub(super) bytes: u64,
    pub(super) blocked: Vec<Span>,
    pub(super) blocked_seconds: f64,
    /// Bytes up to each time.
    pub(super) moved: Curve,
    /// When its last packet had passed.
    pub(super) last: Option<f64>,
}

/// A curve: a value at each time.
pub(super) type Curve = Vec<(f64, f64)>;

/// What one side shows beside its devices and channels.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) side: Side,
    /// Bytes of all channels up to each time.
    pub(super) moved: Curve,
    pub(super) held: Curve,
    pub(super) spilled: Curve,
    pub(super) stats: Stats,
}

/// All of it.
#[derive(Debug)]
pub(super) struct Model {
    /// Where the picture begins: at 0, or before it where something moved.
    pub(super) begin: f64,
    /// Where it ends.
    pub(super) end: f64,
    /// When the last device was done, if all were.
    pub(super) done: Option<f64>,
    /// Bytes that had gone before 0.
    pub(super) before: u64,
    pub(super) devices: Vec<Device>,
    pub(super) channels: Vec<Channel>,
    pub(super) sessions: Vec<Session>,
    pub(super) failure: Option<(f64, String)>,
}

/// From one time to another, in seconds, also backwards.
fn between(from: Instant, to: Instant) -> f64 {
    match to.checked_duration_since(from) {
        Some(after) => after.as_secs_f64(),
        None => -from.duration_since(to).as_secs_f64(),
    }
}

fn seconds(nanos: u64) -> f64 {
    Duration::from_nanos(nanos).as_secs_f64()
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
pub(super) const fn float(value: u64) -> f64 {
    value as f64
}

/// When it was so that a counter of time counts: each rise stands before its sample, and what does not fit
/// between two samples stands before those.
pub(super) fn spread(samples: &[(f64, u64)]) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    let mut left = 0.0;
    for pair in samples.windows(2).rev() {
        let ((from, before), (to, after)) = (pair[0], pair[1]);
        left += seconds(after.saturating_sub(before));
        let took = f64::min(left, to - from);
        if took <= 0.0 {
            continue;
        }
        left -= took;
        match spans.last_mut() {
            // Of one wait.
            Some(next) if next.0 - to < 1e-9 => next.0 = to - took,
            _ => spans.push((to - took, to)),
        }
    }
    spans.reverse();
    spans
}

fn floats(curve: Vec<(f64, u64)>) -> Curve {
    curve.into_iter().map(|(at, it)| (at, float(it))).collect()
}

/// A curve's value at a time: between two samples on the line between them.
fn value(curve: &Curve, at: f64) -> f64 {
    let next = curve.partition_point(|(time, _)| *time < at);
    match (curve.get(next.wrapping_sub(1)), curve.get(next)) {
        (Some((from, before)), Some((to, after))) => {
            before + (after - before) * (at - from) / (to - from).max(1e-12)
        }
        (None, Some((_, only))) | (Some((_, only)), None) => *only,
        (None, None) => 0.0,
    }
}

/// How fast a curve of bytes rises around the middle of each of so many parts of a time: over some of them,
/// for packets are counted when they are through.
pub(super) fn rates(curve: &Curve, (begin, end): Span, parts: u32) -> Curve {
    /// How many parts to each side.
    const AROUND: f64 = 5.0;
    let width = (end - begin) / f64::from(parts);
    let rate = |part| {
        let at = begin + (f64::from(part) + 0.5) * width;
        let (from, to) = (
            f64::max(at - AROUND * width, begin),
            f64::min(at + AROUND * width, end),
        );
        (
            at,
            (value(curve, to) - value(curve, from)).max(0.0) / (to - from).max(1e-12),
        )
    };
    (0..parts).map(rate).collect()
}

/// The moment at which the VM stopped: the first phase that is downtime.
fn zero(recordings: &[Recording]) -> Option<Instant> {
    let first = |recording: &Recording| {
        let stats = &recording.last.1;
        let began = stats.devices.iter().filter_map(|device| {
            let starts = &device.starts;
            match recording.side {
                Side::Source => starts.stop.or(starts.set_state).or(starts.read),
                // RESUMING is set before.
                Side::Destination => starts.write,
                Side::Relay => None,
            }
        });
        began.min()
    };
    let firsts = recordings.iter().filter_map(first);
    let sampled = recordings.iter().filter_map(|it| it.samples.first());
    firsts.min().or_else(|| sampled.map(|it| it.at).min())
}

/// A phase is none of the downtime's, or stands for another.
fn is_drawn(side: Side, name: &str) -> bool {
    match side {
        Side::Source => true,
        Side::Destination => !matches!(name, "set state" | "wait"),
        Side::Relay => false,
    }
}

fn bars(side: Side, stats: &DeviceStats, zero: Instant, end: f64) -> Vec<Bar> {
    let phases = stats.phases.named();
    let starts = stats.starts.named();
    let drawn = phases.into_iter().zip(starts).filter_map(|(phase, start)| {
        let ((name, took), (_, began)) = (phase, start);
        let began = between(zero, began.filter(|_| is_drawn(side, name))?);
        // The write is said without its waits.
        let took = match name {
            "write" => took + stats.phases.wait,
            _ => took,
        };
        let open = took.is_zero();
        let until = if open {
            end
        } else {
            began + took.as_secs_f64()
        };
        Some(Bar {
            name,
            span: (began, until.max(began)),
            open,
        })
    });
    drawn.collect()
}

/// One side's samples of one counter.
struct Samples<'a> {
    zero: Instant,
    all: Vec<&'a Sample>,
}

impl Samples<'_> {
    fn of(&self, of: impl Fn(&Sample) -> u64) -> Vec<(f64, u64)> {
        let at = |sample: &&Sample| (between(self.zero, sample.at), of(sample));
        self.all.iter().map(at).collect()
    }

    fn device(&self, at: usize, of: fn(&DeviceSample) -> u64) -> Vec<(f64, u64)> {
        self.of(|sample| sample.devices.get(at).map_or(0, of))
    }

    fn channel(&self, at: usize, of: fn(&ChannelSample) -> u64) -> Vec<(f64, u64)> {
        self.of(|sample| sample.channels.get(at).map_or(0, of))
    }
}

impl Model {
    pub(super) fn new(recordings: &[Recording], failed: Option<&(Instant, String)>) -> Self {
        let zero = zero(recordings).unwrap_or_else(Instant::now);
        let failure = failed.map(|(at, why)| (between(zero, *at), why.clone()));
        let recorded = recordings.iter().map(|it| between(zero, it.last.0));
        let open_end = failure.as_ref().map(|(at, _)| *at);
        let open_end = open_end.or(recorded.reduce(f64::max)).unwrap_or(0.0);
        let mut model = Self {
            begin: 0.0,
            end: 0.0,
            done: None,
            before: 0,
            devices: Vec::new(),
            channels: Vec::new(),
            sessions: Vec::new(),
            failure,
        };
        let mut first: f64 = 0.0;
        for recording in recordings {
            let last = Sample::new(recording.last.0, &recording.last.1);
            let samples = Samples {
                zero,
                all: recording.samples.iter().chain([&last]).collect(),
            };
            let bytes = samples.of(|sample| sample.devices.iter().map(|it| it.bytes).sum());
            let before = bytes.iter().take_while(|(at, _)| *at < 0.0).last();
            if let Some((_, before @ 1..)) = before {
                first = first.min(bytes[0].0);
                model.before = model.before.max(*before);
            }
            model.add(recording, zero, &samples, open_end);
        }
        let ends: Vec<_> = model.devices.iter().map(Device::end).collect();
        let all: Option<Vec<_>> = ends.iter().copied().collect();
        let has_phases = |device: &Device| device.sides.iter().any(|side| !side.bars.is_empty());
        let phased = !model.devices.is_empty() && model.devices.iter().all(has_phases);
        if phased && model.failure.is_none() {
            model.done = all.and_then(|ends| ends.into_iter().reduce(f64::max));
        }
        model.end = model.done.unwrap_or(open_end).max(1e-6);
        // What went before is shown as far as it leaves room for the rest.
        model.begin = first.max(-0.25 * model.end);
        model
    }

    fn add(&mut self, recording: &Recording, zero: Instant, samples: &Samples<'_>, end: f64) {
        let (side, stats) = (recording.side, &recording.last.1);
        for (at, device) in stats.devices.iter().enumerate() {
            let added = DeviceSide {
                side,
                bars: bars(side, device, zero, end),
                starved: spread(&samples.device(at, |it| it.starved)),
                busy: spread(&samples.device(at, |it| it.busy)),
                stats: device.clone(),
            };
            match self.devices.iter_mut().find(|it| it.id == device.device) {
                Some(known) => known.sides.push(added),
                None => self.devices.push(Device {
                    id: device.device.clone(),
                    sides: vec![added],
                }),
            }
        }
        for (at, channel) in stats.channels.iter().enumerate() {
            let bytes = samples.channel(at, |it| it.bytes);
            let all = bytes.last().map_or(0, |(_, bytes)| *bytes);
            let last = bytes.iter().find(|(_, bytes)| *bytes == all);
            self.channels.push(Channel {
                side,
                number: channel.channel,
                bytes: channel.bytes,
                blocked: spread(&samples.channel(at, |it| it.blocked)),
                blocked_seconds: channel.blocked.as_secs_f64(),
                last: last.filter(|_| all > 0).map(|(at, _)| *at),
                moved: floats(bytes),
            });
        }
        self.sessions.push(Session {
            side,
            moved: floats(samples.of(|sample| sample.channels.iter().map(|it| it.bytes).sum())),
            held: floats(samples.of(|sample| sample.held)),
            spilled: floats(samples.of(|sample| sample.spilled)),
            stats: stats.clone(),
        });
    }

    /// From where to where.
    pub(super) const fn span(&self) -> Span {
        (self.begin, self.end)
    }

    /// A channel whose last packet came long after those of all others: its number, when, and the next one's.
    pub(super) fn late_channel(&self) -> Option<(u32, f64, f64)> {
        let channels = self.channels.iter();
        let channels = channels.filter(|it| it.side == Side::Destination);
        let mut lasts: Vec<_> = channels
            .filter_map(|it| Some((it.number, it.last?)))
            .collect();
        lasts.sort_by(|a, b| b.1.total_cmp(&a.1));
        let [(number, last), (_, next), ..] = lasts[..] else {
            return None;
        };
        (last - next > 0.25 * self.end).then_some((number, last, next.max(0.0)))
    }

    pub(super) fn session(&self, side: Side) -> Option<&Session> {
        self.sessions.iter().find(|it| it.side == side)
    }

    /// The device that made the others wait: they resume together, when the last one has all of its state. Or
    /// the one that was done last, where that took it longer still; or one that is not done.
    pub(super) fn longest(&self) -> Option<&Device> {
        let end = |device: &&Device| device.end().unwrap_or(f64::INFINITY);
        let last = self
            .devices
            .iter()
            .max_by(|a, b| end(a).total_cmp(&end(b)))?;
        let resumed = last
            .side(Side::Destination)
            .and_then(|side| side.bar("resume"));
        let resumed = resumed.map_or(f64::INFINITY, |bar| bar.span.1 - bar.span.0);
        if resumed > 0.5 * self.end {
            return Some(last);
        }
        let loaded = |device: &&Device| device.loaded().unwrap_or(0.0);
        self.devices
            .iter()
            .max_by(|a, b| loaded(a).total_cmp(&loaded(b)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::timeline::recording::nanos as nanos_of;

    fn nanos(samples: &[(f64, f64)]) -> Vec<(f64, u64)> {
        let samples = samples.iter();
        samples
            .map(|(at, time)| (*at, nanos_of(Duration::from_secs_f64(*time))))
            .collect()
    }

    #[test]
    fn a_rate_is_that_of_what_passed_around_it() {
        let curve = vec![(0.0, 0.0), (1.0, 100.0), (2.0, 100.0)];
        let rates = rates(&curve, (0.0, 2.0), 20);
        assert_eq!(rates.len(), 20);
        for (at, rate) in rates {
            let expected = match at {
                ..0.5 => 100.0,
                0.5..1.5 => 100.0 * (1.5 - at),
                _ => 0.0,
            };
            assert!(
                (rate - expected).abs() < 6.0,
                "{at}: {rate}, not {expected}"
            );
        }
    }

    #[test]
    fn a_wait_stands_where_it_was() {
        let near = |spans: Vec<Span>, expected: &[Span]| {
            assert_eq!(spans.len(), expected.len(), "{spans:?}");
            for ((a, b), (c, d)) in spans.iter().zip(expected) {
                assert!((a - c).abs() < 1e-6 && (b - d).abs() < 1e-6, "{spans:?}");
            }
        };
        near(spread(&[]), &[]);
        near(spread(&nanos(&[(0.0, 5.0)])), &[]);
        // A part of the time between two samples.
        near(spread(&nanos(&[(0.0, 0.0), (1.0, 0.25)])), &[(0.75, 1.0)]);
        // A wait of three seconds that is counted at its end.
        let samples = [(0.0, 0.0), (1.0, 0.0), (2.0, 0.0), (3.5, 3.0), (4.0, 3.0)];
        near(spread(&nanos(&samples)), &[(0.5, 3.5)]);
        // Two of them.
        let samples = [(0.0, 0.0), (1.0, 0.5), (2.0, 0.5), (3.0, 1.5), (4.0, 1.5)];
        near(spread(&nanos(&samples)), &[(0.5, 1.0), (2.0, 3.0)]);
        // More than there was time for: before the first sample nothing is known.
        near(spread(&nanos(&[(0.0, 0.0), (1.0, 9.0)])), &[(0.0, 1.0)]);
    }
}
