//! A RAM migrator's barrier.

use vfio_migration::wire::{PageSize, encode_sync};

pub fn sync() -> Vec<u8> {
    encode_sync(PageSize::new(4096).unwrap(), 0)
}
