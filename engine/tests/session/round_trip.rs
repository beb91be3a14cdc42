//! State and config cross from a source to a destination, whole, whatever the shape.

use std::os::unix::net::UnixStream;

use vfio_migration::{
    Backend, Device, DeviceId, LoadSession, Report, SaveSession, Settings,
    sim::{SimConfig, SimDevice, SimHandle, Stream},
};

#[derive(Debug)]
struct Shape {
    devices: u32,
    len: u64,
    channels: u32,
    data_len: Option<usize>,
    budget: Option<usize>,
    backend: Backend,
    stream: Stream,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            devices: 2,
            len: 5 << 20,
            channels: 2,
            data_len: None,
            budget: None,
            backend: Backend::Auto,
            stream: Stream::Pipe,
        }
    }
}

fn device(number: u32, config: SimConfig) -> (Device, SimHandle) {
    let sim = SimDevice::new(config).unwrap();
    let handle = sim.handle();
    let id = DeviceId::new(format!("0000:00:{number:02x}.0/vfio"), 0).unwrap();
    (Device::new(id, Box::new(sim)).unwrap(), handle)
}

fn round_trip(shape: &Shape) -> (Report, Report) {
    let mut settings = Settings::default();
    settings.backend = shape.backend;
    settings.budget = shape.budget;
    settings.data_len = shape.data_len;
    let mut load = LoadSession::builder().settings(settings.clone());
    let mut save = SaveSession::builder().settings(settings);
    let mut handles = Vec::new();
    for number in 0..shape.devices {
        let config = |seed| SimConfig {
            seed,
            len: shape.len,
            stream: shape.stream,
            ..SimConfig::default()
        };
        let (source, saved) = device(number, config(u64::from(number) + 1));
        let (destination, loaded) = device(number, config(100));
        save = save.device(source);
        load = load.device(destination);
        handles.push((saved, loaded));
    }
    for _ in 0..shape.channels {
        let (near, far) = UnixStream::pair().unwrap();
        save = save.channel(near);
        load = load.channel(far);
    }
    let load = load.start().unwrap();
    let save = save.start().unwrap();
    load.switchover_start();
    let saved = save.join();
    let loaded = load.join();
    saved.result.as_ref().unwrap();
    loaded.result.as_ref().unwrap();
    for (source, destination) in handles {
        assert_eq!(
            source.digest(),
            destination.digest(),
            "{shape:?} {:?}",
            loaded.stats.devices
        );
        assert_eq!(source.config_digest(), destination.config_digest());
        assert!(destination.has_loaded());
    }
    assert_eq!(saved.stats.late_wakeups + loaded.stats.late_wakeups, 0);
    (saved, loaded)
}

#[test]
fn the_defaults() {
    let (saved, loaded) = round_trip(&Shape::default());
    for (sent, received) in saved.stats.devices.iter().zip(&loaded.stats.devices) {
        assert_eq!(sent.packets, received.packets);
        assert_eq!(sent.bytes, received.bytes);
        assert_eq!((sent.queued, received.queued), (0, 0));
    }
}

#[test]
fn every_backend_stream_and_size() {
    for backend in [Backend::Uring, Backend::Blocking] {
        for stream in [
            Stream::Pipe,
            Stream::Socket,
            Stream::PlainWrite,
            Stream::Memfd,
        ] {
            for (len, data_len) in [
                (0, None),
                (1, None),
                (1 << 20, Some(4 << 10)),
                (3 << 20, None),
            ] {
                let _reports = round_trip(&Shape {
                    backend,
                    stream,
                    len,
                    data_len,
                    ..Shape::default()
                });
            }
        }
    }
}

#[test]
fn one_packet_of_budget_for_each_device() {
    for data_len in [4 << 10, 64 << 10, 1 << 20] {
        for channels in [1, 4] {
            let _reports = round_trip(&Shape {
                devices: 4,
                channels,
                data_len: Some(data_len),
                budget: Some(4 * data_len + 4096),
                len: 20 * data_len as u64,
                ..Shape::default()
            });
        }
    }
}
