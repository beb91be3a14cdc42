//! More ways to start the command.

use std::{ffi::OsStr, process::Stdio};

use crate::command::{Ended, Running, command_under, start, start_command};

pub fn run<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Ended {
    start(arguments).end()
}

/// As [`start`], with another stdout and stderr than pipes that are read.
pub fn start_with<S: AsRef<OsStr>>(
    arguments: impl IntoIterator<Item = S>,
    stdout: Stdio,
    stderr: Stdio,
) -> Running {
    start_under_with("", arguments, stdout, stderr)
}

/// As [`start_with`], under what a shell does first.
pub fn start_under_with<S: AsRef<OsStr>>(
    under: &str,
    arguments: impl IntoIterator<Item = S>,
    stdout: Stdio,
    stderr: Stdio,
) -> Running {
    let mut command = command_under(under, arguments);
    command.stdout(stdout).stderr(stderr);
    start_command(command)
}
