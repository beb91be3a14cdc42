//! | model                                        | goes red when                                        |
//! |----------------------------------------------|------------------------------------------------------|
//! | `the_taker_sees_the_publishers_bytes`        | either side of the publish edge is Relaxed           |
//! | `closing_hands_over_the_publishers_bytes`    | `close` is weaker than Acquire                       |
//! | `racing_publishers_have_one_winner`          | `publish` stores or swaps instead of exchanging      |
//! | `a_packet_is_taken_or_abandoned_once`        | `take` swaps instead of exchanging                   |
//! | `a_further_piece_hands_over_its_bytes`       | either side of the publish edge is Relaxed           |
//! | `a_stranger_cannot_bring_a_further_piece`    | `publish` may follow a piece that was taken          |
#![cfg(loom)]
#![allow(missing_docs, reason = "models")]

use loom::{sync::Arc, thread};
use vfio_migration::internals::{
    pool::Packer,
    slot::{Packet, Publish, Slot, Take},
};
use vfio_migration_loom_tests::{aside, consume, filled, model, number, pool};

/// 2 threads, 1 slot, 1 buffer. The bytes are read before the join, which would be an edge too.
#[test]
fn the_taker_sees_the_publishers_bytes() {
    model(|| {
        let (slot, pool) = (Arc::new(Slot::new()), pool(1, 0));
        let channel = thread::spawn({
            let (slot, pool) = (slot.clone(), pool.clone());
            move || {
                let packet = filled(&mut Packer::new(pool), 7).unwrap();
                assert_eq!(slot.publish(packet), Publish::Published);
            }
        });
        if let Take::Taken(packet) = slot.take() {
            assert_eq!(consume(&pool, packet), 7);
        }
        channel.join().unwrap();
        let _left = slot.close().map(|packet| consume(&pool, packet));
    });
}

/// 2 threads, 1 slot, 1 buffer.
#[test]
fn closing_hands_over_the_publishers_bytes() {
    model(|| {
        let (slot, pool) = (Arc::new(Slot::new()), pool(1, 0));
        let channel = thread::spawn({
            let (slot, pool) = (slot.clone(), pool.clone());
            move || {
                let packet = filled(&mut Packer::new(pool.clone()), 7).unwrap();
                if let Publish::Closed(packet) = slot.publish(packet) {
                    assert_eq!(consume(&pool, packet), 7);
                }
            }
        });
        if let Some(packet) = slot.close() {
            assert_eq!(consume(&pool, packet), 7);
        }
        channel.join().unwrap();
        assert_eq!(pool.in_use().0, 0);
    });
}

/// 3 threads, 1 slot.
#[test]
fn racing_publishers_have_one_winner() {
    model(|| {
        let slot = Arc::new(Slot::new());
        let channel = |value| {
            let slot = slot.clone();
            thread::spawn(move || match slot.publish(aside(value)) {
                Publish::Published => Some(value),
                Publish::Duplicate(packet) => {
                    assert_eq!(number(&packet), value, "the loser keeps its own");
                    None
                }
                other => panic!("{other:?}"),
            })
        };
        let channels = [channel(1), channel(2)];
        let early = slot.take();
        let winners: Vec<_> = channels
            .into_iter()
            .filter_map(|channel| channel.join().unwrap())
            .collect();
        assert_eq!(winners.len(), 1);
        let taken = match early {
            Take::Taken(packet) => packet,
            _ => match slot.take() {
                Take::Taken(packet) => packet,
                other => panic!("{other:?}"),
            },
        };
        assert_eq!(number(&taken), winners[0]);
    });
}

/// 3 threads, 1 slot: a publisher, a taker, a closer.
#[test]
fn a_packet_is_taken_or_abandoned_once() {
    model(|| {
        let slot = Arc::new(Slot::new());
        let channel = thread::spawn({
            let slot = slot.clone();
            move || match slot.publish(aside(7)) {
                Publish::Published => 0,
                Publish::Closed(packet) => number(&packet),
                other => panic!("{other:?}"),
            }
        });
        let closer = thread::spawn({
            let slot = slot.clone();
            move || slot.close().map_or(0, |packet| number(&packet))
        });
        let taken = match slot.take() {
            Take::Taken(packet) => number(&packet),
            Take::Empty | Take::Closed => 0,
        };
        let kept = channel.join().unwrap();
        let closed = closer.join().unwrap();
        assert_eq!(taken + kept + closed, 7, "one owner in the end");
        assert_eq!(slot.close(), None);
        assert_eq!(slot.take(), Take::Closed, "closing is for good");
    });
}

/// 2 threads, 1 slot, 1 buffer: two pieces of one packet, through one buffer.
#[test]
fn a_further_piece_hands_over_its_bytes() {
    model(|| {
        let (slot, pool) = (Arc::new(Slot::new()), pool(2, 0));
        let channel = thread::spawn({
            let (slot, pool) = (slot.clone(), pool.clone());
            move || {
                let mut packer = Packer::new(pool.clone());
                let first = filled(&mut packer, 1).unwrap();
                let first = Packet {
                    more: true,
                    ..first
                };
                assert_eq!(slot.publish(first), Publish::Published);
                let second = filled(&mut packer, 2).unwrap();
                match slot.publish_rest(second) {
                    Publish::Published => true,
                    Publish::Full(packet) => {
                        assert_eq!(consume(&pool, packet), 2);
                        false
                    }
                    other => panic!("{other:?}"),
                }
            }
        });
        let mut expected = 1;
        for _ in 0..2 {
            if let Take::Taken(packet) = slot.take() {
                assert_eq!(packet.more, expected == 1);
                assert_eq!(consume(&pool, packet), expected);
                expected += 1;
            }
        }
        channel.join().unwrap();
        let _left = slot.close().map(|packet| consume(&pool, packet));
    });
}

/// 3 threads, 1 slot.
#[test]
fn a_stranger_cannot_bring_a_further_piece() {
    model(|| {
        let slot = Arc::new(Slot::new());
        let first = Packet {
            more: true,
            ..aside(1)
        };
        assert_eq!(slot.publish(first), Publish::Published);
        let stranger = thread::spawn({
            let slot = slot.clone();
            move || assert_eq!(slot.publish(aside(9)), Publish::Duplicate(aside(9)))
        });
        let owner = thread::spawn({
            let slot = slot.clone();
            move || matches!(slot.publish_rest(aside(2)), Publish::Published)
        });
        assert!(matches!(slot.take(), Take::Taken(packet) if number(&packet) == 1));
        stranger.join().unwrap();
        if owner.join().unwrap() {
            assert!(matches!(slot.take(), Take::Taken(packet) if number(&packet) == 2));
        }
    });
}
