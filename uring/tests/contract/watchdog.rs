//! An end for a test that hangs.

use std::{process, sync::mpsc, thread};

use crate::LONG;

/// Ends the process, with the test's name, if the test does not end.
pub struct Watchdog {
    _ended: mpsc::Sender<()>,
}

impl Watchdog {
    pub fn new(test: &'static str) -> Self {
        let (ended, end) = mpsc::channel();
        thread::spawn(move || {
            if end.recv_timeout(2 * LONG) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("{test} hangs");
                process::abort();
            }
        });
        Self { _ended: ended }
    }
}
