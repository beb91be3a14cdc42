//! A simulated device: the kernel's state machine, real data fds, and faults on demand.
//!
//! ```text
//!                        set_state                          read, write
//!   Device ── MigrationDevice ──▶ SimDevice ── session ──▶ data fd ◀──── lane, anybody
//!                                    │                        ▲
//!                                    │ what happened          │ the device's thread
//!                                    ▼                        │
//!   a test ◀──────────────────── SimHandle ── release, dirty ─┘
//! ```
//!
//! The state is generated from a seed while it is read, and of a written state only the digest is kept. So
//! a state can be many gigabytes long and move as fast as a pipe does.
//!
//! | [`Stream`] | while saving | while loading |
//! |---|---|---|
//! | `Pipe` | a pipe, fed by the device's thread | a pipe, drained by it |
//! | `Socket` | the same with a stream socket | the same |
//! | `PlainWrite` | as `Pipe` | `/proc/self/mem` over memory of the device's: a plain write, no non-blocking mode, errors of its own, as on a driver's file |
//! | `Memfd` | a memory file, filled before | a memory file, read at the end |
//!
//! # What differs from a kernel's device
//!
//! * A pipe cannot return `ENOMSG`. In PRE_COPY [`MigrationDevice::read_precopy`] returns it. A plain read
//!   would wait there for more, and would not be counted.
//! * After the state has been left, a kernel's fd returns `ENODEV`. A pipe or socket ends, or returns `EPIPE`.
//!   `PlainWrite` returns `EIO`. A memory file goes on as if nothing had happened.
//! * A write beyond the state is refused late by a `Pipe` and a `Socket` (they take what fits in their
//!   buffers). A `Memfd` refuses it only at the change to STOP.
//!
//! # Threads
//!
//! One thread makes the device's calls, as [`MigrationDevice`] requires. A session over a pipe or a socket
//! has one thread of its own, which ends with the session. Any thread may use a [`SimHandle`] at any time.
//! The waits are in the sessions; the only wait here is a fault's delay, which the clock ends.

mod config;
mod control;
mod faults;
mod handle;
mod image;
mod mapping;
mod session;
mod worker;

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read, Write},
    os::fd::{BorrowedFd, OwnedFd},
    panic::resume_unwind,
    sync::{Arc, Mutex, MutexGuard},
    thread,
    time::Instant,
};

use nix::errno::Errno;

pub use self::{
    config::{SimConfig, Stream},
    faults::{CallFault, Callback, Fault, Faults, On, Stall, TransitionFault, Which},
    handle::{Change, SimHandle},
    image::Image,
};
use self::{
    control::Loaded,
    handle::{Shared, lock},
    image::{mix, part},
    session::{Room, Session},
};
use super::{MigrationDevice, StateEvent, estimate::MAX_DATA_SIZE, machine};
use crate::state::{DeviceState, MigrationFlags, PrecopyInfo};

/// The longest config that a simulated device loads, in bytes.
const MAX_CONFIG_LEN: u32 = 16 << 20;

/// The most that a pipe or socket is asked to hold.
const MAX_BUFFER: usize = 1 << 30;

/// A simulated VFIO device. See the [module](self).
///
/// Dropping it ends its session and the session's thread.
///
/// ```
/// use std::{fs::File, io};
/// use vfio_migration::{Device, DeviceId, DeviceState, sim::{SimConfig, SimDevice}};
///
/// let source = SimDevice::new(SimConfig { seed: 1, ..SimConfig::default() })?;
/// let destination = SimDevice::new(SimConfig { seed: 2, ..SimConfig::default() })?;
/// let (saved, loaded) = (source.handle(), destination.handle());
/// let mut source = Device::new(DeviceId::new("source", 0)?, Box::new(source))?;
/// let mut destination = Device::new(DeviceId::new("destination", 0)?, Box::new(destination))?;
///
/// source.set_state(DeviceState::StopCopy, DeviceState::Stop)?;
/// destination.set_state(DeviceState::Resuming, DeviceState::Running)?;
/// let mut from = File::from(source.lend()?.try_clone()?);
/// let mut to = File::from(destination.lend()?.try_clone()?);
/// assert_eq!(io::copy(&mut from, &mut to)?, 1 << 20);
///
/// // The device checks here that it has got the whole state.
/// destination.set_state(DeviceState::Stop, DeviceState::Error)?;
/// assert_eq!(loaded.digest(), saved.digest());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "dropping it ends its session"]
pub struct SimDevice {
    config: SimConfig,
    session: Option<Session>,
    /// The whole image in a file, where the stream is a memory file.
    filled: Option<(Image, File)>,
    /// For the next load.
    room: Option<Room>,
    /// How many changes have matched each of the faults for them.
    matched: Vec<u64>,
    shared: Arc<Mutex<Shared>>,
}

impl SimDevice {
    /// Makes a device. No thread is started and no file opened before its first session.
    ///
    /// # Errors
    ///
    /// `EINVAL` where the config asks for what cannot be: a state that the flags do not have, or
    /// one in the middle of a session; a length above [`MAX_DATA_SIZE`], a config above 16 MiB, a
    /// buffer above 1 GiB, pieces of nothing.
    pub fn new(config: SimConfig) -> io::Result<Self> {
        let state = config.state;
        if !config.flags.supports(state) || state.is_saving() || state == DeviceState::Resuming {
            return Err(Errno::EINVAL.into());
        }
        if config.len > MAX_DATA_SIZE
            || config.precopy_initial > MAX_DATA_SIZE
            || config.config_len > MAX_CONFIG_LEN
            || config.buffer.is_some_and(|len| len > MAX_BUFFER)
            || config.piece == Some(0)
        {
            return Err(Errno::EINVAL.into());
        }
        // Not the same as the image's words, which begin at 0.
        let config_bytes = (0..u64::from(config.config_len))
            .map(|index| mix(config.seed, u64::MAX - index).to_le_bytes()[0])
            .collect();
        let shared = Shared {
            state,
            image: config.image(),
            digest: None,
            config: config_bytes,
            bytes: 0,
            control: None,
            initial_left: 0,
            dirty_left: 0,
            precopy_read: 0,
            precopy_v2: false,
            reinit: false,
            calls: HashMap::new(),
            changes: Vec::new(),
            events: Vec::new(),
        };
        Ok(Self {
            session: None,
            filled: None,
            room: None,
            matched: vec![0; config.faults.transitions.len()],
            shared: Arc::new(Mutex::new(shared)),
            config,
        })
    }

    /// Something to look at the device with, when it has moved into a `Device`.
    #[must_use]
    pub fn handle(&self) -> SimHandle {
        SimHandle(Arc::clone(&self.shared))
    }

    /// Fills the memory file of the next save now, for a bench that does not want to measure it.
    /// Without effect unless the stream is a memory file.
    ///
    /// # Errors
    ///
    /// The kernel's, where it has no memory.
    pub fn prefill_save(&mut self) -> io::Result<()> {
        if self.config.stream != Stream::Memfd {
            return Ok(());
        }
        let image = self.shared().image;
        if self.filled.as_ref().is_none_or(|(of, _)| *of != image) {
            let len = image.len();
            let len = self.config.faults.fail_at.map_or(len, |at| at.min(len));
            self.filled = None; // not both at once
            self.filled = Some((image, session::filled(image, len)?));
        }
        Ok(())
    }

    /// Gets the memory for the next load now, as much as [`SimConfig::len`] says, for a bench that
    /// does not want to measure page faults. Without effect where the stream is a pipe or a socket.
    ///
    /// # Errors
    ///
    /// The kernel's, where it has no memory.
    pub fn prefill_load(&mut self) -> io::Result<()> {
        self.room = None; // not both at once
        self.room = Some(Room::new(&self.config, true)?);
        Ok(())
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        lock(&self.shared)
    }

    /// Counts a call, and lets it fail where it was told to.
    ///
    /// # Panics
    ///
    /// Where that is what it was told to.
    fn enter(&self, callback: Callback) -> io::Result<()> {
        let index = {
            let mut shared = self.shared();
            let count = shared.calls.entry(callback).or_default();
            *count += 1;
            *count - 1
        };
        let mut faults = self.config.faults.calls.iter();
        match faults.find(|fault| fault.callback == callback && fault.which.matches(index)) {
            None => Ok(()),
            Some(CallFault {
                fault: Fault::Errno(errno),
                ..
            }) => Err(io::Error::from_raw_os_error(*errno)),
            Some(CallFault {
                fault: Fault::Panic,
                ..
            }) => {
                // Without the hook's message: it is no mistake.
                let text = format!("told to panic in {callback:?}, call {index}");
                resume_unwind(Box::new(text))
            }
        }
    }

    /// Refuses a change, or an arc of one, where it was told to.
    fn refuse(&mut self, matches: impl Fn(On) -> bool) -> io::Result<()> {
        let mut refused = None;
        for (fault, matched) in self
            .config
            .faults
            .transitions
            .iter()
            .zip(&mut self.matched)
            .filter(|(fault, _)| matches(fault.on))
        {
            let index = *matched;
            *matched += 1;
            if refused.is_none() && fault.which.matches(index) {
                refused = Some((fault.errno, fault.leaves));
            }
        }
        let Some((errno, leaves)) = refused else {
            return Ok(());
        };
        if let Some(state) = leaves {
            self.arrive(state);
        }
        Err(io::Error::from_raw_os_error(errno))
    }

    /// The kernel's way from one state to another. Where a step fails the device stays before it.
    fn walk(&mut self, from: DeviceState, to: DeviceState) -> io::Result<Option<OwnedFd>> {
        self.refuse(|on| on == On::Any || on == On::Request { from, to })?;
        // A state that the device is in already is nobody's to refuse.
        if from == to {
            return Ok(None);
        }
        let path = machine::path(self.config.flags, from, to).ok_or(Errno::EINVAL)?;
        let mut fd = None;
        let mut here = from;
        for next in path {
            self.refuse(|on| {
                on == On::Arc {
                    from: here,
                    to: next,
                }
            })?;
            for (_, time) in self
                .config
                .faults
                .delays
                .iter()
                .filter(|delay| delay.0 == next)
            {
                thread::sleep(*time);
            }
            // A session that ends on the way takes its fd with it, as the kernel does.
            fd = self.arc(here, next)?.or(fd);
            here = next;
        }
        Ok(fd)
    }

    /// One step of the way.
    fn arc(&mut self, from: DeviceState, to: DeviceState) -> io::Result<Option<OwnedFd>> {
        let mut fd = None;
        if from == DeviceState::Resuming {
            // A state that a fault has put the device in has no session, and nothing was loaded.
            let session = self.session.as_ref().ok_or(Errno::EINVAL)?;
            let Loaded { image, digest } = session.finish_load()?;
            let mut shared = self.shared();
            shared.image = image;
            shared.digest = Some(digest);
        } else if to == DeviceState::Resuming {
            let room = match self.room.take() {
                Some(room) => room,
                None => Room::new(&self.config, false)?,
            };
            let (session, theirs) = Session::load(&self.config, room)?;
            self.begin(session);
            fd = Some(theirs);
        } else if to.is_saving() && !from.is_saving() {
            self.prefill_save()?;
            let image = self.shared().image;
            let limit = if to.is_precopy() {
                self.config.precopy_initial.min(image.len())
            } else {
                image.len()
            };
            let filled = self.filled.as_ref().map(|(_, file)| file);
            let (session, theirs) = Session::save(&self.config, image, limit, filled)?;
            self.begin(session);
            let mut shared = self.shared();
            shared.initial_left = if to.is_precopy() { limit } else { 0 };
            shared.dirty_left = 0;
            shared.precopy_read = 0;
            shared.reinit = false;
            fd = Some(theirs);
        } else if to == DeviceState::StopCopy
            && let Some(session) = &self.session
        {
            session.control().expose(u64::MAX);
        }
        self.arrive(to);
        Ok(fd)
    }

    fn begin(&mut self, session: Session) {
        self.shared().control = Some(Arc::clone(session.control()));
        self.session = Some(session);
    }

    /// Is in `state` from now on. Ends a session that the state is not part of.
    fn arrive(&mut self, state: DeviceState) {
        let before = self.shared().state;
        let goes_on =
            state == before || (state.is_saving() && before.is_saving()) || self.begins(state);
        if !goes_on {
            self.end();
        }
        self.shared().state = state;
    }

    /// Whether the session is one that has just begun for `state`.
    fn begins(&self, state: DeviceState) -> bool {
        let before = self.shared().state;
        let outside = !before.is_saving() && before != DeviceState::Resuming;
        outside && (state.is_saving() || state == DeviceState::Resuming)
    }

    /// Ends the session, and waits for its thread.
    fn end(&mut self) {
        let bytes = self.session.take().map(|session| {
            let control = Arc::clone(session.control());
            drop(session);
            control.bytes()
        });
        let mut shared = self.shared();
        shared.control = None;
        if let Some(bytes) = bytes {
            shared.bytes = bytes;
        }
    }
}

impl Drop for SimDevice {
    fn drop(&mut self) {
        // So that a handle that outlives the device keeps no file of its.
        self.end();
    }
}

impl MigrationDevice for SimDevice {
    fn flags(&self) -> io::Result<MigrationFlags> {
        self.enter(Callback::Flags)?;
        Ok(self.config.flags)
    }

    fn state(&self) -> io::Result<DeviceState> {
        self.enter(Callback::State)?;
        Ok(self.shared().state)
    }

    fn set_state(&mut self, new: DeviceState) -> io::Result<Option<OwnedFd>> {
        let began = Instant::now();
        let from = self.shared().state;
        let result = self
            .enter(Callback::SetState)
            .and_then(|()| self.walk(from, new));
        let mut shared = self.shared();
        let change = Change {
            from,
            asked: new,
            to: shared.state,
            errno: result.as_ref().err().and_then(io::Error::raw_os_error),
            began,
            ended: Instant::now(),
        };
        shared.changes.push(change);
        drop(shared);
        result
    }

    fn reset(&mut self) -> io::Result<()> {
        self.enter(Callback::Reset)?;
        self.end();
        self.shared().state = DeviceState::Running;
        Ok(())
    }

    fn data_size(&self) -> io::Result<u64> {
        self.enter(Callback::DataSize)?;
        let shared = self.shared();
        Ok(self.config.data_size.unwrap_or_else(|| {
            let read = if shared.state.is_saving() {
                shared.precopy_read
            } else {
                0
            };
            shared.image.len() - read
        }))
    }

    fn precopy_info(&self, _fd: BorrowedFd<'_>) -> io::Result<PrecopyInfo> {
        self.enter(Callback::PrecopyInfo)?;
        let mut shared = self.shared();
        if !shared.state.is_precopy() {
            return Err(Errno::EINVAL.into());
        }
        let reinit = std::mem::take(&mut shared.reinit) && shared.precopy_v2;
        Ok(PrecopyInfo {
            initial_bytes: shared.initial_left,
            dirty_bytes: shared.dirty_left,
            reinit,
        })
    }

    fn enable_precopy_info_v2(&mut self) -> io::Result<()> {
        self.enter(Callback::EnablePrecopyInfoV2)?;
        self.shared().precopy_v2 = true;
        Ok(())
    }

    fn read_precopy(&mut self, fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
        self.enter(Callback::ReadPrecopy)?;
        let left = {
            let shared = self.shared();
            shared.initial_left + shared.dirty_left
        };
        if left == 0 {
            return Err(Errno::ENOMSG.into());
        }
        let len = part(left.min(buffer.len() as u64));
        let n = nix::unistd::read(fd, &mut buffer[..len])?;
        let mut shared = self.shared();
        let of_initial = shared.initial_left.min(n as u64);
        shared.initial_left -= of_initial;
        shared.dirty_left -= n as u64 - of_initial;
        shared.precopy_read += n as u64;
        Ok(n)
    }

    fn save_config(&mut self, writer: &mut dyn Write) -> io::Result<()> {
        self.enter(Callback::SaveConfig)?;
        let config = self.shared().config.clone();
        let len = u32::try_from(config.len()).expect("it came from a u32, or fits the maximum");
        writer.write_all(&len.to_be_bytes())?;
        writer.write_all(&config)
    }

    fn load_config(&mut self, reader: &mut dyn Read) -> io::Result<()> {
        self.enter(Callback::LoadConfig)?;
        let mut len = [0; 4];
        reader.read_exact(&mut len)?;
        let len = u32::from_be_bytes(len);
        if len > MAX_CONFIG_LEN {
            return Err(Errno::EINVAL.into());
        }
        let mut config = vec![0; part(len.into())];
        reader.read_exact(&mut config)?;
        self.shared().config = config;
        Ok(())
    }

    fn event(&mut self, event: StateEvent) {
        // An event has no way to fail but a panic.
        let _ = self.enter(Callback::Event);
        self.shared().events.push(event);
    }
}
