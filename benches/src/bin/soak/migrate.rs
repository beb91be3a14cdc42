//! One migration, in this process or with a peer.

use std::{io, thread};

use vfio_migration::{
    Channel, Device, DeviceState, Error, LoadBuilder, LoadSession, Phase, Report, SaveBuilder,
    SaveSession, Settings,
    sim::{SimConfig, SimDevice, SimHandle},
};

use crate::{
    between::{self, Between},
    judge, peer,
    plan::{Plan, RingKind, Scene, Side, Way, id},
    processes, pushed, whole,
};

/// A device's handle, and the digest of what it began with.
pub struct Looked {
    pub handle: SimHandle,
    pub before: u64,
}

/// Runs it. Returns whether it succeeded, as judged; an error says which promise was broken.
pub fn run(plan: &Plan) -> Result<bool, String> {
    if plan.scene.has_peer() {
        return peer::run(plan);
    }
    match &plan.way {
        Way::Direct => {
            let (near, far) = channels(plan).map_err(|error| error.to_string())?;
            sessions(plan, near, far)
        }
        Way::Shared { .. } | Way::Relayed => {
            let (between, near, far) = Between::new(plan)?;
            let success = sessions(plan, near, far)?;
            between.end(plan, success)?;
            Ok(success)
        }
        Way::Pushed => pushed::run(plan),
        Way::Whole(cycle) => whole::run(plan, cycle),
        Way::Processes(cast) => processes::run(plan, cast),
    }
}

/// A save and a load, with these connections.
fn sessions(plan: &Plan, near: Vec<Channel>, far: Vec<Channel>) -> Result<bool, String> {
    let (save, saved) = saving(plan, near)?;
    let (load, loaded) = loading(plan, far)?;
    let (save, load) = match (plan.scene, plan.victim) {
        (Scene::Drop, Side::Save) => {
            let load = load.start();
            go(plan, &load);
            let save = save.start();
            thread::sleep(plan.after);
            drop(save);
            (None, Some(load.map(LoadSession::join)))
        }
        (Scene::Drop, Side::Load) => {
            let load = load.start();
            go(plan, &load);
            let save = save.start();
            thread::sleep(plan.after);
            drop(load);
            (Some(save.map(SaveSession::join)), None)
        }
        (scene, victim) => match load.start() {
            Err(error) => {
                // Its channels went with it.
                let save = save.start().map(SaveSession::join);
                (Some(save), Some(Err(error)))
            }
            Ok(load) => {
                let load = Ok(load);
                go(plan, &load);
                let save = save.start();
                if scene == Scene::Cancel {
                    thread::sleep(plan.after);
                    match (&save, &load, victim) {
                        (Ok(save), _, Side::Save) => save.cancel(),
                        (_, Ok(load), Side::Load) => load.cancel(),
                        _ => {}
                    }
                }
                let save = save.map(SaveSession::join);
                (Some(save), Some(load.map(LoadSession::join)))
            }
        },
    };
    judge::both(plan, &saved, &loaded, save, load)
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

/// Connections: the source's ends, and the destination's.
pub fn channels(plan: &Plan) -> io::Result<(Vec<Channel>, Vec<Channel>)> {
    let (near, far) = between::connections(plan)?;
    let channels = |ends: Vec<_>| ends.into_iter().map(Channel::from).collect();
    Ok((channels(near), channels(far)))
}

pub fn device(at: usize, config: &SimConfig) -> Result<(Option<Device>, Looked), String> {
    let sim = SimDevice::new(config.clone()).map_err(|error| error.to_string())?;
    let handle = sim.handle();
    let before = handle.digest();
    let device = Device::new(id(at), Box::new(sim)).ok();
    Ok((device, Looked { handle, before }))
}

/// The source's side.
pub fn saving(plan: &Plan, channels: Vec<Channel>) -> Result<(SaveBuilder, Vec<Looked>), String> {
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
pub fn loading(plan: &Plan, channels: Vec<Channel>) -> Result<(LoadBuilder, Vec<Looked>), String> {
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
