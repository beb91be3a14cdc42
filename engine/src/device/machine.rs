//! The kernel's migration state machine: which arcs there are, and which way a combination goes.
//!
//! ```text
//!                    RUNNING ◀──────▶ PRE_COPY ─────┐
//!                       ▲                 ▲         │ without P2P
//!                       ▼                 ▼         │
//!                  RUNNING_P2P ◀──▶ PRE_COPY_P2P    │
//!                       ▲                 │         │
//!                       ▼                 ▼         │
//!     RESUMING ◀─────▶ STOP ◀────────▶ STOP_COPY ◀──┘
//! ```
//!
//! A device without P2P has RUNNING ◀──▶ STOP and PRE_COPY ──▶ STOP_COPY directly. A combination
//! takes the shortest way that has no saving state inside, except from one saving state to
//! another. Nothing leads back from STOP_COPY to PRE_COPY, nothing to or from ERROR. Pure
//! functions, any thread.

use crate::state::{
    DeviceState::{self, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy},
    MigrationFlags,
};

/// Whether the driver itself takes a device from one state to the other.
fn is_arc(flags: MigrationFlags, from: DeviceState, to: DeviceState) -> bool {
    if !flags.supports(from) || !flags.supports(to) {
        return false;
    }
    let p2p = flags.contains(MigrationFlags::P2P);
    match (from, to) {
        (Stop, StopCopy | Resuming) | (StopCopy | Resuming, Stop) => true,
        (Running, PreCopy) | (PreCopy, Running) => true,
        (Running, RunningP2p) | (RunningP2p, Running | Stop) | (Stop, RunningP2p) => true,
        (RunningP2p, PreCopyP2p) | (PreCopyP2p, RunningP2p) => true,
        (PreCopy, PreCopyP2p) | (PreCopyP2p, PreCopy | StopCopy) => true,
        (Running, Stop) | (Stop, Running) | (PreCopy, StopCopy) => !p2p,
        _ => false,
    }
}

/// The states that a device comes through from `from` to `to`, `to` included; empty where they are
/// the same. `None` is what the kernel refuses with `EINVAL`.
pub(super) fn path(
    flags: MigrationFlags,
    from: DeviceState,
    to: DeviceState,
) -> Option<Vec<DeviceState>> {
    if from == DeviceState::Error
        || to == DeviceState::Error
        || !flags.supports(to)
        || (from == StopCopy && to.is_precopy())
    {
        return None;
    }
    let within_saving = from.is_saving() && to.is_saving();
    // Breadth first: with eight states a list of ways is all that it takes.
    let mut ways = vec![vec![from]];
    for _ in DeviceState::ALL {
        if let Some(way) = ways.iter().find(|way| way.ends_with(&[to])) {
            return Some(way[1..].to_vec());
        }
        ways = ways
            .iter()
            .flat_map(|way| {
                let here = *way.last().expect("a way has a start");
                DeviceState::ALL
                    .into_iter()
                    .filter(move |next| is_arc(flags, here, *next) && !way.contains(next))
                    .filter(|next| *next == to || !next.is_saving() || within_saving)
                    .map(move |next| way.iter().copied().chain([next]).collect())
            })
            .collect();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: MigrationFlags = MigrationFlags::from_bits(7);
    const LEAST: MigrationFlags = MigrationFlags::STOP_COPY;
    const NO_P2P: MigrationFlags = MigrationFlags::from_bits(5);

    #[track_caller]
    fn check(flags: MigrationFlags, from: DeviceState, way: &[DeviceState]) {
        let to = *way.last().unwrap();
        assert_eq!(path(flags, from, to).as_deref(), Some(way), "from {from}");
    }

    #[test]
    fn combinations_go_the_kernels_way() {
        check(ALL, Running, &[RunningP2p, Stop]);
        check(ALL, Running, &[RunningP2p, Stop, StopCopy]);
        check(ALL, Running, &[RunningP2p, PreCopyP2p]);
        check(ALL, PreCopy, &[PreCopyP2p, StopCopy]);
        check(ALL, PreCopy, &[Running, RunningP2p, Stop]);
        check(ALL, PreCopy, &[Running, RunningP2p, Stop, Resuming]);
        check(ALL, PreCopyP2p, &[RunningP2p, Stop]);
        check(ALL, StopCopy, &[Stop, RunningP2p, Running]);
        check(ALL, StopCopy, &[Stop, Resuming]);
        check(ALL, Resuming, &[Stop, RunningP2p, Running, PreCopy]);
        check(NO_P2P, PreCopy, &[StopCopy]);
        check(NO_P2P, Stop, &[Running, PreCopy]);
        check(LEAST, Running, &[Stop, Resuming]);
    }

    #[test]
    fn the_rest_is_refused() {
        for to in DeviceState::ALL {
            assert_eq!(path(ALL, DeviceState::Error, to), None);
            assert_eq!(path(ALL, to, DeviceState::Error), None);
        }
        assert_eq!(path(ALL, StopCopy, PreCopy), None);
        assert_eq!(path(ALL, StopCopy, PreCopyP2p), None);
        assert_eq!(path(NO_P2P, Running, RunningP2p), None);
        assert_eq!(path(NO_P2P, PreCopy, PreCopyP2p), None);
        assert_eq!(path(LEAST, Running, PreCopy), None);
    }

    #[test]
    fn everything_else_has_one_shortest_way() {
        for bits in [1, 3, 5, 7] {
            let flags = MigrationFlags::from_bits(bits);
            for from in DeviceState::ALL.into_iter().skip(1) {
                for to in DeviceState::ALL.into_iter().skip(1) {
                    if !flags.supports(from) || !flags.supports(to) {
                        continue;
                    }
                    let refused = from == StopCopy && to.is_precopy();
                    let way = path(flags, from, to);
                    assert_eq!(way.is_none(), refused, "{flags}: {from} to {to}");
                    let inside = way
                        .iter()
                        .flat_map(|way| way.split_last())
                        .flat_map(|(_, w)| w);
                    for state in inside {
                        let group = from.is_saving() && to.is_saving();
                        assert!(!state.is_saving() || group, "{flags}: {from} to {to}");
                        assert_ne!(*state, Resuming);
                    }
                }
            }
        }
    }
}
