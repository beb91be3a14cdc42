//! A listening socket that is passed as stdin, as a service manager does; and what is passed and is none.

use std::{
    fs::File,
    net::TcpListener,
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::Path,
};

use crate::{
    command::{Directory, command_under, listen_command, start, start_command, words},
    start::run,
};

fn receive(stdin: OwnedFd) -> std::process::Command {
    let line = "receive --listen stdin --channels 2 --device sim:id=a";
    let mut command = command_under("", words(line));
    command.stdin(stdin);
    command
}

#[test]
fn a_socket_that_was_passed_is_listened_on_and_stays() {
    let directory = Directory::new();
    let path = directory.file("socket");
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let unix = UnixListener::bind(&path).unwrap();
    let addresses = [
        tcp.local_addr().unwrap().to_string(),
        format!("unix:{path}"),
    ];
    let sockets: [OwnedFd; 2] = [tcp.into(), unix.into()];
    for (address, socket) in addresses.iter().zip(sockets) {
        // Twice: what one migration leaves, the next one finds.
        for _ in 0..2 {
            let passed = socket.try_clone().unwrap();
            let (receiving, said) = listen_command(receive(passed)).expect("it listens");
            assert_eq!(said, *address);
            let line = format!("send --to {address} --channels 2 --device sim:id=a,seed=3");
            let sent = start(words(&line)).end();
            assert_eq!(
                (sent.status, receiving.end().status),
                (Some(0), Some(0)),
                "{sent:?}"
            );
        }
    }
    assert!(Path::new(&path).exists());
}

#[test]
fn what_is_no_socket_that_listens_is_refused() {
    let unix = std::os::unix::net::UnixDatagram::unbound().unwrap();
    let passed: [OwnedFd; 2] = [File::open("/dev/null").unwrap().into(), unix.into()];
    for passed in passed {
        let ended = start_command(receive(passed)).end();
        assert!(ended.why().contains("StandardInput=socket"), "{ended:?}");
    }
    let ended = run(words("send --to stdin --device sim:id=a"));
    assert_eq!(ended.status, Some(2), "{ended:?}");
}

/// Up to the look at its socket: every argument is one.
#[test]
fn the_units_command_line_is_taken() {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/systemd");
    let unit = std::fs::read_to_string(unit.join("vfio-migrate-relay.service")).unwrap();
    let line = unit
        .lines()
        .find_map(|line| line.strip_prefix("ExecStart=/usr/bin/vfio-migrate "));
    let line = line.unwrap().replace("${DESTINATION}", "127.0.0.1:9");
    let ended = start_command(command_under("", words(&line))).end();
    assert!(ended.why().contains("StandardInput=socket"), "{ended:?}");
}

/// What a package brings beside the command.
#[test]
fn pages_and_completions_are_made_of_the_arguments() {
    let directory = Directory::new();
    let out = directory.file("man");
    assert_eq!(run(words(&format!("man --out {out}"))).status, Some(0));
    for (page, part) in [
        ("vfio-migrate.1", "vfio\\-migrate"),
        ("vfio-migrate-save.1", "\\-\\-force"),
        ("vfio-migrate-doctor.1", "\\-\\-channels"),
    ] {
        let text = std::fs::read_to_string(format!("{out}/{page}")).unwrap();
        assert!(
            text.contains(".TH") && text.contains(part),
            "{page}: {text}"
        );
    }
    let page = run(words("man"));
    assert!(
        page.status == Some(0) && page.stdout.contains(".TH"),
        "{page:?}"
    );
    for shell in ["bash", "zsh", "fish"] {
        let script = run(words(&format!("completions {shell}")));
        assert_eq!(script.status, Some(0), "{script:?}");
        assert!(script.stdout.contains("leave-devices"), "{shell}");
    }
    assert_eq!(run(words("completions none")).status, Some(2));
}
