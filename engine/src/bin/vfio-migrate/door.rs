//! A destination's door: takes connections in, and tells main channels from multifd channels.
//!
//! ```text
//!   Listener ──▶ guests ──▶ the first four bytes ─┬─ QEVM          ──▶ Caller::Main
//!                             (they stay there)   ├─ multifd magic ──▶ Caller::Channel
//!                                                 └─ else, silent  ──▶ closed, and said
//! ```
//!
//! Used from the command's main thread. Nothing here waits: the caller waits on [`Door::fds`].

use std::{
    os::fd::{AsFd, BorrowedFd},
    time::{Duration, Instant},
};

use vfio_migration::{stream::MAIN_MAGIC, wire::MULTIFD_MAGIC};

use crate::{
    network::{Connection, Listener, Peek},
    output::say_of_stranger,
};

/// What a connection is.
pub(crate) enum Caller {
    Main(Connection),
    Channel(Connection),
}

/// A connection that has not said yet what it is.
struct Guest {
    connection: Connection,
    since: Instant,
    /// Whether some of the four bytes are there, so that waiting for any would not wait.
    begun: bool,
}

/// The most connections that may be silent at one time; the rest waits outside.
const MOST_GUESTS: usize = 256;

/// How long a connection may take to say what it is, where nothing may stand still for `timeout`.
pub(crate) fn hello_timeout(timeout: Duration) -> Duration {
    timeout.min(Duration::from_secs(10))
}

/// Takes connections in.
pub(crate) struct Door {
    listener: Listener,
    timeout: Duration,
    guests: Vec<Guest>,
}

impl Door {
    /// `timeout` is how long nothing may move on a connection.
    pub(crate) const fn new(listener: Listener, timeout: Duration) -> Self {
        Self {
            listener,
            timeout,
            guests: Vec::new(),
        }
    }

    /// What to wait for: new connections, and the first bytes of those that are here.
    pub(crate) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let guests = self.guests.iter().filter(|guest| !guest.begun);
        std::iter::once(self.listener.as_fd())
            .chain(guests.map(|guest| guest.connection.as_fd()))
            .collect()
    }

    /// Whether nobody is here who has not said what it is.
    pub(crate) fn is_empty(&self) -> bool {
        self.guests.is_empty()
    }

    /// The next connection that says what it is, if there is one now.
    pub(crate) fn answer(&mut self) -> anyhow::Result<Option<Caller>> {
        // Ends: with the connections that are there.
        while self.guests.len() < MOST_GUESTS
            && let Some(connection) = self.listener.accept(self.timeout)?
        {
            self.guests.push(Guest {
                connection,
                since: Instant::now(),
                begun: false,
            });
        }
        let mut at = 0;
        while let Some(guest) = self.guests.get_mut(at) {
            match guest.connection.peek() {
                Ok(Peek::Whole(magic)) => {
                    let Guest { connection, .. } = self.guests.remove(at);
                    match u32::from_be_bytes(magic) {
                        MAIN_MAGIC => return Ok(Some(Caller::Main(connection))),
                        MULTIFD_MAGIC => return Ok(Some(Caller::Channel(connection))),
                        magic => say_of_stranger(&format!(
                            "a connection that began with {magic:#010x} was closed: neither a \
                             main channel nor a multifd channel"
                        )),
                    }
                }
                // It was nobody, or a source that was killed: its main channel will tell.
                Ok(Peek::End) | Err(_) => drop(self.guests.remove(at)),
                Ok(Peek::Nothing | Peek::Part)
                    if guest.since.elapsed() > hello_timeout(self.timeout) =>
                {
                    self.guests.remove(at);
                    say_of_stranger("a connection that said nothing was closed");
                }
                Ok(seen) => {
                    guest.begun = matches!(seen, Peek::Part);
                    at += 1;
                }
            }
        }
        Ok(None)
    }
}
