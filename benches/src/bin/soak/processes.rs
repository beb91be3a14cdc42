//! A migration of the command's own processes: `send`, `relay`s, `receive`, of files.
//!
//! ```text
//!   send ─▶ link ─▶ relay … ─▶ receive          judged: statuses, words, files, what is left
//!     └──────── a signal, a stop, a small disk, a cut ────────┘
//! ```
//!
//! The command is built once, before the first, by the cargo that runs this, and stands beside this
//! program. This thread does all but the link's work. Every process is waited for with a bound, and is
//! killed where this thread lets go of it; a directory goes with its migration.

use std::{
    env, fs,
    io::{BufRead, BufReader, Read},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread::{self, JoinHandle},
    time::Duration,
};

use crate::{
    cast::{Cast, Role, Trouble},
    link::{Fate, Link},
    minded::until_minded,
    plan::Plan,
    random::Random,
    verify::check,
};

/// How long a process may take to end, in looks: a machine that stands still ends nothing.
const LOOKS: u32 = 24_000;
const LOOK: Duration = Duration::from_millis(5);

/// The command's binary, beside this one.
fn binary() -> Result<PathBuf, String> {
    let here = env::current_exe().map_err(|error| error.to_string())?;
    Ok(here.with_file_name("vfio-migrate"))
}

/// Has the command built, where a cargo runs this; and says what is missing where it is not there.
pub fn prepare() -> Result<(), String> {
    let binary = binary()?;
    if let Some(cargo) = env::var_os("CARGO") {
        let mut build = Command::new(cargo);
        build
            .args([
                "build",
                "--quiet",
                "--locked",
                "-p",
                "vfio-migration",
                "--features",
                "cli",
            ])
            .args(["--bin", "vfio-migrate"])
            .current_dir(env!("CARGO_MANIFEST_DIR"));
        if !cfg!(debug_assertions) {
            build.arg("--release");
        }
        let status = build.status().map_err(|error| format!("cargo: {error}"))?;
        check(status.success(), "the command vfio-migrate cannot be built")?;
    }
    check(
        binary.exists(),
        &format!(
            "{} is not there: cargo build --release -p vfio-migration --features cli",
            binary.display()
        ),
    )
}

/// A directory, which goes with its migration.
struct Directory(PathBuf);

impl Directory {
    fn new(seed: u64) -> Result<Self, String> {
        let path = env::temp_dir().join(format!("vfio-soak-{}-{seed}", std::process::id()));
        fs::create_dir(&path).map_err(|error| error.to_string())?;
        Ok(Self(path))
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(&self.0);
    }
}

/// A process that runs.
struct Process {
    role: Role,
    child: Child,
    said: Option<JoinHandle<String>>,
    first: String,
}

/// How it has ended.
#[derive(Debug)]
struct Ended {
    role: Role,
    status: ExitStatus,
    said: String,
}

impl Ended {
    fn succeeded(&self) -> bool {
        self.status.success()
    }
}

impl Process {
    /// Starts it; one that listens says where.
    fn start(role: Role, under: &str, line: &str) -> Result<(Self, String), String> {
        let mut child = Command::new("sh")
            .args(["-c", &format!("{under} exec \"$0\" \"$@\"")])
            .arg(binary()?)
            .args(line.split_whitespace())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| error.to_string())?;
        let mut stderr = BufReader::new(child.stderr.take().ok_or("no stderr")?);
        let mut process = Self {
            role,
            child,
            said: None,
            first: String::new(),
        };
        let mut address = String::new();
        if role != Role::Send {
            let read = stderr.read_line(&mut process.first);
            read.map_err(|error| error.to_string())?;
            let listens = process.first.trim_end().rsplit_once(' ');
            let (_, at) = listens.unwrap_or_default();
            check(
                process.first.contains("listening on"),
                &format!("{line}: does not listen: {}", process.first),
            )?;
            address = at.to_owned();
        }
        process.said = Some(thread::spawn(move || {
            let mut text = Vec::new();
            let _read = stderr.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        }));
        Ok((process, address))
    }

    /// One that has ended already is not sent any. One that the command minds is not sent before it does.
    fn signal(&self, name: &str) -> Result<(), String> {
        if matches!(name, "INT" | "TERM" | "HUP") {
            until_minded(self.child.id());
        }
        let status = Command::new("kill")
            .args(["-s", name, &self.child.id().to_string()])
            .stderr(Stdio::null())
            .status();
        status.map(drop).map_err(|error| error.to_string())
    }

    fn end(mut self) -> Result<Ended, String> {
        let mut looks = 0;
        let status = loop {
            let status = self.child.try_wait().map_err(|error| error.to_string())?;
            if let Some(status) = status {
                break status;
            }
            looks += 1;
            if looks > LOOKS {
                let _dead = self.child.kill();
                let said = self.said.take().and_then(|it| it.join().ok());
                return Err(format!("{:?} hangs; it has said: {said:?}", self.role));
            }
            thread::sleep(LOOK);
        };
        let said = self.said.take().and_then(|it| it.join().ok());
        Ok(Ended {
            role: self.role,
            status,
            said: format!("{}{}", self.first, said.unwrap_or_default()),
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _dead = self.child.kill();
        let _status = self.child.wait();
    }
}

/// Runs it. Returns whether it succeeded, as judged.
pub fn run(plan: &Plan, cast: &Cast) -> Result<bool, String> {
    let directory = Directory::new(plan.seed)?;
    let text = |error: std::io::Error| error.to_string();
    let (mut sources, mut targets) = (String::new(), String::new());
    let mut states = Vec::new();
    for (at, state) in cast.states.iter().enumerate() {
        let mut random = Random(plan.seed ^ (at as u64) << 40);
        let words = (0..state.len.div_ceil(8)).flat_map(|_| random.next().to_le_bytes());
        let bytes: Vec<u8> = words.take(state.len).collect();
        let source = directory.file(&format!("source{at}"));
        let target = directory.file(&format!("target{at}"));
        fs::write(&source, &bytes).map_err(text)?;
        let before = state.over.then(|| b"what was there".to_vec());
        if let Some(before) = &before {
            fs::write(&target, before).map_err(text)?;
        }
        sources += &format!(" --device file:{source},id=d{at}");
        targets += &format!(" --device file:{target},id=d{at}");
        states.push(Both {
            target,
            before,
            after: bytes,
        });
    }
    // Who may never hear of its source gives up soon, where time has a part in it at all.
    let patience = cast.trouble.patience();
    let at = |name: &str| {
        if cast.tcp {
            "127.0.0.1:0".to_owned()
        } else {
            format!("unix:{}", directory.file(name))
        }
    };
    let under = match cast.trouble {
        Trouble::Disk(blocks) => format!("ulimit -f {blocks} &&"),
        _ => String::new(),
    };
    let line = format!(
        "receive --listen {} --accept-timeout {patience} {} {} {targets}",
        at("socket"),
        cast.both,
        cast.receive
    );
    let (receive, mut to) = Process::start(Role::Receive, &under, &line)?;
    let mut all = vec![receive];
    for number in 0..cast.relays {
        let line = format!(
            "relay --listen {} --to {to} --accept-timeout {patience} {}",
            at(&format!("relay{number}")),
            cast.relay
        );
        let (relay, next) = Process::start(Role::Relay, "", &line)?;
        all.push(relay);
        to = next;
    }
    let link = cast
        .link
        .map(|fate: Fate| Link::new(&at("link"), &to, fate));
    let link = link.transpose().map_err(text)?;
    let to = link.as_ref().map_or(&to, |link| &link.address);
    let line = format!("send --to {to} {} {} {sources}", cast.both, cast.send);
    all.push(Process::start(Role::Send, "", &line)?.0);
    disturb(cast, &mut all)?;
    // From the source on. Who has never heard of a source waits for one as long as it was told to.
    let ended: Vec<_> = all
        .into_iter()
        .rev()
        .map(Process::end)
        .collect::<Result<_, _>>()?;
    drop(link);
    judge(cast, &ended, &states)?;
    left(cast, &directory.0, &states)?;
    Ok(ended.iter().all(Ended::succeeded))
}

fn disturb(cast: &Cast, all: &mut [Process]) -> Result<(), String> {
    let find = |role| {
        let found = all.iter().find(|process: &&Process| process.role == role);
        found.ok_or_else(|| format!("no {role:?}"))
    };
    match cast.trouble {
        Trouble::Nothing | Trouble::Disk(_) | Trouble::Cut(_) => {}
        Trouble::Pauses(role, time) => {
            thread::sleep(cast.after);
            find(role)?.signal("STOP")?;
            thread::sleep(time);
            find(role)?.signal("CONT")?;
        }
        Trouble::Signal(role, name) => {
            thread::sleep(cast.after);
            find(role)?.signal(name)?;
        }
        Trouble::Stops(role) => {
            thread::sleep(cast.after);
            find(role)?.signal("STOP")?;
            // Longer than every time-out: the others have ended by themselves.
            thread::sleep(Duration::from_secs(6));
            find(role)?.signal("KILL")?;
        }
    }
    Ok(())
}

/// A device's file: what was there, and what is to come.
struct Both {
    target: String,
    before: Option<Vec<u8>>,
    after: Vec<u8>,
}

fn judge(cast: &Cast, ended: &[Ended], states: &[Both]) -> Result<(), String> {
    let all = format!("{ended:?}");
    for one in ended {
        check(!one.said.contains("panicked"), &format!("a panic: {all}"))?;
        let killed = match cast.trouble {
            Trouble::Signal(role, "KILL") | Trouble::Stops(role) => role == one.role,
            _ => false,
        };
        let right = match one.status.code() {
            Some(0 | 1 | 129 | 130 | 143) => true,
            Some(_) => false,
            None => killed && one.status.signal() == Some(9),
        };
        check(right, &format!("a status that is none of ours: {all}"))?;
        let silent = one.status.code() == Some(1) && !one.said.contains("vfio-migrate: ");
        check(!silent, &format!("it does not say why: {all}"))?;
    }
    let of = |role| ended.iter().filter(move |one| one.role == role);
    let every = |role| of(role).all(Ended::succeeded);
    let (sent, received) = (every(Role::Send), every(Role::Receive));
    check(
        !cast.must_succeed() || ended.iter().all(Ended::succeeded),
        &format!("nothing went wrong, and it failed: {all}"),
    )?;
    // A destination that is killed after its last word has no status to say so.
    let lost = of(Role::Receive).any(|one| one.status.code().is_none());
    check(
        !sent || received || lost,
        &format!("the source was told of a success: {all}"),
    )?;
    // What cannot be known is whether the destination's last word would have come through.
    let known = matches!(
        cast.trouble,
        Trouble::Nothing | Trouble::Pauses(..) | Trouble::Disk(_)
    );
    check(
        !known || sent == received,
        &format!("the statuses disagree: {all}"),
    )?;
    let whole = |state: &Both| fs::read(&state.target).is_ok_and(|is| is == state.after);
    let old = |state: &Both| fs::read(&state.target).ok() == state.before;
    for state in states {
        let (whole, old) = (whole(state), old(state));
        check(
            whole || old,
            &format!("half a state in {}: {all}", state.target),
        )?;
        check(
            whole || !received && !sent,
            &format!("a success without its file: {all}"),
        )?;
        check(
            old || received || lost,
            &format!("a failure that replaced a file: {all}"),
        )?;
    }
    for relay in of(Role::Relay).filter(|one| one.succeeded()) {
        let passed = states.iter().all(whole);
        check(
            passed,
            &format!("a relay of a failure says success: {relay:?}; {all}"),
        )?;
    }
    Ok(())
}

/// Nothing is left but the states; who was killed could not clean up.
fn left(cast: &Cast, directory: &Path, states: &[Both]) -> Result<(), String> {
    let killed = matches!(cast.trouble, Trouble::Signal(_, "KILL") | Trouble::Stops(_));
    let entries = fs::read_dir(directory).map_err(|error| error.to_string())?;
    let names: Vec<_> = entries
        .filter_map(Result::ok)
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    let mut expected: Vec<_> = (0..states.len()).map(|at| format!("source{at}")).collect();
    expected.extend((0..states.len()).map(|at| format!("target{at}")));
    let more = names.iter().find(|name| {
        // One that is killed while it gives several files their names leaves those that it had in hand.
        let may_stay = *name == "socket" || name.starts_with("relay") || name.starts_with(".vfio-");
        !(expected.contains(name) || may_stay && killed)
    });
    check(more.is_none(), &format!("left behind: {names:?}"))
}
