//! Whether a device takes bytes as quickly as a copy does, so that a channel's thread may write them itself:
//! the rule, as a pure function of what its transfers took.
//!
//! | so far | a transfer on the ring | a write of a channel |
//! |---|---|---|
//! | on the ring | quick: counts; slow: counts from 0 again | |
//! | quick, after so many in a row | | slow: on the ring again, and twice as many count next time |
//!
//! A driver that works inside `write(2)` would keep a channel, whose other packets other devices wait for.

use std::time::Duration;

/// What a transfer may take besides its bytes: a kernel worker's wake-up, and the I/O thread's.
const BESIDE: Duration = Duration::from_micros(250);

/// How many quick transfers in a row make a device quick, at first and at most.
const FIRST: u32 = 4;
const MOST: u32 = 1 << 10;

/// What is known of one device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Pace {
    quick: u32,
    needs: u32,
}

/// Whether so many bytes took no longer than a copy: a nanosecond each.
pub(crate) const fn is_quick(bytes: usize, took: Duration) -> bool {
    took.as_nanos() <= BESIDE.as_nanos() + bytes as u128
}

impl Pace {
    pub(crate) const fn new() -> Self {
        Self {
            quick: 0,
            needs: FIRST,
        }
    }

    /// A transfer on the ring has ended.
    pub(crate) const fn moved(self, bytes: usize, took: Duration) -> Self {
        let quick = if is_quick(bytes, took) {
            self.quick.saturating_add(1)
        } else {
            0
        };
        Self { quick, ..self }
    }

    /// A channel's write was slow.
    pub(crate) const fn was_slow(self) -> Self {
        let twice = self.needs * 2;
        Self {
            quick: 0,
            needs: if twice > MOST { MOST } else { twice },
        }
    }

    /// Whether channels may write.
    pub(crate) const fn lets_channels_write(self) -> bool {
        self.quick >= self.needs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: Duration = Duration::from_micros(100);
    const SLOW: Duration = Duration::from_millis(20);

    #[test]
    fn what_is_as_quick_as_a_copy() {
        for (bytes, micros, quick) in [
            (0, 250, true),
            (0, 251, false),
            (4 << 10, 254, true),
            (1 << 20, 1298, true),
            (1 << 20, 1299, false),
            (4 << 20, 20_000, false),
        ] {
            assert_eq!(is_quick(bytes, Duration::from_micros(micros)), quick);
        }
        assert!(!is_quick(usize::MAX, Duration::MAX));
    }

    #[test]
    fn a_device_shows_that_it_is_quick_and_one_slow_write_undoes_it() {
        let again = |pace: Pace, count: u32| (0..count).fold(pace, |pace, _| pace.moved(1, QUICK));
        let pace = Pace::new();
        assert!(!again(pace, FIRST - 1).lets_channels_write());
        assert!(again(pace, FIRST).lets_channels_write());
        let slow_between = again(again(pace, FIRST - 1).moved(1, SLOW), FIRST - 1);
        assert!(!slow_between.lets_channels_write());
        assert!(slow_between.moved(1, QUICK).lets_channels_write());
        let mut pace = again(pace, FIRST);
        for needs in [8, 16, 32, 64, 128, 256, 512, 1024, 1024] {
            pace = pace.was_slow();
            assert!(!again(pace, needs - 1).lets_channels_write(), "{needs}");
            pace = again(pace, needs);
            assert!(pace.lets_channels_write(), "{needs}");
        }
    }
}
