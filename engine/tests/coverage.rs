//! `docs/coverage.md` names tests that there are, and all of the guest's.
#![allow(missing_docs, reason = "a test")]

use std::{fs, path::Path};

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

#[test]
fn every_test_that_is_named_is_there() {
    let page = page();
    let mut count = 0;
    for (file, test) in named(&page) {
        let (place, definition) = match file.strip_prefix("guest/") {
            // They stand in a table of names.
            Some(file) => (
                engine().join("../guest-tests/src").join(file),
                format!("(\"{test}\", "),
            ),
            None if file.starts_with("src/") => (engine().join(file), format!("fn {test}(")),
            None => (engine().join("tests").join(file), format!("fn {test}(")),
        };
        let source = fs::read_to_string(&place).unwrap_or_else(|error| panic!("{file}: {error}"));
        assert!(source.contains(&definition), "{file} has no test {test}");
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
