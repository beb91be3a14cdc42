//! The control messages of one migration: on the source their numbers, and one at a time on its way; on the
//! destination which have come.
//!
//! ```text
//!   source         queue() ─▶ due ─ next() ─▶ on its way ─ acknowledged() ─▶ settled
//!   destination    SETUP ─▶ INITIAL_DATA… ─▶ SWITCHOVER_START ─▶ END
//! ```
//!
//! One thread, the owner's; nothing waits. What a message looks like is in `message.rs`.

use super::{OutgoingDevice, SwitchoverAck};
use crate::{
    error::{Error, Phase, Result},
    id::DeviceId,
    message::{Message, MessageKind, refused},
};

/// The messages of one migration, on its source.
#[derive(Debug, Default)]
pub(super) struct Messages {
    /// How many have been made.
    number: u32,
    /// To be sent, with the acks that its answer is.
    due: Option<(Vec<u8>, usize)>,
    /// The acks that the answer to the one under way is.
    on_its_way: Option<usize>,
}

impl Messages {
    /// The first message: which devices are set up.
    pub(super) fn set_up(&mut self, sources: &[OutgoingDevice], ack: SwitchoverAck) -> Result<()> {
        let misuse = |what| Error::misuse(Phase::Setup, what);
        if sources.is_empty() {
            return Err(misuse("a migration has a device"));
        }
        if let Some(source) = sources.iter().find(|source| !source.is_over_channels()) {
            let what = "its data would not go over the channels, and a control message has none";
            return Err(misuse(what).on_device(source.id()));
        }
        let devices = sources.iter().map(|source| (source.id().clone(), 0));
        if self.make(MessageKind::Setup, ack as u8, devices.collect()) {
            Ok(())
        } else {
            Err(misuse("more devices than a control message holds"))
        }
    }

    /// Makes the next message. The one before has been answered.
    pub(super) fn queue(&mut self, kind: MessageKind, devices: Vec<(DeviceId, u32)>) {
        let made = self.make(kind, 0, devices);
        assert!(made, "these devices fitted the first message");
    }

    fn make(&mut self, kind: MessageKind, acks: u8, devices: Vec<(DeviceId, u32)>) -> bool {
        debug_assert!(self.is_settled(), "one at a time");
        let answers = match kind {
            MessageKind::InitialData => devices.len(),
            _ => 0,
        };
        let message = Message {
            kind,
            acks,
            number: self.number,
            devices,
        };
        let bytes = message.encode();
        self.number += 1;
        self.due = bytes.map(|bytes| (bytes, answers));
        self.due.is_some()
    }

    /// The one that is due.
    pub(super) fn next(&mut self) -> Option<Vec<u8>> {
        let (bytes, answers) = self.due.take()?;
        self.on_its_way = Some(answers);
        Some(bytes)
    }

    /// The one under way has been answered. Returns how many acks that is.
    pub(super) fn acknowledged(&mut self) -> usize {
        self.on_its_way.take().unwrap_or(0)
    }

    /// Whether every message has been answered.
    pub(super) const fn is_settled(&self) -> bool {
        self.due.is_none() && self.on_its_way.is_none()
    }
}

/// What has come, on the destination.
#[derive(Debug, Default)]
pub(super) struct Heard {
    /// How many messages.
    number: u32,
    /// The last of them, of those that come once.
    last: Option<MessageKind>,
}

impl Heard {
    /// Takes note of a message, where it may stand here.
    pub(super) fn note(&mut self, message: &Message) -> Result<()> {
        use MessageKind::{End, InitialData, Setup, SwitchoverStart};
        if message.number != self.number {
            return Err(refused("a control message is missing, or came twice"));
        }
        self.number = self.number.saturating_add(1);
        self.last = match (self.last, message.kind) {
            (None, Setup) | (Some(Setup), SwitchoverStart) | (Some(SwitchoverStart), End) => {
                Some(message.kind)
            }
            (Some(Setup), InitialData) => self.last,
            _ => return Err(refused("a control message that may not come here")),
        };
        Ok(())
    }

    /// Whether the source has said that all is sent.
    pub(super) fn is_ended(&self) -> bool {
        self.last == Some(MessageKind::End)
    }
}
