//! Moves the state of a VM's passed-through devices from one host to another: the engine of a live
//! migration, for any VMM to embed, in QEMU's wire format.
//!
//! A VM with a VFIO device (a NIC's virtual function, a GPU) has state in that device, hundreds of megabytes to many
//! gigabytes, and stands still while it crosses the network. This crate takes it over many channels at
//! once, in bounded memory, and takes the devices and the VMM through everything around that. For
//! its embedders there is a [`guide`]: both sides' code, the order of everything, what blocks, what fails.
//!
//! # A migration
//!
//! [`migration`] is the whole life cycle. Here on one thread, with each section's body in memory: a VMM has
//! two, and a main channel between them.
//!
//! ```
//! # #[cfg(feature = "sim")] {
//! use vfio_migration::{
//!     LoadSession, SaveSession, Settings, SourceChannels,
//!     migration::{Capabilities, Incoming, Outgoing, OutgoingDevice, SwitchoverAcks, vm},
//! };
//! # use vfio_migration::{Device, DeviceId, DeviceState, sim::{SimConfig, SimDevice}};
//! # use vfio_migration::migration::{DeviceSettings, MigratableDevice};
//! # let id = DeviceId::new("0000:00:03.0/vfio", 0)?;
//! # let device = |seed| -> Result<_, Box<dyn std::error::Error>> {
//! #     let device = SimDevice::new(SimConfig { seed, ..SimConfig::default() })?;
//! #     let handle = device.handle();
//! #     let device = Device::new(id.clone(), Box::new(device))?;
//! #     Ok((MigratableDevice::new(device, DeviceSettings::default()), handle))
//! # };
//! # let ((here, saved_digest), (there, loaded_digest)) = (device(1)?, device(2)?);
//! # let (near, far) = std::os::unix::net::UnixStream::pair()?;
//!
//! let (capabilities, mut body) = (Capabilities::default(), Vec::new());
//! // Both sides are set up while the VM runs on the source.
//! let channels = SourceChannels::greet(vec![near.into()], &Settings::default())?;
//! let session = LoadSession::builder().channel(far);
//! let incoming = Incoming::setup(vec![there], &capabilities, session, Box::new(|| Ok(())))?;
//! let load = |body: &mut Vec<u8>| incoming.device(&id)?.load_state(&mut &body.split_off(0)[..]);
//! let acks = SwitchoverAcks::new(capabilities.switchover_ack);
//! let mut sources = vec![OutgoingDevice::setup(here, &capabilities, &acks, &mut body)?];
//! load(&mut body)?; // START
//! // … rounds, until little enough is left; then the VM stops …
//! vm::stop(&mut sources, vm::Reason::FinishMigration)?;
//! let session = SaveSession::builder().greeted_channels(channels);
//! let mut outgoing = Outgoing::begin(sources, session)?;
//! incoming.switchover_start()?;
//! outgoing.write_state(&id, &mut body)?;
//! load(&mut body)?; // END
//! outgoing.write_config(&id, &mut body)?;
//! load(&mut body)?; // FULL
//! let saved = outgoing.finish()?; // all is sent
//! let mut loaded = incoming.finish()?; // all is there
//! vm::start(loaded.devices_mut())?; // the VM runs on the destination
//! let stopped = saved.cleanup()?;
//! let running = loaded.join()?;
//! # assert_eq!(saved_digest.digest(), loaded_digest.digest());
//! # assert_eq!(stopped[0].state(), DeviceState::Stop);
//! # assert_eq!(running[0].state(), DeviceState::Running);
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Bytes alone
//!
//! Below it stand two sessions, for whoever has a life cycle and needs its bytes moved: a VMM gives
//! its devices ([`Device`], made from a [`MigrationDevice`]) and its connections ([`Channel`]) to a
//! [`LoadSession`] on the destination or a [`SaveSession`] on the source, tells it when the switchover
//! starts, and gets the devices back in a [`Report`]. A [`Relay`] joins the two without a device.
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
//! # Where what is
//!
//! | module | for |
//! |---|---|
//! | [`guide`] | reading first |
//! | [`migration`], [`migration::vm`] | a VM's devices, from their realization to the VM that runs on the other side |
//! | this one | devices, channels, sessions, relays, settings, errors, counters |
//! | [`stream`] | the main channel, for a VMM that has none yet |
//! | [`section`] | the body of a device's section |
//! | [`wire`] | a channel's bytes |
//! | [`estimate`], [`trace`], [`text`] | a driver's estimates, made safe; how to filter the events; how to print a peer's text |
//! | `vfio`, `sim` | the kernel's devices; simulated ones |
//!
//! | feature | brings |
//! |---|---|
//! | none | all but the last row above |
//! | `vfio` | the module `vfio`: the kernel's devices, over a device fd |
//! | `vfio-open` | `vfio::open`: the same, by a sysfs path; brings vfio-ioctls |
//! | `sim` | the module `sim`, and simulated rings: for tests, a VMM's own too |
//! | `serde` | `Serialize` of [`Stats`] and its parts; with `Deserialize` of settings, capabilities and [`DeviceId`] |
//! | `log` | the events as records of the crate `log`, where no `tracing` subscriber is installed |
//! | `cli` | the command `vfio-migrate`, `sim` and `vfio-open` |
//!
//! Linux, 64-bit, little-endian; Rust 1.88.

#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(not(all(
    target_os = "linux",
    target_pointer_width = "64",
    target_endian = "little"
)))]
compile_error!("vfio-migration is for Linux on 64-bit, little-endian machines");

#[cfg(all(loom, not(crossbeam_loom)))]
compile_error!("`--cfg loom` without `--cfg crossbeam_loom` models the slots but not the epochs");

mod arena;
mod canceller;
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
mod message;
#[cfg(feature = "metrics")]
pub mod metrics;
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
mod system_calls;
mod tasks;
pub mod text;
#[cfg(feature = "timeline")]
pub mod timeline;
pub mod trace;
pub mod wire;

pub use vfio_migration_uring::Backend;

#[cfg(feature = "rustls")]
pub use crate::channel::{KernelRefused, KernelTlsStream, TlsStream};
#[cfg(feature = "sim")]
pub use crate::device::sim;
#[cfg(feature = "vfio")]
pub use crate::device::vfio;
#[cfg(feature = "faults")]
pub use crate::reorder::refusals::LeasePlan;
pub use crate::{
    canceller::Canceller,
    channel::{Channel, ChannelStream, RamSink},
    device::{
        Device, Duty, FdDevice, Hooked, Hooks, MAX_CONFIG_LEN, MigrationDevice, Recover,
        StateEvent, estimate,
    },
    error::{Error, ErrorKind, Failed, Phase, Refusal, Result, Violation},
    id::{DeviceId, InvalidDeviceId},
    load::{LoadBuilder, LoadSession, PacketLease, Publisher},
    memory_plan::MemoryBound,
    relay::{Relay, RelayBuilder, RelayReport},
    save::{SaveBuilder, SaveSession, SourceChannels},
    session::{DeviceReport, DeviceSpec, Report},
    settings::{ConfigGate, Settings, Spill, Writer},
    state::{DeviceState, MigrationFlags, PrecopyInfo, UnknownState},
    stats::{ChannelStats, DeviceStats, Latency, PhaseStarts, Phases, Side, SpillStats, Stats},
    system_calls::Role,
    tasks::{Task, TaskKind},
};

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub use crate::system_calls::{system_call_names, system_calls};

/// The lock-free core, opened for the models and the benches. Outside semver.
#[cfg(any(loom, feature = "internals"))]
#[doc(hidden)]
pub mod internals {
    pub use crate::reorder::{
        doorbell, flags, memory_policy, pool, reorder_buffer, send_queue, slot, table, turn,
        waiters,
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
/// [`Hooks`]: crate::Hooks
/// [`LoadBuilder::expect`]: crate::LoadBuilder::expect
/// [`Incoming::add_device`]: crate::migration::Incoming::add_device
/// [`Incoming::message`]: crate::migration::Incoming::message
/// [`Incoming::setup_by_messages`]: crate::migration::Incoming::setup_by_messages
/// [`Precopy::setup`]: crate::migration::Precopy::setup
/// [`Precopy::start`]: crate::migration::Precopy::start
/// [`Precopy::message`]: crate::migration::Precopy::message
/// [`Precopy::switch_over`]: crate::migration::Precopy::switch_over
/// [`PrecopyLimit`]: crate::migration::PrecopyLimit
/// [`Hooked`]: crate::Hooked
/// [`Duty`]: crate::Duty
pub mod guide {}

/// The README's examples compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
