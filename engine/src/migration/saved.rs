//! A VM's devices on the source when all has been sent: the VMM decides what becomes of them.
//!
//! The caller's thread; both ends ask all devices at once, on a thread each, and wait for them. The
//! channels are open until then: the destination has been told their end, and may still read.

use super::{Failed, Realized, at_once, put_all_back};
use crate::{
    channel::Finished,
    device::Recover,
    error::{Phase, Result},
    state::DeviceState,
    stats::Stats,
    trace,
};

/// All devices of a VM on the source, saved, in STOP_COPY; and the channels, which are closed with it.
#[derive(Debug)]
#[must_use = "the devices are in STOP_COPY: clean up or abort"]
pub struct Saved {
    devices: Vec<Realized>,
    stats: Stats,
    channels: Finished,
}

impl Saved {
    pub(super) const fn new(devices: Vec<Realized>, stats: Stats, channels: Finished) -> Self {
        Self {
            devices,
            stats,
            channels,
        }
    }

    /// The counters at the end.
    #[must_use]
    pub const fn stats(&self) -> &Stats {
        &self.stats
    }

    /// The VM runs on the destination: takes the devices to STOP, which can be slow, and belongs
    /// here, out of downtime. Their data fds are closed, and so are the channels, which may take a
    /// second where the destination keeps its side open.
    ///
    /// # Errors
    ///
    /// The first device's that refused: it was reset.
    pub fn cleanup(self) -> Result<Vec<Realized>, Failed<Vec<Realized>>> {
        let mut devices = self.devices;
        let stopped = at_once(&mut devices, |realized| {
            trace::save_cleanup(realized.id());
            let stopped = realized.device.set_state(DeviceState::Stop, Recover::Reset);
            trace::migration_state_notifier(realized.id(), "completed");
            stopped.map_err(|error| error.in_phase(Phase::Cleanup))
        });
        match stopped.into_iter().collect::<Result<()>>() {
            Ok(()) => Ok(devices),
            Err(error) => Err(Failed::new(error, devices)),
        }
    }

    /// The destination has failed, and the VM goes on here: puts the devices back to RUNNING, or
    /// resets them.
    #[must_use = "these are the VM's devices"]
    pub fn abort(self) -> Vec<Realized> {
        let Self {
            mut devices,
            mut channels,
            ..
        } = self;
        channels.abandon();
        put_all_back(&mut devices);
        devices
    }
}
