//! What the engine reads and writes, byte for byte: against migrations that were recorded between two QEMUs.
#![allow(missing_docs, reason = "a test")]

mod capture;
mod capture_devices;
mod captures;
mod qemu_streams;
mod recut;

#[path = "../support/mock.rs"]
mod mock;
#[path = "../support/names.rs"]
mod names;
#[path = "../support/pipes.rs"]
mod pipes;
#[path = "../support/watchdog.rs"]
mod watchdog;
