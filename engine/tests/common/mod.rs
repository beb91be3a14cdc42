//! What several tests share: a device over pipes with hooks, a source's bytes, a watchdog.
#![allow(dead_code, reason = "no test uses all of it")]

use std::{
    io::{self, PipeReader, Read, Write},
    os::fd::OwnedFd,
    sync::{Arc, Mutex, mpsc},
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::errno::Errno;
use vfio_migration::{
    Device, DeviceId, DeviceState, FdDevice,
    wire::{self, DeviceKey, Hello, PageSize, encode_packet, encode_sync, wrap_config},
};

pub fn id(number: u32) -> DeviceId {
    DeviceId::new(format!("0000:00:{number:02x}.0/vfio"), 0).unwrap()
}

/// What a mock's callbacks have been asked.
#[derive(Debug, Default)]
pub struct Log {
    pub states: Vec<DeviceState>,
    pub resets: u32,
    pub config: Vec<u8>,
}

type Load = Box<dyn FnMut(&mut dyn Read) -> io::Result<()> + Send>;
type Save = Box<dyn FnMut(&mut dyn Write) -> io::Result<()> + Send>;
type Set = Box<dyn FnMut(DeviceState) -> io::Result<()> + Send>;

/// A device whose data fd the test has made, for one session.
pub struct Mock {
    fd: OwnedFd,
    pub log: Arc<Mutex<Log>>,
    pub load: Option<Load>,
    pub save: Option<Save>,
    pub set: Option<Set>,
}

impl Mock {
    pub fn new(fd: impl Into<OwnedFd>) -> Self {
        Self {
            fd: fd.into(),
            log: Arc::default(),
            load: None,
            save: None,
            set: None,
        }
    }

    pub fn device(self, number: u32) -> Device {
        let Self { fd, log, .. } = self;
        let mut fd = Some(fd);
        let mut set = self.set.unwrap_or_else(|| Box::new(|_state| Ok(())));
        let (states, resets) = (log.clone(), log.clone());
        let save = self
            .save
            .unwrap_or_else(|| Box::new(|writer| writer.write_all(b"config")));
        let load = self.load.unwrap_or_else(|| {
            Box::new(move |reader| {
                let mut config = Vec::new();
                reader.read_to_end(&mut config)?;
                log.lock().unwrap().config = config;
                Ok(())
            })
        });
        let device = FdDevice::new(move |_state| fd.take().ok_or(Errno::EBADF.into()))
            .with_data_size(|| Ok(1 << 20))
            .with_config(save, load)
            .on_change(move |_from, to| {
                set(to)?;
                states.lock().unwrap().states.push(to);
                Ok(())
            })
            .on_reset(move || {
                resets.lock().unwrap().resets += 1;
                Ok(())
            });
        Device::new(id(number), Box::new(device)).unwrap()
    }
}

/// Reads a pipe to its end, on a thread of its own.
pub fn collect(mut reader: PipeReader) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

/// Aborts the process where a test has not ended after a minute. It counts its own wake-ups rather than
/// the clock's time, so that a machine that stands still ends no test.
pub struct Watchdog(#[expect(dead_code, reason = "its end is what counts")] mpsc::Sender<()>);

impl Watchdog {
    pub fn new() -> Self {
        let (alive, ended) = mpsc::channel();
        let test = thread::current().name().unwrap_or("a test").to_owned();
        thread::spawn(move || {
            for _ in 0..600 {
                let tick = ended.recv_timeout(Duration::from_millis(100));
                if tick != Err(mpsc::RecvTimeoutError::Timeout) {
                    return;
                }
            }
            eprintln!("{test} hangs");
            std::process::abort();
        });
        Self(alive)
    }
}

pub fn hello(number: u8) -> Vec<u8> {
    Hello {
        uuid: [0; 16],
        id: number,
    }
    .encode()
    .to_vec()
}

pub fn sync() -> Vec<u8> {
    encode_sync(PageSize::new(4096).unwrap(), 0)
}

/// A device-state packet, all of it.
pub fn packet(device: u32, index: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    let mut bytes = encode_packet(&DeviceKey::new(&id(device)), index, false, len).to_vec();
    bytes.extend(data);
    bytes
}

/// A config packet, its framing tags included.
pub fn config_packet(device: u32, index: u32, config: &[u8]) -> Vec<u8> {
    raw_config_packet(device, index, &wrap_config(config))
}

/// A config packet of these bytes.
pub fn raw_config_packet(device: u32, index: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    let mut bytes = encode_packet(&DeviceKey::new(&id(device)), index, true, len).to_vec();
    bytes.extend(data);
    bytes
}

/// A packet's payload as a peer's handler gets it: 12 bytes of header, then data.
pub fn payload(index: u32, config: bool, data: &[u8]) -> Vec<u8> {
    let mut bytes = wire::PacketHeader { index, config }.encode().to_vec();
    bytes.extend(data);
    bytes
}

/// The engine's threads and the process's open files. (The test harness has threads of its own.)
pub fn leftovers() -> (usize, usize) {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let engine = tasks.filter_map(Result::ok).filter(|task| {
        let name = std::fs::read_to_string(task.path().join("comm"));
        name.is_ok_and(|name| name.starts_with("vfio-mig") || name.starts_with("uring-"))
    });
    let files = std::fs::read_dir("/proc/self/fd").unwrap();
    (engine.count(), files.count())
}
