//! A device made of closures: this module keeps its states, and its data fds are the VMM's.
//!
//! ```text
//!   set_state(new)
//!     │
//!     ├─ new is the state already ───────────────────────────▶ no closure, no fd
//!     ├─ the kernel has no way there ────────────────────────▶ EINVAL
//!     ▼
//!   on_change(state, new) ── error ──▶ that error; the device is where it was
//!     │
//!     ├─ a session begins ──▶ open(new) ── error ──▶ the same
//!     ▼                          └─ its data fd ─┐
//!   state = new ◀────────────────────────────────┘
//! ```
//!
//! A session begins when a device enters a saving state from a state that is not one, or enters RESUMING.
//!
//! One thread at a time calls the device: its own, as for every [`MigrationDevice`]. That thread also calls
//! the closures, one at a time. A call lasts as long as its closure takes; nothing here waits.

use std::{
    fmt,
    io::{self, Read, Write},
    os::fd::{BorrowedFd, OwnedFd},
};

use nix::errno::Errno;

use super::{MigrationDevice, machine};
use crate::state::{DeviceState, MigrationFlags, PrecopyInfo};

type Open = dyn FnMut(DeviceState) -> io::Result<OwnedFd> + Send;
type Change = dyn FnMut(DeviceState, DeviceState) -> io::Result<()> + Send;
type Reset = dyn FnMut() -> io::Result<()> + Send;
type DataSize = dyn Fn() -> io::Result<u64> + Send;
type Info = dyn Fn() -> io::Result<PrecopyInfo> + Send;
type ReadPrecopy = dyn FnMut(BorrowedFd<'_>, &mut [u8]) -> io::Result<usize> + Send;
type Save = dyn FnMut(&mut dyn Write) -> io::Result<()> + Send;
type Load = dyn FnMut(&mut dyn Read) -> io::Result<()> + Send;

/// A device that is not the kernel's. Its state comes out of an fd, and goes into an fd, that the VMM makes.
/// Examples: a device model in a process of its own, a vhost-user back-end, a file, a test's pipe.
///
/// It keeps the device's state (RUNNING, STOP_COPY, …) in memory and makes the same state changes as the
/// kernel, for example from RUNNING to STOP_COPY at once. It refuses with `EINVAL` what the kernel refuses so:
/// a state that the device does not have, ERROR, and PRE_COPY after STOP_COPY. A new one is RUNNING, has
/// STOP_COPY and no other ability, and has no config.
///
/// # Threads
///
/// All closures are called on the device's own thread, one at a time (see [`MigrationDevice`]). A closure may
/// block, which holds that thread up.
///
/// # Errors
///
/// A closure's error is the call's error. A refused state change leaves the device in its old state. A panic
/// is caught as for every device.
///
/// ```
/// use std::{fs::File, io, sync::{Arc, Mutex}};
/// use vfio_migration::{Device, DeviceId, DeviceState, FdDevice};
///
/// // A back-end that reads its state from a pipe, and has a config of four bytes.
/// let config = Arc::new(Mutex::new(*b"old!"));
/// let (mut state, writer) = io::pipe()?;
/// let mut writer = Some(writer);
/// let backend = FdDevice::new(move |state| match state {
///     DeviceState::Resuming => Ok(writer.take().ok_or(io::ErrorKind::ResourceBusy)?.into()),
///     _ => Err(io::ErrorKind::Unsupported.into()),
/// })
/// .with_config(
///     { let config = config.clone(); move |writer| writer.write_all(&*config.lock().unwrap()) },
///     { let config = config.clone(); move |reader| reader.read_exact(&mut *config.lock().unwrap()) },
/// );
///
/// let mut device = Device::new(DeviceId::new("backend", 0)?, Box::new(backend))?;
/// device.set_state(DeviceState::Resuming, DeviceState::Running)?;
/// io::Write::write_all(&mut File::from(device.lend()?.try_clone()?), b"state")?;
/// device.load_config(&mut &b"new!"[..])?;
/// device.set_state(DeviceState::Running, DeviceState::Stop)?;
///
/// assert_eq!(io::read_to_string(&mut state)?, "state");
/// assert_eq!(*config.lock().unwrap(), *b"new!");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct FdDevice {
    state: DeviceState,
    flags: MigrationFlags,
    open: Box<Open>,
    change: Box<Change>,
    reset: Box<Reset>,
    data_size: Box<DataSize>,
    info: Box<Info>,
    read_precopy: Box<ReadPrecopy>,
    save: Box<Save>,
    load: Box<Load>,
}

impl FdDevice {
    /// Makes a device whose sessions begin with `open`. `open` gets the state that the device enters,
    /// RESUMING or
    /// a saving state, and returns the data fd. The fd must have `FD_CLOEXEC` and not `O_NONBLOCK`. The
    /// engine owns
    /// it, and closes it when the session ends.
    pub fn new(open: impl FnMut(DeviceState) -> io::Result<OwnedFd> + Send + 'static) -> Self {
        Self {
            state: DeviceState::Running,
            flags: MigrationFlags::STOP_COPY,
            open: Box::new(open),
            change: Box::new(|_from, _to| Ok(())),
            reset: Box::new(|| Ok(())),
            data_size: Box::new(|| Err(Errno::ENOTTY.into())),
            info: Box::new(|| Err(Errno::EINVAL.into())),
            read_precopy: Box::new(|_fd, _bytes| Err(Errno::EINVAL.into())),
            save: Box::new(|_writer| Ok(())),
            load: Box::new(|_reader| Ok(())),
        }
    }

    /// Makes the device begin in STOP, as a device of a VM that does not run.
    #[must_use]
    pub fn stopped(self) -> Self {
        let state = DeviceState::Stop;
        Self { state, ..self }
    }

    /// Adds the P2P states, in which the device starts no transfer to another device.
    #[must_use]
    pub fn with_p2p(self) -> Self {
        let flags = self.flags | MigrationFlags::P2P;
        Self { flags, ..self }
    }

    /// Adds the PRE_COPY states. In them `info` returns what is left, and `read` reads from the data fd. `read`
    /// returns `ENOMSG` if there is nothing for now (see [`MigrationDevice::read_precopy`]); a `read(2)` of
    /// a pipe
    /// would wait instead.
    #[must_use]
    pub fn with_precopy(
        self,
        info: impl Fn() -> io::Result<PrecopyInfo> + Send + 'static,
        read: impl FnMut(BorrowedFd<'_>, &mut [u8]) -> io::Result<usize> + Send + 'static,
    ) -> Self {
        Self {
            flags: self.flags | MigrationFlags::PRE_COPY,
            info: Box::new(info),
            read_precopy: Box::new(read),
            ..self
        }
    }

    /// Sets how many bytes STOP_COPY would give now. Default: the device cannot tell (`ENOTTY`).
    #[must_use]
    pub fn with_data_size(self, size: impl Fn() -> io::Result<u64> + Send + 'static) -> Self {
        let data_size = Box::new(size);
        Self { data_size, ..self }
    }

    /// Sets the config, which the VMM keeps beside the device's state: [`MigrationDevice::save_config`] and
    /// [`MigrationDevice::load_config`].
    #[must_use]
    pub fn with_config(
        self,
        save: impl FnMut(&mut dyn Write) -> io::Result<()> + Send + 'static,
        load: impl FnMut(&mut dyn Read) -> io::Result<()> + Send + 'static,
    ) -> Self {
        Self {
            save: Box::new(save),
            load: Box::new(load),
            ..self
        }
    }

    /// Calls `change` with the old and the new state before each state change that the kernel would make.
    /// `change`
    /// may refuse, for example the change out of RESUMING if the state has not come whole. A reset is not a
    /// state
    /// change.
    #[must_use]
    pub fn on_change(
        self,
        change: impl FnMut(DeviceState, DeviceState) -> io::Result<()> + Send + 'static,
    ) -> Self {
        let change = Box::new(change);
        Self { change, ..self }
    }

    /// Calls `reset` when the device is reset. `reset` must discard the device's content. If it fails the
    /// device is
    /// lost; otherwise the device is RUNNING.
    #[must_use]
    pub fn on_reset(self, reset: impl FnMut() -> io::Result<()> + Send + 'static) -> Self {
        let reset = Box::new(reset);
        Self { reset, ..self }
    }
}

impl MigrationDevice for FdDevice {
    fn flags(&self) -> io::Result<MigrationFlags> {
        Ok(self.flags)
    }

    fn state(&self) -> io::Result<DeviceState> {
        Ok(self.state)
    }

    fn set_state(&mut self, new: DeviceState) -> io::Result<Option<OwnedFd>> {
        let from = self.state;
        if new == from {
            return Ok(None);
        }
        machine::path(self.flags, from, new).ok_or(Errno::EINVAL)?;
        (self.change)(from, new)?;
        let begins = new == DeviceState::Resuming || (new.is_saving() && !from.is_saving());
        let fd = begins.then(|| (self.open)(new)).transpose()?;
        self.state = new;
        Ok(fd)
    }

    fn reset(&mut self) -> io::Result<()> {
        (self.reset)()?;
        self.state = DeviceState::Running;
        Ok(())
    }

    fn data_size(&self) -> io::Result<u64> {
        (self.data_size)()
    }

    fn precopy_info(&self, _fd: BorrowedFd<'_>) -> io::Result<PrecopyInfo> {
        if !self.state.is_precopy() {
            return Err(Errno::EINVAL.into());
        }
        (self.info)()
    }

    fn read_precopy(&mut self, fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
        (self.read_precopy)(fd, buffer)
    }

    fn save_config(&mut self, writer: &mut dyn Write) -> io::Result<()> {
        (self.save)(writer)
    }

    fn load_config(&mut self, reader: &mut dyn Read) -> io::Result<()> {
        (self.load)(reader)
    }
}

impl fmt::Debug for FdDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FdDevice")
            .field("state", &self.state)
            .field("flags", &self.flags)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::fd::AsFd,
        sync::{Arc, Mutex},
    };

    use super::*;
    use DeviceState::{PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};

    /// What the closures were asked: a change by both states, a session by one of them.
    type Asked = Arc<Mutex<Vec<(Option<DeviceState>, DeviceState)>>>;

    fn null() -> io::Result<OwnedFd> {
        Ok(std::fs::File::open("/dev/null")?.into())
    }

    fn device() -> (FdDevice, Asked) {
        let asked = Asked::default();
        let (opens, changes) = (asked.clone(), asked.clone());
        let device = FdDevice::new(move |state| {
            opens.lock().unwrap().push((None, state));
            null()
        })
        .on_change(move |from, to| {
            changes.lock().unwrap().push((Some(from), to));
            Ok(())
        });
        (device, asked)
    }

    fn with_everything() -> (FdDevice, Asked) {
        let (device, asked) = device();
        let info = || Ok(PrecopyInfo::default());
        let device = device
            .with_p2p()
            .with_precopy(info, |_fd, bytes| Ok(bytes.len()));
        (device, asked)
    }

    #[track_caller]
    fn refused<T: fmt::Debug>(result: io::Result<T>, errno: Errno) {
        assert_eq!(result.unwrap_err().raw_os_error(), Some(errno as i32));
    }

    #[test]
    fn it_changes_as_the_kernel_does_and_refuses_what_the_kernel_refuses() {
        for from in DeviceState::ALL.into_iter().skip(1) {
            for to in DeviceState::ALL {
                for bits in [1, 3, 5, 7] {
                    let (mut device, asked) = with_everything();
                    device.flags = MigrationFlags::from_bits(bits);
                    if !device.flags.supports(from) {
                        continue;
                    }
                    device.set_state(from).unwrap();
                    asked.lock().unwrap().clear();
                    let allowed = from == to
                        || (to != DeviceState::Error
                            && device.flags.supports(to)
                            && !(from == StopCopy && to.is_precopy()));
                    if allowed {
                        device.set_state(to).unwrap();
                        assert_eq!(device.state, to);
                    } else {
                        refused(device.set_state(to), Errno::EINVAL);
                        assert_eq!(device.state, from);
                        assert!(asked.lock().unwrap().is_empty(), "{from} to {to}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_session_begins_with_one_data_fd() {
        let (mut device, asked) = with_everything();
        for (to, begins) in [
            (PreCopy, true),
            (PreCopyP2p, false),
            (StopCopy, false),
            (StopCopy, false),
            (Stop, false),
            (StopCopy, true),
            (Resuming, true),
            (StopCopy, true),
            (RunningP2p, false),
            (PreCopyP2p, true),
            (Resuming, true),
            (Running, false),
        ] {
            let from = device.state;
            let fd = device.set_state(to).unwrap();
            assert_eq!(fd.is_some(), begins, "{from} to {to}");
            let change = (from != to).then_some((Some(from), to));
            let open = begins.then_some((None, to));
            let expected: Vec<_> = change.into_iter().chain(open).collect();
            assert_eq!(std::mem::take(&mut *asked.lock().unwrap()), expected);
        }
    }

    #[test]
    fn a_refused_change_leaves_the_device_where_it_was() {
        let mut device = FdDevice::new(|_state| Err(Errno::EMFILE.into()))
            .stopped()
            .on_change(|_from, to| match to {
                Running => Err(Errno::EPERM.into()),
                _ => Ok(()),
            });
        refused(device.set_state(Running), Errno::EPERM);
        refused(device.set_state(Resuming), Errno::EMFILE);
        assert_eq!(device.state().unwrap(), Stop);
    }

    #[test]
    fn a_reset_makes_it_running_unless_it_fails() {
        let mut device = FdDevice::new(|_state| null()).stopped();
        device.reset().unwrap();
        assert_eq!(device.state().unwrap(), Running);
        let mut device = device.stopped().on_reset(|| Err(Errno::EIO.into()));
        refused(device.reset(), Errno::EIO);
        assert_eq!(device.state().unwrap(), Stop);
    }

    #[test]
    fn what_it_can_tell_and_when() {
        let (mut device, _asked) = device();
        let fd = null().unwrap();
        assert_eq!(device.flags().unwrap(), MigrationFlags::STOP_COPY);
        refused(device.data_size(), Errno::ENOTTY);
        refused(device.precopy_info(fd.as_fd()), Errno::EINVAL);
        device.save_config(&mut io::empty()).unwrap();
        device.load_config(&mut io::empty()).unwrap();

        let initial_bytes = 7;
        let info = PrecopyInfo {
            initial_bytes,
            ..PrecopyInfo::default()
        };
        let mut device = device
            .with_data_size(|| Ok(9))
            .with_precopy(move || Ok(info), |_fd, _bytes| Err(Errno::ENOMSG.into()))
            .with_config(
                |writer| writer.write_all(b"c"),
                |reader| reader.read_exact(&mut [0; 2]),
            );
        assert_eq!(device.flags().unwrap().bits(), 5);
        assert_eq!(device.data_size().unwrap(), 9);
        refused(device.precopy_info(fd.as_fd()), Errno::EINVAL);
        device.set_state(PreCopy).unwrap();
        assert_eq!(device.precopy_info(fd.as_fd()).unwrap(), info);
        refused(device.read_precopy(fd.as_fd(), &mut [0]), Errno::ENOMSG);
        let mut config = Vec::new();
        device.save_config(&mut config).unwrap();
        assert_eq!(config, b"c");
        let error = device.load_config(&mut &config[..]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
