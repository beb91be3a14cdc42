//! A session ends when it is told to, wherever it is, and leaves nothing behind.
//!
//! Each case brings a load or a save to one place, cancels it there, and looks at what came back:
//! the errors say so, the devices are in the states that the report says, and no thread, file or
//! pipe is left over. Cases run one after the other, and alone in
//! their process, for they count its threads and files.
#![cfg(feature = "sim")]
#![allow(missing_docs, reason = "a test")]

#[path = "support/leftovers.rs"]
mod leftovers;
#[path = "support/mock.rs"]
mod mock;
#[path = "support/names.rs"]
mod names;
#[path = "support/packets.rs"]
mod packets;
#[path = "support/payload.rs"]
mod payload;
#[path = "support/pipes.rs"]
mod pipes;
#[path = "support/watchdog.rs"]
mod watchdog;

use std::{
    io::{self, PipeReader, PipeWriter, Read, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use vfio_migration::{
    Backend, DeviceState, ErrorKind, LoadSession, Report, SaveSession, Settings, Task, TaskKind,
};
use vfio_migration_uring::sim::{Fault, FaultPlan, SimConfig as RingConfig};

use crate::{
    leftovers::leftovers,
    mock::{Log, Mock},
    names::id,
    packets::{config_packet, hello, packet},
    payload::payload,
    pipes::collect,
    watchdog::Watchdog,
};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Runs a case by itself, and sees that it leaves nothing over.
struct Case {
    before: (usize, usize),
    _watchdog: Watchdog,
    _alone: MutexGuard<'static, ()>,
}

impl Case {
    fn new() -> Self {
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let watchdog = Watchdog::new();
        Self {
            before: leftovers(),
            _watchdog: watchdog,
            _alone: alone,
        }
    }
}

impl Drop for Case {
    fn drop(&mut self) {
        if thread::panicking() {
            return;
        }
        let more = || {
            let (now, before) = (leftovers(), self.before);
            (now.0 > before.0 || now.1 > before.1).then_some((now, before))
        };
        // A thread that was joined may be listed for a moment more. What a case before has left to
        // end by itself may have ended meanwhile.
        let deadline = Instant::now() + Duration::from_secs(10);
        while more().is_some() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(more(), None, "threads and files");
    }
}

fn settings(backend: Backend) -> Settings {
    let mut settings = Settings::default();
    settings.backend = backend;
    settings.budget = Some(1 << 20);
    settings.data_len = Some(64 << 10);
    settings
}

const BACKENDS: [Backend; 2] = [Backend::Uring, Backend::Blocking];

/// The ways to end a load.
const ENDS: [fn(LoadSession) -> Option<Report>; 4] = [
    |load| {
        load.cancel();
        load.cancel();
        Some(load.join())
    },
    |load| Some(load.cleanup()),
    |load| {
        thread::scope(|scope| {
            scope.spawn(|| load.cancel());
        });
        Some(load.cleanup())
    },
    |load| {
        drop(load);
        None
    },
];

struct Loading {
    load: LoadSession,
    reader: PipeReader,
    near: UnixStream,
    log: Arc<Mutex<Log>>,
}

fn loading(settings: Settings, adjust: impl FnOnce(&mut Mock)) -> Loading {
    let (reader, writer) = io::pipe().unwrap();
    let mut mock = Mock::new(writer);
    adjust(&mut mock);
    let log = mock.log.clone();
    let (near, far) = UnixStream::pair().unwrap();
    let load = LoadSession::builder()
        .settings(settings)
        .device(mock.device(1))
        .channel(far)
        .start()
        .unwrap();
    Loading {
        load,
        reader,
        near,
        log,
    }
}

/// Brings a load somewhere and ends it there, in every way, on every backend.
fn cancelled_load(adjust: impl Fn(&mut Settings), there: impl Fn(&mut Loading)) {
    for backend in BACKENDS {
        for end in ENDS {
            let _case = Case::new();
            let mut settings = settings(backend);
            adjust(&mut settings);
            let mut loading = loading(settings, |_| {});
            there(&mut loading);
            let Loading {
                load,
                reader,
                near,
                log,
            } = loading;
            if let Some(report) = end(load) {
                let device = &report.devices[0];
                let error = device.result.as_ref().unwrap_err();
                assert!(error.is_cancelled(), "{backend}: {error:?}");
                assert_eq!(error.device(), Some(&id(1)));
                let state = device.device.as_ref().unwrap().state();
                assert_eq!(state, DeviceState::Running, "{backend}");
                assert_eq!(report.abandoned_threads, 0);
            }
            assert_eq!(log.lock().unwrap().resets, 1, "a RESUMING device is reset");
            drop((reader, near));
        }
    }
}

#[test]
fn a_load_before_its_channels_hello() {
    cancelled_load(|_| {}, |_| {});
}

#[test]
fn a_load_that_is_held() {
    cancelled_load(
        |_| {},
        |loading| {
            let bytes = [hello(0), packet(1, 0, b"held")].concat();
            loading.near.write_all(&bytes).unwrap();
        },
    );
}

#[test]
fn a_load_that_is_starved() {
    cancelled_load(
        |_| {},
        |loading| {
            loading.load.switchover_start();
            let bytes = [hello(0), packet(1, 0, b"x")].concat();
            loading.near.write_all(&bytes).unwrap();
            loading.reader.read_exact(&mut [0]).unwrap();
        },
    );
}

#[test]
fn a_load_in_the_middle_of_a_packet() {
    cancelled_load(
        |_| {},
        |loading| {
            loading.load.switchover_start();
            let bytes = [hello(0), packet(1, 0, &[7; 1000])].concat();
            loading.near.write_all(&bytes[..500]).unwrap();
        },
    );
}

#[test]
fn a_load_whose_write_a_full_pipe_blocks() {
    cancelled_load(
        |_| {},
        |loading| {
            loading.load.switchover_start();
            let bytes = [hello(0), packet(1, 0, &[7; 300_000])].concat();
            loading.near.write_all(&bytes).unwrap();
            loading.reader.read_exact(&mut [0]).unwrap();
        },
    );
}

#[test]
fn a_load_whose_channel_waits_for_room() {
    cancelled_load(
        |_| {},
        |loading| {
            let mut writer = loading.near.try_clone().unwrap();
            // More than the budget: it ends when the load hangs up.
            thread::spawn(move || {
                let mut bytes = hello(0);
                for index in 0..40 {
                    bytes.extend(packet(1, index, &[7; 60_000]));
                }
                let _hung_up = writer.write_all(&bytes);
            });
            while loading.load.stats().devices[0].queued < 10 {
                thread::sleep(Duration::from_millis(1));
            }
        },
    );
}

#[test]
fn a_load_that_waits_for_the_config_to_be_ready() {
    cancelled_load(
        |settings| settings.config_after_iterables = true,
        |loading| {
            loading.load.switchover_start();
            let bytes = [hello(0), packet(1, 0, b"x"), config_packet(1, 1, b"c")].concat();
            loading.near.write_all(&bytes).unwrap();
            loading.reader.read_exact(&mut [0]).unwrap();
            while loading.load.stats().devices[0].packets < 2 {
                thread::sleep(Duration::from_millis(1));
            }
        },
    );
}

#[test]
fn a_config_callback_that_blocks_is_left_behind_and_named() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let _watchdog = Watchdog::new();
    let (release, released) = mpsc::channel::<()>();
    let (entered, inside) = mpsc::channel();
    let mut settings = settings(Backend::Auto);
    settings.grace = Duration::from_millis(50);
    let mut loading = loading(settings, |mock| {
        mock.load = Some(Box::new(move |_| {
            entered.send(()).unwrap();
            released.recv().map_err(io::Error::other)
        }));
    });
    loading.load.switchover_start();
    let bytes = [hello(0), config_packet(1, 0, b"c")].concat();
    loading.near.write_all(&bytes).unwrap();
    inside.recv().unwrap();
    let report = loading.load.cleanup();
    let device = &report.devices[0];
    let error = device.result.as_ref().unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Stuck);
    assert_eq!(error.device(), Some(&id(1)));
    assert!(device.device.is_none() && report.abandoned_threads > 0);
    drop(release);
}

/// A driver that never gives a transfer back: an operation of the simulated ring that sticks.
#[test]
fn a_device_that_never_answers_is_left_behind_and_harms_nobody() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let _watchdog = Watchdog::new();
    for cancel in [true, false] {
        let mut settings = settings(Backend::Auto);
        settings.grace = Duration::from_millis(50);
        settings.no_progress = Duration::from_millis(500);
        let (stuck, to_stuck) = io::pipe().unwrap();
        let (other, to_other) = io::pipe().unwrap();
        let got = collect(other);
        let plan = FaultPlan::new().with(0, Fault::Stick);
        let ring = RingConfig {
            plan: plan.clone(),
            ..RingConfig::default()
        };
        let load = LoadSession::builder()
            .settings(settings)
            .device(Mock::new(to_stuck).device(1))
            .device(Mock::new(to_other).device(2))
            .simulated_ring(ring)
            .start()
            .unwrap();
        load.switchover_start();
        let mut publisher = load.publisher();
        publisher
            .push(&id(1), &payload(0, false, b"never"))
            .unwrap();
        while plan.executed() == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        for (index, config) in [(0, false), (1, true)] {
            let data = if config {
                vfio_migration::wire::wrap_config(b"c")
            } else {
                b"unharmed".to_vec()
            };
            publisher
                .push(&id(2), &payload(index, config, &data))
                .unwrap();
        }
        while load.stats().devices[1].phases.resume.is_zero() {
            thread::sleep(Duration::from_millis(1));
        }
        drop(publisher);
        if cancel {
            load.cancel();
        }
        let report = load.join();
        let error = report.devices[0].result.as_ref().unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::Stuck, "{error:?}");
        assert_eq!((error.device(), error.index()), (Some(&id(1)), Some(0)));
        assert!(report.devices[0].device.is_none(), "it must not be touched");
        assert!(report.devices[1].result.is_ok());
        drop(report);
        assert_eq!(got.join().unwrap(), b"unharmed");
        drop(stuck);
    }
    // A new session in the same process.
    a_session_works();
}

fn a_session_works() {
    let mut loading = loading(settings(Backend::Auto), |_| {});
    loading.load.switchover_start();
    let bytes = [hello(0), packet(1, 0, b"x"), config_packet(1, 1, b"c")].concat();
    loading.near.write_all(&bytes).unwrap();
    drop(loading.near);
    let report = loading.load.join();
    report.result.unwrap();
    assert_eq!(loading.log.lock().unwrap().config, b"c");
}

// ------------------------------------------------------------------------------------ save

/// Brings a save somewhere, cancels it there, and sees its device put back.
fn cancelled_save(there: impl Fn(&SaveSession, &mut PipeWriter, &mut UnixStream)) {
    for backend in BACKENDS {
        for end in [
            (|save| {
                save.cancel();
                Some(save.join())
            }) as fn(SaveSession) -> Option<Report>,
            |save| Some(save.cleanup()),
            |save| {
                drop(save);
                None
            },
        ] {
            let _case = Case::new();
            let (reader, mut writer) = io::pipe().unwrap();
            let mock = Mock::new(reader);
            let log = mock.log.clone();
            let (near, mut far) = UnixStream::pair().unwrap();
            let save = SaveSession::builder()
                .settings(settings(backend))
                .device(mock.device(1))
                .channel(near)
                .start()
                .unwrap();
            there(&save, &mut writer, &mut far);
            if let Some(report) = end(save) {
                let device = &report.devices[0];
                let error = device.result.as_ref().unwrap_err();
                assert!(error.is_cancelled(), "{backend}: {error:?}");
                assert_eq!(error.device(), Some(&id(1)));
                let state = device.device.as_ref().unwrap().state();
                assert_eq!(state, DeviceState::Running);
            }
            let states = log.lock().unwrap().states.clone();
            assert_eq!(states, [DeviceState::StopCopy, DeviceState::Running]);
        }
    }
}

#[test]
fn a_save_whose_read_an_empty_pipe_blocks() {
    cancelled_save(|_, _, _| {});
    cancelled_save(|_, writer, far| {
        writer.write_all(b"state").unwrap();
        // Hello, SYNC, and the packet: it has gone through the ring.
        far.read_exact(&mut [0; 64 + 1344 + 288 + 5]).unwrap();
    });
}

#[test]
fn a_save_whose_peer_does_not_read() {
    cancelled_save(|save, writer, _| {
        let mut writer = writer.try_clone().unwrap();
        thread::spawn(move || {
            // Ends with the device's end of the pipe.
            while writer.write_all(&[7; 4096]).is_ok() {}
        });
        // Until no more can be read: the channel stands in its write with the rest.
        while save.stats().held + (128 << 10) < save.stats().budget {
            thread::sleep(Duration::from_millis(1));
        }
    });
}

#[test]
fn one_devices_failure_ends_the_others() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let _watchdog = Watchdog::new();
    // A save: one device refuses STOP_COPY, or its config; the other waits in a read.
    for refuses_state in [true, false] {
        let (first, _first) = io::pipe().unwrap();
        let (second, second_writer) = io::pipe().unwrap();
        let mut bad = Mock::new(second);
        if refuses_state {
            bad.set = Some(Box::new(|state| match state {
                DeviceState::StopCopy => Err(io::Error::from_raw_os_error(libc::EIO)),
                _ => Ok(()),
            }));
        } else {
            bad.save = Some(Box::new(|_| panic!("as told")));
        }
        let (near, _far) = UnixStream::pair().unwrap();
        let started = SaveSession::builder()
            .device(Mock::new(first).device(1))
            .device(bad.device(2))
            .channel(near)
            .start();
        let error = match started {
            Err(failed) => failed.error,
            Ok(save) => save.join().result.unwrap_err(),
        };
        assert_eq!(error.device(), Some(&id(2)), "{error:?}");
        let kind = if refuses_state {
            ErrorKind::State
        } else {
            ErrorKind::Panicked
        };
        assert_eq!(*error.kind(), kind);
        drop(second_writer);
    }
    // A load: one device's pipe breaks.
    let (first, to_first) = io::pipe().unwrap();
    let (second, to_second) = io::pipe().unwrap();
    drop(second);
    let load = LoadSession::builder()
        .device(Mock::new(to_first).device(1))
        .device(Mock::new(to_second).device(2))
        .start()
        .unwrap();
    load.switchover_start();
    let mut publisher = load.publisher();
    publisher.push(&id(2), &payload(0, false, b"x")).unwrap();
    drop(publisher);
    let report = load.join();
    let error = report.result.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EPIPE));
    assert_eq!((error.device(), error.index()), (Some(&id(2)), Some(0)));
    assert!(
        report.devices[0]
            .result
            .as_ref()
            .unwrap_err()
            .is_cancelled()
    );
    drop(first);
}

// --------------------------------------------------------------------------- the embedder's

#[test]
fn a_task_that_is_dropped_or_not_spawned_fails_the_session() {
    let _case = Case::new();
    for kind in ["io", "channel 0", "device"] {
        for refuse in [true, false] {
            let (_reader, writer) = io::pipe().unwrap();
            let (_near, far) = UnixStream::pair().unwrap();
            let spawn = move |task: Task| {
                if task.kind().to_string().starts_with(kind) {
                    return if refuse {
                        Err(io::ErrorKind::OutOfMemory.into())
                    } else {
                        Ok(())
                    };
                }
                thread::Builder::new().spawn(move || task.run()).map(drop)
            };
            let started = LoadSession::builder()
                .settings(settings(Backend::Auto))
                .device(Mock::new(writer).device(1))
                .channel(far)
                .spawn_with(spawn)
                .start();
            let error = match started {
                Err(failed) => failed.error,
                Ok(load) => {
                    load.switchover_start();
                    load.join().result.unwrap_err()
                }
            };
            let kind = error.kind();
            let named = matches!(
                kind,
                ErrorKind::Host | ErrorKind::Misuse(_) | ErrorKind::Internal(_)
            );
            assert!(named || error.is_cancelled(), "{kind:?}");
        }
    }
}

#[test]
fn an_embedders_threads_run_everything() {
    let _case = Case::new();
    let kinds = Arc::new(Mutex::new(Vec::new()));
    let spawn = {
        let kinds = kinds.clone();
        move |task: Task| {
            kinds.lock().unwrap().push(task.kind().clone());
            assert!(task.thread_name().len() <= 15);
            thread::Builder::new().spawn(move || task.run()).map(drop)
        }
    };
    let (reader, writer) = io::pipe().unwrap();
    let got = collect(reader);
    let (mut near, far) = UnixStream::pair().unwrap();
    let load = LoadSession::builder()
        .settings(settings(Backend::Auto))
        .device(Mock::new(writer).device(1))
        .channel(far)
        .spawn_with(spawn)
        .start()
        .unwrap();
    load.switchover_start();
    let bytes = [hello(0), packet(1, 0, b"x"), config_packet(1, 1, b"c")].concat();
    near.write_all(&bytes).unwrap();
    drop(near);
    load.join().result.unwrap();
    assert_eq!(got.join().unwrap(), b"x");
    let kinds = kinds.lock().unwrap();
    let expected = [TaskKind::Io, TaskKind::Device(id(1)), TaskKind::Channel(0)];
    assert_eq!(*kinds, expected);
}

#[test]
fn an_event_loop_hears_of_the_end() {
    let _case = Case::new();
    let Loading { load, mut near, .. } = loading(settings(Backend::Auto), |_| {});
    load.switchover_start();
    let readable = |load: &LoadSession| {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let mut fds = [PollFd::new(load.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() == 1
    };
    assert!(!readable(&load));
    near.write_all(&[hello(0), config_packet(1, 0, b"c")].concat())
        .unwrap();
    drop(near);
    while !load.is_finished() {
        thread::sleep(Duration::from_millis(1));
    }
    let devices = load.wait_devices();
    assert!(devices[0].result.is_ok());
    assert!(readable(&load));
    load.join().result.unwrap();
}

#[test]
fn devices_come_and_go_while_channels_run() {
    let _case = Case::new();
    let mut settings = settings(Backend::Auto);
    settings.max_devices = Some(3);
    let (first, to_first) = io::pipe().unwrap();
    let (second, to_second) = io::pipe().unwrap();
    let got = [collect(first), collect(second)];
    let load = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(to_first).device(1))
        .start()
        .unwrap();
    load.switchover_start();
    let mut publisher = load.publisher();
    publisher.push(&id(1), &payload(0, false, b"x")).unwrap();
    load.add_device(Mock::new(to_second).device(2)).unwrap();
    load.switchover_start();
    let removed = load.remove_device(&id(1)).unwrap();
    assert_eq!(removed.state(), DeviceState::Running);
    drop(removed);
    assert_eq!(
        *load.remove_device(&id(1)).unwrap_err().kind(),
        ErrorKind::Misuse("no such device")
    );
    publisher.push(&id(2), &payload(0, false, b"y")).unwrap();
    let config = vfio_migration::wire::wrap_config(b"c");
    publisher.push(&id(2), &payload(1, true, &config)).unwrap();
    drop(publisher);
    let report = load.join();
    report.result.unwrap();
    assert_eq!(report.devices.len(), 1);
    drop(report.devices);
    let [first, second] = got.map(|got| got.join().unwrap());
    assert!(b"x".starts_with(&first[..]));
    assert_eq!(second, b"y");
}

#[test]
fn two_sessions_know_nothing_of_each_other() {
    let _case = Case::new();
    let [mut one, two] = [(); 2].map(|()| loading(settings(Backend::Auto), |_| {}));
    one.load.switchover_start();
    two.load.cancel();
    assert!(two.load.join().result.unwrap_err().is_cancelled());
    one.near
        .write_all(&[hello(0), config_packet(1, 0, b"c")].concat())
        .unwrap();
    drop(one.near);
    one.load.join().result.unwrap();
}

/// `join` has the session, and the handle cancels it: of a load and of a save.
#[test]
fn a_canceller_ends_a_join_from_another_thread() {
    for backend in BACKENDS {
        let _case = Case::new();
        let Loading { load, near, .. } = loading(settings(backend), |_| {});
        load.switchover_start();
        let canceller = load.canceller();
        let joining = thread::spawn(move || load.join());
        while !canceller.is_over() {
            canceller.clone().cancel();
            thread::sleep(Duration::from_millis(1));
        }
        let report = joining.join().unwrap();
        assert!(report.result.unwrap_err().is_cancelled());
        assert_eq!(
            report.devices[0].device.as_ref().unwrap().state(),
            DeviceState::Running
        );
        drop((near, report.devices));
        // The session's memory, threads and files are gone, and the handle is not.
        canceller.cancel();

        let (reader, writer) = io::pipe().unwrap();
        let (near, far) = UnixStream::pair().unwrap();
        let save = SaveSession::builder()
            .settings(settings(backend))
            .device(Mock::new(reader).device(1))
            .channel(near)
            .start()
            .unwrap();
        let canceller = save.canceller();
        let joining = thread::spawn(move || save.join());
        let reason = vfio_migration::Error::new(ErrorKind::Channel, vfio_migration::Phase::Section);
        canceller.fail(reason);
        let report = joining.join().unwrap();
        assert_eq!(*report.result.unwrap_err().kind(), ErrorKind::Channel);
        assert!(canceller.is_over());
        drop((writer, far));
    }
}

/// Sessions are dropped before anything, with and without a switchover, from another thread.
#[test]
fn a_session_can_be_dropped_anywhere() {
    for backend in BACKENDS {
        for started in [false, true] {
            let _case = Case::new();
            let Loading { load, near, .. } = loading(settings(backend), |_| {});
            if started {
                load.switchover_start();
            }
            thread::spawn(move || drop(load)).join().unwrap();
            drop(near);
        }
    }
}

/// A source whose driver never gives a read back: the other device goes back to work.
#[test]
fn a_source_that_never_answers_is_left_behind_and_harms_nobody() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let _watchdog = Watchdog::new();
    for end in [SaveSession::join, SaveSession::cleanup] {
        let mut settings = settings(Backend::Auto);
        settings.grace = Duration::from_millis(50);
        let (first, _first) = io::pipe().unwrap();
        let (second, mut state) = io::pipe().unwrap();
        state.write_all(b"state").unwrap();
        drop(state);
        let (near, _far) = UnixStream::pair().unwrap();
        let plan = FaultPlan::new().with(0, Fault::Stick);
        let ring = RingConfig {
            plan: plan.clone(),
            ..RingConfig::default()
        };
        let save = SaveSession::builder()
            .settings(settings)
            .device(Mock::new(first).device(1))
            .device(Mock::new(second).device(2))
            .channel(near)
            .simulated_ring(ring)
            .start()
            .unwrap();
        // Only the second device's read is ever executed: the first one's pipe stays empty.
        while plan.executed() == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        save.cancel();
        let report = end(save);
        let stuck = report.devices[1].result.as_ref().unwrap_err();
        assert_eq!(*stuck.kind(), ErrorKind::Stuck, "{stuck:?}");
        assert_eq!(stuck.device(), Some(&id(2)));
        assert!(report.devices[1].device.is_none(), "it must not be touched");
        assert!(report.stats.leaked_transfers > 0 && report.abandoned_threads > 0);
        let other = &report.devices[0];
        assert!(other.result.as_ref().unwrap_err().is_cancelled());
        let state = other.device.as_ref().unwrap().state();
        assert_eq!(state, DeviceState::Running);
    }
    a_session_works();
}
