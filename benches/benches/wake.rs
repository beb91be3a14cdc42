//! How long does it take from publishing to a sleeping I/O thread until the bytes are in its pipe, beside
//! a loader that sleeps on a condition variable?

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use vfio_migration_benches::latency;

/// All of these times, of as many wake-ups as asked for.
fn total(iterations: u64, f: impl Fn(u32) -> std::io::Result<Vec<u64>>) -> Duration {
    let count = u32::try_from(iterations).unwrap_or(u32::MAX);
    Duration::from_nanos(f(count).expect("pipes").iter().sum())
}

fn wake(c: &mut Criterion) {
    let mut group = c.benchmark_group("wake");
    group.sample_size(10);
    group.bench_function("engine", |b| {
        b.iter_custom(|n| total(n, latency::wake_engine));
    });
    group.bench_function("mutex", |b| {
        b.iter_custom(|n| total(n, latency::wake_mutex));
    });
    group.finish();
}

criterion_group!(benches, wake);
criterion_main!(benches);
