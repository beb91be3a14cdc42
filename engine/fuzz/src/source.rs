//! What the sources of the two runs share: devices' names, bytes that tell packets apart, and how a packet
//! is cut into pieces.

use std::time::Duration;

use vfio_migration::DeviceId;

use crate::input::Input;

/// A time that never passes.
pub const HOUR: Duration = Duration::from_secs(3600);

/// The name of a device, by its number.
pub fn id(device: usize) -> DeviceId {
    let number = u32::try_from(device).expect("few");
    // Two share an idstr, and two an instance id.
    DeviceId::new(format!("dev{}", number / 2), number % 2).expect("a name")
}

/// Bytes that are one seed's own.
pub fn bytes(seed: u64, len: usize) -> impl Iterator<Item = u8> {
    (0..len as u64).map(move |at| {
        let word = (seed ^ (at >> 3)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word.rotate_left(31).to_be_bytes()[(at & 7) as usize]
    })
}

/// How a packet is sent.
#[derive(Clone, Copy, Debug)]
pub enum Cut {
    Whole,
    /// In two pieces, both at once.
    Two,
    /// The rest comes later, or never.
    Later,
    Crumbs,
}

impl Cut {
    /// The pieces that are sent now, and the rest.
    pub fn pieces<'a>(self, packet: &'a [u8], input: &mut Input<'_>) -> (Vec<&'a [u8]>, &'a [u8]) {
        let place = |input: &mut Input<'_>| usize::from(input.byte()) * packet.len() / 256;
        match self {
            Self::Whole => (vec![packet], &[]),
            Self::Two => {
                let (first, second) = packet.split_at(place(input));
                (vec![first, second], &[])
            }
            Self::Later => {
                let (first, rest) = packet.split_at(place(input));
                (vec![first], rest)
            }
            Self::Crumbs => {
                let step = 1 + input.below(40);
                (packet.chunks(step.max(packet.len() / 64)).collect(), &[])
            }
        }
    }
}
