//! The one place that chooses between `std` and `loom`.
//!
//! Every atomic, lock and shared pointer of the hand-overs is imported from here. `cfg(loom)` alone
//! decides (not `cfg(all(test, loom))`): the models live in another package.

#[cfg(loom)]
pub(crate) use loom::sync::{Arc, Condvar, Mutex, MutexGuard};
#[cfg(not(any(loom, feature = "internals")))]
pub(crate) use std::sync::Condvar;
#[cfg(not(loom))]
pub(crate) use std::sync::{Arc, Mutex, MutexGuard, atomic};

#[cfg(all(feature = "internals", not(loom)))]
pub(crate) mod stepped;

#[cfg(all(feature = "internals", not(loom)))]
pub(crate) use self::stepped::{Condvar, lock_across_waits, wait_bounded};
#[cfg(any(loom, not(feature = "internals")))]
pub(crate) use self::wait::wait_bounded;

pub(crate) use self::{crossing::Crossing, shadow::Shadow};

/// Takes a lock whose holders never panic while they hold it, or leave nothing half done if they
/// do: a poisoned one is as good as any.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// As [`lock`], for a lock that its holder may keep over a wait of its own: a send's, say.
#[cfg(any(loom, not(feature = "internals")))]
pub(crate) fn lock_across_waits<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    lock(mutex)
}

#[cfg(not(any(loom, feature = "internals")))]
mod wait {
    use std::{sync::PoisonError, time::Duration};

    use super::{Condvar, Mutex, MutexGuard};

    /// Sleeps on `condvar` for `bound` at most. Returns whether the bound ended the sleep.
    pub(crate) fn wait_bounded<'a, T>(
        condvar: &Condvar,
        _mutex: &'a Mutex<T>,
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

    use super::{Condvar, Mutex, MutexGuard};

    /// Sleeps without a bound: one would end every sleep, and keep every model green.
    pub(crate) fn wait_bounded<'a, T>(
        condvar: &Condvar,
        _mutex: &'a Mutex<T>,
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

#[cfg(not(loom))]
mod crossing {
    /// Nothing: loom alone needs to be told.
    #[derive(Debug, Default)]
    pub(crate) struct Crossing;

    impl Crossing {
        pub(crate) fn new() -> Self {
            Self
        }

        #[inline(always)]
        pub(crate) fn pass(&self) {}
    }
}

#[cfg(loom)]
mod crossing {
    use loom::sync::atomic::{AtomicBool, Ordering::Relaxed};

    /// Where threads' accesses to one word meet. Every access passes it first.
    ///
    /// Loom 0.7 remembers the last access of a word only. Where a thread loads a word and then
    /// writes it, its own load hides another thread's earlier one, and the schedule in which the
    /// write comes before that load is never tried. Stores that pass here are all each other's
    /// rivals, so every order of them is tried, and with it every order of the accesses behind
    /// them. Nobody loads what is stored, so it orders no memory.
    #[derive(Debug, Default)]
    pub(crate) struct Crossing(AtomicBool);

    impl Crossing {
        pub(crate) fn new() -> Self {
            Self::default()
        }

        pub(crate) fn pass(&self) {
            self.0.store(true, Relaxed);
        }
    }
}

/// Loom's atomics, with a [`Crossing`] before each access.
#[cfg(loom)]
pub(crate) mod atomic {
    pub(crate) use loom::sync::atomic::{Ordering, fence};

    use super::Crossing;

    macro_rules! atomic {
        ($name:ident, $value:ty, $($method:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => {
            #[derive(Debug, Default)]
            pub(crate) struct $name {
                crossing: Crossing,
                word: loom::sync::atomic::$name,
            }

            impl $name {
                pub(crate) fn new(value: $value) -> Self {
                    Self {
                        crossing: Crossing::new(),
                        word: loom::sync::atomic::$name::new(value),
                    }
                }

                $(
                    #[allow(dead_code, reason = "one list for all widths")]
                    pub(crate) fn $method(&self, $($argument: $type),*) -> $result {
                        self.crossing.pass();
                        self.word.$method($($argument),*)
                    }
                )*
            }
        };
    }

    macro_rules! integer {
        ($name:ident, $value:ty) => {
            atomic! {
                $name, $value,
                load(order: Ordering) -> $value;
                store(value: $value, order: Ordering) -> ();
                swap(value: $value, order: Ordering) -> $value;
                compare_exchange(from: $value, to: $value, success: Ordering, failure: Ordering)
                    -> Result<$value, $value>;
                compare_exchange_weak(from: $value, to: $value, success: Ordering, failure: Ordering)
                    -> Result<$value, $value>;
                fetch_add(value: $value, order: Ordering) -> $value;
                fetch_sub(value: $value, order: Ordering) -> $value;
                fetch_or(value: $value, order: Ordering) -> $value;
                fetch_max(value: $value, order: Ordering) -> $value;
                fetch_min(value: $value, order: Ordering) -> $value;
            }
        };
    }

    integer!(AtomicU32, u32);
    integer!(AtomicU64, u64);
    atomic! {
        AtomicBool, bool,
        load(order: Ordering) -> bool;
        store(value: bool, order: Ordering) -> ();
        swap(value: bool, order: Ordering) -> bool;
    }
}
