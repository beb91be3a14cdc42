//! Many migrations, one after the other, cost no more memory than a few.
//!
//! Alone in its process, whose memory it looks at.
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
    io::{self, Cursor, Read, Write},
    thread,
};

use vfio_migration::{Channel, Device, FdDevice, LoadSession, Relay, Settings};

use crate::{
    barrier::sync,
    names::id,
    packets::{config_packet, hello, packet},
    watchdog::Watchdog,
};

const DEVICES: u32 = 4;
/// Runs before the first look, and between the two.
const WARM: usize = 50;
const RUNS: usize = 200;
/// A device's slots alone are 40 KiB: with one that stays behind a run's growth would be 8 MiB.
const SLACK_KIB: u64 = 4 << 10;

/// A device whose state nobody keeps.
fn device(number: u32) -> Device {
    let sink = FdDevice::new(|_state| {
        let file = fs::File::options().write(true).open("/dev/null")?;
        Ok(file.into())
    })
    .stopped()
    .with_config(
        |_writer| Ok(()),
        |reader| io::copy(reader, &mut io::sink()).map(drop),
    );
    Device::new(id(number), Box::new(sink)).unwrap()
}

/// Takes everything.
struct Nowhere;

impl Read for Nowhere {
    fn read(&mut self, _bytes: &mut [u8]) -> io::Result<usize> {
        Ok(0)
    }
}

impl Write for Nowhere {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn stream() -> Channel {
    let mut bytes = [hello(0), sync()].concat();
    for device in 1..=DEVICES {
        bytes.extend(packet(device, 0, b"state"));
        bytes.extend(config_packet(device, 1, b"config"));
    }
    Channel::from_reader(Cursor::new(bytes))
}

fn settings() -> Settings {
    let mut settings = Settings::default();
    settings.budget = Some(9 << 20);
    settings
}

fn relay() {
    let relay = Relay::builder().settings(settings()).start().unwrap();
    relay
        .add_channel(stream(), Channel::from_stream(Nowhere, || {}))
        .unwrap();
    relay.join().result.unwrap();
}

fn load() {
    let mut builder = LoadSession::builder().settings(settings());
    for device in 1..=DEVICES {
        builder = builder.device(self::device(device));
    }
    let session = builder.channel(stream()).start().unwrap();
    session.no_more_channels();
    session.switchover_start();
    session.join().result.unwrap();
}

/// What this process has of the machine's memory, in KiB.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let value = line.unwrap().split_whitespace().nth(1).unwrap();
    value.parse().unwrap()
}

#[test]
fn a_migration_leaves_no_memory_behind() {
    let _watchdog = Watchdog::new();
    for (name, run) in [("relay", relay as fn()), ("load", load)] {
        // In a thread of its own, and so in one arena of the allocator's.
        let grown = thread::spawn(move || {
            (0..WARM).for_each(|_| run());
            let before = resident();
            (0..RUNS).for_each(|_| run());
            resident().saturating_sub(before)
        });
        let grown = grown.join().unwrap();
        assert!(grown < SLACK_KIB, "{name}: {grown} KiB more");
        println!("{name}: {grown} KiB more");
    }
}
