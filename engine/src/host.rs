//! The host's limits, and memory that may be refused.
//!
//! If a setting, a device or a peer chooses a size, the memory is allocated here, or as an arena. Missing
//! memory is [`ErrorKind::Host`](crate::ErrorKind::Host), an error that says what the memory was for. Plain
//! calls on the caller's thread; none waits.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::resource::{RLIM_INFINITY, Resource, getrlimit},
};

use crate::{
    arena::{self, NoMemory},
    error::{Error, Phase, Result},
};

fn no_memory(what: &str) -> Error {
    Error::lacking(Phase::Setup, what, Errno::ENOMEM)
}

/// The budget that the host does not have.
pub(crate) fn no_budget(NoMemory(len): NoMemory) -> Error {
    no_memory(&format!("{len} bytes for the budget"))
}

/// Bytes that are all 0. `what` they are for follows "the host has no".
pub(crate) fn zeroed(len: usize, what: &str) -> Result<Vec<u8>> {
    let bytes = arena::zeroed(len).map_err(|_| no_memory(what))?;
    Ok(bytes.into_vec())
}

/// A vector that grows as it is written, up to `most` bytes, and may be refused.
pub(crate) struct Growing<'a> {
    bytes: &'a mut Vec<u8>,
    most: usize,
}

impl<'a> Growing<'a> {
    pub(crate) const fn new(bytes: &'a mut Vec<u8>, most: usize) -> Self {
        Self { bytes, most }
    }
}

impl Write for Growing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.most - self.bytes.len().min(self.most) {
            return Err(Errno::EFBIG.into());
        }
        let reserved = self.bytes.try_reserve(bytes.len());
        reserved.map_err(|_| io::Error::from(Errno::ENOMEM))?;
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Refuses a budget that no run on this host can have: beyond what the process may map
/// (`RLIMIT_AS`, `RLIMIT_DATA`), what its cgroup may use, or memory and swap together. Whether the host
/// has as much to spare is only seen when it is allocated.
pub(crate) fn check_budget(budget: usize) -> Result<()> {
    let budget = budget as u64;
    let limits = [
        ("RLIMIT_AS", limit(Resource::RLIMIT_AS)),
        ("RLIMIT_DATA", limit(Resource::RLIMIT_DATA)),
        ("its cgroup's limit", cgroup()),
        ("all memory and swap", memory_and_swap()),
    ];
    for (name, limit) in limits {
        if limit.is_some_and(|limit| budget > limit) {
            let what = format!("{budget} bytes for the budget: more than {name}");
            return Err(no_memory(&what));
        }
    }
    Ok(())
}

fn limit(resource: Resource) -> Option<u64> {
    let (soft, _) = getrlimit(resource).ok()?;
    (soft != RLIM_INFINITY).then_some(soft)
}

/// `MemTotal` and `SwapTotal`. Where there is no such file, the allocation tells.
fn memory_and_swap() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let value = |name| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let number = line.trim_start_matches(':').trim().trim_end_matches(" kB");
        number.parse::<u64>().ok()?.checked_mul(1024)
    };
    value("MemTotal")?.checked_add(value("SwapTotal").unwrap_or(0))
}

/// The lowest limit of the cgroups (version 2) that the process is in.
fn cgroup() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    lowest(Path::new("/sys/fs/cgroup"), own)
}

/// The lowest `memory.max` from `own` up to `root`.
fn lowest(root: &Path, own: &str) -> Option<u64> {
    let mut folder: PathBuf = root.join(own);
    let mut least = None;
    // Ends: each round goes one folder up, to the root at the most.
    while folder.starts_with(root) {
        let text = fs::read_to_string(folder.join("memory.max"));
        let here = text.ok().and_then(|text| text.trim().parse::<u64>().ok());
        least = least.into_iter().chain(here).min();
        if !folder.pop() {
            break;
        }
    }
    least
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn what_there_is_not_is_an_error_that_names_it() {
        let error = zeroed(1 << 50, "buffer").unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::Host);
        assert_eq!(error.raw_os_error(), Some(Errno::ENOMEM as i32));
        assert_eq!(error.to_string(), "setup: the host has no buffer (ENOMEM)");
        let error = check_budget(usize::MAX).unwrap_err();
        assert!(error.to_string().contains("for the budget"), "{error}");
        check_budget(1 << 20).unwrap();
    }

    #[test]
    fn what_grows_stops_at_its_bound() {
        let mut bytes = Vec::new();
        let mut growing = Growing::new(&mut bytes, 5);
        growing.write_all(b"abc").unwrap();
        let error = growing.write_all(b"def").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::EFBIG as i32));
        growing.write_all(b"de").unwrap();
        growing.flush().unwrap();
        assert_eq!(bytes, b"abcde");
    }
}
