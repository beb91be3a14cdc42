//! A device whose state is a file: read from it on a source, written to it on a destination.
//!
//! ```text
//!                     open PATH                                    create PATH.partial
//!   RUNNING, STOP ──────────────▶ STOP_COPY      RUNNING, STOP ────────────────────────▶ RESUMING
//!        ▲                            │                ▲  sync, rename to PATH              │
//!        └────────────────────────────┘                └───────────────────────────────────┘
//!                                                         reset, drop: remove it
//! ```
//!
//! So PATH is never half written. It takes a config of any kind and keeps none of it, and saves an
//! empty one. The calls are made on the device's thread, one at a time.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::fd::{BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::errno::Errno;
use vfio_migration::{DeviceState, MigrationDevice, MigrationFlags, PrecopyInfo};

/// A device whose state is a file.
#[derive(Debug)]
pub(crate) struct FileDevice {
    path: PathBuf,
    state: DeviceState,
    /// What is being written, in RESUMING.
    partial: Option<File>,
}

impl FileDevice {
    /// A device that is STOPped, as one of a VM that does not run.
    pub(crate) const fn new(path: PathBuf) -> Self {
        Self {
            path,
            state: DeviceState::Stop,
            partial: None,
        }
    }

    fn partial_path(&self) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(".partial");
        path.into()
    }

    /// Puts what was written in its place.
    fn keep(&mut self) -> io::Result<()> {
        let Some(file) = &self.partial else {
            return Ok(());
        };
        file.sync_all()?;
        fs::rename(self.partial_path(), &self.path)?;
        self.partial = None;
        // The new name is as good as written only when the directory is.
        let directory = self.path.parent().filter(|path| *path != Path::new(""));
        File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
    }

    fn discard(&mut self) {
        if self.partial.take().is_some() {
            // It has no use; it can as well stay.
            let _gone = fs::remove_file(self.partial_path());
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
            (Running | RunningP2p | Stop, StopCopy) => Some(File::open(&self.path)?.into()),
            (Running | RunningP2p | Stop, Resuming) => {
                let file = File::create(self.partial_path())?;
                let fd = file.try_clone()?;
                self.partial = Some(file);
                Some(fd.into())
            }
            (Resuming, Running | RunningP2p | Stop) => {
                self.keep()?;
                None
            }
            (Running | RunningP2p | Stop | StopCopy, Running | RunningP2p | Stop) => None,
            (from, to) if from == to => None,
            _ => return Err(Errno::EINVAL.into()),
        };
        self.state = new;
        Ok(fd)
    }

    fn reset(&mut self) -> io::Result<()> {
        self.discard();
        self.state = DeviceState::Running;
        Ok(())
    }

    fn data_size(&self) -> io::Result<u64> {
        Ok(fs::metadata(&self.path)?.len())
    }

    fn precopy_info(&self, _fd: BorrowedFd<'_>) -> io::Result<PrecopyInfo> {
        Err(Errno::EINVAL.into())
    }

    fn load_config(&mut self, reader: &mut dyn Read) -> io::Result<()> {
        io::copy(reader, &mut io::sink()).map(drop)
    }
}

impl Drop for FileDevice {
    fn drop(&mut self) {
        self.discard();
    }
}
