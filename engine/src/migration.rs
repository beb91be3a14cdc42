//! The whole life cycle of a device's migration, around the sessions that move the bytes.
//!
//! ```text
//!   Admission::realize() ─▶ Realized                                  at rest, RUNNING
//!                              │
//!   source                     │                      destination
//!   ──────                     │                      ───────────
//!   SourceChannels::greet()    │
//!   Source::setup() ◀──────────┴────────────────────▶ Incoming::setup()
//!     │ iterate(), pending_*()      main channel ────▶   device(id)?.load_state()
//!   vm::stop()        all P2P, then all STOP_COPY     │
//!     │                                               │
//!   Switchover::begin()                               switchover_start()
//!     │ complete(), config()        both ────────────▶│  …
//!   finish() ─▶ Saved                                 finish() ─▶ Loaded, devices in STOP
//!     │ cleanup()   out of downtime: STOP             vm::start()   RUNNING
//!     ▼ abort()     it was off: RUNNING
//!   Realized                                          Realized
//! ```
//!
//! Each arrow is a method that takes what is on its left and gives what is on its right, so most
//! of what would be a wrong order does not compile: there is no [`Switchover`] without a
//! [`Source`], no [`Source`] without its set-up, no second start of either. What a peer decides
//! (tags, commands) is checked when it comes. Whatever fails gives the devices back ([`Failed`]),
//! RUNNING again or reset; a device that a call is stuck in is left out.
//!
//! ```compile_fail
//! # use vfio_migration::{SaveSession, migration::{Acks, Ack, Source, Switchover}};
//! # fn twice(source: Source) -> vfio_migration::Result<()> {
//! let first = Switchover::begin(vec![source], SaveSession::builder())?;
//! let second = Switchover::begin(vec![source], SaveSession::builder())?; // it was moved
//! # Ok(()) }
//! ```
//!
//! ```compile_fail
//! # use vfio_migration::{SaveSession, migration::{Realized, Switchover}};
//! # fn before_setup(device: Realized) -> vfio_migration::Result<()> {
//! let switchover = Switchover::begin(vec![device], SaveSession::builder())?; // no Source
//! # Ok(()) }
//! ```
//!
//! ```compile_fail
//! # use vfio_migration::migration::Switchover;
//! # fn after_the_end(mut switchover: Switchover) -> vfio_migration::Result<()> {
//! let saved = switchover.finish()?;
//! switchover.cancel(); // it is over
//! # Ok(()) }
//! ```
//!
//! The channels are greeted at the set-up, by [`SourceChannels::greet`](crate::SourceChannels::greet): a
//! destination waits for a hello for a time, and behind it for as long as the VM runs, whatever comes over
//! the channels before the switchover. So a destination that is gone, or another VM's, is found while the
//! VM runs. When all has been sent the destination reads each channel's end; closed they are with
//! [`Saved`].
//!
//! The main channel is the VMM's: it writes each section's header and footer and hands over the
//! body, as `Write` or `Read`. [`stream`](crate::stream) can do the rest for a VMM that has no
//! main channel yet.
//!
//! # Threads
//!
//! Everything up to [`Switchover::begin`] and [`Incoming`] runs on the caller's thread, except that
//! changes of state for a set of devices use a thread for each. From there on a session has its
//! threads, and sections are written and read on the caller's. What ends each wait is said there
//! and at each method.

mod acks;
mod admission;
mod incoming;
mod saved;
mod settings;
mod source;
mod switchover;
pub mod vm;

use std::{fmt, thread, time::Duration};

pub use self::{
    acks::Acks,
    admission::{Admission, Realization, Surroundings},
    incoming::{Approve, Destination, Incoming, Loaded},
    saved::Saved,
    settings::{Ack, DeviceSettings, OnOffAuto, Terms},
    source::{Iteration, Pending, Source},
    switchover::Switchover,
};
use crate::{
    device::{Device, Recover},
    error::{Error, Phase, Result},
    id::DeviceId,
    state::{DeviceState, MigrationFlags},
    trace,
};

/// Something has failed, and this is what was handed over for it.
#[derive(Debug)]
#[non_exhaustive]
pub struct Failed<T> {
    /// Why.
    pub error: Error,
    /// What was handed over, put back.
    pub back: T,
}

impl<T> Failed<T> {
    const fn new(error: Error, back: T) -> Self {
        Self { error, back }
    }
}

impl<T> fmt::Display for Failed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<T: fmt::Debug> std::error::Error for Failed<T> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&self.error)
    }
}

impl<T> From<Failed<T>> for Error {
    fn from(failed: Failed<T>) -> Self {
        failed.error
    }
}

/// A device that can be migrated, and is not being: what a migration begins with and ends in.
#[derive(Debug)]
#[must_use = "this is the VMM's device"]
pub struct Realized {
    device: Device,
    settings: DeviceSettings,
    /// What the VM's stops and starts have taken of it since the last migration.
    took: Duration,
}

impl Realized {
    /// Takes a device that the VMM admits by rules of its own; [`Admission::realize`] has the
    /// usual ones.
    pub fn new(mut device: Device, settings: DeviceSettings) -> Self {
        device.set_events(settings.events);
        Self {
            device,
            settings,
            took: Duration::ZERO,
        }
    }

    /// The device's name.
    #[must_use]
    pub const fn id(&self) -> &DeviceId {
        self.device.id()
    }

    /// What the device can do.
    #[must_use]
    pub const fn flags(&self) -> MigrationFlags {
        self.device.flags()
    }

    /// The state as last known.
    #[must_use]
    pub const fn state(&self) -> DeviceState {
        self.device.state()
    }

    /// Whether the device is lost: its reset has failed.
    #[must_use]
    pub const fn is_lost(&self) -> bool {
        self.device.is_lost()
    }

    /// The settings, which hold for the next migration.
    pub const fn settings_mut(&mut self) -> &mut DeviceSettings {
        &mut self.settings
    }

    /// The device alone.
    pub fn into_device(self) -> Device {
        self.device
    }

    /// See [`put_back`].
    fn put_back(&mut self) -> Result<()> {
        put_back(&mut self.device)
    }

    /// Takes a device back to work that may hold another VM's state, or part of it.
    fn forget(&mut self) -> Result<()> {
        if self.device.state() == DeviceState::Running {
            return Ok(());
        }
        let reset = self.device.reset();
        reset.map_err(|error| error.in_phase(Phase::Cleanup))
    }
}

/// Takes a device back to work: RUNNING, or a reset, which makes it so. A device that is lost says so
/// from now on.
fn put_back(device: &mut Device) -> Result<()> {
    trace::migration_state_notifier(device.id(), "failed");
    let running = if device.state() == DeviceState::Resuming {
        // Ended only so.
        device.reset()
    } else {
        device.set_state(DeviceState::Running, Recover::Reset)
    };
    running.map_err(|error| error.in_phase(Phase::Cleanup))
}

/// Does something with all of a set at once, a thread for each, and returns when all have returned.
/// One alone, and one for which there is no thread, is done on the caller's.
fn at_once<T: Send, R: Send>(all: &mut [T], f: impl Fn(&mut T) -> R + Sync) -> Vec<R> {
    if let [only] = all {
        return vec![f(only)];
    }
    let f = &f;
    thread::scope(|scope| {
        let tasks: Vec<_> =
            all.iter_mut()
                .map(|one| {
                    // Handed over, not captured: it must still be there where there is no thread.
                    let place = std::sync::Mutex::new(Some(one));
                    let place = std::sync::Arc::new(place);
                    let theirs = place.clone();
                    let take = |place: &std::sync::Mutex<Option<_>>| {
                        let mut place = place
                            .lock()
                            .unwrap_or_else(std::sync::PoisonError::into_inner);
                        place.take()
                    };
                    let name = "vfio-mig-state".to_owned();
                    let task = thread::Builder::new()
                        .name(name)
                        .spawn_scoped(scope, move || {
                            f(take(&theirs)
                                .expect("the spawner took it only where there is no thread"))
                        });
                    task.map_err(|_no_thread| f(take(&place).expect("no thread has taken it")))
                })
                .collect();
        let result = |task: Result<thread::ScopedJoinHandle<'_, R>, R>| match task {
            Ok(task) => task
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            Err(result) => result,
        };
        tasks.into_iter().map(result).collect()
    })
}

/// Takes all devices of a migration that is off back to work, all at once.
fn put_all_back(devices: &mut [Realized]) {
    // The migration's own error is the one to report; a device that is lost says so from now on.
    let _results = at_once(devices, Realized::put_back);
}
