//! The kernel's VFIO device.
//!
//! ```text
//!   sysfs path ──▶ open ──▶ SysfsDevice (vfio-ioctls: container, group, device)  ┐
//!   an fd that the VMM has (of a group, or a cdev)                               ┴─▶ VfioDevice
//!                                                                                      │
//!                            MigrationDevice ◀─────────────────────────────────────────┤
//!                            ioctl: one call each, on a BorrowedFd ◀───────────────────┘
//! ```
//!
//! vfio-ioctls opens a device and knows its regions. But it keeps a migration's data fd to itself and drops
//! the PRE_COPY flags. So this module makes the migration's calls itself, with the structs of
//! vfio-bindings, on any device fd. Never mix the two ways to set the state of one device.
//!
//! One thread at a time uses a [`VfioDevice`]: the device's own. Each call lasts as long as the device's
//! driver takes. Nothing here waits, or keeps a state of its own.

pub mod ioctl;
mod open;

use std::{
    fmt,
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::errno::Errno;

pub use self::{
    ioctl::{DmaRange, Feature, Support},
    open::{SysfsDevice, open},
};
use super::MigrationDevice;
use crate::state::{DeviceState, MigrationFlags, PrecopyInfo};

/// What a VMM keeps of a device besides the driver's state: its PCI config space, say.
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
/// // From sysfs, where nobody else has the device:
/// let inner = vfio::open("/sys/bus/pci/devices/0000:3b:00.2".as_ref())?;
/// let device = Device::new(DeviceId::new("0000:00:03.0/vfio", 0)?, Box::new(inner))?;
///
/// // From an fd that the VMM has open, an `OwnedFd`, by whatever way it came by it:
/// let inner = vfio::VfioDevice::new(device_fd);
/// let device = Device::new(DeviceId::new("0000:00:04.0/vfio", 0)?, Box::new(inner))?;
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
