//! When a process of the command is one that minds signals: also for the soak.

use std::{fs, thread, time::Duration};

/// Counted in looks, not by the clock: two minutes of a machine that does not stand still.
const LOOKS: u32 = 60_000;
const LOOK: Duration = Duration::from_millis(2);

/// Waits until a process is the command and has blocked SIGINT, as it does first of all; or has ended. A
/// signal before that ends whoever is to become the command: a shell, or the child of a fork, and both
/// block signals for a moment, too.
pub fn until_minded(id: u32) {
    for _ in 0..LOOKS {
        // One that has been waited for has no file there.
        let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        let blocked = field("SigBlk:").and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
        let named = field("Name:").is_some_and(|name| name.trim() == "vfio-migrate");
        let over = field("State:").is_none_or(|state| state.trim_start().starts_with(['Z', 'X']));
        // SIGINT is number 2.
        if over || named && blocked.is_some_and(|mask| mask & 0b10 != 0) {
            return;
        }
        thread::sleep(LOOK);
    }
    panic!("process {id} never minds signals");
}
