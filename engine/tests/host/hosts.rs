//! Hosts that lack, forbid or ration something: the other backend by itself, or a clear error.
//!
//! Each case runs in a process of its own, under a seccomp filter or a limit that cannot be taken
//! back. (That each single call fails once is `process_faults/kernel.rs`.)

use std::{
    env,
    fs::File,
    io::{self, Write},
    os::unix::net::UnixStream,
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};
use vfio_migration::{Backend, Error, ErrorKind, LoadSession, Settings};

use crate::{
    again::again,
    leftovers::leftovers,
    mock::Mock,
    packets::{config_packet, hello, packet},
    pipes::collect,
    watchdog::Watchdog,
};

const CASE: &str = "VFIO_MIGRATION_HOST_CASE";

/// One small load. Returns the backend that it ran on. What it needs of the host besides is there
/// before `limit` is called.
fn load(backend: Backend, limit: impl FnOnce()) -> Result<&'static str, Error> {
    let (reader, writer) = io::pipe().unwrap();
    let (mut near, far) = UnixStream::pair().unwrap();
    let bytes = [hello(0), packet(1, 0, b"state"), config_packet(1, 1, b"c")].concat();
    near.write_all(&bytes).unwrap();
    drop(near);
    let got = collect(reader);
    let mut settings = Settings::default();
    settings.backend = backend;
    let builder = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(writer).device(1))
        .channel(far);
    limit();
    let ended = builder.start().map_err(Error::from).and_then(|load| {
        load.switchover_start();
        let report = load.join();
        let backend = report.stats.backend;
        drop(report.devices);
        report.result.map(|()| backend)
    });
    let got = got.join().unwrap();
    if ended.is_ok() {
        assert_eq!(got, b"state");
    }
    ended
}

/// From now on, in this process, `calls` end with `errno`.
fn forbid(calls: &[i64], errno: i32) {
    let filter = SeccompFilter::new(
        calls.iter().map(|&call| (call, Vec::new())).collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(errno.cast_unsigned()),
        env::consts::ARCH.try_into().unwrap(),
    );
    let program: BpfProgram = filter.unwrap().try_into().unwrap();
    apply_filter(&program).unwrap();
}

fn ration(resource: Resource, limit: u64) {
    let (_, hard) = getrlimit(resource).unwrap();
    setrlimit(resource, limit.min(hard), hard).unwrap();
}

/// What a process of its own does. Panics where the host's lack has another end than it should.
fn case(name: &str) {
    let _watchdog = Watchdog::new();
    let all = [
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
    ];
    let falls_back = |calls: &[i64], errno: i32| {
        forbid(calls, errno);
        assert_eq!(load(Backend::Auto, || {}).unwrap(), "blocking");
        // Who asks for the ring and nothing else hears why there is none.
        let error = load(Backend::Uring, || {}).unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::Host);
        assert_eq!(error.raw_os_error(), Some(errno));
    };
    match name {
        "missing" => falls_back(&all, libc::ENOSYS),
        "forbidden" => falls_back(&all, libc::EPERM),
        "forbidden otherwise" => falls_back(&all, libc::EACCES),
        "short of memory" => falls_back(&all[..1], libc::ENOMEM),
        "waits forbidden" => falls_back(&all[1..2], libc::EPERM),
        "registering forbidden" => falls_back(&all[2..], libc::EPERM),
        "neither" => {
            forbid(&all, libc::ENOSYS);
            forbid(&[libc::SYS_ppoll], libc::EPERM);
            let error = load(Backend::Auto, || {}).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error:?}");
        }
        "no locked memory" => {
            ration(Resource::RLIMIT_MEMLOCK, 0);
            // Kernels before 5.12 count a ring's memory.
            load(Backend::Auto, || {}).unwrap();
        }
        "few files" => {
            let mut refused = 0;
            for more in 0.. {
                let before = leftovers();
                // The lowest number that is free, and so many more.
                let ended = load(Backend::Auto, || {
                    let next = std::os::fd::AsRawFd::as_raw_fd(&File::open("/").unwrap());
                    let next = u64::try_from(next).unwrap();
                    ration(Resource::RLIMIT_NOFILE, next + more);
                });
                ration(Resource::RLIMIT_NOFILE, 1000);
                match ended {
                    Ok(_) => break,
                    Err(error) => {
                        assert_eq!(error.raw_os_error(), Some(libc::EMFILE), "{error:?}");
                        assert_eq!(*error.kind(), ErrorKind::Host, "{error:?}");
                        refused += 1;
                    }
                }
                while leftovers() != before {
                    std::thread::yield_now();
                }
            }
            assert!(
                refused >= 3,
                "a session has two eventfds and a ring at least"
            );
        }
        _ => panic!("no such case"),
    }
    std::process::exit(0);
}

const TEST: &str = "a_host_that_lacks_something_costs_speed_or_a_clear_error";

#[test]
fn a_host_that_lacks_something_costs_speed_or_a_clear_error() {
    if let Ok(name) = env::var(CASE) {
        case(&name);
    }
    for name in [
        "missing",
        "forbidden",
        "forbidden otherwise",
        "short of memory",
        "waits forbidden",
        "registering forbidden",
        "neither",
        "no locked memory",
        "few files",
    ] {
        let output = again(module_path!(), TEST)
            .env(CASE, name)
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {error}");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("running 1 test"), "{name}: {text}");
    }
}
