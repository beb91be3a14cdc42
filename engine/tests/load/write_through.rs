//! Channels that write what they have received: the same bytes in the same order, the first errno final,
//! and a device that is not quick, or not any more, is the I/O thread's.

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    os::unix::net::UnixStream,
    thread,
};

use crate::{
    barrier::sync,
    mock::Mock,
    packets::{config_packet, hello, packet},
    pipes::collect,
    watchdog::Watchdog,
};
use vfio_migration::{Backend, LoadSession, Report, Settings, Writer};

fn settings(backend: Backend, channels: u32) -> Settings {
    let mut settings = Settings::default();
    settings.backend = backend;
    settings.writer = Writer::Auto;
    settings.channels = channels;
    settings
}

fn memfd() -> File {
    let name = c"write-through";
    nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::empty())
        .unwrap()
        .into()
}

fn data(device: u32, index: u32, len: usize) -> Vec<u8> {
    vec![(index * 31 + device * 7 + 1).to_le_bytes()[0]; len]
}

/// Loads `devices` devices of `count` packets of `len` bytes over `channels` channels, the packets dealt out in
/// turn.
fn load(backend: Backend, devices: u32, channels: u32, count: u32, len: usize) -> Report {
    let mut builder = LoadSession::builder().settings(settings(backend, channels));
    let mut files = Vec::new();
    for number in 0..devices {
        let file = memfd();
        files.push(file.try_clone().unwrap());
        builder = builder.device(Mock::new(file).device(number));
    }
    let mut senders = Vec::new();
    for channel in 0..channels {
        let (mut near, far) = UnixStream::pair().unwrap();
        builder = builder.channel(far);
        senders.push(thread::spawn(move || {
            near.write_all(&hello(channel.to_le_bytes()[0])).unwrap();
            near.write_all(&sync()).unwrap();
            for number in 0..count * devices {
                if number % channels == channel {
                    let (index, device) = (number / devices, number % devices);
                    near.write_all(&packet(device, index, &data(device, index, len)))
                        .unwrap();
                }
            }
            if channel == 0 {
                for device in 0..devices {
                    near.write_all(&config_packet(device, count, b"c")).unwrap();
                }
            }
        }));
    }
    let session = builder.start().unwrap();
    session.switchover_start();
    senders
        .into_iter()
        .for_each(|sender| sender.join().unwrap());
    let report = session.join();
    report.result.as_ref().unwrap();
    for (number, mut file) in (0..devices).zip(files) {
        let mut got = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut got).unwrap();
        let whole: Vec<u8> = (0..count)
            .flat_map(|index| data(number, index, len))
            .collect();
        assert!(got == whole, "{backend}: device {number}");
    }
    assert_eq!(report.stats.late_wakeups, 0);
    report
}

#[test]
fn channels_write_in_order_and_the_rest_is_the_rings() {
    let _watchdog = Watchdog::new();
    let mut through = 0;
    for backend in [Backend::Uring, Backend::Blocking] {
        for (devices, channels) in [(1, 1), (1, 4), (8, 4)] {
            for (count, len) in [(300, 4 << 10), (100, 64 << 10), (12, 1 << 20)] {
                let report = load(backend, devices, channels, count, len);
                for device in &report.stats.devices {
                    assert!(device.written_through <= u64::from(count) * len as u64);
                    through += device.written_through;
                }
            }
        }
    }
    assert!(through > 0);
    println!("{through} bytes written through");
}

#[test]
fn a_pipe_that_is_full_is_the_io_threads_again() {
    let _watchdog = Watchdog::new();
    let (reader, writer) = io::pipe().unwrap();
    let (mut near, far) = UnixStream::pair().unwrap();
    let session = LoadSession::builder()
        .settings(settings(Backend::Auto, 1))
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
    report.devices.clear();
    let whole: Vec<u8> = (0..200).flat_map(|index| data(1, index, 4096)).collect();
    assert!(got.join().unwrap() == whole);
}
