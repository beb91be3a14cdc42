//! The C API of vfio-migration.
//!
#![doc = include_str!("../README.md")]
//!
//! # How this crate is made
//!
//! ```text
//!   C ──▶ error  settings  device  channel  load  save  publisher      a file for each part of the header:
//!         outgoing  incoming  main_channel  blockers  relay  stats     the exported functions
//!           │                                    │
//!           ▼                                    ▼
//!         border: guard, NULL, text, bytes     callbacks: C's functions, as Rust's traits     all `unsafe`
//!         failure: codes, texts
//!           │
//!           ▼
//!         vfio_migration
//! ```
//!
//! Every exported function is one call of `border::guard` or `border::quiet`, which catch a panic. A handle of the header's
//! is a Rust value behind locks of its own: it may be used from any thread, and a call that another call is in
//! the way of is refused or waits, as the header says. A parameter that C may get wrong is a type in which
//! Rust has no wrong value: `Option<&T>` for a pointer, an integer for an enumeration.
//!
//! `include/vfio_migration.h` is made from these sources: `cargo test -p vfio-migration-capi --test header` fails
//! where it is not, and with `BLESS=1` writes it.

#![expect(
    missing_debug_implementations,
    reason = "handles are for C, which prints none"
)]

#[cfg(not(panic = "unwind"))]
compile_error!("no panic may cross into C: build with `panic = \"unwind\"`");

mod blockers;
mod border;
mod callbacks;
mod cancel;
mod channel;
mod device;
mod error;
mod failure;
mod incoming;
mod load;
mod main_channel;
mod outgoing;
mod publisher;
mod relay;
mod save;
mod settings;
mod stats;

// What makes `&T` from C's threads sound, and a handle that one thread makes and another frees.
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<ErrorHandle>();
    shared::<SettingsHandle>();
    shared::<TaskHandle>();
    shared::<DeviceHandle>();
    shared::<ChannelHandle>();
    shared::<CancellerHandle>();
    shared::<LoadHandle>();
    shared::<SaveHandle>();
    shared::<PublisherHandle>();
    shared::<OutgoingHandle>();
    shared::<IncomingHandle>();
    shared::<MainReaderHandle>();
    shared::<MainWriterHandle>();
    shared::<BlockersHandle>();
    shared::<RelayHandle>();
    shared::<StatsHandle>();
};

pub use self::{
    blockers::*, callbacks::*, cancel::*, channel::*, device::*, error::*, failure::*, incoming::*,
    load::*, main_channel::*, outgoing::*, publisher::*, relay::*, save::*, settings::*, stats::*,
};
