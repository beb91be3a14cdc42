//! A destination that stands still: for a while, at its barriers, or for good.

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use crate::{
    command::{Directory, random, words},
    start::run,
};

use super::{
    fed::{config, hello, packet, ram, sync},
    received::{packets, same, split},
    sink::{Sink, Tap, feed, relay},
};

/// The most memory that a process has had, in bytes; none where it has ended.
fn peak(process: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|it| it.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib << 10)
}

/// The most memory that a process will have had by its end, in bytes.
fn watch_memory(process: u32) -> JoinHandle<u64> {
    thread::spawn(move || {
        let mut most = 0;
        // Ends: with the process.
        while let Some(peak) = peak(process) {
            most = peak;
            thread::sleep(Duration::from_millis(5));
        }
        most
    })
}

/// Device state and RAM, more than anybody may hold: of each of two channels, all its bytes.
fn flood() -> Vec<Vec<u8>> {
    let mut channels: Vec<_> = (0..2).map(|id| [hello(id), sync(0)].concat()).collect();
    for index in 0..96 {
        let seed = u8::try_from(index).unwrap();
        channels[index as usize % 2].extend(packet(1, index, &vec![seed; 1 << 20]));
        channels[index as usize % 2].extend(ram(index.into()));
    }
    channels[0].extend(config(1, 96));
    channels
}

/// Counts what a source could get rid of.
fn feed_counted(path: &Path, bytes: Vec<u8>, sent: &Arc<AtomicU64>) -> JoinHandle<()> {
    let mut socket = UnixStream::connect(path).unwrap();
    let sent = sent.clone();
    thread::spawn(move || {
        for piece in bytes.chunks(64 << 10) {
            if socket.write_all(piece).is_err() {
                return;
            }
            sent.fetch_add(piece.len() as u64, Relaxed);
        }
    })
}

#[test]
fn a_slow_destination_holds_the_source_back() {
    const BUDGET: u64 = 16 << 20;
    let directory = Directory::new();
    let tap = Arc::new(Tap::default());
    *tap.closed.lock().unwrap() = true;
    let sink = Sink::with(&directory, 2, Vec::new(), tap.clone());
    let options = format!("--channels 2 --budget {BUDGET}");
    let (relay, from) = relay(&directory, &sink.address, &options);
    let memory = watch_memory(relay.id());
    let sent = Arc::new(AtomicU64::new(0));
    let channels = flood();
    let all: u64 = channels.iter().map(|bytes| bytes.len() as u64).sum();
    let fed: Vec<_> = channels
        .iter()
        .map(|bytes| feed_counted(&from, bytes.clone(), &sent))
        .collect();
    // Until it stands still; where the machine does so earlier, less is seen, not more.
    let mut before = u64::MAX;
    while before != sent.load(Relaxed) {
        before = sent.load(Relaxed);
        thread::sleep(Duration::from_millis(500));
    }
    // The budget; and of each of two channels and two sides, what a socket and a thread hold.
    let held = BUDGET + 2 * 2 * (1 << 20);
    assert!(before <= held, "{before} bytes were taken from the source");
    *tap.closed.lock().unwrap() = false;
    for fed in fed {
        fed.join().unwrap();
    }
    let json = relay.end().json();
    let memory = memory.join().unwrap();
    assert!(memory > BUDGET, "it was seen");
    same(&channels, &sink.end());
    assert_eq!(tap.read.load(Relaxed), all);
    assert!(memory < BUDGET + (16 << 20), "{memory} bytes");
    assert!(
        json["totals"]["held_high"].as_u64().unwrap() <= BUDGET,
        "{json}"
    );
}

#[test]
fn a_budget_of_one_packet_is_enough_for_packets_in_order() {
    let directory = Directory::new();
    let sink = Sink::new(&directory, 2);
    let options = "--channels 2 --budget 1088KiB";
    let (relay, from) = relay(&directory, &sink.address, options);
    let channels = flood();
    let fed: Vec<_> = channels
        .iter()
        .map(|bytes| feed(&from, bytes.clone(), 1 << 20))
        .collect();
    let json = relay.end().json();
    assert_eq!(json["totals"]["late_wakeups"], 0, "{json}");
    for fed in fed {
        fed.join().unwrap();
    }
    same(&channels, &sink.end());
}

#[test]
fn a_destination_that_takes_nothing_is_waited_for_no_longer_than_said() {
    let directory = Directory::new();
    let tap = Arc::new(Tap::default());
    *tap.closed.lock().unwrap() = true;
    let sink = Sink::with(&directory, 2, Vec::new(), tap.clone());
    let (relay, from) = relay(&directory, &sink.address, "--channels 2 --timeout 0.5");
    let fed: Vec<_> = flood()
        .into_iter()
        .map(|bytes| feed(&from, bytes, 1 << 20))
        .collect();
    let ended = relay.end();
    let why = ended.why();
    assert!(
        why.contains("send, ") && why.contains("no progress"),
        "{why}"
    );
    *tap.closed.lock().unwrap() = false;
    for fed in fed {
        fed.join().unwrap();
    }
    sink.end();
}

/// A destination whose channels stand still at each SYNC until all have come to it: as QEMU's do.
struct Barrier {
    /// How many SYNCs each channel has come to.
    seen: Mutex<Vec<u64>>,
    /// Set where a channel has ended: then nobody waits any more.
    over: AtomicU64,
}

impl Barrier {
    fn sync(&self, channel: usize) {
        let mine = {
            let mut seen = self.seen.lock().unwrap();
            seen[channel] += 1;
            seen[channel]
        };
        while self.over.load(Relaxed) == 0
            && self.seen.lock().unwrap().iter().any(|&seen| seen < mine)
        {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// One frame of a channel, whole; `None` at its end, and where it breaks.
fn frame(socket: &mut UnixStream) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 12];
    socket.read_exact(&mut bytes).ok()?;
    let device_state = bytes[11] == 0x40;
    bytes.resize(if device_state { 276 } else { 1344 }, 0);
    socket.read_exact(&mut bytes[12..]).ok()?;
    let at = if device_state { 272 } else { 20 };
    let payload = u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    let header = bytes.len();
    bytes.resize(header + payload as usize, 0);
    socket.read_exact(&mut bytes[header..]).ok()?;
    Some(bytes)
}

fn sink_with_barriers(path: &Path, channels: usize) -> JoinHandle<Vec<Vec<u8>>> {
    let listener = UnixListener::bind(path).unwrap();
    let barrier = Arc::new(Barrier {
        seen: Mutex::new(vec![0; channels]),
        over: AtomicU64::new(0),
    });
    thread::spawn(move || {
        let readers: Vec<_> = (0..channels)
            .map(|channel| {
                let (mut socket, _) = listener.accept().unwrap();
                let barrier = barrier.clone();
                thread::spawn(move || {
                    let mut bytes = vec![0; 64];
                    let greeted = socket.read_exact(&mut bytes).is_ok();
                    while greeted && let Some(frame) = frame(&mut socket) {
                        let is_sync = frame[11] == 1;
                        bytes.extend(frame);
                        if is_sync {
                            barrier.sync(channel);
                        }
                    }
                    barrier.over.store(1, Relaxed);
                    bytes
                })
            })
            .collect();
        let ended = readers.into_iter().map(|reader| reader.join().unwrap());
        ended.collect()
    })
}

/// Three channels, six barriers; between them device state, `count` packets of 100 KiB in no order,
/// most of them on one channel, and RAM.
fn between_barriers(count: u32) -> Vec<Vec<u8>> {
    let mut channels: Vec<_> = (0..3).map(|id| [hello(id), sync(0)].concat()).collect();
    let mut order: Vec<u32> = (0..count).collect();
    order.sort_by_key(|&index| random(index.into()));
    for (round, some) in (1..).zip(order.chunks(order.len().div_ceil(6))) {
        for &index in some {
            let data = vec![index.to_le_bytes()[0]; 100 << 10];
            let channel = match random(u64::from(index) << 9) % 6 {
                0 => &mut channels[1],
                1 => &mut channels[2],
                _ => &mut channels[0],
            };
            channel.extend(packet(1, index, &data));
            channel.extend(ram(index.into()));
        }
        for channel in &mut channels {
            channel.extend(sync(round));
        }
    }
    channels[2].extend(config(1, count));
    channels
}

#[test]
fn device_state_passes_a_destination_that_stands_at_its_barriers() {
    for (budget, passes) in [("64MiB", true), ("2MiB", false)] {
        let directory = Directory::new();
        let path = directory.path().join("to");
        let sink = sink_with_barriers(&path, 3);
        let to = format!("unix:{}", path.display());
        let options = format!("--channels 3 --budget {budget} --timeout 1");
        let (relay, from) = relay(&directory, &to, &options);
        let channels = between_barriers(300);
        let fed: Vec<_> = channels
            .iter()
            .map(|bytes| feed(&from, bytes.clone(), 1 << 20))
            .collect();
        let ended = relay.end();
        if passes {
            ended.json();
        } else {
            // As documented: not enough for what must wait, and so it says what it waits for.
            let why = ended.why();
            assert!(why.contains("no progress"), "{why}");
            assert!(why.contains("device 0000:00:01.0/vfio"), "{why}");
        }
        for fed in fed {
            fed.join().unwrap();
        }
        let received = sink.join().unwrap();
        if passes {
            same(&channels, &received);
        }
    }
}

/// What a source's channel is given to send; and whom to tell when it is sent.
type Item = (Vec<u8>, Option<mpsc::Sender<()>>);

/// A source as QEMU is one. A device's thread hands out packets in the order of their idx, to
/// whichever channel is idle; the main thread hands out RAM, and SYNCs, and goes on with RAM only when
/// the SYNC has been sent on every channel.
fn source_with_barriers(from: &Path, channels: u8, packets: u32) {
    let (senders, threads): (Vec<_>, Vec<_>) = (0..channels)
        .map(|id| {
            let (sender, items) = mpsc::sync_channel::<Item>(0);
            let mut socket = UnixStream::connect(from).unwrap();
            let sending = thread::spawn(move || {
                socket.write_all(&[hello(id), sync(0)].concat()).unwrap();
                while let Ok((bytes, sent)) = items.recv() {
                    // A relay that has failed hangs up; it says why itself.
                    if socket.write_all(&bytes).is_err() {
                        return;
                    }
                    if let Some(sent) = sent {
                        let _main_has_gone = sent.send(());
                    }
                }
            });
            (sender, sending)
        })
        .unzip();
    let idle = |senders: &[mpsc::SyncSender<Item>], bytes: Vec<u8>, first: u64| {
        let mut item = (bytes, None);
        // Ends: with a channel that is idle, or with all of them gone.
        loop {
            let mut gone = 0;
            for at in 0..senders.len() {
                let at = (at + usize::try_from(first % 255).unwrap()) % senders.len();
                match senders[at].try_send(item) {
                    Ok(()) => return,
                    Err(mpsc::TrySendError::Full(back)) => item = back,
                    Err(mpsc::TrySendError::Disconnected(back)) => {
                        gone += 1;
                        item = back;
                    }
                }
            }
            if gone == senders.len() {
                return;
            }
            thread::sleep(Duration::from_micros(200));
        }
    };
    thread::scope(|scope| {
        let device = scope.spawn(|| {
            for index in 0..packets {
                let data = vec![index.to_le_bytes()[0]; 1 << 20];
                idle(&senders, packet(1, index, &data), random(index.into()));
            }
            idle(&senders, config(1, packets), 0);
        });
        let mut round = 0;
        while !device.is_finished() {
            round += 1;
            for number in 0..40 {
                idle(&senders, ram(round * 100 + number), number);
            }
            let (sent, seen) = mpsc::channel();
            for sender in &senders {
                let _gone = sender.send((sync(round), Some(sent.clone())));
            }
            drop(sent);
            // Ends: with every channel's word, or its end.
            assert!(seen.iter().count() <= senders.len());
        }
    });
    drop(senders);
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn memory_for_one_packet_is_enough_at_a_destinations_barriers() {
    for channels in [2, 4] {
        let directory = Directory::new();
        let path = directory.path().join("to");
        let sink = sink_with_barriers(&path, channels.into());
        let to = format!("unix:{}", path.display());
        let budget = (1 << 20) + 4096;
        let options = format!("--channels {channels} --budget {budget}");
        let (relay, from) = relay(&directory, &to, &options);
        source_with_barriers(&from, channels, 60);
        let json = relay.end().json();
        assert_eq!(json["devices"][0]["packets"], 61);
        assert_eq!(json["totals"]["late_wakeups"], 0);
        let received = sink.join().unwrap();
        let received: Vec<_> = received.iter().map(|bytes| split(bytes)).collect();
        assert_eq!(packets(&received).len(), 61);
    }
}

#[test]
fn wrong_use_is_said() {
    let from = |rest: &str| run(words(&format!("relay --listen 127.0.0.1:0 {rest}")));
    for (rest, what) in [
        ("", "--to"),
        ("--to 127.0.0.1:1 --channels 0", "--channels"),
        (
            "--to 127.0.0.1:1 --budget 1MiB",
            "budget: at least one packet",
        ),
        ("--to 127.0.0.1:1 --page-size 5", "page"),
    ] {
        let ended = from(rest);
        assert_eq!(ended.status, Some(2), "{ended:?}");
        assert!(ended.stderr.contains(what), "{ended:?}");
    }
}
