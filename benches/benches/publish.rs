//! What does it cost a channel to hand a packet over, by the number of channels?
//!
//! Each row is the median of all publications of a load of 64 MiB in packets of 64 KiB, beside the
//! peers' lock, duplicate and append.

use std::{hint::black_box, time::Duration};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use vfio_migration::Settings;
use vfio_migration_benches::{
    engine,
    measure::Sample,
    plan::Plan,
    sink::{Kind, Sink},
    source::Source,
    yardstick::mutex,
};

const BYTES: usize = 64 << 20;
const PACKET: usize = 64 << 10;

/// The median publication of each run, added up.
fn medians(iterations: u64, mut f: impl FnMut() -> Sample) -> Duration {
    let median = |sample: &Sample| Duration::from_secs_f64(sample.publish(0.5) / 1e9);
    (0..iterations).map(|_| median(&black_box(f()))).sum()
}

fn publish(c: &mut Criterion) {
    let mut group = c.benchmark_group("publish");
    group.sample_size(10);
    let source = Source::new(PACKET);
    for channels in [1, 2, 4, 8] {
        let plan = Plan::of_bytes(1, channels, PACKET, BYTES);
        let sinks = Sink::several(Kind::Memfd, 1, plan.device_bytes()).expect("a memfd");
        group.bench_function(BenchmarkId::new("engine", channels), |b| {
            b.iter_custom(|n| {
                medians(n, || {
                    engine::load_memory(&plan, &sinks, &source, Settings::default()).sample
                })
            });
        });
        group.bench_function(BenchmarkId::new("mutex", channels), |b| {
            b.iter_custom(|n| medians(n, || mutex::load_memory(&plan, &sinks, &source)));
        });
    }
    group.finish();
}

criterion_group!(benches, publish);
criterion_main!(benches);
