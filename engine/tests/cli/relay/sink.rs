//! A destination that records everything, and the relay before it.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use crate::command::{Directory, Running, listen, words};

/// A destination that records what comes, each connection to its end.
pub struct Sink {
    pub address: String,
    pub accepting: JoinHandle<Vec<Vec<u8>>>,
    /// What the main channel is answered.
    _answer: Arc<Vec<u8>>,
}

/// Bytes read so far by all connections of a sink; and whether they may go on.
#[derive(Default)]
pub struct Tap {
    pub read: AtomicU64,
    pub closed: Mutex<bool>,
}

pub fn sink_at(
    path: &Path,
    connections: usize,
    answer: Vec<u8>,
    tap: Arc<Tap>,
) -> JoinHandle<Vec<Vec<u8>>> {
    let listener = UnixListener::bind(path).unwrap();
    let answer = Arc::new(answer);
    thread::spawn(move || {
        let readers: Vec<_> = (0..connections)
            .map(|_| {
                let (mut socket, _) = listener.accept().unwrap();
                let (answer, tap) = (answer.clone(), tap.clone());
                thread::spawn(move || {
                    let mut bytes = Vec::new();
                    let mut chunk = vec![0; 64 << 10];
                    let mut answered = false;
                    loop {
                        while *tap.closed.lock().unwrap() {
                            thread::sleep(Duration::from_millis(2));
                        }
                        // A connection that breaks has ended too.
                        let count = socket.read(&mut chunk).unwrap_or(0);
                        if count == 0 {
                            return bytes;
                        }
                        bytes.extend(&chunk[..count]);
                        tap.read.fetch_add(count as u64, Relaxed);
                        if !answered && bytes.starts_with(b"QEVM") {
                            answered = true;
                            socket.write_all(&answer).unwrap();
                            socket.shutdown(Shutdown::Write).unwrap();
                        }
                    }
                })
            })
            .collect();
        let ended = readers.into_iter().map(|reader| reader.join().unwrap());
        ended.collect()
    })
}

impl Sink {
    pub fn new(directory: &Directory, connections: usize) -> Self {
        Self::with(directory, connections, Vec::new(), Arc::default())
    }

    pub fn with(directory: &Directory, connections: usize, answer: Vec<u8>, tap: Arc<Tap>) -> Self {
        let path = directory.path().join("to");
        Self {
            address: format!("unix:{}", path.display()),
            accepting: sink_at(&path, connections, answer.clone(), tap),
            _answer: Arc::new(answer),
        }
    }

    pub fn end(self) -> Vec<Vec<u8>> {
        self.accepting.join().unwrap()
    }
}

pub fn relay(directory: &Directory, to: &str, rest: &str) -> (Running, PathBuf) {
    let path = directory.path().join("from");
    let line = format!(
        "relay --json --listen unix:{} --to {to} {rest}",
        path.display()
    );
    let (running, _) = listen(words(&line));
    (running, path)
}

/// Sends all of a connection's bytes, in pieces, and then what the other side has said.
pub fn feed(path: &Path, bytes: Vec<u8>, piece: usize) -> JoinHandle<Vec<u8>> {
    let mut socket = UnixStream::connect(path).unwrap();
    thread::spawn(move || {
        for piece in bytes.chunks(piece) {
            // A relay that has failed hangs up; it says why itself.
            if socket.write_all(piece).is_err() {
                return Vec::new();
            }
        }
        let _hung_up = socket.shutdown(Shutdown::Write);
        let mut said = Vec::new();
        let _hung_up = socket.read_to_end(&mut said);
        said
    })
}
