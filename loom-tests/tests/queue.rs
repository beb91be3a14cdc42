//! | model                                          | goes red when                                              |
//! |------------------------------------------------|------------------------------------------------------------|
//! | `each_packet_has_one_taker_who_sees_its_bytes` | a ticket is taken by a store; the publish edge is Relaxed  |
//! | `the_end_reaches_every_waiting_channel`        | `end` notifies one, or nobody                              |
//! | `a_packet_reaches_a_waiting_channel`           | `publish` does not notify                                  |
//! | `closing_reaches_every_waiting_channel`        | `close` does not notify; a packet is lost                  |
#![cfg(loom)]
#![allow(missing_docs, reason = "models")]

use crossbeam_epoch::Collector;
use loom::{sync::Arc, thread};
use vfio_migration::internals::{
    pool::Packer,
    queue::{Queue, Ticket},
};
use vfio_migration_loom_tests::{aside, consume, filled, model_within, number, pool};

fn queue() -> (Arc<Queue>, Collector) {
    let collector = Collector::new();
    (Arc::new(Queue::new(collector.clone())), collector)
}

/// 3 threads, 2 packets, 2 buffers, 1 segment.
#[test]
fn each_packet_has_one_taker_who_sees_its_bytes() {
    model_within(1, || {
        let ((queue, collector), pool) = (queue(), pool(2, 0));
        let channels = [(); 2].map(|()| {
            let (queue, collector, pool) = (queue.clone(), collector.clone(), pool.clone());
            thread::spawn(move || {
                let handle = collector.register();
                match queue.try_take(&handle.pin()) {
                    Some(Ticket::Packet(packet)) => Some(consume(&pool, packet)),
                    Some(other) => panic!("{other:?}"),
                    None => None,
                }
            })
        });
        let handle = collector.register();
        let mut packer = Packer::new(pool.clone());
        for value in [1, 2] {
            let packet = filled(&mut packer, value).unwrap();
            queue.publish(packet, &handle.pin()).unwrap();
        }
        let mut taken: Vec<_> = channels
            .into_iter()
            .filter_map(|channel| channel.join().unwrap())
            .collect();
        while let Some(Ticket::Packet(packet)) = queue.try_take(&handle.pin()) {
            taken.push(consume(&pool, packet));
        }
        taken.sort_unstable();
        assert_eq!(taken, [1, 2]);
    });
}

/// 3 threads, no packet.
#[test]
fn the_end_reaches_every_waiting_channel() {
    model_within(1, || {
        let (queue, collector) = queue();
        let channels = [(); 2].map(|()| {
            let (queue, collector) = (queue.clone(), collector.clone());
            thread::spawn(move || {
                let handle = collector.register();
                assert_eq!(queue.take(None, || handle.pin()), Some(Ticket::End));
            })
        });
        queue.end();
        for channel in channels {
            channel.join().unwrap();
        }
    });
}

/// 2 threads, 2 packets.
#[test]
fn a_packet_reaches_a_waiting_channel() {
    model_within(1, || {
        let (queue, collector) = queue();
        let channel = thread::spawn({
            let (queue, collector) = (queue.clone(), collector.clone());
            move || {
                let handle = collector.register();
                for expected in [1, 2] {
                    match queue.take(None, || handle.pin()) {
                        Some(Ticket::Packet(packet)) => assert_eq!(number(&packet), expected),
                        other => panic!("{other:?}"),
                    }
                }
            }
        });
        let handle = collector.register();
        for value in [1, 2] {
            queue.publish(aside(value), &handle.pin()).unwrap();
        }
        channel.join().unwrap();
    });
}

/// 2 threads, 1 packet.
#[test]
fn closing_reaches_every_waiting_channel() {
    model_within(1, || {
        let (queue, collector) = queue();
        let channel = thread::spawn({
            let (queue, collector) = (queue.clone(), collector.clone());
            move || {
                let handle = collector.register();
                let mut taken = 0;
                loop {
                    match queue.take(None, || handle.pin()) {
                        Some(Ticket::Packet(packet)) => taken += number(&packet),
                        Some(Ticket::Closed) => return taken,
                        other => panic!("{other:?}"),
                    }
                }
            }
        });
        let handle = collector.register();
        queue.publish(aside(7), &handle.pin()).unwrap();
        let mut abandoned = 0;
        queue.close(&handle.pin(), |packet| abandoned += number(&packet));
        assert_eq!(channel.join().unwrap() + abandoned, 7);
    });
}
