//! One device's packets: channels publish them in any order, and one thread at a time takes them in order: the I/O
//! thread, or a channel that has the [turn](crate::reorder::turn).
//!
//! ```text
//!   extent   highest idx seen │ the config packet's idx     checked before memory is spent
//!   next     what the device needs next                     written by whoever has the turn
//!   starved  what the I/O thread waits for, if it waits     written by the I/O thread alone
//!   awaited  the lowest idx whose turn a channel waits for  lowered by channels, reset by the I/O thread
//!   table    the slots
//! ```
//!
//! A channel reads a packet's header, calls [`ReorderBuffer::admit`], leases memory, receives the payload,
//! and calls [`ReorderBuffer::publish`]. The I/O thread owns the [`ReorderReader`], and takes `next` and
//! only `next`.
//!
//! With many devices the I/O thread misses some packet in nearly every round. It should wake channels only
//! if one of them has that packet. So a channel whose packet waits for its turn announces this with
//! [`ReorderBuffer::wait_for`], each time it looks. Several channels may wait: the I/O thread resets
//! `awaited`, notifies all, and those that still wait announce it again.
//!
//! # Edges
//!
//! | edge   | release side     | acquire side     | what it carries                           |
//! |--------|------------------|------------------|-------------------------------------------|
//! | extent | [`ReorderBuffer::admit`] | [`ReorderBuffer::admit`] | nothing but the word itself               |
//! | next   | [`ReorderReader::take`] | [`ReorderBuffer::next`]  | nothing: a guess that only ever lags      |
//!
//! `awaited` carries no data. Two fences order it against `next`. A channel whose entry was reset is
//! already counted in `Waiters`: `wait` fences before the channel lowers `awaited`, and `notify_all` fences
//! after the I/O thread resets it.

use std::fmt;

use crossbeam_epoch::{Collector, Guard};
use crossbeam_utils::CachePadded;

use crate::{
    error::Violation,
    reorder::{
        doorbell::Doorbell,
        slot::{Packet, Peek, Publish, Take},
        table::Table,
    },
    sync::atomic::{
        AtomicU64,
        Ordering::{Relaxed, SeqCst},
        fence,
    },
};

/// The highest idx and the config's, in one word: each is stored plus 1, 0 says none.
#[derive(Clone, Copy)]
struct Extent(u64);

impl Extent {
    fn new(highest: Option<u32>, config: Option<u32>) -> Self {
        let half = |index: Option<u32>| index.map_or(0, |index| u64::from(index) + 1);
        Self(half(highest) << 32 | half(config))
    }

    #[expect(clippy::cast_possible_truncation, reason = "the two halves")]
    fn decode(self) -> (Option<u32>, Option<u32>) {
        let index = |half: u64| (half as u32).checked_sub(1);
        (index(self.0 >> 32), index(self.0 & u64::from(u32::MAX)))
    }
}

/// What became of a [`ReorderReader::take`].
#[derive(Debug, Eq, PartialEq)]
#[must_use = "a taken packet's memory has no other owner"]
pub enum Next {
    /// The packet with this idx, or a piece of it.
    Packet(u32, Packet),
    /// The packet with this idx has not arrived.
    Starved(u32),
    /// The reorder buffer was closed.
    Closed,
}

/// One device's packets on their way from the channels to the I/O thread.
pub struct ReorderBuffer {
    table: Table,
    extent: CachePadded<AtomicU64>,
    next: CachePadded<AtomicU64>,
    starved: CachePadded<AtomicU64>,
    /// The lowest idx that a channel waits for, or one below.
    awaited: CachePadded<AtomicU64>,
    window: u32,
}

/// No idx.
const NONE: u64 = u64::MAX;

impl ReorderBuffer {
    /// Returns an empty reorder buffer that holds packets less than `window` idx ahead of `next`.
    #[must_use]
    pub fn new(collector: Collector, window: u32) -> Self {
        assert!(window > 0, "the next packet is always inside the window");
        Self {
            table: Table::new(collector),
            extent: CachePadded::new(AtomicU64::new(Extent::new(None, None).0)),
            next: CachePadded::new(AtomicU64::new(0)),
            starved: CachePadded::new(AtomicU64::new(NONE)),
            awaited: CachePadded::new(AtomicU64::new(NONE)),
            window,
        }
    }

    /// Checks a packet's idx against all that came before, and remembers it. Before anything is
    /// leased for it.
    ///
    /// # Errors
    ///
    /// The rule that it breaks.
    pub fn admit(&self, index: u32, config: bool) -> Result<(), Violation> {
        if index == u32::MAX {
            return Err(Violation::InvalidIndex);
        }
        // Relaxed, here and below: the word is all there is, and the exchange confirms it.
        let mut seen = self.extent.load(Relaxed);
        loop {
            let (highest, known) = Extent(seen).decode();
            match known {
                Some(first) if config => return Err(Violation::SecondConfig { first }),
                Some(last) if index == last => return Err(Violation::DuplicateIndex),
                Some(last) if index > last => {
                    return Err(Violation::IndexAboveConfig { config: last });
                }
                _ => {}
            }
            if config && let Some(highest) = highest {
                if highest > index {
                    return Err(Violation::ConfigBelowIndex { highest });
                }
                if highest == index {
                    return Err(Violation::DuplicateIndex);
                }
            }
            if u64::from(index) < self.next.load(Relaxed) {
                return Err(Violation::IndexAlreadyWritten);
            }
            let grown = Extent::new(
                highest.max(Some(index)),
                if config { Some(index) } else { known },
            );
            if grown.0 == seen {
                return Ok(());
            }
            match self
                .extent
                .compare_exchange_weak(seen, grown.0, Relaxed, Relaxed)
            {
                Ok(_) => return Ok(()),
                Err(actual) => seen = actual,
            }
        }
    }

    /// The idx that the device needs next, or a while ago.
    #[must_use]
    pub fn next(&self) -> u32 {
        // Relaxed: it only grows, and whoever acts on it is told by the slot when it is late.
        u32::try_from(self.next.load(Relaxed)).unwrap_or(u32::MAX)
    }

    /// The config packet's idx, once it is known: how many data packets there are.
    #[must_use]
    pub fn config_index(&self) -> Option<u32> {
        // Relaxed: set once.
        Extent(self.extent.load(Relaxed)).decode().1
    }

    /// Whether `index` is near enough to `next` to be held.
    #[must_use]
    pub fn in_window(&self, index: u32) -> bool {
        u64::from(index) < u64::from(self.next()) + u64::from(self.window)
    }

    /// A channel waits until `index` is next, or its piece before has been taken. To be called at the
    /// beginning of each look of a [`wait`](crate::reorder::waiters::Waiters::wait): the I/O thread takes it
    /// back when it notifies.
    pub fn wait_for(&self, index: u32) {
        // Relaxed: ordered by the fence, and by that of `Waiters::wait`.
        self.awaited.fetch_min(index.into(), Relaxed);
        // Partner: the fence of `ReorderReader::is_awaited`. One of the two comes first: either the look behind
        // this sees what is next, or the I/O thread sees that it is awaited.
        fence(SeqCst);
    }

    /// Publishes an admitted packet, or its first piece. Any thread.
    ///
    /// # Errors
    ///
    /// Gives the packet back with why.
    pub fn publish(&self, index: u32, packet: Packet, guard: &Guard) -> Publish {
        match self.table.slot_or_link(index, guard) {
            Ok(Some(slot)) => slot.publish(packet),
            Ok(None) => Publish::Closed(packet),
            Err(_below) => Publish::Duplicate(packet),
        }
    }

    /// Publishes the next piece of a packet. Only the publisher of its first.
    pub fn publish_rest(&self, index: u32, packet: Packet, guard: &Guard) -> Publish {
        match self.table.slot_or_link(index, guard) {
            Ok(Some(slot)) => slot.publish_rest(packet),
            Ok(None) => Publish::Closed(packet),
            Err(_below) => Publish::Duplicate(packet),
        }
    }

    /// Whether the caller, who has published `index`, must wake the I/O thread's ring.
    #[must_use = "a driver that is not woken sleeps on"]
    pub fn ring(&self, index: u32, doorbell: &Doorbell) -> bool {
        // Relaxed: behind the bell's fence.
        doorbell.ring_if(|| self.starved.load(Relaxed) == u64::from(index))
    }

    /// Refuses every packet from now on, and hands those that nobody took to `abandon`.
    pub fn close(&self, guard: &Guard, abandon: impl FnMut(Packet)) {
        self.table.close(guard, abandon);
    }
}

impl fmt::Debug for ReorderBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReorderBuffer")
            .field("next", &self.next())
            .field("config_index", &self.config_index())
            .finish_non_exhaustive()
    }
}

/// The taker's side of a [`ReorderBuffer`]: there is one at a time.
#[derive(Debug, Default)]
pub struct ReorderReader {
    next: u32,
    starved: bool,
}

impl ReorderReader {
    /// Returns the reader of a fresh reorder buffer.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            next: 0,
            starved: false,
        }
    }

    /// Returns the reader of one that another reader has read: of whoever has just taken the [turn].
    ///
    /// [turn]: crate::reorder::turn::Turn
    #[must_use]
    pub fn resume(reorder: &ReorderBuffer) -> Self {
        Self {
            next: reorder.next(),
            starved: false,
        }
    }

    /// Says that the I/O thread does not wait for its next packet itself: it lends the turn.
    pub fn rest(&mut self, reorder: &ReorderBuffer) {
        if self.starved {
            self.starved = false;
            // Relaxed: at worst a publisher wakes us for nothing.
            reorder.starved.store(NONE, Relaxed);
        }
    }

    /// What is here of what is next, in one look.
    #[must_use]
    pub fn peek(&self, reorder: &ReorderBuffer, guard: &Guard) -> Option<Peek> {
        match reorder.table.slot(self.next, guard) {
            Some(slot) => slot.peek(),
            None => reorder.table.is_closed(guard).then_some(Peek::Other),
        }
    }

    /// The idx that is needed next.
    #[must_use]
    pub const fn next(&self) -> u32 {
        self.next
    }

    /// Takes the next packet, or its next piece; with the last piece goes on to the next idx.
    pub fn take(&mut self, reorder: &ReorderBuffer, guard: &Guard) -> Next {
        let index = self.next;
        let taken = match reorder.table.slot(index, guard) {
            Some(slot) => slot.take(),
            None if reorder.table.is_closed(guard) => Take::Closed,
            None => Take::Empty,
        };
        match taken {
            Take::Empty => Next::Starved(index),
            Take::Closed => Next::Closed,
            Take::Taken(packet) => {
                if self.starved {
                    self.starved = false;
                    // Relaxed: at worst a publisher of this idx's next piece wakes us too early.
                    reorder.starved.store(NONE, Relaxed);
                }
                if !packet.more {
                    reorder.table.finish(index, guard);
                    self.next += 1;
                    // Relaxed: it only grows; see `ReorderBuffer::next`.
                    reorder.next.store(self.next.into(), Relaxed);
                }
                Next::Packet(index, packet)
            }
        }
    }

    /// Whether a channel waits for the idx that is next, or for one before. If so, all who wait must be
    /// notified afterwards: they say again what they wait for.
    #[must_use = "a channel that is not notified sleeps on"]
    pub fn is_awaited(&self, reorder: &ReorderBuffer) -> bool {
        // Partner: the fence of `ReorderBuffer::wait_for`.
        fence(SeqCst);
        // Relaxed: after the fence.
        if reorder.awaited.load(Relaxed) > u64::from(self.next) {
            return false;
        }
        // Relaxed: whoever lowered it since is notified with the others.
        reorder.awaited.store(NONE, Relaxed);
        true
    }

    /// Stores what the I/O thread waits for. Call this before [`Doorbell::lie_down`].
    pub fn starve(&mut self, reorder: &ReorderBuffer) {
        if !self.starved {
            self.starved = true;
            // Relaxed: ordered by the bell's fence.
            reorder.starved.store(self.next.into(), Relaxed);
        }
    }

    /// Whether there is something to take after all, be it the closing. After
    /// [`Doorbell::lie_down`].
    #[must_use]
    pub fn is_ready(&self, reorder: &ReorderBuffer, guard: &Guard) -> bool {
        match reorder.table.slot(self.next, guard) {
            Some(slot) => slot.is_ready(),
            // A closed table never puts the segment in place: there is no slot that could say so.
            None => reorder.table.is_closed(guard),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::reorder::slot::Payload;

    fn packet(config: bool, more: bool) -> Packet {
        Packet {
            payload: Payload::Empty,
            config,
            more,
        }
    }

    fn reorder() -> (ReorderBuffer, crossbeam_epoch::LocalHandle) {
        let collector = Collector::new();
        let handle = collector.register();
        (ReorderBuffer::new(collector, 100), handle)
    }

    #[test]
    fn an_idx_is_checked_against_all_that_came_before() {
        let (reorder, _handle) = reorder();
        assert_eq!(reorder.admit(u32::MAX, false), Err(Violation::InvalidIndex));
        assert_eq!(reorder.admit(5, false), Ok(()));
        assert_eq!(reorder.admit(2, false), Ok(()));
        assert_eq!(
            reorder.admit(4, true),
            Err(Violation::ConfigBelowIndex { highest: 5 })
        );
        assert_eq!(reorder.admit(5, true), Err(Violation::DuplicateIndex));
        assert_eq!(reorder.admit(7, true), Ok(()));
        assert_eq!(reorder.config_index(), Some(7));
        assert_eq!(
            reorder.admit(8, false),
            Err(Violation::IndexAboveConfig { config: 7 })
        );
        assert_eq!(reorder.admit(7, false), Err(Violation::DuplicateIndex));
        for index in [6, 7, 8] {
            assert_eq!(
                reorder.admit(index, true),
                Err(Violation::SecondConfig { first: 7 })
            );
        }
        assert_eq!(reorder.admit(6, false), Ok(()));
    }

    #[test]
    fn packets_come_out_in_order_and_not_again() {
        let (reorder, handle) = reorder();
        let guard = handle.pin();
        let mut reader = ReorderReader::new();
        for index in [2, 0, 3] {
            assert_eq!(reorder.admit(index, index == 3), Ok(()));
            let published = reorder.publish(index, packet(index == 3, false), &guard);
            assert_eq!(published, Publish::Published);
        }
        assert_eq!(
            reader.take(&reorder, &guard),
            Next::Packet(0, packet(false, false))
        );
        assert_eq!(reader.take(&reorder, &guard), Next::Starved(1));
        assert_eq!(reorder.admit(0, false), Err(Violation::IndexAlreadyWritten));
        assert!(!reader.is_ready(&reorder, &guard));
        let published = reorder.publish(1, packet(false, false), &guard);
        assert_eq!(published, Publish::Published);
        assert!(reader.is_ready(&reorder, &guard));
        for index in 1..=3 {
            let next = reader.take(&reorder, &guard);
            assert_eq!(next, Next::Packet(index, packet(index == 3, false)));
        }
        assert_eq!(reader.take(&reorder, &guard), Next::Starved(4));
    }

    #[test]
    fn the_idx_stays_until_a_packets_last_piece() {
        let (reorder, handle) = reorder();
        let guard = handle.pin();
        let mut reader = ReorderReader::new();
        assert_eq!(
            reorder.publish(0, packet(false, true), &guard),
            Publish::Published
        );
        assert_eq!(
            reader.take(&reorder, &guard),
            Next::Packet(0, packet(false, true))
        );
        assert_eq!(reorder.next(), 0);
        assert_eq!(reader.take(&reorder, &guard), Next::Starved(0));
        let rest = reorder.publish_rest(0, packet(false, false), &guard);
        assert_eq!(rest, Publish::Published);
        assert_eq!(
            reader.take(&reorder, &guard),
            Next::Packet(0, packet(false, false))
        );
        assert_eq!(reorder.next(), 1);
    }

    #[test]
    fn the_bell_rings_for_the_awaited_idx_alone() {
        let (reorder, _handle) = reorder();
        let doorbell = Doorbell::new();
        let mut reader = ReorderReader::new();
        assert!(!reorder.ring(0, &doorbell), "the driver is awake");
        reader.starve(&reorder);
        doorbell.lie_down();
        assert!(!reorder.ring(1, &doorbell));
        assert!(reorder.ring(0, &doorbell));
        assert!(!reorder.ring(0, &doorbell), "one wake for one sleep");
    }

    #[test]
    fn a_closed_buffer_ends_the_reader() {
        let (reorder, handle) = reorder();
        let guard = handle.pin();
        reorder.close(&guard, |_| {});
        let mut reader = ReorderReader::new();
        assert_eq!(reader.take(&reorder, &guard), Next::Closed);
        reader.next = 5000;
        assert_eq!(reader.take(&reorder, &guard), Next::Closed);
    }
}
