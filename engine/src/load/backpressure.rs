//! How much of the pool the channels may fill, and when a waiting channel is told that there is room.
//!
//! A device's next packet may use the whole pool. Any other packet may use 12 MiB and, after waiting
//! [`PATIENCE`], all but a few buffers, which are kept so that a next packet need not be split. (The rule
//! itself: `reorder/memory_policy.rs`.)
//!
//! The budget is for disorder: for packets that wait for a late one. While no packet is late, holding more
//! than the next writes gains nothing and costs time: bytes that wait too long leave the cache and are
//! fetched from memory again. So at first a channel stays within the 12 MiB. If waiting did not help, the
//! channel may use the whole budget, until it finds room at once again.
//!
//! If a channel finds room for one packet and sleeps again, the wake-up costs more than the packet. So the
//! I/O thread wakes channels in two cases only:
//!
//! | when | it wakes |
//! |---|---|
//! | there is room for many packets | one channel; that channel wakes the next if it leaves room for many, or cannot use the room |
//! | a device misses its next packet, and a channel waits with it (`ReorderBuffer::wait_for`) | all channels; the one with the packet is always let in |
//!
//! Only the I/O thread writes `missed`.
//!
//! # What ends each wait
//!
//! | who waits | ended by |
//! |---|---|
//! | a channel's thread | memory that another channel, or the I/O thread, gives back |
//! | | its packet becomes the next |
//! | | the end of the device or the session |
//!
//! Every round of the I/O thread ends here, in [`Backpressure::after_round`].

use std::time::{Duration, Instant};

use vfio_migration_uring::deadline;

use crate::{
    reorder::{memory_policy::MemoryPolicy, pool::Pool, waiters::Waiters},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

/// How long a channel waits for its packets' turn: longer than a fast device takes for what the
/// channels may be ahead.
const PATIENCE: Duration = Duration::from_millis(5);

/// The room that channels wait for.
pub(crate) struct Backpressure {
    pool: Arc<Pool>,
    /// Who waits within what the channels may be ahead.
    within_read_ahead: Waiters,
    /// Who waits within the budget.
    within_budget: Waiters,
    rule: MemoryPolicy,
    /// Whether a device missed its next packet in this round of the I/O thread's.
    missed: AtomicBool,
}

impl Backpressure {
    pub(crate) fn new(pool: Arc<Pool>) -> Self {
        Self {
            within_read_ahead: Waiters::new(),
            within_budget: Waiters::new(),
            rule: MemoryPolicy::new(*pool.layout()),
            missed: AtomicBool::new(false),
            pool,
        }
    }

    /// Who may have how much of the pool.
    pub(super) const fn rule(&self) -> &MemoryPolicy {
        &self.rule
    }

    /// Whether there is room for many packets that are not next.
    pub(super) fn has_room(&self, within_read_ahead: bool) -> bool {
        let limit = self.rule.limit(within_read_ahead);
        // A guess: whoever waits for a packet that must come is told in any case.
        self.pool.in_use().0 + limit.div_ceil(4) <= limit
    }

    /// The I/O thread: a device misses its next packet, and a channel waits with it.
    pub(super) fn next_missing(&self) {
        // Relaxed: read by this same thread, at the end of its round.
        self.missed.store(true, Ordering::Relaxed);
    }

    /// The I/O thread, after each of its rounds: tells those for whom it is worth their while.
    pub(crate) fn after_round(&self) {
        // Relaxed: the I/O thread's own.
        if self.missed.load(Ordering::Relaxed) {
            self.missed.store(false, Ordering::Relaxed);
            self.notify_all();
        } else {
            self.pass_on();
        }
    }

    /// A channel that has given memory up, or that was told of more room than it took.
    pub(super) fn pass_on(&self) {
        if self.has_room(true) {
            self.within_read_ahead.notify_one();
        }
        if self.has_room(false) {
            self.within_budget.notify_one();
        }
    }

    /// Something has ended, and whoever waits should look.
    pub(crate) fn notify_all(&self) {
        self.within_read_ahead.notify_all();
        self.within_budget.notify_all();
    }

    /// Waits until `look` finds something, but not longer than patience lasts.
    pub(super) fn wait_patiently<R>(&self, look: impl FnMut() -> Option<R>) -> Option<R> {
        self.within_read_ahead.wait(Some(deadline(PATIENCE)), look)
    }

    /// Waits until `look` finds something.
    pub(super) fn wait<R>(&self, look: impl FnMut() -> Option<R>) -> R {
        let found = self.within_budget.wait(None, look);
        found.expect("a wait without a deadline ends with a look")
    }

    /// Waits until `look` finds something, or the time has come.
    pub(super) fn wait_until<R>(
        &self,
        deadline: Instant,
        look: impl FnMut() -> Option<R>,
    ) -> Option<R> {
        self.within_budget.wait(Some(deadline), look)
    }

    /// See [`Waiters::late`].
    pub(crate) fn late(&self) -> u64 {
        self.within_read_ahead.late() + self.within_budget.late()
    }
}
