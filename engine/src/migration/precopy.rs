//! All devices of a VM on the source while the VM runs: PRE_COPY on a thread of the engine's, beside the VMM's own
//! memory iterations.
//!
//! ```text
//!   setup() ─▶ Precopy ─ start(limit) ─▶ a thread: rounds over all devices ─▶ channels
//!                │  message(), acknowledged(), progress()      the VMM's thread, meanwhile
//!                └─ switch_over() ─▶ Outgoing                  ends the thread; stops the devices
//!                   abort() ─▶ MigratableDevice…               as at set-up (dropped: the devices too)
//! ```
//!
//! | who | owns | may touch |
//! |---|---|---|
//! | the thread, from `start` to its end | the devices and the channels | what `progress` shows |
//! | the VMM's thread | all of it, before and after; the messages always | what `progress` shows |
//!
//! A round sends what each device has now, as one packet each. The thread ends by its limit, a failure, or
//! `switch_over`, `pause` or `abort`. When it has ended it may be started again.
//!
//! # What ends each wait
//!
//! | who waits | for | ended by |
//! |---|---|---|
//! | the thread | a device's data | its driver |
//! | the thread | the destination, to take bytes | it; the time without progress; a cancellation |
//! | the thread, when no device has anything | the next round | 20 ms; whoever ends the thread |
//! | whoever ends the thread | the end of its round | the three above |

use std::{
    fmt, io, mem,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::{
    Capabilities, MigratableDevice, Outgoing, OutgoingDevice, Pending, SwitchoverAck,
    SwitchoverAcks, messages::Messages, vm,
};
use crate::{
    canceller::Canceller,
    error::{Error, ErrorKind, Failed, Phase, Result},
    id::DeviceId,
    message::MessageKind,
    save::{SaveBuilder, SourceChannels},
    tasks::{Task, TaskKind, Threads},
};

/// How long the thread sleeps when no device has anything.
const REST: Duration = Duration::from_millis(20);

// Not `sync`'s: a wait here is for the device's own driver, and no model steps through that.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// When a stretch of PRE_COPY ends by itself. Default: never.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct PrecopyLimit {
    /// After so many bytes of the devices' data. The round that reaches them is finished.
    pub bytes: Option<u64>,
    /// After so long.
    pub time: Option<Duration>,
}

/// How far PRE_COPY is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct PrecopyProgress {
    /// Bytes of the devices' data that have been sent.
    pub bytes: u64,
    /// What is left, the sum over all devices, as the thread found it last. Its parts are asked of the drivers at the
    /// beginning and whenever no device has anything; otherwise they are the last answers less what was read since.
    pub pending: Pending,
    /// Whether the thread is at work.
    pub running: bool,
}

/// What a thread has in its hands.
struct Work {
    sources: Vec<OutgoingDevice>,
    channels: SourceChannels,
}

/// What both threads see.
#[derive(Debug, Default)]
struct State {
    progress: PrecopyProgress,
    /// The thread is to end.
    stop: bool,
    failure: Option<Error>,
    /// Devices whose initial data has been sent, each with its count of packets, and nobody has been told.
    initial: Vec<(DeviceId, u32)>,
    /// Whether each device's has.
    complete: bool,
}

#[derive(Default)]
struct Shared {
    /// Nothing while the thread has it.
    work: Mutex<Option<Work>>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Work {
    /// Sends what each device has now. Returns how much that was.
    fn round(&mut self, shared: &Shared) -> Result<u64> {
        let mut sent = 0;
        for source in &mut self.sources {
            let count = source.send(&mut self.channels)? as u64;
            sent += count;
            lock(&shared.state).progress.bytes += count;
        }
        if let Some(error) = self.channels.failure() {
            return Err(error);
        }
        if sent == 0 {
            self.ask(shared)?;
        }
        self.tell(shared);
        Ok(sent)
    }

    /// Asks the drivers what is left.
    fn ask(&mut self, shared: &Shared) -> Result<()> {
        for source in &mut self.sources {
            source.pending_exact()?;
        }
        self.tell(shared);
        Ok(())
    }

    /// Says how far it is.
    fn tell(&mut self, shared: &Shared) {
        let mut pending = Pending::default();
        for source in &self.sources {
            let of = source.pending_estimate();
            pending.initial += of.initial;
            pending.dirty += of.dirty;
            pending.stop_copy += of.stop_copy;
        }
        let sent = self.sources.iter_mut();
        let sent: Vec<_> = sent
            .filter_map(|it| Some((it.id().clone(), it.take_initial_sent()?)))
            .collect();
        let complete = self.sources.iter().all(OutgoingDevice::has_sent_initial);
        let mut state = lock(&shared.state);
        state.progress.pending = pending;
        state.initial.extend(sent);
        state.complete = complete;
    }

    /// The thread's whole work.
    fn run(&mut self, shared: &Shared, limit: PrecopyLimit) -> Result<()> {
        let (began, mut sent) = (Instant::now(), 0);
        self.ask(shared)?;
        // Ends by the limit, by whoever ends the thread, or by a failure: see the module.
        while self.sources.iter().any(OutgoingDevice::is_active) {
            let round = self.round(shared)?;
            sent += round;
            let over = limit.bytes.is_some_and(|bytes| sent >= bytes)
                || limit.time.is_some_and(|time| began.elapsed() >= time);
            let state = lock(&shared.state);
            if over || state.stop {
                break;
            }
            if round == 0 {
                let rest = limit
                    .time
                    .map_or(REST, |time| time.saturating_sub(began.elapsed()).min(REST));
                let woken = shared
                    .changed
                    .wait_timeout_while(state, rest, |it| !it.stop);
                drop(woken.unwrap_or_else(PoisonError::into_inner));
            }
        }
        Ok(())
    }
}

/// Has the work, and brings it back however its thread ends, or if the thread is never run.
struct Hands {
    shared: Arc<Shared>,
    work: Option<Work>,
    result: Result<()>,
}

impl Hands {
    fn run(mut self, limit: PrecopyLimit) {
        if let Some(work) = &mut self.work {
            self.result = Err(Error::new(ErrorKind::Panicked, Phase::Save));
            self.result = work.run(&self.shared, limit);
        }
    }
}

impl Drop for Hands {
    fn drop(&mut self) {
        *lock(&self.shared.work) = self.work.take();
        let mut state = lock(&self.shared.state);
        state.progress.running = false;
        if let Err(error) = mem::replace(&mut self.result, Ok(())) {
            state.failure.get_or_insert(error.into_public());
        }
        self.shared.changed.notify_all();
    }
}

/// All devices of a VM on the source, while the VM runs, where the main channel carries control messages.
///
/// Any thread may own it. Only [`Precopy::progress`], [`Precopy::message`] and the [`Canceller`] never wait.
///
/// Dropping it ends the thread and puts the devices back, as [`Precopy::abort`] does.
#[must_use = "the migration of a VM's devices under way: switch over or abort it"]
pub struct Precopy {
    shared: Arc<Shared>,
    acks: SwitchoverAcks,
    asking: usize,
    messages: Messages,
    canceller: Canceller,
    threads: Threads,
    thread: Option<JoinHandle<()>>,
}

impl Precopy {
    /// Sets all devices up: those with PRE_COPY whose VM runs go to that state. `channels` carry all their data, that
    /// of PRE_COPY too ([`Capabilities::precopy_over_channels`] counts as set). The first [`Precopy::message`] tells
    /// the destination.
    ///
    /// # Errors
    ///
    /// As for [`OutgoingDevice::setup`]; [`ErrorKind::Misuse`] for no device, for a device whose data would not go over
    /// the channels, and for more devices than a message holds. The devices are given back in the state that they
    /// came in, and the channels are closed.
    pub fn setup(
        devices: Vec<MigratableDevice>,
        capabilities: &Capabilities,
        channels: SourceChannels,
    ) -> Result<Self, Failed<Vec<MigratableDevice>>> {
        let mut capabilities = capabilities.clone();
        capabilities.precopy_over_channels = true;
        let acks = SwitchoverAcks::new(capabilities.switchover_ack);
        let mut sources: Vec<OutgoingDevice> = Vec::with_capacity(devices.len());
        let mut devices = devices.into_iter();
        let mut messages = Messages::default();
        let set_up = loop {
            let Some(device) = devices.next() else {
                break messages.set_up(&sources, capabilities.switchover_ack);
            };
            match OutgoingDevice::setup(device, &capabilities, &acks, io::sink()) {
                Ok(source) => sources.push(source),
                Err(failed) => {
                    let (error, device) = failed.into_parts();
                    let back = sources.into_iter().map(OutgoingDevice::abort);
                    let back = back.chain([device]).chain(devices);
                    return Err(Failed::new(error, back.collect()));
                }
            }
        };
        if let Err(error) = set_up {
            let back = sources.into_iter().map(OutgoingDevice::abort);
            return Err(Failed::new(error, back.collect()));
        }
        let complete = sources.iter().all(OutgoingDevice::has_sent_initial);
        let precopy = Self {
            asking: sources.iter().filter(|it| !it.has_sent_initial()).count(),
            shared: Arc::default(),
            acks,
            messages,
            canceller: channels.canceller(),
            threads: Threads::default(),
            thread: None,
        };
        lock(&precopy.shared.state).complete = complete;
        *lock(&precopy.shared.work) = Some(Work { sources, channels });
        Ok(precopy)
    }

    /// Runs the thread on one of the VMM's ([`TaskKind::Precopy`]). `spawn` must soon run the task and must not wait for
    /// its end.
    pub fn spawn_with(&mut self, spawn: impl Fn(Task) -> io::Result<()> + Send + Sync + 'static) {
        self.threads.spawn_with(spawn);
    }

    /// Calls `hook` on the thread before it works: see
    /// [`SaveBuilder::on_thread_start`](crate::SaveBuilder::on_thread_start). If it fails, PRE_COPY has failed.
    pub fn on_thread_start(
        &mut self,
        hook: impl Fn(&TaskKind) -> io::Result<()> + Send + Sync + 'static,
    ) {
        self.threads.on_start(hook);
    }

    /// Starts the thread, which iterates until the limit. Returns at once.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Misuse`] while it runs; [`ErrorKind::Host`] if there is no thread; the failure, if PRE_COPY has
    /// failed.
    pub fn start(&mut self, limit: PrecopyLimit) -> Result<()> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        let Some(work) = lock(&self.shared.work).take() else {
            return Err(misuse("PRE_COPY is running"));
        };
        {
            let mut state = lock(&self.shared.state);
            (state.stop, state.progress.running) = (false, true);
        }
        let unrun = Error::misuse(Phase::Setup, "a task was dropped without being run");
        let hands = Hands {
            shared: self.shared.clone(),
            work: Some(work),
            result: Err(unrun),
        };
        let work = move || hands.run(limit);
        match self.threads.start(TaskKind::Precopy, "vfio-mig-pre", work) {
            Ok(thread) => {
                self.thread = thread;
                Ok(())
            }
            Err(error) => {
                let error = Error::lacking(Phase::Setup, "thread for PRE_COPY", error);
                lock(&self.shared.state).failure = Some(error.clone());
                Err(error)
            }
        }
    }

    /// Ends the thread, if it runs, and waits until its round has ended. The devices stay in PRE_COPY; it may be started
    /// again.
    pub fn pause(&mut self) {
        let mut state = lock(&self.shared.state);
        state.stop = true;
        self.shared.changed.notify_all();
        let changed = &self.shared.changed;
        let ended = changed.wait_while(state, |state| state.progress.running);
        drop(ended.unwrap_or_else(PoisonError::into_inner));
        if let Some(thread) = self.thread.take() {
            // Its work is done; panics are caught where they are the VMM's.
            let _ended = thread.join();
        }
    }

    /// Ends the thread, and lends the devices: to [`vm::stop`] and [`vm::start`], where somebody pauses the VM.
    pub fn with_devices<R>(&mut self, f: impl FnOnce(&mut [OutgoingDevice]) -> R) -> R {
        self.pause();
        let mut work = lock(&self.shared.work);
        let Some(work) = &mut *work else {
            return f(&mut []);
        };
        let result = f(&mut work.sources);
        work.tell(&self.shared);
        result
    }

    /// One round on the caller's thread, for a VMM that iterates itself. Returns the bytes that it sent.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Misuse`] while the thread runs; the device's; the channels'. PRE_COPY has then failed.
    pub fn iterate(&mut self) -> Result<u64> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        let mut work = lock(&self.shared.work);
        let work = work.as_mut().ok_or_else(|| misuse("PRE_COPY is running"))?;
        work.round(&self.shared).map_err(|error| {
            let error = error.into_public();
            lock(&self.shared.state)
                .failure
                .get_or_insert(error)
                .clone()
        })
    }

    /// Returns how far it is. Never waits.
    #[must_use]
    pub fn progress(&self) -> PrecopyProgress {
        lock(&self.shared.state).progress
    }

    /// Returns why PRE_COPY has failed, if it has. A destination that has closed its channels is seen by the next round.
    #[must_use]
    pub fn failure(&self) -> Option<Error> {
        lock(&self.shared.state).failure.clone()
    }

    /// Whether every device lets the switchover happen: none waits for an ack, or each has sent its initial data and
    /// been answered. As [`OutgoingDevice::is_switchover_ready`].
    #[must_use]
    pub fn is_switchover_ready(&self) -> bool {
        lock(&self.shared.state).complete && self.acks.is_open()
    }

    /// Returns the next control message for the destination, if there is one: to be carried in a request of the VMM's,
    /// whole and in order, to [`Incoming::message`](super::Incoming::message). The next comes when this one has been
    /// [answered](Precopy::acknowledged). Never waits; call it in each of the VMM's own iterations.
    pub fn message(&mut self) -> Option<Vec<u8>> {
        if self.messages.is_settled() {
            let mut state = lock(&self.shared.state);
            let ready = match self.acks.mode() {
                // One for all: nothing may be said of some.
                SwitchoverAck::Once => state.initial.len() == self.asking,
                SwitchoverAck::Off | SwitchoverAck::Reusable => true,
            };
            if ready && !state.initial.is_empty() {
                let initial = mem::take(&mut state.initial);
                self.messages.queue(MessageKind::InitialData, initial);
            }
        }
        self.messages.next()
    }

    /// The destination has answered the last message with success: it has done what the message asked for. For an answer
    /// of failure call [`Precopy::abort`] instead.
    pub fn acknowledged(&mut self) {
        let acks = self.messages.acknowledged();
        for _ in 0..acks {
            self.acks.received();
        }
    }

    /// Returns a handle that cancels, also while the thread waits for the destination. It goes on with
    /// [`Precopy::switch_over`].
    #[must_use]
    pub fn canceller(&self) -> Canceller {
        self.canceller.clone()
    }

    /// Makes what the switchover would make within the downtime: see [`Outgoing::prepare`].
    ///
    /// # Errors
    ///
    /// As for [`Outgoing::prepare`]; [`ErrorKind::Misuse`] while the thread runs.
    pub fn prepare(&self, session: &mut SaveBuilder) -> Result<()> {
        let work = lock(&self.shared.work);
        let work = work.as_ref().ok_or_else(|| misuse("PRE_COPY is running"))?;
        Outgoing::prepare(&work.sources, session)
    }

    /// Switches over, after the VM's processors have stopped: ends the thread, stops the devices behind the P2P barrier
    /// ([`vm::stop`]), and begins to send ([`Outgoing::begin`]). `session` has the settings, and neither devices nor
    /// channels.
    ///
    /// # Errors
    ///
    /// What made PRE_COPY fail; what [`vm::stop`] and [`Outgoing::begin`] say; [`ErrorKind::Misuse`] where a control
    /// message has not been answered. The devices are given back in the state at set-up.
    pub fn switch_over(
        mut self,
        session: SaveBuilder,
    ) -> Result<Outgoing, Failed<Vec<MigratableDevice>>> {
        let Some(Work {
            mut sources,
            channels,
        }) = self.end()
        else {
            let error = Error::new(ErrorKind::Panicked, Phase::Save);
            return Err(Failed::new(error, Vec::new()));
        };
        let failed = self.failure().or_else(|| {
            let settled = self.messages.is_settled();
            (!settled).then(|| misuse("a control message has not been answered"))
        });
        let stopped = failed
            .map_or(Ok(()), Err)
            .and_then(|()| vm::stop(&mut sources, vm::Reason::FinishMigration));
        if let Err(error) = stopped {
            drop(channels);
            let back = sources.into_iter().map(OutgoingDevice::abort);
            return Err(Failed::new(error, back.collect()));
        }
        let mut outgoing = Outgoing::begin(sources, session.greeted_channels(channels))?;
        let mut messages = mem::take(&mut self.messages);
        messages.queue(MessageKind::SwitchoverStart, Vec::new());
        outgoing.set_messages(messages);
        Ok(outgoing)
    }

    /// Aborts the migration: ends the thread, closes the channels, and puts the devices back to the state at set-up.
    #[must_use = "these are the VM's devices"]
    pub fn abort(mut self) -> Vec<MigratableDevice> {
        self.canceller.cancel();
        let work = self.end().into_iter();
        let sources = work.flat_map(|work| work.sources);
        sources.map(OutgoingDevice::abort).collect()
    }

    /// Ends the thread, and takes what it had.
    fn end(&mut self) -> Option<Work> {
        self.pause();
        lock(&self.shared.work).take()
    }
}

fn misuse(what: &'static str) -> Error {
    Error::misuse(Phase::Save, what)
}

impl Drop for Precopy {
    fn drop(&mut self) {
        let running = lock(&self.shared.state).progress.running;
        // Whoever has switched over has taken the work, and the canceller is the switchover's.
        if running || lock(&self.shared.work).is_some() {
            self.canceller.cancel();
        }
        drop(self.end());
    }
}

impl fmt::Debug for Precopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Precopy")
            .field("progress", &self.progress())
            .field("failure", &self.failure())
            .finish_non_exhaustive()
    }
}
