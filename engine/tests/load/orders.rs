//! Whatever the order in which packets come, each device gets its bytes in the one right order.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use proptest::prelude::*;
use vfio_migration::{
    Backend, Channel, LoadSession, RamSink, SaveSession, Settings,
    sim::{Image, SimConfig, SimDevice},
    wire::{self, Frame, Framer, Kind, PageSize, Walk, wrap_config},
};
use vfio_migration_uring::sim::SimConfig as RingConfig;

use crate::{
    barrier::sync,
    mock::Mock,
    names::id,
    packets::{config_packet, hello, packet},
    payload::payload,
    pipes::collect,
    watchdog::Watchdog,
};

/// A migration's packets, and how they reach the destination.
#[derive(Clone, Debug)]
struct Case {
    /// By device, the length of each data packet.
    devices: Vec<Vec<usize>>,
    channels: usize,
    /// Which channel carries the n-th packet of all.
    carriers: Vec<usize>,
    /// How the devices' packets are interleaved: which device is next, of those not done.
    turns: Vec<usize>,
    buffer_len: usize,
    /// Per device.
    budget: usize,
    /// Simulates a bad ring with this seed, where there is one.
    bad_ring: Option<u64>,
    blocking: bool,
}

fn cases() -> impl Strategy<Value = Case> {
    let lengths = prop::collection::vec(prop_oneof![Just(0), 1..200_usize, 1..30_000_usize], 0..25);
    (
        prop::collection::vec(lengths, 1..4),
        1..5_usize,
        prop::collection::vec(0..4_usize, 80),
        prop::collection::vec(0..3_usize, 80),
        prop_oneof![Just(4096_usize), Just(10_000), Just(1 << 20)],
        prop_oneof![Just(4096_usize), Just(20_000), Just(1 << 20)],
        prop::option::of(any::<u64>()),
        any::<bool>(),
    )
        .prop_map(
            |(devices, channels, carriers, turns, buffer_len, budget, bad_ring, blocking)| Case {
                devices,
                channels,
                carriers,
                turns,
                buffer_len,
                budget,
                bad_ring,
                blocking,
            },
        )
}

fn data(device: usize, index: usize, len: usize) -> Vec<u8> {
    let seed = (device * 31 + index * 7) as u64;
    let mut bytes = vec![0; len];
    Image::new(seed, 1 << 20).fill(seed, &mut bytes);
    bytes
}

/// All packets as a source hands them out: each device's in idx order, all devices' in one order.
fn sequence(case: &Case) -> Vec<(usize, usize)> {
    let mut next = vec![0; case.devices.len()];
    let mut sequence = Vec::new();
    let mut turns = case.turns.iter().cycle();
    loop {
        let open: Vec<usize> = (0..next.len())
            .filter(|&device| next[device] <= case.devices[device].len())
            .collect();
        if open.is_empty() {
            return sequence;
        }
        let device = open[turns.next().unwrap() % open.len()];
        sequence.push((device, next[device]));
        next[device] += 1;
    }
}

fn check(case: &Case) {
    let _watchdog = Watchdog::new();
    let mut settings = Settings::default();
    settings.buffer_len = case.buffer_len;
    settings.budget = Some(case.budget * case.devices.len());
    settings.backend = if case.blocking {
        Backend::Blocking
    } else {
        Backend::Uring
    };
    let mut builder = LoadSession::builder().settings(settings);
    if let Some(seed) = case.bad_ring {
        builder = builder.simulated_ring(RingConfig {
            seed,
            short: 20,
            interrupt: 10,
            again: 10,
            delay: 10,
            reorder: true,
            ..RingConfig::default()
        });
    }
    let (mut got, mut logs) = (Vec::new(), Vec::new());
    for number in 0..case.devices.len() {
        let (reader, writer) = io::pipe().unwrap();
        got.push(collect(reader));
        let mock = Mock::new(writer);
        logs.push(mock.log.clone());
        builder = builder.device(mock.device(u32::try_from(number).unwrap()));
    }
    let mut streams: Vec<Vec<u8>> = (0..case.channels)
        .map(|number| [hello(u8::try_from(number).unwrap()), sync()].concat())
        .collect();
    for (at, (device, index)) in sequence(case).into_iter().enumerate() {
        let carrier = case.carriers[at % case.carriers.len()] % case.channels;
        let (number, idx) = (
            u32::try_from(device).unwrap(),
            u32::try_from(index).unwrap(),
        );
        streams[carrier].extend(match case.devices[device].get(index) {
            Some(&len) => packet(number, idx, &data(device, index, len)),
            None => config_packet(number, idx, format!("config {device}").as_bytes()),
        });
    }
    let mut writers = Vec::new();
    for stream in streams {
        let (mut near, far) = UnixStream::pair().unwrap();
        builder = builder.channel(far);
        writers.push(thread::spawn(move || near.write_all(&stream).unwrap()));
    }
    let load = builder.start().unwrap();
    load.switchover_start();
    let mut report = load.join();
    report
        .result
        .as_ref()
        .unwrap_or_else(|error| panic!("{error:?} in {case:?}"));
    assert_eq!(report.stats.late_wakeups, 0);
    assert!(report.stats.held_high <= report.stats.budget);
    report.devices.clear();
    for writer in writers {
        writer.join().unwrap();
    }
    for (device, got) in got.into_iter().enumerate() {
        let lens = case.devices[device].iter().enumerate();
        let right: Vec<u8> = lens
            .flat_map(|(index, &len)| data(device, index, len))
            .collect();
        assert_eq!(got.join().unwrap(), right, "device {device} of {case:?}");
        let config = logs[device].lock().unwrap().config.clone();
        assert_eq!(config, format!("config {device}").as_bytes());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn every_order_that_a_source_can_make(case in cases()) {
        check(&case);
    }

    #[test]
    fn every_order_that_can_be_pushed(order in Just((0..60_u32).collect::<Vec<_>>()).prop_shuffle(), len in 0..5000_usize) {
        let _watchdog = Watchdog::new();
        let (reader, writer) = io::pipe().unwrap();
        let got = collect(reader);
        let mut settings = Settings::default();
        settings.budget = Some(1 << 20);
        let load = LoadSession::builder()
            .settings(settings)
            .device(Mock::new(writer).device(1))
            .start()
            .unwrap();
        let mut publisher = load.publisher();
        for (at, index) in order.iter().copied().enumerate() {
            if at == 30 {
                load.switchover_start();
            }
            let bytes = data(1, index as usize, len);
            // The four ways in, in turn.
            let header = wire::PacketHeader { index, config: false };
            match index % 4 {
                0 => publisher.push(&id(1), &payload(index, false, &bytes)).unwrap(),
                1 => prop_assert!(publisher.try_push(&id(1), &payload(index, false, &bytes)).unwrap()),
                2 => {
                    let mut lease = publisher.lease(&id(1), header, len).unwrap();
                    lease.bytes_mut().copy_from_slice(&bytes);
                    lease.publish().unwrap();
                }
                _ => {
                    let mut lease = publisher.try_lease(&id(1), header, len).unwrap().unwrap();
                    lease.bytes_mut().copy_from_slice(&bytes);
                    lease.publish().unwrap();
                }
            }
        }
        publisher.push(&id(1), &payload(60, true, &wrap_config(b""))).unwrap();
        drop(publisher);
        let mut report = load.join();
        report.result.unwrap();
        report.devices.clear();
        let right: Vec<u8> = (0..60).flat_map(|index| data(1, index, len)).collect();
        prop_assert_eq!(got.join().unwrap(), right);
    }
}

#[test]
fn nothing_is_written_before_the_switchover_starts() {
    let _watchdog = Watchdog::new();
    let (mut reader, writer) = io::pipe().unwrap();
    let (mut near, far) = UnixStream::pair().unwrap();
    let load = LoadSession::builder()
        .device(Mock::new(writer).device(1))
        .channel(far)
        .start()
        .unwrap();
    load.write_iterable(&id(1), b"iterable, ").unwrap();
    let bytes = [
        hello(0),
        packet(1, 0, b"packets"),
        config_packet(1, 1, b"c"),
    ]
    .concat();
    near.write_all(&bytes).unwrap();
    drop(near);
    while load.stats().channels[0].packets < 2 {
        thread::sleep(Duration::from_millis(1));
    }
    thread::sleep(Duration::from_millis(50));
    assert_eq!(
        load.stats().devices[0].entries,
        0,
        "the ring has had nothing"
    );
    load.switchover_start();
    assert!(load.write_iterable(&id(1), b"too late").is_err());
    let mut report = load.join();
    report.result.unwrap();
    report.devices.clear();
    let mut all = String::new();
    reader.read_to_string(&mut all).unwrap();
    assert_eq!(all, "iterable, packets");
}

#[test]
fn a_full_budget_gives_packets_back_and_admits_the_next() {
    let _watchdog = Watchdog::new();
    let (reader, writer) = io::pipe().unwrap();
    let got = collect(reader);
    let mut settings = Settings::default();
    settings.budget = Some(8192);
    let load = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(writer).device(1))
        .start()
        .unwrap();
    let mut publisher = load.publisher();
    let push = |publisher: &mut vfio_migration::Publisher, index| {
        publisher.try_push(&id(1), &payload(index, false, &[7; 4096]))
    };
    // The reserve is for the next packet alone; what is refused may come again.
    let early = push(&mut publisher, 1).unwrap();
    assert!(
        !early,
        "only the next packet has memory in so small a budget"
    );
    assert!(push(&mut publisher, 0).unwrap());
    assert!(!push(&mut publisher, 1).unwrap());
    load.switchover_start();
    while !push(&mut publisher, 1).unwrap() {
        thread::yield_now();
    }
    // Larger than all memory: it passes in pieces.
    let large = payload(2, false, &[9; 100_000]);
    assert!(!publisher.try_push(&id(1), &large).unwrap());
    publisher.push(&id(1), &large).unwrap();
    publisher
        .push(&id(1), &payload(3, true, &wrap_config(b"")))
        .unwrap();
    drop(publisher);
    let mut report = load.join();
    report.result.unwrap();
    report.devices.clear();
    assert_eq!(
        got.join().unwrap(),
        [vec![7; 8192], vec![9; 100_000]].concat()
    );
}

#[test]
fn a_save_hands_out_each_devices_packets_in_order() {
    let _watchdog = Watchdog::new();
    let mut settings = Settings::default();
    settings.data_len = Some(3000);
    settings.budget = Some(64 << 10);
    let mut save = SaveSession::builder().settings(settings);
    let mut handles = Vec::new();
    for number in 0..3 {
        let config = SimConfig {
            seed: number,
            len: 100_000 + number,
            ..SimConfig::default()
        };
        let sim = SimDevice::new(config).unwrap();
        handles.push(sim.handle());
        let number = u32::try_from(number).unwrap();
        save = save.device(vfio_migration::Device::new(id(number), Box::new(sim)).unwrap());
    }
    let mut readers = Vec::new();
    for _ in 0..4 {
        let (near, mut far) = UnixStream::pair().unwrap();
        save = save.channel(near);
        readers.push(thread::spawn(move || {
            let mut bytes = Vec::new();
            far.read_to_end(&mut bytes).unwrap();
            bytes
        }));
    }
    save.start().unwrap().join().result.unwrap();
    let mut devices: Vec<Vec<Option<Vec<u8>>>> = vec![Vec::new(); 3];
    for (number, reader) in readers.into_iter().enumerate() {
        let bytes = reader.join().unwrap();
        let page = PageSize::new(4096).unwrap();
        let framer = Framer::new(Some(page), wire::DEFAULT_MAX_PACKET);
        let mut last = [None; 3];
        for (at, located) in Walk::new(&bytes, framer).enumerate() {
            let located = located.unwrap();
            match (at, located.frame) {
                (0, Frame::Hello(hello)) => assert_eq!(usize::from(hello.id), number),
                (1, Frame::Sync { .. }) => {}
                (_, Frame::DeviceState(packet)) => {
                    let name = packet.header.idstr;
                    let device =
                        (0..3).find(|&n| id(n).idstr().as_bytes() == name).unwrap() as usize;
                    let index = packet.packet.index;
                    assert!(last[device] < Some(index), "within a channel idx rises");
                    last[device] = Some(index);
                    let packets = &mut devices[device];
                    packets.resize(packets.len().max(index as usize + 1), None);
                    assert!(packets[index as usize].is_none(), "each idx once");
                    packets[index as usize] = Some(located.payload.to_vec());
                    if packet.packet.config {
                        assert!(wire::config_body(located.payload).is_ok());
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    }
    for (packets, handle) in devices.into_iter().zip(handles) {
        let mut packets: Vec<Vec<u8>> = packets.into_iter().map(Option::unwrap).collect();
        let config = packets.pop().unwrap();
        assert!(
            wire::config_body(&config).is_ok(),
            "the config has the highest idx"
        );
        assert!(
            packets
                .iter()
                .all(|packet| (1..=3000).contains(&packet.len()))
        );
        assert_eq!(Image::digest_of(&packets.concat()), handle.digest());
    }
}

/// A packet's header and its pages.
type Kept = (Vec<u8>, Vec<u8>);

/// Keeps what it is given, in its order.
struct Keep(Arc<Mutex<Vec<Kept>>>);

impl RamSink for Keep {
    fn ram(&mut self, header: &[u8], pages: &mut dyn Read) -> io::Result<()> {
        let mut bytes = Vec::new();
        pages.read_to_end(&mut bytes)?;
        self.0.lock().unwrap().push((header.to_vec(), bytes));
        Ok(())
    }

    fn sync(&mut self, header: &[u8]) -> io::Result<()> {
        self.0.lock().unwrap().push((header.to_vec(), Vec::new()));
        Ok(())
    }
}

#[test]
fn ram_and_syncs_reach_their_sink_untouched_and_in_order() {
    let _watchdog = Watchdog::new();
    let ram = |pages: u32| {
        let mut header = vec![0; 1344];
        header[..12].copy_from_slice(&Kind::Ram { flags: 0 }.encode());
        header[12..16].copy_from_slice(&128_u32.to_be_bytes());
        header[16..20].copy_from_slice(&pages.to_be_bytes());
        header[20..24].copy_from_slice(&(pages * 4096).to_be_bytes());
        (
            header,
            vec![u8::try_from(pages).unwrap(); pages as usize * 4096],
        )
    };
    let (reader, writer) = io::pipe().unwrap();
    let got = collect(reader);
    let (mut near, far) = UnixStream::pair().unwrap();
    let kept = Arc::new(Mutex::new(Vec::new()));
    let load = LoadSession::builder()
        .device(Mock::new(writer).device(1))
        .channel(Channel::from(far).with_ram_sink(Keep(kept.clone())))
        .start()
        .unwrap();
    load.switchover_start();
    let mut stream = hello(0);
    let mut expected = Vec::new();
    for index in 0..6 {
        let (header, pages) = ram(index);
        stream.extend(sync());
        stream.extend(packet(1, index, &[7; 5000]));
        stream.extend(&header);
        stream.extend(&pages);
        expected.push((sync(), Vec::new()));
        expected.push((header, pages));
    }
    stream.extend(config_packet(1, 6, b"c"));
    near.write_all(&stream).unwrap();
    drop(near);
    let mut report = load.join();
    report.result.unwrap();
    let channel = &report.stats.channels[0];
    assert_eq!(
        (channel.ram_packets, channel.syncs, channel.packets),
        (6, 6, 7)
    );
    report.devices.clear();
    assert_eq!(got.join().unwrap(), [7; 30_000]);
    assert!(*kept.lock().unwrap() == expected);
}
