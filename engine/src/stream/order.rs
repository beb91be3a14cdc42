//! The order of the main channel: where a device's sections, and the switchover's start, may stand.
//!
//! | event | may stand | its body |
//! |---|---|---|
//! | START | once for each device, before SWITCHOVER_START | SETUP, no data |
//! | PART | after the device's START, before its END and SWITCHOVER_START | data |
//! | SWITCHOVER_START | once, after every START, before every END; not at all where the peer sends none | |
//! | END | once, after the device's START | data |
//! | FULL | once, after the device's END | the config, or the word that it may be loaded; no data |
//! | EOF | after every device's FULL | |
//!
//! All sections of a device have one section id and version 1. A VMM's other devices have rules of
//! their own, and their sections pass here unseen.
//!
//! [`Reader`](super::Reader) knows the framing, [`load_state`](crate::section::load_state) a body;
//! neither knows what came before. [`MainChannelOrder`] does: it holds an entry for each device and
//! nothing else, reads nothing, and never waits.

use super::{Event, Section, SectionKind};
use crate::{
    error::{Error, Result, Violation},
    id::DeviceId,
    section::{Piece, Tag, broken},
    stream::Command,
};

/// The one version of a VFIO device's sections.
pub(super) const VERSION: u32 = 1;

/// How far a device's sections have come.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Stage {
    Nothing,
    Started,
    Ended,
    Full,
}

#[derive(Debug)]
struct Progress {
    device: DeviceId,
    stage: Stage,
    /// Its section id, once START has named it.
    section: Option<u32>,
}

/// Checks that a source's main channel keeps the order in which a migration's sections stand.
///
/// The thread that reads the main channel owns it, and hands it every event before it acts on it,
/// and every body's piece when the body has been loaded.
///
/// ```
/// use vfio_migration::{
///     DeviceId,
///     stream::{Event, MainChannelOrder, Section, SectionKind},
/// };
///
/// let id = DeviceId::new("0000:00:03.0/vfio", 0)?;
/// let mut order = MainChannelOrder::new([id.clone()]);
/// let section = |kind| {
///     let owner = id.clone();
///     Event::Section(Section { kind, id: 37, owner, version: 1 })
/// };
/// order.event(&section(SectionKind::Start))?;
/// let error = order.event(&section(SectionKind::Start)).unwrap_err();
/// assert_eq!(error.to_string(), "section, device 0000:00:03.0/vfio: START twice, section id 37");
/// # Ok::<(), vfio_migration::Error>(())
/// ```
#[derive(Debug)]
pub struct MainChannelOrder {
    devices: Vec<Progress>,
    switched: bool,
}

impl MainChannelOrder {
    /// Before the first event. `devices` are all of the VM's devices whose sections are checked.
    pub fn new(devices: impl IntoIterator<Item = DeviceId>) -> Self {
        let devices = devices.into_iter().map(|device| Progress {
            device,
            stage: Stage::Nothing,
            section: None,
        });
        Self {
            devices: devices.collect(),
            switched: false,
        }
    }

    /// Takes note of an event. An event that is refused changes nothing.
    ///
    /// # Errors
    ///
    /// [`Violation::SectionOrder`] with the device and the section id, for a section that may not
    /// stand here; [`Violation::Section`] with the device where it is one, for a switchover's start
    /// or an end that may not.
    pub fn event(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::Section(section) => self.section(section),
            Event::Command(Command::SwitchoverStart) => self.switchover_start(),
            Event::Eof => self.end(),
            _ => Ok(()),
        }
    }

    /// Takes note of what a section's body held.
    ///
    /// # Errors
    ///
    /// [`Violation::SectionOrder`] with the device and the section id, where such a section's body
    /// ends with another tag, or holds no data.
    pub fn body(&self, section: &Section, piece: &Piece) -> Result<()> {
        if !self.devices.iter().any(|it| it.device == section.owner) {
            return Ok(());
        }
        let (fits, what) = match section.kind {
            SectionKind::Start => (
                matches!(piece.end, Tag::Setup | Tag::SetupOverChannels),
                "START without SETUP",
            ),
            SectionKind::Part => (
                matches!(piece.end, Tag::EndOfState | Tag::InitDataSent),
                "PART with what belongs in START or FULL",
            ),
            SectionKind::End => (
                piece.end == Tag::EndOfState,
                "END with what belongs in another section",
            ),
            SectionKind::Full => (
                matches!(
                    piece.end,
                    Tag::EndOfState | Tag::Config | Tag::ConfigLoadReady
                ),
                "FULL with what belongs in another section",
            ),
        };
        let has_data = matches!(section.kind, SectionKind::Part | SectionKind::End);
        if !fits {
            Err(refuse(section, what))
        } else if piece.data_len > 0 && !has_data {
            Err(refuse(section, "data outside PART and END"))
        } else {
            Ok(())
        }
    }

    fn section(&mut self, section: &Section) -> Result<()> {
        let switched = self.switched;
        let shared = |it: &Progress| it.device != section.owner && it.section == Some(section.id);
        let shared = self.devices.iter().any(shared);
        let found = self.devices.iter_mut();
        let Some(known) = { found }.find(|it| it.device == section.owner) else {
            return Ok(());
        };
        let refused = match (section.kind, known.stage) {
            _ if section.version != VERSION => Some("a version that is not 1"),
            _ if shared => Some("another device has this section id"),
            _ if known.section.is_some_and(|id| id != section.id) => {
                Some("the device's START had another section id")
            }
            (SectionKind::Start, _) if switched => Some("START after SWITCHOVER_START"),
            (SectionKind::Start, Stage::Nothing) => None,
            (SectionKind::Start, _) => Some("START twice"),
            (SectionKind::Part, Stage::Nothing) => Some("PART before START"),
            (SectionKind::Part, Stage::Started) if switched => Some("PART after SWITCHOVER_START"),
            (SectionKind::Part, Stage::Started) => None,
            (SectionKind::Part, _) => Some("PART after END"),
            (SectionKind::End, Stage::Nothing) => Some("END before START"),
            (SectionKind::End, Stage::Started) => None,
            (SectionKind::End, _) => Some("END twice"),
            (SectionKind::Full, Stage::Nothing) => Some("FULL before START"),
            (SectionKind::Full, Stage::Started) => Some("FULL before END"),
            (SectionKind::Full, Stage::Ended) => None,
            (SectionKind::Full, Stage::Full) => Some("FULL twice"),
        };
        if let Some(what) = refused {
            return Err(refuse(section, what));
        }
        known.section = Some(section.id);
        known.stage = match section.kind {
            SectionKind::Start | SectionKind::Part => Stage::Started,
            SectionKind::End => Stage::Ended,
            SectionKind::Full => Stage::Full,
        };
        Ok(())
    }

    fn switchover_start(&mut self) -> Result<()> {
        if self.switched {
            return Err(broken(Violation::Section(
                "the switchover starts a second time",
            )));
        }
        for it in &self.devices {
            let what = match it.stage {
                Stage::Started => continue,
                Stage::Nothing => "the switchover starts before the device's START",
                Stage::Ended | Stage::Full => "the switchover starts after the device's END",
            };
            return Err(broken(Violation::Section(what)).on_device(&it.device));
        }
        self.switched = true;
        Ok(())
    }

    /// The end of the VM's state: what has not come will not.
    fn end(&self) -> Result<()> {
        for it in &self.devices {
            let what = match it.stage {
                Stage::Full => continue,
                Stage::Nothing => "the main channel has ended without the device's START",
                Stage::Started => "the main channel has ended without the device's END",
                Stage::Ended => "the main channel has ended without the device's FULL",
            };
            return Err(match it.section {
                Some(id) => broken(Violation::SectionOrder { section: id, what }),
                None => broken(Violation::Section(what)),
            }
            .on_device(&it.device));
        }
        Ok(())
    }
}

fn refuse(section: &Section, what: &'static str) -> Error {
    let violation = Violation::SectionOrder {
        section: section.id,
        what,
    };
    broken(violation).on_device(&section.owner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn device(idstr: &str) -> DeviceId {
        DeviceId::new(idstr, 0).expect("a good name")
    }

    /// An event out of a word: `S37a` is START of device `a` with section id 37; `P`, `E` and `F`
    /// are the other kinds, a `!` behind the name another version; `switch` and `eof`.
    fn event(word: &str) -> Event {
        match word {
            "switch" => return Event::Command(Command::SwitchoverStart),
            "ping" => return Event::Command(Command::Ping(1)),
            "eof" => return Event::Eof,
            _ => {}
        }
        let kind = match word.as_bytes()[0] {
            b'S' => SectionKind::Start,
            b'P' => SectionKind::Part,
            b'E' => SectionKind::End,
            _ => SectionKind::Full,
        };
        let digits = word[1..].bytes().take_while(u8::is_ascii_digit).count();
        let (id, name) = word[1..].split_at(digits);
        Event::Section(Section {
            kind,
            id: id.parse().expect("a section id"),
            owner: device(name.trim_end_matches('!')),
            version: if name.ends_with('!') { 2 } else { 1 },
        })
    }

    /// Of devices `a` and `b`: the error of the last event, all others must pass.
    fn last(words: &str) -> Result<()> {
        let mut order = MainChannelOrder::new([device("a"), device("b")]);
        let words: Vec<&str> = words.split(' ').collect();
        let (last, before) = words.split_last().expect("an event");
        for word in before {
            order.event(&event(word)).expect(word);
        }
        order.event(&event(last))
    }

    #[test]
    fn orders_that_peers_send_pass() {
        for words in [
            // QEMU's, and `vfio-migrate send`'s.
            "S1a S2b ping switch E1a E2b F1a F2b eof",
            "S1a S2b P1a P2b P1a ping switch E1a ping E2b F1a F2b eof",
            // Without multifd transfer there need be no switchover's start.
            "S1a S2b P1a P2b E1a E2b F1a F2b eof",
            // Other devices' sections have rules of their own.
            "S9ram S1a P9ram S2b S9ram switch E1a E2b F3clock! F3clock F1a F2b eof",
            // Device by device.
            "S1a S2b switch E1a F1a E2b F2b eof",
        ] {
            last(words).expect(words);
        }
    }

    #[test]
    fn what_stands_in_the_wrong_place_is_refused_by_device_and_section_id() {
        for (words, name, id, what) in [
            ("S1a S1a", "a", 1, "START twice"),
            ("S1a S2b switch S1a", "a", 1, "START after SWITCHOVER_START"),
            (
                "S1a S2b switch E1a F1a S1a",
                "a",
                1,
                "START after SWITCHOVER_START",
            ),
            (
                "S1a S3a",
                "a",
                3,
                "the device's START had another section id",
            ),
            (
                "S1a P3a",
                "a",
                3,
                "the device's START had another section id",
            ),
            (
                "S1a E1a F3a",
                "a",
                3,
                "the device's START had another section id",
            ),
            ("S1a S1b", "b", 1, "another device has this section id"),
            ("S1a!", "a", 1, "a version that is not 1"),
            ("S1a E1a F1a!", "a", 1, "a version that is not 1"),
            ("P1a", "a", 1, "PART before START"),
            ("S1a S2b switch P1a", "a", 1, "PART after SWITCHOVER_START"),
            ("S1a E1a P1a", "a", 1, "PART after END"),
            ("E1a", "a", 1, "END before START"),
            ("S1a S2b switch E1a E1a", "a", 1, "END twice"),
            ("S1a E1a F1a E1a", "a", 1, "END twice"),
            ("F1a", "a", 1, "FULL before START"),
            ("S1a F1a", "a", 1, "FULL before END"),
            ("S1a E1a F1a F1a", "a", 1, "FULL twice"),
            (
                "S1a S2b E1a E2b F1a eof",
                "b",
                2,
                "the main channel has ended without the device's FULL",
            ),
            (
                "S1a S2b E1a F1a eof",
                "b",
                2,
                "the main channel has ended without the device's END",
            ),
        ] {
            let error = last(words).expect_err(words);
            assert_eq!(error.device(), Some(&device(name)), "{words}");
            let violation = Violation::SectionOrder { section: id, what };
            assert_eq!(*error.kind(), ErrorKind::Protocol(violation), "{words}");
            let text = error.to_string();
            assert!(text.contains(&format!("section id {id}")), "{text}");
        }
    }

    #[test]
    fn a_switchover_that_cannot_start_and_a_device_without_sections_are_refused_by_device() {
        for (words, name, what) in [
            ("S1a switch", "b", "before the device's START"),
            ("S1a S2b E2b switch", "b", "after the device's END"),
            ("S1a E1a F1a eof", "b", "without the device's START"),
        ] {
            let error = last(words).expect_err(words);
            assert_eq!(error.device(), Some(&device(name)), "{words}");
            assert!(error.to_string().contains(what), "{error}");
        }
        let error = last("S1a S2b switch switch").expect_err("a second time");
        assert!(error.to_string().contains("a second time"), "{error}");
    }

    #[test]
    fn a_body_must_fit_its_section() {
        let order = MainChannelOrder::new([device("a")]);
        let pieces = [
            (Tag::Setup, 0),
            (Tag::SetupOverChannels, 0),
            (Tag::EndOfState, 0),
            (Tag::EndOfState, 5),
            (Tag::InitDataSent, 5),
            (Tag::Config, 0),
            (Tag::ConfigLoadReady, 0),
            (Tag::Setup, 5),
            (Tag::Config, 5),
        ];
        for (kind, fitting) in [
            ("S1", &[0, 1][..]),
            ("P1", &[2, 3, 4]),
            ("E1", &[2, 3]),
            ("F1", &[2, 5, 6]),
        ] {
            for (at, (end, data_len)) in pieces.into_iter().enumerate() {
                for name in ["a", "other"] {
                    let Event::Section(section) = event(&format!("{kind}{name}")) else {
                        unreachable!("the word is a section's");
                    };
                    let result = order.body(&section, &Piece { data_len, end });
                    let passes = name == "other" || fitting.contains(&at);
                    assert_eq!(result.is_ok(), passes, "{kind} {end:?} {data_len}");
                    if let Err(error) = result {
                        assert_eq!(error.device(), Some(&section.owner));
                    }
                }
            }
        }
    }
}
