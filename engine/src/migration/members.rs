//! What both sides of a migration do alike with all of a VM's devices.
//!
//! Of the devices, some go over the channels and belong to a session, and some go over the main channel. The
//! migration has one first reason to fail, one set of counters, and gives the devices back in the order given.
//! The caller's thread; nothing waits here.

use std::sync::{Arc, OnceLock};

use crate::{
    canceller::{Attached, Canceller},
    device::Device,
    error::{Error, Phase},
    id::DeviceId,
    load::LoadSession,
    save::SaveSession,
    stats::{DeviceCounters, Stats},
};

/// A session of either direction.
pub(super) trait Session {
    fn fail(&self, error: Error);
    fn failure(&self) -> Option<Error>;
    fn is_finished(&self) -> bool;
    fn stats(&self) -> Stats;
}

macro_rules! is_a_session {
    ($($session:ty),*) => {
        $(impl Session for $session {
            fn fail(&self, error: Error) {
                self.fail(error);
            }

            fn failure(&self) -> Option<Error> {
                self.failure()
            }

            fn is_finished(&self) -> bool {
                self.is_finished()
            }

            fn stats(&self) -> Stats {
                self.stats()
            }
        })*
    };
}

is_a_session!(LoadSession, SaveSession);

/// The session, if any device uses the channels, and why the migration has failed, if it has.
#[derive(Debug)]
pub(super) struct MemberSession<S> {
    session: Option<S>,
    /// Without a session. The first reason has one place: the session's, if there is one.
    failure: Arc<OnceLock<Error>>,
    canceller: Attached,
}

impl<S: Session> MemberSession<S> {
    pub(super) fn none(canceller: &Canceller, phase: Phase) -> Self {
        let failure: Arc<OnceLock<Error>> = Arc::default();
        let failing = failure.clone();
        Self {
            session: None,
            failure,
            canceller: canceller.attach(phase, move |error| {
                let _first = failing.get_or_init(|| error);
            }),
        }
    }

    /// What ends it.
    pub(super) fn canceller(&self) -> Canceller {
        self.canceller.canceller().clone()
    }

    pub(super) fn set(&mut self, session: S) {
        self.session = Some(session);
    }

    pub(super) const fn get(&self) -> Option<&S> {
        self.session.as_ref()
    }

    /// Takes all of it out; what is left has no session.
    pub(super) fn leave(&mut self) -> Self {
        let phase = Phase::Cleanup;
        let left = Self::none(&self.canceller(), phase);
        std::mem::replace(self, left)
    }

    pub(super) const fn take(&mut self) -> Option<S> {
        self.session.take()
    }

    /// Fails the migration. The first reason counts.
    pub(super) fn fail(&self, error: Error) {
        match &self.session {
            Some(session) => session.fail(error),
            None => {
                let _first = self.failure.get_or_init(|| error);
            }
        }
    }

    /// Why the migration has failed.
    pub(super) fn failure(&self) -> Option<Error> {
        match &self.session {
            Some(session) => session.failure(),
            None => self.failure.get().cloned(),
        }
    }

    /// A device has failed. Returns the migration's first reason, which may be another device's, or no
    /// device's at all.
    pub(super) fn fail_device(&self, id: &DeviceId, error: Error) -> Error {
        self.failure().unwrap_or_else(|| {
            let error = error.on_device(id);
            self.fail(error.clone());
            error.into_public()
        })
    }

    pub(super) fn is_finished(&self) -> bool {
        self.session.as_ref().is_none_or(S::is_finished)
    }

    /// The session's counters, to be [`merge`]d.
    pub(super) fn stats(&self) -> Stats {
        let stats = self.session.as_ref().map(S::stats);
        stats.unwrap_or_else(Stats::main_channel_alone)
    }
}

/// Adds to the session's counters what it does not know: the sections of its devices, and the other devices.
pub(super) fn merge<'a>(
    stats: &mut Stats,
    members: impl Iterator<Item = (&'a DeviceId, &'a DeviceCounters)>,
) {
    let of_session = std::mem::take(&mut stats.devices);
    let both = |(id, counters): (&DeviceId, &DeviceCounters)| {
        let own = counters.snapshot(id);
        let Some(known) = of_session.iter().find(|stats| stats.device == *id) else {
            return own;
        };
        let mut both = known.clone();
        both.main_bytes += own.main_bytes;
        both.bytes += own.bytes;
        both.packets += own.packets;
        both.phases.stop += own.phases.stop;
        both.starts.stop = both.starts.stop.or(own.starts.stop);
        both
    };
    stats.devices = members.map(both).collect();
}

/// Takes the device of this name out of those that came back; `None` if it did not.
pub(super) fn take_device(devices: &mut Vec<Device>, id: &DeviceId) -> Option<Device> {
    let at = devices.iter().position(|device| device.id() == id)?;
    Some(devices.swap_remove(at))
}
