//! One operation on all devices of a set, at once. A driver may take seconds for a state change; the VM
//! stands still for the slowest device, not for the sum.
//!
//! ```text
//!   caller ── a job for each device ──┬─▶ a thread: its device's Task ── takes its job ─▶ done ─┐
//!      │                              └─▶ …                                                     │
//!      └── takes the last job, then every one that no thread has begun ──▶ waits ◀──────────────┘
//! ```
//!
//! | who | owns | may touch |
//! |---|---|---|
//! | the caller | the set, and each job until a thread takes it | all of them again when this returns |
//! | a thread | the job that it has taken | that job's device, and its own result |
//!
//! A thread is the VMM's if the device has a spawner ([`Device::spawn_with`]), and otherwise the engine's.
//! If a thread is refused, late, or never run, the caller does its job: no device is lost, and none stays
//! in its old state.
//!
//! The wait ends when the last device's driver has answered; nothing here can end it sooner.

#![expect(
    unsafe_code,
    reason = "a task outlives every borrow, and its job does not"
)]

use std::{
    mem, panic,
    panic::AssertUnwindSafe,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use super::Device;
use crate::tasks::TaskKind;

// Not `sync`'s: a wait here is for the device's own driver, and no model steps through that.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

type Job<'a> = Box<dyn FnOnce() + Send + 'a>;

/// A job until somebody takes it.
type Place = Mutex<Option<Job<'static>>>;

/// How many jobs threads have taken and not ended.
#[derive(Default)]
struct Running {
    count: Mutex<usize>,
    ended: Condvar,
}

impl Running {
    fn add(&self, one: bool) {
        let mut count = lock(&self.count);
        *count = if one { *count + 1 } else { *count - 1 };
        if *count == 0 {
            self.ended.notify_all();
        }
    }

    fn wait(&self) {
        let count = lock(&self.count);
        let none = self.ended.wait_while(count, |count| *count > 0);
        drop(none.unwrap_or_else(PoisonError::into_inner));
    }
}

/// All jobs of one call. When this has gone, none is left, and none runs.
struct Jobs {
    places: Vec<Arc<Place>>,
    running: Arc<Running>,
}

impl Jobs {
    /// What a thread does: the job, unless the caller was faster.
    fn work(place: &Place, running: &Running) {
        let job = {
            let mut place = lock(place);
            // Under the lock: a caller that finds the place empty waits for this one.
            if place.is_some() {
                running.add(true);
            }
            place.take()
        };
        if let Some(job) = job {
            job();
            running.add(false);
        }
    }
}

impl Drop for Jobs {
    fn drop(&mut self) {
        // Also where a spawner has panicked: then these are not done, and nobody can do them later.
        for place in &self.places {
            drop(lock(place).take());
        }
        self.running.wait();
    }
}

/// Does `f` to each of a set at once, a thread for each, and returns when all have returned.
///
/// # Panics
///
/// As `f` does, when all have ended.
pub(crate) fn for_all<T: Send, R: Send>(
    all: &mut [T],
    device: impl Fn(&mut T) -> &mut Device,
    f: impl Fn(&mut T) -> R + Sync,
) -> Vec<R> {
    if let [only] = all {
        return vec![f(only)];
    }
    let owners: Vec<_> = all
        .iter_mut()
        .map(|one| {
            let device = device(one);
            (device.id().clone(), device.threads().clone())
        })
        .collect();
    let results: Vec<Mutex<Option<thread::Result<R>>>> =
        all.iter().map(|_| Mutex::new(None)).collect();
    let mut jobs = Jobs {
        places: Vec::with_capacity(all.len()),
        running: Arc::default(),
    };
    for (one, result) in all.iter_mut().zip(&results) {
        let f = &f;
        let job: Job<'_> = Box::new(move || {
            let done = panic::catch_unwind(AssertUnwindSafe(|| f(one)));
            *lock(result) = Some(done);
        });
        // SAFETY: only the lifetime is changed. `jobs` is dropped before what the job borrows (`all`,
        // `results`, `f`), however this function ends; after that each place is empty, and each job that
        // was taken has returned. A task that is run later finds its place empty.
        let job = unsafe { mem::transmute::<Job<'_>, Job<'static>>(job) };
        jobs.places.push(Arc::new(Mutex::new(Some(job))));
    }
    let mut threads = Vec::new();
    for (place, (id, made_by)) in jobs.places.iter().zip(owners).skip(1) {
        let (place, running) = (place.clone(), jobs.running.clone());
        let work = move || Jobs::work(&place, &running);
        // What is refused the caller does.
        if let Ok(Some(thread)) = made_by.start(TaskKind::State(id), "vfio-mig-state", work) {
            threads.push(thread);
        }
    }
    for place in &jobs.places {
        Jobs::work(place, &jobs.running);
    }
    drop(jobs);
    for thread in threads {
        // Its work is done, or was not left to it; panics are caught inside.
        let _ended = thread.join();
    }
    let done = results.into_iter().map(|result| {
        let result = result.into_inner().unwrap_or_else(PoisonError::into_inner);
        result.expect("every job has been done")
    });
    let done: Vec<_> = done.collect();
    done.into_iter()
        .map(|done| done.unwrap_or_else(|panic| panic::resume_unwind(panic)))
        .collect()
}
