//! What the tests are made of: files, operations, and what comes of them.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Write},
    os::unix::net::UnixStream,
    sync::Arc,
};

use vfio_migration_uring::{Completion, Fd, Link, Op, Ring, Token};

use crate::MOMENT;

pub fn pipe() -> (Fd, Fd) {
    let (reader, writer) = io::pipe().unwrap();
    (Arc::new(reader.into()), Arc::new(writer.into()))
}

pub fn sockets() -> (Fd, Fd) {
    let (one, other) = UnixStream::pair().unwrap();
    (Arc::new(one.into()), Arc::new(other.into()))
}

/// A second handle, for plain reads and writes by the test itself.
pub fn file(fd: &Fd) -> File {
    fd.try_clone().unwrap().into()
}

pub fn read(fd: &Fd, len: usize) -> Op<Vec<u8>> {
    Op::Read {
        fd: fd.clone(),
        buffer: vec![0; len],
    }
}

pub fn write(fd: &Fd, bytes: &[u8]) -> Op<Vec<u8>> {
    Op::Write {
        fd: fd.clone(),
        buffer: bytes.to_vec(),
    }
}

pub fn recv(fd: &Fd, len: usize) -> Op<Vec<u8>> {
    Op::Recv {
        fd: fd.clone(),
        buffer: vec![0; len],
    }
}

pub fn send(fd: &Fd, bytes: &[u8]) -> Op<Vec<u8>> {
    Op::Send {
        fd: fd.clone(),
        buffer: bytes.to_vec(),
    }
}

pub fn poll(fd: &Fd, events: i16) -> Op<Vec<u8>> {
    Op::Poll {
        fd: fd.clone(),
        events,
    }
}

pub fn read_at(fd: &Fd, offset: u64, len: usize) -> Op<Vec<u8>> {
    Op::ReadAt {
        fd: fd.clone(),
        offset,
        buffer: vec![0; len],
    }
}

pub fn write_at(fd: &Fd, offset: u64, bytes: &[u8]) -> Op<Vec<u8>> {
    Op::WriteAt {
        fd: fd.clone(),
        offset,
        buffer: bytes.to_vec(),
    }
}

pub fn memory(bytes: &[u8]) -> Fd {
    let memory = nix::sys::memfd::memfd_create(c"place", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
    let fd: Fd = Arc::new(memory.unwrap());
    file(&fd).write_all(bytes).unwrap();
    fd
}

/// All that a file has.
pub fn contents(fd: &Fd) -> Vec<u8> {
    let file = file(fd);
    let len = usize::try_from(file.metadata().unwrap().len()).unwrap();
    let mut bytes = vec![0; len];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
    bytes
}

/// Fills a pipe or a socket until a write would block.
pub fn fill(fd: &Fd) {
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
pub fn push_chain<const N: usize>(ring: &mut dyn Ring<Vec<u8>>, first: u32, ops: [Op<Vec<u8>>; N]) {
    let last = ops.len() - 1;
    for ((index, op), token) in ops.into_iter().enumerate().zip(first..) {
        let link = if index == last { Link::End } else { Link::Next };
        ring.push(Token(token), op, link).unwrap();
    }
}

pub fn push(ring: &mut dyn Ring<Vec<u8>>, token: u32, op: Op<Vec<u8>>) {
    ring.push(Token(token), op, Link::End).unwrap();
}

/// Waits for the next completion.
pub fn next<B>(ring: &mut dyn Ring<B>) -> Completion<B> {
    loop {
        if let Some(completion) = ring.reap() {
            return completion;
        }
        ring.wait(None).unwrap();
    }
}

/// Waits for everything in flight.
pub fn all(ring: &mut dyn Ring<Vec<u8>>) -> BTreeMap<u32, Completion<Vec<u8>>> {
    let mut ended = BTreeMap::new();
    while ring.in_flight() > 0 {
        let completion = next(ring);
        let token = completion.token.0;
        assert!(ended.insert(token, completion).is_none());
    }
    ended
}

/// What came of an operation: the bytes moved, or the errno.
pub type Outcome = Result<usize, i32>;

pub fn outcome<B>(completion: &Completion<B>) -> Outcome {
    match &completion.result {
        Ok(moved) => Ok(*moved),
        Err(error) => Err(error.raw_os_error().unwrap()),
    }
}

pub fn outcomes(ended: &BTreeMap<u32, Completion<Vec<u8>>>) -> Vec<Outcome> {
    ended.values().map(outcome).collect()
}

pub fn buffer(completion: &Completion<Vec<u8>>) -> &[u8] {
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

pub const CANCELED: Outcome = Err(libc::ECANCELED);

/// Waits in vain: the operations in flight are blocked.
pub fn assert_blocked(ring: &mut dyn Ring<Vec<u8>>) {
    assert!(!ring.wait(Some(MOMENT)).unwrap());
    assert!(ring.reap().is_none());
}
