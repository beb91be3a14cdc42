use proptest::prelude::*;

use super::*;
use crate::error::{ErrorKind, Phase};

fn key() -> DeviceKey {
    DeviceKey::new(&DeviceId::new("0000:00:03.0/vfio", 0).expect("a good name"))
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T>) -> Violation {
    match result.expect_err("should be refused").kind() {
        ErrorKind::Protocol(violation) => violation.clone(),
        kind => panic!("not the peer's fault: {kind:?}"),
    }
}

fn prefix(flags: u32) -> [u8; PREFIX_LEN] {
    let mut bytes = Kind::Sync.encode();
    put(&mut bytes, 8, flags.to_be_bytes());
    bytes
}

#[test]
fn a_hello_is_laid_out_as_on_the_wire() {
    let uuid = *b"0123456789abcdef";
    let bytes = Hello { uuid, id: 5 }.encode();
    assert_eq!(bytes[..8], [0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1]);
    assert_eq!(bytes[8..24], uuid);
    assert_eq!(bytes[24..], [&[5][..], &[0; 39]].concat());

    let mut other = bytes;
    other[25..].fill(0xff);
    assert_eq!(Hello::decode(&other).expect("unused bytes are free").id, 5);
    other[3] = 0x45;
    assert_eq!(
        refused(Hello::decode(&other)),
        Violation::Magic(0x1122_3345)
    );
    other = bytes;
    other[7] = 2;
    assert_eq!(refused(Hello::decode(&other)), Violation::Version(2));
}

#[test]
fn a_hello_must_be_for_this_vm_and_one_of_its_channels() {
    let hello = Hello {
        uuid: [7; 16],
        id: 255,
    };
    assert!(hello.check(&[7; 16], 256).is_ok());
    assert_eq!(refused(hello.check(&[0; 16], 256)), Violation::Uuid);
    assert_eq!(
        refused(hello.check(&[7; 16], 255)),
        Violation::ChannelId {
            id: 255,
            channels: 255
        }
    );
}

#[test]
fn every_flag_is_known_or_refused() {
    for flags in 0..=0xff_u32 {
        let kind = Kind::decode(&prefix(flags));
        match flags {
            1 => assert_eq!(kind.expect("SYNC"), Kind::Sync),
            0x40 => assert_eq!(kind.expect("state"), Kind::DeviceState),
            0 | 2 | 4 | 8 | 0x10 | 0x20 => {
                assert_eq!(kind.expect("RAM"), Kind::Ram { flags });
                assert_eq!(Kind::Ram { flags }.encode(), prefix(flags));
            }
            _ if flags & !FLAG_COMPRESSION == FLAG_DEVICE_STATE => {
                assert_eq!(refused(kind), Violation::Compressed(flags));
            }
            _ => assert_eq!(refused(kind), Violation::Flags(flags)),
        }
    }
    for bit in 7..32 {
        for with in [0, FLAG_SYNC, FLAG_DEVICE_STATE] {
            let flags = 1 << bit | with;
            assert_eq!(
                refused(Kind::decode(&prefix(flags))),
                Violation::Flags(flags)
            );
        }
    }
}

#[test]
fn a_device_packet_is_laid_out_as_on_the_wire() {
    // The config packet of a recorded migration.
    let bytes = encode_packet(&key(), 1, true, 4132);
    let mut expected = vec![0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1, 0, 0, 0, 0x40];
    expected.extend(b"0000:00:03.0/vfio");
    expected.resize(12 + 256, 0);
    expected.extend([0, 0, 0, 0, 0, 0, 0x10, 0x30]);
    expected.extend([0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1]);
    assert_eq!(bytes[..], expected[..]);
}

#[test]
fn what_stands_behind_the_first_nul_is_no_part_of_the_name() {
    let mut bytes = encode_packet(&key(), 0, false, 1);
    bytes[PREFIX_LEN + 20..PREFIX_LEN + 255].fill(b'x');
    let packet = DevicePacket::decode(&bytes, DEFAULT_MAX_PACKET).expect("a good packet");
    assert_eq!(packet.header.idstr, b"0000:00:03.0/vfio");
    assert_eq!(packet.header.key(), key());
    let raw = field::<{ DeviceKey::LEN }>(&bytes, PREFIX_LEN);
    assert_eq!(DeviceKey::decode(&raw).expect("a good key"), key());

    let made = DeviceStateHeader {
        idstr: b"0000:00:03.0/vfio\0x",
        ..packet.header
    };
    assert_eq!(made.key(), key());

    bytes[PREFIX_LEN + 255] = b'x';
    let refusal = refused(DevicePacket::decode(&bytes, DEFAULT_MAX_PACKET));
    assert_eq!(refusal, Violation::Idstr);
    let raw = field::<{ DeviceKey::LEN }>(&bytes, PREFIX_LEN);
    assert_eq!(refused(DeviceKey::decode(&raw)), Violation::Idstr);
}

#[test]
fn the_longest_name_fits_and_no_name_is_no_device() {
    let id = DeviceId::new("x".repeat(255), u32::MAX).expect("a good name");
    let key = DeviceKey::new(&id);
    assert_eq!(key.id(), Some(id));
    assert_eq!(key.instance(), u32::MAX);

    let nobody = DeviceKey::decode(&[0; DeviceKey::LEN]).expect("has its NUL");
    assert_eq!((nobody.idstr(), nobody.id()), (&b""[..], None));
    let mut raw = [0; DeviceKey::LEN];
    raw[0] = 0xff;
    let garbled = DeviceKey::decode(&raw).expect("has its NUL");
    assert_eq!(garbled.id(), None);
    assert_eq!(format!("{garbled:?}"), "DeviceKey(\\xff#0)");
    assert!(garbled.unknown().to_string().contains('\u{fffd}'));
}

#[test]
fn sizes_are_checked_before_they_are_used() {
    let refusal = |len| {
        let mut bytes = [0; DEVICE_PACKET_LEN];
        put(&mut bytes, 0, DeviceStateHeader::encode(&key(), len));
        let error = DevicePacket::decode(&bytes, 100).expect_err("a bad size");
        assert_eq!(error.device(), key().id().as_ref());
        error.kind().clone()
    };
    assert_eq!(refusal(0), ErrorKind::Protocol(Violation::EmptyPacket));
    for len in [101, u32::MAX] {
        let violation = Violation::PacketTooLarge { len, max: 100 };
        assert_eq!(refusal(len), ErrorKind::Protocol(violation));
    }
    for len in 1..12 {
        let violation = Violation::PacketTooShort(len);
        assert_eq!(refusal(len), ErrorKind::Protocol(violation));
    }
    // A packet without data is one.
    let bytes = encode_packet(&key(), 0, false, 0);
    let packet = DevicePacket::decode(&bytes, 12).expect("a good packet");
    assert_eq!(packet.data_len, 0);
}

#[test]
fn the_payloads_header_is_checked() {
    let decode = |version: u32, index: u32, flags: u32| {
        let mut bytes = [0; PACKET_HEADER_LEN];
        put(&mut bytes, 0, version.to_be_bytes());
        put(&mut bytes, 4, index.to_be_bytes());
        put(&mut bytes, 8, flags.to_be_bytes());
        PacketHeader::decode(&bytes)
    };
    let index = u32::MAX - 1;
    let config = true;
    assert_eq!(
        decode(0, index, 1).expect("a good header"),
        PacketHeader { index, config }
    );
    assert_eq!(refused(decode(1, 0, 0)), Violation::PacketVersion(1));
    assert_eq!(refused(decode(0, u32::MAX, 0)), Violation::InvalidIndex);
    for flags in [2, 3, 1 << 31] {
        let error = decode(0, 9, flags).expect_err("unknown flags");
        assert_eq!(error.index(), Some(9));
        assert_eq!(refused::<()>(Err(error)), Violation::PacketFlags(flags));
    }
}

#[test]
fn a_config_stands_between_its_tags() {
    let whole = wrap_config(b"");
    assert_eq!(
        whole,
        [
            [0xff, 0xff, 0xff, 0xff, 0xef, 0x10, 0, 2],
            [0xff, 0xff, 0xff, 0xff, 0xef, 0x10, 0, 1]
        ]
        .concat()
    );
    assert_eq!(config_body(&whole).expect("well framed"), b"");
    for cut in 0..whole.len() {
        let error = config_body(&whole[..cut]).expect_err("cut short");
        assert_eq!(error.phase(), Phase::Config);
        assert!(config_body(&whole[whole.len() - cut..]).is_err());
    }
}

#[test]
fn a_page_size_is_a_power_of_two_within_a_packet() {
    let good = [12, 13, 14, 16, 19].map(|bits| PageSize::new(1 << bits).expect("a page size"));
    assert_eq!(
        good.map(PageSize::ram_header_len),
        [1344, 320 + 512, 320 + 256, 320 + 64, 320 + 8]
    );
    for bad in [0, 1, 2048, 4095, 4097, 12288, 1 << 20, u32::MAX] {
        let error = PageSize::new(bad).expect_err("no page size");
        assert!(matches!(error.kind(), ErrorKind::Misuse(_)));
    }
}

fn page_size() -> PageSize {
    PageSize::new(4096).expect("a page size")
}

fn ram(normal_pages: u32, zero_pages: u32, size: u32, flags: u32) -> RamHeader<'static> {
    RamHeader {
        kind: Kind::Ram { flags },
        pages_alloc: 128,
        normal_pages,
        next_packet_size: size,
        packet_num: 0x0102_0304_0506_0708,
        zero_pages,
        ramblock: b"pc.ram",
    }
}

#[test]
fn a_ram_header_is_laid_out_as_on_the_wire() {
    let bytes = ram(1, 2, 4096, 0).encode();
    assert_eq!(bytes[..12], prefix(0));
    assert_eq!(bytes[12..24], [0, 0, 0, 128, 0, 0, 0, 1, 0, 0, 0x10, 0]);
    assert_eq!(bytes[24..36], [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 2]);
    assert_eq!(bytes[36..64], [0; 28]);
    assert_eq!(bytes[64..71], *b"pc.ram\0");
}

#[test]
fn a_ram_headers_counts_and_sizes_must_fit() {
    let ok = |header: RamHeader<'_>| {
        let bytes = header.encode();
        assert_eq!(
            RamHeader::decode(&bytes, page_size()).expect("a good header"),
            header
        );
    };
    ok(ram(0, 128, 0, 0));
    ok(ram(128, 0, 512 << 10, 0));
    ok(ram(100, 28, 7, 2));
    ok(ram(128, 0, 1 << 20, 4));

    let bad = |header: RamHeader<'_>| {
        let bytes = header.encode();
        assert!(matches!(
            refused(RamHeader::decode(&bytes, page_size())),
            Violation::RamLayout(_)
        ));
    };
    bad(ram(129, 0, 129 << 12, 0));
    bad(ram(u32::MAX, 0, 0, 0));
    bad(ram(1, 128, 4096, 0));
    bad(ram(1, u32::MAX, 4096, 0));
    bad(ram(1, 0, 4095, 0));
    bad(ram(0, 0, 1, 0));
    bad(ram(128, 0, (1 << 20) + 1, 2));
    bad(RamHeader {
        pages_alloc: 129,
        ..ram(0, 0, 0, 0)
    });
    let sync = |header| RamHeader {
        kind: Kind::Sync,
        ..header
    };
    ok(sync(ram(0, 0, 0, 0)));
    bad(sync(ram(1, 0, 4096, 0)));
    bad(sync(ram(0, 1, 0, 0)));
    bad(sync(ram(0, 0, 1, 0)));

    let mut bytes = ram(0, 0, 0, 0).encode();
    bytes[319] = 1;
    assert!(RamHeader::decode(&bytes, page_size()).is_err());
    put(&mut bytes, 0, Kind::DeviceState.encode());
    bytes[319] = 0;
    let refusal = refused(RamHeader::decode(&bytes, page_size()));
    assert_eq!(refusal, Violation::Flags(0x40));
}

/// A hello, a SYNC, a device's packet, pages.
fn channel() -> Vec<u8> {
    let hello = Hello {
        uuid: [0; 16],
        id: 0,
    };
    let mut pages = ram(1, 0, 4096, 0).encode().to_vec();
    pages.resize(page_size().ram_header_len() + 4096, 0xaa);
    [
        &hello.encode()[..],
        &encode_sync(page_size(), 3),
        &encode_packet(&key(), 0, false, 5),
        b"bytes",
        &pages,
    ]
    .concat()
}

#[test]
fn a_channel_is_walked_to_its_last_byte() {
    let bytes = channel();
    let framer = Framer::new(Some(page_size()), DEFAULT_MAX_PACKET);
    let mut walk = Walk::new(&bytes, framer);
    let frames: Vec<_> = walk.by_ref().map(|frame| frame.expect("good")).collect();
    assert_eq!(walk.offset(), bytes.len());
    let offsets = [0, 64, 64 + 1344, 64 + 1344 + 293];
    assert!(frames.iter().map(|frame| frame.offset).eq(offsets));
    assert!(matches!(frames[0].frame, Frame::Hello(hello) if hello.id == 0));
    assert_eq!(frames[1].frame, Frame::Sync { packet_num: 3 });
    assert_eq!(frames[2].payload, b"bytes");
    assert_eq!(frames[3].frame, Frame::Ram(ram(1, 0, 4096, 0)));
    assert_eq!(frames[3].payload, [0xaa; 4096]);
}

#[test]
fn a_channel_ends_only_between_frames() {
    let bytes = channel();
    let framer = Framer::new(Some(page_size()), DEFAULT_MAX_PACKET);
    let ends = [64, 64 + 1344, 64 + 1344 + 293];
    for cut in 0..bytes.len() {
        let last = Walk::new(&bytes[..cut], framer.clone()).last();
        match last.expect("something, if only an error") {
            Ok(_) => assert!(ends.contains(&cut), "{cut}"),
            Err(error) => {
                assert!(!ends.contains(&cut), "{cut}");
                assert_eq!(refused::<()>(Err(error)), Violation::Truncated);
            }
        }
    }
}

#[test]
fn a_framer_asks_for_no_byte_that_is_not_the_frames() {
    let bytes = channel();
    let mut framer = Framer::new(Some(page_size()), DEFAULT_MAX_PACKET);
    let (mut at, mut have, mut asked) = (0, 0, Vec::new());
    while at < bytes.len() {
        match framer.decode(&bytes[at..at + have]).expect("good") {
            Step::More(need) => {
                assert!(need > have);
                asked.push(need);
                have = need;
            }
            Step::Frame {
                header_len,
                payload_len,
                ..
            } => {
                assert_eq!(header_len, have);
                at += header_len + payload_len as usize;
                have = 0;
            }
        }
    }
    assert_eq!(asked, [64, 12, 1344, 12, 276, 288, 12, 1344]);
    assert!(framer.end(0).is_ok() && framer.end(1).is_err());
}

#[test]
fn a_framer_needs_a_page_size_for_ram() {
    let bytes = channel();
    let mut walk = Walk::new(&bytes, Framer::new(None, DEFAULT_MAX_PACKET));
    assert!(walk.next().expect("the hello").is_ok());
    let refusal = refused(walk.next().expect("the SYNC"));
    assert_eq!(refusal, Violation::RamPacket);
    assert!(walk.next().is_none());
    assert_eq!(walk.offset(), 64);
}

#[test]
fn a_packet_without_room_for_its_header_is_refused_before_that_is_awaited() {
    let hello = Hello {
        uuid: [0; 16],
        id: 0,
    };
    let mut framer = Framer::new(None, DEFAULT_MAX_PACKET);
    assert!(framer.decode(&hello.encode()).is_ok());
    let refusal = refused(framer.decode(&DeviceStateHeader::encode(&key(), 11)));
    assert_eq!(refusal, Violation::PacketTooShort(11));
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..4096),
        max in any::<u32>(),
        flags in any::<u32>(),
        good in any::<[bool; 3]>(),
    ) {
        let mut bytes = bytes;
        // Most noise is no magic; noise behind good prefixes gets further.
        if good[0] && bytes.len() >= 64 {
            bytes.splice(..24, Hello { uuid: [0; 16], id: 0 }.encode()[..24].to_vec());
            if good[1] && bytes.len() >= 76 {
                bytes.splice(64..76, prefix(flags & 0x43));
            }
            if good[2] && bytes.len() >= 352 {
                bytes[64 + 12 + 255] = 0;
                bytes[64 + 12 + 260..64 + 12 + 262].fill(0);
            }
        }
        let framer = Framer::new(Some(page_size()), max);
        prop_assert!(Walk::new(&bytes, framer).count() <= 1 + bytes.len() / 64);
        let _ = config_body(&bytes);
        if let Some(bytes) = bytes.first_chunk() {
            let _ = Tag::decode(*bytes);
        }
    }

    #[test]
    fn a_hello_survives_the_wire(uuid in any::<[u8; 16]>(), id in any::<u8>()) {
        let hello = Hello { uuid, id };
        prop_assert_eq!(Hello::decode(&hello.encode()).unwrap(), hello);
    }

    #[test]
    fn a_device_packet_survives_the_wire(
        idstr in "[^\0]{1,60}",
        instance in any::<u32>(),
        index in 0..INVALID_INDEX,
        config in any::<bool>(),
        len in 0..=DEFAULT_MAX_PACKET - 12,
    ) {
        let id = DeviceId::new(idstr, instance).unwrap();
        let bytes = encode_packet(&DeviceKey::new(&id), index, config, len);
        let packet = DevicePacket::decode(&bytes, DEFAULT_MAX_PACKET).unwrap();
        prop_assert_eq!(packet.header.key().id(), Some(id));
        prop_assert_eq!(packet.packet, PacketHeader { index, config });
        prop_assert_eq!(packet.data_len, len);
        prop_assert_eq!(packet.header.len, len + 12);
    }

    #[test]
    fn a_ram_header_survives_the_wire(
        ramblock in "[^\0]{0,60}",
        page_bits in 12_u32..=19,
        normal in 0_u32..=128,
        zero in 0_u32..=128,
        packet_num in any::<u64>(),
    ) {
        let page_size = PageSize::new(1 << page_bits).unwrap();
        let normal_pages = normal.min(page_size.pages());
        let header = RamHeader {
            ramblock: ramblock.as_bytes(),
            packet_num,
            pages_alloc: page_size.pages(),
            zero_pages: zero.min(page_size.pages() - normal_pages),
            ..ram(normal_pages, 0, normal_pages * page_size.bytes(), 0)
        };
        let bytes = header.encode();
        prop_assert_eq!(RamHeader::decode(&bytes, page_size).unwrap(), header);
    }

    #[test]
    fn a_config_survives_its_tags(config in prop::collection::vec(any::<u8>(), 0..100)) {
        let data = wrap_config(&config);
        prop_assert_eq!(config_body(&data).unwrap(), &config[..]);
    }
}
