//! A worker of the blocking ring, on its way to a thread.
//!
//! ```text
//!   the ring ──▶ Worker ──▶ SpawnWorker ──▶ a thread: worker.run()
//!                                              │ or fail(why), or dropped
//!                                              ▼
//!                         the ring's next wait, or its submit, returns the error
//! ```
//!
//! The ring makes threads itself, unless it was given a [`SpawnWorker`]. The worker's job stays with the ring
//! until a worker takes it, so a worker that is never run loses no operation.

use std::{fmt, io, sync::Arc, thread::JoinHandle};

/// The work of one thread of a [`BlockingRing`](crate::BlockingRing).
#[must_use = "a worker that is not run is an error of its ring"]
pub struct Worker(Option<Box<dyn FnOnce(io::Result<()>) + Send>>);

impl Worker {
    /// `body` works, or hears why it cannot.
    pub(crate) fn new(body: impl FnOnce(io::Result<()>) + Send + 'static) -> Self {
        Self(Some(Box::new(body)))
    }

    /// Works on the calling thread, until the ring has no more for it.
    pub fn run(self) {
        self.end(Ok(()));
    }

    /// Does not work. The ring's next wait returns `why`.
    pub fn fail(self, why: io::Error) {
        self.end(Err(why));
    }

    fn end(mut self, begun: io::Result<()>) {
        if let Some(body) = self.0.take() {
            body(begun);
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Some(body) = self.0.take() {
            body(Err(io::Error::other(
                "a worker of the ring was dropped without being run",
            )));
        }
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").finish_non_exhaustive()
    }
}

/// Puts a worker on a thread, and does not wait for it. The ring's own thread calls it. If it returns a handle,
/// the ring joins that thread at its end.
pub type SpawnWorker = Arc<dyn Fn(Worker) -> io::Result<Option<JoinHandle<()>>> + Send + Sync>;
