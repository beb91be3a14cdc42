//! Random migrations in a loop, each judged: for as long as you like.
//!
//! ```text
//!   seed ─▶ plan (what, over what, what goes wrong) ─▶ migrate ─▶ judge ─▶ next seed
//!             │                                           └ or with a peer process, to be killed
//!             └ in which way: sessions alone, shared with RAM, pushed, relayed, the life cycle,
//!               processes of the command
//! ```
//!
//! One migration after the other, and everything random comes from its seed, but for the kernel's
//! and the scheduler's part in it. After each: what succeeded has the right digests, what failed says
//! why, devices are in the states that the sessions report, and no thread, file or memory is left.
//! A line for each failure has the seed that repeats it: `soak --seed N --count 1 --verbose`.
//!
//! The main thread runs the migrations; a watchdog ends the process where one does not end. It counts
//! its own wake-ups rather than the clock's time, so that a machine that stands still ends nothing.

mod cast;
mod lifecycle;
#[path = "../../../../engine/tests/hostility/link.rs"]
mod link;
mod migrate;
#[path = "../../../../engine/tests/support/minded.rs"]
mod minded;
mod packets;
mod path;
mod peer;
mod plan;
mod processes;
mod push_api;
mod random;
mod subject;
mod verify;

use std::{
    collections::BTreeMap,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use clap::Parser;

use self::plan::{Plan, Scene};

/// How long one migration may take before the watchdog ends the process.
const PATIENCE: Duration = Duration::from_secs(180);

/// Random migrations in a loop, each judged.
#[derive(Parser)]
struct Args {
    /// For how long. The migration under way is ended.
    #[arg(long, default_value_t = 2.0)]
    minutes: f64,
    /// The first migration's seed; each one after it has the next.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How many, instead of for how long.
    #[arg(long)]
    count: Option<u64>,
    /// Only migrations in a way whose name has this word, like "processes" or "relay".
    #[arg(long)]
    way: Option<String>,
    /// Says what each migration is before it begins.
    #[arg(long)]
    verbose: bool,
    /// This process is the peer of the migration with this seed: connect here.
    #[arg(long, hide = true)]
    peer: Option<std::net::SocketAddr>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(address) = args.peer {
        return peer::serve(&Plan::new(args.seed), address);
    }
    if let Err(why) = processes::prepare() {
        eprintln!("soak: {why}");
        return ExitCode::from(2);
    }
    let began = Instant::now();
    let now = Arc::new(AtomicU64::new(args.seed));
    watch(now.clone());
    let mut done: BTreeMap<Scene, Count> = BTreeMap::new();
    let mut ways: BTreeMap<&str, Count> = BTreeMap::new();
    let mut failed = 0_u64;
    let mut said = Instant::now();
    let (mut total, mut next) = (0, args.seed);
    while args.count.map_or(
        began.elapsed().as_secs_f64() < args.minutes * 60.0,
        |count| total < count,
    ) {
        let seed = next;
        next = next.wrapping_add(1);
        let plan = Plan::new(seed);
        if args
            .way
            .as_ref()
            .is_some_and(|way| !plan.way.name().contains(way))
        {
            continue;
        }
        total += 1;
        // Relaxed: for a human.
        now.store(seed, Relaxed);
        if args.verbose {
            println!("seed {seed}: {plan:?}");
        }
        let before = verify::left_over();
        let result = catch_unwind(AssertUnwindSafe(|| migrate::run(&plan)))
            .unwrap_or_else(|panic| Err(format!("panicked: {}", verify::message(&*panic))))
            .and_then(|success| verify::settled(before).map(|()| success));
        let scene = done.entry(plan.scene).or_default();
        let way = ways.entry(plan.way.name()).or_default();
        match result {
            Ok(succeeded) => {
                scene.add(succeeded);
                way.add(succeeded);
            }
            Err(why) => {
                failed += 1;
                println!(
                    "FAILED: {:?}, {}: {why}; repeat: soak --seed {seed} --count 1 --verbose",
                    plan.scene,
                    plan.way.name()
                );
            }
        }
        if said.elapsed() > Duration::from_secs(60) {
            said = Instant::now();
            println!(
                "{total} migrations, {failed} failed, {}",
                rate(total, began)
            );
        }
    }
    for (scene, count) in &done {
        println!("{scene:?}: {count}");
    }
    for (way, count) in &ways {
        println!("{way}: {count}");
    }
    println!(
        "spilled, in this process: {} MiB",
        verify::SPILLED.load(Relaxed) >> 20
    );
    println!(
        "soak: {total} migrations from seed {}, {failed} failed, {}, {:.1} min",
        args.seed,
        rate(total, began),
        began.elapsed().as_secs_f64() / 60.0
    );
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

#[derive(Default)]
struct Count {
    succeeded: u64,
    refused: u64,
}

impl Count {
    const fn add(&mut self, succeeded: bool) {
        if succeeded {
            self.succeeded += 1;
        } else {
            self.refused += 1;
        }
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} succeeded, {} ended in one clear error",
            self.succeeded, self.refused
        )
    }
}

fn rate(total: u64, began: Instant) -> String {
    #[expect(clippy::cast_precision_loss, reason = "for a human")]
    let total = total as f64;
    format!(
        "{:.0} migrations per minute",
        total * 60.0 / began.elapsed().as_secs_f64()
    )
}

/// Ends the process where one migration does not end.
fn watch(now: Arc<AtomicU64>) {
    thread::spawn(move || {
        let (mut last, mut ticks) = (None, 0);
        loop {
            thread::sleep(Duration::from_secs(1));
            let seed = now.load(Relaxed);
            ticks = if last == Some(seed) { ticks + 1 } else { 0 };
            last = Some(seed);
            if ticks > PATIENCE.as_secs() {
                println!("FAILED: hangs; repeat: soak --seed {seed} --count 1");
                std::process::abort();
            }
        }
    });
}
