//! What one migration is: all of it from a seed.

use std::time::Duration;

use vfio_migration::{
    Backend, DeviceId, DeviceState, Settings, Spill, Writer,
    migration::{Capabilities, OnOffAuto, SwitchoverAck},
    sim::{
        CallFault, Callback, Fault as CallEnd, On, SimConfig, Stall, Stream, TransitionFault, Which,
    },
};
use vfio_migration_uring::sim::{Fault, FaultPlan, SimConfig as RingConfig};

use crate::{cast::Cast, random::Random};

/// What goes wrong.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Scene {
    /// Nothing: it must succeed.
    Clean,
    /// Rings are short, late, interrupted, out of order: it must succeed.
    RoughRing,
    /// An operation of a ring fails, or never ends.
    RingFault,
    /// A callback or a change of state of a device fails, or its stream does.
    DeviceFault,
    /// Somebody cancels.
    Cancel,
    /// Somebody drops a session.
    Drop,
    /// The source is a process of its own, and is killed.
    SourceKilled,
    /// The destination is.
    DestinationKilled,
    /// One of them is, and is not killed: it must succeed.
    TwoProcesses,
    /// All are processes of the command, and nothing goes wrong: it must succeed.
    Commands,
    /// And something does.
    CommandsDisturbed,
}

/// What is between the two sessions, and around them.
#[derive(Clone, Debug)]
pub enum Way {
    /// Connections alone.
    Direct,
    /// RAM packets, and so many SYNC barriers on each channel, beside the device state.
    Shared { barriers: u32 },
    /// Somebody else receives the packets, and pushes them.
    Pushed,
    /// A relay.
    Relayed,
    /// The life cycle: PRE_COPY, a main channel, the switchover.
    Whole(Cycle),
    /// Processes of the command.
    Processes(Box<Cast>),
}

impl Way {
    /// For a human.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Direct => "sessions alone",
            Self::Shared { .. } => "RAM and barriers on the channels",
            Self::Pushed => "packets pushed",
            Self::Relayed => "a relay between",
            Self::Whole(cycle) if cycle.over_channels => "life cycle, PRE_COPY over the channels",
            Self::Whole(_) => "life cycle",
            Self::Processes(_) => "processes of the command",
        }
    }
}

/// What both ends of a life cycle have agreed on.
#[derive(Clone, Debug)]
pub struct Cycle {
    pub over_channels: bool,
    pub ack: SwitchoverAck,
    pub config: OnOffAuto,
    /// Of each device: whether its data goes over the main channel, and what is set of its config.
    pub devices: Vec<(bool, Option<OnOffAuto>)>,
}

impl Cycle {
    pub fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::default();
        capabilities.switchover_ack = self.ack;
        capabilities.config_after_iterables = self.config;
        capabilities.precopy_over_channels = self.over_channels;
        capabilities
    }
}

/// Where a session's bytes move.
#[derive(Clone, Debug)]
pub enum RingKind {
    Real(Backend),
    Simulated(RingConfig),
}

/// Which side.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Side {
    Save,
    Load,
}

/// One migration.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub scene: Scene,
    pub way: Way,
    pub devices: Vec<(SimConfig, SimConfig)>,
    pub channels: usize,
    pub tcp: bool,
    pub save: Settings,
    pub load: Settings,
    pub save_ring: RingKind,
    pub load_ring: RingKind,
    /// When, and on whom, in the scenes that need it.
    pub after: Duration,
    pub victim: Side,
}

/// How many of a hundred migrations are processes of the command.
const PROCESSES: u64 = 15;

impl Scene {
    /// Whether the migration must succeed.
    pub const fn must_succeed(self) -> bool {
        matches!(
            self,
            Self::Clean | Self::RoughRing | Self::TwoProcesses | Self::Commands
        )
    }

    /// Whether one side is a process of its own.
    pub const fn has_peer(self) -> bool {
        matches!(
            self,
            Self::SourceKilled | Self::DestinationKilled | Self::TwoProcesses
        )
    }
}

impl Plan {
    pub fn new(seed: u64) -> Self {
        let mut random = Random(seed ^ 0x5eed_50a4);
        // Of its own, as below.
        let mut others = Random(seed ^ 0x970c);
        let cast = others.percent(PROCESSES).then(|| Cast::new(&mut others));
        let scene = random.of(&[
            Scene::Clean,
            Scene::Clean,
            Scene::Clean,
            Scene::RoughRing,
            Scene::RoughRing,
            Scene::RingFault,
            Scene::RingFault,
            Scene::DeviceFault,
            Scene::DeviceFault,
            Scene::DeviceFault,
            Scene::Cancel,
            Scene::Cancel,
            Scene::Cancel,
            Scene::Drop,
            Scene::SourceKilled,
            Scene::DestinationKilled,
            Scene::TwoProcesses,
        ]);
        let count = random.of(&[1, 1, 2, 2, 3, 4, 8, 16]);
        let mut devices: Vec<_> = (0..count).map(|at| pair(&mut random, seed, at)).collect();
        let save_ring = ring(&mut random, scene, seed);
        let load_ring = ring(&mut random, scene, seed ^ 1);
        if scene == Scene::DeviceFault {
            let at = random.below(devices.len() as u64);
            let (source, destination) = &mut devices[usize::try_from(at).expect("a few")];
            let config = if random.percent(50) {
                source
            } else {
                destination
            };
            spoil(&mut random, config);
        }
        let (save, mut load) = settings(&mut random, scene, devices.len());
        // Of its own: the rest of a seed's plan is what it was before there were ways.
        let mut more = Random(seed ^ 0x3a75);
        let way = way(&mut more, scene, devices.len());
        spilling(&mut more, &way, &mut load, devices.len());
        if let Way::Whole(_) = way {
            for (source, destination) in &mut devices {
                source.precopy_initial = more.below(source.len + 1);
                for config in [source, destination] {
                    // This thread reads and writes where the main channel carries the data, and
                    // nothing could end that.
                    if let Some(stall) = &mut config.faults.stall {
                        stall.time.get_or_insert(Duration::from_millis(20));
                    }
                }
            }
        }
        if let Way::Shared { .. } = way {
            for (_, destination) in &mut devices {
                // Longer than a packet waits before it is spilled.
                if more.percent(50) {
                    let at = more.below(destination.len.max(1));
                    let time = Some(Duration::from_millis(60));
                    let stall = &mut destination.faults.stall;
                    stall.get_or_insert(Stall { at, time });
                }
            }
        }
        let (scene, way) = match cast {
            Some(cast) if cast.must_succeed() => (Scene::Commands, Way::Processes(Box::new(cast))),
            Some(cast) => (Scene::CommandsDisturbed, Way::Processes(Box::new(cast))),
            None => (scene, way),
        };
        Self {
            seed,
            scene,
            way,
            channels: random.of(&[1, 1, 2, 3, 4, 8]),
            tcp: random.percent(40),
            save,
            load,
            save_ring,
            load_ring,
            after: Duration::from_micros(random.below(30_000)),
            victim: random.of(&[Side::Save, Side::Load]),
            devices,
        }
    }
}

fn way(random: &mut Random, scene: Scene, devices: usize) -> Way {
    if scene.has_peer() {
        return Way::Direct;
    }
    match random.below(10) {
        0..3 => Way::Direct,
        // A session is lent to those who push, and a life cycle is one thread's: nobody drops these.
        3 if scene != Scene::Drop => Way::Pushed,
        4..7 if scene != Scene::Drop => Way::Whole(Cycle {
            over_channels: random.percent(60),
            ack: random.of(&[
                SwitchoverAck::Off,
                SwitchoverAck::Once,
                SwitchoverAck::Reusable,
            ]),
            config: random.of(&[OnOffAuto::Off, OnOffAuto::On]),
            devices: (0..devices)
                .map(|_| {
                    let config = [None, None, Some(OnOffAuto::On), Some(OnOffAuto::Off)];
                    (random.percent(20), random.of(&config))
                })
                .collect(),
        }),
        3..6 | 7 => Way::Relayed,
        _ => Way::Shared {
            barriers: u32::try_from(random.below(20)).expect("a few"),
        },
    }
}

/// Where packets go beyond the budget; and where barriers are, a budget that makes them.
fn spilling(random: &mut Random, way: &Way, load: &mut Settings, devices: usize) {
    let directory = Spill::Directory(std::env::temp_dir());
    if let Way::Shared { .. } = way {
        let some = 4096 + random.size(60_000);
        load.budget = Some(devices * some);
        // What is beyond the window waits, spilled or not, and so could all.
        load.window = 1 << 16;
        load.spill = random.of(&[Spill::Auto, Spill::Auto, Spill::Memfd, directory]);
        return;
    }
    load.spill = random.of(&[Spill::Auto, Spill::Off, Spill::Memfd, directory]);
    load.spill_limit = random.of(&[64 << 10, 1 << 20, 1 << 30]);
}

/// A device's name.
pub fn id(at: usize) -> DeviceId {
    DeviceId::new(format!("0000:00:{at:02x}.0/vfio"), 0).expect("a short name")
}

fn pair(random: &mut Random, seed: u64, at: u64) -> (SimConfig, SimConfig) {
    // From the header alone to 4 MiB, each size class as often.
    let len = 24 + random.next() % (1 << random.below(23));
    let streams = [
        Stream::Pipe,
        Stream::Pipe,
        Stream::Socket,
        Stream::PlainWrite,
        Stream::Memfd,
    ];
    let mut config = |seed| SimConfig {
        seed,
        len,
        stream: random.of(&streams),
        config_len: u32::try_from(random.below(5000)).expect("small"),
        buffer: random.percent(30).then(|| 4096 << random.below(6)),
        piece: random.percent(20).then(|| 1 + random.size(20_000)),
        ..SimConfig::default()
    };
    let source = config(seed.wrapping_mul(31) + at);
    let destination = config(!seed);
    (source, destination)
}

fn ring(random: &mut Random, scene: Scene, seed: u64) -> RingKind {
    let percent = |random: &mut Random| random.of(&[0, 0, 1, 10, 40]);
    match scene {
        Scene::RoughRing => RingKind::Simulated(RingConfig {
            seed,
            short: percent(random),
            interrupt: percent(random),
            again: percent(random),
            delay: percent(random),
            reorder: true,
            ..RingConfig::default()
        }),
        Scene::RingFault => {
            let errno = libc_errno(random);
            let fault = random.of(&[
                Fault::Errno(errno),
                Fault::Errno(errno),
                Fault::Short(0),
                Fault::Hang,
            ]);
            let bits = random.below(8);
            let at = random.below(1 << bits);
            RingKind::Simulated(RingConfig {
                seed,
                reorder: true,
                plan: FaultPlan::new().with(at, fault),
                ..RingConfig::default()
            })
        }
        _ => RingKind::Real(random.of(&[Backend::Uring, Backend::Auto, Backend::Blocking])),
    }
}

fn libc_errno(random: &mut Random) -> i32 {
    use nix::errno::Errno;
    random.of(&[
        Errno::EIO,
        Errno::ENOSPC,
        Errno::ENODEV,
        Errno::ENOMEM,
        Errno::EPIPE,
        Errno::EINTR,
        Errno::EAGAIN,
    ]) as i32
}

/// Lets something of a device go wrong.
fn spoil(random: &mut Random, config: &mut SimConfig) {
    let states = [
        None,
        Some(DeviceState::Stop),
        Some(DeviceState::Running),
        Some(DeviceState::Error),
    ];
    match random.below(4) {
        0 => config.faults.transitions.push(TransitionFault {
            on: On::Any,
            which: random.of(&[Which::Nth(0), Which::Nth(1), Which::From(0), Which::From(1)]),
            errno: libc_errno(random),
            leaves: random.of(&states),
        }),
        1 => {
            let errno = libc_errno(random);
            config.faults.calls.push(CallFault {
                callback: random.of(&Callback::ALL[2..]),
                which: random.of(&[Which::Every, Which::Nth(0), Which::Nth(1)]),
                fault: random.of(&[CallEnd::Errno(errno), CallEnd::Panic]),
            });
        }
        2 => config.faults.fail_at = Some(random.next() % config.len.max(1)),
        _ => {
            config.faults.stall = Some(Stall {
                at: random.next() % config.len.max(1),
                time: random.of(&[None, Some(Duration::from_millis(20))]),
            });
        }
    }
}

fn settings(random: &mut Random, scene: Scene, devices: usize) -> (Settings, Settings) {
    let packet = random.of(&[512, 4 << 10, 20_000, 64 << 10, 1 << 20]);
    let mut save = Settings::default();
    save.grace = Duration::from_secs(5);
    save.no_progress = if scene.must_succeed() {
        // So that a machine that stands still fails nothing.
        Duration::from_secs(1800)
    } else {
        Duration::from_secs(1)
    };
    save.hello_timeout = save.no_progress;
    let mut load = save.clone();
    save.data_len = Some(packet);
    let least = packet + 4096;
    save.budget = random.of(&[None, Some(least), Some(least * 2), Some(8 << 20)]);
    let some = 20_000 + random.size(300_000);
    load.budget = random.of(&[
        None,
        Some(devices * 4096),
        Some(devices * some),
        Some(devices * (2 << 20)),
    ]);
    load.buffer_len = random.of(&[4096, 64 << 10, 1 << 20]);
    load.window = random.of(&[1, 3, 100, 1 << 16]);
    load.config_after_iterables = random.percent(20);
    load.writer = random.of(&[Writer::Ring, Writer::Auto, Writer::Auto]);
    (save, load)
}
