//! A device whose state is a file: read from it on a source, written to it on a destination.
//!
//! ```text
//!                     open PATH                               create a file without a name
//!   RUNNING, STOP ──────────────▶ STOP_COPY      RUNNING, STOP ─────────────────────▶ RESUMING
//!        ▲                            │                ▲   written: kept for the command  │
//!        └────────────────────────────┘                └──────────────────────────────────┘
//!                                                         reset, drop: gone
//! ```
//!
//! What was written gets its name when the whole migration has passed its last check
//! ([`state_files::publish`]): so PATH is never half written. A device of this kind takes a config of
//! any kind and keeps none of it, and saves an empty one. The calls are made on the device's thread,
//! one at a time; the command takes the file out of [`Written`] when the session is over.

use std::{
    fmt, fs,
    io::{self, Read},
    os::fd::{BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::errno::Errno;
use vfio_migration::{DeviceState, MigrationDevice, MigrationFlags, PrecopyInfo};

use crate::state_files::{self, StateFile, Target};

/// What a device's destination has written, and where it shall be.
#[derive(Clone, Debug)]
pub(crate) struct Written {
    target: Arc<Target>,
    file: Arc<Mutex<Option<StateFile>>>,
}

impl Written {
    pub(crate) fn new(target: Target) -> Self {
        Self {
            target: Arc::new(target),
            file: Arc::default(),
        }
    }

    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    /// The file, if one was written. It is the command's from then on.
    pub(crate) fn take(&self) -> Option<StateFile> {
        self.lock().take()
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Option<StateFile>> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins anew.
    fn create(&self) -> io::Result<OwnedFd> {
        let file = self.target.create();
        let file = file.map_err(|error| at(self.target.path(), error))?;
        let fd = file.file().try_clone()?;
        *self.lock() = Some(file);
        Ok(fd.into())
    }
}

/// Says which file it was.
fn at(path: &Path, error: io::Error) -> io::Error {
    let path = path.into();
    io::Error::new(error.kind(), At { path, error })
}

/// A file's failure, which keeps its errno.
#[derive(Debug)]
struct At {
    path: PathBuf,
    error: io::Error,
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

impl std::error::Error for At {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

/// Where the state is.
#[derive(Debug)]
enum End {
    Source(PathBuf),
    Destination(Written),
}

/// A device whose state is a file.
#[derive(Debug)]
pub(crate) struct FileDevice {
    end: End,
    state: DeviceState,
}

impl FileDevice {
    /// A device that is STOPped, as one of a VM that does not run: its state is read from `path`.
    pub(crate) const fn source(path: PathBuf) -> Self {
        Self {
            end: End::Source(path),
            state: DeviceState::Stop,
        }
    }

    /// The same: its state is written.
    pub(crate) const fn destination(written: Written) -> Self {
        Self {
            end: End::Destination(written),
            state: DeviceState::Stop,
        }
    }
}

impl MigrationDevice for FileDevice {
    fn flags(&self) -> io::Result<MigrationFlags> {
        // It never writes to another device.
        Ok(MigrationFlags::STOP_COPY | MigrationFlags::P2P)
    }

    fn state(&self) -> io::Result<DeviceState> {
        Ok(self.state)
    }

    fn set_state(&mut self, new: DeviceState) -> io::Result<Option<OwnedFd>> {
        use DeviceState::{Resuming, Running, RunningP2p, Stop, StopCopy};
        let fd = match (self.state, new) {
            (Running | RunningP2p | Stop, StopCopy) => match &self.end {
                End::Source(path) => {
                    let file = state_files::open_regular(path);
                    Some(file.map_err(|error| at(path, error))?.into())
                }
                End::Destination(_) => return Err(Errno::EINVAL.into()),
            },
            (Running | RunningP2p | Stop, Resuming) => match &self.end {
                End::Source(_) => return Err(Errno::EINVAL.into()),
                End::Destination(written) => Some(written.create()?),
            },
            (Running | RunningP2p | Stop | StopCopy | Resuming, Running | RunningP2p | Stop) => {
                None
            }
            (from, to) if from == to => None,
            _ => return Err(Errno::EINVAL.into()),
        };
        self.state = new;
        Ok(fd)
    }

    fn reset(&mut self) -> io::Result<()> {
        if let End::Destination(written) = &self.end {
            drop(written.take());
        }
        self.state = DeviceState::Running;
        Ok(())
    }

    fn data_size(&self) -> io::Result<u64> {
        match &self.end {
            End::Source(path) => Ok(fs::metadata(path)?.len()),
            End::Destination(_) => Err(Errno::ENOTTY.into()),
        }
    }

    fn precopy_info(&self, _fd: BorrowedFd<'_>) -> io::Result<PrecopyInfo> {
        Err(Errno::EINVAL.into())
    }

    fn load_config(&mut self, reader: &mut dyn Read) -> io::Result<()> {
        io::copy(reader, &mut io::sink()).map(drop)
    }
}
