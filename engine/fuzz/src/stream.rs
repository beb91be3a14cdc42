//! One channel's bytes, as a target hands them out: each piece is what one read returns at most.

use std::{
    cell::RefCell,
    collections::VecDeque,
    io::{self, Read, Write},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use vfio_migration::Channel;

use crate::steps;

/// What the next read finds.
#[derive(Clone, Debug)]
pub enum Piece {
    /// These bytes, or as many as it has room for.
    Bytes(Vec<u8>),
    /// The end.
    End,
    /// An error of this kind.
    Fails(io::ErrorKind),
}

#[derive(Debug, Default)]
struct Shared {
    pieces: VecDeque<Piece>,
    hung_up: bool,
}

/// A target's end of a channel.
#[derive(Clone, Debug, Default)]
pub struct Feed(Arc<Mutex<Shared>>);

impl Feed {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands out one more piece.
    pub fn push(&self, piece: Piece) {
        self.lock().pieces.push_back(piece);
    }

    /// Whether everything has been read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lock().pieces.is_empty()
    }

    /// Whether the session has hung up.
    #[must_use]
    pub fn is_hung_up(&self) -> bool {
        self.lock().hung_up
    }

    /// The session's end of it.
    pub fn channel(&self) -> Channel {
        let reader = Reader {
            feed: self.clone(),
            rest: RefCell::default(),
        };
        let feed = self.clone();
        Channel::from_stream(reader, move || feed.lock().hung_up = true)
    }
}

struct Reader {
    feed: Feed,
    rest: RefCell<VecDeque<u8>>,
}

impl Read for Reader {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let rest = self.rest.get_mut();
        if rest.is_empty() {
            // Everybody else may have a turn before each read.
            steps::moved();
            steps::give_way(steps::Place::Outside);
            let piece = steps::wait_for(|| {
                let mut shared = self.feed.lock();
                if shared.hung_up {
                    return Some(Piece::End);
                }
                match shared.pieces.front() {
                    // It stays: whoever reads again finds the end again.
                    Some(Piece::End) => Some(Piece::End),
                    _ => shared.pieces.pop_front(),
                }
            });
            match piece {
                Piece::Bytes(bytes) => rest.extend(bytes),
                Piece::End => return Ok(0),
                Piece::Fails(kind) => return Err(kind.into()),
            }
        }
        rest.read(bytes)
    }
}

impl Write for Reader {
    fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
