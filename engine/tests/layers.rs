//! The layers of the house hold: imports go down only, and some names belong to one file.
//!
//! Reads the sources as text. A module may name `crate::` modules of the layers below its own; the
//! modules of one line are one layer, and only the lowest may know its own.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// From the top down.
const LAYERS: &[&[&str]] = &[
    &["migration"],
    &["session", "relay"],
    &["settings"],
    &["load", "save"],
    &["channel", "driver"],
    &["lane"],
    &["device", "stream"],
    &["section"],
    &["task", "router", "spill", "wire"],
    &["reorder"],
    &["host"],
    &["arena", "stats", "trace", "verdict"],
    &["error", "id", "state", "sync", "text"],
];

/// Which files may say what.
const HOMES: &[(&str, &[&str])] = &[
    ("std::sync::atomic", &["engine/src/sync.rs"]),
    ("loom::", &["engine/src/sync.rs"]),
    ("io_uring::", &["uring/src/kernel.rs"]),
    (
        "vfio_bindings::",
        &[
            "engine/src/device/vfio/ioctl.rs",
            "engine/src/device/vfio/ioctl/tests.rs",
        ],
    ),
    ("vfio_ioctls::", &["engine/src/device/vfio/open.rs"]),
];

/// Where `unsafe` is opened.
const UNSAFE: &[&str] = &[
    "engine/src/arena.rs",
    "engine/src/device/set.rs",
    "engine/src/device/sim/mapping.rs",
    "engine/src/device/vfio/ioctl.rs",
    "engine/src/device/vfio/open.rs",
    "engine/src/reorder/pool.rs",
    "engine/src/reorder/table.rs",
    "engine/src/router.rs",
    "engine/src/sync.rs", // under loom only
    "uring/src/buffer.rs",
    "uring/src/kernel.rs",
    "uring/src/syscall.rs",
];

fn root() -> PathBuf {
    let engine = Path::new(env!("CARGO_MANIFEST_DIR"));
    engine.parent().expect("the workspace").to_path_buf()
}

/// Every source of the two library crates, by its path from the root, without its tests and
/// comments.
fn sources() -> BTreeMap<String, String> {
    fn walk(dir: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).expect("a folder of sources") {
            let path = entry.expect("readable").path();
            if path.is_dir() {
                walk(&path, files);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    let mut files = Vec::new();
    walk(&root().join("engine/src"), &mut files);
    walk(&root().join("uring/src"), &mut files);
    files
        .into_iter()
        .filter(|path| path.file_name().is_some_and(|name| name != "tests.rs"))
        .map(|path| {
            let text = fs::read_to_string(&path).expect("UTF-8");
            let code = text
                .lines()
                .take_while(|line| !line.starts_with("#[cfg(all(test") && *line != "#[cfg(test)]")
                .filter(|line| !line.trim_start().starts_with("//"))
                .collect::<Vec<_>>()
                .join("\n");
            let name = path.strip_prefix(root()).expect("below the root");
            (name.to_str().expect("UTF-8").to_owned(), code)
        })
        .collect()
}

/// The modules right below `crate::` that a source names.
fn named(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        // Not `$crate::`, nor the end of a longer word.
        if code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$') {
            continue;
        }
        let first = |text: &str| -> String {
            text.chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect()
        };
        if let Some(list) = rest.strip_prefix('{') {
            // The names at the first level of the braces.
            let mut depth = 0;
            let mut start = true;
            for (at, c) in list.char_indices() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => start = true,
                    c if c.is_whitespace() => {}
                    _ if depth == 0 && start => {
                        found.push(first(&list[at..]));
                        start = false;
                    }
                    _ => {}
                }
            }
        } else {
            found.push(first(rest));
        }
    }
    found
}

fn layer(module: &str) -> usize {
    LAYERS
        .iter()
        .position(|layer| layer.contains(&module))
        .unwrap_or_else(|| panic!("{module} has no layer: give it one"))
}

#[test]
fn imports_go_down_only() {
    let lowest = LAYERS.len() - 1;
    let mut wrong = Vec::new();
    for (file, code) in sources() {
        let Some(inner) = file.strip_prefix("engine/src/") else {
            continue;
        };
        if inner == "lib.rs" || inner.starts_with("bin/") {
            continue;
        }
        let end = inner.find(['/', '.']).expect("a file has an ending");
        let module = &inner[..end];
        let own = layer(module);
        for named in named(&code) {
            if named == module || !LAYERS.concat().contains(&named.as_str()) {
                continue; // itself, or a re-export of the crate's root that is no module
            }
            let other = layer(&named);
            if other < own || other == own && own != lowest {
                wrong.push(format!("{file} names {named}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_ring_knows_nothing_of_the_engine() {
    for (file, code) in sources() {
        if file.starts_with("uring/") {
            assert!(!code.contains("vfio_migration::"), "{file}");
        }
    }
}

#[test]
fn hand_overs_know_no_file_and_make_no_call() {
    for (file, code) in sources() {
        if file.starts_with("engine/src/reorder") {
            for word in [
                "nix::", "std::os", "std::fs", "std::net", "std::io", "DeviceId",
            ] {
                assert!(!code.contains(word), "{file} says {word}");
            }
        }
    }
}

#[test]
fn what_belongs_to_one_file_is_named_there_alone() {
    for (file, code) in sources() {
        if file.starts_with("engine/src/bin/") {
            continue;
        }
        for (word, homes) in HOMES {
            let elsewhere = file.starts_with("engine/") || *word == "io_uring::";
            if elsewhere && code.contains(word) {
                assert!(homes.contains(&file.as_str()), "{file} says {word}");
            }
        }
    }
}

#[test]
fn unsafe_is_opened_where_it_is_expected() {
    let opened: Vec<String> = sources()
        .into_iter()
        .filter(|(_, code)| code.contains("unsafe_code"))
        .map(|(file, _)| file)
        .collect();
    assert_eq!(opened, UNSAFE);
}

#[test]
fn every_module_begins_with_what_it_is_for() {
    for file in sources().keys() {
        let text = fs::read_to_string(root().join(file)).expect("UTF-8");
        assert!(text.starts_with("//! "), "{file}");
    }
}

/// Endings of names that are times which somebody chooses, or deadlines made of them.
const TIMES: &[&str] = &[
    "deadline",
    "grace",
    "no_progress",
    "patience",
    "timeout",
    "SLACK",
    "Instant::now()",
];

#[test]
fn a_time_is_added_by_its_helper_alone() {
    let mut wrong = Vec::new();
    for (file, code) in sources() {
        if file == "uring/src/time.rs" {
            continue;
        }
        for line in code.lines() {
            for (at, operator) in line.match_indices(['+', '*']) {
                let before = line[..at].trim_end();
                let after = line[at + operator.len()..].trim_start_matches(['=', ' ']);
                let name: String = after
                    .chars()
                    .take_while(|c| c.is_alphanumeric() || "_.:()".contains(*c))
                    .collect();
                let is_time = |text: &str| TIMES.iter().any(|time| text.ends_with(time));
                if is_time(before) || is_time(&name) {
                    wrong.push(format!("{file}: {}", line.trim()));
                }
            }
            if line.contains(".checked_add(") && TIMES.iter().any(|time| line.contains(time)) {
                wrong.push(format!("{file}: {}", line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
