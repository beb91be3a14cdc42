//! | model                                              | goes red when                                         |
//! |----------------------------------------------------|-------------------------------------------------------|
//! | `two_publishers_put_one_segment_in_place`          | the link edge is Relaxed, or stores                   |
//! | `a_segment_lives_while_somebody_looks_at_it`       | a segment is freed at once instead of deferred        |
//! | `the_next_segment_is_whole_behind_the_unlinked`    | the unlink or the link edge is Relaxed                |
//! | `nothing_is_published_behind_the_closing`          | closing leaves no mark                                |
//! | `two_takers_retire_a_segment_between_them`         | the finish edge is Relaxed                            |
#![cfg(loom)]
#![allow(missing_docs, reason = "models")]

use crossbeam_epoch::Collector;
use loom::{sync::Arc, thread};
use vfio_migration::internals::{
    slot::{Publish, Take},
    table::{SEGMENT, Table},
};
use vfio_migration_loom_tests::{aside, model, number};

/// 2 threads, 2 segments.
#[test]
fn two_publishers_put_one_segment_in_place() {
    model(|| {
        let collector = Collector::new();
        let table = Arc::new(Table::new(collector.clone()));
        let publish = |table: &Table, collector: &Collector, index: u32| {
            let handle = collector.register();
            let guard = handle.pin();
            let slot = table.slot_or_link(index, &guard).unwrap().unwrap();
            assert_eq!(slot.publish(aside(index.into())), Publish::Published);
        };
        let other = thread::spawn({
            let (table, collector) = (table.clone(), collector.clone());
            move || publish(&table, &collector, SEGMENT)
        });
        publish(&table, &collector, SEGMENT + 1);
        other.join().unwrap();
        let handle = collector.register();
        let guard = handle.pin();
        for index in [SEGMENT, SEGMENT + 1] {
            let slot = table.slot(index, &guard).unwrap();
            assert!(matches!(slot.take(), Take::Taken(packet) if number(&packet) == index.into()));
        }
    });
}

/// 2 threads, 2 segments: one takes all of the first, which retires it, while the other looks.
#[test]
fn a_segment_lives_while_somebody_looks_at_it() {
    model(|| {
        let collector = Collector::new();
        let table = Arc::new(Table::new(collector.clone()));
        {
            let handle = collector.register();
            let guard = handle.pin();
            for index in 0..=SEGMENT {
                let slot = table.slot_or_link(index, &guard).unwrap().unwrap();
                assert_eq!(slot.publish(aside(index.into())), Publish::Published);
            }
        }
        let publisher = thread::spawn({
            let (table, collector) = (table.clone(), collector.clone());
            move || {
                let handle = collector.register();
                let guard = handle.pin();
                // A late duplicate of the first packet: its segment may go at any time.
                if let Ok(Some(slot)) = table.slot_or_link(0, &guard) {
                    assert_eq!(slot.publish(aside(9)), Publish::Duplicate(aside(9)));
                }
            }
        });
        let handle = collector.register();
        for index in 0..SEGMENT {
            let guard = handle.pin();
            let slot = table.slot(index, &guard).unwrap();
            assert!(matches!(slot.take(), Take::Taken(_)));
            table.finish(index, &guard);
        }
        handle.pin().flush();
        publisher.join().unwrap();
    });
}

/// 2 threads, 2 segments: a publisher walks over a segment that is unlinked under it.
#[test]
fn the_next_segment_is_whole_behind_the_unlinked() {
    model(|| {
        let collector = Collector::new();
        let table = Arc::new(Table::new(collector.clone()));
        let taker = thread::spawn({
            let (table, collector) = (table.clone(), collector.clone());
            move || {
                let handle = collector.register();
                let guard = handle.pin();
                for index in 0..SEGMENT {
                    let slot = table.slot_or_link(index, &guard).unwrap().unwrap();
                    assert_eq!(slot.publish(aside(0)), Publish::Published);
                    assert!(matches!(slot.take(), Take::Taken(_)));
                    table.finish(index, &guard);
                }
                let _placed = table.slot_or_link(SEGMENT, &guard);
            }
        });
        let handle = collector.register();
        let guard = handle.pin();
        let slot = table.slot_or_link(SEGMENT + 1, &guard).unwrap().unwrap();
        assert_eq!(slot.publish(aside(7)), Publish::Published);
        let slot = table.slot(SEGMENT + 1, &guard).unwrap();
        assert!(matches!(slot.take(), Take::Taken(packet) if number(&packet) == 7));
        taker.join().unwrap();
    });
}

/// 2 threads, 2 segments: whatever is published is taken back by the closing, or refused.
#[test]
fn nothing_is_published_behind_the_closing() {
    model(|| {
        let collector = Collector::new();
        let table = Arc::new(Table::new(collector.clone()));
        let publisher = thread::spawn({
            let (table, collector) = (table.clone(), collector.clone());
            move || {
                let handle = collector.register();
                let guard = handle.pin();
                let slot = table.slot_or_link(SEGMENT, &guard).unwrap();
                slot.is_some_and(|slot| matches!(slot.publish(aside(7)), Publish::Published))
            }
        });
        let handle = collector.register();
        let mut abandoned = 0;
        table.close(&handle.pin(), |packet| abandoned += number(&packet));
        let published = publisher.join().unwrap();
        assert_eq!(abandoned, if published { 7 } else { 0 });
        assert!(table.is_closed(&handle.pin()));
    });
}

/// 2 threads, 2 segments: each takes one of the first segment's two packets.
#[test]
fn two_takers_retire_a_segment_between_them() {
    model(|| {
        let collector = Collector::new();
        let table = Arc::new(Table::new(collector.clone()));
        {
            let handle = collector.register();
            let guard = handle.pin();
            for index in 0..=SEGMENT {
                let slot = table.slot_or_link(index, &guard).unwrap().unwrap();
                assert_eq!(slot.publish(aside(index.into())), Publish::Published);
            }
        }
        let take = |table: &Table, collector: &Collector, index: u32| {
            let handle = collector.register();
            let guard = handle.pin();
            let slot = table.slot(index, &guard).expect("not finished yet");
            assert!(matches!(slot.take(), Take::Taken(_)));
            table.finish(index, &guard);
        };
        let other = thread::spawn({
            let (table, collector) = (table.clone(), collector.clone());
            move || take(&table, &collector, 0)
        });
        take(&table, &collector, 1);
        other.join().unwrap();
        let handle = collector.register();
        let guard = handle.pin();
        assert!(
            table.slot_or_link(0, &guard).is_err(),
            "the segment is gone"
        );
        assert!(table.slot(SEGMENT, &guard).is_some());
    });
}
