//! A device's state in a file, and back: a channel that is a file. The VM stands still meanwhile.
//! Run it with `cargo run --features sim --example save_to_file -- FILE`.

use std::{fs::File, path::Path};

use vfio_migration::{
    Channel, Device, DeviceId, Error, ErrorKind, LoadSession, Phase, Result, SaveSession,
    migration::vm::{self, Reason},
    sim::{SimConfig, SimDevice, SimHandle},
};

fn file_failed(error: std::io::Error) -> Error {
    Error::new(ErrorKind::Channel, Phase::Setup).caused_by(error)
}

/// Saves the device, and lets its VM go on.
fn save(mut device: Device, path: &Path) -> Result<Device> {
    let file = File::create_new(path).map_err(file_failed)?;
    // … the processors stop …
    vm::stop(std::slice::from_mut(&mut device), Reason::Other)?;
    // Nothing wakes a thread that writes to a file; nor does it wait for anybody.
    let channel = Channel::from_stream(file, || {});
    let session = SaveSession::builder()
        .device(device)
        .channel(channel)
        .start()?;
    let mut report = session.join();
    // Back to STOP, whether it has succeeded or not.
    report.put_back();
    let device = report.devices.remove(0).device;
    let mut device = device.ok_or_else(|| Error::new(ErrorKind::Stuck, Phase::Save))?;
    vm::start(std::slice::from_mut(&mut device))?;
    // … and the processors go on.
    report.result.map(|()| device)
}

/// Loads a device. It is in STOP then: its driver has accepted the state, and its VM may start.
fn load(device: Device, path: &Path) -> Result<Device> {
    let file = File::open(path).map_err(file_failed)?;
    let channel = Channel::from_reader(file);
    let session = LoadSession::builder()
        .device(device)
        .channel(channel)
        .start()?;
    session.switchover_start();
    let mut report = session.join();
    let device = report.devices.remove(0).device;
    report.result?;
    device.ok_or_else(|| Error::new(ErrorKind::Stuck, Phase::Load))
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

/// Saves one device, and loads another from its file.
pub fn run(path: &Path) -> Result<()> {
    let ((here, before), (there, after)) = (device(1)?, device(2)?);
    let digest = before.digest();
    let _here = save(here, path)?;
    let mut there = load(there, path)?;
    vm::start(std::slice::from_mut(&mut there))?;
    assert_eq!(digest, after.digest());
    Ok(())
}

/// Takes the file's path.
pub fn main() -> Result<()> {
    let path = std::env::args_os()
        .nth(1)
        .expect("a path, where nothing is yet");
    run(Path::new(&path))
}
