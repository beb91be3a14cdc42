//! The device's thread: everything of a load but the bytes. Also the main thread's calls on the device.
//!
//! ```text
//!   RESUMING ─▶ attach the transfer ─▶ wait for the I/O thread ─▶ (wait for the notice) ─▶ config ─▶ (STOP)
//! ```

use std::time::Instant;

use vfio_migration_uring::{deadline, later};

use super::{Load, LoadDevice, TransferResult, device_side::LoadTransfer};
use crate::{
    device::{Device, Recover},
    error::{Error, ErrorKind, Phase, Result, Violation},
    reorder::flags::SLACK,
    settings::ConfigGate,
    state::DeviceState,
    sync::{Arc, lock},
    trace, wire,
};

/// The device's thread: everything of a load but the bytes. Returns once the device is loaded, put
/// back, or given up; never touches a device that a transfer is stuck in.
pub(crate) fn serve_device(
    load: &Arc<Load>,
    shared: &Arc<LoadDevice>,
    device: &mut Device,
    set_up: impl FnOnce(Result<()>),
) -> Result<()> {
    let result = set_up_device(load, shared, device);
    set_up(result.clone());
    let result = result.and_then(|()| finish_load(load, shared, device));
    if let Err(error) = &result
        && *error.kind() != ErrorKind::Stuck
    {
        // Where the switchover never began the main channel's side still has the fd.
        drop(lock(&shared.iterable).take());
        // The first error is the one to report; what this one comes to is the device's duty.
        let _duty = device.discard_state();
    }
    shared.told.ends(&shared.id);
    result
}

fn set_up_device(load: &Arc<Load>, shared: &Arc<LoadDevice>, device: &mut Device) -> Result<()> {
    trace::load_setup(&shared.id);
    let since = Instant::now();
    let before = device.state();
    device.set_state(DeviceState::Resuming, Recover::State(before))?;
    shared.counters.phases.set_state.add_since(since);
    let fd = device.lend()?;
    {
        let mut iterable = lock(&shared.iterable);
        // Under the lock, as the start: a device that comes behind it has no iterable data.
        if !shared.flags.is_started() {
            *iterable = Some(fd.clone());
        }
    }
    let flow = LoadTransfer::new(load.clone(), shared.clone(), fd);
    let attached = load.io.attach(shared.ordinal, flow);
    attached.map_err(|_flow| Error::aborted(Phase::Setup).on_device(&shared.id))
}

fn finish_load(load: &Load, shared: &LoadDevice, device: &mut Device) -> Result<()> {
    let aborted = |_stop| Error::aborted(Phase::Config).on_device(&shared.id);
    let config = wait_for_transfer(load, shared)?;
    let body = wire::config_body(&config).map_err(|error| error.on_device(&shared.id))?;
    if shared.rules.config_gate == ConfigGate::OnNotice {
        // A time beyond the clock's end is none.
        let until = Some(deadline(load.settings.config_ready_timeout));
        match shared.flags.wait_config_ready(until) {
            Some(told) => told.map_err(aborted)?,
            None => {
                let missing = "the notice that its config may be loaded has not come";
                return Err(Error::stalled(Phase::Config, missing).on_device(&shared.id));
            }
        }
    } else if let Some(stop) = shared.flags.stop() {
        return Err(aborted(stop));
    }
    let since = Instant::now();
    let mut rest = body;
    device.load_config(&mut rest)?;
    shared.counters.phases.config.add_since(since);
    if !rest.is_empty() {
        let violation = Violation::ConfigTrailing(rest.len() as u64);
        return Err(Error::protocol(violation)
            .in_phase(Phase::Config)
            .on_device(&shared.id));
    }
    if shared.rules.stops {
        let since = Instant::now();
        device.set_state(DeviceState::Stop, Recover::Reset)?;
        shared.counters.phases.resume.add_since(since);
    }
    Ok(())
}

/// The I/O thread's result. Ends with it; or, after a stop, with the grace time.
fn wait_for_transfer(load: &Load, shared: &LoadDevice) -> TransferResult {
    if shared.flags.wait_drained().is_err() {
        // The I/O thread bounds its own part by the grace time.
        let until = later(deadline(load.settings.grace), SLACK);
        if !shared.flags.wait_drained_until(until) {
            return Err(Error::new(ErrorKind::Stuck, Phase::Load).on_device(&shared.id));
        }
    }
    let drained = lock(&shared.drained).take();
    drained.expect("the I/O thread leaves its result before it says so")
}
