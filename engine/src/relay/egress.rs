//! Egress: from the queue to the destination's connection, while the egress channel is not ahead.
//!
//! ```text
//!   wait: a packet, and an egress channel that is not ahead ─▶ lock the egress channel, look again
//!     ─▶ take ─▶ send headers and data with one call ─▶ recycle
//! ```
//!
//! The thread takes the packet under the egress channel's lock, so no SYNC can be sent before the packet.

use std::io::IoSlice;

use super::{RelayDevice, Shared, egress_channel::EgressChannel};
use crate::{
    channel::Sender,
    error::Result,
    framed,
    reorder::{
        pool::{Lease, Pool},
        send_queue::Taken,
        slot::{Packet, Payload},
    },
    sync::{Arc, lock},
    wire,
};

/// Serves one of the destination's channels until every packet has a taker.
pub(super) fn serve(shared: &Shared, egress_channel: &EgressChannel) -> Result<()> {
    let epoch = shared.collector.register();
    let mut devices = Vec::new();
    while wait(shared, egress_channel)? {
        let sent = egress_channel.with_sender(|sender| {
            if !shared.may_send(egress_channel) {
                return Ok(());
            }
            let ticket = shared.queue.try_take(&epoch.pin());
            match ticket {
                Some(Taken::Packet(packet)) => send(shared, sender, packet, &mut devices),
                // Found by the wait.
                Some(Taken::End | Taken::Closed) | None => Ok(()),
            }
        });
        sent?;
        shared.backpressure.notify_all();
        if shared.all_moved() {
            // An egress thread whose channel is ahead for good waits for the last packet to be taken.
            shared.outgoing.notify_all();
        }
    }
    egress_channel.finish()
}

/// Waits for a packet that may be sent on this egress channel. False where there will be none.
fn wait(shared: &Shared, egress_channel: &EgressChannel) -> Result<bool> {
    let found = shared.outgoing.wait(None, || {
        if let Some(error) = shared.stopped() {
            return Some(Err(error));
        }
        // Before the look at the queue: what was published before its end is seen.
        let ended = shared.all_moved();
        if shared.queue.waiting() > 0 {
            return shared.may_send(egress_channel).then_some(Ok(true));
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
    let Payload::Lease(piece) = packet.payload else {
        unreachable!("a relay's packets have their headers at least");
    };
    let buffer: Lease<&Pool> = Pool::adopt(&*shared.pool, piece);
    let ordinal = framed::ordinal(buffer.bytes());
    let bytes = framed::on_wire(buffer.bytes());
    if ordinal >= devices.len() {
        devices.clone_from(&lock(&shared.devices));
    }
    let device = &devices[ordinal];
    let sent = sender.send(&mut [IoSlice::new(bytes)]);
    if let Err(error) = sent {
        return Err(error.on_device(&device.id).at_index(framed::index(bytes)));
    }
    device.counters.taken(1);
    let payload = bytes.len() - wire::DEVICE_STATE_HEADER_LEN;
    device.counters.bytes.add(payload as u64);
    Ok(())
}
