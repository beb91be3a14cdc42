//! The trait that all rings share, and the handle that wakes one.
//!
//! ```text
//!          the ring's thread                               any thread
//!   push, cancel ─▶ submit ─▶ wait ─▶ reap                 Waker::wake
//!                              ▲ ▲                              │
//!          a completion ───────┘ └──────────────────────────────┘
//! ```
//!
//! One thread uses a ring; a wake comes from any. [`Ring::wait`] is the only call that sleeps,
//! and a completion, a wake and its time-out each end it. [`Ring::drain`] sleeps too: until the
//! last operation has ended or its grace time has passed.

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
/// One thread uses a ring. It may be made on another (the first [`submit`](Ring::submit) decides
/// whose it is); only its [`Waker`] is shared.
///
/// Dropping a ring is [`drain`](Ring::drain) with the grace time it was made with.
pub trait Ring<B>: Send + fmt::Debug {
    /// How many operations may be in flight at once. Their tokens are smaller than this.
    fn capacity(&self) -> usize;

    /// How many are: pushed, and not yet reaped.
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

    /// Asks that an operation end early. It completes once all the same: with `ECANCELED`, or with
    /// its own result where it was faster, or where the kernel cannot interrupt it, when it ends.
    /// A token that is not in flight is ignored.
    ///
    /// It is asked by the next [`submit`](Ring::submit) or [`wait`](Ring::wait). An operation that
    /// has not been started by then never is. One that waits in a chain for another to end is
    /// cancelled when its turn comes, so cancel a chain by its first operation, or all of it.
    fn cancel(&mut self, token: Token);

    /// Starts what was pushed, without waiting.
    ///
    /// # Errors
    ///
    /// What the kernel says; the operations stay in flight, and are tried again by the next call.
    fn submit(&mut self) -> io::Result<()>;

    /// Starts what was pushed, then sleeps until there is a completion to reap, or a
    /// [`wake`](Waker::wake) that came since the last wait returned, or `timeout` has passed.
    /// Returns whether there was a wake. Signals do not end it early as an error.
    ///
    /// # Errors
    ///
    /// What the kernel says; the operations stay in flight, and are tried again by the next call.
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<bool>;

    /// The next completion, if there is one. Never blocks, and makes no system call, so some
    /// completions show only after the next [`submit`](Ring::submit) or [`wait`](Ring::wait).
    fn reap(&mut self) -> Option<Completion<B>>;

    /// Cancels everything in flight and waits for it, `grace` at most. What has not come back then
    /// is leaked: its buffers are never freed and its files never closed, for the kernel may still
    /// use them. After this the ring takes no operation.
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

/// Wakes a ring from any thread. Sticky: a wake that comes while nobody waits ends the next wait
/// at once. Many wakes before one wait count as one. A ring has a waker to itself.
#[derive(Clone, Debug)]
pub struct Waker {
    event: Arc<EventFd>,
}

impl Waker {
    /// Makes a waker, to be given to a ring.
    ///
    /// # Errors
    ///
    /// What `eventfd(2)` says.
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
