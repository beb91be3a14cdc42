//! A bar for each device, on stderr where that is a terminal.
//!
//! ```text
//!   stats() of a session, about ten times a second ──▶ Progress ──▶ stderr
//! ```
//!
//! A thread of its own draws, the latest counters that there are: a terminal may stand still, and the
//! main thread may not. Where there is no terminal, or no thread, nothing is drawn.

use std::{
    io::IsTerminal,
    sync::mpsc::{self, SyncSender},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use vfio_migration::{DeviceId, Stats};
use vfio_migration_uring::thread::spawn;

/// More bars than this would scroll: then there is one for all.
const MOST: usize = 16;

/// How long the end waits for the last bars.
const PATIENCE: Duration = Duration::from_millis(200);

/// What draws the bars.
#[derive(Debug)]
pub(crate) struct Progress {
    /// One that waits to be drawn is enough. Until the end.
    counters: Option<SyncSender<Stats>>,
    thread: JoinHandle<()>,
}

impl Progress {
    /// Begins to draw, if `wanted`: a bar for each device, as long as its state where that is
    /// known.
    pub(crate) fn new(wanted: bool, devices: &[(DeviceId, Option<u64>)]) -> Option<Self> {
        if !wanted || !std::io::stderr().is_terminal() {
            return None;
        }
        let bars = Bars::new(devices);
        let (counters, all) = mpsc::sync_channel(1);
        let draw = move || all.iter().for_each(|stats| bars.update(&stats));
        let thread = spawn("progress", draw);
        Some(Self {
            counters: Some(counters),
            thread: thread.ok()?,
        })
    }

    /// Has drawn what the counters say.
    pub(crate) fn update(&self, stats: &Stats) {
        if let Some(counters) = &self.counters {
            // Those before are not drawn yet: then these need not be.
            let _later = counters.try_send(stats.clone());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        drop(self.counters.take());
        let since = Instant::now();
        while !self.thread.is_finished() && since.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The bars, which stay where they are in the end.
#[derive(Debug)]
struct Bars {
    bars: Vec<ProgressBar>,
    together: bool,
    _drawn: MultiProgress,
}

impl Bars {
    fn new(devices: &[(DeviceId, Option<u64>)]) -> Self {
        let together = devices.len() > MOST;
        let all = devices
            .iter()
            .try_fold(0_u64, |sum, (_, len)| Some(sum.saturating_add((*len)?)));
        let rows = if together {
            vec![(format!("{} devices", devices.len()), all)]
        } else {
            let row = |(id, len): &(DeviceId, Option<u64>)| (id.to_string(), *len);
            devices.iter().map(row).collect()
        };
        let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        let drawn = MultiProgress::new();
        let bars = rows.into_iter().map(|(name, len)| {
            // Not to be seen before it is as it should be.
            let bar = ProgressBar::with_draw_target(len, ProgressDrawTarget::hidden());
            let template = if len.is_some() {
                "{prefix} [{bar:32}] {binary_bytes:>11} of {binary_total_bytes} {binary_bytes_per_sec:>13}"
            } else {
                "{prefix} {spinner} {binary_bytes:>11} {binary_bytes_per_sec:>13}"
            };
            // A style that does not parse is drawn plainly.
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_prefix(format!("{name:width$}"));
            drawn.add(bar)
        });
        Self {
            bars: bars.collect(),
            together,
            _drawn: drawn,
        }
    }

    fn update(&self, stats: &Stats) {
        if self.together {
            let bytes = stats.devices.iter().map(|device| device.bytes).sum();
            self.bars.iter().for_each(|bar| set(bar, bytes));
        } else {
            for (bar, device) in self.bars.iter().zip(&stats.devices) {
                set(bar, device.bytes);
            }
        }
    }
}

/// Headers and config are counted too, so that the sum may be a little above the state.
fn set(bar: &ProgressBar, bytes: u64) {
    bar.set_position(bar.length().map_or(bytes, |len| bytes.min(len)));
}

impl Drop for Bars {
    fn drop(&mut self) {
        for bar in &self.bars {
            bar.abandon();
        }
    }
}
