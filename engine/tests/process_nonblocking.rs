//! Sockets that do not block, as an async runtime hands them out, and streams over such: they carry a
//! migration as others do, and a wait for them takes no processor.
//!
//! Alone in its process, whose processor time it counts.
#![cfg(feature = "sim")]
#![allow(missing_docs, reason = "a test")]

#[path = "support/barrier.rs"]
mod barrier;
#[path = "support/names.rs"]
mod names;
#[path = "support/packets.rs"]
mod packets;
#[path = "support/vm.rs"]
mod vm;
#[path = "support/watchdog.rs"]
mod watchdog;

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::{fd::OwnedFd, unix::net::UnixStream},
    thread,
    time::Duration,
};

use nix::sys::resource::{UsageWho, getrusage};
use vfio_migration::{
    Channel, Device, LoadSession, Relay, SaveSession, Settings, SourceChannels,
    sim::{SimConfig, SimDevice, SimHandle},
    stream::{Command, Event, Reader, Reply, Writer},
};

use crate::{
    barrier::sync,
    packets::{config_packet, hello, packet},
    watchdog::Watchdog,
};

/// What kinds of streams there are.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Tcp,
    Unix,
    Fd,
    /// The embedder's own, over a socket that does not block.
    Stream,
}

const KINDS: [Kind; 4] = [Kind::Tcp, Kind::Unix, Kind::Fd, Kind::Stream];

/// A connection: its near end as a channel that does not block, its far end as any socket.
fn pair(kind: Kind) -> (Channel, Box<dyn Socket>) {
    match kind {
        Kind::Tcp => {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            near.set_nonblocking(true).unwrap();
            (near.into(), Box::new(listener.accept().unwrap().0))
        }
        Kind::Unix | Kind::Fd | Kind::Stream => {
            let (near, far) = UnixStream::pair().unwrap();
            near.set_nonblocking(true).unwrap();
            let near = match kind {
                Kind::Unix => near.into(),
                Kind::Fd => OwnedFd::from(near).into(),
                _ => {
                    let other = near.try_clone().unwrap();
                    let finish = |near: &mut UnixStream| near.shutdown(Shutdown::Write);
                    Channel::from_stream_with_finish(near, finish, move || {
                        let _closed = other.shutdown(Shutdown::Both);
                    })
                }
            };
            (near, Box::new(far))
        }
    }
}

trait Socket: Read + Write + Send {
    fn end(&self);
    /// As a channel that blocks.
    fn channel(self: Box<Self>) -> Channel;
}

macro_rules! socket {
    ($socket:ty) => {
        impl Socket for $socket {
            fn end(&self) {
                self.shutdown(Shutdown::Write).unwrap();
            }

            fn channel(self: Box<Self>) -> Channel {
                (*self).into()
            }
        }
    };
}

socket!(TcpStream);
socket!(UnixStream);

/// More than any socket takes at once.
const LEN: u64 = 8 << 20;

fn device(seed: u64) -> (Device, SimHandle) {
    let sim = SimDevice::new(SimConfig {
        seed,
        len: LEN,
        ..SimConfig::default()
    });
    let sim = sim.unwrap();
    let handle = sim.handle();
    (Device::new(vm::id(1), Box::new(sim)).unwrap(), handle)
}

/// Processor time of this process.
fn used() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let time = |time: nix::sys::time::TimeVal| {
        Duration::new(
            time.tv_sec().try_into().unwrap(),
            u32::try_from(time.tv_usec()).unwrap() * 1000,
        )
    };
    time(usage.user_time()) + time(usage.system_time())
}

/// The tests count the process's time, so there is one: the cases in turn.
#[test]
fn sockets_that_do_not_block_carry_a_migration_and_wait_asleep() {
    let _watchdog = Watchdog::new();
    for kind in KINDS {
        loads(kind);
        saves(kind);
        relays(kind);
    }
    for over_channels in [false, true] {
        greets(over_channels);
    }
}

/// A load whose source is silent for a while: before its hello, between packets, within one.
fn loads(kind: Kind) {
    let (near, far) = pair(kind);
    let (from, saved) = device(1);
    let (to, loaded) = device(2);
    let load = LoadSession::builder().device(to).channel(near);
    let load = load.start().unwrap();
    let spent = used();
    thread::sleep(Duration::from_millis(400));
    let spent = used() - spent;
    assert!(
        spent < Duration::from_millis(200),
        "{kind:?}: {spent:?} of 400 ms to wait for a hello"
    );
    assert!(load.failure().is_none(), "{kind:?}: {:?}", load.failure());
    load.switchover_start();
    let (slow, out) = UnixStream::pair().unwrap();
    let save = SaveSession::builder().device(from).channel(out);
    let save = save.start().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut slow, mut far) = (slow, far);
            let mut bytes = vec![0; 1 << 20];
            let mut at = 0;
            // Ends: with the save.
            while let count @ 1.. = slow.read(&mut bytes).unwrap() {
                far.write_all(&bytes[..count]).unwrap();
                if at == 0 {
                    // The hello is there, and part of a packet perhaps.
                    let spent = used();
                    thread::sleep(Duration::from_millis(400));
                    let spent = used() - spent;
                    assert!(
                        spent < Duration::from_millis(300),
                        "{kind:?}: {spent:?} of 400 ms to wait for the rest"
                    );
                }
                at += count;
            }
            far.end();
        });
        save.join().result.unwrap();
    });
    let report = load.join();
    report
        .result
        .unwrap_or_else(|error| panic!("{kind:?}: {error}"));
    assert_eq!(saved.digest(), loaded.digest());
}

/// A save whose destination takes nothing for a while.
fn saves(kind: Kind) {
    let (near, far) = pair(kind);
    let (from, saved) = device(1);
    let (to, loaded) = device(2);
    let save = SaveSession::builder().device(from).channel(near);
    let save = save.start().unwrap();
    thread::sleep(Duration::from_millis(200));
    assert!(save.failure().is_none(), "{kind:?}: {:?}", save.failure());
    let load = LoadSession::builder().device(to).channel(far.channel());
    let load = load.start().unwrap();
    load.switchover_start();
    let report = save.join();
    report
        .result
        .clone()
        .unwrap_or_else(|error| panic!("{kind:?}: {error}"));
    drop(report);
    load.join().result.unwrap();
    assert_eq!(saved.digest(), loaded.digest());
}

/// A relay between a source and a destination that take their time.
fn relays(kind: Kind) {
    let (near, mut source) = pair(kind);
    let (out, mut destination) = pair(kind);
    let relay = Relay::builder().start().unwrap();
    relay.add_channel(near, out).unwrap();
    let mut sent = [hello(0), sync()].concat();
    for index in 0..8 {
        sent.extend(packet(1, index, &[7; 1 << 20]));
    }
    sent.extend(config_packet(1, 8, b"config"));
    let received = thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(100));
            source.write_all(&sent).unwrap();
            source.end();
        });
        let reading = scope.spawn(|| {
            thread::sleep(Duration::from_millis(300));
            let mut bytes = Vec::new();
            destination.read_to_end(&mut bytes).unwrap();
            destination.end();
            bytes
        });
        let report = relay.join();
        report
            .result
            .clone()
            .unwrap_or_else(|error| panic!("{kind:?}: {error}"));
        reading.join().unwrap()
    });
    assert!(received == sent, "{kind:?}");
}

/// The life cycle over such sockets, at both ends.
fn greets(over_channels: bool) {
    let ended = vm::migrate(&vm::Setup {
        len: LEN,
        precopy_initial: 4 << 20,
        over_channels,
        nonblocking: true,
        ..vm::Setup::default()
    });
    ended.check();
    // A hello that does not fit at once waits as well.
    let (near, _far) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    let channels = SourceChannels::greet(vec![near.into()], &Settings::default());
    assert!(channels.unwrap().failure().is_none());
}

/// The main channel is the embedder's `Read` and `Write`, of which nothing can be asked: it must block,
/// and one that does not is an error with its errno, not a wrong word.
#[test]
fn a_main_channel_must_block() {
    let _watchdog = Watchdog::new();
    let (near, far) = UnixStream::pair().unwrap();
    let mut writer = Writer::open(&near).unwrap();
    writer.write(&Event::Command(Command::Ping(1))).unwrap();
    far.set_nonblocking(true).unwrap();
    let mut reader = Reader::open(&far).unwrap();
    let again = Some(nix::errno::Errno::EAGAIN as i32);
    assert_eq!(
        reader.next_event().unwrap(),
        Some(Event::Command(Command::Ping(1)))
    );
    assert_eq!(reader.next_event().unwrap_err().raw_os_error(), again);
    let error = Reply::read(&mut &far).unwrap_err();
    assert_eq!(error.raw_os_error(), again);
    near.set_nonblocking(true).unwrap();
    let error = loop {
        if let Err(error) = Reply::Pong(1).write(&mut &near) {
            break error;
        }
    };
    assert_eq!(error.raw_os_error(), again);
}
