//! The main channel of a source that is cut, damaged, or out of order.
//!
//! The source is written here, and right but for one thing; `receive` is the command's.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    thread,
    time::Duration,
};

use vfio_migration::{
    DeviceId, section,
    stream::{Command, Event, Section, SectionKind, Writer},
    wire::{DeviceKey, Hello, PageSize, encode_packet, encode_sync, wrap_config},
};

use crate::{
    command::{Ended, random},
    rig::{Ends, Rig, Wire, end, refused},
    tests,
};

tests! {
    any: [
        garbage_is_no_main_channel,
        a_channel_of_another_vm_or_twice_is_named,
        a_slow_drip_before_the_switchover_ends,
        a_cut_is_told_wherever_it_is,
        what_is_right_is_loaded,
        a_damaged_byte_never_loads_another_state,
        what_is_out_of_order_is_named,
    ],
    root: [],
}

const STATE: &[u8] = b"first, second";

fn owner(idstr: &str) -> DeviceId {
    DeviceId::new(idstr, 0).unwrap()
}

/// One thing that a main channel says.
#[derive(Clone, Debug)]
enum Say {
    /// A section's part: which, its id, its version, and whose it is.
    Part(SectionKind, u32, u32, &'static str),
    Event(Event),
    Bytes(Vec<u8>),
}

use Say::{Bytes, Part};

fn part(kind: SectionKind) -> Say {
    Part(kind, 1, 1, "nic")
}

fn start() -> Say {
    Say::Event(Event::Command(Command::SwitchoverStart))
}

fn eof() -> Say {
    Say::Event(Event::Eof)
}

fn description() -> Say {
    Say::Event(Event::Description(b"{}".to_vec()))
}

/// What a right source says.
fn right() -> Vec<Say> {
    vec![
        part(SectionKind::Start),
        start(),
        part(SectionKind::End),
        part(SectionKind::Full),
        eof(),
        description(),
    ]
}

fn bytes(all: &[Say]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut writer = Writer::open(&mut out).unwrap();
    for say in all {
        match say {
            Say::Event(event) => writer.write(event).unwrap(),
            Bytes(bytes) => writer.body().write_all(bytes).unwrap(),
            Part(kind, id, version, idstr) => {
                let section = Section {
                    kind: *kind,
                    id: *id,
                    owner: owner(idstr),
                    version: *version,
                };
                writer.write(&Event::Section(section)).unwrap();
                let mut body = section::Writer::new(writer.body());
                if *kind == SectionKind::Start {
                    body.setup().unwrap();
                }
                body.end().unwrap();
                writer.footer(*id).unwrap();
            }
        }
    }
    out
}

fn hello(uuid: u8, id: u8) -> Vec<u8> {
    let hello = Hello {
        uuid: [uuid; 16],
        id,
    };
    let sync = encode_sync(PageSize::new(4096).unwrap(), 0);
    [&hello.encode()[..], &sync].concat()
}

/// What two right channels carry.
fn channels() -> [Vec<u8>; 2] {
    let key = DeviceKey::new(&owner("nic"));
    let packet = |index, is_config, data: &[u8]| {
        let len = u32::try_from(data.len()).unwrap();
        [&encode_packet(&key, index, is_config, len)[..], data].concat()
    };
    let config = wrap_config(b"config");
    [
        [
            hello(0, 0),
            packet(0, false, b"first, "),
            packet(2, true, &config),
        ]
        .concat(),
        [hello(0, 1), packet(1, false, b"second")].concat(),
    ]
}

/// A load of what these connections carry: how `receive` ended, and its file.
fn load(main: &[u8], channels: &[Vec<u8>], closes: bool) -> (Ended, Rig) {
    let mut rig = Rig::over(0);
    rig.state = STATE.to_vec();
    let (receiving, to) = rig
        .receive(&Ends {
            wire: Wire::Tcp,
            both: "--timeout 1 --channels 2",
            ..Ends::default()
        })
        .unwrap();
    let feed = |bytes: &[u8]| {
        let mut socket = TcpStream::connect(&to).unwrap();
        // One that has refused hangs up.
        let _hung_up = socket.write_all(bytes);
        socket
    };
    let mut sockets = vec![feed(main)];
    sockets.extend(channels.iter().map(|it| feed(it)));
    if closes {
        for socket in &sockets[1..] {
            let _closed = socket.shutdown(Shutdown::Write);
        }
        let _closed = sockets[0].shutdown(Shutdown::Write);
    }
    // What it has to say is taken, so that it need not wait.
    let mut main = sockets.remove(0);
    let reading = thread::spawn(move || {
        let _reset = main.read_to_end(&mut Vec::new());
    });
    let ended = end(receiving);
    reading.join().unwrap();
    (ended, rig)
}

/// It is loaded whole, or refused and nothing has changed. Returns whether it is.
fn whole_or_not(ended: &Ended, rig: &Rig) -> bool {
    let loaded = ended.status == Some(0);
    if loaded {
        std::fs::write(rig.directory.file("source"), "").unwrap();
        rig.arrived(&[]);
    } else {
        refused(ended, &[]);
        rig.untouched(&[]);
    }
    loaded
}

fn what_is_right_is_loaded() {
    for closes in [true, false] {
        let (ended, rig) = load(&bytes(&right()), &channels(), closes);
        assert!(whole_or_not(&ended, &rig) || !closes, "{ended:?}");
    }
}

fn a_cut_is_told_wherever_it_is() {
    let main = bytes(&right());
    for cut in (0..main.len()).step_by(3) {
        let (ended, rig) = load(&main[..cut], &channels(), true);
        assert!(!whole_or_not(&ended, &rig), "cut at {cut}: {ended:?}");
    }
    for (number, whole) in channels().iter().enumerate() {
        for cut in (0..whole.len()).step_by(67) {
            let mut channels = channels();
            channels[number].truncate(cut);
            let (ended, rig) = load(&main, &channels, true);
            assert!(
                !whole_or_not(&ended, &rig),
                "{number} cut at {cut}: {ended:?}"
            );
        }
    }
}

fn a_damaged_byte_never_loads_another_state() {
    let main = bytes(&right());
    for at in (0..main.len()).step_by(4) {
        let mut main = main.clone();
        main[at] ^= 1 << (random(at as u64) % 8);
        let (ended, rig) = load(&main, &channels(), true);
        whole_or_not(&ended, &rig);
    }
}

fn garbage_is_no_main_channel() {
    for seed in 0..6 {
        let mut main = bytes(&right())[..8].to_vec();
        main.extend((0..300).map(|at| random(seed << 20 | at).to_le_bytes()[0]));
        let (ended, rig) = load(&main, &channels(), true);
        assert!(!whole_or_not(&ended, &rig), "seed {seed}: {ended:?}");
    }
    // One byte that is no event's, and all else right.
    for byte in [0x0f, 0x55, 0xff] {
        let mut main = bytes(&right());
        main.insert(8, byte);
        let (ended, rig) = load(&main, &channels(), true);
        assert!(!whole_or_not(&ended, &rig), "{byte}: {ended:?}");
    }
}

fn what_is_out_of_order_is_named() {
    use SectionKind::{End, Full, Start};
    let all: Vec<(&str, Vec<Say>)> = vec![
        (
            "nic",
            vec![
                part(Start),
                part(Start),
                start(),
                part(End),
                part(Full),
                eof(),
            ],
        ),
        (
            "nic",
            vec![
                part(Start),
                start(),
                part(Start),
                part(End),
                part(Full),
                eof(),
            ],
        ),
        (
            "nic",
            vec![
                part(Start),
                start(),
                part(End),
                part(End),
                part(Full),
                eof(),
            ],
        ),
        (
            "nic",
            vec![
                part(Start),
                start(),
                part(End),
                part(Full),
                part(Full),
                eof(),
            ],
        ),
        ("nic", vec![part(Start), start(), part(Full), eof()]),
        ("nic", vec![part(Start), start(), part(End), eof()]),
        ("nic", vec![part(Start), start(), eof()]),
        ("nic", vec![start(), part(Full), eof()]),
        ("", vec![start(), part(End), part(Full), eof()]),
        (
            "nic",
            vec![part(Full), part(Start), start(), part(End), eof()],
        ),
        (
            "nic",
            vec![part(Start), part(End), start(), part(Full), eof()],
        ),
        (
            "nic",
            vec![
                part(Start),
                Part(Start, 2, 1, "nic"),
                start(),
                part(End),
                part(Full),
                eof(),
            ],
        ),
        (
            "other",
            vec![
                part(Start),
                start(),
                part(End),
                Part(Full, 2, 1, "other"),
                eof(),
            ],
        ),
        (
            "other",
            vec![
                part(Start),
                Part(Start, 2, 1, "other"),
                start(),
                part(End),
                part(Full),
                eof(),
            ],
        ),
        (
            "version",
            vec![
                Part(Start, 1, 2, "nic"),
                start(),
                part(End),
                part(Full),
                eof(),
            ],
        ),
        (
            "version",
            vec![
                Part(Start, 1, 0, "nic"),
                start(),
                part(End),
                part(Full),
                eof(),
            ],
        ),
        (
            "switchover",
            vec![part(Start), start(), start(), part(End), part(Full), eof()],
        ),
        (
            "switchover",
            vec![part(Start), part(End), part(Full), eof()],
        ),
        ("", vec![eof()]),
        ("", vec![]),
        (
            "",
            vec![
                part(Start),
                start(),
                part(End),
                part(Full),
                eof(),
                Bytes(vec![0x55; 40]),
            ],
        ),
        (
            "behind its end",
            [right(), vec![Bytes(vec![0x55])]].concat(),
        ),
        ("behind its end", [right(), vec![description()]].concat()),
    ];
    for (named, says) in all {
        let (ended, rig) = load(&bytes(&says), &channels(), true);
        assert!(!whole_or_not(&ended, &rig), "{says:?}: {ended:?}");
        refused(&ended, &[named]);
    }
}

fn a_channel_of_another_vm_or_twice_is_named() {
    let main = bytes(&right());
    for (number, uuid, id, named) in [
        (1, 9, 1, "uuid"),
        (1, 0, 0, "channel"),
        (1, 0, 2, "--channels"),
        (0, 0, 255, "--channels"),
    ] {
        let mut channels = channels();
        let len = hello(0, 0).len();
        channels[number].splice(..len, hello(uuid, id));
        let (ended, rig) = load(&main, &channels, true);
        assert!(!whole_or_not(&ended, &rig), "{ended:?}");
        refused(&ended, &[named]);
    }
}

fn a_slow_drip_before_the_switchover_ends() {
    let rig = Rig::over(0);
    let (receiving, to) = rig
        .receive(&Ends {
            wire: Wire::Tcp,
            both: "--timeout 1 --channels 2",
            ..Ends::default()
        })
        .unwrap();
    let main = bytes(&right());
    let dripping = thread::spawn(move || {
        let mut socket = TcpStream::connect(&to).unwrap();
        for byte in main {
            if socket.write_all(&[byte]).is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(100));
        }
    });
    let ended = end(receiving);
    // And not by the drip's end.
    refused(&ended, &["0 of 2 multifd channels have come within 1 s"]);
    rig.untouched(&[]);
    dripping.join().unwrap();
}
