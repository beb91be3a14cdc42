//! Every header, from any bytes: what decodes is what would be encoded, what does not says why, and
//! it makes no difference in how many pieces the bytes come.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vfio_migration::wire::{
    self, DEVICE_PACKET_LEN, DEVICE_STATE_HEADER_LEN, DeviceKey, DevicePacket, DeviceStateHeader,
    Frame, Framer, HELLO_LEN, Hello, Kind, PACKET_HEADER_LEN, PREFIX_LEN, PacketHeader, PageSize,
    RamHeader, Step, Tag, Walk,
};

const MAX_PACKET: u32 = 12 + (1 << 20);

fn headers(bytes: &[u8], page_size: PageSize) {
    if let Some(first) = bytes.first_chunk::<HELLO_LEN>()
        && let Ok(hello) = Hello::decode(first)
    {
        assert_eq!(Hello::decode(&hello.encode()).ok(), Some(hello));
        assert_eq!(hello.encode()[..25], first[..25]);
        let _checked = hello.check(&[0; 16], 2);
    }
    if let Some(first) = bytes.first_chunk::<PREFIX_LEN>()
        && let Ok(kind) = Kind::decode(first)
    {
        assert_eq!(kind.encode(), *first);
    }
    if let Some(first) = bytes.first_chunk::<PACKET_HEADER_LEN>()
        && let Ok(header) = PacketHeader::decode(first)
    {
        assert_eq!(header.encode(), *first);
        assert_ne!(header.index, wire::INVALID_INDEX);
    }
    if let Some(first) = bytes.first_chunk::<DEVICE_STATE_HEADER_LEN>()
        && let Ok(header) = DeviceStateHeader::decode(first, MAX_PACKET)
    {
        assert!(header.len > 0 && header.len <= MAX_PACKET);
        assert!(header.idstr.len() < 256);
        let key = header.key();
        // What stands behind the name's end is not kept.
        let again = DeviceStateHeader::encode(&key, header.len);
        assert_eq!(
            DeviceStateHeader::decode(&again, MAX_PACKET).ok(),
            Some(header)
        );
        assert_eq!(DeviceKey::decode(key.as_bytes()).ok(), Some(key));
        assert_eq!(header.data_len().is_ok(), header.len >= 12);
        let _printable = key.unknown().to_string();
        if let Some(id) = key.id() {
            assert_eq!(DeviceKey::new(&id), key);
        }
    }
    if let Some(first) = bytes.first_chunk::<DEVICE_PACKET_LEN>()
        && let Ok(packet) = DevicePacket::decode(first, MAX_PACKET)
    {
        let DevicePacket {
            header,
            packet,
            data_len,
        } = packet;
        let again = wire::encode_packet(&header.key(), packet.index, packet.config, data_len);
        let decoded = DevicePacket::decode(&again, MAX_PACKET).expect("it was good before");
        assert_eq!((decoded.header, decoded.packet), (header, packet));
    }
    if let Some(first) = bytes.first_chunk()
        && let Ok(ram) = RamHeader::decode(first, page_size)
    {
        assert!(ram.next_packet_size <= 2 * wire::RAM_BYTES_PER_PACKET);
        let again = ram.encode();
        assert_eq!(RamHeader::decode(&again, page_size).ok(), Some(ram));
    }
    if let Some(first) = bytes.first_chunk()
        && let Some(tag) = Tag::decode(*first)
    {
        assert_eq!(tag.encode(), *first);
    }
    if let Ok(body) = wire::config_body(bytes) {
        assert_eq!(wire::wrap_config(body), bytes);
    }
}

/// The next step, asked for byte by byte as from a slow connection.
fn slowly<'a>(framer: &mut Framer, bytes: &'a [u8]) -> Result<Option<Step<'a>>, String> {
    let mut have = 0;
    loop {
        match framer
            .decode(&bytes[..have])
            .map_err(|error| error.to_string())?
        {
            Step::More(need) => {
                assert!(need > have, "it asks for what it has");
                if need > bytes.len() {
                    return Ok(None);
                }
                have = need;
            }
            frame => return Ok(Some(frame)),
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((&choice, bytes)) = input.split_first() else {
        return;
    };
    let page_size = PageSize::new(4096 << (choice & 7)).expect("a page size");
    headers(bytes, page_size);

    let ram = (choice & 8 == 0).then_some(page_size);
    let framer = Framer::new(ram, MAX_PACKET);
    let mut walk = Walk::new(bytes, framer.clone());
    let mut slow = framer;
    let mut offset = 0;
    loop {
        let rest = &bytes[offset..];
        let located = walk.next();
        let slowly = slowly(&mut slow, rest);
        match located {
            Some(Ok(located)) => {
                assert_eq!(located.offset, offset);
                let Ok(Some(Step::Frame {
                    frame,
                    header_len,
                    payload_len,
                })) = slowly
                else {
                    panic!("a frame at once, and not in pieces: {slowly:?}");
                };
                assert_eq!(frame, located.frame);
                assert_eq!(located.header.len(), header_len);
                assert_eq!(located.payload.len(), payload_len as usize);
                if let Frame::DeviceState(packet) = frame {
                    assert_eq!(packet.data_len, payload_len);
                    assert!(payload_len <= MAX_PACKET);
                }
                offset += header_len + payload_len as usize;
                assert_eq!(walk.offset(), offset);
            }
            Some(Err(error)) => {
                assert!(!error.to_string().is_empty());
                match slowly {
                    Ok(Some(Step::Frame {
                        header_len,
                        payload_len,
                        ..
                    })) => {
                        assert!(header_len + payload_len as usize > rest.len(), "{error}");
                    }
                    Ok(Some(Step::More(_))) => unreachable!("it goes on until there is no more"),
                    Ok(None) => {}
                    Err(other) => assert_eq!(other, error.to_string()),
                }
                assert!(walk.next().is_none(), "nothing comes behind an error");
                break;
            }
            None => {
                assert_eq!(offset, bytes.len());
                break;
            }
        }
    }
});
