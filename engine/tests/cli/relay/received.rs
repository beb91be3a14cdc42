//! What comes out: the channels' frames, and that they are what went in.

use std::collections::BTreeMap;

use vfio_migration::wire::{DeviceKey, Frame, Framer, Walk};

use super::fed::page_size;

/// The frames of one channel.
#[derive(Debug, Default)]
pub struct Channel {
    /// Hello, RAM and SYNC packets, whole and in their order.
    pub others: Vec<Vec<u8>>,
    /// Device-state packets, whole, in their order; and how many of the others came before each.
    pub packets: Vec<((DeviceKey, u32), Vec<u8>, usize)>,
}

pub fn split(bytes: &[u8]) -> Channel {
    let mut channel = Channel::default();
    for located in Walk::new(bytes, Framer::new(Some(page_size()), 16 << 20)) {
        let located = located.unwrap();
        let whole = [located.header, located.payload].concat();
        match located.frame {
            Frame::DeviceState(packet) => {
                let key = DeviceKey::decode(located.header[12..272].try_into().unwrap()).unwrap();
                let name = (key, packet.packet.index);
                channel.packets.push((name, whole, channel.others.len()));
            }
            _ => channel.others.push(whole),
        }
    }
    channel
}

pub type Packets = BTreeMap<(Vec<u8>, u32), Vec<u8>>;

/// All device-state packets, by name and idx. None may be there twice.
pub fn packets<'a>(channels: impl IntoIterator<Item = &'a Channel>) -> Packets {
    let mut packets = Packets::new();
    for ((key, index), whole, _) in channels.into_iter().flat_map(|it| &it.packets) {
        let before = packets.insert((key.as_bytes().to_vec(), *index), whole.clone());
        assert!(before.is_none(), "idx {index} twice");
    }
    packets
}

/// What came out is what went in: the channels by their hellos, the packets on whichever.
pub fn same(sent: &[Vec<u8>], received: &[Vec<u8>]) {
    let by_hello = |all: &[Vec<u8>]| -> BTreeMap<Vec<u8>, Channel> {
        let channels = all.iter().map(|bytes| split(bytes));
        channels.map(|it| (it.others[0].clone(), it)).collect()
    };
    let (sent, received) = (by_hello(sent), by_hello(received));
    assert_eq!(sent.len(), received.len());
    for (hello, before) in &sent {
        let after = &received[hello];
        assert!(
            before.others == after.others,
            "hello, RAM and SYNC packets stay"
        );
        for (_, _, others_before) in &after.packets {
            assert!(*others_before >= 2, "a packet before hello and first SYNC");
        }
        // The engine hands a device's packets out in their order, so each channel has them so.
        let mut last = BTreeMap::new();
        for ((key, index), _, _) in &after.packets {
            let before = last.insert(key.as_bytes().to_vec(), *index);
            assert!(before < Some(*index), "idx {index} after {before:?}");
        }
    }
    let (before, after) = (packets(sent.values()), packets(received.values()));
    assert!(before == after, "each packet is what it was");
}
