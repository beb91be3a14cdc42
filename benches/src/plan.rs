//! What moves: how many devices, channels, packets, and of what size.
//!
//! ```text
//!   number    0    1    2    3   …   n-1 │ n … n+devices-1
//!   device    0    1    0    1           │ each one's config packet
//!   index     0    0    1    1           │ index = its count of data packets
//! ```
//!
//! The packets of all devices are handed out in one order, each to whichever channel is free: by
//! one counter that every contender uses alike.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use serde::{Deserialize, Serialize};
use vfio_migration::DeviceId;

/// What moves.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct Plan {
    /// Devices.
    pub devices: u32,
    /// Channels: one thread each on either side.
    pub channels: u32,
    /// Bytes of data in a packet.
    pub packet: usize,
    /// Data packets of each device.
    pub packets: u32,
}

/// One packet's place.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Place {
    /// Whose it is.
    pub device: usize,
    /// Where it is in the device's state.
    pub index: u32,
    /// Whether it is the config packet.
    pub config: bool,
}

impl Plan {
    /// A plan that moves `bytes` in all, or a little less where that cannot be divided.
    #[must_use]
    pub fn of_bytes(devices: u32, channels: u32, packet: usize, bytes: usize) -> Self {
        let packets = bytes / packet / devices as usize;
        Self {
            devices,
            channels,
            packet,
            packets: u32::try_from(packets).expect("a plan's packets can be counted"),
        }
    }

    /// Data packets of all devices.
    #[must_use]
    pub const fn count(&self) -> u32 {
        self.devices * self.packets
    }

    /// Bytes of data of one device.
    #[must_use]
    pub const fn device_bytes(&self) -> usize {
        self.packets as usize * self.packet
    }

    /// Bytes of data of all devices.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.device_bytes() as u64 * self.devices as u64
    }

    /// Where packet `number` belongs; `None` behind the last.
    #[must_use]
    pub const fn place(&self, number: u32) -> Option<Place> {
        let (data, devices) = (self.count(), self.devices);
        if number >= data + devices {
            return None;
        }
        let config = number >= data;
        Some(Place {
            device: (number % devices) as usize,
            index: number / devices,
            config,
        })
    }

    /// The devices' names.
    #[must_use]
    pub fn ids(&self) -> Vec<DeviceId> {
        (0..self.devices)
            .map(|number| {
                DeviceId::new(format!("0000:{number:02x}:00.0/vfio"), 0).expect("a good name")
            })
            .collect()
    }
}

/// Hands out packet numbers, each once.
#[derive(Debug, Default)]
pub struct Tickets(AtomicU32);

impl Tickets {
    /// The next `count` numbers' first.
    pub fn take(&self, count: u32) -> u32 {
        // Relaxed: the number is all there is.
        self.0.fetch_add(count, Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_device_gets_its_packets_in_order_and_its_config_last() {
        let plan = Plan {
            devices: 3,
            channels: 1,
            packet: 4096,
            packets: 5,
        };
        let mut next = [0; 3];
        let mut number = 0;
        while let Some(place) = plan.place(number) {
            assert_eq!(place.index, next[place.device]);
            assert_eq!(place.config, place.index == plan.packets);
            next[place.device] += 1;
            number += 1;
        }
        assert_eq!(next, [6; 3]);
    }
}
