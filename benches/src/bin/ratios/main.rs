//! The report: every figure beside its goal, and beside how far it could go.
//!
//! ```text
//!   suite ── contenders in turn, round by round ──▶ one value for each round ──▶ median, min, max
//! ```
//!
//! | module | measures |
//! |---|---|
//! | `load` | one device: from memory, from TCP |
//! | `devices` | 64 devices; the two backends |
//! | `save` | saves |
//! | `switchover` | what a switchover costs beside its bytes |
//! | `slow` | devices whose writes sleep |
//! | `versus` | QEMU itself, in a guest: rounds that were measured before (`.ci/guest/versus`) |
//! | `events` | wake-ups, cancellations, bursts |
//! | `memory` | whole migrations between two processes; page faults, memory |
//!
//! Beside it, `--scale`: what grows (`scale`, `chart`), and a model of other machines (`model`).
//!
//! Contenders that several rows share run once for all of them. It exits 0 whatever the figures. *Limit* is the
//! least work that anyone must do, by a yardstick that shares no more than it must, over the same yardstick as the
//! row, in the same rounds.

use std::{io, path::PathBuf, process::ExitCode};

use clap::Parser;
use serde_json::json;
use vfio_migration_benches::{
    child,
    engine::{self, WriterArgument as Writer},
    kept,
    measure::{Goal, Short},
    scale as growth,
};

mod chart;
mod devices;
mod events;
mod load;
mod memory;
mod model;
mod save;
mod scale;
mod slow;
mod suite;
mod switchover;
mod versus;

use suite::{Found, Run, Suite, summary};

/// Every suite, in the order of the report.
fn suites() -> impl Iterator<Item = &'static Suite> {
    [
        load::SUITES,
        devices::SUITES,
        save::SUITES,
        switchover::SUITES,
        slow::SUITES,
        versus::SUITES,
        memory::SUITES,
        events::SUITES,
    ]
    .into_iter()
    .flatten()
}

/// Prints every figure beside its goal and its limit.
#[derive(Debug, Parser)]
struct Arguments {
    /// The figures to print, or parts of their names; all unless given.
    names: Vec<String>,
    /// Prints a JSON array of {name, median, min, max, goal, met, limit}.
    #[arg(long)]
    json: bool,
    /// Prints the table of docs/performance.md.
    #[arg(long, conflicts_with = "json")]
    markdown: bool,
    /// Rounds for each figure.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Few rounds of little work: shows that it runs, and measures nothing.
    #[arg(long)]
    quick: bool,
    /// Prints each contender's own rate too.
    #[arg(long)]
    verbose: bool,
    /// Which thread writes to a device: the default unless given.
    #[arg(long, value_enum)]
    writer: Option<Writer>,
    /// Rounds that `.ci/guest/versus` has measured.
    #[arg(long, value_name = "FILE")]
    beside: Option<PathBuf>,
    /// Measures instead what grows with devices, channels, packets and state: a few minutes.
    #[arg(long, conflicts_with_all = ["names", "json", "markdown"])]
    scale: bool,
    /// Where --scale writes scale.json and scale.svg.
    #[arg(long, default_value = "target", requires = "scale")]
    out: PathBuf,
    #[arg(long, hide = true)]
    child: Option<String>,
}

impl Arguments {
    fn wants(&self, name: &str) -> bool {
        self.names.is_empty() || self.names.iter().any(|part| name.contains(part.as_str()))
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(writer) = arguments.writer {
        engine::write_by(writer.into());
    }
    let result = match arguments.child.as_deref() {
        Some(kept::ROLE) => kept::run(),
        Some(growth::ROLE) => growth::run(),
        Some(role) => role.parse().and_then(child::run),
        None if arguments.scale => scale::run(&arguments.out, arguments.quick),
        None => report(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ratios: {error}");
            ExitCode::FAILURE
        }
    }
}

/// One line of the report.
struct Line {
    name: &'static str,
    goal: Goal,
    /// Median, least, greatest.
    value: (f64, f64, f64),
    limit: Option<f64>,
}

impl Line {
    fn is_met(&self) -> Option<bool> {
        (self.goal != Goal::Open).then(|| self.goal.is_met(self.value.0))
    }

    /// The verdict and the limit, where there are any.
    fn verdict(&self) -> (&'static str, String) {
        let verdict = match self.is_met() {
            None => "",
            Some(true) => "met",
            Some(false) => "missed",
        };
        let limit = self.limit.map(|limit| Short(limit).to_string());
        (verdict, limit.unwrap_or_default())
    }
}

fn report(arguments: &Arguments) -> io::Result<()> {
    let run = Run {
        rounds: if arguments.quick { 2 } else { arguments.rounds },
        quick: arguments.quick,
        verbose: arguments.verbose,
        beside: arguments.beside.clone(),
    };
    let mut lines = Vec::new();
    for suite in suites() {
        let wanted = |name: &str| arguments.wants(name);
        if suite.rows.iter().any(|(name, _)| wanted(name)) {
            let found = (suite.run)(&run)?;
            let all = line_up(suite, &found);
            lines.extend(all.into_iter().filter(|line| wanted(line.name)));
        }
    }
    if arguments.json {
        return print_json(&lines);
    }
    if arguments.markdown {
        print_markdown(&lines);
    } else {
        print(&lines);
    }
    Ok(())
}

/// A suite's rows in their order.
fn line_up(suite: &Suite, found: &Found) -> Vec<Line> {
    if found.0.is_empty() {
        return Vec::new(); // rounds that were not measured
    }
    assert_eq!(suite.rows.len(), found.0.len(), "a row that nobody knows");
    let line = |(name, goal): &(&'static str, Goal)| {
        let row = found.0.iter().find(|row| row.name == *name);
        let row = row.unwrap_or_else(|| panic!("{name} was not measured"));
        Line {
            name,
            goal: *goal,
            value: summary(&row.values),
            limit: row.limit.as_deref().map(|limit| summary(limit).0),
        }
    };
    suite.rows.iter().map(line).collect()
}

fn print(lines: &[Line]) {
    println!(
        "{:<34} {:>9} {:>9} {:>9}  {:<12} {:>9}",
        "figure", "median", "min", "max", "goal", "limit"
    );
    for line in lines {
        let (median, min, max) = line.value;
        let (verdict, limit) = line.verdict();
        println!(
            "{:<34} {:>9} {:>9} {:>9}  {:<12} {limit:>9}  {}",
            line.name,
            Short(median),
            Short(min),
            Short(max),
            line.goal,
            verdict.replace("missed", "MISSED"),
        );
    }
}

fn print_markdown(lines: &[Line]) {
    println!("| figure | median | min | max | goal | | limit |");
    println!("|---|---|---|---|---|---|---|");
    for line in lines {
        let (median, min, max) = line.value;
        let (verdict, limit) = line.verdict();
        println!(
            "| `{}` | {} | {} | {} | {} | {verdict} | {limit} |",
            line.name,
            Short(median),
            Short(min),
            Short(max),
            line.goal.to_string().replace('-', ""),
        );
    }
}

fn print_json(lines: &[Line]) -> io::Result<()> {
    let rows: Vec<_> = lines
        .iter()
        .map(|line| {
            let (median, min, max) = line.value;
            json!({
                "name": line.name,
                "median": median,
                "min": min,
                "max": max,
                "goal": (line.goal != Goal::Open).then(|| line.goal.to_string()),
                "met": line.is_met(),
                "limit": line.limit,
            })
        })
        .collect();
    println!("{}", serde_json::to_string_pretty(&rows)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_row_is_there_once() {
        let mut seen = BTreeSet::new();
        for (name, _) in suites().flat_map(|suite| suite.rows) {
            assert!(seen.insert(name), "{name} twice");
        }
    }

    #[test]
    fn a_suite_gives_its_rows_in_their_order_and_no_other() {
        const SUITE: Suite = Suite {
            rows: &[("b", Goal::AtLeast(2.0)), ("a", Goal::Open)],
            run: |_| Ok(Found::default()),
        };
        let mut found = Found::default();
        found.add("a", vec![1.0]);
        found.add_limited("b", vec![3.0, 1.0, 2.0], vec![4.0]);
        let lines = line_up(&SUITE, &found);
        assert_eq!((lines[0].name, lines[0].value), ("b", (2.0, 1.0, 3.0)));
        assert_eq!((lines[0].limit, lines[0].is_met()), (Some(4.0), Some(true)));
        assert_eq!((lines[1].name, lines[1].is_met()), ("a", None));
        found.add("c", vec![1.0]);
        let unknown = std::panic::catch_unwind(|| line_up(&SUITE, &found).len());
        unknown.expect_err("c is no row of the suite");
    }

    #[test]
    fn names_are_parts() {
        let arguments = Arguments::parse_from(["ratios", "load-4k", "wake"]);
        assert!(arguments.wants("load-4k-vs-mutex") && arguments.wants("wake-p50-us"));
        assert!(!arguments.wants("load-64k-vs-mutex"));
        assert!(Arguments::parse_from(["ratios"]).wants("anything"));
    }
}
