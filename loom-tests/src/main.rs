//! Runs the models, or the models against mutants of the code that they model.
//!
//! ```text
//! cargo run --manifest-path loom-tests/Cargo.toml [-- FILTER]             every model whose name has FILTER
//! cargo run --manifest-path loom-tests/Cargo.toml -- --mutants [FILTER]   every mutant whose name has it
//! ```
//!
//! Two environment variables say how deep the models go: `LOOM_MAX_PREEMPTIONS` (2 by default) and
//! `VFIO_LOOM_DEPTH=release`, which adds one to what each model has chosen.

mod models;
mod mutants;

use std::{
    env,
    path::{Path, PathBuf},
    process::ExitCode,
};

fn main() -> ExitCode {
    let mut arguments: Vec<String> = env::args().skip(1).collect();
    let mutate = arguments.first().is_some_and(|first| first == "--mutants");
    if mutate {
        arguments.remove(0);
    }
    let filter = match arguments.as_slice() {
        [] => "",
        [filter] if !filter.starts_with('-') => filter,
        _ => {
            eprintln!("usage: vfio-migration-loom-tests [--mutants] [FILTER]");
            return ExitCode::from(2);
        }
    };
    let done = if mutate {
        mutants::run(&workspace(), filter)
    } else {
        models::run(&workspace(), filter)
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::from(2)
        }
    }
}

/// The folder of the workspace that this package is in.
fn workspace() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let workspace = package.parent().expect("the package is one of a workspace");
    workspace.to_owned()
}
