//! A VMM's whole integration: a VM with two devices moves from a source to a destination.
//!
//! ```text
//!   source.rs, downtime.rs  ── main channel ──▶  destination.rs
//!                           ═══ 2 channels ════▶
//!                           ◀── return path ───
//! ```
//!
//! It moves twice: as QEMU would have it, with what the devices give while the VM runs on the main
//! channel, and with that over the channels, which both ends have to be this engine for.
//!
//! The devices are simulated and the connections socket pairs; a VMM puts its own in their places.
//! Run it with `cargo run --features sim --example embed`.

use std::{os::unix::net::UnixStream, thread, time::Duration};

use vfio_migration::{
    Channel, Device, DeviceId, LoadSession, Result, Settings, SourceChannels,
    migration::{Capabilities, DeviceSettings, MigratableDevice, SwitchoverAck},
    sim::{SimConfig, SimDevice, SimHandle},
};

#[path = "destination.rs"]
pub mod destination;
#[path = "downtime.rs"]
pub mod downtime;
#[path = "source.rs"]
pub mod source;

use self::{
    destination::destination,
    downtime::{Limits, converge},
    source::{Runs, source},
};

/// What both ends have agreed on.
fn capabilities(over_channels: bool) -> Capabilities {
    let mut capabilities = Capabilities::default();
    capabilities.switchover_ack = SwitchoverAck::Once;
    capabilities.precopy_over_channels = over_channels;
    capabilities
}

/// Two simulated devices.
fn devices(seed: u64) -> Result<(Vec<MigratableDevice>, Vec<SimHandle>)> {
    let device = |number| {
        let config = SimConfig {
            seed: seed + u64::from(number),
            precopy_initial: 5000,
            ..SimConfig::default()
        };
        let device = SimDevice::new(config).expect("it can be");
        let handle = device.handle();
        let id = DeviceId::new("0000:00:03.0/vfio", number)?;
        let device = Device::new(id, Box::new(device))?;
        let settings = DeviceSettings::default();
        Ok((MigratableDevice::new(device, settings), handle))
    };
    (0..2).map(device).collect()
}

/// Moves a VM.
fn migrate(capabilities: &Capabilities) -> Result<()> {
    let pair = || UnixStream::pair().expect("sockets are to be had");
    let (main, main_there) = pair();
    let (channels, channels_there): (Vec<_>, Vec<_>) = (0..2).map(|_| pair()).unzip();
    let ((devices_here, before), (devices_there, after)) = (devices(1)?, devices(100)?);
    let limits = Limits {
        downtime: Duration::from_millis(300),
        bandwidth: 1 << 30,
        precopy: Duration::from_secs(60),
    };
    // The destination does not wait for their hellos for long, but then for as long as the VM runs.
    let channels = channels.into_iter().map(Channel::from).collect();
    let channels = SourceChannels::greet(channels, &Settings::default())?;
    let session = LoadSession::builder().channels(channels_there);
    let patience = Duration::from_secs(60);
    let ((runs, _here), (moved, _there)) = thread::scope(|scope| {
        let here = scope.spawn(|| {
            source(
                devices_here,
                &main,
                channels,
                capabilities,
                patience,
                |sources, channels, main| converge(sources, channels, main, &limits),
            )
        });
        let there = destination(devices_there, &main_there, session, capabilities);
        (here.join().expect("no side panics"), there)
    });
    moved?;
    match runs {
        Runs::There => {}
        Runs::Here(error) => return Err(error),
        Runs::Unknown => unreachable!("the destination has said that it runs there"),
    }
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(before.digest(), after.digest());
        assert_eq!(before.config_digest(), after.config_digest());
    }
    Ok(())
}

/// Moves a VM, in both ways.
pub fn main() -> Result<()> {
    migrate(&capabilities(false))?;
    migrate(&capabilities(true))?;
    println!("moved");
    Ok(())
}
