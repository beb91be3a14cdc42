//! Takes a destination's connections in, and tells main channels from multifd channels.
//!
//! ```text
//!   Listener ──▶ (TLS: the handshake) ──▶ the first four bytes ─┬─ QEVM           ──▶ Identified::Main
//!                   │         │           (they stay there)     ├─ multifd magic  ──▶ Identified::Channel
//!                   │         └─ refused: told why, and closed   └─ else, silent   ──▶ closed, and said
//!                   └─ gone again, or silent when all places are taken ──▶ closed
//! ```
//!
//! With TLS a stranger is one whose certificate has not been checked. Its handshake has the time of a hello, one of
//! the places, and the memory of a `TlsStream`; no thread. Where all places are taken, strangers make room first:
//! none of them takes the place of a peer that has shown its certificate. One that was refused keeps its place for a
//! second, so that it hears why: a socket that is closed with bytes unread is reset.
//!
//! Used from the command's main thread. Nothing here waits: the caller waits on [`Acceptor::fds`]. They
//! leave out the listener while all places are taken, and while the host has no file for another
//! connection: then the acceptor looks again at the next tick.

use std::{
    io,
    os::fd::AsFd,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags};
use vfio_migration::{Channel, stream::MAIN_MAGIC, wire::MULTIFD_MAGIC};

use crate::{
    listen::{Accepted, Listener},
    network::{Connection, ENDED, Peek},
    output::{say, say_of_stranger},
};

/// What a connection is.
pub(crate) enum Identified {
    Main(Connection),
    Channel(Channel),
}

/// A connection that has not said yet what it is.
struct Unidentified {
    connection: Connection,
    since: Instant,
    stage: Stage,
}

/// How far a connection has come.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    /// TLS: it has not shown who it is.
    Handshake,
    /// Nobody who may not connect, as far as that is asked for.
    Silent,
    /// Some of the four bytes are there, so that waiting for any would not wait.
    Begun,
    /// Refused, and told so: until it has read that, but no longer than [`WHEN_FULL`].
    Refused,
}

impl Unidentified {
    /// What to wait for.
    fn interest(&self) -> PollFlags {
        match (self.stage, &self.connection) {
            (Stage::Begun, Connection::Tcp(_) | Connection::Unix(_)) => ENDED,
            _ => self.connection.interest() | ENDED,
        }
    }

    /// Goes on with its handshake. Whether it may stay.
    fn shake_hands(&mut self) -> bool {
        match self.connection.shake_hands() {
            Ok(true) => self.stage = Stage::Silent,
            Ok(false) => {}
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                say_of_stranger(&format!("a connection was refused: {error}"));
                self.connection.refuse();
                self.since = Instant::now();
                self.stage = Stage::Refused;
            }
            // It has gone again.
            Err(_) => return false,
        }
        true
    }
}

/// How long a silent connection keeps its place while all are taken. A source speaks at once.
const WHEN_FULL: Duration = Duration::from_secs(1);

/// How long a connection may take to say what it is, where nothing may stand still for `timeout`.
pub(crate) fn hello_timeout(timeout: Duration) -> Duration {
    timeout.min(Duration::from_secs(10))
}

/// Takes connections in.
pub(crate) struct Acceptor {
    listener: Listener,
    timeout: Duration,
    /// The most connections that may be silent at one time; the rest waits outside.
    places: usize,
    /// In the order in which they came.
    unidentified: Vec<Unidentified>,
    /// Where each begins.
    stage: Stage,
    /// Whether the host had no file for one that has come.
    scarce: bool,
    /// Whether that has been said.
    said_scarce: bool,
}

impl Acceptor {
    /// `timeout` is how long nothing may move on a connection; `places`, how many may be silent.
    pub(crate) fn new(listener: Listener, timeout: Duration, places: usize) -> Self {
        Self {
            stage: if listener.asks_for_certificates() {
                Stage::Handshake
            } else {
                Stage::Silent
            },
            listener,
            timeout,
            places,
            unidentified: Vec::new(),
            scarce: false,
            said_scarce: false,
        }
    }

    /// What to wait for: new connections, and the first bytes and the ends of those that are here.
    pub(crate) fn fds(&self) -> Vec<PollFd<'_>> {
        let unidentified = self
            .unidentified
            .iter()
            .map(|it| PollFd::new(it.connection.as_fd(), it.interest()));
        let open = !self.scarce && self.unidentified.len() < self.places;
        let listener = PollFd::new(self.listener.as_fd(), PollFlags::POLLIN);
        unidentified.chain(open.then_some(listener)).collect()
    }

    /// Whether nobody is here who has not said what it is.
    pub(crate) fn is_empty(&self) -> bool {
        self.unidentified.is_empty()
    }

    /// Who has to go first where all places are taken: whoever came first of those who were refused, then of those
    /// who have not shown who they are, then of all. But for the refused, nobody goes within
    /// its first second.
    fn first_to_go(&self) -> Option<usize> {
        let rank = |stage| match stage {
            Stage::Refused => 0,
            Stage::Handshake => 1,
            Stage::Silent | Stage::Begun => 2,
        };
        let old = |it: &&(usize, &Unidentified)| {
            it.1.stage == Stage::Refused || it.1.since.elapsed() >= WHEN_FULL
        };
        let all = self.unidentified.iter().enumerate();
        let first = all
            .filter(|it| old(&it))
            .min_by_key(|(_, it)| rank(it.stage));
        first.map(|(at, _)| at)
    }

    /// Takes in those who have come, as far as there is room.
    fn open(&mut self) -> anyhow::Result<()> {
        self.scarce = false;
        // Ends: with the connections that are there, or those that may go.
        loop {
            let full = self.unidentified.len() >= self.places;
            let first = self.first_to_go();
            if full && first.is_none() {
                return Ok(());
            }
            match self.listener.accept(self.timeout)? {
                Accepted::Connection(connection) => {
                    if let Some(first) = first.filter(|_| full)
                        && self.unidentified.remove(first).stage != Stage::Refused
                    {
                        say_of_stranger(
                            "a connection that said nothing was closed: too many of them",
                        );
                    }
                    self.unidentified.push(Unidentified {
                        connection,
                        since: Instant::now(),
                        stage: self.stage,
                    });
                }
                Accepted::Nobody => return Ok(()),
                Accepted::Scarce(error) => {
                    self.scarce = true;
                    if !self.said_scarce {
                        self.said_scarce = true;
                        say(&format!("connections have to wait: {error}"));
                    }
                    // A stranger's file does as well.
                    if let Some(first) = first {
                        self.unidentified.remove(first);
                        continue;
                    }
                    return Ok(());
                }
            }
        }
    }

    /// The next connection that says what it is, if there is one now.
    pub(crate) fn answer(&mut self) -> anyhow::Result<Option<Identified>> {
        self.open()?;
        let mut at = 0;
        while let Some(unknown) = self.unidentified.get_mut(at) {
            let stays = match unknown.stage {
                Stage::Handshake => {
                    unknown.shake_hands() && unknown.since.elapsed() <= hello_timeout(self.timeout)
                }
                Stage::Refused => {
                    unknown.connection.is_refused_still() && unknown.since.elapsed() < WHEN_FULL
                }
                Stage::Silent | Stage::Begun => true,
            };
            if !stays {
                self.unidentified.remove(at);
                continue;
            }
            if matches!(unknown.stage, Stage::Handshake | Stage::Refused) {
                at += 1;
                continue;
            }
            match unknown.connection.peek() {
                Ok(Peek::Whole(magic)) => {
                    let Unidentified { connection, .. } = self.unidentified.remove(at);
                    match u32::from_be_bytes(magic) {
                        MAIN_MAGIC => return Ok(Some(Identified::Main(connection))),
                        MULTIFD_MAGIC => match connection.into_channel() {
                            Ok(channel) => return Ok(Some(Identified::Channel(channel))),
                            Err(error) => {
                                say(&format!("a multifd channel was closed: {error}"));
                            }
                        },
                        magic => say_of_stranger(&format!(
                            "a connection that began with {magic:#010x} was closed: neither a \
                             main channel nor a multifd channel"
                        )),
                    }
                }
                // It was nobody, or a source that was killed: its main channel will tell.
                Ok(Peek::End) | Err(_) => drop(self.unidentified.remove(at)),
                Ok(Peek::Part) if unknown.connection.is_ended() => {
                    drop(self.unidentified.remove(at));
                }
                Ok(Peek::Nothing | Peek::Part)
                    if unknown.since.elapsed() > hello_timeout(self.timeout) =>
                {
                    self.unidentified.remove(at);
                    say_of_stranger("a connection that said nothing was closed");
                }
                Ok(seen) => {
                    if matches!(seen, Peek::Part) {
                        unknown.stage = Stage::Begun;
                    }
                    at += 1;
                }
            }
        }
        Ok(None)
    }
}
