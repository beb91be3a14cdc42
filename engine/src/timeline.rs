//! What happened when, as a picture: a chart for people, and trace events for Perfetto.
//!
//! ```text
//!   Stats, some hundred times in a second ──▶ record ──▶ Timeline ──▶ model ──┬──▶ svg     a chart
//!                                                                             └──▶ trace   trace events
//! ```
//!
//! All times are taken elsewhere. A phase's beginning and length are counters of its device, which the thread
//! that runs the phase sets once. Everything else is read off two neighbouring samples of the counters. So
//! recording costs the data path what reading its counters costs, which is nothing that can be measured.
//!
//! The timeline is the caller's, on the caller's thread.
//!
//! # What is kept
//!
//! A sample has three numbers for each device, two for each channel and two more. All samples of a side have
//! a million numbers at most, which are 8 MiB. (64 samples are kept in any case: more than 5000 devices take more.) If they are full every second one is dropped, and the next
//! are taken half as often: counters only grow, so what is dropped costs detail and nothing else. A message is
//! cut after 512 bytes.

mod model;
mod recording;
mod svg;
mod trace;
mod verdict;

use std::time::Instant;

use self::{model::Model, recording::Recording};
use crate::{
    stats::{Side, Stats},
    text::Printable,
};

/// The most bytes of a message.
const MESSAGE: usize = 512;

/// A migration's course: counters, recorded while it runs, and drawn at its end.
///
/// ```
/// use vfio_migration::{Side, Stats, timeline::Timeline};
///
/// /// Called every few milliseconds, and at the end.
/// fn look(timeline: &mut Timeline, stats: Stats) {
///     timeline.record(Side::Destination, stats);
/// }
///
/// let timeline = Timeline::new();
/// # let _look = look;
/// std::fs::write(std::env::temp_dir().join("timeline.svg"), timeline.svg())?;
/// # std::fs::remove_file(std::env::temp_dir().join("timeline.svg"))?;
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// One timeline may have both sides, where one process has both sessions. It takes up to 8 MiB for each side,
/// however long the migration is.
#[derive(Debug, Default)]
pub struct Timeline {
    recordings: Vec<Recording>,
    failure: Option<(Instant, String)>,
}

impl Timeline {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a side's counters as they are now. The last ones before the end are those of the session's
    /// report, or what [`stats`](crate::migration::Loaded::stats) says when the devices have been started.
    pub fn record(&mut self, side: Side, stats: Stats) {
        let at = Instant::now();
        match self.recordings.iter_mut().find(|it| it.side == side) {
            Some(recording) => recording.add(at, stats),
            None => self.recordings.push(Recording::new(side, at, stats)),
        }
    }

    /// Whether there is anything to be drawn.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.recordings.is_empty()
    }

    /// The migration has failed now. The first failure counts.
    pub fn fail(&mut self, why: &str) {
        let end = (0..=MESSAGE.min(why.len())).rev();
        let end = end.into_iter().find(|at| why.is_char_boundary(*at));
        let message = Printable(&why[..end.unwrap_or(0)]).to_string();
        self.failure.get_or_insert((Instant::now(), message));
    }

    fn model(&self) -> Model {
        Model::new(&self.recordings, self.failure.as_ref())
    }

    /// A chart, as SVG: what a browser shows, by itself and without a script.
    #[must_use]
    pub fn svg(&self) -> String {
        svg::draw(&self.model())
    }

    /// Trace events, as JSON: what Perfetto (ui.perfetto.dev) and `chrome://tracing` open.
    #[must_use]
    pub fn trace_events(&self) -> String {
        trace::write(&self.model())
    }
}
