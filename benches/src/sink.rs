//! Where the bytes go, and where they come from: data fds, and a device over one.
//!
//! ```text
//!   Memfd       written from its front, rewound before each round: its pages are there already
//!   PlainWrite  /proc/self/mem over memory of ours: a file with a plain write, as VFIO's
//!   Null        /dev/null
//!   Pipe        drained by a thread into one buffer
//! ```
//!
//! Every contender writes to (a duplicate of) the same fd, so the file, its pages and its position
//! are the same for all.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
};

use nix::{
    fcntl::{FcntlArg, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};
use serde::{Deserialize, Serialize};
use vfio_migration::{Device, DeviceId, FdDevice};

use crate::measure::Mark;

/// What kind of file a data fd is.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Kind {
    /// A memfd.
    Memfd,
    /// A file that has a plain write and nothing else, as VFIO's has.
    PlainWrite,
    /// `/dev/null`.
    Null,
    /// A pipe that a thread drains.
    Pipe,
}

/// A data fd.
#[derive(Debug)]
pub struct Sink {
    file: File,
    start: Option<u64>,
    /// The memory behind a plain-write file. Written by the kernel alone.
    _memory: Option<Arc<[AtomicU64]>>,
    /// Ends when the last duplicate of the pipe's write end is closed.
    _drain: Option<JoinHandle<()>>,
}

impl Sink {
    /// Makes one that takes `capacity` bytes, whose pages are all there.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn new(kind: Kind, capacity: usize) -> io::Result<Self> {
        let mut sink = Self::over(File::options().write(true).open("/dev/null")?);
        match kind {
            Kind::Null => {}
            Kind::Memfd => {
                sink.file = memfd(capacity)?;
                sink.start = Some(0);
            }
            Kind::PlainWrite => {
                let memory: Arc<[AtomicU64]> = (0..capacity.div_ceil(8).max(1))
                    .map(|_| AtomicU64::new(1))
                    .collect();
                sink.file = OpenOptions::new().write(true).open("/proc/self/mem")?;
                sink.start = Some(memory.as_ptr().addr() as u64);
                sink._memory = Some(memory);
            }
            Kind::Pipe => {
                let (mut reader, writer) = io::pipe()?;
                fcntl(&writer, FcntlArg::F_SETPIPE_SZ(1 << 20))?;
                sink.file = File::from(OwnedFd::from(writer));
                sink._drain = Some(thread::spawn(move || {
                    let mut buffer = vec![0; 1 << 20];
                    while reader.read(&mut buffer).is_ok_and(|count| count > 0) {}
                }));
            }
        }
        sink.rewind()?;
        Ok(sink)
    }

    /// One over a file that is written on and on.
    #[must_use]
    pub const fn over(file: File) -> Self {
        Self {
            file,
            start: None,
            _memory: None,
            _drain: None,
        }
    }

    /// One for each of `count` devices.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn several(kind: Kind, count: u32, capacity: usize) -> io::Result<Vec<Self>> {
        (0..count).map(|_| Self::new(kind, capacity)).collect()
    }

    /// Goes back to the front.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn rewind(&self) -> io::Result<()> {
        if let Some(start) = self.start {
            (&self.file).seek(SeekFrom::Start(start))?;
        }
        Ok(())
    }

    /// Another fd of the same file, with the same position.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn file(&self) -> io::Result<File> {
        self.file.try_clone()
    }
}

impl AsFd for Sink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A memfd with `len` bytes in it, none of them a hole.
fn memfd(len: usize) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"benches", MFdFlags::MFD_CLOEXEC)?);
    let block = vec![0x5a; 1 << 20];
    let mut left = len;
    while left > 0 {
        let count = left.min(block.len());
        file.write_all(&block[..count])?;
        left -= count;
    }
    Ok(file)
}

/// What a device has to tell of its migration.
#[derive(Debug, Default)]
pub struct Ended {
    loaded: Mutex<Option<Mark>>,
    reset: Mutex<Option<Mark>>,
}

impl Ended {
    fn set(place: &Mutex<Option<Mark>>) {
        let mark = Mark::now();
        *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(mark);
    }

    fn get(place: &Mutex<Option<Mark>>) -> Option<Mark> {
        *place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When its config was asked to be loaded, which is as soon as its last byte has been written
    /// and its thread is awake.
    #[must_use]
    pub fn loaded(&self) -> Option<Mark> {
        Self::get(&self.loaded)
    }

    /// When it was reset, which is as soon as its transfer has been given up and its thread is
    /// awake.
    #[must_use]
    pub fn reset(&self) -> Option<Mark> {
        Self::get(&self.reset)
    }
}

/// A device whose data fd is `sink`, and what it will have to tell.
///
/// # Panics
///
/// Where the file cannot be duplicated.
pub fn device(id: &DeviceId, sink: &Sink, size: usize) -> (Device, Arc<Ended>) {
    let ended = Arc::new(Ended::default());
    let (loads, resets) = (ended.clone(), ended.clone());
    let (mut file, start) = (sink.file().expect("an fd can be duplicated"), sink.start);
    let inner = FdDevice::new(move |_state| {
        if let Some(start) = start {
            file.seek(SeekFrom::Start(start))?;
        }
        Ok(file.try_clone()?.into())
    })
    .with_data_size(move || Ok(size as u64))
    .with_config(
        |_writer| Ok(()),
        move |_reader| {
            Ended::set(&loads.loaded);
            Ok(())
        },
    )
    .on_reset(move || {
        Ended::set(&resets.reset);
        Ok(())
    });
    let device = Device::new(id.clone(), Box::new(inner)).expect("it can STOP_COPY");
    (device, ended)
}

/// Whether the memory behind a plain-write sink holds anything but what it was made with.
#[must_use]
pub fn was_written(sink: &Sink) -> bool {
    sink._memory
        .as_ref()
        // Relaxed: whoever wrote has been waited for.
        .is_some_and(|memory| memory.iter().any(|word| word.load(Relaxed) != 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_takes_its_capacity_again_and_again() {
        for kind in [Kind::Memfd, Kind::PlainWrite, Kind::Null, Kind::Pipe] {
            let sink = Sink::new(kind, 1 << 16).unwrap();
            for _ in 0..3 {
                sink.rewind().unwrap();
                sink.file().unwrap().write_all(&[7; 1 << 16]).unwrap();
            }
            assert_eq!(was_written(&sink), kind == Kind::PlainWrite);
        }
    }
}
