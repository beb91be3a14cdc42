//! What fails midway leaves the devices where the VM is.

use std::{io, os::unix::net::UnixStream, thread};

use nix::errno::Errno;
use vfio_migration::{
    Canceller, Device, DeviceState, Error, ErrorKind, LoadSession, MigrationFlags, Phase, Refusal,
    SaveSession, StateEvent,
    migration::{
        DeviceSettings, Incoming, MigratableDevice, OnOffAuto, Outgoing, OutgoingDevice,
        SwitchoverAck, SwitchoverAcks, vm as state,
    },
    sim::{CallFault, Callback, Fault, Faults, On, SimConfig, SimDevice, TransitionFault, Which},
};

use crate::{
    quick::greeted,
    steps::{incoming, source},
    vm::{Setup, id, migrate},
    watchdog::Watchdog,
};

#[test]
fn whatever_fails_at_the_switchover_the_devices_run_again() {
    let _watchdog = Watchdog::new();
    for transfer in [OnOffAuto::On, OnOffAuto::Off] {
        let setup = Setup {
            transfer,
            ..Setup::default()
        };
        let cases: [(&str, Faults); 3] = [
            (
                "STOP_COPY refused",
                Faults {
                    transitions: vec![TransitionFault {
                        on: On::Request {
                            from: DeviceState::PreCopy,
                            to: DeviceState::StopCopy,
                        },
                        which: Which::Every,
                        errno: Errno::EIO as i32,
                        leaves: None,
                    }],
                    ..Faults::default()
                },
            ),
            (
                "config refused",
                Faults {
                    calls: vec![CallFault {
                        callback: Callback::SaveConfig,
                        which: Which::Every,
                        fault: Fault::Errno(Errno::EIO as i32),
                    }],
                    ..Faults::default()
                },
            ),
            (
                "config panics",
                Faults {
                    calls: vec![CallFault {
                        callback: Callback::SaveConfig,
                        which: Which::Every,
                        fault: Fault::Panic,
                    }],
                    ..Faults::default()
                },
            ),
        ];
        for (what, faults) in cases {
            let config = SimConfig {
                faults,
                ..setup.config(1)
            };
            let (bad, bad_handle) = setup.admit(1, config);
            let (good, good_handle) = setup.admit(2, setup.config(2));
            let acks = SwitchoverAcks::new(SwitchoverAck::Off);
            let sources: Vec<_> = [bad, good]
                .into_iter()
                .map(|it| {
                    OutgoingDevice::setup(it, &setup.capabilities(), &acks, io::sink()).unwrap()
                })
                .collect();
            let (near, far) = UnixStream::pair().unwrap();
            let reader = thread::spawn(move || io::copy(&mut &far, &mut io::sink()));
            let session = greeted(near);
            let mut failed = match Outgoing::begin(sources, session) {
                Err(failed) => failed,
                Ok(mut outgoing) => {
                    for number in [1, 2] {
                        // After the first that fails, what is written does not matter.
                        let _ = outgoing.write_state(&id(number), io::sink());
                        let _ = outgoing.write_config(&id(number), io::sink());
                    }
                    outgoing.finish().unwrap_err()
                }
            };
            assert_eq!(failed.error.device(), Some(&id(1)), "{transfer:?}, {what}");
            assert_eq!(failed.back_mut().len(), 2, "{transfer:?}, {what}");
            for (migratable, handle) in failed.back_mut().iter().zip([bad_handle, good_handle]) {
                assert_eq!(migratable.state(), DeviceState::Running, "{what}");
                assert_eq!(handle.state(), DeviceState::Running, "{what}");
            }
            reader.join().unwrap().unwrap();
        }
    }
}

#[test]
fn a_cancellation_and_a_late_failure_of_the_destination_put_devices_back() {
    let _watchdog = Watchdog::new();
    // Cancelled while nobody reads the channel.
    let (source, handle, _) = source(Setup::default().config(1), SwitchoverAck::Off);
    let (near, far) = UnixStream::pair().unwrap();
    let session = greeted(near);
    let outgoing = Outgoing::begin(vec![source], session).unwrap();
    let back = outgoing.abort();
    assert_eq!(back[0].state(), DeviceState::Running);
    assert_eq!(handle.state(), DeviceState::Running);
    drop(far);

    // All was sent, and then the destination failed.
    let ended = migrate(&Setup::default());
    let back = ended.saved.abort();
    assert_eq!(back[0].state(), DeviceState::Running);
    assert_eq!(ended.sources[0].state(), DeviceState::Running);

    // On the destination.
    for transfer in [OnOffAuto::On, OnOffAuto::Off] {
        let (incoming, handle, _) = incoming(&Setup {
            transfer,
            ..Setup::default()
        });
        assert_eq!(handle.state(), DeviceState::Resuming);
        let back = incoming.abort();
        assert_eq!(back[0].state(), DeviceState::Running);
        assert_eq!(handle.state(), DeviceState::Running);
    }
}

#[test]
fn a_source_that_is_dropped_on_its_way_runs_again() {
    let _watchdog = Watchdog::new();
    let (mut source, handle, _acks) = source(SimConfig::default(), SwitchoverAck::Off);
    assert_eq!(handle.state(), DeviceState::PreCopy);
    source.iterate(io::sink()).unwrap();
    drop(source);
    assert_eq!(handle.state(), DeviceState::Running);
}

#[test]
fn sections_are_written_in_their_order_and_once() {
    let _watchdog = Watchdog::new();
    let off = Setup {
        transfer: OnOffAuto::Off,
        ..Setup::default()
    };
    let begin = || {
        let (migratable, handle) = off.admit(1, off.config(1));
        let acks = SwitchoverAcks::new(SwitchoverAck::Off);
        let source =
            OutgoingDevice::setup(migratable, &off.capabilities(), &acks, io::sink()).unwrap();
        let outgoing = Outgoing::begin(vec![source], SaveSession::builder()).unwrap();
        (outgoing, handle)
    };
    let misuses: [fn(&mut Outgoing) -> vfio_migration::Result<()>; 3] = [
        |it| it.write_config(&id(1), io::sink()),
        |it| it.write_state(&id(7), io::sink()),
        |it| {
            it.write_state(&id(1), io::sink())?;
            it.write_state(&id(1), io::sink())
        },
    ];
    for misuse in misuses {
        let (mut outgoing, handle) = begin();
        let error = misuse(&mut outgoing).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Misuse(_)));
        assert!(outgoing.finish().is_err());
        assert_eq!(handle.state(), DeviceState::Running);
    }
    let (outgoing, _) = begin();
    let failed = outgoing.finish().unwrap_err();
    assert!(matches!(failed.error.kind(), ErrorKind::Misuse(_)));
}

#[test]
fn a_session_that_has_ended_since_its_data_was_sent_is_not_completed() {
    let (mut source, handle, _) = source(Setup::default().config(1), SwitchoverAck::Off);
    assert!(source.iterate(io::sink()).unwrap().bytes > 0);
    let mut all = [source];
    state::stop(&mut all, state::Reason::Pause).unwrap();
    assert_eq!(handle.state(), DeviceState::StopCopy);
    // The VM goes on: the device begins anew, and the destination would get its front twice.
    state::start(&mut all).unwrap();
    let (near, _far) = UnixStream::pair().unwrap();
    let session = greeted(near);
    let mut failed = Outgoing::begin(all.into(), session).unwrap_err();
    assert!(matches!(failed.error.kind(), ErrorKind::Misuse(_)));
    assert_eq!(failed.back_mut()[0].state(), DeviceState::Running);
}

#[test]
fn channels_that_were_not_greeted_at_the_set_up_do_not_switch_over() {
    let (source, handle, _) = source(Setup::default().config(1), SwitchoverAck::Off);
    let (near, _far) = UnixStream::pair().unwrap();
    let session = SaveSession::builder().channel(near);
    let mut failed = Outgoing::begin(vec![source], session).unwrap_err();
    assert!(matches!(failed.error.kind(), ErrorKind::Misuse(_)));
    assert_eq!(failed.back_mut()[0].state(), DeviceState::Running);
    assert_eq!(handle.state(), DeviceState::Running);
}

#[test]
fn several_devices_without_p2p_do_not_switch_over() {
    let setup = Setup {
        flags: MigrationFlags::STOP_COPY,
        ..Setup::default()
    };
    let acks = SwitchoverAcks::new(SwitchoverAck::Off);
    let sources: Vec<_> = (1..=2)
        .map(|number| {
            let (migratable, _) = setup.admit(number, setup.config(1));
            OutgoingDevice::setup(migratable, &setup.capabilities(), &acks, io::sink()).unwrap()
        })
        .collect();
    let mut failed = Outgoing::begin(sources, SaveSession::builder()).unwrap_err();
    let kind = ErrorKind::Unmigratable(Refusal::SeveralWithoutP2p);
    assert_eq!(*failed.error.kind(), kind);
    assert_eq!(failed.back_mut().len(), 2);
}

#[test]
fn events_come_where_they_are_asked_for_and_the_slow_change_is_announced() {
    for events in [false, true] {
        let setup = Setup::default();
        let device = SimDevice::new(setup.config(1)).unwrap();
        let handle = device.handle();
        let device = Device::new(id(1), Box::new(device)).unwrap();
        let mut settings = DeviceSettings::default();
        settings.events = events;
        let migratable = MigratableDevice::new(device, settings);
        let acks = SwitchoverAcks::new(SwitchoverAck::Off);
        let source =
            OutgoingDevice::setup(migratable, &setup.capabilities(), &acks, io::sink()).unwrap();
        let mut all = [source];
        state::stop(&mut all, state::Reason::FinishMigration).unwrap();
        let expected: &[StateEvent] = &[
            StateEvent::State(DeviceState::PreCopy),
            StateEvent::PreCopyP2pPrepare,
            StateEvent::State(DeviceState::PreCopyP2p),
            StateEvent::State(DeviceState::StopCopy),
        ];
        assert_eq!(handle.events(), if events { expected } else { &[] });
    }
}

#[test]
fn one_canceller_ends_a_migration_without_channels() {
    let _watchdog = Watchdog::new();
    let setup = Setup {
        transfer: OnOffAuto::Off,
        ..Setup::default()
    };
    let acks = SwitchoverAcks::new(SwitchoverAck::Off);
    let saving = |canceller: &Canceller| {
        let (device, handle) = setup.admit(1, setup.config(1));
        let mut sources =
            vec![OutgoingDevice::setup(device, &setup.capabilities(), &acks, io::sink()).unwrap()];
        state::stop(&mut sources, state::Reason::FinishMigration).unwrap();
        let session = SaveSession::builder().cancelled_by(canceller);
        (Outgoing::begin(sources, session), handle)
    };
    // Under way, from another thread: the next section fails, and so does the end.
    let canceller = Canceller::new();
    let (outgoing, handle) = saving(&canceller);
    let outgoing = outgoing.unwrap();
    assert!(!outgoing.canceller().is_over());
    thread::spawn(move || canceller.cancel()).join().unwrap();
    let canceller = outgoing.canceller();
    let failed = outgoing.finish().unwrap_err();
    assert!(failed.error.is_cancelled(), "{failed}");
    assert_eq!(failed.into_back()[0].state(), DeviceState::Running);
    assert_eq!(handle.state(), DeviceState::Running);
    assert!(canceller.is_over());

    // The destination, likewise.
    let canceller = Canceller::new();
    let (device, handle) = setup.admit(1, setup.config(1));
    let session = LoadSession::builder().cancelled_by(&canceller);
    let approve = Box::new(|| Ok(()));
    let incoming = Incoming::setup(vec![device], &setup.capabilities(), session, approve).unwrap();
    canceller.cancel();
    assert!(incoming.failure().unwrap().is_cancelled());
    let failed = incoming.finish().unwrap_err();
    assert!(failed.error.is_cancelled(), "{failed}");
    assert_eq!(failed.into_back()[0].state(), DeviceState::Running);
    assert_eq!(handle.state(), DeviceState::Running);

    // Between two steps: what is begun afterwards has failed already, and says so at the latest at its end.
    let canceller = Canceller::new();
    canceller.fail(Error::misuse(Phase::Section, "the main channel"));
    let (begun, handle) = saving(&canceller);
    let failed = begun.unwrap_err();
    assert_eq!(*failed.error.kind(), ErrorKind::Misuse("the main channel"));
    assert_eq!(handle.state(), DeviceState::Running);
    let (device, handle) = setup.admit(1, setup.config(1));
    let session = LoadSession::builder().cancelled_by(&canceller);
    let approve = Box::new(|| Ok(()));
    let failed =
        Incoming::setup(vec![device], &setup.capabilities(), session, approve).unwrap_err();
    assert_eq!(*failed.error.kind(), ErrorKind::Misuse("the main channel"));
    assert_eq!(handle.state(), DeviceState::Running);
}
