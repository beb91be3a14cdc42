//! The header is what the code says, and what is exported is what the header says.
//!
//! `BLESS=1 cargo test -p vfio-migration-capi --test header` writes the header and the list of symbols anew.

use std::{env, fs, path::Path};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn generated() -> String {
    let config = cbindgen::Config::from_file(Path::new(ROOT).join("cbindgen.toml"));
    let bindings = cbindgen::Builder::new()
        .with_config(config.expect("cbindgen.toml can be read"))
        .with_crate(ROOT)
        .generate()
        .expect("the sources have no wrong item");
    let mut header = Vec::new();
    bindings.write(&mut header);
    let header = String::from_utf8(header).unwrap();
    // What the generator leaves at the ends of lines.
    let lines: Vec<_> = header.lines().map(str::trim_end).collect();
    lines.join("\n") + "\n"
}

/// Compares a file with what it should be, or writes it.
fn check(path: &str, wanted: &str) {
    let file = Path::new(ROOT).join(path);
    if env::var_os("BLESS").is_some() {
        fs::write(&file, wanted).unwrap();
    }
    let found = fs::read_to_string(&file).unwrap_or_default();
    let differs = found
        .lines()
        .zip(wanted.lines())
        .find(|(found, wanted)| found != wanted);
    assert_eq!(differs, None, "{path}: BLESS=1 writes it anew");
    assert_eq!(found, wanted, "{path}: BLESS=1 writes it anew");
}

/// The functions that the sources export.
fn exported() -> Vec<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(Path::new(ROOT).join("src")).unwrap() {
        let source = fs::read_to_string(entry.unwrap().path()).unwrap();
        let functions = source.split("#[unsafe(no_mangle)]\npub extern \"C\" fn ");
        names.extend(
            functions
                .skip(1)
                .map(|rest| rest.split('(').next().unwrap().to_owned()),
        );
    }
    names.sort();
    names
}

#[test]
fn the_header_is_what_the_code_says() {
    check("include/vfio_migration.h", &generated());
}

#[test]
fn each_exported_function_is_in_the_header_and_has_the_librarys_version() {
    let names = exported();
    assert!(names.len() > 100, "{}", names.len());
    let header = generated();
    for name in &names {
        assert!(
            header.contains(&format!(" {name}(")) || header.contains(&format!("*{name}(")),
            "{name}"
        );
    }
    let list: Vec<_> = names
        .iter()
        .map(|name| format!("        {name};\n"))
        .collect();
    let script = format!(
        "/* The shared library's symbols: written by `BLESS=1 cargo test -p vfio-migration-capi --test header`. */\n\
         VFIO_MIGRATION_0.1 {{\n    global:\n{}    local:\n        *;\n}};\n",
        list.concat()
    );
    check("vfio_migration.map", &script);
}

/// Every exported function's body is one call that catches a panic; and each says who may call it, in its own text or
/// in its handle's.
#[test]
fn no_exported_function_can_panic_into_c() {
    let mut count = 0;
    for entry in fs::read_dir(Path::new(ROOT).join("src")).unwrap() {
        let path = entry.unwrap().path();
        let source = fs::read_to_string(&path).unwrap();
        for function in source.split("#[unsafe(no_mangle)]").skip(1) {
            let body = function.split_once(" {\n").unwrap().1;
            let body = body.split("\n}\n").next().unwrap();
            let name = function
                .split("fn ")
                .nth(1)
                .unwrap()
                .split('(')
                .next()
                .unwrap();
            let first = body.trim_start();
            let guarded = ["guard(error, ", "quiet("]
                .iter()
                .any(|it| first.starts_with(it));
            assert!(guarded, "{name} in {}: {first}", path.display());
            count += 1;
        }
    }
    assert_eq!(count, exported().len());
}

/// `unsafe` is in two modules; elsewhere it only exports a name.
#[test]
fn unsafe_is_in_two_modules() {
    for entry in fs::read_dir(Path::new(ROOT).join("src")).unwrap() {
        let path = entry.unwrap().path();
        let source = fs::read_to_string(&path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let opened = ["border.rs", "callbacks.rs"].contains(&name.as_str());
        let blocks = source.matches("unsafe {").count() + source.matches("unsafe impl").count();
        assert_eq!(blocks > 0, opened, "{name}");
        assert_eq!(
            source.contains("unsafe_code"),
            opened || source.contains("no_mangle"),
            "{name}"
        );
    }
}

#[test]
fn the_package_for_c_says_what_cargo_says() {
    let manifest = fs::read_to_string(Path::new(ROOT).join("Cargo.toml")).unwrap();
    let template = fs::read_to_string(Path::new(ROOT).join("vfio-migration.pc.in")).unwrap();
    assert!(template.contains("Version: @version@"));
    for name in ["name = \"vfio_migration\"", "filename = \"vfio-migration\""] {
        assert!(manifest.contains(name), "{name}");
    }
    let script = fs::read_to_string(Path::new(ROOT).join("vfio_migration.map")).unwrap();
    let version: Vec<_> = env!("CARGO_PKG_VERSION").split('.').take(2).collect();
    assert!(script.contains(&format!("VFIO_MIGRATION_{} {{", version.join("."))));
}
