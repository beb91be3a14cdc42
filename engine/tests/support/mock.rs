//! A device over pipes, with hooks.

use std::{
    io::{self, Read, Write},
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
};

use nix::errno::Errno;
use vfio_migration::{Device, DeviceState, FdDevice};

use crate::names::id;

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
