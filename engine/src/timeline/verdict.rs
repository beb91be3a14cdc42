//! What a picture says in words: which device was the longest, and why, as far as the counters tell.
//!
//! The critical path is that of the device that was done last: its phases follow each other, and what comes
//! after them waits for it. The largest of them is looked into.

use super::model::{Device, DeviceSide, Model, float};
use crate::stats::Side;

/// A time for people.
pub(super) fn time(seconds: f64) -> String {
    match seconds {
        ..0.001 => format!("{:.0} us", seconds * 1e6),
        ..1.0 => format!("{:.1} ms", seconds * 1e3),
        _ => format!("{seconds:.2} s"),
    }
}

/// A rate for people: bytes in a second.
pub(super) fn rate(bytes_per_second: f64) -> String {
    match bytes_per_second {
        ..1e6 => format!("{:.1} kB/s", bytes_per_second / 1e3),
        ..1e9 => format!("{:.0} MB/s", bytes_per_second / 1e6),
        _ => format!("{:.2} GB/s", bytes_per_second / 1e9),
    }
}

/// A size for people.
pub(super) fn size(bytes: f64) -> String {
    match bytes {
        ..1024.0 => format!("{bytes:.0} B"),
        ..1048576.0 => format!("{:.1} KiB", bytes / 1024.0),
        ..1073741824.0 => format!("{:.1} MiB", bytes / 1048576.0),
        _ => format!("{:.2} GiB", bytes / 1073741824.0),
    }
}

/// A part of the critical path.
struct Part {
    /// Completes "it ...".
    what: &'static str,
    took: f64,
    cause: Cause,
}

#[derive(Clone, Copy)]
enum Cause {
    Start,
    Stop,
    SetState,
    Wait,
    Write,
    Read,
    Blocked,
    Wire,
    Config,
    Resume,
}

fn took(side: &DeviceSide, name: &str) -> f64 {
    side.bar(name).map_or(0.0, |bar| bar.span.1 - bar.span.0)
}

/// The parts of a device's critical path, as far as they are known.
fn parts(device: &Device) -> Vec<Part> {
    let part = |what, took, cause| Part { what, took, cause };
    let mut parts = Vec::new();
    let source = device.side(Side::Source);
    if let Some(source) = source {
        parts.push(part("took % to stop", took(source, "stop"), Cause::Stop));
        let set = took(source, "set state");
        parts.push(part("took % to go to STOP_COPY", set, Cause::SetState));
    }
    match (source, device.side(Side::Destination)) {
        (_, Some(side)) => {
            let waited = DeviceSide::length(&side.starved);
            let wrote = (took(side, "write") - waited).max(0.0);
            let began = side.bar("write").map_or(0.0, |bar| bar.span.0);
            let before: f64 = parts.iter().map(|part: &Part| part.took).sum();
            let start = (began - before).max(0.0);
            parts.push(part("waited % for the switchover", start, Cause::Start));
            parts.push(part("waited % for its packets", waited, Cause::Wait));
            parts.push(part("took % to be written", wrote, Cause::Write));
            let config = took(side, "config");
            parts.push(part("took % to load its config", config, Cause::Config));
            let resume = took(side, "resume");
            parts.push(part("took % to resume", resume, Cause::Resume));
        }
        (Some(side), None) => {
            let blocked = DeviceSide::length(&side.starved);
            let read = (took(side, "read") - blocked).max(0.0);
            let ended = |name| side.bar(name).map_or(0.0, |bar| bar.span.1);
            let wire = (ended("wire") - ended("read")).max(0.0);
            parts.push(part("took % to be read", read, Cause::Read));
            parts.push(part("waited % for memory", blocked, Cause::Blocked));
            parts.push(part("took % more on the wire", wire, Cause::Wire));
        }
        (None, None) => {}
    }
    parts
}

fn late_channel(model: &Model) -> Option<String> {
    let (number, last, next) = model.late_channel()?;
    Some(format!(
        "Channel {number} brought the last packets, at {}; the others had brought theirs by {}.",
        time(last),
        time(next)
    ))
}

fn written_at(device: &Device) -> Option<f64> {
    let side = device.side(Side::Destination)?;
    let wrote = took(side, "write") - DeviceSide::length(&side.starved);
    let any = side.bar("write").is_some_and(|bar| !bar.open) && wrote > 0.0;
    any.then(|| float(side.stats.bytes) / wrote)
}

/// Why a part took so long.
fn why(model: &Model, device: &Device, cause: Cause) -> String {
    match cause {
        Cause::Start => {
            "From the VM's stop to the switchover's start nothing of it could be loaded.".into()
        }
        Cause::Stop => "Its driver took its time to stop it.".into(),
        Cause::SetState => "Its driver took its time to go to STOP_COPY.".into(),
        Cause::Write => {
            let own = written_at(device).map_or_else(String::new, |own| format!(", {}", rate(own)));
            let others = model.devices.iter().filter(|it| it.id != device.id);
            let mut others: Vec<_> = others.filter_map(written_at).collect();
            others.sort_by(f64::total_cmp);
            let beside = match others[..] {
                [] => String::new(),
                [only] => format!("; the other took {}", rate(only)),
                [least, .., most] => {
                    format!("; the others took {} to {}", rate(least), rate(most))
                }
            };
            format!("Its own driver set the pace: it takes what it is given{own}{beside}.")
        }
        Cause::Config => "The VMM's own code loads the config.".into(),
        Cause::Resume => "Its driver checks the state on the way to STOP, and starts it.".into(),
        Cause::Read => "Its own driver set the pace: it gives its state so slowly.".into(),
        Cause::Blocked => {
            "All memory was in use: the channels, or the destination, took it so slowly.".into()
        }
        Cause::Wire => "The channels, or the destination, took it so slowly.".into(),
        Cause::Wait => why_it_waited(model, device),
    }
}

fn why_it_waited(model: &Model, device: &Device) -> String {
    if let Some(source) = device.side(Side::Source) {
        let read = took(source, "read");
        let blocked = DeviceSide::length(&source.starved);
        let reading = source.stats.transfers.total.as_secs_f64();
        if blocked > 0.5 * read {
            return "Its source had no memory to read into: the channels took it so slowly.".into();
        }
        if reading > 0.5 * read {
            let at = rate(float(source.stats.bytes) / read.max(1e-9));
            return format!("Its source's driver gave its state so slowly: {at}.");
        }
    }
    let bytes = model.session(Side::Destination);
    let bytes = bytes.map_or(0, |it| it.stats.channels.iter().map(|it| it.bytes).sum());
    let all = rate(float(bytes) / model.end.max(1e-9));
    format!("The source, or the network, brought no more: {all} for all devices together.")
}

/// Some lines: what it was and how long it took; the longest device; why.
pub(super) fn lines(model: &Model) -> Vec<String> {
    let count = |count: usize, what: &str| match count {
        1 => format!("1 {what}"),
        _ => format!("{count} {what}s"),
    };
    let per_side = |side| model.channels.iter().filter(|it| it.side == side).count();
    let sides = [Side::Source, Side::Destination, Side::Relay];
    let channels = sides.into_iter().map(per_side).max().unwrap_or(0);
    let moved = |device: &Device| device.sides.iter().map(|it| it.stats.bytes).max();
    let bytes: u64 = model.devices.iter().filter_map(moved).sum();
    let what = format!(
        "{}, {}, {}",
        count(model.devices.len(), "device"),
        count(channels, "channel"),
        size(float(bytes))
    );
    let mut lines = Vec::new();
    if let Some((at, why)) = &model.failure {
        let after = if *at < 0.0 {
            "before the VM stopped".to_owned()
        } else {
            format!("after {}", time(*at))
        };
        lines.push(format!("FAILED {after}: {what}"));
        lines.push(why.clone());
        let unfinished = model.devices.iter().filter(|it| it.end().is_none());
        let names: Vec<_> = unfinished.map(|it| it.id.to_string()).collect();
        let shown = names.iter().take(4).cloned().collect::<Vec<_>>().join(", ");
        let more = match names.len() {
            ..=4 => String::new(),
            len => format!(" and {} more", len - 4),
        };
        if !names.is_empty() {
            lines.push(format!("Not done by then: {shown}{more}"));
        }
        return lines;
    }
    let Some(done) = model.done else {
        lines.push(format!("{} observed: {what}", time(model.end)));
        lines.extend(late_channel(model));
        return lines;
    };
    // A source does not know when the VM runs again.
    lines.push(match &model.sessions[..] {
        [only] if only.side == Side::Source => {
            format!(
                "Sent {} after the VM stopped, as the source sees it: {what}",
                time(done)
            )
        }
        [only] if only.side == Side::Destination => {
            format!(
                "Downtime {}, as the destination sees it: {what}",
                time(done)
            )
        }
        _ => format!("Downtime {}: {what}", time(done)),
    });
    let Some(longest) = model.longest() else {
        return lines;
    };
    // They resume together: what tells them apart is when each had its state.
    let loaded = |device: &Device| device.loaded().or_else(|| device.end());
    let others = model.devices.iter().filter(|it| it.id != longest.id);
    let next_end = others.filter_map(loaded).reduce(f64::max);
    let next = match (loaded(longest), next_end) {
        (Some(own), Some(next)) => {
            let what = match longest.loaded() {
                Some(_) => "had all of its state",
                None => "was done",
            };
            format!(" (it {what} at {}, the next at {})", time(own), time(next))
        }
        _ => String::new(),
    };
    let mut parts = parts(longest);
    parts.sort_by(|a, b| b.took.total_cmp(&a.took));
    let named = parts.iter().filter(|part| part.took > 0.02 * done);
    let named: Vec<_> = named
        .map(|part| part.what.replace('%', &time(part.took)))
        .collect();
    lines.push(format!(
        "Longest: {}{next}. It {}.",
        longest.id,
        named.join(", ")
    ));
    let late = late_channel(model);
    let waited = parts
        .iter()
        .any(|part| matches!(part.cause, Cause::Wait) && part.took > 0.2 * done);
    if let Some(late) = late.filter(|_| waited) {
        lines.push(late);
    } else if let Some(most) = parts.first() {
        lines.push(why(model, longest, most.cause));
    }
    let own = loaded(longest).unwrap_or(done);
    if next_end.is_some_and(|next| next > 0.9 * own) {
        lines.push("No device stands out: others took about as long.".into());
    }
    lines
}
