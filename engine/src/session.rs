//! The VMM's side of a session: build a load or a save, start it, tell it what the VM does, join it.
//!
//! ```text
//!   destination                                  source
//!   ───────────                                  ──────
//!   LoadSession::builder()                       SourceChannels::greet(…)    hellos: the VM may run on
//!     .device(…) .channel(…)                     SaveSession::builder()
//!     .start()?          devices: RESUMING         .device(…) .greeted_channels(…)
//!   write_iterable(…)    main channel's data       .start()?           devices: STOP_COPY
//!   switchover_start()   the I/O thread begins       join()                all sent
//!   config_load_ready(…) where that is in use      → Report::stop_devices()   out of downtime
//!   join()               devices: STOP           drop(report)          the channels are closed
//! ```
//!
//! [`SaveBuilder::channel`](crate::SaveBuilder::channel) takes a channel that the session greets at its
//! start. Use it only for a source whose VM does not run.
//!
//! A session owns its threads, its memory, its ring and its channels. Nothing is global, so two sessions
//! know nothing of each other. The VMM gives its devices to a session and gets them back in the [`Report`].
//!
//! Any thread may call any method. [`Canceller`] cancels also while another thread is in `join`.
//!
//! # What ends each wait
//!
//! | wait | ended by |
//! |---|---|
//! | `join` | the end of all tasks; after a failure or a cancellation, the grace time at the latest |
//!
//! # What the kernel can still block
//!
//! A driver may not return a transfer.
//!
//! | | what happens |
//! |---|---|
//! | the session | waits for the grace time and no longer |
//! | the thread that submitted the transfer | cannot exit before the transfer has ended: the engine leaves its own behind ([`Report::abandoned_threads`]); a VMM's blocks at its exit |
//! | the process | the kernel keeps it at its exit, also after a signal, until the transfer has ended |

use std::{collections::BTreeMap, fmt, io, sync::mpsc, time::Instant};

#[cfg(feature = "sim")]
use vfio_migration_uring::sim::{SimConfig, SimRing};
use vfio_migration_uring::{Backend, Ring, Waker, deadline, later, open_with};

mod device_spec;

pub use self::device_spec::DeviceSpec;
pub(crate) use self::device_spec::{Expected, LoadRules};
#[cfg(feature = "faults")]
use crate::reorder::refusals::LeasePlan;
use crate::{
    canceller::{Attached, Canceller},
    channel::{Channel, Finished},
    device::{Device, set::for_all},
    error::{Error, ErrorKind, Phase, Result},
    first_failure::FirstFailure,
    id::DeviceId,
    io_loop::{IoHandle, IoLoop, Limits, Transfer},
    lane::{Buffer, CHAIN},
    memory_plan::Memory,
    reorder::{flags::SLACK, pool::Pool},
    settings::{MAX_DEVICES, Settings},
    stats::{ChannelCounters, DeviceStats, SpillStats, Stats},
    sync::{Arc, Mutex, lock},
    tasks::{IO_THREAD, TaskKind, Tasks, Threads},
    trace,
};

/// What the host could not give.
pub(crate) fn host(error: io::Error) -> Error {
    Error::new(ErrorKind::Host, Phase::Setup).caused_by(error)
}

/// How many operations a ring must have room for.
const fn ring_capacity(devices: u32) -> usize {
    (devices * CHAIN) as usize
}

const _: () = assert!(ring_capacity(MAX_DEVICES) <= vfio_migration_uring::MAX_CAPACITY);

/// What a session's start would make within the downtime, made before it.
pub(crate) struct Prepared {
    /// What it was made for: the most devices, and how their memory is cut.
    pub(crate) limit: u32,
    pub(crate) memory: Memory,
    /// All of it has been touched.
    pub(crate) pool: Arc<Pool>,
    pub(crate) ring: Box<dyn Ring<Buffer>>,
    pub(crate) backend: &'static str,
    pub(crate) waker: Waker,
}

/// What is common to both builders.
#[derive(Default)]
pub(crate) struct Parts {
    pub(crate) settings: Settings,
    pub(crate) devices: Vec<DeviceSpec>,
    pub(crate) channels: Vec<Channel>,
    pub(crate) threads: Threads,
    pub(crate) canceller: Option<Canceller>,
    /// Save. Gone where what it was made from has changed since.
    pub(crate) prepared: Option<Prepared>,
    #[cfg(feature = "sim")]
    pub(crate) simulation: Option<SimConfig>,
    #[cfg(feature = "faults")]
    pub(crate) refusals: Option<LeasePlan>,
}

impl Parts {
    pub(crate) fn ring(
        &self,
        devices: u32,
        waker: Waker,
    ) -> Result<(Box<dyn Ring<Buffer>>, &'static str)> {
        let capacity = ring_capacity(devices);
        let grace = self.settings.grace;
        #[cfg(feature = "sim")]
        if let Some(config) = &self.simulation {
            let config = SimConfig {
                capacity,
                ..config.clone()
            };
            return Ok((Box::new(SimRing::new(config, waker).map_err(host)?), "sim"));
        }
        let (ring, chosen) = open_with(
            self.settings.backend,
            capacity,
            waker,
            grace,
            Some(self.threads.workers()),
        )
        .map_err(host)?;
        let name = match chosen {
            Backend::Blocking => "blocking",
            _ => "uring",
        };
        Ok((ring, name))
    }

    pub(crate) const fn io_limits(&self) -> Limits {
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
            .field("prepared", &self.prepared.is_some())
            .finish_non_exhaustive()
    }
}

/// What both builders have.
macro_rules! builder_methods {
    () => {
        /// Replaces all settings.
        pub fn settings(mut self, settings: Settings) -> Self {
            self.parts.settings = settings;
            self.parts.prepared = None;
            self
        }

        /// Returns the settings as they are now.
        pub fn settings_mut(&mut self) -> &mut Settings {
            self.parts.prepared = None;
            &mut self.parts.settings
        }

        /// Runs these devices' state changes on the threads on which the session's tasks run.
        pub(crate) fn lend_threads<'a>(&self, devices: impl IntoIterator<Item = &'a mut Device>) {
            for device in devices {
                device.adopt_threads(&self.parts.threads);
            }
        }

        /// How many devices it has.
        pub(crate) const fn device_count(&self) -> usize {
            self.parts.devices.len()
        }

        /// Adds a device, and what is set for it alone. The session owns the device until its report. If the
        /// session fails, the device goes back to the state in which it is now: RUNNING, or STOP if the VM does
        /// not run.
        pub fn device(mut self, device: impl Into<DeviceSpec>) -> Self {
            self.parts.devices.push(device.into());
            self
        }

        /// Adds devices: see [`device`](Self::device).
        pub fn devices(self, devices: impl IntoIterator<Item: Into<DeviceSpec>>) -> Self {
            devices.into_iter().fold(self, Self::device)
        }

        /// Adds channels.
        pub fn channels(self, channels: impl IntoIterator<Item: Into<Channel>>) -> Self {
            channels.into_iter().fold(self, Self::channel)
        }

        /// Adds a channel.
        pub fn channel(mut self, channel: impl Into<Channel>) -> Self {
            self.parts.channels.push(channel.into());
            self
        }

        /// Runs every task of the session on the VMM's threads: the engine then makes no thread
        /// ([`TaskKind`](crate::TaskKind) lists them). `spawn` is called once per task, on the thread that starts
        /// the session or adds to it; for a [`TaskKind::Worker`](crate::TaskKind::Worker) on the I/O thread; for a
        /// [`TaskKind::Close`](crate::TaskKind::Close) on the thread that drops the report. `spawn` must soon run
        /// the task on a thread of its own, and must not wait for the task's end. The session's
        /// devices keep `spawn`, for their state changes outside of the session ([`Device::spawn_with`]).
        pub fn spawn_with(
            mut self,
            spawn: impl Fn(Task) -> std::io::Result<()> + Send + Sync + 'static,
        ) -> Self {
            self.parts.threads.spawn_with(spawn);
            self.parts.prepared = None;
            self
        }

        /// Calls `hook` on each thread of the session before it works: the place for affinity, priority and a
        /// seccomp filter. Holds for the engine's threads, and for those of [`spawn_with`](Self::spawn_with). The
        /// session's devices keep it ([`Device::on_thread_start`]).
        ///
        /// A thread whose hook fails, or panics, does no work. A session's thread then fails the session
        /// ([`ErrorKind::Host`](crate::ErrorKind::Host)). Where the thread is only to help
        /// ([`TaskKind::State`](crate::TaskKind::State), [`TaskKind::Close`](crate::TaskKind::Close)), its work is
        /// done as if the host had no thread.
        ///
        /// ```
        /// use vfio_migration::{LoadSession, TaskKind};
        ///
        /// let builder = LoadSession::builder().on_thread_start(|kind| {
        ///     if *kind == TaskKind::Io {
        ///         // … sched_setaffinity …
        ///     }
        ///     Ok(()) // … the filter, made of `system_calls(kind.role(), …)` …
        /// });
        /// # drop(builder);
        /// ```
        pub fn on_thread_start(
            mut self,
            hook: impl Fn(&TaskKind) -> std::io::Result<()> + Send + Sync + 'static,
        ) -> Self {
            self.parts.threads.on_start(hook);
            self.parts.prepared = None;
            self
        }

        /// Ends the session when `canceller` is cancelled: that of the whole migration, or of several sessions.
        /// Without this the session has one of its own.
        pub fn cancelled_by(mut self, canceller: &crate::Canceller) -> Self {
            self.parts.canceller = Some(canceller.clone());
            self
        }

        /// Moves the devices' bytes through a simulated ring. The session sets the ring's capacity.
        #[cfg(feature = "sim")]
        pub fn simulated_ring(mut self, config: vfio_migration_uring::sim::SimConfig) -> Self {
            self.parts.simulation = Some(config);
            self.parts.prepared = None;
            self
        }

        /// Refuses leases of the session's memory as `plan` says.
        #[cfg(feature = "faults")]
        pub fn refuse_leases(mut self, plan: crate::LeasePlan) -> Self {
            self.parts.refusals = Some(plan);
            self.parts.prepared = None;
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
    /// How this device's part went. A device may have succeeded in a session that failed.
    pub result: Result<()>,
    /// The device, or `None` if a transfer or a callback is stuck in it: such a device must not be touched and
    /// is leaked. [`Device::state`], [`Device::was_reset`] and [`Device::duty`] say what became of the device.
    pub device: Option<Device>,
}

/// How a session ended.
///
/// The report of a save also keeps the channels, whose end the destination has been told. Dropping the report
/// closes them. After a successful save the drop waits until the destination has ended its side too, for a
/// second at most: closing a channel earlier could lose what the destination has not read yet.
#[derive(Debug)]
#[non_exhaustive]
#[must_use = "says whether the migration succeeded, and has the devices"]
pub struct Report {
    /// The result of the whole session: the first failure, or the cancellation.
    pub result: Result<()>,
    /// By device, in the order given.
    pub devices: Vec<DeviceReport>,
    /// The counters at the end.
    pub stats: Stats,
    /// How many threads the kernel still holds. They were left behind.
    pub abandoned_threads: usize,
    /// Save: the channels, on which all has been sent.
    pub(crate) channels: Finished,
}

impl Report {
    /// Sets every device that is still in a saving state to STOP, all at once, and returns when all are. Call
    /// this when the VM runs elsewhere. It can be slow, so it belongs after the migration, outside of the
    /// downtime.
    ///
    /// A device that refuses is reset, which makes it RUNNING, and then stopped. Its result says so. If that
    /// fails too, its [`duty`](Device::duty) says what to do.
    pub fn stop_devices(&mut self) {
        let mut saving: Vec<_> = self
            .devices
            .iter_mut()
            .filter_map(|report| {
                let device = report.device.as_mut()?;
                let saving = device.state().is_saving();
                saving.then_some((device, &report.id, &mut report.result))
            })
            .collect();
        for_all(
            &mut saving,
            |(device, ..)| device,
            |(device, id, result)| {
                let stopped = device.retire();
                trace::save_cleanup(id);
                if result.is_ok() {
                    **result = stopped;
                }
            },
        );
    }
}

impl Report {
    /// Takes every device back to the state in which it came, all at once. Call this when the VM goes on here
    /// although everything was sent. A save that failed has already done this.
    pub fn put_back(&mut self) {
        self.channels.abandon();
        // What failed before is the error to report; what this comes to is each device's duty.
        each_at_once(&mut self.devices, |device| {
            let saved = device.state().is_saving();
            drop(device.put_back());
            if saved {
                trace::save_cleanup(device.id());
            }
        });
    }
}

/// Does something with all devices of a report at once.
pub(crate) fn each_at_once(reports: &mut [DeviceReport], f: impl Fn(&mut Device) + Sync) {
    let devices = reports.iter_mut().filter_map(|it| it.device.as_mut());
    let mut devices: Vec<_> = devices.collect();
    for_all(&mut devices, |device| device, |device| f(device));
}

/// A device on its way to its thread: whoever comes first takes it, the thread or, where there is
/// none, the end of the task that was never run.
pub(crate) struct DeviceHandoff(Mutex<Option<Device>>);

impl DeviceHandoff {
    pub(crate) fn new(device: Device) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Some(device))))
    }

    pub(crate) fn take(&self) -> Option<Device> {
        lock(&self.0).take()
    }
}

/// A device that nothing is stuck in; another is leaked. Even to drop it would be to touch it: an
/// implementation that closes its device's file would wait there for the very transfer.
pub(crate) fn unless_stuck(device: Device, stuck: bool) -> Option<Device> {
    if stuck {
        std::mem::forget(device);
        return None;
    }
    Some(device)
}

/// A device that has come back from its thread.
pub(crate) struct FinishedDevice {
    pub(crate) device: Device,
    pub(crate) result: Result<()>,
}

/// What both kinds of session have.
pub(crate) struct Common {
    pub(crate) tasks: Arc<Tasks>,
    pub(crate) canceller: Attached,
    /// By ordinal: which devices there are, and those that have come back.
    pub(crate) returned: Mutex<BTreeMap<u32, FinishedDevice>>,
    pub(crate) channels: Mutex<Vec<Arc<ChannelCounters>>>,
    pub(crate) backend: &'static str,
    pub(crate) budget: usize,
    pub(crate) settings: Arc<Settings>,
}

impl Common {
    /// Hands a device back from its thread, with its result, and wakes whoever waits for that.
    pub(crate) fn give_back(&self, ordinal: u32, device: Device, result: Result<()>) {
        lock(&self.returned).insert(ordinal, FinishedDevice { device, result });
        self.tasks.notify();
    }

    /// Waits for the results of these devices' set-ups. Where one fails, or was aborted, the session's first
    /// failure is the error.
    pub(crate) fn set_up(
        &self,
        results: &mpsc::Receiver<(DeviceId, Result<()>)>,
        names: Vec<DeviceId>,
        first_failure: &FirstFailure,
    ) -> Result<()> {
        let set_up = self.wait_for_set_up(results, names);
        set_up.map_err(|error| first_failure.failure().unwrap_or(error).into_public())
    }

    fn wait_for_set_up(
        &self,
        results: &mpsc::Receiver<(DeviceId, Result<()>)>,
        mut names: Vec<DeviceId>,
    ) -> Result<()> {
        let deadline = deadline(self.settings.no_progress);
        while let Some(first) = names.first() {
            let left = deadline.saturating_duration_since(Instant::now());
            match results.recv_timeout(left) {
                Ok((device, result)) => {
                    result?;
                    names.retain(|name| *name != device);
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    let missing = "the device has not changed its state";
                    return Err(Error::stalled(Phase::Setup, missing).on_device(first));
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    let kind = ErrorKind::Internal("a device's thread ended before its set-up");
                    return Err(Error::new(kind, Phase::Setup).on_device(first));
                }
            }
        }
        Ok(())
    }

    /// When a device that has failed at `at` must have come back: the grace time for its transfer, and
    /// for what puts it back.
    pub(crate) fn end_of_grace(&self, at: Instant) -> Instant {
        let grace = self.settings.grace.saturating_add(SLACK);
        later(later(at, grace), grace)
    }

    /// Waits until all tasks but the I/O thread's have ended, as `ended` tells; after a failure no
    /// longer than the grace time and what a device needs to be put back.
    pub(crate) fn wait_for_end(
        &self,
        failed_at: impl Fn() -> Option<Instant>,
        ended: impl Fn() -> bool,
    ) {
        loop {
            let deadline = failed_at().map(|at| self.end_of_grace(at));
            let look = || (ended() || failed_at().is_some() != deadline.is_some()).then_some(());
            let found = self.tasks.wait(deadline, look);
            if found.is_none() || ended() {
                return;
            }
        }
    }

    /// Makes a failure end the waits here at once.
    pub(crate) fn notify_of(&self, first_failure: &FirstFailure) {
        let tasks = self.tasks.clone();
        first_failure.add(Box::new(move || tasks.notify()));
    }

    /// The devices that have come back, and those that have not.
    /// `off` does what remains to be done with each where the session has failed.
    pub(crate) fn devices(
        &self,
        ids: Vec<(u32, DeviceId)>,
        off: Option<fn(&mut Device) -> Result<()>>,
    ) -> Vec<DeviceReport> {
        let mut reports = self.come_back(ids);
        if let Some(off) = off {
            // The session's own error is the one to report; what this comes to is the device's duty.
            each_at_once(&mut reports, |device| drop(off(device)));
        }
        reports
    }

    pub(crate) fn come_back(&self, ids: Vec<(u32, DeviceId)>) -> Vec<DeviceReport> {
        let mut returned = lock(&self.returned);
        ids.into_iter()
            .map(|(ordinal, id)| match returned.remove(&ordinal) {
                Some(FinishedDevice { device, result }) => {
                    let stuck = matches!(&result, Err(error) if *error.kind() == ErrorKind::Stuck);
                    DeviceReport {
                        id,
                        result: result.map_err(Error::into_public),
                        device: unless_stuck(device, stuck),
                    }
                }
                None => DeviceReport {
                    result: Err(Error::new(ErrorKind::Stuck, Phase::Cleanup).on_device(&id)),
                    id,
                    device: None,
                },
            })
            .collect()
    }

    /// The end. `left_behind` threads were not joined.
    pub(crate) fn report(
        &self,
        ids: Vec<(u32, DeviceId)>,
        result: Result<()>,
        stats: Stats,
        left_behind: usize,
        off: fn(&mut Device) -> Result<()>,
    ) -> Report {
        let off = result.is_err().then_some(off);
        let devices = self.devices(ids, off);
        debug_assert!(
            result.is_err() || devices.iter().all(|device| device.result.is_ok()),
            "a device was aborted, and nothing has failed"
        );
        Report {
            result,
            devices,
            stats,
            abandoned_threads: left_behind,
            channels: Finished::default(),
        }
    }

    pub(crate) fn stats<F>(
        &self,
        devices: Vec<DeviceStats>,
        pool: &Pool,
        io: &IoHandle<F>,
    ) -> Stats {
        let channels = lock(&self.channels);
        let channels = (0..).zip(&*channels);
        let (now, high) = pool.in_use();
        let layout = pool.layout();
        let reserves = layout.reserves as usize * layout.reserve_len;
        Stats {
            devices,
            channels: channels
                .map(|(at, counters)| counters.snapshot(at))
                .collect(),
            budget: self.budget as u64,
            held: u64::from(now) * layout.buffer_len as u64,
            spill: SpillStats::default(),
            dropped_packets: 0,
            dropped_bytes: 0,
            held_high: (high as usize * layout.buffer_len + reserves) as u64,
            backend: self.backend,
            ring_calls: io.ring_calls.get(),
            late_wakeups: io.late.get() + self.tasks.late(),
            leaked_transfers: io.leaked.get() + io.kept.get(),
        }
    }

    /// Spawns the I/O thread.
    pub(crate) fn spawn_io_thread<F: Transfer + 'static>(
        tasks: &Arc<Tasks>,
        io_loop: IoLoop<F>,
        handle: Arc<IoHandle<F>>,
        collector: crossbeam_epoch::Collector,
        progressed: impl Fn() + Send + 'static,
        failed: impl FnOnce(Error) + Clone + Send + 'static,
    ) -> Result<()> {
        let broken = failed.clone();
        Tasks::spawn(
            tasks,
            TaskKind::Io,
            IO_THREAD.into(),
            move || io_loop.run(&collector, progressed, broken),
            move |error| {
                // First, so that it is the reason: whatever was attached and never taken in goes away below,
                // and says so.
                if let Some(error) = error {
                    failed(error);
                }
                handle.abandon();
            },
        )
    }
}

pub(crate) use builder_methods;
