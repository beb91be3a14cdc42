//! What must hold: what has left is what has come, and a relay ends as it should.

use std::collections::{BTreeMap, BTreeSet};

use vfio_migration::{
    ErrorKind, RelayReport, Violation,
    wire::{self, DeviceKey, Frame, Framer, Hello, Walk},
};

use super::model::{Chan, Run};
use crate::{
    input::Input,
    outgoing::{Destination, Name},
    steps::{self, Place},
};

/// A device's packet that has come whole.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Key {
    name: Name,
    index: u32,
    config: bool,
}

/// What a walk over one channel's bytes finds.
struct Found<'a> {
    devices: Vec<(Key, &'a [u8])>,
    /// Hello, RAM and SYNC packets.
    others: Vec<&'a [u8]>,
    hello: Option<u8>,
    syncs: u32,
    /// What follows the last whole packet.
    tail: &'a [u8],
    /// Why that can not become a packet.
    violation: Option<Violation>,
}

/// What is right about all channels together.
#[derive(Debug, Default)]
struct Verdict {
    /// Something wrong has come, so that it fails.
    broken: bool,
    /// Something else may have made it fail.
    excused: bool,
    /// Every device has come whole.
    complete: bool,
}

impl Run {
    /// What has come on a channel.
    fn found<'a>(&self, chan: &'a Chan) -> Found<'a> {
        let mut found = Found {
            devices: Vec::new(),
            others: Vec::new(),
            hello: None,
            syncs: 0,
            tail: &[],
            violation: None,
        };
        let mut walk = Walk::new(&chan.bytes, self.framer());
        // Ends: a walk does.
        while let Some(step) = walk.next() {
            let located = match step {
                Ok(located) => located,
                Err(error) => {
                    let ErrorKind::Protocol(violation) = error.kind() else {
                        unreachable!("a walk finds nothing else");
                    };
                    let cut = *violation == Violation::Truncated;
                    found.violation = (!cut).then(|| violation.clone());
                    break;
                }
            };
            let end = located.offset + located.header.len() + located.payload.len();
            let whole = &chan.bytes[located.offset..end];
            match located.frame {
                Frame::DeviceState(packet) => {
                    let key = Key {
                        name: *packet.header.key().as_bytes(),
                        index: packet.packet.index,
                        config: packet.packet.config,
                    };
                    found.devices.push((key, located.payload));
                }
                Frame::Hello(hello) => {
                    found.hello = Some(hello.id);
                    found.others.push(whole);
                }
                Frame::Sync { .. } => {
                    found.syncs += 1;
                    found.others.push(whole);
                }
                Frame::Ram(_) => found.others.push(whole),
            }
        }
        found.tail = &chan.bytes[walk.offset()..];
        found
    }

    fn all_found(&self) -> Vec<Found<'_>> {
        self.channels.iter().map(|chan| self.found(chan)).collect()
    }

    /// Whether it may fail, or succeed.
    fn judge(&self, all: &[Found<'_>]) -> Verdict {
        let mut verdict = Verdict {
            broken: false,
            excused: self.called_off,
            complete: true,
        };
        let mut hellos = BTreeSet::new();
        let mut packets = BTreeMap::<Name, (BTreeSet<u32>, Vec<u32>)>::new();
        for (chan, found) in self.channels.iter().zip(all) {
            verdict.broken |= found.violation.is_some();
            verdict.excused |= chan.failed;
            verdict.broken |= chan.over && (!found.tail.is_empty() || found.syncs == 0);
            verdict.broken |= found.hello.is_some_and(|id| !hellos.insert(id));
            for (key, _) in &found.devices {
                let (data, configs) = packets.entry(key.name).or_default();
                if key.config {
                    configs.push(key.index);
                } else {
                    verdict.broken |= !data.insert(key.index);
                }
            }
            // Announced, and so a device from then on, whose packet may be refused at once.
            if let Some(key) = announced(found.tail, &mut self.greeted(found)) {
                let (data, configs) = packets.entry(key.name).or_default();
                if key.config {
                    configs.push(key.index);
                } else {
                    verdict.broken |= !data.insert(key.index);
                }
            }
        }
        verdict.broken |= packets.len() > self.max_devices;
        for (name, (data, configs)) in &packets {
            let key = DeviceKey::decode(name).expect("it was one");
            verdict.broken |= key.id().is_none() || configs.len() > 1;
            let last = configs.first().copied();
            let highest = data.last().copied();
            verdict.broken |= last.is_some_and(|last| highest.is_some_and(|high| high >= last));
            verdict.complete &= last.is_some_and(|last| data.len() == last as usize);
        }
        verdict
    }

    /// A framer that goes on behind what was found.
    fn greeted(&self, found: &Found<'_>) -> Option<Framer> {
        let id = found.hello?;
        let mut framer = self.framer();
        let hello = Hello { uuid: [0; 16], id }.encode();
        framer.decode(&hello).expect("a good hello");
        Some(framer)
    }

    /// Lets everybody get on as far as they can, and checks what must then hold.
    pub(super) fn settle(&self) {
        for line in &mut self.destination.board().lines {
            line.credit = usize::MAX;
        }
        steps::settle(|| false);
        steps::pass_bounds(|| false);
        let stats = self.relay.stats();
        assert_eq!(
            stats.late_wakeups,
            0,
            "nobody was told: {:?}",
            steps::sleeping()
        );
        assert!(stats.held_high <= stats.budget, "{stats:?}");
        let all = self.all_found();
        self.check_taken(&all);
        let verdict = self.judge(&all);
        let over = self.complete && self.channels.iter().all(|chan| chan.over);
        if let Some(error) = self.relay.failure() {
            let missing = over && !verdict.complete;
            assert!(
                verdict.broken || verdict.excused || missing,
                "nothing was wrong, and yet: {error}"
            );
        } else {
            self.check_gone(&all, &stats);
        }
        if self.credits {
            for line in &mut self.destination.board().lines {
                line.credit = 0;
            }
        }
    }

    /// Nothing has failed, and everybody has had a turn.
    fn check_gone(&self, all: &[Found<'_>], stats: &vfio_migration::Stats) {
        let board = self.destination.board();
        for (at, (line, found)) in board.lines.iter().zip(all).enumerate() {
            assert!(
                line.is_at_rest() || !found.tail.is_empty(),
                "line {at} stands within a packet: {:?}",
                steps::sleeping()
            );
        }
        // A half packet of RAM holds its line; and one that opens no line lets no device through.
        let halves: Vec<Option<Key>> = all
            .iter()
            .map(|found| announced(found.tail, &mut self.greeted(found)))
            .collect();
        let cut = |(found, half): (&Found<'_>, &Option<Key>)| {
            found.tail.len() >= wire::PREFIX_LEN && half.is_none()
        };
        if board.least() == 0 || all.iter().zip(&halves).any(cut) {
            return;
        }
        let mut accepted = BTreeSet::new();
        let mut waiting = Vec::new();
        for (at, found) in all.iter().enumerate() {
            let announced = usize::try_from(stats.channels[at].packets).expect("few");
            let waits = steps::place(&format!("vfio-mig-in{at}")) == Some(Place::Wait);
            let whole = (announced - usize::from(waits)).min(found.devices.len());
            accepted.extend(found.devices[..whole].iter().map(|(key, _)| *key));
            if waits {
                waiting.extend(found.devices.get(announced - 1).map(|(key, _)| *key));
            }
        }
        let names: BTreeSet<Name> = accepted
            .iter()
            .chain(&waiting)
            .map(|key| key.name)
            .collect();
        for name in names {
            let has = |index, config| {
                accepted.contains(&Key {
                    name,
                    index,
                    config,
                })
            };
            let first = (0..).find(|&index| !has(index, false)).expect("few");
            let (next, complete) = board.next.get(&name).copied().unwrap_or_default();
            let config = has(first, true);
            assert_eq!(
                (next, complete),
                (first + u32::from(config), config),
                "{:?}: what has come has not gone: {:?}",
                DeviceKey::decode(&name),
                steps::sleeping()
            );
            // The buffer that is kept back may be held by half a packet that is another's next.
            let half = halves.iter().any(Option::is_some);
            let late = waiting
                .iter()
                .find(|key| key.name == name && key.index == first && !complete && !half);
            assert!(
                late.is_none(),
                "{late:?} is next, and waits: {:?}",
                steps::sleeping()
            );
        }
    }

    /// What the destination has is what the source sent.
    fn check_taken(&self, all: &[Found<'_>]) {
        let board = self.destination.board();
        let mut sent = BTreeMap::<Key, Vec<&[u8]>>::new();
        for (key, data) in all.iter().flat_map(|found| &found.devices) {
            sent.entry(*key).or_default().push(data);
        }
        for (at, (line, found)) in board.lines.iter().zip(all).enumerate() {
            let mut others = found.others.iter();
            let mut walk = Walk::new(&line.bytes[..line.whole()], self.framer());
            // Ends: a walk does.
            while walk.offset() < line.whole() {
                let located = walk.next().expect("not its end").expect("well-formed");
                let end = located.offset + located.header.len() + located.payload.len();
                if let Frame::DeviceState(packet) = located.frame {
                    let key = Key {
                        name: *packet.header.key().as_bytes(),
                        index: packet.packet.index,
                        config: packet.packet.config,
                    };
                    let data = sent.get(&key).into_iter().flatten();
                    let same = { data }.any(|data| *data == located.payload);
                    assert!(same, "line {at}: {packet:?} was not sent so");
                } else {
                    let other = others.next();
                    assert_eq!(
                        other.copied(),
                        Some(&line.bytes[located.offset..end]),
                        "line {at}: not what came on it"
                    );
                }
            }
            // Half a packet of RAM may be what has come of it.
            let half = &line.bytes[line.whole()..];
            let other = others.next().copied().unwrap_or(found.tail);
            let device = announced(half, &mut self.greeted(found)).is_some();
            let begun = half.len() < wire::DEVICE_PACKET_LEN;
            assert!(
                device || begun || other.starts_with(half),
                "line {at}: not what came on it"
            );
        }
    }

    /// Brings the relay to an end, and checks its report.
    pub(super) fn end(mut self, input: &mut Input<'_>) {
        let how = input.below(8);
        for at in 0..self.channels.len() {
            if !self.channels[at].over {
                self.channels[at].send_rest();
                if how < 4 && self.channels[at].bytes.is_empty() {
                    self.greet(at);
                }
                self.channels[at].end();
            }
        }
        self.no_more_channels();
        if how < 7 {
            self.settle();
        }
        if !self.relay.is_finished() && self.relay.failure().is_none() {
            // For room, or a barrier, that only time would end: a source that keeps to the order is
            // never so.
            let good = how < 7 && self.orderly && {
                let verdict = self.judge(&self.all_found());
                !verdict.broken && !verdict.excused
            };
            assert!(!good, "a deadlock: {:?}", steps::sleeping());
            self.relay.cancel();
            self.called_off = true;
            self.settle();
        }
        let verdict = self.judge(&self.all_found());
        let Self {
            relay,
            destination,
            channels,
            ..
        } = self;
        let report = steps::ended(move || relay.join(), || false);
        check_report(&report, &verdict, &channels, &destination);
    }
}

/// The packet whose headers these bytes begin with.
fn announced(tail: &[u8], framer: &mut Option<Framer>) -> Option<Key> {
    let step = framer.as_mut()?.decode(tail).ok()?;
    match step {
        wire::Step::Frame {
            frame: Frame::DeviceState(packet),
            ..
        } => Some(Key {
            name: *packet.header.key().as_bytes(),
            index: packet.packet.index,
            config: packet.packet.config,
        }),
        _ => None,
    }
}

/// The relay's report says what became of what was sent.
fn check_report(
    report: &RelayReport,
    verdict: &Verdict,
    channels: &[Chan],
    destination: &Destination,
) {
    let board = destination.board();
    assert_eq!(report.abandoned_threads, 0);
    assert_eq!(report.stats.late_wakeups, 0);
    assert_eq!(report.stats.held, 0, "memory was not given back");
    match &report.result {
        Ok(()) => {
            assert!(!verdict.broken && verdict.complete, "{:?}", verdict);
            let came: usize = channels.iter().map(|chan| chan.bytes.len()).sum();
            let left: usize = board.lines.iter().map(|line| line.bytes.len()).sum();
            assert_eq!(came, left, "what succeeds has lost nothing");
            assert!(board.lines.iter().all(|line| line.finished));
            assert!(board.next.values().all(|&(_, complete)| complete));
            let sent: u64 = report.stats.devices.iter().map(|dev| dev.packets).sum();
            let began: u32 = board.next.values().map(|&(next, _)| next).sum();
            assert_eq!(sent, u64::from(began));
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            let broken = verdict.broken || verdict.excused || !verdict.complete;
            assert!(broken, "nothing was wrong, and yet: {error}");
            assert!(
                matches!(error.kind(), ErrorKind::Cancelled | ErrorKind::Channel)
                    || error.channel().is_some()
                    || error.device().is_some(),
                "{error} is nowhere"
            );
            if *error.kind() == ErrorKind::Missing {
                let key = DeviceKey::new(error.device().expect("it names a device"));
                let (next, complete) = board.next.get(key.as_bytes()).copied().unwrap_or_default();
                assert!(!complete, "{error}");
                assert!(error.index() >= Some(next), "{error}: {next} were sent");
            }
            assert!(board.lines.iter().all(|line| line.hung_up));
        }
    }
}
