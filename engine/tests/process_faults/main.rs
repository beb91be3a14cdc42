//! Every operation of a run goes wrong, one at a time: the k-th fails, for every k and every way to
//! fail.
//!
//! ```text
//!   count ─▶ a run in which nothing fails: how many operations of this kind are there?
//!   sweep ─▶ for each k below that, for each fault: the same run, the k-th operation fails
//!   judge ─▶ success with the right digests, or one clear error; and nothing left over
//! ```
//!
//! A run is a whole migration in one process: a save and a load of two devices over two channels
//! (see `run.rs`). Each kind of operation has a file:
//!
//! | file | the k-th | fails with |
//! |---|---|---|
//! | `ring.rs` | operation of the simulated rings | a short transfer, nothing moved, each errno; never ends; cannot even be cancelled |
//! | `calls.rs` | callback of a device, set_state and reset among them | each errno, before or after it was done; a panic; another state than asked for |
//! | `sockets.rs` | read or write of a channel | a short transfer, the end, each errno |
//! | `leases.rs` | lease of memory, at the start of a wait | refused, as when the budget is spent |
//! | `kernel.rs` | system call of the engine's threads, on the kernel's ring and on the blocking one | each errno that the call can have: ring and its memory, eventfds, threads, waits, sockets |
//!
//! Runs go one after the other, for they count the process's threads and files. Where the product is
//! too large for every test run, every fault still meets every stride-th operation, and the stride's
//! phase comes from the seed: `VFIO_MIGRATION_FAULTS=all` does the whole product, and
//! `VFIO_MIGRATION_FAULTS_SEED` moves the phase. `VFIO_MIGRATION_FAULTS_SLOW` names the runs that take
//! longer than half a second.
#![cfg(feature = "faults")]
#![allow(missing_docs, reason = "a test")]

#[path = "../support/around.rs"]
mod around;
mod calls;
mod kernel;
mod kth;
mod leases;
mod ring;
mod run;
mod sockets;
mod tally;

#[path = "../support/names.rs"]
mod names;
