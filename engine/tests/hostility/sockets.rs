//! Sockets: what stands where one is to be, who comes to it, and what becomes of a connection.

use std::{
    fs,
    io::Write,
    net::{TcpListener, TcpStream},
    os::unix::{
        fs::{FileTypeExt, symlink},
        net::{UnixListener, UnixStream},
    },
    path::Path,
    thread,
    time::Duration,
};

use nix::{sys::stat::Mode, unistd::mkfifo};

use crate::{
    command::{Directory, listen, start, words},
    link::{Fate, Link},
    rig::{Ends, Rig, Wire, case, end, refused, sound, until},
    running::start_unread,
    tests,
};

tests! {
    any: [
        a_socket_that_was_left_behind_is_replaced,
        silent_strangers_keep_no_source_out,
        nobody_there_is_named,
        strangers_before_a_pipe_that_nobody_reads,
        strangers_harm_nobody,
        a_link_that_ends_ends_both,
        a_link_that_is_reset_ends_both,
        a_link_to_a_unix_socket_that_is_cut_ends_both,
        a_link_in_small_pieces_is_a_link,
        a_destination_that_is_slow_to_accept_is_waited_for,
        as_many_channels_as_there_may_be,
        what_stands_at_a_sockets_path_stays,
        a_path_that_has_become_somebody_elses_is_left_alone,
        closed_strangers_keep_no_source_out,
        few_files_and_many_strangers,
        a_full_backlog_ends_and_can_be_interrupted,
    ],
    root: [],
}

const RECEIVE: &str = "--accept-timeout 20 --timeout 5 --channels 2 --device sim:id=a";
const SEND: &str = "--timeout 5 --channels 2 --device sim:id=a,size=1MiB";

fn what_stands_at_a_sockets_path_stays() {
    let directory = Directory::new();
    let at = |name: &str| directory.file(name);
    fs::write(at("file"), "precious").unwrap();
    fs::create_dir(at("dir")).unwrap();
    mkfifo(Path::new(&at("fifo")), Mode::S_IRWXU).unwrap();
    symlink(at("file"), at("link")).unwrap();
    symlink(at("nothing"), at("dangling")).unwrap();
    let listens = UnixListener::bind(at("listens")).unwrap();
    // Bound, and its owner does not listen yet: a datagram socket never does.
    let _bound = std::os::unix::net::UnixDatagram::bind(at("bound")).unwrap();
    let names = [
        "file", "dir", "fifo", "link", "dangling", "listens", "bound",
    ];
    for name in names {
        for command in ["receive --device sim:id=a", "relay --to unix:nowhere"] {
            case();
            let path = at(name);
            let line = format!("{command} --accept-timeout 1 --listen unix:{path}");
            let ended = end(start(words(&line)));
            refused(&ended, &[&path]);
            assert!(!ended.stderr.contains("listening"), "{ended:?}");
            assert!(fs::symlink_metadata(&path).is_ok(), "{name} is gone");
        }
    }
    assert_eq!(fs::read(at("file")).unwrap(), b"precious");
    let is = |name: &str| fs::symlink_metadata(at(name)).unwrap().file_type();
    assert!(is("fifo").is_fifo() && is("link").is_symlink() && is("dangling").is_symlink());
    assert!(is("listens").is_socket() && is("bound").is_socket() && is("dir").is_dir());
    UnixStream::connect(at("listens")).unwrap();
    drop(listens);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), names.len());
}

fn a_socket_that_was_left_behind_is_replaced() {
    case();
    let directory = Directory::new();
    let path = directory.file("socket");
    drop(UnixListener::bind(&path).unwrap());
    let (receiving, to) = listen(words(&format!("receive --listen unix:{path} {RECEIVE}")));
    let sent = end(start(words(&format!("send --to {to} {SEND}"))));
    assert_eq!((sent.status, end(receiving).status), (Some(0), Some(0)));
    assert!(!fs::exists(path).unwrap());
}

fn a_path_that_has_become_somebody_elses_is_left_alone() {
    for socket in [true, false] {
        case();
        let directory = Directory::new();
        let path = directory.file("socket");
        let (receiving, _) = listen(words(&format!("receive --listen unix:{path} {RECEIVE}")));
        fs::remove_file(&path).unwrap();
        let _theirs = if socket {
            Some(UnixListener::bind(&path).unwrap())
        } else {
            fs::write(&path, "somebody's").unwrap();
            None
        };
        receiving.signal("INT");
        assert_eq!(end(receiving).status, Some(130));
        assert!(fs::exists(path).unwrap(), "it removed what was another's");
    }
}

/// What strangers say.
const WORDS: [&[u8]; 5] = [b"", b"Q", b"GET / HTTP/1.0\r\n\r\n", &[0; 64], b"QEVM"];

fn strangers_harm_nobody() {
    case();
    let (receiving, to) = listen(words(&format!("receive --listen 127.0.0.1:0 {RECEIVE}")));
    for number in 0..700 {
        let mut socket = TcpStream::connect(&to).unwrap();
        let _hung_up = socket.write_all(WORDS[number % 4]);
    }
    let sent = end(start(words(&format!("send --to {to} {SEND}"))));
    let received = end(receiving);
    assert_eq!(
        (sent.status, received.status),
        (Some(0), Some(0)),
        "{sent:?}; {received:?}"
    );
    let lines = received.stderr.lines().count();
    assert!(lines < 60, "{lines} lines about strangers");
}

fn strangers_before_a_pipe_that_nobody_reads() {
    for signal in ["INT", "TERM", "HUP"] {
        case();
        let directory = Directory::new();
        let path = directory.file("socket");
        let running = start_unread(words(&format!("receive --listen unix:{path} {RECEIVE}")));
        until("it listens", || UnixStream::connect(&path).is_ok());
        for _ in 0..1500 {
            // Where it stands still the backlog fills up: then it has been enough.
            let Ok(mut socket) = UnixStream::connect(&path) else {
                break;
            };
            let _hung_up = socket.write_all(b"GET / HTTP/1.0\r\n\r\n");
            thread::sleep(Duration::from_micros(200));
        }
        running.signal(signal);
        let ended = end(running);
        assert_ne!(ended.status, Some(0), "{ended:?}");
    }
}

fn silent_strangers_keep_no_source_out() {
    case();
    let (receiving, to) = listen(words(&format!("receive --listen 127.0.0.1:0 {RECEIVE}")));
    let silent: Vec<_> = (0..300).map(|_| TcpStream::connect(&to).unwrap()).collect();
    let line = format!("send --to {to} --timeout 20 --channels 2 --device sim:id=a");
    let sent = end(start(words(&line)));
    let received = end(receiving);
    assert_eq!(
        (sent.status, received.status),
        (Some(0), Some(0)),
        "{sent:?}; {received:?}"
    );
    drop(silent);
}

fn closed_strangers_keep_no_source_out() {
    case();
    let timeout = "--accept-timeout 30 --timeout 60 --channels 2 --device sim:id=a";
    let (receiving, to) = listen(words(&format!("receive --listen 127.0.0.1:0 {timeout}")));
    for number in 0..600 {
        let mut socket = TcpStream::connect(&to).unwrap();
        let _hung_up = socket.write_all(if number % 2 == 0 { b"" } else { b"QE" });
    }
    let sent = end(start(words(&format!("send --to {to} {SEND}"))));
    let received = end(receiving);
    assert_eq!(
        (sent.status, received.status),
        (Some(0), Some(0)),
        "{sent:?}; {received:?}"
    );
    // Nobody was waited for as one who is silent is.
    assert!(!received.stderr.contains("said nothing"), "{received:?}");
}

fn few_files_and_many_strangers() {
    for files in [40, 64] {
        let rig = Rig::new(3_000_000);
        let ends = Ends {
            wire: Wire::Tcp,
            both: "--timeout 15 --channels 2",
            send: "--connect-timeout 20",
            receive_under: &format!("ulimit -n {files}"),
            ..Ends::default()
        };
        // One that refuses to begin with so few is right too.
        let (receiving, to) = match rig.receive(&ends) {
            Ok(running) => running,
            Err(ended) => {
                refused(&sound(ended), &["files"]);
                continue;
            }
        };
        let strangers: Vec<_> = (0..100).map(|_| TcpStream::connect(&to).unwrap()).collect();
        let sending = rig.send(&to, &ends);
        thread::sleep(Duration::from_millis(500));
        drop(strangers);
        let (sent, received) = (end(sending), end(receiving));
        rig.judge(&sent, &received);
        assert_eq!(received.status, Some(0), "{received:?}");
    }
}

fn a_full_backlog_ends_and_can_be_interrupted() {
    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
    };
    use std::os::fd::AsRawFd;
    for signal in ["none", "INT", "TERM", "HUP"] {
        case();
        let directory = Directory::new();
        let path = directory.file("socket");
        let flags = SockFlag::SOCK_CLOEXEC;
        let listener = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
        bind(
            listener.as_raw_fd(),
            &UnixAddr::new(Path::new(&path)).unwrap(),
        )
        .unwrap();
        listen(&listener, Backlog::new(0).unwrap()).unwrap();
        // The one that it takes.
        let _first = UnixStream::connect(&path).unwrap();
        let sending = start(words(&format!(
            "send --to unix:{path} --connect-timeout 2 {SEND}"
        )));
        if signal == "none" {
            refused(&end(sending), &[&path]);
        } else {
            thread::sleep(Duration::from_millis(500));
            sending.signal(signal);
            let ended = end(sending);
            assert!(
                matches!(ended.status, Some(129 | 130 | 143)),
                "{signal}: {ended:?}"
            );
        }
    }
}

fn nobody_there_is_named() {
    let directory = Directory::new();
    fs::write(directory.file("file"), "").unwrap();
    // A port that was free a moment ago.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp = listener.local_addr().unwrap().to_string();
    drop(listener);
    let unix = |name: &str| format!("unix:{}", directory.file(name));
    for to in [tcp, unix("nobody"), unix("file"), unix("")] {
        case();
        let ended = end(start(words(&format!(
            "send --to {to} --connect-timeout 0.5 {SEND}"
        ))));
        refused(&ended, &[&to]);
    }
}

fn a_destination_that_is_slow_to_accept_is_waited_for() {
    for (wire, channels) in [(Wire::Tcp, 8), (Wire::Unix, 8)] {
        let rig = Rig::new(300_000);
        let ends = Ends {
            wire,
            both: &format!("--timeout 20 --channels {channels}"),
            send: "--connect-timeout 20",
            ..Ends::default()
        };
        let (receiving, to) = rig.receive(&ends).unwrap();
        let at = match wire {
            Wire::Tcp => "127.0.0.1:0".to_owned(),
            Wire::Unix => format!("unix:{}", rig.directory.file("link")),
        };
        let slow = Some(Duration::from_millis(300));
        let link = Link::new(
            &at,
            &to,
            Fate {
                slow,
                ..Fate::default()
            },
        )
        .unwrap();
        let sent = end(rig.send(&link.address, &ends));
        let received = end(receiving);
        drop(link);
        assert_eq!(sent.status, Some(0), "{sent:?}");
        rig.judge(&sent, &received);
    }
}

fn as_many_channels_as_there_may_be() {
    for wire in [Wire::Tcp, Wire::Unix] {
        for channels in [128, 255] {
            let rig = Rig::new(300_000);
            let (sent, _) = rig.migrate(&Ends {
                wire,
                both: &format!("--timeout 30 --channels {channels} --budget 64MiB"),
                ..Ends::default()
            });
            let sent = sent.unwrap();
            assert_eq!(sent.status, Some(0), "{wire:?}, {channels}: {sent:?}");
        }
    }
}

fn a_link_that_ends_ends_both() {
    cut(Wire::Tcp, false);
}

fn a_link_that_is_reset_ends_both() {
    cut(Wire::Tcp, true);
}

fn a_link_to_a_unix_socket_that_is_cut_ends_both() {
    cut(Wire::Unix, false);
}

fn cut(wire: Wire, reset: bool) {
    for at in [0, 1, 40, 100, 300, 1000, 10_000, 1_000_000, 2_999_999] {
        let rig = Rig::over(3_000_000);
        let ends = Ends {
            wire,
            both: "--timeout 2 --channels 2",
            ..Ends::default()
        };
        let (receiving, to) = rig.receive(&ends).unwrap();
        let fate = Fate {
            cut_at: Some(at),
            reset,
            ..Fate::default()
        };
        let link = Link::new("127.0.0.1:0", &to, fate).unwrap();
        let sent = end(rig.send(&link.address, &ends));
        drop(link);
        // Nothing has reached it.
        if at == 0 {
            receiving.signal("INT");
        }
        assert_ne!(sent.status, Some(0), "cut at {at}: {sent:?}");
        rig.judge(&sent, &end(receiving));
    }
}

fn a_link_in_small_pieces_is_a_link() {
    for piece in [1, 7, 1000] {
        let rig = Rig::new(20_000);
        let ends = Ends {
            both: "--timeout 30 --channels 2",
            ..Ends::default()
        };
        let (receiving, to) = rig.receive(&ends).unwrap();
        let fate = Fate {
            piece: Some(piece),
            ..Fate::default()
        };
        let link = Link::new("127.0.0.1:0", &to, fate).unwrap();
        let (sent, received) = (end(rig.send(&link.address, &ends)), end(receiving));
        assert_eq!(sent.status, Some(0), "{sent:?}");
        rig.judge(&sent, &received);
        drop(link);
    }
}
