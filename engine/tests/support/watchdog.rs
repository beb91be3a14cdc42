//! An end for a test that hangs.

use std::{sync::mpsc, thread, time::Duration};

/// Aborts the process where a test has not ended after a minute. It counts its own wake-ups rather than
/// the clock's time, so that a machine that stands still ends no test.
pub struct Watchdog(#[expect(dead_code, reason = "its end is what counts")] mpsc::Sender<()>);

impl Watchdog {
    pub fn new() -> Self {
        let (alive, ended) = mpsc::channel();
        let test = thread::current().name().unwrap_or("a test").to_owned();
        thread::spawn(move || {
            for _ in 0..600 {
                let tick = ended.recv_timeout(Duration::from_millis(100));
                if tick != Err(mpsc::RecvTimeoutError::Timeout) {
                    return;
                }
            }
            eprintln!("{test} hangs");
            std::process::abort();
        });
        Self(alive)
    }
}
