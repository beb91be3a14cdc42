//! The shared library as it is installed, and C programs that are built against it.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::OnceLock,
};

pub const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// What a program is run with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum With {
    Nothing,
    AddressSanitizer,
    Valgrind,
}

/// Runs a tool to its end. One that is missing fails the test: what was not looked at has not passed.
pub fn run(command: &mut Command) -> Output {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}: gcc, g++ and valgrind are needed"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    output
}

/// The folder with `libvfio_migration.so`, linked as `install` does.
pub fn library() -> &'static Path {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    MADE.get_or_init(|| {
        // Beside this test, where cargo has built it.
        let test = env::current_exe().unwrap();
        let archive = test.parent().unwrap().join("libvfio_migration_capi.a");
        let folder =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(concat!("lib-", env!("CARGO_CRATE_NAME")));
        run(Command::new(Path::new(ROOT).join("link"))
            .arg(archive)
            .arg(&folder));
        folder
    })
}

/// Builds a C program, and gives the command that runs it.
pub fn program(source: &str, with: With) -> Command {
    let name = Path::new(source).file_stem().unwrap().to_str().unwrap();
    let built = library().join(format!("{name}-{with:?}"));
    let mut compiler = Command::new("gcc");
    compiler
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-g", "-O1"])
        .arg(format!("-I{ROOT}/include"))
        .arg(Path::new(ROOT).join(source))
        .arg("-o")
        .arg(&built)
        .arg(format!("-L{}", library().display()))
        .arg(format!("-Wl,-rpath,{}", library().display()))
        .args(["-lvfio_migration", "-lpthread"]);
    if with == With::AddressSanitizer {
        compiler.args(["-fsanitize=address,undefined", "-fno-sanitize-recover"]);
    }
    run(&mut compiler);
    if with != With::Valgrind {
        return Command::new(built);
    }
    let mut valgrind = Command::new("valgrind");
    // What std keeps of its threads until the process ends is not lost.
    valgrind
        .args(["-q", "--error-exitcode=9", "--leak-check=full"])
        .args([
            "--show-leak-kinds=definite,indirect",
            "--errors-for-leak-kinds=definite,indirect",
        ])
        .arg(built);
    valgrind
}
