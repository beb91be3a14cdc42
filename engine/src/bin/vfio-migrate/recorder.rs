//! `replay`'s devices: they take any state, and keep its digest.
//!
//! ```text
//!   engine ══▶ a device: RESUMING ══▶ pipe ─┐                ┌─▶ thread ─┐
//!   engine ══▶ a device           ══▶ pipe ─┼─▶ one epoll ───┼─▶ thread ─┼─▶ sha256, DIR/…
//!        …                                  ┘                └─▶ …      ─┘
//! ```
//!
//! # Threads
//!
//! A [`Recorders`] has one thread per processor, and at most one per device, because the threads only compute.
//! Each thread sleeps in the epoll. The epoll gives a pipe with data to one thread, which reads some of it and
//! lets the pipe go. A pipe's part ends when the engine closes the pipe. The threads end when the
//! [`Recorders`] is
//! dropped.

use std::{
    fs::File,
    io::{self, PipeReader, Read, Write},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{self, Receiver, Sender},
    },
    thread::{self, JoinHandle},
};

use anyhow::Context;
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        eventfd::{EfdFlags, EventFd},
    },
};
use sha2::{Digest, Sha256};
use vfio_migration::{DeviceState, FdDevice, wire};
use vfio_migration_uring::thread::spawn;

use crate::{
    host_memory::NO_THREAD,
    output::hex,
    state_files::{StateFile, Target},
};

/// What is taken out of a pipe with one call.
const PIECE: usize = 256 << 10;

/// How many of those, before another pipe gets its turn.
const TURN: usize = 16;

/// In the place of a pipe's number: the recorders is to end.
const END: u64 = u64::MAX;

/// What came out of a device's pipe.
pub(crate) struct Recorded {
    pub(crate) bytes: u64,
    pub(crate) sha256: String,
}

/// A pipe, and what is kept of it.
struct Tape {
    pipe: PipeReader,
    file: Option<File>,
    digest: Sha256,
    bytes: u64,
    recorded: Sender<io::Result<Recorded>>,
}

impl Tape {
    /// Takes what there is, up to a turn. False where the engine has closed the pipe.
    fn record(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        for _ in 0..TURN {
            let count = match self.pipe.read(buffer) {
                Ok(0) => return Ok(false),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            self.digest.update(&buffer[..count]);
            if let Some(file) = &mut self.file {
                file.write_all(&buffer[..count])?;
            }
            self.bytes += count as u64;
        }
        Ok(true)
    }

    /// Its end. Told before the pipe is closed: whoever sees that can ask why.
    fn end(self, result: io::Result<()>) {
        let recorded = result.map(|()| Recorded {
            bytes: self.bytes,
            sha256: hex(&self.digest.finalize()),
        });
        // A device that nobody asks about is gone already.
        let _gone = self.recorded.send(recorded);
        drop(self.pipe);
    }
}

/// What the threads of a recorders share.
pub(crate) struct Pipes {
    epoll: Epoll,
    end: EventFd,
    /// By their numbers; a pipe is not here while a thread has it, nor when it has ended.
    tapes: Mutex<Vec<Option<Box<Tape>>>>,
}

impl Pipes {
    fn tapes(&self) -> MutexGuard<'_, Vec<Option<Box<Tape>>>> {
        self.tapes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the recorders take what comes out of `pipe`.
    fn add(
        &self,
        pipe: PipeReader,
        file: Option<File>,
    ) -> io::Result<Receiver<io::Result<Recorded>>> {
        let flags = OFlag::from_bits_retain(fcntl(&pipe, FcntlArg::F_GETFL)?);
        fcntl(&pipe, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let (recorded, result) = mpsc::channel();
        let mut tapes = self.tapes();
        // A thread that is told of it waits for the lock.
        self.epoll.add(&pipe, once(tapes.len()))?;
        tapes.push(Some(Box::new(Tape {
            pipe,
            file,
            digest: Sha256::new(),
            bytes: 0,
            recorded,
        })));
        Ok(result)
    }

    /// One of the threads.
    fn serve(&self, buffer: &mut [u8]) {
        loop {
            let mut told = [EpollEvent::empty()];
            match self.epoll.wait(&mut told, EpollTimeout::NONE) {
                Ok(0) | Err(Errno::EINTR) => continue,
                Ok(_) => {}
                Err(errno) => panic!("the epoll is ours: {errno}"),
            }
            if told[0].data() == END {
                return;
            }
            let at = usize::try_from(told[0].data()).expect("it was one");
            let Some(mut tape) = self.tapes()[at].take() else {
                continue;
            };
            match tape.record(buffer) {
                Ok(true) => {
                    let mut tapes = self.tapes();
                    match self.epoll.modify(&tape.pipe, &mut once(at)) {
                        Ok(()) => tapes[at] = Some(tape),
                        Err(errno) => tape.end(Err(errno.into())),
                    }
                }
                Ok(false) => tape.end(Ok(())),
                Err(error) => tape.end(Err(error)),
            }
        }
    }
}

/// One thread is told once that there is something.
fn once(at: usize) -> EpollEvent {
    EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, at as u64)
}

/// The threads that take states out of pipes. Dropping it ends them.
pub(crate) struct Recorders {
    pipes: Arc<Pipes>,
    threads: Vec<JoinHandle<()>>,
}

impl Recorders {
    /// How many threads it has, for so many devices.
    pub(crate) fn threads(devices: usize) -> usize {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        processors.min(devices)
    }

    pub(crate) fn start(devices: usize) -> anyhow::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let end = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        epoll.add(&end, EpollEvent::new(EpollFlags::EPOLLIN, END))?;
        let pipes = Pipes {
            epoll,
            end,
            tapes: Mutex::default(),
        };
        let mut recorders = Self {
            pipes: Arc::new(pipes),
            threads: Vec::new(),
        };
        for _ in 0..Self::threads(devices) {
            let pipes = recorders.pipes.clone();
            let mut buffer = Vec::new();
            buffer.try_reserve_exact(PIECE)?;
            buffer.resize(PIECE, 0);
            let thread = spawn("state", move || pipes.serve(&mut buffer)).context(NO_THREAD)?;
            recorders.threads.push(thread);
        }
        Ok(recorders)
    }

    pub(crate) const fn pipes(&self) -> &Arc<Pipes> {
        &self.pipes
    }
}

impl Drop for Recorders {
    fn drop(&mut self) {
        // Never full: this is all that is written.
        let _told = self.pipes.end.write(1);
        for thread in self.threads.drain(..) {
            // A panic has been shown, and its pipes' devices have failed.
            let _ended = thread.join();
        }
    }
}

/// What is left of a device when it has been loaded.
#[derive(Default)]
pub(crate) struct Kept {
    pub(crate) state: Option<Receiver<io::Result<Recorded>>>,
    /// The state, where it is written.
    pub(crate) file: Option<StateFile>,
    /// Framing tags included.
    pub(crate) config: Option<Vec<u8>>,
}

pub(crate) fn lock(kept: &Mutex<Kept>) -> MutexGuard<'_, Kept> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A device that takes any state, and keeps its digest; where `target` is, the state too.
pub(crate) fn device(
    target: Option<Arc<Target>>,
    kept: Arc<Mutex<Kept>>,
    pipes: Arc<Pipes>,
) -> FdDevice {
    let config = kept.clone();
    FdDevice::new(move |state| {
        if state != DeviceState::Resuming {
            return Err(Errno::EINVAL.into());
        }
        let (reader, writer) = io::pipe()?;
        // A larger pipe is only faster.
        let _as_it_is = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(1 << 20));
        let file = target.as_ref().map(|target| target.create());
        let file = file.transpose()?;
        let copy = file.as_ref().map(|file| file.file().try_clone());
        let copy = copy.transpose()?;
        let mut kept = lock(&kept);
        kept.state = Some(pipes.add(reader, copy)?);
        kept.file = file;
        Ok(writer.into())
    })
    .stopped()
    .with_config(
        |_writer| Ok(()),
        move |reader| {
            let mut body = Vec::new();
            reader.read_to_end(&mut body)?;
            lock(&config).config = Some(wire::wrap_config(&body));
            Ok(())
        },
    )
}
