//! The main channel, passed on both ways, and what the destination says on its way back.
//!
//! Two threads pump it; each ends when its side ends, when the other cannot be written to, or when both
//! connections are shut down.

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
};

use anyhow::{Context, anyhow, bail, ensure};
use vfio_migration_uring::thread::spawn;

use crate::{
    host_memory::NO_THREAD,
    main_channel::{REASON, show_reason},
    network::Connection,
};

/// What the return path has said, read as it passes. Each message is a be16 kind, a be16 length, and
/// that many bytes.
#[derive(Debug, Default)]
struct Verdict {
    header: Vec<u8>,
    payload: Vec<u8>,
    /// Bytes of the payload that are still to come.
    left: usize,
    /// Of SHUT: 0 where all is loaded.
    shut: Option<u32>,
    reason: Option<String>,
}

impl Verdict {
    const HEADER: usize = 4;
    const SHUT: u16 = 1;

    fn pass(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.header.len() < Self::HEADER {
                self.header.push(bytes[0]);
                bytes = &bytes[1..];
                if let [_, _, high, low] = self.header[..] {
                    self.left = u16::from_be_bytes([high, low]).into();
                }
            } else {
                let (payload, rest) = bytes.split_at(bytes.len().min(self.left));
                self.payload.extend_from_slice(payload);
                self.left -= payload.len();
                bytes = rest;
            }
            if self.header.len() == Self::HEADER && self.left == 0 {
                self.message();
            }
        }
    }

    fn message(&mut self) {
        let kind = u16::from_be_bytes([self.header[0], self.header[1]]);
        match (kind, <[u8; 4]>::try_from(&self.payload[..])) {
            (Self::SHUT, Ok(value)) => self.shut = Some(u32::from_be_bytes(value)),
            (REASON, _) => self.reason = Some(show_reason(&self.payload)),
            _ => {}
        }
        self.header.clear();
        self.payload.clear();
    }

    /// Fails where the destination has said that it failed, or has ended with part of its replies.
    fn check(&self, replied: bool) -> anyhow::Result<()> {
        match (&self.reason, self.shut) {
            (Some(reason), _) => bail!("the destination has failed: {reason}"),
            (None, Some(0)) => Ok(()),
            (None, Some(_)) => bail!("the destination has failed: it says why itself"),
            (None, None) if replied => {
                bail!("the destination has ended without the word that all is loaded")
            }
            // There is no return path.
            (None, None) => Ok(()),
        }
    }
}

/// One direction of the main channel.
struct Pump {
    from: Connection,
    to: Connection,
    /// Who reads what it brings.
    reader: &'static str,
    bytes: Arc<AtomicU64>,
    /// On the return path.
    verdict: Option<Arc<Mutex<Verdict>>>,
}

impl Pump {
    /// Passes bytes on until `from` ends, and then says so to `to`.
    fn run(mut self) -> anyhow::Result<()> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let count = match self.from.read(&mut buffer) {
                // One that was reset ends as well: who did it knows why.
                Ok(0) => break,
                // So does one that was cut: what a main channel says has an end of its own.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof
                    ) =>
                {
                    break;
                }
                Ok(count) => count,
                // A main channel may be silent for as long as its source likes; a peer that is gone
                // is found by the keepalive.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) =>
                {
                    continue;
                }
                Err(error) => return Err(self.failed(error)),
            };
            if let Some(verdict) = &self.verdict {
                lock(verdict).pass(&buffer[..count]);
            }
            if let Err(error) = self.to.write_all(&buffer[..count]) {
                return Err(self.failed(error));
            }
            // Relaxed: a counter.
            self.bytes.fetch_add(count as u64, Relaxed);
        }
        self.to.shutdown(Shutdown::Write);
        Ok(())
    }

    fn failed(&self, error: io::Error) -> anyhow::Error {
        // Neither side may wait for what cannot come.
        self.from.shutdown(Shutdown::Both);
        self.to.shutdown(Shutdown::Both);
        let reader = self.reader;
        match error.kind() {
            // The connection's own time-out.
            io::ErrorKind::WouldBlock => {
                anyhow!("the main channel to the {reader} failed: nothing was taken in time")
            }
            _ => anyhow!(error).context(format!("the main channel to the {reader} failed")),
        }
    }
}

fn lock(verdict: &Mutex<Verdict>) -> MutexGuard<'_, Verdict> {
    verdict.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The main channel, both ways.
pub(super) struct MainChannel {
    ends: [Connection; 2],
    /// To the destination, to the source.
    pumps: [Option<JoinHandle<anyhow::Result<()>>>; 2],
    bytes: [Arc<AtomicU64>; 2],
    verdict: Arc<Mutex<Verdict>>,
}

impl MainChannel {
    pub(super) fn start(source: Connection, destination: Connection) -> anyhow::Result<Self> {
        let bytes: [Arc<AtomicU64>; 2] = Default::default();
        let verdict = Arc::default();
        let mut main = Self {
            pumps: [None, None],
            bytes: bytes.clone(),
            ends: [source.try_clone()?, destination.try_clone()?],
            verdict: Arc::clone(&verdict),
        };
        let [there, back] = bytes;
        let pumps = [
            Pump {
                from: source.try_clone()?,
                to: destination.try_clone()?,
                reader: "destination",
                bytes: there,
                verdict: None,
            },
            Pump {
                from: destination,
                to: source,
                reader: "source",
                bytes: back,
                verdict: Some(verdict),
            },
        ];
        for (pump, place) in pumps.into_iter().zip(&mut main.pumps) {
            *place = Some(spawn("main", || pump.run()).context(NO_THREAD)?);
        }
        Ok(main)
    }

    /// Whether the destination has said that all is loaded.
    pub(super) fn is_loaded(&self) -> bool {
        lock(&self.verdict).shut == Some(0)
    }

    /// Whether the source has ended, and whether the destination has.
    pub(super) fn ended(&self) -> [bool; 2] {
        let ended =
            |pump: &Option<JoinHandle<_>>| pump.as_ref().is_none_or(JoinHandle::is_finished);
        self.pumps.each_ref().map(ended)
    }

    pub(super) fn is_ended(&self) -> bool {
        self.ended() == [true, true]
    }

    /// What has failed, of the pumps that have ended.
    pub(super) fn failure(&mut self) -> Option<anyhow::Error> {
        let pumps = self.pumps.iter_mut();
        let ended = pumps.filter_map(|pump| pump.take_if(|pump| pump.is_finished()));
        let joined = ended.map(|pump| pump.join().unwrap_or_else(|_| Err(anyhow!("a panic"))));
        joined.filter_map(Result::err).next()
    }

    /// Whether the migration has passed, as far as the destination has said so.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        let replied = self.bytes[1].load(Relaxed) > 0;
        lock(&self.verdict).check(replied)
    }

    /// Fails only where the destination has said that it failed: its silence is no reason.
    pub(super) fn check_words(&self) -> anyhow::Result<()> {
        lock(&self.verdict).check(false)
    }

    /// As [`MainChannel::check`], when all is over: where there was neither a reply nor a channel,
    /// nothing says that anything has passed.
    pub(super) fn check_all(&self, channels: usize) -> anyhow::Result<()> {
        self.check()?;
        ensure!(
            channels > 0 || self.bytes[1].load(Relaxed) > 0,
            "the main channel has ended, and there was neither a reply nor a multifd channel"
        );
        Ok(())
    }

    /// Ends both ways, and waits for the pumps.
    pub(super) fn close(mut self) -> [u64; 2] {
        for end in &self.ends {
            end.shutdown(Shutdown::Both);
        }
        for pump in self.pumps.iter_mut().filter_map(Option::take) {
            // What it says now is our own doing.
            let _closed = pump.join();
        }
        // Relaxed: the joins have ordered them.
        self.bytes.each_ref().map(|bytes| bytes.load(Relaxed))
    }
}
