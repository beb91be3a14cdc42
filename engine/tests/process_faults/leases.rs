//! The k-th lease of memory: refused once, as when the budget is spent just then.

pub use vfio_migration::LeasePlan as Plan;

use crate::{
    run::{Expect, SMALL, Scene, judged},
    tally::{Sweep, numbers},
};

fn scene(plan: &Plan) -> Scene {
    Scene {
        leases: Some(plan.clone()),
        budget: SMALL,
        ..Scene::new()
    }
}

#[test]
fn every_lease_is_refused_once() {
    let mut sweep = Sweep::new("leases × refused");
    let none = Plan::new();
    judged(
        &mut sweep,
        &"leases: none refused",
        &scene(&none),
        Expect::Success,
        || false,
    );
    let count = none.asked();
    sweep.counted(count);
    // One, and a run of them.
    for (salt, run) in [(0, 1), (1, 5)] {
        for k in numbers(count, 1, salt) {
            let plan = Plan::refusing(k..k + run);
            let case = format!("leases: {run} from {k} on refused");
            // Memory that comes late is back-pressure, and nothing else.
            judged(&mut sweep, &case, &scene(&plan), Expect::Success, || {
                plan.asked() > k
            });
        }
    }
}
