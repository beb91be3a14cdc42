//! What a source may say on the main channel, and what not.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering::SeqCst},
};

use vfio_migration::{
    DeviceState, ErrorKind, LoadSession, MigrationFlags, Violation,
    migration::{Incoming, OnOffAuto, SwitchoverAck, vm as state},
    section::{self, Tag},
};

use crate::{
    quick::quick,
    steps::{incoming, load, refused, tag_of},
    vm::{Setup, id},
    watchdog::Watchdog,
};

#[test]
fn the_switchover_is_approved_once_when_every_device_that_asks_has_its_initial_data() {
    let setup = Setup {
        ack: SwitchoverAck::Once,
        ..Setup::default()
    };
    let capabilities = setup.capabilities();
    let devices: Vec<_> = (1..=2)
        .map(|number| setup.admit(number, setup.config(number.into())).0)
        .collect();
    let approvals = Arc::new(AtomicU32::new(0));
    let counted = approvals.clone();
    let approve = move || {
        counted.fetch_add(1, SeqCst);
        Ok(())
    };
    let session = LoadSession::builder().settings(quick());
    let incoming = Incoming::setup(devices, &capabilities, session, Box::new(approve)).unwrap();
    for (number, approved) in [(1, 0), (2, 1)] {
        let body = Tag::InitDataSent.encode();
        let device = incoming.device(&id(number)).unwrap();
        device.load_state(&mut &body[..]).unwrap();
        assert_eq!(approvals.load(SeqCst), approved);
    }
    refused(
        load(&incoming, &[Tag::InitDataSent], b""),
        tag_of(Tag::InitDataSent),
    );
    assert_eq!(approvals.load(SeqCst), 1);
    assert_eq!(incoming.abort().len(), 2);
}

#[test]
fn each_request_is_approved_by_itself_where_acks_are_reusable() {
    let setup = Setup {
        ack: SwitchoverAck::Reusable,
        ..Setup::default()
    };
    let (incoming, _, approvals) = incoming(&setup);
    for approved in 1..=3 {
        load(&incoming, &[Tag::InitDataSent], b"").unwrap();
        assert_eq!(approvals.load(SeqCst), approved);
    }
    incoming.switchover_start().unwrap();
    refused(
        load(&incoming, &[Tag::InitDataSent], b""),
        tag_of(Tag::InitDataSent),
    );
    assert_eq!(incoming.abort().len(), 1);
}

#[test]
fn what_comes_after_a_failure_reports_that_and_no_other_device() {
    let _watchdog = Watchdog::new();
    let setup = Setup::default();
    let devices = [1, 2].map(|number| setup.admit(number, setup.config(9)).0);
    let session = LoadSession::builder().settings(quick());
    let approve = Box::new(|| Ok(()));
    let incoming =
        Incoming::setup(devices.into(), &setup.capabilities(), session, approve).unwrap();
    let first = load(&incoming, &[Tag::InitDataSent], b"").unwrap_err();
    assert_eq!(first.device(), Some(&id(1)));
    let body = Tag::EndOfState.encode();
    let second = incoming.device(&id(2)).unwrap();
    let second = second.load_state(&mut &body[..]).unwrap_err();
    assert_eq!(second.to_string(), first.to_string());
    assert!(incoming.finish().is_err());
}

#[test]
fn a_tag_that_was_not_asked_for_fails_the_load_and_resets_the_device() {
    let _watchdog = Watchdog::new();
    let stop_copy = MigrationFlags::STOP_COPY;
    let off = OnOffAuto::Off;
    let channels = Setup::default();
    let waiting = Setup {
        config_after_iterables: OnOffAuto::On,
        ..Setup::default()
    };
    let main = Setup {
        transfer: off,
        config_after_iterables: OnOffAuto::On,
        ..Setup::default()
    };
    let no_precopy = Setup {
        flags: stop_copy,
        ack: SwitchoverAck::Once,
        ..Setup::default()
    };
    let once = Tag::ConfigLoadReady;
    // What comes before, then what is refused.
    let cases: [(&Setup, bool, &[Tag], Tag); 7] = [
        (&channels, false, &[], Tag::InitDataSent),
        (&no_precopy, false, &[], Tag::InitDataSent),
        (&channels, false, &[], once),
        (&waiting, false, &[once], once),
        (&main, false, &[], once),
        (&channels, false, &[], Tag::Config),
        (&channels, true, &[], Tag::Data),
    ];
    for (setup, switched, before, tag) in cases {
        let (incoming, handle, _) = incoming(setup);
        if switched {
            incoming.switchover_start().unwrap();
        }
        for tag in before {
            load(&incoming, &[*tag], b"").unwrap();
        }
        let violation = match setup.config_after_iterables {
            OnOffAuto::Off if tag == once => Violation::ConfigAfterIterables { here: false },
            _ => tag_of(tag),
        };
        refused(load(&incoming, &[tag, Tag::EndOfState], b"data"), violation);
        // It stays failed.
        assert!(load(&incoming, &[Tag::EndOfState], b"").is_err());
        assert!(incoming.failure().is_some());
        let mut failed = incoming.finish().unwrap_err();
        assert_eq!(failed.back_mut()[0].state(), DeviceState::Running);
        assert_eq!(handle.state(), DeviceState::Running);
        assert!(!handle.has_loaded());
    }
}

#[test]
fn a_second_switchover_start_fails_the_load() {
    let _watchdog = Watchdog::new();
    let (incoming, handle, _) = incoming(&Setup::default());
    incoming.switchover_start().unwrap();
    let error = incoming.switchover_start().unwrap_err();
    assert!(matches!(
        error.kind(),
        ErrorKind::Protocol(Violation::Section(_))
    ));
    assert!(incoming.finish().is_err());
    assert_eq!(handle.state(), DeviceState::Running);
}

#[test]
fn a_source_that_sends_too_little_over_the_main_channel_is_found_out() {
    let setup = Setup {
        transfer: OnOffAuto::Off,
        ..Setup::default()
    };
    // No config.
    let (incoming, handle, _) = incoming(&setup);
    load(&incoming, &[Tag::Data, Tag::EndOfState], b"part").unwrap();
    incoming.switchover_start().unwrap();
    let failed = incoming.finish().unwrap_err();
    assert_eq!(*failed.error.kind(), ErrorKind::Missing);
    assert_eq!(failed.error.device(), Some(&id(1)));
    assert_eq!(handle.state(), DeviceState::Running);
}

#[test]
fn an_incomplete_state_over_the_main_channel_is_refused_before_the_vm_starts() {
    let setup = Setup {
        transfer: OnOffAuto::Off,
        ..Setup::default()
    };
    let (incoming, handle, _) = incoming(&setup);
    load(&incoming, &[Tag::Data, Tag::EndOfState], b"part").unwrap();
    let mut body = Vec::new();
    let config = [&4_u32.to_be_bytes()[..], b"conf"].concat();
    section::Writer::new(&mut body).config(&config).unwrap();
    let device = incoming.device(&id(1)).unwrap();
    device.load_state(&mut &body[..]).unwrap();
    let mut loaded = incoming.finish().unwrap();
    assert_eq!(handle.state(), DeviceState::Resuming);
    // The driver looks at it now, and so before the source is told anything.
    let error = state::start(loaded.devices_mut()).unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::State);
    let states = (DeviceState::Resuming, DeviceState::RunningP2p);
    assert_eq!(error.states(), Some(states));
    assert_eq!(handle.state(), DeviceState::Stop);

    // Or before that, where it is wanted so.
    let (migratable, handle) = setup.admit(1, setup.config(9));
    let mut settings = quick();
    settings.stop_after_load = Some(true);
    let incoming = Incoming::setup(
        vec![migratable],
        &setup.capabilities(),
        LoadSession::builder().settings(settings),
        Box::new(|| Ok(())),
    )
    .unwrap();
    load(&incoming, &[Tag::Data, Tag::EndOfState], b"part").unwrap();
    let device = incoming.device(&id(1)).unwrap();
    let error = device.load_state(&mut &body[..]).unwrap_err();
    let states = (DeviceState::Resuming, DeviceState::Stop);
    assert_eq!(error.states(), Some(states));
    assert!(incoming.finish().is_err());
    assert_eq!(handle.state(), DeviceState::Running);
}

#[test]
fn a_device_that_is_not_here_is_an_error_by_its_name() {
    let (incoming, _, _) = incoming(&Setup::default());
    let error = incoming.device(&id(77)).unwrap_err();
    assert!(matches!(
        error.kind(),
        ErrorKind::Protocol(Violation::UnknownDevice { .. })
    ));
    assert_eq!(incoming.abort().len(), 1);
}
