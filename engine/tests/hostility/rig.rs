//! A directory, a state, both ends of its migration, and the oracle.

use std::{
    collections::BTreeSet,
    fs,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::Duration,
};

use crate::command::{Directory, Ended, Running, listen_under, random, start_under, words};

/// How long a process may take to end. No measure of speed: a machine of two cores does eight cases.
pub const BOUND: Duration = Duration::from_secs(40);

static CASES: AtomicUsize = AtomicUsize::new(0);

/// One more case is tried.
pub fn case() {
    // Relaxed: a counter.
    CASES.fetch_add(1, Relaxed);
}

/// How many have been tried.
pub fn cases() -> usize {
    CASES.load(Relaxed)
}

/// Waits for a process's end, which must be one of those that the command promises.
pub fn end(running: Running) -> Ended {
    sound(running.end_within(BOUND))
}

/// The command's end is one that it promises: a status, and where that is a failure, a reason.
pub fn sound(ended: Ended) -> Ended {
    let said = ended.stderr.contains("panicked") || ended.stderr.contains("RUST_BACKTRACE");
    assert!(!said, "a panic: {ended:?}");
    let known = [0, 1, 2, 129, 130, 143].map(Some);
    assert!(
        known.contains(&ended.status),
        "no status of ours: {ended:?}"
    );
    if ended.status == Some(1) {
        let mut lines = ended.stderr.lines();
        let why = lines.any(|it| it.starts_with("vfio-migrate: ") && !it.contains("listening on"));
        assert!(why, "it does not say why: {ended:?}");
    }
    ended
}

/// It has failed, and the reason has these words.
pub fn refused(ended: &Ended, named: &[&str]) {
    assert!(matches!(ended.status, Some(1 | 2)), "{named:?}: {ended:?}");
    for name in named {
        assert!(
            ended.stderr.contains(name),
            "{name} is not named: {ended:?}"
        );
    }
}

/// How the two ends reach each other.
#[derive(Clone, Copy, Debug)]
pub enum Wire {
    Tcp,
    Unix,
}

/// What the two ends are told, and under what they run.
#[derive(Clone, Copy, Debug)]
pub struct Ends<'a> {
    pub wire: Wire,
    pub both: &'a str,
    pub send: &'a str,
    pub receive: &'a str,
    pub receive_under: &'a str,
}

impl Default for Ends<'_> {
    fn default() -> Self {
        Self {
            wire: Wire::Unix,
            both: "--timeout 5 --channels 2",
            send: "",
            receive: "",
            receive_under: "",
        }
    }
}

/// A directory with a state in `source`, which is to come to `target`.
pub struct Rig {
    pub directory: Directory,
    pub state: Vec<u8>,
    before: Option<Vec<u8>>,
}

impl Rig {
    pub fn new(len: usize) -> Self {
        let directory = Directory::new();
        let seed = directory.path().as_os_str().len() as u64;
        let state = bytes(len, seed);
        fs::write(directory.file("source"), &state).unwrap();
        case();
        Self {
            directory,
            state,
            before: None,
        }
    }

    /// With a file at `target` already.
    pub fn over(len: usize) -> Self {
        let mut rig = Self::new(len);
        fs::write(rig.target(), "what was there").unwrap();
        rig.before = Some(b"what was there".into());
        rig
    }

    pub fn target(&self) -> String {
        self.directory.file("target")
    }

    pub fn listen_at(&self, wire: Wire) -> String {
        match wire {
            Wire::Tcp => "127.0.0.1:0".into(),
            Wire::Unix => format!("unix:{}", self.directory.file("socket")),
        }
    }

    /// The destination; or how it refused.
    pub fn receive(&self, ends: &Ends<'_>) -> Result<(Running, String), Ended> {
        let device = format!("--device file:{},id=nic", self.target());
        let device = if ends.receive.contains("--device") {
            ""
        } else {
            &device
        };
        let line = format!(
            "receive --listen {} --accept-timeout 20 {} {} {device}",
            self.listen_at(ends.wire),
            ends.both,
            ends.receive
        );
        listen_under(ends.receive_under, words(&line))
    }

    pub fn send(&self, to: &str, ends: &Ends<'_>) -> Running {
        let device = format!("--device file:{},id=nic", self.directory.file("source"));
        let device = if ends.send.contains("--device") {
            ""
        } else {
            &device
        };
        let line = format!("send --to {to} {} {} {device}", ends.both, ends.send);
        start_under("", words(&line))
    }

    /// Both, to their ends, and judged: source, destination. A destination that refuses before it
    /// listens has no source.
    pub fn migrate(&self, ends: &Ends<'_>) -> (Option<Ended>, Ended) {
        match self.receive(ends) {
            Err(refused) => {
                let received = sound(refused);
                assert_ne!(received.status, Some(0), "{received:?}");
                self.untouched(&[]);
                (None, received)
            }
            Ok((receiving, to)) => {
                let sent = end(self.send(&to, ends));
                let received = end(receiving);
                self.judge(&sent, &received);
                (Some(sent), received)
            }
        }
    }

    /// What must hold of any two ends.
    pub fn judge(&self, sent: &Ended, received: &Ended) {
        let (here, there) = (sent.status == Some(0), received.status == Some(0));
        // The destination's last word may be lost: then the source says whom to believe.
        let unknown = sent.stderr.contains("the destination's status alone says");
        let agree = here == there || (there && unknown);
        assert!(agree, "the statuses disagree: {sent:?}; {received:?}");
        if there {
            self.arrived(&[]);
        } else {
            self.untouched(&[]);
        }
    }

    /// The file is the state, and nothing else is there but `besides`.
    pub fn arrived(&self, besides: &[&str]) {
        let after = fs::read(self.target()).unwrap();
        assert_eq!(after.len(), self.state.len(), "success, and another length");
        assert!(after == self.state, "success, and another state");
        self.left(&[&["source", "target"], besides].concat());
    }

    /// What was there before is there, and nothing else but `besides`.
    pub fn untouched(&self, besides: &[&str]) {
        let before: &[&str] = match &self.before {
            Some(before) => {
                assert!(fs::read(self.target()).unwrap() == *before, "it was harmed");
                &["source", "target"]
            }
            None => &["source"],
        };
        self.left(&[before, besides].concat());
    }

    /// Just these are in the directory.
    pub fn left(&self, names: &[&str]) {
        let entries = fs::read_dir(self.directory.path()).unwrap();
        let is: BTreeSet<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        let expected = names.iter().map(|it| (*it).to_owned()).collect();
        assert_eq!(is, expected, "left behind, or gone");
    }
}

/// Bytes that are not each other's.
pub fn bytes(len: usize, seed: u64) -> Vec<u8> {
    let words = (0..len.div_ceil(8) as u64).map(|at| random(seed ^ (at << 20)));
    let mut bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
    bytes.truncate(len);
    bytes
}

/// Waits until something holds.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    const LOOK: Duration = Duration::from_millis(5);
    // Counted in looks, as the watchdog is.
    for _ in 0..BOUND.as_millis() / LOOK.as_millis() {
        if holds() {
            return;
        }
        std::thread::sleep(LOOK);
    }
    panic!("never: {what}");
}
