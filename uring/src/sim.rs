//! A seeded ring for tests: real files; operations complete out of order, short, interrupted, or failing as
//! told.
//!
//! ```text
//!   push ─▶ pending ─▶ submit ─▶ chains ──────────────▶ pick ─────▶ step ─▶ ready ─▶ reap
//!                                  ▲    first of each    by seed      │
//!                                  │    that is ready                 │
//!                                  └────────── the chain's next ◀─────┘
//! ```
//!
//! One thread calls all of this, and things happen only in its calls. [`submit`](Ring::submit) and
//! [`wait`](Ring::wait) execute operations by plain system calls that do not block, and `poll(2)` tells
//! which operations those are. So a run depends on the seed and on the files. If the files behave the same
//! each time, the run is the same each time.
//!
//! # What ends a wait
//!
//! A wait sleeps only when no operation can be executed, in one `poll(2)`. It ends when a file is ready, a
//! wake comes, or the time has passed. An operation that a [`Fault`] hangs ends no wait.
//!
//! # Positions
//!
//! If an operation at a regular file's own position is cut short, the position does not move, as with
//! io_uring when an error cuts it. So a test here catches a caller that continues there without naming the
//! position.
//!
//! # Faults
//!
//! Operations are numbered from 0 in the order in which they begin to execute. An operation that is
//! cancelled before has no number. A harness runs once without faults, reads [`FaultPlan::executed`], and
//! then runs again with a fault at each number below that.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt, io, mem,
    os::fd::AsRawFd,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use nix::{
    sys::stat::SFlag,
    unistd::{Whence, lseek},
};

use crate::{
    Buffer, Completion, Drained, Link, Op, Rejected, Ring, Token, Waker,
    ring::check_capacity,
    syscall::{self, Progress, Step},
    time::deadline,
};

/// What a [`SimRing`] does. The default does everything right, one operation after the other.
#[derive(Clone, Debug)]
pub struct SimConfig {
    /// Decides all that is left to chance.
    pub seed: u64,
    /// How many operations may be in flight.
    pub capacity: usize,
    /// How many transfers in a hundred move fewer bytes than they could, but at least one.
    pub short: u8,
    /// How many transfers in a hundred end with `EINTR`, and move nothing.
    pub interrupt: u8,
    /// How many transfers in a hundred end with `EAGAIN`, and move nothing.
    pub again: u8,
    /// How many times in a hundred an operation that could be executed is left for later.
    pub delay: u8,
    /// Whether chains are executed out of their order, and cancellations come too late. An
    /// operation is never executed before the one that it is linked to.
    pub reorder: bool,
    /// What goes wrong, and where.
    pub plan: FaultPlan,
    /// What a wait does instead of sleeping. It sleeps unless set.
    pub idle: Option<Idle>,
}

/// Called where a wait would sleep, again and again until it says true (and the wait returns as
/// when its time has passed) or there is something to do. It is told whether there was, since the
/// call before, and how long the wait lasts at most: a test that steps a whole session in one thread
/// gives its other tasks their turn here.
#[derive(Clone)]
pub struct Idle(pub Arc<dyn Fn(bool, Duration) -> bool + Send + Sync>);

impl fmt::Debug for Idle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Idle")
    }
}

impl Default for SimConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            capacity: 64,
            short: 0,
            interrupt: 0,
            again: 0,
            delay: 0,
            reorder: false,
            plan: FaultPlan::new(),
            idle: None,
        }
    }
}

/// What goes wrong with one operation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// It ends with this errno, and moves nothing.
    Errno(i32),
    /// It moves this many bytes at most.
    Short(usize),
    /// It does nothing until it is cancelled.
    Hang,
    /// It does nothing, and cannot be cancelled: a drain leaks it.
    Stick,
}

/// Which operations go wrong, by their number, and how many there were. A handle: clones share one
/// plan, so that a harness can change and read it while a ring runs by it, and several rings can
/// run by one, numbered together.
#[derive(Clone, Debug, Default)]
pub struct FaultPlan {
    inner: Arc<Mutex<Plan>>,
}

#[derive(Debug, Default)]
struct Plan {
    faults: BTreeMap<u64, Fault>,
    executed: u64,
}

impl FaultPlan {
    /// A plan in which nothing goes wrong.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The same plan, with one more fault.
    #[must_use]
    pub fn with(self, number: u64, fault: Fault) -> Self {
        self.set(number, fault);
        self
    }

    /// Lets the operation with this number go wrong.
    pub fn set(&self, number: u64, fault: Fault) {
        self.lock().faults.insert(number, fault);
    }

    /// How many operations have begun to execute: the next one's number.
    #[must_use]
    pub fn executed(&self) -> u64 {
        self.lock().executed
    }

    /// Numbers the next operation, and tells what is planned for it.
    fn next(&self) -> Option<Fault> {
        let mut plan = self.lock();
        let number = plan.executed;
        plan.executed += 1;
        plan.faults.get(&number).copied()
    }

    fn lock(&self) -> MutexGuard<'_, Plan> {
        self.inner
            .lock()
            .expect("nothing panics while it holds the lock")
    }
}

/// A simulation, behind [`Ring`].
pub struct SimRing<B: Buffer> {
    config: SimConfig,
    random: Random,
    waker: Waker,
    /// Which tokens are in flight.
    taken: Box<[bool]>,
    in_flight: usize,
    /// Pushed, and not submitted yet.
    pending: Vec<(Token, Op<B>, Link)>,
    /// Submitted, and not ended.
    chains: Vec<Chain<B>>,
    /// To be cancelled by the next call that executes, and whether that may come too late: what
    /// was not started then never is.
    cancels: Vec<(Token, bool)>,
    ready: VecDeque<Completion<B>>,
    closed: bool,
}

/// Operations that are executed in their order. Never empty.
struct Chain<B> {
    /// How the first operation stands.
    first: First,
    ops: VecDeque<(Token, Op<B>, Link)>,
}

/// How the first operation of a chain stands.
#[derive(Debug)]
enum First {
    /// It has no number yet.
    Waiting,
    /// It has moved a part, perhaps.
    Moving(Progress),
    /// Until it is cancelled.
    Hanging,
    /// For ever.
    Stuck,
}

impl<B: Buffer> Chain<B> {
    /// What to poll for before the first operation's next step. None where no step will come.
    fn polled(&self) -> Option<libc::pollfd> {
        match self.first {
            First::Hanging | First::Stuck => None,
            First::Waiting | First::Moving(_) => {
                let (_, op, _) = self.ops.front().expect("a chain is never empty");
                Some(syscall::entry(op.fd().as_raw_fd(), syscall::wanted(op)))
            }
        }
    }

    /// Executes the first operation as far as it goes, when `poll(2)` has just said `revents`.
    fn step(&mut self, config: &SimConfig, random: &mut Random, revents: i16) -> Step {
        let (_, op, link) = self.ops.front_mut().expect("a chain is never empty");
        if let First::Waiting = self.first {
            let mut limit = usize::MAX;
            let is_transfer = !matches!(op, Op::Poll { .. });
            match config.plan.next() {
                Some(Fault::Errno(errno)) => {
                    return Step::Ended(Err(io::Error::from_raw_os_error(errno)));
                }
                Some(Fault::Short(bytes)) => limit = bytes,
                Some(Fault::Hang) => self.first = First::Hanging,
                Some(Fault::Stick) => self.first = First::Stuck,
                None if is_transfer && random.percent(config.interrupt) => {
                    return Step::Ended(Err(io::Error::from_raw_os_error(libc::EINTR)));
                }
                None if is_transfer && random.percent(config.again) => {
                    return Step::Ended(Err(io::Error::from_raw_os_error(libc::EAGAIN)));
                }
                None if is_transfer && random.percent(config.short) => {
                    // At least one byte: none would be the end of the data.
                    limit = 1 + random.below(op.requested().saturating_sub(1).max(1));
                }
                None => {}
            }
            if let First::Waiting = self.first {
                self.first = First::Moving(Progress::new(op, *link, limit));
            }
        }
        match &mut self.first {
            First::Moving(progress) => {
                let step = progress.step(op, revents);
                if let Step::Ended(Ok(moved)) = step
                    && progress.is_cut(op, moved)
                {
                    step_back(op, moved);
                }
                step
            }
            First::Waiting | First::Hanging | First::Stuck => Step::NotYet,
        }
    }
}

impl<B: Buffer> SimRing<B> {
    /// Makes a ring, woken by `waker`.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for a capacity of 0 or beyond [`MAX_CAPACITY`](crate::MAX_CAPACITY).
    pub fn new(config: SimConfig, waker: Waker) -> io::Result<Self> {
        check_capacity(config.capacity)?;
        Ok(Self {
            random: Random(config.seed),
            waker,
            taken: vec![false; config.capacity].into(),
            in_flight: 0,
            pending: Vec::new(),
            chains: Vec::new(),
            cancels: Vec::new(),
            ready: VecDeque::new(),
            closed: false,
            config,
        })
    }

    /// The plan that the ring runs by.
    #[must_use]
    pub fn plan(&self) -> FaultPlan {
        self.config.plan.clone()
    }

    /// Makes chains of what was pushed.
    fn start(&mut self) {
        let mut open = VecDeque::new();
        for (token, op, link) in mem::take(&mut self.pending) {
            open.push_back((token, op, link));
            if link == Link::End {
                self.chains.push(Chain {
                    first: First::Waiting,
                    ops: mem::take(&mut open),
                });
            }
        }
        if let Some((_, _, link)) = open.back_mut() {
            *link = Link::End;
            self.chains.push(Chain {
                first: First::Waiting,
                ops: open,
            });
        }
    }

    /// Does what was cancelled, and is still there.
    fn apply_cancels(&mut self) -> io::Result<()> {
        for (token, late) in mem::take(&mut self.cancels) {
            let Some(chain) = self.find(token) else {
                continue;
            };
            let is_first = self.chains[chain].ops[0].0 == token;
            if late && is_first && self.config.reorder && self.random.percent(50) {
                let revents = self.poll_chains(Some(Duration::ZERO), false)?[chain];
                if revents != 0 {
                    self.step(chain, revents);
                }
            }
            self.cancel_now(token);
        }
        Ok(())
    }

    /// Which chain an operation is in.
    fn find(&self, token: Token) -> Option<usize> {
        self.chains
            .iter()
            .position(|chain| chain.ops.iter().any(|(other, ..)| *other == token))
    }

    /// Ends an operation, and what is linked behind it.
    fn cancel_now(&mut self, token: Token) {
        let Some(index) = self.find(token) else {
            return;
        };
        let chain = &mut self.chains[index];
        let at = chain
            .ops
            .iter()
            .position(|(other, ..)| *other == token)
            .expect("just found");
        if at > 0 {
            let mut rest = chain.ops.split_off(at);
            Self::cancel_rest(&mut self.ready, &mut rest);
            // What goes before is a chain of its own now.
            if let Some((_, _, link)) = chain.ops.back_mut() {
                *link = Link::End;
            }
            return;
        }
        let result = match &chain.first {
            First::Stuck => return,
            First::Waiting | First::Hanging => Err(syscall::canceled()),
            First::Moving(progress) => progress.cancelled(),
        };
        self.end(index, result);
    }

    /// Ends the first operation of a chain.
    fn end(&mut self, index: usize, result: io::Result<usize>) {
        let chain = &mut self.chains[index];
        let (token, op, _) = chain.ops.pop_front().expect("a chain is never empty");
        chain.first = First::Waiting;
        let holds = op.holds_chain(&result);
        self.ready.push_back(Completion { token, op, result });
        if !holds {
            Self::cancel_rest(&mut self.ready, &mut chain.ops);
        }
        if chain.ops.is_empty() {
            self.chains.remove(index);
        }
    }

    fn cancel_rest(ready: &mut VecDeque<Completion<B>>, rest: &mut VecDeque<(Token, Op<B>, Link)>) {
        ready.extend(rest.drain(..).map(|(token, op, _)| Completion {
            token,
            op,
            result: Err(syscall::canceled()),
        }));
    }

    /// Polls for every chain's first operation, and for the waker if `wake`. Returns each chain's
    /// `revents`, 0 for one that hangs.
    fn poll_chains(&self, timeout: Option<Duration>, wake: bool) -> io::Result<Vec<i16>> {
        let mut polled: Vec<_> = self
            .chains
            .iter()
            // A negative number is an entry that poll passes over.
            .map(|chain| chain.polled().unwrap_or(syscall::entry(-1, 0)))
            .collect();
        if wake {
            polled.push(syscall::entry(self.waker.as_raw_fd(), libc::POLLIN));
        }
        syscall::poll(&mut polled, timeout)?;
        let revents = self.chains.iter().zip(&polled).map(|(chain, polled)| {
            let refused = polled.revents == 0
                && matches!(chain.first, First::Waiting)
                && syscall::is_refused(&chain.ops[0].1);
            if refused {
                libc::POLLERR
            } else {
                polled.revents
            }
        });
        Ok(revents.collect())
    }

    /// Executes the first operation of a chain as far as it goes.
    fn step(&mut self, index: usize, revents: i16) {
        let chain = &mut self.chains[index];
        if let Step::Ended(result) = chain.step(&self.config, &mut self.random, revents) {
            self.end(index, result);
        }
    }

    /// Executes one step of an operation that is ready, if there is one.
    fn advance(&mut self) -> io::Result<bool> {
        let revents = self.poll_chains(Some(Duration::ZERO), false)?;
        let mut runnable: Vec<_> = (0..revents.len())
            .filter(|chain| revents[*chain] != 0)
            .collect();
        if runnable.is_empty() {
            return Ok(false);
        }
        // Delays put one behind the others; the last one left is never delayed.
        while runnable.len() > 1 && self.random.percent(self.config.delay) {
            let delayed = self.random.below(runnable.len());
            runnable.remove(delayed);
        }
        let pick = if self.config.reorder {
            self.random.below(runnable.len())
        } else {
            0
        };
        let chain = runnable[pick];
        self.step(chain, revents[chain]);
        Ok(true)
    }

    fn take_ready(&mut self) -> Option<Completion<B>> {
        let completion = self.ready.pop_front()?;
        self.taken[completion.token.index()] = false;
        self.in_flight -= 1;
        Some(completion)
    }
}

impl<B: Buffer> Ring<B> for SimRing<B> {
    fn capacity(&self) -> usize {
        self.taken.len()
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn push(&mut self, token: Token, op: Op<B>, link: Link) -> Result<(), Rejected<B>> {
        if self.closed || !op.within_limits() {
            return Err(Rejected(op));
        }
        match self.taken.get_mut(token.index()) {
            Some(taken @ false) => {
                *taken = true;
                self.in_flight += 1;
                self.pending.push((token, op, link));
                Ok(())
            }
            _ => Err(Rejected(op)),
        }
    }

    fn cancel(&mut self, token: Token) {
        // Not what has ended: its token may name another operation by the next call.
        if self.find(token).is_some() {
            self.cancels.push((token, true));
        } else if self.pending.iter().any(|(other, ..)| *other == token) {
            self.cancels.push((token, false));
        }
    }

    fn submit(&mut self) -> io::Result<()> {
        if self.closed {
            return Ok(());
        }
        self.start();
        self.apply_cancels()?;
        // As many as come to mind, none included.
        for _ in 0..self.random.below(self.chains.len() + 1) {
            if self.random.percent(self.config.delay) || !self.advance()? {
                break;
            }
        }
        Ok(())
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<bool> {
        if self.closed {
            return Ok(false);
        }
        self.start();
        self.apply_cancels()?;
        // A time-out beyond the clock's end is none.
        let deadline = timeout.map(deadline);
        let mut fresh = true;
        loop {
            let woken = self.waker.take();
            if woken || !self.ready.is_empty() {
                return Ok(woken);
            }
            if self.advance()? {
                fresh = true;
                continue;
            }
            if let Some(Idle(idle)) = &self.config.idle {
                if idle(mem::take(&mut fresh), timeout.unwrap_or(Duration::MAX)) {
                    return Ok(false);
                }
                continue;
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Ok(false);
            }
            self.poll_chains(left, true)?;
        }
    }

    fn reap(&mut self) -> Option<Completion<B>> {
        self.take_ready()
    }

    /// Takes no time, whatever `grace` is: what cannot be cancelled now never can.
    fn drain(&mut self, _grace: Duration) -> Drained {
        let mut drained = Drained::default();
        if mem::replace(&mut self.closed, true) {
            return drained;
        }
        for (token, ..) in mem::take(&mut self.pending) {
            self.taken[token.index()] = false;
            self.in_flight -= 1;
            drained.reaped += 1;
        }
        let firsts: Vec<_> = self.chains.iter().map(|chain| chain.ops[0].0).collect();
        for token in firsts {
            self.cancel_now(token);
        }
        while let Some(completion) = self.take_ready() {
            drop(completion);
            drained.reaped += 1;
        }
        drained.leaked = mem::take(&mut self.in_flight);
        // What the operations that are left hold, and no more: a ring without such leaks nothing.
        mem::take(&mut self.chains)
            .into_iter()
            .for_each(mem::forget);
        drained
    }
}

impl<B: Buffer> Drop for SimRing<B> {
    fn drop(&mut self) {
        let _leaked = self.drain(Duration::ZERO);
    }
}

impl<B: Buffer> fmt::Debug for SimRing<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimRing")
            .field("config", &self.config)
            .field("in_flight", &self.in_flight)
            .field("pending", &self.pending.len())
            .field("ready", &self.ready.len())
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}

/// Takes a regular file's own position back to where it was before a transfer there moved so many
/// bytes.
fn step_back<B>(op: &Op<B>, moved: usize) {
    let (Op::Read { fd, .. }
    | Op::Write { fd, .. }
    | Op::ReadVectored { fd, .. }
    | Op::WriteVectored { fd, .. }) = op
    else {
        return;
    };
    if syscall::kind(fd) == Some(SFlag::S_IFREG) {
        let moved = libc::off_t::try_from(moved).expect("at most `Op::MAX_BYTES`");
        // Some regular files are streams.
        let _stream = lseek(fd, -moved, Whence::SeekCur);
    }
}

/// SplitMix64: small, and every seed is as good as any other.
#[derive(Clone, Debug)]
struct Random(u64);

impl Random {
    const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// A number below `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize {
        let end = u64::try_from(end).expect("no machine has more than 2^64 of anything");
        usize::try_from(self.next() % end).expect("below a usize")
    }

    /// Whether it happens, with this many chances in a hundred. Draws nothing for 0, so that a
    /// configuration without one kind of trouble does not depend on it.
    fn percent(&mut self, chances: u8) -> bool {
        chances > 0 && self.below(100) < usize::from(chances)
    }
}
