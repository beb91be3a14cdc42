//! A file whose driver holds its writes: FUSE, spoken on `/dev/fuse` itself.
//!
//! ```text
//!   write(2), or the ring's worker ──▶ kernel ──▶ WRITE ──▶ the server's thread: kept
//!                                                                │ release(), or unmounted
//!                                    ◀────────── answered ◀──────┘
//! ```
//!
//! One directory, one file, direct I/O. The server's thread ends when the file system is unmounted,
//! by force if need be: then the kernel ends what it waits for. Writes are held for 45 s at most.
#![expect(unsafe_code, reason = "mount(2) and umount2(2)")]

use std::{
    ffi::CString,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::{fd::AsRawFd, unix::ffi::OsStrExt},
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, mpsc},
    thread::{self, JoinHandle},
    time::Duration,
};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const OPEN: u32 = 14;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

/// How long writes are held at most.
const PATIENCE: Duration = Duration::from_secs(45);

const ROOT: u64 = 1;
const FILE: u64 = 2;
const HEADER: usize = 40;

#[derive(Default)]
struct State {
    /// How many more are answered at once.
    passes: u32,
    /// The WRITE that is held, and how many bytes it brought.
    held: Option<(u64, u32)>,
    released: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    device: File,
}

/// A mounted file system of one file, whose writes are held until they are released.
pub struct Held {
    directory: PathBuf,
    shared: Arc<Shared>,
    /// The server's thread, and the one that would let go of the writes in the end.
    threads: Vec<JoinHandle<()>>,
    alive: Option<mpsc::Sender<()>>,
}

impl Held {
    /// Mounts it. So many writes are answered before one is held. Fails without root or `/dev/fuse`.
    pub fn mount(passes: u32) -> io::Result<Self> {
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")?;
        let directory = std::env::temp_dir().join(format!(
            "vfio-migration-held-{}-{}",
            std::process::id(),
            device.as_raw_fd()
        ));
        fs::create_dir_all(&directory)?;
        let target = CString::new(directory.as_os_str().as_bytes())?;
        let data = CString::new(format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            device.as_raw_fd()
        ))?;
        // SAFETY: all strings end with NUL and outlive the call.
        let mounted = unsafe {
            libc::mount(
                c"held".as_ptr(),
                target.as_ptr(),
                c"fuse".as_ptr(),
                libc::MS_NOSUID | libc::MS_NODEV,
                data.as_ptr().cast(),
            )
        };
        if mounted != 0 {
            let error = io::Error::last_os_error();
            let _empty = fs::remove_dir(&directory);
            return Err(error);
        }
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                passes,
                ..State::default()
            }),
            changed: Condvar::new(),
            device,
        });
        let serving = shared.clone();
        // A process cannot even abort while the kernel holds one of its threads: a test that hangs
        // would hang for ever.
        let (alive, ended) = mpsc::channel();
        let late = shared.clone();
        let watching = thread::spawn(move || {
            if ended.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
                late.release();
            }
        });
        Ok(Self {
            directory,
            shared,
            threads: vec![thread::spawn(move || serving.serve()), watching],
            alive: Some(alive),
        })
    }

    /// The file.
    pub fn file(&self) -> PathBuf {
        self.directory.join("data")
    }

    /// Returns when a write is held.
    pub fn wait_until_it_holds(&self) {
        let state = self.shared.state.lock().unwrap();
        let _held = self
            .shared
            .changed
            .wait_while(state, |state| state.held.is_none())
            .unwrap();
    }

    /// Whether a write is held.
    pub fn holds(&self) -> bool {
        self.shared.state.lock().unwrap().held.is_some()
    }

    /// Answers the write that is held, and all that come later.
    pub fn release(&self) {
        self.shared.release();
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let target = CString::new(self.directory.as_os_str().as_bytes()).unwrap();
        // By force: what waits for an answer gets ECONNABORTED.
        // SAFETY: the string ends with NUL and outlives the call.
        let _gone = unsafe { libc::umount2(target.as_ptr(), libc::MNT_FORCE) };
        // SAFETY: as above. A file that is still open keeps a mount busy, but not a detached one.
        let _gone = unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
        drop(self.alive.take());
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
        let _busy = fs::remove_dir(&self.directory);
    }
}

impl Shared {
    fn release(&self) {
        let held = {
            let mut state = self.state.lock().unwrap();
            state.released = true;
            state.held.take()
        };
        if let Some((unique, len)) = held {
            self.answer_write(unique, len);
        }
    }

    /// Answers requests until the file system has gone.
    fn serve(&self) {
        let mut buffer = vec![0; 1 << 20];
        loop {
            let len = match (&self.device).read(&mut buffer) {
                Ok(len) => len,
                // A request that was interrupted before it was read.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // ENODEV: unmounted. ECONNABORTED: by force.
                Err(_) => return,
            };
            let request = &buffer[..len];
            let opcode = number(request, 4);
            let unique = u64::from_ne_bytes(request[8..16].try_into().unwrap());
            match opcode {
                INIT => {
                    // major, minor, max_readahead, flags, max_background and threshold, max_write.
                    let mut out = vec![0; 64];
                    out[0..4].copy_from_slice(&7_u32.to_ne_bytes());
                    out[4..8].copy_from_slice(&31_u32.to_ne_bytes());
                    out[20..24].copy_from_slice(&65536_u32.to_ne_bytes());
                    self.answer(unique, 0, &out);
                }
                LOOKUP => {
                    // nodeid, generation, validity, then the attributes.
                    let mut out = FILE.to_ne_bytes().to_vec();
                    out.resize(40, 0);
                    out.extend(attributes(FILE));
                    self.answer(unique, 0, &out);
                }
                GETATTR | SETATTR => {
                    let node = u64::from_ne_bytes(request[16..24].try_into().unwrap());
                    let mut out = vec![0; 16];
                    out.extend(attributes(node));
                    self.answer(unique, 0, &out);
                }
                OPEN => {
                    let direct = 1_u32;
                    let mut out = 0_u64.to_ne_bytes().to_vec();
                    out.extend(direct.to_ne_bytes());
                    out.extend([0; 4]);
                    self.answer(unique, 0, &out);
                }
                WRITE => {
                    let len = number(request, HEADER + 16);
                    let mut state = self.state.lock().unwrap();
                    if state.released || state.passes > 0 {
                        state.passes = state.passes.saturating_sub(1);
                        drop(state);
                        self.answer_write(unique, len);
                    } else {
                        state.held = Some((unique, len));
                        drop(state);
                        self.changed.notify_all();
                    }
                }
                RELEASE | FLUSH => self.answer(unique, 0, &[]),
                // To be interrupted is just what this file does not do.
                FORGET | BATCH_FORGET | INTERRUPT => {}
                _ => self.answer(unique, -libc::ENOSYS, &[]),
            }
        }
    }

    fn answer_write(&self, unique: u64, len: u32) {
        let mut out = len.to_ne_bytes().to_vec();
        out.extend([0; 4]);
        self.answer(unique, 0, &out);
    }

    fn answer(&self, unique: u64, error: i32, body: &[u8]) {
        let len = u32::try_from(16 + body.len()).unwrap();
        let mut out = len.to_ne_bytes().to_vec();
        out.extend(error.to_ne_bytes());
        out.extend(unique.to_ne_bytes());
        out.extend(body);
        // The request may have gone meanwhile.
        let _gone = (&self.device).write(&out);
    }
}

fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// `struct fuse_attr`: 88 bytes.
fn attributes(node: u64) -> Vec<u8> {
    let mut out = node.to_ne_bytes().to_vec();
    out.resize(88, 0);
    let mode: u32 = if node == ROOT { 0o040_755 } else { 0o100_644 };
    out[60..64].copy_from_slice(&mode.to_ne_bytes());
    out[64..68].copy_from_slice(&1_u32.to_ne_bytes());
    out[80..84].copy_from_slice(&4096_u32.to_ne_bytes());
    out
}
