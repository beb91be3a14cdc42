//! What a peer can cost a destination: memory, within a bound that does not depend on what it sends;
//! and time, which every wait for it has an end of.
//!
//! The memory of each case is that of a process of its own, as the kernel tells it: its peak, with what it has
//! spilled to memory, is no more than what the process had before, and what `Settings::memory_bound` says.
//!
//! Times are tested with short settings, and by what the error says; never by a clock.

use std::{
    env, fs,
    io::{self, Read, Write},
    os::unix::{fs::MetadataExt, net::UnixStream},
    sync::mpsc,
    thread,
    time::Duration,
};

use vfio_migration::{
    Channel, DeviceId, DeviceState, Error, ErrorKind, LoadSession, MemoryBound, Phase, Report,
    SaveSession, Settings, Spill, SpillStats, Violation,
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
    watchdog::Watchdog,
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

fn settings() -> Settings {
    let mut settings = Settings::default();
    settings.budget = Some(4 << 20);
    settings.spill = Spill::Off;
    settings.no_progress = Duration::from_millis(500);
    settings.packet_timeout = Duration::from_millis(500);
    settings.hello_timeout = Duration::from_millis(500);
    settings.config_ready_timeout = Duration::from_millis(500);
    settings
}

/// Loads `devices` devices from these channels' bytes. Each channel stays open behind them until
/// the load has ended.
fn load(settings: Settings, devices: u32, channels: Vec<Vec<u8>>) -> Report {
    let mut builder = LoadSession::builder().settings(settings);
    for device in 1..=devices {
        let (reader, writer) = io::pipe().unwrap();
        drop(collect(reader));
        builder = builder.device(Mock::new(writer).device(device));
    }
    let mut sources = Vec::new();
    for bytes in channels {
        let (mut near, far) = UnixStream::pair().unwrap();
        builder = builder.channel(far);
        sources.push(move || {
            // The other side may hang up in the middle.
            let _refused = near.write_all(&bytes);
            near
        });
    }
    let session = builder.start().unwrap();
    let sources: Vec<_> = sources.into_iter().map(thread::spawn).collect();
    session.switchover_start();
    let report = session.join();
    for source in sources {
        drop(source.join().unwrap());
    }
    report
}

fn stalled(report: &Report) -> &Error {
    let error = report.result.as_ref().unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Stalled, "{error}");
    error
}

/// What an error's cause says.
fn missing(error: &Error) -> String {
    let cause = std::error::Error::source(error);
    cause.map(ToString::to_string).unwrap_or_default()
}

// ------------------------------------------------------------------------------------ memory

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

// -------------------------------------------------------------------------------------- time

/// One device, and one channel which this function feeds.
fn fed(settings: Settings, feed: impl FnOnce(&mut UnixStream) + Send + 'static) -> Report {
    let (reader, writer) = io::pipe().unwrap();
    drop(collect(reader));
    let (mut near, far) = UnixStream::pair().unwrap();
    let session = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(writer).device(1))
        .channel(far)
        .start()
        .unwrap();
    let feeding = thread::spawn(move || {
        feed(&mut near);
        near
    });
    // Not started: what the I/O thread would miss is not what ends it.
    let report = session.join();
    drop(feeding.join().unwrap());
    report
}

/// A byte at a time, until the other side hangs up.
fn drip(socket: &mut UnixStream, bytes: &[u8]) {
    for byte in bytes {
        if socket.write_all(&[*byte]).is_err() {
            return;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_hello_that_drips_ends() {
    let _watchdog = Watchdog::new();
    let mut settings = settings();
    settings.hello_timeout = Duration::from_millis(300);
    settings.no_progress = Duration::from_secs(40);
    let report = fed(settings, |socket| {
        drip(socket, &[hello(0), vec![0; 4000]].concat());
    });
    let error = stalled(&report);
    assert_eq!((error.phase(), error.channel()), (Phase::Receive, Some(0)));
    assert_eq!(missing(error), "its hello has not come");
}

#[test]
fn a_header_that_drips_ends() {
    let _watchdog = Watchdog::new();
    let mut settings = settings();
    settings.no_progress = Duration::from_secs(40);
    let report = fed(settings, |socket| {
        socket.write_all(&hello(0)).unwrap();
        drip(socket, &packet(1, 0, &[7; 4000]));
    });
    let error = stalled(&report);
    assert_eq!((error.phase(), error.channel()), (Phase::Receive, Some(0)));
    assert_eq!(missing(error), "the rest of the packet has not come");
}

#[test]
fn data_that_drips_ends_and_names_its_packet() {
    let _watchdog = Watchdog::new();
    let mut settings = settings();
    settings.no_progress = Duration::from_secs(40);
    let report = fed(settings, |socket| {
        let packet = packet(1, 5, &[7; 4000]);
        socket.write_all(&hello(0)).unwrap();
        socket.write_all(&packet[..1000]).unwrap();
        drip(socket, &packet[1000..]);
    });
    let error = stalled(&report);
    assert_eq!((error.phase(), error.channel()), (Phase::Receive, Some(0)));
    assert_eq!((error.device(), error.index()), (Some(&id(1)), Some(5)));
    assert_eq!(missing(error), "the rest of the packet has not come");
}

#[test]
fn a_packet_that_stops_in_the_middle_ends() {
    let _watchdog = Watchdog::new();
    let mut settings = settings();
    settings.packet_timeout = Duration::from_secs(40);
    let report = fed(settings, |socket| {
        socket.write_all(&hello(0)).unwrap();
        socket.write_all(&packet(1, 5, &[7; 4000])[..1000]).unwrap();
    });
    let error = stalled(&report);
    assert_eq!((error.device(), error.index()), (Some(&id(1)), Some(5)));
}

#[test]
fn between_packets_a_channel_may_be_silent() {
    let _watchdog = Watchdog::new();
    let mut settings = settings();
    settings.packet_timeout = Duration::from_millis(100);
    settings.no_progress = Duration::from_millis(300);
    let (reader, writer) = io::pipe().unwrap();
    drop(collect(reader));
    let (mut near, far) = UnixStream::pair().unwrap();
    let session = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(writer).device(1))
        .channel(far)
        .start()
        .unwrap();
    near.write_all(&hello(0)).unwrap();
    for index in 0..3 {
        // Before the switchover a source may have nothing to send for as long as it likes.
        thread::sleep(Duration::from_millis(400));
        near.write_all(&packet(1, index, b"x")).unwrap();
    }
    assert!(session.failure().is_none());
    session.switchover_start();
    near.write_all(&config_packet(1, 3, b"config")).unwrap();
    drop(near);
    session.join().result.unwrap();
}

#[test]
fn a_notice_that_never_comes_ends_its_device() {
    let _watchdog = Watchdog::new();
    let mut settings = settings();
    settings.config_after_iterables = true;
    let bytes = [hello(0), packet(1, 0, b"x"), config_packet(1, 1, b"config")].concat();
    let report = load(settings, 1, vec![bytes]);
    let error = stalled(&report);
    assert_eq!(
        (error.phase(), error.device()),
        (Phase::Config, Some(&id(1)))
    );
    assert_eq!(
        missing(error),
        "the notice that its config may be loaded has not come"
    );
    let device = report.devices.into_iter().next().unwrap().device.unwrap();
    assert_eq!(device.state(), DeviceState::Running, "it was put back");
}

/// A source that is gone while one of its channels waits for room: that one is not read from, and its
/// end cannot be seen. Runs with what the other channel brings before it ends.
fn gone_while_a_channel_waits(no_progress: Duration, other: &[u8]) -> Report {
    let mut settings = settings();
    settings.no_progress = no_progress;
    settings.hello_timeout = Duration::from_secs(40);
    settings.packet_timeout = Duration::from_secs(40);
    // A reserve for the next packet, and nothing else.
    settings.budget = Some(4096);
    let (reader, writer) = io::pipe().unwrap();
    drop(collect(reader));
    let (mut waits, waits_far) = UnixStream::pair().unwrap();
    let (mut ends, ends_far) = UnixStream::pair().unwrap();
    let session = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(writer).device(1))
        .channel(waits_far)
        .channel(ends_far)
        .start()
        .unwrap();
    session.switchover_start();
    let far_ahead = [hello(0), packet(1, 2, &[7; 3000])].concat();
    waits.write_all(&far_ahead).unwrap();
    drop(waits);
    ends.write_all(&[hello(1), packet(1, 0, b"x")].concat())
        .unwrap();
    // Under the watchdog. The one is in the device, the other has been met.
    while session.stats().devices[0].bytes < 13 || session.stats().channels[0].packets < 1 {
        thread::sleep(Duration::from_millis(1));
    }
    ends.write_all(other).unwrap();
    drop(ends);
    session.join()
}

#[test]
fn a_source_that_is_gone_is_found_at_once_by_what_it_cut_off() {
    let _watchdog = Watchdog::new();
    let cut = &packet(1, 1, b"x")[..200];
    let report = gone_while_a_channel_waits(Duration::from_secs(3600), cut);
    let error = report.result.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Protocol(Violation::Truncated));
    assert_eq!(error.channel(), Some(1));
}

#[test]
fn a_source_that_is_gone_between_two_packets_is_found_by_the_time() {
    let _watchdog = Watchdog::new();
    let report = gone_while_a_channel_waits(Duration::from_millis(500), b"");
    let error = stalled(&report);
    assert_eq!((error.device(), error.index()), (Some(&id(1)), Some(1)));
}

#[test]
fn a_channel_that_never_comes_is_told_of() {
    let _watchdog = Watchdog::new();
    let mut settings = settings();
    settings.channels = 3;
    let one = [hello(0), packet(1, 0, b"x"), packet(1, 2, b"x")].concat();
    let report = load(settings.clone(), 1, vec![one]);
    let error = stalled(&report);
    assert_eq!((error.device(), error.index()), (Some(&id(1)), Some(1)));
    assert_eq!(
        missing(error),
        "this packet has not come, nor have 2 of the channels"
    );
    // Where nothing is missing they need not come.
    let (reader, writer) = io::pipe().unwrap();
    drop(collect(reader));
    let (mut near, far) = UnixStream::pair().unwrap();
    let session = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(writer).device(1))
        .channel(far)
        .start()
        .unwrap();
    session.switchover_start();
    let whole = [hello(0), packet(1, 0, b"x"), config_packet(1, 1, b"config")].concat();
    near.write_all(&whole).unwrap();
    drop(near);
    session.join().result.unwrap();
}

#[test]
fn a_channel_that_does_not_end_is_named() {
    let _watchdog = Watchdog::new();
    let whole = [hello(1), packet(1, 0, b"x"), config_packet(1, 1, b"config")].concat();
    let (reader, writer) = io::pipe().unwrap();
    drop(collect(reader));
    let (mut near, far) = UnixStream::pair().unwrap();
    let (_open, silent) = UnixStream::pair().unwrap();
    let mut settings = settings();
    settings.hello_timeout = Duration::from_secs(40);
    let session = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(writer).device(1))
        .channel(far)
        .channel(silent)
        .start()
        .unwrap();
    session.switchover_start();
    near.write_all(&whole).unwrap();
    drop(near);
    let report = session.join();
    let error = stalled(&report);
    assert_eq!((error.phase(), error.channel()), (Phase::Receive, Some(1)));
    assert_eq!(missing(error), "the channel has not ended");
    assert!(report.devices[0].result.is_ok());
}

#[test]
fn a_device_that_does_not_change_its_state_is_named() {
    let _watchdog = Watchdog::new();
    let (_reader, writer) = io::pipe().unwrap();
    let (_second, other) = io::pipe().unwrap();
    let (release, released) = mpsc::channel::<()>();
    let mut slow = Mock::new(other);
    slow.set = Some(Box::new(move |_state| {
        let _released = released.recv_timeout(Duration::from_secs(2));
        Ok(())
    }));
    let mut settings = settings();
    settings.grace = Duration::from_millis(100);
    let started = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(writer).device(1))
        .device(slow.device(2))
        .start();
    let error = started.unwrap_err().error;
    drop(release);
    assert_eq!(*error.kind(), ErrorKind::Stalled);
    assert_eq!(
        (error.phase(), error.device()),
        (Phase::Setup, Some(&id(2)))
    );
}

#[test]
fn a_device_that_was_not_started_holds_nobody_up() {
    let _watchdog = Watchdog::new();
    let pipe = || {
        let (reader, writer) = io::pipe().unwrap();
        drop(collect(reader));
        writer
    };
    let (mut near, far) = UnixStream::pair().unwrap();
    let mut settings = settings();
    settings.max_devices = Some(2);
    let session = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(pipe()).device(1))
        .channel(far)
        .start()
        .unwrap();
    session.switchover_start();
    // Plugged in since, and never told to start: that is no reason for the first to wait for ever.
    session.add_device(Mock::new(pipe()).device(2)).unwrap();
    near.write_all(&[hello(0), packet(1, 1, b"x")].concat())
        .unwrap();
    let report = session.join();
    let error = stalled(&report);
    assert_eq!((error.device(), error.index()), (Some(&id(1)), Some(0)));
}

#[test]
fn a_source_whose_peer_takes_nothing_ends() {
    let _watchdog = Watchdog::new();
    let (reader, mut writer) = io::pipe().unwrap();
    let feeding = thread::spawn(move || {
        // Until the save gives up.
        while writer.write_all(&[7; 1 << 16]).is_ok() {}
    });
    let (near, _far) = UnixStream::pair().unwrap();
    let mut settings = settings();
    settings.data_len = Some(64 << 10);
    let session = SaveSession::builder()
        .settings(settings)
        .device(Mock::new(reader).device(1))
        .channel(near)
        .start()
        .unwrap();
    let report = session.join();
    let error = stalled(&report);
    assert!(
        error.channel() == Some(0) || error.device() == Some(&id(1)),
        "{error}"
    );
    drop(report);
    feeding.join().unwrap();
}

#[test]
fn a_reader_of_the_embedders_that_drips_ends() {
    let _watchdog = Watchdog::new();
    /// A byte a read, and none of them late.
    struct Drip(Vec<u8>, usize);
    impl Read for Drip {
        fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
            thread::sleep(Duration::from_millis(if self.1 < 64 { 0 } else { 20 }));
            let Some(byte) = self.0.get(self.1) else {
                return Ok(0);
            };
            bytes[0] = *byte;
            self.1 += 1;
            Ok(1)
        }
    }
    let (_reader, writer) = io::pipe().unwrap();
    let bytes = [hello(0), packet(1, 0, &[7; 4000])].concat();
    let mut settings = settings();
    settings.no_progress = Duration::from_secs(40);
    let session = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(writer).device(1))
        .channel(Channel::from_reader(Drip(bytes, 0)))
        .start()
        .unwrap();
    let report = session.join();
    assert_eq!(stalled(&report).channel(), Some(0));
}
