//! Listening: a TCP port, or a unix socket's path, which may be taken by somebody else; or a socket that
//! was passed as stdin, which stays its maker's.
//!
//! ```text
//!   bind ─▶ the path is taken ─┬─ no socket                     ──▶ refused, untouched
//!                              ├─ a socket that a process holds ──▶ refused, untouched
//!                              └─ nobody holds it               ──▶ removed, and bound again
//! ```
//!
//! To find out whether a process holds a socket, the command connects a datagram socket to it. This makes no
//! connection, so it disturbs nobody. The kernel's answer depends on whether a process is bound there,
//! listening
//! or not, in any namespace: if so, it refuses the wrong type; if not, it refuses the connection.
//!
//! A socket to be removed is first moved to a name that nobody else uses, and checked again. Another
//! process may
//! have put its own socket there in between; it gets the name back. The same happens on the way out, after the
//! listener is closed. The command then removes only its own socket (by device, inode and time), and only if
//! nobody holds it.
//!
//! The command's main thread uses this. Nothing here waits, except for the look-up of a host's name.

use std::{
    fs::{self, Metadata},
    hash::{BuildHasher, Hasher, RandomState},
    io,
    net::{SocketAddr, TcpListener},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::{
            fs::{FileTypeExt, MetadataExt},
            net::{UnixDatagram, UnixListener},
        },
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{anyhow, bail, ensure};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, Backlog, SockType, SockaddrLike, SockaddrStorage, getsockname, getsockopt,
        listen, sockopt,
    },
};
use rustls::ServerConfig;
use vfio_migration_uring::deadline;

use crate::{
    Interrupted,
    connect::resolve,
    network::{Address, Connection},
    tls::WhoArgs,
};

/// How long the name of the own host may be looked up.
const LOOK_UP: Duration = Duration::from_secs(10);

// ------------------------------------------------------------------------------ a path's socket

/// A socket's file, told from every other that may take its place: an inode's number alone may be
/// another's a moment later.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Identity {
    device: u64,
    inode: u64,
    made: (i64, i64),
}

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            // Nothing changes a socket file's contents. A new name changes its ctime.
            made: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

/// Whether any process has a socket bound to `path`, whatever its type and state.
fn is_held(path: &Path) -> io::Result<bool> {
    let asked = UnixDatagram::unbound()?.connect(path);
    Ok(!matches!(asked, Err(error) if error.kind() == io::ErrorKind::ConnectionRefused))
}

/// Removes the socket at `path` that nobody holds, and is `expected` where that is given. Whether it
/// did.
fn remove_unheld(path: &Path, expected: Option<Identity>) -> io::Result<bool> {
    let found = fs::symlink_metadata(path)?;
    let identity = Identity::of(&found);
    if !found.file_type().is_socket()
        || expected.is_some_and(|expected| identity != expected)
        || is_held(path)?
    {
        return Ok(false);
    }
    let unique = RandomState::new().build_hasher().finish();
    let aside = path.with_file_name(format!(".{unique:016x}"));
    fs::rename(path, &aside)?;
    let taken = fs::symlink_metadata(&aside)?;
    let right = Identity::of(&taken) == identity;
    if !right {
        // Somebody was quicker; nobody may have taken the name since.
        fs::hard_link(&aside, path)?;
    }
    fs::remove_file(&aside)?;
    Ok(right)
}

fn bind_unix(path: &Path) -> anyhow::Result<(UnixListener, Identity)> {
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let found = fs::symlink_metadata(path)?;
            if !found.file_type().is_socket() {
                bail!("there is a file of that name, and it is no socket");
            }
            if !remove_unheld(path, None)? {
                bail!("a process has that socket");
            }
            UnixListener::bind(path)?
        }
        bound => bound?,
    };
    let identity = Identity::of(&fs::symlink_metadata(path)?);
    Ok((listener, identity))
}

/// The socket that was passed as stdin: TCP's or a path's, and it listens.
fn passed() -> anyhow::Result<Socket> {
    let stdin = io::stdin();
    let listens = getsockopt(&stdin, sockopt::AcceptConn).unwrap_or(false);
    ensure!(
        listens && getsockopt(&stdin, sockopt::SockType)? == SockType::Stream,
        "stdin is no socket that listens: in a unit, StandardInput=socket and a .socket with \
         Accept=no"
    );
    let name: SockaddrStorage = getsockname(stdin.as_fd().as_raw_fd())?;
    let fd = stdin.as_fd().try_clone_to_owned()?;
    Ok(match name.family() {
        Some(AddressFamily::Inet | AddressFamily::Inet6) => {
            let listener = TcpListener::from(fd);
            listener.set_nonblocking(true)?;
            Socket::Tcp(listener)
        }
        Some(AddressFamily::Unix) => {
            let listener = UnixListener::from(fd);
            listener.set_nonblocking(true)?;
            Socket::Unix(listener)
        }
        _ => bail!("stdin is a socket of neither TCP nor a path"),
    })
}

// ------------------------------------------------------------------------------------ listener

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Accepts connections.
#[derive(Debug)]
pub(crate) struct Listener {
    /// `None` only while it is dropped.
    socket: Option<Socket>,
    /// The path of a unix socket, and what was made there.
    path: Option<(PathBuf, Identity)>,
    /// What every connection must have.
    tls: Option<Arc<ServerConfig>>,
}

/// What a listener had.
#[derive(Debug)]
pub(crate) enum Accepted {
    Connection(Connection),
    /// Nobody has come.
    Nobody,
    /// The host has no file or no memory for another connection now; it is still there later.
    Scarce(io::Error),
}

impl Listener {
    /// Begins to listen, where that is allowed to anybody: with TLS, at a unix socket, on a loopback address, or with
    /// `--insecure`. A unix socket that a process has left behind is replaced; anything else is
    /// left alone.
    pub(crate) fn bind(address: &Address, who: &WhoArgs) -> anyhow::Result<Self> {
        let tls = who.tls.server()?;
        let open = tls.is_none() && !who.insecure;
        let allow = |addresses: &[SocketAddr]| {
            let near = |it: &SocketAddr| it.ip().to_canonical().is_loopback();
            ensure!(
                !open || addresses.iter().all(near),
                "without --tls-cert anyone who reaches it may connect: give certificates, or --insecure"
            );
            Ok(())
        };
        let bind = || -> anyhow::Result<Self> {
            let (socket, path) = match address {
                Address::Tcp(address) => {
                    let deadline = deadline(LOOK_UP);
                    let addresses = resolve(address, deadline, &mut None)?;
                    allow(&addresses)?;
                    let listener = TcpListener::bind(&addresses[..])?;
                    listener.set_nonblocking(true)?;
                    (Socket::Tcp(listener), None)
                }
                Address::Unix(path) => {
                    let (listener, identity) = bind_unix(path)?;
                    listener.set_nonblocking(true)?;
                    (Socket::Unix(listener), Some((path.clone(), identity)))
                }
                Address::Stdin => {
                    let socket = passed()?;
                    if let Socket::Tcp(listener) = &socket {
                        allow(&[listener.local_addr()?])?;
                    }
                    (socket, None)
                }
            };
            let listener = Self {
                socket: Some(socket),
                path,
                tls,
            };
            // As many as the host allows: all channels may come at once, and strangers before them.
            listen(&listener, Backlog::MAXALLOWABLE)?;
            Ok(listener)
        };
        bind().map_err(|error| {
            if error.is::<Interrupted>() {
                error
            } else {
                error.context(format!("cannot listen on {address}"))
            }
        })
    }

    fn socket(&self) -> &Socket {
        self.socket.as_ref().expect("it lives")
    }

    /// Whether every connection must show a certificate.
    pub(crate) const fn asks_for_certificates(&self) -> bool {
        self.tls.is_some()
    }

    /// Where it listens: with the port that the host has chosen, where that was 0.
    pub(crate) fn address(&self) -> String {
        match (self.socket(), &self.path) {
            (_, Some((path, _))) => format!("unix:{}", path.display()),
            (Socket::Tcp(listener), None) => listener
                .local_addr()
                .map_or_else(|_| "TCP".into(), |address| address.to_string()),
            // Its maker's, which stays.
            (Socket::Unix(listener), None) => {
                let address = listener.local_addr().ok();
                let path = address.as_ref().and_then(|address| address.as_pathname());
                path.map_or_else(|| "unix".into(), |path| format!("unix:{}", path.display()))
            }
        }
    }

    /// A connection, if one has come.
    pub(crate) fn accept(&self, timeout: Duration) -> anyhow::Result<Accepted> {
        let accepted = match self.socket() {
            Socket::Tcp(listener) => listener.accept().map(|(socket, _)| socket.into()),
            Socket::Unix(listener) => listener.accept().map(|(socket, _)| socket.into()),
        };
        let accepted: io::Result<Connection> = accepted;
        let error = match accepted.map(|connection| connection.tune(timeout)) {
            Ok(Ok(connection)) => {
                let connection = match &self.tls {
                    Some(tls) => connection.tls_server(tls.clone(), timeout)?,
                    None => connection,
                };
                return Ok(Accepted::Connection(connection));
            }
            // It was reset before it was set up.
            Ok(Err(_)) => return Ok(Accepted::Nobody),
            Err(error) => error,
        };
        match Errno::from_raw(error.raw_os_error().unwrap_or_default()) {
            Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM => {
                Ok(Accepted::Scarce(error))
            }
            // It was reset before it was accepted; Linux also tells here what is wrong with that
            // connection's network.
            Errno::EAGAIN
            | Errno::EINTR
            | Errno::ECONNABORTED
            | Errno::ECONNRESET
            | Errno::EPERM
            | Errno::EPROTO
            | Errno::ENOPROTOOPT
            | Errno::ENETDOWN
            | Errno::ENETUNREACH
            | Errno::EHOSTDOWN
            | Errno::EHOSTUNREACH
            | Errno::ENONET
            | Errno::ETIMEDOUT => Ok(Accepted::Nobody),
            _ => Err(anyhow!(error).context("cannot accept a connection")),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self.socket() {
            Socket::Tcp(listener) => listener.as_fd(),
            Socket::Unix(listener) => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Before the look: it would be held by ourselves.
        drop(self.socket.take());
        if let Some((path, identity)) = &self.path {
            // Somebody may have been quicker.
            let _gone = remove_unheld(path, Some(*identity));
        }
    }
}
