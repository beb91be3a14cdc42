//! The adapter of a VMM like Cloud Hypervisor fits in 150 lines: `adapter/glue.rs` is all of it. Here are the shapes that
//! such a VMM has: a device in an `Arc` that hides its fd, a config in JSON, an enum of requests with an answer to each,
//! devices that are made from the state that comes last.

#[path = "adapter/glue.rs"]
mod glue;

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex, mpsc},
    thread,
};

use vfio_migration::{
    Channel, DeviceState, Duty, Result,
    migration::{Incoming, MigratableDevice},
    sim::{SimConfig, SimDevice, SimHandle},
};

#[cfg(feature = "vfio")]
use vfio_migration::vfio::VfioDevice;

use crate::watchdog::Watchdog;

/// The file of a device, which only its owner uses: it is `AsRawFd` and no more, as `vfio_ioctls::VfioDevice` is.
pub struct HiddenFd(File);

impl AsRawFd for HiddenFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// The VMM's device: what its guest sees.
pub struct VfioPci {
    pub name: String,
    pub device: Arc<HiddenFd>,
    pub command: u64,
    pub bars: Vec<u64>,
    pub armed: u32,
}

impl VfioPci {
    fn new(name: &str) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            name: name.into(),
            device: Arc::new(HiddenFd(File::open("/dev/null").unwrap())),
            command: 0,
            bars: Vec::new(),
            armed: 0,
        }))
    }

    pub fn arm_interrupts(&mut self) -> io::Result<()> {
        self.armed += 1;
        Ok(())
    }
}

/// What goes over the VMM's main channel.
pub enum Request {
    /// The VM's config: which devices it has.
    Config(Vec<String>),
    Memory,
    /// The engine's.
    Devices(Vec<u8>),
    /// The state of the VM's own devices, from which they are made.
    State,
    /// The VM is to run.
    Complete,
}

const PRECOPY: u64 = 200_000;

const NAMES: [&str; 2] = ["_vfio1", "_vfio2"];

fn sim(seed: u64, refuses: bool) -> (SimDevice, SimHandle) {
    let mut config = SimConfig {
        seed,
        precopy_initial: PRECOPY,
        ..SimConfig::default()
    };
    config.faults.fail_at = refuses.then_some(1000);
    let sim = SimDevice::new(config).unwrap();
    let handle = sim.handle();
    (sim, handle)
}

/// A side's devices, and the engine's hold on them.
type Devices = Vec<(Arc<Mutex<VfioPci>>, SimHandle)>;

fn devices(seed: u64, refuses: bool) -> (Devices, Vec<MigratableDevice>) {
    let device = |(at, name): (u64, &str)| {
        let (pci, (sim, handle)) = (VfioPci::new(name), sim(seed + at, refuses));
        let device = glue::device(&pci, sim).unwrap();
        ((pci, handle), device)
    };
    (0..).zip(NAMES).map(device).unzip()
}

/// What the VMM's destination does, and answers. Gives back its devices, and whether the VM runs.
fn serve(
    requests: &mpsc::Receiver<Request>,
    answers: &mpsc::Sender<bool>,
    channels: Vec<Channel>,
    refuses: bool,
) -> (Devices, bool, Vec<MigratableDevice>) {
    let (mut incoming, mut here, mut channels) = (None::<Incoming>, Devices::new(), Some(channels));
    for request in requests {
        let done: Result<()> = match (request, &incoming) {
            (Request::Config(names), _) => {
                let taken = channels.take().unwrap();
                glue::destination(&names, taken).map(|it| incoming = Some(it))
            }
            (Request::Devices(message), Some(incoming)) => {
                incoming.message(&message, |_id| None).map(drop)
            }
            (Request::State, Some(incoming)) => {
                let (pci, made) = devices(100, refuses);
                here = pci;
                made.into_iter()
                    .try_for_each(|device| Ok(incoming.add_device(device)?))
            }
            (Request::Complete, Some(_)) => {
                let (runs, devices) = glue::run(incoming.take().unwrap());
                answers.send(runs.is_ok()).unwrap();
                return (here, runs.is_ok(), devices);
            }
            _ => Ok(()),
        };
        answers.send(done.is_ok()).unwrap();
    }
    (
        here,
        false,
        incoming.map(Incoming::abort).unwrap_or_default(),
    )
}

/// A migration by the VMM's own state machine.
fn migrate(
    refuses: bool,
) -> (
    Devices,
    Vec<MigratableDevice>,
    (Devices, bool, Vec<MigratableDevice>),
) {
    let (near, far): (Vec<_>, Vec<_>) = (0..2)
        .map(|_| UnixStream::pair().unwrap())
        .map(|(near, far)| (Channel::from(near), Channel::from(far)))
        .unzip();
    let ((requests, served), (answers, answered)) = (mpsc::channel(), mpsc::channel());
    let there = thread::spawn(move || serve(&served, &answers, far, refuses));
    let ask = |request| {
        requests.send(request).unwrap();
        answered.recv().unwrap()
    };
    let (pci, devices) = devices(1, false);
    for (at, (pci, _)) in (1..).zip(&pci) {
        let mut pci = pci.lock().unwrap();
        (pci.command, pci.bars) = (6, vec![at << 20, at << 30]);
    }
    assert!(ask(Request::Config(NAMES.map(Into::into).into())));
    let mut source = glue::Source::start(devices, near).unwrap();
    let said = |source: &mut glue::Source| {
        while let Some(request) = source.request() {
            if !ask(request) {
                return false;
            }
            source.answered();
        }
        true
    };
    assert!(said(&mut source));
    // Until all that the devices give while the VM runs has been sent.
    let limit = 2 * (SimConfig::default().len - PRECOPY);
    while source.pending() == 0 || source.pending() > limit {
        assert!(ask(Request::Memory));
        assert!(said(&mut source));
    }
    let mut source = source.stop().unwrap();
    assert!(said(&mut source));
    assert!(ask(Request::State));
    let (back, verdict) = match source.finish() {
        Ok(mut source) => {
            let verdict = said(&mut source) && ask(Request::Complete);
            (source.end(Some(verdict)), verdict)
        }
        Err(failed) => (failed.into_back(), false),
    };
    drop(requests);
    let there = there.join().unwrap();
    assert_eq!(there.1, verdict);
    (pci, back, there)
}

#[test]
fn the_adapter_moves_a_vm_with_hidden_fds_json_configs_and_late_devices() {
    let _watchdog = Watchdog::new();
    let (here, back, (there, runs, moved)) = migrate(false);
    assert!(runs);
    for ((here, before), (there, after)) in here.iter().zip(&there) {
        assert_eq!(before.digest(), after.digest());
        let (here, there) = (here.lock().unwrap(), there.lock().unwrap());
        assert_eq!((here.command, &here.bars), (there.command, &there.bars));
        assert_eq!((here.armed, there.armed), (0, 0));
    }
    for (devices, state) in [(back, DeviceState::Stop), (moved, DeviceState::Running)] {
        assert_eq!(devices.len(), 2);
        assert!(
            devices
                .iter()
                .all(|it| it.state() == state && it.duty() == Duty::Nothing)
        );
    }
}

#[test]
fn a_load_that_fails_leaves_the_vm_at_the_source_and_arms_what_was_reset() {
    let _watchdog = Watchdog::new();
    let (here, back, (there, runs, moved)) = migrate(true);
    assert!(!runs);
    assert_eq!(back.len(), 2);
    assert!(
        back.iter()
            .all(|it| it.state() == DeviceState::Running && !it.was_reset())
    );
    assert!(here.iter().all(|(pci, _)| pci.lock().unwrap().armed == 0));
    assert!(moved.iter().all(MigratableDevice::was_reset));
    assert!(there.iter().any(|(pci, _)| pci.lock().unwrap().armed > 0));
}

#[cfg(feature = "vfio")]
#[test]
fn the_kernels_half_is_made_of_the_hidden_fd() {
    let pci = VfioPci::new(NAMES[0]);
    let kernel = VfioDevice::dup_of(&pci.lock().unwrap().device).unwrap();
    // It is no VFIO device: the kernel says so.
    let error = glue::device(&pci, kernel);
    let error = error.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(nix::errno::Errno::ENOTTY as i32));
    assert_eq!(error.device().unwrap().idstr(), NAMES[0]);
}

#[test]
fn the_adapter_stays_short() {
    let lines = include_str!("adapter/glue.rs").lines().count();
    println!("the adapter has {lines} lines");
    assert!(lines < 150, "{lines} lines");
}
