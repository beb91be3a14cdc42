//! The destination's session: see the [module above](super).

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    os::fd::{AsFd, BorrowedFd},
    sync::mpsc,
    time::Instant,
};

use vfio_migration_uring::{Waker, deadline};

use super::{Load, LoadDevice, LoadSink, LoadTransfer, Publisher, Route, serve_device};
use crate::{
    canceller::Canceller,
    channel::{Channel, ChannelLimits, Receiver},
    device::Device,
    error::{Error, ErrorKind, Failed, Phase, Result, Violation},
    host::no_budget,
    id::DeviceId,
    io_loop::{IoHandle, IoLoop},
    reorder::flags::SLACK,
    session::{
        Common, DeviceHandoff, DeviceReport, DeviceSpec, Expected, FinishedDevice, Parts, Report,
        builder_methods, host, unless_stuck,
    },
    settings::Settings,
    stats::{ChannelCounters, Stats},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering::Relaxed},
        lock,
    },
    tasks::{Task, TaskKind, Tasks},
    trace,
};

/// Builds a [`LoadSession`].
#[derive(Debug, Default)]
#[must_use = "nothing happens before it is started"]
pub struct LoadBuilder {
    parts: Parts,
    /// Devices whose data comes over the main channel.
    not_multifd: Vec<DeviceId>,
    /// Devices that come later.
    expected: Vec<Expected>,
}

impl LoadBuilder {
    builder_methods!();

    /// What ends the session.
    pub(crate) fn canceller(&mut self) -> Canceller {
        self.parts.canceller.get_or_insert_default().clone()
    }

    /// Names a device of this VM whose data does not come over the multifd channels. A packet for the device is
    /// refused by that name ([`Violation::MultifdNotInUse`]).
    pub fn not_multifd(mut self, id: DeviceId) -> Self {
        self.not_multifd.push(id);
        self
    }

    /// Names a device that will be added later, by [`LoadSession::add_device`]: a VMM may build its devices from what
    /// the source says last. Its packets are held until then, within the budget, and may spill where spilling is on.
    ///
    /// Held packets hold the source back once the budget is full. So what the VMM waits for must not come behind
    /// them: see "Devices that do not exist yet" in the [`guide`](crate::guide). A device that has not been added
    /// when somebody waits for all devices fails the load.
    pub fn expect(self, id: DeviceId) -> Self {
        self.expect_device(Expected {
            id,
            config_gate: None,
            vm_starts: false,
        })
    }

    pub(crate) fn expect_device(mut self, expected: Expected) -> Self {
        self.expected.push(expected);
        self
    }

    /// Those that are named so far.
    pub(crate) fn take_expected(&mut self) -> Vec<DeviceId> {
        let expected = std::mem::take(&mut self.expected).into_iter();
        expected.map(|expected| expected.id).collect()
    }

    /// Whether no device is there or named.
    pub(crate) fn is_without_devices(&self) -> bool {
        self.parts.devices.is_empty() && self.expected.is_empty()
    }

    /// Allocates all memory, starts all threads, and sets all devices to RESUMING, all at once. From then on
    /// packets may come. Nothing is written to a device before
    /// [`switchover_start`](LoadSession::switchover_start).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Misuse`] for impossible settings, [`ErrorKind::Host`] for what the host lacks, or a
    /// device's refusal. The devices are put back to the state in which they came, and given back
    /// ([`Failed`]).
    pub fn start(self) -> Result<LoadSession, Failed<Vec<Device>>> {
        let Self {
            mut parts,
            not_multifd,
            expected,
        } = self;
        let devices = std::mem::take(&mut parts.devices);
        let count = devices.len() + expected.len();
        match LoadSession::prepare(&mut parts, not_multifd, count) {
            Ok((mut session, io_loop)) => match session.launch(parts, devices, expected, io_loop) {
                Ok(()) => Ok(session),
                Err(error) => {
                    session.cancel();
                    let devices = session.end().devices.into_iter();
                    Err(Failed::new(
                        error,
                        devices.filter_map(|report| report.device).collect(),
                    ))
                }
            },
            Err(error) => {
                let devices = devices.into_iter().map(|spec| spec.device);
                Err(Failed::new(error, devices.collect()))
            }
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
        let ordinal = self.reserve(id)?;
        self.devices.push((ordinal, id.clone()));
        Ok(ordinal)
    }

    /// An ordinal for a device that has not come.
    fn reserve(&mut self, id: &DeviceId) -> Result<u32> {
        if self.next >= self.limit {
            return Err(Error::misuse(Phase::Setup, "more devices than max_devices").on_device(id));
        }
        let ordinal = self.next;
        self.next += 1;
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
    limits: ChannelLimits,
    /// How many channels there will be. Under the lock of `Common::channels`.
    expected: AtomicU32,
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
        not_multifd: Vec<DeviceId>,
        devices: usize,
    ) -> Result<(Self, IoLoop<LoadTransfer>)> {
        let canceller = parts.canceller.take().unwrap_or_default();
        canceller.check_in(Phase::Setup)?;
        parts.settings.check_numbers()?;
        let limit = parts.settings.device_limit(devices)?;
        let memory = parts.settings.load_memory(limit)?;
        let given = u32::try_from(parts.channels.len()).unwrap_or(u32::MAX);
        parts.settings.check_channels(given)?;
        let expected = parts.settings.channels.max(given);
        let waker = Waker::new().map_err(host)?;
        let (ring, backend) = parts.ring(limit, waker.clone())?;
        let settings = Arc::new(parts.settings.clone());
        let handle = Arc::new(IoHandle::new(waker));
        let load = Load::new(
            memory.pool,
            memory.staging,
            handle.clone(),
            settings.clone(),
        );
        let load = Arc::new(load.map_err(no_budget)?);
        #[cfg(feature = "faults")]
        if let Some(plan) = parts.refusals.take() {
            load.pool.refuse_by(plan.clone());
            load.staging.refuse_by(plan);
        }
        // Where it was asked for, what is wrong with it is told now.
        let _file = load.spill_for(false)?;
        for id in not_multifd {
            load.add_route(&id, Route::NotMultifd(id.clone()))?;
        }
        let limits = ChannelLimits::new(&settings, expected);
        let session = Self {
            common: Arc::new(Common {
                tasks: Arc::new(Tasks::new(std::mem::take(&mut parts.threads))?),
                canceller: canceller.attach(Phase::Load, {
                    let load = load.clone();
                    move |error| {
                        load.fail(error);
                    }
                }),
                returned: Mutex::new(BTreeMap::new()),
                channels: Mutex::new(Vec::new()),
                backend,
                budget: memory.budget,
                settings,
            }),
            load,
            limits,
            expected: AtomicU32::new(expected),
            ids: Mutex::new(IdsInUse::new(limit)),
            greeted: Arc::new(Mutex::new(Vec::new())),
            open: Arc::new(Mutex::new(BTreeSet::new())),
            joined: false,
        };
        session.common.notify_of(&session.load.first_failure);
        // The one input that stands for the channels still to come.
        session.load.open_input();
        session.load.await_channels(expected);
        Ok((session, IoLoop::new(handle, ring, parts.io_limits())))
    }

    /// Everything that does.
    fn launch(
        &self,
        parts: Parts,
        devices: Vec<DeviceSpec>,
        expected: Vec<Expected>,
        io_loop: IoLoop<LoadTransfer>,
    ) -> Result<()> {
        let (backpressure, failing) = (self.load.clone(), self.load.clone());
        let driving = Common::spawn_io_thread(
            &self.common.tasks,
            io_loop,
            self.load.io.clone(),
            self.load.collector.clone(),
            move || backpressure.backpressure.after_round(),
            move |error| {
                failing.fail(error);
            },
        );
        if let Err(error) = driving {
            for DeviceSpec { device, .. } in devices {
                let ordinal = lock(&self.ids).take(device.id())?;
                let result = Err(error.clone());
                self.common.give_back(ordinal, device, result);
            }
            return Err(error);
        }
        // All of them before anything else, so that whatever fails below they come back.
        let (sender, results) = mpsc::channel();
        let names = devices
            .iter()
            .map(|spec| spec.device.id().clone())
            .collect();
        let mut started = Ok(());
        for spec in devices {
            started = started.and(self.spawn_device(spec, sender.clone()));
        }
        drop(sender);
        for expected in &expected {
            started = started.and(self.expect_device(expected));
        }
        started?;
        self.common
            .set_up(&results, names, &self.load.first_failure)?;
        for channel in parts.channels {
            self.add_channel(channel)?;
        }
        Ok(())
    }

    fn spawn_device(
        &self,
        spec: DeviceSpec,
        set_up: mpsc::Sender<(DeviceId, Result<()>)>,
    ) -> Result<()> {
        let id = spec.device.id().clone();
        let arrived = self.load.arrive(&spec);
        let (ordinal, shared) = if let Ok(Some(shared)) = arrived {
            lock(&self.ids).devices.push((shared.ordinal, id.clone()));
            (shared.ordinal, shared)
        } else {
            let ordinal = lock(&self.ids).take(&id)?;
            match arrived.and_then(|_plug| self.load.add(&spec, ordinal)) {
                Ok(shared) => (ordinal, shared),
                Err(error) => {
                    let result = Err(error.clone());
                    self.common.give_back(ordinal, spec.device, result);
                    return Err(error);
                }
            }
        };
        let (load, common) = (self.load.clone(), self.common.clone());
        let ending = (self.load.clone(), self.common.clone(), shared.clone());
        let mut device = spec.device;
        device.adopt_threads(self.common.tasks.threads());
        let handoff = DeviceHandoff::new(device);
        let left = handoff.clone();
        Tasks::spawn(
            &self.common.tasks,
            TaskKind::Device(id),
            format!("vfio-mig-dev{ordinal}"),
            move || {
                let Some(mut device) = handoff.take() else {
                    return;
                };
                let result = serve_device(&load, &shared, &mut device, |result| {
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
                    let result = Err(Error::aborted(Phase::Setup).on_device(&shared.id));
                    common.give_back(ordinal, device, result);
                }
                shared.flags.end();
            },
        )
    }

    /// Names a device that will be added later: see [`LoadBuilder::expect`]. `max_devices` must leave room for it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Misuse`] for a name that is taken, and for one device too many.
    pub fn expect(&self, id: DeviceId) -> Result<()> {
        self.expect_device(&Expected {
            id,
            config_gate: None,
            vm_starts: false,
        })
    }

    fn expect_device(&self, expected: &Expected) -> Result<()> {
        let ordinal = lock(&self.ids).reserve(&expected.id)?;
        self.load.expect(expected, ordinal)
    }

    /// Adds a device while the session runs: one that was [expected](LoadSession::expect), whose packets may be here
    /// already, or another: a plug. Returns when the device is in RESUMING. `max_devices` must leave room for a plug.
    ///
    /// # Errors
    ///
    /// As for [`LoadBuilder::start`]; [`ErrorKind::Misuse`] where the device comes with another
    /// [`config_gate`](DeviceSpec::config_gate) than it was expected with.
    pub fn add_device(&self, device: impl Into<DeviceSpec>) -> Result<()> {
        let spec = device.into();
        let (sender, results) = mpsc::channel();
        let name = spec.device.id().clone();
        self.spawn_device(spec, sender)?;
        self.common
            .set_up(&results, vec![name], &self.load.first_failure)
    }

    /// Removes a device while the session runs: an unplug. Cancels the device's load and returns the device,
    /// reset, in the state in which it came. Packets for it that are under way, or come later, are skipped.
    /// They take no memory of the budget, disturb no other device, and are counted
    /// ([`Stats::dropped_packets`]).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Misuse`] for a device that is not in the session; [`ErrorKind::Stuck`] if its driver does
    /// not return a transfer.
    pub fn remove_device(&self, id: &DeviceId) -> Result<Device> {
        let shared = self.device(id)?;
        if shared.is_expected() {
            let what = "it is expected, and has not been added";
            return Err(Error::misuse(Phase::Setup, what).on_device(id));
        }
        self.load.remove(&shared);
        let deadline = self.common.end_of_grace(Instant::now());
        let ended = shared.flags.wait_end(Some(deadline));
        shared.told.cleanup(&shared.id);
        let returned = lock(&self.common.returned).remove(&shared.ordinal);
        lock(&self.ids)
            .devices
            .retain(|(ordinal, _)| *ordinal != shared.ordinal);
        let stuck = || Error::new(ErrorKind::Stuck, Phase::Cleanup).on_device(id);
        match returned {
            Some(FinishedDevice { device, result }) if ended => match result {
                Err(error) if *error.kind() == ErrorKind::Stuck => {
                    let _leaked = unless_stuck(device, true);
                    Err(error)
                }
                _ => {
                    let mut device = device;
                    // Also where it was loaded already. What this comes to is the device's duty.
                    let _duty = device.discard_state();
                    Ok(device)
                }
            },
            _ => Err(stuck()),
        }
    }

    fn device(&self, id: &DeviceId) -> Result<Arc<LoadDevice>> {
        let devices = self.load.devices();
        let found = devices.into_iter().find(|device| device.id == *id);
        found.ok_or_else(|| Error::misuse(Phase::Setup, "no such device").on_device(id))
    }

    /// Adds a channel: one connection of the source's. A thread of its own reads it, from its hello on.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Misuse`] for one channel too many; [`ErrorKind::Host`] if there is no thread for it.
    pub fn add_channel(&self, channel: impl Into<Channel>) -> Result<()> {
        let channel = channel.into();
        let counters = Arc::new(ChannelCounters::default());
        let spill = self.load.spill_for(channel.is_shared())?;
        let (number, last) = {
            let mut channels = lock(&self.common.channels);
            let number = u32::try_from(channels.len()).unwrap_or(u32::MAX);
            // Relaxed: under the lock.
            let expected = self.expected.load(Relaxed);
            if number >= expected {
                return Err(Error::misuse(
                    Phase::Setup,
                    "more channels than the settings say",
                ));
            }
            self.load.first_failure.add(channel.adopt().map_err(host)?);
            channels.push(counters.clone());
            // Under the lock: whoever says that no more will come sees this one's input.
            self.load.open_input();
            self.load.await_channels(expected - number - 1);
            (number, number + 1 == expected)
        };
        if last {
            // All have come: the input that stood for them is done.
            self.load.close_input();
        }
        let (load, greeted) = (self.load.clone(), self.greeted.clone());
        let (ending, open) = (self.load.clone(), self.open.clone());
        lock(&open).insert(number);
        let limits = self.limits;
        Tasks::spawn(
            &self.common.tasks,
            TaskKind::Channel(number),
            format!("vfio-mig-ch{number}"),
            move || {
                let mut sink = LoadSink::new(load.clone(), counters, spill);
                let receiver = Receiver::new(channel, number, limits);
                let result = receiver.and_then(|receiver| {
                    receiver.run(&mut sink, |hello, _| {
                        hello.check(&limits.uuid, limits.channels)?;
                        greet(&greeted, hello.id)
                    })
                });
                drop(sink);
                if let Err(error) = result {
                    if error.is_aborted() {
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

    /// Makes a [`Publisher`], for packets that do not come over the session's channels. While a publisher exists the input has not ended.
    pub fn publisher(&self) -> Publisher {
        let counters = Arc::new(ChannelCounters::default());
        self.load.open_input();
        // What can go wrong with it went wrong at the start.
        let spill = self.load.spill_for(false).ok().flatten();
        Publisher::new(LoadSink::to_move(self.load.clone(), counters, spill))
    }

    /// Marks the channels as complete: no further channel will be added.
    pub fn no_more_channels(&self) {
        let fewer = {
            let channels = lock(&self.common.channels);
            let count = u32::try_from(channels.len()).unwrap_or(u32::MAX);
            // Relaxed: written and read under the lock.
            count < self.expected.swap(count, Relaxed)
        };
        if fewer {
            self.load.await_channels(0);
            self.load.close_input();
        }
    }

    /// Writes iterable data, from a device's section of the main channel, into the device, on the calling
    /// thread. May block for as long as the device's driver does.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Device`]; [`ErrorKind::Misuse`] once the switchover has started.
    pub fn write_iterable(&self, id: &DeviceId, bytes: &[u8]) -> Result<()> {
        let result = self.write_iterable_piece(id, bytes);
        let ret = Error::trace_errno(&result);
        trace::load_state_device_data(id, bytes.len() as u64, ret);
        result
    }

    /// As [`LoadSession::write_iterable`], for a piece of a DATA block: the caller tells of the whole block.
    pub(crate) fn write_iterable_piece(&self, id: &DeviceId, bytes: &[u8]) -> Result<()> {
        self.device(id)?.write_iterable(bytes)
    }

    /// Starts the switchover: all iterable data is in the devices, and from now on the I/O thread may write
    /// packets to them.
    pub fn switchover_start(&self) {
        self.load.switchover_start();
    }

    /// Both ends carry this device's PRE_COPY data over the channels: what comes before the
    /// switchover is written at once.
    pub(crate) fn start_early(&self, id: &DeviceId) -> Result<()> {
        self.load.start_early(&*self.device(id)?);
        Ok(())
    }

    /// Waits until the device's first `count` packets are in it.
    pub(crate) fn wait_written(&self, id: &DeviceId, count: u32) -> Result<()> {
        let no_progress = self.common.settings.no_progress;
        self.load
            .wait_written(&*self.device(id)?, count, no_progress)
    }

    /// Passes on the main channel's notice that the device's config may be loaded.
    ///
    /// # Errors
    ///
    /// [`Violation::SectionTag`] if the notice is not in use, or comes a second time.
    pub fn config_load_ready(&self, id: &DeviceId) -> Result<()> {
        self.load.config_load_ready(&*self.device(id)?)
    }

    /// Returns a handle that cancels the session, also while another thread waits in [`LoadSession::join`].
    #[must_use]
    pub fn canceller(&self) -> Canceller {
        self.common.canceller.canceller().clone()
    }

    /// Cancels the session (QEMU's should-quit). Returns at once.
    pub fn cancel(&self) {
        self.load.fail(Error::cancelled(Phase::Load));
    }

    /// Fails the session for a reason of the VMM's, for example a broken main channel.
    pub fn fail(&self, error: Error) {
        self.load.fail(error);
    }

    /// Returns why the session has failed, if it has.
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
        let failed = self.failure().is_some();
        let ended = |device: &Arc<LoadDevice>| {
            // One that never came has no thread whose end could be waited for.
            device.flags.is_ended() || failed && device.is_expected()
        };
        self.load.devices().iter().all(ended)
    }

    /// Whoever waits for all devices would wait for one that was not added for ever.
    fn check_expected(&self) {
        if let Some(device) = self.load.missing()
            && self.failure().is_none()
        {
            let what = "a device was expected and has not been added";
            self.fail(Error::misuse(Phase::Load, what).on_device(&device.id));
        }
    }

    /// Returns the counters as they are now.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let devices = self.load.devices();
        let devices = devices
            .iter()
            .map(|device| device.counters.snapshot(&device.id));
        let mut stats = self
            .common
            .stats(devices.collect(), &self.load.pool, &self.load.io);
        self.load.add_stats(&mut stats);
        stats
    }

    /// Waits until every device is loaded, or the session has failed, and gives the devices back. This is what
    /// the downtime waits for. The channels may still be open: [`LoadSession::join`] waits for their end, and
    /// its report then has no devices.
    ///
    /// | the session | [`Settings::stop_after_load`] | each device is in |
    /// |---|---|---|
    /// | has loaded | on | STOP: its driver has accepted its state |
    /// | has loaded | off | RESUMING: its driver checks the state in [`vm::start`](crate::migration::vm::start), and the source may be told only then that all is loaded |
    /// | has failed | | the state in which it came, after a reset |
    pub fn wait_devices(&self) -> Vec<DeviceReport> {
        self.check_expected();
        let failed_at = || self.load.first_failure.failed_at();
        self.common.wait_for_end(failed_at, || self.devices_ended());
        let ids = std::mem::take(&mut lock(&self.ids).devices);
        let failed = self.failure().is_some();
        self.common
            .devices(ids, failed.then_some(Device::discard_state))
    }

    /// Waits until every device is loaded and every channel has ended, or the session has failed. Gives the
    /// devices back, as [`LoadSession::wait_devices`] does.
    ///
    /// A source closes its channels, but possibly only when the destination has told it of its success. Such a
    /// destination calls [`LoadSession::wait_devices`] first.
    pub fn join(mut self) -> Report {
        self.end()
    }

    /// Cleans up (QEMU's want-exit): ends what is still under way, and gives the devices back, within the grace
    /// time.
    pub fn cleanup(mut self) -> Report {
        self.load.exit_all();
        self.end()
    }

    fn end(&mut self) -> Report {
        self.joined = true;
        self.check_expected();
        let failed_at = || self.load.first_failure.failed_at();
        self.common.wait_for_end(failed_at, || self.devices_ended());
        // The channels end by themselves where the source has closed them.
        let patience = deadline(self.common.settings.no_progress);
        let tasks = &self.common.tasks;
        let ended = || (tasks.at_work() <= 1 || failed_at().is_some()).then_some(());
        if tasks.wait(Some(patience), ended).is_none() {
            let error = Error::stalled(Phase::Receive, "the channel has not ended");
            self.load.fail(match lock(&self.open).first() {
                Some(number) => error.on_channel(*number),
                None => error,
            });
        }
        self.load.hang_up();
        self.load.trace_cleanup();
        let soon = || Some(deadline(SLACK));
        tasks.wait(soon(), || (tasks.at_work() <= 1).then_some(()));
        // What a driver keeps does not keep the I/O thread.
        let kept = tasks.at_work().saturating_sub(1);
        self.load.close();
        tasks.wait(soon(), || (tasks.at_work() <= kept).then_some(()));
        let leaked = self.load.has_leaked();
        let left_behind = tasks.join(leaked);
        self.common.canceller.retire();
        let stats = self.stats();
        let ids = lock(&self.ids).devices.clone();
        let result = self.load.failure().map_or(Ok(()), Err);
        let off = Device::discard_state;
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
        self.common.tasks.event().as_fd()
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
