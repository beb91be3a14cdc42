//! Memory that is written and read through `/proc/self/mem` alone.
//!
//! ```text
//!   base             start                                      end
//!   ├─── rounding ────┼──────────── capacity ────────────────────┼── guard: no access ─┤
//! ```
//!
//! The file gives the simulated device what a driver's data fd has: a plain write, no non-blocking mode,
//! and an error of its own past the end. No reference to the memory is ever made, so no write through the
//! file can change memory behind a reference.
//!
//! A file that is still open after its session keeps the address for ever. So the addresses are never given
//! back for another use. A retired mapping loses its pages and its access (a late write gets `EIO`), and
//! waits for the next session that fits into it. There are never more mappings than sessions were open at
//! once.
//!
//! The device's own thread makes and retires a mapping. The list's lock is held for a few system calls.

#![expect(unsafe_code, reason = "mapping memory")]

use std::{
    ffi::c_void,
    io,
    num::NonZeroUsize,
    ptr::NonNull,
    sync::{Mutex, PoisonError},
};

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, mprotect};

/// A multiple of every page size there is.
const PAGES: usize = 64 << 10;

/// What waits for its next session.
static RETIRED: Mutex<Vec<Region>> = Mutex::new(Vec::new());

/// Memory that takes exactly `capacity` bytes from [`Mapping::start`] on.
#[derive(Debug)]
pub(super) struct Mapping {
    region: Option<Region>,
    start: u64,
}

impl Mapping {
    /// Maps room for `capacity` bytes, all 0. Pages are had as they are written.
    pub(super) fn new(capacity: u64) -> io::Result<Self> {
        let capacity = usize::try_from(capacity).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let mut retired = RETIRED.lock().unwrap_or_else(PoisonError::into_inner);
        let region = match retired.iter().position(|region| region.len >= capacity) {
            Some(index) => retired.swap_remove(index),
            None => Region::new(capacity)?,
        };
        drop(retired);
        let end = region.base.addr().get() + region.len;
        let mapping = Self {
            start: (end - capacity) as u64,
            region: Some(region),
        };
        mapping.protect(ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
        Ok(mapping)
    }

    /// The address of the first byte, which is its position in `/proc/self/mem`.
    pub(super) const fn start(&self) -> u64 {
        self.start
    }

    /// Has all its pages now, and not as they are written.
    pub(super) fn populate(&self) -> io::Result<()> {
        let Some(Region { base, len }) = self.region else {
            return Ok(());
        };
        // SAFETY: as in `protect`; this faults the pages in and changes no byte.
        unsafe { madvise(base, len, MmapAdvise::MADV_POPULATE_WRITE) }?;
        Ok(())
    }

    fn protect(&self, access: ProtFlags) -> io::Result<()> {
        let Some(Region { base, len }) = self.region else {
            return Ok(());
        };
        // SAFETY: the region is this mapping's alone, is never unmapped, and nothing refers to it.
        unsafe { mprotect(base, len, access) }?;
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let closed = self.protect(ProtFlags::PROT_NONE);
        let Some(region) = self.region.take() else {
            return;
        };
        // SAFETY: as in `protect`; this punches a hole in the shared memory behind it.
        let emptied = unsafe { madvise(region.base, region.len, MmapAdvise::MADV_REMOVE) };
        // A region that cannot be emptied is leaked, rather than shown to another session.
        if closed.is_ok() && emptied.is_ok() {
            RETIRED
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(region);
        }
    }
}

/// Addresses that are ours for ever, with a guard of [`PAGES`] bytes behind them.
#[derive(Debug)]
struct Region {
    base: NonNull<c_void>,
    /// Without the guard.
    len: usize,
}

// SAFETY: the memory belongs to the process, not to a thread, and a region has one owner.
unsafe impl Send for Region {}

impl Region {
    fn new(capacity: usize) -> io::Result<Self> {
        let whole = || {
            let len = capacity.checked_next_multiple_of(PAGES)?;
            Some((len, NonZeroUsize::new(len.checked_add(PAGES)?)?))
        };
        let (len, whole) = whole().ok_or(io::ErrorKind::OutOfMemory)?;
        // Shared, because the file writes even where there is no access if the memory is private.
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe { mmap_anonymous(None, whole, ProtFlags::PROT_NONE, flags) }?;
        Ok(Self { base, len })
    }
}
