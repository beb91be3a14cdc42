//! Channel side: take → send, until every packet has a taker.
//!
//! ```text
//!   take (waits) ─▶ take more, where they are small ─▶ send all with one call ─▶ recycle
//!   the end ─▶ finish: the peer reads the channel's end ─▶ kept open, for the session's report
//! ```

use super::*;

/// Packets below this size are sent several with one call.
const SMALL: usize = 64 << 10;

/// How many, at most.
const GATHER: usize = 16;

/// Channel side: take → send, until every packet has a taker.
pub(crate) fn serve_channel(
    save: &Save,
    mut sender: Sender,
    terms: &Terms,
    id: u8,
    counters: &ChannelCounters,
) -> Result<()> {
    sender.greet(terms, id)?;
    sender.set_timeout(terms.no_progress)?;
    counters.syncs.add(1);
    let epoch = save.collector.register();
    let mut packets = Vec::with_capacity(GATHER);
    loop {
        let since = Instant::now();
        let ticket = save.queue.take(None, || epoch.pin());
        counters.blocked.add_time(since.elapsed());
        match ticket.expect("a wait without a deadline ends with a look") {
            Ticket::Packet(packet) => packets.push(Outgoing::new(save, packet)),
            Ticket::End => {
                sender.finish()?;
                lock(&save.finished).push(sender.into_channel());
                return Ok(());
            }
            Ticket::Closed => {
                let failure = save.verdict.failure();
                return Err(failure.unwrap_or_else(|| Error::cancelled(Phase::Send)));
            }
        }
        while packets.len() < GATHER && packets.iter().all(|packet| packet.len() < SMALL) {
            match save.queue.try_take(&epoch.pin()) {
                Some(Ticket::Packet(packet)) => packets.push(Outgoing::new(save, packet)),
                // Found again by the next take.
                _ => break,
            }
        }
        let sent = {
            let mut slices: Vec<_> = packets.iter().flat_map(Outgoing::slices).collect();
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
struct Outgoing<'a> {
    device: &'a SaveDevice,
    /// Headroom and data; `None` for the config packet, which is the device's to keep.
    buffer: Option<crate::reorder::pool::Lease<&'a Pool>>,
}

impl<'a> Outgoing<'a> {
    fn new(save: &'a Save, packet: Packet) -> Self {
        match packet.payload {
            Payload::Piece(piece) => {
                let buffer = Pool::adopt(&*save.pool, piece);
                let ordinal = buffer.bytes()[..4].try_into().expect("4 of many bytes");
                Self {
                    device: &save.devices[u32::from_be_bytes(ordinal) as usize],
                    buffer: Some(buffer),
                }
            }
            Payload::Aside(ordinal) => Self {
                device: usize::try_from(ordinal)
                    .ok()
                    .and_then(|at| save.devices.get(at))
                    .expect("the driver published it"),
                buffer: None,
            },
            Payload::Empty => unreachable!("a save has no empty packets"),
        }
    }

    /// Headers, then data.
    fn slices(&self) -> impl Iterator<Item = io::IoSlice<'_>> {
        let (headers, data) = match &self.buffer {
            Some(buffer) => (&buffer.bytes()[HEADERS..], [].as_slice()),
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
        let index = headers
            .as_deref()
            .and_then(|headers| headers.get(wire::DEVICE_STATE_HEADER_LEN + 4..))
            .and_then(|bytes| bytes.first_chunk());
        index.copied().map_or(0, u32::from_be_bytes)
    }
}
