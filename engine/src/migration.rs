//! The whole life cycle of a device's migration, around the sessions that move the bytes.
//!
//! ```text
//!   MigrationBlockers::admit() ─▶ MigratableDevice                                  at rest, RUNNING
//!                              │
//!   source                     │                      destination
//!   ──────                     │                      ───────────
//!   SourceChannels::greet()    │
//!   OutgoingDevice::setup() ◀──────────┴────────────────────▶ Incoming::setup()
//!     │ iterate(), pending_*()      main channel ────▶   device(id)?.load_state()
//!   Outgoing::prepare()  memory, ring               │
//!   vm::stop()        all P2P, then all STOP_COPY     │
//!     │                                               │
//!   Outgoing::begin()                               switchover_start()
//!     │ complete(), config()        both ────────────▶│  …
//!   finish() ─▶ Saved               the end ─────────▶ finish() ─▶ Loaded, devices in RESUMING
//!     │                                               vm::start()   RUNNING: drivers check
//!     │ cleanup()   STOP            ◀──── first_failure      │
//!     ▼ abort()     as at set-up                       ▼
//!   MigratableDevice                                          MigratableDevice
//! ```
//!
//! # Which side runs
//!
//! The main channel's end is the destination's permission to start. A source writes it when
//! [`Outgoing::finish`] has given [`Saved`], and not before: until then a failure, whatever it is,
//! lets the VM go on here. From then on the source is in doubt, and its VM must not run by itself,
//! until the destination's verdict has been heard:
//!
//! | verdict | call | the source's devices |
//! |---|---|---|
//! | all is loaded, the VM runs there | [`Saved::cleanup`] | STOP |
//! | it has failed there | [`Saved::abort`] | as at set-up; the VM goes on here |
//! | none was heard | [`Saved::in_doubt`], or a drop | STOP, with all that they hold |
//!
//! A destination says that all is loaded when [`vm::start`] has returned, for it is there that the
//! devices' drivers check their states. Where it fails, every device is reset and stopped before it
//! returns, and the verdict is that it has failed. After a failure, [`MigratableDevice::state`],
//! [`MigratableDevice::was_reset`] and [`MigratableDevice::duty`] say of each device where it is and what is left
//! for the VMM to do.
//!
//! Each arrow is a method that takes what is on its left and gives what is on its right, so most
//! of what would be a wrong order does not compile: there is no [`Outgoing`] without a
//! [`OutgoingDevice`], no [`OutgoingDevice`] without its set-up, no second start of either. What a peer decides
//! (tags, commands) is checked when it comes. Whatever fails gives the devices back ([`Failed`](crate::Failed)) in
//! the state that they had at set-up, RUNNING or STOP, by a reset where there is no other way; a
//! device that a call is stuck in is left out.
//!
//! Both sides on one thread, each body in memory, and a destination that has to give up at the last moment:
//!
//! ```
//! # #[cfg(feature = "sim")] {
//! # use vfio_migration::{*, migration::{*, vm::Reason}, sim::{SimConfig, SimDevice}};
//! # let id = DeviceId::new("0000:00:03.0/vfio", 0)?;
//! # let device = |seed| -> Result<MigratableDevice, Box<dyn std::error::Error>> {
//! #     let config = SimConfig { seed, precopy_initial: 5000, ..SimConfig::default() };
//! #     let device = Device::new(id.clone(), Box::new(SimDevice::new(config)?))?;
//! #     Ok(MigratableDevice::new(device, DeviceSettings::default()))
//! # };
//! # let (near, far) = std::os::unix::net::UnixStream::pair()?;
//! let mut capabilities = Capabilities::default();
//! capabilities.switchover_ack = SwitchoverAck::Once;
//! let acks = SwitchoverAcks::new(capabilities.switchover_ack);
//!
//! // Set-up. The approval goes to the source over the return path; here straight into its count.
//! let mut channels = SourceChannels::greet(vec![near.into()], &Settings::default())?;
//! let (session, path) = (LoadSession::builder().channel(far), acks.clone());
//! let approve = Box::new(move || Ok(path.received()));
//! let incoming = Incoming::setup(vec![device(1)?], &capabilities, session, approve)?;
//! let load = |body: &mut Vec<u8>| incoming.device(&id)?.load_state(&mut &body.split_off(0)[..]);
//! let mut body = Vec::new();
//! let mut sources = vec![OutgoingDevice::setup(device(2)?, &capabilities, &acks, &mut body)?];
//! load(&mut body)?;
//!
//! // The VM runs on, until the destination has the initial data.
//! while !sources[0].is_switchover_ready() {
//!     sources[0].iterate_over(&mut channels, &mut body)?;
//!     load(&mut body)?;
//! }
//! // It stops.
//! vm::stop(&mut sources, Reason::FinishMigration)?;
//! let session = SaveSession::builder().greeted_channels(channels);
//! let mut outgoing = Outgoing::begin(sources, session)?;
//! incoming.switchover_start()?;
//! outgoing.write_state(&id, &mut body)?;
//! load(&mut body)?;
//! outgoing.write_config(&id, &mut body)?;
//! load(&mut body)?;
//! let saved = outgoing.finish()?;
//! let loaded = incoming.finish()?;
//!
//! // Something else of the VM's is amiss on the destination, and it says so: the VM goes on here.
//! let there = loaded.abort();
//! let here = saved.abort();
//! assert_eq!(there[0].state(), DeviceState::Stop);
//! assert_eq!(here[0].state(), DeviceState::Running);
//! assert_eq!(here[0].duty(), Duty::Nothing);
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Nothing is begun twice, before its set-up, or after its end:
//!
//! ```compile_fail,E0382
//! # use vfio_migration::{SaveSession, migration::{SwitchoverAcks, SwitchoverAck, OutgoingDevice, Outgoing}};
//! # fn twice(source: OutgoingDevice) -> vfio_migration::Result<()> {
//! let first = Outgoing::begin(vec![source], SaveSession::builder())?;
//! let second = Outgoing::begin(vec![source], SaveSession::builder())?; // it was moved
//! # Ok(()) }
//! ```
//!
//! ```compile_fail,E0308
//! # use vfio_migration::{SaveSession, migration::{MigratableDevice, Outgoing}};
//! # fn before_setup(device: MigratableDevice) -> vfio_migration::Result<()> {
//! let switchover = Outgoing::begin(vec![device], SaveSession::builder())?; // no OutgoingDevice
//! # Ok(()) }
//! ```
//!
//! ```compile_fail,E0382
//! # use vfio_migration::migration::Outgoing;
//! # fn after_the_end(mut switchover: Outgoing) -> vfio_migration::Result<()> {
//! let saved = switchover.finish()?;
//! switchover.cancel(); // it is over
//! # Ok(()) }
//! ```
//!
//! The channels are greeted at the set-up, by [`SourceChannels::greet`](crate::SourceChannels::greet): a
//! destination waits for a hello for a time, and behind it for as long as the VM runs, whatever comes over
//! the channels before the switchover. So a destination that is gone, or another VM's, is found while the
//! VM runs. When all has been sent the destination reads each channel's end; closed they are with
//! [`Saved`].
//!
//! The main channel is the VMM's: it writes each section's header and footer and hands over the
//! body, as `Write` or `Read`. [`stream`](crate::stream) can do the rest for a VMM that has no
//! main channel yet.
//!
//! # Threads
//!
//! Everything up to [`Outgoing::begin`] and [`Incoming`] runs on the caller's thread, except that
//! changes of state for a set of devices use a thread for each. From there on a session has its
//! threads, and sections are written and read on the caller's. What ends each wait is said there
//! and at each method.

mod blockers;
mod capabilities;
mod incoming;
mod incoming_device;
mod incoming_member;
mod loaded;
mod outgoing;
mod outgoing_device;
mod saved;
mod switchover_acks;
pub mod vm;

use std::{io, time::Duration};

pub use self::{
    blockers::{Admitted, MigrationBlockers, PlatformSupport},
    capabilities::{Capabilities, DeviceSettings, OnOffAuto, SwitchoverAck},
    incoming::{Incoming, SendSwitchoverAck},
    incoming_device::IncomingDevice,
    loaded::Loaded,
    outgoing::Outgoing,
    outgoing_device::{Iteration, OutgoingDevice, Pending},
    saved::Saved,
    switchover_acks::SwitchoverAcks,
};
use crate::{
    device::{Device, Duty, set::for_all},
    id::DeviceId,
    state::{DeviceState, MigrationFlags},
    tasks::Task,
    trace,
};

/// A device that can be migrated, and is not being: what a migration begins with and ends in.
#[derive(Debug)]
#[must_use = "this is the VMM's device"]
pub struct MigratableDevice {
    device: Device,
    settings: DeviceSettings,
    /// What the VM's stops and starts have taken of it since the last migration.
    transition_time: Duration,
}

impl MigratableDevice {
    /// Takes a device that the VMM admits by rules of its own; [`MigrationBlockers::admit`] has the
    /// usual ones.
    pub fn new(mut device: Device, settings: DeviceSettings) -> Self {
        device.set_events(settings.events);
        Self {
            device,
            settings,
            transition_time: Duration::ZERO,
        }
    }

    /// The device's name.
    #[must_use]
    pub const fn id(&self) -> &DeviceId {
        self.device.id()
    }

    /// What the device can do.
    #[must_use]
    pub const fn flags(&self) -> MigrationFlags {
        self.device.flags()
    }

    /// The state as last known.
    #[must_use]
    pub const fn state(&self) -> DeviceState {
        self.device.state()
    }

    /// Whether the device is lost: its reset has failed.
    #[must_use]
    pub const fn is_lost(&self) -> bool {
        self.device.is_lost()
    }

    /// Whether the device has been reset since its last migration was set up.
    #[must_use]
    pub const fn was_reset(&self) -> bool {
        self.device.was_reset()
    }

    /// What the VMM must do about the device, after a migration.
    #[must_use]
    pub const fn duty(&self) -> Duty {
        self.device.duty()
    }

    /// The settings, which hold for the next migration.
    pub const fn settings_mut(&mut self) -> &mut DeviceSettings {
        &mut self.settings
    }

    /// Has its changes of state run on threads of the embedder's: see [`Device::spawn_with`].
    pub fn spawn_with(&mut self, spawn: impl Fn(Task) -> io::Result<()> + Send + Sync + 'static) {
        self.device.spawn_with(spawn);
    }

    /// The device alone.
    pub fn into_device(self) -> Device {
        self.device
    }
}

/// Takes a device back to the state at set-up: its migration is off, and its VM is here.
fn put_back(device: &mut Device) {
    trace::migration_state_notifier(device.id(), "failed");
    // The migration's own error is the one to report; what this comes to is the device's duty.
    let _duty = device.put_back();
}

/// See [`for_all`].
fn at_once<M: vm::Member, R: Send>(all: &mut [M], f: impl Fn(&mut M) -> R + Sync) -> Vec<R> {
    for_all(all, vm::Member::device, f)
}

/// Takes all devices of a migration that is off back to the state at set-up, all at once.
fn put_all_back(devices: &mut [MigratableDevice]) {
    at_once(devices, |migratable| put_back(&mut migratable.device));
}
