//! Where the command listens: what is at a path already, who connects, and what the host
//! allows.

use std::{
    fs,
    io::{Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            fs::{MetadataExt, symlink},
            net::{UnixDatagram, UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, socket};

use crate::{
    command::{
        Directory, Ended, Running, WATCHDOG, listen, listen_under, start, start_under, words,
    },
    start::run,
};

/// The commands that listen, up to the address.
const LISTENERS: [&str; 2] = [
    "receive --device sim:id=a --accept-timeout 0.3 --listen",
    "relay --to unix:/nobody --accept-timeout 0.3 --listen",
];

fn refused(command: &str, path: &Path, what: &str) {
    let ended = run(words(&format!("{command} unix:{}", path.display())));
    let why = ended.why();
    assert!(why.contains("cannot listen on unix:"), "{why}");
    assert!(why.contains(what), "{why}");
}

// ---------------------------------------------------------------------------------- the path

#[test]
fn what_is_no_socket_stays() {
    for command in LISTENERS {
        let directory = Directory::new();
        let file = directory.path().join("file");
        fs::write(&file, "precious").unwrap();
        let fifo = directory.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let folder = directory.path().join("folder");
        fs::create_dir(&folder).unwrap();
        let link = directory.path().join("link");
        symlink("file", &link).unwrap();
        for path in [&file, &fifo, &folder, &link] {
            let before = fs::symlink_metadata(path).unwrap();
            refused(command, path, "it is no socket");
            let after = fs::symlink_metadata(path).unwrap();
            assert_eq!(
                (before.ino(), before.file_type()),
                (after.ino(), after.file_type())
            );
        }
        assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 4);
    }
}

/// A stream socket that is bound, and does not listen yet.
fn bound(path: &Path) -> OwnedFd {
    let fd = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    );
    let fd = fd.unwrap();
    bind(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    fd
}

#[test]
fn a_socket_that_a_process_has_stays_and_is_not_disturbed() {
    for command in LISTENERS {
        let directory = Directory::new();
        let path = |name: &str| directory.path().join(name);
        let listener = UnixListener::bind(path("listens")).unwrap();
        let datagrams = UnixDatagram::bind(path("datagrams")).unwrap();
        let soon = bound(&path("soon"));
        for name in ["listens", "datagrams", "soon"] {
            refused(command, &path(name), "a process has that socket");
        }
        // Nobody has knocked.
        listener.set_nonblocking(true).unwrap();
        let came = listener.accept();
        assert_eq!(came.unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        nix::sys::socket::listen(&soon, nix::sys::socket::Backlog::MAXALLOWABLE).unwrap();
        UnixStream::connect(path("soon")).unwrap();
        let sender = UnixDatagram::unbound().unwrap();
        sender.send_to(b"x", path("datagrams")).unwrap();
        assert_eq!(datagrams.recv(&mut [0; 1]).unwrap(), 1);
    }
}

#[test]
fn a_socket_that_a_process_has_left_behind_is_replaced_and_then_gone() {
    for command in LISTENERS {
        let directory = Directory::new();
        let path = directory.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        drop(bound(&directory.path().join("other")));
        let ended = run(words(&format!("{command} unix:{}", path.display())));
        assert!(ended.why().contains("no source has connected"), "{ended:?}");
        assert!(!path.exists());
        // Not the one that was nobody's business.
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}

#[test]
fn on_the_way_out_only_its_own_socket_goes() {
    let directory = Directory::new();
    let path = directory.path().join("socket");
    let start = || {
        let line = "receive --device sim:id=a --accept-timeout 600 --listen unix:";
        listen(words(&format!("{line}{}", path.display()))).0
    };
    let receiving = start();
    fs::remove_file(&path).unwrap();
    let another = UnixListener::bind(&path).unwrap();
    receiving.signal("TERM");
    assert_eq!(receiving.end().status, Some(130));
    UnixStream::connect(&path).unwrap();
    drop(another);

    let receiving = start();
    fs::remove_file(&path).unwrap();
    fs::write(&path, "precious").unwrap();
    receiving.signal("TERM");
    assert_eq!(receiving.end().status, Some(130));
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    fs::remove_file(&path).unwrap();

    // Many at a time: one of them has it, and nobody takes it away from that one.
    drop(UnixListener::bind(&path).unwrap());
    let line = format!(
        "{} unix:{}",
        LISTENERS[0].replace("0.3", "2"),
        path.display()
    );
    let all: Vec<_> = (0..8)
        .map(|_| crate::command::start(words(&line)))
        .collect();
    let ended: Vec<_> = all.into_iter().map(Running::end).collect();
    let had = |it: &&Ended| it.why().contains("no source has connected");
    assert_eq!(ended.iter().filter(had).count(), 1, "{ended:?}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

// --------------------------------------------------------------------------- who connects

/// The time that a process has had of a processor so far, in hundredths of a second.
fn cpu(process: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let (_, rest) = stat.rsplit_once(')').unwrap();
    let fields: Vec<_> = rest.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

/// That a process sleeps, nearly, while things stand as they do.
fn sleeps(process: u32) {
    const SECONDS: u64 = 2;
    let before = cpu(process);
    thread::sleep(Duration::from_secs(SECONDS));
    let used = cpu(process) - before;
    // A process that spins has 100 a second, or what a busy machine leaves of it.
    assert!(used < SECONDS * 25, "{used} hundredths of a second");
}

fn receiving(directory: &Directory) -> (Running, PathBuf) {
    let path = directory.path().join("socket");
    let line = "receive --json --device sim:id=a --listen unix:";
    let (running, _) = listen(words(&format!("{line}{}", path.display())));
    (running, path)
}

fn send(path: &Path) -> Running {
    start(words(&format!(
        "send --json --device sim:id=a --connect-timeout 60 --to unix:{}",
        path.display()
    )))
}

#[test]
fn a_door_full_of_silent_connections_sleeps_and_lets_a_source_in() {
    let directory = Directory::new();
    let (receiving, path) = receiving(&directory);
    // Some of them say the beginning of something.
    let strangers: Vec<_> = (0..600)
        .map(|number| {
            let mut stranger = UnixStream::connect(&path).unwrap();
            stranger.write_all(&b"QEV"[..number % 3]).unwrap();
            stranger
        })
        .collect();
    sleeps(receiving.id());
    send(&path).end().json();
    let ended = receiving.end();
    assert!(ended.stderr.contains("too many of them"), "{ended:?}");
    ended.json();
    drop(strangers);
}

#[test]
fn connections_that_are_gone_again_leave_their_places_at_once() {
    let directory = Directory::new();
    let (receiving, path) = receiving(&directory);
    for number in 0..2000 {
        // In a full backlog of closed ones, too.
        let mut stranger = UnixStream::connect(&path).unwrap();
        stranger.write_all(&b"QEV"[..number % 4]).unwrap();
    }
    // They have gone when the process holds no more of them than before.
    let open = || {
        fs::read_dir(format!("/proc/{}/fd", receiving.id()))
            .unwrap()
            .count()
    };
    let deadline = Instant::now() + WATCHDOG;
    while open() > 40 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(5));
    }
    send(&path).end().json();
    let ended = receiving.end();
    assert!(!ended.stderr.contains("said nothing"), "{ended:?}");
    ended.json();
}

#[test]
fn a_source_gets_in_while_strangers_come_and_go() {
    let directory = Directory::new();
    let (receiving, path) = receiving(&directory);
    let knocking = path.clone();
    let strangers = thread::spawn(move || {
        let mut held = Vec::new();
        // Ends: with the destination.
        for number in 0_usize.. {
            let Ok(mut stranger) = UnixStream::connect(&knocking) else {
                return number;
            };
            let _gone = stranger.write_all(&b"QEV"[..number % 4]);
            held.push(stranger);
            if held.len() > 300 {
                held.drain(..150);
            }
            thread::sleep(Duration::from_millis(1));
        }
        unreachable!("the destination ends before");
    });
    thread::sleep(Duration::from_millis(500));
    send(&path).end().json();
    receiving.end().json();
    assert!(strangers.join().unwrap() > 0);
}

// -------------------------------------------------------------------------------- what is scarce

/// Sets how many files a process may open: the soft limit, the hard one.
fn prlimit(process: u32, soft: u64, hard: u64) {
    let set = Command::new("prlimit")
        .args([
            format!("--pid={process}"),
            format!("--nofile={soft}:{hard}"),
        ])
        .status();
    assert!(set.unwrap().success());
}

#[test]
fn a_host_without_files_keeps_connections_waiting_and_no_longer() {
    for relay in [false, true] {
        let directory = Directory::new();
        let (receiving, to) = receiving(&directory);
        let (listening, path) = if relay {
            let path = directory.path().join("relay");
            let line = format!(
                "relay --channels 4 --listen unix:{} --to unix:{}",
                path.display(),
                to.display()
            );
            (Some(listen(words(&line)).0), path)
        } else {
            (None, to)
        };
        let process = listening.as_ref().unwrap_or(&receiving).id();
        let (soft, hard) =
            nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
        prlimit(process, 3, hard);
        let strangers: Vec<_> = (0..20)
            .map(|_| UnixStream::connect(&path).unwrap())
            .collect();
        let sending = send(&path);
        sleeps(process);
        prlimit(process, soft, hard);
        sending.end().json();
        receiving.end().json();
        if let Some(relay) = listening {
            let ended = relay.end();
            assert_eq!(ended.status, Some(0), "{ended:?}");
            assert!(
                ended.stderr.contains("connections have to wait"),
                "{ended:?}"
            );
        }
        drop(strangers);
    }
}

/// What a shell does first, so that a command has these limits of open files.
fn limits(soft: u64, hard: u64) -> String {
    format!("ulimit -n {hard} && ulimit -Sn {soft}")
}

fn run_limited(soft: u64, hard: u64, line: &str) -> Ended {
    start_under(&limits(soft, hard), words(line)).end()
}

#[test]
fn what_a_host_does_not_allow_is_said_at_the_start_with_the_number() {
    for (line, needed) in [
        (
            "send --channels 255 --device sim:id=a --to unix:/nobody",
            582,
        ),
        (
            "receive --channels 255 --device sim:id=a --listen unix:/nowhere/socket",
            582,
        ),
        (
            "relay --channels 255 --to unix:/nobody --listen unix:/nowhere/socket",
            1084,
        ),
    ] {
        let ended = run_limited(64, needed - 1, line);
        let why = ended.why();
        assert!(why.contains("255 channels"), "{why}");
        assert!(why.contains(&format!("{needed} open files")), "{why}");
        assert!(
            why.contains(&format!("no more than {}", needed - 1)),
            "{why}"
        );
        // What is enough is raised to, and it comes as far as the network.
        let ended = run_limited(64, needed, &format!("{line} {}", short(line)));
        assert!(ended.why().contains("cannot"), "{ended:?}");
        assert!(!ended.why().contains("open files"), "{ended:?}");
    }
}

fn short(line: &str) -> &'static str {
    if line.starts_with("send") {
        "--connect-timeout 0.1"
    } else {
        ""
    }
}

#[test]
fn the_limit_is_raised_to_what_255_channels_need() {
    let directory = Directory::new();
    let path = directory.file("socket");
    let receive = format!("receive --json --channels 255 --device sim:id=a --listen unix:{path}");
    let receiving = listen_under(&limits(64, 600), words(&receive)).unwrap().0;
    let send = format!("send --json --channels 255 --device sim:id=a --to unix:{path}");
    run_limited(64, 600, &send).json();
    let json = receiving.end().json();
    assert_eq!(json["channels"].as_array().unwrap().len(), 255);
}

#[test]
fn strangers_never_take_the_files_that_a_migration_needs() {
    let directory = Directory::new();
    let path = directory.file("socket");
    let receive = format!("receive --json --device sim:id=a --listen unix:{path}");
    let receiving = listen_under(&limits(82, 82), words(&receive)).unwrap().0;
    let mut strangers: Vec<_> = (0..200)
        .map(|_| UnixStream::connect(&path).unwrap())
        .collect();
    send(Path::new(&path)).end().json();
    receiving.end().json();
    assert_eq!(
        strangers[0].read(&mut [0; 1]).unwrap_or(0),
        0,
        "they are let go"
    );
}
