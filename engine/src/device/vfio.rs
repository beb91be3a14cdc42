//! The kernel's VFIO device.
//!
//! ```text
//!   sysfs path ──▶ open ──▶ SysfsDevice (vfio-ioctls: container, group, device)  ┐
//!   that, or cdev ──▶ open_cdev ──▶ CdevDevice (bound to an iommufd)             ┤
//!   an fd that the VMM has (of a group, or a cdev)                               ┴─▶ VfioDevice
//!                                                                                      │
//!                            MigrationDevice ◀─────────────────────────────────────────┤
//!                            ioctl: one call each, on a BorrowedFd ◀───────────────────┘
//! ```
//!
//! vfio-ioctls opens a device and knows its regions (feature `vfio-open`). But it keeps a migration's data fd to itself and drops
//! the PRE_COPY flags. So this module makes the migration's calls itself, with the structs of
//! vfio-bindings, on any device fd. Never mix the two ways to set the state of one device.
//!
//! One thread at a time uses a [`VfioDevice`]: the device's own. Each call lasts as long as the device's
//! driver takes. Nothing here waits, or keeps a state of its own.

pub mod ioctl;
#[cfg(feature = "vfio-open")]
mod open;

use std::{
    fmt,
    io::{self, Read, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::errno::Errno;

pub use self::ioctl::{DmaRange, Feature, Support};
#[cfg(feature = "vfio-open")]
pub use self::open::{CdevDevice, SysfsDevice, cdev, open, open_cdev};
use super::{Hooked, Hooks, MigrationDevice};
use crate::state::{DeviceState, MigrationFlags, PrecopyInfo};

/// What a VMM keeps of a device besides the driver's state, in a form that knows its own end, as QEMU's does.
/// A VMM whose config is bytes of its own uses [`Hooks`] instead, which are framed.
pub trait Config: Send {
    /// As [`MigrationDevice::save_config`].
    ///
    /// # Errors
    ///
    /// Whatever keeps it from being saved.
    fn save(&mut self, writer: &mut dyn Write) -> io::Result<()>;

    /// As [`MigrationDevice::load_config`].
    ///
    /// # Errors
    ///
    /// Whatever is wrong with it.
    fn load(&mut self, reader: &mut dyn Read) -> io::Result<()>;
}

/// A device over its fd: the raw calls, without any policy. Give it to
/// [`Device::new`](crate::Device::new).
///
/// ```no_run
/// # use std::os::fd::OwnedFd;
/// use vfio_migration::{Device, DeviceId, vfio};
///
/// # fn devices(device_fd: OwnedFd) -> Result<(), Box<dyn std::error::Error>> {
/// # #[cfg(feature = "vfio-open")] {
/// // From sysfs, where nobody else has the device (feature `vfio-open`):
/// let inner = vfio::open("/sys/bus/pci/devices/0000:3b:00.2".as_ref())?;
/// let device = Device::new(DeviceId::new("0000:00:03.0/vfio", 0)?, Box::new(inner))?;
/// # }
///
/// // From an fd that the VMM has open, an `OwnedFd`, by whatever way it came by it:
/// let inner = vfio::VfioDevice::new(device_fd);
/// let device = Device::new(DeviceId::new("0000:00:04.0/vfio", 0)?, Box::new(inner))?;
///
/// // From an owner that keeps its fd to itself, shared or not:
/// # let owner = std::sync::Arc::new(std::fs::File::open("/dev/null")?);
/// let inner = vfio::VfioDevice::dup_of(&owner)?;
/// # Ok(())
/// # }
/// ```
pub struct VfioDevice<F> {
    fd: F,
    config: Option<Box<dyn Config>>,
}

impl<F: AsFd> VfioDevice<F> {
    /// A device over an open device fd: a group's device, or a cdev that is bound to an iommufd.
    /// Makes no call.
    pub const fn new(fd: F) -> Self {
        Self { fd, config: None }
    }

    /// With what the VMM keeps of it. Without, its config is empty.
    #[must_use]
    pub fn with_config(self, config: Box<dyn Config>) -> Self {
        Self {
            config: Some(config),
            ..self
        }
    }

    /// With what the VMM does about it beside the kernel's calls: its config, what a reset has undone, events. A
    /// [`Config`] is no longer used then.
    pub const fn with_hooks<H: Hooks>(self, hooks: H) -> Hooked<Self, H> {
        Hooked::new(self, hooks)
    }

    /// What the device can do.
    ///
    /// # Errors
    ///
    /// `ENOTTY` where the kernel has no migration for this device, `EINVAL` where the device has
    /// none, `EOPNOTSUPP` where it has no STOP_COPY; the kernel's otherwise.
    pub fn probe(&self) -> io::Result<Ability> {
        let fd = self.fd.as_fd();
        let flags = ioctl::flags(fd)?;
        if !flags.contains(MigrationFlags::STOP_COPY) {
            return Err(Errno::EOPNOTSUPP.into());
        }
        Ok(Ability {
            flags,
            state: ioctl::state(fd)?,
            dma_logging: ioctl::probe(fd, Feature::DMA_LOGGING_START)?,
            precopy_info_v2: ioctl::probe(fd, Feature::MIG_PRECOPY_INFO_V2)?,
            data_size: match ioctl::data_size(fd) {
                Ok(size) => Some(size),
                Err(error) if Support::from_refusal(&error).is_some() => None,
                Err(error) => return Err(error),
            },
        })
    }
}

impl VfioDevice<OwnedFd> {
    /// A device over a duplicate of an fd that somebody else owns, with `FD_CLOEXEC`. The kernel's device stays open
    /// until both are closed: [`Duty::Close`](crate::Duty::Close) asks for both, so drop the
    /// [`Device`](crate::Device) too.
    ///
    /// # Errors
    ///
    /// `EMFILE`.
    pub fn dup(fd: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(Self::new(fd.try_clone_to_owned()?))
    }

    /// As [`VfioDevice::dup`], of an owner that only tells its fd's number: `vfio_ioctls::VfioDevice`, or an `Arc` of
    /// one. The owner must have the file open for as long as this call takes.
    ///
    /// # Errors
    ///
    /// `EMFILE`; `EBADF` where the number is no open file's.
    pub fn dup_of(owner: &(impl AsRawFd + ?Sized)) -> io::Result<Self> {
        Ok(Self::new(ioctl::duplicate(owner.as_raw_fd())?))
    }
}

/// What a device can do, as [`VfioDevice::probe`] found it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct Ability {
    /// Which states it has.
    pub flags: MigrationFlags,
    /// Where it stands now.
    pub state: DeviceState,
    /// Whether it tracks the memory that it writes.
    pub dma_logging: Support,
    /// Whether its precopy info has flags.
    pub precopy_info_v2: Support,
    /// How many bytes STOP_COPY would give now, where the kernel can tell. An estimate, as the
    /// driver has it: values near 2^64 have been seen.
    pub data_size: Option<u64>,
}

impl<F: AsFd> AsFd for VfioDevice<F> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl<F: AsFd + Send> MigrationDevice for VfioDevice<F> {
    fn flags(&self) -> io::Result<MigrationFlags> {
        ioctl::flags(self.fd.as_fd())
    }

    fn state(&self) -> io::Result<DeviceState> {
        ioctl::state(self.fd.as_fd())
    }

    fn set_state(&mut self, new: DeviceState) -> io::Result<Option<OwnedFd>> {
        ioctl::set_state(self.fd.as_fd(), new)
    }

    fn reset(&mut self) -> io::Result<()> {
        ioctl::reset(self.fd.as_fd())
    }

    fn data_size(&self) -> io::Result<u64> {
        ioctl::data_size(self.fd.as_fd())
    }

    fn precopy_info(&self, fd: BorrowedFd<'_>) -> io::Result<PrecopyInfo> {
        ioctl::precopy_info(fd)
    }

    fn enable_precopy_info_v2(&mut self) -> io::Result<()> {
        ioctl::enable_precopy_info_v2(self.fd.as_fd())
    }

    fn save_config(&mut self, writer: &mut dyn Write) -> io::Result<()> {
        match &mut self.config {
            Some(config) => config.save(writer),
            None => Ok(()),
        }
    }

    fn load_config(&mut self, reader: &mut dyn Read) -> io::Result<()> {
        match &mut self.config {
            Some(config) => config.load(reader),
            None => Ok(()),
        }
    }
}

impl<F: fmt::Debug> fmt::Debug for VfioDevice<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VfioDevice")
            .field("fd", &self.fd)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, sync::Arc};

    use nix::fcntl::{FcntlArg, FdFlag, fcntl};

    use super::*;

    #[test]
    fn a_duplicate_outlives_its_owner_and_is_close_on_exec() {
        let owner = Arc::new(File::open("/dev/null").unwrap());
        for device in [
            VfioDevice::dup(owner.as_fd()),
            VfioDevice::dup_of(&owner.clone()),
        ] {
            let device = device.unwrap();
            assert_ne!(device.as_fd().as_raw_fd(), owner.as_raw_fd());
            let flags = fcntl(device.as_fd(), FcntlArg::F_GETFD).unwrap();
            assert!(FdFlag::from_bits_retain(flags).contains(FdFlag::FD_CLOEXEC));
            let error = device.flags().unwrap_err();
            assert_eq!(error.raw_os_error(), Some(Errno::ENOTTY as i32));
        }
        let device = VfioDevice::dup_of(&owner).unwrap();
        drop(owner);
        let error = device.flags().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::ENOTTY as i32));
    }

    #[test]
    fn a_number_that_is_no_file_is_refused() {
        let error = VfioDevice::dup_of(&-1).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::EBADF as i32));
    }
}
