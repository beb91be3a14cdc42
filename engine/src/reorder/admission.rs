//! Which memory a packet may have when it arrives: the rule, as a pure function.
//!
//! | a packet | buffers of the pool | its device's reserve | the spill file |
//! |---|---|---|---|
//! | that its device needs next | all | yes | yes |
//! | any other | 12 MiB at first, then all but a few | no | yes |
//! | beyond the window | none | no | no |
//!
//! The spill file is for channels that share their way with barriers: they must never wait for
//! another channel. So on those a packet that would pass in pieces, each of which waits for the one
//! before it to be taken, does so only where its device takes packets and needs it next.
//!
//! What cannot deadlock, and what can, is shown by a search through all orders, channels and
//! schedules of small cases, which asks this function (`tests/back_pressure.rs`).

use crate::reorder::pool::PoolLayout;

/// How far the channels may be ahead, in bytes, while nothing is late: what a core's share of the
/// last cache keeps, and several times what the driver writes at once.
const AHEAD: usize = 12 << 20;

/// A packet, or what is left of one, for which there is no memory yet.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// How many bytes are to come.
    pub len: usize,
    /// Whether nothing of it has been published.
    pub first: bool,
    /// Whether its device needs it next.
    pub next: bool,
    /// Whether it is near enough to that one to be held.
    pub in_window: bool,
    /// Whether its device takes packets: the switchover has started.
    pub started: bool,
    /// Whether its channel gives nothing for being ahead yet.
    pub patient: bool,
    /// Whether its channel may spill.
    pub spills: bool,
}

/// Where a packet's memory may come from, to be tried in this order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Ways {
    /// A buffer of the pool, if fewer than this many are out.
    pub buffer: Option<u32>,
    /// Its device's reserve.
    pub reserve: bool,
    /// The spill file, for all of it.
    pub spill: bool,
}

/// The rule for one pool.
#[derive(Clone, Copy, Debug)]
pub struct Admission {
    layout: PoolLayout,
    ahead: u32,
    most: u32,
}

impl Admission {
    /// Returns the rule for a pool that is cut like this.
    #[must_use]
    pub fn new(layout: PoolLayout) -> Self {
        let most = layout.buffers - (layout.buffers / 8).min(4);
        let ahead = AHEAD / layout.buffer_len.max(1);
        Self {
            ahead: u32::try_from(ahead)
                .unwrap_or(u32::MAX)
                .clamp(1, most.max(1)),
            most,
            layout,
        }
    }

    /// How many buffers may be out after a packet that is not next has taken one.
    #[must_use]
    pub const fn limit(&self, patient: bool) -> u32 {
        if patient { self.ahead } else { self.most }
    }

    /// Where a packet's memory may come from. None of the three: it waits.
    #[must_use]
    pub const fn ways(&self, asked: Asked) -> Ways {
        let layout = &self.layout;
        if !asked.in_window {
            return Ways {
                buffer: None,
                reserve: false,
                spill: false,
            };
        }
        // In pieces it would wait for its device, which may wait for another channel.
        let whole = asked.spills && asked.first && !(asked.next && asked.started);
        let limit = if asked.next {
            layout.buffers
        } else {
            self.limit(asked.patient)
        };
        let may_have = layout.buffers > 0 && !(whole && asked.len > layout.buffer_len);
        Ways {
            buffer: if may_have { Some(limit) } else { None },
            reserve: asked.next && !(whole && asked.len > layout.reserve_len),
            spill: asked.spills && asked.first,
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const LAYOUT: PoolLayout = PoolLayout {
        buffers: 16,
        buffer_len: 1024,
        reserves: 1,
        reserve_len: 256,
    };

    const ASKED: Asked = Asked {
        len: 100,
        first: true,
        next: false,
        in_window: true,
        started: true,
        patient: false,
        spills: false,
    };

    fn ways(asked: Asked) -> (Option<u32>, bool, bool) {
        let ways = Admission::new(LAYOUT).ways(asked);
        (ways.buffer, ways.reserve, ways.spill)
    }

    #[test]
    fn the_next_packet_has_everything_and_others_leave_it_some() {
        assert_eq!(ways(ASKED), (Some(14), false, false));
        let next = Asked {
            next: true,
            ..ASKED
        };
        assert_eq!(ways(next), (Some(16), true, false));
        let far = Asked {
            in_window: false,
            spills: true,
            ..ASKED
        };
        assert_eq!(ways(far), (None, false, false));
    }

    #[test]
    fn on_a_channel_that_spills_nothing_waits_half_received() {
        let large = Asked {
            len: 2000,
            spills: true,
            ..ASKED
        };
        assert_eq!(ways(large), (None, false, true));
        let next = Asked {
            next: true,
            ..large
        };
        assert_eq!(ways(next), (Some(16), true, true));
        let held = Asked {
            started: false,
            ..next
        };
        assert_eq!(ways(held), (None, false, true));
        let rest = Asked {
            first: false,
            ..next
        };
        assert_eq!(ways(rest), (Some(16), true, false));
    }
}
