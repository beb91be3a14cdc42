//! Which devices may be migrated, and what blocks the VM's migration.

#![expect(unsafe_code, reason = "the functions' names are exported")]

use std::{
    ffi::{c_char, c_int, c_void},
    mem::MaybeUninit,
    ptr,
    sync::Mutex,
};

use vfio_migration::{
    Failed, MigrationDevice, Refusal,
    migration::{Admitted, DeviceSettings, MigrationBlockers, PlatformSupport},
};

use crate::{
    border::{given, guard, hand_out, lock, misuse, quiet, text},
    callbacks::{Block, CDevice, DeviceOps, block},
    device::{DeviceHandle, device_id, set},
    failure::{Code, ErrorHandle, RefusalCode, c_text},
};

/// The device tracks the memory that it writes to.
pub const VFM_PLATFORM_DEVICE_DIRTY_TRACKING: u32 = 1;
/// The IOMMU does.
pub const VFM_PLATFORM_IOMMU_DIRTY_TRACKING: u32 = 2;
/// The device's addresses are a vIOMMU's.
pub const VFM_PLATFORM_VIOMMU: u32 = 4;

/// The devices of a VM, as far as its migration is concerned: one for each VM. Any thread. Free it with
/// `vfm_blockers_free`.
pub struct BlockersHandle(Mutex<MigrationBlockers>);

/// Makes the list of a VM's devices. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_blockers_new(
    blockers: Option<&mut MaybeUninit<*mut BlockersHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let blockers = given(blockers, "blockers: NULL")?;
        hand_out(blockers, BlockersHandle(Mutex::default()));
        Ok(())
    })
}

/// Admits a device of the caller's callbacks, or says why not. `platform` is a set of `VFM_PLATFORM_…`; `enable` is
/// VFM_DEVICE_SETTING_ENABLE's value.
///
/// | the device | this | `device` |
/// |---|---|---|
/// | can be migrated | succeeds | the device |
/// | blocks the VM's migration | calls `on_block` once, with the `enum vfm_refusal`, and succeeds | NULL: it works, and is not the library's |
/// | has to be migrated, and cannot | fails with VFM_CODE_UNMIGRATABLE | not written |
///
/// `on_block` should refuse the VM's migration until `vfm_blockers_remove`, and returns 0 or a negative errno, which fails
/// this call; `block_opaque` is its. `opaque` and `ops` are as for `vfm_device_new`; `release` is called where the library
/// does not keep the device. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_blockers_admit(
    blockers: Option<&BlockersHandle>,
    idstr: *const c_char,
    instance: u32,
    ops: Option<&DeviceOps>,
    opaque: *mut c_void,
    platform: u32,
    enable: u64,
    on_block: Option<
        unsafe extern "C" fn(
            block_opaque: *mut c_void,
            idstr: *const c_char,
            instance: u32,
            refusal: u32,
        ) -> c_int,
    >,
    block_opaque: *mut c_void,
    device: Option<&mut MaybeUninit<*mut DeviceHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let inner = CDevice::new(given(ops, "ops: NULL")?, opaque);
        let blockers = given(blockers, "blockers: NULL")?;
        let device = given(device, "device: NULL")?;
        let id = device_id(idstr, instance)?;
        let tell: Block = given(on_block, "on_block: NULL")?;
        if platform > 7 {
            return Err(misuse("platform: unknown bits"));
        }
        let mut settings = DeviceSettings::default();
        set(&mut settings, 0, enable)?;
        let mut around = PlatformSupport::default();
        let has = |bit| platform & bit != 0;
        around.device_dirty_tracking = has(VFM_PLATFORM_DEVICE_DIRTY_TRACKING);
        around.iommu_dirty_tracking = has(VFM_PLATFORM_IOMMU_DIRTY_TRACKING);
        around.viommu = has(VFM_PLATFORM_VIOMMU);
        let inner = inner.into_device()?;
        let admitted =
            lock(&blockers.0).admit(id, inner, &settings, around, &mut |id, refusal: Refusal| {
                let name = c_text(id.idstr());
                let code = RefusalCode::from(refusal) as u32;
                block(tell, block_opaque, &name, id.instance(), code)
            });
        match admitted.map_err(|failed: Failed<Box<dyn MigrationDevice>>| failed.error)? {
            Admitted::Migratable(migratable) => hand_out(device, DeviceHandle::new(migratable)),
            Admitted::Blocked(..) => {
                device.write(ptr::null_mut());
            }
        }
        Ok(())
    })
}

/// Removes a device that was unplugged. Writes whether it was there; `was_there` may be NULL. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_blockers_remove(
    blockers: Option<&BlockersHandle>,
    idstr: *const c_char,
    instance: u32,
    was_there: Option<&mut MaybeUninit<bool>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let blockers = given(blockers, "blockers: NULL")?;
        let id = device_id(idstr, instance)?;
        let removed = lock(&blockers.0).remove(&id);
        if let Some(was_there) = was_there {
            was_there.write(removed);
        }
        Ok(())
    })
}

/// Returns how many devices block the VM's migration now. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_blockers_count(blockers: Option<&BlockersHandle>) -> usize {
    quiet(0, || {
        blockers.map_or(0, |it| lock(&it.0).blockers().count())
    })
}

/// Returns why this device blocks the VM's migration now: VFM_REFUSAL_NONE where it does not, or there is no such device.
/// Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_blockers_refusal(
    blockers: Option<&BlockersHandle>,
    idstr: *const c_char,
    instance: u32,
) -> RefusalCode {
    quiet(RefusalCode::Other, || {
        let (Some(blockers), Ok(idstr)) = (blockers, text(idstr, "idstr: NULL")) else {
            return RefusalCode::None;
        };
        let blockers = lock(&blockers.0);
        let is = |id: &vfio_migration::DeviceId| id.idstr() == idstr && id.instance() == instance;
        let found = blockers.blockers().find(|(id, _)| is(id));
        found.map_or(RefusalCode::None, |(_, refusal)| refusal.into())
    })
}

/// Frees the list. Its devices are the caller's. NULL is nothing. Any thread, when no other uses it.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_blockers_free(blockers: Option<Box<BlockersHandle>>) {
    quiet((), || drop(blockers));
}
