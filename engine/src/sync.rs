//! The one place that chooses between `std` and `loom`.
//!
//! Every atomic, lock and shared pointer of the hand-overs is imported from here. `cfg(loom)` alone
//! decides (not `cfg(all(test, loom))`): the models live in another package.

#[cfg(loom)]
pub(crate) use loom::sync::{Arc, Condvar, Mutex, MutexGuard, atomic};
#[cfg(not(loom))]
pub(crate) use std::sync::{Arc, Condvar, Mutex, MutexGuard, atomic};

pub(crate) use self::{shadow::Shadow, wait::wait_bounded};

/// Takes a lock whose holders never panic while they hold it, or leave nothing half done if they
/// do: a poisoned one is as good as any.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(not(loom))]
mod wait {
    use std::{sync::PoisonError, time::Duration};

    use super::{Condvar, MutexGuard};

    /// Sleeps on `condvar` for `bound` at most. Returns whether the bound ended the sleep.
    pub(crate) fn wait_bounded<'a, T>(
        condvar: &Condvar,
        guard: MutexGuard<'a, T>,
        bound: Duration,
    ) -> (MutexGuard<'a, T>, bool) {
        let (guard, result) = condvar
            .wait_timeout(guard, bound)
            .unwrap_or_else(PoisonError::into_inner);
        (guard, result.timed_out())
    }
}

#[cfg(loom)]
mod wait {
    use std::time::Duration;

    use super::{Condvar, MutexGuard};

    /// Sleeps without a bound: one would end every sleep, and keep every model green.
    pub(crate) fn wait_bounded<'a, T>(
        condvar: &Condvar,
        guard: MutexGuard<'a, T>,
        _bound: Duration,
    ) -> (MutexGuard<'a, T>, bool) {
        let guard = condvar.wait(guard).expect("models do not poison locks");
        (guard, false)
    }
}

#[cfg(not(loom))]
mod shadow {
    use std::ops::Range;

    /// Nothing: the accesses are checked under loom only.
    #[derive(Debug)]
    pub(crate) struct Shadow;

    impl Shadow {
        pub(crate) fn new(_granules: usize) -> Self {
            Self
        }

        #[inline(always)]
        pub(crate) fn read(&self, _granules: Range<usize>) {}

        #[inline(always)]
        pub(crate) fn write(&self, _granules: Range<usize>) {}
    }
}

#[cfg(loom)]
mod shadow {
    use std::ops::Range;

    use loom::{alloc::Track, cell::UnsafeCell};

    /// One loom cell for each granule of memory that is shared by ranges. Whoever reads or writes
    /// a range says so here, and loom checks it against everybody else's. To free the memory is to
    /// write all of it; not to free it is a leak that loom reports.
    #[derive(Debug)]
    pub(crate) struct Shadow {
        cells: Box<[UnsafeCell<()>]>,
        _leaks: Track<()>,
    }

    // SAFETY: the cells hold nothing. Threads meet at them for loom to see.
    #[expect(unsafe_code, reason = "shared on purpose, under loom only")]
    unsafe impl Sync for Shadow {}

    impl Shadow {
        pub(crate) fn new(granules: usize) -> Self {
            Self {
                cells: (0..granules).map(|_| UnsafeCell::new(())).collect(),
                _leaks: Track::new(()),
            }
        }

        pub(crate) fn read(&self, granules: Range<usize>) {
            for cell in &self.cells[granules] {
                cell.with(|_| ());
            }
        }

        pub(crate) fn write(&self, granules: Range<usize>) {
            for cell in &self.cells[granules] {
                cell.with_mut(|_| ());
            }
        }
    }

    impl Drop for Shadow {
        fn drop(&mut self) {
            // A model that fails already must not fail twice: that would abort the run.
            if !std::thread::panicking() {
                self.write(0..self.cells.len());
            }
        }
    }
}
