//! The trait that all rings share, and the handle that wakes a ring.
//!
//! ```text
//!          the ring's thread                               any thread
//!   push, cancel ─▶ submit ─▶ wait ─▶ reap                 Waker::wake
//!                              ▲ ▲                              │
//!          a completion ───────┘ └──────────────────────────────┘
//! ```
//!
//! One thread uses a ring; any thread may wake it. [`Ring::wait`] sleeps until a completion, a wake, or its
//! time-out. [`Ring::drain`] also sleeps: until the last operation has ended or its grace time has passed.
//! No other call sleeps.

use std::{
    fmt, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    sync::Arc,
    time::Duration,
};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::{Completion, Op, Rejected, Token, op::Link};

/// A queue of operations that owns what they borrow.
///
/// One thread uses a ring. Another thread may have made it: the first [`submit`](Ring::submit) decides which
/// thread owns the ring. Only its [`Waker`] is shared.
///
/// Dropping a ring does a [`drain`](Ring::drain) with the grace time of its making.
pub trait Ring<B>: Send + fmt::Debug {
    /// How many operations may be in flight at once. Their tokens are smaller than this.
    fn capacity(&self) -> usize;

    /// How many operations are in flight: pushed, and not yet reaped.
    fn in_flight(&self) -> usize;

    /// Takes an operation, to be started by the next [`submit`](Ring::submit) or
    /// [`wait`](Ring::wait). An operation pushed with [`Link::Next`] must be followed by another
    /// push before either; a chain is not split, and one that is left open ends there.
    ///
    /// # Errors
    ///
    /// Gives the operation back when the token is in flight (as all are when the ring is full) or
    /// not smaller than [`capacity`](Ring::capacity), when the operation is beyond
    /// [`Op::MAX_BYTES`] or [`Op::MAX_VECTORS`], and after [`drain`](Ring::drain).
    fn push(&mut self, token: Token, op: Op<B>, link: Link) -> Result<(), Rejected<B>>;

    /// Asks an operation to end early. The operation still completes once: with `ECANCELED`; or with its own
    /// result, if it was faster, or if the kernel cannot interrupt it. A token that is not in flight is
    /// ignored.
    ///
    /// The next [`submit`](Ring::submit) or [`wait`](Ring::wait) passes the request on. An operation that
    /// has not
    /// started by then never starts. An operation that waits in a chain for another is cancelled when its turn
    /// comes, so cancel a chain by its first operation, or all of it.
    fn cancel(&mut self, token: Token);

    /// Starts the pushed operations, without waiting.
    ///
    /// # Errors
    ///
    /// The kernel's. The operations stay in flight, and the next call tries them again.
    fn submit(&mut self) -> io::Result<()>;

    /// Starts the pushed operations, then sleeps until one of these: a completion to reap; a
    /// [`wake`](Waker::wake) since the last wait returned; `timeout` has passed. Returns whether there was
    /// a wake.
    /// A signal is not an error and does not end the wait.
    ///
    /// # Errors
    ///
    /// The kernel's. The operations stay in flight, and the next call tries them again.
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<bool>;

    /// Returns the next completion, if there is one. Never blocks and makes no system call. So some completions
    /// show only after the next [`submit`](Ring::submit) or [`wait`](Ring::wait).
    fn reap(&mut self) -> Option<Completion<B>>;

    /// Cancels everything in flight and waits for it, for `grace` at most. An operation that has not come
    /// back by
    /// then is leaked: its buffers are never freed and its file is never closed, because the kernel may
    /// still use
    /// them. Afterwards the ring takes no operation.
    fn drain(&mut self, grace: Duration) -> Drained;
}

/// What became of the operations that were in flight when a ring was drained.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[must_use = "tells whether memory had to be leaked"]
pub struct Drained {
    /// Operations that ended, and whose buffers were dropped.
    pub reaped: usize,
    /// Operations that did not end in time, and whose buffers and files were leaked.
    pub leaked: usize,
}

/// Wakes a ring from any thread. A wake is sticky: if nobody waits, it ends the next wait at once. Many wakes
/// before one wait count as one. Each ring has a waker of its own.
#[derive(Clone, Debug)]
pub struct Waker {
    event: Arc<EventFd>,
}

impl Waker {
    /// Makes a waker, to be given to a ring.
    ///
    /// # Errors
    ///
    /// The error of `eventfd(2)`.
    pub fn new() -> io::Result<Self> {
        let event =
            EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self {
            event: Arc::new(event),
        })
    }

    /// Ends the ring's wait, the one under way or the next. One `write(2)`.
    pub fn wake(&self) {
        // `EAGAIN`, a counter at its end, would be a wake that nobody has seen for 2^64 wakes: as
        // good as one. The eventfd's other errors are mistakes of ours.
        let _full = self.event.write(1);
    }

    /// Takes all wakes so far, without waiting for one. For rings.
    pub(crate) fn take(&self) -> bool {
        self.event.read().is_ok()
    }
}

impl AsRawFd for Waker {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_fd().as_raw_fd()
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// The most operations that a ring has room for: the kernel's longest queue holds each of them
/// with its cancellation.
pub const MAX_CAPACITY: usize = 8192;

/// What every ring asks of its capacity.
pub(crate) fn check_capacity(capacity: usize) -> io::Result<()> {
    if (1..=MAX_CAPACITY).contains(&capacity) {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a ring's capacity is at least 1 and at most 8192",
        ))
    }
}
