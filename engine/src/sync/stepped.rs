//! A condition variable whose sleeps a test can take over, so that one thread steps a whole session.
//!
//! ```text
//!   a task's code ─▶ Waiters::wait ─▶ wait_bounded ─┬─ normally: sleeps, and so does its thread
//!                                                   └─ taken over: releases the lock, and the
//!                                                      test's own function runs until it ends the
//!                                                      sleep, by a notice or as if the bound had
//! ```
//!
//! A lock that is held across a wait ([`lock_across_waits`]) is such a sleep too.
//!
//! This happens only with the feature `internals`, and only in a thread that has called [`take_over`].
//! There the test runs each task as a coroutine, and the tasks change places here. The test decides what
//! ends such a sleep. It knows when nothing can go on any more, and then ends the sleep as the bound would:
//! what the code then finds was never announced.

use std::{
    cell::RefCell,
    collections::VecDeque,
    rc::Rc,
    sync::{PoisonError, TryLockError},
    time::Duration,
};

use super::{
    Arc, Mutex, MutexGuard,
    atomic::{
        AtomicBool,
        Ordering::{Acquire, Relaxed, Release},
    },
    lock,
};

/// Sleeps in a thread's stead. It is given how to learn whether there was a notice since the sleep
/// began, and the sleep's bound; it returns whether the bound ended it.
pub type Sleep = Rc<dyn Fn(&dyn Fn() -> bool, Duration) -> bool>;

thread_local! {
    static SLEEP: RefCell<Option<Sleep>> = const { RefCell::new(None) };
}

/// Takes over every sleep of the calling thread from now on, or gives them back.
pub fn take_over(sleep: Option<Sleep>) {
    SLEEP.with(|place| *place.borrow_mut() = sleep);
}

/// As `std`'s.
#[derive(Debug, Default)]
pub(crate) struct Condvar {
    inner: std::sync::Condvar,
    /// Whether there ever was a sleep that was taken over.
    taken_over: AtomicBool,
    /// Those that there are, the longest first: a notice for one is the first's.
    sleepers: Mutex<VecDeque<Arc<AtomicBool>>>,
}

impl Condvar {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    fn tell(&self, most: usize) {
        // Relaxed: only a thread's own sleeps are taken over.
        if self.taken_over.load(Relaxed) {
            let mut sleepers = lock(&self.sleepers);
            let most = most.min(sleepers.len());
            for told in sleepers.drain(..most) {
                told.store(true, Release);
            }
        }
    }

    pub(crate) fn notify_one(&self) {
        self.tell(1);
        self.inner.notify_one();
    }

    pub(crate) fn notify_all(&self) {
        self.tell(usize::MAX);
        self.inner.notify_all();
    }
}

/// Sleeps on `condvar` for `bound` at most. Returns whether the bound ended the sleep.
pub(crate) fn wait_bounded<'a, T>(
    condvar: &Condvar,
    mutex: &'a Mutex<T>,
    guard: MutexGuard<'a, T>,
    bound: Duration,
) -> (MutexGuard<'a, T>, bool) {
    let sleep = SLEEP.with(|place| place.borrow().clone());
    let Some(sleep) = sleep else {
        let (guard, result) = condvar
            .inner
            .wait_timeout(guard, bound)
            .unwrap_or_else(PoisonError::into_inner);
        return (guard, result.timed_out());
    };
    let told = Arc::new(AtomicBool::new(false));
    condvar.taken_over.store(true, Relaxed);
    lock(&condvar.sleepers).push_back(told.clone());
    drop(guard);
    let timed_out = sleep(&|| told.load(Acquire), bound);
    lock(&condvar.sleepers).retain(|other| !Arc::ptr_eq(other, &told));
    let guard = match mutex.try_lock() {
        Ok(guard) => guard,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => panic!("a task gave up its turn with a lock in its hand"),
    };
    (guard, timed_out)
}

/// Takes a lock that its holder may keep over a wait of its own. In a thread whose sleeps were taken
/// over that wait is another task's, which gets its turn for as long as the lock is held.
pub(crate) fn lock_across_waits<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    let sleep = SLEEP.with(|place| place.borrow().clone());
    let Some(sleep) = sleep else {
        return lock(mutex);
    };
    // Ends: with the holder's turn in which it lets go.
    loop {
        match mutex.try_lock() {
            Ok(guard) => return guard,
            Err(TryLockError::Poisoned(poisoned)) => return poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                let free = || !matches!(mutex.try_lock(), Err(TryLockError::WouldBlock));
                sleep(&free, Duration::MAX);
            }
        }
    }
}
