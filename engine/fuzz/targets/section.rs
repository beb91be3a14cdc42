//! The main channel and the return path, from any bytes: nothing is read beyond an event, no more
//! is kept than has come, and what was read can be written again.
#![no_main]

use std::io::{self, Read};

use libfuzzer_sys::fuzz_target;
use vfio_migration::{
    Error, ErrorKind, Phase, Result,
    section::{self, SectionSink, Tag, load_state},
    stream::{self, Event, Reader, Reply},
};
use vfio_migration_fuzz::input::Input;

/// An input in pieces of any size, with interruptions.
struct Pieces<'a> {
    rest: &'a [u8],
    seed: u8,
}

impl Read for Pieces<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.seed = self.seed.wrapping_mul(5).wrapping_add(17);
        if self.seed.is_multiple_of(11) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let most = usize::from(self.seed) + 1;
        let len = bytes.len().min(most);
        self.rest.read(&mut bytes[..len])
    }
}

/// A device that keeps what it is given, and says no where it is told to.
struct Sink {
    data: Vec<u8>,
    tags: Vec<(Tag, u64)>,
    config_len: usize,
    config: Vec<u8>,
    wanted: u8,
    room: usize,
}

impl Sink {
    fn new(input: &mut Input<'_>) -> Self {
        Self {
            data: Vec::new(),
            tags: Vec::new(),
            config_len: input.below(40),
            config: Vec::new(),
            wanted: input.byte(),
            room: input.one_of(&[usize::MAX, 0, 100]),
        }
    }
}

impl SectionSink for Sink {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        assert!(!bytes.is_empty() && bytes.len() <= section::CHUNK);
        if self.data.len() + bytes.len() > self.room {
            return Err(Error::new(ErrorKind::Device, Phase::Section));
        }
        self.data.extend(bytes);
        Ok(())
    }

    fn config(&mut self, input: &mut dyn Read) -> Result<()> {
        let mut config = vec![0; self.config_len];
        input
            .read_exact(&mut config)
            .map_err(|error| Error::new(ErrorKind::Device, Phase::Section).caused_by(error))?;
        self.config = config;
        Ok(())
    }

    fn init_data_sent(&mut self) -> Result<bool> {
        Ok(self.wanted & 1 != 0)
    }

    fn config_load_ready(&mut self) -> Result<bool> {
        self.wanted ^= 2;
        Ok(self.wanted & 2 == 0)
    }

    fn on_tag(&mut self, tag: Tag, data_len: u64) {
        self.tags.push((tag, data_len));
    }
}

/// What a part was made of, written again.
fn rewrite(sink: &Sink, end: Tag) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = section::Writer::new(&mut bytes);
    let mut data = &sink.data[..];
    for &(tag, len) in &sink.tags {
        if tag == Tag::Data {
            let (block, rest) = data.split_at(usize::try_from(len).expect("it has come"));
            data = rest;
            writer.data_block(block).expect("memory");
        }
    }
    match end {
        Tag::Setup => {
            writer.setup().expect("memory");
            writer.end().expect("memory");
        }
        Tag::Config => writer.config(&sink.config).expect("memory"),
        Tag::InitDataSent => writer.iterate(&[], true).expect("memory"),
        Tag::ConfigLoadReady => writer.config_load_ready().expect("memory"),
        Tag::EndOfState => writer.end().expect("memory"),
        _ => unreachable!("no part ends with it"),
    }
    bytes
}

/// One part. Returns whether it was good.
fn part(input: &mut dyn Read, offset: impl Fn() -> Vec<u8>, sink: &mut Sink) -> bool {
    let piece = load_state(input, sink);
    let read = offset();
    assert!(sink.data.len() + sink.config.len() <= read.len());
    match piece {
        Ok(piece) => {
            assert_eq!(piece.data_len, sink.data.len() as u64);
            assert_eq!(
                rewrite(sink, piece.end),
                read,
                "a part, and not a byte more"
            );
            true
        }
        Err(error) => {
            assert_eq!(error.phase(), Phase::Section);
            false
        }
    }
}

/// Counts what passes.
struct Copying<'a> {
    inner: &'a mut dyn Read,
    passed: &'a std::cell::RefCell<Vec<u8>>,
}

impl Read for Copying<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(bytes)?;
        self.passed.borrow_mut().extend(&bytes[..count]);
        Ok(count)
    }
}

fn main_channel(input: &mut Input<'_>) {
    let seed = input.byte();
    // The same for every section.
    let choices = [input.byte(), input.byte(), input.byte()];
    let bytes = input.rest();
    let pieces = Pieces { rest: bytes, seed };
    let Ok(mut reader) = Reader::open(pieces) else {
        return;
    };
    let mut again = stream::Writer::open(Vec::new()).expect("memory");
    loop {
        let before = reader.offset();
        match reader.next_event() {
            Ok(Some(Event::Section(section))) => {
                again
                    .write(&Event::Section(section.clone()))
                    .expect("it was read");
                assert!(reader.next_event().is_err(), "the body comes first");
                let mut sink = Sink::new(&mut Input::new(&choices));
                let passed = std::cell::RefCell::new(Vec::new());
                let body = reader.body().expect("a section has one");
                let mut copying = Copying {
                    inner: body,
                    passed: &passed,
                };
                if !part(&mut copying, || passed.borrow().clone(), &mut sink) {
                    break;
                }
                again.body().extend(passed.borrow().iter());
                if reader.footer().is_err() {
                    break;
                }
                again.footer(section.id).expect("memory");
            }
            Ok(Some(event)) => again.write(&event).expect("it was read"),
            Ok(None) => {
                assert_eq!(reader.offset(), before);
                assert!(matches!(reader.next_event(), Ok(None)));
                break;
            }
            Err(error) => {
                assert_eq!(error.phase(), Phase::Section);
                assert!(!error.to_string().is_empty());
                break;
            }
        }
        assert!(reader.offset() > before && reader.offset() <= bytes.len() as u64);
        let written = again.body().len();
        assert_eq!(
            again.body()[..],
            bytes[..written],
            "what was read can be written again"
        );
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    match input.below(3) {
        0 => {
            let seed = input.byte();
            let mut sink = Sink::new(&mut input);
            let passed = std::cell::RefCell::new(Vec::new());
            let mut pieces = Pieces {
                rest: input.rest(),
                seed,
            };
            let mut copying = Copying {
                inner: &mut pieces,
                passed: &passed,
            };
            part(&mut copying, || passed.borrow().clone(), &mut sink);
        }
        1 => {
            let seed = input.byte();
            let mut pieces = Pieces {
                rest: input.rest(),
                seed,
            };
            let mut again = Vec::new();
            while let Ok(Some(reply)) = Reply::read(&mut pieces) {
                reply.write(&mut again).expect("memory");
                assert_eq!(input.rest()[..again.len()], again[..]);
            }
        }
        _ => main_channel(&mut input),
    }
});
