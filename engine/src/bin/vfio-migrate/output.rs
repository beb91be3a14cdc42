//! What the commands print: tables for people, JSON for programs.
//!
//! ```text
//!   Moved, a device's part of send, receive, replay ──▶ a few lines, or an object
//!   rows of text ──▶ table() ──▶ columns
//! ```
//!
//! Called from the command's main thread.

use std::{
    fmt,
    io::{self, Write},
    sync::atomic::{
        AtomicU8,
        Ordering::{AcqRel, Acquire},
    },
    time::Duration,
};

use serde::Serialize;
use vfio_migration::{
    Phases,
    text::{self, Printable},
};

use crate::{args::show, is_closed_pipe, stderr};

/// stdout could not be written to.
#[derive(Debug)]
pub(crate) struct Stdout(pub(crate) io::Error);

impl fmt::Display for Stdout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("cannot write the output")
    }
}

impl std::error::Error for Stdout {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}

/// Prints a text, whole lines.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let lines = text.split('\n').map(|line| Printable(line).to_string());
    let text: Vec<_> = lines.collect();
    print_raw(&text.join("\n"))
}

/// As [`print`], what nobody has to look through.
pub(crate) fn print_raw(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(Stdout)?;
    Ok(())
}

/// A text on one line, without what would steer a terminal.
pub(crate) fn one_line(text: &str) -> String {
    text.replace(|char| !text::is_printable(char), " ")
}

/// Says something on stderr: one line, whatever a peer's bytes or a path may hold, and in one piece,
/// for two processes often share a terminal.
pub(crate) fn say(text: &str) {
    stderr::say(line(text));
}

/// As [`say`], of a connection that anybody may make: a few lines, and how many more there were.
pub(crate) fn say_of_stranger(text: &str) {
    stderr::say_of_stranger(line(text));
}

fn line(text: &str) -> String {
    format!("vfio-migrate: {}\n", one_line(text))
}

/// Says that the output could not be printed, where that changes nothing.
pub(crate) fn warn(done: &str, printed: anyhow::Result<()>) {
    if let Err(error) = printed
        && !is_closed_pipe(&error)
    {
        say(&format!("warning: {done}, but {error:#}"));
    }
}

/// Nobody wants JSON.
const OFF: u8 = 0;
/// An object is wanted.
const WANTED: u8 = 1;
/// And is there, or on its way.
const TAKEN: u8 = 2;

/// Whether an object is still to be printed. Whoever takes it prints.
static OBJECT: AtomicU8 = AtomicU8::new(OFF);

/// From now on one JSON object is to be printed, whatever happens.
pub(crate) fn want_json() {
    let _off = OBJECT.compare_exchange(OFF, WANTED, AcqRel, Acquire);
}

/// Whether the object is the caller's to print. Nobody else will.
pub(crate) fn take_object() -> bool {
    let taken = OBJECT.compare_exchange(WANTED, TAKEN, AcqRel, Acquire);
    taken.is_ok()
}

/// Prints the one JSON object of a command, unless that has been printed.
pub(crate) fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let text = json_text(value)?;
    if take_object() {
        print_raw(&text)?;
    }
    Ok(())
}

/// A value as lines of JSON.
pub(crate) fn json_text(value: &impl Serialize) -> anyhow::Result<String> {
    let mut text = escape_json(&serde_json::to_string_pretty(value)?);
    text.push('\n');
    Ok(text)
}

/// JSON that says the same, and steers no terminal.
fn escape_json(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for char in json.chars() {
        if char == '\n' || text::is_printable(char) {
            text.push(char);
        } else {
            // It stands within a string: all that stands outside is ASCII.
            let mut units = [0; 2];
            for unit in char.encode_utf16(&mut units) {
                text.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    text
}

/// Aligns rows under their header: the first column to the left, all others to the right.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let cells = |row: &[String]| row.iter().map(|cell| cell.chars().count()).collect();
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        let lens: Vec<usize> = cells(row);
        for (width, len) in widths.iter_mut().zip(lens) {
            *width = len.max(*width);
        }
    }
    let header: Vec<String> = header.iter().map(|cell| (*cell).to_owned()).collect();
    let mut text = String::new();
    for row in std::iter::once(&header).chain(rows) {
        let mut line = String::new();
        for (at, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let cell = if at == 0 {
                format!("{cell:width$}")
            } else {
                format!("  {cell:>width$}")
            };
            line.push_str(&cell);
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A time for people.
pub(crate) fn time(time: Duration) -> String {
    match time.as_micros() {
        0..1_000 => format!("{} us", time.as_micros()),
        1_000..1_000_000 => format!("{:.1} ms", time.as_secs_f64() * 1e3),
        _ => format!("{:.2} s", time.as_secs_f64()),
    }
}

/// GB/s, of 10^9 bytes.
#[expect(clippy::cast_precision_loss, reason = "for people")]
pub(crate) fn rate(bytes: u64, time: Duration) -> f64 {
    if time.is_zero() {
        0.0
    } else {
        bytes as f64 / time.as_secs_f64() / 1e9
    }
}

/// A line that says what was spilled, if anything was.
pub(crate) fn spilled(bytes: u64) -> String {
    match bytes {
        0 => String::new(),
        _ => format!("{} were spilled, and read back\n", show(bytes)),
    }
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Where a device's share of the downtime went, in seconds; see `vfio_migration::Phases`.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Downtime {
    stop: f64,
    set_state: f64,
    first_out: f64,
    read: f64,
    wire: f64,
    first_in: f64,
    wait: f64,
    write: f64,
    config: f64,
    resume: f64,
    #[serde(skip)]
    phases: Phases,
}

impl From<Phases> for Downtime {
    fn from(phases: Phases) -> Self {
        Self {
            stop: phases.stop.as_secs_f64(),
            set_state: phases.set_state.as_secs_f64(),
            first_out: phases.first_out.as_secs_f64(),
            read: phases.read.as_secs_f64(),
            wire: phases.wire.as_secs_f64(),
            first_in: phases.first_in.as_secs_f64(),
            wait: phases.wait.as_secs_f64(),
            write: phases.write.as_secs_f64(),
            config: phases.config.as_secs_f64(),
            resume: phases.resume.as_secs_f64(),
            phases,
        }
    }
}

impl Downtime {
    /// The phases that took any time, for people.
    pub(crate) fn text(&self) -> String {
        let named = self.phases.named();
        let took = named.iter().filter(|(_, phase)| !phase.is_zero());
        let all: Vec<_> = took
            .map(|(name, phase)| format!("{name} {}", time(*phase)))
            .collect();
        all.join(", ")
    }
}

/// What moved of one device.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Moved {
    pub(crate) idstr: String,
    pub(crate) instance: u32,
    /// The config packet included.
    pub(crate) packets: u64,
    pub(crate) state_bytes: u64,
    /// Of a device of the kernel's nobody but its driver sees the state.
    pub(crate) state_sha256: Option<String>,
    /// The config packet's data: framing tags included.
    pub(crate) config_bytes: u64,
    pub(crate) config_sha256: String,
    /// The file that the state was written to, where `replay --out` has chosen it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) state_file: Option<String>,
}

impl Moved {
    /// A paragraph for people.
    pub(crate) fn text(&self) -> String {
        let Self {
            idstr,
            instance,
            packets,
            state_bytes,
            config_bytes,
            ..
        } = self;
        let mut text = format!(
            "{idstr:?}, instance {instance}: {packets} packets\n  \
             state   {:>12} bytes  sha256 {}\n  \
             config  {:>12} bytes  sha256 {}\n",
            state_bytes,
            self.state_sha256.as_deref().unwrap_or("(not known)"),
            config_bytes,
            self.config_sha256
        );
        if let Some(file) = &self.state_file {
            text.push_str(&format!("  in      {file:?}\n"));
        }
        text
    }
}

/// A peer's whole transfer.
#[derive(Debug, Serialize)]
pub(crate) struct Transfer {
    /// `send`, `receive`, `save` or `restore`.
    pub(crate) role: &'static str,
    pub(crate) devices: Vec<Moved>,
    /// On this side, in the devices' order.
    pub(crate) downtime: Vec<Downtime>,
    pub(crate) channels: usize,
    pub(crate) backend: &'static str,
    /// From the switchover's start to the last device's end.
    pub(crate) seconds: f64,
    /// 10^9 bytes of state in a second.
    pub(crate) gb_per_second: f64,
    /// The state that was read and sent while the devices still ran: the source knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) precopy_bytes: Option<u64>,
    /// What went to a file on its way, of what was received.
    pub(crate) spilled_bytes: u64,
}

impl Transfer {
    /// Prints it where the migration has passed, on both sides: what fails now is said, and no status.
    pub(crate) fn tell(&self, json: bool) {
        warn("all is loaded", self.print(json));
    }

    fn print(&self, json: bool) -> anyhow::Result<()> {
        if json {
            return print_json(self);
        }
        print(&self.text())
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for (device, downtime) in self.devices.iter().zip(&self.downtime) {
            text.push_str(&device.text());
            text.push_str(&format!("  phases  {}\n", downtime.text()));
        }
        let bytes: u64 = self.devices.iter().map(|device| device.state_bytes).sum();
        text.push_str(&format!(
            "{}: {} devices, {}, {:.2} s, {:.2} GB/s, {} channels, backend {}\n",
            match self.role {
                "send" => "sent",
                "save" => "saved",
                "restore" => "restored",
                _ => "received",
            },
            self.devices.len(),
            show(bytes),
            self.seconds,
            self.gb_per_second,
            self.channels,
            self.backend,
        ));
        if let Some(bytes @ 1..) = self.precopy_bytes {
            text.push_str(&format!("{} of it went before they stopped\n", show(bytes)));
        }
        text.push_str(&spilled(self.spilled_bytes));
        text
    }
}

/// A save or a restore, and its file.
#[derive(Debug, Serialize)]
pub(crate) struct Kept {
    #[serde(flatten)]
    pub(crate) transfer: Transfer,
    pub(crate) file: String,
    pub(crate) file_bytes: u64,
    /// Of the whole file but its last packet, which says it.
    pub(crate) file_sha256: String,
}

impl Kept {
    /// Prints it where all has passed: what fails now is said, and no status.
    pub(crate) fn tell(&self, json: bool) {
        let printed = if json {
            print_json(self)
        } else {
            let mut text = self.transfer.text();
            text.push_str(&format!(
                "{:?}: {} bytes, sha256 {}\n",
                self.file, self.file_bytes, self.file_sha256
            ));
            print(&text)
        };
        warn("all is done", printed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = [["long name", "1"], ["b", "1000"]];
        let rows = rows.map(|row| row.map(String::from).to_vec());
        assert_eq!(
            table(&["a", "n"], &rows),
            "a             n\nlong name     1\nb          1000\n"
        );
    }

    #[test]
    fn times_have_a_unit() {
        assert_eq!(time(Duration::from_micros(999)), "999 us");
        assert_eq!(time(Duration::from_millis(12)), "12.0 ms");
        assert_eq!(time(Duration::from_secs(3)), "3.00 s");
    }
}
