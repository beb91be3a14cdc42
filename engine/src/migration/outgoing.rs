//! The source's switchover: all devices of a VM, from the decision to the last byte sent.
//!
//! ```text
//!   vm::stop ─▶ begin() ─▶ STOP_COPY ─┬─ multifd: a SaveSession reads and sends, on its threads
//!                                     └─ without: write_state() and write_config() do, on the caller's
//!               for each device, in the main channel's order:
//!               write_state()  END section    write_config()  FULL section
//!            ─▶ finish() ─▶ Saved, and the main channel's end may be written
//! ```
//!
//! The caller's thread writes the sections. Meanwhile the session's threads move the bytes of the devices
//! that use the channels; the section of such a device only says so. `finish` waits for the session's end,
//! within the session's own times.

use std::{fmt, io::Write, time::Instant};

use super::{
    DeviceSettings, MigratableDevice, Off, OutgoingDevice, Saved, at_once,
    members::{MemberSession, merge, take_device},
    messages::Messages,
    put_all_back,
};
use crate::{
    canceller::Canceller,
    channel::Finished,
    device::Device,
    error::{Error, ErrorKind, Failed, Phase, Refusal, Result},
    host::Growing,
    id::DeviceId,
    save::{SaveBuilder, SaveSession},
    section,
    session::DeviceSpec,
    settings::ConfigGate,
    state::{DeviceState, MigrationFlags},
    stats::{DeviceCounters, Stats},
    trace,
};

/// How far a device's sections are.
#[derive(Clone, Copy, Debug, Eq, PartialEq, PartialOrd)]
enum Step {
    Begun,
    Completed,
    Configured,
}

/// Where a device's data goes.
enum Way {
    /// Over the channels: the session has it.
    Channels {
        settings: DeviceSettings,
        counters: Box<DeviceCounters>,
    },
    /// Over the main channel.
    Main(Box<OutgoingDevice>),
}

struct Member {
    id: DeviceId,
    way: Way,
    step: Step,
    config_gate: ConfigGate,
}

impl Member {
    const fn counters(&self) -> &DeviceCounters {
        match &self.way {
            Way::Channels { counters, .. } => counters,
            Way::Main(source) => &source.counters,
        }
    }
}

/// All devices of a VM on the source, once it has stopped.
///
/// Dropping it cancels the switchover: the devices are put back to the state at set-up, and dropped.
#[must_use = "a switchover under way: finish or abort it"]
pub struct Outgoing {
    members: Vec<Member>,
    session: MemberSession<SaveSession>,
    /// Where the main channel carries control messages.
    messages: Option<Messages>,
}

impl Outgoing {
    /// Makes what [`Outgoing::begin`] would make within the downtime, memory most of all: to be called with
    /// the same devices and the same session before the VM stops. See [`SaveBuilder::prepare`].
    ///
    /// # Errors
    ///
    /// What [`SaveBuilder::prepare`] says. The migration may go on.
    pub fn prepare(sources: &[OutgoingDevice], session: &mut SaveBuilder) -> Result<()> {
        let over_channels = || sources.iter().filter(|source| source.multifd);
        match over_channels().map(|source| source.buffer.len()).max() {
            Some(largest) => session.prepare(over_channels().count(), largest),
            None => Ok(()),
        }
    }

    /// Begins. All devices go to STOP_COPY where they are not there, all at once, and those that
    /// use the multifd channels are read from and sent from now on. `session` has the channels, which
    /// were greeted at the set-up ([`SaveBuilder::greeted_channels`]), and the settings, and no devices;
    /// it is not used where no device uses the channels.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Misuse`]: no device, channels that have not been greeted, several without P2P,
    /// a switchover ack that has not come, a device whose session has ended since it was iterated;
    /// what [`SaveBuilder::start`] says. The devices are given back in the
    /// state at set-up.
    pub fn begin(
        sources: Vec<OutgoingDevice>,
        session: SaveBuilder,
    ) -> Result<Self, Failed<Vec<MigratableDevice>>> {
        let failed = |error: Error, sources: Vec<OutgoingDevice>| {
            let mut back: Vec<_> = sources
                .into_iter()
                .map(OutgoingDevice::into_migratable)
                .collect();
            put_all_back(&mut back, Off::by(&error));
            Err(Failed::new(error, back))
        };
        let (mut sources, mut session) = (sources, session);
        let canceller = session.canceller();
        let checked = canceller.check_in(Phase::Save);
        if let Err(error) = checked.and_then(|()| check(&sources, &session)) {
            return failed(error, sources);
        }
        for source in &sources {
            trace::migration_state_notifier(source.id(), "device");
            source.trace_last();
        }
        session.lend_threads(sources.iter_mut().map(|source| &mut *source.device));
        let stopped = at_once(&mut sources, |source| {
            if source.multifd {
                return Ok(());
            }
            trace::save_complete_precopy_start(source.device.id());
            let since = Instant::now();
            let stopped = source
                .device
                .set_state(DeviceState::StopCopy, DeviceState::Stop);
            source.counters.phases.set_state.add_since(since);
            stopped
        });
        if let Err(error) = stopped.into_iter().collect::<Result<()>>() {
            return failed(error, sources);
        }
        let mut members = Vec::with_capacity(sources.len());
        for source in sources {
            let id = source.id().clone();
            let config_gate = source.config_gate;
            let way = if source.multifd {
                let device = source.device.take();
                let spec = DeviceSpec::under_way(device)
                    .data_len(source.buffer.len())
                    .after_packets(source.precopy_packets);
                session = session.device(spec);
                Way::Channels {
                    settings: source.settings,
                    counters: source.counters,
                }
            } else {
                Way::Main(Box::new(source))
            };
            members.push(Member {
                id,
                way,
                step: Step::Begun,
                config_gate,
            });
        }
        let mut switchover = Self {
            members,
            session: MemberSession::none(&canceller, Phase::Save),
            messages: None,
        };
        if session.device_count() > 0 {
            match session.start() {
                Ok(session) => switchover.session.set(session),
                Err(failed) => {
                    let (error, devices) = failed.into_parts();
                    let mut back = switchover.take_back(devices);
                    put_all_back(&mut back, Off::by(&error));
                    return Err(Failed::new(error, back));
                }
            }
        }
        Ok(switchover)
    }

    /// The devices, in the order given; those that did not come back are left out.
    fn take_back(&mut self, devices: Vec<Device>) -> Vec<MigratableDevice> {
        let mut devices = devices;
        self.members
            .drain(..)
            .filter_map(|member| match member.way {
                Way::Main(source) => Some(source.into_migratable()),
                Way::Channels { settings, .. } => Some(MigratableDevice::new(
                    take_device(&mut devices, &member.id)?,
                    settings,
                )),
            })
            .collect()
    }

    /// The main channel carries control messages, of which these are left.
    pub(super) fn set_messages(&mut self, messages: Messages) {
        self.messages = Some(messages);
    }

    /// Returns the next control message for the destination: see [`Precopy::message`](super::Precopy::message). The
    /// first lets the destination write to its devices, so send it at once. `None` where the main channel carries
    /// sections. Never waits.
    pub fn message(&mut self) -> Option<Vec<u8>> {
        self.messages.as_mut()?.next()
    }

    /// The destination has answered the last message with success. For an answer of failure call [`Outgoing::abort`].
    pub fn acknowledged(&mut self) {
        if let Some(messages) = &mut self.messages {
            messages.acknowledged();
        }
    }

    /// Writes the body of a device's END section. If the device's data goes over the channels, the body is only
    /// the end tag. Otherwise the caller's thread reads all of the STOP_COPY data and writes it.
    ///
    /// # Errors
    ///
    /// The device's; [`ErrorKind::Channel`]; [`ErrorKind::Misuse`] for a device that is not here, or a second
    /// call. The switchover has then failed.
    pub fn write_state<W: Write>(&mut self, id: &DeviceId, body: W) -> Result<()> {
        self.section(id, Step::Begun, |member, _| {
            let mut writer = section::Writer::new(body);
            let Way::Main(source) = &mut member.way else {
                return writer.dummy();
            };
            let phases = &source.counters.phases;
            // Ends with the state, which the driver ends.
            loop {
                let since = Instant::now();
                let count = source.device.read_stop_copy(&mut source.buffer)?;
                phases.read.add_since(since);
                if count == 0 {
                    return writer.end();
                }
                trace::save_block(&member.id, count as u64);
                let since = Instant::now();
                writer.data_block(&source.buffer[..count])?;
                phases.wire.add_since(since);
                source.counters.main_bytes.add(count as u64);
            }
        })
    }

    /// Writes the body of a device's FULL section: its config. If the channels carry the config, the body
    /// is only
    /// the end tag, or the notice if configs wait for it. Call [`Outgoing::write_state`] first.
    ///
    /// # Errors
    ///
    /// As for [`Outgoing::write_state`], and the config callback's.
    pub fn write_config<W: Write>(&mut self, id: &DeviceId, body: W) -> Result<()> {
        self.section(id, Step::Completed, |member, failure| {
            let mut writer = section::Writer::new(body);
            match &mut member.way {
                Way::Channels { .. } if member.config_gate == ConfigGate::OnNotice => {
                    writer.config_load_ready()
                }
                Way::Channels { .. } => writer.dummy(),
                Way::Main(source) => {
                    if let Some(error) = failure {
                        return Err(error);
                    }
                    let since = Instant::now();
                    let mut config = Vec::new();
                    let mut growing = Growing::new(&mut config, u32::MAX as usize);
                    source.device.save_config(&mut growing)?;
                    source.counters.phases.config.add_since(since);
                    writer.config(&config)
                }
            }
        })
    }

    /// Writes one section's body, when it is its turn.
    fn section(
        &mut self,
        id: &DeviceId,
        turn: Step,
        write: impl FnOnce(&mut Member, Option<Error>) -> Result<()>,
    ) -> Result<()> {
        let failure = self.failure();
        let found = self.members.iter_mut().find(|member| member.id == *id);
        let result = match found {
            None => Err(misuse("no such device")),
            Some(member) if member.step != turn => Err(misuse(
                "a device's END section comes once, then its FULL one",
            )),
            Some(member) => {
                let result = write(member, failure);
                if turn == Step::Begun && matches!(member.way, Way::Main(_)) {
                    trace::save_complete_precopy(&member.id, Error::trace_errno(&result));
                }
                member.step = match turn {
                    Step::Begun => Step::Completed,
                    Step::Completed | Step::Configured => Step::Configured,
                };
                result
            }
        };
        result.map_err(|error| self.session.fail_device(id, error))
    }

    /// Returns the session that sends, if any device uses the channels. An event loop can wait on it, and
    /// it has
    /// the progress.
    #[must_use]
    pub const fn session(&self) -> Option<&SaveSession> {
        self.session.get()
    }

    /// Whether everything that the channels carry has been sent, or the switchover has failed.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.session.is_finished()
    }

    /// Returns a handle that cancels the switchover from any thread. It is that of the session's channels
    /// ([`SourceChannels::greet_with`](crate::SourceChannels::greet_with)), or of
    /// [`SaveBuilder::cancelled_by`].
    #[must_use]
    pub fn canceller(&self) -> Canceller {
        self.session.canceller()
    }

    /// Cancels the switchover. Returns at once; [`Outgoing::finish`] puts the devices back.
    pub fn cancel(&self) {
        self.fail(Error::cancelled(Phase::Save));
    }

    /// Fails the switchover for a reason of the VMM's. The first reason counts.
    pub fn fail(&self, error: Error) {
        self.session.fail(error);
    }

    /// Returns why the switchover has failed, if it has.
    #[must_use]
    pub fn failure(&self) -> Option<Error> {
        self.session.failure()
    }

    /// Returns the counters of all devices, as they are now.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.merge(self.session.stats())
    }

    /// Adds what the session does not know.
    fn merge(&self, mut stats: Stats) -> Stats {
        let members = self.members.iter();
        merge(
            &mut stats,
            members.map(|member| (&member.id, member.counters())),
        );
        stats
    }

    /// Waits until everything is sent. The devices then stay in STOP_COPY until the VMM knows what has
    /// become of
    /// the migration ([`Saved`]).
    ///
    /// Write the main channel's end ([`Saved::message`], where it carries control messages) after this, never before. With the end the destination may start its VM; if
    /// this call fails, the VM goes on here.
    ///
    /// # Errors
    ///
    /// The failure; [`ErrorKind::Misuse`] if a device's sections have not been written, or a control message has not been
    /// answered. The devices are given
    /// back in the state at set-up.
    pub fn finish(mut self) -> Result<Saved, Failed<Vec<MigratableDevice>>> {
        let left = self.members.iter();
        let left = left.filter(|member| matches!(member.way, Way::Main(_)));
        if let Some(member) = { left }.find(|member| member.step != Step::Configured) {
            let error = misuse("its sections have not all been written");
            let error = error.on_device(&member.id);
            self.fail(error);
        }
        let settled = |messages: &Messages| messages.is_settled();
        if !self.messages.as_ref().is_none_or(settled) {
            self.fail(misuse("a control message has not been answered"));
        }
        let mut failure = self.failure();
        let mut devices = Vec::new();
        let mut stats = Stats::main_channel_alone();
        let mut channels = Finished::default();
        if let Some(session) = self.session.take() {
            let report = session.join();
            channels = report.channels;
            failure = failure.or(report.result.err());
            stats = report.stats;
            devices.extend(
                report
                    .devices
                    .into_iter()
                    .filter_map(|report| report.device),
            );
        }
        let stats = self.merge(stats);
        let mut back = self.take_back(devices);
        match failure {
            None => Ok(Saved::new(back, stats, channels, self.messages.take())),
            Some(error) => {
                channels.abandon();
                put_all_back(&mut back, Off::by(&error));
                Err(Failed::new(error, back))
            }
        }
    }

    /// Aborts the migration: ends what is under way, within the grace time, and gives the devices back in the
    /// state at set-up.
    #[must_use = "these are the VM's devices"]
    pub fn abort(self) -> Vec<MigratableDevice> {
        self.cancel();
        match self.finish() {
            Ok(saved) => saved.abort(),
            Err(failed) => failed.into_back(),
        }
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        let report = self.session.take().map(|session| {
            session.cancel();
            session.join()
        });
        let mut devices = Vec::new();
        if let Some(mut report) = report {
            report.channels.abandon();
            devices.extend(report.devices.into_iter().filter_map(|it| it.device));
        }
        put_all_back(&mut self.take_back(devices), Off::Cancelled);
    }
}

fn misuse(what: &'static str) -> Error {
    Error::misuse(Phase::Save, what)
}

fn check(sources: &[OutgoingDevice], session: &SaveBuilder) -> Result<()> {
    if session.device_count() > 0 {
        return Err(misuse("the session's devices are the switchover's"));
    }
    if session.greets() && sources.iter().any(|source| source.multifd) {
        // The destination's time for their hellos has been running since its set-up.
        return Err(misuse(
            "the channels are greeted at the set-up: SourceChannels",
        ));
    }
    let Some(first) = sources.first() else {
        return Err(misuse("a switchover has a device"));
    };
    let mut all = sources.iter();
    if sources.len() > 1
        && let Some(source) = all.find(|source| !source.flags().contains(MigrationFlags::P2P))
    {
        let kind = ErrorKind::Unmigratable(Refusal::SeveralWithoutP2p);
        return Err(Error::new(kind, Phase::Save).on_device(source.id()));
    }
    for source in sources {
        source.check()?;
    }
    first.decide()
}

impl fmt::Debug for Outgoing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outgoing")
            .field("session", &self.session.get())
            .field("failure", &self.failure())
            .finish_non_exhaustive()
    }
}
