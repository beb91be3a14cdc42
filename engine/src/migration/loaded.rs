//! The destination when every device is loaded: the VM may start now, or never will.
//!
//! ```text
//!   Loaded, in RESUMING ─┬─ vm::start() ─▶ the verdict ─▶ join()    the devices, RUNNING
//!                        └─ abort(), or a drop                      reset and stopped
//! ```
//!
//! One thread owns a [`Loaded`]. `join` waits for the channels' end, within the session's time without
//! progress.

use std::{fmt, mem};

use super::{
    MigratableDevice, at_once,
    incoming_member::{Member, all_stats, trace_cleanup},
    members::MemberSession,
};
use crate::{
    error::{Failed, Result},
    load::LoadSession,
    state::DeviceState,
    stats::Stats,
    trace,
};

/// All devices of a VM on the destination, loaded, in RESUMING: the VM may start.
///
/// In the first step of [`vm::start`](super::vm::start) each driver checks the loaded state. With
/// [`Settings::stop_after_load`](crate::Settings) the driver has checked it earlier, and the devices are in
/// STOP.
///
/// | the VM | the drivers check | the source hears the verdict |
/// |---|---|---|
/// | is to run | in [`vm::start`](super::vm::start) | after `vm::start`; if that fails, every device is reset and stopped, and the verdict is a failure |
/// | stays stopped | before, with `stop_after_load` | after [`Incoming::finish`](super::Incoming::finish); then comes [`Loaded::join`] |
///
/// Dropping it before the VM has started resets and stops the devices, as [`Loaded::abort`] does.
#[must_use = "it holds the VM's devices"]
pub struct Loaded {
    pub(super) devices: Vec<MigratableDevice>,
    pub(super) members: Vec<Member>,
    pub(super) session: MemberSession<LoadSession>,
}

impl Loaded {
    /// Borrows the devices, for [`vm::start`](super::vm::start).
    pub fn devices_mut(&mut self) -> &mut [MigratableDevice] {
        &mut self.devices
    }

    /// Returns the counters as they are now. After the VM's start they include the time that it took.
    #[must_use]
    pub fn stats(&self) -> Stats {
        all_stats(&self.members, &self.session, &self.devices)
    }

    /// Waits for the channels' end, and gives the devices back. A source may end its channels only when it
    /// knows
    /// that all is loaded. The wait ends with the channels, or after the session's time without progress.
    ///
    /// The devices of a stopped VM, in STOP, then belong to the VM as if it had started: their drivers have
    /// checked the state, and no other device has it. A later start that fails resets only the devices that
    /// refuse.
    ///
    /// # Errors
    ///
    /// A channel's failure since. The devices are loaded nevertheless, and are given back.
    pub fn join(mut self) -> Result<Vec<MigratableDevice>, Failed<Vec<MigratableDevice>>> {
        let result = self
            .session
            .take()
            .map_or(Ok(()), |session| session.join().result);
        trace_cleanup(&mem::take(&mut self.members));
        let mut devices = mem::take(&mut self.devices);
        for migratable in &mut devices {
            trace::migration_state_notifier(migratable.id(), "completed");
            if migratable.state() == DeviceState::Stop {
                migratable.device.has_arrived();
            }
        }
        match result {
            Ok(()) => Ok(devices),
            Err(error) => Err(Failed::new(error, devices)),
        }
    }

    /// Aborts the migration, if the VM does not run here after all. Every device is reset and stopped, also one
    /// that has started, so that nothing of the loaded state is left. The verdict to the source is a failure.
    #[must_use = "these are the VM's devices"]
    pub fn abort(mut self) -> Vec<MigratableDevice> {
        for migratable in &mut self.devices {
            migratable.device.has_not_arrived();
        }
        self.give_up();
        mem::take(&mut self.devices)
    }

    fn give_up(&mut self) {
        // Ends its threads; the devices are out of it already.
        drop(self.session.take());
        trace_cleanup(&mem::take(&mut self.members));
        at_once(&mut self.devices, |migratable| {
            if migratable.device.is_arriving() {
                trace::migration_state_notifier(migratable.id(), "failing");
                // What this comes to is the device's duty.
                let _duty = migratable.device.retire();
                trace::migration_state_notifier(migratable.id(), "failed");
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
