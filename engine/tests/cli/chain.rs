//! A migration through the command's relay: `send`, `relay` and `receive` with their defaults, and what
//! the relay says where one of its sides fails, vanishes or stands still.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    thread,
};

use crate::command::{Directory, Ended, Running, listen, start, words};

/// Where all listen: TCP, or a unix socket.
fn address(directory: &Directory, unix: bool, name: &str) -> String {
    if unix {
        format!("unix:{}", directory.file(name))
    } else {
        "127.0.0.1:0".into()
    }
}

/// A whole chain: how the source, the relay and the destination have ended.
fn chain(unix: bool, source: &str, relay: &str, destination: &str) -> [Ended; 3] {
    let directory = Directory::new();
    let at = address(&directory, unix, "destination");
    let (receiving, to) = listen(words(&format!("receive --listen {at} {destination}")));
    let at = address(&directory, unix, "relay");
    let (relaying, to) = listen(words(&format!("relay --listen {at} --to {to} {relay}")));
    let sent = start(words(&format!("send --to {to} {source}"))).end();
    [sent, relaying.end(), receiving.end()]
}

/// A chain that has passed: all of it says so.
fn passes(unix: bool, channels: &str, relay: &str, size: &str) {
    let source = format!("{channels} --device sim:id=a,{size}");
    let destination = format!("{channels} --device sim:id=a");
    let ended = chain(unix, &source, relay, &destination);
    let statuses = ended.each_ref().map(|ended| ended.status);
    assert_eq!(statuses, [Some(0); 3], "{source}, {relay}: {ended:?}");
}

#[test]
fn a_migration_passes_with_every_default() {
    for unix in [false, true] {
        for channels in [1, 2, 4, 16, 64] {
            let given = format!("--channels {channels}");
            for (all, relay) in [(&*given, ""), (&*given, &*given), ("", "")] {
                passes(unix, all, relay, "size=100KiB");
            }
        }
    }
}

/// As many as an id can name, and the relay has not been told how many there will be.
#[test]
fn as_many_channels_as_there_may_be_pass() {
    for unix in [false, true] {
        passes(unix, "--channels 255", "", "size=4MiB");
    }
}

/// Over both socket kinds by turns, whichever of the three processes is scheduled first.
#[test]
fn a_hundred_migrations_pass_in_a_row() {
    for round in 0..100 {
        let channels = format!("--channels {}", 1 << (round / 2 % 6));
        let size = format!("size=64KiB,seed={round}");
        passes(round % 2 == 1, &channels, "", &size);
    }
}

#[test]
fn a_migration_that_fails_is_a_failure_of_the_relay_too() {
    for relay in ["", "--channels 4"] {
        let [sent, relayed, received] =
            chain(true, "--device sim:id=a", relay, "--device sim:id=another");
        assert!(received.why().contains("device a"), "{received:?}");
        assert!(sent.why().contains("device a"), "{sent:?}");
        assert!(
            relayed.why().contains("the destination has failed"),
            "{relayed:?}"
        );
    }
}

/// A relay, and the destination's listener.
fn relay(directory: &Directory, rest: &str) -> (Running, UnixListener, String) {
    let destination = UnixListener::bind(directory.file("destination")).unwrap();
    let (relaying, to) = listen(words(&format!(
        "relay --listen unix:{} --to unix:{} --timeout 1 {rest}",
        directory.file("relay"),
        directory.file("destination")
    )));
    let path = to.strip_prefix("unix:").unwrap().to_owned();
    (relaying, destination, path)
}

#[test]
fn a_destination_that_keeps_its_main_channel_open_is_waited_for_no_longer_than_said() {
    let directory = Directory::new();
    let (relaying, destination, path) = relay(&directory, "");
    let mut source = UnixStream::connect(&path).unwrap();
    source.write_all(b"QEVM, and what a VM is").unwrap();
    let (mut main, _) = destination.accept().unwrap();
    drop(source);
    main.read_to_end(&mut Vec::new()).unwrap();
    let ended = relaying.end();
    assert!(
        ended
            .why()
            .contains("the destination has not ended its main channel"),
        "{ended:?}"
    );
}

#[test]
fn a_source_that_is_gone_before_its_channels_came_is_noticed() {
    for (said, why) in [
        (&b""[..], "0 of 2 multifd channels have come"),
        // PONG 1: there is a return path, and it ended without a word on the load.
        (
            &[0, 2, 0, 4, 0, 0, 0, 1],
            "without the word that all is loaded",
        ),
        // SHUT 1.
        (&[0, 1, 0, 4, 0, 0, 0, 1], "the destination has failed"),
    ] {
        let directory = Directory::new();
        let (relaying, destination, path) = relay(&directory, "--channels 2");
        let mut source = UnixStream::connect(&path).unwrap();
        source.write_all(b"QEVM").unwrap();
        let (mut main, _) = destination.accept().unwrap();
        main.write_all(said).unwrap();
        // In pieces, and read by the source before it is gone.
        source.read_exact(&mut vec![0; said.len()]).unwrap();
        drop(source);
        main.read_to_end(&mut Vec::new()).unwrap();
        drop(main);
        let ended = relaying.end();
        assert!(ended.why().contains(why), "{ended:?}");
    }
}

/// Each connection says that it is a channel, and no more.
#[test]
fn no_more_channels_come_than_an_id_can_name() {
    let directory = Directory::new();
    let (relaying, destination, path) = relay(&directory, "--budget 8MiB");
    let taking = thread::spawn(move || {
        let taken = destination.incoming().take(256).map(Result::unwrap);
        taken.collect::<Vec<_>>()
    });
    let mut channels = Vec::new();
    for _ in 0..257 {
        let mut channel = UnixStream::connect(&path).unwrap();
        // The last may be refused before it has said a word.
        let _said = channel.write_all(&0x1122_3344_u32.to_be_bytes());
        channels.push(channel);
    }
    let ended = relaying.end();
    assert!(
        ended.why().contains("more than 256 multifd channels"),
        "{ended:?}"
    );
    for channel in channels {
        let _gone = channel.shutdown(Shutdown::Both);
    }
    assert_eq!(taking.join().unwrap().len(), 256);
}
