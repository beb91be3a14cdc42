//! Moments, samples, and contenders measured in turn.

use std::{
    fmt,
    time::{Duration, Instant},
};

use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeVal,
};
use serde::{Deserialize, Serialize};

/// A moment: the time, and what the process had used by then.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    /// When.
    pub at: Instant,
    /// CPU time of all threads, the kernel's included.
    pub cpu: Duration,
    /// Page faults.
    pub faults: i64,
}

impl Mark {
    /// Now.
    #[must_use]
    pub fn now() -> Self {
        let usage = getrusage(UsageWho::RUSAGE_SELF).expect("a process may look at itself");
        let time = |value: TimeVal| {
            Duration::new(
                u64::try_from(value.tv_sec()).unwrap_or(0),
                u32::try_from(value.tv_usec() * 1000).unwrap_or(0),
            )
        };
        Self {
            at: Instant::now(),
            cpu: time(usage.user_time()) + time(usage.system_time()),
            faults: usage.minor_page_faults() + usage.major_page_faults(),
        }
    }

    /// The later of two.
    #[must_use]
    pub fn later(self, other: Self) -> Self {
        if other.at > self.at { other } else { self }
    }
}

/// One contender's one round.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Sample {
    /// From the first packet to the last write.
    pub wall: Duration,
    /// CPU time in between.
    pub cpu: Duration,
    /// Page faults in between.
    pub faults: i64,
    /// Bytes of data that were moved.
    pub bytes: u64,
    /// How long each publish took, in nanoseconds, sorted. Stays in its process.
    #[serde(skip)]
    pub publishes: Vec<u64>,
}

impl Sample {
    /// What happened between two moments.
    #[must_use]
    pub fn between(start: Mark, end: Mark, bytes: u64) -> Self {
        Self {
            wall: end.at.saturating_duration_since(start.at),
            cpu: end.cpu.saturating_sub(start.cpu),
            faults: end.faults - start.faults,
            bytes,
            publishes: Vec::new(),
        }
    }

    /// Adds the publishes of all channels.
    #[must_use]
    pub fn with_publishes(mut self, times: Vec<Vec<u64>>) -> Self {
        self.publishes = times.concat();
        self.publishes.sort_unstable();
        self
    }

    /// Bytes a second.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a figure for a human")]
    pub fn rate(&self) -> f64 {
        self.bytes as f64 / self.wall.as_secs_f64()
    }

    /// CPU seconds for each GiB.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a figure for a human")]
    pub fn cpu_per_gib(&self) -> f64 {
        self.cpu.as_secs_f64() / (self.bytes as f64 / f64::from(1 << 30))
    }

    /// The publish time below which `part` of them are, in nanoseconds.
    #[must_use]
    pub fn publish(&self, part: f64) -> f64 {
        percentile(&self.publishes, part)
    }
}

/// The value below which `part` of the sorted values are.
#[must_use]
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "an index into what was measured"
)]
pub fn percentile(sorted: &[u64], part: f64) -> f64 {
    let at = (sorted.len() as f64 * part) as usize;
    sorted
        .get(at.min(sorted.len().saturating_sub(1)))
        .map_or(f64::NAN, |&value| value as f64)
}

/// What a figure should be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// This much or more.
    AtLeast(f64),
    /// An upper bound: this much or less.
    AtMost(f64),
    /// None: it is there to be seen.
    Open,
}

impl Goal {
    /// Whether `value` is what it should be.
    #[must_use]
    pub fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
            Self::Open => true,
        }
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::AtLeast(bound) => format!(">= {}", Short(*bound)),
            Self::AtMost(bound) => format!("<= {}", Short(*bound)),
            Self::Open => "-".to_owned(),
        };
        f.pad(&text)
    }
}

/// A number in as few digits as tell it.
#[derive(Clone, Copy, Debug)]
pub struct Short(pub f64);

impl fmt::Display for Short {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.0;
        let text = match value.abs() {
            0.0 => "0".to_owned(),
            size if size < 0.01 => format!("{value:.6}"),
            size if size < 1.0 => format!("{value:.3}"),
            size if size < 100.0 => format!("{value:.2}"),
            _ => format!("{value:.0}"),
        };
        f.pad(&text)
    }
}

/// One figure of the report.
#[derive(Clone, Debug)]
pub struct Figure {
    /// Its name.
    pub name: String,
    /// Its value in each round.
    pub values: Vec<f64>,
    /// What it should be.
    pub goal: Goal,
}

impl Figure {
    /// The median of its rounds, the least and the greatest.
    #[must_use]
    pub fn summary(&self) -> (f64, f64, f64) {
        let mut values = self.values.clone();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = match values.len() {
            0 => f64::NAN,
            count if count % 2 == 1 => values[middle],
            _ => f64::midpoint(values[middle - 1], values[middle]),
        };
        let end = |value: Option<&f64>| value.copied().unwrap_or(f64::NAN);
        (median, end(values.first()), end(values.last()))
    }
}

/// Runs the contenders in turn, `rounds` times, after one round that is not counted. Each round
/// is a row: one sample for each contender, in the order given.
pub fn in_turn<T>(rounds: usize, contenders: &mut [&mut dyn FnMut() -> T]) -> Vec<Vec<T>> {
    let mut round = || contenders.iter_mut().map(|run| run()).collect();
    let _warm: Vec<T> = round();
    (0..rounds).map(|_| round()).collect()
}

/// One value for each round.
pub fn values<T>(rounds: &[Vec<T>], value: impl Fn(&[T]) -> f64) -> Vec<f64> {
    rounds.iter().map(|round| value(round)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_is_the_median_and_both_ends() {
        let figure = |values: &[f64]| Figure {
            name: String::new(),
            values: values.to_vec(),
            goal: Goal::Open,
        };
        assert_eq!(figure(&[3.0, 1.0, 2.0]).summary(), (2.0, 1.0, 3.0));
        assert_eq!(figure(&[4.0, 1.0, 2.0, 3.0]).summary(), (2.5, 1.0, 4.0));
        assert!(figure(&[]).summary().0.is_nan());
    }

    #[test]
    fn a_goal_is_a_bound_on_one_side() {
        assert!(Goal::AtLeast(2.0).is_met(2.0) && !Goal::AtLeast(2.0).is_met(1.9));
        assert!(Goal::AtMost(2.0).is_met(2.0) && !Goal::AtMost(2.0).is_met(2.1));
        assert_eq!(Goal::AtMost(0.33).to_string(), "<= 0.330");
    }

    #[test]
    fn contenders_take_turns() {
        let order = std::cell::RefCell::new(String::new());
        let mut first = || order.borrow_mut().push('a');
        let mut second = || order.borrow_mut().push('b');
        let rounds = in_turn(2, &mut [&mut first, &mut second]);
        assert_eq!((rounds.len(), rounds[0].len()), (2, 2));
        assert_eq!(order.into_inner(), "ababab");
    }
}
