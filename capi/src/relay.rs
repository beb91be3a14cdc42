//! A relay: passes a migration's channels on, from a source's connections to a destination's.

#![expect(unsafe_code, reason = "the functions' names are exported")]

use std::{
    ffi::c_int,
    mem::{self, MaybeUninit},
    os::fd::{AsFd, AsRawFd},
    sync::{Arc, RwLock},
};

use vfio_migration::{Relay, Result, Stats};

use crate::{
    border::{change, given, guard, hand_out, look, misuse, quiet},
    cancel::{Cancel, CancellerHandle},
    channel::ChannelHandle,
    failure::{Code, ErrorHandle},
    settings::SettingsHandle,
    stats::StatsHandle,
};

const BUSY: &str = "relay: another thread joins it";

enum Stage {
    Running(Relay),
    Over(Result<()>, Option<Box<Stats>>),
}

/// A relay under way, between two VMMs. The main channel is the caller's to pass on. Any thread. Free it with
/// `vfm_relay_free`.
pub struct RelayHandle {
    cancel: Arc<Cancel>,
    stage: RwLock<Stage>,
}

impl RelayHandle {
    fn running<T>(&self, work: impl FnOnce(&Relay) -> Result<T>) -> Result<T> {
        match &*look(&self.stage, BUSY)? {
            Stage::Running(relay) => work(relay),
            Stage::Over(..) => Err(misuse("relay: it is over")),
        }
    }
}

/// Starts a relay; VFM_SETTING_CHANNELS says how many channels it has. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_relay_start(
    settings: Option<&SettingsHandle>,
    relay: Option<&mut MaybeUninit<*mut RelayHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let chosen = given(settings, "settings: NULL")?.chosen();
        let relay = given(relay, "relay: NULL")?;
        let mut builder = Relay::builder().settings(chosen.session);
        if let Some(spawner) = chosen.spawner {
            builder = builder.spawn_with(move |task| spawner(task));
        }
        let started = builder.start()?;
        let cancel = Arc::<Cancel>::default();
        cancel.aim(started.canceller());
        let stage = RwLock::new(Stage::Running(started));
        hand_out(relay, RelayHandle { cancel, stage });
        Ok(())
    })
}

/// Adds a pair of channels: what comes from `source` goes to `destination`. Both are the relay's. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_relay_add_channel(
    relay: Option<&RelayHandle>,
    source: Option<&ChannelHandle>,
    destination: Option<&ChannelHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let relay = given(relay, "relay: NULL")?;
        let source = given(source, "source: NULL")?;
        let destination = given(destination, "destination: NULL")?;
        relay.running(|relay| {
            let source = source.take()?;
            relay.add_channel(source, destination.take()?)
        })
    })
}

/// No further pair will be added. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_relay_no_more_channels(
    relay: Option<&RelayHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        given(relay, "relay: NULL")?.running(|relay| {
            relay.no_more_channels();
            Ok(())
        })
    })
}

/// Returns why the relay has failed, if it has: VFM_CODE_OK and no error while it has not. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_relay_failure(
    relay: Option<&RelayHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let relay = given(relay, "relay: NULL")?;
        match &*look(&relay.stage, BUSY)? {
            Stage::Running(relay) => relay.failure().map_or(Ok(()), Err),
            Stage::Over(result, _) => result.clone(),
        }
    })
}

/// Returns whether `vfm_relay_join` returns soon. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_relay_is_finished(relay: Option<&RelayHandle>) -> bool {
    quiet(false, || {
        let stage = relay.and_then(|relay| look(&relay.stage, BUSY).ok());
        match stage.as_deref() {
            Some(Stage::Running(relay)) => relay.is_finished(),
            Some(Stage::Over(..)) => true,
            None => false,
        }
    })
}

/// Returns an eventfd, as `vfm_load_eventfd` does. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_relay_eventfd(relay: Option<&RelayHandle>) -> c_int {
    quiet(-1, || {
        let found = relay.map(|relay| relay.running(|it| Ok(it.as_fd().as_raw_fd())));
        found.and_then(Result::ok).unwrap_or(-1)
    })
}

/// Makes a copy of the counters as they are now, or as they were at the end. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_relay_stats(
    relay: Option<&RelayHandle>,
    stats: Option<&mut MaybeUninit<*mut StatsHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let relay = given(relay, "relay: NULL")?;
        let stats = given(stats, "stats: NULL")?;
        let now = match &*look(&relay.stage, BUSY)? {
            Stage::Running(relay) => relay.stats(),
            Stage::Over(_, Some(last)) => (**last).clone(),
            Stage::Over(_, None) => return Err(misuse("relay: it is over")),
        };
        hand_out(stats, StatsHandle::new(now));
        Ok(())
    })
}

/// Makes a handle that cancels the relay. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_relay_canceller(
    relay: Option<&RelayHandle>,
    canceller: Option<&mut MaybeUninit<*mut CancellerHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let relay = given(relay, "relay: NULL")?;
        let canceller = given(canceller, "canceller: NULL")?;
        hand_out(canceller, CancellerHandle(relay.cancel.clone()));
        Ok(())
    })
}

/// Waits until everything has been passed on, or the relay has failed, and closes the channels. It returns the first
/// failure. Any thread, once.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_relay_join(
    relay: Option<&RelayHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let relay = given(relay, "relay: NULL")?;
        let mut stage = change(&relay.stage);
        let over = Stage::Over(Err(misuse("relay: it is over")), None);
        match mem::replace(&mut *stage, over) {
            Stage::Running(running) => {
                let ended = running.join();
                let stats = Some(Box::new(ended.stats.clone()));
                *stage = Stage::Over(ended.result.clone(), stats);
                ended.result.clone()
            }
            over @ Stage::Over(..) => {
                *stage = over;
                Err(misuse("relay: it has been joined"))
            }
        }
    })
}

/// Frees a relay. One that runs is cancelled first. NULL is nothing. No other thread may be in a call with it.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_relay_free(relay: Option<Box<RelayHandle>>) {
    quiet((), || drop(relay));
}
