//! The examples do what they say.
#![cfg(all(feature = "sim", feature = "timeline"))]
#![allow(missing_docs, reason = "a test")]

#[cfg(feature = "rustls")]
#[path = "../../examples/embed_rpc.rs"]
mod embed_rpc;
#[path = "../../examples/event_loop.rs"]
mod event_loop;
#[path = "../../examples/push.rs"]
mod push;
#[path = "../../examples/relay.rs"]
mod relay;
#[path = "../../examples/save_to_file.rs"]
#[allow(dead_code, reason = "its main takes a path from the command line")]
mod save_to_file;
#[path = "../../examples/timeline.rs"]
#[allow(dead_code, reason = "its main takes a path from the command line")]
mod timeline;
#[path = "../support/watchdog.rs"]
mod watchdog;

use std::{
    fs,
    os::unix::net::UnixStream,
    path::Path,
    process,
    sync::{Mutex, mpsc},
    thread,
    time::Duration,
};

use vfio_migration::{
    Device, DeviceId, ErrorKind, Settings, SourceChannels,
    migration::{Capabilities, DeviceSettings, MigratableDevice},
    sim::{Faults, SimConfig, SimDevice},
    stream::SectionKind,
};

use crate::watchdog::Watchdog;

#[test]
#[cfg(feature = "rustls")]
fn a_vm_moves_by_requests_over_tls_under_filters_with_devices_made_late() {
    let _watchdog = Watchdog::new();
    embed_rpc::main().unwrap();
}

/// It is no longer than it promises, without what such a VMM has anyway.
#[test]
fn the_integration_with_requests_stays_short() {
    let lines = include_str!("../../examples/embed_rpc.rs").lines().count();
    println!("embed_rpc has {lines} lines");
    assert!(lines < 200, "{lines} lines");
}

#[test]
fn packets_that_come_otherwise_are_pushed() {
    let _watchdog = Watchdog::new();
    push::main().unwrap();
}

#[test]
fn a_timeline_names_the_slow_device_and_why_it_was_slow() {
    let _watchdog = Watchdog::new();
    let picture = timeline::migrate().unwrap();
    assert!(picture.contains("Longest: 0000:d8:00.0/vfio (it had all of its state at "));
    assert!(picture.contains("Its own driver set the pace: it takes what it is given"));
    assert!(!picture.contains("FAILED"));
}

#[test]
fn a_relay_passes_a_migration_on() {
    let _watchdog = Watchdog::new();
    relay::main().unwrap();
}

#[test]
fn a_file_keeps_a_devices_state() {
    let _watchdog = Watchdog::new();
    let name = format!("save_to_file-{}", process::id());
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let saved = save_to_file::run(&path);
    fs::remove_file(&path).unwrap();
    saved.unwrap();
}

#[test]
fn one_thread_waits_for_the_main_channel_and_the_session() {
    let _watchdog = Watchdog::new();
    event_loop::main().unwrap();
}

fn device(config: SimConfig) -> Vec<MigratableDevice> {
    let device = SimDevice::new(config).unwrap();
    let id = DeviceId::new("0000:00:03.0/vfio", 0).unwrap();
    let device = Device::new(id, Box::new(device)).unwrap();
    vec![MigratableDevice::new(device, DeviceSettings::default())]
}

/// Its source says nothing more, and is not told: only the session's eventfd can end the wait.
#[test]
fn a_device_that_fails_wakes_an_event_loop_whose_source_is_silent() {
    let _watchdog = Watchdog::new();
    let ((main, main_there), (channel, channel_there)) =
        (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
    let mut capabilities = Capabilities::default();
    // So that the device is written to before the switchover.
    capabilities.precopy_over_channels = true;
    let here = device(SimConfig {
        precopy_initial: 100_000,
        ..SimConfig::default()
    });
    let there = device(SimConfig {
        // Less than what comes, so that the write is under way when it fails.
        buffer: Some(4096),
        faults: Faults {
            fail_at: Some(1000),
            ..Faults::default()
        },
        ..SimConfig::default()
    });
    let channels = SourceChannels::greet(vec![channel.into()], &Settings::default()).unwrap();
    let (ended, waits) = mpsc::channel::<()>();
    let waits = Mutex::new(waits);
    thread::scope(|scope| {
        scope.spawn(|| {
            let silent = Duration::from_secs(60);
            event_loop::source::source(
                here,
                &main,
                channels,
                &capabilities,
                silent,
                |sources, channels, main| {
                    let (source, part) = (&mut sources[0], SectionKind::Part);
                    let owner = source.id().clone();
                    main.device_section(part, 0, &owner, |body| {
                        source.iterate_over(channels, body)
                    })?;
                    let _ended = waits.lock().unwrap().recv();
                    Err(channels.failure().expect("the destination has ended"))
                },
            )
        });
        let channels = vec![channel_there];
        let loaded = event_loop::destination(there, &main_there, channels, &capabilities);
        drop(ended);
        assert_eq!(*loaded.unwrap_err().kind(), ErrorKind::Device);
    });
}
