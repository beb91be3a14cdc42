//! What a simulated device has done, for an observer outside.
//!
//! ```text
//!   SimDevice ──▶ Shared ◀── SimHandle, clones of it
//!                    └─ control ──▶ the session that goes on
//! ```
//!
//! Any thread may use a handle at any time. The lock is never held over a system call that waits, nor over
//! one of the device's faults. So a handle answers even while the device is in a call.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use super::{control::Control, faults::Callback, image::Image};
use crate::{device::StateEvent, state::DeviceState};

/// A request for a state, as the device has seen it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Change {
    /// The state before.
    pub from: DeviceState,
    /// What was asked for.
    pub asked: DeviceState,
    /// The state after.
    pub to: DeviceState,
    /// What the device said, where it refused.
    pub errno: Option<i32>,
    /// When it was asked.
    pub began: Instant,
    /// When it answered.
    pub ended: Instant,
}

/// What the device and its handles share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) state: DeviceState,
    /// What it would save.
    pub(super) image: Image,
    /// Of what it has loaded last.
    pub(super) digest: Option<u64>,
    pub(super) config: Vec<u8>,
    /// Bytes of the session that has ended last.
    pub(super) bytes: u64,
    /// The session that goes on.
    pub(super) control: Option<Arc<Control>>,
    pub(super) initial_left: u64,
    pub(super) dirty_left: u64,
    /// What has been read of them.
    pub(super) precopy_read: u64,
    pub(super) precopy_v2: bool,
    pub(super) reinit: bool,
    pub(super) calls: HashMap<Callback, u64>,
    pub(super) changes: Vec<Change>,
    pub(super) events: Vec<StateEvent>,
}

/// Looks at a [`SimDevice`](super::SimDevice) from outside, on any thread, also when it has moved
/// into a `Device` or is gone. Clones look at the same device.
#[derive(Clone, Debug)]
pub struct SimHandle(pub(super) Arc<Mutex<Shared>>);

impl SimHandle {
    fn shared(&self) -> MutexGuard<'_, Shared> {
        lock(&self.0)
    }

    /// The state that the device really is in.
    #[must_use]
    pub fn state(&self) -> DeviceState {
        self.shared().state
    }

    /// The digest of the device's own state: of what it has loaded last, or else of what it was
    /// made with, which is computed on the spot ([`Image::digest`]).
    #[must_use]
    pub fn digest(&self) -> u64 {
        let (digest, image) = {
            let shared = self.shared();
            (shared.digest, shared.image)
        };
        digest.unwrap_or_else(|| image.digest())
    }

    /// What the device would save now: by its config, or by the header of what it has loaded.
    #[must_use]
    pub fn image(&self) -> Image {
        self.shared().image
    }

    /// Whether the device has loaded a whole state.
    #[must_use]
    pub fn has_loaded(&self) -> bool {
        self.shared().digest.is_some()
    }

    /// The digest ([`Image::digest_of`]) of the device's config, without its length: of the one it
    /// has loaded last, or else its own.
    #[must_use]
    pub fn config_digest(&self) -> u64 {
        Image::digest_of(&self.shared().config)
    }

    /// How many bytes have gone through the data fd in this session, or in the last one. For a
    /// pipe or a socket that is through the device's end of it, and while the session goes on it may
    /// be behind by what the device's thread has just moved.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let (control, bytes) = {
            let shared = self.shared();
            (shared.control.clone(), shared.bytes)
        };
        control.map_or(bytes, |control| control.bytes())
    }

    /// How often a method has been called, the calls that failed included.
    #[must_use]
    pub fn calls(&self, callback: Callback) -> u64 {
        self.shared().calls.get(&callback).copied().unwrap_or(0)
    }

    /// Every request for a state so far, in their order.
    #[must_use]
    pub fn changes(&self) -> Vec<Change> {
        self.shared().changes.clone()
    }

    /// Every event so far, in their order.
    #[must_use]
    pub fn events(&self) -> Vec<StateEvent> {
        self.shared().events.clone()
    }

    /// Ends the stall of this session, now or when it would begin. Without effect outside one.
    pub fn release(&self) {
        let control = self.shared().control.clone();
        if let Some(control) = control {
            control.release();
        }
    }

    /// Has the device dirty `len` bytes in a PRE_COPY state: that many more of its state can be
    /// read. Gives how many it were, which is fewer where the state has no more, and 0 in another
    /// state.
    #[expect(clippy::must_use_candidate, reason = "called for its effect")]
    pub fn dirty(&self, len: u64) -> u64 {
        self.expose(len, false)
    }

    /// As [`SimHandle::dirty`], but as new initial bytes, of which
    /// [`PrecopyInfo::reinit`](crate::PrecopyInfo::reinit) tells once.
    #[expect(clippy::must_use_candidate, reason = "called for its effect")]
    pub fn reinit(&self, len: u64) -> u64 {
        self.expose(len, true)
    }

    fn expose(&self, len: u64, initial: bool) -> u64 {
        let mut shared = self.shared();
        let Some(control) = shared.control.clone().filter(|_| shared.state.is_precopy()) else {
            return 0;
        };
        let limit = control.limit();
        let len = len.min(shared.image.len().saturating_sub(limit));
        control.expose(limit + len);
        if initial {
            shared.initial_left += len;
            shared.reinit = true;
        } else {
            shared.dirty_left += len;
        }
        len
    }
}

pub(super) fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    // Nothing panics under this lock that leaves something half done.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
