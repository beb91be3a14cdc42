//! TLS under a channel, by rustls.
//!
//! ```text
//!   client, server ─▶ handshake, or advance() in a poll loop ─┬─▶ TlsStream       ─▶ Channel, main channel
//!                                                             └─▶ into_kernel ─▶ KernelTlsStream
//! ```
//!
//! | file | what |
//! |---|---|
//! | `tls.rs` | the stream: a session, its socket, and every wait |
//! | `tls/session.rs` | rustls's state machine, and what it has not sent or read yet |
//! | `tls/owned.rs` | rustls's own stream as a channel's |
//! | `tls/kernel.rs` | the same connection with its records made by the kernel |
//!
//! # Who waits where
//!
//! The session stands behind a lock, because one thread may read while another writes (a main channel and its
//! return path). Whoever holds the lock decrypts, encrypts, and makes calls on the socket that do not wait. A
//! thread waits for the socket without it. So a reader that waits does not hold up a writer.
//!
//! | wait | ended by |
//! |---|---|
//! | for the peer's bytes, in a read or the handshake | a whole record; the peer's end; the time-out of the call, however the peer trickles |
//! | for the peer to take bytes, in a write or `finish` | room; the time-out of the call |
//! | any | a hang-up by another thread, which shuts the socket down and takes no lock |
//!
//! # How it ends
//!
//! `finish` sends close_notify and half-closes the socket. A peer that closes without a close_notify is an error,
//! not an end: somebody on the way may have cut the connection. A stream that is dropped sends nothing.

use std::{
    fmt, io,
    io::{IoSlice, IoSliceMut, Read, Write},
    net::{Shutdown, TcpStream},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::PollFlags,
    sys::socket::{MsgFlags, recv, send},
};
use rustls::{
    ClientConfig, ServerConfig,
    pki_types::{CertificateDer, ServerName},
};
use vfio_migration_uring::deadline;

mod kernel;
mod owned;
mod session;

pub use self::kernel::{KernelRefused, KernelTlsStream};
use self::session::{OUTGOING, Session, Sink};
use super::{
    Channel,
    stream::{ChannelStream, PEERS_END, wait},
};
use crate::first_failure::Hangup;

/// Writes up to this size become one record, whatever pieces they come in.
const GATHERED: usize = 16 << 10;

struct Shared {
    /// Of any family: its calls are those of every stream socket.
    socket: TcpStream,
    session: Mutex<Session>,
    /// Whether the configuration lets the keys out.
    extractable: bool,
}

/// A TLS connection over a stream socket, by rustls.
///
/// It is a [`ChannelStream`], so it can be a [`Channel`]; and it is `Read + Write`, so it can be a main channel
/// ([`stream::Reader`](crate::stream::Reader), [`stream::Writer`](crate::stream::Writer)). All handles that
/// [`try_clone`](Self::try_clone) makes are of one connection: one thread may read while another writes. The
/// socket is closed with the last.
///
/// A configuration should ask for the peer's certificate on both sides. Which names rustls checks: a client
/// checks the server's, a server none. [`peer_certificates`](Self::peer_certificates) has what a server needs to
/// check the client's.
///
/// It needs up to 72 KiB for its handshake, and then 256 KiB, beside what rustls takes.
///
/// ```no_run
/// use std::{net::TcpStream, sync::Arc, time::Duration};
/// use rustls::{ClientConfig, pki_types::ServerName};
/// use vfio_migration::{Channel, TlsStream};
///
/// fn channel(config: Arc<ClientConfig>) -> Result<Channel, Box<dyn std::error::Error>> {
///     let socket = TcpStream::connect("destination.example:4444")?;
///     let name = ServerName::try_from("destination.example")?;
///     let mut tls = TlsStream::client(socket, config, name)?;
///     tls.handshake(Duration::from_secs(10))?;
///     Ok(match tls.into_kernel() {
///         Ok(kernel) => kernel.into(),
///         // The kernel has no TLS, or not this cipher.
///         Err(refused) => refused.into_stream()?.into(),
///     })
/// }
/// ```
pub struct TlsStream {
    shared: Arc<Shared>,
    /// Of this handle's calls.
    timeout: Mutex<Duration>,
}

/// How long a call of a new stream may take.
const TIMEOUT: Duration = Duration::from_secs(60);

impl TlsStream {
    /// A connection whose client this side is. `name` is what the server's certificate must say.
    ///
    /// The socket is a connected stream socket of any family. Its bytes must all be TLS's.
    ///
    /// # Errors
    ///
    /// rustls's, where the configuration does not fit.
    pub fn client(
        socket: impl Into<OwnedFd>,
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
    ) -> Result<Self, rustls::Error> {
        let extractable = config.enable_secret_extraction;
        let session = Session::client(config, name)?;
        Ok(Self::new(socket.into(), session, extractable))
    }

    /// A connection whose server this side is.
    ///
    /// # Errors
    ///
    /// As [`TlsStream::client`].
    pub fn server(
        socket: impl Into<OwnedFd>,
        config: Arc<ServerConfig>,
    ) -> Result<Self, rustls::Error> {
        let extractable = config.enable_secret_extraction;
        let session = Session::server(config)?;
        Ok(Self::new(socket.into(), session, extractable))
    }

    fn new(socket: OwnedFd, session: Session, extractable: bool) -> Self {
        Self {
            shared: Arc::new(Shared {
                socket: socket.into(),
                session: Mutex::new(session),
                extractable,
            }),
            timeout: Mutex::new(TIMEOUT),
        }
    }

    /// Another handle of the same connection, with a time-out of its own.
    #[must_use]
    pub fn try_clone(&self) -> Self {
        Self {
            shared: self.shared.clone(),
            timeout: Mutex::new(self.timeout()),
        }
    }

    fn timeout(&self) -> Duration {
        *self.timeout.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn session(&self) -> MutexGuard<'_, Session> {
        let session = &self.shared.session;
        session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, events: PollFlags, until: Instant) -> bool {
        let left = until.saturating_duration_since(Instant::now());
        // Rounded up: a time of less than a millisecond would not be one.
        let left = left.saturating_add(Duration::from_micros(999));
        wait(self.shared.socket.as_fd(), events, left)
    }

    /// Shakes hands, within `timeout` in all.
    ///
    /// A client is done before the server has looked at its certificate: a refusal comes with the first read.
    ///
    /// # Errors
    ///
    /// `TimedOut`, `UnexpectedEof` where the peer has gone, `InvalidData` where one side refuses the other: then
    /// the peer is told, and the error's source is [`rustls::Error`].
    pub fn handshake(&mut self, timeout: Duration) -> io::Result<()> {
        let until = deadline(timeout);
        loop {
            if self.advance()? {
                return Ok(());
            }
            if !self.wait(self.interest(), until) {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the peer has not completed the TLS handshake in time",
                ));
            }
        }
    }

    /// Shakes hands as far as it can without a wait: for a loop that polls. Whether it is done; if not, the loop
    /// waits for the one it is interested in. The loop's own time-out bounds the handshake.
    ///
    /// # Errors
    ///
    /// As [`TlsStream::handshake`], without the time-out.
    pub fn advance(&self) -> io::Result<bool> {
        let mut session = self.session();
        // Ends: with each round that goes on, the peer has sent bytes, and a handshake has a largest size.
        loop {
            let taken_in = session.advance(&mut Sink::default());
            let sent = self.send(&mut session);
            taken_in?;
            if !sent? {
                return Ok(false);
            }
            if !session.is_handshaking() {
                return Ok(true);
            }
            if !self.receive(&mut session)? {
                return Ok(false);
            }
        }
    }

    /// What the handshake waits for: `POLLIN`, and `POLLOUT` where it has something to send.
    #[must_use]
    pub(crate) fn interest(&self) -> PollFlags {
        if self.session().outgoing().is_empty() {
            PollFlags::POLLIN
        } else {
            PollFlags::POLLIN | PollFlags::POLLOUT
        }
    }

    /// Whether something waits to be sent: then a loop that polls waits for `POLLOUT` too.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        !self.session().outgoing().is_empty()
    }

    /// The peer's certificates, its own first. None before the handshake is done.
    #[must_use]
    pub fn peer_certificates(&self) -> Option<Vec<CertificateDer<'static>>> {
        let session = self.session();
        let certificates = session.common().peer_certificates()?;
        Some(
            certificates
                .iter()
                .map(|it| it.clone().into_owned())
                .collect(),
        )
    }

    /// Copies the data that has come, without a wait, and leaves it there: no more than one record.
    ///
    /// # Errors
    ///
    /// `WouldBlock` where nothing has come. Otherwise as a read.
    pub fn peek(&self, bytes: &mut [u8]) -> io::Result<usize> {
        let session = self.fetch()?;
        let count = bytes.len().min(session.plain().len());
        bytes[..count].copy_from_slice(&session.plain()[..count]);
        if count == 0 && !session.is_ended() {
            return Err(Errno::EAGAIN.into());
        }
        Ok(count)
    }

    /// Ends one direction of the socket or both, and every wait for it in other threads. The peer is not told.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.shared.socket.shutdown(how)
    }

    /// Sends what is to be sent, as far as the socket takes it. Whether that was all.
    fn send(&self, session: &mut Session) -> io::Result<bool> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        // Each round sends a byte at least, or ends.
        while !session.outgoing().is_empty() {
            match send(self.shared.socket.as_raw_fd(), session.outgoing(), flags) {
                Ok(count) => session.sent(count),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(false),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(true)
    }

    /// Receives what there is, but for a bound. Whether there was any.
    fn receive(&self, session: &mut Session) -> io::Result<bool> {
        let fd = self.shared.socket.as_raw_fd();
        let space = session.space()?;
        loop {
            match recv(fd, space, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the peer has closed the connection without the end of TLS",
                    ));
                }
                Ok(count) => {
                    session.received(count);
                    return Ok(true);
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(false),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Has data decrypted, if any has come.
    fn fetch(&self) -> io::Result<MutexGuard<'_, Session>> {
        let mut session = self.session();
        // Ends: with each round that goes on, the peer has sent bytes, and one record at most.
        loop {
            session.advance(&mut Sink::default())?;
            self.send(&mut session)?;
            if !session.plain().is_empty() || session.is_ended() || !self.receive(&mut session)? {
                return Ok(session);
            }
        }
    }

    fn read_into(&self, sink: &mut Sink<'_>) -> io::Result<usize> {
        let until = deadline(self.timeout());
        // Ends: with bytes, the end, an error, or the time.
        loop {
            let interest = {
                let mut session = self.session();
                session.receive_greedily();
                let taken_in = session.advance(sink);
                if sink.count > 0 {
                    return Ok(sink.count);
                }
                // A peer that is told why may not be there to hear it.
                let sent = self.send(&mut session);
                taken_in?;
                sent?;
                if session.is_ended() {
                    return Ok(0);
                }
                let received = self.receive(&mut session)?;
                match (received, session.outgoing().is_empty()) {
                    (true, _) => PollFlags::empty(),
                    (false, true) => PollFlags::POLLIN,
                    (false, false) => PollFlags::POLLIN | PollFlags::POLLOUT,
                }
            };
            // A record that comes a byte at a time has its time too.
            let over = Instant::now() >= until;
            if over || !interest.is_empty() && !self.wait(interest, until) {
                return Err(Errno::EAGAIN.into());
            }
        }
    }

    /// Waits until the socket has taken what is to be sent.
    fn send_all(&self, until: Instant) -> io::Result<()> {
        loop {
            if self.send(&mut self.session())? {
                return Ok(());
            }
            if !self.wait(PollFlags::POLLOUT, until) {
                return Err(Errno::EAGAIN.into());
            }
        }
    }

    /// Waits until the handshake is done: for a write that comes before any read.
    fn established(&self, until: Instant) -> io::Result<()> {
        while self.session().is_handshaking() && !self.advance()? {
            if !self.wait(self.interest(), until) {
                return Err(Errno::EAGAIN.into());
            }
        }
        Ok(())
    }

    fn write_from(&self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        let until = deadline(self.timeout());
        self.established(until)?;
        // What a write before this one could not send in its time. If it still cannot, nothing of this is taken.
        self.send_all(until)?;
        let count = self.encrypt(buffers)?;
        match self.send_all(until) {
            // Taken, and not sent: the next call waits for it.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(count),
            sent => sent.map(|()| count),
        }
    }

    fn encrypt(&self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut session = self.session();
        let whole: usize = buffers.iter().map(|it| it.len()).sum();
        if whole <= GATHERED && buffers.len() > 1 {
            let mut gathered = Vec::with_capacity(whole);
            buffers.iter().for_each(|it| gathered.extend_from_slice(it));
            session.encrypt(&gathered)?;
            return Ok(whole);
        }
        let mut count = 0;
        for buffer in buffers {
            let taken = buffer.len().min(OUTGOING - count);
            if taken > 0 {
                session.encrypt(&buffer[..taken])?;
            }
            count += taken;
            if count == OUTGOING {
                break;
            }
        }
        Ok(count)
    }

    /// Waits up to `timeout` for data, or the end, and leaves it there. Whether there is any.
    ///
    /// # Errors
    ///
    /// As a read, without the time-out.
    pub fn wait_readable(&self, timeout: Duration) -> io::Result<bool> {
        let until = deadline(timeout);
        loop {
            let (there, interest) = {
                let session = self.fetch()?;
                let there = !session.plain().is_empty() || session.is_ended();
                let waits = !session.outgoing().is_empty();
                (there, waits)
            };
            if there {
                return Ok(true);
            }
            let interest = if interest {
                PollFlags::POLLIN | PollFlags::POLLOUT
            } else {
                PollFlags::POLLIN
            };
            if Instant::now() >= until || !self.wait(interest, until) {
                return Ok(false);
            }
        }
    }

    /// Hands the connection to the kernel's TLS, if it has that (`modprobe tls`) and this cipher (AES-GCM), and the
    /// configuration lets the keys out (`enable_secret_extraction`).
    ///
    /// To be called when the handshake is done, before the first read. Data that has come already is kept.
    ///
    /// # Errors
    ///
    /// The stream as it was, in almost all cases. If the kernel takes the connection and refuses its keys, the
    /// connection is lost.
    pub fn into_kernel(self) -> Result<KernelTlsStream, KernelRefused> {
        kernel::take_over(self)
    }
}

impl Read for TlsStream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.read_vectored(&mut [IoSliceMut::new(bytes)])
    }

    /// Fills the first two buffers at most.
    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let mut buffers = buffers.iter_mut();
        let (first, second) = (buffers.next(), buffers.next());
        let mut sink = Sink::default();
        if let Some(first) = first {
            sink.first = first;
        }
        if let Some(second) = second {
            sink.second = second;
        }
        if sink.first.is_empty() && sink.second.is_empty() {
            return Ok(0);
        }
        self.read_into(&mut sink)
    }
}

impl Write for TlsStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_from(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        self.write_from(buffers)
    }

    /// Waits until the socket has taken all that was written.
    fn flush(&mut self) -> io::Result<()> {
        self.send_all(deadline(self.timeout()))
    }
}

impl ChannelStream for TlsStream {
    fn hangup(&self) -> io::Result<Hangup> {
        self.shared.socket.set_nonblocking(false)?;
        let shared = self.shared.clone();
        Ok(Box::new(move || {
            // Already closed by the peer is as good.
            let _closed = shared.socket.shutdown(Shutdown::Both);
        }))
    }

    fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        *self.timeout.lock().unwrap_or_else(PoisonError::into_inner) = timeout;
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        let until = deadline(self.timeout());
        self.send_all(until)?;
        self.session().close()?;
        self.send_all(until)?;
        self.shared.socket.shutdown(Shutdown::Write)
    }

    fn wait_readable(&self, timeout: Duration) -> Option<bool> {
        // A read says what is wrong.
        Some(Self::wait_readable(self, timeout).unwrap_or(true))
    }

    fn is_ended(&self) -> bool {
        wait(self.shared.socket.as_fd(), PEERS_END, Duration::ZERO)
    }
}

impl AsFd for TlsStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.socket.as_fd()
    }
}

impl From<TlsStream> for Channel {
    fn from(stream: TlsStream) -> Self {
        Self::new(stream)
    }
}

impl fmt::Debug for TlsStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsStream")
            .field("socket", &self.shared.socket)
            .field("timeout", &self.timeout())
            .finish_non_exhaustive()
    }
}
