//! Leases that a pool refuses although it has the memory: for harnesses.
//!
//! A lease that is refused is what a spent budget looks like from outside. Threads that lease count
//! in one sequence; a harness counts once, and then refuses each number in turn.

use std::ops::Range;

use crate::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

/// Which leases of a session are refused, by their number. A handle: clones count together.
#[derive(Clone, Debug, Default)]
pub struct LeasePlan {
    refused: Range<u64>,
    asked: Arc<AtomicU64>,
}

impl LeasePlan {
    /// Refuses nothing, and counts.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Refuses the leases with these numbers. A thread that is refused asks again.
    #[must_use]
    pub fn refusing(refused: Range<u64>) -> Self {
        Self {
            refused,
            asked: Arc::default(),
        }
    }

    /// How many leases have been asked for: the next one's number.
    #[must_use]
    pub fn asked(&self) -> u64 {
        // Relaxed: a count, read when the session has ended.
        self.asked.load(Relaxed)
    }

    /// Counts one, and says whether it is refused.
    pub(super) fn refuses(&self) -> bool {
        // Relaxed: as above.
        self.refused.contains(&self.asked.fetch_add(1, Relaxed))
    }
}
