//! Makes threads; a host that cannot give one refuses it, and the process does not abort.
//!
//! Every thread of these crates, and of the command, is made here. It blocks all signals from its first
//! instruction on: they are the VMM's. Its stack is [`STACK`] bytes of addresses; a sleeping thread has
//! touched a few KiB of them.
//!
//! # Why a trial
//!
//! If the host refuses a thread (`RLIMIT_NPROC`, a cgroup's `pids.max`, addresses), [`Builder::spawn`]
//! returns an error. But the standard library maps one thing more in the new thread, a stack for signals,
//! and aborts the process if it cannot. So this module first maps as much, and gives it back. If that
//! fails, no thread is started.

use std::{
    io,
    thread::{Builder, JoinHandle, Scope, ScopedJoinHandle},
};

use nix::sys::signal::{SigSet, SigmaskHow};

pub use crate::syscall::{has_room, share_heap};

/// The addresses of a thread's stack, in bytes. A VMM whose callbacks need more runs the tasks on its own
/// threads.
pub const STACK: usize = 512 << 10;

/// What a new thread maps besides its stack before its work begins, and a little for that.
const BESIDES: usize = 512 << 10;

/// All signals of this thread are blocked, until this is dropped.
struct Blocked(SigSet);

impl Blocked {
    fn new() -> io::Result<Self> {
        // A thread inherits the mask: so there is no moment at which the new one runs without.
        Ok(Self(
            SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?,
        ))
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        self.0
            .thread_set_mask()
            .expect("the mask is the one that was there before");
    }
}

/// Has `start` start a thread, with all signals blocked, if the host has room for one.
fn start<T>(name: &str, start: impl FnOnce(Builder) -> io::Result<T>) -> io::Result<T> {
    has_room(STACK + BESIDES)?;
    let _blocked = Blocked::new()?;
    start(Builder::new().name(name.to_owned()).stack_size(STACK))
}

/// Starts a thread, with all signals blocked and a stack of [`STACK`].
///
/// # Errors
///
/// The host's, where it has no thread, or no room for one.
pub fn spawn<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    start(name, |builder| builder.spawn(work))
}

/// As [`spawn`], within a scope.
///
/// # Errors
///
/// As for [`spawn`].
pub fn spawn_scoped<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    work: impl FnOnce() -> T + Send + 'scope,
) -> io::Result<ScopedJoinHandle<'scope, T>> {
    start(name, |builder| builder.spawn_scoped(scope, work))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_has_its_name_and_no_signal_and_the_parent_keeps_its_own() {
        let blocked = || {
            SigSet::thread_get_mask()
                .unwrap()
                .contains(nix::sys::signal::SIGTERM)
        };
        let before = blocked();
        let named = spawn("named", move || {
            (std::thread::current().name().map(str::to_owned), blocked())
        });
        assert_eq!(named.unwrap().join().unwrap(), (Some("named".into()), true));
        assert_eq!(blocked(), before);
        let there = std::thread::scope(|scope| {
            spawn_scoped(scope, "scoped", blocked)
                .unwrap()
                .join()
                .unwrap()
        });
        assert!(there);
    }

    #[test]
    fn room_that_there_is_not_is_an_error() {
        has_room(1 << 20).unwrap();
        let error = has_room(1 << 60).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
    }
}
