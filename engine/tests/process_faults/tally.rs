//! What a sweep has tried, and what came of it; and which of the product it tries.

use std::{
    env, fmt,
    sync::{Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A sweep under way: alone in the process, watched, and counting.
pub struct Sweep {
    name: &'static str,
    started: Instant,
    operations: u64,
    pub runs: u64,
    pub met: u64,
    pub successes: u64,
    pub errors: u64,
    pub late: u64,
    slowest: Duration,
    beat: mpsc::Sender<String>,
    _alone: MutexGuard<'static, ()>,
}

impl Sweep {
    pub fn new(name: &'static str) -> Self {
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let (beat, beats) = mpsc::channel::<String>();
        // Ends with the sweep, or ends the process where one run does not end.
        thread::spawn(move || {
            let mut last = "the first run".to_owned();
            loop {
                match beats.recv_timeout(Duration::from_secs(60)) {
                    Ok(case) => last = case,
                    Err(mpsc::RecvTimeoutError::Disconnected) => return,
                    Err(mpsc::RecvTimeoutError::Timeout) => {
                        eprintln!("{name}: hangs in {last}");
                        std::process::abort();
                    }
                }
            }
        });
        Self {
            name,
            started: Instant::now(),
            operations: 0,
            runs: 0,
            met: 0,
            successes: 0,
            errors: 0,
            late: 0,
            slowest: Duration::ZERO,
            beat,
            _alone: alone,
        }
    }

    /// Tells the watchdog what comes now.
    pub fn begin(&self, case: &impl fmt::Display) {
        self.beat.send(case.to_string()).unwrap();
    }

    pub fn counted(&mut self, operations: u64) {
        assert!(operations > 0, "{}: nothing to fail", self.name);
        self.operations += operations;
    }

    pub fn ended(&mut self, success: bool, met: bool, late: u64, took: Duration) {
        self.runs += 1;
        self.met += u64::from(met);
        *(if success {
            &mut self.successes
        } else {
            &mut self.errors
        }) += 1;
        self.late += late;
        self.slowest = self.slowest.max(took);
    }
}

impl Drop for Sweep {
    fn drop(&mut self) {
        // To the terminal, whatever the harness captures: these counts are the point.
        let line = format!(
            "faults: {}: {} operations, {} runs, {} met their fault, {} succeeded, {} ended in one \
             clear error, {} late wake-ups, slowest run {:.2?}, {:.1?} in all\n",
            self.name,
            self.operations,
            self.runs,
            self.met,
            self.successes,
            self.errors,
            self.late,
            self.slowest,
            self.started.elapsed(),
        );
        let _closed = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
    }
}

/// Every number below `count`, or every `stride`-th from a phase that the seed and `salt` decide.
pub fn numbers(count: u64, stride: u64, salt: u64) -> Vec<u64> {
    if env::var("VFIO_MIGRATION_FAULTS").is_ok_and(|all| all == "all") {
        return (0..count).collect();
    }
    let phase = seed()
        .wrapping_add(salt)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        >> 32;
    (0..count)
        .filter(|number| (number + phase).is_multiple_of(stride))
        .collect()
}

pub fn seed() -> u64 {
    let seed = env::var("VFIO_MIGRATION_FAULTS_SEED");
    seed.map_or(0, |seed| seed.parse().expect("a seed is a number"))
}
