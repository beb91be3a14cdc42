//! A source's device, step by step: its set-up, its estimates, its iterations and its acks.

use std::{io, os::unix::net::UnixStream, thread};

use nix::errno::Errno;
use vfio_migration::{
    DeviceState, ErrorKind, LoadSession, SaveSession, SourceChannels,
    estimate::MAX_DATA_SIZE,
    migration::{
        Admitted, Capabilities, DeviceSettings, Incoming, MigrationBlockers, OnOffAuto, Outgoing,
        OutgoingDevice, PlatformSupport, SwitchoverAck, SwitchoverAcks, vm as state,
    },
    section::Tag,
    sim::{CallFault, Callback, Fault, Faults, On, SimConfig, SimDevice, TransitionFault, Which},
};

use crate::{
    quick::{greeted, quick},
    steps::source,
    vm::{Setup, id},
    watchdog::Watchdog,
};

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
