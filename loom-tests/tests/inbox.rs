//! | model                                              | goes red when                                          |
//! |----------------------------------------------------|--------------------------------------------------------|
//! | `one_of_two_config_packets_is_refused`             | `admit` stores instead of exchanging                   |
//! | `a_config_and_a_higher_idx_exclude_each_other`     | `admit` stores instead of exchanging                   |
//! | `packets_come_out_in_order_with_their_bytes`       | either side of the publish edge is Relaxed             |
//! | `a_packet_below_next_is_refused_or_a_duplicate`    | a taken slot can be published again                    |
//! | `an_unplugged_inbox_gives_all_memory_back`         | closing leaves no mark, or `take` swaps                |
//! | `a_large_packet_crosses_segments_piece_by_piece`   | a piece ends its slot                                  |
#![cfg(loom)]
#![allow(missing_docs, reason = "models")]

use crossbeam_epoch::Collector;
use loom::{sync::Arc, thread};
use vfio_migration::internals::{
    cursor::{Cursor, Inbox, Next},
    pool::{Packer, Pool},
    slot::{Packet, Publish},
};
use vfio_migration_loom_tests::{aside, consume, filled, model, number, pool};

fn inbox() -> (Arc<Inbox>, Collector) {
    let collector = Collector::new();
    (Arc::new(Inbox::new(collector.clone(), 8)), collector)
}

/// 2 threads.
#[test]
fn one_of_two_config_packets_is_refused() {
    model(|| {
        let (inbox, _collector) = inbox();
        let other = thread::spawn({
            let inbox = inbox.clone();
            move || inbox.admit(3, true).is_ok()
        });
        let ours = inbox.admit(4, true).is_ok();
        let theirs = other.join().unwrap();
        assert!(ours != theirs, "one, and only one, is admitted");
        assert_eq!(inbox.config_index(), Some(if ours { 4 } else { 3 }));
    });
}

/// 3 threads.
#[test]
fn a_config_and_a_higher_idx_exclude_each_other() {
    model(|| {
        let (inbox, _collector) = inbox();
        let admit = |index, config| {
            let inbox = inbox.clone();
            thread::spawn(move || inbox.admit(index, config).is_ok())
        };
        let (config, below) = (admit(3, true), admit(2, false));
        let above = inbox.admit(4, false).is_ok();
        assert!(below.join().unwrap(), "what breaks no rule is admitted");
        assert!(config.join().unwrap() != above);
    });
}

/// 2 threads, 2 buffers, 1 segment.
#[test]
fn packets_come_out_in_order_with_their_bytes() {
    model(|| {
        let ((inbox, collector), pool) = (inbox(), pool(2, 0));
        let channel = thread::spawn({
            let (inbox, collector, pool) = (inbox.clone(), collector.clone(), pool.clone());
            move || {
                let handle = collector.register();
                let mut packer = Packer::new(pool);
                for index in [1, 0] {
                    let packet = filled(&mut packer, 10 + index).unwrap();
                    let published = inbox.publish(index.into(), packet, &handle.pin());
                    assert_eq!(published, Publish::Published);
                }
            }
        });
        let handle = collector.register();
        let mut cursor = Cursor::new();
        let mut expected = 0;
        let mut take = |pool: &Arc<Pool>| {
            let guard = handle.pin();
            if let Next::Packet(index, packet) = cursor.take(&inbox, &guard) {
                assert_eq!(index, expected);
                assert_eq!(u32::from(consume(pool, packet)), 10 + expected);
                expected += 1;
            }
        };
        take(&pool);
        take(&pool);
        channel.join().unwrap();
        take(&pool);
        take(&pool);
        assert_eq!(expected, 2);
    });
}

/// 2 threads, 1 segment.
#[test]
fn a_packet_below_next_is_refused_or_a_duplicate() {
    model(|| {
        let (inbox, collector) = inbox();
        let handle = collector.register();
        let published = inbox.publish(0, aside(1), &handle.pin());
        assert_eq!(published, Publish::Published);
        let late = thread::spawn({
            let (inbox, collector) = (inbox.clone(), collector.clone());
            move || {
                if inbox.admit(0, false).is_ok() {
                    let handle = collector.register();
                    let refused = inbox.publish(0, aside(2), &handle.pin());
                    assert_eq!(refused, Publish::Duplicate(aside(2)));
                }
            }
        });
        let mut cursor = Cursor::new();
        let guard = handle.pin();
        let Next::Packet(0, packet) = cursor.take(&inbox, &guard) else {
            panic!("it is there");
        };
        assert_eq!(number(&packet), 1);
        assert_eq!(cursor.take(&inbox, &guard), Next::Starved(1));
        late.join().unwrap();
    });
}

/// 2 threads, 1 buffer, 1 segment: the device goes away while a channel publishes for it.
#[test]
fn an_unplugged_inbox_gives_all_memory_back() {
    model(|| {
        let ((inbox, collector), pool) = (inbox(), pool(1, 0));
        let channel = thread::spawn({
            let (inbox, collector, pool) = (inbox.clone(), collector.clone(), pool.clone());
            move || {
                let handle = collector.register();
                let packet = filled(&mut Packer::new(pool.clone()), 7).unwrap();
                if let Publish::Closed(packet) = inbox.publish(0, packet, &handle.pin()) {
                    assert_eq!(consume(&pool, packet), 7);
                }
            }
        });
        let handle = collector.register();
        let mut cursor = Cursor::new();
        if let Next::Packet(0, packet) = cursor.take(&inbox, &handle.pin()) {
            assert_eq!(consume(&pool, packet), 7);
        }
        inbox.close(&handle.pin(), |packet| {
            assert_eq!(consume(&pool, packet), 7);
        });
        channel.join().unwrap();
        assert_eq!(pool.in_use().0, 0);
        assert_eq!(cursor.take(&inbox, &handle.pin()), Next::Closed);
    });
}

/// 2 threads, 2 segments.
#[test]
fn a_large_packet_crosses_segments_piece_by_piece() {
    model(|| {
        let (inbox, collector) = inbox();
        let channel = thread::spawn({
            let (inbox, collector) = (inbox.clone(), collector.clone());
            move || {
                let handle = collector.register();
                let first = Packet {
                    more: true,
                    ..aside(1)
                };
                assert_eq!(inbox.publish(0, first, &handle.pin()), Publish::Published);
                matches!(
                    inbox.publish_rest(0, aside(2), &handle.pin()),
                    Publish::Published
                )
            }
        });
        let handle = collector.register();
        let mut cursor = Cursor::new();
        let mut pieces = 0;
        let mut take = |cursor: &mut Cursor| {
            if let Next::Packet(0, packet) = cursor.take(&inbox, &handle.pin()) {
                pieces += 1;
                assert_eq!(number(&packet), pieces);
            }
        };
        take(&mut cursor);
        take(&mut cursor);
        let rest = channel.join().unwrap();
        take(&mut cursor);
        take(&mut cursor);
        assert_eq!(pieces, if rest { 2 } else { 1 });
        assert_eq!(cursor.next(), u32::from(rest));
    });
}
