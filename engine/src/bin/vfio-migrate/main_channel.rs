//! What `send` and `receive` say to each other beside the packets: the main channel.
//!
//! ```text
//!   source                                                             destination
//!     QEVM, configuration, open return path  ──────────────────────▶
//!     START of each device: SETUP, END       ──────────────────────▶   the same devices?
//!     ping                                   ──────────────────────▶
//!                                            ◀──────────────────────   pong: all are RESUMING
//!     N multifd channels, to the same address ═════════════════════▶
//!     (PART of each device: END, for what it gives while it runs,
//!      and the channels carry)               ──────────────────────▶
//!     command 11, outgoing start           ──────────────────────▶   loads begin
//!     END, FULL of each device: empty        ──────────────────────▶   (or: config load ready)
//!     ping, once a second                    ──────────────────────▶
//!                                            ◀──────────────────────   pong, once a second
//!     EOF, description: all has been sent    ──────────────────────▶
//!                                            ◀──────────────────────   shut 0: all is loaded
//! ```
//!
//! Everything is in QEMU's framing, and the destination takes the sections in this order alone
//! (`MainChannelOrder`); behind the description the source says nothing. The pings and pongs are
//! for one thing besides: a peer that says nothing for the time-out has stopped. Whoever fails says
//! why, in a command or a reply of its own number ([`REASON`]), before it closes; a destination
//! then says shut 1. Such a number is unknown to a QEMU, which takes it for a failure: and so it
//! is.
//!
//! # Threads
//!
//! Each side reads with a thread of its own, which ends with the other side's last word, with its
//! end, or when the main thread shuts the connection down. On the destination both threads write,
//! behind a lock; on the source the main thread alone. What the source's reading thread has heard it
//! leaves in one place, [`ReturnPathEvent`], which holds no more than one reason, whatever a destination says.

use std::{
    io::Write,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{anyhow, bail};
use vfio_migration::{
    DeviceId, Error, ErrorKind, Phase,
    stream::{Command, Event, Reply, Section, SectionKind, Writer},
};

use crate::{
    failure::Both,
    interrupt,
    network::{Connection, TICK},
    output,
};

/// The number of the command, and of the reply, whose payload says why a side has failed.
pub(crate) const REASON: u16 = 0x7666;

/// How often a side says that it is still there.
pub(crate) const HEARTBEAT: Duration = Duration::from_secs(1);

/// How long a side that was failed by a connection waits to hear why from its peer.
pub(crate) const EXPLANATION: Duration = Duration::from_millis(500);

/// How long a side waits for its last words to be read.
pub(crate) const LINGER: Duration = Duration::from_secs(1);

/// The longest reason that is sent or shown, in bytes.
const MAX_REASON: usize = 1000;

fn reason(error: &anyhow::Error) -> Vec<u8> {
    let mut text = format!("{error:#}").into_bytes();
    text.truncate(MAX_REASON);
    text
}

/// A peer's reason: whatever it is, printable and on one line.
pub(crate) fn show_reason(payload: &[u8]) -> String {
    let text = String::from_utf8_lossy(&payload[..payload.len().min(MAX_REASON)]);
    output::one_line(&text)
}

/// Whether an engine's error is one that its peer may know more about.
pub(crate) fn is_the_peers(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Channel | ErrorKind::Missing | ErrorKind::Protocol(_)
    )
}

/// The error with which a session is told that its main channel has failed.
pub(crate) fn main_failed() -> Error {
    Error::new(ErrorKind::Channel, Phase::Section)
}

/// One error out of the engine's and the main channel's.
pub(crate) fn join(engine: Option<Error>, main: Option<anyhow::Error>) -> anyhow::Result<()> {
    let told = |error: &Error| error.phase() == Phase::Section && error.device().is_none();
    match (engine, main) {
        (None, None) => Ok(()),
        (Some(engine), None) => Err(anyhow!(engine)),
        (Some(engine), Some(main)) if !told(&engine) => Err(both(anyhow!(engine), &main)),
        (_, Some(main)) => Err(main),
    }
}

/// An error, and what was heard besides; unless that is the same again, told by the peer.
pub(crate) fn both(error: anyhow::Error, besides: &anyhow::Error) -> anyhow::Error {
    let (text, more) = (format!("{error:#}"), format!("{besides:#}"));
    if more.contains(&text) || text.contains(&more) {
        error
    } else {
        anyhow!(Both {
            first: error,
            besides: more
        })
    }
}

// ------------------------------------------------------------------------------- destination

/// The destination's words to the source.
#[derive(Debug)]
pub(crate) struct ReturnPath(Mutex<Connection>);

impl ReturnPath {
    pub(crate) const fn new(connection: Connection) -> Self {
        Self(Mutex::new(connection))
    }

    pub(crate) fn reply(&self, reply: &Reply) -> vfio_migration::Result<()> {
        let mut connection = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        reply.write(&mut *connection)
    }

    /// Says that this side is still there, unless that had to wait: for another thread's reply, or for a
    /// source that has not read what was said before.
    pub(crate) fn beat(&self) {
        if let Ok(mut connection) = self.0.try_lock()
            && matches!(connection.is_writable(Duration::ZERO), Ok(true))
        {
            // Where the source is gone the reader says so, and better.
            let _gone = Reply::Pong(STILL_HERE).write(&mut *connection);
        }
    }

    /// Says that the destination has failed, and why.
    pub(crate) fn refuse(&self, error: &anyhow::Error) {
        let why = Reply::Other {
            kind: REASON,
            payload: reason(error),
        };
        // The source may be gone; it is over in either case.
        let _said = self.reply(&why).and_then(|()| self.reply(&Reply::Shut(1)));
    }
}

// ------------------------------------------------------------------------------------ source

/// The source's words to the destination.
#[derive(Debug)]
pub(crate) struct MainChannelWriter(Writer<Connection>);

impl MainChannelWriter {
    /// Opens the main channel.
    pub(crate) fn open(connection: Connection) -> anyhow::Result<Self> {
        let mut writer = Writer::open(connection)?;
        let name = "vfio-migrate".into();
        writer.write(&Event::Configuration { name })?;
        writer.write(&Event::Command(Command::OpenReturnPath))?;
        Ok(Self(writer))
    }

    pub(crate) fn command(&mut self, command: Command) -> vfio_migration::Result<()> {
        self.0.write(&Event::Command(command))
    }

    /// A section of a device, the `id`th, with its body. All bodies are small here, and one that fails
    /// leaves nothing of its section: why it failed can still be said behind what came before.
    pub(crate) fn section<R>(
        &mut self,
        kind: SectionKind,
        id: u32,
        owner: &DeviceId,
        body: impl FnOnce(&mut Vec<u8>) -> vfio_migration::Result<R>,
    ) -> vfio_migration::Result<R> {
        let mut bytes = Vec::new();
        let written = body(&mut bytes)?;
        self.0.write(&Event::Section(Section {
            kind,
            id,
            owner: owner.clone(),
            version: 1,
        }))?;
        let sent = self.0.body().write_all(&bytes);
        sent.map_err(|error| Error::new(ErrorKind::Channel, Phase::Section).caused_by(error))?;
        self.0.footer(id)?;
        Ok(written)
    }

    /// The end of the VM's state.
    pub(crate) fn end(&mut self, description: Vec<u8>) -> anyhow::Result<()> {
        self.0.write(&Event::Eof)?;
        self.0.write(&Event::Description(description))?;
        self.0.body().flush()?;
        Ok(())
    }

    /// Says that the source has failed, and why.
    pub(crate) fn give_up(&mut self, error: &anyhow::Error) {
        // The destination may be gone; it is over in either case.
        let _said = self.command(Command::Other {
            command: REASON,
            payload: reason(error),
        });
    }
}

/// What the destination has said, as far as it counts: its last word of each kind, for a destination
/// may say any number of things.
#[derive(Debug, Default)]
struct Told {
    ponged: bool,
    done: bool,
    /// Whether it has said that it has failed.
    refused: bool,
    why: Option<String>,
    /// Why it is over where it is not done, until the main thread has taken it.
    failure: Option<anyhow::Error>,
    /// Whether nothing will follow.
    ended: bool,
}

/// Where the source's reading thread leaves what it has heard, and the main thread finds it.
#[derive(Debug, Default)]
pub(crate) struct ReturnPathEvent {
    told: Mutex<Told>,
    changed: Condvar,
}

impl ReturnPathEvent {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a reply in. Returns whether it was the last.
    fn reply(&self, reply: &Reply) -> bool {
        let mut told = self.told();
        match reply {
            Reply::Pong(PING) => told.ponged = true,
            Reply::Shut(status) => {
                told.ended = true;
                told.done = *status == 0;
                told.refused = !told.done;
                if !told.done {
                    told.failure = Some(match told.why.take() {
                        Some(why) => anyhow!("the destination has failed: {why}"),
                        None => anyhow!("the destination has failed, and does not say why"),
                    });
                }
            }
            Reply::Other {
                kind: REASON,
                payload,
            } => told.why = Some(show_reason(payload)),
            // Nobody waits for it.
            _ => return false,
        }
        self.changed.notify_one();
        told.ended
    }

    fn gone(&self, why: anyhow::Error) {
        let mut told = self.told();
        told.failure = Some(why);
        told.ended = true;
        self.changed.notify_one();
    }
}

/// Reads the return path to its end: the source's reading thread. It waits for the destination
/// alone, never for the main thread.
pub(crate) fn listen(mut connection: Connection, timeout: Duration, to: &ReturnPathEvent) {
    loop {
        let why = match Reply::read(&mut connection) {
            Ok(Some(reply)) if to.reply(&reply) => return,
            Ok(Some(_)) => continue,
            Ok(None) => anyhow!("the destination has gone away"),
            Err(error) if timed_out(&error) => anyhow!(
                "nothing was heard from the destination for {} s",
                timeout.as_secs_f64()
            ),
            Err(error) => anyhow!(error).context("the destination has gone away"),
        };
        return to.gone(why);
    }
}

/// Whether the user has asked for the end while the peer took nothing.
pub(crate) fn interrupted(error: &Error) -> bool {
    error.raw_os_error() == Some(nix::errno::Errno::ECANCELED as i32) && interrupt::requested()
}

/// Whether the connection stood still for its time-out.
pub(crate) fn timed_out(error: &Error) -> bool {
    *error.kind() == ErrorKind::Channel
        && error.raw_os_error() == Some(nix::errno::Errno::EAGAIN as i32)
}

/// What the main thread knows of what the destination has said.
#[derive(Debug)]
pub(crate) struct Replies<'a> {
    heard: &'a ReturnPathEvent,
    /// Whether the devices are RESUMING.
    pub(crate) ponged: bool,
    /// Whether the destination has all.
    pub(crate) done: bool,
    /// Whether it has said that it has failed.
    pub(crate) refused: bool,
    /// Set when it is told that all has been sent: before, it cannot have all.
    pub(crate) all_is_sent: bool,
}

impl<'a> Replies<'a> {
    pub(crate) const fn new(heard: &'a ReturnPathEvent) -> Self {
        Self {
            heard,
            ponged: false,
            done: false,
            refused: false,
            all_is_sent: false,
        }
    }

    fn take_in(&mut self, mut told: MutexGuard<'_, Told>) -> anyhow::Result<()> {
        (self.ponged, self.done, self.refused) = (told.ponged, told.done, told.refused);
        if told.done && !self.all_is_sent {
            bail!("the destination says that all is loaded, and not all has been sent");
        }
        told.failure.take().map_or(Ok(()), Err)
    }

    /// Takes in what has been said, after a tick at the latest.
    ///
    /// An error where the destination has failed, or is gone.
    pub(crate) fn wait(&mut self) -> anyhow::Result<()> {
        let known = (self.ponged, self.done);
        let told = self.heard.told();
        let nothing_new = |told: &mut Told| !told.ended && (told.ponged, told.done) == known;
        let waited = self
            .heard
            .changed
            .wait_timeout_while(told, TICK, nothing_new);
        let (told, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let over = told.ended && !told.done;
        self.take_in(told)?;
        if over {
            bail!("the destination has gone away");
        }
        Ok(())
    }

    /// As [`Replies::wait`], at once.
    pub(crate) fn look(&mut self) -> anyhow::Result<()> {
        self.take_in(self.heard.told())
    }
}

/// The value of the ping that asks whether the destination is ready.
pub(crate) const PING: u32 = 1;

/// The value of those that say that the source is still there.
pub(crate) const STILL_HERE: u32 = 2;
