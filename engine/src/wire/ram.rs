//! RAM and SYNC packets: read only as far as is needed to walk past them.
//!
//! ```text
//!   0        12            16             20                 24           32     36
//!   ┌────────┬─────────────┬──────────────┬──────────────────┬────────────┬──────┬┈
//!   │ prefix │ pages_alloc │ normal_pages │ next_packet_size │ packet_num │ zero │
//!   └────────┴─────────────┴──────────────┴──────────────────┴────────────┴──────┴┈
//!  36        64             320
//!   ┬────────┬──────────────┬────────────────┬────────────────────────────────┐
//!   │ unused │ ramblock 256 │ offset u64 × P │ next_packet_size bytes of data │
//!   ┴────────┴──────────────┴────────────────┴────────────────────────────────┘
//!                                             P = 512 KiB / the target's page size
//! ```
//!
//! A VMM migrates its RAM by itself. The engine hands these packets over untouched, so it must know where
//! they end. `offset` has all of its P entries, whatever the counts say.

use super::{FLAG_COMPRESSION, FLAG_SYNC, Kind, PREFIX_LEN, be32, be64, field, put, until_nul};
#[cfg(doc)]
use crate::error::ErrorKind;
use crate::error::{Error, Phase, Result, Violation};

/// The pages of one packet, uncompressed, have at most this many bytes.
pub const RAM_BYTES_PER_PACKET: u32 = 512 << 10;
/// A RAM or SYNC packet's header in bytes, prefix included and offsets left out.
pub const RAM_HEADER_LEN: usize = 320;

/// Where the ramblock's name stands.
const RAMBLOCK_AT: usize = 64;
/// The most page data that a compressed packet may have, in bytes. What cannot be compressed grows
/// by a little per page; twice is far beyond any method's worst case.
const MAX_COMPRESSED: u32 = 2 * RAM_BYTES_PER_PACKET;

/// The page size of the VM's architecture, which RAM and SYNC packets depend on.
///
/// ```
/// use vfio_migration::wire::PageSize;
///
/// assert_eq!(PageSize::new(4096)?.pages(), 128);
/// assert_eq!(PageSize::new(4096)?.ram_header_len(), 1344);
/// assert!(PageSize::new(5000).is_err());
/// # Ok::<(), vfio_migration::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PageSize(u32);

impl PageSize {
    /// Takes a page size in bytes.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Misuse`] where it is no power of two between 4 KiB and 512 KiB.
    pub fn new(bytes: u32) -> Result<Self> {
        if !bytes.is_power_of_two() || !(4096..=RAM_BYTES_PER_PACKET).contains(&bytes) {
            return Err(Error::misuse(
                Phase::Setup,
                "a page size is a power of two between 4 KiB and 512 KiB",
            ));
        }
        Ok(Self(bytes))
    }

    /// The page size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        self.0
    }

    /// How many pages a packet has at most, and how many offsets always.
    #[must_use]
    pub const fn pages(self) -> u32 {
        RAM_BYTES_PER_PACKET / self.0
    }

    /// A RAM or SYNC packet's header in bytes, offsets included.
    #[must_use]
    pub const fn ram_header_len(self) -> usize {
        RAM_HEADER_LEN + 8 * self.pages() as usize
    }
}

/// A RAM or SYNC packet's header, without its offsets.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RamHeader<'a> {
    /// [`Kind::Ram`] or [`Kind::Sync`].
    pub kind: Kind,
    /// How many pages the source had room for.
    pub pages_alloc: u32,
    /// How many pages' data follow.
    pub normal_pages: u32,
    /// The length of the page data in bytes.
    pub next_packet_size: u32,
    /// The packet's number over all channels.
    pub packet_num: u64,
    /// How many pages are only said to be zero.
    pub zero_pages: u32,
    /// The name of the RAM block, up to its first NUL; empty in a SYNC.
    pub ramblock: &'a [u8],
}

impl<'a> RamHeader<'a> {
    /// Reads a header.
    ///
    /// # Errors
    ///
    /// Those of [`Kind::decode`]; [`Violation::Flags`] for a device-state packet;
    /// [`Violation::RamLayout`] where counts and sizes do not fit each other.
    pub fn decode(bytes: &'a [u8; RAM_HEADER_LEN], page_size: PageSize) -> Result<Self> {
        let refuse = |what| Err(Error::protocol(Violation::RamLayout(what)));
        let kind = Kind::decode(&field(bytes, 0))?;
        let ramblock = &bytes[RAMBLOCK_AT..];
        let header = Self {
            kind,
            pages_alloc: be32(bytes, 12),
            normal_pages: be32(bytes, 16),
            next_packet_size: be32(bytes, 20),
            packet_num: be64(bytes, 24),
            zero_pages: be32(bytes, 32),
            ramblock: until_nul(ramblock),
        };
        let pages = page_size.pages();
        if header.pages_alloc > pages || header.normal_pages > pages {
            return refuse("more pages than a packet holds");
        }
        if header.zero_pages > pages - header.normal_pages {
            return refuse("more zero pages than a packet holds");
        }
        if ramblock.last() != Some(&0) {
            return refuse("ramblock without a NUL at its end");
        }
        let size = header.next_packet_size;
        match kind {
            Kind::DeviceState => Err(Error::protocol(Violation::Flags(be32(bytes, 8)))),
            Kind::Sync if header.normal_pages != 0 || header.zero_pages != 0 || size != 0 => {
                refuse("a SYNC with pages")
            }
            // At most P pages of 512 KiB / P bytes: the product fits.
            Kind::Ram { flags: 0 } if size != header.normal_pages * page_size.bytes() => {
                refuse("the data's length is not that of its pages")
            }
            Kind::Ram { .. } if size > MAX_COMPRESSED => {
                refuse("more compressed data than a packet's pages can make")
            }
            Kind::Ram { .. } | Kind::Sync => Ok(header),
        }
    }

    /// The header's bytes. The offsets, [`PageSize::pages`] of them, are the caller's to add.
    ///
    /// # Panics
    ///
    /// Where `ramblock` has more than 255 bytes. A header that was decoded has fewer.
    #[must_use]
    pub fn encode(&self) -> [u8; RAM_HEADER_LEN] {
        assert!(
            self.ramblock.len() < RAM_HEADER_LEN - RAMBLOCK_AT,
            "a ramblock's name has at most 255 bytes"
        );
        let mut bytes = [0; RAM_HEADER_LEN];
        put(&mut bytes, 0, self.kind.encode());
        put(&mut bytes, PREFIX_LEN, self.pages_alloc.to_be_bytes());
        put(&mut bytes, 16, self.normal_pages.to_be_bytes());
        put(&mut bytes, 20, self.next_packet_size.to_be_bytes());
        put(&mut bytes, 24, self.packet_num.to_be_bytes());
        put(&mut bytes, 32, self.zero_pages.to_be_bytes());
        bytes[RAMBLOCK_AT..][..self.ramblock.len()].copy_from_slice(self.ramblock);
        bytes
    }
}

/// A SYNC packet, whole: what a source sends on each channel straight after its hello.
///
/// ```
/// use vfio_migration::wire::{PageSize, encode_sync};
///
/// assert_eq!(encode_sync(PageSize::new(65536)?, 0).len(), 320 + 8 * 8);
/// # Ok::<(), vfio_migration::Error>(())
/// ```
#[must_use]
pub fn encode_sync(page_size: PageSize, packet_num: u64) -> Vec<u8> {
    let header = RamHeader {
        kind: Kind::Sync,
        pages_alloc: 0,
        normal_pages: 0,
        next_packet_size: 0,
        packet_num,
        zero_pages: 0,
        ramblock: b"",
    };
    let mut bytes = header.encode().to_vec();
    bytes.resize(page_size.ram_header_len(), 0);
    bytes
}

const _: () = assert!(FLAG_SYNC & FLAG_COMPRESSION == 0);
