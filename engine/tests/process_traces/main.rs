//! The trace events: every one comes, with its device, once where it should, and as QEMU's come.
//!
//! Alone in its process, whose subscriber it is.
#![cfg(feature = "sim")]
#![allow(missing_docs, reason = "a test")]

#[path = "../support/mock.rs"]
mod mock;
#[path = "../support/names.rs"]
mod names;
#[path = "../support/vm.rs"]
mod vm;
#[path = "../support/watchdog.rs"]
mod watchdog;

mod as_qemu;
#[path = "../wire/capture.rs"]
mod capture;
#[path = "../wire/capture_devices.rs"]
mod capture_devices;
mod ends;
mod recorder;

use std::{collections::BTreeSet, io};

use vfio_migration::{
    DeviceId, DeviceState,
    migration::{
        DeviceSettings, Incoming, MigrationBlockers, OnOffAuto, PlatformSupport, SwitchoverAck,
        vm as state,
    },
    sim::{SimConfig, SimDevice},
};

use crate::{
    mock::Mock,
    recorder::Recorder,
    vm::{Setup, migrate},
    watchdog::Watchdog,
};

/// The module that has all events: one function each.
const SOURCE: &str = include_str!("../../src/trace.rs");

/// The names of all events, as that module has them.
fn events() -> BTreeSet<&'static str> {
    let (source, _tests) = SOURCE.split_once("#[cfg(").expect("its tests come last");
    let name = |call: &'static str| {
        let (level, rest) = call.split_once(',')?;
        let levels = ["TRACE", "DEBUG", "INFO", "WARN", "ERROR"];
        levels.contains(&level.trim()).then_some(())?;
        rest.trim_start().strip_prefix('"')?.split('"').next()
    };
    let names: Vec<_> = source.split("event!(").skip(1).filter_map(name).collect();
    let functions = source.matches("pub(crate) fn ").count();
    assert_eq!(names.len(), functions, "one event for each function");
    let events: BTreeSet<_> = names.iter().copied().collect();
    assert_eq!(events.len(), names.len(), "one function for each event");
    events
}

#[test]
fn every_event_comes_with_its_device() {
    let _watchdog = Watchdog::new();
    let recorder = Recorder::new();

    let mut around = PlatformSupport::default();
    around.device_dirty_tracking = true;
    // As by itself, and as told to although nothing tracks what it writes.
    let mut told = DeviceSettings::default();
    told.enable = OnOffAuto::On;
    let mut untracked = PlatformSupport::default();
    untracked.device_dirty_tracking = false;
    untracked.iommu_dirty_tracking = false;
    for (settings, around) in [(DeviceSettings::default(), around), (told, untracked)] {
        let _admitted = MigrationBlockers::default()
            .admit(
                DeviceId::new("vfio", 0).unwrap(),
                Box::new(SimDevice::new(SimConfig::default()).unwrap()),
                &settings,
                around,
                &mut |_, _| Ok(()),
            )
            .unwrap();
    }
    // A device that refuses to recover, too.
    let mut refuses = Mock::new(io::pipe().unwrap().0);
    refuses.set = Some(Box::new(|_| Err(io::ErrorKind::Other.into())));
    let refused = refuses
        .device(1)
        .set_state(DeviceState::StopCopy, DeviceState::Stop);
    refused.unwrap_err();
    for transfer in [OnOffAuto::On, OnOffAuto::Off] {
        let ended = migrate(&Setup {
            transfer,
            ack: SwitchoverAck::Once,
            len: 8 << 20,
            ..Setup::default()
        });
        ended.check();
    }
    let ended = migrate(&Setup {
        precopy_initial: 0,
        ack: SwitchoverAck::Once,
        ..Setup::default()
    });
    ended.check();
    // 1 for success, as QEMU's has; the other's is an errno's place.
    let returned = |name: &str| -> BTreeSet<String> {
        let told = recorder.told();
        let of_name = told.iter().filter(|told| told.name == name);
        of_name.map(|told| told.field("ret").to_owned()).collect()
    };
    assert!(returned("save_complete_precopy").iter().eq(["0"]));
    assert!(
        returned("save_complete_precopy_thread_end")
            .iter()
            .eq(["1"])
    );
    // A load that waits for what never comes, and is given up.
    let setup = Setup::default();
    let (migratable, _) = setup.admit(1, setup.config(1));
    let session = vfio_migration::LoadSession::builder();
    let incoming = Incoming::setup(
        vec![migratable],
        &setup.capabilities(),
        session,
        Box::new(|| Ok(())),
    )
    .unwrap();
    incoming.switchover_start().unwrap();
    recorder.wait("a loader that waits", |told| {
        told.iter()
            .any(|it| it.name == "load_state_device_buffer_starved")
    });
    let mut back = incoming.abort();
    state::stop(&mut back, state::Reason::Other).unwrap();

    let told = recorder.told();
    assert!(told.iter().all(|told| !told.device.is_empty()));
    let seen: BTreeSet<_> = told.iter().map(|told| told.name).collect();
    assert_eq!(seen, events());
}
