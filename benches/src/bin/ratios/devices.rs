//! Sixty-four devices, from memory.
//!
//! The limit of every figure is `local` over that figure's yardstick: each core copies and writes for devices of its
//! own.

use std::io;

use vfio_migration::Backend;
use vfio_migration_benches::{
    engine,
    measure::Goal::{AtLeast, AtMost, Open},
    sink::Kind,
    yardstick::{local, mutex, threads},
};

use crate::{
    load::ours,
    suite::{Found, Ground, KIB, MIB, Run, Suite, kept},
};

pub const SUITES: &[Suite] = &[
    Suite {
        rows: &[
            ("devices-64-1m-vs-local", AtLeast(0.95)),
            ("devices-64-1m-cpu-vs-local", Open),
            ("devices-64-1m-vs-threads", Open),
            ("devices-64-1m-vs-mutex", Open),
            ("devices-64-1m-vs-mutex-kept", AtLeast(1.7)),
        ],
        run: |run| devices_64(run, "devices-64-1m", MIB),
    },
    Suite {
        rows: &[
            ("devices-64-64k-vs-local", AtLeast(0.95)),
            ("devices-64-64k-cpu-vs-local", AtMost(1.05)),
            ("devices-64-64k-vs-threads", AtLeast(1.45)),
            ("devices-64-64k-vs-mutex", Open),
            ("devices-64-64k-vs-mutex-kept", Open),
        ],
        run: |run| devices_64(run, "devices-64-64k", 64 * KIB),
    },
    Suite {
        rows: &[
            ("devices-64-4k-vs-local", AtLeast(0.88)),
            ("devices-64-4k-cpu-vs-local", Open),
            ("devices-64-4k-vs-threads", AtLeast(2.1)),
            ("devices-64-4k-vs-mutex", Open),
            ("devices-64-4k-vs-mutex-kept", Open),
        ],
        run: |run| devices_64(run, "devices-64-4k", 4 * KIB),
    },
    Suite {
        rows: &[("uring-vs-blocking-1-device-1m", AtLeast(0.97))],
        run: |run| backends(run, "uring-vs-blocking-1-device-1m", 1, MIB),
    },
    Suite {
        rows: &[("uring-vs-blocking-64-devices-64k", AtLeast(0.97))],
        run: |run| backends(run, "uring-vs-blocking-64-devices-64k", 64, 64 * KIB),
    },
];

fn devices_64(run: &Run, name: &str, packet: usize) -> io::Result<Found> {
    let plan = run.plan(64, packet);
    let ground = Ground::new(plan, Kind::Memfd)?;
    let mut kept = kept(plan, Kind::Memfd)?;
    let contest = run.contest(
        name,
        &mut [
            ("engine", &mut || ours(&ground)),
            ("local", &mut || {
                local::load_memory(&plan, &ground.sinks, &ground.source)
            }),
            ("threads", &mut || {
                threads::load_memory(&plan, &ground.sinks, &ground.source)
            }),
            ("mutex", &mut || {
                mutex::load_memory(&plan, &ground.sinks, &ground.source)
            }),
            ("kept", &mut || kept.round()),
        ],
    );
    let mut found = Found::default();
    let itself = vec![1.0; run.rounds];
    found.add_limited(
        format!("{name}-cpu-vs-local"),
        contest.cpu("engine", "local"),
        itself,
    );
    for (suffix, yardstick) in [
        ("vs-local", "local"),
        ("vs-threads", "threads"),
        ("vs-mutex", "mutex"),
        ("vs-mutex-kept", "kept"),
    ] {
        found.add_limited(
            format!("{name}-{suffix}"),
            contest.rate("engine", yardstick),
            contest.rate("local", yardstick),
        );
    }
    Ok(found)
}

fn backends(run: &Run, name: &str, devices: u32, packet: usize) -> io::Result<Found> {
    let ground = Ground::new(run.plan(devices, packet), Kind::Memfd)?;
    let with = |backend| {
        let settings = engine::with_backend(backend);
        engine::load_memory(&ground.plan, &ground.sinks, &ground.source, settings).sample
    };
    let contest = run.contest(
        name,
        &mut [
            ("uring", &mut || with(Backend::Uring)),
            ("blocking", &mut || with(Backend::Blocking)),
        ],
    );
    let mut found = Found::default();
    found.add(name, contest.rate("uring", "blocking"));
    Ok(found)
}
