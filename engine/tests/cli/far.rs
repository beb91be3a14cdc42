//! A destination that is far away, or whose network loses what asks for a connection.
//!
//! In a network of the test's own, in which a packet takes a time, or is lost.

use std::time::Duration;

use crate::{
    command::{Directory, listen, words},
    network::{Far, HERE, THERE, in_a_network_of_its_own},
    start::run,
};

/// Passes a migration to the far host, which takes the way through a relay here where `relayed`. How many first
/// packets of connections there were, and how many of them were lost.
fn migrate(
    channels: usize,
    relayed: bool,
    way: Duration,
    is_lost: fn(usize) -> bool,
) -> Option<(usize, usize)> {
    let far = Far::new(way, is_lost)?;
    let directory = Directory::new();
    let options = format!("--json --channels {channels} --device sim:id=a");
    let (receiving, at) = listen(words(&format!(
        "receive {options} --insecure --listen {HERE}:0"
    )));
    let mut to = at.replace(HERE, THERE);
    let mut relaying = None;
    if relayed {
        let path = directory.file("relay");
        let line = format!("relay --json --listen unix:{path} --to {to}");
        let (relay, path) = listen(words(&line));
        relaying = Some(relay);
        to = path;
    }
    run(words(&format!("send {options},size=64KiB --to {to}"))).json();
    relaying.map(|relay| relay.end().json());
    receiving.end().json();
    Some(far.end())
}

#[test]
fn a_round_trip_of_a_third_of_a_second_is_waited_for() {
    for relayed in [false, true] {
        in_a_network_of_its_own(move || {
            let channels = if relayed { 4 } else { 64 };
            let way = Duration::from_millis(170);
            if let Some((begun, _)) = migrate(channels, relayed, way, |_| false) {
                // No answer was given up for another.
                assert_eq!(begun, channels + 1);
            }
        });
    }
}

#[test]
fn a_connection_whose_first_packets_are_lost_is_asked_for_again() {
    for (relayed, is_lost, lost) in [
        // The main channel's: once, so that the kernel's next does; and so often that a new attempt must.
        (false, (|at| at == 0) as fn(usize) -> bool, 1),
        (false, |at| at < 3, 3),
        (true, |at| at < 3, 3),
        // The channels'.
        (false, |at| at == 1 || at == 3, 2),
        (true, |at| at == 1 || at == 3, 2),
    ] {
        in_a_network_of_its_own(move || {
            let way = Duration::from_millis(1);
            if let Some((_, were_lost)) = migrate(4, relayed, way, is_lost) {
                assert_eq!(were_lost, lost);
            }
        });
    }
}
