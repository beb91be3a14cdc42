//! The source's work: bytes come out of each device in order, and packets go out on many channels.
//!
//! ```text
//!                 channel side (many threads)          device side (one I/O thread)
//!               ┌─────────────────────────────────┬──────────────────────────────────────────┐
//!   save.rs     │ send ← take ◀───────────────────┼─── publish ← encode ← complete ← submit  │
//!               │   │                             │                                     ▲    │
//!               │   └────────── recycle ──────────┼──────────────────────────────▶ lease┘    │
//!               └─────────────────────────────────┴──────────────────────────────────────────┘
//! ```
//!
//! This is `load.rs` in reverse. The I/O thread reads ahead into leased buffers, writes each packet's
//! headers into the room left in front of its data, and publishes the packet. The first free channel sends
//! headers and data from that same buffer with one call.
//!
//! | who | owns | may touch |
//! |---|---|---|
//! | a channel's thread | its socket; when all has been sent it hands the socket back | the queue, the packets that it took |
//! | the I/O thread | every [`SaveTransfer`]: lane, lease cutter, a clone of the data fd | the pool, the queue |
//! | a device's thread | the [`Device`](crate::Device): its state, its config, its data fd | its flags, its result |
//! | the main thread | the session | the flag of a stop |
//!
//! # What ends each wait
//!
//! | who waits | for | ended by |
//! |---|---|---|
//! | a channel's thread | a packet | a packet; the end of the sequence; a stop |
//! | a channel's thread | the destination, in a write | see `channel.rs` |
//! | the I/O thread | | see `io_loop.rs` |
//! | a device's thread | the I/O thread's result | the result; after a stop, the result or the grace time |

use std::{fmt, sync::OnceLock, time::Duration};

use crossbeam_epoch::Collector;

mod channel_side;
mod device_side;
mod device_thread;
mod session;
mod source_channels;

pub(crate) use self::{
    channel_side::serve_channel, device_side::SaveTransfer, device_thread::serve_device,
};
pub use self::{
    session::{SaveBuilder, SaveSession},
    source_channels::SourceChannels,
};
use crate::{
    channel::Finished,
    error::{Error, Result},
    first_failure::FirstFailure,
    framed,
    id::DeviceId,
    io_loop::IoHandle,
    reorder::{flags::DeviceFlags, pool::Pool, send_queue::SendQueue},
    stats::DeviceCounters,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    tasks::Threads,
    wire,
};

/// One device, before it is shared.
pub(crate) struct SizedDevice {
    pub(crate) id: DeviceId,
    pub(crate) data_len: usize,
    pub(crate) first: u32,
    pub(crate) of_migration: bool,
}

/// One device, as the I/O thread, the channels and its own thread share it.
pub(crate) struct SaveDevice {
    pub(crate) id: DeviceId,
    ordinal: u32,
    key: wire::DeviceKey,
    /// The most bytes of data in a packet.
    data_len: usize,
    /// Its first packet's idx: behind those that carried its PRE_COPY data.
    first: u32,
    /// Its migration tells of its set-up and its cleanup.
    of_migration: bool,
    pub(crate) flags: DeviceFlags,
    pub(crate) counters: DeviceCounters,
    /// The config packet's data, framing tags included, once it is saved.
    config: OnceLock<Vec<u8>>,
    /// The config packet's headers, once its idx is known.
    config_headers: OnceLock<[u8; wire::DEVICE_PACKET_LEN]>,
    drained: Mutex<Option<Result<()>>>,
}

impl SaveDevice {
    /// Which lane is its own.
    pub(crate) const fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// Counts a packet, before it is queued.
    fn count_published(&self) {
        self.counters.phases.wire.begin_now();
        self.counters.published();
    }

    /// Counts a packet of `bytes`, after it was sent.
    fn count_sent(&self, bytes: usize) {
        self.counters.taken(1);
        self.counters.bytes.add(bytes as u64);
        self.counters.phases.first_out.end_once();
        self.counters.phases.wire.reach();
    }
}

/// What all threads of a save share.
pub(crate) struct Save {
    pub(crate) collector: Collector,
    pub(crate) devices: Vec<Arc<SaveDevice>>,
    pub(crate) pool: Arc<Pool>,
    pub(crate) queue: SendQueue,
    pub(crate) io: Arc<IoHandle<SaveTransfer>>,
    /// Devices whose last packet is not in the queue.
    unfinished: AtomicU32,
    /// Whether the I/O thread waits for memory.
    dry: AtomicBool,
    grace: Duration,
    /// Channels on which all has been sent: the report's.
    pub(crate) finished: Mutex<Finished>,
    pub(crate) first_failure: FirstFailure,
}

impl Save {
    pub(crate) fn new(
        devices: Vec<SizedDevice>,
        pool: Arc<Pool>,
        io: Arc<IoHandle<SaveTransfer>>,
        grace: Duration,
        threads: Threads,
    ) -> Self {
        let collector = Collector::new();
        let count = u32::try_from(devices.len()).expect("the builder bounds their number");
        let device = |(ordinal, sized): (u32, SizedDevice)| {
            let SizedDevice {
                id,
                data_len,
                first,
                of_migration,
            } = sized;
            let layout = pool.layout();
            assert!(framed::HEADROOM + data_len <= layout.buffer_len && layout.buffers > 0);
            Arc::new(SaveDevice {
                key: wire::DeviceKey::new(&id),
                id,
                ordinal,
                data_len,
                first,
                of_migration,
                flags: DeviceFlags::new(),
                counters: DeviceCounters::default(),
                config: OnceLock::new(),
                config_headers: OnceLock::new(),
                drained: Mutex::new(None),
            })
        };
        Self {
            devices: (0..count).zip(devices).map(device).collect(),
            pool,
            queue: SendQueue::new(collector.clone()),
            collector,
            io,
            unfinished: AtomicU32::new(count),
            dry: AtomicBool::new(false),
            grace,
            finished: Mutex::new(Finished::new(threads)),
            first_failure: FirstFailure::default(),
        }
    }

    /// Ends everything, for this reason if it is the first. Returns whether it was.
    pub(crate) fn fail(&self, error: Error) -> bool {
        let first = self.first_failure.fail(error);
        if first {
            for device in &self.devices {
                device.flags.quit();
            }
            let epoch = self.collector.register();
            self.queue
                .close(&epoch.pin(), |packet| packet.recycle(&self.pool));
            self.io.wake();
        }
        first
    }

    /// Tells that memory has come back: wakes the I/O thread if it waits for memory.
    fn recycled(&self) {
        // Relaxed: behind the bell's fence.
        let must = self.io.doorbell.ring_if(|| self.dry.load(Relaxed));
        self.io.wake_if(must);
    }
}

impl fmt::Debug for Save {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Save")
            .field("pool", &self.pool)
            .field("queue", &self.queue)
            .finish_non_exhaustive()
    }
}
