//! The turn of a device's one taker: whoever publishes what is next takes it, or somebody else does; each packet
//! once, in order, by one thread at a time.
//!
//! | model | goes red when |
//! |---|---|
//! | `two_channels_take_all_that_they_publish` | the fence or the look behind the return is gone; two have the turn |
//! | `a_turn_carries_what_was_written` | an edge from one holder to the next is gone |
//! | `a_packet_comes_while_the_io_thread_lends` | the I/O thread does not look again; it or the publisher has no fence |
//! | `the_config_is_the_io_threads` | a turn that is handed over is not rung for, or is lost |
//! | `a_holder_that_has_written_enough_rings` | what it leaves is nobody's |
//! | `the_io_thread_gets_a_turn_that_it_wants` | the wish is lost; a holder does not ring |
//! | `a_closing_finds_nobody_at_the_device` | the I/O thread ends while a channel has the turn |
#![cfg(loom)]
#![expect(
    clippy::arc_with_non_send_sync,
    reason = "a model's threads are all one thread of the system"
)]

use std::sync::Arc;

use crossbeam_epoch::{Collector, Guard};
use loom::{cell::UnsafeCell, thread};
use vfio_migration::internals::{
    doorbell::Doorbell,
    flags::DeviceFlags,
    pool::Pool,
    reorder_buffer::{Next, ReorderBuffer, ReorderReader},
    slot::{Packet, Peek, Publish},
    turn::{End, Look, Passed, Took, Turn},
};
use vfio_migration_loom_tests::{
    Participant, Ring, drained, fresh, model, model_within, opened, pool, reused,
};

/// All that the threads of one device's load share.
struct Device {
    turn: Turn,
    reorder: ReorderBuffer,
    pool: Arc<Pool>,
    flags: DeviceFlags,
    doorbell: Doorbell,
    ring: Ring,
    /// After how many packets a holder has written enough for others.
    enough: usize,
    /// What has been written. Loom looks whether two are at it, or one without the other's edge.
    file: UnsafeCell<Vec<u8>>,
}

fn device<const N: usize>(buffers: u32) -> (Arc<Device>, [Participant; N]) {
    let collector = Collector::new();
    let participants = std::array::from_fn(|_| Participant::new(&collector));
    let device = Device {
        turn: Turn::new(),
        reorder: ReorderBuffer::new(collector, 100),
        pool: pool(buffers, 64, 0),
        flags: DeviceFlags::new(),
        doorbell: Doorbell::new(),
        ring: Ring::new(),
        enough: usize::MAX,
        file: UnsafeCell::new(Vec::with_capacity(4)),
    };
    (Arc::new(device), participants)
}

impl Device {
    fn append(&self, byte: u8) {
        self.file.with_mut(|file| push(file, byte));
    }

    fn written(&self) -> Vec<u8> {
        self.file.with(look)
    }

    /// Takes what is there, with the turn.
    fn write_ready(&self, reader: &mut ReorderReader, me: &Participant) -> End {
        for _ in 0..self.enough {
            if self.flags.stop().is_some() {
                return End::Io;
            }
            let guard = me.pin();
            match reader.peek(&self.reorder, &guard) {
                Some(Peek::Data(_)) => {}
                Some(Peek::Other) => return End::Io,
                None => return End::Missing,
            }
            match reader.take(&self.reorder, &guard) {
                Next::Packet(_, packet) => self.append(drained(&self.pool, packet)),
                Next::Starved(_) | Next::Closed => return End::Io,
            }
        }
        End::Enough
    }

    /// A channel: publishes, and writes if it can.
    fn bring(&self, index: u32, packet: Packet, me: &Participant) {
        match self.reorder.publish(index, packet, &me.pin()) {
            Publish::Published => {}
            Publish::Closed(packet) => return reused(&self.pool, packet),
            refused => panic!("each idx once: {refused:?}"),
        }
        let passed = self.turn.pass(
            &self.reorder,
            || me.pin(),
            |reader| self.write_ready(reader, me),
        );
        let must = match passed {
            Passed::Done => false,
            Passed::Io => self.reorder.ring(index, &self.doorbell),
            Passed::Ring => self.doorbell.ring(),
        };
        if must {
            self.ring.wake();
        }
    }

    /// The I/O thread: lends the turn, and has it back for a packet that channels leave to it or for a stop.
    /// Returns the packet.
    fn drive(&self, me: &Participant) -> Option<Packet> {
        self.turn.lend();
        // What it finds now nobody may come for. Later on only what a holder has left, if it has written enough.
        let mut lent = true;
        loop {
            let stop = self.flags.stop().is_some();
            let guard = me.pin();
            if (stop || self.is_due(lent, &guard)) && self.turn.claim() {
                let mut reader = ReorderReader::resume(&self.reorder);
                let taken = reader.take(&self.reorder, &guard);
                match taken {
                    _ if stop => {
                        if let Next::Packet(_, packet) = taken {
                            drop(opened(&self.pool, packet));
                        }
                        self.reorder
                            .close(&guard, |packet| drop(opened(&self.pool, packet)));
                        return None;
                    }
                    Next::Packet(_, packet) if packet.config => return Some(packet),
                    Next::Packet(_, packet) => self.append(drained(&self.pool, packet)),
                    Next::Starved(_) => {}
                    Next::Closed => panic!("nobody else closes"),
                }
                self.turn.lend();
                lent = true;
            }
            self.doorbell.lie_down();
            let up = if self.flags.stop().is_some() {
                self.turn.claim()
            } else {
                self.is_due(lent, &guard)
            };
            drop(guard);
            if !up {
                lent = false;
                self.ring.sleep();
            }
            self.doorbell.get_up();
        }
    }

    fn is_due(&self, lent: bool, guard: &Guard) -> bool {
        match self.turn.look(&self.reorder, guard) {
            Look::Io => true,
            Look::Waiting => lent || self.enough < usize::MAX,
            Look::Free | Look::Held => false,
        }
    }

    fn stop(&self) {
        assert!(self.flags.quit());
        if self.doorbell.ring() {
            self.ring.wake();
        }
    }
}

fn push(file: *mut Vec<u8>, byte: u8) {
    // SAFETY: loom has checked the access.
    #[expect(unsafe_code, reason = "what loom's cell gives")]
    unsafe {
        (*file).push(byte);
    }
}

fn look(file: *const Vec<u8>) -> Vec<u8> {
    // SAFETY: loom has checked the access.
    #[expect(unsafe_code, reason = "what loom's cell gives")]
    unsafe {
        (*file).clone()
    }
}

/// Two channels, each with a packet, and a turn that is free. 2 threads, 2 buffers, 2 preemptions.
#[test]
fn two_channels_take_all_that_they_publish() {
    model(|| {
        let (device, [mine, theirs]) = device(2);
        device.turn.lend();
        let other = theirs.spawn({
            let device = Arc::clone(&device);
            move |me| device.bring(1, fresh(&device.pool, 1), me)
        });
        device.bring(0, fresh(&device.pool, 0), &mine);
        let ((), _theirs) = other.join().unwrap();
        assert_eq!(device.written(), [0, 1]);
        assert_eq!(device.pool.in_use().0, 0);
    });
}

/// The I/O thread, two channels, and the I/O thread again: each finds what the one before has written. Three
/// preemptions: one has to come between another's last look and its return, with its own fence behind it. 3
/// threads.
#[test]
fn a_turn_carries_what_was_written() {
    model_within(3, || {
        let turn = Arc::new(Turn::new());
        let file = Arc::new(UnsafeCell::new(Vec::with_capacity(4)));
        let channels = [false, true].map(|hands_over| {
            let (turn, file) = (Arc::clone(&turn), Arc::clone(&file));
            thread::spawn(move || {
                if turn.take() != Took::Turn {
                    return;
                }
                file.with_mut(|file| push(file, 1));
                if hands_over {
                    turn.hand_over();
                } else {
                    let _wanted = turn.give_back();
                }
            })
        });
        file.with_mut(|file| push(file, 0));
        turn.lend();
        if turn.claim() {
            file.with_mut(|file| push(file, 2));
        }
        channels.map(|channel| channel.join().unwrap());
        assert_eq!(file.with(look)[0], 0);
    });
}

/// A channel brings a packet while the I/O thread lends and lies down. 2 threads, 2 buffers, 2 preemptions.
#[test]
fn a_packet_comes_while_the_io_thread_lends() {
    model(|| {
        let (device, [io_thread, channel]) = device(2);
        let bringing = channel.spawn({
            let device = Arc::clone(&device);
            move |me| {
                device.bring(0, fresh(&device.pool, 7), me);
                let config = Packet {
                    config: true,
                    ..fresh(&device.pool, 9)
                };
                device.bring(1, config, me);
            }
        });
        let config = device.drive(&io_thread).unwrap();
        assert_eq!(drained(&device.pool, config), 9);
        let ((), _channel) = bringing.join().unwrap();
        assert_eq!(device.written(), [7]);
    });
}

/// The config comes on one channel, the data before it on another. 3 threads, 2 buffers, and one preemption: with two it
/// takes minutes.
#[test]
fn the_config_is_the_io_threads() {
    model_within(1, || {
        let (device, [io_thread, one, two]) = device(2);
        let channels = [(one, 0, false), (two, 1, true)].map(|(participant, index, config)| {
            let device = Arc::clone(&device);
            participant.spawn(move |me| {
                let packet = Packet {
                    config,
                    ..fresh(&device.pool, 3)
                };
                device.bring(index, packet, me);
            })
        });
        let config = device.drive(&io_thread).unwrap();
        assert_eq!(drained(&device.pool, config), 3);
        let _participants = channels.map(|channel| channel.join().unwrap());
        assert_eq!(device.written(), [3]);
    });
}

/// A channel writes one packet for others and no more; what it leaves is taken all the same. 3 threads, 3 buffers,
/// and one preemption, as above.
#[test]
fn a_holder_that_has_written_enough_rings() {
    model_within(1, || {
        let (mut device, [io_thread, one, two]) = device(3);
        Arc::get_mut(&mut device)
            .expect("nobody else has it")
            .enough = 1;
        let bring = |participant: Participant, packets: &'static [(u32, bool)]| {
            let device = Arc::clone(&device);
            participant.spawn(move |me| {
                for &(index, config) in packets {
                    let packet = Packet {
                        config,
                        ..fresh(&device.pool, 3)
                    };
                    device.bring(index, packet, me);
                }
            })
        };
        let channels = [bring(one, &[(0, false)]), bring(two, &[(1, true)])];
        let config = device.drive(&io_thread).unwrap();
        assert_eq!(drained(&device.pool, config), 3);
        let _participants = channels.map(|channel| channel.join().unwrap());
        assert_eq!(device.written(), [3]);
    });
}

/// A cancellation, an unplug or a clean-up comes from another thread while a channel brings a packet. 3 threads, 1
/// buffer, 2 preemptions.
#[test]
fn the_io_thread_gets_a_turn_that_it_wants() {
    model(|| {
        let (device, [io_thread, channel]) = device(1);
        let bringing = channel.spawn({
            let device = Arc::clone(&device);
            move |me| device.bring(0, fresh(&device.pool, 5), me)
        });
        let stopping = thread::spawn({
            let device = Arc::clone(&device);
            move || device.stop()
        });
        assert!(device.drive(&io_thread).is_none());
        stopping.join().unwrap();
        let ((), _channel) = bringing.join().unwrap();
        assert!(device.written().len() <= 1);
        assert_eq!(device.pool.in_use().0, 0);
    });
}

/// The I/O thread gives the data fd back at its end: no channel is at it then. 2 threads, 1 buffer, 2
/// preemptions.
#[test]
fn a_closing_finds_nobody_at_the_device() {
    model(|| {
        let (device, [io_thread, channel]) = device(1);
        let bringing = channel.spawn({
            let device = Arc::clone(&device);
            move |me| {
                device.bring(0, fresh(&device.pool, 5), me);
                device.stop();
            }
        });
        assert!(device.drive(&io_thread).is_none());
        // What is done to a data fd that has been given back.
        device.append(255);
        let ((), _channel) = bringing.join().unwrap();
        assert_eq!(device.pool.in_use().0, 0);
    });
}
