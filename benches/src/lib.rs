//! What the benches share: the engine under load, the yardsticks beside it, and what both are
//! given and measured with.
//!
//! ```text
//!   source ──▶ channels ──▶ engine   ──▶ sink        one Plan: the same packets, bytes, fds
//!   source ──▶ channels ──▶ yardstick ─▶ sink
//!                 │                        │
//!                 └── start ── measure ── end
//! ```
//!
//! A [`plan::Plan`] says what moves; [`engine`] and each of [`yardstick`] move it, over the same
//! sources and sinks, and return a [`measure::Sample`]. The interval is the same for all: from just
//! before the first packet to just after the last write on a data fd. Threads are started, and
//! memory is allocated and touched, before it.

pub mod child;
pub mod engine;
pub mod kept;
pub mod latency;
pub mod measure;
pub mod plan;
pub mod roles;
pub mod scale;
pub mod sink;
pub mod slow;
pub mod source;
pub mod switchover;
pub mod yardstick;

/// The project's README: its examples compile.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
