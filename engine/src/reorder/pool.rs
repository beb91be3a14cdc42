//! The memory that packets wait in: buffers of one arena, leased and recycled without a lock.
//!
//! ```text
//!   free list (a stack: the buffer used last is the next to be used, while it is in the cache)
//!      │ ▲
//!      ▼ │ last hold gone
//!   buffer ── held by ─┬─ a LeaseCutter, which cuts leases from it, front to back
//!                      ├─ a Lease of bytes 0..4096                 (a channel fills it)
//!                      ├─ a LeaseToken, the same as a plain value  (a slot keeps it)
//!                      └─ …
//!
//!   arena:  [ buffer 0 │ buffer 1 │ … │ buffer n-1 │ reserve 0 │ reserve 1 │ … ]
//! ```
//!
//! A buffer is large (1 MiB) and packets may be small. So each leasing thread keeps a [`LeaseCutter`],
//! which owns one buffer and cuts packets from it. The buffer goes back when the lease cutter and all
//! packets are done with it. If a lease cutter is its buffer's only holder, it starts at the buffer's front
//! again. A small packet costs its bytes, rounded up to [`ALIGN`].
//!
//! Each device also has one *reserve*, smaller than a buffer, for the packet that it needs next. With the
//! reserve a device can go on however full the pool is.
//!
//! The pool allocates all its memory once, when it is made. The pool is the budget.
//!
//! # Edges
//!
//! | edge    | release side    | acquire side                            | what it carries                     |
//! |---------|-----------------|-----------------------------------------|-------------------------------------|
//! | unhold  | [`Lease`] drop  | the last holder's drop, a lease cutter's look | a holder's accesses, all done       |
//! | recycle | `Pool::push`    | `Pool::pop`                             | the last holder's view of the bytes |
//! | reserve | [`Lease`] drop  | [`Pool::reserve`]                       | the last owner's accesses, all done |
#![expect(
    unsafe_code,
    reason = "hands out slices of one shared arena, each range to one owner at a time"
)]

use std::{
    fmt,
    mem::ManuallyDrop,
    ops::{Deref, Range},
    slice,
};

use crossbeam_utils::CachePadded;
use vfio_migration_uring::Buffer as RingBuffer;

use crate::{
    arena::{Arena, GRANULE, NoMemory, Touch},
    sync::atomic::{
        AtomicU32, AtomicU64,
        Ordering::{AcqRel, Acquire, Relaxed, Release},
    },
};

/// What every lease is rounded up to, in bytes: a cache line, so that two packets of one buffer
/// share none.
pub const ALIGN: usize = GRANULE;

/// How a pool's arena is cut. Sizes are multiples of [`ALIGN`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PoolLayout {
    /// Buffers for whoever asks first.
    pub buffers: u32,
    /// The size of each, in bytes, [`PoolLayout::MAX_BUFFER_LEN`] at most.
    pub buffer_len: usize,
    /// Reserves, one for each device.
    pub reserves: u32,
    /// The size of each, in bytes.
    pub reserve_len: usize,
}

impl PoolLayout {
    /// The largest buffer: what an offset in a [`LeaseToken`] can reach.
    pub const MAX_BUFFER_LEN: usize = ALIGN << LeaseToken::OFFSET_BITS;
    /// The most buffers and reserves together: what an id in a [`LeaseToken`] can name.
    pub const MAX_BUFFERS: u32 = (1 << LeaseToken::ID_BITS) - 1;

    /// The arena's size in bytes.
    #[must_use]
    pub const fn size(&self) -> usize {
        self.buffers as usize * self.buffer_len + self.reserves as usize * self.reserve_len
    }
}

/// Some bytes of a pool, as a plain value: what a slot keeps while nobody works on them.
///
/// It is made by [`Lease::into_token`] and turned back by [`Pool::adopt`], and is neither copied
/// nor cloned, so it stands for the ownership.
#[derive(Debug, Eq, PartialEq)]
#[must_use = "the bytes have no other owner"]
pub struct LeaseToken {
    buffer: u32,
    offset: u32,
    len: u32,
}

impl LeaseToken {
    /// How many bits a piece takes.
    pub(super) const BITS: u32 = Self::ID_BITS + Self::OFFSET_BITS + Self::LEN_BITS;
    /// The bits of no piece.
    pub(super) const NONE: u64 = (1 << Self::BITS) - 1;

    const ID_BITS: u32 = 16;
    /// In units of [`ALIGN`].
    const OFFSET_BITS: u32 = 18;
    const LEN_BITS: u32 = 25;

    /// The value in 59 bits.
    pub(super) fn into_bits(self) -> u64 {
        debug_assert!((self.offset as usize).is_multiple_of(ALIGN));
        let line = u64::from(self.offset) / ALIGN as u64;
        u64::from(self.buffer) << (Self::OFFSET_BITS + Self::LEN_BITS)
            | line << Self::LEN_BITS
            | u64::from(self.len)
    }

    /// The piece of [`LeaseToken::into_bits`]. Only for whoever took those bits out of the one place
    /// that had them: a slot.
    #[expect(clippy::cast_possible_truncation, reason = "masked to their fields")]
    pub(super) const fn from_bits(bits: u64) -> Self {
        let line = bits >> Self::LEN_BITS & ((1 << Self::OFFSET_BITS) - 1);
        Self {
            buffer: (bits >> (Self::OFFSET_BITS + Self::LEN_BITS)) as u32,
            offset: line as u32 * ALIGN as u32,
            len: (bits & ((1 << Self::LEN_BITS) - 1)) as u32,
        }
    }

    /// How many bytes a piece in 59 bits names, of which the caller makes none.
    pub(super) const fn size_in(bits: u64) -> usize {
        (bits & ((1 << Self::LEN_BITS) - 1)) as usize
    }

    /// How many bytes it names.
    #[must_use]
    pub const fn size(&self) -> usize {
        self.len as usize
    }
}

// A lease is never longer than a buffer, so its length fits a piece.
const _: () = assert!(PoolLayout::MAX_BUFFER_LEN < 1 << LeaseToken::LEN_BITS);

/// The head of the free list: a tag against ABA above, a buffer's index below.
#[derive(Clone, Copy)]
struct Head(u64);

impl Head {
    const NIL: u32 = u32::MAX;

    const fn new(tag: u32, index: u32) -> Self {
        Self((tag as u64) << 32 | index as u64)
    }

    #[expect(clippy::cast_possible_truncation, reason = "the low half")]
    const fn index(self) -> u32 {
        self.0 as u32
    }

    const fn tag(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// What is known of one buffer. Its bytes are in the arena.
struct Buffer {
    /// Its lease cutter and its leases. A buffer with none is on the free list; a reserve with none is
    /// free.
    holders: AtomicU32,
    /// The one below it on the free list.
    next: AtomicU32,
}

/// A fixed set of buffers and reserves.
pub struct Pool {
    head: CachePadded<AtomicU64>,
    in_use: CachePadded<AtomicU32>,
    in_use_high: AtomicU32,
    buffers: Box<[CachePadded<Buffer>]>,
    layout: PoolLayout,
    arena: Arena,
    /// What a harness has it refuse.
    #[cfg(feature = "faults")]
    refusals: std::sync::OnceLock<super::refusals::LeasePlan>,
}

impl Pool {
    /// Allocates and touches all of a pool's memory.
    ///
    /// # Errors
    ///
    /// [`NoMemory`], where the host does not have as much.
    ///
    /// # Panics
    ///
    /// Where the layout is beyond [`PoolLayout::MAX_BUFFERS`] or [`PoolLayout::MAX_BUFFER_LEN`], or
    /// a size is not a multiple of [`ALIGN`].
    pub fn new(layout: PoolLayout) -> Result<Self, NoMemory> {
        Self::with(layout, Touch::AtOnce)
    }

    /// As [`Pool::new`], but each page is touched by its first user.
    ///
    /// # Errors
    ///
    /// As for [`Pool::new`].
    ///
    /// # Panics
    ///
    /// As [`Pool::new`].
    pub fn untouched(layout: PoolLayout) -> Result<Self, NoMemory> {
        Self::with(layout, Touch::Lazily)
    }

    fn with(layout: PoolLayout, touch: Touch) -> Result<Self, NoMemory> {
        assert!(layout.buffers + layout.reserves <= PoolLayout::MAX_BUFFERS);
        for len in [layout.buffer_len, layout.reserve_len] {
            assert!(len <= PoolLayout::MAX_BUFFER_LEN && len.is_multiple_of(ALIGN));
        }
        let arena = Arena::new(layout.size(), touch)?;
        let count = layout.buffers + layout.reserves;
        let mut buffers = Vec::new();
        let bytes = count as usize * size_of::<CachePadded<Buffer>>();
        let reserved = buffers.try_reserve_exact(count as usize);
        reserved.map_err(|_| NoMemory(bytes))?;
        buffers.extend((0..count).map(|index| {
            CachePadded::new(Buffer {
                holders: AtomicU32::new(0),
                next: AtomicU32::new(if index + 1 < layout.buffers {
                    index + 1
                } else {
                    Head::NIL
                }),
            })
        }));
        let first = if layout.buffers > 0 { 0 } else { Head::NIL };
        Ok(Self {
            head: CachePadded::new(AtomicU64::new(Head::new(0, first).0)),
            in_use: CachePadded::new(AtomicU32::new(0)),
            in_use_high: AtomicU32::new(0),
            buffers: buffers.into(),
            layout,
            arena,
            #[cfg(feature = "faults")]
            refusals: std::sync::OnceLock::new(),
        })
    }

    /// Refuses leases by a plan, from now on. Call this once.
    #[cfg(feature = "faults")]
    pub fn refuse_by(&self, plan: super::refusals::LeasePlan) {
        assert!(self.refusals.set(plan).is_ok(), "a pool has one plan");
    }

    /// How the pool is cut.
    #[must_use]
    pub const fn layout(&self) -> &PoolLayout {
        &self.layout
    }

    /// How many buffers are out now, and the most that were out at one time. Reserves not counted.
    #[must_use]
    pub fn in_use(&self) -> (u32, u32) {
        // Relaxed: counters, for a human.
        (self.in_use.load(Relaxed), self.in_use_high.load(Relaxed))
    }

    /// Takes a buffer off the free list, with one hold on it.
    fn pop(&self) -> Option<u32> {
        // recycle edge, acquire side: `next` below, and the bytes, are the last holder's.
        let mut head = Head(self.head.load(Acquire));
        loop {
            let index = head.index();
            if index == Head::NIL {
                return None;
            }
            // Relaxed: stale only if the buffer left and came back, and coming back moves the tag.
            let next = self.buffers[index as usize].next.load(Relaxed);
            let new = Head::new(head.tag(), next);
            // Relaxed on success: the read that gave us `head` was the acquire, and the tag says
            // the head is still that one.
            match self
                .head
                .compare_exchange_weak(head.0, new.0, Relaxed, Acquire)
            {
                Ok(_) => {
                    // Relaxed: nobody else knows the buffer now.
                    self.buffers[index as usize].holders.store(1, Relaxed);
                    // Relaxed: counters.
                    let out = self.in_use.fetch_add(1, Relaxed) + 1;
                    if out > self.in_use_high.load(Relaxed) {
                        self.in_use_high.fetch_max(out, Relaxed);
                    }
                    return Some(index);
                }
                Err(actual) => head = Head(actual),
            }
        }
    }

    /// Puts a buffer that nobody holds back on top of the free list.
    fn push(&self, index: u32) {
        // Relaxed: a counter. Before the exchange, so that it never runs behind the list.
        self.in_use.fetch_sub(1, Relaxed);
        // Relaxed: a guess, confirmed by the exchange below.
        let mut head = Head(self.head.load(Relaxed));
        loop {
            // Relaxed: published by the exchange.
            self.buffers[index as usize]
                .next
                .store(head.index(), Relaxed);
            let new = Head::new(head.tag().wrapping_add(1), index);
            // recycle edge, release side.
            match self
                .head
                .compare_exchange_weak(head.0, new.0, Release, Relaxed)
            {
                Ok(_) => return,
                Err(actual) => head = Head(actual),
            }
        }
    }

    /// Gives up one hold on a buffer.
    fn unhold(&self, index: u32) {
        // unhold edge, both sides: our accesses are done, and whoever is the last must have seen
        // everybody's before the buffer is used again.
        let before = self.buffers[index as usize].holders.fetch_sub(1, AcqRel);
        debug_assert!(before > 0, "a hold given up twice");
        if before == 1 && index < self.layout.buffers {
            self.push(index);
        }
    }

    /// Leases device `ordinal`'s reserve, whole, if it is free.
    pub fn reserve<P: Deref<Target = Self>>(pool: P, ordinal: u32) -> Option<Lease<P>> {
        assert!(ordinal < pool.layout.reserves, "a device has one reserve");
        let index = pool.layout.buffers + ordinal;
        // reserve edge, acquire side. Relaxed on failure: nothing is touched.
        pool.buffers[index as usize]
            .holders
            .compare_exchange(0, 1, Acquire, Relaxed)
            .ok()?;
        let len = pool.layout.reserve_len;
        Some(Lease::new(pool, index, 0, len))
    }

    /// Turns a piece back into a lease.
    pub fn adopt<P: Deref<Target = Self>>(pool: P, piece: LeaseToken) -> Lease<P> {
        assert!(
            (piece.buffer as usize) < pool.buffers.len(),
            "a piece goes back to the pool that it came from"
        );
        Lease {
            pool,
            buffer: piece.buffer,
            offset: piece.offset,
            len: piece.len,
            front: 0,
        }
    }

    /// The buffer's place in the arena.
    fn start_of(&self, buffer: u32) -> usize {
        let layout = &self.layout;
        if buffer < layout.buffers {
            buffer as usize * layout.buffer_len
        } else {
            layout.buffers as usize * layout.buffer_len
                + (buffer - layout.buffers) as usize * layout.reserve_len
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("layout", &self.layout)
            .field("in_use", &self.in_use().0)
            .finish_non_exhaustive()
    }
}

/// Cuts leases from a buffer of its own. One thread's.
pub struct LeaseCutter<P: Deref<Target = Pool> + Clone> {
    pool: P,
    current: Option<Current>,
}

/// A lease cutter's buffer: which, and where its free part begins.
#[derive(Clone, Copy)]
struct Current {
    buffer: u32,
    used: usize,
}

impl<P: Deref<Target = Pool> + Clone> LeaseCutter<P> {
    /// Returns a lease cutter without a buffer.
    pub const fn new(pool: P) -> Self {
        Self {
            pool,
            current: None,
        }
    }

    /// Leases `len` bytes, or returns `None` when they cannot be had now: the back-pressure.
    ///
    /// # Panics
    ///
    /// Where `len` is 0 or above the pool's buffer length.
    pub fn lease(&mut self, len: usize) -> Option<Lease<P>> {
        self.lease_within(len, u32::MAX)
    }

    /// As [`LeaseCutter::lease`], but takes no further buffer where `limit` of the pool's are out.
    ///
    /// # Panics
    ///
    /// As [`LeaseCutter::lease`].
    pub fn lease_within(&mut self, len: usize, limit: u32) -> Option<Lease<P>> {
        let whole = self.pool.layout.buffer_len;
        assert!(len > 0 && len <= whole, "a lease fits a buffer");
        #[cfg(feature = "faults")]
        if self.pool.refusals.get().is_some_and(|plan| plan.refuses()) {
            return None;
        }
        let taken = len.next_multiple_of(ALIGN);
        if let Some(current) = &mut self.current {
            let holders = &self.pool.buffers[current.buffer as usize].holders;
            // unhold edge, acquire side: with no hold but ours, all that was cut before is done
            // with, and nobody but us could cut more.
            if current.used > 0 && holders.load(Acquire) == 1 {
                current.used = 0;
            }
            if taken <= whole - current.used {
                // Relaxed: a hold is made from a hold.
                holders.fetch_add(1, Relaxed);
                let offset = current.used;
                current.used += taken;
                return Some(Lease::new(self.pool.clone(), current.buffer, offset, len));
            }
        }
        // Relaxed: a guess. Where several take the last one at once no harm is done: it is the
        // free list that says what there is.
        if self.pool.in_use.load(Relaxed) >= limit {
            return None;
        }
        let buffer = self.pool.pop()?;
        // Relaxed: as above. The hold of `pop` is the lease cutter's, this one is the lease's.
        self.pool.buffers[buffer as usize]
            .holders
            .fetch_add(1, Relaxed);
        let fresh = Current {
            buffer,
            used: taken,
        };
        // Of two buffers keep the one with more room.
        let loser = match self.current {
            Some(current) if current.used < taken => buffer,
            Some(current) => {
                self.current = Some(fresh);
                current.buffer
            }
            None => {
                self.current = Some(fresh);
                return Some(Lease::new(self.pool.clone(), buffer, 0, len));
            }
        };
        self.pool.unhold(loser);
        Some(Lease::new(self.pool.clone(), buffer, 0, len))
    }

    /// Shortens the lease that was cut last to `len` bytes, and takes back what that frees.
    pub fn shorten(&mut self, lease: &mut Lease<P>, len: usize) {
        let end = (lease.offset + lease.len) as usize;
        lease.truncate(len);
        if let Some(current) = &mut self.current
            && current.buffer == lease.buffer
            && current.used == end.next_multiple_of(ALIGN)
        {
            current.used = (lease.offset as usize + len).next_multiple_of(ALIGN);
        }
    }

    /// Gives up the buffer: before a wait of unknown length.
    pub fn release(&mut self) {
        if let Some(current) = self.current.take() {
            self.pool.unhold(current.buffer);
        }
    }
}

impl<P: Deref<Target = Pool> + Clone> Drop for LeaseCutter<P> {
    fn drop(&mut self) {
        self.release();
    }
}

impl<P: Deref<Target = Pool> + Clone> fmt::Debug for LeaseCutter<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeaseCutter")
            .field("buffer", &self.current.map(|current| current.buffer))
            .field("used", &self.current.map(|current| current.used))
            .finish_non_exhaustive()
    }
}

/// Some bytes of a pool, owned. Dropping it gives them back.
#[must_use = "dropping a lease at once recycles its memory unused"]
pub struct Lease<P: Deref<Target = Pool>> {
    pool: P,
    buffer: u32,
    offset: u32,
    len: u32,
    /// How many bytes before `offset` are this lease's too.
    front: u32,
}

impl<P: Deref<Target = Pool>> Lease<P> {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "below MAX_BUFFER_LEN, which fits a piece"
    )]
    const fn new(pool: P, buffer: u32, offset: usize, len: usize) -> Self {
        Self {
            pool,
            buffer,
            offset: offset as u32,
            len: len as u32,
            front: 0,
        }
    }

    /// How many bytes it has.
    #[must_use]
    pub const fn size(&self) -> usize {
        self.len as usize
    }

    fn start(&self) -> usize {
        self.pool.start_of(self.buffer) + self.offset as usize
    }

    fn granules(&self) -> Range<usize> {
        let start = self.start();
        start / ALIGN..(start + self.size()).div_ceil(ALIGN)
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.pool.arena.reads(self.granules());
        // SAFETY: the range was cut for this lease alone, it is initialised since the arena was
        // made, and `&self` keeps it from `bytes_mut` and from a ring. The unhold and recycle
        // edges ordered all earlier owners' accesses before ours, the publish edge the filler's.
        unsafe { slice::from_raw_parts(self.pool.arena.at(self.start()), self.size()) }
    }

    /// The bytes, to be filled.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.pool.arena.writes(self.granules());
        // SAFETY: as in `bytes`, and `&mut self` is the only use of this lease.
        unsafe { slice::from_raw_parts_mut(self.pool.arena.at(self.start()), self.size()) }
    }

    /// Drops the first `count` bytes: they have been written.
    pub fn advance(&mut self, count: usize) {
        let count = u32::try_from(count).ok().filter(|&count| count <= self.len);
        let count = count.expect("nobody moves more bytes than there are");
        self.offset += count;
        self.len -= count;
        self.front += count;
    }

    /// Takes back `count` of the bytes that [`Lease::advance`] dropped.
    pub fn retreat(&mut self, count: usize) {
        let count = u32::try_from(count)
            .ok()
            .filter(|&count| count <= self.front);
        let count = count.expect("a lease does not grow");
        self.offset -= count;
        self.len += count;
        self.front -= count;
    }

    /// Keeps the first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        let len = u32::try_from(len).ok().filter(|&len| len <= self.len);
        self.len = len.expect("a lease does not grow");
    }

    /// Gives up the lease but not the bytes: the piece now stands for the ownership.
    ///
    /// # Panics
    ///
    /// Where the lease was advanced by anything but a multiple of [`ALIGN`].
    pub fn into_token(self) -> LeaseToken {
        assert!((self.offset as usize).is_multiple_of(ALIGN));
        let (piece, pool) = self.into_parts();
        drop(pool);
        piece
    }

    fn into_parts(self) -> (LeaseToken, P) {
        let lease = ManuallyDrop::new(self);
        let piece = LeaseToken {
            buffer: lease.buffer,
            offset: lease.offset,
            len: lease.len,
        };
        // SAFETY: `lease` is never dropped nor used again, so the handle has one owner.
        let pool = unsafe { std::ptr::read(&raw const lease.pool) };
        (piece, pool)
    }
}

impl<P: Deref<Target = Pool>> Drop for Lease<P> {
    fn drop(&mut self) {
        self.pool.unhold(self.buffer);
    }
}

// SAFETY: the bytes are in the pool's arena, which does not move and lives as long as the lease's
// handle to it; they were cut for this lease alone; and while a ring owns the lease nobody calls
// `bytes` or `bytes_mut` on it.
unsafe impl<P: Deref<Target = Pool> + Send + 'static> RingBuffer for Lease<P> {
    fn as_mut_ptr(&mut self) -> *mut u8 {
        self.pool.arena.at(self.start())
    }

    fn len(&self) -> usize {
        self.len as usize
    }
}

impl<P: Deref<Target = Pool>> fmt::Debug for Lease<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("buffer", &self.buffer)
            .field("offset", &self.offset)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn pool(buffers: u32, buffer_len: usize, reserves: u32) -> Pool {
        Pool::new(PoolLayout {
            buffers,
            buffer_len,
            reserves,
            reserve_len: 64,
        })
        .unwrap()
    }

    #[test]
    fn a_piece_round_trips_its_limits() {
        for (buffer, offset, len) in [
            (0, 0, 0),
            (PoolLayout::MAX_BUFFERS - 1, (1 << 24) - 64, 64),
            (7, 64, 1 << 24),
        ] {
            let piece = || LeaseToken {
                buffer,
                offset,
                len,
            };
            assert_ne!(piece().into_bits(), LeaseToken::NONE);
            assert_eq!(LeaseToken::from_bits(piece().into_bits()), piece());
        }
    }

    #[test]
    fn small_packets_share_a_buffer_and_it_comes_back_with_the_last() {
        let pool = pool(1, 256, 0);
        let mut cutter = LeaseCutter::new(&pool);
        let leases: Vec<_> = (0..4).map(|_| cutter.lease(64).unwrap()).collect();
        assert_eq!(pool.in_use(), (1, 1));
        assert!(cutter.lease(1).is_none());
        cutter.release();
        let mut leases = leases.into_iter();
        drop(leases.by_ref().take(3).collect::<Vec<_>>());
        assert_eq!(pool.in_use().0, 1);
        drop(leases);
        assert_eq!(pool.in_use().0, 0);
    }

    #[test]
    fn a_cutter_alone_with_its_buffer_starts_again_at_the_front() {
        let pool = pool(1, 128, 0);
        let mut cutter = LeaseCutter::new(&pool);
        for round in 0..10u8 {
            let mut lease = cutter.lease(100).unwrap();
            lease.bytes_mut().fill(round);
            assert!(cutter.lease(100).is_none());
            let piece = lease.into_token();
            let lease = Pool::adopt(&pool, piece);
            assert!(lease.bytes().iter().all(|&byte| byte == round));
        }
        assert_eq!(pool.in_use(), (1, 1));
    }

    #[test]
    fn the_buffer_used_last_is_used_next() {
        let pool = pool(3, 64, 0);
        let mut cutter = LeaseCutter::new(&pool);
        let (first, second) = (cutter.lease(64).unwrap(), cutter.lease(64).unwrap());
        let at = second.start();
        cutter.release();
        drop(first);
        drop(second);
        assert_eq!(cutter.lease(64).unwrap().start(), at);
    }

    #[test]
    fn what_a_shortened_lease_frees_is_cut_again() {
        let pool = pool(1, 256, 0);
        let mut cutter = LeaseCutter::new(&pool);
        let mut lease = cutter.lease(256).unwrap();
        cutter.shorten(&mut lease, 10);
        let second = cutter.lease(192).unwrap();
        assert_eq!((lease.size(), second.start()), (10, 64));
        assert!(cutter.lease(1).is_none());
    }

    #[test]
    fn of_two_buffers_the_cutter_keeps_the_roomier() {
        let pool = pool(2, 256, 0);
        let mut cutter = LeaseCutter::new(&pool);
        let small = cutter.lease(64).unwrap();
        let large = cutter.lease(256).unwrap();
        let more = cutter.lease(192).unwrap();
        assert_eq!(more.start(), small.start() + 64);
        drop(large);
        assert_eq!(pool.in_use().0, 1);
    }

    #[test]
    fn a_reserve_has_one_owner_and_is_not_in_the_free_list() {
        let pool = pool(0, 64, 2);
        assert!(LeaseCutter::new(&pool).lease(1).is_none());
        let reserve = Pool::reserve(&pool, 1).unwrap();
        assert!(Pool::reserve(&pool, 1).is_none());
        assert_eq!(Pool::reserve(&pool, 0).unwrap().size(), 64);
        drop(reserve);
        assert!(Pool::reserve(&pool, 1).is_some());
    }

    #[test]
    fn every_byte_of_the_arena_is_some_leases() {
        let pool = pool(3, 128, 2);
        let mut cutter = LeaseCutter::new(&pool);
        let mut ranges: Vec<_> = (0..6)
            .map(|_| cutter.lease(64).unwrap())
            .chain((0..2).map(|ordinal| Pool::reserve(&pool, ordinal).unwrap()))
            .map(|lease| {
                let lease = ManuallyDrop::new(lease);
                lease.start()..lease.start() + lease.size()
            })
            .collect();
        ranges.sort_by_key(|range| range.start);
        assert_eq!(ranges.first().unwrap().start, 0);
        assert_eq!(ranges.last().unwrap().end, pool.layout().size());
        assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
    }
}
