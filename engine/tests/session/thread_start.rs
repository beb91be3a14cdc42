//! A thread whose first step fails does no work: the session fails and says so, and every device comes back.

use std::{
    fs::File,
    io::{self, Seek, Write},
    os::unix::net::UnixStream,
};

use nix::sys::memfd::{MFdFlags, memfd_create};
use vfio_migration::{
    Backend, DeviceState, ErrorKind, LoadSession, SaveSession, Settings, TaskKind,
};

use crate::mock::Mock;

fn memory(bytes: &[u8]) -> File {
    let mut file = File::from(memfd_create(c"state", MFdFlags::MFD_CLOEXEC).unwrap());
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

type Fails = fn(&TaskKind) -> bool;

/// Two devices are saved, on threads of which some fail. Returns what became of the session.
fn save(backend: Backend, fails: Fails, panics: bool) -> Result<(), vfio_migration::Error> {
    let mut settings = Settings::default();
    settings.backend = backend;
    let (near, far) = UnixStream::pair().unwrap();
    let load = LoadSession::builder().settings(settings.clone());
    let load = load.channel(far).devices((0..2).map(|number| {
        let mut mock = Mock::new(memory(&[]));
        mock.load = Some(Box::new(|config| {
            io::copy(config, &mut io::sink()).map(drop)
        }));
        mock.device(number)
    }));
    let load = load.start().unwrap();
    load.switchover_start();
    let builder = SaveSession::builder()
        .settings(settings)
        .channel(near)
        .devices((0..2).map(|number| Mock::new(memory(&[7; 100_000])).device(number)))
        .on_thread_start(move |kind| {
            if !fails(kind) {
                return Ok(());
            }
            assert!(!panics, "the hook panics");
            Err(io::Error::other("no filter for this thread"))
        });
    let result = match builder.start() {
        Ok(session) => {
            let mut report = session.join();
            let failed = report.result.is_err();
            report.stop_devices();
            for report in &report.devices {
                let device = report.device.as_ref().expect("it comes back");
                let expected = if failed {
                    DeviceState::Running
                } else {
                    DeviceState::Stop
                };
                assert_eq!(device.state(), expected);
            }
            report.result
        }
        Err(failed) => {
            let (error, devices) = failed.into_parts();
            assert_eq!(devices.len(), 2, "both come back: {error}");
            for device in &devices {
                assert_eq!(device.state(), DeviceState::Running);
            }
            Err(error)
        }
    };
    drop(load);
    result
}

#[test]
fn a_thread_whose_first_step_fails_fails_its_session_and_gives_the_devices_back() {
    let kinds: [(Fails, bool); 4] = [
        (|kind| *kind == TaskKind::Io, false),
        (|kind| matches!(kind, TaskKind::Channel(_)), false),
        (|kind| matches!(kind, TaskKind::Device(_)), false),
        (|kind| *kind == TaskKind::Worker, true),
    ];
    for (fails, blocking_alone) in kinds {
        for backend in [Backend::Uring, Backend::Blocking] {
            for panics in [false, true] {
                let result = save(backend, fails, panics);
                if blocking_alone && backend == Backend::Uring {
                    result.unwrap();
                    continue;
                }
                let error = result.unwrap_err();
                assert_eq!(*error.kind(), ErrorKind::Host, "{error}");
                let why = std::error::Error::source(&error).unwrap().to_string();
                let expected = if panics {
                    "on_thread_start has panicked"
                } else {
                    "no filter for this thread"
                };
                assert_eq!(why, expected, "{error}");
            }
        }
    }
}

#[test]
fn a_helper_whose_first_step_fails_leaves_its_work_to_the_caller() {
    for backend in [Backend::Uring, Backend::Blocking] {
        let helpers: Fails = |kind| matches!(kind, TaskKind::State(_) | TaskKind::Close);
        save(backend, helpers, false).unwrap();
    }
}
