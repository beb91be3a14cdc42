//! What comes back from a migration that is off is what went in: the devices of a VM that runs
//! run, and those of a VM that does not stand, whichever way the migration ended.

use std::{io, os::unix::net::UnixStream};

use nix::errno::Errno;
use vfio_migration::{
    Device, DeviceState, Duty, Failed, LoadSession, Report, SaveSession, SourceChannels,
    migration::{
        Capabilities, Incoming, MigratableDevice, OnOffAuto, Outgoing, OutgoingDevice,
        SwitchoverAck, SwitchoverAcks, vm as state,
    },
    sim::{CallFault, Callback, Fault, Faults, On, SimConfig, SimHandle, TransitionFault, Which},
};

use crate::{
    quick::quick,
    vm::{Setup, id},
    watchdog::Watchdog,
};

const HOMES: [DeviceState; 2] = [DeviceState::Running, DeviceState::Stop];
const WAYS: [OnOffAuto; 2] = [OnOffAuto::On, OnOffAuto::Off];

fn setup(state: DeviceState, transfer: OnOffAuto) -> Setup {
    Setup {
        state,
        transfer,
        ..Setup::default()
    }
}

/// Refuses to go to this state, from wherever.
fn refuses(to: DeviceState) -> Faults {
    let from = DeviceState::ALL.into_iter().filter(|from| *from != to);
    Faults {
        transitions: from
            .map(|from| TransitionFault {
                on: On::Request { from, to },
                which: Which::Every,
                errno: Errno::EIO as i32,
                leaves: None,
            })
            .collect(),
        ..Faults::default()
    }
}

fn no_config(callback: Callback) -> Faults {
    Faults {
        calls: vec![CallFault {
            callback,
            which: Which::Every,
            fault: Fault::Errno(Errno::EIO as i32),
        }],
        ..Faults::default()
    }
}

fn source(setup: &Setup, faults: Faults) -> (OutgoingDevice, SimHandle) {
    let config = SimConfig {
        faults,
        ..setup.config(1)
    };
    let (migratable, handle) = setup.admit(1, config);
    let acks = SwitchoverAcks::new(SwitchoverAck::Off);
    let source =
        OutgoingDevice::setup(migratable, &setup.capabilities(), &acks, io::sink()).unwrap();
    (source, handle)
}

/// A switchover that has all it needs, and whose channel nobody reads.
fn switchover(setup: &Setup, faults: Faults) -> (Outgoing, SimHandle, UnixStream) {
    let (source, handle) = source(setup, faults);
    let mut all = vec![source];
    state::stop(&mut all, state::Reason::FinishMigration).unwrap();
    let (near, far) = UnixStream::pair().unwrap();
    let channels = SourceChannels::greet(vec![near.into()], &quick()).unwrap();
    let session = SaveSession::builder()
        .settings(quick())
        .greeted_channels(channels);
    let outgoing = Outgoing::begin(all, session).unwrap();
    (outgoing, handle, far)
}

fn came_back(back: &[MigratableDevice], handle: &SimHandle, home: DeviceState, what: &str) {
    assert_eq!(back.len(), 1, "{what}");
    assert_eq!(back[0].state(), home, "{what}");
    assert_eq!(handle.state(), home, "{what}");
    assert_eq!(back[0].was_reset(), handle.calls(Callback::Reset) > 0);
    assert_ne!(back[0].duty(), Duty::Close, "{what}");
}

#[test]
fn a_source_that_is_off_before_its_switchover() {
    let _watchdog = Watchdog::new();
    for (home, transfer) in HOMES.into_iter().flat_map(|it| WAYS.map(|way| (it, way))) {
        let setup = setup(home, transfer);
        let what = format!("{home} {transfer:?}");
        // Refused by its terms, and by the device.
        let mut postcopy = Capabilities::default();
        postcopy.postcopy = true;
        let (migratable, handle) = setup.admit(1, setup.config(1));
        let acks = SwitchoverAcks::new(SwitchoverAck::Off);
        let failed = OutgoingDevice::setup(migratable, &postcopy, &acks, io::sink()).unwrap_err();
        came_back(&[failed.into_back()], &handle, home, &what);
        if home == DeviceState::Running {
            let faults = refuses(DeviceState::PreCopy);
            let config = SimConfig {
                faults,
                ..setup.config(1)
            };
            let (migratable, handle) = setup.admit(1, config);
            let failed =
                OutgoingDevice::setup(migratable, &setup.capabilities(), &acks, io::sink())
                    .unwrap_err();
            came_back(&[failed.into_back()], &handle, home, &what);
        }
        // Aborted, dropped, and after the VM's stop.
        let (it, handle) = source(&setup, Faults::default());
        came_back(&[it.abort()], &handle, home, &what);
        let (it, handle) = source(&setup, Faults::default());
        drop(it);
        assert_eq!(handle.state(), home, "{what}");
        let (it, handle) = source(&setup, Faults::default());
        let mut all = [it];
        state::stop(&mut all, state::Reason::FinishMigration).unwrap();
        let [it] = all;
        came_back(&[it.abort()], &handle, home, &what);
    }
}

#[test]
fn a_vm_that_was_paused_or_started_meanwhile() {
    let _watchdog = Watchdog::new();
    for reason in [state::Reason::Pause, state::Reason::Other] {
        let (it, handle) = source(&Setup::default(), Faults::default());
        let mut all = [it];
        state::stop(&mut all, reason).unwrap();
        let [it] = all;
        came_back(&[it.abort()], &handle, DeviceState::Stop, "paused");

        let (it, handle) = source(&Setup::default(), Faults::default());
        let mut all = [it];
        state::stop(&mut all, reason).unwrap();
        state::start(&mut all).unwrap();
        let [it] = all;
        came_back(&[it.abort()], &handle, DeviceState::Running, "started");
    }
}

#[test]
fn a_switchover_that_is_off() {
    let _watchdog = Watchdog::new();
    for (home, transfer) in HOMES.into_iter().flat_map(|it| WAYS.map(|way| (it, way))) {
        let setup = setup(home, transfer);
        let what = format!("{home} {transfer:?}");
        let (it, handle) = source(&setup, Faults::default());
        let wrong = SaveSession::builder(); // without a channel
        if transfer == OnOffAuto::On {
            let mut failed = Outgoing::begin(vec![it], wrong).unwrap_err();
            came_back(failed.back_mut(), &handle, home, &what);
        }
        let (it, handle, _far) = switchover(&setup, Faults::default());
        came_back(&it.abort(), &handle, home, &what);
        let (it, handle, _far) = switchover(&setup, Faults::default());
        drop(it);
        assert_eq!(handle.state(), home, "{what}");
        let (mut it, handle, _far) = switchover(&setup, no_config(Callback::SaveConfig));
        let _ = it.write_state(&id(1), io::sink());
        let _ = it.write_config(&id(1), io::sink());
        came_back(&it.finish().unwrap_err().into_back(), &handle, home, &what);
        // Only a reset lets go of STOP_COPY, and a device that stood must stand again.
        let faults = refuses(home);
        if home == DeviceState::Running {
            let (it, handle, _far) = switchover(&setup, faults);
            let back = it.abort();
            came_back(&back, &handle, home, &what);
            assert_eq!(back[0].duty(), Duty::SetUpAnew, "{what}");
        }
    }
}

/// A device that refuses the first change to STOP from STOP_COPY, or every change to STOP.
fn reluctant(which: Which, from: Option<DeviceState>) -> Faults {
    let mut faults = refuses(DeviceState::Stop);
    faults.transitions.retain(|fault| match (&fault.on, from) {
        (On::Request { from: is, .. }, Some(from)) => *is == from,
        _ => true,
    });
    for fault in &mut faults.transitions {
        fault.which = which;
    }
    faults
}

#[test]
fn a_save_of_which_nobody_knows_leaves_its_devices_stopped() {
    let _watchdog = Watchdog::new();
    for (home, transfer) in HOMES.into_iter().flat_map(|it| WAYS.map(|way| (it, way))) {
        let setup = setup(home, transfer);
        let saved = |faults| {
            let (mut it, handle, far) = switchover(&setup, faults);
            let reader = std::thread::spawn(move || io::copy(&mut &far, &mut io::sink()));
            it.write_state(&id(1), io::sink()).unwrap();
            it.write_config(&id(1), io::sink()).unwrap();
            let saved = it.finish().unwrap();
            drop(reader);
            (saved, handle)
        };
        let what = format!("{home} {transfer:?}");
        let (it, handle) = saved(Faults::default());
        drop(it);
        assert_eq!(handle.state(), DeviceState::Stop, "{what}");
        assert_eq!(handle.calls(Callback::Reset), 0, "it keeps what it holds");
        let (it, handle) = saved(Faults::default());
        came_back(&it.in_doubt(), &handle, DeviceState::Stop, &what);
        let (it, handle) = saved(Faults::default());
        came_back(&it.abort(), &handle, home, &what);
        let (it, handle) = saved(Faults::default());
        came_back(&it.cleanup().unwrap(), &handle, DeviceState::Stop, &what);

        // One that refuses to stop: in doubt it keeps its state, and stands.
        let stays = || reluctant(Which::Every, Some(DeviceState::StopCopy));
        let (it, handle) = saved(stays());
        came_back(&it.in_doubt(), &handle, DeviceState::StopCopy, &what);
        assert_eq!(handle.calls(Callback::Reset), 0, "{what}");
        // Elsewhere it is reset, which makes it run, and stopped.
        let (it, handle) = saved(stays());
        let mut failed = it.cleanup().unwrap_err();
        came_back(failed.back_mut(), &handle, DeviceState::Stop, &what);
        assert_eq!(failed.error.raw_os_error(), Some(Errno::EIO as i32));
        assert!(failed.back_mut()[0].was_reset(), "{what}");
        assert_eq!(failed.back_mut()[0].duty(), Duty::Nothing, "{what}");
    }
    // And one that does not stop at all is to be closed.
    let (mut it, handle, far) = switchover(
        &Setup {
            flags: vfio_migration::MigrationFlags::STOP_COPY
                | vfio_migration::MigrationFlags::PRE_COPY,
            ..setup(DeviceState::Running, OnOffAuto::On)
        },
        reluctant(Which::Every, None),
    );
    let reader = std::thread::spawn(move || io::copy(&mut &far, &mut io::sink()));
    it.write_state(&id(1), io::sink()).unwrap();
    it.write_config(&id(1), io::sink()).unwrap();
    let mut failed = it.finish().unwrap().cleanup().unwrap_err();
    assert_eq!(failed.back_mut()[0].duty(), Duty::Close);
    assert_eq!(failed.back_mut()[0].state(), handle.state());
    drop(reader);
}

#[test]
fn a_load_that_is_off() {
    let _watchdog = Watchdog::new();
    for (home, transfer) in HOMES.into_iter().flat_map(|it| WAYS.map(|way| (it, way))) {
        let setup = setup(home, transfer);
        let what = format!("{home} {transfer:?}");
        let incoming = |faults| {
            let config = SimConfig {
                faults,
                ..setup.config(9)
            };
            let (migratable, handle) = setup.admit(1, config);
            let session = LoadSession::builder().settings(quick());
            let approve = Box::new(|| Ok(()));
            let it = Incoming::setup(vec![migratable], &setup.capabilities(), session, approve);
            (it, handle)
        };
        let (it, handle) = incoming(refuses(DeviceState::Resuming));
        came_back(&it.unwrap_err().into_back(), &handle, home, &what);
        let (it, handle) = incoming(Faults::default());
        came_back(&it.unwrap().abort(), &handle, home, &what);
        let (it, handle) = incoming(Faults::default());
        drop(it);
        assert_eq!(handle.state(), home, "{what}");
        let (it, handle) = incoming(Faults::default());
        let it = it.unwrap();
        it.cancel();
        let back = it.finish().unwrap_err().into_back();
        came_back(&back, &handle, home, &what);
        assert_eq!(back[0].duty(), Duty::Nothing, "nobody misses what it held");
    }
}

// ---------------------------------------------------------------- sessions without a life cycle

fn device(setup: &Setup, faults: Faults) -> (Device, SimHandle) {
    let config = SimConfig {
        faults,
        ..setup.config(1)
    };
    let (migratable, handle) = setup.admit(1, config);
    (migratable.into_device(), handle)
}

fn in_state(report: &Report, handle: &SimHandle, home: DeviceState, what: &str) {
    let device = report.devices[0].device.as_ref().unwrap();
    assert_eq!(device.state(), home, "{what}");
    assert_eq!(handle.state(), home, "{what}");
}

/// What began: the session, its device, and its peer, who says nothing.
type Begun<S> = (Result<S, Failed<Vec<Device>>>, SimHandle, UnixStream);

/// One that is refused its device's change to `working`, one that is cancelled, and one that is dropped.
fn comes_to_nothing<S>(
    begin: impl Fn(Faults) -> Begun<S>,
    cancelled: impl Fn(S) -> Report,
    working: DeviceState,
    home: DeviceState,
) {
    let what = home.to_string();
    let (it, handle, _peer) = begin(refuses(working));
    let back = it.err().unwrap().into_back();
    assert_eq!((back[0].state(), handle.state()), (home, home), "{what}");
    let (it, handle, _peer) = begin(Faults::default());
    in_state(&cancelled(it.unwrap()), &handle, home, &what);
    let (it, handle, _peer) = begin(Faults::default());
    drop(it.unwrap());
    assert_eq!(handle.state(), home, "{what}");
}

#[test]
fn a_save_alone() {
    let _watchdog = Watchdog::new();
    for home in HOMES {
        let setup = setup(home, OnOffAuto::On);
        let what = home.to_string();
        let begin = |faults| {
            let (device, handle) = device(&setup, faults);
            let (near, far) = UnixStream::pair().unwrap();
            let builder = SaveSession::builder().settings(quick());
            (builder.device(device).channel(near).start(), handle, far)
        };
        let cancelled = |it: SaveSession| {
            it.cancel();
            it.join()
        };
        comes_to_nothing(begin, cancelled, DeviceState::StopCopy, home);
        let (it, handle, far) = begin(no_config(Callback::SaveConfig));
        drop(far);
        in_state(&it.unwrap().join(), &handle, home, &what);
        // It has succeeded, and the destination has not.
        for goes_on in [true, false] {
            let (it, handle, far) = begin(Faults::default());
            let reader = std::thread::spawn(move || io::copy(&mut &far, &mut io::sink()));
            let mut report = it.unwrap().join();
            report.result.as_ref().unwrap();
            in_state(&report, &handle, DeviceState::StopCopy, &what);
            if goes_on {
                report.put_back();
                in_state(&report, &handle, home, &what);
            } else {
                report.stop_devices();
                in_state(&report, &handle, DeviceState::Stop, &what);
            }
            reader.join().unwrap().unwrap();
        }
        // The clean-up resets a device, which makes it run: it is stopped.
        let faults = reluctant(Which::Every, Some(DeviceState::StopCopy));
        let (it, handle, far) = begin(faults);
        let reader = std::thread::spawn(move || io::copy(&mut &far, &mut io::sink()));
        let mut report = it.unwrap().join();
        report.stop_devices();
        assert!(report.devices[0].result.is_err(), "{what}");
        in_state(&report, &handle, DeviceState::Stop, &what);
        reader.join().unwrap().unwrap();
    }
}

#[test]
fn a_load_alone() {
    let _watchdog = Watchdog::new();
    for home in HOMES {
        let setup = setup(home, OnOffAuto::On);
        let what = home.to_string();
        let begin = |faults| {
            let (device, handle) = device(&setup, faults);
            let (near, far) = UnixStream::pair().unwrap();
            let builder = LoadSession::builder().settings(quick());
            (builder.device(device).channel(far).start(), handle, near)
        };
        let cancelled = |it: LoadSession| {
            it.cancel();
            it.join()
        };
        comes_to_nothing(begin, cancelled, DeviceState::Resuming, home);
        let (it, handle, _near) = begin(Faults::default());
        in_state(&it.unwrap().cleanup(), &handle, home, &what);
        // An unplug.
        let (it, handle, _near) = begin(Faults::default());
        let it = it.unwrap();
        let back = it.remove_device(&id(1)).unwrap();
        assert_eq!((back.state(), handle.state()), (home, home), "{what}");
        // Of two devices one is loaded, and the other's config is refused: nothing is left in
        // either.
        let (good, good_handle) = device(&setup, Faults::default());
        let (bad, bad_handle) = {
            let config = SimConfig {
                faults: no_config(Callback::LoadConfig),
                ..setup.config(2)
            };
            let (migratable, handle) = setup.admit(2, config);
            (migratable.into_device(), handle)
        };
        let load = LoadSession::builder().settings(quick());
        let load = load.device(good).device(bad).start().unwrap();
        load.switchover_start();
        let mut publisher = load.publisher();
        let loads = |handle: &SimHandle, count| {
            // Under the watchdog: it ends when the callback has been called.
            while handle.calls(Callback::LoadConfig) < count {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        };
        let (image, other) = (setup.config(1), setup.config(2));
        push(&mut publisher, 1, &image);
        loads(&good_handle, 1);
        push(&mut publisher, 2, &other);
        loads(&bad_handle, 1);
        drop(publisher);
        let report = load.join();
        assert!(report.result.is_err(), "{what}");
        for (report, handle) in report.devices.iter().zip([&good_handle, &bad_handle]) {
            let device = report.device.as_ref().unwrap();
            assert_eq!((device.state(), handle.state()), (home, home), "{what}");
            assert!(device.was_reset(), "{what}");
            assert_eq!(device.duty(), Duty::Nothing, "{what}");
        }
    }
}

/// Pushes all packets of a device with this state.
fn push(publisher: &mut vfio_migration::Publisher, number: u32, of: &SimConfig) {
    use vfio_migration::{
        sim::Image,
        wire::{PacketHeader, wrap_config},
    };
    let image = Image::new(of.seed, of.len);
    let mut at = 0;
    let mut packet = |config, body: &[u8]| {
        let header = PacketHeader { index: at, config };
        let bytes = [&header.encode()[..], body].concat();
        publisher.push(&id(number), &bytes).unwrap();
        at += 1;
    };
    let mut offset = 0;
    while offset < image.len() {
        let mut data = vec![0; usize::try_from((1 << 20).min(image.len() - offset)).unwrap()];
        image.fill(offset, &mut data);
        packet(false, &data);
        offset += data.len() as u64;
    }
    let config = [&4_u32.to_be_bytes()[..], b"conf"].concat();
    packet(true, &wrap_config(&config));
}

#[test]
fn a_start_that_fails_leaves_no_device_running() {
    let _watchdog = Watchdog::new();
    for at in [DeviceState::RunningP2p, DeviceState::Running] {
        let setup = setup(DeviceState::Running, OnOffAuto::Off);
        let acks = SwitchoverAcks::new(SwitchoverAck::Off);
        let mut sources: Vec<_> = (1..=2)
            .map(|number| {
                let (migratable, _) = setup.admit(number, setup.config(number.into()));
                OutgoingDevice::setup(migratable, &setup.capabilities(), &acks, io::sink()).unwrap()
            })
            .collect();
        state::stop(&mut sources, state::Reason::FinishMigration).unwrap();
        let mut outgoing = Outgoing::begin(sources, SaveSession::builder()).unwrap();
        let (devices, handles): (Vec<_>, Vec<_>) = (1..=2)
            .map(|number| {
                let mut config = setup.config(9);
                if number == 2 {
                    config.faults = refuses(at);
                }
                setup.admit(number, config)
            })
            .unzip();
        let session = LoadSession::builder().settings(quick());
        let approve = Box::new(|| Ok(()));
        let incoming = Incoming::setup(devices, &setup.capabilities(), session, approve).unwrap();
        incoming.switchover_start().unwrap();
        for number in [1, 2] {
            let mut body = Vec::new();
            outgoing.write_state(&id(number), &mut body).unwrap();
            let device = incoming.device(&id(number)).unwrap();
            device.load_state(&mut &body[..]).unwrap();
            let mut body = Vec::new();
            outgoing.write_config(&id(number), &mut body).unwrap();
            device.load_state(&mut &body[..]).unwrap();
        }
        let saved = outgoing.finish().unwrap();
        let mut loaded = incoming.finish().unwrap();
        let error = state::start(loaded.devices_mut()).unwrap_err();
        assert_eq!(error.device(), Some(&id(2)), "{at}");
        for (migratable, handle) in loaded.devices_mut().iter().zip(&handles) {
            assert_eq!(handle.state(), DeviceState::Stop, "{at}");
            assert_eq!(migratable.state(), DeviceState::Stop, "{at}");
            assert!(migratable.was_reset(), "{at}: what was loaded is in it");
            assert_eq!(migratable.duty(), Duty::Nothing, "{at}");
        }
        // The verdict is that it has failed: the VM goes on here.
        for migratable in saved.abort() {
            assert_eq!(migratable.state(), DeviceState::Running, "{at}");
        }
    }
}
