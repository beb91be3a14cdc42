//! What the fuzz targets share.
//!
//! [`steps`] runs a whole session in one thread, each of its tasks a coroutine, so that an input is
//! the same run every time. [`stream`] and [`device`] are the two ends that a target holds, and [`source`] is
//! what the sources of both have in common.

pub mod device;
pub mod input;
pub mod outgoing;
pub mod relay;
pub mod session;
pub mod source;
pub mod steps;
pub mod stream;
