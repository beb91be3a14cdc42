//! What cannot pass: it is named, and ends both sides.

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    thread::{self},
    time::{Duration, Instant},
};

use crate::command::{Directory, WATCHDOG};

use super::{
    fed::{config, hello, packet, ram, sync},
    received::same,
    sink::{Sink, feed, relay},
};

#[test]
fn what_a_source_does_wrong_is_named_and_ends_both_sides() {
    let beginning = || [hello(0), sync(0)].concat();
    let mut version = packet(1, 3, b"x");
    version[276 + 3] = 1;
    let mut cases = vec![
        (
            [beginning(), packet(1, 0, b"x"), version].concat(),
            "channel 0",
            "unknown packet version 1",
        ),
        (
            [beginning(), packet(1, 4, b"x"), packet(1, 4, b"x")].concat(),
            "device 0000:00:01.0/vfio, channel 0, idx 4",
            "a second packet with this idx",
        ),
        (
            [beginning(), config(2, 1), packet(2, 2, b"x")].concat(),
            "device 0000:00:02.0/vfio, channel 0, idx 2",
            "idx above the config packet's",
        ),
        (
            // The source dies within a packet.
            [&beginning()[..], &packet(1, 0, b"12345")[..290]].concat(),
            "device 0000:00:01.0/vfio, channel 0, idx 0",
            "the channel ended inside a packet",
        ),
        (
            [&beginning()[..], &ram(1)[..2000]].concat(),
            "channel 0",
            "the channel ended inside a packet",
        ),
        (hello(0), "channel 0", "the channel ended inside a packet"),
        (
            [beginning(), packet(1, 0, b"x"), packet(1, 2, b"x")].concat(),
            "device 0000:00:01.0/vfio, idx 1",
            "the input has ended without this packet",
        ),
        (
            [
                beginning(),
                packet(1, 0, b"x"),
                packet(2, 0, b"x"),
                config(1, 1),
            ]
            .concat(),
            "device 0000:00:02.0/vfio, idx 1",
            "the input has ended without this packet",
        ),
        (
            [
                beginning(),
                (1..=3).flat_map(|device| config(device, 0)).collect(),
            ]
            .concat(),
            "device 0000:00:03.0/vfio, channel 0, idx 0",
            "more devices than max_devices",
        ),
    ];
    let mut huge = packet(1, 0, b"x");
    huge[272..276].copy_from_slice(&u32::MAX.to_be_bytes());
    cases.push((
        [beginning(), huge].concat(),
        "channel 0",
        "packet of 4294967295 bytes",
    ));
    for (sent, place, what) in cases {
        let directory = Directory::new();
        let sink = Sink::new(&directory, 1);
        let options = "--channels 1 --max-devices 2";
        let (relay, from) = relay(&directory, &sink.address, options);
        let fed = feed(&from, sent, usize::MAX);
        let ended = relay.end();
        let why = ended.why();
        assert!(why.contains(place) && why.contains(what), "{why}");
        // Both sides are let go.
        sink.end();
        fed.join().unwrap();
    }
}

/// A destination that has replied, and ends without its last word because the relay hung up, knows nothing of
/// what the relay refused.
#[test]
fn the_relays_own_reason_is_said_where_the_destination_is_silent() {
    let directory = Directory::new();
    let there = directory.file("there");
    let destination = UnixListener::bind(&there).unwrap();
    let (relay, path) = relay(&directory, &format!("unix:{there}"), "");
    let mut main = UnixStream::connect(&path).unwrap();
    main.write_all(b"QEVM\0\0\0\x03").unwrap();
    let (mut replies, _) = destination.accept().unwrap();
    // A pong.
    replies.write_all(&[0, 2, 0, 4, 0, 0, 0, 1]).unwrap();
    let mut pong = [0; 8];
    main.read_exact(&mut pong).unwrap();
    let mut version = packet(1, 0, b"x");
    version[276 + 3] = 1;
    let source = feed(&path, [hello(0), sync(0), version].concat(), usize::MAX);
    let (mut channel, _) = destination.accept().unwrap();
    let mut rest = Vec::new();
    let _reset = channel.read_to_end(&mut rest);
    let _reset = replies.read_to_end(&mut rest);
    drop(replies);
    let ended = relay.end();
    assert!(
        ended.why().contains("unknown packet version 1"),
        "{ended:?}"
    );
    source.join().unwrap();
}

#[test]
fn two_channels_of_one_id_are_refused() {
    let directory = Directory::new();
    let sink = Sink::new(&directory, 2);
    let (relay, from) = relay(&directory, &sink.address, "--channels 2");
    let beginning = [hello(5), sync(0)].concat();
    let mut open = UnixStream::connect(&from).unwrap();
    open.write_all(&beginning).unwrap();
    let fed = feed(&from, beginning, usize::MAX);
    let ended = relay.end();
    assert!(
        ended.why().contains("a second hello with channel id 5"),
        "{ended:?}"
    );
    fed.join().unwrap();
    // The other channel was hung up on as well, and a read ends.
    assert_eq!(open.read(&mut [0; 1]).unwrap_or(0), 0);
    sink.end();
}

#[test]
fn a_source_that_is_killed_takes_the_destination_with_it() {
    let directory = Directory::new();
    let sink = Sink::new(&directory, 3);
    let (relay, from) = relay(&directory, &sink.address, "");
    let mut main = UnixStream::connect(&from).unwrap();
    main.write_all(b"QEVM, and so on").unwrap();
    let mut channels: Vec<_> = (0..2)
        .map(|id| {
            let mut socket = UnixStream::connect(&from).unwrap();
            socket.write_all(&hello(id)).unwrap();
            socket.write_all(&sync(0)).unwrap();
            socket
        })
        .collect();
    channels[1].write_all(&packet(1, 0, &[1; 5000])).unwrap();
    channels[1]
        .write_all(&packet(1, 1, &[1; 5000])[..3000])
        .unwrap();
    drop((main, channels));
    let ended = relay.end();
    let why = ended.why();
    assert!(why.contains("the channel ended inside a packet"), "{why}");
    assert!(
        why.contains("device 0000:00:01.0/vfio") && why.contains("idx 1"),
        "{why}"
    );
    assert_eq!(sink.end().len(), 3);
}

#[test]
fn a_destination_that_is_gone_takes_the_source_with_it() {
    let directory = Directory::new();
    let path = directory.path().join("to");
    let listener = UnixListener::bind(&path).unwrap();
    let to = format!("unix:{}", path.display());
    let (relay, from) = relay(&directory, &to, "--channels 1");
    let mut source = UnixStream::connect(&from).unwrap();
    source.write_all(&[hello(0), sync(0)].concat()).unwrap();
    let (mut destination, _) = listener.accept().unwrap();
    let beginning = [hello(0), sync(0)].concat().len();
    destination.read_exact(&mut vec![0; beginning]).unwrap();
    drop(destination);
    // Ends: the relay finds out at one of its next writes, and hangs up.
    let mut index = 0;
    while source.write_all(&packet(1, index, &[1; 5000])).is_ok() {
        index += 1;
    }
    let ended = relay.end();
    let why = ended.why();
    let place = "send, device 0000:00:01.0/vfio, channel 0, idx ";
    assert!(
        why.contains(place) && why.contains("the connection failed"),
        "{why}"
    );
}

#[test]
fn without_a_destination_the_source_is_told() {
    let directory = Directory::new();
    let to = format!("unix:{}", directory.file("nobody"));
    let (relay, from) = relay(&directory, &to, "--connect-timeout 0.1");
    let fed = feed(&from, b"QEVM".to_vec(), usize::MAX);
    let ended = relay.end();
    assert!(ended.why().contains("cannot connect to unix:"), "{ended:?}");
    assert_eq!(fed.join().unwrap(), b"");
}

#[test]
fn a_connection_that_is_neither_is_closed() {
    let directory = Directory::new();
    let sink = Sink::new(&directory, 1);
    let (relay, from) = relay(&directory, &sink.address, "--channels 1");
    let wrong = feed(&from, b"GET / HTTP/1.0".to_vec(), usize::MAX);
    assert_eq!(wrong.join().unwrap(), b"");
    let sent = [hello(0), sync(0), config(1, 0)].concat();
    let fed = feed(&from, sent.clone(), usize::MAX);
    let ended = relay.end();
    assert!(ended.stderr.contains("0x47455420"), "{ended:?}");
    ended.json();
    fed.join().unwrap();
    same(&[sent], &sink.end());
}

#[test]
fn a_source_that_never_comes_is_waited_for_no_longer_than_said() {
    let directory = Directory::new();
    for (options, what) in [
        ("--accept-timeout 0.2", "no source has connected"),
        (
            "--accept-timeout 0.2 --channels 2",
            "0 of 2 multifd channels",
        ),
    ] {
        let (relay, _) = relay(&directory, "127.0.0.1:9", options);
        let ended = relay.end();
        assert!(ended.why().contains(what), "{ended:?}");
    }
}

#[test]
fn a_missing_packet_is_waited_for_no_longer_than_said() {
    let directory = Directory::new();
    let sink = Sink::new(&directory, 1);
    let (relay, from) = relay(&directory, &sink.address, "--channels 1 --timeout 0.5");
    let mut source = UnixStream::connect(&from).unwrap();
    let sent = [hello(0), sync(0), packet(1, 0, b"x"), packet(1, 2, b"x")].concat();
    source.write_all(&sent).unwrap();
    let ended = relay.end();
    let why = ended.why();
    assert!(why.contains("device 0000:00:01.0/vfio, idx 1"), "{why}");
    assert!(why.contains("no progress"), "{why}");
    sink.end();
}

#[test]
fn an_interrupt_ends_it_in_order() {
    let directory = Directory::new();
    let sink = Sink::new(&directory, 1);
    let (relay, from) = relay(&directory, &sink.address, "--channels 1");
    let mut source = UnixStream::connect(&from).unwrap();
    let sent = [hello(0), sync(0), packet(1, 0, b"x")].concat();
    source.write_all(&sent).unwrap();
    // Not before it is in the middle of it.
    let deadline = Instant::now() + WATCHDOG;
    while !sink.accepting.is_finished() && Instant::now() < deadline {
        relay.signal("INT");
        thread::sleep(Duration::from_millis(20));
        if source.write_all(&sync(1)).is_err() {
            break;
        }
    }
    assert_eq!(relay.end().status, Some(130));
    sink.end();
}
