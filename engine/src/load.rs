//! The destination's work: packets come in on many channels, and bytes go out to each device in order.
//!
//! ```text
//!                 channel side (many threads)          device side (one I/O thread)
//!               ┌─────────────────────────────────┬──────────────────────────────────────────┐
//!   load.rs     │ receive → decode → publish ─────┼──▶ take → submit → complete → recycle ─┐ │
//!               │     ▲                           │                                        │ │
//!               │     └──────── lease ◀───────────┼────────────────────────────────────────┘ │
//!               └─────────────────────────────────┴──────────────────────────────────────────┘
//! ```
//!
//! | who | owns | may touch |
//! |---|---|---|
//! | a channel's thread | its socket, the buffer it cuts leases from (`LeaseCutter`); while it has a device's turn, the reader and a clone of the data fd | every device's [`ReorderBuffer`] and turn |
//! | the I/O thread | every [`LoadTransfer`]: lane, a clone of the data fd; the reader, unless the turn is lent | the pool |
//! | a device's thread | the [`Device`](crate::Device): its state, its config, its data fd | its [`DeviceFlags`], its result |
//! | the main thread | the session | the flags of stop, switchover and config |
//!
//! # What ends each wait
//!
//! | who waits | for | ended by |
//! |---|---|---|
//! | a channel's thread | bytes | see `channel.rs` |
//! | a channel's thread | memory | see `load/backpressure.rs` |
//! | the I/O thread | | see `io_loop.rs` |
//! | packets of a device that is expected | the device | it; the end of the wait for all devices, which fails without it; a failure |
//! | a device's thread | the I/O thread's result | the result; after a stop, the result or the grace time |
//! | a device's thread | the notice that the config may be loaded | the notice; a stop; `config_ready_timeout` |
//! | the thread that cleans up | a device's end | the end; the grace time |

use std::fmt;

use crossbeam_epoch::{Collector, Guard, LocalHandle};
use vfio_migration_uring::{Fd, deadline};

mod backpressure;
mod channel_side;
mod device_side;
mod device_thread;
mod main_channel;
mod pace;
mod publisher;
mod session;
mod through;
mod told;

pub(crate) use self::{
    backpressure::Backpressure,
    channel_side::{IncomingPacket, LoadSink},
    device_side::LoadTransfer,
    device_thread::serve_device,
};
pub use self::{
    publisher::{PacketLease, Publisher},
    session::{LoadBuilder, LoadSession},
};
use self::{through::Through, told::Told};
use crate::{
    arena::NoMemory,
    error::{Error, ErrorKind, Phase, Result, Violation},
    first_failure::FirstFailure,
    id::DeviceId,
    io_loop::IoHandle,
    reorder::{
        flags::{DeviceFlags, SLACK},
        pool::{Pool, PoolLayout},
        reorder_buffer::ReorderBuffer,
        slot::{Packet, Payload},
        turn::Turn,
        waiters::Waiters,
    },
    router::Router,
    session::{DeviceSpec, Expected, LoadRules},
    settings::{Settings, Spill},
    spill::{SpillExtent, SpillFile},
    stats::{Counter, DeviceCounters, SpillStats, Stats},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering, fence},
        lock,
    },
};

/// A thread's part in an epoch.
pub(crate) trait Epoch {
    /// What is seen from now on is not freed before the guard has gone.
    fn pin(&self) -> Guard;
}

/// Registered: for a thread that stays.
impl Epoch for LocalHandle {
    fn pin(&self) -> Guard {
        Self::pin(self)
    }
}

/// Registers for each guard: for what may move between threads.
impl Epoch for Collector {
    fn pin(&self) -> Guard {
        self.register().pin()
    }
}

/// What became of the I/O thread's part of a load: the config packet's data, framing tags included.
type TransferResult = Result<Vec<u8>>;

/// One device, as the channels, the I/O thread and its own thread share it.
pub(crate) struct LoadDevice {
    id: DeviceId,
    ordinal: u32,
    reorder: ReorderBuffer,
    flags: DeviceFlags,
    counters: DeviceCounters,
    /// For iterable data: from setup to the switchover's start, or an earlier one of the loader's.
    iterable: Mutex<Option<Fd>>,
    rules: LoadRules,
    drained: Mutex<Option<TransferResult>>,
    /// How many packets are in the device, as far as that is told: before the switchover.
    written: AtomicU32,
    /// Who waits for that.
    progress: Waiters,
    unplugged: AtomicBool,
    /// Who writes.
    turn: Turn,
    /// With what, where it is not the I/O thread.
    through: Through,
    /// Its packets may come; the device itself has not.
    expected: AtomicBool,
    /// What has been told of its load.
    told: Told,
}

impl LoadDevice {
    /// Marks the device as unplugged: its end is no failure.
    fn unplug(&self) {
        // Relaxed: the route and the stop that follow carry it.
        self.unplugged.store(true, Ordering::Relaxed);
    }

    /// Whether it goes away.
    pub(crate) fn is_unplugged(&self) -> bool {
        // Relaxed: as above.
        self.unplugged.load(Ordering::Relaxed)
    }

    /// Whether it has not been added yet.
    pub(crate) fn is_expected(&self) -> bool {
        // Acquire: with `claim`.
        self.expected.load(Ordering::Acquire)
    }

    /// The device has come. Returns whether it is the first, and so the one that was expected.
    fn claim(&self) -> bool {
        self.expected.swap(false, Ordering::AcqRel)
    }

    /// See [`Waiters::late`].
    pub(crate) fn late(&self) -> u64 {
        self.flags.late() + self.progress.late()
    }

    fn set_result(&self, drained: TransferResult) {
        *lock(&self.drained) = Some(drained);
        self.flags.drained();
        self.progress.notify_all();
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
    /// A device that was in this session, and was taken out: what still comes for it is read past. There are
    /// no more of these than devices that a session may have.
    Unplugged(Arc<LoadDevice>),
}

/// What all threads of a load share.
pub(crate) struct Load {
    collector: Collector,
    router: Router<Route>,
    pool: Arc<Pool>,
    staging: Arc<Pool>,
    io: Arc<IoHandle<LoadTransfer>>,
    settings: Arc<Settings>,
    /// Channels that wait for room.
    backpressure: Backpressure,
    /// Where packets go that must not wait for it, once somebody may need that.
    spill: Mutex<Option<Arc<SpillFile>>>,
    /// Channels and publishers that may still bring packets.
    inputs: AtomicU32,
    /// What has been read past: it came for devices that were taken out.
    dropped: Dropped,
    /// Channels that were announced and have not come. For messages.
    awaited: AtomicU32,
    first_failure: FirstFailure,
}

/// See [`Load::dropped`].
#[derive(Default)]
struct Dropped {
    packets: Counter,
    bytes: Counter,
}

impl Load {
    pub(crate) fn new(
        pool: PoolLayout,
        staging: PoolLayout,
        io: Arc<IoHandle<LoadTransfer>>,
        settings: Arc<Settings>,
    ) -> Result<Self, NoMemory> {
        let collector = Collector::new();
        let pool = Arc::new(Pool::new(pool)?);
        Ok(Self {
            router: Router::new(Collector::new()),
            collector,
            backpressure: Backpressure::new(pool.clone()),
            spill: Mutex::new(None),
            pool,
            staging: Arc::new(Pool::new(staging)?),
            io,
            settings,
            inputs: AtomicU32::new(0),
            dropped: Dropped::default(),
            awaited: AtomicU32::new(0),
            first_failure: FirstFailure::default(),
        })
    }

    /// All devices, in the order of their names.
    pub(crate) fn devices(&self) -> Vec<Arc<LoadDevice>> {
        let handle = self.router.register();
        let routes = self.router.all(&handle.pin());
        let device = |route: &Arc<Route>| match &**route {
            Route::Device(device) => Some(device.clone()),
            Route::NotMultifd(_) | Route::Unplugged(_) => None,
        };
        routes.iter().filter_map(device).collect()
    }

    /// Adds a device under its name.
    pub(crate) fn add(&self, spec: &DeviceSpec, ordinal: u32) -> Result<Arc<LoadDevice>> {
        let rules = spec.rules(&self.settings);
        self.insert(spec.device.id(), rules, ordinal, false)
    }

    /// Adds a name, whose device comes later: see [`Load::arrive`].
    pub(crate) fn expect(&self, expected: &Expected, ordinal: u32) -> Result<()> {
        let rules = expected.rules(&self.settings);
        self.insert(&expected.id, rules, ordinal, true).map(drop)
    }

    /// A device that was expected comes; `None` where it was not.
    pub(crate) fn arrive(&self, spec: &DeviceSpec) -> Result<Option<Arc<LoadDevice>>> {
        let id = spec.device.id();
        let devices = self.devices();
        let mut expected = devices.iter().filter(|device| device.is_expected());
        let Some(device) = expected.find(|device| device.id == *id) else {
            return Ok(None);
        };
        if spec.rules(&self.settings) != device.rules {
            let what = "when its config may be loaded is not what was expected";
            return Err(Error::misuse(Phase::Setup, what).on_device(id));
        }
        Ok(device.claim().then(|| device.clone()))
    }

    /// A device that was expected and has not been added.
    pub(crate) fn missing(&self) -> Option<Arc<LoadDevice>> {
        let mut devices = self.devices().into_iter();
        devices.find(|device| device.is_expected())
    }

    fn insert(
        &self,
        id: &DeviceId,
        rules: LoadRules,
        ordinal: u32,
        expected: bool,
    ) -> Result<Arc<LoadDevice>> {
        let device = Arc::new(LoadDevice {
            id: id.clone(),
            ordinal,
            reorder: ReorderBuffer::new(self.collector.clone(), self.settings.window),
            flags: DeviceFlags::new(),
            counters: DeviceCounters::default(),
            iterable: Mutex::new(None),
            rules,
            drained: Mutex::new(None),
            written: AtomicU32::new(0),
            progress: Waiters::new(),
            unplugged: AtomicBool::new(false),
            turn: Turn::new(),
            through: Through::new(),
            expected: AtomicBool::new(expected),
            told: Told::new(),
        });
        self.add_route(id, Route::Device(device.clone()))?;
        // Partner: the fence in `fail`, which sets the reason and then looks for devices. One of the
        // two finds the other: a device that comes too late is stopped here.
        fence(Ordering::SeqCst);
        if self.failure().is_some() {
            device.flags.quit();
        }
        Ok(device)
    }

    /// Adds a name.
    pub(crate) fn add_route(&self, id: &DeviceId, route: Route) -> Result<()> {
        let handle = self.router.register();
        let idstr = id.idstr().as_bytes();
        let guard = handle.pin();
        let is_unplugged = |route: &Route| matches!(route, Route::Unplugged(_));
        if self
            .router
            .put(idstr, id.instance(), Arc::new(route), is_unplugged, &guard)
        {
            Ok(())
        } else {
            Err(Error::two_devices_named(id))
        }
    }

    /// Takes a device out: its packets are read past from now on, and its load ends.
    pub(crate) fn remove(&self, device: &Arc<LoadDevice>) {
        device.unplug();
        let handle = self.router.register();
        let idstr = device.id.idstr().as_bytes();
        let route = Arc::new(Route::Unplugged(device.clone()));
        let is_this =
            |old: &Route| matches!(old, Route::Device(other) if Arc::ptr_eq(other, device));
        let _first = self
            .router
            .put(idstr, device.id.instance(), route, is_this, &handle.pin());
        device.flags.quit();
        device.progress.notify_all();
        self.io.wake();
        self.backpressure.notify_all();
    }

    /// The file that a channel may spill to, or a publisher; none where it must not. The first who
    /// may has it made. `shared` says that barriers share the channel.
    pub(crate) fn spill_for(&self, shared: bool) -> Result<Option<Arc<SpillFile>>> {
        let directory = match &self.settings.spill {
            Spill::Off => return Ok(None),
            // Barriers share the channel, or nobody may spill.
            Spill::Auto if !shared => return Ok(None),
            Spill::Auto | Spill::Memfd => None,
            Spill::Directory(directory) => Some(directory.as_path()),
        };
        let mut spill = lock(&self.spill);
        if spill.is_none() {
            let made = SpillFile::new(directory, self.settings.spill_limit);
            let made =
                made.map_err(|error| Error::new(ErrorKind::Spill, Phase::Setup).caused_by(error))?;
            *spill = Some(Arc::new(made));
        }
        Ok(spill.clone())
    }

    /// What has been spilled.
    pub(crate) fn spilled(&self) -> SpillStats {
        let spill = lock(&self.spill);
        spill
            .as_ref()
            .map(|file| file.snapshot())
            .unwrap_or_default()
    }

    /// Takes over a packet that was spilled, by its number.
    fn adopt_spilled(&self, number: u64) -> SpillExtent {
        let spill = lock(&self.spill);
        let file = spill.as_ref().expect("who spilled had a file");
        SpillFile::adopt(file, number)
    }

    /// Gives back what a packet is kept in.
    fn recycle(&self, packet: Packet) {
        match packet.payload {
            Payload::External(number) => {
                drop(self.adopt_spilled(number));
                self.backpressure.notify_all();
            }
            _ => packet.recycle(&self.pool),
        }
    }

    /// Adds to the session's counters what is the load's alone.
    fn add_stats(&self, stats: &mut Stats) {
        stats.spill = self.spilled();
        stats.dropped_packets = self.dropped.packets.get();
        stats.dropped_bytes = self.dropped.bytes.get();
        stats.held_high += self.staging.layout().size() as u64;
        let of_devices: u64 = self.devices().iter().map(|device| device.late()).sum();
        stats.late_wakeups += self.backpressure.late() + of_devices;
    }

    /// The first failure, if there was one.
    pub(crate) fn failure(&self) -> Option<Error> {
        self.first_failure.failure()
    }

    /// Ends everything, for this reason if it is the first. Returns whether it was.
    pub(crate) fn fail(&self, error: Error) -> bool {
        let first = self.first_failure.fail(error);
        if first {
            // Partner: the fence in `add`.
            fence(Ordering::SeqCst);
            for device in self.devices() {
                device.flags.quit();
                device.progress.notify_all();
            }
            self.io.wake();
            self.backpressure.notify_all();
        }
        first
    }

    /// Hangs up every channel: all that they should bring has come, or never does.
    fn hang_up(&self) {
        self.first_failure.hang_up();
    }

    /// No device comes any more: ends the I/O thread, when it has given up what it has.
    fn close(&self) {
        self.io.close();
    }

    /// Whether the kernel still has a transfer of a device's.
    fn has_leaked(&self) -> bool {
        self.io.leaked.get() > 0
    }

    /// Waits until it is known why the load has failed, for a channel that was aborted: the I/O thread closes
    /// a device, and the device's thread says why. Until then the channel's input is open, or other devices
    /// would miss what it brings no more. Ends with the reason; or soon, should nothing have failed.
    fn wait_for_reason(&self) {
        let soon = deadline(SLACK);
        let _reason = self.backpressure.wait_until(soon, || self.failure());
    }

    /// Want-exit: cleanup has begun. What is still under way is called off.
    pub(crate) fn exit_all(&self) {
        let devices = self.devices();
        if devices.iter().any(|device| !device.flags.is_ended()) {
            // Before the flags, so that what they end has a reason. From here on the grace time counts.
            self.fail(Error::cancelled(Phase::Cleanup));
        }
        for device in devices {
            device.told.cleanup(&device.id);
            device.flags.exit();
        }
        self.io.wake();
        self.backpressure.notify_all();
    }

    /// Tells of the cleanup of every device that it was not told of.
    fn trace_cleanup(&self) {
        for device in self.devices() {
            device.told.cleanup(&device.id);
        }
    }

    /// Counts one more thread that may bring packets.
    pub(crate) fn open_input(&self) {
        // Relaxed: made from an input that is open, or before the load starts.
        self.inputs.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts one such thread less.
    pub(crate) fn close_input(&self) {
        // Release: whoever sees no input left sees all that was published.
        if self.inputs.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.io.wake();
        }
    }

    /// Sets how many of the announced channels have not come.
    pub(crate) fn await_channels(&self, count: u32) {
        // Relaxed: for messages.
        self.awaited.store(count, Ordering::Relaxed);
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
