//! The k-th callback of the devices: those that change states, and the others.

use std::{io, panic::resume_unwind};

use vfio_migration::{
    DeviceState,
    sim::{
        CallFault as SimFault, Callback, Fault, On, SimConfig, SimDevice, TransitionFault, Which,
    },
};

use crate::{
    around::Around,
    kth::Kth,
    run::{ERRNOS, Expect, Scene, judged, name},
    tally::{Sweep, numbers},
};

/// How a callback goes wrong.
#[derive(Clone, Copy, Debug)]
pub enum CallFault {
    /// Before it has done anything.
    Before(i32),
    /// It has been done, and says that it was not.
    After(i32),
    /// Before it has done anything.
    Panic,
}

/// A simulated device whose callbacks are counted, with all other devices' of the run.
pub fn called(device: SimDevice, kth: Kth<CallFault>) -> Around {
    Around::new(device, move |_callback, call| match kth.next() {
        None => call(),
        Some(CallFault::Before(errno)) => Err(io::Error::from_raw_os_error(errno)),
        Some(CallFault::After(errno)) => {
            drop(call());
            Err(io::Error::from_raw_os_error(errno))
        }
        // Without the hook's message: it is no mistake.
        Some(CallFault::Panic) => resume_unwind(Box::new("as told")),
    })
}

/// A destination device that refuses its config: so that the run has the calls of a failure, too.
fn refused_config(_: &mut SimConfig, to: &mut SimConfig) {
    to.faults.calls.push(SimFault {
        callback: Callback::LoadConfig,
        which: Which::Every,
        fault: Fault::Errno(libc::EBADMSG),
    });
}

fn scene(kth: &Kth<CallFault>, adjust: fn(&mut SimConfig, &mut SimConfig)) -> Scene {
    Scene {
        calls: kth.clone(),
        adjust,
        ..Scene::new()
    }
}

fn sweep_calls(name_of: &'static str, adjust: fn(&mut SimConfig, &mut SimConfig), fails: bool) {
    let mut sweep = Sweep::new(name_of);
    let none = Kth::none();
    let expect = if fails {
        Expect::Cause(libc::EBADMSG)
    } else {
        Expect::Success
    };
    judged(
        &mut sweep,
        &"calls: no fault",
        &scene(&none, adjust),
        expect,
        || false,
    );
    let count = none.count();
    sweep.counted(count);
    let before = ERRNOS.map(CallFault::Before).into_iter();
    let after = ERRNOS.map(CallFault::After).into_iter();
    for (salt, fault) in (0..).zip(before.chain(after).chain([CallFault::Panic])) {
        let (expect, what) = match fault {
            CallFault::Panic => (Expect::Any, "panic".into()),
            // Where the run fails anyhow either is the first.
            CallFault::Before(errno) | CallFault::After(errno) if fails => {
                (Expect::Any, name(errno))
            }
            CallFault::Before(errno) => (Expect::Cause(errno), name(errno)),
            CallFault::After(errno) => (Expect::Cause(errno), format!("{}, done", name(errno))),
        };
        for k in numbers(count, 2, salt) {
            let kth = Kth::new(k, fault);
            let case = format!("{name_of}: {what} in call {k}");
            judged(&mut sweep, &case, &scene(&kth, adjust), expect, || {
                kth.met()
            });
        }
    }
}

#[test]
fn every_callback_fails() {
    sweep_calls(
        "callbacks × errnos before and after, panic",
        |_, _| {},
        false,
    );
}

#[test]
fn every_callback_of_a_failing_run_fails() {
    sweep_calls("callbacks of a failing run", refused_config, true);
}

/// Every change of state of one source and one destination device fails and leaves the device
/// somewhere else, and every one after it fails as well or works.
#[test]
fn every_change_of_state_fails_and_leaves_the_device_elsewhere() {
    let mut sweep = Sweep::new("changes of state × where they leave the device");
    fn fault<const K: u64, const LEAVES: usize, const ON: bool>(
        from: &mut SimConfig,
        to: &mut SimConfig,
    ) {
        let leaves = [
            None,
            Some(DeviceState::Error),
            Some(DeviceState::Stop),
            Some(DeviceState::Running),
        ][LEAVES];
        for config in [from, to] {
            config.faults.transitions.push(TransitionFault {
                on: On::Any,
                which: if ON { Which::From(K) } else { Which::Nth(K) },
                errno: libc::EIO,
                leaves,
            });
        }
    }
    sweep.counted(2);
    macro_rules! all {
        ($($k:literal)*) => { [$(
            (fault::<$k, 0, false> as fn(&mut SimConfig, &mut SimConfig), $k),
            (fault::<$k, 1, false>, $k), (fault::<$k, 2, false>, $k), (fault::<$k, 3, false>, $k),
            (fault::<$k, 0, true>, $k), (fault::<$k, 1, true>, $k), (fault::<$k, 2, true>, $k),
            (fault::<$k, 3, true>, $k),
        )*] };
    }
    for (adjust, k) in all!(0 1) {
        let case = format!("changes of state: the {k}th");
        let scene = scene(&Kth::none(), adjust);
        judged(&mut sweep, &case, &scene, Expect::Cause(libc::EIO), || true);
    }
}
