//! A peer whose host vanishes: with bytes under way that nobody acknowledges, and with none.
//!
//! In a network namespace of the test's own, whose loopback goes down.

use std::{
    io::{Read, Write},
    net::TcpListener,
    os::unix::net::UnixStream,
    thread,
    time::Duration,
};

use crate::{
    command::{Directory, listen, start, words},
    network::{in_a_network_of_its_own, ip},
};

#[test]
fn a_relay_finds_a_destination_whose_host_is_gone() {
    for busy in [true, false] {
        in_a_network_of_its_own(move || {
            let directory = Directory::new();
            let path = directory.file("relay");
            let destination = TcpListener::bind("127.0.0.1:0").unwrap();
            let to = destination.local_addr().unwrap();
            let line = format!("relay --timeout 2 --listen unix:{path} --to {to}");
            let (relay, _) = listen(words(&line));
            let mut source = UnixStream::connect(&path).unwrap();
            source.write_all(b"QEVM").unwrap();
            let (mut main, _) = destination.accept().unwrap();
            main.read_exact(&mut [0; 4]).unwrap();
            assert!(ip("link set lo down"));
            if busy {
                source.write_all(&[0; 1000]).unwrap();
            }
            // The watchdog is the test: it would be there for a quarter of an hour.
            let ended = relay.end();
            assert!(ended.why().contains("main channel"), "{ended:?}");
            drop((source, main));
        });
    }
}

#[test]
fn a_source_and_a_destination_find_each_others_host_gone() {
    in_a_network_of_its_own(|| {
        let options = "--timeout 2 --channels 2 --device sim:id=a";
        let (receiving, to) = listen(words(&format!("receive {options} --listen 127.0.0.1:0")));
        let sending = start(words(&format!("send {options},size=1024GiB --to {to}")));
        thread::sleep(Duration::from_millis(700));
        assert!(ip("link set lo down"));
        for ended in [sending.end(), receiving.end()] {
            assert!(ended.why().len() > 20, "{ended:?}");
        }
    });
}
