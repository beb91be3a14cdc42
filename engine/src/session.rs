//! The embedder's whole API: build a load or a save, start it, tell it what the VM does, join it.
//!
//! ```text
//!   destination                                  source
//!   ───────────                                  ──────
//!   LoadSession::builder()                       SaveSession::builder()
//!     .device(…) .channel(…)                       .device(…) .channel(…)
//!     .start()?          devices: RESUMING         .start()?           devices: STOP_COPY
//!   write_iterable(…)    main channel's data     join()                all sent
//!   switchover_start()   the driver begins         → Report::stop_devices()   out of downtime
//!   config_load_ready(…) where that is in use
//!   join()               devices: STOP
//! ```
//!
//! A session owns its threads, its memory, its ring and its channels; nothing is global, so two
//! sessions know nothing of each other. Devices go in and come back in the [`Report`].
//!
//! Every method may be called from any thread. What ends each wait here: `join`, all tasks' ends;
//! after a failure or a cancellation, those or the grace time.

use std::{
    collections::BTreeMap,
    fmt, io,
    os::fd::{AsFd, BorrowedFd},
    sync::mpsc,
    time::{Duration, Instant},
};

#[cfg(feature = "sim")]
use vfio_migration_uring::sim::{SimConfig, SimRing};
use vfio_migration_uring::{Backend, Ring, Waker};

use crate::{
    channel::{Channel, Receiver, Sender, Terms},
    device::{Device, Recover, buffer_len},
    driver::{Driver, Flow, Handle, Limits},
    error::{Error, ErrorKind, Phase, Result, Violation},
    id::DeviceId,
    lane::Buffer,
    load::{self, Incoming, Inlet, Load, LoadDevice, LoadSettings, Route},
    reorder::{
        pool::{Lease, Pool},
        waiters::RECHECK,
    },
    save::{self, Save, SaveDevice},
    settings::Settings,
    state::DeviceState,
    stats::{ChannelCounters, DeviceStats, Stats},
    sync::{Arc, Mutex, lock},
    task::{Crew, Spawner, Task, TaskKind},
    trace, wire,
};

/// What the host could not give.
fn host(error: io::Error) -> Error {
    Error::new(ErrorKind::Host, Phase::Setup).caused_by(error)
}

/// What is common to both builders.
#[derive(Default)]
struct Parts {
    settings: Settings,
    devices: Vec<Device>,
    channels: Vec<Channel>,
    spawner: Option<Spawner>,
    #[cfg(feature = "sim")]
    simulation: Option<SimConfig>,
}

impl Parts {
    fn ring(&self, devices: u32, waker: Waker) -> Result<(Box<dyn Ring<Buffer>>, &'static str)> {
        let capacity = Settings::ring_capacity(devices);
        let grace = self.settings.grace;
        #[cfg(feature = "sim")]
        if let Some(config) = &self.simulation {
            let config = SimConfig {
                capacity,
                ..config.clone()
            };
            return Ok((Box::new(SimRing::new(config, waker).map_err(host)?), "sim"));
        }
        let (ring, chosen) =
            vfio_migration_uring::open(self.settings.backend, capacity, waker, grace)
                .map_err(host)?;
        let name = match chosen {
            Backend::Blocking => "blocking",
            _ => "uring",
        };
        Ok((ring, name))
    }

    fn terms(&self, channels: u32) -> Terms {
        Terms {
            uuid: self.settings.uuid,
            channels,
            max_packet: self.settings.max_packet,
            hello_timeout: self.settings.hello_timeout,
            no_progress: self.settings.no_progress,
        }
    }

    const fn limits(&self) -> Limits {
        Limits {
            grace: self.settings.grace,
            no_progress: self.settings.no_progress,
        }
    }
}

impl fmt::Debug for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parts")
            .field("settings", &self.settings)
            .field("devices", &self.devices)
            .field("channels", &self.channels.len())
            .finish_non_exhaustive()
    }
}

macro_rules! builder_methods {
    () => {
        /// Replaces all settings.
        pub fn settings(mut self, settings: Settings) -> Self {
            self.0.settings = settings;
            self
        }

        /// Adds a device. The session has it until its report.
        pub fn device(mut self, device: Device) -> Self {
            self.0.devices.push(device);
            self
        }

        /// Adds a channel.
        pub fn channel(mut self, channel: impl Into<Channel>) -> Self {
            self.0.channels.push(channel.into());
            self
        }

        /// Has the session's tasks run on threads of the embedder's: `spawn` is called once for
        /// each, must have it run on a thread of its own soon, and must not wait for its end.
        pub fn spawn_with(
            mut self,
            spawn: impl Fn(Task) -> io::Result<()> + Send + Sync + 'static,
        ) -> Self {
            self.0.spawner = Some(Box::new(spawn));
            self
        }

        /// Moves the devices' bytes through a simulated ring; its capacity is seen to.
        #[cfg(feature = "sim")]
        pub fn simulated_ring(mut self, config: SimConfig) -> Self {
            self.0.simulation = Some(config);
            self
        }
    };
}

/// One device's end.
#[derive(Debug)]
#[non_exhaustive]
pub struct DeviceReport {
    /// Which device.
    pub id: DeviceId,
    /// How its part went.
    pub result: Result<()>,
    /// The device, unless a transfer or a callback is stuck in it: then it must not be touched.
    pub device: Option<Device>,
}

/// How a session ended.
#[derive(Debug)]
#[non_exhaustive]
#[must_use = "says whether the migration succeeded, and has the devices"]
pub struct Report {
    /// How the whole went: the first failure, or that it was cancelled.
    pub result: Result<()>,
    /// By device, in the order given.
    pub devices: Vec<DeviceReport>,
    /// The counters at the end.
    pub stats: Stats,
    /// Threads that the kernel still holds, and that were left behind.
    pub abandoned_threads: usize,
}

impl Report {
    /// Sets every device that is still in a saving state to STOP, all at once, and returns when
    /// all are. This can be slow, and belongs after the migration: out of downtime.
    pub fn stop_devices(&mut self) {
        std::thread::scope(|scope| {
            for report in &mut self.devices {
                if let Some(device) = &mut report.device
                    && device.state().is_saving()
                {
                    scope.spawn(|| {
                        trace::save_cleanup(&report.id);
                        let stopped = device.set_state(DeviceState::Stop, Recover::Reset);
                        if report.result.is_ok() {
                            report.result = stopped.map_err(|error| error.in_phase(Phase::Cleanup));
                        }
                    });
                }
            }
        });
    }
}

impl Report {
    /// Takes every device of a failed save back to work, all at once.
    fn put_back(&mut self) {
        std::thread::scope(|scope| {
            for device in self.devices.iter_mut().filter_map(|r| r.device.as_mut()) {
                scope.spawn(|| save::put_back(device));
            }
        });
    }
}

/// A device that has come back from its thread.
struct Returned {
    device: Device,
    result: Result<()>,
}

/// What both kinds of session have.
struct Common {
    crew: Arc<Crew>,
    /// By ordinal: which devices there are, and those that have come back.
    returned: Mutex<BTreeMap<u32, Returned>>,
    channels: Mutex<Vec<Arc<ChannelCounters>>>,
    backend: &'static str,
    budget: usize,
    grace: Duration,
    no_progress: Duration,
}

impl Common {
    /// Runs one device's thread.
    fn give_back(&self, ordinal: u32, device: Device, result: Result<()>) {
        lock(&self.returned).insert(ordinal, Returned { device, result });
        self.crew.notify();
    }

    /// Waits for the results of all set-ups.
    fn set_up(&self, results: &mpsc::Receiver<Result<()>>, count: usize) -> Result<()> {
        let deadline = Instant::now() + self.no_progress;
        for _ in 0..count {
            let left = deadline.saturating_duration_since(Instant::now());
            match results.recv_timeout(left) {
                Ok(result) => result?,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    return Err(Error::new(ErrorKind::Stalled, Phase::Setup));
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    let kind = ErrorKind::Internal("a device's thread ended before its set-up");
                    return Err(Error::new(kind, Phase::Setup));
                }
            }
        }
        Ok(())
    }

    /// Waits until all tasks but the driver's have ended, as `ended` tells; after a failure no
    /// longer than the grace time and what a device needs to be put back.
    fn wait_for_end(&self, failed_at: impl Fn() -> Option<Instant>, ended: impl Fn() -> bool) {
        loop {
            let deadline = failed_at().map(|at| at + 2 * self.grace + 4 * RECHECK);
            let look = || (ended() || failed_at().is_some() != deadline.is_some()).then_some(());
            let found = self.crew.wait(deadline, look);
            if found.is_none() || ended() {
                return;
            }
        }
    }

    fn report(&self, ids: Vec<(u32, DeviceId)>, result: Result<()>, stats: Stats) -> Report {
        let mut returned = lock(&self.returned);
        let devices = ids
            .into_iter()
            .map(|(ordinal, id)| match returned.remove(&ordinal) {
                Some(Returned { device, result }) => {
                    let stuck = matches!(&result, Err(error) if *error.kind() == ErrorKind::Stuck);
                    DeviceReport {
                        id,
                        result,
                        device: (!stuck).then_some(device),
                    }
                }
                None => DeviceReport {
                    result: Err(Error::new(ErrorKind::Stuck, Phase::Cleanup).on_device(&id)),
                    id,
                    device: None,
                },
            })
            .collect();
        Report {
            result,
            devices,
            stats,
            abandoned_threads: self.crew.at_work(),
        }
    }

    fn stats<F>(&self, devices: Vec<DeviceStats>, pool: &Pool, driver: &Handle<F>) -> Stats {
        let channels = lock(&self.channels);
        let channels = (0..).zip(&*channels);
        let (_, high) = pool.in_use();
        let layout = pool.layout();
        let reserves = layout.reserves as usize * layout.reserve_len;
        Stats {
            devices,
            channels: channels
                .map(|(at, counters)| counters.snapshot(at))
                .collect(),
            budget: self.budget as u64,
            held_high: (high as usize * layout.buffer_len + reserves) as u64,
            backend: self.backend,
            ring_calls: driver.ring_calls.get(),
            late_wakeups: driver.late.get() + self.crew.late(),
        }
    }
}

/// Spawns the driver.
fn spawn_driver<F: Flow + 'static>(
    crew: &Arc<Crew>,
    driver: Driver<F>,
    handle: Arc<Handle<F>>,
    collector: crossbeam_epoch::Collector,
    progressed: impl Fn() + Send + 'static,
    failed: impl FnOnce(Error) + Send + 'static,
) -> Result<()> {
    Crew::spawn(
        crew,
        TaskKind::Driver,
        "vfio-mig-driver".into(),
        move || driver.run(&collector, progressed),
        move |error| {
            // Whatever was attached and never taken in goes away here, and says so.
            handle.abandon();
            if let Some(error) = error {
                failed(error);
            }
        },
    )
}

// ------------------------------------------------------------------------------------ load

/// Builds a [`LoadSession`].
#[derive(Debug, Default)]
#[must_use = "nothing happens before it is started"]
pub struct LoadBuilder(Parts, Vec<DeviceId>);

impl LoadBuilder {
    builder_methods!();

    /// Names a device of this VM whose data does not come over multifd channels: a packet for it is
    /// refused by that name.
    pub fn not_multifd(mut self, id: DeviceId) -> Self {
        self.1.push(id);
        self
    }

    /// Allocates all memory, starts all threads, and sets every device to RESUMING, all at once.
    /// Packets may come from then on; nothing is written before
    /// [`switchover_start`](LoadSession::switchover_start).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] for settings that cannot be; [`ErrorKind::Host`] for what the host
    /// does not have; a device's refusal. Devices are put back and dropped.
    pub fn start(self) -> Result<LoadSession> {
        let Self(mut parts, others) = self;
        let devices = std::mem::take(&mut parts.devices);
        let channels = std::mem::take(&mut parts.channels);
        let limit = parts.settings.device_limit(devices.len())?;
        let memory = parts.settings.load_memory(limit)?;
        let given = u32::try_from(channels.len()).unwrap_or(u32::MAX);
        let expected = parts.settings.channels.max(given);
        let waker = Waker::new().map_err(host)?;
        let (ring, backend) = parts.ring(limit, waker.clone())?;
        let terms = parts.terms(expected);
        let limits = parts.limits();
        let settings = parts.settings;
        let handle = Arc::new(Handle::new(waker));
        let load = Arc::new(Load::new(
            memory.pool,
            memory.staging,
            handle.clone(),
            LoadSettings {
                max_packet: settings.max_packet,
                window: settings.window,
                config_after_iterables: settings.config_after_iterables,
                stop_after_load: settings.stop_after_load,
                grace: settings.grace,
            },
        ));
        for id in others {
            load.add_route(&id, Route::NotMultifd(id.clone()))?;
        }
        let session = LoadSession {
            common: Arc::new(Common {
                crew: Arc::new(Crew::new(parts.spawner)?),
                returned: Mutex::new(BTreeMap::new()),
                channels: Mutex::new(Vec::new()),
                backend,
                budget: memory.budget,
                grace: settings.grace,
                no_progress: settings.no_progress,
            }),
            load: load.clone(),
            terms,
            expected,
            ids: Mutex::new(IdsInUse::new(limit)),
            greeted: Arc::new(Mutex::new(Vec::new())),
            joined: false,
        };
        // The one input that stands for the channels still to come.
        load.open_input();
        let driver = Driver::new(handle.clone(), ring, limits);
        let (room, failing) = (load.clone(), load.clone());
        spawn_driver(
            &session.common.crew,
            driver,
            handle,
            load.collector.clone(),
            move || room.room.notify_all(),
            move |error| {
                failing.fail(error);
            },
        )?;
        let (sender, results) = mpsc::channel();
        let count = devices.len();
        for device in devices {
            session.spawn_device(device, sender.clone())?;
        }
        drop(sender);
        session.common.set_up(&results, count)?;
        for channel in channels {
            session.add_channel(channel)?;
        }
        Ok(session)
    }
}

/// Which ordinals are devices'. An ordinal is never given to a second device: operations of the
/// first may still come back.
#[derive(Debug)]
struct IdsInUse {
    limit: u32,
    devices: Vec<(u32, DeviceId)>,
    next: u32,
}

impl IdsInUse {
    const fn new(limit: u32) -> Self {
        Self {
            limit,
            devices: Vec::new(),
            next: 0,
        }
    }

    fn take(&mut self, id: &DeviceId) -> Result<u32> {
        if self.next >= self.limit {
            let kind = ErrorKind::Config("more devices than max_devices");
            return Err(Error::new(kind, Phase::Setup).on_device(id));
        }
        let ordinal = self.next;
        self.next += 1;
        self.devices.push((ordinal, id.clone()));
        Ok(ordinal)
    }
}

/// A load under way: the destination's side of a migration.
///
/// ```
/// # #[cfg(feature = "sim")] {
/// use std::os::unix::net::UnixStream;
/// use vfio_migration::{
///     Device, DeviceId, LoadSession, SaveSession,
///     sim::{SimConfig, SimDevice},
/// };
///
/// let id = DeviceId::new("0000:00:03.0/vfio", 0)?;
/// let config = SimConfig { size: 3 << 20, seed: 7, ..SimConfig::default() };
/// let source = SimDevice::new(config.clone())?;
/// let destination = SimDevice::new(SimConfig { seed: 8, ..config })?;
/// let (saved, loaded) = (source.handle(), destination.handle());
///
/// let (near, far) = UnixStream::pair()?;
/// let load = LoadSession::builder()
///     .device(Device::new(id.clone(), Box::new(destination))?)
///     .channel(far)
///     .start()?;
/// let save = SaveSession::builder()
///     .device(Device::new(id, Box::new(source))?)
///     .channel(near)
///     .start()?;
///
/// load.switchover_start();
/// save.join().result?;
/// load.join().result?;
/// assert_eq!(saved.digest(), loaded.digest());
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Dropping it cancels, and waits as [`LoadSession::join`] does.
#[must_use = "dropping a session cancels it"]
pub struct LoadSession {
    common: Arc<Common>,
    load: Arc<Load>,
    terms: Terms,
    expected: u32,
    ids: Mutex<IdsInUse>,
    greeted: Arc<Mutex<Vec<u8>>>,
    joined: bool,
}

impl LoadSession {
    /// Begins to build one.
    pub fn builder() -> LoadBuilder {
        LoadBuilder::default()
    }

    fn spawn_device(&self, device: Device, set_up: mpsc::Sender<Result<()>>) -> Result<()> {
        let id = device.id().clone();
        let ordinal = lock(&self.ids).take(&id)?;
        let shared = self.load.add(&id, ordinal)?;
        let (load, common) = (self.load.clone(), self.common.clone());
        let ending = (self.load.clone(), shared.clone());
        Crew::spawn(
            &self.common.crew,
            TaskKind::Device(id),
            format!("vfio-mig-dev{ordinal}"),
            move || {
                let mut device = device;
                let result = load::serve_device(&load, &shared, &mut device, |result| {
                    // Nobody listens any more where another device's set-up has failed.
                    let _gone = set_up.send(result);
                });
                if let Err(error) = &result
                    && !shared.is_unplugged()
                {
                    load.fail(error.clone());
                }
                common.give_back(ordinal, device, result);
            },
            move |error| {
                let (load, shared) = ending;
                if let Some(error) = error {
                    load.fail(error);
                }
                shared.control.end();
            },
        )
    }

    /// Adds a device while the session runs (`max_devices` has to leave room for it), and returns
    /// when it is RESUMING.
    ///
    /// # Errors
    ///
    /// As for [`LoadBuilder::start`].
    pub fn add_device(&self, device: Device) -> Result<()> {
        let (sender, results) = mpsc::channel();
        self.spawn_device(device, sender)?;
        self.common.set_up(&results, 1)
    }

    /// Takes a device out while the session runs: an unplug. Its packets are refused from now on,
    /// its load is cancelled, and the device comes back, reset.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] for a device that is not there; [`ErrorKind::Stuck`] where its driver
    /// does not give a transfer back.
    pub fn remove_device(&self, id: &DeviceId) -> Result<Device> {
        let shared = self.device(id)?;
        shared.unplug();
        self.load.remove(&shared);
        let deadline = Instant::now() + 2 * self.common.grace + 4 * RECHECK;
        let ended = shared.control.wait_end(Some(deadline));
        let returned = lock(&self.common.returned).remove(&shared.ordinal);
        lock(&self.ids)
            .devices
            .retain(|(ordinal, _)| *ordinal != shared.ordinal);
        let stuck = || Error::new(ErrorKind::Stuck, Phase::Cleanup).on_device(id);
        match returned {
            Some(Returned { device, result }) if ended => match result {
                Err(error) if *error.kind() == ErrorKind::Stuck => Err(error),
                _ => Ok(device),
            },
            _ => Err(stuck()),
        }
    }

    fn device(&self, id: &DeviceId) -> Result<Arc<LoadDevice>> {
        let devices = self.load.devices();
        let found = devices.into_iter().find(|device| device.id == *id);
        found.ok_or_else(|| {
            Error::new(ErrorKind::Config("no such device"), Phase::Setup).on_device(id)
        })
    }

    /// Adds a channel: one connection of the source's. Its hello, and all after it, is read on a
    /// thread of the channel's own.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] for one channel too many; [`ErrorKind::Host`] without a thread.
    pub fn add_channel(&self, channel: impl Into<Channel>) -> Result<()> {
        let channel = channel.into();
        let counters = Arc::new(ChannelCounters::default());
        let number = {
            let mut channels = lock(&self.common.channels);
            let number = u32::try_from(channels.len()).unwrap_or(u32::MAX);
            if number >= self.expected {
                let kind = ErrorKind::Config("more channels than the settings say");
                return Err(Error::new(kind, Phase::Setup));
            }
            self.load.verdict.add(channel.hangup().map_err(host)?);
            channels.push(counters.clone());
            number
        };
        self.load.open_input();
        if number + 1 == self.expected {
            // All have come: the input that stood for them is done.
            self.load.close_input();
        }
        let (load, greeted) = (self.load.clone(), self.greeted.clone());
        let ending = self.load.clone();
        let terms = self.terms;
        Crew::spawn(
            &self.common.crew,
            TaskKind::Channel(number),
            format!("vfio-mig-ch{number}"),
            move || {
                let receiver = Receiver::new(channel, number, terms);
                let mut inlet = Inlet::new(load.clone(), counters, Some(number));
                let result = receiver.run(&mut inlet, |id| greet(&greeted, id));
                drop(inlet);
                if let Err(error) = result {
                    load.fail(error);
                }
            },
            move |error| {
                if let Some(error) = error {
                    ending.fail(error);
                }
                ending.close_input();
            },
        )
    }

    /// A way in for packets that come otherwise than over the session's channels. Made on the
    /// thread that uses it; while there is one the input has not ended.
    pub fn publisher(&self) -> Publisher {
        let counters = Arc::new(ChannelCounters::default());
        self.load.open_input();
        Publisher {
            inlet: Inlet::new(self.load.clone(), counters, None),
        }
    }

    /// Says that no further channel will be added.
    pub fn no_more_channels(&mut self) {
        let count = u32::try_from(lock(&self.common.channels).len()).unwrap_or(u32::MAX);
        if count < self.expected {
            self.expected = count;
            self.load.close_input();
        }
    }

    /// Writes iterable data of a device's section on the main channel into it, in the calling
    /// thread. May block where the driver does.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Device`]; [`ErrorKind::Config`] once the switchover has started.
    pub fn write_iterable(&self, id: &DeviceId, bytes: &[u8]) -> Result<()> {
        let result = load::write_iterable(&*self.device(id)?, bytes);
        let ret = result.as_ref().map_or_else(
            |error| -error.raw_os_error().unwrap_or(nix::libc::EINVAL),
            |()| 0,
        );
        trace::load_state_device_data(id, bytes.len() as u64, ret);
        result
    }

    /// The switchover has started: all iterable data is in the devices, and the driver may write
    /// what has come and will.
    pub fn switchover_start(&self) {
        for device in self.load.devices() {
            load::start(&self.load, &device);
        }
    }

    /// The main channel says that the device's config may be loaded.
    ///
    /// # Errors
    ///
    /// [`Violation::SectionTag`] where that is not in use, or comes a second time.
    pub fn config_load_ready(&self, id: &DeviceId) -> Result<()> {
        let device = self.device(id)?;
        if self.load.settings.config_after_iterables && device.control.config_ready() {
            return Ok(());
        }
        let tag = wire::Tag::ConfigLoadReady.value();
        let error = Error::protocol(Violation::SectionTag(tag))
            .in_phase(Phase::Section)
            .on_device(id);
        self.load.fail(error.clone());
        Err(error)
    }

    /// Cancels: should-quit. Returns at once.
    pub fn cancel(&self) {
        self.load.fail(Error::cancelled(Phase::Load));
    }

    /// Fails the session for a reason of the embedder's: its main channel's, say.
    pub fn fail(&self, error: Error) {
        self.load.fail(error);
    }

    /// Why it failed, once it has.
    #[must_use]
    pub fn failure(&self) -> Option<Error> {
        self.load.failure()
    }

    /// Whether every device is loaded, or the session has failed and its threads have ended.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.devices_ended()
    }

    fn devices_ended(&self) -> bool {
        self.load
            .devices()
            .iter()
            .all(|device| device.control.is_ended())
    }

    /// The counters as they are.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let devices = self.load.devices();
        let devices = devices
            .iter()
            .map(|device| device.counters.snapshot(&device.id));
        let late = self.load.room.late();
        let devices_late: u64 = self.load.devices().iter().map(|d| d.control.late()).sum();
        let mut stats = self
            .common
            .stats(devices.collect(), &self.load.pool, &self.load.driver);
        stats.held_high += self.load.staging_len() as u64;
        stats.late_wakeups += late + devices_late;
        stats
    }

    /// Waits for the end, and gives the devices back.
    pub fn join(mut self) -> Report {
        self.end()
    }

    /// Cleans up: want-exit. Ends what is still under way, and gives the devices back, within the
    /// grace time.
    pub fn cleanup(mut self) -> Report {
        for device in self.load.devices() {
            trace::load_cleanup(&device.id);
            device.control.exit();
        }
        self.load.driver.wake();
        self.load.room.notify_all();
        self.end()
    }

    fn end(&mut self) -> Report {
        self.joined = true;
        let failed_at = || self.load.verdict.failed_at();
        self.common.wait_for_end(failed_at, || self.devices_ended());
        // The channels end by themselves where the source has closed them.
        let patience = Instant::now() + self.common.no_progress;
        let crew = &self.common.crew;
        let ended = || (crew.at_work() <= 1 || failed_at().is_some()).then_some(());
        if crew.wait(Some(patience), ended).is_none() {
            self.load
                .fail(Error::new(ErrorKind::Stalled, Phase::Receive));
        }
        self.load.verdict.hang_up();
        let short = Some(Instant::now() + self.common.grace + 2 * RECHECK);
        crew.wait(short, || (crew.at_work() <= 1).then_some(()));
        self.load.driver.close();
        crew.wait(short, || crew.is_idle().then_some(()));
        crew.join();
        let stats = self.stats();
        let ids = lock(&self.ids).devices.clone();
        let result = self.load.failure().map_or(Ok(()), Err);
        self.common.report(ids, result, stats)
    }
}

/// Remembers a hello's channel id, which no other may have.
fn greet(greeted: &Mutex<Vec<u8>>, id: u8) -> Result<()> {
    let mut greeted = lock(greeted);
    if greeted.contains(&id) {
        return Err(Error::protocol(Violation::ChannelIdTwice(id)));
    }
    greeted.push(id);
    Ok(())
}

impl Drop for LoadSession {
    fn drop(&mut self) {
        if !self.joined {
            self.cancel();
            let _report = self.end();
        }
    }
}

impl AsFd for LoadSession {
    /// An eventfd that becomes readable when a device or a thread has ended, for an event loop.
    /// Read its 8 bytes, then look at [`LoadSession::is_finished`] and [`LoadSession::failure`].
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.common.crew.event().as_fd()
    }
}

impl fmt::Debug for LoadSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoadSession")
            .field("load", &self.load)
            .field("failure", &self.failure())
            .finish_non_exhaustive()
    }
}

/// Brings packets that came over connections of the embedder's. One thread's.
///
/// ```
/// # #[cfg(feature = "sim")] {
/// use vfio_migration::{Device, DeviceId, LoadSession, sim::{SimConfig, SimDevice}, wire};
///
/// let id = DeviceId::new("0000:00:03.0/vfio", 0)?;
/// let device = SimDevice::new(SimConfig::default())?;
/// let mut load = LoadSession::builder()
///     .device(Device::new(id.clone(), Box::new(device))?)
///     .start()?;
/// let mut publisher = load.publisher();
/// load.no_more_channels();
///
/// // What a peer's handler gets: the packet's 12-byte header, then its data.
/// let mut payload = wire::PacketHeader { index: 0, config: false }.encode().to_vec();
/// payload.extend(b"state");
/// publisher.push(&id, &payload)?;
/// load.cancel();
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Publisher {
    inlet: Inlet,
}

impl Publisher {
    /// Publishes a packet, by a copy: its payload as it is on the wire, 12-byte header first. Waits
    /// while the budget is spent, unless the device needs just this packet.
    ///
    /// # Errors
    ///
    /// The rule that the packet breaks, which fails the session; a cancellation.
    pub fn push(&mut self, id: &DeviceId, payload: &[u8]) -> Result<()> {
        let (header, data) = self.split(id, payload)?;
        let incoming = self.announce(id, header, data.len())?;
        let pushed = self.push_data(incoming, data);
        self.fail_with(pushed)
    }

    /// As [`Publisher::push`], but never waits: false where the packet could not be had, and
    /// nothing of it was kept.
    ///
    /// A packet that is larger than a device's reserve (64 KiB, or the device's share of a small
    /// budget), and that the device needs next while the budget is spent on those behind it, can
    /// only pass in pieces: [`Publisher::push`] always gets on.
    ///
    /// # Errors
    ///
    /// As for [`Publisher::push`].
    pub fn try_push(&mut self, id: &DeviceId, payload: &[u8]) -> Result<bool> {
        let (header, data) = self.split(id, payload)?;
        let Some(mut lease) = self.try_lease(id, header, data.len())? else {
            return Ok(false);
        };
        lease.bytes_mut().copy_from_slice(data);
        lease.publish()?;
        Ok(true)
    }

    /// Memory to fill with a packet's `len` bytes of data, where it can be had now.
    ///
    /// # Errors
    ///
    /// As for [`Publisher::push`].
    pub fn try_lease(
        &mut self,
        id: &DeviceId,
        header: wire::PacketHeader,
        len: usize,
    ) -> Result<Option<PacketLease<'_>>> {
        let incoming = self.announce(id, header, len)?;
        if len == 0 {
            return Ok(Some(PacketLease::new(self, incoming, Memory::None)));
        }
        let found = self.inlet.try_lease(&incoming);
        Ok(match self.fail_with(found)? {
            Some(lease) if lease.size() == len => {
                Some(PacketLease::new(self, incoming, Memory::Pool(lease)))
            }
            _ => None,
        })
    }

    /// As [`Publisher::try_lease`], waiting for it. A packet that can only pass in pieces is filled
    /// in memory of its own, once it is next: one packet for each publisher at most.
    ///
    /// # Errors
    ///
    /// As for [`Publisher::push`].
    pub fn lease(
        &mut self,
        id: &DeviceId,
        header: wire::PacketHeader,
        len: usize,
    ) -> Result<PacketLease<'_>> {
        let incoming = self.announce(id, header, len)?;
        if len == 0 {
            return Ok(PacketLease::new(self, incoming, Memory::None));
        }
        let found = self.inlet.lease(&incoming);
        let lease = self.fail_with(found)?;
        let memory = if lease.size() == len {
            Memory::Pool(lease)
        } else {
            Memory::Own(vec![0; len])
        };
        Ok(PacketLease::new(self, incoming, memory))
    }

    fn split<'a>(
        &self,
        id: &DeviceId,
        payload: &'a [u8],
    ) -> Result<(wire::PacketHeader, &'a [u8])> {
        let split = payload.split_first_chunk().map_or_else(
            || {
                let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
                Err(Error::protocol(Violation::PacketTooShort(len)))
            },
            |(header, data)| Ok((wire::PacketHeader::decode(header)?, data)),
        );
        self.fail_with(split.map_err(|error| error.on_device(id)))
    }

    fn announce(
        &mut self,
        id: &DeviceId,
        header: wire::PacketHeader,
        len: usize,
    ) -> Result<Incoming> {
        let name = (id.idstr().as_bytes(), id.instance());
        let incoming = self.inlet.announce(name, header, len);
        self.fail_with(incoming)
    }

    fn push_data(&mut self, mut incoming: Incoming, mut data: &[u8]) -> Result<()> {
        self.inlet.admit(&incoming)?;
        if data.is_empty() {
            return self.inlet.publish_empty(&mut incoming);
        }
        // Each round publishes a byte at least.
        while !data.is_empty() {
            let mut lease = self.inlet.lease(&incoming)?;
            let (piece, rest) = data.split_at(lease.size());
            lease.bytes_mut().copy_from_slice(piece);
            self.inlet.publish(&mut incoming, lease)?;
            data = rest;
        }
        Ok(())
    }

    /// A packet that breaks a rule fails the migration.
    fn fail_with<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result
            && !error.is_cancelled()
        {
            self.inlet.load().fail(error.clone());
        }
        result
    }
}

/// Where a leased packet's data is.
enum Memory {
    None,
    Pool(Lease<Arc<Pool>>),
    Own(Vec<u8>),
}

/// A packet's memory, to be filled and then published. Dropping it gives it back.
#[must_use = "a packet that is not published is missing"]
pub struct PacketLease<'a> {
    publisher: &'a mut Publisher,
    incoming: Incoming,
    memory: Memory,
}

impl<'a> PacketLease<'a> {
    fn new(publisher: &'a mut Publisher, incoming: Incoming, memory: Memory) -> Self {
        Self {
            publisher,
            incoming,
            memory,
        }
    }

    /// The packet's data, to be filled: all of it.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Memory::None => &mut [],
            Memory::Pool(lease) => lease.bytes_mut(),
            Memory::Own(bytes) => bytes,
        }
    }

    /// Publishes the packet.
    ///
    /// # Errors
    ///
    /// As for [`Publisher::push`].
    pub fn publish(self) -> Result<()> {
        let Self {
            publisher,
            mut incoming,
            memory,
        } = self;
        let published = match memory {
            Memory::Pool(lease) => publisher
                .inlet
                .admit(&incoming)
                .and_then(|()| publisher.inlet.publish(&mut incoming, lease)),
            Memory::Own(bytes) => publisher.push_data(incoming, &bytes),
            Memory::None => publisher.push_data(incoming, &[]),
        };
        publisher.fail_with(published)
    }
}

impl fmt::Debug for PacketLease<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PacketLease").finish_non_exhaustive()
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.inlet.load().close_input();
    }
}

impl fmt::Debug for Publisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publisher").finish_non_exhaustive()
    }
}

// ------------------------------------------------------------------------------------ save

/// Builds a [`SaveSession`].
#[derive(Debug, Default)]
#[must_use = "nothing happens before it is started"]
pub struct SaveBuilder(Parts);

impl SaveBuilder {
    builder_methods!();

    /// Allocates all memory, starts all threads, and sets every device to STOP_COPY, all at once;
    /// each is read from when it is there.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] for settings that cannot be, or no device or channel;
    /// [`ErrorKind::Host`] for what the host does not have; a device's refusal. Devices are put back
    /// to RUNNING and dropped.
    pub fn start(self) -> Result<SaveSession> {
        let mut parts = self.0;
        let mut devices = std::mem::take(&mut parts.devices);
        let channels = std::mem::take(&mut parts.channels);
        let count = u32::try_from(channels.len()).unwrap_or(u32::MAX);
        if count == 0 || count > 255 {
            let kind = ErrorKind::Config("a save has 1 to 255 channels");
            return Err(Error::new(kind, Phase::Setup));
        }
        let limit = parts.settings.device_limit(devices.len())?;
        let mut sized = Vec::with_capacity(devices.len());
        for device in &mut devices {
            let len = parts.settings.data_len;
            let len = len.unwrap_or_else(|| buffer_len(device.data_size().ok()));
            sized.push((device.id().clone(), len));
        }
        let largest = sized.iter().map(|(_, len)| *len).max().unwrap_or(0);
        let memory = parts.settings.save_memory(limit, largest)?;
        let waker = Waker::new().map_err(host)?;
        let (ring, backend) = parts.ring(limit, waker.clone())?;
        let terms = parts.terms(count);
        let limits = parts.limits();
        let handle = Arc::new(Handle::new(waker));
        let grace = parts.settings.grace;
        let save = Arc::new(Save::new(sized, memory.pool, handle.clone(), grace));
        let session = SaveSession {
            common: Arc::new(Common {
                crew: Arc::new(Crew::new(parts.spawner)?),
                returned: Mutex::new(BTreeMap::new()),
                channels: Mutex::new(Vec::new()),
                backend,
                budget: memory.budget,
                grace,
                no_progress: parts.settings.no_progress,
            }),
            save: save.clone(),
            joined: false,
        };
        for channel in &channels {
            save.verdict.add(channel.hangup().map_err(host)?);
        }
        let driver = Driver::new(handle.clone(), ring, limits);
        let failing = save.clone();
        spawn_driver(
            &session.common.crew,
            driver,
            handle,
            save.collector.clone(),
            || {},
            move |error| {
                failing.fail(error);
            },
        )?;
        let (sender, results) = mpsc::channel();
        for (shared, device) in save.devices.iter().zip(devices) {
            session.spawn_device(shared.clone(), device, sender.clone())?;
        }
        drop(sender);
        for (number, channel) in (0..).zip(channels) {
            session.spawn_channel(number, channel, terms)?;
        }
        session.common.set_up(&results, save.devices.len())?;
        Ok(session)
    }
}

/// A save under way: the source's side of a migration.
///
/// See [`LoadSession`] for an example of both. Dropping it cancels, and waits as
/// [`SaveSession::join`] does.
#[must_use = "dropping a session cancels it"]
pub struct SaveSession {
    common: Arc<Common>,
    save: Arc<Save>,
    joined: bool,
}

impl SaveSession {
    /// Begins to build one.
    pub fn builder() -> SaveBuilder {
        SaveBuilder::default()
    }

    fn spawn_device(
        &self,
        shared: Arc<SaveDevice>,
        device: Device,
        set_up: mpsc::Sender<Result<()>>,
    ) -> Result<()> {
        let (save, common) = (self.save.clone(), self.common.clone());
        let ending = (self.save.clone(), shared.clone());
        let ordinal = shared.ordinal();
        Crew::spawn(
            &self.common.crew,
            TaskKind::Device(shared.id.clone()),
            format!("vfio-mig-dev{ordinal}"),
            move || {
                let mut device = device;
                let result = save::serve_device(&save, &shared, &mut device, |result| {
                    // Nobody listens any more where another device's set-up has failed.
                    let _gone = set_up.send(result);
                });
                if let Err(error) = &result {
                    save.fail(error.clone());
                }
                common.give_back(ordinal, device, result);
            },
            move |error| {
                let (save, shared) = ending;
                if let Some(error) = error {
                    save.fail(error);
                }
                shared.control.end();
            },
        )
    }

    fn spawn_channel(&self, number: u32, channel: Channel, terms: Terms) -> Result<()> {
        let counters = Arc::new(ChannelCounters::default());
        lock(&self.common.channels).push(counters.clone());
        let save = self.save.clone();
        let ending = self.save.clone();
        let id = u8::try_from(number).expect("the builder bounds their number");
        Crew::spawn(
            &self.common.crew,
            TaskKind::Channel(number),
            format!("vfio-mig-ch{number}"),
            move || {
                let sender = Sender::new(channel, number);
                if let Err(error) = save::serve_channel(&save, sender, &terms, id, &counters) {
                    save.fail(error);
                }
            },
            move |error| {
                if let Some(error) = error {
                    ending.fail(error);
                }
            },
        )
    }

    /// Cancels: should-quit. Returns at once; devices are put back to RUNNING.
    pub fn cancel(&self) {
        self.save.fail(Error::cancelled(Phase::Save));
    }

    /// Fails the session for a reason of the embedder's: its main channel's, say.
    pub fn fail(&self, error: Error) {
        self.save.fail(error);
    }

    /// Why it failed, once it has.
    #[must_use]
    pub fn failure(&self) -> Option<Error> {
        self.save.verdict.failure()
    }

    /// Whether everything has been sent, or the session has failed and its threads have ended.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.common.crew.at_work() <= 1
    }

    /// The counters as they are.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let devices = &self.save.devices;
        let late: u64 = devices.iter().map(|device| device.control.late()).sum();
        let devices = devices
            .iter()
            .map(|device| device.counters.snapshot(&device.id));
        let mut stats = self
            .common
            .stats(devices.collect(), &self.save.pool, &self.save.driver);
        stats.late_wakeups += self.save.queue.late() + late;
        stats
    }

    /// Waits until everything is sent, and gives the devices back: in STOP_COPY
    /// ([`Report::stop_devices`]), or put back to RUNNING where the save failed.
    pub fn join(mut self) -> Report {
        self.end()
    }

    /// Ends what is still under way, and gives the devices back, within the grace time.
    pub fn cleanup(self) -> Report {
        if !self.is_finished() {
            self.cancel();
        }
        self.join()
    }

    fn end(&mut self) -> Report {
        self.joined = true;
        let crew = &self.common.crew;
        let failed_at = || self.save.verdict.failed_at();
        self.common.wait_for_end(failed_at, || crew.at_work() <= 1);
        self.save.driver.close();
        let short = Some(Instant::now() + self.common.grace + 2 * RECHECK);
        crew.wait(short, || crew.is_idle().then_some(()));
        crew.join();
        let stats = self.stats();
        let ids = self.save.devices.iter();
        let ids = ids.map(|device| (device.ordinal(), device.id.clone()));
        let result = self.failure().map_or(Ok(()), Err);
        let mut report = self.common.report(ids.collect(), result, stats);
        if report.result.is_err() {
            report.put_back();
        }
        report
    }
}

impl Drop for SaveSession {
    fn drop(&mut self) {
        if !self.joined {
            self.cancel();
            let _report = self.end();
        }
    }
}

impl AsFd for SaveSession {
    /// An eventfd that becomes readable when a device or a thread has ended, for an event loop.
    /// Read its 8 bytes, then look at [`SaveSession::is_finished`] and [`SaveSession::failure`].
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.common.crew.event().as_fd()
    }
}

impl fmt::Debug for SaveSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SaveSession")
            .field("save", &self.save)
            .field("failure", &self.failure())
            .finish_non_exhaustive()
    }
}
