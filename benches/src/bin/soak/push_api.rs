//! A destination whose channels are somebody else's, who pushes the packets that come.
//!
//! A thread for each connection reads the source's packets and pushes each in one of the ways that
//! there are: waiting, trying first, into memory that was leased. It ends with its connection or with
//! the load; the source's end and failure are the connection's.

use std::{
    io,
    sync::{Arc, Barrier},
    thread,
};

use vfio_migration::{
    DeviceId, Error, LoadSession, Publisher, SaveSession,
    wire::{PACKET_HEADER_LEN, PacketHeader},
};

use crate::{
    packets::{Packet, Packets},
    path::{Socket, connections},
    plan::{Plan, Scene, Side},
    random::Random,
    subject::{loading, notices, saving},
    verify,
};

/// Runs it. Returns whether it succeeded, as judged.
pub fn run(plan: &Plan) -> Result<bool, String> {
    let (near, far) = connections(plan).map_err(|error| error.to_string())?;
    let near = near.into_iter().map(Into::into).collect();
    let (save, saved) = saving(plan, near)?;
    let (load, loaded) = loading(plan, Vec::new())?;
    let load = match load.start().map_err(Error::from) {
        Ok(load) => load,
        Err(error) => {
            drop(far);
            let save = Some(save.start().map_err(Error::from).map(SaveSession::join));
            return verify::both(plan, &saved, &loaded, save, Some(Err(error)));
        }
    };
    // The input stays open until all have theirs.
    let first = load.publisher();
    load.no_more_channels();
    notices(plan, &load);
    let save = save.start().map_err(Error::from);
    thread::scope(|scope| {
        let begun = Arc::new(Barrier::new(far.len() + 1));
        for (at, socket) in (0_u64..).zip(far) {
            let (load, begun) = (&load, begun.clone());
            scope.spawn(move || {
                let publisher = load.publisher();
                begun.wait();
                // Whatever ends it, both sessions say so themselves.
                let _ended = push(socket, publisher, Random(plan.seed ^ (0x9054 + at)));
            });
        }
        begun.wait();
        drop(first);
        if plan.scene == Scene::Cancel {
            thread::sleep(plan.after);
            match (&save, plan.victim) {
                (Ok(save), Side::Save) => save.cancel(),
                _ => load.cancel(),
            }
        }
    });
    let save = Some(save.map(SaveSession::join));
    let load = Some(Ok(LoadSession::join(load)));
    verify::both(plan, &saved, &loaded, save, load)
}

/// Pushes what comes on a connection.
fn push(socket: Socket, mut publisher: Publisher, mut random: Random) -> io::Result<()> {
    let mut packets = Packets::new(socket);
    while let Some(packet) = packets.next()? {
        if let Packet::Device { id, bytes, payload } = packet {
            let pushed = one(&mut publisher, &id, &bytes[payload..], &mut random);
            pushed.map_err(io::Error::other)?;
        }
    }
    Ok(())
}

fn one(
    publisher: &mut Publisher,
    id: &DeviceId,
    payload: &[u8],
    random: &mut Random,
) -> Result<(), Error> {
    match random.below(3) {
        0 => publisher.push(id, payload),
        1 => {
            if publisher.try_push(id, payload)? {
                return Ok(());
            }
            publisher.push(id, payload)
        }
        _ => {
            let (header, data) = payload
                .split_first_chunk::<PACKET_HEADER_LEN>()
                .expect("our source's");
            let header = PacketHeader::decode(header)?;
            let mut lease = publisher.lease(id, header, data.len())?;
            lease.bytes_mut().copy_from_slice(data);
            lease.publish()
        }
    }
}
