//! A process of a test's own in which a file takes only so many bytes: a limit on its size, or a full file system.

use std::{
    env, fs,
    io::{self, Write},
    os::unix::process::parent_id,
    path::Path,
    process::{self, Command},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::{SigSet, Signal},
    },
};

/// Set in the processes of the cases.
const CASE: &str = "VFIO_MIGRATION_NO_ROOM_CASE";

/// The page of a tmpfs.
pub const PAGE: usize = 4096;

/// Runs `case` in a process of its own, in a directory of its own. `test` is the caller's name,
/// as the harness has it.
pub fn in_a_process(test: &str, case: fn(&Path)) {
    let directory = |id| env::temp_dir().join(format!("{}-{id}", test.replace("::", "-")));
    if env::var_os(CASE).is_some() {
        return case(&directory(parent_id()));
    }
    let directory = directory(process::id());
    fs::create_dir(&directory).unwrap();
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(CASE, "")
        .output()
        .unwrap();
    fs::remove_dir_all(&directory).unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{error}");
    assert!(
        text.contains("1 passed"),
        "no test is called {test}: {text}"
    );
    if error.contains(NOT_TESTED) {
        io::stderr().write_all(error.as_bytes()).unwrap();
    }
}

const NOT_TESTED: &str = "NOT TESTED HERE";

/// Loud: this is where the machine decides what was tested.
pub fn not_tested(what: &str) {
    let text = format!("{NOT_TESTED}: {what}\n");
    io::stderr().write_all(text.as_bytes()).unwrap();
}

/// From now on no file of this process may grow beyond so many bytes, and a write there is an errno.
pub fn limit(bytes: u64) {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGXFSZ);
    signals.thread_block().unwrap();
    let (_, hard) = getrlimit(Resource::RLIMIT_FSIZE).unwrap();
    setrlimit(Resource::RLIMIT_FSIZE, bytes, hard).unwrap();
}

fn tmpfs(directory: &Path, pages: usize, again: MsFlags) -> nix::Result<()> {
    let size = format!("size={}", pages * PAGE);
    let none = None::<&str>;
    mount(none, directory, Some("tmpfs"), again, Some(size.as_str()))
}

/// Mounts a tmpfs there, in a namespace of this process, so that it is gone with it. Whether it could: that
/// takes root.
pub fn has_tmpfs(directory: &Path) -> bool {
    let own = unshare(CloneFlags::CLONE_NEWNS).and_then(|()| {
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        tmpfs(directory, 1, MsFlags::empty())
    });
    if let Err(errno) = own {
        not_tested(&format!("a full tmpfs, which needs root: {errno}"));
    }
    own.is_ok()
}

/// Gives the tmpfs so many pages.
pub fn resize(directory: &Path, pages: usize) {
    tmpfs(directory, pages, MsFlags::MS_REMOUNT).unwrap();
}

/// Bytes of pieces of these lengths, none of which looks like another nearby.
pub fn state(lens: &[usize]) -> Vec<u8> {
    let len: usize = lens.iter().sum();
    (0..len)
        .map(|at| (at * 31 + at / 251).to_le_bytes()[0])
        .collect()
}

/// Around every border of the pieces, and within.
pub fn cuts(lens: &[usize]) -> Vec<usize> {
    let mut cuts = vec![0, 1];
    let mut border = 0;
    for len in lens {
        border += len;
        cuts.extend([border - len / 2, border - 1, border, border + 1]);
    }
    cuts.retain(|cut| *cut < border);
    cuts.sort_unstable();
    cuts.dedup();
    cuts
}
