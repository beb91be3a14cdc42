//! The destination: all devices of a VM, from their set-up to the state that the VM starts with.
//!
//! ```text
//!   Realized… ─ setup() ─▶ Incoming, devices in RESUMING
//!                            │ device(id)?.load_state(body)   for every section of the main channel
//!                            │ switchover_start()             with its command
//!                            ▼
//!                          finish() ─▶ Loaded, devices in RESUMING
//!                            │ vm::start()                    drivers check; the verdict
//!                            ▼
//!                          join() ─▶ Realized…
//! ```
//!
//! Devices that use the multifd channels belong to a [`LoadSession`] and its threads; of the others
//! data and config come in their sections, and go to the device on the thread that reads those.
//! Where both ends have agreed to carry PRE_COPY data over the channels too, a device's loader starts
//! with its SETUP, and the thread that reads the sections waits, before it approves the switchover,
//! until the packets that were counted are in the device.
//!
//! That one thread reads the main channel; any other may look at the counters, add channels, or
//! cancel. `finish` waits for the session, which its own times bound; the sections' reader waits as
//! the main channel and the devices' drivers do.

use std::{
    fmt,
    io::Read,
    sync::OnceLock,
    time::{Duration, Instant},
};

use nix::errno::Errno;

use super::{Ack, DeviceSettings, Failed, Realized, Terms, at_once};
use crate::{
    channel::Channel,
    device::{Device, Recover, set::for_all},
    error::{Error, ErrorKind, Phase, Result, Violation},
    id::DeviceId,
    section::{Piece, SectionSink, Tag, load_state},
    session::{LoadBuilder, LoadSession, NotStarted},
    state::{DeviceState, MigrationFlags},
    stats::{DeviceCounters, Stats},
    sync::{Mutex, lock},
    trace,
};

/// Says on the return path that the switchover may happen:
/// [`Reply::SwitchoverAck`](crate::stream::Reply::SwitchoverAck). Called by the thread that reads
/// the sections.
pub type Approve = Box<dyn Fn() -> Result<()> + Send + Sync>;

/// How a device's data comes.
enum Way {
    /// Over the channels: the session has it.
    Channels,
    /// Over the main channel.
    Main(Mutex<Direct>),
}

/// A device whose data comes over the main channel.
struct Direct {
    /// Until it is given back.
    device: Option<Device>,
    /// Whether its config has come: the last of it.
    loaded: bool,
}

struct Member {
    id: DeviceId,
    settings: DeviceSettings,
    precopy: bool,
    /// Whether its PRE_COPY data comes over the channels too.
    over_channels: bool,
    /// Whether its config waits for its notice, where it comes over the channels.
    config_waits: bool,
    way: Way,
    counters: DeviceCounters,
}

/// What the destination owes the source.
#[derive(Debug)]
struct Owed {
    /// Devices that have not said that their initial data is here.
    devices: Vec<DeviceId>,
    /// Devices whose PRE_COPY data is to come over the channels, and whose SETUP has not said so.
    agreements: Vec<DeviceId>,
    /// The switchover has started.
    switched: bool,
}

/// All devices of a VM on the destination, while its migration comes in.
///
/// Dropping it cancels; the devices are reset then, put back to the state at set-up, and dropped.
#[must_use = "a migration that comes in: finish or abort it"]
pub struct Incoming {
    members: Vec<Member>,
    session: Option<LoadSession>,
    ack: Ack,
    stop_after_load: bool,
    approve: Approve,
    owed: Mutex<Owed>,
    failure: OnceLock<Error>,
}

impl Incoming {
    /// Sets the devices up: all go to RESUMING, all at once. `session` has the channels and the
    /// settings, and no devices; it is not used where no device uses the channels. `approve` is
    /// called where a switchover ack is in use.
    ///
    /// Whether a device's data comes over the multifd channels is decided here, and not changed any
    /// more.
    ///
    /// # Errors
    ///
    /// A device's refusal; [`ErrorKind::Config`] for what cannot work, and two devices of one name;
    /// what [`LoadBuilder::start`] says. The devices are given back in the state that they came in.
    pub fn setup(
        devices: Vec<Realized>,
        terms: &Terms,
        session: LoadBuilder,
        approve: Approve,
    ) -> Result<Self, Failed<Vec<Realized>>> {
        let mut devices = devices;
        for realized in &mut devices {
            realized.device.set_off();
        }
        let multifd = match decide(&devices, terms, &session) {
            Ok(multifd) => multifd,
            Err(error) => return Err(Failed::new(error, devices)),
        };
        session.lend_spawner(devices.iter_mut().map(|realized| &mut realized.device));
        let mut both: Vec<_> = devices.iter_mut().zip(&multifd).collect();
        let resume = |(realized, multifd): &mut (&mut Realized, &bool)| {
            if **multifd {
                return Ok(Duration::ZERO);
            }
            trace::load_setup(realized.id());
            let since = Instant::now();
            let before = realized.state();
            let set = realized.device.set_state(DeviceState::Resuming, before);
            set.map(|()| since.elapsed())
        };
        let resumed = for_all(&mut both, |(realized, _)| &mut realized.device, resume);
        let resumed: Vec<Duration> = match resumed.into_iter().collect() {
            Ok(times) => times,
            Err(error) => {
                give_up(&mut devices);
                return Err(Failed::new(error, devices));
            }
        };
        let mut session = session;
        let stop_after_load = session.settings_mut().stop_after_load.unwrap_or(false);
        session.settings_mut().stop_after_load = Some(stop_after_load);
        session.settings_mut().config_after_iterables = terms.config_waits();
        let mut members = Vec::with_capacity(devices.len());
        for (realized, (multifd, took)) in devices.into_iter().zip(multifd.into_iter().zip(resumed))
        {
            let Realized {
                mut device,
                settings,
                ..
            } = realized;
            let id = device.id().clone();
            let config_waits = terms.config_of(&settings);
            device.set_config_after_iterables(Some(config_waits));
            let precopy = device.flags().contains(MigrationFlags::PRE_COPY);
            let counters = DeviceCounters::default();
            let way = if multifd {
                session = session.device(device);
                Way::Channels
            } else {
                counters.phases.set_state.add_time(took);
                session = session.not_multifd(id.clone());
                Way::Main(Mutex::new(Direct {
                    device: Some(device),
                    loaded: false,
                }))
            };
            members.push(Member {
                id,
                settings,
                precopy,
                over_channels: multifd && terms.precopy_over_channels,
                config_waits,
                way,
                counters,
            });
        }
        let asking = members.iter().filter(|member| member.precopy);
        let agreeing = members.iter().filter(|member| member.over_channels);
        let owed = Owed {
            devices: asking.map(|member| member.id.clone()).collect(),
            agreements: agreeing.map(|member| member.id.clone()).collect(),
            switched: false,
        };
        let mut incoming = Self {
            members,
            session: None,
            ack: terms.switchover_ack,
            stop_after_load,
            approve,
            owed: Mutex::new(owed),
            failure: OnceLock::new(),
        };
        if session.device_count() > 0 {
            match session.try_start() {
                Ok(session) => incoming.session = Some(session),
                Err(NotStarted { error, devices, .. }) => {
                    let mut back = incoming.take_back(devices);
                    give_up(&mut back);
                    return Err(Failed::new(error, back));
                }
            }
        }
        Ok(incoming)
    }

    /// The devices, in the order given; those that did not come back are left out.
    fn take_back(&self, devices: Vec<Device>) -> Vec<Realized> {
        let mut devices: Vec<_> = devices.into_iter().map(Some).collect();
        let mut take = |id: &DeviceId| {
            let is_it = |device: &&mut Option<Device>| {
                device.as_ref().is_some_and(|device| device.id() == id)
            };
            devices.iter_mut().find(is_it).and_then(Option::take)
        };
        self.members
            .iter()
            .filter_map(|member| {
                let device = match &member.way {
                    Way::Channels => take(&member.id),
                    Way::Main(direct) => lock(direct).device.take(),
                };
                let mut device = device?;
                device.set_config_after_iterables(None);
                Some(Realized::new(device, member.settings.clone()))
            })
            .collect()
    }

    /// One of its devices, to whom a section of the main channel belongs. Whether the section may
    /// stand there is for [`MainChannelOrder`](crate::stream::MainChannelOrder) to say.
    ///
    /// # Errors
    ///
    /// [`Violation::UnknownDevice`].
    pub fn device(&self, id: &DeviceId) -> Result<Destination<'_>> {
        let found = self.members.iter().find(|member| member.id == *id);
        let member = found.ok_or_else(|| {
            let violation = Violation::UnknownDevice {
                idstr: id.idstr().to_owned(),
                instance: id.instance(),
            };
            Error::protocol(violation).in_phase(Phase::Section)
        })?;
        Ok(Destination {
            incoming: self,
            member,
        })
    }

    /// The session that receives, where any device uses the channels: an event loop waits on it, it
    /// has the progress, and channels and packets may be added.
    #[must_use]
    pub const fn session(&self) -> Option<&LoadSession> {
        self.session.as_ref()
    }

    /// Adds a channel. Without effect, and the channel is closed, where no device uses any.
    ///
    /// # Errors
    ///
    /// As for [`LoadSession::add_channel`].
    pub fn add_channel(&self, channel: impl Into<Channel>) -> Result<()> {
        let channel = channel.into();
        self.session
            .as_ref()
            .map_or(Ok(()), |session| session.add_channel(channel))
    }

    /// The main channel says that the switchover starts: all iterable data of the devices that use
    /// the channels is in them, and what has come over those is written.
    ///
    /// # Errors
    ///
    /// [`Violation::Section`] the second time, and before a device's SETUP where PRE_COPY data is to
    /// come over the channels. The migration has failed then.
    pub fn switchover_start(&self) -> Result<()> {
        let refused = {
            let mut owed = lock(&self.owed);
            if std::mem::replace(&mut owed.switched, true) {
                Some(("the switchover starts a second time", None))
            } else {
                let missing = owed.agreements.first().cloned();
                missing.map(|id| ("the switchover starts before a device's SETUP", Some(id)))
            }
        };
        if let Some((what, device)) = refused {
            let error = Error::protocol(Violation::Section(what)).in_phase(Phase::Section);
            let error = match &device {
                Some(id) => error.on_device(id),
                None => error,
            };
            self.fail(error.clone());
            return Err(error);
        }
        if let Some(session) = &self.session {
            session.switchover_start();
        }
        Ok(())
    }

    /// Whether the switchover has started.
    fn is_switched(&self) -> bool {
        lock(&self.owed).switched
    }

    /// A device's initial data is here: approves the switchover where that was the last that was
    /// missing. Returns whether it was asked for.
    fn init_data_sent(&self, member: &Member) -> Result<bool> {
        let approved = {
            let mut owed = lock(&self.owed);
            if !member.precopy || self.ack == Ack::Off || owed.switched {
                return Ok(false);
            }
            let first = owed.devices.iter().position(|id| *id == member.id);
            match (self.ack, first) {
                (Ack::Once, None) => return Ok(false),
                (_, Some(at)) => {
                    owed.devices.remove(at);
                }
                (_, None) => {}
            }
            self.ack == Ack::Reusable || owed.devices.is_empty()
        };
        if approved {
            (self.approve)()?;
        }
        Ok(true)
    }

    /// Cancels. Returns at once; [`Incoming::finish`] puts the devices back.
    pub fn cancel(&self) {
        self.fail(Error::cancelled(Phase::Load));
    }

    /// Fails it for a reason of the embedder's: its main channel's, say. The first reason counts.
    pub fn fail(&self, error: Error) {
        // One place for the first reason: the session's, where there is one.
        match &self.session {
            Some(session) => session.fail(error),
            None => {
                let _first = self.failure.get_or_init(|| error);
            }
        }
    }

    /// Why it has failed, once it has.
    #[must_use]
    pub fn failure(&self) -> Option<Error> {
        match &self.session {
            Some(session) => session.failure(),
            None => self.failure.get().cloned(),
        }
    }

    /// Whether every device is loaded, or it has failed and its threads have ended.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        let direct = self.failure().is_some() || self.missing().is_none();
        direct && self.session.as_ref().is_none_or(LoadSession::is_finished)
    }

    /// A device whose config has not come, of those that get it over the main channel.
    fn missing(&self) -> Option<&Member> {
        self.members.iter().find(|member| match &member.way {
            Way::Channels => false,
            Way::Main(direct) => !lock(direct).loaded,
        })
    }

    /// The counters as they are, of all devices.
    #[must_use]
    pub fn stats(&self) -> Stats {
        merge(&self.members, self.session.as_ref(), &[])
    }

    /// Waits until every device is loaded: what downtime waits for. The main channel has been read.
    /// Ends with the last device, a failure, or the session's time without progress.
    ///
    /// # Errors
    ///
    /// What has failed; [`ErrorKind::Missing`] for a device whose config has not come. The devices
    /// are given back, reset, in the state at set-up. The verdict to the source is that it has failed.
    pub fn finish(mut self) -> Result<Loaded, Failed<Vec<Realized>>> {
        if self.failure().is_none()
            && let Some(member) = self.missing()
        {
            let error = Error::new(ErrorKind::Missing, Phase::Section);
            self.fail(error.on_device(&member.id));
        }
        if self.session.is_some() && !self.is_switched() && self.failure().is_none() {
            let kind = ErrorKind::Config("the switchover has not started");
            self.fail(Error::new(kind, Phase::Load));
        }
        let mut devices = Vec::new();
        let mut failure = None;
        if let Some(session) = &self.session {
            for report in session.wait_devices() {
                failure = failure.or(report.result.err());
                devices.extend(report.device);
            }
        }
        // The first reason of all is the session's; a device's own is what it made of that.
        let failure = self.failure().or(failure);
        let mut back = self.take_back(devices);
        let session = self.session.take();
        match failure {
            None => Ok(Loaded {
                devices: back,
                members: std::mem::take(&mut self.members),
                session,
            }),
            Some(error) => {
                // Ends its threads; the devices are out of it already.
                drop(session);
                give_up(&mut back);
                Err(Failed::new(error, back))
            }
        }
    }

    /// The migration is off: cleans up, within the grace time, and gives the devices back, reset, in
    /// the state at set-up.
    #[must_use = "these are the VM's devices"]
    pub fn abort(mut self) -> Vec<Realized> {
        self.cancel();
        for member in &self.members {
            if let Way::Main(_) = member.way {
                trace::load_cleanup(&member.id);
            }
        }
        let report = self.session.take().map(LoadSession::cleanup);
        let devices = report.into_iter().flat_map(|report| report.devices);
        let mut back = self.take_back(devices.filter_map(|report| report.device).collect());
        give_up(&mut back);
        back
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            drop(session);
        }
        give_up(&mut self.take_back(Vec::new()));
    }
}

/// Devices of a migration that has failed hold another VM's state, or part of it.
fn give_up(devices: &mut [Realized]) {
    at_once(devices, |realized| {
        // The migration's own error is the one to report; what this comes to is the device's duty.
        let _duty = realized.device.forget();
    });
}

/// Which devices use the channels.
fn decide(devices: &[Realized], terms: &Terms, session: &LoadBuilder) -> Result<Vec<bool>> {
    let misuse = |what| Error::new(ErrorKind::Config(what), Phase::Setup);
    if session.device_count() > 0 {
        return Err(misuse("the session's devices are the migration's"));
    }
    if devices.is_empty() {
        return Err(misuse("a migration has a device"));
    }
    terms.prepare()?;
    let mut multifd = Vec::with_capacity(devices.len());
    for (at, realized) in devices.iter().enumerate() {
        let id = realized.id();
        if devices[..at].iter().any(|other| other.id() == id) {
            return Err(misuse("two devices of one name").on_device(id));
        }
        let checked = realized.settings.check();
        let decided = checked.and_then(|()| terms.decide(realized.settings.transfer));
        multifd.push(decided.map_err(|error| error.on_device(id))?);
    }
    Ok(multifd)
}

/// The counters of all devices: the session's, and what it does not know. `started` are those that
/// may have been started since.
fn merge(members: &[Member], session: Option<&LoadSession>, started: &[Realized]) -> Stats {
    let stats = session.map(LoadSession::stats);
    let mut stats = stats.unwrap_or_else(Stats::main_channel_alone);
    let of_session = std::mem::take(&mut stats.devices);
    stats.devices = members
        .iter()
        .map(|member| {
            let known = of_session.iter().find(|stats| stats.device == member.id);
            let mut stats = known
                .cloned()
                .unwrap_or_else(|| member.counters.snapshot(&member.id));
            let took = started.iter().find(|realized| *realized.id() == member.id);
            stats.phases.resume += took.map_or(Duration::ZERO, |realized| realized.took);
            stats
        })
        .collect();
    stats
}

/// One device's migration on the destination.
#[derive(Clone, Copy)]
pub struct Destination<'a> {
    incoming: &'a Incoming,
    member: &'a Member,
}

impl Destination<'_> {
    /// The device's name.
    #[must_use]
    pub const fn id(&self) -> &DeviceId {
        &self.member.id
    }

    /// Whether its data comes over the multifd channels.
    #[must_use]
    pub const fn uses_multifd(&self) -> bool {
        matches!(self.member.way, Way::Channels)
    }

    /// Loads the body of one of the device's sections, up to the tag that ends it and not a byte
    /// more. Blocks as `body` and the device's driver do.
    ///
    /// # Errors
    ///
    /// As for [`load_state`]; the device's. The migration has failed then. Where it had failed
    /// before, that reason, whichever device's it is.
    pub fn load_state<R: Read + ?Sized>(&self, body: &mut R) -> Result<Piece> {
        let loaded = self.load(body);
        loaded.map_err(|error| {
            // The migration's first reason may be another device's, or no device's at all.
            self.incoming.failure().unwrap_or_else(|| {
                let error = error.on_device(&self.member.id);
                self.incoming.fail(error.clone());
                error
            })
        })
    }

    fn load<R: Read + ?Sized>(&self, body: &mut R) -> Result<Piece> {
        if let Some(error) = self.incoming.failure() {
            return Err(error);
        }
        let Way::Main(direct) = &self.member.way else {
            let mut sink = Sink {
                incoming: self.incoming,
                member: self.member,
                direct: None,
                sent: None,
            };
            return load_state(body, &mut sink);
        };
        let mut direct = lock(direct);
        let mut sink = Sink {
            incoming: self.incoming,
            member: self.member,
            direct: Some(&mut direct),
            sent: None,
        };
        let piece = load_state(body, &mut sink)?;
        if piece.end == Tag::Config {
            if self.incoming.stop_after_load {
                let since = Instant::now();
                let device = direct.device.as_mut().ok_or_else(given_back)?;
                device.set_state(DeviceState::Stop, Recover::Reset)?;
                self.member.counters.phases.resume.add_time(since.elapsed());
            }
            direct.loaded = true;
        }
        Ok(piece)
    }
}

fn given_back() -> Error {
    let kind = ErrorKind::Config("the device has been given back");
    Error::new(kind, Phase::Section)
}

impl fmt::Debug for Destination<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Destination")
            .field("id", self.id())
            .field("uses_multifd", &self.uses_multifd())
            .finish_non_exhaustive()
    }
}

/// A device's sections, on their way to it.
struct Sink<'a> {
    incoming: &'a Incoming,
    member: &'a Member,
    direct: Option<&'a mut Direct>,
    /// How many packets of PRE_COPY data were said to have been sent.
    sent: Option<u32>,
}

impl Sink<'_> {
    fn refuse(&self, tag: Tag) -> Error {
        let violation = Violation::SectionTag(tag.value());
        Error::protocol(violation)
            .in_phase(Phase::Section)
            .on_device(&self.member.id)
    }
}

impl SectionSink for Sink<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let refused = self.refuse(Tag::Data);
        if self.member.over_channels {
            return Err(refused);
        }
        let switched = self.incoming.is_switched();
        let Some(direct) = &mut self.direct else {
            let session = self.incoming.session.as_ref();
            return match session.filter(|_| !switched) {
                Some(session) => session.write_iterable(&self.member.id, bytes),
                // From here on its data comes over the channels.
                None => Err(refused),
            };
        };
        if direct.loaded {
            return Err(refused);
        }
        let device = direct.device.as_mut().ok_or_else(given_back)?;
        let since = Instant::now();
        let written = device.write_resuming(bytes);
        let counters = &self.member.counters;
        if switched {
            counters.phases.write.add_time(since.elapsed());
        }
        let ret = written.as_ref().map_or_else(
            |error| -error.raw_os_error().unwrap_or(Errno::EINVAL as i32),
            |()| 0,
        );
        trace::load_state_device_data(&self.member.id, bytes.len() as u64, ret);
        written?;
        counters.main_bytes.add(bytes.len() as u64);
        Ok(())
    }

    fn config(&mut self, input: &mut dyn Read) -> Result<()> {
        let refused = self.refuse(Tag::Config);
        // Over the channels it is the last packet.
        let Some(direct) = self.direct.as_mut().filter(|direct| !direct.loaded) else {
            return Err(refused);
        };
        let device = direct.device.as_mut().ok_or_else(given_back)?;
        let since = Instant::now();
        device.load_config(input)?;
        self.member.counters.phases.config.add_time(since.elapsed());
        Ok(())
    }

    fn setup(&mut self, over_channels: bool) -> Result<bool> {
        let session = self.incoming.session.as_ref();
        match (over_channels, self.member.over_channels, session) {
            (false, false, _) => Ok(true),
            (true, true, Some(session)) => {
                let id = &self.member.id;
                session.start_early(id)?;
                lock(&self.incoming.owed)
                    .agreements
                    .retain(|other| other != id);
                Ok(true)
            }
            _ => {
                let violation = Violation::PrecopyOverChannels {
                    here: !over_channels,
                };
                Err(Error::protocol(violation).in_phase(Phase::Section))
            }
        }
    }

    fn precopy_sent(&mut self, count: u32) -> Result<bool> {
        self.sent = Some(count);
        Ok(self.member.over_channels)
    }

    fn init_data_sent(&mut self) -> Result<bool> {
        if self.member.over_channels {
            if !self.member.precopy || self.incoming.ack == Ack::Off || self.incoming.is_switched()
            {
                return Ok(false);
            }
            let session = self.incoming.session.as_ref();
            let (Some(count), Some(session)) = (self.sent, session) else {
                return Ok(false);
            };
            session.wait_written(&self.member.id, count)?;
        }
        self.incoming.init_data_sent(self.member)
    }

    fn config_load_ready(&mut self) -> Result<bool> {
        match &self.incoming.session {
            Some(session) if self.direct.is_none() => {
                if !self.member.config_waits {
                    let violation = Violation::ConfigAfterIterables { here: false };
                    return Err(Error::protocol(violation).in_phase(Phase::Section));
                }
                session.config_load_ready(&self.member.id).map(|()| true)
            }
            _ => Ok(false),
        }
    }

    fn on_tag(&mut self, tag: Tag, _data_len: u64) {
        trace::load_state(&self.member.id, tag.value());
    }
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming")
            .field("session", &self.session)
            .field("failure", &self.failure())
            .finish_non_exhaustive()
    }
}

/// All devices of a VM on the destination, loaded, in RESUMING: the VM may start.
///
/// The first step of [`vm::start`](super::vm::start) has each driver check what was loaded, unless
/// [`Settings::stop_after_load`](crate::Settings) had it check before: then the devices are in STOP.
/// So the source is told that all is loaded after the start, and told that it failed where the start
/// does: every device is reset and stopped then. A VM that stands is not started: there the drivers
/// check before, the source is told after [`Incoming::finish`], and [`Loaded::join`] comes next.
///
/// Dropping it before the VM has started resets and stops the devices, as [`Loaded::abort`] does.
#[must_use = "it holds the VM's devices"]
pub struct Loaded {
    devices: Vec<Realized>,
    members: Vec<Member>,
    session: Option<LoadSession>,
}

impl Loaded {
    /// The devices, for [`vm::start`](super::vm::start).
    pub fn devices_mut(&mut self) -> &mut [Realized] {
        &mut self.devices
    }

    /// The counters as they are; with what the VM's start has taken, once it has been.
    #[must_use]
    pub fn stats(&self) -> Stats {
        merge(&self.members, self.session.as_ref(), &self.devices)
    }

    /// Waits for the channels' end, which a source may make only when it knows that all is loaded,
    /// and gives the devices back. Ends with that, or with the session's time without progress.
    ///
    /// Devices in STOP, of a VM that stands, are the VM's from then on as if it had started: their
    /// drivers have checked them, and nobody else has its state. A later start that fails resets
    /// those that refuse, and no other.
    ///
    /// # Errors
    ///
    /// What a channel has failed with since. The devices are loaded nevertheless, and come along.
    pub fn join(mut self) -> Result<Vec<Realized>, Failed<Vec<Realized>>> {
        let result = self
            .session
            .take()
            .map_or(Ok(()), |session| session.join().result);
        let mut devices = std::mem::take(&mut self.devices);
        for realized in &mut devices {
            if realized.state() == DeviceState::Stop {
                realized.device.has_arrived();
            }
        }
        match result {
            Ok(()) => Ok(devices),
            Err(error) => Err(Failed::new(error, devices)),
        }
    }

    /// The VM does not run here after all: the devices are reset and stopped, those that have started
    /// too, so that nothing of what was loaded is left in them. The verdict to the source is that it
    /// has failed.
    #[must_use = "these are the VM's devices"]
    pub fn abort(mut self) -> Vec<Realized> {
        for realized in &mut self.devices {
            realized.device.has_not_arrived();
        }
        self.give_up();
        std::mem::take(&mut self.devices)
    }

    fn give_up(&mut self) {
        // Ends its threads; the devices are out of it already.
        drop(self.session.take());
        at_once(&mut self.devices, |realized| {
            if realized.device.is_arriving() {
                // What this comes to is the device's duty.
                let _duty = realized.device.retire();
            }
        });
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        self.give_up();
    }
}

impl fmt::Debug for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loaded")
            .field("devices", &self.devices)
            .finish_non_exhaustive()
    }
}
