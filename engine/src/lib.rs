//! Loads and saves VFIO device state: out of order on many channels, in order on each device.

mod error;
mod id;

pub use crate::{
    error::{Error, ErrorKind, Phase, Result, Violation},
    id::DeviceId,
};
