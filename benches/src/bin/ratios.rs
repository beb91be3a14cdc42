//! The report: every figure beside its goal.
//!
//! ```text
//!   suite ── contenders in turn, round by round ──▶ one ratio for each round ──▶ median, min, max
//! ```
//!
//! Contenders that several figures share run once for all of them. It exits 0 whatever the figures.
//!
//! A row that ends in `-limit` says how far the figure could go on this machine: what the bare
//! copies, calls and wake-ups reach where nobody hands anything over, over the same yardstick in the
//! same round. One that ends in `-ring` is the same for a thread that sleeps in a ring.

use std::{io, process::ExitCode, thread};

use clap::Parser;
use serde_json::json;
use vfio_migration::{Backend, Channel, SaveSession, Settings};
use vfio_migration_benches::{
    child::{self, Child, Role},
    engine::{self, Outcome},
    latency::{self, Cancelled},
    measure::{Figure, Goal, Mark, Sample, Short, in_turn, percentile, values},
    plan::Plan,
    sink::{self, Kind, Sink},
    source::{Source, Wire},
    yardstick::{copy_save, mutex, raw, threads, whole},
};

use Goal::{AtLeast, AtMost, Open};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// Every figure, in the order of the report, with its goal.
const FIGURES: &[(&str, Goal)] = &[
    ("load-1m-vs-mutex", AtLeast(3.5)),
    ("load-1m-vs-mutex-limit", Open),
    ("load-64k-vs-mutex", AtLeast(4.5)),
    ("load-64k-vs-mutex-limit", Open),
    ("load-4k-vs-mutex", AtLeast(5.0)),
    ("load-4k-vs-mutex-limit", Open),
    ("load-1m-cpu-vs-mutex", AtMost(0.33)),
    ("load-1m-vs-raw", AtLeast(0.95)),
    ("load-1m-memfd-vs-raw", Open),
    ("load-1m-plain-vs-raw", Open),
    ("load-64k-vs-raw", AtLeast(0.9)),
    ("load-64k-memfd-vs-raw", Open),
    ("load-64k-plain-vs-raw", Open),
    ("mutex-vs-raw", AtLeast(0.25)),
    ("threads-vs-raw", AtLeast(0.5)),
    ("load-tcp-1m-vs-mutex", AtLeast(2.2)),
    ("load-tcp-1m-vs-mutex-limit", Open),
    ("load-tcp-64k-vs-mutex", AtLeast(2.2)),
    ("load-tcp-64k-vs-mutex-limit", Open),
    ("load-tcp-4k-vs-mutex", AtLeast(2.0)),
    ("load-tcp-4k-vs-mutex-limit", Open),
    ("load-tcp-1m-vs-raw", AtLeast(0.95)),
    ("load-tcp-1m-vs-raw-limit", Open),
    ("publish-p50-vs-mutex", AtMost(1.0 / 2000.0)),
    ("publish-p99-vs-mutex", Open),
    ("publish-p999-vs-mutex", Open),
    ("publish-p50-us", Open),
    ("publish-p99-us", Open),
    ("publish-p999-us", Open),
    ("devices-64-64k-vs-threads", AtLeast(2.0)),
    ("devices-64-64k-vs-threads-limit", Open),
    ("devices-64-4k-vs-threads", AtLeast(5.0)),
    ("devices-64-4k-vs-threads-limit", Open),
    ("devices-64-1m-vs-mutex", AtLeast(2.5)),
    ("devices-64-1m-vs-mutex-limit", Open),
    ("save-1m-vs-raw", AtLeast(0.95)),
    ("save-1m-vs-raw-limit", Open),
    ("save-1m-vs-copy", AtLeast(2.0)),
    ("save-1m-vs-copy-limit", Open),
    ("whole-state-time", AtLeast(3.0)),
    ("whole-state-memory", AtMost(1.0 / 20.0)),
    ("whole-state-by-device-time", Open),
    ("whole-state-by-device-memory", Open),
    ("wake-p50-vs-condvar", AtMost(0.5)),
    ("wake-p50-vs-condvar-limit", Open),
    ("wake-p50-vs-condvar-ring", Open),
    ("wake-p50-us", Open),
    ("load-null-1m-vs-mutex", AtLeast(8.0)),
    ("load-null-1m-vs-mutex-limit", Open),
    ("load-null-64k-vs-mutex", AtLeast(10.0)),
    ("load-null-64k-vs-mutex-limit", Open),
    ("load-null-4k-vs-mutex", AtLeast(15.0)),
    ("load-null-4k-vs-mutex-limit", Open),
    ("fd-syscalls-per-4k-packet", AtMost(0.03)),
    ("ring-calls-per-4k-packet", Open),
    ("cancel-p90-us", AtMost(200.0)),
    ("cancel-p90-starved-us", Open),
    ("cancel-p90-blocked-us", Open),
    ("faults-per-gib", AtMost(20.0)),
    ("rss-over-budget-mib", AtMost(8.0)),
    ("uring-vs-blocking-1-device-1m", AtLeast(0.95)),
    ("uring-vs-blocking-64-devices-64k", AtLeast(1.2)),
    ("uring-vs-blocking-64-devices-64k-limit", Open),
];

/// Yardsticks' own checks: below these the rows that lean on them are void.
const CHECKS: &[(&str, &[&str])] = &[
    ("mutex-vs-raw", &["-vs-mutex"]),
    ("threads-vs-raw", &["-vs-threads"]),
];

/// Prints every figure beside its goal.
#[derive(Debug, Parser)]
struct Arguments {
    /// The figures to print, or parts of their names; all unless given.
    names: Vec<String>,
    /// Prints a JSON array of {name, median, min, max, goal}.
    #[arg(long)]
    json: bool,
    /// Rounds for each figure.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Few rounds of little work: shows that it runs, and measures nothing.
    #[arg(long)]
    quick: bool,
    /// Prints each contender's own rate too.
    #[arg(long)]
    verbose: bool,
    #[arg(long, hide = true)]
    child: Option<String>,
}

impl Arguments {
    fn wants(&self, name: &str) -> bool {
        self.names.is_empty() || self.names.iter().any(|part| name.contains(part.as_str()))
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match &arguments.child {
        Some(role) => role.parse().and_then(child::run),
        None => report(arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ratios: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A suite: the figures that it gives, and how.
type Suite = (&'static [&'static str], fn(&Run) -> io::Result<Found>);

/// What a suite found: a figure's name, and its value in each round.
type Found = Vec<(String, Vec<f64>)>;

/// Every suite.
const SUITES: &[Suite] = &[
    (
        &[
            "load-1m-vs-mutex",
            "load-1m-vs-mutex-limit",
            "load-1m-cpu-vs-mutex",
            "load-1m-vs-raw",
            "load-1m-memfd-vs-raw",
            "load-1m-plain-vs-raw",
            "mutex-vs-raw",
            "threads-vs-raw",
            "publish-p50-vs-mutex",
            "publish-p99-vs-mutex",
            "publish-p999-vs-mutex",
            "publish-p50-us",
            "publish-p99-us",
            "publish-p999-us",
        ],
        load_1m,
    ),
    (
        &[
            "load-64k-vs-mutex",
            "load-64k-vs-mutex-limit",
            "load-64k-vs-raw",
            "load-64k-memfd-vs-raw",
            "load-64k-plain-vs-raw",
        ],
        load_64k,
    ),
    (&["load-4k-vs-mutex", "load-4k-vs-mutex-limit"], |run| {
        versus(run, "load-4k-vs-mutex", 1, 4 * KIB, Kind::Memfd)
    }),
    (
        &[
            "load-tcp-1m-vs-mutex",
            "load-tcp-1m-vs-mutex-limit",
            "load-tcp-1m-vs-raw",
            "load-tcp-1m-vs-raw-limit",
        ],
        |run| load_tcp(run, "load-tcp-1m-vs-mutex", MIB),
    ),
    (
        &["load-tcp-64k-vs-mutex", "load-tcp-64k-vs-mutex-limit"],
        |run| load_tcp(run, "load-tcp-64k-vs-mutex", 64 * KIB),
    ),
    (
        &["load-tcp-4k-vs-mutex", "load-tcp-4k-vs-mutex-limit"],
        |run| load_tcp(run, "load-tcp-4k-vs-mutex", 4 * KIB),
    ),
    (
        &[
            "devices-64-64k-vs-threads",
            "devices-64-64k-vs-threads-limit",
        ],
        |run| versus(run, "devices-64-64k-vs-threads", 64, 64 * KIB, Kind::Memfd),
    ),
    (
        &["devices-64-4k-vs-threads", "devices-64-4k-vs-threads-limit"],
        |run| versus(run, "devices-64-4k-vs-threads", 64, 4 * KIB, Kind::Memfd),
    ),
    (
        &["devices-64-1m-vs-mutex", "devices-64-1m-vs-mutex-limit"],
        |run| versus(run, "devices-64-1m-vs-mutex", 64, MIB, Kind::Memfd),
    ),
    (
        &[
            "save-1m-vs-raw",
            "save-1m-vs-raw-limit",
            "save-1m-vs-copy",
            "save-1m-vs-copy-limit",
        ],
        save,
    ),
    (
        &[
            "whole-state-time",
            "whole-state-memory",
            "whole-state-by-device-time",
            "whole-state-by-device-memory",
        ],
        whole_state,
    ),
    (
        &[
            "wake-p50-vs-condvar",
            "wake-p50-vs-condvar-limit",
            "wake-p50-vs-condvar-ring",
            "wake-p50-us",
        ],
        wake,
    ),
    (
        &["load-null-1m-vs-mutex", "load-null-1m-vs-mutex-limit"],
        |run| versus(run, "load-null-1m-vs-mutex", 1, MIB, Kind::Null),
    ),
    (
        &["load-null-64k-vs-mutex", "load-null-64k-vs-mutex-limit"],
        |run| versus(run, "load-null-64k-vs-mutex", 1, 64 * KIB, Kind::Null),
    ),
    (
        &["load-null-4k-vs-mutex", "load-null-4k-vs-mutex-limit"],
        |run| versus(run, "load-null-4k-vs-mutex", 1, 4 * KIB, Kind::Null),
    ),
    (
        &["fd-syscalls-per-4k-packet", "ring-calls-per-4k-packet"],
        fd_syscalls,
    ),
    (
        &[
            "cancel-p90-us",
            "cancel-p90-starved-us",
            "cancel-p90-blocked-us",
        ],
        cancel,
    ),
    (&["faults-per-gib", "rss-over-budget-mib"], memory),
    (&["uring-vs-blocking-1-device-1m"], |run| {
        backends(run, "uring-vs-blocking-1-device-1m", 1, MIB)
    }),
    (
        &[
            "uring-vs-blocking-64-devices-64k",
            "uring-vs-blocking-64-devices-64k-limit",
        ],
        |run| backends(run, "uring-vs-blocking-64-devices-64k", 64, 64 * KIB),
    ),
];

fn report(mut arguments: Arguments) -> io::Result<()> {
    if arguments.quick {
        arguments.rounds = 2;
    }
    let run = Run {
        rounds: arguments.rounds,
        quick: arguments.quick,
        verbose: arguments.verbose,
    };
    let mut found: Found = Vec::new();
    for (names, suite) in SUITES {
        if names.iter().any(|name| arguments.wants(name)) {
            found.extend(suite(&run)?);
        }
    }
    let mut figures = Vec::new();
    for (name, goal) in FIGURES {
        if arguments.wants(name)
            && let Some((_, values)) = found.iter().find(|(known, _)| known == name)
        {
            figures.push(Figure {
                name: (*name).to_owned(),
                values: values.clone(),
                goal: *goal,
            });
        }
    }
    let void = |name: &str| {
        CHECKS.iter().any(|(check, leaning)| {
            let leans = leaning.iter().any(|part| name.ends_with(part));
            let failed = figures
                .iter()
                .any(|figure| figure.name == *check && !figure.goal.is_met(figure.summary().0));
            leans && failed
        })
    };
    if arguments.json {
        let rows: Vec<_> = figures
            .iter()
            .map(|figure| {
                let (median, min, max) = figure.summary();
                json!({
                    "name": figure.name,
                    "median": median,
                    "min": min,
                    "max": max,
                    "goal": (figure.goal != Open).then(|| figure.goal.to_string()),
                })
            })
            .collect();
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    println!(
        "{:<34} {:>10} {:>10} {:>10}  goal",
        "figure", "median", "min", "max"
    );
    for figure in &figures {
        let (median, min, max) = figure.summary();
        let verdict = match figure.goal {
            Open => "",
            _ if void(&figure.name) => "void",
            goal if goal.is_met(median) => "met",
            _ => "MISSED",
        };
        println!(
            "{:<34} {:>10} {:>10} {:>10}  {:<28} {verdict}",
            figure.name,
            Short(median),
            Short(min),
            Short(max),
            figure.goal,
        );
    }
    Ok(())
}

/// How much to do.
struct Run {
    rounds: usize,
    quick: bool,
    verbose: bool,
}

impl Run {
    /// Work for each round: half a GiB, or a quarter in packets of 4 KiB.
    fn plan(&self, devices: u32, packet: usize) -> Plan {
        let bytes = match packet {
            _ if self.quick => 64 * MIB,
            4096 => 256 * MIB,
            _ => 512 * MIB,
        };
        Plan::of_bytes(devices, 4, packet, bytes)
    }

    /// Rounds of the contenders, in turn.
    fn in_turn<T>(&self, contenders: &mut [&mut dyn FnMut() -> T]) -> Vec<Vec<T>> {
        in_turn(self.rounds, contenders)
    }

    /// As [`Run::in_turn`], saying each contender's rate.
    fn samples(
        &self,
        what: &str,
        names: &[&str],
        contenders: &mut [&mut dyn FnMut() -> Sample],
    ) -> Vec<Vec<Sample>> {
        let rounds = self.in_turn(contenders);
        if self.verbose {
            for (at, name) in names.iter().enumerate() {
                let rate = Figure {
                    name: String::new(),
                    values: values(&rounds, |round| round[at].rate() / 1e9),
                    goal: Open,
                };
                let cpu = values(&rounds, |round| round[at].cpu_per_gib());
                let cpu =
                    cpu.iter().sum::<f64>() / f64::from(u32::try_from(cpu.len()).unwrap_or(1));
                let (median, min, max) = rate.summary();
                eprintln!(
                    "  {what}: {name}: {median:.2} GB/s ({min:.2} to {max:.2}), {cpu:.2} CPU s/GiB"
                );
            }
        }
        rounds
    }
}

/// One contender's rate over another's, round by round.
fn ratio(rounds: &[Vec<Sample>], of: usize, over: usize) -> Vec<f64> {
    values(rounds, |round| round[of].rate() / round[over].rate())
}

fn found<const N: usize>(figures: [(&str, Vec<f64>); N]) -> Found {
    figures
        .into_iter()
        .map(|(name, values)| (name.to_owned(), values))
        .collect()
}

/// The round's worse of two.
fn worse(first: &[f64], second: &[f64]) -> Vec<f64> {
    let pairs = first.iter().zip(second);
    pairs.map(|(first, second)| first.min(*second)).collect()
}

fn ours(plan: &Plan, sinks: &[Sink], source: &Source) -> Sample {
    engine::load_memory(plan, sinks, source, Settings::default()).sample
}

fn load_1m(run: &Run) -> io::Result<Found> {
    let plan = run.plan(1, MIB);
    let source = Source::new(MIB);
    let sinks = Sink::several(Kind::Memfd, 1, plan.device_bytes())?;
    let rounds = run.samples(
        "1 MiB into a memfd",
        &["engine", "mutex", "raw", "threads"],
        &mut [
            &mut || ours(&plan, &sinks, &source),
            &mut || mutex::load_memory(&plan, &sinks, &source),
            &mut || raw::load_memory(&plan, &sinks[0], &source),
            &mut || threads::load_memory(&plan, &sinks, &source),
        ],
    );
    drop(sinks);
    let memfd = ratio(&rounds, 0, 2);
    let plain = plain_vs_raw(run, &plan, &source)?;
    let publish = |part| {
        values(&rounds, |round| {
            round[0].publish(part) / round[1].publish(part)
        })
    };
    let publish_us = |part| values(&rounds, |round| round[0].publish(part) / 1000.0);
    let cpu = values(&rounds, |round| {
        round[0].cpu_per_gib() / round[1].cpu_per_gib()
    });
    Ok(found([
        ("load-1m-vs-mutex", ratio(&rounds, 0, 1)),
        ("load-1m-vs-mutex-limit", ratio(&rounds, 2, 1)),
        ("load-1m-cpu-vs-mutex", cpu),
        ("load-1m-vs-raw", worse(&memfd, &plain)),
        ("load-1m-memfd-vs-raw", memfd),
        ("load-1m-plain-vs-raw", plain),
        ("mutex-vs-raw", ratio(&rounds, 1, 2)),
        ("threads-vs-raw", ratio(&rounds, 3, 2)),
        ("publish-p50-vs-mutex", publish(0.5)),
        ("publish-p99-vs-mutex", publish(0.99)),
        ("publish-p999-vs-mutex", publish(0.999)),
        ("publish-p50-us", publish_us(0.5)),
        ("publish-p99-us", publish_us(0.99)),
        ("publish-p999-us", publish_us(0.999)),
    ]))
}

fn plain_vs_raw(run: &Run, plan: &Plan, source: &Source) -> io::Result<Vec<f64>> {
    let sinks = Sink::several(Kind::PlainWrite, 1, plan.device_bytes())?;
    let rounds = run.samples(
        "into a plain-write file",
        &["engine", "raw"],
        &mut [&mut || ours(plan, &sinks, source), &mut || {
            raw::load_memory(plan, &sinks[0], source)
        }],
    );
    Ok(ratio(&rounds, 0, 1))
}

fn load_64k(run: &Run) -> io::Result<Found> {
    let plan = run.plan(1, 64 * KIB);
    let source = Source::new(plan.packet);
    let sinks = Sink::several(Kind::Memfd, 1, plan.device_bytes())?;
    let rounds = run.samples(
        "64 KiB into a memfd",
        &["engine", "mutex", "raw"],
        &mut [
            &mut || ours(&plan, &sinks, &source),
            &mut || mutex::load_memory(&plan, &sinks, &source),
            &mut || raw::load_memory(&plan, &sinks[0], &source),
        ],
    );
    drop(sinks);
    let memfd = ratio(&rounds, 0, 2);
    let plain = plain_vs_raw(run, &plan, &source)?;
    Ok(found([
        ("load-64k-vs-mutex", ratio(&rounds, 0, 1)),
        ("load-64k-vs-mutex-limit", ratio(&rounds, 2, 1)),
        ("load-64k-vs-raw", worse(&memfd, &plain)),
        ("load-64k-memfd-vs-raw", memfd),
        ("load-64k-plain-vs-raw", plain),
    ]))
}

/// The engine from memory, over the yardstick that the figure's name ends with; and the limit.
fn versus(run: &Run, name: &str, devices: u32, packet: usize, kind: Kind) -> io::Result<Found> {
    let plan = run.plan(devices, packet);
    let source = Source::new(packet);
    let sinks = Sink::several(kind, devices, plan.device_bytes())?;
    let (alone, limit) = bare(run, packet, kind)?;
    let threads = name.ends_with("threads");
    let yardstick = || {
        if threads {
            threads::load_memory(&plan, &sinks, &source)
        } else {
            mutex::load_memory(&plan, &sinks, &source)
        }
    };
    let rounds = run.samples(
        name,
        &["engine", "yardstick", "raw, one device"],
        &mut [
            &mut || ours(&plan, &sinks, &source),
            &mut || yardstick(),
            &mut || raw::load_memory(&alone, &limit, &source),
        ],
    );
    let limit = limit_over(&rounds, 2, 1, devices);
    Ok(vec![
        (name.to_owned(), ratio(&rounds, 0, 1)),
        (format!("{name}-limit"), limit),
    ])
}

/// One device's plan and sink for the machine's limit.
fn bare(run: &Run, packet: usize, kind: Kind) -> io::Result<(Plan, Sink)> {
    let plan = run.plan(1, packet);
    let sink = Sink::new(kind, plan.device_bytes())?;
    Ok((plan, sink))
}

/// The most that any engine could reach of a ratio: the bare copies and writes, with no hand-over,
/// over the yardstick. For one device whose writes come one after the other, that is how fast they
/// go; for several, how fast they go on all cores, taken from their CPU time.
fn limit_over(rounds: &[Vec<Sample>], raw: usize, over: usize, devices: u32) -> Vec<f64> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let cores = f64::from(u32::try_from(cores).unwrap_or(1));
    values(rounds, |round| {
        let rate = if devices == 1 {
            round[raw].rate()
        } else {
            cores * f64::from(1 << 30) / round[raw].cpu_per_gib()
        };
        rate / round[over].rate()
    })
}

fn tcp(plan: &Plan, sinks: &[Sink], source: &Source) -> Sample {
    engine::load_sockets(plan, sinks, source, Wire::Tcp, Settings::default()).sample
}

fn load_tcp(run: &Run, name: &str, packet: usize) -> io::Result<Found> {
    let plan = run.plan(1, packet);
    let source = Source::new(packet);
    let sinks = Sink::several(Kind::Memfd, 1, plan.device_bytes())?;
    let rounds = run.samples(
        name,
        &["engine", "mutex", "raw", "through"],
        &mut [
            &mut || tcp(&plan, &sinks, &source),
            &mut || mutex::load_sockets(&plan, &sinks, &source, Wire::Tcp),
            &mut || raw::load_sockets(&plan, &sinks[0], &source, Wire::Tcp),
            &mut || raw::load_sockets_through(&plan, &sinks[0], &source, Wire::Tcp),
        ],
    );
    let mut found = vec![
        (name.to_owned(), ratio(&rounds, 0, 1)),
        (format!("{name}-limit"), ratio(&rounds, 2, 1)),
    ];
    if packet == MIB {
        found.push(("load-tcp-1m-vs-raw".to_owned(), ratio(&rounds, 0, 2)));
        found.push(("load-tcp-1m-vs-raw-limit".to_owned(), ratio(&rounds, 3, 2)));
    }
    Ok(found)
}

fn save(run: &Run) -> io::Result<Found> {
    let plan = run.plan(1, MIB);
    let sinks = Sink::several(Kind::Memfd, 1, plan.device_bytes())?;
    let rounds = run.samples(
        "save of 1 MiB",
        &["engine", "raw", "copy", "raw, in turn"],
        &mut [
            &mut || engine::save_null(&plan, &sinks).sample,
            &mut || raw::save(&plan, &sinks[0], 1),
            &mut || copy_save::save(&plan, &sinks),
            &mut || raw::save(&plan, &sinks[0], 8),
        ],
    );
    Ok(found([
        ("save-1m-vs-raw", ratio(&rounds, 0, 1)),
        ("save-1m-vs-raw-limit", ratio(&rounds, 3, 1)),
        ("save-1m-vs-copy", ratio(&rounds, 0, 2)),
        ("save-1m-vs-copy-limit", ratio(&rounds, 1, 2)),
    ]))
}

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
    Ok(found([
        ("whole-state-time", time(1)),
        ("whole-state-memory", memory(1)),
        ("whole-state-by-device-time", time(2)),
        ("whole-state-by-device-memory", memory(2)),
    ]))
}

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
    Ok(found([
        (
            "wake-p50-vs-condvar",
            values(&medians, |round| round[0] / round[1]),
        ),
        (
            "wake-p50-vs-condvar-limit",
            values(&medians, |round| round[2] / round[1]),
        ),
        (
            "wake-p50-vs-condvar-ring",
            values(&medians, |round| round[3] / round[1]),
        ),
        ("wake-p50-us", values(&medians, |round| round[0])),
    ]))
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
    Ok(found([
        ("fd-syscalls-per-4k-packet", entries),
        ("ring-calls-per-4k-packet", calls),
    ]))
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
    Ok(found([
        ("cancel-p90-us", worst),
        ("cancel-p90-starved-us", starved),
        ("cancel-p90-blocked-us", blocked),
    ]))
}

#[expect(clippy::cast_precision_loss, reason = "a figure for a human")]
fn memory(run: &Run) -> io::Result<Found> {
    let (mut faults, mut over) = (Vec::new(), Vec::new());
    for _ in 0..run.rounds {
        let (_, told) = Child::start(Role::Memory)?.done()?;
        faults.push(told.faults_per_gib);
        over.push((told.peak as f64 - told.budget as f64) / MIB as f64);
    }
    Ok(found([
        ("faults-per-gib", faults),
        ("rss-over-budget-mib", over),
    ]))
}

fn backends(run: &Run, name: &str, devices: u32, packet: usize) -> io::Result<Found> {
    let plan = run.plan(devices, packet);
    let source = Source::new(packet);
    let sinks = Sink::several(Kind::Memfd, devices, plan.device_bytes())?;
    let (alone, limit) = bare(run, packet, Kind::Memfd)?;
    let with = |backend| {
        let settings = engine::with_backend(backend);
        let Outcome { sample, .. } = engine::load_memory(&plan, &sinks, &source, settings);
        sample
    };
    let rounds = run.samples(
        name,
        &["uring", "blocking", "raw, one device"],
        &mut [
            &mut || with(Backend::Uring),
            &mut || with(Backend::Blocking),
            &mut || raw::load_memory(&alone, &limit, &source),
        ],
    );
    let mut found = vec![(name.to_owned(), ratio(&rounds, 0, 1))];
    if devices > 1 {
        let limit = limit_over(&rounds, 2, 1, devices);
        found.push((format!("{name}-limit"), limit));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_has_one_suite() {
        for (name, _) in FIGURES {
            let suites = SUITES.iter().filter(|(names, _)| names.contains(name));
            assert_eq!(suites.count(), 1, "{name}");
        }
        let of_suites: usize = SUITES.iter().map(|(names, _)| names.len()).sum();
        assert_eq!(of_suites, FIGURES.len());
    }

    #[test]
    fn names_are_parts() {
        let arguments = Arguments::parse_from(["ratios", "load-4k", "wake"]);
        assert!(arguments.wants("load-4k-vs-mutex") && arguments.wants("wake-p50-us"));
        assert!(!arguments.wants("load-64k-vs-mutex"));
        assert!(Arguments::parse_from(["ratios"]).wants("anything"));
    }
}
