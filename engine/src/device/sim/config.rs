//! What a simulated device is like: plain values, any thread.

use super::{faults::Faults, image::Image};
use crate::state::{DeviceState, MigrationFlags};

/// What stands behind a simulated device's data fd. See the [module](super).
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum Stream {
    /// A pipe, served by a thread of the device's.
    #[default]
    Pipe,
    /// A stream socket, served by a thread of the device's.
    Socket,
    /// Loading: `/proc/self/mem`. Saving: a pipe.
    PlainWrite,
    /// A memory file.
    Memfd,
}

/// What a simulated device is like. Everything has a default.
///
/// ```
/// use vfio_migration::sim::{SimConfig, SimDevice, Stream};
///
/// let config = SimConfig { seed: 7, len: 1 << 30, stream: Stream::Socket, ..SimConfig::default() };
/// let device = SimDevice::new(config)?;
/// # drop(device);
/// # std::io::Result::Ok(())
/// ```
#[derive(Clone, Debug)]
pub struct SimConfig {
    /// What the device can do. All of it by default.
    pub flags: MigrationFlags,
    /// The state that the device begins in. RUNNING by default.
    pub state: DeviceState,
    /// What stands behind its data fd.
    pub stream: Stream,
    /// What everything random comes from.
    pub seed: u64,
    /// The length of its state in bytes, at least [`Image::HEADER_LEN`]. 1 MiB by default. On a
    /// destination it is the room for what comes, where the stream is `PlainWrite`.
    pub len: u64,
    /// How many bytes of the state can be read in PRE_COPY. 0 by default.
    pub precopy_initial: u64,
    /// The length of its config in bytes. 256 by default.
    pub config_len: u32,
    /// What it estimates as the size of its state. By default all that has not been read in
    /// PRE_COPY.
    pub data_size: Option<u64>,
    /// The size of the pipe's or socket's buffer in bytes, as far as the host goes along.
    /// 1 MiB by default.
    pub buffer: Option<usize>,
    /// How many bytes the device's thread moves at once at most: each time a number from 1 to
    /// this, by the seed. As many as it can, by default.
    pub piece: Option<usize>,
    /// What goes wrong.
    pub faults: Faults,
}

impl SimConfig {
    /// The state that a device has which was made with this, and has not loaded another.
    #[must_use]
    pub const fn image(&self) -> Image {
        Image::new(self.seed, self.len)
    }
}

impl Default for SimConfig {
    fn default() -> Self {
        Self {
            flags: MigrationFlags::STOP_COPY | MigrationFlags::P2P | MigrationFlags::PRE_COPY,
            state: DeviceState::Running,
            stream: Stream::default(),
            seed: 0,
            len: 1 << 20,
            precopy_initial: 0,
            config_len: 256,
            data_size: None,
            buffer: None,
            piece: None,
            faults: Faults::default(),
        }
    }
}
