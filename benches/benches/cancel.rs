//! How long does it take from a cancellation until the I/O thread has given the device back, where it
//! sleeps, and where a full pipe blocks its write?

use criterion::{Criterion, criterion_group, criterion_main};
use vfio_migration_benches::latency::{self, Cancelled};

fn cancel(c: &mut Criterion) {
    let mut group = c.benchmark_group("cancel");
    group.sample_size(10);
    for (name, at) in [
        ("starved", Cancelled::Starved),
        ("blocked", Cancelled::Blocked),
    ] {
        group.bench_function(name, |b| {
            b.iter_custom(|n| (0..n).map(|_| latency::cancel(at).expect("pipes")).sum());
        });
    }
    group.finish();
}

criterion_group!(benches, cancel);
criterion_main!(benches);
