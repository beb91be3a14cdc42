//! The destination's session: see the [module above](super).

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    os::fd::{AsFd, BorrowedFd},
    sync::mpsc,
    time::Instant,
};

use vfio_migration_uring::{Waker, deadline};

use super::{
    Canceller, Common, DeviceReport, Ferry, NotStarted, Parts, Report, Returned, builder_methods,
    host, publisher::Publisher, unless_stuck,
};
use crate::{
    channel::{Channel, Receiver, Terms},
    device::Device,
    driver::{Driver, Handle},
    error::{Error, ErrorKind, Phase, Result, Violation},
    host::no_budget,
    id::DeviceId,
    load::{self, Load, LoadDevice, LoadFlow, LoadInlet, LoadSettings, Route, Spilling},
    reorder::control::SLACK,
    settings::{Settings, Spill},
    stats::{ChannelCounters, Stats},
    sync::{Arc, Mutex, lock},
    task::{Crew, Task, TaskKind},
    trace, wire,
};

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
    /// does not have; a device's refusal. Devices are put back to the state that they came in, and
    /// dropped.
    pub fn start(self) -> Result<LoadSession> {
        Ok(self.try_start()?)
    }

    /// As [`start`](Self::start), and gives the devices back where that fails.
    ///
    /// # Errors
    ///
    /// As for [`start`](Self::start).
    pub fn try_start(self) -> Result<LoadSession, NotStarted> {
        let Self(mut parts, others) = self;
        let devices = std::mem::take(&mut parts.devices);
        match LoadSession::prepare(&mut parts, others, devices.len()) {
            Ok((mut session, driver)) => match session.launch(parts, devices, driver) {
                Ok(()) => Ok(session),
                Err(error) => {
                    session.cancel();
                    let devices = session.end().devices.into_iter();
                    Err(NotStarted {
                        error,
                        devices: devices.filter_map(|report| report.device).collect(),
                    })
                }
            },
            Err(error) => Err(NotStarted { error, devices }),
        }
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
/// let config = SimConfig { len: 3 << 20, seed: 7, ..SimConfig::default() };
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
    /// The numbers of the channels that have not ended.
    open: Arc<Mutex<BTreeSet<u32>>>,
    joined: bool,
}

impl LoadSession {
    /// Begins to build one.
    pub fn builder() -> LoadBuilder {
        LoadBuilder::default()
    }

    /// Everything that needs no thread.
    fn prepare(
        parts: &mut Parts,
        others: Vec<DeviceId>,
        devices: usize,
    ) -> Result<(Self, Driver<LoadFlow>)> {
        parts.settings.check_numbers()?;
        let limit = parts.settings.device_limit(devices)?;
        let memory = parts.settings.load_memory(limit)?;
        let given = u32::try_from(parts.channels.len()).unwrap_or(u32::MAX);
        parts.settings.check_channels(given)?;
        let expected = parts.settings.channels.max(given);
        let waker = Waker::new().map_err(host)?;
        let (ring, backend) = parts.ring(limit, waker.clone())?;
        let settings = &parts.settings;
        let handle = Arc::new(Handle::new(waker));
        let load = Load::new(
            memory.pool,
            memory.staging,
            handle.clone(),
            LoadSettings {
                max_packet: settings.max_packet,
                window: settings.window,
                spill: match settings.spill.clone() {
                    Spill::Auto => Spilling::WhereShared,
                    Spill::Off => Spilling::Never,
                    Spill::Memfd => Spilling::Always(None),
                    Spill::Directory(directory) => Spilling::Always(Some(directory)),
                },
                spill_limit: settings.spill_limit,
                config_after_iterables: settings.config_after_iterables,
                stop_after_load: settings.stop_after_load.unwrap_or(true),
                grace: settings.grace,
                config_ready_timeout: settings.config_ready_timeout,
            },
        );
        let load = Arc::new(load.map_err(no_budget)?);
        #[cfg(feature = "faults")]
        if let Some(plan) = parts.refusals.take() {
            load.pool.refuse_by(plan.clone());
            load.staging.refuse_by(plan);
        }
        // Where it was asked for, what is wrong with it is told now.
        let _file = load.spill_for(false)?;
        for id in others {
            load.add_route(&id, Route::NotMultifd(id.clone()))?;
        }
        let session = Self {
            common: Arc::new(Common {
                crew: Arc::new(Crew::new(parts.spawner.take())?),
                canceller: Canceller::new(Phase::Load, {
                    let load = load.clone();
                    move |error| {
                        load.fail(error);
                    }
                }),
                returned: Mutex::new(BTreeMap::new()),
                channels: Mutex::new(Vec::new()),
                backend,
                budget: memory.budget,
                grace: settings.grace,
                no_progress: settings.no_progress,
            }),
            load,
            terms: parts.terms(expected),
            expected,
            ids: Mutex::new(IdsInUse::new(limit)),
            greeted: Arc::new(Mutex::new(Vec::new())),
            open: Arc::new(Mutex::new(BTreeSet::new())),
            joined: false,
        };
        session.common.notify_of(&session.load.verdict);
        // The one input that stands for the channels still to come.
        session.load.open_input();
        session.load.await_channels(expected);
        Ok((session, Driver::new(handle, ring, parts.limits())))
    }

    /// Everything that does.
    fn launch(&self, parts: Parts, devices: Vec<Device>, driver: Driver<LoadFlow>) -> Result<()> {
        let (room, failing) = (self.load.clone(), self.load.clone());
        let driving = Common::spawn_driver(
            &self.common.crew,
            driver,
            self.load.driver.clone(),
            self.load.collector.clone(),
            move || room.room.after_round(),
            move |error| {
                failing.fail(error);
            },
        );
        if let Err(error) = driving {
            for device in devices {
                let ordinal = lock(&self.ids).take(device.id())?;
                let result = Err(error.clone());
                self.common.give_back(ordinal, device, result);
            }
            return Err(error);
        }
        // All of them before anything else, so that whatever fails below they come back.
        let (sender, results) = mpsc::channel();
        let names = devices.iter().map(|device| device.id().clone()).collect();
        let mut started = Ok(());
        for device in devices {
            started = started.and(self.spawn_device(device, sender.clone()));
        }
        drop(sender);
        started?;
        self.set_up(&results, names)?;
        for channel in parts.channels {
            self.add_channel(channel)?;
        }
        Ok(())
    }

    fn spawn_device(
        &self,
        device: Device,
        set_up: mpsc::Sender<(DeviceId, Result<()>)>,
    ) -> Result<()> {
        let id = device.id().clone();
        let ordinal = lock(&self.ids).take(&id)?;
        let shared = match self.load.add(&id, ordinal, device.config_after_iterables()) {
            Ok(shared) => shared,
            Err(error) => {
                self.common.give_back(ordinal, device, Err(error.clone()));
                return Err(error);
            }
        };
        let (load, common) = (self.load.clone(), self.common.clone());
        let ending = (self.load.clone(), self.common.clone(), shared.clone());
        let mut device = device;
        device.adopt_spawner(self.common.crew.spawner());
        let ferry = Ferry::new(device);
        let left = ferry.clone();
        Crew::spawn(
            &self.common.crew,
            TaskKind::Device(id),
            format!("vfio-mig-dev{ordinal}"),
            move || {
                let Some(mut device) = ferry.take() else {
                    return;
                };
                let result = load::serve_device(&load, &shared, &mut device, |result| {
                    // Nobody listens any more where another device's set-up has failed.
                    let _gone = set_up.send((shared.id.clone(), result));
                });
                if let Err(error) = &result
                    && !shared.is_unplugged()
                {
                    load.fail(error.clone());
                }
                common.give_back(ordinal, device, result);
            },
            move |error| {
                let (load, common, shared) = ending;
                if let Some(error) = error {
                    load.fail(error);
                }
                if let Some(device) = left.take() {
                    let result = Err(Error::cancelled(Phase::Setup).on_device(&shared.id));
                    common.give_back(ordinal, device, result);
                }
                shared.control.end();
            },
        )
    }

    /// Waits for the results of set-ups. One that was cancelled has its reason elsewhere.
    fn set_up(
        &self,
        results: &mpsc::Receiver<(DeviceId, Result<()>)>,
        names: Vec<DeviceId>,
    ) -> Result<()> {
        let set_up = self.common.set_up(results, names);
        set_up.map_err(|error| match self.failure() {
            Some(reason) if error.is_cancelled() => reason,
            _ => error,
        })
    }

    /// Adds a device while the session runs (`max_devices` has to leave room for it), and returns
    /// when it is RESUMING.
    ///
    /// # Errors
    ///
    /// As for [`LoadBuilder::start`].
    pub fn add_device(&self, device: Device) -> Result<()> {
        let mut device = device;
        device.set_off();
        let (sender, results) = mpsc::channel();
        let name = device.id().clone();
        self.spawn_device(device, sender)?;
        self.set_up(&results, vec![name])
    }

    /// Takes a device out while the session runs: an unplug. Its load is cancelled, and the device comes
    /// back, reset, in the state that it came in. Packets that are under way for it, or come later, are read past: they cost no memory of
    /// the budget, disturb no other device, and are counted as dropped ([`Stats::dropped_packets`]).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] for a device that is not there; [`ErrorKind::Stuck`] where its driver
    /// does not give a transfer back.
    pub fn remove_device(&self, id: &DeviceId) -> Result<Device> {
        let shared = self.device(id)?;
        self.load.remove(&shared);
        let deadline = self.common.end_of_grace(Instant::now());
        let ended = shared.control.wait_end(Some(deadline));
        let returned = lock(&self.common.returned).remove(&shared.ordinal);
        lock(&self.ids)
            .devices
            .retain(|(ordinal, _)| *ordinal != shared.ordinal);
        let stuck = || Error::new(ErrorKind::Stuck, Phase::Cleanup).on_device(id);
        match returned {
            Some(Returned { device, result }) if ended => match result {
                Err(error) if *error.kind() == ErrorKind::Stuck => {
                    let _leaked = unless_stuck(device, true);
                    Err(error)
                }
                _ => {
                    let mut device = device;
                    // Also where it was loaded already. What this comes to is the device's duty.
                    let _duty = device.forget();
                    Ok(device)
                }
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
        let spill = self.load.spill_for(channel.is_shared())?;
        let number = {
            let mut channels = lock(&self.common.channels);
            let number = u32::try_from(channels.len()).unwrap_or(u32::MAX);
            if number >= self.expected {
                let kind = ErrorKind::Config("more channels than the settings say");
                return Err(Error::new(kind, Phase::Setup));
            }
            self.load.verdict.add(channel.adopt().map_err(host)?);
            channels.push(counters.clone());
            number
        };
        self.load.open_input();
        self.load.await_channels(self.expected - number - 1);
        if number + 1 == self.expected {
            // All have come: the input that stood for them is done.
            self.load.close_input();
        }
        let (load, greeted) = (self.load.clone(), self.greeted.clone());
        let (ending, open) = (self.load.clone(), self.open.clone());
        lock(&open).insert(number);
        let terms = self.terms;
        Crew::spawn(
            &self.common.crew,
            TaskKind::Channel(number),
            format!("vfio-mig-ch{number}"),
            move || {
                let mut inlet = LoadInlet::new(load.clone(), counters, spill);
                let receiver = Receiver::new(channel, number, terms);
                let result = receiver.and_then(|receiver| {
                    receiver.run(&mut inlet, |hello, _| {
                        hello.check(&terms.uuid, terms.channels)?;
                        greet(&greeted, hello.id)
                    })
                });
                drop(inlet);
                if let Err(error) = result {
                    if error.is_cancelled() {
                        load.wait_for_reason();
                    }
                    load.fail(error);
                }
            },
            move |error| {
                if let Some(error) = error {
                    ending.fail(error);
                }
                lock(&open).remove(&number);
                ending.close_input();
            },
        )
    }

    /// A way in for packets that come otherwise than over the session's channels. Made on the
    /// thread that uses it; while there is one the input has not ended.
    pub fn publisher(&self) -> Publisher {
        let counters = Arc::new(ChannelCounters::default());
        self.load.open_input();
        // What can go wrong with it went wrong at the start.
        let spill = self.load.spill_for(false).ok().flatten();
        Publisher::new(LoadInlet::new(self.load.clone(), counters, spill))
    }

    /// Says that no further channel will be added.
    pub fn no_more_channels(&mut self) {
        let count = u32::try_from(lock(&self.common.channels).len()).unwrap_or(u32::MAX);
        if count < self.expected {
            self.expected = count;
            self.load.await_channels(0);
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
            |error| {
                -error
                    .raw_os_error()
                    .unwrap_or(nix::errno::Errno::EINVAL as i32)
            },
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

    /// Both ends carry this device's PRE_COPY data over the channels: what comes before the
    /// switchover is written at once.
    pub(crate) fn start_early(&self, id: &DeviceId) -> Result<()> {
        load::start_early(&self.load, &*self.device(id)?);
        Ok(())
    }

    /// Waits until the device's first `count` packets are in it.
    pub(crate) fn wait_written(&self, id: &DeviceId, count: u32) -> Result<()> {
        let no_progress = self.common.no_progress;
        load::wait_written(&self.load, &*self.device(id)?, count, no_progress)
    }

    /// The main channel says that the device's config may be loaded.
    ///
    /// # Errors
    ///
    /// [`Violation::SectionTag`] where that is not in use, or comes a second time.
    pub fn config_load_ready(&self, id: &DeviceId) -> Result<()> {
        let device = self.device(id)?;
        if device.config_waits && device.control.config_ready() {
            return Ok(());
        }
        let tag = wire::Tag::ConfigLoadReady.value();
        let error = Error::protocol(Violation::SectionTag(tag))
            .in_phase(Phase::Section)
            .on_device(id);
        self.load.fail(error.clone());
        Err(error)
    }

    /// A handle that cancels, also while another thread waits in [`LoadSession::join`].
    #[must_use]
    pub fn canceller(&self) -> Canceller {
        self.common.canceller.clone()
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
        let devices_late: u64 = self.load.devices().iter().map(|d| d.late()).sum();
        let mut stats = self
            .common
            .stats(devices.collect(), &self.load.pool, &self.load.driver);
        stats.spill = self.load.spilled();
        (stats.dropped_packets, stats.dropped_bytes) = self.load.dropped();
        stats.held_high += self.load.staging_len() as u64;
        stats.late_wakeups += late + devices_late;
        stats
    }

    /// Waits until every device is loaded, or the session has failed, and gives the devices back:
    /// what downtime waits for. The channels may still be open; [`LoadSession::join`] waits for
    /// their end, and its report has no devices then.
    ///
    /// A device that is loaded is in STOP, and its driver has accepted its state. Where
    /// [`Settings::stop_after_load`] is off it is in RESUMING, and its driver looks at the state in the
    /// VM's start ([`vm::start`](crate::migration::vm::start)): the source may be told that all is
    /// loaded only after it. Where the session has failed every device is reset and in the state that
    /// it came in.
    pub fn wait_devices(&self) -> Vec<DeviceReport> {
        let failed_at = || self.load.verdict.failed_at();
        self.common.wait_for_end(failed_at, || self.devices_ended());
        let ids = std::mem::take(&mut lock(&self.ids).devices);
        let failed = self.failure().is_some();
        self.common.devices(ids, failed.then_some(Device::forget))
    }

    /// Waits for the end, and gives the devices back, as [`LoadSession::wait_devices`] does.
    ///
    /// The end is that every device is loaded and every channel has ended: a source closes its
    /// channels, but it may do so only when the destination has told it of its success.
    /// [`LoadSession::wait_devices`] comes before that.
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
        if !self.devices_ended() {
            // From here on the grace time counts.
            self.load.fail(Error::cancelled(Phase::Cleanup));
        }
        self.end()
    }

    fn end(&mut self) -> Report {
        self.joined = true;
        let failed_at = || self.load.verdict.failed_at();
        self.common.wait_for_end(failed_at, || self.devices_ended());
        // The channels end by themselves where the source has closed them.
        let patience = deadline(self.common.no_progress);
        let crew = &self.common.crew;
        let ended = || (crew.at_work() <= 1 || failed_at().is_some()).then_some(());
        if crew.wait(Some(patience), ended).is_none() {
            let error = Error::stalled(Phase::Receive, "the channel has not ended");
            self.load.fail(match lock(&self.open).first() {
                Some(number) => error.on_channel(*number),
                None => error,
            });
        }
        self.load.verdict.hang_up();
        let short = Some(deadline(SLACK));
        crew.wait(short, || (crew.at_work() <= 1).then_some(()));
        self.load.driver.close();
        crew.wait(short, || crew.is_idle().then_some(()));
        let leaked = self.load.driver.leaked.get() > 0;
        let left_behind = crew.join(leaked);
        self.common.canceller.retire();
        let stats = self.stats();
        let ids = lock(&self.ids).devices.clone();
        let result = self.load.failure().map_or(Ok(()), Err);
        let off = Device::forget;
        self.common.report(ids, result, stats, left_behind, off)
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
