//! A packet on its way out, in one buffer: its device's ordinal, its headers, its data.
//!
//! ```text
//!   0          4              HEADERS                  HEADROOM
//!   ├─ ordinal ┼─ unused ─────┼─ headers, 288 bytes ───┼─ data …
//!                             └───────────── on the wire ────────
//! ```
//!
//! The thread that fills the buffer leaves [`HEADROOM`] in front of the data and calls [`frame`]. The
//! thread that sends the packet finds the device by [`ordinal`], and sends [`on_wire`] with one call. The
//! data begins on a cache line of its own. Pure functions: no thread, no wait.

use crate::{reorder::pool::ALIGN, wire};

/// The room in front of a packet's data, in bytes.
pub(crate) const HEADROOM: usize = (4 + wire::DEVICE_PACKET_LEN).next_multiple_of(ALIGN);

/// Where the headers begin in it.
const HEADERS: usize = HEADROOM - wire::DEVICE_PACKET_LEN;

fn word(bytes: &[u8], at: usize) -> u32 {
    let word = bytes[at..at + 4].try_into().expect("4 of many bytes");
    u32::from_be_bytes(word)
}

/// Fills the room in front of the data.
pub(crate) fn frame(buffer: &mut [u8], ordinal: u32, headers: &[u8; wire::DEVICE_PACKET_LEN]) {
    buffer[..4].copy_from_slice(&ordinal.to_be_bytes());
    buffer[HEADERS..HEADROOM].copy_from_slice(headers);
}

/// The device's place among its session's.
pub(crate) fn ordinal(buffer: &[u8]) -> usize {
    word(buffer, 0) as usize
}

/// What is sent: headers and data.
pub(crate) fn on_wire(buffer: &[u8]) -> &[u8] {
    &buffer[HEADERS..]
}

/// The idx in the headers of what is sent.
pub(crate) fn index(on_wire: &[u8]) -> u32 {
    word(on_wire, wire::DEVICE_STATE_HEADER_LEN + 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_framed_is_found_again() {
        let key = wire::DeviceKey::new(&crate::id::DeviceId::new("device", 3).unwrap());
        let headers = wire::encode_packet(&key, 7, false, 5);
        let mut buffer = [0; HEADROOM + 5];
        buffer[HEADROOM..].copy_from_slice(b"state");
        frame(&mut buffer, 42, &headers);
        assert_eq!(ordinal(&buffer), 42);
        let sent = on_wire(&buffer);
        assert_eq!(index(sent), 7);
        assert_eq!(sent, [&headers[..], b"state"].concat());
    }
}
