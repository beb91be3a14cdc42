//! Control messages: what one side's engine tells the other's over a main channel that is not QEMU's.
//!
//! ```text
//!   source                         the VMM's requests                    destination
//!   ──────                         ──────────────────                    ───────────
//!   Precopy::message()  ─────────▶ SETUP: which devices, which acks ───▶ Incoming::message()
//!     … PRE_COPY data over the channels …
//!   Precopy::message()  ─────────▶ INITIAL_DATA: so many packets ──────▶   waits until they are in the devices
//!   acknowledged()      ◀───────── the VMM's response: the switchover ack
//!   Outgoing::message() ─────────▶ SWITCHOVER_START ───────────────────▶   the writes begin
//!     … STOP_COPY data and configs over the channels …
//!   Saved::message()    ─────────▶ END: all has been sent ─────────────▶   Incoming::finish may be called
//! ```
//!
//! A message is opaque to the VMM, which carries it in a request of its own: whole, in order, once. Its size is
//! bounded ([`MAX_MESSAGE_LEN`]). All integers are big-endian:
//!
//! ```text
//!    0   magic      "VFMC"                       16   for each device:
//!    4   version    be16, 1                        0    len        u8, 1 to 255
//!    6   kind       u8                             1    idstr      UTF-8, no NUL
//!    7   acks       u8, 0 but in SETUP                  instance   be32
//!    8   number     be32, from 0, by 1                  count      be32: packets, in INITIAL_DATA
//!   12   devices    be32
//! ```
//!
//! # What a peer's message may do
//!
//! Decoding checks every field and takes no more memory than the message is long. A message that breaks a rule is a
//! [`Violation::Message`], of another version a [`Violation::MessageVersion`]; where a device is at fault the error
//! names it. Which message may come when, and for which device, [`Incoming`](crate::migration::Incoming) decides.
//!
//! Pure functions on bytes: any thread, no wait.

use crate::{
    error::{Error, Phase, Result, Violation},
    id::DeviceId,
};

/// The longest control message, in bytes: 512 KiB. A VMM refuses a longer request before it takes memory for it.
pub const MAX_MESSAGE_LEN: usize = 512 << 10;

const MAGIC: [u8; 4] = *b"VFMC";
const VERSION: u16 = 1;
const HEADER_LEN: usize = 16;

/// What a control message says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum MessageKind {
    /// The devices' migration has been set up on the source: which devices they are, and which acks it waits for.
    Setup,
    /// The initial data of these devices has been sent, and was received. The answer to it is the switchover ack.
    InitialData,
    /// The VM stands still on the source.
    SwitchoverStart,
    /// Everything has been sent: the destination decides where the VM runs.
    End,
}

impl MessageKind {
    const ALL: [Self; 4] = [
        Self::Setup,
        Self::InitialData,
        Self::SwitchoverStart,
        Self::End,
    ];

    const fn number(self) -> u8 {
        self as u8 + 1
    }
}

/// A control message, decoded.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Message {
    pub(crate) kind: MessageKind,
    /// In SETUP: how acks are used.
    pub(crate) acks: u8,
    /// How many came before it.
    pub(crate) number: u32,
    /// Each with a count of packets.
    pub(crate) devices: Vec<(DeviceId, u32)>,
}

pub(crate) fn refused(what: &'static str) -> Error {
    broken(Violation::Message(what))
}

fn broken(violation: Violation) -> Error {
    Error::protocol(violation).in_phase(Phase::Section)
}

impl Message {
    /// Its bytes; `None` where they would be too many.
    pub(crate) fn encode(&self) -> Option<Vec<u8>> {
        let mut bytes = Vec::with_capacity(HEADER_LEN);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_be_bytes());
        bytes.extend([self.kind.number(), self.acks]);
        bytes.extend(self.number.to_be_bytes());
        bytes.extend(u32::try_from(self.devices.len()).ok()?.to_be_bytes());
        for (id, count) in &self.devices {
            let idstr = id.idstr().as_bytes();
            bytes.push(u8::try_from(idstr.len()).expect("an idstr has 255 bytes at most"));
            bytes.extend(idstr);
            bytes.extend(id.instance().to_be_bytes());
            bytes.extend(count.to_be_bytes());
        }
        (bytes.len() <= MAX_MESSAGE_LEN).then_some(bytes)
    }

    /// Reads one. The error says what is wrong with it.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        if bytes.len() > MAX_MESSAGE_LEN {
            return Err(refused("a control message of more than 512 KiB"));
        }
        let mut rest = bytes;
        if take(&mut rest)? != MAGIC {
            return Err(refused("what came is no control message"));
        }
        let version = u16::from_be_bytes(take(&mut rest)?);
        if version != VERSION {
            return Err(broken(Violation::MessageVersion(version)));
        }
        let [kind, acks] = take(&mut rest)?;
        let mut kinds = MessageKind::ALL.into_iter();
        let kind = kinds
            .find(|it| it.number() == kind)
            .ok_or_else(|| refused("a control message of an unknown kind"))?;
        let number = u32::from_be_bytes(take(&mut rest)?);
        let count = u32::from_be_bytes(take(&mut rest)?);
        let mut devices = Vec::new();
        // Ends with the message, whatever the count says.
        for _ in 0..count {
            devices.push(device(&mut rest)?);
        }
        if !rest.is_empty() {
            return Err(refused("bytes behind a control message's last device"));
        }
        Ok(Self {
            kind,
            acks,
            number,
            devices,
        })
    }
}

fn device(rest: &mut &[u8]) -> Result<(DeviceId, u32)> {
    let [len] = take(rest)?;
    let (idstr, behind) = rest.split_at_checked(len.into()).ok_or_else(truncated)?;
    *rest = behind;
    let idstr = std::str::from_utf8(idstr);
    let idstr = idstr.map_err(|_| refused("a device's name that is no text"))?;
    let instance = u32::from_be_bytes(take(rest)?);
    let id = DeviceId::new(idstr, instance);
    let id = id.map_err(|_| refused("a device's name that is none"))?;
    Ok((id, u32::from_be_bytes(take(rest)?)))
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N]> {
    let (field, behind) = rest.split_first_chunk().ok_or_else(truncated)?;
    *rest = behind;
    Ok(*field)
}

fn truncated() -> Error {
    refused("a control message that is cut off")
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(kind: MessageKind) -> Message {
        let id = |name: &str, instance| DeviceId::new(name, instance).unwrap();
        Message {
            kind,
            acks: 2,
            number: 0x0102_0304,
            devices: vec![(id("a", 0), 7), (id(&"b".repeat(255), 9), u32::MAX)],
        }
    }

    #[test]
    fn a_message_is_laid_out_as_the_page_says() {
        let mut message = message(MessageKind::InitialData);
        message.devices.truncate(1);
        let bytes = message.encode().unwrap();
        let expected = b"VFMC\0\x01\x02\x02\x01\x02\x03\x04\0\0\0\x01\x01a\0\0\0\0\0\0\0\x07";
        assert_eq!(bytes, expected);
        for kind in MessageKind::ALL {
            let message = self::message(kind);
            assert_eq!(
                Message::decode(&message.encode().unwrap()).unwrap(),
                message
            );
        }
    }

    #[test]
    fn every_cut_and_what_stands_behind_is_refused() {
        let bytes = message(MessageKind::Setup).encode().unwrap();
        for len in 0..bytes.len() {
            let error = Message::decode(&bytes[..len]).unwrap_err();
            assert!(error.to_string().contains("cut off"), "{len}: {error}");
        }
        let error = Message::decode(&[&bytes[..], &[0]].concat()).unwrap_err();
        assert!(error.to_string().contains("behind"), "{error}");
    }

    #[track_caller]
    fn refuses(change: impl FnOnce(&mut Vec<u8>), what: &str) {
        let mut bytes = message(MessageKind::Setup).encode().unwrap();
        change(&mut bytes);
        let error = Message::decode(&bytes).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
    }

    #[test]
    fn what_breaks_a_rule_is_refused_by_its_name() {
        refuses(|bytes| bytes[0] = b'Q', "no control message");
        refuses(|bytes| bytes[5] = 2, "version 2");
        refuses(|bytes| bytes[4] = 1, "version 257");
        refuses(|bytes| bytes[6] = 0, "unknown kind");
        refuses(|bytes| bytes[6] = 5, "unknown kind");
        refuses(|bytes| bytes[12] = 0xff, "cut off");
        refuses(|bytes| bytes[17] = 0, "no");
        refuses(|bytes| bytes[17] = 0xff, "no text");
        refuses(|bytes| bytes.resize(MAX_MESSAGE_LEN + 1, 0), "512 KiB");
    }

    #[test]
    fn a_vm_of_the_most_devices_fits() {
        let id = |at| DeviceId::new("x".repeat(255), at).unwrap();
        let most = crate::settings::MAX_DEVICES;
        let mut message = message(MessageKind::Setup);
        message.devices = (0..most).map(|at| (id(at), at)).collect();
        assert!(message.encode().is_some());
        message.devices = (0..10 * most).map(|at| (id(at), at)).collect();
        assert!(message.encode().is_none());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..200), real: bool) {
            if real && bytes.len() >= 6 {
                bytes[..6].copy_from_slice(b"VFMC\0\x01");
            }
            if let Ok(message) = Message::decode(&bytes) {
                prop_assert_eq!(message.encode().unwrap(), bytes);
            }
        }
    }
}
