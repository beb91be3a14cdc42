//! How fast does state get into a device, by packet size, number of channels, where the packets come
//! from, and what kind of file the device's data fd is?
//!
//! Every row moves 64 MiB through the public session API with default settings, beside the peers'
//! algorithm where there is one for it. Read the ratio between rows of one group, not the numbers:
//! they are this machine's. The clock runs from the first packet to the last write.

use std::{hint::black_box, time::Duration};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use vfio_migration::Settings;
use vfio_migration_benches::{
    engine,
    measure::Sample,
    plan::Plan,
    sink::{Kind, Sink},
    source::{Source, Wire},
    yardstick::mutex,
};

const BYTES: usize = 64 << 20;

fn sinks(kind: Kind, plan: &Plan) -> Vec<Sink> {
    Sink::several(kind, plan.devices, plan.device_bytes()).expect("files for the devices")
}

/// Runs `f` as often as criterion likes, and adds up what it says.
fn timed(iterations: u64, mut f: impl FnMut() -> Sample) -> Duration {
    (0..iterations).map(|_| black_box(f()).wall).sum()
}

fn load(c: &mut Criterion) {
    let mut group = c.benchmark_group("load");
    group
        .throughput(Throughput::Bytes(BYTES as u64))
        .sample_size(10);
    for (name, packet) in [("4k", 4 << 10), ("64k", 64 << 10), ("1m", 1 << 20)] {
        let source = Source::new(packet);
        for channels in [1, 2, 4, 8] {
            let plan = Plan::of_bytes(1, channels, packet, BYTES);
            let sinks = sinks(Kind::Memfd, &plan);
            group.bench_function(BenchmarkId::new(format!("memory-{name}"), channels), |b| {
                b.iter_custom(|n| {
                    timed(n, || {
                        engine::load_memory(&plan, &sinks, &source, Settings::default()).sample
                    })
                });
            });
            group.bench_function(BenchmarkId::new(format!("mutex-{name}"), channels), |b| {
                b.iter_custom(|n| timed(n, || mutex::load_memory(&plan, &sinks, &source)));
            });
        }
        let plan = Plan::of_bytes(1, 4, packet, BYTES);
        for (wire_name, wire) in [("unix", Wire::Unix), ("tcp", Wire::Tcp)] {
            let sinks = sinks(Kind::Memfd, &plan);
            group.bench_function(BenchmarkId::new(format!("{wire_name}-{name}"), 4), |b| {
                b.iter_custom(|n| {
                    timed(n, || {
                        let settings = Settings::default();
                        engine::load_sockets(&plan, &sinks, &source, wire, settings).sample
                    })
                });
            });
        }
        for (file, kind) in [("plain", Kind::PlainWrite), ("pipe", Kind::Pipe)] {
            let sinks = sinks(kind, &plan);
            group.bench_function(BenchmarkId::new(format!("into-{file}-{name}"), 4), |b| {
                b.iter_custom(|n| {
                    timed(n, || {
                        engine::load_memory(&plan, &sinks, &source, Settings::default()).sample
                    })
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, load);
criterion_main!(benches);
