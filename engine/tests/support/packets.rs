//! A source's bytes: what a channel carries.

use vfio_migration::wire::{DeviceKey, Hello, encode_packet, wrap_config};

use crate::names::id;

pub fn hello(number: u8) -> Vec<u8> {
    Hello {
        uuid: [0; 16],
        id: number,
    }
    .encode()
    .to_vec()
}

/// A device-state packet, all of it.
pub fn packet(device: u32, index: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    let mut bytes = encode_packet(&DeviceKey::new(&id(device)), index, false, len).to_vec();
    bytes.extend(data);
    bytes
}

/// A config packet, its framing tags included.
pub fn config_packet(device: u32, index: u32, config: &[u8]) -> Vec<u8> {
    let data = wrap_config(config);
    let len = u32::try_from(data.len()).unwrap();
    let mut bytes = encode_packet(&DeviceKey::new(&id(device)), index, true, len).to_vec();
    bytes.extend(data);
    bytes
}
