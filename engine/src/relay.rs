//! A relay between a source and a destination. It receives a migration's multifd channels on one side and
//! sends them on the other. Each device's state goes through the engine; everything else passes untouched.
//!
//! ```text
//!   source                            relay                                      destination
//!                  ┌───────────────────────────────────────────────────┐
//!   channel 0 ═════╪═▶ sink 0 ── hello, RAM, SYNC, as they come ─────▶ ╪═▶ channel 0
//!   channel 1 ═════╪═▶ sink 1 ── … ──────────────────────────────────▶ ╪═▶ channel 1
//!                  │      │                                       ▲    │
//!                  │      │ lease, publish at idx                 │ send, recycle
//!                  │      ▼                                       │    │
//!                  │   each device's slots ─▶ sequencer ─▶ queue ─▶ egress 0, 1 …, the first that is free
//!                  │        (by idx)         (next only)  (one sequence)│
//!                  └───────────────────────────────────────────────────┘
//! ```
//!
//! A relay is the load's channel side joined to the save's channel side. It has no device, no data fd and
//! no ring. Three kinds of thread do the work:
//!
//! - An *ingress* thread receives a packet's data into a leased buffer, behind room for headers.
//! - The *sequencer*, in the I/O thread's place, takes each device's next packet and appends it to the
//!   queue.
//! - An *egress* thread sends headers and data from that same buffer.
//!
//! So nothing is copied, and a device's packets leave in the order of their idx. A packet leaves with the
//! name, idx, flags and data with which it came.
//!
//! | who | owns | may touch |
//! |---|---|---|
//! | an ingress thread | the source's connection, its lease cutter | every device's slots, its egress channel's sender |
//! | the sequencer | every device's reader | the slots, the queue |
//! | an egress thread | the packet that it took | the queue, its egress channel's sender |
//! | the main thread | the session | flags |
//!
//! # What a destination relies on
//!
//! - Within a channel, hello, RAM and SYNC packets keep their order: one thread passes them on.
//! - No device packet comes on a channel before that channel's hello and first SYNC.
//! - A packet is sent whole. The ingress and the egress thread of a channel share its sender behind a lock,
//!   which each holds for one packet.
//! - No channel is ended before all device state has gone out, on all channels. Then it stays open until
//!   the destination has closed its side, or for one second.
//!
//! # Memory
//!
//! Packets are held in a pool: the budget. The pool reserves one buffer, of the largest packet's size, for
//! a packet that is the next of its device. The sequencer passes such a packet on at once.
//!
//! RAM shares the channels, and a destination's channel stops at a SYNC until all channels have reached
//! theirs. An egress channel is *ahead* if it has sent more SYNCs than another. Device state goes only on
//! channels that are not ahead (see `relay/egress_channel.rs`). The destination reads those channels,
//! whatever the relay holds. So every packet that is taken is sent, and its memory comes back. However full
//! the pool is, some packet can always pass, if the source
//!
//! - hands out all devices' packets in one sequence, and
//! - sends RAM behind a SYNC only once that SYNC has been sent on all channels.
//!
//! Why this cannot deadlock. Let P be the packet that was handed out first of those not yet received. It is
//! its device's next, so memory is reserved for it. What stands before P on its channel is one of two:
//!
//! - a device packet: it was handed out before P, so by the choice of P it has been received;
//! - RAM behind a SYNC: it waits only for a channel that is stuck on a packet handed out before that SYNC,
//!   so before P: that packet too has been received, and the channel is not stuck.
//!
//! So P passes.
//!
//! A source that breaks one of the two rules (for example, one whose channels were cut and joined anew)
//! needs a budget that holds every packet which arrives before its turn. If the budget is too small the
//! relay can stand still for good. It then ends with [`ErrorKind::Stalled`], and the error names the device
//! and the idx. That takes [`Settings::no_progress`], or a few times that where several waits end one after
//! another.
//!
//! # What ends each wait
//!
//! | who waits | for | ended by |
//! |---|---|---|
//! | an ingress thread | bytes | the source's bytes or its end; within a packet, the connection's time-out |
//! | an ingress thread | memory | a packet that is sent, or taken by the sequencer; the relay's end |
//! | the sequencer | a packet | a packet; the inputs' end; `no_progress`, see below |
//! | an egress thread | a packet that it may send | such a packet; the queue's end |
//! | an egress thread | the destination, in a write | the destination; the connection's time-out |
//! | any thread | an egress channel's sender | the end of the packet that is being sent; the connection's time-out |
//!
//! The clock of [`Settings::no_progress`] runs only while some device's state has not been received and sent
//! whole. With [`Settings::precopy_over_channels`] it runs only while a received packet has not been sent.
//! Every failure hangs up all connections of both sides, which ends every wait.

use std::{
    fmt, io,
    os::fd::{AsFd, BorrowedFd},
};

use crossbeam_epoch::{Collector, Guard};
use vfio_migration_uring::later;

mod egress;
mod egress_channel;
mod ingress;
mod sequencer;

use self::egress_channel::EgressChannel;
use crate::{
    canceller::{Attached, Canceller},
    channel::{Channel, ChannelLimits, Finished, Sender},
    error::{Error, ErrorKind, Phase, Result, Violation},
    first_failure::FirstFailure,
    host::no_budget,
    id::DeviceId,
    memory_plan::Memory,
    reorder::{
        flags::SLACK, pool::Pool, reorder_buffer::ReorderBuffer, send_queue::SendQueue,
        waiters::Waiters,
    },
    router::Router,
    settings::Settings,
    stats::{ChannelCounters, DeviceCounters, SpillStats, Stats},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
        lock,
    },
    tasks::{Task, TaskKind, Tasks, Threads},
    wire,
};

/// One device that passes through: known from its first packet on.
struct RelayDevice {
    id: DeviceId,
    ordinal: u32,
    key: wire::DeviceKey,
    reorder: ReorderBuffer,
    counters: DeviceCounters,
}

impl RelayDevice {
    fn refuse(&self, violation: Violation, index: u32) -> Error {
        Error::protocol(violation)
            .on_device(&self.id)
            .at_index(index)
    }
}

/// What all threads of a relay share.
struct Shared {
    collector: Collector,
    router: Router<RelayDevice>,
    /// By ordinal. Its lock is taken for a device's first packet, and to look for new ones.
    devices: Mutex<Vec<Arc<RelayDevice>>>,
    max_devices: u32,
    settings: Settings,
    pool: Arc<Pool>,
    queue: SendQueue,
    channels: Mutex<Vec<Arc<ChannelCounters>>>,
    /// Ingress threads that wait for room.
    backpressure: Waiters,
    /// The sequencer, which waits for packets.
    arrivals: Waiters,
    /// Egress threads that wait for packets, and for their egress channels to be no longer ahead.
    outgoing: Waiters,
    /// By number.
    egress_channels: Mutex<Vec<Arc<EgressChannel>>>,
    /// Set when the queue has all packets.
    moved: AtomicBool,
    /// How many threads have something to send now, the wait for an egress channel's sender included.
    sending: Arc<AtomicU32>,
    /// Ingress threads that have not ended, and one for those still to come.
    inputs: AtomicU32,
    first_failure: FirstFailure,
}

impl Shared {
    /// Ends everything, for this reason if it is the first. Not from within a look of `Waiters`.
    fn fail(&self, error: Error) {
        if self.first_failure.fail(error) {
            let epoch = self.collector.register();
            self.queue
                .close(&epoch.pin(), |packet| packet.recycle(&self.pool));
            self.backpressure.notify_all();
            self.arrivals.notify_all();
            self.outgoing.notify_all();
        }
    }

    /// Why nothing more should be done, if so.
    fn stopped(&self) -> Option<Error> {
        self.first_failure.failure()
    }

    /// The device of this name: a new one where it is not known yet.
    fn device(&self, idstr: &[u8], instance: u32, guard: &Guard) -> Result<Arc<RelayDevice>> {
        if let Some(device) = self.router.get(idstr, instance, guard) {
            return Ok(device);
        }
        let unknown = || {
            Error::protocol(Violation::UnknownDevice {
                idstr: idstr.escape_ascii().to_string(),
                instance,
            })
        };
        let name = std::str::from_utf8(idstr).map_err(|_| unknown())?;
        let id = DeviceId::new(name, instance).map_err(|_| unknown())?;
        let mut devices = lock(&self.devices);
        if let Some(device) = devices.iter().find(|device| device.id == id) {
            // Another channel was faster.
            return Ok(device.clone());
        }
        // Under the lock, under which the sequencer looks for devices for the last time, once the relay
        // has failed: it closes this one's slots, or this sees that it has.
        if let Some(error) = self.stopped() {
            return Err(error);
        }
        let ordinal = u32::try_from(devices.len()).unwrap_or(u32::MAX);
        if ordinal >= self.max_devices {
            return Err(
                Error::misuse(Phase::Receive, "more devices than max_devices").on_device(&id),
            );
        }
        let device = Arc::new(RelayDevice {
            key: wire::DeviceKey::new(&id),
            id,
            ordinal,
            reorder: ReorderBuffer::new(self.collector.clone(), self.settings.window),
            counters: DeviceCounters::default(),
        });
        let added = self.router.insert(idstr, instance, device.clone(), guard);
        assert!(added, "names are added under the lock alone");
        devices.push(device.clone());
        // The sequencer looks at the devices while it holds the lock of its wait.
        drop(devices);
        self.arrivals.notify_all();
        Ok(device)
    }

    /// Marks one ingress thread as done: it will bring no more packets.
    fn close_input(&self) {
        // Release: whoever sees no input left sees all that was published.
        if self.inputs.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.arrivals.notify_all();
        }
    }

    /// Whether no packet can come any more.
    fn input_ended(&self) -> bool {
        // Acquire: as above.
        self.inputs.load(Ordering::Acquire) == 0
    }

    /// Whether device state may be sent on this egress channel: it is open, and not ahead of another.
    fn may_send(&self, egress_channel: &EgressChannel) -> bool {
        let mine = egress_channel.syncs();
        mine > 0
            && lock(&self.egress_channels)
                .iter()
                .all(|other| other.syncs() >= mine)
    }

    /// Marks the queue as complete. Called by the sequencer.
    fn end_moving(&self) {
        // Release: whoever sees it sees all that was published.
        self.moved.store(true, Ordering::Release);
        self.outgoing.notify_all();
    }

    /// Whether the queue has all packets.
    fn all_moved(&self) -> bool {
        // Acquire: as above.
        self.moved.load(Ordering::Acquire)
    }

    /// Whether something is on its way to the destination: then its connections have time-outs.
    fn is_sending(&self) -> bool {
        // Relaxed: a count; who asks has waited for long, and asks again.
        self.sending.load(Ordering::Relaxed) > 0 || self.queue.waiting() > 0
    }

    /// How many device packets have come, those that wait for room included.
    fn received(&self) -> u64 {
        let channels = lock(&self.channels);
        channels.iter().map(|counters| counters.packets.get()).sum()
    }

    /// Something that changes whenever anything gets on, on any channel.
    fn activity(&self) -> u64 {
        let received = lock(&self.channels).iter().fold(0_u64, |sum, counters| {
            let packets = counters.packets.get() + counters.ram_packets.get();
            sum + packets + counters.syncs.get() + counters.bytes.get()
        });
        let sent = lock(&self.devices)
            .iter()
            .fold(0_u64, |sum, device| sum + device.counters.packets().1);
        received.wrapping_add(sent)
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("pool", &self.pool)
            .field("queue", &self.queue)
            .finish_non_exhaustive()
    }
}

/// How a relay ended.
///
/// The report keeps the destination's channels, whose end the destination has been told. Dropping the report
/// closes them. If everything got through, the drop waits until the destination has ended its side too, for a
/// second at most: closing a channel earlier could lose what the destination has not read yet.
#[derive(Debug)]
#[non_exhaustive]
#[must_use = "says whether everything got through"]
pub struct RelayReport {
    /// The result of the whole relay: the first failure, or the cancellation.
    pub result: Result<()>,
    /// The counters at the end. A device's packets are those that were sent on; a channel's are
    /// those that came in on it.
    pub stats: Stats,
    /// How many threads did not end within the grace time. They were left behind.
    pub abandoned_threads: usize,
    /// To the destination.
    _channels: Finished,
}

/// Builds a [`Relay`].
#[derive(Default)]
#[must_use = "nothing happens before it is started"]
pub struct RelayBuilder {
    settings: Settings,
    threads: Threads,
    canceller: Canceller,
}

impl RelayBuilder {
    /// Replaces all settings.
    pub fn settings(mut self, settings: Settings) -> Self {
        self.settings = settings;
        self
    }

    /// The settings as they are.
    pub const fn settings_mut(&mut self) -> &mut Settings {
        &mut self.settings
    }

    /// Runs each [`Task`] of the relay on a thread of the VMM's. `spawn` is called in
    /// [`start`](Self::start) for the sequencer, and in [`Relay::add_channel`] for a channel's two threads.
    ///
    /// ```
    /// use std::thread;
    /// use vfio_migration::Relay;
    ///
    /// let spawn = |task: vfio_migration::Task| {
    ///     let thread = thread::Builder::new().name(task.thread_name().to_owned());
    ///     thread.spawn(move || task.run()).map(|_its_end_is_told| ())
    /// };
    /// let relay = Relay::builder().spawn_with(spawn).start()?;
    /// // … a channel for each connection of the source's …
    /// relay.join().result?;
    /// # Ok::<(), vfio_migration::Error>(())
    /// ```
    pub fn spawn_with(
        mut self,
        spawn: impl Fn(Task) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        self.threads.spawn_with(spawn);
        self
    }

    /// Ends the relay when `canceller` is cancelled. Without this it has one of its own.
    pub fn cancelled_by(mut self, canceller: &Canceller) -> Self {
        self.canceller = canceller.clone();
        self
    }

    /// Calls `hook` on each thread of the relay before it works: see
    /// [`LoadBuilder::on_thread_start`](crate::LoadBuilder::on_thread_start).
    pub fn on_thread_start(
        mut self,
        hook: impl Fn(&TaskKind) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        self.threads.on_start(hook);
        self
    }

    /// Allocates all memory and starts the sequencer. Add channels as they come.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Misuse`] for impossible settings; [`ErrorKind::Host`] for what the host lacks, or if
    /// `spawn` fails.
    pub fn start(self) -> Result<Relay> {
        Relay::start(self.settings, self.threads, self.canceller)
    }
}

impl fmt::Debug for RelayBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RelayBuilder")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

/// A migration's channels on their way through this process, from a source to a destination.
///
/// Devices need not be named: the relay knows a device from its first packet on, up to
/// [`Settings::max_devices`] of them. It also uses these settings: `budget`, `window`, `max_packet` (the
/// size of
/// the budget's buffers), `precopy_over_channels`, `no_progress`, `hello_timeout` and `grace`. The destination
/// checks the VM's uuid.
///
/// Any thread may call any method.
///
/// ```
/// use std::{io::{Read, Write}, os::unix::net::UnixStream};
/// use vfio_migration::{DeviceId, Relay, wire};
///
/// let (mut source, near) = UnixStream::pair()?;
/// let (far, mut destination) = UnixStream::pair()?;
/// let relay = Relay::builder().start()?;
/// relay.add_channel(near, far)?;
///
/// let key = wire::DeviceKey::new(&DeviceId::new("0000:00:03.0/vfio", 0)?);
/// let mut sent = wire::Hello { uuid: [0; 16], id: 0 }.encode().to_vec();
/// sent.extend(wire::encode_sync(wire::PageSize::new(4096)?, 0));
/// sent.extend(wire::encode_packet(&key, 0, false, 5));
/// sent.extend(b"state");
/// let config = wire::wrap_config(b"config");
/// sent.extend(wire::encode_packet(&key, 1, true, config.len() as u32));
/// sent.extend(config);
/// source.write_all(&sent)?;
/// drop(source);
///
/// relay.join().result?;
/// let mut received = Vec::new();
/// destination.read_to_end(&mut received)?;
/// assert_eq!(received, sent);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Dropping it cancels, and waits as [`Relay::join`] does.
#[must_use = "dropping a relay cancels it"]
pub struct Relay {
    shared: Arc<Shared>,
    tasks: Arc<Tasks>,
    limits: ChannelLimits,
    greeted: Arc<Mutex<Vec<u8>>>,
    complete: AtomicBool,
    budget: usize,
    canceller: Attached,
    joined: bool,
}

impl Relay {
    /// Begins to build one.
    pub fn builder() -> RelayBuilder {
        RelayBuilder::default()
    }

    fn start(settings: Settings, threads: Threads, canceller: Canceller) -> Result<Self> {
        canceller.check_in(Phase::Setup)?;
        let (Memory { budget, pool, .. }, max_devices) = settings.relay_memory()?;
        let collector = Collector::new();
        let shared = Arc::new(Shared {
            router: Router::new(Collector::new()),
            devices: Mutex::new(Vec::new()),
            max_devices,
            settings,
            pool: Arc::new(Pool::new(pool).map_err(no_budget)?),
            queue: SendQueue::new(collector.clone()),
            collector,
            channels: Mutex::new(Vec::new()),
            backpressure: Waiters::new(),
            arrivals: Waiters::new(),
            outgoing: Waiters::new(),
            egress_channels: Mutex::new(Vec::new()),
            moved: AtomicBool::new(false),
            sending: Arc::default(),
            // The one that stands for the channels still to come.
            inputs: AtomicU32::new(1),
            first_failure: FirstFailure::default(),
        });
        let cancelled = shared.clone();
        let relay = Self {
            shared: shared.clone(),
            canceller: canceller.attach(Phase::Receive, move |error| cancelled.fail(error)),
            tasks: Arc::new(Tasks::new(threads)?),
            limits: ChannelLimits::new(&shared.settings, shared.settings.channels),
            greeted: Arc::default(),
            complete: AtomicBool::new(false),
            budget,
            joined: false,
        };
        let tasks = relay.tasks.clone();
        shared.first_failure.add(Box::new(move || tasks.notify()));
        let failing = shared.clone();
        Tasks::spawn(
            &relay.tasks,
            TaskKind::Io,
            "vfio-mig-seq".into(),
            move || sequencer::run(&shared),
            move |error| {
                if let Some(error) = error {
                    failing.fail(error);
                }
            },
        )?;
        Ok(relay)
    }

    /// Adds a channel: the source's connection, and the connection to the destination that carries the channel
    /// on. Two threads serve it. The source's connection may have any page size ([`Channel::with_page_size`]);
    /// its RAM sink is replaced.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Host`] if there is no thread for it; [`ErrorKind::Misuse`] after
    /// [`Relay::no_more_channels`].
    pub fn add_channel(
        &self,
        source: impl Into<Channel>,
        destination: impl Into<Channel>,
    ) -> Result<()> {
        let (source, destination) = (source.into(), destination.into());
        let host = |error| Error::new(ErrorKind::Host, Phase::Setup).caused_by(error);
        let hangups = [
            source.adopt().map_err(host)?,
            destination.adopt().map_err(host)?,
        ];
        let counters = Arc::new(ChannelCounters::default());
        let number = {
            let mut channels = lock(&self.shared.channels);
            // Relaxed: written under the lock.
            if self.complete.load(Ordering::Relaxed) {
                return Err(Error::misuse(
                    Phase::Setup,
                    "a channel after no_more_channels",
                ));
            }
            channels.push(counters.clone());
            // Relaxed: made from an input that is open, the one for those still to come.
            self.shared.inputs.fetch_add(1, Ordering::Relaxed);
            u32::try_from(channels.len() - 1).unwrap_or(u32::MAX)
        };
        // Not before: they keep the connections of a channel that is refused.
        hangups
            .into_iter()
            .for_each(|hangup| self.shared.first_failure.add(hangup));
        let sender = Sender::new(destination, number);
        let egress_channel = Arc::new(EgressChannel::new(
            number,
            sender,
            self.shared.sending.clone(),
        ));
        lock(&self.shared.egress_channels).push(egress_channel.clone());
        self.spawn_egress(egress_channel.clone())?;
        self.spawn_ingress(source, egress_channel, counters)
    }

    fn spawn_ingress(
        &self,
        source: Channel,
        egress_channel: Arc<EgressChannel>,
        counters: Arc<ChannelCounters>,
    ) -> Result<()> {
        let (shared, greeted, limits) = (self.shared.clone(), self.greeted.clone(), self.limits);
        let number = egress_channel.number();
        let ending = self.shared.clone();
        Tasks::spawn(
            &self.tasks,
            TaskKind::Channel(number),
            format!("vfio-mig-in{number}"),
            move || {
                if let Err(error) =
                    ingress::serve(&shared, source, &egress_channel, counters, limits, &greeted)
                {
                    shared.fail(error);
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

    fn spawn_egress(&self, egress_channel: Arc<EgressChannel>) -> Result<()> {
        let (shared, failing) = (self.shared.clone(), self.shared.clone());
        let number = egress_channel.number();
        Tasks::spawn(
            &self.tasks,
            TaskKind::Channel(number),
            format!("vfio-mig-out{number}"),
            move || {
                if let Err(error) = egress::serve(&shared, &egress_channel) {
                    shared.fail(error);
                }
            },
            move |error| {
                if let Some(error) = error {
                    failing.fail(error);
                }
            },
        )
    }

    /// Marks the channels as complete: the relay ends when the existing ones have ended.
    pub fn no_more_channels(&self) {
        let first = {
            let _added_or_not = lock(&self.shared.channels);
            // Relaxed: read under the lock.
            !self.complete.swap(true, Ordering::Relaxed)
        };
        if first {
            self.shared.close_input();
        }
    }

    /// Returns how many channels have come, and how many of them the source has not ended.
    #[must_use]
    pub fn channels(&self) -> (usize, usize) {
        let channels = lock(&self.shared.channels);
        // Relaxed: a count, for a human or a time-out.
        let inputs = self.shared.inputs.load(Ordering::Relaxed) as usize;
        let to_come = usize::from(!self.complete.load(Ordering::Relaxed));
        (channels.len(), inputs.saturating_sub(to_come))
    }

    /// A handle that cancels, also while another thread waits in [`Relay::join`].
    #[must_use]
    pub fn canceller(&self) -> Canceller {
        self.canceller.canceller().clone()
    }

    /// Cancels the relay: hangs up both sides. Returns at once.
    pub fn cancel(&self) {
        self.fail(Error::cancelled(Phase::Receive));
    }

    /// Fails the relay for a reason of the VMM's, for example a broken main channel.
    pub fn fail(&self, error: Error) {
        self.shared.fail(error);
    }

    /// Returns why the relay has failed, if it has.
    #[must_use]
    pub fn failure(&self) -> Option<Error> {
        self.shared.first_failure.failure()
    }

    /// Whether all its threads have ended: after [`Relay::no_more_channels`], or a failure.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.tasks.is_idle()
    }

    /// Returns the counters as they are now.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let devices = lock(&self.shared.devices).clone();
        let channels = lock(&self.shared.channels);
        let (held, high) = self.shared.pool.in_use();
        let layout = self.shared.pool.layout();
        let waiters = [
            &self.shared.backpressure,
            &self.shared.arrivals,
            &self.shared.outgoing,
        ];
        let late: u64 = waiters.iter().map(|waiters| waiters.late()).sum();
        Stats {
            devices: devices
                .iter()
                .map(|device| device.counters.snapshot(&device.id))
                .collect(),
            channels: (0..)
                .zip(&*channels)
                .map(|(at, counters)| counters.snapshot(at))
                .collect(),
            budget: self.budget as u64,
            held: u64::from(held) * layout.buffer_len as u64,
            spill: SpillStats::default(),
            dropped_packets: 0,
            dropped_bytes: 0,
            held_high: (high as usize * layout.buffer_len + layout.reserve_len) as u64,
            backend: "none",
            ring_calls: 0,
            late_wakeups: late + self.tasks.late() + self.shared.queue.late(),
            leaked_transfers: 0,
        }
    }

    /// Waits until every channel has ended and everything has been sent on, or the relay has failed. No channel
    /// can be added any more.
    pub fn join(mut self) -> RelayReport {
        self.end()
    }

    fn end(&mut self) -> RelayReport {
        self.joined = true;
        self.no_more_channels();
        loop {
            let failed_at = self.shared.first_failure.failed_at();
            let deadline = failed_at.map(|at| later(later(at, self.shared.settings.grace), SLACK));
            let look = || {
                let news = self.shared.first_failure.failed_at().is_some() != failed_at.is_some();
                (self.tasks.is_idle() || news).then_some(())
            };
            let found = self.tasks.wait(deadline, look);
            if found.is_none() || self.tasks.is_idle() {
                break;
            }
        }
        let abandoned_threads = self.tasks.join(false);
        self.canceller.retire();
        let result = self.failure().map_or(Ok(()), Err);
        let mut channels = Finished::new(self.tasks.threads().clone());
        if result.is_ok() {
            let egress_channels = std::mem::take(&mut *lock(&self.shared.egress_channels));
            // A task that was left behind may hold one.
            let egress_channels = egress_channels
                .into_iter()
                .filter_map(|it| Arc::try_unwrap(it).ok());
            egress_channels.for_each(|egress_channel| channels.push(egress_channel.into_channel()));
        }
        RelayReport {
            result,
            stats: self.stats(),
            abandoned_threads,
            _channels: channels,
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if !self.joined {
            self.cancel();
            let _report = self.end();
        }
    }
}

impl AsFd for Relay {
    /// An eventfd that becomes readable when a thread has ended or the relay has failed, for an
    /// event loop. Read its 8 bytes, then look at [`Relay::is_finished`] and [`Relay::failure`].
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.tasks.event().as_fd()
    }
}

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relay")
            .field("shared", &self.shared)
            .field("failure", &self.failure())
            .finish_non_exhaustive()
    }
}
