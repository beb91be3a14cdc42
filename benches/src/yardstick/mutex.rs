//! The peers' algorithm of a load: a mutex for each device.
//!
//! ```text
//!   channel                                 loader, one thread for each device
//!   ───────                                 ──────────────────────────────────
//!   receive into the channel's buffer       lock
//!   lock                                    packets[next] there?  no ─▶ wait on the condvar
//!   grow packets to idx                     take it, unlock
//!   packets[idx] = malloc + memcpy          write it whole
//!   signal, if the loader waits; unlock     free it
//! ```
//!
//! What is held is not bounded, as it is by default with the peers. Made as fast as the algorithm
//! allows: std's futex mutex; no system call to signal where nobody waits; one look-up of a device
//! for packets of the same one; headers of small packets parsed out of a read-ahead buffer.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read, Write},
    mem,
    sync::{Barrier, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Instant,
};

use vfio_migration::wire::{DEVICE_PACKET_LEN, DeviceKey, DevicePacket};

use crate::{
    engine::{feed_all, nanos, release},
    measure::{Mark, Sample},
    plan::{Plan, Tickets},
    sink::Sink,
    source::{self, SMALL, Source, Stream, Wire},
};

/// One device.
#[derive(Debug, Default)]
pub struct Loader {
    state: Mutex<State>,
    arrived: Condvar,
}

/// What its mutex protects.
#[derive(Debug, Default)]
struct State {
    packets: Vec<Option<Box<[u8]>>>,
    /// How many data packets there are, once it is known.
    count: Option<usize>,
    waiting: bool,
}

impl Loader {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores a duplicate of a packet.
    pub fn publish(&self, index: u32, data: &[u8]) {
        let at = index as usize;
        let mut state = self.lock();
        if state.packets.len() <= at {
            state.packets.resize_with(at + 1, || None);
        }
        state.packets[at] = Some(data.into());
        self.signal(&mut state);
    }

    /// Says how many data packets there are.
    pub fn end(&self, count: u32) {
        let mut state = self.lock();
        state.count = Some(count as usize);
        self.signal(&mut state);
    }

    fn signal(&self, state: &mut State) {
        if mem::take(&mut state.waiting) {
            self.arrived.notify_one();
        }
    }

    /// Writes all packets in their order; returns when the last one has been written.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn run(&self, mut file: File) -> io::Result<Mark> {
        let mut next = 0;
        let mut state = self.lock();
        loop {
            if state.count == Some(next) {
                return Ok(Mark::now());
            }
            let packet = state.packets.get_mut(next).and_then(Option::take);
            let Some(packet) = packet else {
                state.waiting = true;
                state = self
                    .arrived
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(state);
            file.write_all(&packet)?;
            drop(packet);
            next += 1;
            state = self.lock();
        }
    }
}

/// Runs the loaders beside `channels`, which tells when the first packet came and how long the
/// publishes took.
fn run(
    plan: &Plan,
    sinks: &[Sink],
    channels: impl FnOnce(&[Loader]) -> (Mark, Vec<Vec<u64>>),
) -> Sample {
    let loaders: Vec<_> = sinks.iter().map(|_| Loader::default()).collect();
    let (begun, end, times) = thread::scope(|scope| {
        let mut threads = Vec::new();
        for (loader, sink) in loaders.iter().zip(sinks) {
            sink.rewind().expect("a sink can be rewound");
            let file = sink.file().expect("an fd can be duplicated");
            threads.push(scope.spawn(move || loader.run(file).expect("a sink takes all")));
        }
        let (begun, times) = channels(&loaders);
        let ends = threads
            .into_iter()
            .map(|thread| thread.join().expect("it loads"));
        let end = ends.reduce(Mark::later).expect("a device at least");
        (begun, end, times)
    });
    Sample::between(begun, end, plan.bytes()).with_publishes(times)
}

/// Loads from memory: each channel's thread copies a packet into its buffer, where it would have
/// been received, and stores it.
///
/// # Panics
///
/// Where a sink fails.
#[must_use]
pub fn load_memory(plan: &Plan, sinks: &[Sink], source: &Source) -> Sample {
    let start = Barrier::new(plan.channels as usize + 1);
    let tickets = Tickets::default();
    let channel = |loaders: &[Loader]| {
        let mut received = vec![1; plan.packet];
        let mut times = Vec::with_capacity(plan.count() as usize);
        start.wait();
        loop {
            let number = tickets.take(1);
            let Some(place) = plan.place(number) else {
                return times;
            };
            let loader = &loaders[place.device];
            if place.config {
                loader.end(place.index);
                continue;
            }
            received.copy_from_slice(source.packet(number, plan.packet));
            let since = Instant::now();
            loader.publish(place.index, &received);
            times.push(nanos(since));
        }
    };
    run(plan, sinks, |loaders| {
        thread::scope(|scope| {
            let channels: Vec<_> = (0..plan.channels)
                .map(|_| scope.spawn(|| channel(loaders)))
                .collect();
            let begun = release(&start);
            let times = channels
                .into_iter()
                .map(|channel| channel.join().expect("it publishes"));
            (begun, times.collect())
        })
    })
}

/// Loads from sockets, each with a feeder.
///
/// # Panics
///
/// Where a sink or a socket fails.
#[must_use]
pub fn load_sockets(plan: &Plan, sinks: &[Sink], source: &Source, wire: Wire) -> Sample {
    let keys = source::keys(plan);
    let (near, far) = source::connect(wire, plan.channels).expect("sockets");
    run(plan, sinks, |loaders| {
        thread::scope(|scope| {
            for stream in far {
                let keys = &keys;
                scope.spawn(move || {
                    let done = receive_all(stream, plan.packet, |key, packet, data| {
                        let device = keys.iter().position(|known| known == key);
                        let loader = &loaders[device.expect("a device of the plan")];
                        match data {
                            Some(data) => loader.publish(packet, data),
                            None => loader.end(packet),
                        }
                    });
                    done.expect("whole packets");
                });
            }
            let start = Barrier::new(near.len() + 1);
            (feed_all(plan, near, source, &start), Vec::new())
        })
    })
}

/// Receives packets until the stream ends: a device, an idx, and data unless it is the config.
///
/// # Errors
///
/// The kernel's, or a packet that is none.
pub fn receive_all(
    stream: Stream,
    packet: usize,
    each: impl FnMut(&DeviceKey, u32, Option<&[u8]>),
) -> io::Result<()> {
    if packet < SMALL {
        receive(BufReader::with_capacity(64 << 10, stream), packet, each)
    } else {
        // Nothing is read ahead, so nothing is copied twice.
        receive(
            BufReader::with_capacity(DEVICE_PACKET_LEN, stream),
            packet,
            each,
        )
    }
}

fn receive(
    mut stream: BufReader<Stream>,
    packet: usize,
    mut each: impl FnMut(&DeviceKey, u32, Option<&[u8]>),
) -> io::Result<()> {
    let mut received = vec![1; packet];
    let mut bytes = [0; DEVICE_PACKET_LEN];
    // Ends with the stream.
    while !stream.fill_buf()?.is_empty() {
        stream.read_exact(&mut bytes)?;
        let header = DevicePacket::decode(&bytes, u32::MAX).map_err(io::Error::other)?;
        let (key, place) = (header.header.key(), header.packet);
        let data = &mut received[..header.data_len as usize];
        stream.read_exact(data)?;
        each(&key, place.index, (!place.config).then_some(&*data));
    }
    Ok(())
}
