//! The example of a VMM's whole integration does what it says, and stays short.

#[path = "../../examples/embed.rs"]
mod embed;

use std::{
    io::{self, Read},
    net::Shutdown,
    os::unix::net::UnixStream,
    thread,
    time::Duration,
};

use embed::{
    destination::destination,
    downtime::{Limits, converge},
    source::{Runs, source},
};
use nix::errno::Errno;
use vfio_migration::{
    Device, DeviceId, DeviceState, Duty, ErrorKind, LoadSession, Result, Settings, SourceChannels,
    migration::{Capabilities, DeviceSettings, MigratableDevice},
    sim::{Faults, On, SimConfig, SimDevice, TransitionFault, Which},
};

use crate::watchdog::Watchdog;

#[test]
fn the_example_moves_a_vm() {
    let _watchdog = Watchdog::new();
    embed::main().unwrap();
}

#[test]
fn the_guide_shows_what_the_examples_run() {
    let guide = include_str!("../../guide.md");
    for (name, code) in [
        ("source", include_str!("../../examples/source.rs")),
        ("downtime", include_str!("../../examples/downtime.rs")),
        ("destination", include_str!("../../examples/destination.rs")),
    ] {
        // But for what the example says about itself.
        let (head, code) = code.split_once("\n\n").expect("a head");
        assert!(head.lines().all(|line| line.starts_with("//! ")), "{name}");
        let shown = format!("```rust\n{code}```\n");
        assert!(guide.contains(&shown), "guide.md shows another {name}.rs");
    }
}

fn device(config: SimConfig) -> Vec<MigratableDevice> {
    let device = SimDevice::new(config).unwrap();
    let id = DeviceId::new("0000:00:03.0/vfio", 0).unwrap();
    let device = Device::new(id, Box::new(device)).unwrap();
    vec![MigratableDevice::new(device, DeviceSettings::default())]
}

/// What one side says in the end, and its device.
type Ended<T> = (T, Vec<MigratableDevice>);

/// A migration whose return path is `back`'s: from the destination, to the source.
fn migrate(
    there: SimConfig,
    limits: &Limits,
    back: impl FnOnce(&UnixStream, &UnixStream) + Send,
) -> (Ended<Runs>, Ended<Result<()>>) {
    let pair = || UnixStream::pair().unwrap();
    let ((main, near), (far, main_there), (channel, channel_there)) = (pair(), pair(), pair());
    let (here, there) = (device(SimConfig::default()), device(there));
    let capabilities = Capabilities::default();
    let channels = SourceChannels::greet(vec![channel.into()], &Settings::default()).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            // The destination may be gone.
            let _count = io::copy(&mut &near, &mut &far);
            let _closed = far.shutdown(Shutdown::Write);
        });
        scope.spawn(|| back(&far, &near));
        let source = scope.spawn(|| {
            let patience = Duration::from_secs(60);
            source(
                here,
                &main,
                channels,
                &capabilities,
                patience,
                |sources, channels, main| converge(sources, channels, main, limits),
            )
        });
        let session = LoadSession::builder().channel(channel_there);
        let there = destination(there, &main_there, session, &capabilities);
        main_there.shutdown(Shutdown::Both).unwrap();
        (source.join().unwrap(), there)
    })
}

const LIMITS: Limits = Limits {
    downtime: Duration::from_millis(300),
    bandwidth: 1 << 30,
    precopy: Duration::from_secs(60),
};

/// Passes on what the destination says.
fn whole(mut from: &UnixStream, mut to: &UnixStream) {
    // The source may be gone.
    let _count = io::copy(&mut from, &mut to);
}

fn rests(devices: &[MigratableDevice], state: DeviceState) {
    assert_eq!(devices.len(), 1, "it comes back");
    assert_eq!(devices[0].state(), state);
    assert_eq!(devices[0].duty(), Duty::Nothing);
}

#[test]
fn a_state_that_the_destinations_driver_refuses_lets_the_vm_go_on() {
    let _watchdog = Watchdog::new();
    let refuses = SimConfig {
        faults: Faults {
            transitions: vec![TransitionFault {
                on: On::Request {
                    from: DeviceState::Resuming,
                    to: DeviceState::RunningP2p,
                },
                which: Which::Every,
                errno: Errno::EINVAL as i32,
                leaves: None,
            }],
            ..Faults::default()
        },
        ..SimConfig::default()
    };
    let ((runs, here), (moved, there)) = migrate(refuses, &LIMITS, whole);
    assert!(matches!(runs, Runs::Here(_)), "{runs:?}");
    rests(&here, DeviceState::Running);
    assert_eq!(*moved.unwrap_err().kind(), ErrorKind::State);
    rests(&there, DeviceState::Stop);
}

#[test]
fn a_verdict_that_is_lost_leaves_the_source_in_doubt() {
    let _watchdog = Watchdog::new();
    let lost = |mut from: &UnixStream, to: &UnixStream| {
        from.read_exact(&mut [0; 8]).unwrap();
        to.shutdown(Shutdown::Both).unwrap();
    };
    let ((runs, here), (moved, there)) = migrate(SimConfig::default(), &LIMITS, lost);
    assert!(matches!(runs, Runs::Unknown), "{runs:?}");
    rests(&here, DeviceState::Stop);
    moved.unwrap();
    rests(&there, DeviceState::Running);
}

#[test]
fn a_return_path_that_ends_while_the_vm_runs_ends_the_migration() {
    let _watchdog = Watchdog::new();
    let never = Limits {
        bandwidth: 0,
        precopy: Duration::from_secs(20),
        ..LIMITS
    };
    let gone = |_from: &UnixStream, to: &UnixStream| to.shutdown(Shutdown::Write).unwrap();
    let ((runs, here), (moved, there)) = migrate(SimConfig::default(), &never, gone);
    let Runs::Here(error) = runs else {
        panic!("{runs:?}")
    };
    assert_eq!(*error.kind(), ErrorKind::Channel, "found before the limit");
    rests(&here, DeviceState::Running);
    moved.unwrap_err();
    rests(&there, DeviceState::Running);
}

#[test]
fn what_does_not_fit_the_downtime_limit_is_given_up() {
    let _watchdog = Watchdog::new();
    let never = Limits {
        bandwidth: 0,
        precopy: Duration::from_millis(100),
        ..LIMITS
    };
    let ((runs, here), (moved, there)) = migrate(SimConfig::default(), &never, whole);
    let Runs::Here(error) = runs else {
        panic!("{runs:?}")
    };
    assert_eq!(*error.kind(), ErrorKind::Stalled);
    rests(&here, DeviceState::Running);
    moved.unwrap_err();
    rests(&there, DeviceState::Running);
}
