//! The bounds that every model runs under, and what models share.
//!
//! | bound | value | set by |
//! |---|---|---|
//! | threads | 2 or 3, as each model says | the model |
//! | preemptions | 2, or 1 where a model says so; one more where `VFIO_LOOM_DEPTH=release` | `LOOM_MAX_PREEMPTIONS` overrides both |
//! | slots of a segment | 2 | `cfg(loom)` in the engine |
//! | buffers | 1 or 2 of one line of 64 bytes | the model |
//!
//! Loom does not see load buffering, nor the kernel's half of a ring, and it treats SeqCst accesses
//! as AcqRel; the engine has fences in their stead.
#![cfg(loom)]

use std::env;

use loom::sync::Arc;
use vfio_migration::internals::{
    pool::{Packer, Piece, Pool, PoolLayout},
    slot::{Packet, Payload},
};

/// Runs `f` under every schedule within the bounds.
pub fn model(f: impl Fn() + Send + Sync + 'static) {
    model_within(2, f);
}

/// As [`model`], with fewer preemptions, for models that have too many schedules otherwise.
pub fn model_within(preemptions: usize, f: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    let release = env::var("VFIO_LOOM_DEPTH").is_ok_and(|depth| depth == "release");
    let preemptions = preemptions + usize::from(release);
    builder.preemption_bound = builder.preemption_bound.or(Some(preemptions));
    builder.max_branches = 20_000;
    builder.check(f);
}

/// A pool of `buffers` buffers and `reserves` reserves of one line each.
#[must_use]
pub fn pool(buffers: u32, reserves: u32) -> Arc<Pool> {
    pool_of(buffers, 64, reserves)
}

/// As [`pool`], with buffers of `buffer_len` bytes.
#[must_use]
pub fn pool_of(buffers: u32, buffer_len: usize, reserves: u32) -> Arc<Pool> {
    Arc::new(Pool::new(PoolLayout {
        buffers,
        buffer_len,
        reserves,
        reserve_len: 64,
    }))
}

/// A packet whose bytes all are `value`, if there is memory for it.
pub fn filled(packer: &mut Packer<Arc<Pool>>, value: u8) -> Option<Packet> {
    let mut lease = packer.lease(64)?;
    lease.bytes_mut().fill(value);
    Some(data(lease.into_piece()))
}

/// A data packet of `piece`.
pub fn data(piece: Piece) -> Packet {
    Packet {
        payload: Payload::Piece(piece),
        config: false,
        more: false,
    }
}

/// A data packet that is a number.
pub fn aside(number: u64) -> Packet {
    Packet {
        payload: Payload::Aside(number),
        config: false,
        more: false,
    }
}

/// Reads a packet's bytes, which must all be one value, and gives its memory back.
pub fn consume(pool: &Arc<Pool>, packet: Packet) -> u8 {
    let Payload::Piece(piece) = packet.payload else {
        panic!("a packet with memory");
    };
    let lease = Pool::adopt(pool.clone(), piece);
    let value = lease.bytes()[0];
    assert!(lease.bytes().iter().all(|&byte| byte == value));
    value
}

/// A packet's number.
pub fn number(packet: &Packet) -> u64 {
    match packet.payload {
        Payload::Aside(number) => number,
        _ => panic!("a packet that is a number"),
    }
}
