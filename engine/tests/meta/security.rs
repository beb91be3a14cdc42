//! The lists of system calls ([`system_calls`]), by running the engine under filters made from them; and the table
//! of `docs/security.md`, which is made from them too.
//!
//! Each case runs in a process of its own, in which every thread of two sessions, and the thread that
//! builds and joins them, may make the calls that are listed for it and the backend, and dies
//! with the process at any other. The threads are made by one without a filter; or by the engine, and then the
//! filter of the thread that starts the sessions is theirs as well.

use std::{
    collections::BTreeMap,
    env,
    fs::File,
    io::{self, PipeReader, Read, Seek, Write},
    iter,
    net::Shutdown,
    os::unix::{net::UnixStream, process::ExitStatusExt},
    sync::{Arc, Mutex, mpsc},
    thread,
};

use nix::sys::memfd::{MFdFlags, memfd_create};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};
use vfio_migration::{
    Backend, Channel, LoadSession, Role, SaveSession, Settings, Spill, Task, TaskKind, Writer,
    system_call_names, system_calls,
};

use crate::{again::again, mock::Mock, pipes::collect};

const CASE: &str = "VFIO_MIGRATION_SECURITY_CASE";

const DOCUMENT: &str = include_str!("../../../docs/security.md");

/// The rows of the document's table.
const ROWS: [(&str, Role); 7] = [
    ("setup", Role::Setup),
    ("I/O", Role::Io),
    ("worker", Role::Worker),
    ("channel", Role::Channel),
    ("device", Role::Device),
    ("PRE_COPY", Role::Precopy),
    ("close", Role::Close),
];

fn filter(role: Role, backend: Backend) -> BpfProgram {
    // `BACKEND THREAD CALL`: a case in which a thread may not make one of its calls.
    let case = env::var(CASE).unwrap_or_default();
    let mut words = case.split(' ').skip(1);
    let (from, call) = (words.next(), words.next());
    let from = ROWS.iter().find(|(name, _)| Some(*name) == from);
    let banned = |name: &str| from.is_some_and(|(_, it)| *it == role) && call == Some(name);
    let calls = system_calls(role, backend).iter();
    let named = calls.zip(system_call_names(role, backend));
    let mut rules: BTreeMap<i64, _> = named
        .filter(|(_, name)| !banned(name))
        .map(|(number, _)| (*number, Vec::new()))
        .collect();
    let inherited = matches!(role, Role::SetupWithThreads | Role::Io);
    if inherited && env::var(CASE).is_ok_and(|case| case.ends_with("engine")) {
        // What installs the narrower filters.
        rules.extend([libc::SYS_seccomp, libc::SYS_prctl].map(|call| (call, Vec::new())));
    }
    let arch = env::consts::ARCH.try_into().unwrap();
    SeccompFilter::new(
        rules,
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
            let program = filter(task.kind().role(), backend);
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

/// Who makes the threads.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Threads {
    /// The test, without filters.
    Free,
    /// The test, each with its filter.
    Given,
    /// The engine, under the filter of the thread that starts the sessions, and then its own.
    Engine,
}

/// A stream of the embedder's.
fn custom(socket: UnixStream) -> Channel {
    let hung_up = socket.try_clone().unwrap();
    let finish = |socket: &mut UnixStream| socket.shutdown(Shutdown::Write);
    Channel::from_stream_with_finish(socket, finish, move || {
        let _closed = hung_up.shutdown(Shutdown::Both);
    })
}

/// One migration of two devices over two channels, to its end or cancelled in the middle, and its
/// end. Everything on the calling thread is the engine's.
fn migrate(backend: Backend, cancelled: bool, threads: Threads) {
    let filtered = threads != Threads::Free;
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
        let near = if number == 0 {
            custom(near)
        } else {
            near.into()
        };
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
    save = save.settings(settings.clone());
    settings.spill = Spill::Memfd;
    settings.writer = Writer::Auto;
    load = load.settings(settings);
    let setup = if threads == Threads::Engine {
        let begin = move |kind: &TaskKind| {
            apply_filter(&filter(kind.role(), backend)).map_err(io::Error::other)
        };
        (save, load) = (save.on_thread_start(begin), load.on_thread_start(begin));
        Role::SetupWithThreads
    } else {
        let spawn = spawner(backend, filtered);
        (save, load) = (save.spawn_with(spawn.clone()), load.spawn_with(spawn));
        Role::Setup
    };
    let setup = filter(setup, backend);
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
        let (mut saved, loaded) = (save.join(), load.join());
        saved.stop_devices();
        let results = [saved.result.is_err(), loaded.result.is_err()];
        drop((saved, loaded));
        sender.send(results).unwrap();
        // Its end is not the engine's.
        thread::park();
    });
    assert_eq!(ended.recv().unwrap(), [cancelled; 2]);
    drop(kept);
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
    let threads = match case.split(' ').next_back() {
        Some("free") => Threads::Free,
        Some("engine") => Threads::Engine,
        _ => Threads::Given,
    };
    for cancelled in [false, true] {
        migrate(backend, cancelled, threads);
    }
    std::process::exit(0);
}

const TEST: &str = "the_engine_makes_the_calls_that_are_listed_and_no_other";

#[test]
fn the_engine_makes_the_calls_that_are_listed_and_no_other() {
    if let Ok(case) = env::var(CASE) {
        run(&case);
    }
    for (case, killed) in [
        ("uring", false),
        ("blocking", false),
        ("uring engine", false),
        ("blocking engine", false),
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
        ("blocking worker pwrite64", true),
        ("blocking I/O lseek", true),
        ("blocking worker pwritev2", true),
        ("uring close futex", true),
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
            "{case}: a thread was ended for a call that `system_calls` does not list, or was not \
             for one that was banned: {text}"
        );
        assert!(killed || output.status.success(), "{case}: {text}");
    }
}

/// The document's table, as it should be.
fn table() -> String {
    let cell = |role, backend| {
        let every = system_calls(Role::Close, backend);
        let calls = system_calls(role, backend).iter();
        let named = calls.zip(system_call_names(role, backend));
        let own = named.filter(|(call, _)| role == Role::Close || !every.contains(call));
        let own: Vec<_> = own.map(|(_, name)| format!("`{name}`")).collect();
        own.join(" ")
    };
    let mut table = String::from("| thread | with io_uring | blocking backend |\n|---|---|---|\n");
    let rows = ROWS.iter().filter(|(_, role)| *role != Role::Close);
    for (name, role) in iter::once(&("every thread", Role::Close)).chain(rows) {
        let [uring, blocking] = [Backend::Uring, Backend::Blocking].map(|it| cell(*role, it));
        table += &format!("| {name} | {uring} | {blocking} |\n");
    }
    table
}

#[test]
fn the_documents_table_is_made_of_the_lists() {
    const MARKS: [&str; 2] = ["<!-- system calls -->\n", "<!-- end -->"];
    let (before, rest) = DOCUMENT.split_once(MARKS[0]).expect("the table has a mark");
    let (written, behind) = rest.split_once(MARKS[1]).expect("the table has an end");
    let table = table();
    if env::var_os("DRAW").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/security.md");
        let [begin, end] = MARKS;
        std::fs::write(path, format!("{before}{begin}{table}{end}{behind}")).unwrap();
    } else {
        assert_eq!(written, table, "DRAW=1 writes it");
    }
}
