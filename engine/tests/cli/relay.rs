//! The command's relay between a source and a destination that record everything: what was captured
//! between two QEMUs, a source with packets in any order, and peers that die, lie or stand still.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use serde_json::Value;
use vfio_migration::{
    DeviceId,
    wire::{
        DeviceKey, Frame, Framer, Hello, Kind, PageSize, RamHeader, Walk, encode_packet,
        encode_sync, wrap_config,
    },
};

use crate::{
    command::{Directory, Running, WATCHDOG, listen, random, words},
    start::run,
};

fn page_size() -> PageSize {
    PageSize::new(4096).unwrap()
}

// ------------------------------------------------------------------------------ what is fed in

fn hello(id: u8) -> Vec<u8> {
    let uuid = [7; 16];
    Hello { uuid, id }.encode().to_vec()
}

fn sync(number: u64) -> Vec<u8> {
    encode_sync(page_size(), number)
}

/// A RAM packet of one page.
fn ram(number: u64) -> Vec<u8> {
    let header = RamHeader {
        kind: Kind::Ram { flags: 0 },
        pages_alloc: 128,
        normal_pages: 1,
        next_packet_size: 4096,
        packet_num: number,
        zero_pages: 0,
        ramblock: b"pc.ram",
    };
    let mut bytes = header.encode().to_vec();
    bytes.extend((0..128_u64).flat_map(|at| random(number + at).to_be_bytes()));
    bytes.extend((0..4096).map(|at| random(at ^ number).to_le_bytes()[0]));
    bytes
}

fn key(device: u32) -> DeviceKey {
    DeviceKey::new(&DeviceId::new(format!("0000:00:{device:02x}.0/vfio"), 0).unwrap())
}

fn packet(device: u32, index: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    let mut bytes = encode_packet(&key(device), index, false, len).to_vec();
    bytes.extend(data);
    bytes
}

fn config(device: u32, index: u32) -> Vec<u8> {
    let data = wrap_config(b"config");
    let len = u32::try_from(data.len()).unwrap();
    let mut bytes = encode_packet(&key(device), index, true, len).to_vec();
    bytes.extend(data);
    bytes
}

// --------------------------------------------------------------------------------- what comes out

/// The frames of one channel.
#[derive(Debug, Default)]
struct Channel {
    /// Hello, RAM and SYNC packets, whole and in their order.
    others: Vec<Vec<u8>>,
    /// Device-state packets, whole, in their order; and how many of the others came before each.
    packets: Vec<((DeviceKey, u32), Vec<u8>, usize)>,
}

fn split(bytes: &[u8]) -> Channel {
    let mut channel = Channel::default();
    for located in Walk::new(bytes, Framer::new(Some(page_size()), 16 << 20)) {
        let located = located.unwrap();
        let whole = [located.header, located.payload].concat();
        match located.frame {
            Frame::DeviceState(packet) => {
                let key = DeviceKey::decode(located.header[12..272].try_into().unwrap()).unwrap();
                let name = (key, packet.packet.index);
                channel.packets.push((name, whole, channel.others.len()));
            }
            _ => channel.others.push(whole),
        }
    }
    channel
}

type Packets = BTreeMap<(Vec<u8>, u32), Vec<u8>>;

/// All device-state packets, by name and idx. None may be there twice.
fn packets<'a>(channels: impl IntoIterator<Item = &'a Channel>) -> Packets {
    let mut packets = Packets::new();
    for ((key, index), whole, _) in channels.into_iter().flat_map(|it| &it.packets) {
        let before = packets.insert((key.as_bytes().to_vec(), *index), whole.clone());
        assert!(before.is_none(), "idx {index} twice");
    }
    packets
}

/// What came out is what went in: the channels by their hellos, the packets on whichever.
fn same(sent: &[Vec<u8>], received: &[Vec<u8>]) {
    let by_hello = |all: &[Vec<u8>]| -> BTreeMap<Vec<u8>, Channel> {
        let channels = all.iter().map(|bytes| split(bytes));
        channels.map(|it| (it.others[0].clone(), it)).collect()
    };
    let (sent, received) = (by_hello(sent), by_hello(received));
    assert_eq!(sent.len(), received.len());
    for (hello, before) in &sent {
        let after = &received[hello];
        assert!(
            before.others == after.others,
            "hello, RAM and SYNC packets stay"
        );
        for (_, _, others_before) in &after.packets {
            assert!(*others_before >= 2, "a packet before hello and first SYNC");
        }
        // The engine hands a device's packets out in their order, so each channel has them so.
        let mut last = BTreeMap::new();
        for ((key, index), _, _) in &after.packets {
            let before = last.insert(key.as_bytes().to_vec(), *index);
            assert!(before < Some(*index), "idx {index} after {before:?}");
        }
    }
    let (before, after) = (packets(sent.values()), packets(received.values()));
    assert!(before == after, "each packet is what it was");
}

// ------------------------------------------------------------------------------ the destination

/// A destination that records what comes, each connection to its end.
struct Sink {
    address: String,
    accepting: JoinHandle<Vec<Vec<u8>>>,
    /// What the main channel is answered.
    _answer: Arc<Vec<u8>>,
}

/// Bytes read so far by all connections of a sink; and whether they may go on.
#[derive(Default)]
struct Tap {
    read: AtomicU64,
    closed: Mutex<bool>,
}

fn sink_at(
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
    fn new(directory: &Directory, connections: usize) -> Self {
        Self::with(directory, connections, Vec::new(), Arc::default())
    }

    fn with(directory: &Directory, connections: usize, answer: Vec<u8>, tap: Arc<Tap>) -> Self {
        let path = directory.path().join("to");
        Self {
            address: format!("unix:{}", path.display()),
            accepting: sink_at(&path, connections, answer.clone(), tap),
            _answer: Arc::new(answer),
        }
    }

    fn end(self) -> Vec<Vec<u8>> {
        self.accepting.join().unwrap()
    }
}

fn relay(directory: &Directory, to: &str, rest: &str) -> (Running, PathBuf) {
    let path = directory.path().join("from");
    let line = format!(
        "relay --json --listen unix:{} --to {to} {rest}",
        path.display()
    );
    let (running, _) = listen(words(&line));
    (running, path)
}

/// Sends all of a connection's bytes, in pieces, and then what the other side has said.
fn feed(path: &Path, bytes: Vec<u8>, piece: usize) -> JoinHandle<Vec<u8>> {
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

// ---------------------------------------------------------------------------------- what passes

/// One recorded migration: the main channel both ways, and the multifd channels.
struct Capture {
    main: [Vec<u8>; 2],
    channels: Vec<Vec<u8>>,
    expected: Value,
}

fn captures() -> Vec<Capture> {
    let data = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let folders = fs::read_dir(data).unwrap().map(|it| it.unwrap().path());
    let mut folders: Vec<_> = folders
        .filter(|path| path.join("expected.json").exists())
        .collect();
    folders.sort();
    assert!(folders.len() >= 4, "{folders:?}");
    let capture = |folder: PathBuf| {
        let read = |name: &str| fs::read(folder.join(name)).unwrap();
        let expected: Value = serde_json::from_slice(&read("expected.json")).unwrap();
        let names = expected["channels"].as_array().unwrap().iter();
        Capture {
            main: [read("00-c2s.bin"), read("00-s2c.bin")],
            channels: names.map(|name| read(name.as_str().unwrap())).collect(),
            expected,
        }
    };
    folders.into_iter().map(capture).collect()
}

#[test]
fn what_qemu_sent_passes_as_it_was() {
    for (number, capture) in captures().into_iter().enumerate() {
        let [main, answer] = capture.main;
        for piece in [usize::MAX, 1000 + number] {
            let directory = Directory::new();
            let count = capture.channels.len();
            let sink = Sink::with(&directory, count + 1, answer.clone(), Arc::default());
            let (relay, from) = relay(&directory, &sink.address, "");
            // The main channel may come after a channel, too.
            let mut fed = vec![feed(&from, capture.channels[0].clone(), piece)];
            let said = feed(&from, main.clone(), piece);
            fed.extend(
                capture.channels[1..]
                    .iter()
                    .map(|bytes| feed(&from, bytes.clone(), piece)),
            );
            let ended = relay.end();
            let received = sink.end();
            let (mains, channels): (Vec<_>, Vec<_>) =
                received.into_iter().partition(|it| it.starts_with(b"QEVM"));
            assert!(mains == [main.clone()], "the main channel is untouched");
            assert_eq!(said.join().unwrap(), answer);
            same(&capture.channels, &channels);
            for fed in fed {
                assert_eq!(fed.join().unwrap(), b"", "nothing comes back on a channel");
            }
            let json = ended.json();
            for device in capture.expected["devices"].as_array().unwrap() {
                let mut found = json["devices"].as_array().unwrap().iter();
                let found = found.find(|it| it["idstr"] == device["idstr"]).unwrap();
                assert_eq!(found["packets"], device["packets"]);
            }
            assert_eq!(json["main_to_destination"], main.len());
            assert_eq!(json["main_to_source"], answer.len());
        }
    }
}

/// `count` packets of `device`, of at most `len` bytes, in a random order; then the config.
fn shuffled(device: u32, count: u32, len: u64) -> Vec<Vec<u8>> {
    let data = |index: u32| {
        let seed = u64::from(device) << 32 | u64::from(index);
        let len = random(seed) % (len + 1);
        let bytes = (0..len).map(|at| random(seed ^ at << 40).to_le_bytes()[0]);
        bytes.collect::<Vec<_>>()
    };
    let mut all: Vec<_> = (0..count)
        .map(|index| packet(device, index, &data(index)))
        .collect();
    all.push(config(device, count));
    all.sort_by_cached_key(|bytes| random(u64::from(bytes[283]) << 32 | u64::from(bytes[282])));
    all
}

#[test]
fn packets_in_any_order_leave_in_theirs() {
    for channels in [1, 3] {
        let directory = Directory::new();
        let sink = Sink::new(&directory, channels);
        let (relay, from) = relay(
            &directory,
            &sink.address,
            &format!("--channels {channels} --budget 16MiB"),
        );
        let mut sent: Vec<Vec<u8>> = (0..channels)
            .map(|id| [hello(u8::try_from(id).unwrap()), sync(id as u64)].concat())
            .collect();
        let all = (1..=3).flat_map(|device| shuffled(device, 200, 5000));
        for (number, bytes) in all.enumerate() {
            let channel = &mut sent[number % channels];
            channel.extend(bytes);
            match random(number as u64) % 8 {
                0 => channel.extend(ram(number as u64)),
                1 => channel.extend(sync(number as u64)),
                _ => {}
            }
        }
        let fed: Vec<_> = sent
            .iter()
            .map(|it| feed(&from, it.clone(), 1 << 20))
            .collect();
        let json = relay.end().json();
        for fed in fed {
            fed.join().unwrap();
        }
        same(&sent, &sink.end());
        assert_eq!(json["late_wakeups"], 0);
        assert_eq!(json["devices"].as_array().unwrap().len(), 3);
        for device in json["devices"].as_array().unwrap() {
            assert_eq!(device["packets"], 201);
        }
    }
}

#[test]
fn a_packet_that_comes_too_early_waits_for_its_channels_first_sync() {
    let directory = Directory::new();
    let tap = Arc::new(Tap::default());
    let sink = Sink::with(&directory, 1, Vec::new(), tap.clone());
    let (relay, from) = relay(&directory, &sink.address, "--channels 1");
    let early = [hello(0), packet(1, 0, b"state"), config(1, 1)].concat();
    let mut source = UnixStream::connect(&from).unwrap();
    source.write_all(&early).unwrap();
    let hello_len = hello(0).len() as u64;
    let deadline = Instant::now() + WATCHDOG;
    while tap.read.load(Relaxed) < hello_len && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(5));
    }
    // Time enough for what must not come.
    thread::sleep(Duration::from_millis(300));
    assert_eq!(tap.read.load(Relaxed), hello_len);
    source.write_all(&sync(0)).unwrap();
    let whole = [early, sync(0)].concat();
    while tap.read.load(Relaxed) < whole.len() as u64 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(5));
    }
    drop(source);
    let json = relay.end().json();
    assert_eq!(json["devices"][0]["packets"], 2);
    assert_eq!(json["late_wakeups"], 0, "the SYNC lets them go");
    same(&[whole], &sink.end());
}

#[test]
fn nothing_but_ram_passes_too() {
    let directory = Directory::new();
    let sink = Sink::new(&directory, 1);
    let (relay, from) = relay(&directory, &sink.address, "--channels 1");
    let sent = [hello(0), sync(0), ram(1), ram(2), sync(3)].concat();
    let fed = feed(&from, sent.clone(), 77);
    let json = relay.end().json();
    assert_eq!(json["channels"][0]["ram_packets"], 2);
    assert_eq!(json["channels"][0]["syncs"], 2);
    fed.join().unwrap();
    assert!(sink.end() == [sent]);
}

// -------------------------------------------------------------------------- what cannot pass

#[test]
fn what_a_source_does_wrong_is_named_and_ends_both_sides() {
    let beginning = || [hello(0), sync(0)].concat();
    let mut version = packet(1, 3, b"x");
    version[276 + 3] = 1;
    let mut cases = vec![
        (
            [beginning(), packet(1, 0, b"x"), version].concat(),
            "channel 0",
            "unknown packet version 1",
        ),
        (
            [beginning(), packet(1, 4, b"x"), packet(1, 4, b"x")].concat(),
            "device 0000:00:01.0/vfio, channel 0, idx 4",
            "a second packet with this idx",
        ),
        (
            [beginning(), config(2, 1), packet(2, 2, b"x")].concat(),
            "device 0000:00:02.0/vfio, channel 0, idx 2",
            "idx above the config packet's",
        ),
        (
            // The source dies within a packet.
            [&beginning()[..], &packet(1, 0, b"12345")[..290]].concat(),
            "device 0000:00:01.0/vfio, channel 0, idx 0",
            "the channel ended inside a packet",
        ),
        (
            [&beginning()[..], &ram(1)[..2000]].concat(),
            "channel 0",
            "the channel ended inside a packet",
        ),
        (hello(0), "channel 0", "the channel ended inside a packet"),
        (
            [beginning(), packet(1, 0, b"x"), packet(1, 2, b"x")].concat(),
            "device 0000:00:01.0/vfio, idx 1",
            "the input has ended without this packet",
        ),
        (
            [
                beginning(),
                packet(1, 0, b"x"),
                packet(2, 0, b"x"),
                config(1, 1),
            ]
            .concat(),
            "device 0000:00:02.0/vfio, idx 1",
            "the input has ended without this packet",
        ),
        (
            [
                beginning(),
                (1..=3).flat_map(|device| config(device, 0)).collect(),
            ]
            .concat(),
            "device 0000:00:03.0/vfio, channel 0, idx 0",
            "more devices than max_devices",
        ),
    ];
    let mut huge = packet(1, 0, b"x");
    huge[272..276].copy_from_slice(&u32::MAX.to_be_bytes());
    cases.push((
        [beginning(), huge].concat(),
        "channel 0",
        "packet of 4294967295 bytes",
    ));
    for (sent, place, what) in cases {
        let directory = Directory::new();
        let sink = Sink::new(&directory, 1);
        let options = "--channels 1 --max-devices 2";
        let (relay, from) = relay(&directory, &sink.address, options);
        let fed = feed(&from, sent, usize::MAX);
        let ended = relay.end();
        let why = ended.why();
        assert!(why.contains(place) && why.contains(what), "{why}");
        // Both sides are let go.
        sink.end();
        fed.join().unwrap();
    }
}

#[test]
fn two_channels_of_one_id_are_refused() {
    let directory = Directory::new();
    let sink = Sink::new(&directory, 2);
    let (relay, from) = relay(&directory, &sink.address, "--channels 2");
    let beginning = [hello(5), sync(0)].concat();
    let mut open = UnixStream::connect(&from).unwrap();
    open.write_all(&beginning).unwrap();
    let fed = feed(&from, beginning, usize::MAX);
    let ended = relay.end();
    assert!(
        ended.why().contains("a second hello with channel id 5"),
        "{ended:?}"
    );
    fed.join().unwrap();
    // The other channel was hung up on as well, and a read ends.
    assert_eq!(open.read(&mut [0; 1]).unwrap_or(0), 0);
    sink.end();
}

#[test]
fn a_source_that_is_killed_takes_the_destination_with_it() {
    let directory = Directory::new();
    let sink = Sink::new(&directory, 3);
    let (relay, from) = relay(&directory, &sink.address, "");
    let mut main = UnixStream::connect(&from).unwrap();
    main.write_all(b"QEVM, and so on").unwrap();
    let mut channels: Vec<_> = (0..2)
        .map(|id| {
            let mut socket = UnixStream::connect(&from).unwrap();
            socket.write_all(&hello(id)).unwrap();
            socket.write_all(&sync(0)).unwrap();
            socket
        })
        .collect();
    channels[1].write_all(&packet(1, 0, &[1; 5000])).unwrap();
    channels[1]
        .write_all(&packet(1, 1, &[1; 5000])[..3000])
        .unwrap();
    drop((main, channels));
    let ended = relay.end();
    let why = ended.why();
    assert!(why.contains("the channel ended inside a packet"), "{why}");
    assert!(
        why.contains("device 0000:00:01.0/vfio") && why.contains("idx 1"),
        "{why}"
    );
    assert_eq!(sink.end().len(), 3);
}

#[test]
fn a_destination_that_is_gone_takes_the_source_with_it() {
    let directory = Directory::new();
    let path = directory.path().join("to");
    let listener = UnixListener::bind(&path).unwrap();
    let to = format!("unix:{}", path.display());
    let (relay, from) = relay(&directory, &to, "--channels 1");
    let mut source = UnixStream::connect(&from).unwrap();
    source.write_all(&[hello(0), sync(0)].concat()).unwrap();
    let (mut destination, _) = listener.accept().unwrap();
    let beginning = [hello(0), sync(0)].concat().len();
    destination.read_exact(&mut vec![0; beginning]).unwrap();
    drop(destination);
    // Ends: the relay finds out at one of its next writes, and hangs up.
    let mut index = 0;
    while source.write_all(&packet(1, index, &[1; 5000])).is_ok() {
        index += 1;
    }
    let ended = relay.end();
    let why = ended.why();
    let place = "send, device 0000:00:01.0/vfio, channel 0, idx ";
    assert!(
        why.contains(place) && why.contains("the connection failed"),
        "{why}"
    );
}

#[test]
fn without_a_destination_the_source_is_told() {
    let directory = Directory::new();
    let to = format!("unix:{}", directory.file("nobody"));
    let (relay, from) = relay(&directory, &to, "--connect-timeout 0.1");
    let fed = feed(&from, b"QEVM".to_vec(), usize::MAX);
    let ended = relay.end();
    assert!(ended.why().contains("cannot connect to unix:"), "{ended:?}");
    assert_eq!(fed.join().unwrap(), b"");
}

#[test]
fn a_connection_that_is_neither_is_shown_the_door() {
    let directory = Directory::new();
    let sink = Sink::new(&directory, 1);
    let (relay, from) = relay(&directory, &sink.address, "--channels 1");
    let wrong = feed(&from, b"GET / HTTP/1.0".to_vec(), usize::MAX);
    assert_eq!(wrong.join().unwrap(), b"");
    let sent = [hello(0), sync(0), config(1, 0)].concat();
    let fed = feed(&from, sent.clone(), usize::MAX);
    let ended = relay.end();
    assert!(ended.stderr.contains("0x47455420"), "{ended:?}");
    ended.json();
    fed.join().unwrap();
    same(&[sent], &sink.end());
}

#[test]
fn a_source_that_never_comes_is_waited_for_no_longer_than_said() {
    let directory = Directory::new();
    for (options, what) in [
        ("--accept-timeout 0.2", "no source has connected"),
        (
            "--accept-timeout 0.2 --channels 2",
            "0 of 2 multifd channels",
        ),
    ] {
        let (relay, _) = relay(&directory, "127.0.0.1:9", options);
        let ended = relay.end();
        assert!(ended.why().contains(what), "{ended:?}");
    }
}

#[test]
fn a_missing_packet_is_waited_for_no_longer_than_said() {
    let directory = Directory::new();
    let sink = Sink::new(&directory, 1);
    let (relay, from) = relay(&directory, &sink.address, "--channels 1 --timeout 0.5");
    let mut source = UnixStream::connect(&from).unwrap();
    let sent = [hello(0), sync(0), packet(1, 0, b"x"), packet(1, 2, b"x")].concat();
    source.write_all(&sent).unwrap();
    let ended = relay.end();
    let why = ended.why();
    assert!(why.contains("device 0000:00:01.0/vfio, idx 1"), "{why}");
    assert!(why.contains("no progress"), "{why}");
    sink.end();
}

#[test]
fn an_interrupt_ends_it_in_order() {
    let directory = Directory::new();
    let sink = Sink::new(&directory, 1);
    let (relay, from) = relay(&directory, &sink.address, "--channels 1");
    let mut source = UnixStream::connect(&from).unwrap();
    let sent = [hello(0), sync(0), packet(1, 0, b"x")].concat();
    source.write_all(&sent).unwrap();
    // Not before it is in the middle of it.
    let deadline = Instant::now() + WATCHDOG;
    while !sink.accepting.is_finished() && Instant::now() < deadline {
        relay.signal("INT");
        thread::sleep(Duration::from_millis(20));
        if source.write_all(&sync(1)).is_err() {
            break;
        }
    }
    assert_eq!(relay.end().status, Some(130));
    sink.end();
}

// ------------------------------------------------------------------------------ standing still

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
    assert!(json["held_high"].as_u64().unwrap() <= BUDGET, "{json}");
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
    assert_eq!(json["late_wakeups"], 0, "{json}");
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
        assert_eq!(json["late_wakeups"], 0);
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
