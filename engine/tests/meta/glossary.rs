//! Words that `docs/glossary.md` has retired stay retired, in names, comments, docs and messages.

use std::{
    fs,
    path::{Path, PathBuf},
};

fn root() -> PathBuf {
    let engine = Path::new(env!("CARGO_MANIFEST_DIR"));
    engine.parent().expect("the workspace").to_path_buf()
}

/// The words of a text, in lower case: `OneName`, `one_name` and `one name` are the same two.
fn words(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut before = ' ';
    for c in text.chars() {
        let begins = c.is_uppercase() && before.is_lowercase();
        if begins || !c.is_alphabetic() {
            words.push(String::new());
        }
        if c.is_alphabetic() {
            let last = words.last_mut().expect("there is one");
            last.extend(c.to_lowercase());
        }
        before = c;
    }
    words.retain(|word| !word.is_empty());
    words
}

/// The first column of the glossary's last table.
fn retired() -> Vec<Vec<String>> {
    let glossary = fs::read_to_string(root().join("docs/glossary.md")).expect("the glossary");
    let (_, table) = glossary.split_once("## Retired").expect("the last part");
    let rows = table.lines().filter(|line| line.starts_with("| "));
    let rows = rows.filter_map(|line| line.split('|').nth(1));
    rows.filter(|cell| cell.trim() != "not")
        .map(words)
        .collect()
}

fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("a folder") {
        let path = entry.expect("readable").path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or("");
        if path.is_dir() {
            if !["target", "corpus", "data"].contains(&name) && !name.starts_with('.') {
                files(&path, found);
            }
        } else if name.ends_with(".rs") || name.ends_with(".md") {
            // What was is history's.
            if !["CHANGELOG.md", "glossary.md"].contains(&name) {
                found.push(path);
            }
        }
    }
}

#[test]
fn no_retired_word_comes_back() {
    let retired = retired();
    assert!(retired.len() > 10, "the table is there");
    let mut found = Vec::new();
    files(&root(), &mut found);
    assert!(found.len() > 100, "the tree is there");
    let mut wrong = Vec::new();
    for path in found {
        let text = fs::read_to_string(&path).expect("UTF-8");
        for (number, line) in text.lines().enumerate() {
            let words = words(line);
            for old in &retired {
                if words.windows(old.len()).any(|window| window == old) {
                    let file = path.strip_prefix(root()).expect("below it").display();
                    wrong.push(format!("{file}:{}: {}", number + 1, old.join(" ")));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
