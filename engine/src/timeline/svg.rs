//! A timeline as a chart.
//!
//! ```text
//!   what it was, which device was the longest, why
//!   device      ▐stop▐set▐  reading, blocked   ▐                     its source
//!               ▐ writing, starved    ▐config▐resume▐  done          its destination
//!   channel 0   ▐ blocked over throughput      ▐
//!   throughput, memory held, spilled: curves on the same axis
//!   0 ───────── 50 ms ───────── 100 ms ──▶
//! ```
//!
//! A lane has what moved below, from its bottom up, and what waited above, from its top down: each as the part
//! of the time that it took. All that has to be known is written out; what a pointer rests on says more.
//!
//! The picture is as large however long the migration was: time is cut into [`COLUMNS`], and no more than
//! [`DEVICES`] devices and as many channels are drawn, those that were done last.

mod canvas;
mod lanes;

use svg::{
    Document,
    node::element::{Group, Line, Rectangle, Title},
};

use self::{
    canvas::{
        COLUMNS, CONFIG, CURVE, Canvas, DEVICES, IDLE, INK, LEFT, MOVES, PALE, RESUMES, RIGHT,
        SPILLS, STOPS, WAITS, WIDTH, WIRE, number, rectangle, round, text,
    },
    lanes::{channel, device},
};
use super::{
    model::{Channel, Curve, Device, Model, float, rates},
    verdict::{self, rate, size},
};

/// A curve's value in each column: the highest there, or the next where there is none.
fn sampled(canvas: &Canvas<'_>, curve: &Curve) -> Vec<f64> {
    let Model { begin, end, .. } = canvas.model;
    let width = (end - begin) / f64::from(COLUMNS);
    let mut next = 0;
    let value = |column| {
        let to = begin + f64::from(column + 1) * width;
        let from = to - width;
        while curve.get(next).is_some_and(|(at, _)| *at < from) {
            next += 1;
        }
        let within = curve[next.min(curve.len())..].iter();
        let within = within
            .take_while(|(at, _)| *at < to)
            .map(|(_, value)| *value);
        let highest = within.reduce(f64::max);
        highest.unwrap_or_else(|| curve.get(next).map_or(0.0, |(_, value)| *value))
    };
    (0..COLUMNS).map(value).collect()
}

/// A curve below a name, with its highest value written out.
fn curves(
    canvas: &mut Canvas<'_>,
    name: &str,
    said: &str,
    all: &[(&'static str, Vec<f64>)],
    show: fn(f64) -> String,
) {
    let most = all.iter().flat_map(|(_, values)| values.iter().copied());
    let most = most.fold(0.0, f64::max);
    let y = canvas.y;
    canvas.add(text(12.0, y + 13.0, 12.0, INK, name));
    canvas.add(text(12.0, y + 28.0, 10.0, PALE, said));
    let ground = rectangle(LEFT, y, RIGHT - LEFT, CURVE, "#f6f7f8");
    canvas.add(ground);
    if most > 0.0 {
        for (colour, values) in all {
            let parts: Vec<_> = values.iter().map(|value| value / most).collect();
            canvas.area(&parts, y + CURVE, CURVE, colour, format!("{name}: {said}"));
        }
    }
    let content = format!("at most {}", show(most));
    canvas.add(text(RIGHT + 8.0, y + 12.0, 11.0, INK, content));
    canvas.y += CURVE + 10.0;
}

/// Lines no longer than so many characters, broken at spaces.
fn wrap(line: &str, most: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in line.split(' ') {
        let last = lines.last_mut().expect("there is one");
        if !last.is_empty() && last.chars().count() + word.chars().count() >= most {
            lines.push(word.to_owned());
        } else {
            if !last.is_empty() {
                last.push(' ');
            }
            last.push_str(word);
        }
    }
    lines
}

fn axis(canvas: &mut Canvas<'_>, top: f64) {
    let Model { begin, end, .. } = *canvas.model;
    // 1, 2 or 5 times a power of ten: six marks or so.
    let raw = (end - begin) / 6.0;
    let power = 10_f64.powf(raw.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|times| times * power);
    let step = steps.into_iter().find(|step| *step >= raw).unwrap_or(raw);
    let bottom = canvas.y;
    let mut at = (begin / step).ceil() * step;
    while at <= end {
        let x = round(canvas.x(at));
        let line = Line::new()
            .set("x1", x)
            .set("x2", x)
            .set("y1", round(top))
            .set("y2", round(bottom))
            .set(
                "stroke",
                if at.abs() < step / 1e3 {
                    INK
                } else {
                    "#c8ccd0"
                },
            )
            .set(
                "stroke-width",
                if at.abs() < step / 1e3 { 1.0 } else { 0.5 },
            );
        canvas.add(line);
        let label = match at {
            _ if at.abs() < step / 1e3 => "VM stops".to_owned(),
            ..0.0 => format!("-{}", mark(-at, step)),
            _ => mark(at, step),
        };
        let label = text(x, bottom + 14.0, 11.0, INK, label);
        canvas.add(label.set("text-anchor", "middle"));
        at += step;
    }
    canvas.y += 22.0;
}

/// A mark's time, with no more digits than it has.
fn mark(at: f64, step: f64) -> String {
    match step {
        ..0.001 => format!("{:.0} us", at * 1e6),
        ..0.2 => format!("{:.0} ms", at * 1e3),
        ..1.0 => format!("{at:.1} s"),
        _ => format!("{at:.0} s"),
    }
}

fn legend(canvas: &mut Canvas<'_>) {
    let mut x = 12.0;
    for (colour, label) in [
        (MOVES, "reading, writing, carrying"),
        (WAITS, "starved, blocked (from the top)"),
        (IDLE, "idle"),
        (STOPS, "stop, set state"),
        (WIRE, "on the wire"),
        (CONFIG, "config"),
        (RESUMES, "resume"),
        (SPILLS, "spilled"),
        (INK, "| first byte, last packet"),
    ] {
        canvas.add(rectangle(x, canvas.y - 9.0, 10.0, 10.0, colour));
        canvas.add(text(x + 14.0, canvas.y, 11.0, INK, label));
        x += 32.0 + 6.0 * number(label.len());
    }
    canvas.y += 20.0;
}

/// Those that were done last, in their order, and how many there are besides.
fn shown<T>(all: &[T], end: impl Fn(&T) -> f64) -> (Vec<&T>, usize) {
    let mut order: Vec<_> = (0..all.len()).collect();
    order.sort_by(|a, b| end(&all[*b]).total_cmp(&end(&all[*a])));
    order.truncate(DEVICES);
    order.sort_unstable();
    let hidden = all.len() - order.len();
    (order.into_iter().map(|at| &all[at]).collect(), hidden)
}

fn hidden(canvas: &mut Canvas<'_>, count: usize, what: &str) {
    if count > 0 {
        let line = format!("and {count} more {what}, which were done sooner");
        canvas.add(text(12.0, canvas.y + 10.0, 11.0, PALE, line));
        canvas.y += 20.0;
    }
}

/// Draws all of it.
pub(super) fn draw(model: &Model) -> String {
    let mut canvas = Canvas {
        model,
        all: Group::new(),
        y: 30.0,
    };
    let lines = verdict::lines(model);
    for (at, line) in lines.iter().enumerate() {
        let (size, colour) = match at {
            0 if model.failure.is_some() => (19.0, "#b00020"),
            0 => (19.0, INK),
            _ => (13.5, INK),
        };
        for line in wrap(line, 165) {
            canvas.add(text(12.0, canvas.y, size, colour, line));
            canvas.y += 21.0;
        }
    }
    if model.before > 0 {
        let before = size(float(model.before));
        let line = format!("{before} had been sent before the VM stopped.");
        canvas.add(text(12.0, canvas.y, 13.5, INK, line));
        canvas.y += 21.0;
    }
    canvas.y += 4.0;
    legend(&mut canvas);
    let top = canvas.y - 6.0;
    canvas.y += 4.0;
    let longest = model.longest().map(|it| it.id.clone());
    let mark_it = model.devices.len() > 1 && model.failure.is_none();
    let end = |device: &Device| device.end().unwrap_or(f64::INFINITY);
    let (devices, more) = shown(&model.devices, end);
    for it in devices {
        device(&mut canvas, it, mark_it && longest.as_ref() == Some(&it.id));
    }
    hidden(&mut canvas, more, "devices");
    let span = model.span();
    let most = model
        .channels
        .iter()
        .flat_map(|it| rates(&it.moved, span, COLUMNS));
    let most = most.map(|(_, rate)| rate).fold(1.0, f64::max);
    let last = |channel: &Channel| channel.last.unwrap_or(f64::INFINITY);
    let (channels, more) = shown(&model.channels, last);
    for it in channels {
        channel(&mut canvas, it, most);
    }
    hidden(&mut canvas, more, "channels");
    canvas.y += 4.0;
    for session in &model.sessions {
        let side = session.side.name();
        let values = rates(&session.moved, span, COLUMNS).into_iter();
        let values = values.map(|(_, rate)| rate).collect();
        let name = format!("throughput, {side}");
        curves(
            &mut canvas,
            &name,
            "of all channels",
            &[(MOVES, values)],
            rate,
        );
    }
    for session in &model.sessions {
        let side = session.side.name();
        let (held, spilled) = (
            sampled(&canvas, &session.held),
            sampled(&canvas, &session.spilled),
        );
        let budget = size(float(session.stats.budget));
        let said = format!("of a budget of {budget}");
        let all = [("#b3c7d6", held), (SPILLS, spilled)];
        curves(
            &mut canvas,
            &format!("memory held, {side}"),
            &said,
            &all,
            size,
        );
    }
    if let Some((at, why)) = &model.failure {
        let x = round(canvas.x(*at));
        let line = Line::new()
            .set("x1", x)
            .set("x2", x)
            .set("y1", round(top))
            .set("y2", round(canvas.y))
            .set("stroke", "#b00020")
            .set("stroke-width", 2);
        canvas.add(line.add(Title::new(why.clone())));
    }
    axis(&mut canvas, top);
    let height = round(canvas.y + 6.0);
    let ground = Rectangle::new()
        .set("width", "100%")
        .set("height", "100%")
        .set("fill", "white");
    Document::new()
        .set("viewBox", (0, 0, WIDTH, height))
        .set("width", WIDTH)
        .set("height", height)
        .set("font-family", "sans-serif")
        .add(Title::new(lines.join(" ")))
        .add(ground)
        .add(canvas.all)
        .to_string()
}
