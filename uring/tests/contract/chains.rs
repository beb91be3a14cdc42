//! A chain keeps its order, and what is short, ended or refused cancels the rest of it.

use std::{
    io::{Read, Write},
    thread,
};

use vfio_migration_uring::{Link, Op, Token};

use crate::ops::{
    CANCELED, all, assert_blocked, buffer, file, next, outcome, outcomes, pipe, push, push_chain,
    read, recv, send, sockets, write,
};

contract_test!(a_chain_of_a_hundred_writes_keeps_its_order, {
    let mut ring = ring!(K, 100);
    let (reader, writer) = pipe();
    for round in 0..20_u8 {
        for token in 0..100_u8 {
            let link = if token == 99 { Link::End } else { Link::Next };
            let op = write(&writer, &[token.wrapping_add(round); 300]);
            ring.push(Token(token.into()), op, link).unwrap();
        }
        let order: Vec<_> = (0..100).map(|_| next(&mut *ring)).collect();
        let mut bytes = vec![0; 30_000];
        file(&reader).read_exact(&mut bytes).unwrap();
        for (token, (completion, packet)) in (0..).zip(order.iter().zip(bytes.chunks(300))) {
            assert_eq!(completion.token, Token(token));
            assert_eq!(outcome(completion), Ok(300));
            assert_eq!(packet, buffer(completion));
        }
    }
});

contract_test!(a_chain_of_a_hundred_reads_keeps_its_order, {
    let mut ring = ring!(K, 100);
    let (reader, writer) = pipe();
    let source = thread::spawn(move || {
        for byte in 0..100_u8 {
            file(&writer).write_all(&[byte; 3000]).unwrap();
        }
    });
    for token in 0..100_u32 {
        let link = if token == 99 { Link::End } else { Link::Next };
        ring.push(Token(token), read(&reader, 3000), link).unwrap();
    }
    // A pipe gives what it has, so some read is short and the chain ends there. What was read is
    // contiguous all the same.
    let mut bytes = Vec::new();
    let mut whole = true;
    for (_, completion) in all(&mut *ring) {
        match completion.result {
            Ok(moved) => {
                assert!(whole);
                whole = moved == 3000;
                let Op::Read { buffer, .. } = completion.op else {
                    panic!("another operation came back");
                };
                bytes.extend_from_slice(&buffer[..moved]);
            }
            Err(error) => {
                assert!(!whole);
                assert_eq!(error.raw_os_error(), Some(libc::ECANCELED));
            }
        }
    }
    file(&reader).read_to_end(&mut bytes).unwrap();
    source.join().unwrap();
    assert_eq!(bytes.len(), 300_000);
    for (byte, packet) in (0..).zip(bytes.chunks(3000)) {
        assert!(packet.iter().all(|found| *found == byte));
    }
});

contract_test!(an_open_chain_ends_where_it_is_submitted, {
    let mut ring = ring!(K, 4);
    let (reader, writer) = pipe();
    ring.push(Token(0), read(&reader, 1), Link::Next).unwrap();
    ring.submit().unwrap();
    push(&mut *ring, 1, write(&writer, b"x"));
    assert_eq!(outcomes(&all(&mut *ring)), [Ok(1), Ok(1)]);
});

contract_test!(a_short_read_cancels_the_rest_and_the_position_is_exact, {
    let mut ring = ring!(K, 8);
    let (reader, writer) = pipe();
    file(&writer).write_all(b"0123456789").unwrap();
    let reads = [4, 4, 4, 4, 4].map(|len| read(&reader, len));
    push_chain(&mut *ring, 0, reads);
    let ended = all(&mut *ring);
    assert_eq!(outcomes(&ended), [Ok(4), Ok(4), Ok(2), CANCELED, CANCELED]);
    assert_eq!(buffer(&ended[&2]), b"89\0\0");
    assert_eq!(buffer(&ended[&3]), b"\0\0\0\0");
    file(&writer).write_all(b"abc").unwrap();
    push(&mut *ring, 0, read(&reader, 3));
    assert_eq!(buffer(&next(&mut *ring)), b"abc");
});

contract_test!(a_short_vectored_read_cancels_the_rest, {
    let mut ring = ring!(K, 8);
    let (reader, writer) = pipe();
    file(&writer).write_all(b"0123456789").unwrap();
    let vectored = || Op::ReadVectored {
        fd: reader.clone(),
        buffers: vec![vec![0; 2], vec![0; 4]],
    };
    push_chain(&mut *ring, 0, [vectored(), vectored(), vectored()]);
    assert_eq!(outcomes(&all(&mut *ring)), [Ok(6), Ok(4), CANCELED]);
});

contract_test!(a_linked_receive_goes_on_until_it_has_all, {
    let mut ring = ring!(K, 4);
    let (one, other) = sockets();
    push_chain(&mut *ring, 0, [recv(&one, 8), recv(&one, 4)]);
    file(&other).write_all(b"01234").unwrap();
    assert_blocked(&mut *ring);
    file(&other).write_all(b"56789ab").unwrap();
    let ended = all(&mut *ring);
    assert_eq!(outcomes(&ended), [Ok(8), Ok(4)]);
    assert_eq!(buffer(&ended[&0]), b"01234567");
    assert_eq!(buffer(&ended[&1]), b"89ab");
});

contract_test!(a_short_linked_receive_cancels_the_rest, {
    let mut ring = ring!(K, 4);
    let (one, other) = sockets();
    file(&other).write_all(b"012345").unwrap();
    drop(other);
    push_chain(
        &mut *ring,
        0,
        [recv(&one, 4), recv(&one, 4), send(&one, b"x")],
    );
    assert_eq!(outcomes(&all(&mut *ring)), [Ok(4), Ok(2), CANCELED]);
    push_chain(&mut *ring, 0, [recv(&one, 4), send(&one, b"x")]);
    assert_eq!(outcomes(&all(&mut *ring)), [Ok(0), CANCELED]);
});

contract_test!(an_unlinked_receive_takes_what_is_there, {
    let mut ring = ring!(K, 4);
    let (one, other) = sockets();
    push(&mut *ring, 0, recv(&one, 8));
    ring.submit().unwrap();
    file(&other).write_all(b"01234").unwrap();
    assert_eq!(outcomes(&all(&mut *ring)), [Ok(5)]);
});

contract_test!(the_end_of_the_data_cancels_the_rest, {
    let mut ring = ring!(K, 4);
    let (reader, writer) = pipe();
    file(&writer).write_all(b"0123").unwrap();
    drop(writer);
    let reads = [4, 4, 4].map(|len| read(&reader, len));
    push_chain(&mut *ring, 0, reads);
    assert_eq!(outcomes(&all(&mut *ring)), [Ok(4), Ok(0), CANCELED]);
});

contract_test!(an_empty_transfer_holds_the_chain, {
    let mut ring = ring!(K, 4);
    let (reader, writer) = pipe();
    push_chain(&mut *ring, 0, [write(&writer, b""), write(&writer, b"x")]);
    assert_eq!(outcomes(&all(&mut *ring)), [Ok(0), Ok(1)]);
    push_chain(&mut *ring, 0, [read(&reader, 0), read(&reader, 1)]);
    assert_eq!(outcomes(&all(&mut *ring)), [Ok(0), Ok(1)]);
});

contract_test!(an_error_cancels_the_rest, {
    let mut ring = ring!(K, 4);
    let (reader, writer) = pipe();
    push_chain(
        &mut *ring,
        0,
        [
            write(&writer, b"x"),
            write(&reader, b"x"),
            write(&writer, b"x"),
        ],
    );
    let bad = Err(libc::EBADF);
    assert_eq!(outcomes(&all(&mut *ring)), [Ok(1), bad, CANCELED]);
    push_chain(&mut *ring, 0, [recv(&reader, 1), write(&writer, b"x")]);
    let no_socket = Err(libc::ENOTSOCK);
    assert_eq!(outcomes(&all(&mut *ring)), [no_socket, CANCELED]);
    drop(writer);
    let mut bytes = Vec::new();
    file(&reader).read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"x");
});

contract_test!(a_broken_chain_leaves_the_next_one_alone, {
    let mut ring = ring!(K, 8);
    let (reader, writer) = pipe();
    push_chain(&mut *ring, 0, [write(&reader, b"x"), write(&writer, b"x")]);
    push_chain(&mut *ring, 2, [write(&writer, b"y"), write(&writer, b"z")]);
    assert_eq!(
        outcomes(&all(&mut *ring)),
        [Err(libc::EBADF), CANCELED, Ok(1), Ok(1)]
    );
    drop((ring, writer));
    let mut bytes = Vec::new();
    file(&reader).read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"yz");
});

contract_test!(a_write_that_nobody_will_read_is_an_error, {
    let mut ring = ring!(K, 4);
    let (reader, writer) = pipe();
    drop(reader);
    push(&mut *ring, 0, write(&writer, b"x"));
    assert_eq!(outcomes(&all(&mut *ring)), [Err(libc::EPIPE)]);
    let (one, other) = sockets();
    drop(other);
    push(&mut *ring, 0, send(&one, b"x"));
    assert_eq!(outcomes(&all(&mut *ring)), [Err(libc::EPIPE)]);
});
