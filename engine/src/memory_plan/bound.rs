//! The bound on a load's memory.

use crate::{
    error::Result,
    settings::{Settings, Spill},
    spill,
};

/// What a thread of the engine's touches of its stack.
const THREAD: u64 = 64 << 10;

/// A place of a device's window.
const SLOT: u64 = 9;

/// A config is gathered in memory that grows by doubling: the old, and the new twice as large.
const GROWTH: u64 = 3;

/// The ring, the allocator's own, and what waits until nobody can be looking at it.
const FIXED: u64 = 6 << 20;

/// The most memory that a load takes, in bytes, whatever its source sends: see
/// [`Settings::memory_bound`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct MemoryBound {
    /// The budget: all packets that are not spilled, and what small ones are gathered in.
    pub budget: u64,
    /// The spill file where it is in memory, and its chunk map.
    pub spill: u64,
    /// All devices: their windows, their configs, a part of a packet that was spilled, their threads.
    pub devices: u64,
    /// All channels: what they read ahead, a part of a packet that is spilled, their threads.
    pub channels: u64,
    /// What does not depend on the settings.
    pub fixed: u64,
}

impl MemoryBound {
    /// All of it.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.budget
            .saturating_add(self.spill)
            .saturating_add(self.devices)
            .saturating_add(self.channels)
            .saturating_add(self.fixed)
    }
}

impl Settings {
    /// The most memory that a load with so many devices and channels takes, whatever its source sends, in
    /// bytes:
    ///
    /// ```text
    ///   budget
    /// + spill_limit, and 32 for each 64 KiB of it      where it is a memory file
    /// + devices  × (9 × window + 3 × max_packet + 64 KiB + 64 KiB where packets are spilled)
    /// + channels × (128 KiB + 64 KiB where packets are spilled)
    /// + 6 MiB
    /// ```
    ///
    /// Devices count that were removed; of their windows and configs nothing is left. A
    /// [`Publisher`](crate::Publisher) counts as a channel, and holds one packet more
    /// ([`Settings::max_packet`]) where it leases. [`Spill::Auto`] counts as a memory file; where no channel
    /// has a [`RamSink`](crate::RamSink) nothing is spilled, as with [`Spill::Off`]. What the kernel keeps
    /// for sockets and for files in a directory, and what the VMM's own code takes, comes on top.
    ///
    /// ```
    /// use vfio_migration::{Settings, Spill};
    ///
    /// let mut settings = Settings::default();
    /// settings.spill = Spill::Off;
    /// let bound = settings.memory_bound(2, 8)?;
    /// assert_eq!(bound.budget, 32 << 20);
    /// assert!(bound.total() < 65 << 20);
    ///
    /// settings.spill = Spill::Auto;
    /// let spill = settings.memory_bound(2, 8)?.spill;
    /// assert!(spill > 1 << 30 && spill < 1025 << 20);
    /// # Ok::<(), vfio_migration::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Misuse`](crate::ErrorKind::Misuse) for settings with which no load starts.
    pub fn memory_bound(&self, devices: u32, channels: u32) -> Result<MemoryBound> {
        let devices = devices.max(1);
        self.check_channels(channels)?;
        let budget = self.load_memory(devices)?.budget as u64;
        let spills = self.spill != Spill::Off;
        let if_it_spills = |len: usize| if spills { len as u64 } else { 0 };
        let in_memory = spills && !matches!(self.spill, Spill::Directory(_));
        let limit = self.spill_limit.min(spill::MAX_LIMIT);
        let device = SLOT * u64::from(self.window)
            + GROWTH * u64::from(self.max_packet)
            + THREAD
            + if_it_spills(spill::BOUNCE);
        let channel = crate::channel::STAGING as u64 + THREAD + if_it_spills(spill::BOUNCE);
        Ok(MemoryBound {
            budget,
            spill: spill::chunk_map(limit) * u64::from(spills) + limit * u64::from(in_memory),
            devices: u64::from(devices) * device,
            channels: u64::from(channels) * channel,
            fixed: FIXED,
        })
    }
}
