//! A setting has its effect, and a refusal leaves what it should: on the wire and on the device.

use std::{
    io::{self, Read},
    os::unix::net::UnixStream,
    sync::{Arc, Mutex},
    thread,
};

use vfio_migration::{
    Device, DeviceState, LoadSession, Result, SaveSession, Settings, SourceChannels,
    migration::{
        DeviceSettings, Incoming, MigratableDevice, OnOffAuto, Outgoing, OutgoingDevice,
        SwitchoverAck, SwitchoverAcks, vm as state,
    },
    section::{SectionSink, load_state},
    wire::{DEFAULT_MAX_PACKET, Frame, Framer, HELLO_LEN, Hello, PageSize, Walk},
};

use crate::{
    mock::{Log, Mock},
    vm::{Setup, migrate},
    watchdog::Watchdog,
};

/// A device that refuses RESUMING and stands in `at`; what it has been asked.
fn refuses_resuming(at: DeviceState) -> (Device, Arc<Mutex<Log>>) {
    let mut mock = Mock::new(io::pipe().unwrap().1);
    let log = mock.log.clone();
    mock.set = Some(Box::new(|state| match state {
        DeviceState::Resuming => Err(io::ErrorKind::Other.into()),
        _ => Ok(()),
    }));
    let mut device = mock.device(1);
    device.set_state(at, at).unwrap();
    log.lock().unwrap().states.clear();
    (device, log)
}

#[test]
fn a_device_that_refuses_resuming_keeps_the_state_that_it_came_in() {
    let _watchdog = Watchdog::new();
    for at in [DeviceState::Running, DeviceState::Stop] {
        // In a session.
        let (device, log) = refuses_resuming(at);
        let failed = LoadSession::builder().device(device).start().unwrap_err();
        let (error, back) = failed.into_parts();
        assert_eq!(error.states(), Some((at, DeviceState::Resuming)));
        assert_eq!((back[0].state(), back[0].was_reset()), (at, false));
        assert_eq!(log.lock().unwrap().resets, 0, "{at} in a session");
        // In a migration, over the channels and over the main channel.
        for transfer in [OnOffAuto::On, OnOffAuto::Off] {
            let (device, log) = refuses_resuming(at);
            let mut settings = DeviceSettings::default();
            settings.transfer = transfer;
            let devices = vec![MigratableDevice::new(device, settings)];
            let capabilities = Setup::default().capabilities();
            let session = LoadSession::builder();
            let approve = Box::new(|| Ok(()));
            let failed = Incoming::setup(devices, &capabilities, session, approve).unwrap_err();
            let back = failed.into_back();
            assert_eq!((back[0].state(), back[0].was_reset()), (at, false));
            assert_eq!(log.lock().unwrap().resets, 0, "{at}, {transfer:?}");
        }
    }
}

#[test]
fn where_a_loaded_device_stands_is_as_set() {
    let _watchdog = Watchdog::new();
    let (resuming, stop) = (DeviceState::Resuming, DeviceState::Stop);
    // A session by itself, which no start of a VM follows.
    for (set, expected) in [(None, stop), (Some(true), stop), (Some(false), resuming)] {
        let setup = Setup::default();
        let device = |seed| setup.admit(1, setup.config(seed)).0.into_device();
        let (near, far) = UnixStream::pair().unwrap();
        let mut settings = Settings::default();
        settings.stop_after_load = set;
        let load = LoadSession::builder().settings(settings).channel(far);
        let load = load.device(device(2)).start().unwrap();
        let save = SaveSession::builder().channel(near).device(device(1));
        let save = save.start().unwrap();
        load.switchover_start();
        drop(save.join());
        let report = load.join();
        report.result.unwrap();
        let device = report.devices.into_iter().next().unwrap().device.unwrap();
        assert_eq!(device.state(), expected, "{set:?}");
    }
    // A migration, in which one does.
    for transfer in [OnOffAuto::On, OnOffAuto::Off] {
        for (set, expected) in [(None, false), (Some(false), false), (Some(true), true)] {
            let mut settings = Settings::default();
            settings.stop_after_load = set;
            let ended = migrate(&Setup {
                transfer,
                settings,
                ..Setup::default()
            });
            let changes = ended.destinations[0].changes();
            let stood = changes.iter().any(|change| change.to == stop);
            assert_eq!(stood, expected, "{transfer:?} {set:?}");
            ended.check();
        }
    }
}

/// The sizes of the data that a section's body carries.
#[derive(Default)]
struct Blocks(Vec<u64>);

impl SectionSink for Blocks {
    fn write(&mut self, _bytes: &[u8]) -> Result<()> {
        Ok(())
    }

    fn config(&mut self, _input: &mut dyn Read) -> Result<()> {
        Ok(())
    }

    fn on_data(&mut self, data_len: u64, _taken: &Result<()>) {
        self.0.push(data_len);
    }
}

#[test]
fn a_devices_buffer_is_as_long_as_it_is_set() {
    let _watchdog = Watchdog::new();
    const LEN: usize = 10_000;
    for transfer in [OnOffAuto::On, OnOffAuto::Off] {
        let setup = Setup {
            transfer,
            len: 100_000,
            precopy_initial: 25_000,
            ..Setup::default()
        };
        let (mut migratable, _) = setup.admit(1, setup.config(1));
        migratable.settings_mut().buffer_len = Some(LEN);
        let id = migratable.id().clone();
        let (near, mut far) = UnixStream::pair().unwrap();
        let reads = thread::spawn(move || {
            let mut bytes = Vec::new();
            far.read_to_end(&mut bytes).map(|_| bytes)
        });
        let channels = SourceChannels::greet(vec![near.into()], &Settings::default()).unwrap();
        let acks = SwitchoverAcks::new(SwitchoverAck::Off);
        let capabilities = setup.capabilities();
        let set_up = OutgoingDevice::setup(migratable, &capabilities, &acks, Vec::new());
        let mut source = vec![set_up.unwrap()];
        let read = source[0].iterate(Vec::new()).unwrap();
        assert_eq!(read.bytes, LEN, "one read");
        state::stop(&mut source, state::Reason::FinishMigration).unwrap();
        let session = SaveSession::builder().greeted_channels(channels);
        let mut outgoing = Outgoing::begin(source, session).unwrap();
        let mut body = Vec::new();
        outgoing.write_state(&id, &mut body).unwrap();
        outgoing.write_config(&id, Vec::new()).unwrap();
        drop(outgoing.finish().unwrap().cleanup().unwrap());
        let channel = reads.join().unwrap().unwrap();
        let sizes: Vec<u64> = if transfer == OnOffAuto::On {
            let framer = Framer::new(Some(PageSize::new(4096).unwrap()), DEFAULT_MAX_PACKET);
            let walk = Walk::new(&channel, framer);
            let packets = walk.filter_map(|located| match located.unwrap() {
                it if matches!(it.frame, Frame::DeviceState(_)) => Some(it.payload.len() as u64),
                _ => None,
            });
            let mut sizes: Vec<_> = packets.collect();
            sizes.pop().expect("the config");
            sizes
        } else {
            let mut blocks = Blocks::default();
            load_state(&mut &body[..], &mut blocks).unwrap();
            blocks.0
        };
        // Short where PRE_COPY's data ends, and where all of it does.
        assert!(sizes.iter().all(|size| *size <= LEN as u64), "{sizes:?}");
        let whole = sizes.iter().filter(|size| **size == LEN as u64);
        assert!(whole.count() >= 8, "{transfer:?}: {sizes:?}");
    }
}

/// The uuid of the hello that comes first on a channel.
fn greeted(mut far: UnixStream) -> [u8; 16] {
    let mut bytes = [0; HELLO_LEN];
    far.read_exact(&mut bytes).unwrap();
    Hello::decode(&bytes).unwrap().uuid
}

#[test]
fn every_hello_carries_the_vms_uuid() {
    let _watchdog = Watchdog::new();
    let uuid = [0x5a; 16];
    let mut settings = Settings::default();
    settings.uuid = uuid;
    let (near, far) = UnixStream::pair().unwrap();
    let channels = SourceChannels::greet(vec![near.into()], &settings).unwrap();
    assert_eq!(greeted(far), uuid, "at the set-up");
    drop(channels);

    let setup = Setup::default();
    let (near, far) = UnixStream::pair().unwrap();
    let device = setup.admit(1, setup.config(1)).0.into_device();
    let save = SaveSession::builder().settings(settings.clone());
    let save = save.device(device).channel(near).start().unwrap();
    assert_eq!(greeted(far), uuid, "by the session");
    drop(save);
}
