//! Connecting: any number of connections to one address, side by side, within one time.
//!
//! ```text
//!   resolve ─▶ waiting ─▶ under way (as many as may be) ─┬─▶ established: Connection
//!                 ▲                                       │
//!                 └── a pause ◀── refused, lost, no room ◀┘
//!   all established ─▶ with TLS: shake hands, all side by side
//! ```
//!
//! A destination that does not listen yet, is busy, has a full backlog or never saw a packet is tried again. An
//! attempt without an answer is given up for a new one. Each attempt lasts twice as long as the one before, so
//! the command reaches a far destination too.
//!
//! At a near destination the connections are made one after another. A listener with a small backlog drops
//! connections while it is full, and those are tried again. But if several come at once, the kernel may accept
//! more than it has room for, and reset them when they are used. At a far destination several are made side by
//! side: the longer the last answer took, the more.
//!
//! The command's main thread uses this. Its one wait is a `poll` of the connections and of Ctrl-C. The wait
//! ends
//! with the connections, a permanent failure, the time, Ctrl-C, or the caller's `look`, which is asked each
//! tick.
//! A thread of its own looks a name up, because the look-up cannot be interrupted. If the look-up does not
//! return, the thread is left behind and ends with the process.

use std::{
    io, mem,
    net::{SocketAddr, TcpStream, ToSocketAddrs},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::mpsc::{self, TryRecvError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail, ensure};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        self, AddressFamily, SockFlag, SockType, SockaddrStorage, UnixAddr, getsockopt, sockopt,
    },
};
use vfio_migration_uring::{deadline, later};

use crate::{
    Interrupted, Usage, interrupt,
    network::{Address, Connection, TICK},
    tls,
};

/// The most connections that may be under way at one time.
const SIDE_BY_SIDE: usize = 32;

/// A destination whose answer takes this long is asked for one more connection side by side.
const FAR: Duration = Duration::from_millis(10);

/// An answer that took this long was not the first: the kernel has asked again, after a second.
const ASKED_AGAIN: Duration = Duration::from_millis(950);

/// How long the first attempt may stay without an answer: longer than the kernel takes to send a
/// lost packet again.
const FIRST_ATTEMPT: Duration = Duration::from_millis(1500);

/// How long a unix socket whose backlog is full is left alone.
const FULL: Duration = Duration::from_millis(5);

/// Where one attempt goes.
#[derive(Clone, Copy)]
enum Target {
    Tcp(SocketAddr),
    Unix(UnixAddr),
}

impl Target {
    fn all(address: &Address, deadline: Instant, look: &mut Look<'_>) -> anyhow::Result<Vec<Self>> {
        Ok(match address {
            Address::Unix(path) => vec![Self::Unix(UnixAddr::new(path)?)],
            Address::Stdin => bail!(Usage("stdin is an address for --listen".into())),
            Address::Tcp(address) => {
                let found = resolve(address, deadline, look)?;
                found.into_iter().map(Self::Tcp).collect()
            }
        })
    }

    /// Begins to connect; a unix socket is connected at once, or not.
    fn begin(self) -> nix::Result<OwnedFd> {
        let family = match self {
            Self::Unix(_) => AddressFamily::Unix,
            Self::Tcp(SocketAddr::V4(_)) => AddressFamily::Inet,
            Self::Tcp(SocketAddr::V6(_)) => AddressFamily::Inet6,
        };
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket::socket(family, SockType::Stream, flags, None)?;
        let begun = match self {
            Self::Unix(address) => socket::connect(fd.as_raw_fd(), &address),
            Self::Tcp(address) => socket::connect(fd.as_raw_fd(), &SockaddrStorage::from(address)),
        };
        match begun {
            Ok(()) | Err(Errno::EINPROGRESS) => Ok(fd),
            Err(errno) => Err(errno),
        }
    }

    fn established(self, fd: OwnedFd, timeout: Duration) -> io::Result<Connection> {
        let connection = match self {
            Self::Unix(_) => Connection::from(UnixStream::from(fd)),
            Self::Tcp(_) => {
                let socket = TcpStream::from(fd);
                // Where nobody listens on a port that the host gives out, a socket can meet itself.
                if socket.local_addr()? == socket.peer_addr()? {
                    return Err(Errno::ECONNREFUSED.into());
                }
                Connection::from(socket)
            }
        };
        connection.tune(timeout)
    }
}

/// What is asked each tick of a wait, if anything: an error ends the wait.
pub(crate) type Look<'a> = Option<&'a mut dyn FnMut() -> anyhow::Result<()>>;

/// Waits for one of `fds`, or Ctrl-C, but not beyond `until`; and looks around.
fn wait(mut fds: Vec<PollFd<'_>>, until: Instant, look: &mut Look<'_>) -> anyhow::Result<()> {
    fds.extend(interrupt::asked());
    let left = until.saturating_duration_since(Instant::now());
    let left = if look.is_some() { left.min(TICK) } else { left };
    // Rounded up: a time of less than a millisecond would not be one.
    let left = left.saturating_add(Duration::from_millis(1));
    match poll(
        &mut fds,
        PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX),
    ) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    if interrupt::requested() {
        bail!(Interrupted);
    }
    look.as_mut().map_or(Ok(()), |look| look())
}

/// The addresses of `HOST:PORT`.
pub(crate) fn resolve(
    address: &str,
    deadline: Instant,
    look: &mut Look<'_>,
) -> anyhow::Result<Vec<SocketAddr>> {
    if let Ok(address) = address.parse() {
        return Ok(vec![address]);
    }
    let (sender, found) = mpsc::sync_channel(1);
    // Readable when the thread has ended, however.
    let (over, ends) = UnixStream::pair()?;
    let name = address.to_owned();
    let looking_up = move || {
        let _ends = ends;
        let found = name.to_socket_addrs().map(Iterator::collect);
        // Nobody may want to know any more.
        let _left = sender.send(found);
    };
    let thread = thread::Builder::new().name("resolve".into());
    thread.spawn(looking_up).context("cannot start a thread")?;
    loop {
        match found.try_recv() {
            Ok(found) => return Ok(found?),
            Err(TryRecvError::Disconnected) => bail!("the look-up of the name panicked"),
            Err(TryRecvError::Empty) if Instant::now() >= deadline => {
                bail!("the name was not found in time")
            }
            Err(TryRecvError::Empty) => {
                wait(
                    vec![PollFd::new(over.as_fd(), PollFlags::POLLIN)],
                    deadline,
                    look,
                )?;
            }
        }
    }
}

/// Whether a failure may pass.
const fn may_pass(errno: Errno) -> bool {
    matches!(
        errno,
        // Nobody listens yet, or a listener cannot keep up.
        Errno::ECONNREFUSED | Errno::ENOENT | Errno::EAGAIN | Errno::ETIMEDOUT | Errno::ECONNRESET
            // The way there, or a neighbour that did not answer.
            | Errno::EHOSTUNREACH | Errno::ECONNABORTED | Errno::EINTR
            // The host is short of something, for now.
            | Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM | Errno::EADDRNOTAVAIL
    )
}

/// How many connections may be under way, where the last took this long.
const fn side_by_side(took: Duration) -> usize {
    if took.as_millis() >= ASKED_AGAIN.as_millis() {
        return 1;
    }
    let more = (took.as_millis() / FAR.as_millis()) as usize;
    if more < SIDE_BY_SIDE {
        1 + more
    } else {
        SIDE_BY_SIDE
    }
}

/// Where one of the connections is.
enum State {
    Waiting {
        until: Instant,
    },
    UnderWay {
        fd: OwnedFd,
        since: Instant,
        until: Instant,
    },
    Made,
}

/// One of the connections, on its way.
struct Attempt {
    state: State,
    /// Which target is tried, and which of the tries it is.
    at: usize,
    tries: u32,
    /// Whether a target of this round may be there later.
    hope: bool,
}

struct Party<'a> {
    targets: &'a [Target],
    timeout: Duration,
    attempts: Vec<Attempt>,
    made: Vec<Connection>,
    /// How many may be under way.
    width: usize,
    /// The target that was reached last: tried first by those that follow.
    reached: usize,
    failure: Option<io::Error>,
}

impl Party<'_> {
    fn under_way(&self) -> usize {
        let under_way = |it: &&Attempt| matches!(it.state, State::UnderWay { .. });
        self.attempts.iter().filter(under_way).count()
    }

    /// Takes note of a failure: on to the next target, a pause, or the end.
    fn failed(&mut self, index: usize, error: io::Error) -> io::Result<()> {
        let errno = Errno::from_raw(error.raw_os_error().unwrap_or_default());
        let attempt = &mut self.attempts[index];
        attempt.hope |= may_pass(errno);
        attempt.at = (attempt.at + 1) % self.targets.len();
        attempt.tries += 1;
        let round_is_over = (attempt.tries as usize).is_multiple_of(self.targets.len());
        if round_is_over && !mem::take(&mut attempt.hope) {
            return Err(error);
        }
        let pause = match errno {
            _ if !round_is_over => Duration::ZERO,
            Errno::EAGAIN => FULL,
            _ => TICK,
        };
        attempt.state = State::Waiting {
            until: deadline(pause),
        };
        // Of several the one that came from over there says the most.
        if errno != Errno::ETIMEDOUT || self.failure.is_none() {
            self.failure = Some(error);
        }
        Ok(())
    }

    /// Begins as many as may be under way.
    fn begin(&mut self) -> io::Result<()> {
        let mut free = self.width.saturating_sub(self.under_way());
        let now = Instant::now();
        for index in 0..self.attempts.len() {
            let attempt = &mut self.attempts[index];
            if free == 0 {
                break;
            }
            if !matches!(attempt.state, State::Waiting { until } if until <= now) {
                continue;
            }
            free -= 1;
            if attempt.tries == 0 {
                attempt.at = self.reached;
            }
            let round = attempt.tries as usize / self.targets.len();
            let patience = FIRST_ATTEMPT * 2_u32.pow(u32::try_from(round.min(8)).unwrap_or(8));
            match self.targets[attempt.at].begin() {
                Ok(fd) => {
                    attempt.state = State::UnderWay {
                        fd,
                        since: Instant::now(),
                        until: later(now, patience),
                    };
                }
                Err(errno) => self.failed(index, errno.into())?,
            }
        }
        Ok(())
    }

    /// What comes of those that are under way, and when the next of all is to be looked at.
    fn awaited(&self) -> (Vec<PollFd<'_>>, Option<Instant>) {
        let mut fds = Vec::new();
        let mut times = Vec::new();
        let room = self.under_way() < self.width;
        for attempt in &self.attempts {
            match &attempt.state {
                State::UnderWay { fd, until, .. } => {
                    fds.push(PollFd::new(fd.as_fd(), PollFlags::POLLOUT));
                    times.push(*until);
                }
                State::Waiting { until } if room => times.push(*until),
                // It has to wait for one of those under way.
                State::Waiting { .. } | State::Made => {}
            }
        }
        (fds, times.into_iter().min())
    }

    /// Looks at what has come of those that were under way.
    fn judge(&mut self) -> io::Result<()> {
        let now = Instant::now();
        for index in 0..self.attempts.len() {
            let attempt = &mut self.attempts[index];
            let State::UnderWay { fd, until, .. } = &attempt.state else {
                continue;
            };
            let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
            if poll(&mut fds, PollTimeout::ZERO) == Ok(0) {
                if *until < now {
                    self.failed(index, Errno::ETIMEDOUT.into())?;
                }
                continue;
            }
            let error = getsockopt(fd, sockopt::SocketError)?;
            let State::UnderWay { fd, since, .. } = mem::replace(&mut attempt.state, State::Made)
            else {
                unreachable!("it was under way");
            };
            let target = attempt.at;
            let established = match error {
                0 => self.targets[target].established(fd, self.timeout),
                errno => Err(io::Error::from_raw_os_error(errno)),
            };
            match established {
                Ok(connection) => {
                    self.made.push(connection);
                    self.reached = target;
                    self.width = side_by_side(since.elapsed());
                }
                Err(error) => self.failed(index, error)?,
            }
        }
        Ok(())
    }
}

/// Makes `count` connections, with TLS where it is given, all within `patience`. Afterwards nothing on one of them
/// may stand still for longer than `timeout`.
pub(crate) fn connect(
    address: &Address,
    tls: Option<&tls::Client>,
    count: usize,
    patience: Duration,
    timeout: Duration,
    mut look: Look<'_>,
) -> anyhow::Result<Vec<Connection>> {
    let deadline = deadline(patience);
    let made = establish(address, count, patience, timeout, deadline, &mut look)?;
    let Some(tls) = tls else {
        return Ok(made);
    };
    let made = made
        .into_iter()
        .map(|it| it.tls_client(tls.config.clone(), tls.name.clone(), timeout))
        .collect::<anyhow::Result<Vec<_>>>()?;
    match shake_hands(&made, deadline, &mut look) {
        Err(error) if error.is::<Interrupted>() => Err(error),
        shaken => shaken
            .map(|()| made)
            .with_context(|| format!("cannot connect to {address} with TLS")),
    }
}

/// Shakes hands on all connections, side by side.
fn shake_hands(made: &[Connection], deadline: Instant, look: &mut Look<'_>) -> anyhow::Result<()> {
    loop {
        let mut waiting = Vec::new();
        for connection in made {
            if !connection.shake_hands()? {
                waiting.push(PollFd::new(connection.as_fd(), connection.interest()));
            }
        }
        if waiting.is_empty() {
            return Ok(());
        }
        let in_time = Instant::now() < deadline;
        ensure!(
            in_time,
            "the destination has not completed the handshake in time"
        );
        wait(waiting, deadline, look)?;
    }
}

fn establish(
    address: &Address,
    count: usize,
    patience: Duration,
    timeout: Duration,
    deadline: Instant,
    look: &mut Look<'_>,
) -> anyhow::Result<Vec<Connection>> {
    let cannot = || format!("cannot connect to {address}");
    let targets = match Target::all(address, deadline, look) {
        Err(error) if error.is::<Interrupted>() => return Err(error),
        other => other.with_context(cannot)?,
    };
    if targets.is_empty() {
        return Err(anyhow!("the name has no address").context(cannot()));
    }
    let begun = Instant::now();
    let mut party = Party {
        targets: &targets,
        timeout,
        attempts: Vec::new(),
        made: Vec::new(),
        width: 1,
        reached: 0,
        failure: None,
    };
    party.attempts.resize_with(count, || Attempt {
        state: State::Waiting { until: begun },
        at: 0,
        tries: 0,
        hope: false,
    });
    loop {
        party.begin().with_context(cannot)?;
        let (fds, next) = party.awaited();
        wait(fds, next.map_or(deadline, |at| at.min(deadline)), look)?;
        party.judge().with_context(cannot)?;
        if party.made.len() == count {
            return Ok(party.made);
        }
        if Instant::now() >= deadline {
            let failure = party.failure.take();
            let failure = failure.unwrap_or_else(|| Errno::ETIMEDOUT.into());
            // Some may be gone for others: no more digits than anybody wants to know.
            let seconds = (patience.as_secs_f64() * 10.0).round() / 10.0;
            let made = party.made.len();
            return Err(anyhow!(failure).context(format!(
                "{}: {made} of {count} connections were made within {seconds} s",
                cannot()
            )));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_looked_up() {
        let soon = Instant::now() + Duration::from_secs(60);
        let found = resolve("localhost:7", soon, &mut None).unwrap();
        assert!(
            found
                .iter()
                .all(|it| it.port() == 7 && it.ip().is_loopback())
        );
        let mut stops = || bail!("no more");
        let stop = resolve("localhost:7", soon, &mut Some(&mut stops));
        assert!(stop.is_ok() || stop.unwrap_err().to_string() == "no more");
        let number = resolve("[::1]:8", soon, &mut Some(&mut stops)).unwrap();
        assert_eq!(number, ["[::1]:8".parse().unwrap()]);
    }

    #[test]
    fn a_socket_that_meets_itself_is_nobody() {
        // A port that was free a moment ago, and is this socket's own.
        let fd = socket::socket(
            AddressFamily::Inet,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .unwrap();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        socket::bind(fd.as_raw_fd(), &SockaddrStorage::from(any)).unwrap();
        let own: SockaddrStorage = socket::getsockname(fd.as_raw_fd()).unwrap();
        socket::connect(fd.as_raw_fd(), &own).unwrap();
        let met = Target::Tcp(any).established(fd, TICK);
        let refused = io::ErrorKind::ConnectionRefused;
        assert_eq!(met.unwrap_err().kind(), refused);
    }
}
