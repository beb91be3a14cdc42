//! The source's session: see the [module above](super).

use std::{
    collections::BTreeMap,
    fmt,
    os::fd::{AsFd, BorrowedFd},
    sync::mpsc,
};

use vfio_migration_uring::{Waker, deadline};

use super::{
    Save, SaveDevice, SaveTransfer, SizedDevice, SourceChannels, serve_channel, serve_device,
};
#[cfg(doc)]
use crate::error::ErrorKind;
use crate::{
    arena::NoMemory,
    canceller::Canceller,
    channel::{Channel, ChannelLimits, Sender},
    device::{Device, estimate::buffer_len},
    error::{Error, Failed, Phase, Result},
    host::no_budget,
    id::DeviceId,
    io_loop::{IoHandle, IoLoop},
    memory_plan::Memory,
    reorder::{
        flags::SLACK,
        pool::{Pool, PoolLayout},
    },
    session::{Common, DeviceHandoff, DeviceSpec, Parts, Prepared, Report, builder_methods, host},
    settings::{Settings, check_data_len},
    stats::{ChannelCounters, Stats},
    sync::{Arc, Mutex, lock},
    tasks::{Task, TaskKind, Tasks},
    trace,
};

/// Builds a [`SaveSession`].
#[derive(Debug, Default)]
#[must_use = "nothing happens before it is started"]
pub struct SaveBuilder {
    parts: Parts,
    /// Channels that have been greeted.
    greeted: Option<SourceChannels>,
}

impl SaveBuilder {
    builder_methods!();

    /// Whether it has channels that are not greeted before its start.
    pub(crate) const fn greets(&self) -> bool {
        !self.parts.channels.is_empty()
    }

    /// What ends the session: the greeted channels' canceller goes on with it, unless it was given another.
    pub(crate) fn canceller(&mut self) -> Canceller {
        let greeted = self.greeted.as_ref();
        let chosen = self
            .parts
            .canceller
            .get_or_insert_with(|| greeted.map_or_else(Canceller::new, SourceChannels::canceller));
        chosen.clone()
    }

    /// Adds channels that were greeted when the migration was set up. They come before all other channels,
    /// and replace those of an earlier call. Their canceller goes on with the session, unless
    /// [`cancelled_by`](Self::cancelled_by) says another.
    pub fn greeted_channels(mut self, channels: SourceChannels) -> Self {
        self.greeted = Some(channels);
        self
    }

    /// Makes and touches the memory, and makes the ring. A start would otherwise do this within the
    /// downtime. It is
    /// for `devices` devices, whose largest packet holds `data_len` bytes of data.
    ///
    /// Call this before the VM stops, and after [`settings`](Self::settings): new settings drop the memory and
    /// the ring. A start that needs other memory makes its own.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Misuse`] for impossible settings; [`ErrorKind::Host`] for what the host lacks. Nothing is
    /// lost: the start then makes what it needs.
    pub fn prepare(&mut self, devices: usize, data_len: usize) -> Result<()> {
        let parts = &mut self.parts;
        parts.prepared = None;
        check_data_len("data_len: 1 byte to just below 16 MiB", data_len)?;
        let limit = parts.settings.device_limit(devices)?;
        let memory = parts.settings.save_memory(limit, data_len)?;
        parts.prepared = Some(prepared(parts, limit, memory, Pool::new)?);
        Ok(())
    }

    /// Allocates all memory, starts all threads, and sets all devices to STOP_COPY, all at once. The session
    /// reads from each device as soon as it is in STOP_COPY. [`prepare`](Self::prepare) does some of this
    /// earlier.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Misuse`] for impossible settings, no device or no channel; [`ErrorKind::Host`] for what
    /// the host lacks; a device's refusal. The devices are put back to the state in which they came, and given
    /// back ([`Failed`]).
    pub fn start(self) -> Result<SaveSession, Failed<Vec<Device>>> {
        let mut builder = self;
        let mut devices = std::mem::take(&mut builder.parts.devices);
        for DeviceSpec { device, .. } in &mut devices {
            device.adopt_threads(&builder.parts.threads);
        }
        match SaveSession::prepare(&mut builder, &mut devices) {
            Ok((mut session, io_loop, limits)) => {
                match session.launch(builder, devices, io_loop, limits) {
                    Ok(()) => Ok(session),
                    Err(error) => {
                        session.cancel();
                        let devices = session.end().devices.into_iter();
                        Err(Failed::new(
                            error,
                            devices.filter_map(|report| report.device).collect(),
                        ))
                    }
                }
            }
            Err(error) => {
                let devices = devices.into_iter().map(|spec| spec.device);
                Err(Failed::new(error, devices.collect()))
            }
        }
    }
}

/// Makes a session's memory and its ring.
fn prepared(
    parts: &Parts,
    limit: u32,
    memory: Memory,
    pool: impl FnOnce(PoolLayout) -> Result<Pool, NoMemory>,
) -> Result<Prepared> {
    let waker = Waker::new().map_err(host)?;
    let (ring, backend) = parts.ring(limit, waker.clone())?;
    Ok(Prepared {
        limit,
        memory,
        pool: Arc::new(pool(memory.pool).map_err(no_budget)?),
        ring,
        backend,
        waker,
    })
}

/// A save under way: the source's side of a migration.
///
/// See [`LoadSession`](crate::LoadSession) for an example of both. Dropping it cancels, and waits as
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

    /// Everything that needs no thread.
    fn prepare(
        builder: &mut SaveBuilder,
        devices: &mut [DeviceSpec],
    ) -> Result<(Self, IoLoop<SaveTransfer>, ChannelLimits)> {
        let (greeted, failure) = builder
            .greeted
            .as_ref()
            .map_or((0, None), |channels| (channels.count(), channels.failure()));
        if let Some(error) = failure {
            return Err(error);
        }
        let canceller = builder.canceller();
        canceller.check_in(Phase::Setup)?;
        let parts = &mut builder.parts;
        let count = u32::try_from(greeted + parts.channels.len()).unwrap_or(u32::MAX);
        if count == 0 || count > 255 {
            return Err(Error::misuse(Phase::Setup, "a save has 1 to 255 channels"));
        }
        parts.settings.check_numbers()?;
        let limit = parts.settings.device_limit(devices.len())?;
        let mut sized: Vec<SizedDevice> = Vec::with_capacity(devices.len());
        for spec in devices {
            let id = spec.device.id().clone();
            if sized.iter().any(|other| other.id == id) {
                return Err(Error::two_devices_named(&id));
            }
            let len = spec.data_len.or(parts.settings.data_len);
            if let Some(len) = len {
                let what = "a device's data_len: 1 byte to just below 16 MiB";
                check_data_len(what, len).map_err(|error| error.on_device(&id))?;
            }
            let len = len.unwrap_or_else(|| buffer_len(spec.device.data_size().ok()));
            sized.push(SizedDevice {
                id,
                data_len: len,
                first: spec.first_index,
                of_migration: spec.of_migration,
            });
        }
        let largest = sized.iter().map(|it| it.data_len).max().unwrap_or(0);
        let memory = parts.settings.save_memory(limit, largest)?;
        let made = parts.prepared.take();
        let made = made.filter(|made| (made.limit, made.memory) == (limit, memory));
        let Prepared {
            pool,
            ring,
            backend,
            waker,
            ..
        } = made.map_or_else(|| prepared(parts, limit, memory, Pool::untouched), Ok)?;
        #[cfg(feature = "faults")]
        if let Some(plan) = parts.refusals.take() {
            pool.refuse_by(plan);
        }
        let handle = Arc::new(IoHandle::new(waker));
        let settings = Arc::new(parts.settings.clone());
        let limits = ChannelLimits::new(&settings, count);
        let save = Arc::new(Save::new(
            sized,
            pool,
            handle.clone(),
            settings.grace,
            parts.threads.clone(),
        ));
        let session = Self {
            common: Arc::new(Common {
                tasks: Arc::new(Tasks::new(std::mem::take(&mut parts.threads))?),
                canceller: canceller.attach(Phase::Save, {
                    let save = save.clone();
                    move |error| {
                        save.fail(error);
                    }
                }),
                returned: Mutex::new(BTreeMap::new()),
                channels: Mutex::new(Vec::new()),
                backend,
                budget: memory.budget,
                settings,
            }),
            save,
            joined: false,
        };
        session.common.notify_of(&session.save.first_failure);
        let io_loop = IoLoop::new(handle, ring, parts.io_limits());
        Ok((session, io_loop, limits))
    }

    /// Everything that does.
    fn launch(
        &self,
        builder: SaveBuilder,
        devices: Vec<DeviceSpec>,
        io_loop: IoLoop<SaveTransfer>,
        limits: ChannelLimits,
    ) -> Result<()> {
        let failing = self.save.clone();
        let driving = Common::spawn_io_thread(
            &self.common.tasks,
            io_loop,
            self.save.io.clone(),
            self.save.collector.clone(),
            || {},
            move |error| {
                failing.fail(error);
            },
        );
        if let Err(error) = driving {
            for (shared, spec) in self.save.devices.iter().zip(devices) {
                let result = Err(error.clone());
                self.common.give_back(shared.ordinal(), spec.device, result);
            }
            return Err(error);
        }
        // All of them before anything else, so that whatever fails below they come back.
        let (sender, results) = mpsc::channel();
        let mut started = Ok(());
        for (shared, spec) in self.save.devices.iter().zip(devices) {
            let spawned = self.spawn_device(shared.clone(), spec.device, sender.clone());
            started = started.and(spawned);
        }
        drop(sender);
        started?;
        let mut senders = builder
            .greeted
            .map_or_else(Vec::new, SourceChannels::hand_over);
        for channel in builder.parts.channels {
            let number = u32::try_from(senders.len()).expect("the builder bounds their number");
            senders.push(Sender::new(channel, number));
        }
        for sender in &senders {
            let hangup = sender.adopt().map_err(host)?;
            self.save.first_failure.add(hangup);
        }
        for (number, sender) in (0..).zip(senders) {
            self.spawn_channel(number, sender, limits)?;
        }
        let names = self.save.devices.iter();
        let names = names.map(|device| device.id.clone()).collect();
        self.common
            .set_up(&results, names, &self.save.first_failure)
    }

    fn spawn_device(
        &self,
        shared: Arc<SaveDevice>,
        device: Device,
        set_up: mpsc::Sender<(DeviceId, Result<()>)>,
    ) -> Result<()> {
        let (save, common) = (self.save.clone(), self.common.clone());
        let ending = (self.save.clone(), self.common.clone(), shared.clone());
        let ordinal = shared.ordinal();
        let handoff = DeviceHandoff::new(device);
        let left = handoff.clone();
        Tasks::spawn(
            &self.common.tasks,
            TaskKind::Device(shared.id.clone()),
            format!("vfio-mig-dev{ordinal}"),
            move || {
                let Some(mut device) = handoff.take() else {
                    return;
                };
                let result = serve_device(&save, &shared, &mut device, |result| {
                    // Nobody listens any more where another device's set-up has failed.
                    let _gone = set_up.send((shared.id.clone(), result));
                });
                if let Err(error) = &result {
                    save.fail(error.clone());
                }
                common.give_back(ordinal, device, result);
            },
            move |error| {
                let (save, common, shared) = ending;
                if let Some(error) = error {
                    save.fail(error);
                }
                if let Some(device) = left.take() {
                    let result = Err(Error::aborted(Phase::Setup).on_device(&shared.id));
                    common.give_back(ordinal, device, result);
                }
                shared.flags.end();
            },
        )
    }

    fn spawn_channel(&self, number: u32, sender: Sender, limits: ChannelLimits) -> Result<()> {
        let counters = Arc::new(ChannelCounters::default());
        lock(&self.common.channels).push(counters.clone());
        let save = self.save.clone();
        let ending = self.save.clone();
        let id = u8::try_from(number).expect("the builder bounds their number");
        Tasks::spawn(
            &self.common.tasks,
            TaskKind::Channel(number),
            format!("vfio-mig-ch{number}"),
            move || {
                if let Err(error) = serve_channel(&save, sender, &limits, id, &counters) {
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

    /// Returns a handle that cancels the session, also while another thread waits in [`SaveSession::join`].
    #[must_use]
    pub fn canceller(&self) -> Canceller {
        self.common.canceller.canceller().clone()
    }

    /// Cancels the session (QEMU's should-quit). Returns at once. The devices go back to the state in which
    /// they came.
    pub fn cancel(&self) {
        self.save.fail(Error::cancelled(Phase::Save));
    }

    /// Fails the session for a reason of the VMM's, for example a broken main channel.
    pub fn fail(&self, error: Error) {
        self.save.fail(error);
    }

    /// Returns why the session has failed, if it has.
    #[must_use]
    pub fn failure(&self) -> Option<Error> {
        self.save.first_failure.failure()
    }

    /// Whether everything has been sent, or the session has failed and its threads have ended.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.common.tasks.at_work() <= 1
    }

    /// Returns the counters as they are now.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let devices = &self.save.devices;
        let late: u64 = devices.iter().map(|device| device.flags.late()).sum();
        let devices = devices
            .iter()
            .map(|device| device.counters.snapshot(&device.id));
        let mut stats = self
            .common
            .stats(devices.collect(), &self.save.pool, &self.save.io);
        stats.late_wakeups += self.save.queue.late() + late;
        stats
    }

    /// Waits until everything is sent, and gives the devices back: in STOP_COPY, or, if the save failed, in the
    /// state in which they came.
    ///
    /// In STOP_COPY a device does not run, and keeps what it holds. It stays there until it is known where the
    /// VM runs:
    ///
    /// | the destination said | then |
    /// |---|---|
    /// | all is loaded | [`Report::stop_devices`] |
    /// | it has failed | [`Report::put_back`] |
    /// | neither | the VM must not run here |
    pub fn join(mut self) -> Report {
        self.end()
    }

    /// Cleans up: ends what is still under way, and gives the devices back, within the grace time.
    pub fn cleanup(self) -> Report {
        if !self.is_finished() {
            self.cancel();
        }
        self.join()
    }

    fn end(&mut self) -> Report {
        self.joined = true;
        let tasks = &self.common.tasks;
        let failed_at = || self.save.first_failure.failed_at();
        self.common.wait_for_end(failed_at, || tasks.at_work() <= 1);
        self.save.io.close();
        let short = Some(deadline(SLACK));
        tasks.wait(short, || tasks.is_idle().then_some(()));
        let leaked = self.save.io.leaked.get() > 0;
        let left_behind = tasks.join(leaked);
        self.common.canceller.retire();
        let stats = self.stats();
        let ids = self.save.devices.iter();
        let ids = ids.map(|device| (device.ordinal(), device.id.clone()));
        let result = self.failure().map_or(Ok(()), Err);
        let mut finished = std::mem::take(&mut *lock(&self.save.finished));
        if result.is_err() {
            finished.abandon();
        }
        if result.is_err() {
            let of_session = self.save.devices.iter().filter(|it| !it.of_migration);
            of_session.for_each(|device| trace::save_cleanup(&device.id));
        }
        let off = Device::put_back;
        let mut report = self
            .common
            .report(ids.collect(), result, stats, left_behind, off);
        report.channels = finished;
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
        self.common.tasks.event().as_fd()
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
