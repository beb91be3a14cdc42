//! A VMM's whole integration: a VM with two devices moves from a source to a destination.
//!
//! ```text
//!   source()  ── main channel ──▶  destination()
//!             ═══ 2 channels ════▶
//!             ◀── return path ───
//! ```
//!
//! It moves twice: as QEMU would have it, with what the devices give while the VM runs on the main
//! channel, and with that over the channels, which both ends have to be this engine for.
//!
//! The devices are simulated and the connections socket pairs; a VMM puts its own in their places,
//! and its RAM, its processors and its other devices around this. Run it with
//! `cargo run --features sim --example embed`.

use std::{os::unix::net::UnixStream, thread};

use vfio_migration::{
    Device, DeviceId, Error, LoadSession, Result, SaveSession, Settings, SourceChannels,
    migration::{
        Capabilities, DeviceSettings, Incoming, MigratableDevice, Outgoing, OutgoingDevice,
        SwitchoverAck, SwitchoverAcks,
        vm::{self, Reason},
    },
    sim::{SimConfig, SimDevice, SimHandle},
    stream::{Command, Event, MainChannelOrder, Reader, Reply, Section, SectionKind, Writer},
};

/// What both ends have agreed on.
fn capabilities(over_channels: bool) -> Capabilities {
    let mut capabilities = Capabilities::default();
    capabilities.switchover_ack = SwitchoverAck::Once;
    capabilities.precopy_over_channels = over_channels;
    capabilities
}

/// Writes one section of a device into the main channel.
fn section<R>(
    main: &mut Writer<&UnixStream>,
    kind: SectionKind,
    (id, owner): (u32, &DeviceId),
    body: impl FnOnce(&UnixStream) -> Result<R>,
) -> Result<R> {
    let (owner, version) = (owner.clone(), 1);
    #[rustfmt::skip]
    main.write(&Event::Section(Section { kind, id, owner, version }))?;
    let written = body(main.body())?;
    main.footer(id)?;
    Ok(written)
}

/// The source: until the VM runs on the destination, or goes on here.
fn source(
    devices: Vec<MigratableDevice>,
    main: &UnixStream,
    channels: Vec<UnixStream>,
    capabilities: &Capabilities,
) -> Result<()> {
    let channels = channels.into_iter().map(Into::into).collect();
    // The destination does not wait for their hellos for long, but then for as long as the VM runs.
    let mut channels = SourceChannels::greet(channels, &Settings::default())?;
    let acks = SwitchoverAcks::new(capabilities.switchover_ack);
    let mut writer = Writer::open(main)?;
    let mut sources = Vec::new();
    for (id, device) in (0..).zip(devices) {
        let owner = device.id().clone();
        sources.push(section(
            &mut writer,
            SectionKind::Start,
            (id, &owner),
            |body| Ok(OutgoingDevice::setup(device, capabilities, &acks, body)?),
        )?);
    }
    // While the VM runs: until little enough is left, and the destination is ready. A destination that
    // has ended a channel fails this.
    while sources.iter().any(|it| !it.is_switchover_ready()) {
        for (id, source) in (0..).zip(&mut sources) {
            let owner = source.id().clone();
            let part = SectionKind::Part;
            // Over the channels where that was agreed on, and otherwise into the section.
            section(&mut writer, part, (id, &owner), |body| {
                source.iterate_over(&mut channels, body)
            })?;
        }
        if sources.iter().all(|it| it.pending_estimate().initial == 0)
            && Reply::read(&mut &*main)? == Some(Reply::SwitchoverAck)
        {
            acks.received();
        }
    }
    let ids: Vec<_> = sources.iter().map(|source| source.id().clone()).collect();
    // What would cost downtime is made before it.
    let mut session = SaveSession::builder().greeted_channels(channels);
    Outgoing::prepare(&sources, &mut session)?;
    // The processors stand still from here on.
    vm::stop(&mut sources, Reason::FinishMigration)?;
    let mut outgoing = Outgoing::begin(sources, session)?;
    writer.write(&Event::Command(Command::SwitchoverStart))?;
    for device in (0..).zip(&ids) {
        section(&mut writer, SectionKind::End, device, |body| {
            outgoing.write_state(device.1, body)
        })?;
    }
    for device in (0..).zip(&ids) {
        section(&mut writer, SectionKind::Full, device, |body| {
            outgoing.write_config(device.1, body)
        })?;
    }
    let saved = outgoing.finish()?;
    // With this the destination may start its VM: from here on it is the one who knows.
    let verdict = writer.write(&Event::Eof);
    match verdict.and_then(|()| Reply::read(&mut &*main)) {
        Ok(Some(Reply::Shut(0))) => saved.cleanup().map(drop).map_err(Error::from),
        Ok(Some(_)) => vm::start(&mut saved.abort()), // and the processors go on
        // Nobody says where the VM runs: it must not run here until somebody has found out.
        silence => {
            let _stopped = saved.in_doubt();
            silence.map(drop)
        }
    }
}

/// The destination: until the VM runs here.
fn destination(
    devices: Vec<MigratableDevice>,
    main: &UnixStream,
    channels: Vec<UnixStream>,
    capabilities: &Capabilities,
) -> Result<()> {
    let session = LoadSession::builder().channels(channels);
    let path = main.try_clone().expect("a descriptor is to be had");
    let approve = move || Reply::SwitchoverAck.write(&mut &path);
    let mut order = MainChannelOrder::new(devices.iter().map(|it| it.id().clone()));
    let incoming = Incoming::setup(devices, capabilities, session, Box::new(approve))?;
    let mut reader = Reader::open(main)?;
    while let Some(event) = reader.next_event()? {
        order.event(&event)?;
        match event {
            Event::Section(section) => {
                let device = incoming.device(&section.owner)?;
                let piece = device.load_state(reader.body()?)?;
                order.body(&section, &piece)?;
                reader.footer()?;
            }
            Event::Command(Command::SwitchoverStart) => incoming.switchover_start()?,
            Event::Eof => break,
            _ => {}
        }
    }
    // The drivers look at what was loaded when their devices start.
    let started = incoming.finish().map_err(Error::from).and_then(|loaded| {
        let mut loaded = loaded;
        vm::start(loaded.devices_mut()).map(|()| loaded)
    });
    let loaded = match started {
        Ok(loaded) => loaded, // and the processors start
        Err(error) => {
            // Nothing runs here: the source may go on.
            Reply::Shut(1).write(&mut &*main)?;
            return Err(error);
        }
    };
    Reply::Shut(0).write(&mut &*main)?;
    loaded.join().map(drop).map_err(Error::from)
}

/// Two simulated devices.
fn devices(seed: u64) -> Result<(Vec<MigratableDevice>, Vec<SimHandle>)> {
    let device = |number| {
        let config = SimConfig {
            seed: seed + u64::from(number),
            precopy_initial: 5000,
            ..SimConfig::default()
        };
        let device = SimDevice::new(config).expect("it can be");
        let handle = device.handle();
        let device = Device::new(
            DeviceId::new("0000:00:03.0/vfio", number)?,
            Box::new(device),
        )?;
        Ok((
            MigratableDevice::new(device, DeviceSettings::default()),
            handle,
        ))
    };
    (0..2).map(device).collect()
}

/// Moves a VM.
fn migrate(capabilities: &Capabilities) -> Result<()> {
    let pair = || UnixStream::pair().expect("sockets are to be had");
    let (main, main_there) = pair();
    let (channels, channels_there) = (0..2).map(|_| pair()).unzip();
    let ((devices_here, before), (devices_there, after)) = (devices(1)?, devices(100)?);
    thread::scope(|scope| {
        let source = scope.spawn(|| source(devices_here, &main, channels, capabilities));
        let moved = destination(devices_there, &main_there, channels_there, capabilities);
        moved.and(source.join().expect("no side panics"))
    })?;
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(before.digest(), after.digest());
        assert_eq!(before.config_digest(), after.config_digest());
    }
    Ok(())
}

/// Moves a VM, in both ways.
pub fn main() -> Result<()> {
    migrate(&capabilities(false))?;
    migrate(&capabilities(true))?;
    println!("moved");
    Ok(())
}
