//! A thread that waits is notified of whatever was made so before.
//!
//! Sleeps have no bound under loom: a notification that is lost is a deadlock, which loom reports.
//!
//! | model | goes red when |
//! |---|---|
//! | `a_notification_ends_the_wait` | either fence, the look under the lock, or the lock's round trip is gone |
//! | `all_who_wait_are_notified` | `notify_all` notifies one |
//! | `two_notifications_end_two_waits` | `waiting` is not counted, or `notify_one` loses one |
//! | `what_one_cannot_use_another_is_told_of` | whoever is told and finds nothing does not tell the next |
//! | `a_recycled_lease_ends_a_channels_wait` | the same, for the pool |
//! | `a_channel_gets_on_when_its_packet_is_next` | the wait does not see the reader |
//! | `a_channel_is_told_of_its_turn_alone` | either fence around `awaited` is gone, or the channel does not say what it waits for |
//! | `all_who_wait_for_their_turns_are_told` | one channel's idx hides another's, or what was taken back is not said again |
#![cfg(loom)]
#![expect(
    clippy::arc_with_non_send_sync,
    reason = "a model's threads are all one thread of the system"
)]

use std::sync::Arc;

use crossbeam_epoch::Collector;
use loom::{
    sync::atomic::{
        AtomicU32,
        Ordering::{Acquire, Relaxed, Release},
    },
    thread,
};
use vfio_migration::internals::{
    pool::Pool,
    reorder_buffer::{Next, ReorderBuffer, ReorderReader},
    slot::Publish,
    waiters::Waiters,
};
use vfio_migration_loom_tests::{Participant, aside, lease, model, pool};

/// One waiter, one notifier. 2 threads, 2 preemptions.
#[test]
fn a_notification_ends_the_wait() {
    for all in [false, true] {
        model(move || {
            let shared = Arc::new((Waiters::new(), AtomicU32::new(0)));
            let waiter = thread::spawn({
                let shared = Arc::clone(&shared);
                move || {
                    let look = || (shared.1.load(Relaxed) == 1).then_some(7);
                    assert_eq!(shared.0.wait(None, look), Some(7));
                }
            });
            shared.1.store(1, Relaxed);
            if all {
                shared.0.notify_all();
            } else {
                shared.0.notify_one();
            }
            waiter.join().unwrap();
        });
    }
}

/// Two waiters for one thing, one notifier. 3 threads, 2 preemptions.
#[test]
fn all_who_wait_are_notified() {
    model(|| {
        let shared = Arc::new((Waiters::new(), AtomicU32::new(0)));
        let waiters = [(); 2].map(|()| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let look = || (shared.1.load(Relaxed) == 1).then_some(());
                assert_eq!(shared.0.wait(None, look), Some(()));
            })
        });
        shared.1.store(1, Relaxed);
        shared.0.notify_all();
        for waiter in waiters {
            waiter.join().unwrap();
        }
    });
}

/// Two waiters, and two things of which each can have one. 3 threads, 2 preemptions.
#[test]
fn two_notifications_end_two_waits() {
    model(|| {
        let shared = Arc::new((Waiters::new(), AtomicU32::new(0)));
        let waiters = [(); 2].map(|()| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let less = |things: u32| things.checked_sub(1);
                let look = || shared.1.fetch_update(Acquire, Relaxed, less).ok();
                assert!(shared.0.wait(None, look).is_some());
            })
        });
        for _ in 0..2 {
            shared.1.fetch_add(1, Release);
            shared.0.notify_one();
        }
        for waiter in waiters {
            waiter.join().unwrap();
        }
    });
}

/// Two wait for different things, and one of them is there: whoever is told first, the right one gets
/// it. 3 threads, 2 preemptions.
#[test]
fn what_one_cannot_use_another_is_told_of() {
    model(|| {
        let shared = Arc::new((Waiters::new(), AtomicU32::new(0)));
        let waiters = [1, 2].map(|thing| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let look = || (shared.1.load(Relaxed) & thing == thing).then_some(());
                assert_eq!(shared.0.wait(None, look), Some(()));
            })
        });
        for (there, waiter) in [1, 1 | 2].into_iter().zip(waiters) {
            shared.1.store(there, Relaxed);
            shared.0.notify_one();
            waiter.join().unwrap();
        }
    });
}

/// A channel waits for the only buffer, the driver gives it back. 2 threads, 1 buffer, 2
/// preemptions.
#[test]
fn a_recycled_lease_ends_a_channels_wait() {
    model(|| {
        let shared = Arc::new((Waiters::new(), pool(1, 64, 0)));
        let (room, pool) = &*shared;
        let mut io_thread = lease(pool).expect("the only buffer");
        let channel = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                let mut lease = shared
                    .0
                    .wait(None, || lease(&shared.1))
                    .expect("no deadline");
                lease.bytes_mut().fill(1);
            }
        });
        io_thread.bytes_mut().fill(2);
        drop(io_thread);
        room.notify_one();
        channel.join().unwrap();
    });
}

/// The pool is empty, and stays so; the I/O thread takes idx 0, and with that the channel's packet,
/// idx 1, may have the reserve. 2 threads, 1 buffer, 1 reserve, 2 preemptions.
#[test]
fn a_channel_gets_on_when_its_packet_is_next() {
    model(|| {
        let collector = Collector::new();
        let io_thread = Participant::new(&collector);
        let shared = Arc::new((
            Waiters::new(),
            pool(1, 64, 1),
            ReorderBuffer::new(collector, 100),
        ));
        let (room, pool, reorder) = &*shared;
        let held = lease(pool).expect("the only buffer");
        let published = reorder.publish(0, aside(0), &io_thread.pin());
        assert_eq!(published, Publish::Published);
        let channel = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                let (room, pool, reorder) = &*shared;
                let look = || {
                    lease(pool).or_else(|| {
                        (reorder.next() == 1)
                            .then(|| Pool::reserve(Arc::clone(pool), 0))
                            .flatten()
                    })
                };
                let mut reserve = room.wait(None, look).expect("no deadline");
                reserve.bytes_mut().fill(1);
            }
        });
        let taken = ReorderReader::new().take(reorder, &io_thread.pin());
        assert_eq!(taken, Next::Packet(0, aside(0)));
        room.notify_all();
        channel.join().unwrap();
        drop(held);
    });
}

/// A channel waits until its idx is next, and the I/O thread notifies only where somebody waits for that.
fn take_turn(room: &Waiters, reorder: &ReorderBuffer, index: u32) {
    let look = || {
        reorder.wait_for(index);
        (reorder.next() >= index).then_some(())
    };
    room.wait(None, look).expect("no deadline");
}

/// The I/O thread takes what is next.
fn take_next(reorder: &ReorderBuffer, reader: &mut ReorderReader, io_thread: &Participant) {
    let taken = reader.take(reorder, &io_thread.pin());
    assert!(matches!(taken, Next::Packet(..)));
}

/// A reorder buffer where idx 0 and 1 are.
fn two_packets(io_thread: &Participant, collector: Collector) -> ReorderBuffer {
    let reorder = ReorderBuffer::new(collector, 100);
    for index in [0, 1] {
        let published = reorder.publish(index, aside(index.into()), &io_thread.pin());
        assert_eq!(published, Publish::Published);
    }
    reorder
}

/// The I/O thread takes idx 0 and 1 at once; a channel waits for the turn of one of the next. 2 threads,
/// 2 preemptions.
#[test]
fn a_channel_is_told_of_its_turn_alone() {
    for index in [1, 2] {
        model(move || {
            let collector = Collector::new();
            let io_thread = Participant::new(&collector);
            let shared = Arc::new((Waiters::new(), two_packets(&io_thread, collector)));
            let (room, reorder) = &*shared;
            let channel = thread::spawn({
                let shared = Arc::clone(&shared);
                move || take_turn(&shared.0, &shared.1, index)
            });
            let mut reader = ReorderReader::new();
            for _ in 0..2 {
                take_next(reorder, &mut reader, &io_thread);
            }
            if reader.is_awaited(reorder) {
                room.notify_all();
            }
            channel.join().unwrap();
        });
    }
}

/// The I/O thread takes idx 0 and 1; two channels wait for the turns of 1 and 2. 3 threads, 2
/// preemptions.
#[test]
fn all_who_wait_for_their_turns_are_told() {
    model(|| {
        let collector = Collector::new();
        let io_thread = Participant::new(&collector);
        let shared = Arc::new((Waiters::new(), two_packets(&io_thread, collector)));
        let (room, reorder) = &*shared;
        let channels = [1, 2].map(|index| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || take_turn(&shared.0, &shared.1, index))
        });
        let mut reader = ReorderReader::new();
        for channel in channels {
            take_next(reorder, &mut reader, &io_thread);
            if reader.is_awaited(reorder) {
                room.notify_all();
            }
            // What comes next may be what this one brings.
            channel.join().unwrap();
        }
    });
}
