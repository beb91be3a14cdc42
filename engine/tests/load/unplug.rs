//! A device that is unplugged while its packets are under way costs nobody else anything: what is under way
//! for it, and what comes later, is read past and counted, and the other devices get their state.

use std::{
    io::{self, PipeReader, Write},
    os::unix::net::UnixStream,
    thread::{self, JoinHandle},
    time::Duration,
};

use vfio_migration::{
    Backend, DeviceState, ErrorKind, LoadSession, Settings, Spill, Stats, Violation,
    wire::{PacketHeader, wrap_config},
};

use crate::{
    mock::Mock,
    names::id,
    packets::{config_packet, hello, packet},
    payload::payload,
    pipes::collect,
    watchdog::Watchdog,
};

const BACKENDS: [Backend; 2] = [Backend::Auto, Backend::Blocking];

/// The one that goes, and the one that stays.
const GOES: u32 = 1;
const STAYS: u32 = 2;

const LARGE: usize = 300_000;

/// A load of two devices over one channel. Nobody reads what the one that goes is given.
struct Scene {
    load: LoadSession,
    near: UnixStream,
    got: JoinHandle<Vec<u8>>,
    _goes: PipeReader,
}

fn settings(backend: Backend) -> Settings {
    let mut settings = Settings::default();
    settings.backend = backend;
    settings.budget = Some(1 << 20);
    settings.max_devices = Some(3);
    settings
}

impl Scene {
    fn new(settings: Settings) -> Self {
        let (goes, to_goes) = io::pipe().unwrap();
        let (stays, to_stays) = io::pipe().unwrap();
        let (near, far) = UnixStream::pair().unwrap();
        let load = LoadSession::builder()
            .settings(settings)
            .device(Mock::new(to_goes).device(GOES))
            .device(Mock::new(to_stays).device(STAYS))
            .channel(far)
            .start()
            .unwrap();
        load.switchover_start();
        let scene = Self {
            load,
            near,
            got: collect(stays),
            _goes: goes,
        };
        scene.send(hello(0)).join().unwrap();
        scene
    }

    /// Sends these bytes, however long the channel does not read.
    fn send(&self, bytes: Vec<u8>) -> JoinHandle<()> {
        let mut near = self.near.try_clone().unwrap();
        thread::spawn(move || near.write_all(&bytes).unwrap())
    }

    fn wait(&self, until: impl Fn(&Stats) -> bool) {
        while !until(&self.load.stats()) {
            assert!(self.load.failure().is_none());
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn unplug(&self) {
        let device = self.load.remove_device(&id(GOES)).unwrap();
        assert_eq!(device.state(), DeviceState::Running);
    }

    /// Sends the other device's state, and checks that it came; and that so many packets and bytes of the
    /// one that has gone were read past.
    fn end(self, dropped: (u64, u64)) {
        let state = [packet(STAYS, 0, b"x"), packet(STAYS, 1, &[1; LARGE])];
        let config = config_packet(STAYS, 2, b"c");
        let sent = self.send([state.concat(), config].concat());
        sent.join().unwrap();
        drop(self.near);
        let report = self.load.join();
        report.result.unwrap();
        assert_eq!(report.devices.len(), 1);
        let stats = report.stats;
        assert_eq!((stats.dropped_packets, stats.dropped_bytes), dropped);
        assert_eq!((stats.held, stats.spill.held), (0, 0));
        assert_eq!(stats.late_wakeups, 0);
        drop(report.devices);
        assert!(self.got.join().unwrap() == [&b"x"[..], &[1; LARGE]].concat());
    }
}

#[test]
fn packets_that_come_later_are_read_past() {
    for backend in BACKENDS {
        let _watchdog = Watchdog::new();
        let scene = Scene::new(settings(backend));
        scene.unplug();
        let packets = [
            packet(GOES, 7, &[7; LARGE]),
            packet(GOES, 0, b"small"),
            packet(GOES, 1, b""),
            // Beyond the window, and without data.
            packet(GOES, 0xffff_fffe, b""),
            packet(GOES, 3, &[3; 40_000]),
            config_packet(GOES, 8, b"config"),
        ];
        scene.send(packets.concat()).join().unwrap();
        let config = wrap_config(b"config").len();
        scene.end((6, (LARGE + 5 + 40_000 + config) as u64));
    }
}

#[test]
fn a_packet_whose_payload_is_under_way_is_read_past() {
    for backend in BACKENDS {
        for (whole, len) in [
            (packet(GOES, 0, &[1; LARGE]), LARGE),
            (packet(GOES, 9, &[1; LARGE]), LARGE),
            (packet(GOES, 0, &[1; 5000]), 5000),
            (
                config_packet(GOES, 3, &[1; LARGE]),
                wrap_config(&[1; LARGE]).len(),
            ),
        ] {
            // The header alone, a part, and all but a byte.
            for sent in [whole.len() - len, whole.len() - len / 2, whole.len() - 1] {
                let _watchdog = Watchdog::new();
                let scene = Scene::new(settings(backend));
                let (first, rest) = whole.split_at(sent);
                scene.send(first.to_vec()).join().unwrap();
                scene.wait(|stats| stats.channels[0].packets == 1);
                scene.unplug();
                scene.send(rest.to_vec()).join().unwrap();
                scene.end((1, len as u64));
            }
        }
    }
}

#[test]
fn a_packet_in_pieces_is_read_past_from_the_piece_on_that_found_no_place() {
    for backend in BACKENDS {
        let _watchdog = Watchdog::new();
        let mut settings = settings(backend);
        settings.budget = Some(128 << 10);
        let scene = Scene::new(settings);
        let sending = scene.send(packet(GOES, 0, &[1; LARGE]));
        // The device takes no more than a pipe does.
        scene.wait(|stats| stats.channels[0].bytes > 100 && stats.devices[0].entries > 0);
        scene.unplug();
        sending.join().unwrap();
        scene.wait(|stats| stats.dropped_packets == 1);
        let bytes = scene.load.stats().dropped_bytes;
        assert!(bytes > 0 && bytes < LARGE as u64, "{bytes}");
        scene.end((1, bytes));
    }
}

#[test]
fn a_packet_that_waits_for_room_is_read_past() {
    for backend in BACKENDS {
        let _watchdog = Watchdog::new();
        let mut settings = settings(backend);
        settings.spill = Spill::Off;
        let scene = Scene::new(settings);
        // None of them is next, and four are more than the budget.
        let early: Vec<u8> = (1..8)
            .flat_map(|index| packet(GOES, index, &[1; LARGE]))
            .collect();
        let sending = scene.send(early);
        scene.wait(|stats| stats.devices[0].queued > 0);
        // Until the channel waits. (Should it only be slow, the unplugging is what it meets as well.)
        let mut before = 0;
        while before != scene.load.stats().channels[0].bytes {
            before = scene.load.stats().channels[0].bytes;
            thread::sleep(Duration::from_millis(50));
        }
        let published = scene.load.stats().devices[0].queued;
        assert!((1..4).contains(&published), "{published}");
        scene.unplug();
        sending.join().unwrap();
        let dropped = 7 - published;
        scene.end((dropped, dropped * LARGE as u64));
    }
}

#[test]
fn a_packet_without_data_that_waits_to_come_near_is_read_past() {
    for backend in BACKENDS {
        let _watchdog = Watchdog::new();
        let scene = Scene::new(settings(backend));
        scene.send(packet(GOES, 0xffff_fffe, b"")).join().unwrap();
        scene.wait(|stats| stats.channels[0].packets == 1);
        scene.unplug();
        scene.end((1, 0));
    }
}

#[test]
fn what_was_spilled_gives_its_space_back_and_what_is_being_spilled_is_read_past() {
    for backend in BACKENDS {
        let _watchdog = Watchdog::new();
        let mut settings = settings(backend);
        settings.budget = Some(128 << 10);
        settings.spill = Spill::Memfd;
        let scene = Scene::new(settings);
        let early: Vec<u8> = (1..6)
            .flat_map(|index| packet(GOES, index, &[1; LARGE]))
            .collect();
        scene.send(early).join().unwrap();
        scene.wait(|stats| stats.spill.packets == 5);
        let whole = packet(GOES, 6, &[1; LARGE]);
        let (first, rest) = whole.split_at(whole.len() - LARGE / 2);
        scene.send(first.to_vec()).join().unwrap();
        let chunk = 64 << 10;
        let six = 6 * LARGE.div_ceil(chunk) * chunk;
        scene.wait(|stats| stats.spill.held == six as u64);
        scene.unplug();
        scene.send(rest.to_vec()).join().unwrap();
        scene.end((1, LARGE as u64));
    }
}

#[test]
fn pushed_packets_are_dropped() {
    for backend in BACKENDS {
        let _watchdog = Watchdog::new();
        let mut settings = settings(backend);
        // A buffer for each publisher.
        settings.budget = Some(8 << 20);
        let scene = Scene::new(settings);
        let mut publisher = scene.load.publisher();
        let mut another = scene.load.publisher();
        let data = |index, len: usize| payload(index, false, &vec![1; len]);
        publisher.push(&id(GOES), &data(1, 1000)).unwrap();
        let header = PacketHeader {
            index: 2,
            config: false,
        };
        // One that is being filled when its device goes.
        let mut lease = another.lease(&id(GOES), header, 1000).unwrap();
        scene.unplug();
        lease.bytes_mut().fill(2);
        lease.publish().unwrap();
        publisher.push(&id(GOES), &data(3, LARGE)).unwrap();
        publisher.push(&id(GOES), &data(4, 0)).unwrap();
        assert!(publisher.try_push(&id(GOES), &data(5, 1000)).unwrap());
        assert!(publisher.try_push(&id(GOES), &data(6, 0)).unwrap());
        let config = payload(7, true, &wrap_config(b"c"));
        publisher.push(&id(GOES), &config).unwrap();
        drop((publisher, another));
        let bytes = 1000 + LARGE + 1000 + wrap_config(b"c").len();
        scene.end((6, bytes as u64));
    }
}

#[test]
fn a_name_that_never_was_a_device_is_refused_and_one_that_comes_back_is_loaded() {
    for backend in BACKENDS {
        let _watchdog = Watchdog::new();
        let scene = Scene::new(settings(backend));
        scene.unplug();
        scene.send(packet(GOES, 0, b"old")).join().unwrap();
        scene.wait(|stats| stats.dropped_packets == 1);
        let (reader, writer) = io::pipe().unwrap();
        let got = collect(reader);
        let plugged = Mock::new(writer).device(GOES);
        scene.load.add_device(plugged).unwrap();
        scene.load.switchover_start();
        let state = [packet(GOES, 0, b"new"), config_packet(GOES, 1, b"c")].concat();
        scene.send(state).join().unwrap();
        scene.wait(|stats| !stats.devices[0].phases.resume.is_zero());
        scene.send(packet(3, 0, b"nobody's")).join().unwrap();
        let report = scene.load.join();
        let error = report.result.unwrap_err();
        let unknown = ErrorKind::Protocol(Violation::UnknownDevice {
            idstr: id(3).idstr().to_owned(),
            instance: 0,
        });
        assert_eq!(*error.kind(), unknown);
        drop(report.devices);
        assert_eq!(got.join().unwrap(), b"new");
    }
}

/// Four channels that bring packets of both devices, in turn, and one of them is unplugged at some moment.
#[test]
fn at_whatever_moment_a_device_goes_the_other_is_loaded() {
    const CHANNELS: u8 = 4;
    const COUNT: u32 = 60;
    for round in 0..40_u64 {
        let _watchdog = Watchdog::new();
        let mut settings = settings(BACKENDS[usize::from(round % 2 == 1)]);
        settings.budget = Some([64 << 10, 1 << 20][usize::from(round % 4 > 1)]);
        settings.channels = CHANNELS.into();
        if round % 8 > 3 {
            settings.spill = Spill::Memfd;
        }
        let (goes, to_goes) = io::pipe().unwrap();
        let (stays, to_stays) = io::pipe().unwrap();
        let (gone, got) = (collect(goes), collect(stays));
        let data = |device: u32, index: u32| {
            let len = (index * 7919 + device * 13) as usize % 20_000;
            vec![u8::try_from(index).unwrap(); len]
        };
        let mut load = LoadSession::builder()
            .settings(settings)
            .device(Mock::new(to_goes).device(GOES))
            .device(Mock::new(to_stays).device(STAYS));
        let mut sources = Vec::new();
        for number in 0..CHANNELS {
            let (mut near, far) = UnixStream::pair().unwrap();
            load = load.channel(far);
            let mut bytes = hello(number);
            for index in (0..COUNT).skip(number.into()).step_by(CHANNELS.into()) {
                for device in [GOES, STAYS] {
                    bytes.extend(packet(device, index, &data(device, index)));
                }
            }
            if number == 0 {
                bytes.extend(config_packet(GOES, COUNT, b"c"));
                bytes.extend(config_packet(STAYS, COUNT, b"c"));
            }
            sources.push(thread::spawn(move || near.write_all(&bytes).unwrap()));
        }
        let load = load.start().unwrap();
        load.switchover_start();
        while load.stats().devices[0].packets < round {
            thread::yield_now();
        }
        drop(load.remove_device(&id(GOES)).unwrap());
        for source in sources {
            source.join().unwrap();
        }
        let report = load.join();
        report.result.unwrap();
        assert_eq!(report.stats.late_wakeups, 0);
        assert_eq!((report.stats.held, report.stats.spill.held), (0, 0));
        drop(report.devices);
        let all = |device| -> Vec<u8> { (0..COUNT).flat_map(|i| data(device, i)).collect() };
        assert!(got.join().unwrap() == all(STAYS), "{round}");
        assert!(all(GOES).starts_with(&gone.join().unwrap()), "{round}");
    }
}
