//! A VM's devices on the source when all has been sent: the VMM decides what becomes of them.
//!
//! ```text
//!   Saved, in STOP_COPY ─┬─ cleanup()    the VM runs on the destination ─▶ STOP
//!                        ├─ abort()      the destination has failed     ─▶ as at set-up
//!                        └─ in_doubt()   nobody knows (a drop alike)    ─▶ STOP, with what they hold
//! ```
//!
//! Only `abort` makes a device run. Each of the three runs on the caller's thread, asks all devices at once
//! with one thread per device, and waits for them. The channels stay open until then: the destination has
//! been told their end, and may still read.

use std::mem;

use super::{MigratableDevice, Off, at_once, messages::Messages, put_all_back};
use crate::{
    channel::Finished,
    error::{Failed, Result},
    message::MessageKind,
    stats::Stats,
    trace,
};

/// All devices of a VM on the source, saved, in STOP_COPY: they do not run, and keep their content. Also the
/// channels, which are closed with this.
///
/// From now on the destination decides where the VM runs, because it may have everything that it needs.
/// Keep this
/// value until the verdict comes. Until then, and also if no verdict comes, the VM must not run here.
/// Dropping the
/// value is [`Saved::in_doubt`].
#[derive(Debug)]
#[must_use = "the devices are in STOP_COPY: clean up, abort, or leave them in doubt"]
pub struct Saved {
    devices: Vec<MigratableDevice>,
    stats: Stats,
    channels: Finished,
    messages: Option<Messages>,
}

impl Saved {
    pub(super) fn new(
        devices: Vec<MigratableDevice>,
        stats: Stats,
        channels: Finished,
        mut messages: Option<Messages>,
    ) -> Self {
        if let Some(messages) = &mut messages {
            messages.queue(MessageKind::End, Vec::new());
        }
        Self {
            devices,
            stats,
            channels,
            messages,
        }
    }

    /// Returns the last control message, once: all has been sent. With it the destination may start its VM. `None` where
    /// the main channel carries sections. Never waits.
    ///
    /// The destination's verdict comes behind it, in an answer of the VMM's own. An answer to this message alone says
    /// nothing of where the VM runs; but if it is one of failure, the VM does not run there.
    pub fn message(&mut self) -> Option<Vec<u8>> {
        self.messages.as_mut()?.next()
    }

    /// Returns the counters at the end.
    #[must_use]
    pub const fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Cleans up after the verdict that the VM runs on the destination. Takes the devices to STOP, which can be
    /// slow and is outside of the downtime here. Closes their data fds and the channels. Closing the
    /// channels may
    /// take a second if the destination keeps its side open.
    ///
    /// # Errors
    ///
    /// The error of the first device that refused. That device was reset, which makes it RUNNING, and then
    /// stopped. If that failed too, [`MigratableDevice::duty`] says so.
    pub fn cleanup(mut self) -> Result<Vec<MigratableDevice>, Failed<Vec<MigratableDevice>>> {
        let mut devices = mem::take(&mut self.devices);
        let stopped = at_once(&mut devices, |migratable| {
            let stopped = migratable.device.retire();
            trace::save_cleanup(migratable.id());
            trace::migration_state_notifier(migratable.id(), "completed");
            stopped
        });
        match stopped.into_iter().collect::<Result<()>>() {
            Ok(()) => Ok(devices),
            Err(error) => Err(Failed::new(error, devices)),
        }
    }

    /// Aborts after the verdict that the destination has failed: the VM goes on here. Puts the devices back to
    /// the state at set-up, or resets them.
    ///
    /// Call this only if the destination has said so, or the main channel's end was never written to it.
    #[must_use = "these are the VM's devices"]
    pub fn abort(mut self) -> Vec<MigratableDevice> {
        let mut devices = mem::take(&mut self.devices);
        self.channels.abandon();
        // Its destination has.
        put_all_back(&mut devices, Off::Failed);
        devices
    }

    /// Ends the migration without a verdict: none was heard and none will be, so the VM may run on the
    /// destination. Takes the devices to STOP, in which they keep their content. A device that refuses stays in
    /// STOP_COPY.
    ///
    /// Once it is known that the VM does not run there, [`vm::start`](super::vm::start) lets the VM go on here.
    #[must_use = "these are the VM's devices"]
    pub fn in_doubt(mut self) -> Vec<MigratableDevice> {
        self.hold();
        mem::take(&mut self.devices)
    }

    fn hold(&mut self) {
        at_once(&mut self.devices, |migratable| {
            // What this comes to is the device's state and its duty.
            let _duty = migratable.device.hold();
            trace::save_cleanup(migratable.id());
        });
    }
}

impl Drop for Saved {
    fn drop(&mut self) {
        self.hold();
    }
}
