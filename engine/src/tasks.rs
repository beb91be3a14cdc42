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
//! that it made, with its own name, affinity and seccomp filter. Either way the task itself announces its
//! end, so nobody waits in a join for a thread that the kernel holds.

use std::{fmt, io, mem, panic, panic::AssertUnwindSafe, thread::JoinHandle, time::Instant};
// Loom's takes no `dyn`.
use std::sync::Arc as SharedFn;

use nix::sys::eventfd::{EfdFlags, EventFd};
use vfio_migration_uring::thread;

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
}

impl fmt::Display for TaskKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io => f.write_str("io"),
            Self::Channel(number) => write!(f, "channel {number}"),
            Self::Device(id) => write!(f, "device {id}"),
            Self::State(id) => write!(f, "a state of device {id}"),
            Self::Precopy => f.write_str("PRE_COPY"),
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

/// Puts a task on a thread.
pub(crate) type Spawner = SharedFn<dyn Fn(Task) -> io::Result<()> + Send + Sync>;

/// The VMM's spawner.
pub(crate) fn spawner(spawn: impl Fn(Task) -> io::Result<()> + Send + Sync + 'static) -> Spawner {
    SharedFn::new(spawn)
}

/// Starts a task that belongs to no session: on a thread of the embedder's, or of the engine's. Nobody
/// is told of its end; the engine's own thread is to be joined.
pub(crate) fn start(
    kind: TaskKind,
    spawner: Option<&Spawner>,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<Option<JoinHandle<()>>> {
    let name = match kind {
        TaskKind::Precopy => "vfio-mig-pre",
        _ => "vfio-mig-state",
    };
    match spawner {
        Some(spawner) => spawner(Task {
            kind,
            name: name.into(),
            body: Box::new(work),
        })
        .map(|()| None),
        None => thread::spawn(name, work).map(Some),
    }
}

/// All threads of one session.
pub(crate) struct Tasks {
    spawner: Option<Spawner>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    at_work: AtomicU32,
    done: Waiters,
    event: EventFd,
}

impl Tasks {
    pub(crate) fn new(spawner: Option<Spawner>) -> Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let event = EventFd::from_value_and_flags(0, flags)
            .map_err(|errno| Error::new(ErrorKind::Host, Phase::Setup).caused_by(errno))?;
        Ok(Self {
            spawner,
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
        let task = Task {
            kind,
            name,
            body: Box::new(move || {
                end.ran = true;
                if panic::catch_unwind(AssertUnwindSafe(body)).is_err() {
                    end.announce(Some(Error::new(ErrorKind::Panicked, Phase::Cleanup)));
                }
                drop(end);
            }),
        };
        let spawned = match &tasks.spawner {
            Some(spawner) => spawner(task),
            None => tasks.spawn_own(task),
        };
        let spawned = spawned.map_err(|error| Error::lacking(Phase::Setup, &thread, error));
        let left = mem::replace(&mut *lock(&handing), Handing::Over);
        if let Handing::Dropped(mut end) = left {
            // Now it is known why.
            let why = spawned.as_ref().err().cloned();
            end.announce(Some(why.unwrap_or_else(End::not_run)));
        }
        spawned
    }

    /// Runs the task on a thread of the engine's own, with all signals blocked: they are the VMM's.
    fn spawn_own(&self, task: Task) -> io::Result<()> {
        let name = task.name.clone();
        let thread = thread::spawn(&name, || task.run())?;
        lock(&self.threads).push(thread);
        Ok(())
    }

    /// The VMM's spawner, if there is one.
    pub(crate) const fn spawner(&self) -> Option<&Spawner> {
        self.spawner.as_ref()
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
                TaskKind::Io | TaskKind::Precopy => error,
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
