//! One run: a save and a load of two devices over two channels in this process, and its judgement.
//!
//! The devices' files, the packets and the budget are small, so that a run has few operations, and
//! chosen so that it has all kinds: chains of large packets, gathered small ones, a channel that
//! waits for room. Threads: the sessions' own, and one for each simulated device's pipe.

use std::{
    fmt,
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use vfio_migration::{
    Backend, Channel, Device, DeviceState, Error, ErrorKind, LoadSession, Phase, Report,
    SaveSession, Settings, Writer,
    sim::{SimConfig, SimDevice, SimHandle, Stream},
};
use vfio_migration_uring::sim::SimConfig as RingConfig;

use crate::{
    calls::{CallFault, called},
    kernel::Supervisor,
    kth::Kth,
    leases,
    names::id,
    sockets::{Faulty, SocketFault},
    tally::Sweep,
};

const DEVICES: u32 = 2;
const CHANNELS: usize = 2;

/// A budget with which channels wait for room.
pub const SMALL: usize = 160 << 10;

/// What is to go wrong, and around what.
#[derive(Clone)]
pub struct Scene {
    pub backend: Backend,
    /// Both sides' ring, where it is simulated.
    pub ring: Option<RingConfig>,
    pub calls: Kth<CallFault>,
    pub sockets: Option<Kth<SocketFault>>,
    pub leases: Option<leases::Plan>,
    /// Whose calls into the kernel may fail: the sessions run under it.
    pub supervisor: Option<Supervisor>,
    /// Changes one source device and one destination device.
    pub adjust: fn(&mut SimConfig, &mut SimConfig),
    pub no_progress: Duration,
    /// Small, so that channels wait for room; or more than all packets, so that a side whose peer
    /// has failed need not wait out `no_progress`.
    pub budget: usize,
}

impl Scene {
    pub fn new() -> Self {
        Self {
            backend: Backend::Auto,
            ring: None,
            calls: Kth::none(),
            sockets: None,
            leases: None,
            supervisor: None,
            adjust: |_, _| {},
            // So that a machine that stands still for a while fails no run.
            no_progress: Duration::from_secs(30),
            budget: 1 << 20,
        }
    }
}

/// What a run must come to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Expect {
    /// Both sides succeed.
    Success,
    /// Both do, or there is an error.
    Any,
    /// Both do, where the fault hit nothing that counts; or an error with this errno is one side's
    /// first.
    Cause(i32),
}

struct Pair {
    saved: SimHandle,
    loaded: SimHandle,
    source: u64,
    before: u64,
}

/// Runs a scene, judges it, and counts it. `case` says what is special about it; `met`, whether the
/// fault was met.
pub fn judged(
    sweep: &mut Sweep,
    case: &dyn fmt::Display,
    scene: &Scene,
    expect: Expect,
    met: impl Fn() -> bool,
) {
    sweep.begin(&case);
    let before = left_over();
    let began = Instant::now();
    let (success, late) = run(case, scene, expect);
    let took = began.elapsed();
    if took > Duration::from_millis(500) && std::env::var_os("VFIO_MIGRATION_FAULTS_SLOW").is_some()
    {
        eprintln!("{case}: took {took:.1?}");
    }
    settle(case, before);
    sweep.ended(success, met(), late, took);
}

/// The engine's threads, the devices', and the process's files.
pub fn left_over() -> (usize, usize) {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let threads = tasks.filter_map(Result::ok).filter(|task| {
        let name = std::fs::read_to_string(task.path().join("comm"));
        name.is_ok_and(|name| {
            ["vfio-mig", "uring-", "sim-"]
                .iter()
                .any(|prefix| name.starts_with(prefix))
        })
    });
    let files = std::fs::read_dir("/proc/self/fd").unwrap();
    (threads.count(), files.count())
}

/// Waits until nothing is left over but what was there before: a thread that was joined may be
/// listed for a moment more.
pub fn settle(case: &dyn fmt::Display, before: (usize, usize)) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while left_over() != before {
        assert!(
            Instant::now() < deadline,
            "{case}: left over (threads, files): {:?}, before {before:?}",
            left_over()
        );
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn settings(scene: &Scene) -> Settings {
    let mut settings = Settings::default();
    settings.backend = scene.backend;
    settings.budget = Some(scene.budget);
    // So that both channels have one, where the budget is large.
    settings.buffer_len = 64 << 10;
    settings.data_len = Some(6 << 10);
    settings.grace = Duration::from_secs(10);
    settings.no_progress = scene.no_progress;
    // The second device's channels write to it, once it has shown to be quick.
    settings.writer = Writer::Auto;
    settings
}

fn device(number: u32, config: SimConfig, calls: &Kth<CallFault>) -> (Option<Device>, SimHandle) {
    let sim = SimDevice::new(config).unwrap();
    let handle = sim.handle();
    let called = called(sim, calls.clone());
    (Device::new(id(number), Box::new(called)).ok(), handle)
}

fn channels(scene: &Scene) -> (Vec<Channel>, Vec<Channel>) {
    let pairs = (0..CHANNELS).map(|_| {
        let (near, far) = UnixStream::pair().unwrap();
        match &scene.sockets {
            None => (Channel::from(near), Channel::from(far)),
            Some(kth) => (
                Faulty::channel(near, kth.clone(), scene.no_progress),
                Faulty::channel(far, kth.clone(), scene.no_progress),
            ),
        }
    });
    pairs.unzip()
}

/// Runs a scene and judges it. Returns whether it succeeded, and how many wake-ups came late.
fn run(case: &dyn fmt::Display, scene: &Scene, expect: Expect) -> (bool, u64) {
    let mut pairs = Vec::new();
    let (mut sources, mut destinations) = (Vec::new(), Vec::new());
    for number in 0..DEVICES {
        let mut from = SimConfig {
            seed: 10 + u64::from(number),
            len: 60_000 + 40_000 * u64::from(number),
            stream: Stream::Pipe,
            ..SimConfig::default()
        };
        let mut to = SimConfig {
            seed: 20,
            ..from.clone()
        };
        if number > 0 {
            to.stream = Stream::PlainWrite;
        }
        if number == 0 {
            (scene.adjust)(&mut from, &mut to);
        }
        let (source, saved) = device(number, from, &scene.calls);
        let (destination, loaded) = device(number, to, &scene.calls);
        pairs.push(Pair {
            source: saved.digest(),
            before: loaded.digest(),
            saved,
            loaded,
        });
        sources.push(source);
        destinations.push(destination);
    }
    let (near, far) = channels(scene);
    let settings = settings(scene);

    // A device that does not even answer is no part of a session.
    let complete = sources.iter().chain(&destinations).all(Option::is_some);
    if !complete {
        assert_ne!(expect, Expect::Success, "{case}: a device was refused");
        return (false, 0);
    }
    let mut load = LoadSession::builder().settings(settings.clone());
    let mut save = SaveSession::builder().settings(settings);
    for device in destinations.into_iter().flatten() {
        load = load.device(device);
    }
    for device in sources.into_iter().flatten() {
        save = save.device(device);
    }
    for channel in far {
        load = load.channel(channel);
    }
    for channel in near {
        save = save.channel(channel);
    }
    if let Some(ring) = &scene.ring {
        load = load.simulated_ring(ring.clone());
        save = save.simulated_ring(ring.clone());
    }
    if let Some(plan) = &scene.leases {
        load = load.refuse_leases(plan.clone());
        save = save.refuse_leases(plan.clone());
    }

    let migrate = || match load.start().map_err(Error::from) {
        Err(error) => (Err(Error::cancelled(Phase::Setup)), Err(error)),
        Ok(load) => {
            load.switchover_start();
            let saved = match save.start().map_err(Error::from) {
                // The save's channels are gone with it, and the load notices by itself.
                Err(error) => Err(error),
                Ok(save) => Ok(save.join()),
            };
            (saved, Ok(load.join()))
        }
    };
    let (saved, loaded) = match &scene.supervisor {
        None => migrate(),
        Some(supervisor) => supervisor.run(migrate),
    };
    judge(case, expect, &pairs, saved, loaded)
}

fn judge(
    case: &dyn fmt::Display,
    expect: Expect,
    pairs: &[Pair],
    saved: Result<Report, Error>,
    loaded: Result<Report, Error>,
) -> (bool, u64) {
    let first = |side: &Result<Report, Error>| match side {
        Ok(report) => report.result.clone().err(),
        Err(error) => Some(error.clone()),
    };
    let errors: Vec<_> = [first(&saved), first(&loaded)]
        .into_iter()
        .flatten()
        .collect();
    let success = errors.is_empty();
    for error in &errors {
        clear(case, error);
    }
    match expect {
        Expect::Success => assert!(success, "{case}: {errors:?}"),
        Expect::Any => {}
        Expect::Cause(errno) => assert!(
            success
                || errors
                    .iter()
                    .any(|error| error.raw_os_error() == Some(errno)),
            "{case}: no error says why: {errors:?}"
        ),
    }

    for (at, pair) in pairs.iter().enumerate() {
        // What is saved is not changed by it; what is loaded is whole, or not there at all.
        assert_eq!(pair.saved.digest(), pair.source, "{case}: device {at}");
        let digest = pair.loaded.digest();
        let whole = pair.loaded.has_loaded() && digest == pair.source;
        assert!(
            whole || digest == pair.before,
            "{case}: device {at} has half a state"
        );
        let said = loaded
            .as_ref()
            .ok()
            .map(|report| &report.devices[at].result);
        if matches!(said, Some(Ok(()))) {
            assert!(whole, "{case}: device {at} is said to be loaded");
            assert_eq!(pair.loaded.config_digest(), pair.saved.config_digest());
        }
        if success {
            assert_eq!(pair.loaded.state(), DeviceState::Stop, "{case}");
        }
    }
    let mut late = 0;
    for (side, report) in [(&saved, "saved"), (&loaded, "loaded")] {
        let Ok(report_of) = side else { continue };
        late += report_of.stats.late_wakeups;
        assert_eq!(report_of.stats.held, 0, "{case}: {report}: memory is held");
        assert_eq!(report_of.abandoned_threads, 0, "{case}: {report}");
        for (device, pair) in report_of.devices.iter().zip(pairs) {
            if let Err(error) = &device.result {
                clear(case, error);
            }
            let handle = if report == "saved" {
                &pair.saved
            } else {
                &pair.loaded
            };
            let Some(held) = &device.device else {
                panic!("{case}: {report}: {} did not come back", device.id);
            };
            if held.is_lost() {
                continue;
            }
            assert_eq!(held.state(), handle.state(), "{case}: {report}");
            // What comes back from a session that failed is what went in; or it must be closed.
            let ended = match (report, &report_of.result) {
                ("saved", Ok(())) => held.state() == DeviceState::StopCopy,
                ("loaded", Ok(())) => held.state() == DeviceState::Stop,
                _ => held.state() == DeviceState::Running,
            };
            assert!(ended, "{case}: {report}: {held:?}, {:?}", device.result);
        }
    }
    // Where a start failed the devices were put back, and have gone.
    if saved.is_err() {
        for pair in pairs {
            let state = pair.saved.state();
            let resets = pair.saved.calls(vfio_migration::sim::Callback::Reset);
            assert!(
                state == DeviceState::Running || resets > 0,
                "{case}: {state:?} after a start that failed"
            );
        }
    }
    (success, late)
}

/// One clear error: it says what and where, and is no mistake of the engine's own.
fn clear(case: &dyn fmt::Display, error: &Error) {
    let named = match error.kind() {
        ErrorKind::Internal(what) => panic!("{case}: internal: {what}"),
        ErrorKind::Device
        | ErrorKind::State
        | ErrorKind::Lost
        | ErrorKind::Stuck
        | ErrorKind::Missing => error.device().is_some(),
        ErrorKind::Protocol(_) | ErrorKind::Channel => {
            error.channel().is_some() || error.device().is_some()
        }
        _ => true,
    };
    assert!(named, "{case}: nobody knows where: {error:?}");
}

/// The errnos that the sweeps use.
pub const ERRNOS: [i32; 9] = [
    libc::EINTR,
    libc::EAGAIN,
    libc::ENOSPC,
    libc::EIO,
    libc::ENODEV,
    libc::ENOMEM,
    libc::EPIPE,
    libc::ECONNRESET,
    libc::ETIMEDOUT,
];

pub fn name(errno: i32) -> String {
    format!("{:?}", nix::errno::Errno::from_raw(errno))
}
