//! A device by its path: container, group and device of its own, through vfio-ioctls; or its character device,
//! bound to an iommufd of its own.
#![expect(unsafe_code, reason = "borrows the fd that vfio-ioctls keeps")]

use std::{
    fmt,
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use vfio_ioctls::VfioContainer;

use super::{VfioDevice, ioctl};

/// A device that was opened by its path. Dropping it closes device, group and container.
pub struct SysfsDevice {
    device: vfio_ioctls::VfioDevice,
}

impl SysfsDevice {
    /// Its regions and interrupts. Leave its migration state alone: that is [`VfioDevice`]'s.
    #[must_use]
    pub const fn device(&self) -> &vfio_ioctls::VfioDevice {
        &self.device
    }
}

impl AsFd for SysfsDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the device keeps its fd open until it is dropped, which `&self` is in the way of.
        unsafe { BorrowedFd::borrow_raw(self.device.as_raw_fd()) }
    }
}

impl fmt::Debug for SysfsDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SysfsDevice")
            .field("fd", &self.device.as_raw_fd())
            .finish_non_exhaustive()
    }
}

/// Opens the device at `path`, such as `/sys/bus/pci/devices/0000:3b:00.2` or
/// `/sys/bus/mdev/devices/UUID`. It must be bound to a VFIO driver, and its group in no other hands.
///
/// # Errors
///
/// Says what was in the way: no such device, no `/dev/vfio`, a group that is in use.
pub fn open(path: &Path) -> io::Result<VfioDevice<SysfsDevice>> {
    // Where the path is no device, so that it is not called an invalid path of something else.
    path.join("iommu_group").metadata().map_err(|error| {
        let text = format!(
            "{}: not a device in an IOMMU group: {error}",
            path.display()
        );
        io::Error::new(error.kind(), text)
    })?;
    let refused = |error| io::Error::other(format!("{}: {error}", path.display()));
    let container = Arc::new(VfioContainer::new(None).map_err(refused)?);
    let device = vfio_ioctls::VfioDevice::new(path, container, false).map_err(refused)?;
    Ok(VfioDevice::new(SysfsDevice { device }))
}

/// A device that was opened as a character device and bound to an iommufd of its own. Dropping it closes both.
#[derive(Debug)]
pub struct CdevDevice {
    // Before its iommufd.
    cdev: File,
    _iommufd: File,
}

impl AsFd for CdevDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.cdev.as_fd()
    }
}

/// The character device of the device at a sysfs path, such as `/dev/vfio/devices/vfio0`, if its kernel makes
/// one (`CONFIG_VFIO_DEVICE_CDEV`). A path of a character device is its own.
#[must_use]
pub fn cdev(path: &Path) -> Option<PathBuf> {
    let devices = Path::new("/dev/vfio/devices");
    if path.starts_with(devices) {
        return Some(path.to_owned());
    }
    let mut entries = path.join("vfio-dev").read_dir().ok()?;
    // A device has one.
    let name = entries.next()?.ok()?.file_name();
    let cdev = devices.join(name);
    cdev.exists().then_some(cdev)
}

/// Opens the device at `path`, as [`open`], through its character device and an iommufd. `path` may also be the
/// character device itself. It is bound, and attached to no address space: enough for its migration.
///
/// # Errors
///
/// Says what was in the way: no such device, no `/dev/iommu`, a device that is in use.
pub fn open_cdev(path: &Path) -> io::Result<VfioDevice<CdevDevice>> {
    let at = |path: &Path, error: io::Error| {
        let text = format!("{}: {error}", path.display());
        io::Error::new(error.kind(), text)
    };
    let open = |path: &Path| {
        let file = File::options().read(true).write(true).open(path);
        file.map_err(|error| at(path, error))
    };
    let cdev = cdev(path).ok_or_else(|| {
        let text = format!("{}: has no character device (vfio-dev)", path.display());
        io::Error::new(io::ErrorKind::NotFound, text)
    })?;
    let iommufd = open(Path::new("/dev/iommu"))?;
    let device = open(&cdev)?;
    ioctl::bind_iommufd(device.as_fd(), iommufd.as_fd()).map_err(|error| at(&cdev, error))?;
    Ok(VfioDevice::new(CdevDevice {
        cdev: device,
        _iommufd: iommufd,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_device_is_named() {
        let error = open("/sys/bus/pci/devices/none".as_ref()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(error.to_string().contains("/sys/bus/pci/devices/none"));
        for path in ["/sys/bus/pci/devices/none", "/dev/vfio/devices/none"] {
            let error = open_cdev(path.as_ref()).unwrap_err();
            assert!(error.to_string().contains('/'), "{error}");
        }
        assert_eq!(cdev("/sys/bus/pci/devices/none".as_ref()), None);
    }
}
