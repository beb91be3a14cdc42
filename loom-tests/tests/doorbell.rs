//! The I/O thread never sleeps on something that has been made so, whoever made it so.
//!
//! The ring's sleep has no bound here: a wake-up that is lost is a deadlock, which loom reports.
//!
//! | model | goes red when |
//! |---|---|
//! | `a_publication_ends_the_sleep` | either fence is gone, or the second look |
//! | `a_late_publisher_takes_no_wake_up_away` | a ringer takes back what the I/O thread waits for |
//! | `a_packet_that_follows_ends_the_sleep` | the I/O thread does not say anew what it waits for |
//! | `a_second_piece_ends_the_sleep` | the same, for the pieces of one packet |
//! | `a_cancellation_ends_the_sleep` | either fence is gone, or the flag is not looked at again |
//! | `a_cancellation_and_a_publication_race` | one's ring takes the other's away |
//! | `a_completion_and_a_publication_race` | the bell is not laid down anew |
//! | `one_ringer_is_told_to_wake` | `ring_if` does not take the flag back |
//! | `the_awake_are_not_rung` | `ring_if` does not look whether the I/O thread sleeps |
#![cfg(loom)]
#![expect(
    clippy::arc_with_non_send_sync,
    reason = "a model's threads are all one thread of the system"
)]

use std::sync::Arc;

use crossbeam_epoch::Collector;
use loom::thread;
use vfio_migration::internals::{
    doorbell::Doorbell,
    flags::DeviceFlags,
    reorder_buffer::{ReorderBuffer, ReorderReader},
    slot::{Packet, Publish},
};
use vfio_migration_loom_tests::{Participant, Ring, aside, model, take_next};

/// A device's reorder buffer, its flags, and the I/O thread's bell and ring.
struct Device {
    reorder: ReorderBuffer,
    flags: DeviceFlags,
    doorbell: Doorbell,
    ring: Ring,
}

/// A device, and one participant for each of `N` threads.
fn device<const N: usize>() -> (Arc<Device>, [Participant; N]) {
    let collector = Collector::new();
    let participants = std::array::from_fn(|_| Participant::new(&collector));
    let device = Device {
        reorder: ReorderBuffer::new(collector, 100),
        flags: DeviceFlags::new(),
        doorbell: Doorbell::new(),
        ring: Ring::new(),
    };
    (Arc::new(device), participants)
}

impl Device {
    /// What a channel does with a packet that it has received.
    fn publish(&self, index: u32, packet: Packet, channel: &Participant) {
        let published = self.reorder.publish(index, packet, &channel.pin());
        assert_eq!(published, Publish::Published);
        if self.reorder.ring(index, &self.doorbell) {
            self.ring.wake();
        }
    }

    /// What the main thread does to cancel.
    fn cancel(&self) {
        self.flags.quit();
        if self.doorbell.ring() {
            self.ring.wake();
        }
    }

    /// What the I/O thread does to get its next packet.
    fn take(&self, reader: &mut ReorderReader, io_thread: &Participant) -> Option<(u32, Packet)> {
        let stop = || self.flags.stop().is_some();
        take_next(
            reader,
            &self.reorder,
            &self.doorbell,
            &self.ring,
            io_thread,
            stop,
        )
    }
}

/// One channel, and the I/O thread. 2 threads, 1 packet, 2 preemptions.
#[test]
fn a_publication_ends_the_sleep() {
    model(|| {
        let (device, [io_thread, channel]) = device();
        let channel = channel.spawn({
            let device = Arc::clone(&device);
            move |me| device.publish(0, aside(0), me)
        });
        let taken = device.take(&mut ReorderReader::new(), &io_thread);
        assert_eq!(taken, Some((0, aside(0))));
        let ((), _channel) = channel.join().unwrap();
    });
}

/// Two channels with idx 0 and 1, and the I/O thread, which waits for both in turn. 3 threads, 2
/// packets, 2 preemptions.
#[test]
fn a_late_publisher_takes_no_wake_up_away() {
    model(|| {
        let (device, [io_thread, one, two]) = device();
        let channels = [(one, 0), (two, 1)].map(|(channel, index)| {
            let device = Arc::clone(&device);
            channel.spawn(move |me| device.publish(index, aside(index.into()), me))
        });
        let mut reader = ReorderReader::new();
        for index in 0..2 {
            let taken = device.take(&mut reader, &io_thread);
            assert_eq!(taken, Some((index, aside(index.into()))));
        }
        let _channels = channels.map(|channel| channel.join().unwrap());
    });
}

/// One channel with two packets in order, and the I/O thread. 2 threads, 2 packets, 2 preemptions.
#[test]
fn a_packet_that_follows_ends_the_sleep() {
    model(|| {
        let (device, [io_thread, channel]) = device();
        let channel = channel.spawn({
            let device = Arc::clone(&device);
            move |me| {
                for index in 0..2 {
                    device.publish(index, aside(index.into()), me);
                }
            }
        });
        let mut reader = ReorderReader::new();
        for index in 0..2 {
            let taken = device.take(&mut reader, &io_thread);
            assert_eq!(taken, Some((index, aside(index.into()))));
        }
        let ((), _channel) = channel.join().unwrap();
    });
}

/// The I/O thread has taken a packet's first piece and waits for the second. 2 threads, 1 packet of 2
/// pieces, 2 preemptions.
#[test]
fn a_second_piece_ends_the_sleep() {
    model(|| {
        let (device, [io_thread, channel]) = device();
        let first = || Packet {
            more: true,
            ..aside(1)
        };
        device.publish(0, first(), &channel);
        let mut reader = ReorderReader::new();
        reader.starve(&device.reorder);
        assert_eq!(device.take(&mut reader, &io_thread), Some((0, first())));
        let channel = channel.spawn({
            let device = Arc::clone(&device);
            move |me| {
                let rest = device.reorder.publish_rest(0, aside(2), &me.pin());
                assert_eq!(rest, Publish::Published);
                if device.reorder.ring(0, &device.doorbell) {
                    device.ring.wake();
                }
            }
        });
        let taken = device.take(&mut reader, &io_thread);
        assert_eq!(taken, Some((0, aside(2))));
        let ((), _channel) = channel.join().unwrap();
    });
}

/// The main thread cancels, the I/O thread waits for a packet that never comes. 2 threads, 2
/// preemptions.
#[test]
fn a_cancellation_ends_the_sleep() {
    model(|| {
        let (device, [io_thread]) = device();
        let main = thread::spawn({
            let device = Arc::clone(&device);
            move || device.cancel()
        });
        assert_eq!(device.take(&mut ReorderReader::new(), &io_thread), None);
        main.join().unwrap();
    });
}

/// A channel publishes while the main thread cancels; the I/O thread gets on until it is told to stop.
/// 3 threads, 1 packet, 2 preemptions.
#[test]
fn a_cancellation_and_a_publication_race() {
    model(|| {
        let (device, [io_thread, channel]) = device();
        let channel = channel.spawn({
            let device = Arc::clone(&device);
            move |me| device.publish(0, aside(0), me)
        });
        let main = thread::spawn({
            let device = Arc::clone(&device);
            move || device.cancel()
        });
        let mut reader = ReorderReader::new();
        while let Some(taken) = device.take(&mut reader, &io_thread) {
            assert_eq!(taken, (0, aside(0)));
        }
        assert!(device.flags.stop().is_some());
        let ((), _channel) = channel.join().unwrap();
        main.join().unwrap();
    });
}

/// A completion ends the I/O thread's sleep while a channel publishes. 3 threads, 1 packet, 2
/// preemptions.
#[test]
fn a_completion_and_a_publication_race() {
    model(|| {
        let (device, [io_thread, channel]) = device();
        let channel = channel.spawn({
            let device = Arc::clone(&device);
            move |me| device.publish(0, aside(0), me)
        });
        let kernel = thread::spawn({
            let device = Arc::clone(&device);
            move || device.ring.wake()
        });
        let taken = device.take(&mut ReorderReader::new(), &io_thread);
        assert_eq!(taken, Some((0, aside(0))));
        let ((), _channel) = channel.join().unwrap();
        kernel.join().unwrap();
    });
}

/// Two ringers, one sleep. 3 threads, 2 preemptions.
#[test]
fn one_ringer_is_told_to_wake() {
    model(|| {
        let doorbell = Arc::new(Doorbell::new());
        doorbell.lie_down();
        let ringers = [(); 2].map(|()| {
            let doorbell = Arc::clone(&doorbell);
            thread::spawn(move || doorbell.ring())
        });
        let told = ringers.map(|ringer| ringer.join().unwrap());
        assert_eq!(told.iter().filter(|&&told| told).count(), 1);
    });
}

/// An I/O thread that is up, and one that waits for something else. 1 thread.
#[test]
fn the_awake_are_not_rung() {
    model(|| {
        let doorbell = Doorbell::new();
        assert!(!doorbell.ring());
        doorbell.lie_down();
        assert!(!doorbell.ring_if(|| false));
        doorbell.get_up();
        assert!(!doorbell.ring());
    });
}
