//! What a switchover costs beside its bytes.

use std::{io, time::Duration};

use vfio_migration_benches::{
    measure::{
        Goal::{AtMost, Open},
        percentile, values,
    },
    sink::{Kind, Sink},
    switchover,
};

use crate::suite::{Found, KIB, MIB, Run, Suite};

pub const SUITES: &[Suite] = &[
    Suite {
        rows: &[
            ("small-switchover-us", AtMost(600.0)),
            ("small-switchover-vs-bare", AtMost(3.0)),
        ],
        run: |run| small(run, "small-switchover", 1, 4 * KIB),
    },
    Suite {
        rows: &[
            ("small-switchover-8-us", AtMost(1500.0)),
            ("small-switchover-8-vs-bare", Open),
        ],
        run: |run| small(run, "small-switchover-8", 8, 64 * KIB),
    },
    Suite {
        rows: &[("first-byte-us", AtMost(500.0))],
        run: first_byte,
    },
];

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// The median of many, with the engine and bare, in turn.
fn small(run: &Run, name: &str, devices: u32, len: usize) -> io::Result<Found> {
    let count = if run.quick { 3 } else { 10 };
    let median = |switchover: fn(u32, usize) -> io::Result<Duration>| {
        let times: io::Result<Vec<_>> = (0..count)
            .map(|_| switchover(devices, len).map(micros))
            .collect();
        let mut times = times?;
        times.sort_unstable();
        io::Result::Ok(percentile(&times, 0.5))
    };
    let rounds = run.in_turn(&mut [&mut || median(switchover::with_engine), &mut || {
        median(switchover::bare)
    }]);
    let medians = all(rounds)?;
    let mut found = Found::default();
    found.add_limited(
        format!("{name}-us"),
        values(&medians, |round| round[0]),
        values(&medians, |round| round[1]),
    );
    found.add_limited(
        format!("{name}-vs-bare"),
        values(&medians, |round| round[0] / round[1]),
        vec![1.0; medians.len()],
    );
    Ok(found)
}

/// The rounds, none of which failed.
fn all(rounds: Vec<Vec<io::Result<f64>>>) -> io::Result<Vec<Vec<f64>>> {
    rounds
        .into_iter()
        .map(|round| round.into_iter().collect())
        .collect()
}

fn first_byte(run: &Run) -> io::Result<Found> {
    let len = if run.quick { 64 * MIB } else { 1024 * MIB };
    let sink = Sink::new(Kind::Memfd, len)?;
    let rounds = run.in_turn(&mut [&mut || {
        let first = switchover::first_byte(&sink, len)?;
        io::Result::Ok(first.as_secs_f64() * 1e6)
    }]);
    let mut found = Found::default();
    found.add("first-byte-us", values(&all(rounds)?, |round| round[0]));
    Ok(found)
}
