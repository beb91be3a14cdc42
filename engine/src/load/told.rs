//! What has been told of a device's load, so that nothing is told twice: the I/O thread and the channels write it by
//! turns, a packet in parts.
//!
//! Plain marks. Whoever has the device's turn sets them, and the turn carries them; no wait.

use crate::{
    id::DeviceId,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    trace,
};

/// The marks of one device. Relaxed: see above.
#[derive(Debug)]
pub(super) struct Told {
    /// Its loader has begun.
    begun: AtomicBool,
    /// The first idx whose load has not begun, and the first whose load has not ended.
    starts: AtomicU64,
    ends: AtomicU64,
    /// It was cleaned up.
    cleaned: AtomicBool,
}

impl Told {
    pub(super) fn new() -> Self {
        Self {
            begun: AtomicBool::new(false),
            starts: AtomicU64::new(0),
            ends: AtomicU64::new(0),
            cleaned: AtomicBool::new(false),
        }
    }

    /// The loader may write.
    pub(super) fn begins(&self, id: &DeviceId) {
        if !self.begun.swap(true, Relaxed) {
            trace::load_bufs_thread_start(id);
        }
    }

    /// The loader has ended, if it ever began.
    pub(super) fn ends(&self, id: &DeviceId) {
        if self.begun.load(Relaxed) {
            trace::load_bufs_thread_end(id);
        }
    }

    /// A part of a packet, with bytes, goes to the data fd.
    pub(super) fn load_start(&self, id: &DeviceId, index: u32) {
        let next = self.starts.load(Relaxed);
        if u64::from(index) < next {
            return;
        }
        if next == 0 {
            trace::load_state_device_buffer_start(id);
        }
        self.starts.store(u64::from(index) + 1, Relaxed);
        trace::load_state_device_buffer_load_start(id, index);
    }

    /// The last part of a packet is in the device.
    pub(super) fn load_end(&self, id: &DeviceId, index: u32) {
        if u64::from(index) >= self.ends.load(Relaxed) {
            self.ends.store(u64::from(index) + 1, Relaxed);
            trace::load_state_device_buffer_load_end(id, index);
        }
    }

    /// The device is cleaned up.
    pub(super) fn cleanup(&self, id: &DeviceId) {
        if !self.cleaned.swap(true, Relaxed) {
            trace::load_cleanup(id);
        }
    }
}
