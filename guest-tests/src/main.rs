//! The engine on the kernel's own VFIO devices: the sample driver mtty, in a guest.
//!
//! ```text
//! .ci/guest/tests [FILTER]        builds this, and runs it in the guest: every test whose name has FILTER
//! ```
//!
//! `$MDEV1`, `$MDEV2`, ... are the devices' directories in sysfs. Each test runs with each backend,
//! alone in the process, on devices that were made anew for it. `kernel` is the view from
//! outside: plain calls, nothing of the engine's; what a test believes of a device it believes
//! because of that.
//!
//! Every test has its time; one that takes longer aborts the process, and names itself.

mod cancellations;
mod device;
mod dma_logging;
mod kernel;
mod refusals;
mod transfers;
mod transitions;

use std::{
    env, fs,
    panic::{AssertUnwindSafe, catch_unwind},
    process::{ExitCode, abort},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use vfio_migration::Backend;

/// After this a test hangs: the guest is slow, but no test moves more than a few kilobytes.
const LIMIT: Duration = Duration::from_secs(120);

type Test = (&'static str, fn(Backend));

fn main() -> ExitCode {
    let filter = env::args().nth(1).unwrap_or_default();
    let tests: Vec<Test> = [
        transfers::TESTS,
        transitions::TESTS,
        refusals::TESTS,
        cancellations::TESTS,
        dma_logging::TESTS,
    ]
    .concat();
    let mut failed = Vec::new();
    let mut passed = 0;
    let before = leftovers();
    for backend in [Backend::Uring, Backend::Blocking] {
        for (test, run) in &tests {
            let name = format!("{test}, {backend}");
            if !name.contains(&filter) {
                continue;
            }
            let since = Instant::now();
            let (ended, watched) = mpsc::channel::<()>();
            let watchdog = {
                let name = name.clone();
                thread::spawn(move || {
                    if watched.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
                        println!("{name}: HANGS");
                        abort();
                    }
                })
            };
            let result = catch_unwind(AssertUnwindSafe(|| run(backend)));
            drop(ended);
            watchdog.join().expect("the watchdog only waits");
            let clean = result.is_err() || settles(before);
            if result.is_ok() && clean {
                println!("{name}: ok ({} ms)", since.elapsed().as_millis());
                passed += 1;
            } else {
                if !clean {
                    println!("left over: {:?}, {before:?} before", leftovers());
                }
                println!("{name}: FAILED");
                failed.push(name);
            }
        }
    }
    println!("{passed} passed, {} failed", failed.len());
    if failed.is_empty() && passed > 0 {
        return ExitCode::SUCCESS;
    }
    for name in failed {
        println!("failed: {name}");
    }
    ExitCode::FAILURE
}

/// The process's threads and open files.
fn leftovers() -> (usize, usize) {
    let count = |folder| fs::read_dir(folder).expect("/proc is there").count();
    (count("/proc/self/task"), count("/proc/self/fd"))
}

/// Whether only what was there before is there: a thread that was joined, or a file that a ring of
/// the kernel's has held, may be listed for a moment more.
fn settles(before: (usize, usize)) -> bool {
    let deadline = Instant::now() + Duration::from_secs(10);
    while leftovers() != before {
        if Instant::now() > deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(5));
    }
    true
}
