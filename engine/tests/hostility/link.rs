//! A link between two processes, which can be cut: passes connections on, TCP and unix alike.
//!
//! ```text
//!   client ──▶ Link ── each connection, both ways, piece by piece ──▶ server
//!                └─ a cut: at a count of bytes in all, both sides of every connection are reset or shut
//! ```
//!
//! One thread accepts, two pump each connection. All end when the link is dropped: it shuts every
//! connection down and joins them.
#![allow(dead_code, reason = "each that uses it uses a part of it")]

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::{
    libc,
    sys::socket::{setsockopt, sockopt},
};

/// How often those who wait look around.
const LOOK: Duration = Duration::from_millis(2);
const WRITE: Duration = Duration::from_millis(50);

/// What a link does to what passes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fate {
    /// Cut when so many bytes have passed, in all.
    pub cut_at: Option<u64>,
    /// The cut is a reset where the sockets have one, not an end.
    pub reset: bool,
    /// Nothing comes back from the server behind so many bytes.
    pub mute_at: Option<u64>,
    /// So much time passes before each accept.
    pub slow: Option<Duration>,
    /// At most so many bytes at once.
    pub piece: Option<usize>,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    fn connect(address: &str) -> io::Result<Self> {
        match address.strip_prefix("unix:") {
            Some(path) => UnixStream::connect(path).map(Self::Unix),
            None => TcpStream::connect(address).map(Self::Tcp),
        }
    }

    fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Tcp(socket) => socket.try_clone().map(Self::Tcp),
            Self::Unix(socket) => socket.try_clone().map(Self::Unix),
        }
    }

    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => socket.read(bytes),
            Self::Unix(socket) => socket.read(bytes),
        }
    }

    /// Writes all, unless `over` comes to be set.
    fn write_all(&mut self, mut bytes: &[u8], over: &AtomicBool) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = match self {
                Self::Tcp(socket) => socket.write(bytes),
                Self::Unix(socket) => socket.write(bytes),
            };
            match written {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && !over.load(Relaxed) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// No write lasts longer before it looks around.
    fn bounded(self) -> io::Result<Self> {
        match &self {
            Self::Tcp(socket) => socket.set_write_timeout(Some(WRITE))?,
            Self::Unix(socket) => socket.set_write_timeout(Some(WRITE))?,
        }
        Ok(self)
    }

    fn shutdown(&self, how: Shutdown) {
        // Closed already is as good.
        let _closed = match self {
            Self::Tcp(socket) => socket.shutdown(how),
            Self::Unix(socket) => socket.shutdown(how),
        };
    }

    /// Ends both directions: with a reset where that is wanted and the socket has one, which goes out
    /// when the last handle is closed. Until then it says nothing.
    fn end(&self, reset: bool) {
        match self {
            Self::Tcp(socket) if reset => {
                let linger = libc::linger {
                    l_onoff: 1,
                    l_linger: 0,
                };
                let _closed = setsockopt(socket, sockopt::Linger, &linger);
                self.shutdown(Shutdown::Read);
            }
            _ => self.shutdown(Shutdown::Both),
        }
    }
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

impl Listener {
    fn accept(&self) -> io::Result<Socket> {
        match self {
            Self::Tcp(listener) => {
                let (socket, _) = listener.accept()?;
                socket.set_nonblocking(false)?;
                socket.set_nodelay(true)?;
                Ok(Socket::Tcp(socket))
            }
            Self::Unix(listener, _) => {
                let (socket, _) = listener.accept()?;
                socket.set_nonblocking(false)?;
                Ok(Socket::Unix(socket))
            }
        }
    }
}

#[derive(Default)]
struct Shared {
    over: AtomicBool,
    passed: AtomicU64,
    back: AtomicU64,
    /// Both ends of every connection.
    ends: Mutex<Vec<Socket>>,
}

impl Shared {
    fn ends(&self) -> MutexGuard<'_, Vec<Socket>> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cut(&self, reset: bool) {
        // Relaxed: the lock orders it for those who add ends; the rest is told by their sockets.
        let mut ends = self.ends();
        self.over.store(true, Relaxed);
        for end in ends.drain(..) {
            end.end(reset);
        }
    }
}

/// A link. What passes is counted.
pub struct Link {
    pub address: String,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
    path: Option<PathBuf>,
}

impl Link {
    /// From `at`, an address to listen on, to `to`.
    pub fn new(at: &str, to: &str, fate: Fate) -> io::Result<Self> {
        let (listener, address, path) = match at.strip_prefix("unix:") {
            Some(path) => {
                let listener = UnixListener::bind(path)?;
                listener.set_nonblocking(true)?;
                let path = PathBuf::from(path);
                (
                    Listener::Unix(listener, path.clone()),
                    at.to_owned(),
                    Some(path),
                )
            }
            None => {
                let listener = TcpListener::bind(at)?;
                listener.set_nonblocking(true)?;
                let address = listener.local_addr()?.to_string();
                (Listener::Tcp(listener), address, None)
            }
        };
        let shared = Arc::new(Shared::default());
        let (mine, to) = (shared.clone(), to.to_owned());
        let accepting = thread::spawn(move || accept(&listener, &to, fate, &mine));
        Ok(Self {
            address,
            shared,
            accepting: Some(accepting),
            path,
        })
    }

    /// How many bytes have passed, both ways together.
    pub fn passed(&self) -> u64 {
        self.shared.passed.load(Relaxed)
    }

    /// Cuts it now.
    pub fn cut(&self, reset: bool) {
        self.shared.cut(reset);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.cut(false);
        if let Some(accepting) = self.accepting.take() {
            let _panicked = accepting.join();
        }
        if let Some(path) = &self.path {
            let _gone = std::fs::remove_file(path);
        }
    }
}

fn accept(listener: &Listener, to: &str, fate: Fate, shared: &Arc<Shared>) {
    let mut pumps = Vec::new();
    while !shared.over.load(Relaxed) {
        let Ok(near) = listener.accept() else {
            thread::sleep(LOOK);
            continue;
        };
        // One that is not let in is closed, as by a destination that is gone.
        if let (Ok(near), Ok(far)) = (
            near.bounded(),
            Socket::connect(to).and_then(Socket::bounded),
        ) {
            pumps.extend(connection(near, far, fate, shared).into_iter().flatten());
        }
        if let Some(slow) = fate.slow {
            thread::sleep(slow);
        }
    }
    for pump in pumps {
        let _panicked = pump.join();
    }
}

fn connection(
    near: Socket,
    far: Socket,
    fate: Fate,
    shared: &Arc<Shared>,
) -> io::Result<[JoinHandle<()>; 2]> {
    let ends = [near.try_clone()?, far.try_clone()?];
    let back = (far.try_clone()?, near.try_clone()?);
    {
        let mut kept = shared.ends();
        if shared.over.load(Relaxed) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        kept.extend(ends);
    }
    let pump = |(from, to): (Socket, Socket), is_back| {
        let shared = shared.clone();
        thread::spawn(move || pump(from, to, is_back, fate, &shared))
    };
    Ok([pump((near, far), false), pump(back, true)])
}

fn pump(mut from: Socket, mut to: Socket, is_back: bool, fate: Fate, shared: &Shared) {
    let mut buffer = vec![0; fate.piece.unwrap_or(64 << 10)];
    loop {
        let count = match from.read(&mut buffer) {
            // A cut has ended it, and ends the other side in its own way.
            _ if shared.over.load(Relaxed) => return,
            // A mute end is not heard either.
            Ok(0) if is_back && fate.mute_at.is_some() => {
                thread::sleep(LOOK);
                continue;
            }
            Ok(0) => return to.shutdown(Shutdown::Write),
            Ok(count) => count,
            Err(_) => return to.end(true),
        };
        let before = shared.passed.fetch_add(count as u64, Relaxed);
        let mut left = count;
        if let Some(cut) = fate.cut_at {
            left = left.min(usize::try_from(cut.saturating_sub(before)).unwrap_or(usize::MAX));
        }
        if is_back {
            let back = shared.back.fetch_add(count as u64, Relaxed);
            if fate.mute_at.is_some_and(|most| back >= most) {
                continue;
            }
        }
        if to.write_all(&buffer[..left], &shared.over).is_err() {
            return from.end(true);
        }
        if left < count {
            return shared.cut(fate.reset);
        }
    }
}
