//! Which processes of the command one migration has, and what becomes of them: all from a seed.

use std::time::Duration;

use crate::{link::Fate, random::Random};

/// A process, by its place in the chain.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Role {
    Send,
    Relay,
    Receive,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug)]
pub enum Trouble {
    /// Nothing: it must succeed.
    Nothing,
    /// One stands still for a while, shorter than every time-out: it must succeed.
    Pauses(Role, Duration),
    /// One is sent a signal that ends it.
    Signal(Role, &'static str),
    /// One stands still for good.
    Stops(Role),
    /// The destination's files may have so many blocks of 512 bytes.
    Disk(u64),
    /// The link, on the source's side, is cut.
    Cut(Fate),
}

impl Trouble {
    /// For how many seconds nothing may move. Where nobody ends without a word nobody has to give up for
    /// time alone, and a machine that stands still fails nothing.
    pub const fn patience(self) -> u32 {
        match self {
            Self::Nothing | Self::Pauses(..) | Self::Disk(_) => 120,
            Self::Signal(..) | Self::Stops(_) | Self::Cut(_) => 2,
        }
    }
}

/// A device: its state's length, and whether there is a file of its name already.
#[derive(Clone, Copy, Debug)]
pub struct State {
    pub len: usize,
    pub over: bool,
}

/// One migration of processes.
#[derive(Clone, Debug)]
pub struct Cast {
    pub states: Vec<State>,
    pub relays: usize,
    pub tcp: bool,
    /// Whether there is a link besides.
    pub link: Option<Fate>,
    pub trouble: Trouble,
    /// When the trouble comes, where it has a time.
    pub after: Duration,
    /// The options of both ends, of each, and of the relays.
    pub both: String,
    pub send: String,
    pub receive: String,
    pub relay: String,
}

impl Cast {
    pub fn new(random: &mut Random) -> Self {
        let count = random.of(&[1, 1, 1, 2, 3, 8]);
        let states = (0..count).map(|_| {
            // Each size class as often, from nothing to 8 MiB.
            let class = random.below(24);
            State {
                len: random.size(1 << class),
                over: random.percent(50),
            }
        });
        let states: Vec<_> = states.collect();
        let relays = random.of(&[0, 0, 0, 1, 1, 2]);
        let victims: &[Role] = if relays > 0 {
            &[Role::Send, Role::Relay, Role::Receive]
        } else {
            &[Role::Send, Role::Receive]
        };
        let victim = random.of(victims);
        let most = states.iter().map(|state| state.len).max().unwrap_or(0) as u64;
        let moved = states
            .iter()
            .map(|state| state.len as u64 + 400)
            .sum::<u64>()
            + 1000;
        let trouble = match random.below(20) {
            0..6 => Trouble::Nothing,
            6..8 => Trouble::Pauses(victim, Duration::from_millis(random.below(400))),
            8..11 => Trouble::Signal(victim, "KILL"),
            11..14 => Trouble::Signal(victim, random.of(&["TERM", "INT", "HUP"])),
            14 => Trouble::Stops(victim),
            15..17 => Trouble::Disk(random.below(most.div_ceil(512) + 2)),
            _ => Trouble::Cut(Fate {
                cut_at: Some(random.below(moved)),
                reset: random.percent(50),
                ..Fate::default()
            }),
        };
        let link = match trouble {
            Trouble::Cut(fate) => Some(fate),
            _ => random.percent(20).then(|| Fate {
                piece: random.of(&[None, Some(1000), Some(4096), Some(65_536)]),
                ..Fate::default()
            }),
        };
        let backends = ["", "--backend blocking", "--backend uring"];
        let timeout = trouble.patience();
        let channels = random.of(&[1, 2, 3, 4, 8, 16, 64]);
        let flags = random.of(&[
            "",
            "",
            "",
            "--config-after-iterables",
            "--precopy-over-channels",
        ]);
        Self {
            relays,
            tcp: random.percent(50),
            link,
            trouble,
            after: Duration::from_micros(random.below(200_000)),
            both: format!("--timeout {timeout} --channels {channels} {flags}"),
            send: format!(
                "{} {}",
                random.of(&backends),
                random.of(&["", "--packet 4KiB", "--packet 100KiB", "--packet 1MiB"])
            ),
            receive: format!(
                "{} {} {}",
                random.of(&backends),
                random.of(&["", "--budget 8MiB", "--budget 64MiB"]),
                random.of(&["", "--spill memfd", "--spill off"])
            ),
            relay: format!(
                "--timeout {timeout} {}",
                if random.percent(50) {
                    format!("--channels {channels}")
                } else {
                    String::new()
                }
            ),
            states,
        }
    }

    /// Whether the migration must succeed.
    pub const fn must_succeed(&self) -> bool {
        matches!(self.trouble, Trouble::Nothing | Trouble::Pauses(..))
    }
}
