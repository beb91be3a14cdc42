//! The machine's limit: the same bytes moved, and nobody hands anything over.
//!
//! ```text
//!   from memory   one thread writes preloaded buffers to the data fd │ another copies as much
//!   from TCP      one thread writes one fixed buffer                 │ others recv into one each
//!   through       each thread recvs a packet and writes that, anywhere: no order, no hand-over
//!   save          one thread reads into one fixed buffer, or several in turn
//! ```
//!
//! What the two threads of the first touch is together as large as the engine's pool.

use std::{
    fs::File,
    hint::black_box,
    io::{Read, Write},
    os::unix::fs::FileExt,
    sync::{
        Barrier,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
};

use crate::{
    engine::{feed_all, release},
    measure::{Mark, Sample},
    plan::Plan,
    sink::Sink,
    source::{self, Source, Wire},
};

/// Half of the engine's default pool.
const HALF: usize = 16 << 20;

/// Writes `count` packets, going round in `buffers`.
fn write(mut file: File, buffers: &[u8], packet: usize, count: u32) -> Mark {
    for buffer in buffers.chunks_exact(packet).cycle().take(count as usize) {
        file.write_all(buffer).expect("a sink takes all");
    }
    Mark::now()
}

/// From memory.
///
/// # Panics
///
/// Where the sink fails.
#[must_use]
pub fn load_memory(plan: &Plan, sink: &Sink, source: &Source) -> Sample {
    sink.rewind().expect("a sink can be rewound");
    let file = sink.file().expect("an fd can be duplicated");
    let preloaded = vec![1; HALF.max(plan.packet)];
    let mut copied = vec![1; HALF.max(plan.packet)];
    let start = Barrier::new(3);
    let (begun, end) = thread::scope(|scope| {
        let writer = scope.spawn(|| {
            start.wait();
            write(file, &preloaded, plan.packet, plan.count())
        });
        let copier = scope.spawn(|| {
            start.wait();
            let mut number = 0;
            while number < plan.count() {
                for buffer in copied.chunks_exact_mut(plan.packet) {
                    if number == plan.count() {
                        break;
                    }
                    buffer.copy_from_slice(source.packet(number, plan.packet));
                    black_box(&buffer);
                    number += 1;
                }
            }
            Mark::now()
        });
        let begun = release(&start);
        let end = writer.join().expect("it writes");
        (begun, end.later(copier.join().expect("it copies")))
    });
    Sample::between(begun, end, plan.bytes())
}

/// From TCP.
///
/// # Panics
///
/// Where the sink or a socket fails.
#[must_use]
pub fn load_sockets(plan: &Plan, sink: &Sink, source: &Source, wire: Wire) -> Sample {
    sink.rewind().expect("a sink can be rewound");
    let file = sink.file().expect("an fd can be duplicated");
    let fixed = vec![1; plan.packet];
    let (near, far) = source::connect(wire, plan.channels).expect("sockets");
    let start = Barrier::new(near.len() + 2);
    let (begun, end) = thread::scope(|scope| {
        let writer = scope.spawn(|| {
            start.wait();
            write(file, &fixed, plan.packet, plan.count())
        });
        let mut receivers = Vec::new();
        for mut stream in far {
            receivers.push(scope.spawn(move || {
                let mut fixed = vec![1; plan.packet.max(64 << 10)];
                while stream.read(&mut fixed).expect("a socket") > 0 {}
                Mark::now()
            }));
        }
        let begun = feed_all(plan, near, source, &start);
        let ends = receivers
            .into_iter()
            .map(|receiver| receiver.join().expect("it receives"));
        let end = ends.reduce(Mark::later).expect("a channel at least");
        (begun, end.later(writer.join().expect("it writes")))
    });
    Sample::between(begun, end, plan.bytes())
}

/// From TCP, where what is written is what was received: each channel's thread receives a packet's
/// worth of bytes and writes them at the next place. That is what must be done at the least.
///
/// # Panics
///
/// Where the sink or a socket fails.
#[must_use]
pub fn load_sockets_through(plan: &Plan, sink: &Sink, source: &Source, wire: Wire) -> Sample {
    let file = sink.file().expect("an fd can be duplicated");
    let (near, far) = source::connect(wire, plan.channels).expect("sockets");
    let start = Barrier::new(near.len() + 1);
    // Headers come with the data; what they make too much goes to the front again.
    let all = plan.device_bytes() as u64;
    let at = AtomicU64::new(0);
    let (begun, end) = thread::scope(|scope| {
        let mut receivers = Vec::new();
        for mut stream in far {
            let (file, at) = (&file, &at);
            receivers.push(scope.spawn(move || {
                let mut buffer = vec![1; plan.packet.max(64 << 10)];
                loop {
                    let mut filled = 0;
                    while filled < buffer.len() {
                        match stream.read(&mut buffer[filled..]).expect("a socket") {
                            0 => break,
                            count => filled += count,
                        }
                    }
                    // Relaxed: a number for each, and nothing more.
                    let place = at.fetch_add(filled as u64, Relaxed) % all;
                    file.write_all_at(&buffer[..filled], place)
                        .expect("a sink takes all");
                    if filled < buffer.len() {
                        return Mark::now();
                    }
                }
            }));
        }
        let begun = feed_all(plan, near, source, &start);
        let ends = receivers
            .into_iter()
            .map(|receiver| receiver.join().expect("it receives"));
        (begun, ends.reduce(Mark::later).expect("a channel at least"))
    });
    Sample::between(begun, end, plan.bytes())
}

/// Reads all of a device into fixed buffers: one, or as many in turn as an engine must have that
/// reads ahead.
///
/// # Panics
///
/// Where the file fails.
#[must_use]
pub fn save(plan: &Plan, sink: &Sink, buffers: usize) -> Sample {
    sink.rewind().expect("a sink can be rewound");
    let mut file = sink.file().expect("an fd can be duplicated");
    let mut fixed = vec![1; plan.packet * buffers];
    let begun = Mark::now();
    let mut at = 0;
    loop {
        let buffer = &mut fixed[at * plan.packet..][..plan.packet];
        if file.read(buffer).expect("a file") == 0 {
            return Sample::between(begun, Mark::now(), plan.bytes());
        }
        at = (at + 1) % buffers;
    }
}
