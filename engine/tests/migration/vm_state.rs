//! The VM's stop and start for a set of devices: the P2P barrier, what each state becomes, and that
//! no device waits for another.

use std::{
    io,
    os::unix::net::UnixStream,
    sync::{Arc, Barrier, mpsc},
    time::{Duration, Instant},
};

use nix::errno::Errno;
use vfio_migration::{
    Device, DeviceState, ErrorKind, LoadSession, MigrationFlags, SaveSession,
    migration::{
        Capabilities, DeviceSettings, Incoming, MigratableDevice, OutgoingDevice, SwitchoverAcks,
        vm::{Member, Reason, start, stop},
    },
    sim::{Change, Faults, On, SimConfig, SimDevice, SimHandle, TransitionFault, Which},
};

use crate::{
    barrier::sync,
    mock::Mock,
    names::id,
    packets::{config_packet, hello, packet},
    pipes::collect,
    watchdog::Watchdog,
};

const ALL: MigrationFlags = MigrationFlags::from_bits(7);

fn migratable(number: u32, config: SimConfig) -> (MigratableDevice, SimHandle) {
    let device = SimDevice::new(config).unwrap();
    let handle = device.handle();
    let device = Device::new(id(number), Box::new(device)).unwrap();
    (
        MigratableDevice::new(device, DeviceSettings::default()),
        handle,
    )
}

fn precopying(number: u32, config: SimConfig) -> (OutgoingDevice, SimHandle) {
    let (migratable, handle) = migratable(number, config);
    let acks = SwitchoverAcks::new(vfio_migration::migration::SwitchoverAck::Off);
    let source =
        OutgoingDevice::setup(migratable, &Capabilities::default(), &acks, io::sink()).unwrap();
    (source, handle)
}

fn changes_to(handles: &[SimHandle], states: &[DeviceState]) -> Vec<Change> {
    let changes = handles.iter().flat_map(SimHandle::changes);
    changes.filter(|it| states.contains(&it.to)).collect()
}

#[test]
fn all_devices_pass_the_first_column_before_any_begins_the_second() {
    let _watchdog = Watchdog::new();
    let faults = |slow| Faults {
        // One device is slow in each column.
        delays: vec![(slow, Duration::from_millis(30))],
        ..Faults::default()
    };
    let (mut sources, handles): (Vec<_>, Vec<_>) = [
        DeviceState::PreCopyP2p,
        DeviceState::StopCopy,
        DeviceState::RunningP2p,
        DeviceState::Running,
    ]
    .into_iter()
    .zip(1..)
    .map(|(slow, number)| {
        let faults = faults(slow);
        let config = SimConfig {
            faults,
            ..SimConfig::default()
        };
        precopying(number, config)
    })
    .unzip();
    stop(&mut sources, Reason::FinishMigration).unwrap();
    start(&mut sources).unwrap();
    for columns in [
        [DeviceState::PreCopyP2p, DeviceState::StopCopy],
        [DeviceState::RunningP2p, DeviceState::Running],
    ] {
        let [first, second] = columns.map(|state| changes_to(&handles, &[state]));
        assert_eq!((first.len(), second.len()), (4, 4));
        let through = first.iter().map(|change| change.ended).max().unwrap();
        let begins = second.iter().map(|change| change.began).min().unwrap();
        assert!(through <= begins, "{columns:?}");
    }
}

#[test]
fn each_state_becomes_what_the_stop_and_the_start_mean_for_it() {
    let _watchdog = Watchdog::new();
    use DeviceState::{PreCopy, PreCopyP2p, Running, RunningP2p, Stop, StopCopy};
    let (p2p, precopy) = (MigrationFlags::P2P, MigrationFlags::PRE_COPY);
    let least = MigrationFlags::STOP_COPY;
    for flags in [least, least | p2p, least | precopy, ALL] {
        for reason in [Reason::FinishMigration, Reason::Pause, Reason::Other] {
            for saving in [false, true] {
                let config = SimConfig {
                    flags,
                    ..SimConfig::default()
                };
                let (asked, handle) = if saving {
                    let (source, handle) = precopying(1, config);
                    let mut all = [source];
                    stop(&mut all, reason).unwrap();
                    start(&mut all).unwrap();
                    let [source] = all;
                    assert_eq!(source.state(), handle.state());
                    (handle.changes(), handle)
                } else {
                    let (device, handle) = migratable(1, config);
                    let mut all = [device];
                    stop(&mut all, reason).unwrap();
                    start(&mut all).unwrap();
                    assert_eq!(all[0].state(), handle.state());
                    (handle.changes(), handle)
                };
                let asked: Vec<_> = asked.iter().map(|change| change.asked).collect();
                let mut expected = Vec::new();
                let in_precopy = saving && flags.contains(precopy);
                if in_precopy {
                    expected.push(PreCopy);
                }
                if flags.contains(p2p) {
                    expected.push(if in_precopy { PreCopyP2p } else { RunningP2p });
                }
                expected.push(if in_precopy && reason != Reason::Other {
                    StopCopy
                } else {
                    Stop
                });
                if flags.contains(p2p) {
                    expected.push(RunningP2p);
                }
                expected.push(Running);
                assert_eq!(asked, expected, "{flags} {reason} {saving}");
                assert_eq!(handle.state(), Running);
            }
        }
    }
}

#[test]
fn a_device_that_refuses_is_reset_and_stopped_and_the_others_go_on() {
    let _watchdog = Watchdog::new();
    let refuses = |to| Faults {
        transitions: vec![TransitionFault {
            on: On::Arc {
                from: DeviceState::PreCopy,
                to,
            },
            which: Which::Every,
            errno: Errno::EIO as i32,
            leaves: None,
        }],
        ..Faults::default()
    };
    let (bad, bad_handle) = precopying(
        1,
        SimConfig {
            faults: refuses(DeviceState::PreCopyP2p),
            ..SimConfig::default()
        },
    );
    let (good, good_handle) = precopying(2, SimConfig::default());
    let mut all = [bad, good];
    let error = stop(&mut all, Reason::FinishMigration).unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::State);
    assert_eq!(error.device(), Some(&id(1)));
    assert_eq!(error.raw_os_error(), Some(Errno::EIO as i32));
    // The VM has stopped, and so has the device that was reset on the way.
    assert_eq!(bad_handle.state(), DeviceState::Stop);
    assert_eq!(good_handle.state(), DeviceState::StopCopy);
    for (source, handle) in all.into_iter().zip([bad_handle, good_handle]) {
        assert_eq!(source.state(), handle.state());
        assert_eq!(source.abort().state(), DeviceState::Running);
        assert_eq!(handle.state(), DeviceState::Running);
    }
}

#[test]
fn devices_of_all_kinds_stop_behind_one_barrier() {
    let _watchdog = Watchdog::new();
    let (mut source, saving) = precopying(1, SimConfig::default());
    let (mut other, resting) = migratable(2, SimConfig::default());
    let mut all: [&mut dyn Member; 2] = [&mut source, &mut other];
    stop(&mut all, Reason::FinishMigration).unwrap();
    assert_eq!(saving.state(), DeviceState::StopCopy);
    assert_eq!(resting.state(), DeviceState::Stop);
    start(&mut all).unwrap();
    assert_eq!(saving.state(), DeviceState::Running);
    assert_eq!(resting.state(), DeviceState::Running);
}

/// From the first request for `state` to the last answer.
fn span(handles: &[SimHandle], state: DeviceState) -> Duration {
    let changes = changes_to(handles, &[state]);
    assert_eq!(changes.len(), handles.len());
    let began: Instant = changes.iter().map(|change| change.began).min().unwrap();
    let ended = changes.iter().map(|change| change.ended).max().unwrap();
    ended - began
}

#[test]
fn eight_devices_of_200_ms_each_are_all_in_stop_copy_within_400() {
    let _watchdog = Watchdog::new();
    let each = Duration::from_millis(200);
    let slow = |flags| SimConfig {
        flags,
        faults: Faults {
            delays: vec![(DeviceState::StopCopy, each)],
            ..Faults::default()
        },
        ..SimConfig::default()
    };
    // One after the other they would take 1.6 s. A machine may stand still for a moment: the best
    // of three counts.
    let best = |attempt: &dyn Fn() -> Duration| (0..3).map(|_| attempt()).min().unwrap();
    // With PRE_COPY they get there when the VM stops.
    let by_stop = best(&|| {
        let (mut sources, handles): (Vec<_>, Vec<_>) =
            (1..=8).map(|number| precopying(number, slow(ALL))).unzip();
        stop(&mut sources, Reason::FinishMigration).unwrap();
        span(&handles, DeviceState::StopCopy)
    });
    assert!(each <= by_stop && by_stop < 2 * each, "{by_stop:?}");
    // Without it, when the session starts.
    let by_session = best(&|| {
        let (near, far) = UnixStream::pair().unwrap();
        let reader = std::thread::spawn(move || io::copy(&mut &far, &mut io::sink()));
        let flags = MigrationFlags::STOP_COPY | MigrationFlags::P2P;
        let (sources, handles): (Vec<_>, Vec<_>) = (1..=8)
            .map(|number| precopying(number, slow(flags)))
            .unzip();
        let session = crate::quick::greeted(near);
        let outgoing = vfio_migration::migration::Outgoing::begin(sources, session).unwrap();
        let span = span(&handles, DeviceState::StopCopy);
        assert_eq!(outgoing.abort().len(), 8);
        reader.join().unwrap().unwrap();
        span
    });
    assert!(
        each <= by_session && by_session < 2 * each,
        "{by_session:?}"
    );
}

/// As above without a clock: each device's STOP_COPY waits for all others'.
#[test]
fn all_devices_are_in_the_change_to_stop_copy_at_once() {
    let _watchdog = Watchdog::new();
    let together = Arc::new(Barrier::new(8));
    let (near, far) = UnixStream::pair().unwrap();
    let reader = std::thread::spawn(move || io::copy(&mut &far, &mut io::sink()));
    let mut session = SaveSession::builder().channel(near);
    for number in 1..=8 {
        let (state, _end) = io::pipe().unwrap();
        let mut mock = Mock::new(state);
        let together = together.clone();
        mock.set = Some(Box::new(move |state| {
            if state == DeviceState::StopCopy {
                together.wait();
            }
            Ok(())
        }));
        session = session.device(mock.device(number));
    }
    let report = session.start().unwrap().join();
    report.result.unwrap();
    reader.join().unwrap().unwrap();
}

#[test]
fn a_callback_that_blocks_delays_no_other_device() {
    let _watchdog = Watchdog::new();
    let (near, far) = UnixStream::pair().unwrap();
    let (go, may_go) = mpsc::channel::<()>();
    let (first, to_first) = io::pipe().unwrap();
    let (second, to_second) = io::pipe().unwrap();
    let mut blocked = Mock::new(to_first);
    blocked.load = Some(Box::new(move |reader| {
        may_go.recv().unwrap();
        io::copy(reader, &mut io::sink()).map(|_| ())
    }));
    let free = Mock::new(to_second);
    let (loads, loaded) = mpsc::channel();
    let mut free = free;
    free.load = Some(Box::new(move |reader| {
        loads.send(()).unwrap();
        io::copy(reader, &mut io::sink()).map(|_| ())
    }));
    let devices = [blocked.device(1), free.device(2)]
        .map(|device| MigratableDevice::new(device, DeviceSettings::default()));
    let (first, second) = (collect(first), collect(second));
    let incoming = Incoming::setup(
        devices.into(),
        &Capabilities::default(),
        LoadSession::builder().channel(far),
        Box::new(|| Ok(())),
    )
    .unwrap();
    incoming.switchover_start().unwrap();
    let mut bytes = [hello(0), sync()].concat();
    for number in [1, 2] {
        bytes.extend(packet(number, 0, b"state"));
        bytes.extend(config_packet(number, 1, b"config"));
    }
    io::Write::write_all(&mut &near, &bytes).unwrap();
    // The free device gets its config while the other's callback has not returned.
    loaded.recv().unwrap();
    assert!(!incoming.is_finished());
    go.send(()).unwrap();
    drop(near);
    let loaded = incoming.finish().unwrap();
    assert_eq!(loaded.join().unwrap().len(), 2);
    assert_eq!(first.join().unwrap(), b"state");
    assert_eq!(second.join().unwrap(), b"state");
}
