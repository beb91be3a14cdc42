//! The command `vfio-migrate`: moves the migration state of devices, and looks at what was moved.
//!
//! ```text
//!   demo               source ══ loopback TCP ══▶ destination     one process, simulated devices
//!   send ── receive    source ══ TCP or unix ═══▶ destination     two processes
//!   relay              source ═══════▶ relay ═══════▶ destination   QEMU's on both sides, say
//!   replay             captured channels ───────▶ destination     the state, out of a capture
//!   save, restore      devices ──▶ a file, and back     while their VM stands
//!   doctor             this host ────────────────────▶ what it can do     and what to mend
//!   probe              a device of the kernel's ────▶ what it can do     or why not
//!   inspect            a captured channel ──────▶ its packets     one line for each
//! ```
//!
//! | file | what |
//! |---|---|
//! | `demo`, `send`, `receive`, `relay`, `save`, `restore`, `doctor`, `probe`, `replay`, `inspect` | a subcommand each |
//! | `main_channel` | what `send` and `receive` say to each other beside the packets |
//! | `network`, `connect`, `listen`, `acceptor` | addresses and connections; how they are made, and taken in; which is what |
//! | `limits` | how many files may be open |
//! | `device`, `file`, `observed` | the devices of a `SPEC`, and what is known of them afterwards |
//! | `state_files` | the files that a migration leaves: together, or not at all |
//! | `save_file` | what `save` writes and `restore` checks: a channel's bytes, and their digest |
//! | `manual` | `man` and `completions`: made of the arguments |
//! | `measure` | `probe --measure`: a device saved to nowhere |
//! | `kernel` | the kernel's own devices: opened, or refused with a reason |
//! | `capture`, `contents` | a captured channel's packets and where they stand; what all together hold |
//! | `output`, `json`, `moved` | lines and tables; the one JSON object; what was moved, for both |
//! | `failure`, `progress`, `observe` | exit statuses; bars; metrics and timelines |
//! | `args`, `interrupt` | sizes and times; Ctrl-C |
//! | `stderr` | lines on stderr, for which nobody waits |
//!
//! # Threads
//!
//! | thread | does |
//! |---|---|
//! | main | runs the subcommand, watches over its sessions and over Ctrl-C |
//! | the sessions' | see the library |
//! | one more of `send` and `receive`, two of `relay` | read the main channel |
//! | one each | waits for signals; writes stderr; draws bars; writes metrics and timelines |
//!
//! Every wait ends with what it is for, after a time that an option sets, or with Ctrl-C.
//!
//! # How it ends
//!
//! | status | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | failed; one line on stderr says why |
//! | 2 | wrong use |
//! | 130 | interrupted, by SIGINT, SIGTERM or SIGHUP |
//!
//! Results are on stdout, everything else on stderr. With `--json` a failure is on stdout as well (`failure`).

mod acceptor;
mod args;
mod capture;
mod capture_set;
mod config_digest;
mod connect;
mod demo;
mod device;
mod doctor;
mod failure;
mod file;
mod host_memory;
mod inspect;
mod interrupt;
mod json;
mod kernel;
mod limits;
mod listen;
mod main_channel;
mod manual;
mod measure;
mod moved;
mod network;
mod observe;
mod output;
mod probe;
mod progress;
mod receive;
mod recorder;
mod relay;
mod replay;
mod restore;
mod save;
mod save_file;
#[cfg(test)]
#[path = "../../../tests/support/schema.rs"]
#[allow(dead_code, reason = "the tests of the command use more of it")]
mod schema;
mod send;
mod state_files;
mod stderr;
mod tls;

use std::{fmt, io, process::ExitCode, time::Duration};

use anyhow::anyhow;
use clap::{CommandFactory, Parser, Subcommand};

/// Moves the migration state of VFIO devices, in QEMU's wire format.
///
/// Without a command it runs `demo`: 4 simulated devices of 256 MiB each migrate within this
/// process, over 4 connections, and the destination's state is compared with the source's.
#[derive(Debug, Parser)]
#[command(name = "vfio-migrate", version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    Demo(demo::Options),
    Send(send::Options),
    Receive(receive::Options),
    Relay(relay::Options),
    Save(save::Options),
    Restore(restore::Options),
    Probe(probe::Options),
    Doctor(doctor::Options),
    Replay(replay::Options),
    Inspect(inspect::Options),
    Man(manual::ManOptions),
    Completions(manual::CompletionsOptions),
}

impl Command {
    /// Whether its result is to be JSON, and its failure then too.
    const fn is_json(&self) -> bool {
        match self {
            Self::Demo(options) => options.json,
            Self::Send(options) => options.json,
            Self::Receive(options) => options.json,
            Self::Relay(options) => options.json,
            Self::Save(options) => options.json,
            Self::Restore(options) => options.json,
            Self::Probe(options) => options.json,
            Self::Doctor(options) => options.json,
            Self::Replay(options) => options.json,
            Self::Inspect(options) => options.json,
            Self::Man(_) | Self::Completions(_) => false,
        }
    }
}

const EXAMPLES: &str = "\
Examples:
  See it work:
    vfio-migrate
    vfio-migrate demo --devices 64 --state 8MiB --channels 16

  From one machine to another; start the destination first:
    vfio-migrate receive --listen 0.0.0.0:4444 --device sim:id=gpu0
    vfio-migrate send --to host2:4444 --device sim:id=gpu0,size=1GiB,seed=7

  What can this host do, and what is missing?
    vfio-migrate doctor --devices 4 --channels 8

  What can a device of the kernel's do?
    vfio-migrate probe /sys/bus/pci/devices/0000:3b:00.2
    vfio-migrate send --to host2:4444 --device vfio:/sys/bus/pci/devices/0000:3b:00.2,id=nic0

  Into a file, and out of it again:
    vfio-migrate save nic0.save --device vfio:/sys/bus/pci/devices/0000:3b:00.2,id=nic0
    vfio-migrate restore nic0.save --device vfio:/sys/bus/pci/devices/0000:3b:00.2,id=nic0

  Between two machines' VMMs, with the devices' states through the engine:
    vfio-migrate relay --listen 0.0.0.0:4444 --to host2:4444

  The state out of a capture of QEMU's multifd channels:
    vfio-migrate replay --out state/ 01-c2s.bin 02-c2s.bin
    vfio-migrate inspect 01-c2s.bin

Sizes are like 4096, 64KiB, 1.5GiB; K, M, G are powers of 1024 too. Times are in seconds.
`vfio-migrate COMMAND --help` explains a command.

Exit status: 0 done, 1 failed (one line on stderr says why), 2 wrong use, 130 interrupted (by
SIGINT, SIGTERM or SIGHUP). A migration that has passed is 0 on both sides. If its output cannot be
printed, or is interrupted, a warning says so.
With --json there is one JSON object on stdout in each case: docs/json.md has its schema. It begins with
\"version\" (1: of that schema) and \"command\". After a failure it has \"error\": an object
with \"message\" (that line), \"chain\" (its parts), \"status\", and, if they are known, \"kind\"
(usage, interrupted, protocol, device, stalled, ...), \"phase\", \"device\" (\"idstr\", \"instance\"),
\"channel\", \"idx\" and \"errno\".
VFIO_MIGRATE_LOG=vfio_migration=debug (or =trace) logs the engine's events to stderr.";

/// Arguments that cannot be, found when they were looked at together.
#[derive(Debug)]
struct Usage(String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Ctrl-C, after everything has been put in order.
#[derive(Debug)]
struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// Whether whoever reads our output has gone: `inspect … | head`.
pub(crate) fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref()
        .is_some_and(|error: &output::Stdout| error.0.kind() == io::ErrorKind::BrokenPipe)
}

fn log() -> anyhow::Result<()> {
    use tracing_subscriber::{filter::Targets, layer::SubscriberExt, util::SubscriberInitExt};
    let Ok(filter) = std::env::var("VFIO_MIGRATE_LOG") else {
        return Ok(());
    };
    let filter: Targets = filter
        .parse()
        .map_err(|error| Usage(format!("VFIO_MIGRATE_LOG: {error}")))?;
    tracing_subscriber::registry()
        .with(tracing_subscriber::fmt::layer().with_writer(|| stderr::Log))
        .with(filter)
        .try_init()?;
    Ok(())
}

fn run(command: Command) -> anyhow::Result<()> {
    // Before there is any other thread, so that all of them leave the signals to that one.
    interrupt::watch(failure::tell_interrupted_at_once)?;
    stderr::start();
    log()?;
    match command {
        Command::Demo(options) => demo::run(&options),
        Command::Send(options) => send::run(&options),
        Command::Receive(options) => receive::run(&options),
        Command::Relay(options) => relay::run(&options),
        Command::Save(options) => save::run(&options),
        Command::Restore(options) => restore::run(&options),
        Command::Probe(options) => probe::run(&options),
        Command::Doctor(options) => doctor::run(&options),
        Command::Replay(options) => replay::run(&options),
        Command::Inspect(options) => inspect::run(&options),
        Command::Man(options) => manual::man(&options),
        Command::Completions(options) => manual::completions(&options),
    }
}

/// The subcommand's name, where the first argument is one.
fn subcommand() -> Option<String> {
    let first = std::env::args().nth(1)?;
    Cli::command().find_subcommand(&first)?;
    Some(first)
}

fn main() -> ExitCode {
    if !host_memory::to_begin() {
        // Nothing that allocates: there is nothing to allocate from.
        eprintln!("vfio-migrate: the host has no memory to begin with");
        return ExitCode::from(1);
    }
    let cli = Cli::try_parse().unwrap_or_else(|error| {
        // Help, too; where it cannot be written there is still the status.
        let _lost = error.print();
        if error.use_stderr() && std::env::args_os().any(|argument| argument == "--json") {
            json::want(subcommand());
            failure::print(&anyhow!(Usage(error.to_string())));
        }
        std::process::exit(error.exit_code())
    });
    let command = cli
        .command
        .unwrap_or_else(|| Command::Demo(demo::Options::default()));
    if command.is_json() {
        json::want(subcommand());
    }
    let failed = run(command).err().filter(|error| !is_closed_pipe(error));
    if let Some(error) = &failed {
        output::say(&format!("{error:#}"));
    }
    stderr::finish(Duration::from_secs(2));
    // Behind the line: nobody may read stdout any more.
    if let Some(error) = &failed {
        failure::print(error);
    }
    ExitCode::from(failed.as_ref().map_or(0, failure::status))
}
