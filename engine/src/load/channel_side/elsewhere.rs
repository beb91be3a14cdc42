//! Packets that do not go to memory: those that are spilled, and those of an unplugged device.
//!
//! | a spill's question | answered in |
//! |---|---|
//! | may this channel spill? | `load.rs`, `Load::spill_for` |
//! | may this packet? | `reorder/memory_policy.rs`, `MemoryPolicy::grant` |
//! | when? | `load/channel_side.rs`, `LoadSink::wait_for_space` |
//! | is there space? | here, `LoadSink::set_aside` |
//!
//! A packet of an unplugged device is counted here; its bytes are read past in `channel/receiver.rs`.

use std::mem;

use super::{IncomingPacket, LoadSink};
use crate::{
    error::{Error, ErrorKind, Phase, Result},
    host::zeroed,
    load::Epoch,
    reorder::slot::{Packet, Payload},
    spill::{BOUNCE, SpillFile},
};

impl<E: Epoch> LoadSink<E> {
    /// Allocates space for a packet in the spill file, if the packet may be spilled and there is space.
    pub(super) fn set_aside(&mut self, packet: &IncomingPacket) -> bool {
        if let Some(file) = &self.spill
            && self.grant(packet, false).spill
        {
            self.aside = SpillFile::allocate(file, packet.remaining);
            self.spilling = self.aside.is_some();
        }
        self.aside.is_some()
    }

    /// Spills a packet for which [`LoadSink::lease`] found no memory, and publishes it. `receive`
    /// fills what it is given with the packet's next bytes, and is told whether they are the last.
    pub(crate) fn spill(
        &mut self,
        packet: &mut IncomingPacket,
        receive: &mut dyn FnMut(&mut [u8], bool) -> Result<()>,
    ) -> Result<()> {
        let spilled = self.aside.take().expect("a lease has found it space");
        let mut bounce = mem::take(&mut self.bounce);
        if bounce.is_empty() {
            bounce = zeroed(BOUNCE, "memory to spill through")?.into();
        }
        let len = packet.remaining;
        for at in (0..len).step_by(BOUNCE) {
            let end = len.min(at + BOUNCE);
            let bytes = &mut bounce[..end - at];
            receive(bytes, end == len)?;
            if packet.dropped {
                continue;
            }
            let written = spilled.write(at, bytes).map_err(|error| {
                Error::new(ErrorKind::Spill, Phase::Receive)
                    .on_device(&packet.device.id)
                    .at_index(packet.index)
                    .caused_by(error)
            });
            self.unless_unplugged(packet, written)?;
        }
        self.bounce = bounce;
        if packet.dropped {
            self.count_dropped(packet, len);
            return Ok(());
        }
        let filled = Packet {
            payload: Payload::External(spilled.into_number()),
            config: packet.config,
            more: false,
        };
        self.hand_over_or_drop(packet, filled, len)
    }

    /// Forgets that the packet was to be spilled: its bytes are not there yet.
    pub(crate) fn put_off(&mut self) {
        if self.aside.take().is_some() {
            self.load.backpressure.notify_all();
        }
    }

    /// Drops the packet where an error is its device's unplugging, and that error with it.
    pub(super) fn unless_unplugged<T>(
        &self,
        packet: &mut IncomingPacket,
        result: Result<T>,
    ) -> Result<Option<T>> {
        if result.is_err() && packet.device.is_unplugged() && self.load.failure().is_none() {
            packet.dropped = true;
            // What was had for it is free again.
            self.load.backpressure.notify_all();
            return Ok(None);
        }
        result.map(Some)
    }

    /// Counts the next `len` bytes of a dropped packet, which have been read past.
    pub(crate) fn count_dropped(&self, packet: &mut IncomingPacket, len: usize) {
        packet.remaining -= len;
        self.counters.bytes.add(len as u64);
        self.load.dropped.bytes.add(len as u64);
        if packet.remaining == 0 {
            self.load.dropped.packets.add(1);
        }
    }
}
