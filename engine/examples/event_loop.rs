//! A destination on one thread that waits for both at once: the main channel, and the session. A device that
//! fails ends it, although the source says nothing. Run it with
//! `cargo run --features sim --example event_loop`.

use std::{
    os::{fd::AsFd, unix::net::UnixStream},
    thread,
    time::Duration,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::read,
};
use vfio_migration::{
    Device, DeviceId, LoadSession, Result, Settings, SourceChannels,
    migration::{Capabilities, DeviceSettings, Incoming, MigratableDevice, vm},
    sim::{SimConfig, SimDevice},
    stream::{Command, Event, MainChannelOrder, Reader, Reply},
};

#[path = "downtime.rs"]
pub mod downtime;
#[path = "source.rs"]
pub mod source;

use self::source::Runs;

/// Waits until the main channel, or the session, has something. Returns whether it is the main channel.
fn wait(main: Option<&UnixStream>, session: &LoadSession) -> bool {
    let mut fds = vec![PollFd::new(session.as_fd(), PollFlags::POLLIN)];
    fds.extend(main.map(|main| PollFd::new(main.as_fd(), PollFlags::POLLIN)));
    poll(&mut fds, PollTimeout::NONE).expect("good descriptors");
    if fds[0].any() == Some(true) {
        // So that it is quiet until there is news again. It does not block.
        let _count = read(session.as_fd(), &mut [0; 8]);
    }
    fds.get(1).is_some_and(|main| main.any() == Some(true))
}

/// Reads what the main channel has, while the session does not fail; then waits for the session.
fn load(incoming: &Incoming, mut order: MainChannelOrder, main: &UnixStream) -> Result<()> {
    let session = incoming.session().expect("the devices use the channels");
    let mut reader = Reader::open(main)?;
    loop {
        if let Some(error) = incoming.failure() {
            return Err(error);
        }
        if !wait(Some(main), session) {
            continue;
        }
        // A reader takes no byte beyond its event, so what is left can still be waited for.
        let Some(event) = reader.next_event()? else {
            break;
        };
        order.event(&event)?;
        match event {
            Event::Section(section) => {
                let piece = incoming
                    .device(&section.owner)?
                    .load_state(reader.body()?)?;
                order.body(&section, &piece)?;
                reader.footer()?;
            }
            Event::Command(Command::SwitchoverStart) => incoming.switchover_start()?,
            Event::Eof => break,
            _ => {}
        }
    }
    while !incoming.is_finished() {
        wait(None, session);
    }
    Ok(())
}

/// The destination: see `destination.rs` for what a VMM keeps of its devices where this fails.
pub fn destination(
    devices: Vec<MigratableDevice>,
    main: &UnixStream,
    channels: Vec<UnixStream>,
    capabilities: &Capabilities,
) -> Result<Vec<MigratableDevice>> {
    let order = MainChannelOrder::new(devices.iter().map(|device| device.id().clone()));
    let session = LoadSession::builder().channels(channels);
    let path = main.try_clone().expect("a descriptor is to be had");
    let approve = move || Reply::SwitchoverAck.write(&mut &path);
    let incoming = Incoming::setup(devices, capabilities, session, Box::new(approve))?;
    if let Err(error) = load(&incoming, order, main) {
        incoming.fail(error);
    }
    let mut loaded = incoming.finish()?; // at once, after all that
    vm::start(loaded.devices_mut())?;
    Reply::Shut(0).write(&mut &*main)?;
    Ok(loaded.join()?)
}

/// Moves a device to such a destination.
pub fn main() -> Result<()> {
    let device = |seed| -> Result<_> {
        let device = SimDevice::new(SimConfig {
            seed,
            ..SimConfig::default()
        })
        .expect("it can be");
        let device = Device::new(DeviceId::new("0000:00:03.0/vfio", 0)?, Box::new(device))?;
        Ok(vec![MigratableDevice::new(
            device,
            DeviceSettings::default(),
        )])
    };
    let pair = || UnixStream::pair().expect("sockets are to be had");
    let ((main, main_there), (channel, channel_there)) = (pair(), pair());
    let (here, there, capabilities) = (device(1)?, device(2)?, Capabilities::default());
    let channels = SourceChannels::greet(vec![channel.into()], &Settings::default())?;
    let limits = downtime::Limits {
        downtime: Duration::from_millis(300),
        bandwidth: 1 << 30,
        precopy: Duration::from_secs(60),
    };
    thread::scope(|scope| {
        let source = scope.spawn(|| {
            let patience = Duration::from_secs(60);
            let (main, caps) = (&main, &capabilities);
            source::source(
                here,
                main,
                channels,
                caps,
                patience,
                |sources, channels, main| downtime::converge(sources, channels, main, &limits),
            )
        });
        let moved = destination(there, &main_there, vec![channel_there], &capabilities);
        match source.join().expect("it does not panic").0 {
            Runs::There => moved.map(drop),
            Runs::Here(error) => Err(error),
            Runs::Unknown => unreachable!("the destination has said that it runs there"),
        }
    })
}
