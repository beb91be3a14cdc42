//! A device over a small pipe, whose other end the target drains when it likes; or over a memory file, which
//! takes all at once, and which channels may write to.

use std::{
    fs::File,
    io::{self, PipeReader, Read},
    os::unix::fs::FileExt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use vfio_migration::{Device, DeviceId, DeviceState, FdDevice};

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

/// What the target reads.
#[derive(Debug)]
enum Side {
    Pipe(PipeReader),
    Memory(File),
}

impl Side {
    /// Reads on behind so many bytes.
    fn read(&mut self, bytes: &mut [u8], at: usize) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => pipe.read(bytes),
            Self::Memory(file) => match file.read_at(bytes, at as u64)? {
                // There may be more later.
                0 => Err(io::ErrorKind::WouldBlock.into()),
                count => Ok(count),
            },
        }
    }
}

/// A target's end of a device.
#[derive(Clone, Debug)]
pub struct Drain {
    id: DeviceId,
    reader: Arc<Mutex<Option<Side>>>,
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
        let at = self.got().bytes.len();
        match pipe.read(&mut bytes, at) {
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

/// A device of this name, over a memory file or a pipe. Both ends of it.
///
/// # Panics
///
/// Where the name is none.
pub fn device(id: &DeviceId, config: Loader, in_memory: bool) -> (Device, Drain) {
    let drain = Drain {
        id: id.clone(),
        reader: Arc::default(),
        got: Arc::default(),
    };
    let (opens, changes, resets, loads) =
        (drain.clone(), drain.clone(), drain.clone(), drain.clone());
    let piped = FdDevice::new(move |_state| {
        if in_memory {
            let file = nix::sys::memfd::memfd_create(c"fuzzed", nix::sys::memfd::MFdFlags::empty())?;
            let file = File::from(file);
            let side = Side::Memory(file.try_clone()?);
            *opens.reader.lock().expect("nobody panics with it") = Some(side);
            return Ok(file.into());
        }
        let (reader, writer) = io::pipe()?;
        let flags = nix::fcntl::OFlag::O_NONBLOCK;
        nix::fcntl::fcntl(&reader, nix::fcntl::FcntlArg::F_SETFL(flags))?;
        nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096))?;
        *opens.reader.lock().expect("nobody panics with it") =
            Some(Side::Pipe(reader));
        Ok(writer.into())
    })
    .on_change(move |_from, to| {
        changes.got().states.push(to);
        Ok(())
    })
    .on_reset(move || {
        resets.got().resets += 1;
        Ok(())
    })
    .with_config(
        |_writer| Err(io::ErrorKind::Unsupported.into()),
        move |reader| load(config, reader, &loads),
    );
    let device = Device::new(id.clone(), Box::new(piped)).expect("it answers");
    (device, drain)
}

/// What a device of this kind does with its config.
fn load(config: Loader, reader: &mut dyn Read, drain: &Drain) -> io::Result<()> {
    if config == Loader::Short {
        return reader.read_exact(&mut [0]);
    }
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes)?;
    match config {
        Loader::Refuses => return Err(io::ErrorKind::InvalidData.into()),
        Loader::Good | Loader::Short => {}
    }
    let mut got = drain.got();
    assert!(got.config.is_none(), "a config is loaded once");
    got.config = Some(bytes);
    Ok(())
}
