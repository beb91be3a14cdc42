//! Write-through: the channel that has the next packet writes it, and what has become ready behind it.
//!
//! ```text
//!   published ─▶ take the turn, if it is free ─▶ take next, write, … ─▶ give it back ─▶ look once more
//!                  │                               │
//!                  └─ not free: go on receiving    ├─ enough for once: whoever comes next goes on
//!                                                  └─ no data in memory, a stop, an errno, a driver that
//!                                                     sleeps: the I/O thread has the turn again
//! ```
//!
//! The bytes are written from the cache of the core that received them, by a plain `write`, or `pwrite` where
//! the data fd has positions: nobody is woken, nothing is queued. `pace.rs` says which devices may be
//! written so, `reorder/turn.rs` who writes.
//!
//! Whoever has the turn has [`Through`] too, so nobody waits for its lock: a holder keeps the lock while it is
//! in the driver, and a device that is given up there is not unlocked for.
//!
//! | wait | ended by |
//! |---|---|
//! | a channel in a device's `write` | the driver. After `no_progress`, or a stop and the grace time, the device is reported stuck, and the thread left behind |

use std::{
    fs::File,
    io::{self, Write},
    os::{fd::AsFd, unix::fs::FileExt},
    time::{Duration, Instant},
};

use crossbeam_epoch::Guard;
use nix::{
    errno::Errno,
    sys::{
        resource::{UsageWho, getrusage},
        stat::{SFlag, fstat},
    },
};
use vfio_migration_uring::Fd;

use super::{
    Epoch, Load, LoadDevice,
    pace::{Shown, judge},
};
use crate::{
    lane::Buffer,
    reorder::{
        pool::{LeaseCutter, Pool},
        reorder_buffer::{Next, ReorderReader},
        slot::{Packet, Payload, Peek},
        turn::{End, Passed},
    },
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
        lock,
    },
    trace, wire,
};

/// How much a channel writes in one go, for others most of all, before it goes back to its own connection.
const MOST: usize = 4 << 20;

/// Packets up to this many bytes are gathered into one write where several are ready: a copy of so few costs
/// less than a system call.
const GATHER_MAX: usize = 8 << 10;

/// The most bytes of such a write: they stay in the core's cache.
const GATHERED: usize = 64 << 10;

/// Bytes from which on a write is looked at closely: next to it two more system calls cost nothing.
const LOOK_CLOSELY: usize = 32 << 10;

/// What a channel writes with. Of whoever has the turn.
#[derive(Debug)]
pub(super) struct Through {
    lent: Mutex<Lent>,
    /// The first idx of the write that a channel is in, for messages; or none.
    writing: AtomicU64,
}

/// No idx.
const NONE: u64 = u64::MAX;

/// What goes with the turn.
#[derive(Debug, Default)]
struct Lent {
    /// The data fd, until the device's transfer ends.
    file: Option<File>,
    /// Where the next byte goes; none for a stream.
    place: Option<u64>,
    /// Whether the write before slept in the driver.
    suspect: bool,
    /// Where each packet of a gathered write ends in it, and its idx.
    gathered: Vec<(usize, u32)>,
    left: Left,
}

/// What a channel leaves for the I/O thread.
#[derive(Debug, Default)]
pub(super) struct Left {
    /// Whether a write was slow.
    pub(super) slow: bool,
    /// The first errno, and the packet's idx.
    pub(super) failure: Option<(u32, io::Error)>,
    /// What is still to be written of a packet that it has taken.
    pub(super) remainder: Option<Remainder>,
}

/// The rest of a write.
#[derive(Debug)]
pub(super) struct Remainder {
    /// The idx of the packet that it begins in.
    pub(super) index: u32,
    pub(super) buffer: Buffer,
    /// Where each packet of a gathered write ends in `buffer`, and its idx.
    pub(super) gathered: Vec<(usize, u32)>,
    /// What its headers add to the bytes of the device.
    pub(super) headers: usize,
    /// Whether the rest of its last packet comes later.
    pub(super) open: bool,
}

impl Through {
    pub(super) fn new() -> Self {
        Self {
            lent: Mutex::default(),
            writing: AtomicU64::new(NONE),
        }
    }

    /// The first idx of the write that a channel is in.
    pub(super) fn writing(&self) -> Option<u32> {
        // Relaxed: for a message.
        u32::try_from(self.writing.load(Relaxed)).ok()
    }

    /// The device's thread, before anything is lent: keeps a file of its own. Returns whether channels can write
    /// to it. They cannot where the host has no file left, nor to a pipe or a socket: that waits for whoever
    /// reads it, and only the ring can call it off.
    pub(super) fn open(&self, fd: &Fd) -> bool {
        if waits_for_a_reader(fd) {
            return false;
        }
        let file = fd.as_fd().try_clone_to_owned().ok().map(File::from);
        let opened = file.is_some();
        lock(&self.lent).file = file;
        opened
    }

    /// The I/O thread, which lends the turn: where the next byte goes; nowhere for a stream.
    pub(super) fn lend(&self, place: Option<u64>) {
        lock(&self.lent).place = place;
    }

    /// The I/O thread, which has the turn: where to go on, and what was left.
    pub(super) fn take_back(&self) -> (Option<u64>, Left) {
        let mut lent = lock(&self.lent);
        (lent.place, std::mem::take(&mut lent.left))
    }

    /// The I/O thread is done with the device. A channel that is stuck in its driver keeps the file.
    pub(super) fn end(&self) {
        if let Ok(mut lent) = self.lent.try_lock() {
            drop(lent.file.take());
        }
    }
}

/// A channel has published a packet of this device's: writes it, if the turn is free, and what is ready
/// behind it.
pub(super) fn write(load: &Load, device: &LoadDevice, epoch: &dyn Epoch) -> Passed {
    let mut most = MOST;
    device.turn.pass(
        &device.reorder,
        || epoch.pin(),
        |reader| {
            let mut lent = lock(&device.through.lent);
            let end = Writer {
                load,
                device,
                epoch,
                lent: &mut lent,
                reader,
            }
            .write_ready(&mut most);
            drop(lent);
            // Told before the turn goes on: what is next stands still.
            if reader.is_awaited(&device.reorder) {
                load.backpressure.notify_all();
            } else {
                load.backpressure.pass_on();
            }
            end
        },
    )
}

/// A channel that has a device's turn.
struct Writer<'a> {
    load: &'a Load,
    device: &'a LoadDevice,
    epoch: &'a dyn Epoch,
    lent: &'a mut Lent,
    reader: &'a mut ReorderReader,
}

/// What one write writes.
struct Batch {
    /// The idx of its first packet.
    index: u32,
    buffer: Buffer,
    /// What its headers add to the bytes of the device.
    headers: usize,
    /// Whether the rest of its last packet comes later.
    open: bool,
}

impl Writer<'_> {
    /// Writes what is there, in order.
    fn write_ready(&mut self, most: &mut usize) -> End {
        loop {
            if self.device.flags.stop().is_some() || self.lent.file.is_none() {
                return End::Io;
            }
            if *most == 0 {
                return End::Enough;
            }
            match self.take() {
                Ok(None) => {}
                Ok(Some(batch)) => {
                    *most = most.saturating_sub(batch.buffer.size());
                    if !self.write(batch) {
                        return End::Io;
                    }
                }
                Err(end) => return end,
            }
        }
    }

    /// Takes the next packet, and small packets behind it. Nothing, for a packet without data.
    fn take(&mut self) -> Result<Option<Batch>, End> {
        let guard = self.epoch.pin();
        let Some((index, packet)) = self.take_one(usize::MAX, &guard)? else {
            return Err(End::Io);
        };
        let mut headers = header_of(&packet);
        let mut open = packet.more;
        let Payload::Lease(piece) = packet.payload else {
            self.device.counters.bytes.add(headers as u64);
            return Ok(None);
        };
        self.device.told.load_start(&self.device.id, index);
        let buffer = Pool::adopt(self.load.pool.clone(), piece);
        self.lent.gathered.clear();
        let next = self.reader.peek(&self.device.reorder, &guard);
        let several =
            buffer.size() <= GATHER_MAX && matches!(next, Some(Peek::Data(1..=GATHER_MAX)));
        let staging = several.then(|| self.stage()).flatten();
        let Some(mut staging) = staging else {
            return Ok(Some(Batch {
                index,
                buffer,
                headers,
                open,
            }));
        };
        let mut used = buffer.size();
        staging.bytes_mut()[..used].copy_from_slice(buffer.bytes());
        // Recycled at once.
        drop(buffer);
        self.lent.gathered.push((used, index));
        // Ends: the staging buffer is full, or nothing small is ready.
        while let Ok(Some((index, packet))) =
            self.take_one(GATHER_MAX.min(staging.size() - used), &guard)
        {
            headers += header_of(&packet);
            let Payload::Lease(piece) = packet.payload else {
                continue;
            };
            self.device.told.load_start(&self.device.id, index);
            open = packet.more;
            let lease = Pool::adopt(&*self.load.pool, piece);
            let end = used + lease.size();
            staging.bytes_mut()[used..end].copy_from_slice(lease.bytes());
            used = end;
            self.lent.gathered.push((used, index));
        }
        staging.truncate(used);
        Ok(Some(Batch {
            index,
            buffer: staging,
            headers,
            open,
        }))
    }

    /// Takes the next packet if it has no more than so many bytes.
    fn take_one(&mut self, most: usize, guard: &Guard) -> Result<Option<(u32, Packet)>, End> {
        let reorder = &self.device.reorder;
        match self.reader.peek(reorder, guard) {
            Some(Peek::Data(len)) if len <= most => {}
            Some(Peek::Data(_)) => return Ok(None),
            Some(Peek::Other) => return Err(End::Io),
            None => return Err(End::Missing),
        }
        match self.reader.take(reorder, guard) {
            Next::Packet(index, packet) => {
                self.device.counters.taken((!packet.more).into());
                Ok(Some((index, packet)))
            }
            Next::Starved(_) | Next::Closed => Err(End::Io),
        }
    }

    /// A buffer for small packets, if one is free.
    fn stage(&self) -> Option<Buffer> {
        let layout = self.load.staging.layout();
        if layout.buffers == 0 {
            return None;
        }
        LeaseCutter::new(self.load.staging.clone()).lease(layout.buffer_len.min(GATHERED))
    }

    /// Writes a batch. Returns whether to go on; if not, what is left is the I/O thread's.
    fn write(&mut self, batch: Batch) -> bool {
        let Batch {
            index,
            mut buffer,
            headers,
            open,
        } = batch;
        // Relaxed: for a message.
        self.device.through.writing.store(index.into(), Relaxed);
        let wrote = self.lent.write(buffer.bytes());
        self.device.through.writing.store(NONE, Relaxed);
        let counters = &self.device.counters;
        counters.wrote_through(wrote.moved, wrote.took);
        let whole = wrote.result.is_ok();
        let moved = wrote.moved + if whole { headers } else { 0 };
        counters.bytes.add(moved as u64);
        let gathered = &mut self.lent.gathered;
        // Those that are in the device now.
        let through = gathered.partition_point(|&(end, _)| end <= wrote.moved);
        let next = gathered.get(through).map(|&(_, index)| index);
        let (told, id) = (&self.device.told, &self.device.id);
        let mut last = (through == 0 && whole).then_some(index);
        for (_, index) in gathered.drain(..through) {
            if let Some(before) = last.replace(index).filter(|before| *before != index) {
                told.load_end(id, before);
            }
        }
        if let Some(index) = last.filter(|last| next != Some(*last) && !(whole && open)) {
            told.load_end(id, index);
        }
        let left = &mut self.lent.left;
        left.slow |= wrote.slow;
        match wrote.result {
            Ok(()) => {
                let config = self.device.reorder.config_index();
                if !open && config == Some(self.reader.next()) {
                    trace::load_state_device_buffer_end(id);
                }
                return !wrote.slow;
            }
            Err(error) => {
                let index = gathered.first().map_or(index, |&(_, index)| index);
                if passes(&error) {
                    buffer.advance(wrote.moved);
                    let ends = gathered.drain(..);
                    let gathered = ends
                        .map(|(end, index)| (end - wrote.moved, index))
                        .collect();
                    left.remainder = Some(Remainder {
                        index,
                        buffer,
                        gathered,
                        headers,
                        open,
                    });
                } else {
                    left.failure = Some((index, error));
                }
            }
        }
        false
    }
}

fn waits_for_a_reader(fd: &Fd) -> bool {
    let kind = fstat(fd).map(|stat| SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()));
    matches!(kind, Err(_) | Ok(SFlag::S_IFIFO | SFlag::S_IFSOCK))
}

/// What a packet's header adds to the bytes of its device: its last piece's.
const fn header_of(packet: &Packet) -> usize {
    if packet.more {
        0
    } else {
        wire::PACKET_HEADER_LEN
    }
}

/// Whether the ring may do better: it waits, and counts how often.
fn passes(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EINTR | Errno::EAGAIN))
}

/// What became of a write.
struct Wrote {
    moved: usize,
    took: Duration,
    /// Whether the ring should have the device again.
    slow: bool,
    /// Why no more was written.
    result: io::Result<()>,
}

impl Lent {
    /// Writes all of it, and judges how quick the device was.
    fn write(&mut self, bytes: &[u8]) -> Wrote {
        let closely = self.suspect || bytes.len() >= LOOK_CLOSELY;
        let before = closely.then(sleeps);
        let since = Instant::now();
        let (moved, result) = self.write_all(bytes);
        let took = since.elapsed();
        let slept = before.map(|before| sleeps() != before);
        let shown = judge(moved, took, slept, self.suspect);
        self.suspect = shown == Shown::Suspect;
        Wrote {
            moved,
            took,
            slow: shown == Shown::Slow,
            result,
        }
    }

    /// Returns how much was written, and why no more.
    fn write_all(&mut self, bytes: &[u8]) -> (usize, io::Result<()>) {
        let mut file = self.file.as_ref().expect("looked at before");
        let mut moved = 0;
        // Ends: each round writes a byte at least.
        while moved < bytes.len() {
            let rest = &bytes[moved..];
            let wrote = match self.place {
                None => file.write(rest),
                Some(at) => file.write_at(rest, at),
            };
            match wrote {
                Ok(0) => return (moved, Err(io::ErrorKind::WriteZero.into())),
                Ok(count) => {
                    moved += count;
                    self.place = self.place.map(|at| at + count as u64);
                }
                Err(error) => return (moved, Err(error)),
            }
        }
        (moved, Ok(()))
    }
}

/// How often this thread has given up its core of its own.
fn sleeps() -> i64 {
    getrusage(UsageWho::RUSAGE_THREAD).map_or(0, |usage| usage.voluntary_context_switches())
}
