//! | model                                             | goes red when                                     |
//! |---------------------------------------------------|---------------------------------------------------|
//! | `a_device_is_unplugged_while_a_channel_routes`    | a snapshot is freed at once; the map edge is Relaxed |
//! | `two_devices_are_plugged_at_once`                 | a change is not made under the lock               |
#![cfg(loom)]
#![allow(missing_docs, reason = "models")]

use crossbeam_epoch::Collector;
use loom::{cell::UnsafeCell, sync::Arc, thread};
use vfio_migration::internals::router::Router;
use vfio_migration_loom_tests::model;

/// A device, whose contents loom watches.
struct Device(UnsafeCell<u32>);

// SAFETY: only ever read once it is shared; loom checks it.
#[expect(
    unsafe_code,
    reason = "loom's cell checks the accesses that it makes possible"
)]
unsafe impl Sync for Device {}
// SAFETY: as above.
#[expect(unsafe_code, reason = "as above")]
unsafe impl Send for Device {}

fn device(value: u32) -> Arc<Device> {
    let device = Device(UnsafeCell::new(0));
    device.0.with_mut(|contents| {
        // SAFETY: not shared yet.
        #[expect(unsafe_code, reason = "writes what others read")]
        unsafe {
            *contents = value;
        }
    });
    Arc::new(device)
}

impl Device {
    fn value(&self) -> u32 {
        self.0.with(|contents| {
            // SAFETY: nobody writes it any more; loom checks that.
            #[expect(unsafe_code, reason = "reads what loom watches")]
            unsafe {
                *contents
            }
        })
    }
}

/// 2 threads, 2 devices.
#[test]
fn a_device_is_unplugged_while_a_channel_routes() {
    model(|| {
        let collector = Collector::new();
        let router = Arc::new(Router::<Device>::new(collector.clone()));
        let channel = thread::spawn({
            let (router, collector) = (router.clone(), collector.clone());
            move || {
                let handle = collector.register();
                if let Some(device) = router.get(b"a", 0, &handle.pin()) {
                    assert!([1, 2].contains(&device.value()));
                }
            }
        });
        let handle = collector.register();
        // Pinned first: its fence would carry the device's contents, and hide the map edge.
        let guard = handle.pin();
        assert!(router.insert(b"a", 0, device(1), &guard));
        drop(guard);
        let may_replace = |old: &Device| old.value() == 1;
        assert!(router.put(b"a", 0, device(2), may_replace, &handle.pin()));
        handle.pin().flush();
        channel.join().unwrap();
        let left = router.get(b"a", 0, &handle.pin()).unwrap();
        assert_eq!(left.value(), 2);
    });
}

/// 2 threads, 2 devices.
#[test]
fn two_devices_are_plugged_at_once() {
    model(|| {
        let collector = Collector::new();
        let router = Arc::new(Router::<Device>::new(collector.clone()));
        let other = thread::spawn({
            let (router, collector) = (router.clone(), collector.clone());
            move || {
                let handle = collector.register();
                assert!(router.insert(b"b", 0, device(2), &handle.pin()));
            }
        });
        let handle = collector.register();
        assert!(router.insert(b"a", 0, device(1), &handle.pin()));
        other.join().unwrap();
        let values: Vec<_> = router
            .all(&handle.pin())
            .iter()
            .map(|d| d.value())
            .collect();
        assert_eq!(values, [1, 2]);
    });
}
