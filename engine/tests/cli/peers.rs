//! The command's send and receive as two processes: equal digests, and clear ends where one side
//! is wrong, killed, stopped or incomplete.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    thread,
    time::Duration,
};

use sha2::{Digest, Sha256};
use vfio_migration::stream::{Command, Event, Section, SectionKind, Writer};

use crate::{
    command::{Directory, Ended, Running, listen, random, start, words},
    false_source::section_of,
    start::run,
};

/// Where destinations listen: TCP for even numbers, a unix socket for odd ones.
fn address(directory: &Directory, number: u64) -> String {
    if number.is_multiple_of(2) {
        "127.0.0.1:0".into()
    } else {
        format!("unix:{}", directory.file("socket"))
    }
}

fn receive(address: &str, rest: &str) -> (Running, String) {
    let first = words(&format!("receive --listen {address}"));
    listen(first.into_iter().chain(words(rest)))
}

fn send(address: &str, rest: &str) -> Running {
    start(words(&format!("send --to {address} {rest}")))
}

/// Both, to their ends: source, destination.
fn both(number: u64, source: &str, destination: &str) -> (Ended, Ended) {
    let directory = Directory::new();
    let (receiving, to) = receive(&address(&directory, number), destination);
    let sent = send(&to, source).end();
    (sent, receiving.end())
}

fn equal(sent: &Ended, received: &Ended, devices: usize) {
    let (sent, received) = (sent.json(), received.json());
    assert_eq!(
        (&sent["command"], &received["command"]),
        (&"send".into(), &"receive".into())
    );
    // All but the times.
    let by_name = |json: &serde_json::Value| {
        let mut devices = json["devices"].as_array().unwrap().clone();
        for device in &mut devices {
            let device = device.as_object_mut().unwrap();
            device.retain(|key, _| key != "phases" && !key.ends_with("_seconds"));
        }
        devices.sort_by_key(|device| device["idstr"].to_string());
        devices
    };
    assert_eq!(by_name(&sent), by_name(&received));
    assert_eq!(by_name(&sent).len(), devices);
    for (json, side, phases) in [
        (&sent, "source", ["read", "wire", "config"]),
        (&received, "destination", ["write", "config", "resume"]),
    ] {
        for (device, phase) in json["devices"]
            .as_array()
            .unwrap()
            .iter()
            .zip(phases.iter().cycle())
        {
            let took = device["phases"][side][phase].as_f64().unwrap();
            assert!(took > 0.0, "{phase}: {device}");
        }
    }
}

#[test]
fn simulated_devices_arrive() {
    for number in 0..2 {
        for options in [
            "",
            "--backend blocking",
            "--channels 1",
            "--channels 16",
            "--config-after-iterables",
            "--budget 4MiB",
        ] {
            let (sent, received) = both(
                number,
                &format!("--json {options} --device sim:id=a,size=5MiB,seed=1 sim:id=b,seed=2"),
                &format!("--json {options} --device sim:id=b --device sim:id=a"),
            );
            equal(&sent, &received, 2);
        }
    }
}

#[test]
fn files_arrive() {
    for number in 0..2 {
        let directory = Directory::new();
        let mut source = String::from("--json --packet 64KiB");
        let mut destination = String::from("--json");
        for (name, len) in [("empty", 0), ("small", 1), ("large", 3_000_001_usize)] {
            let bytes: Vec<u8> = (0..len as u64)
                .map(|at| random(at).to_le_bytes()[0])
                .collect();
            fs::write(directory.file(name), bytes).unwrap();
            let path = directory.file(name);
            source += &format!(" --device file:{path}");
            destination += &format!(" --device file:{path}.out,id=file/{name}");
        }
        let (sent, received) = both(number, &source, &destination);
        equal(&sent, &received, 3);
        for device in received.json()["devices"].as_array().unwrap() {
            let name = device["idstr"].as_str().unwrap().replace("file/", "");
            let before = fs::read(directory.file(&name)).unwrap();
            let after = fs::read(directory.file(&format!("{name}.out"))).unwrap();
            assert_eq!(before, after);
            let digest = Sha256::digest(&after);
            let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(device["state_sha256"], digest);
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 6);
    }
}

#[test]
fn precopy_data_goes_before_the_devices_stop_and_over_the_channels() {
    for number in 0..2 {
        let options = "--json --precopy-over-channels --channels 2";
        let (sent, received) = both(
            number,
            &format!(
                "{options} --packet 64KiB --device sim:id=a,size=5MiB,seed=1,precopy=3MiB \
                 sim:id=b,seed=2 sim:id=c,seed=3,precopy=1000"
            ),
            &format!("{options} --device sim:id=b sim:id=c sim:id=a"),
        );
        // Each side has compared the bytes that its channels carried with the whole state.
        equal(&sent, &received, 3);
        assert_eq!(sent.json()["totals"]["precopy_bytes"], (3 << 20) + 1000);
    }
    let (sent, received) = both(
        0,
        "--json --device sim:id=a,size=5MiB,precopy=3MiB",
        "--json --device sim:id=a",
    );
    equal(&sent, &received, 1);
    assert!(sent.json()["totals"]["precopy_bytes"].is_null(), "{sent:?}");
}

#[test]
fn precopy_over_channels_on_one_side_is_named_on_both() {
    for (source, destination, what) in [
        ("--precopy-over-channels", "", "that is off here"),
        ("", "--precopy-over-channels", "is on here"),
    ] {
        let (sent, received) = both(
            0,
            &format!("{source} --device sim:id=dev,precopy=1000"),
            &format!("{destination} --device sim:id=dev"),
        );
        for ended in [&sent, &received] {
            let why = ended.why();
            assert!(why.contains("--precopy-over-channels must be"), "{why}");
            assert!(why.contains("device dev") && why.contains(what), "{why}");
        }
    }
}

#[test]
fn a_simulated_devices_state_arrives_in_a_file() {
    let directory = Directory::new();
    let path = directory.file("state");
    let (sent, received) = both(
        0,
        "--json --device sim:id=x,instance=3,size=2MiB,seed=9",
        &format!("--json --device file:{path},id=x,instance=3"),
    );
    equal(&sent, &received, 1);
    assert_eq!(fs::metadata(path).unwrap().len(), 2 << 20);
}

#[test]
fn a_device_that_one_side_lacks_is_named_on_both() {
    for number in 0..2 {
        for (source, destination, name) in [
            (
                "sim:id=a sim:id=more",
                "sim:id=a",
                "device more is on the source",
            ),
            (
                "sim:id=a",
                "sim:id=a sim:id=more",
                "device more is on the destination",
            ),
            (
                "sim:id=a,instance=1",
                "sim:id=a",
                "device a#1 is on the source",
            ),
        ] {
            let (sent, received) = both(
                number,
                &format!("--device {source}"),
                &format!("--device {destination}"),
            );
            assert!(sent.why().contains(name), "{sent:?}");
            assert!(received.why().contains(name), "{received:?}");
        }
    }
}

#[test]
fn different_channels_are_named_on_both() {
    for (source, destination) in [(3, 4), (4, 3), (1, 16)] {
        let (sent, received) = both(
            0,
            &format!("--channels {source} --device sim:id=a"),
            &format!("--channels {destination} --device sim:id=a"),
        );
        assert!(sent.why().contains("--channels must be"), "{sent:?}");
        assert!(
            received.why().contains("--channels must be"),
            "{received:?}"
        );
    }
}

#[test]
fn a_device_that_refuses_is_named_on_both() {
    // A simulated device knows its own states, and this is none.
    let directory = Directory::new();
    let path = directory.file("state");
    fs::write(&path, vec![7; 100_000]).unwrap();
    let (sent, received) = both(
        1,
        &format!("--device file:{path},id=dev"),
        "--device sim:id=dev",
    );
    assert!(received.why().contains("device dev"), "{received:?}");
    assert!(sent.why().contains("device dev"), "{sent:?}");
    assert!(
        sent.why().contains("the destination has failed"),
        "{sent:?}"
    );

    let gone = directory.file("gone");
    fs::create_dir(&gone).unwrap();
    let device = format!("--device file:{gone}/state,id=dev");
    let (receiving, to) = receive(&address(&directory, 0), &device);
    fs::remove_dir(&gone).unwrap();
    let sent = send(&to, "--device sim:id=dev").end();
    let received = receiving.end();
    assert!(received.why().contains("device dev"), "{received:?}");
    assert!(sent.why().contains("device dev"), "{sent:?}");
}

#[test]
fn nobody_there() {
    let directory = Directory::new();
    let address = format!("unix:{}", directory.file("nobody"));
    let ended = send(&address, "--connect-timeout 0.3 --device sim:id=a").end();
    assert!(ended.why().contains("cannot connect to unix:"), "{ended:?}");
    let ended = run(words(&format!(
        "receive --listen {address} --accept-timeout 0.3 --device sim:id=a"
    )));
    assert!(ended.why().contains("no source has connected"), "{ended:?}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn strangers_are_closed_and_said() {
    let (receiving, to) = receive("127.0.0.1:0", "--json --device sim:id=a");
    drop(TcpStream::connect(&to).unwrap());
    TcpStream::connect(&to)
        .unwrap()
        .write_all(b"GET / HTTP/1.0\r\n\r\n")
        .unwrap();
    let sent = send(&to, "--json --device sim:id=a").end();
    let received = receiving.end();
    equal(&sent, &received, 1);
    assert!(
        received.stderr.contains("neither a main channel"),
        "{received:?}"
    );
}

// ------------------------------------------------------------------------------ sudden ends

/// The survivor of a kill has failed, clearly; or all had been done already.
fn survived(ended: &Ended, may_be_done: bool, seed: u64) {
    if may_be_done && ended.status == Some(0) {
        return;
    }
    let why = ended.why();
    eprintln!("seed {seed}: {why}");
    assert!(why.len() > 20, "seed {seed}: {why}");
}

/// Large enough never to be done, or small enough to be killed at any point up to the end.
fn size(seed: u64) -> &'static str {
    if seed.is_multiple_of(3) {
        "8MiB"
    } else {
        "1024GiB"
    }
}

fn devices(seed: u64) -> String {
    let size = size(seed);
    format!("--device sim:id=a,size={size},seed={seed} sim:id=b,size={size},seed=77")
}

fn pause(seed: u64) {
    thread::sleep(Duration::from_micros(random(seed) % 400_000));
}

#[test]
fn a_killed_source_ends_the_destination() {
    for seed in 0..10 {
        let directory = Directory::new();
        let options = "--timeout 5 --accept-timeout 5 --device sim:id=a sim:id=b";
        let (receiving, to) = receive(&address(&directory, seed), options);
        let mut sending = send(&to, &format!("--timeout 5 {}", devices(seed)));
        pause(seed);
        sending.kill();
        sending.end();
        survived(&receiving.end(), size(seed) == "8MiB", seed);
    }
}

#[test]
fn a_killed_destination_ends_the_source() {
    for seed in 0..10 {
        let directory = Directory::new();
        let options = "--timeout 5 --accept-timeout 5 --device sim:id=a sim:id=b";
        let (mut receiving, to) = receive(&address(&directory, seed), options);
        let sending = send(&to, &format!("--timeout 5 {}", devices(seed)));
        pause(seed);
        receiving.kill();
        receiving.end();
        survived(&sending.end(), size(seed) == "8MiB", seed);
    }
}

#[test]
fn a_stopped_peer_ends_the_other() {
    for (number, stop_the_source) in [(0, true), (1, true), (0, false), (1, false)] {
        let directory = Directory::new();
        let options = "--timeout 2 --device sim:id=a sim:id=b";
        let (receiving, to) = receive(&address(&directory, number), options);
        let sending = send(&to, &format!("--timeout 2 {}", devices(1)));
        thread::sleep(Duration::from_millis(500));
        let (mut stopped, other) = if stop_the_source {
            (sending, receiving)
        } else {
            (receiving, sending)
        };
        stopped.signal("STOP");
        survived(&other.end(), false, number);
        stopped.kill();
        stopped.end();
    }
}

#[test]
fn an_interrupt_is_told_to_the_other() {
    for interrupt_the_source in [true, false] {
        let directory = Directory::new();
        let partial = directory.file("state");
        let options = format!("--device sim:id=a file:{partial},id=b");
        let (receiving, to) = receive("127.0.0.1:0", &options);
        let sending = send(&to, "--device sim:id=a,size=1024GiB sim:id=b,size=10MiB");
        thread::sleep(Duration::from_millis(500));
        let (interrupted, other) = if interrupt_the_source {
            (sending, receiving)
        } else {
            (receiving, sending)
        };
        interrupted.signal("INT");
        let ended = interrupted.end();
        assert_eq!(ended.status, Some(130), "{ended:?}");
        assert!(
            ended.stderr.ends_with("vfio-migrate: interrupted\n"),
            "{ended:?}"
        );
        let other = other.end();
        assert!(other.why().contains("failed: interrupted"), "{other:?}");
        assert!(!fs::exists(format!("{partial}.partial")).unwrap());
    }
}

#[test]
fn an_interrupt_ends_what_goes_before_the_devices_stop() {
    let options = "--precopy-over-channels --device sim:id=a";
    let (receiving, to) = receive("127.0.0.1:0", options);
    let sending = send(&to, &format!("{options},size=1024GiB,precopy=1024GiB"));
    thread::sleep(Duration::from_millis(500));
    // The channels fill up, and the source waits in the middle of a packet.
    receiving.signal("STOP");
    thread::sleep(Duration::from_millis(500));
    sending.signal("INT");
    let ended = sending.end();
    assert_eq!(ended.status, Some(130), "{ended:?}");
    receiving.signal("CONT");
    let received = receiving.end();
    assert!(
        received.why().contains("failed: interrupted"),
        "{received:?}"
    );
}

#[test]
fn an_interrupt_before_anything_came_leaves_nothing() {
    let directory = Directory::new();
    let (receiving, _) = receive(&address(&directory, 1), "--device sim:id=a");
    receiving.signal("INT");
    assert_eq!(receiving.end().status, Some(130));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

// ---------------------------------------------------------------------------- a false source

/// A source that is written here, so that it can be wrong.
struct False {
    main: Writer<TcpStream>,
    channels: Vec<TcpStream>,
}

const FALSE_ID: &str = "0000:00:03.0/vfio";

impl False {
    /// Connects a main channel and two channels, and starts the switchover.
    fn new(to: &str) -> Self {
        let mut main = Writer::open(TcpStream::connect(to).unwrap()).unwrap();
        section_of(&mut main, FALSE_ID, SectionKind::Start, |body| {
            body.setup().unwrap();
        });
        let mut source = Self {
            main,
            channels: vec![
                crate::false_source::channel(to, 0),
                crate::false_source::channel(to, 1),
            ],
        };
        source.command(Command::SwitchoverStart);
        source
    }

    fn command(&mut self, command: Command) {
        self.main.write(&Event::Command(command)).unwrap();
    }

    fn packet(&mut self, channel: usize, index: u32, data: &[u8]) {
        crate::false_source::packet(&mut self.channels[channel], FALSE_ID, index, data);
    }

    fn config(&mut self, channel: usize, index: u32) {
        crate::false_source::config(&mut self.channels[channel], FALSE_ID, index);
    }

    /// Says that all has been sent.
    fn eof(&mut self) {
        crate::false_source::end(&mut self.main, FALSE_ID);
    }
}

fn false_destination() -> (Running, String, Directory) {
    let directory = Directory::new();
    let path = directory.file("state");
    let options = format!("--channels 2 --timeout 3 --device file:{path},id={FALSE_ID}");
    let (receiving, to) = receive("127.0.0.1:0", &options);
    (receiving, to, directory)
}

#[test]
fn a_false_source_that_is_right_is_loaded() {
    let (receiving, to, directory) = false_destination();
    let mut source = False::new(&to);
    source.packet(1, 1, b"second");
    source.packet(0, 0, b"first, ");
    source.config(0, 2);
    source.eof();
    source.channels.clear();
    let mut replies = Vec::new();
    source.main.body().read_to_end(&mut replies).unwrap();
    assert_eq!(
        replies[replies.len() - 8..],
        [0, 1, 0, 4, 0, 0, 0, 0],
        "shut 0"
    );
    let ended = receiving.end();
    assert_eq!(ended.status, Some(0), "{ended:?}");
    assert_eq!(fs::read(directory.file("state")).unwrap(), b"first, second");
}

/// What never came is named: the device, and the idx.
fn names_what_is_missing(wrong: impl FnOnce(&mut False), index: u32) {
    let (receiving, to, directory) = false_destination();
    let mut source = False::new(&to);
    wrong(&mut source);
    let ended = receiving.end();
    let why = ended.why();
    assert!(why.contains(FALSE_ID), "{why}");
    assert!(why.contains(&format!("idx {index}")), "{why}");
    assert!(!why.contains("any before"), "some came: {why}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_packet_that_never_came_and_the_channels_end() {
    let wrong = |source: &mut False| {
        source.packet(0, 0, b"first");
        source.packet(1, 2, b"third");
        source.config(1, 3);
        source.eof();
        source.channels.clear();
    };
    names_what_is_missing(wrong, 1);
}

#[test]
fn a_packet_that_never_came_and_all_stays_open() {
    let wrong = |source: &mut False| {
        source.packet(0, 0, b"first");
        source.packet(1, 2, b"third");
        source.config(1, 3);
    };
    names_what_is_missing(wrong, 1);
}

#[test]
fn a_config_that_never_came_and_the_channels_end() {
    let wrong = |source: &mut False| {
        source.packet(0, 0, b"first");
        source.packet(1, 1, b"second");
        source.eof();
        source.channels.clear();
    };
    names_what_is_missing(wrong, 2);
}

#[test]
fn a_config_that_never_came_and_all_stays_open() {
    let wrong = |source: &mut False| {
        source.packet(0, 0, b"first");
        source.packet(1, 1, b"second");
        source.eof();
    };
    names_what_is_missing(wrong, 2);
}

#[test]
fn nothing_came_at_all() {
    names_what_is_missing(|source| source.channels.clear(), 0);
}

#[test]
fn a_source_that_falls_silent_before_the_switchover() {
    let (receiving, to, _directory) = false_destination();
    let mut main = Writer::open(TcpStream::connect(&to).unwrap()).unwrap();
    main.write(&Event::Command(Command::OpenReturnPath))
        .unwrap();
    let ended = receiving.end();
    assert!(
        ended.why().contains("within 3 s") || ended.why().contains("for 3 s"),
        "{ended:?}"
    );
}

#[test]
fn a_main_channel_that_ends_too_early() {
    let (receiving, to, _directory) = false_destination();
    let mut source = False::new(&to);
    source.packet(0, 0, b"first");
    // The connection ends, and the state has not.
    source
        .main
        .body()
        .shutdown(std::net::Shutdown::Write)
        .unwrap();
    let ended = receiving.end();
    assert!(
        ended.why().contains("the source has gone away"),
        "{ended:?}"
    );
}

#[test]
fn a_section_of_another_device() {
    let (receiving, to, _directory) = false_destination();
    let mut main = Writer::open(TcpStream::connect(&to).unwrap()).unwrap();
    let section = Section {
        kind: SectionKind::Full,
        id: 9,
        owner: crate::false_source::device("ram"),
        version: 4,
    };
    main.write(&Event::Section(section)).unwrap();
    let ended = receiving.end();
    assert!(
        ended.why().contains("device ram is on the source"),
        "{ended:?}"
    );
}
