//! What several commands' arguments have in common: sizes, times, the backend.
//!
//! Pure functions that turn a text into a value, or into a message for whoever typed it.

use std::{path::Path, time::Duration};

use clap::ValueEnum;
use vfio_migration::{
    Backend, Settings, Spill, Writer,
    estimate::MAX_DATA_SIZE,
    migration::{Capabilities, OnOffAuto},
    wire::PageSize,
};

/// What moves the bytes in and out of the devices.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(crate) enum BackendArg {
    /// io_uring where the host has it, threads otherwise.
    #[default]
    Auto,
    /// io_uring, or fail.
    Uring,
    /// A thread for each device, with plain reads and writes.
    Blocking,
}

impl From<BackendArg> for Backend {
    fn from(backend: BackendArg) -> Self {
        match backend {
            BackendArg::Auto => Self::Auto,
            BackendArg::Uring => Self::Uring,
            BackendArg::Blocking => Self::Blocking,
        }
    }
}

/// Which thread writes what has been received to a device.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(crate) enum WriterArg {
    /// One thread for all devices, through its ring.
    #[default]
    Ring,
    /// The channel that has received it, to a device that is quick. A driver that then stands still holds up that
    /// channel.
    Auto,
}

impl From<WriterArg> for Writer {
    fn from(writer: WriterArg) -> Self {
        match writer {
            WriterArg::Ring => Self::Ring,
            WriterArg::Auto => Self::Auto,
        }
    }
}

/// Where a destination's packets go when its budget is spent.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct SpillArgs {
    /// Where packets go when the budget is spent: auto, off, memfd, or a directory
    ///
    /// If RAM packets and their SYNCs share the channels, a packet that waits can hold up the one that
    /// its device needs next. auto: to memory on such channels, and nowhere on others. memfd, or a
    /// directory (for a file without a name): on all channels.
    #[arg(long, value_name = "WHERE", default_value = "auto", value_parser = spill)]
    spill: Spill,
    /// How much may be spilled at one time, in pieces of 64KiB
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = size)]
    spill_limit: u64,
}

impl SpillArgs {
    /// Puts it into a session's settings.
    pub(crate) fn set(&self, settings: &mut Settings) {
        settings.spill = self.spill.clone();
        settings.spill_limit = self.spill_limit;
    }
}

impl Default for SpillArgs {
    fn default() -> Self {
        Self {
            spill: Spill::Auto,
            spill_limit: 1 << 30,
        }
    }
}

/// What both ends of a migration have to be told.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub(crate) struct CapabilitiesArgs {
    /// Load the configs only after everything else; must be the same on both sides
    #[arg(long)]
    pub(crate) config_after_iterables: bool,
    /// First send PRE_COPY data, while the devices still run, over the channels; must be the same on
    /// both sides
    ///
    /// Otherwise all of a device's state is read after the device has stopped. No other program can send
    /// or receive PRE_COPY data so.
    #[arg(long)]
    pub(crate) precopy_over_channels: bool,
}

impl CapabilitiesArgs {
    /// As the engine takes it.
    pub(crate) fn capabilities(self) -> Capabilities {
        let mut capabilities = Capabilities::default();
        capabilities.config_after_iterables = if self.config_after_iterables {
            OnOffAuto::On
        } else {
            OnOffAuto::Off
        };
        capabilities.precopy_over_channels = self.precopy_over_channels;
        capabilities
    }
}

/// Reads where to spill.
fn spill(text: &str) -> Result<Spill, String> {
    match text {
        "auto" => Ok(Spill::Auto),
        "off" => Ok(Spill::Off),
        "memfd" => Ok(Spill::Memfd),
        directory if Path::new(directory).is_dir() => Ok(Spill::Directory(directory.into())),
        _ => Err("neither auto, off nor memfd, and no directory of that name".into()),
    }
}

/// Reads the target's page size.
pub(crate) fn page_size(text: &str) -> Result<PageSize, String> {
    let bytes = u32::try_from(size(text)?).unwrap_or(u32::MAX);
    PageSize::new(bytes).map_err(|error| error.kind().to_string())
}

/// Reads a size: `4096`, `64KiB`, `1.5GiB`, `16M`. All prefixes are powers of 1024.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    parse_size::Config::new()
        .with_binary()
        .parse_size(text)
        .map_err(|error| format!("{error}; a size is like 4096, 64KiB, 1.5GiB"))
}

/// Reads the size of a device's state.
pub(crate) fn state(text: &str) -> Result<u64, String> {
    match size(text)? {
        len if len <= MAX_DATA_SIZE => Ok(len),
        _ => Err("a device's state has at most 1024 TiB".into()),
    }
}

/// Reads a size of something that is held in memory, and is not empty.
pub(crate) fn memory(text: &str) -> Result<usize, String> {
    match usize::try_from(size(text)?) {
        Ok(0) => Err("at least 1 byte".into()),
        // What an allocation can have at most.
        Ok(len) if isize::try_from(len).is_ok() => Ok(len),
        _ => Err("more than this machine can address".into()),
    }
}

/// Reads a packet's size: of its data, without headers.
pub(crate) fn packet(text: &str) -> Result<usize, String> {
    let len = memory(text)?;
    if len > MAX_PACKET {
        return Err("a packet has less than 16 MiB".into());
    }
    Ok(len)
}

/// What the engine's buffers have room for, headers included, less those headers.
pub(crate) const MAX_PACKET: usize = (16 << 20) - 4096;

/// Reads a time in seconds: `60`, `0.5`.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_| "a time is a number of seconds, like 60 or 0.5")?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(time) if (SHORTEST..=LONGEST).contains(&time) => Ok(time),
        _ => Err("a time is between 0.05 and 1000000 seconds".into()),
    }
}

const SHORTEST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(1_000_000);

/// A size for people.
pub(crate) fn show(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size("0"), Ok(0));
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("64KiB"), Ok(64 << 10));
        assert_eq!(size("1G"), Ok(1 << 30));
        assert_eq!(size("1.5 MiB"), Ok(3 << 19));
        for wrong in ["", "x", "-1", "1ZB", "17179869184GiB", "1 kg"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
        assert_eq!(state("1024TiB"), Ok(1 << 50));
        assert!(state("1125899906842625").is_err());
        assert!(memory("0").is_err());
        assert!(packet("16MiB").is_err());
    }

    #[test]
    fn places_to_spill_to() {
        assert_eq!(spill("off"), Ok(Spill::Off));
        assert_eq!(spill("memfd"), Ok(Spill::Memfd));
        assert_eq!(spill("."), Ok(Spill::Directory(".".into())));
        for wrong in ["", "Off", "/nowhere/at/all", "/dev/null"] {
            assert!(spill(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn times() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for wrong in ["", "0", "-1", "NaN", "inf", "1e30", "1s"] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }
}
