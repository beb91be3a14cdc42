//! A device's load, put together: channel, I/O thread, device's thread and whoever cleans up.
//!
//! | model | goes red when |
//! |---|---|
//! | `a_load_ends_with_all_its_bytes` | any edge on a packet's way, or the result's, is gone |
//! | `a_cancelled_load_ends_wherever_it_is` | a wait does not look for a stop; the end is lost or comes twice |
//! | `a_cancellation_after_the_data_ends_the_wait_for_the_config` | the same, where the I/O thread is done |
//! | `another_thread_cancels_while_cleanup_waits` | a stop wakes one of those who wait |
//! | `with_the_pool_full_the_next_packet_still_comes` | a reserve, or the wait for room, is lost |
#![cfg(loom)]
#![expect(
    clippy::arc_with_non_send_sync,
    reason = "a model's threads are all one thread of the system"
)]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam_epoch::Collector;
use loom::{cell::UnsafeCell, thread};
use vfio_migration::internals::{
    doorbell::Doorbell,
    flags::{DeviceFlags, Stop},
    pool::Pool,
    reorder_buffer::{ReorderBuffer, ReorderReader},
    slot::{Packet, Publish},
    waiters::Waiters,
};
use vfio_migration_loom_tests::{
    Participant, Ring, drained, filled, fresh, lease, model, opened, pool, take_next,
};

/// All that the threads of one device's load share.
struct Device {
    reorder: ReorderBuffer,
    pool: Arc<Pool>,
    room: Waiters,
    flags: DeviceFlags,
    doorbell: Doorbell,
    ring: Ring,
    /// What the I/O thread leaves to the device's thread.
    result: UnsafeCell<Vec<u8>>,
}

/// A device with `buffers` buffers and one reserve, and one participant for each of `N` threads.
fn device<const N: usize>(buffers: u32) -> (Arc<Device>, [Participant; N]) {
    let collector = Collector::new();
    let participants = std::array::from_fn(|_| Participant::new(&collector));
    let device = Device {
        reorder: ReorderBuffer::new(collector, 100),
        pool: pool(buffers, 64, 1),
        room: Waiters::new(),
        flags: DeviceFlags::new(),
        doorbell: Doorbell::new(),
        ring: Ring::new(),
        result: UnsafeCell::new(Vec::new()),
    };
    (Arc::new(device), participants)
}

impl Device {
    fn publish(&self, index: u32, packet: Packet, channel: &Participant) {
        match self.reorder.publish(index, packet, &channel.pin()) {
            Publish::Published => {}
            Publish::Closed(packet) => drop(opened(&self.pool, packet)),
            refused => panic!("each idx once: {refused:?}"),
        }
        if self.reorder.ring(index, &self.doorbell) {
            self.ring.wake();
        }
    }

    fn stop(&self, how: fn(&DeviceFlags) -> bool) {
        how(&self.flags);
        if self.doorbell.ring() {
            self.ring.wake();
        }
    }

    /// The I/O thread: takes `count` packets, or as many as there are before a stop, and leaves its
    /// result.
    fn drive(&self, count: usize, io_thread: &Participant) {
        let mut reader = ReorderReader::new();
        let mut taken = Vec::new();
        let stop = || self.flags.stop().is_some();
        while taken.len() < count
            && let Some((_, packet)) = take_next(
                &mut reader,
                &self.reorder,
                &self.doorbell,
                &self.ring,
                io_thread,
                stop,
            )
        {
            taken.push(drained(&self.pool, packet));
            self.room.notify_all();
        }
        self.reorder
            .close(&io_thread.pin(), |packet| drop(opened(&self.pool, packet)));
        // SAFETY is the model's: loom looks whether anybody else is at it.
        self.result.with_mut(|result| leave(result, taken));
        assert!(self.flags.drained());
    }

    /// The device's thread: waits for the I/O thread, stop or not, then for the config, and ends.
    fn run(&self) -> Result<Vec<u8>, Stop> {
        let stopped = self.flags.wait_drained().err();
        let grace = Instant::now() + Duration::from_secs(3600);
        assert!(self.flags.wait_drained_until(grace));
        let result = match stopped.map_or_else(|| self.flags.wait_config_ready(None).unwrap(), Err)
        {
            Ok(()) => Ok(self.result.with(look)),
            Err(stop) => Err(stop),
        };
        assert!(self.flags.end(), "the end is announced once");
        result
    }
}

#[expect(unsafe_code, reason = "loom's cell gives pointers")]
fn leave(result: *mut Vec<u8>, bytes: Vec<u8>) {
    // SAFETY: the pointer is the cell's, which loom keeps to one thread here.
    unsafe { *result = bytes };
}

#[expect(unsafe_code, reason = "loom's cell gives pointers")]
fn look(result: *const Vec<u8>) -> Vec<u8> {
    // SAFETY: as in `leave`.
    unsafe { &*result }.clone()
}

/// A channel brings two packets, the I/O thread takes them, the device's thread waits for it and for
/// the config, which is ready already. 3 threads, 2 packets, 2 buffers, 2 preemptions.
#[test]
fn a_load_ends_with_all_its_bytes() {
    model(|| {
        let (device, [io_thread, channel]) = device(2);
        assert!(device.flags.config_ready());
        let io_thread = io_thread.spawn({
            let device = Arc::clone(&device);
            move |me| device.drive(2, me)
        });
        let channel = channel.spawn({
            let device = Arc::clone(&device);
            move |me| {
                for index in [1, 0] {
                    let byte = u8::try_from(index).expect("a small model");
                    device.publish(index, fresh(&device.pool, byte), me);
                }
            }
        });
        assert_eq!(device.run(), Ok(vec![0, 1]));
        let ((), _io_thread) = io_thread.join().unwrap();
        let ((), _channel) = channel.join().unwrap();
        assert_eq!(device.pool.in_use().0, 0);
    });
}

/// Cleanup stops a load of which one packet is there and the next never comes. 3 threads, 1
/// packet, 1 buffer, 2 preemptions.
#[test]
fn a_cancelled_load_ends_wherever_it_is() {
    model(|| {
        let (device, [io_thread]) = device(1);
        device.publish(0, fresh(&device.pool, 0), &io_thread);
        let io_thread = io_thread.spawn({
            let device = Arc::clone(&device);
            move |me| device.drive(2, me)
        });
        let thread = thread::spawn({
            let device = Arc::clone(&device);
            move || device.run()
        });
        device.stop(DeviceFlags::exit);
        assert!(device.flags.wait_end(None));
        // Before the joins: nobody touches the device any more.
        device.result.with_mut(|result| leave(result, Vec::new()));
        assert_eq!(device.pool.in_use().0, 0);
        assert_eq!(thread.join().unwrap(), Err(Stop::Exit));
        let ((), _io_thread) = io_thread.join().unwrap();
    });
}

/// The I/O thread has all data; the config never comes, a cancellation does. 3 threads, no packet, 2
/// preemptions.
#[test]
fn a_cancellation_after_the_data_ends_the_wait_for_the_config() {
    model(|| {
        let (device, [io_thread]) = device(0);
        let io_thread = io_thread.spawn({
            let device = Arc::clone(&device);
            move |me| device.drive(0, me)
        });
        let thread = thread::spawn({
            let device = Arc::clone(&device);
            move || device.run()
        });
        device.stop(DeviceFlags::quit);
        assert!(device.flags.wait_end(None));
        device.result.with_mut(|result| leave(result, Vec::new()));
        assert_eq!(thread.join().unwrap(), Err(Stop::Quit));
        let ((), _io_thread) = io_thread.join().unwrap();
    });
}

/// Cleanup waits for the end without a word while another thread cancels. 3 threads, no packet, 2
/// preemptions.
#[test]
fn another_thread_cancels_while_cleanup_waits() {
    model(|| {
        let (device, [io_thread]) = device(0);
        device.drive(0, &io_thread);
        let thread = thread::spawn({
            let device = Arc::clone(&device);
            move || device.run()
        });
        let canceller = thread::spawn({
            let device = Arc::clone(&device);
            move || device.stop(DeviceFlags::quit)
        });
        assert!(device.flags.wait_end(None));
        assert_eq!(thread.join().unwrap(), Err(Stop::Quit));
        canceller.join().unwrap();
    });
}

/// The only buffer has idx 1; a channel comes with idx 0, which needs the reserve, and then with
/// idx 2, which needs either back. 2 threads, 3 packets, 1 buffer, 1 reserve, 2 preemptions.
#[test]
fn with_the_pool_full_the_next_packet_still_comes() {
    model(|| {
        let (device, [io_thread, channel]) = device(1);
        device.publish(1, fresh(&device.pool, 1), &io_thread);
        let channel = channel.spawn({
            let device = Arc::clone(&device);
            move |me| {
                for index in [0, 2] {
                    let look = || {
                        lease(&device.pool).or_else(|| {
                            (device.reorder.next() == index)
                                .then(|| Pool::reserve(Arc::clone(&device.pool), 0))
                                .flatten()
                        })
                    };
                    let room = device.room.wait(None, look).expect("no deadline");
                    let byte = u8::try_from(index).expect("a small model");
                    device.publish(index, filled(room, byte), me);
                }
            }
        });
        device.drive(3, &io_thread);
        assert_eq!(device.result.with(look), [0, 1, 2]);
        let ((), _channel) = channel.join().unwrap();
        assert_eq!(device.pool.in_use().0, 0);
    });
}
