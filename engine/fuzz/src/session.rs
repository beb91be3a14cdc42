//! A load, driven by an input: what is sent, cut, sent twice or wrong, in which order everybody gets
//! a turn, what is drained, told and cancelled; and what must hold all the while.
//!
//! * What reaches a device is a prefix of its packets' data in the order of their idx, and a config
//!   reaches it only behind all data below its idx.
//! * Where nothing has failed, what has been accepted without a gap has reached the device once
//!   everybody has had a turn.
//! * Nobody waits who could go on: not the channel that has the packet which a device needs next,
//!   and no sleep whose bound finds what no notice had announced.
//! * The pool stays within the budget.
//! * A load in which nothing was wrong succeeds; every load ends; its devices are in the states that
//!   its report says.
//! * Nobody else hears of a device that is unplugged: not of what it missed, nor of what still comes
//!   for it, in whatever order.
//!
//! `model.rs` has the load, `actions.rs` what an input does, `oracle.rs` what must hold.

mod actions;
mod model;
mod oracle;

use self::model::Run;
use crate::{input::Input, steps};

/// One input's run.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    steps::begin();
    let mut run = Run::start(&mut input);
    while !input.is_empty() {
        run.step(&mut input);
    }
    run.end(&mut input);
    steps::end();
}
