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

#[test]
fn the_guide_shows_what_the_examples_run() {
    let guide = include_str!("../guide.md");
    for (name, code) in [
        ("source", include_str!("../examples/source.rs")),
        ("downtime", include_str!("../examples/downtime.rs")),
        ("destination", include_str!("../examples/destination.rs")),
    ] {
        // But for what the example says about itself.
        let (head, code) = code.split_once("\n\n").expect("a head");
        assert!(head.lines().all(|line| line.starts_with("//! ")), "{name}");
        let shown = format!("```rust\n{code}```\n");
        assert!(guide.contains(&shown), "guide.md shows another {name}.rs");
    }
}
