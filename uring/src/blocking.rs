//! A ring for hosts without io_uring: plain system calls on threads of the ring's own.
//!
//! ```text
//!            the ring's thread                     worker threads, one chain each
//!   push ─▶ pending ─▶ submit ─▶ jobs ─────▶ next ─▶ begin ─▶ poll, then read or write ─┐
//!                                                      ▲                                │
//!                                                      └─────── the chain's next ◀──────┤
//!   reap ◀──────────── ready ◀─────────────────────────────────────────────── finish ◀──┘
//! ```
//!
//! One thread calls the ring. The ring starts a worker for a new chain if no worker is idle, up to the
//! ring's capacity. So a transfer that blocks delays no other. A worker's thread is the ring's own, and blocks
//! all signals, or its owner's ([`SpawnWorker`]). Everything that both sides touch is in [`State`], behind one mutex, which nobody holds over a system call that can
//! sleep.
//!
//! # What ends each wait
//!
//! | who waits                     | for                                  | ended by           |
//! |-------------------------------|--------------------------------------|--------------------|
//! | the ring, in `wait`           | `ready` not empty: the `done` eventfd | `finish`          |
//! |                               | a wake: the waker's eventfd          | [`Waker::wake`]    |
//! |                               |                                      | the time-out       |
//! | the ring, in `drain`          | `ready` not empty                    | `finish`, the grace time |
//! | an idle worker                | `jobs` not empty, or `closed`        | `submit`, `drain`  |
//! | the ring, in `drain`          | workers without a handle to be gone   | their ends, the grace time |
//! | a worker, before a transfer   | its file, in `poll(2)`               | the file           |
//! |                               | the worker's interrupt eventfd       | `cancel`           |
//! | a worker, in `read` or `write` | the file's driver                   | the driver alone   |
//!
//! A kernel ring does better in the case of the last line. If a driver reports that it is ready and then
//! blocks in its read or write, this ring cannot interrupt it. A drain leaks that operation and its worker
//! after the grace time.
//!
//! `done` is written when `ready` ceases to be empty, and read before the ring looks at `ready` again. So
//! if the ring finds `ready` empty and sleeps on `done`, the next completion wakes it, because that
//! completion finds `ready` empty too.

use std::{
    collections::VecDeque,
    fmt, io, mem,
    os::fd::AsRawFd,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::{
    Buffer, Completion, Drained, Link, Op, Rejected, Ring, SpawnWorker, Token, Waker, Worker,
    ring::check_capacity,
    syscall::{self, Progress, Step},
    thread,
    time::deadline,
};

/// Plain system calls on threads, behind [`Ring`].
pub struct BlockingRing<B: Buffer> {
    shared: Arc<Shared<B>>,
    waker: Waker,
    grace: Duration,
    /// Which tokens are in flight.
    taken: Box<[bool]>,
    in_flight: usize,
    /// Pushed, and not submitted yet.
    pending: Chain<B>,
    workers: Vec<JoinHandle<()>>,
    spawn: Option<SpawnWorker>,
    closed: bool,
}

/// What the ring and its workers share.
struct Shared<B> {
    state: Mutex<State<B>>,
    /// Something came into `jobs`, or `closed` was set.
    work: Condvar,
    /// Something came into `ready`, which was empty, or into `lost`.
    done: Waker,
    /// A worker has gone.
    gone: Condvar,
}

struct State<B> {
    jobs: VecDeque<Chain<B>>,
    ready: VecDeque<Completion<B>>,
    slots: Box<[Slot]>,
    /// Workers that will come for a job without being started for it.
    idle: usize,
    /// Workers that have not ended.
    alive: usize,
    /// Why a worker has not come to work, until the ring's thread has seen it.
    lost: Option<io::Error>,
    /// No more jobs will come: idle workers exit.
    closed: bool,
    /// The ring is gone: what ends now is leaked, as was announced.
    abandoned: bool,
}

/// How to cancel the operation with one token.
#[derive(Clone, Default)]
struct Slot {
    cancelled: bool,
    /// Interrupts the worker that runs it.
    running: Option<Waker>,
}

/// Operations for one worker, in order.
type Chain<B> = Vec<Entry<B>>;

struct Entry<B> {
    token: Token,
    op: Op<B>,
    link: Link,
}

impl<B> Shared<B> {
    fn lock(&self) -> MutexGuard<'_, State<B>> {
        self.state
            .lock()
            .expect("nothing panics while it holds the lock")
    }

    /// Waits for a job. None when there will be no more.
    fn next(&self) -> Option<Chain<B>> {
        let mut state = self.lock();
        loop {
            if let Some(chain) = state.jobs.pop_front() {
                state.idle -= 1;
                return Some(chain);
            }
            if state.closed {
                return None;
            }
            state = self
                .work
                .wait(state)
                .expect("nothing panics while it holds the lock");
        }
    }

    /// Says that the operation is about to run. False when it has been cancelled.
    fn begin(&self, token: Token, interrupt: &Waker) -> bool {
        let slot = &mut self.lock().slots[token.index()];
        if !slot.cancelled {
            slot.running = Some(interrupt.clone());
        }
        !slot.cancelled
    }

    /// Hands over a completion; after the chain's last one the worker is idle.
    fn finish(&self, completion: Completion<B>, interrupt: &Waker, last: bool) {
        let mut state = self.lock();
        let slot = mem::take(&mut state.slots[completion.token.index()]);
        if slot.cancelled {
            // Nobody writes it now, for no slot names it: the next operation starts with a clean
            // one.
            interrupt.take();
        }
        if last {
            state.idle += 1;
        }
        if state.abandoned {
            mem::forget(completion);
            return;
        }
        let first = state.ready.is_empty();
        state.ready.push_back(completion);
        drop(state);
        if first {
            self.done.wake();
        }
    }
}

/// A worker's whole life, on its thread.
fn live<B: Buffer>(shared: &Shared<B>, interrupt: &Waker, begun: io::Result<()>) {
    let begun = begun.map(|()| work(shared, interrupt));
    let mut state = shared.lock();
    state.alive -= 1;
    shared.gone.notify_all();
    if let Err(error) = begun {
        state.idle -= 1;
        state.lost = Some(error);
        drop(state);
        shared.done.wake();
    }
}

/// A worker's work.
fn work<B: Buffer>(shared: &Shared<B>, interrupt: &Waker) {
    while let Some(chain) = shared.next() {
        let mut broken = false;
        let count = chain.len();
        for (index, mut entry) in chain.into_iter().enumerate() {
            let result = if broken || !shared.begin(entry.token, interrupt) {
                Err(syscall::canceled())
            } else {
                run(&mut entry, interrupt)
            };
            broken = broken || !entry.op.holds_chain(&result);
            let completion = Completion {
                token: entry.token,
                op: entry.op,
                result,
            };
            shared.finish(completion, interrupt, index + 1 == count);
        }
    }
}

/// Runs one operation to its end, or until `interrupt`.
fn run<B: Buffer>(entry: &mut Entry<B>, interrupt: &Waker) -> io::Result<usize> {
    let mut progress = Progress::new(&entry.op, entry.link, usize::MAX);
    let mut polled = [
        syscall::entry(entry.op.fd().as_raw_fd(), syscall::wanted(&entry.op)),
        syscall::entry(interrupt.as_raw_fd(), libc::POLLIN),
    ];
    // The first look does not wait: what would wait for ever must be told apart first.
    let mut timeout = Some(Duration::ZERO);
    loop {
        syscall::poll(&mut polled, timeout)?;
        let [mut file, interrupted] = polled.map(|entry| entry.revents);
        if file == 0 && timeout.take().is_some() && syscall::is_refused(&entry.op) {
            file = libc::POLLERR;
        }
        if file != 0
            && let Step::Ended(result) = progress.step(&mut entry.op, file)
        {
            return result;
        }
        if interrupted != 0 {
            return progress.cancelled();
        }
    }
}

impl<B: Buffer> BlockingRing<B> {
    /// Makes a ring for `capacity` operations, woken by `waker`, that waits for `grace` at most
    /// when it is dropped. Starts no thread yet.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for a capacity of 0 or beyond [`MAX_CAPACITY`](crate::MAX_CAPACITY);
    /// otherwise what `eventfd(2)` says.
    pub fn new(capacity: usize, waker: Waker, grace: Duration) -> io::Result<Self> {
        check_capacity(capacity)?;
        let state = State {
            jobs: VecDeque::with_capacity(capacity),
            ready: VecDeque::with_capacity(capacity),
            slots: vec![Slot::default(); capacity].into(),
            idle: 0,
            alive: 0,
            lost: None,
            closed: false,
            abandoned: false,
        };
        Ok(Self {
            shared: Arc::new(Shared {
                state: Mutex::new(state),
                work: Condvar::new(),
                done: Waker::new()?,
                gone: Condvar::new(),
            }),
            waker,
            grace,
            taken: vec![false; capacity].into(),
            in_flight: 0,
            pending: Vec::with_capacity(capacity),
            workers: Vec::new(),
            spawn: None,
            closed: false,
        })
    }

    /// Puts the workers on threads of the caller's.
    #[must_use]
    pub fn spawn_with(mut self, spawn: SpawnWorker) -> Self {
        self.spawn = Some(spawn);
        self
    }

    /// Starts a worker, which has been counted as idle.
    fn spawn(&self) -> io::Result<Option<JoinHandle<()>>> {
        let interrupt = Waker::new().inspect_err(|_| self.shared.lock().idle -= 1)?;
        let shared = self.shared.clone();
        self.shared.lock().alive += 1;
        let worker = Worker::new(move |begun| live(&shared, &interrupt, begun));
        let spawned = match &self.spawn {
            Some(spawn) => spawn(worker),
            None => thread::spawn("uring-worker", move || worker.run()).map(Some),
        };
        // Not run, it has said so already; a refusal says why.
        match (spawned, self.shared.lock().lost.take()) {
            (Err(error), _) | (Ok(_), Some(error)) => Err(error),
            (Ok(worker), None) => Ok(worker),
        }
    }

    fn reaped(&mut self, completion: Completion<B>) -> Completion<B> {
        self.taken[completion.token.index()] = false;
        self.in_flight -= 1;
        completion
    }
}

impl<B: Buffer> Ring<B> for BlockingRing<B> {
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
                self.pending.push(Entry { token, op, link });
                Ok(())
            }
            _ => Err(Rejected(op)),
        }
    }

    fn cancel(&mut self, token: Token) {
        if self.taken.get(token.index()) != Some(&true) {
            return;
        }
        let mut state = self.shared.lock();
        if state.ready.iter().any(|ended| ended.token == token) {
            return;
        }
        let slot = &mut state.slots[token.index()];
        slot.cancelled = true;
        if let Some(interrupt) = &slot.running {
            interrupt.wake();
        }
    }

    fn submit(&mut self) -> io::Result<()> {
        if self.closed {
            return Ok(());
        }
        let mut state = self.shared.lock();
        let mut chain = Vec::new();
        for mut entry in self.pending.drain(..) {
            let ends = entry.link == Link::End;
            if ends && chain.is_empty() {
                state.jobs.push_back(vec![entry]);
                continue;
            }
            entry.link = if ends { Link::End } else { Link::Next };
            chain.push(entry);
            if ends {
                state.jobs.push_back(mem::take(&mut chain));
            }
        }
        if let Some(open) = chain.last_mut() {
            open.link = Link::End;
            state.jobs.push_back(chain);
        }
        while state.jobs.len() > state.idle {
            state.idle += 1;
            drop(state);
            match self.spawn() {
                Ok(worker) => self.workers.extend(worker),
                Err(error) => {
                    self.shared.work.notify_all();
                    return Err(error);
                }
            }
            state = self.shared.lock();
        }
        let jobs = state.jobs.len();
        drop(state);
        // A worker counted as idle either sleeps or has yet to look at `jobs`.
        for _ in 0..jobs {
            self.shared.work.notify_one();
        }
        Ok(())
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<bool> {
        if self.closed {
            return Ok(false);
        }
        self.submit()?;
        // A time-out beyond the clock's end is none.
        let deadline = timeout.map(deadline);
        loop {
            {
                let mut state = self.shared.lock();
                if let Some(error) = state.lost.take() {
                    return Err(error);
                }
                if !state.ready.is_empty() {
                    return Ok(self.waker.take());
                }
            }
            let mut polled = [
                syscall::entry(self.shared.done.as_raw_fd(), libc::POLLIN),
                syscall::entry(self.waker.as_raw_fd(), libc::POLLIN),
            ];
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            syscall::poll(&mut polled, left)?;
            let [done, woken] = polled.map(|entry| entry.revents != 0);
            if done {
                self.shared.done.take();
            }
            if woken {
                return Ok(self.waker.take());
            }
            if !done && left == Some(Duration::ZERO) {
                return Ok(false);
            }
        }
    }

    fn reap(&mut self) -> Option<Completion<B>> {
        let completion = self.shared.lock().ready.pop_front()?;
        Some(self.reaped(completion))
    }

    fn drain(&mut self, grace: Duration) -> Drained {
        let mut drained = Drained::default();
        if mem::replace(&mut self.closed, true) {
            return drained;
        }
        let deadline = Some(deadline(grace));

        // What nobody has started ends here.
        let mut unstarted = mem::take(&mut self.pending);
        let mut state = self.shared.lock();
        unstarted.extend(state.jobs.drain(..).flatten());
        drop(state);
        for entry in unstarted {
            self.taken[entry.token.index()] = false;
            self.in_flight -= 1;
            drained.reaped += 1;
        }

        for token in 0..u32::try_from(self.taken.len()).expect("at most `MAX_CAPACITY`") {
            self.cancel(Token(token));
        }
        loop {
            while self.reap().is_some() {
                drained.reaped += 1;
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if self.in_flight == 0 || left == Some(Duration::ZERO) {
                break;
            }
            let mut polled = [syscall::entry(self.shared.done.as_raw_fd(), libc::POLLIN)];
            if syscall::poll(&mut polled, left).is_err() {
                // Short of memory, which passes; or else the grace time does.
                std::thread::sleep(Duration::from_millis(1));
            }
            self.shared.done.take();
        }

        let mut state = self.shared.lock();
        state.closed = true;
        // Nothing comes after these: whoever ends an operation from here on leaks it.
        state.abandoned = true;
        let last = mem::take(&mut state.ready);
        drop(state);
        self.shared.work.notify_all();
        for completion in last {
            drop(self.reaped(completion));
            drained.reaped += 1;
        }
        drained.leaked = mem::take(&mut self.in_flight);
        for worker in self.workers.drain(..) {
            // With nothing in flight each is idle and exits. Otherwise one may never do so, and
            // which one is not worth knowing.
            if drained.leaked == 0 {
                worker
                    .join()
                    .expect("a worker panics only where a buffer does");
            }
        }
        let mut state = self.shared.lock();
        while drained.leaked == 0 && state.alive > 0 {
            let left = deadline.map_or(grace, |at| at.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                break;
            }
            let waited = self.shared.gone.wait_timeout(state, left);
            state = waited.expect("nothing panics while it holds the lock").0;
        }
        drop(state);
        drained
    }
}

impl<B: Buffer> Drop for BlockingRing<B> {
    fn drop(&mut self) {
        let _leaked = self.drain(self.grace);
    }
}

impl<B: Buffer> fmt::Debug for BlockingRing<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockingRing")
            .field("capacity", &self.taken.len())
            .field("in_flight", &self.in_flight)
            .field("pending", &self.pending.len())
            .field("workers", &self.workers.len())
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}
