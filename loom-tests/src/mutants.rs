//! Breaks the hand-overs one site at a time, and looks whether a model notices.
//!
//! Two kinds of mutants: each ordering argument of the shipped modules weakened, and each fence
//! removed, both found in the text; and the hand-written ones of [`HAND_WRITTEN`]. They are built
//! in a copy of the workspace's sources, which keeps its target folder from one to the next.
//!
//! A mutant that survives says that a model is blind or that the code is stronger than it must be.
//! Where it is the second, and the code stays as it is, [`EXPLAINED`] says why.

use std::{
    fs, io,
    path::Path,
    sync::Mutex,
    time::{Duration, Instant},
};

use crate::models::{self, Outcome};

#[path = "mutants/table.rs"]
mod table;

use table::{EXPLAINED, HAND_WRITTEN};

/// Where the modules are, below the workspace: in the one or in the other.
const MODULES: [&str; 2] = ["engine/src/reorder", "engine/src"];

/// What of the workspace is copied.
const COPIED: [&str; 4] = ["Cargo.toml", "engine", "uring", "loom-tests"];

/// Each module, with the test files that its mutants have to pass, the most telling first.
const FILES: [(&str, &[&str]); 11] = [
    (
        "slot",
        &["slot", "reorder_buffer", "doorbell", "send_queue"],
    ),
    ("pool", &["pool", "slot", "waiters"]),
    ("table", &["table", "reorder_buffer", "send_queue"]),
    (
        "reorder_buffer",
        &["reorder_buffer", "doorbell", "waiters", "io_loop"],
    ),
    ("turn", &["turn"]),
    ("send_queue", &["send_queue"]),
    ("doorbell", &["doorbell", "io_loop"]),
    ("waiters", &["waiters", "send_queue", "flags"]),
    ("flags", &["flags", "doorbell", "io_loop"]),
    ("router", &["router"]),
    ("stats", &["stats"]),
];

/// A hand-written mutant: `find` occurs once in the module, and is replaced.
struct HandWritten {
    module: &'static str,
    name: &'static str,
    find: &'static str,
    replace: &'static str,
}

/// A mutant's name, and why it survives.
type Explained = (&'static str, &'static str);

/// A module with one fault.
#[derive(Debug, Eq, PartialEq)]
struct Mutant {
    module: &'static str,
    name: String,
    /// The whole module.
    text: String,
}

/// Runs all mutants whose names contain `filter`. Returns whether all that survived are explained.
pub fn run(workspace: &Path, filter: &str) -> Result<bool, String> {
    let scratch = workspace.join("target/loom-mutants");
    let copy = scratch.join("workspace");
    let target = scratch.join("target");
    copy_all(workspace, &copy).map_err(|error| format!("{}: {error}", copy.display()))?;

    let mut mutants = Vec::new();
    for (module, _) in FILES {
        let path = source(&copy, module);
        let text = fs::read_to_string(&path).map_err(|error| format!("{module}: {error}"))?;
        mutants.extend(weakened(module, &text));
        mutants.extend(hand_written(module, &text)?);
    }
    for (name, _) in EXPLAINED {
        if !mutants.iter().any(|mutant| mutant.name == *name) {
            return Err(format!("the table explains `{name}`, which is no mutant"));
        }
    }
    mutants.retain(|mutant| mutant.name.contains(filter));

    println!("the models without a mutant");
    let mut files: Vec<&str> = FILES
        .iter()
        .flat_map(|(_, files)| *files)
        .copied()
        .collect();
    files.sort_unstable();
    files.dedup();
    if let Some((model, how)) = first_red(&models::build(&copy, &target, &files)?)? {
        return Err(format!("{model} is red without a mutant: {how}"));
    }
    let mut count = Count::default();
    let began = Instant::now();
    for mutant in &mutants {
        let began = Instant::now();
        let path = source(&copy, mutant.module);
        let failed = |error| format!("{}: {error}", path.display());
        let shipped = fs::read(&path).map_err(failed)?;
        fs::write(&path, &mutant.text).map_err(failed)?;
        let fate = fate(mutant, &copy, &target);
        fs::write(&path, shipped).map_err(failed)?;
        let took = began.elapsed().as_secs_f64();
        let name = &mutant.name;
        let known = EXPLAINED.iter().find(|(known, _)| known == name);
        match (fate, known) {
            (Ok(Some((model, how))), None) => {
                count.killed += 1;
                count.hung += usize::from(how == HANG);
                println!("killed   {name} by {model} in {took:.1} s: {how}");
            }
            (Ok(Some((model, how))), Some(_)) => {
                count.wrong += 1;
                println!("KILLED   {name} by {model}, but its survival is explained: {how}");
            }
            (Ok(None), Some((_, why))) => {
                count.explained += 1;
                println!("survived {name} in {took:.1} s\n         {why}");
            }
            (Ok(None), None) => {
                count.wrong += 1;
                println!("SURVIVED {name} in {took:.1} s");
            }
            (Err(problem), _) => {
                count.wrong += 1;
                println!("BROKEN   {name}\n{problem}");
            }
        }
    }
    println!(
        "{} mutants in {:.0} s: {} killed ({} of them by a hang), {} survived as explained, {} \
         otherwise",
        mutants.len(),
        began.elapsed().as_secs_f64(),
        count.killed,
        count.hung,
        count.explained,
        count.wrong,
    );
    Ok(count.wrong == 0)
}

/// How many mutants had which fate.
#[derive(Default)]
struct Count {
    killed: usize,
    hung: usize,
    explained: usize,
    /// Survived without a reason, died in spite of one, or could not be built.
    wrong: usize,
}

/// A red model's name, and what it said.
type Red = (String, String);

/// Builds and runs one test file after the other, for most mutants are dead after the first.
/// Returns the first red model.
fn fate(mutant: &Mutant, copy: &Path, target: &Path) -> Result<Option<Red>, String> {
    let files = FILES.iter().find(|(module, _)| *module == mutant.module);
    for file in files.expect("mutants are made of these modules").1 {
        let red = first_red(&models::build(copy, target, &[file])?)?;
        if red.is_some() {
            return Ok(red);
        }
    }
    Ok(None)
}

/// What is said of a model that did not end.
const HANG: &str = "a hang";

/// The first model that is red. No other is waited for.
fn first_red(all: &[models::Model]) -> Result<Option<Red>, String> {
    let red = Mutex::new(None);
    models::run_all(all, |model, outcome, _took: Duration| {
        let how = match outcome {
            Outcome::Passed => return true,
            Outcome::Failed(output) => how(output),
            Outcome::Hung => HANG,
        };
        let red_one = (format!("{}::{}", model.file, model.name), how.to_owned());
        *red.lock().expect("a report does not panic") = Some(red_one);
        false
    })?;
    Ok(red.into_inner().expect("a report does not panic"))
}

/// The first thing that loom, or the model, said.
fn how(output: &str) -> &str {
    let mut lines = output.lines().map(str::trim);
    let said = lines
        .find(|line| line.contains("panicked at"))
        .and_then(|_| lines.find(|line| !line.is_empty()));
    match said {
        Some(line) if line.contains("maximum number of branches") => HANG,
        Some(line) => line.split(';').next().unwrap_or(line),
        None => "a crash",
    }
}

/// A module's path.
fn source(workspace: &Path, module: &str) -> std::path::PathBuf {
    let [first, other] = MODULES.map(|folder| workspace.join(folder).join(format!("{module}.rs")));
    if first.exists() { first } else { other }
}

/// Copies what the models need of `from` to `to`, afresh.
fn copy_all(from: &Path, to: &Path) -> io::Result<()> {
    if to.exists() {
        fs::remove_dir_all(to)?;
    }
    fs::create_dir_all(to)?;
    COPIED
        .iter()
        .try_for_each(|name| copy(&from.join(name), &to.join(name)))
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    if !from.is_dir() {
        fs::copy(from, to)?;
        return Ok(());
    }
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_name() != "target" {
            copy(&entry.path(), &to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

/// The mutants of the table that are `module`'s.
fn hand_written(module: &'static str, text: &str) -> Result<Vec<Mutant>, String> {
    HAND_WRITTEN
        .iter()
        .filter(|mutant| mutant.module == module)
        .map(|mutant| {
            let name = format!("{module}: {}", mutant.name);
            match text.matches(mutant.find).count() {
                1 => Ok(Mutant {
                    module,
                    name,
                    text: text.replacen(mutant.find, mutant.replace, 1),
                }),
                found => Err(format!("{name}: its text occurs {found} times")),
            }
        })
        .collect()
}

/// What an ordering is weakened to.
const WEAKER: [(&str, &[&str]); 3] = [
    ("AcqRel", &["Relaxed", "Acquire", "Release"]),
    ("Acquire", &["Relaxed"]),
    ("Release", &["Relaxed"]),
];

/// Each ordering argument of the shipped part of `text` weakened, and each fence removed.
fn weakened(module: &'static str, text: &str) -> Vec<Mutant> {
    let mut mutants: Vec<Mutant> = Vec::new();
    let mut function = "";
    let mut in_use = false;
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        let start = at;
        at += line.len();
        if line.starts_with("#[cfg(all(test") || line.starts_with("#[cfg(test") {
            break;
        }
        let code = line.split("//").next().unwrap_or_default();
        in_use |= code.trim_start().starts_with("use ");
        if in_use {
            in_use = !code.contains(';');
            continue;
        }
        if let Some((_, rest)) = code.split_once("fn ") {
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_');
            function = &rest[..end.unwrap_or(rest.len())];
        }
        let mut push = |from: &str, at: usize, to: &str, what: String| {
            let name = format!("{module}: {function}: {what}");
            let before = mutants.iter().filter(|mutant| {
                mutant.name == name || mutant.name.starts_with(&format!("{name}, no. "))
            });
            let name = match before.count() {
                0 => name,
                count => format!("{name}, no. {}", count + 1),
            };
            let text = [&text[..at], to, &text[at + from.len()..]].concat();
            mutants.push(Mutant { module, name, text });
        };
        for (from, weaker) in WEAKER {
            for (column, _) in code.match_indices(from) {
                for to in weaker {
                    let path = format!("crate::sync::atomic::Ordering::{to}");
                    push(from, start + column, &path, format!("{from} to {to}"));
                }
            }
        }
        let fence = "fence(SeqCst);";
        if let Some(column) = code.find(fence) {
            push(fence, start + column, "", "no fence".to_owned());
        }
    }
    mutants
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_site_is_weakened_by_itself() {
        let text = "use x::{\n    Acquire,\n};\n/// Acquire\nfn f() {\n    a.load(Acquire); // Release\n    \
                    b.swap(1, AcqRel);\n    c.load(Acquire);\n    fence(SeqCst);\n}\n\
                    #[cfg(test)]\nmod tests { fn g() { a.load(Acquire); } }\n";
        let names: Vec<_> = weakened("m", text)
            .into_iter()
            .map(|mutant| mutant.name)
            .collect();
        assert_eq!(
            names,
            [
                "m: f: Acquire to Relaxed",
                "m: f: AcqRel to Relaxed",
                "m: f: AcqRel to Acquire",
                "m: f: AcqRel to Release",
                "m: f: Acquire to Relaxed, no. 2",
                "m: f: no fence",
            ]
        );
    }

    #[test]
    fn the_table_fits_the_modules() {
        let workspace = crate::workspace();
        for (module, _) in FILES {
            let text = fs::read_to_string(source(&workspace, module)).unwrap();
            hand_written(module, &text).unwrap();
        }
    }
}
