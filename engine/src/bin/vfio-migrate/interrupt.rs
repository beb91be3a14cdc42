//! Ctrl-C: at once where nothing is under way, in order where something is.
//!
//! ```text
//!               SIGINT, SIGTERM
//!   Idle ───────────────────────────────▶ the process ends, status 130
//!    │ ▲
//!    ▼ │ in_order(), its end
//!   Busy ──────────────▶ Asked ─────────▶ the process ends, status 130
//!                          │
//!                          ▼
//!        the command sees requested(), cancels, tells its peer, ends with Interrupted
//! ```
//!
//! Both signals are blocked in every thread; one thread takes them with `sigwait`, for as long as
//! the process lives, and so no code runs in a signal handler. Any thread may ask.

use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Context;
use nix::sys::signal::{SigSet, Signal};

/// The exit status of who was interrupted: 128 and the number of SIGINT.
pub(crate) const STATUS: u8 = 130;

/// Where the command is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    /// Nothing would be left half done.
    Idle,
    /// Something would.
    Busy,
    /// And the user has asked for its end.
    Asked,
}

static STATE: Mutex<State> = Mutex::new(State::Idle);

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has signals waited for, from now on. To be called before any thread is started.
pub(crate) fn watch() -> anyhow::Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block().context("cannot block signals")?;
    let wait = move || {
        while signals.wait().is_ok() {
            let mut state = state();
            match *state {
                State::Busy => *state = State::Asked,
                State::Idle | State::Asked => {
                    crate::failure::tell_interrupted_at_once();
                    std::process::exit(STATUS.into());
                }
            }
        }
    };
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(wait)
        .context("cannot start a thread")?;
    Ok(())
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
        *state() = State::Idle;
    }
}

/// Whether the user has asked for the end.
pub(crate) fn requested() -> bool {
    *state() == State::Asked
}
