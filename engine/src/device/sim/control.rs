//! What the threads of a simulated device's session share: its progress, and the orders that it was given.
//!
//! The device's own thread and the handles write it. Each change wakes the session's thread, if there is
//! one, and that thread answers questions. Each lock is held for an assignment or two. The one wait here is
//! for the thread's judgement; it ends with the answer, or with the thread.

use std::{
    cmp,
    fs::File,
    io::{self, Seek},
    os::unix::fs::FileExt,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use nix::sys::eventfd::{EfdFlags, EventFd};
use xxhash_rust::xxh3::Xxh3Default;

use super::image::{Image, part};

/// What the device's thread moves at once, in bytes, at most.
pub(super) const CHUNK: usize = 256 << 10;

/// A state that has been loaded, complete.
#[derive(Clone, Copy, Debug)]
pub(super) struct Loaded {
    pub(super) image: Image,
    pub(super) digest: u64,
}

/// What the device, its thread and the handles share of a session.
#[derive(Debug)]
pub(super) struct Control {
    shared: Mutex<Shared>,
    /// The thread has answered, or is gone.
    pub(super) answered: Condvar,
    /// Something for the thread has changed.
    pub(super) wake: EventFd,
    /// The data fd itself and its first position, where a file does it all.
    file: Option<(File, u64)>,
}

#[derive(Debug, Default)]
pub(super) struct Shared {
    /// The session is over.
    pub(super) stop: bool,
    /// Stalls are.
    pub(super) released: bool,
    /// Saving: how far may be read.
    pub(super) limit: u64,
    /// How far the thread is.
    pub(super) at: u64,
    /// Loading: the device wants to know whether that was all.
    pub(super) judge: bool,
    pub(super) answer: Option<Option<Loaded>>,
    /// The thread has nothing more to say.
    pub(super) gone: bool,
}

impl Control {
    pub(super) fn new(limit: u64, file: Option<(File, u64)>) -> io::Result<Arc<Self>> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Arc::new(Self {
            shared: Mutex::new(Shared {
                limit,
                ..Shared::default()
            }),
            answered: Condvar::new(),
            wake: EventFd::from_flags(flags)?,
            file,
        }))
    }

    pub(super) fn shared(&self) -> MutexGuard<'_, Shared> {
        // Each lock is for one assignment or two: there is no half-done state to fear.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn change(&self, f: impl FnOnce(&mut Shared)) {
        f(&mut self.shared());
        // Fails only where the counter is full, and then the thread wakes anyway.
        let _ = self.wake.write(1);
    }

    /// How many bytes have gone through the data fd (for a pipe: through the device's end).
    pub(super) fn bytes(&self) -> u64 {
        match &self.file {
            None => self.shared().at,
            Some((file, start)) => {
                let position = (&mut &*file).stream_position();
                position.map_or(0, |position| position.saturating_sub(*start))
            }
        }
    }

    /// Saving: how far may be read now.
    pub(super) fn limit(&self) -> u64 {
        self.shared().limit
    }

    /// Saving: lets the data fd give the state up to `limit`.
    pub(super) fn expose(&self, limit: u64) {
        self.change(|shared| shared.limit = limit.max(shared.limit));
    }

    /// Ends a stall, and keeps the next from beginning.
    pub(super) fn release(&self) {
        self.change(|shared| shared.released = true);
    }

    /// Whether what has come is the whole state, and which: by the thread, or by the file's bytes.
    pub(super) fn judge(&self) -> io::Result<Option<Loaded>> {
        match &self.file {
            None => Ok(self.ask()),
            Some((file, start)) => digest(file, *start, self.bytes()),
        }
    }

    /// Asks the thread whether what has come is the whole state.
    fn ask(&self) -> Option<Loaded> {
        self.change(|shared| {
            shared.judge = true;
            shared.answer = None;
        });
        // Ends with the thread's answer, or with the thread.
        let mut shared = self
            .answered
            .wait_while(self.shared(), |shared| {
                shared.answer.is_none() && !shared.gone
            })
            .unwrap_or_else(PoisonError::into_inner);
        shared.judge = false;
        shared.answer.take().flatten()
    }
}

/// Reads what was written to `file`, `len` bytes from `start` on. `None` where that is no state, or
/// not exactly all of one.
fn digest(file: &File, start: u64, len: u64) -> io::Result<Option<Loaded>> {
    let mut header = [0; 24];
    if len < Image::HEADER_LEN {
        return Ok(None);
    }
    file.read_exact_at(&mut header, start)?;
    let Some(image) = Image::from_header(&header).filter(|image| image.len() == len) else {
        return Ok(None);
    };
    let mut digest = Xxh3Default::new();
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    while at < len {
        let bytes = &mut buffer[..part(cmp::min(len - at, CHUNK as u64))];
        file.read_exact_at(bytes, start + at)?;
        digest.update(bytes);
        at += bytes.len() as u64;
    }
    Ok(Some(Loaded {
        image,
        digest: digest.digest(),
    }))
}
