//! Whose threads touch the devices: every change of state, in a session and outside, runs on a thread of
//! the embedder's spawner or on the caller's; the engine's own threads block all signals; and a thread that
//! is refused, lost or late leaves no device in its old state.
//!
//! One test, for it looks at all threads of its process.
#![cfg(feature = "sim")]
#![allow(missing_docs, reason = "a test")]

#[path = "support/around.rs"]
mod around;
#[path = "support/names.rs"]
mod names;
#[path = "support/watchdog.rs"]
mod watchdog;

use std::{
    fs, io,
    os::unix::net::UnixStream,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use around::Around;
use nix::sys::signal::{SigSet, Signal};
use vfio_migration::{
    Device, DeviceState, LoadSession, SaveSession, Task, TaskKind,
    migration::{
        Capabilities, DeviceSettings, Incoming, MigratableDevice, OnOffAuto, Outgoing,
        OutgoingDevice, SwitchoverAck, SwitchoverAcks, vm,
    },
    sim::{Callback, SimConfig, SimDevice},
};

use crate::{names::id, watchdog::Watchdog};

/// What a callback has seen.
#[derive(Debug)]
struct Seen {
    thread: String,
    blocked: SigSet,
    /// The engine's own threads, and whether each blocks all signals.
    own: Vec<(String, bool)>,
}

type Log = Arc<Mutex<Vec<Seen>>>;

fn all_blocked(set: SigSet) -> bool {
    let others =
        Signal::iterator().filter(|signal| !matches!(signal, Signal::SIGKILL | Signal::SIGSTOP));
    others.into_iter().all(|signal| set.contains(signal))
}

/// The engine's own threads there are, by `/proc`.
fn own_threads() -> Vec<(String, bool)> {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let own = tasks.filter_map(|task| {
        let path = task.ok()?.path();
        let name = fs::read_to_string(path.join("comm"))
            .ok()?
            .trim()
            .to_owned();
        if !name.starts_with("vfio-mig") && !name.starts_with("uring-") {
            return None;
        }
        let status = fs::read_to_string(path.join("status")).ok()?;
        // Of one that has just ended the kernel shows no signal as blocked.
        if status.contains("State:\tX") || status.contains("State:\tZ") {
            return None;
        }
        let blocked = status
            .lines()
            .find_map(|line| line.strip_prefix("SigBlk:"))?;
        let blocked = u64::from_str_radix(blocked.trim(), 16).ok()?;
        let all = Signal::iterator().all(|signal| {
            matches!(signal, Signal::SIGKILL | Signal::SIGSTOP)
                || blocked & 1 << (signal as i32 - 1) != 0
        });
        Some((name, all))
    });
    own.collect()
}

/// A simulated device that says who touches it.
fn watched(log: Log) -> Around {
    let device = SimDevice::new(SimConfig::default()).unwrap();
    Around::new(device, move |callback, call| {
        use Callback::{LoadConfig, Reset, SaveConfig, SetState};
        if matches!(callback, SetState | Reset | SaveConfig | LoadConfig) {
            // So that others' threads are there at the same time.
            thread::sleep(Duration::from_millis(2));
            log.lock().unwrap().push(Seen {
                thread: thread::current().name().unwrap_or_default().to_owned(),
                blocked: SigSet::thread_get_mask().unwrap(),
                own: own_threads(),
            });
        }
        call()
    })
}

const DEVICES: u32 = 3;

type Spawn = Arc<dyn Fn(Task) -> io::Result<()> + Send + Sync>;

/// Every way in which a set of devices changes its states. Returns what the callbacks saw.
fn everything(spawn: Option<&Spawn>) -> Vec<Seen> {
    let log = Log::default();
    let device = |number| {
        let mut device = Device::new(id(number), Box::new(watched(log.clone()))).unwrap();
        if let Some(spawn) = spawn.cloned() {
            device.spawn_with(move |task| spawn(task));
        }
        device
    };
    let devices = || -> Vec<Device> { (0..DEVICES).map(device).collect() };
    let migratable = || -> Vec<MigratableDevice> {
        let mut settings = DeviceSettings::default();
        settings.transfer = OnOffAuto::Off;
        let realize = |device| MigratableDevice::new(device, settings.clone());
        devices().into_iter().map(realize).collect()
    };
    let in_state = |devices: &[MigratableDevice], state| {
        assert_eq!(devices.len(), DEVICES as usize);
        assert!(
            devices.iter().all(|device| device.state() == state),
            "{devices:?}"
        );
    };

    // The VM pauses and goes on.
    let mut set = migratable();
    vm::stop(&mut set, vm::Reason::Pause).unwrap();
    in_state(&set, DeviceState::Stop);
    vm::start(&mut set).unwrap();
    in_state(&set, DeviceState::Running);

    // Two switchovers over the main channel, one cleaned up and one aborted.
    for abort in [false, true] {
        let acks = SwitchoverAcks::new(SwitchoverAck::Off);
        let capabilities = Capabilities::default();
        let source = |migratable| {
            OutgoingDevice::setup(migratable, &capabilities, &acks, Vec::new()).unwrap()
        };
        let mut sources: Vec<_> = migratable().into_iter().map(source).collect();
        vm::stop(&mut sources, vm::Reason::FinishMigration).unwrap();
        let mut outgoing = Outgoing::begin(sources, SaveSession::builder()).unwrap();
        for number in 0..DEVICES {
            outgoing.write_state(&id(number), Vec::new()).unwrap();
        }
        for number in 0..DEVICES {
            outgoing.write_config(&id(number), Vec::new()).unwrap();
        }
        let saved = outgoing.finish().unwrap();
        if abort {
            in_state(&saved.abort(), DeviceState::Running);
        } else {
            in_state(&saved.cleanup().unwrap(), DeviceState::Stop);
        }
    }

    // A destination that is given up.
    let approve = Box::new(|| Ok(()));
    let capabilities = Capabilities::default();
    let incoming =
        Incoming::setup(migratable(), &capabilities, LoadSession::builder(), approve).unwrap();
    incoming.cancel();
    in_state(
        &incoming.finish().unwrap_err().into_back(),
        DeviceState::Running,
    );

    // A save that is stopped, one that fails, and a load.
    for fails in [false, true] {
        let (near, mut far) = UnixStream::pair().unwrap();
        let reading = thread::spawn(move || io::copy(&mut far, &mut io::sink()));
        let mut builder = SaveSession::builder().channel(near);
        for device in devices() {
            builder = builder.device(device);
        }
        if let Some(spawn) = spawn.cloned() {
            builder = builder.spawn_with(move |task| spawn(task));
        }
        let session = builder.start().unwrap();
        if fails {
            session.cancel();
        }
        let mut report = session.join();
        report.stop_devices();
        for device in &report.devices {
            let state = device.device.as_ref().unwrap().state();
            let expected = if fails {
                DeviceState::Running
            } else {
                DeviceState::Stop
            };
            assert_eq!(state, expected);
        }
        drop(report);
        reading.join().unwrap().unwrap();
    }
    let mut log = log.lock().unwrap();
    std::mem::take(&mut *log)
}

#[test]
fn every_thread_comes_from_the_spawner_or_blocks_all_signals() {
    let _watchdog = Watchdog::new();
    let caller = thread::current().name().unwrap().to_owned();

    // The embedder's: no thread of the engine's is there, at any callback.
    let kinds: Arc<Mutex<Vec<TaskKind>>> = Arc::default();
    let hook: Spawn = Arc::new({
        let kinds = kinds.clone();
        move |task: Task| {
            kinds.lock().unwrap().push(task.kind().clone());
            let thread = thread::Builder::new().name("embedders".into());
            thread.spawn(|| task.run()).map(drop)
        }
    });
    for seen in everything(Some(&hook)) {
        assert!(["embedders", &*caller].contains(&&*seen.thread), "{seen:?}");
        assert_eq!(seen.own, []);
    }
    let kinds = std::mem::take(&mut *kinds.lock().unwrap());
    for number in 1..DEVICES {
        let of_this = kinds
            .iter()
            .filter(|kind| **kind == TaskKind::State(id(number)));
        assert!(of_this.count() >= 10, "{kinds:?}");
    }

    // The engine's: each blocks all signals.
    let mut own = 0;
    for seen in everything(None) {
        if seen.thread != caller {
            assert!(seen.thread.starts_with("vfio-mig"), "{seen:?}");
            assert!(all_blocked(seen.blocked), "{seen:?}");
        }
        for (name, blocked) in &seen.own {
            assert!(blocked, "{name}");
            own += usize::from(name == "vfio-mig-state");
        }
    }
    assert!(own > 0, "several devices change their states at once");

    // Threads for changes of state are refused, lost, or late: the caller does the work.
    let late: Arc<Mutex<Vec<Task>>> = Arc::default();
    for way in ["refused", "lost", "late"] {
        let late = late.clone();
        let hook: Spawn = Arc::new(move |task: Task| match (task.kind(), way) {
            (TaskKind::State(_), "refused") => Err(io::ErrorKind::OutOfMemory.into()),
            (TaskKind::State(_), "lost") => {
                drop(task);
                Ok(())
            }
            (TaskKind::State(_), _) => {
                late.lock().unwrap().push(task);
                Ok(())
            }
            _ => thread::Builder::new().spawn(|| task.run()).map(drop),
        });
        everything(Some(&hook));
    }
    let late = std::mem::take(&mut *late.lock().unwrap());
    assert!(!late.is_empty());
    late.into_iter().for_each(Task::run);
}
