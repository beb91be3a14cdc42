//! The byte streams under channels: sockets, and streams that a VMM brings instead. Also how they end.
//!
//! ```text
//!   hangup ─▶ reads, writes ─▶ finish: nothing more will be sent ─▶ Finished ─▶ drained, closed
//!                               the peer reads the end               until the embedder's cleanup
//! ```
//!
//! A socket that is closed with unread bytes is reset, and the peer loses what it has not read yet. So a
//! sending channel is not closed when all has been sent. It is *finished* (half-closed) and kept in
//! [`Finished`] until the session's report, or the migration, is over. Then it is read to the peer's end,
//! and closed.
//!
//! | the last read is bounded by | for |
//! |---|---|
//! | [`DRAIN_TIME`] | all channels together |
//! | [`DRAIN_BYTES`] | each channel |
//!
//! One thread owns a stream at any time. Another thread ends its waits with a [`Hangup`].

use std::{
    cell::Cell,
    fmt, io,
    io::{IoSlice, IoSliceMut, Read, Write},
    net::{Shutdown, TcpStream},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use nix::{
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use vfio_migration_uring::deadline;

use super::Channel;
use crate::{
    first_failure::Hangup,
    tasks::{TaskKind, Threads},
};

/// How long the peer may take to end its side of all channels, once they are to be closed.
pub(super) const DRAIN_TIME: Duration = Duration::from_secs(1);

/// How much of what the peer has written is read before a channel is closed.
const DRAIN_BYTES: usize = 1 << 20;

/// The bytes under a [`Channel`]: a stream that one thread reads or writes, and any other can hang up on.
///
/// `TcpStream` and `UnixStream` are such streams, and with the feature `rustls` `TlsStream` and `KernelTlsStream`. A
/// VMM implements it for a stream of its own, and makes a channel with [`Channel::new`].
///
/// | call | from which thread |
/// |---|---|
/// | `hangup` | the one that gives the channel to a session |
/// | what `hangup` returns | any, at any time, more than once, also while another is in a read or a write |
/// | `wait_readable`, `is_ended`, and every read, write and `finish` | the one that serves the channel |
///
/// A read or write that runs out of its time fails with `WouldBlock` or `TimedOut`. A write that returns so many
/// bytes has done with them: the engine does not flush between packets.
pub trait ChannelStream: Read + Write + Send {
    /// Makes the stream ready for a thread that waits in it. Returns what ends such a wait from another: its
    /// reads and writes must then return soon, with an error or the end.
    ///
    /// # Errors
    ///
    /// The system's, where the stream cannot be made ready.
    fn hangup(&self) -> io::Result<Box<dyn Fn() + Send + Sync>>;

    /// Bounds each later read and write.
    ///
    /// # Errors
    ///
    /// The system's.
    fn set_timeout(&self, timeout: Duration) -> io::Result<()>;

    /// Ends the sending side: what was written is on its way, the peer reads the end behind it, and this side
    /// can still read. Called once all has been sent, or read.
    ///
    /// # Errors
    ///
    /// The stream's.
    fn finish(&mut self) -> io::Result<()>;

    /// Waits up to `timeout` for bytes, or the end, and leaves them there: whether there are any. `None` where
    /// the stream can only be read. Then the engine hangs up on its last read in time.
    fn wait_readable(&self, timeout: Duration) -> Option<bool> {
        let _unknown = timeout;
        None
    }

    /// Whether the peer has ended its side, as far as that can be seen without a read.
    fn is_ended(&self) -> bool {
        false
    }
}

/// Reads what the peer has written, to its end or the bounds, or until it is hung up on.
fn drain(stream: &mut dyn ChannelStream, deadline: Instant) {
    let mut scratch = [0; 4096];
    let mut count = 0;
    while count < DRAIN_BYTES {
        // Nothing left still finds what is there.
        let left = deadline.saturating_duration_since(Instant::now());
        match stream.wait_readable(left) {
            Some(true) => {}
            Some(false) => return,
            // A read may not last for nothing at all.
            None if stream.set_timeout(left.max(AT_ONCE)).is_err() => return,
            None => {}
        }
        match stream.read(&mut scratch) {
            Ok(read @ 1..) => count += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Its own time-out may be shorter than ours.
            Err(error) if super::is_timeout(&error) && Instant::now() < deadline => {}
            _ => return,
        }
    }
}

// -------------------------------------------------------------------------------------- sockets

/// The peer has ended its side. (No name in `nix`.)
pub(super) const PEERS_END: PollFlags = PollFlags::from_bits_retain(libc::POLLRDHUP);

/// Waits for events of a socket, or for its end. Whether something has come.
pub(super) fn wait(fd: BorrowedFd<'_>, events: PollFlags, timeout: Duration) -> bool {
    let mut fds = [PollFd::new(fd, events)];
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
    matches!(poll(&mut fds, timeout), Ok(1..))
}

macro_rules! socket_stream {
    ($socket:ty) => {
        impl ChannelStream for $socket {
            fn hangup(&self) -> io::Result<Hangup> {
                // An async runtime's sockets do not block.
                self.set_nonblocking(false)?;
                let socket = self.try_clone()?;
                Ok(Box::new(move || {
                    // Already closed by the peer is as good.
                    let _closed = socket.shutdown(Shutdown::Both);
                }))
            }

            fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
                self.set_read_timeout(Some(timeout))?;
                self.set_write_timeout(Some(timeout))
            }

            fn finish(&mut self) -> io::Result<()> {
                self.shutdown(Shutdown::Write)
            }

            fn wait_readable(&self, timeout: Duration) -> Option<bool> {
                Some(wait(self.as_fd(), PollFlags::POLLIN, timeout))
            }

            fn is_ended(&self) -> bool {
                wait(self.as_fd(), PEERS_END, Duration::ZERO)
            }
        }

        impl From<$socket> for Channel {
            /// The socket is set to block when the channel is given to a session.
            fn from(socket: $socket) -> Self {
                Self::new(socket)
            }
        }
    };
}

socket_stream!(TcpStream);
socket_stream!(UnixStream);

impl From<OwnedFd> for Channel {
    /// A connected stream socket of any family: a vsock, say. It is set to block when the channel is
    /// given to a session.
    fn from(socket: OwnedFd) -> Self {
        // Its calls are those of every stream socket.
        Self::from(TcpStream::from(socket))
    }
}

// --------------------------------------------------------------------------- the embedder's own

/// A read or write that says "not now" sooner than this does not block.
const AT_ONCE: Duration = Duration::from_millis(1);

/// How long to wait before such a stream is asked again: from the first to the last, doubled.
const ASK_AGAIN: [Duration; 2] = [Duration::from_micros(100), Duration::from_millis(5)];

/// A stream of the VMM's.
pub(super) struct Custom<S, F> {
    stream: S,
    finish: F,
    hangup: Arc<dyn Fn() + Send + Sync>,
    timeout: Cell<Duration>,
}

impl<S, F> Custom<S, F> {
    pub(super) fn new(stream: S, finish: F, hangup: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            stream,
            finish,
            hangup: Arc::new(hangup),
            timeout: Cell::new(DRAIN_TIME),
        }
    }
}

/// Calls a stream. One that does not block is asked again until the time-out is over; the time-out of
/// one that does is its own.
fn patiently<S, R>(
    stream: &mut S,
    timeout: Duration,
    mut call: impl FnMut(&mut S) -> io::Result<R>,
) -> io::Result<R> {
    let begun = Instant::now();
    let [mut pause, longest] = ASK_AGAIN;
    loop {
        let since = Instant::now();
        let done = call(stream);
        let Err(error) = &done else {
            return done;
        };
        let again = error.kind() == io::ErrorKind::WouldBlock
            && since.elapsed() < AT_ONCE
            && begun.elapsed() < timeout;
        if !again {
            return done;
        }
        thread::sleep(pause);
        pause = longest.min(2 * pause);
    }
}

impl<S: Read, F> Read for Custom<S, F> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        patiently(&mut self.stream, self.timeout.get(), |stream| {
            stream.read(bytes)
        })
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        patiently(&mut self.stream, self.timeout.get(), |stream| {
            stream.read_vectored(buffers)
        })
    }
}

impl<S: Write, F> Write for Custom<S, F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        patiently(&mut self.stream, self.timeout.get(), |stream| {
            stream.write(bytes)
        })
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        patiently(&mut self.stream, self.timeout.get(), |stream| {
            stream.write_vectored(buffers)
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        patiently(&mut self.stream, self.timeout.get(), Write::flush)
    }
}

impl<S, F> ChannelStream for Custom<S, F>
where
    S: Read + Write + Send,
    F: FnMut(&mut S) -> io::Result<()> + Send,
{
    fn hangup(&self) -> io::Result<Hangup> {
        let hangup = self.hangup.clone();
        Ok(Box::new(move || hangup()))
    }

    fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.timeout.set(timeout);
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        patiently(&mut self.stream, self.timeout.get(), &mut self.finish)
    }
}

/// Half of a stream: the other half says that it is not there.
pub(super) struct ReadOnly<R>(pub(super) R);

impl<R: Read> Read for ReadOnly<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.read(bytes)
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.0.read_vectored(buffers)
    }
}

impl<R> Write for ReadOnly<R> {
    fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

// ------------------------------------------------------------------------------------ their end

/// Channels on which all has been sent, until they may be closed: with this, which waits for the peer
/// to have read it all, but no longer than [`DRAIN_TIME`].
#[derive(Default)]
pub(crate) struct Finished {
    /// Behind a lock that is never taken: a stream of the VMM's may be `Send` alone.
    channels: Mutex<Vec<Channel>>,
    threads: Threads,
}

impl Finished {
    /// `threads` gives the one that hangs up.
    pub(crate) fn new(threads: Threads) -> Self {
        Self {
            channels: Mutex::default(),
            threads,
        }
    }

    fn channels(&mut self) -> &mut Vec<Channel> {
        self.channels
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn push(&mut self, channel: Channel) {
        self.channels().push(channel);
    }

    /// Closes them at once: the migration is off, and nobody reads on.
    pub(crate) fn abandon(&mut self) {
        self.channels().clear();
    }
}

impl Drop for Finished {
    fn drop(&mut self) {
        let deadline = deadline(DRAIN_TIME);
        let (mut custom, mut sockets): (Vec<_>, Vec<_>) = std::mem::take(self.channels())
            .into_iter()
            .partition(|channel| channel.stream.wait_readable(Duration::ZERO).is_none());
        for channel in &mut sockets {
            drain(&mut *channel.stream, deadline);
        }
        if custom.is_empty() {
            return;
        }
        // A read of a VMM's stream may last: one thread beside this one hangs up at the deadline.
        let hangups: Vec<_> = custom.iter().map(|it| it.stream.hangup()).collect();
        let (reading, read) = mpsc::channel::<()>();
        let (waiting, waits) = mpsc::channel::<()>();
        let closing = move || {
            let _gone = waiting.send(());
            let left = deadline.saturating_duration_since(Instant::now());
            if read.recv_timeout(left) == Err(mpsc::RecvTimeoutError::Timeout) {
                hangups.iter().flatten().for_each(|hangup| hangup());
            }
        };
        let closer = self
            .threads
            .start(TaskKind::Close, "vfio-mig-close", closing);
        // Not before it waits: an embedder's thread may not come, or not get past its first step.
        let left = deadline.saturating_duration_since(Instant::now());
        if closer.is_ok() && waits.recv_timeout(left).is_ok() {
            for channel in &mut custom {
                drain(&mut *channel.stream, deadline);
            }
        }
        drop(reading);
        if let Ok(Some(thread)) = closer {
            // A hang-up of the VMM's that panics has done what it could.
            let _panicked = thread.join();
        }
    }
}

impl fmt::Debug for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Finished").finish_non_exhaustive()
    }
}
