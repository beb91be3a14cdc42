//! What a peer can cost a destination of memory: within a bound that does not depend on what it sends.
//!
//! The memory of each case is that of a process of its own, as the kernel tells it: its peak, with what it has
//! spilled to memory, is no more than what the process had before, and what `Settings::memory_bound` says.

use std::{
    env, fs,
    io::{self, Read, Write},
    os::unix::{fs::MetadataExt, net::UnixStream},
    thread,
    time::Duration,
};

use vfio_migration::{
    DeviceId, ErrorKind, LoadSession, MemoryBound, Phase, Report, Settings, Spill, SpillStats,
    Violation,
    section::{self, SectionSink, load_state},
    stream::{self, Event, Section, SectionKind},
    wire::{self, DeviceKey, DeviceStateHeader},
};

use crate::{
    again::again,
    mock::Mock,
    names::id,
    packets::{config_packet, hello, packet},
    payload::payload,
    pipes::collect,
    short::{load, missing, settings, stalled},
};

const CASE: &str = "VFIO_MIGRATION_BOUNDS_CASE";

/// A number from this process's status, in bytes.
fn status(name: &str) -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    let kib: usize = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib << 10
}

/// What a case has used, against its bound.
struct Bound {
    before: usize,
    bound: MemoryBound,
}

impl Bound {
    fn new(settings: &Settings, channels: u32, devices: u32) -> Self {
        Self {
            before: status("VmRSS:"),
            bound: settings.memory_bound(devices, channels).unwrap(),
        }
    }

    fn check(&self) {
        self.check_with(0);
    }

    /// `spilled`: what memory files have held.
    fn check_with(&self, spilled: usize) {
        let total = usize::try_from(self.bound.total()).unwrap();
        let bound = self.before + total;
        let peak = status("VmHWM:") + spilled;
        println!("peak {} KiB, bound {} KiB", peak >> 10, bound >> 10);
        assert!(peak <= bound, "{peak} bytes, above {bound}");
    }
}

fn far_idx(data: &[u8]) {
    let settings = settings();
    let bound = Bound::new(&settings, 4, 2);
    let far = |device| [hello(device), packet(device.into(), 0xffff_fffe, data)].concat();
    let near = |id, device| [hello(id), packet(device, 0, b"x")].concat();
    let report = load(settings, 2, vec![near(0, 1), far(1), far(2), near(3, 2)]);
    assert_eq!(stalled(&report).index(), Some(1));
    assert_eq!(report.stats.devices[0].queued, 0);
    bound.check();
}

fn window_of_small_packets() {
    let mut settings = settings();
    settings.budget = Some(8 << 20);
    let bound = Bound::new(&settings, 1, 1);
    let mut bytes = hello(0);
    // All but the one that is needed.
    for index in 1..settings.window + 100 {
        bytes.extend(packet(1, index, if index % 2 == 0 { b"" } else { b"x" }));
    }
    let bytes_len = bytes.len();
    let report = load(settings.clone(), 1, vec![bytes]);
    assert_eq!(stalled(&report).index(), Some(0));
    assert_eq!(
        report.stats.devices[0].queued,
        u64::from(settings.window) - 1
    );
    // The source is in this process, too.
    let bound = Bound {
        before: bound.before + bytes_len,
        ..bound
    };
    bound.check();
}

/// Each of 64 channels sends the last packet of its share first, then the others in order.
fn last_packets_first(budget: usize) -> (Report, Bound) {
    const CHANNELS: u32 = 64;
    const EACH: u32 = 4;
    const LEN: usize = 64 << 10;
    let mut settings = settings();
    settings.budget = Some(budget);
    // A channel leases whole buffers.
    settings.buffer_len = LEN;
    let bytes: Vec<_> = (0..CHANNELS)
        .map(|channel| {
            let mut bytes = hello(u8::try_from(channel).unwrap());
            let last = CHANNELS * (EACH - 1) + channel;
            for index in std::iter::once(last).chain((0..EACH - 1).map(|n| n * CHANNELS + channel))
            {
                bytes.extend(packet(1, index, &[7; LEN]));
            }
            if channel == 0 {
                bytes.extend(config_packet(1, CHANNELS * EACH, b"config"));
            }
            bytes
        })
        .collect();
    let bound = Bound::new(&settings, CHANNELS, 1);
    (load(settings, 1, bytes), bound)
}

fn last_packets_first_fit() {
    let (report, bound) = last_packets_first(32 << 20);
    // The channels are still open: that is all that is missing.
    assert_eq!(stalled(&report).phase(), Phase::Receive);
    assert!(report.devices[0].result.is_ok());
    bound.check();
}

fn last_packets_first_do_not_fit() {
    let (report, bound) = last_packets_first(2 << 20);
    let error = stalled(&report);
    assert_eq!((error.device(), error.phase()), (Some(&id(1)), Phase::Load));
    bound.check();
}

fn huge_sizes() {
    let settings = settings();
    let bound = Bound::new(&settings, 2, 1);
    let key = DeviceKey::new(&id(1));
    for len in [u32::MAX, 1 << 31, settings.max_packet + 1] {
        let mut bytes = hello(0);
        bytes.extend(DeviceStateHeader::encode(&key, len));
        bytes.resize(bytes.len() + 12, 0);
        let report = load(settings.clone(), 1, vec![bytes]);
        let error = report.result.unwrap_err();
        let max = settings.max_packet;
        let violation = Violation::PacketTooLarge { len, max };
        assert_eq!(*error.kind(), ErrorKind::Protocol(violation));
        assert_eq!((error.device(), error.channel()), (Some(&id(1)), Some(0)));
    }
    bound.check();
}

/// A device on the main channel that counts.
#[derive(Default)]
struct Count(u64);

impl SectionSink for Count {
    fn write(&mut self, bytes: &[u8]) -> vfio_migration::Result<()> {
        self.0 += bytes.len() as u64;
        Ok(())
    }

    fn config(&mut self, _input: &mut dyn Read) -> vfio_migration::Result<()> {
        Ok(())
    }
}

fn huge_sections() {
    let bound = Bound::new(&settings(), 1, 1);
    for len in [u64::MAX, 1 << 62, 1 << 32] {
        let mut head = section::Tag::Data.encode().to_vec();
        head.extend(len.to_be_bytes());
        let mut input = head.chain(io::repeat(7).take(64 << 20));
        let mut count = Count::default();
        let error = load_state(&mut input, &mut count).unwrap_err();
        assert!(matches!(
            error.kind(),
            ErrorKind::Protocol(Violation::SectionTruncated { .. })
        ));
        assert_eq!(count.0, 64 << 20);
    }
    bound.check();
}

fn million_names() {
    let bound = Bound::new(&settings(), 1, 1);
    // On the main channel, each with a section of its own.
    let mut names = stream::Writer::open(Vec::new()).unwrap();
    for number in 0..1_000_000_u32 {
        let section = Section {
            kind: SectionKind::Full,
            id: number,
            owner: DeviceId::new(format!("{number:0>200}"), 0).unwrap(),
            version: 1,
        };
        if number < 10_000 {
            names.write(&Event::Section(section)).unwrap();
            names.footer(number).unwrap();
        }
    }
    let bytes = names.into_inner();
    let mut reader = stream::Reader::open(&bytes[..]).unwrap();
    let mut count = 0;
    let error = loop {
        match reader.next_event() {
            Ok(_) => reader.footer().unwrap(),
            Err(error) => break error,
        }
        count += 1;
    };
    assert_eq!(count, stream::MAX_SECTIONS);
    assert!(matches!(
        error.kind(),
        ErrorKind::Protocol(Violation::Section(_))
    ));
    // Pushed, each refused.
    let (_reader, writer) = io::pipe().unwrap();
    let session = LoadSession::builder()
        .settings(settings())
        .device(Mock::new(writer).device(1))
        .start()
        .unwrap();
    let mut publisher = session.publisher();
    for number in 0..1_000_000_u32 {
        let name = DeviceId::new(format!("{number:0>200}"), number).unwrap();
        let error = publisher.push(&name, &payload(0, false, b"x")).unwrap_err();
        assert!(matches!(
            error.kind(),
            ErrorKind::Protocol(Violation::UnknownDevice { .. })
        ));
    }
    drop(publisher);
    // And over channels: the first ends the load.
    let mut bytes = hello(0);
    for number in 0..1000_u32 {
        let key = DeviceKey::new(&DeviceId::new(format!("{number:0>200}"), 0).unwrap());
        bytes.extend(wire::encode_packet(&key, 0, false, 0));
    }
    let report = load(settings(), 1, vec![bytes]);
    assert!(matches!(
        report.result.unwrap_err().kind(),
        ErrorKind::Protocol(Violation::UnknownDevice { .. })
    ));
    bound.check();
}

fn large_configs() {
    let settings = settings();
    let bound = Bound::new(&settings, 2, 2);
    let config = vec![7; settings.max_packet as usize - 12 - 16];
    let channel = |number: u8| {
        [
            hello(number),
            config_packet(u32::from(number) + 1, 0, &config),
        ]
        .concat()
    };
    let channels = vec![channel(0), channel(1)];
    let sent: usize = channels.iter().map(Vec::len).sum();
    let report = load(settings, 2, channels);
    assert!(report.devices.iter().all(|device| device.result.is_ok()));
    let bound = Bound {
        // The source's bytes, and what the test's devices keep.
        before: bound.before + 3 * sent,
        ..bound
    };
    bound.check();
}

fn silent_channels() {
    let settings = settings();
    let bound = Bound::new(&settings, 64, 1);
    let report = load(settings, 1, vec![Vec::new(); 64]);
    let error = stalled(&report);
    assert!(error.channel().is_some());
    assert_eq!(missing(error), "its hello has not come");
    bound.check();
}

/// What this process's spill files have of memory.
fn memory_files() -> usize {
    let files = fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(Result::ok);
    let spills = files.filter(|file| {
        let target = fs::read_link(file.path()).unwrap_or_default();
        target.to_string_lossy().contains("vfio-mig-spill")
    });
    let blocks = spills.filter_map(|file| Some(fs::metadata(file.path()).ok()?.blocks()));
    usize::try_from(blocks.sum::<u64>()).unwrap() * 512
}

/// Channels that spill all they can, for want of each device's first packet: the budget is spent, and the
/// spill file full.
fn spilled() {
    const DEVICES: u32 = 2;
    const CHANNELS: u8 = 4;
    const LEN: usize = 300_000;
    let mut settings = settings();
    settings.spill = Spill::Memfd;
    settings.spill_limit = 64 << 20;
    let bound = Bound::new(&settings, CHANNELS.into(), DEVICES);
    let mut builder = LoadSession::builder().settings(settings);
    for device in 1..=DEVICES {
        let (reader, writer) = io::pipe().unwrap();
        drop(collect(reader));
        builder = builder.device(Mock::new(writer).device(device));
    }
    let mut sources = Vec::new();
    for number in 0..CHANNELS {
        let (mut near, far) = UnixStream::pair().unwrap();
        builder = builder.channel(far);
        sources.push(move || {
            // Hung up on, in the end.
            let _refused = near.write_all(&hello(number)).and_then(|()| {
                (1..1000)
                    .filter(|index| index % u32::from(CHANNELS) == u32::from(number))
                    .flat_map(|index| (1..=DEVICES).map(move |device| (device, index)))
                    .try_for_each(|(device, index)| {
                        near.write_all(&packet(device, index, &[7; LEN]))
                    })
            });
        });
    }
    let session = builder.start().unwrap();
    let sources: Vec<_> = sources.into_iter().map(thread::spawn).collect();
    session.switchover_start();
    let full = |spill: &SpillStats| spill.held + LEN as u64 > spill.limit;
    while !full(&session.stats().spill) && session.failure().is_none() {
        thread::sleep(Duration::from_millis(1));
    }
    let files = memory_files();
    let spill = session.stats().spill;
    assert!(full(&spill) && files >= 50 << 20, "{spill:?}, {files}");
    session.cancel();
    drop(session.join());
    for source in sources {
        source.join().unwrap();
    }
    bound.check_with(files);
}

#[test]
fn memory_stays_within_its_bound_whatever_a_peer_sends() {
    let cases: [(&str, fn()); 11] = [
        ("spilled", spilled),
        ("far idx", || far_idx(b"x")),
        ("far idx, no data", || far_idx(b"")),
        ("a window of small packets", window_of_small_packets),
        ("last packets first, they fit", last_packets_first_fit),
        (
            "last packets first, they do not",
            last_packets_first_do_not_fit,
        ),
        ("huge sizes", huge_sizes),
        ("huge sections", huge_sections),
        ("a million names", million_names),
        ("large configs", large_configs),
        ("silent channels", silent_channels),
    ];
    if let Ok(name) = env::var(CASE) {
        let (_, case) = cases.iter().find(|case| case.0 == name).unwrap();
        return case();
    }
    for (name, _) in cases {
        let output = again(
            module_path!(),
            "memory_stays_within_its_bound_whatever_a_peer_sends",
        )
        .env(CASE, name)
        .output()
        .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {text}{error}");
        let line = text.lines().find(|line| line.contains("peak")).unwrap();
        println!("{name}: {line}");
    }
}
