//! Every operation moves its bytes, at the file's position or at a place.

use std::io::Write;

use vfio_migration_uring::{Link, Op, Token};

use crate::ops::{
    CANCELED, all, assert_blocked, buffer, contents, file, memory, next, outcome, outcomes, pipe,
    poll, push, push_chain, read, read_at, recv, send, sockets, write, write_at,
};

contract_test!(every_operation_moves_its_bytes, {
    let mut ring = ring!(K, 8);
    let (reader, writer) = pipe();
    let (one, other) = sockets();

    push(&mut *ring, 0, write(&writer, b"plain"));
    assert_eq!(outcomes(&all(&mut *ring)), [Ok(5)]);
    push(&mut *ring, 0, read(&reader, 16));
    let ended = all(&mut *ring);
    assert_eq!(outcomes(&ended), [Ok(5)]);
    assert_eq!(&buffer(&ended[&0])[..6], b"plain\0");

    let op = Op::WriteVectored {
        fd: writer,
        buffers: vec![b"vec".to_vec(), Vec::new(), b"tor".to_vec()],
    };
    push(&mut *ring, 0, op);
    assert_eq!(outcomes(&all(&mut *ring)), [Ok(6)]);
    let op = Op::ReadVectored {
        fd: reader,
        buffers: vec![vec![0; 1], vec![0; 4], vec![0; 4]],
    };
    push(&mut *ring, 0, op);
    let completion = next(&mut *ring);
    assert_eq!(outcome(&completion), Ok(6));
    let Op::ReadVectored { buffers, .. } = completion.op else {
        panic!("another operation came back");
    };
    assert_eq!(buffers, [&b"v"[..], b"ecto", b"r\0\0\0"]);

    push(&mut *ring, 0, send(&one, b"socket"));
    push(&mut *ring, 1, recv(&other, 6));
    let ended = all(&mut *ring);
    assert_eq!(outcomes(&ended), [Ok(6), Ok(6)]);
    assert_eq!(buffer(&ended[&1]), b"socket");
    push(&mut *ring, 0, send(&other, b"back"));
    push(&mut *ring, 1, read(&one, 6));
    let ended = all(&mut *ring);
    assert_eq!(outcomes(&ended), [Ok(4), Ok(4)]);
});

contract_test!(a_poll_tells_what_is_ready, {
    let mut ring = ring!(K, 4);
    let (reader, writer) = pipe();
    push(&mut *ring, 0, poll(&reader, libc::POLLIN));
    push(&mut *ring, 1, poll(&writer, libc::POLLOUT));
    let completion = next(&mut *ring);
    assert_eq!(completion.token, Token(1));
    assert_eq!(outcome(&completion), Ok(poll_bits(libc::POLLOUT)));
    drop(completion);
    assert_blocked(&mut *ring);
    file(&writer).write_all(b"x").unwrap();
    let completion = next(&mut *ring);
    assert_eq!(completion.token, Token(0));
    assert_eq!(outcome(&completion), Ok(poll_bits(libc::POLLIN)));
    // A poll that is over holds a chain.
    push_chain(
        &mut *ring,
        0,
        [poll(&reader, libc::POLLIN), read(&reader, 1)],
    );
    assert_eq!(
        outcomes(&all(&mut *ring)),
        [Ok(poll_bits(libc::POLLIN)), Ok(1)]
    );
    drop(writer);
    push(&mut *ring, 0, poll(&reader, 0));
    assert_eq!(outcomes(&all(&mut *ring)), [Ok(poll_bits(libc::POLLHUP))]);
});

fn poll_bits(events: i16) -> usize {
    usize::try_from(events).unwrap()
}

contract_test!(a_read_at_a_place_leaves_the_files_own_alone, {
    let mut ring = ring!(K, 4);
    let fd = memory(b"0123456789");
    nix::unistd::lseek(fd.as_ref(), 2, nix::unistd::Whence::SeekSet).unwrap();
    push(&mut *ring, 0, read_at(&fd, 7, 2));
    push(&mut *ring, 1, read_at(&fd, 8, 9));
    push(&mut *ring, 2, read_at(&fd, 10, 9));
    let ended = all(&mut *ring);
    assert_eq!(outcomes(&ended), [Ok(2), Ok(2), Ok(0)]);
    assert_eq!(buffer(&ended[&0]), b"78");
    assert_eq!(&buffer(&ended[&1])[..2], b"89");
    // Where the file itself is.
    push(&mut *ring, 3, read(&fd, 3));
    assert_eq!(buffer(&all(&mut *ring)[&3]), b"234");
});

contract_test!(a_write_at_a_place_leaves_the_files_own_alone, {
    let mut ring = ring!(K, 4);
    let fd = memory(b"0123456789");
    nix::unistd::lseek(fd.as_ref(), 2, nix::unistd::Whence::SeekSet).unwrap();
    push(&mut *ring, 0, write_at(&fd, 7, b"ab"));
    push(&mut *ring, 1, write_at(&fd, 12, b"c"));
    let ended = all(&mut *ring);
    assert_eq!(outcomes(&ended), [Ok(2), Ok(1)]);
    assert_eq!(buffer(&ended[&0]), b"ab");
    // Where the file itself is.
    push(&mut *ring, 2, write(&fd, b"x"));
    assert_eq!(outcomes(&all(&mut *ring)), [Ok(1)]);
    assert_eq!(contents(&fd), b"01x3456ab9\0\0c");
});

// Each lies on top of a part of the one before.
contract_test!(a_chain_of_writes_at_places_keeps_its_order, {
    let mut ring = ring!(K, 100);
    for _ in 0..20 {
        let fd = memory(b"");
        for token in 0..100 {
            let link = if token == 99 { Link::End } else { Link::Next };
            let byte = u8::try_from(token).unwrap();
            let op = write_at(&fd, token.into(), &[byte; 1000]);
            ring.push(Token(token), op, link).unwrap();
        }
        assert_eq!(outcomes(&all(&mut *ring)), [Ok(1000); 100]);
        let mut expected: Vec<u8> = (0..99).collect();
        expected.extend([99; 1000]);
        assert!(contents(&fd) == expected);
    }
});

contract_test!(a_place_beyond_every_file_is_refused, {
    let mut ring = ring!(K, 4);
    let fd = memory(b"01");
    for offset in [1 << 63, u64::MAX - 1, u64::MAX] {
        push_chain(
            &mut *ring,
            0,
            [write_at(&fd, offset, b"x"), read_at(&fd, 0, 1)],
        );
        push(&mut *ring, 2, read_at(&fd, offset, 1));
        let outcomes = outcomes(&all(&mut *ring));
        assert_eq!(
            outcomes,
            [Err(libc::EINVAL), CANCELED, Err(libc::EINVAL)],
            "{offset:x}"
        );
    }
    assert_eq!(contents(&fd), b"01");
});
