//! A session's settings: values, and the check of each.

use std::{path::PathBuf, time::Duration};

use vfio_migration_uring::Backend;

#[cfg(doc)]
use crate::error::ErrorKind;
use crate::{
    error::{Error, Phase, Result},
    framed::HEADROOM,
    host::check_budget,
    reorder::pool::PoolLayout,
    wire,
};

/// Where packets go when the budget is spent. See [`Settings::spill`].
#[derive(Clone, Debug, Default, Eq, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
#[non_exhaustive]
pub enum Spill {
    /// To a memory file, from channels with a [`RamSink`](crate::RamSink); from others nowhere.
    #[default]
    Auto,
    /// Nowhere: a packet beyond the budget waits.
    Off,
    /// To a memory file, from every channel and publisher.
    Memfd,
    /// To a file without a name in this directory, from every channel and publisher.
    Directory(PathBuf),
}

/// When a device's config, which came over the channels, may be loaded. Both ends must agree.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum ConfigGate {
    /// When the rest of its state is in the device.
    #[default]
    AtOnce,
    /// When its notice has come too, on the main channel.
    OnNotice,
}

impl ConfigGate {
    /// As the setting config-after-iterables says.
    pub(crate) const fn after_iterables(set: bool) -> Self {
        if set { Self::OnNotice } else { Self::AtOnce }
    }
}

/// Which thread writes what has been received to a device. See [`Settings::writer`].
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
#[non_exhaustive]
pub enum Writer {
    /// The I/O thread, through its ring.
    #[default]
    Ring,
    /// The channel that has brought the next packet, while the device takes bytes as quickly as a copy
    /// does; else the I/O thread. A pipe or a socket is the I/O thread's: it waits for its reader.
    Auto,
}

/// A session's settings. Sizes are in bytes. A time of [`Duration::MAX`] is no limit.
///
/// The start of a session checks every setting before a device changes its state. The error
/// ([`ErrorKind::Misuse`]) begins with the name of the setting.
///
/// ```
/// use vfio_migration::Settings;
///
/// let settings = Settings::default().budget(64 << 20).channels(8);
/// assert_eq!(settings.budget, Some(64 << 20));
/// ```
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
#[non_exhaustive]
pub struct Settings {
    /// Which ring moves the devices' bytes: [`Backend::Auto`].
    pub backend: Backend,
    /// The memory in which packets are held, reserves and staging buffers included, spilled packets not:
    /// [`Settings::memory_bound`] is everything that a load takes. A budget that the host cannot give is
    /// refused ([`ErrorKind::Host`]). Default:
    ///
    /// | for | budget |
    /// |---|---|
    /// | load | 32 MiB; a buffer for each device where that is more, up to 64 MiB; 128 KiB for each where that is more |
    /// | save | 32 MiB; two packets for each device where that is more, up to 256 MiB |
    /// | relay | 64 MiB, or four of the largest packets |
    pub budget: Option<usize>,
    /// Load: the size of a buffer of the pool; a larger packet passes in pieces. 1 MiB.
    pub buffer_len: usize,
    /// Save: the most data in a packet. Default: the device's estimate of its state, at most 1 MiB and at
    /// least 64 KiB.
    pub data_len: Option<usize>,
    /// Relay: device packets may come while the source's VM runs
    /// ([`Capabilities::precopy_over_channels`](crate::migration::Capabilities::precopy_over_channels)). Then
    /// an incomplete device does not count as stalled ([`Settings::no_progress`]) while everything received has
    /// been passed on. Default: off.
    pub precopy_over_channels: bool,
    /// Load, relay: how far ahead of a device's next packet an idx may be. A packet beyond the window waits.
    /// Default: 65 536. At most 1 048 576; each place costs 8 bytes per device.
    pub window: u32,
    /// Load, relay: the largest accepted device-state payload, 12-byte header included. Default: 4 MiB and 12
    /// bytes. At least 1 MiB and 12 bytes.
    pub max_packet: u32,
    /// Load: where a packet goes when the budget is spent. If a RAM migration's SYNC barriers share the
    /// channels with device state, a packet that waits for the budget can hold up the packet that its device
    /// needs. So there it goes to a file, and comes back when it is next. While the devices keep up, nothing is
    /// spilled. Default: [`Spill::Auto`].
    pub spill: Spill,
    /// Load: how much may be spilled at one time, rounded down to 64 KiB; each packet is rounded up. This is
    /// memory too, unless it goes to a directory. When the limit is reached, packets wait after all. Default:
    /// 1 GiB.
    pub spill_limit: u64,
    /// Load: which thread writes to a device. Default: [`Writer::Ring`].
    ///
    /// With [`Writer::Auto`] a channel's thread, or whoever calls a [`Publisher`](crate::Publisher), is within
    /// the driver's `write` for as long as the driver takes. A driver that has been quick and then does not
    /// return keeps that thread and its channel's other packets: they may be another device's. After
    /// [`no_progress`](Self::no_progress), or a stop and [`grace`](Self::grace), its device is reported
    /// stuck, and the thread is left behind.
    pub writer: Writer,
    /// Load: the number of channels, 256 at most; a hello's id is below it. Input ends when this many
    /// channels have connected and closed, or when nothing is missing any more. A channel that never
    /// connects is not an error in itself; if a packet is missing, the load fails with
    /// [`Stalled`](crate::ErrorKind::Stalled) after [`Settings::no_progress`]. Default: 1, or the number of
    /// channels given to the builder if that is larger.
    pub channels: u32,
    /// The VM's uuid, as in every hello. All zero if the VM has none.
    pub uuid: [u8; 16],
    /// The most devices over the session's life, removed ones included. Default: the number given to the
    /// builder; 64 for a relay, which is given none.
    pub max_devices: Option<u32>,
    /// Load: whether each device's config waits for its notice on the main channel. A device can override this
    /// ([`DeviceSpec::config_gate`](crate::DeviceSpec::config_gate)). Both ends must agree. Default: off.
    pub config_after_iterables: bool,
    /// Load: whether a loaded device is set to STOP. Its driver then checks the state, and a refusal fails the
    /// load. Default:
    ///
    /// - Yes, for a [`LoadSession`](crate::LoadSession) alone: nothing else would check the state before the
    ///   VMM lets the source go.
    /// - No, for [`migration::Incoming`](crate::migration::Incoming). As with QEMU and Cloud Hypervisor the
    ///   device stays in RESUMING until the VM starts, because a stay in STOP can be seen from outside
    ///   (functions of mlx5 have been seen to initialise again after one). The driver checks the state in the
    ///   first step of [`vm::start`](crate::migration::vm::start), and the source is told only afterwards that
    ///   all is loaded.
    pub stop_after_load: Option<bool>,
    /// How long a device's driver may keep a transfer after a cancellation. Then the transfer is given up.
    /// Default: 5 s.
    ///
    /// The thread that submitted such a transfer cannot exit before the transfer has ended. The engine leaves
    /// its own thread behind. A VMM's thread, and the process, block there when they exit.
    pub grace: Duration,
    /// How long nothing at all may move once the switchover has begun, and how long a connection may stand
    /// still within a packet. Default: 60 s.
    pub no_progress: Duration,
    /// How long a channel may take for its hello, from the moment when the session gets the channel. A source
    /// sends the hello at its set-up, and may then be silent for as long as its VM runs. Default: 10 s.
    pub hello_timeout: Duration,
    /// Load: how long a channel may take to bring one packet, from its first byte to its last. Waits for
    /// memory do not count. Default: 300 s, which is 14 KiB/s for the largest packet.
    pub packet_timeout: Duration,
    /// Load: how long a device that has all its data waits for the notice that its config may be loaded, if
    /// that is in use. Default: 600 s, because the source's other devices may be slow.
    pub config_ready_timeout: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            backend: Backend::Auto,
            budget: None,
            buffer_len: 1 << 20,
            data_len: None,
            precopy_over_channels: false,
            window: 1 << 16,
            max_packet: wire::DEFAULT_MAX_PACKET,
            spill: Spill::Auto,
            spill_limit: 1 << 30,
            writer: Writer::Ring,
            channels: 1,
            uuid: [0; 16],
            max_devices: None,
            config_after_iterables: false,
            stop_after_load: None,
            grace: Duration::from_secs(5),
            no_progress: Duration::from_secs(60),
            hello_timeout: Duration::from_secs(10),
            packet_timeout: Duration::from_secs(300),
            config_ready_timeout: Duration::from_secs(600),
        }
    }
}

/// A method for each field, to set it in a chain.
macro_rules! setters {
    ($of:ident: $($field:ident: $type:ty $(=> $wrap:ident)?),* $(,)?) => {
        impl $of {
            $(
                #[doc = concat!("Sets [`", stringify!($field), "`](#structfield.", stringify!($field), ").")]
                #[must_use]
                pub fn $field(mut self, $field: $type) -> Self {
                    self.$field = $crate::settings::setters!(@ $field $($wrap)?);
                    self
                }
            )*
        }
    };
    (@ $field:ident) => { $field };
    (@ $field:ident $wrap:ident) => { $wrap($field) };
}
pub(crate) use setters;

setters! {
    Settings:
    backend: Backend,
    budget: usize => Some,
    buffer_len: usize,
    data_len: usize => Some,
    precopy_over_channels: bool,
    window: u32,
    max_packet: u32,
    spill: Spill,
    spill_limit: u64,
    writer: Writer,
    channels: u32,
    uuid: [u8; 16],
    max_devices: u32 => Some,
    config_after_iterables: bool,
    stop_after_load: bool => Some,
    grace: Duration,
    no_progress: Duration,
    hello_timeout: Duration,
    packet_timeout: Duration,
    config_ready_timeout: Duration,
}

/// The smallest reserve: below it there is no sense in going on.
pub(crate) const MIN_RESERVE: usize = 4 << 10;

/// The most devices of a session: what a ring has room for.
pub(crate) const MAX_DEVICES: u32 = 1024;

/// The largest window: 8 MiB of slots for each device.
const MAX_WINDOW: u32 = 1 << 20;

/// The most channels: what the id in a hello can name.
const MAX_CHANNELS: u32 = 1 << 8;

/// The most data in a packet of a save: a buffer of the pool holds it with its headers.
pub(crate) const MAX_DATA_LEN: usize = PoolLayout::MAX_BUFFER_LEN - HEADROOM;

pub(crate) fn wrong(what: &'static str) -> Error {
    Error::misuse(Phase::Setup, what)
}

/// Refuses the most data in a packet where no buffer can hold it.
pub(crate) fn check_data_len(what: &'static str, len: usize) -> Result<()> {
    if (1..=MAX_DATA_LEN).contains(&len) {
        return Ok(());
    }
    Err(wrong(what))
}

impl Settings {
    /// Refuses what no session can do on this host, whatever its devices are: what a start would refuse,
    /// before there is anything to start.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Misuse`], which begins with the setting's name; [`ErrorKind::Host`] for a budget that
    /// the host cannot have.
    pub fn check(&self) -> Result<()> {
        self.check_numbers()?;
        self.budget.map_or(Ok(()), check_budget)
    }

    /// As [`Settings::check`], but for the budget, which is looked at where memory is divided.
    pub(crate) fn check_numbers(&self) -> Result<()> {
        let times = [
            (self.no_progress, "no_progress: above 0"),
            (self.hello_timeout, "hello_timeout: above 0"),
            (self.packet_timeout, "packet_timeout: above 0"),
        ];
        if let Some((_, what)) = times.iter().find(|(time, _)| time.is_zero()) {
            return Err(wrong(what));
        }
        if self.window == 0 || self.window > MAX_WINDOW {
            return Err(wrong("window: 1 to 1 048 576 packets"));
        }
        if self.max_packet < wire::LEAST_MAX_PACKET {
            return Err(wrong("max_packet: at least 12 bytes and 1 MiB"));
        }
        if self.buffer_len < MIN_RESERVE || self.buffer_len > PoolLayout::MAX_BUFFER_LEN {
            return Err(wrong("buffer_len: 4 KiB to 16 MiB"));
        }
        if let Some(len) = self.data_len {
            check_data_len("data_len: 1 byte to just below 16 MiB", len)?;
        }
        self.check_channels(self.channels)?;
        let most = |devices| (1..=MAX_DEVICES).contains(&devices);
        if !self.max_devices.is_none_or(most) {
            return Err(wrong("max_devices: 1 to 1024"));
        }
        Ok(())
    }

    /// Refuses more channels than ids can name.
    #[expect(clippy::unused_self, reason = "its namesake is a setting")]
    pub(crate) fn check_channels(&self, channels: u32) -> Result<()> {
        if channels > MAX_CHANNELS {
            return Err(wrong("channels: 256 at most"));
        }
        Ok(())
    }

    /// The most devices at one time, given that there are `count` now.
    pub(crate) fn device_limit(&self, count: usize) -> Result<u32> {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        let limit = self.max_devices.unwrap_or(count);
        if limit == 0 || limit < count || limit > MAX_DEVICES {
            return Err(wrong(
                "max_devices: 1 to 1024, and no fewer than there are devices",
            ));
        }
        Ok(limit)
    }
}
