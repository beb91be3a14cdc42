//! A session's settings, and the arithmetic that turns a budget into a pool.

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

/// A session's settings. Sizes are in bytes. A time of [`Duration::MAX`] is no limit.
///
/// The start of a session checks every setting before a device changes its state. The error
/// ([`ErrorKind::Misuse`]) begins with the name of the setting.
///
/// ```
/// use vfio_migration::Settings;
///
/// let mut settings = Settings::default();
/// settings.budget = Some(64 << 20);
/// settings.channels = 8;
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Settings {
    /// Which ring moves the devices' bytes: [`Backend::Auto`].
    pub backend: Backend,
    /// All memory that packets are held in, reserves and staging included, but for what is spilled: see
    /// [`Settings::memory_bound`] for all that a load takes. One that the host cannot have is refused
    /// ([`ErrorKind::Host`]). Unless set:
    ///
    /// | for | budget |
    /// |---|---|
    /// | load | 32 MiB; a buffer for each device where that is more, up to 64 MiB; 128 KiB for each where that is more |
    /// | save | 32 MiB; two packets for each device where that is more, up to 256 MiB |
    /// | relay | 64 MiB, or four of the largest packets |
    pub budget: Option<usize>,
    /// Load: the size of a buffer of the pool; a larger packet passes in pieces. 1 MiB.
    pub buffer_len: usize,
    /// Save: the most data in a packet. Unless set, the device's estimate of its state, but not
    /// above 1 MiB nor below 64 KiB.
    pub data_len: Option<usize>,
    /// Relay: devices' packets may come while the source's VM runs
    /// ([`Capabilities::precopy_over_channels`](crate::migration::Capabilities::precopy_over_channels)): then a device
    /// that is incomplete is not missed ([`Settings::no_progress`]) while all that has come has been passed
    /// on. Off.
    pub precopy_over_channels: bool,
    /// Load, relay: how far ahead of the packet that a device needs next an idx may be and be held; one
    /// beyond waits. 65 536; at most 1 048 576, for each place costs 8 bytes of each device.
    pub window: u32,
    /// Load, relay: the largest device-state payload that is accepted, 12-byte header included. 12 bytes
    /// and 4 MiB; at the least 12 bytes and 1 MiB.
    pub max_packet: u32,
    /// Load: where a packet goes when the budget is spent. Where a RAM migrator's SYNC barriers share
    /// the channels with device state, a packet that waits for the budget can hold up the one that
    /// its device needs; so there it goes to a file, and comes back when it is next. While the devices
    /// get on nothing is spilled. Auto.
    pub spill: Spill,
    /// Load: how much may be spilled at one time, which is memory too unless it goes to a directory, rounded down to 64 KiB, and each packet up. When that
    /// is used up, packets wait after all. 1 GiB.
    pub spill_limit: u64,
    /// Load: the number of channels, 256 at most; a hello's id is below it. Input ends when this many
    /// channels have connected and closed, or when nothing is missing any more. A channel that never
    /// connects is not an error in itself; if a packet is missing, the load fails with
    /// [`Stalled`](crate::ErrorKind::Stalled) after [`Settings::no_progress`]. Default: 1, or the number of
    /// channels given to the builder if that is larger.
    pub channels: u32,
    /// The VM's uuid, as every hello says it. All zero where it has none.
    pub uuid: [u8; 16],
    /// The most devices over the session's life, those that were removed included. Unless set:
    /// those given to the builder; for a relay, which is given none, 64.
    pub max_devices: Option<u32>,
    /// Load: whether each device's config waits for its notice on the main channel, unless the device
    /// says otherwise ([`Device::set_config_after_iterables`](crate::Device)). Both ends must agree.
    /// Off.
    pub config_after_iterables: bool,
    /// Load: whether a device is set to STOP once it is loaded, so that its driver checks the state
    /// then, and one that it refuses fails the load. Unless set:
    ///
    /// - A [`LoadSession`](crate::LoadSession) alone does, for nobody else would have the state checked
    ///   before the source is let go.
    /// - [`migration::Incoming`](crate::migration::Incoming) does not: as with QEMU and Cloud
    ///   Hypervisor the device stays in RESUMING until the VM starts, because a stay in STOP can be
    ///   seen from outside (functions of mlx5 have been seen to initialise anew after one). The I/O thread
    ///   checks in the first step of [`vm::start`](crate::migration::vm::start), and the source is told
    ///   that all is loaded only after it.
    pub stop_after_load: Option<bool>,
    /// After a cancellation, how long a device's driver may keep a transfer before it is given up.
    /// 5 s.
    ///
    /// The thread that submitted such a transfer cannot exit before it has ended. The engine leaves
    /// it behind; an embedder's own, and the process, block there when they exit.
    pub grace: Duration,
    /// How long nothing at all may move once the switchover has begun, and how long a connection
    /// may stand still within a packet. 60 s.
    pub no_progress: Duration,
    /// How long a channel may take to say hello, from when it is given to the session: a source says
    /// it when it is set up, and may then be silent for as long as its VM runs. 10 s.
    pub hello_timeout: Duration,
    /// Load: how long a channel may take to bring one packet, from its first byte to its last. Its
    /// waits for memory are not counted. 300 s: 14 KiB a second for the largest packet.
    pub packet_timeout: Duration,
    /// Load: how long a device that has all its data waits for the notice that its config may be
    /// loaded, where that is in use. 600 s: the source's other devices may take their time.
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
