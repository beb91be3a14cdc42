//! The bytes of a pool: one allocation, touched once, backed by huge pages where the kernel has them.
//!
//! Whoever makes a session pays for its memory before the first byte moves: no transfer meets a page
//! fault. Huge pages make that cheaper too (16 faults for 32 MiB, not 8192).
//!
//! An arena hands out addresses. Who may use which range is its pool's to say: see `reorder/pool.rs`.
#![expect(unsafe_code, reason = "one raw allocation, and its madvise")]

use std::{
    alloc::{self, Layout},
    ops::Range,
    ptr::NonNull,
};

use crate::sync::Shadow;

/// What loom watches as one: a cache line.
pub(crate) const GRANULE: usize = 64;

/// One allocation, freed with its owner.
pub(crate) struct Arena {
    start: NonNull<u8>,
    layout: Layout,
    shadow: Shadow,
}

// SAFETY: the arena is plain memory, and makes no access after `new`. Its owner gives each range to
// one thread at a time.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    /// A huge page.
    const ALIGN: usize = 2 << 20;

    pub(crate) fn new(len: usize) -> Self {
        let align = if len >= Self::ALIGN {
            Self::ALIGN
        } else {
            4096
        };
        let layout = Layout::from_size_align(len.max(GRANULE), align)
            .expect("a budget is far below isize::MAX");
        // SAFETY: the layout's size is not 0.
        let start = unsafe { alloc::alloc(layout) };
        let Some(start) = NonNull::new(start) else {
            alloc::handle_alloc_error(layout)
        };
        prefer_huge_pages(start, len / Self::ALIGN * Self::ALIGN);
        // Every page is touched here, so that no transfer pays for a fault. The value is not 0, or
        // the compiler would ask for zeroed pages instead, which are not touched.
        // SAFETY: the block is ours, and `layout.size()` bytes long.
        unsafe { start.as_ptr().write_bytes(0xa5, layout.size()) };
        Self {
            start,
            layout,
            shadow: Shadow::new(if cfg!(loom) { len / GRANULE } else { 0 }),
        }
    }

    /// The address of a byte.
    pub(crate) fn at(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset <= self.layout.size());
        // SAFETY: `offset` is within the block, by the pool's arithmetic.
        unsafe { self.start.as_ptr().add(offset) }
    }

    /// Tells loom of an access to these granules.
    pub(crate) fn reads(&self, granules: Range<usize>) {
        self.shadow.read(granules);
    }

    /// As [`Arena::reads`], for writing.
    pub(crate) fn writes(&self, granules: Range<usize>) {
        self.shadow.write(granules);
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with this layout, and every lease holds the pool.
        unsafe { alloc::dealloc(self.start.as_ptr(), self.layout) };
    }
}

#[cfg(not(loom))]
fn prefer_huge_pages(start: NonNull<u8>, len: usize) {
    use nix::sys::mman::{MmapAdvise, madvise};

    if len > 0 {
        // SAFETY: the range is ours and aligned to pages, and the advice does not change what is in
        // it. A kernel without huge pages says so, and nothing is lost.
        let _advised = unsafe { madvise(start.cast(), len, MmapAdvise::MADV_HUGEPAGE) };
    }
}

#[cfg(loom)]
fn prefer_huge_pages(_start: NonNull<u8>, _len: usize) {}
