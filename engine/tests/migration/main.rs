//! What `migration` promises a VMM: the life cycle of a VM's devices on both sides, and which side runs, whatever
//! fails.
#![cfg(all(feature = "rustls", feature = "sim"))]
#![allow(missing_docs, reason = "a test")]

mod adapter;
mod as_set;
mod blockers;
mod channel_ends;
mod example;
mod lifecycle;
mod long_precopy;
mod main_channel;
mod messages;
mod midway;
mod outgoing;
mod precopy_channels;
mod quick;
mod steps;
mod tls_stream;
mod vm_state;
mod what_comes_back;
mod which_side_runs;

#[path = "../support/around.rs"]
mod around;
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
#[path = "../support/tls.rs"]
mod tls;
#[path = "../support/vm.rs"]
mod vm;
#[path = "../support/watchdog.rs"]
mod watchdog;
