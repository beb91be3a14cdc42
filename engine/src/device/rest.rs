//! Where a device comes to rest when its migration is over, however it ends.
//!
//! ```text
//!   set-up: set_off() notes the state, home          RUNNING, or STOP if the VM does not run
//!     │
//!     ├─ it failed, the VM is here ───▶ put_back()        home: the state in which it came
//!     ├─ it failed, the VM is not ────▶ discard_state()   reset if it holds another's state; home
//!     ├─ the VM runs elsewhere ───────▶ retire()          STOP
//!     └─ nobody knows ────────────────▶ hold()            STOP, with all that it holds
//! ```
//!
//! A reset makes a device RUNNING. In each of these cases a device that must not run is stopped again
//! afterwards. [`Duty`] says what the VMM must still do. All of this runs on the device's own thread, and a
//! call lasts as long as the driver takes.

use std::fmt;

use super::{Device, Health, Recover};
use crate::{
    error::{Error, Phase, Result},
    state::DeviceState,
};

/// What the VMM must do about a device that it was given back.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum Duty {
    /// Nothing: the device is in the right state, with the right content.
    #[default]
    Nothing,
    /// The device was reset, and its VM is here: its content is lost. The guest's driver must set the device up
    /// again, or the VMM unplugs it.
    SetUpAnew,
    /// The device is lost, or it runs, should not run, and refuses to stop. The VMM must close the device's
    /// file, so that the kernel stops the device; no VM may use the device before that.
    Close,
}

impl fmt::Display for Duty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing => "nothing is to be done",
            Self::SetUpAnew => "what it held is lost: it must be set up anew",
            Self::Close => "it cannot be stopped: it must be closed",
        })
    }
}

/// What a device remembers for its migration's end.
pub(super) struct Rest {
    /// The state that it goes back to.
    home: DeviceState,
    /// It has been reset since the set-up.
    reset: bool,
    /// It holds, or may hold, a state that was written into it, and no VM has started with it.
    arriving: bool,
    duty: Duty,
}

impl Rest {
    pub(super) const fn new() -> Self {
        Self {
            home: DeviceState::Running,
            reset: false,
            arriving: false,
            duty: Duty::Nothing,
        }
    }

    /// The device is in this state now.
    pub(super) fn entered(&mut self, state: DeviceState) {
        self.arriving |= state == DeviceState::Resuming;
    }

    /// The device has been reset.
    pub(super) const fn was_reset(&mut self) {
        self.reset = true;
        self.arriving = false;
        self.duty = Duty::SetUpAnew;
    }

    /// The device is lost.
    pub(super) const fn was_lost(&mut self) {
        self.duty = Duty::Close;
    }
}

impl Device {
    /// Whether the device has been reset since its last migration was set up.
    #[must_use]
    pub const fn was_reset(&self) -> bool {
        self.rest.reset
    }

    /// Returns what the VMM must do about the device, once its last migration is over.
    #[must_use]
    pub const fn duty(&self) -> Duty {
        self.rest.duty
    }

    /// A migration is set up: notes the state to go back to. A device that comes in the middle of a
    /// session goes back to what its processors are in then: RUNNING from PRE_COPY, STOP from
    /// STOP_COPY and RESUMING.
    pub(crate) const fn set_off(&mut self) {
        self.rest.home = match self.state {
            DeviceState::Stop | DeviceState::StopCopy | DeviceState::Resuming => DeviceState::Stop,
            DeviceState::RunningP2p => DeviceState::RunningP2p,
            _ => DeviceState::Running,
        };
        self.rest.reset = false;
        self.rest.duty = Duty::Nothing;
    }

    /// The state that it goes back to.
    pub(crate) const fn home(&self) -> DeviceState {
        self.rest.home
    }

    /// The VM has started or stopped meanwhile.
    pub(crate) const fn set_home(&mut self, home: DeviceState) {
        self.rest.home = home;
    }

    /// Whether it holds a state that was written into it, with which no VM has started.
    pub(crate) const fn is_arriving(&self) -> bool {
        self.rest.arriving
    }

    /// The VM has started with what it holds.
    pub(crate) const fn has_arrived(&mut self) {
        self.rest.arriving = false;
    }

    /// The VM has not started after all: unless it was reset since, what came is still in it.
    pub(crate) const fn has_not_arrived(&mut self) {
        self.rest.arriving |= !self.rest.reset;
    }

    /// Its migration is off, and its VM is here: takes it to the state at set-up.
    pub(crate) fn put_back(&mut self) -> Result<()> {
        self.settle(self.rest.home)
    }

    /// Its migration is off, and its VM is not here: nothing is left in it of what came, and it is in
    /// the state at set-up.
    pub(crate) fn discard_state(&mut self) -> Result<()> {
        self.leave(self.rest.home)
    }

    /// Its VM runs elsewhere, or will not run: takes it to STOP. Nothing of what came is left in it.
    pub(crate) fn retire(&mut self) -> Result<()> {
        self.leave(DeviceState::Stop)
    }

    /// Nobody knows where its VM runs: takes it to STOP and keeps what it holds. Where it refuses
    /// that, it stays where it stands.
    pub(crate) fn hold(&mut self) -> Result<()> {
        let stands = Recover::State(self.state);
        let held = if self.state == DeviceState::Stop {
            Ok(())
        } else {
            self.set_state(DeviceState::Stop, stands)
        };
        self.halt();
        held.map_err(|error| error.in_phase(Phase::Cleanup))
    }

    /// Its VM stands, and so must the device: one that a reset has made run is stopped again.
    pub(crate) fn halt(&mut self) {
        let unknown = matches!(self.health, Health::Panicked(_));
        if !self.is_lost() && (unknown || self.state.runs()) {
            // The error that led to the reset is the one to report. This one is in the duty.
            let _first = self.set_state(DeviceState::Stop, Recover::Reset);
        }
        if self.state.runs() || matches!(self.health, Health::Panicked(_)) {
            self.rest.duty = Duty::Close;
        }
    }

    fn leave(&mut self, to: DeviceState) -> Result<()> {
        let emptied = if self.rest.arriving {
            self.reset()
        } else {
            Ok(())
        };
        let settled = emptied
            .map_err(|error| error.in_phase(Phase::Cleanup))
            .and(self.settle(to));
        if self.rest.duty == Duty::SetUpAnew {
            // Nobody here misses what it held.
            self.rest.duty = Duty::Nothing;
        }
        settled
    }

    /// Takes it to a state in which it can stay, by a reset where there is no other way.
    fn settle(&mut self, to: DeviceState) -> Result<()> {
        let first = if self.state == DeviceState::Resuming && !self.is_lost() {
            // Ended only so.
            self.reset()
                .and_then(|()| self.set_state(to, Recover::Reset))
        } else {
            self.set_state(to, Recover::Reset)
        };
        if to == DeviceState::Stop {
            self.halt();
        }
        first.map_err(|error: Error| error.in_phase(Phase::Cleanup))
    }
}
