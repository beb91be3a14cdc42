//! `docs/coverage.md` names tests that there are and that run, and all of the guest's; and every file of the test
//! crates is a module of one.

use std::{
    fs,
    path::{Path, PathBuf},
};

fn engine() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn page() -> String {
    fs::read_to_string(engine().join("../docs/coverage.md")).unwrap()
}

/// The tests that the page names: a file, and a name in it.
fn named(page: &str) -> impl Iterator<Item = (&str, &str)> {
    page.split('`')
        .filter_map(|word| word.split_once("::"))
        .filter(|(file, _)| file.ends_with(".rs"))
}

/// Whether a source has a test of this name that nothing keeps from running.
fn runs(source: &str, test: &str) -> bool {
    let definition = format!("fn {test}(");
    let lines: Vec<_> = source.lines().map(str::trim).collect();
    let at = lines.iter().position(|line| line.starts_with(&definition));
    let above = at.map_or(&[][..], |at| &lines[..at]).iter().rev();
    let attributes: Vec<_> = above
        .take_while(|line| line.starts_with("#[") || line.starts_with("//"))
        .filter(|line| line.starts_with("#["))
        // The tests run with all features.
        .filter(|line| !line.starts_with("#[cfg(feature = \""))
        .collect();
    // No `ignore`, and no other `cfg`.
    attributes == [&"#[test]"]
}

#[test]
fn a_test_runs_whose_only_attribute_is_that_it_is_one() {
    assert!(runs("#[test]\n/// Why.\nfn it() {}", "it"));
    assert!(runs("    /// Why.\n    #[test]\n    fn it() {}", "it"));
    let with_feature = "#[cfg(feature = \"rustls\")]\n#[test]\nfn it() {}";
    assert!(runs(with_feature, "it"));
    for source in [
        "fn it() {}",
        "// fn it() {}",
        "#[test]\n// fn it() {}\nfn other() {}",
        "#[test]\n#[ignore = \"slow\"]\nfn it() {}",
        "#[ignore]\n#[test]\nfn it() {}",
        "#[cfg(loom)]\n#[test]\nfn it() {}",
        "#[test]\nfn other() {}\nfn it() {}",
    ] {
        assert!(!runs(source, "it"), "{source}");
    }
}

/// The sources in a folder and below.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn every_file_is_a_module_of_a_test_crate() {
    let tests = engine().join("tests");
    let mut files = Vec::new();
    sources(&tests, &mut files);
    let read = |path: &Path| fs::read_to_string(path).unwrap();
    let all: Vec<_> = files.iter().map(|path| read(path)).collect();
    let mut count = 0;
    for file in &files {
        let within = file.strip_prefix(&tests).unwrap();
        // What cargo finds by itself.
        let root = match within.components().count() {
            1 => true,
            2 => within.ends_with("main.rs"),
            _ => false,
        };
        if root {
            continue;
        }
        count += 1;
        if within.starts_with("support") {
            let name = within.file_name().unwrap().to_str().unwrap();
            let ends = [format!("support/{name}\"]"), format!("[path = \"{name}\"]")];
            let included = |source: &String| ends.iter().any(|end| source.contains(end));
            assert!(all.iter().any(included), "{name} is in no crate");
            continue;
        }
        let folder = file.parent().unwrap();
        let parent = [folder.join("main.rs"), folder.with_extension("rs")];
        let parent = parent.iter().find(|path| path.exists());
        let parent = parent.unwrap_or_else(|| panic!("{} is in no crate", within.display()));
        let declared = format!("mod {};", file.file_stem().unwrap().to_str().unwrap());
        let source = read(parent);
        let mut before = "";
        let mut found = false;
        for line in source.lines() {
            if line == declared {
                // With all features, as all tests are run.
                let condition = before.starts_with("#[cfg(");
                found = !condition || before.starts_with("#[cfg(feature = ");
            }
            before = line;
        }
        assert!(
            found,
            "{} is not a module that is always tested",
            within.display()
        );
    }
    assert!(count > 70, "{count}");
}

#[test]
fn every_test_that_is_named_is_there() {
    let page = page();
    let mut count = 0;
    for (file, test) in named(&page) {
        let place = match file.strip_prefix("guest/") {
            Some(file) => engine().join("../guest-tests/src").join(file),
            None if file.starts_with("capi/") => engine().join("..").join(file),
            None if file.starts_with("src/") => engine().join(file),
            None => engine().join("tests").join(file),
        };
        let source = fs::read_to_string(&place).unwrap_or_else(|error| panic!("{file}: {error}"));
        let found = if file.starts_with("guest/") {
            // They stand in a table of names.
            source.contains(&format!("(\"{test}\", "))
        } else {
            runs(&source, test)
        };
        assert!(found, "{file} has no test {test} that runs");
        count += 1;
    }
    assert!(count > 100, "{count}");
    // Every row has a test.
    let rows = page.lines().filter(|line| {
        line.starts_with("| ") && !line.starts_with("| function") && !line.starts_with("|--")
    });
    for row in rows {
        assert!(row.contains(".rs::"), "{row}");
    }
}

#[test]
fn every_test_of_the_guests_is_named() {
    let page = page();
    let named: Vec<_> = named(&page).collect();
    let mut count = 0;
    for file in fs::read_dir(engine().join("../guest-tests/src")).unwrap() {
        let file = file.unwrap();
        let source = fs::read_to_string(file.path()).unwrap();
        let file = format!("guest/{}", file.file_name().to_str().unwrap());
        // Each file with tests has one table: pairs of a name and a function.
        let Some((_, table)) = source.split_once("pub const TESTS: &[Test] = &[") else {
            continue;
        };
        let (table, _) = table.split_once("];").unwrap();
        for test in table.split('"').skip(1).step_by(2) {
            assert!(named.contains(&(&*file, test)), "{file} has {test:?}");
            count += 1;
        }
    }
    assert!(count >= 20, "{count}");
}
