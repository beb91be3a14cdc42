//! A simulated device, each of whose calls goes through a closure of the test's.

use std::{
    io::{self, Read, Write},
    os::fd::{BorrowedFd, OwnedFd},
};

use vfio_migration::{
    DeviceState, MigrationDevice, MigrationFlags, PrecopyInfo, StateEvent,
    sim::{Callback, SimDevice},
};

type Hook = Box<dyn Fn(Callback, &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> + Send>;

/// A device, and the closure: it is told which call it is, and makes the call or does not, between what
/// it does before and behind. It has no v2 of the precopy info, as an older kernel.
pub struct Around {
    device: SimDevice,
    hook: Hook,
}

impl Around {
    pub fn new(
        device: SimDevice,
        hook: impl Fn(Callback, &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> + Send + 'static,
    ) -> Self {
        let hook = Box::new(hook);
        Self { device, hook }
    }
}

fn pass<R>(
    hook: &Hook,
    callback: Callback,
    mut call: impl FnMut() -> io::Result<R>,
) -> io::Result<R> {
    let mut result = None;
    hook(callback, &mut || {
        result = Some(call()?);
        Ok(())
    })?;
    Ok(result.expect("what succeeds was called"))
}

impl MigrationDevice for Around {
    fn flags(&self) -> io::Result<MigrationFlags> {
        pass(&self.hook, Callback::Flags, || self.device.flags())
    }

    fn state(&self) -> io::Result<DeviceState> {
        pass(&self.hook, Callback::State, || self.device.state())
    }

    fn set_state(&mut self, new: DeviceState) -> io::Result<Option<OwnedFd>> {
        let set = || self.device.set_state(new);
        pass(&self.hook, Callback::SetState, set)
    }

    fn reset(&mut self) -> io::Result<()> {
        pass(&self.hook, Callback::Reset, || self.device.reset())
    }

    fn data_size(&self) -> io::Result<u64> {
        pass(&self.hook, Callback::DataSize, || self.device.data_size())
    }

    fn precopy_info(&self, fd: BorrowedFd<'_>) -> io::Result<PrecopyInfo> {
        let ask = || self.device.precopy_info(fd);
        pass(&self.hook, Callback::PrecopyInfo, ask)
    }

    fn read_precopy(&mut self, fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
        let read = || self.device.read_precopy(fd, buffer);
        pass(&self.hook, Callback::ReadPrecopy, read)
    }

    fn save_config(&mut self, writer: &mut dyn Write) -> io::Result<()> {
        let save = || self.device.save_config(writer);
        pass(&self.hook, Callback::SaveConfig, save)
    }

    fn load_config(&mut self, reader: &mut dyn Read) -> io::Result<()> {
        let load = || self.device.load_config(reader);
        pass(&self.hook, Callback::LoadConfig, load)
    }

    fn event(&mut self, event: StateEvent) {
        let tell = || {
            self.device.event(event);
            Ok(())
        };
        // An event cannot fail.
        drop(pass(&self.hook, Callback::Event, tell));
    }
}
