//! What ends a wait.

use std::{io::Write, sync::mpsc, thread, time::Duration};

use vfio_migration_uring::Waker;

use crate::{
    MOMENT,
    ops::{all, assert_blocked, file, outcome, outcomes, pipe, push, read, write},
    rings::Kind,
};

contract_test!(a_wake_before_the_wait_ends_it, {
    let waker = Waker::new().unwrap();
    let Some(mut ring) = K::open::<Vec<u8>>(4, &waker) else {
        return;
    };
    for _ in 0..10 {
        waker.wake();
        assert!(ring.wait(None).unwrap());
        assert_blocked(&mut *ring);
    }
});

contract_test!(a_wake_during_the_wait_ends_it, {
    let waker = Waker::new().unwrap();
    let Some(mut ring) = K::open::<Vec<u8>>(4, &waker) else {
        return;
    };
    let (reader, _writer) = pipe();
    push(&mut *ring, 0, read(&reader, 1));
    let (ask, asked) = mpsc::channel();
    let other = thread::spawn(move || {
        for () in asked {
            thread::sleep(Duration::from_millis(1));
            waker.wake();
        }
    });
    for _ in 0..20 {
        ask.send(()).unwrap();
        assert!(ring.wait(None).unwrap());
        assert!(ring.reap().is_none());
    }
    drop(ask);
    other.join().unwrap();
});

contract_test!(many_wakes_are_one, {
    let waker = Waker::new().unwrap();
    let Some(mut ring) = K::open::<Vec<u8>>(4, &waker) else {
        return;
    };
    // Once with nothing waiting in the ring, and once when it has waited.
    for _ in 0..2 {
        for _ in 0..5 {
            waker.clone().wake();
        }
        assert!(ring.wait(None).unwrap());
        // A ring may have heard of the first alone by then, and hears of the rest together.
        let mut more = 0;
        while ring.wait(Some(MOMENT)).unwrap() {
            more += 1;
        }
        assert!(more <= 1, "{more} wakes after the first");
        assert_blocked(&mut *ring);
    }
});

contract_test!(a_wake_is_told_beside_a_completion, {
    let waker = Waker::new().unwrap();
    let Some(mut ring) = K::open::<Vec<u8>>(4, &waker) else {
        return;
    };
    let (reader, writer) = pipe();
    for _ in 0..20 {
        push(&mut *ring, 0, write(&writer, b"x"));
        ring.wait(None).unwrap();
        waker.wake();
        // The completion has not been reaped, so this does not sleep, and tells of the wake.
        assert!(ring.wait(None).unwrap());
        assert_eq!(outcomes(&all(&mut *ring)), [Ok(1)]);
    }
    drop(reader);
});

contract_test!(a_wait_ends_with_its_timeout, {
    let mut ring = ring!(K, 4);
    assert!(!ring.wait(Some(MOMENT)).unwrap());
    let (reader, writer) = pipe();
    push(&mut *ring, 0, read(&reader, 1));
    assert!(!ring.wait(Some(MOMENT)).unwrap());
    assert!(!ring.wait(Some(Duration::from_nanos(1))).unwrap());
    assert_eq!(ring.in_flight(), 1);
    // A time-out beyond every clock's end is none.
    drop(writer);
    assert!(!ring.wait(Some(Duration::MAX)).unwrap());
    assert_eq!(outcomes(&all(&mut *ring)), [Ok(0)]);
});

contract_test!(a_wait_without_time_does_not_block, {
    let mut ring = ring!(K, 4);
    let (reader, writer) = pipe();
    push(&mut *ring, 0, read(&reader, 1));
    assert!(!ring.wait(Some(Duration::ZERO)).unwrap());
    file(&writer).write_all(b"x").unwrap();
    // Looking is enough.
    let completion = loop {
        ring.wait(Some(Duration::ZERO)).unwrap();
        if let Some(completion) = ring.reap() {
            break completion;
        }
    };
    assert_eq!(outcome(&completion), Ok(1));
});

contract_test!(a_completion_ends_a_wait, {
    let mut ring = ring!(K, 4);
    let (reader, writer) = pipe();
    let (ask, asked) = mpsc::channel();
    let other = thread::spawn(move || {
        for () in asked {
            thread::sleep(Duration::from_millis(1));
            file(&writer).write_all(b"x").unwrap();
        }
    });
    for _ in 0..20 {
        push(&mut *ring, 0, read(&reader, 1));
        ask.send(()).unwrap();
        assert!(!ring.wait(None).unwrap());
        assert_eq!(outcome(&ring.reap().unwrap()), Ok(1));
    }
    drop(ask);
    other.join().unwrap();
});
