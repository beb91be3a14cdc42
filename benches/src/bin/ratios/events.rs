//! Single events: a wake-up, a cancellation, a burst of small packets.
//!
//! The limit of a wake-up is a bare futex and `write`. `wake-p50-vs-condvar-ring` is a thread that sleeps in our ring
//! and writes through it, without an engine.

use std::io;

use vfio_migration_benches::{
    latency::{self, Cancelled},
    measure::{
        Goal::{AtMost, Open},
        percentile, values,
    },
};

use crate::suite::{Found, Run, Suite};

pub const SUITES: &[Suite] = &[
    Suite {
        rows: &[
            ("wake-p50-vs-condvar", AtMost(0.7)),
            ("wake-p50-vs-condvar-ring", Open),
            ("wake-p50-us", Open),
        ],
        run: wake,
    },
    Suite {
        rows: &[("through-p50-us", AtMost(2.0))],
        run: through,
    },
    Suite {
        rows: &[
            ("fd-syscalls-per-4k-packet", AtMost(0.03)),
            ("ring-calls-per-4k-packet", Open),
        ],
        run: fd_syscalls,
    },
    Suite {
        rows: &[
            ("cancel-p90-us", AtMost(200.0)),
            ("cancel-p90-starved-us", Open),
            ("cancel-p90-blocked-us", Open),
        ],
        run: cancel,
    },
];

fn wake(run: &Run) -> io::Result<Found> {
    let count = if run.quick { 50 } else { 1000 };
    let rounds = run.in_turn(&mut [
        &mut || latency::wake_engine(count),
        &mut || latency::wake_mutex(count),
        &mut || latency::wake_bare(count),
        &mut || latency::wake_ring(count),
    ]);
    let mut medians = Vec::new();
    for round in rounds {
        let mut row = Vec::new();
        for times in round {
            row.push(percentile(&times?, 0.5) / 1000.0);
        }
        medians.push(row);
    }
    if run.verbose {
        eprintln!("  wake: engine, condvar, bare, bare in a ring: {medians:.1?} us");
    }
    let over = |at: usize| values(&medians, |round| round[at] / round[1]);
    let mut found = Found::default();
    found.add_limited("wake-p50-vs-condvar", over(0), over(2));
    found.add("wake-p50-vs-condvar-ring", over(3));
    found.add("wake-p50-us", values(&medians, |round| round[0]));
    Ok(found)
}

fn through(run: &Run) -> io::Result<Found> {
    let count = if run.quick { 50 } else { 1000 };
    let mut medians = Vec::new();
    for _ in 0..run.rounds {
        medians.push(percentile(&latency::through(count)?, 0.5) / 1000.0);
    }
    let mut found = Found::default();
    found.add("through-p50-us", medians);
    Ok(found)
}

#[expect(clippy::cast_precision_loss, reason = "a figure for a human")]
fn fd_syscalls(run: &Run) -> io::Result<Found> {
    let (mut entries, mut calls) = (Vec::new(), Vec::new());
    for _ in 0..run.rounds {
        let (stats, packets) = latency::ready_64(1)?;
        // With this backend the ring's entries are all that happens to a data fd.
        let on_fd: u64 = stats.devices.iter().map(|device| device.entries).sum();
        entries.push(on_fd as f64 / f64::from(packets));
        calls.push(stats.ring_calls as f64 / f64::from(packets));
    }
    let mut found = Found::default();
    found.add("fd-syscalls-per-4k-packet", entries);
    found.add("ring-calls-per-4k-packet", calls);
    Ok(found)
}

fn cancel(run: &Run) -> io::Result<Found> {
    let count = if run.quick { 5 } else { 50 };
    let p90 = |at| -> io::Result<f64> {
        let mut times = Vec::new();
        for _ in 0..count {
            let took = latency::cancel(at)?;
            times.push(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        }
        times.sort_unstable();
        Ok(percentile(&times, 0.9) / 1000.0)
    };
    let (mut starved, mut blocked, mut worst) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..run.rounds {
        let round = (p90(Cancelled::Starved)?, p90(Cancelled::Blocked)?);
        starved.push(round.0);
        blocked.push(round.1);
        worst.push(round.0.max(round.1));
    }
    let mut found = Found::default();
    found.add("cancel-p90-us", worst);
    found.add("cancel-p90-starved-us", starved);
    found.add("cancel-p90-blocked-us", blocked);
    Ok(found)
}
