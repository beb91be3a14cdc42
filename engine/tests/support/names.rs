//! The names of the tests' devices.

use vfio_migration::DeviceId;

pub fn id(number: u32) -> DeviceId {
    DeviceId::new(format!("0000:00:{number:02x}.0/vfio"), 0).unwrap()
}
