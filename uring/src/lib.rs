//! A ring that owns what the kernel borrows.
//!
//! ```text
//!   push(token, op) ──▶ in flight ──▶ submit() ──▶ kernel, worker thread, or simulation
//!                           │                                      │
//!   Completion { token, op, result } ◀── reap() ◀── wait() ◀───────┘
//! ```
//!
//! A buffer and its file go in with an operation and come back with its completion. Between the
//! two the ring is their only owner, so there is no lifetime for a caller to get wrong. A ring
//! that goes away cancels and reaps first; what the kernel does not give back in time is leaked,
//! never freed.
//!
//! Three rings stand behind the one trait [`Ring`]:
//!
//! | ring | for |
//! |---|---|
//! | `kernel` | io_uring |
//! | `blocking` | hosts that forbid io_uring: plain system calls on threads of the ring's own |
//! | `sim` (feature `sim`) | tests: seeded; out of order, short, interrupted, failing |
//!
//! This crate knows no packet and no VFIO.

mod buffer;
mod op;
mod ring;

pub use crate::{
    buffer::Buffer,
    op::{Completion, Fd, Link, Op, Rejected, Token},
    ring::{Drained, Ring, Waker},
};
