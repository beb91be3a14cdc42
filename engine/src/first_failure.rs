//! Why a session ended early: only the first failure counts, and it hangs up every channel.
//!
//! Any thread may fail a session at any time. A later one is told that it was not the first. A thread that
//! another's failure has ended also hands in its error. That error is an abort, and an abort never counts as
//! the reason, even if it comes before the reason does. A channel that is added after the failure is hung up
//! at once.

use std::{
    fmt,
    sync::{Mutex, OnceLock, PoisonError},
    time::Instant,
};

use crate::error::Error;

/// Ends the waits of a channel's thread, from any other.
pub(crate) type Hangup = Box<dyn Fn() + Send + Sync>;

/// A session's first failure.
#[derive(Default)]
pub(crate) struct FirstFailure {
    first: OnceLock<(Error, Instant)>,
    hangups: Mutex<Vec<Hangup>>,
}

impl FirstFailure {
    /// Fails the session. Returns whether this was the first reason.
    pub(crate) fn fail(&self, error: Error) -> bool {
        if error.is_aborted() || self.first.set((error, Instant::now())).is_err() {
            return false;
        }
        self.hang_up();
        true
    }

    /// The first reason, if there was one.
    pub(crate) fn failure(&self) -> Option<Error> {
        self.first.get().map(|(error, _)| error.clone())
    }

    /// Since when.
    pub(crate) fn failed_at(&self) -> Option<Instant> {
        self.first.get().map(|&(_, at)| at)
    }

    /// Adds a channel to hang up.
    pub(crate) fn add(&self, hangup: Hangup) {
        let mut hangups = self.hangups.lock().unwrap_or_else(PoisonError::into_inner);
        // Under the lock, which `fail` takes after it has set the reason: one of the two calls it.
        if self.first.get().is_some() {
            hangup();
        }
        hangups.push(hangup);
    }

    /// Hangs up every channel.
    pub(crate) fn hang_up(&self) {
        let hangups = self.hangups.lock().unwrap_or_else(PoisonError::into_inner);
        for hangup in &*hangups {
            hangup();
        }
    }
}

impl fmt::Debug for FirstFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FirstFailure")
            .field("failure", &self.failure())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{ErrorKind, Phase};

    #[test]
    fn an_abort_is_no_reason_even_where_it_comes_first() {
        let first_failure = FirstFailure::default();
        assert!(!first_failure.fail(Error::aborted(Phase::Receive)));
        assert!(first_failure.failure().is_none());
        let reason = Error::new(ErrorKind::Device, Phase::Load);
        assert!(first_failure.fail(reason.on_channel(3)));
        assert!(!first_failure.fail(Error::cancelled(Phase::Load)));
        let failure = first_failure.failure().unwrap();
        assert_eq!(*failure.kind(), ErrorKind::Device);
        assert_eq!(failure.channel(), Some(3));
    }

    #[test]
    fn what_an_embedder_has_of_an_abort_is_a_cancellation_and_a_reason() {
        let aborted = Error::aborted(Phase::Receive).at_index(7);
        assert!(aborted.is_cancelled());
        let first_failure = FirstFailure::default();
        assert!(first_failure.fail(aborted.into_public()));
        let failure = first_failure.failure().unwrap();
        assert!(failure.is_cancelled());
        assert_eq!(failure.index(), Some(7));
    }
}
