//! Every field of every settings type, with 0, 1 and the most that it can hold: either an error that
//! begins with the field's name, before a device has changed its state, or a session that can be run,
//! cancelled and dropped. The fields are those that the types' debug output has: a new one without a
//! row fails.

use std::{
    io::{self, Write},
    os::unix::net::UnixStream,
    sync::Mutex,
    thread,
    time::Duration,
};

use vfio_migration::{
    Backend, Device, DeviceId, DeviceSpec, DeviceState, Error, ErrorKind, LoadSession, Relay,
    SaveSession, Settings, SourceChannels, Spill, Writer,
    migration::{
        Capabilities, DeviceSettings, Incoming, MigratableDevice, OutgoingDevice, SwitchoverAck,
        SwitchoverAcks,
    },
    sim::{SimConfig, SimDevice},
};

use crate::{
    barrier::sync,
    mock::{Log, Mock},
    names::id,
    packets::{config_packet, hello, packet},
    pipes::collect,
    watchdog::Watchdog,
};

/// 0, 1, or the most.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Value {
    Zero,
    One,
    Most,
}

const VALUES: [Value; 3] = [Value::Zero, Value::One, Value::Most];

impl Value {
    fn of<T>(self, zero: T, one: T, most: T) -> T {
        match self {
            Self::Zero => zero,
            Self::One => one,
            Self::Most => most,
        }
    }

    fn time(self) -> Duration {
        self.of(Duration::ZERO, Duration::from_nanos(1), Duration::MAX)
    }

    fn usize(self) -> usize {
        self.of(0, 1, usize::MAX)
    }

    fn u32(self) -> u32 {
        self.of(0, 1, u32::MAX)
    }

    fn u64(self) -> u64 {
        self.of(0, 1, u64::MAX)
    }
}

type Run = (&'static str, fn(&Settings, End) -> Result<(), Error>);

type Row<T> = (&'static str, fn(&mut T, Value));

const SETTINGS: &[Row<Settings>] = &[
    ("budget", |s, v| s.budget = Some(v.usize())),
    ("buffer_len", |s, v| s.buffer_len = v.usize()),
    ("data_len", |s, v| s.data_len = Some(v.usize())),
    ("window", |s, v| s.window = v.u32()),
    ("max_packet", |s, v| s.max_packet = v.u32()),
    ("spill_limit", |s, v| s.spill_limit = v.u64()),
    ("channels", |s, v| s.channels = v.u32()),
    ("max_devices", |s, v| s.max_devices = Some(v.u32())),
    ("grace", |s, v| s.grace = v.time()),
    ("no_progress", |s, v| s.no_progress = v.time()),
    ("hello_timeout", |s, v| s.hello_timeout = v.time()),
    ("packet_timeout", |s, v| s.packet_timeout = v.time()),
    ("config_ready_timeout", |s, v| {
        s.config_ready_timeout = v.time();
    }),
];

/// Neither a size, a count nor a time: every value is one.
const NO_NUMBERS: &[&str] = &[
    "backend",
    "spill",
    "writer",
    "uuid",
    "config_after_iterables",
    "stop_after_load",
    "precopy_over_channels",
];

/// The names of a struct's own fields, in its debug output.
fn fields(debug: &str) -> Vec<String> {
    let lines = debug.lines();
    let own = lines.filter(|line| line.starts_with("    ") && !line.starts_with("     "));
    own.filter_map(|line| Some(line.trim().split_once(": ")?.0.to_owned()))
        .collect()
}

#[test]
fn a_chain_sets_every_field_and_each_its_own() {
    let hour = Duration::from_secs(3600);
    let set = Settings::default()
        .backend(Backend::Blocking)
        .budget(101)
        .buffer_len(102)
        .data_len(103)
        .precopy_over_channels(true)
        .window(104)
        .max_packet(105)
        .spill(Spill::Off)
        .spill_limit(106)
        .writer(Writer::Auto)
        .channels(107)
        .uuid([108; 16])
        .max_devices(109)
        .config_after_iterables(true)
        .stop_after_load(true)
        .grace(hour)
        .no_progress(hour + hour)
        .hello_timeout(hour * 3)
        .packet_timeout(hour * 4)
        .config_ready_timeout(hour * 5);
    let numbers = (set.budget, set.buffer_len, set.data_len, set.window);
    assert_eq!(numbers, (Some(101), 102, Some(103), 104));
    let numbers = (set.max_packet, set.spill_limit, set.channels);
    assert_eq!(numbers, (105, 106, 107));
    assert_eq!((set.uuid, set.max_devices), ([108; 16], Some(109)));
    assert_eq!(
        [set.grace, set.no_progress, set.hello_timeout],
        [hour, hour * 2, hour * 3]
    );
    assert_eq!(
        [set.packet_timeout, set.config_ready_timeout],
        [hour * 4, hour * 5]
    );
    // The rest too: no field is as it was.
    let before = format!("{:?}", Settings::default());
    let after = format!("{set:?}");
    let fields = fields(&format!("{:#?}", Settings::default()));
    for field in fields {
        let value = |debug: &str| {
            let (_, rest) = debug
                .split_once(&format!(" {field}: "))
                .expect("it is there");
            rest.split_once([',', '}']).expect("it ends").0.to_owned()
        };
        assert_ne!(value(&before), value(&after), "{field}");
    }
}

fn every_field_has_its_row<T>(debug: &str, rows: &[Row<T>], others: &[&str]) {
    let fields = fields(debug);
    assert!(!fields.is_empty(), "{debug}");
    for field in fields {
        let known = rows.iter().any(|(name, _)| *name == field) || others.contains(&&*field);
        assert!(known, "{field} has no row");
    }
}

/// Whether the error is that setting's.
fn names(error: &Error, setting: &str) -> bool {
    match error.kind() {
        ErrorKind::Misuse(what) => what.starts_with(setting),
        ErrorKind::Host => error.to_string().contains(&format!("for the {setting}")),
        _ => false,
    }
}

/// Whether a setting was refused, rather than too short a time up.
fn is_refused(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Misuse(_) | ErrorKind::Host)
}

fn untouched(log: &Mutex<Log>) -> bool {
    log.lock().unwrap().states.is_empty()
}

fn source_bytes() -> Vec<u8> {
    let mut bytes = hello(0);
    bytes.extend(sync());
    bytes.extend(packet(1, 0, b"state"));
    bytes.extend(config_packet(1, 1, b"config"));
    bytes
}

/// How a run is ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum End {
    Join,
    Cancel,
    Remove,
    Drop,
}

const ENDS: [End; 4] = [End::Join, End::Cancel, End::Remove, End::Drop];

fn load(settings: &Settings, end: End) -> Result<(), Error> {
    let (reader, writer) = io::pipe().unwrap();
    let got = collect(reader);
    let mock = Mock::new(writer);
    let log = mock.log.clone();
    let (mut near, far) = UnixStream::pair().unwrap();
    let session = LoadSession::builder()
        .settings(settings.clone())
        .device(mock.device(1))
        .channel(far)
        .start()
        .inspect_err(|error| assert!(!is_refused(&error.error) || untouched(&log)))?;
    session.switchover_start();
    match end {
        End::Join => {
            // A short time may hang up in the middle.
            let _refused = near.write_all(&source_bytes());
            drop(near);
            let _ended = session.join();
        }
        End::Cancel => {
            session.cancel();
            let _ended = session.join();
        }
        End::Remove => {
            let _removed = session.remove_device(&id(1));
            session.cancel();
            let _ended = session.cleanup();
        }
        End::Drop => drop(session),
    }
    let _some_of_it = got.join().unwrap();
    Ok(())
}

fn save(settings: &Settings, end: End) -> Result<(), Error> {
    let (reader, mut writer) = io::pipe().unwrap();
    writer.write_all(b"state").unwrap();
    let open = (end != End::Join).then_some(writer);
    let mock = Mock::new(reader);
    let log = mock.log.clone();
    let (mut near, far) = UnixStream::pair().unwrap();
    let reading = thread::spawn(move || io::copy(&mut near, &mut io::sink()));
    let session = SaveSession::builder()
        .settings(settings.clone())
        .device(mock.device(1))
        .channel(far)
        .start()
        .inspect_err(|error| assert!(!is_refused(&error.error) || untouched(&log)))?;
    match end {
        End::Join => {
            let _ended = session.join();
        }
        End::Cancel | End::Remove => {
            session.cancel();
            let _ended = session.join();
        }
        End::Drop => drop(session),
    }
    drop(open);
    let _sent = reading.join().unwrap();
    Ok(())
}

fn relay(settings: &Settings, end: End) -> Result<(), Error> {
    let relay = Relay::builder().settings(settings.clone()).start()?;
    let (mut near, source) = UnixStream::pair().unwrap();
    let (destination, mut far) = UnixStream::pair().unwrap();
    let reading = thread::spawn(move || io::copy(&mut far, &mut io::sink()));
    relay.add_channel(source, destination)?;
    match end {
        End::Join => {
            let _refused = near.write_all(&source_bytes());
            drop(near);
            relay.no_more_channels();
            let _ended = relay.join();
        }
        End::Cancel | End::Remove => {
            relay.cancel();
            let _ended = relay.join();
        }
        End::Drop => drop(relay),
    }
    let _sent = reading.join().unwrap();
    Ok(())
}

fn greet(settings: &Settings, _end: End) -> Result<(), Error> {
    let (near, mut far) = UnixStream::pair().unwrap();
    let reading = thread::spawn(move || io::copy(&mut far, &mut io::sink()));
    let greeted = SourceChannels::greet(vec![near.into()], settings).map(drop);
    let _sent = reading.join().unwrap();
    greeted
}

#[test]
fn every_setting_of_a_session_is_refused_by_its_name_or_works() {
    let _watchdog = Watchdog::new();
    let debug = format!("{:#?}", Settings::default());
    every_field_has_its_row(&debug, SETTINGS, NO_NUMBERS);
    let runs: [Run; 4] = [
        ("load", load),
        ("save", save),
        ("relay", relay),
        ("greet", greet),
    ];
    let mut refused = Vec::new();
    for (name, set) in SETTINGS {
        for value in VALUES {
            for (run, start) in runs {
                for end in ENDS {
                    for backend in [Backend::Auto, Backend::Blocking] {
                        let mut settings = Settings::default();
                        settings.backend = backend;
                        // Little memory, made quickly.
                        settings.budget = Some(4 << 20);
                        if run == "relay" {
                            settings.budget = None;
                        }
                        set(&mut settings, value);
                        let Err(error) = start(&settings, end) else {
                            continue;
                        };
                        // Too short a time for anything is found when it is up.
                        let too_short = *error.kind() == ErrorKind::Stalled
                            || *error.kind() == ErrorKind::Cancelled
                            || *error.kind() == ErrorKind::Channel;
                        let expected = value == Value::One && too_short || names(&error, name);
                        assert!(expected, "{name} {value:?} {run} {end:?}: {error:?}");
                        refused.push((*name, value));
                    }
                }
            }
        }
    }
    for must in [
        ("budget", Value::Zero),
        ("budget", Value::Most),
        ("buffer_len", Value::Most),
        ("data_len", Value::Zero),
        ("data_len", Value::Most),
        ("window", Value::Zero),
        ("window", Value::Most),
        ("max_packet", Value::One),
        ("channels", Value::Most),
        ("max_devices", Value::Zero),
        ("max_devices", Value::Most),
        ("no_progress", Value::Zero),
        ("hello_timeout", Value::Zero),
        ("packet_timeout", Value::Zero),
    ] {
        assert!(refused.contains(&must), "{must:?}");
    }
    for may in ["grace", "no_progress", "hello_timeout", "packet_timeout"] {
        assert!(!refused.contains(&(may, Value::Most)), "{may}: no limit");
    }
}

#[test]
fn a_device_of_a_save_with_packets_that_cannot_be_is_refused_before_its_state_changes() {
    for len in [0, usize::MAX, 16 << 20, 1 << 40] {
        let (reader, _writer) = io::pipe().unwrap();
        let mock = Mock::new(reader);
        let log = mock.log.clone();
        let (_near, far) = UnixStream::pair().unwrap();
        let error = SaveSession::builder()
            .device(DeviceSpec::new(mock.device(1)).data_len(len))
            .channel(far)
            .start()
            .unwrap_err()
            .error;
        assert!(names(&error, "a device's data_len"), "{error}");
        assert_eq!(error.device(), Some(&id(1)));
        assert!(log.lock().unwrap().states.is_empty());
    }
}

const OF_A_DEVICE: &[Row<DeviceSettings>] =
    &[("buffer_len", |s, v| s.buffer_len = Some(v.usize()))];

#[test]
fn every_setting_of_a_device_is_refused_by_its_name_before_its_state_changes_or_works() {
    let others = [
        "enable",
        "transfer",
        "dirty_tracking",
        "events",
        "config_after_iterables",
    ];
    let debug = format!("{:#?}", DeviceSettings::default());
    every_field_has_its_row(&debug, OF_A_DEVICE, &others);
    let long = |s: &mut DeviceSettings, _| s.buffer_len = Some(1 << 40);
    let rows = OF_A_DEVICE
        .iter()
        .copied()
        .chain([("buffer_len", long as fn(&mut _, _))]);
    for (name, set) in rows {
        for value in VALUES {
            let make = || {
                let device = SimDevice::new(SimConfig::default()).unwrap();
                let handle = device.handle();
                let mut settings = DeviceSettings::default();
                set(&mut settings, value);
                let device = Device::new(id(1), Box::new(device)).unwrap();
                (MigratableDevice::new(device, settings), handle)
            };
            let check = |back: &MigratableDevice,
                         error: &Error,
                         handle: &vfio_migration::sim::SimHandle| {
                let expected = format!("DeviceSettings::{name}");
                assert!(names(error, &expected), "{value:?}: {error}");
                assert_eq!(error.device(), Some(&id(1)));
                assert_eq!(back.state(), DeviceState::Running);
                assert!(handle.changes().is_empty(), "{:?}", handle.changes());
            };
            let capabilities = Capabilities::default();
            let (migratable, handle) = make();
            let set_up = OutgoingDevice::setup(
                migratable,
                &capabilities,
                &SwitchoverAcks::new(SwitchoverAck::Off),
                Vec::new(),
            );
            let refused = match set_up {
                Ok(source) => {
                    assert_eq!(source.abort().state(), DeviceState::Running);
                    false
                }
                Err(failed) => {
                    let (error, back) = failed.into_parts();
                    check(&back, &error, &handle);
                    true
                }
            };
            let (migratable, handle) = make();
            let approve = Box::new(|| Ok(()));
            let session = LoadSession::builder();
            match Incoming::setup(vec![migratable], &capabilities, session, approve) {
                Ok(incoming) => {
                    assert!(!refused);
                    drop(incoming);
                }
                Err(failed) => {
                    assert!(refused);
                    let (error, back) = failed.into_parts();
                    check(&back[0], &error, &handle);
                }
            }
        }
    }
}

const OF_A_SIMULATED_DEVICE: &[Row<SimConfig>] = &[
    ("seed", |s, v| s.seed = v.u64()),
    ("len", |s, v| s.len = v.u64()),
    ("precopy_initial", |s, v| s.precopy_initial = v.u64()),
    ("config_len", |s, v| s.config_len = v.u32()),
    ("data_size", |s, v| s.data_size = Some(v.u64())),
    ("buffer", |s, v| s.buffer = Some(v.usize())),
    ("piece", |s, v| s.piece = Some(v.usize())),
];

#[test]
fn every_setting_of_a_simulated_device_is_refused_or_works() {
    let others = ["flags", "state", "stream", "faults"];
    let debug = format!("{:#?}", SimConfig::default());
    every_field_has_its_row(&debug, OF_A_SIMULATED_DEVICE, &others);
    for (name, set) in OF_A_SIMULATED_DEVICE {
        for value in VALUES {
            let mut config = SimConfig::default();
            set(&mut config, value);
            let device = match SimDevice::new(config) {
                Ok(device) => device,
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "{name} {value:?}");
                    continue;
                }
            };
            let mut device = Device::new(id(1), Box::new(device)).unwrap();
            let _size = device.data_size().unwrap();
            let running = DeviceState::Running;
            device.set_state(DeviceState::PreCopy, running).unwrap();
            let _info = device.precopy_info().unwrap();
            let _some = device.read_precopy(&mut [0; 64]).unwrap();
            device.set_state(DeviceState::StopCopy, running).unwrap();
            let _some = device.read_stop_copy(&mut [0; 64]).unwrap();
            let _len = device.save_config(&mut io::sink()).unwrap();
            device.set_state(DeviceState::Stop, running).unwrap();
            device.set_state(DeviceState::Resuming, running).unwrap();
            device.reset().unwrap();
        }
    }
}

const OF_A_SIMULATED_RING: &[Row<vfio_migration_uring::sim::SimConfig>] = &[
    ("seed", |s, v| s.seed = v.u64()),
    ("capacity", |s, v| s.capacity = v.usize()),
    ("short", |s, v| s.short = v.of(0, 1, u8::MAX)),
    ("interrupt", |s, v| s.interrupt = v.of(0, 1, u8::MAX)),
    ("again", |s, v| s.again = v.of(0, 1, u8::MAX)),
    ("delay", |s, v| s.delay = v.of(0, 1, u8::MAX)),
];

#[test]
fn every_setting_of_a_simulated_ring_works() {
    let _watchdog = Watchdog::new();
    let others = ["reorder", "plan", "idle"];
    let debug = format!("{:#?}", vfio_migration_uring::sim::SimConfig::default());
    every_field_has_its_row(&debug, OF_A_SIMULATED_RING, &others);
    for (_, set) in OF_A_SIMULATED_RING {
        for value in VALUES {
            let mut config = vfio_migration_uring::sim::SimConfig::default();
            set(&mut config, value);
            let (reader, writer) = io::pipe().unwrap();
            let got = collect(reader);
            let (_near, far) = UnixStream::pair().unwrap();
            let session = LoadSession::builder()
                .device(Mock::new(writer).device(1))
                .channel(far)
                .simulated_ring(config)
                .start()
                .unwrap();
            session.switchover_start();
            session.cancel();
            let _ended = session.join();
            let _some_of_it = got.join().unwrap();
        }
    }
}

#[cfg(feature = "serde")]
#[test]
fn settings_and_counters_are_data_too() {
    use vfio_migration::{Stats, migration::OnOffAuto};

    // What is left out is as it is by default.
    let settings: Settings = serde_json::from_str(
        r#"{"backend": "blocking", "budget": 4194304, "spill": "off", "grace": {"secs": 1, "nanos": 0}}"#,
    )
    .unwrap();
    let expected = Settings::default()
        .backend(Backend::Blocking)
        .budget(4 << 20)
        .spill(Spill::Off)
        .grace(Duration::from_secs(1));
    assert_eq!(format!("{settings:?}"), format!("{expected:?}"));
    let back = serde_json::to_string(&settings).unwrap();
    let again: Settings = serde_json::from_str(&back).unwrap();
    assert_eq!(format!("{again:?}"), format!("{expected:?}"));
    // A setting that there is not is no default.
    assert!(serde_json::from_str::<Settings>(r#"{"buget": 1}"#).is_err());

    let capabilities: Capabilities =
        serde_json::from_str(r#"{"switchover_ack": "reusable"}"#).unwrap();
    let expected = Capabilities::default().switchover_ack(SwitchoverAck::Reusable);
    assert_eq!(format!("{capabilities:?}"), format!("{expected:?}"));
    let device: DeviceSettings = serde_json::from_str(r#"{"transfer": "off"}"#).unwrap();
    let expected = DeviceSettings::default().transfer(OnOffAuto::Off);
    assert_eq!(format!("{device:?}"), format!("{expected:?}"));

    let id = DeviceId::new("nic", 2).unwrap();
    let text = serde_json::to_string(&id).unwrap();
    assert_eq!(text, r#"{"idstr":"nic","instance":2}"#);
    assert_eq!(serde_json::from_str::<DeviceId>(&text).unwrap(), id);
    assert!(serde_json::from_str::<DeviceId>(r#"{"idstr":""}"#).is_err());

    let builder = LoadSession::builder().settings(Settings::default().max_devices(1));
    let load = builder.start().unwrap();
    let stats: Stats = load.stats();
    let value = serde_json::to_value(&stats).unwrap();
    assert_eq!(value["budget"].as_u64(), Some(stats.budget));
    assert!(value["devices"].as_array().unwrap().is_empty());
}
