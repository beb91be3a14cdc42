//! A slot's packet has one owner, and whoever takes it sees what its publisher wrote.
//!
//! | model | goes red when |
//! |---|---|
//! | `the_taker_sees_the_publishers_bytes` | either side of the publish edge is Relaxed |
//! | `closing_hands_over_the_publishers_bytes` | `close` is Relaxed |
//! | `racing_publishers_have_one_winner` | `publish` swaps |
//! | `a_large_packet_passes_piece_by_piece` | `publish_rest` is Relaxed, or does not wait for the drained slot |
//! | `a_stranger_is_a_duplicate_between_two_pieces` | `publish` takes a drained slot |
//! | `a_packet_is_taken_or_closed_but_not_both` | `take` swaps |
//! | `closing_between_two_pieces_loses_none` | `publish_rest` swaps, or takes a closed slot |
#![cfg(loom)]

use std::sync::Arc;

use loom::thread;
use vfio_migration::internals::slot::{Packet, Publish, Slot, Take};
use vfio_migration_loom_tests::{aside, drained, fresh, model, pool, reused};

/// One channel, one I/O thread that polls once. 2 threads, 1 slot, 1 buffer, 2 preemptions.
#[test]
fn the_taker_sees_the_publishers_bytes() {
    model(|| {
        let shared = Arc::new((Slot::new(), pool(1, 64, 0)));
        let channel = thread::spawn({
            let shared = Arc::clone(&shared);
            move || assert_eq!(shared.0.publish(fresh(&shared.1, 7)), Publish::Published)
        });
        let (slot, pool) = &*shared;
        // Before the join, which is an edge of its own and would hide this one.
        if let Take::Taken(packet) = slot.take() {
            assert_eq!(drained(pool, packet), 7);
        }
        channel.join().unwrap();
    });
}

/// One channel, one thread that closes. 2 threads, 1 slot, 1 buffer, 2 preemptions.
#[test]
fn closing_hands_over_the_publishers_bytes() {
    model(|| {
        let shared = Arc::new((Slot::new(), pool(1, 64, 0)));
        let channel = thread::spawn({
            let shared = Arc::clone(&shared);
            move || match shared.0.publish(fresh(&shared.1, 7)) {
                Publish::Published => true,
                Publish::Closed(packet) => {
                    reused(&shared.1, packet);
                    false
                }
                refused => panic!("nobody else published: {refused:?}"),
            }
        });
        let (slot, pool) = &*shared;
        let closed = slot.close().map(|packet| reused(pool, packet)).is_some();
        assert_eq!(channel.join().unwrap(), closed);
        assert_eq!(pool.in_use().0, 0, "the buffer came home");
    });
}

/// Two channels with the same idx, and an I/O thread that polls. 3 threads, 1 slot, 2 buffers, 2
/// preemptions.
#[test]
fn racing_publishers_have_one_winner() {
    model(|| {
        let shared = Arc::new((Slot::new(), pool(2, 64, 0)));
        let channels = [1, 2].map(|byte| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || match shared.0.publish(fresh(&shared.1, byte)) {
                Publish::Published => Some(byte),
                Publish::Duplicate(packet) => {
                    // The loser's packet is still the loser's.
                    reused(&shared.1, packet);
                    None
                }
                refused => panic!("nobody closed: {refused:?}"),
            })
        });
        let (slot, pool) = &*shared;
        let early = match slot.take() {
            Take::Taken(packet) => Some(drained(pool, packet)),
            _ => None,
        };
        let won = channels.map(|channel| channel.join().unwrap());
        let taken = early.unwrap_or_else(|| match slot.take() {
            Take::Taken(packet) => drained(pool, packet),
            other => panic!("published, and nobody closed: {other:?}"),
        });
        let winners: Vec<u8> = won.into_iter().flatten().collect();
        assert_eq!(winners, [taken]);
        assert_eq!(pool.in_use().0, 0);
    });
}

/// A packet of two pieces, and an I/O thread that polls twice. 2 threads, 1 slot, 2 buffers, 2
/// preemptions.
#[test]
fn a_large_packet_passes_piece_by_piece() {
    model(|| {
        let shared = Arc::new((Slot::new(), pool(2, 64, 0)));
        let channel = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                let (slot, pool) = &*shared;
                let first = Packet {
                    more: true,
                    ..fresh(pool, 1)
                };
                assert_eq!(slot.publish(first), Publish::Published);
                match slot.publish_rest(fresh(pool, 2)) {
                    Publish::Published => true,
                    Publish::Full(packet) => {
                        reused(pool, packet);
                        false
                    }
                    refused => panic!("nobody else published: {refused:?}"),
                }
            }
        });
        let (slot, pool) = &*shared;
        let mut taken = Vec::new();
        for _ in 0..2 {
            if let Take::Taken(packet) = slot.take() {
                let more = packet.more;
                taken.push(drained(pool, packet));
                assert_eq!(more, taken.len() == 1);
            }
        }
        if channel.join().unwrap() && taken.len() < 2 {
            let Take::Taken(packet) = slot.take() else {
                panic!("the second piece was published");
            };
            taken.push(drained(pool, packet));
        } else if taken.is_empty() {
            let Take::Taken(packet) = slot.take() else {
                panic!("the first piece was published");
            };
            taken.push(drained(pool, packet));
        }
        assert!([1, 2].starts_with(&taken), "out of order: {taken:?}");
        assert_eq!(pool.in_use().0, 0);
    });
}

/// The publisher brings the second piece while a stranger comes with the same idx, and the I/O thread
/// polls. 3 threads, 1 slot, 3 buffers, 2 preemptions.
#[test]
fn a_stranger_is_a_duplicate_between_two_pieces() {
    model(|| {
        let shared = Arc::new((Slot::new(), pool(3, 64, 0)));
        let (slot, pool) = &*shared;
        let first = Packet {
            more: true,
            ..fresh(pool, 1)
        };
        assert_eq!(slot.publish(first), Publish::Published);
        let publisher = thread::spawn({
            let shared = Arc::clone(&shared);
            move || match shared.0.publish_rest(fresh(&shared.1, 2)) {
                Publish::Published => {}
                Publish::Full(packet) => reused(&shared.1, packet),
                refused => panic!("only the first piece is in the way: {refused:?}"),
            }
        });
        let stranger = thread::spawn({
            let shared = Arc::clone(&shared);
            move || match shared.0.publish(fresh(&shared.1, 9)) {
                Publish::Duplicate(packet) => reused(&shared.1, packet),
                other => panic!("a packet has one publisher: {other:?}"),
            }
        });
        let Take::Taken(packet) = slot.take() else {
            panic!("it was there before the threads were");
        };
        assert_eq!(drained(pool, packet), 1);
        if let Take::Taken(packet) = slot.take() {
            assert_eq!(drained(pool, packet), 2);
        }
        publisher.join().unwrap();
        stranger.join().unwrap();
    });
}

/// An I/O thread that takes, a thread that closes. 2 threads, 1 slot, 1 buffer, 2 preemptions.
#[test]
fn a_packet_is_taken_or_closed_but_not_both() {
    model(|| {
        let shared = Arc::new((Slot::new(), pool(1, 64, 0)));
        let (slot, pool) = &*shared;
        assert_eq!(slot.publish(fresh(pool, 1)), Publish::Published);
        let io_thread = thread::spawn({
            let shared = Arc::clone(&shared);
            move || match shared.0.take() {
                Take::Taken(packet) => {
                    reused(&shared.1, packet);
                    true
                }
                Take::Closed => false,
                Take::Empty => panic!("it was there before the thread was"),
            }
        });
        let closed = slot.close().map(|packet| reused(pool, packet)).is_some();
        assert_ne!(io_thread.join().unwrap(), closed, "one owner");
        assert_eq!(slot.publish(aside(2)), Publish::Closed(aside(2)));
        assert_eq!(pool.in_use().0, 0);
    });
}

/// A packet of two pieces, an I/O thread that takes the first, and a thread that closes. 3 threads, 1
/// slot, 2 buffers, 2 preemptions.
#[test]
fn closing_between_two_pieces_loses_none() {
    model(|| {
        let shared = Arc::new((Slot::new(), pool(2, 64, 0)));
        let (slot, pool) = &*shared;
        let first = Packet {
            more: true,
            ..fresh(pool, 1)
        };
        assert_eq!(slot.publish(first), Publish::Published);
        let publisher = thread::spawn({
            let shared = Arc::clone(&shared);
            move || match shared.0.publish_rest(fresh(&shared.1, 2)) {
                Publish::Published => {}
                Publish::Full(packet) | Publish::Closed(packet) => reused(&shared.1, packet),
                Publish::Duplicate(_) => panic!("the packet has another piece"),
            }
        });
        let io_thread = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                if let Take::Taken(packet) = shared.0.take() {
                    reused(&shared.1, packet);
                }
            }
        });
        if let Some(packet) = slot.close() {
            reused(pool, packet);
        }
        publisher.join().unwrap();
        io_thread.join().unwrap();
        assert_eq!(pool.in_use().0, 0, "every piece came home");
        assert_eq!(slot.take(), Take::Closed);
    });
}
