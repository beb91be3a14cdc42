//! A network of a test's own, in which a host can vanish, be far away, or lose packets. It takes root and
//! `ip`, and a far host `/dev/net/tun`; where one is missing the test says so, and tests nothing.
#![expect(unsafe_code, reason = "TUNSETIFF")]

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::{fs::OpenOptionsExt, net::UnixStream},
    },
    process::Command,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, unshare},
};

pub fn ip(arguments: &str) -> bool {
    let done = Command::new("ip")
        .args(arguments.split_whitespace())
        .status();
    done.is_ok_and(|status| status.success())
}

/// Loud: this is where the machine decides what was tested.
fn not_tested(what: &str) {
    let text = format!("NOT TESTED HERE: {what}\n");
    io::stderr().write_all(text.as_bytes()).unwrap();
}

/// Runs `test` on a thread in a new network namespace, and all that it starts.
pub fn in_a_network_of_its_own(test: impl FnOnce() + Send + 'static) {
    let ran = thread::spawn(|| {
        if unshare(CloneFlags::CLONE_NEWNET).is_err() || !ip("link set lo up") {
            return not_tested("no network namespace, or no ip");
        }
        test();
    });
    if let Err(panic) = ran.join() {
        std::panic::resume_unwind(panic);
    }
}

/// The own host's address on the way to the far one.
pub const HERE: &str = "10.9.0.1";
/// The far host's: whoever listens here is reached there.
pub const THERE: &str = "10.9.0.2";

/// Of an address, and of what a header's length is counted in.
const LEN: usize = 4;

/// A far host, which is this one in a mirror: what is sent to [`THERE`] comes back to [`HERE`] as if it came
/// from there, later, or never.
pub struct Far {
    ends: Option<UnixStream>,
    mirror: Option<JoinHandle<Mirror>>,
}

impl Far {
    /// Each packet takes `way`. The TCP connections' first packets, each time they are sent, are counted from 0;
    /// `is_lost` says which are lost. `None` where there is no such device.
    pub fn new(way: Duration, is_lost: fn(usize) -> bool) -> Option<Self> {
        let Ok(tun) = tun() else {
            not_tested("no /dev/net/tun");
            return None;
        };
        assert!(ip(&format!("addr add {HERE}/24 dev far")) && ip("link set far up"));
        let (ends, end) = UnixStream::pair().unwrap();
        let mut mirror = Mirror {
            tun,
            way,
            is_lost,
            begun: 0,
            lost: 0,
            held: VecDeque::new(),
        };
        let mirror = thread::spawn(move || {
            mirror.run(&end);
            mirror
        });
        Some(Self {
            ends: Some(ends),
            mirror: Some(mirror),
        })
    }

    /// How many first packets there were, and how many of them were lost.
    pub fn end(mut self) -> (usize, usize) {
        drop(self.ends.take());
        let mirror = self.mirror.take().unwrap().join().unwrap();
        (mirror.begun, mirror.lost)
    }
}

/// Opens the device `far` in this thread's network.
fn tun() -> io::Result<File> {
    let tun = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: all of it may be zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"far") {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TUN | libc::IFF_NO_PI;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).unwrap();
    // SAFETY: the kernel reads and writes one such request.
    let made = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if made < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(tun)
}

struct Mirror {
    tun: File,
    way: Duration,
    is_lost: fn(usize) -> bool,
    begun: usize,
    lost: usize,
    held: VecDeque<(Instant, Vec<u8>)>,
}

impl Mirror {
    /// Until the other end of `end` is closed.
    fn run(&mut self, end: &UnixStream) {
        loop {
            let now = Instant::now();
            while self.held.front().is_some_and(|(at, _)| *at <= now)
                && let Some((_, packet)) = self.held.pop_front()
            {
                // A queue that is full loses it, as any network may.
                let _lost = self.tun.write(&packet);
            }
            let left = self.held.front().map(|(at, _)| *at - now);
            // Rounded up: a time of less than a millisecond would not be one.
            let timeout = left.map_or(PollTimeout::NONE, |left| {
                PollTimeout::try_from(left + Duration::from_millis(1)).unwrap()
            });
            let mut fds = [
                PollFd::new(self.tun.as_fd(), PollFlags::POLLIN),
                PollFd::new(end.as_fd(), PollFlags::POLLIN),
            ];
            poll(&mut fds, timeout).unwrap();
            if fds[1].any() == Some(true) {
                return;
            }
            let mut buffer = [0; 2048];
            while let Ok(count) = self.tun.read(&mut buffer) {
                self.take(&buffer[..count]);
            }
        }
    }

    fn take(&mut self, packet: &[u8]) {
        // IPv4 alone: what a device says of itself over IPv6 is of no interest.
        if packet[0] >> 4 != 4 {
            return;
        }
        let header = usize::from(packet[0] & 15) * LEN;
        let (tcp, syn_ack) = (packet[9] == 6, packet[header + 13] & 0x12);
        if tcp && syn_ack == 2 {
            let number = self.begun;
            self.begun += 1;
            if (self.is_lost)(number) {
                self.lost += 1;
                return;
            }
        }
        let mut packet = packet.to_vec();
        // The checksums stay what they were: they are sums.
        let (from, to) = packet[12..20].split_at_mut(LEN);
        from.swap_with_slice(to);
        self.held.push_back((Instant::now() + self.way, packet));
    }
}
