//! The source's count of switchover acks: which devices ask for one, which acks have come, whether the
//! count is complete.
//!
//! The thread that iterates and the thread that reads the return path share it. Nobody waits here: the VMM
//! checks the count when it checks its downtime limit.

use std::sync::Arc;

use super::capabilities::SwitchoverAck;
use crate::{
    error::{Error, ErrorKind, Phase, Result},
    sync::{Mutex, lock},
};

#[derive(Debug, Default)]
struct Count {
    pending: u32,
    decided: bool,
}

/// The switchover acks of one migration, on the source. All clones share one count.
///
/// ```
/// use vfio_migration::migration::{SwitchoverAck, SwitchoverAcks};
///
/// let acks = SwitchoverAcks::new(SwitchoverAck::Once);
/// assert!(acks.is_open(), "nobody has asked");
/// // … `OutgoingDevice::setup` asks, and for each `Reply::SwitchoverAck` on the return path:
/// acks.received();
/// ```
#[derive(Clone, Debug)]
pub struct SwitchoverAcks {
    mode: SwitchoverAck,
    count: Arc<Mutex<Count>>,
}

impl SwitchoverAcks {
    /// Makes the count for a migration with this mode.
    #[must_use]
    pub fn new(mode: SwitchoverAck) -> Self {
        Self {
            mode,
            count: Arc::default(),
        }
    }

    pub(super) const fn mode(&self) -> SwitchoverAck {
        self.mode
    }

    /// A device asks the switchover to wait.
    pub(super) fn ask(&self) -> Result<()> {
        let mut count = lock(&self.count);
        if count.decided {
            return Err(Error::new(ErrorKind::LateRequest, Phase::Save));
        }
        count.pending += 1;
        Ok(())
    }

    /// A device that has asked is no longer part of the migration.
    pub(super) fn withdraw(&self) {
        let mut count = lock(&self.count);
        count.pending = count.pending.saturating_sub(1);
    }

    /// Counts an ack that has come. Some destinations send one for all devices, some one per device;
    /// surplus acks
    /// are ignored.
    pub fn received(&self) {
        let mut count = lock(&self.count);
        count.pending = match self.mode {
            SwitchoverAck::Off | SwitchoverAck::Once => 0,
            SwitchoverAck::Reusable => count.pending.saturating_sub(1),
        };
    }

    /// Whether no ack is missing. A VM that does not run needs none, which only
    /// [`OutgoingDevice::is_switchover_ready`](super::OutgoingDevice::is_switchover_ready) takes into account.
    #[must_use]
    pub fn is_open(&self) -> bool {
        lock(&self.count).pending == 0
    }

    /// From now on no device may ask. An ack that is missing holds up a VM that runs, and no other.
    pub(super) fn decide(&self, vm_runs: bool) -> Result<()> {
        let mut count = lock(&self.count);
        if count.pending > 0 && vm_runs {
            let what = "the destination has not acknowledged the switchover";
            return Err(Error::misuse(Phase::Save, what));
        }
        count.decided = true;
        Ok(())
    }

    /// Whether it is decided.
    pub(super) fn is_decided(&self) -> bool {
        lock(&self.count).decided
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_ack_is_for_all_or_each_is_for_one() {
        for (mode, after_one) in [
            (SwitchoverAck::Once, true),
            (SwitchoverAck::Reusable, false),
        ] {
            let acks = SwitchoverAcks::new(mode);
            acks.ask().unwrap();
            acks.ask().unwrap();
            assert!(!acks.is_open());
            assert!(acks.decide(true).is_err());
            acks.received();
            assert_eq!(acks.is_open(), after_one);
            acks.received();
            acks.received();
            assert!(acks.is_open());
        }
    }

    #[test]
    fn a_vm_that_does_not_run_waits_for_no_ack() {
        let acks = SwitchoverAcks::new(SwitchoverAck::Once);
        acks.ask().unwrap();
        acks.decide(false).unwrap();
        assert!(acks.ask().is_err(), "it is decided");
        acks.received(); // one that comes late does no harm
    }

    #[test]
    fn nobody_asks_once_it_is_decided() {
        let acks = SwitchoverAcks::new(SwitchoverAck::Reusable);
        acks.decide(true).unwrap();
        assert_eq!(*acks.ask().unwrap_err().kind(), ErrorKind::LateRequest);
    }
}
