//! One device's data fd on the ring: one operation, or one linked chain, in flight at a time.
//!
//! ```text
//!   submit(batch) ──▶ [ step 0 ]─link─[ step 1 ]─link─[ step 2 ] ──▶ the kernel runs them in order
//!                         │               │               │
//!   complete(…)  ◀────────┴───────────────┴───────────────┘   in any order; judged when all are in
//!        │
//!        ├─ first reads whole    Part      handed out early, while the rest is in flight
//!        ├─ all whole            Idle      the next batch may come
//!        ├─ first short, or EINTR  Busy    it and the steps that were not started are resubmitted
//!        ├─ first errno          Failed    final: the step's idx and the errno
//!        └─ cancelled            Cancelled
//! ```
//!
//! A data fd is a stream, and the kernel runs its operations in worker threads: two unlinked operations would
//! silently corrupt the device. So a lane takes a batch only when it is idle. A short transfer breaks a
//! linked chain, and the kernel never starts the rest. With a vectored write, an error in the second segment
//! shows only as a short count, and the errno is lost. So a lane makes none: large packets are linked single
//! writes, and small ones are gathered into one contiguous buffer.
//!
//! A VFIO data fd is a stream, but a VMM's own data fd may be a regular file or a block device, which has
//! positions. If a full disk or a limit cuts a write short, the kernel does not move the file's position
//! (see [`Op::WriteAt`]). So the lane reads the position once, before the first batch, gives each operation
//! its own, and sets the file's position at the end, when the lane is dropped.
//!
//! | data fd | operations |
//! |---|---|
//! | a stream | without a position |
//! | a file with positions | each at its position: the lane's, plus the lengths of those before it in the chain |
//! | the same, opened with `O_APPEND` and written | without a position: the kernel goes to the end for each |
//!
//! The device's thread makes a lane, and looks at the file's type to do so. From then on only the I/O
//! thread uses the lane. The lane holds a clone of the device's data fd. It is closed when the lane is
//! dropped; if the kernel still has an operation it is leaked instead: see [`Lane::abandon`].

use std::{io, mem, time::Instant};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::stat::{SFlag, fstat},
    unistd::{Whence, lseek},
};
use vfio_migration_uring::{Completion, Fd, Link, Op, Ring, Token};

use crate::{
    reorder::pool::{Lease, Pool},
    stats::DeviceCounters,
    sync::Arc,
};

/// A buffer as rings take it.
pub(crate) type Buffer = Lease<Arc<Pool>>;

/// The most operations of one lane in flight: a chain's length.
pub(crate) const CHAIN: u32 = 8;

/// How often in a row a transfer may come back interrupted or with `EAGAIN` without a byte moved.
const MAX_IDLE_RETRIES: u32 = 1000;

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Direction {
    /// Into the device: load.
    Write,
    /// Out of the device: save.
    Read,
}

/// Where a lane's next byte goes, or comes from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Place {
    /// Where the file says. It is a stream, or appends.
    Stream,
    /// At the file's own position, which has not been looked at yet: until the first batch others may
    /// still move it.
    Own,
    /// Here.
    At(u64),
}

impl Place {
    /// How a file is to be used. No call here waits for an I/O thread.
    fn of(fd: &Fd, direction: Direction) -> Self {
        let kind = fstat(fd).map(|stat| SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT);
        if !matches!(kind, Ok(SFlag::S_IFREG | SFlag::S_IFBLK)) {
            return Self::Stream;
        }
        let flags = fcntl(fd, FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
        let appends = flags.is_ok_and(|flags| flags.contains(OFlag::O_APPEND));
        if direction == Direction::Write && appends {
            Self::Stream
        } else {
            Self::Own
        }
    }

    /// Looks at the file's own position.
    fn settle(&mut self, fd: &Fd) {
        if *self == Self::Own {
            let at = lseek(fd, 0, Whence::SeekCur).ok();
            // A file that cannot seek has no positions, whatever its type.
            *self = at
                .and_then(|at| u64::try_from(at).ok())
                .map_or(Self::Stream, Self::At);
        }
    }

    /// The place so many bytes further on.
    const fn further(self, bytes: usize) -> Self {
        match self {
            Self::At(at) => Self::At(at.saturating_add(bytes as u64)),
            other => other,
        }
    }
}

/// One operation of a chain.
#[derive(Debug)]
struct Step {
    token: Token,
    /// Where the caller counts it: a packet's idx.
    index: u32,
    /// With the caller before submission and after completion; in the ring between.
    buffer: Option<Buffer>,
    result: Option<io::Result<usize>>,
}

/// What a completion led to.
#[derive(Debug)]
pub(crate) enum Progress {
    /// Operations are in flight.
    Busy,
    /// Operations are in flight; these reads, the chain's first, have been whole.
    Part(Vec<Filled>),
    /// None is. The buffers of a read come with the bytes they hold; those of a write are gone.
    Idle(Vec<Filled>),
    /// A transfer failed, for good.
    Failed {
        /// The step that failed.
        index: u32,
        /// Bytes of that step which had been moved before.
        moved: usize,
        /// Why.
        source: io::Error,
    },
    /// All operations have come back after a cancellation.
    Cancelled,
}

/// A buffer that a read has filled.
#[derive(Debug)]
pub(crate) struct Filled {
    /// The buffer, whole.
    pub(crate) buffer: Buffer,
    /// How many bytes of it were read; 0 is the end of the stream, or a buffer that was not used.
    pub(crate) len: usize,
    /// Whether this read met the end.
    pub(crate) end: bool,
}

/// One device's data fd on the ring.
#[derive(Debug)]
pub(crate) struct Lane {
    fd: Fd,
    /// Where the operation in flight reads instead, and from which place.
    aside: Option<(Fd, u64)>,
    direction: Direction,
    place: Place,
    first_token: u32,
    steps: Vec<Step>,
    outstanding: usize,
    submitted: Instant,
    /// Bytes of the first step that earlier submissions moved.
    moved: usize,
    idle_retries: u32,
    cancelled: bool,
}

impl Lane {
    /// Returns an idle lane. Its operations use [`CHAIN`] tokens from `ordinal * CHAIN` on.
    pub(crate) fn new(fd: Fd, direction: Direction, ordinal: u32) -> Self {
        Self {
            place: Place::of(&fd, direction),
            fd,
            aside: None,
            direction,
            first_token: ordinal * CHAIN,
            steps: Vec::with_capacity(CHAIN as usize),
            outstanding: 0,
            submitted: Instant::now(),
            moved: 0,
            idle_retries: 0,
            cancelled: false,
        }
    }

    /// The ordinal of the lane that a token belongs to.
    pub(crate) const fn ordinal_of(token: Token) -> usize {
        (token.0 / CHAIN) as usize
    }

    /// Whether nothing is in flight.
    pub(crate) const fn is_idle(&self) -> bool {
        self.outstanding == 0
    }

    /// Since when the operations in flight are.
    pub(crate) const fn submitted(&self) -> Instant {
        self.submitted
    }

    /// Puts a batch on the ring, as one chain. The ring starts it with its next submission.
    pub(crate) fn submit(
        &mut self,
        batch: impl Iterator<Item = (u32, Buffer)>,
        ring: &mut dyn Ring<Buffer>,
        counters: &DeviceCounters,
    ) {
        assert!(self.is_idle(), "one chain in flight");
        self.place.settle(&self.fd);
        self.aside = None;
        self.moved = 0;
        self.idle_retries = 0;
        let tokens = (self.first_token..).map(Token);
        self.steps
            .extend(tokens.zip(batch).map(|(token, (index, buffer))| Step {
                token,
                index,
                buffer: Some(buffer),
                result: None,
            }));
        self.push(ring, counters);
    }

    /// Reads into a buffer from a place in another file: what has been spilled. As a batch of its
    /// own, which ends as a read's does.
    pub(crate) fn read_aside(
        &mut self,
        (file, offset): (Fd, u64),
        (index, buffer): (u32, Buffer),
        ring: &mut dyn Ring<Buffer>,
        counters: &DeviceCounters,
    ) {
        assert!(self.is_idle(), "one chain in flight");
        self.aside = Some((file, offset));
        self.moved = 0;
        self.idle_retries = 0;
        self.steps.push(Step {
            token: Token(self.first_token),
            index,
            buffer: Some(buffer),
            result: None,
        });
        self.push(ring, counters);
    }

    /// Which way the bytes of the batch go.
    const fn direction(&self) -> Direction {
        if self.aside.is_some() {
            Direction::Read
        } else {
            self.direction
        }
    }

    fn push(&mut self, ring: &mut dyn Ring<Buffer>, counters: &DeviceCounters) {
        let count = self.steps.len();
        assert!(count > 0 && count <= CHAIN as usize);
        self.submitted = Instant::now();
        let mut place = self.place;
        for (at, step) in (1..).zip(&mut self.steps) {
            let buffer = step
                .buffer
                .take()
                .expect("a step is pushed with its buffer");
            step.result = None;
            let fd = self.fd.clone();
            let next = place.further(buffer.size());
            let op = match (&self.aside, self.direction, place) {
                (Some((file, offset)), ..) => Op::ReadAt {
                    fd: file.clone(),
                    offset: *offset,
                    buffer,
                },
                (None, Direction::Write, Place::At(offset)) => Op::WriteAt { fd, offset, buffer },
                (None, Direction::Read, Place::At(offset)) => Op::ReadAt { fd, offset, buffer },
                (None, Direction::Write, _) => Op::Write { fd, buffer },
                (None, Direction::Read, _) => Op::Read { fd, buffer },
            };
            place = next;
            let link = if at < count { Link::Next } else { Link::End };
            ring.push(step.token, op, link)
                .expect("the ring has a place for every step of every lane");
            self.outstanding += 1;
        }
        if self.aside.is_none() {
            counters.entries.add(count as u64);
        }
    }

    /// Takes one completion, and tells what it led to.
    pub(crate) fn complete(
        &mut self,
        completion: Completion<Buffer>,
        ring: &mut dyn Ring<Buffer>,
        counters: &DeviceCounters,
    ) -> Progress {
        let (Op::Read { buffer, .. }
        | Op::ReadAt { buffer, .. }
        | Op::Write { buffer, .. }
        | Op::WriteAt { buffer, .. }) = completion.op
        else {
            unreachable!("a lane reads or writes");
        };
        let token = completion.token;
        let reads = self.direction() == Direction::Read;
        if let (None, Ok(moved)) = (&self.aside, &completion.result) {
            self.place = self.place.further(*moved);
        }
        let step = self.steps.iter_mut().find(|step| step.token == token);
        let step = step.expect("a completion is one of the chain's");
        let whole = completion
            .result
            .as_ref()
            .is_ok_and(|&n| n == buffer.size());
        // What was written whole goes back to the pool at once: the publishers wait for it.
        step.buffer = (reads || !whole).then_some(buffer);
        step.result = Some(completion.result);
        self.outstanding -= 1;
        if self.outstanding > 0 {
            return self.whole_reads();
        }
        if self.aside.is_none() {
            counters.transfer(self.submitted);
        }
        self.judge(ring, counters)
    }

    /// Gives out what the first steps of a chain have read, as far as each has read all that it was to. What
    /// comes behind them is still the kernel's.
    fn whole_reads(&mut self) -> Progress {
        let is_whole = |step: &Step| match (&step.result, &step.buffer) {
            (Some(Ok(len)), Some(buffer)) => *len == buffer.size(),
            _ => false,
        };
        let count = if self.direction() == Direction::Read && !self.cancelled {
            self.steps.iter().take_while(|step| is_whole(step)).count()
        } else {
            0
        };
        if count == 0 {
            return Progress::Busy;
        }
        let buffers = self.steps.drain(..count).filter_map(|step| step.buffer);
        let filled = buffers.map(|buffer| Filled {
            len: buffer.size(),
            buffer,
            end: false,
        });
        Progress::Part(filled.collect())
    }

    /// Judges a chain, all of which has come back.
    fn judge(&mut self, ring: &mut dyn Ring<Buffer>, counters: &DeviceCounters) -> Progress {
        let mut filled = Vec::new();
        let mut steps = mem::take(&mut self.steps).into_iter();
        let broken = loop {
            let Some(mut step) = steps.next() else {
                return Progress::Idle(filled);
            };
            let result = step.result.take().expect("every step has come back");
            let Some(mut buffer) = step.buffer.take() else {
                // Written whole.
                self.moved = 0;
                continue;
            };
            let error = match (result, self.direction()) {
                (Ok(0), Direction::Write) => io::ErrorKind::WriteZero.into(),
                (Ok(count), Direction::Write) => {
                    buffer.advance(count);
                    self.moved += count;
                    self.idle_retries = 0;
                    step.buffer = Some(buffer);
                    break Ok(step);
                }
                (Ok(len), Direction::Read) => {
                    let whole = len == buffer.size();
                    filled.push(Filled {
                        buffer,
                        len,
                        end: len == 0,
                    });
                    if whole {
                        continue;
                    }
                    // A short read, or the end: what comes behind was not started. The packets
                    // need not be full, so it is not tried again here.
                    filled.extend(steps.filter_map(|step| step.buffer).map(|buffer| Filled {
                        buffer,
                        len: 0,
                        end: false,
                    }));
                    return Progress::Idle(filled);
                }
                (Err(error), _) => error,
            };
            match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EINTR | Errno::EAGAIN) if self.idle_retries < MAX_IDLE_RETRIES => {
                    self.idle_retries += 1;
                    step.buffer = Some(buffer);
                    break Ok(step);
                }
                Some(Errno::ECANCELED) if self.cancelled => return Progress::Cancelled,
                _ => break Err((step.index, error)),
            }
        };
        match broken {
            Err((index, source)) => Progress::Failed {
                index,
                moved: self.moved,
                source,
            },
            Ok(_) if self.cancelled => Progress::Cancelled,
            Ok(step) => {
                self.steps.push(step);
                for step in steps {
                    // The link held them back. Anything else would have corrupted the stream.
                    if step.buffer.is_none() || matches!(step.result, Some(Ok(moved)) if moved > 0)
                    {
                        return Progress::Failed {
                            index: step.index,
                            moved: 0,
                            source: io::Error::other("the kernel went on behind a broken link"),
                        };
                    }
                    self.steps.push(step);
                }
                // Reads that were whole before the interrupted one must not be lost: they go to
                // the caller first, and the rest is its next batch.
                if filled.is_empty() {
                    self.push(ring, counters);
                    return Progress::Busy;
                }
                let rest = mem::take(&mut self.steps).into_iter();
                filled.extend(rest.filter_map(|step| step.buffer).map(|buffer| Filled {
                    buffer,
                    len: 0,
                    end: false,
                }));
                Progress::Idle(filled)
            }
        }
    }

    /// Where the next byte goes, for a thread that writes in the lane's stead: `None` for a stream. The lane is
    /// idle until [`Lane::resume`].
    pub(crate) fn lend(&mut self) -> Option<u64> {
        self.place.settle(&self.fd);
        match self.place {
            Place::At(at) => Some(at),
            _ => None,
        }
    }

    /// Goes on where that thread stopped.
    pub(crate) const fn resume(&mut self, at: Option<u64>) {
        if let Some(at) = at {
            self.place = Place::At(at);
        }
    }

    /// The data fd.
    pub(crate) const fn fd(&self) -> &Fd {
        &self.fd
    }

    /// Asks the ring to end what is in flight. The completions still come.
    pub(crate) fn cancel(&mut self, ring: &mut dyn Ring<Buffer>) {
        self.cancelled = true;
        for step in &self.steps {
            if step.result.is_none() {
                ring.cancel(step.token);
            }
        }
    }

    /// Gives up on operations that do not come back. The file is leaked: the kernel may use it for
    /// as long as it likes, and its number must not be given to another. (The buffers are the
    /// ring's to leak.) Returns how many operations there are.
    pub(crate) fn abandon(&mut self) -> usize {
        mem::forget(self.fd.clone());
        mem::forget(self.aside.clone());
        // Nor is its position set.
        self.place = Place::Stream;
        self.outstanding
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // Not where the kernel still has an operation: it may be stuck in a call on this file.
        if let Place::At(at) = self.place
            && self.is_idle()
        {
            let at = i64::try_from(at).unwrap_or(i64::MAX);
            // Whoever lent the file does not need it to have lent it.
            let _gone = lseek(&self.fd, at, Whence::SeekSet);
        }
    }
}
