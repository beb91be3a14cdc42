//! The driver's sleep. The ring stands here as what it promises: a wake that is sticky.
//!
//! | model                                            | goes red when                                             |
//! |--------------------------------------------------|-----------------------------------------------------------|
//! | `a_published_packet_ends_the_drivers_sleep`      | either fence is gone; the second look is gone             |
//! | `a_late_publisher_takes_no_wake_up_from_another` | a publisher takes back what the driver waits for          |
//! | `a_flag_ends_the_drivers_sleep`                  | either fence is gone; the second look is gone             |
//! | `a_completion_or_a_packet_ends_the_drivers_sleep`| either fence is gone                                      |
#![cfg(loom)]
#![allow(missing_docs, reason = "models")]

use crossbeam_epoch::Collector;
use loom::{
    sync::{Arc, Condvar, Mutex},
    thread,
};
use vfio_migration::internals::{
    control::Control,
    cursor::{Cursor, Inbox, Next},
    doorbell::Doorbell,
    slot::Publish,
};
use vfio_migration_loom_tests::{aside, model, model_within};

/// A ring's wait and wake: sticky, and without a bound.
struct Ring {
    woken: Mutex<bool>,
    condvar: Condvar,
}

impl Ring {
    fn new() -> Self {
        Self {
            woken: Mutex::new(false),
            condvar: Condvar::new(),
        }
    }

    fn wake(&self) {
        *self.woken.lock().unwrap() = true;
        self.condvar.notify_one();
    }

    fn wait(&self) {
        let mut woken = self.woken.lock().unwrap();
        while !*woken {
            woken = self.condvar.wait(woken).unwrap();
        }
        *woken = false;
    }
}

struct Shared {
    inbox: Inbox,
    doorbell: Doorbell,
    control: Control,
    ring: Ring,
    collector: Collector,
}

impl Shared {
    fn new() -> Arc<Self> {
        let collector = Collector::new();
        Arc::new(Self {
            inbox: Inbox::new(collector.clone(), 8),
            doorbell: Doorbell::new(),
            control: Control::new(),
            ring: Ring::new(),
            collector,
        })
    }

    fn publish(&self, index: u32) {
        let handle = self.collector.register();
        let published = self.inbox.publish(index, aside(1), &handle.pin());
        assert_eq!(published, Publish::Published);
        if self.inbox.ring(index, &self.doorbell) {
            self.ring.wake();
        }
    }

    /// The driver's loop, until `count` packets are taken or it is told to stop.
    fn drive(&self, count: u32) {
        let handle = self.collector.register();
        let mut cursor = Cursor::new();
        while cursor.next() < count && self.control.stop().is_none() {
            let guard = handle.pin();
            match cursor.take(&self.inbox, &guard) {
                Next::Packet(..) => continue,
                Next::Starved(_) => cursor.starve(&self.inbox),
                Next::Closed => panic!("nobody closes it"),
            }
            self.doorbell.lie_down();
            if cursor.is_ready(&self.inbox, &guard) || self.control.stop().is_some() {
                self.doorbell.get_up();
                continue;
            }
            drop(guard);
            self.ring.wait();
            self.doorbell.get_up();
        }
    }
}

/// 2 threads, 1 packet.
#[test]
fn a_published_packet_ends_the_drivers_sleep() {
    model(|| {
        let shared = Shared::new();
        let channel = thread::spawn({
            let shared = shared.clone();
            move || shared.publish(0)
        });
        shared.drive(1);
        channel.join().unwrap();
    });
}

/// 3 threads, 2 packets, each of its own publisher: the driver sleeps on the first, and then on the
/// second while the first's publisher is still on its way to the bell. 1 preemption.
#[test]
fn a_late_publisher_takes_no_wake_up_from_another() {
    model_within(1, || {
        let shared = Shared::new();
        let channels = [0, 1].map(|index| {
            let shared = shared.clone();
            thread::spawn(move || shared.publish(index))
        });
        shared.drive(2);
        for channel in channels {
            channel.join().unwrap();
        }
    });
}

/// 2 threads, no packet: cancelled.
#[test]
fn a_flag_ends_the_drivers_sleep() {
    model(|| {
        let shared = Shared::new();
        let canceller = thread::spawn({
            let shared = shared.clone();
            move || {
                shared.control.quit();
                if shared.doorbell.ring() {
                    shared.ring.wake();
                }
            }
        });
        shared.drive(1);
        canceller.join().unwrap();
    });
}

/// 3 threads: what ends the sleep is a completion, which needs no bell, or a packet, which does.
#[test]
fn a_completion_or_a_packet_ends_the_drivers_sleep() {
    model(|| {
        let shared = Shared::new();
        let kernel = thread::spawn({
            let shared = shared.clone();
            move || shared.ring.wake()
        });
        let channel = thread::spawn({
            let shared = shared.clone();
            move || shared.publish(0)
        });
        shared.drive(1);
        kernel.join().unwrap();
        channel.join().unwrap();
    });
}
