//! Sleep and wake on the real rings, under load: what a model cannot see.
//!
//! A packet is published when the I/O thread has nothing to do, read at the device's end of a pipe, and
//! only then followed by the next; so the I/O thread falls asleep and is woken once for each, while other
//! threads keep both cores busy. Every sleep's bounded re-check must have found nothing.
//!
//! Alone in its process: its load would be every other test's.
#![cfg(feature = "sim")]
#![allow(missing_docs, reason = "a test")]

#[path = "support/mock.rs"]
mod mock;
#[path = "support/names.rs"]
mod names;
#[path = "support/payload.rs"]
mod payload;

use std::{
    io::{self, Read},
    os::unix::net::UnixStream,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
};

use vfio_migration::{
    Backend, Device, DeviceId, LoadSession, SaveSession, Settings,
    sim::{SimConfig, SimDevice, Stream},
    wire::wrap_config,
};
use vfio_migration_uring::sim::{FaultPlan, SimConfig as RingConfig};

use crate::{mock::Mock, names::id, payload::payload};

const RUNS: u32 = 10_000;

/// Runs `f` while other threads keep every core busy.
fn under_load(f: impl FnOnce()) {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let result = catch_unwind(AssertUnwindSafe(f));
        // A failure must not wait for threads that nobody ends.
        done.store(true, Ordering::Relaxed);
        result.unwrap_or_else(|panic| resume_unwind(panic));
    });
}

fn sleep_and_wake(backend: Backend, publishers: u32) {
    let (mut reader, writer) = io::pipe().unwrap();
    let id = id(1);
    let mut settings = Settings::default();
    settings.backend = backend;
    let load = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(writer).device(1))
        .start()
        .unwrap();
    load.switchover_start();
    let rounds = RUNS / publishers;
    thread::scope(|scope| {
        let mut starts = Vec::new();
        for number in 0..publishers {
            let (start, started) = mpsc::channel::<u32>();
            starts.push(start);
            let (load, id) = (&load, &id);
            scope.spawn(move || {
                let mut publisher = load.publisher();
                for round in started {
                    let index = round * publishers + number;
                    let packet = payload(index, false, &index.to_be_bytes());
                    publisher.push(id, &packet).unwrap();
                }
            });
        }
        // Each round brings a packet of each publisher, at once, in any order.
        for round in 0..rounds {
            for start in &starts {
                start.send(round).unwrap();
            }
            for number in 0..publishers {
                let mut bytes = [0; 4];
                reader.read_exact(&mut bytes).unwrap();
                assert_eq!(u32::from_be_bytes(bytes), round * publishers + number);
            }
        }
    });
    let last = rounds * publishers;
    let mut publisher = load.publisher();
    let config = payload(last, true, &wrap_config(&[]));
    publisher.push(&id, &config).unwrap();
    drop(publisher);
    load.no_more_channels();
    let report = load.join();
    report.result.unwrap();
    assert_eq!(report.stats.devices[0].packets, u64::from(last) + 1);
    assert_eq!(report.stats.late_wakeups, 0, "{backend}");
}

#[test]
fn no_wake_up_is_lost_on_the_kernels_ring() {
    under_load(|| sleep_and_wake(Backend::Uring, 1));
    under_load(|| sleep_and_wake(Backend::Uring, 3));
}

#[test]
fn no_wake_up_is_lost_on_the_blocking_ring() {
    under_load(|| sleep_and_wake(Backend::Blocking, 1));
    under_load(|| sleep_and_wake(Backend::Blocking, 3));
}

/// The whole engine over a ring that completes out of order, short, interrupted and late.
#[test]
fn every_seed_of_a_bad_ring_gives_the_right_state() {
    for seed in 0..60_u64 {
        let mut settings = Settings::default();
        settings.data_len = Some(if seed % 2 == 0 { 1 << 10 } else { 100_000 });
        settings.budget = (seed % 3 == 0).then_some(1 << 20);
        let ring = |side: u64| RingConfig {
            seed: seed * 2 + side,
            short: 20,
            interrupt: 10,
            again: 10,
            delay: 20,
            reorder: true,
            plan: FaultPlan::new(),
            ..RingConfig::default()
        };
        let mut load = LoadSession::builder()
            .settings(settings.clone())
            .simulated_ring(ring(0));
        let mut save = SaveSession::builder()
            .settings(settings)
            .simulated_ring(ring(1));
        let mut handles = Vec::new();
        for number in 0..=seed % 3 {
            let sim = |own: u64| {
                let config = SimConfig {
                    seed: own,
                    len: 200_000 + seed * 1000,
                    stream: Stream::Socket,
                    ..SimConfig::default()
                };
                let sim = SimDevice::new(config).unwrap();
                let handle = sim.handle();
                let id = DeviceId::new(format!("device {number}"), 0).unwrap();
                (Device::new(id, Box::new(sim)).unwrap(), handle)
            };
            let (source, saved) = sim(number + 1);
            let (destination, loaded) = sim(99);
            save = save.device(source);
            load = load.device(destination);
            handles.push((saved, loaded));
        }
        for _ in 0..=seed % 4 {
            let (near, far) = UnixStream::pair().unwrap();
            save = save.channel(near);
            load = load.channel(far);
        }
        let load = load.start().unwrap();
        let save = save.start().unwrap();
        load.switchover_start();
        let (saved, loaded) = (save.join(), load.join());
        saved
            .result
            .unwrap_or_else(|error| panic!("seed {seed}: {error:?}"));
        loaded
            .result
            .unwrap_or_else(|error| panic!("seed {seed}: {error:?}"));
        for (source, destination) in handles {
            assert_eq!(source.digest(), destination.digest(), "seed {seed}");
            assert_eq!(
                source.config_digest(),
                destination.config_digest(),
                "seed {seed}"
            );
        }
    }
}
