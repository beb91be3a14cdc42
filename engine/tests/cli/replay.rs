//! The command's replay and inspect, on streams that were recorded between two QEMUs, whole and
//! damaged.

use std::{fs, path::PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};
use vfio_migration::wire::{DEVICE_PACKET_LEN, Frame, Framer, PageSize, Walk, encode_packet};

use crate::{command::Directory, start::run};

/// One recorded migration.
struct Capture {
    files: Vec<PathBuf>,
    expected: Value,
}

fn captures() -> Vec<Capture> {
    let data = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let mut folders: Vec<_> = fs::read_dir(data)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("expected.json").exists())
        .collect();
    folders.sort();
    assert!(folders.len() >= 4, "{folders:?}");
    let capture = |folder: PathBuf| {
        let expected = fs::read(folder.join("expected.json")).unwrap();
        let expected: Value = serde_json::from_slice(&expected).unwrap();
        let names = expected["channels"].as_array().unwrap().iter();
        let files = names.map(|name| folder.join(name.as_str().unwrap()));
        Capture {
            files: files.collect(),
            expected,
        }
    };
    folders.into_iter().map(capture).collect()
}

fn capture(start: &str) -> Capture {
    captures()
        .into_iter()
        .find(|it| it.expected["capture"].as_str().unwrap().starts_with(start))
        .unwrap()
}

fn arguments(first: &[&str], files: &[PathBuf]) -> Vec<String> {
    let files = files.iter().map(|path| path.to_str().unwrap());
    let all = first.iter().copied().chain(files);
    all.map(str::to_owned).collect()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[test]
fn every_capture_gives_its_digests() {
    for Capture { files, expected } in captures() {
        for backend in ["uring", "blocking"] {
            let directory = Directory::new();
            let out = directory.file("new/out");
            let first = ["replay", "--json", "--backend", backend, "--out", &out];
            let json = run(arguments(&first, &files)).json();
            let devices = expected["devices"].as_array().unwrap();
            assert_eq!(json["devices"].as_array().unwrap().len(), devices.len());
            for expected in devices {
                let mut found = json["devices"].as_array().unwrap().iter();
                let found = found.find(|it| it["idstr"] == expected["idstr"]).unwrap();
                for key in [
                    "instance",
                    "packets",
                    "state_bytes",
                    "state_sha256",
                    "config_bytes",
                    "config_sha256",
                ] {
                    assert_eq!(found[key], expected[key], "{key}");
                }
                let name = expected["idstr"].as_str().unwrap().replace('/', "_");
                for (ending, digest) in [("state", "state_sha256"), ("config", "config_sha256")] {
                    let name = format!("{name}-{}.{ending}", expected["instance"]);
                    let bytes = fs::read(PathBuf::from(&out).join(name)).unwrap();
                    assert_eq!(sha256(&bytes), expected[digest]);
                }
            }
            let written = fs::read_dir(&out).unwrap().count();
            assert_eq!(written, 2 * devices.len(), "nothing else is left there");
        }
    }
}

#[test]
fn people_read_the_same() {
    let Capture { files, expected } = capture("05");
    let ended = run(arguments(&["replay"], &files));
    assert_eq!(ended.status, Some(0), "{ended:?}");
    for device in expected["devices"].as_array().unwrap() {
        for key in ["idstr", "state_sha256", "config_sha256"] {
            assert!(ended.stdout.contains(device[key].as_str().unwrap()));
        }
    }
}

#[test]
fn the_order_of_the_files_does_not_matter() {
    let Capture { mut files, .. } = capture("05");
    let right = run(arguments(&["replay", "--json"], &files)).json();
    files.reverse();
    let other = run(arguments(&["replay", "--json"], &files)).json();
    assert_eq!(right["devices"], other["devices"]);
}

#[test]
fn a_file_that_is_missing_is_an_idx_that_is_missing() {
    let Capture { files, .. } = capture("05");
    for left_out in 0..files.len() {
        let mut files = files.clone();
        let gone = files.remove(left_out);
        let has_packets = fs::read(&gone).unwrap();
        let has_packets = device_packets(&has_packets) > 0;
        let ended = run(arguments(&["replay"], &files));
        if has_packets {
            let why = ended.why();
            assert!(why.contains("0000:00:0"), "{why}");
            assert!(why.contains("lacks idx"), "{why}");
            assert!(why.contains("ends at byte"), "{why}");
        } else {
            assert_eq!(ended.status, Some(0), "{ended:?}");
        }
    }
}

fn walk(bytes: &[u8]) -> Walk<'_> {
    let page_size = PageSize::new(4096).unwrap();
    Walk::new(bytes, Framer::new(Some(page_size), u32::MAX))
}

fn device_packets(bytes: &[u8]) -> usize {
    let frames = walk(bytes).map(|located| located.unwrap().frame);
    frames
        .filter(|frame| matches!(frame, Frame::DeviceState(_)))
        .count()
}

/// Where each frame of a file begins and ends, and whether it is a device's.
fn frames(bytes: &[u8]) -> Vec<(usize, usize, bool)> {
    walk(bytes)
        .map(|located| {
            let located = located.unwrap();
            let end = located.offset + located.header.len() + located.payload.len();
            let device = matches!(located.frame, Frame::DeviceState(_));
            (located.offset, end, device)
        })
        .collect()
}

/// Writes a changed copy of one of the files, and puts it in that one's place.
fn with_changed(
    files: &[PathBuf],
    which: usize,
    directory: &Directory,
    change: impl FnOnce(&mut Vec<u8>),
) -> Vec<PathBuf> {
    let mut bytes = fs::read(&files[which]).unwrap();
    change(&mut bytes);
    let path = directory.path().join("changed.bin");
    fs::write(&path, bytes).unwrap();
    let mut files = files.to_vec();
    files[which] = path;
    files
}

fn holder(files: &[PathBuf]) -> usize {
    let holds = |path: &PathBuf| device_packets(&fs::read(path).unwrap()) > 0;
    files.iter().position(holds).unwrap()
}

#[test]
fn a_cut_file_says_where() {
    let Capture { files, .. } = capture("01");
    let which = holder(&files);
    let frames = frames(&fs::read(&files[which]).unwrap());
    let first = frames.iter().find(|(.., device)| *device).unwrap();
    for &(begin, end, device) in [&frames[0], &frames[1], first, frames.last().unwrap()] {
        for cut in [begin + 1, begin + 11, begin + 63, end - 1] {
            if cut <= begin || cut >= end {
                continue;
            }
            let directory = Directory::new();
            let out = directory.file("out");
            let files = with_changed(&files, which, &directory, |bytes| bytes.truncate(cut));
            let ended = run(arguments(&["replay", "--out", &out], &files));
            let why = ended.why();
            assert!(
                why.contains(&format!("changed.bin: byte {begin}: ")),
                "{why}"
            );
            assert!(why.contains("the file ends"), "{why}");
            if device {
                assert!(why.contains("\"0000:00:01.0/vfio\" lacks idx"), "{why}");
            }
            assert!(!PathBuf::from(&out).exists(), "nothing has been written");

            // `inspect` shows what is before it.
            let path = directory.file("changed.bin");
            let ended = run(["inspect", &path]);
            assert!(ended.why().contains(&format!("byte {begin}: ")));
            let whole = frames.iter().filter(|(_, end, _)| *end <= cut).count();
            assert_eq!(ended.stdout.lines().count(), whole);
        }
    }
}

#[test]
fn a_file_that_ends_early_between_packets_lacks_an_idx() {
    let Capture { files, .. } = capture("01");
    let which = holder(&files);
    let bytes = fs::read(&files[which]).unwrap();
    let first = frames(&bytes).into_iter().find(|(.., device)| *device);
    let (begin, ..) = first.unwrap();
    let directory = Directory::new();
    let out = directory.file("out");
    let files = with_changed(&files, which, &directory, |bytes| bytes.truncate(begin));
    let ended = run(arguments(&["replay", "--out", &out], &files));
    let why = ended.why();
    // All of that device's packets may have been in this file.
    if files
        .iter()
        .any(|path| device_packets(&fs::read(path).unwrap()) > 0)
    {
        assert!(why.contains("lacks idx"), "{why}");
        assert!(
            why.contains(&format!("changed.bin ends at byte {begin}")),
            "{why}"
        );
        assert_eq!(fs::read_dir(&out).unwrap().count(), 0);
    }
}

#[test]
fn a_damaged_file_says_where() {
    let Capture { files, .. } = capture("01");
    let which = holder(&files);
    let bytes = fs::read(&files[which]).unwrap();
    let (begin, end, _) = frames(&bytes).into_iter().find(|(.., it)| *it).unwrap();
    type Change = Box<dyn FnOnce(&mut Vec<u8>)>;
    let packet = bytes[begin..end].to_vec();
    let changes: Vec<(&str, Change)> = vec![
        ("magic", Box::new(move |bytes| bytes[begin] ^= 1)),
        ("version", Box::new(move |bytes| bytes[begin + 7] = 9)),
        ("flags", Box::new(move |bytes| bytes[begin + 8] = 1)),
        ("idstr", Box::new(move |bytes| bytes[begin + 12 + 255] = 1)),
        (
            "size 0",
            Box::new(move |bytes| bytes[begin + 272..begin + 276].fill(0)),
        ),
        (
            "unknown packet version",
            Box::new(move |bytes| bytes[begin + 279] = 1),
        ),
        (
            "idx 0xffffffff",
            Box::new(move |bytes| bytes[begin + 280..begin + 284].fill(0xff)),
        ),
        (
            "unknown packet flags",
            Box::new(move |bytes| bytes[begin + 287] |= 2),
        ),
        // It comes twice: what the engine says of it is said of both places.
        ("idx", Box::new(move |bytes| bytes.extend(packet))),
    ];
    for (what, change) in changes {
        let directory = Directory::new();
        let out = directory.file("out");
        let files = with_changed(&files, which, &directory, change);
        let ended = run(arguments(&["replay", "--out", &out], &files));
        let why = ended.why();
        assert!(why.contains("changed.bin"), "{what}: {why}");
        assert!(why.contains(&format!("byte {begin}")), "{what}: {why}");
        assert!(why.contains(what), "{what}: {why}");
        let left = fs::read_dir(&out).map_or(0, Iterator::count);
        assert_eq!(left, 0, "{what}: nothing half done is left");
    }
}

#[test]
fn a_damaged_config_says_where() {
    let Capture { files, .. } = capture("01");
    let found = files.iter().enumerate().find_map(|(which, path)| {
        let bytes = fs::read(path).unwrap();
        let mut places = Vec::new();
        for located in walk(&bytes).map(Result::unwrap) {
            let end = located.offset + located.header.len() + located.payload.len();
            if matches!(located.frame, Frame::DeviceState(packet) if packet.packet.config) {
                places.push((which, located.offset, end));
            }
        }
        places.pop()
    });
    let (which, begin, end) = found.unwrap();
    let directory = Directory::new();
    // Its END_OF_STATE, which is only looked at when it is loaded.
    let files = with_changed(&files, which, &directory, |bytes| bytes[end - 1] ^= 1);
    let ended = run(arguments(&["replay"], &files));
    let why = ended.why();
    assert!(why.contains("END_OF_STATE"), "{why}");
    assert!(why.contains(&format!("changed.bin byte {begin}")), "{why}");
}

#[test]
fn what_is_no_channel_is_refused() {
    let Capture { files, .. } = capture("01");
    let main = files[0].with_file_name("00-c2s.bin");
    let directory = Directory::new();
    let empty = directory.file("empty");
    fs::write(&empty, b"").unwrap();
    let folder = directory.path().to_str().unwrap().to_owned();
    for (path, why) in [
        (
            main.to_str().unwrap().to_owned(),
            "byte 0: this is a main channel",
        ),
        (empty, "byte 0: the file is empty"),
        (folder, "not a regular file"),
        (directory.file("gone"), "No such file"),
    ] {
        for command in ["replay", "inspect"] {
            let ended = run([command, &path]);
            assert!(ended.why().contains(why), "{ended:?}");
            assert!(ended.why().contains(&path), "{ended:?}");
        }
    }
}

#[test]
fn a_channel_given_twice_is_refused() {
    let Capture { mut files, .. } = capture("01");
    let again = files[0].clone();
    files.push(again);
    let ended = run(arguments(&["replay"], &files));
    assert!(ended.why().contains("01-c2s.bin"), "{ended:?}");
}

#[test]
fn inspect_shows_every_packet() {
    for Capture { files, .. } in captures() {
        for path in files {
            let frames = frames(&fs::read(&path).unwrap());
            let ended = run(["inspect", path.to_str().unwrap()]);
            assert_eq!(ended.status, Some(0), "{ended:?}");
            assert_eq!(ended.stdout.lines().count(), frames.len());
            for (line, (begin, _, device)) in ended.stdout.lines().zip(frames) {
                let mut fields = line.split_whitespace();
                assert_eq!(fields.next().unwrap().parse(), Ok(begin));
                let kind = fields.next().unwrap();
                assert_eq!(["device", "config"].contains(&kind), device, "{line}");
                assert!(line.contains(" size "), "{line}");
                if device {
                    assert!(line.contains("\"0000:00:0"), "{line}");
                    assert!(line.contains(" instance 0 idx "), "{line}");
                }
            }
        }
    }
}

/// A name that would lead out of the directory, or that has control characters, stays a name.
#[test]
fn a_hostile_name_is_harmless() {
    let key = vfio_migration::DeviceId::new("../../e\nvil", 3).unwrap();
    let key = vfio_migration::wire::DeviceKey::new(&key);
    let hello = vfio_migration::wire::Hello {
        uuid: [7; 16],
        id: 0,
    };
    let config = vfio_migration::wire::wrap_config(b"config");
    let mut bytes = hello.encode().to_vec();
    bytes.extend(encode_packet(&key, 0, false, 5));
    assert_eq!(bytes.len(), 64 + DEVICE_PACKET_LEN);
    bytes.extend(b"state");
    bytes.extend(encode_packet(
        &key,
        1,
        true,
        u32::try_from(config.len()).unwrap(),
    ));
    bytes.extend(&config);
    let directory = Directory::new();
    let path = directory.file("channel");
    fs::write(&path, bytes).unwrap();
    let out = directory.file("out");
    let ended = run(["replay", "--out", &out, &path]);
    assert_eq!(ended.status, Some(0), "{ended:?}");
    assert!(
        ended
            .stdout
            .starts_with("\"../../e\\nvil\", instance 3: 2 packets")
    );
    let state = fs::read(PathBuf::from(&out).join(".._.._e_vil-3.state")).unwrap();
    assert_eq!(state, b"state");
    let ended = run(["inspect", &path]);
    assert_eq!(ended.stdout.lines().count(), 3);
}

#[test]
fn a_name_that_steers_a_terminal_is_shown_and_not_obeyed() {
    let id = vfio_migration::DeviceId::new("\u{1b}]0;e\u{7}vil", 0).unwrap();
    let key = vfio_migration::wire::DeviceKey::new(&id);
    let hello = vfio_migration::wire::Hello {
        uuid: [7; 16],
        id: 0,
    };
    let packet = encode_packet(&key, 0, false, 5);
    let bytes = [&hello.encode()[..], &packet, b"state"].concat();
    let directory = Directory::new();
    let path = directory.file("channel");
    fs::write(&path, bytes).unwrap();
    let ended = run(["replay", &path]);
    let why = ended.why();
    assert!(!why.contains(char::is_control), "{why:?}");
    // The engine's own words are of it too.
    assert!(why.contains(r"device \u{1b}]0;e\u{7}vil"), "{why}");
}

#[test]
fn any_number_of_names_and_of_packets_is_told_in_a_few_words() {
    const MANY: u32 = 50_000;
    let hello = vfio_migration::wire::Hello {
        uuid: [7; 16],
        id: 0,
    };
    let packet = |instance, index| {
        let id = vfio_migration::DeviceId::new("many", instance).unwrap();
        encode_packet(&vfio_migration::wire::DeviceKey::new(&id), index, false, 0)
    };
    let directory = Directory::new();
    let path = directory.file("channel");
    let replay = |packets: Vec<[u8; DEVICE_PACKET_LEN]>, rest: &[u8]| {
        let bytes = [&hello.encode()[..], &packets.concat(), rest].concat();
        fs::write(&path, bytes).unwrap();
        let why = run(["replay", &path]).why().to_owned();
        assert!(why.len() < 2000, "{} bytes", why.len());
        why
    };
    // Each of many devices lacks something, and the file is cut.
    let why = replay((0..MANY).map(|device| packet(device, 0)).collect(), b"cut");
    assert!(why.contains("lacks idx 1 and its config"), "{why}");
    assert!(why.contains(&format!("{} more", MANY - 8)), "{why}");
    // One packet comes again and again.
    let why = replay(vec![packet(0, 0); MANY as usize], b"");
    assert!(why.contains(&format!("{} more", MANY - 8)), "{why}");
}
