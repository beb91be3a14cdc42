//! The command's connections are made within `--connect-timeout`: many at a time, to a destination
//! that is busy, far away or full; and Ctrl-C ends the wait.

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::sys::socket::Backlog;
use vfio_migration::stream::Reply;

use crate::{
    command::{Directory, Running, listen, start, words},
    start::run,
};

/// Where destinations listen.
fn addresses(directory: &Directory) -> [String; 2] {
    let path = directory.file("socket");
    ["127.0.0.1:0".into(), format!("unix:{path}")]
}

// ---------------------------------------------------------------- a listener of the test's own

enum Any {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Any {
    /// One with a backlog of one, and its address.
    fn small(address: &str) -> (Self, String) {
        let smallest = Backlog::new(1).unwrap();
        if let Some(path) = address.strip_prefix("unix:") {
            let listener = UnixListener::bind(path).unwrap();
            nix::sys::socket::listen(&listener.as_fd(), smallest).unwrap();
            (Self::Unix(listener), address.to_owned())
        } else {
            let listener = TcpListener::bind(address).unwrap();
            nix::sys::socket::listen(&listener.as_fd(), smallest).unwrap();
            let address = listener.local_addr().unwrap().to_string();
            (Self::Tcp(listener), address)
        }
    }

    fn accept(&self) -> Box<dyn Stream> {
        match self {
            Self::Tcp(listener) => Box::new(listener.accept().unwrap().0),
            Self::Unix(listener) => Box::new(listener.accept().unwrap().0),
        }
    }
}

trait Stream: Read + Write + Send {
    fn other(&self) -> Box<dyn Stream>;
    fn end(&self, how: Shutdown);
}

macro_rules! stream {
    ($socket:ty) => {
        impl Stream for $socket {
            fn other(&self) -> Box<dyn Stream> {
                Box::new(self.try_clone().unwrap())
            }

            fn end(&self, how: Shutdown) {
                let _ended = self.shutdown(how);
            }
        }
    };
}

stream!(TcpStream);
stream!(UnixStream);

fn try_connect(address: &str) -> Option<Box<dyn Stream>> {
    Some(match address.strip_prefix("unix:") {
        Some(path) => Box::new(UnixStream::connect(path).ok()?),
        None => Box::new(TcpStream::connect(address).ok()?),
    })
}

/// Takes the two places that a backlog of one has.
fn fill(address: &str) -> [Box<dyn Stream>; 2] {
    [(); 2].map(|()| try_connect(address).unwrap())
}

// ------------------------------------------------------------------------------------- it works

#[test]
fn two_hundred_and_fifty_five_channels_are_made() {
    let directory = Directory::new();
    for address in addresses(&directory) {
        let options = "--json --channels 255 --device sim:id=a";
        let (receiving, to) = listen(words(&format!("receive {options} --listen {address}")));
        let sent = run(words(&format!("send {options} --to {to}")));
        assert_eq!(sent.json()["channels"].as_array().unwrap().len(), 255);
        assert_eq!(
            receiving.end().json()["channels"].as_array().unwrap().len(),
            255
        );
    }
}

/// Between a source and a destination: accepts the first connection, and then none for a while. It
/// goes on until the test's end: an attempt that was given up may have to be accepted too.
fn busy(address: &str, to: String) -> String {
    let (listener, address) = Any::small(address);
    thread::spawn(move || {
        for number in 0_u32.. {
            let near = listener.accept();
            let Some(far) = try_connect(&to) else {
                return;
            };
            for (mut from, mut to) in [(near.other(), far.other()), (far, near)] {
                thread::spawn(move || {
                    let _broken = std::io::copy(&mut from, &mut to);
                    to.end(Shutdown::Write);
                });
            }
            if number == 0 {
                thread::sleep(Duration::from_millis(1200));
            }
        }
    });
    address
}

#[test]
fn a_busy_destination_is_waited_for() {
    let directory = Directory::new();
    for address in addresses(&directory) {
        let options = "--json --channels 8 --device sim:id=a";
        let (receiving, to) = listen(words(&format!("receive {options} --listen 127.0.0.1:0")));
        let address = busy(&address, to);
        let patience = "--connect-timeout 60";
        let sent = run(words(&format!("send {options} {patience} --to {address}")));
        assert_eq!(sent.json()["channels"].as_array().unwrap().len(), 8);
        receiving.end().json();
    }
}

#[test]
fn a_destination_that_does_not_listen_yet_is_waited_for() {
    let directory = Directory::new();
    for address in addresses(&directory) {
        // A port that is free a moment later, too.
        let address = if address.starts_with("unix:") {
            address
        } else {
            let listener = TcpListener::bind(&address).unwrap();
            listener.local_addr().unwrap().to_string()
        };
        let options = "--json --device sim:id=a";
        let patience = "--connect-timeout 60";
        let sending = start(words(&format!("send {options} {patience} --to {address}")));
        thread::sleep(Duration::from_millis(300));
        let (receiving, _) = listen(words(&format!("receive {options} --listen {address}")));
        sending.end().json();
        receiving.end().json();
    }
}

#[test]
fn a_name_is_looked_up() {
    let options = "--json --device sim:id=a";
    let (receiving, to) = listen(words(&format!("receive {options} --listen localhost:0")));
    let (_, port) = to.rsplit_once(':').unwrap();
    let sent = run(words(&format!("send {options} --to localhost:{port}")));
    sent.json();
    receiving.end().json();
}

// ------------------------------------------------------------------------------- it does not work

/// A destination that answers the first ping, lives, and takes no further connection.
struct NoAccept {
    address: String,
    over: Arc<AtomicBool>,
    living: JoinHandle<()>,
}

impl NoAccept {
    fn new(address: &str) -> Self {
        let (listener, address) = Any::small(address);
        let over = Arc::new(AtomicBool::new(false));
        let ends = over.clone();
        let living = thread::spawn(move || {
            let mut main = listener.accept();
            main.read_exact(&mut [0; 8]).unwrap();
            let mut value = 1;
            // Ends: with the source, or the test.
            while !ends.load(Relaxed) && Reply::Pong(value).write(&mut main).is_ok() {
                value = 2;
                thread::sleep(Duration::from_millis(100));
            }
        });
        Self {
            address,
            over,
            living,
        }
    }

    fn send(&self, options: &str) -> Running {
        let address = &self.address;
        start(words(&format!(
            "send --channels 8 --device sim:id=a --to {address} {options}"
        )))
    }

    fn end(self) {
        self.over.store(true, Relaxed);
        self.living.join().unwrap();
    }
}

#[test]
fn a_destination_that_accepts_nothing_is_waited_for_no_longer_than_said() {
    let directory = Directory::new();
    for address in addresses(&directory) {
        let destination = NoAccept::new(&address);
        let ended = destination.send("--connect-timeout 1 --timeout 30").end();
        let why = ended.why();
        assert!(why.contains("cannot connect to"), "{why}");
        assert!(
            why.contains("of 8 connections were made within 1 s"),
            "{why}"
        );
        destination.end();
    }
}

#[test]
fn all_connections_have_one_time() {
    let directory = Directory::new();
    let [_, address] = addresses(&directory);
    let line = format!("send --channels 8 --device sim:id=a --to {address} --connect-timeout 4");
    let sending = start(words(&line));
    thread::sleep(Duration::from_millis(2500));
    let destination = NoAccept::new(&address);
    let ended = sending.end();
    let (_, left) = ended.why().split_once("were made within ").unwrap();
    let (left, _) = left.split_once(" s").unwrap();
    // What the main channel's has left of it.
    assert!(left.parse::<f64>().unwrap() < 3.0, "{ended:?}");
    destination.end();
}

#[test]
fn an_interrupt_ends_connecting() {
    let directory = Directory::new();
    for address in addresses(&directory) {
        // Of the channels.
        let destination = NoAccept::new(&address);
        let sending = destination.send("--connect-timeout 1000 --timeout 1000");
        thread::sleep(Duration::from_millis(700));
        sending.signal("INT");
        let ended = sending.end();
        assert_eq!(ended.status, Some(130), "{ended:?}");
        destination.end();
    }
    for address in addresses(&Directory::new()) {
        // Of the main channel, to a listener that is full.
        let (listener, address) = Any::small(&address.replace("socket", "full"));
        let full = fill(&address);
        let line = format!("send --device sim:id=a --connect-timeout 1000 --to {address}");
        let sending = start(words(&line));
        thread::sleep(Duration::from_millis(500));
        sending.signal("INT");
        assert_eq!(sending.end().status, Some(130));
        // And a relay's.
        let path = directory.file("relay");
        let line = format!("relay --connect-timeout 1000 --listen unix:{path} --to {address}");
        let (relay, _) = listen(words(&line));
        let mut source = UnixStream::connect(&path).unwrap();
        source.write_all(b"QEVM").unwrap();
        thread::sleep(Duration::from_millis(500));
        relay.signal("INT");
        assert_eq!(relay.end().status, Some(130));
        drop((listener, full));
    }
}

/// How often a process's main thread has slept.
fn sleeps(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let mut lines = status.lines();
    let count = lines.find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    count.unwrap().trim().parse().unwrap()
}

/// For a connection, or for Ctrl-C: none of them has to be looked for.
#[test]
fn a_connect_sleeps_until_something_comes() {
    let (listener, address) = Any::small("127.0.0.1:0");
    let full = fill(&address);
    let line = format!("send --device sim:id=a --connect-timeout 1000 --to {address}");
    let sending = start(words(&line));
    thread::sleep(Duration::from_millis(1000));
    let before = sleeps(sending.id());
    thread::sleep(Duration::from_millis(2000));
    let times = sleeps(sending.id()) - before;
    // An attempt has ended, and another begun.
    assert!(times < 10, "{times} times in two seconds");
    sending.signal("INT");
    assert_eq!(sending.end().status, Some(130));
    drop((listener, full));
}

#[test]
fn a_destination_that_fails_meanwhile_ends_connecting() {
    let directory = Directory::new();
    for address in addresses(&directory) {
        let destination = NoAccept::new(&address);
        let sending = destination.send("--connect-timeout 1000 --timeout 1000");
        thread::sleep(Duration::from_millis(700));
        destination.end();
        let ended = sending.end();
        assert!(
            ended.why().contains("the destination has gone away"),
            "{ended:?}"
        );
    }
}
