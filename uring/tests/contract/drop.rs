//! A ring that goes away frees what was blocked, and what it cannot free it leaks whole.
#![expect(unsafe_code, reason = "a buffer of the test's own")]

use std::{
    io::{Read, Write},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
        mpsc,
    },
    thread,
};

use vfio_migration_uring::{BlockingRing, Buffer, Link, Op, Ring, Token, Waker};

use crate::{
    LONG, MOMENT,
    counted::{Counted, counted_read},
    ops::{file, pipe, poll, push, push_chain, read, write},
    rings::Kind,
    watchdog::Watchdog,
};

contract_test!(a_dropped_ring_frees_what_was_blocked, {
    for waits in [false, true] {
        let Some(mut ring) = K::open::<Counted>(8, &Waker::new().unwrap()) else {
            return;
        };
        let (reader, _writer) = pipe();
        let drops = Arc::new(AtomicUsize::new(0));
        for (token, link) in (0..).zip([Link::End, Link::Next, Link::Next, Link::End]) {
            let op = counted_read(&reader, &drops);
            ring.push(Token(token), op, link).unwrap();
        }
        if waits {
            ring.wait(Some(MOMENT)).unwrap();
        } else {
            ring.submit().unwrap();
        }
        // Never submitted.
        ring.push(Token(7), counted_read(&reader, &drops), Link::End)
            .unwrap();
        drop(ring);
        assert_eq!(drops.load(Relaxed), 5);
        assert_eq!(Arc::strong_count(&reader), 1);
    }
});

contract_test!(a_drain_counts_what_it_ends, {
    let mut ring = ring!(K, 8);
    let (reader, writer) = pipe();
    push(&mut *ring, 0, read(&reader, 1));
    push_chain(&mut *ring, 1, [read(&reader, 1), read(&reader, 1)]);
    push(&mut *ring, 3, poll(&reader, libc::POLLIN));
    ring.submit().unwrap();
    push(&mut *ring, 4, write(&writer, b"x"));
    let drained = ring.drain(LONG);
    assert_eq!((drained.reaped, drained.leaked), (5, 0));
    assert_eq!(ring.in_flight(), 0);
    drop((ring, writer));
    // What was not submitted has not been started.
    assert_eq!(file(&reader).read(&mut [0; 8]).unwrap(), 0);
});

/// A buffer that keeps the worker that asks for it: to the ring, a driver that sits in its read.
struct Slow {
    inner: Counted,
    go_on: mpsc::Receiver<()>,
}

// SAFETY: as for the buffer inside.
unsafe impl Buffer for Slow {
    fn as_mut_ptr(&mut self) -> *mut u8 {
        let _end = self.go_on.recv();
        self.inner.as_mut_ptr()
    }

    fn len(&self) -> usize {
        self.inner.len()
    }
}

#[test]
fn a_worker_that_cannot_be_interrupted_is_leaked_with_all_that_it_has() {
    let _watchdog = Watchdog::new("a leaked worker");
    let waker = Waker::new().unwrap();
    let mut ring = BlockingRing::<Slow>::new(4, waker, LONG).unwrap();
    let (reader, writer) = pipe();
    file(&writer).write_all(b"x").unwrap();
    let drops = Arc::new(AtomicUsize::new(0));
    let mut locks = Vec::new();
    for (token, link) in (0..).zip([Link::Next, Link::End, Link::End]) {
        let (lock, go_on) = mpsc::channel();
        let inner = Counted::new(&drops);
        let op = Op::Read {
            fd: if token == 2 { pipe().0 } else { reader.clone() },
            buffer: Slow { inner, go_on },
        };
        ring.push(Token(token), op, link).unwrap();
        locks.push(lock);
    }
    // The third is at the end of its data, and slow; let it go.
    locks.pop();
    while ring.reap().is_none() {
        ring.wait(None).unwrap();
    }
    assert_eq!(drops.load(Relaxed), 1);
    let drained = ring.drain(MOMENT);
    assert_eq!((drained.reaped, drained.leaked), (0, 2));
    drop(ring);
    // The worker goes on, and ends: what was announced as leaked stays leaked.
    drop(locks);
    thread::sleep(MOMENT);
    assert_eq!(drops.load(Relaxed), 1);
    assert_eq!(Arc::strong_count(&reader), 3);
}
