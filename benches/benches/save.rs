//! How fast does state get out of a device, beside the peers' save and beside plain reads?
//!
//! Every row moves 64 MiB in packets of 1 MiB out of a memfd, over 4 channels that end in
//! `/dev/null`.

use std::{hint::black_box, time::Duration};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use vfio_migration_benches::{
    engine,
    measure::Sample,
    plan::Plan,
    sink::{Kind, Sink},
    yardstick::{copy_save, raw},
};

const BYTES: usize = 64 << 20;

fn timed(iterations: u64, mut f: impl FnMut() -> Sample) -> Duration {
    (0..iterations).map(|_| black_box(f()).wall).sum()
}

fn save(c: &mut Criterion) {
    let mut group = c.benchmark_group("save");
    group
        .throughput(Throughput::Bytes(BYTES as u64))
        .sample_size(10);
    let plan = Plan::of_bytes(1, 4, 1 << 20, BYTES);
    let sinks = Sink::several(Kind::Memfd, 1, plan.device_bytes()).expect("a memfd");
    group.bench_function("engine", |b| {
        b.iter_custom(|n| timed(n, || engine::save_null(&plan, &sinks).sample));
    });
    group.bench_function("copy", |b| {
        b.iter_custom(|n| timed(n, || copy_save::save(&plan, &sinks)));
    });
    group.bench_function("raw", |b| {
        b.iter_custom(|n| timed(n, || raw::save(&plan, &sinks[0], 1)));
    });
    group.finish();
}

criterion_group!(benches, save);
criterion_main!(benches);
