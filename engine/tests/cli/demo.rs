//! The command's demo, its help, and what it says to wrong use.

use std::{thread, time::Duration};

use crate::{
    command::{start, words},
    start::run,
};

#[test]
fn every_shape_is_verified() {
    for shape in [
        "--state 3MiB",
        "--state 3MiB --backend blocking",
        "--state 3MiB --backend uring",
        "--devices 64 --state 256KiB",
        "--packet 4KiB --state 1MiB",
        "--channels 1 --state 3MiB",
        "--channels 16 --state 3MiB",
        "--channels 255 --devices 1 --state 1MiB",
        "--state 0",
        "--state 1",
        "--devices 1 --state 1000003 --packet 777",
        "--devices 4 --packet 1MiB --budget 4MiB --state 5MiB",
        "--devices 4 --packet 1MiB --budget 4MiB --state 5MiB --backend blocking",
        "--devices 4 --packet 64KiB --budget 256KiB --state 1MiB",
        "--devices 3 --packet 8MiB --budget 30M --state 20MiB",
        "--devices 2 --packet 64KiB --budget 144KiB --state 3MiB --spill memfd",
        "--devices 2 --packet 64KiB --budget 144KiB --state 3MiB --spill . --spill-limit 128KiB",
    ] {
        let ended = run(words(&format!("demo {shape}")));
        assert_eq!(ended.status, Some(0), "{shape}: {ended:?}");
        let verified = ended.stdout.lines().last();
        assert_eq!(verified, Some("verified"), "{shape}: {ended:?}");
        assert_eq!(ended.stderr, "", "{shape}");
    }
}

#[test]
fn the_json_says_what_the_table_does() {
    let ended = run(words(
        "demo --devices 3 --state 2MiB --packet 64KiB --channels 2 --json",
    ));
    let json = ended.json();
    assert_eq!(json["verified"], true);
    let devices = json["devices"].as_array().unwrap();
    assert_eq!(devices.len(), 3);
    for device in devices {
        assert_eq!(device["verified"], true);
        assert_eq!(device["state_bytes"], 2 << 20);
        // A packet holds at most what was asked for, a pipe may give less; and there is the config.
        assert!(device["packets"].as_u64().unwrap() >= 33);
        assert!(device["bytes"].as_u64().unwrap() > 2 << 20);
        for time in ["seconds", "starved_seconds", "blocked_seconds"] {
            assert!(device[time].as_f64().unwrap() >= 0.0);
        }
        let took = |side: &str, phase: &str| device["phases"][side][phase].as_f64().unwrap();
        for phase in ["stop", "first_byte_out", "read", "wire", "config"] {
            assert!(took("source", phase) > 0.0, "{phase}");
        }
        for phase in ["set_state", "first_byte_in", "write", "config", "resume"] {
            assert!(took("destination", phase) > 0.0, "{phase}");
        }
        assert!(device["gb_per_second"].as_f64().unwrap() > 0.0);
        assert!(device["writing_seconds"].as_f64().unwrap() > 0.0);
    }
    assert_eq!(json["totals"]["state_bytes"], 6 << 20);
    let channels = json["channels"].as_array().unwrap();
    assert_eq!(channels.len(), 2);
    let sum = |of: &[serde_json::Value], key: &str| -> u64 {
        of.iter().map(|it| it[key].as_u64().unwrap()).sum()
    };
    for key in ["packets", "bytes"] {
        assert_eq!(sum(devices, key), json["totals"][key], "{key}");
    }
    assert_eq!(sum(channels, "packets"), json["totals"]["packets"]);
    // With all of their headers.
    assert!(sum(channels, "bytes") > sum(devices, "bytes"));
    assert_eq!(json["totals"]["late_wakeups"], 0);
}

#[test]
fn the_downtimes_phases_stand_below_the_table() {
    let ended = run(words("demo --devices 2 --state 2MiB"));
    for (side, phases) in [
        ("source", "stop set state first byte out read wire config"),
        (
            "destination",
            "set state first byte in wait write config resume",
        ),
    ] {
        let mut lines = ended.stdout.lines();
        let header = lines.find(|line| line.starts_with(side)).unwrap();
        assert_eq!(words(header)[1..].join(" "), phases);
        for device in ["0000:00:00.0", "0000:00:01.0"] {
            let line = lines.next().unwrap();
            assert!(line.starts_with(device), "{line}");
            // Each a number and a unit.
            assert_eq!(words(line).len(), 1 + 2 * 6, "{line}");
        }
    }
}

#[test]
fn wrong_use_is_status_2_and_says_why() {
    for (line, why) in [
        ("demo --channels 0", "0 is not in 1..=255"),
        ("demo --channels 256", "256 is not in 1..=255"),
        ("demo --devices 0", "0 is not in 1..=1024"),
        ("demo --devices 1025", "1025 is not in 1..=1024"),
        ("demo --state 17179869184GiB", "--state"),
        ("demo --state 9EiB", "at most 1024 TiB"),
        ("demo --state big", "a size is like"),
        ("demo --packet 0", "at least 1 byte"),
        ("demo --packet 16MiB", "less than 16 MiB"),
        ("demo --budget 1KiB", "budget"),
        ("demo --spill /nowhere", "no directory of that name"),
        (
            "demo --packet 1MiB --budget 64KiB",
            "one packet with its headers",
        ),
        ("demo --backend magic", "auto, uring, blocking"),
        ("demo --colour red", "--colour"),
        ("frobnicate", "frobnicate"),
        ("replay", "FILE"),
        ("inspect", "FILE"),
        ("replay --page-size 5000 x", "power of two"),
        ("send --to host:1", "--device"),
        ("send --to host --device sim:id=a", "HOST:PORT"),
        (
            "send --to h:1 --device sim:id=a sim:id=a",
            "two devices are named a",
        ),
        (
            "receive --listen h:1 --device file:x,id=a file:x,id=b",
            "the path x",
        ),
        ("receive --listen h:1 --device disk:a", "sim:id=ID"),
        (
            "receive --listen h:1 --device sim:id=a,size=1ZB",
            "size=1ZB",
        ),
        (
            "receive --listen h:1 --device sim:id=a --timeout 0",
            "seconds",
        ),
    ] {
        let ended = run(words(line));
        assert_eq!(ended.status, Some(2), "{line}: {ended:?}");
        assert!(ended.stderr.contains(why), "{line}: {ended:?}");
        assert_eq!(ended.stdout, "", "{line}");
    }
}

#[test]
fn help_names_everything() {
    let ended = run(["--help"]);
    assert_eq!(ended.status, Some(0));
    for word in [
        "demo",
        "send",
        "receive",
        "replay",
        "inspect",
        "Exit status",
    ] {
        assert!(ended.stdout.contains(word), "{word}");
    }
    for (command, words) in [
        ("demo", ["--budget", "starved", "verified"]),
        ("send", ["sim:id=ID", "file:PATH", "--channels"]),
        ("receive", ["sim:id=ID", "file:PATH", "--accept-timeout"]),
        ("replay", ["--out", "--json", "sha256"]),
        ("inspect", ["--page-size", "config", "RAM"]),
    ] {
        let ended = run([command, "--help"]);
        assert_eq!(ended.status, Some(0));
        for word in words {
            assert!(ended.stdout.contains(word), "{command}: {word}");
        }
    }
}

#[test]
fn an_interrupt_ends_it_in_order() {
    for signal in ["INT", "TERM"] {
        let running = start(words("demo --state 64GiB"));
        thread::sleep(Duration::from_millis(300));
        running.signal(signal);
        let ended = running.end();
        assert_eq!(ended.status, Some(130), "{ended:?}");
        assert_eq!(ended.stderr, "vfio-migrate: interrupted\n");
        assert_eq!(ended.stdout, "");
    }
}
