//! The same device as the engine gets it, with a config that a test can look at, and a pair of them.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::AsFd,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use vfio_migration::{Backend, Device, DeviceId, DeviceState, Settings, vfio, wire};

use crate::kernel::Kernel;

/// What the VMM would keep of it.
#[derive(Clone)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl vfio::Config for Kept {
    fn save(&mut self, writer: &mut dyn Write) -> io::Result<()> {
        writer.write_all(&self.0.lock().unwrap())
    }

    fn load(&mut self, reader: &mut dyn Read) -> io::Result<()> {
        let mut config = self.0.lock().unwrap();
        config.clear();
        reader.read_to_end(&mut config)?;
        Ok(())
    }
}

/// A device that a test looks at from outside, while the engine has it or not.
pub struct Subject {
    /// The kernel's view.
    pub kernel: Arc<Kernel>,
    /// What is, or was loaded as, its config.
    pub config: Arc<Mutex<Vec<u8>>>,
    /// Its name on the wire.
    pub id: DeviceId,
}

impl Subject {
    /// The guest's device of this number, made anew, filled with what `seed` says. `name` is the
    /// same on both sides of a migration.
    pub fn open(number: usize, name: u32, seed: u8) -> Self {
        let kernel = Kernel::open(number);
        kernel.fill(seed);
        Self {
            kernel,
            config: Arc::new(Mutex::new(vec![seed; 100])),
            id: DeviceId::new(format!("0000:00:{name:02x}.0/vfio"), 0).unwrap(),
        }
    }

    /// It, for the engine.
    pub fn device(&self) -> Device {
        let config = Box::new(Kept(self.config.clone()));
        let inner = vfio::VfioDevice::new(self.kernel.fd()).with_config(config);
        Device::new(self.id.clone(), Box::new(inner)).unwrap()
    }

    /// That the engine's device stands where the kernel's does, and that this is `state`.
    pub fn assert_in(&self, device: &Device, state: DeviceState) {
        assert_eq!((device.state(), self.kernel.state()), (state, state));
    }
}

/// A source and a destination of different states.
pub fn pair() -> (Subject, Subject) {
    (Subject::open(1, 1, 0xa0), Subject::open(2, 1, 0x33))
}

/// How a load's small packets, where several are ready, come to the driver.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Small {
    /// As a linked chain, a write for each: the budget is too small for anything else.
    Chained,
    /// In one write.
    Gathered,
}

/// Settings for little devices.
pub fn settings(backend: Backend, small: Small, data_len: usize) -> Settings {
    let mut settings = Settings::default();
    settings.backend = backend;
    settings.budget = Some(match small {
        Small::Chained => 1 << 20,
        Small::Gathered => 8 << 20,
    });
    settings.data_len = Some(data_len);
    settings.no_progress = Duration::from_secs(30);
    settings
}

/// A data packet's payload.
pub fn data(index: u32, bytes: &[u8]) -> Vec<u8> {
    payload(index, false, bytes)
}

/// A config packet's payload.
pub fn config(index: u32, bytes: &[u8]) -> Vec<u8> {
    payload(index, true, &wire::wrap_config(bytes))
}

fn payload(index: u32, config: bool, bytes: &[u8]) -> Vec<u8> {
    let mut payload = wire::PacketHeader { index, config }.encode().to_vec();
    payload.extend(bytes);
    payload
}

/// Waits until `condition` holds; the guest is slow, and time is no part of any condition.
pub fn until(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "it never comes");
        thread::sleep(Duration::from_millis(2));
    }
}

/// A file over a copy of this descriptor.
pub fn file(fd: impl AsFd) -> File {
    fd.as_fd().try_clone_to_owned().unwrap().into()
}
