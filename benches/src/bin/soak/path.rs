//! What stands between the two sessions: a relay, or RAM that shares the channels.
//!
//! ```text
//!   save ═▶ ram_injector 0 ═══ RAM packets, SYNCs in between ═══▶ load, a sink for each channel
//!        ═▶ ram_injector 1 ═══ … ═══▶                                     └ a barrier across all
//! ```
//!
//! A mixer is a thread for each channel, which passes on what the source sends and is the RAM migrator
//! besides: each SYNC goes out on all channels, whatever the device state on them waits for. A sink does
//! with a SYNC what QEMU does: its channel stands still until all have come to theirs.
//!
//! What ends a mixer's wait: the source's bytes or its end, the destination's room or its end; between
//! packets it looks around every millisecond. What ends a sink's: the last channel's SYNC; a channel
//! that has ended before, whose sink is dropped.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vfio_migration::{
    Channel, RamSink, Relay,
    wire::{Kind, RamHeader, encode_sync},
};

use crate::{
    packets::{Packet, Packets, page_size},
    plan::{Plan, Way},
    random::Random,
    verify,
};

/// One end of a connection.
#[derive(Debug)]
pub enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Read for Socket {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => socket.read(bytes),
            Self::Unix(socket) => socket.read(bytes),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => socket.write(bytes),
            Self::Unix(socket) => socket.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(socket) => socket.as_fd(),
            Self::Unix(socket) => socket.as_fd(),
        }
    }
}

impl From<Socket> for Channel {
    fn from(socket: Socket) -> Self {
        match socket {
            Socket::Tcp(socket) => socket.into(),
            Socket::Unix(socket) => socket.into(),
        }
    }
}

impl Socket {
    /// Whether there is something to be read, or the end, within a millisecond.
    fn is_readable(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::from(1_u8)) {
            Ok(count) => Ok(count > 0),
            Err(nix::errno::Errno::EINTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// The same as channels.
pub fn channels(plan: &Plan) -> io::Result<(Vec<Channel>, Vec<Channel>)> {
    let (near, far) = connections(plan)?;
    let channels = |ends: Vec<_>| ends.into_iter().map(Channel::from).collect();
    Ok((channels(near), channels(far)))
}

/// As many connections as the plan has channels.
pub fn connections(plan: &Plan) -> io::Result<(Vec<Socket>, Vec<Socket>)> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let connection = |_| {
        Ok(if plan.tcp {
            let near = TcpStream::connect(listener.local_addr()?)?;
            (Socket::Tcp(near), Socket::Tcp(listener.accept()?.0))
        } else {
            let (near, far) = UnixStream::pair()?;
            (Socket::Unix(near), Socket::Unix(far))
        })
    };
    let all: io::Result<Vec<_>> = (0..plan.channels).map(connection).collect();
    Ok(all?.into_iter().unzip())
}

/// What stands between.
pub enum Path {
    Relay(Relay),
    Mixers(Vec<JoinHandle<io::Result<()>>>),
}

impl Path {
    /// Puts it there. Returns the source's channels and the destination's as well.
    pub fn new(plan: &Plan) -> Result<(Self, Vec<Channel>, Vec<Channel>), String> {
        let text = |error: io::Error| error.to_string();
        let (near, from_source) = connections(plan).map_err(text)?;
        let (to_destination, far) = connections(plan).map_err(text)?;
        let near = near.into_iter().map(Channel::from).collect();
        let lines = from_source.into_iter().zip(to_destination);
        let Way::Shared { barriers } = plan.way else {
            let mut settings = plan.load.clone();
            settings.budget = None;
            settings.window = 1 << 16;
            settings.channels = u32::try_from(plan.channels).expect("a few");
            let text = |error: vfio_migration::Error| format!("relay: {error}");
            let relay = Relay::builder()
                .settings(settings.clone())
                .start()
                .map_err(text)?;
            for (from, to) in lines {
                relay.add_channel(from, to).map_err(text)?;
            }
            relay.no_more_channels();
            let far = far.into_iter().map(Channel::from).collect();
            return Ok((Self::Relay(relay), near, far));
        };
        let barrier = Arc::new(Barrier {
            state: Mutex::default(),
            changed: Condvar::new(),
            channels: u32::try_from(plan.channels).expect("a few"),
            // Those of the mixers, and one behind the hello.
            each: barriers + 1,
        });
        let issued = Arc::new(AtomicU32::new(0));
        let mix = |(at, (from, to))| {
            let ram_injector = RamInjector {
                to,
                barriers,
                done: 0,
                issued: issued.clone(),
                random: Random(plan.seed ^ (0x3a10 + at)),
            };
            thread::spawn(move || ram_injector.run(Packets::new(from)))
        };
        let mixers = (0_u64..).zip(lines).map(mix).collect();
        let far = (0_u64..).zip(far).map(|(at, socket)| {
            Channel::from(socket).with_ram_sink(Sink {
                barrier: barrier.clone(),
                came: 0,
                random: Random(plan.seed ^ (0x51e7 + at)),
            })
        });
        Ok((Self::Mixers(mixers), near, far.collect()))
    }

    /// Waits for its end, after both sessions'; `success` is theirs.
    pub fn end(self, plan: &Plan, success: bool) -> Result<(), String> {
        match self {
            Self::Relay(relay) => {
                let report = relay.join();
                if let Err(error) = &report.result {
                    verify::clear(error)?;
                    verify::check(!success, "both sides succeeded, and the relay failed")?;
                }
                verify::check(report.abandoned_threads == 0, "a relay's thread is left")?;
                verify::check(report.stats.held == 0, "a relay holds memory")
            }
            Self::Mixers(mixers) => {
                for ram_injector in mixers {
                    let mixed = ram_injector
                        .join()
                        .map_err(|panic| verify::message(&*panic))?;
                    // Where a side has failed a connection ends anywhere.
                    if plan.scene.must_succeed() {
                        mixed.map_err(|error| format!("the RAM injector: {error}"))?;
                    }
                }
                Ok(())
            }
        }
    }
}

/// Passes on a channel's packets, and sends RAM in between.
struct RamInjector {
    to: Socket,
    barriers: u32,
    /// How many SYNCs this channel has had, and the one that has had most.
    done: u32,
    issued: Arc<AtomicU32>,
    random: Random,
}

impl RamInjector {
    fn run(mut self, mut packets: Packets<Socket>) -> io::Result<()> {
        let mut passed = 0_u32;
        loop {
            // Nothing stands before the hello and its SYNC.
            let begun = passed >= 2;
            if begun {
                self.follow()?;
            }
            if !packets.input().is_readable()? {
                continue;
            }
            let Some(packet) = packets.next()? else { break };
            let (Packet::Other(bytes) | Packet::Device { bytes, .. }) = packet;
            self.to.write_all(&bytes)?;
            passed += 1;
            if begun && self.random.percent(20) {
                self.pages()?;
            }
            if begun && self.random.percent(10) && self.done < self.barriers {
                self.sync()?;
            }
        }
        while self.done < self.barriers {
            self.sync()?;
        }
        self.pages()?;
        match &self.to {
            Socket::Tcp(socket) => socket.shutdown(Shutdown::Write),
            Socket::Unix(socket) => socket.shutdown(Shutdown::Write),
        }
    }

    /// What has gone out on another channel goes out on this one.
    fn follow(&mut self) -> io::Result<()> {
        // Relaxed: a count, which the next look sees if this one does not.
        while self.done < self.issued.load(Relaxed) {
            self.sync()?;
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.done += 1;
        // Relaxed: as above.
        self.issued.fetch_max(self.done, Relaxed);
        let sync = encode_sync(page_size(), self.done.into());
        self.to.write_all(&sync)
    }

    /// A RAM packet of a few pages.
    fn pages(&mut self) -> io::Result<()> {
        let pages = self.random.below(4);
        let len = pages * u64::from(page_size().bytes());
        let header = RamHeader {
            kind: Kind::Ram { flags: 0 },
            pages_alloc: page_size().pages(),
            normal_pages: u32::try_from(pages).expect("a few"),
            next_packet_size: u32::try_from(len).expect("a few pages"),
            packet_num: 0,
            zero_pages: 0,
            ramblock: b"pc.ram",
        };
        let mut packet = header.encode().to_vec();
        let len = page_size().ram_header_len() + usize::try_from(len).expect("a few pages");
        packet.resize(len, 0x5a);
        self.to.write_all(&packet)
    }
}

/// Where all channels wait for one another.
struct Barrier {
    state: Mutex<State>,
    changed: Condvar,
    channels: u32,
    /// How many SYNCs each channel has.
    each: u32,
}

#[derive(Default)]
struct State {
    /// Channels that have come to a SYNC, each counted each time.
    came: u32,
    /// One of them will not come any more.
    broken: bool,
}

/// One channel's.
struct Sink {
    barrier: Arc<Barrier>,
    came: u32,
    random: Random,
}

impl RamSink for Sink {
    fn ram(&mut self, _header: &[u8], pages: &mut dyn Read) -> io::Result<()> {
        // What is left is skipped.
        let take = self.random.below(20_000);
        io::copy(&mut pages.take(take), &mut io::sink()).map(drop)
    }

    fn sync(&mut self, _header: &[u8]) -> io::Result<()> {
        self.came += 1;
        let mut state = self.barrier.state.lock().expect("nobody panics with it");
        state.came += 1;
        self.barrier.changed.notify_all();
        let all = state.came.next_multiple_of(self.barrier.channels);
        let waits = |state: &mut State| state.came < all && !state.broken;
        let state = self.barrier.changed.wait_while(state, waits);
        if state.expect("nobody panics with it").came < all {
            return Err(io::Error::other("another channel has ended"));
        }
        Ok(())
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        if self.came < self.barrier.each {
            let state = self.barrier.state.lock();
            state.expect("nobody panics with it").broken = true;
            self.barrier.changed.notify_all();
        }
    }
}
