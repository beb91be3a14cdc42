//! A cancellation ends what is blocked, and hits nothing else.

use std::io::{Read, Write};

use vfio_migration_uring::{Op, Token};

use crate::{
    MOMENT,
    ops::{
        CANCELED, all, assert_blocked, file, fill, next, outcome, outcomes, pipe, poll, push,
        push_chain, read, recv, send, sockets, write,
    },
    rings::Kind,
};

fn cancelled_while_blocked<K: Kind>(op: Op<Vec<u8>>) {
    let mut ring = ring!(K, 4);
    push(&mut *ring, 2, op);
    assert_blocked(&mut *ring);
    ring.cancel(Token(2));
    ring.cancel(Token(2));
    let completion = next(&mut *ring);
    assert_eq!(
        (completion.token, outcome(&completion)),
        (Token(2), CANCELED)
    );
    assert_eq!(ring.in_flight(), 0);
    assert_blocked(&mut *ring);
}

contract_test!(a_blocked_read_can_be_cancelled, {
    let (reader, writer) = pipe();
    cancelled_while_blocked::<K>(read(&reader, 8));
    file(&writer).write_all(b"x").unwrap();
    assert_eq!(file(&reader).read(&mut [0; 8]).unwrap(), 1);
});

contract_test!(a_blocked_write_can_be_cancelled, {
    let (_reader, writer) = pipe();
    fill(&writer);
    cancelled_while_blocked::<K>(write(&writer, &[1; 100_000]));
});

contract_test!(a_blocked_receive_can_be_cancelled, {
    let (one, _other) = sockets();
    cancelled_while_blocked::<K>(recv(&one, 8));
    cancelled_while_blocked::<K>(read(&one, 8));
});

contract_test!(a_blocked_send_can_be_cancelled, {
    let (one, _other) = sockets();
    fill(&one);
    cancelled_while_blocked::<K>(send(&one, &[1; 100_000]));
});

contract_test!(a_poll_can_be_cancelled, {
    let (reader, _writer) = pipe();
    cancelled_while_blocked::<K>(poll(&reader, libc::POLLIN));
});

contract_test!(cancelling_a_blocked_chain_ends_it_all, {
    let mut ring = ring!(K, 8);
    let (reader, writer) = pipe();
    let (other_reader, _other_writer) = pipe();
    push(&mut *ring, 7, read(&other_reader, 1));
    push_chain(
        &mut *ring,
        0,
        [read(&reader, 1), read(&reader, 1), write(&writer, b"x")],
    );
    assert_blocked(&mut *ring);
    ring.cancel(Token(0));
    for _ in 0..3 {
        let completion = next(&mut *ring);
        assert!(completion.token < Token(3));
        assert_eq!(outcome(&completion), CANCELED);
    }
    assert_eq!(ring.in_flight(), 1);
    assert_blocked(&mut *ring);
});

contract_test!(cancelling_an_ended_operation_does_nothing, {
    let mut ring = ring!(K, 4);
    let (_reader, writer) = pipe();
    push(&mut *ring, 0, write(&writer, b"x"));
    ring.wait(None).unwrap();
    ring.cancel(Token(0));
    ring.submit().unwrap();
    assert_eq!(outcomes(&all(&mut *ring)), [Ok(1)]);
    ring.cancel(Token(0));
    assert_blocked(&mut *ring);
});

contract_test!(cancelling_an_unknown_token_does_nothing, {
    let mut ring = ring!(K, 4);
    for token in [0, 3, 4, u32::MAX] {
        ring.cancel(Token(token));
    }
    assert_blocked(&mut *ring);
});

contract_test!(a_cancellation_does_not_hit_the_tokens_next_operation, {
    let mut ring = ring!(K, 4);
    let (reader, writer) = pipe();
    for _ in 0..50 {
        push(&mut *ring, 0, write(&writer, b"x"));
        ring.wait(None).unwrap();
        ring.cancel(Token(0));
        assert_eq!(outcome(&next(&mut *ring)), Ok(1));
        push(&mut *ring, 0, read(&reader, 1));
        ring.cancel(Token(1));
        assert_eq!(outcome(&next(&mut *ring)), Ok(1));
    }
});

contract_test!(an_operation_cancelled_before_its_submission_never_starts, {
    let mut ring = ring!(K, 4);
    let (reader, writer) = pipe();
    for _ in 0..20 {
        push(&mut *ring, 0, write(&writer, b"x"));
        ring.cancel(Token(0));
        assert_eq!(outcomes(&all(&mut *ring)), [CANCELED]);
    }
    drop((ring, writer));
    assert_eq!(file(&reader).read(&mut [0; 8]).unwrap(), 0);
});

contract_test!(
    a_member_cancelled_before_its_submission_ends_the_chain_there,
    {
        let mut ring = ring!(K, 4);
        let (reader, writer) = pipe();
        push_chain(
            &mut *ring,
            0,
            [b"a", b"b", b"c", b"d"].map(|bytes| write(&writer, bytes)),
        );
        ring.cancel(Token(2));
        assert_eq!(
            outcomes(&all(&mut *ring)),
            [Ok(1), Ok(1), CANCELED, CANCELED]
        );
        drop((ring, writer));
        let mut bytes = Vec::new();
        file(&reader).read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, b"ab");
    }
);

contract_test!(
    a_member_of_a_started_chain_is_cancelled_when_its_turn_comes,
    {
        let mut ring = ring!(K, 4);
        let (reader, writer) = pipe();
        let (other_reader, _other_writer) = pipe();
        push_chain(&mut *ring, 0, [read(&reader, 1), read(&other_reader, 1)]);
        assert_blocked(&mut *ring);
        ring.cancel(Token(1));
        let _early = ring.wait(Some(MOMENT)).unwrap();
        file(&writer).write_all(b"x").unwrap();
        assert_eq!(outcomes(&all(&mut *ring)), [Ok(1), CANCELED]);
    }
);

contract_test!(a_blocked_operation_delays_no_other, {
    let mut ring = ring!(K, 64);
    let (reader, writer) = pipe();
    let (other_reader, other_writer) = pipe();
    for token in 0..62 {
        push(&mut *ring, token, read(&reader, 1));
    }
    ring.submit().unwrap();
    for _ in 0..20 {
        push_chain(
            &mut *ring,
            62,
            [write(&other_writer, b"x"), read(&other_reader, 1)],
        );
        assert_eq!(outcome(&next(&mut *ring)), Ok(1));
        assert_eq!(outcome(&next(&mut *ring)), Ok(1));
    }
    assert_eq!(ring.in_flight(), 62);
    drop(writer);
    assert!(outcomes(&all(&mut *ring)).iter().all(|end| *end == Ok(0)));
});
