//! Cancellation and want-exit, in each place where the driver and the device's thread can be.
//!
//! | model                                            | goes red when                                            |
//! |--------------------------------------------------|----------------------------------------------------------|
//! | `the_end_is_announced_once_and_after_the_work`   | the flag edge is Relaxed; `end` may be told twice        |
//! | `want_exit_ends_a_wait_for_the_drivers_result`   | `stop` is not looked at in the wait                      |
//! | `quit_ends_a_wait_for_the_config`                | `stop` is not looked at in the wait                      |
//! | `the_config_is_ready_before_during_or_after`     | `config_ready` does not notify; the flag edge is Relaxed |
//! | `a_result_counts_although_it_is_cancelled`       | `stop` is looked at before the result                    |
//! | `of_two_cancels_one_is_the_first`                | flags are set by a load and a store                      |
//! | `a_cancel_before_the_start_is_seen_by_it`        | a flag is taken back                                     |
#![cfg(loom)]
#![allow(missing_docs, reason = "models")]

use loom::{cell::UnsafeCell, sync::Arc, thread};
use vfio_migration::internals::control::{Control, Stop};
use vfio_migration_loom_tests::model;

/// What a thread does before it sets a flag, which who sees the flag may touch.
struct Work(UnsafeCell<u32>);

// SAFETY: what orders the accesses is what the models are about; loom checks them.
#[expect(
    unsafe_code,
    reason = "loom's cell checks the accesses that it makes possible"
)]
unsafe impl Sync for Work {}

impl Work {
    fn write(&self) {
        self.0.with_mut(|_| ());
    }

    fn read(&self) {
        self.0.with(|_| ());
    }
}

fn shared() -> Arc<(Control, Work)> {
    Arc::new((Control::new(), Work(UnsafeCell::new(0))))
}

/// 3 threads: the device's thread ends while two clean up.
#[test]
fn the_end_is_announced_once_and_after_the_work() {
    model(|| {
        let shared = shared();
        let device = thread::spawn({
            let shared = shared.clone();
            move || {
                shared.1.write();
                assert!(shared.0.end());
                assert!(!shared.0.end());
            }
        });
        let other = thread::spawn({
            let shared = shared.clone();
            move || {
                assert!(shared.0.wait_end(None));
                shared.1.read();
            }
        });
        assert!(shared.0.wait_end(None));
        shared.1.read();
        device.join().unwrap();
        other.join().unwrap();
    });
}

/// 2 threads: the driver starved for ever.
#[test]
fn want_exit_ends_a_wait_for_the_drivers_result() {
    model(|| {
        let shared = shared();
        let device = thread::spawn({
            let shared = shared.clone();
            move || {
                assert_eq!(shared.0.wait_drained(), Err(Stop::Exit));
                shared.1.read();
                shared.0.end();
            }
        });
        shared.1.write();
        shared.0.exit();
        assert!(shared.0.wait_end(None));
        device.join().unwrap();
    });
}

/// 3 threads: the device's thread waits for the config, which becomes ready, or not.
#[test]
fn quit_ends_a_wait_for_the_config() {
    model(|| {
        let shared = shared();
        let device = thread::spawn({
            let shared = shared.clone();
            move || {
                let waited = shared.0.wait_config_ready();
                assert!(matches!(waited, Ok(()) | Err(Stop::Quit)));
                shared.0.end();
            }
        });
        let canceller = thread::spawn({
            let shared = shared.clone();
            move || shared.0.quit()
        });
        assert!(shared.0.wait_end(None));
        assert!(canceller.join().unwrap());
        device.join().unwrap();
    });
}

/// 2 threads.
#[test]
fn the_config_is_ready_before_during_or_after() {
    model(|| {
        let shared = shared();
        let main = thread::spawn({
            let shared = shared.clone();
            move || {
                shared.1.write();
                assert!(shared.0.config_ready());
                assert!(!shared.0.config_ready(), "the second is an error");
            }
        });
        assert_eq!(shared.0.wait_config_ready(), Ok(()));
        shared.1.read();
        main.join().unwrap();
    });
}

/// 3 threads: completion against cancellation.
#[test]
fn a_result_counts_although_it_is_cancelled() {
    model(|| {
        let shared = shared();
        let driver = thread::spawn({
            let shared = shared.clone();
            move || {
                shared.1.write();
                assert!(shared.0.drained());
            }
        });
        let canceller = thread::spawn({
            let shared = shared.clone();
            move || {
                shared.0.quit();
            }
        });
        if shared.0.wait_drained().is_ok() {
            shared.1.read();
        } else {
            // The driver's result comes all the same, and is waited for by itself.
            while !shared.0.is_drained() {
                thread::yield_now();
            }
            shared.1.read();
        }
        canceller.join().unwrap();
        driver.join().unwrap();
        // Both are there now: the result counts.
        assert_eq!(shared.0.wait_drained(), Ok(()));
    });
}

/// 3 threads.
#[test]
fn of_two_cancels_one_is_the_first() {
    model(|| {
        let shared = shared();
        let cancel = || {
            let shared = shared.clone();
            thread::spawn(move || shared.0.quit())
        };
        let cancels = [cancel(), cancel()];
        shared.0.exit();
        let first: Vec<_> = cancels.map(|cancel| cancel.join().unwrap()).into();
        assert_eq!(first.iter().filter(|&&first| first).count(), 1);
        assert_eq!(shared.0.stop(), Some(Stop::Quit));
        assert!(!shared.0.exit(), "neither has wiped out the other");
    });
}

/// 2 threads.
#[test]
fn a_cancel_before_the_start_is_seen_by_it() {
    model(|| {
        let shared = shared();
        shared.0.quit();
        let main = thread::spawn({
            let shared = shared.clone();
            move || shared.0.start()
        });
        if shared.0.is_started() {
            assert_eq!(shared.0.stop(), Some(Stop::Quit));
        }
        assert!(main.join().unwrap());
        assert_eq!(shared.0.stop(), Some(Stop::Quit));
    });
}
