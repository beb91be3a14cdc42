//! What the tests of the command have in common: a process under a watchdog, and a place for files.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, ChildStderr, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    thread::{self, JoinHandle},
    time::Duration,
};

/// How long anything may take before it counts as a hang. Not a measure of speed.
pub const WATCHDOG: Duration = Duration::from_secs(120);

/// How often its end is looked for.
const LOOK: Duration = Duration::from_millis(5);

/// How a process has ended.
#[derive(Debug)]
pub struct Ended {
    /// `None` where a signal ended it.
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    pub fn json(&self) -> serde_json::Value {
        assert_eq!(self.status, Some(0), "{self:?}");
        serde_json::from_str(&self.stdout).expect("one JSON object")
    }

    /// The one line that says why it failed.
    pub fn why(&self) -> &str {
        assert_eq!(self.status, Some(1), "{self:?}");
        let mut lines = self.stderr.lines();
        let why = lines.find(|line| !line.contains("listening on"));
        let why = why.unwrap_or_else(|| panic!("it does not say why: {self:?}"));
        assert!(why.starts_with("vfio-migrate: "), "{self:?}");
        assert_eq!(lines.count(), 0, "one line: {self:?}");
        why
    }
}

/// A process that runs.
pub struct Running {
    child: Child,
    stdout: JoinHandle<String>,
    stderr: JoinHandle<String>,
    first: String,
}

fn rest(mut input: impl Read + Send + 'static) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut text = String::new();
        // What is not UTF-8 is the test's failure, later.
        let _read = input.read_to_string(&mut text);
        text
    })
}

fn command<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vfio-migrate"));
    command
        .args(arguments)
        .env_remove("VFIO_MIGRATE_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

pub fn start<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Running {
    let mut child = command(arguments).spawn().unwrap();
    let stdout = rest(child.stdout.take().unwrap());
    let stderr = rest(child.stderr.take().unwrap());
    let first = String::new();
    Running {
        child,
        stdout,
        stderr,
        first,
    }
}

/// Starts a destination, and gives the address on which it listens.
pub fn listen<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> (Running, String) {
    let mut child = command(arguments).spawn().unwrap();
    let stdout = rest(child.stdout.take().unwrap());
    let mut stderr: BufReader<ChildStderr> = BufReader::new(child.stderr.take().unwrap());
    let mut first = String::new();
    stderr.read_line(&mut first).unwrap();
    let (_, address) = first.trim_end().rsplit_once(' ').unwrap_or_default();
    assert!(first.contains("listening on"), "{first}");
    let address = address.to_owned();
    let running = Running {
        child,
        stdout,
        stderr: rest(stderr),
        first,
    };
    (running, address)
}

impl Running {
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
    }

    /// Another signal, by its name.
    pub fn signal(&self, name: &str) {
        let kill = Command::new("kill")
            .args(["-s", name, &self.child.id().to_string()])
            .status();
        assert!(kill.unwrap().success());
    }

    /// Waits for its end, no longer than the watchdog allows.
    pub fn end(mut self) -> Ended {
        // Counted in looks, not by the clock: a machine that stands still is no hang.
        let mut looks = 0;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            looks += 1;
            if looks > WATCHDOG.as_millis() / LOOK.as_millis() {
                self.child.kill().unwrap();
                let _status = self.child.wait();
                let stderr = self.stderr.join().unwrap();
                panic!("it hangs; it has said: {}{stderr}", self.first);
            }
            thread::sleep(LOOK);
        };
        Ended {
            status: status.code(),
            stdout: self.stdout.join().unwrap(),
            stderr: self.first + &self.stderr.join().unwrap(),
        }
    }
}

pub fn run<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Ended {
    start(arguments).end()
}

/// A directory of the test's own, which goes with it.
pub struct Directory(PathBuf);

impl Directory {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        // Relaxed: a counter.
        let number = COUNT.fetch_add(1, Relaxed);
        // Short: a unix socket's path has to fit in 108 bytes.
        let name = format!("vfio-migrate-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(&self.0);
    }
}

pub fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

/// Pseudo-random numbers, splitmix64.
pub fn random(seed: u64) -> u64 {
    let mut word = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}
