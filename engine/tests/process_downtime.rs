//! What a save costs beside its bytes while the VM stands: memory and ring are there before where the
//! caller gives the chance, and a packet leaves when its own read has ended.
//!
//! Alone in its process, whose memory and threads it looks at.
#![cfg(feature = "sim")]
#![allow(missing_docs, reason = "a test")]

#[path = "support/barrier.rs"]
mod barrier;
#[path = "support/mock.rs"]
mod mock;
#[path = "support/names.rs"]
mod names;
#[path = "support/watchdog.rs"]
mod watchdog;

use std::{
    fs, io,
    io::{Read, Write},
    os::unix::net::UnixStream,
    sync::{Mutex, PoisonError},
    thread,
    time::Duration,
};

use vfio_migration::{
    Backend, DeviceState, SaveBuilder, SaveSession, Settings, Stats,
    wire::{DEVICE_PACKET_LEN, HELLO_LEN, PACKET_HEADER_LEN},
};

use crate::{barrier::sync, mock::Mock, watchdog::Watchdog};

const PACKET: usize = 4096;

/// One test at a time: they look at their process.
static ALONE: Mutex<()> = Mutex::new(());

fn settings(backend: Backend) -> Settings {
    let mut settings = Settings::default();
    settings.backend = backend;
    settings.data_len = Some(PACKET);
    settings
}

/// Reads past what a channel begins with.
fn read_greeting(channel: &mut impl Read) {
    let mut greeting = vec![0; HELLO_LEN + sync().len()];
    channel.read_exact(&mut greeting).unwrap();
}

/// A packet's headers and data.
fn read_packet(channel: &mut impl Read) -> Vec<u8> {
    let mut packet = vec![0; DEVICE_PACKET_LEN + PACKET];
    channel.read_exact(&mut packet).unwrap();
    packet.split_off(DEVICE_PACKET_LEN)
}

#[test]
fn a_packet_leaves_when_its_own_read_has_ended() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let _watchdog = Watchdog::new();
    for backend in [Backend::Uring, Backend::Blocking] {
        let (data, mut driver) = io::pipe().unwrap();
        let (near, mut far) = UnixStream::pair().unwrap();
        driver.write_all(&[1; PACKET]).unwrap();
        let save = SaveSession::builder()
            .settings(settings(backend))
            .device(Mock::new(data).device(1))
            .channel(near)
            .start()
            .unwrap();
        read_greeting(&mut far);
        // The next read of its chain waits in the driver: for as long as this test likes.
        assert!(read_packet(&mut far) == [1; PACKET], "{backend}");
        while save.stats().devices[0].packets == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        assert!(!save.stats().devices[0].phases.first_out.is_zero());
        // And what had left by itself does not leave again.
        driver.write_all(&[2; PACKET]).unwrap();
        driver.write_all(&[3; PACKET]).unwrap();
        drop(driver);
        for byte in [2, 3] {
            assert!(read_packet(&mut far) == [byte; PACKET], "{backend}");
        }
        let rest = thread::spawn(move || far.read_to_end(&mut Vec::new()).unwrap());
        let report = save.join();
        report.result.as_ref().unwrap();
        assert_eq!(report.stats.devices[0].packets, 4, "{backend}");
        assert!(report.stats.devices[0].bytes > (3 * (PACKET + PACKET_HEADER_LEN)) as u64);
        drop(report);
        rest.join().unwrap();
    }
}

/// The process's memory, in KiB.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap()
}

fn rings() -> usize {
    let fds = fs::read_dir("/proc/self/fd").unwrap();
    let targets = fds.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
    targets
        .filter(|at| at.to_string_lossy().contains("io_uring"))
        .count()
}

/// Runs a save of one device with three packets to its end.
fn run(builder: SaveBuilder) -> (Stats, u64, usize) {
    let (data, mut driver) = io::pipe().unwrap();
    let (near, mut far) = UnixStream::pair().unwrap();
    driver.write_all(&[7; 3 * PACKET]).unwrap();
    drop(driver);
    let save = builder.device(Mock::new(data).device(1)).channel(near);
    let save = save.start().unwrap();
    let (resident, rings) = (resident(), rings());
    let rest = thread::spawn(move || far.read_to_end(&mut Vec::new()).unwrap());
    let report = save.join();
    report.result.as_ref().unwrap();
    assert_eq!(report.stats.devices[0].packets, 4);
    assert_eq!(
        report.devices[0].device.as_ref().unwrap().state(),
        DeviceState::StopCopy
    );
    let stats = report.stats.clone();
    drop(report);
    rest.join().unwrap();
    (stats, resident, rings)
}

#[test]
fn memory_and_ring_can_be_there_before_the_vm_stops() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let _watchdog = Watchdog::new();
    let budget = 256 << 20;
    let settings = || {
        let mut settings = settings(Backend::Auto);
        settings.budget = Some(budget);
        settings
    };
    let half = budget as u64 / 1024 / 2;

    // Without it: memory comes as it is used.
    let before = resident();
    let (_, after, rings_of_one) = run(SaveSession::builder().settings(settings()));
    assert!(after < before + half, "{before} {after}");

    // With it: all is there, and the start makes nothing more.
    let before = resident();
    let mut builder = SaveSession::builder().settings(settings());
    builder.prepare(1, PACKET).unwrap();
    let prepared = resident();
    assert!(prepared > before + half, "{before} {prepared}");
    let (stats, after, rings) = run(builder);
    assert!(after > before + half, "{before} {after}");
    assert!(after < prepared + half, "{prepared} {after}");
    assert_eq!(rings, rings_of_one);
    assert_eq!(stats.budget, budget as u64);

    // For other packets, or other settings: it is dropped, and the start makes its own.
    let mut builder = SaveSession::builder().settings(settings());
    builder.prepare(1, 16 * PACKET).unwrap();
    run(builder);
    let mut builder = SaveSession::builder().settings(settings());
    builder.prepare(1, PACKET).unwrap();
    builder.settings_mut().budget = Some(64 << 20);
    assert!(resident() < before + half);
    let (stats, ..) = run(builder);
    assert_eq!(stats.budget, 64 << 20);

    // What cannot be is said, and nothing is lost.
    let mut builder = SaveSession::builder().settings(settings());
    assert!(builder.prepare(0, PACKET).is_err());
    assert!(builder.prepare(1, 0).is_err());
    run(builder);
}
