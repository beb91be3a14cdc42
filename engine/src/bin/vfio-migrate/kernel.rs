//! The kernel's own devices: opened by their sysfs paths, and asked whether they can migrate.
//!
//! ```text
//!   path ──open──▶ vfio::VfioDevice ──probe──▶ Ability        or: why migration is refused
//! ```
//!
//! Used by `probe`, and for the devices of a `SPEC`, from the command's main thread. A call lasts as
//! long as the device's driver takes for it.

use std::{
    io,
    path::{Path, PathBuf},
};

use anyhow::anyhow;
use nix::errno::Errno;
use vfio_migration::vfio::{self, Ability, SysfsDevice, VfioDevice};

/// Opens a device that can migrate.
pub(crate) fn open(path: &Path) -> anyhow::Result<(VfioDevice<SysfsDevice>, Ability)> {
    let device = vfio::open(path).map_err(|error| match driver(path) {
        Some(driver) => anyhow!("cannot open the device: {error} (its driver is {driver})"),
        None if path.is_dir() => anyhow!("cannot open the device: {error} (it has no driver)"),
        None => anyhow!("cannot open the device: {error}"),
    })?;
    match device.probe() {
        Ok(ability) => Ok((device, ability)),
        Err(error) => Err(anyhow!(
            "{}: migration is refused: {}",
            path.display(),
            reason(&error, driver(path).as_deref())
        )),
    }
}

/// The driver that a device is bound to.
pub(crate) fn driver(path: &Path) -> Option<String> {
    let link: PathBuf = path.join("driver").read_link().ok()?;
    Some(link.file_name()?.to_string_lossy().into_owned())
}

/// Why a device cannot migrate, from what it said when it was asked.
fn reason(error: &io::Error, driver: Option<&str>) -> String {
    let driver = driver.unwrap_or("its driver");
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOTTY) => {
            format!("this kernel has no support for it: {driver} offers none (ENOTTY)")
        }
        Some(Errno::EINVAL) => {
            format!("this device has none, though the kernel knows of it (EINVAL from {driver})")
        }
        Some(Errno::EOPNOTSUPP) => {
            "the device has no STOP_COPY, the least that migration needs (EOPNOTSUPP)".into()
        }
        _ => format!("the device does not answer: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsFd};

    use super::*;

    #[test]
    fn each_refusal_has_its_reason() {
        let says = |errno: Errno| reason(&errno.into(), Some("vfio-pci"));
        assert!(says(Errno::ENOTTY).starts_with("this kernel has no support"));
        assert!(says(Errno::ENOTTY).contains("vfio-pci"));
        assert!(says(Errno::EINVAL).starts_with("this device has none"));
        assert!(says(Errno::EOPNOTSUPP).contains("STOP_COPY"));
        assert!(says(Errno::EIO).contains("os error 5"));
    }

    #[test]
    fn a_file_that_is_no_device_is_refused_by_the_kernel() {
        let file = File::open("/dev/null").expect("there is one");
        let error = VfioDevice::new(file.as_fd())
            .probe()
            .expect_err("no device");
        assert!(reason(&error, None).contains("ENOTTY"));
    }
}
