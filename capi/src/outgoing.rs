//! A whole migration on its source: set-up, iterations, switchover, and what becomes of the devices.
//!
//! ```text
//!   new ─▶ add_channel… greet ─▶ setup_device… ─▶ iterate… pending ─▶ stop_vm ─▶ begin
//!                                                                                  │ write_state, write_config
//!                                         cleanup, abort, in_doubt ◀─ Saved ◀─ finish
//! ```
//!
//! The engine has a type for each step; here a handle is in one of them, and a call out of its turn is refused. One
//! thread at a time walks it. What other threads may do (acks, cancelling) stands beside its lock.
//!
//! Longer than other files: one handle, and most of it is the header's text.

#![expect(unsafe_code, reason = "the functions' names are exported")]

use std::{
    ffi::c_int,
    mem::{self, MaybeUninit},
    os::fd::{AsFd, AsRawFd},
    sync::{Arc, Mutex, MutexGuard},
};

use vfio_migration::{
    Channel, DeviceId, Error, Result, SaveBuilder, SaveSession, SourceChannels, Stats,
    migration::{MigratableDevice, Outgoing, OutgoingDevice, Pending, Saved, SwitchoverAcks, vm},
};

use crate::{
    border::{given, guard, hand_out, lock, lock_at_once, misuse, quiet},
    callbacks::{Output, Sink},
    cancel::{Cancel, CancellerHandle},
    channel::ChannelHandle,
    device::{Borrowed, DeviceHandle, reason},
    failure::{Code, ErrorHandle},
    main_channel::{MainWriterHandle, section_kind},
    settings::{Chosen, SettingsHandle},
    stats::StatsHandle,
};

/// A device's migration before the switchover, and the channels'.
#[derive(Default)]
struct Before {
    channels: Vec<Channel>,
    greeted: Option<SourceChannels>,
    sources: Vec<OutgoingDevice>,
    session: SaveBuilder,
}

enum Stage {
    Before(Box<Before>),
    Switching(Outgoing),
    Saved(Saved),
    Over(Option<Box<Stats>>),
}

fn turn() -> Error {
    misuse("outgoing: it is not this call's turn")
}

impl Stage {
    fn before(&mut self) -> Result<&mut Before> {
        match self {
            Self::Before(before) => Ok(before),
            _ => Err(turn()),
        }
    }

    fn switching(&mut self) -> Result<&mut Outgoing> {
        match self {
            Self::Switching(outgoing) => Ok(outgoing),
            _ => Err(turn()),
        }
    }

    fn take(&mut self) -> Self {
        mem::replace(self, Self::Over(None))
    }
}

/// What is left to be sent, in bytes. No byte is in two of them.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Left {
    /// In PRE_COPY: what the destination should have before the switchover.
    pub initial: u64,
    /// In PRE_COPY: what has changed since it was read.
    pub dirty: u64,
    /// What only STOP_COPY gives. 0 before it was first asked for.
    pub stop_copy: u64,
}

/// What an iteration has done.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Round {
    /// Bytes of the device's that were written, or sent; 0 where it has nothing for now.
    pub bytes: u64,
    /// Whether this has told the destination that it has the initial data.
    pub init_data_sent: bool,
}

/// The source's side of a migration of a VM's devices. One thread at a time walks it through its steps; a second one
/// is refused. Any thread may call `vfm_outgoing_ack_received`, `…_canceller` and `…_failure`. Free it with
/// `vfm_outgoing_free`.
pub struct OutgoingHandle {
    chosen: Chosen,
    cancel: Arc<Cancel>,
    acks: SwitchoverAcks,
    stage: Mutex<Stage>,
    borrowed: Mutex<Borrowed>,
}

impl OutgoingHandle {
    fn walk(&self) -> Result<MutexGuard<'_, Stage>> {
        lock_at_once(&self.stage, "outgoing: another thread is in a call with it")
    }

    /// The steps before the verdict end where somebody has cancelled.
    fn walk_on(&self) -> Result<MutexGuard<'_, Stage>> {
        let stage = self.walk()?;
        match (&*stage, self.cancel.reason()) {
            (Stage::Switching(outgoing), Some(reason)) => {
                outgoing.fail(reason.clone());
                Err(outgoing.failure().unwrap_or(reason))
            }
            (Stage::Before(_), Some(reason)) => Err(reason),
            _ => Ok(stage),
        }
    }

    fn give_back(&self, devices: Vec<MigratableDevice>) {
        let mut borrowed = lock(&self.borrowed);
        borrowed.give_all_back(devices);
        borrowed.lose_the_rest();
    }

    /// Writes a section's body for the step at which the migration is.
    fn body(&self, stage: &mut Stage, kind: u32, device: &DeviceHandle, sink: Sink) -> Result<()> {
        match kind {
            1 => set_up(self, stage, device, sink),
            2 => iterate(stage, device.id(), sink).map(drop),
            3 => stage.switching()?.write_state(device.id(), sink),
            4 => stage.switching()?.write_config(device.id(), sink),
            _ => Err(misuse("kind: no section's")),
        }
    }

    /// Aborts whatever is under way.
    fn abort(&self, stage: &mut Stage) {
        let devices = match stage.take() {
            Stage::Before(before) => {
                let aborted = before.sources.into_iter().map(OutgoingDevice::abort);
                aborted.collect()
            }
            Stage::Switching(outgoing) => outgoing.abort(),
            Stage::Saved(saved) => {
                *stage = Stage::Over(Some(Box::new(saved.stats().clone())));
                saved.abort()
            }
            over @ Stage::Over(_) => {
                *stage = over;
                return;
            }
        };
        self.give_back(devices);
    }
}

fn find<'a>(sources: &'a mut [OutgoingDevice], id: &DeviceId) -> Result<&'a mut OutgoingDevice> {
    let found = sources.iter_mut().find(|source| source.id() == id);
    found.ok_or_else(|| misuse("device: it has not been set up here").on_device(id))
}

fn set_up(
    handle: &OutgoingHandle,
    stage: &mut Stage,
    device: &DeviceHandle,
    sink: Sink,
) -> Result<()> {
    let before = stage.before()?;
    let taken = lock(&handle.borrowed).take(device)?;
    match OutgoingDevice::setup(taken, &handle.chosen.capabilities, &handle.acks, sink) {
        Ok(source) => {
            before.sources.push(source);
            Ok(())
        }
        Err(failed) => {
            let (error, device) = failed.into_parts();
            lock(&handle.borrowed).give_back(device);
            Err(error)
        }
    }
}

fn iterate(stage: &mut Stage, id: &DeviceId, sink: Sink) -> Result<Round> {
    let before = stage.before()?;
    let source = find(&mut before.sources, id)?;
    let done = match &mut before.greeted {
        Some(channels) => source.iterate_over(channels, sink)?,
        None => source.iterate(sink)?,
    };
    Ok(Round {
        bytes: done.bytes as u64,
        init_data_sent: done.init_data_sent,
    })
}

impl Drop for OutgoingHandle {
    fn drop(&mut self) {
        let mut stage = lock(&self.stage).take();
        match stage {
            Stage::Saved(saved) => self.give_back(saved.in_doubt()),
            _ => self.abort(&mut stage),
        }
    }
}

/// Makes the source's side of a migration. `settings` is copied. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_new(
    settings: Option<&SettingsHandle>,
    outgoing: Option<&mut MaybeUninit<*mut OutgoingHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let chosen = given(settings, "settings: NULL")?.chosen();
        let outgoing = given(outgoing, "outgoing: NULL")?;
        let mut session = SaveSession::builder().settings(chosen.session.clone());
        if let Some(spawner) = chosen.spawner.clone() {
            session = session.spawn_with(move |task| spawner(task));
        }
        let before = Before {
            session,
            ..Before::default()
        };
        let made = OutgoingHandle {
            acks: SwitchoverAcks::new(chosen.capabilities.switchover_ack),
            chosen,
            cancel: Arc::default(),
            stage: Mutex::new(Stage::Before(Box::new(before))),
            borrowed: Mutex::default(),
        };
        hand_out(outgoing, made);
        Ok(())
    })
}

/// Adds a channel, before `vfm_outgoing_greet`.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_add_channel(
    outgoing: Option<&OutgoingHandle>,
    channel: Option<&ChannelHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let outgoing = given(outgoing, "outgoing: NULL")?;
        let channel = given(channel, "channel: NULL")?;
        let mut stage = outgoing.walk_on()?;
        let before = stage.before()?;
        if before.greeted.is_some() {
            return Err(misuse("outgoing: the channels have been greeted"));
        }
        before.channels.push(channel.take()?);
        Ok(())
    })
}

/// Greets the channels, when the migration is set up: the destination does not wait for it for long. Waits for the
/// sockets. A migration whose devices use no channels does without.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_greet(
    outgoing: Option<&OutgoingHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let outgoing = given(outgoing, "outgoing: NULL")?;
        let mut stage = outgoing.walk_on()?;
        let before = stage.before()?;
        if before.greeted.is_some() {
            return Err(misuse("outgoing: the channels have been greeted"));
        }
        let channels = mem::take(&mut before.channels);
        let greeted = SourceChannels::greet(channels, &outgoing.chosen.session)?;
        outgoing.cancel.aim(greeted.canceller());
        before.greeted = Some(greeted);
        Ok(())
    })
}

/// Sets a device's migration up, and writes the body of its START section. The migration borrows the device until its
/// end. Where this fails the device is back, as it was. Waits for the driver.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_setup_device(
    outgoing: Option<&OutgoingHandle>,
    device: Option<&DeviceHandle>,
    body: Output,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let outgoing = given(outgoing, "outgoing: NULL")?;
        let device = given(device, "device: NULL")?;
        let mut stage = outgoing.walk_on()?;
        set_up(outgoing, &mut stage, device, Sink::new(body)?)
    })
}

/// Writes the body of a PART section, while the VM runs: reads from the device once, and never waits for more. With
/// VFM_SETTING_PRECOPY_OVER_CHANNELS the data is sent over the channels instead. `round` may be NULL. Waits for the
/// driver, the main channel, and a channel.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_iterate(
    outgoing: Option<&OutgoingHandle>,
    device: Option<&DeviceHandle>,
    body: Output,
    round: Option<&mut MaybeUninit<Round>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let outgoing = given(outgoing, "outgoing: NULL")?;
        let id = given(device, "device: NULL")?.id();
        let mut stage = outgoing.walk_on()?;
        let done = iterate(&mut stage, id, Sink::new(body)?)?;
        if let Some(round) = round {
            round.write(done);
        }
        Ok(())
    })
}

/// Writes what a device has left to send; of all devices together where `device` is NULL. With `exact` it asks the
/// drivers and waits for them; otherwise it says what they said last, less what has been read since. The VM can stop
/// when the sum of the three fits its downtime limit.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_pending(
    outgoing: Option<&OutgoingHandle>,
    device: Option<&DeviceHandle>,
    exact: bool,
    left: Option<&mut MaybeUninit<Left>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let outgoing = given(outgoing, "outgoing: NULL")?;
        let left = given(left, "left: NULL")?;
        let mut stage = outgoing.walk_on()?;
        let before = stage.before()?;
        if let Some(device) = device {
            find(&mut before.sources, device.id())?;
        }
        let mut sum = Left::default();
        for source in &mut before.sources {
            if device.is_some_and(|device| device.id() != source.id()) {
                continue;
            }
            let Pending {
                initial,
                dirty,
                stop_copy,
                ..
            } = if exact {
                source.pending_exact()?
            } else {
                source.pending_estimate()
            };
            // No part is above a pebibyte, and no VM has a thousand devices.
            sum.initial += initial;
            sum.dirty += dirty;
            sum.stop_copy += stop_copy;
        }
        left.write(sum);
        Ok(())
    })
}

/// Returns whether all devices let the switchover happen: the acks that they asked for have come. False while another
/// thread is in a call with it.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_is_switchover_ready(outgoing: Option<&OutgoingHandle>) -> bool {
    quiet(false, || {
        let stage = outgoing.and_then(|outgoing| outgoing.walk().ok());
        match stage.as_deref() {
            Some(Stage::Before(before)) => before
                .sources
                .iter()
                .all(OutgoingDevice::is_switchover_ready),
            _ => false,
        }
    })
}

/// A switchover ack has come on the return path. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_ack_received(outgoing: Option<&OutgoingHandle>) {
    quiet((), || {
        if let Some(outgoing) = outgoing {
            outgoing.acks.received();
        }
    });
}

/// Makes the memory and the ring of the switchover, while the VM still runs: without, `vfm_outgoing_begin` makes them in
/// the downtime.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_prepare(
    outgoing: Option<&OutgoingHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let outgoing = given(outgoing, "outgoing: NULL")?;
        let mut stage = outgoing.walk_on()?;
        let before = stage.before()?;
        Outgoing::prepare(&before.sources, &mut before.session)
    })
}

/// Stops the migration's devices, after the VM's processors have stopped: all to their P2P state, then all to STOP or
/// STOP_COPY. `reason` is an `enum vfm_reason`; another one than VFM_REASON_FINISH_MIGRATION pauses the VM. Waits for
/// the slowest driver.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_stop_vm(
    outgoing: Option<&OutgoingHandle>,
    reason_to_stop: u32,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let outgoing = given(outgoing, "outgoing: NULL")?;
        let reason = reason(reason_to_stop)?;
        vm::stop(&mut outgoing.walk_on()?.before()?.sources, reason)
    })
}

/// Starts the migration's devices again, whose VM was paused. Waits for the slowest driver.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_start_vm(
    outgoing: Option<&OutgoingHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let outgoing = given(outgoing, "outgoing: NULL")?;
        vm::start(&mut outgoing.walk_on()?.before()?.sources)
    })
}

/// Begins the switchover: the devices that use the channels are read from and sent from now on. Where this fails the
/// migration is over, and the devices are back, as at set-up. Waits for memory and the slowest driver.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_begin(
    outgoing: Option<&OutgoingHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let outgoing = given(outgoing, "outgoing: NULL")?;
        let mut stage = outgoing.walk_on()?;
        stage.before()?;
        let Stage::Before(before) = stage.take() else {
            return Err(turn());
        };
        let mut session = before.session;
        if let Some(channels) = before.greeted {
            session = session.greeted_channels(channels);
        }
        match Outgoing::begin(before.sources, session) {
            Ok(begun) => {
                if let Some(session) = begun.session() {
                    outgoing.cancel.aim(session.canceller());
                }
                *stage = Stage::Switching(begun);
                Ok(())
            }
            Err(failed) => {
                let (error, devices) = failed.into_parts();
                outgoing.give_back(devices);
                Err(error)
            }
        }
    })
}

/// Writes the body of a device's END section, after SWITCHOVER_START. Waits for the main channel; and for the driver,
/// where the device does not use the channels. After a failure `vfm_outgoing_finish` gives the devices back.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_write_state(
    outgoing: Option<&OutgoingHandle>,
    device: Option<&DeviceHandle>,
    body: Output,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let outgoing = given(outgoing, "outgoing: NULL")?;
        let device = given(device, "device: NULL")?;
        let mut stage = outgoing.walk_on()?;
        outgoing.body(&mut stage, 3, device, Sink::new(body)?)
    })
}

/// Writes the body of a device's FULL section, after its END. As `vfm_outgoing_write_state`.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_write_config(
    outgoing: Option<&OutgoingHandle>,
    device: Option<&DeviceHandle>,
    body: Output,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let outgoing = given(outgoing, "outgoing: NULL")?;
        let device = given(device, "device: NULL")?;
        let mut stage = outgoing.walk_on()?;
        outgoing.body(&mut stage, 4, device, Sink::new(body)?)
    })
}

/// Writes a whole section of the device: its header, its body as the functions above do, its footer. `kind` is an `enum
/// vfm_section_kind`: START sets the device up, PART iterates, END has its state, FULL its config. `id` is the section's
/// number, one for each device.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_section(
    outgoing: Option<&OutgoingHandle>,
    main: Option<&MainWriterHandle>,
    kind: u32,
    id: u32,
    device: Option<&DeviceHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let outgoing = given(outgoing, "outgoing: NULL")?;
        let main = given(main, "main: NULL")?;
        let device = given(device, "device: NULL")?;
        let known = section_kind(kind)?;
        let mut stage = outgoing.walk_on()?;
        let mut writer = main.lock()?;
        writer.device_section(known, id, device.id(), |sink| {
            outgoing.body(&mut stage, kind, device, *sink)
        })
    })
}

/// Fails the switchover for a reason of the caller's, a main channel that broke, say; `vfm_outgoing_finish` then gives
/// the devices back. The first reason counts. `reason` stays the caller's.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_fail(
    outgoing: Option<&OutgoingHandle>,
    reason: Option<&ErrorHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let outgoing = given(outgoing, "outgoing: NULL")?;
        let reason = given(reason, "reason: NULL")?.error().clone();
        if let Stage::Switching(switching) = &*outgoing.walk()? {
            switching.fail(reason.clone());
        }
        outgoing.cancel.fail(reason);
        Ok(())
    })
}

/// Waits until everything is sent. On success the devices stay in STOP_COPY: write the main channel's end, wait for the
/// verdict, and call `…_cleanup`, `…_abort` or `…_in_doubt`. On failure the devices are back, as at set-up, the VM goes
/// on here, and the end must not be written.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_finish(
    outgoing: Option<&OutgoingHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let outgoing = given(outgoing, "outgoing: NULL")?;
        let mut stage = outgoing.walk()?;
        stage.switching()?;
        let Stage::Switching(switching) = stage.take() else {
            return Err(turn());
        };
        if let Some(reason) = outgoing.cancel.reason() {
            switching.fail(reason);
        }
        match switching.finish() {
            Ok(saved) => {
                *stage = Stage::Saved(saved);
                Ok(())
            }
            Err(failed) => {
                let (error, devices) = failed.into_parts();
                outgoing.give_back(devices);
                Err(error)
            }
        }
    })
}

/// The verdict: the VM runs on the destination. Takes the devices to STOP, closes the channels, and gives the devices
/// back. An error is a device's that refused; it was reset and stopped. Waits for the slowest driver, and a second at
/// most for the channels.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_cleanup(
    outgoing: Option<&OutgoingHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let outgoing = given(outgoing, "outgoing: NULL")?;
        let mut stage = outgoing.walk()?;
        let saved = match stage.take() {
            Stage::Saved(saved) => saved,
            other => {
                *stage = other;
                return Err(turn());
            }
        };
        *stage = Stage::Over(Some(Box::new(saved.stats().clone())));
        match saved.cleanup() {
            Ok(devices) => {
                outgoing.give_back(devices);
                Ok(())
            }
            Err(failed) => {
                let (error, devices) = failed.into_parts();
                outgoing.give_back(devices);
                Err(error)
            }
        }
    })
}

/// Ends the migration at any step, and gives the devices back, as at set-up: the VM goes on here. After
/// `vfm_outgoing_finish` only where the destination has said that it failed, or the main channel's end was never
/// written. Waits for what is under way, within the grace time, and for the drivers.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_abort(
    outgoing: Option<&OutgoingHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let outgoing = given(outgoing, "outgoing: NULL")?;
        outgoing.abort(&mut *outgoing.walk()?);
        Ok(())
    })
}

/// No verdict was heard, and none will be: the VM may run on the destination, so it must not run here. Takes the devices
/// to STOP, with what they hold, and gives them back. `vfm_start_devices` lets the VM go on here, once it is known that it
/// does not run there.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_in_doubt(
    outgoing: Option<&OutgoingHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let outgoing = given(outgoing, "outgoing: NULL")?;
        let mut stage = outgoing.walk()?;
        match stage.take() {
            Stage::Saved(saved) => {
                *stage = Stage::Over(Some(Box::new(saved.stats().clone())));
                outgoing.give_back(saved.in_doubt());
                Ok(())
            }
            other => {
                *stage = other;
                Err(turn())
            }
        }
    })
}

/// Returns why the migration has failed, if it has: a cancellation, a channel that the destination has ended, what the
/// switchover met. Look before the VM stops. VFM_CODE_OK and no error while it has not. Any thread; while another one is in
/// a call it knows of cancellations only.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_failure(
    outgoing: Option<&OutgoingHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let outgoing = given(outgoing, "outgoing: NULL")?;
        let failure = outgoing.walk().ok().and_then(|stage| match &*stage {
            Stage::Before(before) => before.greeted.as_ref()?.failure(),
            Stage::Switching(outgoing) => outgoing.failure(),
            _ => None,
        });
        failure.or(outgoing.cancel.reason()).map_or(Ok(()), Err)
    })
}

/// Returns whether everything that the channels carry has been sent, or the switchover has failed: then
/// `vfm_outgoing_finish` returns soon.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_is_finished(outgoing: Option<&OutgoingHandle>) -> bool {
    quiet(false, || {
        let stage = outgoing.and_then(|outgoing| outgoing.walk().ok());
        match stage.as_deref() {
            Some(Stage::Switching(outgoing)) => outgoing.is_finished(),
            Some(Stage::Saved(_) | Stage::Over(_)) => true,
            _ => false,
        }
    })
}

/// Returns the eventfd of the session that sends, between `vfm_outgoing_begin` and `…_finish`, where a device uses the
/// channels; otherwise -1. As `vfm_load_eventfd`.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_eventfd(outgoing: Option<&OutgoingHandle>) -> c_int {
    quiet(-1, || {
        let stage = outgoing.and_then(|outgoing| outgoing.walk().ok());
        match stage.as_deref() {
            Some(Stage::Switching(outgoing)) => outgoing
                .session()
                .map_or(-1, |session| session.as_fd().as_raw_fd()),
            _ => -1,
        }
    })
}

/// Makes a copy of the counters, from `vfm_outgoing_begin` on.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_stats(
    outgoing: Option<&OutgoingHandle>,
    stats: Option<&mut MaybeUninit<*mut StatsHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let outgoing = given(outgoing, "outgoing: NULL")?;
        let stats = given(stats, "stats: NULL")?;
        let now = match &*outgoing.walk()? {
            Stage::Switching(outgoing) => outgoing.stats(),
            Stage::Saved(saved) => saved.stats().clone(),
            Stage::Over(Some(last)) => (**last).clone(),
            _ => return Err(turn()),
        };
        hand_out(stats, StatsHandle::new(now));
        Ok(())
    })
}

/// Makes a handle that cancels the migration, whatever step it is at. Once everything is sent it does nothing: then
/// the verdict decides. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_canceller(
    outgoing: Option<&OutgoingHandle>,
    canceller: Option<&mut MaybeUninit<*mut CancellerHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let outgoing = given(outgoing, "outgoing: NULL")?;
        let canceller = given(canceller, "canceller: NULL")?;
        hand_out(canceller, CancellerHandle(outgoing.cancel.clone()));
        Ok(())
    })
}

/// Frees a migration. One that is under way is aborted; one that is finished and has heard no verdict is left in doubt.
/// NULL is nothing. No other thread may be in a call with it.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_outgoing_free(outgoing: Option<Box<OutgoingHandle>>) {
    quiet((), || drop(outgoing));
}
