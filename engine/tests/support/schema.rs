//! The schema of `docs/json.md`, against which the tests validate what the command prints with `--json`.

use std::sync::LazyLock;

use jsonschema::Validator;
use serde_json::Value;

const PAGE: &str = include_str!("../../../docs/json.md");

static SCHEMA: LazyLock<Validator> = LazyLock::new(|| {
    let schema = blocks("json-schema");
    assert_eq!(schema.len(), 1, "the page has one schema");
    jsonschema::draft202012::new(&schema[0]).expect("the page's schema is one")
});

/// The page's blocks of a language.
pub fn blocks(language: &str) -> Vec<Value> {
    let fence = format!("\n```{language}\n");
    let after = PAGE.split(&fence).skip(1);
    let blocks = after.map(|after| after.split("\n```\n").next().unwrap());
    let read = blocks.map(|block| serde_json::from_str(block).expect("the page's blocks are JSON"));
    read.collect()
}

/// What does not fit the schema, if anything.
pub fn misfit(object: &Value) -> Option<String> {
    let errors = SCHEMA.iter_errors(object);
    let misfits: Vec<_> = errors
        .map(|error| format!("{error} at {}", error.instance_path()))
        .collect();
    (!misfits.is_empty()).then(|| misfits.join("; "))
}

/// The object that a text is, checked against the schema.
pub fn object(text: &str) -> Value {
    let object = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    if let Some(misfit) = misfit(&object) {
        panic!("{misfit}: {object:#}");
    }
    object
}
