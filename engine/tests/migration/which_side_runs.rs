//! Which side runs: whatever step of a migration fails, one side's devices have the VM, and never both's.
//!
//! ```text
//!   which_side_runs.rs  what goes wrong: each call of each device, in each way; what is between the sides
//!   case.rs    one of those
//!   walk.rs    a VMM's walk through a migration, and what it does where a step fails
//!   side.rs    its devices, that remember what is really in them
//!   judge.rs   docs/design.md's table, and what each device must then be
//! ```

mod case;
mod judge;
mod side;
mod walk;

use std::io;

use case::{At, Case, Leave, Link, Side, Vm, Ways};
use judge::{Tally, goes_on, judge};
use side::{Holds, LEN, Wrong};
use vfio_migration::{
    DeviceState, SaveSession,
    migration::{
        Capabilities, OnOffAuto, Outgoing, OutgoingDevice, SwitchoverAck, SwitchoverAcks,
        vm as state,
    },
    sim::Callback,
};

use crate::watchdog::Watchdog;

/// All kinds of VM.
fn kinds() -> Vec<Case> {
    let mut kinds = Vec::new();
    for vm in [Vm::Runs, Vm::Stands, Vm::Paused] {
        for (ways, alone) in [
            (Ways::Channels, false),
            (Ways::Main, false),
            (Ways::Mixed, false),
            (Ways::Channels, true),
            (Ways::Main, true),
        ] {
            // A device without a VM runs, and one that waits for a VM that stands may stand.
            let far_home = match vm {
                Vm::Stands => DeviceState::Stop,
                _ => DeviceState::Running,
            };
            kinds.push(Case {
                alone,
                vm,
                ways,
                leave: Leave::Called,
                far_home,
                wrong: None,
                link: Link::Whole,
            });
        }
    }
    kinds
}

const LEAVES: [Leave; 3] = [Leave::Called, Leave::Cancelled, Leave::Dropped];

/// How often each of a device's callbacks is called.
type Calls = Vec<(Callback, u64)>;

/// Each device, and how often it is called in a walk in which nothing fails.
fn devices(kind: &Case) -> Vec<(Side, usize, Calls)> {
    let (at, ended) = judge(kind);
    assert_eq!(at, None);
    let mut all = Vec::new();
    for (side, (_, truth)) in [
        (Side::OutgoingDevice, &ended.sources),
        (Side::IncomingDevice, &ended.destinations),
    ] {
        for (device, truth) in truth.iter().enumerate() {
            let calls = Callback::ALL.map(|callback| (callback, truth.handle.calls(callback)));
            all.push((side, device, calls.to_vec()));
        }
    }
    all
}

/// How many changes of state those are.
fn changes(calls: &[(Callback, u64)]) -> u64 {
    let found = calls.iter().find(|it| it.0 == Callback::SetState);
    let (_, count) = found.unwrap();
    assert!(*count > 1);
    *count
}

#[test]
fn every_change_of_state_of_every_device_is_refused() {
    let _watchdog = Watchdog::new();
    let mut tally = Tally::default();
    for kind in kinds() {
        for (side, device, calls) in devices(&kind) {
            for k in 0..changes(&calls) {
                for (wrong, leave) in [
                    (Wrong::Refuses(k), Leave::Called),
                    (Wrong::Refuses(k), Leave::Dropped),
                    (Wrong::Breaks(k), Leave::Cancelled),
                    (Wrong::Stubborn(k), Leave::Called),
                    (Wrong::Lost(k), Leave::Called),
                    (Wrong::Panics(Callback::SetState, k), Leave::Dropped),
                ] {
                    let case = Case {
                        leave,
                        wrong: Some((side, device, wrong)),
                        ..kind
                    };
                    tally.case(&case, &At::ALL);
                }
            }
        }
    }
    tally.end(
        "changes of state",
        &[
            At::SetUp,
            At::Pause,
            At::Stop,
            At::Begin,
            At::DestinationSetUp,
            At::DestinationStart,
            At::Cleanup,
        ],
    );
}

#[test]
fn every_other_call_of_every_device_fails() {
    let _watchdog = Watchdog::new();
    let mut tally = Tally::default();
    for kind in kinds() {
        for (side, device, calls) in devices(&kind) {
            for (callback, count) in calls {
                // Those of a device that is made, the changes, and those of one that has failed.
                if matches!(
                    callback,
                    Callback::Flags | Callback::State | Callback::SetState | Callback::Reset
                ) {
                    continue;
                }
                for k in 0..count {
                    // What cannot be said, or was not heard, is no failure of a migration.
                    let ends = matches!(
                        callback,
                        Callback::ReadPrecopy | Callback::SaveConfig | Callback::LoadConfig
                    );
                    for (wrong, leave) in [
                        (Wrong::Fails(callback, k), Leave::Called),
                        (Wrong::Fails(callback, k), Leave::Dropped),
                        (Wrong::Panics(callback, k), Leave::Cancelled),
                    ] {
                        let case = Case {
                            leave,
                            wrong: Some((side, device, wrong)),
                            ..kind
                        };
                        let expected = if ends { &At::ALL[..] } else { &[] };
                        tally.case(&case, expected);
                    }
                }
            }
        }
    }
    tally.end(
        "other calls",
        &[At::Iteration, At::Sections, At::Finish, At::DestinationLoad],
    );
}

#[test]
fn every_data_fd_fails() {
    let _watchdog = Watchdog::new();
    let mut tally = Tally::default();
    // The last bytes may be in the I/O thread's hands before it refuses them: its check does then.
    let before_the_verdict = [
        At::Iteration,
        At::Begin,
        At::Sections,
        At::Finish,
        At::DestinationLoad,
        At::DestinationFinish,
        At::DestinationStart,
    ];
    for kind in kinds() {
        for (side, device, _) in devices(&kind) {
            for at in [0, LEN / 8, LEN / 2, LEN - 1] {
                for leave in LEAVES {
                    let wrong = Some((side, device, Wrong::Data(at)));
                    let case = Case {
                        leave,
                        wrong,
                        ..kind
                    };
                    tally.case(&case, &before_the_verdict);
                }
            }
            if side == Side::OutgoingDevice {
                // The source takes that for all there is, and the destination's I/O thread does not.
                let wrong = Some((side, device, Wrong::Short(LEN / 2)));
                let case = Case { wrong, ..kind };
                let checks = match kind.vm {
                    Vm::Runs => At::DestinationStart,
                    Vm::Stands | Vm::Paused => At::DestinationFinish,
                };
                tally.case(&case, &[checks, At::DestinationLoad, At::Finish]);
            }
        }
    }
    tally.end(
        "data fds",
        &[
            At::Iteration,
            At::Sections,
            At::DestinationLoad,
            At::DestinationStart,
        ],
    );
}

#[test]
fn whatever_is_between_the_sides_is_lost() {
    let _watchdog = Watchdog::new();
    let mut tally = Tally::default();
    for kind in kinds() {
        for leave in LEAVES {
            let mut lose = |link, at: &[At]| {
                let case = Case {
                    leave,
                    link,
                    ..kind
                };
                tally.case(&case, at);
            };
            for at in [At::SetUp, At::Iteration, At::Sections] {
                for device in 0..kind.devices() {
                    lose(Link::Body(at, device), &[at]);
                }
            }
            let loading = [At::DestinationLoad, At::Finish, At::DestinationFinish];
            lose(Link::Garbage, &loading);
            for at in [At::End, At::DestinationLoaded, At::Verdict] {
                lose(Link::Lost(at), &[at]);
            }
            if leave != Leave::Dropped {
                // Dropped behind the start they are the VM's.
                lose(
                    Link::Lost(At::DestinationStarted),
                    &[At::DestinationStarted],
                );
            }
            if kind.ways != Ways::Main {
                lose(
                    Link::Channel(At::DestinationLoad),
                    &[
                        At::Sections,
                        At::DestinationLoad,
                        At::Finish,
                        At::DestinationFinish,
                        At::Join,
                    ],
                );
                lose(Link::Channel(At::Join), &[At::Join]);
            }
        }
    }
    let steps = [
        At::SetUp,
        At::Iteration,
        At::Sections,
        At::DestinationLoad,
        At::DestinationLoaded,
        At::DestinationStarted,
        At::End,
        At::Verdict,
        At::Join,
    ];
    tally.end("links", &steps);
}

/// Two things fail: the end or the verdict is lost, and a device refuses.
#[test]
fn a_device_refuses_where_nobody_knows() {
    let _watchdog = Watchdog::new();
    let mut tally = Tally::default();
    for kind in kinds() {
        for (side, device, calls) in devices(&kind) {
            // The last that a source's device is asked for is to stand; those of a destination's
            // behind the first are the start's.
            let last = changes(&calls);
            let (asked, lost) = match (side, kind.vm) {
                (Side::OutgoingDevice, _) => (last - 1..last, vec![At::End, At::Verdict]),
                (Side::IncomingDevice, Vm::Runs) => (1..last, vec![At::VerdictOfFailure]),
                (Side::IncomingDevice, _) => continue,
            };
            for k in asked {
                for wrong in [
                    Wrong::Refuses(k),
                    Wrong::Breaks(k),
                    Wrong::Stubborn(k),
                    Wrong::Lost(k),
                ] {
                    for &at in &lost {
                        for leave in [Leave::Called, Leave::Dropped] {
                            let case = Case {
                                leave,
                                wrong: Some((side, device, wrong)),
                                link: Link::Lost(at),
                                ..kind
                            };
                            tally.case(&case, &[at]);
                        }
                    }
                }
            }
        }
    }
    // Then the VM goes on at the source, and a device refuses that: the first after all the others.
    for kind in kinds() {
        for (side, device, calls) in devices(&kind) {
            let asked = changes(&calls);
            for k in asked..asked + if kind.alone { 1 } else { 2 } {
                for wrong in [Wrong::Refuses(k), Wrong::Breaks(k)] {
                    if side == Side::OutgoingDevice {
                        let wrong = Some((side, device, wrong));
                        let link = Link::Lost(At::End);
                        let case = Case {
                            wrong,
                            link,
                            ..kind
                        };
                        tally.case(&case, &[At::End]);
                    }
                }
            }
        }
    }
    tally.end("doubts", &[At::End, At::Verdict, At::VerdictOfFailure]);
}

/// A VM that stands has moved, and its source has let it go. Its state is here alone, in devices that no VM has
/// started with: where one refuses the start, the others keep it.
#[test]
fn a_vm_that_was_moved_standing_starts_or_stands() {
    let _watchdog = Watchdog::new();
    let mut refused = 0;
    for kind in kinds().into_iter().filter(|kind| kind.vm != Vm::Runs) {
        for (side, device, calls) in devices(&kind) {
            if side == Side::OutgoingDevice {
                continue;
            }
            let asked = changes(&calls);
            for k in asked..asked + if kind.alone { 1 } else { 2 } {
                for wrong in [Wrong::Refuses(k), Wrong::Breaks(k)] {
                    let wrong = Some((side, device, wrong));
                    let case = Case { wrong, ..kind };
                    println!("{case:?}");
                    let (at, mut ended) = judge(&case);
                    assert_eq!(at, None);
                    goes_on(&case, side, &mut ended.destinations);
                    assert_eq!(ended.destinations.1[device].holds(), Holds::Nothing);
                    refused += 1;
                }
            }
        }
    }
    assert!(refused > 50, "{refused}");
}

/// It moves on from there before it has started: nothing is reset that nobody has asked to be.
#[test]
fn a_vm_that_was_moved_standing_moves_on() {
    let _watchdog = Watchdog::new();
    for kind in kinds().into_iter().filter(|kind| kind.vm != Vm::Runs) {
        println!("{kind:?}");
        let (at, ended) = judge(&kind);
        assert_eq!(at, None);
        let (back, truth) = ended.destinations;
        let acks = SwitchoverAcks::new(SwitchoverAck::Off);
        let sources = back.into_iter().map(|mut migratable| {
            migratable.settings_mut().transfer = OnOffAuto::Off;
            OutgoingDevice::setup(migratable, &Capabilities::default(), &acks, io::sink()).unwrap()
        });
        let mut sources: Vec<_> = sources.collect();
        state::stop(&mut sources, state::Reason::FinishMigration).unwrap();
        let mut outgoing = Outgoing::begin(sources, SaveSession::builder()).unwrap();
        for number in 1..=u32::try_from(kind.devices()).unwrap() {
            outgoing
                .write_state(&crate::vm::id(number), io::sink())
                .unwrap();
            outgoing
                .write_config(&crate::vm::id(number), io::sink())
                .unwrap();
        }
        for migratable in outgoing.finish().unwrap().cleanup().unwrap() {
            assert_eq!(migratable.state(), DeviceState::Stop);
            assert!(!migratable.was_reset());
        }
        for truth in truth {
            assert_eq!(
                (truth.state(), truth.holds()),
                (DeviceState::Stop, Holds::Arrived)
            );
        }
    }
}
