//! The whole life cycle of a device's migration, built around the sessions that move the bytes.
//!
//! ```text
//!   MigrationBlockers::admit() ─▶ MigratableDevice                          at rest, RUNNING
//!                                   │
//!   source                          │                 destination
//!   ──────                          │                 ───────────
//!   SourceChannels::greet()         │
//!   OutgoingDevice::setup() ◀───────┴──────────────▶  Incoming::setup()
//!     │ iterate(), pending_*()      main channel ──▶    │ device(id)?.load_state()
//!   Outgoing::prepare()  memory, ring                   │
//!   vm::stop()        all P2P, then all STOP_COPY       │
//!     │                                                 │
//!   Outgoing::begin()                                 switchover_start()
//!     │ write_state(), write_config()  sections ──▶     │  …
//!   finish() ─▶ Saved               the end ───────▶  finish() ─▶ Loaded, devices in RESUMING
//!     │                                                 │ vm::start()   RUNNING: drivers check
//!     │ cleanup()   STOP            ◀────── verdict     │
//!     ▼ abort()     as at set-up                        ▼
//!   MigratableDevice                                  MigratableDevice
//! ```
//!
//! # Which side runs
//!
//! The main channel's end is the destination's permission to start. The source writes it when
//! [`Outgoing::finish`] has returned [`Saved`], and not before. Until then any failure lets the VM go on at
//! the source. From then on the source is in doubt: its VM must not run until the source has heard the
//! destination's verdict.
//!
//! | verdict | call | the source's devices |
//! |---|---|---|
//! | all is loaded, the VM runs there | [`Saved::cleanup`] | STOP |
//! | the load has failed there | [`Saved::abort`] | as at set-up; the VM goes on here |
//! | none was heard | [`Saved::in_doubt`], or a drop | STOP, with all that they hold |
//!
//! The destination sends its verdict when [`vm::start`] has returned, because the devices' drivers check
//! their states there. If `vm::start` fails, it first resets and stops every device; the verdict is then a
//! failure. After a failure, three methods describe each device: [`MigratableDevice::state`],
//! [`MigratableDevice::was_reset`], and [`MigratableDevice::duty`], which says what the VMM must still do.
//!
//! # What does not compile
//!
//! Each arrow is a method that consumes the value on its left and returns the value on its right. So most
//! wrong orders do not compile: there is no [`Outgoing`] without an [`OutgoingDevice`], no
//! [`OutgoingDevice`] without its set-up, and no second start of either. What a peer decides (tags,
//! commands) is checked when it arrives.
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
//! A failed call gives the devices back ([`Failed`](crate::Failed)) as they were at set-up, RUNNING or STOP.
//! A device that refuses is reset. A device with a call stuck in it is left out.
//!
//! # Channels
//!
//! [`SourceChannels::greet`](crate::SourceChannels::greet) greets the channels at the set-up. A destination
//! waits a limited time for hellos, and then any time for packets. Because the channels are greeted at the
//! set-up, the source notices a destination that is another VM's, or gone, while its own VM still runs. When
//! all has been sent, the destination reads each channel's end; the channels are closed with [`Saved`].
//!
//! The main channel belongs to the VMM, which writes each section's header and footer and hands over the
//! body as `Write` or `Read`. [`stream`](crate::stream) does the rest for a VMM that has no main channel
//! yet.
//!
//! A main channel that is not QEMU's carries control messages instead: [`Precopy`] on the source and
//! [`Incoming::message`] on the destination. Their page is `docs/wire.md`.
//!
//! ```
//! # #[cfg(feature = "sim")] {
//! # use vfio_migration::{*, migration::*, sim::{SimConfig, SimDevice}};
//! # let id = DeviceId::new("0000:00:03.0/vfio", 0)?;
//! # let device = |seed| -> Result<MigratableDevice, Box<dyn std::error::Error>> {
//! #     let config = SimConfig { seed, precopy_initial: 5000, ..SimConfig::default() };
//! #     let device = Device::new(id.clone(), Box::new(SimDevice::new(config)?))?;
//! #     Ok(MigratableDevice::new(device, DeviceSettings::default()))
//! # };
//! # let (near, far) = std::os::unix::net::UnixStream::pair()?;
//! let mut capabilities = Capabilities::default();
//! capabilities.switchover_ack = SwitchoverAck::Once;
//! // The destination's VMM makes its device when it is asked for it.
//! let session = LoadSession::builder().channel(far).expect(id.clone());
//! let incoming = Incoming::setup_by_messages(Vec::new(), &capabilities, session)?;
//! let mut late = Some(device(1)?);
//! let mut carry = |message: Vec<u8>| incoming.message(&message, |_id| late.take());
//!
//! let channels = SourceChannels::greet(vec![near.into()], &Settings::default())?;
//! let mut precopy = Precopy::setup(vec![device(2)?], &capabilities, channels)?;
//! precopy.start(PrecopyLimit::default())?; // on a thread of the engine's
//! while !precopy.is_switchover_ready() {
//!     // … a round of the VMM's memory …
//!     if let Some(message) = precopy.message() {
//!         carry(message)?;
//!         precopy.acknowledged();
//!     }
//! }
//! // … the processors stop …
//! let mut outgoing = precopy.switch_over(SaveSession::builder())?;
//! carry(outgoing.message().expect("SWITCHOVER_START"))?;
//! outgoing.acknowledged();
//! let mut saved = outgoing.finish()?;
//! carry(saved.message().expect("END"))?;
//! let mut loaded = incoming.finish()?;
//! vm::start(loaded.devices_mut())?; // and that is the answer to END
//! let devices = (saved.cleanup()?, loaded.join()?);
//! # assert_eq!(devices.0[0].state(), DeviceState::Stop);
//! # assert_eq!(devices.1[0].state(), DeviceState::Running);
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Threads
//!
//! On the source everything before [`Outgoing::begin`], and on the destination everything until
//! [`Incoming::setup`] returns, runs on the caller's thread; only state changes of a set of devices use a
//! thread per device. From there on a session has its own threads, and the
//! caller's thread writes and reads the sections. The sessions' modules, and each method here, say what
//! ends each wait.

mod blockers;
mod capabilities;
mod incoming;
mod incoming_device;
mod incoming_member;
mod incoming_messages;
mod loaded;
mod members;
mod messages;
mod outgoing;
mod outgoing_device;
mod precopy;
mod saved;
mod switchover_acks;
pub mod vm;

use std::{
    io,
    time::{Duration, Instant},
};

pub use self::{
    blockers::{Admitted, MigrationBlockers, PlatformSupport},
    capabilities::{Capabilities, DeviceSettings, OnOffAuto, SwitchoverAck},
    incoming::{Incoming, SendSwitchoverAck},
    incoming_device::IncomingDevice,
    loaded::Loaded,
    outgoing::Outgoing,
    outgoing_device::{Iteration, OutgoingDevice, Pending},
    precopy::{Precopy, PrecopyLimit, PrecopyProgress},
    saved::Saved,
    switchover_acks::SwitchoverAcks,
};
pub use crate::message::{MAX_MESSAGE_LEN, MessageKind};
use crate::{
    device::{Device, Duty, set::for_all},
    error::Error,
    id::DeviceId,
    state::{DeviceState, MigrationFlags},
    tasks::{Task, TaskKind},
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
    /// When the first part of it began.
    transition_began: Option<Instant>,
}

impl MigratableDevice {
    /// Takes a device that the VMM admits by rules of its own; [`MigrationBlockers::admit`] has the
    /// usual ones. Both opt in to [`PrecopyInfo::reinit`](crate::PrecopyInfo::reinit) of a device that has PRE_COPY,
    /// with one call; without it no device says that it has new initial data.
    pub fn new(mut device: Device, settings: DeviceSettings) -> Self {
        device.set_events(settings.events);
        if device.flags().contains(MigrationFlags::PRE_COPY) {
            // What is not there is not missed.
            let _has = device.enable_precopy_info_v2();
        }
        Self {
            device,
            settings,
            transition_time: Duration::ZERO,
            transition_began: None,
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

    /// Runs the device's state changes on the VMM's threads: see [`Device::spawn_with`].
    pub fn spawn_with(&mut self, spawn: impl Fn(Task) -> io::Result<()> + Send + Sync + 'static) {
        self.device.spawn_with(spawn);
    }

    /// Calls `hook` on each of the threads for the device's state changes: see [`Device::on_thread_start`].
    pub fn on_thread_start(
        &mut self,
        hook: impl Fn(&TaskKind) -> io::Result<()> + Send + Sync + 'static,
    ) {
        self.device.on_thread_start(hook);
    }

    /// The device alone.
    pub fn into_device(self) -> Device {
        self.device
    }
}

/// How a migration is off.
#[derive(Clone, Copy)]
enum Off {
    Failed,
    Cancelled,
}

impl Off {
    /// Because of this error.
    fn by(error: &Error) -> Self {
        if error.is_cancelled() {
            Self::Cancelled
        } else {
            Self::Failed
        }
    }

    /// QEMU's names: while the devices are put back, and afterwards.
    const fn states(self) -> (&'static str, &'static str) {
        match self {
            Self::Failed => ("failing", "failed"),
            Self::Cancelled => ("cancelling", "cancelled"),
        }
    }
}

/// Takes a device of the source back to the state at set-up: its migration is off, and its VM is here.
fn put_back(device: &mut Device, off: Off) {
    let (during, after) = off.states();
    trace::migration_state_notifier(device.id(), during);
    // The migration's own error is the one to report; what this comes to is the device's duty.
    let _duty = device.put_back();
    trace::save_cleanup(device.id());
    trace::migration_state_notifier(device.id(), after);
}

/// See [`for_all`].
fn at_once<M: vm::Member, R: Send>(all: &mut [M], f: impl Fn(&mut M) -> R + Sync) -> Vec<R> {
    for_all(all, vm::Member::device, f)
}

/// Takes all devices of a migration that is off back to the state at set-up, all at once.
fn put_all_back(devices: &mut [MigratableDevice], off: Off) {
    at_once(devices, |migratable| put_back(&mut migratable.device, off));
}
