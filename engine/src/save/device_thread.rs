//! The device's thread: everything of a save but the bytes.
//!
//! ```text
//!   STOP_COPY ─▶ attach the transfer ─▶ save the config meanwhile ─▶ wait for the I/O thread
//! ```

use std::io::Write;

use std::time::Instant;

use vfio_migration_uring::{deadline, later};

use super::{Save, SaveDevice, device_side::SaveTransfer};
use crate::host::Growing;
use crate::{
    device::Device,
    error::{Error, ErrorKind, Phase, Result},
    reorder::flags::SLACK,
    state::DeviceState,
    sync::{Arc, lock},
    trace, wire,
};

/// The device's thread: everything of a save but the bytes. Returns once all of the device is in
/// the queue, or it is put back, or given up.
pub(crate) fn serve_device(
    save: &Arc<Save>,
    shared: &Arc<SaveDevice>,
    device: &mut Device,
    set_up: impl FnOnce(Result<()>),
) -> Result<()> {
    trace::save_complete_precopy_thread_start(&shared.id);
    let result = set_up_device(save, shared, device);
    set_up(result.clone());
    let result = result.and_then(|()| {
        let config = save_config(save, shared, device);
        if let Err(error) = &config {
            // Ends the I/O thread's part too, so that the wait for it does.
            save.fail(error.clone());
        }
        config.and(wait_for_transfer(save, shared))
    });
    trace::save_complete_precopy_thread_end(&shared.id, result.is_ok());
    result
}

fn set_up_device(save: &Arc<Save>, shared: &Arc<SaveDevice>, device: &mut Device) -> Result<()> {
    if !shared.of_migration {
        trace::save_setup(&shared.id, shared.data_len as u64);
    }
    let aborted = || Error::aborted(Phase::Setup).on_device(&shared.id);
    if shared.flags.stop().is_some() {
        return Err(aborted());
    }
    let since = Instant::now();
    device.set_state(DeviceState::StopCopy, DeviceState::Stop)?;
    shared.counters.phases.set_state.add_since(since);
    shared.counters.phases.first_out.begin_now();
    let flow = SaveTransfer::new(save.clone(), shared.clone(), device.lend()?);
    let attached = save.io.attach(shared.ordinal, flow);
    attached.map_err(|_flow| aborted())
}

/// The largest config packet's data: with its headers its length fits 32 bits.
const MAX_CONFIG: usize = u32::MAX as usize - wire::DEVICE_PACKET_LEN;

/// Saves the config while the I/O thread reads: a device in STOP_COPY does not change.
fn save_config(save: &Save, shared: &SaveDevice, device: &mut Device) -> Result<()> {
    let since = Instant::now();
    let mut packet = Vec::new();
    let mut growing = Growing::new(&mut packet, MAX_CONFIG);
    let framing = |error| {
        let error = Error::lacking(Phase::Config, "memory for a config", error);
        error.on_device(&shared.id)
    };
    growing
        .write_all(&wire::Tag::Config.encode())
        .map_err(framing)?;
    device.save_config(&mut growing)?;
    growing
        .write_all(&wire::Tag::EndOfState.encode())
        .map_err(framing)?;
    shared.counters.phases.config.add_since(since);
    shared
        .config
        .set(packet)
        .expect("a device saves its config once");
    let _first = shared.flags.config_ready();
    save.io.wake();
    Ok(())
}

/// The I/O thread's result. Ends with it; or, after a stop, with the grace time.
fn wait_for_transfer(save: &Save, shared: &SaveDevice) -> Result<()> {
    if shared.flags.wait_drained().is_err() {
        // The I/O thread bounds its own part by the grace time.
        let until = later(deadline(save.grace), SLACK);
        if !shared.flags.wait_drained_until(until) {
            return Err(Error::new(ErrorKind::Stuck, Phase::Save).on_device(&shared.id));
        }
    }
    let drained = lock(&shared.drained).take();
    drained.expect("the I/O thread leaves its result before it says so")
}
