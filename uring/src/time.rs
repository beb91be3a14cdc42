//! Points in time in the future, for every duration that a caller may choose.
//!
//! "No limit" is [`Duration::MAX`], and `Instant::now() + Duration::MAX` panics. So every deadline of these
//! crates is made here; no other code adds times.

use std::time::{Duration, Instant};

/// What counts as never: no process lives as long.
const NEVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// The moment `time` after `from`, or a hundred years after it where `time` is longer.
#[must_use]
pub fn later(from: Instant, time: Duration) -> Instant {
    from.checked_add(time.min(NEVER)).unwrap_or(from)
}

/// The moment `time` from now. See [`later`].
///
/// ```
/// use std::time::{Duration, Instant};
/// use vfio_migration_uring::deadline;
///
/// assert!(deadline(Duration::ZERO) <= Instant::now());
/// assert!(deadline(Duration::MAX) > Instant::now() + Duration::from_secs(1 << 30));
/// ```
#[must_use]
pub fn deadline(time: Duration) -> Instant {
    later(Instant::now(), time)
}
