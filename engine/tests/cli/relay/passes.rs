//! What passes: what QEMU sent, and packets in any order.

use std::{
    fs,
    io::Write,
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::{Arc, atomic::Ordering::Relaxed},
    thread::{self},
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::command::{Directory, WATCHDOG, random};

use super::{
    fed::{config, hello, packet, ram, shuffled, sync},
    received::same,
    sink::{Sink, Tap, feed, relay},
};

/// One recorded migration: the main channel both ways, and the multifd channels.
struct Capture {
    main: [Vec<u8>; 2],
    channels: Vec<Vec<u8>>,
    expected: Value,
}

fn captures() -> Vec<Capture> {
    let data = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let folders = fs::read_dir(data).unwrap().map(|it| it.unwrap().path());
    let mut folders: Vec<_> = folders
        .filter(|path| path.join("expected.json").exists())
        .collect();
    folders.sort();
    assert!(folders.len() >= 4, "{folders:?}");
    let capture = |folder: PathBuf| {
        let read = |name: &str| fs::read(folder.join(name)).unwrap();
        let expected: Value = serde_json::from_slice(&read("expected.json")).unwrap();
        let names = expected["channels"].as_array().unwrap().iter();
        Capture {
            main: [read("00-c2s.bin"), read("00-s2c.bin")],
            channels: names.map(|name| read(name.as_str().unwrap())).collect(),
            expected,
        }
    };
    folders.into_iter().map(capture).collect()
}

#[test]
fn what_qemu_sent_passes_as_it_was() {
    for (number, capture) in captures().into_iter().enumerate() {
        let [main, answer] = capture.main;
        for piece in [usize::MAX, 1000 + number] {
            let directory = Directory::new();
            let count = capture.channels.len();
            let sink = Sink::with(&directory, count + 1, answer.clone(), Arc::default());
            let (relay, from) = relay(&directory, &sink.address, "");
            // The main channel may come after a channel, too.
            let mut fed = vec![feed(&from, capture.channels[0].clone(), piece)];
            let said = feed(&from, main.clone(), piece);
            fed.extend(
                capture.channels[1..]
                    .iter()
                    .map(|bytes| feed(&from, bytes.clone(), piece)),
            );
            let ended = relay.end();
            let received = sink.end();
            let (mains, channels): (Vec<_>, Vec<_>) =
                received.into_iter().partition(|it| it.starts_with(b"QEVM"));
            assert!(mains == [main.clone()], "the main channel is untouched");
            assert_eq!(said.join().unwrap(), answer);
            same(&capture.channels, &channels);
            for fed in fed {
                assert_eq!(fed.join().unwrap(), b"", "nothing comes back on a channel");
            }
            let json = ended.json();
            for device in capture.expected["devices"].as_array().unwrap() {
                let mut found = json["devices"].as_array().unwrap().iter();
                let found = found.find(|it| it["idstr"] == device["idstr"]).unwrap();
                assert_eq!(found["packets"], device["packets"]);
            }
            assert_eq!(json["main_to_destination"], main.len());
            assert_eq!(json["main_to_source"], answer.len());
        }
    }
}

#[test]
fn packets_in_any_order_leave_in_theirs() {
    for channels in [1, 3] {
        let directory = Directory::new();
        let sink = Sink::new(&directory, channels);
        let (relay, from) = relay(
            &directory,
            &sink.address,
            &format!("--channels {channels} --budget 16MiB"),
        );
        let mut sent: Vec<Vec<u8>> = (0..channels)
            .map(|id| [hello(u8::try_from(id).unwrap()), sync(id as u64)].concat())
            .collect();
        let all = (1..=3).flat_map(|device| shuffled(device, 200, 5000));
        for (number, bytes) in all.enumerate() {
            let channel = &mut sent[number % channels];
            channel.extend(bytes);
            match random(number as u64) % 8 {
                0 => channel.extend(ram(number as u64)),
                1 => channel.extend(sync(number as u64)),
                _ => {}
            }
        }
        let fed: Vec<_> = sent
            .iter()
            .map(|it| feed(&from, it.clone(), 1 << 20))
            .collect();
        let json = relay.end().json();
        for fed in fed {
            fed.join().unwrap();
        }
        same(&sent, &sink.end());
        assert_eq!(json["totals"]["late_wakeups"], 0);
        assert_eq!(json["devices"].as_array().unwrap().len(), 3);
        for device in json["devices"].as_array().unwrap() {
            assert_eq!(device["packets"], 201);
        }
    }
}

#[test]
fn a_packet_that_comes_too_early_waits_for_its_channels_first_sync() {
    let directory = Directory::new();
    let tap = Arc::new(Tap::default());
    let sink = Sink::with(&directory, 1, Vec::new(), tap.clone());
    let (relay, from) = relay(&directory, &sink.address, "--channels 1");
    let early = [hello(0), packet(1, 0, b"state"), config(1, 1)].concat();
    let mut source = UnixStream::connect(&from).unwrap();
    source.write_all(&early).unwrap();
    let hello_len = hello(0).len() as u64;
    let deadline = Instant::now() + WATCHDOG;
    while tap.read.load(Relaxed) < hello_len && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(5));
    }
    // Time enough for what must not come.
    thread::sleep(Duration::from_millis(300));
    assert_eq!(tap.read.load(Relaxed), hello_len);
    source.write_all(&sync(0)).unwrap();
    let whole = [early, sync(0)].concat();
    while tap.read.load(Relaxed) < whole.len() as u64 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(5));
    }
    drop(source);
    let json = relay.end().json();
    assert_eq!(json["devices"][0]["packets"], 2);
    assert_eq!(json["totals"]["late_wakeups"], 0, "the SYNC lets them go");
    same(&[whole], &sink.end());
}

#[test]
fn nothing_but_ram_passes_too() {
    let directory = Directory::new();
    let sink = Sink::new(&directory, 1);
    let (relay, from) = relay(&directory, &sink.address, "--channels 1");
    let sent = [hello(0), sync(0), ram(1), ram(2), sync(3)].concat();
    let fed = feed(&from, sent.clone(), 77);
    let json = relay.end().json();
    assert_eq!(json["channels"][0]["ram_packets"], 2);
    assert_eq!(json["channels"][0]["syncs"], 2);
    fed.join().unwrap();
    assert!(sink.end() == [sent]);
}
