//! Device side: the I/O thread's part of a load, from a device's slots to its data fd.
//!
//! ```text
//!   take the ready packets ─▶ gather small ones, chain large ones ─▶ submit ─▶ … ─▶ batch done
//!                          ▲                                           │
//!                          └── the next batch of small ones, while the kernel has this one
//!
//!   take a spilled packet ─▶ … its turn ─▶ read a part of it through the ring ─▶ submit ─▶ …
//! ```
//!
//! A spilled packet comes back through the ring too, one part at a time. Each part goes into a buffer of
//! the pool, or, if the pool is empty, into a buffer of the transfer's own. So other devices' packets
//! cannot block it.

use nix::errno::Errno;

use std::{
    io, mem,
    time::{Duration, Instant},
};

use crossbeam_epoch::Guard;
use vfio_migration_uring::{Completion, Fd, Ring, later};

use super::{Load, LoadDevice, TransferResult, pace::Pace, through::Remainder};
use crate::{
    error::{Error, ErrorKind, Phase, Result},
    io_loop::{Context, Transfer, TransferState},
    lane::{Buffer, CHAIN, Direction, Filled, Lane, Progress},
    reorder::{
        pool::{LeaseCutter, LeaseToken, Pool, PoolLayout},
        reorder_buffer::{Next, ReorderReader},
        slot::{Packet, Payload},
        turn::Look,
    },
    settings::Writer,
    spill::{BOUNCE, SpillExtent},
    sync::{Arc, atomic::Ordering},
    trace, wire,
};

/// Packets up to this many bytes are gathered into one write where several are ready: copying them
/// costs less than an operation for each.
const GATHER_MAX: usize = 64 << 10;

/// How long a packet may stand next while the turn is free, before the I/O thread takes it: a channel
/// that brings another for the device takes both.
const COMES: Duration = Duration::from_micros(200);

/// The most bytes that all lanes together have in flight: enough to keep devices busy, few enough to stay in
/// the cache. Busy lanes share it, down to 64 KiB each: with many lanes, their number keeps the kernel busy,
/// not the length of each batch; and a single packet need not be copied.
const CHAIN_BYTES: usize = 4 << 20;

/// One device's packets on their way into its data fd. The I/O thread's.
pub(crate) struct LoadTransfer {
    load: Arc<Load>,
    device: Arc<LoadDevice>,
    lane: Lane,
    reader: ReorderReader,
    /// The config packet's data so far, once it is next.
    config: Vec<u8>,
    config_taken: bool,
    /// Why the config is not kept, where the host has no memory for it.
    no_room: Option<Error>,
    /// The packet that is being read back. Whatever is behind it waits in its slots.
    read_back: Option<ReadBack>,
    /// A buffer for that where the pool has none. There once it was needed.
    own: Option<Arc<Pool>>,
    /// The chain that is being put together.
    ready: Batch,
    /// The chain in flight. Its operations are the lane's.
    in_flight: Batch,
    /// How many bytes the lane may be given at once.
    share: usize,
    started: Option<Instant>,
    starved: Option<Instant>,
    /// How quick it has been.
    pace: Pace,
    /// Whether the data fd is one that channels do not write to.
    ring_only: bool,
    /// Where the turn is lent: `reader` and the lane's place stand still.
    lent: Option<Lent>,
    /// The first errno of a channel's write: final.
    failure: Option<Error>,
    /// Last, so that the lane has given the data fd back before the result is there.
    outcome: ResultOnDrop,
}

/// What the I/O thread remembers of a turn that it has lent.
struct Lent {
    /// What was next at the last look.
    next: u32,
    /// Since when that has stood there, with nobody at it.
    waiting: Option<Instant>,
    /// Whether a channel that would come for it would have come by now.
    nobody: bool,
    /// What the channels' writes had taken before.
    wrote: Duration,
}

/// A packet on its way back from the spill file.
struct ReadBack {
    spilled: SpillExtent,
    index: u32,
    config: bool,
    /// How many of its bytes have been read.
    at: usize,
    /// Whether the ring is reading some.
    reading: bool,
}

/// What makes one chain.
#[derive(Default)]
struct Batch {
    /// The operations: the idx of the first packet of each, and its bytes.
    operations: Vec<(u32, Buffer)>,
    /// The buffer that small packets are being copied to, one after the other: where it begins, and
    /// how much of it is used.
    staging: Option<(u32, Buffer, usize)>,
    /// Where each packet of the staging buffer ends in it, and its idx.
    gathered: Vec<(usize, u32)>,
    /// The idx of the first of those. A batch has one staging buffer.
    gathered_at: Option<u32>,
    /// The length of the packet that was added last.
    last_len: usize,
    /// Every packet, or part of one, that has bytes.
    indices: Vec<u32>,
    /// Bytes of packets, headers included, the empty ones' too.
    bytes: u64,
    /// Bytes for the device.
    len: usize,
    /// Whether the rest of its last packet comes in a later batch.
    open: bool,
}

impl Batch {
    /// Whether it has no bytes for the device.
    const fn is_empty(&self) -> bool {
        self.operations.is_empty() && self.staging.is_none()
    }

    /// Whether nothing more should be added.
    fn is_full(&self, share: usize) -> bool {
        let staged = match &self.staging {
            // Most packets are as large as the one before.
            Some((_, buffer, used)) => buffer.size() - used < self.last_len,
            None => false,
        };
        // The staging buffer becomes an operation, before the one that a large packet is.
        let operations = self.operations.len() + usize::from(self.staging.is_some());
        staged || operations >= CHAIN as usize || self.len >= share
    }

    /// Cuts the staging buffer to what is in it.
    fn close_staging(&mut self) {
        if let Some((index, mut buffer, used)) = self.staging.take() {
            buffer.truncate(used);
            self.operations.push((index, buffer));
        }
    }

    /// Forgets all of it; its memory is elsewhere.
    fn clear(&mut self) {
        self.gathered.clear();
        self.gathered_at = None;
        self.indices.clear();
        self.bytes = 0;
        self.len = 0;
        self.open = false;
    }
}

/// Leaves a transfer's result when it goes away, however it does.
struct ResultOnDrop {
    load: Arc<Load>,
    device: Arc<LoadDevice>,
    drained: Option<TransferResult>,
}

impl Drop for ResultOnDrop {
    fn drop(&mut self) {
        // Nothing is stored any more: later packets are refused, and those that nobody took are
        // recycled.
        let epoch = self.load.collector.register();
        let load = &self.load;
        self.device
            .reorder
            .close(&epoch.pin(), |packet| load.recycle(packet));
        self.load.backpressure.notify_all();
        self.device.through.end();
        let unfinished = || {
            let kind = ErrorKind::Internal("the I/O thread ended before this device's transfer");
            Err(Error::new(kind, Phase::Load).on_device(&self.device.id))
        };
        self.device
            .set_result(self.drained.take().unwrap_or_else(unfinished));
    }
}

impl LoadTransfer {
    pub(crate) fn new(load: Arc<Load>, device: Arc<LoadDevice>, fd: Fd) -> Self {
        let lane = Lane::new(fd, Direction::Write, device.ordinal);
        let outcome = ResultOnDrop {
            load: load.clone(),
            device: device.clone(),
            drained: None,
        };
        let ring_only = load.settings.writer == Writer::Ring || !device.through.open(lane.fd());
        Self {
            load,
            device,
            lane,
            reader: ReorderReader::new(),
            config: Vec::new(),
            config_taken: false,
            no_room: None,
            read_back: None,
            own: None,
            ready: Batch::default(),
            in_flight: Batch::default(),
            share: CHAIN_BYTES,
            started: None,
            starved: None,
            pace: Pace::new(),
            ring_only,
            lent: None,
            failure: None,
            outcome,
        }
    }

    fn aborted(&self) -> Error {
        Error::aborted(Phase::Load)
            .on_device(&self.device.id)
            .at_index(self.position())
    }

    /// The first idx that is not in the device.
    fn position(&self) -> u32 {
        let taken = self
            .in_flight
            .indices
            .first()
            .or(self.ready.indices.first());
        let read_back = self.read_back.as_ref().map(|packet| packet.index);
        let taken = taken.copied().or(read_back);
        let taken = taken.or_else(|| self.device.through.writing());
        taken.unwrap_or_else(|| self.next())
    }

    /// The idx that is needed next, whoever takes it.
    fn next(&self) -> u32 {
        if self.lent.is_some() {
            self.device.reorder.next()
        } else {
            self.reader.next()
        }
    }

    /// Whether the turn is lent once the lane is idle.
    fn lends(&self) -> bool {
        !self.ring_only && self.pace.lets_channels_write()
    }

    /// Whether a channel may write what comes next: to a device that is as quick as a copy, while nothing of
    /// it is under way here.
    fn may_lend(&self) -> bool {
        self.lends()
            && self.started.is_some()
            && self.lent.is_none()
            && self.lane.is_idle()
            && !self.config_taken
            && self.read_back.is_none()
            && self.ready.is_empty()
    }

    /// Whether a channel is writing to the device.
    fn is_written(&self) -> bool {
        self.lent.is_some() && self.device.turn.is_held()
    }

    /// Lends the turn.
    fn lend(&mut self) {
        self.device.through.lend(self.lane.lend());
        self.reader.rest(&self.device.reorder);
        // What a channel waits for that has what is next: the last to tell it.
        self.next_missing();
        self.lent = Some(Lent {
            next: self.reader.next(),
            waiting: None,
            nobody: false,
            wrote: self.device.counters.through_time.get_time(),
        });
        self.device.turn.lend();
    }

    /// Whether the turn should be taken back: it was handed over, or no channel has come for what is there.
    fn is_due(&self, guard: &Guard) -> bool {
        let Some(lent) = &self.lent else {
            return false;
        };
        let device = &self.device;
        self.load.input_ended()
            || match device.turn.look(&device.reorder, guard) {
                Look::Io => true,
                Look::Free | Look::Held => false,
                Look::Waiting => lent.nobody || lent.waiting.is_none(),
            }
    }

    /// Looks at a turn that is lent. Returns whether channels have written since the last look.
    fn look_at_lent(&mut self, guard: &Guard) -> bool {
        let Some(lent) = &mut self.lent else {
            return false;
        };
        let next = self.device.reorder.next();
        let moved = mem::replace(&mut lent.next, next) != next;
        if self.device.turn.look(&self.device.reorder, guard) != Look::Waiting {
            lent.waiting = None;
            lent.nobody = false;
        } else if moved || lent.waiting.is_none() {
            lent.waiting = Some(Instant::now());
            lent.nobody = false;
        } else {
            lent.nobody |= lent.waiting.is_some_and(|since| since.elapsed() > COMES);
        }
        moved
    }

    /// Takes the turn back, if no channel has it. Returns whether it is here.
    fn take_back(&mut self) -> bool {
        let Some(Lent { wrote, .. }) = self.lent else {
            return true;
        };
        if !self.device.turn.claim() {
            return false;
        }
        self.lent = None;
        self.reader = ReorderReader::resume(&self.device.reorder);
        let (place, left) = self.device.through.take_back();
        self.lane.resume(place);
        if left.slow {
            self.pace = self.pace.was_slow();
        }
        if let Some(since) = self.starved.take() {
            let counters = &self.device.counters;
            let wrote = counters.through_time.get_time().saturating_sub(wrote);
            counters
                .starved
                .add_time(since.elapsed().saturating_sub(wrote));
        }
        if let Some((index, source)) = left.failure {
            self.failure = Some(self.device_failed(index, source));
        }
        if let Some(Remainder {
            index,
            buffer,
            gathered,
            headers,
            open,
        }) = left.remainder
        {
            let ready = &mut self.ready;
            ready.gathered_at = gathered.first().map(|&(_, index)| index);
            ready.indices.push(index);
            let behind = gathered.iter().map(|&(_, index)| index);
            ready.indices.extend(behind.skip_while(|&at| at == index));
            ready.gathered = gathered;
            ready.len += buffer.size();
            ready.open = open;
            ready.bytes += (buffer.size() + headers) as u64;
            ready.operations.push((index, buffer));
        }
        true
    }

    fn device_failed(&self, index: u32, source: io::Error) -> Error {
        Error::new(ErrorKind::Device, Phase::Load)
            .on_device(&self.device.id)
            .at_index(index)
            .caused_by(source)
    }

    /// Whether what the device has is all of its data, and that is known: the config packet has come.
    fn is_last_written(&self) -> bool {
        let config = || self.device.reorder.config_index() == Some(self.reader.next());
        let next = self.read_back.as_ref();
        self.ready.indices.is_empty()
            && (self.config_taken || next.map_or_else(config, |packet| packet.config))
    }

    /// Tells how far the device is, while somebody may wait for it: before the switchover.
    fn report_progress(&self) {
        if !self.device.flags.is_switched() {
            // Release: what is said to be in the device is there. Partner: `wait_written`.
            self.device
                .written
                .store(self.position(), Ordering::Release);
            self.device.progress.notify_all();
        }
    }

    /// The device misses its next packet: a channel that waits with it must hear of that.
    fn next_missing(&self) {
        if self.reader.is_awaited(&self.device.reorder) {
            self.load.backpressure.next_missing();
        }
    }

    /// Takes a piece of the config packet out of the pool: it waits for the device's thread, and
    /// must not hold up other packets meanwhile. Its size is bounded by the maximum of a packet.
    fn take_config(&mut self, packet: Packet) {
        if let Payload::Lease(piece) = packet.payload {
            let lease = Pool::adopt(&*self.load.pool, piece);
            if let Err(error) = keep(&mut self.config, lease.bytes()) {
                self.no_room = Some(error.on_device(&self.device.id));
                self.config_taken = true;
                return;
            }
        }
        self.config_taken = !packet.more;
    }

    /// Takes what is there, as far as it makes one chain with what was taken before.
    fn gather(&mut self, guard: &Guard) {
        let mut taken = 0;
        while !self.config_taken && self.read_back.is_none() && !self.ready.is_full(self.share) {
            let (index, packet) = match self.reader.take(&self.device.reorder, guard) {
                Next::Packet(index, packet) => (index, packet),
                Next::Starved(_) | Next::Closed => break,
            };
            let last = !packet.more;
            taken += u64::from(last);
            if let Payload::External(number) = packet.payload {
                self.read_back = Some(ReadBack {
                    spilled: self.load.adopt_spilled(number),
                    index,
                    config: packet.config,
                    at: 0,
                    reading: false,
                });
                continue;
            }
            if packet.config {
                self.take_config(packet);
                continue;
            }
            let len = match packet.payload {
                Payload::Empty => {
                    self.ready.bytes += wire::PACKET_HEADER_LEN as u64;
                    continue;
                }
                Payload::External(_) => unreachable!("seen to above"),
                Payload::Lease(piece) => self.add(index, piece, guard),
            };
            let ready = &mut self.ready;
            if ready.indices.last() != Some(&index) {
                ready.indices.push(index);
            }
            if last {
                ready.bytes += wire::PACKET_HEADER_LEN as u64;
            }
            ready.open = !last;
            ready.bytes += len as u64;
            ready.len += len;
        }
        if taken > 0 {
            self.device.counters.taken(taken);
        }
    }

    /// Makes the ring read the next part of a spilled packet. The lane is idle, and the batch empty.
    fn read_on(&mut self, ring: &mut dyn Ring<Buffer>) -> Result<()> {
        let packet = self.read_back.as_mut().expect("there is one to be read");
        let (offset, run) = packet.spilled.locate(packet.at);
        let most = self.load.pool.layout().buffer_len;
        let lease = if most > 0 {
            LeaseCutter::new(self.load.pool.clone()).lease(run.min(most))
        } else {
            None
        };
        let lease = match lease {
            Some(lease) => lease,
            None => {
                let own = match self.own.take() {
                    Some(own) => own,
                    None => own_buffer()
                        .map_err(|error| error.on_device(&self.device.id).at_index(packet.index))?,
                };
                let lease = Pool::reserve(self.own.insert(own).clone(), 0);
                let mut lease = lease.expect("what was in it before has been written");
                lease.truncate(run.min(BOUNCE));
                lease
            }
        };
        packet.reading = true;
        let file = packet.spilled.file().fd().clone();
        self.lane.read_aside(
            (file, offset),
            (packet.index, lease),
            ring,
            &self.device.counters,
        );
        Ok(())
    }

    /// Puts what has been read of a spilled packet where it goes.
    fn has_read(&mut self, filled: Vec<Filled>) -> Result<()> {
        let packet = self.read_back.as_mut().expect("the ring was reading it");
        packet.reading = false;
        let index = packet.index;
        for Filled {
            mut buffer, len, ..
        } in filled
        {
            if len == 0 {
                let end = io::ErrorKind::UnexpectedEof.into();
                return Err(self.spill_failed(index, end));
            }
            buffer.truncate(len);
            packet.spilled.file().read_back(len);
            packet.at += len;
            if packet.config {
                let kept = keep(&mut self.config, buffer.bytes());
                kept.map_err(|error| error.on_device(&self.device.id).at_index(index))?;
                continue;
            }
            let ready = &mut self.ready;
            if packet.at == packet.spilled.size() {
                ready.bytes += wire::PACKET_HEADER_LEN as u64;
            }
            if ready.indices.last() != Some(&index) {
                ready.indices.push(index);
            }
            ready.bytes += len as u64;
            ready.len += len;
            ready.last_len = len;
            ready.open = packet.at < packet.spilled.size();
            ready.operations.push((index, buffer));
        }
        if packet.at == packet.spilled.size() {
            self.config_taken = packet.config;
            self.read_back = None;
            // Channels may wait for its space.
            self.load.backpressure.next_missing();
        }
        Ok(())
    }

    fn spill_failed(&self, index: u32, source: io::Error) -> Error {
        Error::new(ErrorKind::Spill, Phase::Load)
            .on_device(&self.device.id)
            .at_index(index)
            .caused_by(source)
    }

    /// Adds a piece to the batch: by a copy where it is small and not alone.
    fn add(&mut self, index: u32, piece: LeaseToken, guard: &Guard) -> usize {
        let len = piece.size();
        let small = len <= GATHER_MAX && 2 * len <= self.share;
        if small && self.ready.gathered_at.is_none() {
            let another = self.reader.is_ready(&self.device.reorder, guard);
            self.ready.staging = another.then(|| self.stage(index)).flatten();
        }
        let ready = &mut self.ready;
        ready.last_len = len;
        match &mut ready.staging {
            Some((_, buffer, used)) if small && len <= buffer.size() - *used => {
                // Recycled at once.
                let lease = Pool::adopt(&*self.load.pool, piece);
                buffer.bytes_mut()[*used..*used + len].copy_from_slice(lease.bytes());
                *used += len;
                ready.gathered.push((*used, index));
            }
            _ => {
                ready.close_staging();
                let lease = Pool::adopt(self.load.pool.clone(), piece);
                ready.operations.push((index, lease));
            }
        }
        len
    }

    /// A staging buffer, if one is free. There are few for all devices; without one small packets
    /// go as they are.
    fn stage(&mut self, index: u32) -> Option<(u32, Buffer, usize)> {
        let layout = self.load.staging.layout();
        if layout.buffers == 0 {
            return None;
        }
        let buffer = LeaseCutter::new(self.load.staging.clone()).lease(layout.buffer_len)?;
        self.ready.gathered_at = Some(index);
        Some((index, buffer, 0))
    }
}

/// Adds a part of a config packet to what is kept of it.
fn keep(config: &mut Vec<u8>, bytes: &[u8]) -> Result<()> {
    let reserved = config.try_reserve(bytes.len());
    reserved.map_err(|_| Error::lacking(Phase::Load, "memory for a config", Errno::ENOMEM))?;
    config.extend_from_slice(bytes);
    Ok(())
}

/// A buffer of the transfer's own.
fn own_buffer() -> Result<Arc<Pool>> {
    let pool = Pool::new(PoolLayout {
        buffers: 0,
        buffer_len: 0,
        reserves: 1,
        reserve_len: BOUNCE,
    });
    let what = "memory to read a spilled packet back";
    pool.map(Arc::new)
        .map_err(|error| Error::lacking(Phase::Load, what, error))
}

impl Transfer for LoadTransfer {
    fn lane(&mut self) -> &mut Lane {
        &mut self.lane
    }

    fn complete(
        &mut self,
        completion: Completion<Buffer>,
        ring: &mut dyn Ring<Buffer>,
    ) -> Progress {
        self.lane.complete(completion, ring, &self.device.counters)
    }

    fn stop(&self) -> Option<Error> {
        let _quit_or_exit = self.device.flags.stop()?;
        Some(self.aborted())
    }

    fn advance(&mut self, context: &mut Context<'_>) -> TransferState {
        if !self.device.flags.is_started() {
            return TransferState::Held;
        }
        self.device.told.begins(&self.device.id);
        if self.lent.is_some() {
            let moved = self.look_at_lent(context.guard);
            if !(self.is_due(context.guard) && self.take_back()) {
                // What channels write is progress too.
                return if moved {
                    TransferState::Held
                } else {
                    TransferState::Starved
                };
            }
        } else if self.may_lend() {
            self.lend();
            self.look_at_lent(context.guard);
            return TransferState::Held;
        }
        if let Some(error) = self.failure.take() {
            return TransferState::Finished(Err(error));
        }
        // A loader that has been started early does not count as waiting before the switchover.
        let switched = self.device.flags.is_switched();
        if switched {
            let phases = &self.device.counters.phases;
            self.started.get_or_insert_with(|| {
                let now = Instant::now();
                phases.first_in.begin(now);
                phases.write.begin(now);
                now
            });
        }
        // Before the look at the slots: what was published before the last input ended is seen.
        let ended = self.load.input_ended();
        self.share = (CHAIN_BYTES / context.busy.max(1)).max(GATHER_MAX);
        self.gather(context.guard);
        self.ready.close_staging();
        if !self.ready.operations.is_empty() {
            if let Some(since) = self.starved.take() {
                self.device.counters.starved.add_time(since.elapsed());
            }
            self.device.counters.phases.first_in.end_once();
            mem::swap(&mut self.ready, &mut self.in_flight);
            for index in &self.in_flight.indices {
                self.device.told.load_start(&self.device.id, *index);
            }
            self.lane.submit(
                self.in_flight.operations.drain(..),
                context.ring,
                &self.device.counters,
            );
            if !self.reader.is_ready(&self.device.reorder, context.guard) {
                self.next_missing();
            }
            return TransferState::Busy;
        }
        if self.read_back.is_some() {
            return match self.read_on(context.ring) {
                Ok(()) => TransferState::Busy,
                Err(error) => TransferState::Finished(Err(error)),
            };
        }
        self.report_progress();
        if let Some(error) = self.no_room.take() {
            return TransferState::Finished(Err(error));
        }
        if self.config_taken {
            let Some(started) = self.started else {
                // The gate: no config before the switchover.
                return TransferState::Held;
            };
            let counters = &self.device.counters;
            if let Some(since) = self.starved.take() {
                counters.starved.add_time(since.elapsed());
            }
            let waited = counters.starved.get_time();
            counters.phases.wait.add(waited);
            let wrote = started.elapsed().saturating_sub(waited);
            counters.phases.write.add(wrote);
            return TransferState::Finished(Ok(()));
        }
        if ended {
            // Channels that were hung up on have ended too: then this is no news.
            if self.load.failure().is_some() {
                return TransferState::Finished(Err(self.aborted()));
            }
            let error = Error::new(ErrorKind::Missing, Phase::Load)
                .on_device(&self.device.id)
                .at_index(self.reader.next());
            return TransferState::Finished(Err(error));
        }
        self.next_missing();
        if switched {
            TransferState::Starved
        } else {
            TransferState::Held
        }
    }

    fn prepare(&mut self, guard: &Guard) -> Result<()> {
        self.gather(guard);
        if !self.config_taken && self.read_back.is_none() && !self.ready.is_full(self.share) {
            self.next_missing();
        }
        Ok(())
    }

    fn can_prepare(&self, guard: &Guard) -> bool {
        // A large packet goes as it is: there is nothing to prepare.
        !self.lends()
            && !self.config_taken
            && self.read_back.is_none()
            && !self.ready.is_full(self.share)
            && self.in_flight.gathered_at.is_some()
            && self.reader.is_ready(&self.device.reorder, guard)
    }

    fn part_done(&mut self, _filled: Vec<Filled>, _guard: &Guard) -> Result<()> {
        unreachable!("a load reads one piece at a time")
    }

    fn batch_done(&mut self, filled: Vec<Filled>, _guard: &Guard) -> Result<()> {
        if self.read_back.as_ref().is_some_and(|packet| packet.reading) {
            return self.has_read(filled);
        }
        let open = self.in_flight.open;
        let partly = self.in_flight.indices.last().copied().filter(|_| open);
        for index in &self.in_flight.indices {
            if partly != Some(*index) {
                self.device.told.load_end(&self.device.id, *index);
            }
        }
        self.device.counters.bytes.add(self.in_flight.bytes);
        let took = self.lane.submitted().elapsed();
        self.pace = self.pace.moved(self.in_flight.len, took);
        self.in_flight.clear();
        if partly.is_none() && self.is_last_written() {
            trace::load_state_device_buffer_end(&self.device.id);
        }
        self.report_progress();
        Ok(())
    }

    fn failed(&self, index: u32, moved: usize, source: io::Error) -> Error {
        if self.read_back.as_ref().is_some_and(|packet| packet.reading) {
            return self.spill_failed(index, source);
        }
        // Within a gathered write the packet is the one that the bytes moved so far end in.
        let Batch {
            gathered,
            gathered_at,
            ..
        } = &self.in_flight;
        let index = match *gathered_at {
            Some(at) if at == index => {
                let at = gathered.partition_point(|&(end, _)| end <= moved);
                gathered.get(at).map_or(index, |&(_, index)| index)
            }
            _ => index,
        };
        self.device_failed(index, source)
    }

    fn starve(&mut self) {
        if self.started.is_some() && self.starved.is_none() {
            self.starved = Some(Instant::now());
            trace::load_state_device_buffer_starved(&self.device.id, self.next());
        }
        if self.lent.is_some() {
            return;
        }
        self.reader.starve(&self.device.reorder);
    }

    fn is_held(&mut self) -> bool {
        !self.take_back()
    }

    fn look_again(&self) -> Option<Instant> {
        let since = self.lent.as_ref()?.waiting?;
        Some(later(since, COMES))
    }

    fn slept_until(&mut self, then: Instant) {
        if let Some(lent) = &mut self.lent
            && let Some(since) = lent.waiting
        {
            lent.nobody |= later(since, COMES) <= then;
        }
    }

    fn is_ready(&mut self, guard: &Guard) -> bool {
        if self.lent.is_some() {
            return self.is_due(guard);
        }
        if self.config_taken {
            return self.device.flags.is_switched();
        }
        self.device.flags.is_started()
            && (self.reader.is_ready(&self.device.reorder, guard) || self.load.input_ended())
    }

    fn stalled(&self) -> Error {
        // Relaxed: for the message.
        let missing = match self.load.awaited.load(Ordering::Relaxed) {
            _ if !self.lane.is_idle() || self.is_written() => {
                "the device has not taken what it was given".into()
            }
            0 => "this packet has not come".into(),
            count => format!("this packet has not come, nor have {count} of the channels"),
        };
        Error::stalled(Phase::Load, missing)
            .on_device(&self.device.id)
            .at_index(self.position())
    }

    fn finish(mut self, result: Result<()>) {
        // Of a load that fails while it waits.
        if let Some(since) = self.starved.take() {
            self.device.counters.starved.add_time(since.elapsed());
        }
        let config = mem::take(&mut self.config);
        // The device's own error says more than a stop that came on top.
        let result = self.failure.take().map_or(result, Err);
        // Of a chain that failed, and of the empty packets behind the last.
        let mut bytes = self.in_flight.bytes;
        if self.ready.indices.is_empty() {
            bytes += self.ready.bytes;
        }
        self.device.counters.bytes.add(bytes);
        if result.is_ok() {
            let len = config.len() + wire::PACKET_HEADER_LEN;
            self.device.counters.bytes.add(len as u64);
        }
        self.outcome.drained = Some(result.map(|()| config));
    }
}
