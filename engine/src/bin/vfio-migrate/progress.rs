//! A bar for each device, on stderr where that is a terminal.
//!
//! ```text
//!   stats() of a session, about ten times a second ──▶ Progress ──▶ stderr
//! ```
//!
//! Used by the command's main thread alone. Where there is no terminal nothing is drawn.

use std::io::IsTerminal;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use vfio_migration::{DeviceId, Stats};

/// More bars than this would scroll: then there is one for all.
const MOST: usize = 16;

/// The bars.
#[derive(Debug)]
pub(crate) struct Progress {
    bars: Vec<ProgressBar>,
    together: bool,
    _drawn: MultiProgress,
}

impl Progress {
    /// Begins to draw, if `wanted`: a bar for each device, as long as its state where that is
    /// known.
    pub(crate) fn new(wanted: bool, devices: &[(DeviceId, Option<u64>)]) -> Option<Self> {
        if !wanted || !std::io::stderr().is_terminal() {
            return None;
        }
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
        Some(Self {
            bars: bars.collect(),
            together,
            _drawn: drawn,
        })
    }

    /// Draws what the counters say.
    pub(crate) fn update(&self, stats: &Stats) {
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

impl Drop for Progress {
    fn drop(&mut self) {
        for bar in &self.bars {
            bar.abandon();
        }
    }
}
