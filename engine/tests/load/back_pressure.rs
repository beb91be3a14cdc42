//! Back-pressure that cannot deadlock: all orders, channels and schedules of small cases.
//!
//! What is shown, for every case in the lists below:
//!
//! | channels | spilling | deadlock |
//! |---|---|---|
//! | device state alone | off | none |
//! | shared with barriers | on, with room for all | none |
//! | shared with barriers | off, or its file is full | found: it is why spilling is there |
//! | device state alone, but no reserve for the next packet | off | found: it is why that is there |
//!
//! The last two show that the search would find what the first two say is not there.

mod model;

use std::io::{self, Write};

use model::{Case, Found, PACKETS, QUEUE, Start};

const ALONE: Case = Case {
    packets: [0; 3],
    channels: 2,
    buffers: 1,
    pieces: 1,
    link: 1,
    barriers: 0,
    start: Start::AnyTime,
    spill: None,
    reserve: true,
};

const SHARED: Case = Case {
    barriers: 1,
    spill: Some(PACKETS),
    ..ALONE
};

/// All ways to give up to `most` packets to one, two or three devices. Devices are alike, so the
/// first has the most.
fn packets(most: u8) -> Vec<[u8; 3]> {
    let mut all = Vec::new();
    for first in 1..=most {
        for second in 0..=first {
            for third in 0..=second {
                if first + second + third <= most {
                    all.push([first, second, third]);
                }
            }
        }
    }
    all
}

/// Every combination of packets, channels, budgets, pieces and links, in `base`.
fn cases(base: Case, most: impl Fn(usize, u8, usize) -> u8) -> Vec<Case> {
    let mut all = Vec::new();
    for channels in [2, 3] {
        for pieces in [1, 2] {
            for link in [1, 2, QUEUE] {
                for packets in packets(most(channels, pieces, link)) {
                    // Of reserves alone, and of one packet up to all but one.
                    for buffers in 0..u32::from(packets.iter().sum::<u8>()).max(2) {
                        all.push(Case {
                            packets,
                            channels,
                            buffers,
                            pieces,
                            link,
                            ..base
                        });
                    }
                }
            }
        }
    }
    all
}

/// Searches through every case, and prints the counts. Returns the deadlocks, one for each case.
fn search(name: &str, cases: &[Case]) -> Vec<String> {
    let mut deadlocks = Vec::new();
    let (mut states, mut ends) = (0, 0);
    for case in cases {
        let Found {
            states: more,
            ends: ended,
            deadlock,
        } = case.search();
        states += more;
        ends += ended;
        assert!(ended > 0 || deadlock.is_some(), "{case:?} has no end");
        deadlocks.extend(deadlock);
    }
    // Not by a macro, whose words are kept back where a test passes.
    let counts = format!(
        "{name}: {} cases, {states} states, {ends} ends, {} cases with a deadlock\n",
        cases.len(),
        deadlocks.len()
    );
    let _unheard = io::stderr().write_all(counts.as_bytes());
    deadlocks
}

#[test]
fn device_state_alone_never_deadlocks() {
    let most = |channels, pieces, link| match (channels, pieces, link) {
        (_, 1, 1) | (2, 1, 2) => 5,
        (2, _, _) | (3, 1, _) | (3, _, 1) => 4,
        _ => 3,
    };
    let deadlocks = search("device state alone", &cases(ALONE, most));
    assert!(deadlocks.is_empty(), "{}", deadlocks[0]);
}

#[test]
fn channels_shared_with_barriers_never_deadlock_with_spilling() {
    let most = |channels, pieces, link| match (channels, pieces, link) {
        (2, 1, 1) => 5,
        (2, _, 1) | (2, 1, _) => 4,
        (2, _, _) | (3, _, 1) => 3,
        _ => 2,
    };
    for start in [Start::AnyTime, Start::AfterBarriers] {
        let base = Case { start, ..SHARED };
        let deadlocks = search(&format!("shared, {start:?}"), &cases(base, most));
        assert!(deadlocks.is_empty(), "{}", deadlocks[0]);
    }
}

/// As the two above, and more of it: for a release build.
#[test]
#[ignore = "takes minutes, and gigabytes"]
fn larger_cases_do_not_deadlock_either() {
    for base in [ALONE, SHARED] {
        let deadlocks = search("larger", &cases(base, |_, _, link| 5 - u8::from(link > 1)));
        assert!(deadlocks.is_empty(), "{}", deadlocks[0]);
    }
}

#[test]
fn without_spilling_the_barriers_deadlock() {
    // Packets 1 and 2 come before one channel's SYNC, and 0 behind the other's.
    let case = Case {
        packets: [3, 0, 0],
        spill: None,
        ..SHARED
    };
    let deadlock = case.search().deadlock.expect("a deadlock is found");
    println!("{deadlock}");
    assert!(deadlock.contains("AtBarrier") && deadlock.contains("needs 0"));
    // The same with a spill file that is full; with room for one more packet it is gone.
    let full = Case {
        spill: Some(0),
        ..case
    };
    assert!(full.search().deadlock.is_some());
    let room = Case {
        spill: Some(1),
        ..case
    };
    assert!(room.search().deadlock.is_none());
}

#[test]
fn without_the_reserve_for_the_next_packet_device_state_alone_deadlocks() {
    let case = Case {
        packets: [2, 0, 0],
        reserve: false,
        ..ALONE
    };
    let deadlock = case.search().deadlock.expect("a deadlock is found");
    println!("{deadlock}");
    assert!(deadlock.contains("needs 0"));
    let reserve = Case {
        reserve: true,
        ..case
    };
    assert!(reserve.search().deadlock.is_none());
}
