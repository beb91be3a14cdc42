//! What all suites share: rows, contests, and how much to do.

use std::{io, path::PathBuf};

use vfio_migration_benches::{
    kept::Kept,
    measure::{Figure, Goal, Sample, in_turn, values},
    plan::Plan,
    sink::{Kind, Sink},
    source::Source,
};

pub const KIB: usize = 1 << 10;
pub const MIB: usize = 1 << 20;

/// Rows that are measured together, in the order of the report.
pub struct Suite {
    pub rows: &'static [(&'static str, Goal)],
    pub run: fn(&Run) -> io::Result<Found>,
}

/// One row: its value in each round, and how far it could go in each.
pub struct Row {
    pub name: String,
    pub values: Vec<f64>,
    pub limit: Option<Vec<f64>>,
}

/// What a suite found.
#[derive(Default)]
pub struct Found(pub Vec<Row>);

impl Found {
    /// Adds a row without a limit.
    pub fn add(&mut self, name: impl Into<String>, values: Vec<f64>) {
        self.0.push(Row {
            name: name.into(),
            values,
            limit: None,
        });
    }

    /// Adds a row beside what it could be at the most.
    pub fn add_limited(&mut self, name: impl Into<String>, values: Vec<f64>, limit: Vec<f64>) {
        self.add(name, values);
        let row = self.0.last_mut().expect("it was just added");
        row.limit = Some(limit);
    }
}

/// How much to do.
pub struct Run {
    pub rounds: usize,
    pub quick: bool,
    pub verbose: bool,
    /// Rounds that were measured elsewhere, before.
    pub beside: Option<PathBuf>,
}

impl Run {
    /// Work for each round: half a GiB, or a quarter in packets of 4 KiB.
    pub fn plan(&self, devices: u32, packet: usize) -> Plan {
        let bytes = match packet {
            _ if self.quick => 64 * MIB,
            4096 => 256 * MIB,
            _ => 512 * MIB,
        };
        Plan::of_bytes(devices, 4, packet, bytes)
    }

    /// Rounds of the contenders, in turn.
    pub fn in_turn<T>(&self, contenders: &mut [&mut dyn FnMut() -> T]) -> Vec<Vec<T>> {
        in_turn(self.rounds, contenders)
    }

    /// Rounds of the contenders, in turn.
    pub fn contest<'a>(&self, what: &str, contenders: &'a mut [Contender<'a>]) -> Contest {
        let names: Vec<_> = contenders.iter().map(|(name, _)| *name).collect();
        let mut runs: Vec<_> = contenders.iter_mut().map(|(_, run)| &mut **run).collect();
        let contest = Contest {
            rounds: self.in_turn(&mut runs),
            names,
        };
        if self.verbose {
            contest.tell(what);
        }
        contest
    }
}

/// Who takes part: a name, and one round's work.
pub type Contender<'a> = (&'static str, &'a mut dyn FnMut() -> Sample);

/// What each contender's each round took.
pub struct Contest {
    names: Vec<&'static str>,
    rounds: Vec<Vec<Sample>>,
}

impl Contest {
    fn at(&self, name: &str) -> usize {
        let found = self.names.iter().position(|known| *known == name);
        found.unwrap_or_else(|| panic!("{name} takes no part"))
    }

    /// A value of one contender's each round.
    pub fn each(&self, name: &str, value: impl Fn(&Sample) -> f64) -> Vec<f64> {
        let at = self.at(name);
        values(&self.rounds, |round| value(&round[at]))
    }

    /// A value of one contender over another's, round by round.
    fn over(&self, of: &str, over: &str, value: impl Fn(&Sample) -> f64) -> Vec<f64> {
        let (of, over) = (self.at(of), self.at(over));
        values(&self.rounds, |round| {
            value(&round[of]) / value(&round[over])
        })
    }

    /// One contender's rate over another's.
    pub fn rate(&self, of: &str, over: &str) -> Vec<f64> {
        self.over(of, over, Sample::rate)
    }

    /// One contender's CPU time for each byte over another's.
    pub fn cpu(&self, of: &str, over: &str) -> Vec<f64> {
        self.over(of, over, Sample::cpu_per_gib)
    }

    /// Tells each contender's rate and CPU time: medians, and the range.
    fn tell(&self, what: &str) {
        for name in &self.names {
            let summary = |value: fn(&Sample) -> f64| summary(&self.each(name, value));
            let (rate, least, most) = summary(|sample| sample.rate() / 1e9);
            let (cpu, ..) = summary(Sample::cpu_per_gib);
            eprintln!(
                "  {what}: {name}: {rate:.2} GB/s ({least:.2} to {most:.2}), {cpu:.3} CPU s/GiB"
            );
        }
    }
}

/// The median, the least and the greatest.
pub fn summary(values: &[f64]) -> (f64, f64, f64) {
    let figure = Figure {
        name: String::new(),
        values: values.to_vec(),
        goal: Goal::Open,
    };
    figure.summary()
}

/// What contenders work on.
pub struct Ground {
    pub plan: Plan,
    pub source: Source,
    pub sinks: Vec<Sink>,
}

impl Ground {
    pub fn new(plan: Plan, kind: Kind) -> io::Result<Self> {
        Ok(Self {
            source: Source::new(plan.packet),
            sinks: Sink::several(kind, plan.devices, plan.device_bytes())?,
            plan,
        })
    }
}

/// The mutex yardstick with a malloc that keeps its memory, on the same work.
pub fn kept(plan: Plan, kind: Kind) -> io::Result<Kept> {
    Kept::start(plan, kind)
}

/// The greater of two in each round.
pub fn greater(first: &[f64], second: &[f64]) -> Vec<f64> {
    let pairs = first.iter().zip(second);
    pairs.map(|(first, second)| first.max(*second)).collect()
}

/// The smaller of two in each round.
pub fn smaller(first: &[f64], second: &[f64]) -> Vec<f64> {
    let pairs = first.iter().zip(second);
    pairs.map(|(first, second)| first.min(*second)).collect()
}
