//! Outlet: from the queue to the destination's connection, once the line is open.
//!
//! ```text
//!   opening (waits) ─▶ take (waits) ─▶ send headers and data with one call ─▶ recycle
//! ```

use super::*;

/// Serves one of the destination's channels until every packet has a taker.
pub(super) fn serve(shared: &Shared, line: &Line) -> Result<()> {
    let opened = shared.openings.wait(None, || {
        let open = line.is_open().map(Ok);
        open.or_else(|| shared.stopped().map(Err))
    });
    let opened = opened.expect("a wait without a deadline ends with a look");
    if opened? {
        send_all(shared, line)?;
    }
    line.finish()
}

fn send_all(shared: &Shared, line: &Line) -> Result<()> {
    let epoch = shared.collector.register();
    let mut devices = Vec::new();
    loop {
        let ticket = shared.queue.take(None, || epoch.pin());
        match ticket.expect("a wait without a deadline ends with a look") {
            Ticket::Packet(packet) => send(shared, line, packet, &mut devices)?,
            Ticket::End => return Ok(()),
            Ticket::Closed => {
                let failure = shared.stopped();
                return Err(failure.unwrap_or_else(|| Error::cancelled(Phase::Send)));
            }
        }
        shared.room.notify_all();
    }
}

/// Sends one packet, and gives its memory back. `devices` are those known so far, by ordinal.
fn send(
    shared: &Shared,
    line: &Line,
    packet: Packet,
    devices: &mut Vec<Arc<RelayDevice>>,
) -> Result<()> {
    let Payload::Piece(piece) = packet.payload else {
        unreachable!("a relay's packets have their headers at least");
    };
    let buffer: Lease<&Pool> = Pool::adopt(&*shared.pool, piece);
    let bytes = buffer.bytes();
    let word = |at: usize| {
        let word = bytes[at..at + 4].try_into().expect("4 of many bytes");
        u32::from_be_bytes(word)
    };
    let ordinal = word(0) as usize;
    if ordinal >= devices.len() {
        devices.clone_from(&lock(&shared.devices));
    }
    let device = &devices[ordinal];
    let sent = line.send(&mut [IoSlice::new(&bytes[HEADERS..])]);
    if let Err(error) = sent {
        let index = word(HEADERS + wire::DEVICE_STATE_HEADER_LEN + 4);
        return Err(error.on_device(&device.id).at_index(index));
    }
    device.counters.taken(1);
    let payload = bytes.len() - HEADERS - wire::DEVICE_STATE_HEADER_LEN;
    device.counters.bytes.add(payload as u64);
    Ok(())
}
