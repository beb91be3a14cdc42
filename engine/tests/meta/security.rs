//! The list of system calls in `docs/security.md`, by running the engine under filters made from it.
//!
//! Each case runs in a process of its own, in which every thread of two sessions, and the thread that
//! builds and joins them, may make the calls that the document lists for it and the backend, and dies
//! with the process at any other.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    fs::File,
    io::{self, PipeReader, Read, Seek, Write},
    os::unix::{net::UnixStream, process::ExitStatusExt},
    sync::{Arc, Mutex, mpsc},
    thread,
};

use nix::sys::memfd::{MFdFlags, memfd_create};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};
use vfio_migration::{Backend, LoadSession, SaveSession, Settings, Spill, Task, TaskKind, Writer};

use crate::{again::again, mock::Mock, pipes::collect};

const CASE: &str = "VFIO_MIGRATION_SECURITY_CASE";

const DOCUMENT: &str = include_str!("../../../docs/security.md");

/// Every call that the document may name.
fn numbers() -> BTreeMap<&'static str, i64> {
    macro_rules! calls {
        ($($name:ident $number:ident,)*) => { [$((stringify!($name), libc::$number)),*].into() };
    }
    calls! {
        brk SYS_brk, clock_nanosleep SYS_clock_nanosleep, clone3 SYS_clone3, close SYS_close,
        eventfd2 SYS_eventfd2, exit SYS_exit, fcntl SYS_fcntl, getrusage SYS_getrusage, fstat SYS_fstat, newfstatat SYS_newfstatat, futex SYS_futex,
        gettid SYS_gettid, ioctl SYS_ioctl, lseek SYS_lseek, io_uring_enter SYS_io_uring_enter,
        io_uring_register SYS_io_uring_register, io_uring_setup SYS_io_uring_setup,
        madvise SYS_madvise, memfd_create SYS_memfd_create, mmap SYS_mmap, mprotect SYS_mprotect, mremap SYS_mremap,
        munmap SYS_munmap, openat SYS_openat, poll SYS_poll, ppoll SYS_ppoll, preadv2 SYS_preadv2,
        prctl SYS_prctl, pread64 SYS_pread64, prlimit64 SYS_prlimit64, pwrite64 SYS_pwrite64, pwritev2 SYS_pwritev2, read SYS_read, readv SYS_readv,
        recvfrom SYS_recvfrom, recvmsg SYS_recvmsg,
        restart_syscall SYS_restart_syscall, rseq SYS_rseq,
        rt_sigprocmask SYS_rt_sigprocmask, sched_yield SYS_sched_yield,
        sched_getaffinity SYS_sched_getaffinity, sendmsg SYS_sendmsg, sendto SYS_sendto,
        set_robust_list SYS_set_robust_list, setsockopt SYS_setsockopt, shutdown SYS_shutdown,
        sigaltstack SYS_sigaltstack, statx SYS_statx, write SYS_write, writev SYS_writev,
    }
}

/// What the document lists: lines `| thread | calls with io_uring | calls of the blocking backend |`.
fn listed(thread: &str, backend: Backend) -> BTreeSet<&'static str> {
    let row = |wanted: &str| {
        let row = DOCUMENT.lines().find_map(|line| {
            let cells: Vec<_> = line.split('|').map(str::trim).collect();
            (cells.len() == 5 && cells[1] == wanted).then_some(cells)
        });
        let row = row.unwrap_or_else(|| panic!("the document has a row for {wanted:?}"));
        let cell = if backend == Backend::Blocking { 3 } else { 2 };
        row[cell].split('`').skip(1).step_by(2).collect::<Vec<_>>()
    };
    row("every thread").into_iter().chain(row(thread)).collect()
}

fn filter(thread: &str, backend: Backend) -> BpfProgram {
    let numbers = numbers();
    // `BACKEND THREAD CALL`: a case in which a thread may not make one of its calls.
    let case = env::var(CASE).unwrap_or_default();
    let mut words = case.split(' ').skip(1);
    let (from, call) = (words.next(), words.next());
    let banned = |name: &&str| from == Some(thread) && call == Some(*name);
    let listed = listed(thread, backend).into_iter();
    let rules = listed.filter(|name| !banned(name)).map(|name| {
        let number = numbers.get(name);
        let number = number.unwrap_or_else(|| panic!("{name} is no call that this test knows"));
        (*number, Vec::new())
    });
    let arch = env::consts::ARCH.try_into().unwrap();
    SeccompFilter::new(
        rules.collect(),
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        arch,
    )
    .unwrap()
    .try_into()
    .unwrap()
}

/// Puts tasks on threads with their filters. Those are made by a thread without one: what the
/// embedder's own spawner may call is the embedder's to say.
fn spawner(
    backend: Backend,
    filtered: bool,
) -> impl Fn(Task) -> io::Result<()> + Send + Sync + Clone + 'static {
    let (sender, tasks) = mpsc::channel::<Task>();
    thread::spawn(move || {
        for task in tasks {
            let kind = match task.kind() {
                TaskKind::Io => "I/O",
                TaskKind::Channel(_) => "channel",
                _ => "device",
            };
            let program = filter(kind, backend);
            let named = thread::Builder::new().name(task.thread_name().to_owned());
            let spawned = named.spawn(move || {
                if filtered {
                    apply_filter(&program).unwrap();
                }
                task.run();
            });
            spawned.unwrap();
        }
    });
    let sender = Arc::new(Mutex::new(sender));
    move |task| {
        let sender = sender.lock().unwrap();
        sender
            .send(task)
            .map_err(|_gone| io::ErrorKind::BrokenPipe.into())
    }
}

/// A source's pipe with `len` bytes in it.
fn full(len: usize) -> PipeReader {
    let (reader, mut writer) = io::pipe().unwrap();
    thread::spawn(move || writer.write_all(&vec![7; len]));
    reader
}

/// One migration of two devices over two channels, to its end or cancelled in the middle, and its
/// end. Everything on the calling thread is the engine's.
fn migrate(backend: Backend, cancelled: bool, filtered: bool) {
    let spawn = spawner(backend, filtered);
    let mut settings = Settings::default();
    settings.backend = backend;
    settings.budget = Some(1 << 20);
    settings.data_len = Some(64 << 10);
    let (mut load, mut save) = (LoadSession::builder(), SaveSession::builder());
    let mut got = Vec::new();
    let mut kept = Vec::new();
    // Nobody takes what the devices get before a packet has been spilled.
    let (spilled, gate) = mpsc::channel::<()>();
    let gate = Arc::new(Mutex::new(gate));
    for number in 0..2 {
        let (reader, writer) = io::pipe().unwrap();
        if cancelled {
            kept.push(reader);
        } else {
            let gate = gate.clone();
            got.push(thread::spawn(move || {
                let _gone = gate.lock().unwrap().recv();
                collect(reader).join().unwrap()
            }));
        }
        load = load.device(Mock::new(writer).device(number));
        save = save.device(Mock::new(full(3 << 20)).device(number));
        let (near, far) = UnixStream::pair().unwrap();
        (save, load) = (save.channel(near), load.channel(far));
    }
    // A data fd that has positions.
    let file = |bytes: &[u8]| {
        let memory = memfd_create(c"state", MFdFlags::MFD_CLOEXEC).unwrap();
        let mut file = File::from(memory);
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        file
    };
    let mut written = file(b"");
    let device = Mock::new(written.try_clone().unwrap()).device(2);
    load = load.device(device);
    save = save.device(Mock::new(file(&vec![7; 3 << 20])).device(2));
    let save = save.settings(settings.clone()).spawn_with(spawn.clone());
    settings.spill = Spill::Memfd;
    settings.writer = Writer::Auto;
    let load = load.settings(settings).spawn_with(spawn);
    let setup = filter("setup", backend);
    let (sender, ended) = mpsc::channel();
    thread::spawn(move || {
        if filtered {
            apply_filter(&setup).unwrap();
        }
        let load = load.start().unwrap();
        let save = save.start().unwrap();
        load.switchover_start();
        while load.stats().spill.packets == 0 {
            thread::yield_now();
        }
        drop(spilled);
        if cancelled {
            load.cancel();
            save.cancel();
        }
        let reports = (save.join(), load.join());
        sender.send(reports).unwrap();
        // Its end is not the engine's.
        thread::park();
    });
    let (saved, loaded) = ended.recv().unwrap();
    assert_eq!(saved.result.is_err(), cancelled);
    assert_eq!(loaded.result.is_err(), cancelled);
    drop((saved, loaded, kept));
    for got in got {
        assert_eq!(got.join().unwrap(), vec![7; 3 << 20]);
    }
    if !cancelled {
        let mut bytes = Vec::new();
        written.rewind().unwrap();
        written.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, vec![7; 3 << 20]);
    }
}

fn run(case: &str) {
    // glibc asks for the number of processors when a second thread allocates for the first time.
    thread::spawn(|| vec![0_u8; 100].len()).join().unwrap();
    let backend = if case.contains("uring") {
        Backend::Uring
    } else {
        Backend::Blocking
    };
    for cancelled in [false, true] {
        migrate(backend, cancelled, !case.contains("free"));
    }
    std::process::exit(0);
}

const TEST: &str = "the_engine_makes_the_calls_that_the_document_lists_and_no_other";

#[test]
fn the_engine_makes_the_calls_that_the_document_lists_and_no_other() {
    if let Ok(case) = env::var(CASE) {
        run(&case);
    }
    for (case, killed) in [
        ("uring", false),
        ("blocking", false),
        // That the filters bite: without one of its calls a thread ends the process.
        ("uring I/O io_uring_enter", true),
        ("uring channel writev", true),
        ("uring channel pwrite64", true),
        ("uring channel getrusage", true),
        ("uring I/O lseek", true),
        ("uring device futex", true),
        ("uring device newfstatat", true),
        ("uring setup eventfd2", true),
        ("uring setup memfd_create", true),
        ("blocking I/O ppoll", true),
        ("blocking I/O pwritev2", true),
        ("blocking I/O pwrite64", true),
        ("blocking I/O lseek", true),
        ("blocking setup eventfd2", true),
    ] {
        let output = again(module_path!(), TEST)
            .env(CASE, case)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        let ended = output.status.signal() == Some(libc::SIGSYS);
        assert_eq!(
            ended, killed,
            "{case}: a thread was ended for a call that docs/security.md does not list, or was not \
             for one that was banned: {text}"
        );
        assert!(killed || output.status.success(), "{case}: {text}");
    }
}
