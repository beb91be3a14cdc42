//! The source: its VM runs on the destination in the end, or goes on here. `embed.rs` runs this.
//! Where `…` stands a VMM sees to its RAM, its processors and its other devices.

use std::{
    io::Write, net::Shutdown, os::unix::net::UnixStream, sync::mpsc, thread, time::Duration,
};

use vfio_migration::{
    Canceller, Error, ErrorKind, Phase, Result, SaveBuilder, SaveSession, SourceChannels,
    migration::{Capabilities, MigratableDevice, Outgoing, OutgoingDevice, SwitchoverAcks},
    stream::{Command, Event, Reply, SectionKind, Writer},
};

/// Where the VM runs when the source is done.
#[derive(Debug)]
pub enum Runs {
    /// On the destination.
    There,
    /// Here: its devices run again, and its processors may go on.
    Here(Error),
    /// Nobody has said. Here it must not run before somebody says that it does not run there.
    Unknown,
}

/// Everything but the loop in which the VM runs on, which `converge` is (`downtime.rs`), with the stop
/// at its end. The channels have been greeted.
pub fn source(
    mut devices: Vec<MigratableDevice>,
    main: &UnixStream,
    mut channels: SourceChannels,
    capabilities: &Capabilities,
    patience: Duration,
    converge: impl FnOnce(
        &mut [OutgoingDevice],
        &mut SourceChannels,
        &mut Writer<&UnixStream>,
    ) -> Result<()>,
) -> (Runs, Vec<MigratableDevice>) {
    let acks = SwitchoverAcks::new(capabilities.switchover_ack);
    let (heard, canceller, (says, verdict)) = (acks.clone(), channels.canceller(), mpsc::channel());
    thread::scope(|scope| {
        scope.spawn(move || return_path(main, &heard, &canceller, &says));
        let (mut sources, mut session) = (Vec::new(), SaveSession::builder());
        let stopped =
            set_up(&mut devices, &mut sources, main, capabilities, &acks).and_then(|mut writer| {
                Outgoing::prepare(&sources, &mut session)?; // out of the downtime
                converge(&mut sources, &mut channels, &mut writer).map(|()| writer)
            });
        let session = session.greeted_channels(channels);
        let ended = match stopped {
            Ok(writer) => switch_over(sources, session, writer, &verdict, patience),
            Err(error) => {
                devices.extend(sources.into_iter().map(OutgoingDevice::abort));
                (Runs::Here(error), devices)
            }
        };
        let _closed = main.shutdown(Shutdown::Both); // ends the return path's thread too
        ended
    })
}

/// Writes each device's START. A device that refuses is among `devices` again.
fn set_up<'a>(
    devices: &mut Vec<MigratableDevice>,
    sources: &mut Vec<OutgoingDevice>,
    main: &'a UnixStream,
    capabilities: &Capabilities,
    acks: &SwitchoverAcks,
) -> Result<Writer<&'a UnixStream>> {
    let mut writer = Writer::open(main)?;
    for id in 0.. {
        if devices.is_empty() {
            break;
        }
        let device = devices.remove(0);
        let (owner, mut start) = (device.id().clone(), Vec::new());
        let set_up = OutgoingDevice::setup(device, capabilities, acks, &mut start);
        sources.push(set_up.map_err(|failed| {
            let (error, device) = failed.into_parts();
            devices.push(device);
            error
        })?);
        writer.device_section(SectionKind::Start, id, &owner, |main| {
            let lost = |error| Error::new(ErrorKind::Channel, Phase::Section).caused_by(error);
            main.write_all(&start).map_err(lost)
        })?;
    }
    Ok(writer)
}

/// The VM stands still: SWITCHOVER_START, END and FULL of each device, the end, the verdict.
fn switch_over(
    sources: Vec<OutgoingDevice>,
    session: SaveBuilder,
    mut main: Writer<&UnixStream>,
    verdict: &mpsc::Receiver<u32>,
    patience: Duration,
) -> (Runs, Vec<MigratableDevice>) {
    let ids: Vec<_> = sources.iter().map(|source| source.id().clone()).collect();
    let saved = Outgoing::begin(sources, session).and_then(|mut outgoing| {
        let mut sections = || {
            main.write(&Event::Command(Command::SwitchoverStart))?;
            // … RAM's last pages: its END …
            for (id, owner) in (0..).zip(&ids) {
                main.device_section(SectionKind::End, id, owner, |body| {
                    outgoing.write_state(owner, body)
                })?;
            }
            for (id, owner) in (0..).zip(&ids) {
                main.device_section(SectionKind::Full, id, owner, |body| {
                    outgoing.write_config(owner, body)
                })?;
            }
            Ok(()) // … and the other devices' FULL
        };
        if let Err(error) = sections() {
            outgoing.fail(error); // `finish` puts the devices back
        }
        outgoing.finish()
    });
    let saved = match saved {
        Ok(saved) => saved,
        Err(failed) => {
            let (error, devices) = failed.into_parts();
            return (Runs::Here(error), devices);
        }
    };
    if verdict.try_recv() != Err(mpsc::TryRecvError::Empty) {
        return (Runs::Here(gone()), saved.abort());
    }
    // With this byte the destination may start the VM. If it is lost, so is the verdict.
    let _sent = main.write(&Event::Eof);
    match verdict.recv_timeout(patience) {
        Ok(0) => (
            Runs::There,
            saved.cleanup().unwrap_or_else(|failed| failed.into_back()),
        ),
        Ok(_) => (Runs::Here(gone()), saved.abort()),
        Err(_) => (Runs::Unknown, saved.in_doubt()),
    }
}

/// Its own thread: what the destination says, until its verdict or its end.
fn return_path(
    mut path: &UnixStream,
    acks: &SwitchoverAcks,
    canceller: &Canceller,
    verdict: &mpsc::Sender<u32>,
) {
    while let Ok(Some(reply)) = Reply::read(&mut path) {
        match reply {
            Reply::SwitchoverAck => acks.received(),
            Reply::Shut(value) => {
                let _waits = verdict.send(value);
                break;
            }
            _ => {}
        }
    }
    // Before all is sent this ends the migration; later it does nothing.
    canceller.fail(gone());
}

fn gone() -> Error {
    let reason = std::io::Error::other("the destination has failed, or is gone");
    Error::new(ErrorKind::Channel, Phase::Section).caused_by(reason)
}
