//! Channel side: take and send packets, until every packet has been taken.
//!
//! ```text
//!   take (waits) ─▶ take more, if they are small ─▶ send all with one call ─▶ recycle
//!   the end ─▶ finish: the peer reads the channel's end ─▶ kept open, for the session's report
//! ```

use std::{io, time::Instant};

use super::{Save, SaveDevice};
use crate::{
    channel::{ChannelLimits, Sender},
    error::{Error, Phase, Result},
    framed,
    reorder::{
        pool::Pool,
        send_queue::Taken,
        slot::{Packet, Payload},
    },
    stats::ChannelCounters,
    sync::lock,
    wire,
};

/// Packets below this size are sent several with one call.
const SMALL: usize = 64 << 10;

/// How many, at most.
const GATHER: usize = 16;

/// Channel side: take → send, until every packet has a taker.
pub(crate) fn serve_channel(
    save: &Save,
    mut sender: Sender,
    limits: &ChannelLimits,
    id: u8,
    counters: &ChannelCounters,
) -> Result<()> {
    sender.greet(limits, id)?;
    sender.set_timeout(limits.no_progress)?;
    counters.syncs.add(1);
    let epoch = save.collector.register();
    let mut packets = Vec::with_capacity(GATHER);
    loop {
        let since = Instant::now();
        let ticket = save.queue.take(None, || epoch.pin());
        counters.blocked.add_time(since.elapsed());
        match ticket.expect("a wait without a deadline ends with a look") {
            Taken::Packet(packet) => packets.push(OutgoingPacket::new(save, packet)),
            Taken::End => {
                sender.finish()?;
                lock(&save.finished).push(sender.into_channel());
                return Ok(());
            }
            Taken::Closed => {
                let failure = save.first_failure.failure();
                return Err(failure.unwrap_or_else(|| Error::aborted(Phase::Send)));
            }
        }
        while packets.len() < GATHER && packets.iter().all(|packet| packet.len() < SMALL) {
            match save.queue.try_take(&epoch.pin()) {
                Some(Taken::Packet(packet)) => packets.push(OutgoingPacket::new(save, packet)),
                // Found again by the next take.
                _ => break,
            }
        }
        let sent = {
            let mut slices: Vec<_> = packets.iter().flat_map(OutgoingPacket::slices).collect();
            sender.send(&mut slices)
        };
        if let Err(error) = sent {
            let packet = &packets[0];
            return Err(error.on_device(&packet.device.id).at_index(packet.index()));
        }
        for packet in packets.drain(..) {
            counters.packets.add(1);
            counters.bytes.add(packet.len() as u64);
            let payload = packet.len() - wire::DEVICE_STATE_HEADER_LEN;
            packet.device.count_sent(payload);
        }
        save.recycled();
    }
}

/// A packet that a channel has taken.
struct OutgoingPacket<'a> {
    device: &'a SaveDevice,
    /// Headroom and data; `None` for the config packet, which is the device's to keep.
    buffer: Option<crate::reorder::pool::Lease<&'a Pool>>,
}

impl<'a> OutgoingPacket<'a> {
    fn new(save: &'a Save, packet: Packet) -> Self {
        match packet.payload {
            Payload::Lease(piece) => {
                let buffer = Pool::adopt(&*save.pool, piece);
                Self {
                    device: &save.devices[framed::ordinal(buffer.bytes())],
                    buffer: Some(buffer),
                }
            }
            Payload::External(ordinal) => Self {
                device: usize::try_from(ordinal)
                    .ok()
                    .and_then(|at| save.devices.get(at))
                    .expect("the I/O thread published it"),
                buffer: None,
            },
            Payload::Empty => unreachable!("a save has no empty packets"),
        }
    }

    /// Headers, then data.
    fn slices(&self) -> impl Iterator<Item = io::IoSlice<'_>> {
        let (headers, data) = match &self.buffer {
            Some(buffer) => (framed::on_wire(buffer.bytes()), [].as_slice()),
            None => {
                let headers = self.device.config_headers.get();
                let config = self.device.config.get();
                (
                    headers.expect("set before publication").as_slice(),
                    config.expect("set before publication").as_slice(),
                )
            }
        };
        [headers, data]
            .into_iter()
            .filter(|bytes| !bytes.is_empty())
            .map(io::IoSlice::new)
    }

    /// Bytes on the wire.
    fn len(&self) -> usize {
        self.slices().map(|slice| slice.len()).sum()
    }

    fn index(&self) -> u32 {
        let headers = self.slices().next();
        framed::index(&headers.expect("every packet has headers"))
    }
}
