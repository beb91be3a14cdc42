//! What is handed in comes back: a buffer, a file, an operation that cannot be taken.

use std::{io::Read, sync::Arc};

use vfio_migration_uring::{Link, Op, Token};

use crate::{
    LONG,
    ops::{all, file, next, pipe, push, read, write},
};

contract_test!(a_buffer_and_its_file_come_back_with_the_completion, {
    let mut ring = ring!(K, 4);
    let (reader, writer) = pipe();
    let buffer = b"state".to_vec();
    let bytes = buffer.as_ptr();
    let op = Op::Write {
        fd: writer.clone(),
        buffer,
    };
    ring.push(Token(3), op, Link::End).unwrap();
    assert_eq!(ring.in_flight(), 1);
    let completion = next(&mut *ring);
    assert_eq!(ring.in_flight(), 0);
    assert_eq!(completion.token, Token(3));
    assert_eq!(completion.result.unwrap(), 5);
    let Op::Write { fd, buffer } = completion.op else {
        panic!("another operation came back");
    };
    assert!(Arc::ptr_eq(&fd, &writer));
    assert_eq!((buffer.as_ptr(), &buffer[..]), (bytes, &b"state"[..]));
    drop((fd, writer));
    let mut written = String::new();
    file(&reader).read_to_string(&mut written).unwrap();
    assert_eq!(written, "state");
    assert_eq!(ring.capacity(), 4);
});

contract_test!(a_token_in_flight_or_too_large_is_given_back, {
    let mut ring = ring!(K, 4);
    let (reader, _writer) = pipe();
    push(&mut *ring, 3, read(&reader, 1));
    for token in [3, 4, u32::MAX] {
        let rejected = ring
            .push(Token(token), read(&reader, 7), Link::End)
            .unwrap_err();
        assert_eq!(rejected.0.requested(), 7);
    }
    ring.submit().unwrap();
    let _rejected = ring
        .push(Token(3), read(&reader, 7), Link::End)
        .unwrap_err();
    assert_eq!(ring.in_flight(), 1);
});

contract_test!(a_full_ring_takes_no_more_until_one_is_reaped, {
    let mut ring = ring!(K, 3);
    let (reader, writer) = pipe();
    for token in 0..3 {
        push(&mut *ring, token, write(&writer, b"x"));
    }
    for token in 0..9 {
        let _rejected = ring
            .push(Token(token), write(&writer, b"x"), Link::End)
            .unwrap_err();
    }
    let freed = next(&mut *ring).token;
    push(&mut *ring, freed.0, write(&writer, b"x"));
    all(&mut *ring);
    drop((ring, writer));
    let mut bytes = Vec::new();
    file(&reader).read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"xxxx");
});

contract_test!(too_much_for_one_operation_is_given_back, {
    let mut ring = ring!(K, 4);
    let (reader, _writer) = pipe();
    let buffers = vec![vec![0]; Op::<Vec<u8>>::MAX_VECTORS + 1];
    let op = Op::ReadVectored {
        fd: reader,
        buffers,
    };
    let _rejected = ring.push(Token(0), op, Link::End).unwrap_err();
    assert_eq!(ring.in_flight(), 0);
});

contract_test!(a_drained_ring_takes_nothing, {
    let mut ring = ring!(K, 4);
    let (_reader, writer) = pipe();
    let _nothing = ring.drain(LONG);
    let _rejected = ring
        .push(Token(0), write(&writer, b"x"), Link::End)
        .unwrap_err();
    ring.submit().unwrap();
    assert!(!ring.wait(None).unwrap());
    assert!(ring.reap().is_none());
    let again = ring.drain(LONG);
    assert_eq!((again.reaped, again.leaked), (0, 0));
});
