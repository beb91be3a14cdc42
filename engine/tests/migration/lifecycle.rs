//! The whole life cycle of devices' migrations: every step on both sides, in every way that the
//! data can take.

use std::{
    io,
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use nix::errno::Errno;
use vfio_migration::{
    Device, DeviceState, ErrorKind, LoadSession, MigrationFlags, Refusal, SaveSession,
    SourceChannels, StateEvent, Violation,
    estimate::MAX_DATA_SIZE,
    migration::{
        Admitted, Capabilities, DeviceSettings, Incoming, MigratableDevice, MigrationBlockers,
        OnOffAuto, Outgoing, OutgoingDevice, PlatformSupport, SwitchoverAck, SwitchoverAcks,
        vm as state,
    },
    section::{self, Tag},
    sim::{
        CallFault, Callback, Fault, Faults, On, SimConfig, SimDevice, SimHandle, TransitionFault,
        Which,
    },
};

use crate::{
    quick::{greeted, quick},
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

// ------------------------------------------------------------------------------- one step alone

fn source(config: SimConfig, ack: SwitchoverAck) -> (OutgoingDevice, SimHandle, SwitchoverAcks) {
    let setup = Setup {
        ack,
        ..Setup::default()
    };
    let (migratable, handle) = setup.admit(1, config);
    let acks = SwitchoverAcks::new(ack);
    let source =
        OutgoingDevice::setup(migratable, &setup.capabilities(), &acks, io::sink()).unwrap();
    (source, handle, acks)
}

fn incoming(setup: &Setup) -> (Incoming, SimHandle, Arc<AtomicU32>) {
    let (migratable, handle) = setup.admit(1, setup.config(9));
    let approvals = Arc::new(AtomicU32::new(0));
    let counted = approvals.clone();
    let approve = move || {
        counted.fetch_add(1, SeqCst);
        Ok(())
    };
    let session = LoadSession::builder().settings(quick());
    let incoming = Incoming::setup(
        vec![migratable],
        &setup.capabilities(),
        session,
        Box::new(approve),
    )
    .unwrap();
    (incoming, handle, approvals)
}

/// Loads a body of these tags, and `data` behind the size of a DATA block.
fn load(incoming: &Incoming, tags: &[Tag], data: &[u8]) -> vfio_migration::Result<Tag> {
    let mut body = Vec::new();
    for tag in tags {
        body.extend(tag.encode());
        if *tag == Tag::Data {
            body.extend((data.len() as u64).to_be_bytes());
            body.extend(data);
        }
    }
    let piece = incoming.device(&id(1))?.load_state(&mut &body[..])?;
    Ok(piece.end)
}

const fn tag_of(tag: Tag) -> Violation {
    Violation::SectionTag(tag.value())
}

fn refused(result: vfio_migration::Result<Tag>, violation: Violation) {
    let error = result.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Protocol(violation), "{error:?}");
    assert_eq!(error.device(), Some(&id(1)));
}

#[test]
fn estimates_drop_with_what_is_read_and_are_never_believed_above_a_pebibyte() {
    let config = SimConfig {
        len: 1 << 20,
        precopy_initial: 100_000,
        ..SimConfig::default()
    };
    let (mut source, handle, _) = source(
        SimConfig {
            data_size: Some(u64::MAX - 4096),
            ..config.clone()
        },
        SwitchoverAck::Off,
    );
    assert_eq!(source.pending_estimate().total(), 100_000);
    let exact = source.pending_exact().unwrap();
    // All that a stop would give, what can be read in PRE_COPY included.
    assert_eq!(exact.initial, 100_000);
    assert_eq!(exact.total(), MAX_DATA_SIZE);
    // New data is known only when the device is asked.
    handle.dirty(50_000);
    assert_eq!(source.pending_estimate().dirty, 0);
    let exact = source.pending_exact().unwrap();
    assert_eq!((exact.initial, exact.dirty), (100_000, 50_000));
    let calls = handle.calls(Callback::PrecopyInfo);
    let read = source.iterate(io::sink()).unwrap().bytes as u64;
    let estimate = source.pending_estimate();
    assert_eq!(estimate.total(), MAX_DATA_SIZE - read);
    assert_eq!(estimate.precopy(), 150_000 - read);
    assert_eq!(estimate.initial, 100_000_u64.saturating_sub(read));
    assert_eq!(handle.calls(Callback::PrecopyInfo), calls, "cheap");
    while source.iterate(io::sink()).unwrap().bytes > 0 {}
    let estimate = source.pending_estimate();
    assert_eq!(estimate.precopy(), 0);
    assert_eq!(estimate.total(), MAX_DATA_SIZE - 150_000);
    let _running = source.abort();
}

#[test]
fn what_can_be_read_in_precopy_is_counted_once() {
    let config = SimConfig {
        len: 1 << 20,
        precopy_initial: 600_000,
        ..SimConfig::default()
    };
    let (mut source, _, _) = source(config, SwitchoverAck::Off);
    let exact = source.pending_exact().unwrap();
    assert_eq!(exact.total(), 1 << 20);
    assert_eq!(exact.precopy(), 600_000);
    assert_eq!(exact.stop_copy, (1 << 20) - 600_000);
    // A device whose estimate of all is below what it says for now.
    let (mut small, _, _) = self::source(
        SimConfig {
            len: 1 << 20,
            precopy_initial: 600_000,
            data_size: Some(10),
            ..SimConfig::default()
        },
        SwitchoverAck::Off,
    );
    let exact = small.pending_exact().unwrap();
    assert_eq!((exact.total(), exact.stop_copy), (600_000, 0));
}

#[test]
fn an_estimate_is_the_last_exact_number_less_what_was_read_since() {
    let config = SimConfig {
        len: 1 << 20,
        precopy_initial: 600_000,
        ..SimConfig::default()
    };
    let (mut source, _, _) = source(config, SwitchoverAck::Off);
    assert_eq!(source.pending_estimate().stop_copy, 0, "nobody has asked");
    let mut left = source.pending_exact().unwrap().total();
    assert_eq!(source.pending_estimate().total(), left);
    loop {
        let read = source.iterate(io::sink()).unwrap().bytes as u64;
        left -= read;
        assert_eq!(source.pending_estimate().total(), left);
        if read == 0 {
            break;
        }
    }
    assert_eq!(left, (1 << 20) - 600_000);
    // The VM stops: what is left is STOP_COPY's.
    let mut all = [source];
    state::stop(&mut all, state::Reason::FinishMigration).unwrap();
    let estimate = all[0].pending_estimate();
    assert_eq!((estimate.stop_copy, estimate.precopy()), (left, 0));
}

#[test]
fn a_device_that_cannot_tell_is_thought_large_at_the_end_and_empty_before() {
    let silent = |callback| CallFault {
        callback,
        which: Which::Every,
        fault: Fault::Errno(Errno::EIO as i32),
    };
    let config = SimConfig {
        precopy_initial: 100_000,
        faults: Faults {
            calls: vec![silent(Callback::PrecopyInfo), silent(Callback::DataSize)],
            ..Faults::default()
        },
        ..SimConfig::default()
    };
    let (mut source, _, _) = source(config, SwitchoverAck::Off);
    assert_eq!(source.pending_estimate().total(), 0);
    assert_eq!(source.pending_exact().unwrap().total(), 100 << 30);
    // It is read all the same.
    assert_eq!(source.iterate(io::sink()).unwrap().bytes, 100_000);
    let _running = source.abort();
}

#[test]
fn an_iteration_reads_once_and_says_once_that_the_initial_data_is_sent() {
    let (mut source, handle, acks) = source(
        SimConfig {
            precopy_initial: 70_000,
            data_size: Some(1), // a buffer of the least size, 64 KiB
            ..SimConfig::default()
        },
        SwitchoverAck::Once,
    );
    assert!(!source.is_switchover_ready() && !acks.is_open());
    let mut ends = Vec::new();
    for _ in 0..4 {
        let mut body = Vec::new();
        let before = handle.calls(Callback::ReadPrecopy);
        let iteration = source.iterate(&mut body).unwrap();
        assert_eq!(handle.calls(Callback::ReadPrecopy), before + 1);
        assert!(iteration.bytes <= 64 << 10);
        let end = Tag::decode(body[body.len() - 8..].try_into().unwrap()).unwrap();
        assert_eq!(iteration.init_data_sent, end == Tag::InitDataSent);
        let data = if iteration.bytes > 0 { 16 } else { 0 };
        assert_eq!(body.len(), data + iteration.bytes + 8);
        ends.push(end);
        if end == Tag::EndOfState && iteration.bytes == 0 {
            handle.dirty(10); // not initial: it is not said again
        }
    }
    let said = ends.iter().filter(|end| **end == Tag::InitDataSent);
    assert_eq!(said.count(), 1, "{ends:?}");
    assert!(!source.is_switchover_ready());
    acks.received();
    assert!(source.is_switchover_ready());
    let _running = source.abort();
}

#[test]
fn a_device_asks_again_where_acks_are_reusable() {
    let config = SimConfig {
        precopy_initial: 1000,
        ..SimConfig::default()
    };
    for (ack, again) in [
        (SwitchoverAck::Once, false),
        (SwitchoverAck::Reusable, true),
    ] {
        let setup = Setup {
            ack,
            ..Setup::default()
        };
        // The opt-in is made where the device is admitted.
        let device = SimDevice::new(config.clone()).unwrap();
        let handle = device.handle();
        let mut around = PlatformSupport::default();
        around.device_dirty_tracking = true;
        let realization = MigrationBlockers::default()
            .admit(
                id(1),
                Box::new(device),
                &DeviceSettings::default(),
                around,
                &mut |_, _| Ok(()),
            )
            .unwrap();
        let Admitted::Migratable(migratable) = realization else {
            panic!("{realization:?}");
        };
        let acks = SwitchoverAcks::new(ack);
        let mut source =
            OutgoingDevice::setup(migratable, &setup.capabilities(), &acks, io::sink()).unwrap();
        assert!(source.iterate(io::sink()).unwrap().init_data_sent);
        acks.received();
        assert!(source.is_switchover_ready());

        handle.reinit(500);
        source.pending_exact().unwrap();
        assert_eq!(source.is_switchover_ready(), !again);
        let iteration = source.iterate(io::sink()).unwrap();
        assert_eq!(iteration.init_data_sent, again);
        acks.received();
        assert!(source.is_switchover_ready());

        // And once more, in the last moment.
        handle.reinit(500);
        let mut all = [source];
        let stopped = state::stop(&mut all, state::Reason::FinishMigration);
        let [source] = all;
        if again {
            let error = stopped.unwrap_err();
            assert_eq!(*error.kind(), ErrorKind::LateRequest);
            assert_eq!(error.device(), Some(&id(1)));
            // The migration has failed, also where nobody looks.
            let (near, _far) = UnixStream::pair().unwrap();
            let session = greeted(near);
            let mut failed = Outgoing::begin(vec![source], session).unwrap_err();
            assert_eq!(*failed.error.kind(), ErrorKind::LateRequest);
            assert_eq!(failed.back_mut()[0].state(), DeviceState::Running);
        } else {
            stopped.unwrap();
            let _running = source.abort();
        }
        assert_eq!(handle.state(), DeviceState::Running);
    }
}

#[test]
fn a_vm_does_not_stop_for_a_switchover_that_is_not_acknowledged() {
    let (source, handle, acks) = source(Setup::default().config(1), SwitchoverAck::Once);
    let mut all = [source];
    let error = state::stop(&mut all, state::Reason::FinishMigration).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Misuse(_)));
    // The VM did stop, and so did the device; but there is no way on.
    assert_eq!(handle.state(), DeviceState::StopCopy);
    acks.received();
    let failed = Outgoing::begin(all.into(), SaveSession::builder()).unwrap_err();
    assert!(matches!(failed.error.kind(), ErrorKind::Misuse(_)));
    assert_eq!(handle.state(), DeviceState::Running);
}

#[test]
fn a_vm_that_is_paused_in_precopy_switches_over_without_its_acks() {
    let _watchdog = Watchdog::new();
    for ack in [SwitchoverAck::Once, SwitchoverAck::Reusable] {
        let (source, handle, acks) = source(Setup::default().config(1), ack);
        let mut all = vec![source];
        state::stop(&mut all, state::Reason::Pause).unwrap();
        assert!(all[0].is_switchover_ready(), "it does not run");
        assert!(!acks.is_open(), "and nobody has acknowledged");
        state::stop(&mut all, state::Reason::FinishMigration).unwrap();
        let (near, far) = UnixStream::pair().unwrap();
        let reader = thread::spawn(move || io::copy(&mut &far, &mut io::sink()));
        let session = SaveSession::builder()
            .settings(quick())
            .greeted_channels(SourceChannels::greet(vec![near.into()], &quick()).unwrap());
        let outgoing = Outgoing::begin(all, session).unwrap();
        acks.received(); // late, and no harm
        let saved = outgoing.finish().unwrap();
        assert_eq!(saved.abort()[0].state(), DeviceState::Stop, "paused");
        assert_eq!(handle.state(), DeviceState::Stop);
        reader.join().unwrap().unwrap();
    }
    // One that goes on again has to wait again.
    let (source, _, _) = source(Setup::default().config(1), SwitchoverAck::Once);
    let mut all = [source];
    state::stop(&mut all, state::Reason::Pause).unwrap();
    state::start(&mut all).unwrap();
    assert!(!all[0].is_switchover_ready());
}

#[test]
fn setup_refuses_what_cannot_work_and_gives_the_device_back() {
    let mut postcopy = Capabilities::default();
    postcopy.postcopy = true;
    let mut snapshot = Capabilities::default();
    snapshot.background_snapshot = true;
    let mut compressed = Capabilities::default();
    compressed.compression = true;
    let plain = Capabilities::default();
    let p2p = DeviceState::RunningP2p;
    let running = DeviceState::Running;
    for (capabilities, state, transfer) in [
        (&postcopy, running, OnOffAuto::Auto),
        (&snapshot, running, OnOffAuto::Auto),
        (&compressed, running, OnOffAuto::On),
        (&plain, p2p, OnOffAuto::Auto),
    ] {
        let setup = Setup {
            state,
            transfer,
            ..Setup::default()
        };
        let (migratable, handle) = setup.admit(1, setup.config(1));
        let mut failed = OutgoingDevice::setup(
            migratable,
            capabilities,
            &SwitchoverAcks::new(SwitchoverAck::Off),
            io::sink(),
        )
        .unwrap_err();
        assert_eq!(failed.error.device(), Some(&id(1)));
        if state == p2p {
            assert_eq!(failed.error.raw_os_error(), Some(Errno::EINVAL as i32));
            assert_eq!(*failed.error.kind(), ErrorKind::State);
        } else {
            assert!(matches!(failed.error.kind(), ErrorKind::Misuse(_)));
        }
        assert_eq!(failed.back_mut().state(), handle.state());
        assert_eq!(handle.state(), state, "as it came in");
        if state == running {
            // And so does the destination.
            let (migratable, handle) = setup.admit(1, setup.config(1));
            let session = LoadSession::builder();
            let failed =
                Incoming::setup(vec![migratable], capabilities, session, Box::new(|| Ok(())));
            assert_eq!(failed.unwrap_err().into_back().len(), 1);
            assert_eq!(handle.state(), running);
        }
    }
}

#[test]
fn a_device_that_refuses_its_setup_is_put_back_with_the_others() {
    let faults = |to| Faults {
        transitions: vec![TransitionFault {
            on: On::Request {
                from: DeviceState::Running,
                to,
            },
            which: Which::Every,
            errno: Errno::EIO as i32,
            leaves: None,
        }],
        ..Faults::default()
    };
    let setup = Setup::default();
    let mut config = setup.config(1);
    config.faults = faults(DeviceState::PreCopy);
    let (migratable, handle) = setup.admit(1, config);
    let acks = SwitchoverAcks::new(SwitchoverAck::Off);
    let mut failed =
        OutgoingDevice::setup(migratable, &setup.capabilities(), &acks, io::sink()).unwrap_err();
    assert_eq!(failed.error.raw_os_error(), Some(Errno::EIO as i32));
    assert_eq!(failed.back_mut().state(), DeviceState::Running);
    assert_eq!(handle.state(), DeviceState::Running);

    for transfer in [OnOffAuto::On, OnOffAuto::Off] {
        let setup = Setup {
            transfer,
            ..Setup::default()
        };
        let mut config = setup.config(1);
        config.faults = faults(DeviceState::Resuming);
        let (bad, bad_handle) = setup.admit(1, config);
        let (good, good_handle) = setup.admit(2, setup.config(2));
        let session = LoadSession::builder().settings(quick());
        let mut failed = Incoming::setup(
            vec![good, bad],
            &setup.capabilities(),
            session,
            Box::new(|| Ok(())),
        )
        .unwrap_err();
        assert_eq!(failed.error.raw_os_error(), Some(Errno::EIO as i32));
        assert_eq!(failed.back_mut().len(), 2, "{transfer:?}");
        for (migratable, handle) in failed.back_mut().iter().zip([good_handle, bad_handle]) {
            assert_eq!(migratable.state(), DeviceState::Running);
            assert_eq!(handle.state(), DeviceState::Running);
        }
    }
}

// ------------------------------------------------------------------- what a source may not say

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

// -------------------------------------------------------------------------- what fails midway

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
