//! What must hold at the end of a walk, whatever has failed: `docs/design.md`, "Which side runs".

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
};

use vfio_migration::{
    DeviceState, Duty,
    migration::{MigratableDevice, vm as state},
};

use super::{
    case::{At, Case, Leave, Side, Vm},
    side::{Holds, Truth, Wrong},
    walk::{Ended, walk},
};

/// What a source's devices are in the end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Near {
    /// As at set-up, or as the VM is since: the VM is here.
    Home,
    /// STOP, with what they hold: nobody knows.
    Held,
    /// STOP: the VM is there.
    Retired,
}

/// What a destination's are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Far {
    /// As at set-up, and nothing of what came is in them.
    Home,
    /// STOP, and nothing is in them.
    Emptied,
    /// The VM is here: RUNNING, or STOP where it stands.
    Runs,
}

/// The table.
pub const fn comes_to(at: Option<At>) -> (Near, Far) {
    match at {
        Some(
            At::SetUp
            | At::Iteration
            | At::Pause
            | At::Stop
            | At::Begin
            | At::Sections
            | At::Finish
            | At::DestinationSetUp
            | At::DestinationLoad
            | At::DestinationFinish,
        ) => (Near::Home, Far::Home),
        Some(At::DestinationStart | At::DestinationLoaded | At::DestinationStarted) => {
            (Near::Home, Far::Emptied)
        }
        Some(At::End) => (Near::Held, Far::Home),
        Some(At::Verdict) => (Near::Held, Far::Runs),
        Some(At::VerdictOfFailure) => (Near::Held, Far::Emptied),
        None | Some(At::Cleanup | At::Join) => (Near::Retired, Far::Runs),
    }
}

/// One device in the end.
struct One<'a> {
    /// `None`: it was dropped.
    back: Option<&'a MigratableDevice>,
    truth: &'a Truth,
    wrong: Option<Wrong>,
    /// The state in which the VM is when it is here.
    home: DeviceState,
}

impl One<'_> {
    /// It must be closed, which only a device can come to that refuses to stand, or its reset.
    fn is_to_be_closed(&self) -> bool {
        let severe = self.wrong.is_some_and(Wrong::is_severe);
        match self.back {
            Some(back) => {
                let close = back.duty() == Duty::Close;
                assert!(severe || !close, "a good device is to be closed");
                close
            }
            // It was closed.
            None => severe,
        }
    }

    fn check(&self, state: DeviceState, holds: Holds, duty: Duty) {
        assert_eq!(self.truth.state(), state);
        assert_eq!(self.truth.holds(), holds);
        if let Some(back) = self.back {
            assert_eq!(back.state(), state);
            assert_eq!(back.was_reset(), holds == Holds::Nothing);
            assert_eq!(back.duty(), duty);
        }
    }

    fn near(&self, near: Near) {
        let holds = self.truth.holds();
        if self.wrong.is_none() {
            assert_eq!(holds, Holds::Own, "what it held is lost");
        }
        assert_ne!(holds, Holds::Arrived);
        if holds == Holds::Own {
            assert_eq!(self.truth.handle.digest(), self.truth.own);
        }
        let lost = if holds == Holds::Nothing {
            Duty::SetUpAnew
        } else {
            Duty::Nothing
        };
        match near {
            Near::Home => self.check(self.home, holds, lost),
            // It has refused to stop, and keeps what it holds.
            Near::Held if matches!(self.wrong, Some(Wrong::Refuses(_))) => {
                self.check(self.truth.state(), Holds::Own, Duty::Nothing);
                assert!(!self.truth.state().runs());
            }
            Near::Held => self.check(DeviceState::Stop, holds, lost),
            Near::Retired => self.check(DeviceState::Stop, holds, Duty::Nothing),
        }
    }

    fn far(&self, case: &Case, far: Far, own: u64) {
        let holds = self.truth.holds();
        match far {
            Far::Home => {
                assert_ne!(holds, Holds::Arrived, "what came is in it");
                self.check(self.home, holds, Duty::Nothing);
            }
            Far::Emptied => self.check(DeviceState::Stop, Holds::Nothing, Duty::Nothing),
            Far::Runs => {
                let state = match case.vm {
                    Vm::Runs => DeviceState::Running,
                    Vm::Stands | Vm::Paused => DeviceState::Stop,
                };
                self.check(state, Holds::Arrived, Duty::Nothing);
                assert_eq!(self.truth.handle.digest(), own);
            }
        }
    }
}

fn ones<'a>(case: &'a Case, side: Side, ended: &'a Ended) -> Vec<One<'a>> {
    let (back, truth) = match side {
        Side::OutgoingDevice => &ended.sources,
        Side::IncomingDevice => &ended.destinations,
    };
    let paused = side == Side::OutgoingDevice && ended.paused;
    let find = |at: usize| {
        let id = crate::vm::id(u32::try_from(at).unwrap() + 1);
        back.iter().find(|migratable| *migratable.id() == id)
    };
    let all = truth.iter().enumerate();
    all.map(|(at, truth)| One {
        back: find(at),
        truth,
        wrong: case.wrong_of(side, at),
        home: if paused {
            DeviceState::Stop
        } else {
            truth.home
        },
    })
    .collect()
}

/// Walks, and looks at all devices of both sides.
pub fn judge(case: &Case) -> (Option<At>, Ended) {
    let ended = walk(case);
    let at = ended.at;
    let (near, far) = comes_to(at);
    let sources = ones(case, Side::OutgoingDevice, &ended);
    let destinations = ones(case, Side::IncomingDevice, &ended);
    let whole = case.leave != Leave::Dropped;
    for (source, destination) in sources.iter().zip(&destinations) {
        assert!(!whole || source.back.is_some(), "a device is missing");
        assert!(!whole || destination.back.is_some(), "a device is missing");
        if !source.is_to_be_closed() {
            source.near(near);
        }
        if !destination.is_to_be_closed() {
            destination.far(case, far, source.truth.own);
        }
    }
    // A destination's device that runs with nothing of what came has no VM.
    let runs = |it: &One<'_>| !it.is_to_be_closed() && it.truth.state().runs();
    let here = sources.iter().any(runs);
    let arrived = |it: &&One<'_>| it.truth.holds() == Holds::Arrived;
    let there = destinations.iter().filter(arrived).any(runs);
    assert!(!(here && there), "both sides run");
    if case.vm == Vm::Runs && case.wrong.is_none() {
        assert_eq!((here, there), (near == Near::Home, far == Far::Runs));
    }
    (at, ended)
}

/// What has been seen.
#[derive(Default)]
pub struct Tally {
    cases: usize,
    at: BTreeMap<At, usize>,
    failed: Vec<String>,
}

impl Tally {
    /// One case, which must fail at one of these steps, or may not fail where there are none.
    pub fn case(&mut self, case: &Case, expected: &[At]) {
        self.cases += 1;
        let judged = catch_unwind(AssertUnwindSafe(|| {
            let (at, mut ended) = judge(case);
            if !expected.is_empty() {
                assert!(at.is_some_and(|at| expected.contains(&at)), "{at:?}");
            }
            let severe = case.wrong.is_some_and(|(_, _, wrong)| wrong.is_severe());
            let (near, far) = comes_to(at);
            let back = case.leave != Leave::Dropped;
            if near == Near::Held && far != Far::Runs && back && !severe {
                // Somebody has said that the VM does not run there: it goes on here.
                goes_on(case, Side::OutgoingDevice, &mut ended.sources);
            }
            at
        }));
        match judged {
            Ok(Some(at)) => *self.at.entry(at).or_default() += 1,
            Ok(None) => {}
            Err(_) => {
                let name = format!("{case:?}");
                eprintln!("^ {name}");
                self.failed.push(name);
            }
        }
    }

    /// All is as it should be, and each of these steps has failed.
    pub fn end(self, name: &str, steps: &[At]) {
        eprintln!("{name}: {} cases, {:?}", self.cases, self.at);
        assert_eq!(self.failed, Vec::<String>::new());
        for step in steps {
            assert!(self.at.contains_key(step), "{step:?} has not failed");
        }
    }
}

/// The VM starts on this side, which has its state. Where a device refuses, all stand, the others with what
/// they hold, and those can go on.
pub fn goes_on(case: &Case, side: Side, (back, truth): &mut (Vec<MigratableDevice>, Vec<Truth>)) {
    let held = match side {
        Side::OutgoingDevice => Holds::Own,
        Side::IncomingDevice => Holds::Arrived,
    };
    if let Err(error) = state::start(back) {
        assert!(case.wrong.is_some(), "{error}");
        for (at, (migratable, truth)) in back.iter().zip(truth.iter()).enumerate() {
            let wrong = case.wrong_of(side, at).is_some();
            let (holds, duty) = if wrong {
                (Holds::Nothing, Duty::SetUpAnew)
            } else {
                (held, Duty::Nothing)
            };
            assert_eq!((truth.state(), truth.holds()), (DeviceState::Stop, holds));
            assert_eq!(
                (migratable.state(), migratable.duty()),
                (truth.state(), duty)
            );
        }
        state::start(back).unwrap();
    }
    for (at, (migratable, truth)) in back.iter().zip(truth.iter()).enumerate() {
        assert_eq!(migratable.state(), DeviceState::Running);
        assert_eq!(truth.state(), DeviceState::Running);
        let wrong = case.wrong_of(side, at).is_some();
        assert!(wrong || truth.holds() == held);
    }
}
