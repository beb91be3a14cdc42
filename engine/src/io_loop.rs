//! The I/O thread: one thread moves the bytes of all devices of a session, over one ring.
//!
//! ```text
//!          ┌───────────────────────────────────────────────────────────────────────────────┐
//!          ▼                                                                               │
//!   take in new transfers ─▶ each: told to stop? idle? give the ring its next batch ─▶ lie down,
//!   (attach)                                                                        look again, or
//!          ▲                                                                        sleep in the ring
//!          └──────────── each completion to its transfer ◀── reap ◀────────────────────────┘
//! ```
//!
//! A [`Transfer`] is one device's bytes on the I/O thread; `load.rs` and `save.rs` have one kind each. The
//! I/O thread owns the transfers and the ring. Other threads only attach transfers, ring the doorbell, and
//! read the result that a transfer leaves when it finishes. On a device the I/O thread makes no call but the
//! ring's operations, and `lseek` on a regular file. Other threads make the state changes, resets and
//! callbacks, so no device delays another's bytes.
//!
//! # What ends each wait
//!
//! | wait | ended by |
//! |---|---|
//! | the I/O thread, in the ring | a completion; a wake; [`RECHECK`] |
//! | a transfer | its end; a stop; `no_progress` |
//! | a stopped transfer whose operations the kernel still has | their completion; or the grace time, after which file and buffers are leaked |
//! | a ring whose waits fail for want of memory | a wait that does not fail; the grace time |

use std::{
    fmt, mem, thread,
    time::{Duration, Instant},
};

use crossbeam_epoch::{Collector, Guard, LocalHandle};
use nix::errno::Errno;
use vfio_migration_uring::{Completion, Ring, Waker, later};

use crate::{
    error::{Error, ErrorKind, Phase},
    lane::{Buffer, Filled, Lane, Progress},
    reorder::{
        doorbell::Doorbell,
        waiters::{NOTICE_LOOK, NOTICE_LOOKS, RECHECK},
    },
    stats::Counter,
    sync::{
        Arc, Mutex,
        atomic::{
            AtomicBool,
            Ordering::{AcqRel, Acquire, Release},
        },
        lock,
    },
};

/// How soon to try again what the ring could not do for want of memory.
const RETRY: Duration = Duration::from_millis(1);

/// What a transfer works with during one call.
pub(crate) struct Context<'a> {
    /// Where its lane's operations go.
    pub(crate) ring: &'a mut dyn Ring<Buffer>,
    /// Protects the segments that it looks at.
    pub(crate) guard: &'a Guard,
    /// How many lanes were busy at the end of the round before.
    pub(crate) busy: usize,
}

/// What a transfer did when it was asked to go on.
#[derive(Debug)]
pub(crate) enum TransferState {
    /// It gave the ring something.
    Busy,
    /// It has nothing to give, and that is nobody's fault: it has not been started, or waits for
    /// this host's own threads.
    Held,
    /// It has nothing to give, and the peer should hurry.
    Starved,
    /// It is done, well or not.
    Finished(Result<(), Error>),
}

/// One device's transfer, as the I/O thread sees it.
pub(crate) trait Transfer: Send {
    /// Its lane.
    fn lane(&mut self) -> &mut Lane;

    /// Gives its lane a completion.
    fn complete(&mut self, completion: Completion<Buffer>, ring: &mut dyn Ring<Buffer>)
    -> Progress;

    /// Why it should end early, if it should.
    fn stop(&self) -> Option<Error>;

    /// Gives the ring the next batch. The lane is idle.
    fn advance(&mut self, context: &mut Context<'_>) -> TransferState;

    /// Whether [`Transfer::prepare`] would find something to do.
    fn can_prepare(&self, guard: &Guard) -> bool {
        let _ = guard;
        false
    }

    /// Puts the next batch together while the lane is busy with one.
    ///
    /// # Errors
    ///
    /// Ends the transfer, once the lane is idle.
    fn prepare(&mut self, guard: &Guard) -> Result<(), Error> {
        let _ = guard;
        Ok(())
    }

    /// A part of the batch is through, and the lane is busy with the rest: reads that were whole.
    ///
    /// # Errors
    ///
    /// Ends the flow, once the lane is idle.
    fn part_done(&mut self, filled: Vec<Filled>, guard: &Guard) -> Result<(), Error>;

    /// The batch is through; `filled` are a read's buffers, and none of a write's.
    ///
    /// # Errors
    ///
    /// Ends the transfer.
    fn batch_done(&mut self, filled: Vec<Filled>, guard: &Guard) -> Result<(), Error>;

    /// What a failed transfer means.
    fn failed(&self, index: u32, moved: usize, source: std::io::Error) -> Error;

    /// Stores what this starved transfer waits for, before the I/O thread sleeps.
    fn starve(&mut self);

    /// Whether there is something to do after all.
    fn is_ready(&mut self, guard: &Guard) -> bool;

    /// Whether another thread is in a call on its data fd, in its lane's stead. Where that has ended the flow
    /// has the data fd back.
    fn is_held(&mut self) -> bool {
        false
    }

    /// When it wants to be looked at again, whether or not anybody rings.
    fn look_again(&self) -> Option<Instant> {
        None
    }

    /// The I/O thread has slept until then, and nobody rang.
    fn slept_until(&mut self, then: Instant) {
        let _ = then;
    }

    /// Nothing has moved for too long: what it misses.
    fn stalled(&self) -> Error;

    /// Leaves the result to whoever waits for it. `lane` has been given up.
    fn finish(self, result: Result<(), Error>);
}

/// Times that bound an I/O thread's waits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// From a stop to the leak of what the kernel does not give back.
    pub(crate) grace: Duration,
    /// Without any progress, once the switchover has begun.
    pub(crate) no_progress: Duration,
}

/// What other threads share with an I/O thread.
pub(crate) struct IoHandle<F> {
    pub(crate) doorbell: Doorbell,
    waker: Waker,
    incoming: Mutex<Vec<(u32, F)>>,
    has_incoming: AtomicBool,
    closing: AtomicBool,
    /// Calls into the ring.
    pub(crate) ring_calls: Counter,
    /// What the bounded re-check found.
    pub(crate) late: Counter,
    /// Operations that the kernel did not give back in time.
    pub(crate) leaked: Counter,
    /// Channels' writes that the driver did not give back in time.
    pub(crate) kept: Counter,
}

impl<F> IoHandle<F> {
    pub(crate) fn new(waker: Waker) -> Self {
        Self {
            doorbell: Doorbell::new(),
            waker,
            incoming: Mutex::new(Vec::new()),
            has_incoming: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            ring_calls: Counter::default(),
            late: Counter::default(),
            leaked: Counter::default(),
            kept: Counter::default(),
        }
    }

    /// Gives the I/O thread a device's transfer. `ordinal` is that of its lane, and no other's for as
    /// long as the I/O thread runs. Gives the transfer back where the I/O thread has ended.
    pub(crate) fn attach(&self, ordinal: u32, flow: F) -> Result<(), F> {
        let mut incoming = lock(&self.incoming);
        // Under the lock, under which the I/O thread empties the list for the last time.
        if self.closing.load(Acquire) {
            return Err(flow);
        }
        incoming.push((ordinal, flow));
        self.has_incoming.store(true, Release);
        drop(incoming);
        self.wake();
        Ok(())
    }

    /// Lets the I/O thread end when its last transfer has.
    pub(crate) fn close(&self) {
        let incoming = lock(&self.incoming);
        self.closing.store(true, Release);
        drop(incoming);
        self.wake();
    }

    /// Drops what the I/O thread has not taken in: it has ended.
    pub(crate) fn abandon(&self) {
        self.closing.store(true, Release);
        let left = mem::take(&mut *lock(&self.incoming));
        drop(left);
    }

    /// Wakes the I/O thread for something that it looks at in every round.
    pub(crate) fn wake(&self) {
        if self.doorbell.ring() {
            self.waker.wake();
        }
    }

    /// Wakes the I/O thread, where the caller's hand-over has said so.
    pub(crate) fn wake_if(&self, must: bool) {
        if must {
            self.waker.wake();
        }
    }
}

impl<F> fmt::Debug for IoHandle<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle")
            .field("doorbell", &self.doorbell)
            .finish_non_exhaustive()
    }
}

/// One lane's place.
enum LaneSlot<F> {
    Free,
    Active {
        flow: F,
        starved: bool,
        /// When it last waited for this host's own threads.
        held: Instant,
        /// The stop that the transfer is ending for, and until when its operations may take.
        ending: Option<(Error, Instant)>,
    },
    /// The kernel kept this many of its operations beyond the grace time.
    Abandoned(usize),
}

/// The I/O thread.
pub(crate) struct IoLoop<F> {
    handle: Arc<IoHandle<F>>,
    ring: Box<dyn Ring<Buffer>>,
    slots: Vec<LaneSlot<F>>,
    active: usize,
    round: usize,
    /// How many lanes were busy at the end of the round before.
    busy: usize,
    limits: Limits,
    last_progress: Instant,
    /// Since when the ring's waits have failed.
    failing: Option<Instant>,
}

impl<F: Transfer> IoLoop<F> {
    pub(crate) fn new(
        handle: Arc<IoHandle<F>>,
        ring: Box<dyn Ring<Buffer>>,
        limits: Limits,
    ) -> Self {
        Self {
            handle,
            ring,
            slots: Vec::new(),
            active: 0,
            round: 0,
            busy: 0,
            limits,
            last_progress: Instant::now(),
            failing: None,
        }
    }

    /// Runs until it is closed and its last transfer has finished. `progressed` is called in each round,
    /// before the wait, also where nothing has moved. `broken` is told where the ring cannot be waited
    /// for any more, before any transfer is.
    pub(crate) fn run(
        mut self,
        collector: &Collector,
        progressed: impl Fn(),
        broken: impl FnOnce(Error),
    ) {
        let epoch = collector.register();
        loop {
            self.take_in();
            let guard = epoch.pin();
            self.visit(&guard);
            if self.active == 0 && self.handle.closing.load(Acquire) {
                // `attach` refuses from now on: the list is empty for good.
                self.take_in();
                if self.active == 0 {
                    break;
                }
            }
            self.prepare(&guard);
            self.handle.doorbell.lie_down();
            if self.must_stay_up(&guard) {
                self.handle.doorbell.get_up();
                drop(guard);
                progressed();
                continue;
            }
            // Not while asleep: a pinned thread holds up everybody's garbage.
            drop(guard);
            progressed();
            self.handle.ring_calls.add(1);
            let bound = self.bound();
            let then = later(Instant::now(), bound);
            let waited = self.ring.wait(Some(bound));
            let first = self.ring.reap();
            if first.is_none() && matches!(waited, Ok(false)) {
                if bound < RECHECK {
                    // Nobody rings for a transfer that asked to be looked at sooner.
                    self.slept_until(then);
                } else if self.is_unannounced(&epoch) {
                    self.handle.late.add(1);
                }
            }
            self.handle.doorbell.get_up();
            self.reap(first, &epoch.pin());
            match waited {
                Ok(_) => self.failing = None,
                // Short of memory, which passes; or else the grace time does.
                Err(error) if passes(&error) && !self.is_out_of_patience() => {
                    thread::sleep(RETRY);
                    continue;
                }
                Err(error) => return self.give_up(&error, broken),
            }
        }
        let leaking = self
            .slots
            .iter()
            .any(|slot| matches!(slot, LaneSlot::Abandoned(_)));
        let grace = if leaking {
            Duration::ZERO
        } else {
            self.limits.grace
        };
        let _leaked = self.ring.drain(grace);
    }

    fn take_in(&mut self) {
        if !self.handle.has_incoming.swap(false, AcqRel) {
            return;
        }
        for (ordinal, flow) in mem::take(&mut *lock(&self.handle.incoming)) {
            let at = ordinal as usize;
            if self.slots.len() <= at {
                self.slots.resize_with(at + 1, || LaneSlot::Free);
            }
            assert!(
                matches!(self.slots[at], LaneSlot::Free),
                "an ordinal is one device's"
            );
            self.slots[at] = LaneSlot::Active {
                flow,
                starved: false,
                held: Instant::now(),
                ending: None,
            };
            self.active += 1;
            self.last_progress = Instant::now();
        }
    }

    /// Lets every transfer look at what it was told, and go on where its lane is idle.
    fn visit(&mut self, guard: &Guard) {
        let now = Instant::now();
        // Each round begins with another transfer, so that all come to what there is to be had.
        self.round = self.round.wrapping_add(1);
        let busy = mem::take(&mut self.busy);
        for step in 0..self.slots.len() {
            let at = (self.round + step) % self.slots.len();
            let LaneSlot::Active {
                flow,
                starved,
                held,
                ending,
            } = &mut self.slots[at]
            else {
                continue;
            };
            self.busy += usize::from(!flow.lane().is_idle());
            if let Some((_, until)) = ending {
                if flow.lane().is_idle() && !flow.is_held() {
                    let (error, _) = ending.take().expect("seen above");
                    self.finish(at, Err(error));
                } else if now >= *until {
                    self.abandon(at);
                }
                continue;
            }
            let mut stop = flow.stop();
            if stop.is_none() && !flow.lane().is_idle() {
                let stuck = now.duration_since(flow.lane().submitted()) > self.limits.no_progress;
                stop = stuck.then(|| flow.stalled());
            }
            if let Some(error) = stop {
                self.end(at, error, now);
                continue;
            }
            if !flow.lane().is_idle() {
                continue;
            }
            let mut context = Context {
                ring: &mut *self.ring,
                guard,
                busy,
            };
            match flow.advance(&mut context) {
                TransferState::Busy => {
                    *starved = false;
                    self.busy += 1;
                    self.last_progress = now;
                }
                TransferState::Held => {
                    flow.starve();
                    *starved = true;
                    *held = now;
                }
                TransferState::Starved => {
                    flow.starve();
                    *starved = true;
                    let since = self.last_progress.max(*held);
                    if now.duration_since(since) > self.limits.no_progress {
                        let error = flow.stalled();
                        self.end(at, error, now);
                    }
                }
                TransferState::Finished(result) => self.finish(at, result),
            }
        }
    }

    /// Lets every transfer whose lane is busy put its next batch together, while the kernel works.
    fn prepare(&mut self, guard: &Guard) {
        let mut submitted = false;
        for at in 0..self.slots.len() {
            let LaneSlot::Active {
                flow, ending: None, ..
            } = &mut self.slots[at]
            else {
                continue;
            };
            if flow.lane().is_idle() || !flow.can_prepare(guard) {
                continue;
            }
            if !submitted {
                submitted = true;
                // Where that fails the wait says so.
                let _again = self.ring.submit();
            }
            if let Err(error) = flow.prepare(guard) {
                self.end(at, error, Instant::now());
            }
        }
    }

    /// Stops a transfer: at once where its lane is idle, else when its operations have come back.
    fn end(&mut self, at: usize, error: Error, now: Instant) {
        let LaneSlot::Active {
            flow,
            starved,
            ending,
            ..
        } = &mut self.slots[at]
        else {
            return;
        };
        if flow.lane().is_idle() && !flow.is_held() {
            self.finish(at, Err(error));
        } else {
            *starved = false;
            flow.lane().cancel(&mut *self.ring);
            *ending = Some((error, later(now, self.limits.grace)));
        }
    }

    fn finish(&mut self, at: usize, result: Result<(), Error>) {
        if let LaneSlot::Active { flow, .. } = mem::replace(&mut self.slots[at], LaneSlot::Free) {
            self.active -= 1;
            self.last_progress = Instant::now();
            flow.finish(result);
        }
    }

    /// Gives up on a transfer whose operations the kernel does not give back.
    fn abandon(&mut self, at: usize) {
        if let LaneSlot::Active {
            mut flow, ending, ..
        } = mem::replace(&mut self.slots[at], LaneSlot::Free)
        {
            self.active -= 1;
            let (why, _) = ending.expect("only a flow that was stopped is given up");
            let leaked = flow.lane().abandon();
            self.handle.leaked.add(leaked as u64);
            self.handle.kept.add(flow.is_held().into());
            self.slots[at] = LaneSlot::Abandoned(leaked);
            flow.finish(Err(why.with_kind(ErrorKind::Stuck)));
        }
    }

    /// Before a sleep: each starved transfer says what it waits for, then all are looked at again.
    fn must_stay_up(&mut self, guard: &Guard) -> bool {
        if self.handle.has_incoming.load(Acquire) {
            return true;
        }
        let closing = self.handle.closing.load(Acquire);
        if closing && self.active == 0 {
            return true;
        }
        self.slots.iter_mut().any(|slot| match slot {
            LaneSlot::Active {
                flow,
                starved,
                ending: None,
                ..
            } => flow.stop().is_some() || *starved && flow.is_ready(guard),
            LaneSlot::Active {
                flow,
                ending: Some(_),
                ..
            } => flow.lane().is_idle() && !flow.is_held(),
            _ => false,
        })
    }

    fn slept_until(&mut self, then: Instant) {
        for slot in &mut self.slots {
            if let LaneSlot::Active { flow, .. } = slot {
                flow.slept_until(then);
            }
        }
    }

    /// After a sleep that only its bound has ended, and still lying: whether there is something that
    /// no ringer announces. One may have made it so in this very moment, and not have come to the
    /// doorbell yet: it is given as long again.
    fn is_unannounced(&mut self, epoch: &LocalHandle) -> bool {
        for _ in 0..NOTICE_LOOKS {
            let guard = epoch.pin();
            let first = self.ring.reap();
            if self.reap(first, &guard) || !self.must_stay_up(&guard) {
                return false;
            }
            drop(guard);
            if !matches!(self.ring.wait(Some(NOTICE_LOOK)), Ok(false)) {
                return false;
            }
        }
        true
    }

    /// How long to sleep at most.
    fn bound(&self) -> Duration {
        let now = Instant::now();
        let deadlines = self.slots.iter().filter_map(|slot| match slot {
            LaneSlot::Active {
                ending: Some((_, until)),
                ..
            } => Some(until.saturating_duration_since(now)),
            LaneSlot::Active {
                flow, ending: None, ..
            } => Some(flow.look_again()?.saturating_duration_since(now)),
            _ => None,
        });
        deadlines.fold(RECHECK, Duration::min)
    }

    /// Hands this completion to its transfer, and all that follow. Returns whether there was one.
    fn reap(&mut self, first: Option<Completion<Buffer>>, guard: &Guard) -> bool {
        let any = first.is_some();
        let mut next = first;
        while let Some(completion) = next {
            self.completed(completion, guard);
            next = self.ring.reap();
        }
        if any {
            self.last_progress = Instant::now();
        }
        any
    }

    fn completed(&mut self, completion: Completion<Buffer>, guard: &Guard) {
        let at = Lane::ordinal_of(completion.token);
        let (flow, ending) = match &mut self.slots[at] {
            LaneSlot::Active { flow, ending, .. } => (flow, ending),
            LaneSlot::Abandoned(left) => {
                // Too late: the device has been given up. What came back is freed after all.
                *left -= 1;
                return;
            }
            LaneSlot::Free => unreachable!("a flow finishes when its lane is idle"),
        };
        let progress = flow.complete(completion, &mut *self.ring);
        let result = match progress {
            Progress::Busy => return,
            Progress::Part(filled) => {
                // Of a flow that ends nothing more is wanted.
                if ending.is_none()
                    && let Err(error) = flow.part_done(filled, guard)
                {
                    self.end(at, error, Instant::now());
                }
                return;
            }
            Progress::Idle(filled) => flow.batch_done(filled, guard),
            Progress::Failed {
                index,
                moved,
                source,
            } => Err(flow.failed(index, moved, source)),
            Progress::Cancelled => Ok(()),
        };
        match (ending.take(), result) {
            // The device's own error says more than the stop that came on top.
            (_, Err(error)) => self.finish(at, Err(error)),
            (Some((error, _)), Ok(())) => self.finish(at, Err(error)),
            (None, Ok(())) => {}
        }
    }

    /// Whether the ring's waits have failed for longer than the grace time.
    fn is_out_of_patience(&mut self) -> bool {
        let since = *self.failing.get_or_insert_with(Instant::now);
        since.elapsed() > self.limits.grace
    }

    /// The ring is broken: what it has is taken back, or leaked where the kernel keeps it.
    fn give_up(mut self, error: &std::io::Error, broken: impl FnOnce(Error)) {
        let cause = || match error.raw_os_error() {
            Some(errno) => std::io::Error::from_raw_os_error(errno),
            // What the embedder has said of a worker.
            None => std::io::Error::new(error.kind(), error.to_string()),
        };
        let host = || Error::new(ErrorKind::Host, Phase::Load).caused_by(cause());
        // First, so that what follows from it is not taken for the reason.
        broken(host());
        let leaked = self.ring.drain(self.limits.grace).leaked > 0;
        for at in 0..self.slots.len() {
            if let LaneSlot::Active { ending, flow, .. } = &mut self.slots[at] {
                let why = flow.stalled().with_kind(ErrorKind::Host).caused_by(cause());
                // Which lane's operations were leaked nobody knows.
                if !flow.is_held() && (flow.lane().is_idle() || !leaked) {
                    self.finish(at, Err(why));
                } else {
                    *ending = Some((why, Instant::now()));
                    self.abandon(at);
                }
            }
        }
        self.handle.close();
        self.take_in();
        for at in 0..self.slots.len() {
            self.finish(at, Err(host()));
        }
    }
}

/// Whether the ring may do better the next time.
fn passes(error: &std::io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EAGAIN | Errno::EBUSY | Errno::ENOMEM))
}

impl<F> fmt::Debug for IoLoop<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoLoop")
            .field("active", &self.active)
            .finish_non_exhaustive()
    }
}
