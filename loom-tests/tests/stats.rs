//! | model                                            | goes red when                                   |
//! |--------------------------------------------------|-------------------------------------------------|
//! | `a_snapshot_never_claims_more_taken_than_published` | either side of the count edge is Relaxed; the order of the reads is turned |
#![cfg(loom)]
#![allow(missing_docs, reason = "models")]

use crossbeam_epoch::Collector;
use loom::{sync::Arc, thread};
use vfio_migration::internals::{
    reorder_buffer::{Next, ReorderBuffer, ReorderReader},
    stats::DeviceCounters,
};
use vfio_migration_loom_tests::{aside, model};

/// 3 threads: a publisher, the I/O thread, and whoever reads the statistics.
#[test]
fn a_snapshot_never_claims_more_taken_than_published() {
    model(|| {
        let collector = Collector::new();
        let shared = Arc::new((
            ReorderBuffer::new(collector.clone(), 8),
            DeviceCounters::default(),
        ));
        let channel = thread::spawn({
            let (shared, collector) = (shared.clone(), collector.clone());
            move || {
                let handle = collector.register();
                shared.1.published();
                let _published = shared.0.publish(0, aside(1), &handle.pin());
            }
        });
        let watcher = thread::spawn({
            let shared = shared.clone();
            move || {
                let (published, taken) = shared.1.packets();
                assert!(taken <= published, "{taken} of {published}");
            }
        });
        let handle = collector.register();
        let mut reader = ReorderReader::new();
        if let Next::Packet(..) = reader.take(&shared.0, &handle.pin()) {
            shared.1.taken(1);
        }
        channel.join().unwrap();
        watcher.join().unwrap();
    });
}
