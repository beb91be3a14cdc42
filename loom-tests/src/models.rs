//! Builds the models with the flags that they need, and runs each in a process of its own.

use std::{
    env,
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

/// What a model may take. The slowest needs a fraction of it.
const LIMIT: Duration = Duration::from_secs(120);

/// A built test file.
struct Binary {
    /// Its name, without folder and ending.
    file: String,
    path: PathBuf,
}

/// One model.
#[derive(Clone, Debug)]
pub struct Model {
    binary: PathBuf,
    /// Its file's name, without folder and ending.
    pub file: String,
    /// Its function's name.
    pub name: String,
}

/// What became of a model's run.
#[derive(Debug, Eq, PartialEq)]
pub enum Outcome {
    /// It is green.
    Passed,
    /// It is red, and this is what it printed.
    Failed(String),
    /// It was stopped after [`LIMIT`].
    Hung,
}

/// Runs all models of `workspace` whose names contain `filter`. Returns whether all are green.
pub fn run(workspace: &Path, filter: &str) -> Result<bool, String> {
    let models = build(workspace, &workspace.join("target/loom"), &[])?;
    let models: Vec<Model> = models
        .into_iter()
        .filter(|model| format!("{}::{}", model.file, model.name).contains(filter))
        .collect();
    let failed = AtomicUsize::new(0);
    run_all(&models, |model, outcome, took| {
        let word = match outcome {
            Outcome::Passed => "ok",
            Outcome::Failed(_) => "FAILED",
            Outcome::Hung => "HUNG",
        };
        let name = format!("{}::{}", model.file, model.name);
        println!("{name:<64} {word:<6} {:6.1} s", took.as_secs_f64());
        if let Outcome::Failed(output) = outcome {
            println!("{output}");
        }
        if *outcome != Outcome::Passed {
            failed.fetch_add(1, Relaxed);
        }
        true
    })?;
    let failed = failed.into_inner();
    println!("{} models passed, {failed} failed", models.len() - failed);
    Ok(failed == 0)
}

/// Builds the test files of `workspace`, all of them where `files` is empty, and lists their models,
/// in the order of `files`.
pub fn build(workspace: &Path, target: &Path, files: &[&str]) -> Result<Vec<Model>, String> {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    let models = workspace.join("loom-tests");
    command
        .current_dir(&models)
        .args(["test", "--no-run", "--color", "never", "--profile", "loom"])
        .args(["-p", "vfio-migration-loom-tests", "--target-dir"])
        .arg(target);
    if files.is_empty() {
        command.args(["--test", "*"]);
    } else {
        // One module has changed since the last build, and the models need not be fast.
        command.env("CARGO_PROFILE_LOOM_INCREMENTAL", "true");
    }
    for file in files {
        command.args(["--test", file]);
    }
    let flags = env::var("RUSTFLAGS").unwrap_or_default();
    command.env(
        "RUSTFLAGS",
        format!("{flags} --cfg loom --cfg crossbeam_loom"),
    );
    let output = command
        .output()
        .map_err(|error| format!("cargo: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(said.into_owned());
    }
    let mut binaries: Vec<Binary> = said.lines().filter_map(binary).collect();
    binaries.sort_by_key(|binary| files.iter().position(|file| *file == binary.file));
    let mut found = Vec::new();
    for binary in binaries {
        // Cargo prints paths below the folder it runs in without it.
        let path = models.join(&binary.path);
        let list = Command::new(&path)
            .args(["--list", "--format", "terse"])
            .output()
            .map_err(|error| format!("{}: {error}", path.display()))?;
        let list = String::from_utf8_lossy(&list.stdout);
        found.extend(list.lines().filter_map(|line| {
            Some(Model {
                binary: path.clone(),
                file: binary.file.clone(),
                name: line.strip_suffix(": test")?.to_owned(),
            })
        }));
    }
    if found.is_empty() {
        return Err(format!("cargo built no models:\n{said}"));
    }
    Ok(found)
}

/// Reads cargo's line `Executable tests/slot.rs (target/…/slot-0123)`.
fn binary(line: &str) -> Option<Binary> {
    let (source, path) = line.trim().strip_prefix("Executable ")?.split_once(" (")?;
    Some(Binary {
        file: Path::new(source).file_stem()?.to_str()?.to_owned(),
        path: path.strip_suffix(')')?.into(),
    })
}

/// Runs `models` on as many threads as there are processors, and tells `report` of each, one at a
/// time. Begins no other model once it has returned `false`.
pub fn run_all(
    models: &[Model],
    report: impl Fn(&Model, &Outcome, Duration) -> bool + Sync,
) -> Result<(), String> {
    let next = AtomicUsize::new(0);
    let go_on = AtomicBool::new(true);
    let reporting = Mutex::new(());
    let worker = || -> io::Result<()> {
        while let Some(model) = models.get(next.fetch_add(1, Relaxed)) {
            let began = Instant::now();
            let Some(outcome) = run_one(model, &go_on)? else {
                return Ok(());
            };
            let _one_at_a_time = reporting.lock();
            if go_on.load(Relaxed) && !report(model, &outcome, began.elapsed()) {
                go_on.store(false, Relaxed);
            }
        }
        Ok(())
    };
    let processors = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..processors).map(|_| scope.spawn(worker)).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().expect("a worker does not panic"))
    })
    .map_err(|error| format!("a model's process: {error}"))
}

/// Runs one model. `None` where `go_on` ended it.
fn run_one(model: &Model, go_on: &AtomicBool) -> io::Result<Option<Outcome>> {
    let mut child = Command::new(&model.binary)
        .args(["--exact", &model.name, "--test-threads", "1"])
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let end = Instant::now() + LIMIT;
    // A model prints less than a pipe holds, so the pipes can wait until it is over.
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        let hung = Instant::now() > end;
        if hung || !go_on.load(Relaxed) {
            stop(&mut child)?;
            return Ok(hung.then_some(Outcome::Hung));
        }
        thread::sleep(Duration::from_millis(5));
    };
    if status.success() {
        return Ok(Some(Outcome::Passed));
    }
    let output = child.wait_with_output()?;
    let text = [output.stdout, output.stderr].concat();
    Ok(Some(Outcome::Failed(
        String::from_utf8_lossy(&text).into_owned(),
    )))
}

fn stop(child: &mut Child) -> io::Result<()> {
    child.kill()?;
    child.wait()?;
    Ok(())
}
