use proptest::prelude::*;

use super::*;

/// A device that takes everything: what came, in order, and what to answer.
#[derive(Debug, Default)]
struct Device {
    data: Vec<u8>,
    largest_write: usize,
    config: Vec<u8>,
    config_len: usize,
    ack: bool,
    acks: u32,
    multifd: bool,
    tags: Vec<(Tag, u64)>,
    fails: bool,
}

impl SectionSink for Device {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if self.fails {
            return Err(Error::new(ErrorKind::Device, Phase::Load));
        }
        self.data.extend(bytes);
        self.largest_write = self.largest_write.max(bytes.len());
        Ok(())
    }

    fn config(&mut self, input: &mut dyn Read) -> Result<()> {
        self.config = vec![0; self.config_len];
        input
            .read_exact(&mut self.config)
            .map_err(|error| Error::new(ErrorKind::Device, Phase::Config).caused_by(error))
    }

    fn init_data_sent(&mut self) -> Result<bool> {
        self.acks += u32::from(self.ack);
        Ok(self.ack)
    }

    fn config_load_ready(&mut self) -> Result<bool> {
        Ok(std::mem::take(&mut self.multifd))
    }

    fn on_tag(&mut self, tag: Tag, data_len: u64) {
        self.tags.push((tag, data_len));
    }
}

fn written(write: impl FnOnce(&mut Writer<&mut Vec<u8>>) -> Result<()>) -> Vec<u8> {
    let mut bytes = Vec::new();
    write(&mut Writer::new(&mut bytes)).expect("a Vec takes everything");
    bytes
}

fn load(mut bytes: &[u8], device: &mut Device) -> Result<Piece> {
    let piece = load_state(&mut bytes, device)?;
    assert_eq!(bytes, b"", "a piece ends with its last tag");
    Ok(piece)
}

fn violation(error: &Error) -> Violation {
    match error.kind() {
        ErrorKind::Protocol(violation) => violation.clone(),
        kind => panic!("not the peer's fault: {kind:?}"),
    }
}

const fn tag(low: u8) -> [u8; 8] {
    [0xff, 0xff, 0xff, 0xff, 0xef, 0x10, 0, low]
}

#[test]
fn each_step_writes_its_row() {
    assert_eq!(
        written(|writer| {
            writer.setup()?;
            writer.end()
        }),
        [tag(3), tag(1)].concat()
    );
    assert_eq!(
        written(|writer| writer.iterate(b"abc", false)),
        [&tag(4)[..], &3_u64.to_be_bytes(), b"abc", &tag(1)].concat()
    );
    assert_eq!(
        written(|writer| writer.iterate(b"a", true)),
        [&tag(4)[..], &1_u64.to_be_bytes(), b"a", &tag(5)].concat()
    );
    assert_eq!(written(|writer| writer.iterate(b"", true)), tag(5));
    assert_eq!(written(|writer| writer.iterate(b"", false)), tag(1));
    assert_eq!(written(|writer| writer.dummy()), tag(1));
    assert_eq!(
        written(|writer| writer.config(b"xy")),
        [&tag(2)[..], b"xy", &tag(1)].concat()
    );
    assert_eq!(written(|writer| writer.config_load_ready()), tag(6));
}

#[test]
fn each_row_is_read() {
    let mut device = Device {
        config_len: 2,
        ack: true,
        multifd: true,
        ..Device::default()
    };
    let mut read = |bytes: Vec<u8>| {
        let piece = load(&bytes, &mut device).expect("a good piece");
        (piece.data_len, piece.end)
    };
    let setup = written(|writer| {
        writer.setup()?;
        writer.end()
    });
    assert_eq!(read(setup), (0, Tag::Setup));
    let first = written(|writer| writer.iterate(b"abc", true));
    assert_eq!(read(first), (3, Tag::InitDataSent));
    let complete = written(|writer| {
        writer.data_block(b"d")?;
        writer.data_block(b"")?;
        writer.data_block(&vec![b'e'; 3 * CHUNK + 1])?;
        writer.end()
    });
    assert_eq!(read(complete), (3 * CHUNK as u64 + 2, Tag::EndOfState));
    assert_eq!(
        read(written(|writer| writer.config_load_ready())),
        (0, Tag::ConfigLoadReady)
    );
    assert_eq!(
        read(written(|writer| writer.config(b"xy"))),
        (0, Tag::Config)
    );

    assert_eq!(device.data[..5], *b"abcde");
    assert_eq!(device.data.len(), 3 * CHUNK + 5);
    assert_eq!(device.largest_write, CHUNK);
    assert_eq!(device.config, b"xy");
    assert_eq!(device.acks, 1);
    assert_eq!(
        device.tags,
        [
            (Tag::Setup, 0),
            (Tag::Data, 3),
            (Tag::InitDataSent, 0),
            (Tag::Data, 1),
            (Tag::Data, 0),
            (Tag::Data, 3 * CHUNK as u64 + 1),
            (Tag::EndOfState, 0),
            (Tag::ConfigLoadReady, 0),
            (Tag::Config, 0),
        ]
    );
}

#[test]
fn a_tag_that_was_not_asked_for_is_refused() {
    for (low, value) in [(5, 0xffff_ffff_ef10_0005), (6, 0xffff_ffff_ef10_0006)] {
        let error = load(&tag(low), &mut Device::default()).expect_err("not asked for");
        assert_eq!(violation(&error), Violation::SectionTag(value));
        assert_eq!(error.phase(), Phase::Section);
    }
    let mut once = Device {
        multifd: true,
        ..Device::default()
    };
    assert!(load(&tag(6), &mut once).is_ok());
    assert!(load(&tag(6), &mut once).is_err());
}

#[test]
fn unknown_tags_and_a_setup_with_content_are_refused() {
    for low in [0, 7, 0xff] {
        let error = load(&tag(low), &mut Device::default()).expect_err("unknown");
        let value = u64::from_be_bytes(tag(low));
        assert_eq!(violation(&error), Violation::SectionTag(value));
    }
    let setup = [tag(3), tag(4), [0; 8], tag(1)].concat();
    let error = load(&setup, &mut Device::default()).expect_err("no END_OF_STATE");
    assert_eq!(
        violation(&error),
        Violation::SectionTag(0xffff_ffff_ef10_0004)
    );
}

#[test]
fn a_config_must_end_where_its_loader_stops() {
    let bytes = written(|writer| writer.config(b"xyz"));
    for config_len in [0, 2, 4, 11] {
        let mut device = Device {
            config_len,
            ..Device::default()
        };
        let error = load(&bytes, &mut device).expect_err("wrong length");
        // Past its end, the loader has eaten into the tag, and the channel ends too early.
        match violation(&error) {
            Violation::ConfigFraming(_) => assert!(config_len < 3),
            Violation::SectionTruncated { offset: 19 } => assert!(config_len > 3),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_huge_size_costs_nothing() {
    for size in [1 << 63, u64::MAX] {
        let mut bytes = [tag(4), size.to_be_bytes()].concat();
        bytes.extend(b"all there is");
        let mut device = Device::default();
        let error = load(&bytes, &mut device).expect_err("less than it says");
        let offset = 16 + 12;
        assert_eq!(violation(&error), Violation::SectionTruncated { offset });
        assert_eq!(device.data, b"all there is");
    }
}

#[test]
fn truncation_is_an_error_at_every_byte() {
    let pieces = [
        written(|writer| {
            writer.setup()?;
            writer.end()
        }),
        written(|writer| {
            writer.data_block(b"one")?;
            writer.data_block(b"")?;
            writer.iterate(b"two", true)
        }),
        written(|writer| writer.config(b"xy")),
        written(|writer| writer.config_load_ready()),
    ];
    for piece in &pieces {
        for cut in 0..piece.len() {
            let mut device = Device {
                config_len: 2,
                ack: true,
                multifd: true,
                ..Device::default()
            };
            let error = load(&piece[..cut], &mut device).expect_err("cut short");
            let offset = cut as u64;
            assert_eq!(violation(&error), Violation::SectionTruncated { offset });
        }
    }
}

#[test]
fn the_devices_error_and_the_inputs_are_told_apart() {
    let bytes = written(|writer| writer.iterate(b"abc", false));
    let mut device = Device {
        fails: true,
        ..Device::default()
    };
    let error = load(&bytes, &mut device).expect_err("the device refuses");
    assert_eq!(
        (error.kind(), error.phase()),
        (&ErrorKind::Device, Phase::Load)
    );

    /// Interrupts before each byte, and fails at the end.
    struct Faulty<'a>(&'a [u8], bool);
    impl Read for Faulty<'_> {
        fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
            self.1 = !self.1;
            if self.1 {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let len = bytes.len().min(1);
            match self.0.read(&mut bytes[..len])? {
                0 => Err(io::Error::from_raw_os_error(104)),
                count => Ok(count),
            }
        }
    }
    let mut device = Device::default();
    assert!(load_state(&mut Faulty(&bytes, false), &mut device).is_ok());
    assert_eq!(device.data, b"abc");
    for cut in [3, 17] {
        let mut input = Faulty(&bytes[..cut], false);
        let error = load_state(&mut input, &mut device).expect_err("the connection fails");
        assert_eq!(error.kind(), &ErrorKind::Channel);
        assert_eq!(
            (error.phase(), error.raw_os_error()),
            (Phase::Section, Some(104))
        );
    }

    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::Error::from_raw_os_error(32))
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let error = Writer::new(Full).end().expect_err("the connection fails");
    assert_eq!(
        (error.kind(), error.raw_os_error()),
        (&ErrorKind::Channel, Some(32))
    );
}

proptest! {
    #[test]
    fn arbitrary_tags_and_bytes_never_panic(
        words in prop::collection::vec((0_u8..9, any::<u64>()), 0..40),
        tail in prop::collection::vec(any::<u8>(), 0..9),
        (ack, multifd) in any::<(bool, bool)>(),
        config_len in 0_usize..40,
    ) {
        let mut bytes = Vec::new();
        for (low, word) in words {
            match low {
                8 => bytes.extend(word.to_be_bytes()),
                0 => bytes.extend((word % 40).to_be_bytes()),
                low => bytes.extend(tag(low)),
            }
        }
        bytes.extend(tail);
        let mut device = Device { ack, multifd, config_len, ..Device::default() };
        let mut rest = &bytes[..];
        if let Ok(piece) = load_state(&mut rest, &mut device) {
            prop_assert_eq!(piece.data_len, device.data.len() as u64);
        }
    }

    #[test]
    fn a_piece_survives_the_channel(
        blocks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..5),
        last in any::<bool>(),
    ) {
        let bytes = written(|writer| {
            blocks.iter().try_for_each(|block| writer.data_block(block))?;
            writer.iterate(b"", last)
        });
        let mut device = Device { ack: true, ..Device::default() };
        let piece = load(&bytes, &mut device).unwrap();
        prop_assert_eq!(piece.end, if last { Tag::InitDataSent } else { Tag::EndOfState });
        prop_assert_eq!(device.data, blocks.concat());
    }
}
