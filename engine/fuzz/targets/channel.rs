//! One channel's bytes, any bytes, in any pieces, through the code that receives them: what reaches
//! the devices, and how it ends, is what a walk over the same bytes says.
#![no_main]

use std::{
    cell::RefCell,
    collections::BTreeMap,
    io::{self, Read},
    rc::Rc,
    sync::{Arc, Mutex},
    time::Duration,
};

use libfuzzer_sys::fuzz_target;
use vfio_migration::{
    DeviceId, ErrorKind, LoadSession, RamSink, Settings, Violation,
    wire::{self, DeviceKey, Frame, Framer, PageSize, Walk},
};
use vfio_migration_fuzz::{
    device::{Drain, Loader, device},
    input::Input,
    steps,
    stream::{Feed, Piece},
};
use vfio_migration_uring::sim::SimConfig;

const HOUR: Duration = Duration::from_secs(3600);
const WINDOW: u32 = 100;
/// What the captures' sources call their devices.
const NAMES: [&str; 2] = ["0000:00:01.0/vfio", "0000:00:02.0/vfio"];

/// Takes a part of each RAM packet, and counts.
struct Sink {
    most: usize,
    seen: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl RamSink for Sink {
    fn ram(&mut self, header: &[u8], pages: &mut dyn Read) -> io::Result<()> {
        let mut some = header.to_vec();
        pages.take(self.most as u64).read_to_end(&mut some)?;
        self.seen.lock().expect("nobody panics with it").push(some);
        Ok(())
    }

    fn sync(&mut self, header: &[u8]) -> io::Result<()> {
        self.seen
            .lock()
            .expect("nobody panics with it")
            .push(header.to_vec());
        Ok(())
    }
}

/// What a walk over the bytes says of one device.
#[derive(Default)]
struct Expected {
    packets: BTreeMap<u32, Vec<u8>>,
    highest: Option<u32>,
    config: Option<(u32, Vec<u8>)>,
}

impl Expected {
    /// The data without a gap, and whether the config is what comes next.
    fn in_order(&self) -> (Vec<u8>, u32, bool) {
        let mut data = Vec::new();
        let mut index = 0;
        while let Some(packet) = self.packets.get(&index) {
            data.extend(packet);
            index += 1;
        }
        let whole = self.config.as_ref().is_some_and(|(last, _)| *last == index);
        (data, index, whole)
    }
}

/// How a channel ends.
#[derive(Debug, Eq, PartialEq)]
enum End {
    /// At a packet's end.
    Good,
    /// It is refused, for this reason where there is one only.
    Refused(Option<Violation>),
    /// It waits for a packet that does not come.
    Waits,
    /// Inside a packet, which may be refused for its header before that, or wait.
    Cut,
}

/// What the bytes are, and what should become of them.
fn expect(bytes: &[u8], sink: bool, page_size: PageSize) -> (End, [Expected; 2], Vec<Vec<u8>>) {
    let mut devices = [Expected::default(), Expected::default()];
    let mut ram = Vec::new();
    let keys = NAMES.map(|name| DeviceKey::new(&DeviceId::new(name, 0).expect("a name")));
    let mut walk = Walk::new(
        bytes,
        Framer::new(Some(page_size), wire::DEFAULT_MAX_PACKET),
    );
    let refused = |violation| End::Refused(Some(violation));
    loop {
        let at = walk.offset();
        let located = match walk.next() {
            None => return (End::Good, devices, ram),
            Some(Ok(located)) => located,
            Some(Err(error)) => {
                let ErrorKind::Protocol(violation) = error.kind() else {
                    unreachable!("a walk finds nothing else");
                };
                let early = matches!(violation, Violation::Truncated)
                    && bytes.len() - at >= wire::DEVICE_PACKET_LEN.min(page_size.ram_header_len());
                let end = if early {
                    End::Cut
                } else {
                    refused(violation.clone())
                };
                return (end, devices, ram);
            }
        };
        match located.frame {
            Frame::Hello(hello) => {
                if let Err(error) = hello.check(&[0; 16], 1) {
                    let ErrorKind::Protocol(violation) = error.kind() else {
                        unreachable!("a hello breaks a rule, or not");
                    };
                    return (refused(violation.clone()), devices, ram);
                }
            }
            Frame::Sync { .. } => ram.push(located.header.to_vec()),
            Frame::Ram(_) if !sink => return (refused(Violation::RamPacket), devices, ram),
            Frame::Ram(_) => ram.push([located.header, located.payload].concat()),
            Frame::DeviceState(packet) => {
                let Some(device) = keys.iter().position(|key| *key == packet.header.key()) else {
                    return (End::Refused(None), devices, ram);
                };
                let expected = &mut devices[device];
                let (index, config) = (packet.packet.index, packet.packet.config);
                let wrong = expected.packets.contains_key(&index)
                    || expected
                        .config
                        .as_ref()
                        .is_some_and(|(last, _)| config || index >= *last)
                    || config && expected.highest.is_some_and(|highest| highest >= index);
                if wrong {
                    return (End::Refused(None), devices, ram);
                }
                expected.highest = expected.highest.max(Some(index));
                let (_, next, _) = expected.in_order();
                if index >= next + WINDOW {
                    return (End::Waits, devices, ram);
                }
                if config {
                    expected.config = Some((index, located.payload.to_vec()));
                } else {
                    expected.packets.insert(index, located.payload.to_vec());
                }
            }
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let flags = input.byte();
    let mut seed = u32::from(input.byte());
    let most = usize::from(input.byte()) * 64;
    let bytes = input.rest();
    let with_sink = flags & 1 != 0;
    let page_size = 4096 << (flags >> 1 & 3);

    steps::begin();
    let mut settings = Settings::default();
    // Beyond every input: what waits waits for an idx.
    settings.budget = Some(256 << 10);
    settings.buffer_len = 16 << 10;
    settings.window = WINDOW;
    settings.grace = Duration::ZERO;
    settings.no_progress = HOUR;
    settings.hello_timeout = HOUR;
    let ring = SimConfig {
        idle: Some(steps::idle()),
        ..SimConfig::default()
    };
    let feed = Feed::default();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let mut channel = feed
        .channel()
        .with_page_size(page_size)
        .expect("a page size");
    if with_sink {
        let seen = seen.clone();
        channel = channel.with_ram_sink(Sink { most, seen });
    }
    let mut builder = LoadSession::builder()
        .settings(settings)
        .simulated_ring(ring)
        .spawn_with(steps::spawn_task)
        .channel(channel);
    let mut drains: Vec<Drain> = Vec::new();
    for name in NAMES {
        let id = DeviceId::new(name, 0).expect("a name");
        let (device, drain) = device(&id, Loader::Good, false);
        builder = builder.device(device);
        drains.push(drain);
    }
    let session = builder.start().expect("all that a load needs");
    if flags & 8 == 0 {
        session.switchover_start();
    }

    // The bytes, in pieces of all sizes, and some interruptions.
    let mut rest = bytes;
    while !rest.is_empty() {
        seed = seed.wrapping_mul(1_103_515_245).wrapping_add(12_345);
        let len = match seed >> 28 {
            0..4 => 1 + (seed >> 16) as usize % 16,
            4..8 => 1 + (seed >> 16) as usize % 400,
            8 => {
                feed.push(Piece::Fails(io::ErrorKind::Interrupted));
                continue;
            }
            _ => 1 + (seed >> 12) as usize % 70_000,
        };
        let (piece, later) = rest.split_at(len.min(rest.len()));
        feed.push(Piece::Bytes(piece.to_vec()));
        rest = later;
    }
    feed.push(Piece::End);

    let drain = || {
        drains
            .iter()
            .map(|drain| drain.drain(1 << 16))
            .sum::<usize>()
            > 0
    };
    steps::settle(drain);
    session.switchover_start();
    steps::settle(drain);
    steps::pass_bounds(drain);
    let (end, expected, ram) = expect(
        bytes,
        with_sink,
        PageSize::new(page_size).expect("a page size"),
    );
    let waits = session.failure().is_none() && steps::place("channel 0").is_some();
    if waits {
        assert!(
            matches!(end, End::Waits | End::Cut),
            "{end:?}: {:?}",
            steps::sleeping()
        );
        session.cancel();
    }
    let report = Rc::new(RefCell::new(None));
    let place = report.clone();
    steps::spawn("joining".into(), move || {
        *place.borrow_mut() = Some(session.join())
    });
    steps::settle(drain);
    let report = report.borrow_mut().take();
    let report = report.unwrap_or_else(|| panic!("it never ends: {:?}", steps::sleeping()));
    assert_eq!(report.stats.late_wakeups, 0);

    // Everything that was good reaches its device, unless the other's failure was faster.
    let good = end == End::Good && (0..2).all(|at| expected[at].in_order().2);
    for (drain, expected) in drains.iter().zip(&expected) {
        let got = drain.got();
        let (data, _, whole) = expected.in_order();
        assert!(data.starts_with(&got.bytes), "other bytes than were sent");
        // Another device's failure may have come before all of this one was written.
        let named = report
            .result
            .as_ref()
            .err()
            .and_then(|error| error.device());
        if report.result.is_ok() || waits || end == End::Good && named == Some(drain.id()) {
            assert_eq!(got.bytes.len(), data.len(), "bytes were lost");
        }
        if let Some(config) = &got.config {
            assert!(whole, "a config before its turn");
            let (_, framed) = expected.config.as_ref().expect("it was sent");
            assert_eq!(wire::config_body(framed).ok(), Some(&config[..]));
        }
    }
    match &report.result {
        Ok(()) => assert!(good, "{end:?}"),
        Err(error) => match (error.kind(), &end) {
            (ErrorKind::Missing, _) => {
                let at = NAMES
                    .iter()
                    .position(|name| error.device().expect("a name").idstr() == *name);
                let (_, next, whole) = expected[at.expect("one of ours")].in_order();
                assert!(!whole && error.index() == Some(next), "{error}");
            }
            (ErrorKind::Protocol(Violation::ConfigFraming(_)), _) => assert!(
                expected.iter().any(|device| device
                    .config
                    .as_ref()
                    .is_some_and(|(_, framed)| wire::config_body(framed).is_err())),
                "{error}"
            ),
            (ErrorKind::Protocol(got), End::Refused(Some(violation))) => {
                assert_eq!(got, violation, "{error}");
                assert_eq!(error.channel(), Some(0), "{error}");
            }
            (ErrorKind::Protocol(_), End::Refused(None) | End::Cut) => {
                assert_eq!(error.channel(), Some(0), "{error}");
            }
            (ErrorKind::Cancelled, End::Waits | End::Cut) => {}
            _ => panic!("{error}, where {end:?} was right"),
        },
    }
    // What is not device state is handed on untouched, in its order.
    let seen = seen.lock().expect("nobody panics with it");
    for (seen, sent) in seen.iter().zip(&ram) {
        let header = PageSize::new(page_size)
            .expect("a page size")
            .ram_header_len();
        let most = (header + most).min(sent.len());
        assert_eq!(seen[..], sent[..most]);
    }
    if with_sink && end == End::Good && report.result.is_ok() {
        assert_eq!(seen.len(), ram.len());
    }
    drop(report);
    steps::end();
});
