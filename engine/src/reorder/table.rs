//! A stream's slots by index: segments are made on demand, and freed behind the takers.
//!
//! ```text
//!   head ──▶ [ 0 … 1023 ] ──▶ [ 1024 … 2047 ] ──▶ [ 2048 … 3071 ] ──▶ null, or CLOSED
//!              all taken:        being taken          put in place by the first
//!              unlinked, and                          publisher that needed it
//!              freed when no
//!              thread can be
//!              looking at it
//! ```
//!
//! The index space is 32 bits wide; the memory is not. A publisher walks from the head to its segment and
//! makes the missing segments. The thread that takes the last packet of the first segment unlinks that
//! segment. Threads that still look at the segment hold an epoch's guard, and [`crossbeam_epoch`] frees the
//! segment after the last of them. Nothing is reused, so there is no ABA: a segment's base never changes,
//! and an index below the head's base was taken, for good.
//!
//! Closing walks the same list, closes every slot, and ends the list with a mark. No segment can be linked
//! behind the mark, so nothing can be published afterwards, however late a publisher is.
//!
//! # Edges
//!
//! | edge    | release side                     | acquire side                   | what it carries          |
//! |---------|----------------------------------|--------------------------------|--------------------------|
//! | link    | `Segment::next_or_link`, the exchange | every walk                | a new segment's contents |
//! | finish  | [`Table::finish`], the decrement | `Table::retire`                | the takers are done with the segment |
//! | unlink  | `Table::retire`, the exchange    | every walk's load of the head  | the next segment's contents |
//!
//! Four orderings are stronger than they must be. No model turns red without them:
//!
//! - The finish edge. The epochs already carry what it carries: a thread that takes a slot holds a guard
//!   from before it looks at the segment until after it has finished, and a segment is freed only after
//!   every guard that existed when it was unlinked. Only the count decides who unlinks, and a
//!   read-modify-write needs no ordering to count.
//! - The acquire of a successful link exchange, in `Segment::next_or_link` and in [`Table::close`]. The
//!   exchange reads the null with which the segment was made, and the link edge to that segment has already
//!   carried that null.
//!
//! They stay. Each costs nothing next to the operation beside it, at most once per packet. Without them the
//! reasons above would have to hold for ever.
#![expect(unsafe_code, reason = "dereferences epoch-protected segments")]

use std::fmt;

use crossbeam_epoch::{Atomic, Collector, Guard, Owned, Pointer, Shared};
use crossbeam_utils::CachePadded;

use crate::{
    reorder::slot::{Packet, Slot},
    sync::{
        Crossing, Shadow,
        atomic::{
            AtomicU32,
            Ordering::{self, AcqRel, Acquire, Relaxed, Release},
        },
    },
};

/// How many slots a segment has. Small under loom, so that models cross segments.
pub const SEGMENT: u32 = if cfg!(loom) { 2 } else { 1024 };

/// The tag on a null link that says: closed, nothing comes behind.
const CLOSED: usize = 1;

/// A link of the list, with the crossing that the models need at each access.
struct Link {
    crossing: Crossing,
    to: Atomic<Segment>,
}

impl Link {
    fn new(to: Atomic<Segment>) -> Self {
        Self {
            crossing: Crossing::new(),
            to,
        }
    }

    fn load<'g>(&self, order: Ordering, guard: &'g Guard) -> Shared<'g, Segment> {
        self.crossing.pass();
        self.to.load(order, guard)
    }

    /// Exchanges `from` for `to`. Returns what is there now, be it `to` or what was found instead.
    fn exchange<'g>(
        &self,
        from: Shared<'_, Segment>,
        to: impl Pointer<Segment>,
        success: Ordering,
        failure: Ordering,
        guard: &'g Guard,
    ) -> Result<Shared<'g, Segment>, Shared<'g, Segment>> {
        self.crossing.pass();
        self.to
            .compare_exchange(from, to, success, failure, guard)
            .map_err(|lost| lost.current)
    }
}

struct Segment {
    base: u32,
    /// How many slots have not been taken for good.
    remaining: AtomicU32,
    next: Link,
    slots: [Slot; SEGMENT as usize],
    /// The whole segment, as one granule: every walk reads it, freeing it writes it.
    shadow: Shadow,
}

impl Segment {
    fn new(base: u32) -> Self {
        Self {
            base,
            remaining: AtomicU32::new(SEGMENT),
            next: Link::new(Atomic::null()),
            slots: std::array::from_fn(|_| Slot::new()),
            shadow: Shadow::new(1),
        }
    }

    /// Tells the models that the caller looks at this segment.
    fn visited(&self) -> &Self {
        self.shadow.read(0..1);
        self
    }

    /// The segment behind this one, put in place if need be; `None` where the list is closed, or
    /// the index space ends.
    fn next_or_link<'g>(&self, guard: &'g Guard) -> Option<&'g Self> {
        let base = self.base.checked_add(SEGMENT)?;
        // link edge, acquire side.
        let mut next = self.next.load(Acquire, guard);
        if next.is_null() && next.tag() != CLOSED {
            // link edge, release side; and acquire, where another was faster.
            let linked = Owned::new(Self::new(base));
            next = self
                .next
                .exchange(Shared::null(), linked, AcqRel, Acquire, guard)
                .unwrap_or_else(|found| found);
        }
        // SAFETY: linked segments are freed only through `defer_destroy`, after `guard`.
        unsafe { next.as_ref() }.map(Self::visited)
    }
}

/// The index was taken before: its segment is gone, or its slot is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BelowHead;

/// Slots by index.
pub struct Table {
    collector: Collector,
    head: CachePadded<Link>,
}

impl Table {
    /// Returns a table of one segment, whose readers' guards are `collector`'s.
    #[must_use]
    pub fn new(collector: Collector) -> Self {
        Self {
            collector,
            head: CachePadded::new(Link::new(Atomic::new(Segment::new(0)))),
        }
    }

    fn head<'g>(&self, guard: &'g Guard) -> (Shared<'g, Segment>, &'g Segment) {
        assert!(
            guard.collector() == Some(&self.collector),
            "a guard of another collector protects nothing here"
        );
        // unlink edge, acquire side (and link edge, for the table's first segment).
        let head = self.head.load(Acquire, guard);
        // SAFETY: the head is never null, and a segment that was the head under `guard` is freed
        // only after it.
        (head, unsafe { head.deref() }.visited())
    }

    /// The slot of `index`, its segment put in place if need be. `None` where the table is closed
    /// before it.
    ///
    /// # Errors
    ///
    /// [`BelowHead`] where the index was taken and its segment retired.
    pub fn slot_or_link<'g>(
        &self,
        index: u32,
        guard: &'g Guard,
    ) -> Result<Option<&'g Slot>, BelowHead> {
        let (_, mut segment) = self.head(guard);
        let mut distance = index.checked_sub(segment.base).ok_or(BelowHead)?;
        while distance >= SEGMENT {
            match segment.next_or_link(guard) {
                Some(next) => segment = next,
                None => return Ok(None),
            }
            distance -= SEGMENT;
        }
        Ok(Some(&segment.slots[distance as usize]))
    }

    fn find<'g>(&self, index: u32, guard: &'g Guard) -> Option<&'g Segment> {
        let (_, mut segment) = self.head(guard);
        let mut distance = index.checked_sub(segment.base)?;
        while distance >= SEGMENT {
            // link edge, acquire side.
            let next = segment.next.load(Acquire, guard);
            // SAFETY: as in `next_or_link`.
            segment = unsafe { next.as_ref() }?.visited();
            distance -= SEGMENT;
        }
        Some(segment)
    }

    /// The slot of `index`, if its segment is in place.
    #[must_use]
    pub fn slot<'g>(&self, index: u32, guard: &'g Guard) -> Option<&'g Slot> {
        let segment = self.find(index, guard)?;
        Some(&segment.slots[(index - segment.base) as usize])
    }

    /// Marks the taker of `index` as done with its slot for good. Call this once per index.
    pub fn finish(&self, index: u32, guard: &Guard) {
        let segment = self.find(index, guard);
        let segment = segment.expect("a segment stays until all of it is finished");
        // finish edge, both sides: the last one retires on behalf of all.
        if segment.remaining.fetch_sub(1, AcqRel) == 1 {
            self.retire(guard);
        }
    }

    /// Unlinks every finished segment at the front. The list's last one stays, for publishers to
    /// link behind.
    fn retire(&self, guard: &Guard) {
        loop {
            let (head, segment) = self.head(guard);
            // finish edge, acquire side.
            if segment.remaining.load(Acquire) != 0 {
                return;
            }
            // link edge, acquire side.
            let next = segment.next.load(Acquire, guard);
            if next.is_null() {
                return;
            }
            // unlink edge, release side. Relaxed on failure: the loop looks again.
            if self
                .head
                .exchange(head, next, Release, Relaxed, guard)
                .is_ok()
            {
                // SAFETY: the exchange unlinked it, and only one exchange did: from now on no
                // walk begins at it, and those that did hold guards.
                unsafe { guard.defer_destroy(head) };
            }
        }
    }

    /// Whether the table is closed: nothing more can be published, at any index. What a taker finds
    /// there already stays to be taken.
    #[must_use]
    pub fn is_closed(&self, guard: &Guard) -> bool {
        let (_, mut segment) = self.head(guard);
        loop {
            let next = segment.next.load(Acquire, guard);
            // SAFETY: as in `next_or_link`.
            match unsafe { next.as_ref() } {
                Some(linked) => segment = linked.visited(),
                None => return next.tag() == CLOSED,
            }
        }
    }

    /// Closes the table, and hands every packet that nobody took to `abandon`.
    pub fn close(&self, guard: &Guard, mut abandon: impl FnMut(Packet)) {
        let (_, mut segment) = self.head(guard);
        loop {
            segment
                .slots
                .iter()
                .filter_map(Slot::close)
                .for_each(&mut abandon);
            // link edge, acquire side. The mark itself carries nothing.
            let next = match segment.next.exchange(
                Shared::null(),
                Shared::null().with_tag(CLOSED),
                Acquire,
                Acquire,
                guard,
            ) {
                Ok(_) => return,
                Err(found) => found,
            };
            // SAFETY: as in `next_or_link`.
            match unsafe { next.as_ref() } {
                Some(linked) => segment = linked.visited(),
                // Somebody else has closed it.
                None => return,
            }
        }
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        let mut link = std::mem::replace(&mut self.head.to, Atomic::null());
        loop {
            // SAFETY: `&mut self`: nobody else has the table, and what was unlinked is not in the
            // list any more.
            let Some(segment) = (unsafe { link.try_into_owned() }) else {
                return;
            };
            link = segment.into_box().next.to;
        }
    }
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::reorder::slot::{Payload, Publish, Take};

    fn aside(number: u64) -> Packet {
        Packet {
            payload: Payload::External(number),
            config: false,
            more: false,
        }
    }

    #[test]
    fn segments_come_on_demand_and_go_behind_the_taker() {
        let collector = Collector::new();
        let handle = collector.register();
        let table = Table::new(collector);
        let guard = handle.pin();
        let last = 3 * SEGMENT;
        assert!(table.slot(last, &guard).is_none());
        for index in (0..=last).rev() {
            let slot = table.slot_or_link(index, &guard).unwrap().unwrap();
            assert_eq!(slot.publish(aside(index.into())), Publish::Published);
        }
        for index in 0..=last {
            let slot = table.slot(index, &guard).unwrap();
            assert_eq!(slot.take(), Take::Taken(aside(index.into())));
            table.finish(index, &guard);
        }
        assert_eq!(table.slot_or_link(0, &guard).err(), Some(BelowHead));
        assert!(table.slot(last, &guard).is_some());
    }

    #[test]
    fn a_closed_table_takes_nothing_and_returns_all() {
        let collector = Collector::new();
        let handle = collector.register();
        let table = Table::new(collector);
        let guard = handle.pin();
        for index in [0, 5, SEGMENT + 1] {
            let slot = table.slot_or_link(index, &guard).unwrap().unwrap();
            assert_eq!(slot.publish(aside(index.into())), Publish::Published);
        }
        let mut abandoned = Vec::new();
        table.close(&guard, |packet| abandoned.push(packet));
        assert_eq!(
            abandoned,
            [aside(0), aside(5), aside(u64::from(SEGMENT) + 1)]
        );
        assert!(table.is_closed(&guard));
        assert!(table.slot_or_link(2 * SEGMENT, &guard).unwrap().is_none());
        let slot = table.slot_or_link(7, &guard).unwrap().unwrap();
        assert_eq!(slot.publish(aside(7)), Publish::Closed(aside(7)));
        table.close(&guard, |_| panic!("closed twice, returned twice"));
    }

    #[test]
    #[should_panic(expected = "another collector")]
    fn a_foreign_guard_is_refused() {
        let table = Table::new(Collector::new());
        let handle = Collector::new().register();
        let _ = table.slot(0, &handle.pin());
    }
}
