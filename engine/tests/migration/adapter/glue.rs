//! What a VMM like Cloud Hypervisor writes to embed the engine: all that stands between its own state machine, which
//! sends and answers its requests, and the engine. `adapter.rs` has the VMM's shapes, and runs this.

use std::{
    io,
    sync::{Arc, Mutex},
};

use vfio_migration::{
    Channel, Device, DeviceId, Failed, Hooked, Hooks, LoadSession, MigrationDevice, Result,
    SaveSession, Settings, SourceChannels,
    migration::{
        Capabilities, DeviceSettings, Incoming, MigratableDevice, Outgoing, Precopy, PrecopyLimit,
        Saved, vm,
    },
};

use super::{Request, VfioPci};

/// The VMM's half of a device. Its config is JSON.
struct Half(Arc<Mutex<VfioPci>>);

impl Hooks for Half {
    fn save_config(&mut self) -> io::Result<Vec<u8>> {
        let pci = self.0.lock().unwrap();
        Ok(serde_json::to_vec(&(pci.command, &pci.bars))?)
    }

    fn load_config(&mut self, config: &[u8]) -> io::Result<()> {
        let mut pci = self.0.lock().unwrap();
        (pci.command, pci.bars) = serde_json::from_slice(config)?;
        Ok(())
    }

    fn after_reset(&mut self) -> io::Result<()> {
        self.0.lock().unwrap().arm_interrupts()
    }
}

/// A device for the engine. `kernel` is the kernel's half, over the fd that the VMM's device hides:
/// `VfioDevice::dup_of(&pci.device)`.
pub fn device(
    pci: &Arc<Mutex<VfioPci>>,
    kernel: impl MigrationDevice + 'static,
) -> Result<MigratableDevice> {
    let id = DeviceId::new(pci.lock().unwrap().name.as_str(), 0)?;
    let device = Device::new(id, Box::new(Hooked::new(kernel, Half(pci.clone()))))?;
    Ok(MigratableDevice::new(device, DeviceSettings::default()))
}

/// The source, from "start migration" to the verdict. Its VMM asks for the next request and says what was answered.
pub enum Source {
    Running(Precopy),
    Stopped(Outgoing),
    Sent(Saved),
}

impl Source {
    pub fn start(devices: Vec<MigratableDevice>, channels: Vec<Channel>) -> Result<Self> {
        let channels = SourceChannels::greet(channels, &Settings::default())?;
        let mut precopy = Precopy::setup(devices, &Capabilities::default(), channels)?;
        precopy.start(PrecopyLimit::default())?;
        Ok(Self::Running(precopy))
    }

    /// What the engine has to say, as one of the VMM's requests.
    pub fn request(&mut self) -> Option<Request> {
        let message = match self {
            Self::Running(precopy) => precopy.message(),
            Self::Stopped(outgoing) => outgoing.message(),
            Self::Sent(saved) => saved.message(),
        };
        message.map(Request::Devices)
    }

    pub fn answered(&mut self) {
        match self {
            Self::Running(precopy) => precopy.acknowledged(),
            Self::Stopped(outgoing) => outgoing.acknowledged(),
            Self::Sent(_) => {}
        }
    }

    /// What a stop now has to send, for the VMM's downtime limit.
    pub fn pending(&self) -> u64 {
        match self {
            Self::Running(precopy) => precopy.progress().pending.total(),
            _ => 0,
        }
    }

    /// The processors have stopped.
    pub fn stop(self) -> Result<Self, Failed<Vec<MigratableDevice>>> {
        match self {
            Self::Running(precopy) => {
                Ok(Self::Stopped(precopy.switch_over(SaveSession::builder())?))
            }
            other => Ok(other),
        }
    }

    /// The VMM's own state has been sent.
    pub fn finish(self) -> Result<Self, Failed<Vec<MigratableDevice>>> {
        match self {
            Self::Stopped(outgoing) => Ok(Self::Sent(outgoing.finish()?)),
            other => Ok(other),
        }
    }

    /// How it ended: the destination runs, has failed, or nobody knows.
    pub fn end(self, verdict: Option<bool>) -> Vec<MigratableDevice> {
        match (self, verdict) {
            (Self::Sent(saved), Some(true)) => saved.cleanup().unwrap_or_else(Failed::into_back),
            (Self::Sent(saved), Some(false)) => saved.abort(),
            (Self::Sent(saved), None) => saved.in_doubt(),
            (Self::Running(precopy), _) => precopy.abort(),
            (Self::Stopped(outgoing), _) => outgoing.abort(),
        }
    }
}

/// The destination: it knows its devices' names from the VM's config, and makes them from its state.
pub fn destination(names: &[String], channels: Vec<Channel>) -> Result<Incoming> {
    let mut session = LoadSession::builder().channels(channels);
    for name in names {
        session = session.expect(DeviceId::new(name.as_str(), 0)?);
    }
    Ok(Incoming::setup_by_messages(
        Vec::new(),
        &Capabilities::default(),
        session,
    )?)
}

/// All requests have been answered but the last: whose answer is whether the VM runs here.
pub fn run(incoming: Incoming) -> (Result<()>, Vec<MigratableDevice>) {
    let mut loaded = match incoming.finish() {
        Ok(loaded) => loaded,
        Err(failed) => {
            let (error, devices) = failed.into_parts();
            return (Err(error), devices);
        }
    };
    match vm::start(loaded.devices_mut()) {
        Ok(()) => (Ok(()), loaded.join().unwrap_or_else(Failed::into_back)),
        Err(error) => (Err(error), loaded.abort()),
    }
}
