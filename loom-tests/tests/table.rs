//! Segments come on demand, go behind the takers, and are freed after the last look at them.
//!
//! Every model drops its table and its epochs inside: loom reports what has not been freed then.
//!
//! | model | goes red when |
//! |---|---|
//! | `two_publishers_put_one_segment_in_place` | the link's exchange is Relaxed on failure, or is a store |
//! | `a_walker_sees_a_linked_segment` | either side of the link edge is Relaxed |
//! | `a_publisher_sees_a_linked_segment` | a publisher's walk is Relaxed |
//! | `a_retired_segment_outlives_its_readers` | a retired segment is freed at once, or never |
//! | `the_new_heads_segment_is_seen` | either side of the unlink edge is Relaxed |
//! | `retiring_passes_a_strangers_segment_on` | `retire` loads the next segment Relaxed |
//! | `two_finishers_retire_once` | the count is no read-modify-write; two unlink one segment |
//! | `two_finishers_of_two_segments` | two unlink one segment; one is unlinked before its slots are taken |
//! | `closing_meets_a_new_segment` | `close` loads the next segment Relaxed, or sets no mark |
//! | `a_question_meets_a_new_segment` | `is_closed` walks Relaxed |
//! | `two_threads_close` | a packet is returned twice |
#![cfg(loom)]
#![expect(
    clippy::arc_with_non_send_sync,
    reason = "a model's threads are all one thread of the system"
)]

use std::sync::Arc;

use crossbeam_epoch::Collector;
use vfio_migration::internals::{
    pool::Pool,
    slot::{Packet, Publish, Take},
    table::{BelowHead, SEGMENT, Table},
};
use vfio_migration_loom_tests::{Participant, aside, collect, drained, fresh, model, pool, reused};

/// The first index of the second segment.
const SECOND: u32 = SEGMENT;

/// A table, and one participant for each of `N` threads.
fn table<const N: usize>() -> (Arc<Table>, [Participant; N]) {
    let collector = Collector::new();
    let participants = std::array::from_fn(|_| Participant::new(&collector));
    (Arc::new(Table::new(collector)), participants)
}

/// Publishes at `index`. Returns the packet where the table was closed.
fn publish(table: &Table, index: u32, packet: Packet, thread: &Participant) -> Option<Packet> {
    match table.slot_or_link(index, &thread.pin()) {
        Ok(Some(slot)) => match slot.publish(packet) {
            Publish::Published => None,
            Publish::Closed(packet) => Some(packet),
            refused => panic!("an idx has one publisher here: {refused:?}"),
        },
        Ok(None) => Some(packet),
        Err(BelowHead) => panic!("nobody took this idx"),
    }
}

/// Takes what is at `index`, and is done with it. Returns its number.
fn take(table: &Table, index: u32, thread: &Participant) -> Option<Packet> {
    let guard = thread.pin();
    let taken = table.slot(index, &guard)?.take();
    match taken {
        Take::Taken(packet) => {
            table.finish(index, &guard);
            Some(packet)
        }
        Take::Empty | Take::Closed => None,
    }
}

/// Two publishers need the second segment at once, and one looks at the other's slot. 2 threads,
/// 2 segments, 2 preemptions.
#[test]
fn two_publishers_put_one_segment_in_place() {
    model(|| {
        let (table, [mine, theirs]) = table();
        let shared = Arc::new((table, pool(1, 64, 0)));
        let other = theirs.spawn({
            let shared = Arc::clone(&shared);
            move |me| publish(&shared.0, SECOND, fresh(&shared.1, 7), me)
        });
        let (table, pool) = &*shared;
        assert_eq!(publish(table, SECOND + 1, aside(2), &mine), None);
        let early = take(table, SECOND, &mine).map(|packet| drained(pool, packet));
        assert_eq!(take(table, SECOND + 1, &mine), Some(aside(2)));
        let (refused, _theirs) = other.join().unwrap();
        assert_eq!(refused, None);
        let byte = early.or_else(|| take(table, SECOND, &mine).map(|packet| drained(pool, packet)));
        assert_eq!(byte, Some(7));
    });
}

/// A publisher puts the second segment in place, the I/O thread looks for it. 2 threads, 2 segments, 2
/// preemptions.
#[test]
fn a_walker_sees_a_linked_segment() {
    model(|| {
        let (table, [mine, theirs]) = table();
        let shared = Arc::new((table, pool(1, 64, 0)));
        let other = theirs.spawn({
            let shared = Arc::clone(&shared);
            move |me| publish(&shared.0, SECOND, fresh(&shared.1, 7), me)
        });
        let (table, pool) = &*shared;
        if let Some(packet) = take(table, SECOND, &mine) {
            assert_eq!(drained(pool, packet), 7);
        }
        let (refused, _theirs) = other.join().unwrap();
        assert_eq!(refused, None);
    });
}

/// A publisher puts the second segment in place, another walks over it to the third. 2 threads, 3
/// segments, 2 preemptions.
#[test]
fn a_publisher_sees_a_linked_segment() {
    model(|| {
        let (table, [mine, theirs]) = table();
        let other = theirs.spawn({
            let table = Arc::clone(&table);
            move |me| publish(&table, SECOND, aside(1), me)
        });
        assert_eq!(publish(&table, SECOND + SEGMENT, aside(2), &mine), None);
        let (refused, theirs) = other.join().unwrap();
        assert_eq!(refused, None);
        assert_eq!(take(&table, SECOND, &theirs), Some(aside(1)));
        assert_eq!(take(&table, SECOND + SEGMENT, &theirs), Some(aside(2)));
    });
}

/// The I/O thread finishes the first segment and lets the epochs go on, while a publisher walks over
/// it. 2 threads, 2 segments, 2 preemptions.
#[test]
fn a_retired_segment_outlives_its_readers() {
    model(|| {
        let (table, [mine, theirs]) = table();
        for index in 0..=SECOND {
            assert_eq!(publish(&table, index, aside(index.into()), &mine), None);
        }
        let other = theirs.spawn({
            let table = Arc::clone(&table);
            move |me| {
                let refused = publish(&table, SECOND + 1, aside(9), me);
                let late = table.slot_or_link(0, &me.pin()).err();
                assert!(matches!(late, None | Some(BelowHead)));
                refused
            }
        });
        for index in 0..SECOND {
            assert_eq!(take(&table, index, &mine), Some(aside(index.into())));
        }
        collect(&mine);
        let (refused, _theirs) = other.join().unwrap();
        assert_eq!(refused, None);
        let late = table.slot_or_link(0, &mine.pin()).err();
        assert_eq!(late, Some(BelowHead));
    });
}

/// One thread links the second segment and unlinks the first, another begins at the new head. It
/// looks already when the segment is made, so that no fence stands in for the edge. 2 threads, 2
/// segments, 2 preemptions.
#[test]
fn the_new_heads_segment_is_seen() {
    model(|| {
        let (table, [mine, theirs]) = table();
        for index in 0..SECOND {
            assert_eq!(publish(&table, index, aside(index.into()), &mine), None);
        }
        let other = theirs.spawn({
            let table = Arc::clone(&table);
            move |me| {
                let guard = me.pin();
                let slot = table.slot_or_link(SECOND + 1, &guard);
                let slot = slot.expect("nobody took it").expect("nobody closed");
                assert_eq!(slot.publish(aside(9)), Publish::Published);
            }
        });
        {
            let guard = mine.pin();
            let slot = table.slot_or_link(SECOND, &guard);
            let slot = slot.expect("nobody took it").expect("nobody closed");
            assert_eq!(slot.publish(aside(2)), Publish::Published);
            for index in 0..SECOND {
                let slot = table.slot(index, &guard).expect("published above");
                assert_eq!(slot.take(), Take::Taken(aside(index.into())));
                table.finish(index, &guard);
            }
        }
        let ((), _theirs) = other.join().unwrap();
        assert_eq!(take(&table, SECOND, &mine), Some(aside(2)));
        assert_eq!(take(&table, SECOND + 1, &mine), Some(aside(9)));
    });
}

/// The I/O thread finishes the first segment while a publisher links the second. 2 threads, 2
/// segments, 2 preemptions.
#[test]
fn retiring_passes_a_strangers_segment_on() {
    model(|| {
        let (table, [mine, theirs]) = table();
        for index in 0..SECOND {
            assert_eq!(publish(&table, index, aside(index.into()), &mine), None);
        }
        let other = theirs.spawn({
            let table = Arc::clone(&table);
            move |me| publish(&table, SECOND, aside(2), me)
        });
        let guard = mine.pin();
        for index in 0..SECOND {
            let slot = table.slot(index, &guard).expect("published above");
            assert_eq!(slot.take(), Take::Taken(aside(index.into())));
            table.finish(index, &guard);
        }
        drop(guard);
        let (refused, _theirs) = other.join().unwrap();
        assert_eq!(refused, None);
        assert_eq!(take(&table, SECOND, &mine), Some(aside(2)));
    });
}

/// Two takers finish the first segment's two slots at once. 2 threads, 2 segments, 2 preemptions.
#[test]
fn two_finishers_retire_once() {
    model(|| {
        let (table, [mine, theirs]) = table();
        for index in 0..=SECOND {
            assert_eq!(publish(&table, index, aside(index.into()), &mine), None);
        }
        let other = theirs.spawn({
            let table = Arc::clone(&table);
            move |me| take(&table, 1, me)
        });
        assert_eq!(take(&table, 0, &mine), Some(aside(0)));
        collect(&mine);
        let (taken, theirs) = other.join().unwrap();
        assert_eq!(taken, Some(aside(1)));
        let late = table.slot_or_link(1, &theirs.pin()).err();
        assert_eq!(late, Some(BelowHead), "the segment went with its last slot");
        collect(&theirs);
    });
}

/// Two takers finish two segments' last slots at once, so that both unlink. 2 threads, 3 segments,
/// 2 preemptions.
#[test]
fn two_finishers_of_two_segments() {
    model(|| {
        let (table, [mine, theirs]) = table();
        for index in 0..=2 * SEGMENT {
            assert_eq!(publish(&table, index, aside(index.into()), &mine), None);
        }
        for index in [0, SECOND] {
            assert_eq!(take(&table, index, &mine), Some(aside(index.into())));
        }
        let other = theirs.spawn({
            let table = Arc::clone(&table);
            move |me| take(&table, SECOND + 1, me)
        });
        assert_eq!(take(&table, 1, &mine), Some(aside(1)));
        collect(&mine);
        let (taken, theirs) = other.join().unwrap();
        assert_eq!(taken, Some(aside(u64::from(SECOND) + 1)));
        assert_eq!(
            take(&table, 2 * SEGMENT, &theirs),
            Some(aside(u64::from(2 * SEGMENT)))
        );
        collect(&theirs);
    });
}

/// One thread closes, a publisher needs the second segment. 2 threads, 2 segments, 1 buffer, 2
/// preemptions.
#[test]
fn closing_meets_a_new_segment() {
    fn abandon(pool: &Arc<Pool>, abandoned: &mut u32) -> impl FnMut(Packet) {
        move |packet| {
            reused(pool, packet);
            *abandoned += 1;
        }
    }
    model(|| {
        let (table, [mine, theirs]) = table();
        let shared = Arc::new((table, pool(1, 64, 0)));
        let other = theirs.spawn({
            let shared = Arc::clone(&shared);
            move |me| match publish(&shared.0, SECOND, fresh(&shared.1, 7), me) {
                None => true,
                Some(packet) => {
                    reused(&shared.1, packet);
                    false
                }
            }
        });
        let (table, pool) = &*shared;
        let mut abandoned = 0;
        table.close(&mine.pin(), abandon(pool, &mut abandoned));
        // Before the join: what was abandoned is all that there will ever be.
        assert!(table.is_closed(&mine.pin()));
        let (published, _theirs) = other.join().unwrap();
        assert_eq!(u32::from(published), abandoned);
        assert_eq!(pool.in_use().0, 0);
        let guard = mine.pin();
        let beyond = table.slot_or_link(SECOND + SEGMENT, &guard);
        assert!(matches!(beyond, Ok(None)));
    });
}

/// A publisher links the second segment while another thread asks whether the table is closed. 2
/// threads, 2 segments, 2 preemptions.
#[test]
fn a_question_meets_a_new_segment() {
    model(|| {
        let (table, [mine, theirs]) = table();
        let other = theirs.spawn({
            let table = Arc::clone(&table);
            move |me| publish(&table, SECOND, aside(2), me)
        });
        assert!(!table.is_closed(&mine.pin()));
        let (refused, _theirs) = other.join().unwrap();
        assert_eq!(refused, None);
    });
}

/// Two threads close a table of two segments. 2 threads, 2 segments, 2 buffers, 2 preemptions.
#[test]
fn two_threads_close() {
    model(|| {
        let (table, [mine, theirs]) = table();
        let shared = Arc::new((table, pool(2, 64, 0)));
        let (table, pool) = &*shared;
        for index in [0, SECOND] {
            assert_eq!(publish(table, index, fresh(pool, 1), &mine), None);
        }
        let other = theirs.spawn({
            let shared = Arc::clone(&shared);
            move |me| {
                let mut returned = 0;
                shared.0.close(&me.pin(), |packet| {
                    reused(&shared.1, packet);
                    returned += 1;
                });
                returned
            }
        });
        let mut returned = 0;
        table.close(&mine.pin(), |packet| {
            reused(pool, packet);
            returned += 1;
        });
        let (theirs, _participant) = other.join().unwrap();
        assert_eq!(returned + theirs, 2);
        assert_eq!(pool.in_use().0, 0);
    });
}
