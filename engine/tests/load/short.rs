//! A load with short times, of whatever a test sends.

use std::{
    io::{self, Write},
    os::unix::net::UnixStream,
    thread,
    time::Duration,
};

use vfio_migration::{Error, ErrorKind, LoadSession, Report, Settings, Spill};

use crate::{mock::Mock, pipes::collect};

pub fn settings() -> Settings {
    let mut settings = Settings::default();
    settings.budget = Some(4 << 20);
    settings.spill = Spill::Off;
    settings.no_progress = Duration::from_millis(500);
    settings.packet_timeout = Duration::from_millis(500);
    settings.hello_timeout = Duration::from_millis(500);
    settings.config_ready_timeout = Duration::from_millis(500);
    settings
}

/// Loads `devices` devices from these channels' bytes. Each channel stays open behind them until
/// the load has ended.
pub fn load(settings: Settings, devices: u32, channels: Vec<Vec<u8>>) -> Report {
    let mut builder = LoadSession::builder().settings(settings);
    for device in 1..=devices {
        let (reader, writer) = io::pipe().unwrap();
        drop(collect(reader));
        builder = builder.device(Mock::new(writer).device(device));
    }
    let mut sources = Vec::new();
    for bytes in channels {
        let (mut near, far) = UnixStream::pair().unwrap();
        builder = builder.channel(far);
        sources.push(move || {
            // The other side may hang up in the middle.
            let _refused = near.write_all(&bytes);
            near
        });
    }
    let session = builder.start().unwrap();
    let sources: Vec<_> = sources.into_iter().map(thread::spawn).collect();
    session.switchover_start();
    let report = session.join();
    for source in sources {
        drop(source.join().unwrap());
    }
    report
}

pub fn stalled(report: &Report) -> &Error {
    let error = report.result.as_ref().unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Stalled, "{error}");
    error
}

/// What an error's cause says.
pub fn missing(error: &Error) -> String {
    let text = error.to_string();
    let missing = text.split_once(&format!("{}: ", error.kind()));
    missing.map(|(_, what)| what.to_owned()).unwrap_or_default()
}
