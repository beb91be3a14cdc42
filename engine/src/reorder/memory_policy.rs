//! Which memory a packet may have when it arrives: the rule, as a pure function.
//!
//! | a packet | buffers of the pool | its device's reserve | the spill file |
//! |---|---|---|---|
//! | that its device needs next | all | yes | yes |
//! | any other | 12 MiB at first, then all but a few | no | yes |
//! | beyond the window | none | no | no |
//!
//! The spill file is for channels that also carry barriers: such a channel must never wait for another.
//! A large packet that passes in pieces waits for its device between the pieces. On such a channel a packet
//! may therefore pass in pieces only if its device takes packets and needs this one next.
//!
//! `tests/load/back_pressure.rs` searches all orders, channels and schedules of small cases for deadlocks. The
//! search asks this function.

use crate::reorder::pool::PoolLayout;

/// How far the channels may be ahead, in bytes, while nothing is late: what a core's share of the
/// last cache keeps, and several times what the I/O thread writes at once.
const AHEAD: usize = 12 << 20;

/// A packet, or what is left of one, for which there is no memory yet.
#[derive(Clone, Copy, Debug)]
pub struct MemoryRequest {
    /// How many bytes are to come.
    pub len: usize,
    /// Whether nothing of it has been published.
    pub first: bool,
    /// Whether its device needs it next.
    pub next: bool,
    /// Whether it is close enough to the next packet to be held.
    pub in_window: bool,
    /// Whether its device takes packets: the switchover has started.
    pub started: bool,
    /// Whether the channel is still in its first, short wait, in which it may only use the read-ahead share.
    pub within_read_ahead: bool,
    /// Whether its channel may spill.
    pub spills: bool,
}

/// Where a packet's memory may come from, to be tried in this order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MemoryGrant {
    /// A buffer of the pool, if fewer than this many are out.
    pub buffer: Option<u32>,
    /// Its device's reserve.
    pub reserve: bool,
    /// The spill file, for all of it.
    pub spill: bool,
}

/// The rule for one pool.
#[derive(Clone, Copy, Debug)]
pub struct MemoryPolicy {
    layout: PoolLayout,
    ahead: u32,
    most: u32,
}

impl MemoryPolicy {
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
    pub const fn limit(&self, within_read_ahead: bool) -> u32 {
        if within_read_ahead {
            self.ahead
        } else {
            self.most
        }
    }

    /// Where a packet's memory may come from. None of the three: it waits.
    #[must_use]
    pub const fn grant(&self, request: MemoryRequest) -> MemoryGrant {
        let layout = &self.layout;
        if !request.in_window {
            return MemoryGrant {
                buffer: None,
                reserve: false,
                spill: false,
            };
        }
        // In pieces it would wait for its device, which may wait for another channel.
        let whole = request.spills && request.first && !(request.next && request.started);
        let limit = if request.next {
            layout.buffers
        } else {
            self.limit(request.within_read_ahead)
        };
        let may_have = layout.buffers > 0 && !(whole && request.len > layout.buffer_len);
        MemoryGrant {
            buffer: if may_have { Some(limit) } else { None },
            reserve: request.next && !(whole && request.len > layout.reserve_len),
            spill: request.spills && request.first,
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

    const ASKED: MemoryRequest = MemoryRequest {
        len: 100,
        first: true,
        next: false,
        in_window: true,
        started: true,
        within_read_ahead: false,
        spills: false,
    };

    fn grant(request: MemoryRequest) -> (Option<u32>, bool, bool) {
        let grant = MemoryPolicy::new(LAYOUT).grant(request);
        (grant.buffer, grant.reserve, grant.spill)
    }

    #[test]
    fn the_next_packet_has_everything_and_others_leave_it_some() {
        assert_eq!(grant(ASKED), (Some(14), false, false));
        let next = MemoryRequest {
            next: true,
            ..ASKED
        };
        assert_eq!(grant(next), (Some(16), true, false));
        let far = MemoryRequest {
            in_window: false,
            spills: true,
            ..ASKED
        };
        assert_eq!(grant(far), (None, false, false));
    }

    #[test]
    fn on_a_channel_that_spills_nothing_waits_half_received() {
        let large = MemoryRequest {
            len: 2000,
            spills: true,
            ..ASKED
        };
        assert_eq!(grant(large), (None, false, true));
        let next = MemoryRequest {
            next: true,
            ..large
        };
        assert_eq!(grant(next), (Some(16), true, true));
        let held = MemoryRequest {
            started: false,
            ..next
        };
        assert_eq!(grant(held), (None, false, true));
        let rest = MemoryRequest {
            first: false,
            ..next
        };
        assert_eq!(grant(rest), (Some(16), true, false));
    }
}
