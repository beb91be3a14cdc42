//! What the tests of the command have in common: a process under a watchdog, and a place for files.

#[path = "minded.rs"]
mod minded;

use std::{
    ffi::OsStr,
    fmt, fs,
    io::{BufRead, BufReader, Read},
    os::unix::process::ExitStatusExt,
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
pub struct Ended {
    /// `None` where a signal ended it.
    pub status: Option<i32>,
    /// Which.
    pub signal: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl fmt::Debug for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Enough to know it by: an inspection may have said megabytes.
        let short = |text: &str| text.chars().take(3000).collect::<String>();
        f.debug_struct("Ended")
            .field("status", &self.status)
            .field("signal", &self.signal)
            .field("stdout", &short(&self.stdout))
            .field("stderr", &short(&self.stderr))
            .finish()
    }
}

/// A process that runs; it is killed where the test lets go of it.
pub struct Running {
    pub child: Child,
    pub stdout: Option<JoinHandle<String>>,
    pub stderr: Option<JoinHandle<String>>,
    pub first: String,
}

fn rest(mut input: impl Read + Send + 'static) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut text = String::new();
        // What is not UTF-8 is the test's failure, later.
        let _read = input.read_to_string(&mut text);
        text
    })
}

/// A program that begins with SIGHUP as it is by default, also where this process was told to ignore it
/// (`nohup`): the command leaves an ignored one alone.
fn fresh(program: &str) -> Command {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = u64::from_str_radix(ignored.unwrap().trim(), 16).unwrap();
    if ignored & 1 == 0 {
        return Command::new(program);
    }
    let mut command = Command::new("env");
    command.args(["--default-signal=HUP", program]);
    command
}

/// The command, with what a shell does before it becomes the command: `ulimit -n 40`, say.
pub fn command_under<S: AsRef<OsStr>>(
    under: &str,
    arguments: impl IntoIterator<Item = S>,
) -> Command {
    let program = env!("CARGO_BIN_EXE_vfio-migrate");
    let mut command = if under.is_empty() {
        fresh(program)
    } else {
        let mut shell = fresh("sh");
        let script = if under.contains("\"$@\"") {
            under.to_owned()
        } else {
            format!("{under} && exec \"$0\" \"$@\"")
        };
        shell.args(["-c", &script, program]);
        shell
    };
    command
        .args(arguments)
        .env_remove("VFIO_MIGRATE_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

pub fn start<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Running {
    start_under("", arguments)
}

/// As [`start`], under what a shell does first: see [`command_under`].
pub fn start_under<S: AsRef<OsStr>>(
    under: &str,
    arguments: impl IntoIterator<Item = S>,
) -> Running {
    start_command(command_under(under, arguments))
}

/// As [`start`], of a command that the test has made, with pipes.
pub fn start_command(mut command: Command) -> Running {
    let mut child = command.spawn().unwrap();
    Running {
        stdout: child.stdout.take().map(rest),
        stderr: child.stderr.take().map(rest),
        child,
        first: String::new(),
    }
}

/// Starts a destination, and gives the address on which it listens.
pub fn listen<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> (Running, String) {
    listen_under("", arguments).unwrap_or_else(|ended| panic!("it does not listen: {ended:?}"))
}

/// As [`listen`], under what a shell does first; or how it ended without listening.
pub fn listen_under<S: AsRef<OsStr>>(
    under: &str,
    arguments: impl IntoIterator<Item = S>,
) -> Result<(Running, String), Ended> {
    listen_command(command_under(under, arguments))
}

/// As [`listen_under`], of a command that the test has made, with pipes.
pub fn listen_command(mut command: Command) -> Result<(Running, String), Ended> {
    let mut child = command.spawn().unwrap();
    let stdout = child.stdout.take().map(rest);
    let mut stderr: BufReader<ChildStderr> = BufReader::new(child.stderr.take().unwrap());
    let mut first = String::new();
    let mut listening = false;
    while !listening && stderr.read_line(&mut first).unwrap() > 0 {
        let last = first.lines().next_back().unwrap_or_default();
        listening = last.contains("listening on");
    }
    let (_, address) = first.trim_end().rsplit_once(' ').unwrap_or_default();
    let address = address.to_owned();
    let running = Running {
        child,
        stdout,
        stderr: Some(rest(stderr)),
        first,
    };
    if listening {
        Ok((running, address))
    } else {
        Err(running.end())
    }
}

impl Running {
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
    }

    /// Another signal, by its name. One that the command minds is not sent before it does.
    pub fn signal(&self, name: &str) {
        if matches!(name, "INT" | "TERM" | "HUP") {
            minded::until_minded(self.id());
        }
        let kill = Command::new("kill")
            .args(["-s", name, &self.child.id().to_string()])
            .status();
        assert!(kill.unwrap().success());
    }

    /// Waits for its end, no longer than the watchdog allows.
    pub fn end(self) -> Ended {
        self.end_within(WATCHDOG)
    }

    /// Waits for its end, no longer than that. What an unread process has said is read now.
    pub fn end_within(mut self, most: Duration) -> Ended {
        // Counted in looks, not by the clock: a machine that stands still is no hang.
        let mut looks = 0;
        let (status, hangs) = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break (status, false);
            }
            looks += 1;
            if looks > most.as_millis() / LOOK.as_millis() {
                self.child.kill().unwrap();
                break (self.child.wait().unwrap(), true);
            }
            thread::sleep(LOOK);
        };
        let stdout = self.child.stdout.take().map(rest).or(self.stdout.take());
        let stderr = self.child.stderr.take().map(rest).or(self.stderr.take());
        let text =
            |from: Option<JoinHandle<String>>| from.map_or(String::new(), |it| it.join().unwrap());
        let first = std::mem::take(&mut self.first);
        let ended = Ended {
            status: status.code(),
            signal: status.signal(),
            stdout: text(stdout),
            stderr: first + &text(stderr),
        };
        assert!(!hangs, "it hangs; it has said: {}", ended.stderr);
        ended
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _status = self.child.wait();
    }
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
