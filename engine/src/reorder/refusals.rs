//! Refuses leases although the pool has the memory: for test harnesses.
//!
//! From outside, a refused lease looks like a spent budget. All leases of all threads are numbered in one
//! sequence. A harness counts them in one run, and then refuses each number in turn.

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
