//! Chains: relays between the two ends, dead and silent peers, links that are cut.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use crate::{
    command::{Ended, Running, listen, words},
    link::{Fate, Link},
    rig::{Ends, Rig, Wire, case, end, refused, until},
    tests,
};

tests! {
    any: [
        a_destination_that_is_not_there,
        a_destination_that_ends_at_once,
        whoever_is_killed_or_stopped,
        a_relay_between_with_every_default,
        relays_in_a_row,
        a_destination_that_takes_all_and_says_nothing,
        a_source_that_is_gone_before_its_channels,
        a_flood_of_channels_is_refused,
        a_relay_whose_destination_is_gone_before_it_replied_says_so,
        a_link_that_is_cut_on_either_side,
        a_relay_between_with_any_number_of_channels,
    ],
    root: [],
}

/// A relay to there.
fn relay(rig: &Rig, to: &str, wire: Wire, name: &str, rest: &str) -> (Running, String) {
    let at = match wire {
        Wire::Tcp => "127.0.0.1:0".to_owned(),
        Wire::Unix => format!("unix:{}", rig.directory.file(name)),
    };
    listen(words(&format!(
        "relay --listen {at} --to {to} --accept-timeout 20 {rest}"
    )))
}

/// A whole chain, to its ends: source, relays from the destination's on, destination.
fn chain(rig: &Rig, ends: &Ends<'_>, relays: usize, rest: &str) -> (Ended, Vec<Ended>, Ended) {
    let (receiving, mut to) = rig.receive(ends).unwrap();
    let mut running = Vec::new();
    for number in 0..relays {
        let (relay, next) = relay(rig, &to, ends.wire, &format!("r{number}"), rest);
        running.push(relay);
        to = next;
    }
    let sent = end(rig.send(&to, ends));
    let relayed = running.into_iter().map(end).collect();
    (sent, relayed, end(receiving))
}

/// All three say that it passed, and it has.
fn passed(rig: &Rig, ended: &(Ended, Vec<Ended>, Ended)) {
    let (sent, relayed, received) = ended;
    assert_eq!(sent.status, Some(0), "{ended:?}");
    assert!(relayed.iter().all(|it| it.status == Some(0)), "{ended:?}");
    rig.judge(sent, received);
}

fn a_relay_between_with_every_default() {
    for wire in [Wire::Tcp, Wire::Unix] {
        for _ in 0..5 {
            let rig = Rig::new(300_000);
            let ends = Ends {
                wire,
                both: "",
                ..Ends::default()
            };
            passed(&rig, &chain(&rig, &ends, 1, ""));
        }
    }
}

fn a_relay_between_with_any_number_of_channels() {
    for wire in [Wire::Tcp, Wire::Unix] {
        for channels in [1, 2, 8, 64, 255] {
            for told in [true, false] {
                let rig = Rig::new(300_000);
                let ends = Ends {
                    wire,
                    both: &format!("--timeout 30 --channels {channels}"),
                    ..Ends::default()
                };
                let rest = if told {
                    format!("--timeout 30 --channels {channels}")
                } else {
                    "--timeout 30".into()
                };
                passed(&rig, &chain(&rig, &ends, 1, &rest));
            }
        }
    }
}

fn relays_in_a_row() {
    for (relays, wire) in [(2, Wire::Unix), (3, Wire::Tcp)] {
        let rig = Rig::new(2_000_000);
        let ends = Ends {
            wire,
            both: "--timeout 30 --channels 4",
            ..Ends::default()
        };
        passed(&rig, &chain(&rig, &ends, relays, "--timeout 30"));
    }
}

const THROUGH: Ends<'_> = Ends {
    wire: Wire::Unix,
    both: "--timeout 3 --channels 2",
    send: "",
    receive: "",
    receive_under: "",
};

fn a_destination_that_is_not_there() {
    for wire in [Wire::Tcp, Wire::Unix] {
        let rig = Rig::new(1000);
        let to = match wire {
            // A port that was free a moment ago.
            Wire::Tcp => {
                let listener = TcpListener::bind("127.0.0.1:0").unwrap();
                listener.local_addr().unwrap().to_string()
            }
            Wire::Unix => format!("unix:{}", rig.directory.file("nobody")),
        };
        let (relay, through) = relay(&rig, &to, wire, "r", "--timeout 3 --connect-timeout 0.5");
        let sent = end(rig.send(&through, &THROUGH));
        refused(&sent, &[]);
        refused(&end(relay), &[&to]);
    }
}

fn a_destination_that_takes_all_and_says_nothing() {
    // It takes connections and reads them, or does not read; it never says a word, and never ends.
    for reads in [true, false] {
        for told in ["", "--channels 2"] {
            let rig = Rig::new(1000);
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let to = listener.local_addr().unwrap().to_string();
            let (relay, through) =
                relay(&rig, &to, Wire::Unix, "r", &format!("--timeout 2 {told}"));
            let accepting = thread::spawn(move || {
                // The main channel; a source that is not answered makes no other.
                let (mut main, _) = listener.accept().unwrap();
                let mut all = Vec::new();
                while reads && main.read(&mut [0; 4096]).is_ok_and(|count| count > 0) {}
                all.push(main);
                all
            });
            let sent = end(rig.send(&through, &THROUGH));
            refused(&sent, &["destination"]);
            refused(&end(relay), &[]);
            drop(accepting.join().unwrap());
        }
    }
}

fn a_destination_that_ends_at_once() {
    for number in 0..4 {
        let rig = Rig::new(1000);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap().to_string();
        let (relay, through) = relay(&rig, &to, Wire::Unix, "r", "--timeout 3");
        let accepting = thread::spawn(move || {
            let (mut main, _) = listener.accept().unwrap();
            let mut some = vec![0; number * 10];
            let _cut = main.read_exact(&mut some);
        });
        refused(&end(rig.send(&through, &THROUGH)), &[]);
        refused(&end(relay), &[]);
        accepting.join().unwrap();
    }
}

fn a_source_that_is_gone_before_its_channels() {
    for told in ["", "--channels 2"] {
        for how in [Shutdown::Write, Shutdown::Both] {
            let rig = Rig::over(1000);
            let (receiving, to) = rig.receive(&THROUGH).unwrap();
            let (relay, through) = relay(&rig, &to, Wire::Tcp, "r", &format!("--timeout 2 {told}"));
            let mut main = TcpStream::connect(through).unwrap();
            main.write_all(b"QEVM\0\0\0\x03").unwrap();
            main.shutdown(how).unwrap();
            refused(&end(receiving), &[]);
            let ended = end(relay);
            assert_ne!(ended.status, Some(0), "nothing has passed: {ended:?}");
            rig.untouched(&[]);
        }
    }
}

fn a_relay_whose_destination_is_gone_before_it_replied_says_so() {
    for told in ["", "--channels 2"] {
        let rig = Rig::new(1000);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap().to_string();
        let (relay, through) = relay(&rig, &to, Wire::Tcp, "r", &format!("--timeout 2 {told}"));
        // It ends in order, when it has read all that there was: as a process that is killed does.
        let accepting = thread::spawn(move || {
            let (mut main, _) = listener.accept().unwrap();
            main.set_read_timeout(Some(Duration::from_millis(300)))
                .unwrap();
            while main.read(&mut [0; 4096]).is_ok_and(|count| count > 0) {}
        });
        refused(&end(rig.send(&through, &THROUGH)), &["destination"]);
        let relayed = end(relay);
        refused(&relayed, &["main channel"]);
        accepting.join().unwrap();
    }
}

fn a_flood_of_channels_is_refused() {
    for told in ["", "--channels 2"] {
        case();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap().to_string();
        let over = thread::spawn(move || {
            let mut kept = Vec::new();
            // Ends with the word of the test.
            while let Ok((mut socket, _)) = listener.accept() {
                let mut word = [0; 4];
                socket
                    .set_read_timeout(Some(Duration::from_millis(20)))
                    .unwrap();
                if socket.read_exact(&mut word).is_ok() && &word == b"over" {
                    return;
                }
                kept.push(socket);
            }
        });
        let (relay, through) = listen(words(&format!(
            "relay --listen 127.0.0.1:0 --to {to} --timeout 3 --accept-timeout 20 {told}"
        )));
        let mut channels = Vec::new();
        for number in 0..600_u32 {
            let Ok(mut socket) = TcpStream::connect(&through) else {
                break;
            };
            let mut hello = 0x1122_3344_u32.to_be_bytes().to_vec();
            hello.extend(1_u32.to_be_bytes());
            hello.extend([0; 16]);
            hello.extend([number.to_le_bytes()[0], 0, 0, 0, 0, 0, 0, 0]);
            if socket.write_all(&hello).is_err() {
                break;
            }
            channels.push(socket);
        }
        let status = std::fs::read_to_string(format!("/proc/{}/status", relay.id()));
        let threads = status.unwrap_or_default();
        let threads = threads.lines().find_map(|it| it.strip_prefix("Threads:"));
        let threads: u32 = threads.map_or(0, |it| it.trim().parse().unwrap());
        assert!(threads < 600, "{threads} threads");
        refused(&end(relay), &["channels"]);
        TcpStream::connect(&to).unwrap().write_all(b"over").unwrap();
        over.join().unwrap();
    }
}

fn a_link_that_is_cut_on_either_side() {
    for before in [true, false] {
        for reset in [true, false] {
            for cut in [1, 100, 1000, 100_000, 2_900_000] {
                let rig = Rig::over(3_000_000);
                let fate = Fate {
                    cut_at: Some(cut),
                    reset,
                    ..Fate::default()
                };
                let (receiving, to) = rig.receive(&THROUGH).unwrap();
                let link = |to: &str| Link::new("127.0.0.1:0", to, fate).unwrap();
                let (link, relay, sent) = if before {
                    let (relay, through) = relay(&rig, &to, Wire::Tcp, "r", "--timeout 3");
                    let link = link(&through);
                    let sent = end(rig.send(&link.address, &THROUGH));
                    (link, relay, sent)
                } else {
                    let link = link(&to);
                    let (relay, through) =
                        relay(&rig, &link.address, Wire::Tcp, "r", "--timeout 3");
                    let sent = end(rig.send(&through, &THROUGH));
                    (link, relay, sent)
                };
                if cut == 1 {
                    // It may never have heard of anybody.
                    receiving.signal("INT");
                    relay.signal("INT");
                }
                let (relayed, received) = (end(relay), end(receiving));
                drop(link);
                assert_ne!(sent.status, Some(0), "{sent:?}");
                assert_ne!(relayed.status, Some(0), "{relayed:?}");
                rig.judge(&sent, &received);
            }
        }
    }
}

fn whoever_is_killed_or_stopped() {
    for signal in ["KILL", "STOP"] {
        for victim in 0..3 {
            let rig = Rig::over(1000);
            let ends = Ends {
                send: "--device sim:id=nic,size=1024GiB",
                receive: "--device sim:id=nic",
                ..THROUGH
            };
            let (receiving, to) = rig.receive(&ends).unwrap();
            let (relay, through) = relay(&rig, &to, Wire::Unix, "r", "--timeout 3");
            let sending = rig.send(&through, &ends);
            until("it moves", || {
                std::fs::exists(rig.directory.file("r")).unwrap()
            });
            thread::sleep(Duration::from_millis(300));
            let mut all = vec![sending, relay, receiving];
            let mut victim = all.remove(victim);
            victim.signal(signal);
            for other in all {
                refused(&end(other), &[]);
            }
            victim.kill();
            victim.end();
        }
    }
}
