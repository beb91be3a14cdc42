//! Which devices may be migrated, and why others may not.
//!
//! ```text
//!   admit() ─┬─▶ Admitted::Migratable   a MigratableDevice
//!            ├─▶ Admitted::Blocked      the device works; the VM's migration is blocked, with the reason
//!            └─▶ an error               the setting is on, or the blocker could not be registered
//! ```
//!
//! A VM has one [`MigrationBlockers`]. The VMM uses it where it plugs and unplugs devices, on that thread.
//! Nothing here waits, except for the device's own answers.

use std::io;

use nix::errno::Errno;

use super::{DeviceSettings, MigratableDevice, OnOffAuto};
use crate::{
    device::{Device, MigrationDevice},
    error::{Error, ErrorKind, Failed, Phase, Refusal, Result},
    id::DeviceId,
    state::MigrationFlags,
    trace,
};

/// What a device's migration needs from its platform.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct PlatformSupport {
    /// The device tracks the memory that it writes to.
    pub device_dirty_tracking: bool,
    /// The IOMMU does.
    pub iommu_dirty_tracking: bool,
    /// The device's addresses are a vIOMMU's.
    pub viommu: bool,
}

/// What became of a device.
#[derive(Debug)]
#[must_use = "it holds the VMM's device"]
pub enum Admitted {
    /// It can be migrated.
    Migratable(MigratableDevice),
    /// The device works, but its VM cannot be migrated because of it.
    Blocked(Box<dyn MigrationDevice>, Refusal),
}

#[derive(Debug)]
struct Known {
    id: DeviceId,
    p2p: bool,
    refusal: Option<Refusal>,
}

/// The devices of one VM, as far as migration is concerned.
///
/// ```
/// # #[cfg(feature = "sim")] {
/// use vfio_migration::{
///     DeviceId,
///     migration::{MigrationBlockers, DeviceSettings, Admitted, PlatformSupport},
///     sim::{SimConfig, SimDevice},
/// };
///
/// let mut around = PlatformSupport::default();
/// around.device_dirty_tracking = true;
/// let mut vm = MigrationBlockers::default();
/// let device = Box::new(SimDevice::new(SimConfig::default())?);
/// let realization = vm.admit(
///     DeviceId::new("0000:00:03.0/vfio", 0)?,
///     device,
///     &DeviceSettings::default(),
///     around,
///     &mut |id, refusal| Ok(eprintln!("no migration because of {id}: {refusal}")),
/// )?;
/// assert!(matches!(realization, Admitted::Migratable(_)));
/// assert!(vm.blockers().next().is_none());
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Default)]
pub struct MigrationBlockers {
    devices: Vec<Known>,
}

/// Registers what blocks a VM's migration: which device, and why.
type Block<'a> = &'a mut dyn FnMut(&DeviceId, Refusal) -> io::Result<()>;

impl MigrationBlockers {
    /// Admits a device, or returns why not. If the device works but blocks the VM's migration, `block` is
    /// called, once at most. It should refuse the VM's migration until the device is gone
    /// ([`MigrationBlockers::remove`]).
    ///
    /// # Errors
    ///
    /// | error | if |
    /// |---|---|
    /// | [`ErrorKind::Unmigratable`] | the setting is on and there is a blocker |
    /// | [`ErrorKind::Host`] | `block` fails |
    /// | [`ErrorKind::Misuse`] | there is a device of that name already |
    /// | the device's | the device answers neither yes nor no |
    pub fn admit(
        &mut self,
        id: DeviceId,
        device: Box<dyn MigrationDevice>,
        settings: &DeviceSettings,
        around: PlatformSupport,
        block: Block<'_>,
    ) -> Result<Admitted, Failed<Box<dyn MigrationDevice>>> {
        if self.devices.iter().any(|known| known.id == id) {
            let error = Error::two_devices_named(&id);
            return Err(Failed::new(error, device));
        }
        let (device, refusal) = match examine(&id, device, settings, around) {
            Ok((device, refusal)) => (Ok(device), refusal),
            Err((error, inner)) => match why_unusable(&error) {
                Some(refusal) => (Err(inner), Some(refusal)),
                None => return Err(Failed::new(error, inner)),
            },
        };
        let flags = device.as_ref().map(Device::flags).unwrap_or_default();
        let p2p = flags.contains(MigrationFlags::P2P);
        let fails = |error: Error, device: Result<Device, Box<dyn MigrationDevice>>| {
            let back = device.map_or_else(|inner| inner, Device::into_inner);
            Failed::new(error.on_device(&id), back)
        };
        // The VM's migration may be blocked by its devices together, where each could go alone.
        let several = self.migratable().next().is_some();
        let all_p2p = p2p && self.migratable().all(|known| known.p2p);
        let together = (several && !all_p2p).then_some(Refusal::SeveralWithoutP2p);
        if let Some(refusal) = refusal.or(together) {
            let error = Error::new(ErrorKind::Unmigratable(refusal), Phase::Setup);
            if settings.enable == OnOffAuto::On {
                return Err(fails(error, device));
            }
            if let Err(source) = block(&id, refusal) {
                let error = Error::new(ErrorKind::Host, Phase::Setup).caused_by(source);
                return Err(fails(error, device));
            }
        }
        self.devices.push(Known { id, p2p, refusal });
        Ok(match (device, refusal) {
            (Ok(device), None) => {
                trace::migration_realize(device.id());
                Admitted::Migratable(MigratableDevice::new(device, settings.clone()))
            }
            (Ok(device), Some(refusal)) => Admitted::Blocked(device.into_inner(), refusal),
            (Err(inner), refusal) => {
                let refusal = refusal.expect("an unusable device has its reason");
                Admitted::Blocked(inner, refusal)
            }
        })
    }

    /// Removes a device that was unplugged. Returns whether it was here. [`MigrationBlockers::blockers`] then
    /// returns the blockers that are left.
    pub fn remove(&mut self, id: &DeviceId) -> bool {
        let before = self.devices.len();
        self.devices.retain(|known| known.id != *id);
        self.devices.len() < before
    }

    fn migratable(&self) -> impl Iterator<Item = &Known> {
        self.devices.iter().filter(|known| known.refusal.is_none())
    }

    /// Returns all blockers of the VM's migration now: each device with its reason.
    pub fn blockers(&self) -> impl Iterator<Item = (&DeviceId, Refusal)> {
        let several = self.migratable().count() > 1;
        self.devices.iter().filter_map(move |known| {
            let together = (several && !known.p2p).then_some(Refusal::SeveralWithoutP2p);
            Some((&known.id, known.refusal.or(together)?))
        })
    }
}

/// Asks the device, and looks at what is around it. The first reason counts.
#[expect(clippy::type_complexity, reason = "a device, or what is left of it")]
fn examine(
    id: &DeviceId,
    device: Box<dyn MigrationDevice>,
    settings: &DeviceSettings,
    around: PlatformSupport,
) -> Result<(Device, Option<Refusal>), (Error, Box<dyn MigrationDevice>)> {
    if settings.enable == OnOffAuto::Off {
        // Not even asked.
        let kind = ErrorKind::Unmigratable(Refusal::SwitchedOff);
        return Err((Error::new(kind, Phase::Setup).on_device(id), device));
    }
    let mut device = Device::probe(id.clone(), device)?;
    let flags = device.flags();
    // What is not there is not missed: without it no device says that it has new initial data.
    let precopy_v2 = flags.contains(MigrationFlags::PRE_COPY)
        && device.enable_precopy_info_v2().unwrap_or(false);
    let tracks = settings.dirty_tracking && around.device_dirty_tracking;
    trace::migration_init(id, flags, precopy_v2, tracks);
    let refusal = if !tracks && !around.iommu_dirty_tracking {
        if settings.enable == OnOffAuto::On {
            trace::no_dirty_tracking(id);
            None
        } else {
            Some(Refusal::NoDirtyTracking)
        }
    } else {
        None
    };
    Ok((device, refusal.or(around.viommu.then_some(Refusal::Viommu))))
}

/// Whether a device has said that it cannot be migrated, rather than failed.
fn why_unusable(error: &Error) -> Option<Refusal> {
    match (error.kind(), error.raw_os_error().map(Errno::from_raw)) {
        (ErrorKind::Unmigratable(refusal), _) => Some(*refusal),
        (ErrorKind::Device, Some(Errno::ENOTTY)) => Some(Refusal::NoKernelSupport),
        (ErrorKind::Device, _) => Some(Refusal::NoDeviceSupport),
        _ => None,
    }
}
