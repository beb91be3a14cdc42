//! Loads and saves VFIO device state: out of order on many channels, in order on each device.
//!
//! A VMM gives its devices ([`Device`], made from a [`MigrationDevice`]) and its connections
//! ([`Channel`]) to a [`LoadSession`] on the destination or a [`SaveSession`] on the source, tells it
//! when the switchover starts, and gets the devices back in a [`Report`].
//!
//! ```text
//!                  channel side (many threads)          device side (one I/O thread)
//!                ┌─────────────────────────────────┬──────────────────────────────────────────┐
//!   load         │ receive → decode → publish ─────┼──▶ take → submit → complete → recycle ─┐ │
//!                │     ▲                           │                                        │ │
//!                │     └──────── lease ◀───────────┼────────────────────────────────────────┘ │
//!                ├─────────────────────────────────┼──────────────────────────────────────────┤
//!   save         │ send ← take ◀───────────────────┼─── publish ← encode ← complete ← submit  │
//!                │   └────────── recycle ──────────┼──────────────────────────────▶ lease ┘   │
//!                └─────────────────────────────────┴──────────────────────────────────────────┘
//! ```
//!
//! Around the two stands [`migration`]: the whole life cycle of a VM's devices, from their
//! realization to the VM that runs on the destination.
//!
//! [`wire`], [`section`] and [`stream`] are the formats, usable without the rest.

#[cfg(all(loom, not(crossbeam_loom)))]
compile_error!("`--cfg loom` without `--cfg crossbeam_loom` models the slots but not the epochs");

mod arena;
mod channel;
mod device;
mod error;
mod first_failure;
mod framed;
mod host;
mod id;
mod io_loop;
mod lane;
mod load;
mod memory_plan;
pub mod migration;
mod relay;
mod reorder;
mod router;
mod save;
pub mod section;
mod session;
mod settings;
mod spill;
mod state;
mod stats;
pub mod stream;
mod sync;
mod tasks;
pub mod text;
mod trace;
pub mod wire;

pub use vfio_migration_uring::Backend;

#[cfg(feature = "sim")]
pub use crate::device::sim;
#[cfg(feature = "vfio")]
pub use crate::device::vfio;
#[cfg(feature = "faults")]
pub use crate::reorder::refusals::LeasePlan;
pub use crate::{
    channel::{Channel, RamSink},
    device::{
        Device, Duty, FdDevice, MAX_DATA_SIZE, MigrationDevice, Recover, StateEvent, buffer_len,
        stop_copy_estimate,
    },
    error::{Error, ErrorKind, Failed, Phase, Refusal, Result, Violation},
    id::{DeviceId, InvalidDeviceId},
    load::{LoadBuilder, LoadSession, PacketLease, Publisher},
    memory_plan::MemoryBound,
    relay::{Relay, RelayReport},
    save::{SaveBuilder, SaveSession, SourceChannels},
    session::{Canceller, DeviceReport, Report},
    settings::{Settings, Spill},
    state::{DeviceState, MigrationFlags, PrecopyInfo, UnknownState},
    stats::{ChannelStats, DeviceStats, Latency, Phases, SpillStats, Stats},
    tasks::{Task, TaskKind},
    trace::TARGET as TRACE_TARGET,
};

/// The lock-free core, opened for the models and the benches. Outside semver.
#[cfg(any(loom, feature = "internals"))]
#[doc(hidden)]
pub mod internals {
    pub use crate::reorder::{
        doorbell, flags, memory_policy, pool, reorder_buffer, send_queue, slot, table, waiters,
    };

    pub mod router {
        pub use crate::router::Router;
    }

    pub mod stats {
        pub use crate::stats::DeviceCounters;
    }

    #[cfg(not(loom))]
    pub use crate::sync::stepped::{Sleep, take_over};
}

#[doc = include_str!("../guide.md")]
///
/// [`MigrationBlockers::admit`]: crate::migration::MigrationBlockers::admit
/// [`blockers`]: crate::migration::MigrationBlockers::blockers
/// [`OutgoingDevice::setup`]: crate::migration::OutgoingDevice::setup
/// [`Incoming::setup`]: crate::migration::Incoming::setup
/// [`OutgoingDevice::iterate_over`]: crate::migration::OutgoingDevice::iterate_over
/// [`iterate`]: crate::migration::OutgoingDevice::iterate
/// [`pending_estimate`]: crate::migration::OutgoingDevice::pending_estimate
/// [`pending_exact`]: crate::migration::OutgoingDevice::pending_exact
/// [`SwitchoverAcks`]: crate::migration::SwitchoverAcks
/// [`SendSwitchoverAck`]: crate::migration::SendSwitchoverAck
/// [`vm::stop`]: crate::migration::vm::stop
/// [`vm::start`]: crate::migration::vm::start
/// [`Outgoing::begin`]: crate::migration::Outgoing::begin
/// [`write_state`]: crate::migration::Outgoing::write_state
/// [`finish`]: crate::migration::Outgoing::finish
/// [`Outgoing::write_config`]: crate::migration::Outgoing::write_config
/// [`MigrationDevice::save_config`]: crate::MigrationDevice::save_config
/// [`Incoming::device`]: crate::migration::Incoming::device
/// [`load_state`]: crate::migration::IncomingDevice::load_state
/// [`LoadSession`]: crate::LoadSession
/// [`Saved::cleanup`]: crate::migration::Saved::cleanup
/// [`Channel`]: crate::Channel
/// [`stream::Writer`]: crate::stream::Writer
/// [`stream::Reader`]: crate::stream::Reader
/// [`Capabilities`]: crate::migration::Capabilities
/// [`DeviceSettings`]: crate::migration::DeviceSettings
/// [`Settings`]: crate::Settings
pub mod guide {}

/// The README's examples compile.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
