//! Devices: a handle that stays the caller's, and the device behind it, which a migration borrows.
//!
//! ```text
//!   Here ── take() ──▶ Away ── give_back() ──▶ Here
//!                        └──── it did not come back ──▶ Gone: a call is stuck in it
//! ```
//!
//! A session holds its devices' slots in a [`Borrowed`]. Whatever ends the session gives back the devices that
//! came back; the slots that are left when it is dropped are gone. A handle that is freed meanwhile leaves its slot
//! to the session, which then drops the device.

#![expect(unsafe_code, reason = "the functions' names are exported")]

use std::{
    ffi::{c_char, c_int, c_void},
    mem::MaybeUninit,
    sync::{Arc, Mutex},
};

use vfio_migration::{
    Device, DeviceId, DeviceState, Duty, Error, ErrorKind, MigrationDevice, Phase, Recover, Result,
    migration::{DeviceSettings, MigratableDevice, vm},
    vfio::VfioDevice,
};

use crate::{
    border::{duplicate, given, guard, hand_out, handles, lock, misuse, quiet, text},
    callbacks::{CDevice, DeviceOps, kernels},
    failure::{Code, ErrorHandle},
    settings::{auto, size, switch},
};

/// The device saves in STOP_COPY and loads in RESUMING: the least that migration needs.
pub const VFM_FLAG_STOP_COPY: u64 = 1;
/// The device has the P2P states.
pub const VFM_FLAG_P2P: u64 = 2;
/// The device has the PRE_COPY states.
pub const VFM_FLAG_PRE_COPY: u64 = 4;

/// A device's states, numbered as in linux/vfio.h.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub enum State {
    /// It has failed. It cannot be asked for; as a state to recover to it stands for a reset.
    Error = 0,
    /// It neither runs nor changes its state.
    Stop = 1,
    /// It runs.
    Running = 2,
    /// Stopped; its data fd gives the state that is left.
    StopCopy = 3,
    /// Stopped; its data fd takes a state.
    Resuming = 4,
    /// It runs, and starts no transfer to another device.
    RunningP2p = 5,
    /// It runs; its data fd gives what there is already.
    PreCopy = 6,
    /// Both of the above.
    PreCopyP2p = 7,
}

/// What the VMM must do about a device after a migration.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub enum DutyCode {
    /// Nothing: it is in the right state, with the right content.
    Nothing = 0,
    /// It was reset, and its VM is here: the guest's driver sets it up again, or the VMM unplugs it.
    SetUpAnew = 1,
    /// It is lost, or runs and must not: its file must be closed before anybody uses it.
    Close = 2,
}

/// How a device is.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Status {
    /// What it can do: `VFM_FLAG_…`.
    pub flags: u64,
    /// Its last known state: `enum vfm_state`.
    pub state: u32,
    /// What is left to do: `enum vfm_duty`.
    pub duty: u32,
    /// Whether it has been reset since its last migration was set up.
    pub was_reset: bool,
    /// Whether its reset has failed.
    pub is_lost: bool,
}

/// What can be set for one device, with `vfm_device_set`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub enum DeviceSetting {
    /// Whether it may be migrated, for `vfm_blockers_admit`. VFM_SWITCH_AUTO: yes, unless something speaks against it.
    Enable = 0,
    /// Whether its state goes over the channels. VFM_SWITCH_AUTO: where they can carry it. Both ends must agree.
    Transfer = 1,
    /// Whether its own dirty tracking may be used: 0 or 1. Default: 1.
    DirtyTracking = 2,
    /// Whether its `event` is called: 0 or 1. Default: 0.
    Events = 3,
    /// Source: the most bytes of one read, and so of a packet. Default, and 0: what it estimates.
    BufferLen = 4,
    /// Whether its config waits for its notice. Default: VFM_SWITCH_INHERIT. Both ends must agree.
    ConfigAfterIterables = 5,
}

/// Sets one of a device's settings.
pub(crate) fn set(settings: &mut DeviceSettings, key: u32, value: u64) -> Result<()> {
    let is = |known: DeviceSetting| key == known as u32;
    match () {
        () if is(DeviceSetting::Enable) => settings.enable = auto(value)?,
        () if is(DeviceSetting::Transfer) => settings.transfer = auto(value)?,
        () if is(DeviceSetting::DirtyTracking) => settings.dirty_tracking = switch(value)?,
        () if is(DeviceSetting::Events) => settings.events = switch(value)?,
        () if is(DeviceSetting::BufferLen) => {
            settings.buffer_len = Some(size(value)?).filter(|it| *it > 0);
        }
        () if is(DeviceSetting::ConfigAfterIterables) => {
            settings.config_after_iterables = match value {
                3 => None,
                _ => Some(auto(value)?),
            }
        }
        () => return Err(misuse("setting: no such setting")),
    }
    Ok(())
}

enum Place {
    Here(Box<MigratableDevice>),
    Away,
    Gone,
}

/// Where a device is.
pub(crate) struct Slot {
    id: DeviceId,
    place: Mutex<Place>,
}

impl Slot {
    fn take(&self) -> Result<MigratableDevice> {
        let mut place = lock(&self.place);
        let away = || misuse("device: a migration has it").on_device(&self.id);
        match std::mem::replace(&mut *place, Place::Away) {
            Place::Here(device) => Ok(*device),
            Place::Away => Err(away()),
            Place::Gone => {
                *place = Place::Gone;
                Err(self.stuck())
            }
        }
    }

    fn put(&self, device: MigratableDevice) {
        *lock(&self.place) = Place::Here(Box::new(device));
    }

    fn stuck(&self) -> Error {
        Error::new(ErrorKind::Stuck, Phase::Cleanup).on_device(&self.id)
    }

    /// Looks at the device, or changes what is set for it.
    fn with<T>(&self, look: impl FnOnce(&mut MigratableDevice) -> Result<T>) -> Result<T> {
        match &mut *lock(&self.place) {
            Place::Here(device) => look(device),
            Place::Away => Err(misuse("device: a migration has it").on_device(&self.id)),
            Place::Gone => Err(self.stuck()),
        }
    }
}

/// A device of the VM's. The handle stays the caller's; while a session or a migration has the device, other calls
/// with it are refused, and when that has ended the device is there again. One whose driver is stuck never is:
/// VFM_CODE_STUCK. Any thread, one at a time for each device. Free it with `vfm_device_free`.
pub struct DeviceHandle(Arc<Slot>);

impl DeviceHandle {
    pub(crate) fn new(device: MigratableDevice) -> Self {
        Self(Arc::new(Slot {
            id: device.id().clone(),
            place: Mutex::new(Place::Here(Box::new(device))),
        }))
    }

    pub(crate) fn id(&self) -> &DeviceId {
        &self.0.id
    }
}

/// The devices that a session has, or will have.
#[derive(Default)]
pub(crate) struct Borrowed(Vec<(Arc<Slot>, DeviceSettings)>);

impl Borrowed {
    /// Takes a device; its slot remembers that it is away.
    pub(crate) fn take(&mut self, device: &DeviceHandle) -> Result<MigratableDevice> {
        let mut taken = device.0.take()?;
        let settings = taken.settings_mut().clone();
        self.0.push((device.0.clone(), settings));
        Ok(taken)
    }

    /// Puts a device back that has come back.
    pub(crate) fn give_back(&mut self, device: MigratableDevice) {
        let found = self.0.iter().position(|(slot, _)| slot.id == *device.id());
        if let Some(at) = found {
            self.0.swap_remove(at).0.put(device);
        }
    }

    /// As [`Borrowed::give_back`], for one that was taken out of its settings.
    pub(crate) fn give_device_back(&mut self, device: Device) {
        let found = self.0.iter().find(|(slot, _)| slot.id == *device.id());
        if let Some((_, settings)) = found {
            let settings = settings.clone();
            self.give_back(MigratableDevice::new(device, settings));
        }
    }

    pub(crate) fn give_all_back(&mut self, devices: impl IntoIterator<Item = MigratableDevice>) {
        for device in devices {
            self.give_back(device);
        }
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = &DeviceId> {
        self.0.iter().map(|(slot, _)| &slot.id)
    }

    /// The ones that are left do not come back.
    pub(crate) fn lose_the_rest(&mut self) {
        for (slot, _) in self.0.drain(..) {
            *lock(&slot.place) = Place::Gone;
        }
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        self.lose_the_rest();
    }
}

pub(crate) fn device_id(idstr: *const c_char, instance: u32) -> Result<DeviceId> {
    let idstr = text(idstr, "idstr: NULL, or not UTF-8")?;
    Ok(DeviceId::new(idstr, instance)?)
}

fn make(id: DeviceId, device: Box<dyn MigrationDevice>) -> Result<DeviceHandle> {
    let device = Device::new(id, device)?;
    let settings = DeviceSettings::default();
    Ok(DeviceHandle::new(MigratableDevice::new(device, settings)))
}

/// Makes a device of the caller's callbacks, and asks it what it can do. `idstr` and `instance` are its name on the
/// wire, the same on both ends: "0000:00:03.0/vfio" and 0, say. From this call on `opaque` is the library's, until
/// `release`, which is called also where this call fails, but for a NULL `ops`. `ops` is copied. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_device_new(
    idstr: *const c_char,
    instance: u32,
    ops: Option<&DeviceOps>,
    opaque: *mut c_void,
    device: Option<&mut MaybeUninit<*mut DeviceHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let inner = CDevice::new(given(ops, "ops: NULL")?, opaque);
        let device = given(device, "device: NULL")?;
        let id = device_id(idstr, instance)?;
        hand_out(device, make(id, inner.into_device()?)?);
        Ok(())
    })
}

/// Makes a device of the kernel's, over the VFIO device fd that the VMM has: a group's or a cdev's. The library
/// makes a duplicate of it; `fd` stays the caller's. From then on only the library sets the device's migration state.
/// Of `ops`, which may be NULL, it uses `save_config`, `load_config`, `reset`, `event` and `release`. The rest is as
/// for `vfm_device_new`. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_device_from_vfio(
    idstr: *const c_char,
    instance: u32,
    fd: c_int,
    ops: Option<&DeviceOps>,
    opaque: *mut c_void,
    device: Option<&mut MaybeUninit<*mut DeviceHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let c = ops.map(|ops| CDevice::new(ops, opaque));
        let device = given(device, "device: NULL")?;
        let id = device_id(idstr, instance)?;
        let inner = VfioDevice::new(duplicate(fd, "fd: it is not open")?);
        hand_out(device, make(id, kernels(inner, c)?)?);
        Ok(())
    })
}

/// Sets `setting` (`enum vfm_device_setting`), for the next migration.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_device_set(
    device: Option<&DeviceHandle>,
    setting: u32,
    value: u64,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let device = given(device, "device: NULL")?;
        let mut borrowed = Borrowed::default();
        let mut taken = borrowed.take(device)?;
        let mut settings = taken.settings_mut().clone();
        let done = set(&mut settings, setting, value);
        if done.is_ok() {
            // Made anew: some of them are looked at then.
            taken = MigratableDevice::new(taken.into_device(), settings);
        }
        borrowed.give_back(taken);
        done
    })
}

/// Writes how the device is. Asks nobody.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_device_status(
    device: Option<&DeviceHandle>,
    status: Option<&mut MaybeUninit<Status>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let device = given(device, "device: NULL")?;
        let status = given(status, "status: NULL")?;
        device.0.with(|it| {
            let duty = match it.duty() {
                Duty::Nothing => DutyCode::Nothing,
                Duty::SetUpAnew => DutyCode::SetUpAnew,
                _ => DutyCode::Close,
            };
            status.write(Status {
                flags: it.flags().bits(),
                state: it.state().into(),
                duty: duty as u32,
                was_reset: it.was_reset(),
                is_lost: it.is_lost(),
            });
            Ok(())
        })
    })
}

/// Does something with the device itself, on this thread.
fn with_device(handle: &DeviceHandle, work: impl FnOnce(&mut Device) -> Result<()>) -> Result<()> {
    let mut borrowed = Borrowed::default();
    let mut device = borrowed.take(handle)?.into_device();
    let done = work(&mut device);
    borrowed.give_device_back(device);
    done
}

/// Sets the device's state (`enum vfm_state`), outside of a migration. If it refuses, it is taken to `recover`, and
/// reset where it refuses that too; VFM_STATE_ERROR resets it at once. Waits for the driver.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_device_set_state(
    device: Option<&DeviceHandle>,
    state: u32,
    recover: u32,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let device = given(device, "device: NULL")?;
        let known = |state| DeviceState::try_from(state).map_err(|_| misuse("state: none"));
        let (state, recover) = (known(state)?, Recover::State(known(recover)?));
        with_device(device, |it| it.set_state(state, recover))
    })
}

/// Resets the device: it is RUNNING afterwards, and its content is lost. Waits for the driver.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_device_reset(
    device: Option<&DeviceHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        with_device(given(device, "device: NULL")?, Device::reset)
    })
}

/// Frees a device's handle, and with it the device: its data fd is closed, it stays in its state, and its `release`
/// is called. While a migration has the device, that happens when the migration is done with it. NULL is nothing.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_device_free(device: Option<Box<DeviceHandle>>) {
    quiet((), || drop(device));
}

/// Why a VM stops.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub enum Reason {
    /// Its migration is about to end.
    FinishMigration = 0,
    /// Somebody has paused it.
    Pause = 1,
    /// Something else.
    Other = 2,
}

pub(crate) fn reason(value: u32) -> Result<vm::Reason> {
    match value {
        0 => Ok(vm::Reason::FinishMigration),
        1 => Ok(vm::Reason::Pause),
        2 => Ok(vm::Reason::Other),
        _ => Err(misuse("reason: none")),
    }
}

/// Does something with devices that are at rest, all at once.
fn with_all(
    devices: *const *const DeviceHandle,
    count: usize,
    work: impl FnOnce(&mut [MigratableDevice]) -> Result<()>,
) -> Result<()> {
    let devices = handles(devices, count, "devices: NULL, or none")?;
    let mut borrowed = Borrowed::default();
    let mut taken = Vec::with_capacity(count);
    let mut all = Ok(());
    for device in devices {
        match borrowed.take(device) {
            Ok(device) => taken.push(device),
            Err(error) => {
                all = Err(error);
                break;
            }
        }
    }
    let done = all.and_then(|()| work(&mut taken));
    borrowed.give_all_back(taken);
    done
}

/// Stops devices that are at rest, after the VM's processors have stopped: all to their P2P state, then all to STOP,
/// each step at once for all. `reason` is an `enum vfm_reason`. A device that refuses is reset and then stopped. Waits for the slowest driver. A
/// migration's devices are stopped by `vfm_outgoing_stop_vm`.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_stop_devices(
    devices: *const *const DeviceHandle,
    count: usize,
    reason_to_stop: u32,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let reason = reason(reason_to_stop)?;
        with_all(devices, count, |devices| vm::stop(devices, reason))
    })
}

/// Starts devices that are at rest, before the VM's processors start. If one refuses, all that were started are
/// stopped again. Waits for the slowest driver. A migration's devices are started by `vfm_incoming_start_vm`.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_start_devices(
    devices: *const *const DeviceHandle,
    count: usize,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || with_all(devices, count, vm::start))
}
