//! What the workspace is built from: permissive licences, one registry, few duplicates.
//!
//! The same rules as `.ci/deny.toml`, for machines without cargo-deny; and that the two say the same.
//! Known advisories need their database and are cargo-deny's alone.

use std::{collections::BTreeMap, env, process::Command};

use serde_json::Value;

/// One of these is enough where a package has several; where it asks for several, all must be here.
const LICENCES: [&str; 8] = [
    "Apache-2.0",
    "BSD-3-Clause",
    "BSL-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Zlib",
];

const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// What only makes files of this tree, in a test, and is in nothing that anybody builds or is given.
const TOOLS: [(&str, &str); 1] = [("cbindgen", "MPL-2.0")];

/// Packages of which two versions are known to be here: never both in the library without features.
const TWICE: [&str; 11] = [
    "bit-set", // of the tests' JSON Schema
    "bit-vec", // as well
    "bitflags",
    "cpufeatures",
    "getrandom", // of the tests' TLS and JSON Schema
    "nix",       // of the benches' file system in user space
    "r-efi",     // of the tests' JSON Schema, of other systems
    "syn",
    "toml_datetime", // of the header's generator, which reads its settings
    "windows-sys",   // as well, of other systems
    "winnow",        // of the header's generator
];

fn packages() -> Vec<Value> {
    let cargo = env::var("CARGO").unwrap_or_else(|_unset| "cargo".into());
    let output = Command::new(cargo)
        .args([
            "metadata",
            "--locked",
            "--format-version",
            "1",
            "--all-features",
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo metadata: {error}");
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    metadata["packages"].as_array().unwrap().clone()
}

/// Whether a licence expression can be met: `A OR B`, `(A OR B) AND C`, and the older `A/B`.
fn allowed(expression: &str) -> bool {
    expression.split(" AND ").all(|part| {
        part.trim_matches(['(', ')'])
            .replace('/', " OR ")
            .split(" OR ")
            .any(|licence| LICENCES.contains(&licence.trim()))
    })
}

#[test]
fn every_package_has_a_permissive_licence_and_comes_from_one_registry() {
    let packages = packages();
    assert!(packages.len() > 50);
    for package in &packages {
        let name = package["name"].as_str().unwrap();
        let licence = package["license"].as_str().unwrap_or("none");
        let tool = TOOLS.contains(&(name, licence));
        assert!(tool || allowed(licence), "{name}: {licence}");
        match package["source"].as_str() {
            Some(source) => assert_eq!(source, REGISTRY, "{name}"),
            None => assert!(name.starts_with("vfio-migration"), "{name} is a path"),
        }
    }
}

#[test]
fn no_package_is_there_twice_that_was_not() {
    let mut versions: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for package in packages() {
        let text = |key: &str| package[key].as_str().unwrap().to_owned();
        versions
            .entry(text("name"))
            .or_default()
            .push(text("version"));
    }
    for (name, versions) in versions {
        assert!(
            versions.len() == 1 || TWICE.contains(&name.as_str()),
            "{name}: {versions:?}"
        );
    }
}

#[test]
fn expressions_are_read_as_they_are_meant() {
    assert!(allowed("MIT OR LGPL-2.1-or-later") && allowed("Unlicense/MIT"));
    assert!(allowed("(MIT OR Apache-2.0) AND Unicode-3.0"));
    assert!(!allowed("GPL-2.0-only") && !allowed("MIT AND GPL-2.0-only") && !allowed("none"));
}

#[test]
fn cargo_deny_is_told_the_same() {
    let config = include_str!("../../../.ci/deny.toml");
    let licences = config.split("allow = [").nth(1).unwrap();
    let licences = licences.split(']').next().unwrap();
    let listed: Vec<_> = licences.split('"').skip(1).step_by(2).collect();
    assert_eq!(listed, LICENCES);
    for (crate_, licence) in TOOLS {
        let line = format!("{{ crate = \"{crate_}\", allow = [\"{licence}\"] }}");
        assert!(config.contains(&line), "{line}");
    }
    assert_eq!(config.matches("crate = ").count(), TOOLS.len());
}
