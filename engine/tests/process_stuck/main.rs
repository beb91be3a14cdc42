//! A driver that never gives a transfer back costs the grace time, an error that names the device,
//! and what the kernel holds; and nobody else anything.
//!
//! The I/O thread is a FUSE file that holds its WRITE: what a cancellation cannot reach, on the kernel's
//! ring as on the blocking one. Mounting needs root and `/dev/fuse`; without them the test says so,
//! and an operation of the simulated ring that sticks (`process_cancel.rs`) stands for it.
//!
//! Alone in its process, whose threads and files it counts.
#![cfg(feature = "sim")]
#![allow(missing_docs, reason = "a test")]

mod fuse;

#[path = "../support/leftovers.rs"]
mod leftovers;
#[path = "../support/mock.rs"]
mod mock;
#[path = "../support/names.rs"]
mod names;
#[path = "../support/packets.rs"]
mod packets;
#[path = "../support/pipes.rs"]
mod pipes;
#[path = "../support/watchdog.rs"]
mod watchdog;

use std::{
    fs::OpenOptions,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    thread,
    time::{Duration, Instant},
};

use vfio_migration::{Backend, DeviceState, ErrorKind, LoadSession, Settings, Writer};

use crate::{
    fuse::Held,
    leftovers::leftovers,
    mock::Mock,
    names::id,
    packets::{config_packet, hello, packet},
    pipes::collect,
    watchdog::Watchdog,
};

/// How the session is ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum End {
    Cancel,
    Cleanup,
    Drop,
    /// Nobody does: nothing has moved for too long.
    Stall,
}

#[test]
fn a_driver_that_holds_its_write_is_left_behind_and_harms_nobody() {
    let _watchdog = Watchdog::new();
    if let Err(error) = Held::mount(0) {
        // Loud: this is where the machine decides what was tested.
        let text = format!(
            "NOT TESTED HERE: no FUSE file ({error}); the simulated ring's stuck operation is, by \
             process_cancel.rs\n"
        );
        io::stderr().write_all(text.as_bytes()).unwrap();
        return;
    }
    for backend in [Backend::Uring, Backend::Blocking] {
        for end in [End::Cancel, End::Cleanup, End::Drop, End::Stall] {
            for writer in [Writer::Ring, Writer::Auto] {
                held(backend, end, writer);
            }
        }
    }
}

/// With [`Writer::Auto`] the write that is held is a channel's.
fn held(backend: Backend, end: End, writer: Writer) {
    let case = format!("{backend}, {end:?}, {writer:?}");
    let by_channel = writer == Writer::Auto;
    let before = leftovers();
    let driver = Held::mount(by_channel.into()).unwrap();
    let file = OpenOptions::new().write(true).open(driver.file()).unwrap();
    let mounted = leftovers();
    let mut settings = Settings::default();
    settings.backend = backend;
    settings.writer = writer;
    settings.channels = 2;
    settings.grace = Duration::from_millis(200);
    if end == End::Stall {
        settings.no_progress = Duration::from_millis(500);
    }
    let (other, to_other) = io::pipe().unwrap();
    let got = collect(other);
    let channels = [(); 2].map(|()| UnixStream::pair().unwrap());
    let [(mut near, far), (mut other_near, other_far)] = channels;
    let load = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(file).device(1))
        .device(Mock::new(to_other).device(2))
        .channel(far)
        .channel(other_far)
        .start()
        .unwrap();
    load.switchover_start();
    near.write_all(&hello(0)).unwrap();
    if by_channel {
        // The ring writes the first, and lends.
        near.write_all(&packet(1, 0, b"quick")).unwrap();
        while load.stats().devices[0].transfers.count == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_millis(50));
    }
    let index = by_channel.into();
    near.write_all(&packet(1, index, b"held")).unwrap();
    driver.wait_until_it_holds();
    // The I/O thread goes on, and so does the other channel: another device is loaded to its end meanwhile.
    let rest = [
        hello(1),
        packet(2, 0, b"unharmed"),
        config_packet(2, 1, b"c"),
    ];
    other_near.write_all(&rest.concat()).unwrap();
    while load.stats().devices[1].phases.resume.is_zero() {
        thread::sleep(Duration::from_millis(1));
    }

    let began = Instant::now();
    let report = match end {
        End::Cancel => {
            load.cancel();
            load.cancel();
            Some(load.join())
        }
        End::Cleanup => Some(load.cleanup()),
        End::Drop => {
            drop(load);
            None
        }
        End::Stall => Some(load.join()),
    };
    // The grace time, for the I/O thread and for whoever waits for it, and what a machine under load
    // adds; the write is held for as long as this test likes.
    assert!(began.elapsed() < Duration::from_secs(30), "{case}");
    if let Some(mut report) = report {
        let error = report.devices[0].result.as_ref().unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::Stuck, "{case}: {error:?}");
        assert_eq!((error.device(), error.index()), (Some(&id(1)), Some(index)));
        if by_channel {
            assert_eq!(
                report.stats.devices[0].entries, 1,
                "{case}: not a channel's write"
            );
        }
        assert!(report.devices[0].device.is_none(), "it must not be touched");
        assert_eq!(report.stats.leaked_transfers, 1, "{case}");
        assert_eq!(report.abandoned_threads, 1, "{case}");
        assert!(report.devices[1].result.is_ok(), "{case}");
        // The session has failed: what comes back is what went in.
        let other = report.devices.remove(1).device.unwrap();
        assert_eq!(other.state(), DeviceState::Running);
    }
    drop((near, other_near));
    assert_eq!(got.join().unwrap(), b"unharmed", "{case}");
    assert!(driver.holds(), "{case}: the write was never answered");
    // What is left is the one thread that the kernel holds (on the ring, one of its own besides) and
    // the one file; and what a worker of the blocking ring shares with its ring, two eventfds.
    let shared = match (by_channel, backend) {
        // A channel's thread has its socket, its file, and the session that it works for.
        (true, _) => 6,
        (false, Backend::Blocking) => 2,
        (false, _) => 0,
    };
    let most = (before.0 + 1, mounted.1 + shared);
    let now = settled(|now| now.0 <= most.0 && now.1 <= most.1);
    assert!(now.0 <= most.0, "{case}: {} threads", now.0 - before.0);
    assert!(now.1 <= most.1, "{case}: {} files", now.1 - mounted.1);

    a_session_works(backend);

    // The driver answers after all, which frees the thread. The file is leaked for good.
    driver.release();
    let now = settled(|(threads, _)| threads == before.0);
    assert_eq!(now.0, before.0, "{case}");
    drop(driver);
    let now = settled(|now| now == (before.0, before.1 + 1));
    assert_eq!(now, (before.0, before.1 + 1), "{case}");
}

/// Waits until the counts are right, but not for ever.
fn settled(right: impl Fn((usize, usize)) -> bool) -> (usize, usize) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !right(leftovers()) && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
    leftovers()
}

/// A new session in the same process, while the kernel holds what it holds.
fn a_session_works(backend: Backend) {
    let (mut reader, writer) = io::pipe().unwrap();
    let (mut near, far) = UnixStream::pair().unwrap();
    let mut settings = Settings::default();
    settings.backend = backend;
    let mock = Mock::new(writer);
    let log = mock.log.clone();
    let load = LoadSession::builder()
        .settings(settings)
        .device(mock.device(1))
        .channel(far)
        .start()
        .unwrap();
    load.switchover_start();
    let bytes = [hello(0), packet(1, 0, b"x"), config_packet(1, 1, b"c")].concat();
    near.write_all(&bytes).unwrap();
    drop(near);
    let report = load.join();
    report.result.unwrap();
    drop(report.devices);
    let mut got = Vec::new();
    reader.read_to_end(&mut got).unwrap();
    assert_eq!(
        (&got[..], &log.lock().unwrap().config[..]),
        (&b"x"[..], &b"c"[..])
    );
}
