//! A device by its sysfs path: container, group and device of its own, through vfio-ioctls.
#![expect(unsafe_code, reason = "borrows the fd that vfio-ioctls keeps")]

use std::{
    fmt, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::Path,
    sync::Arc,
};

use vfio_ioctls::VfioContainer;

use super::VfioDevice;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_device_is_named() {
        let error = open("/sys/bus/pci/devices/none".as_ref()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(error.to_string().contains("/sys/bus/pci/devices/none"));
    }
}
