//! C and C++ programs against the library as it is installed: alone, under the address sanitizer, under valgrind.

use std::{fs, process::Command};

#[path = "support/library.rs"]
mod library;

use library::{ROOT, With, library, program, run};

/// Valgrind of Debian 12 holds its one lock while a thread waits in a ring, so there it is plain calls.
const BACKENDS: [(With, &str); 4] = [
    (With::Nothing, "0"),
    (With::Nothing, "2"),
    (With::AddressSanitizer, "0"),
    (With::Valgrind, "2"),
];

#[test]
fn the_example_moves_two_devices_and_leaks_nothing() {
    let lines = fs::read_to_string(format!("{ROOT}/examples/loopback.c")).unwrap();
    assert!(lines.lines().count() < 200);
    for (with, backend) in BACKENDS {
        let output = run(program("examples/loopback.c", with).arg(backend));
        assert_eq!(
            output.stdout, b"moved 2 devices of 3000000 bytes\n",
            "{with:?}"
        );
    }
}

#[test]
fn what_is_misused_is_an_error_and_nothing_else() {
    for (with, backend) in BACKENDS {
        run(program("tests/c/misuse.c", with).arg(backend));
    }
}

/// A C program that is made of the header: each of its functions is called with NULL, 0 and nothing.
#[test]
fn every_function_takes_null() {
    let header = fs::read_to_string(format!("{ROOT}/include/vfio_migration.h")).unwrap();
    let code: Vec<_> = header
        .lines()
        .filter(|line| !line.starts_with("//"))
        .collect();
    let code = code.join(" ");
    let start = code.find("extern \"C\" {").unwrap();
    let mut calls = String::new();
    let mut count = 0;
    for declaration in code[start..].split(';') {
        let Some(name_at) = declaration.find("vfm_").and_then(|_| declaration.find('(')) else {
            continue;
        };
        let name = declaration[..name_at].rsplit([' ', '*']).next().unwrap();
        let arguments = &declaration[name_at + 1..];
        // Commas within a function's own parameters do not count.
        let (mut depth, mut argument, mut all) = (0, String::new(), Vec::new());
        for c in arguments.chars() {
            match c {
                '(' => depth += 1,
                ')' if depth == 0 => break,
                ')' => depth -= 1,
                ',' if depth == 0 => all.push(std::mem::take(&mut argument)),
                _ => {}
            }
            if !(c == ',' && depth == 0) {
                argument.push(c);
            }
        }
        all.push(argument);
        let fails =
            declaration.contains("enum vfm_code vfm_") && all.last().unwrap().contains("**error");
        let values: Vec<_> = all
            .iter()
            .enumerate()
            .map(|(at, argument)| {
                let argument = argument.trim();
                if fails && at + 1 == all.len() {
                    "&error".to_owned()
                } else if argument.contains('*') {
                    "NULL".to_owned()
                } else if let Some(of) = argument.strip_prefix("struct ") {
                    format!("(struct {}){{0}}", of.split(' ').next().unwrap())
                } else {
                    "0".to_owned()
                }
            })
            .collect();
        let call = format!("{name}({})", values.join(", "));
        calls += &if fails {
            format!(
                "    error = (void *)8;\n    if ({call} != VFM_CODE_MISUSE || !error || error == (void *)8 ||\n        \
                 !strstr(vfm_error_text(error), \"wrong use\"))\n        return printf(\"%s\\n\", \"{name}\"), 1;\n    \
                 vfm_error_free(error);\n    (void){};\n",
                call.replace("&error", "NULL")
            )
        } else {
            format!("    (void){call};\n")
        };
        count += 1;
    }
    assert!(count > 100, "{count}");
    let source = format!(
        "#include <stdio.h>\n#include <string.h>\n#include <vfio_migration.h>\n\
         int main(void)\n{{\n    struct vfm_error *error;\n{calls}    return 0;\n}}\n"
    );
    let path = library().join("null.c");
    fs::write(&path, source).unwrap();
    run(&mut program(path.to_str().unwrap(), With::AddressSanitizer));
}

#[test]
fn the_header_is_c_plus_plus_too() {
    let path = library().join("header.cc");
    fs::write(
        &path,
        "#include <vfio_migration.h>\nint main() { vfm_error_free(nullptr); }\n",
    )
    .unwrap();
    for standard in ["-std=c++11", "-std=c++20"] {
        let built = library().join("header");
        run(Command::new("g++")
            .args([standard, "-Wall", "-Wextra", "-Werror", "-pedantic"])
            .arg(format!("-I{ROOT}/include"))
            .arg(&path)
            .arg("-o")
            .arg(&built)
            .arg(format!("-L{}", library().display()))
            .arg(format!("-Wl,-rpath,{}", library().display()))
            .arg("-lvfio_migration"));
        run(&mut Command::new(&built));
    }
    // And C without extensions.
    run(Command::new("gcc")
        .args([
            "-std=c99",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-pedantic",
            "-fsyntax-only",
            "-x",
            "c",
        ])
        .arg(format!("{ROOT}/include/vfio_migration.h")));
}

#[test]
fn the_shared_library_has_its_soname_its_versions_and_nothing_else() {
    let library = library().join("libvfio_migration.so");
    let symbols = run(Command::new("nm")
        .args(["-D", "--defined-only", "--with-symbol-versions"])
        .arg(&library));
    let symbols = String::from_utf8(symbols.stdout).unwrap();
    let version = "VFIO_MIGRATION_0.1";
    let mut count = 0;
    for line in symbols.lines() {
        let name = line.rsplit(' ').next().unwrap();
        if name == version {
            continue;
        }
        let (name, of) = name.split_once("@@").unwrap_or_else(|| panic!("{line}"));
        assert!(name.starts_with("vfm_") && of == version, "{line}");
        count += 1;
    }
    let script = fs::read_to_string(format!("{ROOT}/vfio_migration.map")).unwrap();
    assert_eq!(count, script.matches("        vfm_").count());
    let dynamic = run(Command::new("readelf").arg("-d").arg(&library));
    let dynamic = String::from_utf8(dynamic.stdout).unwrap();
    assert!(
        dynamic.contains("soname: [libvfio_migration.so.0.1]"),
        "{dynamic}"
    );
}
