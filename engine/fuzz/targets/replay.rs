//! `vfio-migrate replay` of any files: what its look at them says is what a walk over their bytes
//! says, a file that is cut or damaged is refused by name and place, and what is then loaded is the
//! devices' packets in order, or an error that is explained.
//!
//! The command's own two files, which need nothing else of it, are here as they are. Its devices and
//! its threads are not: the load is stepped, as in the other targets.
#![no_main]

use std::{
    cell::RefCell,
    collections::BTreeMap,
    io::{self, Cursor, Read, Seek, SeekFrom},
    path::Path,
    rc::Rc,
    time::Duration,
};

use libfuzzer_sys::fuzz_target;
use vfio_migration::{
    ErrorKind, LoadSession, RamSink,
    text::is_printable,
    wire::{self, DeviceKey, Frame, Framer, PageSize, Walk},
};
use vfio_migration_fuzz::{
    device::{Drain, Loader, device},
    input::Input,
    steps,
    stream::{Feed, Piece},
};
use vfio_migration_uring::sim::SimConfig;

/// The files here are in memory: nothing is opened.
mod state_files {
    pub(crate) fn open_regular(path: &std::path::Path) -> std::io::Result<std::fs::File> {
        std::fs::File::open(path)
    }
}
#[path = "../../src/bin/vfio-migrate/capture.rs"]
#[expect(dead_code, reason = "inspect uses the rest")]
mod capture;
#[path = "../../src/bin/vfio-migrate/capture_set.rs"]
mod capture_set;

use capture::{Scan, Walker};

const HOUR: Duration = Duration::from_secs(3600);

/// A file that gives what it likes of what it is asked for.
struct Pieces<'a> {
    inner: Cursor<&'a [u8]>,
    seed: u32,
}

impl Read for Pieces<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.seed = self.seed.wrapping_mul(1_103_515_245).wrapping_add(12_345);
        let most = match self.seed >> 29 {
            0 => 1,
            1 | 2 => 1 + (self.seed >> 16) as usize % 100,
            3 => return Err(io::ErrorKind::Interrupted.into()),
            _ => bytes.len(),
        };
        let most = most.min(bytes.len());
        self.inner.read(&mut bytes[..most])
    }
}

impl Seek for Pieces<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.inner.seek(to)
    }
}

/// Passes over what is not a device's.
struct PassOver;

impl RamSink for PassOver {
    fn ram(&mut self, _header: &[u8], _pages: &mut dyn Read) -> io::Result<()> {
        Ok(())
    }

    fn sync(&mut self, _header: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

/// One device's packets in all files, as a walk finds them.
#[derive(Default)]
struct Expected {
    data: BTreeMap<u32, Vec<u8>>,
    config: Option<(u32, Vec<u8>)>,
    /// Something is there twice, or behind the config.
    wrong: bool,
}

impl Expected {
    fn in_order(&self) -> (Vec<u8>, u32) {
        let mut data = Vec::new();
        let mut index = 0;
        while let Some(packet) = self.data.get(&index) {
            data.extend(packet);
            index += 1;
        }
        (data, index)
    }

    fn is_whole(&self) -> bool {
        let (_, next) = self.in_order();
        let last = self.config.as_ref().map(|(last, _)| *last);
        !self.wrong && last == Some(next) && self.data.len() == next as usize
    }
}

type Devices = BTreeMap<[u8; DeviceKey::LEN], Expected>;

/// A scan says what a walk over the same bytes does.
fn check_scan(scan: &Scan, bytes: &[u8], page_size: PageSize, devices: &mut Devices) {
    let mut walk = Walk::new(bytes, Framer::new(Some(page_size), u32::MAX));
    let mut places = scan.places.iter();
    let (mut ram, mut syncs) = (0, 0);
    let damaged = loop {
        let located = match walk.next() {
            None => break false,
            Some(Err(_)) => break true,
            Some(Ok(located)) => located,
        };
        match located.frame {
            Frame::Hello(hello) => assert_eq!(scan.hello, Some(hello)),
            Frame::Sync { .. } => syncs += 1,
            Frame::Ram(_) => ram += 1,
            Frame::DeviceState(packet) => {
                let place = places.next().expect("the packet has a place");
                let key = packet.header.key();
                let (index, config) = (packet.packet.index, packet.packet.config);
                assert_eq!(place.offset, located.offset as u64);
                assert_eq!((place.index, place.config), (index, config));
                assert_eq!(scan.keys[place.device], key);
                assert!(scan.largest as usize >= located.payload.len());
                let device = devices.entry(*key.as_bytes()).or_default();
                let payload = located.payload.to_vec();
                let again = if config {
                    device.config.replace((index, payload)).is_some()
                } else {
                    device.data.insert(index, payload).is_some()
                };
                device.wrong |= again;
            }
        }
    };
    assert!(places.next().is_none(), "a place without a packet");
    assert_eq!((scan.ram_packets + scan.digests, scan.syncs), (ram, syncs));
    assert_eq!(scan.end, walk.offset() as u64);
    assert_eq!(scan.damage.is_some(), damaged, "{:?}", scan.damage);
    if let Some(damage) = &scan.damage {
        assert_eq!(damage.offset, scan.end);
        let text = damage.to_string();
        assert!(text.starts_with(&format!("byte {}: ", scan.end)), "{text}");
        assert!(text.len() < 2000, "{text}");
    }
}

/// What `inspect` would say of a file harms no terminal.
fn check_names(mut walker: Walker<Pieces<'_>>) {
    // Ends: each step passes a packet.
    while let Ok(Some(packet)) = walker.step() {
        let text = packet.what.to_string();
        assert!(text.chars().all(is_printable), "{text:?}");
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let flags = input.byte();
    let seed = u32::from(input.byte());
    let count = 1 + usize::from(flags & 3);
    let page_size = PageSize::new(4096 << (flags >> 2 & 3)).expect("a page size");
    let mut files = Vec::new();
    for at in 0..count {
        let len = usize::from(input.byte()) << 8 | usize::from(input.byte());
        let left = input.rest().len();
        let len = if at + 1 == count { left } else { len.min(left) };
        files.push(input.take(len));
    }

    // What the command does before it loads anything.
    let open = |bytes, len: usize| {
        let inner = Cursor::new(bytes);
        Walker::new(Pieces { inner, seed }, len as u64, page_size)
    };
    let mut devices = Devices::new();
    let mut scans = Vec::new();
    for (at, &bytes) in files.iter().enumerate() {
        let name = format!("file {at}");
        let scan = Scan::of(Path::new(&name), open(bytes, bytes.len()));
        check_scan(&scan, bytes, page_size, &mut devices);
        check_names(open(bytes, bytes.len()));
        // A file that has become shorter since its length was asked for: what is passed over is not
        // read, so only the load may find that it has gone.
        let longer = Scan::of(Path::new(&name), open(bytes, bytes.len() + 1000));
        assert!(longer.end >= scan.end);
        scans.push(scan);
    }
    let damaged = scans.iter().find(|scan| scan.damage.is_some());
    let checked = capture_set::check(&scans);
    assert_eq!(checked.is_err(), damaged.is_some());
    if let (Err(error), Some(scan)) = (checked, damaged) {
        let text = error.to_string();
        let place = format!("{}: byte {}: ", scan.name(), scan.end);
        assert!(text.starts_with(&place), "{text}");
        assert!(text.chars().all(is_printable), "{text:?}");
        return;
    }
    let found = capture_set::by_device(&scans);
    assert!(
        found.keys().map(|key| key.0.as_bytes()).eq(devices.keys()),
        "the devices are those of the files"
    );
    let ids: Option<Vec<_>> = found.keys().map(|key| key.0.id()).collect();
    let Some(ids) = ids.filter(|ids| !ids.is_empty()) else {
        return;
    };

    // The load, as the command sets it up.
    steps::begin();
    let mut settings = capture_set::settings(&scans);
    settings.grace = Duration::ZERO;
    settings.no_progress = HOUR;
    settings.hello_timeout = HOUR;
    let window = settings.window;
    let ring = SimConfig {
        idle: Some(steps::idle()),
        ..SimConfig::default()
    };
    let mut builder = LoadSession::builder()
        .settings(settings)
        .simulated_ring(ring)
        .spawn_with(steps::spawn_task);
    let mut drains: Vec<Drain> = Vec::new();
    for id in &ids {
        let (device, drain) = device(id, Loader::Good, false);
        builder = builder.device(device);
        drains.push(drain);
    }
    for bytes in &files {
        let feed = Feed::default();
        for piece in bytes.chunks(1 + usize::try_from(seed).expect("small") * 40) {
            feed.push(Piece::Bytes(piece.to_vec()));
        }
        feed.push(Piece::End);
        let channel = feed.channel().with_ram_sink(PassOver);
        let channel = channel.with_page_size(page_size.bytes());
        builder = builder.channel(channel.expect("a page size"));
    }
    let session = builder.start().expect("all that a load needs");
    session.no_more_channels();
    session.switchover_start();
    let drain = || {
        let drained = drains.iter().map(|drain| drain.drain(1 << 16));
        drained.sum::<usize>() > 0
    };
    steps::settle(drain);
    steps::pass_bounds(drain);
    let mut waited = false;
    if session.failure().is_none() && !session.is_finished() {
        // For the time without progress, with which the command's load ends.
        let far = devices.values().any(|device| {
            let (_, next) = device.in_order();
            let last = device.data.keys().last().copied();
            last.max(device.config.as_ref().map(|(last, _)| *last)) >= Some(next + window)
        });
        assert!(far, "{:?}", steps::sleeping());
        session.cancel();
        waited = true;
    }
    let report = Rc::new(RefCell::new(None));
    let place = report.clone();
    steps::spawn("joining".into(), move || {
        *place.borrow_mut() = Some(session.join());
    });
    steps::settle(drain);
    let report = report.borrow_mut().take();
    let report = report.unwrap_or_else(|| panic!("it never ends: {:?}", steps::sleeping()));
    assert_eq!(report.stats.late_wakeups, 0);
    for ((drain, expected), id) in drains.iter().zip(devices.values()).zip(&ids) {
        let got = drain.got();
        let (data, _) = expected.in_order();
        // Which of two of one idx was first is not said.
        if !expected.wrong {
            assert!(data.starts_with(&got.bytes), "{id}: other bytes");
        }
        if report.result.is_ok() {
            assert!(expected.is_whole(), "{id}: not all was there");
            assert_eq!(got.bytes, data, "{id}");
            let (_, framed) = expected.config.as_ref().expect("it is whole");
            let body = wire::config_body(framed).expect("it was loaded");
            assert_eq!(got.config.as_deref(), Some(body), "{id}");
        }
    }
    if let Err(error) = report.result {
        let whole = devices.values().all(Expected::is_whole);
        let hellos: Vec<_> = scans.iter().filter_map(|scan| scan.hello).collect();
        let one = hellos.iter().all(|hello| hello.uuid == hellos[0].uuid);
        let twice =
            (1..hellos.len()).any(|at| hellos[..at].iter().any(|other| other.id == hellos[at].id));
        let framed = devices.values().all(|device| {
            let config = device.config.as_ref();
            config.is_some_and(|(_, framed)| wire::config_body(framed).is_ok())
        });
        assert!(
            waited || !whole || !one || twice || !framed,
            "nothing was wrong, and yet: {error}"
        );
        assert_eq!(error.is_cancelled(), waited, "{error}");
        let missing = *error.kind() == ErrorKind::Missing;
        let text = format!("{:#}", capture_set::explain(error, &scans));
        assert!(waited || text.contains("file "), "{text} is nowhere");
        assert!(!missing || text.contains(" lacks idx "), "{text}");
        assert!(text.chars().all(is_printable), "{text:?}");
    }
    steps::end();
});
