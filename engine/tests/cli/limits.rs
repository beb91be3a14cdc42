//! What the command says to sizes, counts and times that cannot be, and to a host that lacks something.

use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::{Command, Stdio},
};

use crate::{
    barrier::sync,
    command::{
        Directory, Ended, Running, listen, listen_command, listen_under, start_command,
        start_under, words,
    },
    packets::{config_packet, hello, packet},
    start::run,
};

/// The options of a command that take a number, by its help.
fn numbers(command: &str) -> Vec<String> {
    let help = run(words(&format!("{command} --help"))).stdout;
    let options = help.lines().filter_map(|line| line.trim().split_once(" <"));
    let number = |kind: &str| {
        ["SIZE>", "N>", "SECONDS>"]
            .iter()
            .any(|of| kind.starts_with(of))
    };
    options
        .filter(|(name, kind)| name.starts_with("--") && number(kind))
        .map(|(name, _)| name.to_owned())
        .collect()
}

#[test]
fn a_number_that_cannot_be_is_refused_where_it_is_typed() {
    let mut tried = 0;
    for command in ["demo", "send", "receive", "relay", "replay", "inspect"] {
        for option in numbers(command) {
            // 2^64, what no type holds, and no number.
            for value in ["18446744073709551616", "1e400", "-1", "NaN", ""] {
                let ended = run([command, &format!("{option}={value}")]);
                assert_eq!(
                    ended.status,
                    Some(2),
                    "{command} {option}={value}: {ended:?}"
                );
                assert!(ended.stderr.contains(&option), "{ended:?}");
                tried += 1;
            }
        }
    }
    assert!(tried > 80, "{tried}");
    for (arguments, why) in [
        ("demo --state 9223372036854775808", "at most 1024 TiB"),
        ("demo --state 8192PiB", "at most 1024 TiB"),
        ("demo --devices 1025", "--devices"),
        ("demo --channels 256", "--channels"),
        ("demo --packet 16MiB", "less than 16 MiB"),
        ("demo --budget 9223372036854775808", "can address"),
        (
            "send --to unix:x --device sim:id=a,size=9223372036854775808",
            "at most 1024 TiB",
        ),
        (
            "send --to unix:x --device sim:id=a,precopy=9223372036854775808",
            "at most 1024 TiB",
        ),
        (
            "send --to unix:x --device sim:id=a --timeout 1e18",
            "1000000 seconds",
        ),
    ] {
        let ended = run(words(arguments));
        assert_eq!(ended.status, Some(2), "{arguments}: {ended:?}");
        assert!(ended.stderr.contains(why), "{arguments}: {ended:?}");
    }
}

/// Neither a panic nor an abort nor a fault: done, or one line that says what the host lacks. Returns
/// whether it was done. A limit below what the program's file takes is its loader's matter (127).
fn is_done(what: &str, ended: &Ended) -> bool {
    match ended.status {
        Some(0) => true,
        Some(1) => {
            let says = ended.stderr.contains("the host has no");
            assert!(says, "{what}: {ended:?}");
            ended.says_nothing_twice();
            false
        }
        Some(127) => false,
        _ => panic!("{what}: {ended:?}"),
    }
}

/// A capture of three devices on one channel.
fn capture(place: &Directory) -> String {
    let mut bytes = hello(0);
    bytes.extend(sync());
    for device in 0..3 {
        bytes.extend(packet(device, 0, &[1; 5000]));
        bytes.extend(config_packet(device, 1, b"config"));
    }
    let path = place.file("capture");
    fs::write(&path, bytes).unwrap();
    path
}

/// A destination and its address, or how it ended before it had one.
type Listening = Result<(Running, String), Ended>;

/// What is tried under each limit, by a function that runs it so.
fn each_command(
    place: &Directory,
    what: &str,
    run: &dyn Fn(&[String]) -> Ended,
    listens: &dyn Fn(&[String]) -> Listening,
) -> u32 {
    let mut done = 0;
    let mut count = |command: &str, ended: &Ended| {
        done += u32::from(is_done(&format!("{command}, {what}"), ended));
    };
    let device = "sim:id=a,size=300KiB";
    count(
        "demo",
        &run(&words("demo --devices 2 --channels 2 --state 1MiB")),
    );
    count("replay", &run(&["replay".into(), capture(place)]));

    let receive = words(&format!(
        "receive --listen 127.0.0.1:0 --device {device} --channels 2 --timeout 5"
    ));
    let send = |address: &str| {
        words(&format!(
            "send --to {address} --device {device} --channels 2 --timeout 5"
        ))
    };
    // A source under the limit, and a destination that is not.
    let (mut destination, address) = listen(&receive);
    let ended = run(&send(&address));
    count("send", &ended);
    if ended.status != Some(0) {
        destination.kill();
    }
    destination.end();
    // The other way round, and a relay between two.
    match listens(&receive) {
        Err(ended) => count("receive", &ended),
        Ok((destination, address)) => {
            let source = crate::start::run(send(&address));
            let ended = destination.end();
            count("receive", &ended);
            let agreed = (source.status == Some(0)) == (ended.status == Some(0));
            assert!(agreed, "{ended:?} {source:?}");
        }
    }
    let (mut destination, address) = listen(&receive);
    let relay = words(&format!(
        "relay --listen 127.0.0.1:0 --to {address} --timeout 5"
    ));
    match listens(&relay) {
        Err(ended) => {
            count("relay", &ended);
            destination.kill();
        }
        Ok((relay, address)) => {
            let source = crate::start::run(send(&address));
            count("relay", &relay.end());
            if source.status != Some(0) {
                destination.kill();
            }
        }
    }
    destination.end();
    done
}

#[test]
fn a_host_with_few_addresses_is_an_error_that_names_what_it_lacks() {
    let place = Directory::new();
    let fine = (0..24).map(|step| 16 + 4 * step);
    let coarse = (0..12).map(|step| 110 + 37 * step);
    let mut done = Vec::new();
    for mebibytes in fine.chain(coarse) {
        // Odd, so that another thing is the last that fits each time.
        let limit = format!(
            "ulimit -v {}; ulimit -c 0",
            (mebibytes << 10) + 4 * (mebibytes % 7) + 4
        );
        let run = |arguments: &[String]| start_under(&limit, arguments).end();
        let listens = |arguments: &[String]| listen_under(&limit, arguments);
        done.push(each_command(&place, &limit, &run, &listens));
    }
    assert_eq!(done.first(), Some(&0), "{done:?}");
    assert_eq!(done.last(), Some(&5), "{done:?}");
}

#[test]
fn a_budget_that_cannot_be_is_refused_before_anybody_is_told() {
    for (limit, budget) in [("ulimit -v 900000", "1GiB"), ("true", "900TiB")] {
        for command in [
            "receive --listen 127.0.0.1:0 --device sim:id=a",
            "relay --listen 127.0.0.1:0 --to 127.0.0.1:1",
            "send --to 127.0.0.1:1 --device sim:id=a",
            "demo --state 4KiB",
        ] {
            let arguments = words(&format!("{command} --budget {budget}"));
            let ended = start_under(limit, arguments).end();
            let why = ended.why();
            assert!(why.contains("the host has no"), "{ended:?}");
            assert!(why.contains("budget"), "{ended:?}");
            assert!(!ended.stderr.contains("listening on"), "{ended:?}");
        }
    }
}

#[test]
fn a_host_without_threads_is_an_error_that_names_them() {
    let place = Directory::new();
    // Where anybody may run it: a limit of processes is none for root.
    let program = place.file("vfio-migrate");
    // By a process of its own: a file that a fork of this one has open cannot be run.
    let source = env!("CARGO_BIN_EXE_vfio-migrate");
    let copied = Command::new("cp").args([source, &program]).status();
    assert!(copied.unwrap().success());
    for (path, mode) in [(place.path(), 0o777), (Path::new(&program), 0o755)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let _capture = capture(&place);
    let user = nix::unistd::geteuid()
        .is_root()
        .then_some(4_000_000_000 - std::process::id());
    let under = |limit: u32| {
        let program = program.clone();
        move |arguments: &[String]| {
            let mut command = Command::new("bash");
            command
                .args(["-c", "ulimit -u $1; shift; exec \"$@\"", "bash"])
                .arg(limit.to_string())
                .arg(&program)
                .args(arguments)
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            if let Some(user) = user {
                command.uid(user).gid(user);
            }
            command
        }
    };
    let mut done = Vec::new();
    for limit in 1..24 {
        let command = under(limit);
        let run = |arguments: &[String]| start_command(command(arguments)).end();
        let listens = |arguments: &[String]| listen_command(command(arguments));
        done.push(each_command(
            &place,
            &format!("{limit} threads"),
            &run,
            &listens,
        ));
    }
    // Another user's processes do not count; one's own do.
    if user.is_some() {
        assert_eq!(done.first(), Some(&0), "{done:?}");
        assert_eq!(done.last(), Some(&5), "{done:?}");
    }
}
