//! One channel's bytes cut into frames, without I/O.
//!
//! ```text
//!   decode(bytes of the frame so far) ──▶ More(n): have n bytes of it, then ask again
//!                                    └──▶ Frame { frame, header_len, payload_len }
//!                                         the next frame begins header_len + payload_len further
//! ```
//!
//! `inspect`, `replay` and a fuzzer [`Walk`] over a whole file. A caller that reads from a connection uses
//! the [`Framer`], and takes the payload where it wants it.

use super::{
    DEVICE_PACKET_LEN, DEVICE_STATE_HEADER_LEN, DevicePacket, DeviceStateHeader, HELLO_LEN, Hello,
    Kind, PREFIX_LEN, PageSize, RamHeader,
};
use crate::error::{Error, Result, Violation};

/// One frame's header, decoded.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Frame<'a> {
    /// The channel's first 64 bytes.
    Hello(Hello),
    /// A piece of a device's state; its data is the frame's payload.
    DeviceState(DevicePacket<'a>),
    /// Pages; their data is the frame's payload.
    Ram(RamHeader<'a>),
    /// A barrier across all channels, without a payload.
    Sync {
        /// The packet's number over all channels.
        packet_num: u64,
    },
}

/// What a [`Framer`] makes of the bytes so far.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step<'a> {
    /// The frame's first bytes, as many as this, are needed to go on: always more than were given.
    More(usize),
    /// The header is whole.
    Frame {
        /// What the header says.
        frame: Frame<'a>,
        /// The header's length in bytes.
        header_len: usize,
        /// The length of what follows it, in bytes, until the next frame.
        payload_len: u32,
    },
}

/// Decodes a channel's frames one after another: first a hello, then packets.
///
/// ```
/// use vfio_migration::wire::{DEFAULT_MAX_PACKET, Framer, Hello, Step};
///
/// let mut framer = Framer::new(None, DEFAULT_MAX_PACKET);
/// assert_eq!(framer.decode(&[])?, Step::More(64));
/// let hello = Hello { uuid: [0; 16], id: 0 }.encode();
/// assert!(matches!(framer.decode(&hello)?, Step::Frame { header_len: 64, payload_len: 0, .. }));
/// assert_eq!(framer.decode(&[])?, Step::More(12));
/// # Ok::<(), vfio_migration::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Framer {
    page_size: Option<PageSize>,
    max_packet: u32,
    greeted: bool,
}

impl Framer {
    /// Makes a framer for one channel.
    ///
    /// Without the target's page size nobody can tell where a RAM or SYNC packet ends, and such a
    /// packet is refused. `max_packet` is the largest `next_packet_size` of a device-state packet,
    /// in bytes.
    #[must_use]
    pub const fn new(page_size: Option<PageSize>, max_packet: u32) -> Self {
        Self {
            page_size,
            max_packet,
            greeted: false,
        }
    }

    /// Decodes the frame that begins at `bytes[0]`; what lies behind its header is not looked at.
    ///
    /// # Errors
    ///
    /// Those of [`Hello::decode`], [`Kind::decode`], [`DevicePacket::decode`] and
    /// [`RamHeader::decode`]; [`Violation::RamPacket`] without a page size. A channel cannot be
    /// read any further after an error.
    pub fn decode<'a>(&mut self, bytes: &'a [u8]) -> Result<Step<'a>> {
        if !self.greeted {
            let Some(hello) = bytes.first_chunk() else {
                return Ok(Step::More(HELLO_LEN));
            };
            let frame = Frame::Hello(Hello::decode(hello)?);
            self.greeted = true;
            return Ok(Step::Frame {
                frame,
                header_len: HELLO_LEN,
                payload_len: 0,
            });
        }
        let Some(prefix) = bytes.first_chunk() else {
            return Ok(Step::More(PREFIX_LEN));
        };
        match Kind::decode(prefix)? {
            Kind::DeviceState => self.device_state(bytes),
            Kind::Ram { .. } | Kind::Sync => self.ram(bytes),
        }
    }

    fn device_state<'a>(&self, bytes: &'a [u8]) -> Result<Step<'a>> {
        let Some(header) = bytes.first_chunk() else {
            return Ok(Step::More(DEVICE_STATE_HEADER_LEN));
        };
        // Looked at on its own, for too short a packet has no second header to wait for.
        DeviceStateHeader::decode(header, self.max_packet)?.data_len()?;
        let Some(both) = bytes.first_chunk() else {
            return Ok(Step::More(DEVICE_PACKET_LEN));
        };
        let packet = DevicePacket::decode(both, self.max_packet)?;
        Ok(Step::Frame {
            frame: Frame::DeviceState(packet),
            header_len: DEVICE_PACKET_LEN,
            payload_len: packet.data_len,
        })
    }

    fn ram<'a>(&self, bytes: &'a [u8]) -> Result<Step<'a>> {
        let Some(page_size) = self.page_size else {
            return Err(Error::protocol(Violation::RamPacket));
        };
        let header_len = page_size.ram_header_len();
        let Some(header) = bytes.first_chunk().filter(|_| bytes.len() >= header_len) else {
            return Ok(Step::More(header_len));
        };
        let ram = RamHeader::decode(header, page_size)?;
        let frame = match ram.kind {
            Kind::Sync => Frame::Sync {
                packet_num: ram.packet_num,
            },
            Kind::Ram { .. } | Kind::DeviceState => Frame::Ram(ram),
        };
        Ok(Step::Frame {
            frame,
            header_len,
            payload_len: ram.next_packet_size,
        })
    }

    /// Checks that the channel may end where `left` bytes of an unfinished frame remain: only with
    /// none, and not before the hello.
    ///
    /// # Errors
    ///
    /// [`Violation::Truncated`].
    pub fn end(&self, left: usize) -> Result<()> {
        if self.greeted && left == 0 {
            return Ok(());
        }
        Err(Error::protocol(Violation::Truncated))
    }
}

/// A frame and where it stands in its channel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Located<'a> {
    /// How many bytes come before the frame.
    pub offset: usize,
    /// The header, decoded.
    pub frame: Frame<'a>,
    /// The header's bytes, a RAM packet's offsets included.
    pub header: &'a [u8],
    /// What follows the header.
    pub payload: &'a [u8],
}

/// The frames of a recorded channel, from its hello to its last byte.
///
/// It ends after the first error; [`Walk::offset`] then still says where the bad frame begins.
///
/// ```
/// use vfio_migration::{
///     DeviceId,
///     wire::{DEFAULT_MAX_PACKET, DeviceKey, Framer, Hello, Walk, encode_packet},
/// };
///
/// let key = DeviceKey::new(&DeviceId::new("0000:00:03.0/vfio", 0)?);
/// let mut channel = Hello { uuid: [0; 16], id: 0 }.encode().to_vec();
/// channel.extend(encode_packet(&key, 0, false, 4));
/// channel.extend(b"data");
///
/// let mut walk = Walk::new(&channel, Framer::new(None, DEFAULT_MAX_PACKET));
/// assert_eq!(walk.next().expect("a hello")?.header.len(), 64);
/// assert_eq!(walk.next().expect("a packet")?.payload, b"data");
/// assert!(walk.next().is_none());
/// # Ok::<(), vfio_migration::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Walk<'a> {
    bytes: &'a [u8],
    offset: usize,
    framer: Framer,
    failed: bool,
}

impl<'a> Walk<'a> {
    /// Begins at a channel's first byte.
    #[must_use]
    pub const fn new(bytes: &'a [u8], framer: Framer) -> Self {
        Self {
            bytes,
            offset: 0,
            framer,
            failed: false,
        }
    }

    /// Where the next frame begins, in bytes from the channel's first.
    #[must_use]
    pub const fn offset(&self) -> usize {
        self.offset
    }

    fn step(&mut self) -> Result<Option<Located<'a>>> {
        let rest = &self.bytes[self.offset..];
        if rest.is_empty() {
            return self.framer.end(0).map(|()| None);
        }
        let truncated = || Error::protocol(Violation::Truncated);
        let (frame, header_len, payload_len) = match self.framer.decode(rest)? {
            Step::More(_) => return Err(truncated()),
            Step::Frame {
                frame,
                header_len,
                payload_len,
            } => (frame, header_len, payload_len as usize),
        };
        let (header, rest) = rest.split_at(header_len);
        let payload = rest.get(..payload_len).ok_or_else(truncated)?;
        let offset = self.offset;
        self.offset += header_len + payload_len;
        Ok(Some(Located {
            offset,
            frame,
            header,
            payload,
        }))
    }
}

impl<'a> Iterator for Walk<'a> {
    type Item = Result<Located<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let step = self.step();
        self.failed = step.is_err();
        step.transpose()
    }
}
