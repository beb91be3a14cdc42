//! What a session of either direction promises an embedder who moves bytes: that they cross whole, whatever its
//! settings, its backend and its data fds.
#![cfg(feature = "sim")]
#![allow(missing_docs, reason = "a test")]

mod first_errno;
mod full_disk;
mod handles;
mod round_trip;
mod settings;
mod thread_start;

#[path = "../support/barrier.rs"]
mod barrier;
#[path = "../support/mock.rs"]
mod mock;
#[path = "../support/names.rs"]
mod names;
#[path = "../../../uring/tests/no_room/mod.rs"]
mod no_room;
#[path = "../support/packets.rs"]
mod packets;
#[path = "../support/payload.rs"]
mod payload;
#[path = "../support/pipes.rs"]
mod pipes;
#[path = "../support/watchdog.rs"]
mod watchdog;
