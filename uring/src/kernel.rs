//! The kernel's io_uring.
//!
//! ```text
//!               submit, wait: stage()                 submit, wait: enter()
//!   pending ─────────────────────────▶ queued (SQEs) ──────────────────────▶ kernel
//!      │        cancelled first                                                │
//!      └────────────────────▶ ready ◀──────────────────────────────────────────┘
//!                               │         any call but push and cancel: collect() (CQEs)
//!                               ▼
//!                             reap()
//! ```
//!
//! One thread calls all of this; the kernel calls nobody. An operation stays in its slot, with the buffers
//! and the file that the kernel uses, from [`push`](Ring::push) to [`reap`](Ring::reap). Only the arrival
//! of the completion lets it out.
//!
//! # What ends a wait
//!
//! [`wait`](Ring::wait) sleeps in one `io_uring_enter(2)`, which also submits.
//!
//! | ended by | remark |
//! |---|---|
//! | an operation's completion | |
//! | the waker's completion | a read of its eventfd stays queued in the ring while anybody sleeps. The counter makes a wake sticky while no read is queued; the read costs no call of its own |
//! | a cancellation's completion | then it sleeps again |
//! | the time-out | |
//!
//! A signal ends the call, not the wait.
//!
//! # Flags
//!
//! | flag | used | why |
//! |---|---|---|
//! | `COOP_TASKRUN` | yes | saves the thread interrupts that would only post completions before it looks |
//! | `TASKRUN_FLAG` | yes | tells when there are completions to post |
//! | `DEFER_TASKRUN` | no | see below |
//! | a kernel thread that polls the queue | no | on few cores it starves everything else |
//!
//! `DEFER_TASKRUN` ties the ring to the thread that made its first call, so another thread could not even
//! drain it. It also posts the completions of the kernel's own workers, which are all transfers on a
//! device, only inside a call, and [`reap`](Ring::reap) makes no call. It gained nothing: writes, chains of
//! eight, wake-ups and round trips on a socket took as long without it, within the differences between
//! runs.
//!
//! # Workers
//!
//! An operation that cannot move bytes without waiting goes to a worker thread of the kernel's. The kernel
//! finds that out by trying, and then makes a second worker only while the first one sleeps. The drivers of
//! memory files and of devices copy and do not sleep, so all their operations would wait for one core.
//! `IOSQE_ASYNC` skips the attempt and gives each operation a worker at once. The ring sets it for
//! transfers on files whose type always needs workers: all but pipes, sockets and character devices. (The
//! order within a chain is kept.) If the kernel has nothing beside a chain, that chain needs no second
//! worker, and is a little faster without it.
//!
//! # Chains
//!
//! A chain enters the kernel with one call or not at all. Otherwise its halves would be two chains, which
//! run at the same time. The queue has room for all operations, so only the kernel can split a chain, if it
//! runs out of memory in the middle of a batch. The ring then submits nothing any more.
#![expect(
    unsafe_code,
    reason = "queues entries whose memory the kernel will touch"
)]

use std::{
    cmp,
    collections::VecDeque,
    fmt, io, mem,
    os::fd::{AsRawFd, OwnedFd},
    sync::{Arc, Weak},
    thread,
    time::{Duration, Instant},
};

use io_uring::{
    EnterFlags, IoUring, Probe, opcode,
    register::Restriction,
    squeue,
    types::{self, SubmitArgs, Timespec},
};
use nix::sys::stat::SFlag;

use crate::{
    Buffer, Completion, Drained, Link, Op, Rejected, Ring, Token, Waker,
    ring::{MAX_CAPACITY, check_capacity},
    syscall::kind,
    time::deadline,
};

/// What the ring asks the kernel to do, and all that the kernel will do for it.
const OPERATIONS: [(&str, u8); 8] = [
    ("read", opcode::Read::CODE),
    ("write", opcode::Write::CODE),
    ("readv", opcode::Readv::CODE),
    ("writev", opcode::Writev::CODE),
    ("recv", opcode::Recv::CODE),
    ("send", opcode::Send::CODE),
    ("poll", opcode::PollAdd::CODE),
    ("cancel", opcode::AsyncCancel::CODE),
];

/// At the file's own position.
const CURRENT_POSITION: u64 = u64::MAX;

/// Names the read of the waker's eventfd. Tokens are smaller.
const WAKE: u64 = 1 << 32;

/// Names, with a token, what cancels the token's operation.
const CANCEL: u64 = 1 << 33;

/// How soon to cancel again what the kernel could not find or stop the first time: it looks for an
/// operation in several places, and one on its way from one to the other is in none.
const CANCEL_AGAIN: Duration = Duration::from_millis(10);

// The queue holds every operation, what cancels it, and the waker's read; the kernel allows 32768.
const _: () = assert!((2 * MAX_CAPACITY + 1).next_power_of_two() <= 32768);

/// The kernel's io_uring, behind [`Ring`].
///
/// Operations that the kernel runs on threads of its own belong to the thread that submitted them:
/// when that thread exits, the kernel cancels them, and it cannot exit before they have ended.
pub struct KernelRing<B: Buffer> {
    ring: IoUring,
    waker: Waker,
    grace: Duration,
    slots: Box<[Slot<B>]>,
    in_flight: usize,
    /// Pushed, and not staged yet.
    pending: VecDeque<(Token, Link)>,
    /// In the submission queue, and not taken by the kernel yet.
    queued: VecDeque<Queued>,
    /// Ended, with the kernel's result, and not reaped yet.
    ready: VecDeque<(Token, i32)>,
    /// To be cancelled by the next call that submits.
    cancels: Vec<Token>,
    /// To be cancelled again at `cancel_again`.
    missed: Vec<Token>,
    cancel_again: Option<Instant>,
    /// Where the kernel puts the waker's counter while `armed`. A vector, like the buffers: its
    /// bytes stay where they are when the ring moves.
    wake_counter: Vec<u8>,
    /// Whether the read of the waker's eventfd is queued or in flight.
    armed: bool,
    /// Whether a wake came that no wait has told yet.
    woken: bool,
    /// The errno with which the read of the waker's eventfd failed.
    wake_error: Option<i32>,
    /// The kernel split a chain: nothing may be submitted any more.
    split: bool,
    /// Drained.
    closed: bool,
}

/// A place for one operation, named by its token.
struct Slot<B> {
    op: Option<Op<B>>,
    phase: Phase,
    cancelled: bool,
    vectors: Vectors,
    /// The file of the last transfer, and whether it is one for the kernel's workers. A slot's next
    /// transfer is most often on the same.
    for_workers: (Weak<OwnedFd>, bool),
}

/// Where an operation is in its life. Declaration order is life order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Phase {
    /// The slot has no operation.
    Free,
    /// Pushed; the kernel has not heard of it.
    Pending,
    /// The kernel has it, or will with the next call.
    Started,
    /// It waits to be reaped.
    Ended,
}

/// What a vectored operation hands to the kernel. Kept when the operation has ended, for the next
/// one in the slot, and leaked with it.
struct Vectors(Vec<libc::iovec>);

// SAFETY: the pointers are only copied from here to the kernel. They lead to the memory of a
// `Buffer`, which is `Send` and valid from whichever thread.
unsafe impl Send for Vectors {}

/// An entry in the submission queue.
struct Queued {
    user_data: u64,
    linked: bool,
}

impl<B: Buffer> Slot<B> {
    const fn new() -> Self {
        Self {
            op: None,
            phase: Phase::Free,
            cancelled: false,
            vectors: Vectors(Vec::new()),
            for_workers: (Weak::new(), false),
        }
    }

    /// Whether the slot's operation is for the kernel's workers.
    fn is_for_workers(&mut self) -> bool {
        let fd = match &self.op {
            Some(
                Op::Read { fd, .. }
                | Op::ReadAt { fd, .. }
                | Op::Write { fd, .. }
                | Op::WriteAt { fd, .. }
                | Op::ReadVectored { fd, .. }
                | Op::WriteVectored { fd, .. },
            ) => fd,
            _ => return false,
        };
        let (known, answer) = &mut self.for_workers;
        // Another file cannot have the same address while the slot remembers this one.
        if known.as_ptr() != Arc::as_ptr(fd) {
            let ready_at_once = [SFlag::S_IFIFO, SFlag::S_IFSOCK, SFlag::S_IFCHR];
            *known = Arc::downgrade(fd);
            *answer = kind(fd).is_some_and(|kind| !ready_at_once.contains(&kind));
        }
        *answer
    }

    /// The entry for the slot's operation. `alone` is a chain beside which the kernel has nothing.
    fn entry(&mut self, linked: bool, alone: bool) -> squeue::Entry {
        let mut flags = squeue::Flags::empty();
        flags.set(squeue::Flags::IO_LINK, linked);
        flags.set(squeue::Flags::ASYNC, !alone && self.is_for_workers());
        let all = if linked { libc::MSG_WAITALL } else { 0 };
        let op = self.op.as_mut().expect("a pending slot has an operation");
        let fd = types::Fd(op.fd().as_raw_fd());
        let entry = match op {
            Op::Read { buffer, .. } => {
                opcode::Read::new(fd, buffer.as_mut_ptr(), length(buffer.len()))
                    .offset(CURRENT_POSITION)
                    .build()
            }
            Op::ReadAt { buffer, offset, .. } => {
                opcode::Read::new(fd, buffer.as_mut_ptr(), length(buffer.len()))
                    .offset(place(*offset))
                    .build()
            }
            Op::Write { buffer, .. } => {
                opcode::Write::new(fd, buffer.as_mut_ptr(), length(buffer.len()))
                    .offset(CURRENT_POSITION)
                    .build()
            }
            Op::WriteAt { buffer, offset, .. } => {
                opcode::Write::new(fd, buffer.as_mut_ptr(), length(buffer.len()))
                    .offset(place(*offset))
                    .build()
            }
            Op::ReadVectored { buffers, .. } => {
                let count = self.vectors.fill(buffers);
                opcode::Readv::new(fd, self.vectors.0.as_ptr(), count)
                    .offset(CURRENT_POSITION)
                    .build()
            }
            Op::WriteVectored { buffers, .. } => {
                let count = self.vectors.fill(buffers);
                opcode::Writev::new(fd, self.vectors.0.as_ptr(), count)
                    .offset(CURRENT_POSITION)
                    .build()
            }
            Op::Recv { buffer, .. } => {
                opcode::Recv::new(fd, buffer.as_mut_ptr(), length(buffer.len()))
                    .flags(all)
                    .build()
            }
            Op::Send { buffer, .. } => {
                opcode::Send::new(fd, buffer.as_mut_ptr(), length(buffer.len()))
                    .flags(libc::MSG_NOSIGNAL | all)
                    .build()
            }
            Op::Poll { events, .. } => {
                opcode::PollAdd::new(fd, events.cast_unsigned().into()).build()
            }
        };
        entry.flags(flags)
    }
}

impl Vectors {
    /// Describes `buffers` and counts them.
    fn fill<B: Buffer>(&mut self, buffers: &mut [B]) -> u32 {
        self.0.clear();
        self.0.extend(buffers.iter_mut().map(|buffer| libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        }));
        length(self.0.len())
    }
}

/// An offset as the kernel wants it. One beyond any file's is refused by it, and is never taken for
/// the file's own position.
fn place(offset: u64) -> u64 {
    offset.min(CURRENT_POSITION - 1)
}

/// A length as the kernel wants it.
fn length(len: usize) -> u32 {
    u32::try_from(len).expect("push refuses what is beyond `Op::MAX_BYTES`")
}

impl<B: Buffer> KernelRing<B> {
    /// Makes a ring for `capacity` operations, woken by `waker`, that waits for `grace` at most
    /// when it is dropped.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for a capacity of 0 or beyond [`MAX_CAPACITY`](crate::MAX_CAPACITY);
    /// `Unsupported` where the kernel's io_uring lacks something; otherwise what
    /// `io_uring_setup(2)` says.
    pub fn new(capacity: usize, waker: Waker, grace: Duration) -> io::Result<Self> {
        check_capacity(capacity)?;
        let ring = set_up(length((2 * capacity + 1).next_power_of_two()))?;
        Ok(Self {
            ring,
            waker,
            grace,
            slots: (0..capacity).map(|_| Slot::new()).collect(),
            in_flight: 0,
            pending: VecDeque::with_capacity(capacity),
            queued: VecDeque::with_capacity(2 * capacity + 1),
            ready: VecDeque::with_capacity(capacity),
            cancels: Vec::with_capacity(capacity),
            missed: Vec::with_capacity(capacity),
            cancel_again: None,
            wake_counter: vec![0; size_of::<u64>()],
            armed: false,
            woken: false,
            wake_error: None,
            split: false,
            closed: false,
        })
    }

    /// Takes what the kernel has completed out of its queue. No system call.
    ///
    /// Before every call that submits, so that the completion queue, twice as long as the other,
    /// is empty then and has room for all that the call may complete: it never overflows.
    fn collect(&mut self) {
        for cqe in self.ring.completion() {
            let (user_data, result) = (cqe.user_data(), cqe.result());
            if user_data == WAKE {
                self.armed = false;
                match result {
                    0.. => self.woken = true,
                    // Cancelled with a thread that used the ring before and has exited.
                    _ if matches!(-result, libc::ECANCELED | libc::EINTR | libc::EAGAIN) => {}
                    _ => self.wake_error = Some(-result),
                }
                continue;
            }
            let token = token(user_data);
            let slot = &mut self.slots[token.index()];
            if user_data & CANCEL == 0 {
                slot.phase = Phase::Ended;
                self.ready.push_back((token, result));
            } else if result != 0
                && slot.phase == Phase::Started
                && slot.cancelled
                && !self.missed.contains(&token)
            {
                self.missed.push(token);
                self.cancel_again
                    .get_or_insert_with(|| deadline(CANCEL_AGAIN));
            }
        }
    }

    /// Moves what is pending to the submission queue, then what cancels, then the waker's read.
    fn stage(&mut self, arm: bool) {
        let leftover = !self.queued.is_empty();
        let mut broken = false;
        // Whether the kernel has nothing but the chain that is being staged.
        let mut alone = self.in_flight == self.pending.len() + self.ready.len();
        while let Some((token, link)) = self.pending.pop_front() {
            let slot = &mut self.slots[token.index()];
            if slot.cancelled || broken {
                slot.phase = Phase::Ended;
                self.ready.push_back((token, -libc::ECANCELED));
                broken = link == Link::Next;
                continue;
            }
            let linked = link == Link::Next
                && self
                    .pending
                    .front()
                    .is_some_and(|(next, _)| !self.slots[next.index()].cancelled);
            // A chain that goes on to a cancelled operation ends here, but as a member of it.
            let slot = &mut self.slots[token.index()];
            slot.phase = Phase::Started;
            let entry = slot.entry(linked, alone);
            self.queue(entry, token.0.into(), linked);
            alone &= linked;
        }

        if self
            .cancel_again
            .is_some_and(|again| again <= Instant::now())
        {
            self.cancel_again = None;
            self.cancels.append(&mut self.missed);
        }
        // With entries left over from a call that failed there might be no room for these.
        if !leftover {
            while let Some(token) = self.cancels.pop() {
                let slot = &self.slots[token.index()];
                if slot.phase == Phase::Started && slot.cancelled {
                    let target = u64::from(token.0);
                    let entry = opcode::AsyncCancel::new(target).build();
                    self.queue(entry, CANCEL | target, false);
                }
            }
        }

        if arm && !self.armed {
            let entry = opcode::Read::new(
                types::Fd(self.waker.as_raw_fd()),
                self.wake_counter.as_mut_ptr(),
                length(self.wake_counter.len()),
            )
            .build();
            self.armed = true;
            self.queue(entry, WAKE, false);
        }
    }

    /// Puts an entry into the submission queue.
    fn queue(&mut self, entry: squeue::Entry, user_data: u64, linked: bool) {
        let entry = entry.user_data(user_data);
        // SAFETY: what the entry points to is owned by a slot in phase `Started` or is
        // `wake_counter` while `armed`. Both last until `collect` has seen the completion; `drain`,
        // which `drop` calls, waits for that, and leaks what does not complete. Moving the ring
        // moves none of the bytes: `Buffer` promises that for buffers, and the rest is in vectors.
        unsafe { self.ring.submission().push(&entry) }
            .expect("the queue has room for every operation, its cancellation and the waker");
        self.queued.push_back(Queued { user_data, linked });
    }

    /// Submits what is queued, and waits for `want` completions, `timeout` at most.
    fn enter(&mut self, want: u32, timeout: Option<Duration>) -> io::Result<()> {
        let timespec = timeout.map(Timespec::from);
        let mut args = SubmitArgs::new();
        if let Some(timespec) = &timespec {
            args = args.timespec(timespec);
        }
        let flags = EnterFlags::GETEVENTS | EnterFlags::EXT_ARG;
        // SAFETY: `args` is what `EXT_ARG` announces, and it and the timespec in it outlive the
        // call. `queued` holds what is in the submission queue, entry for entry.
        let submitted = unsafe {
            self.ring
                .submitter()
                .enter(length(self.queued.len()), want, flags.bits(), Some(&args))
        };
        match submitted {
            Ok(submitted) => self.submitted(submitted),
            Err(error) => match error.raw_os_error() {
                Some(libc::ETIME | libc::EINTR) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// The kernel has taken the first `count` entries out of the submission queue.
    fn submitted(&mut self, count: usize) -> io::Result<()> {
        let last = self.queued.drain(..count).next_back();
        if last.is_some_and(|last| last.linked) && !self.queued.is_empty() {
            self.give_up_queue();
        }
        self.check()
    }

    /// Ends what is in the submission queue, without ever starting it.
    ///
    /// Entries cannot be taken out of that queue, so it must not be submitted any more: the buffers
    /// that it names are given back here.
    fn give_up_queue(&mut self) {
        self.split = true;
        for queued in self.queued.drain(..) {
            if queued.user_data == WAKE {
                self.armed = false;
            } else if queued.user_data & CANCEL == 0 {
                let token = token(queued.user_data);
                self.slots[token.index()].phase = Phase::Ended;
                self.ready.push_back((token, -libc::ECANCELED));
            }
        }
        self.cancels.clear();
        self.missed.clear();
        self.cancel_again = None;
    }

    /// Whether the ring can go on.
    fn check(&self) -> io::Result<()> {
        if self.split {
            return Err(io::Error::other(
                "the kernel took a part of a chain of operations",
            ));
        }
        match self.wake_error {
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => Ok(()),
        }
    }

    /// Whether the kernel has completions to post as soon as it is entered.
    fn has_deferred(&mut self) -> bool {
        self.ring.submission().taskrun()
    }

    /// How long to sleep: until `deadline`, or until something is to be cancelled again.
    fn sleep(&self, deadline: Option<Instant>) -> Option<Duration> {
        let until = match (deadline, self.cancel_again) {
            (Some(deadline), Some(again)) => Some(cmp::min(deadline, again)),
            (deadline, again) => deadline.or(again),
        };
        until.map(|until| until.saturating_duration_since(Instant::now()))
    }

    fn take_ready(&mut self) -> Option<Completion<B>> {
        let (token, result) = self.ready.pop_front()?;
        let slot = &mut self.slots[token.index()];
        slot.phase = Phase::Free;
        slot.cancelled = false;
        self.in_flight -= 1;
        Some(Completion {
            token,
            op: slot.op.take().expect("one completion for one operation"),
            result: usize::try_from(result)
                .map_err(|_negative| io::Error::from_raw_os_error(-result)),
        })
    }
}

impl<B: Buffer> Ring<B> for KernelRing<B> {
    fn capacity(&self) -> usize {
        self.slots.len()
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn push(&mut self, token: Token, op: Op<B>, link: Link) -> Result<(), Rejected<B>> {
        if self.closed || self.split || !op.within_limits() {
            return Err(Rejected(op));
        }
        match self.slots.get_mut(token.index()) {
            Some(slot) if slot.phase == Phase::Free => {
                slot.op = Some(op);
                slot.phase = Phase::Pending;
                self.pending.push_back((token, link));
                self.in_flight += 1;
                Ok(())
            }
            _ => Err(Rejected(op)),
        }
    }

    fn cancel(&mut self, token: Token) {
        let Some(slot) = self.slots.get_mut(token.index()) else {
            return;
        };
        if matches!(slot.phase, Phase::Pending | Phase::Started) && !slot.cancelled {
            slot.cancelled = true;
            if slot.phase == Phase::Started && !self.split {
                self.cancels.push(token);
            }
        }
    }

    fn submit(&mut self) -> io::Result<()> {
        if self.closed {
            return Ok(());
        }
        self.collect();
        self.check()?;
        self.stage(false);
        if self.queued.is_empty() && !self.has_deferred() {
            return Ok(());
        }
        self.enter(0, None)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<bool> {
        if self.closed {
            return Ok(false);
        }
        // A time-out beyond the clock's end is none.
        let deadline = timeout.map(deadline);
        let mut entered = false;
        loop {
            self.collect();
            self.check()?;
            if entered && (self.woken || !self.ready.is_empty()) {
                break;
            }
            self.stage(!self.woken);
            if self.woken || !self.ready.is_empty() {
                // Nothing to sleep for, but something to submit perhaps, or a wake to hear of.
                if !self.queued.is_empty() || self.has_deferred() {
                    self.enter(0, None)?;
                    self.collect();
                }
                break;
            }
            if entered && deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                break;
            }
            self.enter(1, self.sleep(deadline))?;
            entered = true;
        }
        Ok(mem::take(&mut self.woken))
    }

    fn reap(&mut self) -> Option<Completion<B>> {
        if self.ready.is_empty() && !self.closed {
            self.collect();
        }
        self.take_ready()
    }

    fn drain(&mut self, grace: Duration) -> Drained {
        let mut drained = Drained::default();
        if mem::replace(&mut self.closed, true) {
            return drained;
        }
        let deadline = Some(deadline(grace));
        if !self.queued.is_empty() {
            self.give_up_queue();
        }
        for index in 0..self.slots.len() {
            self.cancel(Token(length(index)));
        }
        if self.armed {
            self.waker.wake();
        }
        let mut entered = false;
        loop {
            self.collect();
            // What is pending is cancelled by now, and ends without ever being started.
            self.stage(false);
            while let Some(completion) = self.take_ready() {
                drop(completion);
                drained.reaped += 1;
            }
            if self.in_flight == 0 && !self.armed {
                return drained;
            }
            if entered && deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                break;
            }
            if self.enter(1, self.sleep(deadline)).is_err() {
                // Short of memory, most likely, which passes; or else the grace time does.
                thread::sleep(Duration::from_millis(1));
            }
            entered = true;
        }

        // The kernel may still use all this. That the ring itself is closed later changes nothing:
        // the kernel keeps what it needs until its last operation has ended.
        drained.leaked = mem::take(&mut self.in_flight);
        mem::forget(mem::take(&mut self.slots));
        mem::forget(mem::take(&mut self.wake_counter));
        drained
    }
}

impl<B: Buffer> Drop for KernelRing<B> {
    fn drop(&mut self) {
        // Closing a ring does not wait for it: the kernel cancels in its own time and may touch
        // the buffers after `close` returns.
        let _leaked = self.drain(self.grace);
    }
}

impl<B: Buffer> fmt::Debug for KernelRing<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelRing")
            .field("capacity", &self.slots.len())
            .field("in_flight", &self.in_flight)
            .field("pending", &self.pending.len())
            .field("ready", &self.ready.len())
            .field("split", &self.split)
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}

/// The token in an entry's name.
fn token(user_data: u64) -> Token {
    Token(u32::try_from(user_data & u64::from(u32::MAX)).expect("masked to 32 bits"))
}

/// What a host's io_uring has of what [`KernelRing`] needs.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct Support {
    /// Each operation that a ring makes, and whether the kernel has it. A ring needs all.
    pub operations: Vec<(&'static str, bool)>,
    /// Whether a ring can be restricted to these. It works without, and its fd is then of more use to a thief.
    pub restricted: bool,
}

/// Asks what this host's io_uring has, for this process, by a ring that is closed again.
///
/// # Errors
///
/// Why a ring cannot be had: `EPERM` or `ENOSYS` where the host forbids it, `Unsupported` where it is too old;
/// otherwise what the kernel says.
pub fn support() -> io::Result<Support> {
    let ring = build(2)?;
    let operations = operations(&ring)?;
    let restricted = restrict(&ring);
    ring.submitter().register_enable_rings()?;
    try_out(ring)?;
    Ok(Support {
        operations: operations.into(),
        restricted,
    })
}

/// Makes a ring that does what [`OPERATIONS`] says and nothing else, for any thread.
fn set_up(entries: u32) -> io::Result<IoUring> {
    let ring = build(entries)?;
    if operations(&ring)?.iter().any(|(_, is_there)| !is_there) {
        return Err(unsupported("an io_uring without the operations needed"));
    }
    let _as_well_without = restrict(&ring);
    ring.submitter().register_enable_rings()?;
    try_out(ring)
}

/// Makes a ring that is not enabled.
fn build(entries: u32) -> io::Result<IoUring> {
    let mut modern = IoUring::builder();
    modern
        .dontfork()
        .setup_r_disabled()
        .setup_submit_all()
        .setup_coop_taskrun()
        .setup_taskrun_flag();
    let ring = match modern.build(entries) {
        // Before Linux 5.19.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            let mut plain = IoUring::builder();
            plain.dontfork().setup_r_disabled();
            plain.build(entries)?
        }
        ring => ring?,
    };
    let parameters = ring.params();
    if !parameters.is_feature_ext_arg()
        || !parameters.is_feature_nodrop()
        || !parameters.is_feature_rw_cur_pos()
        || !parameters.is_feature_submit_stable()
    {
        return Err(unsupported("io_uring before Linux 5.11"));
    }
    Ok(ring)
}

/// Which operations the kernel has.
fn operations(ring: &IoUring) -> io::Result<[(&'static str, bool); OPERATIONS.len()]> {
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    Ok(OPERATIONS.map(|(name, code)| (name, probe.is_supported(code))))
}

/// Makes the one call that moves bytes, without any.
fn try_out(ring: IoUring) -> io::Result<IoUring> {
    // Nothing yet: a host may allow the calls above and forbid the one that counts.
    match ring.submitter().submit() {
        Err(error) if is_forbidden(&error) => Err(error),
        _ => Ok(ring),
    }
}

fn is_forbidden(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EPERM | libc::EACCES | libc::ENOSYS)
    )
}

/// Gives up all that the ring does not need, so that whoever gets hold of its fd gains little.
/// It works as well where that fails. Whether it did.
fn restrict(ring: &IoUring) -> bool {
    let mut restrictions: Vec<_> = OPERATIONS.map(|(_, code)| Restriction::sqe_op(code)).into();
    restrictions.push(Restriction::sqe_flags_allowed(
        (squeue::Flags::IO_LINK | squeue::Flags::ASYNC).bits(),
    ));
    ring.submitter()
        .register_restrictions(&mut restrictions)
        .is_ok()
}

fn unsupported(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(capacity: usize) -> Option<KernelRing<Vec<u8>>> {
        let waker = Waker::new().unwrap();
        match KernelRing::new(capacity, waker, Duration::from_secs(10)) {
            Ok(ring) => Some(ring),
            Err(error) => {
                eprintln!("skipped: no io_uring here: {error}");
                None
            }
        }
    }

    #[test]
    fn what_the_kernel_has_is_what_a_ring_needs() {
        match (support(), ring(2)) {
            (Ok(support), Some(_)) => {
                assert_eq!(support.operations.len(), OPERATIONS.len());
                assert!(support.operations.iter().all(|(_, is_there)| *is_there));
            }
            (Ok(support), None) => {
                assert!(support.operations.iter().any(|(_, is_there)| !is_there));
            }
            (Err(error), there) => assert!(there.is_none(), "{error}"),
        }
    }

    #[test]
    fn the_kernel_refuses_what_the_ring_never_asks_for() {
        let Ok(mut ring) = set_up(8) else {
            return eprintln!("skipped: no io_uring here");
        };
        let entry = opcode::Nop::new().build();
        // SAFETY: the entry names no memory.
        unsafe { ring.submission().push(&entry) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        let results: Vec<_> = ring.completion().map(|cqe| cqe.result()).collect();
        assert_eq!(results, [-libc::EACCES]);
    }

    #[test]
    fn nothing_to_do_makes_no_call() {
        let Some(mut ring) = ring(4) else { return };
        ring.submit().unwrap();
        assert!(!ring.armed && ring.queued.is_empty());
        assert!(ring.reap().is_none());
    }

    #[test]
    fn files_in_memory_are_for_workers_and_pipes_sockets_and_devices_are_not() {
        let memfd = nix::sys::memfd::memfd_create(c"memfd", nix::sys::memfd::MFdFlags::empty());
        let memfd = Arc::new(memfd.unwrap());
        let pipe = Arc::new(nix::unistd::pipe().unwrap().1);
        let null = Arc::new(OwnedFd::from(std::fs::File::open("/dev/null").unwrap()));
        let socket = std::os::unix::net::UnixStream::pair().unwrap().0;
        let socket = Arc::new(OwnedFd::from(socket));
        let mut slot = Slot::new();
        for (fd, expected) in [
            (&memfd, true),
            (&pipe, false),
            (&memfd, true),
            (&null, false),
            (&socket, false),
        ] {
            slot.op = Some(Op::Write {
                fd: fd.clone(),
                buffer: vec![1_u8],
            });
            assert_eq!(slot.is_for_workers(), expected);
            slot.op = Some(Op::Poll {
                fd: fd.clone(),
                events: libc::POLLOUT,
            });
            assert!(!slot.is_for_workers(), "a poll waits in the kernel alone");
        }
    }

    #[test]
    fn after_half_a_chain_the_ring_starts_nothing_and_gives_everything_back() {
        let Some(mut ring) = ring(4) else { return };
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let writer = Arc::new(writer);
        for token in 0..3 {
            let op = Op::Write {
                fd: writer.clone(),
                buffer: vec![b'0' + u8::try_from(token).unwrap()],
            };
            ring.push(Token(token), op, Link::Next).unwrap();
        }
        ring.stage(false);
        // The kernel takes one of three, as it would when it is short of memory.
        let rest = ring.queued.split_off(1);
        let taken = ring.enter(0, None);
        taken.unwrap();
        ring.queued = rest;
        ring.queued.push_front(Queued {
            user_data: 0,
            linked: true,
        });
        ring.submitted(1).unwrap_err();

        ring.wait(None).unwrap_err();
        ring.submit().unwrap_err();
        let mut results = Vec::new();
        while ring.in_flight() > 0 {
            match ring.reap() {
                Some(Completion { token, result, .. }) => {
                    results.push((token.0, result.map_err(|error| error.raw_os_error())));
                }
                None => thread::yield_now(),
            }
        }
        results.sort_by_key(|(token, _)| *token);
        let canceled = Err(Some(libc::ECANCELED));
        assert_eq!(results, [(0, Ok(1)), (1, canceled), (2, canceled)]);
        let op = Op::Write {
            fd: writer.clone(),
            buffer: vec![b'x'],
        };
        let refused = ring.push(Token(3), op, Link::End).unwrap_err();
        drop((ring, writer, refused));
        let mut bytes = [0; 8];
        assert_eq!(nix::unistd::read(&reader, &mut bytes), Ok(1));
        assert_eq!(nix::unistd::read(&reader, &mut bytes), Ok(0));
    }

    #[test]
    fn what_the_kernel_does_not_give_back_is_leaked_and_the_rest_is_not() {
        let Some(mut ring) = ring(4) else { return };
        let (reader, _writer) = nix::unistd::pipe().unwrap();
        let fd = Arc::new(reader);
        for token in 0..3 {
            let op = Op::Poll {
                fd: fd.clone(),
                events: libc::POLLIN,
            };
            ring.push(Token(token), op, Link::End).unwrap();
        }
        // The kernel never hears of the second, so it never answers.
        ring.pending.remove(1);
        ring.slots[1].phase = Phase::Started;
        ring.submit().unwrap();
        let drained = ring.drain(Duration::from_millis(50));
        assert_eq!((drained.reaped, drained.leaked), (2, 1));
        assert_eq!(ring.in_flight(), 0);
        drop(ring);
        assert_eq!(Arc::strong_count(&fd), 2);
    }
}
