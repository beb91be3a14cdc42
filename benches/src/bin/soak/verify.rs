//! What every migration must come to, however it ends.

use std::{
    any::Any,
    fs,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use vfio_migration::{DeviceState, Error, ErrorKind, Report, Stats};

use crate::{
    plan::{Plan, Side},
    subject::{PUT_BACK, Subject},
};

/// How many bytes have been spilled, in all migrations of this process.
pub static SPILLED: AtomicU64 = AtomicU64::new(0);

type Ended = Option<Result<Report, Error>>;

/// Judges both sides. `None` is a side that was dropped.
pub fn both(
    plan: &Plan,
    saved: &[Subject],
    loaded: &[Subject],
    save: Ended,
    load: Ended,
) -> Result<bool, String> {
    for look in saved {
        check(look.handle.digest() == look.before, "a source has changed")?;
    }
    for (source, destination) in saved.iter().zip(loaded) {
        whole_or_not(source.before, destination)?;
    }
    let why = |ended: &Ended| match ended {
        Some(Ok(report)) => format!("{:?}", report.result),
        Some(Err(error)) => format!("{error:?}"),
        None => "dropped".to_owned(),
    };
    let (here, there) = (why(&save), why(&load));
    let mut success = side(Side::Save, saved, save)?;
    success &= side(Side::Load, loaded, load)?;
    check(
        success || !plan.scene.must_succeed(),
        &format!("nothing went wrong, and it failed: save {here}, load {there}"),
    )?;
    if success {
        for (source, destination) in saved.iter().zip(loaded) {
            loaded_from(source.before, source.handle.config_digest(), destination)?;
        }
    }
    Ok(success)
}

/// A destination has a whole state, or its own.
pub fn whole_or_not(source: u64, destination: &Subject) -> Result<(), String> {
    let digest = destination.handle.digest();
    let whole = destination.handle.has_loaded() && digest == source;
    check(whole || digest == destination.before, "half a state")
}

/// A destination has loaded a source's state and config, and its VM has not started.
pub fn loaded_from(source: u64, config: u64, destination: &Subject) -> Result<(), String> {
    holds(source, config, destination)?;
    check(
        destination.handle.state() == DeviceState::Stop,
        "not in STOP",
    )
}

/// A destination has a source's state and config.
pub fn holds(source: u64, config: u64, destination: &Subject) -> Result<(), String> {
    let handle = &destination.handle;
    check(
        handle.has_loaded() && handle.digest() == source,
        "another digest",
    )?;
    check(handle.config_digest() == config, "another config")
}

/// Judges one side's report against its devices. Returns whether it succeeded.
pub fn side(side: Side, looked: &[Subject], ended: Ended) -> Result<bool, String> {
    let report = match ended {
        Some(Ok(report)) => report,
        Some(Err(error)) => {
            clear(&error)?;
            return Ok(false);
        }
        None => return Ok(false),
    };
    if let Err(error) = &report.result {
        clear(error)?;
    }
    check(report.stats.held == 0, "memory is held")?;
    check(report.stats.spill.held == 0, "a spill file is not empty")?;
    spilled(&report.stats);
    check(report.abandoned_threads == 0, "a thread was left behind")?;
    let mut success = report.result.is_ok();
    for (device, look) in report.devices.iter().zip(looked) {
        if let Err(error) = &device.result {
            clear(error)?;
            success = false;
        }
        let Some(held) = &device.device else {
            return Err(format!("{} did not come back", device.id));
        };
        if held.is_lost() {
            continue;
        }
        let (said, is) = (held.state(), look.handle.state());
        if said != is {
            return Err(format!(
                "{} is in {is}, and is said to be in {said}",
                device.id
            ));
        }
        let right = match (side, &report.result) {
            (Side::Save, Ok(())) => is == DeviceState::StopCopy,
            (Side::Load, Ok(())) => is == DeviceState::Stop,
            _ => is == PUT_BACK,
        };
        if !right {
            return Err(format!(
                "{} is in {is} after {:?}, {:?}",
                device.id, report.result, device.result
            ));
        }
    }
    Ok(success)
}

/// Counts what a load has spilled.
pub fn spilled(stats: &Stats) {
    // Relaxed: for a human.
    SPILLED.fetch_add(stats.spill.written, Relaxed);
}

/// An error says what was wrong, and where; and it is not ours.
pub fn clear(error: &Error) -> Result<(), String> {
    let place = error.device().is_some() || error.channel().is_some();
    match error.kind() {
        ErrorKind::Internal(what) => Err(format!("internal: {what}")),
        ErrorKind::Stuck => Err(format!("stuck: {error:?}")),
        ErrorKind::Misuse(what) => Err(format!("wrong use: {what}")),
        ErrorKind::Cancelled | ErrorKind::Host | ErrorKind::Stalled | ErrorKind::Panicked => Ok(()),
        _ => check(place, &format!("nobody knows where: {error:?}")),
    }
}

pub fn check(right: bool, what: &str) -> Result<(), String> {
    if right { Ok(()) } else { Err(what.to_owned()) }
}

/// The engine's threads, the devices', and the process's files.
pub fn left_over() -> (usize, usize) {
    let entries = |of: &str| {
        fs::read_dir(of)
            .into_iter()
            .flatten()
            .filter_map(Result::ok)
    };
    let threads = entries("/proc/self/task").filter(|task| {
        let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        let prefixes = ["vfio-mig", "uring-", "sim-"];
        prefixes.iter().any(|prefix| name.starts_with(prefix))
    });
    (threads.count(), entries("/proc/self/fd").count())
}

/// Waits until nothing is left over: a thread that was joined may be listed for a moment more.
pub fn settled(before: (usize, usize)) -> Result<(), String> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let now = left_over();
        if now == before {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(format!(
                "left over (threads, files): {now:?}, before {before:?}"
            ));
        }
        std::thread::sleep(Duration::from_micros(500));
    }
}

/// What a panic had to say.
pub fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "something".to_owned())
}
