//! Outlet: from the queue to the destination's connection, while its line is not ahead.
//!
//! ```text
//!   wait: a packet, and a line that is not ahead ─▶ lock the line, look again
//!     ─▶ take ─▶ send headers and data with one call ─▶ recycle
//! ```
//!
//! The packet is taken under the line's lock, so that it is sent before whatever SYNC comes next.

use super::*;

/// Serves one of the destination's channels until every packet has a taker.
pub(super) fn serve(shared: &Shared, line: &Line) -> Result<()> {
    let epoch = shared.collector.register();
    let mut devices = Vec::new();
    while wait(shared, line)? {
        let sent = line.with_sender(|sender| {
            if !shared.may_send(line) {
                return Ok(());
            }
            let ticket = shared.queue.try_take(&epoch.pin());
            match ticket {
                Some(Ticket::Packet(packet)) => send(shared, sender, packet, &mut devices),
                // Found by the wait.
                Some(Ticket::End | Ticket::Closed) | None => Ok(()),
            }
        });
        sent?;
        shared.room.notify_all();
        if shared.all_moved() {
            // An outlet whose line is ahead for good waits for the last packet to be taken.
            shared.outgoing.notify_all();
        }
    }
    line.finish()
}

/// Waits for a packet that may be sent on this line. False where there will be none.
fn wait(shared: &Shared, line: &Line) -> Result<bool> {
    let found = shared.outgoing.wait(None, || {
        if let Some(error) = shared.stopped() {
            return Some(Err(error));
        }
        // Before the look at the queue: what was published before its end is seen.
        let ended = shared.all_moved();
        if shared.queue.waiting() > 0 {
            return shared.may_send(line).then_some(Ok(true));
        }
        ended.then_some(Ok(false))
    });
    found.expect("a wait without a deadline ends with a look")
}

/// Sends one packet, and gives its memory back. `devices` are those known so far, by ordinal.
fn send(
    shared: &Shared,
    sender: &mut Sender,
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
    let sent = sender.send(&mut [IoSlice::new(&bytes[HEADERS..])]);
    if let Err(error) = sent {
        let index = word(HEADERS + wire::DEVICE_STATE_HEADER_LEN + 4);
        return Err(error.on_device(&device.id).at_index(index));
    }
    device.counters.taken(1);
    let payload = bytes.len() - HEADERS - wire::DEVICE_STATE_HEADER_LEN;
    device.counters.bytes.add(payload as u64);
    Ok(())
}
