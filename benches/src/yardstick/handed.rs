//! The least that a hand-over of bytes can cost: one thread copies, another writes those bytes.
//!
//! ```text
//!   copier   ready == k   wait, spinning, for room; copy packet k into buffer k mod n; ready = k + 1
//!   writer   written == k wait, spinning, for ready > k; write buffer k mod n; written = k + 1
//! ```
//!
//! What crosses from core to core is the bytes and two counters. Nobody sleeps, so nobody is woken. The ring of
//! buffers is as large as the engine lets its channels run ahead.
//!
//! | edge | release | acquire | what it carries |
//! |---|---|---|---|
//! | filled | the copier stores `ready` | the writer loads it | the packet's bytes |
//! | emptied | the writer stores `written` | the copier loads it | the buffer |
//!
//! Each buffer has a mutex, which is free whenever it is taken: it only spares `unsafe` here.

use std::{
    hint,
    io::Write,
    sync::{
        Barrier, Mutex,
        atomic::{
            AtomicU32,
            Ordering::{Acquire, Release},
        },
    },
    thread,
};

use crate::{
    engine::release,
    measure::{Mark, Sample},
    plan::Plan,
    sink::Sink,
    source::Source,
};

/// How far channels run ahead in the engine.
const AHEAD: usize = 12 << 20;

/// From memory.
///
/// # Panics
///
/// Where the sink fails.
#[must_use]
pub fn load_memory(plan: &Plan, sink: &Sink, source: &Source) -> Sample {
    sink.rewind().expect("a sink can be rewound");
    let mut file = sink.file().expect("an fd can be duplicated");
    let count = u32::try_from((AHEAD / plan.packet).clamp(2, 64)).expect("at most 64");
    let buffers: Vec<_> = (0..count)
        .map(|_| Mutex::new(vec![1_u8; plan.packet]))
        .collect();
    let buffer = |index: u32| {
        let buffer = buffers[(index % count) as usize].try_lock();
        buffer.expect("the counters give it to one thread at a time")
    };
    let (ready, written) = (AtomicU32::new(0), AtomicU32::new(0));
    let start = Barrier::new(3);
    let (begun, end) = thread::scope(|scope| {
        let (buffer, ready, written, start) = (&buffer, &ready, &written, &start);
        let writer = scope.spawn(move || {
            start.wait();
            for index in 0..plan.count() {
                // filled edge, acquire
                while ready.load(Acquire) <= index {
                    hint::spin_loop();
                }
                let data = buffer(index);
                file.write_all(&data).expect("a sink takes all");
                drop(data);
                // emptied edge, release
                written.store(index + 1, Release);
            }
            Mark::now()
        });
        scope.spawn(move || {
            start.wait();
            for index in 0..plan.count() {
                // emptied edge, acquire
                while index >= written.load(Acquire) + count {
                    hint::spin_loop();
                }
                buffer(index).copy_from_slice(source.packet(index, plan.packet));
                // filled edge, release
                ready.store(index + 1, Release);
            }
        });
        let begun = release(start);
        (begun, writer.join().expect("it writes"))
    });
    Sample::between(begun, end, plan.bytes())
}
