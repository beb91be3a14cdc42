//! Multifd packets and the devices' tags: bytes to values and values to bytes, all big-endian.
//!
//! ```text
//!  one channel:  hello(64)  { RAM packet | SYNC | device-state packet }*  end
//!
//!  hello         magic 4 │ version 4 │ uuid 16 │ id 1 │ unused 39
//!
//!  device state  magic 4 │ version 4 │ flags 4 │ idstr 256 │ instance 4 │ next_packet_size 4
//!                ╰───── prefix, 12 ──────────╯ ╰───── DeviceKey, 260 ─────╯
//!                version 4 = 0 │ idx 4 │ flags 4 │ data …     (12 + data = next_packet_size)
//!                ╰──── PacketHeader, 12 ───────╯
//!
//!  RAM, SYNC     prefix 12 │ pages_alloc 4 │ normal 4 │ next_packet_size 4 │ packet_num 8
//!                zero 4 │ unused 28 │ ramblock 256 │ offset 8 × P │ page data …
//! ```
//!
//! Channel threads call it for every packet. `inspect`, `replay` and the fuzzers walk whole files with
//! [`Walk`]. Nothing here does I/O, and nothing allocates by a length that a peer has named: this module
//! checks the lengths, and then the caller uses them. The values are those of QEMU 10 and 11. Where a peer
//! checks less than this module, the item says so.

mod framer;
mod ram;
mod tag;

pub use self::{
    framer::{Frame, Framer, Located, Step, Walk},
    ram::{PageSize, RAM_BYTES_PER_PACKET, RAM_HEADER_LEN, RamHeader, encode_sync},
    tag::{TAG_LEN, Tag, config_body, wrap_config},
};

use crate::{
    error::{Error, Result, Violation},
    id::DeviceId,
};

/// The first four bytes of each hello and of each packet.
pub const MULTIFD_MAGIC: u32 = 0x1122_3344;
/// The one multifd version there is.
pub const MULTIFD_VERSION: u32 = 1;
/// A hello's length in bytes.
pub const HELLO_LEN: usize = 64;
/// What each packet begins with, in bytes: magic, version, flags.
pub const PREFIX_LEN: usize = 12;
/// A device-state packet's multifd header in bytes, prefix included.
pub const DEVICE_STATE_HEADER_LEN: usize = 276;
/// The header inside a device-state packet's payload, in bytes.
pub const PACKET_HEADER_LEN: usize = 12;
/// Everything before a device-state packet's data, in bytes.
pub const DEVICE_PACKET_LEN: usize = DEVICE_STATE_HEADER_LEN + PACKET_HEADER_LEN;

/// Multifd flag: a barrier, no pages.
pub const FLAG_SYNC: u32 = 1 << 0;
/// Multifd flags: the method, one bit at most, by which page data is compressed.
pub const FLAG_COMPRESSION: u32 = 0x3e;
/// Multifd flag: a device's state rather than pages.
pub const FLAG_DEVICE_STATE: u32 = 1 << 6;

/// The one version of [`PacketHeader`] that there is.
pub const PACKET_VERSION: u32 = 0;
/// Packet flag: the data is the device's config, and nothing comes after it.
pub const PACKET_FLAG_CONFIG: u32 = 1;
/// The idx that no packet may have.
pub const INVALID_INDEX: u32 = u32::MAX;

/// The largest `next_packet_size` that is accepted by default, in bytes.
pub const DEFAULT_MAX_PACKET: u32 = 12 + (4 << 20);
/// The least that the maximum may be set to, in bytes: a peer's largest packet.
pub const LEAST_MAX_PACKET: u32 = 12 + (1 << 20);

/// [`PACKET_HEADER_LEN`] as the wire counts it.
const PACKET_HEADER_SIZE: u32 = 12;
const _: () = assert!(PACKET_HEADER_SIZE as usize == PACKET_HEADER_LEN);

/// Reads a field. `at` is a constant of ours and `bytes` an array that is long enough for it, so a
/// peer cannot make the slice fail.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(field(bytes, at))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(field(bytes, at))
}

fn put<const N: usize>(bytes: &mut [u8], at: usize, field: [u8; N]) {
    bytes[at..at + N].copy_from_slice(&field);
}

/// What stands before the first NUL.
fn until_nul(bytes: &[u8]) -> &[u8] {
    let len = bytes.iter().position(|&byte| byte == 0);
    &bytes[..len.unwrap_or(bytes.len())]
}

fn check_magic(bytes: &[u8]) -> Result<()> {
    let (magic, version) = (be32(bytes, 0), be32(bytes, 4));
    if magic != MULTIFD_MAGIC {
        return Err(Error::protocol(Violation::Magic(magic)));
    }
    if version != MULTIFD_VERSION {
        return Err(Error::protocol(Violation::Version(version)));
    }
    Ok(())
}

/// The first thing on a channel: whose it is, and which of the VM's channels it is.
///
/// The order in which the connections arrive is not the order of the ids.
///
/// ```
/// use vfio_migration::wire::Hello;
///
/// let hello = Hello { uuid: [0; 16], id: 1 };
/// assert_eq!(Hello::decode(&hello.encode())?, hello);
/// assert!(hello.check(&[0; 16], 2).is_ok());
/// assert!(hello.check(&[0; 16], 1).is_err());
/// # Ok::<(), vfio_migration::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Hello {
    /// The VM's uuid, all zero where it has none.
    pub uuid: [u8; 16],
    /// The channel's number among the VM's channels, from 0.
    pub id: u8,
}

impl Hello {
    /// Reads a hello. The unused bytes may hold anything.
    ///
    /// # Errors
    ///
    /// [`Violation::Magic`], [`Violation::Version`].
    pub fn decode(bytes: &[u8; HELLO_LEN]) -> Result<Self> {
        check_magic(bytes)?;
        Ok(Self {
            uuid: field(bytes, 8),
            id: bytes[24],
        })
    }

    /// The hello's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HELLO_LEN] {
        let mut bytes = [0; HELLO_LEN];
        put(&mut bytes, 0, MULTIFD_MAGIC.to_be_bytes());
        put(&mut bytes, 4, MULTIFD_VERSION.to_be_bytes());
        put(&mut bytes, 8, self.uuid);
        bytes[24] = self.id;
        bytes
    }

    /// Checks that the hello is for this VM and that its id is one of `channels`.
    ///
    /// That no id comes twice is for whoever sees all the hellos:
    /// [`Violation::ChannelIdTwice`].
    ///
    /// # Errors
    ///
    /// [`Violation::Uuid`], [`Violation::ChannelId`].
    pub fn check(&self, uuid: &[u8; 16], channels: u32) -> Result<()> {
        if self.uuid != *uuid {
            return Err(Error::protocol(Violation::Uuid));
        }
        if u32::from(self.id) >= channels {
            let id = self.id;
            return Err(Error::protocol(Violation::ChannelId { id, channels }));
        }
        Ok(())
    }
}

/// What a packet's prefix says that the packet is.
///
/// ```
/// use vfio_migration::wire::Kind;
///
/// let prefix = Kind::DeviceState.encode();
/// assert_eq!(prefix, [0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1, 0, 0, 0, 0x40]);
/// assert_eq!(Kind::decode(&prefix)?, Kind::DeviceState);
/// # Ok::<(), vfio_migration::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// A piece of a device's state.
    DeviceState,
    /// Pages.
    Ram {
        /// The compression method, one bit of [`FLAG_COMPRESSION`], or 0 for none.
        flags: u32,
    },
    /// A barrier across all channels. Laid out like a RAM packet without pages.
    Sync,
}

impl Kind {
    /// Reads a packet's first 12 bytes.
    ///
    /// # Errors
    ///
    /// [`Violation::Magic`], [`Violation::Version`], [`Violation::Compressed`];
    /// [`Violation::Flags`] for unknown flags, for two compression methods, and for SYNC together
    /// with anything else.
    pub fn decode(prefix: &[u8; PREFIX_LEN]) -> Result<Self> {
        check_magic(prefix)?;
        let flags = be32(prefix, 8);
        let compression = flags & FLAG_COMPRESSION;
        match flags & !FLAG_COMPRESSION {
            FLAG_DEVICE_STATE if compression == 0 => Ok(Self::DeviceState),
            FLAG_DEVICE_STATE => Err(Error::protocol(Violation::Compressed(flags))),
            FLAG_SYNC if compression == 0 => Ok(Self::Sync),
            0 if compression.count_ones() <= 1 => Ok(Self::Ram { flags }),
            _ => Err(Error::protocol(Violation::Flags(flags))),
        }
    }

    /// A packet's first 12 bytes.
    #[must_use]
    pub fn encode(self) -> [u8; PREFIX_LEN] {
        let flags = match self {
            Self::DeviceState => FLAG_DEVICE_STATE,
            Self::Ram { flags } => flags,
            Self::Sync => FLAG_SYNC,
        };
        let mut bytes = [0; PREFIX_LEN];
        put(&mut bytes, 0, MULTIFD_MAGIC.to_be_bytes());
        put(&mut bytes, 4, MULTIFD_VERSION.to_be_bytes());
        put(&mut bytes, 8, flags.to_be_bytes());
        bytes
    }
}

/// A device's name as 260 bytes of a packet: two keys are equal exactly where the names are.
///
/// Only what stands before the first NUL is the name. What a peer leaves behind it is made 0 when
/// the key is read, so that keys can be compared and hashed whole, without a look inside.
///
/// ```
/// use vfio_migration::{DeviceId, wire::DeviceKey};
///
/// let id = DeviceId::new("0000:00:03.0/vfio", 7)?;
/// let key = DeviceKey::new(&id);
/// assert_eq!((key.idstr(), key.instance()), (&b"0000:00:03.0/vfio"[..], 7));
/// assert_eq!(key.id(), Some(id));
/// assert_eq!(DeviceKey::decode(key.as_bytes())?, key);
/// # Ok::<(), vfio_migration::Error>(())
/// ```
#[derive(Clone, Copy, Eq, Hash, PartialEq)]
pub struct DeviceKey([u8; Self::LEN]);

impl DeviceKey {
    /// A key's length in bytes: the idstr with its padding, and the instance id.
    pub const LEN: usize = Self::IDSTR_LEN + 4;
    /// Where the idstr and its padding end. The last byte is 0.
    const IDSTR_LEN: usize = DeviceId::MAX_IDSTR + 1;

    /// The key of a device.
    #[must_use]
    pub fn new(id: &DeviceId) -> Self {
        Self::from_parts(id.idstr().as_bytes(), id.instance())
    }

    /// `idstr` has at most [`DeviceId::MAX_IDSTR`] bytes: a device's own, or a checked header's.
    fn from_parts(idstr: &[u8], instance: u32) -> Self {
        let idstr = until_nul(idstr);
        let mut bytes = [0; Self::LEN];
        bytes[..idstr.len()].copy_from_slice(idstr);
        put(&mut bytes, Self::IDSTR_LEN, instance.to_be_bytes());
        Self(bytes)
    }

    /// Reads a key from bytes 12 to 271 of a device-state packet.
    ///
    /// # Errors
    ///
    /// [`Violation::Idstr`] where byte 255 is not 0.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self> {
        let (idstr, instance) = split_key(bytes)?;
        Ok(Self::from_parts(idstr, instance))
    }

    /// The key as it stands in a packet.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }

    /// The idstr, without its padding. It may be empty, and need not be text.
    #[must_use]
    pub fn idstr(&self) -> &[u8] {
        until_nul(&self.0[..Self::IDSTR_LEN])
    }

    /// The instance id.
    #[must_use]
    pub fn instance(&self) -> u32 {
        be32(&self.0, Self::IDSTR_LEN)
    }

    /// The device of this name, or `None` where no device can have it: empty, or not UTF-8.
    #[must_use]
    pub fn id(&self) -> Option<DeviceId> {
        let idstr = std::str::from_utf8(self.idstr()).ok()?;
        DeviceId::new(idstr, self.instance()).ok()
    }

    /// The error for a packet whose device is not here.
    #[must_use]
    pub fn unknown(&self) -> Error {
        Error::protocol(Violation::UnknownDevice {
            idstr: String::from_utf8_lossy(self.idstr()).into_owned(),
            instance: self.instance(),
        })
    }
}

impl std::fmt::Debug for DeviceKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "DeviceKey({}#{})",
            self.idstr().escape_ascii(),
            self.instance()
        )
    }
}

/// The idstr and the instance id of a key, where byte 255 is 0.
fn split_key(bytes: &[u8]) -> Result<(&[u8], u32)> {
    let (idstr, instance) = bytes.split_at(DeviceKey::IDSTR_LEN);
    if idstr[DeviceId::MAX_IDSTR] != 0 {
        return Err(Error::protocol(Violation::Idstr));
    }
    Ok((until_nul(idstr), be32(instance, 0)))
}

/// A device-state packet's multifd header: 276 bytes.
///
/// ```
/// use vfio_migration::{
///     DeviceId,
///     wire::{DEFAULT_MAX_PACKET, DeviceKey, DeviceStateHeader},
/// };
///
/// let key = DeviceKey::new(&DeviceId::new("0000:00:03.0/vfio", 0)?);
/// let bytes = DeviceStateHeader::encode(&key, 4144);
/// let header = DeviceStateHeader::decode(&bytes, DEFAULT_MAX_PACKET)?;
/// assert_eq!((header.key(), header.len), (key, 4144));
/// assert!(DeviceStateHeader::decode(&bytes, 4143).is_err());
/// # Ok::<(), vfio_migration::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DeviceStateHeader<'a> {
    /// The device's idstr, up to its first NUL.
    pub idstr: &'a [u8],
    /// The device's instance id.
    pub instance: u32,
    /// `next_packet_size`: the payload's length in bytes, its own 12-byte header included.
    pub len: u32,
}

impl<'a> DeviceStateHeader<'a> {
    /// Reads a header, and refuses a payload above `max_packet` bytes.
    ///
    /// A peer has no such maximum: it allocates what the header asks for.
    ///
    /// # Errors
    ///
    /// Those of [`Kind::decode`]; [`Violation::Flags`] where the packet is of another kind;
    /// [`Violation::Idstr`], [`Violation::EmptyPacket`], [`Violation::PacketTooLarge`].
    pub fn decode(bytes: &'a [u8; DEVICE_STATE_HEADER_LEN], max_packet: u32) -> Result<Self> {
        if Kind::decode(&field(bytes, 0))? != Kind::DeviceState {
            return Err(Error::protocol(Violation::Flags(be32(bytes, 8))));
        }
        let (idstr, instance) = split_key(&bytes[PREFIX_LEN..PREFIX_LEN + DeviceKey::LEN])?;
        let len = be32(bytes, PREFIX_LEN + DeviceKey::LEN);
        let header = Self {
            idstr,
            instance,
            len,
        };
        if len == 0 {
            return Err(header.refuse(Violation::EmptyPacket));
        }
        if len > max_packet {
            let max = max_packet;
            return Err(header.refuse(Violation::PacketTooLarge { len, max }));
        }
        Ok(header)
    }

    /// The header of a packet of `key`'s device with a payload of `len` bytes, which must not be 0.
    #[must_use]
    pub fn encode(key: &DeviceKey, len: u32) -> [u8; DEVICE_STATE_HEADER_LEN] {
        let mut bytes = [0; DEVICE_STATE_HEADER_LEN];
        put(&mut bytes, 0, Kind::DeviceState.encode());
        put(&mut bytes, PREFIX_LEN, key.0);
        put(&mut bytes, PREFIX_LEN + DeviceKey::LEN, len.to_be_bytes());
        bytes
    }

    /// The length in bytes of the packet's data, which comes behind a [`PacketHeader`].
    ///
    /// # Errors
    ///
    /// [`Violation::PacketTooShort`] where there is no room for a [`PacketHeader`].
    pub fn data_len(&self) -> Result<u32> {
        self.len
            .checked_sub(PACKET_HEADER_SIZE)
            .ok_or_else(|| self.refuse(Violation::PacketTooShort(self.len)))
    }

    /// The device's key.
    ///
    /// # Panics
    ///
    /// Where `idstr` has been replaced by one above [`DeviceId::MAX_IDSTR`] bytes. A header that
    /// was decoded has a shorter one.
    #[must_use]
    pub fn key(&self) -> DeviceKey {
        DeviceKey::from_parts(self.idstr, self.instance)
    }

    /// The error for this packet, naming its device where a device can have that name.
    fn refuse(&self, violation: Violation) -> Error {
        let error = Error::protocol(violation);
        match self.key().id() {
            Some(id) => error.on_device(&id),
            None => error,
        }
    }
}

/// What a device-state packet's payload begins with: its place in the device's state.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PacketHeader {
    /// The packet's place, from 0 for each device and without gaps.
    pub index: u32,
    /// Whether this is the config packet, the one with the highest index.
    pub config: bool,
}

impl PacketHeader {
    /// Reads a payload's first 12 bytes.
    ///
    /// # Errors
    ///
    /// [`Violation::PacketVersion`], [`Violation::InvalidIndex`], [`Violation::PacketFlags`].
    pub fn decode(bytes: &[u8; PACKET_HEADER_LEN]) -> Result<Self> {
        let (version, index, flags) = (be32(bytes, 0), be32(bytes, 4), be32(bytes, 8));
        if version != PACKET_VERSION {
            return Err(Error::protocol(Violation::PacketVersion(version)));
        }
        if index == INVALID_INDEX {
            return Err(Error::protocol(Violation::InvalidIndex));
        }
        if flags & !PACKET_FLAG_CONFIG != 0 {
            return Err(Error::protocol(Violation::PacketFlags(flags)).at_index(index));
        }
        let config = flags & PACKET_FLAG_CONFIG != 0;
        Ok(Self { index, config })
    }

    /// A payload's first 12 bytes.
    #[must_use]
    pub fn encode(self) -> [u8; PACKET_HEADER_LEN] {
        let mut bytes = [0; PACKET_HEADER_LEN];
        put(&mut bytes, 0, PACKET_VERSION.to_be_bytes());
        put(&mut bytes, 4, self.index.to_be_bytes());
        put(&mut bytes, 8, u32::from(self.config).to_be_bytes());
        bytes
    }
}

/// Both headers of a device-state packet: all 288 bytes that come before its data.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DevicePacket<'a> {
    /// The multifd header: which device, how long.
    pub header: DeviceStateHeader<'a>,
    /// The payload's own header: which packet.
    pub packet: PacketHeader,
    /// The length of the data that follows, in bytes.
    pub data_len: u32,
}

impl<'a> DevicePacket<'a> {
    /// Reads both headers.
    ///
    /// A `next_packet_size` of 1 to 11 has no room for the second header, and the bytes that would
    /// be taken for it are the next packet's; so whoever reads from a connection reads 276 bytes,
    /// decodes those, and reads 12 more only where `len` allows it.
    ///
    /// # Errors
    ///
    /// Those of [`DeviceStateHeader::decode`], of [`DeviceStateHeader::data_len`], and of
    /// [`PacketHeader::decode`], the latter two naming the device.
    pub fn decode(bytes: &'a [u8; DEVICE_PACKET_LEN], max_packet: u32) -> Result<Self> {
        let (first, second) = bytes
            .split_first_chunk()
            .expect("288 bytes begin with 276 bytes");
        let header = DeviceStateHeader::decode(first, max_packet)?;
        let data_len = header.data_len()?;
        let packet =
            PacketHeader::decode(&field(second, 0)).map_err(|error| match header.key().id() {
                Some(id) => error.on_device(&id),
                None => error,
            })?;
        Ok(Self {
            header,
            packet,
            data_len,
        })
    }
}

/// Both headers of a device-state packet with `data_len` bytes of data.
///
/// ```
/// use vfio_migration::{DeviceId, wire};
///
/// let key = wire::DeviceKey::new(&DeviceId::new("0000:00:03.0/vfio", 0)?);
/// let bytes = wire::encode_packet(&key, 3, true, 4132);
/// let packet = wire::DevicePacket::decode(&bytes, wire::DEFAULT_MAX_PACKET)?;
/// assert_eq!((packet.packet.index, packet.packet.config), (3, true));
/// assert_eq!((packet.header.len, packet.data_len), (4144, 4132));
/// # Ok::<(), vfio_migration::Error>(())
/// ```
///
/// # Panics
///
/// Where `index` is [`INVALID_INDEX`], or `data_len` within 12 bytes of `u32::MAX`.
#[must_use]
pub fn encode_packet(
    key: &DeviceKey,
    index: u32,
    config: bool,
    data_len: u32,
) -> [u8; DEVICE_PACKET_LEN] {
    assert_ne!(index, INVALID_INDEX, "no packet has this idx");
    let len = data_len
        .checked_add(PACKET_HEADER_SIZE)
        .expect("the buffer size is bounded far below 4 GiB when it is set");
    let mut bytes = [0; DEVICE_PACKET_LEN];
    put(&mut bytes, 0, DeviceStateHeader::encode(key, len));
    let packet = PacketHeader { index, config };
    put(&mut bytes, DEVICE_STATE_HEADER_LEN, packet.encode());
    bytes
}

#[cfg(test)]
mod tests;
