//! Data fds whose writes sleep in the kernel, as those into slow firmware do.
//!
//! ```text
//!   write(2) ─▶ FUSE, without the page cache ─▶ server: takes the bytes ─▶ the file's thread: waits ─▶ answers
//!      └─────────────────────────── sleeps in the kernel ───────────────────────────────────────────────┘
//! ```
//!
//! Each write of up to 1 MiB is one request. A file has a thread, so that one file's wait is not another's. The file
//! system is unmounted as soon as its files are open: they keep it alive, and nothing is left behind whatever becomes
//! of this process. Mounting asks for root.

use std::{
    env,
    ffi::OsStr,
    fs::{self, OpenOptions},
    io, process,
    sync::{
        atomic::{AtomicU32, Ordering::Relaxed},
        mpsc::{self, Sender},
    },
    thread,
    time::{Duration, Instant, UNIX_EPOCH},
};

use fuser::{
    FileAttr, FileType, Filesystem, KernelConfig, MountOption, ReplyAttr, ReplyEntry, ReplyOpen,
    ReplyWrite, Request,
};
use nix::{
    errno::Errno,
    mount::{MntFlags, umount2},
};

use crate::sink::Sink;

/// How slowly a file takes bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    /// What each MiB takes.
    pub for_each_mib: Duration,
    /// So many bytes are quick, before the others are not.
    pub quick: u64,
    /// How long its first write stands.
    pub stands: Duration,
}

/// The most that one request carries, as far as the kernel allows.
const REQUEST: u32 = 1 << 20;
const TTL: Duration = Duration::from_secs(3600);
/// The kernel's number for the root, and the first file's.
const ROOT: u64 = 1;
const FIRST: u64 = 2;
/// The kernel's flag: no page cache.
const DIRECT: u32 = 1;

/// A write whose bytes have been taken, and when it came.
type Taken = (ReplyWrite, u32, Instant);

/// The server: each file's thread.
struct Files(Vec<Sender<Taken>>);

/// One file's thread: until the server ends.
fn answer(writes: &mpsc::Receiver<Taken>, pace: Pace) {
    let mut taken = 0;
    for (reply, len, came) in writes {
        let mut takes = Duration::ZERO;
        if taken == 0 {
            takes += pace.stands;
        }
        taken += u64::from(len);
        if taken > pace.quick {
            takes += pace.for_each_mib * len / (1 << 20);
        }
        thread::sleep((came + takes).saturating_duration_since(Instant::now()));
        reply.written(len);
    }
}

impl Files {
    fn attr(&self, ino: u64) -> Option<FileAttr> {
        let is_root = ino == ROOT;
        let last = FIRST + self.0.len() as u64;
        (is_root || (FIRST..last).contains(&ino)).then_some(FileAttr {
            ino,
            size: 0,
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_root {
                FileType::Directory
            } else {
                FileType::RegularFile
            },
            perm: 0o700,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

impl Filesystem for Files {
    fn init(&mut self, _: &Request<'_>, config: &mut KernelConfig) -> Result<(), i32> {
        // Where the kernel allows less, a write takes several requests.
        let _less = config.set_max_write(REQUEST);
        Ok(())
    }

    fn lookup(&mut self, _: &Request<'_>, _parent: u64, name: &OsStr, reply: ReplyEntry) {
        let number = name.to_str().and_then(|name| name.parse::<u64>().ok());
        match number.and_then(|number| self.attr(FIRST + number)) {
            Some(attr) => reply.entry(&TTL, &attr, 0),
            None => reply.error(Errno::ENOENT as i32),
        }
    }

    fn getattr(&mut self, _: &Request<'_>, ino: u64, _fh: Option<u64>, reply: ReplyAttr) {
        match self.attr(ino) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(Errno::ENOENT as i32),
        }
    }

    fn open(&mut self, _: &Request<'_>, _ino: u64, _flags: i32, reply: ReplyOpen) {
        reply.opened(0, DIRECT);
    }

    fn write(
        &mut self,
        _: &Request<'_>,
        ino: u64,
        _fh: u64,
        _offset: i64,
        data: &[u8],
        _write_flags: u32,
        _flags: i32,
        _lock_owner: Option<u64>,
        reply: ReplyWrite,
    ) {
        let len = u32::try_from(data.len()).expect("a request is small");
        let at = usize::try_from(ino - FIRST).expect("few files");
        let sent = self.0[at].send((reply, len, Instant::now()));
        sent.expect("a file's thread lives as long as the server");
    }
}

/// Data fds with these paces.
///
/// # Errors
///
/// The kernel's: most of all, that nothing may be mounted here.
pub fn sinks(paces: &[Pace]) -> io::Result<Vec<Sink>> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    // Relaxed: the number is all there is.
    let number = NUMBER.fetch_add(1, Relaxed);
    let place = env::temp_dir().join(format!("vfio-migration-slow-{}-{number}", process::id()));
    fs::create_dir(&place)?;
    let mut files = Vec::new();
    for &pace in paces {
        let (sender, writes) = mpsc::channel();
        thread::spawn(move || answer(&writes, pace));
        files.push(sender);
    }
    let options = [MountOption::FSName("vfio-migration-slow".to_owned())];
    let opened = fuser::spawn_mount2(Files(files), &place, &options).and_then(|mounted| {
        let open = |at| {
            let path = place.join(usize::to_string(&at));
            OpenOptions::new().write(true).open(path).map(Sink::over)
        };
        let sinks = (0..paces.len()).map(open).collect();
        // Its name goes now, the rest with the last file; the server ends then.
        umount2(&place, MntFlags::MNT_DETACH)?;
        drop(mounted);
        sinks
    });
    fs::remove_dir(&place)?;
    opened
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_write_takes_what_the_pace_says() {
        let pace = Pace {
            for_each_mib: Duration::from_millis(20),
            quick: 1 << 20,
            stands: Duration::from_millis(200),
        };
        let sinks = match sinks(&[pace, Pace::default()]) {
            Ok(sinks) => sinks,
            Err(error) => return eprintln!("left out: {error}"),
        };
        let takes = |at: usize| {
            let since = Instant::now();
            sinks[at].file().unwrap().write_all(&[7; 1 << 20]).unwrap();
            since.elapsed()
        };
        assert!(takes(0) >= pace.stands);
        assert!(takes(0) >= pace.for_each_mib);
        // Whoever is not slow answers, while others may be.
        takes(1);
    }
}
