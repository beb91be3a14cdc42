//! A migration that passes through: two VMMs, and a relay between their channels. The main channel is
//! passed on by whoever runs the relay, both ways, as it is. Run it with
//! `cargo run --features sim --example relay`.

use std::{os::unix::net::UnixStream, thread};

use vfio_migration::{
    Device, DeviceId, LoadSession, Relay, Result, SaveSession, Settings,
    sim::{SimConfig, SimDevice, SimHandle},
};

const CHANNELS: u32 = 3;

/// Passes each pair's channel on, from the source's connection to the destination's.
fn relay(pairs: Vec<(UnixStream, UnixStream)>) -> Result<()> {
    let settings = Settings::default().channels(CHANNELS);
    let relay = Relay::builder().settings(settings).start()?;
    for (source, destination) in pairs {
        relay.add_channel(source, destination)?;
    }
    // To cancel it from here on: a `Relay::canceller` on another thread, for `join` consumes the relay.
    relay.join().result
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

/// Moves a device's state through a relay.
pub fn main() -> Result<()> {
    let ((here, before), (there, after)) = (device(1)?, device(2)?);
    let pair = || UnixStream::pair().expect("sockets are to be had");
    let (from_source, source): (Vec<_>, Vec<_>) = (0..CHANNELS).map(|_| pair()).unzip();
    let (to_destination, destination): (Vec<_>, Vec<_>) = (0..CHANNELS).map(|_| pair()).unzip();
    let pairs = from_source.into_iter().zip(to_destination).collect();
    let load = LoadSession::builder()
        .device(there)
        .channels(destination)
        .start()?;
    let save = SaveSession::builder()
        .device(here)
        .channels(source)
        .start()?;
    load.switchover_start();
    thread::scope(|scope| {
        let between = scope.spawn(|| relay(pairs));
        save.join().result?;
        between.join().expect("it does not panic")
    })?;
    load.join().result?;
    assert_eq!(before.digest(), after.digest());
    Ok(())
}
