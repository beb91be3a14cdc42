//! More of a process of the command: pipes that nobody reads, and whether it is over.

use std::ffi::OsStr;

use crate::command::{Running, command_under};

/// A process that has its stdout and stderr still to be read: pipes, and nobody reads them.
pub fn start_unread<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Running {
    Running {
        child: command_under("", arguments).spawn().unwrap(),
        stdout: None,
        stderr: None,
        first: String::new(),
    }
}

impl Running {
    /// Whether it has ended.
    pub fn is_over(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }
}
