//! Builds and runs the models with the flags they need; or mutates the code and sees who notices.
//!
//! ```text
//!   cargo run -p vfio-migration-loom-tests [-- FILTER]             every model, or those named so
//!   cargo run -p vfio-migration-loom-tests -- --mutants [FILTER]   every mutant, or those named so
//! ```
//!
//! Models need two cfgs: `loom` for the engine, `crossbeam_loom` for crossbeam-epoch. They are built
//! in a folder of their own, so that a plain build never sees them.

mod mutants;

use std::{
    env,
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, ExitCode, Stdio},
};

/// Where the workspace is.
fn workspace() -> &'static Path {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().expect("the package is in a workspace")
}

/// `cargo test` on the models of the workspace in `root`, built into `target`.
fn cargo_test(root: &Path, target: &Path) -> Command {
    let flags = env::var("RUSTFLAGS").unwrap_or_default();
    let mut command = Command::new(env!("CARGO"));
    command
        .current_dir(root)
        .args(["test", "--quiet", "--package", env!("CARGO_PKG_NAME")])
        .args(["--profile", "loom", "--target-dir"])
        .arg(target)
        .env(
            "RUSTFLAGS",
            format!("{flags} --cfg loom --cfg crossbeam_loom"),
        );
    command
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let passed = match arguments.split_first() {
        Some((first, rest)) if first == "--mutants" => mutants::run(rest.first()),
        _ => run_models(&arguments),
    };
    if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Runs the models, and ends with their count.
fn run_models(arguments: &[String]) -> bool {
    let mut child = cargo_test(workspace(), &workspace().join("target/loom"))
        .args(["--tests", "--no-fail-fast", "--"])
        .args(arguments)
        .stdout(Stdio::piped())
        .spawn()
        .expect("cargo runs");
    let output = child.stdout.take().expect("it is piped");
    let (mut passed, mut failed) = (0, 0);
    for line in BufReader::new(output).lines() {
        let line = line.expect("cargo writes text");
        if let Some(result) = line.strip_prefix("test result: ") {
            let count = |what: &str| -> u32 {
                let mut words = result
                    .split([' ', ';', '.'])
                    .filter(|word| !word.is_empty());
                let mut before = "0";
                words
                    .find_map(|word| {
                        let count = (word == what).then(|| before.parse().ok());
                        before = word;
                        count
                    })
                    .flatten()
                    .unwrap_or(0)
            };
            passed += count("passed");
            failed += count("failed");
        }
        println!("{line}");
    }
    let status = child.wait().expect("cargo ends");
    println!("{passed} passed, {failed} failed");
    status.success() && failed == 0 && passed > 0
}
