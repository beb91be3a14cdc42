//! What a migration is done with: devices whose digests are known, and both sides' sessions.

use vfio_migration::{
    Channel, Device, DeviceState, Error, LoadBuilder, LoadSession, Phase, Report, SaveBuilder,
    SaveSession, Settings,
    sim::{SimConfig, SimDevice, SimHandle},
};

use crate::plan::{Plan, RingKind, id};

/// A device's handle, and the digest of what it began with.
pub struct Subject {
    pub handle: SimHandle,
    pub before: u64,
}

/// The notices of the main channel.
pub fn go(plan: &Plan, load: &Result<LoadSession, Error>) {
    if let Ok(load) = load {
        notices(plan, load);
    }
}

/// As [`go`], where there is a load.
pub fn notices(plan: &Plan, load: &LoadSession) {
    load.switchover_start();
    if plan.load.config_after_iterables {
        for at in 0..plan.devices.len() {
            // A session that has failed already says so at its end.
            let _late = load.config_load_ready(&id(at));
        }
    }
}

/// A device that begins with the plan's state, or none where it cannot be made, and its handle.
pub fn device(at: usize, config: &SimConfig) -> Result<(Option<Device>, Subject), String> {
    let sim = SimDevice::new(config.clone()).map_err(|error| error.to_string())?;
    let handle = sim.handle();
    let before = handle.digest();
    let device = Device::new(id(at), Box::new(sim)).ok();
    Ok((device, Subject { handle, before }))
}

/// The source's side.
pub fn saving(plan: &Plan, channels: Vec<Channel>) -> Result<(SaveBuilder, Vec<Subject>), String> {
    let mut builder = SaveSession::builder().settings(with_backend(&plan.save, &plan.save_ring));
    if let RingKind::Simulated(ring) = &plan.save_ring {
        builder = builder.simulated_ring(ring.clone());
    }
    let mut looked = Vec::new();
    for (at, (config, _)) in plan.devices.iter().enumerate() {
        let (device, look) = device(at, config)?;
        looked.push(look);
        builder = device.into_iter().fold(builder, SaveBuilder::device);
    }
    let builder = channels.into_iter().fold(builder, SaveBuilder::channel);
    Ok((builder, looked))
}

/// The destination's side.
pub fn loading(plan: &Plan, channels: Vec<Channel>) -> Result<(LoadBuilder, Vec<Subject>), String> {
    let mut builder = LoadSession::builder().settings(with_backend(&plan.load, &plan.load_ring));
    if let RingKind::Simulated(ring) = &plan.load_ring {
        builder = builder.simulated_ring(ring.clone());
    }
    let mut looked = Vec::new();
    for (at, (_, config)) in plan.devices.iter().enumerate() {
        let (device, look) = device(at, config)?;
        looked.push(look);
        builder = device.into_iter().fold(builder, LoadBuilder::device);
    }
    let builder = channels.into_iter().fold(builder, LoadBuilder::channel);
    Ok((builder, looked))
}

/// Settings with the backend of the plan's ring.
pub fn with_backend(settings: &Settings, ring: &RingKind) -> Settings {
    let mut settings = settings.clone();
    if let RingKind::Real(backend) = ring {
        settings.backend = *backend;
    }
    settings
}

/// A side that was never started.
pub fn never() -> Result<Report, Error> {
    Err(Error::cancelled(Phase::Setup))
}

/// The state that a device of a failed save is put back to.
pub const PUT_BACK: DeviceState = DeviceState::Running;
