//! `--metrics` and `--timeline`: the files that a migration's counters are written to.
//!
//! ```text
//!   stats() of the sessions, each tick ──▶ Observer ──┬─ each second ─▶ thread "observer" ─▶ FILE, OpenMetrics
//!                                           Timeline  └─ at the end ──▶        "         ─▶ FILE, a chart
//! ```
//!
//! The main thread records. A thread of its own writes, for a file system may stand still and the main thread
//! may not. A file is written whole beside its name, and then gets the name (`state_files`), so nobody reads a
//! part of one. What cannot be written is said, and changes no status: the migration has passed, or has failed
//! for another reason.
//!
//! | wait | ended by |
//! |---|---|
//! | the thread, for what is to be written | the next second, or the end |
//! | the end, for the thread | its last file, or [`PATIENCE`] |

use std::{
    cell::RefCell,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::mpsc::{self, SyncSender},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Context;
use vfio_migration::{Side, Stats, metrics::Metrics, timeline::Timeline};
use vfio_migration_uring::{deadline, thread::spawn};

use crate::{
    host_memory::NO_THREAD,
    network::TICK,
    output::say,
    state_files::{self, Target},
};

/// How often metrics are written.
const EACH: Duration = Duration::from_secs(1);

/// How long the end waits for a file system that stands still.
const PATIENCE: Duration = Duration::from_secs(5);

/// The shortest time between two looks at the counters.
const CLOSEST: Duration = Duration::from_millis(1);

/// Where the counters are written to.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct ObserveArgs {
    /// Write the counters to FILE each second and at the end, as OpenMetrics text
    ///
    /// The file is replaced as a whole, as node_exporter's textfile collector wants it; its name should end
    /// in .prom then. Each sample has the label `migration`, which is FILE's name without its ending: give
    /// each migration of a host a name of its own.
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
    /// At the end, draw to FILE what happened when: a chart (.svg) or trace events for Perfetto (.json)
    ///
    /// For each device: the phases of its downtime, and when it waited. For each channel: its throughput,
    /// and when it waited. A migration that fails is drawn up to then.
    #[arg(long, value_name = "FILE", value_parser = drawn)]
    timeline: Option<PathBuf>,
}

/// Reads the name of a file that a timeline can be drawn to.
fn drawn(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    match path.extension().and_then(|it| it.to_str()) {
        Some("svg" | "json") => Ok(path),
        _ => Err("the name of a timeline ends in .svg (a chart) or .json (trace events)".into()),
    }
}

/// What the thread writes.
struct Page {
    path: PathBuf,
    text: String,
}

/// The counters as they were last.
type Latest = Vec<(Side, Stats)>;

/// What looks at the counters: the main thread's.
#[derive(Debug)]
pub(crate) struct Observer {
    args: ObserveArgs,
    began: Instant,
    timeline: RefCell<Timeline>,
    latest: RefCell<Latest>,
    written: RefCell<Instant>,
    thread: Option<(SyncSender<Page>, JoinHandle<()>)>,
}

/// Writes a file as a whole.
fn write(page: &Page) -> anyhow::Result<()> {
    let target = Target::new(&page.path)?;
    let file = target
        .create()
        .with_context(|| page.path.display().to_string())?;
    let mut writer = file.file();
    let written = writer.write_all(page.text.as_bytes()).and_then(|()| {
        // There is nothing in it that others may not read. A file that is replaced keeps its mode.
        file.file()
            .set_permissions(std::fs::Permissions::from_mode(0o644))
    });
    written.with_context(|| page.path.display().to_string())?;
    state_files::publish(vec![(&target, file)])
}

impl ObserveArgs {
    /// Begins to observe.
    ///
    /// # Errors
    ///
    /// Where a file cannot be written, by its name.
    pub(crate) fn start(&self) -> anyhow::Result<Observer> {
        let paths = [&self.metrics, &self.timeline];
        let targets = paths.into_iter().flatten().map(|path| Target::new(path));
        let targets: Vec<_> = targets.collect::<anyhow::Result<_>>()?;
        state_files::check_distinct(&targets.iter().collect::<Vec<_>>())?;
        let mut thread = None;
        if !targets.is_empty() {
            let (pages, all) = mpsc::sync_channel::<Page>(2);
            let write_all = move || {
                let mut said = false;
                for page in all {
                    // Once: the next second it is the same.
                    if let Err(error) = write(&page)
                        && !std::mem::replace(&mut said, true)
                    {
                        say(&format!("warning: {error:#}"));
                    }
                }
            };
            thread = Some((pages, spawn("observer", write_all).context(NO_THREAD)?));
        }
        Ok(Observer {
            args: self.clone(),
            began: Instant::now(),
            timeline: RefCell::default(),
            latest: RefCell::default(),
            written: RefCell::new(Instant::now()),
            thread,
        })
    }
}

/// The text of the metrics that go to a file.
fn metrics(path: &Path, latest: &[(Side, Stats)]) -> Page {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let metrics = Metrics::new(stem);
    let metrics = latest.iter().fold(metrics, |metrics, (side, stats)| {
        metrics.with(*side, stats.clone())
    });
    Page {
        path: path.to_owned(),
        text: metrics.to_string(),
    }
}

impl Observer {
    /// How long to wait until the next look: often while a timeline is new, which may be a short one.
    pub(crate) fn tick(&self) -> Duration {
        match self.args.timeline {
            Some(_) => (self.began.elapsed() / 2000).clamp(CLOSEST, TICK),
            None => TICK,
        }
    }

    /// Looks at the counters, if anybody wants to know.
    pub(crate) fn look(&self, counters: impl FnOnce() -> Latest) {
        if self.thread.is_none() {
            return;
        }
        let latest = counters();
        if self.args.timeline.is_some() {
            let mut timeline = self.timeline.borrow_mut();
            for (side, stats) in &latest {
                timeline.record(*side, stats.clone());
            }
        }
        let mut written = self.written.borrow_mut();
        if let (Some(path), Some((pages, _))) = (&self.args.metrics, &self.thread)
            && written.elapsed() >= EACH
        {
            *written = Instant::now();
            // If those before are not written yet, these need not be.
            let _later = pages.try_send(metrics(path, &latest));
        }
        *self.latest.borrow_mut() = latest;
    }

    /// Writes what there is at the end, which `failure` was.
    pub(crate) fn finish(self, failure: Option<&anyhow::Error>) {
        let Some((pages, thread)) = self.thread else {
            return;
        };
        let latest = self.latest.into_inner();
        let mut timeline = self.timeline.into_inner();
        if let Some(error) = failure {
            timeline.fail(&format!("{error:#}"));
        }
        let until = deadline(PATIENCE);
        let mut last = Vec::new();
        if let Some(path) = self.args.metrics.filter(|_| !latest.is_empty()) {
            last.push(metrics(&path, &latest));
        }
        if let Some(path) = self.args.timeline.filter(|_| !timeline.is_empty()) {
            let text = match path.extension().and_then(|it| it.to_str()) {
                Some("svg") => timeline.svg(),
                _ => timeline.trace_events(),
            };
            last.push(Page { path, text });
        }
        for mut page in last {
            // Ends: with room for it, or with the patience.
            while let Err(mpsc::TrySendError::Full(back)) = pages.try_send(page) {
                page = back;
                if Instant::now() >= until {
                    break;
                }
                thread::sleep(CLOSEST);
            }
        }
        drop(pages);
        while !thread.is_finished() && Instant::now() < until {
            thread::sleep(CLOSEST);
        }
        if !thread.is_finished() {
            say("warning: --metrics or --timeline was not written: the file system takes nothing");
        }
    }
}
