//! One walk: the VM, its devices, what goes wrong, and the steps that can fail.

use vfio_migration::{
    DeviceState, MigrationFlags,
    migration::{MigratableDevice, OnOffAuto},
};

use super::side::{Kind, Truth, Wrong, device};

/// The VM on the source.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Vm {
    Runs,
    /// It stood at set-up.
    Stands,
    /// It was paused since.
    Paused,
}

/// Where the devices' data goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ways {
    Channels,
    Main,
    /// The second device's goes over the main channel.
    Mixed,
}

/// How what is under way is given up.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Leave {
    /// By its method: the devices come back.
    Called,
    /// It is cancelled, and ended as if it were not.
    Cancelled,
    Dropped,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Side {
    OutgoingDevice,
    IncomingDevice,
}

/// A step that can fail.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum At {
    SetUp,
    Iteration,
    Pause,
    Stop,
    Begin,
    Sections,
    Finish,
    DestinationSetUp,
    DestinationLoad,
    DestinationFinish,
    /// The destination gives up before the VM has started there.
    DestinationLoaded,
    DestinationStart,
    /// The destination gives up when the VM's devices have started.
    DestinationStarted,
    /// The end is lost.
    End,
    /// The verdict is lost: all is loaded.
    Verdict,
    /// The verdict is lost: it has failed.
    VerdictOfFailure,
    Cleanup,
    Join,
}

impl At {
    pub const ALL: [Self; 18] = [
        Self::SetUp,
        Self::Iteration,
        Self::Pause,
        Self::Stop,
        Self::Begin,
        Self::Sections,
        Self::Finish,
        Self::DestinationSetUp,
        Self::DestinationLoad,
        Self::DestinationFinish,
        Self::DestinationLoaded,
        Self::DestinationStart,
        Self::DestinationStarted,
        Self::End,
        Self::Verdict,
        Self::VerdictOfFailure,
        Self::Cleanup,
        Self::Join,
    ];
}

/// What is between the two sides, and what becomes of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Link {
    Whole,
    /// The body of this device's section cannot be written at this step.
    Body(At, usize),
    /// A section comes with a tag that is none.
    Garbage,
    /// A channel ends within a packet, before all has come, or when all is loaded.
    Channel(At),
    /// This is lost, or given up.
    Lost(At),
}

/// One walk.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// One device without P2P; otherwise three with it, the second without PRE_COPY.
    pub alone: bool,
    pub vm: Vm,
    pub ways: Ways,
    pub leave: Leave,
    /// The state of the destination's devices at set-up.
    pub far_home: DeviceState,
    pub wrong: Option<(Side, usize, Wrong)>,
    pub link: Link,
}

impl Case {
    pub const fn devices(&self) -> usize {
        if self.alone { 1 } else { 3 }
    }

    pub fn device(&self, side: Side, at: usize) -> (MigratableDevice, Truth) {
        let flags = match (self.alone, at) {
            (true, _) => MigrationFlags::STOP_COPY | MigrationFlags::PRE_COPY,
            (false, 1) => MigrationFlags::STOP_COPY | MigrationFlags::P2P,
            (false, _) => {
                MigrationFlags::STOP_COPY | MigrationFlags::P2P | MigrationFlags::PRE_COPY
            }
        };
        let transfer = match (self.ways, at) {
            (Ways::Main, _) | (Ways::Mixed, 1) => OnOffAuto::Off,
            _ => OnOffAuto::On,
        };
        let number = u32::try_from(at).unwrap() + 1;
        let (home, seed) = match side {
            Side::OutgoingDevice if self.vm == Vm::Stands => (DeviceState::Stop, number),
            Side::OutgoingDevice => (DeviceState::Running, number),
            Side::IncomingDevice => (self.far_home, 1000 + number),
        };
        device(&Kind {
            number,
            flags,
            transfer,
            home,
            seed: seed.into(),
            wrong: self.wrong_of(side, at),
        })
    }

    pub fn wrong_of(&self, side: Side, at: usize) -> Option<Wrong> {
        let (of, device, wrong) = self.wrong?;
        (of == side && device == at).then_some(wrong)
    }
}
