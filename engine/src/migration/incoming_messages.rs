//! The destination of a VM whose main channel carries control messages: which may come when, and what each does.
//!
//! ```text
//!   SETUP ─▶ INITIAL_DATA… ─▶ SWITCHOVER_START ─▶ END
//! ```
//!
//! | message | does | waits for |
//! |---|---|---|
//! | SETUP | checks that both ends have the same devices; asks the VMM for those that are expected | the drivers' change to RESUMING |
//! | INITIAL_DATA | | the counted packets to be in the devices |
//! | SWITCHOVER_START | lets the writes begin | |
//! | END | lets `finish` succeed | |
//!
//! The thread that serves the VMM's requests calls this module. A wait for packets ends with them, the migration's
//! failure, or the session's time without progress.
//!
//! # A hostile source
//!
//! A message that cannot be decoded, stands in the wrong place, comes twice, or names a device that is not there fails
//! the migration, by that name. It makes no device: the VMM is asked only for devices that it expects.

use super::{
    Capabilities, Incoming, MigratableDevice, SwitchoverAck, incoming_member::Member,
    messages::Heard,
};
use crate::{
    error::{Error, Failed, Phase, Result, Violation},
    id::DeviceId,
    load::LoadBuilder,
    message::{Message, MessageKind, refused},
    sync::lock,
};

/// Asks the VMM for a device that is expected.
type Provide<'a> = &'a mut dyn FnMut(&DeviceId) -> Option<MigratableDevice>;

impl Incoming {
    /// As [`Incoming::setup`], for a main channel that carries control messages ([`Incoming::message`]) and no sections.
    /// All data comes over the channels, that of PRE_COPY too. The answer to a message is the switchover ack.
    ///
    /// # Errors
    ///
    /// As for [`Incoming::setup`].
    pub fn setup_by_messages(
        devices: Vec<MigratableDevice>,
        capabilities: &Capabilities,
        session: LoadBuilder,
    ) -> Result<Self, Failed<Vec<MigratableDevice>>> {
        let mut capabilities = capabilities.clone();
        capabilities.precopy_over_channels = true;
        let mut incoming = Self::setup(devices, &capabilities, session, Box::new(|| Ok(())))?;
        let direct = incoming.members.iter().find(|it| !it.over_channels);
        if let Some(member) = direct {
            let what = "its data would not come over the channels, and a control message has none";
            let error = Error::misuse(Phase::Setup, what).on_device(&member.id);
            return Err(Failed::new(error, incoming.abort()));
        }
        incoming.heard = Some(crate::sync::Mutex::new(Heard::default()));
        Ok(incoming)
    }

    /// Takes a control message of the source's, in the order in which the source gave them out. When this returns, the
    /// message has been obeyed: answer the VMM's request with success then, and with failure after an error. Returns
    /// what it was.
    ///
    /// `provide` makes a device that is expected. It is asked for each when the first message comes, and once more when
    /// the device is needed: for the initial data that an ack waits for. `None` is "not yet": then
    /// [`Incoming::add_device`] adds it, at the latest before [`Incoming::finish`].
    ///
    /// The VMM bounds what it reads of a request by [`MAX_MESSAGE_LEN`](super::MAX_MESSAGE_LEN).
    ///
    /// # Errors
    ///
    /// [`Violation::Message`], [`Violation::MessageVersion`], [`Violation::UnknownDevice`]; the device's; the session's.
    /// The migration has then failed. If it had failed before, the error is that first reason.
    ///
    /// [`ErrorKind::Misuse`](crate::ErrorKind::Misuse) where the main channel has sections, and where a device is needed
    /// and does not come.
    pub fn message(
        &self,
        message: &[u8],
        mut provide: impl FnMut(&DeviceId) -> Option<MigratableDevice>,
    ) -> Result<MessageKind> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        self.obey(message, &mut provide).map_err(|error| {
            self.fail(error.clone());
            self.failure().unwrap_or(error).into_public()
        })
    }

    fn obey(&self, message: &[u8], provide: Provide<'_>) -> Result<MessageKind> {
        let Some(heard) = &self.heard else {
            let what = "a control message, and the main channel carries sections";
            return Err(Error::misuse(Phase::Section, what));
        };
        let message = Message::decode(message)?;
        lock(heard).note(&message)?;
        match message.kind {
            MessageKind::Setup => self.check_setup(&message, provide)?,
            MessageKind::InitialData => self.take_initial_data(&message, provide)?,
            MessageKind::SwitchoverStart | MessageKind::End if !message.devices.is_empty() => {
                return Err(refused("devices in a control message that has none"));
            }
            MessageKind::SwitchoverStart => self.switchover_start()?,
            MessageKind::End => {}
        }
        Ok(message.kind)
    }

    fn check_setup(&self, message: &Message, provide: Provide<'_>) -> Result<()> {
        if message.acks != self.ack as u8 {
            return Err(refused("switchover-ack is another one at the source"));
        }
        for (at, (id, count)) in message.devices.iter().enumerate() {
            let _here = self.member(id)?;
            let twice = message.devices[..at].iter().any(|(other, _)| other == id);
            if twice || *count > 0 {
                return Err(refused("a device stands twice, or with packets").on_device(id));
            }
        }
        let named = |member: &Member| message.devices.iter().any(|(id, _)| *id == member.id);
        if let Some(member) = self.members.iter().find(|member| !named(member)) {
            return Err(refused("the source does not have the device").on_device(&member.id));
        }
        for member in &self.members {
            self.ask_for(member, provide)?;
            if let Some(session) = self.session.get() {
                session.start_early(&member.id)?;
            }
        }
        lock(&self.pending_acks).agreements.clear();
        Ok(())
    }

    fn take_initial_data(&self, message: &Message, provide: Provide<'_>) -> Result<()> {
        if self.ack == SwitchoverAck::Off || message.devices.is_empty() {
            return Err(refused("initial data that nobody waits for"));
        }
        for (id, count) in &message.devices {
            let member = self.member(id)?;
            self.ask_for(member, provide)?;
            if member.is_expected() {
                let what = "its initial data has been sent, and the device has not been added";
                return Err(Error::misuse(Phase::Section, what).on_device(id));
            }
            if let Some(session) = self.session.get() {
                session.wait_written(id, *count)?;
            }
            if !self.init_data_sent(member)? {
                let what = "initial data of a device that has none, or a second time";
                return Err(refused(what).on_device(id));
            }
        }
        Ok(())
    }

    /// Asks the VMM for a device, where it is expected.
    fn ask_for(&self, member: &Member, provide: Provide<'_>) -> Result<()> {
        if !member.is_expected() {
            return Ok(());
        }
        match provide(&member.id) {
            Some(device) if *device.id() != member.id => {
                let what = "another device than the one that was asked for";
                Err(Error::misuse(Phase::Setup, what).on_device(&member.id))
            }
            Some(device) => Ok(self.add_device(device)?),
            None => Ok(()),
        }
    }

    /// The member of this name.
    pub(super) fn member(&self, id: &DeviceId) -> Result<&Member> {
        let found = self.members.iter().find(|member| member.id == *id);
        found.ok_or_else(|| {
            let violation = Violation::UnknownDevice {
                idstr: id.idstr().to_owned(),
                instance: id.instance(),
            };
            Error::protocol(violation).in_phase(Phase::Section)
        })
    }
}
