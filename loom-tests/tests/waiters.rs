//! | model                                             | goes red when                                            |
//! |---------------------------------------------------|----------------------------------------------------------|
//! | `no_notification_falls_between_a_look_and_a_sleep`| a fence is gone; the look under the lock, or the lock    |
//! | `two_things_wake_two_waiters_one_by_one`          | `notify_one` notifies nobody                             |
//! | `everybody_hears_of_an_end`                       | `notify_all` notifies one                                |
//! | `a_recycled_buffer_ends_the_wait_for_room`        | any of those, through a pool                             |
//! | `a_channel_whose_packet_becomes_next_gets_on`     | the reserve, or `next`, is not looked at again           |
#![cfg(loom)]
#![allow(missing_docs, reason = "models")]

use crossbeam_epoch::Collector;
use loom::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};
use vfio_migration::internals::{
    cursor::{Cursor, Inbox, Next},
    pool::{Packer, Pool},
    slot::Publish,
    waiters::Waiters,
};
use vfio_migration_loom_tests::{aside, consume, filled, model, pool};

/// 2 threads.
#[test]
fn no_notification_falls_between_a_look_and_a_sleep() {
    model(|| {
        let shared = Arc::new((Waiters::new(), AtomicU32::new(0)));
        let notifier = thread::spawn({
            let shared = shared.clone();
            move || {
                // Relaxed, on both sides: that the waiter sees it is the fences' work.
                shared.1.store(1, Ordering::Relaxed);
                shared.0.notify_one();
            }
        });
        let (waiters, flag) = &*shared;
        let look = || (flag.load(Ordering::Relaxed) == 1).then_some(());
        assert_eq!(waiters.wait(None, look), Some(()));
        notifier.join().unwrap();
    });
}

/// 3 threads: each of two waits for one of two things.
#[test]
fn two_things_wake_two_waiters_one_by_one() {
    model(|| {
        let shared = Arc::new((Waiters::new(), AtomicU32::new(0)));
        let threads = [(); 2].map(|()| {
            let shared = shared.clone();
            thread::spawn(move || {
                let (waiters, things) = &*shared;
                let take = |count: u32| count.checked_sub(1);
                let look = || {
                    things
                        .fetch_update(Ordering::AcqRel, Ordering::Acquire, take)
                        .ok()
                };
                waiters.wait(None, look).unwrap();
            })
        });
        for _ in 0..2 {
            shared.1.fetch_add(1, Ordering::AcqRel);
            shared.0.notify_one();
        }
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

/// 3 threads.
#[test]
fn everybody_hears_of_an_end() {
    model(|| {
        let shared = Arc::new((Waiters::new(), AtomicU32::new(0)));
        let threads = [(); 2].map(|()| {
            let shared = shared.clone();
            thread::spawn(move || {
                let look = || (shared.1.load(Ordering::Acquire) == 1).then_some(());
                shared.0.wait(None, look).unwrap();
            })
        });
        shared.1.store(1, Ordering::Release);
        shared.0.notify_all();
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

/// 2 threads, 1 buffer: back-pressure.
#[test]
fn a_recycled_buffer_ends_the_wait_for_room() {
    model(|| {
        let (room, pool) = (Arc::new(Waiters::new()), pool(1, 0));
        let held = filled(&mut Packer::new(pool.clone()), 1).unwrap();
        let driver = thread::spawn({
            let (room, pool) = (room.clone(), pool.clone());
            move || {
                assert_eq!(consume(&pool, held), 1);
                room.notify_all();
            }
        });
        let mut packer = Packer::new(pool);
        let mut lease = room.wait(None, || packer.lease(64)).unwrap();
        lease.bytes_mut().fill(2);
        driver.join().unwrap();
    });
}

/// 2 threads, 1 buffer that is not given back, 1 reserve: the packet waits until it is next.
#[test]
fn a_channel_whose_packet_becomes_next_gets_on() {
    model(|| {
        let (room, pool) = (Arc::new(Waiters::new()), pool(1, 1));
        let collector = Collector::new();
        let inbox = Arc::new(Inbox::new(collector.clone(), 8));
        let held = filled(&mut Packer::new(pool.clone()), 9).unwrap();
        let handle = collector.register();
        let published = inbox.publish(0, aside(0), &handle.pin());
        assert_eq!(published, Publish::Published);
        let driver = thread::spawn({
            let (room, inbox) = (room.clone(), inbox.clone());
            move || {
                let handle = collector.register();
                let mut cursor = Cursor::new();
                let taken = cursor.take(&inbox, &handle.pin());
                assert!(matches!(taken, Next::Packet(0, _)));
                room.notify_all();
            }
        });
        let mut packer = Packer::new(pool.clone());
        let look = || {
            packer.lease(64).or_else(|| {
                (inbox.next() == 1)
                    .then(|| Pool::reserve(pool.clone(), 0))
                    .flatten()
            })
        };
        let lease = room.wait(None, look).unwrap();
        driver.join().unwrap();
        drop(lease);
        assert_eq!(consume(&pool, held), 9);
    });
}
