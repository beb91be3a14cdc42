use proptest::prelude::*;

use super::*;
use crate::error::ErrorKind;

fn owner(idstr: &str) -> DeviceId {
    DeviceId::new(idstr, 0).expect("a good name")
}

fn section(kind: SectionKind, id: u32, idstr: &str) -> Event {
    Event::Section(Section {
        kind,
        id,
        owner: owner(idstr),
        version: 1,
    })
}

fn events() -> Vec<Event> {
    vec![
        Event::Configuration {
            name: "pc-q35-10.0".into(),
        },
        Event::Command(Command::OpenReturnPath),
        Event::Command(Command::Ping(1)),
        section(SectionKind::Start, 37, "0000:00:03.0/vfio"),
        section(SectionKind::Part, 37, "0000:00:03.0/vfio"),
        Event::Command(Command::Other {
            command: 9,
            payload: vec![1, 2, 3],
        }),
        Event::Command(Command::SwitchoverStart),
        section(SectionKind::End, 37, "0000:00:03.0/vfio"),
        section(SectionKind::Full, 37, "0000:00:03.0/vfio"),
        Event::Eof,
        Event::Description(b"{}".to_vec()),
    ]
}

/// Every section has the body "body".
fn written(events: &[Event]) -> Vec<u8> {
    let mut writer = Writer::open(Vec::new()).expect("a Vec takes everything");
    for event in events {
        writer.write(event).expect("within every bound");
        if let Event::Section(section) = event {
            writer.body().extend(b"body");
            writer.footer(section.id).expect("a Vec takes everything");
        }
    }
    writer.into_inner()
}

/// Reads events up to the last that the channel can have, and says how many bytes that took.
fn read_events(bytes: &[u8]) -> Result<(Vec<Event>, u64)> {
    let mut reader = Reader::open(bytes)?;
    let mut events = Vec::new();
    while let Some(event) = reader.next_event()? {
        if matches!(event, Event::Section(_)) {
            let mut body = [0; 4];
            reader
                .body()?
                .read_exact(&mut body)
                .map_err(|_| broken(Violation::SectionTruncated { offset: 0 }))?;
            reader.footer()?;
        }
        events.push(event);
    }
    Ok((events, reader.offset()))
}

fn read(bytes: &[u8]) -> Result<Vec<Event>> {
    let (events, offset) = read_events(bytes)?;
    assert_eq!(offset, bytes.len() as u64);
    Ok(events)
}

#[track_caller]
fn violation<T>(result: Result<T>) -> Violation {
    let error = result.err().expect("should be refused");
    assert_eq!(error.phase(), Phase::Section);
    match error.kind() {
        ErrorKind::Protocol(violation) => violation.clone(),
        kind => panic!("not the peer's fault: {kind:?}"),
    }
}

#[test]
fn events_are_laid_out_as_on_the_wire() {
    let bytes = written(&events());
    let mut expected = b"QEVM\0\0\0\x03".to_vec();
    expected.extend(b"\x07\0\0\0\x0bpc-q35-10.0");
    expected.extend(b"\x08\0\x01\0\0");
    expected.extend(b"\x08\0\x02\0\x04\0\0\0\x01");
    expected.extend(b"\x01\0\0\0\x25\x110000:00:03.0/vfio\0\0\0\0\0\0\0\x01body\x7e\0\0\0\x25");
    expected.extend(b"\x02\0\0\0\x25body\x7e\0\0\0\x25");
    expected.extend(b"\x08\0\x09\0\x03\x01\x02\x03");
    expected.extend(b"\x08\0\x0b\0\0");
    expected.extend(b"\x03\0\0\0\x25body\x7e\0\0\0\x25");
    expected.extend(b"\x04\0\0\0\x25\x110000:00:03.0/vfio\0\0\0\0\0\0\0\x01body\x7e\0\0\0\x25");
    expected.extend(b"\0\x06\0\0\0\x02{}");
    assert_eq!(bytes, expected);
    assert_eq!(read(&bytes).expect("what was written"), events());
}

#[test]
fn truncation_is_an_error_at_every_byte_but_before_the_description() {
    let events = events();
    let bytes = written(&events);
    let eof = written(&events[..events.len() - 1]).len();
    for cut in 0..bytes.len() {
        let result = read(&bytes[..cut]);
        if cut == eof {
            // A source may leave the description out.
            assert_eq!(result.expect("whole").last(), Some(&Event::Eof));
            continue;
        }
        match violation(result) {
            Violation::SectionTruncated { offset } => {
                assert!(offset == cut as u64 || offset == 0, "{offset} {cut}");
            }
            other => panic!("{other:?}"),
        }
    }
}

fn after_header(rest: &[u8]) -> Result<Vec<Event>> {
    read(&[b"QEVM\0\0\0\x03", rest].concat())
}

#[test]
fn broken_framing_is_refused() {
    let section = |result| assert!(matches!(violation(result), Violation::Section(_)));
    let named = |result, id| match violation(result) {
        Violation::SectionOrder { section, .. } => assert_eq!(section, id),
        other => panic!("without its section id: {other:?}"),
    };
    section(read(b"QEVN\0\0\0\x03"));
    section(read(b"QEVM\0\0\0\x02"));
    // Lengths far beyond what follows.
    section(after_header(b"\x07\0\0\x01\0"));
    section(after_header(b"\x07\xff\xff\xff\xff"));
    section(after_header(b"\x07\0\0\0\x01\xff"));
    section(after_header(b"\0\x06\0\x10\0\x01"));
    section(after_header(b"\0\x06\xff\xff\xff\xff"));
    // Commands whose payload is not theirs.
    section(after_header(b"\x08\0\x01\0\x01\0"));
    section(after_header(b"\x08\0\x02\0\0"));
    section(after_header(b"\x08\0\x0b\0\x01\0"));
    // A part of nothing, an owner without a name or with a bad one.
    named(after_header(b"\x02\0\0\0\x25body\x7e\0\0\0\x25"), 0x25);
    section(after_header(b"\x01\0\0\0\x25\0\0\0\0\0\0\0\0\x01"));
    section(after_header(b"\x01\0\0\0\x25\x01\xff\0\0\0\0\0\0\0\x01"));
    section(after_header(b"\x01\0\0\0\x25\x01\0\0\0\0\0\0\0\0\x01"));
    // Footers: none, and another's.
    for footer in [b"\x7d\0\0\0\x25", b"\x7e\0\0\0\x26"] {
        let section = b"\x01\0\0\0\x25\x01a\0\0\0\0\0\0\0\x01body";
        let result = after_header(&[&section[..], footer].concat());
        assert_eq!(result.as_ref().unwrap_err().device(), Some(&owner("a")));
        named(result, 0x25);
    }

    for kind in [0x05, 0x06, 0x09, 0x7e, 0xff] {
        let refusal = violation(after_header(&[kind, 0, 0, 0, 0]));
        assert_eq!(refusal, Violation::SectionType(kind));
    }
    // A configuration comes first or not at all; behind the end only a description.
    let refusal = violation(after_header(b"\x08\0\x01\0\0\x07\0\0\0\0"));
    assert_eq!(refusal, Violation::SectionType(0x07));
    let refusal = violation(after_header(b"\0\0"));
    assert_eq!(refusal, Violation::SectionType(0));
}

#[test]
fn an_error_says_once_where_it_is() {
    for bytes in [&b"QEVN\0\0\0\x03"[..], b"QEVM\0\0\0\x03\x08\0\x01\0\x01\0"] {
        let text = read(bytes).expect_err("broken").to_string();
        assert_eq!(text.matches("section").count(), 1, "{text}");
    }
    for phase in [Phase::Section, Phase::Config] {
        let error = broken(Violation::ConfigFraming("no END_OF_STATE")).in_phase(phase);
        assert!(!error.to_string().contains(": config:"), "{error}");
        assert!(!error.to_string().contains("config: config"), "{error}");
    }
}

#[test]
fn an_id_has_one_owner_and_there_are_so_many() {
    let twice = [
        section(SectionKind::Start, 1, "a"),
        section(SectionKind::Full, 1, "b"),
    ];
    let error = read(&written(&twice)).expect_err("two owners");
    assert_eq!(error.device(), Some(&owner("b")));

    let most = u32::try_from(MAX_SECTIONS).expect("4096");
    let mut many: Vec<_> = (0..most)
        .map(|id| section(SectionKind::Full, id, "a"))
        .collect();
    many.push(section(SectionKind::Full, 0, "a"));
    many.push(Event::Eof);
    assert!(read(&written(&many)).is_ok());
    many.insert(0, section(SectionKind::Full, most, "a"));
    assert!(matches!(
        violation(read(&written(&many))),
        Violation::Section(_)
    ));
}

#[test]
fn the_caller_reads_body_and_footer_in_turn() {
    let misused = |error: Error| assert!(matches!(error.kind(), ErrorKind::Misuse(_)));
    let bytes = written(&[section(SectionKind::Start, 1, "a"), Event::Eof]);
    let mut reader = Reader::open(&bytes[..]).expect("a good header");
    misused(reader.body().err().expect("no section yet"));
    misused(reader.footer().expect_err("no section yet"));
    assert!(reader.next_event().is_ok());
    misused(reader.next_event().expect_err("the body is next"));
    assert!(reader.body().is_ok());
}

#[test]
fn what_no_reader_accepts_is_not_written() {
    let mut writer = Writer::open(Vec::new()).expect("a Vec takes everything");
    let too_long = [
        Event::Configuration {
            name: "x".repeat(256),
        },
        Event::Command(Command::Other {
            command: 9,
            payload: vec![0; 1 << 16],
        }),
        Event::Description(vec![b' '; (1 << 20) + 1]),
    ];
    for event in &too_long {
        let error = writer.write(event).expect_err("too long");
        assert!(matches!(error.kind(), ErrorKind::Misuse(_)));
    }
    assert_eq!(writer.into_inner().len(), 8);
}

#[test]
fn replies_are_laid_out_as_on_the_wire() {
    // The whole return path of a recorded migration.
    let path = *b"\0\x02\0\x04\0\0\0\x01\0\x07\0\0\0\x01\0\x04\0\0\0\0";
    let replies = [Reply::Pong(1), Reply::SwitchoverAck, Reply::Shut(0)];
    let mut bytes = Vec::new();
    for reply in &replies {
        reply.write(&mut bytes).expect("a Vec takes everything");
    }
    assert_eq!(bytes, path);

    for cut in 0..=path.len() {
        let mut rest = &path[..cut];
        let mut count = 0;
        let result = loop {
            match Reply::read(&mut rest) {
                Ok(Some(reply)) => assert_eq!(reply, replies[count]),
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
            count += 1;
        };
        assert_eq!(result.is_ok(), [0, 8, 12, 20].contains(&cut), "{cut}");
        if let Err(error) = result {
            let refusal = violation::<()>(Err(error));
            assert!(matches!(refusal, Violation::SectionTruncated { .. }));
        }
    }
    for bad in [&b"\0\x07\0\x01\0"[..], b"\0\x02\0\0", b"\0\x01\0\x02\0\0"] {
        let refusal = violation(Reply::read(&mut &*bad));
        assert!(matches!(refusal, Violation::Section(_)));
    }
    let mut unwritable = Vec::new();
    let other = Reply::Other {
        kind: 3,
        payload: vec![0; 1 << 16],
    };
    assert!(other.write(&mut unwritable).is_err() && unwritable.is_empty());
}

fn any_event() -> impl Strategy<Value = Event> {
    let payload = || prop::collection::vec(any::<u8>(), 0..50);
    prop_oneof![
        Just(Event::Command(Command::OpenReturnPath)),
        Just(Event::Command(Command::SwitchoverStart)),
        any::<u32>().prop_map(|value| Event::Command(Command::Ping(value))),
        (12_u16.., payload())
            .prop_map(|(command, payload)| Event::Command(Command::Other { command, payload })),
        ("[^\0]{1,60}", any::<u32>(), any::<u32>(), any::<bool>()).prop_map(
            |(idstr, instance, version, full)| {
                Event::Section(Section {
                    kind: if full {
                        SectionKind::Full
                    } else {
                        SectionKind::Start
                    },
                    id: version ^ instance,
                    owner: DeviceId::new(idstr, instance).expect("a good name"),
                    version,
                })
            }
        ),
    ]
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = read_events(&bytes);
        let _ = read_events(&[b"QEVM\0\0\0\x03", &bytes[..]].concat());
        let _ = Reply::read(&mut &bytes[..]);
    }

    #[test]
    fn a_changed_byte_never_panics(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = written(&events());
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let _ = read_events(&bytes);
    }

    #[test]
    fn events_survive_the_channel(
        name in "[a-z0-9.-]{0,40}",
        mut events in prop::collection::vec(any_event(), 0..10),
        json in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        events.insert(0, Event::Configuration { name });
        events.push(Event::Eof);
        events.push(Event::Description(json));
        prop_assert_eq!(read(&written(&events)).unwrap(), events);
    }

    #[test]
    fn replies_survive_the_path(
        kind in 8_u16..,
        payload in prop::collection::vec(any::<u8>(), 0..50),
        value in any::<u32>(),
    ) {
        let replies = [Reply::Other { kind, payload }, Reply::Shut(value), Reply::Pong(value)];
        for reply in replies {
            let mut bytes = Vec::new();
            reply.write(&mut bytes).unwrap();
            prop_assert_eq!(Reply::read(&mut &bytes[..]).unwrap(), Some(reply));
        }
    }
}
