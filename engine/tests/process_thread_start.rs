//! Every thread of the engine calls `on_thread_start` before it works, and with `spawn_with` the engine makes none.
//!
//! All threads of the process are counted, while a migration with every kind of task runs, and afterwards. One
//! test, for it looks at all threads of its process.
#![allow(missing_docs, reason = "a test")]

#[path = "support/mock.rs"]
mod mock;
#[path = "support/names.rs"]
mod names;
#[path = "support/watchdog.rs"]
mod watchdog;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Seek, Write},
    mem,
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
};

use nix::{
    sys::memfd::{MFdFlags, memfd_create},
    unistd::gettid,
};
use vfio_migration::{Backend, Channel, LoadSession, Relay, SaveSession, Settings, Task, TaskKind};

use crate::{mock::Mock, watchdog::Watchdog};

const DEVICES: u32 = 3;
const LEN: usize = 1 << 20;

/// Threads by their ids.
#[derive(Default)]
struct Ledger {
    /// The test's own, and what it was there before.
    own: BTreeSet<i32>,
    /// Made for a task, by the spawner.
    spawned: BTreeSet<i32>,
    /// The same, to be joined: one whose work another has done may be late.
    late: Vec<thread::JoinHandle<()>>,
    /// Those that have called the hook.
    begun: BTreeMap<i32, TaskKind>,
    /// All that were ever seen, with their names.
    seen: BTreeMap<i32, String>,
    /// Devices' calls on threads that had not called the hook.
    too_early: Vec<String>,
}

type Book = Arc<Mutex<Ledger>>;

fn threads() -> BTreeMap<i32, String> {
    let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
    let named = tasks.filter_map(|task| {
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        let id = task.file_name().to_str()?.parse().ok()?;
        Some((id, name.trim().to_owned()))
    });
    named.collect()
}

/// A thread of the test's own.
fn own<T: Send + 'static>(
    book: &Book,
    work: impl FnOnce() -> T + Send + 'static,
) -> thread::JoinHandle<T> {
    let book = book.clone();
    thread::spawn(move || {
        book.lock().unwrap().own.insert(gettid().as_raw());
        work()
    })
}

fn hook(book: &Book) -> impl Fn(&TaskKind) -> io::Result<()> + Send + Sync + 'static {
    let book = book.clone();
    move |kind: &TaskKind| {
        let mut book = book.lock().unwrap();
        let before = book.begun.insert(gettid().as_raw(), kind.clone());
        // An id may come again, for another thread.
        assert!(before.is_none_or(|before| before != TaskKind::Io));
        Ok(())
    }
}

fn spawner(book: &Book) -> impl Fn(Task) -> io::Result<()> + Send + Sync + 'static {
    let book = book.clone();
    move |task: Task| {
        let named = thread::Builder::new().name("embedders".into());
        let made = book.clone();
        let run = move || {
            made.lock().unwrap().spawned.insert(gettid().as_raw());
            task.run();
        };
        let thread = named.spawn(run)?;
        book.lock().unwrap().late.push(thread);
        Ok(())
    }
}

fn memory(bytes: &[u8]) -> File {
    let mut file = File::from(memfd_create(c"state", MFdFlags::MFD_CLOEXEC).unwrap());
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

/// Each call of the device must come from a thread that has begun, or from the caller's.
fn device(book: &Book, file: File, number: u32) -> vfio_migration::Device {
    let caller = gettid().as_raw();
    let book = book.clone();
    let mut mock = Mock::new(file);
    mock.set = Some(Box::new(move |state| {
        let thread = gettid().as_raw();
        let mut book = book.lock().unwrap();
        if thread != caller && !book.begun.contains_key(&thread) {
            let name = thread::current().name().unwrap_or_default().to_owned();
            book.too_early.push(format!("{state} on {name}"));
        }
        Ok(())
    }));
    mock.device(number)
}

/// A stream of the VMM's, as TLS is one.
fn custom(socket: UnixStream) -> Channel {
    let hung_up = socket.try_clone().unwrap();
    let finish = |socket: &mut UnixStream| socket.shutdown(Shutdown::Write);
    Channel::from_stream_with_finish(socket, finish, move || {
        let _closed = hung_up.shutdown(Shutdown::Both);
    })
}

/// A migration through a relay, of devices with every kind of task.
fn migrate(book: &Book, backend: Backend, spawned: bool) {
    let mut settings = Settings::default();
    settings.backend = backend;
    let mut load = LoadSession::builder().settings(settings.clone());
    let mut save = SaveSession::builder().settings(settings.clone());
    let mut relay = Relay::builder();
    (load, save, relay) = (
        load.on_thread_start(hook(book)),
        save.on_thread_start(hook(book)),
        relay.on_thread_start(hook(book)),
    );
    if spawned {
        (load, save, relay) = (
            load.spawn_with(spawner(book)),
            save.spawn_with(spawner(book)),
            relay.spawn_with(spawner(book)),
        );
    }
    for number in 0..DEVICES {
        load = load.device(device(book, memory(&[]), number));
        save = save.device(device(book, memory(&vec![7; LEN]), number));
    }
    let (near, relayed) = UnixStream::pair().unwrap();
    let (onward, far) = UnixStream::pair().unwrap();
    let relay = relay.start().unwrap();
    relay.add_channel(custom(relayed), custom(onward)).unwrap();
    relay.no_more_channels();
    let load = load.channel(custom(far)).start().unwrap();
    let save = save.channel(custom(near)).start().unwrap();
    load.switchover_start();
    let mut saved = save.join();
    saved.result.as_ref().unwrap();
    saved.stop_devices();
    let mut loaded = load.join();
    loaded.result.as_ref().unwrap();
    for report in &mut loaded.devices {
        assert!(report.device.is_some());
    }
    drop(relay.join());
    drop(saved);
}

#[test]
fn every_thread_begins_with_the_hook_and_spawn_with_makes_all_of_them() {
    let _watchdog = Watchdog::new();
    for (backend, spawned) in [
        (Backend::Uring, false),
        (Backend::Blocking, false),
        (Backend::Uring, true),
        (Backend::Blocking, true),
    ] {
        let book = Book::default();
        let before = threads();
        // What stays of the round before has ended, or is the harness's.
        book.lock().unwrap().own.extend(before.keys());
        let done = Arc::new(AtomicBool::new(false));
        let (watched, ended) = (book.clone(), done.clone());
        let watcher = own(&book, move || {
            while !ended.load(Relaxed) {
                watched.lock().unwrap().seen.extend(threads());
            }
        });
        migrate(&book, backend, spawned);
        let late = mem::take(&mut book.lock().unwrap().late);
        late.into_iter().for_each(|thread| thread.join().unwrap());
        done.store(true, Relaxed);
        watcher.join().unwrap();

        let Ledger {
            own,
            spawned: made,
            begun,
            mut seen,
            too_early,
            ..
        } = mem::take(&mut *book.lock().unwrap());
        assert!(too_early.is_empty(), "{too_early:?}");
        let case = format!("{backend}, spawned: {spawned}");
        // The kernel's own, for io_uring: no program's.
        seen.retain(|_, name| !name.starts_with("iou-"));
        for (thread, name) in &seen {
            let known = own.contains(thread) || begun.contains_key(thread);
            assert!(known, "{case}: {name} has not called the hook");
            let engines = !own.contains(thread) && !made.contains(thread);
            assert!(!(spawned && engines), "{case}: the engine has made {name}");
        }
        let kinds: BTreeSet<String> = begun
            .values()
            .map(|kind| {
                let text = kind.to_string();
                text.trim_end_matches(char::is_alphanumeric).to_owned() + "…"
            })
            .collect();
        let has = |wanted: fn(&TaskKind) -> bool| begun.values().any(wanted);
        assert!(has(|kind| *kind == TaskKind::Io), "{case}: {kinds:?}");
        assert!(has(|kind| matches!(kind, TaskKind::Channel(_))), "{case}");
        assert!(has(|kind| matches!(kind, TaskKind::Device(_))), "{case}");
        assert!(has(|kind| matches!(kind, TaskKind::State(_))), "{case}");
        assert!(has(|kind| *kind == TaskKind::Close), "{case}: {kinds:?}");
        let workers = has(|kind| *kind == TaskKind::Worker);
        assert_eq!(workers, backend == Backend::Blocking, "{case}: {kinds:?}");
        // All have ended: nobody's thread is left but who was there.
        let left = |name: &&String| name.starts_with("vfio-mig") || name.starts_with("uring-");
        let threads = threads();
        assert_eq!(threads.values().find(left), None, "{case}");
    }
}
