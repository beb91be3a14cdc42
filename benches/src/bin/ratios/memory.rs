//! Memory: whole migrations between two processes, and what a load takes.

use std::io;

use vfio_migration::{Channel, SaveSession};
use vfio_migration_benches::{
    child::{self, Child, Role},
    measure::{
        Goal::{AtLeast, AtMost, Open},
        Mark, values,
    },
    plan::Plan,
    sink::{self, Kind, Sink},
    yardstick::whole,
};

use crate::suite::{Found, MIB, Run, Suite};

pub const SUITES: &[Suite] = &[
    Suite {
        rows: &[
            ("whole-state-time", AtLeast(4.0)),
            ("whole-state-memory", AtMost(1.0 / 25.0)),
            ("whole-state-by-device-time", Open),
            ("whole-state-by-device-memory", Open),
        ],
        run: whole_state,
    },
    Suite {
        rows: &[
            ("faults-per-gib", AtMost(20.0)),
            ("rss-over-budget-mib", AtMost(6.0)),
        ],
        run: memory,
    },
];

/// One migration end to end: how long it took, and the destination's peak.
#[expect(clippy::cast_precision_loss, reason = "a figure for a human")]
fn migrate(role: Role, sinks: &[Sink]) -> io::Result<(f64, f64)> {
    let mut destination = Child::start(role)?;
    let channels = if role == Role::Engine { 4 } else { 1 };
    let mut streams = destination.connect(channels)?;
    let begun = Mark::now();
    match role {
        Role::Engine => {
            let plan = Plan::of_bytes(
                child::DEVICES,
                channels,
                MIB,
                sinks.len() * child::DEVICE_BYTES,
            );
            let mut builder = SaveSession::builder();
            for (id, sink) in plan.ids().iter().zip(sinks) {
                builder = builder.device(sink::device(id, sink, child::DEVICE_BYTES).0);
            }
            for stream in streams {
                builder = builder.channel(Channel::from(stream));
            }
            let report = builder
                .start()
                .map_err(|failed| io::Error::other(failed.error))?
                .join();
            report.result.map_err(io::Error::other)?;
        }
        _ => {
            let shape = if role == Role::Whole {
                whole::Shape::Whole
            } else {
                whole::Shape::ByDevice
            };
            whole::save(shape, sinks, child::DEVICE_BYTES, &mut streams[0])?;
        }
    }
    let (done, told) = destination.done()?;
    let took = done.at.saturating_duration_since(begun.at).as_secs_f64();
    Ok((took, told.peak as f64))
}

fn whole_state(run: &Run) -> io::Result<Found> {
    let sinks = Sink::several(Kind::Memfd, child::DEVICES, child::DEVICE_BYTES)?;
    let rounds = run.in_turn(&mut [
        &mut || migrate(Role::Engine, &sinks),
        &mut || migrate(Role::Whole, &sinks),
        &mut || migrate(Role::ByDevice, &sinks),
    ]);
    let mut all = Vec::new();
    for round in rounds {
        all.push(round.into_iter().collect::<io::Result<Vec<_>>>()?);
    }
    if run.verbose {
        for round in &all {
            eprintln!("  whole state: engine, whole, by device: seconds, peak bytes: {round:?}");
        }
    }
    let time = |at: usize| values(&all, |round| round[at].0 / round[0].0);
    let memory = |at: usize| values(&all, |round| round[0].1 / round[at].1);
    let mut found = Found::default();
    found.add("whole-state-time", time(1));
    found.add("whole-state-memory", memory(1));
    found.add("whole-state-by-device-time", time(2));
    found.add("whole-state-by-device-memory", memory(2));
    Ok(found)
}

#[expect(clippy::cast_precision_loss, reason = "a figure for a human")]
fn memory(run: &Run) -> io::Result<Found> {
    let (mut faults, mut over) = (Vec::new(), Vec::new());
    for _ in 0..run.rounds {
        let (_, told) = Child::start(Role::Memory)?.done()?;
        faults.push(told.faults_per_gib);
        over.push((told.peak as f64 - told.budget as f64) / MIB as f64);
    }
    let mut found = Found::default();
    found.add("faults-per-gib", faults);
    found.add("rss-over-budget-mib", over);
    Ok(found)
}
