//! Which system calls the engine's threads make, shown by seccomp filters that kill the process.
//!
//! Each case runs in a process of its own: a filter cannot be taken back.

use std::{
    collections::BTreeMap,
    env,
    io::{self, Read},
    os::unix::{net::UnixStream, process::ExitStatusExt},
    sync::{Arc, Mutex},
    thread,
};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter,
};
use vfio_migration::{
    Backend, Device, DeviceId, LoadSession, SaveSession, Settings, TaskKind,
    sim::{SimConfig, SimDevice, Stream},
    wire::PacketHeader,
};

use crate::{again::again, mock::Mock, names::id};

const CASE: &str = "VFIO_MIGRATION_SYSTEM_CALL_CASE";

/// Every way to transfer bytes on a file by a call of one's own. Those of [`EVENTS`] are let
/// through where they move 8 bytes, which is how an eventfd is read and written.
const TRANSFERS: &[i64] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_sendfile,
    libc::SYS_splice,
    libc::SYS_vmsplice,
    libc::SYS_tee,
    libc::SYS_copy_file_range,
];

const EVENTS: &[i64] = &[libc::SYS_read, libc::SYS_write];

/// What memory needs.
const MEMORY: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
];

fn filter(calls: &[i64], listed: SeccompAction, others: SeccompAction) -> BpfProgram {
    let not_8 = || {
        let length = SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Ne, 8);
        vec![SeccompRule::new(vec![length.unwrap()]).unwrap()]
    };
    let rule = |call| {
        if EVENTS.contains(&call) {
            not_8()
        } else {
            Vec::new()
        }
    };
    let rules = calls.iter().map(|&call| (call, rule(call))).collect();
    let arch = env::consts::ARCH.try_into().unwrap();
    SeccompFilter::new(rules, others, listed, arch)
        .unwrap()
        .try_into()
        .unwrap()
}

/// Runs `case` in a process of its own. Returns whether a filter has killed it.
fn in_a_process(test: &str, case: &str) -> bool {
    let output = again(module_path!(), test)
        .env(CASE, case)
        .output()
        .unwrap();
    let killed = output.status.signal() == Some(libc::SIGSYS);
    let text = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(killed || output.status.success(), "{case}: {text}{error}");
    killed
}

/// A save and a load over which the drivers may not transfer anything by a call of their own. (The
/// devices' threads make the simulated devices' own, which may, and would inherit the filter.)
fn round_trip(backend: Backend) {
    let spawn = |task: vfio_migration::Task| {
        let banned = filter(TRANSFERS, SeccompAction::KillProcess, SeccompAction::Allow);
        let filtered = *task.kind() == TaskKind::Io;
        let thread = thread::Builder::new().name(task.thread_name().to_owned());
        thread
            .spawn(move || {
                if filtered {
                    apply_filter(&banned).unwrap();
                }
                task.run();
            })
            .map(drop)
    };
    let mut settings = Settings::default();
    settings.backend = backend;
    let sim = |seed| {
        let config = SimConfig {
            seed,
            len: 8 << 20,
            stream: Stream::Socket,
            ..SimConfig::default()
        };
        let sim = SimDevice::new(config).unwrap();
        let handle = sim.handle();
        let id = DeviceId::new("device", 0).unwrap();
        (Device::new(id, Box::new(sim)).unwrap(), handle)
    };
    let (source, saved) = sim(1);
    let (destination, loaded) = sim(2);
    let (near, far) = UnixStream::pair().unwrap();
    let load = LoadSession::builder()
        .settings(settings.clone())
        .device(destination)
        .channel(far)
        .spawn_with(spawn)
        .start()
        .unwrap();
    let save = SaveSession::builder()
        .settings(settings)
        .device(source)
        .channel(near)
        .spawn_with(spawn)
        .start()
        .unwrap();
    load.switchover_start();
    save.join().result.unwrap();
    load.join().result.unwrap();
    assert_eq!(saved.digest(), loaded.digest());
}

#[test]
fn the_default_backend_makes_no_read_or_write_call_on_a_data_fd() {
    // The filter is seen to work by the blocking backend, whose workers inherit it.
    match env::var(CASE).as_deref() {
        Ok("auto") => round_trip(Backend::Auto),
        Ok("blocking") => round_trip(Backend::Blocking),
        _ => {
            let test = "the_default_backend_makes_no_read_or_write_call_on_a_data_fd";
            assert!(!in_a_process(test, "auto"));
            assert!(in_a_process(test, "blocking"));
        }
    }
}

/// Publishes while the I/O thread is busy with a write that a full pipe blocks; on a thread that may
/// make no system call but for memory. Where `starved`, the I/O thread has said that it sleeps instead.
fn publish(starved: bool) {
    let (mut reader, writer) = io::pipe().unwrap();
    let id = id(1);
    let load = LoadSession::builder()
        .device(Mock::new(writer).device(1))
        .start()
        .unwrap();
    load.switchover_start();
    let mut first = load.publisher();
    let payload = |index, len| {
        let header = PacketHeader {
            index,
            config: false,
        };
        let mut payload = header.encode().to_vec();
        payload.resize(payload.len() + len, 7);
        payload
    };
    if !starved {
        // More than the pipe takes: when a byte is out, the write is under way.
        first.push(&id, &payload(0, 1 << 20)).unwrap();
        reader.read_exact(&mut [0]).unwrap();
    }
    let from = u32::from(!starved);
    let packets: Vec<_> = (from..from + 500)
        .map(|index| payload(index, 4096))
        .collect();
    let done = Arc::new(Mutex::new(false));
    let load = Arc::new(load);
    let publishing = thread::spawn({
        let (load, done) = (load.clone(), done.clone());
        move || {
            let mut publisher = load.publisher();
            // Once, for what is allocated on a thread's first use.
            *done.lock().unwrap() = false;
            let allowed = filter(MEMORY, SeccompAction::Allow, SeccompAction::KillProcess);
            apply_filter(&allowed).unwrap();
            for packet in &packets {
                publisher.push(&id, packet).unwrap();
            }
            // A plain store, and no call: the thread is not ended, for that would be one.
            *done.lock().unwrap() = true;
            loop {
                std::hint::spin_loop();
            }
        }
    });
    while !*done.lock().unwrap() {
        assert!(!publishing.is_finished());
        thread::yield_now();
    }
    std::process::exit(0);
}

#[test]
fn a_publisher_makes_no_system_call_while_the_io_thread_is_awake() {
    match env::var(CASE).as_deref() {
        Ok("awake") => publish(false),
        Ok("asleep") => publish(true),
        _ => {
            let test = "a_publisher_makes_no_system_call_while_the_io_thread_is_awake";
            assert!(!in_a_process(test, "awake"));
            // That the filter sees a call is seen where one is needed.
            assert!(in_a_process(test, "asleep"));
        }
    }
}

/// The filters above are made from numbers: that each is listed once is all that can go wrong.
#[test]
fn no_call_is_listed_twice() {
    let mut seen = BTreeMap::new();
    for call in TRANSFERS.iter().chain(MEMORY) {
        assert_eq!(seen.insert(call, ()), None);
    }
}
