//! The counter that a kind of operation passes through: counts, and says which one goes wrong.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

/// Counts operations; the one numbered `at` has `fault`. Clones count together.
#[derive(Debug)]
pub struct Kth<F> {
    fault: Option<(u64, F)>,
    count: Arc<AtomicU64>,
}

impl<F: Copy> Kth<F> {
    /// Counts, and lets nothing go wrong.
    pub fn none() -> Self {
        Self {
            fault: None,
            count: Arc::default(),
        }
    }

    pub fn new(at: u64, fault: F) -> Self {
        Self {
            fault: Some((at, fault)),
            count: Arc::default(),
        }
    }

    /// Counts one more operation, and tells whether it goes wrong.
    pub fn next(&self) -> Option<F> {
        // Relaxed: a count, read when all threads have been joined.
        let number = self.count.fetch_add(1, Relaxed);
        self.fault
            .filter(|(at, _)| *at == number)
            .map(|(_, fault)| fault)
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.count.load(Relaxed)
    }

    /// Whether the one that goes wrong has come.
    pub fn met(&self) -> bool {
        self.fault
            .as_ref()
            .is_some_and(|(at, _)| *at < self.count())
    }
}

impl<F: Copy> Clone for Kth<F> {
    fn clone(&self) -> Self {
        Self {
            fault: self.fault,
            count: self.count.clone(),
        }
    }
}
