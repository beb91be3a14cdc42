//! Addresses and connections, TCP and unix alike, with TLS or without; and the commands' one way to wait.
//!
//! ```text
//!   source        connect(ADDR) ──▶ Connection ──▶ Channel, or the main channel
//!   destination   Listener ── accept ──▶ Connection ── peek ──▶ which of both?
//! ```
//!
//! Used from the command's main thread; a [`Connection`] may be written to and shut down by one
//! thread while another reads from it. A peer that vanished without a word is found by TCP: by its
//! keepalive where the connection is idle, by `TCP_USER_TIMEOUT` where something is under way that
//! the peer never acknowledges (keepalive is silent then). What ends each wait besides is given to it.

use std::{
    fmt, io,
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    str::FromStr,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{MsgFlags, recv, send, setsockopt, sockopt},
};
use rustls::{ClientConfig, ServerConfig, pki_types::ServerName};
use vfio_migration::{Channel, ChannelStream, TlsStream};
use vfio_migration_uring::deadline;

use crate::interrupt;

/// How long a loop waits before it looks around again.
pub(crate) const TICK: Duration = Duration::from_millis(50);

/// Waits until a session's event or one of the others' is there, but no longer than a tick.
pub(crate) fn tick(
    most: Duration,
    sessions: &[BorrowedFd<'_>],
    others: Vec<PollFd<'_>>,
) -> io::Result<()> {
    let fds = sessions.iter();
    let mut fds: Vec<_> = fds.map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    fds.extend(others);
    let timeout = PollTimeout::try_from(most).unwrap_or(PollTimeout::MAX);
    match poll(&mut fds, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    for (fd, polled) in sessions.iter().zip(&fds) {
        if polled.any() == Some(true) {
            // Nobody else reads it, so it is still there.
            nix::unistd::read(fd, &mut [0; 8])?;
        }
    }
    Ok(())
}

/// That the peer has ended its side: POLLRDHUP, the same number wherever VFIO is.
pub(crate) const ENDED: PollFlags = PollFlags::from_bits_retain(0x2000);

/// Where to listen, or to connect to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Address {
    /// `HOST:PORT`.
    Tcp(String),
    /// A socket's path.
    Unix(PathBuf),
    /// The socket that was passed as stdin, which listens already: by a service manager, for one.
    Stdin,
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "stdin" {
            return Ok(Self::Stdin);
        }
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() {
                Err("a path follows unix:".into())
            } else {
                Ok(Self::Unix(path.into()))
            };
        }
        let address = text.strip_prefix("tcp:").unwrap_or(text);
        match address.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
                Ok(Self::Tcp(address.into()))
            }
            _ => Err("an address is HOST:PORT, like 192.0.2.1:4444, or unix:PATH".into()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Stdin => f.write_str("stdin"),
        }
    }
}

/// What has come of a connection's first four bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Peek {
    Nothing,
    Part,
    Whole([u8; 4]),
    /// The peer has closed without a word.
    End,
}

/// One connection.
#[derive(Debug)]
pub(crate) enum Connection {
    Tcp(TcpStream),
    Unix(UnixStream),
    /// Over one of these. No read or write lasts longer than the time.
    Tls(TlsStream, Duration),
}

impl Connection {
    /// Has small things sent at once, a vanished peer noticed within `timeout`, and no read or
    /// write last longer.
    pub(crate) fn tune(self, timeout: Duration) -> io::Result<Self> {
        match &self {
            Self::Tcp(socket) => {
                socket.set_nonblocking(false)?;
                socket.set_read_timeout(Some(timeout))?;
                socket.set_write_timeout(Some(timeout))?;
            }
            Self::Unix(socket) => {
                socket.set_nonblocking(false)?;
                socket.set_read_timeout(Some(timeout))?;
                socket.set_write_timeout(Some(timeout))?;
            }
            Self::Tls(..) => unreachable!("TLS comes later"),
        }
        if let Self::Tcp(socket) = &self {
            socket.set_nodelay(true)?;
            let unacknowledged = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
            // At most what the kernel takes: an int.
            let unacknowledged = unacknowledged.min(i32::MAX.unsigned_abs());
            setsockopt(socket, sockopt::TcpUserTimeout, &unacknowledged)?;
            let seconds = u32::try_from(timeout.as_secs() / 4).unwrap_or(u32::MAX);
            let seconds = seconds.clamp(1, 3600);
            setsockopt(socket, sockopt::KeepAlive, &true)?;
            setsockopt(socket, sockopt::TcpKeepIdle, &seconds)?;
            setsockopt(socket, sockopt::TcpKeepInterval, &seconds)?;
            setsockopt(socket, sockopt::TcpKeepCount, &3)?;
        }
        Ok(self)
    }

    /// The same with TLS, to be shaken hands over.
    fn tls(
        self,
        timeout: Duration,
        start: impl FnOnce(OwnedFd) -> Result<TlsStream, rustls::Error>,
    ) -> anyhow::Result<Self> {
        let stream = start(match self {
            Self::Tcp(socket) => socket.into(),
            Self::Unix(socket) => socket.into(),
            Self::Tls(..) => unreachable!("once"),
        })?;
        stream.set_timeout(timeout)?;
        Ok(Self::Tls(stream, timeout))
    }

    /// With TLS, where this side has connected.
    pub(crate) fn tls_client(
        self,
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
        timeout: Duration,
    ) -> anyhow::Result<Self> {
        self.tls(timeout, |socket| TlsStream::client(socket, config, name))
    }

    /// With TLS, where this side has accepted.
    pub(crate) fn tls_server(
        self,
        config: Arc<ServerConfig>,
        timeout: Duration,
    ) -> anyhow::Result<Self> {
        self.tls(timeout, |socket| TlsStream::server(socket, config))
    }

    /// Shakes hands as far as it can without a wait. Whether that is done.
    pub(crate) fn shake_hands(&self) -> io::Result<bool> {
        match self {
            Self::Tls(stream, _) => stream.advance(),
            _ => Ok(true),
        }
    }

    /// Ends what was refused: it is told so, and may read that.
    pub(crate) fn refuse(&self) {
        if let Self::Tls(stream, _) = self {
            // It may have gone.
            let _told = stream.shutdown(Shutdown::Write);
        }
    }

    /// Whether one that was refused has not ended its side yet. Reads past what it has sent, but for a bound.
    pub(crate) fn is_refused_still(&self) -> bool {
        let mut scratch = [0; 4096];
        for _ in 0..4 {
            match recv(
                self.as_fd().as_raw_fd(),
                &mut scratch,
                MsgFlags::MSG_DONTWAIT,
            ) {
                Ok(1..) => {}
                Err(Errno::EAGAIN | Errno::EINTR) => return true,
                _ => return false,
            }
        }
        true
    }

    /// What its handshake waits for.
    pub(crate) fn interest(&self) -> PollFlags {
        match self {
            Self::Tls(stream, _) if stream.wants_write() => PollFlags::POLLIN | PollFlags::POLLOUT,
            _ => PollFlags::POLLIN,
        }
    }

    /// As a channel: where the kernel has TLS, by the kernel's.
    pub(crate) fn into_channel(self) -> io::Result<Channel> {
        Ok(match self {
            Self::Tcp(socket) => socket.into(),
            Self::Unix(socket) => socket.into(),
            Self::Tls(stream, _) => match stream.into_kernel() {
                Ok(stream) => stream.into(),
                Err(refused) => refused.into_stream()?.into(),
            },
        })
    }

    /// Another handle of the same connection.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(socket) => Self::Tcp(socket.try_clone()?),
            Self::Unix(socket) => Self::Unix(socket.try_clone()?),
            Self::Tls(stream, timeout) => Self::Tls(stream.try_clone(), *timeout),
        })
    }

    /// Ends one direction or both, and every wait for it in other threads.
    pub(crate) fn shutdown(&self, how: Shutdown) {
        // Already closed by the peer is as good.
        let _closed = match self {
            Self::Tcp(socket) => socket.shutdown(how),
            Self::Unix(socket) => socket.shutdown(how),
            Self::Tls(stream, _) => {
                if how != Shutdown::Read {
                    let mut stream = stream.try_clone();
                    // For as long as it takes to hear of the end of TLS, and not to wait for room.
                    let patience = if how == Shutdown::Write {
                        TICK
                    } else {
                        Duration::ZERO
                    };
                    let _told = stream.set_timeout(patience).and_then(|()| stream.finish());
                }
                stream.shutdown(how)
            }
        };
    }

    /// Looks at the first four bytes, which stay there, without waiting for them.
    pub(crate) fn peek(&self) -> io::Result<Peek> {
        let mut bytes = [0; 4];
        if let Self::Tls(stream, _) = self {
            return match stream.peek(&mut bytes) {
                Ok(4) => Ok(Peek::Whole(bytes)),
                Ok(0) => Ok(Peek::End),
                Ok(_) => Ok(Peek::Part),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => Ok(Peek::Nothing),
                    // What is said on a connection has an end of its own.
                    io::ErrorKind::UnexpectedEof => Ok(Peek::End),
                    _ => Err(error),
                },
            };
        }
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match recv(self.as_fd().as_raw_fd(), &mut bytes, flags) {
            Ok(4) => Ok(Peek::Whole(bytes)),
            Ok(0) => Ok(Peek::End),
            Ok(_) => Ok(Peek::Part),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(Peek::Nothing),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Whether the peer has ended its side, whatever can still be read.
    pub(crate) fn is_ended(&self) -> bool {
        let mut fds = [PollFd::new(self.as_fd(), ENDED)];
        poll(&mut fds, PollTimeout::ZERO) != Ok(0)
    }

    /// Waits for bytes, or the end; says whether one is there.
    pub(crate) fn wait_readable(&self, timeout: Duration) -> io::Result<bool> {
        if let Self::Tls(stream, _) = self {
            return stream.wait_readable(timeout);
        }
        self.wait(PollFlags::POLLIN, timeout)
    }

    /// Whether the peer has taken so much, within the time, that it can be written to.
    pub(crate) fn is_writable(&self, timeout: Duration) -> io::Result<bool> {
        self.wait(PollFlags::POLLOUT, timeout)
    }

    fn wait(&self, what: PollFlags, timeout: Duration) -> io::Result<bool> {
        let mut fds = [PollFd::new(self.as_fd(), what)];
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(count) => Ok(count > 0),
            Err(Errno::EINTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Says that nothing more will be sent, and waits a little for the peer to have read what was:
    /// a connection that is closed with bytes unread loses them on the way.
    pub(crate) fn linger(&mut self, patience: Duration) {
        self.shutdown(Shutdown::Write);
        let deadline = deadline(interrupt::patience(patience));
        let mut buffer = [0; 4096];
        while let left = deadline.saturating_duration_since(Instant::now())
            && !left.is_zero()
            && matches!(self.wait_readable(left), Ok(true))
            && matches!(self.read(&mut buffer), Ok(1..))
        {}
    }
}

impl Read for Connection {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => socket.read(bytes),
            Self::Unix(socket) => socket.read(bytes),
            Self::Tls(stream, _) => stream.read(bytes),
        }
    }
}

impl Connection {
    /// Writes some, or says EAGAIN: the socket has no room.
    fn write_now(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match self {
            Self::Tls(stream, _) => {
                let mut stream = stream.try_clone();
                stream.set_timeout(Duration::ZERO)?;
                stream.write(bytes)
            }
            _ => Ok(send(self.as_fd().as_raw_fd(), bytes, flags)?),
        }
    }

    fn write_timeout(&self) -> io::Result<Duration> {
        let timeout = match self {
            Self::Tcp(socket) => socket.write_timeout()?,
            Self::Unix(socket) => socket.write_timeout()?,
            Self::Tls(_, timeout) => Some(*timeout),
        };
        Ok(timeout.unwrap_or(Duration::MAX))
    }

    /// Makes a call that does not wait, again and again while it says EAGAIN: until the connection's time-out, or
    /// for a little when the user has asked for the end.
    fn patiently<R>(&mut self, mut call: impl FnMut(&mut Self) -> io::Result<R>) -> io::Result<R> {
        let since = Instant::now();
        loop {
            match call(self) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
            let timeout = self.write_timeout()?;
            if since.elapsed() >= interrupt::patience(timeout) {
                let by_user = since.elapsed() < timeout;
                return Err(if by_user {
                    Errno::ECANCELED
                } else {
                    Errno::EAGAIN
                }
                .into());
            }
            self.is_writable(TICK)?;
        }
    }
}

impl Write for Connection {
    /// Waits for a peer that takes nothing until the connection's time-out, or for a little when the user
    /// has asked for the end, and `ECANCELED` says so: the wait looks around each tick.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.patiently(|it| it.write_now(bytes))?;
        // What TLS has taken, and the socket has not.
        self.flush()?;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.patiently(|it| match it {
            Self::Tls(stream, _) => {
                let mut stream = stream.try_clone();
                stream.set_timeout(Duration::ZERO)?;
                stream.flush()
            }
            _ => Ok(()),
        })
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(socket) => socket.as_fd(),
            Self::Unix(socket) => socket.as_fd(),
            Self::Tls(stream, _) => stream.as_fd(),
        }
    }
}

impl From<TcpStream> for Connection {
    fn from(socket: TcpStream) -> Self {
        Self::Tcp(socket)
    }
}

impl From<UnixStream> for Connection {
    fn from(socket: UnixStream) -> Self {
        Self::Unix(socket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let tcp = |text: &str| Ok(Address::Tcp(text.into()));
        assert_eq!("host:1".parse(), tcp("host:1"));
        assert_eq!("tcp:[::1]:4444".parse(), tcp("[::1]:4444"));
        assert_eq!("unix:/a:b".parse(), Ok(Address::Unix("/a:b".into())));
        for wrong in [
            "",
            "host",
            "host:",
            ":1",
            "host:65536",
            "unix:",
            "host:http",
        ] {
            assert!(wrong.parse::<Address>().is_err(), "{wrong}");
        }
    }
}
