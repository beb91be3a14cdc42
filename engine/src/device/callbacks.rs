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

/// What a VMM's device gives the engine: the raw calls, without any policy.
///
/// # Threads
///
/// The engine makes one call at a time, on the thread that serves this device (the engine's own
/// while packets move, the embedder's otherwise), never on the thread that moves the data. So an
/// implementation may block for as long as its driver does, and needs to be [`Send`] but not
/// `Sync`.
///
/// # Panics
///
/// A panic in any of these is caught, and becomes [`ErrorKind::Panicked`](crate::ErrorKind::Panicked)
/// for this device alone; one in a change of state leaves the device in need of a reset. (Not in a
/// build with `panic = "abort"`.)
pub trait MigrationDevice: Send {
    /// What the device can do: GET of `VFIO_DEVICE_FEATURE_MIGRATION`. Called once.
    ///
    /// # Errors
    ///
    /// The kernel's; `ENOTTY` where it has no migration for this device.
    fn flags(&self) -> io::Result<MigrationFlags>;

    /// The device's state: GET of `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`.
    ///
    /// # Errors
    ///
    /// The kernel's. A state of an unknown number is `InvalidData`.
    fn state(&self) -> io::Result<DeviceState>;

    /// Asks for a state: SET of `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`, nothing else: recovery is
    /// the caller's. Gives the data fd that came with it, which the caller then owns; it must have
    /// `FD_CLOEXEC` and not `O_NONBLOCK`.
    ///
    /// # Errors
    ///
    /// The kernel's. The device may then be in any state on the way.
    fn set_state(&mut self, new: DeviceState) -> io::Result<Option<OwnedFd>>;

    /// `VFIO_DEVICE_RESET`. Afterwards the state is RUNNING and every data fd is dead.
    ///
    /// # Errors
    ///
    /// The kernel's. The device is then given up.
    fn reset(&mut self) -> io::Result<()>;

    /// How many bytes STOP_COPY would give now: GET of `VFIO_DEVICE_FEATURE_MIG_DATA_SIZE`. An
    /// estimate, to be handed on as it is.
    ///
    /// # Errors
    ///
    /// The kernel's, `ENOTTY` where it cannot tell.
    fn data_size(&self) -> io::Result<u64>;

    /// `VFIO_MIG_GET_PRECOPY_INFO` on the device's data fd.
    ///
    /// # Errors
    ///
    /// The kernel's, `EINVAL` outside the PRE_COPY states.
    fn precopy_info(&self, fd: BorrowedFd<'_>) -> io::Result<PrecopyInfo>;

    /// Opts in to [`PrecopyInfo::reinit`]: SET of `VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2`.
    ///
    /// # Errors
    ///
    /// The kernel's; `ENOTTY`, which is what the provided method says, where there is no such
    /// thing. That is fine.
    fn enable_precopy_info_v2(&mut self) -> io::Result<()> {
        Err(Errno::ENOTTY.into())
    }

    /// Reads from the data fd in a PRE_COPY state. The provided method is `read(2)`; only a device
    /// whose fd cannot say `ENOMSG` by itself needs its own.
    ///
    /// # Errors
    ///
    /// `ENOMSG` where there is nothing for now; the kernel's otherwise.
    fn read_precopy(&mut self, fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(nix::unistd::read(fd, buffer)?)
    }

    /// Writes the device's config: what the VMM itself keeps of it, opaque to the engine. The
    /// provided method writes nothing.
    ///
    /// # Errors
    ///
    /// The writer's, or whatever keeps the config from being saved.
    fn save_config(&mut self, writer: &mut dyn Write) -> io::Result<()> {
        let _ = writer;
        Ok(())
    }

    /// Reads what [`MigrationDevice::save_config`] wrote, exactly that and not a byte more: on the
    /// main channel other things follow. The provided method reads nothing.
    ///
    /// # Errors
    ///
    /// The reader's, or whatever is wrong with the config.
    fn load_config(&mut self, reader: &mut dyn Read) -> io::Result<()> {
        let _ = reader;
        Ok(())
    }

    /// Is told of the device's changes of state, for a VMM that has events for its management. The
    /// provided method ignores them. Called between two calls to the device, so it should be quick.
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
