//! The destination: all devices of a VM, from their set-up to the state in which the VM starts.
//!
//! ```text
//!   MigratableDevice… ─ setup() ─▶ Incoming, devices in RESUMING
//!                            │ device(id)?.load_state(body)   for every section of the main channel
//!                            │ switchover_start()             with its command
//!                            ▼
//!                          finish() ─▶ Loaded, devices in RESUMING
//!                            │ vm::start()                    drivers check; the verdict
//!                            ▼
//!                          join() ─▶ MigratableDevice…
//! ```
//!
//! A device that uses the multifd channels belongs to a [`LoadSession`] and its threads. The data and
//! config of any other device come in its sections, and the thread that reads the sections passes them to
//! the device.
//!
//! If both ends have agreed to carry PRE_COPY data over the channels too, a device's loader starts with its
//! SETUP. Before the reading thread approves the switchover, it waits until the counted packets are in the
//! device.
//!
//! One thread reads the main channel. Any other thread may read the counters, add channels, or cancel.
//!
//! # What ends each wait
//!
//! | wait | ended by |
//! |---|---|
//! | `finish` | the session's end, within the session's own times |
//! | a section | the main channel; the device's driver; see `incoming_device.rs` |

use std::{
    fmt, mem,
    sync::OnceLock,
    time::{Duration, Instant},
};

use super::{
    Capabilities, MigratableDevice, SwitchoverAck, at_once,
    incoming_member::{Arrived, Direct, Member, Way, all_stats, trace_cleanup},
    loaded::Loaded,
    members::{MemberSession, take_device},
    messages::Heard,
};
use crate::{
    canceller::Canceller,
    channel::Channel,
    device::{Device, set::for_all},
    error::{Error, ErrorKind, Failed, Phase, Result, Violation},
    id::DeviceId,
    load::{LoadBuilder, LoadSession},
    session::{DeviceSpec, Expected},
    state::{DeviceState, MigrationFlags},
    stats::{DeviceCounters, Stats},
    sync::{Mutex, lock},
    trace,
};

/// Sends [`Reply::SwitchoverAck`](crate::stream::Reply::SwitchoverAck) on the return path: the switchover may
/// happen. The thread that reads the sections calls it.
pub type SendSwitchoverAck = Box<dyn Fn() -> Result<()> + Send + Sync>;

/// What the destination owes the source.
#[derive(Debug)]
pub(super) struct PendingAcks {
    /// Devices that have not said that their initial data is here.
    pub(super) devices: Vec<DeviceId>,
    /// Devices whose PRE_COPY data is to come over the channels, and whose SETUP has not said so.
    pub(super) agreements: Vec<DeviceId>,
    /// A device has said that its initial data is here.
    pub(super) heard: bool,
    /// The switchover has started.
    pub(super) switched: bool,
}

/// All devices of a VM on the destination, while its migration comes in.
///
/// Dropping it cancels the migration: the devices are reset, put back to the state at set-up, and dropped.
#[must_use = "a migration that comes in: finish or abort it"]
pub struct Incoming {
    pub(super) members: Vec<Member>,
    pub(super) session: MemberSession<LoadSession>,
    pub(super) ack: SwitchoverAck,
    pub(super) stop_after_load: bool,
    pub(super) approve: SendSwitchoverAck,
    capabilities: Capabilities,
    /// Where the main channel carries control messages: what has come.
    pub(super) heard: Option<Mutex<Heard>>,
    pub(super) pending_acks: Mutex<PendingAcks>,
}

impl Incoming {
    /// Sets the devices up: all go to RESUMING, all at once. `session` has the channels and the
    /// settings, and no devices; it is not used where no device uses the channels. `approve` is
    /// called where a switchover ack is in use.
    ///
    /// Whether a device's data comes over the multifd channels is decided here, and not changed any
    /// more.
    ///
    /// `session` may name devices that come later ([`LoadBuilder::expect`]): [`Incoming::add_device`] adds each.
    /// Their data comes over the channels.
    ///
    /// # Errors
    ///
    /// A device's refusal; [`ErrorKind::Misuse`] for what cannot work, and two devices of one name;
    /// what [`LoadBuilder::start`] says. The devices are given back in the state that they came in.
    pub fn setup(
        devices: Vec<MigratableDevice>,
        capabilities: &Capabilities,
        session: LoadBuilder,
        approve: SendSwitchoverAck,
    ) -> Result<Self, Failed<Vec<MigratableDevice>>> {
        let mut devices = devices;
        for migratable in &mut devices {
            migratable.device.set_off();
        }
        let mut session = session;
        let canceller = session.canceller();
        let checked = canceller.check_in(Phase::Setup);
        let decided = checked.and_then(|()| decide(&devices, capabilities, &session));
        let multifd = match decided {
            Ok(multifd) => multifd,
            Err(error) => return Err(Failed::new(error, devices)),
        };
        for migratable in &devices {
            trace::migration_state_notifier(migratable.id(), "setup");
        }
        session.lend_threads(devices.iter_mut().map(|migratable| &mut migratable.device));
        let mut both: Vec<_> = devices.iter_mut().zip(&multifd).collect();
        let resume = |(migratable, multifd): &mut (&mut MigratableDevice, &bool)| {
            if **multifd {
                return Ok(Duration::ZERO);
            }
            trace::load_setup(migratable.id());
            let since = Instant::now();
            let before = migratable.state();
            let set = migratable.device.set_state(DeviceState::Resuming, before);
            set.map(|()| since.elapsed())
        };
        let resumed = for_all(&mut both, |(migratable, _)| &mut migratable.device, resume);
        let resumed: Vec<Duration> = match resumed.into_iter().collect() {
            Ok(times) => times,
            Err(error) => {
                for (migratable, _) in devices.iter().zip(multifd).filter(|(_, it)| !it) {
                    trace::load_cleanup(migratable.id());
                }
                give_up(&mut devices);
                return Err(Failed::new(error, devices));
            }
        };
        let expected = session.take_expected();
        let stop_after_load = session.settings_mut().stop_after_load.unwrap_or(false);
        let mut members = Vec::with_capacity(devices.len());
        for (migratable, (multifd, took)) in
            devices.into_iter().zip(multifd.into_iter().zip(resumed))
        {
            let MigratableDevice {
                device, settings, ..
            } = migratable;
            let id = device.id().clone();
            let config_gate = capabilities.config_gate_of(&settings);
            let precopy = device.flags().contains(MigrationFlags::PRE_COPY);
            let counters = DeviceCounters::default();
            let way = if multifd {
                session = session.device(DeviceSpec::under_way(device).config_gate(config_gate));
                Way::Channels
            } else {
                counters.phases.set_state.add_passed(took);
                session = session.not_multifd(id.clone());
                Way::Main(Mutex::new(Direct {
                    device: Some(device),
                    loaded: false,
                }))
            };
            members.push(Member {
                id,
                arrived: OnceLock::from(Arrived { settings, precopy }),
                over_channels: multifd && capabilities.precopy_over_channels,
                config_gate,
                way,
                counters,
            });
        }
        for id in expected {
            let config_gate = capabilities.config_gate();
            session = session.expect_device(Expected {
                id: id.clone(),
                config_gate: Some(config_gate),
                vm_starts: true,
            });
            members.push(Member {
                id,
                arrived: OnceLock::new(),
                over_channels: capabilities.precopy_over_channels,
                config_gate,
                way: Way::Channels,
                counters: DeviceCounters::default(),
            });
        }
        // One that is expected may have PRE_COPY.
        let asking = members
            .iter()
            .filter(|member| member.has_precopy() || member.is_expected());
        let agreeing = members.iter().filter(|member| member.over_channels);
        let pending_acks = PendingAcks {
            devices: asking.map(|member| member.id.clone()).collect(),
            agreements: agreeing.map(|member| member.id.clone()).collect(),
            heard: false,
            switched: false,
        };
        let mut incoming = Self {
            members,
            session: MemberSession::none(&canceller, Phase::Load),
            ack: capabilities.switchover_ack,
            stop_after_load,
            approve,
            capabilities: capabilities.clone(),
            heard: None,
            pending_acks: Mutex::new(pending_acks),
        };
        if !session.is_without_devices() {
            match session.start() {
                Ok(session) => incoming.session.set(session),
                Err(failed) => {
                    let (error, devices) = failed.into_parts();
                    let mut back = incoming.take_back(devices);
                    trace_cleanup(&mem::take(&mut incoming.members));
                    give_up(&mut back);
                    return Err(Failed::new(error, back));
                }
            }
        }
        for member in incoming.members.iter().filter(|it| !it.is_expected()) {
            trace::migration_state_notifier(&member.id, "active");
        }
        Ok(incoming)
    }

    /// The devices, in the order given; those that did not come back are left out.
    fn take_back(&self, devices: Vec<Device>) -> Vec<MigratableDevice> {
        let mut devices = devices;
        self.members
            .iter()
            .filter_map(|member| {
                let device = match &member.way {
                    Way::Channels => take_device(&mut devices, &member.id),
                    Way::Main(direct) => lock(direct).device.take(),
                };
                let settings = member.arrived.get()?.settings.clone();
                Some(MigratableDevice::new(device?, settings))
            })
            .collect()
    }

    /// Returns the session that receives, if any device uses the channels. An event loop can wait on it. It has
    /// the progress, and takes further channels and packets.
    #[must_use]
    pub const fn session(&self) -> Option<&LoadSession> {
        self.session.get()
    }

    /// Adds a device that was expected. Returns when the device is in RESUMING. What has come for it is written into it
    /// once the switchover has started, or at once where PRE_COPY data comes over the channels.
    ///
    /// Blocks for as long as the driver's change of state.
    ///
    /// # Errors
    ///
    /// | error | the migration | the device |
    /// |---|---|---|
    /// | [`ErrorKind::Misuse`]: it is not expected, it was added before, or its settings do not fit the capabilities | goes on | is given back |
    /// | the migration's failure before | has failed | is given back |
    /// | the device's refusal of RESUMING | has failed | comes back with the others, from [`Incoming::finish`] or [`Incoming::abort`] |
    pub fn add_device(
        &self,
        migratable: MigratableDevice,
    ) -> Result<(), Failed<Vec<MigratableDevice>>> {
        let (member, session) = match self.expected_member(&migratable) {
            Ok(found) => found,
            Err(error) => {
                let error = error.on_device(migratable.id());
                return Err(Failed::new(error, vec![migratable]));
            }
        };
        let MigratableDevice {
            mut device,
            settings,
            ..
        } = migratable;
        device.set_off();
        let precopy = device.flags().contains(MigrationFlags::PRE_COPY);
        // Before it can end, so that it comes back whatever happens.
        let _first = member.arrived.set(Arrived { settings, precopy });
        trace::migration_state_notifier(&member.id, "setup");
        let spec = DeviceSpec::under_way(device).config_gate(member.config_gate);
        let added = session.add_device(spec).and_then(|()| {
            trace::migration_state_notifier(&member.id, "active");
            if precopy {
                Ok(())
            } else {
                self.asks_not(member)
            }
        });
        added.map_err(|error| Failed::new(self.session.fail_device(&member.id, error), Vec::new()))
    }

    /// The member of a device that is expected, if this one may be added to it.
    fn expected_member(&self, migratable: &MigratableDevice) -> Result<(&Member, &LoadSession)> {
        let misuse = |what| Error::misuse(Phase::Setup, what);
        if let Some(error) = self.failure() {
            return Err(error);
        }
        let mut expected = self.members.iter().filter(|member| member.is_expected());
        let found = expected.find(|member| member.id == *migratable.id());
        let (Some(member), Some(session)) = (found, self.session.get()) else {
            return Err(misuse("the device is not expected"));
        };
        let settings = &migratable.settings;
        settings.check()?;
        if !self.capabilities.decide(settings.transfer)? {
            return Err(misuse(
                "the data of an expected device comes over the channels",
            ));
        }
        if self.capabilities.config_gate_of(settings) != member.config_gate {
            return Err(misuse(
                "an expected device has the VM's config_after_iterables",
            ));
        }
        Ok((member, session))
    }

    /// An expected device that has come has no initial data: whoever waits for that waits for the others.
    fn asks_not(&self, member: &Member) -> Result<()> {
        let approved = {
            let mut pending_acks = lock(&self.pending_acks);
            pending_acks.devices.retain(|id| *id != member.id);
            self.ack == SwitchoverAck::Once && pending_acks.heard && pending_acks.devices.is_empty()
        };
        if approved { (self.approve)() } else { Ok(()) }
    }

    /// Adds a channel. If no device uses the channels, this only closes the channel.
    ///
    /// # Errors
    ///
    /// As for [`LoadSession::add_channel`].
    pub fn add_channel(&self, channel: impl Into<Channel>) -> Result<()> {
        let channel = channel.into();
        self.session
            .get()
            .map_or(Ok(()), |session| session.add_channel(channel))
    }

    /// Starts the switchover. Call this for the main channel's command SWITCHOVER_START: all iterable data
    /// is in
    /// the devices that use the channels, and from now on the packets of the channels are written to them.
    ///
    /// # Errors
    ///
    /// [`Violation::Section`] on a second call; or, if PRE_COPY data comes over the channels, on a call
    /// before a
    /// device's SETUP. The migration has then failed.
    pub fn switchover_start(&self) -> Result<()> {
        let refused = {
            let mut pending_acks = lock(&self.pending_acks);
            if mem::replace(&mut pending_acks.switched, true) {
                Some(("the switchover starts a second time", None))
            } else {
                let missing = pending_acks.agreements.first().cloned();
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
        if let Some(session) = self.session.get() {
            session.switchover_start();
        }
        Ok(())
    }

    /// Whether the switchover has started.
    pub(super) fn is_switched(&self) -> bool {
        lock(&self.pending_acks).switched
    }

    /// A device's initial data is here: approves the switchover where that was the last that was
    /// missing. Returns whether it was asked for.
    pub(super) fn init_data_sent(&self, member: &Member) -> Result<bool> {
        let approved = {
            let mut pending_acks = lock(&self.pending_acks);
            if !member.has_precopy() || self.ack == SwitchoverAck::Off || pending_acks.switched {
                return Ok(false);
            }
            let first = pending_acks.devices.iter().position(|id| *id == member.id);
            match (self.ack, first) {
                (SwitchoverAck::Once, None) => return Ok(false),
                (_, Some(at)) => {
                    pending_acks.devices.remove(at);
                }
                (_, None) => {}
            }
            pending_acks.heard = true;
            self.ack == SwitchoverAck::Reusable || pending_acks.devices.is_empty()
        };
        if approved {
            (self.approve)()?;
        }
        Ok(true)
    }

    /// Returns a handle that cancels the migration from any thread: that of
    /// [`LoadBuilder::cancelled_by`], if it was given.
    #[must_use]
    pub fn canceller(&self) -> Canceller {
        self.session.canceller()
    }

    /// Cancels the migration. Returns at once; [`Incoming::finish`] puts the devices back.
    pub fn cancel(&self) {
        self.fail(Error::cancelled(Phase::Load));
    }

    /// Fails the migration for a reason of the VMM's, for example a broken main channel. The first reason
    /// counts.
    pub fn fail(&self, error: Error) {
        self.session.fail(error);
    }

    /// Returns why the migration has failed, if it has.
    #[must_use]
    pub fn failure(&self) -> Option<Error> {
        self.session.failure()
    }

    /// Whether every device is loaded, or the migration has failed and its threads have ended.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        let direct = self.failure().is_some() || self.missing().is_none();
        direct && self.session.is_finished()
    }

    /// A device whose config has not come, of those that get it over the main channel.
    fn missing(&self) -> Option<&Member> {
        self.members.iter().find(|member| match &member.way {
            Way::Channels => false,
            Way::Main(direct) => !lock(direct).loaded,
        })
    }

    /// Returns the counters of all devices, as they are now.
    #[must_use]
    pub fn stats(&self) -> Stats {
        all_stats(&self.members, &self.session, &[])
    }

    /// Waits until every device is loaded. This is what the downtime waits for. Call it when the main channel
    /// has been read to its end. The wait ends with the last device, a failure, or the session's time without
    /// progress.
    ///
    /// # Errors
    ///
    /// The failure; [`ErrorKind::Missing`] for a device whose config has not come; [`ErrorKind::Misuse`] for a device that
    /// was expected and has not been added, and before the END of control messages. The devices are given back,
    /// reset, in the state at set-up. The verdict to the source is a failure.
    pub fn finish(mut self) -> Result<Loaded, Failed<Vec<MigratableDevice>>> {
        if self.failure().is_none()
            && let Some(member) = self.missing()
        {
            let error = Error::new(ErrorKind::Missing, Phase::Section);
            self.fail(error.on_device(&member.id));
        }
        if self.session.get().is_some() && !self.is_switched() && self.failure().is_none() {
            self.fail(Error::misuse(Phase::Load, "the switchover has not started"));
        }
        let ended = |heard: &Mutex<Heard>| lock(heard).is_ended();
        if !self.heard.as_ref().is_none_or(ended) && self.failure().is_none() {
            let what = "the source has not said that all has been sent";
            self.fail(Error::misuse(Phase::Load, what));
        }
        let mut devices = Vec::new();
        let mut failure = None;
        if let Some(session) = self.session.get() {
            for report in session.wait_devices() {
                failure = failure.or(report.result.err());
                devices.extend(report.device);
            }
        }
        // The first reason of all is the session's; a device's own is what it made of that.
        let failure = self.failure().or(failure);
        let mut back = self.take_back(devices);
        let session = self.session.leave();
        match failure {
            None => Ok(Loaded {
                devices: back,
                members: mem::take(&mut self.members),
                session,
            }),
            Some(error) => {
                // Ends its threads; the devices are out of it already.
                drop(session);
                trace_cleanup(&mem::take(&mut self.members));
                give_up(&mut back);
                Err(Failed::new(error, back))
            }
        }
    }

    /// Aborts the migration: cleans up, within the grace time, and gives the devices back, reset, in the
    /// state at
    /// set-up.
    #[must_use = "these are the VM's devices"]
    pub fn abort(mut self) -> Vec<MigratableDevice> {
        self.cancel();
        self.end()
    }

    /// Ends what is under way, and gives up what comes back.
    fn end(&mut self) -> Vec<MigratableDevice> {
        let report = self.session.take().map(LoadSession::cleanup);
        let devices = report.into_iter().flat_map(|report| report.devices);
        let mut back = self.take_back(devices.filter_map(|report| report.device).collect());
        trace_cleanup(&mem::take(&mut self.members));
        give_up(&mut back);
        back
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.members.is_empty() {
            self.cancel();
            drop(self.end());
        }
    }
}

/// Devices of a migration that has failed hold another VM's state, or part of it.
fn give_up(devices: &mut [MigratableDevice]) {
    at_once(devices, |migratable| {
        trace::migration_state_notifier(migratable.id(), "failing");
        // The migration's own error is the one to report; what this comes to is the device's duty.
        let _duty = migratable.device.discard_state();
        trace::migration_state_notifier(migratable.id(), "failed");
    });
}

/// Which devices use the channels.
fn decide(
    devices: &[MigratableDevice],
    capabilities: &Capabilities,
    session: &LoadBuilder,
) -> Result<Vec<bool>> {
    let misuse = |what| Error::misuse(Phase::Setup, what);
    if session.device_count() > 0 {
        return Err(misuse("the session's devices are the migration's"));
    }
    if devices.is_empty() && session.is_without_devices() {
        return Err(misuse("a migration has a device"));
    }
    capabilities.prepare()?;
    if !session.is_without_devices() && !capabilities.can_carry() {
        return Err(misuse(
            "the data of an expected device comes over the channels",
        ));
    }
    let mut multifd = Vec::with_capacity(devices.len());
    for (at, migratable) in devices.iter().enumerate() {
        let id = migratable.id();
        if devices[..at].iter().any(|other| other.id() == id) {
            return Err(Error::two_devices_named(id));
        }
        let checked = migratable.settings.check();
        let decided = checked.and_then(|()| capabilities.decide(migratable.settings.transfer));
        multifd.push(decided.map_err(|error| error.on_device(id))?);
    }
    Ok(multifd)
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming")
            .field("session", &self.session.get())
            .field("failure", &self.failure())
            .finish_non_exhaustive()
    }
}
