//! A test that runs itself once more, in a process of its own.

use std::{env, process::Command};

/// This test executable, told to run one test: that of this name in the module `module_path!()`.
pub fn again(module: &str, test: &str) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args([
        "--exact",
        &path(module, test),
        "--nocapture",
        "--test-threads=1",
    ]);
    command
}

/// A test's name as the harness has it: its path without the crate.
pub fn path(module: &str, test: &str) -> String {
    match module.split_once("::") {
        Some((_crate, within)) => format!("{within}::{test}"),
        None => test.to_owned(),
    }
}
