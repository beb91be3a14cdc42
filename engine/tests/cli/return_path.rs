//! A destination that says more on the return path than anybody asked for.

use std::{fs, io::Write, os::unix::net::UnixListener};

use vfio_migration::stream::Reply;

use crate::command::{Directory, start, words};

/// The most memory that a process has had, in KiB.
fn peak(id: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let number = line.unwrap().split_whitespace().nth(1).unwrap();
    number.parse().unwrap()
}

/// More than a source could keep reply by reply, from a destination that does not read: then the source's
/// main thread waits in the middle of what it says, and takes no reply in.
#[test]
fn a_flood_of_replies_costs_the_source_no_memory() {
    const REPLIES: usize = 1 << 20;
    let directory = Directory::new();
    let path = directory.file("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let devices = (0..400).map(|number| format!(" sim:id={number:0>200},size=24"));
    let devices: String = devices.collect();
    let source = start(words(&format!("send --to unix:{path} --device {devices}")));
    let (mut main, _) = listener.accept().unwrap();
    let before = peak(source.id());
    let mut pong = Vec::new();
    // Not the one that the source will wait for.
    Reply::Pong(77).write(&mut pong).unwrap();
    // Ends when the source has read all but what the socket holds.
    main.write_all(&pong.repeat(REPLIES)).unwrap();
    let grown = peak(source.id()) - before;
    assert!(grown < 16 << 10, "{grown} KiB for {REPLIES} replies");
    drop(main);
    let ended = source.end();
    let why = ended.why();
    assert!(why.contains("the destination has gone away"), "{why}");
}
