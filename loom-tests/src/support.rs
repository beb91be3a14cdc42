//! The bounds, the threads, the ring and the packets of all models.
#![expect(
    unsafe_code,
    reason = "hands an epoch's participant to the thread that uses it"
)]

use std::{
    env,
    mem::ManuallyDrop,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use crossbeam_epoch::{Collector, Guard, LocalHandle};
use loom::{
    model::Builder,
    sync::Notify,
    thread::{self, JoinHandle},
};
use vfio_migration::internals::{
    doorbell::Doorbell,
    pool::{Lease, LeaseCutter, Pool, PoolLayout},
    reorder_buffer::{Next, ReorderBuffer, ReorderReader},
    slot::{Packet, Payload},
};

/// A lease of a model's pool.
pub type ModelLease = Lease<Arc<Pool>>;

/// Runs `f` under every schedule with at most two preemptions.
///
/// `LOOM_MAX_PREEMPTIONS` overrides the two; `VFIO_LOOM_DEPTH=release` adds one.
pub fn model(f: impl Fn() + Send + Sync + 'static) {
    model_within(2, f);
}

/// As [`model`], with another number of preemptions than two: for a model whose header says why.
pub fn model_within(preemptions: usize, f: impl Fn() + Send + Sync + 'static) {
    let release = env::var("VFIO_LOOM_DEPTH").is_ok_and(|depth| depth == "release");
    let mut builder = Builder::new();
    builder.preemption_bound = builder
        .preemption_bound
        .or(Some(preemptions + usize::from(release)));
    // An epoch's list walks are many steps; a loop without an end is still found.
    builder.max_branches = builder.max_branches.max(5_000);
    // Not loom's: it counts executions, and is no part of any.
    let schedules = Arc::new(AtomicUsize::new(0));
    builder.check({
        let schedules = Arc::clone(&schedules);
        move || {
            schedules.fetch_add(1, Ordering::Relaxed);
            f();
        }
    });
    println!("{} schedules", schedules.load(Ordering::Relaxed));
}

/// One thread's membership in a table's epochs.
///
/// It is made by the main thread before the other starts, and goes back to it by the join, so that
/// joining and leaving the epochs are not steps at which a model switches threads.
#[derive(Debug)]
pub struct Participant(ManuallyDrop<LocalHandle>);

// SAFETY: a handle's cells are for one thread at a time, and a participant is moved by a spawn and
// a join, which are edges. Nothing in a handle is bound to the thread that made it.
unsafe impl Send for Participant {}

impl Participant {
    /// Joins the epochs of `collector`.
    #[must_use]
    pub fn new(collector: &Collector) -> Self {
        let handle = collector.register();
        // A participant's first guard collects garbage: not a step of the model.
        drop(handle.pin());
        Self(ManuallyDrop::new(handle))
    }

    /// Begins to look at the table.
    #[must_use]
    pub fn pin(&self) -> Guard {
        self.0.pin()
    }

    /// Starts a thread that is this participant. It is the second half of what the join returns.
    pub fn spawn<R: 'static>(self, f: impl FnOnce(&Self) -> R + 'static) -> JoinHandle<(R, Self)> {
        thread::spawn(move || {
            let result = f(&self);
            (result, self)
        })
    }
}

impl Drop for Participant {
    fn drop(&mut self) {
        // A model that fails already must not fail twice: that would abort the run.
        if !std::thread::panicking() {
            // SAFETY: nobody has `self` after this.
            unsafe { ManuallyDrop::drop(&mut self.0) };
        }
    }
}

/// Lets the epochs go on until everything that was retired by now is freed.
pub fn collect(participant: &Participant) {
    for _ in 0..4 {
        participant.pin().flush();
    }
}

/// The I/O thread's ring, for the models: all it does is to sleep, and its wake is sticky.
#[derive(Debug, Default)]
pub struct Ring(Notify);

impl Ring {
    /// Returns a ring that nobody has woken.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends the I/O thread's sleep, or its next one. Also what a completion does.
    pub fn wake(&self) {
        self.0.notify();
    }

    /// Sleeps until a wake, or not at all where one came since the last sleep.
    pub fn sleep(&self) {
        self.0.wait();
    }
}

/// Takes the next packet, sleeping until it is there: the I/O thread's loop. `None` where the reorder buffer
/// was closed or `stop` said so.
pub fn take_next(
    reader: &mut ReorderReader,
    reorder: &ReorderBuffer,
    doorbell: &Doorbell,
    ring: &Ring,
    io_thread: &Participant,
    stop: impl Fn() -> bool,
) -> Option<(u32, Packet)> {
    loop {
        if stop() {
            return None;
        }
        // One guard for both looks: a second one's fence would stand in for the bell's.
        let guard = io_thread.pin();
        match reader.take(reorder, &guard) {
            Next::Packet(index, packet) => return Some((index, packet)),
            Next::Closed => return None,
            Next::Starved(_) => reader.starve(reorder),
        }
        doorbell.lie_down();
        let ready = reader.is_ready(reorder, &guard) || stop();
        drop(guard);
        if !ready {
            ring.sleep();
        }
        doorbell.get_up();
    }
}

/// A pool of `buffers` buffers of `buffer_len` bytes, and `reserves` reserves of 64.
#[must_use]
pub fn pool(buffers: u32, buffer_len: usize, reserves: u32) -> Arc<Pool> {
    let pool = Pool::new(PoolLayout {
        buffers,
        buffer_len,
        reserves,
        reserve_len: 64,
    });
    Arc::new(pool.expect("a few KiB"))
}

/// Leases a whole buffer, if there is one: no lease cutter shares it.
#[must_use]
pub fn lease(pool: &Arc<Pool>) -> Option<ModelLease> {
    LeaseCutter::new(Arc::clone(pool)).lease(pool.layout().buffer_len)
}

/// A packet without bytes, under a number.
pub fn aside(number: u64) -> Packet {
    Packet {
        payload: Payload::External(number),
        config: false,
        more: false,
    }
}

/// A packet of `lease`'s bytes, the first of which is set to `byte`.
pub fn filled(mut lease: ModelLease, byte: u8) -> Packet {
    lease.bytes_mut()[0] = byte;
    Packet {
        payload: Payload::Lease(lease.into_token()),
        config: false,
        more: false,
    }
}

/// A packet of a buffer of its own, whose first byte is `byte`.
///
/// # Panics
///
/// Where the pool has no buffer left.
pub fn fresh(pool: &Arc<Pool>, byte: u8) -> Packet {
    filled(lease(pool).expect("a buffer for every packet"), byte)
}

/// The lease of a packet that has bytes.
///
/// # Panics
///
/// Where it has none.
pub fn opened(pool: &Arc<Pool>, packet: Packet) -> ModelLease {
    let Payload::Lease(piece) = packet.payload else {
        panic!("the packet has no bytes");
    };
    Pool::adopt(Arc::clone(pool), piece)
}

/// Takes a packet's bytes, and gives them back to the pool: returns the first.
#[must_use]
pub fn drained(pool: &Arc<Pool>, packet: Packet) -> u8 {
    opened(pool, packet).bytes()[0]
}

/// Takes a packet's bytes over for something else, and gives them back to the pool.
pub fn reused(pool: &Arc<Pool>, packet: Packet) {
    opened(pool, packet).bytes_mut().fill(0);
}
