//! A stderr and a stdout that nobody reads: whatever is said there, the command gets on, and ends when
//! it is told to.

use std::{
    fs,
    io::{self, PipeReader, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::Stdio,
    thread,
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    pty::{grantpt, posix_openpt, ptsname_r, unlockpt},
    sys::termios::{FlowArg, tcflow},
};

use crate::{
    command::{Directory, Running, listen, start, words},
    start::start_with,
};

/// A pipe that is full, and whose reader only holds it.
fn full() -> (PipeReader, OwnedFd) {
    let (reader, mut writer) = io::pipe().unwrap();
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    while writer.write(&[b'-'; 4096]).is_ok() {}
    while writer.write(b"-").is_ok() {}
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    (reader, writer.into())
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..crate::command::WATCHDOG.as_millis() / 5 {
        if is_so() {
            return;
        }
        thread::sleep(Duration::from_millis(5));
    }
    panic!("not within the watchdog's time: {what}");
}

/// Connections of anybody's, each of which is worth a line.
fn strangers(path: &str, count: usize) {
    until("it listens", || UnixStream::connect(path).is_ok());
    for _ in 0..count {
        let mut stranger = UnixStream::connect(path).unwrap();
        stranger.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    }
}

#[test]
fn strangers_do_not_stop_a_destination_whose_stderr_nobody_reads() {
    for name in ["receive", "relay"] {
        for signal in ["none", "INT", "TERM", "HUP"] {
            let directory = Directory::new();
            let (path, next) = (directory.file("socket"), directory.file("next"));
            let (_unread, stderr) = full();
            let (destination, beyond) = if name == "relay" {
                let options = format!("receive --listen unix:{next} --device sim:id=a");
                let beyond = start(words(&options));
                until("it listens", || UnixStream::connect(&next).is_ok());
                (format!("--to unix:{next} --channels 4"), Some(beyond))
            } else {
                ("--device sim:id=a".into(), None)
            };
            let arguments = words(&format!("{name} --listen unix:{path} {destination}"));
            let running = start_with(arguments, Stdio::piped(), stderr.into());
            strangers(&path, 2000);
            if signal == "none" {
                let sent = start(words(&format!("send --to unix:{path} --device sim:id=a"))).end();
                assert_eq!(sent.status, Some(0), "{name}: {sent:?}");
                let ended = running.end();
                assert_eq!(ended.status, Some(0), "{name}: {ended:?}");
            } else {
                running.signal(signal);
                let ended = running.end();
                assert_eq!(ended.status, Some(130), "{name}, {signal}: {ended:?}");
                assert!(!fs::exists(&path).unwrap(), "its socket is left");
            }
            drop(beyond);
        }
    }
}

#[test]
fn strangers_are_summed_up() {
    let directory = Directory::new();
    let path = directory.file("socket");
    let (receiving, to) = listen(words(&format!(
        "receive --listen unix:{path} --device sim:id=a"
    )));
    strangers(&path, 2000);
    let sent = start(words(&format!("send --to {to} --device sim:id=a"))).end();
    assert_eq!(sent.status, Some(0), "{sent:?}");
    let ended = receiving.end();
    assert_eq!(ended.status, Some(0), "{ended:?}");
    let lines = ended.stderr.lines();
    let said = lines.clone().filter(|line| line.contains("0x47455420"));
    let said = said.count();
    let sums = lines.filter_map(|line| {
        let (_, rest) = line.split_once(" and ")?;
        rest.strip_suffix(" more connections were closed in such ways")?
            .parse::<usize>()
            .ok()
    });
    assert_eq!(said + sums.sum::<usize>(), 2000, "{ended:?}");
    // A few every ten seconds, however long that took here.
    assert!(said < 200, "{said} lines");
}

/// Both ends of a migration; the output of one has no reader, and is then told to end by `signal`.
fn unread_output(at_the_source: bool, signal: &str) {
    let directory = Directory::new();
    let path = directory.file("socket");
    let (unread, stdout) = full();
    let mut stdout = Some(Stdio::from(stdout));
    let mut begin = |arguments: String, unread: bool| -> Running {
        let stdout = stdout.take_if(|_| unread).unwrap_or_else(Stdio::piped);
        start_with(words(&arguments), stdout, Stdio::piped())
    };
    let receiving = begin(
        format!("receive --listen unix:{path} --device sim:id=a"),
        !at_the_source,
    );
    let sending = begin(
        format!("send --to unix:{path} --device sim:id=a"),
        at_the_source,
    );
    let (unread_one, other) = if at_the_source {
        (sending, receiving)
    } else {
        (receiving, sending)
    };
    let other = other.end();
    assert_eq!(other.status, Some(0), "{other:?}");
    unread_one.signal(signal);
    let ended = unread_one.end();
    // It has passed, as the other end knows; and so it is said.
    assert_eq!(ended.status, Some(0), "{signal}: {ended:?}");
    assert!(ended.stderr.contains("all is loaded"), "{ended:?}");
    drop(unread);
}

#[test]
fn an_output_that_nobody_reads_does_not_change_what_has_passed() {
    for at_the_source in [true, false] {
        for signal in ["INT", "TERM", "HUP"] {
            unread_output(at_the_source, signal);
        }
    }
}

#[test]
fn an_output_that_cannot_be_written_does_not_change_what_has_passed() {
    for at_the_source in [true, false] {
        let directory = Directory::new();
        let path = directory.file("socket");
        let stdout = |full: bool| {
            if full {
                Stdio::from(fs::File::options().write(true).open("/dev/full").unwrap())
            } else {
                Stdio::piped()
            }
        };
        let receiving = start_with(
            words(&format!("receive --listen unix:{path} --device sim:id=a")),
            stdout(!at_the_source),
            Stdio::piped(),
        );
        let sending = start_with(
            words(&format!("send --to unix:{path} --device sim:id=a")),
            stdout(at_the_source),
            Stdio::piped(),
        );
        for (ended, unprinted) in [
            (sending.end(), at_the_source),
            (receiving.end(), !at_the_source),
        ] {
            assert_eq!(ended.status, Some(0), "{ended:?}");
            let warned = ended.stderr.contains("warning: all is loaded, but cannot");
            assert_eq!(warned, unprinted, "{ended:?}");
        }
    }
}

/// A log is longer than any queue: it comes whole where it is read, and stops nobody where not.
#[test]
fn a_log_that_nobody_reads_stops_nobody() {
    let directory = Directory::new();
    let path = directory.file("socket");
    let (_unread, stderr) = full();
    let log = "export VFIO_MIGRATE_LOG=vfio_migration=trace";
    let receiving = crate::start::start_under_with(
        log,
        words(&format!(
            "receive --listen unix:{path} --device sim:id=a --timeout 30"
        )),
        Stdio::piped(),
        stderr.into(),
    );
    let sent = start(words(&format!("send --to unix:{path} --device sim:id=a"))).end();
    assert_eq!(sent.status, Some(0), "{sent:?}");
    assert_eq!(receiving.end().status, Some(0));
}

/// A terminal that stands still (Ctrl-S), where bars are drawn.
#[test]
fn a_terminal_that_stands_still_stops_nobody() {
    let terminal = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let slave = fs::File::options()
        .read(true)
        .write(true)
        .open(ptsname_r(&terminal).unwrap())
        .unwrap();
    tcflow(&slave, FlowArg::TCOOFF).unwrap();
    let options = "receive --device sim:id=a";
    for signal in ["none", "INT"] {
        let (receiving, to) = listen(words(&format!("{options} --listen 127.0.0.1:0")));
        let size = if signal == "none" { "8MiB" } else { "1024GiB" };
        let sending = start_with(
            words(&format!("send --to {to} --device sim:id=a,size={size}")),
            Stdio::piped(),
            slave.try_clone().unwrap().into(),
        );
        if signal == "none" {
            assert_eq!(receiving.end().status, Some(0));
            assert_eq!(sending.end().status, Some(0));
        } else {
            thread::sleep(Duration::from_millis(500));
            sending.signal(signal);
            assert_eq!(sending.end().status, Some(130));
            assert_eq!(receiving.end().status, Some(1));
        }
    }
}

#[test]
fn a_failure_is_said_before_its_object_is_printed() {
    let directory = Directory::new();
    let path = directory.file("socket");
    let receive = format!("receive --json --listen unix:{path} --device sim:id=a");
    // Each way out: the arguments' parser, a command, one that was interrupted, and one that was asked for
    // its end once more, while it waited for its peer.
    for (number, (line, interrupts, status)) in [
        ("send --json", 0, 2),
        ("replay --json /nowhere", 0, 1),
        ("demo --json --devices 1 --state 1024GiB", 1, 130),
        (&receive, 1, 130),
        (&receive, 2, 130),
    ]
    .into_iter()
    .enumerate()
    {
        let file = directory.file(&number.to_string());
        let both = fs::File::options().append(true).create(true).open(&file);
        let both = both.unwrap();
        let running = start_with(words(line), both.try_clone().unwrap().into(), both.into());
        let mut source = None;
        if line == receive {
            until("it listens", || {
                source = UnixStream::connect(&path).ok();
                source.is_some()
            });
            source.as_mut().unwrap().write_all(b"QEVM").unwrap();
        }
        for number in 0..interrupts {
            // The second comes while it still lingers.
            thread::sleep(Duration::from_millis(if number == 0 { 300 } else { 50 }));
            running.signal("INT");
        }
        let ended = running.end();
        assert_eq!(ended.status, Some(status), "{line}: {ended:?}");
        let said = fs::read_to_string(&file).unwrap();
        let (lines, object) = said.split_once("{\n").unwrap();
        let object = format!("{{{object}");
        let mut values = serde_json::Deserializer::from_str(&object).into_iter();
        let object: serde_json::Value = values.next().unwrap().unwrap();
        assert_eq!(crate::schema::misfit(&object), None, "{object}");
        let message = object["error"]["message"].as_str().unwrap();
        // The parser has lines of its own.
        let why = message.split("   ").next().unwrap();
        assert!(lines.contains(why), "{line}: {said}");
    }
}

#[test]
fn a_failure_is_said_where_nobody_reads_its_object() {
    let directory = Directory::new();
    let path = directory.file("stderr");
    for line in ["send --json", "replay --json /nowhere"] {
        let (unread, stdout) = full();
        let stderr = fs::File::create(&path).unwrap();
        let running = start_with(words(line), stdout.into(), stderr.into());
        until("it has said why", || {
            fs::read_to_string(&path).unwrap().ends_with('\n')
        });
        drop(unread);
        let ended = running.end();
        assert!(matches!(ended.status, Some(1 | 2)), "{ended:?}");
    }
}
