//! What the commands print for people: lines, and tables. `json` has what they print for programs.
//!
//! ```text
//!   rows of text ──▶ table() ──▶ columns ──▶ print() ──▶ stdout
//!                       a line  ──▶ say()   ──▶ stderr
//! ```
//!
//! Called from the command's main thread.

use std::{
    fmt,
    io::{self, Write},
    time::Duration,
};

use vfio_migration::text::{self, Printable};

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
