//! The wire modules against migrations recorded between two QEMUs: every byte is accounted for, and
//! what is decoded encodes to the same bytes.
//!
//! See `capture` for what is recorded.

use std::{
    collections::{BTreeMap, HashMap},
    io::Read,
};

use serde_json::Value;
use vfio_migration::{
    DeviceId, Result,
    section::{self, SectionSink, Tag, load_state},
    stream::{Command, Event, MainChannelOrder, Reader, Reply, Section, Writer},
    wire::{
        DEFAULT_MAX_PACKET, DeviceKey, Frame, Framer, PageSize, Walk, config_body, encode_packet,
        encode_sync, wrap_config,
    },
};

use crate::capture::{Capture, id, list, number, sha256, text, vfio_only};

const CAPTURES: [&str; 5] = [
    "01-xfer-on-1dev-2ch",
    "05-xfer-on-2dev-3ch",
    "06-xfer-on-1dev-big-2.5MB-4ch",
    "10-xfer-on-1dev-paused",
    "22-qemu11-xfer-on-cfg-after-iter-on",
];

fn captures() -> impl Iterator<Item = Capture> {
    CAPTURES.into_iter().map(Capture::open)
}

/// What a device gets, by whichever way.
#[derive(Default)]
struct Device {
    main: Vec<u8>,
    packets: BTreeMap<u32, (bool, Vec<u8>)>,
    tags: Vec<(Tag, u64)>,
}

impl SectionSink for Device {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.main.extend(bytes);
        Ok(())
    }

    fn config(&mut self, _input: &mut dyn Read) -> Result<()> {
        panic!("in these captures the config comes by multifd");
    }

    fn init_data_sent(&mut self) -> Result<bool> {
        Ok(true)
    }

    fn config_load_ready(&mut self) -> Result<bool> {
        Ok(true)
    }

    fn on_tag(&mut self, tag: Tag, data_len: u64) {
        self.tags.push((tag, data_len));
        if tag == Tag::Setup {
            // The end tag that must follow is part of the setup tag's reading.
            self.tags.push((Tag::EndOfState, 0));
        }
    }
}

fn walk(channel: &[u8]) -> Walk<'_> {
    let page_size = PageSize::new(4096).expect("a page size");
    Walk::new(channel, Framer::new(Some(page_size), DEFAULT_MAX_PACKET))
}

/// Puts the packets of all channels in their devices.
fn collect(channels: &[Vec<u8>], devices: &mut HashMap<DeviceId, Device>) {
    for located in channels.iter().flat_map(|channel| walk(channel)) {
        let located = located.expect("a good frame");
        if let Frame::DeviceState(packet) = located.frame {
            let id = packet.header.key().id().expect("a device's name");
            let packets = &mut devices.entry(id).or_default().packets;
            let content = (packet.packet.config, located.payload.to_vec());
            assert!(packets.insert(packet.packet.index, content).is_none());
        }
    }
}

#[test]
fn every_channel_is_walked_to_its_last_byte_and_encodes_to_the_same_bytes() {
    let page_size = PageSize::new(4096).expect("a page size");
    for capture in captures() {
        let channels = capture.channels();
        let count = u32::try_from(channels.len()).expect("a few");
        let mut ids = Vec::new();
        for channel in &channels {
            let mut walk = walk(channel);
            let mut encoded = Vec::with_capacity(channel.len());
            for (position, located) in walk.by_ref().enumerate() {
                let located = located.expect("a good frame");
                assert_eq!(located.offset, encoded.len());
                match located.frame {
                    Frame::Hello(hello) => {
                        assert_eq!(position, 0);
                        hello.check(&[0; 16], count).expect("one of the channels");
                        ids.push(hello.id);
                        encoded.extend(hello.encode());
                    }
                    Frame::Sync { packet_num } => {
                        encoded.extend(encode_sync(page_size, packet_num));
                    }
                    Frame::Ram(ram) => {
                        let head = ram.encode();
                        encoded.extend(head);
                        encoded.extend(&located.header[head.len()..]);
                    }
                    Frame::DeviceState(packet) => {
                        let (index, config) = (packet.packet.index, packet.packet.config);
                        let key = packet.header.key();
                        encoded.extend(encode_packet(&key, index, config, packet.data_len));
                    }
                }
                assert_eq!(encoded[located.offset..], *located.header);
                encoded.extend(located.payload);
            }
            assert_eq!(walk.offset(), channel.len());
            assert_eq!(encoded, *channel);
        }
        ids.sort_unstable();
        assert!(ids.iter().copied().map(u32::from).eq(0..count));
    }
}

#[test]
fn the_devices_get_the_state_that_the_source_read() {
    for capture in captures() {
        let mut devices = HashMap::new();
        collect(&capture.channels(), &mut devices);
        let main = capture.file(text(&capture.expected["main"]));
        read_sections(&capture, &main, &mut devices);

        let expected = list(&capture.expected["devices"]);
        assert_eq!(devices.len(), expected.len());
        for expected in expected {
            let device = &devices[&id(expected)];
            let count = u32::try_from(device.packets.len()).expect("a few");
            assert_eq!(count as usize, number(&expected["packets"]));
            assert!(device.packets.keys().copied().eq(0..count), "no gaps");

            let mut state = Vec::new();
            for (index, (config, data)) in &device.packets {
                assert_eq!(*config, *index == count - 1, "the config is the last");
                if *config {
                    assert_eq!(data.len(), number(&expected["config_bytes"]));
                    assert_eq!(sha256(data), text(&expected["config_sha256"]));
                    let body = config_body(data).expect("between its tags");
                    assert_eq!(wrap_config(body), *data);
                } else {
                    state.extend(data);
                }
            }
            assert_eq!(state.len(), number(&expected["state_bytes"]));
            assert_eq!(sha256(&state), text(&expected["state_sha256"]));

            assert_eq!(device.main.len(), number(&expected["main_channel_bytes"]));
            let whole = [&device.main[..], &state].concat();
            assert_eq!(whole.len(), number(&expected["whole_bytes"]));
            assert_eq!(sha256(&whole), text(&expected["whole_sha256"]));
        }
    }
}

fn read_sections(capture: &Capture, main: &[u8], devices: &mut HashMap<DeviceId, Device>) {
    let bytes = vfio_only(capture, main);
    let mut reader = Reader::open(&bytes[..]).expect("a main channel");
    let mut writer = Writer::open(Vec::new()).expect("a Vec takes everything");
    let mut expected = list(&capture.expected["sections"]).iter();
    let mut others = Vec::new();
    let mut order = MainChannelOrder::new(list(&capture.expected["devices"]).iter().map(id));
    while let Some(event) = reader.next_event().expect("a good event") {
        order.event(&event).expect("in its place");
        writer.write(&event).expect("within every bound");
        let Event::Section(section) = event else {
            others.push(event);
            continue;
        };
        let expected = expected.next().expect("no more sections than there are");
        check_header(&section, expected);
        let device = devices.entry(section.owner.clone()).or_default();
        device.tags.clear();
        let at = device.main.len();
        let piece = load_state(reader.body().expect("a section"), device).expect("a good body");
        order.body(&section, &piece).expect("a body that fits");
        reader.footer().expect("the footer");
        check_tags(&device.tags, expected);
        write_body(writer.body(), &device.tags, &device.main[at..]);
        writer.footer(section.id).expect("a Vec takes everything");
    }
    assert!(expected.next().is_none());
    assert_eq!(writer.into_inner(), bytes);

    let [configuration, open, ping, start, eof, description] = &others[..] else {
        panic!("{others:?}");
    };
    assert!(matches!(configuration, Event::Configuration { name } if name.starts_with("pc-q35-1")));
    assert_eq!(*open, Event::Command(Command::OpenReturnPath));
    assert_eq!(*ping, Event::Command(Command::Ping(1)));
    assert_eq!(*start, Event::Command(Command::SwitchoverStart));
    assert_eq!(*eof, Event::Eof);
    let Event::Description(json) = description else {
        panic!("{description:?}");
    };
    assert!(serde_json::from_slice::<Value>(json).is_ok());
}

fn check_header(section: &Section, expected: &Value) {
    assert_eq!(section.kind as usize, number(&expected["type"]));
    assert_eq!(section.id as usize, number(&expected["section_id"]));
    assert_eq!(section.owner, id(expected));
    assert_eq!(section.version, 1);
}

fn check_tags(tags: &[(Tag, u64)], expected: &Value) {
    let expected = list(&expected["tags"]);
    assert_eq!(tags.len(), expected.len());
    for ((tag, len), expected) in tags.iter().zip(expected) {
        let name = match tag {
            Tag::EndOfState => "END_OF_STATE",
            Tag::Setup => "SETUP",
            Tag::Data => "DATA",
            Tag::InitDataSent => "INIT_DATA_SENT",
            Tag::ConfigLoadReady => "CONFIG_LOAD_READY",
            other => panic!("{other:?}"),
        };
        assert_eq!(name, text(&expected[0]));
        assert_eq!(Some(*len), expected[1].as_u64());
    }
}

/// Writes the body again, from what was read of it.
fn write_body(output: &mut Vec<u8>, tags: &[(Tag, u64)], data: &[u8]) {
    let mut writer = section::Writer::new(output);
    match tags {
        [(Tag::Setup, _), (Tag::EndOfState, _)] => writer.setup().and_then(|()| writer.end()),
        [(Tag::ConfigLoadReady, _)] => writer.config_load_ready(),
        [.., (end, _)] => writer.iterate(data, *end == Tag::InitDataSent),
        [] => unreachable!("a piece ends with a tag"),
    }
    .expect("a Vec takes everything");
}

#[test]
fn the_return_path_is_read() {
    for capture in captures() {
        let path = capture.file("00-s2c.bin");
        let mut rest = &path[..];
        let mut encoded = Vec::new();
        let mut replies = Vec::new();
        while let Some(reply) = Reply::read(&mut rest).expect("a good message") {
            reply.write(&mut encoded).expect("a Vec takes everything");
            replies.push(reply);
        }
        assert_eq!(
            replies,
            [Reply::Pong(1), Reply::SwitchoverAck, Reply::Shut(0)]
        );
        assert_eq!(encoded, path);
    }
}

#[test]
fn a_key_is_the_same_for_each_of_a_devices_packets() {
    for capture in captures() {
        let known: Vec<_> = list(&capture.expected["devices"])
            .iter()
            .map(|device| DeviceKey::new(&id(device)))
            .collect();
        for located in capture.channels().iter().flat_map(|channel| walk(channel)) {
            if let Frame::DeviceState(packet) = located.expect("a good frame").frame {
                assert!(known.contains(&packet.header.key()));
            }
        }
    }
}
