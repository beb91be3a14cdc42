//! A load under way: its devices, its channels, what was sent, and how it starts.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    rc::Rc,
    time::Duration,
};

use vfio_migration::{
    DeviceId, LoadSession, Settings, Writer,
    wire::{self, DeviceKey, Hello},
};
use vfio_migration_uring::sim::{Fault, FaultPlan, SimConfig};

use crate::{
    device::{Drain, Loader, device},
    input::Input,
    source::{self, HOUR, id},
    steps,
    stream::{Feed, Piece},
};

/// Data sizes: none, tiny, about a page, about a reserve, beyond a buffer.
pub(super) const SIZES: [usize; 10] = [0, 1, 7, 100, 4095, 4096, 4097, 20_000, 65_536, 70_001];

/// A packet as it was sent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Sent {
    pub(super) device: usize,
    pub(super) index: u32,
    pub(super) config: bool,
}

/// One device of the run.
pub(super) struct Dev {
    pub(super) id: DeviceId,
    pub(super) drain: Drain,
    pub(super) sizes: [usize; 4],
    pub(super) config_len: usize,
    /// Which idx have been sent as data, whole or not, by whomever.
    pub(super) data: BTreeSet<u32>,
    /// And as config.
    pub(super) configs: BTreeSet<u32>,
    /// The next idx that a good source would send.
    pub(super) next: u32,
    pub(super) started: bool,
    pub(super) ready: bool,
    pub(super) removed: bool,
    pub(super) seen: RefCell<Seen>,
}

impl Dev {
    pub(super) fn size(&self, index: u32) -> usize {
        self.sizes[index as usize % self.sizes.len()]
    }

    /// A packet's data: each packet's own, so that none can stand for another.
    pub(super) fn bytes(&self, index: u32, len: usize) -> impl Iterator<Item = u8> {
        let seed =
            u64::from(index).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(self.id.instance());
        source::bytes(seed, len)
    }

    pub(super) fn data_of(&self, index: u32) -> impl Iterator<Item = u8> {
        self.bytes(index, self.size(index))
    }

    pub(super) fn config_of(&self, index: u32) -> Vec<u8> {
        self.bytes(!index, self.config_len).collect()
    }

    pub(super) fn payload(&self, packet: Sent) -> Vec<u8> {
        if packet.config {
            wire::wrap_config(&self.config_of(packet.index))
        } else {
            self.data_of(packet.index).collect()
        }
    }

    pub(super) fn frame(&self, packet: Sent) -> Vec<u8> {
        let payload = self.payload(packet);
        let len = u32::try_from(payload.len()).expect("small");
        let key = DeviceKey::new(&self.id);
        let mut bytes = wire::encode_packet(&key, packet.index, packet.config, len).to_vec();
        bytes.extend(payload);
        bytes
    }
}

/// How much of what a device got has been looked at.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) len: usize,
    pub(super) index: u32,
    pub(super) within: usize,
    pub(super) config: bool,
}

/// One channel of the run.
pub(super) struct Chan {
    pub(super) feed: Feed,
    /// Its packets that are announced in full, in their order, and whether all of each was sent.
    pub(super) sent: Vec<(Sent, bool)>,
    /// What of the last packet has not been sent.
    pub(super) rest: Vec<u8>,
    /// Nothing more may be sent.
    pub(super) over: bool,
}

impl Chan {
    pub(super) fn push(&self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.feed.push(Piece::Bytes(bytes.to_vec()));
        }
    }

    pub(super) fn send_rest(&mut self) {
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
pub(super) enum Push {
    Wait(usize, Sent, Vec<u8>),
    Try(usize, Sent, Vec<u8>),
    Lease(usize, Sent, Vec<u8>),
    Quit,
}

/// The pushing thread.
#[derive(Default)]
pub(super) struct Pushing {
    pub(super) asked: RefCell<Vec<Push>>,
    /// Those that returned, and whether the packet was taken.
    pub(super) done: RefCell<Vec<(Sent, bool)>>,
    pub(super) busy: Cell<bool>,
    /// Whether it was told to quit.
    pub(super) over: Cell<bool>,
}

/// A load under way.
pub(super) struct Run {
    pub(super) session: Rc<LoadSession>,
    pub(super) devices: Vec<Dev>,
    pub(super) channels: Vec<Chan>,
    pub(super) pushing: Option<Rc<Pushing>>,
    pub(super) config_after_iterables: bool,
    /// Something was wrong, so the load may fail.
    pub(super) wrong: bool,
    /// The load was called off.
    pub(super) called_off: bool,
    /// Every packet was the next one of its device when it was sent.
    pub(super) orderly: bool,
    /// An operation hangs until it is cancelled.
    pub(super) hangs: bool,
    pub(super) removing: Vec<usize>,
}

impl Run {
    pub(super) fn start(input: &mut Input<'_>) -> Self {
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
        settings.writer = if flags & 16 != 0 {
            Writer::Auto
        } else {
            Writer::Ring
        };
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
            let (dev, device, bad) = make(at, input, flags & 8 != 0, flags & 32 != 0);
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
}

pub(super) fn make(
    at: usize,
    input: &mut Input<'_>,
    bad_configs: bool,
    in_memory: bool,
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
    let (device, drain) = device(&id, loader, in_memory);
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
