//! A thread for each device, over the engine's own slots and pool: what the one I/O thread replaces.
//!
//! ```text
//!   channel                                  a device's thread
//!   ───────                                  ─────────────────
//!   lease, fill, publish                     take the next packet, write(2), recycle
//!   unpark it, if it sleeps on this idx      none: say so, look again, park
//! ```

use std::{
    fs::File,
    io::{self, Write},
    sync::Barrier,
    thread,
};

use crossbeam_epoch::Collector;
use vfio_migration::internals::{
    doorbell::Doorbell,
    pool::{Lease, LeaseCutter, Pool, PoolLayout},
    reorder_buffer::{Next, ReorderBuffer, ReorderReader},
    slot::{Packet, Payload, Publish},
    waiters::Waiters,
};

use crate::{
    engine::release,
    measure::{Mark, Sample},
    plan::{Plan, Tickets},
    sink::Sink,
    source::Source,
};

/// The engine's default buffer.
const BUFFER: usize = 1 << 20;

/// What all threads share.
struct Shared {
    collector: Collector,
    pool: Pool,
    room: Waiters,
    reorders: Vec<ReorderBuffer>,
    bells: Vec<Doorbell>,
}

impl Shared {
    /// As much memory as the engine would have.
    fn new(plan: &Plan) -> Self {
        let collector = Collector::new();
        let reserve_len = plan.packet.next_multiple_of(4096);
        let budget = (32 << 20).max(plan.devices as usize * BUFFER);
        let buffers = (budget - plan.devices as usize * reserve_len.min(64 << 10)) / BUFFER;
        let pool = Pool::new(PoolLayout {
            buffers: u32::try_from(buffers).expect("few buffers"),
            buffer_len: BUFFER,
            reserves: plan.devices,
            reserve_len,
        })
        .expect("memory for the pool");
        let reorder = |_| ReorderBuffer::new(collector.clone(), 1 << 16);
        Self {
            reorders: (0..plan.devices).map(reorder).collect(),
            bells: (0..plan.devices).map(|_| Doorbell::new()).collect(),
            room: Waiters::new(),
            pool,
            collector,
        }
    }

    /// Memory for a packet: the device's reserve where it is next and there is no other.
    fn lease<'a>(
        &'a self,
        cutter: &mut LeaseCutter<&'a Pool>,
        device: usize,
        index: u32,
        len: usize,
    ) -> Lease<&'a Pool> {
        let reorder = &self.reorders[device];
        let mut look = || {
            if !reorder.in_window(index) {
                return None;
            }
            cutter.lease(len).or_else(|| {
                let ordinal = u32::try_from(device).expect("few devices");
                let mut lease = (reorder.next() == index)
                    .then(|| Pool::reserve(&self.pool, ordinal))
                    .flatten()?;
                lease.truncate(len);
                Some(lease)
            })
        };
        if let Some(lease) = look() {
            return lease;
        }
        let found = self.room.wait(None, look);
        found.expect("a wait without a deadline ends with a look")
    }

    /// One device's thread.
    fn run(&self, device: usize, mut file: File) -> io::Result<Mark> {
        let epoch = self.collector.register();
        let (reorder, bell) = (&self.reorders[device], &self.bells[device]);
        let mut reader = ReorderReader::new();
        loop {
            let taken = reader.take(reorder, &epoch.pin());
            match taken {
                Next::Packet(_, packet) => {
                    if packet.config {
                        return Ok(Mark::now());
                    }
                    if let Payload::Lease(piece) = packet.payload {
                        let lease = Pool::adopt(&self.pool, piece);
                        file.write_all(lease.bytes())?;
                    }
                    self.room.notify_all();
                }
                Next::Starved(_) => {
                    reader.starve(reorder);
                    bell.lie_down();
                    if !reader.is_ready(reorder, &epoch.pin()) {
                        thread::park();
                    }
                    bell.get_up();
                }
                Next::Closed => unreachable!("nobody closes it"),
            }
        }
    }
}

/// Loads from memory.
///
/// # Panics
///
/// Where a sink fails.
#[must_use]
pub fn load_memory(plan: &Plan, sinks: &[Sink], source: &Source) -> Sample {
    let shared = Shared::new(plan);
    let tickets = Tickets::default();
    let start = Barrier::new(plan.channels as usize + 1);
    let (begun, end) = thread::scope(|scope| {
        let shared = &shared;
        let mut loaders = Vec::new();
        for (device, sink) in sinks.iter().enumerate() {
            sink.rewind().expect("a sink can be rewound");
            let file = sink.file().expect("an fd can be duplicated");
            loaders.push(scope.spawn(move || shared.run(device, file).expect("a sink takes all")));
        }
        let threads: Vec<_> = loaders
            .iter()
            .map(|loader| loader.thread().clone())
            .collect();
        for _ in 0..plan.channels {
            let (threads, tickets, start) = (threads.clone(), &tickets, &start);
            scope.spawn(move || {
                let epoch = shared.collector.register();
                let mut cutter = LeaseCutter::new(&shared.pool);
                start.wait();
                let mut number = tickets.take(1);
                // Ends behind the last number.
                while let Some(place) = plan.place(number) {
                    let payload = if place.config {
                        Payload::Empty
                    } else {
                        let mut lease =
                            shared.lease(&mut cutter, place.device, place.index, plan.packet);
                        let data = source.packet(number, plan.packet);
                        lease.bytes_mut().copy_from_slice(data);
                        Payload::Lease(lease.into_token())
                    };
                    let packet = Packet {
                        payload,
                        config: place.config,
                        more: false,
                    };
                    let reorder = &shared.reorders[place.device];
                    reorder
                        .admit(place.index, place.config)
                        .expect("a good packet");
                    let published = reorder.publish(place.index, packet, &epoch.pin());
                    assert_eq!(published, Publish::Published);
                    if reorder.ring(place.index, &shared.bells[place.device]) {
                        threads[place.device].unpark();
                    }
                    number = tickets.take(1);
                }
            });
        }
        let begun = release(&start);
        let ends = loaders
            .into_iter()
            .map(|loader| loader.join().expect("it loads"));
        (begun, ends.reduce(Mark::later).expect("a device at least"))
    });
    Sample::between(begun, end, plan.bytes())
}
