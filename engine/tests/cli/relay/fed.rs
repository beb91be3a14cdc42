//! What is fed in.

use vfio_migration::{
    DeviceId,
    wire::{DeviceKey, Hello, Kind, PageSize, RamHeader, encode_packet, encode_sync, wrap_config},
};

use crate::command::random;

pub fn page_size() -> PageSize {
    PageSize::new(4096).unwrap()
}

pub fn hello(id: u8) -> Vec<u8> {
    let uuid = [7; 16];
    Hello { uuid, id }.encode().to_vec()
}

pub fn sync(number: u64) -> Vec<u8> {
    encode_sync(page_size(), number)
}

/// A RAM packet of one page.
pub fn ram(number: u64) -> Vec<u8> {
    let header = RamHeader {
        kind: Kind::Ram { flags: 0 },
        pages_alloc: 128,
        normal_pages: 1,
        next_packet_size: 4096,
        packet_num: number,
        zero_pages: 0,
        ramblock: b"pc.ram",
    };
    let mut bytes = header.encode().to_vec();
    bytes.extend((0..128_u64).flat_map(|at| random(number + at).to_be_bytes()));
    bytes.extend((0..4096).map(|at| random(at ^ number).to_le_bytes()[0]));
    bytes
}

pub fn key(device: u32) -> DeviceKey {
    DeviceKey::new(&DeviceId::new(format!("0000:00:{device:02x}.0/vfio"), 0).unwrap())
}

pub fn packet(device: u32, index: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    let mut bytes = encode_packet(&key(device), index, false, len).to_vec();
    bytes.extend(data);
    bytes
}

pub fn config(device: u32, index: u32) -> Vec<u8> {
    let data = wrap_config(b"config");
    let len = u32::try_from(data.len()).unwrap();
    let mut bytes = encode_packet(&key(device), index, true, len).to_vec();
    bytes.extend(data);
    bytes
}

/// `count` packets of `device`, of at most `len` bytes, in a random order; then the config.
pub fn shuffled(device: u32, count: u32, len: u64) -> Vec<Vec<u8>> {
    let data = |index: u32| {
        let seed = u64::from(device) << 32 | u64::from(index);
        let len = random(seed) % (len + 1);
        let bytes = (0..len).map(|at| random(seed ^ at << 40).to_le_bytes()[0]);
        bytes.collect::<Vec<_>>()
    };
    let mut all: Vec<_> = (0..count)
        .map(|index| packet(device, index, &data(index)))
        .collect();
    all.push(config(device, count));
    all.sort_by_cached_key(|bytes| random(u64::from(bytes[283]) << 32 | u64::from(bytes[282])));
    all
}
