//! Memory has one owner at a time, and the next owner finds the last one's accesses done.
//!
//! | model | goes red when |
//! |---|---|
//! | `a_recycled_buffer_is_quiet` | either side of the recycle edge is Relaxed, on success or failure |
//! | `a_stale_head_leases_nothing_twice` | the tag is gone |
//! | `the_last_holder_has_seen_all_accesses` | the unhold edge lacks a side |
//! | `a_cutter_starts_again_when_its_lease_is_gone` | the lease cutter's look at the holders is Relaxed |
//! | `a_cutter_does_not_start_again_under_a_lease` | the lease cutter's look does not count right |
//! | `a_reserve_has_one_owner` | the reserve edge is Relaxed, or is no exchange |
//! | `three_threads_never_own_one_buffer` | `pop` or `push` stores its head |
#![cfg(loom)]

use std::sync::Arc;

use loom::thread;
use vfio_migration::internals::pool::{LeaseCutter, Pool};
use vfio_migration_loom_tests::{lease, model, pool};

/// Two threads lease, write and give back one buffer. 2 threads, 1 buffer, 2 preemptions.
#[test]
fn a_recycled_buffer_is_quiet() {
    model(|| {
        let pool = pool(1, 64, 0);
        let other = thread::spawn({
            let pool = Arc::clone(&pool);
            move || {
                let got = lease(&pool).map(|mut lease| lease.bytes_mut().fill(1));
                got.is_some()
            }
        });
        let mine = lease(&pool).map(|mut lease| lease.bytes_mut().fill(2));
        let theirs = other.join().unwrap();
        assert!(mine.is_some() || theirs, "lock-free: somebody gets it");
        assert_eq!(pool.in_use().0, 0);
        assert!(lease(&pool).is_some());
    });
}

/// One thread sleeps inside `pop` while the other takes two buffers and gives back the first. 2
/// threads, 2 buffers, 2 preemptions.
#[test]
fn a_stale_head_leases_nothing_twice() {
    model(|| {
        let pool = pool(2, 64, 0);
        let other = thread::spawn({
            let pool = Arc::clone(&pool);
            move || {
                let first = lease(&pool);
                let mut second = lease(&pool);
                drop(first);
                // After the give-back, which would order it before the sleeper's accesses.
                if let Some(second) = &mut second {
                    second.bytes_mut().fill(1);
                }
                second
            }
        });
        let mut mine = [lease(&pool), lease(&pool)];
        for mine in mine.iter_mut().flatten() {
            mine.bytes_mut().fill(2);
        }
        let theirs = other.join().unwrap();
        let owned = mine.iter().flatten().chain(&theirs).count();
        assert!(owned <= 2, "two buffers, {owned} leases");
        assert_eq!(pool.in_use().0 as usize, owned);
    });
}

/// Two leases of one buffer on two threads; whoever is last frees it for a third use. 2 threads, 1
/// buffer, 2 preemptions.
#[test]
fn the_last_holder_has_seen_all_accesses() {
    model(|| {
        let pool = pool(1, 128, 0);
        let mut cutter = LeaseCutter::new(Arc::clone(&pool));
        let mut theirs = cutter.lease(64).expect("the first half");
        let mut mine = cutter.lease(64).expect("the second half");
        drop(cutter);
        let other = thread::spawn(move || theirs.bytes_mut().fill(1));
        mine.bytes_mut().fill(2);
        drop(mine);
        if let Some(mut both) = lease(&pool) {
            both.bytes_mut().fill(3);
        }
        other.join().unwrap();
        assert_eq!(pool.in_use().0, 0);
    });
}

/// The lease cutter cuts again what the other thread gave back. 2 threads, 1 buffer, 2 preemptions.
#[test]
fn a_cutter_starts_again_when_its_lease_is_gone() {
    model(|| {
        let pool = pool(1, 64, 0);
        let mut cutter = LeaseCutter::new(Arc::clone(&pool));
        let mut theirs = cutter.lease(64).expect("the whole buffer");
        let other = thread::spawn(move || theirs.bytes_mut().fill(1));
        if let Some(mut again) = cutter.lease(64) {
            again.bytes_mut().fill(2);
        }
        other.join().unwrap();
        assert!(cutter.lease(64).is_some(), "alone with its buffer");
        drop(cutter);
        assert_eq!(pool.in_use().0, 0);
    });
}

/// Two leases on two threads, and a lease cutter that would cut both again. 3 threads, 1 buffer, 2
/// preemptions.
#[test]
fn a_cutter_does_not_start_again_under_a_lease() {
    model(|| {
        let pool = pool(1, 128, 0);
        let mut cutter = LeaseCutter::new(Arc::clone(&pool));
        let others = [1, 2].map(|byte| {
            let mut theirs = cutter.lease(64).expect("a half each");
            thread::spawn(move || theirs.bytes_mut().fill(byte))
        });
        if let Some(mut again) = cutter.lease(128) {
            again.bytes_mut().fill(3);
        }
        for other in others {
            other.join().unwrap();
        }
        drop(cutter);
        assert_eq!(pool.in_use().0, 0);
    });
}

/// Two threads want one device's reserve. 2 threads, 1 reserve, 2 preemptions.
#[test]
fn a_reserve_has_one_owner() {
    model(|| {
        let pool = pool(0, 64, 1);
        let other = thread::spawn({
            let pool = Arc::clone(&pool);
            move || {
                let got = Pool::reserve(pool, 0).map(|mut lease| lease.bytes_mut().fill(1));
                got.is_some()
            }
        });
        let mine = Pool::reserve(Arc::clone(&pool), 0).map(|mut lease| lease.bytes_mut().fill(2));
        let theirs = other.join().unwrap();
        assert!(mine.is_some() || theirs);
        assert!(Pool::reserve(Arc::clone(&pool), 0).is_some());
    });
}

/// Three threads lease, write and give back two buffers. 3 threads, 2 buffers, 2 preemptions.
#[test]
fn three_threads_never_own_one_buffer() {
    model(|| {
        let pool = pool(2, 64, 0);
        let others = [1, 2].map(|byte| {
            let pool = Arc::clone(&pool);
            thread::spawn(move || {
                if let Some(mut lease) = lease(&pool) {
                    lease.bytes_mut().fill(byte);
                }
            })
        });
        let mut mine = lease(&pool);
        if let Some(mine) = &mut mine {
            mine.bytes_mut().fill(3);
        }
        for other in others {
            other.join().unwrap();
        }
        drop(mine);
        assert_eq!(pool.in_use().0, 0);
        let both = [lease(&pool), lease(&pool)];
        assert!(both.iter().all(Option::is_some), "both came home");
    });
}
