//! Operations by plain system calls, a step at a time. The blocking ring's workers and the simulation share
//! this module, and make no other raw calls.
//!
//! ```text
//!             poll says ready
//!   Progress ─────────────────▶ step() ──▶ Ended(result)
//!      ▲                          │
//!      └──────── NotYet ──────────┘
//! ```
//!
//! The caller first polls for [`wanted`] events and steps only when some are there, so the caller can end
//! every wait. Then a step does not block. If another thread has meanwhile taken a pipe's or a socket's
//! bytes or room, the step asks only for what is there at once. If a driver reports that it is ready and
//! then blocks in its read or write, nothing better can be asked; the step takes as long as the driver
//! does.
#![expect(unsafe_code, reason = "system calls on a buffer's raw memory")]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, RawFd},
    ptr, slice,
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::stat::{SFlag, fstat},
};

use crate::{Buffer, Link, Op};

/// What fits into a pipe that says it is writable: a page, and none is smaller. For kernels that
/// cannot write to a pipe without waiting (before Linux 6.5).
const PIECE: usize = 4096;

/// How far an operation has come.
#[derive(Debug)]
pub(crate) struct Progress {
    /// Bytes moved so far.
    moved: usize,
    /// Where to stop: what was requested, or less to cut it short.
    limit: usize,
    /// Whether it reads from or writes to a pipe or a socket, which others may use too.
    shared: bool,
    /// Whether a receive or a send goes on until all is moved.
    all: bool,
}

/// What a [`Progress::step`] came to.
#[derive(Debug)]
#[must_use = "an operation that has not ended must be polled for and stepped again"]
pub(crate) enum Step {
    /// The operation is over.
    Ended(io::Result<usize>),
    /// Poll again, then step again.
    NotYet,
}

impl Progress {
    /// Starts `op`, which will move `limit` bytes at most.
    pub(crate) fn new<B: Buffer>(op: &Op<B>, link: Link, limit: usize) -> Self {
        let shared = match op {
            Op::Read { fd, .. }
            | Op::ReadVectored { fd, .. }
            | Op::Write { fd, .. }
            | Op::WriteVectored { fd, .. } => {
                matches!(kind(fd), Some(SFlag::S_IFIFO | SFlag::S_IFSOCK))
            }
            Op::ReadAt { .. }
            | Op::WriteAt { .. }
            | Op::Recv { .. }
            | Op::Send { .. }
            | Op::Poll { .. } => false,
        };
        Self {
            moved: 0,
            limit: limit.min(op.requested()),
            shared,
            all: link == Link::Next,
        }
    }

    /// Does what can be done now, when `poll(2)` has just said `revents`.
    pub(crate) fn step<B: Buffer>(&mut self, op: &mut Op<B>, revents: i16) -> Step {
        let (start, end) = (self.moved, self.limit);
        match op {
            Op::Poll { .. } => Step::Ended(Ok(usize::from(revents.cast_unsigned()))),
            Op::Recv { .. } | Op::Send { .. } => self.advance(transfer(op, start, end), self.all),
            _ if !self.shared => Step::Ended(transfer(op, start, end)),
            Op::Read { .. } | Op::ReadAt { .. } | Op::ReadVectored { .. } => {
                let moved = transfer_at_once(op, start, end)
                    .unwrap_or_else(|Unsupported| transfer(op, start, end));
                self.advance(moved, false)
            }
            // As a write that waits would, this one goes on until all is written.
            Op::Write { .. } | Op::WriteAt { .. } | Op::WriteVectored { .. } => {
                let moved = transfer_at_once(op, start, end)
                    .unwrap_or_else(|Unsupported| transfer(op, start, end.min(start + PIECE)));
                self.advance(moved, true)
            }
        }
    }

    /// The result of an operation that is stopped here: what it has moved, if it has moved any.
    pub(crate) fn cancelled(&self) -> io::Result<usize> {
        self.ended_by(canceled())
    }

    /// Whether an operation that ends with `moved` bytes was cut short, and not by the end of a file.
    #[cfg(feature = "sim")]
    pub(crate) fn is_cut<B: Buffer>(&self, op: &Op<B>, moved: usize) -> bool {
        let writes = matches!(op, Op::Write { .. } | Op::WriteVectored { .. });
        moved > 0 && moved < op.requested() && (writes || moved == self.limit)
    }

    fn ended_by(&self, error: io::Error) -> io::Result<usize> {
        match self.moved {
            0 => Err(error),
            moved => Ok(moved),
        }
    }

    /// Counts what a piece of the operation moved; `all` says whether more pieces follow.
    fn advance(&mut self, moved: io::Result<usize>, all: bool) -> Step {
        match moved {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Step::NotYet,
            Err(error) => Step::Ended(self.ended_by(error)),
            Ok(moved) => {
                self.moved += moved;
                if moved == 0 || !all || self.moved == self.limit {
                    Step::Ended(Ok(self.moved))
                } else {
                    Step::NotYet
                }
            }
        }
    }
}

/// The events to poll for before an operation's next step.
pub(crate) const fn wanted<B>(op: &Op<B>) -> i16 {
    match op {
        Op::Read { .. } | Op::ReadAt { .. } | Op::ReadVectored { .. } | Op::Recv { .. } => {
            libc::POLLIN
        }
        Op::Write { .. } | Op::WriteAt { .. } | Op::WriteVectored { .. } | Op::Send { .. } => {
            libc::POLLOUT
        }
        Op::Poll { events, .. } => *events,
    }
}

/// An entry for [`poll`].
pub(crate) const fn entry(fd: RawFd, events: i16) -> libc::pollfd {
    libc::pollfd {
        fd,
        events,
        revents: 0,
    }
}

/// Waits until one of `entries` is ready, `timeout` has passed or a signal has come. Callers loop:
/// they know their deadlines.
pub(crate) fn poll(entries: &mut [libc::pollfd], timeout: Option<Duration>) -> io::Result<()> {
    let count = libc::nfds_t::try_from(entries.len()).expect("a slice has fewer than 2^63 entries");
    let timeout = timeout.map(|timeout| libc::timespec {
        // Longer than this machine will run; the caller looks at its clock and polls again.
        tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    });
    let timeout = timeout.as_ref().map_or(ptr::null(), ptr::from_ref);
    // SAFETY: `entries` is borrowed for the call and `count` long; `timeout` is null or points to
    // a local that outlives the call; a null mask changes none.
    let ready = unsafe { libc::ppoll(entries.as_mut_ptr(), count, timeout, ptr::null()) };
    if ready >= 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::Interrupted => {
            // The kernel leaves the entries as they were, but says so nowhere.
            entries.iter_mut().for_each(|entry| entry.revents = 0);
            Ok(())
        }
        error => Err(error),
    }
}

/// Has all threads share one heap, where the process may map only so much (`RLIMIT_AS`): glibc takes
/// 64 MiB of addresses for a heap, and makes up to eight for each processor. To be called before there is
/// a second thread; without effect where there is no such limit, or another C library.
pub fn share_heap() {
    let mut limit = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: `limit` is a local that outlives the call.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_AS, &raw mut limit) } == 0;
    if known && limit.rlim_cur != libc::RLIM_INFINITY {
        #[cfg(target_env = "gnu")]
        // SAFETY: sets a number of the allocator's, under its own lock.
        let _set = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    }
}

/// Whether `len` bytes of memory can be had: maps them, and unmaps them again. None is touched.
///
/// # Errors
///
/// What mmap(2) says: `ENOMEM` for more than a limit allows, or the host will commit to.
pub fn has_room(len: usize) -> io::Result<()> {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping, wherever the kernel likes, touches no memory of ours.
    let mapping = unsafe { libc::mmap(ptr::null_mut(), len, access, flags, -1, 0) };
    if mapping == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was mapped just now, all of it, and nothing refers to it.
    if unsafe { libc::munmap(mapping, len) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The result of an operation that was cancelled before it moved a byte.
pub(crate) fn canceled() -> io::Error {
    io::Error::from_raw_os_error(libc::ECANCELED)
}

/// Whether the file will refuse the operation at once, whatever `poll(2)` is still waiting for: the
/// end of a pipe that one writes to never becomes readable. For those that poll did not find ready.
pub(crate) fn is_refused<B>(op: &Op<B>) -> bool {
    let wrong = match op {
        Op::Read { .. } | Op::ReadAt { .. } | Op::ReadVectored { .. } => OFlag::O_WRONLY,
        Op::Write { .. } | Op::WriteAt { .. } | Op::WriteVectored { .. } => OFlag::O_RDONLY,
        Op::Recv { fd, .. } | Op::Send { fd, .. } => return kind(fd) != Some(SFlag::S_IFSOCK),
        Op::Poll { .. } => return false,
    };
    fcntl(op.fd(), FcntlArg::F_GETFL)
        .is_ok_and(|flags| OFlag::from_bits_retain(flags) & OFlag::O_ACCMODE == wrong)
}

/// What kind of file it is.
pub(crate) fn kind(fd: impl AsFd) -> Option<SFlag> {
    let stat = fstat(fd).ok()?;
    Some(SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT)
}

/// Moves the bytes from `start` to `end` of an operation's buffers, counted across all of them,
/// with one system call. Sockets are not waited for.
fn transfer<B: Buffer>(op: &mut Op<B>, start: usize, end: usize) -> io::Result<usize> {
    let moved = match op {
        Op::Read { fd, buffer } => {
            let (bytes, len) = part(buffer, start, end);
            // SAFETY: `bytes` and `len` are within the buffer, which `op` owns and nobody else
            // touches, as `Buffer` promises.
            unsafe { libc::read(fd.as_raw_fd(), bytes.cast(), len) }
        }
        Op::ReadAt { fd, offset, buffer } => {
            let (bytes, len) = part(buffer, start, end);
            let at = place(*offset, start)?;
            // SAFETY: as for the read above.
            unsafe { libc::pread(fd.as_raw_fd(), bytes.cast(), len, at) }
        }
        Op::Write { fd, buffer } => {
            let (bytes, len) = part(buffer, start, end);
            // SAFETY: as for the read above.
            unsafe { libc::write(fd.as_raw_fd(), bytes.cast(), len) }
        }
        Op::WriteAt { fd, offset, buffer } => {
            let (bytes, len) = part(buffer, start, end);
            let at = place(*offset, start)?;
            // SAFETY: as for the read above.
            unsafe { libc::pwrite(fd.as_raw_fd(), bytes.cast(), len, at) }
        }
        Op::Recv { fd, buffer } => {
            let (bytes, len) = part(buffer, start, end);
            // SAFETY: as for the read above.
            unsafe { libc::recv(fd.as_raw_fd(), bytes.cast(), len, libc::MSG_DONTWAIT) }
        }
        Op::Send { fd, buffer } => {
            let (bytes, len) = part(buffer, start, end);
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            // SAFETY: as for the read above.
            unsafe { libc::send(fd.as_raw_fd(), bytes.cast(), len, flags) }
        }
        Op::ReadVectored { fd, buffers } => {
            let (vectors, count) = parts(buffers, start, end);
            // SAFETY: `vectors` holds `count` entries and outlives the call; each is within a
            // buffer that `op` owns and nobody else touches, as `Buffer` promises.
            unsafe { libc::readv(fd.as_raw_fd(), vectors.as_ptr(), count) }
        }
        Op::WriteVectored { fd, buffers } => {
            let (vectors, count) = parts(buffers, start, end);
            // SAFETY: as for the vectored read above.
            unsafe { libc::writev(fd.as_raw_fd(), vectors.as_ptr(), count) }
        }
        Op::Poll { .. } => return Ok(0),
    };
    usize::try_from(moved).map_err(|_negative| io::Error::last_os_error())
}

/// This kernel or this file cannot do it.
struct Unsupported;

/// [`transfer`] of what can be moved at once, by a read or a write.
fn transfer_at_once<B: Buffer>(
    op: &mut Op<B>,
    start: usize,
    end: usize,
) -> Result<io::Result<usize>, Unsupported> {
    let moved = match op {
        Op::Read { fd, .. } | Op::ReadVectored { fd, .. } => {
            let fd = fd.as_raw_fd();
            let (vectors, count) = parts(buffers(op), start, end);
            // SAFETY: as for the vectored read of `transfer`.
            unsafe { libc::preadv2(fd, vectors.as_ptr(), count, -1, libc::RWF_NOWAIT) }
        }
        Op::Write { fd, .. } | Op::WriteVectored { fd, .. } => {
            let fd = fd.as_raw_fd();
            let (vectors, count) = parts(buffers(op), start, end);
            // SAFETY: as for the vectored read of `transfer`.
            unsafe { libc::pwritev2(fd, vectors.as_ptr(), count, -1, libc::RWF_NOWAIT) }
        }
        Op::ReadAt { .. }
        | Op::WriteAt { .. }
        | Op::Recv { .. }
        | Op::Send { .. }
        | Op::Poll { .. } => return Err(Unsupported),
    };
    match usize::try_from(moved).map_err(|_negative| io::Error::last_os_error()) {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Err(Unsupported),
        moved => Ok(moved),
    }
}

/// An operation's buffers, be they one.
fn buffers<B: Buffer>(op: &mut Op<B>) -> &mut [B] {
    match op {
        Op::Read { buffer, .. }
        | Op::ReadAt { buffer, .. }
        | Op::Write { buffer, .. }
        | Op::WriteAt { buffer, .. }
        | Op::Recv { buffer, .. }
        | Op::Send { buffer, .. } => slice::from_mut(buffer),
        Op::ReadVectored { buffers, .. } | Op::WriteVectored { buffers, .. } => buffers,
        Op::Poll { .. } => &mut [],
    }
}

/// Where in a file an operation goes on that has moved `moved` bytes.
fn place(offset: u64, moved: usize) -> io::Result<libc::off_t> {
    let at = offset.saturating_add(moved as u64);
    libc::off_t::try_from(at).map_err(|_beyond| io::Error::from_raw_os_error(libc::EINVAL))
}

/// The part of a buffer between two positions, each cut to the buffer's end.
fn part<B: Buffer>(buffer: &mut B, start: usize, end: usize) -> (*mut u8, usize) {
    let end = end.min(buffer.len());
    let start = start.min(end);
    (buffer.as_mut_ptr().wrapping_add(start), end - start)
}

/// [`part`] across several buffers.
fn parts<B: Buffer>(
    buffers: &mut [B],
    start: usize,
    end: usize,
) -> (Vec<libc::iovec>, libc::c_int) {
    let mut before = 0;
    let vectors: Vec<_> = buffers
        .iter_mut()
        .map(|buffer| {
            let len = buffer.len();
            let (bytes, part) = part(
                buffer,
                start.saturating_sub(before),
                end.saturating_sub(before),
            );
            before += len;
            libc::iovec {
                iov_base: bytes.cast(),
                iov_len: part,
            }
        })
        .collect();
    let count = libc::c_int::try_from(vectors.len()).expect("at most `Op::MAX_VECTORS`");
    (vectors, count)
}
