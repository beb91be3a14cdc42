//! The spill file: packets go there when the budget is spent, on channels that must not wait.
//!
//! ```text
//!   file:    [ chunk 0 │ chunk 1 │ chunk 2 │ chunk 3 │ … ]       64 KiB each, up to the limit
//!              └──────────────────▲ └────── free
//!   chain:     0 ─▶ 2              which chunks are one packet's, in their order
//! ```
//!
//! A packet takes as many chunks as it needs, wherever they are. So gaps between packets waste no space,
//! and the chunk map takes 8 bytes for each chunk that was ever in use. The lowest free chunks are taken
//! first, and neighbouring chunks are written and read with one call. A chunk is free again when its packet
//! has been read back. The file is anonymous and disappears with the session.
//!
//! | who | does |
//! |---|---|
//! | a channel | [`SpillFile::allocate`], then writes, then publishes the number in a slot |
//! | the I/O thread | takes the number, makes the ring read from [`SpillExtent::locate`], drops the extent |
//!
//! The lock protects only the chunk map. It is never held over a call, and only spilled packets take it.
//! The slot's publish edge orders the bytes; the file keeps them in between.

use std::{
    collections::BTreeSet,
    fmt, io, mem,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sys::{
        memfd::{MFdFlags, memfd_create},
        stat::Mode,
        uio::pwrite,
    },
    unistd::unlink,
};
use vfio_migration_uring::Fd;

use crate::{
    reorder::slot::Payload,
    stats::{Counter, SpillStats},
    sync::{Arc, Mutex, lock},
};

/// The unit of space.
const CHUNK: usize = 64 << 10;

/// How many bits of a packet's number are its length.
const LEN_BITS: u32 = 32;

/// The most chunks: what a number has room for. 8 TiB.
const MAX_CHUNKS: u64 = 1 << 27;

const _: () = assert!(MAX_CHUNKS << LEN_BITS == Payload::ASIDE_MAX + 1);

/// The most bytes.
pub(crate) const MAX_LIMIT: u64 = MAX_CHUNKS * CHUNK as u64;

/// How much of a packet is in memory at a time on its way to the file, and on its way back.
pub(crate) const BOUNCE: usize = CHUNK;

/// What the chunk map of a file of so many bytes takess: behind each chunk the next one, and the set of the
/// free.
pub(crate) const fn chunk_map(limit: u64) -> u64 {
    limit / CHUNK as u64 * 32
}

/// No chunk.
const NIL: u32 = u32::MAX;

/// A file for packets.
pub(crate) struct SpillFile {
    file: Fd,
    chunk_map: Mutex<ChunkMap>,
    /// In chunks.
    limit: u32,
    packets: Counter,
    written: Counter,
    read: Counter,
    held_high: Counter,
}

/// Which chunk is whose.
#[derive(Default)]
struct ChunkMap {
    /// Behind each chunk the next one of its packet.
    next: Vec<u32>,
    free: BTreeSet<u32>,
    used: u32,
}

impl ChunkMap {
    /// Takes a chunk. There is one.
    fn take(&mut self) -> u32 {
        let fresh = u32::try_from(self.next.len()).expect("below MAX_CHUNKS");
        let chunk = self.free.pop_first().unwrap_or_else(|| {
            self.next.push(NIL);
            fresh
        });
        self.next[chunk as usize] = NIL;
        self.used += 1;
        chunk
    }
}

impl SpillFile {
    /// Makes one of up to `limit` bytes: in `directory`, where no other process finds it, or in
    /// memory.
    pub(crate) fn new(directory: Option<&Path>, limit: u64) -> io::Result<Self> {
        let file = match directory {
            Some(directory) => anonymous(directory)?,
            None => memfd_create(c"vfio-mig-spill", MFdFlags::MFD_CLOEXEC)?,
        };
        let limit = (limit / CHUNK as u64).min(MAX_CHUNKS);
        Ok(Self::over(file, u32::try_from(limit).expect("27 bits")))
    }

    fn over(file: OwnedFd, limit: u32) -> Self {
        Self {
            file: Fd::new(file),
            chunk_map: Mutex::new(ChunkMap::default()),
            limit,
            packets: Counter::default(),
            written: Counter::default(),
            read: Counter::default(),
            held_high: Counter::default(),
        }
    }

    /// Space for a packet of `len` bytes, if there is as much.
    pub(crate) fn allocate(file: &Arc<Self>, len: usize) -> Option<SpillExtent> {
        let count = u32::try_from(len.div_ceil(CHUNK)).ok()?;
        let len = u32::try_from(len).ok().filter(|&len| len > 0)?;
        let mut chunk_map = lock(&file.chunk_map);
        if count > file.limit - chunk_map.used {
            return None;
        }
        let first = chunk_map.take();
        let mut last = first;
        for _ in 1..count {
            let chunk = chunk_map.take();
            chunk_map.next[last as usize] = chunk;
            last = chunk;
        }
        file.held_high
            .raise(u64::from(chunk_map.used) * CHUNK as u64);
        drop(chunk_map);
        Some(SpillExtent {
            file: file.clone(),
            first,
            len,
        })
    }

    /// Takes over the packet of [`SpillExtent::into_number`].
    pub(crate) fn adopt(file: &Arc<Self>, number: u64) -> SpillExtent {
        let half = |value: u64| u32::try_from(value).expect("59 bits, 32 of them the length");
        SpillExtent {
            file: file.clone(),
            first: half(number >> LEN_BITS),
            len: half(number & u64::from(u32::MAX)),
        }
    }

    /// For the ring to read from.
    pub(crate) const fn fd(&self) -> &Fd {
        &self.file
    }

    /// Counts bytes that have been read back.
    pub(crate) fn read_back(&self, len: usize) {
        self.read.add(len as u64);
    }

    /// The counters, as they are now.
    pub(crate) fn snapshot(&self) -> SpillStats {
        SpillStats {
            limit: u64::from(self.limit) * CHUNK as u64,
            packets: self.packets.get(),
            written: self.written.get(),
            read: self.read.get(),
            held: u64::from(lock(&self.chunk_map).used) * CHUNK as u64,
            held_high: self.held_high.get(),
        }
    }
}

impl fmt::Debug for SpillFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SpillFile")
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

/// A file without a name in `directory`.
fn anonymous(directory: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    match open(directory, flags | OFlag::O_TMPFILE, mode) {
        // A file system that cannot: for a moment the file has a name that nobody else takes.
        Err(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::ENOENT) => {}
        opened => return Ok(opened?),
    }
    let mut number = 0;
    loop {
        let name = format!(".vfio-mig-spill-{}-{number}", std::process::id());
        let path = directory.join(name);
        match open(&path, flags | OFlag::O_CREAT | OFlag::O_EXCL, mode) {
            Err(Errno::EEXIST) if number < 1000 => number += 1,
            opened => {
                let file = opened?;
                unlink(&path)?;
                return Ok(file);
            }
        }
    }
}

/// A packet's space in the file, owned. Dropping it gives it back.
#[must_use = "dropping it at once gives the space back unused"]
pub(crate) struct SpillExtent {
    file: Arc<SpillFile>,
    first: u32,
    len: u32,
}

impl SpillExtent {
    /// How many bytes the packet has.
    pub(crate) const fn size(&self) -> usize {
        self.len as usize
    }

    /// The file that it is in.
    pub(crate) const fn file(&self) -> &Arc<SpillFile> {
        &self.file
    }

    /// Where the packet's byte `at` is in the file, and how many bytes there follow one another.
    pub(crate) fn locate(&self, at: usize) -> (u64, usize) {
        assert!(at < self.size(), "a byte of the packet");
        let chunk_map = lock(&self.file.chunk_map);
        let next = |chunk: u32| chunk_map.next[chunk as usize];
        let mut chunk = self.first;
        for _ in 0..at / CHUNK {
            chunk = next(chunk);
        }
        let offset = u64::from(chunk) * CHUNK as u64 + (at % CHUNK) as u64;
        let mut run = CHUNK - at % CHUNK;
        while at + run < self.size() && next(chunk) == chunk + 1 {
            chunk += 1;
            run += CHUNK;
        }
        (offset, run.min(self.size() - at))
    }

    /// Writes bytes of the packet from its byte `at` on. Waits for the file, where that is slow.
    pub(crate) fn write(&self, mut at: usize, mut bytes: &[u8]) -> io::Result<()> {
        // Each round writes a byte at least, or ends.
        while !bytes.is_empty() {
            let (offset, run) = self.locate(at);
            let offset = i64::try_from(offset).map_err(|_| Errno::EFBIG)?;
            match pwrite(
                self.file.file.as_fd(),
                &bytes[..run.min(bytes.len())],
                offset,
            ) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    bytes = &bytes[count..];
                    at += count;
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// The packet as a number for a slot, written and whole. [`SpillFile::adopt`] takes it back.
    pub(crate) fn into_number(mut self) -> u64 {
        self.file.packets.add(1);
        self.file.written.add(u64::from(self.len));
        // The number stands for the space from here on.
        let first = mem::replace(&mut self.first, NIL);
        u64::from(first) << LEN_BITS | u64::from(self.len)
    }
}

impl Drop for SpillExtent {
    fn drop(&mut self) {
        // Nothing to do where a number stands for it.
        let mut chunk = self.first;
        let mut chunk_map = lock(&self.file.chunk_map);
        while chunk != NIL {
            let next = mem::replace(&mut chunk_map.next[chunk as usize], NIL);
            chunk_map.free.insert(chunk);
            chunk_map.used -= 1;
            chunk = next;
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::{fs::File, os::unix::fs::FileExt};

    use super::*;

    fn spill(limit: u32) -> Arc<SpillFile> {
        let limit = u64::from(limit) * CHUNK as u64;
        Arc::new(SpillFile::new(None, limit).unwrap())
    }

    fn bytes(len: usize, seed: usize) -> Vec<u8> {
        (0..len)
            .map(|at| (at * 31 + at / 251 + seed).to_le_bytes()[0])
            .collect()
    }

    fn read(spilled: &SpillExtent) -> Vec<u8> {
        let file = File::from(spilled.file().fd().try_clone().unwrap());
        let mut bytes = vec![0; spilled.size()];
        let mut at = 0;
        while at < bytes.len() {
            let (offset, run) = spilled.locate(at);
            file.read_exact_at(&mut bytes[at..at + run], offset)
                .unwrap();
            at += run;
        }
        bytes
    }

    #[test]
    fn a_packet_comes_back_from_wherever_its_chunks_are() {
        let file = spill(8);
        let all: Vec<_> = (0..8)
            .map(|_| SpillFile::allocate(&file, CHUNK).unwrap())
            .collect();
        assert!(SpillFile::allocate(&file, 1).is_none(), "it is full");
        // Gaps of one chunk and of two.
        let mut kept = all;
        for gap in [6, 5, 3, 0] {
            drop(kept.remove(gap));
        }
        let len = 3 * CHUNK + 77;
        let spilled = SpillFile::allocate(&file, len).unwrap();
        assert_eq!(spilled.locate(0), (0, CHUNK));
        assert_eq!(spilled.locate(CHUNK + 5).1, CHUNK - 5);
        assert_eq!(spilled.locate(2 * CHUNK), (5 * CHUNK as u64, CHUNK + 77));
        let (first, rest) = (bytes(len, 1), 100_000);
        spilled.write(0, &first[..rest]).unwrap();
        spilled.write(rest, &first[rest..]).unwrap();
        let spilled = SpillFile::adopt(&file, spilled.into_number());
        assert_eq!(read(&spilled), first);
        drop(spilled);
        drop(kept);
        let stats = file.snapshot();
        assert_eq!((stats.held, stats.held_high), (0, 8 * CHUNK as u64));
        assert_eq!((stats.packets, stats.written), (1, len as u64));
        assert_eq!(
            SpillFile::allocate(&file, 8 * CHUNK).unwrap().size(),
            8 * CHUNK
        );
    }

    #[test]
    fn more_than_the_limit_and_nothing_have_no_space() {
        let file = spill(2);
        assert!(SpillFile::allocate(&file, 2 * CHUNK + 1).is_none());
        assert!(SpillFile::allocate(&file, 0).is_none());
        assert!(SpillFile::allocate(&file, usize::MAX).is_none());
        assert_eq!(file.snapshot().held, 0);
    }

    #[test]
    fn a_file_in_a_directory_has_no_name() {
        let directory = std::env::temp_dir().join(format!("spill-{}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        let file = Arc::new(SpillFile::new(Some(&directory), 1 << 20).unwrap());
        assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 0);
        let spilled = SpillFile::allocate(&file, 10).unwrap();
        spilled.write(0, b"0123456789").unwrap();
        assert_eq!(read(&spilled), b"0123456789");
        std::fs::remove_dir(&directory).unwrap();
        assert!(SpillFile::new(Some(&directory), 1).is_err());
    }

    #[test]
    fn what_the_file_says_is_told() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let file = Arc::new(SpillFile::over(full.into(), 4));
        let spilled = SpillFile::allocate(&file, 10).unwrap();
        let error = spilled.write(0, b"0123456789").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::ENOSPC as i32));
    }
}
