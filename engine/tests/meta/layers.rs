//! The layers of the house hold: imports go down only, and some names belong to one file.
//!
//! Reads the sources as text. A module may name `crate::` modules of the layers below its own; the
//! modules of one line are one layer, and only the lowest may know its own.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// From the top down.
const LAYERS: &[&[&str]] = &[
    &["migration"],
    &["load", "save"],
    &["relay"],
    &["session"],
    &["memory_plan"],
    &["channel", "io_loop"],
    &["lane", "settings"],
    &["device", "stream"],
    &["framed", "message", "section", "spill"],
    &["tasks", "router", "wire"],
    &["reorder"],
    &["host", "metrics", "timeline"],
    &["arena", "canceller", "first_failure", "stats", "trace"],
    &["error"],
    &["id", "state", "sync", "system_calls", "text"],
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
    "capi/src/border.rs",
    "capi/src/callbacks.rs",
    "engine/src/arena.rs",
    "engine/src/channel/tls/kernel.rs",
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
    walk(&root().join("benches/src/bin/soak"), &mut files);
    walk(&root().join("capi/src"), &mut files);
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

/// A path of a `use`, and the name under which it is known, all braces opened.
type Import = (Vec<String>, String);

/// Opens a `use` tree: `a::{b, c::{self, d as e}}` is a::b, a::c, a::c::d.
fn open(tree: &str, before: &[String], imports: &mut Vec<Import>) {
    let mut depth = 0;
    let mut start = 0;
    let mut parts = Vec::new();
    for (at, c) in tree.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&tree[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&tree[start..]);
    for part in parts
        .into_iter()
        .map(str::trim)
        .filter(|part| !part.is_empty())
    {
        let (path, list) = match part.split_once('{') {
            Some((path, list)) => (path, list.trim_end().strip_suffix('}')),
            None => (part, None),
        };
        let (path, alias) = match path.split_once(" as ") {
            Some((path, alias)) => (path, Some(alias.trim())),
            None => (path, None),
        };
        let mut whole = before.to_vec();
        let segments = path
            .split("::")
            .map(str::trim)
            .filter(|part| !part.is_empty());
        whole.extend(segments.map(str::to_owned));
        if let Some(list) = list {
            open(list, &whole, imports);
            continue;
        }
        if whole.last().is_some_and(|last| last == "self") && !before.is_empty() {
            whole.pop();
        }
        let last = whole.last().expect("a path").clone();
        imports.push((whole, alias.map_or(last, str::to_owned)));
    }
}

/// Every `use` of a source, opened, and whether it hands the name on.
fn imports(code: &str) -> Vec<(Import, bool)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("use ") {
        let line = code[..at].rfind('\n').map_or(0, |end| end + 1);
        let before = code[line..at].trim();
        if !(before.is_empty() || before == "pub" || before.starts_with("pub(")) {
            continue;
        }
        let tree = &code[at + "use ".len()..];
        let tree = &tree[..tree.find(';').expect("a use ends")];
        let mut opened = Vec::new();
        open(tree, &[], &mut opened);
        found.extend(
            opened
                .into_iter()
                .map(|import| (import, !before.is_empty())),
        );
    }
    found
}

/// The paths that a source names without a `use`: `crate::a::b`.
fn inline(code: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        // Not `$crate::`, nor the end of a longer word.
        if code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$') {
            continue;
        }
        let path = code[at..].split(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':'));
        let path = path.into_iter().next().expect("it begins with crate");
        let path = path.split("::").filter(|part| !part.is_empty());
        found.push(path.map(str::to_owned).collect());
    }
    found
}

/// The crates whose files are looked at: where each one's root is.
const CRATES: &[(&str, &str)] = &[
    ("engine/src/bin/vfio-migrate/", "main"),
    ("engine/src/", "lib"),
    ("uring/src/", "lib"),
    ("benches/src/bin/soak/", "main"),
];

/// A crate's files by their module paths, and what each one names.
struct House {
    files: BTreeMap<Vec<String>, String>,
    handed_on: BTreeMap<(Vec<String>, String), Vec<String>>,
}

impl House {
    fn new(sources: &BTreeMap<String, String>, at: &str, root: &str) -> Self {
        let mut files = BTreeMap::new();
        for (file, code) in sources {
            let inner = CRATES.iter().find(|(folder, _)| file.starts_with(folder));
            if inner.is_some_and(|(folder, _)| *folder == at) {
                let path = file[at.len()..].trim_end_matches(".rs");
                let path: Vec<_> = path.split('/').map(str::to_owned).collect();
                let path = if path == [root] { Vec::new() } else { path };
                files.insert(path, code.clone());
            }
        }
        let mut house = Self {
            files,
            handed_on: BTreeMap::new(),
        };
        for (module, code) in &house.files {
            for ((path, name), on) in imports(code) {
                if on && let Some(path) = absolute(module, &path) {
                    house.handed_on.insert((module.clone(), name), path);
                }
            }
        }
        house
    }

    /// The file in which a path's name is, through those that only hand it on.
    fn home(&self, path: &[String]) -> Vec<String> {
        let mut path = path.to_vec();
        for _ in 0..4 {
            let known = (0..=path.len()).rev();
            let module = known
                .map(|end| &path[..end])
                .find(|module| self.files.contains_key(*module));
            let module = module.expect("the root is one").to_vec();
            let Some(name) = path.get(module.len()) else {
                return module;
            };
            match self.handed_on.get(&(module.clone(), name.clone())) {
                Some(further) => path.clone_from(further),
                None => return module,
            }
        }
        panic!("{path:?} is handed on without end");
    }

    /// Which file names which.
    fn arrows(&self) -> BTreeSet<(Vec<String>, Vec<String>)> {
        let mut arrows = BTreeSet::new();
        for (module, code) in &self.files {
            let uses = imports(code).into_iter().map(|((path, _), _)| path);
            for path in uses.chain(inline(code)) {
                let Some(path) = absolute(module, &path) else {
                    continue;
                };
                let home = self.home(&path);
                // A folder's own file hands on what is in it.
                if home != *module && !home.starts_with(module) {
                    arrows.insert((module.clone(), home));
                }
            }
        }
        arrows
    }
}

/// A path from the crate's root; `None` where it is another crate's.
fn absolute(module: &[String], path: &[String]) -> Option<Vec<String>> {
    let (first, rest) = path.split_first()?;
    let mut whole = match first.as_str() {
        "crate" => Vec::new(),
        "self" => module.to_vec(),
        "super" => module[..module.len().checked_sub(1)?].to_vec(),
        _ => return None,
    };
    for part in rest {
        if part == "super" {
            whole.pop();
        } else {
            whole.push(part.clone());
        }
    }
    Some(whole)
}

fn layer(module: &str) -> usize {
    LAYERS
        .iter()
        .position(|layer| layer.contains(&module))
        .unwrap_or_else(|| panic!("{module} has no layer: give it one"))
}

#[test]
fn imports_go_down_only() {
    let house = House::new(&sources(), "engine/src/", "lib");
    let lowest = LAYERS.len() - 1;
    let mut wrong = Vec::new();
    for (from, to) in house.arrows() {
        let (Some(module), Some(named)) = (from.first(), to.first()) else {
            continue; // the crate's root
        };
        let (own, other) = (layer(module), layer(named));
        if module != named && (other < own || other == own && own != lowest) {
            wrong.push(format!("{} names {}", from.join("/"), to.join("/")));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// The library's modules on floors: each stands above all that it imports. Drawn from the imports, for
/// `docs/design.md`.
fn picture() -> String {
    let house = House::new(&sources(), "engine/src/", "lib");
    let modules: BTreeSet<String> = house
        .files
        .keys()
        .filter_map(|path| path.first().cloned())
        .collect();
    let mut below: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (from, to) in house.arrows() {
        if let (Some(from), Some(to)) = (from.first(), to.first())
            && from != to
        {
            below.entry(from.clone()).or_default().insert(to.clone());
        }
    }
    let mut floors: BTreeMap<String, usize> = BTreeMap::new();
    // Ends: there is no circle, so each round sets one floor at least.
    while floors.len() < modules.len() {
        for module in &modules {
            let under = below.get(module).into_iter().flatten();
            let under: Option<Vec<usize>> = under.map(|name| floors.get(name).copied()).collect();
            if let Some(under) = under {
                let floor = under.into_iter().max().map_or(0, |highest| highest + 1);
                floors.insert(module.clone(), floor);
            }
        }
    }
    let top = floors.values().copied().max().unwrap_or(0);
    let mut lines = String::new();
    for floor in (0..=top).rev() {
        let on_it: Vec<_> = floors.iter().filter(|(_, at)| **at == floor).collect();
        let names: Vec<_> = on_it.iter().map(|(name, _)| name.as_str()).collect();
        lines.push_str(&format!("{floor:>4} │ {}\n", names.join("   ")));
    }
    lines
}

#[test]
fn the_picture_of_the_floors_is_drawn_from_the_imports() {
    let path = root().join("docs/design.md");
    let page = fs::read_to_string(&path).expect("the page");
    let (before, rest) = page
        .split_once("<!-- floors -->\n```text\n")
        .expect("its place");
    let (drawn, after) = rest.split_once("```\n").expect("its end");
    let picture = picture();
    if std::env::var_os("DRAW").is_some() {
        let page = format!("{before}<!-- floors -->\n```text\n{picture}```\n{after}");
        fs::write(&path, page).expect("writable");
        return;
    }
    assert!(
        drawn == picture,
        "docs/design.md shows other floors: `DRAW=1 cargo test -p vfio-migration --all-features \
         the_picture` draws them anew"
    );
}

#[test]
fn no_files_name_each_other_in_a_circle() {
    let mut circles = Vec::new();
    for (at, root) in CRATES {
        let mut arrows = House::new(&sources(), at, root).arrows();
        // Who names nobody is in no circle, nor is who only names such.
        loop {
            let names: BTreeSet<_> = arrows.iter().map(|(from, _)| from.clone()).collect();
            let before = arrows.len();
            arrows.retain(|(_, to)| names.contains(to));
            if arrows.len() == before {
                break;
            }
        }
        let shown = arrows.iter().map(|(from, to)| {
            let (from, to) = (from.join("/"), to.join("/"));
            format!("{at}: {from} names {to}")
        });
        circles.extend(shown);
    }
    assert!(circles.is_empty(), "a circle is in here: {circles:#?}");
}

#[test]
fn a_file_says_what_it_imports() {
    for (file, code) in sources() {
        assert!(!code.contains("use super::*"), "{file}");
    }
}

#[test]
fn nested_imports_are_opened() {
    let code =
        "pub(crate) use crate::{a::{self, B as C}, d};\nuse std::{sync::{Arc, atomic::X}};\n";
    let opened: Vec<String> = imports(code)
        .into_iter()
        .map(|((path, name), on)| format!("{} {name} {on}", path.join("::")))
        .collect();
    assert_eq!(
        opened,
        [
            "crate::a a true",
            "crate::a::B C true",
            "crate::d d true",
            "std::sync::Arc Arc false",
            "std::sync::atomic::X X false",
        ]
    );
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
        let opened = imports(&code)
            .into_iter()
            .map(|((path, _), _)| path.join("::") + "::");
        let names: Vec<String> = opened.chain([code]).collect();
        for (word, homes) in HOMES {
            let elsewhere = file.starts_with("engine/") || *word == "io_uring::";
            if elsewhere && names.iter().any(|name| name.contains(word)) {
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
        // A file of exported functions opens it for their names alone; `capi/tests/header.rs` sees to that.
        .filter(|(_, code)| {
            !code.contains("unsafe_code, reason = \"the functions' names are exported\"")
        })
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
        if file == "uring/src/time.rs" || file.starts_with("benches/") {
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
