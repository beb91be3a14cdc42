//! The command's files: what a failed, interrupted or killed migration leaves of them, what is never
//! written to, and that the source is told of success only when they are in their places.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
    process::Command,
};

use sha2::Digest;

use crate::{
    command::{Directory, Ended, listen, start, start_under, words},
    start::run,
};

fn receive(rest: &str) -> (crate::command::Running, String) {
    listen(words(&format!(
        "receive --listen 127.0.0.1:0 --channels 2 {rest}"
    )))
}

fn send(to: &str, rest: &str) -> Ended {
    start(words(&format!("send --to {to} --channels 2 {rest}"))).end()
}

/// A file with a state of that many bytes.
fn state(directory: &Directory, name: &str, len: usize, seed: u64) -> (String, Vec<u8>) {
    let bytes: Vec<u8> = (0..len as u64)
        .map(|at| crate::command::random(seed ^ at).to_le_bytes()[0])
        .collect();
    let path = directory.file(name);
    fs::write(&path, &bytes).unwrap();
    (path, bytes)
}

fn mode(path: &str) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

/// What a directory holds, but for the sources' files.
fn names(directory: &Directory) -> Vec<String> {
    let names = fs::read_dir(directory.path()).unwrap();
    let mut names: Vec<String> = names
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with("source"))
        .collect();
    names.sort();
    names
}

#[test]
fn a_state_is_its_owners_alone_and_an_old_file_keeps_its_mode() {
    let directory = Directory::new();
    let (source, bytes) = state(&directory, "source", 3 << 20, 1);
    let (new, old) = (directory.file("new"), directory.file("old"));
    fs::write(&old, "old").unwrap();
    fs::set_permissions(&old, fs::Permissions::from_mode(0o640)).unwrap();
    for (path, expected) in [(&new, 0o600), (&old, 0o640)] {
        let (receiving, to) = receive(&format!("--device file:{path},id=a"));
        let sent = send(&to, &format!("--device file:{source},id=a"));
        assert_eq!((sent.status, receiving.end().status), (Some(0), Some(0)));
        assert_eq!(fs::read(path).unwrap(), bytes);
        assert_eq!(mode(path), expected);
    }
    assert_eq!(names(&directory), ["new", "old"]);
}

/// Both have begun before one of them ends. Whoever comes second is told so, and so is its source.
#[test]
fn two_destinations_of_one_path_do_not_mix() {
    let directory = Directory::new();
    let (one, first) = state(&directory, "source1", 2 << 20, 1);
    let (other, _) = state(&directory, "source2", 3 << 20, 2);
    let path = directory.file("state");
    let device = format!("--device file:{path},id=a");
    let (receiving, to) = receive(&device);
    let (late, late_to) = receive(&device);
    let sent = send(&to, &format!("--device file:{one},id=a"));
    assert_eq!((sent.status, receiving.end().status), (Some(0), Some(0)));
    let sent = send(&late_to, &format!("--device file:{other},id=a"));
    let late = late.end();
    assert!(late.why().contains("another process"), "{late:?}");
    assert!(sent.why().contains("another process"), "{sent:?}");
    assert_eq!(fs::read(&path).unwrap(), first);
    assert_eq!(names(&directory), ["state"]);
}

#[test]
fn a_planted_link_is_not_followed() {
    let directory = Directory::new();
    let (source, bytes) = state(&directory, "source", 1 << 20, 1);
    let precious = directory.file("precious");
    fs::write(&precious, "precious").unwrap();
    let path = directory.file("state");
    symlink(&precious, format!("{path}.partial")).unwrap();
    let (receiving, to) = receive(&format!("--device file:{path},id=a"));
    let sent = send(&to, &format!("--device file:{source},id=a"));
    assert_eq!((sent.status, receiving.end().status), (Some(0), Some(0)));
    assert_eq!(fs::read(&path).unwrap(), bytes);
    assert_eq!(fs::read(&precious).unwrap(), b"precious");
    assert_eq!(names(&directory), ["precious", "state", "state.partial"]);
}

#[test]
fn what_is_no_regular_file_is_refused_before_anybody_may_connect() {
    let directory = Directory::new();
    let precious = directory.file("precious");
    fs::write(&precious, "precious").unwrap();
    symlink(&precious, directory.file("link")).unwrap();
    symlink(directory.file("nothing"), directory.file("dangling")).unwrap();
    fs::create_dir(directory.file("directory")).unwrap();
    let fifo = Command::new("mkfifo").arg(directory.file("fifo")).status();
    assert!(fifo.unwrap().success());
    let _socket = std::os::unix::net::UnixListener::bind(directory.file("socket")).unwrap();
    let mut cases = vec![
        "link",
        "dangling",
        "directory",
        "fifo",
        "socket",
        "none/state",
    ];
    let node = Command::new("mknod")
        .args([&directory.file("node"), "c", "1", "3"])
        .output();
    if node.unwrap().status.success() {
        cases.push("node");
    } else {
        println!("without root no device node can be made: not tried");
    }
    let before = names(&directory);
    for case in &cases {
        let path = directory.file(case);
        let options = format!("--device file:{path},id=a --accept-timeout 20");
        let ended = run(words(&format!("receive --listen 127.0.0.1:0 {options}")));
        assert!(ended.why().contains(&path), "{ended:?}");
        assert!(!ended.stderr.contains("listening"), "{ended:?}");
    }
    assert_eq!(names(&directory), before);
    assert_eq!(fs::read(&precious).unwrap(), b"precious");
    for case in cases {
        let path = directory.file(case);
        for command in [
            format!("send --to 127.0.0.1:9 --connect-timeout 0.1 --device file:{path},id=a"),
            format!("inspect {path}"),
            format!("replay {path}"),
        ] {
            if case == "link" {
                continue;
            }
            let ended = run(words(&command));
            assert!(ended.why().contains(&path), "{ended:?}");
        }
    }
}

#[test]
fn a_directory_that_cannot_be_written_to_is_refused_first() {
    let path = "/proc/self/state";
    let ended = run(words(&format!(
        "receive --listen 127.0.0.1:0 --accept-timeout 20 --device file:{path},id=a"
    )));
    assert_ne!(ended.status, Some(0));
    assert!(ended.stderr.contains(path), "{ended:?}");
    assert!(!ended.stderr.contains("Panic"), "{ended:?}");
}

/// After the last look at it, and before anything is written or read.
#[test]
fn a_file_that_is_gone_by_then_is_named_on_both_sides() {
    let directory = Directory::new();
    let (source, _) = state(&directory, "source", 1000, 1);
    let folder = directory.file("folder");
    let path = format!("{folder}/state");
    fs::create_dir(&folder).unwrap();
    let (receiving, to) = receive(&format!("--json --device file:{path},id=nic"));
    fs::remove_dir(&folder).unwrap();
    let sent = send(&to, &format!("--device file:{source},id=nic"));
    let received = receiving.end();
    for ended in [&sent, &received] {
        assert_eq!(ended.status, Some(1), "{ended:?}");
        assert_eq!(ended.stderr.matches(&path).count(), 1, "{ended:?}");
        assert_eq!(ended.stderr.matches("os error").count(), 1, "{ended:?}");
    }
    // Which of them it is the file system decides.
    let object = crate::schema::object(&received.stdout);
    let errno = object["error"]["errno"].as_i64().unwrap();
    assert!(
        [libc::ENOENT, libc::EPERM].contains(&i32::try_from(errno).unwrap()),
        "{object}"
    );
    assert_eq!(names(&directory), [] as [&str; 0]);
}

#[test]
fn two_spellings_of_one_file_are_refused() {
    let directory = Directory::new();
    let path = directory.file("state");
    let name = directory.path().file_name().unwrap().to_str().unwrap();
    let other = directory.file(&format!("../{name}/state"));
    let ended = run(words(&format!(
        "receive --listen 127.0.0.1:0 --device file:{path},id=a file:{other},id=b"
    )));
    assert_eq!(ended.status, Some(2), "{ended:?}");
    assert!(ended.stderr.contains("one file"), "{ended:?}");
    assert!(!ended.stderr.contains("listening"), "{ended:?}");
}

/// Names that the old way to write a file would have taken from each other.
#[test]
fn a_path_beside_its_partial_keeps_both_states() {
    let directory = Directory::new();
    let (one, first) = state(&directory, "source1", 1 << 20, 1);
    let (other, second) = state(&directory, "source2", 2 << 20, 2);
    let path = directory.file("x");
    let devices = format!("--device file:{path},id=a file:{path}.partial,id=b");
    let (receiving, to) = receive(&devices);
    let sent = send(&to, &format!("--device file:{one},id=a file:{other},id=b"));
    assert_eq!((sent.status, receiving.end().status), (Some(0), Some(0)));
    assert_eq!(fs::read(&path).unwrap(), first);
    assert_eq!(fs::read(format!("{path}.partial")).unwrap(), second);
}

/// The second file cannot be kept: neither appears, and the source, which was told nothing yet, is
/// told of the failure.
#[test]
fn the_files_of_a_migration_appear_together_and_before_the_source_is_told() {
    for replaced in [false, true] {
        let directory = Directory::new();
        let (one, _) = state(&directory, "source1", 1 << 20, 1);
        let (other, _) = state(&directory, "source2", 1 << 20, 2);
        let (a, b) = (directory.file("a"), directory.file("b"));
        if replaced {
            fs::write(&a, "old").unwrap();
        }
        let (receiving, to) = receive(&format!("--device file:{a},id=a file:{b},id=b"));
        fs::write(&b, "theirs").unwrap();
        let sent = send(&to, &format!("--device file:{one},id=a file:{other},id=b"));
        let received = receiving.end();
        assert!(received.why().contains(&b), "{received:?}");
        assert!(sent.why().contains(&b), "{sent:?}");
        assert_eq!(fs::read(&b).unwrap(), b"theirs");
        if replaced {
            assert_eq!(fs::read(&a).unwrap(), b"old");
            assert_eq!(names(&directory), ["a", "b"]);
        } else {
            assert_eq!(names(&directory), ["b"]);
        }
    }
}

#[test]
fn a_destination_that_is_killed_leaves_what_was_there() {
    let directory = Directory::new();
    let path = directory.file("state");
    fs::write(&path, "old").unwrap();
    for signal in ["KILL", "TERM", "INT"] {
        let (receiving, to) = receive(&format!("--device file:{path},id=a"));
        let sending = start(words(&format!(
            "send --to {to} --channels 2 --device sim:id=a,size=1024GiB"
        )));
        // Until bytes have come, as the file without a name shows.
        let open = format!("/proc/{}/fd", receiving.id());
        while !fs::read_dir(&open).unwrap().any(|fd| {
            let fd = fd.unwrap().path();
            let here = fs::read_link(&fd).is_ok_and(|to| to.starts_with(directory.path()));
            here && fs::metadata(&fd).is_ok_and(|meta| meta.is_file() && meta.len() > 1 << 20)
        }) {
            std::thread::yield_now();
        }
        receiving.signal(signal);
        receiving.end();
        assert_ne!(sending.end().status, Some(0));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(&directory), ["state"], "{signal}");
    }
}

// ------------------------------------------------------------------------------------- replay

/// A captured channel with these devices' states.
fn capture(path: &str, devices: &[(&str, u32)]) {
    use vfio_migration::{
        DeviceId,
        wire::{DeviceKey, Hello, encode_packet, wrap_config},
    };
    let hello = Hello {
        uuid: [0; 16],
        id: 0,
    };
    let mut bytes = hello.encode().to_vec();
    for (number, (name, instance)) in (0_u32..).zip(devices) {
        let key = DeviceKey::new(&DeviceId::new(*name, *instance).unwrap());
        bytes.extend(encode_packet(&key, 0, false, 4));
        bytes.extend(number.to_be_bytes());
        let config = wrap_config(b"config");
        let len = u32::try_from(config.len()).unwrap();
        bytes.extend(encode_packet(&key, 1, true, len));
        bytes.extend(config);
    }
    fs::write(path, bytes).unwrap();
}

/// A limit that the devices' own pipes and files take up: none is left for anything besides.
#[test]
fn replay_opens_its_directory_once() {
    const DEVICES: u32 = 150;
    let directory = Directory::new();
    let (channel, out) = (directory.file("channel"), directory.file("out"));
    let devices: Vec<_> = (0..DEVICES).map(|instance| ("many", instance)).collect();
    capture(&channel, &devices);
    let limit = format!("ulimit -n {}", 5 * DEVICES + 100);
    let ended = start_under(&limit, ["replay", "--out", &out, &channel]).end();
    assert_eq!(ended.status, Some(0), "{ended:?}");
    let files = fs::read_dir(&out).unwrap().count();
    assert_eq!(files, 2 * DEVICES as usize);
}

#[test]
fn replay_overwrites_only_when_it_is_told_to() {
    let directory = Directory::new();
    let (channel, out) = (directory.file("channel"), directory.file("out"));
    capture(&channel, &[("a", 0)]);
    fs::create_dir(&out).unwrap();
    let kept = Path::new(&out).join("a-0.config");
    fs::write(&kept, "precious").unwrap();
    let ended = run(["replay", "--out", &out, &channel]);
    assert_eq!(ended.status, Some(2), "{ended:?}");
    assert!(ended.stderr.contains("--force"), "{ended:?}");
    assert_eq!(fs::read(&kept).unwrap(), b"precious");
    assert_eq!(fs::read_dir(&out).unwrap().count(), 1);
    let ended = run(["replay", "--force", "--out", &out, &channel]);
    assert_eq!(ended.status, Some(0), "{ended:?}");
    assert_ne!(fs::read(&kept).unwrap(), b"precious");
    let state = Path::new(&out).join("a-0.state");
    assert_eq!(fs::read(&state).unwrap(), [0; 4]);
    assert_eq!(mode(state.to_str().unwrap()), 0o600);
    assert_eq!(fs::read_dir(&out).unwrap().count(), 2);
}

/// Names that are too long, and names that would be the same: the output says which file is whose.
#[test]
fn replay_finds_a_name_for_every_device() {
    let directory = Directory::new();
    let (channel, out) = (directory.file("channel"), directory.file("out"));
    let long = "x".repeat(255);
    let other = format!("{}y", "x".repeat(254));
    // What the second of the first two will be called instead.
    let digest: String = sha2::Sha256::digest("a_b")[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let crafted = format!("a/b-{digest}");
    let devices = [
        ("a/b", 0),
        ("a_b", 0),
        (&*crafted, 0),
        (&*long, 1),
        (&*other, 1),
    ];
    capture(&channel, &devices);
    let ended = run(["replay", "--json", "--out", &out, &channel]);
    let json = ended.json();
    let shown = json["devices"].as_array().unwrap();
    assert_eq!(shown.len(), devices.len());
    for (number, (name, _)) in (0_u32..).zip(devices) {
        let device = shown.iter().find(|device| device["idstr"] == name).unwrap();
        let file = device["state_file"].as_str().unwrap();
        assert_eq!(fs::read(file).unwrap(), number.to_be_bytes(), "{name}");
    }
    assert_eq!(fs::read_dir(&out).unwrap().count(), 2 * devices.len());
}
