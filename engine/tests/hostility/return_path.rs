//! The return path: a destination that says too much, nothing, or what is not so.
//!
//! The destination is written here; `send` is the command's.

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use vfio_migration::stream::Reply;

use crate::{
    command::{Running, start, words},
    rig::{case, end, refused, until},
    tests,
};

tests! {
    any: [
        a_flood_of_replies_costs_no_memory,
        garbage_is_refused,
        a_cut_is_told_wherever_it_is,
        a_silent_destination_ends,
        a_reply_that_drips_ends,
        a_destination_that_lies_of_its_success_is_not_believed,
        a_destination_that_reads_nothing_ends_and_can_be_interrupted,
    ],
    root: [],
}

/// A destination of so many connections, which reads all that comes, and hands out its main channel.
struct False {
    address: String,
    over: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
    main: std::sync::mpsc::Receiver<TcpStream>,
}

impl False {
    fn new(reads: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        listener.set_nonblocking(true).unwrap();
        let over = Arc::new(AtomicBool::new(false));
        let (sender, main) = std::sync::mpsc::channel();
        let mine = over.clone();
        let accepting = thread::spawn(move || {
            let mut kept = Vec::new();
            // Relaxed: a flag, and nothing goes with it.
            while !mine.load(Relaxed) {
                let Ok((mut socket, _)) = listener.accept() else {
                    thread::sleep(Duration::from_millis(2));
                    continue;
                };
                socket.set_nonblocking(false).unwrap();
                kept.push(socket.try_clone().unwrap());
                // The first is the main channel.
                if kept.len() == 1 {
                    sender.send(socket.try_clone().unwrap()).unwrap();
                }
                if reads {
                    thread::spawn(move || {
                        let mut buffer = vec![0; 64 << 10];
                        while socket.read(&mut buffer).is_ok_and(|count| count > 0) {}
                    });
                }
            }
            for socket in kept {
                let _closed = socket.shutdown(Shutdown::Both);
            }
        });
        Self {
            address,
            over,
            accepting: Some(accepting),
            main,
        }
    }

    fn send(&self, rest: &str) -> (Running, TcpStream) {
        case();
        let line = format!("send --to {} --timeout 2 {rest}", self.address);
        let running = start(words(&line));
        let main = self.main.recv_timeout(Duration::from_secs(40)).unwrap();
        (running, main)
    }
}

impl Drop for False {
    fn drop(&mut self) {
        self.over.store(true, Relaxed);
        if let Some(accepting) = self.accepting.take() {
            let _panicked = accepting.join();
        }
    }
}

const DEVICE: &str = "--device sim:id=nic,size=256KiB";

fn reply(reply: &Reply) -> Vec<u8> {
    let mut bytes = Vec::new();
    reply.write(&mut bytes).unwrap();
    bytes
}

fn ready() -> Vec<u8> {
    reply(&Reply::Pong(1))
}

/// The most memory that a process has had, in KiB.
fn peak(process: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

fn a_flood_of_replies_costs_no_memory() {
    for flood in [
        reply(&Reply::Pong(2)),
        reply(&Reply::Other {
            kind: 77,
            payload: vec![7; 60_000],
        }),
        reply(&Reply::Other {
            kind: 0x7666,
            payload: vec![b'x'; 60_000],
        }),
    ] {
        for first in [Vec::new(), ready()] {
            let destination = False::new(true);
            let (running, mut main) = destination.send(DEVICE);
            main.write_all(&first).unwrap();
            let many = flood.repeat((1 << 20) / flood.len());
            main.set_write_timeout(Some(Duration::from_secs(1)))
                .unwrap();
            let mut most = 0;
            for _ in 0..48 {
                // One that has had enough hangs up, or reads no more.
                if main.write_all(&many).is_err() {
                    break;
                }
                most = most.max(peak(running.id()).unwrap_or(0));
            }
            most = most.max(peak(running.id()).unwrap_or(0));
            assert!(most < 150 << 10, "{most} KiB");
            running.signal("INT");
            let ended = end(running);
            assert_ne!(ended.status, Some(0), "{ended:?}");
        }
    }
}

fn a_destination_that_lies_of_its_success_is_not_believed() {
    // Before the channels are there, and before all is sent.
    for (first, size) in [(Vec::new(), "256KiB"), (ready(), "1024GiB")] {
        let destination = False::new(true);
        let (running, mut main) = destination.send(&format!("--device sim:id=nic,size={size}"));
        main.write_all(&first).unwrap();
        thread::sleep(Duration::from_millis(200));
        main.write_all(&reply(&Reply::Shut(0))).unwrap();
        let ended = end(running);
        assert_ne!(ended.status, Some(0), "{ended:?}");
        refused(&ended, &["destination"]);
    }
}

fn garbage_is_refused() {
    let garbage: &[&[u8]] = &[
        &[0xff; 8],
        b"HTTP/1.1 200 OK\r\n\r\n",
        &[0, 0, 0, 0, 0, 0, 0, 0],
        &[0, 1, 0, 0],
        &[0, 1, 0xff, 0xff],
        &[0, 2, 0, 3, 1, 2, 3],
        &[0, 7, 0, 9],
    ];
    for bytes in garbage {
        for first in [Vec::new(), ready()] {
            let destination = False::new(true);
            let (running, mut main) = destination.send(DEVICE);
            main.write_all(&first).unwrap();
            let _hung_up = main.write_all(bytes);
            let ended = end(running);
            refused(&ended, &["destination"]);
        }
    }
}

fn a_cut_is_told_wherever_it_is() {
    let said = [ready(), reply(&Reply::Pong(2)), reply(&Reply::Shut(0))].concat();
    // Before the last byte: behind it the destination has said that all is loaded.
    for cut in 0..said.len() {
        let destination = False::new(true);
        let (running, mut main) = destination.send(DEVICE);
        if cut > 16 {
            // What says that all is loaded comes when all is sent.
            main.write_all(&said[..16]).unwrap();
            thread::sleep(Duration::from_millis(300));
            let _hung_up = main.write_all(&said[16..cut]);
        } else {
            main.write_all(&said[..cut]).unwrap();
        }
        let _closed = main.shutdown(Shutdown::Both);
        refused(&end(running), &["destination"]);
    }
}

fn a_silent_destination_ends() {
    for first in [Vec::new(), ready(), [ready(), ready()].concat()] {
        let destination = False::new(true);
        let (running, mut main) = destination.send(DEVICE);
        main.write_all(&first).unwrap();
        refused(&end(running), &["destination", "2 s"]);
    }
}

fn a_destination_that_reads_nothing_ends_and_can_be_interrupted() {
    for interrupted in [false, true] {
        let destination = False::new(false);
        let (running, mut main) = destination.send("--device sim:id=nic,size=1024GiB");
        main.write_all(&ready()).unwrap();
        // It says that it is there, so that only what it takes can tell.
        let over = Arc::new(AtomicBool::new(false));
        let mine = over.clone();
        let beating = thread::spawn(move || {
            while !mine.load(Relaxed) && main.write_all(&reply(&Reply::Pong(2))).is_ok() {
                thread::sleep(Duration::from_millis(100));
            }
        });
        if interrupted {
            thread::sleep(Duration::from_millis(500));
            running.signal("INT");
            assert_eq!(end(running).status, Some(130));
        } else {
            refused(&end(running), &["channel"]);
        }
        over.store(true, Relaxed);
        beating.join().unwrap();
    }
}

fn a_reply_that_drips_ends() {
    let destination = False::new(true);
    let (mut running, mut main) = destination.send(DEVICE);
    let all = reply(&Reply::Other {
        kind: 77,
        payload: vec![7; 60_000],
    });
    let mut bytes = all.iter();
    until("it ends while a reply drips", || {
        // A byte every 20 ms: never silent, and twenty minutes in all.
        thread::sleep(Duration::from_millis(20));
        let _hung_up = bytes.next().map(|byte| main.write_all(&[*byte]));
        running.is_over()
    });
    refused(&end(running), &["destination"]);
}
