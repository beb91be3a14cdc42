//! What the main channel says of a load's devices: the calls of the thread that reads it.
//!
//! ```text
//!   write_iterable()… ─▶ switchover_start() ─▶ config_load_ready()
//!   start_early() ─▶ wait_written()      where PRE_COPY data comes over the channels too
//! ```
//!
//! None of it runs on a device's thread. What ends a wait: in a write, the device's driver; for packets to
//! be written, those, the load's end, or the time without progress.

use std::time::Duration;

use vfio_migration_uring::deadline;

use super::{Load, LoadDevice};
use crate::{
    device::write_all,
    error::{Error, ErrorKind, Phase, Result, Violation},
    settings::ConfigGate,
    sync::{atomic::Ordering, lock},
    wire,
};

impl Load {
    /// The switchover starts: all iterable data is in the devices.
    pub(super) fn switchover_start(&self) {
        for device in self.devices() {
            let mut iterable = lock(&device.iterable);
            drop(iterable.take());
            let switched = device.flags.switch();
            let wake = device.flags.start() || switched;
            drop(iterable);
            if wake {
                self.io.wake();
            }
        }
    }

    /// All of the device's data comes over the channels, what was read in PRE_COPY too: the I/O thread may
    /// write what comes before the switchover, but for the config.
    pub(super) fn start_early(&self, device: &LoadDevice) {
        let mut iterable = lock(&device.iterable);
        drop(iterable.take());
        let started = device.flags.start();
        drop(iterable);
        if started {
            self.io.wake();
        }
    }

    /// Waits until the first `count` packets are in the device. Ends with that, the load's end, or a
    /// time without progress.
    pub(super) fn wait_written(
        &self,
        device: &LoadDevice,
        count: u32,
        no_progress: Duration,
    ) -> Result<()> {
        let mut before = 0;
        loop {
            let deadline = Some(deadline(no_progress));
            let mut written = 0;
            let ended = device.progress.wait(deadline, || {
                // Acquire: with the I/O thread's release.
                written = device.written.load(Ordering::Acquire);
                if written >= count {
                    return Some(Ok(()));
                }
                let ended = device.flags.stop().is_some() || device.flags.is_drained();
                ended.then(|| {
                    let aborted = || Error::aborted(Phase::Section).on_device(&device.id);
                    Err(self.failure().unwrap_or_else(aborted))
                })
            });
            match ended {
                Some(result) => return result,
                // Ends: the count rises each time.
                None if written > before => before = written,
                None => {
                    let missing = "packets of PRE_COPY data that were said to be sent";
                    return Err(Error::stalled(Phase::Section, missing)
                        .on_device(&device.id)
                        .at_index(written));
                }
            }
        }
    }

    /// The device's config may be loaded. Refuses the notice where none is awaited, or a second one, which
    /// fails the load.
    pub(super) fn config_load_ready(&self, device: &LoadDevice) -> Result<()> {
        if device.rules.config_gate == ConfigGate::OnNotice && device.flags.config_ready() {
            return Ok(());
        }
        let tag = wire::Tag::ConfigLoadReady.value();
        let error = Error::protocol(Violation::SectionTag(tag))
            .in_phase(Phase::Section)
            .on_device(&device.id);
        self.fail(error.clone());
        Err(error)
    }
}

impl LoadDevice {
    /// Writes iterable data into the device: in the caller's thread, and only before the switchover starts.
    pub(super) fn write_iterable(&self, bytes: &[u8]) -> Result<()> {
        let fd = lock(&self.iterable);
        let Some(fd) = &*fd else {
            let error = Error::misuse(Phase::Section, "iterable data outside setup and switchover");
            return Err(error.on_device(&self.id));
        };
        write_all(fd, bytes).map_err(|error| {
            Error::new(ErrorKind::Device, Phase::Section)
                .on_device(&self.id)
                .caused_by(error)
        })?;
        self.counters.main_bytes.add(bytes.len() as u64);
        Ok(())
    }
}
