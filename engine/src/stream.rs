//! The main channel around the devices' sections, and the return path.
//!
//! ```text
//!  open()         "QEVM" 4 │ 3 4
//!  Configuration  07 │ len 4 │ machine's name
//!  Section        01 start, 04 full │ id 4 │ len 1 │ idstr │ instance 4 │ version 4 ┐
//!                 02 part,  03 end  │ id 4                                          ├ body, no length
//!  footer()       7e │ id 4                                                         ┘
//!  Command        08 │ command 2 │ len 2 │ payload
//!  Eof            00
//!  Description    06 │ len 4 │ JSON
//!
//!  return path    kind 2 │ len 2 │ payload
//! ```
//!
//! A VMM has all this already, and it knows its other devices' sections, which nobody else can walk.
//! `replay`, the tests and small VMMs use this module: one thread reads event by event, takes the body
//! itself after each [`Event::Section`], from [`Reader::body`], and then asks for the footer. All integers
//! are big-endian. [`MainChannelOrder`], in `order`, knows what may stand where.
//!
//! The inputs and outputs must block, so a socket of an async runtime must be set to block first. A
//! non-blocking one ends the main channel with `EAGAIN`, in the middle of whatever event it was reading or
//! writing.

mod order;

use std::{
    collections::{HashMap, hash_map::Entry},
    io::{Read, Write},
};

#[cfg(doc)]
use crate::error::ErrorKind;
use crate::{
    error::{Error, Phase, Result, Violation},
    id::DeviceId,
    section::{Counted, broken, failed},
};

pub use order::MainChannelOrder;

/// The main channel's first four bytes, `QEVM`; a multifd channel's are
/// [`MULTIFD_MAGIC`](crate::wire::MULTIFD_MAGIC).
pub const MAIN_MAGIC: u32 = 0x5145_564d;
/// The one version of the main channel that there is.
pub const MAIN_VERSION: u32 = 3;

/// The longest machine name that is accepted, in bytes.
pub const MAX_MACHINE_NAME: u32 = 255;
/// The longest description that is accepted, in bytes.
pub const MAX_DESCRIPTION: u32 = 1 << 20;
/// The most sections that are remembered; more are refused.
pub const MAX_SECTIONS: usize = 4096;

const EOF: u8 = 0x00;
const DESCRIPTION: u8 = 0x06;
const CONFIGURATION: u8 = 0x07;
const COMMAND: u8 = 0x08;
const FOOTER: u8 = 0x7e;

const OPEN_RETURN_PATH: u16 = 1;
const PING: u16 = 2;
const SWITCHOVER_START: u16 = 11;

const SHUT: u16 = 1;
const PONG: u16 = 2;
const SWITCHOVER_ACK: u16 = 7;

/// Where in its section's life a part of it is.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u8)]
pub enum SectionKind {
    /// The first part.
    Start = 0x01,
    /// A further part.
    Part = 0x02,
    /// The last part.
    End = 0x03,
    /// The only part: state that is sent at once, in downtime.
    Full = 0x04,
}

impl SectionKind {
    fn decode(byte: u8) -> Option<Self> {
        [Self::Start, Self::Part, Self::End, Self::Full]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }

    /// Whether the header says whose the section is.
    const fn is_named(self) -> bool {
        matches!(self, Self::Start | Self::Full)
    }
}

/// A section's header.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Section {
    /// Which part of the section this is.
    pub kind: SectionKind,
    /// The section's number, by which its further parts and the footer name it.
    pub id: u32,
    /// Whose section it is: a VFIO PCI device's idstr is like `0000:00:03.0/vfio`.
    pub owner: DeviceId,
    /// The version of the body's layout; 1 for a VFIO device.
    pub version: u32,
}

/// A command from the source to the destination.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Command {
    /// Answers may be sent on the return path.
    OpenReturnPath,
    /// Asks for [`Reply::Pong`] with the same value.
    Ping(u32),
    /// Every device's iterable data has been sent: the loads may begin.
    SwitchoverStart,
    /// Any other.
    Other {
        /// Its number.
        command: u16,
        /// Its payload, of at most 65535 bytes.
        payload: Vec<u8>,
    },
}

/// What the main channel brings next.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// The source's machine.
    Configuration {
        /// Its name, at most [`MAX_MACHINE_NAME`] bytes.
        name: String,
    },
    /// A section's header. The body is next: [`Reader::body`], then [`Reader::footer`].
    Section(Section),
    /// A command.
    Command(Command),
    /// The end of the VM's state. A description may follow.
    Eof,
    /// The sections and their fields as JSON, for people; at most [`MAX_DESCRIPTION`] bytes.
    Description(Vec<u8>),
}

/// Where a reader is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Place {
    /// Straight after the header, where the configuration stands.
    Front,
    /// Between sections and commands.
    Between,
    /// In the body of the section with this id.
    Body(u32),
    /// After the end of the VM's state.
    Tail,
    /// After the description, or the input's end.
    Over,
}

/// Reads a main channel event by event, and never a byte beyond the event.
///
/// ```
/// use vfio_migration::stream::{Command, Event, Reader, Writer};
///
/// let mut bytes = Vec::new();
/// let mut writer = Writer::open(&mut bytes)?;
/// writer.write(&Event::Command(Command::SwitchoverStart))?;
/// writer.write(&Event::Eof)?;
/// assert_eq!(bytes[8..], [8, 0, 11, 0, 0, 0]);
///
/// let mut reader = Reader::open(&bytes[..])?;
/// while let Some(event) = reader.next_event()? {
///     match event {
///         Event::Section(section) => {
///             // Here the owner's loader takes the body, with `section::load_state` for instance.
///             std::io::copy(reader.body()?, &mut std::io::sink()).unwrap();
///             reader.footer()?;
///         }
///         other => println!("{other:?}"),
///     }
/// }
/// # Ok::<(), vfio_migration::Error>(())
/// ```
#[derive(Debug)]
pub struct Reader<R> {
    input: Counted<R>,
    sections: HashMap<u32, (DeviceId, u32)>,
    place: Place,
}

impl<R: Read> Reader<R> {
    /// Reads the first eight bytes.
    ///
    /// # Errors
    ///
    /// [`Violation::Section`] where it is no main channel or of another version;
    /// [`Violation::SectionTruncated`], [`ErrorKind::Channel`]; as all of this reader's errors in
    /// [`Phase::Section`].
    pub fn open(input: R) -> Result<Self> {
        let mut input = Counted::new(input);
        if input.array()? != MAIN_MAGIC.to_be_bytes() {
            return Err(refuse("the main channel does not begin with QEVM"));
        }
        if input.array()? != MAIN_VERSION.to_be_bytes() {
            return Err(refuse("unknown version of the main channel"));
        }
        Ok(Self {
            input,
            sections: HashMap::new(),
            place: Place::Front,
        })
    }

    /// How many bytes have been read, bodies included.
    pub const fn offset(&self) -> u64 {
        self.input.offset()
    }

    /// Gives the input back, wherever it stands.
    pub fn into_inner(self) -> R {
        self.input.into_inner()
    }

    /// Reads the next event, or `None` where the channel has ended behind [`Event::Eof`].
    ///
    /// Whether a description follows [`Event::Eof`] is not said in the stream, and a connection may
    /// stay open behind it: a caller who expects none stops at [`Event::Eof`].
    ///
    /// # Errors
    ///
    /// [`Violation::SectionType`] for an unknown event; [`Violation::Section`] for a broken one;
    /// [`Violation::SectionOrder`] for a section id that is unknown, or another owner's;
    /// [`Violation::SectionTruncated`] with the offset where the channel ended;
    /// [`ErrorKind::Channel`]; [`ErrorKind::Misuse`] where a section's body and footer have not been
    /// read.
    pub fn next_event(&mut self) -> Result<Option<Event>> {
        let place = self.place;
        match place {
            Place::Body(_) => return Err(misuse("the section's footer has not been read")),
            Place::Over => return Ok(None),
            Place::Front | Place::Between | Place::Tail => {}
        }
        let kind = match self.input.byte_or_end()? {
            Some(kind) => kind,
            None if place == Place::Tail => {
                self.place = Place::Over;
                return Ok(None);
            }
            None => return Err(self.input.truncated()),
        };
        self.place = Place::Between;
        if place == Place::Tail {
            if kind != DESCRIPTION {
                return Err(broken(Violation::SectionType(kind)));
            }
            self.place = Place::Over;
            return self.description().map(Some);
        }
        match kind {
            CONFIGURATION if place == Place::Front => self.configuration(),
            COMMAND => self.command(),
            EOF => {
                self.place = Place::Tail;
                Ok(Event::Eof)
            }
            _ => match SectionKind::decode(kind) {
                Some(kind) => self.section(kind),
                None => Err(broken(Violation::SectionType(kind))),
            },
        }
        .map(Some)
    }

    fn be16(&mut self) -> Result<u16> {
        Ok(u16::from_be_bytes(self.input.array()?))
    }

    fn be32(&mut self) -> Result<u32> {
        Ok(u32::from_be_bytes(self.input.array()?))
    }

    fn configuration(&mut self) -> Result<Event> {
        let len = self.be32()?;
        if len > MAX_MACHINE_NAME {
            return Err(refuse("the machine's name is too long"));
        }
        let name = String::from_utf8(self.input.take_bytes(len)?)
            .map_err(|_| refuse("the machine's name is not UTF-8"))?;
        Ok(Event::Configuration { name })
    }

    fn description(&mut self) -> Result<Event> {
        let len = self.be32()?;
        if len > MAX_DESCRIPTION {
            return Err(refuse("the description is too long"));
        }
        Ok(Event::Description(self.input.take_bytes(len)?))
    }

    fn command(&mut self) -> Result<Event> {
        let command = self.be16()?;
        let len = self.be16()?;
        let payload = self.input.take_bytes(len.into())?;
        Ok(Event::Command(match (command, &payload[..]) {
            (OPEN_RETURN_PATH, []) => Command::OpenReturnPath,
            (PING, &[a, b, c, d]) => Command::Ping(u32::from_be_bytes([a, b, c, d])),
            (SWITCHOVER_START, []) => Command::SwitchoverStart,
            (OPEN_RETURN_PATH | PING | SWITCHOVER_START, _) => {
                return Err(refuse("a command with a payload of a wrong length"));
            }
            _ => Command::Other { command, payload },
        }))
    }

    fn section(&mut self, kind: SectionKind) -> Result<Event> {
        let id = self.be32()?;
        let (owner, version) = if kind.is_named() {
            self.name(id)?
        } else {
            let known = self.sections.get(&id).cloned();
            let what = "a part of a section that has not been started";
            known.ok_or_else(|| broken(Violation::SectionOrder { section: id, what }))?
        };
        self.place = Place::Body(id);
        Ok(Event::Section(Section {
            kind,
            id,
            owner,
            version,
        }))
    }

    /// Reads whose section it is, and remembers that.
    fn name(&mut self, id: u32) -> Result<(DeviceId, u32)> {
        let [len] = self.input.array()?;
        let idstr = String::from_utf8(self.input.take_bytes(len.into())?)
            .map_err(|_| refuse("an idstr that is not UTF-8"))?;
        let instance = self.be32()?;
        let version = self.be32()?;
        let owner = DeviceId::new(idstr, instance)
            .map_err(|_| refuse("an idstr that is empty or holds a NUL"))?;
        let full = self.sections.len() >= MAX_SECTIONS;
        match self.sections.entry(id) {
            Entry::Occupied(known) if known.get().0 != owner => {
                let what = "another owner has this section id";
                let violation = Violation::SectionOrder { section: id, what };
                return Err(broken(violation).on_device(&owner));
            }
            Entry::Vacant(_) if full => return Err(refuse("too many sections")),
            entry => entry.insert_entry((owner.clone(), version)),
        };
        Ok((owner, version))
    }

    /// The section's body, and everything behind it: only its owner knows where it ends.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Misuse`] where the last event was no section.
    pub fn body(&mut self) -> Result<&mut dyn Read> {
        match self.place {
            Place::Body(_) => Ok(&mut self.input),
            _ => Err(misuse("there is no section to read")),
        }
    }

    /// Reads the footer, which stands behind the body.
    ///
    /// # Errors
    ///
    /// [`Violation::SectionOrder`] where it does not: most often the body's loader has taken too little
    /// or too much. [`Violation::SectionTruncated`], [`ErrorKind::Channel`]; [`ErrorKind::Misuse`]
    /// where the last event was no section.
    pub fn footer(&mut self) -> Result<()> {
        let Place::Body(id) = self.place else {
            return Err(misuse("there is no section to end"));
        };
        let what = match self.input.array()? {
            [FOOTER] if self.be32()? == id => None,
            [FOOTER] => Some("another section's footer behind the body"),
            _ => Some("no footer behind the body"),
        };
        if let Some(what) = what {
            let error = broken(Violation::SectionOrder { section: id, what });
            return Err(match self.sections.get(&id) {
                Some((owner, _)) => error.on_device(owner),
                None => error,
            });
        }
        self.place = Place::Between;
        Ok(())
    }
}

fn refuse(what: &'static str) -> Error {
    broken(Violation::Section(what))
}

fn misuse(what: &'static str) -> Error {
    Error::misuse(Phase::Section, what)
}

/// Writes a main channel event by event.
///
/// ```
/// use vfio_migration::{
///     DeviceId, section,
///     stream::{Event, Section, SectionKind, Writer},
/// };
///
/// let mut writer = Writer::open(Vec::new())?;
/// writer.write(&Event::Section(Section {
///     kind: SectionKind::Full,
///     id: 37,
///     owner: DeviceId::new("0000:00:03.0/vfio", 0)?,
///     version: 1,
/// }))?;
/// section::Writer::new(writer.body()).dummy()?;
/// writer.footer(37)?;
/// assert_eq!(writer.into_inner().len(), 8 + 31 + 8 + 5);
/// # Ok::<(), vfio_migration::Error>(())
/// ```
#[derive(Debug)]
pub struct Writer<W> {
    output: W,
}

impl<W: Write> Writer<W> {
    /// Writes the first eight bytes.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Channel`], as all of this writer's errors in [`Phase::Section`].
    pub fn open(output: W) -> Result<Self> {
        let mut writer = Self { output };
        writer.put(&MAIN_MAGIC.to_be_bytes())?;
        writer.put(&MAIN_VERSION.to_be_bytes())?;
        Ok(writer)
    }

    /// Gives the output back.
    pub fn into_inner(self) -> W {
        self.output
    }

    /// Where the body of a section goes, once its header has been written.
    pub const fn body(&mut self) -> &mut W {
        &mut self.output
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.output.write_all(bytes).map_err(failed)
    }

    /// Writes a whole section of a VFIO device: its header with `id`, its number; what `body` writes; its
    /// footer.
    ///
    /// # Errors
    ///
    /// As for [`Writer::write`]; the body's.
    pub fn device_section<R>(
        &mut self,
        kind: SectionKind,
        id: u32,
        owner: &DeviceId,
        body: impl FnOnce(&mut W) -> Result<R>,
    ) -> Result<R> {
        self.write(&Event::Section(Section {
            kind,
            id,
            owner: owner.clone(),
            version: order::VERSION,
        }))?;
        let written = body(&mut self.output)?;
        self.footer(id)?;
        Ok(written)
    }

    /// Writes an event: of a section, its header.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Misuse`] where a name, a payload or a description is longer than a [`Reader`]
    /// accepts: then nothing has been written. [`ErrorKind::Channel`].
    pub fn write(&mut self, event: &Event) -> Result<()> {
        let bytes = match event {
            Event::Configuration { name } => {
                let len = bounded(name.len(), MAX_MACHINE_NAME)?;
                [&[CONFIGURATION], &len[..], name.as_bytes()].concat()
            }
            Event::Section(section) => section.encode(),
            Event::Command(command) => command.encode()?,
            Event::Eof => vec![EOF],
            Event::Description(json) => {
                let len = bounded(json.len(), MAX_DESCRIPTION)?;
                [&[DESCRIPTION], &len[..], json].concat()
            }
        };
        self.put(&bytes)
    }

    /// Writes the footer of the section with this id.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Channel`].
    pub fn footer(&mut self, id: u32) -> Result<()> {
        let [a, b, c, d] = id.to_be_bytes();
        self.put(&[FOOTER, a, b, c, d])
    }
}

/// A length field, where the length is within its bound.
fn bounded(len: usize, max: u32) -> Result<[u8; 4]> {
    match u32::try_from(len) {
        Ok(len) if len <= max => Ok(len.to_be_bytes()),
        _ => Err(misuse("too long for the main channel")),
    }
}

/// A command's or a reply's bytes: number, length, payload.
fn message(kind: u16, payload: &[u8]) -> Result<Vec<u8>> {
    let len = u16::try_from(payload.len())
        .map_err(|_| misuse("a payload has at most 65535 bytes"))?
        .to_be_bytes();
    Ok([&kind.to_be_bytes()[..], &len, payload].concat())
}

impl Section {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![self.kind as u8];
        bytes.extend(self.id.to_be_bytes());
        if self.kind.is_named() {
            let idstr = self.owner.idstr();
            bytes
                .push(u8::try_from(idstr.len()).expect("a DeviceId's idstr has at most 255 bytes"));
            bytes.extend(idstr.as_bytes());
            bytes.extend(self.owner.instance().to_be_bytes());
            bytes.extend(self.version.to_be_bytes());
        }
        bytes
    }
}

impl Command {
    fn encode(&self) -> Result<Vec<u8>> {
        let message = match self {
            Self::OpenReturnPath => message(OPEN_RETURN_PATH, &[]),
            Self::Ping(value) => message(PING, &value.to_be_bytes()),
            Self::SwitchoverStart => message(SWITCHOVER_START, &[]),
            Self::Other { command, payload } => message(*command, payload),
        }?;
        Ok([&[COMMAND], &message[..]].concat())
    }
}

/// A message on the return path, from the destination to the source.
///
/// ```
/// use vfio_migration::stream::Reply;
///
/// let mut path = Vec::new();
/// Reply::SwitchoverAck.write(&mut path)?;
/// assert_eq!(path, [0, 7, 0, 0]);
/// assert_eq!(Reply::read(&mut &path[..])?, Some(Reply::SwitchoverAck));
/// # Ok::<(), vfio_migration::Error>(())
/// ```
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Reply {
    /// The destination sends no more; 0 where all is well.
    Shut(u32),
    /// The answer to [`Command::Ping`].
    Pong(u32),
    /// The initial data has been loaded. One for all devices, or one for each: accept several.
    SwitchoverAck,
    /// Any other.
    Other {
        /// Its number.
        kind: u16,
        /// Its payload, of at most 65535 bytes.
        payload: Vec<u8>,
    },
}

impl Reply {
    /// Reads one message, or `None` where the path has ended between two.
    ///
    /// # Errors
    ///
    /// [`Violation::Section`] for a known message of a wrong length;
    /// [`Violation::SectionTruncated`], [`ErrorKind::Channel`]; all in [`Phase::Section`].
    pub fn read<R: Read + ?Sized>(input: &mut R) -> Result<Option<Self>> {
        let mut input = Counted::new(input);
        let Some(high) = input.byte_or_end()? else {
            return Ok(None);
        };
        let [low] = input.array()?;
        let kind = u16::from_be_bytes([high, low]);
        let len = u16::from_be_bytes(input.array()?);
        let payload = input.take_bytes(len.into())?;
        Ok(Some(match (kind, &payload[..]) {
            (SHUT, &[a, b, c, d]) => Self::Shut(u32::from_be_bytes([a, b, c, d])),
            (PONG, &[a, b, c, d]) => Self::Pong(u32::from_be_bytes([a, b, c, d])),
            (SWITCHOVER_ACK, []) => Self::SwitchoverAck,
            (SHUT | PONG | SWITCHOVER_ACK, _) => {
                return Err(refuse("a reply with a payload of a wrong length"));
            }
            _ => Self::Other { kind, payload },
        }))
    }

    /// Writes the message.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Misuse`] where the payload is too long; [`ErrorKind::Channel`]; both in
    /// [`Phase::Section`].
    pub fn write<W: Write + ?Sized>(&self, output: &mut W) -> Result<()> {
        let bytes = match self {
            Self::Shut(value) => message(SHUT, &value.to_be_bytes()),
            Self::Pong(value) => message(PONG, &value.to_be_bytes()),
            Self::SwitchoverAck => message(SWITCHOVER_ACK, &[]),
            Self::Other { kind, payload } => message(*kind, payload),
        }?;
        output.write_all(&bytes).map_err(failed)
    }
}

#[cfg(test)]
mod tests;
