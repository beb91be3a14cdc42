//! The kernel's own devices: opened by their sysfs paths, and asked whether they can migrate.
//!
//! ```text
//!   path ──open──▶ by its group, or its cdev ──probe──▶ Ability        or: why migration is refused
//! ```
//!
//! Used by `probe`, `doctor`, and for the devices of a `SPEC`, from the command's main thread. A call lasts as
//! long as the device's driver takes for it.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use anyhow::anyhow;
use nix::errno::Errno;
use vfio_migration::{
    MigrationDevice,
    vfio::{self, Ability},
};

/// The kernel's device, and what it says of itself.
pub(crate) struct Opened {
    pub(crate) device: Box<dyn MigrationDevice>,
    pub(crate) ability: Ability,
    pub(crate) way: Way,
}

/// How a device is had.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Way {
    /// Its group, in a container.
    Group,
    /// Its character device, bound to an iommufd.
    Cdev(PathBuf),
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Group => f.write_str("its group"),
            Self::Cdev(path) => write!(f, "{} and an iommufd", path.display()),
        }
    }
}

/// A device that is open, and what it said when it was asked.
type Asked = (Box<dyn MigrationDevice>, io::Result<Ability>, Way);

fn by_group(path: &Path) -> io::Result<Asked> {
    let device = vfio::open(path)?;
    let ability = device.probe();
    Ok((Box::new(device), ability, Way::Group))
}

fn by_cdev(path: &Path, cdev: PathBuf) -> io::Result<Asked> {
    let device = vfio::open_cdev(path)?;
    let ability = device.probe();
    Ok((Box::new(device), ability, Way::Cdev(cdev)))
}

/// By its group where that can be had, as every kernel can; otherwise by its character device.
fn ask(path: &Path) -> Result<Asked, String> {
    let text = |error: io::Error| error.to_string();
    match vfio::cdev(path) {
        None => by_group(path).map_err(text),
        Some(cdev) if cdev == path => by_cdev(path, cdev).map_err(text),
        Some(cdev) => by_group(path).or_else(|group| {
            by_cdev(path, cdev)
                .map_err(|cdev| format!("{group}; nor by its character device: {cdev}"))
        }),
    }
}

/// Opens a device that can migrate.
pub(crate) fn open(path: &Path) -> anyhow::Result<Opened> {
    let (device, ability, way) = ask(path).map_err(|error| match driver(path) {
        Some(driver) => anyhow!("cannot open the device: {error} (its driver is {driver})"),
        None if path.is_dir() => anyhow!("cannot open the device: {error} (it has no driver)"),
        None => anyhow!("cannot open the device: {error}"),
    })?;
    match ability {
        Ok(ability) => Ok(Opened {
            device,
            ability,
            way,
        }),
        Err(error) => Err(anyhow!(
            "{}: migration is refused: {}",
            path.display(),
            reason(&error, driver(path).as_deref())
        )),
    }
}

/// The driver that a device is bound to.
pub(crate) fn driver(path: &Path) -> Option<String> {
    let named = |path: &Path| {
        let link: PathBuf = path.join("driver").read_link().ok()?;
        Some(link.file_name()?.to_string_lossy().into_owned())
    };
    named(path).or_else(|| {
        let cdev = Path::new("/sys/class/vfio-dev").join(path.file_name()?);
        named(&cdev.join("device"))
    })
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

    use vfio_migration::vfio::VfioDevice;

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
