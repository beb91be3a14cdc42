//! A load: the destination's session, for a VMM that has a life cycle of its own.

#![expect(unsafe_code, reason = "the functions' names are exported")]

use std::{
    ffi::{c_int, c_void},
    mem::{self, MaybeUninit},
    os::fd::{AsFd, AsRawFd},
    sync::{Arc, Mutex, RwLock},
};

use vfio_migration::{
    Channel, DeviceId, DeviceReport, DeviceSpec, LoadBuilder, LoadSession, Result, Stats,
    migration::MigratableDevice,
};

use crate::{
    border::{alone, bytes, change, given, guard, hand_out, lock, look, misuse, quiet, unlocked},
    cancel::{Cancel, CancellerHandle},
    channel::ChannelHandle,
    device::{Borrowed, DeviceHandle},
    failure::{Code, ErrorHandle},
    publisher::PublisherHandle,
    settings::{Chosen, SettingsHandle},
    stats::StatsHandle,
};

const BUSY: &str = "session: another thread starts or joins it";

/// What a load is made of. Behind a lock of its own: a device and a channel are one thread's at a time.
#[derive(Default)]
struct Parts {
    devices: Vec<MigratableDevice>,
    channels: Vec<Channel>,
}

enum Stage {
    Building(Mutex<Parts>),
    Running(LoadSession),
    Over(Result<()>, Option<Box<Stats>>),
}

impl Stage {
    fn running(&self) -> Result<&LoadSession> {
        match self {
            Self::Running(session) => Ok(session),
            Self::Building(..) => Err(misuse("session: it has not been started")),
            Self::Over(..) => Err(misuse("session: it is over")),
        }
    }
}

/// A load under way: devices, channels, and the threads that bring the one to the other. Any thread may call any
/// function of it at any time, but for `vfm_load_free`; where a call says that it waits, others may be made
/// meanwhile, but for those that end the session. Free it with `vfm_load_free`.
pub struct LoadHandle {
    chosen: Chosen,
    cancel: Arc<Cancel>,
    stage: RwLock<Stage>,
    borrowed: Mutex<Borrowed>,
    results: Mutex<Vec<(DeviceId, Result<()>)>>,
}

impl LoadHandle {
    fn take_reports(&self, reports: Vec<DeviceReport>) {
        let mut borrowed = lock(&self.borrowed);
        let mut results = lock(&self.results);
        for report in reports {
            results.retain(|(id, _)| *id != report.id);
            results.push((report.id, report.result));
            if let Some(device) = report.device {
                borrowed.give_device_back(device);
            }
        }
    }

    /// Waits for the devices, beside other calls.
    fn wait(&self) -> Result<()> {
        let stage = look(&self.stage, BUSY)?;
        self.take_reports(stage.running()?.wait_devices());
        Ok(())
    }

    /// Ends the session; `wait` says whether to wait for it.
    fn end(&self, end: impl FnOnce(LoadSession) -> vfio_migration::Report) -> Result<()> {
        let mut stage = change(&self.stage);
        stage.running()?;
        let over = Stage::Over(Err(misuse("session: it is over")), None);
        let Stage::Running(session) = mem::replace(&mut *stage, over) else {
            return Err(misuse("session: it is not running"));
        };
        let ended = end(session);
        *stage = Stage::Over(ended.result.clone(), Some(Box::new(ended.stats)));
        self.take_reports(ended.devices);
        lock(&self.borrowed).lose_the_rest();
        ended.result
    }

    fn running<T>(&self, work: impl FnOnce(&LoadSession) -> Result<T>) -> Result<T> {
        work(look(&self.stage, BUSY)?.running()?)
    }
}

impl Drop for LoadHandle {
    fn drop(&mut self) {
        let over = Stage::Over(Ok(()), None);
        match mem::replace(&mut *change(&self.stage), over) {
            Stage::Building(parts) => lock(&self.borrowed).give_all_back(unlocked(parts).devices),
            Stage::Running(session) => self.take_reports({
                session.cancel();
                session.join().devices
            }),
            Stage::Over(..) => {}
        }
    }
}

/// Makes a load, to which devices and channels are added before `vfm_load_start`. `settings` is copied. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_load_new(
    settings: Option<&SettingsHandle>,
    load: Option<&mut MaybeUninit<*mut LoadHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let chosen = given(settings, "settings: NULL")?.chosen();
        let load = given(load, "load: NULL")?;
        let made = LoadHandle {
            chosen,
            cancel: Arc::default(),
            stage: RwLock::new(Stage::Building(Mutex::default())),
            borrowed: Mutex::default(),
            results: Mutex::default(),
        };
        hand_out(load, made);
        Ok(())
    })
}

/// Adds a device, which the load borrows until its end. Once started, this is a plug: it waits until the device is
/// in RESUMING, and VFM_SETTING_MAX_DEVICES must have room for it. If the load fails, the device goes back to the
/// state in which it is now. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_load_add_device(
    load: Option<&LoadHandle>,
    device: Option<&DeviceHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let load = given(load, "load: NULL")?;
        let device = given(device, "device: NULL")?;
        let running = {
            // Its own block: the plug below waits, and may not keep others out.
            let stage = look(&load.stage, BUSY)?;
            stage.running().is_ok()
        };
        if running {
            let taken = lock(&load.borrowed).take(device)?.into_device();
            return load.running(|session| session.add_device(DeviceSpec::new(taken)));
        }
        match &mut *change(&load.stage) {
            Stage::Building(parts) => {
                let taken = lock(&load.borrowed).take(device)?;
                alone(parts).devices.push(taken);
                Ok(())
            }
            _ => Err(misuse("session: it is over")),
        }
    })
}

/// Adds a channel, before the start or after it. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_load_add_channel(
    load: Option<&LoadHandle>,
    channel: Option<&ChannelHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let load = given(load, "load: NULL")?;
        let channel = given(channel, "channel: NULL")?;
        if let Stage::Running(session) = &*look(&load.stage, BUSY)? {
            return session.add_channel(channel.take()?);
        }
        match &mut *change(&load.stage) {
            Stage::Building(parts) => {
                alone(parts).channels.push(channel.take()?);
                Ok(())
            }
            Stage::Running(session) => session.add_channel(channel.take()?),
            Stage::Over(..) => Err(misuse("session: it is over")),
        }
    })
}

/// Starts the load: allocates its memory, starts its threads, and sets all devices to RESUMING, all at once. Waits
/// for the slowest driver. If it fails the load is over, and the devices are back, in the state in which they came. Any
/// thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_load_start(
    load: Option<&LoadHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let load = given(load, "load: NULL")?;
        let mut stage = change(&load.stage);
        if !matches!(*stage, Stage::Building(..)) {
            return Err(misuse("session: it has been started"));
        }
        load.cancel.check()?;
        let over = Stage::Over(Err(misuse("session: it has not been started")), None);
        let Stage::Building(parts) = mem::replace(&mut *stage, over) else {
            return Err(misuse("session: it has been started"));
        };
        let Parts { devices, channels } = unlocked(parts);
        let devices = devices.into_iter().map(MigratableDevice::into_device);
        let builder = builder(&load.chosen, channels).devices(devices);
        match builder.start() {
            Ok(session) => {
                load.cancel.aim(session.canceller());
                *stage = Stage::Running(session);
                Ok(())
            }
            Err(failed) => {
                let (error, devices) = failed.into_parts();
                *stage = Stage::Over(Err(error.clone()), None);
                let mut borrowed = lock(&load.borrowed);
                for device in devices {
                    borrowed.give_device_back(device);
                }
                borrowed.lose_the_rest();
                Err(error)
            }
        }
    })
}

/// A builder with what C has chosen.
pub(crate) fn builder(chosen: &Chosen, channels: Vec<Channel>) -> LoadBuilder {
    let builder = LoadSession::builder()
        .settings(chosen.session.clone())
        .channels(channels);
    match chosen.spawner.clone() {
        Some(spawner) => builder.spawn_with(move |task| spawner(task)),
        None => builder,
    }
}

/// Removes a device: an unplug. Its handle has it again, reset, in the state in which it came; packets that still
/// come for it are counted and skipped. Waits for its driver, for the grace time at most. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_load_remove_device(
    load: Option<&LoadHandle>,
    device: Option<&DeviceHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let load = given(load, "load: NULL")?;
        let id = given(device, "device: NULL")?.id();
        let removed = load.running(|session| session.remove_device(id))?;
        lock(&load.borrowed).give_device_back(removed);
        Ok(())
    })
}

/// No further channel will be added: what is missing then is an error. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_load_no_more_channels(
    load: Option<&LoadHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        given(load, "load: NULL")?.running(|session| {
            session.no_more_channels();
            Ok(())
        })
    })
}

/// Starts the switchover: from now on packets are written to the devices. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_load_switchover_start(
    load: Option<&LoadHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        given(load, "load: NULL")?.running(|session| {
            session.switchover_start();
            Ok(())
        })
    })
}

/// Writes data of the device's section of the main channel into the device, before the switchover. Waits for its
/// driver. Any thread, one at a time for each device.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_load_write_iterable(
    load: Option<&LoadHandle>,
    device: Option<&DeviceHandle>,
    data: *const c_void,
    len: usize,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let load = given(load, "load: NULL")?;
        let id = given(device, "device: NULL")?.id();
        let data = bytes(data, len, "data: NULL")?;
        load.running(|session| session.write_iterable(id, data))
    })
}

/// The main channel has said that the device's config may be loaded. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_load_config_ready(
    load: Option<&LoadHandle>,
    device: Option<&DeviceHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let load = given(load, "load: NULL")?;
        let id = given(device, "device: NULL")?.id();
        load.running(|session| session.config_load_ready(id))
    })
}

/// Makes a publisher, for packets that do not come over the load's channels: see `struct vfm_publisher`. It belongs to
/// the calling thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_load_publisher(
    load: Option<&LoadHandle>,
    publisher: Option<&mut MaybeUninit<*mut PublisherHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let load = given(load, "load: NULL")?;
        let publisher = given(publisher, "publisher: NULL")?;
        let made = load.running(|session| Ok(session.publisher()))?;
        hand_out(publisher, PublisherHandle::new(made));
        Ok(())
    })
}

/// Makes a handle that cancels the load. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_load_canceller(
    load: Option<&LoadHandle>,
    canceller: Option<&mut MaybeUninit<*mut CancellerHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let load = given(load, "load: NULL")?;
        let canceller = given(canceller, "canceller: NULL")?;
        hand_out(canceller, CancellerHandle(load.cancel.clone()));
        Ok(())
    })
}

/// Returns why the load has failed, if it has: VFM_CODE_OK and no error while it has not. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_load_failure(
    load: Option<&LoadHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let load = given(load, "load: NULL")?;
        match &*look(&load.stage, BUSY)? {
            Stage::Building(..) => load.cancel.check(),
            Stage::Running(session) => session.failure().map_or(Ok(()), Err),
            Stage::Over(result, _) => result.clone(),
        }
    })
}

/// Returns whether every device is loaded, or the load has failed and its threads have ended: then `vfm_load_join`
/// returns soon. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_load_is_finished(load: Option<&LoadHandle>) -> bool {
    quiet(false, || {
        let Some(stage) = load.and_then(|load| look(&load.stage, BUSY).ok()) else {
            return false;
        };
        match &*stage {
            Stage::Building(..) => false,
            Stage::Running(session) => session.is_finished(),
            Stage::Over(..) => true,
        }
    })
}

/// Returns an eventfd that is readable when a device or a thread has ended, or the load has failed; -1 where it is not
/// running. It is the load's, until its end: poll it, read its 8 bytes, then ask `vfm_load_failure` and
/// `vfm_load_is_finished`. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_load_eventfd(load: Option<&LoadHandle>) -> c_int {
    quiet(-1, || {
        let running = load.map(|load| load.running(|it| Ok(it.as_fd().as_raw_fd())));
        running.and_then(Result::ok).unwrap_or(-1)
    })
}

/// Makes a copy of the counters as they are now, or as they were at the end. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_load_stats(
    load: Option<&LoadHandle>,
    stats: Option<&mut MaybeUninit<*mut StatsHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let load = given(load, "load: NULL")?;
        let stats = given(stats, "stats: NULL")?;
        let now = match &*look(&load.stage, BUSY)? {
            Stage::Running(session) => session.stats(),
            Stage::Over(_, Some(last)) => (**last).clone(),
            _ => return Err(misuse("session: it has not been started")),
        };
        hand_out(stats, StatsHandle::new(now));
        Ok(())
    })
}

/// Waits until every device is loaded, or the load has failed; then the devices are back, in STOP
/// (VFM_SETTING_STOP_AFTER_LOAD). This is what the downtime waits for; the channels may still be open. It succeeds
/// where the load has not failed. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_load_wait_devices(
    load: Option<&LoadHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let load = given(load, "load: NULL")?;
        load.wait()?;
        load.running(|session| session.failure().map_or(Ok(()), Err))
    })
}

/// As `vfm_load_wait_devices`, and waits for the channels' end too, within VFM_SETTING_NO_PROGRESS. The load is over
/// then. It returns the load's first failure. Any thread, once.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_load_join(
    load: Option<&LoadHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let load = given(load, "load: NULL")?;
        load.wait()?;
        load.end(LoadSession::join)
    })
}

/// Ends what is under way, and gives the devices back, within the grace time. Any thread, once.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_load_cleanup(
    load: Option<&LoadHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let load = given(load, "load: NULL")?;
        load.end(LoadSession::cleanup)
    })
}

/// Returns how the device's part of the load went, once the device is back: it may have succeeded in a load that
/// failed. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_load_device_result(
    load: Option<&LoadHandle>,
    device: Option<&DeviceHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let load = given(load, "load: NULL")?;
        let id = given(device, "device: NULL")?.id();
        let results = lock(&load.results);
        let found = results.iter().find(|(other, _)| other == id);
        let (_, result) = found.ok_or_else(|| misuse("device: it has not come back"))?;
        result.clone()
    })
}

/// Frees a load. One that runs is cancelled first, which waits as `vfm_load_join` does after a cancellation; its
/// devices are back then. NULL is nothing. No other thread may be in a call with it.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_load_free(load: Option<Box<LoadHandle>>) {
    quiet((), || drop(load));
}
