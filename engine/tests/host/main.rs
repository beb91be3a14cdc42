//! What the engine does on a host that lacks, forbids or rations something, and which system calls it makes.
#![cfg(feature = "sim")]
#![allow(missing_docs, reason = "a test")]

mod hosts;
mod system_calls;

#[path = "../support/again.rs"]
mod again;
#[path = "../support/leftovers.rs"]
mod leftovers;
#[path = "../support/mock.rs"]
mod mock;
#[path = "../support/names.rs"]
mod names;
#[path = "../support/packets.rs"]
mod packets;
#[path = "../support/pipes.rs"]
mod pipes;
#[path = "../support/watchdog.rs"]
mod watchdog;
