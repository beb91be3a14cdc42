//! Who takes a device's packets and writes them: the I/O thread, or a channel that it has lent this to.
//!
//! ```text
//!             lend()                take()
//!   Io ───────────────▶ Free ───────────────▶ Held ──┐
//!   ▲ ▲    claim()       │ ▲   give_back()     │ │   │ claim(): not now
//!   │ └──────────────────┘ └───────────────────┘ │   ▼
//!   │            hand_over()                     │  Wanted
//!   ├────────────────────────────────────────────┘   │
//!   │            hand_over(), give_back()            │
//!   └────────────────────────────────────────────────┘
//! ```
//!
//! Whoever has the turn is the device's one taker: it alone calls [`ReorderReader::take`], and alone touches
//! the device's data fd. Nobody waits for the turn. A channel takes it when it is free, or publishes its packet
//! and goes on. The I/O thread says that it wants it, and is rung for when it comes back.
//!
//! A packet that is published while a holder leaves is taken by somebody:
//!
//! | who leaves | looks again behind | the publisher's part |
//! |---|---|---|
//! | a holder that misses its next packet | the fence of [`Turn::give_back`] | [`Turn::take`] behind its publication |
//! | the I/O thread that lends | [`Doorbell::lie_down`] | the same |
//! | a holder that has written enough for others | not at all: it rings, and the I/O thread looks | the same |
//!
//! Of the two fences one comes first: either the second look finds the packet, or its publisher finds a free turn.
//!
//! [`Doorbell::lie_down`]: crate::reorder::doorbell::Doorbell::lie_down
//! [`ReorderReader::take`]: crate::reorder::reorder_buffer::ReorderReader::take
//!
//! # Edges
//!
//! | edge | release side                                               | acquire side                   | what it carries |
//! |------|------------------------------------------------------------|--------------------------------|-----------------|
//! | turn | [`Turn::lend`], [`Turn::give_back`], [`Turn::hand_over`]   | [`Turn::take`], [`Turn::claim`] | what was taken and written: `next`, the place in the file |

use std::fmt;

use crossbeam_epoch::Guard;
use crossbeam_utils::CachePadded;

use crate::{
    reorder::reorder_buffer::{ReorderBuffer, ReorderReader},
    sync::atomic::{
        AtomicU32,
        Ordering::{Acquire, Relaxed, Release, SeqCst},
        fence,
    },
};

const IO: u32 = 0;
const FREE: u32 = 1;
const HELD: u32 = 2;
/// Held, and the I/O thread wants it.
const WANTED: u32 = 3;

/// What a channel found that would take the turn.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use = "a turn that was taken is given back, or the device stands still"]
pub enum Took {
    /// It is the caller's.
    Turn,
    /// Another channel has it, and will see what the caller has published.
    Held,
    /// The I/O thread has it.
    Io,
}

/// Why a channel that has the turn takes no more.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum End {
    /// The next packet is not there.
    Missing,
    /// It has written enough for others: whoever comes next goes on.
    Enough,
    /// What comes next is the I/O thread's.
    Io,
}

/// What the I/O thread finds that has lent the turn.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Look {
    /// It was handed over: the I/O thread has it.
    Io,
    /// It is free, and the next packet is not there: its publisher takes the turn.
    Free,
    /// It is free, and the next packet is there: a channel may come for it soon, or none.
    Waiting,
    /// A channel has it.
    Held,
}

/// What became of [`Turn::pass`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use = "an I/O thread that is not rung for sleeps on"]
pub enum Passed {
    /// Nothing is left to be done: what was published has been taken, or whoever has the turn sees it.
    Done,
    /// The I/O thread has had it all along: it is rung for if it waits for what was published.
    Io,
    /// The I/O thread has it now, or should look: it must be rung for.
    Ring,
}

/// One device's turn.
pub struct Turn {
    word: CachePadded<AtomicU32>,
}

impl Turn {
    /// Returns a turn that is the I/O thread's.
    #[must_use]
    pub fn new() -> Self {
        Self {
            word: CachePadded::new(AtomicU32::new(IO)),
        }
    }

    /// The I/O thread, whose it is, lends it to whichever channel has the next packet. It looks at the slots
    /// again behind its bell's fence.
    pub fn lend(&self) {
        // turn edge, release side.
        self.word.store(FREE, Release);
    }

    /// A channel takes it, if it is free. Behind a publication.
    pub fn take(&self) -> Took {
        // Partner: the fences of `give_back`, and of `Doorbell::lie_down` behind `lend`.
        fence(SeqCst);
        // turn edge, acquire side. Relaxed on failure: nothing is touched.
        match self.word.compare_exchange(FREE, HELD, Acquire, Relaxed) {
            Ok(_) => Took::Turn,
            Err(IO) => Took::Io,
            Err(_) => Took::Held,
        }
    }

    /// A channel, whose it is, gives it back: to whoever comes next. The caller must look once more whether
    /// there is something to take, and if so try [`Turn::take`] again. Returns false where the I/O thread had
    /// wanted it: then it has it, and must be rung for.
    #[must_use = "an I/O thread that is not rung for sleeps on"]
    pub fn give_back(&self) -> bool {
        // turn edge, release side. Relaxed on failure: the next exchange is the release.
        let freed = self.word.compare_exchange(HELD, FREE, Release, Relaxed);
        if freed.is_err() {
            self.hand_over();
            return false;
        }
        // Partner: the fence of `take`.
        fence(SeqCst);
        true
    }

    /// A channel, whose it is, gives it to the I/O thread, which must be rung for.
    pub fn hand_over(&self) {
        // turn edge, release side. Over `HELD` or `WANTED`: nobody else writes to a turn that is held but to
        // want it. (A swap, not a store: loom lets a store come before the exchange that it overwrites.)
        let _wanted_or_not = self.word.swap(IO, Release);
    }

    /// The I/O thread takes it back, or says that it wants it. Returns whether it has it.
    pub fn claim(&self) -> bool {
        // turn edge, acquire side, in each way to have it.
        let mut seen = self.word.load(Acquire);
        loop {
            let to = match seen {
                IO => return true,
                FREE => IO,
                HELD => WANTED,
                _ => return false,
            };
            match self.word.compare_exchange(seen, to, Acquire, Acquire) {
                Ok(_) => return to == IO,
                Err(actual) => seen = actual,
            }
        }
    }

    /// Whether a channel has it, or had a while ago.
    #[must_use]
    pub fn is_held(&self) -> bool {
        // Relaxed: a guess.
        matches!(self.word.load(Relaxed), HELD | WANTED)
    }

    /// A channel has published a packet: where the turn is free it has `write` take what is there, and looks
    /// again behind the turn's return, until nothing is.
    pub fn pass(
        &self,
        reorder: &ReorderBuffer,
        pin: impl Fn() -> Guard,
        mut write: impl FnMut(&mut ReorderReader) -> End,
    ) -> Passed {
        // Ends: each round but the last takes a packet, or finds that another has.
        loop {
            match self.take() {
                Took::Turn => {}
                Took::Held => return Passed::Done,
                Took::Io => return Passed::Io,
            }
            let mut reader = ReorderReader::resume(reorder);
            let end = write(&mut reader);
            if end == End::Io {
                self.hand_over();
                return Passed::Ring;
            }
            // Before the return: the look behind it has its order from the return's fence alone.
            let guard = pin();
            if !self.give_back() || end == End::Enough {
                return Passed::Ring;
            }
            if !reader.is_ready(reorder, &guard) {
                return Passed::Done;
            }
        }
    }

    /// What the I/O thread, which has lent it, finds. Behind [`Doorbell::lie_down`] before it sleeps; at other
    /// times a guess.
    ///
    /// [`Doorbell::lie_down`]: crate::reorder::doorbell::Doorbell::lie_down
    #[must_use]
    pub fn look(&self, reorder: &ReorderBuffer, guard: &Guard) -> Look {
        // Relaxed, as all that `resume` and `is_ready` load: ordered by the fence. `claim` has the edge.
        match self.word.load(Relaxed) {
            IO => Look::Io,
            FREE if ReorderReader::resume(reorder).is_ready(reorder, guard) => Look::Waiting,
            FREE => Look::Free,
            _ => Look::Held,
        }
    }
}

impl Default for Turn {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Turn")
            // Relaxed: for a human.
            .field("word", &self.word.load(Relaxed))
            .finish()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_turn_is_one_threads_and_the_io_thread_gets_it_back() {
        let turn = Turn::new();
        assert!(turn.claim() && turn.take() == Took::Io);
        turn.lend();
        assert_eq!(turn.take(), Took::Turn);
        assert_eq!(turn.take(), Took::Held);
        assert!(turn.give_back());
        assert_eq!(turn.take(), Took::Turn);
        assert!(!turn.claim() && !turn.claim());
        assert_eq!(turn.take(), Took::Held);
        assert!(!turn.give_back() && turn.claim());
        turn.lend();
        assert!(turn.claim());
        turn.lend();
        assert_eq!(turn.take(), Took::Turn);
        turn.hand_over();
        assert!(turn.claim());
    }
}
