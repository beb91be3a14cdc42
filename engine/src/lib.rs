//! Loads and saves VFIO device state: out of order on many channels, in order on each device.

#[cfg(all(loom, not(crossbeam_loom)))]
compile_error!("`--cfg loom` without `--cfg crossbeam_loom` models the slots but not the epochs");

mod error;
mod id;
mod reorder;
mod sync;

pub use crate::{
    error::{Error, ErrorKind, Phase, Result, Violation},
    id::DeviceId,
};

/// The lock-free core, opened for the models and the benches. Outside semver.
#[cfg(any(loom, feature = "internals"))]
#[doc(hidden)]
pub mod internals {
    pub use crate::reorder::{control, cursor, doorbell, pool, queue, slot, table, waiters};
}
