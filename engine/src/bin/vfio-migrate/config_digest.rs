//! Looks over a device's shoulder: keeps the digest of the config that it saved or loaded.
//!
//! ```text
//!   Device ──▶ DigestingDevice ──▶ the device itself
//!                 │ save_config, load_config
//!                 ▼
//!             ConfigDigest ◀── the command, when the migration is over
//! ```
//!
//! Everything else is handed on as it is. The calls are made on the device's thread.

use std::{
    io::{self, Read, Write},
    os::fd::{BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
};

use sha2::{Digest, Sha256};
use vfio_migration::{
    DeviceState, MigrationDevice, MigrationFlags, PrecopyInfo, StateEvent, wire::Tag,
};

/// A config as it stands in its packet: framing tags included.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) bytes: u64,
    pub(crate) sha256: [u8; 32],
}

/// The config that a device has saved or loaded last.
#[derive(Clone, Debug, Default)]
pub(crate) struct ConfigDigest(Arc<Mutex<Option<Config>>>);

impl ConfigDigest {
    /// It, if there was one.
    pub(crate) fn get(&self) -> Option<Config> {
        let config = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        config.clone()
    }

    fn set(&self, config: Config) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(config);
    }
}

/// A device under observation.
pub(crate) struct DigestingDevice {
    inner: Box<dyn MigrationDevice>,
    seen: ConfigDigest,
}

impl DigestingDevice {
    pub(crate) fn new(inner: Box<dyn MigrationDevice>, seen: ConfigDigest) -> Self {
        Self { inner, seen }
    }
}

/// Counts and digests what passes.
struct Tee<T> {
    inner: T,
    bytes: u64,
    digest: Sha256,
}

impl<T> Tee<T> {
    fn new(inner: T) -> Self {
        let mut tee = Self {
            inner,
            bytes: 0,
            digest: Sha256::new(),
        };
        tee.pass(&Tag::Config.encode());
        tee
    }

    fn pass(&mut self, bytes: &[u8]) {
        self.digest.update(bytes);
        self.bytes += bytes.len() as u64;
    }

    fn finish(mut self) -> Config {
        self.pass(&Tag::EndOfState.encode());
        Config {
            bytes: self.bytes,
            sha256: self.digest.finalize().into(),
        }
    }
}

impl Read for Tee<&mut dyn Read> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(bytes)?;
        self.pass(&bytes[..count]);
        Ok(count)
    }
}

impl Write for Tee<&mut dyn Write> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.pass(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl MigrationDevice for DigestingDevice {
    fn flags(&self) -> io::Result<MigrationFlags> {
        self.inner.flags()
    }

    fn state(&self) -> io::Result<DeviceState> {
        self.inner.state()
    }

    fn set_state(&mut self, new: DeviceState) -> io::Result<Option<OwnedFd>> {
        self.inner.set_state(new)
    }

    fn reset(&mut self) -> io::Result<()> {
        self.inner.reset()
    }

    fn data_size(&self) -> io::Result<u64> {
        self.inner.data_size()
    }

    fn precopy_info(&self, fd: BorrowedFd<'_>) -> io::Result<PrecopyInfo> {
        self.inner.precopy_info(fd)
    }

    fn enable_precopy_info_v2(&mut self) -> io::Result<()> {
        self.inner.enable_precopy_info_v2()
    }

    fn read_precopy(&mut self, fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read_precopy(fd, buffer)
    }

    fn save_config(&mut self, writer: &mut dyn Write) -> io::Result<()> {
        let mut tee = Tee::new(writer);
        self.inner.save_config(&mut tee)?;
        self.seen.set(tee.finish());
        Ok(())
    }

    fn load_config(&mut self, reader: &mut dyn Read) -> io::Result<()> {
        let mut tee = Tee::new(reader);
        self.inner.load_config(&mut tee)?;
        self.seen.set(tee.finish());
        Ok(())
    }

    fn event(&mut self, event: StateEvent) {
        self.inner.event(event);
    }
}
