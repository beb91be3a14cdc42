//! The rings that keep the contract.

#[cfg(feature = "sim")]
use vfio_migration_uring::sim::{FaultPlan, SimConfig, SimRing};
use vfio_migration_uring::{BlockingRing, Buffer, KernelRing, Ring, Waker};

use crate::LONG;

pub trait Kind {
    /// None where this host has no such ring.
    fn open<B: Buffer>(capacity: usize, waker: &Waker) -> Option<Box<dyn Ring<B>>>;

    /// A ring on which much goes wrong, if it can be made to.
    fn open_rough(seed: u64, waker: &Waker) -> Option<Box<dyn Ring<Vec<u8>>>> {
        let _chance = seed;
        Self::open(16, waker)
    }
}

pub struct Uring;
pub struct Blocking;
#[cfg(feature = "sim")]
pub struct Sim;

impl Kind for Uring {
    fn open<B: Buffer>(capacity: usize, waker: &Waker) -> Option<Box<dyn Ring<B>>> {
        match KernelRing::new(capacity, waker.clone(), LONG) {
            Ok(ring) => Some(Box::new(ring)),
            Err(error) => {
                eprintln!("skipped: no io_uring here: {error}");
                None
            }
        }
    }
}

impl Kind for Blocking {
    fn open<B: Buffer>(capacity: usize, waker: &Waker) -> Option<Box<dyn Ring<B>>> {
        Some(Box::new(
            BlockingRing::new(capacity, waker.clone(), LONG).unwrap(),
        ))
    }
}

#[cfg(feature = "sim")]
impl Kind for Sim {
    fn open<B: Buffer>(capacity: usize, waker: &Waker) -> Option<Box<dyn Ring<B>>> {
        let config = SimConfig {
            seed: 7,
            capacity,
            delay: 20,
            reorder: true,
            ..SimConfig::default()
        };
        Some(Box::new(SimRing::new(config, waker.clone()).unwrap()))
    }

    fn open_rough(seed: u64, waker: &Waker) -> Option<Box<dyn Ring<Vec<u8>>>> {
        let config = SimConfig {
            seed,
            capacity: 16,
            short: 20,
            interrupt: 10,
            again: 10,
            delay: 20,
            reorder: true,
            plan: FaultPlan::new(),
            idle: None,
        };
        Some(Box::new(SimRing::new(config, waker.clone()).unwrap()))
    }
}
