//! CPU time by what a thread is for, of this process.
//!
//! A thread looks at all others every few milliseconds, and keeps what it saw last: a thread that has ended had at
//! least that much. It leaves itself out. The kernel's own workers for a ring are threads of the process, so they are seen too.
//!
//! | role | threads |
//! |---|---|
//! | channel | `vfio-mig-ch…`: receive, check, publish; with write-through, write |
//! | I/O | `vfio-mig-io…`: take, submit, complete, recycle |
//! | worker | `iou-wrk-…`: the kernel's, which write to a data fd |
//! | feeder | `feeder`: the other end of the sockets |
//! | other | everything else: the devices' threads, the caller's |

use std::{
    collections::BTreeMap,
    fs, io,
    sync::mpsc::{self, RecvTimeoutError, Sender},
    thread::{self, JoinHandle},
    time::Duration,
};

use serde::{Deserialize, Serialize};

const LOOK: Duration = Duration::from_millis(3);
const LOOKER: &str = "looker";

/// CPU seconds by role.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct Roles {
    /// The channels' threads.
    pub channel: f64,
    /// The I/O thread.
    pub io: f64,
    /// The kernel's workers.
    pub worker: f64,
    /// The other end of the sockets.
    pub feeder: f64,
    /// Everybody else.
    pub other: f64,
}

impl Roles {
    /// All of them.
    #[must_use]
    pub const fn all(&self) -> f64 {
        self.channel + self.io + self.worker + self.feeder + self.other
    }

    /// Those that run where the device is.
    #[must_use]
    pub const fn destination(&self) -> f64 {
        self.all() - self.feeder
    }

    /// Each divided by `units`.
    #[must_use]
    pub const fn for_each(&self, units: f64) -> Self {
        Self {
            channel: self.channel / units,
            io: self.io / units,
            worker: self.worker / units,
            feeder: self.feeder / units,
            other: self.other / units,
        }
    }

    fn of(&mut self, name: &str) -> &mut f64 {
        match name {
            _ if name.starts_with("vfio-mig-ch") => &mut self.channel,
            _ if name.starts_with("vfio-mig-io") => &mut self.io,
            _ if name.starts_with("iou-wrk") => &mut self.worker,
            "feeder" => &mut self.feeder,
            _ => &mut self.other,
        }
    }
}

/// Every thread's name and nanoseconds on a CPU.
fn look(seen: &mut BTreeMap<u64, (String, u64)>) -> io::Result<()> {
    for entry in fs::read_dir("/proc/self/task")? {
        let path = entry?.path();
        // A thread that ends meanwhile has no files.
        let read = |file| fs::read_to_string(path.join(file)).ok();
        let (Some(name), Some(times)) = (read("comm"), read("schedstat")) else {
            continue;
        };
        let thread = path
            .file_name()
            .and_then(|name| name.to_str()?.parse().ok());
        let on_cpu = times.split(' ').next().and_then(|time| time.parse().ok());
        if let (Some(thread), Some(on_cpu)) = (thread, on_cpu) {
            seen.insert(thread, (name.trim().to_owned(), on_cpu));
        }
    }
    Ok(())
}

/// Looks until it is asked.
#[derive(Debug)]
pub struct Watch {
    stop: Sender<()>,
    looker: JoinHandle<io::Result<Roles>>,
}

impl Watch {
    /// Begins.
    ///
    /// # Panics
    ///
    /// Where there is no thread to be had.
    #[must_use]
    pub fn start() -> Self {
        let (stop, stopped) = mpsc::channel();
        let looker = thread::Builder::new().name(LOOKER.to_owned());
        let looker = looker.spawn(move || {
            let mut before = BTreeMap::new();
            look(&mut before)?;
            let mut seen = BTreeMap::new();
            while stopped.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                look(&mut seen)?;
            }
            let mut roles = Roles::default();
            for (thread, (name, on_cpu)) in seen.into_iter().filter(|seen| seen.1.0 != LOOKER) {
                let earlier = before.get(&thread).map_or(0, |(_, on_cpu)| *on_cpu);
                *roles.of(&name) += Duration::from_nanos(on_cpu - earlier).as_secs_f64();
            }
            Ok(roles)
        });
        let looker = looker.expect("a thread is to be had");
        Self { stop, looker }
    }

    /// Ends; what each role had meanwhile.
    ///
    /// # Errors
    ///
    /// The kernel's.
    ///
    /// # Panics
    ///
    /// Never: the thread does not.
    pub fn stop(self) -> io::Result<Roles> {
        drop(self.stop);
        self.looker.join().expect("it only looks")
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_busy_thread_is_seen_under_its_role() {
        let watch = Watch::start();
        let busy = thread::Builder::new().name("feeder".to_owned());
        let busy = busy.spawn(|| {
            let since = Instant::now();
            while since.elapsed() < Duration::from_millis(100) {
                std::hint::spin_loop();
            }
        });
        busy.unwrap().join().unwrap();
        let roles = watch.stop().unwrap();
        assert!(roles.feeder > 0.0, "{roles:?}");
        assert!(roles.channel == 0.0 && roles.io == 0.0, "{roles:?}");
        assert!((roles.all() - roles.destination() - roles.feeder).abs() < 1e-9);
    }
}
