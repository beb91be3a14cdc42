//! A timeline as trace events: the JSON format that Perfetto and `chrome://tracing` open.
//!
//! | in the format | is |
//! |---|---|
//! | process | a side |
//! | thread | a device's phases, its wire, its data fd's waits, its transfers; a channel |
//! | complete event | a phase, a wait, transfers |
//! | instant event | the first byte, a failure |
//! | counter | throughput, memory held, spilled |
//!
//! Times are in microseconds from the first sample or phase on.

use serde_json::{Value, json};

use super::{
    model::{Model, Span, rates},
    verdict,
};
use crate::stats::Side;

struct Events {
    all: Vec<Value>,
    zero: f64,
}

impl Events {
    fn at(&self, seconds: f64) -> f64 {
        ((seconds - self.zero) * 1e9).round() / 1e3
    }

    fn process(&mut self, side: Side) {
        self.all.push(json!({
            "ph": "M", "name": "process_name", "pid": pid(side), "args": { "name": side.name() },
        }));
    }

    fn thread(&mut self, side: Side, number: usize, name: &str) {
        let at = (pid(side), number);
        self.all.push(json!({
            "ph": "M", "name": "thread_name", "pid": at.0, "tid": at.1, "args": { "name": name },
        }));
        self.all.push(json!({
            "ph": "M", "name": "thread_sort_index", "pid": at.0, "tid": at.1,
            "args": { "sort_index": number },
        }));
    }

    fn complete(&mut self, side: Side, thread: usize, name: &str, span: Span, args: &Value) {
        let (from, to) = (self.at(span.0), self.at(span.1));
        self.all.push(json!({
            "ph": "X", "cat": "vfio-migration", "name": name, "pid": pid(side), "tid": thread,
            "ts": from, "dur": (to - from).max(0.0), "args": args,
        }));
    }

    fn instant(&mut self, side: Side, thread: usize, name: &str, at: f64) {
        self.all.push(json!({
            "ph": "i", "s": "t", "cat": "vfio-migration", "name": name, "pid": pid(side),
            "tid": thread, "ts": self.at(at),
        }));
    }

    fn counter(&mut self, side: Side, name: &str, at: f64, value: f64) {
        self.all.push(json!({
            "ph": "C", "name": name, "pid": pid(side), "ts": self.at(at),
            "args": { name: value.round() },
        }));
    }
}

const fn pid(side: Side) -> u32 {
    match side {
        Side::Source => 1,
        Side::Relay => 2,
        Side::Destination => 3,
    }
}

/// Writes all of it.
pub(super) fn write(model: &Model) -> String {
    let bars = model.devices.iter().flat_map(|device| &device.sides);
    let bars = bars.flat_map(|side| &side.bars).map(|bar| bar.span.0);
    let sampled = model.sessions.iter().filter_map(|it| it.held.first());
    let firsts = bars.chain(sampled.map(|(at, _)| *at));
    let mut events = Events {
        all: Vec::new(),
        zero: firsts.fold(0.0, f64::min),
    };
    for session in &model.sessions {
        events.process(session.side);
    }
    // A number for each line, which is its place too.
    let mut thread = 1;
    for device in &model.devices {
        for side in &device.sides {
            let id = &device.id;
            for (number, what) in ["phases", "wire", "waits", "transfers"]
                .into_iter()
                .enumerate()
            {
                events.thread(side.side, thread + number, &format!("{id} {what}"));
            }
            for bar in &side.bars {
                let line = match bar.name {
                    "wire" => thread + 1,
                    // What waits and transfers are, taken together.
                    "read" | "write" => continue,
                    "first byte out" | "first byte in" => {
                        events.instant(side.side, thread, bar.name, bar.span.1);
                        continue;
                    }
                    _ => thread,
                };
                let args = json!({ "unfinished": bar.open });
                events.complete(side.side, line, bar.name, bar.span, &args);
            }
            let (waits, moves) = match side.side {
                Side::Source => ("blocked", "reading"),
                _ => ("starved", "writing"),
            };
            // Within a sample's time their order is not known: on one line they would overlap.
            for (line, name, spans) in [(2, waits, &side.starved), (3, moves, &side.busy)] {
                for span in spans {
                    events.complete(side.side, thread + line, name, *span, &json!({}));
                }
            }
            thread += 4;
        }
    }
    for channel in &model.channels {
        let name = format!("channel {}", channel.number);
        events.thread(channel.side, thread, &name);
        for span in &channel.blocked {
            events.complete(channel.side, thread, "blocked", *span, &json!({}));
        }
        if let Some(last) = channel.last {
            events.instant(channel.side, thread, "last packet", last);
        }
        thread += 1;
    }
    for session in &model.sessions {
        for (name, curve) in [
            (
                "bytes per second",
                rates(&session.moved, (events.zero, model.end), 400),
            ),
            ("bytes held", session.held.clone()),
            ("bytes spilled", session.spilled.clone()),
        ] {
            for (at, value) in curve {
                events.counter(session.side, name, at, value);
            }
        }
    }
    if let (Some((at, why)), Some(session)) = (&model.failure, model.sessions.first()) {
        let ts = events.at(*at);
        events.all.push(json!({
            "ph": "i", "s": "g", "cat": "vfio-migration", "name": format!("failed: {why}"),
            "pid": pid(session.side), "tid": 0, "ts": ts,
        }));
    }
    let trace = json!({
        "displayTimeUnit": "ms",
        "otherData": { "summary": verdict::lines(model).join(" ") },
        "traceEvents": events.all,
    });
    format!("{trace}\n")
}
