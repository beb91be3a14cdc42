//! `--metrics` and `--timeline`: what is in the files, while a migration runs, when it has passed and when it
//! has failed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, process, thread,
    time::Duration,
};

use serde_json::Value;
use svg::parser::Event;

use crate::{
    command::{Directory, Ended, listen, start, words},
    start::run,
};

const DEMO: &str = "demo --devices 3 --channels 2 --state 2MiB --packet 64KiB";

/// A demo that leaves a file, and what is in it.
fn demo(option: &str, name: &str) -> String {
    let directory = Directory::new();
    let path = directory.file(name);
    let ended = run(words(&format!("{DEMO} {option} {path}")));
    assert_eq!(ended.status, Some(0), "{ended:?}");
    assert_eq!(ended.stderr, "");
    let names: Vec<_> = fs::read_dir(directory.path()).unwrap().collect();
    assert_eq!(names.len(), 1, "no other file is left");
    fs::read_to_string(path).unwrap()
}

// ------------------------------------------------------------------------------------- metrics

/// One sample: its name, its labels and its value.
fn samples(text: &str) -> Vec<(String, String, f64)> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let sample = |line: &str| {
        let (name, rest) = line.split_once('{').unwrap();
        let (labels, value) = rest.rsplit_once("} ").unwrap();
        (name.into(), labels.into(), value.parse().unwrap())
    };
    lines.map(sample).collect()
}

#[test]
fn the_metrics_are_what_the_conventions_ask_for() {
    let text = demo("--metrics", "vm7.prom");
    assert!(text.ends_with("\n# EOF\n"), "{text}");
    let mut kinds = BTreeMap::new();
    for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').unwrap();
        assert_eq!(kinds.insert(name, kind), None, "{name} is there twice");
    }
    for line in text.lines().filter_map(|line| line.strip_prefix("# UNIT ")) {
        let (name, unit) = line.split_once(' ').unwrap();
        assert!(["bytes", "seconds"].contains(&unit), "{line}");
        assert!(name.ends_with(&format!("_{unit}")), "{line}");
    }
    let mut seen = BTreeSet::new();
    for (name, labels, value) in samples(&text) {
        assert!(name.starts_with("vfio_migration_"), "{name}");
        assert!(value >= 0.0);
        assert!(labels.starts_with("migration=\"vm7\",side=\""), "{labels}");
        assert!(
            seen.insert((name.clone(), labels.clone())),
            "{name}{{{labels}}} twice"
        );
        match name.strip_suffix("_total") {
            Some(family) => assert_eq!(kinds.get(family), Some(&"counter"), "{name}"),
            None => assert_eq!(kinds.get(&*name), Some(&"gauge"), "{name}"),
        }
    }
    let of = |name: &str, label: &str| -> f64 {
        let all = samples(&text);
        let chosen = all.iter().filter(|it| it.0 == name && it.1.contains(label));
        chosen.map(|(_, _, value)| value).sum()
    };
    let bytes = "vfio_migration_device_bytes_total";
    assert!(of(bytes, "side=\"source\"") > 6.0 * 1048576.0);
    assert_eq!(
        of(bytes, "side=\"source\""),
        of(bytes, "side=\"destination\"")
    );
    let packets = of(
        "vfio_migration_device_packets_total",
        "side=\"destination\"",
    );
    let carried = of(
        "vfio_migration_channel_packets_total",
        "side=\"destination\"",
    );
    assert_eq!(packets, carried);
    let phase = "vfio_migration_device_phase_seconds";
    assert!(
        of(
            phase,
            "side=\"source\",idstr=\"0000:00:01.0/vfio\",instance=\"0\",phase=\"read\""
        ) > 0.0
    );
    assert_eq!(
        of(
            phase,
            "side=\"source\",idstr=\"0000:00:01.0/vfio\",instance=\"0\",phase=\"write\""
        ),
        0.0
    );
    assert_eq!(of("vfio_migration_late_wakeups_total", ""), 0.0);
}

/// The Prometheus project's own parser (Debian: python3-prometheus-client), which refuses what breaks the
/// format's rules.
#[test]
fn the_official_parser_reads_the_metrics() {
    let parse = "\
import sys
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics
text = sys.stdin.read()
families = list(openmetrics.text_string_to_metric_families(text))
# What reads the older format, as a textfile collector does, reads the same samples.
old = [s for f in parser.text_string_to_metric_families(text) for s in f.samples]
assert len(old) == sum(len(f.samples) for f in families)
for f in families: print(f.name, f.type, f.unit, len(f.samples))";
    let have = process::Command::new("python3")
        .args(["-c", "import prometheus_client"])
        .output();
    if !have.is_ok_and(|output| output.status.success()) {
        eprintln!("left out: python3-prometheus-client is not installed");
        return;
    }
    let directory = Directory::new();
    let path = directory.file("metrics");
    fs::write(&path, demo("--metrics", "vm7.prom")).unwrap();
    let output = process::Command::new("python3")
        .args(["-c", parse])
        .stdin(fs::File::open(path).unwrap())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let wrong = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{wrong}");
    for family in [
        "vfio_migration_device_bytes counter bytes 6",
        "vfio_migration_device_starved_seconds counter seconds 6",
        "vfio_migration_channel_blocked_seconds counter seconds 4",
        "vfio_migration_held_max_bytes gauge bytes 2",
    ] {
        assert!(said.lines().any(|line| line == family), "{family}: {said}");
    }
}

#[test]
fn the_metrics_are_replaced_as_a_whole_while_it_runs() {
    let directory = Directory::new();
    let path = directory.file("vm7.prom");
    let (receiving, to) = listen(words(&format!(
        "receive --listen 127.0.0.1:0 --device sim:id=a --metrics {}",
        directory.file("other.prom")
    )));
    let send = format!("send --to {to} --device sim:id=a,size=64GiB --metrics {path}");
    let running = start(words(&send));
    let mut texts = BTreeSet::new();
    // Ends: each second there is another, or the watchdog of the processes' ends comes.
    for _ in 0..12_000 {
        if let Ok(text) = fs::read_to_string(&path) {
            assert!(text.ends_with("# EOF\n"), "a part of it: {text}");
            texts.insert(text);
        }
        if texts.len() == 2 {
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(texts.len(), 2);
    running.signal("INT");
    assert_eq!(running.end().status, Some(130));
    assert_eq!(receiving.end().status, Some(1));
    let last = fs::read_to_string(&path).unwrap();
    assert!(last.ends_with("# EOF\n") && !texts.contains(&last));
    let bytes = |text: &str| {
        let all = samples(text);
        let found = all
            .iter()
            .find(|it| it.0 == "vfio_migration_device_bytes_total");
        found.unwrap().2
    };
    assert!(texts.iter().all(|text| bytes(text) <= bytes(&last)));
    let received = fs::read_to_string(directory.file("other.prom")).unwrap();
    assert!(received.contains("migration=\"other\",side=\"destination\""));
}

// ------------------------------------------------------------------------------------ timelines

/// What a picture says, piece by piece; it is well formed.
fn said(picture: &str) -> Vec<String> {
    let mut said = Vec::new();
    let mut depth = 0_i32;
    for event in svg::read(picture).unwrap() {
        match event {
            Event::Error(error) => panic!("{error}: {picture}"),
            Event::Text(text) => said.push(text.trim().to_owned()),
            Event::Tag(_, svg::node::element::tag::Type::Start, _) => depth += 1,
            Event::Tag(_, svg::node::element::tag::Type::End, _) => depth -= 1,
            _ => {}
        }
    }
    assert_eq!(depth, 0, "{picture}");
    said
}

fn says(said: &[String], what: &str) -> bool {
    said.iter().any(|text| text.contains(what))
}

#[test]
fn a_chart_says_which_device_was_the_longest_and_names_every_phase() {
    let said = said(&demo("--timeline", "a.svg"));
    for what in [
        "Downtime ",
        "3 devices, 2 channels, 6.0 MiB",
        "Longest: 0000:00:0",
        "0000:00:00.0/vfio",
        "0000:00:02.0/vfio",
        "channel 1",
        "first byte out: ",
        "first byte in: ",
        "starved, its next packet was missing: ",
        "blocked, no memory to read into: ",
        "config: ",
        "resume: ",
        "stop: ",
        "wire: ",
        "memory held, destination",
        "throughput, source",
        "VM stops",
    ] {
        assert!(says(&said, what), "{what}: {said:?}");
    }
    assert!(
        !says(&said, "NOT DONE") && !says(&said, "not ended"),
        "{said:?}"
    );
}

#[test]
fn trace_events_are_what_perfetto_opens() {
    let trace: Value = serde_json::from_str(&demo("--timeline", "a.json")).unwrap();
    let summary = trace["otherData"]["summary"].as_str().unwrap();
    assert!(summary.starts_with("Downtime "), "{summary}");
    let mut lines: BTreeMap<(u64, u64), Vec<(f64, f64)>> = BTreeMap::new();
    let (mut names, mut threads, mut counters) = (BTreeSet::new(), BTreeSet::new(), 0);
    for event in trace["traceEvents"].as_array().unwrap() {
        let name = event["name"].as_str().unwrap();
        let line = |event: &Value| {
            let number = |key: &str| event[key].as_u64().unwrap();
            (number("pid"), number("tid"))
        };
        match event["ph"].as_str().unwrap() {
            "X" => {
                let (at, took) = (
                    event["ts"].as_f64().unwrap(),
                    event["dur"].as_f64().unwrap(),
                );
                assert!(at >= 0.0 && took >= 0.0, "{event}");
                lines.entry(line(event)).or_default().push((at, at + took));
                names.insert(name.to_owned());
            }
            "M" if name == "thread_name" => {
                threads.insert(line(event));
            }
            "C" => counters += 1,
            "M" | "i" => {}
            other => panic!("{other}"),
        }
    }
    for name in ["stop", "config", "resume", "wire", "reading", "writing"] {
        assert!(names.contains(name), "{name}: {names:?}");
    }
    assert!(counters > 0);
    for (line, mut spans) in lines {
        assert!(threads.contains(&line), "{line:?} has no name");
        // On one line none overlaps another: there Perfetto would show it within.
        spans.sort_by(|a, b| a.0.total_cmp(&b.0));
        for pair in spans.windows(2) {
            assert!(pair[0].1 <= pair[1].0 + 0.002, "{line:?}: {pair:?}");
        }
    }
}

#[test]
fn each_side_of_a_migration_and_a_relay_and_a_replay_draws_its_own() {
    let directory = Directory::new();
    let draw = |name: &str| format!("--timeline {}", directory.file(name));
    let (receiving, to) = listen(words(&format!(
        "receive --listen 127.0.0.1:0 --device sim:id=nic {}",
        draw("receive.svg")
    )));
    let (relaying, through) = listen(words(&format!(
        "relay --listen 127.0.0.1:0 --to {to} {}",
        draw("relay.svg")
    )));
    let send = format!(
        "send --to {through} --device sim:id=nic,size=3MiB {}",
        draw("send.svg")
    );
    let done = |ended: &Ended| assert_eq!(ended.status, Some(0), "{ended:?}");
    done(&run(words(&send)));
    done(&relaying.end());
    done(&receiving.end());
    let read = |name: &str| said(&fs::read_to_string(directory.file(name)).unwrap());
    assert!(says(
        &read("send.svg"),
        ", as the source sees it: 1 device, 4 channels, 3.0 MiB"
    ));
    assert!(says(
        &read("receive.svg"),
        ", as the destination sees it: 1 device"
    ));
    assert!(says(
        &read("relay.svg"),
        " observed: 1 device, 4 channels, 3.0 MiB"
    ));

    // A channel with one packet of data and a config.
    let file = directory.file("0.bin");
    let channel = [
        crate::packets::hello(0),
        crate::packets::packet(0, 0, &[1; 100]),
        crate::packets::config_packet(0, 1, &[2; 7]),
    ];
    fs::write(&file, channel.concat()).unwrap();
    done(&run(words(&format!(
        "replay {file} {}",
        draw("replay.svg")
    ))));
    assert!(says(&read("replay.svg"), "Downtime "));
}

#[test]
fn a_migration_that_is_cancelled_is_drawn_up_to_then() {
    let directory = Directory::new();
    let path = directory.file("a.svg");
    let running = start(words(&format!(
        "demo --devices 2 --state 64GiB --timeline {path}"
    )));
    thread::sleep(Duration::from_millis(1500));
    running.signal("INT");
    assert_eq!(running.end().status, Some(130));
    let said = said(&fs::read_to_string(path).unwrap());
    assert!(says(&said, "FAILED after "), "{said:?}");
    assert!(says(&said, "interrupted"), "{said:?}");
    assert!(says(
        &said,
        "Not done by then: 0000:00:00.0/vfio, 0000:00:01.0/vfio"
    ));
    assert!(says(&said, "NOT DONE"), "{said:?}");
}

#[test]
fn a_file_that_cannot_be_written_is_said_before_anything_moves() {
    for (options, status, why) in [
        ("--timeline /tmp/x.png", 2, ".svg (a chart) or .json"),
        ("--timeline /nowhere/x.svg", 1, "/nowhere/x.svg"),
        ("--metrics /nowhere/x.prom", 1, "/nowhere/x.prom"),
        ("--metrics /dev/null", 1, "/dev/null"),
    ] {
        let ended = run(words(&format!("{DEMO} {options}")));
        assert_eq!(ended.status, Some(status), "{ended:?}");
        assert!(ended.stderr.contains(why), "{ended:?}");
        assert_eq!(ended.stdout, "");
    }
    let directory = Directory::new();
    let path = directory.file("x.svg");
    let ended = run(words(&format!("{DEMO} --metrics {path} --timeline {path}")));
    assert!(ended.why().contains("are one file"), "{ended:?}");
}
