//! A VM moves with its devices: every step on both sides, in every way that the data can take.

use std::{io, os::unix::net::UnixStream, thread, time::Duration};

use vfio_migration::{
    DeviceState, LoadSession, MigrationFlags, Violation,
    migration::{
        Incoming, OnOffAuto, Outgoing, OutgoingDevice, SwitchoverAck, SwitchoverAcks, vm as state,
    },
    section::Tag,
    sim::Callback,
};

use crate::{
    quick::{greeted, quick},
    steps::{incoming, load, refused},
    vm::{Setup, id, migrate},
    watchdog::Watchdog,
};

#[test]
fn a_vm_moves_with_its_devices_over_the_channels() {
    let _watchdog = Watchdog::new();
    let ended = migrate(&Setup {
        devices: 3,
        ack: SwitchoverAck::Once,
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
        ack: SwitchoverAck::Once,
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
fn whether_a_config_waits_is_set_for_each_device() {
    let _watchdog = Watchdog::new();
    for (of_all, of_first) in [
        (OnOffAuto::Off, OnOffAuto::On),
        (OnOffAuto::On, OnOffAuto::Off),
    ] {
        let setup = Setup {
            devices: 2,
            config_after_iterables: of_all,
            config_of_odd: Some(of_first),
            flags: MigrationFlags::STOP_COPY | MigrationFlags::P2P,
            ..Setup::default()
        };
        migrate(&setup).check();

        // Both devices' packets, and no notice: the one that waits for none is loaded.
        let (waiting, other) = if of_first == OnOffAuto::On {
            (1, 2)
        } else {
            (2, 1)
        };
        let capabilities = setup.capabilities();
        let (near, far) = UnixStream::pair().unwrap();
        let (sources, _): (Vec<_>, Vec<_>) = (1..=2)
            .map(|at| setup.admit(at, setup.config(at.into())))
            .unzip();
        let (devices, loaded_to): (Vec<_>, Vec<_>) =
            (1..=2).map(|at| setup.admit(at, setup.config(9))).unzip();
        let approve = Box::new(|| Ok(()));
        let load = LoadSession::builder().settings(quick()).channel(far);
        let incoming = Incoming::setup(devices, &capabilities, load, approve).unwrap();
        let acks = SwitchoverAcks::new(setup.ack);
        let mut sources: Vec<_> = sources
            .into_iter()
            .map(|it| OutgoingDevice::setup(it, &capabilities, &acks, io::sink()).unwrap())
            .collect();
        state::stop(&mut sources, state::Reason::FinishMigration).unwrap();
        let save = greeted(near);
        let mut outgoing = Outgoing::begin(sources, save).unwrap();
        incoming.switchover_start().unwrap();
        let mut notice = Vec::new();
        for (number, body) in [(waiting, &mut notice), (other, &mut Vec::new())] {
            outgoing.write_state(&id(number), io::sink()).unwrap();
            outgoing.write_config(&id(number), &mut *body).unwrap();
            let tag = if number == waiting {
                Tag::ConfigLoadReady
            } else {
                Tag::EndOfState
            };
            assert_eq!(body[..], tag.encode(), "device {number}");
        }
        let saved = outgoing.finish().unwrap();
        let loads = |number: usize| loaded_to[number - 1].calls(Callback::LoadConfig);
        let has_loaded = |number: usize| loads(number) > 0;
        // Under the watchdog: it ends when the device is loaded.
        while !has_loaded(other as usize) {
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_millis(20));
        assert!(!has_loaded(waiting as usize), "without its notice");
        let body = |number| incoming.device(&id(number)).unwrap();
        body(waiting).load_state(&mut &notice[..]).unwrap();
        let loaded = incoming.finish().unwrap();
        assert!(has_loaded(waiting as usize));
        drop((loaded, saved));
    }
}

#[test]
fn a_notice_for_a_device_that_waits_for_none_is_refused() {
    let _watchdog = Watchdog::new();
    let setup = Setup {
        config_after_iterables: OnOffAuto::On,
        config_of_odd: Some(OnOffAuto::Off),
        ..Setup::default()
    };
    let (incoming, _, _) = incoming(&setup);
    let violation = Violation::ConfigAfterIterables { here: false };
    refused(load(&incoming, &[Tag::ConfigLoadReady], b""), violation);
    assert!(incoming.finish().is_err());
}

#[test]
fn without_precopy_there_is_nothing_to_iterate() {
    let _watchdog = Watchdog::new();
    let ended = migrate(&Setup {
        devices: 2,
        flags: MigrationFlags::STOP_COPY | MigrationFlags::P2P,
        ack: SwitchoverAck::Once,
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
        let starts = device.starts;
        let order = [starts.stop, starts.set_state, starts.read, starts.wire];
        assert!(
            order.iter().all(Option::is_some) && order.is_sorted(),
            "{starts:?}"
        );
        assert_eq!((starts.write, starts.resume), (None, None));
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
        let starts = device.starts;
        let order = [starts.set_state, starts.write, starts.config, starts.resume];
        assert!(
            order.iter().all(Option::is_some) && order.is_sorted(),
            "{starts:?}"
        );
        assert_eq!((starts.stop, starts.read), (None, None));
    }
    ended.check();
}
