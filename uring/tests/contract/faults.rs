//! What only a simulation can do: to fail as it is told.

use std::{
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use vfio_migration_uring::{
    Buffer, Link, Ring, Token, Waker,
    sim::{Fault, FaultPlan, SimConfig, SimRing},
};

use crate::{
    LONG, MOMENT,
    counted::{Counted, counted_read},
    ops::{
        CANCELED, Outcome, all, assert_blocked, file, next, outcome, outcomes, pipe, push,
        push_chain, write,
    },
};

fn ring<B: Buffer>(config: SimConfig) -> SimRing<B> {
    SimRing::new(config, Waker::new().unwrap()).unwrap()
}

fn config(plan: FaultPlan) -> SimConfig {
    SimConfig {
        plan,
        ..SimConfig::default()
    }
}

/// Order, results and the plan's count of a run that depends on nothing but the seed.
fn run(seed: u64) -> (Vec<(Token, Outcome)>, u64) {
    let plan = FaultPlan::new();
    let mut ring = ring(SimConfig {
        seed,
        short: 30,
        interrupt: 10,
        again: 10,
        delay: 30,
        reorder: true,
        plan: plan.clone(),
        ..SimConfig::default()
    });
    let pipes: Vec<_> = (0..4).map(|_| pipe()).collect();
    for (first, (_, writer)) in (0..).step_by(4).zip(&pipes) {
        push_chain(&mut ring, first, [(); 4].map(|()| write(writer, &[1; 100])));
    }
    let mut order = Vec::new();
    while ring.in_flight() > 0 {
        let completion = next(&mut ring);
        order.push((completion.token, outcome(&completion)));
    }
    (order, plan.executed())
}

#[test]
fn a_seed_decides_everything() {
    for seed in 0..20 {
        assert_eq!(run(seed), run(seed));
    }
    assert!((1..20).any(|seed| run(seed) != run(0)));
}

#[test]
fn the_planned_operation_fails_and_no_other() {
    for number in 0..6 {
        let plan = FaultPlan::new().with(number, Fault::Errno(libc::EIO));
        let mut ring = ring(config(plan.clone()));
        let (_reader, writer) = pipe();
        for token in 0..6 {
            push(&mut ring, token, write(&writer, b"x"));
        }
        let mut expected = [Ok(1); 6];
        expected[usize::try_from(number).unwrap()] = Err(libc::EIO);
        assert_eq!(outcomes(&all(&mut ring)), expected);
        assert_eq!(plan.executed(), 6);
    }
}

#[test]
fn what_a_chain_cancels_has_no_number() {
    let plan = FaultPlan::new().with(1, Fault::Short(2));
    let mut ring = ring(config(plan.clone()));
    let (_reader, writer) = pipe();
    push_chain(&mut ring, 0, [(); 3].map(|()| write(&writer, b"xyz")));
    assert_eq!(outcomes(&all(&mut ring)), [Ok(3), Ok(2), CANCELED]);
    assert_eq!(plan.executed(), 2);
}

#[test]
fn what_hangs_ends_when_it_is_cancelled() {
    let plan = FaultPlan::new().with(0, Fault::Hang);
    let mut ring = ring(config(plan));
    let (_reader, writer) = pipe();
    push_chain(&mut ring, 0, [write(&writer, b"x"), write(&writer, b"y")]);
    assert_blocked(&mut ring);
    ring.cancel(Token(0));
    assert_eq!(outcomes(&all(&mut ring)), [CANCELED, CANCELED]);
}

#[test]
fn a_drain_leaks_what_never_ends() {
    let plan = FaultPlan::new().with(0, Fault::Stick).with(1, Fault::Hang);
    let mut ring: SimRing<Counted> = ring(config(plan));
    let drops = Arc::new(AtomicUsize::new(0));
    let (reader, writer) = pipe();
    file(&writer).write_all(b"x").unwrap();
    for (token, link) in (0..).zip([Link::Next, Link::End, Link::End, Link::End]) {
        ring.push(Token(token), counted_read(&reader, &drops), link)
            .unwrap();
    }
    ring.wait(Some(MOMENT)).unwrap();
    ring.wait(Some(MOMENT)).unwrap();
    ring.cancel(Token(0));
    let drained = ring.drain(LONG);
    assert_eq!(drained.leaked, 2);
    drop(ring);
    // The stuck one and the one behind it are never freed, nor is their file closed.
    assert_eq!(drops.load(Relaxed), 2);
    assert_eq!(Arc::strong_count(&reader), 3);
}
