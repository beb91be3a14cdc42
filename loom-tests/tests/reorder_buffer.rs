//! A device's packets, published in any order: each comes out once, in order, with its bytes.
//!
//! | model | goes red when |
//! |---|---|
//! | `of_two_configs_one_is_admitted` | `admit` stores instead of exchanging |
//! | `a_config_and_a_higher_idx_are_not_both_admitted` | `admit` stores instead of exchanging |
//! | `a_config_and_its_own_idx_are_not_both_admitted` | the config's idx is not compared |
//! | `the_io_thread_takes_in_order` | a slot's edge or a link's is Relaxed; the reader skips |
//! | `racing_duplicates_have_one_winner` | `publish` swaps |
//! | `a_packet_below_next_is_given_back` | a retired segment is freed at once, or linked again |
//! | `the_idx_stays_until_the_last_piece` | the reader goes on after a first piece |
//! | `closing_returns_what_nobody_took` | the list's end is not marked |
//! | `an_io_thread_that_lies_down_sees_the_closing` | the I/O thread's second look forgets a closed table |
#![cfg(loom)]
#![expect(
    clippy::arc_with_non_send_sync,
    reason = "a model's threads are all one thread of the system"
)]

use std::sync::Arc;

use crossbeam_epoch::Collector;
use loom::thread;
use vfio_migration::internals::{
    doorbell::Doorbell,
    pool::Pool,
    reorder_buffer::{Next, ReorderBuffer, ReorderReader},
    slot::{Packet, Publish},
    table::SEGMENT,
};
use vfio_migration_loom_tests::{
    Participant, Ring, aside, collect, drained, fresh, lease, model, pool, reused, take_next,
};

/// What the threads of a model share.
struct Shared {
    reorder: ReorderBuffer,
    pool: Arc<Pool>,
}

/// A reorder buffer with `buffers` buffers, and one participant for each of `N` threads.
fn shared<const N: usize>(buffers: u32) -> (Arc<Shared>, [Participant; N]) {
    let collector = Collector::new();
    let participants = std::array::from_fn(|_| Participant::new(&collector));
    let reorder = ReorderBuffer::new(collector, 100);
    let pool = pool(buffers, 64, 0);
    (Arc::new(Shared { reorder, pool }), participants)
}

impl Shared {
    /// Publishes `byte` at `index`. Returns whether the slot has it, and keeps it otherwise.
    fn publish(&self, index: u32, byte: u8, channel: &Participant) -> bool {
        let packet = fresh(&self.pool, byte);
        match self.reorder.publish(index, packet, &channel.pin()) {
            Publish::Published => true,
            Publish::Duplicate(packet) | Publish::Full(packet) | Publish::Closed(packet) => {
                reused(&self.pool, packet);
                false
            }
        }
    }

    /// Takes what is there, in order. Returns its bytes.
    fn take_all(&self, reader: &mut ReorderReader, io_thread: &Participant) -> Vec<u8> {
        let mut bytes = Vec::new();
        while let Next::Packet(index, packet) = reader.take(&self.reorder, &io_thread.pin()) {
            assert_eq!(index + 1, reader.next());
            bytes.push(drained(&self.pool, packet));
        }
        bytes
    }
}

/// Admits two packets, each from a channel of its own. Returns how many were.
fn admitted(packets: [(u32, bool); 2]) -> usize {
    let reorder = Arc::new(ReorderBuffer::new(Collector::new(), 100));
    let [(theirs, their_config), (mine, my_config)] = packets;
    let other = thread::spawn({
        let reorder = Arc::clone(&reorder);
        move || reorder.admit(theirs, their_config).is_ok()
    });
    let mine = reorder.admit(mine, my_config).is_ok();
    usize::from(mine) + usize::from(other.join().unwrap())
}

/// Two channels, each with a config packet. 2 threads, 2 preemptions.
#[test]
fn of_two_configs_one_is_admitted() {
    model(|| assert_eq!(admitted([(1, true), (2, true)]), 1));
}

/// A config packet and a higher idx on two channels. 2 threads, 2 preemptions.
#[test]
fn a_config_and_a_higher_idx_are_not_both_admitted() {
    model(|| assert_eq!(admitted([(1, true), (2, false)]), 1));
}

/// A config packet and a data packet of the same idx on two channels. 2 threads, 2 preemptions.
#[test]
fn a_config_and_its_own_idx_are_not_both_admitted() {
    model(|| assert_eq!(admitted([(1, true), (1, false)]), 1));
}

/// Two channels bring the packets in the wrong order, across two segments. 3 threads, 3 packets, 3
/// buffers, 2 preemptions.
#[test]
fn the_io_thread_takes_in_order() {
    model(|| {
        let (shared, [io_thread, one, two]) = shared(3);
        assert!(shared.publish(1, 1, &io_thread));
        let channels = [(one, SEGMENT), (two, 0)].map(|(participant, index)| {
            let shared = Arc::clone(&shared);
            participant.spawn(move |me| {
                let byte = u8::try_from(index).expect("a small model");
                assert!(shared.publish(index, byte, me));
            })
        });
        let mut reader = ReorderReader::new();
        let mut taken = shared.take_all(&mut reader, &io_thread);
        let _participants = channels.map(|channel| channel.join().unwrap());
        taken.extend(shared.take_all(&mut reader, &io_thread));
        assert_eq!(taken, [0, 1, 2]);
    });
}

/// Two channels with the same idx, in a segment that neither finds in place. 3 threads, 2 buffers,
/// 2 preemptions.
#[test]
fn racing_duplicates_have_one_winner() {
    model(|| {
        let (shared, [mine, theirs]) = shared(2);
        let other = theirs.spawn({
            let shared = Arc::clone(&shared);
            move |me| shared.publish(SEGMENT, 1, me)
        });
        let won = shared.publish(SEGMENT, 2, &mine);
        let (lost, _theirs) = other.join().unwrap();
        assert_ne!(won, lost);
        assert_eq!(shared.pool.in_use().0, 1);
        shared.reorder.close(&mine.pin(), |packet| {
            assert_eq!(drained(&shared.pool, packet), 1 + u8::from(won));
        });
    });
}

/// A channel comes late with idx 0, while the I/O thread takes it and what follows. 2 threads, 4
/// buffers, 2 preemptions.
#[test]
fn a_packet_below_next_is_given_back() {
    model(|| {
        let (shared, [io_thread, channel]) = shared(4);
        for (index, byte) in [(0, 0), (1, 1), (2, 2)] {
            assert!(shared.publish(index, byte, &io_thread));
        }
        let channel = channel.spawn({
            let shared = Arc::clone(&shared);
            move |me| assert!(!shared.publish(0, 9, me), "it has come before")
        });
        let mut reader = ReorderReader::new();
        assert_eq!(shared.take_all(&mut reader, &io_thread), [0, 1, 2]);
        collect(&io_thread);
        let ((), _channel) = channel.join().unwrap();
        assert_eq!(shared.pool.in_use().0, 0);
    });
}

/// A packet of two pieces, and the I/O thread. 2 threads, 2 buffers, 2 preemptions.
#[test]
fn the_idx_stays_until_the_last_piece() {
    model(|| {
        let (shared, [io_thread, channel]) = shared(2);
        let channel = channel.spawn({
            let shared = Arc::clone(&shared);
            move |me| {
                let first = Packet {
                    more: true,
                    ..fresh(&shared.pool, 1)
                };
                let published = shared.reorder.publish(0, first, &me.pin());
                assert_eq!(published, Publish::Published);
                let rest = fresh(&shared.pool, 2);
                match shared.reorder.publish_rest(0, rest, &me.pin()) {
                    Publish::Published => true,
                    Publish::Full(packet) => {
                        reused(&shared.pool, packet);
                        false
                    }
                    refused => panic!("nobody else publishes: {refused:?}"),
                }
            }
        });
        let mut reader = ReorderReader::new();
        let mut bytes = Vec::new();
        for _ in 0..2 {
            if let Next::Packet(index, packet) = reader.take(&shared.reorder, &io_thread.pin()) {
                assert_eq!(index, 0);
                bytes.push(drained(&shared.pool, packet));
                assert_eq!(reader.next(), u32::from(bytes.len() == 2));
                assert_eq!(shared.reorder.next(), reader.next());
            }
        }
        assert!([1, 2].starts_with(&bytes));
        let (published, _channel) = channel.join().unwrap();
        assert!(published || bytes.len() < 2);
        shared
            .reorder
            .close(&io_thread.pin(), |packet| reused(&shared.pool, packet));
        assert_eq!(shared.pool.in_use().0, 0);
    });
}

/// One thread closes the reorder buffer, while a channel publishes in a new segment and the I/O thread takes. 3
/// threads, 2 buffers, 2 preemptions.
#[test]
fn closing_returns_what_nobody_took() {
    model(|| {
        let (shared, [mine, channel, io_thread]) = shared(2);
        assert!(shared.publish(0, 0, &mine));
        let channel = channel.spawn({
            let shared = Arc::clone(&shared);
            move |me| shared.publish(SEGMENT, 1, me)
        });
        let io_thread = io_thread.spawn({
            let shared = Arc::clone(&shared);
            move |me| match ReorderReader::new().take(&shared.reorder, &me.pin()) {
                Next::Packet(0, packet) => {
                    assert_eq!(drained(&shared.pool, packet), 0);
                    1
                }
                Next::Closed => 0,
                other => panic!("it was there before the thread was: {other:?}"),
            }
        });
        let mut returned = 0;
        shared.reorder.close(&mine.pin(), |packet| {
            reused(&shared.pool, packet);
            returned += 1;
        });
        let (published, _channel) = channel.join().unwrap();
        let (taken, _io_thread) = io_thread.join().unwrap();
        assert_eq!(taken + returned, 1 + u32::from(published));
        assert_eq!(shared.pool.in_use().0, 0);
        assert!(lease(&shared.pool).is_some());
    });
}

/// The I/O thread waits for an idx whose segment is in place, or is not, and another thread closes the
/// reorder buffer. 2 threads, 2 preemptions.
#[test]
fn an_io_thread_that_lies_down_sees_the_closing() {
    for next in [SEGMENT - 1, SEGMENT] {
        model(move || {
            let collector = Collector::new();
            let [mine, io_thread] = std::array::from_fn(|_| Participant::new(&collector));
            let reorder = ReorderBuffer::new(collector, 100);
            let shared = Arc::new((reorder, Doorbell::new(), Ring::new()));
            let mut reader = ReorderReader::new();
            for index in 0..next {
                let published = shared.0.publish(index, aside(0), &mine.pin());
                assert_eq!(published, Publish::Published);
                let taken = reader.take(&shared.0, &mine.pin());
                assert_eq!(taken, Next::Packet(index, aside(0)));
            }
            let io_thread = io_thread.spawn({
                let shared = Arc::clone(&shared);
                move |me| {
                    let (reorder, doorbell, ring) = &*shared;
                    take_next(&mut reader, reorder, doorbell, ring, me, || false)
                }
            });
            let (reorder, doorbell, ring) = &*shared;
            reorder.close(&mine.pin(), |_| panic!("nothing was left"));
            if doorbell.ring() {
                ring.wake();
            }
            let (taken, _io_thread) = io_thread.join().unwrap();
            assert_eq!(taken, None);
        });
    }
}
