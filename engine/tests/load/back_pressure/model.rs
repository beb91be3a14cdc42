//! A destination as a graph of states: what each of its threads may do next, and nothing else.
//!
//! ```text
//!   source                        destination
//!   ──────                        ───────────
//!   hand(device, channel) ──▶ [queue] ─▶ pop ─▶ ask ─▶ publish ─▶ [slot] ─▶ take ─▶ complete
//!   sync(channel)         ──▶ [queue] ─▶ pop ─▶ pass, when all channels have come to it
//!   start ─────────────────────────────────────────────────────────▶ take is allowed
//! ```
//!
//! Each arrow is one step, and any step that is enabled may be the next: so a search through the
//! graph goes through all orders in which a source can hand out its packets, all channels that it
//! can give each to, and all schedules of the receivers and devices. Where a packet's memory may
//! come from is not said again here: [`MemoryPolicy::grant`] of the engine is asked.
//!
//! A packet, or a piece of a large one, is as large as a buffer and as a reserve. Every step takes
//! something away from what is to be done, so a graph has no cycles, and a state without a next step
//! is an end or a deadlock.

use std::collections::HashSet;

use vfio_migration::internals::{
    memory_policy::{MemoryPolicy, MemoryRequest},
    pool::{ALIGN, PoolLayout},
};

pub const DEVICES: usize = 3;
pub const CHANNELS: usize = 3;
/// The most that a device has.
pub const PACKETS: u8 = 5;
/// The most that a connection holds: all packets, and the SYNCs.
pub const QUEUE: usize = 8;

/// When the source says that the switchover starts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Start {
    /// Without waiting for anything.
    AnyTime,
    /// When the destination is through its barriers.
    AfterBarriers,
}

/// One case to search through.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// By device. 0 for one that is not there.
    pub packets: [u8; DEVICES],
    pub channels: usize,
    /// Of the pool.
    pub buffers: u32,
    /// Of each packet.
    pub pieces: u8,
    /// How many packets a connection holds before its sender waits.
    pub link: usize,
    /// SYNCs on each channel.
    pub barriers: u8,
    pub start: Start,
    /// How many packets may be spilled, where they may be at all.
    pub spill: Option<u8>,
    /// Whether a device has its reserve.
    pub reserve: bool,
}

/// What a search found.
#[derive(Debug, Default)]
pub struct Found {
    pub states: usize,
    pub ends: usize,
    /// A deadlock, in words.
    pub deadlock: Option<String>,
}

/// Where a packet's bytes are.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Memory {
    Buffer,
    Reserve,
    Spilled,
    /// What a device's driver reads spilled packets back into, where the pool is empty.
    ReadBack,
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Item {
    Packet { device: u8, index: u8 },
    Sync,
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Hand {
    Free,
    /// It has a packet's header; so many pieces are published.
    Asks(u8, u8, u8),
    /// It has memory for the next piece, or for all of it.
    Has(u8, u8, u8, Memory),
    AtBarrier,
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Channel {
    queue: [Option<Item>; QUEUE],
    syncs_sent: u8,
    syncs_passed: u8,
    hand: Hand,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Slot {
    Empty,
    Ready(Memory, bool),
    /// A piece was taken, and another follows.
    Drained,
    Taken,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Device {
    handed: u8,
    next: u8,
    slots: [Slot; PACKETS as usize],
    /// What is on its way into the device.
    writes: Option<Memory>,
    reserve_out: bool,
}

#[derive(Clone, Debug, Eq, PartialEq)]
struct State {
    started: bool,
    channels: [Channel; CHANNELS],
    devices: [Device; DEVICES],
    buffers_out: u8,
    spilled: u8,
}

/// Tells the search of one step that can be made.
type Step<'a> = &'a mut dyn FnMut(&dyn Fn(&mut State));

impl Channel {
    fn len(&self) -> usize {
        self.queue.iter().flatten().count()
    }

    fn push(&mut self, item: Item) {
        let len = self.len();
        self.queue[len] = Some(item);
    }

    fn pop(&mut self) -> Option<Item> {
        let first = self.queue[0].take();
        self.queue.rotate_left(1);
        first
    }

    /// How many barriers it has come to.
    fn reached(&self) -> u8 {
        self.syncs_passed + u8::from(self.hand == Hand::AtBarrier)
    }
}

impl State {
    fn new() -> Self {
        let channel = Channel {
            queue: [None; QUEUE],
            syncs_sent: 0,
            syncs_passed: 0,
            hand: Hand::Free,
        };
        let device = Device {
            handed: 0,
            next: 0,
            slots: [Slot::Empty; PACKETS as usize],
            writes: None,
            reserve_out: false,
        };
        Self {
            started: false,
            channels: [channel; CHANNELS],
            devices: [device; DEVICES],
            buffers_out: 0,
            spilled: 0,
        }
    }

    fn free(&mut self, device: usize, memory: Memory) {
        match memory {
            Memory::Buffer => self.buffers_out -= 1,
            Memory::Reserve => self.devices[device].reserve_out = false,
            Memory::Spilled => self.spilled -= 1,
            Memory::ReadBack => {}
        }
    }

    /// The state in as many bytes as it needs: for the set of those that have been seen.
    fn packed(&self) -> [u8; 72] {
        let mut bytes = [0; 72];
        let mut at = 0;
        let mut put = |byte| {
            bytes[at] = byte;
            at += 1;
        };
        put(u8::from(self.started));
        put(self.buffers_out);
        put(self.spilled);
        for channel in &self.channels {
            for item in &channel.queue {
                put(match *item {
                    None => 0,
                    Some(Item::Packet { device, index }) => 1 + (device << 4 | index),
                    Some(Item::Sync) => 0xff,
                });
            }
            put(channel.syncs_sent << 4 | channel.syncs_passed);
            let (kind, device, index, done) = match channel.hand {
                Hand::Free => (0, 0, 0, 0),
                Hand::AtBarrier => (1, 0, 0, 0),
                Hand::Asks(device, index, done) => (2, device, index, done),
                Hand::Has(device, index, done, memory) => (3 + memory as u8, device, index, done),
            };
            put(kind << 4 | done);
            put(device << 4 | index);
        }
        for device in &self.devices {
            put(device.handed << 4 | device.next);
            for slot in &device.slots {
                put(match *slot {
                    Slot::Empty => 0,
                    Slot::Drained => 1,
                    Slot::Taken => 2,
                    Slot::Ready(memory, more) => 4 + (memory as u8) * 2 + u8::from(more),
                });
            }
            let writes = device.writes.map_or(0, |memory| 1 + memory as u8);
            put(writes << 1 | u8::from(device.reserve_out));
        }
        bytes
    }

    /// Channels are alike: of the states that differ only by their order one is enough.
    fn in_order(mut self, case: &Case) -> Self {
        self.channels[..case.channels].sort_unstable();
        self
    }
}

impl Case {
    fn layout(&self) -> PoolLayout {
        PoolLayout {
            buffers: self.buffers,
            buffer_len: ALIGN,
            reserves: 2 * u32::try_from(DEVICES).unwrap(),
            reserve_len: ALIGN,
        }
    }

    fn is_finished(&self, state: &State) -> bool {
        let devices = state.devices.iter().zip(self.packets);
        let channels = &state.channels[..self.channels];
        state.started
            && devices.into_iter().all(|(device, packets)| {
                device.next == packets && device.handed == packets && device.writes.is_none()
            })
            && channels.iter().all(|channel| {
                channel.hand == Hand::Free
                    && channel.len() == 0
                    && channel.syncs_passed == self.barriers
            })
    }

    /// Calls `visit` with every state that one step leads to.
    fn each_next(&self, policy: &MemoryPolicy, state: &State, mut visit: impl FnMut(State)) {
        let mut step = |change: &dyn Fn(&mut State)| {
            let mut next = state.clone();
            change(&mut next);
            visit(next);
        };
        let channels = &state.channels[..self.channels];
        let through = channels.iter().all(|c| c.syncs_passed == self.barriers);
        if !state.started && (self.start == Start::AnyTime || through) {
            step(&|next| next.started = true);
        }
        for (at, channel) in channels.iter().enumerate() {
            if channel.len() < self.link {
                for (number, device) in state.devices.iter().enumerate() {
                    if device.handed < self.packets[number] {
                        step(&|next| {
                            next.devices[number].handed += 1;
                            next.channels[at].push(Item::Packet {
                                device: u8::try_from(number).unwrap(),
                                index: device.handed,
                            });
                        });
                    }
                }
                // A source has sent a SYNC on all channels before it sends the next on one.
                let sent = channel.syncs_sent;
                if sent < self.barriers && channels.iter().all(|c| c.syncs_sent >= sent) {
                    step(&|next| {
                        next.channels[at].syncs_sent += 1;
                        next.channels[at].push(Item::Sync);
                    });
                }
            }
            self.receive(policy, state, at, &mut step);
        }
        for number in 0..DEVICES {
            self.drive(state, number, &mut step);
        }
    }

    /// What a channel's thread can do.
    fn receive(&self, policy: &MemoryPolicy, state: &State, at: usize, step: Step<'_>) {
        let channel = &state.channels[at];
        match channel.hand {
            Hand::Free if channel.len() > 0 => step(&|next| {
                let channel = &mut next.channels[at];
                channel.hand = match channel.pop() {
                    Some(Item::Packet { device, index }) => Hand::Asks(device, index, 0),
                    _ => Hand::AtBarrier,
                };
            }),
            Hand::Free => {}
            Hand::AtBarrier => {
                let channels = &state.channels[..self.channels];
                if channels.iter().all(|c| c.reached() > channel.syncs_passed) {
                    step(&|next| {
                        next.channels[at].syncs_passed += 1;
                        next.channels[at].hand = Hand::Free;
                    });
                }
            }
            Hand::Asks(device, index, done) => {
                let number = usize::from(device);
                if let Some(memory) = self.ask(policy, state, number, index, done) {
                    step(&|next| {
                        match memory {
                            Memory::Buffer => next.buffers_out += 1,
                            Memory::Reserve => next.devices[number].reserve_out = true,
                            Memory::Spilled => next.spilled += 1,
                            Memory::ReadBack => unreachable!("no channel has that"),
                        }
                        next.channels[at].hand = Hand::Has(device, index, done, memory);
                    });
                }
            }
            Hand::Has(device, index, done, memory) => {
                let slot = state.devices[usize::from(device)].slots[usize::from(index)];
                // A further piece waits for the one before it to be taken.
                if slot == Slot::Empty || slot == Slot::Drained {
                    step(&|next| {
                        let more = memory != Memory::Spilled && done + 1 < self.pieces;
                        let slots = &mut next.devices[usize::from(device)].slots;
                        slots[usize::from(index)] = Slot::Ready(memory, more);
                        next.channels[at].hand = if more {
                            Hand::Asks(device, index, done + 1)
                        } else {
                            Hand::Free
                        };
                    });
                }
            }
        }
    }

    /// Which memory the engine's rule gives to a packet, or to its next piece, now.
    fn ask(
        &self,
        policy: &MemoryPolicy,
        state: &State,
        number: usize,
        index: u8,
        done: u8,
    ) -> Option<Memory> {
        let device = &state.devices[number];
        let grant = policy.grant(MemoryRequest {
            len: usize::from(self.pieces - done) * ALIGN,
            first: done == 0,
            next: device.next == index,
            in_window: true,
            started: state.started,
            within_read_ahead: false,
            spills: self.spill.is_some(),
        });
        let out = u32::from(state.buffers_out);
        if grant.buffer.is_some_and(|limit| out < limit) && out < self.buffers {
            Some(Memory::Buffer)
        } else if grant.reserve && self.reserve && !device.reserve_out {
            Some(Memory::Reserve)
        } else if grant.spill && self.spill.is_some_and(|limit| state.spilled < limit) {
            Some(Memory::Spilled)
        } else {
            None
        }
    }

    /// What the I/O thread can do for one device.
    fn drive(&self, state: &State, number: usize, step: Step<'_>) {
        let device = &state.devices[number];
        if let Some(memory) = device.writes {
            step(&|next| {
                next.devices[number].writes = None;
                next.free(number, memory);
            });
        } else if state.started
            && device.next < self.packets[number]
            && let Slot::Ready(memory, more) = device.slots[usize::from(device.next)]
        {
            step(&|next| {
                let memory = if memory == Memory::Spilled {
                    next.free(number, memory);
                    if u32::from(next.buffers_out) < self.buffers {
                        next.buffers_out += 1;
                        Memory::Buffer
                    } else {
                        Memory::ReadBack
                    }
                } else {
                    memory
                };
                let device = &mut next.devices[number];
                device.writes = Some(memory);
                let at = usize::from(device.next);
                if more {
                    device.slots[at] = Slot::Drained;
                } else {
                    device.slots[at] = Slot::Taken;
                    device.next += 1;
                }
            });
        }
    }

    /// Searches through all states, to the first deadlock.
    pub fn search(&self) -> Found {
        let policy = MemoryPolicy::new(self.layout());
        let first = State::new();
        let mut found = Found::default();
        let mut seen = HashSet::from([first.packed()]);
        let mut left = vec![first];
        while let Some(state) = left.pop() {
            found.states += 1;
            let mut steps = 0;
            self.each_next(&policy, &state, |next| {
                steps += 1;
                let next = next.in_order(self);
                if seen.insert(next.packed()) {
                    left.push(next);
                }
            });
            if steps == 0 && self.is_finished(&state) {
                found.ends += 1;
            } else if steps == 0 {
                found.deadlock = Some(self.describe(&state));
                break;
            }
        }
        found
    }

    fn describe(&self, state: &State) -> String {
        let mut text = format!("{self:?}\n{} buffers out\n", state.buffers_out);
        for channel in &state.channels[..self.channels] {
            let queue: Vec<_> = channel.queue.iter().flatten().collect();
            text += &format!("channel: {:?}, then {queue:?}\n", channel.hand);
        }
        for (number, device) in state.devices.iter().enumerate() {
            text += &format!("device {number}: needs {}\n", device.next);
        }
        text
    }
}
