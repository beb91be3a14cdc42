//! All devices' packets on their way out: the I/O thread publishes them in one order, and each is taken by
//! the first free channel.
//!
//! ```text
//!   I/O thread ──publish──▶ [ 0 ][ 1 ][ 2 ][ 3 ] …      one sequence for all devices
//!                         │    │    │
//!                    ticket = compare-exchange on `head`: each packet has one taker
//!                         ▼    ▼    ▼
//!                     channel channel channel
//! ```
//!
//! The one order matters. The destination's backpressure cannot deadlock because every channel is FIFO and
//! the packets of all devices were handed out in one sequence.
//!
//! A channel claims the head only when the head's packet is there. So a channel with a slow connection
//! never holds up a packet that another channel could send.
//!
//! # Edges
//!
//! | edge   | release side       | acquire side          | what it carries                     |
//! |--------|--------------------|-----------------------|-------------------------------------|
//! | ticket | [`SendQueue::take`]    | [`SendQueue::take`]       | nothing: the slot has its own edge  |
//! | end    | [`SendQueue::end`]     | [`SendQueue::take`]       | the length, and the I/O thread's doings |

use std::{fmt, time::Instant};

use crossbeam_epoch::{Collector, Guard};
use crossbeam_utils::CachePadded;

use crate::{
    reorder::{
        slot::{Packet, Publish, Take},
        table::Table,
        waiters::Waiters,
    },
    sync::atomic::{
        AtomicU32, AtomicU64,
        Ordering::{Acquire, Relaxed, Release},
    },
};

/// No end yet.
const OPEN: u64 = u64::MAX;

/// The sequence of a save's packets.
pub struct SendQueue {
    table: Table,
    head: CachePadded<AtomicU32>,
    tail: CachePadded<AtomicU32>,
    end: AtomicU64,
    waiters: Waiters,
}

/// What a channel got.
#[derive(Debug, Eq, PartialEq)]
#[must_use = "a taken packet's memory has no other owner"]
pub enum Taken {
    /// This packet is the caller's to send.
    Packet(Packet),
    /// Every packet of the sequence has a taker, and there will be no more.
    End,
    /// The save was abandoned.
    Closed,
}

impl SendQueue {
    /// Returns an empty, open sequence.
    #[must_use]
    pub fn new(collector: Collector) -> Self {
        Self {
            table: Table::new(collector),
            head: CachePadded::new(AtomicU32::new(0)),
            tail: CachePadded::new(AtomicU32::new(0)),
            end: AtomicU64::new(OPEN),
            waiters: Waiters::new(),
        }
    }

    /// Appends a packet. The I/O thread alone calls this.
    ///
    /// # Errors
    ///
    /// Gives the packet back where the queue is closed, or 2^32 - 1 packets are through it.
    pub fn publish(&self, packet: Packet, guard: &Guard) -> Result<(), Packet> {
        // Relaxed: the I/O thread is the only writer.
        let ticket = self.tail.load(Relaxed);
        if ticket == u32::MAX {
            return Err(packet);
        }
        let slot = match self.table.slot_or_link(ticket, guard) {
            Ok(Some(slot)) => slot,
            Ok(None) => return Err(packet),
            Err(_below) => unreachable!("nobody takes what was not published"),
        };
        match slot.publish(packet) {
            Publish::Published => {
                // Relaxed: a counter for the statistics; takers look at the slot.
                self.tail.store(ticket + 1, Relaxed);
                self.waiters.notify_one();
                Ok(())
            }
            Publish::Closed(packet) | Publish::Duplicate(packet) | Publish::Full(packet) => {
                Err(packet)
            }
        }
    }

    /// Marks the sequence as complete.
    pub fn end(&self) {
        // end edge, release side. Relaxed load: ours.
        self.end.store(self.tail.load(Relaxed).into(), Release);
        self.waiters.notify_all();
    }

    /// Abandons the sequence, and hands every packet that has no taker to `abandon`.
    pub fn close(&self, guard: &Guard, abandon: impl FnMut(Packet)) {
        self.table.close(guard, abandon);
        self.waiters.notify_all();
    }

    /// Takes the packet at the head, if it is there.
    pub fn try_take(&self, guard: &Guard) -> Option<Taken> {
        loop {
            // Relaxed: a guess, confirmed by the exchange below.
            let ticket = self.head.load(Relaxed);
            let Some(slot) = self.table.slot(ticket, guard) else {
                // Gone behind another taker, not there yet, or never to be there.
                if self.is_head(ticket) {
                    return self.why_empty(ticket, guard);
                }
                continue;
            };
            if !slot.is_ready() {
                if self.is_head(ticket) {
                    return self.why_empty(ticket, guard);
                }
                continue;
            }
            // ticket edge. Relaxed: whoever wins has the slot to itself, and the slot's own edge
            // carries the bytes.
            if self
                .head
                .compare_exchange(ticket, ticket + 1, Relaxed, Relaxed)
                .is_err()
            {
                continue;
            }
            return Some(match slot.take() {
                Take::Taken(packet) => {
                    self.table.finish(ticket, guard);
                    Taken::Packet(packet)
                }
                Take::Closed => Taken::Closed,
                Take::Empty => unreachable!("a slot that was ready does not become empty"),
            });
        }
    }

    /// Whether `ticket` is the head after all, and not what the head was before another taker.
    ///
    /// Asked by an exchange, which finds the newest head: a load may find an old one, however late
    /// it comes, and a taker that believes it goes to sleep on a packet that has been there for as
    /// long as nobody announces another.
    fn is_head(&self, ticket: u32) -> bool {
        // ticket edge. Relaxed: the word is all there is. The other taker writes the slot only after its
        // exchange on `head` succeeded. To see the slot's new value with the old head, a store would have
        // to become visible before the branch it depends on.
        self.head
            .compare_exchange(ticket, ticket, Relaxed, Relaxed)
            .is_ok()
    }

    fn why_empty(&self, ticket: u32, guard: &Guard) -> Option<Taken> {
        // end edge, acquire side.
        if self.end.load(Acquire) == u64::from(ticket) {
            Some(Taken::End)
        } else if self.table.is_closed(guard) {
            Some(Taken::Closed)
        } else {
            None
        }
    }

    /// Takes the packet at the head, waiting for it. Ends with a packet, the end, or the closing;
    /// `None` where `deadline` came first.
    pub fn take(&self, deadline: Option<Instant>, pin: impl Fn() -> Guard) -> Option<Taken> {
        self.waiters.wait(deadline, || self.try_take(&pin()))
    }

    /// How many packets wait for a channel.
    #[must_use]
    pub fn waiting(&self) -> u32 {
        // Relaxed: counters. The head first: it never overtakes a tail read later.
        let head = self.head.load(Relaxed);
        self.tail.load(Relaxed).saturating_sub(head)
    }

    /// How often the net found a packet that had not been announced. Must stay 0.
    #[must_use]
    pub fn late(&self) -> u64 {
        self.waiters.late()
    }
}

impl fmt::Debug for SendQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendQueue")
            .field("waiting", &self.waiting())
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::{collections::BTreeSet, thread};

    use super::*;
    use crate::reorder::{slot::Payload, table::SEGMENT};

    fn aside(number: u64) -> Packet {
        Packet {
            payload: Payload::External(number),
            config: false,
            more: false,
        }
    }

    #[test]
    fn every_packet_has_one_taker_and_every_taker_an_end() {
        let collector = Collector::new();
        let queue = SendQueue::new(collector.clone());
        let count = u64::from(SEGMENT) * 5 + 7;
        let taken: Vec<Vec<u64>> = thread::scope(|scope| {
            let channels: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| {
                        let handle = collector.register();
                        let mut taken = Vec::new();
                        while let Some(Taken::Packet(packet)) = queue.take(None, || handle.pin()) {
                            let Payload::External(number) = packet.payload else {
                                panic!("not what was published");
                            };
                            taken.push(number);
                        }
                        taken
                    })
                })
                .collect();
            let handle = collector.register();
            for number in 0..count {
                queue.publish(aside(number), &handle.pin()).unwrap();
            }
            queue.end();
            channels
                .into_iter()
                .map(|channel| channel.join().unwrap())
                .collect()
        });
        for channel in &taken {
            assert!(channel.is_sorted(), "within a channel the order holds");
        }
        let all: BTreeSet<_> = taken.iter().flatten().copied().collect();
        assert_eq!(all.len() as u64, count);
        assert_eq!(taken.iter().map(Vec::len).sum::<usize>() as u64, count);
        assert_eq!(queue.late(), 0);
    }

    #[test]
    fn a_closed_queue_ends_its_takers_and_returns_the_rest() {
        let collector = Collector::new();
        let handle = collector.register();
        let queue = SendQueue::new(collector);
        let guard = handle.pin();
        queue.publish(aside(1), &guard).unwrap();
        queue.publish(aside(2), &guard).unwrap();
        assert_eq!(queue.try_take(&guard), Some(Taken::Packet(aside(1))));
        let mut rest = Vec::new();
        queue.close(&guard, |packet| rest.push(packet));
        assert_eq!(rest, [aside(2)]);
        assert_eq!(queue.try_take(&guard), Some(Taken::Closed));
        assert_eq!(queue.publish(aside(3), &guard), Err(aside(3)));
    }
}
