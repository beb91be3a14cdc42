//! Many migrations, one after the other, cost no more memory than a few.
#![allow(missing_docs, reason = "a test")]

mod common;

use std::{
    fs,
    io::{self, Cursor, Read, Write},
    os::fd::{BorrowedFd, OwnedFd},
    thread,
};

use common::{Watchdog, config_packet, hello, id, packet, sync};
use vfio_migration::{
    Channel, Device, DeviceState, LoadSession, MigrationDevice, MigrationFlags, PrecopyInfo, Relay,
    Settings,
};

const DEVICES: u32 = 4;
/// Runs before the first look, and between the two.
const WARM: usize = 50;
const RUNS: usize = 200;
/// A device's slots alone are 40 KiB: with one that stays behind a run's growth would be 8 MiB.
const SLACK_KIB: u64 = 4 << 10;

/// A device whose state nobody keeps.
struct Sink(DeviceState);

impl MigrationDevice for Sink {
    fn flags(&self) -> io::Result<MigrationFlags> {
        Ok(MigrationFlags::STOP_COPY)
    }

    fn state(&self) -> io::Result<DeviceState> {
        Ok(self.0)
    }

    fn set_state(&mut self, new: DeviceState) -> io::Result<Option<OwnedFd>> {
        self.0 = new;
        if new != DeviceState::Resuming {
            return Ok(None);
        }
        let file = fs::File::options().write(true).open("/dev/null")?;
        Ok(Some(file.into()))
    }

    fn reset(&mut self) -> io::Result<()> {
        self.0 = DeviceState::Running;
        Ok(())
    }

    fn data_size(&self) -> io::Result<u64> {
        Ok(1)
    }

    fn precopy_info(&self, _fd: BorrowedFd<'_>) -> io::Result<PrecopyInfo> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn load_config(&mut self, reader: &mut dyn Read) -> io::Result<()> {
        io::copy(reader, &mut io::sink()).map(|_len| ())
    }
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
    let relay = Relay::start(&settings()).unwrap();
    relay
        .add_channel(stream(), Channel::from_stream(Nowhere, || {}))
        .unwrap();
    relay.join().result.unwrap();
}

fn load() {
    let mut builder = LoadSession::builder().settings(settings());
    for device in 1..=DEVICES {
        let sink = Box::new(Sink(DeviceState::Stop));
        builder = builder.device(Device::new(id(device), sink).unwrap());
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
