//! What a simulated device is told to do wrong.
//!
//! Plain values, set before the device is made. What a fault in the data looks like from outside
//! depends on the file that carries it:
//!
//! | stream | saving, past `fail_at` | loading, past `fail_at` | more than the state | short transfers |
//! |---|---|---|---|---|
//! | `Pipe` | the end, too early | `EPIPE` | `EPIPE`, or STOP refused | reads; writes where the writer does not block |
//! | `Socket` | `ECONNRESET` | `ECONNRESET` or `EPIPE` | the same, or STOP refused | the same |
//! | `PlainWrite` | as `Pipe` | short, then `EIO` | short, then `EIO` | at the fault |
//! | `Memfd` | the end, too early | short (by pages), then `EPERM` | STOP refused | at the fault |
//!
//! A stall holds a `Pipe` or a `Socket`; the two others have no thread that could stall.

use std::time::Duration;

use crate::state::DeviceState;

/// Everything that can be told to go wrong. The default is nothing.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Calls that fail or panic. The first that matches counts.
    pub calls: Vec<CallFault>,
    /// Changes of state that fail, and where they leave the device. The first that matches counts.
    pub transitions: Vec<TransitionFault>,
    /// How long the device takes to arrive in a state.
    pub delays: Vec<(DeviceState, Duration)>,
    /// Where the device stops moving bytes, in a `Pipe` or a `Socket`.
    pub stall: Option<Stall>,
    /// After how many bytes the data fd fails.
    pub fail_at: Option<u64>,
}

/// A call of `MigrationDevice` that fails.
#[derive(Clone, Debug)]
pub struct CallFault {
    /// Which method.
    pub callback: Callback,
    /// Which of its calls.
    pub which: Which,
    /// How.
    pub fault: Fault,
}

/// A change of state that fails.
#[derive(Clone, Debug)]
pub struct TransitionFault {
    /// Which one.
    pub on: On,
    /// Which of those that match.
    pub which: Which,
    /// With what.
    pub errno: i32,
    /// Where the device then is. `None`: where it was, that is, before the request or, for
    /// [`On::Arc`], before the arc.
    pub leaves: Option<DeviceState>,
}

/// Which changes of state a fault is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum On {
    /// Every request.
    Any,
    /// The request to go from one state to another, before the device moves.
    Request {
        /// From where.
        from: DeviceState,
        /// To where.
        to: DeviceState,
    },
    /// One step on the way, whatever the request was.
    Arc {
        /// From where.
        from: DeviceState,
        /// To where.
        to: DeviceState,
    },
}

/// Which of the calls, or changes of state, that match. They are counted from 0.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Which {
    /// All of them.
    Every,
    /// This one.
    Nth(u64),
    /// This one and all after it.
    From(u64),
}

impl Which {
    pub(super) const fn matches(self, index: u64) -> bool {
        match self {
            Self::Every => true,
            Self::Nth(nth) => index == nth,
            Self::From(first) => index >= first,
        }
    }
}

/// How a call fails.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// With this errno, before it has done anything. (`event` cannot fail: no effect.)
    Errno(i32),
    /// With a panic, before it has done anything.
    Panic,
}

/// A method of `MigrationDevice`.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Callback {
    /// `flags`.
    Flags,
    /// `state`.
    State,
    /// `set_state`.
    SetState,
    /// `reset`.
    Reset,
    /// `data_size`.
    DataSize,
    /// `precopy_info`.
    PrecopyInfo,
    /// `enable_precopy_info_v2`.
    EnablePrecopyInfoV2,
    /// `read_precopy`.
    ReadPrecopy,
    /// `save_config`.
    SaveConfig,
    /// `load_config`.
    LoadConfig,
    /// `event`.
    Event,
}

impl Callback {
    /// All of them, in the order of their declaration.
    pub const ALL: [Self; 11] = [
        Self::Flags,
        Self::State,
        Self::SetState,
        Self::Reset,
        Self::DataSize,
        Self::PrecopyInfo,
        Self::EnablePrecopyInfoV2,
        Self::ReadPrecopy,
        Self::SaveConfig,
        Self::LoadConfig,
        Self::Event,
    ];
}

/// A place in the stream where the device stops moving bytes for a while.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Stall {
    /// After how many bytes.
    pub at: u64,
    /// For how long. `None`: until `SimHandle::release`, or the session's end.
    pub time: Option<Duration>,
}
