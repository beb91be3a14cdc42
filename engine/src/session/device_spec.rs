//! A device on its way into a session, with what is set for it alone. Plain values, no thread, no wait.

use crate::{
    device::Device,
    id::DeviceId,
    settings::{ConfigGate, Settings},
};

/// A device for a session, and what is set for it alone. A [`Device`] is one with nothing set.
///
/// ```
/// # #[cfg(feature = "sim")] {
/// use vfio_migration::{
///     ConfigGate, Device, DeviceId, DeviceSpec, LoadSession,
///     sim::{SimConfig, SimDevice},
/// };
///
/// let id = DeviceId::new("0000:00:03.0/vfio", 0)?;
/// let device = Device::new(id, Box::new(SimDevice::new(SimConfig::default())?))?;
/// let spec = DeviceSpec::new(device).config_gate(ConfigGate::OnNotice);
/// let load = LoadSession::builder().device(spec).start()?;
/// # load.cancel();
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "the session's device"]
pub struct DeviceSpec {
    pub(crate) device: Device,
    config_gate: Option<ConfigGate>,
    pub(crate) data_len: Option<usize>,
    /// Save: its first packet's idx, behind those that carried its PRE_COPY data.
    pub(crate) first_index: u32,
    /// Part of a VM's migration, which has set it up, starts its VM, where its driver checks its state, and
    /// cleans up.
    pub(crate) of_migration: bool,
}

impl DeviceSpec {
    /// The device, for which the session's settings hold. If the session fails, the device goes back to the state
    /// in which it is now: RUNNING, or STOP if the VM does not run.
    pub const fn new(mut device: Device) -> Self {
        device.set_off();
        let mut spec = Self::under_way(device);
        spec.of_migration = false;
        spec
    }

    /// A device whose migration has been set up before: the state that it goes back to is that of then.
    pub(crate) const fn under_way(device: Device) -> Self {
        Self {
            device,
            config_gate: None,
            data_len: None,
            first_index: 0,
            of_migration: true,
        }
    }

    /// Load: when its config may be loaded. Default: as [`Settings::config_after_iterables`] says.
    pub const fn config_gate(mut self, gate: ConfigGate) -> Self {
        self.config_gate = Some(gate);
        self
    }

    /// Save: the most bytes of data in its packets. The session then does not ask the device for its estimate,
    /// which costs downtime.
    pub const fn data_len(mut self, len: usize) -> Self {
        self.data_len = Some(len);
        self
    }

    /// Save: so many of its packets have gone over the channels before.
    pub(crate) const fn after_packets(mut self, count: u32) -> Self {
        self.first_index = count;
        self
    }

    /// What holds for it.
    pub(crate) const fn rules(&self, settings: &Settings) -> LoadRules {
        LoadRules::new(settings, self.config_gate, self.of_migration)
    }
}

/// What holds for one device's load.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct LoadRules {
    /// When its config may be loaded.
    pub(crate) config_gate: ConfigGate,
    /// Whether it goes to STOP once it is loaded.
    pub(crate) stops: bool,
}

impl LoadRules {
    /// Of a device with a gate of its own, perhaps, and a start of its VM that follows, or not.
    const fn new(settings: &Settings, gate: Option<ConfigGate>, vm_starts: bool) -> Self {
        Self {
            config_gate: match gate {
                Some(gate) => gate,
                None => ConfigGate::after_iterables(settings.config_after_iterables),
            },
            stops: match settings.stop_after_load {
                Some(stops) => stops,
                None => !vm_starts,
            },
        }
    }
}

impl From<Device> for DeviceSpec {
    fn from(device: Device) -> Self {
        Self::new(device)
    }
}

/// A device that a load expects: its name, and what will hold for it when it comes.
#[derive(Debug)]
pub(crate) struct Expected {
    pub(crate) id: DeviceId,
    pub(crate) config_gate: Option<ConfigGate>,
    /// As for [`DeviceSpec`].
    pub(crate) vm_starts: bool,
}

impl Expected {
    /// What will hold for it.
    pub(crate) const fn rules(&self, settings: &Settings) -> LoadRules {
        LoadRules::new(settings, self.config_gate, self.vm_starts)
    }
}
