//! What the engine promises of one device: every change of its state, with every failure and its recovery; and
//! that the simulated device is one.
#![allow(missing_docs, reason = "a test")]

mod set_state;
#[cfg(feature = "sim")]
mod sim;
#[cfg(feature = "sim")]
mod state_machine;
