//! `docs/coverage.md` names tests that there are.
#![allow(missing_docs, reason = "a test")]

use std::{fs, path::Path};

#[test]
fn every_test_that_is_named_is_there() {
    let engine = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(engine.join("../docs/coverage.md")).unwrap();
    let mut named = 0;
    for (file, test) in page
        .split('`')
        .filter_map(|word| word.split_once("::"))
        .filter(|(file, _)| file.ends_with(".rs"))
    {
        let place = if file.starts_with("src/") {
            engine.join(file)
        } else {
            engine.join("tests").join(file)
        };
        let source = fs::read_to_string(&place).unwrap_or_else(|error| panic!("{file}: {error}"));
        let function = format!("fn {test}(");
        assert!(source.contains(&function), "{file} has no test {test}");
        named += 1;
    }
    assert!(named > 100, "{named}");
    // Every row has a test.
    let rows = page.lines().filter(|line| {
        line.starts_with("| ") && !line.starts_with("| function") && !line.starts_with("|--")
    });
    for row in rows {
        assert!(row.contains(".rs::"), "{row}");
    }
}
