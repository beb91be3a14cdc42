//! Channels that a RAM migrator's SYNC barriers share with device state: with a budget of one packet
//! and a device far slower than the source, everything arrives, nothing waits for ever, and what was
//! spilled has been given back.
//!
//! The source and the barriers are the test's own, over real sockets. A device's speed is that of the
//! simulation's clock: it takes so many bytes and no more before it has been told to go on, so "slow"
//! costs no time.

use std::{
    env,
    io::{self, Read, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    process::Command,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vfio_migration::{
    Backend, Channel, ErrorKind, LoadSession, Phase, RamSink, Report, Settings, Spill,
};
use vfio_migration_uring::sim::{Fault, FaultPlan, SimConfig};

use crate::{
    again,
    barrier::sync,
    mock::Mock,
    names::id,
    packets::{config_packet, hello, packet},
    watchdog::Watchdog,
};

const CHANNELS: u32 = 3;
const DEVICES: u32 = 2;

/// How many bytes a device takes in a second of its own time.
const DEVICE_SPEED: usize = 1 << 10;

/// How many times faster the source is.
const FASTER: usize = 100;

/// What all threads of a case know of one another.
struct World {
    state: Mutex<State>,
    changed: Condvar,
    /// How long a barrier is waited for.
    patience: Duration,
}

#[derive(Default)]
struct State {
    /// Channels that have come to a SYNC, each counted each time.
    came: u32,
    /// Bytes that the source has sent, and the devices have taken.
    sent: usize,
    taken: usize,
    /// Senders that cannot go on now, or are done.
    held: u32,
}

impl World {
    fn new(patience: Duration) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            patience,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// What a VMM's main thread does with SYNCs: nobody goes on before all have come to theirs.
    fn barrier(&self) -> io::Result<()> {
        let mut state = self.lock();
        state.came += 1;
        self.changed.notify_all();
        let all = state.came.div_ceil(CHANNELS) * CHANNELS;
        let waits = |state: &mut State| state.came < all;
        let wait = self.changed.wait_timeout_while(state, self.patience, waits);
        if wait.unwrap().1.timed_out() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(())
    }

    /// Sends a channel's bytes. Hung up on, where the load fails.
    fn send(&self, socket: &mut UnixStream, mut bytes: &[u8]) {
        socket.set_nonblocking(true).unwrap();
        while !bytes.is_empty() {
            match socket.write(bytes) {
                Ok(count) => {
                    bytes = &bytes[count..];
                    self.change(|state| state.sent += count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.change(|state| state.held += 1);
                    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
                    poll(&mut fds, PollTimeout::NONE).unwrap();
                    self.change(|state| state.held -= 1);
                }
                Err(_) => break,
            }
        }
        self.change(|state| state.held += 1);
    }

    /// Takes a device's bytes: a second's worth of them when the source has sent a hundred times as
    /// much, or cannot send more.
    fn take(&self, mut pipe: io::PipeReader) -> Vec<u8> {
        let mut bytes = Vec::new();
        loop {
            let mut second = [0; DEVICE_SPEED];
            let ahead = |state: &mut State| {
                state.held < CHANNELS && state.sent < FASTER * (state.taken + DEVICE_SPEED)
            };
            drop(self.changed.wait_while(self.lock(), ahead).unwrap());
            let count = pipe.read(&mut second).unwrap();
            if count == 0 {
                return bytes;
            }
            bytes.extend(&second[..count]);
            self.change(|state| state.taken += count);
        }
    }
}

/// One channel's.
struct Sink(Arc<World>);

impl RamSink for Sink {
    fn ram(&mut self, _header: &[u8], pages: &mut dyn Read) -> io::Result<()> {
        io::copy(pages, &mut io::sink()).map(drop)
    }

    fn sync(&mut self, _header: &[u8]) -> io::Result<()> {
        self.0.barrier()
    }
}

fn bytes(device: u32, index: u32, len: usize) -> Vec<u8> {
    let seed = (device * 1000 + index) as usize;
    (0..len)
        .map(|at| (seed + at * 7 + at / 253).to_le_bytes()[0])
        .collect()
}

/// When the switchover starts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Start {
    AtOnce,
    /// When all channels are through their barriers.
    BehindBarriers,
    /// When nothing more can be spilled.
    SpillFull,
}

/// One case: two devices' packets over three channels.
#[derive(Clone)]
struct Case {
    settings: Settings,
    /// Of a packet's data, and how many packets each device has.
    len: usize,
    count: u32,
    /// SYNCs on each channel, none where device state has them for itself.
    rounds: u32,
    start: Start,
    patience: Duration,
    plan: Option<FaultPlan>,
}

impl Case {
    fn new(len: usize, count: u32, rounds: u32) -> Self {
        let mut settings = Settings::default();
        // A packet for each device, and nothing else.
        settings.budget = Some(len.max(4096) * DEVICES as usize);
        settings.channels = CHANNELS;
        Self {
            settings,
            len,
            count,
            rounds,
            start: Start::AtOnce,
            patience: Duration::from_secs(50),
            plan: None,
        }
    }

    /// What a channel carries. In each round the last channel's SYNC comes first, and behind it is
    /// what every device needs before all that the others carry ahead of theirs.
    fn channel(&self, number: u32) -> Vec<u8> {
        let last = number == CHANNELS - 1;
        let mut sent = hello(u8::try_from(number).unwrap());
        let mine = |index: u32| index % CHANNELS == CHANNELS - 1 - number;
        let rounds = self.rounds.max(1);
        for round in 0..rounds {
            if self.rounds > 0 && last {
                sent.extend(sync());
            }
            let (begin, end) = (
                self.count * round / rounds,
                self.count * (round + 1) / rounds,
            );
            for index in (begin..end).filter(|&index| mine(index)) {
                for device in 0..DEVICES {
                    let data = bytes(device, index, self.len);
                    sent.extend(packet(device, index, &data));
                }
            }
            if self.rounds > 0 && !last {
                sent.extend(sync());
            }
        }
        if mine(self.count) {
            for device in 0..DEVICES {
                sent.extend(config_packet(device, self.count, b"config"));
            }
        }
        sent
    }

    /// Runs it. Checks that no device has got anything but a beginning of its state, and all of it
    /// where the load succeeded; and that space and memory are as they should be.
    fn run(&self) -> Report {
        let _watchdog = Watchdog::new();
        let world = World::new(self.patience);
        let mut load = LoadSession::builder().settings(self.settings.clone());
        if let Some(plan) = &self.plan {
            load = load.simulated_ring(SimConfig {
                plan: plan.clone(),
                ..SimConfig::default()
            });
        }
        let mut devices: Vec<JoinHandle<Vec<u8>>> = Vec::new();
        for device in 0..DEVICES {
            let (reader, writer) = io::pipe().unwrap();
            load = load.device(Mock::new(writer).device(device));
            let world = world.clone();
            devices.push(thread::spawn(move || world.take(reader)));
        }
        let mut senders = Vec::new();
        for number in 0..CHANNELS {
            let (mut near, far) = UnixStream::pair().unwrap();
            let sent = self.channel(number);
            let sender = world.clone();
            senders.push(thread::spawn(move || sender.send(&mut near, &sent)));
            let mut channel = Channel::from(far);
            if self.rounds > 0 {
                channel = channel.with_ram_sink(Sink(world.clone()));
            }
            load = load.channel(channel);
        }
        let load = load.start().unwrap();
        while self.start == Start::SpillFull && load.stats().spill.held < load.stats().spill.limit {
            thread::sleep(Duration::from_millis(1));
        }
        if self.start == Start::BehindBarriers {
            let before = |state: &mut State| state.came < self.rounds * CHANNELS;
            let (_state, waited) = world
                .changed
                .wait_timeout_while(world.lock(), self.patience, before)
                .unwrap();
            assert!(!waited.timed_out(), "a barrier waits for the switchover");
        }
        load.switchover_start();
        let report = load.join();
        for sender in senders {
            sender.join().unwrap();
        }
        for (device, got) in (0..).zip(devices) {
            let got = got.join().unwrap();
            let all: Vec<u8> = (0..self.count)
                .flat_map(|index| bytes(device, index, self.len))
                .collect();
            assert!(all.starts_with(&got), "device {device}");
            assert!(got.len() == all.len() || report.result.is_err());
        }
        let stats = &report.stats;
        // Each packet has a header of 12 bytes; a config has two tags around it, too.
        let state = self.count as usize * (self.len + 12) + 12 + 16 + b"config".len();
        for device in &stats.devices {
            let counted = (device.bytes, device.packets);
            let all = (state as u64, u64::from(self.count) + 1);
            assert!(counted == all || report.result.is_err(), "{counted:?}");
        }
        assert_eq!(stats.spill.held, 0, "space is given back");
        assert!(stats.spill.held_high <= stats.spill.limit);
        assert!(stats.held_high <= stats.budget);
        assert_eq!(stats.late_wakeups, 0);
        report
    }
}

/// That everything came, and that what was spilled came back.
fn succeeded(report: Report) -> Report {
    report.result.as_ref().unwrap();
    assert_eq!(report.stats.spill.written, report.stats.spill.read);
    report
}

#[test]
fn barriers_are_passed_with_a_budget_of_one_packet() {
    for backend in [Backend::Auto, Backend::Blocking] {
        for start in [Start::AtOnce, Start::BehindBarriers] {
            for len in [1, 5000, 300_000] {
                let mut case = Case::new(len, 24, 2);
                case.settings.backend = backend;
                case.start = start;
                let report = succeeded(case.run());
                assert!(report.stats.spill.packets > 0, "{len} {start:?}");
                let spill = report.stats.spill;
                println!("{backend:?}, {len} bytes, {start:?}: {spill:?}");
            }
        }
    }
}

#[test]
fn without_spilling_the_barriers_deadlock_and_the_error_says_who_waits() {
    let mut case = Case::new(5000, 24, 1);
    case.settings.spill = Spill::Off;
    case.settings.no_progress = Duration::from_millis(300);
    case.settings.grace = Duration::from_millis(300);
    case.patience = Duration::from_secs(3);
    let report = case.run();
    let error = report.result.unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Stalled);
    assert!(error.device().is_some());
    assert_eq!(report.stats.spill.limit, 0);
}

#[test]
fn hours_of_a_slow_devices_time_pass_within_the_budget() {
    let hours = |case: &Case| case.len * case.count as usize / DEVICE_SPEED;
    // Shared: four barriers.
    let case = Case::new(4096, 2048, 4);
    assert!(hours(&case) >= 2 * 3600);
    let report = succeeded(case.run());
    assert!(report.stats.spill.packets > 100);
    assert_eq!(report.stats.budget, 2 * 4096);
    println!("shared: {:?}", report.stats.spill);
    // Device state alone: the source is held back instead.
    let report = succeeded(Case::new(4096, 2048, 0).run());
    assert_eq!(report.stats.spill.packets, 0);
    println!("alone: held {} at most", report.stats.held_high);
}

#[test]
fn a_full_spill_file_holds_the_source_back() {
    let mut case = Case::new(5000, 200, 0);
    case.settings.spill = Spill::Memfd;
    case.settings.spill_limit = 3 * (64 << 10) + 5;
    case.start = Start::SpillFull;
    let report = succeeded(case.run());
    let spill = report.stats.spill;
    assert_eq!((spill.limit, spill.held_high), (3 << 16, 3 << 16));
}

#[test]
fn packets_are_spilled_to_a_directory_and_nothing_is_left_there() {
    let directory = env::temp_dir().join(format!("vfio-spill-{}", std::process::id()));
    std::fs::create_dir(&directory).unwrap();
    let mut case = Case::new(100_000, 24, 2);
    case.settings.spill = Spill::Directory(directory.clone());
    let report = succeeded(case.run());
    assert!(report.stats.spill.packets > 0);
    // Fails where something is left in it.
    std::fs::remove_dir(&directory).unwrap();
    let error = LoadSession::builder()
        .settings(case.settings)
        .device(Mock::new(io::pipe().unwrap().1).device(0))
        .start()
        .unwrap_err()
        .error;
    assert_eq!(
        (error.kind(), error.phase()),
        (&ErrorKind::Spill, Phase::Setup)
    );
    assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
}

#[test]
fn a_file_that_cannot_be_read_fails_the_packets_device_by_name() {
    let (mut spilled, mut others) = (0, 0);
    for number in 0.. {
        let plan = FaultPlan::new().with(number, Fault::Errno(libc::EIO));
        let mut case = Case::new(5000, 12, 1);
        case.plan = Some(plan.clone());
        let report = case.run();
        if plan.executed() <= number {
            break;
        }
        let error = report.result.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        assert!(error.device().is_some() && error.index().is_some());
        assert_eq!(error.phase(), Phase::Load);
        match error.kind() {
            ErrorKind::Spill => spilled += 1,
            ErrorKind::Device => others += 1,
            kind => panic!("{kind:?}"),
        }
    }
    println!("{spilled} reads of the file and {others} writes to a device failed");
    assert!(spilled > 0 && others > 0);
}

#[test]
fn a_cancelled_load_gives_its_space_back() {
    let _watchdog = Watchdog::new();
    let mut settings = Settings::default();
    settings.budget = Some(4096);
    settings.spill = Spill::Memfd;
    let (reader, writer) = io::pipe().unwrap();
    let load = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(writer).device(0))
        .start()
        .unwrap();
    load.no_more_channels();
    let mut publisher = load.publisher();
    for index in 1..=40 {
        let payload = crate::payload::payload(index, false, &bytes(0, index, 9000));
        publisher.push(&id(0), &payload).unwrap();
    }
    assert_eq!(load.stats().spill.packets, 40);
    assert_eq!(load.stats().spill.held, 40 << 16);
    load.cancel();
    drop(publisher);
    let report = load.join();
    assert!(report.result.unwrap_err().is_cancelled());
    assert_eq!((report.stats.spill.held, report.stats.spill.read), (0, 0));
    drop((reader, report.devices));
}

/// The kernel's limit on a file's size is a process's, so this case has one to itself.
#[test]
fn a_file_that_cannot_be_written_fails_the_packets_device_by_name() {
    const CASE: &str = "VFIO_MIGRATION_SPILL_CASE";
    const NAME: &str = "a_file_that_cannot_be_written_fails_the_packets_device_by_name";
    if env::var(CASE).is_ok() {
        let report = Case::new(9000, 24, 1).run();
        let error = report.result.unwrap_err();
        println!("{error}");
        assert_eq!(
            (error.kind(), error.phase()),
            (&ErrorKind::Spill, Phase::Receive)
        );
        assert_eq!(error.raw_os_error(), Some(libc::EFBIG));
        assert!(error.device().is_some() && error.index().is_some());
        return;
    }
    // Five chunks, in blocks of 512 bytes.
    let output = Command::new("sh")
        .args(["-c", "ulimit -f 640; exec \"$0\" \"$@\""])
        .arg(env::current_exe().unwrap())
        .args(["--exact", &again::path(module_path!(), NAME), "--nocapture"])
        .env(CASE, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{error}");
    assert!(text.contains("the spill file failed"), "{text}{error}");
}

#[test]
fn space_that_is_free_again_is_told_of_while_the_device_is_busy() {
    const LEN: usize = 60_000;
    let _watchdog = Watchdog::new();
    let mut settings = Settings::default();
    // One buffer and one reserve, each for one packet.
    settings.budget = Some(128 << 10);
    settings.spill = Spill::Memfd;
    settings.spill_limit = 3 << 16;
    let (mut reader, writer) = io::pipe().unwrap();
    let load = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(writer).device(0))
        .start()
        .unwrap();
    load.no_more_channels();
    let payload = |index| crate::payload::payload(index, false, &bytes(0, index, LEN));
    let mut publisher = load.publisher();
    for index in [5, 1, 2, 3] {
        publisher.push(&id(0), &payload(index)).unwrap();
    }
    assert_eq!(load.stats().spill.held, 3 << 16);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| load.publisher().push(&id(0), &payload(4)));
        load.switchover_start();
        // Until it waits for space and for nothing else. (If it does not, the test cannot fail.)
        thread::sleep(Duration::from_millis(200));
        // Of these two the pipe holds one, and nobody reads it yet; so the third and fourth stay where
        // they are, and the last one gets the second's space.
        publisher.push(&id(0), &payload(0)).unwrap();
        waiting.join().unwrap().unwrap();
    });
    assert_eq!(load.stats().late_wakeups, 0);
    let config = vfio_migration::wire::wrap_config(b"config");
    let config = crate::payload::payload(6, true, &config);
    let reading = thread::spawn(move || {
        let mut got = Vec::new();
        reader.read_to_end(&mut got).unwrap();
        got
    });
    publisher.push(&id(0), &config).unwrap();
    drop(publisher);
    load.join().result.unwrap();
    let all: Vec<u8> = (0..6).flat_map(|index| bytes(0, index, LEN)).collect();
    assert_eq!(reading.join().unwrap(), all);
}
