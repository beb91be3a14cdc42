//! What the VMM sets for each device, and what both ends have agreed on for one migration.
//!
//! Plain values, for any thread; nothing waits. The sizes and times of a session are in
//! [`Settings`](crate::Settings).

use crate::{
    error::{Error, Phase, Result},
    settings::{ConfigGate, check_data_len, setters},
};

/// A switch that can be left to its rule.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
pub enum OnOffAuto {
    /// By the rule.
    #[default]
    Auto,
    /// On, whatever the rule says. An error if that is impossible.
    On,
    /// Off.
    Off,
}

/// What the VMM sets for one device.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
#[non_exhaustive]
pub struct DeviceSettings {
    /// Whether the device may be migrated. `Auto`: yes, unless there is a blocker. `On`: a blocker fails the
    /// device's realization; missing dirty tracking alone only logs a warning.
    pub enable: OnOffAuto,
    /// Whether the device's state goes over the multifd channels. `Auto`: yes, if they can carry it
    /// ([`Capabilities::can_carry`]). Read once, when a migration is set up.
    pub transfer: OnOffAuto,
    /// Whether the device's own dirty tracking may be used. Default: yes.
    pub dirty_tracking: bool,
    /// Whether the VMM is told of the device's states
    /// ([`MigrationDevice::event`](crate::MigrationDevice::event)). Default: no.
    pub events: bool,
    /// Source: the most bytes that one read takes, and so the most data in a packet. Default: the device's
    /// estimate of its state, at most 1 MiB and at least 64 KiB. The maximum is just below 16 MiB. Checked when
    /// a migration is set up, before the device changes its state.
    pub buffer_len: Option<usize>,
    /// Whether a config that comes over the channels waits for its notice on the main channel. Default: the
    /// VM's [`Capabilities::config_after_iterables`]. Both ends must set the same.
    pub config_after_iterables: Option<OnOffAuto>,
}

impl Default for DeviceSettings {
    fn default() -> Self {
        Self {
            enable: OnOffAuto::Auto,
            transfer: OnOffAuto::Auto,
            dirty_tracking: true,
            events: false,
            buffer_len: None,
            config_after_iterables: None,
        }
    }
}

setters! {
    DeviceSettings:
    enable: OnOffAuto,
    transfer: OnOffAuto,
    dirty_tracking: bool,
    events: bool,
    buffer_len: usize => Some,
    config_after_iterables: OnOffAuto => Some,
}

impl DeviceSettings {
    /// Refuses what no migration can do.
    pub(super) fn check(&self) -> Result<()> {
        let what = "DeviceSettings::buffer_len: 1 byte to just below 16 MiB";
        self.buffer_len
            .map_or(Ok(()), |len| check_data_len(what, len))
    }
}

/// How a switchover waits until the destination has loaded the devices' initial data.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
pub enum SwitchoverAck {
    /// The switchover does not wait.
    #[default]
    Off,
    /// The destination approves once, when every device that asks has its initial data.
    Once,
    /// The destination approves each request separately. A device may ask again when it has new initial data.
    Reusable,
}

/// What both ends have agreed on for one migration of a VM.
///
/// ```
/// use vfio_migration::migration::{SwitchoverAck, Capabilities};
///
/// let capabilities = Capabilities::default().switchover_ack(SwitchoverAck::Once);
/// assert!(capabilities.can_carry());
/// ```
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
#[non_exhaustive]
pub struct Capabilities {
    /// There are multifd channels. Default: yes.
    pub multifd: bool,
    /// The channels are compressed. Default: no.
    pub compression: bool,
    /// The target is a file. Default: no.
    pub to_file: bool,
    /// The source announces the switchover's start on the main channel. Default: yes.
    pub switchover_start: bool,
    /// Whether the switchover waits for the destination. Default: no.
    pub switchover_ack: SwitchoverAck,
    /// Whether a config that comes over the channels waits for its notice on the main channel. A device can
    /// override this ([`DeviceSettings::config_after_iterables`]). `Auto`: yes on 64-bit Arm, whose interrupt
    /// controller must be restored first.
    pub config_after_iterables: OnOffAuto,
    /// PRE_COPY data also goes over the multifd channels, for the devices whose state does. Default: no,
    /// because
    /// no other program can send or receive it so. A peer that does not agree is refused at the device's
    /// set-up.
    /// The source iterates with [`OutgoingDevice::iterate_over`](super::OutgoingDevice::iterate_over). The
    /// destination loads packets from the set-up on.
    pub precopy_over_channels: bool,
    /// The VM may run on the destination before all of its memory is there.
    pub postcopy: bool,
    /// The VM is saved while it runs on.
    pub background_snapshot: bool,
}

impl Default for Capabilities {
    fn default() -> Self {
        Self {
            multifd: true,
            compression: false,
            to_file: false,
            switchover_start: true,
            switchover_ack: SwitchoverAck::Off,
            config_after_iterables: OnOffAuto::Auto,
            precopy_over_channels: false,
            postcopy: false,
            background_snapshot: false,
        }
    }
}

setters! {
    Capabilities:
    multifd: bool,
    compression: bool,
    to_file: bool,
    switchover_start: bool,
    switchover_ack: SwitchoverAck,
    config_after_iterables: OnOffAuto,
    precopy_over_channels: bool,
    postcopy: bool,
    background_snapshot: bool,
}

impl Capabilities {
    /// Whether the multifd channels can carry device state: they are in use, they are neither compressed nor a
    /// file, and the switchover's start is announced.
    #[must_use]
    pub const fn can_carry(&self) -> bool {
        self.multifd && !self.compression && !self.to_file && self.switchover_start
    }

    /// When a config may be loaded, unless its device overrides it.
    #[must_use]
    pub const fn config_gate(&self) -> ConfigGate {
        gate(self.config_after_iterables)
    }

    /// When this device's may.
    pub(super) fn config_gate_of(&self, settings: &DeviceSettings) -> ConfigGate {
        gate(
            settings
                .config_after_iterables
                .unwrap_or(self.config_after_iterables),
        )
    }

    /// Refuses what no device's migration can do.
    pub(super) fn prepare(&self) -> Result<()> {
        let refused = if self.postcopy {
            Some("postcopy: a device cannot fetch what it lacks later")
        } else if self.background_snapshot {
            Some("a background snapshot: a device's state cannot be saved while it runs on")
        } else {
            None
        };
        refused.map_or(Ok(()), |what| Err(Error::misuse(Phase::Setup, what)))
    }

    /// Whether a device with this setting uses the multifd channels: decided here, once for each
    /// migration.
    pub(super) fn decide(&self, transfer: OnOffAuto) -> Result<bool> {
        match transfer {
            OnOffAuto::Off => Ok(false),
            OnOffAuto::Auto => Ok(self.can_carry()),
            OnOffAuto::On if self.can_carry() => Ok(true),
            OnOffAuto::On => {
                let what = "multifd transfer is on, and the channels cannot carry it";
                Err(Error::misuse(Phase::Setup, what))
            }
        }
    }
}

/// When a config may be loaded where this is set.
const fn gate(setting: OnOffAuto) -> ConfigGate {
    ConfigGate::after_iterables(match setting {
        OnOffAuto::On => true,
        OnOffAuto::Off => false,
        OnOffAuto::Auto => cfg!(target_arch = "aarch64"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn transfer_is_decided_by_its_setting_and_what_the_channels_can() {
        let plain = Capabilities::default();
        let mut others = vec![plain.clone(); 4];
        others[0].multifd = false;
        others[1].compression = true;
        others[2].to_file = true;
        others[3].switchover_start = false;
        assert!(plain.decide(OnOffAuto::Auto).unwrap());
        assert!(plain.decide(OnOffAuto::On).unwrap());
        assert!(!plain.decide(OnOffAuto::Off).unwrap());
        for capabilities in others {
            assert!(!capabilities.can_carry());
            assert!(!capabilities.decide(OnOffAuto::Auto).unwrap());
            assert!(!capabilities.decide(OnOffAuto::Off).unwrap());
            let error = capabilities.decide(OnOffAuto::On).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Misuse(_)));
        }
    }

    #[test]
    fn a_config_waits_where_it_is_said_or_the_architecture_wants_it() {
        let with = |setting| {
            let capabilities = Capabilities {
                config_after_iterables: setting,
                ..Capabilities::default()
            };
            capabilities.config_gate()
        };
        assert_eq!(with(OnOffAuto::On), ConfigGate::OnNotice);
        assert_eq!(with(OnOffAuto::Off), ConfigGate::AtOnce);
        let waits = with(OnOffAuto::Auto) == ConfigGate::OnNotice;
        assert_eq!(waits, cfg!(target_arch = "aarch64"));

        let device = |setting, of_all| {
            let settings = DeviceSettings {
                config_after_iterables: setting,
                ..DeviceSettings::default()
            };
            let capabilities = Capabilities {
                config_after_iterables: of_all,
                ..Capabilities::default()
            };
            capabilities.config_gate_of(&settings)
        };
        for of_all in [OnOffAuto::On, OnOffAuto::Off, OnOffAuto::Auto] {
            assert_eq!(device(None, of_all), with(of_all));
            for setting in [OnOffAuto::On, OnOffAuto::Off, OnOffAuto::Auto] {
                assert_eq!(device(Some(setting), of_all), with(setting));
            }
        }
    }

    #[test]
    fn what_cannot_work_is_refused_by_its_name() {
        let mut capabilities = Capabilities::default();
        assert!(capabilities.prepare().is_ok());
        capabilities.postcopy = true;
        assert!(
            capabilities
                .prepare()
                .unwrap_err()
                .to_string()
                .contains("postcopy")
        );
        capabilities.postcopy = false;
        capabilities.background_snapshot = true;
        let error = capabilities.prepare().unwrap_err().to_string();
        assert!(error.contains("background snapshot"));
    }
}
