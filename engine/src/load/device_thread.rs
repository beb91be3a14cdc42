//! The device's thread: everything of a load but the bytes. Also the main thread's calls on the device.
//!
//! ```text
//!   RESUMING ─▶ attach the transfer ─▶ wait for the I/O thread ─▶ (wait for the notice) ─▶ config ─▶ (STOP)
//! ```

use std::time::{Duration, Instant};

use vfio_migration_uring::{deadline, later};

use super::{Load, LoadDevice, TransferResult, device_side::LoadTransfer};
use crate::{
    device::{Device, Recover, write_all},
    error::{Error, ErrorKind, Phase, Result, Violation},
    reorder::flags::SLACK,
    state::DeviceState,
    sync::{Arc, atomic::Ordering, lock},
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
    let id = &shared.id;
    trace::load_bufs_thread_start(id);
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
    trace::load_bufs_thread_end(id);
    result
}

fn set_up_device(load: &Arc<Load>, shared: &Arc<LoadDevice>, device: &mut Device) -> Result<()> {
    trace::load_setup(&shared.id);
    let since = Instant::now();
    let before = device.state();
    device.set_state(DeviceState::Resuming, Recover::State(before))?;
    shared.counters.phases.set_state.add_time(since.elapsed());
    let fd = device.lend()?;
    *lock(&shared.iterable) = Some(fd.clone());
    let flow = LoadTransfer::new(load.clone(), shared.clone(), fd);
    let attached = load.io.attach(shared.ordinal, flow);
    attached.map_err(|_flow| Error::aborted(Phase::Setup).on_device(&shared.id))
}

fn finish_load(load: &Load, shared: &LoadDevice, device: &mut Device) -> Result<()> {
    let aborted = |_stop| Error::aborted(Phase::Config).on_device(&shared.id);
    let config = wait_for_transfer(load, shared)?;
    let body = wire::config_body(&config).map_err(|error| error.on_device(&shared.id))?;
    if shared.config_waits {
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
    shared.counters.phases.config.add_time(since.elapsed());
    if !rest.is_empty() {
        let violation = Violation::ConfigTrailing(rest.len() as u64);
        return Err(Error::protocol(violation)
            .in_phase(Phase::Config)
            .on_device(&shared.id));
    }
    if load.settings.stop_after_load {
        let since = Instant::now();
        device.set_state(DeviceState::Stop, Recover::Reset)?;
        shared.counters.phases.resume.add_time(since.elapsed());
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

/// Writes iterable data, which comes over the main channel, into the device: in the caller's
/// thread, and only before the switchover starts.
pub(crate) fn write_iterable(shared: &LoadDevice, bytes: &[u8]) -> Result<()> {
    let fd = lock(&shared.iterable);
    let Some(fd) = &*fd else {
        let error = Error::misuse(Phase::Section, "iterable data outside setup and switchover");
        return Err(error.on_device(&shared.id));
    };
    write_all(fd, bytes).map_err(|error| {
        Error::new(ErrorKind::Device, Phase::Section)
            .on_device(&shared.id)
            .caused_by(error)
    })?;
    shared.counters.main_bytes.add(bytes.len() as u64);
    Ok(())
}

/// The switchover starts: all iterable data is in the device.
pub(crate) fn start(load: &Load, shared: &LoadDevice) {
    drop(lock(&shared.iterable).take());
    let switched = shared.flags.switch();
    if shared.flags.start() || switched {
        load.io.wake();
    }
}

/// All of the device's data comes over the channels, what was read in PRE_COPY too: the I/O thread may
/// write what comes before the switchover, but for the config.
pub(crate) fn start_early(load: &Load, shared: &LoadDevice) {
    drop(lock(&shared.iterable).take());
    if shared.flags.start() {
        load.io.wake();
    }
}

/// Waits until the first `count` packets are in the device. Ends with that, the load's end, or a
/// time without progress.
pub(crate) fn wait_written(
    load: &Load,
    shared: &LoadDevice,
    count: u32,
    no_progress: Duration,
) -> Result<()> {
    let mut before = 0;
    loop {
        let deadline = Some(deadline(no_progress));
        let mut written = 0;
        let ended = shared.progress.wait(deadline, || {
            // Acquire: with the I/O thread's release.
            written = shared.written.load(Ordering::Acquire);
            if written >= count {
                return Some(Ok(()));
            }
            let ended = shared.flags.stop().is_some() || shared.flags.is_drained();
            ended.then(|| {
                let aborted = || Error::aborted(Phase::Section).on_device(&shared.id);
                Err(load.failure().unwrap_or_else(aborted))
            })
        });
        match ended {
            Some(result) => return result,
            // Ends: the count rises each time.
            None if written > before => before = written,
            None => {
                let missing = "packets of PRE_COPY data that were said to be sent";
                return Err(Error::stalled(Phase::Section, missing)
                    .on_device(&shared.id)
                    .at_index(written));
            }
        }
    }
}
