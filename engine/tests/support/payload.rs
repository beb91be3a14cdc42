//! A packet as it is pushed.

use vfio_migration::wire::PacketHeader;

/// A packet's payload as a peer's handler gets it: 12 bytes of header, then data.
pub fn payload(index: u32, config: bool, data: &[u8]) -> Vec<u8> {
    let mut bytes = PacketHeader { index, config }.encode().to_vec();
    bytes.extend(data);
    bytes
}
