//! Every pair of states, with every combination of the optional ones, every recovery, and every way
//! in which a change and its recovery can fail: the device is always in the state that the code
//! believes it to be in.

use nix::errno::Errno;
use vfio_migration::{
    Device, DeviceId, DeviceState, ErrorKind, MigrationFlags,
    sim::{
        CallFault, Callback, Fault, Faults, Image, On, SimConfig, SimDevice, SimHandle, Stream,
        TransitionFault, Which,
    },
};

/// What goes wrong besides.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Wrong {
    Nothing,
    /// The change to the target, which leaves the device here; `None`: where it was.
    Target(Option<DeviceState>),
    /// The change to the state of recovery, and with it the target's where that is the same.
    Recovery,
    /// Both.
    Both(Option<DeviceState>),
    /// Both, and the reset.
    All(Option<DeviceState>),
    /// The target, and then the question where the device is.
    Unanswered(Option<DeviceState>),
}

impl Wrong {
    const fn target(self) -> Option<Option<DeviceState>> {
        match self {
            Self::Target(leaves)
            | Self::Both(leaves)
            | Self::All(leaves)
            | Self::Unanswered(leaves) => Some(leaves),
            Self::Nothing | Self::Recovery => None,
        }
    }

    const fn recovery(self) -> bool {
        matches!(self, Self::Recovery | Self::Both(_) | Self::All(_))
    }
}

/// The errno of a target that is told to refuse, and of everything after it.
const FIRST: Errno = Errno::EIO;
const LATER: Errno = Errno::ENXIO;

fn combinations() -> impl Iterator<Item = MigrationFlags> {
    [1, 3, 5, 7].into_iter().map(MigrationFlags::from_bits)
}

fn supported(flags: MigrationFlags) -> impl Iterator<Item = DeviceState> + Clone {
    // ERROR is where a device goes by itself.
    DeviceState::ALL
        .into_iter()
        .filter(move |state| flags.supports(*state))
}

/// Whether a data fd belongs to the state.
fn has_session(state: DeviceState) -> bool {
    state.is_saving() || state == DeviceState::Resuming
}

fn faults(from: DeviceState, to: DeviceState, recover: DeviceState, wrong: Wrong) -> Faults {
    let mut faults = Faults::default();
    if let Some(leaves) = wrong.target() {
        faults.transitions.push(TransitionFault {
            on: On::Request { from, to },
            which: Which::Nth(0),
            errno: FIRST as i32,
            leaves,
        });
    }
    if wrong.recovery() {
        // Not on the way to `from`, which is walked before.
        faults
            .transitions
            .extend(DeviceState::ALL.map(|before| TransitionFault {
                on: On::Request {
                    from: before,
                    to: recover,
                },
                which: Which::From(u64::from(
                    before == DeviceState::Running && recover == from && from != before,
                )),
                errno: LATER as i32,
                leaves: None,
            }));
    }
    if matches!(wrong, Wrong::All(_)) {
        faults.calls.push(CallFault {
            callback: Callback::Reset,
            which: Which::Every,
            fault: Fault::Errno(LATER as i32),
        });
    }
    if matches!(wrong, Wrong::Unanswered(_)) {
        faults.calls.push(CallFault {
            callback: Callback::State,
            which: Which::From(1), // the first is asked when the device is taken over
            fault: Fault::Errno(LATER as i32),
        });
    }
    faults
}

/// A device in `from`, with nothing gone wrong yet.
fn device_in(from: DeviceState, flags: MigrationFlags, faults: Faults) -> (Device, SimHandle) {
    let device = SimDevice::new(SimConfig {
        flags,
        faults,
        stream: Stream::Memfd,
        len: Image::HEADER_LEN,
        config_len: 0,
        ..SimConfig::default()
    })
    .unwrap();
    let handle = device.handle();
    let id = DeviceId::new("device", 0).unwrap();
    let mut device = Device::new(id, Box::new(device)).unwrap();
    device.set_state(from, DeviceState::Error).unwrap();
    assert_eq!(handle.state(), from);
    (device, handle)
}

/// The one truth that everything here is about.
fn check(device: &Device, handle: &SimHandle, case: &dyn std::fmt::Debug) {
    if !device.is_lost() {
        assert_eq!(device.state(), handle.state(), "{case:?}");
        if !has_session(handle.state()) {
            assert!(device.lend().is_err(), "a dead fd is held: {case:?}");
        }
    }
}

fn try_change(
    flags: MigrationFlags,
    from: DeviceState,
    to: DeviceState,
    recover: DeviceState,
    wrong: Wrong,
) -> Option<ErrorKind> {
    let case = (flags, from, to, recover, wrong);
    let (mut device, handle) = device_in(from, flags, faults(from, to, recover, wrong));
    let asked = handle.changes().len();
    let result = device.set_state(to, recover);
    check(&device, &handle, &case);
    match &result {
        Ok(()) => {
            assert_eq!(handle.state(), to, "{case:?}");
            assert_eq!(device.lend().is_ok(), has_session(to), "{case:?}");
        }
        Err(error) => {
            assert_eq!(error.states(), Some((from, to)), "{case:?}");
            assert!(error.device().is_some());
            if *error.kind() != ErrorKind::Lost && to != DeviceState::Error {
                // The first errno, whatever came after it.
                let refusal = handle.changes()[asked].errno;
                assert_eq!(error.raw_os_error(), refusal, "{case:?}");
                let recovered = handle.state() == recover || handle.state() == DeviceState::Running;
                assert!(recovered, "{case:?}: in {}", handle.state());
            }
        }
    }
    if let (Some(Some(leaves)), Err(_)) = (wrong.target(), &result)
        && to != DeviceState::Error
        && from != to
        && !(from.is_saving() && leaves.is_saving() || from == leaves)
    {
        // The session has ended on the way, and its data fd is dead, wherever the device is now.
        assert!(device.lend().is_err(), "a dead fd is held: {case:?}");
    }
    if device.is_lost() {
        assert!(matches!(wrong, Wrong::All(_)), "{case:?}");
        let error = device.set_state(DeviceState::Running, DeviceState::Error);
        assert_eq!(*error.unwrap_err().kind(), ErrorKind::Lost, "{case:?}");
    } else {
        // It goes on from there: whatever is left to fail, belief and truth stay one.
        for next in [DeviceState::Stop, DeviceState::Running] {
            let _ = device.set_state(next, DeviceState::Error);
            check(&device, &handle, &(case, "and then", next));
        }
    }
    result.err().map(|error| error.kind().clone())
}

fn walk(wrongs: impl Fn(MigrationFlags) -> Vec<Wrong>) -> (u32, u32, u32) {
    let (mut done, mut refused, mut lost) = (0, 0, 0);
    for flags in combinations() {
        for from in supported(flags).filter(|from| *from != DeviceState::Error) {
            for to in DeviceState::ALL {
                for recover in supported(flags) {
                    for wrong in wrongs(flags) {
                        match try_change(flags, from, to, recover, wrong) {
                            None => done += 1,
                            Some(ErrorKind::Lost) => lost += 1,
                            Some(_) => refused += 1,
                        }
                    }
                }
            }
        }
    }
    (done, refused, lost)
}

/// Where a refused change may leave a device.
fn places(flags: MigrationFlags) -> impl Iterator<Item = Option<DeviceState>> {
    supported(flags).map(Some).chain([None])
}

#[test]
fn every_pair_of_states() {
    let (done, refused, lost) = walk(|_| vec![Wrong::Nothing]);
    assert!(done > 0 && refused > 0, "{done} {refused}");
    assert_eq!(lost, 0);
}

#[test]
fn every_pair_of_states_where_the_target_fails() {
    let (done, refused, lost) = walk(|flags| places(flags).map(Wrong::Target).collect());
    // A state that the device is in already, or ERROR, is not asked for.
    assert!(done > 0 && refused > done, "{done} {refused}");
    assert_eq!(lost, 0);
}

#[test]
fn every_pair_of_states_where_the_recovery_fails() {
    let (_, refused, lost) = walk(|_| vec![Wrong::Recovery]);
    assert!(refused > 0);
    assert_eq!(lost, 0);
}

#[test]
fn every_pair_of_states_where_both_fail() {
    let (_, refused, lost) = walk(|flags| places(flags).map(Wrong::Both).collect());
    assert!(refused > 0);
    assert_eq!(lost, 0);
}

#[test]
fn every_pair_of_states_where_the_reset_fails_too() {
    let (_, _, lost) = walk(|flags| places(flags).map(Wrong::All).collect());
    assert!(lost > 0);
}

#[test]
fn every_pair_of_states_where_nobody_says_where_the_device_is() {
    let (_, refused, lost) = walk(|flags| places(flags).map(Wrong::Unanswered).collect());
    assert!(refused > 0);
    assert_eq!(lost, 0);
}
