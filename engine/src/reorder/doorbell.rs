//! How the I/O thread sleeps, and how another thread knows that it must wake it.
//!
//! ```text
//!   I/O thread                            publisher, canceller, …
//!   ──────────                            ───────────────────────
//!   store what it waits for               change the state (publish, set a flag)
//!   asleep = true                         fence ─────────────┐
//!   fence ────────────────────────┐       asleep?  no ──▶ done, without a system call
//!   look again at all it waits for│       yes: asleep = false, and wake the ring
//!   nothing: sleep in the ring    │
//!   asleep = false                └─── one of these two fences comes first: either the I/O thread's
//!                                      second look sees the change, or the other thread sees
//!                                      `asleep`
//! ```
//!
//! The ring's wake is sticky, so a wake between the second look and the sleep ends the sleep. Only the I/O
//! thread writes what it waits for ([`Doorbell::ring_if`]); a waker only reads that. (In an earlier design
//! a waker took the value back with a swap. It could take back the value of a later sleep, and that lost
//! wake-ups.)
//!
//! # Edges
//!
//! There is none: the doorbell carries no data. What the I/O thread finds when it looks again carries an
//! edge of its own. The two fences are each other's partners, and both are needed.

use std::fmt;

use crossbeam_utils::CachePadded;

use crate::sync::atomic::{
    AtomicBool,
    Ordering::{Relaxed, SeqCst},
    fence,
};

/// The I/O thread's bell. One sleeper, many ringers.
pub struct Doorbell {
    asleep: CachePadded<AtomicBool>,
}

impl Doorbell {
    /// Returns the bell of an I/O thread that is awake.
    #[must_use]
    pub fn new() -> Self {
        Self {
            asleep: CachePadded::new(AtomicBool::new(false)),
        }
    }

    /// The I/O thread says that it is about to sleep. It must look again at everything it waits for
    /// before it does.
    pub fn lie_down(&self) {
        // Relaxed: ordered by the fence.
        self.asleep.store(true, Relaxed);
        // Partner: the fence of `ring_if`.
        fence(SeqCst);
    }

    /// The I/O thread says that it is awake.
    pub fn get_up(&self) {
        // Relaxed: a ringer that still sees it asleep wakes it once too often.
        self.asleep.store(false, Relaxed);
    }

    /// Called after something was made so that the I/O thread may wait for. Returns whether the caller
    /// must wake the I/O thread's ring: at most one caller per sleep is told so.
    #[must_use = "a driver that is not woken sleeps on"]
    pub fn ring(&self) -> bool {
        self.ring_if(|| true)
    }

    /// As [`Doorbell::ring`], where `waits` tells whether the I/O thread waits for just this. It is
    /// asked behind the fence, so a relaxed load of what the I/O thread wrote before
    /// [`Doorbell::lie_down`] is enough.
    #[must_use = "a driver that is not woken sleeps on"]
    pub fn ring_if(&self, waits: impl FnOnce() -> bool) -> bool {
        // Partner: the fence of `lie_down`.
        fence(SeqCst);
        // Relaxed: after the fence. The swap only keeps a second ringer from a second wake.
        waits() && self.asleep.load(Relaxed) && self.asleep.swap(false, Relaxed)
    }
}

impl Default for Doorbell {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Doorbell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Doorbell")
            // Relaxed: for a human.
            .field("asleep", &self.asleep.load(Relaxed))
            .finish()
    }
}
