//! The tags that delimit a device's data, and a config packet's data between two of them.
//!
//! ```text
//!   DEV_CONFIG_STATE be64 │ the config's bytes … │ END_OF_STATE be64
//! ```
//!
//! [`section`](crate::section) reads and writes all of the tags on the main channel; of a packet,
//! only the config's data has any.

use crate::error::{Error, Phase, Result, Violation};

/// The length of one tag, in bytes.
pub const TAG_LEN: usize = 8;

/// The 64-bit words that delimit a device's data, on the main channel and in a config packet.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u64)]
#[non_exhaustive]
pub enum Tag {
    /// Ends a piece.
    EndOfState = 0xffff_ffff_ef10_0001,
    /// The config's bytes come next, then [`Tag::EndOfState`].
    Config = 0xffff_ffff_ef10_0002,
    /// The migration has been set up; [`Tag::EndOfState`] comes next.
    Setup = 0xffff_ffff_ef10_0003,
    /// A length comes next, be64, and then that many bytes for the data fd.
    Data = 0xffff_ffff_ef10_0004,
    /// Ends a piece: the device's initial data has been sent.
    InitDataSent = 0xffff_ffff_ef10_0005,
    /// Ends a piece: what the config depends on has been loaded.
    ConfigLoadReady = 0xffff_ffff_ef10_0006,
    /// In [`Tag::Setup`]'s place where both ends carry PRE_COPY data over the multifd channels. No
    /// peer of QEMU's knows it, and refuses it.
    SetupOverChannels = 0xffff_ffff_ef20_0001,
    /// A count comes next, be32: how many packets of PRE_COPY data have been sent so far. Stands
    /// before [`Tag::InitDataSent`] where those go over the multifd channels.
    PrecopySent = 0xffff_ffff_ef20_0002,
}

impl Tag {
    /// Reads a tag; `None` where there is no such tag.
    #[must_use]
    pub fn decode(bytes: [u8; TAG_LEN]) -> Option<Self> {
        let value = u64::from_be_bytes(bytes);
        [
            Self::EndOfState,
            Self::Config,
            Self::Setup,
            Self::Data,
            Self::InitDataSent,
            Self::ConfigLoadReady,
            Self::SetupOverChannels,
            Self::PrecopySent,
        ]
        .into_iter()
        .find(|tag| tag.value() == value)
    }

    /// The tag's bytes.
    #[must_use]
    pub const fn encode(self) -> [u8; TAG_LEN] {
        self.value().to_be_bytes()
    }

    /// The tag's value.
    #[must_use]
    pub const fn value(self) -> u64 {
        self as u64
    }
}

/// The config's bytes in a config packet's data: what stands between its two tags.
///
/// Whether the loader takes all of them is for the caller to see: [`Violation::ConfigTrailing`].
///
/// ```
/// use vfio_migration::wire::{config_body, wrap_config};
///
/// assert_eq!(config_body(&wrap_config(b"config"))?, b"config");
/// assert!(config_body(b"config").is_err());
/// # Ok::<(), vfio_migration::Error>(())
/// ```
///
/// # Errors
///
/// [`Violation::ConfigFraming`], in [`Phase::Config`].
pub fn config_body(data: &[u8]) -> Result<&[u8]> {
    let refuse = |what| Error::protocol(Violation::ConfigFraming(what)).in_phase(Phase::Config);
    let body = data
        .strip_prefix(&Tag::Config.encode())
        .ok_or_else(|| refuse("no DEV_CONFIG_STATE at its front"))?;
    body.strip_suffix(&Tag::EndOfState.encode())
        .ok_or_else(|| refuse("no END_OF_STATE at its end"))
}

/// A config packet's data: the config's bytes between their two tags.
#[must_use]
pub fn wrap_config(config: &[u8]) -> Vec<u8> {
    [&Tag::Config.encode(), config, &Tag::EndOfState.encode()].concat()
}
