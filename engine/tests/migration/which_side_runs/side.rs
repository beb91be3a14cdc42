//! One side's devices, and what is really in them.

use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use vfio_migration::{
    Device, DeviceState, MigrationFlags,
    migration::{DeviceSettings, MigratableDevice, OnOffAuto},
    sim::{
        CallFault, Callback, Fault, Faults, On, SimConfig, SimDevice, SimHandle, Stream,
        TransitionFault, Which,
    },
};

use crate::{around::Around, vm::id};

/// What is in a device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Holds {
    /// What it had at set-up.
    Own,
    /// What was written into it, or part of that.
    Arrived,
    /// Nothing: it was reset.
    Nothing,
}

/// A simulated device that remembers what is in it.
fn watched(device: SimDevice, holds: Arc<Mutex<Holds>>) -> Around {
    let handle = device.handle();
    Around::new(device, move |callback, call| {
        let result = call();
        if callback == Callback::SetState && handle.state() == DeviceState::Resuming {
            *holds.lock().unwrap() = Holds::Arrived;
        }
        if callback == Callback::Reset && result.is_ok() {
            *holds.lock().unwrap() = Holds::Nothing;
        }
        result
    })
}

/// Looks at a device from outside, also when it was dropped.
pub struct Truth {
    pub handle: SimHandle,
    holds: Arc<Mutex<Holds>>,
    pub home: DeviceState,
    /// The digest of the state that it was made with.
    pub own: u64,
}

impl Truth {
    pub fn holds(&self) -> Holds {
        *self.holds.lock().unwrap()
    }

    pub fn state(&self) -> DeviceState {
        self.handle.state()
    }
}

/// What a device does wrong.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Wrong {
    /// The k-th change of state is refused.
    Refuses(u64),
    /// And leaves the device in ERROR, from where only a reset leads.
    Breaks(u64),
    /// So is each one behind it: a reset is all that it obeys.
    Stubborn(u64),
    /// As `Breaks`, and its reset fails.
    Lost(u64),
    /// The k-th call of this callback panics.
    Panics(Callback, u64),
    /// The k-th call of this callback fails.
    Fails(Callback, u64),
    /// Its data fd fails behind so many bytes.
    Data(u64),
    /// Its data fd ends there, as if that were all.
    Short(u64),
}

impl Wrong {
    /// Whether the device may refuse to stand, or be lost, for that.
    pub const fn is_severe(self) -> bool {
        matches!(self, Self::Stubborn(_) | Self::Lost(_))
    }

    fn faults(self) -> Faults {
        let errno = Errno::EIO as i32;
        let transition = |which, leaves| TransitionFault {
            on: On::Any,
            which,
            errno,
            leaves,
        };
        let call = |callback, which, fault| CallFault {
            callback,
            which,
            fault,
        };
        let mut faults = Faults::default();
        match self {
            Self::Refuses(k) => faults.transitions.push(transition(Which::Nth(k), None)),
            Self::Breaks(k) | Self::Lost(k) => {
                let leaves = Some(DeviceState::Error);
                faults.transitions.push(transition(Which::Nth(k), leaves));
            }
            Self::Stubborn(k) => faults.transitions.push(transition(Which::From(k), None)),
            Self::Panics(of, k) => faults.calls.push(call(of, Which::Nth(k), Fault::Panic)),
            Self::Fails(of, k) => {
                let fault = Fault::Errno(errno);
                faults.calls.push(call(of, Which::Nth(k), fault));
            }
            Self::Data(at) | Self::Short(at) => faults.fail_at = Some(at),
        }
        if matches!(self, Self::Lost(_)) {
            let fault = Fault::Errno(errno);
            faults
                .calls
                .push(call(Callback::Reset, Which::Every, fault));
        }
        faults
    }
}

/// What a device is like.
pub struct Kind {
    pub number: u32,
    pub flags: MigrationFlags,
    pub transfer: OnOffAuto,
    pub home: DeviceState,
    pub seed: u64,
    pub wrong: Option<Wrong>,
}

/// The length of each device's state.
pub const LEN: u64 = 40_000;

/// Makes a device.
pub fn device(kind: &Kind) -> (MigratableDevice, Truth) {
    // A socket fails where a pipe just ends.
    let stream = match kind.wrong {
        Some(Wrong::Data(_)) => Stream::Socket,
        _ => Stream::Pipe,
    };
    let config = SimConfig {
        flags: kind.flags,
        state: kind.home,
        stream,
        seed: kind.seed,
        len: LEN,
        precopy_initial: LEN / 4,
        faults: kind.wrong.map(Wrong::faults).unwrap_or_default(),
        ..SimConfig::default()
    };
    let device = SimDevice::new(config).unwrap();
    let holds = Arc::new(Mutex::new(Holds::Own));
    let truth = Truth {
        handle: device.handle(),
        holds: holds.clone(),
        home: kind.home,
        own: device.handle().digest(),
    };
    let device = Box::new(watched(device, holds));
    let device = Device::new(id(kind.number), device).unwrap();
    let mut settings = DeviceSettings::default();
    settings.transfer = kind.transfer;
    (MigratableDevice::new(device, settings), truth)
}
