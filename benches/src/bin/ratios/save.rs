//! Saves, over channels that end in `/dev/null`.

use std::io;

use vfio_migration_benches::{
    engine,
    measure::Goal::{AtLeast, Open},
    plan::Plan,
    sink::{Kind, Sink},
    yardstick::{copy_save, local, raw},
};

use crate::suite::{Found, MIB, Run, Suite};

pub const SUITES: &[Suite] = &[
    Suite {
        rows: &[
            ("save-1m-vs-raw", AtLeast(0.95)),
            ("save-1m-vs-copy", AtLeast(1.3)),
            ("save-1m-cpu-vs-raw", Open),
        ],
        run: one,
    },
    Suite {
        rows: &[
            ("save-64-devices-vs-copy", AtLeast(1.5)),
            ("save-64-devices-vs-local", Open),
        ],
        run: many,
    },
];

fn ground(run: &Run, devices: u32) -> io::Result<(Plan, Vec<Sink>)> {
    let plan = run.plan(devices, MIB);
    Ok((
        plan,
        Sink::several(Kind::Memfd, devices, plan.device_bytes())?,
    ))
}

fn one(run: &Run) -> io::Result<Found> {
    let (plan, sinks) = ground(run, 1)?;
    let contest = run.contest(
        "save-1m",
        &mut [
            ("engine", &mut || engine::save_null(&plan, &sinks).sample),
            ("raw", &mut || raw::save(&plan, &sinks[0], 1)),
            // What an engine that reads ahead must have.
            ("in turn", &mut || raw::save(&plan, &sinks[0], 8)),
            ("copy", &mut || copy_save::save(&plan, &sinks)),
        ],
    );
    let mut found = Found::default();
    found.add_limited(
        "save-1m-vs-raw",
        contest.rate("engine", "raw"),
        contest.rate("in turn", "raw"),
    );
    found.add_limited(
        "save-1m-vs-copy",
        contest.rate("engine", "copy"),
        contest.rate("raw", "copy"),
    );
    found.add("save-1m-cpu-vs-raw", contest.cpu("engine", "raw"));
    Ok(found)
}

fn many(run: &Run) -> io::Result<Found> {
    let (plan, sinks) = ground(run, 64)?;
    let contest = run.contest(
        "save-64-devices",
        &mut [
            ("engine", &mut || engine::save_null(&plan, &sinks).sample),
            ("local", &mut || local::save(&plan, &sinks)),
            ("copy", &mut || copy_save::save(&plan, &sinks)),
        ],
    );
    let mut found = Found::default();
    found.add_limited(
        "save-64-devices-vs-copy",
        contest.rate("engine", "copy"),
        contest.rate("local", "copy"),
    );
    found.add_limited(
        "save-64-devices-vs-local",
        contest.rate("engine", "local"),
        vec![1.0; run.rounds],
    );
    Ok(found)
}
