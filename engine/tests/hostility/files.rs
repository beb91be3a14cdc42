//! Files: what is at PATH, beside it, and how much of it the disk takes.

use std::{
    fs,
    os::unix::{
        fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink},
        net::UnixListener,
    },
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use nix::{sys::stat::Mode, unistd::mkfifo};

use crate::{
    command::{Directory, listen, random, start_under, words},
    rig::{Ends, Rig, Wire, bytes, case, end, refused, sound},
    tests,
};

tests! {
    any: [
        a_killed_destination_leaves_the_old_state_or_the_new,
        a_killed_source_leaves_what_was_there,
        captures_that_are_no_files_end,
        a_file_that_may_not_grow_is_a_failure_on_both_sides,
        a_planted_link_beside_path_is_not_followed,
        what_is_no_regular_file_is_refused_before_listening,
        two_spellings_of_one_file_are_refused,
        a_source_that_is_no_regular_file_is_refused,
        two_destinations_on_one_path_each_tell_the_truth,
        a_state_is_its_owners_alone,
        a_name_that_looks_like_a_temporary_one_is_a_name,
        the_first_of_two_states_stays_out_where_the_second_fails,
        a_replay_overwrites_nothing_and_follows_no_link,
        a_replay_whose_disk_is_full_fails,
    ],
    root: [
        a_full_file_system_is_a_failure_on_both_sides,
        a_device_node_stays_one,
        a_directory_of_another_user_is_refused,
    ],
}

fn a_file_that_may_not_grow_is_a_failure_on_both_sides() {
    // In blocks of 512 bytes: within a packet, at its end, within a chain, before the last byte.
    for (blocks, packet) in [
        (0, "64KiB"),
        (1, "4KiB"),
        (8, "4KiB"),
        (127, "64KiB"),
        (128, "64KiB"),
        (129, "64KiB"),
        (255, "4KiB"),
        (400, "100KiB"),
        (585, "64KiB"),
        (585, "4KiB"),
    ] {
        for backend in ["uring", "blocking"] {
            let rig = Rig::over(300_000);
            let (_, received) = rig.migrate(&Ends {
                send: &format!("--packet {packet}"),
                receive: &format!("--backend {backend}"),
                receive_under: &format!("ulimit -f {blocks}"),
                ..Ends::default()
            });
            refused(&received, &["device nic"]);
        }
    }
    // And one that is just large enough.
    let (sent, _) = Rig::over(300_000).migrate(&Ends {
        receive_under: "ulimit -f 586",
        ..Ends::default()
    });
    assert_eq!(sent.unwrap().status, Some(0));
}

/// A mount of its own, which goes with the process, whatever becomes of it.
fn on_a_small_disk(directory: &str, size: &str, log: &str) -> String {
    format!(
        "exec unshare --mount --pid --fork --kill-child sh -c 'mount -t tmpfs -o size={size} none \
         {directory} && echo before > {directory}/target && \"$0\" \"$@\"; s=$?; ls -A {directory} > \
         {log}; cat {directory}/target >> {log}; exit $s' \"$0\" \"$@\""
    )
}

fn a_full_file_system_is_a_failure_on_both_sides() {
    for backend in ["uring", "blocking"] {
        for (size, packet) in [
            ("64k", "64KiB"),
            ("256k", "64KiB"),
            ("256k", "4KiB"),
            ("256k", "100KiB"),
        ] {
            let rig = Rig::new(300_000);
            let disk = Directory::new();
            let log = rig.directory.file("log");
            let device = disk.file("target");
            let (_, received) = {
                let ends = Ends {
                    send: &format!("--packet {packet}"),
                    receive: &format!("--backend {backend} --device file:{device},id=nic"),
                    receive_under: &on_a_small_disk(&disk.file(""), size, &log),
                    ..Ends::default()
                };
                let (receiving, to) = rig.receive(&ends).unwrap();
                let sent = end(rig.send(&to, &ends));
                let received = end(receiving);
                assert_eq!(sent.status, Some(1), "{sent:?}");
                (sent, received)
            };
            refused(&received, &["device nic", "No space left"]);
            assert_eq!(fs::read_to_string(log).unwrap(), "target\nbefore\n");
        }
    }
}

fn a_planted_link_beside_path_is_not_followed() {
    let rig = Rig::over(100_000);
    let victim = rig.directory.file("victim");
    fs::write(&victim, "precious").unwrap();
    for name in ["target.partial", "target.tmp", ".target"] {
        symlink(&victim, rig.directory.file(name)).unwrap();
    }
    let (receiving, to) = rig.receive(&Ends::default()).unwrap();
    let sent = end(rig.send(&to, &Ends::default()));
    let received = end(receiving);
    assert_eq!(sent.status, Some(0), "{sent:?}");
    assert_eq!(received.status, Some(0), "{received:?}");
    assert_eq!(fs::read(&victim).unwrap(), b"precious");
    rig.arrived(&["victim", "target.partial", "target.tmp", ".target"]);
}

/// Refuses PATH before it listens, by its name.
fn refuses(path: &str) {
    case();
    let line =
        format!("receive --listen 127.0.0.1:0 --accept-timeout 1 --device file:{path},id=nic");
    let ended = end(start_under("", words(&line)));
    refused(&ended, &[path]);
    assert!(!ended.stderr.contains("listening"), "{ended:?}");
}

fn what_is_no_regular_file_is_refused_before_listening() {
    let directory = Directory::new();
    let at = |name: &str| directory.file(name);
    mkfifo(Path::new(&at("fifo")), Mode::S_IRWXU).unwrap();
    let _socket = UnixListener::bind(at("socket")).unwrap();
    fs::create_dir(at("dir")).unwrap();
    fs::write(at("file"), "a file").unwrap();
    for name in ["fifo", "socket", "dir", "missing/target", "file/target"] {
        refuses(&at(name));
    }
    let is = |name: &str| fs::symlink_metadata(at(name)).unwrap().file_type();
    assert!(is("fifo").is_fifo() && is("socket").is_socket() && is("dir").is_dir());
    assert_eq!(fs::read(at("file")).unwrap(), b"a file");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 4);
}

fn a_device_node_stays_one() {
    let directory = Directory::new();
    let null = directory.file("null");
    let made = Command::new("mknod").args([&null, "c", "1", "3"]).status();
    assert!(made.unwrap().success());
    refuses(&null);
    let node = fs::symlink_metadata(&null).unwrap();
    assert!(node.file_type().is_char_device() && node.rdev() == 0x103);
}

fn a_directory_of_another_user_is_refused() {
    case();
    let rig = Rig::new(1000);
    fs::set_permissions(rig.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let refused_by = rig.receive(&Ends {
        wire: Wire::Tcp,
        receive_under: "exec setpriv --reuid 65533 --regid 65533 --clear-groups \"$0\" \"$@\"",
        ..Ends::default()
    });
    let ended = sound(refused_by.err().expect("it cannot write there"));
    refused(&ended, &["target"]);
    rig.untouched(&[]);
}

fn two_spellings_of_one_file_are_refused() {
    let directory = Directory::new();
    fs::create_dir(directory.file("real")).unwrap();
    symlink("real", directory.file("link")).unwrap();
    fs::write(directory.file("real/one"), "one").unwrap();
    symlink("one", directory.file("real/two")).unwrap();
    let at = |name: &str| directory.file(name);
    for (first, second) in [
        ("real/state", "real/state"),
        ("real/state", "real/./state"),
        ("real/state", "link/state"),
        ("real/state", "real/../real/state"),
        ("real/one", "link/one"),
        ("real/one", "real/two"),
    ] {
        case();
        let line = format!(
            "receive --listen 127.0.0.1:0 --accept-timeout 1 --device file:{},id=a file:{},id=b",
            at(first),
            at(second)
        );
        let ended = end(start_under("", words(&line)));
        refused(&ended, &[&at(second)]);
        assert!(!ended.stderr.contains("listening"), "{ended:?}");
    }
    assert_eq!(fs::read(at("real/one")).unwrap(), b"one");
    assert_eq!(fs::read_dir(at("real")).unwrap().count(), 2);
}

fn a_source_that_is_no_regular_file_is_refused() {
    let directory = Directory::new();
    let at = |name: &str| directory.file(name);
    mkfifo(Path::new(&at("fifo")), Mode::S_IRWXU).unwrap();
    let _socket = UnixListener::bind(at("socket")).unwrap();
    fs::create_dir(at("dir")).unwrap();
    for path in [
        at("fifo"),
        at("socket"),
        at("dir"),
        at("missing"),
        "/dev/zero".into(),
    ] {
        case();
        let line = format!(
            "send --to unix:{} --connect-timeout 1 --device file:{path},id=nic",
            at("nobody")
        );
        refused(&end(start_under("", words(&line))), &[&path]);
    }
}

fn two_destinations_on_one_path_each_tell_the_truth() {
    for number in 0..6 {
        case();
        let directory = Directory::new();
        let target = directory.file("target");
        let states: Vec<_> = (0..2)
            .map(|at| bytes(2_000_000 + at * 7, at as u64))
            .collect();
        let both: Vec<_> = states
            .iter()
            .enumerate()
            .map(|(at, state)| {
                let source = directory.file(&format!("source{at}"));
                fs::write(&source, state).unwrap();
                let address = format!("unix:{}", directory.file(&format!("socket{at}")));
                let line =
                    format!("receive --listen {address} --timeout 5 --device file:{target},id=nic");
                let (receiving, to) = listen(words(&line));
                (receiving, to, source)
            })
            .collect();
        let both: Vec<_> = both
            .into_iter()
            .map(|(receiving, to, source)| {
                let line = format!("send --to {to} --timeout 5 --device file:{source},id=nic");
                thread::sleep(Duration::from_micros(random(number) % 3000));
                (start_under("", words(&line)), receiving)
            })
            .collect();
        let ends: Vec<_> = both
            .into_iter()
            .map(|(sent, received)| (end(sent), end(received)))
            .collect();
        let after = fs::read(&target).unwrap();
        let mut arrived = false;
        for ((sent, received), state) in ends.iter().zip(&states) {
            assert_eq!(sent.status, received.status, "{sent:?}; {received:?}");
            arrived |= sent.status == Some(0) && after == *state;
        }
        assert!(
            arrived,
            "the file is none of the states that were said to be loaded: {ends:?}"
        );
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 3);
    }
}

fn a_state_is_its_owners_alone() {
    for (before, umask, after) in [
        (None, "000", 0o600),
        (None, "022", 0o600),
        (Some(0o640), "000", 0o640),
        (Some(0o600), "000", 0o600),
    ] {
        let rig = if before.is_some() {
            Rig::over(1000)
        } else {
            Rig::new(1000)
        };
        if let Some(mode) = before {
            fs::set_permissions(rig.target(), fs::Permissions::from_mode(mode)).unwrap();
        }
        let (_, received) = rig.migrate(&Ends {
            receive_under: &format!("umask {umask}"),
            ..Ends::default()
        });
        assert_eq!(received.status, Some(0), "{received:?}");
        let mode = fs::metadata(rig.target()).unwrap().mode() & 0o7777;
        assert_eq!(mode, after, "{before:?}, umask {umask}: {mode:o}");
    }
}

fn a_name_that_looks_like_a_temporary_one_is_a_name() {
    for order in [["x", "x.partial"], ["x.partial", "x"]] {
        case();
        let directory = Directory::new();
        let states = [bytes(300_000, 1), bytes(200_000, 2)];
        let (mut source, mut destination) = (String::new(), String::new());
        for (name, state) in order.iter().zip(&states) {
            fs::write(directory.file(&format!("from-{name}")), state).unwrap();
            source += &format!(
                " --device file:{},id={name}",
                directory.file(&format!("from-{name}"))
            );
            destination += &format!(" --device file:{},id={name}", directory.file(name));
        }
        let (receiving, to) = listen(words(&format!(
            "receive --listen 127.0.0.1:0 --timeout 5 {destination}"
        )));
        let sent = end(start_under(
            "",
            words(&format!("send --to {to} --timeout 5 {source}")),
        ));
        let received = end(receiving);
        assert_eq!(
            (sent.status, received.status),
            (Some(0), Some(0)),
            "{sent:?}; {received:?}"
        );
        for (name, state) in order.iter().zip(&states) {
            assert!(fs::read(directory.file(name)).unwrap() == *state, "{name}");
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 4);
    }
}

fn the_first_of_two_states_stays_out_where_the_second_fails() {
    // A simulated device knows its own states, and a file of random bytes is none; it may be the
    // one that ends first or last.
    for (good, bad) in [(1000, 3_000_000), (3_000_000, 1000)] {
        for over in [true, false] {
            let rig = if over {
                Rig::over(good)
            } else {
                Rig::new(good)
            };
            let wrong = Directory::new();
            fs::write(wrong.file("bad"), bytes(bad, 9)).unwrap();
            let (sent, received) = rig.migrate(&Ends {
                send: &format!(
                    "--device file:{},id=nic file:{},id=bad",
                    rig.directory.file("source"),
                    wrong.file("bad")
                ),
                receive: &format!("--device file:{},id=nic sim:id=bad", rig.target()),
                ..Ends::default()
            });
            refused(&sent.unwrap(), &["device bad"]);
            refused(&received, &["device bad"]);
        }
    }
}

fn a_killed_destination_leaves_the_old_state_or_the_new() {
    for seed in 0..12 {
        let rig = Rig::over(4_000_000);
        let (mut receiving, to) = rig.receive(&Ends::default()).unwrap();
        let sending = rig.send(&to, &Ends::default());
        thread::sleep(Duration::from_micros(random(seed) % 150_000));
        receiving.kill();
        receiving.end();
        let sent = end(sending);
        let after = fs::read(rig.target()).unwrap();
        assert!(
            after == b"what was there" || after == rig.state,
            "seed {seed}: half a state"
        );
        assert!(
            sent.status != Some(0) || after == rig.state,
            "seed {seed}: {sent:?}"
        );
    }
}

fn a_killed_source_leaves_what_was_there() {
    for seed in 0..12 {
        let rig = Rig::over(4_000_000);
        let (receiving, to) = rig.receive(&Ends::default()).unwrap();
        let mut sending = rig.send(&to, &Ends::default());
        thread::sleep(Duration::from_micros(random(seed) % 150_000));
        sending.kill();
        sending.end();
        let received = end(receiving);
        if received.status == Some(0) {
            rig.arrived(&[]);
        } else {
            rig.untouched(&[]);
        }
    }
}

// ------------------------------------------------------------------------------------ captures

/// The channels of one recorded migration, and the files that a replay of it writes.
fn captured() -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/05-xfer-on-2dev-3ch");
    let entries = fs::read_dir(folder).unwrap().map(|it| it.unwrap().path());
    let channels = entries.filter(|path| {
        let name = path.file_name().unwrap().to_str().unwrap();
        name.ends_with("c2s.bin") && !name.starts_with("00")
    });
    channels
        .map(|path| path.to_str().unwrap().to_owned())
        .collect()
}

fn replay(under: &str, rest: &[&str]) -> crate::command::Ended {
    case();
    let first = ["replay"].iter().chain(rest).map(|it| (*it).to_owned());
    end(start_under(under, first.chain(captured())))
}

fn a_replay_overwrites_nothing_and_follows_no_link() {
    let directory = Directory::new();
    let out = directory.file("out");
    let first = replay("", &["--out", &out]);
    assert_eq!(first.status, Some(0), "{first:?}");
    let entries = fs::read_dir(&out).unwrap().map(|it| it.unwrap());
    let right: Vec<_> = entries
        .map(|it| {
            (
                it.file_name().into_string().unwrap(),
                fs::read(it.path()).unwrap(),
            )
        })
        .collect();
    assert!(right.len() >= 4, "{right:?}");
    let victim = directory.file("victim");
    for (name, bytes) in &right {
        let mode = fs::metadata(Path::new(&out).join(name)).unwrap().mode();
        assert_eq!(mode & 0o077, 0, "{name} is readable by others");
        // A file of somebody's, or a link to one: alone, so that it is the one that is in the way.
        for link in [false, true] {
            let there = directory.file(&format!("{name}-{link}"));
            let path = Path::new(&there).join(name);
            fs::create_dir(&there).unwrap();
            fs::write(&victim, "precious").unwrap();
            if link {
                symlink(&victim, &path).unwrap();
            } else {
                fs::write(&path, "somebody's").unwrap();
            }
            refused(&replay("", &["--out", &there]), &[name]);
            assert_eq!(fs::read_dir(&there).unwrap().count(), 1, "{name}");
            assert!(link || fs::read(&path).unwrap() == b"somebody's");
            let forced = replay("", &["--force", "--out", &there]);
            assert!(link || forced.status == Some(0), "{forced:?}");
            assert!(forced.status != Some(0) || fs::read(&path).unwrap() == *bytes);
            assert_eq!(fs::read(&victim).unwrap(), b"precious");
        }
    }
}

fn a_replay_whose_disk_is_full_fails() {
    for blocks in [0, 1, 8] {
        let directory = Directory::new();
        let out = directory.file("out");
        fs::create_dir(&out).unwrap();
        let ended = replay(&format!("ulimit -f {blocks}"), &["--out", &out]);
        refused(&ended, &[]);
        assert_eq!(
            fs::read_dir(&out).unwrap().count(),
            0,
            "half of a state: {ended:?}"
        );
    }
}

fn captures_that_are_no_files_end() {
    let directory = Directory::new();
    let at = |name: &str| directory.file(name);
    mkfifo(Path::new(&at("fifo")), Mode::S_IRWXU).unwrap();
    let _socket = UnixListener::bind(at("socket")).unwrap();
    fs::create_dir(at("dir")).unwrap();
    fs::write(at("empty"), "").unwrap();
    for command in ["replay", "inspect"] {
        for name in ["socket", "dir", "empty", "missing"] {
            case();
            let path = at(name);
            let ended = end(start_under("", [command, &path]));
            assert!(
                ended.stderr.contains(&path) || ended.status == Some(0),
                "{ended:?}"
            );
        }
        case();
        // One that reads it on purpose waits for a writer, and is interrupted.
        let running = start_under("", [command, &at("fifo")]);
        thread::sleep(Duration::from_millis(300));
        running.signal("INT");
        let ended = end(running);
        assert!(matches!(ended.status, Some(1 | 130)), "{ended:?}");
    }
}
