//! The destination when every device is loaded: the VM may start now, or never will.
//!
//! ```text
//!   Loaded, in RESUMING ─┬─ vm::start() ─▶ the verdict ─▶ join()    the devices, RUNNING
//!                        └─ abort(), or a drop                      reset and stopped
//! ```
//!
//! One thread owns a [`Loaded`]. `join` waits for the channels' end, within the session's time without
//! progress.

use std::fmt;

use super::{
    MigratableDevice, at_once,
    incoming_member::{Member, merge},
};
use crate::{
    error::{Failed, Result},
    load::LoadSession,
    state::DeviceState,
    stats::Stats,
};

/// All devices of a VM on the destination, loaded, in RESUMING: the VM may start.
///
/// The first step of [`vm::start`](super::vm::start) has each driver check what was loaded, unless
/// [`Settings::stop_after_load`](crate::Settings) had it check before: then the devices are in STOP.
/// So the source is told that all is loaded after the start, and told that it failed where the start
/// does: every device is reset and stopped then. A VM that stands is not started: there the drivers
/// check before, the source is told after [`Incoming::finish`](super::Incoming::finish), and
/// [`Loaded::join`] comes next.
///
/// Dropping it before the VM has started resets and stops the devices, as [`Loaded::abort`] does.
#[must_use = "it holds the VM's devices"]
pub struct Loaded {
    pub(super) devices: Vec<MigratableDevice>,
    pub(super) members: Vec<Member>,
    pub(super) session: Option<LoadSession>,
}

impl Loaded {
    /// The devices, for [`vm::start`](super::vm::start).
    pub fn devices_mut(&mut self) -> &mut [MigratableDevice] {
        &mut self.devices
    }

    /// The counters as they are; with what the VM's start has taken, once it has been.
    #[must_use]
    pub fn stats(&self) -> Stats {
        merge(&self.members, self.session.as_ref(), &self.devices)
    }

    /// Waits for the channels' end, which a source may make only when it knows that all is loaded,
    /// and gives the devices back. Ends with that, or with the session's time without progress.
    ///
    /// Devices in STOP, of a VM that stands, are the VM's from then on as if it had started: their
    /// drivers have checked them, and nobody else has its state. A later start that fails resets
    /// those that refuse, and no other.
    ///
    /// # Errors
    ///
    /// What a channel has failed with since. The devices are loaded nevertheless, and come along.
    pub fn join(mut self) -> Result<Vec<MigratableDevice>, Failed<Vec<MigratableDevice>>> {
        let result = self
            .session
            .take()
            .map_or(Ok(()), |session| session.join().result);
        let mut devices = std::mem::take(&mut self.devices);
        for migratable in &mut devices {
            if migratable.state() == DeviceState::Stop {
                migratable.device.has_arrived();
            }
        }
        match result {
            Ok(()) => Ok(devices),
            Err(error) => Err(Failed::new(error, devices)),
        }
    }

    /// The VM does not run here after all: the devices are reset and stopped, those that have started
    /// too, so that nothing of what was loaded is left in them. The verdict to the source is that it
    /// has failed.
    #[must_use = "these are the VM's devices"]
    pub fn abort(mut self) -> Vec<MigratableDevice> {
        for migratable in &mut self.devices {
            migratable.device.has_not_arrived();
        }
        self.give_up();
        std::mem::take(&mut self.devices)
    }

    fn give_up(&mut self) {
        // Ends its threads; the devices are out of it already.
        drop(self.session.take());
        at_once(&mut self.devices, |migratable| {
            if migratable.device.is_arriving() {
                // What this comes to is the device's duty.
                let _duty = migratable.device.retire();
            }
        });
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        self.give_up();
    }
}

impl fmt::Debug for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loaded")
            .field("devices", &self.devices)
            .finish_non_exhaustive()
    }
}
