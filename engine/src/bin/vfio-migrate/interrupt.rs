//! Ctrl-C: at once where nothing is under way, in order where something is.
//!
//! ```text
//!          SIGINT, SIGTERM, SIGHUP
//!   Idle ───────────────────────────────▶ the process ends, status 130
//!    │ ▲
//!    ▼ │ in_order(), its end
//!   Busy ──────────────▶ Asked ─────────▶ the process ends, status 130
//!    │                     │
//!    │ settled()           ▼
//!    ▼   the command sees requested(), cancels, tells its peer, ends with Interrupted
//!   Settled ────────────────────────────▶ the process ends, status 0
//! ```
//!
//! Settled is a migration that has passed on both sides, where only the printing is left: its status
//! stays that of its peer.
//!
//! Whoever waits in a `poll` adds [`asked`] to it, or looks around each tick.
//!
//! The signals are blocked in every thread; one thread takes them with `sigwait`, for as long as
//! the process lives, and so no code runs in a signal handler. That thread waits for nobody: not for
//! who reads stdout or stderr, nor for a lock that is held over a wait. Any thread may ask. SIGHUP is left
//! alone where it is ignored from the start, as `nohup` has it. SIGXFSZ is blocked too, for good: a write
//! beyond the limit of a file's size is then an `EFBIG`, as any other error of a write.

use std::{
    os::fd::AsFd,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use vfio_migration_uring::thread::spawn;

use crate::host_memory::NO_THREAD;
use anyhow::Context;
use nix::{
    poll::{PollFd, PollFlags},
    sys::{
        eventfd::{EfdFlags, EventFd},
        signal::{SigSet, Signal},
    },
};

/// The exit status of who was interrupted, by whichever signal: 128 and the number of SIGINT.
pub(crate) const STATUS: u8 = 130;

/// Where the command is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    /// Nothing would be left half done.
    Idle,
    /// Something would.
    Busy,
    /// And the user has asked for its end, then.
    Asked(Instant),
    /// Nothing but the printing is left. What is said where that is cut short.
    Settled(&'static str),
}

static STATE: Mutex<State> = Mutex::new(State::Idle);

/// Readable from the moment at which the user has asked for the end.
static ASKED: OnceLock<EventFd> = OnceLock::new();

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has signals waited for, from now on; `tell` says that the command was interrupted, and waits for nobody
/// for longer than it is told. To be called before any thread is started.
pub(crate) fn watch(tell: fn(Duration)) -> anyhow::Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    if !is_ignored(Signal::SIGHUP) {
        signals.add(Signal::SIGHUP);
    }
    let mut blocked = signals;
    blocked.add(Signal::SIGXFSZ);
    blocked.thread_block().context("cannot block signals")?;
    let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
    let event = event.context("cannot make an eventfd")?;
    let event = ASKED.get_or_init(|| event);
    let wait = move || {
        while signals.wait().is_ok() {
            let mut state = state();
            match *state {
                State::Busy => {
                    *state = State::Asked(Instant::now());
                    // Written once, it is far from its limit.
                    let _written = event.write(1);
                }
                State::Settled(what) => end_settled(what),
                State::Idle | State::Asked(_) => {
                    tell(UNREAD);
                    std::process::exit(STATUS.into());
                }
            }
        }
    };
    spawn("signals", wait).context(NO_THREAD)?;
    Ok(())
}

/// Whether a signal is ignored, as whoever started this process has it.
fn is_ignored(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & (1 << (signal as i32 - 1)) != 0)
}

/// How long the end waits for whoever reads stderr.
const UNREAD: Duration = Duration::from_millis(300);

/// Ends the process from any thread: whoever stands in a write is left there.
fn end_settled(what: &str) -> ! {
    crate::output::say(&format!("warning: {what}, but the output was interrupted"));
    crate::stderr::finish(UNREAD);
    std::process::exit(0);
}

/// From now on the migration has passed: what is left is to be printed, and Ctrl-C ends that. Where it was
/// asked for already, it does so here. What has to be removed is.
pub(crate) fn settled(what: &'static str) {
    let before = std::mem::replace(&mut *state(), State::Settled(what));
    if matches!(before, State::Asked(_)) {
        end_settled(what);
    }
}

/// While it lives the first Ctrl-C is left to the command.
#[derive(Debug)]
#[must_use = "lasts as long as it lives"]
pub(crate) struct InOrder(());

/// From now on there is something to be put in order.
pub(crate) fn in_order() -> InOrder {
    let mut state = state();
    if *state == State::Idle {
        *state = State::Busy;
    }
    InOrder(())
}

impl Drop for InOrder {
    fn drop(&mut self) {
        let mut state = state();
        if !matches!(*state, State::Settled(_)) {
            *state = State::Idle;
        }
    }
}

/// Whether the user has asked for the end.
pub(crate) fn requested() -> bool {
    matches!(*state(), State::Asked(_))
}

/// What a `poll` ends with as soon as [`requested`] is so; for good, so whoever goes on must leave it out.
pub(crate) fn asked() -> Option<PollFd<'static>> {
    let event = ASKED.get()?;
    Some(PollFd::new(event.as_fd(), PollFlags::POLLIN))
}

/// How much time the last words have, and what goes with them, when the user has asked for the end.
const LAST_WORDS: Duration = Duration::from_millis(700);

/// How long a peer may be waited for that is otherwise given `time`: as good as not at all, some time
/// after the user has asked for the end.
pub(crate) fn patience(time: Duration) -> Duration {
    match *state() {
        State::Asked(at) => time.min(LAST_WORDS.saturating_sub(at.elapsed())),
        _ => time,
    }
}
