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
    fmt, fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::errno::Errno;
use vfio_migration::{DeviceState, FdDevice};

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

/// A device whose state is read from `path`. It is STOPped, as one of a VM that does not run.
pub(crate) fn source(path: PathBuf) -> FdDevice {
    let len_of = path.clone();
    device(move |state| match state {
        DeviceState::Resuming => Err(Errno::EINVAL.into()),
        _ => {
            let file = state_files::open_regular(&path);
            Ok(file.map_err(|error| at(&path, error))?.into())
        }
    })
    .with_data_size(move || Ok(fs::metadata(&len_of)?.len()))
}

/// The same: its state is written.
pub(crate) fn destination(written: Written) -> FdDevice {
    let dropped = written.clone();
    device(move |state| match state {
        DeviceState::Resuming => written.create(),
        _ => Err(Errno::EINVAL.into()),
    })
    .on_reset(move || {
        drop(dropped.take());
        Ok(())
    })
}

fn device(open: impl FnMut(DeviceState) -> io::Result<OwnedFd> + Send + 'static) -> FdDevice {
    FdDevice::new(open)
        .stopped()
        // It never writes to another device.
        .with_p2p()
        .with_config(
            |_writer| Ok(()),
            |reader| io::copy(reader, &mut io::sink()).map(drop),
        )
}
