//! The k-th operation of the simulated rings.

use std::time::Duration;

use vfio_migration_uring::sim::{Fault, FaultPlan, SimConfig as RingConfig};

use crate::{
    run::{ERRNOS, Expect, SMALL, Scene, judged, name},
    tally::{Sweep, numbers, seed},
};

fn scene(plan: &FaultPlan) -> Scene {
    Scene {
        ring: Some(RingConfig {
            seed: seed(),
            reorder: true,
            plan: plan.clone(),
            ..RingConfig::default()
        }),
        ..Scene::new()
    }
}

/// Runs once without a fault. Both rings count together.
fn count(sweep: &mut Sweep) -> u64 {
    let plan = FaultPlan::new();
    judged(
        sweep,
        &"ring: no fault",
        &scene(&plan),
        Expect::Success,
        || false,
    );
    sweep.counted(plan.executed());
    plan.executed()
}

#[test]
fn every_ring_operation_fails_with_every_errno() {
    let mut sweep = Sweep::new("ring operations × errnos");
    let count = count(&mut sweep);
    for errno in ERRNOS {
        let again = matches!(errno, libc::EINTR | libc::EAGAIN);
        for k in numbers(count, 1, 0) {
            let plan = FaultPlan::new().with(k, Fault::Errno(errno));
            // An interrupted transfer has moved nothing and is tried again.
            let expect = if again {
                Expect::Success
            } else {
                Expect::Cause(errno)
            };
            let case = format!("ring: {} in operation {k}", name(errno));
            let met = || plan.executed() > k;
            let mut scene = scene(&plan);
            if again {
                scene.budget = SMALL;
            }
            judged(&mut sweep, &case, &scene, expect, met);
        }
    }
}

#[test]
fn every_ring_operation_is_short() {
    let mut sweep = Sweep::new("ring operations × short");
    let count = count(&mut sweep);
    for bytes in [1, 4096, 0] {
        for k in numbers(count, 1, 0) {
            let plan = FaultPlan::new().with(k, Fault::Short(bytes));
            // A read of nothing is the end of the state: the destination's device notices.
            let expect = if bytes == 0 {
                Expect::Any
            } else {
                Expect::Success
            };
            let case = format!("ring: {bytes} bytes moved by operation {k}");
            let mut scene = scene(&plan);
            if bytes > 0 {
                scene.budget = SMALL;
            }
            judged(&mut sweep, &case, &scene, expect, || plan.executed() > k);
        }
    }
}

/// One that never ends, and gives in to a cancellation once nothing has moved for too long.
#[test]
fn a_ring_operation_hangs() {
    let mut sweep = Sweep::new("ring operations × hang");
    let count = count(&mut sweep);
    for k in numbers(count, 6, 1) {
        let plan = FaultPlan::new().with(k, Fault::Hang);
        let scene = Scene {
            no_progress: Duration::from_millis(300),
            ..scene(&plan)
        };
        let case = format!("ring: operation {k} hangs");
        judged(&mut sweep, &case, &scene, Expect::Any, || {
            plan.executed() > k
        });
    }
    assert!(sweep.errors > 0, "an operation that never ends is noticed");
}
