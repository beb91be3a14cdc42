//! What a thousand devices cost the command, most of which do nothing: within what
//! `docs/reliability.md` says of one.
//!
//! Alone in its process: the kernel tells the most memory of all children that it ever had.
#![cfg(feature = "cli")]
#![allow(missing_docs, reason = "a test")]

#[path = "support/barrier.rs"]
mod barrier;
#[path = "support/names.rs"]
mod names;
#[path = "support/packets.rs"]
mod packets;
#[path = "support/watchdog.rs"]
mod watchdog;

use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use nix::sys::resource::{UsageWho, getrusage};

use crate::{
    barrier::sync,
    packets::{config_packet, hello, packet},
    watchdog::Watchdog,
};

const DEVICES: u32 = 1000;

/// A folder that goes away.
struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(&self.0);
    }
}

/// Runs the command with so many files. Returns the peaks of its memory in KiB and of its threads.
fn peaks(arguments: &[String], files: u64) -> (u64, u64) {
    let mut command = Command::new("sh");
    command
        .args(["-c", "ulimit -n $1 && shift && exec \"$@\"", "sh"])
        .arg(files.to_string())
        .arg(env!("CARGO_BIN_EXE_vfio-migrate"))
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let path = format!("/proc/{}/status", child.id());
    let (mut memory, mut threads) = (0, 0);
    loop {
        let text = fs::read_to_string(&path).unwrap_or_default();
        let value = |name| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
            number.unwrap_or(0_u64)
        };
        memory = memory.max(value("VmHWM:"));
        threads = threads.max(value("Threads:"));
        if child.try_wait().unwrap().is_some() {
            break;
        }
        thread::sleep(Duration::from_millis(1));
    }
    let output = child.wait_with_output().unwrap();
    let why = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {why}");
    let largest = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap().max_rss();
    (memory.max(u64::try_from(largest).unwrap()), threads)
}

#[test]
fn a_thousand_devices_cost_what_the_document_says() {
    let _watchdog = Watchdog::new();
    let place = std::env::temp_dir().join(format!("vfio-migrate-many-{}", std::process::id()));
    fs::create_dir(&place).unwrap();
    let place = Place(place);
    let mut capture = hello(0);
    capture.extend(sync());
    for number in 0..DEVICES {
        capture.extend(packet(number, 0, b"state"));
        capture.extend(config_packet(number, 1, b"config"));
    }
    let path = place.0.join("capture");
    fs::write(&path, capture).unwrap();
    let replay = ["replay".to_owned(), path.to_str().unwrap().to_owned()];
    let demo = ["demo", "--devices", "1000", "--state", "4KiB"].map(str::to_owned);
    let devices = u64::from(DEVICES);
    // In MiB: the budgets, and for each device 72 KiB where nothing stands behind it but a pipe; a demo has
    // two sessions, of simulated devices that have a thread each.
    let processors = u64::try_from(thread::available_parallelism().unwrap().get()).unwrap();
    for (arguments, most, mebibytes, files) in [
        (
            &replay[..],
            devices + processors,
            128 + 72 + processors,
            3100,
        ),
        (&demo[..], 4 * devices, 128 + 256 + 250, 6200),
    ] {
        let (memory, threads) = peaks(arguments, files);
        println!("{}: {memory} KiB, {threads} threads", arguments[0]);
        assert!(memory < mebibytes << 10, "{arguments:?}: {memory} KiB");
        assert!(threads < most + 64, "{arguments:?}: {threads}");
    }
}
