//! What the source says on the main channel: read in its order, compared with this side's devices, and told to
//! the session.
//!
//! A thread of its own; it ends with the description behind the VM's state, a failure, a source's silence, or
//! when nobody wants to know any more.

use std::{collections::HashSet, sync::OnceLock, time::Instant};

use anyhow::{anyhow, bail, ensure};
use vfio_migration::{
    DeviceId, Error, ErrorKind, Phase, Violation,
    migration::Incoming,
    section::Tag,
    stream::{Command, Event, MainChannelOrder, Reader, Reply, SectionKind},
};

use super::Options;
use crate::{
    Interrupted,
    device::Subject,
    failure::About,
    main_channel::{
        REASON, ReturnPath, STILL_HERE, interrupted, main_failed, show_reason, timed_out,
    },
    network::{Connection, TICK},
};

/// Reads the main channel: its thread.
pub(super) struct MainChannel<'a> {
    pub(super) options: &'a Options,
    pub(super) connection: &'a Connection,
    pub(super) path: &'a ReturnPath,
    pub(super) incoming: &'a Incoming,
    pub(super) subjects: &'a [Subject],
    /// When the switchover started.
    pub(super) switched: &'a OnceLock<Instant>,
    /// Set when the source has said that it has made as many channels as are expected.
    pub(super) announced: &'a OnceLock<()>,
    /// Set when nobody wants to know any more.
    pub(super) enough: &'a OnceLock<()>,
}

impl MainChannel<'_> {
    /// Waits for the source's next word.
    fn wait(&self) -> anyhow::Result<()> {
        let since = Instant::now();
        while !self.connection.wait_readable(TICK)? {
            ensure!(self.enough.get().is_none(), "the load has ended");
            // While packets are awaited the session is the judge: it knows which.
            let loading = self.switched.get().is_some() && !self.incoming.is_finished();
            let times = if loading { 2 } else { 1 };
            ensure!(
                since.elapsed() < self.options.timeout.saturating_mul(times),
                "nothing was heard from the source for {} s",
                self.options.timeout.saturating_mul(times).as_secs_f64()
            );
        }
        Ok(())
    }

    /// All devices of this side must be the source's.
    fn compare(&self, named: &HashSet<DeviceId>) -> anyhow::Result<()> {
        let lacking = self
            .subjects
            .iter()
            .find(|subject| !named.contains(&subject.id));
        match lacking {
            Some(Subject { id, .. }) => bail!(About {
                device: id.clone(),
                what: format!("device {id} is on the destination, but the source does not have it"),
            }),
            None => Ok(()),
        }
    }

    fn device(&self, owner: &DeviceId) -> anyhow::Result<&DeviceId> {
        let mut ids = self.subjects.iter().map(|subject| &subject.id);
        let found = ids.find(|id| *id == owner);
        found.ok_or_else(|| {
            let what = "is on the source, but the destination does not have it";
            anyhow!(About {
                device: owner.clone(),
                what: format!("device {owner} {what}"),
            })
        })
    }

    /// Reads up to the description behind the end of the VM's state.
    fn read(&self) -> anyhow::Result<()> {
        let mut named = HashSet::new();
        let ids = self.subjects.iter().map(|subject| subject.id.clone());
        let mut order = MainChannelOrder::new(ids);
        self.wait()?;
        let mut reader = Reader::open(self.connection.try_clone()?)?;
        loop {
            self.wait()?;
            let event = reader.next_event()?;
            if let Some(event) = &event {
                if *event == Event::Command(Command::SwitchoverStart) {
                    self.compare(&named)?;
                }
                order.event(event)?;
            }
            match event {
                Some(Event::Section(section)) => {
                    let id = self.device(&section.owner)?;
                    named.insert(id.clone());
                    let piece = self.incoming.device(id)?.load_state(reader.body()?)?;
                    order.body(&section, &piece)?;
                    reader.footer()?;
                    if self.options.capabilities.config_after_iterables
                        && section.kind == SectionKind::Full
                        && piece.end != Tag::ConfigLoadReady
                    {
                        let violation = Violation::ConfigAfterIterables { here: true };
                        let error = Error::protocol(violation).in_phase(Phase::Section);
                        bail!(error.on_device(id));
                    }
                }
                Some(Event::Command(Command::Ping(value))) => {
                    if value != STILL_HERE && !named.is_empty() {
                        self.compare(&named)?;
                    }
                    let said = self.path.reply(&Reply::Pong(value));
                    said.map_err(|error| self.explain(error, "has taken nothing"))?;
                }
                Some(Event::Command(Command::SwitchoverStart)) => {
                    self.switched.get_or_init(Instant::now);
                    self.incoming.switchover_start()?;
                }
                Some(Event::Command(Command::Other {
                    command: REASON,
                    payload,
                })) => bail!("the source has failed: {}", show_reason(&payload)),
                Some(Event::Configuration { .. } | Event::Command(_)) => {}
                Some(Event::Eof) => ensure!(
                    self.switched.get().is_some(),
                    "the main channel has ended, and the switchover was never started"
                ),
                Some(Event::Description(description)) => {
                    return self.count_channels(&description);
                }
                // A source that is gone now does not hear that all is loaded.
                None => return Ok(()),
                other => bail!("the main channel has {other:?} where it cannot be"),
            }
        }
    }

    /// The source says how many channels it has made. Behind a relay they may come later than that.
    fn count_channels(&self, description: &[u8]) -> anyhow::Result<()> {
        let json = serde_json::from_slice::<serde_json::Value>(description);
        let made = json.ok().and_then(|json| json["channels"].as_u64());
        let expected = self.options.channels;
        if let Some(made) = made {
            ensure!(
                made == u64::from(expected),
                "the source has made {made} multifd channels, not {expected}: --channels must be \
                 the same on both sides"
            );
            self.announced.get_or_init(|| ());
        }
        Ok(())
    }

    /// Why a connection failed: a time-out of its own is the source's silence.
    fn explain(&self, error: Error, silence: &str) -> anyhow::Error {
        let timeout = self.options.timeout.as_secs_f64();
        let ended = matches!(
            error.kind(),
            ErrorKind::Protocol(Violation::SectionTruncated { .. }) | ErrorKind::Channel
        );
        if interrupted(&error) {
            anyhow!(Interrupted)
        } else if timed_out(&error) {
            anyhow!("the source {silence} for {timeout} s")
        } else if ended {
            anyhow!(error).context("the source has gone away")
        } else {
            anyhow!(error)
        }
    }

    /// Reads, and fails the session where that fails.
    pub(super) fn run(&self) -> anyhow::Result<()> {
        self.read().map_err(|error| {
            let engine = error.downcast_ref::<Error>();
            let engine = engine.filter(|error| error.device().is_some());
            self.incoming
                .fail(engine.cloned().unwrap_or_else(main_failed));
            match error.downcast::<Error>() {
                Ok(error) if error.phase() == Phase::Section => {
                    self.explain(error, "has said nothing")
                }
                Ok(error) => anyhow!(error),
                Err(error) => error,
            }
        })
    }
}
