//! A VMM's integration for tests: a source and a destination of simulated devices, one main
//! channel in memory, multifd channels over socket pairs, all of it step by step on one thread.

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use vfio_migration::{
    Device, DeviceId, DeviceState, LoadSession, MigrationFlags, Result, SaveSession, Settings,
    SourceChannels, Stats,
    migration::{
        Capabilities, DeviceSettings, Incoming, MigratableDevice, OnOffAuto, Outgoing,
        OutgoingDevice, Saved, SwitchoverAck, SwitchoverAcks, vm,
    },
    sim::{Faults, SimConfig, SimDevice, SimHandle},
    stream::{Command, Event, Reader, Section, SectionKind, Writer},
};

/// What a test wants to be different.
#[derive(Clone, Debug)]
pub struct Setup {
    pub devices: u32,
    pub len: u64,
    pub precopy_initial: u64,
    pub flags: MigrationFlags,
    pub state: DeviceState,
    pub channels: u32,
    pub transfer: OnOffAuto,
    /// Every second device does not use the channels.
    pub mixed: bool,
    pub ack: SwitchoverAck,
    pub config_after_iterables: OnOffAuto,
    /// What is set of every second device, beginning with the first.
    pub config_of_odd: Option<OnOffAuto>,
    pub delays: Vec<(DeviceState, Duration)>,
    /// PRE_COPY data goes over the channels too.
    pub over_channels: bool,
    /// The channels' sockets do not block.
    pub nonblocking: bool,
    /// Of both ends' sessions.
    pub settings: Settings,
    /// How long the VM runs on, on both ends set up, before it stops.
    pub hold: Duration,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            devices: 1,
            len: 3 << 20,
            precopy_initial: 100_000,
            flags: MigrationFlags::STOP_COPY | MigrationFlags::P2P | MigrationFlags::PRE_COPY,
            state: DeviceState::Running,
            channels: 2,
            transfer: OnOffAuto::Auto,
            mixed: false,
            ack: SwitchoverAck::Off,
            config_after_iterables: OnOffAuto::Off,
            config_of_odd: None,
            delays: Vec::new(),
            over_channels: false,
            nonblocking: false,
            settings: Settings::default(),
            hold: Duration::ZERO,
        }
    }
}

impl Setup {
    pub fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::default();
        capabilities.switchover_ack = self.ack;
        capabilities.config_after_iterables = self.config_after_iterables;
        capabilities.precopy_over_channels = self.over_channels;
        capabilities
    }

    pub fn config(&self, seed: u64) -> SimConfig {
        SimConfig {
            seed,
            len: self.len,
            precopy_initial: self.precopy_initial,
            flags: self.flags,
            state: self.state,
            faults: Faults {
                delays: self.delays.clone(),
                ..Faults::default()
            },
            ..SimConfig::default()
        }
    }

    pub fn admit(&self, number: u32, config: SimConfig) -> (MigratableDevice, SimHandle) {
        let device = SimDevice::new(config).unwrap();
        let handle = device.handle();
        let mut settings = DeviceSettings::default();
        settings.transfer = self.transfer;
        if self.mixed && number % 2 == 1 {
            settings.transfer = OnOffAuto::Off;
        }
        if number % 2 == 1 {
            settings.config_after_iterables = self.config_of_odd;
        }
        let device = Device::new(id(number), Box::new(device)).unwrap();
        (MigratableDevice::new(device, settings), handle)
    }
}

pub fn id(number: u32) -> DeviceId {
    DeviceId::new(format!("0000:00:{number:02x}.0/vfio"), 0).unwrap()
}

/// A main channel in memory: what is written can be read, and where there is nothing it has ended.
#[derive(Clone, Debug, Default)]
pub struct Pipe(Arc<Mutex<VecDeque<u8>>>);

impl Read for Pipe {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.lock().unwrap().read(buffer)
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The source's end of the main channel.
pub struct Sections(pub Writer<Pipe>);

impl Sections {
    pub fn open() -> (Self, Pipe) {
        let pipe = Pipe::default();
        (Self(Writer::open(pipe.clone()).unwrap()), pipe)
    }

    pub fn section<R>(
        &mut self,
        kind: SectionKind,
        owner: &DeviceId,
        body: impl FnOnce(&mut Pipe) -> R,
    ) -> R {
        let id = owner.idstr()[8..10].parse().unwrap();
        let section = Section {
            kind,
            id,
            owner: owner.clone(),
            version: 1,
        };
        self.0.write(&Event::Section(section)).unwrap();
        let result = body(self.0.body());
        self.0.footer(id).unwrap();
        result
    }

    pub fn command(&mut self, command: Command) {
        self.0.write(&Event::Command(command)).unwrap();
    }
}

/// Reads what there is on the main channel.
pub fn read_main(reader: &mut Reader<Pipe>, pipe: &Pipe, incoming: &Incoming) -> Result<()> {
    while !pipe.0.lock().unwrap().is_empty() {
        match reader.next_event()?.unwrap() {
            Event::Section(section) => {
                incoming
                    .device(&section.owner)?
                    .load_state(reader.body()?)?;
                reader.footer()?;
            }
            Event::Command(Command::SwitchoverStart) => incoming.switchover_start()?,
            other => panic!("{other:?}"),
        }
    }
    Ok(())
}

/// A migration that has succeeded.
pub struct Ended {
    pub setup: Setup,
    pub sources: Vec<SimHandle>,
    pub destinations: Vec<SimHandle>,
    pub saved: Saved,
    /// The destination's.
    pub stats: Stats,
    /// How often the switchover was approved.
    pub acks: u32,
    pub devices: Vec<MigratableDevice>,
}

impl Ended {
    /// The devices are what they should be, at both ends.
    pub fn check(self) {
        assert_eq!(self.stats.late_wakeups, 0);
        assert_eq!(self.saved.stats().late_wakeups, 0);
        if matches!(self.setup.ack, SwitchoverAck::Off) {
            assert_eq!(self.acks, 0, "nobody waits for it");
        }
        for (source, destination) in self.sources.iter().zip(&self.destinations) {
            assert!(destination.has_loaded());
            assert_eq!(source.digest(), destination.digest());
            assert_eq!(source.config_digest(), destination.config_digest());
            assert_eq!(destination.state(), DeviceState::Running);
            assert_eq!(source.state(), DeviceState::StopCopy);
        }
        for migratable in &self.devices {
            assert_eq!(migratable.state(), DeviceState::Running);
        }
        for migratable in self.saved.cleanup().unwrap() {
            assert_eq!(migratable.state(), DeviceState::Stop);
        }
        for source in &self.sources {
            assert_eq!(source.state(), DeviceState::Stop);
        }
    }
}

/// Everything that a VMM does, from its devices at rest to the VM on the destination.
pub fn migrate(setup: &Setup) -> Ended {
    let capabilities = setup.capabilities();
    let mut load = LoadSession::builder().settings(setup.settings.clone());
    let mut channels = Vec::new();
    for _ in 0..setup.channels {
        let (near, far) = UnixStream::pair().unwrap();
        near.set_nonblocking(setup.nonblocking).unwrap();
        far.set_nonblocking(setup.nonblocking).unwrap();
        channels.push(near.into());
        load = load.channel(far);
    }
    let mut channels = SourceChannels::greet(channels, &setup.settings).unwrap();
    let numbered = 1..=setup.devices;
    let (sources, saved_from): (Vec<_>, Vec<_>) = numbered
        .clone()
        .map(|at| setup.admit(at, setup.config(at.into())))
        .unzip();
    let (destinations, loaded_to): (Vec<_>, Vec<_>) = numbered
        .map(|at| {
            let mut config = setup.config(1000 + u64::from(at));
            config.state = DeviceState::Running;
            setup.admit(at, config)
        })
        .unzip();

    let approvals = Arc::new(AtomicU32::new(0));
    let acks = SwitchoverAcks::new(setup.ack);
    let approve = {
        let (approvals, acks) = (approvals.clone(), acks.clone());
        move || {
            approvals.fetch_add(1, SeqCst);
            acks.received();
            Ok(())
        }
    };
    let incoming = Incoming::setup(destinations, &capabilities, load, Box::new(approve)).unwrap();
    let (mut main, pipe) = Sections::open();
    let mut reader = Reader::open(pipe.clone()).unwrap();

    let mut under_way = Vec::new();
    for migratable in sources {
        let id = migratable.id().clone();
        let source = main.section(SectionKind::Start, &id, |body| {
            OutgoingDevice::setup(migratable, &capabilities, &acks, body).unwrap()
        });
        under_way.push(source);
    }
    thread::sleep(setup.hold);
    // Until nothing is left that could be sent while the VM runs.
    for round in 0.. {
        assert!(round < 1000, "the iterations end");
        for source in under_way.iter_mut().filter(|source| source.is_active()) {
            let id = source.id().clone();
            main.section(SectionKind::Part, &id, |body| {
                source.iterate_over(&mut channels, body).unwrap()
            });
        }
        read_main(&mut reader, &pipe, &incoming).unwrap();
        let left: u64 = under_way
            .iter()
            .map(|it| it.pending_estimate().precopy())
            .sum();
        if left == 0 && under_way.iter().all(OutgoingDevice::is_switchover_ready) {
            break;
        }
    }
    // It runs on, and nothing is said.
    thread::sleep(setup.hold);
    assert!(incoming.failure().is_none());
    if under_way.iter().any(OutgoingDevice::uses_multifd) {
        assert!(channels.failure().is_none());
    }
    for source in &mut under_way {
        let exact = source.pending_exact().unwrap();
        assert!(exact.stop_copy > 0 && exact.precopy() == 0);
    }
    let reason = vm::Reason::FinishMigration;
    vm::stop(&mut under_way, reason).unwrap();
    let ids: Vec<_> = under_way.iter().map(|source| source.id().clone()).collect();
    let save = SaveSession::builder().settings(setup.settings.clone());
    let save = save.greeted_channels(channels);
    let mut outgoing = Outgoing::begin(under_way, save).unwrap();
    main.command(Command::SwitchoverStart);
    for id in &ids {
        main.section(SectionKind::End, id, |body| {
            outgoing.write_state(id, body).unwrap();
        });
    }
    for id in &ids {
        main.section(SectionKind::Full, id, |body| {
            outgoing.write_config(id, body).unwrap();
        });
    }
    read_main(&mut reader, &pipe, &incoming).unwrap();
    let saved = outgoing.finish().unwrap();
    let mut loaded = incoming.finish().unwrap();
    vm::start(loaded.devices_mut()).unwrap();
    let stats = loaded.stats();
    Ended {
        setup: setup.clone(),
        sources: saved_from,
        destinations: loaded_to,
        saved,
        stats,
        acks: approvals.load(SeqCst),
        devices: loaded.join().unwrap(),
    }
}
