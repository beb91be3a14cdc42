//! Each packet of a save has one taker, and every taker gets an end.
//!
//! | model | goes red when |
//! |---|---|
//! | `each_packet_has_one_taker` | the ticket is no exchange; a slot's or a link's edge is Relaxed |
//! | `two_takers_retire_a_segment` | the count or the list's head is no exchange |
//! | `the_end_reaches_a_waiting_channel` | `end` notifies nobody, or is not looked at |
//! | `the_end_reaches_two_waiting_channels` | `end` notifies one |
//! | `the_end_carries_what_came_before` | either side of the end edge is Relaxed |
//! | `a_closing_reaches_a_waiting_channel` | `close` notifies nobody, or is not looked at |
//! | `a_closing_returns_what_has_no_taker` | a packet is lost or has two owners |
//! | `two_channels_wait_for_two_packets` | a channel believes a head that lags behind another's ticket |
#![cfg(loom)]
#![expect(
    clippy::arc_with_non_send_sync,
    reason = "a model's threads are all one thread of the system"
)]

use std::sync::Arc;

use crossbeam_epoch::Collector;
use loom::cell::UnsafeCell;
use vfio_migration::internals::{
    pool::Pool,
    send_queue::{SendQueue, Taken},
    slot::{Packet, Payload},
    table::SEGMENT,
};
use vfio_migration_loom_tests::{Participant, aside, collect, drained, fresh, model, pool, reused};

/// A queue, its packets' memory, and something that the I/O thread does before the end.
struct Shared {
    queue: SendQueue,
    pool: Arc<Pool>,
    doing: UnsafeCell<()>,
}

/// A queue with `buffers` buffers, and one participant for each of `N` threads.
fn shared<const N: usize>(buffers: u32) -> (Arc<Shared>, [Participant; N]) {
    let collector = Collector::new();
    let participants = std::array::from_fn(|_| Participant::new(&collector));
    let shared = Shared {
        queue: SendQueue::new(collector),
        pool: pool(buffers, 64, 0),
        doing: UnsafeCell::new(()),
    };
    (Arc::new(shared), participants)
}

impl Shared {
    fn publish(&self, byte: u8, io_thread: &Participant) {
        let packet = fresh(&self.pool, byte);
        assert_eq!(self.queue.publish(packet, &io_thread.pin()), Ok(()));
    }

    /// Waits for what comes next. `None` for the end.
    fn take(&self, channel: &Participant) -> Option<u8> {
        match self.queue.take(None, || channel.pin()) {
            Some(Taken::Packet(packet)) => Some(drained(&self.pool, packet)),
            Some(Taken::End) => None,
            other => panic!("no deadline, and nobody closed: {other:?}"),
        }
    }
}

/// The I/O thread publishes two packets, two channels poll. 3 threads, 2 packets, 2 preemptions.
#[test]
fn each_packet_has_one_taker() {
    model(|| {
        let (shared, [io_thread, one, two]) = shared(2);
        let channels = [one, two].map(|channel| {
            let shared = Arc::clone(&shared);
            channel.spawn(move |me| match shared.queue.try_take(&me.pin()) {
                Some(Taken::Packet(packet)) => Some(drained(&shared.pool, packet)),
                None => None,
                other => panic!("nobody ended or closed: {other:?}"),
            })
        });
        shared.publish(0, &io_thread);
        shared.publish(1, &io_thread);
        let mut taken: Vec<u8> = channels
            .into_iter()
            .filter_map(|channel| channel.join().unwrap().0)
            .collect();
        taken.sort_unstable();
        while let Some(Taken::Packet(packet)) = shared.queue.try_take(&io_thread.pin()) {
            taken.push(drained(&shared.pool, packet));
        }
        assert_eq!(taken, [0, 1]);
        assert_eq!(shared.pool.in_use().0, 0);
    });
}

/// Two channels take the last packets of a segment, and one lets the epochs go on. 2 threads, 3
/// packets, 2 segments, 2 preemptions.
#[test]
fn two_takers_retire_a_segment() {
    model(|| {
        let (shared, [mine, theirs]) = shared(0);
        for number in 0..=SEGMENT {
            let published = shared.queue.publish(aside(number.into()), &mine.pin());
            assert_eq!(published, Ok(()));
        }
        let other = theirs.spawn({
            let shared = Arc::clone(&shared);
            move |me| shared.queue.try_take(&me.pin())
        });
        let mut taken = vec![shared.queue.try_take(&mine.pin())];
        taken.push(shared.queue.try_take(&mine.pin()));
        collect(&mine);
        let (theirs, _other) = other.join().unwrap();
        taken.push(theirs);
        let mut numbers: Vec<u64> = taken
            .into_iter()
            .map(|ticket| match ticket {
                Some(Taken::Packet(Packet {
                    payload: Payload::External(number),
                    ..
                })) => number,
                other => panic!("three packets, three takers: {other:?}"),
            })
            .collect();
        numbers.sort_unstable();
        assert_eq!(numbers, [0, 1, 2]);
    });
}

/// The I/O thread publishes and ends, a channel takes all. 2 threads, 1 packet, 2 preemptions.
#[test]
fn the_end_reaches_a_waiting_channel() {
    model(|| {
        let (shared, [io_thread, channel]) = shared(1);
        let channel = channel.spawn({
            let shared = Arc::clone(&shared);
            move |me| [shared.take(me), shared.take(me)]
        });
        shared.publish(7, &io_thread);
        shared.queue.end();
        let (taken, _channel) = channel.join().unwrap();
        assert_eq!(taken, [Some(7), None]);
    });
}

/// The I/O thread ends, two channels wait. 3 threads, no packet, 2 preemptions.
#[test]
fn the_end_reaches_two_waiting_channels() {
    model(|| {
        let (shared, [one, two]) = shared(0);
        let channels = [one, two].map(|channel| {
            let shared = Arc::clone(&shared);
            channel.spawn(move |me| assert_eq!(shared.take(me), None))
        });
        shared.queue.end();
        let _participants = channels.map(|channel| channel.join().unwrap());
    });
}

/// The I/O thread acts and ends, a channel polls. 2 threads, no packet, 2 preemptions.
#[test]
fn the_end_carries_what_came_before() {
    model(|| {
        let (shared, [mine, channel]) = shared(0);
        let channel = channel.spawn({
            let shared = Arc::clone(&shared);
            move |me| {
                // It looks already: no fence of a later guard stands in for the edge.
                let guard = me.pin();
                if let Some(Taken::End) = shared.queue.try_take(&guard) {
                    shared.doing.with(|_| ());
                }
            }
        });
        shared.doing.with_mut(|_| ());
        shared.queue.end();
        let ((), _channel) = channel.join().unwrap();
        drop(mine);
    });
}

/// The I/O thread closes, a channel waits for a packet whose segment is in place, or is not. 2 threads,
/// no packet, 2 preemptions.
#[test]
fn a_closing_reaches_a_waiting_channel() {
    for next in [SEGMENT - 1, SEGMENT] {
        model(move || {
            let (shared, [io_thread, channel]) = shared(0);
            for number in 0..next {
                let packet = || aside(number.into());
                assert_eq!(shared.queue.publish(packet(), &io_thread.pin()), Ok(()));
                let taken = shared.queue.try_take(&channel.pin());
                assert_eq!(taken, Some(Taken::Packet(packet())));
            }
            let channel = channel.spawn({
                let shared = Arc::clone(&shared);
                move |me| shared.queue.take(None, || me.pin())
            });
            let left = |_| panic!("nothing was left");
            shared.queue.close(&io_thread.pin(), left);
            let (taken, _channel) = channel.join().unwrap();
            assert_eq!(taken, Some(Taken::Closed));
        });
    }
}

/// A third thread closes while the I/O thread publishes into a new segment and a channel waits. 3
/// threads, 2 packets, 2 segments, 2 preemptions.
#[test]
fn a_closing_returns_what_has_no_taker() {
    model(|| {
        let (shared, [mine, io_thread, channel]) = shared(2);
        for _ in 1..SEGMENT {
            shared.publish(0, &io_thread);
            assert_eq!(shared.take(&channel), Some(0));
        }
        shared.publish(1, &io_thread);
        let io_thread = io_thread.spawn({
            let shared = Arc::clone(&shared);
            move |me| {
                let packet = fresh(&shared.pool, 2);
                match shared.queue.publish(packet, &me.pin()) {
                    Ok(()) => 1,
                    Err(packet) => {
                        reused(&shared.pool, packet);
                        0
                    }
                }
            }
        });
        let channel = channel.spawn({
            let shared = Arc::clone(&shared);
            move |me| match shared.queue.take(None, || me.pin()) {
                Some(Taken::Packet(packet)) => {
                    reused(&shared.pool, packet);
                    1
                }
                Some(Taken::Closed) => 0,
                other => panic!("no deadline, and no end: {other:?}"),
            }
        });
        let mut returned = 0;
        shared.queue.close(&mine.pin(), |packet| {
            reused(&shared.pool, packet);
            returned += 1;
        });
        let (published, _io_thread) = io_thread.join().unwrap();
        let (taken, _channel) = channel.join().unwrap();
        assert_eq!(returned + taken, 1 + published);
        assert_eq!(shared.pool.in_use().0, 0);
    });
}

/// Two channels wait, the I/O thread publishes for both. 3 threads, 2 packets, 2 preemptions.
#[test]
fn two_channels_wait_for_two_packets() {
    model(|| {
        let (shared, [io_thread, one, two]) = shared(2);
        shared.publish(0, &io_thread);
        let channels = [one, two].map(|channel| {
            let shared = Arc::clone(&shared);
            channel.spawn(move |me| shared.take(me).expect("there is no end"))
        });
        shared.publish(1, &io_thread);
        let mut taken = channels.map(|channel| channel.join().unwrap().0);
        taken.sort_unstable();
        assert_eq!(taken, [0, 1]);
    });
}
