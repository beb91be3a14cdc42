//! A device over a small pipe, whose other end the target drains when it likes.

use std::{
    io::{self, PipeReader, Read, Write},
    os::fd::{BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use vfio_migration::{Device, DeviceId, DeviceState, MigrationDevice, MigrationFlags, PrecopyInfo};

/// What has reached a device.
#[derive(Debug, Default)]
pub struct Got {
    /// The bytes on its data fd, as far as they were drained.
    pub bytes: Vec<u8>,
    /// Its config.
    pub config: Option<Vec<u8>>,
    /// Its states, in turn.
    pub states: Vec<DeviceState>,
    /// How often it was reset.
    pub resets: u32,
}

/// A target's end of a device.
#[derive(Clone, Debug)]
pub struct Drain {
    id: DeviceId,
    reader: Arc<Mutex<Option<PipeReader>>>,
    got: Arc<Mutex<Got>>,
}

impl Drain {
    /// The device's name.
    #[must_use]
    pub const fn id(&self) -> &DeviceId {
        &self.id
    }

    /// What has reached the device.
    pub fn got(&self) -> MutexGuard<'_, Got> {
        self.got.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes `most` bytes at most out of the pipe. Returns how many there were.
    ///
    /// # Panics
    ///
    /// Where a pipe fails.
    pub fn drain(&self, most: usize) -> usize {
        let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(pipe) = &mut *reader else {
            return 0;
        };
        let mut bytes = vec![0; most];
        match pipe.read(&mut bytes) {
            Ok(0) => {
                *reader = None;
                0
            }
            Ok(count) => {
                self.got().bytes.extend(&bytes[..count]);
                count
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => panic!("a pipe: {error}"),
        }
    }
}

/// The session's end of a device.
struct Piped {
    state: DeviceState,
    drain: Drain,
    config: Loader,
}

/// What a device does with its config.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Loader {
    /// Loads it.
    Good,
    /// Takes its first byte alone.
    Short,
    /// Refuses it.
    Refuses,
}

/// A device of this name. Both ends of it.
///
/// # Panics
///
/// Where the name is none.
pub fn device(id: &DeviceId, config: Loader) -> (Device, Drain) {
    let drain = Drain {
        id: id.clone(),
        reader: Arc::default(),
        got: Arc::default(),
    };
    let piped = Piped {
        state: DeviceState::Running,
        drain: drain.clone(),
        config,
    };
    let device = Device::new(id.clone(), Box::new(piped)).expect("it answers");
    (device, drain)
}

impl MigrationDevice for Piped {
    fn flags(&self) -> io::Result<MigrationFlags> {
        Ok(MigrationFlags::STOP_COPY)
    }

    fn state(&self) -> io::Result<DeviceState> {
        Ok(self.state)
    }

    fn set_state(&mut self, new: DeviceState) -> io::Result<Option<OwnedFd>> {
        self.state = new;
        self.drain.got().states.push(new);
        if new != DeviceState::Resuming {
            return Ok(None);
        }
        let (reader, writer) = io::pipe()?;
        let flags = nix::fcntl::OFlag::O_NONBLOCK;
        nix::fcntl::fcntl(&reader, nix::fcntl::FcntlArg::F_SETFL(flags))?;
        nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096))?;
        let mut place = self.drain.reader.lock().expect("nobody panics with it");
        *place = Some(reader);
        Ok(Some(writer.into()))
    }

    fn reset(&mut self) -> io::Result<()> {
        self.state = DeviceState::Running;
        self.drain.got().resets += 1;
        Ok(())
    }

    fn data_size(&self) -> io::Result<u64> {
        Ok(1 << 20)
    }

    fn precopy_info(&self, _fd: BorrowedFd<'_>) -> io::Result<PrecopyInfo> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn save_config(&mut self, _writer: &mut dyn Write) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn load_config(&mut self, reader: &mut dyn Read) -> io::Result<()> {
        if self.config == Loader::Short {
            return reader.read_exact(&mut [0]);
        }
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes)?;
        match self.config {
            Loader::Refuses => return Err(io::ErrorKind::InvalidData.into()),
            Loader::Good | Loader::Short => {}
        }
        let mut got = self.drain.got();
        assert!(got.config.is_none(), "a config is loaded once");
        got.config = Some(bytes);
        Ok(())
    }
}
