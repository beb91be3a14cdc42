//! Packets that come in a stream of the VMM's own: the VMM reads it, and pushes what it brings.
//!
//! A TLS session needs none of this: `TlsStream` is a channel, and so is each `ChannelStream` of the VMM's. This is
//! for bytes that no thread of the engine may read: those of an async runtime, of a ring of the VMM's, of a
//! protocol around the channels. Run it with `cargo run --features sim --example push`.

use std::{io::Read, os::unix::net::UnixStream, thread};

use vfio_migration::{
    Device, DeviceId, Error, ErrorKind, LoadSession, Phase, Publisher, Result, SaveSession,
    sim::{SimConfig, SimDevice, SimHandle},
    wire::{DEFAULT_MAX_PACKET, Frame, Framer, PACKET_HEADER_LEN, PageSize, Step},
};

const STREAMS: u32 = 2;

/// Reads one channel to its end.
fn receive(mut stream: impl Read, publisher: &mut Publisher) -> Result<()> {
    let mut framer = Framer::new(Some(PageSize::new(4096)?), DEFAULT_MAX_PACKET);
    let (mut bytes, mut chunk) = (Vec::new(), vec![0; 1 << 20]);
    loop {
        let lost = |error| Error::new(ErrorKind::Channel, Phase::Receive).caused_by(error);
        let count = stream.read(&mut chunk).map_err(lost)?;
        if count == 0 {
            return framer.end(bytes.len());
        }
        bytes.extend(&chunk[..count]);
        let mut at = 0;
        while let Step::Frame {
            frame,
            header_len,
            payload_len,
        } = framer.decode(&bytes[at..])?
        {
            let end = at + header_len + payload_len as usize;
            if bytes.len() < end {
                break;
            }
            match frame {
                Frame::Hello(hello) => hello.check(&[0; 16], STREAMS)?,
                Frame::DeviceState(packet) => {
                    let key = packet.header.key();
                    let id = key.id().ok_or_else(|| key.unknown())?;
                    // Waits while the budget is spent, and so holds the source back.
                    publisher.push(&id, &bytes[at + header_len - PACKET_HEADER_LEN..end])?;
                }
                Frame::Sync { .. } => {}
                Frame::Ram(_) => {} // … the VMM's …
            }
            at = end;
        }
        bytes.drain(..at);
    }
}

fn device(seed: u64) -> Result<(Device, SimHandle)> {
    let device = SimDevice::new(SimConfig {
        seed,
        ..SimConfig::default()
    })
    .expect("it can be");
    let handle = device.handle();
    let id = DeviceId::new("0000:00:03.0/vfio", 0)?;
    Ok((Device::new(id, Box::new(device))?, handle))
}

/// Moves a device's state, over two streams.
pub fn main() -> Result<()> {
    let ((here, before), (there, after)) = (device(1)?, device(2)?);
    let pair = || UnixStream::pair().expect("sockets are to be had");
    let (channels, streams): (Vec<_>, Vec<_>) = (0..STREAMS).map(|_| pair()).unzip();
    let load = LoadSession::builder().device(there).start()?;
    let save = SaveSession::builder()
        .device(here)
        .channels(channels)
        .start()?;
    load.switchover_start();
    thread::scope(|scope| {
        for stream in streams {
            let load = &load;
            scope.spawn(move || {
                if let Err(error) = receive(stream, &mut load.publisher()) {
                    load.fail(error);
                }
            });
        }
        save.join().result
    })?;
    // With this and the last publisher the input has ended: what is missing then is an error.
    load.no_more_channels();
    load.join().result?;
    assert_eq!(before.digest(), after.digest());
    Ok(())
}
