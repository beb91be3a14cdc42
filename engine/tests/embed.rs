//! The example of a VMM's whole integration does what it says, and stays short.
#![cfg(feature = "sim")]
#![allow(missing_docs, reason = "a test")]

#[path = "../examples/embed.rs"]
mod embed;

mod common;

#[test]
fn the_example_moves_a_vm() {
    let _watchdog = common::Watchdog::new();
    embed::main().unwrap();
}
