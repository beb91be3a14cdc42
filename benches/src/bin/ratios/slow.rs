//! Devices whose writes sleep in the kernel: files of a file system in user space, which answers at a pace. Left out
//! where nothing may be mounted.
//!
//! | row | devices |
//! |---|---|
//! | `slow-64-…` | 64 that take a millisecond for each MiB |
//! | `slow-1-of-64` | 63 quick ones, and one that stands still for 200 ms: the time of the 63, over their time beside a quick one |
//! | `slow-later-…` | one that is quick for 100 MiB, and then takes a millisecond for each MiB |

use std::{io, time::Duration};

use vfio_migration_benches::{
    engine,
    measure::{
        Goal::{AtLeast, AtMost, Open},
        Sample,
    },
    plan::Plan,
    sink::{Kind, Sink},
    slow::{self, Pace},
    source::Source,
    yardstick::threads,
};

use crate::suite::{Found, MIB, Run, Suite};

pub const SUITES: &[Suite] = &[
    Suite {
        rows: &[("slow-64-vs-threads", AtLeast(0.97))],
        run: |run| {
            let slow = Pace {
                for_each_mib: Duration::from_millis(1),
                ..Pace::default()
            };
            versus_threads(run, "slow-64-vs-threads", run.plan(64, MIB), slow)
        },
    },
    Suite {
        rows: &[("slow-1-of-64", AtMost(1.05))],
        run: one_of_64,
    },
    Suite {
        rows: &[("slow-later-vs-threads", Open)],
        run: |run| {
            let later = Pace {
                for_each_mib: Duration::from_millis(1),
                quick: 100 << 20,
                ..Pace::default()
            };
            let plan = Plan::of_bytes(1, 4, MIB, 200 * MIB);
            versus_threads(run, "slow-later-vs-threads", plan, later)
        },
    },
];

/// Whether there are slow files here; says so where not.
fn can_mount() -> bool {
    let slow = slow::sinks(&[Pace::default()]);
    if let Err(error) = &slow {
        eprintln!("slow-…: left out: nothing may be mounted here: {error}");
    }
    slow.is_ok()
}

fn versus_threads(run: &Run, name: &str, plan: Plan, pace: Pace) -> io::Result<Found> {
    let source = Source::new(plan.packet);
    if !can_mount() {
        return Ok(Found::default());
    }
    // New files for each round: a pace begins anew.
    let with = |load: &dyn Fn(&[Sink]) -> Sample| {
        let sinks = slow::sinks(&vec![pace; plan.devices as usize]);
        load(&sinks.expect("files were to be had before"))
    };
    let contest = run.contest(
        name,
        &mut [
            ("engine", &mut || {
                with(&|sinks| engine::load_memory(&plan, sinks, &source, engine::settings()).sample)
            }),
            ("threads", &mut || {
                with(&|sinks| threads::load_memory(&plan, sinks, &source))
            }),
        ],
    );
    let mut found = Found::default();
    found.add(name, contest.rate("engine", "threads"));
    Ok(found)
}

fn one_of_64(run: &Run) -> io::Result<Found> {
    if !can_mount() {
        return Ok(Found::default());
    }
    let plan = run.plan(64, MIB);
    let source = Source::new(plan.packet);
    let mut sinks = Sink::several(Kind::Memfd, 64, plan.device_bytes())?;
    let mut quick = sinks.pop();
    let mut beside = |first: Sink| {
        sinks.insert(0, first);
        let outcome = engine::load_memory_but(1, &plan, &sinks, &source, engine::settings());
        (outcome.sample, sinks.remove(0))
    };
    let stands = Pace {
        stands: Duration::from_millis(200),
        ..Pace::default()
    };
    let beside = std::cell::RefCell::new(&mut beside);
    let contest = run.contest(
        "slow-1-of-64",
        &mut [
            ("beside one that stands", &mut || {
                let slow = slow::sinks(&[stands]).expect("files were to be had before");
                (beside.borrow_mut())(slow.into_iter().next().expect("one was asked for")).0
            }),
            ("beside a quick one", &mut || {
                let first = quick.take().expect("it came back");
                let (sample, first) = (beside.borrow_mut())(first);
                quick = Some(first);
                sample
            }),
        ],
    );
    let mut found = Found::default();
    found.add(
        "slow-1-of-64",
        contest.rate("beside a quick one", "beside one that stands"),
    );
    Ok(found)
}
