//! A VM that runs on for longer than any time-out, set up at both ends: the channels were greeted, and
//! their silence is nobody's fault. And what is wrong with a channel is found while the VM runs.

use std::{
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::net::UnixStream,
    thread,
    time::Duration,
};

use vfio_migration::{
    Channel, DeviceState, Error, ErrorKind, LoadSession, Relay, SaveSession, Settings,
    SourceChannels, Violation,
    migration::{Incoming, OnOffAuto, Outgoing, OutgoingDevice, SwitchoverAck, SwitchoverAcks},
};

use crate::{
    barrier::sync,
    packets::{config_packet, hello, packet},
    payload::payload,
    quick::quick,
    vm::{Setup, id, migrate},
    watchdog::Watchdog,
};

/// Every time-out is this.
const SHORT: Duration = Duration::from_millis(1500);

/// The VM runs on for so long, and then once more.
const LONG: Duration = Duration::from_millis(2500);

fn short() -> Settings {
    let mut settings = quick();
    settings.hello_timeout = SHORT;
    settings.packet_timeout = SHORT;
    settings.no_progress = SHORT;
    settings.config_ready_timeout = SHORT;
    settings
}

#[test]
fn a_vm_runs_on_for_longer_than_every_time_out_and_then_moves() {
    let _watchdog = Watchdog::new();
    thread::scope(|scope| {
        for over_channels in [false, true] {
            for config_after_iterables in [OnOffAuto::Off, OnOffAuto::On] {
                scope.spawn(move || {
                    let ended = migrate(&Setup {
                        devices: 2,
                        ack: SwitchoverAck::Once,
                        over_channels,
                        config_after_iterables,
                        settings: short(),
                        hold: LONG,
                        ..Setup::default()
                    });
                    ended.check();
                });
            }
        }
    });
}

/// Packets that a VMM receives itself and pushes, some while the source's VM runs.
#[test]
fn pushed_packets_may_take_as_long() {
    let _watchdog = Watchdog::new();
    let setup = Setup {
        len: 20_000,
        precopy_initial: 0,
        ..Setup::default()
    };
    let (migratable, handle) = setup.admit(1, setup.config(9));
    let session = LoadSession::builder().settings(short());
    let incoming = Incoming::setup(
        vec![migratable],
        &setup.capabilities(),
        session,
        Box::new(|| Ok(())),
    )
    .unwrap();
    let mut publisher = incoming.session().unwrap().publisher();
    let image = vfio_migration::sim::Image::new(1, setup.len);
    let mut push = |index: u32, len: usize| {
        let mut data = vec![0; len];
        image.fill(u64::from(index) * 10_000, &mut data);
        publisher
            .push(&id(1), &payload(index, false, &data))
            .unwrap();
    };
    thread::sleep(LONG);
    push(0, 10_000);
    thread::sleep(LONG);
    assert!(incoming.failure().is_none(), "{:?}", incoming.failure());
    incoming.switchover_start().unwrap();
    push(1, 10_000);
    let written = || incoming.stats().devices[0].bytes >= 20_024;
    while !written() {
        assert!(incoming.failure().is_none(), "{:?}", incoming.failure());
        thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(handle.state(), DeviceState::Resuming);
    let _reset = incoming.abort();
}

/// A relay between both, with nothing on its channels but their hellos; and where it is told that
/// devices' packets may come early, with some of them.
#[test]
fn a_relay_passes_on_a_source_that_is_silent_for_as_long() {
    let _watchdog = Watchdog::new();
    thread::scope(|scope| {
        for early in [false, true] {
            scope.spawn(move || {
                let mut settings = short();
                settings.precopy_over_channels = early;
                let relay = Relay::builder().settings(settings.clone()).start().unwrap();
                let (mut source, near) = UnixStream::pair().unwrap();
                let (far, mut destination) = UnixStream::pair().unwrap();
                relay.add_channel(near, far).unwrap();
                let rest = [packet(1, 1, b"state"), config_packet(1, 2, b"config")].concat();
                let mut sent = [hello(0), sync()].concat();
                if early {
                    sent.extend(packet(1, 0, b"early"));
                }
                source.write_all(&sent).unwrap();
                // Its time may have begun anew when the last of that was sent on.
                thread::sleep(2 * LONG);
                assert!(relay.failure().is_none(), "{:?}", relay.failure());
                if !early {
                    sent.extend(packet(1, 0, b"late"));
                    source.write_all(&packet(1, 0, b"late")).unwrap();
                }
                sent.extend(&rest);
                source.write_all(&rest).unwrap();
                drop(source);
                let reading = thread::spawn(move || {
                    let mut bytes = Vec::new();
                    destination.read_to_end(&mut bytes).unwrap();
                    bytes
                });
                relay.join().result.unwrap();
                assert_eq!(reading.join().unwrap(), sent);
            });
        }
    });
}

/// What the relay holds must get on in any case: here a packet whose predecessor does not come.
#[test]
fn a_relay_that_holds_packets_is_not_patient() {
    let _watchdog = Watchdog::new();
    let mut settings = short();
    settings.no_progress = Duration::from_millis(300);
    settings.precopy_over_channels = true;
    let relay = Relay::builder().settings(settings.clone()).start().unwrap();
    let (mut source, near) = UnixStream::pair().unwrap();
    let (far, _destination) = UnixStream::pair().unwrap();
    relay.add_channel(near, far).unwrap();
    let sent = [hello(0), sync(), packet(1, 1, b"state")].concat();
    source.write_all(&sent).unwrap();
    let error = relay.join().result.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Stalled);
    assert_eq!((error.device(), error.index()), (Some(&id(1)), Some(0)));
}

// --------------------------------------------------------------------------- what is found early

fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    for _ in 0..20_000 {
        if let Some(found) = look() {
            return found;
        }
        thread::sleep(Duration::from_millis(2));
    }
    panic!("{what}");
}

fn why(error: &Error) -> String {
    let source = std::error::Error::source(error);
    source.map_or_else(|| error.to_string(), ToString::to_string)
}

/// A destination, and a source's channels that were greeted with these settings.
fn set_up(settings: &Settings, (near, far): (Channel, Channel)) -> (Incoming, SourceChannels) {
    // First: a destination that refuses the hello may hang up before all of the greeting is sent.
    let channels = SourceChannels::greet(vec![near], settings).unwrap();
    let setup = Setup::default();
    let (migratable, _) = setup.admit(1, setup.config(9));
    let session = LoadSession::builder().settings(quick()).channel(far);
    let devices = vec![migratable];
    let incoming = Incoming::setup(devices, &setup.capabilities(), session, Box::new(|| Ok(())));
    (incoming.unwrap(), channels)
}

/// The next iteration of a device fails, for the channels' sake, and it runs on.
fn fails_to_iterate(channels: &mut SourceChannels) -> Error {
    for over_channels in [false, true] {
        let setup = Setup {
            over_channels,
            ..Setup::default()
        };
        let (migratable, handle) = setup.admit(1, setup.config(1));
        let acks = SwitchoverAcks::new(SwitchoverAck::Off);
        let mut source =
            OutgoingDevice::setup(migratable, &setup.capabilities(), &acks, io::sink()).unwrap();
        source.iterate_over(channels, io::sink()).unwrap_err();
        let _running = source.abort();
        assert_eq!(handle.state(), DeviceState::Running);
    }
    channels.failure().unwrap()
}

#[test]
fn a_hello_of_another_vm_is_found_at_the_set_up_by_both_ends() {
    let _watchdog = Watchdog::new();
    let unix = || UnixStream::pair().unwrap();
    let pairs: [(Channel, Channel); 2] = [
        {
            let (near, far) = tcp();
            (near.into(), far.into())
        },
        {
            let (near, far) = unix();
            (near.into(), far.into())
        },
    ];
    for pair in pairs {
        let mut settings = quick();
        settings.uuid = [7; 16];
        let (incoming, mut channels) = set_up(&settings, pair);
        let error = until("it is refused", || incoming.failure());
        assert!(
            matches!(error.kind(), ErrorKind::Protocol(Violation::Uuid)),
            "{error}"
        );
        let error = until("the source sees it", || channels.failure());
        assert_eq!(
            (error.kind(), error.channel()),
            (&ErrorKind::Channel, Some(0))
        );
        fails_to_iterate(&mut channels);
        let _reset = incoming.abort();
    }
}

#[test]
fn a_destination_that_is_gone_is_found_while_the_vm_runs() {
    let _watchdog = Watchdog::new();
    let (near, far) = tcp();
    let mut channels = SourceChannels::greet(vec![near.into()], &quick()).unwrap();
    assert!(channels.failure().is_none());
    drop(far);
    let error = until("the source sees it", || channels.failure());
    assert_eq!(*error.kind(), ErrorKind::Channel);
    assert!(why(&error).contains("has ended the channel"), "{error}");
    fails_to_iterate(&mut channels);
    // And where nobody has looked, before the devices are asked for anything.
    let setup = Setup::default();
    let (migratable, handle) = setup.admit(1, setup.config(1));
    let acks = SwitchoverAcks::new(SwitchoverAck::Off);
    let source =
        OutgoingDevice::setup(migratable, &setup.capabilities(), &acks, io::sink()).unwrap();
    let session = SaveSession::builder().greeted_channels(channels);
    let failed = Outgoing::begin(vec![source], session).unwrap_err();
    assert_eq!(*failed.error.kind(), ErrorKind::Channel);
    assert_eq!(handle.state(), DeviceState::Running);
    // One that was gone before.
    let (near, far) = tcp();
    drop(far);
    thread::sleep(Duration::from_millis(50));
    let error = SourceChannels::greet(vec![near.into()], &quick()).unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Channel);
}

#[test]
fn a_source_that_says_no_hello_is_found_at_the_set_up() {
    let _watchdog = Watchdog::new();
    let (_near, far) = tcp();
    let setup = Setup::default();
    let (migratable, _) = setup.admit(1, setup.config(9));
    let session = LoadSession::builder().settings(short()).channel(far);
    let devices = vec![migratable];
    let incoming = Incoming::setup(devices, &setup.capabilities(), session, Box::new(|| Ok(())));
    let incoming = incoming.unwrap();
    let error = until("it is missed", || incoming.failure());
    assert_eq!(*error.kind(), ErrorKind::Stalled);
    assert!(why(&error).contains("hello"), "{error}");
    let _reset = incoming.abort();
}
