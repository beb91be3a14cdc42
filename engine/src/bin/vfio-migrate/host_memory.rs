//! Checks whether the host has the memory that a command needs, before the command listens on an address,
//! connects to a peer, or touches a device.
//!
//! The check reserves all addresses once, as one piece, and gives them back. So a limit (`ulimit -v`,
//! `ulimit -d`) or a lack of memory is an error here, with the number that is needed, and not a failed
//! thread or
//! buffer in the middle of a migration. The command's other allocations are small, and within [`BESIDES`]. Any
//! thread; no wait.

use anyhow::{Context, anyhow};
use vfio_migration::{Error, ErrorKind, Settings};
use vfio_migration_uring::thread::{STACK, has_room, share_heap};

use crate::args::show;

/// What a thread that the host refuses is an error of.
pub(crate) const NO_THREAD: &str = "the host has no thread";

/// For all that is neither budget nor thread.
const BESIDES: usize = 64 << 20;

/// For the arguments and the first threads.
const FIRST: usize = 16 << 20;

/// What a thread takes besides its stack: its guard, its stack for signals, its heap's first pages.
const OF_A_THREAD: usize = 64 << 10;

/// What a command is about to have.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Need {
    /// The memory of all sessions' packets.
    pub(crate) budgets: usize,
    pub(crate) devices: usize,
    /// Threads behind the devices' data fds.
    pub(crate) behind: usize,
    pub(crate) channels: usize,
}

impl Need {
    /// Refuses what the settings cannot be, or the host has no room for.
    pub(crate) fn check(self, settings: &Settings) -> anyhow::Result<()> {
        settings.check()?;
        // A device has a thread of the session's, a channel two at the most.
        let threads = self.devices + self.behind + 2 * self.channels + 8;
        let stacks = threads.saturating_mul(STACK + OF_A_THREAD);
        let needed = self.budgets.saturating_add(stacks).saturating_add(BESIDES);
        has_room(needed).with_context(|| {
            anyhow!(
                "the host has no {} of memory to map, for a budget of {} and {threads} threads",
                show(needed as u64),
                show(self.budgets as u64),
            )
        })
    }
}

/// Whether this host has lacked something: nobody else knows why then.
pub(crate) fn is_the_hosts(error: &anyhow::Error) -> bool {
    let engine = error.downcast_ref::<Error>();
    engine.is_some_and(|error| *error.kind() == ErrorKind::Host) || error.to_string() == NO_THREAD
}

/// Whether there is room to begin at all. Before there is any thread.
pub(crate) fn to_begin() -> bool {
    share_heap();
    has_room(FIRST).is_ok()
}

/// A load's budget where none was given, of so many devices.
pub(crate) fn of_load(given: Option<usize>, devices: usize) -> usize {
    let buffers = (devices << 20).min(64 << 20);
    given.unwrap_or_else(|| (32 << 20).max(buffers).max(devices << 17))
}

/// A save's.
pub(crate) fn of_save(given: Option<usize>, devices: usize) -> usize {
    given.unwrap_or_else(|| (32 << 20).max((devices << 21).min(256 << 20)))
}
