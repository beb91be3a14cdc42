//! stderr: any thread adds lines, and one thread writes them. Only that thread may wait for the reader.
//!
//! ```text
//!   line, log line ──▶ Queue: 64 KiB, what does not fit is counted ──▶ the thread "stderr" ──▶ write
//!   a stranger's   ──▶ 8 in 10 s, the rest is counted ───▲
//! ```
//!
//! So a full pipe, or a terminal that stands still, stops no other thread, and no thread that a signal
//! needs. The
//! queue's lock is held only while a line is moved, never while one is written. A log line waits for room,
//! for a
//! second at most, and not at all if nothing is written any more. At the end [`finish`] waits a little for the
//! remaining lines.
//!
//! Before [`start`], and if there is no thread, the calling thread writes its lines itself, unless stderr takes
//! none for a second.

use std::{
    collections::VecDeque,
    io::{self, Write},
    os::fd::AsFd,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use vfio_migration_uring::thread::spawn;

/// The most that waits to be written, in bytes.
const MOST: usize = 64 << 10;

/// How long a log line waits for room, and a line that is written where it is said for stderr.
const PATIENCE: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Lines {
    waiting: VecDeque<String>,
    bytes: usize,
    /// Whether one is being written.
    writing: bool,
    /// Whether somebody has waited in vain, and nothing has been written since.
    stuck: bool,
    /// How many did not fit.
    lost: u64,
    /// Whether there is a thread to write them.
    started: bool,
}

static LINES: Mutex<Lines> = Mutex::new(Lines {
    waiting: VecDeque::new(),
    bytes: 0,
    writing: false,
    stuck: false,
    lost: 0,
    started: false,
});

/// Something was put in, or written.
static CHANGED: Condvar = Condvar::new();

fn lines() -> MutexGuard<'static, Lines> {
    LINES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether stderr takes something within `patience`.
fn is_writable(patience: Duration) -> bool {
    let stderr = io::stderr();
    let mut fds = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
    matches!(poll(&mut fds, timeout), Ok(1..))
}

/// Writes to stderr, past the lock that Rust's own has: a thread may stand in it.
fn write(mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match nix::unistd::write(io::stderr(), bytes) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(Errno::EINTR) => {}
            // Somebody else's setting, of a terminal say.
            Err(Errno::EAGAIN) => {
                is_writable(PATIENCE);
            }
            // Who does not listen misses it.
            Err(_) => return,
        }
    }
}

/// Writes what is put in: the thread. Lives as long as the process.
fn run() {
    let mut lines = lines();
    loop {
        let Some(line) = lines.waiting.pop_front() else {
            lines = CHANGED.wait(lines).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        lines.bytes -= line.len();
        lines.writing = true;
        let lost = std::mem::take(&mut lines.lost);
        drop(lines);
        if lost > 0 {
            write(
                format!("vfio-migrate: {lost} lines were lost here: nobody read them\n").as_bytes(),
            );
        }
        write(line.as_bytes());
        lines = self::lines();
        lines.writing = false;
        lines.stuck = false;
        CHANGED.notify_all();
    }
}

/// Has lines written by a thread of its own from now on, which leaves signals to another: to be called
/// when they are blocked.
pub(crate) fn start() {
    let thread = spawn("stderr", run);
    lines().started = thread.is_ok();
}

/// Puts a line in, with its end. Where there is no room within `patience` it is lost.
fn put(line: String, patience: Duration) {
    let mut lines = lines();
    if !lines.started {
        drop(lines);
        if is_writable(PATIENCE) {
            write(line.as_bytes());
        }
        return;
    }
    if lines.bytes + line.len() > MOST && !patience.is_zero() && !lines.stuck {
        let no_room = |lines: &mut Lines| lines.bytes + line.len() > MOST && !lines.stuck;
        let waited = CHANGED.wait_timeout_while(lines, patience, no_room);
        let (all, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        lines = all;
        lines.stuck |= timeout.timed_out();
    }
    if lines.bytes + line.len() > MOST {
        lines.lost += 1;
        return;
    }
    lines.bytes += line.len();
    lines.waiting.push_back(line);
    CHANGED.notify_all();
}

/// Says a line, with its end; never waits.
pub(crate) fn say(line: String) {
    if let Some(strangers) = strangers().sum_up() {
        put(strangers, Duration::ZERO);
    }
    put(line, Duration::ZERO);
}

/// Waits until all has been written, but no longer than `patience`.
pub(crate) fn finish(patience: Duration) {
    if let Some(strangers) = strangers().sum_up() {
        put(strangers, Duration::ZERO);
    }
    let lines = lines();
    if lines.started {
        let left = |lines: &mut Lines| lines.writing || !lines.waiting.is_empty();
        // What is left then is lost.
        let _waited = CHANGED.wait_timeout_while(lines, patience, left);
    }
}

// -------------------------------------------------------------------------------------- strangers

/// How many lines strangers get in a [`WINDOW`].
const LINES_OF_STRANGERS: u32 = 8;

const WINDOW: Duration = Duration::from_secs(10);

/// What is said of connections that anybody may make, any number of them.
#[derive(Debug)]
struct Strangers {
    since: Option<Instant>,
    said: u32,
    unsaid: u64,
}

static STRANGERS: Mutex<Strangers> = Mutex::new(Strangers {
    since: None,
    said: 0,
    unsaid: 0,
});

fn strangers() -> MutexGuard<'static, Strangers> {
    STRANGERS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Strangers {
    /// Whether there may be a line at this time; it is counted otherwise.
    fn may_say(&mut self, now: Instant) -> bool {
        if self.since.is_none_or(|at| now.duration_since(at) >= WINDOW) {
            self.since = Some(now);
            self.said = 0;
        }
        if self.said == LINES_OF_STRANGERS {
            self.unsaid += 1;
            return false;
        }
        self.said += 1;
        true
    }

    /// The line that says how many there were besides, if any were.
    fn sum_up(&mut self) -> Option<String> {
        match std::mem::take(&mut self.unsaid) {
            0 => None,
            unsaid => Some(format!(
                "vfio-migrate: and {unsaid} more connections were closed in such ways\n"
            )),
        }
    }
}

/// Says a line about a stranger, with its end, unless there were many.
pub(crate) fn say_of_stranger(line: String) {
    let (may_say, before) = {
        let mut strangers = strangers();
        let may_say = strangers.may_say(Instant::now());
        (may_say, may_say.then(|| strangers.sum_up()).flatten())
    };
    if let Some(before) = before {
        put(before, Duration::ZERO);
    }
    if may_say {
        put(line, Duration::ZERO);
    }
}

// -------------------------------------------------------------------------------------------- log

/// Takes the log's lines, one in each write.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        put(String::from_utf8_lossy(bytes).into_owned(), PATIENCE);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_get_a_few_lines_and_are_summed_up() {
        let mut strangers = Strangers {
            since: None,
            said: 0,
            unsaid: 0,
        };
        let now = Instant::now();
        let said = (0..520).filter(|_| strangers.may_say(now)).count();
        assert_eq!(said, LINES_OF_STRANGERS as usize);
        let line = strangers.sum_up().expect("there were more");
        assert!(line.contains("and 512 more"), "{line}");
        assert_eq!(strangers.sum_up(), None);
        assert!(strangers.may_say(now + WINDOW));
    }
}
