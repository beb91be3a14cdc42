//! The lanes of a chart: a device's on each side, and a channel's.

use svg::node::element::Title;

use super::canvas::{
    COLUMNS, CONFIG, Canvas, IDLE, INK, LANE, LEFT, LONGEST, MOVES, PALE, RESUMES, RIGHT, STOPS,
    WAITS, WIDTH, WIRE, rectangle, text,
};
use crate::{
    stats::Side,
    timeline::{
        model::{Channel, Device, DeviceSide, Span, float, rates},
        verdict::{size, time},
    },
};

/// A lane's background: where something can be.
fn ground(canvas: &mut Canvas<'_>, y: f64, span: Span) {
    let (from, to) = (canvas.x(span.0), canvas.x(span.1));
    canvas.add(rectangle(from, y, to - from, LANE, "#eef0f2"));
}

/// What is said behind a lane.
fn figures(canvas: &mut Canvas<'_>, y: f64, content: String) {
    canvas.add(text(RIGHT + 8.0, y + LANE - 5.0, 10.5, INK, content));
}

fn source(canvas: &mut Canvas<'_>, side: &DeviceSide) {
    let y = canvas.y;
    if let Some(read) = side.bar("read") {
        let span = read.span;
        ground(canvas, y, span);
        let busy = canvas.columns(&clip(&side.busy, span));
        let waits = canvas.columns(&clip(&side.starved, span));
        let title = format!("reading: read over {}", time(span.1 - span.0));
        canvas.area(&busy, y + LANE, LANE, MOVES, title);
        let blocked = DeviceSide::length(&side.starved);
        let title = format!("blocked, no memory to read into: {}", time(blocked));
        canvas.area(&waits, y, -LANE, WAITS, title);
    }
    for (name, colour) in [("stop", STOPS), ("set state", "#a0a0a0")] {
        if let Some(bar) = side.bar(name) {
            canvas.bar(&bar.clone(), y, LANE, colour);
        }
    }
    if let Some(bar) = side.bar("config") {
        canvas.bar(&bar.clone(), y + LANE - 4.0, 4.0, CONFIG);
    }
    if let Some(bar) = side.bar("wire") {
        canvas.bar(&bar.clone(), y + LANE + 2.0, 4.0, WIRE);
    }
    if let Some(bar) = side.bar("first byte out").filter(|bar| !bar.open) {
        let (at, took) = (bar.span.1, bar.span.1 - bar.span.0);
        canvas.mark(
            at,
            y,
            LANE,
            format!("first byte out: {} after STOP_COPY", time(took)),
        );
    }
    let phases = &side.stats.phases;
    let blocked = time(DeviceSide::length(&side.starved));
    let content = match side.bar("read") {
        Some(read) if read.open => {
            let bytes = size(float(side.stats.bytes));
            format!("NOT DONE · {bytes} out · blocked {blocked}")
        }
        _ => format!(
            "read {} · blocked {blocked}",
            time(phases.read.as_secs_f64())
        ),
    };
    figures(canvas, y, content);
    canvas.y += LANE + 9.0;
}

/// The parts of spans that are within another.
fn clip(spans: &[Span], within: Span) -> Vec<Span> {
    let clipped = spans
        .iter()
        .map(|span| (span.0.max(within.0), span.1.min(within.1)));
    clipped.filter(|span| span.1 > span.0).collect()
}

fn destination(canvas: &mut Canvas<'_>, side: &DeviceSide) {
    let y = canvas.y;
    if let Some(write) = side.bar("write") {
        let span = write.span;
        ground(canvas, y, span);
        let busy = canvas.columns(&clip(&side.busy, span));
        let waits = canvas.columns(&clip(&side.starved, span));
        let title = format!("writing: written over {}", time(span.1 - span.0));
        canvas.area(&busy, y + LANE, LANE, MOVES, title);
        let starved = DeviceSide::length(&side.starved);
        let title = format!("starved, its next packet was missing: {}", time(starved));
        canvas.area(&waits, y, -LANE, WAITS, title);
    }
    for (name, colour) in [("config", CONFIG), ("resume", RESUMES)] {
        if let Some(bar) = side.bar(name) {
            canvas.bar(&bar.clone(), y, LANE, colour);
        }
    }
    // Between them the device waits for all others: they start together.
    let ended = ["write", "config"].map(|name| side.bar(name).map_or(0.0, |bar| bar.span.1));
    let ended = ended[0].max(ended[1]);
    if let Some(resume) = side.bar("resume").filter(|bar| bar.span.0 > ended) {
        let (from, to) = (canvas.x(ended), canvas.x(resume.span.0));
        let title = format!("waits for the others: {}", time(resume.span.0 - ended));
        let line = rectangle(from, y + LANE / 2.0 - 1.0, to - from, 2.0, IDLE);
        canvas.add(line.add(Title::new(title)));
    }
    if let Some(bar) = side.bar("first byte in").filter(|bar| !bar.open) {
        let took = bar.span.1 - bar.span.0;
        let title = format!("first byte in: {} after the switchover's start", time(took));
        canvas.mark(bar.span.1, y, LANE, title);
    }
    let starved = DeviceSide::length(&side.starved);
    let write = side.bar("write").map_or(0.0, |bar| bar.span.1 - bar.span.0);
    let content = match side.end() {
        Some(end) if side.bar("write").is_some() => format!(
            "done {} · write {} · starved {}",
            time(end),
            time((write - starved).max(0.0)),
            time(starved)
        ),
        _ => format!("NOT DONE · {} in", size(float(side.stats.bytes))),
    };
    figures(canvas, y, content);
    canvas.y += LANE + 6.0;
}

pub(super) fn device(canvas: &mut Canvas<'_>, device: &Device, is_longest: bool) {
    let lanes = |side: &DeviceSide| match side.side {
        Side::Source => LANE + 9.0,
        _ => LANE + 6.0,
    };
    let height: f64 = device.sides.iter().map(lanes).sum();
    if is_longest {
        let band = rectangle(0.0, canvas.y - 4.0, WIDTH, height + 2.0, LONGEST);
        canvas.add(band);
    }
    let name = shorten(&device.id.to_string(), 24);
    let weight = if is_longest { "bold" } else { "normal" };
    let label = text(12.0, canvas.y + 13.0, 12.0, INK, name).set("font-weight", weight);
    let title = Title::new(device.id.to_string());
    canvas.add(label.add(title));
    for side in &device.sides {
        let label = text(LEFT - 8.0, canvas.y + 13.0, 10.0, PALE, side.side.name());
        canvas.add(label.set("text-anchor", "end"));
        match side.side {
            Side::Source => source(canvas, side),
            Side::Destination => destination(canvas, side),
            Side::Relay => {
                let bytes = float(side.stats.bytes);
                let passed = format!("{} packets, {}", side.stats.packets, size(bytes));
                let y = canvas.y;
                figures(canvas, y, passed);
                canvas.y += LANE + 6.0;
            }
        }
    }
    canvas.y += 4.0;
}

pub(super) fn channel(canvas: &mut Canvas<'_>, channel: &Channel, most: f64) {
    let y = canvas.y;
    let late = canvas.model.late_channel();
    let is_late = late.is_some_and(|(number, ..)| number == channel.number);
    if is_late && channel.side == Side::Destination {
        canvas.add(rectangle(0.0, y - 3.0, WIDTH, LANE + 6.0, LONGEST));
    }
    let name = format!("channel {}", channel.number);
    canvas.add(text(12.0, y + 13.0, 12.0, INK, name));
    let label = text(LEFT - 8.0, y + 13.0, 10.0, PALE, channel.side.name());
    canvas.add(label.set("text-anchor", "end"));
    let whole = (canvas.model.begin, canvas.model.end);
    ground(canvas, y, whole);
    let rates = rates(&channel.moved, canvas.model.span(), COLUMNS);
    let parts: Vec<_> = rates.iter().map(|(_, rate)| rate / most).collect();
    let moved = float(channel.bytes);
    canvas.area(
        &parts,
        y + LANE,
        LANE,
        MOVES,
        format!("throughput; {} in all", size(moved)),
    );
    let waits = canvas.columns(&channel.blocked);
    // A source's channel that has nothing to send holds nobody up.
    let (short, what, colour) = match channel.side {
        Side::Source => ("idle", "idle, no packet to send", IDLE),
        _ => ("blocked", "blocked, no memory for the next packet", WAITS),
    };
    let title = format!("{what}: {}", time(channel.blocked_seconds));
    canvas.area(&waits, y, -LANE / 2.0, colour, title);
    let last = match channel.last {
        Some(at) if at > canvas.model.begin => {
            let title = format!("its last packet, at {}", time(at.max(0.0)));
            canvas.mark(at, y, LANE, title);
            format!("last packet {} · ", time(at.max(0.0)))
        }
        _ => String::new(),
    };
    let content = format!(
        "{last}{} · {short} {}",
        size(moved),
        time(channel.blocked_seconds)
    );
    figures(canvas, y, content);
    canvas.y += LANE + 6.0;
}

/// A name that is not longer than so many characters: its end tells it from others.
fn shorten(name: &str, most: usize) -> String {
    let count = name.chars().count();
    if count <= most {
        return name.to_owned();
    }
    let end: String = name.chars().skip(count - most + 1).collect();
    format!("…{end}")
}
