//! One VFIO device: its state, changed with recovery, and the data fd of its session.
//!
//! ```text
//!   set_state(new, recover)
//!     │
//!     ├─ new is the state already ─────────────────────────────────────────────▶ Ok
//!     ▼
//!    SET new ── ok ──▶ remember new; keep the fd, if one came ─────────────────▶ Ok
//!     │                         └─ one is held already: close the new one ─────▶ EBADF
//!     ▼ errno
//!    GET, remember ──▶ SET recover ── ok ──▶ remember it; close an fd that came ─▶ errno
//!     │ fails               │ fails, or recover is a reset
//!     └─────────────────────┴──▶ RESET ── ok ──▶ RUNNING; close the fd ─────────▶ errno
//!                                   └─ fails ──▶ lost, for good ────────────────▶ Lost
//! ```
//!
//! The state machine is the kernel's. This module drives it, and always knows where the device stands: it
//! remembers a state only after a successful SET, a GET, or a reset. The data fd lives as long as its
//! session: a change that leaves the saving states, or RESUMING, closes it.
//!
//! # Threads
//!
//! Everything here runs on one thread at a time, the device's own. While packets move that is the engine's
//! thread for the device; otherwise it is the VMM's thread, for the device's section and its state changes.
//! SET and RESET may take hundreds of milliseconds, and the config callbacks are the VMM's. So none of this
//! ever runs on the I/O thread. The I/O thread knows a device only as the [`Fd`] from [`Device::lend`].
//!
//! # Waits
//!
//! This module waits for nothing itself. A call lasts as long as the driver, or the VMM's callback, takes;
//! nothing here can end it sooner.

mod callbacks;
pub mod estimate;
mod fd_device;
mod hooks;
mod machine;
mod rest;
pub(crate) mod set;
#[cfg(feature = "sim")]
pub mod sim;
#[cfg(feature = "vfio")]
pub mod vfio;

use std::{
    any::Any,
    fmt,
    io::{self, Read, Write},
    os::fd::{AsFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, PoisonError},
};

use nix::errno::Errno;
use vfio_migration_uring::Fd;

use self::rest::Rest;
pub use self::{
    callbacks::{MigrationDevice, StateEvent},
    fd_device::FdDevice,
    hooks::{Hooked, Hooks, MAX_CONFIG_LEN},
    rest::Duty,
};
use crate::{
    error::{Error, ErrorKind, Phase, Result},
    id::DeviceId,
    state::{DeviceState, MigrationFlags, PrecopyInfo},
    tasks::{Task, TaskKind, Threads},
    trace,
};

/// What to do with a device that has refused a state.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Recover {
    /// Ask for this state, and reset the device where that fails too. ERROR stands for
    /// [`Recover::Reset`].
    State(DeviceState),
    /// Reset the device, which makes it RUNNING and loses what it held.
    Reset,
}

impl Recover {
    /// The state to ask for, if it is one.
    const fn state(self) -> Option<DeviceState> {
        match self {
            Self::State(DeviceState::Error) | Self::Reset => None,
            Self::State(state) => Some(state),
        }
    }
}

impl From<DeviceState> for Recover {
    fn from(state: DeviceState) -> Self {
        Self::State(state)
    }
}

/// Whether calls can be made on a device.
enum Health {
    Good,
    /// A callback has panicked, so nobody knows where the device stands until it is reset.
    Panicked(Error),
    /// Its reset has failed.
    Lost(Error),
}

/// Why a call on a device failed.
enum Failure {
    Refused(io::Error),
    Panicked(Error),
}

/// A device under migration: the VMM's [`MigrationDevice`], the last known state, and the session's data fd.
///
/// Every error names the device. An error of a state change also has both states ([`Error::states`]) and the
/// errno.
///
/// | after | every call returns | until |
/// |---|---|---|
/// | a reset that failed | [`ErrorKind::Lost`]: the device is lost | for good |
/// | a panic in a state change | [`ErrorKind::Panicked`] | a reset; the next [`Device::set_state`] begins with one |
///
/// Dropping it closes the data fd and leaves the device in its state.
///
/// ```
/// use std::io::{self, Write};
/// use vfio_migration::{Device, DeviceId, DeviceState, FdDevice, Recover};
///
/// // A device whose whole state fits in a pipe.
/// let small = FdDevice::new(|_state| {
///     let (reader, mut writer) = io::pipe()?;
///     writer.write_all(b"state")?;
///     Ok(reader.into())
/// });
///
/// let mut device = Device::new(DeviceId::new("0000:00:03.0/vfio", 0)?, Box::new(small))?;
/// device.set_state(DeviceState::StopCopy, Recover::State(DeviceState::Stop))?;
///
/// let fd = device.lend()?;                        // for a lane, which reads it to its end
/// let mut pipe = std::fs::File::from(fd.try_clone()?);
/// assert_eq!(io::read_to_string(&mut pipe)?, "state");
/// drop(fd);                                       // and gives it back
///
/// device.set_state(DeviceState::Stop, Recover::Reset)?;
/// assert!(device.lend().is_err(), "the session is over");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "dropping it closes the data fd of the session"]
pub struct Device {
    id: DeviceId,
    /// Behind a lock that is never taken: the VMM's may be `Send` alone.
    inner: Mutex<Box<dyn MigrationDevice>>,
    flags: MigrationFlags,
    state: DeviceState,
    fd: Option<Fd>,
    health: Health,
    events: bool,
    threads: Threads,
    /// Whether the kernel has the newer precopy info, once it was asked.
    precopy_info_v2: Option<bool>,
    rest: Rest,
}

impl Device {
    /// Takes over a device, and asks it for its flags and its state.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Device`] where the device does not answer, or has no STOP_COPY (`EOPNOTSUPP`);
    /// [`ErrorKind::Panicked`]. The device is dropped then.
    pub fn new(id: DeviceId, inner: Box<dyn MigrationDevice>) -> Result<Self> {
        Self::probe(id, inner).map_err(|(error, _inner)| error)
    }

    /// As [`Device::new`], and gives the VMM its device back where that fails.
    pub(crate) fn probe(
        id: DeviceId,
        inner: Box<dyn MigrationDevice>,
    ) -> Result<Self, (Error, Box<dyn MigrationDevice>)> {
        let mut device = Self {
            id,
            inner: Mutex::new(inner),
            flags: MigrationFlags::default(),
            state: DeviceState::Error,
            fd: None,
            health: Health::Good,
            events: true,
            threads: Threads::default(),
            precopy_info_v2: None,
            rest: Rest::new(),
        };
        match device.ask() {
            Ok(()) => Ok(device),
            Err(error) => Err((error, device.into_inner())),
        }
    }

    fn ask(&mut self) -> Result<()> {
        self.flags = self.query(Phase::Setup, |inner| inner.flags())?;
        if !self.flags.contains(MigrationFlags::STOP_COPY) {
            return Err(self.error(Phase::Setup).caused_by(Errno::EOPNOTSUPP));
        }
        self.state = self.query(Phase::Setup, |inner| inner.state())?;
        Ok(())
    }

    /// Sets whether the engine calls [`MigrationDevice::event`]. Default: yes.
    pub const fn set_events(&mut self, events: bool) {
        self.events = events;
    }

    /// Runs this device's state changes on the VMM's threads, when several devices change their states at once
    /// ([`TaskKind::State`](crate::TaskKind::State)). A device also keeps the spawner of its first session: see
    /// [`SaveBuilder::spawn_with`](crate::SaveBuilder::spawn_with).
    pub fn spawn_with(&mut self, spawn: impl Fn(Task) -> io::Result<()> + Send + Sync + 'static) {
        self.threads.spawn_with(spawn);
    }

    /// Calls `hook` on each thread that is made for such a state change, before it works. A device also keeps the
    /// hook of its first session: see [`SaveBuilder::on_thread_start`](crate::SaveBuilder::on_thread_start).
    pub fn on_thread_start(
        &mut self,
        hook: impl Fn(&TaskKind) -> io::Result<()> + Send + Sync + 'static,
    ) {
        self.threads.on_start(hook);
    }

    /// Keeps a session's, where it has none of its own.
    pub(crate) fn adopt_threads(&mut self, threads: &Threads) {
        self.threads.adopt(threads);
    }

    pub(crate) const fn threads(&self) -> &Threads {
        &self.threads
    }

    /// The device's name.
    #[must_use]
    pub const fn id(&self) -> &DeviceId {
        &self.id
    }

    /// What the device can do.
    #[must_use]
    pub const fn flags(&self) -> MigrationFlags {
        self.flags
    }

    /// Returns the last known state: the result of the last SET, GET or reset. Makes no system call. If the
    /// device is lost, or its callback has panicked, the value means nothing.
    #[must_use]
    pub const fn state(&self) -> DeviceState {
        self.state
    }

    /// Whether the device is lost: its reset has failed, and every call returns [`ErrorKind::Lost`].
    #[must_use]
    pub const fn is_lost(&self) -> bool {
        matches!(self.health, Health::Lost(_))
    }

    /// Changes the state, and recovers the device if it refuses.
    ///
    /// On success the device is in `new`. The device holds a data fd that came with the change until the
    /// session
    /// ends; the fd can be lent. Leaving the saving states, or RESUMING, closes the held fd, so every borrower
    /// must have dropped it.
    ///
    /// On failure the device is in `recover`, or, if it refused that too, it was reset. [`Device::state`] says
    /// which. After a failure only a reset leaves RESUMING, so a caller that wants to go on with an incomplete
    /// load names RESUMING as `recover`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::State`] with the *first* errno. The errno is `EBADF` if a data fd came although one was
    /// held;
    /// the state has then changed, and the new fd is closed. [`ErrorKind::Lost`], [`ErrorKind::Panicked`].
    /// [`ErrorKind::Misuse`] for ERROR, which cannot be requested.
    ///
    /// # Panics
    ///
    /// In a debug build, if the session ends while its data fd is still lent.
    pub fn set_state(&mut self, new: DeviceState, recover: impl Into<Recover>) -> Result<()> {
        let recover = recover.into();
        let asked = recover.state().unwrap_or(DeviceState::Error);
        trace::migration_set_state(&self.id, new, asked);

        let from = self.state;
        match &self.health {
            Health::Good => {}
            Health::Lost(error) => return Err(error.clone()),
            Health::Panicked(error) => {
                let error = error.clone().between(from, new);
                self.reset_or_lose(error)?;
            }
        }
        if new == self.state {
            return Ok(());
        }
        if new == DeviceState::Error {
            let error =
                Error::misuse(Phase::State, "ERROR is no state to ask for").on_device(&self.id);
            return Err(error.between(from, new));
        }
        match self.request(new) {
            Ok(fd) => {
                self.remember(new);
                self.keep(fd).map_err(|error| error.between(from, new))?;
                match &self.health {
                    Health::Good => Ok(()),
                    Health::Panicked(error) | Health::Lost(error) => {
                        Err(error.clone().between(from, new))
                    }
                }
            }
            Err(failure) => {
                let error = self.wrap(failure, ErrorKind::State, Phase::State);
                Err(self.recover(recover, error.between(from, new)))
            }
        }
    }

    /// Resets the device. Afterwards it is RUNNING, its content is lost, and its data fd is closed.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Lost`], now and from now on, if the reset fails.
    ///
    /// # Panics
    ///
    /// In a debug build, if the data fd is still lent.
    pub fn reset(&mut self) -> Result<()> {
        if let Health::Lost(error) = &self.health {
            return Err(error.clone());
        }
        let from = self.state;
        match self.call(|inner| inner.reset()) {
            Ok(()) => {
                self.start_anew();
                Ok(())
            }
            Err(failure) => {
                let error = self.wrap(failure, ErrorKind::Lost, Phase::State);
                Err(self.lose(error.between(from, DeviceState::Running)))
            }
        }
    }

    /// Lends the session's data fd, for transfers on other threads. The borrower must drop the fd before the
    /// session ends.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Device`] with `EBADF` if the device holds no data fd in this state; [`ErrorKind::Lost`],
    /// [`ErrorKind::Panicked`].
    pub fn lend(&self) -> Result<Fd> {
        self.usable()?;
        self.held(Phase::State).map(Arc::clone)
    }

    /// Whether the data fd is still lent.
    #[must_use]
    pub fn is_lent(&self) -> bool {
        self.fd.as_ref().is_some_and(|fd| Arc::strong_count(fd) > 1)
    }

    /// Returns the driver's estimate of how many bytes STOP_COPY would give now. Never allocate by this number,
    /// and add such numbers up only through [`stop_copy_estimate`](estimate::stop_copy_estimate).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Device`], [`ErrorKind::Lost`], [`ErrorKind::Panicked`].
    pub fn data_size(&mut self) -> Result<u64> {
        self.query(Phase::State, |inner| inner.data_size())
    }

    /// Returns the driver's estimate of what the data fd still has to give in PRE_COPY.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Device`]: `EINVAL` outside the PRE_COPY states, `EBADF` without a data fd.
    /// [`ErrorKind::Lost`], [`ErrorKind::Panicked`].
    pub fn precopy_info(&mut self) -> Result<PrecopyInfo> {
        let fd = self.lend()?;
        self.query(Phase::State, |inner| inner.precopy_info(fd.as_fd()))
    }

    /// Opts in to [`PrecopyInfo::reinit`]. Returns `false` if the kernel does not have it. The device is asked once;
    /// [`MigratableDevice::new`](crate::migration::MigratableDevice::new) does so.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Device`] for anything but `ENOTTY`; [`ErrorKind::Lost`],
    /// [`ErrorKind::Panicked`].
    pub fn enable_precopy_info_v2(&mut self) -> Result<bool> {
        if let Some(known) = self.precopy_info_v2 {
            return Ok(known);
        }
        let enabled = self.query(Phase::Setup, |inner| match inner.enable_precopy_info_v2() {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(Errno::ENOTTY as i32) => Ok(false),
            Err(error) => Err(error),
        });
        self.precopy_info_v2 = Some(matches!(enabled, Ok(true)));
        enabled
    }

    /// Reads once from the data fd in a PRE_COPY state, on the caller's thread. 0 means "nothing for now": the
    /// driver returned `ENOMSG`, or 0. May block for as long as the driver does.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Misuse`] outside of the PRE_COPY states, in which 0 would mean something else;
    /// [`ErrorKind::Device`], [`ErrorKind::Lost`], [`ErrorKind::Panicked`].
    pub fn read_precopy(&mut self, buffer: &mut [u8]) -> Result<usize> {
        self.read_precopy_once(buffer).map(|read| read.unwrap_or(0))
    }

    /// As [`Device::read_precopy`]; `None` stands for `ENOMSG`.
    pub(crate) fn read_precopy_once(&mut self, buffer: &mut [u8]) -> Result<Option<usize>> {
        let fd = self.lend()?;
        if !self.state.is_precopy() {
            return Err(Error::misuse(Phase::Save, "not in a PRE_COPY state").on_device(&self.id));
        }
        self.query(Phase::Save, |inner| {
            loop {
                match inner.read_precopy(fd.as_fd(), buffer) {
                    Err(error) if error.raw_os_error() == Some(Errno::ENOMSG as i32) => {
                        return Ok(None);
                    }
                    // Ends when the driver answers: a signal came before it moved a byte.
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    result => return result.map(Some),
                }
            }
        })
    }

    /// Reads once from the data fd in STOP_COPY, on the caller's thread. 0 is the end of the state. May block
    /// for as long as the driver does.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Misuse`] in another state; [`ErrorKind::Device`], [`ErrorKind::Lost`],
    /// [`ErrorKind::Panicked`].
    pub fn read_stop_copy(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let fd = self.lend()?;
        if self.state != DeviceState::StopCopy {
            return Err(Error::misuse(Phase::Save, "not in STOP_COPY").on_device(&self.id));
        }
        loop {
            match nix::unistd::read(&fd, buffer) {
                Ok(count) => return Ok(count),
                // Ends when the driver answers: a signal came before it moved a byte.
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(self.error(Phase::Save).caused_by(errno)),
            }
        }
    }

    /// Writes all of `bytes` to the data fd in RESUMING, on the caller's thread. May block for as long as the
    /// driver does.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Misuse`] in another state; [`ErrorKind::Device`], final for the session;
    /// [`ErrorKind::Lost`], [`ErrorKind::Panicked`].
    pub fn write_resuming(&mut self, bytes: &[u8]) -> Result<()> {
        let fd = self.lend()?;
        if self.state != DeviceState::Resuming {
            return Err(Error::misuse(Phase::Section, "not in RESUMING").on_device(&self.id));
        }
        write_all(&fd, bytes).map_err(|error| self.error(Phase::Section).caused_by(error))
    }

    /// Writes the device's config through the VMM's callback. Returns the number of bytes.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Device`] with the callback's error, in [`Phase::Config`]; [`ErrorKind::Lost`],
    /// [`ErrorKind::Panicked`].
    pub fn save_config(&mut self, writer: &mut dyn Write) -> Result<u64> {
        trace::save_device_config_state(&self.id);
        let mut writer = Counted::new(writer);
        self.query(Phase::Config, |inner| inner.save_config(&mut writer))?;
        Ok(writer.count)
    }

    /// Loads the device's config through the VMM's callback. Returns the number of bytes that the callback
    /// took; the caller judges whether those were all.
    ///
    /// # Errors
    ///
    /// As for [`Device::save_config`].
    pub fn load_config(&mut self, reader: &mut dyn Read) -> Result<u64> {
        trace::load_device_config_state_start(&self.id);
        let mut reader = Counted::new(reader);
        self.query(Phase::Config, |inner| inner.load_config(&mut reader))?;
        trace::load_device_config_state_end(&self.id);
        Ok(reader.count)
    }

    /// Gives the VMM its device back, in its current state. Closes the data fd.
    #[must_use = "this is the VMM's device"]
    pub fn into_inner(self) -> Box<dyn MigrationDevice> {
        let inner = self.inner.into_inner();
        inner.unwrap_or_else(PoisonError::into_inner)
    }

    /// SET, with the event that goes before the slowest of them.
    fn request(&mut self, new: DeviceState) -> Result<Option<OwnedFd>, Failure> {
        let events = self.events;
        self.call(|inner| {
            if events && new == DeviceState::PreCopyP2p {
                inner.event(StateEvent::PreCopyP2pPrepare);
            }
            inner.set_state(new)
        })
    }

    /// Takes the device from wherever a refused SET has left it to a state that it can be used in.
    /// Gives the error to return: the first, or that the device is lost.
    fn recover(&mut self, recover: Recover, first: Error) -> Error {
        // A device whose SET has panicked is not asked where it stands: it is reset.
        if matches!(self.health, Health::Good) {
            match self.call(|inner| inner.state()) {
                Ok(state) => {
                    self.remember(state);
                    if let Some(state) = recover.state() {
                        match self.request(state) {
                            Ok(fd) => {
                                drop(fd); // a session that nobody asked for
                                self.remember(state);
                                return first;
                            }
                            Err(failure) => {
                                trace::recovery_failed(&self.id, "recover", &failure);
                            }
                        }
                    }
                }
                Err(failure) => trace::recovery_failed(&self.id, "get", &failure),
            }
        }
        match self.reset_or_lose(first.clone()) {
            Ok(()) => first,
            Err(lost) => lost,
        }
    }

    /// Resets the device because of `first`. Where that fails the device is lost, and the error
    /// says so with the errno of `first`.
    fn reset_or_lose(&mut self, first: Error) -> Result<()> {
        match self.call(|inner| inner.reset()) {
            Ok(()) => {
                self.start_anew();
                Ok(())
            }
            Err(failure) => {
                trace::recovery_failed(&self.id, "reset", &failure);
                Err(self.lose(first.with_kind(ErrorKind::Lost)))
            }
        }
    }

    /// After a reset that succeeded.
    fn start_anew(&mut self) {
        self.health = Health::Good;
        self.close();
        self.rest.was_reset();
        self.remember(DeviceState::Running);
    }

    /// After a reset that failed.
    fn lose(&mut self, error: Error) -> Error {
        self.close();
        self.rest.was_lost();
        self.health = Health::Lost(error.clone());
        error
    }

    /// Notes the state that the device is in, and closes the data fd of a session that has ended
    /// by that.
    fn remember(&mut self, state: DeviceState) {
        if state == self.state {
            return;
        }
        let ended = if self.state.is_saving() {
            !state.is_saving()
        } else {
            self.state == DeviceState::Resuming
        };
        if ended {
            self.close();
        }
        self.state = state;
        self.rest.entered(state);
        trace::migration_set_device_state(&self.id, state);
        if self.events {
            // A panic is noted in `health`, and that is all: the state *has* changed.
            let _ = self.call(|inner| {
                inner.event(StateEvent::State(state));
                Ok(())
            });
        }
    }

    /// Keeps the data fd of a session that has begun.
    fn keep(&mut self, fd: Option<OwnedFd>) -> Result<()> {
        let Some(fd) = fd else { return Ok(()) };
        if self.fd.is_some() {
            drop(fd);
            // Two sessions at once: "data_fd out of sync".
            let error = Error::new(ErrorKind::State, Phase::State).on_device(&self.id);
            return Err(error.caused_by(Errno::EBADF));
        }
        self.fd = Some(Arc::new(fd));
        Ok(())
    }

    /// Lets go of the data fd of a session that is over.
    fn close(&mut self) {
        if let Some(fd) = self.fd.take() {
            debug_assert_eq!(
                Arc::strong_count(&fd),
                1,
                "the session of {} ends with its data fd still lent",
                self.id
            );
        }
    }

    fn held(&self, phase: Phase) -> Result<&Fd> {
        self.fd
            .as_ref()
            .ok_or_else(|| self.error(phase).caused_by(Errno::EBADF))
    }

    fn usable(&self) -> Result<()> {
        match &self.health {
            Health::Good => Ok(()),
            Health::Panicked(error) | Health::Lost(error) => Err(error.clone()),
        }
    }

    fn error(&self, phase: Phase) -> Error {
        Error::new(ErrorKind::Device, phase).on_device(&self.id)
    }

    /// A call that changes no state. A panic in it does not either: where the device stands is
    /// known, and a guest's running device is not reset because a query went wrong.
    fn query<R>(
        &mut self,
        phase: Phase,
        f: impl FnOnce(&mut dyn MigrationDevice) -> io::Result<R>,
    ) -> Result<R> {
        self.usable()?;
        let result = self.call(f);
        self.health = Health::Good;
        result.map_err(|failure| self.wrap(failure, ErrorKind::Device, phase))
    }

    fn wrap(&self, failure: Failure, kind: ErrorKind, phase: Phase) -> Error {
        match failure {
            Failure::Refused(source) => Error::new(kind, phase)
                .on_device(&self.id)
                .caused_by(source),
            Failure::Panicked(error) if kind == ErrorKind::Lost => {
                error.with_kind(kind).in_phase(phase)
            }
            Failure::Panicked(error) => error.in_phase(phase),
        }
    }

    /// The one way into the VMM's code: no panic comes out of here.
    fn call<R>(
        &mut self,
        f: impl FnOnce(&mut dyn MigrationDevice) -> io::Result<R>,
    ) -> Result<R, Failure> {
        // What a panic leaves half done is behind `inner`, and `health` keeps everybody out of
        // there until it has been reset.
        let inner = self.inner.get_mut().unwrap_or_else(PoisonError::into_inner);
        match catch_unwind(AssertUnwindSafe(|| f(&mut **inner))) {
            Ok(result) => result.map_err(Failure::Refused),
            Err(payload) => {
                let error = Error::new(ErrorKind::Panicked, Phase::State)
                    .on_device(&self.id)
                    .caused_by(io::Error::other(message(&*payload)));
                self.health = Health::Panicked(error.clone());
                Err(Failure::Panicked(error))
            }
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("id", &self.id)
            .field("flags", &self.flags)
            .field("state", &self.state)
            .field("fd", &self.fd)
            .field("lost", &self.is_lost())
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(error) => error.fmt(f),
            Self::Panicked(error) => error.fmt(f),
        }
    }
}

/// Writes all of `bytes` to a data fd. Short writes go on where they stopped; an errno is final.
pub(crate) fn write_all(fd: &Fd, bytes: &[u8]) -> io::Result<()> {
    let mut rest = bytes;
    // Each round writes a byte at least, or ends.
    while !rest.is_empty() {
        match nix::unistd::write(fd, rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => rest = &rest[count..],
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// What a panic had to say.
fn message(payload: &(dyn Any + Send)) -> String {
    payload
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a text".into())
}

/// A reader or a writer that counts.
struct Counted<'a, T: ?Sized> {
    inner: &'a mut T,
    count: u64,
}

impl<'a, T: ?Sized> Counted<'a, T> {
    const fn new(inner: &'a mut T) -> Self {
        Self { inner, count: 0 }
    }
}

impl Read for Counted<'_, dyn Read + '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.count += n as u64;
        Ok(n)
    }
}

impl Write for Counted<'_, dyn Write + '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.count += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
