//! A save: the source's session, for a VMM that has a life cycle of its own.

#![expect(unsafe_code, reason = "the functions' names are exported")]

use std::{
    ffi::c_int,
    mem::{self, MaybeUninit},
    os::fd::{AsFd, AsRawFd},
    sync::{Arc, Mutex, RwLock},
};

use vfio_migration::{
    Channel, DeviceId, Report, Result, SaveSession, Stats, migration::MigratableDevice,
};

use crate::{
    border::{alone, change, given, guard, hand_out, lock, look, misuse, quiet, unlocked},
    cancel::{Cancel, CancellerHandle},
    channel::ChannelHandle,
    device::{Borrowed, DeviceHandle},
    failure::{Code, ErrorHandle},
    settings::{Chosen, SettingsHandle},
    stats::StatsHandle,
};

const BUSY: &str = "session: another thread starts or joins it";

/// What a save is made of. Behind a lock of its own: a device and a channel are one thread's at a time.
#[derive(Default)]
struct Parts {
    devices: Vec<MigratableDevice>,
    channels: Vec<Channel>,
}

enum Stage {
    Building(Mutex<Parts>),
    Running(SaveSession),
    /// It has ended, and its devices are where they were then.
    Joined(Box<Mutex<Report>>),
    Over(Result<()>, Option<Box<Stats>>),
}

/// A save under way: devices, channels, and the threads that bring the one to the other. Any thread may call any
/// function of it at any time, but for `vfm_save_free`. Free it with `vfm_save_free`.
pub struct SaveHandle {
    chosen: Chosen,
    cancel: Arc<Cancel>,
    stage: RwLock<Stage>,
    borrowed: Mutex<Borrowed>,
    results: Mutex<Vec<(DeviceId, Result<()>)>>,
}

impl SaveHandle {
    fn join(&self, end: impl FnOnce(SaveSession) -> Report) -> Result<()> {
        let mut stage = change(&self.stage);
        if !matches!(*stage, Stage::Running(_)) {
            return Err(misuse("session: it is not running"));
        }
        let over = Stage::Over(Err(misuse("session: it is over")), None);
        let Stage::Running(session) = mem::replace(&mut *stage, over) else {
            return Err(misuse("session: it is not running"));
        };
        let report = end(session);
        let result = report.result.clone();
        *stage = Stage::Joined(Box::new(Mutex::new(report)));
        if result.is_err() {
            // They are where they were before already.
            self.give_back(&mut stage, |_| {});
        }
        result
    }

    /// Gives the devices back, after `last`. Closes the channels.
    fn give_back(&self, stage: &mut Stage, last: impl FnOnce(&mut Report)) {
        let over = Stage::Over(Ok(()), None);
        match mem::replace(stage, over) {
            Stage::Joined(report) => {
                let mut report = unlocked(*report);
                last(&mut report);
                let stats = Some(Box::new(report.stats.clone()));
                *stage = Stage::Over(report.result.clone(), stats);
                let mut borrowed = lock(&self.borrowed);
                let mut results = lock(&self.results);
                for device in mem::take(&mut report.devices) {
                    results.push((device.id, device.result));
                    if let Some(device) = device.device {
                        borrowed.give_device_back(device);
                    }
                }
                borrowed.lose_the_rest();
            }
            other => *stage = other,
        }
    }

    fn settle(&self, last: impl FnOnce(&mut Report)) -> Result<()> {
        let mut stage = change(&self.stage);
        if !matches!(*stage, Stage::Joined(_)) {
            return Err(misuse(
                "session: it has not been joined, or its devices are back",
            ));
        }
        self.give_back(&mut stage, last);
        Ok(())
    }
}

impl Drop for SaveHandle {
    fn drop(&mut self) {
        let mut stage = mem::replace(&mut *change(&self.stage), Stage::Over(Ok(()), None));
        match stage {
            Stage::Building(parts) => lock(&self.borrowed).give_all_back(unlocked(parts).devices),
            Stage::Running(session) => {
                session.cancel();
                let mut stage = Stage::Joined(Box::new(Mutex::new(session.join())));
                self.give_back(&mut stage, |_| {});
            }
            Stage::Joined(_) => self.give_back(&mut stage, |_| {}),
            Stage::Over(..) => {}
        }
    }
}

/// Makes a save, to which devices and channels are added before `vfm_save_start`. `settings` is copied. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_save_new(
    settings: Option<&SettingsHandle>,
    save: Option<&mut MaybeUninit<*mut SaveHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let chosen = given(settings, "settings: NULL")?.chosen();
        let save = given(save, "save: NULL")?;
        let made = SaveHandle {
            chosen,
            cancel: Arc::default(),
            stage: RwLock::new(Stage::Building(Mutex::default())),
            borrowed: Mutex::default(),
            results: Mutex::default(),
        };
        hand_out(save, made);
        Ok(())
    })
}

/// Adds a device, which the save borrows until `vfm_save_stop_devices`, `vfm_save_put_back` or `vfm_save_free`. Before
/// the start. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_save_add_device(
    save: Option<&SaveHandle>,
    device: Option<&DeviceHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let save = given(save, "save: NULL")?;
        let device = given(device, "device: NULL")?;
        match &mut *change(&save.stage) {
            Stage::Building(parts) => {
                let taken = lock(&save.borrowed).take(device)?;
                alone(parts).devices.push(taken);
                Ok(())
            }
            _ => Err(misuse("session: it has been started")),
        }
    })
}

/// Adds a channel, which is greeted at the start. Before the start. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_save_add_channel(
    save: Option<&SaveHandle>,
    channel: Option<&ChannelHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let save = given(save, "save: NULL")?;
        let channel = given(channel, "channel: NULL")?;
        match &mut *change(&save.stage) {
            Stage::Building(parts) => {
                alone(parts).channels.push(channel.take()?);
                Ok(())
            }
            _ => Err(misuse("session: it has been started")),
        }
    })
}

/// Starts the save, when the VM stands still: allocates its memory, starts its threads, and sets all devices to
/// STOP_COPY, all at once. Waits for the slowest driver. If it fails the save is over, and the devices are back, in
/// the state in which they came. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_save_start(
    save: Option<&SaveHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let save = given(save, "save: NULL")?;
        let mut stage = change(&save.stage);
        if !matches!(*stage, Stage::Building(..)) {
            return Err(misuse("session: it has been started"));
        }
        save.cancel.check()?;
        let over = Stage::Over(Err(misuse("session: it has not been started")), None);
        let Stage::Building(parts) = mem::replace(&mut *stage, over) else {
            return Err(misuse("session: it has been started"));
        };
        let Parts { devices, channels } = unlocked(parts);
        let mut builder = SaveSession::builder()
            .settings(save.chosen.session.clone())
            .devices(devices.into_iter().map(MigratableDevice::into_device))
            .channels(channels);
        if let Some(spawner) = save.chosen.spawner.clone() {
            builder = builder.spawn_with(move |task| spawner(task));
        }
        match builder.start() {
            Ok(session) => {
                save.cancel.aim(session.canceller());
                *stage = Stage::Running(session);
                Ok(())
            }
            Err(failed) => {
                let (error, devices) = failed.into_parts();
                *stage = Stage::Over(Err(error.clone()), None);
                let mut borrowed = lock(&save.borrowed);
                for device in devices {
                    borrowed.give_device_back(device);
                }
                borrowed.lose_the_rest();
                Err(error)
            }
        }
    })
}

/// Makes a handle that cancels the save. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_save_canceller(
    save: Option<&SaveHandle>,
    canceller: Option<&mut MaybeUninit<*mut CancellerHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let save = given(save, "save: NULL")?;
        let canceller = given(canceller, "canceller: NULL")?;
        hand_out(canceller, CancellerHandle(save.cancel.clone()));
        Ok(())
    })
}

/// Returns why the save has failed, if it has: VFM_CODE_OK and no error while it has not. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_save_failure(
    save: Option<&SaveHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let save = given(save, "save: NULL")?;
        match &*look(&save.stage, BUSY)? {
            Stage::Building(..) => save.cancel.check(),
            Stage::Running(session) => session.failure().map_or(Ok(()), Err),
            Stage::Joined(report) => lock(report).result.clone(),
            Stage::Over(result, _) => result.clone(),
        }
    })
}

/// Returns whether all has been sent, or the save has failed and its threads have ended: then `vfm_save_join` returns
/// soon. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_save_is_finished(save: Option<&SaveHandle>) -> bool {
    quiet(false, || {
        let Some(stage) = save.and_then(|save| look(&save.stage, BUSY).ok()) else {
            return false;
        };
        match &*stage {
            Stage::Building(..) => false,
            Stage::Running(session) => session.is_finished(),
            Stage::Joined(_) | Stage::Over(..) => true,
        }
    })
}

/// Returns an eventfd, as `vfm_load_eventfd` does. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_save_eventfd(save: Option<&SaveHandle>) -> c_int {
    quiet(-1, || {
        let Some(stage) = save.and_then(|save| look(&save.stage, BUSY).ok()) else {
            return -1;
        };
        match &*stage {
            Stage::Running(session) => session.as_fd().as_raw_fd(),
            _ => -1,
        }
    })
}

/// Makes a copy of the counters as they are now, or as they were at the end. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_save_stats(
    save: Option<&SaveHandle>,
    stats: Option<&mut MaybeUninit<*mut StatsHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let save = given(save, "save: NULL")?;
        let stats = given(stats, "stats: NULL")?;
        let now = match &*look(&save.stage, BUSY)? {
            Stage::Running(session) => session.stats(),
            Stage::Joined(report) => lock(report).stats.clone(),
            Stage::Over(_, Some(last)) => (**last).clone(),
            _ => return Err(misuse("session: it has not been started")),
        };
        hand_out(stats, StatsHandle::new(now));
        Ok(())
    })
}

/// Waits until all has been sent, or the save has failed, and returns its first failure. After a failure the devices
/// are back, in the state in which they came. After a success they stay in STOP_COPY, until it is known where the VM
/// runs: then `vfm_save_stop_devices` or `vfm_save_put_back`. The channels stay open until then. Any thread, once.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_save_join(
    save: Option<&SaveHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || given(save, "save: NULL")?.join(SaveSession::join))
}

/// As `vfm_save_join`, but ends what is still under way, within the grace time. Any thread, once.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_save_cleanup(
    save: Option<&SaveHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        given(save, "save: NULL")?.join(SaveSession::cleanup)
    })
}

/// The VM runs on the destination: takes the devices to STOP, closes the channels, and gives the devices back.
/// `vfm_save_device_result` says how it went. Waits for the slowest driver. Any thread, once.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_save_stop_devices(
    save: Option<&SaveHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        given(save, "save: NULL")?.settle(Report::stop_devices)
    })
}

/// The destination has failed, and the VM goes on here: takes the devices back to the state in which they came, and
/// gives them back. Waits for the slowest driver. Any thread, once.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_save_put_back(
    save: Option<&SaveHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        given(save, "save: NULL")?.settle(Report::put_back)
    })
}

/// Returns how the device's part of the save went, once the device is back. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_save_device_result(
    save: Option<&SaveHandle>,
    device: Option<&DeviceHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let save = given(save, "save: NULL")?;
        let id = given(device, "device: NULL")?.id();
        let results = lock(&save.results);
        let found = results.iter().find(|(other, _)| other == id);
        let (_, result) = found.ok_or_else(|| misuse("device: it has not come back"))?;
        result.clone()
    })
}

/// Frees a save. One that runs is cancelled first. Devices that are not back come back, in the state in which they
/// are: STOP_COPY, after a success. NULL is nothing. No other thread may be in a call with it.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_save_free(save: Option<Box<SaveHandle>>) {
    quiet((), || drop(save));
}
