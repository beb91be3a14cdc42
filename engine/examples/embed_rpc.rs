//! A VMM whose main channel has requests and answers, and not QEMU's sections: a VM with two devices moves. All
//! connections are TLS with a certificate at each end. Each of the engine's threads has a filter of system calls. The
//! destination makes its devices from the state that comes last. PRE_COPY runs beside the memory.
//!
//! ```text
//!   source       ── Devices (a control message), Memory, State, Complete ──▶   destination
//!                ◀─ done, or failed ────────────────────────────────────────
//!                ══ 2 channels ═════════════════════════════════════════════▶
//! ```
//!
//! `embed_rpc/vmm.rs` is what such a VMM has anyway; its devices are simulated, with P2P and PRE_COPY.
//! Run it with `cargo run --features rustls,sim --example embed_rpc`.

use std::{
    io::{self, Read, Write},
    thread,
    time::Duration,
};

use vfio_migration::{
    Channel, Error, ErrorKind, Failed, LoadSession, Phase, Result, SaveSession, Settings,
    SourceChannels,
    migration::{Capabilities, Incoming, MigratableDevice, Precopy, PrecopyLimit, vm},
    sim::SimHandle,
};

#[path = "embed_rpc/vmm.rs"]
mod vmm;

use self::vmm::{Request, answer, ask, devices, filtered, id, next};

type Devices = Vec<MigratableDevice>;

/// Where the VM runs when the source is done, and the source's devices.
#[derive(Debug)]
enum Runs {
    There(Devices),
    Here(Error, Devices),
    /// Nobody has said: it must not run here before somebody says that it does not run there.
    Unknown(Devices),
}

fn lost(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::new(ErrorKind::Channel, Phase::Section).caused_by(io::Error::other(error))
}

/// Asks for what must be done, or the migration has failed.
fn must(main: &mut (impl Read + Write), request: Request, body: &[u8]) -> Result<()> {
    match ask(main, request, body) {
        Ok(true) => Ok(()),
        Ok(false) => Err(lost("the destination has failed")),
        Err(error) => Err(lost(error)),
    }
}

/// The source. Where its set-up fails, the devices are as they were, and dropped here.
fn source(
    main: &mut (impl Read + Write),
    channels: Vec<Channel>,
    mut devices: Devices,
) -> Result<Runs> {
    for device in &mut devices {
        device.on_thread_start(filtered); // for its stop, outside of a session
    }
    let channels = SourceChannels::greet(channels, &Settings::default())?;
    let mut precopy = Precopy::setup(devices, &Capabilities::default(), channels)?;
    if let Err(error) = run_on(&mut precopy, main) {
        return Ok(Runs::Here(error, precopy.abort()));
    }
    // … the processors stop …
    let mut outgoing = match precopy.switch_over(SaveSession::builder().on_thread_start(filtered)) {
        Ok(outgoing) => outgoing,
        Err(failed) => return Ok(here(failed)),
    };
    let message = outgoing.message().expect("SWITCHOVER_START");
    let told = must(main, Request::Devices, &message);
    outgoing.acknowledged();
    let told = told.and_then(|()| must(main, Request::State, b"of all other devices"));
    if let Err(error) = told {
        outgoing.fail(error); // `finish` puts the devices back
    }
    let mut saved = match outgoing.finish() {
        Ok(saved) => saved,
        Err(failed) => return Ok(here(failed)),
    };
    // With this the destination may start the VM.
    let end = saved.message().expect("END");
    let verdict = ask(main, Request::Devices, &end);
    Ok(
        match verdict.and_then(|done| Ok(done && ask(main, Request::Complete, b"")?)) {
            Ok(true) => Runs::There(saved.cleanup().unwrap_or_else(Failed::into_back)),
            Ok(false) => Runs::Here(lost("the destination has failed"), saved.abort()),
            Err(_lost) => Runs::Unknown(saved.in_doubt()),
        },
    )
}

fn here(failed: Failed<Devices>) -> Runs {
    let (error, devices) = failed.into_parts();
    Runs::Here(error, devices)
}

/// While the VM runs: memory on this thread, the devices' PRE_COPY data on one of the engine's.
fn run_on(precopy: &mut Precopy, main: &mut (impl Read + Write)) -> Result<()> {
    precopy.on_thread_start(filtered);
    precopy.start(PrecopyLimit::default())?;
    loop {
        while let Some(message) = precopy.message() {
            must(main, Request::Devices, &message)?;
            precopy.acknowledged();
        }
        must(main, Request::Memory, b"a round of dirty pages")?;
        if let Some(error) = precopy.failure() {
            return Err(error);
        }
        let progress = precopy.progress();
        if progress.bytes > 0 && progress.pending.precopy() == 0 {
            return Ok(()); // … and little enough of the memory is left
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// The destination. `make` makes its devices from the state that comes last.
fn destination(
    mut main: impl Read + Write,
    channels: Vec<Channel>,
    mut make: impl FnMut(Vec<u8>) -> Result<Devices>,
) -> Result<Devices> {
    let session = LoadSession::builder().channels(channels);
    let session = session
        .on_thread_start(filtered)
        .expect(id(0)?)
        .expect(id(1)?);
    let incoming = Incoming::setup_by_messages(Vec::new(), &Capabilities::default(), session)?;
    loop {
        let (request, body) = next(&mut main).map_err(lost)?; // dropping `incoming` puts the devices back
        let done = match request {
            Request::Devices => incoming.message(&body, |_id| None).map(drop),
            Request::State => make(body).and_then(|devices| {
                let mut devices = devices.into_iter();
                devices.try_for_each(|device| Ok(incoming.add_device(device)?))
            }),
            Request::Memory => Ok(()),
            Request::Complete => break,
        };
        answer(&mut main, done.is_ok()).map_err(lost)?;
        done?;
    }
    let started = incoming
        .finish()
        .map_err(Error::from)
        .and_then(|mut loaded| {
            vm::start(loaded.devices_mut())?; // … and the processors
            Ok(loaded)
        });
    answer(&mut main, started.is_ok()).map_err(lost)?;
    Ok(started?.join().unwrap_or_else(Failed::into_back))
}

/// Moves a VM.
pub fn main() -> Result<()> {
    let connect = || vmm::connect().map_err(|error| lost(error.to_string()));
    let (mut main, main_there) = connect()?;
    let (mut channels, mut channels_there) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        let (near, far) = connect()?;
        channels.push(near.into());
        channels_there.push(far.into());
    }
    let (here, before): (Devices, Vec<_>) = devices(1)?.into_iter().unzip();
    let mut after = Vec::new();
    let make = |_state| {
        let (there, handles) = devices(100)?.into_iter().unzip();
        after = handles;
        Ok(there)
    };
    let (runs, arrived) = thread::scope(|scope| {
        let runs = scope.spawn(move || source(&mut main, channels, here));
        let arrived = destination(main_there, channels_there, make);
        (runs.join().expect("no side panics"), arrived)
    });
    match runs? {
        Runs::There(stopped) => assert_eq!(stopped.len(), arrived?.len()),
        Runs::Here(error, _devices) => return Err(error),
        Runs::Unknown(_devices) => return Err(lost("nobody knows where the VM runs")),
    }
    let same = |(before, after): (&SimHandle, &SimHandle)| before.digest() == after.digest();
    assert!(before.iter().zip(&after).all(same));
    Ok(())
}
