//! A device on its way into a session, with what is set for it alone. Plain values, no thread, no wait.

use crate::{
    device::Device,
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
    /// A start of its VM follows, in which its driver checks its state.
    vm_starts: bool,
}

impl DeviceSpec {
    /// The device, for which the session's settings hold. If the session fails, the device goes back to the state
    /// in which it is now: RUNNING, or STOP if the VM does not run.
    pub const fn new(mut device: Device) -> Self {
        device.set_off();
        let mut spec = Self::under_way(device);
        spec.vm_starts = false;
        spec
    }

    /// A device whose migration has been set up before: the state that it goes back to is that of then.
    pub(crate) const fn under_way(device: Device) -> Self {
        Self {
            device,
            config_gate: None,
            data_len: None,
            first_index: 0,
            vm_starts: true,
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

    /// When its config may be loaded.
    pub(crate) fn gate(&self, settings: &Settings) -> ConfigGate {
        let of_all = ConfigGate::after_iterables(settings.config_after_iterables);
        self.config_gate.unwrap_or(of_all)
    }

    /// Whether it goes to STOP once it is loaded.
    pub(crate) fn stops(&self, settings: &Settings) -> bool {
        settings.stop_after_load.unwrap_or(!self.vm_starts)
    }
}

impl From<Device> for DeviceSpec {
    fn from(device: Device) -> Self {
        Self::new(device)
    }
}
