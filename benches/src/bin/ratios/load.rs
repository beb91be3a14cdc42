//! One device: from memory, and from TCP.
//!
//! | limit of | is |
//! |---|---|
//! | a figure over another yardstick, from memory | `raw` or `handed`, whichever is faster, over that yardstick |
//! | a figure over `raw` | `handed` over `raw`: what a hand-over of the same bytes costs by itself |
//! | a figure over another yardstick, from TCP | `through` over that yardstick |

use std::io;

use vfio_migration_benches::{
    engine,
    measure::{
        Goal::{self, AtLeast, AtMost, Open},
        Sample,
    },
    sink::Kind,
    source::Wire,
    yardstick::{handed, mutex, raw, threads},
};

use crate::suite::{Contest, Found, Ground, KIB, MIB, Run, Suite, greater, kept, smaller};

pub const SUITES: &[Suite] = &[
    Suite {
        rows: &[
            ("load-1m-vs-raw", AtLeast(0.95)),
            ("load-1m-memfd-vs-raw", Open),
            ("load-1m-plain-vs-raw", Open),
            ("load-1m-cpu-vs-raw", AtMost(1.1)),
            ("load-1m-vs-threads", AtLeast(1.1)),
            ("load-1m-vs-mutex", Open),
            ("load-1m-vs-mutex-kept", AtLeast(1.5)),
            ("publish-p50-us", AtMost(0.5)),
            ("publish-p99-us", Open),
            ("publish-p999-us", Open),
        ],
        run: |run| {
            let (mut found, memfd) = memory(run, "load-1m", MIB)?;
            for (name, part) in [("p50", 0.5), ("p99", 0.99), ("p999", 0.999)] {
                let times = memfd.each("engine", |sample| sample.publish(part) / 1000.0);
                found.add(format!("publish-{name}-us"), times);
            }
            Ok(found)
        },
    },
    Suite {
        rows: &[
            ("load-64k-vs-raw", AtLeast(0.92)),
            ("load-64k-memfd-vs-raw", Open),
            ("load-64k-plain-vs-raw", Open),
            ("load-64k-cpu-vs-raw", AtMost(1.2)),
            ("load-64k-vs-threads", AtLeast(1.3)),
            ("load-64k-vs-mutex", Open),
            ("load-64k-vs-mutex-kept", AtLeast(1.4)),
        ],
        run: |run| Ok(memory(run, "load-64k", 64 * KIB)?.0),
    },
    Suite {
        rows: &[
            ("load-4k-vs-raw", AtLeast(0.88)),
            ("load-4k-memfd-vs-raw", Open),
            ("load-4k-plain-vs-raw", Open),
            ("load-4k-cpu-vs-raw", AtMost(1.3)),
            ("load-4k-vs-threads", AtLeast(2.5)),
            ("load-4k-vs-mutex", Open),
            ("load-4k-vs-mutex-kept", AtLeast(1.7)),
        ],
        run: |run| Ok(memory(run, "load-4k", 4 * KIB)?.0),
    },
    Suite {
        rows: TCP_1M,
        run: |run| tcp(run, "load-tcp-1m", MIB),
    },
    Suite {
        rows: TCP_64K,
        run: |run| tcp(run, "load-tcp-64k", 64 * KIB),
    },
    Suite {
        rows: TCP_4K,
        run: |run| tcp(run, "load-tcp-4k", 4 * KIB),
    },
    Suite {
        rows: &[("load-null-1m-vs-mutex-kept", Open)],
        run: |run| null(run, "load-null-1m-vs-mutex-kept", MIB),
    },
    Suite {
        rows: &[("load-null-64k-vs-mutex-kept", Open)],
        run: |run| null(run, "load-null-64k-vs-mutex-kept", 64 * KIB),
    },
    Suite {
        rows: &[("load-null-4k-vs-mutex-kept", Open)],
        run: |run| null(run, "load-null-4k-vs-mutex-kept", 4 * KIB),
    },
];

const TCP_1M: &[(&str, Goal)] = &[
    ("load-tcp-1m-vs-through", AtLeast(0.95)),
    ("load-tcp-1m-cpu-vs-through", AtMost(1.05)),
    ("load-tcp-1m-vs-raw", Open),
    ("load-tcp-1m-vs-mutex", Open),
];
const TCP_64K: &[(&str, Goal)] = &[
    ("load-tcp-64k-vs-through", AtLeast(0.95)),
    ("load-tcp-64k-cpu-vs-through", Open),
    ("load-tcp-64k-vs-raw", Open),
    ("load-tcp-64k-vs-mutex", Open),
];
const TCP_4K: &[(&str, Goal)] = &[
    ("load-tcp-4k-vs-through", AtLeast(0.88)),
    ("load-tcp-4k-cpu-vs-through", Open),
    ("load-tcp-4k-vs-raw", Open),
    ("load-tcp-4k-vs-mutex", Open),
];

/// The engine as it ships, from memory.
pub fn ours(ground: &Ground) -> Sample {
    engine::load_memory(
        &ground.plan,
        &ground.sinks,
        &ground.source,
        engine::settings(),
    )
    .sample
}

fn raw(ground: &Ground) -> Sample {
    raw::load_memory(&ground.plan, &ground.sinks[0], &ground.source)
}

fn memory(run: &Run, name: &str, packet: usize) -> io::Result<(Found, Contest)> {
    let plan = run.plan(1, packet);
    let ground = Ground::new(plan, Kind::Memfd)?;
    let mut kept = kept(plan, Kind::Memfd)?;
    let memfd = run.contest(
        &format!("{name}, memfd"),
        &mut [
            ("engine", &mut || ours(&ground)),
            ("raw", &mut || raw(&ground)),
            ("handed", &mut || {
                handed::load_memory(&plan, &ground.sinks[0], &ground.source)
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
    drop((ground, kept));
    let ground = Ground::new(plan, Kind::PlainWrite)?;
    let plain = run.contest(
        &format!("{name}, plain write"),
        &mut [
            ("engine", &mut || ours(&ground)),
            ("raw", &mut || raw(&ground)),
            ("handed", &mut || {
                handed::load_memory(&plan, &ground.sinks[0], &ground.source)
            }),
        ],
    );
    let mut found = Found::default();
    let [on_memfd, on_plain] = [&memfd, &plain].map(|contest| contest.rate("engine", "raw"));
    let [limit_memfd, limit_plain] = [&memfd, &plain].map(|contest| contest.rate("handed", "raw"));
    found.add_limited(
        format!("{name}-vs-raw"),
        smaller(&on_memfd, &on_plain),
        smaller(&limit_memfd, &limit_plain),
    );
    found.add_limited(format!("{name}-memfd-vs-raw"), on_memfd, limit_memfd);
    found.add_limited(format!("{name}-plain-vs-raw"), on_plain, limit_plain);
    let cpu = |contest: &Contest| contest.cpu("engine", "raw");
    found.add(
        format!("{name}-cpu-vs-raw"),
        greater(&cpu(&memfd), &cpu(&plain)),
    );
    for (suffix, yardstick) in [
        ("vs-threads", "threads"),
        ("vs-mutex", "mutex"),
        ("vs-mutex-kept", "kept"),
    ] {
        let limit = greater(
            &memfd.rate("raw", yardstick),
            &memfd.rate("handed", yardstick),
        );
        found.add_limited(
            format!("{name}-{suffix}"),
            memfd.rate("engine", yardstick),
            limit,
        );
    }
    Ok((found, memfd))
}

fn tcp(run: &Run, name: &str, packet: usize) -> io::Result<Found> {
    let plan = run.plan(1, packet);
    let ground = Ground::new(plan, Kind::Memfd)?;
    let (sinks, source) = (&ground.sinks, &ground.source);
    let contest = run.contest(
        name,
        &mut [
            ("engine", &mut || {
                engine::load_sockets(&plan, sinks, source, Wire::Tcp, engine::settings()).sample
            }),
            ("through", &mut || {
                raw::load_sockets_through(&plan, &sinks[0], source, Wire::Tcp)
            }),
            ("raw", &mut || {
                raw::load_sockets(&plan, &sinks[0], source, Wire::Tcp)
            }),
            ("mutex", &mut || {
                mutex::load_sockets(&plan, sinks, source, Wire::Tcp)
            }),
        ],
    );
    let mut found = Found::default();
    let itself = vec![1.0; run.rounds];
    found.add_limited(
        format!("{name}-vs-through"),
        contest.rate("engine", "through"),
        itself.clone(),
    );
    found.add_limited(
        format!("{name}-cpu-vs-through"),
        contest.cpu("engine", "through"),
        itself,
    );
    for yardstick in ["raw", "mutex"] {
        found.add_limited(
            format!("{name}-vs-{yardstick}"),
            contest.rate("engine", yardstick),
            contest.rate("through", yardstick),
        );
    }
    Ok(found)
}

/// Into `/dev/null`, where a write takes no time: what the engine itself takes.
fn null(run: &Run, name: &str, packet: usize) -> io::Result<Found> {
    let plan = run.plan(1, packet);
    let ground = Ground::new(plan, Kind::Null)?;
    let mut kept = kept(plan, Kind::Null)?;
    let contest = run.contest(
        name,
        &mut [
            ("engine", &mut || ours(&ground)),
            ("kept", &mut || kept.round()),
            ("raw", &mut || raw(&ground)),
        ],
    );
    let mut found = Found::default();
    found.add_limited(
        name,
        contest.rate("engine", "kept"),
        contest.rate("raw", "kept"),
    );
    Ok(found)
}
