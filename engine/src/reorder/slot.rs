//! One packet's place in the stream. One word holds a phase, two flags and the place of the bytes.
//!
//! ```text
//!            publish(packet)            take()
//!   Empty ───────────────────▶ Ready ───────────▶ Taken
//!     │                         │ ▲                 │
//!     │                         │ └─ publish_rest ──┘  (if the piece taken had `more`)
//!     └────────── close() ──────┴─────────────────────▶ Closed
//!
//!    63                                     5    4     3     2      1   0
//!   ┌────────────────────────────────────────┬───────┬──────┬────────┬──────┐
//!   │  LeaseToken: buffer, offset, length    │ aside │ more │ config │ phase│
//!   │  or, with `aside`, a number            │       │      │        │      │
//!   └────────────────────────────────────────┴───────┴──────┴────────┴──────┘
//! ```
//!
//! Many threads publish, one at a time takes, and any thread may close. Every transition is one
//! read-modify-write on one word. So a slot has a single modification order, and its memory has a single
//! owner at each point of that order.
//!
//! A packet too large for one buffer passes through its slot piece by piece. `more` means that another
//! piece of the same packet follows. Only the publisher of the first piece may bring it.
//!
//! # Edges
//!
//! | edge    | release side                                | acquire side                    | what it carries   |
//! |---------|---------------------------------------------|---------------------------------|-------------------|
//! | publish | [`Slot::publish`], [`Slot::publish_rest`]   | [`Slot::take`], [`Slot::close`] | the piece's bytes |

use std::fmt;

use crate::{
    reorder::pool::{LeaseToken, Pool},
    sync::atomic::{
        AtomicU64,
        Ordering::{Acquire, Relaxed, Release},
    },
};

/// Where a packet's bytes are.
#[derive(Debug, Eq, PartialEq)]
pub enum Payload {
    /// Nowhere: the packet has none.
    Empty,
    /// In a buffer of the pool.
    Lease(LeaseToken),
    /// Outside the pool, under a number that the table's owner understands: a spilled range, or a
    /// device whose config is kept apart. Below [`Payload::ASIDE_MAX`].
    External(u64),
}

impl Payload {
    /// The largest number that [`Payload::External`] can hold.
    pub const ASIDE_MAX: u64 = (1 << LeaseToken::BITS) - 1;
}

/// A packet, or a piece of one, on its way through a slot.
#[derive(Debug, Eq, PartialEq)]
#[must_use = "the payload's memory has no other owner"]
pub struct Packet {
    /// Its bytes.
    pub payload: Payload,
    /// Whether it is the config packet, the device's last.
    pub config: bool,
    /// Whether another piece of the same packet follows.
    pub more: bool,
}

impl Packet {
    /// Gives the packet's memory back to the pool that it came from.
    pub fn recycle(self, pool: &Pool) {
        if let Payload::Lease(piece) = self.payload {
            drop(Pool::adopt(pool, piece));
        }
    }
}

/// Where a slot is in its life. Declaration order is life order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u64)]
enum Phase {
    /// No packet with this index has arrived.
    Empty = 0b00,
    /// The packet is here and nobody has it.
    Ready = 0b01,
    /// The taker has it. Terminal, but for `more`.
    Taken = 0b10,
    /// The transfer was abandoned. Terminal, and wins over `Ready`.
    Closed = 0b11,
}

/// A decoded state word. Plain data: copying it has no effect on the slot.
#[derive(Clone, Copy, Eq, PartialEq)]
struct Word(u64);

impl Word {
    const PHASE_MASK: u64 = 0b11;
    const CONFIG: u64 = 1 << 2;
    const MORE: u64 = 1 << 3;
    const ASIDE: u64 = 1 << 4;
    const PAYLOAD_SHIFT: u32 = 5;

    const EMPTY: Self = Self(Phase::Empty as u64);
    const CLOSED: Self = Self(Phase::Closed as u64);
    /// Taken, and the publisher may bring the packet's next piece.
    const DRAINED: Self = Self(Phase::Taken as u64 | Self::MORE);

    fn ready(packet: Packet) -> Self {
        let mut bits = Phase::Ready as u64;
        if packet.config {
            bits |= Self::CONFIG;
        }
        if packet.more {
            bits |= Self::MORE;
        }
        match packet.payload {
            Payload::Empty => bits |= LeaseToken::NONE << Self::PAYLOAD_SHIFT,
            Payload::Lease(piece) => bits |= piece.into_bits() << Self::PAYLOAD_SHIFT,
            Payload::External(number) => {
                assert!(number <= Payload::ASIDE_MAX, "a number aside has 59 bits");
                bits |= Self::ASIDE | number << Self::PAYLOAD_SHIFT;
            }
        }
        Self(bits)
    }

    const fn taken(self) -> Self {
        Self(Phase::Taken as u64 | self.0 & Self::MORE)
    }

    const fn phase(self) -> Phase {
        match self.0 & Self::PHASE_MASK {
            0b00 => Phase::Empty,
            0b01 => Phase::Ready,
            0b10 => Phase::Taken,
            _ => Phase::Closed,
        }
    }

    /// The packet of a word whose phase was `Ready`: to be called by whoever moved the slot out of
    /// it, and by nobody else, for the packet's memory has one owner.
    fn into_packet(self) -> Packet {
        let bits = self.0 >> Self::PAYLOAD_SHIFT;
        let payload = if self.0 & Self::ASIDE != 0 {
            Payload::External(bits)
        } else if bits == LeaseToken::NONE {
            Payload::Empty
        } else {
            Payload::Lease(LeaseToken::from_bits(bits))
        };
        Packet {
            payload,
            config: self.0 & Self::CONFIG != 0,
            more: self.0 & Self::MORE != 0,
        }
    }
}

const _: () = assert!(Word::PAYLOAD_SHIFT + LeaseToken::BITS == u64::BITS);

/// What became of a publication. A packet that was refused is given back.
#[derive(Debug, Eq, PartialEq)]
#[must_use = "a packet that was not published still belongs to the caller"]
pub enum Publish {
    /// The slot owns the packet.
    Published,
    /// A packet with this index came before.
    Duplicate(Packet),
    /// The piece before this one has not been taken yet.
    Full(Packet),
    /// The transfer was abandoned.
    Closed(Packet),
}

/// What became of a [`Slot::take`].
#[derive(Debug, Eq, PartialEq)]
#[must_use = "a taken packet belongs to the caller and leaks if it is dropped on the floor"]
pub enum Take {
    /// The caller owns this packet.
    Taken(Packet),
    /// The packet, or its next piece, has not arrived.
    Empty,
    /// The transfer was abandoned.
    Closed,
}

/// What a slot has for its taker.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Peek {
    /// So many bytes of data, in memory.
    Data(usize),
    /// A config, data that is kept outside of the pool, or an end.
    Other,
}

/// One packet's place in the stream.
pub struct Slot {
    word: AtomicU64,
}

impl Slot {
    /// Returns an empty slot.
    #[must_use]
    pub fn new() -> Self {
        Self {
            word: AtomicU64::new(Word::EMPTY.0),
        }
    }

    /// Gives `packet`, or its first piece, to the slot, if the slot is empty.
    pub fn publish(&self, packet: Packet) -> Publish {
        self.exchange(Word::EMPTY, packet)
    }

    /// Gives the next piece of the packet to the slot, if the one before has been taken. Only the
    /// publisher of the first piece may call this.
    pub fn publish_rest(&self, packet: Packet) -> Publish {
        self.exchange(Word::DRAINED, packet)
    }

    fn exchange(&self, from: Word, packet: Packet) -> Publish {
        let ready = Word::ready(packet);
        // publish edge, release side: the bytes were written by this thread, or by the kernel on
        // its behalf, and `take` must see them. Relaxed on failure: a loser reads no bytes.
        match self
            .word
            .compare_exchange(from.0, ready.0, Release, Relaxed)
        {
            Ok(_) => Publish::Published,
            Err(found) => match Word(found).phase() {
                Phase::Closed => Publish::Closed(ready.into_packet()),
                Phase::Ready if from == Word::DRAINED => Publish::Full(ready.into_packet()),
                _ => Publish::Duplicate(ready.into_packet()),
            },
        }
    }

    /// Takes the packet, if it is here. One thread at a time.
    pub fn take(&self) -> Take {
        // Relaxed: a guess, confirmed by the exchange below.
        let seen = Word(self.word.load(Relaxed));
        match seen.phase() {
            Phase::Empty => return Take::Empty,
            Phase::Closed => return Take::Closed,
            Phase::Taken if seen == Word::DRAINED => return Take::Empty,
            Phase::Taken => unreachable!("a taker never comes back to a packet it has"),
            Phase::Ready => {}
        }
        // publish edge, acquire side. A swap would bring a closed slot back to life.
        match self
            .word
            .compare_exchange(seen.0, seen.taken().0, Acquire, Relaxed)
        {
            Ok(_) => Take::Taken(seen.into_packet()),
            // The only way out of `Ready` that is not ours.
            Err(_) => Take::Closed,
        }
    }

    /// Whether a packet, or an end, is here to be taken. For the re-check before a sleep.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        // Relaxed: the sleeper's fence comes before this load, and `take` confirms it.
        matches!(
            Word(self.word.load(Relaxed)).phase(),
            Phase::Ready | Phase::Closed
        )
    }

    /// What is here to be taken, if anything is: for the taker, who confirms it.
    #[must_use]
    pub fn peek(&self) -> Option<Peek> {
        // Relaxed: as above.
        let word = Word(self.word.load(Relaxed));
        match word.phase() {
            Phase::Ready if word.0 & (Word::CONFIG | Word::ASIDE) == 0 => {
                let bits = word.0 >> Word::PAYLOAD_SHIFT;
                let is_empty = bits == LeaseToken::NONE;
                Some(Peek::Data(if is_empty {
                    0
                } else {
                    LeaseToken::size_in(bits)
                }))
            }
            Phase::Ready | Phase::Closed => Some(Peek::Other),
            Phase::Empty | Phase::Taken => None,
        }
    }

    /// Abandons the slot, and returns the packet it held, if any.
    #[must_use = "a returned packet belongs to the caller"]
    pub fn close(&self) -> Option<Packet> {
        // publish edge, acquire side: the caller may reuse the memory. Not a release: `Closed`
        // carries nothing.
        let was = Word(self.word.swap(Word::CLOSED.0, Acquire));
        (was.phase() == Phase::Ready).then(|| was.into_packet())
    }
}

impl Default for Slot {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Relaxed: for a human, who is always too late.
        let word = Word(self.word.load(Relaxed));
        f.debug_struct("Slot")
            .field("phase", &word.phase())
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn aside(number: u64) -> Packet {
        Packet {
            payload: Payload::External(number),
            config: false,
            more: false,
        }
    }

    #[test]
    fn a_word_round_trips_every_kind_of_packet() {
        let payloads: [fn() -> Payload; 4] = [
            || Payload::Empty,
            || Payload::External(0),
            || Payload::External(Payload::ASIDE_MAX),
            || Payload::Lease(LeaseToken::from_bits(0x0123_4567_89ab_cdef >> 5)),
        ];
        for payload in payloads {
            for (config, more) in [(false, false), (true, false), (false, true), (true, true)] {
                let packet = || Packet {
                    payload: payload(),
                    config,
                    more,
                };
                let word = Word::ready(packet());
                assert_eq!(word.phase(), Phase::Ready);
                assert_eq!(word.into_packet(), packet());
            }
        }
    }

    #[test]
    fn a_second_packet_with_the_same_index_is_given_back() {
        let slot = Slot::new();
        assert_eq!(slot.publish(aside(1)), Publish::Published);
        assert_eq!(slot.publish(aside(2)), Publish::Duplicate(aside(2)));
        assert_eq!(slot.take(), Take::Taken(aside(1)));
        assert_eq!(slot.publish(aside(3)), Publish::Duplicate(aside(3)));
    }

    #[test]
    fn a_large_packet_passes_piece_by_piece() {
        let piece = |number, more| Packet {
            more,
            ..aside(number)
        };
        let slot = Slot::new();
        assert_eq!(slot.publish(piece(1, true)), Publish::Published);
        assert_eq!(
            slot.publish_rest(piece(2, true)),
            Publish::Full(piece(2, true))
        );
        assert_eq!(slot.take(), Take::Taken(piece(1, true)));
        assert_eq!(slot.take(), Take::Empty);
        // A stranger with the same index is still a duplicate.
        assert_eq!(slot.publish(aside(9)), Publish::Duplicate(aside(9)));
        assert_eq!(slot.publish_rest(piece(2, false)), Publish::Published);
        assert_eq!(slot.take(), Take::Taken(piece(2, false)));
        assert_eq!(
            slot.publish_rest(piece(3, false)),
            Publish::Duplicate(piece(3, false))
        );
    }

    #[test]
    fn a_closed_slot_refuses_and_returns_what_it_held() {
        let slot = Slot::new();
        assert_eq!(slot.publish(aside(1)), Publish::Published);
        assert_eq!(slot.close(), Some(aside(1)));
        assert_eq!(slot.close(), None);
        assert_eq!(slot.take(), Take::Closed);
        assert_eq!(slot.publish(aside(2)), Publish::Closed(aside(2)));
        assert!(slot.is_ready());
    }
}
