//! Write-through: the channel that has the next packet writes it, and what has become ready behind it.
//!
//! ```text
//!   published ─▶ take the turn, if it is free ─▶ take next, write, … ─▶ give it back ─▶ look once more
//!                  │                               │
//!                  └─ not free: go on receiving    └─ no data in memory, a stop, an error, a slow write, or
//!                                                     enough for once: the I/O thread has it again
//! ```
//!
//! The bytes are written from the cache of the core that received them, by a plain `write`, or `pwrite` where
//! the data fd has positions: nobody is woken, nothing is queued. Who may do so, and when, is in `pace.rs` and
//! `reorder/turn.rs`. A thread that the driver keeps is as one of the blocking ring's: after the grace time the
//! device is reported stuck, and the thread left behind.
//!
//! What ends each wait: there is none but the driver's.

use std::{
    fs::File,
    io::{self, Write},
    os::{fd::AsFd, unix::fs::FileExt},
    time::Instant,
};

use crossbeam_epoch::LocalHandle;
use nix::errno::Errno;
use vfio_migration_uring::Fd;

use super::{Load, LoadDevice, pace::is_quick};
use crate::{
    lane::Buffer,
    reorder::{
        pool::Pool,
        reorder_buffer::{Next, ReorderReader},
        slot::{Payload, Peek},
        turn::{End, Passed},
    },
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
        lock,
    },
    trace, wire,
};

/// How much a channel writes in one go, for others most of all, before it goes back to its own connection.
const MOST: usize = 4 << 20;

/// No position: a stream.
const STREAM: u64 = u64::MAX;

/// What a channel writes with. Whoever has the turn uses it.
#[derive(Debug, Default)]
pub(super) struct Through {
    /// The data fd, while the turn can be lent.
    file: Mutex<Option<Arc<File>>>,
    /// Where the next byte goes.
    place: AtomicU64,
    /// What a channel leaves for the I/O thread.
    left: Mutex<Left>,
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

/// The rest of a packet, or of a piece of it.
#[derive(Debug)]
pub(super) struct Remainder {
    pub(super) index: u32,
    pub(super) buffer: Buffer,
    /// Whether it is the packet's last.
    pub(super) last: bool,
}

impl Through {
    /// The I/O thread: gets it ready. Returns whether it is; it is not where the host has no file left.
    pub(super) fn lend(&self, fd: &Fd, at: Option<u64>) -> bool {
        let mut file = lock(&self.file);
        if file.is_none() {
            *file = fd
                .as_fd()
                .try_clone_to_owned()
                .ok()
                .map(|fd| Arc::new(fd.into()));
        }
        // Relaxed, as everywhere with the place: the turn's edge carries it.
        self.place.store(at.unwrap_or(STREAM), Relaxed);
        file.is_some()
    }

    /// The I/O thread, which has the turn: what there is to go on with.
    pub(super) fn take_back(&self, resume: impl FnOnce(Option<u64>)) -> Left {
        let at = self.place.load(Relaxed);
        resume((at != STREAM).then_some(at));
        std::mem::take(&mut *lock(&self.left))
    }

    /// The I/O thread is done with the device. A channel that is stuck in it keeps the file.
    pub(super) fn end(&self) {
        drop(lock(&self.file).take());
    }
}

/// A channel has published a packet of this device's: writes it, if the turn is free, and what is ready
/// behind it.
pub(super) fn write(load: &Load, device: &LoadDevice, epoch: &LocalHandle) -> Passed {
    let mut left = MOST;
    let pin = || epoch.pin();
    device.turn.pass(&device.reorder, pin, |reader| {
        let end = write_ready(load, device, epoch, reader, &mut left);
        // Told before the turn goes on: what is next stands still.
        if reader.is_awaited(&device.reorder) {
            load.backpressure.notify_all();
        } else {
            load.backpressure.pass_on();
        }
        end
    })
}

/// Writes what is there, in order. The turn is this thread's.
fn write_ready(
    load: &Load,
    device: &LoadDevice,
    epoch: &LocalHandle,
    reader: &mut ReorderReader,
    left: &mut usize,
) -> End {
    let Some(file) = lock(&device.through.file).clone() else {
        return End::Io;
    };
    while *left > 0 && device.flags.stop().is_none() {
        let (index, packet) = {
            let guard = epoch.pin();
            match reader.peek(&device.reorder, &guard) {
                Some(Peek::Data) => {}
                Some(Peek::Other) => return End::Io,
                None => return End::Missing,
            }
            match reader.take(&device.reorder, &guard) {
                Next::Packet(index, packet) => (index, packet),
                Next::Starved(_) | Next::Closed => return End::Io,
            }
        };
        let last = !packet.more;
        device.counters.taken(last.into());
        let header = if last { wire::PACKET_HEADER_LEN } else { 0 };
        let Payload::Lease(piece) = packet.payload else {
            device.counters.bytes.add(header as u64);
            continue;
        };
        let mut buffer = Pool::adopt(load.pool.clone(), piece);
        trace::load_state_device_buffer_load_start(&device.id, index);
        let since = Instant::now();
        let (moved, result) = write_bytes(&file, &device.through.place, buffer.bytes());
        let took = since.elapsed();
        let counters = &device.counters;
        counters.transfer(since);
        counters.through_time.add_time(took);
        counters.written_through.add(moved as u64);
        *left = left.saturating_sub(moved);
        let quick = is_quick(moved, took);
        let done = result.is_ok();
        counters
            .bytes
            .add((moved + if done { header } else { 0 }) as u64);
        if done {
            trace::load_state_device_buffer_load_end(&device.id, index);
            if quick {
                continue;
            }
        }
        let mut leave = lock(&device.through.left);
        leave.slow = true;
        match result {
            Ok(()) => {}
            Err(error) if passes(&error) => {
                buffer.advance(moved);
                leave.remainder = Some(Remainder {
                    index,
                    buffer,
                    last,
                });
            }
            Err(error) => leave.failure = Some((index, error)),
        }
        return End::Io;
    }
    End::Io
}

/// Whether the ring may do better: it waits, and counts how often.
fn passes(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EINTR | Errno::EAGAIN))
}

/// Writes all of it. Returns how much was, and why no more.
fn write_bytes(file: &File, place: &AtomicU64, bytes: &[u8]) -> (usize, io::Result<()>) {
    let mut moved = 0;
    // Ends: each round writes a byte at least.
    while moved < bytes.len() {
        let at = place.load(Relaxed);
        let rest = &bytes[moved..];
        let wrote = if at == STREAM {
            (&*file).write(rest)
        } else {
            file.write_at(rest, at)
        };
        match wrote {
            Ok(0) => return (moved, Err(io::ErrorKind::WriteZero.into())),
            Ok(count) => {
                moved += count;
                if at != STREAM {
                    place.store(at + count as u64, Relaxed);
                }
            }
            Err(error) => return (moved, Err(error)),
        }
    }
    (moved, Ok(()))
}
