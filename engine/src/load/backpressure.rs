//! How much of the pool the channels may fill, and when they are told that there is room.
//!
//! The rule for who may take what is in `reorder/memory_policy.rs`: the packet that its device needs next,
//! all; any other, 12 MiB; and after [`PATIENCE`] all but a few buffers, so that next packets pass
//! whole.
//!
//! The budget is for disorder: for packets that wait for one which is late. While none is late, what
//! the channels hold beyond the next writes gains nothing and costs time: bytes that wait for longer
//! than the cache keeps them are fetched from memory again. So a channel is patient at first, and
//! where that did not help it goes on through the whole budget, until it finds room at once again.
//!
//! A channel that finds room for one packet and sleeps again costs more than the packet. So the
//! I/O thread tells *one* channel when there is room for many packets, and *all* of them when a device
//! misses its next packet and a channel has said that it waits with that (`ReorderBuffer::wait_for`): that one
//! is always let in. A channel that was told, and leaves room for many or cannot use it, tells the next.
//!
//! The I/O thread alone writes `missed`. What ends a channel's wait: memory that is given back, by the
//! I/O thread, whose every round ends here, or by a channel; its packet's turn; or an end.

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
