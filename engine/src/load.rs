//! The destination's work: packets in on many channels, bytes out to each device in order.
//!
//! ```text
//!                 channel side (many threads)          device side (one driver thread)
//!               ┌─────────────────────────────────┬──────────────────────────────────────────┐
//!   load.rs     │ receive → decode → publish ─────┼──▶ take → submit → complete → recycle ─┐ │
//!               │     ▲                           │                                        │ │
//!               │     └──────── lease ◀───────────┼────────────────────────────────────────┘ │
//!               └─────────────────────────────────┴──────────────────────────────────────────┘
//! ```
//!
//! | who | owns | may touch |
//! |---|---|---|
//! | a channel's thread | its socket, its [`Packer`] | every device's [`Inbox`] |
//! | the driver | every [`LoadFlow`]: cursor, lane, a clone of the data fd | the pool |
//! | a device's thread | the [`Device`]: its state, its config, its data fd | its [`Control`], its result |
//! | the main thread | the session | flags |
//!
//! What ends each wait: a channel that waits for room, the driver's progress or a stop; the driver,
//! see `driver.rs`; a device's thread, the driver's result, a notice or a stop; whoever cleans up,
//! the device's end or the grace time.

use std::{
    fmt, io, mem,
    time::{Duration, Instant},
};

use crossbeam_epoch::{Collector, Guard, LocalHandle};
use vfio_migration_uring::{Completion, Fd, Ring};

use crate::{
    channel::Inlet,
    device::{Device, Recover},
    driver::{Context, Flow, Handle, Pump},
    error::{Error, ErrorKind, Phase, Result, Violation},
    id::DeviceId,
    lane::{Buffer, CHAIN, Direction, Filled, Lane, Progress},
    reorder::{
        control::{Control, SLACK},
        cursor::{Cursor, Inbox, Next},
        pool::{Packer, Pool, PoolLayout},
        slot::{Packet, Payload, Publish},
        waiters::Waiters,
    },
    router::Router,
    state::DeviceState,
    stats::{ChannelCounters, DeviceCounters},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
        lock,
    },
    trace,
    verdict::Verdict,
    wire,
};

/// Packets up to this many bytes are gathered into one write where several are ready.
const GATHER_MAX: usize = 32 << 10;

/// The most bytes of a chain of large packets: enough to keep the device busy, little enough to
/// stay in the cache.
const CHAIN_BYTES: usize = 4 << 20;

/// What became of the driver's part of a load: the config packet's data, framing tags included.
type Drained = Result<Vec<u8>>;

/// One device, as the channels, the driver and its own thread share it.
pub(crate) struct LoadDevice {
    pub(crate) id: DeviceId,
    pub(crate) ordinal: u32,
    pub(crate) inbox: Inbox,
    pub(crate) control: Control,
    pub(crate) counters: DeviceCounters,
    /// For iterable data: from setup to the switchover's start.
    iterable: Mutex<Option<Fd>>,
    drained: Mutex<Option<Drained>>,
    unplugged: AtomicBool,
}

impl LoadDevice {
    /// Says that the device goes away, and that its end is no failure.
    pub(crate) fn unplug(&self) {
        // Relaxed: the stop that follows carries it.
        self.unplugged.store(true, Ordering::Relaxed);
    }

    /// Whether it goes away.
    pub(crate) fn is_unplugged(&self) -> bool {
        // Relaxed: as above.
        self.unplugged.load(Ordering::Relaxed)
    }

    fn leave(&self, drained: Drained) {
        *lock(&self.drained) = Some(drained);
        self.control.drained();
    }

    fn refuse(&self, violation: Violation, index: u32) -> Error {
        Error::protocol(violation)
            .on_device(&self.id)
            .at_index(index)
    }
}

/// What a name on the wire stands for.
pub(crate) enum Route {
    /// A device of this session.
    Device(Arc<LoadDevice>),
    /// A device of this VM whose data comes another way.
    NotMultifd(DeviceId),
}

/// What all threads of a load share.
pub(crate) struct Load {
    pub(crate) collector: Collector,
    pub(crate) router: Router<Route>,
    pub(crate) pool: Arc<Pool>,
    staging: Arc<Pool>,
    pub(crate) driver: Arc<Handle<LoadFlow>>,
    pub(crate) settings: LoadSettings,
    /// Channels that wait for room.
    pub(crate) room: Waiters,
    /// Channels and publishers that may still bring packets.
    inputs: AtomicU32,
    pub(crate) verdict: Verdict,
}

/// The settings that the threads of a load look at.
#[derive(Clone, Debug)]
pub(crate) struct LoadSettings {
    pub(crate) max_packet: u32,
    pub(crate) window: u32,
    pub(crate) config_after_iterables: bool,
    pub(crate) stop_after_load: bool,
    pub(crate) grace: Duration,
}

impl Load {
    pub(crate) fn new(
        pool: PoolLayout,
        staging: PoolLayout,
        driver: Arc<Handle<LoadFlow>>,
        settings: LoadSettings,
    ) -> Self {
        let collector = Collector::new();
        Self {
            router: Router::new(collector.clone()),
            collector,
            pool: Arc::new(Pool::new(pool)),
            staging: Arc::new(Pool::new(staging)),
            driver,
            settings,
            room: Waiters::new(),
            inputs: AtomicU32::new(0),
            verdict: Verdict::default(),
        }
    }

    /// All devices, in the order of their names.
    pub(crate) fn devices(&self) -> Vec<Arc<LoadDevice>> {
        let handle = self.collector.register();
        let routes = self.router.all(&handle.pin());
        let device = |route: &Arc<Route>| match &**route {
            Route::Device(device) => Some(device.clone()),
            Route::NotMultifd(_) => None,
        };
        routes.iter().filter_map(device).collect()
    }

    /// Adds a device under its name.
    pub(crate) fn add(&self, id: &DeviceId, ordinal: u32) -> Result<Arc<LoadDevice>> {
        let device = Arc::new(LoadDevice {
            id: id.clone(),
            ordinal,
            inbox: Inbox::new(self.collector.clone(), self.settings.window),
            control: Control::new(),
            counters: DeviceCounters::default(),
            iterable: Mutex::new(None),
            drained: Mutex::new(None),
            unplugged: AtomicBool::new(false),
        });
        self.add_route(id, Route::Device(device.clone()))?;
        Ok(device)
    }

    /// Adds a name.
    pub(crate) fn add_route(&self, id: &DeviceId, route: Route) -> Result<()> {
        let handle = self.collector.register();
        let idstr = id.idstr().as_bytes();
        let guard = handle.pin();
        if self
            .router
            .insert(idstr, id.instance(), Arc::new(route), &guard)
        {
            Ok(())
        } else {
            let kind = ErrorKind::Config("two devices of one name");
            Err(Error::new(kind, Phase::Setup).on_device(id))
        }
    }

    /// Takes a device out: its packets are refused from now on, and its load ends.
    pub(crate) fn remove(&self, device: &LoadDevice) {
        let handle = self.collector.register();
        let idstr = device.id.idstr().as_bytes();
        let _gone = self
            .router
            .remove(idstr, device.id.instance(), &handle.pin());
        device.control.quit();
        self.driver.wake();
        self.room.notify_all();
    }

    /// Bytes for gathering small packets.
    pub(crate) fn staging_len(&self) -> usize {
        self.staging.layout().size()
    }

    /// The first failure, if there was one.
    pub(crate) fn failure(&self) -> Option<Error> {
        self.verdict.failure()
    }

    /// Ends everything, for this reason if it is the first. Returns whether it was.
    pub(crate) fn fail(&self, error: Error) -> bool {
        let first = self.verdict.fail(error);
        if first {
            for device in self.devices() {
                device.control.quit();
            }
            self.driver.wake();
            self.room.notify_all();
        }
        first
    }

    /// Says that one more thread may bring packets.
    pub(crate) fn open_input(&self) {
        // Relaxed: made from an input that is open, or before the load starts.
        self.inputs.fetch_add(1, Ordering::Relaxed);
    }

    /// Says that one of those will not any more.
    pub(crate) fn close_input(&self) {
        // Release: whoever sees no input left sees all that was published.
        if self.inputs.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.driver.wake();
        }
    }

    /// Whether no packet can come any more.
    fn input_ended(&self) -> bool {
        self.inputs.load(Ordering::Acquire) == 0
    }
}

impl fmt::Debug for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Load")
            .field("pool", &self.pool)
            .finish_non_exhaustive()
    }
}

// ---------------------------------------------------------------------------- channel side

/// A packet that has been announced: its header, and the device that it is for.
pub(crate) struct Incoming {
    pub(crate) device: Arc<LoadDevice>,
    pub(crate) index: u32,
    pub(crate) config: bool,
    /// Bytes of data still to come.
    remaining: usize,
    /// Whether nothing of it has been published yet.
    first: bool,
}

/// What a thread that brings packets has of its own: `!Sync`, one for each.
pub(crate) struct LoadInlet {
    load: Arc<Load>,
    epoch: LocalHandle,
    packer: Packer<Arc<Pool>>,
    /// The device of the packet before: most packets are for the same.
    recent: Option<Arc<LoadDevice>>,
    counters: Arc<ChannelCounters>,
}

impl LoadInlet {
    pub(crate) fn new(load: Arc<Load>, counters: Arc<ChannelCounters>) -> Self {
        let epoch = load.collector.register();
        let packer = Packer::new(load.pool.clone());
        Self {
            load,
            epoch,
            packer,
            recent: None,
            counters,
        }
    }

    fn device(&mut self, idstr: &[u8], instance: u32) -> Result<Arc<LoadDevice>> {
        if let Some(recent) = &self.recent
            && recent.id.idstr().as_bytes() == idstr
            && recent.id.instance() == instance
            && recent.control.stop().is_none()
        {
            return Ok(recent.clone());
        }
        let route = self.load.router.get(idstr, instance, &self.epoch.pin());
        match route.as_deref() {
            Some(Route::Device(device)) => {
                self.recent = Some(device.clone());
                Ok(device.clone())
            }
            Some(Route::NotMultifd(id)) => {
                Err(Error::protocol(Violation::MultifdNotInUse).on_device(id))
            }
            None => Err(Error::protocol(Violation::UnknownDevice {
                idstr: idstr.escape_ascii().to_string(),
                instance,
            })),
        }
    }

    /// Finds the device of a packet, and checks its length. Nothing is remembered of it yet.
    ///
    /// # Errors
    ///
    /// [`Violation::UnknownDevice`], [`Violation::MultifdNotInUse`],
    /// [`Violation::PacketTooLarge`].
    pub(crate) fn announce(
        &mut self,
        (idstr, instance): (&[u8], u32),
        header: wire::PacketHeader,
        data_len: usize,
    ) -> Result<Incoming> {
        let wire::PacketHeader { index, config } = header;
        let device = self
            .device(idstr, instance)
            .map_err(|error| error.at_index(index))?;
        let max = self.load.settings.max_packet;
        let len = data_len.saturating_add(wire::PACKET_HEADER_LEN);
        if len > max as usize {
            let len = u32::try_from(len).unwrap_or(u32::MAX);
            let violation = Violation::PacketTooLarge { len, max };
            return Err(device.refuse(violation, index));
        }
        Ok(Incoming {
            device,
            index,
            config,
            remaining: data_len,
            first: true,
        })
    }

    /// Checks a packet's idx against all that came before, and remembers it.
    ///
    /// # Errors
    ///
    /// The rule that it breaks.
    pub(crate) fn admit(&self, packet: &Incoming) -> Result<()> {
        let (device, index) = (&packet.device, packet.index);
        let admitted = device.inbox.admit(index, packet.config);
        admitted.map_err(|violation| device.refuse(violation, index))?;
        trace::load_state_device_buffer_incoming(&device.id, index);
        Ok(())
    }

    /// Memory for the rest of a packet, or for as much of it as can be had: at most a
    /// buffer, and for the packet that the device needs next at the least its reserve. `None` where
    /// there is none now.
    pub(crate) fn try_lease(&mut self, packet: &Incoming) -> Result<Option<Buffer>> {
        if let Some(error) = self.stopped(&packet.device) {
            return Err(error);
        }
        let inbox = &packet.device.inbox;
        if !inbox.in_window(packet.index) {
            return Ok(None);
        }
        let layout = self.load.pool.layout();
        if layout.buffers > 0
            && let Some(lease) = self.packer.lease(packet.remaining.min(layout.buffer_len))
        {
            return Ok(Some(lease));
        }
        if inbox.next() != packet.index {
            return Ok(None);
        }
        let reserve = Pool::reserve(self.load.pool.clone(), packet.device.ordinal);
        Ok(reserve.map(|mut lease| {
            lease.truncate(packet.remaining.min(lease.size()));
            lease
        }))
    }

    /// As [`LoadInlet::try_lease`], waiting for it. Ends with memory, or the packet's or the load's end.
    pub(crate) fn lease(&mut self, packet: &Incoming) -> Result<Buffer> {
        if let Some(lease) = self.try_lease(packet)? {
            return Ok(lease);
        }
        // A buffer that is not full would be held for as long as the wait lasts.
        self.packer.release();
        let since = Instant::now();
        let load = self.load.clone();
        let found = load.room.wait(None, || {
            if packet.index < packet.device.inbox.next() {
                return Some(Err(packet
                    .device
                    .refuse(Violation::IndexAlreadyWritten, packet.index)));
            }
            self.try_lease(packet).transpose()
        });
        self.counters.blocked.add_time(since.elapsed());
        found.expect("a wait without a deadline ends with a look")
    }

    /// Publishes what a lease of this packet was filled with.
    pub(crate) fn publish(&mut self, packet: &mut Incoming, lease: Buffer) -> Result<()> {
        let len = lease.size();
        let filled = Packet {
            payload: Payload::Piece(lease.into_piece()),
            config: packet.config,
            more: len < packet.remaining,
        };
        self.hand_over(packet, filled, len)
    }

    /// Publishes a packet without data.
    pub(crate) fn publish_empty(&mut self, packet: &mut Incoming) -> Result<()> {
        let filled = Packet {
            payload: Payload::Empty,
            config: packet.config,
            more: false,
        };
        self.hand_over(packet, filled, 0)
    }

    fn hand_over(&mut self, packet: &mut Incoming, filled: Packet, len: usize) -> Result<()> {
        let device = packet.device.clone();
        let index = packet.index;
        let published = if packet.first {
            device.counters.published();
            let guard = self.epoch.pin();
            device.inbox.publish(index, filled, &guard)
        } else {
            self.publish_rest(&device, index, filled)
        };
        match published {
            Publish::Published => {}
            Publish::Duplicate(filled) | Publish::Full(filled) => {
                self.recycle(filled);
                return Err(device.refuse(Violation::DuplicateIndex, index));
            }
            Publish::Closed(filled) => {
                self.recycle(filled);
                let stopped = self.stopped(&device);
                return Err(stopped.unwrap_or_else(|| Error::cancelled(Phase::Receive)));
            }
        }
        let driver = &self.load.driver;
        driver.wake_if(device.inbox.ring(index, &driver.doorbell));
        packet.first = false;
        packet.remaining -= len;
        self.counters.bytes.add(len as u64);
        Ok(())
    }

    /// Publishes a further piece, once the one before has been taken. Ends with that, or with the
    /// load.
    fn publish_rest(&mut self, device: &LoadDevice, index: u32, filled: Packet) -> Publish {
        let load = self.load.clone();
        let mut waiting = Some(filled);
        let found = load.room.wait(None, || {
            let filled = waiting.take().expect("put back below");
            if self.stopped(device).is_some() {
                return Some(Publish::Closed(filled));
            }
            match device.inbox.publish_rest(index, filled, &self.epoch.pin()) {
                Publish::Full(filled) => {
                    waiting = Some(filled);
                    None
                }
                done => Some(done),
            }
        });
        found.expect("a wait without a deadline ends with a look")
    }

    fn recycle(&self, packet: Packet) {
        recycle(&self.load.pool, packet);
    }

    /// Why nothing more should be received for `device`, if so.
    fn stopped(&self, device: &LoadDevice) -> Option<Error> {
        if let Some(error) = self.load.failure() {
            return Some(error);
        }
        device
            .control
            .stop()
            .map(|_| Error::cancelled(Phase::Receive).on_device(&device.id))
    }

    /// The load that it brings packets for.
    pub(crate) fn load(&self) -> &Arc<Load> {
        &self.load
    }
}

impl Inlet for LoadInlet {
    type Packet = Incoming;

    fn announce(
        &mut self,
        name: (&[u8], u32),
        header: wire::PacketHeader,
        data_len: usize,
    ) -> Result<Incoming> {
        let packet = self.announce(name, header, data_len)?;
        self.admit(&packet)?;
        Ok(packet)
    }

    fn remaining(&self, packet: &Incoming) -> usize {
        packet.remaining
    }

    fn lease(&mut self, packet: &Incoming) -> Result<Buffer> {
        self.lease(packet)
    }

    fn publish(&mut self, packet: &mut Incoming, filled: Buffer) -> Result<()> {
        self.publish(packet, filled)
    }

    fn publish_empty(&mut self, packet: &mut Incoming) -> Result<()> {
        self.publish_empty(packet)
    }

    fn rest(&mut self) {
        self.packer.release();
    }

    fn counters(&self) -> &ChannelCounters {
        &self.counters
    }
}

fn recycle(pool: &Arc<Pool>, packet: Packet) {
    if let Payload::Piece(piece) = packet.payload {
        drop(Pool::adopt(&**pool, piece));
    }
}

// ----------------------------------------------------------------------------- device side

/// One device's packets on their way into its data fd. The driver's.
pub(crate) struct LoadFlow {
    load: Arc<Load>,
    device: Arc<LoadDevice>,
    lane: Lane,
    cursor: Cursor,
    /// The config packet's data so far, once it is next.
    config: Vec<u8>,
    config_taken: bool,
    /// The chain that is being put together, or in flight: where each packet of it ends in its
    /// operation's buffer, and its idx.
    batch: Vec<(u32, Buffer)>,
    gathered: Vec<(usize, u32)>,
    /// The idx of the first packet in `gathered`.
    gathered_at: Option<u32>,
    in_flight: Vec<u32>,
    in_flight_bytes: u64,
    started: Option<Instant>,
    starved: Option<Instant>,
    /// Last, so that the lane has given the data fd back before the result is there.
    outcome: Outcome,
}

/// Leaves a flow's result when it goes away, however it does.
struct Outcome {
    load: Arc<Load>,
    device: Arc<LoadDevice>,
    drained: Option<Drained>,
}

impl Drop for Outcome {
    fn drop(&mut self) {
        // Nothing is stored any more: later packets are refused, and those that nobody took are
        // recycled.
        let epoch = self.load.collector.register();
        let pool = &self.load.pool;
        self.device
            .inbox
            .close(&epoch.pin(), |packet| recycle(pool, packet));
        self.load.room.notify_all();
        let unfinished = || {
            let kind = ErrorKind::Internal("the driver ended before this device's transfer");
            Err(Error::new(kind, Phase::Load).on_device(&self.device.id))
        };
        self.device
            .leave(self.drained.take().unwrap_or_else(unfinished));
    }
}

impl LoadFlow {
    pub(crate) fn new(load: Arc<Load>, device: Arc<LoadDevice>, fd: Fd) -> Self {
        let lane = Lane::new(fd, Direction::Write, device.ordinal);
        let outcome = Outcome {
            load: load.clone(),
            device: device.clone(),
            drained: None,
        };
        Self {
            load,
            device,
            lane,
            cursor: Cursor::new(),
            config: Vec::new(),
            config_taken: false,
            batch: Vec::with_capacity(CHAIN as usize),
            gathered: Vec::new(),
            gathered_at: None,
            in_flight: Vec::new(),
            in_flight_bytes: 0,
            started: None,
            starved: None,
            outcome,
        }
    }

    fn internal(&self, what: &'static str, index: u32) -> Error {
        Error::new(ErrorKind::Internal(what), Phase::Load)
            .on_device(&self.device.id)
            .at_index(index)
    }

    fn cancelled(&self) -> Error {
        Error::cancelled(Phase::Load)
            .on_device(&self.device.id)
            .at_index(self.position())
    }

    /// The first idx that is not in the device.
    fn position(&self) -> u32 {
        let in_flight = self.in_flight.first().copied();
        in_flight.unwrap_or_else(|| self.cursor.next())
    }

    /// Takes a piece of the config packet out of the pool: it waits for the device's thread, and
    /// must not hold up other packets meanwhile. Its size is bounded by the maximum of a packet.
    fn take_config(&mut self, packet: Packet) {
        if let Payload::Piece(piece) = packet.payload {
            let lease = Pool::adopt(&*self.load.pool, piece);
            self.config.extend_from_slice(lease.bytes());
        }
        self.config_taken = !packet.more;
    }

    /// Takes what is there, as far as it makes one chain.
    fn gather(&mut self, guard: &Guard) -> Result<()> {
        // A buffer that small packets are copied to, one after the other.
        let mut staging: Option<(u32, Buffer, usize)> = None;
        let mut bytes = 0;
        let mut taken = 0;
        while !self.config_taken && self.batch.len() < CHAIN as usize && bytes < CHAIN_BYTES {
            if let Some((_, buffer, used)) = &staging
                && buffer.size() - used < GATHER_MAX
            {
                break;
            }
            let (index, packet) = match self.cursor.take(&self.device.inbox, guard) {
                Next::Packet(index, packet) => (index, packet),
                Next::Starved(_) | Next::Closed => break,
            };
            taken += u64::from(!packet.more);
            if packet.config {
                self.take_config(packet);
                continue;
            }
            let len = match packet.payload {
                Payload::Empty => {
                    self.in_flight_bytes += wire::PACKET_HEADER_LEN as u64;
                    continue;
                }
                Payload::Aside(_) => {
                    return Err(self.internal("nothing is spilled by this version", index));
                }
                Payload::Piece(piece) => {
                    let len = piece.size();
                    let small = len <= GATHER_MAX;
                    if small && staging.is_none() && self.gathered_at.is_none() {
                        let another = self.cursor.is_ready(&self.device.inbox, guard);
                        staging = another.then(|| self.stage(index)).flatten();
                    }
                    match &mut staging {
                        Some((_, buffer, used)) if small => {
                            // Gathered by a copy, and recycled at once.
                            let lease = Pool::adopt(&*self.load.pool, piece);
                            buffer.bytes_mut()[*used..*used + len].copy_from_slice(lease.bytes());
                            *used += len;
                            self.gathered.push((*used, index));
                        }
                        _ => {
                            self.batch.extend(close_staging(&mut staging));
                            let lease = Pool::adopt(self.load.pool.clone(), piece);
                            self.batch.push((index, lease));
                        }
                    }
                    len
                }
            };
            if self.in_flight.last() != Some(&index) {
                self.in_flight.push(index);
                self.in_flight_bytes += wire::PACKET_HEADER_LEN as u64;
                trace::load_state_device_buffer_load_start(&self.device.id, index);
            }
            self.in_flight_bytes += len as u64;
            bytes += len;
        }
        self.batch.extend(close_staging(&mut staging));
        if taken > 0 {
            self.device.counters.taken(taken);
        }
        Ok(())
    }

    /// A staging buffer, if one is free. There are few for all devices; without one small packets
    /// go as they are.
    fn stage(&mut self, index: u32) -> Option<(u32, Buffer, usize)> {
        let layout = self.load.staging.layout();
        if layout.buffers == 0 {
            return None;
        }
        let buffer = Packer::new(self.load.staging.clone()).lease(layout.buffer_len)?;
        self.gathered_at = Some(index);
        Some((index, buffer, 0))
    }
}

/// Cuts a staging buffer to what is in it.
fn close_staging(staging: &mut Option<(u32, Buffer, usize)>) -> Option<(u32, Buffer)> {
    let (index, mut buffer, used) = staging.take()?;
    buffer.truncate(used);
    Some((index, buffer))
}

impl Flow for LoadFlow {
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
        Some(self.cancelled())
    }

    fn pump(&mut self, context: &mut Context<'_>) -> Pump {
        if !self.device.control.is_started() {
            return Pump::Held;
        }
        let first = self.cursor.next() == 0;
        let started = *self.started.get_or_insert_with(Instant::now);
        // Before the look at the slots: what was published before the last input ended is seen.
        let ended = self.load.input_ended();
        if let Err(error) = self.gather(context.guard) {
            return Pump::Finished(Err(error));
        }
        if first && self.cursor.next() > 0 {
            trace::load_state_device_buffer_start(&self.device.id);
        }
        if !self.batch.is_empty() {
            if let Some(since) = self.starved.take() {
                self.device.counters.starved.add_time(since.elapsed());
            }
            self.lane
                .submit(self.batch.drain(..), context.ring, &self.device.counters);
            return Pump::Busy;
        }
        if self.config_taken {
            let phases = &self.device.counters.phases;
            phases.transfer.add_time(started.elapsed());
            trace::load_state_device_buffer_end(&self.device.id);
            return Pump::Finished(Ok(()));
        }
        if ended {
            // Channels that were hung up on have ended too: then this is no news.
            if self.load.failure().is_some() {
                return Pump::Finished(Err(self.cancelled()));
            }
            let error = Error::new(ErrorKind::Missing, Phase::Load)
                .on_device(&self.device.id)
                .at_index(self.cursor.next());
            return Pump::Finished(Err(error));
        }
        Pump::Starved
    }

    fn batch_done(&mut self, _filled: Vec<Filled>, _guard: &Guard) -> Result<()> {
        for index in self.in_flight.drain(..) {
            trace::load_state_device_buffer_load_end(&self.device.id, index);
        }
        self.device
            .counters
            .bytes
            .add(mem::take(&mut self.in_flight_bytes));
        self.gathered.clear();
        self.gathered_at = None;
        Ok(())
    }

    fn failed(&self, index: u32, moved: usize, source: io::Error) -> Error {
        // Within a gathered write the packet is the one that the bytes moved so far end in.
        let index = match self.gathered_at {
            Some(at) if at == index => {
                let at = self.gathered.partition_point(|&(end, _)| end <= moved);
                self.gathered.get(at).map_or(index, |&(_, index)| index)
            }
            _ => index,
        };
        Error::new(ErrorKind::Device, Phase::Load)
            .on_device(&self.device.id)
            .at_index(index)
            .caused_by(source)
    }

    fn starve(&mut self) {
        if self.started.is_some() && self.starved.is_none() {
            self.starved = Some(Instant::now());
            trace::load_state_device_buffer_starved(&self.device.id, self.cursor.next());
        }
        self.cursor.starve(&self.device.inbox);
    }

    fn is_ready(&mut self, guard: &Guard) -> bool {
        self.device.control.is_started()
            && (self.cursor.is_ready(&self.device.inbox, guard) || self.load.input_ended())
    }

    fn stalled(&self) -> Error {
        Error::new(ErrorKind::Stalled, Phase::Load)
            .on_device(&self.device.id)
            .at_index(self.position())
    }

    fn finish(mut self, result: Result<()>) {
        let config = mem::take(&mut self.config);
        let bytes = mem::take(&mut self.in_flight_bytes);
        self.device.counters.bytes.add(bytes);
        if result.is_ok() {
            let len = config.len() + wire::PACKET_HEADER_LEN;
            self.device.counters.bytes.add(len as u64);
        }
        self.outcome.drained = Some(result.map(|()| config));
    }
}

// -------------------------------------------------------------------------- device's thread

/// The device's thread: everything of a load but the bytes. Returns once the device is loaded, put
/// back, or given up; never touches a device that a transfer is stuck in.
pub(crate) fn serve_device(
    load: &Arc<Load>,
    shared: &Arc<LoadDevice>,
    device: &mut Device,
    set_up: impl FnOnce(Result<()>),
) -> Result<()> {
    let id = &shared.id;
    trace::load_bufs_thread_start(id);
    let result = set_up_device(load, shared, device);
    set_up(result.clone());
    let result = result.and_then(|()| finish_load(load, shared, device));
    if let Err(error) = &result
        && *error.kind() != ErrorKind::Stuck
        && device.state() == DeviceState::Resuming
    {
        // Where the switchover never began the main channel's side still has the fd.
        drop(lock(&shared.iterable).take());
        // A RESUMING session is ended only so. The first error is the one to report; a reset that
        // fails makes the device lost, and it says so from now on.
        let _lost = device.reset();
    }
    trace::load_bufs_thread_end(id);
    result
}

fn set_up_device(load: &Arc<Load>, shared: &Arc<LoadDevice>, device: &mut Device) -> Result<()> {
    trace::load_setup(&shared.id);
    let since = Instant::now();
    let before = device.state();
    device.set_state(DeviceState::Resuming, Recover::State(before))?;
    shared.counters.phases.set_state.add_time(since.elapsed());
    let fd = device.lend()?;
    *lock(&shared.iterable) = Some(fd.clone());
    let flow = LoadFlow::new(load.clone(), shared.clone(), fd);
    let attached = load.driver.attach(shared.ordinal, flow);
    attached.map_err(|_flow| Error::cancelled(Phase::Setup).on_device(&shared.id))
}

fn finish_load(load: &Load, shared: &LoadDevice, device: &mut Device) -> Result<()> {
    let cancelled = |_stop| Error::cancelled(Phase::Config).on_device(&shared.id);
    let config = wait_for_driver(load, shared)?;
    let body = wire::config_body(&config).map_err(|error| error.on_device(&shared.id))?;
    if load.settings.config_after_iterables {
        shared.control.wait_config_ready().map_err(cancelled)?;
    } else if let Some(stop) = shared.control.stop() {
        return Err(cancelled(stop));
    }
    let since = Instant::now();
    let mut rest = body;
    device.load_config(&mut rest)?;
    shared.counters.phases.config.add_time(since.elapsed());
    if !rest.is_empty() {
        let violation = Violation::ConfigTrailing(rest.len() as u64);
        return Err(Error::protocol(violation)
            .in_phase(Phase::Config)
            .on_device(&shared.id));
    }
    if load.settings.stop_after_load {
        let since = Instant::now();
        device.set_state(DeviceState::Stop, Recover::Reset)?;
        shared.counters.phases.stop.add_time(since.elapsed());
    }
    Ok(())
}

/// The driver's result. Ends with it; or, after a stop, with the grace time.
fn wait_for_driver(load: &Load, shared: &LoadDevice) -> Drained {
    if shared.control.wait_drained().is_err() {
        // The driver bounds its own part by the grace time.
        let until = Instant::now() + load.settings.grace + SLACK;
        if !shared.control.wait_drained_until(until) {
            return Err(Error::new(ErrorKind::Stuck, Phase::Load).on_device(&shared.id));
        }
    }
    let drained = lock(&shared.drained).take();
    drained.expect("the driver leaves its result before it says so")
}

/// Writes iterable data, which comes over the main channel, into the device: in the caller's
/// thread, and only before the switchover starts.
pub(crate) fn write_iterable(shared: &LoadDevice, bytes: &[u8]) -> Result<()> {
    let fail = |kind| Error::new(kind, Phase::Section).on_device(&shared.id);
    let fd = lock(&shared.iterable);
    let Some(fd) = &*fd else {
        let kind = ErrorKind::Config("iterable data outside setup and switchover");
        return Err(fail(kind));
    };
    let mut rest = bytes;
    // Each round writes a byte at least, or ends.
    while !rest.is_empty() {
        match nix::unistd::write(fd, rest) {
            Ok(0) => return Err(fail(ErrorKind::Device).caused_by(io::ErrorKind::WriteZero)),
            Ok(count) => rest = &rest[count..],
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(fail(ErrorKind::Device).caused_by(errno)),
        }
    }
    Ok(())
}

/// The switchover starts: all iterable data is in the device.
pub(crate) fn start(load: &Load, shared: &LoadDevice) {
    drop(lock(&shared.iterable).take());
    if shared.control.start() {
        load.driver.wake();
    }
}
