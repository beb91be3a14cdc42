//! Whether a channel's thread may write to a device itself: the rule, as a pure function of what the device's
//! transfers took.
//!
//! | the device is | what happens | it becomes |
//! |---|---|---|
//! | on the ring | so many batches in a row that did not stand: one at first | quick |
//! | quick | channels write; a write stood, or two in a row slept | on the ring; eight times as many batches next time |
//!
//! A driver that works inside `write(2)` keeps a channel, whose other packets other devices wait for. The rule
//! tells such a driver from a thread that the host's scheduler has put aside: the driver sleeps, and the
//! kernel counts that as a voluntary switch of the thread's.

use std::time::Duration;

/// A batch that took longer than this, besides its bytes, stood. Other lanes' batches may be what it waited for.
const BATCH_STOOD: Duration = Duration::from_millis(5);

/// A write that took longer than this stood, whatever the reason: the ring would have had others go on.
const WRITE_STOOD: Duration = Duration::from_millis(50);

/// A write that slept, and took longer than this besides its bytes, is not as quick as a copy.
const WRITE_SLEPT: Duration = Duration::from_micros(50);

/// How many batches in a row make a device quick: at first, how many times as many after each write that was
/// not, and at most.
const FIRST: u32 = 1;
const TIMES: u32 = 8;
const MOST: u32 = 512;

/// What is known of one device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Pace {
    batches: u32,
    needs: u32,
}

/// What a channel's write showed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Shown {
    /// As quick as a copy, or not to be told.
    Quick,
    /// It slept in the driver. The next write is looked at more closely.
    Suspect,
    /// It stood.
    Slow,
}

impl Pace {
    pub(crate) const fn new() -> Self {
        Self {
            batches: 0,
            needs: FIRST,
        }
    }

    /// A batch on the ring has ended.
    pub(crate) const fn moved(self, bytes: usize, took: Duration) -> Self {
        let stood = took.as_nanos() > BATCH_STOOD.as_nanos() + bytes as u128;
        let batches = if stood {
            0
        } else {
            self.batches.saturating_add(1)
        };
        Self { batches, ..self }
    }

    /// A channel's write was slow.
    pub(crate) const fn was_slow(self) -> Self {
        let more = self.needs * TIMES;
        Self {
            batches: 0,
            needs: if more > MOST { MOST } else { more },
        }
    }

    /// Whether channels may write.
    pub(crate) const fn lets_channels_write(self) -> bool {
        self.batches >= self.needs
    }
}

/// Judges a channel's write. `slept` is whether the thread gave up its core in it, where that was looked at.
pub(crate) const fn judge(
    bytes: usize,
    took: Duration,
    slept: Option<bool>,
    suspect: bool,
) -> Shown {
    let bytes = bytes as u128;
    // Two and a half GB/s: a copy's speed, on a host whose cores all copy.
    let copy = WRITE_SLEPT.as_nanos() + bytes * 2 / 5;
    if took.as_nanos() > WRITE_STOOD.as_nanos() + bytes {
        return Shown::Slow;
    }
    match slept {
        Some(true) if took.as_nanos() > copy => {
            if suspect {
                Shown::Slow
            } else {
                Shown::Suspect
            }
        }
        None if took.as_nanos() > copy => Shown::Suspect,
        _ => Shown::Quick,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_write_shows() {
        use Shown::{Quick, Slow, Suspect};
        for (bytes, micros, slept, suspect, shown) in [
            (4 << 10, 51, None, false, Quick),
            (4 << 10, 52, None, false, Suspect),
            (4 << 10, 52, Some(false), true, Quick),
            (4 << 10, 52, Some(true), false, Suspect),
            (4 << 10, 52, Some(true), true, Slow),
            (1 << 20, 469, Some(true), true, Quick),
            (1 << 20, 470, Some(true), true, Slow),
            (1 << 20, 3000, Some(false), true, Quick),
            (1 << 20, 51_048, Some(false), false, Quick),
            (1 << 20, 51_049, Some(false), false, Slow),
        ] {
            let took = Duration::from_micros(micros);
            assert_eq!(judge(bytes, took, slept, suspect), shown, "{micros} us");
        }
        assert_eq!(judge(usize::MAX, Duration::MAX, None, false), Slow);
    }

    #[test]
    fn a_device_shows_that_it_is_quick_and_slow_writes_undo_it() {
        const QUICK: Duration = Duration::from_micros(100);
        let again = |pace: Pace, count: u32| (0..count).fold(pace, |pace, _| pace.moved(1, QUICK));
        let stood = Pace::new().moved(1 << 20, Duration::from_millis(7));
        assert!(!stood.lets_channels_write());
        let mut pace = Pace::new();
        for needs in [1, 8, 64, 512, 512] {
            let first = again(pace, needs - 1);
            assert!(!first.lets_channels_write(), "{needs}");
            let stood = first.moved(1 << 20, Duration::from_millis(7));
            assert!(!again(stood, needs - 1).lets_channels_write(), "{needs}");
            pace = again(first, 1);
            assert!(pace.lets_channels_write(), "{needs}");
            pace = pace.was_slow();
        }
    }
}
