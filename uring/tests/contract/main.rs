//! What every ring promises, asked of each of them.
//!
//! | file | promises |
//! |---|---|
//! | `ownership.rs` | What is handed in comes back: a buffer, a file, an operation that cannot be taken |
//! | `transfers.rs` | Every operation moves its bytes, at the file's position or at a place |
//! | `chains.rs` | A chain keeps its order, and what is short, ended or refused cancels the rest of it |
//! | `cancel.rs` | A cancellation ends what is blocked, and hits nothing else |
//! | `wake.rs` | What ends a wait |
//! | `drop.rs` | A ring that goes away frees what was blocked, and what it cannot free it leaks whole |
//! | `threads.rs` | Rings, threads and files are independent of each other |
//! | `random.rs` | Random chains and cancellations: nothing is lost, and all comes in order |
//! | `choice.rs` | Which ring is opened |
//! | `faults.rs` | What only a simulation can do: to fail as it is told |
//!
//! Every test runs under a watchdog: a ring that hangs is a failure that names its test, not a run
//! that never ends. Nothing here measures time.

use std::time::Duration;

/// Longer than anything here takes on the slowest machine.
pub const LONG: Duration = Duration::from_secs(60);

/// Long enough to see that something does not happen. A test that waits for this in vain is only
/// slower.
pub const MOMENT: Duration = Duration::from_millis(20);

/// A test of every ring: `K` is its kind in the body.
macro_rules! contract_test {
    ($test:ident, $body:block) => {
        mod $test {
            use super::*;

            contract_test! { uring Uring $body }
            contract_test! { blocking Blocking $body }
            #[cfg(feature = "sim")]
            contract_test! { sim Sim $body }
        }
    };
    ($ring:ident $kind:ident $body:block) => {
        #[test]
        fn $ring() {
            type K = crate::rings::$kind;
            let _watchdog =
                crate::watchdog::Watchdog::new(concat!(module_path!(), "::", stringify!($ring)));
            $body
        }
    };
}

/// A ring of this kind, or the test's end where this host has none.
macro_rules! ring {
    ($kind:ty, $capacity:expr) => {
        match <$kind as crate::rings::Kind>::open::<Vec<u8>>(
            $capacity,
            &vfio_migration_uring::Waker::new().unwrap(),
        ) {
            Some(ring) => ring,
            None => return,
        }
    };
}

mod cancel;
mod chains;
mod choice;
mod counted;
mod drop;
#[cfg(feature = "sim")]
mod faults;
mod ops;
mod ownership;
mod random;
mod rings;
mod threads;
mod transfers;
mod wake;
mod watchdog;
