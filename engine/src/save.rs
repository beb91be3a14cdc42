//! The source's work: bytes out of each device in order, packets out on many channels.
//!
//! ```text
//!                 channel side (many threads)          device side (one driver thread)
//!               ┌─────────────────────────────────┬──────────────────────────────────────────┐
//!   save.rs     │ send ← take ◀───────────────────┼─── publish ← encode ← complete ← submit  │
//!               │   │                             │                                     ▲    │
//!               │   └────────── recycle ──────────┼──────────────────────────────▶ lease┘    │
//!               └─────────────────────────────────┴──────────────────────────────────────────┘
//! ```
//!
//! `load.rs` with the arrows turned: the driver reads ahead into leased buffers, writes each
//! packet's headers into the room that was left in front of its data, and publishes it; whichever
//! channel is free sends headers and data from that same buffer with one call.
//!
//! | who | owns | may touch |
//! |---|---|---|
//! | a channel's thread | its socket | the queue, the packets that it took |
//! | the driver | every [`SaveFlow`]: lane, packer, a clone of the data fd | the pool, the queue |
//! | a device's thread | the [`Device`]: its state, its config, its data fd | its flags, its result |
//! | the main thread | the session | flags |
//!
//! What ends each wait: a channel that waits for a packet, a packet, the end, or a stop; the driver,
//! see `driver.rs`; a device's thread, the driver's result or a stop.

use std::{
    fmt, io,
    sync::OnceLock,
    time::{Duration, Instant},
};

use crossbeam_epoch::{Collector, Guard};
use vfio_migration_uring::{Completion, Fd, Ring};

use crate::{
    channel::{Sender, Terms},
    device::{Device, Recover},
    driver::{Context, Flow, Handle, Pump},
    error::{Error, ErrorKind, Phase, Result},
    id::DeviceId,
    lane::{Buffer, CHAIN, Direction, Filled, Lane, Progress},
    reorder::{
        control::{Control, SLACK},
        pool::{ALIGN, Packer, Pool, PoolLayout},
        queue::{Queue, Ticket},
        slot::{Packet, Payload},
    },
    state::DeviceState,
    stats::{ChannelCounters, DeviceCounters},
    sync::{
        Arc, Mutex,
        atomic::{
            AtomicBool, AtomicU32,
            Ordering::{AcqRel, Relaxed},
        },
        lock,
    },
    trace,
    verdict::Verdict,
    wire,
};

/// The room in front of a packet's data: the device's ordinal, then, up against the data, both
/// headers. The data begins on a line of its own.
pub(crate) const HEADROOM: usize = (4 + wire::DEVICE_PACKET_LEN).next_multiple_of(ALIGN);

/// Where the headers begin in it.
const HEADERS: usize = HEADROOM - wire::DEVICE_PACKET_LEN;

/// Packets below this size are sent several with one call.
const SMALL: usize = 64 << 10;

/// How many, at most.
const GATHER: usize = 16;

/// One device, as the driver, the channels and its own thread share it.
pub(crate) struct SaveDevice {
    pub(crate) id: DeviceId,
    ordinal: u32,
    key: wire::DeviceKey,
    /// The most bytes of data in a packet.
    data_len: usize,
    pub(crate) control: Control,
    pub(crate) counters: DeviceCounters,
    /// The config packet's data, framing tags included, once it is saved.
    config: OnceLock<Vec<u8>>,
    /// The config packet's headers, once its idx is known.
    config_headers: OnceLock<[u8; wire::DEVICE_PACKET_LEN]>,
    drained: Mutex<Option<Result<()>>>,
}

impl SaveDevice {
    /// Which lane is its own.
    pub(crate) const fn ordinal(&self) -> u32 {
        self.ordinal
    }
}

/// What all threads of a save share.
pub(crate) struct Save {
    pub(crate) collector: Collector,
    pub(crate) devices: Vec<Arc<SaveDevice>>,
    pub(crate) pool: Arc<Pool>,
    pub(crate) queue: Queue,
    pub(crate) driver: Arc<Handle<SaveFlow>>,
    /// Devices whose last packet is not in the queue.
    unfinished: AtomicU32,
    /// Whether the driver waits for memory.
    dry: AtomicBool,
    grace: Duration,
    pub(crate) verdict: Verdict,
}

impl Save {
    pub(crate) fn new(
        devices: Vec<(DeviceId, usize)>,
        pool: PoolLayout,
        driver: Arc<Handle<SaveFlow>>,
        grace: Duration,
    ) -> Self {
        let collector = Collector::new();
        let count = u32::try_from(devices.len()).expect("the builder bounds their number");
        let device = |(ordinal, (id, data_len)): (u32, (DeviceId, usize))| {
            assert!(HEADROOM + data_len <= pool.buffer_len && pool.buffers > 0);
            Arc::new(SaveDevice {
                key: wire::DeviceKey::new(&id),
                id,
                ordinal,
                data_len,
                control: Control::new(),
                counters: DeviceCounters::default(),
                config: OnceLock::new(),
                config_headers: OnceLock::new(),
                drained: Mutex::new(None),
            })
        };
        Self {
            devices: (0..count).zip(devices).map(device).collect(),
            pool: Arc::new(Pool::new(pool)),
            queue: Queue::new(collector.clone()),
            collector,
            driver,
            unfinished: AtomicU32::new(count),
            dry: AtomicBool::new(false),
            grace,
            verdict: Verdict::default(),
        }
    }

    /// Ends everything, for this reason if it is the first. Returns whether it was.
    pub(crate) fn fail(&self, error: Error) -> bool {
        let first = self.verdict.fail(error);
        if first {
            for device in &self.devices {
                device.control.quit();
            }
            let epoch = self.collector.register();
            self.queue
                .close(&epoch.pin(), |packet| recycle(&self.pool, packet));
            self.driver.wake();
        }
        first
    }

    /// Says that memory has come back. Wakes the driver where it waits for some.
    fn recycled(&self) {
        // Relaxed: behind the bell's fence.
        let must = self.driver.doorbell.ring_if(|| self.dry.load(Relaxed));
        self.driver.wake_if(must);
    }
}

impl fmt::Debug for Save {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Save")
            .field("pool", &self.pool)
            .field("queue", &self.queue)
            .finish_non_exhaustive()
    }
}

fn recycle(pool: &Arc<Pool>, packet: Packet) {
    if let Payload::Piece(piece) = packet.payload {
        drop(Pool::adopt(&**pool, piece));
    }
}

// ---------------------------------------------------------------------------- channel side

/// Channel side: take → send, until every packet has a taker.
pub(crate) fn serve_channel(
    save: &Save,
    mut sender: Sender,
    terms: &Terms,
    id: u8,
    counters: &ChannelCounters,
) -> Result<()> {
    sender.greet(terms, id)?;
    counters.syncs.add(1);
    let epoch = save.collector.register();
    let mut packets = Vec::with_capacity(GATHER);
    loop {
        let since = Instant::now();
        let ticket = save.queue.take(None, || epoch.pin());
        counters.blocked.add_time(since.elapsed());
        match ticket.expect("a wait without a deadline ends with a look") {
            Ticket::Packet(packet) => packets.push(Outgoing::new(save, packet)),
            Ticket::End => return sender.finish(),
            Ticket::Closed => {
                let failure = save.verdict.failure();
                return Err(failure.unwrap_or_else(|| Error::cancelled(Phase::Send)));
            }
        }
        while packets.len() < GATHER && packets.iter().all(|packet| packet.len() < SMALL) {
            match save.queue.try_take(&epoch.pin()) {
                Some(Ticket::Packet(packet)) => packets.push(Outgoing::new(save, packet)),
                // Found again by the next take.
                _ => break,
            }
        }
        let sent = {
            let mut slices: Vec<_> = packets.iter().flat_map(Outgoing::slices).collect();
            sender.send(&mut slices)
        };
        if let Err(error) = sent {
            let packet = &packets[0];
            return Err(error.on_device(&packet.device.id).at_index(packet.index()));
        }
        for packet in packets.drain(..) {
            counters.packets.add(1);
            counters.bytes.add(packet.len() as u64);
            packet.device.counters.taken(1);
            let payload = packet.len() - wire::DEVICE_STATE_HEADER_LEN;
            packet.device.counters.bytes.add(payload as u64);
        }
        save.recycled();
    }
}

/// A packet that a channel has taken.
struct Outgoing<'a> {
    device: &'a SaveDevice,
    /// Headroom and data; `None` for the config packet, which is the device's to keep.
    buffer: Option<crate::reorder::pool::Lease<&'a Pool>>,
}

impl<'a> Outgoing<'a> {
    fn new(save: &'a Save, packet: Packet) -> Self {
        match packet.payload {
            Payload::Piece(piece) => {
                let buffer = Pool::adopt(&*save.pool, piece);
                let ordinal = buffer.bytes()[..4].try_into().expect("4 of many bytes");
                Self {
                    device: &save.devices[u32::from_be_bytes(ordinal) as usize],
                    buffer: Some(buffer),
                }
            }
            Payload::Aside(ordinal) => Self {
                device: usize::try_from(ordinal)
                    .ok()
                    .and_then(|at| save.devices.get(at))
                    .expect("the driver published it"),
                buffer: None,
            },
            Payload::Empty => unreachable!("a save has no empty packets"),
        }
    }

    /// Headers, then data.
    fn slices(&self) -> impl Iterator<Item = io::IoSlice<'_>> {
        let (headers, data) = match &self.buffer {
            Some(buffer) => (&buffer.bytes()[HEADERS..], [].as_slice()),
            None => {
                let headers = self.device.config_headers.get();
                let config = self.device.config.get();
                (
                    headers.expect("set before publication").as_slice(),
                    config.expect("set before publication").as_slice(),
                )
            }
        };
        [headers, data]
            .into_iter()
            .filter(|bytes| !bytes.is_empty())
            .map(io::IoSlice::new)
    }

    /// Bytes on the wire.
    fn len(&self) -> usize {
        self.slices().map(|slice| slice.len()).sum()
    }

    fn index(&self) -> u32 {
        let headers = self.slices().next();
        let index = headers
            .as_deref()
            .and_then(|headers| headers.get(wire::DEVICE_STATE_HEADER_LEN + 4..))
            .and_then(|bytes| bytes.first_chunk());
        index.copied().map_or(0, u32::from_be_bytes)
    }
}

// ----------------------------------------------------------------------------- device side

/// One device's bytes on their way out of its data fd. The driver's.
pub(crate) struct SaveFlow {
    save: Arc<Save>,
    device: Arc<SaveDevice>,
    lane: Lane,
    packer: Packer<Arc<Pool>>,
    /// Memory that was leased and not used.
    spare: Vec<Buffer>,
    /// How many reads to link: more while they come back full.
    depth: usize,
    next: u32,
    ended: bool,
    started: Instant,
    starved: Option<Instant>,
    /// Last, so that the lane has given the data fd back before the result is there.
    outcome: Outcome,
}

/// Leaves a flow's result when it goes away, however it does.
struct Outcome {
    save: Arc<Save>,
    device: Arc<SaveDevice>,
    drained: Option<Result<()>>,
}

impl Drop for Outcome {
    fn drop(&mut self) {
        let unfinished = || {
            let kind = ErrorKind::Internal("the driver ended before this device's transfer");
            Err(Error::new(kind, Phase::Save).on_device(&self.device.id))
        };
        let drained = self.drained.take().unwrap_or_else(unfinished);
        let done = drained.is_ok();
        *lock(&self.device.drained) = Some(drained);
        self.device.control.drained();
        // AcqRel: the last one ends the sequence that all have published to; and all are the
        // driver's.
        if done && self.save.unfinished.fetch_sub(1, AcqRel) == 1 {
            self.save.queue.end();
        }
    }
}

impl SaveFlow {
    fn new(save: Arc<Save>, device: Arc<SaveDevice>, fd: Fd) -> Self {
        Self {
            lane: Lane::new(fd, Direction::Read, device.ordinal),
            packer: Packer::new(save.pool.clone()),
            outcome: Outcome {
                save: save.clone(),
                device: device.clone(),
                drained: None,
            },
            save,
            device,
            spare: Vec::with_capacity(CHAIN as usize),
            depth: 2,
            next: 0,
            ended: false,
            started: Instant::now(),
            starved: None,
        }
    }

    fn error(&self, kind: ErrorKind) -> Error {
        Error::new(kind, Phase::Save)
            .on_device(&self.device.id)
            .at_index(self.next)
    }

    /// Leases up to `depth` buffers.
    fn lease(&mut self) {
        while self.spare.len() < self.depth {
            let Some(mut buffer) = self.packer.lease(HEADROOM + self.device.data_len) else {
                return;
            };
            buffer.advance(HEADROOM);
            self.spare.push(buffer);
        }
    }

    /// Encodes a packet's headers in front of its data, and publishes it.
    fn publish(&mut self, mut buffer: Buffer, len: usize, guard: &Guard) -> Result<()> {
        if self.next == wire::INVALID_INDEX {
            return Err(self.error(ErrorKind::Config("more packets than idx can count")));
        }
        buffer.retreat(HEADROOM);
        self.packer.shorten(&mut buffer, HEADROOM + len);
        let data_len = u32::try_from(len).expect("a buffer is far below 4 GiB");
        let headers = wire::encode_packet(&self.device.key, self.next, false, data_len);
        let bytes = buffer.bytes_mut();
        bytes[..4].copy_from_slice(&self.device.ordinal.to_be_bytes());
        bytes[HEADERS..HEADROOM].copy_from_slice(&headers);
        self.device.counters.published();
        let packet = Packet {
            payload: Payload::Piece(buffer.into_piece()),
            config: false,
            more: false,
        };
        self.hand_over(packet, guard)?;
        self.next += 1;
        Ok(())
    }

    fn hand_over(&self, packet: Packet, guard: &Guard) -> Result<()> {
        self.save.queue.publish(packet, guard).map_err(|packet| {
            recycle(&self.save.pool, packet);
            self.error(ErrorKind::Cancelled)
        })
    }

    /// Publishes the config packet, whose idx is the count of the others.
    fn publish_config(&self, guard: &Guard) -> Result<()> {
        let config = self.device.config.get().expect("its notice came");
        let data_len = u32::try_from(config.len()).expect("bounded when it was saved");
        let headers = wire::encode_packet(&self.device.key, self.next, true, data_len);
        self.device
            .config_headers
            .set(headers)
            .expect("a device has one config packet");
        self.device.counters.published();
        let packet = Packet {
            payload: Payload::Aside(self.device.ordinal.into()),
            config: true,
            more: false,
        };
        self.hand_over(packet, guard)
    }
}

impl Flow for SaveFlow {
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
        let _quit_or_exit = self.device.control.stop()?;
        Some(self.error(ErrorKind::Cancelled))
    }

    fn pump(&mut self, context: &mut Context<'_>) -> Pump {
        if self.ended {
            if !self.device.control.is_config_ready() {
                return Pump::Held;
            }
            return Pump::Finished(self.publish_config(context.guard));
        }
        self.lease();
        if self.spare.is_empty() {
            return Pump::Held;
        }
        if let Some(since) = self.starved.take() {
            self.device.counters.starved.add_time(since.elapsed());
        }
        let (next, batch) = (self.next, self.spare.drain(..));
        let numbered = (next..).zip(batch);
        self.lane
            .submit(numbered, context.ring, &self.device.counters);
        Pump::Busy
    }

    fn batch_done(&mut self, filled: Vec<Filled>, guard: &Guard) -> Result<()> {
        let whole = filled
            .iter()
            .all(|filled| filled.len == self.device.data_len);
        for Filled { buffer, len, end } in filled {
            if end {
                self.ended = true;
                let phases = &self.device.counters.phases;
                phases.transfer.add_time(self.started.elapsed());
            }
            if len > 0 {
                self.publish(buffer, len, guard)?;
            } else if !self.ended {
                self.spare.push(buffer);
            }
        }
        self.depth = if whole {
            (self.depth * 2).min(CHAIN as usize / 2)
        } else {
            1
        };
        self.spare.truncate(self.depth);
        if self.ended {
            self.spare.clear();
            self.packer.release();
        }
        Ok(())
    }

    fn failed(&self, index: u32, _moved: usize, source: io::Error) -> Error {
        self.error(ErrorKind::Device)
            .at_index(index)
            .caused_by(source)
    }

    fn starve(&mut self) {
        if !self.ended {
            self.starved.get_or_insert_with(Instant::now);
            // Relaxed: ordered by the bell's fence. Never taken back: a channel that rings for a
            // driver with enough memory wakes it once too often.
            self.save.dry.store(true, Relaxed);
        }
    }

    fn is_ready(&mut self, _guard: &Guard) -> bool {
        if self.ended {
            return self.device.control.is_config_ready();
        }
        self.lease();
        !self.spare.is_empty()
    }

    fn stalled(&self) -> Error {
        self.error(ErrorKind::Stalled)
    }

    fn finish(mut self, result: Result<()>) {
        self.outcome.drained = Some(result);
    }
}

// -------------------------------------------------------------------------- device's thread

/// The device's thread: everything of a save but the bytes. Returns once all of the device is in
/// the queue, or it is put back, or given up.
pub(crate) fn serve_device(
    save: &Arc<Save>,
    shared: &Arc<SaveDevice>,
    device: &mut Device,
    set_up: impl FnOnce(Result<()>),
) -> Result<()> {
    trace::save_complete_precopy_thread_start(&shared.id);
    let result = set_up_device(save, shared, device);
    set_up(result.clone());
    let result = result.and_then(|()| {
        let config = save_config(save, shared, device);
        if let Err(error) = &config {
            // Ends the driver's part too, so that the wait for it does.
            save.fail(error.clone());
        }
        config.and(wait_for_driver(save, shared))
    });
    let errno = |error: &Error| {
        -error
            .raw_os_error()
            .unwrap_or(nix::errno::Errno::ECANCELED as i32)
    };
    let ret = result.as_ref().map_or_else(errno, |()| 0);
    trace::save_complete_precopy_thread_end(&shared.id, ret);
    result
}

/// Takes a device whose save failed back to work. Not one that a transfer is stuck in.
pub(crate) fn put_back(device: &mut Device) {
    if device.state().is_saving() {
        // The save's own error is the one to report; a device that is lost says so from now on.
        let _lost = device.set_state(DeviceState::Running, Recover::Reset);
    }
}

fn set_up_device(save: &Arc<Save>, shared: &Arc<SaveDevice>, device: &mut Device) -> Result<()> {
    trace::save_setup(&shared.id, shared.data_len as u64);
    let cancelled = || Error::cancelled(Phase::Setup).on_device(&shared.id);
    if shared.control.stop().is_some() {
        return Err(cancelled());
    }
    let since = Instant::now();
    device.set_state(DeviceState::StopCopy, DeviceState::Stop)?;
    shared.counters.phases.set_state.add_time(since.elapsed());
    let flow = SaveFlow::new(save.clone(), shared.clone(), device.lend()?);
    let attached = save.driver.attach(shared.ordinal, flow);
    attached.map_err(|_flow| cancelled())
}

/// Saves the config while the driver reads: a device in STOP_COPY does not change.
fn save_config(save: &Save, shared: &SaveDevice, device: &mut Device) -> Result<()> {
    let since = Instant::now();
    let mut config = Vec::new();
    device.save_config(&mut config)?;
    shared.counters.phases.config.add_time(since.elapsed());
    let packet = wire::wrap_config(&config);
    if u32::try_from(packet.len() + wire::DEVICE_PACKET_LEN).is_err() {
        let kind = ErrorKind::Config("a config is below 4 GiB");
        return Err(Error::new(kind, Phase::Config).on_device(&shared.id));
    }
    shared
        .config
        .set(packet)
        .expect("a device saves its config once");
    let _first = shared.control.config_ready();
    save.driver.wake();
    Ok(())
}

/// The driver's result. Ends with it; or, after a stop, with the grace time.
fn wait_for_driver(save: &Save, shared: &SaveDevice) -> Result<()> {
    if shared.control.wait_drained().is_err() {
        // The driver bounds its own part by the grace time.
        let until = Instant::now() + save.grace + SLACK;
        if !shared.control.wait_drained_until(until) {
            return Err(Error::new(ErrorKind::Stuck, Phase::Save).on_device(&shared.id));
        }
    }
    let drained = lock(&shared.drained).take();
    drained.expect("the driver leaves its result before it says so")
}
