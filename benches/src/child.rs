//! Work in a process of its own, whose memory is nobody else's.
//!
//! ```text
//!   parent                              child: this program, with a role as its only argument
//!   ──────                              ─────────────────────────────────────────────────────
//!   Child::start(role) ───────────────▶ run(role)
//!   ready()      ◀── "port 4711" ────── a destination listens
//!   connects, sends
//!   done()       ◀── {faults, …} ────── all has been written
//! ```

use std::{
    env, fs,
    io::{self, BufRead, BufReader},
    net::{TcpListener, TcpStream},
    process::{Child as Process, ChildStdout, Command, Stdio},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

use crate::{
    engine,
    measure::Mark,
    plan::Plan,
    sink::{Kind, Sink},
    source::Source,
    yardstick::whole::{self, Shape},
};

/// The argument that makes a program of this package a child.
pub const ARGUMENT: &str = "--child";

/// Devices and bytes of each, of the migrations end to end.
pub const DEVICES: u32 = 4;
/// See [`DEVICES`].
pub const DEVICE_BYTES: usize = 256 << 20;

/// What a child does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Role {
    /// A load from memory, for its page faults and its memory.
    Memory,
    /// The engine's destination.
    Engine,
    /// The destination that holds the whole state.
    Whole,
    /// The destination that holds one device's state.
    ByDevice,
}

impl Role {
    const ALL: [(&'static str, Self); 4] = [
        ("memory", Self::Memory),
        ("engine", Self::Engine),
        ("whole", Self::Whole),
        ("by-device", Self::ByDevice),
    ];

    fn name(self) -> &'static str {
        let found = Self::ALL.iter().find(|(_, role)| *role == self);
        found.expect("all are there").0
    }
}

impl FromStr for Role {
    type Err = io::Error;

    fn from_str(name: &str) -> io::Result<Self> {
        let found = Self::ALL.iter().find(|(known, _)| *known == name);
        found
            .map(|(_, role)| *role)
            .ok_or_else(|| io::Error::other("no such role"))
    }
}

/// What a child has to tell at its end.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct Told {
    /// Page faults per GiB, from the first packet to the last write.
    pub faults_per_gib: f64,
    /// The most memory that it ever had, in bytes.
    pub peak: u64,
    /// The engine's budget, in bytes, where it has one.
    pub budget: u64,
}

/// A child at work.
#[derive(Debug)]
pub struct Child {
    process: Process,
    output: BufReader<ChildStdout>,
}

impl Child {
    /// Starts one.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn start(role: Role) -> io::Result<Self> {
        let mut process = Command::new(env::current_exe()?)
            .args([ARGUMENT, role.name()])
            .args(engine::writer_arguments())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = process.stdout.take().expect("it is a pipe");
        Ok(Self {
            process,
            output: BufReader::new(output),
        })
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }

    /// Waits until a destination listens, and connects `count` times.
    ///
    /// # Errors
    ///
    /// The kernel's, or a child that failed.
    pub fn connect(&mut self, count: u32) -> io::Result<Vec<TcpStream>> {
        let line = self.line()?;
        let port = line
            .strip_prefix("port ")
            .and_then(|port| port.parse().ok());
        let port: u16 = port.ok_or_else(|| io::Error::other("a child failed"))?;
        (0..count)
            .map(|_| TcpStream::connect(("127.0.0.1", port)))
            .collect()
    }

    /// Waits until the work is done: the moment, and what the child has to tell.
    ///
    /// # Errors
    ///
    /// The kernel's, or a child that failed.
    pub fn done(mut self) -> io::Result<(Mark, Told)> {
        let line = self.line()?;
        let done = Mark::now();
        let told = serde_json::from_str(&line)?;
        self.process.wait()?;
        Ok((done, told))
    }
}

/// The most memory that this process ever had, in bytes.
pub(crate) fn peak() -> io::Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.map(|kib| kib << 10)
        .ok_or_else(|| io::Error::other("no VmHWM"))
}

/// Does a child's work, and tells of it on the standard output.
///
/// # Errors
///
/// The kernel's.
///
/// # Panics
///
/// Where a load fails.
pub fn run(role: Role) -> io::Result<()> {
    let mut told = Told {
        faults_per_gib: 0.0,
        peak: 0,
        budget: 0,
    };
    match role {
        Role::Memory => memory(&mut told)?,
        Role::Engine => {
            let sinks = Sink::several(Kind::Memfd, DEVICES, DEVICE_BYTES)?;
            told.budget = destination(&sinks)?;
        }
        Role::Whole | Role::ByDevice => {
            let sinks = Sink::several(Kind::Memfd, DEVICES, DEVICE_BYTES)?;
            let shape = if role == Role::Whole {
                Shape::Whole
            } else {
                Shape::ByDevice
            };
            let (mut stream, _) = listen()?.accept()?;
            whole::load(shape, &sinks, &mut stream)?;
        }
    }
    told.peak = peak()?;
    println!("{}", serde_json::to_string(&told)?);
    Ok(())
}

fn listen() -> io::Result<TcpListener> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("port {}", listener.local_addr()?.port());
    Ok(listener)
}

#[expect(clippy::cast_precision_loss, reason = "a figure for a human")]
fn memory(told: &mut Told) -> io::Result<()> {
    let plan = Plan::of_bytes(1, 4, 1 << 20, 1 << 30);
    let sinks = Sink::several(Kind::Memfd, 1, plan.device_bytes())?;
    let source = Source::new(plan.packet);
    let outcome = engine::load_memory(&plan, &sinks, &source, engine::settings());
    told.faults_per_gib = outcome.sample.faults as f64;
    told.budget = outcome.stats.budget;
    Ok(())
}

fn destination(sinks: &[Sink]) -> io::Result<u64> {
    let plan = Plan::of_bytes(DEVICES, 4, 1 << 20, DEVICE_BYTES * DEVICES as usize);
    let mut settings = engine::settings();
    settings.channels = plan.channels;
    let (session, _ended) = engine::start_load(&plan.ids(), sinks, settings, Vec::new());
    let listener = listen()?;
    for _ in 0..plan.channels {
        let (stream, _) = listener.accept()?;
        session.add_channel(stream).expect("as many as announced");
    }
    let report = session.join();
    report.result.expect("the migration succeeds");
    Ok(report.stats.budget)
}
