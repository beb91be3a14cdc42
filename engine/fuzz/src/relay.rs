//! A relay, driven by an input: what the source sends on which channel, cut, sent twice or wrong, in
//! which order everybody gets a turn, what the destination takes, and what is told and cancelled. And
//! what must hold all the while, beside what `outgoing.rs` looks at with each packet:
//!
//! * What is not device state leaves on the channel on which it came, untouched, in its order.
//! * A device's packet leaves with the data with which it came.
//! * Where nothing has failed, what has come without a gap has left once everybody has had a turn,
//!   and nobody waits who could go on; no sleep's bound finds what no notice had announced.
//! * The pool stays within the budget, and is empty in the end.
//! * A relay through which only good packets came, whole, succeeds; every relay ends; one that
//!   succeeds has lost nothing.
//!
//! `model.rs` has the relay, `actions.rs` what an input does, `oracle.rs` what must hold.

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
