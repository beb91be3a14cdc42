//! The migration's ioctls, one function each, on any VFIO device fd (`linux/vfio.h`).
//!
//! Every call takes a [`BorrowedFd`] and keeps nothing. [`Device`](crate::Device) decides which state a
//! device should be in, what to do when the device refuses, and who owns its data fd.
#![expect(unsafe_code, reason = "makes system calls on structs of its own")]

use std::{
    io,
    mem::offset_of,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{errno::Errno, libc};
use vfio_bindings::bindings::vfio as uapi;

use crate::state::{DeviceState, MigrationFlags, PrecopyInfo};

const fn request(number: u32) -> u32 {
    (uapi::VFIO_TYPE as u32) << 8 | (uapi::VFIO_BASE + number)
}

/// `_IO(';', 100 + 17)`
const VFIO_DEVICE_FEATURE: u32 = request(17);
/// `_IO(';', 100 + 11)`
const VFIO_DEVICE_RESET: u32 = request(11);
/// `_IO(';', 100 + 18)`, on a cdev.
const VFIO_DEVICE_BIND_IOMMUFD: u32 = request(18);
/// `_IO(';', 100 + 21)`, on the data fd.
const VFIO_MIG_GET_PRECOPY_INFO: u32 = request(21);

/// A feature's number, and how it is used.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Feature(u32);

impl Feature {
    /// The flags of the migration.
    pub const MIGRATION: Self =
        Self(uapi::VFIO_DEVICE_FEATURE_MIGRATION | uapi::VFIO_DEVICE_FEATURE_GET);
    /// Changes of state.
    pub const MIG_DEVICE_STATE: Self =
        Self(uapi::VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE | uapi::VFIO_DEVICE_FEATURE_SET);
    /// The state itself.
    const STATE: Self =
        Self(uapi::VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE | uapi::VFIO_DEVICE_FEATURE_GET);
    /// The estimate of what STOP_COPY gives.
    pub const MIG_DATA_SIZE: Self =
        Self(uapi::VFIO_DEVICE_FEATURE_MIG_DATA_SIZE | uapi::VFIO_DEVICE_FEATURE_GET);
    /// Flags in the precopy info.
    pub const MIG_PRECOPY_INFO_V2: Self =
        Self(uapi::VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 | uapi::VFIO_DEVICE_FEATURE_SET);
    /// Tracking of the memory that the device writes; with it come its end and its report.
    pub const DMA_LOGGING_START: Self =
        Self(uapi::VFIO_DEVICE_FEATURE_DMA_LOGGING_START | uapi::VFIO_DEVICE_FEATURE_SET);
    const DMA_LOGGING_STOP: Self =
        Self(uapi::VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP | uapi::VFIO_DEVICE_FEATURE_SET);
    const DMA_LOGGING_REPORT: Self =
        Self(uapi::VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT | uapi::VFIO_DEVICE_FEATURE_GET);
}

/// Whether there is a feature.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Support {
    /// There is.
    Yes,
    /// The kernel knows nothing of it (`ENOTTY`).
    NotThisKernel,
    /// The kernel does, but this device or its driver does not have it (`EINVAL`, `EOPNOTSUPP`).
    NotThisDevice,
}

impl Support {
    /// What an errno says of it, if it speaks of that.
    pub(super) fn from_refusal(error: &io::Error) -> Option<Self> {
        match error.raw_os_error().map(Errno::from_raw)? {
            Errno::ENOTTY => Some(Self::NotThisKernel),
            Errno::EINVAL | Errno::EOPNOTSUPP => Some(Self::NotThisDevice),
            _ => None,
        }
    }
}

/// `struct vfio_device_feature`, with what follows it.
#[repr(C)]
struct Call<T> {
    argsz: u32,
    flags: u32,
    data: T,
}

/// What may follow it: plain old data, for which every pattern of bits is a value.
///
/// # Safety
///
/// `repr(C)`, without padding, references, or values that a kernel could make invalid.
unsafe trait Plain: Copy {}

// SAFETY: nothing at all.
unsafe impl Plain for () {}
// SAFETY: integers without padding, as in the header.
unsafe impl Plain for uapi::vfio_device_feature_migration {}
// SAFETY: as above.
unsafe impl Plain for uapi::vfio_device_feature_mig_state {}
// SAFETY: as above.
unsafe impl Plain for uapi::vfio_device_feature_mig_data_size {}
// SAFETY: as above. The address in it is the caller's to answer for.
unsafe impl Plain for uapi::vfio_device_feature_dma_logging_control {}
// SAFETY: as above.
unsafe impl Plain for uapi::vfio_device_feature_dma_logging_report {}

/// Makes the call, and returns its data.
///
/// # Safety
///
/// Addresses in `data` must be good for what the feature does with them.
unsafe fn feature<T: Plain>(fd: BorrowedFd<'_>, flags: u32, data: T) -> io::Result<T> {
    let mut call = Call {
        argsz: u32::try_from(size_of::<Call<T>>()).expect("a few words"),
        flags,
        data,
    };
    // SAFETY: `call` has the layout of the header's struct and its true size in `argsz`, and outlives
    // the call; a file that is no VFIO device refuses this request. Addresses are the caller's.
    let result = unsafe {
        libc::ioctl(
            fd.as_raw_fd(),
            VFIO_DEVICE_FEATURE as libc::Ioctl,
            &raw mut call,
        )
    };
    Errno::result(result)?;
    Ok(call.data)
}

/// As [`feature`], for what has no addresses.
fn plain<T: Plain>(fd: BorrowedFd<'_>, what: Feature, data: T) -> io::Result<T> {
    // SAFETY: the callers below pass no address.
    unsafe { feature(fd, what.0, data) }
}

/// Asks whether there is a feature, without using it.
///
/// # Errors
///
/// The kernel's, where they say something else.
pub fn probe(fd: BorrowedFd<'_>, what: Feature) -> io::Result<Support> {
    // SAFETY: no address.
    match unsafe { feature(fd, what.0 | uapi::VFIO_DEVICE_FEATURE_PROBE, ()) } {
        Ok(()) => Ok(Support::Yes),
        Err(error) => Support::from_refusal(&error).ok_or(error),
    }
}

/// GET of `VFIO_DEVICE_FEATURE_MIGRATION`.
///
/// # Errors
///
/// The kernel's: `ENOTTY` where it has no migration for this device.
pub fn flags(fd: BorrowedFd<'_>) -> io::Result<MigrationFlags> {
    let data = uapi::vfio_device_feature_migration::default();
    let data = plain(fd, Feature::MIGRATION, data)?;
    Ok(MigrationFlags::from_bits(data.flags))
}

/// Takes the fd that came with a state, if one did.
fn owned(data_fd: i32) -> Option<OwnedFd> {
    // SAFETY: the kernel has just made it for the caller, and nobody else knows of it.
    (data_fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(data_fd) })
}

/// Duplicates a file by its number, with `FD_CLOEXEC`.
///
/// # Errors
///
/// The kernel's: `EBADF`, `EMFILE`.
pub(super) fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the call takes numbers and no address, and leaves `fd` as it is, whatever that is.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
    Errno::result(copy)?;
    owned(copy).ok_or_else(|| Errno::EBADF.into())
}

/// GET of `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`.
///
/// # Errors
///
/// The kernel's; `InvalidData` for a state of an unknown number.
pub fn state(fd: BorrowedFd<'_>) -> io::Result<DeviceState> {
    let data = uapi::vfio_device_feature_mig_state {
        device_state: 0,
        data_fd: -1,
    };
    let data = plain(fd, Feature::STATE, data)?;
    let number = data.device_state;
    DeviceState::try_from(number).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// SET of `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`, and the data fd that came with it.
///
/// # Errors
///
/// The kernel's. The device may then be in any state on the way.
pub fn set_state(fd: BorrowedFd<'_>, new: DeviceState) -> io::Result<Option<OwnedFd>> {
    let data = uapi::vfio_device_feature_mig_state {
        device_state: new.into(),
        data_fd: -1,
    };
    let data = plain(fd, Feature::MIG_DEVICE_STATE, data)?;
    Ok(owned(data.data_fd))
}

/// GET of `VFIO_DEVICE_FEATURE_MIG_DATA_SIZE`, in bytes, as the driver has it.
///
/// # Errors
///
/// The kernel's: `ENOTTY` where it cannot tell.
pub fn data_size(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let data = uapi::vfio_device_feature_mig_data_size::default();
    Ok(plain(fd, Feature::MIG_DATA_SIZE, data)?.stop_copy_length)
}

/// SET of `VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2`: from now on the precopy info has flags.
///
/// # Errors
///
/// The kernel's: `ENOTTY` where there is no such thing, which is fine.
pub fn enable_precopy_info_v2(fd: BorrowedFd<'_>) -> io::Result<()> {
    plain(fd, Feature::MIG_PRECOPY_INFO_V2, ())
}

/// `VFIO_MIG_GET_PRECOPY_INFO`, on a *data fd*.
///
/// # Errors
///
/// The kernel's: `EINVAL` outside the PRE_COPY states.
pub fn precopy_info(data_fd: BorrowedFd<'_>) -> io::Result<PrecopyInfo> {
    let mut info = uapi::vfio_precopy_info {
        argsz: u32::try_from(size_of::<uapi::vfio_precopy_info>()).expect("a few words"),
        ..Default::default()
    };
    // SAFETY: `info` is the header's struct with its size in `argsz`, and outlives the call.
    let result = unsafe {
        libc::ioctl(
            data_fd.as_raw_fd(),
            VFIO_MIG_GET_PRECOPY_INFO as libc::Ioctl,
            &raw mut info,
        )
    };
    Errno::result(result)?;
    Ok(PrecopyInfo {
        initial_bytes: info.initial_bytes,
        dirty_bytes: info.dirty_bytes,
        reinit: info.flags & uapi::VFIO_PRECOPY_INFO_REINIT != 0,
    })
}

/// `VFIO_DEVICE_BIND_IOMMUFD`, on a *cdev*: from now on it answers as a group's device does, until it is closed.
///
/// # Errors
///
/// The kernel's: `EBUSY` where somebody else has the device, `ENOTTY` for a file that is no cdev.
pub fn bind_iommufd(cdev: BorrowedFd<'_>, iommufd: BorrowedFd<'_>) -> io::Result<()> {
    let mut bind = uapi::vfio_device_bind_iommufd {
        // Without the VM's token, which older kernels do not know.
        argsz: u32::try_from(offset_of!(uapi::vfio_device_bind_iommufd, token_uuid_ptr))
            .expect("a few words"),
        iommufd: iommufd.as_raw_fd(),
        ..Default::default()
    };
    // SAFETY: `bind` is the header's struct, at least as long as `argsz` says, without an address, and
    // outlives the call. The kernel takes a reference to the iommufd of its own.
    let result = unsafe {
        libc::ioctl(
            cdev.as_raw_fd(),
            VFIO_DEVICE_BIND_IOMMUFD as libc::Ioctl,
            &raw mut bind,
        )
    };
    Errno::result(result)?;
    Ok(())
}

/// `VFIO_DEVICE_RESET`: RUNNING afterwards.
///
/// # Errors
///
/// The kernel's.
pub fn reset(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the request has no argument.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), VFIO_DEVICE_RESET as libc::Ioctl) };
    Errno::result(result)?;
    Ok(())
}

/// Memory as a device sees it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DmaRange {
    /// The I/O virtual address where it begins, a multiple of the page size.
    pub iova: u64,
    /// How many bytes, a multiple of the page size.
    pub length: u64,
}

/// SET of `VFIO_DEVICE_FEATURE_DMA_LOGGING_START`: the device tracks what it writes to `ranges`, in
/// pages of `page_size` bytes. Returns the page size that it took.
///
/// # Errors
///
/// The kernel's: `ENOTTY` or `EOPNOTSUPP` where there is none, `EINVAL` while it runs already.
pub fn start_dma_logging(
    fd: BorrowedFd<'_>,
    page_size: u64,
    ranges: &[DmaRange],
) -> io::Result<u64> {
    let ranges: Vec<_> = ranges
        .iter()
        .map(|range| uapi::vfio_device_feature_dma_logging_range {
            iova: range.iova,
            length: range.length,
        })
        .collect();
    let control = uapi::vfio_device_feature_dma_logging_control {
        page_size,
        num_ranges: u32::try_from(ranges.len()).map_err(|_| Errno::E2BIG)?,
        __reserved: 0,
        ranges: ranges.as_ptr().addr() as u64,
    };
    // The pointer's provenance is the kernel's to use.
    let _exposed = ranges.as_ptr().expose_provenance();
    // SAFETY: `ranges` holds `num_ranges` of the header's structs until after the call, which reads
    // them.
    let control = unsafe { feature(fd, Feature::DMA_LOGGING_START.0, control)? };
    Ok(control.page_size)
}

/// SET of `VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP`.
///
/// # Errors
///
/// The kernel's.
pub fn stop_dma_logging(fd: BorrowedFd<'_>) -> io::Result<()> {
    plain(fd, Feature::DMA_LOGGING_STOP, ())
}

/// GET of `VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`: sets a bit in `bitmap` for each page of `range`
/// that was written since the last report, and forgets it. Bits are only ever added.
///
/// # Errors
///
/// `EINVAL` where `bitmap` is too small for the range, or the range is not one of whole pages; the
/// kernel's.
pub fn report_dma_logging(
    fd: BorrowedFd<'_>,
    range: DmaRange,
    page_size: u64,
    bitmap: &mut [u64],
) -> io::Result<()> {
    let pages = range.length.checked_div(page_size).ok_or(Errno::EINVAL)?;
    // The kernel would set the bit of a page that is only begun: beyond the bitmap's end.
    let whole = range.iova.is_multiple_of(page_size) && range.length.is_multiple_of(page_size);
    if !whole || pages.div_ceil(64) > bitmap.len() as u64 {
        return Err(Errno::EINVAL.into());
    }
    let report = uapi::vfio_device_feature_dma_logging_report {
        iova: range.iova,
        length: range.length,
        page_size,
        bitmap: bitmap.as_mut_ptr().expose_provenance() as u64,
    };
    // SAFETY: `bitmap` has a bit for each page of the range, and is borrowed until after the call.
    unsafe { feature(fd, Feature::DMA_LOGGING_REPORT.0, report)? };
    Ok(())
}

#[cfg(test)]
mod tests;
