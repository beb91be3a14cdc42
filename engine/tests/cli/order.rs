//! The command's receive takes from its main channel only what a source may say, in the order in
//! which it may be said; what is refused names the device and the section id, on both sides.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream},
};

use vfio_migration::stream::{Command, Event, Reply, Section, SectionKind, Writer};

use crate::{
    command::{Directory, Running, listen, words},
    false_source::{config, device, packet},
};

fn receive(options: &str) -> (Running, String) {
    let first = words("receive --listen 127.0.0.1:0 --channels 1 --timeout 20");
    listen(first.into_iter().chain(words(options)))
}

/// What a source says on its main channel, out of words.
///
/// `S1a` is START of device `a` with section id 1 and the body that belongs there; `P`, `E` and `F`
/// are the other kinds. Behind the name `!` is another version, `~` a body that belongs elsewhere.
fn say(main: &mut Writer<TcpStream>, what: &str) {
    for word in words(what) {
        let event = match &*word {
            "switch" => Event::Command(Command::SwitchoverStart),
            "eof" => Event::Eof,
            "json" => Event::Description(b"{}".to_vec()),
            "garbage" => {
                main.body().write_all(b"and more").unwrap();
                continue;
            }
            _ => {
                say_section(main, &word);
                continue;
            }
        };
        main.write(&event).unwrap();
    }
}

fn say_section(main: &mut Writer<TcpStream>, word: &str) {
    let kind = match word.as_bytes()[0] {
        b'S' => SectionKind::Start,
        b'P' => SectionKind::Part,
        b'E' => SectionKind::End,
        _ => SectionKind::Full,
    };
    let (id, name) = (word[1..2].parse().unwrap(), &word[2..]);
    let section = Section {
        kind,
        id,
        owner: device(name.trim_end_matches(['!', '~'])),
        version: if name.ends_with('!') { 7 } else { 1 },
    };
    crate::false_source::section(main, section, |body| {
        if (kind == SectionKind::Start) != name.ends_with('~') {
            body.setup().unwrap();
        }
    });
}

/// One whole channel, with the device's only packet and its config.
fn channel(to: &str, devices: &[&str]) -> TcpStream {
    let mut channel = crate::false_source::channel(to, 0);
    for name in devices {
        packet(&mut channel, name, 0, b"state");
        config(&mut channel, name, 1);
    }
    channel
}

/// What the destination has said, until it said no more: the last reply, and all as text.
fn replies(main: &mut Writer<TcpStream>) -> (Option<Reply>, String) {
    let mut bytes = Vec::new();
    // A connection that was reset has said something before.
    let _reset = main.body().read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (mut rest, mut last) = (&bytes[..], None);
    while let Ok(Some(reply)) = Reply::read(&mut rest) {
        last = Some(reply);
    }
    (last, text)
}

#[test]
fn what_may_not_stand_there_is_refused_by_device_and_section_id() {
    for (said, parts) in [
        ("S1a S1a", &["device a", "START twice", "section id 1"][..]),
        (
            "S1a S3a",
            &["device a", "section id 3", "another section id"],
        ),
        ("S1a S1b", &["device b", "section id 1", "another"]),
        ("S1a!", &["device a", "section id 1", "version"]),
        ("S1a~", &["device a", "section id 1", "START without SETUP"]),
        ("S1a P1a~", &["device a", "section id 1", "PART with"]),
        ("S1a E1a F1a~", &["device a", "section id 1", "FULL with"]),
        (
            "S1a S2b switch E1a F1a!",
            &["device a", "section id 1", "version"],
        ),
        ("E1a", &["section id 1", "not been started"]),
        ("F1a", &["device a", "section id 1", "FULL before START"]),
        (
            "S1a S2b switch S1a",
            &["device a", "section id 1", "START after SWITCHOVER_START"],
        ),
        (
            "S1a S2b switch P2b",
            &["device b", "section id 2", "PART after SWITCHOVER_START"],
        ),
        (
            "S1a S2b switch E1a E1a",
            &["device a", "section id 1", "END twice"],
        ),
        (
            "S1a S2b switch E1a F1a E1a",
            &["device a", "section id 1", "END twice"],
        ),
        (
            "S1a S2b switch F2b",
            &["device b", "section id 2", "FULL before END"],
        ),
        (
            "S1a S2b switch E2b F2b F2b",
            &["device b", "section id 2", "FULL twice"],
        ),
        ("S1a S2b switch switch", &["a second time"]),
        (
            "S1a S2b E2b switch",
            &["device b", "after the device's END"],
        ),
        ("S1a switch", &["device b is on the destination"]),
        (
            "S1a S2b switch E1a F1a E2b eof",
            &["device b", "section id 2", "without the device's FULL"],
        ),
        (
            "S1a S2b switch E1a F1a eof",
            &["device b", "section id 2", "without the device's END"],
        ),
        (
            "S1a S2b switch eof",
            &["device a", "section id 1", "without the device's END"],
        ),
        (
            "S1a E1a F1a eof",
            &["device b", "without the device's START"],
        ),
        ("eof", &["device a", "without the device's START"]),
        (
            "S1a S2b E1a E2b F1a F2b eof",
            &["the switchover was never started"],
        ),
    ] {
        let directory = Directory::new();
        let path = directory.file("state");
        let options = format!("--device file:{path},id=a sim:id=b");
        let (receiving, to) = receive(&options);
        let mut main = Writer::open(TcpStream::connect(&to).unwrap()).unwrap();
        say(&mut main, said);
        let (last, text) = replies(&mut main);
        drop(main);
        let ended = receiving.end();
        let why = ended.why();
        for part in parts {
            assert!(why.contains(part), "{said}: {part}: {why}");
            assert!(text.contains(part), "{said}: {part}: {text}");
        }
        assert_eq!(last, Some(Reply::Shut(1)), "{said}");
        assert!(!std::fs::exists(&path).unwrap(), "{said}");
    }
}

/// A whole migration of two devices; what is said behind it, and whether the destination has it.
fn whole(behind: &str) -> (crate::command::Ended, Option<Reply>, bool) {
    let directory = Directory::new();
    let path = directory.file("state");
    let options = format!("--device file:{path},id=a file:{path}b,id=b");
    let (receiving, to) = receive(&options);
    let mut main = Writer::open(TcpStream::connect(&to).unwrap()).unwrap();
    say(&mut main, "S1a S2b P1a P2b switch E1a E2b F1a F2b eof");
    say(&mut main, behind);
    let channel = channel(&to, &["a", "b"]);
    channel.shutdown(Shutdown::Write).unwrap();
    let (last, _) = replies(&mut main);
    drop(main);
    let ended = receiving.end();
    let kept = std::fs::exists(&path).unwrap();
    (ended, last, kept)
}

#[test]
fn an_order_that_is_right_is_loaded() {
    let (ended, last, kept) = whole("json");
    assert_eq!(ended.status, Some(0), "{ended:?}");
    assert_eq!(last, Some(Reply::Shut(0)));
    assert!(kept);
}

#[test]
fn what_stands_behind_the_end_is_refused() {
    for (behind, what) in [
        ("garbage", "unexpected section type 0x61"),
        ("eof", "unexpected section type 0x00"),
        ("json garbage", "the main channel goes on behind its end"),
        ("json json", "the main channel goes on behind its end"),
    ] {
        let (ended, last, kept) = whole(behind);
        assert!(ended.why().contains(what), "{behind}: {ended:?}");
        assert_eq!(last, Some(Reply::Shut(1)), "{behind}");
        assert!(!kept, "{behind}");
    }
}
