//! What every model is made of: its bounds, its threads, its ring and its packets.
//!
//! The models are in `tests/`, one file for each module of the engine's `reorder/`. They need
//! `--cfg loom --cfg crossbeam_loom`; without, this library is empty. `cargo run
//! --manifest-path loom-tests/Cargo.toml` sets both.
//!
//! Models share their objects by `std`'s [`Arc`](std::sync::Arc), not loom's: a reference count is
//! not what is modelled, each of its steps would be one more place to switch threads at, and its
//! edges could stand in for one that is missing. So the last handle is always dropped by the main
//! thread, behind its joins.

#[cfg(loom)]
mod support;

#[cfg(loom)]
pub use support::*;
