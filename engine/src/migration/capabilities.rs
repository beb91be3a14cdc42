//! What the VMM sets for each device, and what both ends have agreed on for one migration.
//!
//! Plain values, for any thread; nothing waits. The sizes and times of a session are in
//! [`Settings`](crate::Settings).

use crate::{
    error::{Error, Phase, Result},
    settings::check_data_len,
};

/// A switch that can be left to its rule.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum OnOffAuto {
    /// By the rule.
    #[default]
    Auto,
    /// Whatever the rule says; where that cannot be, it is an error.
    On,
    /// Not.
    Off,
}

/// What the VMM sets for one device.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DeviceSettings {
    /// Whether the device may be migrated. `Auto`: yes, unless there is a blocker. `On`: a blocker fails the
    /// device's realization; missing dirty tracking alone only logs a warning.
    pub enable: OnOffAuto,
    /// Whether its state goes over the multifd channels. Auto: where they can carry it
    /// ([`Capabilities::can_carry`]). Looked at once, when a migration is set up.
    pub transfer: OnOffAuto,
    /// Whether the device's own dirty tracking may be used. On.
    pub dirty_tracking: bool,
    /// Whether the VMM is told of the device's states
    /// ([`MigrationDevice::event`](crate::MigrationDevice::event)). Off.
    pub events: bool,
    /// Source: the most bytes that are read at once, and so a packet's data. Unless set, the
    /// device's estimate of its state, but not above 1 MiB nor below 64 KiB. Just below 16 MiB at most:
    /// checked when a migration is set up, before the device changes its state.
    pub buffer_len: Option<usize>,
    /// Whether its config, where that comes over the channels, waits for its notice on the main
    /// channel. Unless set, what was agreed on for the VM ([`Capabilities::config_after_iterables`]). Both ends
    /// must set the same.
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
pub enum SwitchoverAck {
    /// It does not.
    #[default]
    Off,
    /// The destination approves once, when every device that asks has its initial data.
    Once,
    /// The destination approves each request by itself, and a device may ask again when new initial
    /// data has appeared.
    Reusable,
}

/// What both ends have agreed on for one migration of a VM.
///
/// ```
/// use vfio_migration::migration::{SwitchoverAck, Capabilities};
///
/// let mut capabilities = Capabilities::default();
/// capabilities.switchover_ack = SwitchoverAck::Once;
/// assert!(capabilities.can_carry());
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Capabilities {
    /// There are multifd channels. Yes, by default.
    pub multifd: bool,
    /// They are compressed.
    pub compression: bool,
    /// The target is a file.
    pub to_file: bool,
    /// The source says on the main channel when the switchover starts. Yes, by default.
    pub switchover_start: bool,
    /// Whether the switchover waits for the destination.
    pub switchover_ack: SwitchoverAck,
    /// Whether a config that came over the channels waits for its notice on the main channel, of
    /// devices for which nothing else is set ([`DeviceSettings::config_after_iterables`]). Auto: where
    /// the architecture wants it, which is 64-bit Arm: its interrupt controller must be restored first.
    pub config_after_iterables: OnOffAuto,
    /// What a device gives in PRE_COPY goes over the multifd channels too, of devices whose state
    /// does. No, by default: no other source or destination can, and one that does not agree is
    /// refused at the device's set-up. The source iterates over its channels
    /// ([`OutgoingDevice::iterate_over`](super::OutgoingDevice::iterate_over)), and the destination loads what comes
    /// over them from the set-up on.
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

impl Capabilities {
    /// Whether the multifd channels can carry devices' states: they are in use, neither compressed
    /// nor a file, and the switchover's start is announced.
    #[must_use]
    pub const fn can_carry(&self) -> bool {
        self.multifd && !self.compression && !self.to_file && self.switchover_start
    }

    /// Whether configs wait for their notice, of devices for which nothing else is set.
    #[must_use]
    pub const fn config_waits(&self) -> bool {
        waits(self.config_after_iterables)
    }

    /// Whether this device's does.
    pub(super) fn config_of(&self, settings: &DeviceSettings) -> bool {
        waits(
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

/// Whether a config waits where this is set.
const fn waits(setting: OnOffAuto) -> bool {
    match setting {
        OnOffAuto::On => true,
        OnOffAuto::Off => false,
        OnOffAuto::Auto => cfg!(target_arch = "aarch64"),
    }
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
            capabilities.config_waits()
        };
        assert!(with(OnOffAuto::On));
        assert!(!with(OnOffAuto::Off));
        assert_eq!(with(OnOffAuto::Auto), cfg!(target_arch = "aarch64"));

        let device = |setting, of_all| {
            let settings = DeviceSettings {
                config_after_iterables: setting,
                ..DeviceSettings::default()
            };
            let capabilities = Capabilities {
                config_after_iterables: of_all,
                ..Capabilities::default()
            };
            capabilities.config_of(&settings)
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
