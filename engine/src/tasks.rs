//! The threads of a session: what each runs, who makes it, and how its end is known.
//!
//! ```text
//!   session ──▶ Task { kind, body } ──▶ Spawner ──▶ a thread: task.run()
//!                                                      │ returns, panics, or is dropped unrun
//!                                                      ▼
//!                                        Tasks: one fewer at work; notify; eventfd
//! ```
//!
//! The engine makes the threads, unless the VMM gives a spawner. Then the VMM runs each task on a thread
//! that it made. Either way the thread first calls the VMM's hook ([`Threads::begin`]): there the VMM sets
//! affinity, priority and a seccomp filter. And either way the task itself announces its end, so nobody waits in
//! a join for a thread that the kernel holds.
//!
//! Every thread of the engine is made by [`Threads::run`], also those that belong to no session.

use std::{fmt, io, mem, panic, panic::AssertUnwindSafe, thread::JoinHandle, time::Instant};
// Loom's takes no `dyn`.
use std::sync::Arc as SharedFn;

use nix::sys::eventfd::{EfdFlags, EventFd};
use vfio_migration_uring::{SpawnWorker, Worker, thread};

use crate::{
    error::{Error, ErrorKind, Phase, Result},
    id::DeviceId,
    reorder::waiters::Waiters,
    sync::{
        Arc, Mutex,
        atomic::{
            AtomicU32,
            Ordering::{AcqRel, Acquire, Relaxed},
        },
        lock,
    },
    system_calls::Role,
};

/// What a task does.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum TaskKind {
    /// Moves the bytes of all devices. One per session. Sleeps in the ring. A relay has no ring: its task
    /// sleeps
    /// on a condition variable.
    Io,
    /// Serves one channel; the number is its place in the order given to the session. Sleeps in the channel's
    /// socket. A relay has two such tasks per channel: one receives, one sends.
    Channel(u32),
    /// Sets one device's states and runs its callbacks.
    Device(DeviceId),
    /// Changes one device's state outside of a session, while other devices' states change too. If the task is
    /// refused, dropped or late, the waiting thread does its work.
    State(DeviceId),
    /// Iterates all devices in PRE_COPY, beside the VMM's own iterations
    /// ([`Precopy`](crate::migration::Precopy)). Sleeps in a device's driver, or in a channel's socket.
    Precopy,
    /// Makes the system calls of one transfer at a time, for the I/O thread, which hands this task out. Only with
    /// [`Backend::Blocking`](crate::Backend::Blocking). Sleeps in `ppoll` or in a data fd's read or write.
    Worker,
    /// Closes the channels over streams of the VMM's, when a save's report or a migration's clean-up ends: it hangs
    /// up on those that have not ended in time. If the task is refused or dropped, they are closed at once.
    Close,
}

impl TaskKind {
    /// Which of a VMM's filters the thread takes: see [`system_calls`](crate::system_calls).
    #[must_use]
    pub const fn role(&self) -> Role {
        match self {
            Self::Io => Role::Io,
            Self::Channel(_) => Role::Channel,
            Self::Device(_) | Self::State(_) => Role::Device,
            Self::Precopy => Role::Precopy,
            Self::Worker => Role::Worker,
            Self::Close => Role::Close,
        }
    }
}

impl fmt::Display for TaskKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io => f.write_str("io"),
            Self::Channel(number) => write!(f, "channel {number}"),
            Self::Device(id) => write!(f, "device {id}"),
            Self::State(id) => write!(f, "a state of device {id}"),
            Self::Precopy => f.write_str("PRE_COPY"),
            Self::Worker => f.write_str("a worker of the ring"),
            Self::Close => f.write_str("the closing of channels"),
        }
    }
}

/// The work of one thread: run it once, on a thread of its own. Dropping it unrun fails the session.
#[must_use = "a task that is not run fails its session"]
pub struct Task {
    kind: TaskKind,
    name: String,
    body: Box<dyn FnOnce() + Send>,
}

impl Task {
    /// What it does.
    #[must_use]
    pub const fn kind(&self) -> &TaskKind {
        &self.kind
    }

    /// Returns a name for the task's thread, of 15 bytes at most.
    #[must_use]
    pub fn thread_name(&self) -> &str {
        &self.name
    }

    /// Does the work on the calling thread. Returns when the work is done; never panics.
    pub fn run(self) {
        (self.body)();
    }
}

impl fmt::Debug for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Task")
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

/// The name of the I/O thread.
pub(crate) const IO_THREAD: &str = "vfio-mig-io";

/// The name of a worker of the blocking ring.
const WORKER_THREAD: &str = "uring-worker";

/// Puts a task on a thread.
type Spawner = SharedFn<dyn Fn(Task) -> io::Result<()> + Send + Sync>;

/// What each thread calls before it works.
type Hook = SharedFn<dyn Fn(&TaskKind) -> io::Result<()> + Send + Sync>;

/// What the VMM has said about threads: who makes them, and what each does first.
#[derive(Clone, Default)]
pub(crate) struct Threads {
    spawner: Option<Spawner>,
    hook: Option<Hook>,
}

impl Threads {
    /// The VMM makes the threads.
    pub(crate) fn spawn_with(
        &mut self,
        spawn: impl Fn(Task) -> io::Result<()> + Send + Sync + 'static,
    ) {
        self.spawner = Some(SharedFn::new(spawn));
    }

    /// Each thread calls this first.
    pub(crate) fn on_start(
        &mut self,
        hook: impl Fn(&TaskKind) -> io::Result<()> + Send + Sync + 'static,
    ) {
        self.hook = Some(SharedFn::new(hook));
    }

    /// Takes from others what is not said here.
    pub(crate) fn adopt(&mut self, others: &Self) {
        if self.spawner.is_none() {
            self.spawner.clone_from(&others.spawner);
        }
        if self.hook.is_none() {
            self.hook.clone_from(&others.hook);
        }
    }

    /// What a thread does first. A thread whose hook fails does no work.
    fn begin(&self, kind: &TaskKind) -> io::Result<()> {
        let Some(hook) = &self.hook else {
            return Ok(());
        };
        panic::catch_unwind(AssertUnwindSafe(|| hook(kind)))
            .unwrap_or_else(|_| Err(io::Error::other("on_thread_start has panicked")))
    }

    /// Runs a task: on a thread of the embedder's, or of the engine's, with all signals blocked, which is to be
    /// joined. `work` is told why it must not work, where the thread's first step has failed.
    fn run(
        &self,
        kind: TaskKind,
        name: String,
        work: impl FnOnce(io::Result<()>) + Send + 'static,
    ) -> io::Result<Option<JoinHandle<()>>> {
        let (threads, started) = (self.clone(), kind.clone());
        let task = Task {
            kind,
            name: name.clone(),
            body: Box::new(move || work(threads.begin(&started))),
        };
        match &self.spawner {
            Some(spawner) => spawner(task).map(|()| None),
            None => thread::spawn(&name, || task.run()).map(Some),
        }
    }

    /// Starts a task that belongs to no session. Nobody is told of its end; a thread whose first step fails
    /// does no work.
    pub(crate) fn start(
        &self,
        kind: TaskKind,
        name: &str,
        work: impl FnOnce() + Send + 'static,
    ) -> io::Result<Option<JoinHandle<()>>> {
        self.run(kind, name.into(), |begun| {
            if begun.is_ok() {
                work();
            }
        })
    }

    /// Starts a ring's workers.
    pub(crate) fn workers(&self) -> SpawnWorker {
        let threads = self.clone();
        SharedFn::new(move |worker: Worker| {
            let work = |begun: io::Result<()>| match begun {
                Ok(()) => worker.run(),
                Err(error) => worker.fail(error),
            };
            threads.run(TaskKind::Worker, WORKER_THREAD.into(), work)
        })
    }
}

impl fmt::Debug for Threads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Threads")
            .field("spawn_with", &self.spawner.is_some())
            .field("on_thread_start", &self.hook.is_some())
            .finish()
    }
}

/// All threads of one session.
pub(crate) struct Tasks {
    made_by: Threads,
    threads: Mutex<Vec<JoinHandle<()>>>,
    at_work: AtomicU32,
    done: Waiters,
    event: EventFd,
}

impl Tasks {
    pub(crate) fn new(made_by: Threads) -> Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let event = EventFd::from_value_and_flags(0, flags)
            .map_err(|errno| Error::new(ErrorKind::Host, Phase::Setup).caused_by(errno))?;
        Ok(Self {
            made_by,
            threads: Mutex::new(Vec::new()),
            at_work: AtomicU32::new(0),
            done: Waiters::new(),
            event,
        })
    }

    /// Starts a task. `ended` is called at its end, with a panic's error if there was one, or that
    /// the task was never run.
    pub(crate) fn spawn(
        tasks: &Arc<Self>,
        kind: TaskKind,
        name: String,
        body: impl FnOnce() + Send + 'static,
        ended: impl FnOnce(Option<Error>) + Send + 'static,
    ) -> Result<()> {
        // Relaxed: whoever waits for the end starts after this thread has returned.
        tasks.at_work.fetch_add(1, Relaxed);
        let handing = Arc::new(Mutex::new(Handing::Under));
        let mut end = End {
            tasks: tasks.clone(),
            kind: kind.clone(),
            ran: false,
            ended: Some(Box::new(ended)),
            handing: handing.clone(),
        };
        let thread = format!("thread for {kind}");
        let work = move |begun: io::Result<()>| {
            end.ran = true;
            match begun.map(|()| panic::catch_unwind(AssertUnwindSafe(body))) {
                Ok(Ok(())) => {}
                Ok(Err(_panic)) => {
                    end.announce(Some(Error::new(ErrorKind::Panicked, Phase::Cleanup)));
                }
                Err(error) => {
                    let lacking = "start of a thread (on_thread_start)";
                    end.announce(Some(Error::lacking(Phase::Setup, lacking, error)));
                }
            }
            drop(end);
        };
        let spawned = tasks.made_by.run(kind, name, work).map(|own| {
            lock(&tasks.threads).extend(own);
        });
        let spawned = spawned.map_err(|error| Error::lacking(Phase::Setup, &thread, error));
        let left = mem::replace(&mut *lock(&handing), Handing::Over);
        if let Handing::Dropped(mut end) = left {
            // Now it is known why.
            let why = spawned.as_ref().err().cloned();
            end.announce(Some(why.unwrap_or_else(End::not_run)));
        }
        spawned
    }

    /// Who makes the threads.
    pub(crate) const fn threads(&self) -> &Threads {
        &self.made_by
    }

    /// Whether every task has ended.
    pub(crate) fn is_idle(&self) -> bool {
        // Acquire: what the tasks did is seen.
        self.at_work.load(Acquire) == 0
    }

    /// How many tasks have not ended.
    pub(crate) fn at_work(&self) -> usize {
        // Acquire: as above.
        self.at_work.load(Acquire) as usize
    }

    /// Tells whoever waits that there is something to look at.
    pub(crate) fn notify(&self) {
        self.done.notify_all();
        // A counter at its end has long been readable.
        let _full = self.event.write(1);
    }

    /// Waits until `look` finds what it looks for, or `deadline`.
    pub(crate) fn wait<R>(
        &self,
        deadline: Option<Instant>,
        look: impl FnMut() -> Option<R>,
    ) -> Option<R> {
        self.done.wait(deadline, look)
    }

    /// Readable when something has ended.
    pub(crate) const fn event(&self) -> &EventFd {
        &self.event
    }

    /// Joins the engine's own threads that have ended; the kernel may hold others. Where it has
    /// kept a transfer, the I/O thread's is one: a thread cannot exit before what it has submitted ends,
    /// though its work is done. Returns how many were left behind, the embedder's included.
    pub(crate) fn join(&self, leaked: bool) -> usize {
        let mut threads = lock(&self.threads);
        let all_ended = self.is_idle();
        for thread in threads.drain(..) {
            let held = leaked && thread.thread().name() == Some(IO_THREAD);
            if !held && (all_ended || thread.is_finished()) {
                // Panics are caught inside.
                let _caught = thread.join();
            }
        }
        self.at_work() + usize::from(leaked)
    }

    /// Lost wake-ups, found by the periodic re-check. Must be 0.
    pub(crate) fn late(&self) -> u64 {
        self.done.late()
    }
}

impl fmt::Debug for Tasks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tasks")
            .field("idle", &self.is_idle())
            .finish_non_exhaustive()
    }
}

type Ended = Box<dyn FnOnce(Option<Error>) + Send>;

/// Whether a task is being handed to its spawner.
enum Handing {
    Under,
    /// It was dropped meanwhile: the spawner's result says why.
    Dropped(Box<End>),
    Over,
}

/// Announces a task's end, however it comes.
struct End {
    tasks: Arc<Tasks>,
    kind: TaskKind,
    ran: bool,
    ended: Option<Ended>,
    handing: Arc<Mutex<Handing>>,
}

impl End {
    fn not_run() -> Error {
        Error::misuse(Phase::Setup, "a task was dropped without being run")
    }

    fn announce(&mut self, error: Option<Error>) {
        if let Some(ended) = self.ended.take() {
            let error = error.map(|error| match &self.kind {
                TaskKind::Io | TaskKind::Precopy | TaskKind::Worker | TaskKind::Close => error,
                TaskKind::Channel(number) => error.on_channel(*number),
                TaskKind::Device(id) | TaskKind::State(id) => error.on_device(id),
            });
            ended(error);
        }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        if !self.ran && self.ended.is_some() {
            let mut handing = lock(&self.handing);
            if matches!(*handing, Handing::Under) {
                *handing = Handing::Dropped(Box::new(Self {
                    tasks: self.tasks.clone(),
                    kind: self.kind.clone(),
                    ran: false,
                    ended: self.ended.take(),
                    handing: Arc::new(Mutex::new(Handing::Over)),
                }));
                return;
            }
        }
        let error = (!self.ran).then(Self::not_run);
        self.announce(error);
        // AcqRel: the last one's notice covers what all did.
        self.tasks.at_work.fetch_sub(1, AcqRel);
        self.tasks.notify();
    }
}
