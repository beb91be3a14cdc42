//! What stopping and starting the VM means for a set of devices.
//!
//! ```text
//!                 every device with P2P            barrier      every device
//!   stop()        RUNNING → RUNNING_P2P               │         PRE_COPY* → STOP_COPY, or STOP
//!                 PRE_COPY → PRE_COPY_P2P             │
//!   start()       RUNNING_P2P                         │         RUNNING
//! ```
//!
//! A device in a P2P state still runs, but starts no transfer to another device. So all devices are in a
//! P2P state before the first one stops, and no device writes to a stopped one. In each column all devices
//! are asked at once, with one thread per device, and the caller waits for all.
//!
//! Whatever fails, no device is left running without its VM. A device that refuses is reset, which makes it
//! RUNNING, and then stopped again. A start that fails stops the devices that it has started.
//!
//! A wait ends when the last device's driver has answered; nothing here can end it sooner.

use std::{fmt, time::Instant};

use super::{MigratableDevice, OutgoingDevice, at_once};
use crate::{
    device::{Device, Recover, set::for_all},
    error::{Error, Result},
    state::{DeviceState, MigrationFlags},
    trace,
};

/// Why the VM stops.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum Reason {
    /// Its migration is about to end.
    FinishMigration,
    /// Somebody has paused it.
    Pause,
    /// Something else: a shutdown, an error.
    Other,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FinishMigration => "finish-migrate",
            Self::Pause => "paused",
            Self::Other => "other",
        })
    }
}

mod sealed {
    pub trait Sealed {}
}

/// A device that the VM's state concerns, in whatever part of its life: [`MigratableDevice`], [`OutgoingDevice`], a
/// [`Device`] of a session's report, or a reference to one. A set of several kinds is a slice of
/// `&mut dyn Member`.
pub trait Member: sealed::Sealed + Send {
    #[doc(hidden)]
    fn device(&mut self) -> &mut Device;

    /// Before a stop for the migration's end.
    #[doc(hidden)]
    fn decide(&mut self) -> Result<()> {
        Ok(())
    }

    /// Between the columns of one.
    #[doc(hidden)]
    fn between(&mut self) -> Result<()> {
        Ok(())
    }

    /// Its part of one has failed.
    #[doc(hidden)]
    fn failed(&mut self, error: &Error) {
        let _ = error;
    }

    /// Its part of a stop for the migration's end, or of a start, has begun then, and ends now.
    #[doc(hidden)]
    fn add_transition(&mut self, since: Instant);
}

impl sealed::Sealed for MigratableDevice {}

impl Member for MigratableDevice {
    fn device(&mut self) -> &mut Device {
        &mut self.device
    }

    fn add_transition(&mut self, since: Instant) {
        self.transition_began.get_or_insert(since);
        self.transition_time += since.elapsed();
    }
}

impl sealed::Sealed for Device {}

impl Member for Device {
    fn device(&mut self) -> &mut Device {
        self
    }

    fn add_transition(&mut self, _since: Instant) {}
}

impl sealed::Sealed for OutgoingDevice {}

impl Member for OutgoingDevice {
    fn device(&mut self) -> &mut Device {
        &mut self.device
    }

    fn decide(&mut self) -> Result<()> {
        Self::decide(self)
    }

    fn between(&mut self) -> Result<()> {
        self.decided()
    }

    fn failed(&mut self, error: &Error) {
        Self::failed(self, error);
    }

    fn add_transition(&mut self, since: Instant) {
        self.counters.phases.stop.add_since(since);
    }
}

impl<M: Member + ?Sized> sealed::Sealed for &mut M {}

impl<M: Member + ?Sized> Member for &mut M {
    fn device(&mut self) -> &mut Device {
        (**self).device()
    }

    fn decide(&mut self) -> Result<()> {
        (**self).decide()
    }

    fn between(&mut self) -> Result<()> {
        (**self).between()
    }

    fn failed(&mut self, error: &Error) {
        (**self).failed(error);
    }

    fn add_transition(&mut self, since: Instant) {
        (**self).add_transition(since);
    }
}

/// Stops the devices, after the VM's processors have stopped. Returns when all devices have been asked for both
/// columns, whatever some of them answered.
///
/// With another reason than the migration's end the VM is paused. From then on, until [`start`], a migration
/// that fails leaves its devices in STOP, and a switchover waits for no ack.
///
/// ```
/// # #[cfg(feature = "sim")] {
/// use vfio_migration::{
///     Device, DeviceId, DeviceState,
///     migration::{DeviceSettings, MigratableDevice, vm},
///     sim::{SimConfig, SimDevice},
/// };
///
/// let device = |name| {
///     let device = Box::new(SimDevice::new(SimConfig::default()).unwrap());
///     let device = Device::new(DeviceId::new(name, 0).unwrap(), device).unwrap();
///     MigratableDevice::new(device, DeviceSettings::default())
/// };
/// let mut devices = [device("a"), device("b")];
/// vm::stop(&mut devices, vm::Reason::Pause)?;
/// assert!(devices.iter().all(|device| device.state() == DeviceState::Stop));
/// vm::start(&mut devices)?;
/// assert!(devices.iter().all(|device| device.state() == DeviceState::Running));
/// # }
/// # Ok::<(), vfio_migration::Error>(())
/// ```
///
/// # Errors
///
/// The first device's that refused: it was reset, and stopped after all ([`Device::duty`] says where
/// that failed too). The migration, if there is one, has failed. Also
/// [`ErrorKind::LateRequest`](crate::ErrorKind::LateRequest), where a device has new initial data
/// only now; and where the switchover has not been acknowledged, [`ErrorKind::Misuse`].
///
/// [`ErrorKind::Misuse`]: crate::ErrorKind::Misuse
pub fn stop<M: Member>(devices: &mut [M], reason: Reason) -> Result<()> {
    let ends = reason == Reason::FinishMigration;
    // From here on no device may ask for the switchover to wait.
    let decide = |member: &mut M| if ends { member.decide() } else { Ok(()) };
    let decided: Vec<_> = devices.iter_mut().map(decide).collect();
    let prepared = at_once(devices, |member| {
        let since = Instant::now();
        let device = member.device();
        let asked = match device.state() {
            DeviceState::Running => DeviceState::RunningP2p,
            DeviceState::PreCopy => DeviceState::PreCopyP2p,
            _ => return Ok(()),
        };
        if !device.flags().contains(MigrationFlags::P2P) {
            return Ok(());
        }
        let result = device.set_state(asked, Recover::Reset);
        trace::vmstate_change_prepare(device.id(), false, reason, device.state());
        if ends {
            member.add_transition(since);
        }
        result
    });
    // The barrier: all are through the first column.
    let stopped = at_once(devices, |member| {
        let since = Instant::now();
        let kept = if ends { member.between() } else { Ok(()) };
        let device = member.device();
        let goes_on = ends || reason == Reason::Pause;
        let asked = match device.state() {
            state if state.is_precopy() && goes_on => DeviceState::StopCopy,
            state if state.runs() => DeviceState::Stop,
            // It is not the VM that holds it.
            _ => return kept,
        };
        let result = device.set_state(asked, Recover::Reset);
        if result.is_err() {
            device.halt();
        }
        trace::vmstate_change(device.id(), false, reason, device.state());
        if ends {
            member.add_transition(since);
        }
        kept.and(result)
    });
    let results = decided.into_iter().zip(prepared).zip(stopped);
    let results = results.map(|((decided, prepared), stopped)| decided.and(prepared).and(stopped));
    // The first in the devices' order; each device keeps its own.
    let mut first = Ok(());
    for (member, result) in devices.iter_mut().zip(results) {
        if !ends {
            member.device().set_home(DeviceState::Stop);
        }
        if let Err(error) = &result {
            member.failed(error);
        }
        first = first.and(result);
    }
    first
}

/// Starts the devices, just before the VM's processors start. Returns when all devices have been asked for both
/// columns, or some have refused the first.
///
/// This ends a device's session. If a device is in RESUMING its driver now checks the state: in the first
/// column
/// if it has P2P, otherwise in the second. So a destination tells its source that all is loaded only when this
/// has succeeded.
///
/// # Errors
///
/// The first device's that refused. The VM must not start: every device that was to be started is
/// stopped again. The one that refused was reset; those that were loaded, all of them, are reset
/// too, and a destination tells its source that it has failed (not of a VM that was loaded standing,
/// once its devices have been [joined](super::Loaded::join): its source has let it go). [`Device::duty`] says what is left to
/// be done about each. A VM whose devices have its state here can be started again, without what was
/// reset.
pub fn start<M: Member>(devices: &mut [M]) -> Result<()> {
    let reason = "running";
    let before = devices.iter_mut().map(|member| member.device().state());
    let before: Vec<_> = before.collect();
    let arriving = devices.iter_mut().map(|it| it.device().is_arriving());
    let arriving: Vec<_> = arriving.collect();
    let prepared = at_once(devices, |member| {
        let since = Instant::now();
        let device = member.device();
        if device.state().runs() || !device.flags().contains(MigrationFlags::P2P) {
            return Ok(());
        }
        let result = device.set_state(DeviceState::RunningP2p, Recover::Reset);
        trace::vmstate_change_prepare(device.id(), true, reason, device.state());
        member.add_transition(since);
        result
    });
    // The barrier: all are through the first column.
    let mut started: Result<()> = prepared.into_iter().collect();
    if started.is_ok() {
        let results = at_once(devices, |member| {
            let since = Instant::now();
            let device = member.device();
            // A device that runs, and saves while it does, goes on with that.
            if device.state().is_precopy() {
                return Ok(());
            }
            let result = device.set_state(DeviceState::Running, Recover::Reset);
            trace::vmstate_change(device.id(), true, reason, device.state());
            member.add_transition(since);
            result
        });
        started = results.into_iter().collect();
    }
    if started.is_ok() {
        for member in devices {
            let device = member.device();
            device.set_home(DeviceState::Running);
            device.has_arrived();
        }
        return started;
    }
    let went_on = |state: &DeviceState| *state == DeviceState::Running || state.is_precopy();
    let mut all: Vec<_> = devices.iter_mut().zip(before).zip(arriving).collect();
    for_all(
        &mut all,
        |((member, _), _)| member.device(),
        |((member, before), arriving)| {
            let device = member.device();
            if *arriving {
                // Nothing of what was loaded is left in it. What this comes to is its duty.
                let _duty = device.retire();
            } else if !went_on(before) {
                device.halt();
            }
        },
    );
    started
}
