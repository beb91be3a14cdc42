//! Single events, one at a time: a wake-up, a cancellation, a burst of small packets.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{fd::OwnedFd, unix::fs::FileExt},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vfio_migration::{
    Device, DeviceId, LoadSession, Publisher, Stats, Writer,
    wire::{self, PacketHeader},
};
use vfio_migration_uring::{self as uring, Fd, Link, Op, Token, Waker};

use crate::{
    engine::{self, nanos},
    plan::Plan,
    sink::{self, Kind, Sink},
    yardstick::mutex::Loader,
};

/// Long enough for everybody to be asleep.
const REST: Duration = Duration::from_micros(300);

/// Long enough for what came before to have been written.
const PAUSE: Duration = Duration::from_micros(20);

/// The bytes of the packets whose wake-ups are timed: so few that copying them takes no time.
const SMALL: usize = 64;

/// A pipe: where an I/O thread writes, and where the first byte shows without waiting.
fn pipe() -> io::Result<(Sink, File)> {
    let (reader, writer) = io::pipe()?;
    fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let writer = File::from(OwnedFd::from(writer));
    Ok((Sink::over(writer), File::from(OwnedFd::from(reader))))
}

/// Looks until all bytes of a packet are in the pipe.
fn arrived(pipe: &mut File) -> io::Result<()> {
    let mut bytes = [0; SMALL];
    loop {
        match pipe.read(&mut bytes) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(error) => return Err(error),
        }
    }
}

fn publish(publisher: &mut Publisher, id: &DeviceId, index: u32, data: &[u8]) {
    let header = PacketHeader {
        index,
        config: false,
    };
    let mut lease = publisher
        .lease(id, header, data.len())
        .expect("memory comes");
    lease.bytes_mut().copy_from_slice(data);
    lease.publish().expect("a good packet");
}

/// Wakes a sleeper, again and again: from `wake` until its bytes are in the pipe, in nanoseconds.
fn timed(count: u32, pipe: &mut File, mut wake: impl FnMut(u32)) -> io::Result<Vec<u64>> {
    let mut times = Vec::new();
    for index in 0..count {
        thread::sleep(REST);
        let since = Instant::now();
        wake(index);
        arrived(pipe)?;
        times.push(nanos(since));
    }
    times.sort_unstable();
    Ok(times)
}

/// Publishes packet after packet, each after a pause: from `publish` until it has arrived, in nanoseconds.
fn timed_publishes(
    count: u32,
    sink: Sink,
    writer: Writer,
    pause: impl Fn(),
    mut arrived: impl FnMut(u32) -> io::Result<()>,
) -> io::Result<Vec<u64>> {
    let ids = [DeviceId::new("timed", 0).expect("a good name")];
    let mut settings = engine::settings();
    settings.writer = writer;
    let (session, _ended) = engine::start_load(&ids, &[sink], settings, Vec::new());
    let mut publisher = session.publisher();
    let mut times = Vec::new();
    for index in 0..count {
        pause();
        let header = PacketHeader {
            index,
            config: false,
        };
        let mut lease = publisher
            .lease(&ids[0], header, SMALL)
            .expect("memory comes");
        lease.bytes_mut().fill(7);
        let since = Instant::now();
        lease.publish().expect("a good packet");
        arrived(index)?;
        times.push(nanos(since));
    }
    session.cancel();
    drop(publisher);
    let _cancelled = session.join();
    times.sort_unstable();
    Ok(times)
}

/// From publishing to a sleeping I/O thread until the bytes are in its pipe, in nanoseconds.
///
/// # Errors
///
/// The kernel's.
///
/// # Panics
///
/// Where the load fails.
pub fn wake_engine(count: u32) -> io::Result<Vec<u64>> {
    let (sink, mut reader) = pipe()?;
    let rest = || thread::sleep(REST);
    timed_publishes(count, sink, Writer::Ring, rest, |_| arrived(&mut reader))
}

/// From publishing the next packet until it is in a device that takes bytes as quickly as a memfd does, in
/// nanoseconds: whoever publishes may write.
///
/// # Errors
///
/// The kernel's.
///
/// # Panics
///
/// Where the load fails.
pub fn through(count: u32) -> io::Result<Vec<u64>> {
    let sink = Sink::new(Kind::Memfd, (count as usize + 1) * SMALL)?;
    let file = sink.file()?;
    // A channel that receives is awake.
    let pause = || {
        let since = Instant::now();
        while since.elapsed() < PAUSE {
            std::hint::spin_loop();
        }
    };
    timed_publishes(count, sink, Writer::Auto, pause, |index| {
        let last = (u64::from(index) + 1) * SMALL as u64 - 1;
        let mut byte = [0];
        while byte != [7] {
            file.read_exact_at(&mut byte, last)?;
        }
        Ok(())
    })
}

/// The same with the peers' mutex and condition variable.
///
/// # Errors
///
/// The kernel's.
///
/// # Panics
///
/// Where the pipe fails.
pub fn wake_mutex(count: u32) -> io::Result<Vec<u64>> {
    let (sink, mut reader) = pipe()?;
    let file = sink.file()?;
    let loader = Loader::default();
    thread::scope(|scope| {
        scope.spawn(|| loader.run(file).expect("a pipe takes all"));
        let times = timed(count, &mut reader, |index| {
            loader.publish(index, &[7; SMALL]);
        });
        loader.end(count);
        times
    })
}

/// The same without anything to hand over: a thread that sleeps on a futex is woken, and writes.
///
/// # Errors
///
/// The kernel's.
///
/// # Panics
///
/// Where the pipe fails.
pub fn wake_bare(count: u32) -> io::Result<Vec<u64>> {
    let (sink, mut reader) = pipe()?;
    let mut file = sink.file()?;
    let published = AtomicU32::new(0);
    thread::scope(|scope| {
        let sleeper = scope.spawn(|| {
            for index in 0..count {
                // Relaxed: the number is all there is.
                while published.load(Relaxed) <= index {
                    thread::park();
                }
                file.write_all(&[7; SMALL]).expect("a pipe takes all");
            }
        });
        timed(count, &mut reader, |_| {
            published.fetch_add(1, Relaxed);
            sleeper.thread().unpark();
        })
    })
}

/// As [`wake_bare`], but the thread sleeps in our ring, and writes through it: what sleeping where the
/// kernel's completions come costs.
///
/// # Errors
///
/// The kernel's, which may have no io_uring.
///
/// # Panics
///
/// Never: the token is free where it is used.
pub fn wake_ring(count: u32) -> io::Result<Vec<u64>> {
    let (sink, mut reader) = pipe()?;
    let fd: Fd = Arc::new(sink.file()?.into());
    // The sleeper's is the last: where it fails, the pipe ends, and so does this thread's look.
    drop(sink);
    let waker = Waker::new()?;
    let published = AtomicU32::new(0);
    thread::scope(|scope| {
        let (ours, published) = (waker.clone(), &published);
        let sleeper = scope.spawn(move || {
            let (mut ring, _) = uring::open::<Vec<u8>>(uring::Backend::Uring, 1, ours, REST)?;
            for index in 0..count {
                // Relaxed: the number is all there is.
                while published.load(Relaxed) <= index {
                    ring.wait(None)?;
                }
                let write = Op::Write {
                    fd: fd.clone(),
                    buffer: vec![7; SMALL],
                };
                let pushed = ring.push(Token(0), write, Link::End);
                pushed.expect("the token is free");
                let written = loop {
                    ring.wait(None)?;
                    if let Some(completion) = ring.reap() {
                        break completion;
                    }
                };
                written.result?;
            }
            io::Result::Ok(())
        });
        let times = timed(count, &mut reader, |_| {
            published.fetch_add(1, Relaxed);
            waker.wake();
        });
        sleeper.join().expect("it does not panic")?;
        times
    })
}

/// Where a load is cancelled.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Cancelled {
    /// The I/O thread sleeps: no packet has come.
    Starved,
    /// A write is blocked on a full pipe.
    Blocked,
}

/// From `cancel` to the device's thread having its device back from the I/O thread.
///
/// # Errors
///
/// The kernel's.
///
/// # Panics
///
/// Where the load does not end as cancelled.
pub fn cancel(at: Cancelled) -> io::Result<Duration> {
    let (reader, writer) = io::pipe()?;
    let sinks = [Sink::over(File::from(OwnedFd::from(writer)))];
    let ids = [DeviceId::new("cancel", 0).expect("a good name")];
    let (session, ended) = engine::start_load(&ids, &sinks, engine::settings(), Vec::new());
    if at == Cancelled::Blocked {
        let mut publisher = session.publisher();
        publish(&mut publisher, &ids[0], 0, &[7; 1 << 20]);
    }
    // Until the pipe is full, or the I/O thread asleep, by far.
    thread::sleep(Duration::from_millis(3));
    let since = Instant::now();
    session.cancel();
    let report = session.join();
    assert!(report.result.is_err_and(|error| error.is_cancelled()));
    drop(reader);
    let reset = ended[0].reset().expect("a cancelled load is reset");
    Ok(reset.at.saturating_duration_since(since))
}

/// Loads bursts of 64 ready packets of 4 KiB; the counters, and how many packets there were.
///
/// # Errors
///
/// The kernel's.
///
/// # Panics
///
/// Where the load fails.
pub fn ready_64(bursts: u32) -> io::Result<(Stats, u32)> {
    const READY: u32 = 64;
    let devices = bursts;
    let plan = Plan {
        devices,
        channels: 1,
        packet: 4096,
        packets: READY,
    };
    let sinks = Sink::several(Kind::Memfd, devices, plan.device_bytes())?;
    let ids = plan.ids();
    let mut builder = LoadSession::builder().settings(engine::settings());
    for (id, sink) in ids.iter().zip(&sinks) {
        let (device, _): (Device, _) = sink::device(id, sink, 0);
        builder = builder.device(device);
    }
    let session = builder.start().expect("a load starts");
    let mut publisher = session.publisher();
    session.no_more_channels();
    for number in 0..plan.count() {
        let place = plan.place(number).expect("a data packet");
        publish(&mut publisher, &ids[place.device], place.index, &[7; 4096]);
    }
    // All are ready; nothing has been written.
    session.switchover_start();
    for id in &ids {
        let header = PacketHeader {
            index: READY,
            config: true,
        };
        let config = wire::wrap_config(&[]);
        let payload = [&header.encode()[..], &config[..]].concat();
        publisher.push(id, &payload).expect("a good packet");
    }
    drop(publisher);
    let report = session.join();
    report.result.expect("the migration succeeds");
    assert_eq!(report.stats.backend, "uring", "not the backend that ships");
    Ok((report.stats, plan.count()))
}
