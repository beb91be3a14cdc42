//! How threads other than the I/O thread wait: for memory, for a packet to send, for a device's end.
//!
//! ```text
//!   waiter                                 notifier
//!   ──────                                 ────────
//!   look: there? ──▶ done                  change the state
//!   lock                                   fence
//!   waiting += 1                           waiting == 0?  ──▶ done, without a lock
//!   fence                                  lock, unlock    (the waiter is now in its sleep)
//!   look again, under the lock             notify
//!   nothing: sleep (unlocks)
//! ```
//!
//! A waiter looks while it holds the lock, and releases the lock only by sleeping. A notifier that sees a
//! waiter goes through the lock before it notifies. So no notification falls between a look and its sleep.
//! The notifier reads the number of waiters without the lock; the two fences ensure that it sees the
//! waiter, or the waiter sees the change.
//!
//! Waiters of one place may wait for different things. [`Waiters::notify_one`] wakes one waiter. A waiter
//! that cannot use the wake-up passes it on, at most once per waiter, so it reaches one that can.
//!
//! Each sleep is bounded by [`RECHECK`], as a safety net. If the re-check finds what no notification
//! announced, [`Waiters::late`] counts a lost wake-up; the count must stay 0. Before it counts, the waiter
//! gives the notification as long again, because a notifier may have changed the state a moment ago and
//! not have notified yet. (Under loom sleeps are unbounded: a bound would keep every model green.)
//!
//! # Edges
//!
//! There is none: what a look finds carries an edge of its own. The fences are each other's partners.

use std::{
    fmt,
    time::{Duration, Instant},
};

use crate::sync::{
    Condvar, Mutex, MutexGuard,
    atomic::{
        AtomicU32, AtomicU64,
        Ordering::{Relaxed, SeqCst},
        fence,
    },
    lock, wait_bounded,
};

/// How long a sleep lasts at most before its thread looks again by itself.
pub const RECHECK: Duration = Duration::from_secs(1);

/// How often a notice that should come is looked for, before it is taken for lost.
pub(crate) const NOTICE_LOOKS: u32 = 100;

/// How long each time: [`RECHECK`] in all.
pub(crate) const NOTICE_LOOK: Duration = Duration::from_millis(10);

const _: () = assert!(NOTICE_LOOK.as_millis() * NOTICE_LOOKS as u128 == RECHECK.as_millis());

/// A place to wait at.
pub struct Waiters {
    waiting: AtomicU32,
    late: AtomicU64,
    lock: Mutex<Notices>,
    condvar: Condvar,
}

/// What those who wait have been told.
#[derive(Default)]
struct Notices {
    /// How many there were.
    given: u64,
    /// How many more are to be told of what those who were told could not use.
    passes: u32,
}

impl Waiters {
    /// Returns a place where nobody waits.
    #[must_use]
    pub fn new() -> Self {
        Self {
            waiting: AtomicU32::new(0),
            late: AtomicU64::new(0),
            lock: Mutex::new(Notices::default()),
            condvar: Condvar::new(),
        }
    }

    /// Waits until `look` returns something, or `deadline` has passed.
    ///
    /// `look` must not wait, and must not call back into this place. It sees what any thread made
    /// so before it notified.
    pub fn wait<R>(
        &self,
        deadline: Option<Instant>,
        mut look: impl FnMut() -> Option<R>,
    ) -> Option<R> {
        if let Some(found) = look() {
            return Some(found);
        }
        let mut notices = lock(&self.lock);
        // Relaxed: ordered by the fence.
        self.waiting.fetch_add(1, Relaxed);
        // Partner: the fence of `notify`.
        fence(SeqCst);
        let mut woken = false;
        let mut unannounced = false;
        let mut expired = false;
        let found = loop {
            let before = notices.given;
            if let Some(found) = look() {
                if unannounced {
                    notices = self.await_notice(notices, before);
                }
                break Some(found);
            }
            // Also where the deadline is what has woken it: it may have been told at the same time.
            if woken {
                self.pass_on(&mut notices);
            }
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if expired || left.is_some_and(|left| left.is_zero()) {
                break None;
            }
            let bound = left.map_or(RECHECK, |left| left.min(RECHECK));
            let slept;
            (notices, slept) = wait_bounded(&self.condvar, &self.lock, notices, bound);
            woken = true;
            // A deadline is no net: only the re-check's own bound counts. And a sleep may be told just
            // when its time is over.
            unannounced = slept && bound == RECHECK && notices.given == before;
            expired = slept && left == Some(bound);
        };
        // Relaxed: a notifier that still sees us takes the lock for nothing.
        self.waiting.fetch_sub(1, Relaxed);
        drop(notices);
        found
    }

    /// Waits for the notice of what was found without one, and counts it as late if none comes.
    fn await_notice<'a>(
        &'a self,
        mut notices: MutexGuard<'a, Notices>,
        before: u64,
    ) -> MutexGuard<'a, Notices> {
        for _ in 0..NOTICE_LOOKS {
            (notices, _) = wait_bounded(&self.condvar, &self.lock, notices, NOTICE_LOOK);
            if notices.given != before {
                // It may be another's, and this thread has what it wants.
                self.pass_on(&mut notices);
                return notices;
            }
        }
        // Relaxed: a counter.
        self.late.fetch_add(1, Relaxed);
        notices
    }

    /// Tells the next of what one who was told has no use for.
    fn pass_on(&self, notices: &mut Notices) {
        if notices.passes > 0 {
            notices.passes -= 1;
            self.condvar.notify_one();
        }
    }

    /// How many a notifier would find. Behind a fence, so that what was made so before is seen by
    /// whoever begins to wait after.
    fn count(&self) -> u32 {
        // Partner: the fence of `wait`.
        fence(SeqCst);
        // Relaxed: after the fence.
        self.waiting.load(Relaxed)
    }

    /// Wakes everybody who waits, after something was made so. No system call where nobody does.
    pub fn notify_all(&self) {
        if self.count() > 0 {
            lock(&self.lock).given += 1;
            self.condvar.notify_all();
        }
    }

    /// As [`Waiters::notify_all`], for something that only one of those who wait can have: they are
    /// woken one after the other, until one of them finds it.
    pub fn notify_one(&self) {
        let count = self.count();
        if count > 0 {
            let mut notices = lock(&self.lock);
            notices.given += 1;
            notices.passes = count;
            drop(notices);
            self.condvar.notify_one();
        }
    }

    /// How often the bounded re-check found something that no notification announced.
    #[must_use]
    pub fn late(&self) -> u64 {
        // Relaxed: a counter.
        self.late.load(Relaxed)
    }
}

impl Default for Waiters {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Waiters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waiters")
            // Relaxed: for a human.
            .field("waiting", &self.waiting.load(Relaxed))
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::{
        sync::atomic::{AtomicBool, Ordering},
        thread,
    };

    use super::*;

    #[test]
    fn what_is_there_is_found_without_waiting() {
        assert_eq!(Waiters::new().wait(None, || Some(7)), Some(7));
    }

    #[test]
    fn a_deadline_ends_a_wait() {
        let waiters = Waiters::new();
        let deadline = Instant::now() + Duration::from_millis(5);
        assert_eq!(waiters.wait(Some(deadline), || None::<()>), None);
        assert_eq!(waiters.late(), 0);
    }

    #[test]
    fn a_notification_ends_a_wait() {
        let waiters = Waiters::new();
        let there = AtomicBool::new(false);
        thread::scope(|scope| {
            let waiting =
                scope.spawn(|| waiters.wait(None, || there.load(Ordering::Acquire).then_some(())));
            there.store(true, Ordering::Release);
            waiters.notify_all();
            assert_eq!(waiting.join().unwrap(), Some(()));
        });
        assert_eq!(waiters.late(), 0);
    }

    /// A wait that the look after its first sleep ends; `then` is called with that look.
    fn found_by_the_bound(waiters: &Waiters, then: impl Fn() + Send + Sync) {
        let looks = AtomicU32::new(0);
        let look = || {
            let count = looks.fetch_add(1, Relaxed);
            // Before the lock, under it, and after the first sleep.
            (count == 2).then(&then)
        };
        assert_eq!(waiters.wait(None, look), Some(()));
    }

    #[test]
    fn what_nobody_announces_is_counted() {
        let waiters = Waiters::new();
        found_by_the_bound(&waiters, || ());
        assert_eq!(waiters.late(), 1);
    }

    #[test]
    fn a_notice_that_is_on_its_way_is_waited_for() {
        for one in [false, true] {
            let waiters = Waiters::new();
            thread::scope(|scope| {
                found_by_the_bound(&waiters, || {
                    scope.spawn(|| {
                        // Whoever makes something so may be held up before it says so.
                        thread::sleep(NOTICE_LOOK * 3);
                        if one {
                            waiters.notify_one();
                        } else {
                            waiters.notify_all();
                        }
                    });
                });
            });
            assert_eq!(waiters.late(), 0);
        }
    }
}
