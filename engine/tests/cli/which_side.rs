//! Which side's devices run when the command has ended, by the states that its devices went through.

use std::{
    fs,
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::UnixListener,
};

use vfio_migration::stream::Reply;

use crate::command::{Directory, listen_under, start_under, words};

/// Says each change of state on stderr.
const LOG: &str = "export VFIO_MIGRATE_LOG=vfio_migration=debug";

/// The states that a device has been in, in their order, by the log.
fn states(stderr: &str, device: &str) -> Vec<String> {
    let name = format!("device={device} ");
    let changes = stderr.lines().filter(|line| {
        line.contains("migration_set_device_state") && format!("{line} ").contains(&name)
    });
    changes
        .map(|line| {
            let (_, state) = line.split_once("state=").unwrap();
            state.split_whitespace().next().unwrap().to_owned()
        })
        .collect()
}

/// A source that has sent all it has to a destination that says nothing of it.
#[test]
fn a_source_that_hears_no_verdict_keeps_its_devices_stopped_and_says_so() {
    for verdict in ["gone", "silent", "interrupted"] {
        let directory = Directory::new();
        let path = directory.file("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let timeout = if verdict == "silent" { 1 } else { 100_000 };
        let source = start_under(
            LOG,
            words(&format!(
                "send --to unix:{path} --channels 1 --timeout {timeout} --device sim:id=a sim:id=b"
            )),
        );
        let (mut main, _) = listener.accept().unwrap();
        let mut ready = Vec::new();
        Reply::Pong(1).write(&mut ready).unwrap();
        main.write_all(&ready).unwrap();
        let (mut channel, _) = listener.accept().unwrap();
        // All that the channel brings, and the main channel's end, which has the description.
        io::copy(&mut channel, &mut io::sink()).unwrap();
        let mut said = Vec::new();
        let mut buffer = [0; 4096];
        while !String::from_utf8_lossy(&said).contains("instance_id") {
            let count = main.read(&mut buffer).unwrap();
            said.extend_from_slice(&buffer[..count]);
        }
        match verdict {
            "gone" => main.shutdown(Shutdown::Both).unwrap(),
            "interrupted" => source.signal("INT"),
            _ => {}
        }
        drop(channel);
        let ended = source.end();
        let status = if verdict == "interrupted" { 130 } else { 1 };
        assert_eq!(ended.status, Some(status), "{verdict}: {ended:?}");
        for device in ["a", "b"] {
            let is = states(&ended.stderr, device);
            assert_eq!(is[is.len() - 2..], ["STOP_COPY", "STOP"], "{verdict}");
        }
        let said =
            "the devices stay stopped (a in STOP; b in STOP): they may run on the destination";
        assert!(ended.stderr.contains(said), "{verdict}: {ended:?}");
    }
}

/// All is loaded and started, and then one device's file cannot be kept.
#[test]
fn a_destination_that_cannot_keep_a_file_stops_all_its_devices() {
    let directory = Directory::new();
    let file = directory.file("state");
    let (receiving, to) = listen_under(
        LOG,
        words(&format!(
            "receive --listen tcp:127.0.0.1:0 --device sim:id=a file:{file},id=b sim:id=c"
        )),
    )
    .unwrap();
    // What somebody has put there is not replaced, and that is seen when the state is to appear.
    fs::write(&file, "somebody's").unwrap();
    let sending = start_under(
        LOG,
        words(&format!(
            "send --to {to} --device sim:id=a sim:id=b sim:id=c"
        )),
    );
    let (sent, received) = (sending.end(), receiving.end());
    assert_eq!((sent.status, received.status), (Some(1), Some(1)));
    assert!(received.stderr.contains("another process"), "{received:?}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "somebody's");
    for device in ["a", "b", "c"] {
        let is = states(&received.stderr, device);
        assert!(is.contains(&"RUNNING".to_owned()), "it had started");
        assert_eq!(is.last().unwrap(), "STOP", "{device}: {is:?}");
        // And its source has heard of that: the devices go on there.
        let is = states(&sent.stderr, device);
        assert!(is.contains(&"STOP_COPY".to_owned()), "it had stopped");
        assert_eq!(is.last().unwrap(), "RUNNING", "{device}: {is:?}");
    }
    assert!(!sent.stderr.contains("stay stopped"), "{sent:?}");
}

#[test]
fn a_migration_that_passes_leaves_the_destinations_devices_running() {
    let directory = Directory::new();
    let file = directory.file("state");
    let devices = format!("--device sim:id=a file:{file},id=b");
    let (receiving, to) = listen_under(
        LOG,
        words(&format!("receive --listen tcp:127.0.0.1:0 {devices}")),
    )
    .unwrap();
    let source = words(&format!("send --to {to} --device sim:id=a sim:id=b"));
    let (sent, received) = (start_under(LOG, source).end(), receiving.end());
    assert_eq!((sent.status, received.status), (Some(0), Some(0)));
    for device in ["a", "b"] {
        assert_eq!(states(&sent.stderr, device).last().unwrap(), "STOP");
        assert_eq!(states(&received.stderr, device).last().unwrap(), "RUNNING");
    }
}
