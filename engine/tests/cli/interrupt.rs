//! Who is told to end ends, tells its peer and leaves nothing behind: while the peer reads nothing or
//! stands still, and by each signal.

use std::{
    fs,
    io::Write,
    os::unix::net::{UnixListener, UnixStream},
    process::Stdio,
    thread,
    time::Duration,
};

use vfio_migration::stream::{Command, Event, Reply, Writer};

use crate::{
    command::{Directory, Running, listen, start, start_under, words},
    start::start_under_with,
};

/// Longer than any watchdog: nothing here ends by itself.
const LONG: &str = "--timeout 100000";

const SIGNALS: [&str; 3] = ["INT", "TERM", "HUP"];

fn pause() {
    thread::sleep(Duration::from_millis(500));
}

#[test]
fn a_source_that_does_not_read_the_return_path() {
    for signal in SIGNALS {
        let directory = Directory::new();
        let path = directory.file("socket");
        let (receiving, _) = listen(words(&format!(
            "receive --listen unix:{path} {LONG} --device file:{},id=a",
            directory.file("state")
        )));
        let socket = UnixStream::connect(&path).unwrap();
        socket
            .set_write_timeout(Some(Duration::from_secs(2)))
            .unwrap();
        let mut main = Writer::open(socket).unwrap();
        // Each ping wants a pong, until no more of them fit.
        while main.write(&Event::Command(Command::Ping(2))).is_ok() {}
        receiving.signal(signal);
        let ended = receiving.end();
        assert_eq!(ended.status, Some(130), "{ended:?}");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}

#[test]
fn a_destination_that_does_not_read_the_main_channel() {
    for signal in SIGNALS {
        let directory = Directory::new();
        let path = directory.file("socket");
        let listener = UnixListener::bind(&path).unwrap();
        // More of them than the socket holds sections.
        let devices = (0..400).map(|number| format!(" sim:id={number:0>200},size=24"));
        let devices: String = devices.collect();
        let source = start(words(&format!(
            "send --to unix:{path} {LONG} --device {devices}"
        )));
        let (_main, _) = listener.accept().unwrap();
        pause();
        source.signal(signal);
        let ended = source.end();
        assert_eq!(ended.status, Some(130), "{ended:?}");
    }
}

/// A migration that stands in its middle, for each signal and each side that it is sent to: `test` gets the
/// signal, who is told, its peer, and the directory in which the destination's file would be.
fn in_the_middle(test: impl Fn(&str, Running, Running, &Directory)) {
    for signal in SIGNALS {
        for at_the_source in [true, false] {
            let directory = Directory::new();
            let (path, file) = (directory.file("socket"), directory.file("state"));
            let (receiving, to) = listen(words(&format!(
                "receive --listen unix:{path} {LONG} --device file:{file},id=b sim:id=a"
            )));
            let sending = start(words(&format!(
                "send --to {to} {LONG} --device sim:id=a,size=1024GiB sim:id=b"
            )));
            pause();
            let (told, other) = if at_the_source {
                (sending, receiving)
            } else {
                (receiving, sending)
            };
            test(signal, told, other, &directory);
        }
    }
}

#[test]
fn a_peer_that_stands_still() {
    in_the_middle(|signal, told, mut stopped, directory| {
        stopped.signal("STOP");
        pause();
        told.signal(signal);
        let ended = told.end();
        assert_eq!(ended.status, Some(130), "{ended:?}");
        stopped.kill();
        stopped.end();
        assert!(!fs::exists(directory.file("state")).unwrap());
    });
}

#[test]
fn each_signal_is_told_to_the_other_and_leaves_nothing() {
    in_the_middle(|signal, told, other, directory| {
        told.signal(signal);
        let ended = told.end();
        assert_eq!(ended.status, Some(130), "{ended:?}");
        let other = other.end();
        assert!(other.why().contains("failed: interrupted"), "{other:?}");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    });
}

#[test]
fn a_hang_up_that_is_ignored_stays_so() {
    let directory = Directory::new();
    let path = directory.file("socket");
    let receiving = start_under(
        "trap '' HUP",
        words(&format!("receive --listen unix:{path} --device sim:id=a")),
    );
    while UnixStream::connect(&path).is_err() {
        thread::sleep(Duration::from_millis(5));
    }
    receiving.signal("HUP");
    pause();
    let sent = start(words(&format!("send --to unix:{path} --device sim:id=a"))).end();
    assert_eq!(sent.status, Some(0), "{sent:?}");
    assert_eq!(receiving.end().status, Some(0));
}

#[test]
fn a_file_that_may_not_grow_is_an_error_with_its_errno() {
    for backend in ["uring", "blocking"] {
        let directory = Directory::new();
        let (path, file) = (directory.file("socket"), directory.file("state"));
        let receiving = start_under(
            "ulimit -f 64",
            words(&format!(
                "receive --listen unix:{path} --backend {backend} --device file:{file},id=a"
            )),
        );
        let sent = start(words(&format!(
            "send --to unix:{path} --device sim:id=a,size=3MiB"
        )));
        let (sent, received) = (sent.end(), receiving.end());
        for ended in [&sent, &received] {
            let why = ended.why();
            assert!(
                why.contains("os error 27") && why.contains("device a"),
                "{why}"
            );
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}

#[test]
fn an_output_that_may_not_grow_is_an_error_with_its_errno() {
    let directory = Directory::new();
    let output = fs::File::create(directory.file("output")).unwrap();
    let ended = start_under_with(
        "ulimit -f 0",
        words("demo --devices 1 --state 4KiB"),
        output.into(),
        Stdio::piped(),
    );
    let ended = ended.end();
    assert!(ended.why().contains("os error 27"), "{ended:?}");
}

#[test]
fn success_that_is_said_too_soon_is_not_believed() {
    let directory = Directory::new();
    let path = directory.file("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let source = start(words(&format!(
        "send --to unix:{path} {LONG} --device sim:id=a"
    )));
    let (mut main, _) = listener.accept().unwrap();
    let mut done = Vec::new();
    Reply::Shut(0).write(&mut done).unwrap();
    main.write_all(&done).unwrap();
    let ended = source.end();
    let why = ended.why();
    assert!(
        why.contains("the destination says that all is loaded"),
        "{why}"
    );
}

/// All was sent, and the destination is gone without its last word.
#[test]
fn a_source_that_does_not_know_says_so() {
    for signal in ["none", "INT"] {
        let directory = Directory::new();
        let path = directory.file("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let source = start(words(&format!(
            "send --to unix:{path} --channels 1 {LONG} --device sim:id=a"
        )));
        let (mut main, _) = listener.accept().unwrap();
        let mut ready = Vec::new();
        Reply::Pong(1).write(&mut ready).unwrap();
        main.write_all(&ready).unwrap();
        let (mut channel, _) = listener.accept().unwrap();
        // All that the channel brings, and then the main channel's end, which has the description.
        std::io::copy(&mut channel, &mut std::io::sink()).unwrap();
        let mut said = Vec::new();
        let mut buffer = [0; 4096];
        while !String::from_utf8_lossy(&said).contains("instance_id") {
            let count = std::io::Read::read(&mut main, &mut buffer).unwrap();
            said.extend_from_slice(&buffer[..count]);
        }
        if signal == "none" {
            drop(main);
        } else {
            source.signal(signal);
        }
        drop(channel);
        let ended = source.end();
        let status = if signal == "none" { 1 } else { 130 };
        assert_eq!(ended.status, Some(status), "{ended:?}");
        assert!(
            ended.stderr.contains("the destination's status alone says"),
            "{ended:?}"
        );
    }
}
