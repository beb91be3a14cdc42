//! The least that anyone must do for several devices: nobody hands anything over.
//!
//! ```text
//!   load   each core: copy a packet into the thread's one buffer, write that buffer to a device of its own
//!   save   each core: read a device of its own into the thread's one buffer, drop it
//! ```
//!
//! As many threads as the machine has cores, and each device is one thread's alone. The bytes are written by
//! the core whose cache they are in. An engine on the same cores cannot do less.

use std::{
    fs::File,
    io::{Read, Write},
    sync::Barrier,
    thread,
};

use crate::{
    engine::release,
    measure::{Mark, Sample},
    plan::Plan,
    sink::Sink,
    source::Source,
};

/// The files of each thread.
fn shares(sinks: &[Sink]) -> Vec<Vec<File>> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = cores.min(sinks.len());
    let share = |first| {
        let own = sinks.iter().skip(first).step_by(threads);
        own.map(|sink| {
            sink.rewind().expect("a sink can be rewound");
            sink.file().expect("an fd can be duplicated")
        })
        .collect()
    };
    (0..threads).map(share).collect()
}

/// Runs `work` over each thread's files.
fn run(plan: &Plan, sinks: &[Sink], work: impl Fn(&mut [File], &mut [u8]) + Sync) -> Sample {
    let shares = shares(sinks);
    let start = Barrier::new(shares.len() + 1);
    let (begun, end) = thread::scope(|scope| {
        let mut threads = Vec::new();
        for mut files in shares {
            let (start, work) = (&start, &work);
            threads.push(scope.spawn(move || {
                let mut buffer = vec![1; plan.packet];
                start.wait();
                work(&mut files, &mut buffer);
                Mark::now()
            }));
        }
        let begun = release(&start);
        let ends = threads
            .into_iter()
            .map(|thread| thread.join().expect("it works"));
        (begun, ends.reduce(Mark::later).expect("a device at least"))
    });
    Sample::between(begun, end, plan.bytes())
}

/// From memory.
///
/// # Panics
///
/// Where a sink fails.
#[must_use]
pub fn load_memory(plan: &Plan, sinks: &[Sink], source: &Source) -> Sample {
    run(plan, sinks, |files, buffer| {
        for index in 0..plan.packets {
            for file in &mut *files {
                buffer.copy_from_slice(source.packet(index, plan.packet));
                file.write_all(buffer).expect("a sink takes all");
            }
        }
    })
}

/// Reads all of each device.
///
/// # Panics
///
/// Where a file fails.
#[must_use]
pub fn save(plan: &Plan, sinks: &[Sink]) -> Sample {
    run(plan, sinks, |files, buffer| {
        for file in files {
            // Ends with the file.
            while file.read(buffer).expect("a file") > 0 {}
        }
    })
}
