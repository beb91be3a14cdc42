//! A ring that owns what the kernel borrows.
//!
//! ```text
//!   push(token, op) ──▶ in flight ──▶ submit() ──▶ kernel, worker thread, or simulation
//!                           │                                      │
//!   Completion { token, op, result } ◀── reap() ◀── wait() ◀───────┘
//! ```
//!
//! A buffer and its file go in with an operation and come back with its completion. In between the ring is
//! their only owner, so a caller has no lifetime to get wrong. A ring that is dropped cancels and reaps
//! first. What the kernel does not give back in time is leaked, never freed.
//!
//! Three rings implement the one trait [`Ring`]:
//!
//! | ring | for |
//! |---|---|
//! | [`KernelRing`] | io_uring |
//! | [`BlockingRing`] | hosts that forbid io_uring: plain system calls on threads of the ring's own |
//! | `SimRing` (feature `sim`) | tests: seeded; out of order, short, interrupted, failing |
//!
//! [`open`] makes the ring that the host supports. One thread uses a ring, and it sleeps only in
//! [`wait`](Ring::wait). A [`Waker`] ends that sleep from any thread, as a completion does.
//!
//! This crate knows no packet and no VFIO.
//!
//! # Example
//!
//! ```
//! use std::{sync::Arc, time::Duration};
//!
//! use vfio_migration_uring::{Backend, Link, Op, Ring, Token, Waker, open};
//!
//! # fn main() -> std::io::Result<()> {
//! let (mut ring, _chosen) =
//!     open::<Vec<u8>>(Backend::Auto, 2, Waker::new()?, Duration::from_secs(1))?;
//! let (reader, writer) = std::io::pipe()?;
//! let (reader, writer) = (Arc::new(reader.into()), Arc::new(writer.into()));
//!
//! // The read starts when all is written.
//! let (write, read) = (Token(0), Token(1));
//! let buffer = b"state".to_vec();
//! ring.push(write, Op::Write { fd: writer, buffer }, Link::Next)
//!     .expect("the token is free");
//! let buffer = vec![0; 16];
//! ring.push(read, Op::Read { fd: reader, buffer }, Link::End)
//!     .expect("the token is free");
//!
//! while ring.in_flight() > 0 {
//!     ring.wait(None)?;
//!     while let Some(completion) = ring.reap() {
//!         assert_eq!(completion.result?, 5);
//!         if let Op::Read { buffer, .. } = completion.op {
//!             assert_eq!(&buffer[..5], b"state");
//!         }
//!     }
//! }
//! # Ok(())
//! # }
//! ```

#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(not(all(
    target_os = "linux",
    target_pointer_width = "64",
    target_endian = "little"
)))]
compile_error!("vfio-migration-uring is for Linux on 64-bit, little-endian machines");

mod blocking;
mod buffer;
mod kernel;
mod op;
mod open;
mod ring;
#[cfg(feature = "sim")]
pub mod sim;
mod syscall;
pub mod thread;
mod time;
mod worker;

pub use crate::{
    blocking::BlockingRing,
    buffer::Buffer,
    kernel::{KernelRing, Support, support},
    op::{Completion, Fd, Link, Op, Rejected, Token},
    open::{Backend, UnknownBackend, open, open_with},
    ring::{Drained, MAX_CAPACITY, Ring, Waker},
    time::{deadline, later},
    worker::{SpawnWorker, Worker},
};
