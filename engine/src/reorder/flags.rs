//! What a device's migration has been told, and whether it has ended: flags that are only ever set.
//!
//! ```text
//!   START         the I/O thread may transfer                               set by the main thread
//!   SWITCHED      the switchover began, with START or after it              the main thread
//!   CONFIG_READY  load: the config may be loaded; save: it is saved         the main thread; the device's
//!   QUIT          should-quit: the migration is off                         any thread
//!   EXIT          want-exit: cleanup waits for the end                      the thread that cleans up
//!   DRAINED       the I/O thread has done its part, and left its result     the I/O thread
//!   ENDED         all is over; nobody touches the device any more           the device's thread
//! ```
//!
//! The I/O thread looks at the flags before each step and after each sleep. The device's thread and the
//! thread that cleans up wait for flags here. No flag is ever cleared, so no order of setting can lose one.
//!
//! # What ends each wait
//!
//! | wait for | ended by |
//! |---|---|
//! | `CONFIG_READY` | the flag; `QUIT` or `EXIT`; the caller's deadline |
//! | `DRAINED` | the I/O thread; `QUIT` or `EXIT`; the grace time |
//! | `ENDED` | the device's thread; the caller's deadline |
//!
//! # Edges
//!
//! | edge | release side     | acquire side                      | what it carries                       |
//! |------|------------------|-----------------------------------|---------------------------------------|
//! | flag | `DeviceFlags::set`   | `DeviceFlags::has`, and `DeviceFlags::set` where another was the first | all that the setter did before |

use std::{
    fmt,
    time::{Duration, Instant},
};

use crate::{
    reorder::waiters::Waiters,
    sync::atomic::{
        AtomicU32,
        Ordering::{AcqRel, Acquire},
    },
};

/// What a thread that waits for another's bounded work allows on top of the bound: for a machine
/// that is busy.
pub const SLACK: Duration = Duration::from_secs(1);

/// Why a device's migration should end early.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Stop {
    /// Should-quit: the migration is off.
    Quit,
    /// Want-exit: cleanup has begun.
    Exit,
}

/// One device's flags.
#[derive(Default)]
pub struct DeviceFlags {
    word: AtomicU32,
    changed: Waiters,
}

impl DeviceFlags {
    const START: u32 = 1 << 0;
    const CONFIG_READY: u32 = 1 << 1;
    const QUIT: u32 = 1 << 2;
    const EXIT: u32 = 1 << 3;
    const DRAINED: u32 = 1 << 4;
    const ENDED: u32 = 1 << 5;
    const SWITCHED: u32 = 1 << 6;

    /// Returns the flags of a device that nothing has been said of.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a flag and wakes who waits here. Returns whether it was this call that set it.
    fn set(&self, flag: u32) -> bool {
        // flag edge, release side; and acquire, for the one who learns that another was the first.
        // (No model misses this acquire: the fence in the notification behind it is one too. What
        // setters before did reaches whoever sees this flag in any case: a read-modify-write goes
        // on with their release.)
        let before = self.word.fetch_or(flag, AcqRel);
        self.changed.notify_all();
        before & flag == 0
    }

    fn has(&self, flags: u32) -> bool {
        // flag edge, acquire side.
        self.word.load(Acquire) & flags != 0
    }

    /// The I/O thread may transfer. Returns whether it is the first time.
    pub fn start(&self) -> bool {
        self.set(Self::START)
    }

    /// Whether the I/O thread may transfer.
    pub fn is_started(&self) -> bool {
        self.has(Self::START)
    }

    /// The switchover begins. Returns whether it is the first time.
    pub fn switch(&self) -> bool {
        self.set(Self::SWITCHED)
    }

    /// Whether the switchover has begun.
    pub fn is_switched(&self) -> bool {
        self.has(Self::SWITCHED)
    }

    /// The config may be loaded. Returns whether it is the first time.
    #[must_use = "a second notice is the peer's error"]
    pub fn config_ready(&self) -> bool {
        self.set(Self::CONFIG_READY)
    }

    /// Whether the config may be loaded, or is saved.
    pub fn is_config_ready(&self) -> bool {
        self.has(Self::CONFIG_READY)
    }

    /// Should-quit. Returns whether it is the first time.
    pub fn quit(&self) -> bool {
        self.set(Self::QUIT)
    }

    /// Want-exit. Returns whether it is the first time.
    pub fn exit(&self) -> bool {
        self.set(Self::EXIT)
    }

    /// Whether to end early, and why.
    pub fn stop(&self) -> Option<Stop> {
        // flag edge, acquire side. One load: of two, the first could miss a `QUIT` that came before
        // the `EXIT` that the second finds.
        match self.word.load(Acquire) {
            flags if flags & Self::QUIT != 0 => Some(Stop::Quit),
            flags if flags & Self::EXIT != 0 => Some(Stop::Exit),
            _ => None,
        }
    }

    /// The I/O thread has left its result. Returns whether it is the first time.
    pub fn drained(&self) -> bool {
        self.set(Self::DRAINED)
    }

    /// Whether the I/O thread has left its result.
    pub fn is_drained(&self) -> bool {
        self.has(Self::DRAINED)
    }

    /// All is over. Returns whether it is the first time.
    pub fn end(&self) -> bool {
        self.set(Self::ENDED)
    }

    /// Whether all is over.
    pub fn is_ended(&self) -> bool {
        self.has(Self::ENDED)
    }

    /// Waits until the I/O thread has left its result, or somebody says stop.
    ///
    /// # Errors
    ///
    /// Why to stop. The I/O thread may still be at work.
    pub fn wait_drained(&self) -> Result<(), Stop> {
        let look = || {
            // The result first: what the I/O thread has done counts, whatever was said since.
            if self.is_drained() {
                Some(Ok(()))
            } else {
                self.stop().map(Err)
            }
        };
        self.changed
            .wait(None, look)
            .expect("a wait without a deadline ends with a look")
    }

    /// Waits until the I/O thread has left its result, `deadline` at most. Returns whether it has.
    pub fn wait_drained_until(&self, deadline: Instant) -> bool {
        let look = || self.is_drained().then_some(());
        self.changed.wait(Some(deadline), look).is_some()
    }

    /// Waits until the config may be loaded, `deadline` at most: `None` then.
    ///
    /// # Errors
    ///
    /// Why to stop instead.
    pub fn wait_config_ready(&self, deadline: Option<Instant>) -> Option<Result<(), Stop>> {
        let look = || {
            // Stop first: after a cancellation nothing is loaded.
            if let Some(stop) = self.stop() {
                Some(Err(stop))
            } else {
                self.has(Self::CONFIG_READY).then_some(Ok(()))
            }
        };
        self.changed.wait(deadline, look)
    }

    /// Waits until all is over, `deadline` at most. Returns whether it is.
    pub fn wait_end(&self, deadline: Option<Instant>) -> bool {
        let look = || self.is_ended().then_some(());
        self.changed.wait(deadline, look).is_some()
    }

    /// How often the net found a flag that had not been announced. Must stay 0.
    #[must_use]
    pub fn late(&self) -> u64 {
        self.changed.late()
    }
}

impl fmt::Debug for DeviceFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceFlags")
            .field("started", &self.is_started())
            .field("stop", &self.stop())
            .field("drained", &self.is_drained())
            .field("ended", &self.is_ended())
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn each_flag_is_set_once() {
        let control = DeviceFlags::new();
        assert!(control.start() && !control.start());
        assert!(control.config_ready() && !control.config_ready());
        assert!(control.quit() && !control.quit());
        assert!(control.exit() && !control.exit());
        assert!(control.drained() && !control.drained());
        assert!(control.end() && !control.end());
    }

    #[test]
    fn a_result_outlives_a_cancellation_and_a_config_does_not() {
        let control = DeviceFlags::new();
        control.exit();
        assert_eq!(control.wait_drained(), Err(Stop::Exit));
        control.drained();
        assert_eq!(control.wait_drained(), Ok(()));
        assert!(control.config_ready());
        assert_eq!(control.wait_config_ready(None), Some(Err(Stop::Exit)));
        control.quit();
        assert_eq!(control.wait_config_ready(None), Some(Err(Stop::Quit)));
    }
}
