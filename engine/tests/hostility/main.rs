//! A bench of hostility: live processes of the command, and a world that means no good to them.
//!
//! ```text
//!   files ─┐
//!   sockets│
//!   signals├─▶ cases ─▶ send, receive, relay, replay ─▶ the oracle ─▶ how many were tried
//!   limits │              each a process, under a bound
//!   ways   │
//!   chains ┘
//! ```
//!
//! | file | what is hostile |
//! |---|---|
//! | `files.rs` | disks that are full, links, FIFOs, devices, two on one PATH, modes, a kill in the middle |
//! | `sockets.rs` | what stands where a socket is to be, strangers, silences, resets, full backlogs, lost connections |
//! | `signals.rs` | INT, TERM and HUP in each phase, with pipes that nobody reads |
//! | `limits.rs` | memory, files, processes; settings that cannot be |
//! | `return_path.rs` | a destination that floods, is silent, cuts, lies |
//! | `main_channel.rs` | a source whose main channel is cut, damaged, out of order |
//! | `chains.rs` | relays between, and links that are cut |
//!
//! The oracle, for every case ([`rig`]): no panic, no abort, no death by a signal but SIGKILL; an end
//! within the bound; what was at PATH is untouched unless both ends say 0; where `send` says 0,
//! `receive` says 0 and the file is the state, byte for byte; nothing else is left in the directory;
//! both statuses agree; a failure names what it is about.
//!
//! Cases mostly wait, so more of them run at a time than the machine has processors. What needs root is
//! ignored without it. `cargo test --test hostility WORD` runs those whose names have the word.

#![cfg(feature = "cli")]
#![allow(missing_docs, reason = "a test")]

mod chains;
#[path = "../support/command.rs"]
mod command;
mod files;
mod limits;
mod link;
mod main_channel;
mod return_path;
mod rig;
mod running;
mod signals;
mod sockets;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

/// How many run at a time.
const AT_A_TIME: usize = 8;

/// What a test needs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Needs {
    Nothing,
    Root,
}

pub(crate) type Test = (&'static str, fn(), Needs);

/// A module's tests, by their names and by what they need.
macro_rules! tests {
    (any: [$($any:ident),* $(,)?], root: [$($root:ident),* $(,)?],) => {
        pub(crate) const TESTS: &[crate::Test] = &[
            $((stringify!($any), $any, crate::Needs::Nothing),)*
            $((stringify!($root), $root, crate::Needs::Root),)*
        ];
    };
}
pub(crate) use tests;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(AT_A_TIME);
    let root = nix::unistd::geteuid().is_root();
    let modules = [
        ("files", files::TESTS),
        ("sockets", sockets::TESTS),
        ("signals", signals::TESTS),
        ("limits", limits::TESTS),
        ("return_path", return_path::TESTS),
        ("main_channel", main_channel::TESTS),
        ("chains", chains::TESTS),
    ];
    let trials = modules.iter().flat_map(|(module, tests)| {
        tests.iter().map(move |(name, test, needs)| {
            let run = || {
                test();
                Ok(())
            };
            let ignored = *needs == Needs::Root && !root;
            Trial::test(format!("{module}::{name}"), run).with_ignored_flag(ignored)
        })
    });
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    println!("hostility: {} cases", rig::cases());
    conclusion.exit_code()
}
