//! The whole life cycle of devices' migrations: every step on both sides, in every way that the
//! data can take.
#![cfg(feature = "sim")]
#![allow(missing_docs, reason = "a test")]

mod common;
mod vm;

use std::time::Duration;

use common::Watchdog;
use vfio_migration::{
    DeviceState, MigrationFlags,
    migration::{Ack, OnOffAuto},
};
use vm::{Setup, migrate};

#[test]
fn a_vm_moves_with_its_devices_over_the_channels() {
    let _watchdog = Watchdog::new();
    let ended = migrate(&Setup {
        devices: 3,
        ack: Ack::Once,
        ..Setup::default()
    });
    for (at, device) in ended.saved.stats().devices.iter().enumerate() {
        assert_eq!(device.main_bytes, 100_000, "what was read in PRE_COPY");
        let packets = u64::from(ended.setup.len > 100_000);
        assert!(device.packets > packets);
        let config = 12 + 8 + 4 + 256 + 8;
        let data = ended.setup.len - 100_000;
        let headers = 12 * (device.packets - 1);
        assert_eq!(device.bytes, data + headers + config);
        let loaded = &ended.stats.devices[at];
        assert_eq!(loaded.device, device.device);
        assert_eq!(
            (loaded.main_bytes, loaded.packets),
            (device.main_bytes, device.packets)
        );
    }
    assert_eq!(ended.acks, 1, "one for all");
    ended.check();
}

#[test]
fn a_vm_moves_with_its_devices_over_the_main_channel() {
    let _watchdog = Watchdog::new();
    let ended = migrate(&Setup {
        devices: 2,
        transfer: OnOffAuto::Off,
        ..Setup::default()
    });
    for device in ended
        .saved
        .stats()
        .devices
        .iter()
        .chain(&ended.stats.devices)
    {
        assert_eq!(device.main_bytes, ended.setup.len);
        assert_eq!((device.bytes, device.packets), (0, 0));
    }
    ended.check();
}

#[test]
fn devices_of_one_vm_go_each_its_own_way() {
    let _watchdog = Watchdog::new();
    let ended = migrate(&Setup {
        devices: 4,
        mixed: true,
        ack: Ack::Once,
        ..Setup::default()
    });
    ended.check();
}

#[test]
fn configs_wait_for_their_notice() {
    let _watchdog = Watchdog::new();
    let ended = migrate(&Setup {
        devices: 2,
        config_after_iterables: OnOffAuto::On,
        ..Setup::default()
    });
    ended.check();
}

#[test]
fn without_precopy_there_is_nothing_to_iterate() {
    let _watchdog = Watchdog::new();
    let ended = migrate(&Setup {
        devices: 2,
        flags: MigrationFlags::STOP_COPY | MigrationFlags::P2P,
        ack: Ack::Once,
        ..Setup::default()
    });
    for device in &ended.saved.stats().devices {
        assert_eq!(device.main_bytes, 0);
    }
    assert_eq!(ended.acks, 0, "nobody has asked");
    ended.check();
}

#[test]
fn a_paused_vm_moves_too() {
    let _watchdog = Watchdog::new();
    let ended = migrate(&Setup {
        state: DeviceState::Stop,
        ..Setup::default()
    });
    assert_eq!(ended.saved.stats().devices[0].main_bytes, 0);
    ended.check();
}

#[test]
fn the_downtimes_phases_are_measured_for_each_device() {
    let _watchdog = Watchdog::new();
    let slow = Duration::from_millis(20);
    let ended = migrate(&Setup {
        devices: 2,
        delays: vec![
            (DeviceState::PreCopyP2p, slow),
            (DeviceState::StopCopy, slow),
            (DeviceState::Resuming, slow),
            (DeviceState::Stop, slow),
            (DeviceState::RunningP2p, slow),
        ],
        ..Setup::default()
    });
    for device in &ended.saved.stats().devices {
        let phases = device.phases;
        assert!(phases.stop >= 2 * slow, "{phases:?}");
        assert!(phases.read > Duration::ZERO && phases.wire > Duration::ZERO);
        assert!(phases.config > Duration::ZERO);
        assert_eq!(phases.write + phases.resume, Duration::ZERO);
    }
    for device in &ended.stats.devices {
        let phases = device.phases;
        assert!(phases.set_state >= slow, "RESUMING: {phases:?}");
        assert!(phases.write > Duration::ZERO && phases.config > Duration::ZERO);
        assert!(
            phases.resume >= 2 * slow,
            "STOP and RUNNING_P2P: {phases:?}"
        );
        assert_eq!(phases.stop + phases.read + phases.wire, Duration::ZERO);
    }
    ended.check();
}
