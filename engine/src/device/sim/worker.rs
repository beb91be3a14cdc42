//! The thread behind a pipe or a socket: it makes the state, or takes it.
//!
//! ```text
//!             ┌────────────── over? ──────────────▶ return: the device's end closes
//!             │
//!   look ─────┼─ a stall begins here ─▶ wait ──┐
//!     ▲       ├─ nothing may be moved ▶ wait ──┤
//!     │       └─ move some bytes ──────────────┤
//!     └────────────────────────────────────────┘
//! ```
//!
//! One wait, in `Worker::wait_for`: for the other side of the wire, for the control, for the
//! time of a stall.

use std::{
    cmp,
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use xxhash_rust::xxh3::Xxh3Default;

use super::{
    SimConfig,
    control::{CHUNK, Control, Loaded},
    faults::Stall,
    image::{Image, mix, part},
};

/// The device's thread of a session.
pub(super) struct Worker {
    wire: File,
    control: Arc<Control>,
    at: u64,
    pieces: Pieces,
    stall: Option<Stall>,
    fail_at: Option<u64>,
}

/// Says to whoever waits for an answer that none will come, also where the thread panics.
impl Drop for Worker {
    fn drop(&mut self) {
        self.control.shared().gone = true;
        self.control.answered.notify_all();
    }
}

/// Why a thread stops waiting.
#[derive(Eq, PartialEq)]
enum Woken {
    /// Look again.
    Again,
    /// The data fd has been closed.
    Closed,
    /// The time is up.
    Time,
}

/// What a load reads at first.
const LEAST: usize = 4 << 10;

/// `len` bytes of a buffer that grows with what is asked of it; fewer, but one at least, where there is
/// no memory for more.
fn room(buffer: &mut Vec<u8>, len: usize) -> &mut [u8] {
    let more = len.saturating_sub(buffer.len());
    if buffer.try_reserve_exact(more).is_ok() || buffer.is_empty() {
        let len = len.max(buffer.len());
        buffer.resize(len, 0);
    }
    let len = len.min(buffer.len());
    &mut buffer[..len]
}

impl Worker {
    pub(super) fn new(config: &SimConfig, wire: OwnedFd, control: &Arc<Control>) -> Self {
        Self {
            wire: wire.into(),
            control: Arc::clone(control),
            at: 0,
            pieces: Pieces {
                max: config.piece,
                seed: config.seed,
                count: 0,
            },
            stall: config.faults.stall,
            fail_at: config.faults.fail_at,
        }
    }

    pub(super) fn save(&mut self, image: Image) {
        let mut buffer = Vec::new();
        loop {
            let limit = {
                let shared = self.control.shared();
                if shared.stop {
                    return;
                }
                cmp::min(shared.limit, image.len())
            };
            // Returning closes the device's end, and so ends the stream.
            if self.at == image.len() || self.fail_at == Some(self.at) {
                return;
            }
            if self.is_stalled() {
                continue;
            }
            if self.at == limit {
                if self.wait(PollFlags::empty()) == Woken::Closed {
                    return;
                }
                continue;
            }
            let here = self.allowed(limit - self.at);
            let bytes = room(&mut buffer, here);
            image.fill(self.at, bytes);
            match self.write_all(bytes) {
                Ok(true) => {}
                Ok(false) | Err(_) => return,
            }
        }
    }

    /// False where the session ended first.
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<bool> {
        let mut rest = bytes;
        while !rest.is_empty() {
            match (&self.wire).write(rest) {
                Ok(n) => {
                    rest = &rest[n..];
                    self.advance(n);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.control.shared().stop {
                        return Ok(false);
                    }
                    // `Closed` shows as an error of the next write.
                    self.wait(PollFlags::POLLOUT);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    pub(super) fn load(&mut self) {
        let mut buffer = Vec::new();
        // How much the last read brought, at the least: an idle device has little memory.
        let mut most = LEAST;
        let mut digest = Xxh3Default::new();
        let mut header = [0; 24];
        let mut open = true;
        loop {
            let (stop, judge) = {
                let shared = self.control.shared();
                (shared.stop, shared.judge && shared.answer.is_none())
            };
            // Returning closes the device's end, and so refuses what is still written.
            if stop || self.fail_at == Some(self.at) {
                return;
            }
            if self.is_stalled() {
                continue;
            }
            let here = self.allowed(CHUNK as u64);
            let got = if open {
                (&self.wire).read(room(&mut buffer, here.min(most)))
            } else {
                Err(io::ErrorKind::WouldBlock.into())
            };
            match got {
                Ok(0) => open = false,
                Ok(n) => {
                    if n == most && n < CHUNK {
                        most *= 2;
                    }
                    let bytes = &buffer[..n];
                    if let Ok(at) = usize::try_from(self.at)
                        && at < header.len()
                    {
                        let part = cmp::min(n, header.len() - at);
                        header[at..at + part].copy_from_slice(&bytes[..part]);
                    }
                    digest.update(bytes);
                    self.advance(n);
                    let image = (self.at >= Image::HEADER_LEN).then(|| Image::from_header(&header));
                    // More than the state, or none that this device knows.
                    if image.is_some_and(|image| image.is_none_or(|image| self.at > image.len())) {
                        return;
                    }
                }
                // All that was written before the question was asked has been read by now.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && judge => {
                    let loaded = Image::from_header(&header)
                        .filter(|image| image.len() == self.at)
                        .map(|image| Loaded {
                            image,
                            digest: digest.digest(),
                        });
                    self.answer(loaded);
                    if loaded.is_some() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if open {
                        self.wait(PollFlags::POLLIN);
                    } else {
                        // Nobody can write any more, and `poll` would say so for ever.
                        self.wait_for(None, None);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    fn advance(&mut self, n: usize) {
        self.at += n as u64;
        self.control.shared().at = self.at;
    }

    fn answer(&self, loaded: Option<Loaded>) {
        self.control.shared().answer = Some(loaded);
        self.control.answered.notify_all();
    }

    /// How much to move at once: not past the next place where something is to happen.
    fn allowed(&mut self, wanted: u64) -> usize {
        let at = self.at;
        let next = [self.fail_at, self.stall.map(|stall| stall.at)];
        let next = next.into_iter().flatten().filter(|next| *next > at).min();
        let wanted = next.map_or(wanted, |next| wanted.min(next - at));
        cmp::min(part(wanted.min(CHUNK as u64)), self.pieces.next())
    }

    /// Stalls, where it is time to. True where something has changed meanwhile.
    fn is_stalled(&mut self) -> bool {
        let Some(stall) = self.stall.filter(|stall| stall.at == self.at) else {
            return false;
        };
        let begin = Instant::now();
        // Ends with the session, with `release`, or when the time is up.
        loop {
            let judge = {
                let shared = self.control.shared();
                if shared.stop {
                    return true;
                }
                if shared.released {
                    break;
                }
                shared.judge && shared.answer.is_none()
            };
            let left = stall.time.map(|time| time.saturating_sub(begin.elapsed()));
            match left {
                Some(Duration::ZERO) => break,
                // This driver would never come back with an answer.
                None if judge => self.answer(None),
                _ => {
                    self.wait_for(None, left);
                }
            }
        }
        self.stall = None;
        true
    }

    fn wait(&self, events: PollFlags) -> Woken {
        self.wait_for(Some(events), None)
    }

    /// The thread's one wait: for the wire (`None`: not), the control, and the time.
    fn wait_for(&self, events: Option<PollFlags>, time: Option<Duration>) -> Woken {
        let timeout = time.map_or(PollTimeout::NONE, |time| {
            // Rounded up, so that the time is up when it says so; a long one comes in parts.
            let ms = time.as_millis().saturating_add(1);
            PollTimeout::from(u16::try_from(ms).unwrap_or(u16::MAX))
        });
        let mut fds = [
            PollFd::new(self.control.wake.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.wire.as_fd(), events.unwrap_or(PollFlags::empty())),
        ];
        let fds = &mut fds[..1 + usize::from(events.is_some())];
        let woken = match poll(fds, timeout) {
            Ok(0) => Woken::Time,
            // `EINTR`, and nothing else that a look at the state would not show.
            Err(_) => Woken::Again,
            Ok(_) => {
                let closed = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
                let wire = fds.get(1).and_then(PollFd::revents);
                if wire.is_some_and(|events| events.intersects(closed)) {
                    Woken::Closed
                } else {
                    Woken::Again
                }
            }
        };
        // Read after the wait and before the next look: no change is missed.
        let _ = self.control.wake.read();
        woken
    }
}

/// How many bytes at once: up to a maximum, in an order that the seed decides.
struct Pieces {
    max: Option<usize>,
    seed: u64,
    count: u64,
}

impl Pieces {
    fn next(&mut self) -> usize {
        let Some(max) = self.max else { return CHUNK };
        self.count += 1;
        let max = cmp::max(max, 1) as u64;
        part((mix(!self.seed, self.count) % max + 1).min(CHUNK as u64))
    }
}
