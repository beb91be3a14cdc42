//! A migration called off at each of its steps leaves both devices as they were.

use std::os::unix::net::UnixStream;

use vfio_migration::{Backend, Device, DeviceState, LoadSession, Recover, Report, SaveSession};

use crate::{
    Test,
    device::{Small, Subject, pair, settings},
    kernel::HEADER,
    refusals::{Loading, stuck_save},
};

pub const TESTS: &[Test] = &[
    ("a load cancelled at each step", load),
    ("a save cancelled at each step", save),
];

/// How far a load gets before it is cancelled.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Step {
    Begun,
    Iterable,
    Published,
    SwitchedOver,
    Written,
    AllWritten,
}

const STEPS: [Step; 6] = [
    Step::Begun,
    Step::Iterable,
    Step::Published,
    Step::SwitchedOver,
    Step::Written,
    Step::AllWritten,
];

/// The ways to end one.
const ENDS: [fn(LoadSession) -> Option<Report>; 3] = [
    |load| {
        load.cancel();
        Some(load.join())
    },
    |load| Some(load.cleanup()),
    |load| {
        drop(load);
        None
    },
];

fn load(backend: Backend) {
    let (source, subject) = pair();
    let image = source.kernel.image();
    let before = subject.kernel.image();
    for step in STEPS {
        for end in ENDS {
            let mut loading = Loading::start(backend, Small::Chained, &subject);
            if step != Step::Begun {
                loading
                    .load
                    .write_iterable(&subject.id, &image[..HEADER])
                    .unwrap();
            }
            if step == Step::Published {
                loading.push(&subject, &image[HEADER..40]).unwrap();
            }
            if matches!(step, Step::SwitchedOver | Step::Written | Step::AllWritten) {
                loading.load.switchover_start();
            }
            if matches!(step, Step::Written | Step::AllWritten) {
                loading.write(&subject, &image[HEADER..40]);
            }
            if step == Step::AllWritten {
                loading.write(&subject, &image[40..]);
            }
            assert_eq!(subject.kernel.state(), DeviceState::Resuming);
            let Loading {
                load, publisher, ..
            } = loading;
            if let Some(report) = end(load) {
                let device = report.devices.into_iter().next().unwrap();
                let error = device.result.unwrap_err();
                assert!(error.is_cancelled(), "{step:?}: {error}");
                assert_eq!(report.abandoned_threads, 0);
                subject.assert_in(&device.device.unwrap(), DeviceState::Running);
            }
            // Until now there was an open input: without one the load would have failed of itself.
            drop(publisher);
            assert_eq!(subject.kernel.state(), DeviceState::Running, "{step:?}");
            assert_eq!(subject.kernel.image(), before, "{step:?}");
        }
    }
    whole(backend, source.device(), &subject, &image);
}

fn save(backend: Backend) {
    let (source, destination) = pair();
    let image = source.kernel.image();

    // In PRE_COPY, before there is a session.
    let mut device = source.device();
    device
        .set_state(DeviceState::PreCopy, DeviceState::Running)
        .unwrap();
    assert_eq!(device.read_precopy(&mut [0; 10]).unwrap(), 10);
    device
        .set_state(DeviceState::Running, Recover::Reset)
        .unwrap();
    source.assert_in(&device, DeviceState::Running);
    drop(device);

    // Before the hello, within it, within the first packet, after a few.
    for passes in [0, 10, 64 + 1344 + 100, 64 + 1344 + 3 * 289] {
        for end in 0..3 {
            let (save, gate, far) = stuck_save(backend, &source, passes);
            assert_eq!(source.kernel.state(), DeviceState::StopCopy);
            let report = match end {
                0 => {
                    save.cancel();
                    Some(save.join())
                }
                1 => Some(save.cleanup()),
                _ => {
                    drop(save);
                    None
                }
            };
            if let Some(report) = report {
                let device = report.devices.into_iter().next().unwrap();
                let error = device.result.unwrap_err();
                assert!(error.is_cancelled(), "{passes}: {error}");
                assert_eq!(report.abandoned_threads, 0);
                source.assert_in(&device.device.unwrap(), DeviceState::Running);
            }
            assert_eq!(source.kernel.state(), DeviceState::Running, "{passes}");
            assert_eq!(source.kernel.image(), image, "{passes}");
            drop((gate, far));
        }
    }

    // When everything has been sent, and the destination says that it does not start.
    let (near, far) = UnixStream::pair().unwrap();
    let save = SaveSession::builder()
        .settings(settings(backend, Small::Gathered, 16))
        .device(source.device())
        .channel(near)
        .start()
        .unwrap();
    let report = save.join();
    report.result.unwrap();
    let mut device = report.devices.into_iter().next().unwrap().device.unwrap();
    source.assert_in(&device, DeviceState::StopCopy);
    device
        .set_state(DeviceState::Running, Recover::Reset)
        .unwrap();
    drop(far);
    assert_eq!(source.kernel.image(), image);
    whole(backend, device, &destination, &image);
}

/// And a migration from there on is like any other.
fn whole(backend: Backend, source: Device, destination: &Subject, image: &[u8]) {
    let (near, far) = UnixStream::pair().unwrap();
    let load = LoadSession::builder()
        .settings(settings(backend, Small::Gathered, 16))
        .device(destination.device())
        .channel(far)
        .start()
        .unwrap();
    let save = SaveSession::builder()
        .settings(settings(backend, Small::Gathered, 16))
        .device(source)
        .channel(near)
        .start()
        .unwrap();
    load.switchover_start();
    save.join().result.unwrap();
    let report = load.join();
    report.result.unwrap();
    let mut device = report.devices.into_iter().next().unwrap().device.unwrap();
    device
        .set_state(DeviceState::Running, Recover::Reset)
        .unwrap();
    assert_eq!(destination.kernel.image(), image);
}
