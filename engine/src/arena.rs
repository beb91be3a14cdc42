//! The bytes of a pool: one piece of memory, backed by huge pages if the kernel has them.
//!
//! A load touches its memory when it makes the arena: making the session pays for the memory, and no
//! transfer meets a page fault. A save that makes its arena before the VM stops (`SaveBuilder::prepare`)
//! does the same. A save that makes its arena within the downtime touches the pages only as it uses them:
//! the pool hands out the most recently returned buffer first, so most pages are never needed. Huge pages
//! make all of this cheaper (16 faults for 32 MiB instead of 8192).
//!
//! A setting or a peer chooses the size. So missing memory is an error, [`NoMemory`], and not an abort.
//!
//! An arena hands out addresses. Its pool decides who may use which range: see `reorder/pool.rs`.
#![expect(unsafe_code, reason = "raw memory, from the heap or a mapping")]

use std::{
    alloc::{self, Layout},
    num::NonZero,
    ops::Range,
    ptr::NonNull,
};

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::sync::Shadow;

/// What loom watches as one: a cache line.
pub(crate) const GRANULE: usize = 64;

/// A huge page.
const HUGE: usize = 2 << 20;

/// When the memory is made real.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Touch {
    /// Now.
    AtOnce,
    /// With its first use.
    Lazily,
}

/// The host does not have as many bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct NoMemory(pub usize);

impl From<NoMemory> for std::io::Error {
    fn from(_: NoMemory) -> Self {
        nix::errno::Errno::ENOMEM.into()
    }
}

/// Bytes of the heap, all 0, of which those that are never used cost no memory where they are many.
pub(crate) fn zeroed(len: usize) -> Result<Box<[u8]>, NoMemory> {
    let layout = Layout::array::<u8>(len).map_err(|_| NoMemory(len))?;
    if len == 0 {
        return Ok(Box::default());
    }
    // SAFETY: the layout's size is not 0.
    let start = NonNull::new(unsafe { alloc::alloc_zeroed(layout) }).ok_or(NoMemory(len))?;
    let bytes = NonNull::slice_from_raw_parts(start, len);
    // SAFETY: from the global allocator with the layout of such a slice, initialised, and ours alone.
    Ok(unsafe { Box::from_raw(bytes.as_ptr()) })
}

/// One piece of memory, freed with its owner. All of it is initialised.
pub(crate) struct Arena {
    start: NonNull<u8>,
    len: usize,
    memory: Memory,
    shadow: Shadow,
}

/// Where it comes from.
enum Memory {
    /// What is smaller than a huge page.
    Heap(Layout),
    /// A mapping from here, this long.
    Mapped(NonNull<u8>, usize),
}

// SAFETY: the arena is plain memory, and makes no access after `new`. Its owner gives each range to
// one thread at a time.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    pub(crate) fn new(len: usize, touch: Touch) -> Result<Self, NoMemory> {
        let (start, memory) = if len < HUGE {
            heap(len)?
        } else {
            mapped(len, touch)?
        };
        Ok(Self {
            start,
            len,
            memory,
            shadow: Shadow::new(if cfg!(loom) { len / GRANULE } else { 0 }),
        })
    }

    /// The address of a byte.
    pub(crate) fn at(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset <= self.len);
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
        match self.memory {
            // SAFETY: allocated by `heap` with this layout, and every lease holds the pool.
            Memory::Heap(layout) => unsafe { alloc::dealloc(self.start.as_ptr(), layout) },
            Memory::Mapped(start, len) => {
                // SAFETY: mapped by `mapped`, all of it, and every lease holds the pool.
                let unmapped = unsafe { munmap(start.cast(), len) };
                debug_assert_eq!(unmapped, Ok(()), "a mapping of ours");
            }
        }
    }
}

/// Zeroed memory of the heap, on pages of its own.
fn heap(len: usize) -> Result<(NonNull<u8>, Memory), NoMemory> {
    let layout = Layout::from_size_align(len.max(GRANULE), 4096).expect("less than a huge page");
    // SAFETY: the layout's size is not 0.
    let start = NonNull::new(unsafe { alloc::alloc_zeroed(layout) }).ok_or(NoMemory(len))?;
    Ok((start, Memory::Heap(layout)))
}

/// A mapping that begins with a huge page.
fn mapped(len: usize, touch: Touch) -> Result<(NonNull<u8>, Memory), NoMemory> {
    // One more, to begin where a huge page does.
    let all = len.checked_add(HUGE).ok_or(NoMemory(len))?;
    let (access, flags) = (
        ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        MapFlags::MAP_PRIVATE,
    );
    let size = NonZero::new(all).expect("more than a huge page");
    // SAFETY: a new mapping, wherever the kernel likes.
    let mapping = unsafe { mmap_anonymous(None, size, access, flags) };
    let mapping = mapping.map_err(|_errno| NoMemory(len))?.cast::<u8>();
    // SAFETY: less than the huge page that was mapped beyond `len`.
    let start = unsafe { mapping.add(mapping.align_offset(HUGE)) };
    // SAFETY: the range is ours and aligned to pages, and the advice does not change what is in it. A
    // kernel without huge pages says so, and nothing is lost.
    let _advised = unsafe { madvise(start.cast(), len / HUGE * HUGE, MmapAdvise::MADV_HUGEPAGE) };
    if touch == Touch::AtOnce {
        // SAFETY: the range is ours, and `len` bytes long.
        unsafe { start.as_ptr().write_bytes(0, len) };
    }
    Ok((start, Memory::Mapped(mapping, all)))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn all_of_it_is_zeroed_and_ours_and_large_ones_begin_with_a_huge_page() {
        for touch in [Touch::AtOnce, Touch::Lazily] {
            for len in [64, 4096, HUGE - 64, HUGE, 2 * HUGE + 4096] {
                let arena = Arena::new(len, touch).unwrap();
                let start = arena.at(0);
                let align = if len < HUGE { 4096 } else { HUGE };
                assert!(start.addr().is_multiple_of(align));
                // SAFETY: nobody else has it.
                let bytes = unsafe { std::slice::from_raw_parts_mut(start, len) };
                assert!(bytes.iter().all(|byte| *byte == 0));
                bytes.fill(7);
                assert_eq!(arena.at(len).addr() - start.addr(), len);
            }
        }
    }

    #[test]
    fn what_the_host_does_not_have_is_an_error() {
        for len in [usize::MAX, isize::MAX.cast_unsigned(), 1 << 50] {
            assert_eq!(Arena::new(len, Touch::Lazily).err(), Some(NoMemory(len)));
            assert_eq!(zeroed(len), Err(NoMemory(len)));
        }
        assert_eq!(*zeroed(3).unwrap(), [0; 3]);
        assert!(zeroed(0).unwrap().is_empty());
    }
}
