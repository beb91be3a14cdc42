//! Cancels a migration from any thread: one handle for its whole life, from the set-up to the clean-up.
//!
//! ```text
//!   Canceller ─┬─ SourceChannels ┐
//!              ├─ SaveSession    ├ attached while they are: each is failed, for the first reason alone
//!              ├─ …              ┘
//!              └─ on_cancel: the VMM's own waits
//! ```
//!
//! What comes to be attached after a cancellation is cancelled at once. So nothing falls between two steps of a
//! migration: a cancellation that comes after the channels were greeted and before the session exists ends
//! the session's start.
//!
//! The handle keeps the memory of what is attached only for as long as that is. Any thread may use it, any number
//! of times; nobody waits here.

use std::{
    fmt, mem,
    sync::{Arc, Mutex, PoisonError},
};

use crate::error::{Error, Phase, Result};

type Fail = Arc<dyn Fn(Error) + Send + Sync>;

/// What there is to be ended.
#[derive(Clone)]
struct Part {
    key: u64,
    phase: Phase,
    fail: Fail,
}

/// Why everything ends.
#[derive(Clone)]
enum Reason {
    Cancelled,
    Failed(Error),
}

impl Reason {
    fn error(&self, phase: Phase) -> Error {
        match self {
            Self::Cancelled => Error::cancelled(phase),
            Self::Failed(error) => error.clone(),
        }
    }
}

#[derive(Default)]
struct State {
    reason: Option<Reason>,
    parts: Vec<Part>,
    /// How many parts there have been.
    attached: u64,
    /// The VMM's.
    hooks: Vec<Box<dyn FnOnce() + Send>>,
}

/// Cancels one migration, whatever it is doing: a cheap handle, to be cloned and kept for as long as one likes.
///
/// Each session has one ([`LoadSession::canceller`](crate::LoadSession::canceller)), which also ends a `join` that
/// another thread waits in. A migration has one for all of its steps: make it first, and give it to
/// [`SourceChannels::greet_with`](crate::SourceChannels::greet_with) and to the builders
/// ([`SaveBuilder::cancelled_by`](crate::SaveBuilder::cancelled_by),
/// [`LoadBuilder::cancelled_by`](crate::LoadBuilder::cancelled_by)). With [`on_cancel`](Self::on_cancel) it ends the
/// VMM's own waits too.
///
/// | it comes | it ends |
/// |---|---|
/// | before or within the greeting, the set-up, `begin` | that call, with the reason as its error |
/// | while packets move | `finish`, `join`, `load_state`, `write_state`: the first failure is this |
/// | while [`Saved`](crate::migration::Saved) waits for the verdict | nothing of the engine's: the VMM decides, for the VM may run on the other side |
/// | in `vm::stop`, `vm::start`, the clean-up | nothing: they last as long as the drivers, and a second for the channels |
///
/// The first reason counts. It cannot be taken back: the next migration has a new handle.
///
/// ```
/// use std::os::unix::net::UnixStream;
/// use vfio_migration::{Canceller, LoadSession, Settings, SourceChannels};
///
/// let canceller = Canceller::new();
/// let (main, _its_peer) = UnixStream::pair()?;
/// let socket = main.try_clone()?;
/// canceller.on_cancel(move || {
///     let _closed = socket.shutdown(std::net::Shutdown::Both);
/// });
///
/// canceller.clone().cancel(); // from any thread
///
/// let (near, far) = UnixStream::pair()?;
/// let greeted = SourceChannels::greet_with(vec![near.into()], &Settings::default(), &canceller);
/// assert!(greeted.is_err_and(|error| error.is_cancelled()));
/// let started = LoadSession::builder().channel(far).cancelled_by(&canceller).start();
/// assert!(started.is_err_and(|failed| failed.error.is_cancelled()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Default)]
pub struct Canceller(Arc<Mutex<State>>);

impl Canceller {
    /// Makes one for a migration that is to begin.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Cancels: should-quit. Returns at once, and whoever joins gets its report within the grace
    /// time.
    pub fn cancel(&self) {
        self.end(&Reason::Cancelled);
    }

    /// Fails the migration for a reason of the VMM's, for example a broken main channel.
    pub fn fail(&self, error: Error) {
        self.end(&Reason::Failed(error));
    }

    fn end(&self, reason: &Reason) {
        let (parts, hooks) = {
            let mut state = self.lock();
            state.reason.get_or_insert_with(|| reason.clone());
            (state.parts.clone(), mem::take(&mut state.hooks))
        };
        // Called without the lock: it hangs up the channels, and a hang-up is the VMM's code.
        for part in parts {
            (part.fail)(reason.error(part.phase));
        }
        for hook in hooks {
            hook();
        }
    }

    /// Calls `hook` when this is cancelled, or fails: at once if it is already. For what the VMM itself waits in,
    /// such as its main channel. Another thread calls it, once; it must not wait. It is kept until then, or until
    /// the last clone of this handle has gone.
    pub fn on_cancel(&self, hook: impl FnOnce() + Send + 'static) {
        let mut state = self.lock();
        if state.reason.is_none() {
            state.hooks.push(Box::new(hook));
            return;
        }
        drop(state);
        hook();
    }

    /// Returns why it was ended, as an error of the VMM's next step: for a loop that waits for nothing else.
    ///
    /// # Errors
    ///
    /// The reason, if there is one.
    pub fn check(&self) -> Result<()> {
        self.check_in(Phase::Setup)
    }

    /// As [`Canceller::check`], in this phase.
    pub(crate) fn check_in(&self, phase: Phase) -> Result<()> {
        let reason = self.lock().reason.clone();
        reason.map_or(Ok(()), |reason| Err(reason.error(phase)))
    }

    /// Whether all that it could end has ended by itself, and this does nothing any more.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.lock().is_over()
    }

    /// Ends this too, if need be at once, with an error of `phase`.
    pub(crate) fn attach(
        &self,
        phase: Phase,
        fail: impl Fn(Error) + Send + Sync + 'static,
    ) -> Attached {
        let mut state = self.lock();
        state.attached += 1;
        let part = Part {
            key: state.attached,
            phase,
            fail: Arc::new(fail),
        };
        state.parts.push(part.clone());
        let reason = state.reason.clone();
        drop(state);
        if let Some(reason) = reason {
            (part.fail)(reason.error(phase));
        }
        Attached {
            canceller: self.clone(),
            key: part.key,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    const fn is_over(&self) -> bool {
        self.attached > 0 && self.parts.is_empty()
    }
}

impl fmt::Debug for Canceller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Canceller")
            .field("over", &self.is_over())
            .finish_non_exhaustive()
    }
}

/// That something can be ended, until this is dropped.
#[derive(Debug)]
pub(crate) struct Attached {
    canceller: Canceller,
    key: u64,
}

impl Attached {
    pub(crate) const fn canceller(&self) -> &Canceller {
        &self.canceller
    }

    /// It has ended by itself.
    pub(crate) fn retire(&self) {
        let mut state = self.canceller.lock();
        let at = state.parts.iter().position(|part| part.key == self.key);
        let part = at.map(|at| state.parts.swap_remove(at));
        drop(state);
        // What it kept may itself end here.
        drop(part);
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.retire();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn it_ends_what_is_attached_and_what_comes_later_but_not_what_has_gone() {
        let canceller = Canceller::new();
        let ended: [Arc<AtomicU32>; 4] = Default::default();
        let count = |at: usize| {
            let count = ended[at].clone();
            move |error: Error| {
                assert_eq!(*error.kind(), ErrorKind::Cancelled);
                count.fetch_add(1, Relaxed);
            }
        };
        let _attached = canceller.attach(Phase::Save, count(0));
        drop(canceller.attach(Phase::Save, count(1)));
        let hooked = ended[3].clone();
        canceller.on_cancel(move || {
            hooked.fetch_add(1, Relaxed);
        });
        canceller.check().unwrap();
        canceller.clone().cancel();
        assert!(canceller.check().unwrap_err().is_cancelled());
        let _late = canceller.attach(Phase::Load, count(2));
        assert_eq!(ended.each_ref().map(|it| it.load(Relaxed)), [1, 0, 1, 1]);
        assert!(!canceller.is_over());
    }

    #[test]
    fn a_handle_that_comes_too_late_does_nothing() {
        let canceller = Canceller::new();
        assert!(!canceller.is_over(), "it has not begun");
        drop(canceller.attach(Phase::Save, |_| unreachable!()));
        assert!(canceller.is_over());
        canceller.cancel();
    }

    #[test]
    fn nothing_falls_between_two_steps() {
        let canceller = Canceller::new();
        drop(canceller.attach(Phase::Setup, |_| unreachable!()));
        canceller.cancel();
        let (sender, ended) = std::sync::mpsc::channel();
        let _next = canceller.attach(Phase::Save, move |error| sender.send(error).unwrap());
        assert_eq!(ended.try_recv().unwrap().phase(), Phase::Save);
    }

    #[test]
    fn the_first_reason_is_what_comes_later_hears() {
        let canceller = Canceller::new();
        canceller.fail(Error::misuse(Phase::Section, "the main channel"));
        canceller.cancel();
        assert!(!canceller.check().unwrap_err().is_cancelled());
    }
}
