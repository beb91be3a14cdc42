//! Cancelling, from any thread, for as long as a session or a migration lives.

#![expect(unsafe_code, reason = "the functions' names are exported")]

use std::{
    mem::MaybeUninit,
    sync::{Arc, Mutex},
};

use vfio_migration::{Canceller, Error, Phase, Result};

use crate::{
    border::{given, guard, lock, quiet},
    failure::{Code, ErrorHandle},
};

/// Why a session is to end, and what ends it now.
#[derive(Default)]
pub(crate) struct Cancel(Mutex<State>);

#[derive(Default)]
struct State {
    reason: Option<Error>,
    target: Option<Canceller>,
}

impl Cancel {
    /// Ends what is under way, and everything after it. The first reason counts.
    pub(crate) fn fail(&self, error: Error) {
        let (reason, target) = {
            let mut state = lock(&self.0);
            let reason = state.reason.get_or_insert(error).clone();
            (reason, state.target.clone())
        };
        // Without the lock: it hangs up channels, and a hang-up is C's.
        if let Some(target) = target {
            target.fail(reason);
        }
    }

    pub(crate) fn cancel(&self) {
        self.fail(Error::cancelled(Phase::Cleanup));
    }

    /// This is what there is to be ended from now on.
    pub(crate) fn aim(&self, target: Canceller) {
        let reason = {
            let mut state = lock(&self.0);
            state.target = Some(target.clone());
            state.reason.clone()
        };
        if let Some(reason) = reason {
            target.fail(reason);
        }
    }

    /// The reason, where there is one.
    pub(crate) fn reason(&self) -> Option<Error> {
        lock(&self.0).reason.clone()
    }

    /// Refuses to go on where somebody has cancelled.
    pub(crate) fn check(&self) -> Result<()> {
        self.reason().map_or(Ok(()), Err)
    }
}

/// Cancels one session or migration, from any thread, whatever other threads do in it. It may outlive what it
/// cancels; then it does nothing. Made by `vfm_load_canceller` and its like; free it with `vfm_canceller_free`.
pub struct CancellerHandle(pub(crate) Arc<Cancel>);

/// Cancels: the calls that wait in the session or migration end, within the grace time, and later ones fail with
/// VFM_CODE_CANCELLED. Does not wait. Any thread; not from a signal handler.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_canceller_cancel(canceller: Option<&CancellerHandle>) {
    quiet((), || {
        if let Some(canceller) = canceller {
            canceller.0.cancel();
        }
    });
}

/// As `vfm_canceller_cancel`, for a reason of the caller's: a main channel that has broken, say. The first reason
/// counts. `reason` stays the caller's. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_canceller_fail(
    canceller: Option<&CancellerHandle>,
    reason: Option<&ErrorHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let canceller = given(canceller, "canceller: NULL")?;
        let reason = given(reason, "reason: NULL")?;
        canceller.0.fail(reason.error().clone());
        Ok(())
    })
}

/// Frees a canceller, and cancels nothing. NULL is nothing. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_canceller_free(canceller: Option<Box<CancellerHandle>>) {
    quiet((), || drop(canceller));
}
