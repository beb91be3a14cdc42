//! What do 8 and 64 devices on one I/O thread cost, beside one device, and beside a thread for each?
//!
//! Every row moves 64 MiB in all, in packets of 64 KiB from 4 channels into memfds.

use std::{hint::black_box, time::Duration};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use vfio_migration::Settings;
use vfio_migration_benches::{
    engine,
    measure::Sample,
    plan::Plan,
    sink::{Kind, Sink},
    source::Source,
    yardstick::threads,
};

const BYTES: usize = 64 << 20;
const PACKET: usize = 64 << 10;

fn timed(iterations: u64, mut f: impl FnMut() -> Sample) -> Duration {
    (0..iterations).map(|_| black_box(f()).wall).sum()
}

fn devices(c: &mut Criterion) {
    let mut group = c.benchmark_group("devices");
    group
        .throughput(Throughput::Bytes(BYTES as u64))
        .sample_size(10);
    let source = Source::new(PACKET);
    for count in [1, 8, 64] {
        let plan = Plan::of_bytes(count, 4, PACKET, BYTES);
        let sinks = Sink::several(Kind::Memfd, count, plan.device_bytes()).expect("memfds");
        group.bench_function(BenchmarkId::new("one-io-thread", count), |b| {
            b.iter_custom(|n| {
                timed(n, || {
                    engine::load_memory(&plan, &sinks, &source, Settings::default()).sample
                })
            });
        });
        group.bench_function(BenchmarkId::new("a-thread-each", count), |b| {
            b.iter_custom(|n| timed(n, || threads::load_memory(&plan, &sinks, &source)));
        });
    }
    group.finish();
}

criterion_group!(benches, devices);
criterion_main!(benches);
