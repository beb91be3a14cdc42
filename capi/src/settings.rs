//! Settings: of a session, and what both ends of a migration have agreed on; and on whose threads it runs.

#![expect(unsafe_code, reason = "the functions' names are exported")]

use std::{
    ffi::{CString, c_char, c_void},
    io,
    mem::MaybeUninit,
    path::PathBuf,
    ptr,
    sync::{Arc, Mutex},
    time::Duration,
};

use vfio_migration::{
    Backend, Result, Settings, Spill, Task, TaskKind, Writer,
    migration::{Capabilities, OnOffAuto, SwitchoverAck},
};

use crate::{
    border::{bytes, given, guard, hand_out, lock, misuse, quiet, text, unlocked},
    callbacks::{Owned, Spawn, spawn},
    failure::{Code, ErrorHandle, c_text},
};

/// What can be set, with `vfm_settings_set`. Sizes are in bytes, times in milliseconds; UINT64_MAX is a time without
/// an end. A switch is 0 or 1; an automatic one is VFM_SWITCH_AUTO, VFM_SWITCH_ON or VFM_SWITCH_OFF. The first part is one side's alone;
/// in the second both ends must agree.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub enum Setting {
    /// How bytes are moved: 0 io_uring where the host allows it, 1 io_uring, 2 plain calls on threads. Default: 0.
    Backend = 0,
    /// The memory for packets. Default, and 0: 32 MiB, more with many devices.
    Budget = 1,
    /// Load: the size of a buffer of the budget. Default: 1 MiB.
    BufferLen = 2,
    /// Save: the most data in a packet. Default, and 0: what the device estimates, 64 KiB to 1 MiB.
    DataLen = 3,
    /// Load: how far ahead of a device's next packet an idx may be. Default: 65536.
    Window = 4,
    /// Load: the largest packet that is accepted. Default: 4 MiB and 12.
    MaxPacket = 5,
    /// Load: where packets go when the budget is spent: 0 to memory, from channels with RAM; 1 nowhere; 2 to memory,
    /// from all. `vfm_settings_spill_to` names a directory. Default: 0.
    Spill = 6,
    /// Load: how much may be spilled. Default: 1 GiB.
    SpillLimit = 7,
    /// Load: the number of channels, where more come than are given before the start. Default: those that are given.
    Channels = 8,
    /// The most devices over the session's life. Default, and 0: those that are given before the start.
    MaxDevices = 9,
    /// Load: whether a loaded device goes to STOP, in which its driver checks the state. VFM_SWITCH_AUTO: with `vfm_load`
    /// alone yes, in a migration no: there `vfm_incoming_start_vm` has it checked.
    StopAfterLoad = 10,
    /// How long a driver may keep a transfer after a cancellation. Default: 5 s.
    Grace = 11,
    /// How long nothing may move, or a connection stand still within a packet. Default: 60 s.
    NoProgress = 12,
    /// How long a channel may take for its hello. Default: 10 s.
    HelloTimeout = 13,
    /// Load: how long a channel may take for one packet. Default: 300 s.
    PacketTimeout = 14,
    /// Load: how long a config may wait for its notice. Default: 600 s.
    ConfigReadyTimeout = 15,
    /// Load: which thread writes to a device: 0 the one that moves all bytes; 1 a channel's, or a publisher's, while the
    /// device is quick. A driver that then does not return keeps that thread. Default: 0.
    Writer = 16,

    /// There are channels besides the main channel. Default: 1.
    Multifd = 32,
    /// The channels are compressed; then they carry no device state. Default: 0.
    Compression = 33,
    /// The target is a file; then channels carry no device state. Default: 0.
    ToFile = 34,
    /// The source announces the switchover on the main channel. Default: 1.
    SwitchoverStart = 35,
    /// The switchover waits until the destination has the initial data: 0 no, 1 for one ack, 2 for one ack of each
    /// device, again and again. Default: 0.
    SwitchoverAck = 36,
    /// A config waits for its notice on the main channel. VFM_SWITCH_AUTO: on 64-bit Arm, and not with `vfm_load` alone.
    ConfigAfterIterables = 37,
    /// PRE_COPY data goes over the channels too. No other program than this library has that. Default: 0.
    PrecopyOverChannels = 38,
    /// The VM may run on the destination before its memory is there: refused. Default: 0.
    Postcopy = 39,
    /// The VM is saved while it runs on: refused. Default: 0.
    BackgroundSnapshot = 40,
}

/// A switch that can be left to its rule.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub enum Auto {
    /// By the rule.
    Auto = 0,
    /// On.
    On = 1,
    /// Off.
    Off = 2,
    /// As the VM's setting of the same name: for a device's settings.
    Inherit = 3,
}

pub(crate) fn auto(value: u64) -> Result<OnOffAuto> {
    match value {
        0 => Ok(OnOffAuto::Auto),
        1 => Ok(OnOffAuto::On),
        2 => Ok(OnOffAuto::Off),
        _ => Err(misuse(
            "value: VFM_SWITCH_AUTO, VFM_SWITCH_ON or VFM_SWITCH_OFF",
        )),
    }
}

pub(crate) fn switch(value: u64) -> Result<bool> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(misuse("value: 0 or 1")),
    }
}

pub(crate) fn size(value: u64) -> Result<usize> {
    usize::try_from(value).map_err(|_| misuse("value: too large"))
}

fn number(value: u64) -> Result<u32> {
    u32::try_from(value).map_err(|_| misuse("value: too large"))
}

const fn time(value: u64) -> Duration {
    match value {
        u64::MAX => Duration::MAX,
        _ => Duration::from_millis(value),
    }
}

/// Puts a task on a thread of C's.
pub(crate) type Spawner = Arc<dyn Fn(Task) -> io::Result<()> + Send + Sync>;

/// What has been set.
#[derive(Clone)]
pub(crate) struct Chosen {
    pub(crate) session: Settings,
    pub(crate) capabilities: Capabilities,
    pub(crate) spawner: Option<Spawner>,
}

impl Chosen {
    fn set(&mut self, key: u32, value: u64) -> Result<()> {
        let of = &mut self.session;
        let both = &mut self.capabilities;
        let is = |known: Setting| key == known as u32;
        match () {
            () if is(Setting::Backend) => {
                of.backend = match value {
                    0 => Backend::Auto,
                    1 => Backend::Uring,
                    2 => Backend::Blocking,
                    _ => return Err(misuse("value: 0 to 2")),
                }
            }
            () if is(Setting::Budget) => of.budget = Some(size(value)?).filter(|it| *it > 0),
            () if is(Setting::BufferLen) => of.buffer_len = size(value)?,
            () if is(Setting::DataLen) => of.data_len = Some(size(value)?).filter(|it| *it > 0),
            () if is(Setting::Window) => of.window = number(value)?,
            () if is(Setting::MaxPacket) => of.max_packet = number(value)?,
            () if is(Setting::Spill) => {
                of.spill = match value {
                    0 => Spill::Auto,
                    1 => Spill::Off,
                    2 => Spill::Memfd,
                    _ => return Err(misuse("value: 0 to 2")),
                }
            }
            () if is(Setting::SpillLimit) => of.spill_limit = value,
            () if is(Setting::Channels) => of.channels = number(value)?,
            () if is(Setting::MaxDevices) => {
                of.max_devices = Some(number(value)?).filter(|it| *it > 0);
            }
            () if is(Setting::StopAfterLoad) => {
                of.stop_after_load = match auto(value)? {
                    OnOffAuto::Auto => None,
                    OnOffAuto::On => Some(true),
                    OnOffAuto::Off => Some(false),
                }
            }
            () if is(Setting::Grace) => of.grace = time(value),
            () if is(Setting::NoProgress) => of.no_progress = time(value),
            () if is(Setting::HelloTimeout) => of.hello_timeout = time(value),
            () if is(Setting::PacketTimeout) => of.packet_timeout = time(value),
            () if is(Setting::ConfigReadyTimeout) => of.config_ready_timeout = time(value),
            () if is(Setting::Writer) => {
                of.writer = match value {
                    0 => Writer::Ring,
                    1 => Writer::Auto,
                    _ => return Err(misuse("value: 0 or 1")),
                }
            }
            () if is(Setting::Multifd) => both.multifd = switch(value)?,
            () if is(Setting::Compression) => both.compression = switch(value)?,
            () if is(Setting::ToFile) => both.to_file = switch(value)?,
            () if is(Setting::SwitchoverStart) => both.switchover_start = switch(value)?,
            () if is(Setting::SwitchoverAck) => {
                both.switchover_ack = match value {
                    0 => SwitchoverAck::Off,
                    1 => SwitchoverAck::Once,
                    2 => SwitchoverAck::Reusable,
                    _ => return Err(misuse("value: 0 to 2")),
                }
            }
            () if is(Setting::ConfigAfterIterables) => {
                both.config_after_iterables = auto(value)?;
                of.config_after_iterables = both.config_after_iterables == OnOffAuto::On;
            }
            () if is(Setting::PrecopyOverChannels) => {
                both.precopy_over_channels = switch(value)?;
                of.precopy_over_channels = both.precopy_over_channels;
            }
            () if is(Setting::Postcopy) => both.postcopy = switch(value)?,
            () if is(Setting::BackgroundSnapshot) => both.background_snapshot = switch(value)?,
            () => return Err(misuse("setting: no such setting")),
        }
        Ok(())
    }
}

/// Everything that is set for a session or a migration. What is started with it copies it, so it can be changed and
/// freed at any time. Any thread. Free it with `vfm_settings_free`.
pub struct SettingsHandle(Mutex<Chosen>);

impl SettingsHandle {
    pub(crate) fn chosen(&self) -> Chosen {
        lock(&self.0).clone()
    }
}

/// Makes settings, all at their defaults. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_settings_new(
    settings: Option<&mut MaybeUninit<*mut SettingsHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let settings = given(settings, "settings: NULL")?;
        let chosen = Chosen {
            session: Settings::default(),
            capabilities: Capabilities::default(),
            spawner: None,
        };
        hand_out(settings, SettingsHandle(Mutex::new(chosen)));
        Ok(())
    })
}

/// Frees settings. NULL is nothing. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_settings_free(settings: Option<Box<SettingsHandle>>) {
    quiet((), || drop(settings));
}

/// Sets `setting` (`enum vfm_setting`). A value that cannot be is refused here, or by `vfm_settings_check` and what
/// is started. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_settings_set(
    settings: Option<&SettingsHandle>,
    setting: u32,
    value: u64,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        lock(&given(settings, "settings: NULL")?.0).set(setting, value)
    })
}

/// Sets the VM's uuid, 16 bytes, which both ends' hellos have. Default: all zero. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_settings_set_uuid(
    settings: Option<&SettingsHandle>,
    uuid: *const c_void,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let settings = given(settings, "settings: NULL")?;
        let uuid = bytes(uuid, 16, "uuid: NULL")?;
        lock(&settings.0).session.uuid.copy_from_slice(uuid);
        Ok(())
    })
}

/// Spills to a file without a name in this directory, from all channels. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_settings_spill_to(
    settings: Option<&SettingsHandle>,
    directory: *const c_char,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let settings = given(settings, "settings: NULL")?;
        let directory = text(directory, "directory: NULL, or not UTF-8")?;
        lock(&settings.0).session.spill = Spill::Directory(PathBuf::from(directory));
        Ok(())
    })
}

/// Refuses what no session can do on this host: what a start would refuse. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_settings_check(
    settings: Option<&SettingsHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let settings = given(settings, "settings: NULL")?.chosen();
        settings.session.check()
    })
}

/// Writes the most memory that a load with these settings takes, in bytes, whatever the source sends. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_settings_memory_bound(
    settings: Option<&SettingsHandle>,
    devices: u32,
    channels: u32,
    bound: Option<&mut MaybeUninit<u64>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let settings = given(settings, "settings: NULL")?.chosen();
        let bound = given(bound, "bound: NULL")?;
        bound.write(settings.session.memory_bound(devices, channels)?.total());
        Ok(())
    })
}

// --------------------------------------------------------------------------------------- threads

/// What a task does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub enum TaskCode {
    /// Moves the bytes of all devices.
    Io = 0,
    /// Serves one channel.
    Channel = 1,
    /// Sets one device's states and calls its callbacks.
    Device = 2,
    /// Changes one device's state outside of a session.
    State = 3,
    /// A kind that this version of the header has no name for.
    Other = 4,
}

/// The work of one thread. `vfm_task_run` runs it and frees it.
pub struct TaskHandle {
    task: Mutex<Task>,
    kind: TaskCode,
    name: CString,
}

/// Runs all the library's work on threads of the caller's: `spawn` is called for each task, on any thread. It
/// starts a thread that calls `vfm_task_run(task)`, and returns 0 without waiting for it; or it does nothing with
/// the task, and returns a negative errno. `release` is called when the library is done with `opaque`, also where
/// this call fails; it may be NULL. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_settings_spawn_with(
    settings: Option<&SettingsHandle>,
    spawn_task: Option<
        unsafe extern "C" fn(opaque: *mut c_void, task: *mut TaskHandle) -> std::ffi::c_int,
    >,
    opaque: *mut c_void,
    release: Option<unsafe extern "C" fn(opaque: *mut c_void)>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let owned = Owned::new(opaque, release);
        let settings = given(settings, "settings: NULL")?;
        let function: Spawn<TaskHandle> = given(spawn_task, "spawn: NULL")?;
        let spawner: Spawner = Arc::new(move |task: Task| {
            let name = c_text(task.thread_name());
            let kind = match task.kind() {
                TaskKind::Io => TaskCode::Io,
                TaskKind::Channel(_) => TaskCode::Channel,
                TaskKind::Device(_) => TaskCode::Device,
                TaskKind::State(_) => TaskCode::State,
                _ => TaskCode::Other,
            };
            let task = Mutex::new(task);
            spawn(function, &owned, TaskHandle { task, kind, name })
        });
        lock(&settings.0).spawner = Some(spawner);
        Ok(())
    })
}

/// Runs a task on the calling thread, and frees it. Returns when its work is done. NULL is nothing. The thread that
/// was made for it.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_task_run(task: Option<Box<TaskHandle>>) {
    quiet((), || {
        if let Some(task) = task {
            unlocked(task.task).run();
        }
    });
}

/// Returns what a task does. Before it is run, on the thread that has it.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_task_kind(task: Option<&TaskHandle>) -> TaskCode {
    quiet(TaskCode::Other, || {
        task.map_or(TaskCode::Other, |task| task.kind)
    })
}

/// Returns a name for a task's thread, of 15 bytes at most: the task's text. Before it is run, on the thread that has
/// it.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_task_name(task: Option<&TaskHandle>) -> *const c_char {
    quiet(ptr::null(), || {
        task.map_or(ptr::null(), |task| task.name.as_ptr())
    })
}
