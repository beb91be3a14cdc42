//! What is left of a session in the process: a test that asks must be alone in it, or take turns.

/// The engine's threads and the process's open files. (The test harness has threads of its own.)
pub fn leftovers() -> (usize, usize) {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let engine = tasks.filter_map(Result::ok).filter(|task| {
        let name = std::fs::read_to_string(task.path().join("comm"));
        name.is_ok_and(|name| name.starts_with("vfio-mig") || name.starts_with("uring-"))
    });
    let files = std::fs::read_dir("/proc/self/fd").unwrap();
    (engine.count(), files.count())
}
