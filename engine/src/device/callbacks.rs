//! The callbacks through which the engine uses the VMM's device.
//!
//! ```text
//!   Device ──▶ MigrationDevice ──▶ the VMM ──▶ ioctls
//! ```
//!
//! Only [`Device`](super::Device) calls them, one call at a time, on the device's own thread. A call ends
//! when the implementation returns; nothing here can end it sooner.

use std::{
    fmt,
    io::{self, Read, Write},
    os::fd::{BorrowedFd, OwnedFd},
};

use nix::errno::Errno;

use crate::state::{DeviceState, MigrationFlags, PrecopyInfo};

/// The VMM's device, as the engine calls it: the raw calls, without any policy.
///
/// # Threads
///
/// The engine makes one call at a time, on the thread that serves this device: the engine's own while packets
/// move, the VMM's otherwise. It never calls on the I/O thread. So an implementation may block for as long as
/// its driver does, and needs to be [`Send`] but not `Sync`.
///
/// # Panics
///
/// The engine catches a panic in any of these calls. It becomes
/// [`ErrorKind::Panicked`](crate::ErrorKind::Panicked) for this device alone. After a panic in a state
/// change the
/// device needs a reset. (A build with `panic = "abort"` catches nothing.)
pub trait MigrationDevice: Send {
    /// Returns what the device can do: GET of `VFIO_DEVICE_FEATURE_MIGRATION`. Called once.
    ///
    /// # Errors
    ///
    /// The kernel's; `ENOTTY` if the kernel has no migration for this device.
    fn flags(&self) -> io::Result<MigrationFlags>;

    /// Returns the device's state: GET of `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`.
    ///
    /// # Errors
    ///
    /// The kernel's. A state of an unknown number is `InvalidData`.
    fn state(&self) -> io::Result<DeviceState>;

    /// Requests a state: SET of `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`, and nothing else; the caller does the
    /// recovery. Returns the data fd that came with the state, which the caller then owns. The fd must have
    /// `FD_CLOEXEC` and not `O_NONBLOCK`.
    ///
    /// # Errors
    ///
    /// The kernel's. The device may then be in any state on the way to `new`.
    fn set_state(&mut self, new: DeviceState) -> io::Result<Option<OwnedFd>>;

    /// Resets the device: `VFIO_DEVICE_RESET`. Afterwards the state is RUNNING and every data fd is dead.
    ///
    /// # Errors
    ///
    /// The kernel's. The device is then given up.
    fn reset(&mut self) -> io::Result<()>;

    /// Returns how many bytes STOP_COPY would give now: GET of `VFIO_DEVICE_FEATURE_MIG_DATA_SIZE`. This is an
    /// estimate; pass it on unchanged.
    ///
    /// # Errors
    ///
    /// The kernel's; `ENOTTY` if the device cannot tell.
    fn data_size(&self) -> io::Result<u64>;

    /// Returns what is left in PRE_COPY: `VFIO_MIG_GET_PRECOPY_INFO` on the device's data fd.
    ///
    /// # Errors
    ///
    /// The kernel's; `EINVAL` outside of the PRE_COPY states.
    fn precopy_info(&self, fd: BorrowedFd<'_>) -> io::Result<PrecopyInfo>;

    /// Opts in to [`PrecopyInfo::reinit`]: SET of `VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2`.
    ///
    /// # Errors
    ///
    /// The kernel's. `ENOTTY` means that the kernel does not have it, which is fine; the provided method
    /// returns
    /// that.
    fn enable_precopy_info_v2(&mut self) -> io::Result<()> {
        Err(Errno::ENOTTY.into())
    }

    /// Reads from the data fd in a PRE_COPY state. The provided method is `read(2)`. Only a device whose fd
    /// cannot return `ENOMSG` needs a method of its own.
    ///
    /// # Errors
    ///
    /// `ENOMSG` if there is nothing for now; the kernel's otherwise.
    fn read_precopy(&mut self, fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(nix::unistd::read(fd, buffer)?)
    }

    /// Writes the device's config: what the VMM itself keeps of the device, opaque to the engine. The provided
    /// method writes nothing.
    ///
    /// # Errors
    ///
    /// The writer's, or the reason why the config cannot be saved.
    fn save_config(&mut self, writer: &mut dyn Write) -> io::Result<()> {
        let _ = writer;
        Ok(())
    }

    /// Reads exactly what [`MigrationDevice::save_config`] wrote, and not a byte more: on the main channel
    /// other
    /// data follows. The provided method reads nothing.
    ///
    /// # Errors
    ///
    /// The reader's, or the fault in the config.
    fn load_config(&mut self, reader: &mut dyn Read) -> io::Result<()> {
        let _ = reader;
        Ok(())
    }

    /// Receives the device's state changes, for a VMM that sends events to its management. The provided method
    /// ignores them. The engine calls this between two calls to the device, so it should be quick.
    fn event(&mut self, event: StateEvent) {
        let _ = event;
    }
}

impl fmt::Debug for dyn MigrationDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a device of the VMM's")
    }
}

/// What a VMM may want to tell its management about a device.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum StateEvent {
    /// PRE_COPY_P2P is about to be requested, and can take hundreds of milliseconds.
    PreCopyP2pPrepare,
    /// The device is in this state now.
    State(DeviceState),
}
