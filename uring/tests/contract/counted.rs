//! A buffer that counts its drops.
#![expect(unsafe_code, reason = "a buffer of the test's own")]

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use vfio_migration_uring::{Buffer, Fd, Op};

/// Counts its drops.
pub struct Counted {
    bytes: Vec<u8>,
    drops: Arc<AtomicUsize>,
}

impl Counted {
    pub fn new(drops: &Arc<AtomicUsize>) -> Self {
        Self {
            bytes: vec![0; 16],
            drops: drops.clone(),
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        // Relaxed: a count that is read when the thread that dropped has been joined, or by it.
        self.drops.fetch_add(1, Relaxed);
    }
}

// SAFETY: the vector's heap block does not move with it, and the vector is its only owner.
unsafe impl Buffer for Counted {
    fn as_mut_ptr(&mut self) -> *mut u8 {
        self.bytes.as_mut_ptr()
    }

    fn len(&self) -> usize {
        self.bytes.len()
    }
}

pub fn counted_read(fd: &Fd, drops: &Arc<AtomicUsize>) -> Op<Counted> {
    Op::Read {
        fd: fd.clone(),
        buffer: Counted::new(drops),
    }
}
