//! A VMM's walk through a migration, both sides in one process, step by step on one thread; and what it does
//! where a step fails.

use std::{
    io::{self, Write},
    os::unix::net::UnixStream,
};

use vfio_migration::{
    Backend, DeviceState, Duty, LoadBuilder, LoadSession, SaveSession, Settings, SourceChannels,
    migration::{
        Capabilities, Incoming, Loaded, MigratableDevice, Outgoing, OutgoingDevice, Saved,
        SwitchoverAck, SwitchoverAcks, vm,
    },
    stream::{Command, Reader, SectionKind},
};

use super::{
    case::{At, Case, Leave, Link, Side, Vm},
    side::{Holds, Truth, Wrong},
};
use crate::{
    packets::hello,
    quick::quick,
    vm::{Pipe, Sections, id, read_main},
};

/// The source's devices, as far as they are.
enum Near {
    Set(Vec<OutgoingDevice>, Vec<MigratableDevice>),
    Switching(Outgoing),
    Saved(Saved),
    Back(Vec<MigratableDevice>),
}

impl Near {
    /// The migration is off.
    fn give_up(self, leave: Leave) -> Vec<MigratableDevice> {
        match (self, leave) {
            (Self::Back(back), _) => back,
            (Self::Set(sources, rest), Leave::Dropped) => {
                drop(sources);
                rest
            }
            (Self::Set(sources, rest), _) => sources
                .into_iter()
                .map(OutgoingDevice::abort)
                .chain(rest)
                .collect(),
            (Self::Switching(it), Leave::Called) => it.abort(),
            (Self::Switching(it), Leave::Cancelled) => {
                it.cancel();
                it.finish().unwrap_err().into_back()
            }
            (Self::Switching(it), Leave::Dropped) => {
                drop(it);
                Vec::new()
            }
            (Self::Saved(it), _) => it.abort(),
        }
    }

    /// Nobody knows.
    fn hold(self, leave: Leave) -> Vec<MigratableDevice> {
        match (self, leave) {
            (Self::Saved(it), Leave::Dropped) => {
                drop(it);
                Vec::new()
            }
            (Self::Saved(it), _) => it.in_doubt(),
            _ => panic!("all has been sent"),
        }
    }
}

/// The destination's.
enum Far {
    Incoming(Incoming),
    Loaded(Loaded),
    Back(Vec<MigratableDevice>),
}

impl Far {
    fn give_up(self, leave: Leave) -> Vec<MigratableDevice> {
        match (self, leave) {
            (Self::Back(back), _) => back,
            (Self::Incoming(it), Leave::Called) => it.abort(),
            (Self::Incoming(it), Leave::Cancelled) => {
                it.cancel();
                it.finish().unwrap_err().into_back()
            }
            (Self::Loaded(it), Leave::Called | Leave::Cancelled) => it.abort(),
            (it, Leave::Dropped) => {
                drop(it);
                Vec::new()
            }
        }
    }
}

/// What a walk has come to.
pub struct Ended {
    /// The step that has failed.
    pub at: Option<At>,
    /// Whether the VM was paused before that.
    pub paused: bool,
    /// The devices that came back, and what they all are.
    pub sources: (Vec<MigratableDevice>, Vec<Truth>),
    pub destinations: (Vec<MigratableDevice>, Vec<Truth>),
}

struct Walk<'a> {
    case: &'a Case,
    near: Near,
    far: Far,
    near_truth: Vec<Truth>,
    far_truth: Vec<Truth>,
    main: Sections,
    pipe: Pipe,
    reader: Reader<Pipe>,
    channels: Option<SourceChannels>,
    /// The source's end of one that is to break.
    breaks: Option<UnixStream>,
    paused: bool,
}

/// Takes a migration as far as it goes.
pub fn walk(case: &Case) -> Ended {
    let mut load = LoadSession::builder().settings(settings());
    let mut channels = Vec::new();
    for _ in 0..2 {
        let (near, far) = UnixStream::pair().unwrap();
        channels.push(near.into());
        load = load.channel(far);
    }
    let mut breaks = None;
    if let Link::Channel(_) = case.link {
        let (mut near, far) = UnixStream::pair().unwrap();
        near.write_all(&hello(2)).unwrap();
        load = load.channel(far);
        breaks = Some(near);
    }
    if case.vm != Vm::Runs {
        // Nobody starts the VM there: its drivers check when all has come.
        let mut settings = settings();
        settings.stop_after_load = Some(true);
        load = load.settings(settings);
    }
    let channels = SourceChannels::greet(channels, &settings()).unwrap();
    let all = |side| (0..case.devices()).map(move |at| case.device(side, at));
    let (sources, near_truth): (Vec<_>, Vec<_>) = all(Side::OutgoingDevice).unzip();
    let (destinations, far_truth): (Vec<_>, Vec<_>) = all(Side::IncomingDevice).unzip();
    let (main, pipe) = Sections::open();
    let reader = Reader::open(pipe.clone()).unwrap();
    let mut walk = Walk {
        case,
        near: Near::Set(Vec::new(), sources),
        far: Far::Back(Vec::new()),
        near_truth,
        far_truth,
        main,
        pipe,
        reader,
        channels: Some(channels),
        breaks,
        paused: false,
    };
    let at = walk.all(destinations, load).err();
    let Walk {
        near,
        far,
        near_truth,
        far_truth,
        channels,
        paused,
        ..
    } = walk;
    // What a VMM does on each side, by what it knows.
    let (sources, destinations) = match at {
        None | Some(At::Cleanup | At::Join) => (near, far),
        Some(At::End | At::VerdictOfFailure) => {
            let near = near.hold(case.leave);
            (Near::Back(near), Far::Back(far.give_up(case.leave)))
        }
        Some(At::Verdict) => {
            let near = near.hold(case.leave);
            let Far::Loaded(loaded) = far else {
                panic!("all is loaded")
            };
            (Near::Back(near), Far::Back(loaded.join().unwrap()))
        }
        Some(_) => {
            let near = near.give_up(case.leave);
            (Near::Back(near), Far::Back(far.give_up(case.leave)))
        }
    };
    drop(channels);
    let (Near::Back(sources), Far::Back(destinations)) = (sources, destinations) else {
        panic!("each side is at its end")
    };
    Ended {
        at,
        paused,
        sources: (sources, near_truth),
        destinations: (destinations, far_truth),
    }
}

impl Walk<'_> {
    fn all(&mut self, destinations: Vec<MigratableDevice>, load: LoadBuilder) -> Result<(), At> {
        let mut capabilities = Capabilities::default();
        capabilities.switchover_ack = SwitchoverAck::Off;
        match Incoming::setup(destinations, &capabilities, load, Box::new(|| Ok(()))) {
            Ok(incoming) => self.far = Far::Incoming(incoming),
            Err(failed) => {
                self.far = Far::Back(failed.into_back());
                return Err(At::DestinationSetUp);
            }
        }
        self.set_up(&capabilities)?;
        self.iterate()?;
        self.stop()?;
        self.send()?;
        // The end has come.
        self.receive()?;
        self.verdict()
    }

    /// Where the body of a section goes.
    fn body<'b>(link: Link, at: At, device: usize, pipe: &'b mut Pipe) -> Box<dyn Write + 'b> {
        if link == Link::Body(at, device) {
            struct Broken;
            impl Write for Broken {
                fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                    Err(io::ErrorKind::BrokenPipe.into())
                }

                fn flush(&mut self) -> io::Result<()> {
                    Ok(())
                }
            }
            return Box::new(Broken);
        }
        Box::new(pipe)
    }

    fn set_up(&mut self, capabilities: &Capabilities) -> Result<(), At> {
        let acks = SwitchoverAcks::new(SwitchoverAck::Off);
        let Near::Set(sources, rest) = &mut self.near else {
            unreachable!()
        };
        let link = self.case.link;
        for at in 0..self.case.devices() {
            let migratable = rest.remove(0);
            let id = migratable.id().clone();
            self.main.section(SectionKind::Start, &id, |body| {
                let body = Self::body(link, At::SetUp, at, body);
                match OutgoingDevice::setup(migratable, capabilities, &acks, body) {
                    Ok(source) => sources.push(source),
                    Err(failed) => {
                        rest.insert(0, failed.into_back());
                        return Err(At::SetUp);
                    }
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    fn iterate(&mut self) -> Result<(), At> {
        let Near::Set(sources, _) = &mut self.near else {
            unreachable!()
        };
        let Far::Incoming(incoming) = &self.far else {
            unreachable!()
        };
        let channels = self.channels.as_mut().unwrap();
        for round in 0.. {
            assert!(round < 100, "the iterations end");
            for (at, source) in sources.iter_mut().enumerate() {
                let id = source.id().clone();
                let iterated = self.main.section(SectionKind::Part, &id, |body| {
                    let body = Self::body(self.case.link, At::Iteration, at, body);
                    source.iterate_over(channels, body)
                });
                iterated.map_err(|_| At::Iteration)?;
            }
            read_main(&mut self.reader, &self.pipe, incoming).map_err(|_| At::DestinationLoad)?;
            if self.case.vm == Vm::Paused {
                self.paused = true;
                if vm::stop(sources, vm::Reason::Pause).is_err() {
                    self.all_stand();
                    return Err(At::Pause);
                }
            }
            if sources
                .iter()
                .all(|it| it.pending_estimate().precopy() == 0)
            {
                break;
            }
        }
        for source in sources {
            source.pending_exact().map_err(|_| At::Iteration)?;
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), At> {
        let Near::Set(sources, _) = &mut self.near else {
            unreachable!()
        };
        if vm::stop(sources, vm::Reason::FinishMigration).is_err() {
            self.all_stand();
            return Err(At::Stop);
        }
        let sources = std::mem::take(sources);
        let save = SaveSession::builder().settings(settings());
        let save = save.greeted_channels(self.channels.take().unwrap());
        match Outgoing::begin(sources, save) {
            Ok(outgoing) => self.near = Near::Switching(outgoing),
            Err(failed) => {
                self.near = Near::Back(failed.into_back());
                return Err(At::Begin);
            }
        }
        Ok(())
    }

    /// The VM has stopped, and so has every device, one that has refused and was reset as well.
    fn all_stand(&self) {
        for (at, truth) in self.near_truth.iter().enumerate() {
            let wrong = self.case.wrong_of(Side::OutgoingDevice, at);
            if !wrong.is_some_and(Wrong::is_severe) {
                assert!(!truth.state().runs(), "{}", truth.state());
            }
        }
    }

    fn send(&mut self) -> Result<(), At> {
        let Near::Switching(outgoing) = &mut self.near else {
            unreachable!()
        };
        let Far::Incoming(incoming) = &self.far else {
            unreachable!()
        };
        let link = self.case.link;
        self.main.command(Command::SwitchoverStart);
        if link == Link::Channel(At::DestinationLoad) {
            break_off(self.breaks.take());
        }
        for at in 0..self.case.devices() {
            let id = id(u32::try_from(at).unwrap() + 1);
            let written = self.main.section(SectionKind::End, &id, |body| {
                outgoing.write_state(&id, Self::body(link, At::Sections, at, body))
            });
            written.map_err(|_| At::Sections)?;
        }
        for at in 0..self.case.devices() {
            let id = id(u32::try_from(at).unwrap() + 1);
            let written = self.main.section(SectionKind::Full, &id, |body| {
                outgoing.write_config(&id, body)
            });
            written.map_err(|_| At::Sections)?;
        }
        if link == Link::Garbage {
            self.main.section(SectionKind::Part, &id(1), |body| {
                body.write_all(&[0xee; 8]).unwrap();
            });
        }
        read_main(&mut self.reader, &self.pipe, incoming).map_err(|_| At::DestinationLoad)?;
        let nobody = Near::Back(Vec::new());
        let Near::Switching(outgoing) = std::mem::replace(&mut self.near, nobody) else {
            unreachable!()
        };
        match outgoing.finish() {
            Ok(saved) => self.near = Near::Saved(saved),
            Err(failed) => {
                self.near = Near::Back(failed.into_back());
                return Err(At::Finish);
            }
        }
        if link == Link::Lost(At::End) {
            return Err(At::End);
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<(), At> {
        let link = self.case.link;
        let nobody = Far::Back(Vec::new());
        let Far::Incoming(incoming) = std::mem::replace(&mut self.far, nobody) else {
            unreachable!()
        };
        match incoming.finish() {
            Ok(loaded) => self.far = Far::Loaded(loaded),
            Err(failed) => {
                self.far = Far::Back(failed.into_back());
                return Err(At::DestinationFinish);
            }
        }
        let Far::Loaded(loaded) = &mut self.far else {
            unreachable!()
        };
        if link == Link::Lost(At::DestinationLoaded) {
            return Err(At::DestinationLoaded);
        }
        if self.case.vm == Vm::Runs && vm::start(loaded.devices_mut()).is_err() {
            // Before anybody is told.
            for (migratable, truth) in loaded.devices_mut().iter().zip(&self.far_truth) {
                if migratable.duty() != Duty::Close {
                    let is = (truth.state(), truth.holds());
                    assert_eq!(is, (DeviceState::Stop, Holds::Nothing));
                }
            }
            return Err(match link {
                Link::Lost(At::VerdictOfFailure) => At::VerdictOfFailure,
                _ => At::DestinationStart,
            });
        }
        match link {
            Link::Lost(at @ (At::DestinationStarted | At::Verdict)) => Err(at),
            _ => Ok(()),
        }
    }

    fn verdict(&mut self) -> Result<(), At> {
        let (nobody, none) = (Near::Back(Vec::new()), Far::Back(Vec::new()));
        let Near::Saved(saved) = std::mem::replace(&mut self.near, nobody) else {
            unreachable!()
        };
        let Far::Loaded(loaded) = std::mem::replace(&mut self.far, none) else {
            unreachable!()
        };
        let cleaned = saved.cleanup();
        break_off(self.breaks.take());
        let joined = loaded.join();
        let at = match (&cleaned, &joined) {
            (Ok(_), Ok(_)) => Ok(()),
            (Err(_), _) => Err(At::Cleanup),
            (_, Err(_)) => Err(At::Join),
        };
        self.near = Near::Back(cleaned.unwrap_or_else(|failed| failed.into_back()));
        self.far = Far::Back(joined.unwrap_or_else(|failed| failed.into_back()));
        at
    }
}

/// Without a ring and with little memory, which would be most of a walk's time.
fn settings() -> Settings {
    let mut settings = quick();
    settings.backend = Backend::Blocking;
    settings.budget = Some(2 << 20);
    settings
}

/// A packet begins, and the channel ends.
fn break_off(channel: Option<UnixStream>) {
    if let Some(mut channel) = channel {
        channel.write_all(&[0x11, 0x22]).unwrap();
    }
}
