//! A load, driven by an input: what is sent, cut, sent twice or wrong, in which order everybody gets
//! a turn, what is drained, told and cancelled; and what must hold all the while.
//!
//! * What reaches a device is a prefix of its packets' data in the order of their idx, and a config
//!   reaches it only behind all data below its idx.
//! * Where nothing has failed, what has been accepted without a gap has reached the device once
//!   everybody has had a turn.
//! * Nobody waits who could go on: not the channel that has the packet which a device needs next,
//!   and no sleep whose bound finds what no notice had announced.
//! * The pool stays within the budget.
//! * A load in which nothing was wrong succeeds; every load ends; its devices are in the states that
//!   its report says.
//! * Nobody else hears of a device that is unplugged: not of what it missed, nor of what still comes
//!   for it, in whatever order.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    io,
    rc::Rc,
    time::Duration,
};

use vfio_migration::{
    DeviceId, DeviceState, Error, ErrorKind, LoadSession, Phase, Report, Settings,
    wire::{self, DeviceKey, Hello, PageSize},
};
use vfio_migration_uring::sim::{Fault, FaultPlan, SimConfig};

use crate::{
    device::{Drain, Loader, device},
    input::Input,
    steps::{self, Place},
    stream::{Feed, Piece},
};

const HOUR: Duration = Duration::from_secs(3600);

/// Data sizes: none, tiny, about a page, about a reserve, beyond a buffer.
const SIZES: [usize; 10] = [0, 1, 7, 100, 4095, 4096, 4097, 20_000, 65_536, 70_001];

/// A packet as it was sent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Sent {
    device: usize,
    index: u32,
    config: bool,
}

/// One device of the run.
struct Dev {
    id: DeviceId,
    drain: Drain,
    sizes: [usize; 4],
    config_len: usize,
    /// Which idx have been sent as data, whole or not, by whomever.
    data: BTreeSet<u32>,
    /// And as config.
    configs: BTreeSet<u32>,
    /// The next idx that a good source would send.
    next: u32,
    started: bool,
    ready: bool,
    removed: bool,
    seen: RefCell<Seen>,
}

impl Dev {
    fn size(&self, index: u32) -> usize {
        self.sizes[index as usize % self.sizes.len()]
    }

    /// A packet's data: each packet's own, so that none can stand for another.
    fn bytes(&self, index: u32, len: usize) -> impl Iterator<Item = u8> {
        let seed =
            u64::from(index).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(self.id.instance());
        (0..len as u64).map(move |at| {
            let word = (seed ^ (at >> 3)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word.rotate_left(31).to_be_bytes()[(at & 7) as usize]
        })
    }

    fn data_of(&self, index: u32) -> impl Iterator<Item = u8> {
        self.bytes(index, self.size(index))
    }

    fn config_of(&self, index: u32) -> Vec<u8> {
        self.bytes(!index, self.config_len).collect()
    }

    fn payload(&self, packet: Sent) -> Vec<u8> {
        if packet.config {
            wire::wrap_config(&self.config_of(packet.index))
        } else {
            self.data_of(packet.index).collect()
        }
    }

    fn frame(&self, packet: Sent) -> Vec<u8> {
        let payload = self.payload(packet);
        let len = u32::try_from(payload.len()).expect("small");
        let key = DeviceKey::new(&self.id);
        let mut bytes = wire::encode_packet(&key, packet.index, packet.config, len).to_vec();
        bytes.extend(payload);
        bytes
    }

    /// What reached the device is a prefix of the one right order. Looks at what is new.
    fn check_prefix(&self) {
        let got = self.drain.got();
        let mut seen = self.seen.borrow_mut();
        let Seen {
            len, index, within, ..
        } = &mut *seen;
        let mut rest = &got.bytes[*len..];
        while !rest.is_empty() {
            assert!(
                self.data.contains(index),
                "{}: {} bytes beyond idx {index}, which nobody sent",
                self.id,
                rest.len()
            );
            let some = rest.len().min(self.size(*index) - *within);
            let right = self.data_of(*index).skip(*within).take(some);
            assert!(
                right.eq(rest[..some].iter().copied()),
                "{}: other bytes where idx {index} belongs",
                self.id
            );
            rest = &rest[some..];
            *len += some;
            *within += some;
            if *within == self.size(*index) {
                *index += 1;
                *within = 0;
            }
        }
        if let Some(config) = &got.config
            && !seen.config
        {
            // Empty packets leave no trace, so one that was sent may be there.
            let mut place = seen.index;
            let mut right = seen.within == 0;
            while right && (!self.configs.contains(&place) || *config != self.config_of(place)) {
                right = self.data.contains(&place) && self.size(place) == 0;
                place += 1;
            }
            assert!(right, "{}: a config that does not belong there", self.id);
            seen.config = true;
        }
    }
}

/// How much of what a device got has been looked at.
#[derive(Debug, Default)]
struct Seen {
    len: usize,
    index: u32,
    within: usize,
    config: bool,
}

/// One channel of the run.
struct Chan {
    feed: Feed,
    /// Its packets that are announced in full, in their order, and whether all of each was sent.
    sent: Vec<(Sent, bool)>,
    /// What of the last packet has not been sent.
    rest: Vec<u8>,
    /// Nothing more may be sent.
    over: bool,
}

impl Chan {
    fn push(&self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.feed.push(Piece::Bytes(bytes.to_vec()));
        }
    }

    fn send_rest(&mut self) {
        let rest = std::mem::take(&mut self.rest);
        self.push(&rest);
        if !rest.is_empty()
            && let Some((_, whole)) = self.sent.last_mut()
        {
            *whole = true;
        }
    }
}

/// What a pushing thread is asked.
#[derive(Clone, Debug)]
enum Push {
    Wait(usize, Sent, Vec<u8>),
    Try(usize, Sent, Vec<u8>),
    Lease(usize, Sent, Vec<u8>),
    Quit,
}

/// The pushing thread.
#[derive(Default)]
struct Pushing {
    asked: RefCell<Vec<Push>>,
    /// Those that returned, and whether the packet was taken.
    done: RefCell<Vec<(Sent, bool)>>,
    busy: Cell<bool>,
    /// Whether it was told to quit.
    over: Cell<bool>,
}

/// A load under way.
struct Run {
    session: Rc<LoadSession>,
    devices: Vec<Dev>,
    channels: Vec<Chan>,
    pushing: Option<Rc<Pushing>>,
    config_after_iterables: bool,
    /// Something was wrong, so the load may fail.
    wrong: bool,
    /// The load was called off.
    called_off: bool,
    /// Every packet was the next one of its device when it was sent.
    orderly: bool,
    /// An operation hangs until it is cancelled.
    hangs: bool,
    removing: Vec<usize>,
}

fn id(device: usize) -> DeviceId {
    let number = u32::try_from(device).expect("few");
    // Two share an idstr, and two an instance id.
    DeviceId::new(format!("dev{}", number / 2), number % 2).expect("a name")
}

impl Run {
    fn start(input: &mut Input<'_>) -> Self {
        let flags = input.byte();
        let devices = 1 + input.below(3);
        let channels = 1 + input.below(4);
        let mut settings = Settings::default();
        settings.max_devices = Some(u32::try_from(devices).expect("few") + 1);
        settings.channels = u32::try_from(channels).expect("few");
        let least = (devices + 1) * 4096;
        settings.budget = Some(least + input.one_of(&[0, 64, 4096, 20_000, 300_000, 1 << 20]));
        settings.buffer_len = input.one_of(&[4096, 8192, 65_536, 1 << 20]);
        settings.window = input.one_of(&[1, 2, 5, 1 << 16]);
        settings.config_after_iterables = flags & 1 != 0;
        settings.grace = Duration::ZERO;
        settings.no_progress = HOUR;
        settings.hello_timeout = HOUR;
        let plan = FaultPlan::new();
        let mut wrong = false;
        let mut hangs = false;
        if flags & 2 != 0 {
            let at = u64::from(input.byte() % 32);
            let fault = match input.below(5) {
                0 => Fault::Short(0),
                1 => Fault::Short(1 + input.below(200)),
                2 => Fault::Errno(4),
                3 => Fault::Errno(5),
                _ => Fault::Hang,
            };
            wrong |= matches!(fault, Fault::Errno(5) | Fault::Short(0));
            hangs |= fault == Fault::Hang;
            plan.set(at, fault);
        }
        let ring = SimConfig {
            seed: u64::from(input.byte()),
            short: input.one_of(&[0, 30]),
            interrupt: input.one_of(&[0, 20]),
            again: input.one_of(&[0, 20]),
            delay: input.one_of(&[0, 50]),
            reorder: flags & 4 != 0,
            plan,
            idle: Some(steps::idle()),
            ..SimConfig::default()
        };
        let config_after_iterables = settings.config_after_iterables;
        let mut builder = LoadSession::builder()
            .settings(settings)
            .simulated_ring(ring)
            .spawn_with(steps::spawn_task);
        let mut all = Vec::new();
        for at in 0..devices {
            let (dev, device, bad) = make(at, input, flags & 8 != 0);
            wrong |= bad;
            all.push(dev);
            builder = builder.device(device);
        }
        let mut chans = Vec::new();
        for at in 0..channels {
            let feed = Feed::default();
            let hello = Hello {
                uuid: [0; 16],
                id: u8::try_from(at).expect("few"),
            };
            feed.push(Piece::Bytes(hello.encode().to_vec()));
            builder = builder.channel(feed.channel());
            chans.push(Chan {
                feed,
                sent: Vec::new(),
                rest: Vec::new(),
                over: false,
            });
        }
        let session = Rc::new(builder.start().expect("all that a load needs"));
        Self {
            session,
            devices: all,
            channels: chans,
            pushing: None,
            config_after_iterables,
            wrong,
            called_off: false,
            orderly: true,
            hangs,
            removing: Vec::new(),
        }
    }

    /// Notes a packet that is sent, and whether a good source would have sent it.
    fn note(&mut self, packet: Sent) {
        let dev = &mut self.devices[packet.device];
        let Sent { index, config, .. } = packet;
        let fresh = !dev.data.contains(&index) && !dev.configs.contains(&index);
        let in_place = fresh
            && index < 0x1000_0000
            && match dev.configs.first() {
                Some(&last) => !config && index < last,
                // Packets overtake each other, but a config is a source's last.
                None => !config || dev.data.last().is_none_or(|&last| last < index),
            };
        // What comes for a device that has gone is read past, whatever it is.
        self.wrong |= !in_place && !dev.removed;
        self.orderly &= index == dev.next || dev.removed;
        if config {
            dev.configs.insert(index);
        } else {
            dev.data.insert(index);
        }
        while dev.data.contains(&dev.next) {
            dev.next += 1;
        }
    }

    fn send(&mut self, input: &mut Input<'_>) {
        let at = input.below(self.channels.len());
        let device = input.below(self.devices.len());
        let how = input.byte();
        if self.channels[at].over {
            return;
        }
        self.channels[at].send_rest();
        let packet = Sent {
            device,
            index: input.index(self.devices[device].next),
            config: how & 7 == 7,
        };
        let frame = self.devices[device].frame(packet);
        self.note(packet);
        let chan = &mut self.channels[at];
        chan.sent.push((packet, true));
        match how >> 4 {
            0..=7 => chan.push(&frame),
            8..=11 => {
                // Two pieces, both at once.
                let cut = usize::from(input.byte()) * frame.len() / 256;
                chan.push(&frame[..cut]);
                chan.push(&frame[cut..]);
            }
            12..=14 => {
                // The rest comes later, or never.
                let cut = usize::from(input.byte()) * frame.len() / 256;
                chan.push(&frame[..cut]);
                chan.rest = frame[cut..].to_vec();
                if let Some((_, whole)) = chan.sent.last_mut() {
                    *whole = chan.rest.is_empty();
                }
            }
            _ => {
                // In crumbs.
                let step = 1 + input.below(40);
                for crumb in frame.chunks(step.max(frame.len() / 64)) {
                    chan.push(crumb);
                }
            }
        }
    }

    /// Sends what must be refused, on a channel that sends nothing after it.
    fn send_wrong(&mut self, input: &mut Input<'_>) {
        let at = input.below(self.channels.len());
        if self.channels[at].over {
            return;
        }
        self.channels[at].send_rest();
        let key = DeviceKey::new(&self.devices[0].id);
        let mut bytes = wire::encode_packet(&key, 0, false, 5).to_vec();
        let place = input.below(bytes.len());
        match input.below(5) {
            0 => bytes[place] ^= input.byte().max(1),
            1 => bytes[272..276].copy_from_slice(&(input.word() | 1 << 31).to_be_bytes()),
            2 => bytes = wire::Kind::Ram { flags: 0 }.encode().to_vec(),
            3 => bytes.truncate(place),
            _ => {
                self.channels[at]
                    .feed
                    .push(Piece::Fails(io::ErrorKind::ConnectionReset));
                bytes.clear();
            }
        }
        // One that is still good would be somebody's packet.
        let mut framer = wire::Framer::new(PageSize::new(4096).ok(), wire::DEFAULT_MAX_PACKET);
        let hello = Hello {
            uuid: [0; 16],
            id: 0,
        }
        .encode();
        framer.decode(&hello).expect("a good hello");
        if let Ok(wire::Step::Frame {
            frame: wire::Frame::DeviceState(packet),
            ..
        }) = framer.decode(&bytes)
            && self
                .devices
                .iter()
                .any(|dev| packet.header.key() == DeviceKey::new(&dev.id))
        {
            return;
        }
        self.wrong = true;
        let chan = &mut self.channels[at];
        chan.push(&bytes);
        chan.feed.push(Piece::End);
        chan.over = true;
    }

    fn push(&mut self, input: &mut Input<'_>) {
        let pushing = match &self.pushing {
            Some(pushing) => pushing.clone(),
            None => self.begin_pushing(),
        };
        if pushing.over.get() {
            return;
        }
        let device = input.below(self.devices.len());
        let how = input.byte();
        let packet = Sent {
            device,
            index: input.index(self.devices[device].next),
            config: how & 7 == 7,
        };
        if packet.index == u32::MAX {
            return;
        }
        let dev = &self.devices[device];
        let header = wire::PacketHeader {
            index: packet.index,
            config: packet.config,
        };
        let mut payload = header.encode().to_vec();
        payload.extend(dev.payload(packet));
        let push = match how >> 6 {
            0 => Push::Try(device, packet, payload),
            1 => Push::Lease(device, packet, payload),
            _ => Push::Wait(device, packet, payload),
        };
        // A packet that could not be had now is not there, and nobody sends it again.
        self.wrong |= matches!(push, Push::Try(..));
        self.note(packet);
        pushing.asked.borrow_mut().push(push);
    }

    fn begin_pushing(&mut self) -> Rc<Pushing> {
        // Where the input has ended before, nothing can be brought any more.
        self.wrong |= self.channels.iter().all(|chan| chan.over);
        let pushing = Rc::new(Pushing::default());
        self.pushing = Some(pushing.clone());
        let (session, shared) = (self.session.clone(), pushing.clone());
        let ids: Vec<_> = (0..8).map(id).collect();
        steps::spawn("pushing".into(), move || {
            let mut publisher = session.publisher();
            drop(session);
            loop {
                shared.busy.set(false);
                let push = steps::wait_for(|| {
                    let mut asked = shared.asked.borrow_mut();
                    (!asked.is_empty()).then(|| asked.remove(0))
                });
                shared.busy.set(true);
                let (packet, taken) = match push {
                    Push::Quit => return,
                    Push::Wait(device, packet, payload) => {
                        (packet, publisher.push(&ids[device], &payload).is_ok())
                    }
                    Push::Try(device, packet, payload) => (
                        packet,
                        matches!(publisher.try_push(&ids[device], &payload), Ok(true)),
                    ),
                    Push::Lease(device, packet, payload) => {
                        let header = wire::PacketHeader {
                            index: packet.index,
                            config: packet.config,
                        };
                        let data = &payload[wire::PACKET_HEADER_LEN..];
                        let lease = publisher.lease(&ids[device], header, data.len());
                        let published = lease.and_then(|mut lease| {
                            lease.bytes_mut().copy_from_slice(data);
                            lease.publish()
                        });
                        (packet, published.is_ok())
                    }
                };
                shared.done.borrow_mut().push((packet, taken));
            }
        });
        pushing
    }

    fn remove(&mut self, input: &mut Input<'_>) {
        let at = input.below(self.devices.len());
        if self.devices[at].removed {
            return;
        }
        self.devices[at].removed = true;
        // What has failed because of it before is not taken back.
        self.wrong |= self.session.failure().is_some();
        let session = self.session.clone();
        let id = self.devices[at].id.clone();
        let strand = steps::spawn(format!("removing {id}"), move || {
            // A device that failed before is gone as well.
            let _device = session.remove_device(&id);
        });
        self.removing.push(strand);
    }

    fn add(&mut self, input: &mut Input<'_>) {
        let at = self.devices.len();
        let (dev, device, bad) = make(at, input, false);
        let session = self.session.clone();
        let added = Rc::new(Cell::new(false));
        let result = added.clone();
        let strand = steps::spawn(format!("adding {at}"), move || {
            result.set(session.add_device(device).is_ok());
        });
        assert!(steps::is_done(strand), "a device is there at once");
        if added.get() {
            self.wrong |= bad;
            self.devices.push(dev);
        }
    }

    fn switchover(&mut self) {
        self.session.switchover_start();
        for dev in &mut self.devices {
            dev.started = true;
        }
    }

    fn config_ready(&mut self, at: usize) {
        let dev = &mut self.devices[at];
        let told = self.session.config_load_ready(&dev.id);
        let good = self.config_after_iterables && !dev.ready && !dev.removed;
        assert!(
            told.is_err() || good,
            "a second notice, or one that nobody wants"
        );
        dev.ready = true;
        // One for a device that has gone is refused, and that is all.
        self.wrong |= !good && !dev.removed;
    }

    /// One step of the input.
    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() {
            0..=99 => self.send(input),
            100..=149 => {
                let at = input.below(steps::count());
                steps::resume(at);
            }
            150..=169 => {
                let at = input.below(self.devices.len());
                let most = input.one_of(&[1, 100, 4096, 65_536]);
                self.devices[at].drain.drain(most);
            }
            170..=199 => self.push(input),
            200..=209 => self.switchover(),
            210..=214 => {
                let at = input.below(self.channels.len());
                self.channels[at].send_rest();
            }
            215..=234 => self.settle(),
            235..=239 => {
                let at = input.below(self.devices.len());
                self.config_ready(at);
            }
            240..=243 => self.send_wrong(input),
            244..=246 => {
                let at = input.below(self.channels.len());
                let chan = &mut self.channels[at];
                self.wrong |= !chan.rest.is_empty();
                chan.rest.clear();
                chan.feed.push(Piece::End);
                chan.over = true;
            }
            247 | 248 => self.remove(input),
            249..=251 => self.add(input),
            252 => {
                self.session.cancel();
                self.called_off = true;
                self.wrong = true;
            }
            253 => {
                let error = Error::new(ErrorKind::Channel, Phase::Section);
                self.session.fail(error);
                self.wrong = true;
            }
            254 => {
                let at = input.below(self.devices.len());
                let len = 1 + input.below(100);
                // It fails where the device is not there, or has begun.
                if self.devices[at].data.is_empty() && !self.devices[at].started {
                    let _told = self.session.write_iterable(&id(99), &vec![0; len]);
                }
            }
            _ => {
                let _stats = self.session.stats();
                let _fd = self.session.is_finished();
            }
        }
        for dev in &self.devices {
            dev.check_prefix();
        }
    }

    /// Lets everybody get on as far as they can, and checks what must then hold.
    fn settle(&self) {
        let drains: Vec<_> = self.devices.iter().map(|dev| dev.drain.clone()).collect();
        let drain = || {
            drains
                .iter()
                .map(|drain| drain.drain(65_536))
                .sum::<usize>()
                > 0
        };
        steps::settle(drain);
        steps::pass_bounds(drain);
        let stats = self.session.stats();
        assert_eq!(
            stats.late_wakeups,
            0,
            "nobody was told: {:?}",
            steps::sleeping()
        );
        assert!(stats.held_high <= stats.budget, "{stats:?}");
        for dev in &self.devices {
            dev.check_prefix();
        }
        if let Some(error) = self.session.failure() {
            let over = self.channels.iter().all(|chan| chan.over);
            assert!(self.wrong || over, "nothing was wrong, and yet: {error}");
            return;
        }
        let (accepted, waiting) = self.accepted(&stats);
        for (at, dev) in self.devices.iter().enumerate() {
            if !dev.started || dev.removed || self.hangs {
                continue;
            }
            let taken = |index, config| accepted.contains(&(at, index, config));
            let first = (0..).find(|&index| !taken(index, false)).expect("few");
            let whole: usize = (0..first).map(|index| dev.size(index)).sum();
            let got = dev.drain.got();
            assert!(
                got.bytes.len() >= whole,
                "{}: {} bytes of {whole} up to idx {first}: {:?}, {:?}, {stats:?}",
                dev.id,
                got.bytes.len(),
                steps::sleeping(),
                self.channels
                    .iter()
                    .map(|chan| &chan.sent)
                    .collect::<Vec<_>>(),
            );
            // A device's reserve may be held by half a packet that another channel has brought, or
            // brings: a wrong source's doing, which time ends.
            let mut halves = self.channels.iter().flat_map(|chan| chan.sent.last());
            let half = halves
                .any(|(packet, whole)| !whole && packet.device == at && packet.index <= first);
            for packet in waiting.iter().filter(|_| !half) {
                assert!(
                    (packet.device, packet.index) != (at, first),
                    "{}: idx {first} is next, and waits: {:?}, {:?}",
                    dev.id,
                    steps::sleeping(),
                    self.channels
                        .iter()
                        .map(|chan| &chan.sent)
                        .collect::<Vec<_>>(),
                );
            }
            let ready = dev.ready || !self.config_after_iterables;
            if taken(first, true) && ready {
                assert!(
                    got.config.is_some(),
                    "{}: the config is there, and waits",
                    dev.id
                );
                assert_eq!(got.states.last(), Some(&DeviceState::Stop));
            }
        }
    }

    /// What has been accepted by now, and what waits. Everybody has had a turn.
    fn accepted(&self, stats: &vfio_migration::Stats) -> (BTreeSet<(usize, u32, bool)>, Vec<Sent>) {
        let mut accepted = BTreeSet::new();
        let mut waiting = Vec::new();
        let mut take = |packet: &Sent| {
            accepted.insert((packet.device, packet.index, packet.config));
        };
        for (at, chan) in self.channels.iter().enumerate() {
            let announced = usize::try_from(stats.channels[at].packets).expect("few");
            match steps::place(&format!("channel {at}")) {
                Some(Place::Wait) => {
                    chan.sent[..announced - 1]
                        .iter()
                        .for_each(|(packet, _)| take(packet));
                    waiting.push(chan.sent[announced - 1].0);
                }
                _ => chan
                    .sent
                    .iter()
                    .filter(|(_, whole)| *whole)
                    .for_each(|(packet, _)| take(packet)),
            }
        }
        if let Some(pushing) = &self.pushing {
            let done = pushing.done.borrow();
            done.iter()
                .filter(|(_, taken)| *taken)
                .for_each(|(packet, _)| take(packet));
        }
        (accepted, waiting)
    }

    /// Brings the load to an end, and checks its report.
    fn end(mut self, input: &mut Input<'_>) {
        let how = input.below(8);
        if let Some(pushing) = &self.pushing {
            pushing.asked.borrow_mut().push(Push::Quit);
            pushing.over.set(true);
        }
        for chan in self.channels.iter_mut().filter(|chan| !chan.over) {
            chan.send_rest();
            chan.feed.push(Piece::End);
            chan.over = true;
        }
        if how < 6 {
            self.switchover();
            for at in 0..self.devices.len() {
                if self.config_after_iterables
                    && !self.devices[at].ready
                    && !self.devices[at].removed
                {
                    self.config_ready(at);
                }
            }
            self.settle();
        }
        if self.hangs || how == 6 {
            self.session.cancel();
            self.called_off = true;
            self.wrong = true;
            self.settle();
        }
        for &strand in &self.removing {
            assert!(steps::is_done(strand), "{:?}", steps::sleeping());
        }
        if self.waits_for_ever() {
            // For room that only time would end: a source that keeps to the order is never so.
            let good = self.orderly && !self.wrong;
            assert!(!good, "a deadlock: {:?}", steps::sleeping());
            self.wrong = true;
            self.called_off = true;
            self.session.cancel();
            self.settle();
        }
        let complete = self
            .devices
            .iter()
            .all(|dev| dev.removed || dev.configs.first() == Some(&dev.next));
        let Self {
            session,
            devices,
            wrong,
            called_off,
            ..
        } = self;
        let session = Rc::try_unwrap(session).expect("nobody else has it any more");
        let report = join(session, &devices, how == 7);
        match &report.result {
            Ok(()) => assert!(complete || wrong, "not all was there"),
            Err(error) => {
                assert!(!error.to_string().is_empty());
                assert!(
                    wrong || !complete || how == 7,
                    "nothing was wrong, and yet: {error}"
                );
                let called_off = called_off || how == 7;
                assert!(called_off || !error.is_cancelled(), "who did? {error}");
                if *error.kind() == ErrorKind::Missing {
                    let dev = devices.iter().find(|dev| Some(&dev.id) == error.device());
                    let dev = dev.expect("it names a device");
                    let index = error.index().expect("it names an idx");
                    let whole: usize = (0..index).map(|index| dev.size(index)).sum();
                    assert_eq!(
                        dev.drain.got().bytes.len(),
                        whole,
                        "idx {index} is the first"
                    );
                }
            }
        }
        assert_eq!(report.abandoned_threads, 0);
        assert_eq!(report.stats.late_wakeups, 0);
        for device in &report.devices {
            let dev = devices.iter().find(|dev| dev.id == device.id);
            let dev = dev.expect("one of ours");
            let state = device.device.as_ref().expect("none is stuck").state();
            let got = dev.drain.got();
            match &device.result {
                Ok(()) => {
                    assert!(got.config.is_some());
                    // Of a load that failed nothing is left in any device.
                    assert_ne!(state, DeviceState::Resuming);
                    match &report.result {
                        Ok(()) => assert_eq!(state, DeviceState::Stop),
                        Err(_) => assert!(got.resets > 0),
                    }
                }
                Err(_) => assert!(
                    state != DeviceState::Resuming && got.resets > 0 || state == DeviceState::Stop
                ),
            }
        }
        drop(report);
        for dev in &devices {
            dev.check_prefix();
        }
    }

    /// Whether some channel waits for room that nobody will make.
    fn waits_for_ever(&self) -> bool {
        self.session.failure().is_none()
            && steps::sleeping().iter().any(|(name, place)| {
                (name.starts_with("channel") || name == "pushing") && *place == Place::Wait
            })
    }
}

fn join(session: LoadSession, devices: &[Dev], cleanup: bool) -> Report {
    let report = Rc::new(RefCell::new(None));
    let place = report.clone();
    steps::spawn("joining".into(), move || {
        let ended = if cleanup {
            session.cleanup()
        } else {
            session.join()
        };
        *place.borrow_mut() = Some(ended);
    });
    steps::settle(|| devices.iter().any(|dev| dev.drain.drain(65_536) > 0));
    let report = report.borrow_mut().take();
    report.unwrap_or_else(|| panic!("it never ends: {:?}", steps::sleeping()))
}

fn make(
    at: usize,
    input: &mut Input<'_>,
    bad_configs: bool,
) -> (Dev, vfio_migration::Device, bool) {
    let loader = match input.byte() {
        250..=252 if bad_configs => Loader::Refuses,
        253..=255 if bad_configs => Loader::Short,
        _ => Loader::Good,
    };
    let id = id(at);
    let sizes = std::array::from_fn(|_| input.one_of(&SIZES));
    // Long enough that a loader can leave something.
    let config_len = match loader {
        Loader::Short => 10,
        _ => input.one_of(&[10, 0, 1, 5000, 70_000]),
    };
    let (device, drain) = device(&id, loader);
    let dev = Dev {
        id,
        drain,
        sizes,
        config_len,
        data: BTreeSet::new(),
        configs: BTreeSet::new(),
        next: 0,
        started: false,
        ready: false,
        removed: false,
        seen: RefCell::default(),
    };
    (dev, device, loader != Loader::Good)
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
