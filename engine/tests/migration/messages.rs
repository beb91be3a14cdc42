//! A VM whose main channel carries requests and responses: control messages, devices that are created late, PRE_COPY on
//! a thread of the engine's. And what a source that means no good may do with a message: nothing but fail by its name.

use std::{
    os::unix::net::UnixStream,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use vfio_migration::{
    Device, DeviceId, DeviceState, Duty, Error, ErrorKind, LoadSession, SaveSession, Settings,
    SourceChannels, TaskKind, Violation,
    migration::{
        Capabilities, DeviceSettings, Incoming, MessageKind, MigratableDevice, Precopy,
        PrecopyLimit, SwitchoverAck, vm,
    },
    sim::{SimConfig, SimDevice, SimHandle},
};

use crate::{vm::id, watchdog::Watchdog};

const DEVICES: u32 = 2;

fn device(number: u32, seed: u64) -> (MigratableDevice, SimHandle) {
    let config = SimConfig {
        seed,
        precopy_initial: 300_000,
        ..SimConfig::default()
    };
    let sim = SimDevice::new(config).unwrap();
    let handle = sim.handle();
    let device = Device::new(id(number), Box::new(sim)).unwrap();
    let device = MigratableDevice::new(device, DeviceSettings::default());
    (device, handle)
}

fn devices(seed: u64) -> (Vec<MigratableDevice>, Vec<SimHandle>) {
    (1..=DEVICES)
        .map(|at| device(at, seed + u64::from(at)))
        .unzip()
}

fn capabilities(ack: SwitchoverAck) -> Capabilities {
    let mut capabilities = Capabilities::default();
    capabilities.switchover_ack = ack;
    capabilities
}

/// Both ends of a VM's migration, set up.
struct Scene {
    precopy: Precopy,
    incoming: Incoming,
    here: Vec<SimHandle>,
    /// What is added to the destination later.
    late: Vec<MigratableDevice>,
    there: Vec<SimHandle>,
}

impl Scene {
    fn new(ack: SwitchoverAck, late: bool) -> Self {
        let (channels, far): (Vec<_>, Vec<_>) = (0..2)
            .map(|_| UnixStream::pair().unwrap())
            .map(|(near, far)| (near.into(), far))
            .unzip();
        let ((sources, here), (destinations, there)) = (devices(1), devices(100));
        let channels = SourceChannels::greet(channels, &Settings::default()).unwrap();
        let mut session = LoadSession::builder().channels(far);
        let (now, late) = if late {
            for number in 1..=DEVICES {
                session = session.expect(id(number));
            }
            (Vec::new(), destinations)
        } else {
            (destinations, Vec::new())
        };
        let capabilities = capabilities(ack);
        let incoming = Incoming::setup_by_messages(now, &capabilities, session).unwrap();
        let precopy = Precopy::setup(sources, &capabilities, channels).unwrap();
        Self {
            precopy,
            incoming,
            here,
            late,
            there,
        }
    }

    /// Carries what the source has to say, where the VMM makes a device when it is asked.
    fn carry(&mut self) -> Option<MessageKind> {
        let message = self.precopy.message()?;
        assert!(self.precopy.message().is_none(), "one at a time");
        let kind = self.incoming.message(&message, |id| {
            let at = self.late.iter().position(|device| device.id() == id)?;
            Some(self.late.remove(at))
        });
        self.precopy.acknowledged();
        Some(kind.unwrap())
    }

    /// Until the destination has the initial data.
    fn run(&mut self) {
        self.precopy.start(PrecopyLimit::default()).unwrap();
        while !self.precopy.is_switchover_ready() {
            assert!(self.precopy.failure().is_none());
            self.carry();
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// The rest of a migration, where every device has been asked for.
    fn end(self) {
        let Self {
            precopy,
            incoming,
            here,
            mut late,
            there,
        } = self;
        let mut outgoing = precopy.switch_over(SaveSession::builder()).unwrap();
        let none = |_: &DeviceId| None;
        let message = outgoing.message().unwrap();
        let kind = incoming.message(&message, none).unwrap();
        assert_eq!(kind, MessageKind::SwitchoverStart);
        outgoing.acknowledged();
        // What the VMM's own state says comes behind it.
        for device in late.drain(..) {
            incoming.add_device(device).unwrap();
        }
        let mut saved = outgoing.finish().unwrap();
        let end = saved.message().unwrap();
        assert_eq!(incoming.message(&end, none).unwrap(), MessageKind::End);
        let mut loaded = incoming.finish().unwrap();
        vm::start(loaded.devices_mut()).unwrap();
        assert_eq!(loaded.stats().late_wakeups, 0);
        let there_back = loaded.join().unwrap();
        let here_back = saved.cleanup().unwrap();
        for (here, there) in here.iter().zip(&there) {
            assert!(there.has_loaded());
            assert_eq!(here.digest(), there.digest());
            assert_eq!(here.config_digest(), there.config_digest());
        }
        for (devices, state) in [
            (there_back, DeviceState::Running),
            (here_back, DeviceState::Stop),
        ] {
            assert_eq!(devices.len(), 2);
            for device in devices {
                assert_eq!((device.state(), device.duty()), (state, Duty::Nothing));
                assert!(!device.was_reset());
            }
        }
    }
}

const ACKS: [SwitchoverAck; 3] = [
    SwitchoverAck::Off,
    SwitchoverAck::Once,
    SwitchoverAck::Reusable,
];

#[test]
fn a_vm_moves_by_messages_with_devices_that_are_there() {
    for ack in ACKS {
        let _watchdog = Watchdog::new();
        let mut scene = Scene::new(ack, false);
        assert_eq!(scene.carry(), Some(MessageKind::Setup));
        scene.run();
        scene.end();
    }
}

#[test]
fn a_vm_moves_by_messages_with_devices_that_are_asked_for() {
    for ack in ACKS {
        let _watchdog = Watchdog::new();
        let mut scene = Scene::new(ack, true);
        assert_eq!(scene.carry(), Some(MessageKind::Setup));
        assert!(scene.late.is_empty(), "each was asked for");
        scene.run();
        scene.end();
    }
}

#[test]
fn a_vm_moves_by_messages_with_devices_that_come_behind_the_switchover() {
    let _watchdog = Watchdog::new();
    let mut scene = Scene::new(SwitchoverAck::Off, true);
    let late = std::mem::take(&mut scene.late);
    assert_eq!(scene.carry(), Some(MessageKind::Setup));
    scene.precopy.start(PrecopyLimit::default()).unwrap();
    while scene.precopy.progress().bytes < 600_000 {
        thread::sleep(Duration::from_millis(1));
    }
    scene.late = late;
    scene.end();
}

#[test]
fn initial_data_that_is_waited_for_needs_its_device() {
    let _watchdog = Watchdog::new();
    let mut scene = Scene::new(SwitchoverAck::Once, true);
    scene.late.clear();
    assert_eq!(scene.carry(), Some(MessageKind::Setup));
    scene.precopy.start(PrecopyLimit::default()).unwrap();
    let message = loop {
        match scene.precopy.message() {
            Some(message) => break message,
            None => thread::sleep(Duration::from_millis(1)),
        }
    };
    let error = scene.incoming.message(&message, |_| None).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Misuse(_)), "{error}");
    // Whichever's initial data came first.
    let device = error.device().unwrap();
    assert!([id(1), id(2)].contains(device), "{device}");
    assert!(scene.incoming.abort().is_empty());
    for device in scene.precopy.abort() {
        assert_eq!(device.state(), DeviceState::Running);
    }
}

#[test]
fn a_device_that_is_never_added_ends_finish_by_its_name() {
    let _watchdog = Watchdog::new();
    let mut scene = Scene::new(SwitchoverAck::Off, true);
    let other = scene.late.remove(1);
    scene.carry();
    let mut outgoing = scene.precopy.switch_over(SaveSession::builder()).unwrap();
    let message = outgoing.message().unwrap();
    scene.incoming.message(&message, |_| None).unwrap();
    outgoing.acknowledged();
    let mut saved = outgoing.finish().unwrap();
    let end = saved.message().unwrap();
    scene.incoming.message(&end, |_| None).unwrap();
    let failed = scene.incoming.finish().unwrap_err();
    assert_eq!(failed.error.device(), Some(other.id()));
    let back = failed.into_back();
    assert_eq!(back.len(), 1);
    assert_eq!(back[0].state(), DeviceState::Running);
    assert!(back[0].was_reset());
    for device in saved.abort() {
        assert_eq!(
            (device.state(), device.was_reset()),
            (DeviceState::Running, false)
        );
    }
}

/// What the destination says of a message that the source did not make so, behind SETUP.
#[track_caller]
fn refused(change: impl FnOnce(&mut Vec<u8>)) -> Error {
    let mut scene = Scene::new(SwitchoverAck::Once, false);
    let mut message = scene.precopy.message().unwrap();
    change(&mut message);
    let error = scene.incoming.message(&message, |_| None).unwrap_err();
    let again = scene.incoming.message(&message, |_| None).unwrap_err();
    assert_eq!(again.to_string(), error.to_string(), "the first reason");
    let failed = scene.incoming.finish().unwrap_err();
    assert_eq!(failed.error.to_string(), error.to_string());
    for device in failed.into_back() {
        assert_eq!(device.state(), DeviceState::Running);
        assert!(device.was_reset());
    }
    error
}

#[test]
fn a_message_that_is_false_fails_the_migration_by_its_name() {
    let _watchdog = Watchdog::new();
    let is = |error: &Error, what: &str| assert!(error.to_string().contains(what), "{error}");
    is(&refused(|message| message.truncate(20)), "cut off");
    let version = refused(|message| message[5] = 9);
    let protocol = ErrorKind::Protocol(Violation::MessageVersion(9));
    assert_eq!(*version.kind(), protocol);
    is(&refused(|message| message[7] = 2), "switchover-ack");
    is(
        &refused(|message| message[11] = 1),
        "missing, or came twice",
    );
    for kind in 2..5 {
        is(&refused(|message| message[6] = kind), "may not come here");
    }
    let unknown = refused(|message| message[17] = b'x');
    let violation = |error: &Error| match error.kind() {
        ErrorKind::Protocol(violation) => violation.clone(),
        other => panic!("{other}"),
    };
    let violation = violation(&unknown);
    assert!(matches!(violation, Violation::UnknownDevice { .. }));
    // Only the first of two; and the first of them twice.
    let one = 1 + id(1).idstr().len() + 8;
    let missing = refused(|message| {
        message[15] = 1;
        message.truncate(16 + one);
    });
    is(&missing, "does not have the device");
    assert_eq!(missing.device(), Some(&id(2)));
    let twice = refused(|message| message.copy_within(16..16 + one, 16 + one));
    is(&twice, "stands twice");
    assert_eq!(twice.device(), Some(&id(1)));
}

#[test]
fn each_message_has_its_place() {
    let _watchdog = Watchdog::new();
    let mut scene = Scene::new(SwitchoverAck::Off, false);
    let setup = scene.precopy.message().unwrap();
    scene.incoming.message(&setup, |_| None).unwrap();
    let mut ahead = setup.clone();
    // The initial data's end, and nobody waits for it.
    (ahead[6], ahead[11]) = (2, 1);
    let error = scene.incoming.message(&ahead, |_| None).unwrap_err();
    assert!(error.to_string().contains("nobody waits"), "{error}");
    let failed = scene.precopy.switch_over(SaveSession::builder());
    let (error, back) = failed.unwrap_err().into_parts();
    assert!(error.to_string().contains("not been answered"), "{error}");
    for device in back {
        assert_eq!(
            (device.state(), device.was_reset()),
            (DeviceState::Running, false)
        );
    }

    let mut scene = Scene::new(SwitchoverAck::Off, false);
    scene.carry();
    let mut outgoing = scene.precopy.switch_over(SaveSession::builder()).unwrap();
    let unanswered = outgoing.message().unwrap();
    scene.incoming.message(&unanswered, |_| None).unwrap();
    let failed = scene.incoming.finish().unwrap_err();
    let what = failed.error.to_string();
    assert!(what.contains("has not said that all"), "{what}");
    drop(outgoing);

    let mut scene = Scene::new(SwitchoverAck::Off, false);
    scene.carry();
    let mut outgoing = scene.precopy.switch_over(SaveSession::builder()).unwrap();
    assert!(outgoing.message().is_some());
    let failed = outgoing.finish().unwrap_err();
    let what = failed.error.to_string();
    assert!(what.contains("not been answered"), "{what}");
    for device in failed.into_back() {
        assert_eq!(device.state(), DeviceState::Running);
        assert!(!device.was_reset());
    }
}

#[test]
fn the_thread_ends_by_its_limit_and_goes_on_when_it_is_started_again() {
    let _watchdog = Watchdog::new();
    let mut scene = Scene::new(SwitchoverAck::Off, false);
    scene.carry();
    let ended = |precopy: &Precopy| {
        while precopy.progress().running {
            thread::sleep(Duration::from_millis(1));
        }
        assert!(precopy.failure().is_none());
    };
    let mut limit = PrecopyLimit::default();
    limit.bytes = Some(1);
    scene.precopy.start(limit).unwrap();
    ended(&scene.precopy);
    let first = scene.precopy.progress();
    assert!(first.bytes > 0 && first.pending.stop_copy > 0, "{first:?}");
    limit.bytes = None;
    limit.time = Some(Duration::from_millis(30));
    scene.precopy.start(limit).unwrap();
    assert!(scene.precopy.start(limit).is_err() || !scene.precopy.progress().running);
    ended(&scene.precopy);
    let second = scene.precopy.progress();
    assert!(second.bytes >= first.bytes);
    scene.precopy.start(PrecopyLimit::default()).unwrap();
    scene.end();
}

#[test]
fn the_thread_is_the_vmms_where_it_says_so_and_one_that_is_not_run_fails() {
    let _watchdog = Watchdog::new();
    let mut scene = Scene::new(SwitchoverAck::Off, false);
    scene.carry();
    let kinds = Arc::new(Mutex::new(Vec::new()));
    let seen = kinds.clone();
    scene.precopy.spawn_with(move |task| {
        seen.lock().unwrap().push(task.kind().clone());
        thread::spawn(move || task.run());
        Ok(())
    });
    scene.precopy.start(PrecopyLimit::default()).unwrap();
    scene.precopy.pause();
    assert_eq!(*kinds.lock().unwrap(), [TaskKind::Precopy]);
    scene.end();

    for refuses in [true, false] {
        let mut scene = Scene::new(SwitchoverAck::Off, false);
        scene.precopy.spawn_with(move |task| {
            drop(task);
            if refuses {
                return Err(std::io::Error::other("no thread"));
            }
            Ok(())
        });
        assert_eq!(
            scene.precopy.start(PrecopyLimit::default()).is_err(),
            refuses
        );
        assert!(!scene.precopy.progress().running);
        let error = scene.precopy.failure().unwrap();
        assert_eq!(matches!(error.kind(), ErrorKind::Host), refuses, "{error}");
        let failed = scene.precopy.switch_over(SaveSession::builder());
        let back = failed.unwrap_err().into_back();
        assert_eq!(back.len(), 2);
        for device in back {
            assert_eq!(device.state(), DeviceState::Running);
        }
    }
}

#[test]
fn a_destination_that_takes_nothing_holds_up_nobody_who_cancels() {
    let _watchdog = Watchdog::new();
    let (near, _far) = UnixStream::pair().unwrap();
    let channels = SourceChannels::greet(vec![near.into()], &Settings::default()).unwrap();
    let config = SimConfig {
        precopy_initial: 64 << 20,
        len: 64 << 20,
        ..SimConfig::default()
    };
    let device = Device::new(id(1), Box::new(SimDevice::new(config).unwrap())).unwrap();
    let device = MigratableDevice::new(device, DeviceSettings::default());
    let capabilities = Capabilities::default();
    let mut precopy = Precopy::setup(vec![device], &capabilities, channels).unwrap();
    precopy.start(PrecopyLimit::default()).unwrap();
    let mut before = 1;
    while precopy.progress().bytes != before {
        before = precopy.progress().bytes;
        thread::sleep(Duration::from_millis(100));
    }
    precopy.canceller().cancel();
    precopy.pause();
    assert!(precopy.failure().unwrap().is_cancelled());
    assert_eq!(precopy.abort()[0].state(), DeviceState::Running);
}

#[test]
fn a_vm_that_is_paused_meanwhile_waits_for_no_ack() {
    let _watchdog = Watchdog::new();
    let mut scene = Scene::new(SwitchoverAck::Once, false);
    scene.carry();
    assert!(!scene.precopy.is_switchover_ready());
    let paused = scene
        .precopy
        .with_devices(|devices| vm::stop(devices, vm::Reason::Pause));
    paused.unwrap();
    scene.precopy.start(PrecopyLimit::default()).unwrap();
    scene.precopy.pause();
    for device in scene.precopy.abort() {
        assert_eq!(device.state(), DeviceState::Stop);
    }
}

#[test]
fn a_device_whose_data_cannot_go_over_the_channels_is_refused() {
    let _watchdog = Watchdog::new();
    let (near, _far) = UnixStream::pair().unwrap();
    let channels = SourceChannels::greet(vec![near.into()], &Settings::default()).unwrap();
    let mut capabilities = Capabilities::default();
    capabilities.multifd = false;
    let (devices, _handles) = devices(1);
    let failed = Precopy::setup(devices, &capabilities, channels).unwrap_err();
    assert_eq!(failed.error.device(), Some(&id(1)));
    assert_eq!(failed.into_back().len(), 2);
    let (devices, _handles) = self::devices(1);
    let failed = Incoming::setup_by_messages(devices, &capabilities, LoadSession::builder());
    let failed = failed.unwrap_err();
    assert_eq!(failed.error.device(), Some(&id(1)));
    assert_eq!(failed.into_back().len(), 2);
}
