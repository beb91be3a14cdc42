//! The peers' algorithm of a save: read, duplicate, queue behind one lock.
//!
//! ```text
//!   a device's thread                  lock: queue, bounded         channel
//!   ─────────────────                  ────────────────────         ───────
//!   read(2) into its buffer            [ packet ][ packet ] …       take, unlock
//!   lock; malloc + memcpy; queue ─────▶                      ─────▶ send header and data
//!   signal                                                          free
//! ```
//!
//! Made as fast as the algorithm allows: the queue is short, so that what was freed is allocated
//! again while it is in the cache; nobody is signalled who does not wait.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, IoSlice, Read, Write},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use vfio_migration::wire::{self, DEVICE_PACKET_LEN, DeviceKey};

use crate::{
    engine::null,
    measure::{Mark, Sample},
    plan::Plan,
    sink::Sink,
    source,
};

/// How many packets wait for a channel, at most.
const DEPTH: usize = 8;

/// One packet on its way.
struct Packet {
    header: [u8; DEVICE_PACKET_LEN],
    data: Box<[u8]>,
}

/// What the one lock protects.
#[derive(Default)]
struct State {
    packets: VecDeque<Packet>,
    readers: usize,
    waiting_for_packets: usize,
    waiting_for_room: usize,
}

/// The one queue of all devices.
#[derive(Default)]
struct Queue {
    state: Mutex<State>,
    packets: Condvar,
    room: Condvar,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One device: read to its end.
    fn read(&self, mut file: File, key: &DeviceKey, packet: usize) -> io::Result<()> {
        let mut buffer = vec![1; packet];
        let mut index = 0;
        loop {
            let count = file.read(&mut buffer)?;
            let mut state = self.lock();
            if count == 0 {
                state.readers -= 1;
                self.packets.notify_all();
                return Ok(());
            }
            while state.packets.len() >= DEPTH {
                state.waiting_for_room += 1;
                state = self
                    .room
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                state.waiting_for_room -= 1;
            }
            let len = u32::try_from(count).expect("a packet is far below 4 GiB");
            state.packets.push_back(Packet {
                header: wire::encode_packet(key, index, false, len),
                data: buffer[..count].into(),
            });
            index += 1;
            if state.waiting_for_packets > 0 {
                self.packets.notify_one();
            }
        }
    }

    /// One channel: until all have been read and sent.
    fn send(&self, mut channel: File) -> io::Result<()> {
        let mut state = self.lock();
        loop {
            let Some(packet) = state.packets.pop_front() else {
                if state.readers == 0 {
                    return Ok(());
                }
                state.waiting_for_packets += 1;
                state = self
                    .packets
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                state.waiting_for_packets -= 1;
                continue;
            };
            if state.waiting_for_room > 0 {
                self.room.notify_one();
            }
            drop(state);
            let slices = [IoSlice::new(&packet.header), IoSlice::new(&packet.data)];
            let sent = channel.write_vectored(&slices)?;
            assert_eq!(sent, packet.header.len() + packet.data.len());
            drop(packet);
            state = self.lock();
        }
    }
}

/// Saves from `sinks` over channels that end in `/dev/null`.
///
/// # Panics
///
/// Where a file fails.
#[must_use]
pub fn save(plan: &Plan, sinks: &[Sink]) -> Sample {
    let keys = source::keys(plan);
    for sink in sinks {
        sink.rewind().expect("a sink can be rewound");
    }
    let queue = Queue::default();
    queue.lock().readers = sinks.len();
    let begun = Mark::now();
    thread::scope(|scope| {
        for (sink, key) in sinks.iter().zip(&keys) {
            let file = sink.file().expect("an fd can be duplicated");
            let queue = &queue;
            scope.spawn(move || queue.read(file, key, plan.packet).expect("a file"));
        }
        for _ in 0..plan.channels {
            scope.spawn(|| {
                queue
                    .send(null().expect("a null device"))
                    .expect("it takes all");
            });
        }
    });
    Sample::between(begun, Mark::now(), plan.bytes())
}
