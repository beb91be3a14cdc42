//! Every change of state that the kernel knows, and every one that it refuses.

use std::{
    io::{Read, Write},
    os::fd::OwnedFd,
};

use nix::errno::Errno;
use vfio_migration::{Backend, DeviceState, ErrorKind, Recover};

use crate::{
    Test,
    device::{Subject, file},
    kernel::Kernel,
};

pub const TESTS: &[Test] = &[
    ("every pair of states, by the kernel", kernels_table),
    ("every pair of states, by the engine", engines_view),
    ("numbers that are no state", unknown_states),
];

/// The states that can be asked for.
const STATES: [DeviceState; 7] = [
    DeviceState::Stop,
    DeviceState::Running,
    DeviceState::StopCopy,
    DeviceState::Resuming,
    DeviceState::RunningP2p,
    DeviceState::PreCopy,
    DeviceState::PreCopyP2p,
];

/// Whether `linux/vfio.h` has a way from one state to the other, for a device with all of them.
fn allowed(from: DeviceState, to: DeviceState) -> bool {
    // What has stopped for good cannot be saved as running again; and nobody can ask for ERROR.
    to != DeviceState::Error && !(from == DeviceState::StopCopy && to.is_precopy())
}

/// Whether the change begins a session, and so brings a data fd.
fn brings_fd(from: DeviceState, to: DeviceState) -> bool {
    from != to && ((to.is_saving() && !from.is_saving()) || to == DeviceState::Resuming)
}

/// How the device got to where it is.
struct At {
    fd: Option<OwnedFd>,
}

/// Takes a device to `state`, from wherever it is. In RESUMING it has got `image`.
fn go(kernel: &Kernel, state: DeviceState, image: &[u8]) -> At {
    kernel.reset().unwrap();
    let fd = kernel.set(state).unwrap();
    if state == DeviceState::Resuming {
        file(fd.as_ref().unwrap()).write_all(image).unwrap();
    }
    assert_eq!(kernel.state(), state);
    At { fd }
}

fn kernels_table(_backend: Backend) {
    let subject = Subject::open(1, 1, 9);
    let kernel = &*subject.kernel;
    let image = kernel.image();
    for from in STATES {
        for to in DeviceState::ALL {
            let at = go(kernel, from, &image);
            let answer = kernel.set(to);
            if !allowed(from, to) {
                assert_eq!(answer.unwrap_err(), Errno::EINVAL, "{from} -> {to}");
                assert_eq!(kernel.state(), from, "{from} -> {to}");
                continue;
            }
            let fd = answer.unwrap();
            assert_eq!(kernel.state(), to, "{from} -> {to}");
            assert_eq!(fd.is_some(), brings_fd(from, to), "{from} -> {to}");
            // The session before it lives on within the saving states, and is dead otherwise.
            if from.is_saving() {
                let read = file(at.fd.as_ref().unwrap()).read(&mut [0; 8]);
                let answer = read.map_err(|error| error.raw_os_error());
                let dead = Err(Some(Errno::ENODEV as i32));
                let lives = to.is_saving();
                assert_eq!(answer, if lives { Ok(8) } else { dead }, "{from} -> {to}");
            }

            // A state that is cut short keeps the device in RESUMING.
            if from == DeviceState::Resuming && to != from {
                let at = go(kernel, from, &image[..50]);
                assert_eq!(kernel.set(to).unwrap_err(), Errno::EINVAL, "{from} -> {to}");
                assert_eq!(kernel.state(), from, "{from} -> {to}");
                file(at.fd.unwrap()).write_all(&image[50..]).unwrap();
                assert!(kernel.set(to).is_ok(), "{from} -> {to}");
            }
        }
    }
}

/// The engine goes the same ways, says the same errors, and is never wrong about where it stands.
fn engines_view(_backend: Backend) {
    let subject = Subject::open(1, 1, 9);
    let image = subject.kernel.image();
    for from in STATES {
        for to in STATES {
            for complete in [true, false] {
                if !complete && from != DeviceState::Resuming {
                    continue;
                }
                for recover in [
                    Recover::State(from),
                    Recover::State(DeviceState::Stop),
                    Recover::Reset,
                ] {
                    change(&subject, from, to, recover, &image, complete);
                }
            }
        }
    }
}

fn change(
    subject: &Subject,
    from: DeviceState,
    to: DeviceState,
    recover: Recover,
    image: &[u8],
    complete: bool,
) {
    let place = format!("{from} -> {to}, {recover:?}, complete: {complete}");
    let mut device = subject.device();
    device.set_state(from, Recover::Reset).unwrap();
    if from == DeviceState::Resuming {
        let mut fd = file(&*device.lend().unwrap());
        let len = if complete { image.len() } else { 50 };
        fd.write_all(&image[..len]).unwrap();
    }
    let result = device.set_state(to, recover);
    let kernel = subject.kernel.state();
    assert_eq!(device.state(), kernel, "{place}");
    if allowed(from, to) && (complete || from == to) {
        result.unwrap_or_else(|error| panic!("{place}: {error}"));
        assert_eq!(kernel, to, "{place}");
    } else {
        let error = result.expect_err(&place);
        assert_eq!(*error.kind(), ErrorKind::State, "{place}");
        assert_eq!(error.raw_os_error(), Some(Errno::EINVAL as i32), "{place}");
        assert_eq!(error.states(), Some((from, to)), "{place}");
        let expected = match recover {
            // A state cut short: STOP is refused as well, and only a reset is left.
            Recover::State(state) if complete || state == from => state,
            _ => DeviceState::Running,
        };
        assert_eq!(kernel, expected, "{place}");
    }
    // It has the data fd where there is a session, and it is the right one.
    let lent = device.lend();
    if kernel.is_saving() || kernel == DeviceState::Resuming {
        let mut fd = file(&*lent.unwrap());
        let moved = if kernel.is_saving() {
            fd.read(&mut [0; 4])
        } else if complete && to == from {
            // All of it is in.
            fd.write(&[])
        } else if to == DeviceState::Resuming && to != from {
            fd.write(&image[..4])
        } else {
            fd.write(&image[50..54])
        };
        moved.unwrap_or_else(|error| panic!("{place}: {error}"));
    } else {
        assert!(lent.is_err(), "{place}");
    }
    device.reset().unwrap();
    subject.assert_in(&device, DeviceState::Running);
}

fn unknown_states(_backend: Backend) {
    let subject = Subject::open(1, 1, 9);
    let image = subject.kernel.image();
    for from in STATES {
        let _at = go(&subject.kernel, from, &image);
        for number in [8, 99, u32::MAX] {
            let answer = subject.kernel.set_number(number);
            assert_eq!(answer.unwrap_err(), Errno::EINVAL, "{from} -> {number}");
            assert_eq!(subject.kernel.state(), from);
        }
    }
}
