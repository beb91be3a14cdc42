//! What the kernel's interface tells about a device: its states, its abilities, its estimates.
//!
//! ```text
//!                    RUNNING ◀──────▶ PRE_COPY ─────┐
//!                       ▲                 ▲         │ without P2P
//!                       ▼                 ▼         │
//!                  RUNNING_P2P ◀──▶ PRE_COPY_P2P    │
//!                       ▲                 │         │
//!                       ▼                 ▼         │
//!     RESUMING ◀─────▶ STOP ◀────────▶ STOP_COPY ◀──┘          ERROR: left by a reset
//! ```
//!
//! Plain values without a device behind them: any thread, no system calls, no waits. They stand below
//! everything else, so that an error can name a state.

use std::{error, fmt, ops};

/// A state of a device's migration state machine, numbered as in `linux/vfio.h`.
///
/// ```
/// use vfio_migration::DeviceState;
///
/// assert_eq!(DeviceState::try_from(3), Ok(DeviceState::StopCopy));
/// assert_eq!(DeviceState::StopCopy.to_string(), "STOP_COPY");
/// assert_eq!(u32::from(DeviceState::StopCopy), 3);
/// assert!(DeviceState::try_from(8).is_err());
/// ```
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u32)]
pub enum DeviceState {
    /// The device has failed. It cannot be requested, and only a reset leaves it.
    Error = 0,
    /// Neither runs nor changes its state.
    Stop = 1,
    /// Runs.
    Running = 2,
    /// Stopped, and its data fd gives the state that is left.
    StopCopy = 3,
    /// Stopped, and its data fd takes a state.
    Resuming = 4,
    /// Runs, but starts no transfer to another device. Only with [`MigrationFlags::P2P`].
    RunningP2p = 5,
    /// Runs, and its data fd gives what there is already. Only with [`MigrationFlags::PRE_COPY`].
    PreCopy = 6,
    /// Both of the above. Only with both flags.
    PreCopyP2p = 7,
}

impl DeviceState {
    /// Every state, in the order of the numbers.
    pub const ALL: [Self; 8] = [
        Self::Error,
        Self::Stop,
        Self::Running,
        Self::StopCopy,
        Self::Resuming,
        Self::RunningP2p,
        Self::PreCopy,
        Self::PreCopyP2p,
    ];

    /// Whether the device has a data fd that gives its state: PRE_COPY, PRE_COPY_P2P, STOP_COPY.
    /// A move from one of them to another keeps the fd.
    #[must_use]
    pub const fn is_saving(self) -> bool {
        matches!(self, Self::StopCopy | Self::PreCopy | Self::PreCopyP2p)
    }

    /// Whether the device works in this state, and may write to memory: RUNNING and PRE_COPY, with
    /// and without P2P.
    #[must_use]
    pub const fn runs(self) -> bool {
        matches!(self, Self::Running | Self::RunningP2p) || self.is_precopy()
    }

    /// Whether the state is PRE_COPY or PRE_COPY_P2P: the data fd can have nothing *for now*.
    #[must_use]
    pub const fn is_precopy(self) -> bool {
        matches!(self, Self::PreCopy | Self::PreCopyP2p)
    }
}

impl fmt::Display for DeviceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "ERROR",
            Self::Stop => "STOP",
            Self::Running => "RUNNING",
            Self::StopCopy => "STOP_COPY",
            Self::Resuming => "RESUMING",
            Self::RunningP2p => "RUNNING_P2P",
            Self::PreCopy => "PRE_COPY",
            Self::PreCopyP2p => "PRE_COPY_P2P",
        })
    }
}

impl TryFrom<u32> for DeviceState {
    type Error = UnknownState;

    fn try_from(value: u32) -> Result<Self, UnknownState> {
        Self::ALL
            .into_iter()
            .find(|state| u32::from(*state) == value)
            .ok_or(UnknownState(value))
    }
}

impl From<DeviceState> for u32 {
    fn from(state: DeviceState) -> Self {
        state as Self
    }
}

/// A number that is no device state.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct UnknownState(pub u32);

impl fmt::Display for UnknownState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is no device state", self.0)
    }
}

impl error::Error for UnknownState {}

/// What a device's migration can do, as the bits of `linux/vfio.h`.
///
/// ```
/// use vfio_migration::MigrationFlags;
///
/// let flags = MigrationFlags::STOP_COPY | MigrationFlags::P2P;
/// assert!(flags.contains(MigrationFlags::P2P));
/// assert!(!flags.contains(MigrationFlags::PRE_COPY));
/// assert_eq!(flags.to_string(), "STOP_COPY|P2P");
/// ```
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct MigrationFlags(u64);

impl MigrationFlags {
    /// Saves in STOP_COPY and loads in RESUMING: the least that migration needs.
    pub const STOP_COPY: Self = Self(1);
    /// Has the P2P states.
    pub const P2P: Self = Self(2);
    /// Has the PRE_COPY states.
    pub const PRE_COPY: Self = Self(4);

    /// Takes the kernel's word as it is, unknown bits included.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The kernel's word.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether every bit of `other` is set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether a device with these flags has `state`.
    ///
    /// ```
    /// use vfio_migration::{DeviceState, MigrationFlags};
    ///
    /// let flags = MigrationFlags::STOP_COPY | MigrationFlags::PRE_COPY;
    /// assert!(flags.supports(DeviceState::PreCopy));
    /// assert!(!flags.supports(DeviceState::PreCopyP2p));
    /// ```
    #[must_use]
    pub const fn supports(self, state: DeviceState) -> bool {
        match state {
            DeviceState::Error | DeviceState::Stop | DeviceState::Running => true,
            DeviceState::StopCopy | DeviceState::Resuming => self.contains(Self::STOP_COPY),
            DeviceState::RunningP2p => self.contains(Self::P2P),
            DeviceState::PreCopy => self.contains(Self::PRE_COPY),
            DeviceState::PreCopyP2p => self.contains(Self::P2P) && self.contains(Self::PRE_COPY),
        }
    }
}

impl ops::BitOr for MigrationFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Display for MigrationFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bar = "";
        for (flag, name) in [
            (Self::STOP_COPY, "STOP_COPY"),
            (Self::P2P, "P2P"),
            (Self::PRE_COPY, "PRE_COPY"),
        ] {
            if self.contains(flag) {
                write!(f, "{bar}{name}")?;
                bar = "|";
            }
        }
        let rest = self.0 & !(Self::STOP_COPY | Self::P2P | Self::PRE_COPY).0;
        if rest != 0 || self.0 == 0 {
            write!(f, "{bar}{rest:#x}")?;
        }
        Ok(())
    }
}

/// What a device estimates in PRE_COPY that its data fd still has to give (`vfio_precopy_info`).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct PrecopyInfo {
    /// Bytes that the destination should have before the switchover. An estimate.
    pub initial_bytes: u64,
    /// Bytes that have changed since they were read. An estimate.
    pub dirty_bytes: u64,
    /// New initial bytes have appeared, so a switchover acknowledged before must be acknowledged
    /// again. Never set without the v2 opt-in.
    pub reinit: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_are_the_kernels() {
        let names = [
            "ERROR",
            "STOP",
            "RUNNING",
            "STOP_COPY",
            "RESUMING",
            "RUNNING_P2P",
            "PRE_COPY",
            "PRE_COPY_P2P",
        ];
        for (number, name) in (0u32..).zip(names) {
            let state = DeviceState::try_from(number).unwrap();
            assert_eq!(u32::from(state), number);
            assert_eq!(state.to_string(), name);
        }
        for number in [8, 99, u32::MAX] {
            assert_eq!(DeviceState::try_from(number), Err(UnknownState(number)));
        }
    }

    #[test]
    fn flags_print_what_they_know_and_what_they_do_not() {
        assert_eq!(MigrationFlags::default().to_string(), "0x0");
        assert_eq!(
            MigrationFlags::from_bits(7).to_string(),
            "STOP_COPY|P2P|PRE_COPY"
        );
        assert_eq!(MigrationFlags::from_bits(9).to_string(), "STOP_COPY|0x8");
    }

    #[test]
    fn an_optional_state_needs_its_flags() {
        let least = MigrationFlags::STOP_COPY;
        let optional = [
            DeviceState::RunningP2p,
            DeviceState::PreCopy,
            DeviceState::PreCopyP2p,
        ];
        for state in DeviceState::ALL {
            assert_eq!(least.supports(state), !optional.contains(&state));
            assert!(MigrationFlags::from_bits(7).supports(state));
        }
        assert!(!(least | MigrationFlags::P2P).supports(DeviceState::PreCopyP2p));
    }
}
