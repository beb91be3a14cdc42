//! One device of the destination, by the way in which its data comes; and the counters of all devices.
//!
//! A device that is expected has a member from the set-up on, and becomes one with the device in `add_device`. Its
//! data comes over the channels.
//!
//! | way | who has the device until it is loaded |
//! |---|---|
//! | over the channels | the session; the VMM, while it is expected |
//! | over the main channel | the member: the thread that reads the sections writes to the device |

use std::{sync::OnceLock, time::Duration};

use super::{
    DeviceSettings, MigratableDevice,
    members::{MemberSession, merge},
};
use crate::{
    device::Device,
    id::DeviceId,
    load::LoadSession,
    settings::ConfigGate,
    stats::{DeviceCounters, Stats},
    sync::Mutex,
    trace,
};

/// How a device's data comes.
pub(super) enum Way {
    /// Over the channels: the session has it.
    Channels,
    /// Over the main channel.
    Main(Mutex<Direct>),
}

/// A device whose data comes over the main channel.
pub(super) struct Direct {
    /// Until it is given back.
    pub(super) device: Option<Device>,
    /// Whether its config has come: the last of it.
    pub(super) loaded: bool,
}

/// What is known of a device that has come.
pub(super) struct Arrived {
    pub(super) settings: DeviceSettings,
    /// Whether it has PRE_COPY.
    pub(super) precopy: bool,
}

pub(super) struct Member {
    pub(super) id: DeviceId,
    /// Not yet, if the device is expected.
    pub(super) arrived: OnceLock<Arrived>,
    /// Whether its PRE_COPY data comes over the channels too.
    pub(super) over_channels: bool,
    /// When its config may be loaded, where it comes over the channels.
    pub(super) config_gate: ConfigGate,
    pub(super) way: Way,
    pub(super) counters: DeviceCounters,
}

impl Member {
    /// Whether its device has not been added.
    pub(super) fn is_expected(&self) -> bool {
        self.arrived.get().is_none()
    }

    /// Whether its device has PRE_COPY.
    pub(super) fn has_precopy(&self) -> bool {
        self.arrived.get().is_some_and(|arrived| arrived.precopy)
    }
}

/// Tells of the cleanup of the devices whose data came over the main channel; the session tells of its own.
pub(super) fn trace_cleanup(members: &[Member]) {
    for member in members {
        if let Way::Main(_) = member.way {
            trace::load_cleanup(&member.id);
        }
    }
}

/// The counters of all devices: the session's, and what it does not know. `started` are those that
/// may have been started since.
pub(super) fn all_stats(
    members: &[Member],
    session: &MemberSession<LoadSession>,
    started: &[MigratableDevice],
) -> Stats {
    let mut stats = session.stats();
    let counters = members.iter().map(|member| (&member.id, &member.counters));
    merge(&mut stats, counters);
    for device in &mut stats.devices {
        let found = started.iter().find(|it| *it.id() == device.device);
        device.phases.resume += found.map_or(Duration::ZERO, |it| it.transition_time);
        let began = found.and_then(|it| it.transition_began);
        device.starts.resume = device.starts.resume.or(began);
    }
    stats
}
