//! A whole migration on its destination: set-up, sections, the loaded devices, the VM's start.
//!
//! ```text
//!   new ─▶ add_device… add_channel… ─▶ setup ─▶ load_state… switchover_start ─▶ finish
//!                                                                                │
//!                                                 join, abort ◀─ start_vm ◀─ Loaded
//! ```
//!
//! Longer than other files: one handle, and most of it is the header's text.

#![expect(unsafe_code, reason = "the functions' names are exported")]

use std::{
    ffi::{c_char, c_int, c_void},
    mem::{self, MaybeUninit},
    os::fd::{AsFd, AsRawFd},
    sync::{Arc, Mutex, RwLock},
};

use vfio_migration::{
    Channel, DeviceId, Error, ErrorKind, Phase, Result, Stats,
    migration::{Incoming, Loaded, MigratableDevice, SendSwitchoverAck, vm},
    section::{Piece, Tag},
};

use crate::{
    border::{alone, change, given, guard, hand_out, lock, look, misuse, quiet, unlocked},
    callbacks::{Call, Input, Owned, Source},
    cancel::{Cancel, CancellerHandle},
    channel::ChannelHandle,
    device::{Borrowed, DeviceHandle, device_id},
    failure::{Code, ErrorHandle},
    load::builder,
    publisher::PublisherHandle,
    settings::{Chosen, SettingsHandle},
    stats::StatsHandle,
};

const BUSY: &str = "incoming: another thread sets it up, or ends it";

/// A migration before its set-up.
#[derive(Default)]
struct Before {
    devices: Vec<MigratableDevice>,
    channels: Vec<Channel>,
    approve: Option<SendSwitchoverAck>,
}

/// A device and a channel are one thread's at a time, so they stand behind locks of their own.
enum Stage {
    Before(Mutex<Before>),
    Running(Box<Incoming>),
    Loaded(Box<Mutex<Loaded>>),
    Over(Option<Box<Stats>>),
}

fn turn() -> Error {
    misuse("incoming: it is not this call's turn")
}

impl Stage {
    fn before(&mut self) -> Result<&mut Before> {
        match self {
            Self::Before(before) => Ok(alone(before)),
            _ => Err(turn()),
        }
    }

    fn take(&mut self) -> Self {
        mem::replace(self, Self::Over(None))
    }
}

/// What ended a section's body.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub enum PieceEnd {
    /// The end tag.
    EndOfState = 0,
    /// A START's.
    Setup = 1,
    /// A START's, where PRE_COPY data comes over the channels.
    SetupOverChannels = 2,
    /// A config, and the end tag.
    Config = 3,
    /// The word that the initial data has been sent.
    InitDataSent = 4,
    /// The word that the config may be loaded.
    ConfigLoadReady = 5,
}

/// What a section's body held.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Body {
    /// Bytes of data.
    pub data_len: u64,
    /// What ended it.
    pub end: PieceEnd,
}

impl From<Piece> for Body {
    fn from(piece: Piece) -> Self {
        Self {
            data_len: piece.data_len,
            end: match piece.end {
                Tag::Setup => PieceEnd::Setup,
                Tag::SetupOverChannels => PieceEnd::SetupOverChannels,
                Tag::Config => PieceEnd::Config,
                Tag::InitDataSent => PieceEnd::InitDataSent,
                Tag::ConfigLoadReady => PieceEnd::ConfigLoadReady,
                _ => PieceEnd::EndOfState,
            },
        }
    }
}

/// The destination's side of a migration of a VM's devices. One thread reads the main channel and walks it through its
/// steps. Meanwhile any thread may add channels, look at counters, and cancel. Free it with `vfm_incoming_free`.
pub struct IncomingHandle {
    chosen: Chosen,
    cancel: Arc<Cancel>,
    stage: RwLock<Stage>,
    borrowed: Mutex<Borrowed>,
}

impl IncomingHandle {
    fn give_back(&self, devices: Vec<MigratableDevice>) {
        let mut borrowed = lock(&self.borrowed);
        borrowed.give_all_back(devices);
        borrowed.lose_the_rest();
    }

    pub(crate) fn ids(&self) -> Vec<DeviceId> {
        lock(&self.borrowed).ids().cloned().collect()
    }

    /// Does something while the migration comes in.
    pub(crate) fn running<T>(&self, work: impl FnOnce(&Incoming) -> Result<T>) -> Result<T> {
        match &*look(&self.stage, BUSY)? {
            Stage::Running(incoming) => {
                if let Some(reason) = self.cancel.reason() {
                    // Where there is no session nothing else tells it.
                    incoming.fail(reason);
                }
                work(incoming)
            }
            _ => Err(turn()),
        }
    }

    fn abort(&self, stage: &mut Stage) {
        let devices = match stage.take() {
            Stage::Before(before) => unlocked(before).devices,
            Stage::Running(incoming) => incoming.abort(),
            Stage::Loaded(loaded) => unlocked(*loaded).abort(),
            over @ Stage::Over(_) => {
                *stage = over;
                return;
            }
        };
        self.give_back(devices);
    }
}

impl Drop for IncomingHandle {
    fn drop(&mut self) {
        let mut stage = change(&self.stage).take();
        self.abort(&mut stage);
    }
}

/// Makes the destination's side of a migration. `settings` is copied. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_incoming_new(
    settings: Option<&SettingsHandle>,
    incoming: Option<&mut MaybeUninit<*mut IncomingHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let chosen = given(settings, "settings: NULL")?.chosen();
        let incoming = given(incoming, "incoming: NULL")?;
        let made = IncomingHandle {
            chosen,
            cancel: Arc::default(),
            stage: RwLock::new(Stage::Before(Mutex::default())),
            borrowed: Mutex::default(),
        };
        hand_out(incoming, made);
        Ok(())
    })
}

/// Adds a device, before the set-up. The migration borrows it until its end. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_incoming_add_device(
    incoming: Option<&IncomingHandle>,
    device: Option<&DeviceHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let incoming = given(incoming, "incoming: NULL")?;
        let device = given(device, "device: NULL")?;
        let mut stage = change(&incoming.stage);
        let before = stage.before()?;
        before.devices.push(lock(&incoming.borrowed).take(device)?);
        Ok(())
    })
}

/// Adds a channel, before the set-up or after it. Where no device uses the channels it is only closed. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_incoming_add_channel(
    incoming: Option<&IncomingHandle>,
    channel: Option<&ChannelHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let incoming = given(incoming, "incoming: NULL")?;
        let channel = given(channel, "channel: NULL")?;
        if let Stage::Running(running) = &*look(&incoming.stage, BUSY)? {
            return running.add_channel(channel.take()?);
        }
        match &mut *change(&incoming.stage) {
            Stage::Before(before) => alone(before).channels.push(channel.take()?),
            Stage::Running(running) => running.add_channel(channel.take()?)?,
            _ => return Err(turn()),
        }
        Ok(())
    })
}

/// Sets what sends a switchover ack on the return path (`vfm_reply_write`): 0, or a negative errno. The thread that loads
/// sections calls it. Needed with VFM_SETTING_SWITCHOVER_ACK, before the set-up. `release` is called when the library is
/// done with `opaque`, also where this call fails; it may be NULL. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_incoming_send_ack_with(
    incoming: Option<&IncomingHandle>,
    send: Option<unsafe extern "C" fn(opaque: *mut c_void) -> c_int>,
    opaque: *mut c_void,
    release: Option<unsafe extern "C" fn(opaque: *mut c_void)>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let owned = Owned::new(opaque, release);
        let incoming = given(incoming, "incoming: NULL")?;
        let call = Call::new(given(send, "send: NULL")?, owned);
        let lost = |error| Error::new(ErrorKind::Channel, Phase::Section).caused_by(error);
        let mut stage = change(&incoming.stage);
        stage.before()?.approve = Some(Box::new(move || call.call().map_err(lost)));
        Ok(())
    })
}

/// Sets the devices up: all go to RESUMING, all at once, and the channels are read from now on. Where this fails the
/// migration is over, and the devices are back, as they were. Waits for the slowest driver.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_incoming_setup(
    incoming: Option<&IncomingHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let incoming = given(incoming, "incoming: NULL")?;
        let mut stage = change(&incoming.stage);
        let before = stage.before()?;
        let acks = incoming.chosen.capabilities.switchover_ack;
        if acks != vfio_migration::migration::SwitchoverAck::Off && before.approve.is_none() {
            return Err(misuse("incoming: nothing sends the switchover ack"));
        }
        incoming.cancel.check()?;
        let Stage::Before(before) = stage.take() else {
            return Err(turn());
        };
        let before = unlocked(before);
        let session = builder(&incoming.chosen, before.channels);
        let approve = before.approve.unwrap_or_else(|| Box::new(|| Ok(())));
        let capabilities = &incoming.chosen.capabilities;
        match Incoming::setup(before.devices, capabilities, session, approve) {
            Ok(running) => {
                if let Some(session) = running.session() {
                    incoming.cancel.aim(session.canceller());
                }
                *stage = Stage::Running(Box::new(running));
                Ok(())
            }
            Err(failed) => {
                let (error, devices) = failed.into_parts();
                incoming.give_back(devices);
                Err(error)
            }
        }
    })
}

/// Loads the body of a section of the device with this name, up to the tag that ends it and not a byte more: for a VMM
/// that reads its main channel itself. `body` may be NULL. A failure fails the migration. Waits for the main channel and
/// the driver. The thread that reads the main channel.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_incoming_load_state(
    incoming: Option<&IncomingHandle>,
    idstr: *const c_char,
    instance: u32,
    input: Input,
    body: Option<&mut MaybeUninit<Body>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let incoming = given(incoming, "incoming: NULL")?;
        let id = device_id(idstr, instance)?;
        let mut source = Source::new(input)?;
        let piece = incoming.running(|it| it.device(&id)?.load_state(&mut source))?;
        if let Some(body) = body {
            body.write(piece.into());
        }
        Ok(())
    })
}

/// The main channel's command SWITCHOVER_START has come: from now on packets are written to the devices. The thread that
/// reads the main channel.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_incoming_switchover_start(
    incoming: Option<&IncomingHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        given(incoming, "incoming: NULL")?.running(Incoming::switchover_start)
    })
}

/// Makes a publisher, for packets that do not come over the channels: see `struct vfm_publisher`. Refused where no
/// device uses the channels. It belongs to the calling thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_incoming_publisher(
    incoming: Option<&IncomingHandle>,
    publisher: Option<&mut MaybeUninit<*mut PublisherHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let incoming = given(incoming, "incoming: NULL")?;
        let publisher = given(publisher, "publisher: NULL")?;
        let made = incoming.running(|it| {
            let session = it
                .session()
                .ok_or_else(|| misuse("no device uses the channels"));
            Ok(session?.publisher())
        })?;
        hand_out(publisher, PublisherHandle::new(made));
        Ok(())
    })
}

/// No further channel will be added: what is missing then is an error. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_incoming_no_more_channels(
    incoming: Option<&IncomingHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        given(incoming, "incoming: NULL")?.running(|it| {
            if let Some(session) = it.session() {
                session.no_more_channels();
            }
            Ok(())
        })
    })
}

/// Fails the migration for a reason of the caller's, a main channel that broke, say. The first reason counts.
/// `reason` stays the caller's. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_incoming_fail(
    incoming: Option<&IncomingHandle>,
    reason: Option<&ErrorHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let incoming = given(incoming, "incoming: NULL")?;
        let reason = given(reason, "reason: NULL")?.error().clone();
        incoming.cancel.fail(reason);
        Ok(())
    })
}

/// Returns why the migration has failed, if it has: VFM_CODE_OK and no error while it has not. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_incoming_failure(
    incoming: Option<&IncomingHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let incoming = given(incoming, "incoming: NULL")?;
        let failure = match &*look(&incoming.stage, BUSY)? {
            Stage::Running(running) => running.failure(),
            _ => None,
        };
        failure.or(incoming.cancel.reason()).map_or(Ok(()), Err)
    })
}

/// Returns whether every device is loaded, or the migration has failed: then `vfm_incoming_finish` returns soon. Any
/// thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_incoming_is_finished(incoming: Option<&IncomingHandle>) -> bool {
    quiet(false, || {
        let Some(stage) = incoming.and_then(|it| look(&it.stage, BUSY).ok()) else {
            return false;
        };
        match &*stage {
            Stage::Before(_) => false,
            Stage::Running(running) => running.is_finished(),
            Stage::Loaded(_) | Stage::Over(_) => true,
        }
    })
}

/// Returns the eventfd of the session that receives, between `vfm_incoming_setup` and `…_finish`, where a device uses
/// the channels; otherwise -1. As `vfm_load_eventfd`. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_incoming_eventfd(incoming: Option<&IncomingHandle>) -> c_int {
    quiet(-1, || {
        let fd = |it: &Incoming| Ok(it.session().map_or(-1, |it| it.as_fd().as_raw_fd()));
        let found = incoming.map(|it| it.running(fd));
        found.and_then(Result::ok).unwrap_or(-1)
    })
}

/// Makes a copy of the counters as they are now, from the set-up on. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_incoming_stats(
    incoming: Option<&IncomingHandle>,
    stats: Option<&mut MaybeUninit<*mut StatsHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let incoming = given(incoming, "incoming: NULL")?;
        let stats = given(stats, "stats: NULL")?;
        let now = match &*look(&incoming.stage, BUSY)? {
            Stage::Running(running) => running.stats(),
            Stage::Loaded(loaded) => lock(loaded).stats(),
            Stage::Over(Some(last)) => (**last).clone(),
            _ => return Err(turn()),
        };
        hand_out(stats, StatsHandle::new(now));
        Ok(())
    })
}

/// Makes a handle that cancels the migration until it is loaded. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_incoming_canceller(
    incoming: Option<&IncomingHandle>,
    canceller: Option<&mut MaybeUninit<*mut CancellerHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let incoming = given(incoming, "incoming: NULL")?;
        let canceller = given(canceller, "canceller: NULL")?;
        hand_out(canceller, CancellerHandle(incoming.cancel.clone()));
        Ok(())
    })
}

/// Waits until every device is loaded: call it when the main channel has been read to its end. On success start the
/// VM, with `vfm_incoming_start_vm`. On failure the devices are back, reset, as at set-up, and the verdict to the source
/// is a failure.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_incoming_finish(
    incoming: Option<&IncomingHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let incoming = given(incoming, "incoming: NULL")?;
        let mut stage = change(&incoming.stage);
        let running = match stage.take() {
            Stage::Running(running) => running,
            other => {
                *stage = other;
                return Err(turn());
            }
        };
        if let Some(reason) = incoming.cancel.reason() {
            running.fail(reason);
        }
        match running.finish() {
            Ok(loaded) => {
                *stage = Stage::Loaded(Box::new(Mutex::new(loaded)));
                Ok(())
            }
            Err(failed) => {
                let (error, devices) = failed.into_parts();
                incoming.give_back(devices);
                Err(error)
            }
        }
    })
}

/// Starts the devices, in which the drivers check what was loaded. Send the verdict after it: the VM runs here where this
/// succeeds. Where it fails every device has been reset and stopped: `vfm_incoming_abort` gives them back. Waits for the
/// slowest driver.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_incoming_start_vm(
    incoming: Option<&IncomingHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let incoming = given(incoming, "incoming: NULL")?;
        match &mut *change(&incoming.stage) {
            Stage::Loaded(loaded) => vm::start(alone(loaded).devices_mut()),
            _ => Err(turn()),
        }
    })
}

/// Ends a migration that has succeeded, when the verdict has been sent, and gives the devices back. An error is a
/// channel's; the devices are loaded nevertheless. Waits for the channels' end, within VFM_SETTING_NO_PROGRESS.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_incoming_join(
    incoming: Option<&IncomingHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let incoming = given(incoming, "incoming: NULL")?;
        let mut stage = change(&incoming.stage);
        let loaded = match stage.take() {
            Stage::Loaded(loaded) => unlocked(*loaded),
            other => {
                *stage = other;
                return Err(turn());
            }
        };
        *stage = Stage::Over(Some(Box::new(loaded.stats())));
        match loaded.join() {
            Ok(devices) => {
                incoming.give_back(devices);
                Ok(())
            }
            Err(failed) => {
                let (error, devices) = failed.into_parts();
                incoming.give_back(devices);
                Err(error)
            }
        }
    })
}

/// Ends the migration at any step, and gives the devices back, reset: as at set-up, or stopped where they were loaded
/// already. The verdict to the source is a failure. Waits for what is under way, within the grace time, and the drivers.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_incoming_abort(
    incoming: Option<&IncomingHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let incoming = given(incoming, "incoming: NULL")?;
        incoming.abort(&mut change(&incoming.stage));
        Ok(())
    })
}

/// Frees a migration. One that has not been joined is aborted. NULL is nothing. No other thread may be in a call with
/// it.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_incoming_free(incoming: Option<Box<IncomingHandle>>) {
    quiet((), || drop(incoming));
}
