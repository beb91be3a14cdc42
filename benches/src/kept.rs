//! The mutex yardstick in a process whose malloc keeps its memory.
//!
//! ```text
//!   parent                                     child: this program, with malloc's tunables in its environment
//!   ──────                                     ───────────────────────────────────────────────────────────────
//!   Kept::start ── the plan, a line of JSON ──▶ makes sinks and source
//!   round()     ── an empty line ─────────────▶ mutex::load_memory
//!               ◀─ the sample, a line of JSON ─
//!   drop        ── end of input ──────────────▶ ends
//! ```
//!
//! The yardstick allocates each packet. With malloc's defaults a large packet is fresh memory each time, and the
//! kernel's page faults are most of what it takes. A long-lived process may have tuned its malloc, so that what was
//! freed is used again without a fault. Both are printed; the kinder one is this.

use std::{
    env,
    io::{self, BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use serde::{Deserialize, Serialize};

use crate::{
    child::ARGUMENT,
    measure::Sample,
    plan::Plan,
    sink::{Kind, Sink},
    source::Source,
    yardstick::mutex,
};

/// What makes glibc's malloc keep what is freed: nothing goes back to the kernel, nothing is mapped by itself, and
/// what one thread has freed another may use.
const TUNABLES: &str = "glibc.malloc.trim_threshold=4000000000:glibc.malloc.mmap_threshold=1000000000:\
                        glibc.malloc.arena_max=1";

/// The child's role, behind [`ARGUMENT`].
pub const ROLE: &str = "mutex-kept";

/// What the child is told first.
#[derive(Deserialize, Serialize)]
struct Work {
    plan: Plan,
    kind: Kind,
}

/// The child.
#[derive(Debug)]
pub struct Kept {
    process: Child,
    /// `None` once it has been told to end.
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Kept {
    /// Starts one. The first round warms its memory.
    ///
    /// # Errors
    ///
    /// The kernel's.
    ///
    /// # Panics
    ///
    /// Never: both pipes were asked for.
    pub fn start(plan: Plan, kind: Kind) -> io::Result<Self> {
        let mut process = Command::new(env::current_exe()?)
            .args([ARGUMENT, ROLE])
            .env("GLIBC_TUNABLES", TUNABLES)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut input = process.stdin.take().expect("it is a pipe");
        let output = process.stdout.take().expect("it is a pipe");
        writeln!(input, "{}", serde_json::to_string(&Work { plan, kind })?)?;
        Ok(Self {
            process,
            input: Some(input),
            output: BufReader::new(output),
        })
    }

    /// One round.
    ///
    /// # Panics
    ///
    /// Where the child failed: its own message says why.
    pub fn round(&mut self) -> Sample {
        let mut line = String::new();
        let input = self.input.as_mut().expect("it has not been dropped");
        writeln!(input).expect("the child lives");
        self.output.read_line(&mut line).expect("the child lives");
        serde_json::from_str(&line).expect("a sample")
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.input = None;
        // Its input has ended, so it ends too; how does not matter.
        let _ended = self.process.wait();
    }
}

/// The child's work.
///
/// # Errors
///
/// The kernel's.
pub fn run() -> io::Result<()> {
    let mut lines = io::stdin().lock().lines();
    let Some(work) = lines.next() else {
        return Ok(());
    };
    let Work { plan, kind } = serde_json::from_str(&work?)?;
    let source = Source::new(plan.packet);
    let sinks = Sink::several(kind, plan.devices, plan.device_bytes())?;
    for line in lines {
        line?;
        let sample = mutex::load_memory(&plan, &sinks, &source);
        println!("{}", serde_json::to_string(&sample)?);
    }
    Ok(())
}
