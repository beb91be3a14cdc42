//! | model                                            | goes red when                                           |
//! |--------------------------------------------------|---------------------------------------------------------|
//! | `a_buffer_has_one_owner_at_a_time`               | either side of the recycle edge is Relaxed              |
//! | `the_tag_tells_a_buffer_that_came_back`          | `push` does not move the tag                            |
//! | `two_packets_of_one_buffer_go_back_with_the_last`| `unhold` is weaker than AcqRel                          |
//! | `a_packer_starts_again_behind_the_last_reader`   | the packer's look is weaker than Acquire                |
//! | `a_reserve_has_one_owner_at_a_time`              | either side of the reserve edge is Relaxed, or a swap   |
//! | `the_next_packet_has_memory_in_a_full_pool`      | the reserve is gone                                     |
#![cfg(loom)]
#![allow(missing_docs, reason = "models")]

use loom::{sync::Arc, thread};
use vfio_migration::internals::pool::{Packer, Pool};
use vfio_migration_loom_tests::{consume, data, filled, model, pool, pool_of};

/// Takes a buffer, if there is one, and works on its bytes.
fn use_one(pool: &Arc<Pool>, value: u8) -> bool {
    let mut packer = Packer::new(pool.clone());
    let Some(mut lease) = packer.lease(64) else {
        return false;
    };
    lease.bytes_mut().fill(value);
    assert!(lease.bytes().iter().all(|&byte| byte == value));
    true
}

/// 3 threads, 1 buffer.
#[test]
fn a_buffer_has_one_owner_at_a_time() {
    model(|| {
        let pool = pool(1, 0);
        let threads = [1, 2].map(|value| {
            let pool = pool.clone();
            thread::spawn(move || use_one(&pool, value))
        });
        use_one(&pool, 3);
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(pool.in_use().0, 0);
        assert!(use_one(&pool, 4), "the buffer has come back");
    });
}

/// 2 threads, 2 buffers: one takes a buffer while the other takes both and gives the first back. The
/// head is then what it was, and what is below it is not.
#[test]
fn the_tag_tells_a_buffer_that_came_back() {
    model(|| {
        let pool = pool(2, 0);
        let take = |pool: &Arc<Pool>, value: u8| {
            let mut packer = Packer::new(pool.clone());
            let mut lease = packer.lease(64)?;
            packer.release();
            lease.bytes_mut().fill(value);
            Some(lease)
        };
        let other = thread::spawn({
            let pool = pool.clone();
            move || {
                let first = take(&pool, 1);
                let second = take(&pool, 2);
                drop(first);
                if let Some(second) = &second {
                    assert!(second.bytes().iter().all(|&byte| byte == 2));
                }
            }
        });
        if let Some(lease) = take(&pool, 9) {
            assert!(lease.bytes().iter().all(|&byte| byte == 9));
        }
        other.join().unwrap();
        let leases = [take(&pool, 3), take(&pool, 4)];
        assert!(leases.iter().all(Option::is_some), "no buffer was lost");
    });
}

/// 3 threads, 1 buffer of two packets, each read by a thread of its own; whoever gets the buffer
/// next writes over both.
#[test]
fn two_packets_of_one_buffer_go_back_with_the_last() {
    model(|| {
        let pool = pool_of(1, 128, 0);
        let mut packer = Packer::new(pool.clone());
        let packets = [1, 2].map(|value| filled(&mut packer, value).unwrap());
        drop(packer);
        let readers = (1..).zip(packets).map(|(value, packet)| {
            let pool = pool.clone();
            thread::spawn(move || assert_eq!(consume(&pool, packet), value))
        });
        let readers: Vec<_> = readers.collect();
        if let Some(mut lease) = Packer::new(pool.clone()).lease(128) {
            lease.bytes_mut().fill(3);
        }
        for reader in readers {
            reader.join().unwrap();
        }
        assert_eq!(pool.in_use().0, 0);
    });
}

/// 2 threads, 1 buffer of one packet.
#[test]
fn a_packer_starts_again_behind_the_last_reader() {
    model(|| {
        let pool = pool(1, 0);
        let mut packer = Packer::new(pool.clone());
        let packet = filled(&mut packer, 1).unwrap();
        let reader = thread::spawn({
            let pool = pool.clone();
            move || assert_eq!(consume(&pool, packet), 1)
        });
        if let Some(packet) = filled(&mut packer, 2) {
            assert_eq!(consume(&pool, packet), 2);
        }
        reader.join().unwrap();
    });
}

/// 3 threads, 1 reserve.
#[test]
fn a_reserve_has_one_owner_at_a_time() {
    model(|| {
        let pool = pool(0, 1);
        let use_it = |pool: Arc<Pool>, value: u8| {
            if let Some(mut lease) = Pool::reserve(pool, 0) {
                lease.bytes_mut().fill(value);
                assert!(lease.bytes().iter().all(|&byte| byte == value));
            }
        };
        let threads = [1, 2].map(|value| {
            let pool = pool.clone();
            thread::spawn(move || use_it(pool, value))
        });
        use_it(pool.clone(), 3);
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(Pool::reserve(pool, 0).is_some(), "it has come back");
    });
}

/// 2 threads, 1 buffer, 1 reserve: a later packet holds the buffer, and the next gets on.
#[test]
fn the_next_packet_has_memory_in_a_full_pool() {
    model(|| {
        let pool = pool(1, 1);
        let later = filled(&mut Packer::new(pool.clone()), 9).unwrap();
        let channel = thread::spawn({
            let pool = pool.clone();
            move || {
                // Two packets that are next, one after the other.
                for value in [1, 2] {
                    let lease = Packer::new(pool.clone()).lease(64);
                    let lease = lease.or_else(|| Pool::reserve(pool.clone(), 0));
                    let mut lease = lease.expect("the next packet is always admitted");
                    lease.bytes_mut().fill(value);
                    assert_eq!(consume(&pool, data(lease.into_piece())), value);
                }
            }
        });
        assert_eq!(consume(&pool, later), 9);
        channel.join().unwrap();
    });
}
