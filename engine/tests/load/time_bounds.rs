//! What a peer can cost a destination of time: every wait for it has an end.
//!
//! Tested with short settings, and by what the error says; never by a clock.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    sync::mpsc,
    thread,
    time::Duration,
};

use vfio_migration::{
    Channel, DeviceState, ErrorKind, LoadSession, Phase, Report, SaveSession, Settings, Violation,
};

use crate::{
    mock::Mock,
    names::id,
    packets::{config_packet, hello, packet},
    pipes::collect,
    short::{load, missing, settings, stalled},
    watchdog::Watchdog,
};

/// One device, and one channel which this function feeds.
fn fed(settings: Settings, feed: impl FnOnce(&mut UnixStream) + Send + 'static) -> Report {
    let (reader, writer) = io::pipe().unwrap();
    drop(collect(reader));
    let (mut near, far) = UnixStream::pair().unwrap();
    let session = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(writer).device(1))
        .channel(far)
        .start()
        .unwrap();
    let feeding = thread::spawn(move || {
        feed(&mut near);
        near
    });
    // Not started: what the I/O thread would miss is not what ends it.
    let report = session.join();
    drop(feeding.join().unwrap());
    report
}

/// A byte at a time, until the other side hangs up.
fn drip(socket: &mut UnixStream, bytes: &[u8]) {
    for byte in bytes {
        if socket.write_all(&[*byte]).is_err() {
            return;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_hello_that_drips_ends() {
    let _watchdog = Watchdog::new();
    let mut settings = settings();
    settings.hello_timeout = Duration::from_millis(300);
    settings.no_progress = Duration::from_secs(40);
    let report = fed(settings, |socket| {
        drip(socket, &[hello(0), vec![0; 4000]].concat());
    });
    let error = stalled(&report);
    assert_eq!((error.phase(), error.channel()), (Phase::Receive, Some(0)));
    assert_eq!(missing(error), "its hello has not come");
}

#[test]
fn a_header_that_drips_ends() {
    let _watchdog = Watchdog::new();
    let mut settings = settings();
    settings.no_progress = Duration::from_secs(40);
    let report = fed(settings, |socket| {
        socket.write_all(&hello(0)).unwrap();
        drip(socket, &packet(1, 0, &[7; 4000]));
    });
    let error = stalled(&report);
    assert_eq!((error.phase(), error.channel()), (Phase::Receive, Some(0)));
    assert_eq!(missing(error), "the rest of the packet has not come");
}

#[test]
fn data_that_drips_ends_and_names_its_packet() {
    let _watchdog = Watchdog::new();
    let mut settings = settings();
    settings.no_progress = Duration::from_secs(40);
    let report = fed(settings, |socket| {
        let packet = packet(1, 5, &[7; 4000]);
        socket.write_all(&hello(0)).unwrap();
        socket.write_all(&packet[..1000]).unwrap();
        drip(socket, &packet[1000..]);
    });
    let error = stalled(&report);
    assert_eq!((error.phase(), error.channel()), (Phase::Receive, Some(0)));
    assert_eq!((error.device(), error.index()), (Some(&id(1)), Some(5)));
    assert_eq!(missing(error), "the rest of the packet has not come");
}

#[test]
fn a_packet_that_stops_in_the_middle_ends() {
    let _watchdog = Watchdog::new();
    let mut settings = settings();
    settings.packet_timeout = Duration::from_secs(40);
    let report = fed(settings, |socket| {
        socket.write_all(&hello(0)).unwrap();
        socket.write_all(&packet(1, 5, &[7; 4000])[..1000]).unwrap();
    });
    let error = stalled(&report);
    assert_eq!((error.device(), error.index()), (Some(&id(1)), Some(5)));
}

#[test]
fn between_packets_a_channel_may_be_silent() {
    let _watchdog = Watchdog::new();
    let mut settings = settings();
    settings.packet_timeout = Duration::from_millis(100);
    settings.no_progress = Duration::from_millis(300);
    let (reader, writer) = io::pipe().unwrap();
    drop(collect(reader));
    let (mut near, far) = UnixStream::pair().unwrap();
    let session = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(writer).device(1))
        .channel(far)
        .start()
        .unwrap();
    near.write_all(&hello(0)).unwrap();
    for index in 0..3 {
        // Before the switchover a source may have nothing to send for as long as it likes.
        thread::sleep(Duration::from_millis(400));
        near.write_all(&packet(1, index, b"x")).unwrap();
    }
    assert!(session.failure().is_none());
    session.switchover_start();
    near.write_all(&config_packet(1, 3, b"config")).unwrap();
    drop(near);
    session.join().result.unwrap();
}

#[test]
fn a_notice_that_never_comes_ends_its_device() {
    let _watchdog = Watchdog::new();
    let mut settings = settings();
    settings.config_after_iterables = true;
    let bytes = [hello(0), packet(1, 0, b"x"), config_packet(1, 1, b"config")].concat();
    let report = load(settings, 1, vec![bytes]);
    let error = stalled(&report);
    assert_eq!(
        (error.phase(), error.device()),
        (Phase::Config, Some(&id(1)))
    );
    assert_eq!(
        missing(error),
        "the notice that its config may be loaded has not come"
    );
    let device = report.devices.into_iter().next().unwrap().device.unwrap();
    assert_eq!(device.state(), DeviceState::Running, "it was put back");
}

/// A source that is gone while one of its channels waits for room: that one is not read from, and its
/// end cannot be seen. Runs with what the other channel brings before it ends.
fn gone_while_a_channel_waits(no_progress: Duration, other: &[u8]) -> Report {
    let mut settings = settings();
    settings.no_progress = no_progress;
    settings.hello_timeout = Duration::from_secs(40);
    settings.packet_timeout = Duration::from_secs(40);
    // A reserve for the next packet, and nothing else.
    settings.budget = Some(4096);
    let (reader, writer) = io::pipe().unwrap();
    drop(collect(reader));
    let (mut waits, waits_far) = UnixStream::pair().unwrap();
    let (mut ends, ends_far) = UnixStream::pair().unwrap();
    let session = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(writer).device(1))
        .channel(waits_far)
        .channel(ends_far)
        .start()
        .unwrap();
    session.switchover_start();
    let far_ahead = [hello(0), packet(1, 2, &[7; 3000])].concat();
    waits.write_all(&far_ahead).unwrap();
    drop(waits);
    ends.write_all(&[hello(1), packet(1, 0, b"x")].concat())
        .unwrap();
    // Under the watchdog. The one is in the device, the other has been met.
    while session.stats().devices[0].bytes < 13 || session.stats().channels[0].packets < 1 {
        thread::sleep(Duration::from_millis(1));
    }
    ends.write_all(other).unwrap();
    drop(ends);
    session.join()
}

#[test]
fn a_source_that_is_gone_is_found_at_once_by_what_it_cut_off() {
    let _watchdog = Watchdog::new();
    let cut = &packet(1, 1, b"x")[..200];
    let report = gone_while_a_channel_waits(Duration::from_secs(3600), cut);
    let error = report.result.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Protocol(Violation::Truncated));
    assert_eq!(error.channel(), Some(1));
}

#[test]
fn a_source_that_is_gone_between_two_packets_is_found_by_the_time() {
    let _watchdog = Watchdog::new();
    let report = gone_while_a_channel_waits(Duration::from_millis(500), b"");
    let error = stalled(&report);
    assert_eq!((error.device(), error.index()), (Some(&id(1)), Some(1)));
}

#[test]
fn a_channel_that_never_comes_is_told_of() {
    let _watchdog = Watchdog::new();
    let mut settings = settings();
    settings.channels = 3;
    let one = [hello(0), packet(1, 0, b"x"), packet(1, 2, b"x")].concat();
    let report = load(settings.clone(), 1, vec![one]);
    let error = stalled(&report);
    assert_eq!((error.device(), error.index()), (Some(&id(1)), Some(1)));
    assert_eq!(
        missing(error),
        "this packet has not come, nor have 2 of the channels"
    );
    // Where nothing is missing they need not come.
    let (reader, writer) = io::pipe().unwrap();
    drop(collect(reader));
    let (mut near, far) = UnixStream::pair().unwrap();
    let session = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(writer).device(1))
        .channel(far)
        .start()
        .unwrap();
    session.switchover_start();
    let whole = [hello(0), packet(1, 0, b"x"), config_packet(1, 1, b"config")].concat();
    near.write_all(&whole).unwrap();
    drop(near);
    session.join().result.unwrap();
}

#[test]
fn a_channel_that_does_not_end_is_named() {
    let _watchdog = Watchdog::new();
    let whole = [hello(1), packet(1, 0, b"x"), config_packet(1, 1, b"config")].concat();
    let (reader, writer) = io::pipe().unwrap();
    drop(collect(reader));
    let (mut near, far) = UnixStream::pair().unwrap();
    let (_open, silent) = UnixStream::pair().unwrap();
    let mut settings = settings();
    settings.hello_timeout = Duration::from_secs(40);
    let session = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(writer).device(1))
        .channel(far)
        .channel(silent)
        .start()
        .unwrap();
    session.switchover_start();
    near.write_all(&whole).unwrap();
    drop(near);
    let report = session.join();
    let error = stalled(&report);
    assert_eq!((error.phase(), error.channel()), (Phase::Receive, Some(1)));
    assert_eq!(missing(error), "the channel has not ended");
    assert!(report.devices[0].result.is_ok());
}

#[test]
fn a_device_that_does_not_change_its_state_is_named() {
    let _watchdog = Watchdog::new();
    let (_reader, writer) = io::pipe().unwrap();
    let (_second, other) = io::pipe().unwrap();
    let (release, released) = mpsc::channel::<()>();
    let mut slow = Mock::new(other);
    slow.set = Some(Box::new(move |_state| {
        let _released = released.recv_timeout(Duration::from_secs(2));
        Ok(())
    }));
    let mut settings = settings();
    settings.grace = Duration::from_millis(100);
    let started = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(writer).device(1))
        .device(slow.device(2))
        .start();
    let error = started.unwrap_err().error;
    drop(release);
    assert_eq!(*error.kind(), ErrorKind::Stalled);
    assert_eq!(
        (error.phase(), error.device()),
        (Phase::Setup, Some(&id(2)))
    );
}

#[test]
fn a_device_that_was_not_started_holds_nobody_up() {
    let _watchdog = Watchdog::new();
    let pipe = || {
        let (reader, writer) = io::pipe().unwrap();
        drop(collect(reader));
        writer
    };
    let (mut near, far) = UnixStream::pair().unwrap();
    let mut settings = settings();
    settings.max_devices = Some(2);
    let session = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(pipe()).device(1))
        .channel(far)
        .start()
        .unwrap();
    session.switchover_start();
    // Plugged in since, and never told to start: that is no reason for the first to wait for ever.
    session.add_device(Mock::new(pipe()).device(2)).unwrap();
    near.write_all(&[hello(0), packet(1, 1, b"x")].concat())
        .unwrap();
    let report = session.join();
    let error = stalled(&report);
    assert_eq!((error.device(), error.index()), (Some(&id(1)), Some(0)));
}

#[test]
fn a_source_whose_peer_takes_nothing_ends() {
    let _watchdog = Watchdog::new();
    let (reader, mut writer) = io::pipe().unwrap();
    let feeding = thread::spawn(move || {
        // Until the save gives up.
        while writer.write_all(&[7; 1 << 16]).is_ok() {}
    });
    let (near, _far) = UnixStream::pair().unwrap();
    let mut settings = settings();
    settings.data_len = Some(64 << 10);
    let session = SaveSession::builder()
        .settings(settings)
        .device(Mock::new(reader).device(1))
        .channel(near)
        .start()
        .unwrap();
    let report = session.join();
    let error = stalled(&report);
    assert!(
        error.channel() == Some(0) || error.device() == Some(&id(1)),
        "{error}"
    );
    drop(report);
    feeding.join().unwrap();
}

#[test]
fn a_reader_of_the_embedders_that_drips_ends() {
    let _watchdog = Watchdog::new();
    /// A byte a read, and none of them late.
    struct Drip(Vec<u8>, usize);
    impl Read for Drip {
        fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
            thread::sleep(Duration::from_millis(if self.1 < 64 { 0 } else { 20 }));
            let Some(byte) = self.0.get(self.1) else {
                return Ok(0);
            };
            bytes[0] = *byte;
            self.1 += 1;
            Ok(1)
        }
    }
    let (_reader, writer) = io::pipe().unwrap();
    let bytes = [hello(0), packet(1, 0, &[7; 4000])].concat();
    let mut settings = settings();
    settings.no_progress = Duration::from_secs(40);
    let session = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(writer).device(1))
        .channel(Channel::from_reader(Drip(bytes, 0)))
        .start()
        .unwrap();
    let report = session.join();
    assert_eq!(stalled(&report).channel(), Some(0));
}
