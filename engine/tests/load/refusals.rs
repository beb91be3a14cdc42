//! Every packet that must be refused is, by an error that names device, channel and idx; what was
//! accepted before reaches its device, other devices are untouched, and the process goes on.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    thread,
};

use vfio_migration::{
    DeviceId, Error, ErrorKind, LoadSession, Phase, Report, Settings, Violation,
    wire::{self, DEVICE_PACKET_LEN, wrap_config},
};

use crate::{
    barrier::sync,
    mock::Mock,
    names::id,
    packets::{config_packet, hello, packet},
    payload::payload,
    pipes::collect,
    watchdog::Watchdog,
};

const GOOD: &[u8] = b"accepted before";

/// Loads two devices, 1 and 2, from what one channel brings. Returns the report, and the bytes that
/// each device got.
fn load(bytes: Vec<u8>, mut settings: Settings) -> (Report, [Vec<u8>; 2]) {
    // Little memory, made quickly.
    settings.budget = Some(256 << 10);
    let (first, to_first) = io::pipe().unwrap();
    let (second, to_second) = io::pipe().unwrap();
    let got = [collect(first), collect(second)];
    let (mut near, far) = UnixStream::pair().unwrap();
    let session = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(to_first).device(1))
        .device(Mock::new(to_second).device(2))
        .not_multifd(id(3))
        .channel(far)
        .start()
        .unwrap();
    session.switchover_start();
    let writing = thread::spawn(move || {
        // The other side may hang up in the middle.
        let _refused = near.write_all(&bytes);
    });
    let report = session.join();
    writing.join().unwrap();
    let mut report = report;
    // The devices' ends of the pipes close with them.
    for device in &mut report.devices {
        device.device = None;
    }
    (report, got.map(|got| got.join().unwrap()))
}

/// What follows the good beginning is refused with this error.
fn refused(bytes: &[u8], device: Option<u32>, index: Option<u32>) -> Violation {
    let _watchdog = Watchdog::new();
    let mut stream = hello(0);
    stream.extend(sync());
    stream.extend(packet(1, 0, GOOD));
    stream.extend(packet(2, 0, GOOD));
    stream.extend(bytes);
    let (report, got) = load(stream, Settings::default());
    let error = report.result.unwrap_err();
    assert_eq!(error.phase(), Phase::Receive, "{error}");
    assert_eq!(error.channel(), Some(0), "{error}");
    assert_eq!(error.device(), device.map(id).as_ref(), "{error}");
    assert_eq!(error.index(), index, "{error}");
    assert!(!error.is_cancelled());
    for got in got {
        assert!(GOOD.starts_with(&got), "nothing but what was accepted");
    }
    let ErrorKind::Protocol(violation) = error.kind() else {
        panic!("{error:?}");
    };
    violation.clone()
}

/// A good packet of device 1 with one of its bytes changed.
fn changed(at: usize, to: u8) -> Vec<u8> {
    let mut bytes = packet(1, 1, b"data");
    bytes[at] = to;
    bytes
}

#[test]
fn packets_that_break_a_rule_of_the_framing() {
    assert!(matches!(
        refused(&changed(0, 0x51), None, None),
        Violation::Magic(_)
    ));
    assert_eq!(refused(&changed(7, 2), None, None), Violation::Version(2));
    assert!(matches!(
        refused(&changed(11, 0x41), None, None),
        Violation::Flags(0x41)
    ));
    assert!(matches!(
        refused(&changed(10, 0x80), None, None),
        Violation::Flags(_)
    ));
    assert!(matches!(
        refused(&changed(11, 0x44), None, None),
        Violation::Compressed(_)
    ));
    assert_eq!(
        refused(&changed(12 + 255, b'x'), None, None),
        Violation::Idstr
    );
    let mut empty = packet(1, 1, b"");
    empty[272..276].fill(0);
    assert_eq!(refused(&empty, Some(1), None), Violation::EmptyPacket);
    let mut short = packet(1, 1, b"");
    short[272..276].copy_from_slice(&11_u32.to_be_bytes());
    assert_eq!(
        refused(&short, Some(1), None),
        Violation::PacketTooShort(11)
    );
    let max = wire::DEFAULT_MAX_PACKET;
    for len in [max + 1, u32::MAX] {
        let mut large = packet(1, 1, b"");
        large[272..276].copy_from_slice(&len.to_be_bytes());
        let refusal = refused(&large, Some(1), None);
        assert_eq!(refusal, Violation::PacketTooLarge { len, max });
    }
    let ram = [
        wire::Kind::Ram { flags: 0 }.encode().to_vec(),
        vec![0; 1344 - 12],
    ]
    .concat();
    assert_eq!(refused(&ram, None, None), Violation::RamPacket);
}

#[test]
fn packets_that_break_a_rule_of_their_header() {
    assert_eq!(
        refused(&changed(279, 1), Some(1), None),
        Violation::PacketVersion(1)
    );
    assert_eq!(
        refused(&changed(287, 2), Some(1), Some(1)),
        Violation::PacketFlags(2)
    );
    let mut last = packet(1, 1, b"");
    last[280..284].fill(0xff);
    assert_eq!(refused(&last, Some(1), None), Violation::InvalidIndex);
}

#[test]
fn packets_for_nobody_here() {
    let unknown = |index| Violation::UnknownDevice {
        idstr: id(index).idstr().to_owned(),
        instance: 0,
    };
    assert_eq!(refused(&packet(9, 4, b"x"), None, Some(4)), unknown(9));
    let mut instance = packet(1, 4, b"x");
    instance[271] = 7;
    assert!(matches!(
        refused(&instance, None, Some(4)),
        Violation::UnknownDevice { instance: 7, .. }
    ));
    assert_eq!(
        refused(&packet(3, 4, b"x"), Some(3), Some(4)),
        Violation::MultifdNotInUse
    );
}

#[test]
fn packets_out_of_place() {
    let twice = [packet(1, 5, b"x"), packet(1, 5, b"y")].concat();
    assert_eq!(refused(&twice, Some(1), Some(5)), Violation::DuplicateIndex);
    let above = [config_packet(1, 5, b"c"), packet(1, 6, b"x")].concat();
    assert_eq!(
        refused(&above, Some(1), Some(6)),
        Violation::IndexAboveConfig { config: 5 }
    );
    let below = [packet(1, 6, b"x"), config_packet(1, 5, b"c")].concat();
    assert_eq!(
        refused(&below, Some(1), Some(5)),
        Violation::ConfigBelowIndex { highest: 6 }
    );
    let second = [config_packet(1, 5, b"c"), config_packet(1, 7, b"c")].concat();
    assert_eq!(
        refused(&second, Some(1), Some(7)),
        Violation::SecondConfig { first: 5 }
    );
    let with_data = [config_packet(1, 5, b"c"), packet(1, 5, b"x")].concat();
    assert_eq!(
        refused(&with_data, Some(1), Some(5)),
        Violation::DuplicateIndex
    );
}

#[test]
fn an_idx_that_has_been_written() {
    let _watchdog = Watchdog::new();
    let (mut reader, writer) = io::pipe().unwrap();
    let session = LoadSession::builder()
        .device(Mock::new(writer).device(1))
        .start()
        .unwrap();
    session.switchover_start();
    let mut publisher = session.publisher();
    publisher.push(&id(1), &payload(0, false, b"x")).unwrap();
    reader.read_exact(&mut [0]).unwrap();
    let error = publisher
        .push(&id(1), &payload(0, false, b"y"))
        .unwrap_err();
    let written = ErrorKind::Protocol(Violation::IndexAlreadyWritten);
    assert_eq!(*error.kind(), written);
    assert_eq!((error.device(), error.index()), (Some(&id(1)), Some(0)));
    assert_eq!(*session.failure().unwrap().kind(), written);
}

#[test]
fn what_is_pushed_is_checked_as_what_is_received() {
    let _watchdog = Watchdog::new();
    let push = |device: &DeviceId, payload: &[u8]| -> Error {
        let (_reader, writer) = io::pipe().unwrap();
        let session = LoadSession::builder()
            .device(Mock::new(writer).device(1))
            .not_multifd(id(3))
            .start()
            .unwrap();
        let mut publisher = session.publisher();
        let error = publisher.push(device, payload).unwrap_err();
        assert_eq!(session.failure().unwrap().kind(), error.kind());
        error
    };
    let violation = |device: u32, payload: &[u8]| match push(&id(device), payload).kind() {
        ErrorKind::Protocol(violation) => violation.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(violation(1, &[0; 11]), Violation::PacketTooShort(11));
    let mut version = payload(0, false, b"");
    version[3] = 1;
    assert_eq!(violation(1, &version), Violation::PacketVersion(1));
    let mut flags = payload(0, false, b"");
    flags[11] = 4;
    assert_eq!(violation(1, &flags), Violation::PacketFlags(4));
    let mut index = payload(0, false, b"");
    index[4..8].fill(0xff);
    assert_eq!(violation(1, &index), Violation::InvalidIndex);
    assert_eq!(
        violation(3, &payload(0, false, b"")),
        Violation::MultifdNotInUse
    );
    assert!(matches!(
        violation(2, &payload(0, false, b"")),
        Violation::UnknownDevice { .. }
    ));
    let large = vec![0; wire::DEFAULT_MAX_PACKET as usize];
    assert!(matches!(
        violation(1, &payload(0, false, &large)),
        Violation::PacketTooLarge { .. }
    ));
}

#[test]
fn hellos_of_another_vm_or_channel() {
    let _watchdog = Watchdog::new();
    let refused = |bytes: Vec<u8>| {
        let (report, _) = load(bytes, Settings::default());
        let error = report.result.unwrap_err();
        assert_eq!(error.channel(), Some(0));
        match error.kind() {
            ErrorKind::Protocol(violation) => violation.clone(),
            other => panic!("{other:?}"),
        }
    };
    let changed = |at: usize, to: u8| {
        let mut bytes = hello(0);
        bytes[at] = to;
        bytes
    };
    assert!(matches!(refused(changed(1, 0)), Violation::Magic(_)));
    assert_eq!(refused(changed(7, 9)), Violation::Version(9));
    assert_eq!(refused(changed(8, 1)), Violation::Uuid);
    assert_eq!(
        refused(hello(1)),
        Violation::ChannelId { id: 1, channels: 1 }
    );
    assert_eq!(refused(hello(0)[..63].to_vec()), Violation::Truncated);

    let (_reader, writer) = io::pipe().unwrap();
    let pairs = [(); 2].map(|()| UnixStream::pair().unwrap());
    let mut session = LoadSession::builder().device(Mock::new(writer).device(1));
    let mut sources = Vec::new();
    for (mut near, far) in pairs {
        near.write_all(&hello(0)).unwrap();
        sources.push(near);
        session = session.channel(far);
    }
    let error = session.start().unwrap().join().result.unwrap_err();
    assert_eq!(
        *error.kind(),
        ErrorKind::Protocol(Violation::ChannelIdTwice(0))
    );
}

#[test]
fn a_stream_that_is_cut_at_any_byte() {
    let _watchdog = Watchdog::new();
    let mut stream = hello(0);
    let start = stream.len();
    stream.extend(packet(1, 0, GOOD));
    let first = stream.len();
    stream.extend(config_packet(1, 1, b"config"));
    for cut in (start..stream.len())
        .step_by(7)
        .chain([start, first, first + DEVICE_PACKET_LEN])
    {
        let (report, [got, _]) = load(stream[..cut].to_vec(), Settings::default());
        let error = report.result.unwrap_err();
        if cut == start || cut == first {
            // Between packets: the first missing idx, of whichever device.
            assert_eq!(*error.kind(), ErrorKind::Missing, "{cut}: {error}");
            assert!(error.device().is_some());
            assert!(error.index().unwrap() <= 1);
        } else {
            assert_eq!(
                *error.kind(),
                ErrorKind::Protocol(Violation::Truncated),
                "{cut}"
            );
            // Within a packet's data it is known whose packet it is.
            let at = |begin: usize, index| (cut >= begin + DEVICE_PACKET_LEN).then_some(index);
            let index = if cut < first {
                at(start, 0)
            } else {
                at(first, 1)
            };
            let place = (error.device().cloned(), error.index());
            assert_eq!(place, (index.map(|_| id(1)), index), "{cut}");
        }
        assert!(GOOD.starts_with(&got));
    }
}

/// The error of device 1's config, which is this data.
fn config_error(data: &[u8], load: Option<fn(&mut dyn Read) -> io::Result<()>>) -> Error {
    let _watchdog = Watchdog::new();
    let (reader, writer) = io::pipe().unwrap();
    let got = collect(reader);
    let mut mock = Mock::new(writer);
    mock.load = load.map(|load| Box::new(load) as _);
    let log = mock.log.clone();
    let (mut near, far) = UnixStream::pair().unwrap();
    let session = LoadSession::builder()
        .device(mock.device(1))
        .channel(far)
        .start()
        .unwrap();
    session.switchover_start();
    let bytes = [hello(0), packet(1, 0, GOOD), raw_config_packet(1, 1, data)].concat();
    near.write_all(&bytes).unwrap();
    drop(near);
    let mut report = session.join();
    let error = report.devices[0].result.clone().unwrap_err();
    assert_eq!(error.device(), Some(&id(1)));
    assert_eq!(
        log.lock().unwrap().resets,
        1,
        "a device that is not whole is reset"
    );
    report.devices.clear();
    assert_eq!(got.join().unwrap(), GOOD);
    assert_eq!(report.result.unwrap_err().kind(), error.kind());
    error
}

#[test]
fn configs_that_are_not_framed_or_not_taken() {
    let framing = |data: &[u8]| {
        let error = config_error(data, None);
        let kind = error.kind().clone();
        assert!(
            matches!(kind, ErrorKind::Protocol(Violation::ConfigFraming(_))),
            "{kind:?}"
        );
    };
    framing(b"");
    framing(b"no tags here, but long enough");
    framing(&wrap_config(b"config")[..20]);
    framing(&wrap_config(b"config")[8..]);

    let error = config_error(
        &wrap_config(b"config"),
        Some(|reader| reader.read_exact(&mut [0; 2])),
    );
    assert_eq!(
        *error.kind(),
        ErrorKind::Protocol(Violation::ConfigTrailing(4))
    );
    let error = config_error(
        &wrap_config(b"config"),
        Some(|reader| reader.read_exact(&mut [0; 9])),
    );
    assert_eq!(*error.kind(), ErrorKind::Device);
    assert_eq!(error.phase(), Phase::Config);
    let error = config_error(
        &wrap_config(b"config"),
        Some(|_| Err(io::Error::from_raw_os_error(libc::EPROTO))),
    );
    assert_eq!(error.raw_os_error(), Some(libc::EPROTO));
    let error = config_error(&wrap_config(b"config"), Some(|_| panic!("as told")));
    assert_eq!(*error.kind(), ErrorKind::Panicked);
}

#[test]
fn an_input_that_ends_names_the_first_missing_idx() {
    let _watchdog = Watchdog::new();
    let whole = |device| [packet(device, 0, GOOD), config_packet(device, 1, b"config")].concat();
    for (bytes, device, index) in [
        ([packet(1, 0, GOOD), whole(2)].concat(), 1, 1),
        (
            [packet(1, 1, GOOD), config_packet(1, 2, b"c"), whole(2)].concat(),
            1,
            0,
        ),
        (
            [
                whole(1),
                packet(2, 0, b"x"),
                config_packet(2, 4, b"c"),
                packet(2, 2, b"x"),
            ]
            .concat(),
            2,
            1,
        ),
        (whole(1), 2, 0),
    ] {
        let (report, _) = load([hello(0), bytes].concat(), Settings::default());
        let error = report.result.unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::Missing);
        assert_eq!(error.device(), Some(&id(device)), "{error}");
        assert_eq!(error.index(), Some(index), "{error}");
    }
    let (report, got) = load([hello(0), whole(1), whole(2)].concat(), Settings::default());
    report.result.unwrap();
    assert_eq!(got, [GOOD, GOOD]);
}

#[test]
fn an_idx_too_far_ahead_waits_and_ends() {
    let _watchdog = Watchdog::new();
    let mut settings = Settings::default();
    settings.no_progress = std::time::Duration::from_millis(300);
    let (_reader, writer) = io::pipe().unwrap();
    let (mut near, far) = UnixStream::pair().unwrap();
    let session = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(writer).device(1))
        .channel(far)
        .start()
        .unwrap();
    session.switchover_start();
    near.write_all(&[hello(0), packet(1, 0xffff_fffe, b"x")].concat())
        .unwrap();
    let error = session.join().result.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Stalled);
    assert_eq!((error.device(), error.index()), (Some(&id(1)), Some(0)));
}

#[test]
fn a_packet_without_data_waits_for_the_window_too() {
    let _watchdog = Watchdog::new();
    let mut settings = Settings::default();
    settings.no_progress = std::time::Duration::from_millis(300);
    settings.window = 16;
    let (_reader, writer) = io::pipe().unwrap();
    let (mut near, far) = UnixStream::pair().unwrap();
    let session = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(writer).device(1))
        .channel(far)
        .start()
        .unwrap();
    let mut publisher = session.publisher();
    for (index, taken) in [(15, true), (16, false), (0xffff_fffe, false)] {
        let pushed = publisher.try_push(&id(1), &payload(index, false, b""));
        assert_eq!(pushed.unwrap(), taken, "idx {index}");
    }
    drop(publisher);
    session.switchover_start();
    near.write_all(&[hello(0), packet(1, 5000, b"")].concat())
        .unwrap();
    let report = session.join();
    let error = report.result.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Stalled);
    assert_eq!((error.device(), error.index()), (Some(&id(1)), Some(0)));
    // Only what is inside the window has a slot.
    assert_eq!(report.stats.devices[0].queued, 1);
}

#[test]
fn a_second_packet_that_ends_behind_its_device_is_refused() {
    let _watchdog = Watchdog::new();
    let (first, to_first) = io::pipe().unwrap();
    let (_second, to_second) = io::pipe().unwrap();
    let _got = collect(first);
    let (mut slow, far) = UnixStream::pair().unwrap();
    let (mut fast, other) = UnixStream::pair().unwrap();
    let mock = Mock::new(to_first);
    let log = mock.log.clone();
    let session = LoadSession::builder()
        .device(mock.device(1))
        .device(Mock::new(to_second).device(2))
        .channel(far)
        .channel(other)
        .start()
        .unwrap();
    // One channel announces a packet; the other brings the same, and all the rest of its device.
    let second = packet(1, 0, GOOD);
    let (header, data) = second.split_at(DEVICE_PACKET_LEN);
    slow.write_all(&[&hello(0), header].concat()).unwrap();
    while session.stats().channels[0].packets == 0 {
        thread::yield_now();
    }
    let whole = [hello(1), packet(1, 0, GOOD), config_packet(1, 1, b"config")];
    fast.write_all(&whole.concat()).unwrap();
    session.switchover_start();
    while log.lock().unwrap().config.is_empty() {
        thread::yield_now();
    }
    slow.write_all(data).unwrap();
    let error = session.join().result.unwrap_err();
    assert_eq!(
        *error.kind(),
        ErrorKind::Protocol(Violation::IndexAlreadyWritten)
    );
    assert_eq!((error.device(), error.index()), (Some(&id(1)), Some(0)));
    assert_eq!(error.channel(), Some(0));
}

/// A config packet of these bytes.
fn raw_config_packet(device: u32, index: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    let mut bytes =
        wire::encode_packet(&wire::DeviceKey::new(&id(device)), index, true, len).to_vec();
    bytes.extend(data);
    bytes
}
