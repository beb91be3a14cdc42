//! What every ring promises, asked of each of them.
//!
//! Every test runs under a watchdog: a ring that hangs is a failure that names its test, not a run
//! that never ends. Nothing here measures time.
#![expect(unsafe_code, reason = "a buffer that counts its drops")]

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    process,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
        mpsc,
    },
    thread,
    time::Duration,
};

#[cfg(feature = "sim")]
use vfio_migration_uring::sim::{Fault, FaultPlan, SimConfig, SimRing};
use vfio_migration_uring::{
    Backend, BlockingRing, Buffer, Completion, Fd, KernelRing, Link, Op, Ring, Token, Waker, open,
};

/// Longer than anything here takes on the slowest machine.
const LONG: Duration = Duration::from_secs(60);

/// Long enough to see that something does not happen. A test that waits for this in vain is only
/// slower.
const MOMENT: Duration = Duration::from_millis(20);

// ---------------------------------------------------------------------------------------------
// The rings.

trait Kind {
    /// None where this host has no such ring.
    fn open<B: Buffer>(capacity: usize, waker: &Waker) -> Option<Box<dyn Ring<B>>>;

    /// A ring on which much goes wrong, if it can be made to.
    fn open_rough(seed: u64, waker: &Waker) -> Option<Box<dyn Ring<Vec<u8>>>> {
        let _chance = seed;
        Self::open(16, waker)
    }
}

struct Uring;
struct Blocking;
#[cfg(feature = "sim")]
struct Sim;

impl Kind for Uring {
    fn open<B: Buffer>(capacity: usize, waker: &Waker) -> Option<Box<dyn Ring<B>>> {
        match KernelRing::new(capacity, waker.clone(), LONG) {
            Ok(ring) => Some(Box::new(ring)),
            Err(error) => {
                eprintln!("skipped: no io_uring here: {error}");
                None
            }
        }
    }
}

impl Kind for Blocking {
    fn open<B: Buffer>(capacity: usize, waker: &Waker) -> Option<Box<dyn Ring<B>>> {
        Some(Box::new(
            BlockingRing::new(capacity, waker.clone(), LONG).unwrap(),
        ))
    }
}

#[cfg(feature = "sim")]
impl Kind for Sim {
    fn open<B: Buffer>(capacity: usize, waker: &Waker) -> Option<Box<dyn Ring<B>>> {
        let config = SimConfig {
            seed: 7,
            capacity,
            delay: 20,
            reorder: true,
            ..SimConfig::default()
        };
        Some(Box::new(SimRing::new(config, waker.clone()).unwrap()))
    }

    fn open_rough(seed: u64, waker: &Waker) -> Option<Box<dyn Ring<Vec<u8>>>> {
        let config = SimConfig {
            seed,
            capacity: 16,
            short: 20,
            interrupt: 10,
            again: 10,
            delay: 20,
            reorder: true,
            plan: FaultPlan::new(),
            idle: None,
        };
        Some(Box::new(SimRing::new(config, waker.clone()).unwrap()))
    }
}

macro_rules! contract {
    ($($test:ident)*) => {
        contract! { uring Uring, $($test)* }
        contract! { blocking Blocking, $($test)* }
        #[cfg(feature = "sim")]
        contract! { sim Sim, $($test)* }
    };
    ($module:ident $kind:ident, $($test:ident)*) => {
        mod $module {
            $(
                #[test]
                fn $test() {
                    let _watchdog = super::Watchdog::new(stringify!($module), stringify!($test));
                    super::$test::<super::$kind>();
                }
            )*
        }
    };
}

contract! {
    a_buffer_and_its_file_come_back_with_the_completion
    a_token_in_flight_or_too_large_is_given_back
    a_full_ring_takes_no_more_until_one_is_reaped
    too_much_for_one_operation_is_given_back
    a_drained_ring_takes_nothing
    every_operation_moves_its_bytes
    a_poll_tells_what_is_ready
    a_chain_of_a_hundred_writes_keeps_its_order
    a_chain_of_a_hundred_reads_keeps_its_order
    an_open_chain_ends_where_it_is_submitted
    a_short_read_cancels_the_rest_and_the_position_is_exact
    a_short_vectored_read_cancels_the_rest
    a_linked_receive_goes_on_until_it_has_all
    a_short_linked_receive_cancels_the_rest
    an_unlinked_receive_takes_what_is_there
    the_end_of_the_data_cancels_the_rest
    an_empty_transfer_holds_the_chain
    an_error_cancels_the_rest
    a_broken_chain_leaves_the_next_one_alone
    a_write_that_nobody_will_read_is_an_error
    a_blocked_read_can_be_cancelled
    a_blocked_write_can_be_cancelled
    a_blocked_receive_can_be_cancelled
    a_blocked_send_can_be_cancelled
    a_poll_can_be_cancelled
    a_read_at_a_place_leaves_the_files_own_alone
    a_write_at_a_place_leaves_the_files_own_alone
    a_chain_of_writes_at_places_keeps_its_order
    a_place_beyond_every_file_is_refused
    cancelling_a_blocked_chain_ends_it_all
    cancelling_an_ended_operation_does_nothing
    cancelling_an_unknown_token_does_nothing
    a_cancellation_does_not_hit_the_tokens_next_operation
    an_operation_cancelled_before_its_submission_never_starts
    a_member_cancelled_before_its_submission_ends_the_chain_there
    a_member_of_a_started_chain_is_cancelled_when_its_turn_comes
    a_blocked_operation_delays_no_other
    a_wake_before_the_wait_ends_it
    a_wake_during_the_wait_ends_it
    many_wakes_are_one
    a_wake_is_told_beside_a_completion
    a_wait_ends_with_its_timeout
    a_wait_without_time_does_not_block
    a_completion_ends_a_wait
    a_dropped_ring_frees_what_was_blocked
    a_drain_counts_what_it_ends
    two_rings_are_independent
    a_ring_made_here_works_there
    a_ring_survives_the_thread_that_used_it
    a_file_closed_by_its_owner_stays_open_in_the_ring
    random_chains_arrive_in_order
    random_cancellations_lose_nothing
}

/// Ends the process, with the test's name, if the test does not end.
struct Watchdog {
    _ended: mpsc::Sender<()>,
}

impl Watchdog {
    fn new(ring: &'static str, test: &'static str) -> Self {
        let (ended, end) = mpsc::channel();
        thread::spawn(move || {
            if end.recv_timeout(2 * LONG) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("{ring}::{test} hangs");
                process::abort();
            }
        });
        Self { _ended: ended }
    }
}

// ---------------------------------------------------------------------------------------------
// What the tests are made of.

macro_rules! ring {
    ($kind:ty, $capacity:expr) => {
        match <$kind>::open::<Vec<u8>>($capacity, &Waker::new().unwrap()) {
            Some(ring) => ring,
            None => return,
        }
    };
}

fn pipe() -> (Fd, Fd) {
    let (reader, writer) = io::pipe().unwrap();
    (Arc::new(reader.into()), Arc::new(writer.into()))
}

fn sockets() -> (Fd, Fd) {
    let (one, other) = UnixStream::pair().unwrap();
    (Arc::new(one.into()), Arc::new(other.into()))
}

/// A second handle, for plain reads and writes by the test itself.
fn file(fd: &Fd) -> File {
    fd.try_clone().unwrap().into()
}

fn read(fd: &Fd, len: usize) -> Op<Vec<u8>> {
    Op::Read {
        fd: fd.clone(),
        buffer: vec![0; len],
    }
}

fn write(fd: &Fd, bytes: &[u8]) -> Op<Vec<u8>> {
    Op::Write {
        fd: fd.clone(),
        buffer: bytes.to_vec(),
    }
}

fn recv(fd: &Fd, len: usize) -> Op<Vec<u8>> {
    Op::Recv {
        fd: fd.clone(),
        buffer: vec![0; len],
    }
}

fn send(fd: &Fd, bytes: &[u8]) -> Op<Vec<u8>> {
    Op::Send {
        fd: fd.clone(),
        buffer: bytes.to_vec(),
    }
}

fn poll(fd: &Fd, events: i16) -> Op<Vec<u8>> {
    Op::Poll {
        fd: fd.clone(),
        events,
    }
}

fn read_at(fd: &Fd, offset: u64, len: usize) -> Op<Vec<u8>> {
    Op::ReadAt {
        fd: fd.clone(),
        offset,
        buffer: vec![0; len],
    }
}

fn write_at(fd: &Fd, offset: u64, bytes: &[u8]) -> Op<Vec<u8>> {
    Op::WriteAt {
        fd: fd.clone(),
        offset,
        buffer: bytes.to_vec(),
    }
}

fn memory(bytes: &[u8]) -> Fd {
    let memory = nix::sys::memfd::memfd_create(c"place", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
    let fd: Fd = Arc::new(memory.unwrap());
    file(&fd).write_all(bytes).unwrap();
    fd
}

/// All that a file has.
fn contents(fd: &Fd) -> Vec<u8> {
    let file = file(fd);
    let len = usize::try_from(file.metadata().unwrap().len()).unwrap();
    let mut bytes = vec![0; len];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
    bytes
}

/// Fills a pipe or a socket until a write would block.
fn fill(fd: &Fd) {
    let flags = nix::fcntl::OFlag::from_bits_retain(
        nix::fcntl::fcntl(fd.as_ref(), nix::fcntl::F_GETFL).unwrap(),
    );
    let nonblocking = flags | nix::fcntl::OFlag::O_NONBLOCK;
    nix::fcntl::fcntl(fd.as_ref(), nix::fcntl::F_SETFL(nonblocking)).unwrap();
    let mut file = file(fd);
    while file.write(&[0xff; 4096]).is_ok() {}
    nix::fcntl::fcntl(fd.as_ref(), nix::fcntl::F_SETFL(flags)).unwrap();
}

/// Pushes a chain, with tokens from `first` on.
fn push_chain<const N: usize>(ring: &mut dyn Ring<Vec<u8>>, first: u32, ops: [Op<Vec<u8>>; N]) {
    let last = ops.len() - 1;
    for ((index, op), token) in ops.into_iter().enumerate().zip(first..) {
        let link = if index == last { Link::End } else { Link::Next };
        ring.push(Token(token), op, link).unwrap();
    }
}

fn push(ring: &mut dyn Ring<Vec<u8>>, token: u32, op: Op<Vec<u8>>) {
    ring.push(Token(token), op, Link::End).unwrap();
}

/// Waits for the next completion.
fn next<B>(ring: &mut dyn Ring<B>) -> Completion<B> {
    loop {
        if let Some(completion) = ring.reap() {
            return completion;
        }
        ring.wait(None).unwrap();
    }
}

/// Waits for everything in flight.
fn all(ring: &mut dyn Ring<Vec<u8>>) -> BTreeMap<u32, Completion<Vec<u8>>> {
    let mut ended = BTreeMap::new();
    while ring.in_flight() > 0 {
        let completion = next(ring);
        let token = completion.token.0;
        assert!(ended.insert(token, completion).is_none());
    }
    ended
}

/// What came of an operation: the bytes moved, or the errno.
type Outcome = Result<usize, i32>;

fn outcome<B>(completion: &Completion<B>) -> Outcome {
    match &completion.result {
        Ok(moved) => Ok(*moved),
        Err(error) => Err(error.raw_os_error().unwrap()),
    }
}

fn outcomes(ended: &BTreeMap<u32, Completion<Vec<u8>>>) -> Vec<Outcome> {
    ended.values().map(outcome).collect()
}

fn buffer(completion: &Completion<Vec<u8>>) -> &[u8] {
    match &completion.op {
        Op::Read { buffer, .. }
        | Op::ReadAt { buffer, .. }
        | Op::Write { buffer, .. }
        | Op::WriteAt { buffer, .. }
        | Op::Recv { buffer, .. }
        | Op::Send { buffer, .. } => buffer,
        other => panic!("{other:?} has no single buffer"),
    }
}

const CANCELED: Outcome = Err(libc::ECANCELED);

/// Waits in vain: the operations in flight are blocked.
fn assert_blocked(ring: &mut dyn Ring<Vec<u8>>) {
    assert!(!ring.wait(Some(MOMENT)).unwrap());
    assert!(ring.reap().is_none());
}

// ---------------------------------------------------------------------------------------------
// Ownership.

fn a_buffer_and_its_file_come_back_with_the_completion<K: Kind>() {
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
}

fn a_token_in_flight_or_too_large_is_given_back<K: Kind>() {
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
}

fn a_full_ring_takes_no_more_until_one_is_reaped<K: Kind>() {
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
}

fn too_much_for_one_operation_is_given_back<K: Kind>() {
    let mut ring = ring!(K, 4);
    let (reader, _writer) = pipe();
    let buffers = vec![vec![0]; Op::<Vec<u8>>::MAX_VECTORS + 1];
    let op = Op::ReadVectored {
        fd: reader,
        buffers,
    };
    let _rejected = ring.push(Token(0), op, Link::End).unwrap_err();
    assert_eq!(ring.in_flight(), 0);
}

fn a_drained_ring_takes_nothing<K: Kind>() {
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
}

// ---------------------------------------------------------------------------------------------
// Operations.

fn every_operation_moves_its_bytes<K: Kind>() {
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
}

fn a_poll_tells_what_is_ready<K: Kind>() {
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
}

fn poll_bits(events: i16) -> usize {
    usize::try_from(events).unwrap()
}

// ---------------------------------------------------------------------------------------------
// Chains.

fn a_chain_of_a_hundred_writes_keeps_its_order<K: Kind>() {
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
}

fn a_chain_of_a_hundred_reads_keeps_its_order<K: Kind>() {
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
}

fn an_open_chain_ends_where_it_is_submitted<K: Kind>() {
    let mut ring = ring!(K, 4);
    let (reader, writer) = pipe();
    ring.push(Token(0), read(&reader, 1), Link::Next).unwrap();
    ring.submit().unwrap();
    push(&mut *ring, 1, write(&writer, b"x"));
    assert_eq!(outcomes(&all(&mut *ring)), [Ok(1), Ok(1)]);
}

fn a_short_read_cancels_the_rest_and_the_position_is_exact<K: Kind>() {
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
}

fn a_short_vectored_read_cancels_the_rest<K: Kind>() {
    let mut ring = ring!(K, 8);
    let (reader, writer) = pipe();
    file(&writer).write_all(b"0123456789").unwrap();
    let vectored = || Op::ReadVectored {
        fd: reader.clone(),
        buffers: vec![vec![0; 2], vec![0; 4]],
    };
    push_chain(&mut *ring, 0, [vectored(), vectored(), vectored()]);
    assert_eq!(outcomes(&all(&mut *ring)), [Ok(6), Ok(4), CANCELED]);
}

fn a_linked_receive_goes_on_until_it_has_all<K: Kind>() {
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
}

fn a_short_linked_receive_cancels_the_rest<K: Kind>() {
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
}

fn an_unlinked_receive_takes_what_is_there<K: Kind>() {
    let mut ring = ring!(K, 4);
    let (one, other) = sockets();
    push(&mut *ring, 0, recv(&one, 8));
    ring.submit().unwrap();
    file(&other).write_all(b"01234").unwrap();
    assert_eq!(outcomes(&all(&mut *ring)), [Ok(5)]);
}

fn the_end_of_the_data_cancels_the_rest<K: Kind>() {
    let mut ring = ring!(K, 4);
    let (reader, writer) = pipe();
    file(&writer).write_all(b"0123").unwrap();
    drop(writer);
    let reads = [4, 4, 4].map(|len| read(&reader, len));
    push_chain(&mut *ring, 0, reads);
    assert_eq!(outcomes(&all(&mut *ring)), [Ok(4), Ok(0), CANCELED]);
}

fn an_empty_transfer_holds_the_chain<K: Kind>() {
    let mut ring = ring!(K, 4);
    let (reader, writer) = pipe();
    push_chain(&mut *ring, 0, [write(&writer, b""), write(&writer, b"x")]);
    assert_eq!(outcomes(&all(&mut *ring)), [Ok(0), Ok(1)]);
    push_chain(&mut *ring, 0, [read(&reader, 0), read(&reader, 1)]);
    assert_eq!(outcomes(&all(&mut *ring)), [Ok(0), Ok(1)]);
}

fn an_error_cancels_the_rest<K: Kind>() {
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
}

fn a_broken_chain_leaves_the_next_one_alone<K: Kind>() {
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
}

fn a_write_that_nobody_will_read_is_an_error<K: Kind>() {
    let mut ring = ring!(K, 4);
    let (reader, writer) = pipe();
    drop(reader);
    push(&mut *ring, 0, write(&writer, b"x"));
    assert_eq!(outcomes(&all(&mut *ring)), [Err(libc::EPIPE)]);
    let (one, other) = sockets();
    drop(other);
    push(&mut *ring, 0, send(&one, b"x"));
    assert_eq!(outcomes(&all(&mut *ring)), [Err(libc::EPIPE)]);
}

// ---------------------------------------------------------------------------------------------
// Cancellation.

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

fn a_blocked_read_can_be_cancelled<K: Kind>() {
    let (reader, writer) = pipe();
    cancelled_while_blocked::<K>(read(&reader, 8));
    file(&writer).write_all(b"x").unwrap();
    assert_eq!(file(&reader).read(&mut [0; 8]).unwrap(), 1);
}

fn a_blocked_write_can_be_cancelled<K: Kind>() {
    let (_reader, writer) = pipe();
    fill(&writer);
    cancelled_while_blocked::<K>(write(&writer, &[1; 100_000]));
}

fn a_blocked_receive_can_be_cancelled<K: Kind>() {
    let (one, _other) = sockets();
    cancelled_while_blocked::<K>(recv(&one, 8));
    cancelled_while_blocked::<K>(read(&one, 8));
}

fn a_blocked_send_can_be_cancelled<K: Kind>() {
    let (one, _other) = sockets();
    fill(&one);
    cancelled_while_blocked::<K>(send(&one, &[1; 100_000]));
}

fn a_poll_can_be_cancelled<K: Kind>() {
    let (reader, _writer) = pipe();
    cancelled_while_blocked::<K>(poll(&reader, libc::POLLIN));
}

fn cancelling_a_blocked_chain_ends_it_all<K: Kind>() {
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
}

fn cancelling_an_ended_operation_does_nothing<K: Kind>() {
    let mut ring = ring!(K, 4);
    let (_reader, writer) = pipe();
    push(&mut *ring, 0, write(&writer, b"x"));
    ring.wait(None).unwrap();
    ring.cancel(Token(0));
    ring.submit().unwrap();
    assert_eq!(outcomes(&all(&mut *ring)), [Ok(1)]);
    ring.cancel(Token(0));
    assert_blocked(&mut *ring);
}

fn cancelling_an_unknown_token_does_nothing<K: Kind>() {
    let mut ring = ring!(K, 4);
    for token in [0, 3, 4, u32::MAX] {
        ring.cancel(Token(token));
    }
    assert_blocked(&mut *ring);
}

fn a_cancellation_does_not_hit_the_tokens_next_operation<K: Kind>() {
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
}

fn an_operation_cancelled_before_its_submission_never_starts<K: Kind>() {
    let mut ring = ring!(K, 4);
    let (reader, writer) = pipe();
    for _ in 0..20 {
        push(&mut *ring, 0, write(&writer, b"x"));
        ring.cancel(Token(0));
        assert_eq!(outcomes(&all(&mut *ring)), [CANCELED]);
    }
    drop((ring, writer));
    assert_eq!(file(&reader).read(&mut [0; 8]).unwrap(), 0);
}

fn a_member_cancelled_before_its_submission_ends_the_chain_there<K: Kind>() {
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

fn a_member_of_a_started_chain_is_cancelled_when_its_turn_comes<K: Kind>() {
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

fn a_blocked_operation_delays_no_other<K: Kind>() {
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
}

// ---------------------------------------------------------------------------------------------
// Waiting.

fn a_wake_before_the_wait_ends_it<K: Kind>() {
    let waker = Waker::new().unwrap();
    let Some(mut ring) = K::open::<Vec<u8>>(4, &waker) else {
        return;
    };
    for _ in 0..10 {
        waker.wake();
        assert!(ring.wait(None).unwrap());
        assert_blocked(&mut *ring);
    }
}

fn a_wake_during_the_wait_ends_it<K: Kind>() {
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
}

fn many_wakes_are_one<K: Kind>() {
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
}

fn a_wake_is_told_beside_a_completion<K: Kind>() {
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
}

fn a_wait_ends_with_its_timeout<K: Kind>() {
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
}

fn a_wait_without_time_does_not_block<K: Kind>() {
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
}

fn a_completion_ends_a_wait<K: Kind>() {
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
}

// ---------------------------------------------------------------------------------------------
// Going away.

/// Counts its drops.
struct Counted {
    bytes: Vec<u8>,
    drops: Arc<AtomicUsize>,
}

impl Counted {
    fn new(drops: &Arc<AtomicUsize>) -> Self {
        Self {
            bytes: vec![0; 16],
            drops: drops.clone(),
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        // Relaxed: a count that is read when the thread that dropped has been joined, or by it.
        self.drops.fetch_add(1, Relaxed);
    }
}

// SAFETY: the vector's heap block does not move with it, and the vector is its only owner.
unsafe impl Buffer for Counted {
    fn as_mut_ptr(&mut self) -> *mut u8 {
        self.bytes.as_mut_ptr()
    }

    fn len(&self) -> usize {
        self.bytes.len()
    }
}

fn counted_read(fd: &Fd, drops: &Arc<AtomicUsize>) -> Op<Counted> {
    Op::Read {
        fd: fd.clone(),
        buffer: Counted::new(drops),
    }
}

fn a_read_at_a_place_leaves_the_files_own_alone<K: Kind>() {
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
}

fn a_write_at_a_place_leaves_the_files_own_alone<K: Kind>() {
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
}

/// Each lies on top of a part of the one before.
fn a_chain_of_writes_at_places_keeps_its_order<K: Kind>() {
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
}

fn a_place_beyond_every_file_is_refused<K: Kind>() {
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
}

fn a_dropped_ring_frees_what_was_blocked<K: Kind>() {
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
}

fn a_drain_counts_what_it_ends<K: Kind>() {
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
}

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
    let _watchdog = Watchdog::new("blocking", "leak");
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

// ---------------------------------------------------------------------------------------------
// Threads and files.

fn two_rings_are_independent<K: Kind>() {
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
}

fn a_ring_made_here_works_there<K: Kind>() {
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
}

fn a_ring_survives_the_thread_that_used_it<K: Kind>() {
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
}

fn a_file_closed_by_its_owner_stays_open_in_the_ring<K: Kind>() {
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
}

// ---------------------------------------------------------------------------------------------
// Stress.

/// A small generator, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 16).unwrap() % end
    }
}

/// The byte at a position of every test stream. Its period is prime, so that a shift shows.
fn pattern(position: usize) -> u8 {
    u8::try_from(position % 251).unwrap()
}

/// A stream into a pipe: one chain in flight, resubmitted from where it broke.
struct Lane {
    writer: Option<Fd>,
    /// Bytes that the pipe has taken.
    position: usize,
    len: usize,
    first_token: u32,
    /// What is in flight, and what came of it so far.
    chain: Vec<Option<Outcome>>,
    reader: Option<thread::JoinHandle<()>>,
}

impl Lane {
    const DEPTH: usize = 5;

    fn new(index: u32, len: usize) -> Self {
        let (mut reader, writer) = io::pipe().unwrap();
        let reader = thread::spawn(move || {
            let mut bytes = vec![0; 10_000];
            let mut position = 0;
            loop {
                let count = reader.read(&mut bytes).unwrap();
                if count == 0 {
                    break;
                }
                for byte in &bytes[..count] {
                    assert_eq!(*byte, pattern(position), "at {position}");
                    position += 1;
                }
            }
            assert_eq!(position, len);
        });
        Self {
            writer: Some(Arc::new(writer.into())),
            position: 0,
            len,
            first_token: index * u32::try_from(Self::DEPTH).unwrap(),
            chain: Vec::new(),
            reader: Some(reader),
        }
    }

    fn push(&mut self, ring: &mut dyn Ring<Vec<u8>>, random: &mut Random) {
        let writer = self.writer.as_ref().unwrap();
        let count = 1 + random.below(Self::DEPTH);
        let mut start = self.position;
        for (index, token) in (0..count).zip(self.first_token..) {
            let end = self.len.min(start + 1 + random.below(9000));
            let bytes: Vec<u8> = (start..end).map(pattern).collect();
            let last = index + 1 == count || end == self.len;
            let link = if last { Link::End } else { Link::Next };
            let op = if bytes.len() > 2 && random.below(3) == 0 {
                let (head, tail) = bytes.split_at(random.below(bytes.len()));
                Op::WriteVectored {
                    fd: writer.clone(),
                    buffers: vec![head.to_vec(), tail.to_vec()],
                }
            } else {
                write(writer, &bytes)
            };
            ring.push(Token(token), op, link).unwrap();
            self.chain.push(None);
            start = end;
            if last {
                break;
            }
        }
    }

    fn complete(&mut self, completion: &Completion<Vec<u8>>) {
        let index = usize::try_from(completion.token.0 - self.first_token).unwrap();
        let full = completion.op.requested();
        let end = outcome(completion);
        if let Ok(moved) = end {
            // Nothing moves behind a short one.
            for before in &self.chain[..index] {
                assert!(before.as_ref().unwrap().is_ok());
            }
            self.position += moved;
            assert!(moved > 0 && moved <= full);
        } else {
            let errno = end.unwrap_err();
            assert!([libc::ECANCELED, libc::EINTR, libc::EAGAIN].contains(&errno));
        }
        assert!(self.chain[index].replace(end).is_none());
    }

    /// Starts the next chain when the last one is over. False when the stream is at its end.
    fn go_on(&mut self, ring: &mut dyn Ring<Vec<u8>>, random: &mut Random) -> bool {
        if self.chain.iter().all(Option::is_some) {
            self.chain.clear();
            if self.position < self.len {
                self.push(ring, random);
            } else {
                self.writer = None;
            }
        }
        self.writer.is_some()
    }
}

fn random_chains_arrive_in_order<K: Kind>() {
    for seed in 1..=12 {
        let Some(mut ring) = K::open_rough(seed, &Waker::new().unwrap()) else {
            return;
        };
        let mut random = Random(seed);
        let mut lanes: Vec<Lane> = (0..3)
            .map(|index| Lane::new(index, 200_000 + random.below(50_000)))
            .collect();
        loop {
            let mut open = false;
            for lane in &mut lanes {
                open |= lane.go_on(&mut *ring, &mut random);
            }
            if !open {
                break;
            }
            if random.below(2) == 0 {
                ring.submit().unwrap();
            }
            let completion = next(&mut *ring);
            let lane = usize::try_from(completion.token.0).unwrap() / Lane::DEPTH;
            lanes[lane].complete(&completion);
        }
        for lane in lanes {
            lane.reader.unwrap().join().unwrap();
        }
    }
}

/// Operations on pipes of which some never end, cancelled at random: each completes once, and what
/// was read is what was written.
fn random_cancellations_lose_nothing<K: Kind>() {
    for seed in 1..=6 {
        let waker = Waker::new().unwrap();
        let Some(mut ring) = K::open_rough(seed, &waker) else {
            return;
        };
        let mut random = Random(seed);
        let (reader, writer) = pipe();
        let (mut sent, mut received) = (0, 0);
        let mut free: Vec<u32> = (0..16).collect();
        for _ in 0..500 {
            if !free.is_empty() && random.below(3) > 0 {
                let token = free.swap_remove(random.below(free.len()));
                // One byte each: no transfer can be short.
                push(&mut *ring, token, read(&reader, 1));
            }
            if random.below(3) == 0 {
                file(&writer).write_all(b"x").unwrap();
                sent += 1;
            }
            if random.below(3) == 0 {
                ring.cancel(Token(u32::try_from(random.below(16)).unwrap()));
            }
            match random.below(4) {
                0 => ring.submit().unwrap(),
                1 => {
                    waker.wake();
                    while !ring.wait(None).unwrap() && ring.in_flight() == 0 {}
                }
                2 => assert!(!ring.wait(Some(Duration::ZERO)).unwrap() || ring.in_flight() < 17),
                _ => {}
            }
            while let Some(completion) = ring.reap() {
                match outcome(&completion) {
                    Ok(moved) => received += moved,
                    Err(errno) => {
                        assert!([libc::ECANCELED, libc::EINTR, libc::EAGAIN].contains(&errno));
                    }
                }
                assert!(!free.contains(&completion.token.0));
                free.push(completion.token.0);
            }
            assert_eq!(ring.in_flight() + free.len(), 16);
        }
        for token in 0..16 {
            ring.cancel(Token(token));
        }
        for completion in all(&mut *ring).values() {
            received += outcome(completion).unwrap_or(0);
        }
        drop((ring, writer));
        let mut rest = Vec::new();
        file(&reader).read_to_end(&mut rest).unwrap();
        assert_eq!(received + rest.len(), sent);
    }
}

// ---------------------------------------------------------------------------------------------
// Which ring.

#[test]
fn a_forced_backend_is_the_one_that_is_opened() {
    let (ring, chosen) =
        open::<Vec<u8>>(Backend::Blocking, 4, Waker::new().unwrap(), LONG).unwrap();
    assert_eq!((ring.capacity(), chosen), (4, Backend::Blocking));
    let (_ring, chosen) = open::<Vec<u8>>(Backend::Auto, 4, Waker::new().unwrap(), LONG).unwrap();
    assert_ne!(chosen, Backend::Auto);
}

#[test]
fn a_capacity_out_of_bounds_is_an_error_for_every_backend() {
    for backend in [Backend::Auto, Backend::Uring, Backend::Blocking] {
        for capacity in [0, vfio_migration_uring::MAX_CAPACITY + 1] {
            let error = open::<Vec<u8>>(backend, capacity, Waker::new().unwrap(), LONG)
                .err()
                .unwrap();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }
}

// ---------------------------------------------------------------------------------------------
// What only a simulation can do.

#[cfg(feature = "sim")]
mod faults {
    use super::*;

    fn ring<B: Buffer>(config: SimConfig) -> SimRing<B> {
        SimRing::new(config, Waker::new().unwrap()).unwrap()
    }

    fn config(plan: FaultPlan) -> SimConfig {
        SimConfig {
            plan,
            ..SimConfig::default()
        }
    }

    /// Order, results and the plan's count of a run that depends on nothing but the seed.
    fn run(seed: u64) -> (Vec<(Token, Outcome)>, u64) {
        let plan = FaultPlan::new();
        let mut ring = ring(SimConfig {
            seed,
            short: 30,
            interrupt: 10,
            again: 10,
            delay: 30,
            reorder: true,
            plan: plan.clone(),
            ..SimConfig::default()
        });
        let pipes: Vec<_> = (0..4).map(|_| pipe()).collect();
        for (first, (_, writer)) in (0..).step_by(4).zip(&pipes) {
            push_chain(&mut ring, first, [(); 4].map(|()| write(writer, &[1; 100])));
        }
        let mut order = Vec::new();
        while ring.in_flight() > 0 {
            let completion = next(&mut ring);
            order.push((completion.token, outcome(&completion)));
        }
        (order, plan.executed())
    }

    #[test]
    fn a_seed_decides_everything() {
        for seed in 0..20 {
            assert_eq!(run(seed), run(seed));
        }
        assert!((1..20).any(|seed| run(seed) != run(0)));
    }

    #[test]
    fn the_planned_operation_fails_and_no_other() {
        for number in 0..6 {
            let plan = FaultPlan::new().with(number, Fault::Errno(libc::EIO));
            let mut ring = ring(config(plan.clone()));
            let (_reader, writer) = pipe();
            for token in 0..6 {
                push(&mut ring, token, write(&writer, b"x"));
            }
            let mut expected = [Ok(1); 6];
            expected[usize::try_from(number).unwrap()] = Err(libc::EIO);
            assert_eq!(outcomes(&all(&mut ring)), expected);
            assert_eq!(plan.executed(), 6);
        }
    }

    #[test]
    fn what_a_chain_cancels_has_no_number() {
        let plan = FaultPlan::new().with(1, Fault::Short(2));
        let mut ring = ring(config(plan.clone()));
        let (_reader, writer) = pipe();
        push_chain(&mut ring, 0, [(); 3].map(|()| write(&writer, b"xyz")));
        assert_eq!(outcomes(&all(&mut ring)), [Ok(3), Ok(2), CANCELED]);
        assert_eq!(plan.executed(), 2);
    }

    #[test]
    fn what_hangs_ends_when_it_is_cancelled() {
        let plan = FaultPlan::new().with(0, Fault::Hang);
        let mut ring = ring(config(plan));
        let (_reader, writer) = pipe();
        push_chain(&mut ring, 0, [write(&writer, b"x"), write(&writer, b"y")]);
        assert_blocked(&mut ring);
        ring.cancel(Token(0));
        assert_eq!(outcomes(&all(&mut ring)), [CANCELED, CANCELED]);
    }

    #[test]
    fn a_drain_leaks_what_never_ends() {
        let plan = FaultPlan::new().with(0, Fault::Stick).with(1, Fault::Hang);
        let mut ring: SimRing<Counted> = ring(config(plan));
        let drops = Arc::new(AtomicUsize::new(0));
        let (reader, writer) = pipe();
        file(&writer).write_all(b"x").unwrap();
        for (token, link) in (0..).zip([Link::Next, Link::End, Link::End, Link::End]) {
            ring.push(Token(token), counted_read(&reader, &drops), link)
                .unwrap();
        }
        ring.wait(Some(MOMENT)).unwrap();
        ring.wait(Some(MOMENT)).unwrap();
        ring.cancel(Token(0));
        let drained = ring.drain(LONG);
        assert_eq!(drained.leaked, 2);
        drop(ring);
        // The stuck one and the one behind it are never freed, nor is their file closed.
        assert_eq!(drops.load(Relaxed), 2);
        assert_eq!(Arc::strong_count(&reader), 3);
    }
}
