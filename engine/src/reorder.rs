//! Publish out of order, take in order: every hand-over between threads, and nothing else.
//!
//! ```text
//!            channels (many)                                   I/O thread (one)
//!   load     lease ─▶ fill ─▶ admit, publish at idx ─────────▶ take next ─▶ … ─▶ recycle
//!               ▲                                                                  │
//!               └──────────────────────────── pool ◀───────────────────────────────┘
//!   save     recycle ◀─ … ◀─ take a ticket ◀────────────────── publish ◀─ fill ◀─ lease
//!               └──────────────────────────── pool ──────────────────────────────────▲
//! ```
//!
//! | module | hands over |
//! |---|---|
//! | [`memory_policy`] | nothing: it is the rule for who gets memory |
//! | [`pool`] | memory, from the thread that is done with it to the thread that needs it |
//! | [`slot`] | one packet, from its publisher to its taker |
//! | [`table`] | the slots themselves: made on demand, freed behind the takers |
//! | [`reorder_buffer`] | a device's packets, from the channels to the I/O thread, in order |
//! | [`turn`] | who takes from it and writes, from the I/O thread to a channel and back |
//! | [`send_queue`] | all devices' packets, from the I/O thread to the channels, each to one |
//! | [`doorbell`] | a wake-up, to the I/O thread |
//! | [`waiters`] | a wake-up, to any other thread |
//! | [`flags`] | a device's one-way flags: started, switched, config ready, stop, ended |
//!
//! (`refusals`, feature `faults`, lets a test harness refuse leases.)
//!
//! No module here makes a system call of its own, or knows a file, a device or the meaning of a byte. That
//! makes them fit for models. Each module's *Edges* section says what the models show.

pub mod doorbell;
pub mod flags;
pub mod memory_policy;
pub mod pool;
#[cfg(feature = "faults")]
pub mod refusals;
pub mod reorder_buffer;
pub mod send_queue;
pub mod slot;
pub mod table;
pub mod turn;
pub mod waiters;
