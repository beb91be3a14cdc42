//! PRE_COPY data over the channels: agreed on by both ends, loaded before the switchover, and
//! approved only when it is in the device.

use std::{
    io,
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use vfio_migration::{
    DeviceState, Error, ErrorKind, LoadSession, Publisher, SaveSession, Settings, SourceChannels,
    Violation,
    migration::{
        Incoming, OnOffAuto, Outgoing, OutgoingDevice, SwitchoverAck, SwitchoverAcks, vm::start,
    },
    section::{Tag, Writer},
    sim::{Image, SimHandle},
    wire::{PacketHeader, wrap_config},
};

use crate::{
    quick::quick,
    vm::{Setup, id, migrate},
    watchdog::Watchdog,
};

fn over_channels() -> Setup {
    Setup {
        over_channels: true,
        ack: SwitchoverAck::Once,
        ..Setup::default()
    }
}

// ---------------------------------------------------------------------------------- round trips

#[test]
fn a_vm_moves_with_all_of_its_data_over_the_channels() {
    let _watchdog = Watchdog::new();
    let ended = migrate(&Setup {
        devices: 3,
        ..over_channels()
    });
    let source = ended.saved.stats();
    for (sent, loaded) in source.devices.iter().zip(&ended.stats.devices) {
        assert_eq!((sent.main_bytes, loaded.main_bytes), (0, 0));
        let config = 12 + 8 + 4 + 256 + 8;
        let headers = 12 * (sent.packets - 1);
        assert_eq!(sent.bytes, ended.setup.len + headers + config);
        assert_eq!((loaded.packets, loaded.bytes), (sent.packets, sent.bytes));
    }
    assert_eq!(ended.acks, 1, "one for all");
    ended.check();
}

#[test]
fn a_device_that_does_not_use_the_channels_goes_as_ever() {
    let _watchdog = Watchdog::new();
    let ended = migrate(&Setup {
        devices: 4,
        mixed: true,
        ..over_channels()
    });
    for (at, device) in ended.stats.devices.iter().enumerate() {
        let main = if at % 2 == 0 { ended.setup.len } else { 0 };
        assert_eq!(device.main_bytes, main);
    }
    ended.check();
}

#[test]
fn configs_acks_and_channels_are_as_they_are_without_it() {
    let _watchdog = Watchdog::new();
    for (ack, channels) in [(SwitchoverAck::Off, 1), (SwitchoverAck::Reusable, 5)] {
        let ended = migrate(&Setup {
            devices: 2,
            channels,
            ack,
            config_after_iterables: OnOffAuto::On,
            ..over_channels()
        });
        ended.check();
    }
}

#[test]
fn a_paused_vm_has_nothing_to_send_before() {
    let _watchdog = Watchdog::new();
    migrate(&Setup {
        state: DeviceState::Stop,
        ..over_channels()
    })
    .check();
}

// ------------------------------------------------------------------------------- the destination

const PIECE: usize = 10_000;

fn incoming(setup: &Setup, settings: Settings) -> (Incoming, SimHandle, Arc<AtomicU32>) {
    let (migratable, handle) = setup.admit(1, setup.config(9));
    let approvals = Arc::new(AtomicU32::new(0));
    let counted = approvals.clone();
    let approve = move || {
        counted.fetch_add(1, SeqCst);
        Ok(())
    };
    let session = LoadSession::builder().settings(settings);
    let incoming = Incoming::setup(
        vec![migratable],
        &setup.capabilities(),
        session,
        Box::new(approve),
    )
    .unwrap();
    (incoming, handle, approvals)
}

/// Has the destination read a body.
fn load(incoming: &Incoming, write: impl FnOnce(&mut Writer<&mut Vec<u8>>)) -> Result<Tag, Error> {
    let mut body = Vec::new();
    write(&mut Writer::new(&mut body));
    let piece = incoming.device(&id(1))?.load_state(&mut &body[..])?;
    Ok(piece.end)
}

fn set_up(incoming: &Incoming) {
    let end = load(incoming, |writer| {
        writer.setup_over_channels().unwrap();
        writer.end().unwrap();
    });
    assert_eq!(end.unwrap(), Tag::SetupOverChannels);
}

fn push(publisher: &mut Publisher, image: &Image, index: u32) {
    let header = PacketHeader {
        index,
        config: false,
    };
    let mut packet = header.encode().to_vec();
    let at = packet.len();
    packet.resize(at + PIECE, 0);
    image.fill(u64::from(index) * PIECE as u64, &mut packet[at..]);
    publisher.push(&id(1), &packet).unwrap();
}

fn until(what: &str, mut found: impl FnMut() -> bool) {
    // Counted in looks, not by the clock: a machine that stands still fails nothing.
    for _ in 0..20_000 {
        if found() {
            return;
        }
        thread::sleep(Duration::from_millis(2));
    }
    panic!("{what}");
}

fn written(incoming: &Incoming) -> u64 {
    incoming.stats().devices[0].bytes
}

fn text(error: &Error) -> &'static str {
    match error.kind() {
        ErrorKind::Protocol(Violation::Section(text)) => text,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_switchover_is_approved_when_the_packets_that_were_counted_are_in_the_device() {
    let _watchdog = Watchdog::new();
    let (incoming, _, approvals) = incoming(&over_channels(), quick());
    let image = Image::new(1, 3 << 20);
    set_up(&incoming);
    let mut publisher = incoming.session().unwrap().publisher();
    thread::scope(|scope| {
        let told = scope.spawn(|| {
            load(&incoming, |writer| {
                writer.precopy_sent(4).unwrap();
                writer.iterate(&[], true).unwrap();
            })
        });
        for index in [0, 3, 1] {
            push(&mut publisher, &image, index);
        }
        // Written before the switchover; the third is missing, so the fourth waits.
        until("two packets are written", || {
            written(&incoming) >= 2 * (PIECE as u64 + 12)
        });
        thread::sleep(Duration::from_millis(50));
        assert_eq!(approvals.load(SeqCst), 0, "two of four are missing");
        assert!(!told.is_finished());
        push(&mut publisher, &image, 2);
        assert_eq!(told.join().unwrap().unwrap(), Tag::InitDataSent);
    });
    assert_eq!(approvals.load(SeqCst), 1);
    assert_eq!(written(&incoming), 4 * (PIECE as u64 + 12));
    assert_eq!(incoming.stats().late_wakeups, 0);
    let _reset = incoming.abort();
}

#[test]
fn packets_that_were_counted_and_do_not_come_are_missed_by_name() {
    let _watchdog = Watchdog::new();
    let mut settings = quick();
    settings.no_progress = Duration::from_millis(300);
    let (incoming, _, approvals) = incoming(&over_channels(), settings);
    set_up(&incoming);
    let mut publisher = incoming.session().unwrap().publisher();
    push(&mut publisher, &Image::new(1, 3 << 20), 0);
    let error = load(&incoming, |writer| {
        writer.precopy_sent(2).unwrap();
        writer.iterate(&[], true).unwrap();
    })
    .unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Stalled);
    assert_eq!((error.device(), error.index()), (Some(&id(1)), Some(1)));
    assert_eq!(approvals.load(SeqCst), 0);
    assert!(incoming.finish().is_err());
}

#[test]
fn a_cancellation_ends_the_wait_for_them() {
    let _watchdog = Watchdog::new();
    let (incoming, _, approvals) = incoming(&over_channels(), quick());
    set_up(&incoming);
    let _open = incoming.session().unwrap().publisher();
    thread::scope(|scope| {
        let told = scope.spawn(|| {
            load(&incoming, |writer| {
                writer.precopy_sent(1).unwrap();
                writer.iterate(&[], true).unwrap();
            })
        });
        thread::sleep(Duration::from_millis(50));
        incoming.cancel();
        assert!(told.join().unwrap().unwrap_err().is_cancelled());
    });
    assert_eq!(approvals.load(SeqCst), 0);
    for device in incoming.abort() {
        assert_eq!(device.state(), DeviceState::Running);
    }
}

#[test]
fn nothing_is_missed_while_the_source_iterates_and_a_config_waits_for_the_switchover() {
    let _watchdog = Watchdog::new();
    let mut settings = quick();
    settings.no_progress = Duration::from_millis(300);
    let setup = Setup {
        ack: SwitchoverAck::Off,
        ..over_channels()
    };
    let (incoming, handle, _) = incoming(&setup, settings);
    let image = Image::new(1, 2 * PIECE as u64);
    set_up(&incoming);
    let mut publisher = incoming.session().unwrap().publisher();
    push(&mut publisher, &image, 0);
    // Beyond the time without progress, and between two of the I/O thread's re-checks.
    thread::sleep(Duration::from_millis(1500));
    assert!(incoming.failure().is_none(), "{:?}", incoming.failure());
    push(&mut publisher, &image, 1);
    let header = PacketHeader {
        index: 2,
        config: true,
    };
    let mut config = header.encode().to_vec();
    let body = [&256_u32.to_be_bytes()[..], &[7; 256]].concat();
    config.extend(wrap_config(&body));
    publisher.push(&id(1), &config).unwrap();
    until("both are written", || {
        written(&incoming) >= 2 * (PIECE as u64 + 12)
    });
    thread::sleep(Duration::from_millis(500));
    assert!(incoming.failure().is_none() && !incoming.is_finished());
    assert_eq!(handle.state(), DeviceState::Resuming, "the gate");
    incoming.switchover_start().unwrap();
    until("it is loaded", || incoming.is_finished());
    assert_eq!(
        incoming.stats().late_wakeups,
        0,
        "the switchover has said so"
    );
    drop(publisher);
    let mut loaded = incoming.finish().unwrap();
    assert_eq!(handle.state(), DeviceState::Resuming);
    start(loaded.devices_mut()).unwrap();
    assert_eq!(handle.digest(), image.digest());
    assert_eq!(handle.state(), DeviceState::Running);
}

#[test]
fn what_is_missing_after_the_switchover_is_missed_as_ever() {
    let _watchdog = Watchdog::new();
    let mut settings = quick();
    settings.no_progress = Duration::from_millis(300);
    let (incoming, _, _) = incoming(&over_channels(), settings);
    set_up(&incoming);
    let mut publisher = incoming.session().unwrap().publisher();
    push(&mut publisher, &Image::new(1, 3 << 20), 0);
    incoming.switchover_start().unwrap();
    let failed = incoming.finish().unwrap_err();
    assert_eq!(*failed.error.kind(), ErrorKind::Stalled);
    assert_eq!(failed.error.index(), Some(1));
}

// -------------------------------------------------------------------------------------- refusals

#[test]
fn one_end_alone_is_refused_at_the_set_up() {
    let _watchdog = Watchdog::new();
    let one_end = |here| ErrorKind::Protocol(Violation::PrecopyOverChannels { here });
    for source in [true, false] {
        let setup = |over_channels| Setup {
            over_channels,
            ..Setup::default()
        };
        let (incoming, _, _) = incoming(&setup(!source), quick());
        let (migratable, _) = setup(source).admit(1, setup(source).config(1));
        let mut body = Vec::new();
        let capabilities = setup(source).capabilities();
        let sending = OutgoingDevice::setup(
            migratable,
            &capabilities,
            &SwitchoverAcks::new(SwitchoverAck::Off),
            &mut body,
        )
        .unwrap();
        let device = incoming.device(&id(1)).unwrap();
        let error = device.load_state(&mut &body[..]).unwrap_err();
        assert_eq!(*error.kind(), one_end(!source));
        assert_eq!(error.device(), Some(&id(1)));
        let failure = incoming.failure().expect("it has failed");
        assert_eq!(failure.kind(), error.kind());
        let _running = sending.abort();
        for device in incoming.abort() {
            assert_eq!(device.state(), DeviceState::Running);
        }
    }
    // Nor where this device's data comes over the main channel.
    let (incoming, _, _) = incoming(
        &Setup {
            transfer: OnOffAuto::Off,
            ..over_channels()
        },
        quick(),
    );
    let error = load(&incoming, |writer| {
        writer.setup_over_channels().unwrap();
        writer.end().unwrap();
    });
    assert_eq!(*error.unwrap_err().kind(), one_end(false));
}

#[test]
fn a_switchover_without_the_agreement_is_refused() {
    let _watchdog = Watchdog::new();
    let (incoming, _, _) = incoming(&over_channels(), quick());
    let error = incoming.switchover_start().unwrap_err();
    assert!(text(&error).contains("before a device's SETUP"));
    assert_eq!(error.device(), Some(&id(1)));
    assert!(incoming.finish().is_err());
}

#[test]
fn tags_that_do_not_fit_are_refused() {
    let _watchdog = Watchdog::new();
    let refused = |setup: &Setup, agreed, tag: Tag, write: fn(&mut Writer<&mut Vec<u8>>)| {
        let (incoming, _, approvals) = incoming(setup, quick());
        if agreed {
            set_up(&incoming);
        }
        let error = load(&incoming, write).unwrap_err();
        let violation = Violation::SectionTag(tag.value());
        assert_eq!(*error.kind(), ErrorKind::Protocol(violation));
        assert_eq!(error.device(), Some(&id(1)));
        assert_eq!(approvals.load(SeqCst), 0);
    };
    let on = over_channels();
    refused(&on, true, Tag::Data, |writer| {
        writer.iterate(b"state", false).unwrap();
    });
    refused(&on, true, Tag::InitDataSent, |writer| {
        writer.iterate(&[], true).unwrap(); // without a count
    });
    let without_acks = Setup {
        ack: SwitchoverAck::Off,
        ..over_channels()
    };
    refused(&without_acks, true, Tag::InitDataSent, |writer| {
        writer.precopy_sent(u32::MAX).unwrap();
        writer.iterate(&[], true).unwrap();
    });
    let off = Setup {
        ack: SwitchoverAck::Once,
        ..Setup::default()
    };
    refused(&off, false, Tag::PrecopySent, |writer| {
        writer.precopy_sent(0).unwrap();
        writer.end().unwrap();
    });
}

// ------------------------------------------------------------------------------------ the source

fn source(setup: &Setup) -> (OutgoingDevice, SimHandle) {
    let (migratable, handle) = setup.admit(1, setup.config(1));
    let acks = SwitchoverAcks::new(setup.ack);
    let source =
        OutgoingDevice::setup(migratable, &setup.capabilities(), &acks, io::sink()).unwrap();
    (source, handle)
}

#[test]
fn a_section_of_an_iteration_says_how_many_packets_were_sent_and_has_no_data() {
    let _watchdog = Watchdog::new();
    let (near, _far) = UnixStream::pair().unwrap();
    let mut channels = SourceChannels::greet(vec![near.into()], &quick()).unwrap();
    let (mut source, _) = source(&Setup {
        precopy_initial: 1000,
        ..over_channels()
    });
    let error = source.iterate(io::sink()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Misuse(_)), "{error}");
    let mut body = Vec::new();
    let iteration = source.iterate_over(&mut channels, &mut body).unwrap();
    assert_eq!((iteration.bytes, iteration.init_data_sent), (1000, true));
    let expected = [
        &Tag::PrecopySent.encode()[..],
        &1_u32.to_be_bytes(),
        &Tag::InitDataSent.encode(),
    ];
    assert_eq!(body, expected.concat());
    body.clear();
    let iteration = source.iterate_over(&mut channels, &mut body).unwrap();
    assert_eq!((iteration.bytes, iteration.init_data_sent), (0, false));
    assert_eq!(body, Tag::EndOfState.encode());
    let _running = source.abort();
}

#[test]
fn a_cancellation_ends_an_iteration_whose_peer_takes_nothing() {
    let _watchdog = Watchdog::new();
    let (near, _far) = UnixStream::pair().unwrap();
    let mut channels = SourceChannels::greet(vec![near.into()], &quick()).unwrap();
    let canceller = channels.canceller();
    let (mut source, handle) = source(&Setup {
        len: 64 << 20,
        precopy_initial: 48 << 20,
        ack: SwitchoverAck::Off,
        ..over_channels()
    });
    let error = thread::scope(|scope| {
        let sending = scope.spawn(|| {
            // Ends: no socket takes as much as there is.
            loop {
                match source.iterate_over(&mut channels, io::sink()) {
                    Ok(iteration) => assert!(iteration.bytes > 0, "the socket took all"),
                    Err(error) => return error,
                }
            }
        });
        thread::sleep(Duration::from_millis(100));
        assert!(!sending.is_finished());
        canceller.cancel();
        sending.join().unwrap()
    });
    assert!(error.is_cancelled(), "{error}");
    // Nothing goes behind a part of a packet, and no session goes on with it.
    let again = source.iterate_over(&mut channels, io::sink()).unwrap_err();
    assert!(again.is_cancelled());
    let session = SaveSession::builder().greeted_channels(channels);
    let mut failed = Outgoing::begin(vec![source], session).unwrap_err();
    assert!(failed.error.is_cancelled(), "{}", failed.error);
    assert_eq!(failed.back_mut()[0].state(), DeviceState::Running);
    assert_eq!(handle.state(), DeviceState::Running);
    assert!(canceller.is_over());
}

#[test]
fn a_peer_that_goes_away_ends_an_iteration() {
    let _watchdog = Watchdog::new();
    let (near, far) = UnixStream::pair().unwrap();
    let mut channels = SourceChannels::greet(vec![near.into()], &quick()).unwrap();
    let (mut source, handle) = source(&over_channels());
    drop(far);
    let error = source.iterate_over(&mut channels, io::sink()).unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Channel);
    assert_eq!((error.device(), error.channel()), (Some(&id(1)), Some(0)));
    let _running = source.abort();
    assert_eq!(handle.state(), DeviceState::Running);
    let none = SourceChannels::greet(Vec::new(), &quick()).unwrap_err();
    assert!(matches!(none.kind(), ErrorKind::Misuse(_)));
}
