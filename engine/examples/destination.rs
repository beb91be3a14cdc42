//! The destination: its VM runs here in the end, or not at all. `embed.rs` runs this.
//! Where `…` stands a VMM sees to its RAM, its processors and its other devices.

use std::os::unix::net::UnixStream;

use vfio_migration::{
    Error, Failed, LoadBuilder, Result,
    migration::{Capabilities, Incoming, MigratableDevice, vm},
    stream::{Command, Event, MainChannelOrder, Reader, Reply},
};

/// Where it is `Ok` the VM runs here. The devices come back either way.
pub fn destination(
    devices: Vec<MigratableDevice>,
    main: &UnixStream,
    session: LoadBuilder,
    capabilities: &Capabilities,
) -> (Result<()>, Vec<MigratableDevice>) {
    // Nothing of it runs here: the source's VM may go on.
    let failed = |error: Error, devices| {
        let _told = Reply::Shut(1).write(&mut &*main);
        (Err(error), devices)
    };
    let order = MainChannelOrder::new(devices.iter().map(|device| device.id().clone()));
    let path = main.try_clone().expect("a descriptor is to be had");
    let approve = move || Reply::SwitchoverAck.write(&mut &path);
    let incoming = match Incoming::setup(devices, capabilities, session, Box::new(approve)) {
        Ok(incoming) => incoming,
        Err(refused) => {
            let (error, devices) = refused.into_parts();
            return failed(error, devices);
        }
    };
    if let Err(error) = read(&incoming, order, main) {
        incoming.fail(error); // unless a device has failed before: then that is why
    }
    let mut loaded = match incoming.finish() {
        Ok(loaded) => loaded,
        Err(refused) => {
            let (error, devices) = refused.into_parts();
            return failed(error, devices);
        }
    };
    // The drivers check what was loaded.
    if let Err(error) = vm::start(loaded.devices_mut()) {
        return failed(error, loaded.abort());
    }
    // … the processors start …
    let _told = Reply::Shut(0).write(&mut &*main);
    // What a channel may still say changes nothing.
    (Ok(()), loaded.join().unwrap_or_else(Failed::into_back))
}

/// Reads the main channel, to its end.
fn read(incoming: &Incoming, mut order: MainChannelOrder, main: &UnixStream) -> Result<()> {
    let mut reader = Reader::open(main)?;
    while let Some(event) = reader.next_event()? {
        order.event(&event)?;
        match event {
            // … a section of another owner's: RAM, the VMM's other devices …
            Event::Section(section) => {
                let device = incoming.device(&section.owner)?;
                let piece = device.load_state(reader.body()?)?;
                order.body(&section, &piece)?;
                reader.footer()?;
            }
            Event::Command(Command::SwitchoverStart) => incoming.switchover_start()?,
            Event::Command(Command::Ping(value)) => Reply::Pong(value).write(&mut &*main)?,
            Event::Eof => break,
            _ => {}
        }
    }
    Ok(())
}
