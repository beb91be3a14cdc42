//! What a budget is cut into: reserves, staging buffers and buffers, for each kind of session.
//!
//! | session | first | then | the rest |
//! |---|---|---|---|
//! | load | a reserve for each device, so that each always gets on | an eighth for gathering small packets | buffers |
//! | save | buffers, each for a packet with its headers; small packets share one | | |
//! | relay | one packet kept back, for the next of its device | buffers, each for the largest packet | |
//!
//! Pure arithmetic on [`Settings`]: a session asks once, when it starts. No thread, no wait.

mod bound;

pub use self::bound::MemoryBound;
use crate::{
    error::Result,
    framed::HEADROOM,
    host::check_budget,
    reorder::pool::{ALIGN, PoolLayout},
    settings::{MAX_DATA_LEN, MIN_RESERVE, Settings, wrong},
    wire,
};

/// The budget unless set, where it is enough for the devices.
const DEFAULT_BUDGET: usize = 32 << 20;

/// What many devices raise that to at most: a load's is touched when it is made, a save's as it is used, or
/// when it is prepared.
const MANY_LOAD: usize = 64 << 20;
const MANY_SAVE: usize = 256 << 20;

/// The largest reserve: a packet for which only this is left passes in pieces of it.
const MAX_RESERVE: usize = 64 << 10;

/// How many staging buffers there are for all devices, and the largest.
const STAGINGS: usize = 4;
const MAX_STAGING: usize = 1 << 20;

/// The smallest staging buffer that is worth its memory.
const MIN_STAGING: usize = 64 << 10;

/// A relay's budget unless set: it shares its channels with RAM, and holds what comes while the
/// destination's channels stand at a barrier.
const RELAY_BUDGET: usize = 64 << 20;

/// A relay's devices unless set.
const RELAY_DEVICES: u32 = 64;

/// What a session's memory is cut into.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Memory {
    /// The budget.
    pub(crate) budget: usize,
    /// For packets.
    pub(crate) pool: PoolLayout,
    /// For gathering small packets on their way to a device. Load only.
    pub(crate) staging: PoolLayout,
}

const fn round_down(len: usize) -> usize {
    len / ALIGN * ALIGN
}

impl Settings {
    /// The budget; one that was set is held against what the host can have.
    fn budget_or(&self, default: usize) -> Result<usize> {
        match self.budget {
            Some(budget) => check_budget(budget).map(|()| budget),
            None => Ok(default),
        }
    }

    /// A load's memory: reserves first, so that every device always gets on; then a part for
    /// gathering; the rest is buffers.
    pub(crate) fn load_memory(&self, devices: u32) -> Result<Memory> {
        self.check_numbers()?;
        let devices = devices as usize;
        let buffers = (devices * self.buffer_len).min(MANY_LOAD);
        let default = DEFAULT_BUDGET.max(buffers).max(2 * devices * MAX_RESERVE);
        let budget = self.budget_or(default)?;
        let reserve_len = round_down((budget / devices).min(MAX_RESERVE));
        if reserve_len < MIN_RESERVE {
            return Err(wrong("budget: at least 4 KiB for each device"));
        }
        let rest = budget - devices * reserve_len;
        let staging_len = round_down((rest / 8 / STAGINGS).min(MAX_STAGING));
        let stagings = if staging_len < MIN_STAGING {
            0
        } else {
            STAGINGS
        };
        let rest = rest - stagings * staging_len;
        let buffer_len = if rest >= self.buffer_len {
            self.buffer_len.next_multiple_of(ALIGN)
        } else {
            round_down(rest)
        };
        let buffers = if buffer_len < MIN_RESERVE {
            0
        } else {
            rest / buffer_len
        };
        Ok(Memory {
            budget,
            pool: layout(buffers, buffer_len, devices, reserve_len)?,
            staging: layout(stagings, staging_len, 0, 0)?,
        })
    }

    /// A relay's memory, and the most devices that it takes. A packet leaves whole, so a buffer
    /// holds the largest; and one is kept back, for whichever packet is the next of its device.
    pub(crate) fn relay_memory(&self) -> Result<(Memory, u32)> {
        self.check_numbers()?;
        let devices = self.max_devices.unwrap_or(RELAY_DEVICES);
        let data_len = self.max_packet as usize - wire::PACKET_HEADER_LEN;
        let packet = data_len.saturating_add(HEADROOM);
        if packet > PoolLayout::MAX_BUFFER_LEN {
            return Err(wrong("max_packet: just below 16 MiB at most, for a relay"));
        }
        let packet = packet.next_multiple_of(ALIGN);
        let budget = self.budget_or(RELAY_BUDGET.max(4 * packet))?;
        if budget < packet {
            return Err(wrong("budget: at least one packet with its headers"));
        }
        let memory = Memory {
            budget,
            pool: layout((budget - packet) / packet, packet, 1, packet)?,
            staging: layout(0, 0, 0, 0)?,
        };
        Ok((memory, devices))
    }

    /// A save's memory, where the largest packet holds `data_len` bytes of data.
    pub(crate) fn save_memory(&self, devices: u32, data_len: usize) -> Result<Memory> {
        self.check_numbers()?;
        debug_assert!(
            (1..=MAX_DATA_LEN).contains(&data_len),
            "the caller has checked"
        );
        let packet = (HEADROOM + data_len).next_multiple_of(ALIGN);
        let devices = devices as usize;
        let default = DEFAULT_BUDGET.max((2 * devices * packet).min(MANY_SAVE));
        let budget = self.budget_or(default)?;
        if budget < packet {
            return Err(wrong("budget: at least one packet with its headers"));
        }
        // Small packets share a buffer, as long as each device can have two.
        let shared = round_down((budget / (2 * devices)).min(1 << 20));
        let buffer_len = packet.max(shared);
        Ok(Memory {
            budget,
            pool: layout(budget / buffer_len, buffer_len, 0, 0)?,
            staging: layout(0, 0, 0, 0)?,
        })
    }
}

fn layout(
    buffers: usize,
    buffer_len: usize,
    reserves: usize,
    reserve_len: usize,
) -> Result<PoolLayout> {
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let (buffers, reserves) = (count(buffers), count(reserves));
    if buffers.saturating_add(reserves) > PoolLayout::MAX_BUFFERS {
        return Err(wrong("budget: at most 65 535 buffers"));
    }
    Ok(PoolLayout {
        buffers,
        buffer_len,
        reserves,
        reserve_len,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_memory_is_within_the_budget() {
        for devices in [1, 4, 64, 1024] {
            for budget in [None, Some(4 << 20), Some(5 << 20), Some(1 << 30)] {
                let settings = Settings {
                    budget,
                    ..Settings::default()
                };
                let memory = settings.load_memory(devices).unwrap();
                let held = memory.pool.size() + memory.staging.size();
                assert!(held <= memory.budget, "{devices} {budget:?}: {memory:?}");
                // Nothing worth a buffer is left over.
                let unit = memory.pool.buffer_len.max(1);
                assert!(memory.budget - held < unit.max(MIN_RESERVE + ALIGN));
            }
        }
    }

    #[test]
    fn the_defaults_are_what_they_say() {
        let memory = Settings::default().load_memory(4).unwrap();
        assert_eq!(memory.budget, 32 << 20);
        assert_eq!(memory.pool.buffer_len, 1 << 20);
        assert_eq!(memory.pool.buffers, 27);
        let memory = Settings::default().load_memory(64).unwrap();
        assert_eq!(memory.budget, 64 << 20);
        let memory = Settings::default().load_memory(1024).unwrap();
        assert_eq!(memory.budget, 128 << 20);
        let memory = Settings::default().save_memory(1024, 1 << 20).unwrap();
        assert_eq!(memory.budget, 256 << 20);
        let memory = Settings::default().save_memory(64, 1 << 20).unwrap();
        assert!(memory.pool.buffers >= 128);
    }

    #[test]
    fn a_single_packet_for_each_device_is_enough() {
        for packet in [4 << 10, 64 << 10, 1 << 20] {
            let settings = Settings {
                budget: Some(4 * packet),
                ..Settings::default()
            };
            assert!(settings.load_memory(4).is_ok());
            assert!(settings.save_memory(4, packet).unwrap().pool.buffers >= 1);
        }
        let settings = Settings {
            budget: Some((4 << 10) * 4 - 1),
            ..Settings::default()
        };
        assert!(settings.load_memory(4).is_err());
    }
}
