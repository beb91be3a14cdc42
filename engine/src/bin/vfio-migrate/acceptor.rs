//! Takes a destination's connections in, and tells main channels from multifd channels.
//!
//! ```text
//!   Listener ──▶ unidentified ──▶ the first four bytes ─┬─ QEVM           ──▶ Identified::Main
//!                     │             (they stay there)     ├─ multifd magic  ──▶ Identified::Channel
//!                     │                                   └─ else, silent   ──▶ closed, and said
//!                     └─ gone again, or silent when all places are taken    ──▶ closed
//! ```
//!
//! Used from the command's main thread. Nothing here waits: the caller waits on [`Acceptor::fds`]. They
//! leave out the listener while all places are taken, and while the host has no file for another
//! connection: then the acceptor looks again at the next tick.

use std::{
    os::fd::AsFd,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags};
use vfio_migration::{stream::MAIN_MAGIC, wire::MULTIFD_MAGIC};

use crate::{
    listen::{Accepted, Listener},
    network::{Connection, ENDED, Peek},
    output::{say, say_of_stranger},
};

/// What a connection is.
pub(crate) enum Identified {
    Main(Connection),
    Channel(Connection),
}

/// A connection that has not said yet what it is.
struct Unidentified {
    connection: Connection,
    since: Instant,
    /// Whether some of the four bytes are there, so that waiting for any would not wait.
    begun: bool,
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
    /// Whether the host had no file for one that has come.
    scarce: bool,
    /// Whether that has been said.
    said_scarce: bool,
}

impl Acceptor {
    /// `timeout` is how long nothing may move on a connection; `places`, how many may be silent.
    pub(crate) const fn new(listener: Listener, timeout: Duration, places: usize) -> Self {
        Self {
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
        let unidentified = self.unidentified.iter().map(|unknown| {
            let bytes = if unknown.begun {
                PollFlags::empty()
            } else {
                PollFlags::POLLIN
            };
            PollFd::new(unknown.connection.as_fd(), bytes | ENDED)
        });
        let open = !self.scarce && self.unidentified.len() < self.places;
        let listener = PollFd::new(self.listener.as_fd(), PollFlags::POLLIN);
        unidentified.chain(open.then_some(listener)).collect()
    }

    /// Whether nobody is here who has not said what it is.
    pub(crate) fn is_empty(&self) -> bool {
        self.unidentified.is_empty()
    }

    /// Takes in those who have come, as far as there is room.
    fn open(&mut self) -> anyhow::Result<()> {
        self.scarce = false;
        // Ends: with the connections that are there, or those that may go.
        loop {
            let full = self.unidentified.len() >= self.places;
            if full && self.unidentified[0].since.elapsed() < WHEN_FULL {
                return Ok(());
            }
            match self.listener.accept(self.timeout)? {
                Accepted::Connection(connection) => {
                    if full {
                        self.unidentified.remove(0);
                        say_of_stranger(
                            "a connection that said nothing was closed: too many of them",
                        );
                    }
                    self.unidentified.push(Unidentified {
                        connection,
                        since: Instant::now(),
                        begun: false,
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
                    if !self.unidentified.is_empty()
                        && self.unidentified[0].since.elapsed() >= WHEN_FULL
                    {
                        self.unidentified.remove(0);
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
            match unknown.connection.peek() {
                Ok(Peek::Whole(magic)) => {
                    let Unidentified { connection, .. } = self.unidentified.remove(at);
                    match u32::from_be_bytes(magic) {
                        MAIN_MAGIC => return Ok(Some(Identified::Main(connection))),
                        MULTIFD_MAGIC => return Ok(Some(Identified::Channel(connection))),
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
                    unknown.begun = matches!(seen, Peek::Part);
                    at += 1;
                }
            }
        }
        Ok(None)
    }
}
