//! A relay, driven by an input: what the source sends on which channel, cut, sent twice or wrong, in
//! which order everybody gets a turn, what the destination takes, and what is told and cancelled. And
//! what must hold all the while, beside what `outgoing.rs` looks at with each packet:
//!
//! * What is not device state leaves on the channel on which it came, untouched, in its order.
//! * A device's packet leaves with the data with which it came.
//! * Where nothing has failed, what has come without a gap has left once everybody has had a turn,
//!   and nobody waits who could go on; no sleep's bound finds what no notice had announced.
//! * The pool stays within the budget, and is empty in the end.
//! * A relay through which only good packets came, whole, succeeds; every relay ends; one that
//!   succeeds has lost nothing.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    io,
    rc::Rc,
    time::Duration,
};

use vfio_migration::{
    DeviceId, Error, ErrorKind, Phase, Relay, RelayReport, Settings, Violation,
    wire::{self, DeviceKey, Frame, Framer, Hello, Kind, PageSize, RamHeader, Walk},
};

use crate::{
    input::Input,
    outgoing::{Destination, Name},
    steps::{self, Place},
    stream::{Feed, Piece},
};

const HOUR: Duration = Duration::from_secs(3600);

/// Data sizes: none, tiny, about a page, about a channel's staging, the largest.
const SIZES: [usize; 10] = [0, 1, 7, 100, 4095, 4096, 20_000, 32_768, 70_001, 1 << 20];

/// How many bytes may be sent before packets get small.
const MOST: usize = 32 << 20;

/// The budget's buffers, each of the largest packet with its headers, in whole pages.
const BUFFER: usize = (1 << 20) + 4096;

/// One device of the source's.
#[derive(Default)]
struct Dev {
    data: BTreeSet<u32>,
    config: Option<u32>,
    /// The next idx that a good source would send.
    next: u32,
}

/// One channel of the source's.
struct Chan {
    feed: Feed,
    /// All that was sent.
    bytes: Vec<u8>,
    /// What of the last packet has not been sent.
    rest: Vec<u8>,
    /// Its SYNCs, whole or not.
    syncs: u32,
    /// Nothing more may be sent.
    over: bool,
    /// A read has failed.
    failed: bool,
}

impl Chan {
    fn push(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.bytes.extend(bytes);
            self.feed.push(Piece::Bytes(bytes.to_vec()));
        }
    }

    fn send_rest(&mut self) {
        let rest = std::mem::take(&mut self.rest);
        self.push(&rest);
    }

    fn end(&mut self) {
        self.over = true;
        self.feed.push(Piece::End);
    }
}

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

/// A relay under way.
struct Run {
    relay: Relay,
    destination: Destination,
    channels: Vec<Chan>,
    devices: Vec<Dev>,
    page_size: PageSize,
    max_devices: usize,
    /// Lines have credit only where the input gives it.
    credits: bool,
    /// No further channel may be added.
    complete: bool,
    /// Something else than the source's bytes gave it a reason to fail.
    called_off: bool,
    /// The source kept to what a relay may rely on.
    orderly: bool,
    /// Each packet's data is its own.
    salt: u64,
}

fn id(device: usize) -> DeviceId {
    let number = u32::try_from(device).expect("few");
    // Two share an idstr, and two an instance id.
    DeviceId::new(format!("dev{}", number / 2), number % 2).expect("a name")
}

impl Run {
    fn start(input: &mut Input<'_>) -> Self {
        let flags = input.byte();
        let mut settings = Settings::default();
        settings.max_packet = wire::LEAST_MAX_PACKET;
        settings.budget = Some(BUFFER * input.one_of(&[1, 2, 3, 6]));
        settings.window = input.one_of(&[1, 2, 5, 1 << 16]);
        settings.max_devices = Some(input.one_of(&[3, 1, 64]));
        settings.grace = Duration::ZERO;
        settings.no_progress = HOUR;
        settings.hello_timeout = HOUR;
        settings.packet_timeout = HOUR;
        let spawn = |task: vfio_migration::Task| {
            let name = task.thread_name().to_owned();
            steps::spawn(name, move || task.run());
            Ok(())
        };
        let relay = Relay::builder().settings(settings.clone()).spawn_with(spawn).start().expect("all that a relay needs");
        let page_size = if flags & 2 == 0 { 4096 } else { 65_536 };
        let mut run = Self {
            relay,
            destination: Destination::default(),
            channels: Vec::new(),
            devices: (0..4).map(|_| Dev::default()).collect(),
            page_size: PageSize::new(page_size).expect("a page size"),
            max_devices: settings.max_devices.expect("set") as usize,
            credits: flags & 4 != 0,
            complete: false,
            called_off: false,
            orderly: true,
            salt: 0,
        };
        {
            let mut board = run.destination.board();
            board.barriers = flags & 1 != 0;
            board.gone_at_end = flags & 8 != 0;
        }
        for _ in 0..=input.below(4) {
            run.add_channel();
            if flags & 16 == 0 {
                run.greet(run.channels.len() - 1);
            }
        }
        if flags & 32 == 0 {
            run.no_more_channels();
        }
        run
    }

    fn framer(&self) -> Framer {
        Framer::new(Some(self.page_size), wire::LEAST_MAX_PACKET)
    }

    fn add_channel(&mut self) {
        let feed = Feed::default();
        let source = feed.channel();
        let source = source
            .with_page_size(self.page_size.bytes())
            .expect("a page size");
        let to = self
            .destination
            .channel(self.page_size, wire::LEAST_MAX_PACKET);
        if self.credits {
            let mut board = self.destination.board();
            board.lines.last_mut().expect("one").credit = 0;
        }
        let added = self.relay.add_channel(source, to);
        assert_eq!(added.is_err(), self.complete, "{added:?}");
        if added.is_err() {
            self.destination.board().lines.pop();
            return;
        }
        self.orderly &= self.channels.iter().all(|chan| chan.syncs == 0);
        self.channels.push(Chan {
            feed,
            bytes: Vec::new(),
            rest: Vec::new(),
            syncs: 0,
            over: false,
            failed: false,
        });
    }

    /// What every channel begins with.
    fn greet(&mut self, at: usize) {
        let hello = Hello {
            uuid: [7; 16],
            id: u8::try_from(at).unwrap_or(255),
        };
        let chan = &mut self.channels[at];
        chan.push(&hello.encode());
        chan.push(&wire::encode_sync(self.page_size, 0));
        chan.syncs += 1;
    }

    fn no_more_channels(&mut self) {
        self.relay.no_more_channels();
        self.complete = true;
    }

    fn filler(&mut self, len: usize) -> impl Iterator<Item = u8> + use<> {
        self.salt += 1;
        let seed = self.salt.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (0..len as u64).map(move |at| {
            let word = (seed ^ (at >> 3)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word.rotate_left(31).to_be_bytes()[(at & 7) as usize]
        })
    }

    /// A device's packet.
    fn packet(&mut self, at: usize, input: &mut Input<'_>) -> Vec<u8> {
        let device = input.below(self.devices.len());
        let index = input.index(self.devices[device].next);
        let how = input.byte();
        let config = how & 7 == 7;
        let size = SIZES[usize::from(how >> 4) % SIZES.len()];
        // All that was sent is kept, to be compared.
        let sent: usize = self
            .channels
            .iter()
            .map(|channel| channel.bytes.len())
            .sum();
        let size = if sent < MOST { size } else { size % 4096 };
        let key = DeviceKey::new(&id(device));
        let len = u32::try_from(size).expect("small");
        let mut bytes = wire::encode_packet(&key, index, config, len).to_vec();
        bytes.extend(self.filler(size));
        let dev = &mut self.devices[device];
        self.orderly &= index == dev.next && self.channels[at].syncs > 0;
        if config {
            dev.config = dev.config.or(Some(index));
        } else {
            dev.data.insert(index);
        }
        while dev.data.contains(&dev.next) {
            dev.next += 1;
        }
        bytes
    }

    /// A RAM packet, or a SYNC.
    fn other(&mut self, at: usize, sync: bool, input: &mut Input<'_>) -> Vec<u8> {
        let mine = self.channels[at].syncs;
        self.orderly &= self.channels.iter().all(|chan| chan.syncs >= mine);
        self.salt += 1;
        if sync {
            self.channels[at].syncs += 1;
            return wire::encode_sync(self.page_size, self.salt);
        }
        let pages = u32::from(input.byte()) % 9 % (self.page_size.pages() + 1);
        let zero_pages = u32::from(input.byte()) % (self.page_size.pages() - pages + 1);
        let compressed = input.byte();
        // A method's packets are as long as they say, an uncompressed one's as its pages.
        let (flags, size) = match compressed {
            0..200 => (0, pages * self.page_size.bytes()),
            _ => (2, u32::from(compressed - 200) * 100),
        };
        let header = RamHeader {
            kind: Kind::Ram { flags },
            pages_alloc: self.page_size.pages(),
            normal_pages: pages,
            next_packet_size: size,
            packet_num: self.salt,
            zero_pages,
            ramblock: b"pc.ram",
        };
        let mut bytes = header.encode().to_vec();
        bytes.extend(self.filler(8 * self.page_size.pages() as usize));
        bytes.extend(self.filler(size as usize));
        bytes
    }

    /// Sends a packet, in pieces as the input says.
    fn send(&mut self, what: u8, input: &mut Input<'_>) {
        if self.channels.is_empty() {
            return;
        }
        let at = input.below(self.channels.len());
        if self.channels[at].over {
            return;
        }
        let bytes = match what {
            0 => self.packet(at, input),
            1 => self.other(at, false, input),
            _ => self.other(at, true, input),
        };
        let chan = &mut self.channels[at];
        chan.send_rest();
        match input.byte() {
            0..=127 => chan.push(&bytes),
            128..=191 => {
                // Two pieces, both at once.
                let (first, second) = bytes.split_at(usize::from(input.byte()) * bytes.len() / 256);
                chan.push(first);
                chan.push(second);
            }
            192..=239 => {
                // The rest comes later, or never.
                let cut = usize::from(input.byte()) * bytes.len() / 256;
                chan.push(&bytes[..cut]);
                chan.rest = bytes[cut..].to_vec();
            }
            _ => {
                // In crumbs.
                let step = 1 + input.below(40);
                for crumb in bytes.chunks(step.max(bytes.len() / 64)) {
                    chan.push(crumb);
                }
            }
        }
    }

    /// Sends a packet with a byte changed, or a part of it; whatever that is.
    fn send_wrong(&mut self, input: &mut Input<'_>) {
        if self.channels.is_empty() {
            return;
        }
        let at = input.below(self.channels.len());
        if self.channels[at].over {
            return;
        }
        self.orderly = false;
        let mut bytes = match input.below(4) {
            0 => self.packet(at, input),
            1 => self.other(at, false, input),
            2 => self.other(at, true, input),
            _ => Hello {
                uuid: [0; 16],
                id: input.byte(),
            }
            .encode()
            .to_vec(),
        };
        let place = usize::from(input.byte()) * 2 % bytes.len();
        match input.below(4) {
            0 => bytes[place] ^= input.byte().max(1),
            1 => bytes[place..]
                .iter_mut()
                .take(4)
                .for_each(|byte| *byte = 0xff),
            2 => bytes.truncate(place),
            _ => {}
        }
        let chan = &mut self.channels[at];
        chan.send_rest();
        chan.push(&bytes);
    }

    /// Sends bytes of the input's own.
    fn send_raw(&mut self, input: &mut Input<'_>) {
        let at = input.below(self.channels.len().max(1));
        let len = usize::from(input.byte()) << 8 | usize::from(input.byte());
        let piece = 1 + usize::from(input.byte()) * 16;
        let len = len.min(input.rest().len());
        let bytes = input.take(len);
        let Some(chan) = self.channels.get_mut(at).filter(|chan| !chan.over) else {
            return;
        };
        self.orderly = false;
        chan.send_rest();
        for piece in bytes.chunks(piece) {
            chan.push(piece);
        }
    }

    /// One step of the input.
    fn step(&mut self, input: &mut Input<'_>) {
        let line = |run: &Self, input: &mut Input<'_>| {
            let lines = run.channels.len();
            (lines > 0).then(|| input.below(lines))
        };
        match input.byte() {
            0..=79 => self.send(0, input),
            80..=99 => self.send(1, input),
            100..=114 => self.send(2, input),
            115..=149 => {
                let at = input.below(steps::count());
                steps::resume(at);
            }
            150..=174 => {
                if let Some(at) = line(self, input) {
                    let credit = input.one_of(&[1, 64, 300, 5000, 100_000, usize::MAX]);
                    let mut board = self.destination.board();
                    let line = &mut board.lines[at];
                    line.credit = line.credit.saturating_add(credit);
                }
            }
            175..=189 => self.settle(),
            190..=204 => self.send_raw(input),
            205..=209 => {
                if let Some(at) = line(self, input) {
                    self.channels[at].send_rest();
                }
            }
            210..=215 => {
                if let Some(at) = line(self, input)
                    && !self.channels[at].over
                {
                    self.channels[at].rest.clear();
                    self.channels[at].end();
                }
            }
            216..=219 => {
                if self.channels.len() < 6 {
                    self.add_channel();
                }
            }
            220 | 221 => {
                if let Some(at) = line(self, input)
                    && !self.channels[at].over
                {
                    self.greet(at);
                }
            }
            222 => self.no_more_channels(),
            223 => {
                self.relay.cancel();
                self.called_off = true;
            }
            224 => {
                let error = Error::new(ErrorKind::Channel, Phase::Section);
                self.relay.fail(error);
                self.called_off = true;
            }
            225..=229 => {
                if let Some(at) = line(self, input) {
                    let kind = input.one_of(&[
                        io::ErrorKind::Interrupted,
                        io::ErrorKind::BrokenPipe,
                        io::ErrorKind::WouldBlock,
                    ]);
                    self.called_off |= kind != io::ErrorKind::Interrupted;
                    self.destination.board().lines[at].fails = Some(kind);
                }
            }
            230..=233 => {
                if let Some(at) = line(self, input)
                    && !self.channels[at].over
                {
                    let kind = input.one_of(&[
                        io::ErrorKind::Interrupted,
                        io::ErrorKind::ConnectionReset,
                        io::ErrorKind::TimedOut,
                    ]);
                    self.channels[at].failed |= kind != io::ErrorKind::Interrupted;
                    self.channels[at].feed.push(Piece::Fails(kind));
                }
            }
            234..=243 => self.send_wrong(input),
            244..=250 => {
                if let Some(at) = line(self, input) {
                    let most = input.one_of(&[1, 100, 4096, usize::MAX]);
                    self.destination.board().lines[at].most = most;
                }
            }
            _ => {
                let stats = self.relay.stats();
                assert!(stats.held_high <= stats.budget, "{stats:?}");
                let (channels, open) = self.relay.channels();
                assert_eq!(channels, self.channels.len());
                assert!(open <= channels);
            }
        }
    }

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
    fn settle(&self) {
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
    fn end(mut self, input: &mut Input<'_>) {
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
        check_report(&join(relay), &verdict, &channels, &destination);
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

fn join(relay: Relay) -> RelayReport {
    let report = Rc::new(RefCell::new(None));
    let place = report.clone();
    steps::spawn("joining".into(), move || {
        *place.borrow_mut() = Some(relay.join());
    });
    steps::settle(|| false);
    let report = report.borrow_mut().take();
    report.unwrap_or_else(|| panic!("it never ends: {:?}", steps::sleeping()))
}

/// One input's run.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    steps::begin();
    let mut run = Run::start(&mut input);
    while !input.is_empty() {
        run.step(&mut input);
    }
    run.end(&mut input);
    steps::end();
}
