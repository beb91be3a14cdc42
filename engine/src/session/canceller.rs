//! Cancels a session from any thread, also while another thread waits in the session's join.
//!
//! The handle does not keep the session's memory. When the session ends, the handle is cut off from it and
//! does nothing any more. Any thread may use it, any number of times.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use crate::error::{Error, Phase};

type Fail = Arc<dyn Fn(Error) + Send + Sync>;

/// Cancels one session: a cheap handle, to be cloned and kept for as long as one likes.
///
/// `join` consumes its session and waits; this ends the wait, from any thread. Once the session has
/// ended it does nothing.
///
/// ```
/// # #[cfg(feature = "sim")] {
/// use std::thread;
/// use vfio_migration::{Device, DeviceId, LoadSession, sim::{SimConfig, SimDevice}};
///
/// let device = SimDevice::new(SimConfig::default())?;
/// let load = LoadSession::builder()
///     .device(Device::new(DeviceId::new("0000:00:03.0/vfio", 0)?, Box::new(device))?)
///     .start()?;
/// let canceller = load.canceller();
/// let joined = thread::spawn(move || load.join());
/// canceller.cancel();
/// let report = joined.join().expect("it does not panic");
/// assert!(report.result.is_err_and(|error| error.is_cancelled()));
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Canceller {
    phase: Phase,
    fail: Arc<Mutex<Option<Fail>>>,
}

impl Canceller {
    pub(crate) fn new(phase: Phase, fail: impl Fn(Error) + Send + Sync + 'static) -> Self {
        let fail: Fail = Arc::new(fail);
        Self {
            phase,
            fail: Arc::new(Mutex::new(Some(fail))),
        }
    }

    /// Cancels: should-quit. Returns at once, and whoever joins gets its report within the grace
    /// time.
    pub fn cancel(&self) {
        self.fail(Error::cancelled(self.phase));
    }

    /// Fails the session for a reason of the VMM's, for example a broken main channel.
    pub fn fail(&self, error: Error) {
        // Called without the lock: it hangs up the channels, and a hang-up is the VMM's code.
        let fail = self.lock().clone();
        if let Some(fail) = fail {
            fail(error);
        }
    }

    /// Whether the session has ended, and this does nothing any more.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.lock().is_none()
    }

    /// The session has ended.
    pub(crate) fn retire(&self) {
        drop(self.lock().take());
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Fail>> {
        self.fail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Canceller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Canceller")
            .field("over", &self.is_over())
            .finish_non_exhaustive()
    }
}
