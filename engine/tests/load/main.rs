//! What a load promises whatever its peer sends: each device gets its bytes in the one right order or the load
//! fails by a clear error; in bounded memory and bounded time, without a deadlock.
#![allow(missing_docs, reason = "a test")]

#[cfg(feature = "internals")]
mod back_pressure;
mod expected;
mod memory;
mod memory_bounds;
#[cfg(feature = "sim")]
mod orders;
mod refusals;
mod short;
#[cfg(feature = "sim")]
mod spill;
mod time_bounds;
#[cfg(feature = "sim")]
mod unplug;
#[cfg(feature = "sim")]
mod write_through;

#[path = "../support/again.rs"]
mod again;
#[path = "../support/barrier.rs"]
mod barrier;
#[path = "../support/mock.rs"]
mod mock;
#[path = "../support/names.rs"]
mod names;
#[path = "../support/packets.rs"]
mod packets;
#[path = "../support/payload.rs"]
mod payload;
#[path = "../support/pipes.rs"]
mod pipes;
#[path = "../support/watchdog.rs"]
mod watchdog;
