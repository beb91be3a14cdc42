//! Whatever a device is told, and whenever: its thread ends, once, and whoever waits for that sees
//! it.
//!
//! | model | goes red when |
//! |---|---|
//! | `the_io_threads_result_is_seen` | either side of the flag edge is gone |
//! | `a_stop_carries_what_came_before` | `stop` is Relaxed |
//! | `a_second_setter_sees_the_firsts_doing` | `set` neither acquires nor notifies |
//! | `a_flag_passes_on_what_others_set_before` | `set` stores instead of or-ing |
//! | `a_config_notice_ends_the_wait` | `set` does not notify, or the flag is not looked at |
//! | `of_two_config_notices_one_is_the_first` | `set` tells both, or neither |
//! | `a_cancellation_ends_the_wait_for_the_config` | that wait does not look for a stop |
//! | `a_cancellation_races_the_config_notice` | a flag is lost |
//! | `a_cancellation_races_the_result` | the wait for the result does not look for a stop, or loses it |
//! | `the_end_is_announced_once_and_waited_for` | `wait_end` returns before the end |
//! | `all_who_wait_for_the_end_are_told` | `set` notifies one |
//! | `two_cancellations_and_an_exit` | a stop is lost |
//! | `a_cancellation_before_the_start` | a stop is taken back by the start |
#![cfg(loom)]
#![expect(
    clippy::arc_with_non_send_sync,
    reason = "a model's threads are all one thread of the system"
)]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use loom::{cell::UnsafeCell, thread};
use vfio_migration::internals::flags::{DeviceFlags, Stop};
use vfio_migration_loom_tests::model;

/// A device's flags, and something that one thread does and another looks at.
struct Device {
    flags: DeviceFlags,
    doing: UnsafeCell<()>,
}

fn device() -> Arc<Device> {
    Arc::new(Device {
        flags: DeviceFlags::new(),
        doing: UnsafeCell::new(()),
    })
}

impl Device {
    fn act(&self) {
        self.doing.with_mut(|_| ());
    }

    fn look(&self) {
        self.doing.with(|_| ());
    }

    /// What the device's thread does: waits for the I/O thread, then for the config, then ends.
    fn run(&self) -> Result<(), Stop> {
        let result = self
            .flags
            .wait_drained()
            .and_then(|()| self.flags.wait_config_ready(None).unwrap());
        self.act();
        assert!(self.flags.end(), "the end is announced once");
        result
    }
}

/// The I/O thread leaves its result, the device's thread waits for it. 2 threads, 2 preemptions.
#[test]
fn the_io_threads_result_is_seen() {
    model(|| {
        let device = device();
        let io_thread = thread::spawn({
            let device = Arc::clone(&device);
            move || {
                device.act();
                assert!(device.flags.drained());
            }
        });
        if device.flags.is_drained() {
            device.look();
        }
        assert_eq!(device.flags.wait_drained(), Ok(()));
        device.look();
        io_thread.join().unwrap();
    });
}

/// One thread acts and cancels, another asks whether to stop. 2 threads, 2 preemptions.
#[test]
fn a_stop_carries_what_came_before() {
    model(|| {
        let device = device();
        let other = thread::spawn({
            let device = Arc::clone(&device);
            move || {
                device.act();
                device.flags.quit();
            }
        });
        if device.flags.stop().is_some() {
            device.look();
        }
        other.join().unwrap();
    });
}

/// Two threads set the flag after they have done the same. 2 threads, 2 preemptions.
#[test]
fn a_second_setter_sees_the_firsts_doing() {
    model(|| {
        let device = device();
        let other = thread::spawn({
            let device = Arc::clone(&device);
            move || {
                device.act();
                device.flags.quit();
            }
        });
        if !device.flags.quit() {
            device.look();
        }
        other.join().unwrap();
    });
}

/// One thread acts and sets a flag, another sets a second, a third looks at the second and then at
/// the first. 3 threads, 2 preemptions.
#[test]
fn a_flag_passes_on_what_others_set_before() {
    model(|| {
        let device = device();
        let first = thread::spawn({
            let device = Arc::clone(&device);
            move || {
                device.act();
                device.flags.start();
            }
        });
        let second = thread::spawn({
            let device = Arc::clone(&device);
            move || {
                device.flags.exit();
            }
        });
        if device.flags.stop().is_some() && device.flags.is_started() {
            device.look();
        }
        first.join().unwrap();
        second.join().unwrap();
        assert!(device.flags.is_started());
        assert_eq!(device.flags.stop(), Some(Stop::Exit));
    });
}

/// The main thread says that the config may be loaded, before, in, or after the wait. 2 threads, 2
/// preemptions.
#[test]
fn a_config_notice_ends_the_wait() {
    model(|| {
        let device = device();
        let main = thread::spawn({
            let device = Arc::clone(&device);
            move || {
                device.act();
                assert!(device.flags.config_ready());
            }
        });
        assert_eq!(device.flags.wait_config_ready(None).unwrap(), Ok(()));
        device.look();
        main.join().unwrap();
    });
}

/// Two config notices, and the device's thread. 3 threads, 2 preemptions.
#[test]
fn of_two_config_notices_one_is_the_first() {
    model(|| {
        let device = device();
        let notices = [(); 2].map(|()| {
            let device = Arc::clone(&device);
            thread::spawn(move || device.flags.config_ready())
        });
        assert_eq!(device.flags.wait_config_ready(None).unwrap(), Ok(()));
        let first = notices.map(|notice| notice.join().unwrap());
        assert_eq!(first.iter().filter(|&&first| first).count(), 1);
    });
}

/// The device's thread waits for the config, which never comes. 2 threads, 2 preemptions.
#[test]
fn a_cancellation_ends_the_wait_for_the_config() {
    for (cancel, stop) in [
        (DeviceFlags::quit as fn(&DeviceFlags) -> bool, Stop::Quit),
        (DeviceFlags::exit, Stop::Exit),
    ] {
        model(move || {
            let device = device();
            let main = thread::spawn({
                let device = Arc::clone(&device);
                move || assert!(cancel(&device.flags))
            });
            assert_eq!(device.flags.wait_config_ready(None).unwrap(), Err(stop));
            main.join().unwrap();
        });
    }
}

/// A config notice and a cancellation at once. 3 threads, 2 preemptions.
#[test]
fn a_cancellation_races_the_config_notice() {
    model(|| {
        let device = device();
        let main = thread::spawn({
            let device = Arc::clone(&device);
            move || assert!(device.flags.config_ready())
        });
        let canceller = thread::spawn({
            let device = Arc::clone(&device);
            move || assert!(device.flags.quit())
        });
        let result = device.flags.wait_config_ready(None).unwrap();
        assert!(matches!(result, Ok(()) | Err(Stop::Quit)));
        main.join().unwrap();
        canceller.join().unwrap();
        // Whatever came first: after a cancellation nothing is loaded.
        assert_eq!(
            device.flags.wait_config_ready(None).unwrap(),
            Err(Stop::Quit)
        );
    });
}

/// The I/O thread finishes while the main thread cancels. The device's thread waits for it, and if it
/// is told to stop, for as long as the grace time. 3 threads, 2 preemptions.
#[test]
fn a_cancellation_races_the_result() {
    model(|| {
        let device = device();
        let io_thread = thread::spawn({
            let device = Arc::clone(&device);
            move || {
                device.act();
                assert!(device.flags.drained());
            }
        });
        let main = thread::spawn({
            let device = Arc::clone(&device);
            move || assert!(device.flags.quit())
        });
        if let Err(stop) = device.flags.wait_drained() {
            assert_eq!(stop, Stop::Quit);
            let grace = Instant::now() + Duration::from_secs(3600);
            assert!(device.flags.wait_drained_until(grace));
        }
        device.look();
        io_thread.join().unwrap();
        main.join().unwrap();
    });
}

/// A result never comes: a cancellation alone ends the wait for it. Cleanup waits for the end. 3
/// threads, 2 preemptions.
#[test]
fn the_end_is_announced_once_and_waited_for() {
    model(|| {
        let device = device();
        let thread = thread::spawn({
            let device = Arc::clone(&device);
            move || device.run()
        });
        device.flags.exit();
        assert!(device.flags.wait_end(None));
        // Before the join: what the device's thread did is over.
        device.look();
        assert!(device.flags.is_ended());
        assert_eq!(thread.join().unwrap(), Err(Stop::Exit));
    });
}

/// Two wait for the end, which each of them finds. 3 threads, 2 preemptions.
#[test]
fn all_who_wait_for_the_end_are_told() {
    model(|| {
        let device = device();
        let waiters = [(); 2].map(|()| {
            let device = Arc::clone(&device);
            thread::spawn(move || assert!(device.flags.wait_end(None)))
        });
        assert!(device.flags.end());
        for waiter in waiters {
            waiter.join().unwrap();
        }
    });
}

/// Two threads cancel and one of them cleans up, while the device's thread waits for the config. 3
/// threads, 2 preemptions.
#[test]
fn two_cancellations_and_an_exit() {
    model(|| {
        let device = device();
        assert!(device.flags.drained());
        let thread = thread::spawn({
            let device = Arc::clone(&device);
            move || device.run()
        });
        let other = thread::spawn({
            let device = Arc::clone(&device);
            move || device.flags.quit()
        });
        let mine = device.flags.quit();
        device.flags.exit();
        assert!(device.flags.wait_end(None));
        device.look();
        assert_ne!(mine, other.join().unwrap(), "one of the two was the first");
        assert_eq!(thread.join().unwrap(), Err(Stop::Quit));
    });
}

/// A cancellation before, in, or after the start. 2 threads, 2 preemptions.
#[test]
fn a_cancellation_before_the_start() {
    model(|| {
        let device = device();
        let main = thread::spawn({
            let device = Arc::clone(&device);
            move || assert!(device.flags.start())
        });
        assert!(device.flags.quit());
        assert_eq!(device.run(), Err(Stop::Quit));
        main.join().unwrap();
        assert!(device.flags.is_started());
    });
}
