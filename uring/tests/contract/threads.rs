//! Rings, threads and files are independent of each other.

use std::{
    fs::File,
    io::Write,
    os::fd::{AsRawFd, OwnedFd},
    thread,
};

use vfio_migration_uring::Waker;

use crate::{
    ops::{
        CANCELED, all, assert_blocked, buffer, file, next, outcome, pipe, push, push_chain, read,
    },
    rings::Kind,
};

contract_test!(two_rings_are_independent, {
    let wakers = [(); 2].map(|()| Waker::new().unwrap());
    let (Some(mut one), Some(mut other)) = (
        K::open::<Vec<u8>>(4, &wakers[0]),
        K::open::<Vec<u8>>(4, &wakers[1]),
    ) else {
        return;
    };
    let (reader, writer) = pipe();
    let (other_reader, _other_writer) = pipe();
    push(&mut *one, 0, read(&reader, 1));
    push(&mut *other, 0, read(&other_reader, 1));
    one.submit().unwrap();
    other.submit().unwrap();
    wakers[0].wake();
    assert_blocked(&mut *other);
    assert!(one.wait(None).unwrap());
    file(&writer).write_all(b"x").unwrap();
    assert_eq!(outcome(&next(&mut *one)), Ok(1));
    assert_blocked(&mut *other);
    drop(one);
    assert_blocked(&mut *other);
    assert_eq!(other.in_flight(), 1);
});

contract_test!(a_ring_made_here_works_there, {
    let mut ring = ring!(K, 4);
    let (reader, writer) = pipe();
    let ring = thread::spawn(move || {
        push(&mut *ring, 0, read(&reader, 1));
        assert_blocked(&mut *ring);
        file(&writer).write_all(b"x").unwrap();
        assert_eq!(outcome(&next(&mut *ring)), Ok(1));
        push(&mut *ring, 1, read(&reader, 1));
        ring.submit().unwrap();
        ring
    })
    .join()
    .unwrap();
    // And is drained here.
    drop(ring);
});

contract_test!(a_ring_survives_the_thread_that_used_it, {
    let waker = Waker::new().unwrap();
    let Some(mut ring) = K::open::<Vec<u8>>(4, &waker) else {
        return;
    };
    let (reader, writer) = pipe();
    let (mut ring, reader) = thread::spawn(move || {
        push(&mut *ring, 0, read(&reader, 1));
        assert_blocked(&mut *ring);
        (ring, reader)
    })
    .join()
    .unwrap();
    waker.wake();
    while !ring.wait(None).unwrap() {}
    file(&writer).write_all(b"x").unwrap();
    // The kernel's ring loses what a thread had in flight when it exited.
    let first = outcome(&next(&mut *ring));
    if first == CANCELED {
        push(&mut *ring, 0, read(&reader, 1));
        assert_eq!(outcome(&next(&mut *ring)), Ok(1));
    } else {
        assert_eq!(first, Ok(1));
    }
});

contract_test!(a_file_closed_by_its_owner_stays_open_in_the_ring, {
    let mut ring = ring!(K, 4);
    let (reader, writer) = pipe();
    let number = reader.as_raw_fd();
    push_chain(&mut *ring, 0, [read(&reader, 1), read(&reader, 1)]);
    ring.submit().unwrap();
    drop(reader);
    let others: Vec<OwnedFd> = (0..8)
        .map(|_| File::open("/dev/zero").unwrap().into())
        .collect();
    assert!(others.iter().all(|other| other.as_raw_fd() != number));
    file(&writer).write_all(b"xy").unwrap();
    let ended = all(&mut *ring);
    assert_eq!(buffer(&ended[&0]), b"x");
    assert_eq!(buffer(&ended[&1]), b"y");
});
