//! How the command fails: one line that says once what is wrong, shows nothing that steers a terminal,
//! and names the option or the file that it is about; with `--json` one object as well.

use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::PathBuf,
};

use serde_json::Value;
use vfio_migration::{
    stream::{Command, Event, Writer},
    text::is_printable,
    wire::Hello,
};

use crate::{
    command::{Directory, Ended, Running, listen, start, words},
    schema,
    start::run,
};

/// The object of a failure: the only thing on stdout, and in agreement with stderr and the status.
fn error(ended: &Ended) -> Value {
    let json = schema::object(&ended.stdout);
    let error = json["error"].clone();
    assert_eq!(
        error["status"].as_i64(),
        ended.status.map(i64::from),
        "{ended:?}"
    );
    let message = error["message"].as_str().unwrap();
    assert!(message.len() > 5, "{ended:?}");
    assert!(!error["chain"].as_array().unwrap().is_empty(), "{ended:?}");
    if ended.status != Some(2) {
        let said = ended.stderr.lines().last().unwrap();
        assert_eq!(said, format!("vfio-migrate: {message}"), "{ended:?}");
    }
    error
}

// ------------------------------------------------------------------------------------------ JSON

#[test]
fn a_failure_of_each_command_is_one_json_object() {
    let directory = Directory::new();
    let (nowhere, file) = (directory.file("nowhere"), directory.file("file"));
    fs::write(&file, b"no channel").unwrap();
    let enoent = nix::errno::Errno::ENOENT as i32;
    for (line, status, kind, errno) in [
        (
            format!("send --connect-timeout 0.1 --to unix:{nowhere} --device sim:id=a"),
            1,
            "",
            None,
        ),
        (
            format!("send --to unix:{nowhere} --device file:{nowhere}"),
            1,
            "",
            Some(enoent),
        ),
        (
            "receive --listen 127.0.0.1:0 --accept-timeout 0.1 --device sim:id=a".into(),
            1,
            "",
            None,
        ),
        (
            format!("receive --listen unix:{nowhere}/x --device sim:id=a"),
            1,
            "",
            Some(enoent),
        ),
        (
            format!("relay --listen 127.0.0.1:0 --accept-timeout 0.1 --to unix:{nowhere}"),
            1,
            "",
            None,
        ),
        (format!("probe {nowhere}"), 1, "", None),
        (format!("replay {nowhere}"), 1, "", Some(enoent)),
        (format!("replay {file}"), 1, "", None),
        (format!("inspect {nowhere}"), 1, "", Some(enoent)),
        (format!("inspect {file}"), 1, "", None),
        (
            "demo --devices 64 --state 18446744073709551615".into(),
            2,
            "usage",
            None,
        ),
        // What the arguments' parser finds.
        ("demo --devices none".into(), 2, "usage", None),
        ("send".into(), 2, "usage", None),
    ] {
        let ended = run(words(&format!("{line} --json")));
        let error = error(&ended);
        assert_eq!(ended.status, Some(status), "{line}: {ended:?}");
        assert_eq!(
            error["kind"].as_str().unwrap_or(""),
            kind,
            "{line}: {error}"
        );
        if errno.is_some() {
            assert_eq!(
                error["errno"].as_i64(),
                errno.map(i64::from),
                "{line}: {error}"
            );
        }
        // Without the option there is nothing on stdout.
        assert_eq!(run(words(&line)).stdout, "", "{line}");
    }
}

#[test]
fn an_interruption_is_one_json_object() {
    let receiving = || {
        listen(words(
            "receive --json --listen 127.0.0.1:0 --device sim:id=a",
        ))
        .0
    };
    let demo = || start(words("demo --json --devices 1 --state 1024GiB"));
    for signals in [&["INT"][..], &["INT", "INT"], &["TERM"], &["TERM", "INT"]] {
        for run in [&receiving as &dyn Fn() -> Running, &demo] {
            let running = run();
            std::thread::sleep(std::time::Duration::from_millis(300));
            for signal in signals {
                running.signal(signal);
            }
            let ended = running.end();
            assert_eq!(ended.status, Some(130), "{ended:?}");
            assert_eq!(error(&ended)["kind"], "interrupted");
        }
    }
}

/// A source and a destination to their ends, both with `--json`.
fn both(source: &str, destination: &str) -> [Ended; 2] {
    let (receiving, to) = listen(words(&format!(
        "receive --json --listen 127.0.0.1:0 --timeout 20 {destination}"
    )));
    let sent = run(words(&format!("send --json --to {to} {source}")));
    [sent, receiving.end()]
}

#[test]
fn what_is_known_of_a_failure_is_in_its_object() {
    let directory = Directory::new();
    let path = directory.file("state");
    fs::write(&path, vec![7; 100_000]).unwrap();
    let [sent, received] = both(
        &format!("--device file:{path},id=dev,instance=3"),
        "--device sim:id=dev,instance=3",
    );
    let received = error(&received);
    assert_eq!(received["kind"], "device", "{received}");
    assert_eq!(received["device"]["idstr"], "dev", "{received}");
    assert_eq!(received["device"]["instance"], 3, "{received}");
    assert!(error(&sent)["message"].as_str().unwrap().contains("dev#3"));

    let [_, received] = both("--device sim:id=a sim:id=more", "--device sim:id=a");
    assert_eq!(error(&received)["device"]["idstr"], "more");
}

// -------------------------------------------------------------------------------------- the words

#[test]
fn config_after_iterables_on_one_side_is_named_on_both() {
    let on = "--config-after-iterables";
    for (source, destination, what) in [(on, "", "is off here"), ("", on, "is on here")] {
        let sides = both(
            &format!("{source} --device sim:id=dev"),
            &format!("{destination} --device sim:id=dev"),
        );
        for ended in sides {
            let why = ended.why();
            assert!(why.contains("--config-after-iterables must be"), "{why}");
            assert!(why.contains("device dev") && why.contains(what), "{why}");
            error(&ended);
        }
    }
}

#[test]
fn a_source_that_is_silent_within_an_event_has_said_nothing() {
    let (receiving, to) = listen(words(
        "receive --listen 127.0.0.1:0 --channels 1 --timeout 1 --device sim:id=a",
    ));
    let mut main = TcpStream::connect(&to).unwrap();
    // A section's header, up to the middle of its name.
    main.write_all(b"QEVM\0\0\0\x03\x01\0\0\0\x07\x0aabc")
        .unwrap();
    let mut channel = TcpStream::connect(&to).unwrap();
    let hello = Hello {
        uuid: [0; 16],
        id: 0,
    };
    channel.write_all(&hello.encode()).unwrap();
    let mut told = Vec::new();
    main.read_to_end(&mut told).unwrap();
    drop(main);
    let ended = receiving.end();
    let why = ended.why();
    assert!(why.contains("the source has said nothing for 1 s"), "{why}");
    assert!(!why.contains("os error"), "{why}");
}

#[test]
fn a_destination_that_takes_nothing_is_no_errno() {
    let destination = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = destination.local_addr().unwrap();
    let line = format!("relay --listen 127.0.0.1:0 --timeout 1 --to {to}");
    let (relaying, at) = listen(words(&line));
    let mut main = TcpStream::connect(&at).unwrap();
    main.write_all(b"QEVM\0\0\0\x03").unwrap();
    let _silent = destination.accept().unwrap();
    // More than the sockets on the way hold; it ends when the relay gives up.
    while main.write_all(&[0; 1 << 16]).is_ok() {}
    let ended = relaying.end();
    let why = ended.why();
    assert!(
        why.contains("the main channel to the destination failed"),
        "{why}"
    );
    assert!(!why.contains("os error"), "{why}");
}

#[test]
fn a_name_that_is_none_is_reported_with_its_file_and_place() {
    let name = b"0000:00:01.0/vfio";
    for other in [&b"0000:\xff0:01.0/vfio"[..], &[0; 17]] {
        let directory = Directory::new();
        let files = capture_with(&directory, name, other);
        for line in ["replay", "replay --json"] {
            let ended = run(words(line).into_iter().chain(files.clone()));
            let why = ended.why();
            assert!(why.contains("01-c2s.bin byte 209152: device"), "{why}");
            assert!(why.contains("this idstr is no name"), "{why}");
        }
    }
}

/// A captured migration whose device has another name.
fn capture_with(directory: &Directory, name: &[u8], other: &[u8]) -> Vec<String> {
    let data = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/01-xfer-on-1dev-2ch");
    ["01-c2s.bin", "02-c2s.bin"]
        .map(|file| {
            let mut bytes = fs::read(data.join(file)).unwrap();
            let at = bytes.windows(name.len()).position(|it| it == name).unwrap();
            bytes[at..at + name.len()].copy_from_slice(other);
            let path = directory.file(file);
            fs::write(&path, bytes).unwrap();
            path
        })
        .to_vec()
}

// ----------------------------------------------------------------------------------- the terminal

/// A name that shows what follows it backwards, in 17 bytes.
const STEERS: &str = "a\u{202e}b\u{2066}c\u{200e}d\u{61c}xx";

/// Nothing of what was printed steers a terminal.
fn prints_only_what_is_shown(ended: &Ended) {
    for text in [&ended.stdout, &ended.stderr] {
        let steering = text
            .chars()
            .find(|char| *char != '\n' && !is_printable(*char));
        assert_eq!(steering, None, "{ended:?}");
    }
}

#[test]
fn no_name_steers_the_terminal() {
    let directory = Directory::new();
    let name = b"0000:00:01.0/vfio";
    let files = capture_with(&directory, name, STEERS.as_bytes());
    let commands = [
        "replay",
        "replay --json",
        "inspect",
        // Without the config.
        "replay --json",
    ];
    for (count, line) in [2, 2, 2, 1].into_iter().zip(commands) {
        let files = files[..count].iter().cloned();
        let ended = run(words(line).into_iter().chain(files));
        prints_only_what_is_shown(&ended);
        let named = ended.stdout.contains("202e") || ended.stderr.contains("202e");
        assert!(named, "{ended:?}");
    }

    // Of a device that arrives, of one that is not there, and of a file that is not.
    let spec = format!("sim:id={STEERS}");
    for (source, destination) in [(&*spec, &*spec), (&spec, "sim:id=a"), ("sim:id=a", &spec)] {
        let sides = both(
            &format!("--device {source}"),
            &format!("--device {destination}"),
        );
        for ended in sides {
            prints_only_what_is_shown(&ended);
            let json = schema::object(&ended.stdout);
            if ended.status == Some(0) {
                assert_eq!(json["devices"][0]["idstr"], STEERS);
            } else if source == spec {
                assert!(ended.stderr.contains("202e"), "{ended:?}");
            }
        }
    }
    for line in ["replay", "replay --json", "inspect", "inspect --json"] {
        let file = directory.file(STEERS);
        prints_only_what_is_shown(&run(words(line).into_iter().chain([file])));
    }
}

#[test]
fn no_reason_of_a_peer_steers_the_terminal() {
    let (receiving, to) = listen(words(
        "receive --json --listen 127.0.0.1:0 --device sim:id=a",
    ));
    let mut main = Writer::open(TcpStream::connect(&to).unwrap()).unwrap();
    let payload = format!("it has {STEERS}\u{1b}[31m").into_bytes();
    let reason = Command::Other {
        command: 0x7666,
        payload,
    };
    main.write(&Event::Command(reason)).unwrap();
    let ended = receiving.end();
    assert!(
        ended.why().contains("the source has failed: it has a b c"),
        "{ended:?}"
    );
    prints_only_what_is_shown(&ended);
    error(&ended);
}
