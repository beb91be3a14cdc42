//! Breaks the shipped hand-overs, one place at a time, and runs the models that should notice.
//!
//! ```text
//!   sources ──copy──▶ target/mutants/tree ──one change──▶ build ──▶ models of that module
//!                                                                     │ red, or hang: killed
//!                                                                     └ green: survived
//! ```
//!
//! Orderings and fences are found in the text; the rest is a table. A survivor is explained in the
//! table below it and in the header of its module, or it fails the run.

use std::{
    fs, io,
    ops::Range,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::{cargo_test, workspace};

/// How long the models of one mutant may take: more is a hang, and as good as red.
const PATIENCE: Duration = Duration::from_secs(150);

/// The modules, and the models that should notice a change in them.
const MODULES: &[(&str, &[&str])] = &[
    ("reorder/slot.rs", &["slot", "inbox"]),
    ("reorder/pool.rs", &["pool"]),
    ("reorder/table.rs", &["table", "inbox"]),
    ("reorder/cursor.rs", &["inbox", "doorbell"]),
    ("reorder/queue.rs", &["queue"]),
    ("reorder/doorbell.rs", &["doorbell"]),
    ("reorder/waiters.rs", &["waiters", "queue"]),
    ("reorder/control.rs", &["control"]),
    ("router.rs", &["router"]),
    ("stats.rs", &["stats"]),
];

/// A change that is not an ordering: in which module, what it is, what to find, what to put there.
type Change = (&'static str, &'static str, &'static str, &'static str);

const CHANGES: &[Change] = &[
    (
        "reorder/slot.rs",
        "take swaps instead of exchanging",
        "match self\n            .word\n            .compare_exchange(seen.0, seen.taken().0, Acquire, Relaxed)\n        {",
        "match Ok::<u64, u64>(self.word.swap(seen.taken().0, Acquire)) {",
    ),
    (
        "reorder/slot.rs",
        "publish swaps instead of exchanging",
        "match self.word.compare_exchange(from.0, ready.0, Release, Relaxed) {",
        "let _ = from; match Ok::<u64, u64>(self.word.swap(ready.0, Release)) {",
    ),
    (
        "reorder/slot.rs",
        "a stranger may follow a piece that was taken",
        "self.exchange(Word::EMPTY, packet)",
        "match self.exchange(Word::EMPTY, packet) { Publish::Duplicate(packet) => self.exchange(Word::DRAINED, packet), other => other }",
    ),
    (
        "reorder/pool.rs",
        "push does not move the tag",
        "head.tag().wrapping_add(1)",
        "head.tag()",
    ),
    (
        "reorder/pool.rs",
        "a reserve is taken by a swap",
        ".compare_exchange(0, 1, Acquire, Relaxed)\n            .ok()?;",
        ".swap(1, Acquire);",
    ),
    (
        "reorder/pool.rs",
        "a packer starts again beside others' packets",
        "if current.used > 0 && holders.load(Acquire) == 1 {",
        "if current.used > 0 && holders.load(Acquire) <= 2 {",
    ),
    (
        "reorder/pool.rs",
        "a buffer goes back before its last packet",
        "if before == 1 && index",
        "if before <= 2 && index",
    ),
    (
        "reorder/table.rs",
        "a segment is freed at once",
        "unsafe { guard.defer_destroy(head) };",
        "unsafe { drop(head.into_owned()) };",
    ),
    (
        "reorder/table.rs",
        "closing leaves no mark",
        "Shared::null().with_tag(CLOSED),",
        "Shared::null(),",
    ),
    (
        "reorder/table.rs",
        "a segment is retired with its first packet",
        "if segment.remaining.fetch_sub(1, AcqRel) == 1 {",
        "if segment.remaining.swap(0, AcqRel) > 0 {",
    ),
    (
        "reorder/cursor.rs",
        "admit stores instead of exchanging",
        "match self\n                .extent\n                .compare_exchange_weak(seen, grown.0, Relaxed, Relaxed)\n            {",
        "match Ok::<u64, u64>(self.extent.swap(grown.0, Relaxed)) {",
    ),
    (
        "reorder/cursor.rs",
        "a publisher takes back what the driver waits for",
        "self.starved.load(Relaxed) == u64::from(index)",
        "self.starved.swap(NONE, Relaxed) == u64::from(index)",
    ),
    (
        "reorder/cursor.rs",
        "the driver does not look again before it sleeps",
        ".is_some_and(|slot| slot.is_ready())",
        ".is_some_and(|_| false)",
    ),
    (
        "reorder/cursor.rs",
        "a piece ends its slot",
        "if !packet.more {",
        "if true {",
    ),
    (
        "reorder/queue.rs",
        "a ticket is taken by a swap",
        "if self\n                .head\n                .compare_exchange(ticket, ticket + 1, Relaxed, Relaxed)\n                .is_err()\n            {",
        "if self.head.swap(ticket + 1, Relaxed) != ticket && false {",
    ),
    (
        "reorder/queue.rs",
        "publish does not notify",
        "self.waiters.notify_one();",
        "",
    ),
    (
        "reorder/queue.rs",
        "the end is told to one",
        "Release);\n        self.waiters.notify_all();",
        "Release);\n        self.waiters.notify_one();",
    ),
    (
        "reorder/queue.rs",
        "closing does not notify",
        "self.table.close(guard, abandon);\n        self.waiters.notify_all();",
        "self.table.close(guard, abandon);",
    ),
    (
        "reorder/doorbell.rs",
        "the driver does not say that it sleeps",
        "self.asleep.store(true, Relaxed);",
        "",
    ),
    (
        "reorder/waiters.rs",
        "no look under the lock",
        "let mut bound_passed = false;",
        "let mut bound_passed = false; let mut first = true; let mut look = || if std::mem::take(&mut first) { None } else { look() };",
    ),
    (
        "reorder/waiters.rs",
        "notify_all does not pass through the lock",
        "drop(lock(&self.lock));\n            self.condvar.notify_all();",
        "self.condvar.notify_all();",
    ),
    (
        "reorder/waiters.rs",
        "notify_one does not pass through the lock",
        "drop(lock(&self.lock));\n            self.condvar.notify_one();",
        "self.condvar.notify_one();",
    ),
    (
        "reorder/waiters.rs",
        "notify_all notifies one",
        "self.condvar.notify_all();",
        "self.condvar.notify_one();",
    ),
    (
        "reorder/waiters.rs",
        "a waiter does not say that it waits",
        "self.waiting.fetch_add(1, Relaxed);",
        "self.waiting.fetch_add(0, Relaxed);",
    ),
    (
        "reorder/control.rs",
        "a flag is set by a load and a store",
        "let before = self.word.fetch_or(flag, AcqRel);",
        "let before = self.word.load(Acquire); self.word.store(before | flag, std::sync::atomic::Ordering::Release);",
    ),
    (
        "reorder/control.rs",
        "a flag is set without a notice",
        "self.changed.notify_all();",
        "",
    ),
    (
        "reorder/control.rs",
        "the wait for the driver does not look for a stop",
        "self.stop().map(Err)",
        "None::<Stop>.map(Err)",
    ),
    (
        "reorder/control.rs",
        "the wait for the config does not look for a stop",
        "if let Some(stop) = self.stop() {",
        "if let Some(stop) = None {",
    ),
    (
        "reorder/control.rs",
        "a stop hides the driver's result",
        "if self.is_drained() {\n                Some(Ok(()))\n            } else {\n                self.stop().map(Err)\n            }",
        "match self.stop() { Some(stop) => Some(Err(stop)), None => self.is_drained().then_some(Ok(())) }",
    ),
    (
        "router.rs",
        "a snapshot is freed at once",
        "unsafe { guard.defer_destroy(old) };",
        "unsafe { drop(old.into_owned()) };",
    ),
    (
        "router.rs",
        "insert changes without the lock",
        "let _changes = lock(&self.changes);\n        let mut map = self.snapshot(guard).to_vec();\n        let Err",
        "let mut map = self.snapshot(guard).to_vec();\n        let Err",
    ),
    (
        "stats.rs",
        "a snapshot reads in the other order",
        "let taken = self.taken.load(Acquire);\n        (self.published.get(), taken)",
        "let published = self.published.get();\n        (published, self.taken.load(Acquire))",
    ),
];

/// Survivors with their reason, by module and the name that the run prints. The reason is argued at
/// length in the module's header.
const EXPLAINED: &[(&str, &str, &str)] = &[];

/// One changed text.
struct Mutant {
    module: &'static str,
    name: String,
    text: String,
    models: &'static [&'static str],
}

/// Runs every mutant whose name holds `filter`. Returns whether no unexplained one survived.
pub(crate) fn run(filter: Option<&String>) -> bool {
    let root = workspace().join("target/mutants/tree");
    let target = workspace().join("target/mutants/build");
    copy_tree(&root).expect("the sources can be copied");
    let (mut killed, mut explained, mut survived, mut broken) = (0, 0, 0, 0);
    for mutant in mutants() {
        let title = format!("{}: {}", mutant.module, mutant.name);
        if filter.is_some_and(|filter| !title.contains(filter.as_str())) {
            continue;
        }
        let file = root.join("engine/src").join(mutant.module);
        let original = fs::read_to_string(&file).expect("it was copied");
        fs::write(&file, &mutant.text).expect("the copy can be written");
        let verdict = judge(&root, &target, mutant.models);
        fs::write(&file, original).expect("the copy can be written");
        let reason = EXPLAINED
            .iter()
            .find(|(module, name, _)| *module == mutant.module && *name == mutant.name);
        match (verdict, reason) {
            (Verdict::Killed(by), _) => {
                killed += 1;
                println!("killed    {title}  by {by}");
            }
            (Verdict::Survived, Some((_, _, reason))) => {
                explained += 1;
                println!("explained {title}  {reason}");
            }
            (Verdict::Survived, None) => {
                survived += 1;
                println!("SURVIVED  {title}");
            }
            (Verdict::DoesNotBuild, _) => {
                broken += 1;
                println!("BROKEN    {title}  does not build");
            }
        }
    }
    println!(
        "{killed} killed, {explained} survived with a reason, {survived} survived, {broken} broken"
    );
    survived == 0 && broken == 0
}

enum Verdict {
    Killed(String),
    Survived,
    DoesNotBuild,
}

/// Builds, then runs model by model, the quickest first.
fn judge(root: &Path, target: &Path, models: &[&str]) -> Verdict {
    let quiet = |command: &mut Command| {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
    };
    let mut build = cargo_test(root, target);
    build.arg("--no-run");
    for model in models {
        build.args(["--test", model]);
    }
    quiet(&mut build);
    if !build.status().expect("cargo runs").success() {
        return Verdict::DoesNotBuild;
    }
    for model in models {
        let mut test = cargo_test(root, target);
        test.args(["--test", model]);
        quiet(&mut test);
        let mut child = test.spawn().expect("cargo runs");
        let deadline = Instant::now() + PATIENCE;
        // Ends with the models, or the deadline.
        let status = loop {
            if let Some(status) = child.try_wait().expect("it is our child") {
                break Some(status);
            }
            if Instant::now() > deadline {
                // The test binary outlives its cargo: it is not waited for.
                let _gone = child.kill();
                let _reaped = child.wait();
                break None;
            }
            thread::sleep(Duration::from_millis(20));
        };
        match status {
            Some(status) if status.success() => {}
            Some(_) => return Verdict::Killed((*model).to_owned()),
            None => return Verdict::Killed(format!("{model}, which did not end")),
        }
    }
    Verdict::Survived
}

/// Every mutant of every module.
fn mutants() -> Vec<Mutant> {
    let mut all = Vec::new();
    for &(module, models) in MODULES {
        let path = workspace().join("engine/src").join(module);
        let text = fs::read_to_string(path).expect("the module is there");
        let end = text.find("#[cfg(all(test").unwrap_or(text.len());
        let mut add = |name: String, text: String| {
            all.push(Mutant {
                module,
                name,
                text,
                models,
            });
        };
        let mut start = 0;
        for (number, line) in (1..).zip(text[..end].split_inclusive('\n')) {
            let code = line.trim_start();
            let inside = line.starts_with("        ") && !line.contains("Ordering");
            if inside && !code.starts_with("//") {
                for (from, to) in weaker() {
                    for (at, _) in line.match_indices(from) {
                        // `AcqRel` holds neither of the others, nor do they hold it.
                        let at = start + at;
                        let mut changed = text.clone();
                        changed.replace_range(at..at + from.len(), to);
                        add(format!("line {number}: {from} becomes {to}"), changed);
                    }
                }
                if let Some(at) = line.find("fence(SeqCst);") {
                    let at = start + at;
                    let mut changed = text.clone();
                    changed.replace_range(at..at + "fence(SeqCst);".len(), "");
                    add(format!("line {number}: the fence is gone"), changed);
                }
            }
            start += line.len();
        }
        for &(of, name, find, replace) in CHANGES {
            if of == module {
                let found = find_code(&text[..end], find);
                let [place] = &found[..] else {
                    panic!(
                        "{module}: «{name}» must find its text once, not {}",
                        found.len()
                    );
                };
                let mut changed = text.clone();
                changed.replace_range(place.clone(), replace);
                add(name.to_owned(), changed);
            }
        }
    }
    all
}

/// Where `code` stands in `text`, however both are laid out.
fn find_code(text: &str, code: &str) -> Vec<Range<usize>> {
    let wanted: Vec<char> = code.chars().filter(|c| !c.is_whitespace()).collect();
    let have: Vec<(usize, char)> = text
        .char_indices()
        .filter(|(_, c)| !c.is_whitespace())
        .collect();
    have.windows(wanted.len())
        .filter(|window| window.iter().map(|(_, c)| c).eq(&wanted))
        .map(|window| {
            let (last, c) = window[window.len() - 1];
            window[0].0..last + c.len_utf8()
        })
        .collect()
}

/// What an ordering can be weakened to.
fn weaker() -> [(&'static str, &'static str); 5] {
    [
        ("AcqRel", "Relaxed"),
        ("AcqRel", "Acquire"),
        ("AcqRel", "Release"),
        ("Acquire", "Relaxed"),
        ("Release", "Relaxed"),
    ]
}

/// Copies what the models are built from.
fn copy_tree(to: &Path) -> io::Result<()> {
    if to.exists() {
        fs::remove_dir_all(to)?;
    }
    let from = workspace();
    for name in ["Cargo.toml", "Cargo.lock", "README.md"] {
        fs::create_dir_all(to)?;
        fs::copy(from.join(name), to.join(name))?;
    }
    for package in ["engine", "uring", "benches", "loom-tests"] {
        copy_dir(&from.join(package), &to.join(package))?;
    }
    Ok(())
}

fn copy_dir(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    let mut entries: Vec<PathBuf> = fs::read_dir(from)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<_>>()?;
    entries.sort();
    for path in entries {
        let name = path.file_name().expect("an entry has a name");
        if path.is_dir() {
            // Captures are no source.
            if name != "target" && name != "data" {
                copy_dir(&path, &to.join(name))?;
            }
        } else {
            fs::copy(&path, to.join(name))?;
        }
    }
    Ok(())
}
