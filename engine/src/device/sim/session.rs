//! One session of a simulated device: its data fd, and what stands behind it.
//!
//! ```text
//!   saving    Image ──fill──▶ device's thread ──write──▶ pipe, socket ──▶ data fd
//!                             memfd, filled before ────────────────────▶ data fd
//!
//!   loading   data fd ──▶ pipe, socket ──read──▶ device's thread ──▶ digest
//!             data fd ──▶ memory, memfd ─────── at its end, pread ──▶ digest
//! ```
//!
//! The device's own thread begins a session, asks it, and ends it; any thread may use the data fd. Dropping
//! a session ends its thread and joins it. The thread answers a question at once, or after the stall that
//! it is in; it answers "incomplete" rather than wait for bytes.
//!
//! The device's end of a pipe or socket never blocks: the session's thread waits in one `poll`.
//!
//! | the `poll` ends when | |
//! |---|---|
//! | the other side | has moved bytes, or closed |
//! | the control wakes it | more may be read, the load must be judged, or the session is over |
//! | the clock | a stall's time is up |

use std::{
    cmp, fmt,
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::Arc,
    thread::JoinHandle,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, SealFlag, fcntl},
    sys::{
        memfd::{MFdFlags, memfd_create},
        socket::{setsockopt, sockopt},
    },
    unistd::pipe2,
};
use vfio_migration_uring::thread;

use super::{
    SimConfig, Stream,
    control::{CHUNK, Control, Loaded},
    image::{Image, part},
    mapping::Mapping,
    worker::Worker,
};

/// Where a load goes.
#[derive(Debug, Default)]
pub(super) enum Room {
    /// To the device's thread, which keeps nothing.
    #[default]
    None,
    Memory(Mapping),
    File(File),
}

impl Room {
    /// Room for one load. With `pages` its memory is had now, and not as it is written.
    pub(super) fn new(config: &SimConfig, pages: bool) -> io::Result<Self> {
        let len = config.image().len();
        let fail_at = config.faults.fail_at;
        match config.stream {
            Stream::Pipe | Stream::Socket => Ok(Self::None),
            Stream::PlainWrite => {
                let mapping = Mapping::new(fail_at.map_or(len, |at| at.min(len)))?;
                if pages {
                    mapping.populate()?;
                }
                Ok(Self::Memory(mapping))
            }
            Stream::Memfd => {
                let file = memfd()?;
                if pages {
                    // Written, not just allocated: the pages of a guest are had by touching them.
                    io::copy(&mut io::repeat(0).take(len), &mut &file)?;
                    (&mut &file).rewind()?;
                }
                if let Some(room) = fail_at {
                    file.set_len(room)?;
                    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW))?;
                }
                Ok(Self::File(file))
            }
        }
    }
}

/// A session, with what ends it. See the module.
#[derive(Debug)]
pub(super) struct Session {
    control: Arc<Control>,
    /// `None` where a file does it all.
    thread: Option<JoinHandle<()>>,
    /// Behind a load's file, and kept as long as it.
    mapping: Option<Mapping>,
}

impl Session {
    /// Begins to save `image`, of which `limit` bytes can be read for now.
    pub(super) fn save(
        config: &SimConfig,
        image: Image,
        limit: u64,
        filled: Option<&File>,
    ) -> io::Result<(Self, OwnedFd)> {
        if let Some(file) = filled {
            // A file description of its own, and so a position of its own.
            let file = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
            let control = Control::new(limit, Some((file.try_clone()?, 0)))?;
            return Ok((Self::of_file(control, None), file.into()));
        }
        let (ours, theirs) = wire(config, Direction::Save)?;
        if config.stream == Stream::Socket
            && config.faults.fail_at.is_some_and(|at| at < image.len())
        {
            // What is closed with something unread in it resets the connection.
            (&File::from(theirs.try_clone()?)).write_all(&[0])?;
        }
        let control = Control::new(limit, None)?;
        let mut worker = Worker::new(config, ours, &control);
        let thread = thread::spawn("sim-save", move || worker.save(image)).map_err(no_thread)?;
        Ok((Self::of_thread(control, thread), theirs))
    }

    /// Begins to load, into `room` where the stream wants one.
    pub(super) fn load(config: &SimConfig, room: Room) -> io::Result<(Self, OwnedFd)> {
        match room {
            Room::None => {
                let (ours, theirs) = wire(config, Direction::Load)?;
                let control = Control::new(0, None)?;
                let mut worker = Worker::new(config, ours, &control);
                let thread = thread::spawn("sim-load", move || worker.load()).map_err(no_thread)?;
                Ok((Self::of_thread(control, thread), theirs))
            }
            Room::Memory(mapping) => {
                let mut file = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open("/proc/self/mem")?;
                file.seek(SeekFrom::Start(mapping.start()))?;
                let control = Control::new(0, Some((file.try_clone()?, mapping.start())))?;
                Ok((Self::of_file(control, Some(mapping)), file.into()))
            }
            Room::File(file) => {
                let control = Control::new(0, Some((file.try_clone()?, 0)))?;
                Ok((Self::of_file(control, None), file.into()))
            }
        }
    }

    fn of_thread(control: Arc<Control>, thread: JoinHandle<()>) -> Self {
        Self {
            control,
            thread: Some(thread),
            mapping: None,
        }
    }

    fn of_file(control: Arc<Control>, mapping: Option<Mapping>) -> Self {
        Self {
            control,
            thread: None,
            mapping,
        }
    }

    /// For those who look at the session from outside.
    pub(super) fn control(&self) -> &Arc<Control> {
        &self.control
    }

    /// Judges the load: what was loaded, or `EINVAL` and the session goes on.
    pub(super) fn finish_load(&self) -> io::Result<Loaded> {
        let loaded = self.control.judge()?;
        loaded.ok_or_else(|| Errno::EINVAL.into())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.control.change(|shared| shared.stop = true);
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so on stderr, and its session is over either way.
            let _ = thread.join();
        }
        // After the thread, and never while the session can still be asked.
        self.mapping.take();
    }
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Direction {
    Save,
    Load,
}

/// The device's end, which does not block, and the data fd, which does.
fn wire(config: &SimConfig, direction: Direction) -> io::Result<(OwnedFd, OwnedFd)> {
    let wanted = config.buffer.unwrap_or(1 << 20);
    let (ours, theirs): (OwnedFd, OwnedFd) = if config.stream == Stream::Socket {
        let (ours, theirs) = UnixStream::pair()?;
        for end in [&ours, &theirs] {
            setsockopt(end, sockopt::SndBuf, &wanted)?;
        }
        (ours.into(), theirs.into())
    } else {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
        let size = i32::try_from(wanted).unwrap_or(i32::MAX);
        // The host may not allow so much: then it is what it is.
        let _ = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(size));
        match direction {
            Direction::Save => (writer, reader),
            Direction::Load => (reader, writer),
        }
    };
    set_nonblocking(ours.as_fd())?;
    Ok((ours, theirs))
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Says what it was that the host refused.
fn no_thread(error: io::Error) -> io::Error {
    io::Error::new(error.kind(), NoThread(error))
}

/// The host's refusal of a thread, which keeps its errno.
#[derive(Debug)]
struct NoThread(io::Error);

impl fmt::Display for NoThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the host has no thread")
    }
}

impl std::error::Error for NoThread {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}

fn memfd() -> io::Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    Ok(memfd_create(c"sim", flags)?.into())
}

/// A file that holds the first `len` bytes of `image`.
pub(super) fn filled(image: Image, len: u64) -> io::Result<File> {
    let mut file = memfd()?;
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    while at < len {
        let here = cmp::min(len - at, CHUNK as u64);
        let bytes = &mut buffer[..part(here)];
        image.fill(at, bytes);
        file.write_all(bytes)?;
        at += here;
    }
    Ok(file)
}
