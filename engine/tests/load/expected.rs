//! A device that is expected: what comes for it before it is there is held, within the budget, and is written when it
//! has been added; one that never comes ends the wait for it.

use std::{
    io::{self, Write},
    os::unix::net::UnixStream,
    thread::{self, JoinHandle},
    time::Duration,
};

use vfio_migration::{
    Backend, ConfigGate, DeviceSpec, DeviceState, ErrorKind, LoadBuilder, LoadSession, Settings,
    Spill, Stats,
};

use crate::{
    mock::Mock,
    names::id,
    packets::{config_packet, hello, packet},
    pipes::collect,
    watchdog::Watchdog,
};

const BACKENDS: [Backend; 2] = [Backend::Auto, Backend::Blocking];

const BUDGET: usize = 4 << 20;

const LATE: u32 = 1;
const HERE: u32 = 2;

fn builder(backend: Backend) -> LoadBuilder {
    let mut settings = Settings::default();
    settings.backend = backend;
    settings.budget = Some(BUDGET);
    settings.spill = Spill::Off;
    LoadSession::builder().settings(settings).expect(id(LATE))
}

/// Sends these bytes, however long the channel does not read, and then the end.
fn send(mut near: UnixStream, bytes: Vec<u8>) -> JoinHandle<()> {
    thread::spawn(move || near.write_all(&bytes).unwrap())
}

fn wait(load: &LoadSession, until: impl Fn(&Stats) -> bool) {
    while !until(&load.stats()) {
        assert!(load.failure().is_none());
        thread::sleep(Duration::from_millis(1));
    }
}

/// So many bytes of state in packets of 100 kB, and a config.
fn state(device: u32, len: usize) -> (Vec<u8>, Vec<u8>) {
    let pattern: Vec<u8> = (0..251)
        .map(|at| at ^ u8::try_from(device).unwrap())
        .collect();
    let mut state = pattern.repeat(len / 251 + 1);
    state.truncate(len);
    let mut bytes = Vec::new();
    let mut index = 0;
    for piece in state.chunks(100_000) {
        bytes.extend(packet(device, index, piece));
        index += 1;
    }
    bytes.extend(config_packet(device, index, b"config"));
    (state, bytes)
}

#[test]
fn what_comes_before_the_device_is_held_and_then_written() {
    for backend in BACKENDS {
        for early in [true, false] {
            let _watchdog = Watchdog::new();
            let (near, far) = UnixStream::pair().unwrap();
            let load = builder(backend).channel(far).start().unwrap();
            let (state, bytes) = state(LATE, 600_000);
            send(near, [hello(0), bytes].concat()).join().unwrap();
            wait(&load, |stats| stats.devices[0].queued == 7);
            assert!(!load.is_finished());
            let (reader, writer) = io::pipe().unwrap();
            let got = collect(reader);
            if early {
                load.switchover_start();
            }
            load.add_device(Mock::new(writer).device(LATE)).unwrap();
            load.switchover_start();
            let report = load.join();
            report.result.as_ref().unwrap();
            assert_eq!(report.devices.len(), 1);
            let device = report.devices[0].device.as_ref().unwrap();
            assert_eq!(device.state(), DeviceState::Stop);
            assert_eq!(report.stats.late_wakeups, 0);
            drop(report);
            assert!(got.join().unwrap() == state);
        }
    }
}

#[test]
fn a_state_beyond_the_budget_waits_in_the_source_and_takes_no_other_devices_place() {
    for backend in BACKENDS {
        let _watchdog = Watchdog::new();
        let pair = || UnixStream::pair().unwrap();
        let ((near, far), (near_here, far_here)) = (pair(), pair());
        let (here, to_here) = io::pipe().unwrap();
        let load = builder(backend)
            .device(Mock::new(to_here).device(HERE))
            .channels([far, far_here])
            .start()
            .unwrap();
        let got_here = collect(here);
        load.switchover_start();
        let (late, bytes) = state(LATE, 8 << 20);
        let sending = send(near, [hello(0), bytes].concat());
        wait(&load, |stats| stats.devices[0].queued > 0);
        let (here, bytes) = state(HERE, 4 << 20);
        send(near_here, [hello(1), bytes].concat()).join().unwrap();
        assert!(got_here.join().unwrap() == here, "the other one is loaded");
        assert!(!sending.is_finished());
        assert!(load.stats().held_high <= BUDGET as u64);
        let (reader, writer) = io::pipe().unwrap();
        let got = collect(reader);
        load.add_device(Mock::new(writer).device(LATE)).unwrap();
        load.switchover_start();
        sending.join().unwrap();
        load.join().result.unwrap();
        assert!(got.join().unwrap() == late);
    }
}

#[test]
fn a_device_that_never_comes_ends_the_wait_for_it_by_name() {
    for joins in [true, false] {
        let _watchdog = Watchdog::new();
        let load = builder(Backend::Auto).start().unwrap();
        let error = if joins {
            load.join().result.unwrap_err()
        } else {
            assert!(load.wait_devices().is_empty());
            load.failure().unwrap()
        };
        assert!(matches!(error.kind(), ErrorKind::Misuse(_)), "{error}");
        assert_eq!(error.device(), Some(&id(LATE)));
    }
    let load = builder(Backend::Auto).start().unwrap();
    load.cancel();
    assert!(load.is_finished());
    assert!(load.cleanup().result.unwrap_err().is_cancelled());
}

#[test]
fn what_does_not_fit_what_was_expected_is_refused() {
    let _watchdog = Watchdog::new();
    let load = builder(Backend::Auto).start().unwrap();
    let refused = |result: vfio_migration::Result<()>| {
        let error = result.unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Misuse(_)), "{error}");
        assert_eq!(error.device(), Some(&id(LATE)));
    };
    refused(load.expect(id(LATE)));
    refused(load.remove_device(&id(LATE)).map(drop));
    // There is one place, and that is taken.
    assert!(load.expect(id(HERE)).is_err());
    let (_reader, writer) = io::pipe().unwrap();
    let other = DeviceSpec::new(Mock::new(writer).device(LATE)).config_gate(ConfigGate::OnNotice);
    assert!(load.add_device(other).is_err());
    assert!(load.failure().is_none());
    let error = load.join().result.unwrap_err();
    assert_eq!(error.device(), Some(&id(LATE)));
}
