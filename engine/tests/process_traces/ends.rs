//! Every end of a migration is told of, once for each device; and nothing is told of that did not happen.

use std::{io, os::unix::net::UnixStream, thread, time::Duration};

use nix::errno::Errno;
use vfio_migration::{
    Device, FdDevice, LoadSession, PrecopyInfo, Report, SaveSession, Settings, SourceChannels,
    Spill,
    migration::{
        DeviceSettings, Incoming, MigratableDevice, OnOffAuto, Outgoing, OutgoingDevice,
        SwitchoverAck, SwitchoverAcks, vm as state,
    },
};

use crate::{
    mock::Mock,
    recorder::{Recorder, Told},
    vm::{Setup, id, migrate},
    watchdog::Watchdog,
};

/// The states that a device's migration went through.
fn states(told: &[Told], device: u32) -> Vec<String> {
    let device = id(device).to_string();
    let of_device = told.iter().filter(|it| it.device == device);
    let states = of_device.filter(|it| it.name == "migration_state_notifier");
    states.map(|it| it.field("state").to_owned()).collect()
}

/// How often each device was cleaned up.
fn cleanups(told: &[Told], name: &str, devices: u32) -> Vec<usize> {
    let count = |number| {
        let device = id(number).to_string();
        let of_device = told.iter().filter(|it| it.device == device);
        of_device.filter(|it| it.name == name).count()
    };
    (1..=devices).map(count).collect()
}

/// Two devices, the second of which is not on the channels.
fn mixed() -> Setup {
    Setup {
        devices: 2,
        mixed: true,
        ..Setup::default()
    }
}

fn incoming(setup: &Setup) -> Incoming {
    let devices = (1..=setup.devices).map(|at| setup.admit(at + 1, setup.config(1)).0);
    // Their names are the source's, their numbers decide who is on the channels.
    let devices: Vec<_> = devices.collect();
    let capabilities = setup.capabilities();
    let session = LoadSession::builder();
    Incoming::setup(devices, &capabilities, session, Box::new(|| Ok(()))).unwrap()
}

fn outgoing(setup: &Setup) -> (Vec<OutgoingDevice>, SourceChannels, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    let channels = SourceChannels::greet(vec![near.into()], &Settings::default()).unwrap();
    let acks = SwitchoverAcks::new(SwitchoverAck::Off);
    let under_way = |at| {
        let (migratable, _) = setup.admit(at, setup.config(1));
        OutgoingDevice::setup(migratable, &setup.capabilities(), &acks, Vec::new()).unwrap()
    };
    ((1..=setup.devices).map(under_way).collect(), channels, far)
}

#[test]
fn a_load_is_cleaned_up_once_however_it_ends() {
    let _watchdog = Watchdog::new();
    type End = fn(Incoming);
    let ends: [(&str, End); 4] = [
        ("aborted", |incoming| drop(incoming.abort())),
        ("dropped", |incoming| drop(incoming)),
        ("failed", |incoming| drop(incoming.finish().unwrap_err())),
        ("cancelled", |incoming| {
            incoming.cancel();
            drop(incoming.finish().unwrap_err());
        }),
    ];
    for (how, end) in ends {
        let recorder = Recorder::new();
        end(incoming(&mixed()));
        let told = recorder.told();
        for number in [2, 3] {
            let states = states(&told, number);
            assert_eq!(
                states,
                ["setup", "active", "failing", "failed"],
                "{how}: {told:?}"
            );
        }
        assert_eq!(cleanups(&told, "load_cleanup", 3)[1..], [1, 1], "{how}");
        // The switchover has not started, and no loader.
        assert_eq!(recorder.count("load_bufs_thread_start"), 0, "{how}");
        assert_eq!(recorder.count("load_bufs_thread_end"), 0, "{how}");
    }
    // A loader that has started ends.
    let recorder = Recorder::new();
    let under_way = incoming(&mixed());
    under_way.switchover_start().unwrap();
    recorder.wait("its start", |told| {
        told.iter().any(|it| it.name == "load_bufs_thread_start")
    });
    drop(under_way.abort());
    assert_eq!(recorder.count("load_bufs_thread_end"), 1);
    // A set-up that a device refuses.
    drop(recorder);
    let recorder = Recorder::new();
    let mut refuses = Mock::new(io::pipe().unwrap().0);
    refuses.set = Some(Box::new(|_| Err(io::ErrorKind::Other.into())));
    let mut settings = DeviceSettings::default();
    settings.transfer = OnOffAuto::Off;
    let devices = vec![MigratableDevice::new(refuses.device(1), settings)];
    let session = LoadSession::builder();
    let capabilities = Setup::default().capabilities();
    Incoming::setup(devices, &capabilities, session, Box::new(|| Ok(()))).unwrap_err();
    assert_eq!(cleanups(&recorder.told(), "load_cleanup", 1), [1]);
    // A session by itself, and a device that is unplugged from it.
    drop(recorder);
    let recorder = Recorder::new();
    let setup = Setup::default();
    let device = |number| setup.admit(number, setup.config(1)).0.into_device();
    let mut session = LoadSession::builder();
    for number in 1..=2 {
        session = session.device(device(number));
    }
    let session = session.start().unwrap();
    drop(session.remove_device(&id(2)).unwrap());
    assert_eq!(cleanups(&recorder.told(), "load_cleanup", 2), [0, 1]);
    let report = session.cleanup();
    assert!(report.result.is_err());
    assert_eq!(cleanups(&recorder.told(), "load_cleanup", 2), [1, 1]);
}

fn begun(mut sources: Vec<OutgoingDevice>, channels: SourceChannels) -> Outgoing {
    state::stop(&mut sources, state::Reason::FinishMigration).unwrap();
    Outgoing::begin(sources, SaveSession::builder().greeted_channels(channels)).unwrap()
}

#[test]
fn a_save_is_cleaned_up_once_however_it_ends() {
    let _watchdog = Watchdog::new();
    type End = fn(Vec<OutgoingDevice>, SourceChannels);
    let before = ["setup", "active"];
    let off = ["setup", "active", "device"];
    let ends: [(&str, &[&str], [&str; 2], End); 5] = [
        (
            "aborted early",
            &before,
            ["cancelling", "cancelled"],
            |sources, _| {
                sources.into_iter().for_each(|it| drop(it.abort()));
            },
        ),
        (
            "dropped early",
            &before,
            ["cancelling", "cancelled"],
            |sources, _| drop(sources),
        ),
        (
            "aborted",
            &off,
            ["cancelling", "cancelled"],
            |sources, channels| {
                drop(begun(sources, channels).abort());
            },
        ),
        (
            "dropped",
            &off,
            ["cancelling", "cancelled"],
            |sources, channels| {
                drop(begun(sources, channels));
            },
        ),
        (
            "failed",
            &off,
            ["failing", "failed"],
            |sources, channels| {
                // Its sections have not been written.
                drop(begun(sources, channels).finish().unwrap_err());
            },
        ),
    ];
    for (how, before, after, end) in ends {
        let recorder = Recorder::new();
        let (sources, channels, far) = outgoing(&mixed());
        let reads = thread::spawn(move || io::copy(&mut { far }, &mut io::sink()));
        end(sources, channels);
        reads.join().unwrap().unwrap();
        let told = recorder.told();
        for number in [1, 2] {
            assert_eq!(states(&told, number), [before, &after].concat(), "{how}");
        }
        assert_eq!(cleanups(&told, "save_cleanup", 2), [1, 1], "{how}");
        assert_eq!(recorder.count("save_setup"), 2, "{how}");
    }
    // With success, the destination's too.
    let recorder = Recorder::new();
    migrate(&mixed()).check();
    let told = recorder.told();
    assert_eq!(cleanups(&told, "save_cleanup", 2), [1, 1]);
    assert_eq!(cleanups(&told, "load_cleanup", 2), [1, 1]);
    assert_eq!(recorder.count("save_setup"), 2);
    for number in [1, 2] {
        let mut states = states(&told, number);
        states.sort_unstable();
        let both = [
            "active",
            "active",
            "completed",
            "completed",
            "device",
            "setup",
            "setup",
        ];
        assert_eq!(states, both);
    }
    // Sessions by themselves: failed; saved, and the VM is there; saved, and it is here.
    drop(recorder);
    let setup = Setup::default();
    type NamedEnd = (&'static str, fn(&mut Report));
    let ends: [NamedEnd; 3] = [
        ("failed", Report::put_back),
        ("there", Report::stop_devices),
        ("here", Report::put_back),
    ];
    for (how, end) in ends {
        let recorder = Recorder::new();
        let (near, far) = UnixStream::pair().unwrap();
        let device: Device = setup.admit(1, setup.config(1)).0.into_device();
        let session = SaveSession::builder().device(device).channel(near);
        let session = session.start().unwrap();
        if how == "failed" {
            session.cancel();
        }
        let reads = thread::spawn(move || io::copy(&mut { far }, &mut io::sink()));
        let mut report = session.join();
        assert_eq!(report.result.is_err(), how == "failed");
        end(&mut report);
        drop(report);
        reads.join().unwrap().unwrap();
        assert_eq!(cleanups(&recorder.told(), "save_cleanup", 1), [1], "{how}");
        assert_eq!(recorder.count("save_setup"), 1, "{how}");
    }
}

#[test]
fn only_what_happens_is_told() {
    let _watchdog = Watchdog::new();
    let recorder = Recorder::new();
    // A device without data: its config alone.
    let (near, far) = UnixStream::pair().unwrap();
    let (into, written) = io::pipe().map(|(read, write)| (write, read)).unwrap();
    let load = LoadSession::builder().device(Mock::new(into).device(1));
    let load = load.channel(far).start().unwrap();
    let save = SaveSession::builder().device(Mock::new(io::pipe().unwrap().0).device(1));
    let save = save.channel(near).start().unwrap();
    load.switchover_start();
    let mut saved = save.join();
    saved.result.clone().unwrap();
    saved.stop_devices();
    drop(saved);
    load.join().result.unwrap();
    drop(written);
    assert_eq!(recorder.count("load_device_config_state_end"), 1);
    assert_eq!(recorder.count("load_bufs_thread_start"), 1);
    assert_eq!(recorder.count("load_state_device_buffer_start"), 0);
    assert_eq!(recorder.count("load_state_device_buffer_end"), 0);
    drop(recorder);

    // Iterations begin once. A device has nothing for now, once, until it has something again.
    let recorder = Recorder::new();
    let (mut answers, log) = (vec![0, 0, 5, 0, 0, 5].into_iter(), Vec::new());
    let device = FdDevice::new(|_| Ok(io::pipe()?.0.into())).with_precopy(
        || Ok(PrecopyInfo::default()),
        move |_, _| match answers.next() {
            Some(0) | None => Err(Errno::ENOMSG.into()),
            Some(count) => Ok(count),
        },
    );
    let device = Device::new(id(1), Box::new(device)).unwrap();
    let migratable = MigratableDevice::new(device, DeviceSettings::default());
    let (acks, capabilities) = (
        SwitchoverAcks::new(SwitchoverAck::Off),
        Setup::default().capabilities(),
    );
    let mut source = OutgoingDevice::setup(migratable, &capabilities, &acks, log).unwrap();
    for _ in 0..7 {
        source.iterate(Vec::new()).unwrap();
    }
    drop(source.abort());
    let told = recorder.told();
    let of_iterations = told.iter().map(|it| it.name).filter(|name| {
        let name = *name;
        name.starts_with("save_iterate") || name.starts_with("save_block")
    });
    let expected = "save_iterate_start save_block_precopy_empty_hit save_iterate save_iterate save_block \
                    save_iterate save_block_precopy_empty_hit save_iterate save_iterate save_block \
                    save_iterate save_block_precopy_empty_hit save_iterate";
    assert!(of_iterations.eq(expected.split(' ')), "{told:?}");
}

#[test]
fn a_packet_that_comes_back_in_parts_is_one_load() {
    let _watchdog = Watchdog::new();
    let recorder = Recorder::new();
    // Before the switchover: most of it waits in the spill file, and comes back in parts.
    let mut settings = Settings::default().budget(4 << 20);
    settings.spill = Spill::Memfd;
    settings.buffer_len = 64 << 10;
    let setup = Setup {
        len: 24 << 20,
        ..Setup::default()
    };
    let device = |seed| -> Device { setup.admit(1, setup.config(seed)).0.into_device() };
    let (near, far) = UnixStream::pair().unwrap();
    let load = LoadSession::builder().settings(settings).channel(far);
    let load = load.device(device(2)).start().unwrap();
    let save = SaveSession::builder().channel(near).device(device(1));
    let save = save.start().unwrap();
    while load.stats().spill.written < 10 << 20 {
        assert!(load.failure().is_none());
        thread::sleep(Duration::from_millis(1));
    }
    load.switchover_start();
    let mut saved = save.join();
    saved.stop_devices();
    drop(saved);
    load.join().result.unwrap();
    let told = recorder.told();
    let of_name = |name: &str| -> Vec<String> {
        let of_name = told.iter().filter(|it| it.name == name);
        of_name.map(|it| it.field("idx").to_owned()).collect()
    };
    let starts = of_name("load_state_device_buffer_load_start");
    let all: Vec<_> = (0..starts.len()).map(|idx| idx.to_string()).collect();
    assert!(all.len() > 20);
    assert_eq!(starts, all, "each once, in order");
    assert_eq!(of_name("load_state_device_buffer_load_end"), all);
    assert_eq!(recorder.count("load_state_device_buffer_start"), 1);
    assert_eq!(recorder.count("load_state_device_buffer_end"), 1);
}
