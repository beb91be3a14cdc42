//! One point of the growth measurement, in a process of its own: its peak memory is nobody else's.
//!
//! ```text
//!   parent ── the point, a line of JSON ──▶ child: bound to so many cores, sinks made, rounds of a load from TCP
//!          ◀─ what it took, a line of JSON ─
//! ```

use std::{
    env,
    io::{self, BufRead, Write},
    process::{Command, Stdio},
};

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use crate::{
    child::{ARGUMENT, peak},
    engine,
    plan::Plan,
    roles::{Roles, Watch},
    sink::{Kind, Sink},
    source::{Source, Wire},
};

/// The child's role, behind [`ARGUMENT`].
pub const ROLE: &str = "scale";

/// What is measured.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct Point {
    /// What moves.
    pub plan: Plan,
    /// Cores that the process may use; 0: all.
    pub cores: usize,
    /// Rounds.
    pub rounds: usize,
}

/// What came out: of the round with the median rate.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct Measured {
    /// What was measured.
    pub point: Point,
    /// Bytes a second.
    pub rate: f64,
    /// CPU seconds for each GiB, of the process: both ends of the sockets.
    pub cpu_per_gib: f64,
    /// The process's peak memory, in bytes.
    pub peak: u64,
    /// CPU seconds for each GiB by role, of a round of its own.
    pub roles: Roles,
}

/// Measures a point in a new process.
///
/// # Errors
///
/// The kernel's, or a child that failed.
///
/// # Panics
///
/// Never: the pipes were asked for.
pub fn measure(point: Point) -> io::Result<Measured> {
    let mut child = Command::new(env::current_exe()?)
        .args([ARGUMENT, ROLE])
        .args(engine::writer_arguments())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut input = child.stdin.take().expect("it is a pipe");
    writeln!(input, "{}", serde_json::to_string(&point)?)?;
    drop(input);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        return Err(io::Error::other(format!("no measure of {point:?}")));
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// The child's work.
///
/// # Errors
///
/// The kernel's.
pub fn run() -> io::Result<()> {
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line)?;
    let point: Point = serde_json::from_str(&line)?;
    bind(point.cores)?;
    println!("{}", serde_json::to_string(&of(point)?)?);
    Ok(())
}

/// Keeps this process to the first so many of its cores.
fn bind(cores: usize) -> io::Result<()> {
    if cores == 0 {
        return Ok(());
    }
    let own = Pid::from_raw(0);
    let (all, mut few) = (sched_getaffinity(own)?, CpuSet::new());
    let usable = (0..CpuSet::count()).filter(|core| all.is_set(*core) == Ok(true));
    for core in usable.take(cores) {
        few.set(core)?;
    }
    sched_setaffinity(own, &few)?;
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "a figure for a human")]
fn of(point: Point) -> io::Result<Measured> {
    let plan = point.plan;
    let sinks = Sink::several(Kind::Memfd, plan.devices, plan.device_bytes())?;
    let source = Source::new(plan.packet);
    let settings = || engine::settings().channels(plan.channels);
    let round = || engine::load_sockets(&plan, &sinks, &source, Wire::Tcp, settings()).sample;
    let mut rounds: Vec<_> = (0..point.rounds).map(|_| round()).collect();
    rounds.sort_by(|a, b| a.rate().total_cmp(&b.rate()));
    let sample = &rounds[rounds.len() / 2];
    // Looking takes time itself: a round of its own.
    let watch = Watch::start();
    round();
    let roles = watch.stop()?;
    let gib = plan.bytes() as f64 / f64::from(1 << 30);
    Ok(Measured {
        point,
        rate: sample.rate(),
        cpu_per_gib: sample.cpu_per_gib(),
        peak: peak()?,
        roles: roles.for_each(gib),
    })
}
