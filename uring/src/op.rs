//! What a ring can be asked to do, and what comes back.

use std::{fmt, io, os::fd::OwnedFd, sync::Arc};

use crate::Buffer;

/// A file that operations name. The ring keeps a clone while an operation is in flight, so closing the file
/// elsewhere never frees its number for another file.
pub type Fd = Arc<OwnedFd>;

/// Names an operation between [`push`](crate::Ring::push) and its [`Completion`]. The caller chooses the
/// token. It
/// is an index into the ring's table, so it is below the ring's [`capacity`](crate::Ring::capacity), and no two
/// operations in flight share one.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Token(pub u32);

impl Token {
    /// Its place in a ring's table.
    pub(crate) const fn index(self) -> usize {
        self.0 as usize
    }
}

/// Whether the operation pushed next waits for this one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Link {
    /// The end of its chain: what is pushed next may run at the same time, in any order.
    End,
    /// The operation pushed next starts when this one has moved *all* its bytes, and completes
    /// with `ECANCELED`, untouched, when this one moved fewer or failed (`IOSQE_IO_LINK`). A poll
    /// has moved all when it is ready.
    ///
    /// A receive or a send with this link goes on until it has moved all (`MSG_WAITALL`): without
    /// that the kernel does not count a short one as short, and the chain would run on.
    Next,
}

/// One operation. Transfers are at the file's own position (offset -1), but for [`Op::ReadAt`] and
/// [`Op::WriteAt`].
///
/// Those two are for files that have positions: regular files and block devices. A write to such a file that an
/// error cuts short (`ENOSPC`, `EFBIG`, a quota) returns the bytes that it has moved. But the kernel's ring
/// does
/// not move the file's own position, so the next write there would overwrite those bytes. Reads behave alike.
pub enum Op<B> {
    /// Read up to the buffer's length. 0 is the end.
    Read {
        /// From where.
        fd: Fd,
        /// To where.
        buffer: B,
    },
    /// Read up to the buffer's length, from a place of its own. 0 is the end.
    ReadAt {
        /// From which file: one that can seek. (On a pipe io_uring reads as if there were no place.)
        fd: Fd,
        /// From where in it.
        offset: u64,
        /// To where.
        buffer: B,
    },
    /// Write up to the buffer's length.
    Write {
        /// To where.
        fd: Fd,
        /// From where.
        buffer: B,
    },
    /// Write up to the buffer's length, at a place of its own. The file's own position stays where it
    /// is. A file that is open with `O_APPEND` is written at its end all the same.
    WriteAt {
        /// To which file: one that can seek.
        fd: Fd,
        /// To where in it.
        offset: u64,
        /// From where.
        buffer: B,
    },
    /// Read into several buffers, in their order.
    ReadVectored {
        /// From where.
        fd: Fd,
        /// To where. At most [`Op::MAX_VECTORS`].
        buffers: Vec<B>,
    },
    /// Write several buffers, in their order. Beware: on a file that has only a plain write the
    /// kernel calls the driver once per buffer, and an error in the second comes back as the
    /// first's length.
    WriteVectored {
        /// To where.
        fd: Fd,
        /// From where. At most [`Op::MAX_VECTORS`].
        buffers: Vec<B>,
    },
    /// Receive on a socket.
    Recv {
        /// From where.
        fd: Fd,
        /// To where.
        buffer: B,
    },
    /// Send on a socket, without `SIGPIPE`.
    Send {
        /// To where.
        fd: Fd,
        /// From where.
        buffer: B,
    },
    /// Wait until the file is ready; the result is `revents`.
    Poll {
        /// Which file.
        fd: Fd,
        /// `POLLIN`, `POLLOUT`, … as in `poll(2)`.
        events: i16,
    },
}

impl<B> Op<B> {
    /// The most buffers that a vectored operation takes.
    pub const MAX_VECTORS: usize = 64;

    /// The most bytes that an operation moves: what the kernel moves in one call, on a machine
    /// with pages of 64 KiB or smaller.
    pub const MAX_BYTES: usize = 0x7fff_0000;

    /// The file that the operation names.
    pub const fn fd(&self) -> &Fd {
        match self {
            Self::Read { fd, .. }
            | Self::ReadAt { fd, .. }
            | Self::Write { fd, .. }
            | Self::WriteAt { fd, .. }
            | Self::ReadVectored { fd, .. }
            | Self::WriteVectored { fd, .. }
            | Self::Recv { fd, .. }
            | Self::Send { fd, .. }
            | Self::Poll { fd, .. } => fd,
        }
    }

    /// The operation's name, for traces and errors.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Read { .. } => "read",
            Self::ReadAt { .. } => "pread",
            Self::Write { .. } => "write",
            Self::WriteAt { .. } => "pwrite",
            Self::ReadVectored { .. } => "readv",
            Self::WriteVectored { .. } => "writev",
            Self::Recv { .. } => "recv",
            Self::Send { .. } => "send",
            Self::Poll { .. } => "poll",
        }
    }
}

impl<B: Buffer> Op<B> {
    /// The bytes that the operation asks to move: its buffers' lengths; 0 for a poll.
    #[must_use]
    pub fn requested(&self) -> usize {
        match self {
            Self::Read { buffer, .. }
            | Self::ReadAt { buffer, .. }
            | Self::Write { buffer, .. }
            | Self::WriteAt { buffer, .. }
            | Self::Recv { buffer, .. }
            | Self::Send { buffer, .. } => buffer.len(),
            Self::ReadVectored { buffers, .. } | Self::WriteVectored { buffers, .. } => buffers
                .iter()
                .fold(0, |total, buffer| total.saturating_add(buffer.len())),
            Self::Poll { .. } => 0,
        }
    }

    /// Whether it keeps to [`Op::MAX_VECTORS`] and [`Op::MAX_BYTES`]. More would be cut by the
    /// kernel without a word, and a chain would not notice.
    pub(crate) fn within_limits(&self) -> bool {
        let vectors = match self {
            Self::ReadVectored { buffers, .. } | Self::WriteVectored { buffers, .. } => {
                buffers.len()
            }
            _ => 1,
        };
        vectors <= Self::MAX_VECTORS && self.requested() <= Self::MAX_BYTES
    }

    /// Whether the operation linked to this one may start after `result`.
    pub(crate) fn holds_chain(&self, result: &io::Result<usize>) -> bool {
        match (self, result) {
            (Self::Poll { .. }, Ok(_)) => true,
            (_, Ok(moved)) => *moved == self.requested(),
            (_, Err(_)) => false,
        }
    }
}

impl<B> fmt::Debug for Op<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct(self.name())
            .field("fd", self.fd())
            .finish_non_exhaustive()
    }
}

/// An operation that has ended, with all that it borrowed.
#[derive(Debug)]
#[must_use = "the buffers and the file come back in it"]
pub struct Completion<B> {
    /// The name that the caller gave it.
    pub token: Token,
    /// The operation, its buffers and its file.
    pub op: Op<B>,
    /// The bytes moved (or `revents`), or the errno: `ECANCELED` where it was cancelled or its
    /// chain broke before it started.
    pub result: io::Result<usize>,
}

/// An operation that was not taken: its token is in flight or beyond the ring's capacity, it is
/// larger than [`Op::MAX_BYTES`] or has more than [`Op::MAX_VECTORS`] buffers, or the ring has
/// been drained.
#[must_use = "the operation is given back"]
pub struct Rejected<B>(pub Op<B>);

impl<B> fmt::Debug for Rejected<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Rejected").field(&self.0).finish()
    }
}
