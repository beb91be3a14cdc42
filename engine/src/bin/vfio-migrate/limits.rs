//! How many files may be open: enough for what was asked, or that is said before anything begins.
//!
//! | a process of | has open for each |
//! |---|---|
//! | `send`, `receive` | channel: its socket, and a copy with which it is hung up on |
//! | `relay` | channel: the same on both sides |
//! | all that have devices | device: its data, the pipes or files behind that, events |
//!
//! The soft limit is the process's own and is raised; the hard one is the host's. Pure but for that.

use anyhow::{Context, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// What a process has open in any case: its standard files, rings and events, a listener and the
/// main channel; and some strangers.
const ALWAYS: u64 = 48 + STRANGERS;

/// How many connections that have not said what they are have a place in any case.
const STRANGERS: u64 = 16;

/// The most channels that a migration has: as many as QEMU makes.
const MOST_CHANNELS: u32 = 255;

/// How many of them may have one.
const MOST_STRANGERS: u64 = 256;

/// What a device has open.
const DEVICE: u64 = 8;

/// What a channel's connection has open.
const CONNECTION: u64 = 2;

/// How many files a command needs.
pub(crate) const fn files(connections: u64, devices: u64) -> u64 {
    ALWAYS + CONNECTION * connections + DEVICE * devices
}

/// Sees to it that `needed` files may be open, for `what`.
pub(crate) fn allow(needed: u64, what: &str) -> anyhow::Result<()> {
    let limit = Resource::RLIMIT_NOFILE;
    let (soft, hard) = getrlimit(limit).context("cannot ask for the limit of open files")?;
    if soft >= needed {
        return Ok(());
    }
    ensure!(
        hard >= needed,
        "{what} need up to {needed} open files, and no more than {hard} are allowed here: raise \
         the hard limit (ulimit -Hn, LimitNOFILE=) or ask for less"
    );
    setrlimit(limit, hard, hard).context("cannot raise the limit of open files")
}

/// Sees to it that a migration of `devices` devices over `channels` channels may have its files.
/// Returns how many those are.
pub(crate) fn allow_migration(channels: u32, devices: usize) -> anyhow::Result<u64> {
    let needed = files(channels.into(), devices as u64);
    allow(
        needed,
        &format!("{channels} channels and {devices} devices"),
    )?;
    Ok(needed)
}

/// As [`allow_migration`], for a relay of `channels` channels; where they are not counted yet, of as
/// many as there may be and the host allows.
pub(crate) fn allow_relay(channels: Option<u32>) -> anyhow::Result<u64> {
    let needed = |channels: u32| files(2 * u64::from(channels), 0);
    if let Some(channels) = channels {
        allow(needed(channels), &format!("{channels} channels"))?;
        return Ok(needed(channels));
    }
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let needed = needed(MOST_CHANNELS).min(hard);
    allow(needed, "channels")?;
    Ok(needed)
}

/// How many connections that have not said what they are may have a place, beside `needed` files:
/// so that strangers never take those.
pub(crate) fn strangers(needed: u64) -> usize {
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or_default();
    let more = soft.saturating_sub(needed);
    (STRANGERS + more).min(MOST_STRANGERS) as usize
}
