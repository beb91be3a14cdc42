//! The command's channels: greeted at the set-up and silent for longer than every time-out, carrying
//! PRE_COPY data for as long, and closed so that nothing is lost.

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use nix::sys::socket::{setsockopt, sockopt};
use vfio_migration::stream::{Command, Event, MAIN_MAGIC, SectionKind, Writer};

use crate::{
    command::{Directory, Running, listen, start, words},
    false_source::{config, packet, section_of},
};

fn receive(rest: &str) -> (Running, String) {
    listen(words(&format!("receive --listen 127.0.0.1:0 {rest}")))
}

// ------------------------------------------------------------------------------ a silent source

const ID: &str = "0000:00:03.0/vfio";

#[test]
fn a_destination_waits_for_a_source_whose_vm_runs_on() {
    thread::scope(|scope| {
        for over_channels in [false, true] {
            scope.spawn(move || waits(over_channels));
        }
    });
}

fn waits(over_channels: bool) {
    let directory = Directory::new();
    let path = directory.file("state");
    let agreed = if over_channels {
        "--precopy-over-channels"
    } else {
        ""
    };
    let options = format!("--channels 1 --timeout 3 {agreed} --device file:{path},id={ID}");
    let (receiving, to) = receive(&options);
    let mut main = Writer::open(TcpStream::connect(&to).unwrap()).unwrap();
    let mut channel = crate::false_source::channel(&to, 0);
    section_of(&mut main, ID, SectionKind::Start, |body| {
        if over_channels {
            body.setup_over_channels().unwrap();
        } else {
            body.setup().unwrap();
        }
    });
    // The main channel says that the source is there; the other says nothing.
    let hold = |main: &mut Writer<TcpStream>| {
        for _ in 0..10 {
            main.write(&Event::Command(Command::Ping(2))).unwrap();
            thread::sleep(Duration::from_millis(500));
        }
    };
    hold(&mut main);
    if over_channels {
        packet(&mut channel, ID, 0, b"first, ");
        hold(&mut main);
    }
    main.write(&Event::Command(Command::SwitchoverStart))
        .unwrap();
    if !over_channels {
        packet(&mut channel, ID, 0, b"first, ");
    }
    packet(&mut channel, ID, 1, b"second");
    config(&mut channel, ID, 2);
    crate::false_source::end(&mut main, ID);
    drop(channel);
    let mut replies = Vec::new();
    main.body().read_to_end(&mut replies).unwrap();
    let ended = receiving.end();
    assert_eq!(ended.status, Some(0), "{ended:?}");
    assert_eq!(replies[replies.len() - 8..], [0, 1, 0, 4, 0, 0, 0, 0]);
    assert_eq!(fs::read(&path).unwrap(), b"first, second");
}

// --------------------------------------------------------------------------------- a slow link

/// How much a channel's link passes on in each [`SLOT`].
const CHUNK: usize = 100_000;
const SLOT: Duration = Duration::from_millis(50);

/// Passes bytes on until they end, cleanly.
fn pump(mut from: TcpStream, mut to: TcpStream, slow: bool) {
    let mut bytes = vec![0; CHUNK];
    while let count @ 1.. = from.read(&mut bytes).expect("a clean end") {
        to.write_all(&bytes[..count]).unwrap();
        if slow {
            thread::sleep(SLOT.mul_f64(count as f64 / CHUNK as f64));
        }
    }
    let _closed = to.shutdown(Shutdown::Write);
}

/// A link of one migration: its channels are slow, hold little, and write back what nobody reads.
fn link(listener: &TcpListener, to: &str, channels: usize) {
    thread::scope(|scope| {
        for _ in 0..=channels {
            let source = listener.accept().unwrap().0;
            let destination = TcpStream::connect(to).unwrap();
            let mut magic = [0; 4];
            while source.peek(&mut magic).unwrap() < magic.len() {}
            let main = u32::from_be_bytes(magic) == MAIN_MAGIC;
            if main {
                let (from, to) = (
                    destination.try_clone().unwrap(),
                    source.try_clone().unwrap(),
                );
                scope.spawn(|| pump(from, to, false));
            } else {
                (&source).write_all(&[7; 500]).unwrap();
            }
            scope.spawn(move || pump(source, destination, !main));
        }
    });
}

/// What the devices give while they run takes longer than every time-out, with nothing standing still;
/// and the source's channels are read to their clean ends.
#[test]
fn a_slow_link_takes_as_long_as_it_takes_and_loses_nothing() {
    let begun = Instant::now();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    setsockopt(&listener, sockopt::RcvBuf, &(64 << 10)).unwrap();
    let address = listener.local_addr().unwrap();
    let options = "--channels 2 --timeout 3 --precopy-over-channels --json";
    let (receiving, to) = receive(&format!("{options} --device sim:id=a"));
    let linking = thread::spawn(move || link(&listener, &to, 2));
    let device = "sim:id=a,size=31MiB,precopy=30MiB,seed=7";
    let sent = start(words(&format!(
        "send --to {address} {options} --device {device}"
    )))
    .end();
    let received = receiving.end();
    let (sent, received) = (sent.json(), received.json());
    let digest = |json: &serde_json::Value| json["devices"][0]["state_sha256"].clone();
    assert!(digest(&sent).is_string());
    assert_eq!(digest(&sent), digest(&received));
    assert!(begun.elapsed() > Duration::from_secs(6), "it was no test");
    linking.join().unwrap();
}
