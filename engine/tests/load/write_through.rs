//! Channels that write what they have received: the same bytes in the same order, the first errno final, and
//! what no channel may write is the I/O thread's.

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    os::unix::net::UnixStream,
    thread,
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};

use crate::{
    barrier::sync,
    mock::Mock,
    names::id,
    packets::{config_packet, hello, packet},
    pipes::collect,
    watchdog::Watchdog,
};
use vfio_migration::{Backend, ErrorKind, LoadSession, Report, Settings, Spill, Writer};
use vfio_migration_uring::sim::SimConfig as RingConfig;

/// A load of some devices, and how their packets come.
#[derive(Clone, Debug)]
struct Shape {
    settings: Settings,
    /// A simulated ring's seed.
    seed: Option<u64>,
    devices: u32,
    /// How many packets each has, and of how many bytes.
    packets: (u32, usize),
    /// The last channel brings its packets later than the others.
    late: bool,
}

fn settings(channels: u32) -> Settings {
    Settings::default().writer(Writer::Auto).channels(channels)
}

fn memfd() -> File {
    memfd_create(c"write-through", MFdFlags::MFD_ALLOW_SEALING)
        .unwrap()
        .into()
}

fn data(device: u32, index: u32, len: usize) -> Vec<u8> {
    // Never 0: what is not written shows.
    vec![(index * 31 + device * 7).to_le_bytes()[0] | 1; len]
}

fn state(device: u32, (count, len): (u32, usize)) -> Vec<u8> {
    let packets: Vec<_> = (0..count).map(|index| data(device, index, len)).collect();
    packets.concat()
}

fn content(mut file: &File) -> Vec<u8> {
    let mut got = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut got).unwrap();
    got
}

/// Loads them, the packets dealt out to the channels in turn, and checks what has come.
fn load(shape: &Shape) -> Report {
    let channels = shape.settings.channels;
    let (count, len) = shape.packets;
    let mut builder = LoadSession::builder().settings(shape.settings.clone());
    if let Some(seed) = shape.seed {
        builder = builder.simulated_ring(RingConfig {
            seed,
            delay: 80,
            short: 10,
            interrupt: 5,
            ..RingConfig::default()
        });
    }
    let mut files = Vec::new();
    for number in 0..shape.devices {
        let file = memfd();
        files.push(file.try_clone().unwrap());
        builder = builder.device(Mock::new(file).device(number));
    }
    let mut senders = Vec::new();
    for channel in 0..channels {
        let (mut near, far) = UnixStream::pair().unwrap();
        builder = builder.channel(far);
        let shape = shape.clone();
        senders.push(thread::spawn(move || {
            near.write_all(&hello(channel.to_le_bytes()[0])).unwrap();
            near.write_all(&sync()).unwrap();
            if shape.late && channel + 1 == channels {
                thread::sleep(Duration::from_millis(60));
            }
            for number in (0..count * shape.devices).filter(|number| number % channels == channel) {
                let (index, device) = (number / shape.devices, number % shape.devices);
                let packet = packet(device, index, &data(device, index, len));
                near.write_all(&packet).unwrap();
            }
            if channel == 0 {
                for device in 0..shape.devices {
                    near.write_all(&config_packet(device, count, b"c")).unwrap();
                }
            }
        }));
    }
    let session = builder.start().unwrap();
    session.switchover_start();
    for sender in senders {
        sender.join().unwrap();
    }
    let report = session.join();
    report.result.as_ref().unwrap();
    for (number, file) in (0..).zip(&files) {
        let whole = content(file) == state(number, shape.packets);
        assert!(whole, "device {number} of {shape:?}");
    }
    let stats = &report.stats;
    assert_eq!(stats.late_wakeups, 0);
    assert_eq!((stats.held, stats.spill.held), (0, 0));
    report
}

fn through(report: &Report) -> u64 {
    let devices = report.stats.devices.iter();
    devices.map(|device| device.written_through).sum()
}

#[test]
fn channels_write_in_order_and_the_rest_is_the_rings() {
    let _watchdog = Watchdog::new();
    let mut written = 0;
    for backend in [Backend::Uring, Backend::Blocking] {
        for (devices, channels) in [(1, 1), (1, 4), (8, 4)] {
            for packets in [(300, 4 << 10), (100, 64 << 10), (12, 1 << 20)] {
                let report = load(&Shape {
                    settings: settings(channels).backend(backend),
                    seed: None,
                    devices,
                    packets,
                    late: false,
                });
                written += through(&report);
            }
        }
    }
    assert!(written > 0);
}

/// Small packets are put together while the ring is busy: those are written before a channel writes.
#[test]
fn what_was_put_together_for_the_ring_is_written_before_the_turn_is_lent() {
    let _watchdog = Watchdog::new();
    let mut written = 0;
    for seed in 0..150 {
        let report = load(&Shape {
            settings: settings(3),
            seed: Some(seed),
            devices: 1,
            packets: (400, 300),
            late: false,
        });
        written += through(&report);
    }
    assert!(written > 0);
}

/// A channel that comes late makes the others wait for its packets, and spill.
#[test]
fn what_was_spilled_is_the_io_threads_and_what_comes_behind_it_a_channels_again() {
    let _watchdog = Watchdog::new();
    let (mut written, mut spilled) = (0, 0);
    for _ in 0..10 {
        let report = load(&Shape {
            settings: settings(4).budget(256 << 10).spill(Spill::Memfd),
            seed: None,
            devices: 2,
            packets: (200, 6000),
            late: true,
        });
        written += through(&report);
        spilled += report.stats.spill.packets;
    }
    assert!(written > 0 && spilled > 0);
}

#[test]
fn the_ring_alone_writes_where_the_settings_say_so() {
    let _watchdog = Watchdog::new();
    let report = load(&Shape {
        settings: settings(2).writer(Writer::Ring),
        seed: None,
        devices: 2,
        packets: (200, 4096),
        late: false,
    });
    assert_eq!(through(&report), 0);
}

/// The device takes so many bytes and no more: its errno is the load's, the packet that it refused is named, and what
/// is in the device is what came before.
#[test]
fn the_first_errno_of_a_channels_write_is_final() {
    let _watchdog = Watchdog::new();
    for (len, room) in [(4096, 100 * 4096), (300, 301 * 300), (100_000, 777_777)] {
        for round in 0..4 {
            let file = memfd();
            file.set_len(room).unwrap();
            fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW)).unwrap();
            let (mut near, far) = UnixStream::pair().unwrap();
            let session = LoadSession::builder()
                .settings(settings(1))
                .device(Mock::new(file.try_clone().unwrap()).device(1))
                .channel(far)
                .start()
                .unwrap();
            session.switchover_start();
            let sender = thread::spawn(move || {
                near.write_all(&hello(0)).unwrap();
                near.write_all(&sync()).unwrap();
                for index in 0..2000 {
                    let sent = near.write_all(&packet(1, index, &data(1, index, len)));
                    if sent.is_err() {
                        return;
                    }
                    if round % 2 == 0 {
                        thread::yield_now();
                    }
                }
            });
            let report = session.join();
            sender.join().unwrap();
            let error = report.result.unwrap_err();
            assert_eq!(*error.kind(), ErrorKind::Device, "{error}");
            assert_eq!(error.raw_os_error(), Some(libc::EPERM));
            assert_eq!(error.device(), Some(&id(1)));
            drop(report.devices);
            let got = content(&file);
            // A memory file takes whole pages.
            let prefix = got.iter().position(|&byte| byte == 0).unwrap_or(got.len());
            assert!(prefix + 4096 > got.len(), "{prefix} of {}", got.len());
            let refused = u32::try_from(prefix / len).unwrap();
            assert!(state(1, (refused + 1, len)).starts_with(&got[..prefix]));
            assert_eq!(error.index(), Some(refused));
        }
    }
}

/// A pipe waits for its reader: only the ring can call that off.
#[test]
fn a_pipe_is_the_rings() {
    let _watchdog = Watchdog::new();
    let (reader, writer) = io::pipe().unwrap();
    let (mut near, far) = UnixStream::pair().unwrap();
    let session = LoadSession::builder()
        .settings(settings(1))
        .device(Mock::new(writer).device(1))
        .channel(far)
        .start()
        .unwrap();
    session.switchover_start();
    let got = collect(reader);
    near.write_all(&hello(0)).unwrap();
    near.write_all(&sync()).unwrap();
    for index in 0..200 {
        near.write_all(&packet(1, index, &data(1, index, 4096)))
            .unwrap();
    }
    near.write_all(&config_packet(1, 200, b"c")).unwrap();
    drop(near);
    let mut report = session.join();
    report.result.as_ref().unwrap();
    assert_eq!(through(&report), 0);
    report.devices.clear();
    assert!(got.join().unwrap() == state(1, (200, 4096)));
}

/// Four channels bring packets of two devices, and one of the devices goes at some moment.
#[test]
fn a_device_that_goes_while_channels_write_leaves_the_other_alone() {
    const COUNT: u32 = 120;
    const LEN: usize = 3000;
    for round in 0..40_u64 {
        let _watchdog = Watchdog::new();
        let (goes, stays) = (memfd(), memfd());
        let mut builder = LoadSession::builder()
            .settings(settings(4))
            .device(Mock::new(goes.try_clone().unwrap()).device(1))
            .device(Mock::new(stays.try_clone().unwrap()).device(2));
        let mut senders = Vec::new();
        for number in 0..4 {
            let (mut near, far) = UnixStream::pair().unwrap();
            builder = builder.channel(far);
            let mut bytes = hello(number);
            for index in (0..COUNT).skip(number.into()).step_by(4) {
                for device in [1, 2] {
                    bytes.extend(packet(device, index, &data(device, index, LEN)));
                }
            }
            if number == 0 {
                bytes.extend(config_packet(1, COUNT, b"c"));
                bytes.extend(config_packet(2, COUNT, b"c"));
            }
            senders.push(thread::spawn(move || near.write_all(&bytes).unwrap()));
        }
        let session = builder.start().unwrap();
        session.switchover_start();
        while session.stats().devices[0].packets < 3 * round {
            thread::yield_now();
        }
        drop(session.remove_device(&id(1)).unwrap());
        for sender in senders {
            sender.join().unwrap();
        }
        let report = session.join();
        report.result.unwrap();
        assert_eq!(report.stats.late_wakeups, 0);
        assert_eq!((report.stats.held, report.stats.spill.held), (0, 0));
        drop(report.devices);
        assert!(content(&stays) == state(2, (COUNT, LEN)), "{round}");
        let prefix = state(1, (COUNT, LEN)).starts_with(&content(&goes));
        assert!(prefix, "{round}");
    }
}
