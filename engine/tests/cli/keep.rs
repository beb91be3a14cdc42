//! `save` and `restore`: what comes back is what was saved; a file that is not whole, right and of these
//! devices touches none of them; a save that does not end well leaves nothing, and its devices as they were.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    process::Command,
    thread,
    time::Duration,
};

use serde_json::Value;
use sha2::{Digest, Sha256};
use vfio_migration::wire::{Hello, Kind, PageSize, RamHeader, encode_sync};

use crate::{
    command::{Directory, Ended, Running, start, start_command, start_under, words},
    names::id,
    packets::{config_packet, hello, packet},
    start::run,
};

const DIGEST_LEN: usize = 1344;

fn save(file: &str, rest: &str) -> Ended {
    run(words(&format!("save {file} {rest}")))
}

fn restore(file: &str, rest: &str) -> Ended {
    run(words(&format!("restore {file} {rest}")))
}

fn names(directory: &Directory) -> Vec<String> {
    let names = fs::read_dir(directory.path()).unwrap();
    let mut names: Vec<String> = names
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// What an output says of its devices, by their names.
/// All but their times.
fn devices(json: &Value) -> Vec<Value> {
    let mut devices = json["devices"].as_array().unwrap().clone();
    for device in &mut devices {
        let device = device.as_object_mut().unwrap();
        device.retain(|key, _| key != "phases" && !key.ends_with("_seconds"));
    }
    devices.sort_by_key(|device| device["idstr"].to_string());
    for device in &mut devices {
        device.as_object_mut().unwrap().remove("state_file");
    }
    devices
}

/// The digest's packet of these bytes.
fn digest_packet(body: &[u8]) -> Vec<u8> {
    let digits: String = Sha256::digest(body)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let header = RamHeader {
        kind: Kind::Ram { flags: 0 },
        pages_alloc: 0,
        normal_pages: 0,
        next_packet_size: 0,
        packet_num: 0,
        zero_pages: 0,
        ramblock: format!("vfio-migrate/sha256:{digits}").as_bytes(),
    }
    .encode();
    let mut bytes = header.to_vec();
    bytes.resize(DIGEST_LEN, 0);
    bytes
}

/// A file of these bytes, with a digest that is right.
fn sealed(directory: &Directory, body: &[u8]) -> String {
    let path = directory.file("made.save");
    fs::write(&path, [body, &digest_packet(body)].concat()).unwrap();
    path
}

#[test]
fn several_devices_come_back_out_of_one_file_which_others_read_too() {
    for backend in ["uring", "blocking"] {
        let directory = Directory::new();
        let (state, file) = (directory.file("state"), directory.file("vm.save"));
        fs::write(&state, vec![7; 3_000_001]).unwrap();
        let options = format!("--json --backend {backend}");
        let from = "--device sim:id=a,size=5MiB,seed=7,precopy=2MiB --device sim:id=b,size=0";
        let saved = save(
            &file,
            &format!("{options} --packet 64KiB {from} --device file:{state},id=c,instance=3"),
        );
        let saved = saved.json();
        assert_eq!(saved["command"], "save");
        let precopy = saved["totals"]["precopy_bytes"].as_u64().unwrap();
        assert!(precopy >= 2 << 20, "what it gave while it ran: {precopy}");

        let to = "--device sim:id=b --device sim:id=a";
        let to = format!("{to} --device file:{state}.back,id=c,instance=3");
        let restored = restore(&file, &format!("{options} {to}")).json();
        assert_eq!(restored["command"], "restore");
        assert_eq!(devices(&saved), devices(&restored));
        assert_eq!(saved["file_sha256"], restored["file_sha256"]);
        assert_eq!(
            fs::read(&state).unwrap(),
            fs::read(format!("{state}.back")).unwrap()
        );

        // What stands in the file is what it says, and its owner's alone.
        let bytes = fs::read(&file).unwrap();
        let (body, end) = bytes.split_at(bytes.len() - DIGEST_LEN);
        assert_eq!(end, digest_packet(body));
        assert_eq!(saved["file_bytes"], bytes.len());
        assert_eq!(
            fs::metadata(&file).unwrap().permissions().mode() & 0o7777,
            0o600
        );
        let replayed = run(words(&format!("replay --json {file}"))).json();
        assert_eq!(devices(&saved), devices(&replayed));
        let inspected = run(words(&format!("inspect {file}")));
        let last = inspected.stdout.lines().next_back().unwrap();
        let sha256 = saved["file_sha256"].as_str().unwrap();
        assert!(last.contains("digest") && last.contains(sha256), "{last}");
    }
}

/// No device is opened then: a path that is none would be an error of its own.
#[test]
fn a_file_that_is_damaged_or_cut_touches_no_device() {
    let directory = Directory::new();
    let file = directory.file("vm.save");
    let saved = save(&file, "--device sim:id=a,size=200KiB --packet 16KiB");
    assert_eq!(saved.status, Some(0), "{saved:?}");
    let good = fs::read(&file).unwrap();
    let nowhere = "--device vfio:/nowhere/at/all,id=a";
    assert!(restore(&file, nowhere).why().contains("/nowhere"));

    let end = good.len() - DIGEST_LEN;
    // A hello's and a header's, a packet's data, the digest's own, and what nobody reads.
    for at in [
        0,
        24,
        40,
        64,
        1500,
        100_000,
        end - 1,
        end,
        end + 90,
        end + 300,
        good.len() - 1,
    ] {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        fs::write(&file, bytes).unwrap();
        let ended = restore(&file, nowhere);
        let why = ended.why();
        assert!(
            why.contains(&file) && !why.contains("nowhere"),
            "{at}: {why}"
        );
        assert!(
            why.contains("is damaged") || why.contains("no digest"),
            "{at}: {why}"
        );
    }
    let longer = [&good[..], &[0]].concat();
    let twice = [&good[..], &good].concat();
    for bytes in [
        &good[..0],
        &good[..64],
        &good[..end],
        &good[..end + 1],
        &good[..good.len() - 1],
        &good[1..],
        &longer,
        &twice,
    ] {
        fs::write(&file, bytes).unwrap();
        let ended = restore(&file, nowhere);
        let why = ended.why();
        assert!(
            why.contains(&file) && !why.contains("nowhere"),
            "{}: {why}",
            bytes.len()
        );
    }
    // replay looks at the digest too.
    let mut bytes = good.clone();
    bytes[100_000] ^= 0x10;
    fs::write(&file, bytes).unwrap();
    let ended = run(words(&format!("replay {file}")));
    assert!(ended.why().contains("is damaged"), "{ended:?}");
}

/// Whose digests are right: by a hostile hand, or of another VM.
#[test]
fn a_file_of_other_packets_than_the_devices_touches_none() {
    let directory = Directory::new();
    let sync = encode_sync(PageSize::new(4096).unwrap(), 0);
    let begin = [hello(0), sync].concat();
    let whole = |device| [packet(device, 0, b"state"), config_packet(device, 1, b"")].concat();
    let huge = {
        let mut bytes = packet(0, 0, b"state");
        bytes[272..276].copy_from_slice(&u32::MAX.to_be_bytes());
        bytes
    };
    let ram = &digest_packet(b"")[..];
    let good = [&begin[..], &whole(0), &whole(1)].concat();
    let (one, two) = (id(0), id(1));
    let nowhere = |instances: &[u32]| -> String {
        let specs = instances.iter().map(|number| {
            let id = id(*number);
            let (idstr, instance) = (id.idstr(), id.instance());
            format!(" --device vfio:/nowhere/at/{number},id={idstr},instance={instance}")
        });
        specs.collect()
    };
    let why = restore(&sealed(&directory, &good), &nowhere(&[0, 1]));
    assert!(why.why().contains("/nowhere"), "this one is right: {why:?}");
    for (body, given, expected) in [
        (&good[..], &[0][..], format!("{:?}", two.idstr())),
        (&good, &[0, 1, 2], "is not in this file".into()),
        (
            &[&begin[..], &packet(0, 0, b"a")].concat(),
            &[0],
            "lacks idx 1 and its config".into(),
        ),
        (
            &[&begin[..], &packet(0, 1, b"a")].concat(),
            &[0],
            "idx 1 stands where idx 0".into(),
        ),
        (
            &[&begin[..], &packet(0, 0, b"a"), &packet(0, 0, b"a")].concat(),
            &[0],
            "idx 0 stands where idx 1".into(),
        ),
        (
            &[&begin[..], &whole(0), &packet(0, 2, b"a")].concat(),
            &[0],
            "its config stood before".into(),
        ),
        (
            &[&begin[..], &huge].concat(),
            &[0],
            "bytes short of the end".into(),
        ),
        (
            &[&begin[..], ram, &whole(0)].concat(),
            &[0],
            "does not belong here".into(),
        ),
        (&[hello(1), whole(0)].concat(), &[0], "channel 1".into()),
        (&begin, &[0], format!("{one} is not in this file")),
        (&[], &[0], "empty".into()),
    ] {
        let file = sealed(&directory, body);
        let ended = restore(&file, &nowhere(given));
        let why = ended.why();
        assert!(
            why.contains(&file) && !why.contains("nowhere"),
            "{expected}: {why}"
        );
        assert!(why.contains(&expected), "{expected}: {why}");
    }
    // Of a VM that has a uuid: loaded, for the file says itself which.
    let uuid = Hello {
        uuid: [9; 16],
        id: 0,
    }
    .encode();
    let file = sealed(&directory, &[&uuid[..], &whole(0)].concat());
    let back = directory.file("back");
    let spec = format!(
        "--device file:{back},id={},instance={}",
        one.idstr(),
        one.instance()
    );
    let ended = restore(&file, &spec);
    assert_eq!(ended.status, Some(0), "{ended:?}");
    assert_eq!(fs::read(&back).unwrap(), b"state");
}

#[test]
fn what_is_no_regular_file_is_neither_written_nor_read() {
    let directory = Directory::new();
    let precious = directory.file("precious");
    fs::write(&precious, "precious").unwrap();
    symlink(&precious, directory.file("link")).unwrap();
    symlink(directory.file("nothing"), directory.file("dangling")).unwrap();
    fs::create_dir(directory.file("directory")).unwrap();
    let fifo = Command::new("mkfifo").arg(directory.file("fifo")).status();
    assert!(fifo.unwrap().success());
    let before = names(&directory);
    for case in ["link", "dangling", "directory", "fifo", "none/state"] {
        let path = directory.file(case);
        for force in ["", "--force"] {
            let ended = save(&path, &format!("{force} --device sim:id=a"));
            assert!(ended.why().contains(&path), "{ended:?}");
        }
        let ended = restore(&path, "--device vfio:/nowhere/at/all,id=a");
        assert!(ended.why().contains(&path), "{ended:?}");
    }
    assert_eq!(names(&directory), before);
    assert_eq!(fs::read(&precious).unwrap(), b"precious");
}

#[test]
fn an_existing_file_is_replaced_where_that_was_said_and_is_its_owners_alone_then() {
    let directory = Directory::new();
    let file = directory.file("vm.save");
    fs::write(&file, "old").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    let ended = save(&file, "--device sim:id=a");
    assert_eq!(ended.status, Some(2), "{ended:?}");
    assert!(ended.stderr.contains("--force"), "{ended:?}");
    assert_eq!(fs::read(&file).unwrap(), b"old");
    let ended = save(&file, "--force --device sim:id=a");
    assert_eq!(ended.status, Some(0), "{ended:?}");
    assert_eq!(
        fs::metadata(&file).unwrap().permissions().mode() & 0o7777,
        0o600
    );
    assert_eq!(restore(&file, "--device sim:id=a").status, Some(0));
    assert_eq!(names(&directory), ["vm.save"]);
}

/// The states that a device was asked for, as the engine's events tell them.
fn states(ended: &Ended) -> Vec<String> {
    let lines = ended.stderr.lines();
    let lines = lines.filter(|line| line.contains("migration_set_device_state"));
    lines.map(str::to_owned).collect()
}

/// A save whose events are told, in a shell that first does `under`.
fn traced(under: &str, arguments: &str) -> Running {
    let mut command = crate::command::command_under(under, words(arguments));
    command.env("VFIO_MIGRATE_LOG", "vfio_migration=debug");
    start_command(command)
}

#[test]
fn a_full_disk_leaves_no_file_and_the_device_runs_again() {
    for (name, old) in [("new", None), ("old", Some("old"))] {
        let directory = Directory::new();
        let file = directory.file(name);
        if let Some(old) = old {
            fs::write(&file, old).unwrap();
        }
        // 1 MiB; in PRE_COPY, and once the device has stopped.
        for from in ["size=5MiB,precopy=3MiB", "size=5MiB"] {
            let ended = traced(
                "ulimit -f 1024",
                &format!("save --force {file} --device sim:id=a,{from}"),
            )
            .end();
            assert_eq!(ended.status, Some(1), "{ended:?}");
            assert!(ended.stderr.contains("File too large"), "{ended:?}");
            assert!(
                ended.stderr.contains(&format!("cannot write {file}")),
                "{ended:?}"
            );
            let states = states(&ended);
            assert!(states.len() > 1, "{ended:?}");
            assert!(states[states.len() - 1].contains("RUNNING"), "{states:?}");
        }
        match old {
            None => assert!(names(&directory).is_empty()),
            Some(old) => assert_eq!(fs::read_to_string(&file).unwrap(), old),
        }
    }
}

/// Waits until a save has written some of its file, which has no name.
fn until_it_writes(saving: &Running, directory: &Directory) {
    let fds = format!("/proc/{}/fd", saving.id());
    // Ends: with the file, or where the process has.
    loop {
        let entries = fs::read_dir(&fds).expect("it has not ended yet");
        for entry in entries.flatten() {
            let is_ours =
                fs::read_link(entry.path()).is_ok_and(|to| to.starts_with(directory.path()));
            let meta = fs::metadata(entry.path());
            if is_ours && meta.is_ok_and(|meta| meta.is_file() && meta.len() > 1 << 20) {
                return;
            }
        }
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_signal_in_the_middle_leaves_no_file_and_the_device_runs_again() {
    for signal in ["INT", "TERM", "HUP"] {
        // While it runs, and once it has stopped.
        for from in ["size=4GiB,precopy=4GiB", "size=4GiB"] {
            let directory = Directory::new();
            let file = directory.file("vm.save");
            let saving = traced(
                "",
                &format!("save {file} --device sim:id=a,{from} --packet 256KiB"),
            );
            until_it_writes(&saving, &directory);
            saving.signal(signal);
            let ended = saving.end();
            assert_eq!(ended.status, Some(130), "{ended:?}");
            let states = states(&ended);
            assert!(states[states.len() - 1].contains("RUNNING"), "{states:?}");
            assert!(names(&directory).is_empty());
        }
    }
}

#[test]
fn a_save_that_passes_lets_the_device_run_on() {
    let directory = Directory::new();
    for from in ["size=1MiB,precopy=1MiB", "size=1MiB"] {
        let file = directory.file(&from.len().to_string());
        let ended = traced("", &format!("save {file} --device sim:id=a,{from}")).end();
        assert_eq!(ended.status, Some(0), "{ended:?}");
        let states = states(&ended);
        assert!(states[states.len() - 1].contains("RUNNING"), "{states:?}");
    }
}

#[test]
fn a_save_that_is_killed_leaves_what_was_there() {
    let directory = Directory::new();
    let file = directory.file("vm.save");
    fs::write(&file, "old").unwrap();
    let line = format!("save --force {file} --device sim:id=a,size=4GiB");
    let mut saving = start(words(&line));
    until_it_writes(&saving, &directory);
    saving.kill();
    assert_eq!(saving.end().signal, Some(9));
    assert_eq!(fs::read(&file).unwrap(), b"old");
    assert_eq!(names(&directory), ["vm.save"]);
}

#[test]
fn a_failure_is_an_object_where_json_is_wanted() {
    let directory = Directory::new();
    let file = directory.file("vm.save");
    let saving = start_under(
        "ulimit -f 1024",
        words(&format!("save --json {file} --device sim:id=a,size=5MiB")),
    );
    let json = crate::schema::object(&saving.end().stdout);
    assert_eq!(json["error"]["errno"], 27);
    fs::write(&file, "no file of save").unwrap();
    let ended = restore(&file, "--json --device sim:id=a");
    let json = crate::schema::object(&ended.stdout);
    assert!(json["error"]["message"].as_str().unwrap().contains(&file));
}
