//! What happened when, drawn by the VMM: a timeline of a migration with one slow device among quick ones.
//!
//! The VMM looks at the sessions' counters every few milliseconds, and draws at the end. Run it with
//! `cargo run --features timeline --example timeline FILE.svg`, and open the file in a browser.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    thread,
    time::Duration,
};

use vfio_migration::{
    Device, DeviceId, Error, ErrorKind, FdDevice, LoadSession, Phase, Result, SaveSession, Side,
    timeline::Timeline,
};

const NAMES: [&str; 3] = [
    "0000:3b:00.1/vfio",
    "0000:3b:00.2/vfio",
    "0000:d8:00.0/vfio",
];
const SLOW: &str = NAMES[2];
const STATE: usize = 16 << 20;

/// A device whose state comes out of a pipe.
fn source() -> FdDevice {
    FdDevice::new(|_state| {
        let (state, mut driver) = io::pipe()?;
        thread::spawn(move || driver.write_all(&vec![7; STATE]));
        Ok(state.into())
    })
}

/// A device that takes its state out of a pipe, and pauses between two pieces.
fn destination(pause: Duration) -> FdDevice {
    FdDevice::new(move |_state| {
        let (mut driver, state) = io::pipe()?;
        thread::spawn(move || {
            let mut piece = vec![0; 64 << 10];
            while driver.read(&mut piece).is_ok_and(|count| count > 0) {
                thread::sleep(pause);
            }
        });
        Ok(state.into())
    })
}

/// Moves three devices, and returns the picture.
pub fn migrate() -> Result<String> {
    let (mut load, mut save) = (LoadSession::builder(), SaveSession::builder());
    for name in NAMES {
        let pause = Duration::from_micros(if name == SLOW { 1000 } else { 50 });
        let id = DeviceId::new(name, 0)?;
        load = load.device(Device::new(id.clone(), Box::new(destination(pause)))?);
        save = save.device(Device::new(id, Box::new(source()))?);
    }
    for _ in 0..4 {
        let (here, there) = UnixStream::pair().map_err(no_sockets)?;
        load = load.channel(there);
        save = save.channel(here);
    }
    let load = load.start()?;
    let save = save.start()?;
    load.switchover_start();
    load.no_more_channels();
    let mut timeline = Timeline::new();
    while !(load.is_finished() && save.is_finished()) {
        timeline.record(Side::Source, save.stats());
        timeline.record(Side::Destination, load.stats());
        thread::sleep(Duration::from_millis(2));
    }
    // As they are at the end.
    for (side, report) in [
        (Side::Source, save.join()),
        (Side::Destination, load.join()),
    ] {
        timeline.record(side, report.stats);
        if let Err(error) = report.result {
            timeline.fail(&error.to_string());
        }
    }
    Ok(timeline.svg())
}

fn no_sockets(error: io::Error) -> Error {
    Error::new(ErrorKind::Host, Phase::Setup).caused_by(error)
}

/// Draws to the file that is named, or says the picture's length.
pub fn main() -> Result<()> {
    let picture = migrate()?;
    match std::env::args()
        .nth(1)
        .filter(|name| name.ends_with(".svg"))
    {
        Some(path) => std::fs::write(path, picture).map_err(no_sockets),
        None => {
            println!("a picture of {} bytes", picture.len());
            Ok(())
        }
    }
}
