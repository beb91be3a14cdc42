//! Publish out of order, take in order: every hand-over between threads, and nothing else.
//!
//! ```text
//!            channels (many)                                   driver (one)
//!   load     lease ─▶ fill ─▶ admit, publish at idx ─────────▶ take next ─▶ … ─▶ recycle
//!               ▲                                                                  │
//!               └──────────────────────────── pool ◀───────────────────────────────┘
//!   save     recycle ◀─ … ◀─ take a ticket ◀────────────────── publish ◀─ fill ◀─ lease
//!               └──────────────────────────── pool ──────────────────────────────────▲
//! ```
//!
//! | module | hands over |
//! |---|---|
//! | [`admission`] | nothing: it is the rule for who gets memory |
//! | [`pool`] | memory, from whoever is done with it to whoever needs it |
//! | [`slot`] | one packet, from its publisher to its taker |
//! | [`table`] | the slots themselves: put in place on demand, freed behind the takers |
//! | [`cursor`] | a device's packets, from the channels to the driver, in order |
//! | [`queue`] | all devices' packets, from the driver to the channels, each to one |
//! | [`doorbell`] | the driver's sleep |
//! | [`waiters`] | every other thread's sleep |
//! | [`control`] | what a device's migration has been told, and its end |
//!
//! (`refusals`, feature `faults`, lets a harness refuse leases.)
//!
//! No module here makes a system call of its own or knows a file, a device or a byte's meaning:
//! that is what makes them modellable. What the models show is written in each module's *Edges*.

pub mod admission;
pub mod control;
pub mod cursor;
pub mod doorbell;
pub mod pool;
pub mod queue;
#[cfg(feature = "faults")]
pub mod refusals;
pub mod slot;
pub mod table;
pub mod waiters;
