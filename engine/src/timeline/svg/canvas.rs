//! The paper of a chart: time across, drawing down, and what it is drawn with.

use svg::node::element::{Group, Line, Path, Rectangle, Text, Title, path::Data};

use crate::timeline::{
    model::{Bar, Model, Span},
    verdict::time,
};

/// How finely time is cut.
pub(super) const COLUMNS: u32 = 400;
/// The most devices that are drawn, and the most channels.
pub(super) const DEVICES: usize = 24;

pub(super) const WIDTH: f64 = 1200.0;
/// Where the axis begins and ends.
pub(super) const LEFT: f64 = 230.0;
pub(super) const RIGHT: f64 = 890.0;
pub(super) const LANE: f64 = 18.0;
pub(super) const CURVE: f64 = 56.0;

pub(super) const MOVES: &str = "#0072b2";
pub(super) const WAITS: &str = "#d55e00";
pub(super) const STOPS: &str = "#7f7f7f";
pub(super) const CONFIG: &str = "#cc79a7";
pub(super) const RESUMES: &str = "#009e73";
pub(super) const WIRE: &str = "#56b4e9";
pub(super) const SPILLS: &str = "#e69f00";
pub(super) const IDLE: &str = "#c4c4c4";
pub(super) const LONGEST: &str = "#fff3c4";
pub(super) const INK: &str = "#222222";
pub(super) const PALE: &str = "#6a6a6a";

/// A coordinate, as fine as a screen is.
pub(super) fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

#[expect(clippy::cast_precision_loss, reason = "a small number")]
pub(super) const fn number(value: usize) -> f64 {
    value as f64
}

/// Time across, drawing down.
pub(super) struct Canvas<'a> {
    pub(super) model: &'a Model,
    pub(super) all: Group,
    /// How far down it is.
    pub(super) y: f64,
}

/// A text, at its line's foot.
pub(super) fn text(x: f64, y: f64, size: f64, colour: &str, content: impl Into<String>) -> Text {
    Text::new(content)
        .set("x", round(x))
        .set("y", round(y))
        .set("font-size", size)
        .set("fill", colour)
}

pub(super) fn rectangle(x: f64, y: f64, width: f64, height: f64, colour: &str) -> Rectangle {
    Rectangle::new()
        .set("x", round(x))
        .set("y", round(y))
        .set("width", round(width.max(0.0)))
        .set("height", round(height))
        .set("fill", colour)
}

impl Canvas<'_> {
    pub(super) fn x(&self, seconds: f64) -> f64 {
        let Model { begin, end, .. } = self.model;
        let part = (seconds - begin) / (end - begin);
        LEFT + part.clamp(0.0, 1.0) * (RIGHT - LEFT)
    }

    pub(super) fn add(&mut self, node: impl Into<Box<dyn svg::Node>>) {
        self.all = std::mem::take(&mut self.all).add(node);
    }

    /// Which part of each column spans fill.
    pub(super) fn columns(&self, spans: &[Span]) -> Vec<f64> {
        let Model { begin, end, .. } = self.model;
        let width = (end - begin) / f64::from(COLUMNS);
        let mut parts = vec![0.0; COLUMNS as usize];
        let mut first = 0;
        for (column, part) in parts.iter_mut().enumerate() {
            let (from, to) = (
                begin + number(column) * width,
                begin + number(column + 1) * width,
            );
            while spans.get(first).is_some_and(|span| span.1 <= from) {
                first += 1;
            }
            let overlap = |span: &Span| (span.1.min(to) - span.0.max(from)).max(0.0);
            let within = spans[first..].iter().take_while(|span| span.0 < to);
            *part = within.map(overlap).sum::<f64>() / width;
        }
        parts
    }

    /// An area over all columns, from a line up, or down where `height` is negative.
    pub(super) fn area(
        &mut self,
        parts: &[f64],
        line: f64,
        height: f64,
        colour: &str,
        title: String,
    ) {
        let step = (RIGHT - LEFT) / f64::from(COLUMNS);
        let mut data = Data::new().move_to((LEFT, round(line)));
        let mut before = 0.0;
        for (column, part) in parts.iter().enumerate() {
            let part = (part.min(1.0) * 50.0).round() / 50.0;
            if f64::abs(part - before) > 1e-9 {
                let x = round(LEFT + number(column) * step);
                data = data.horizontal_line_to(x);
                data = data.vertical_line_to(round(line - part * height));
                before = part;
            }
        }
        let data = data
            .horizontal_line_to(RIGHT)
            .vertical_line_to(round(line))
            .close();
        let path = Path::new().set("d", data).set("fill", colour);
        self.add(path.add(Title::new(title)));
    }

    pub(super) fn bar(&mut self, bar: &Bar, y: f64, height: f64, colour: &str) {
        let (from, to) = (self.x(bar.span.0), self.x(bar.span.1));
        // A phase that is shorter than a pixel is there all the same.
        let mut shape = rectangle(from, y, (to - from).max(1.5), height, colour);
        let took = time(bar.span.1 - bar.span.0);
        let state = if bar.open { ", not ended" } else { "" };
        if bar.open {
            shape = shape.set("fill-opacity", 0.35);
        }
        let title = format!(
            "{}: {took}{state}, from {}",
            bar.name,
            time(bar.span.0.max(0.0))
        );
        self.add(shape.add(Title::new(title)));
        let label = format!("{} {took}", bar.name);
        if height >= 12.0 && to - from > 6.5 * number(label.len()) {
            self.add(text(from + 4.0, y + height - 5.0, 11.0, "white", label));
        }
    }

    pub(super) fn mark(&mut self, at: f64, y: f64, height: f64, title: String) {
        let x = round(self.x(at));
        let line = Line::new()
            .set("x1", x)
            .set("x2", x)
            .set("y1", round(y - 2.0))
            .set("y2", round(y + height + 2.0))
            .set("stroke", INK)
            .set("stroke-width", 1.5);
        self.add(line.add(Title::new(title)));
    }
}
