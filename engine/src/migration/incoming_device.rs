//! One device's sections of the main channel, on the destination.
//!
//! ```text
//!   SETUP, PART…   PRE_COPY data ─▶ the device, or its session's data fd
//!   END            STOP_COPY data ─▶ the device; nothing, if the channels carry it
//!   FULL           config ─▶ the device; the notice or nothing, if the channels carry it
//! ```
//!
//! The thread that reads the main channel calls this module, for one device at a time.
//!
//! # What ends each wait
//!
//! | wait for | ended by |
//! |---|---|
//! | a section's bytes | the main channel's bytes or end |
//! | the device | its driver |
//! | PRE_COPY data over the channels | the counted packets; the migration's failure |

use std::{fmt, io::Read, time::Instant};

use super::{
    SwitchoverAck,
    incoming::Incoming,
    incoming_member::{Direct, Member, Way},
};
use crate::{
    device::Recover,
    error::{Error, Phase, Result, Violation},
    id::DeviceId,
    section::{Piece, SectionSink, Tag, load_state},
    settings::ConfigGate,
    state::DeviceState,
    sync::lock,
    trace,
};

impl Incoming {
    /// Returns the device to which a section of the main channel belongs.
    /// [`MainChannelOrder`](crate::stream::MainChannelOrder) checks whether the section may stand there.
    ///
    /// # Errors
    ///
    /// [`Violation::UnknownDevice`].
    pub fn device(&self, id: &DeviceId) -> Result<IncomingDevice<'_>> {
        let member = self.member(id)?;
        Ok(IncomingDevice {
            incoming: self,
            member,
        })
    }
}

/// One device's migration on the destination.
#[derive(Clone, Copy)]
pub struct IncomingDevice<'a> {
    incoming: &'a Incoming,
    member: &'a Member,
}

impl IncomingDevice<'_> {
    /// The device's name.
    #[must_use]
    pub const fn id(&self) -> &DeviceId {
        &self.member.id
    }

    /// Whether its data comes over the multifd channels.
    #[must_use]
    pub const fn uses_multifd(&self) -> bool {
        matches!(self.member.way, Way::Channels)
    }

    /// Loads the body of one of the device's sections, up to the tag that ends it and not a byte more.
    /// Blocks for
    /// as long as `body` and the device's driver do.
    ///
    /// # Errors
    ///
    /// As for [`load_state`], and the device's. The migration has then failed. If it had failed before, the
    /// error is that first reason, of whichever device.
    pub fn load_state<R: Read + ?Sized>(&self, body: &mut R) -> Result<Piece> {
        let loaded = self.load(body);
        loaded.map_err(|error| self.incoming.session.fail_device(&self.member.id, error))
    }

    fn load<R: Read + ?Sized>(&self, body: &mut R) -> Result<Piece> {
        if let Some(error) = self.incoming.failure() {
            return Err(error);
        }
        let Way::Main(direct) = &self.member.way else {
            let mut sink = Sink {
                incoming: self.incoming,
                member: self.member,
                direct: None,
                sent: None,
            };
            return load_state(body, &mut sink);
        };
        let mut direct = lock(direct);
        let mut sink = Sink {
            incoming: self.incoming,
            member: self.member,
            direct: Some(&mut direct),
            sent: None,
        };
        let piece = load_state(body, &mut sink)?;
        if piece.end == Tag::Config {
            if self.incoming.stop_after_load {
                let since = Instant::now();
                let device = direct.device.as_mut().ok_or_else(given_back)?;
                device.set_state(DeviceState::Stop, Recover::Reset)?;
                self.member.counters.phases.resume.add_since(since);
            }
            direct.loaded = true;
        }
        Ok(piece)
    }
}

fn given_back() -> Error {
    Error::misuse(Phase::Section, "the device has been given back")
}

impl fmt::Debug for IncomingDevice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IncomingDevice")
            .field("id", self.id())
            .field("uses_multifd", &self.uses_multifd())
            .finish_non_exhaustive()
    }
}

/// A device's sections, on their way to it.
struct Sink<'a> {
    incoming: &'a Incoming,
    member: &'a Member,
    direct: Option<&'a mut Direct>,
    /// How many packets of PRE_COPY data were said to have been sent.
    sent: Option<u32>,
}

impl Sink<'_> {
    fn refuse(&self, tag: Tag) -> Error {
        let violation = Violation::SectionTag(tag.value());
        Error::protocol(violation)
            .in_phase(Phase::Section)
            .on_device(&self.member.id)
    }
}

impl SectionSink for Sink<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let refused = self.refuse(Tag::Data);
        if self.member.over_channels {
            return Err(refused);
        }
        let switched = self.incoming.is_switched();
        let Some(direct) = &mut self.direct else {
            let session = self.incoming.session.get();
            return match session.filter(|_| !switched) {
                Some(session) => session.write_iterable_piece(&self.member.id, bytes),
                // From here on its data comes over the channels.
                None => Err(refused),
            };
        };
        if direct.loaded {
            return Err(refused);
        }
        let device = direct.device.as_mut().ok_or_else(given_back)?;
        let since = Instant::now();
        let written = device.write_resuming(bytes);
        let counters = &self.member.counters;
        if switched {
            counters.phases.write.add_since(since);
        }
        written?;
        counters.main_bytes.add(bytes.len() as u64);
        Ok(())
    }

    fn config(&mut self, input: &mut dyn Read) -> Result<()> {
        let refused = self.refuse(Tag::Config);
        // Over the channels it is the last packet.
        let Some(direct) = self.direct.as_mut().filter(|direct| !direct.loaded) else {
            return Err(refused);
        };
        let device = direct.device.as_mut().ok_or_else(given_back)?;
        let since = Instant::now();
        device.load_config(input)?;
        self.member.counters.phases.config.add_since(since);
        Ok(())
    }

    fn setup(&mut self, over_channels: bool) -> Result<bool> {
        let session = self.incoming.session.get();
        match (over_channels, self.member.over_channels, session) {
            (false, false, _) => Ok(true),
            (true, true, Some(session)) => {
                let id = &self.member.id;
                session.start_early(id)?;
                lock(&self.incoming.pending_acks)
                    .agreements
                    .retain(|other| other != id);
                Ok(true)
            }
            _ => {
                let violation = Violation::PrecopyOverChannels {
                    here: !over_channels,
                };
                Err(Error::protocol(violation).in_phase(Phase::Section))
            }
        }
    }

    fn precopy_sent(&mut self, count: u32) -> Result<bool> {
        self.sent = Some(count);
        Ok(self.member.over_channels)
    }

    fn init_data_sent(&mut self) -> Result<bool> {
        if self.member.over_channels {
            if !self.member.has_precopy()
                || self.incoming.ack == SwitchoverAck::Off
                || self.incoming.is_switched()
            {
                return Ok(false);
            }
            let session = self.incoming.session.get();
            let (Some(count), Some(session)) = (self.sent, session) else {
                return Ok(false);
            };
            session.wait_written(&self.member.id, count)?;
        }
        self.incoming.init_data_sent(self.member)
    }

    fn config_load_ready(&mut self) -> Result<bool> {
        match self.incoming.session.get() {
            Some(session) if self.direct.is_none() => {
                if self.member.config_gate == ConfigGate::AtOnce {
                    let violation = Violation::ConfigAfterIterables { here: false };
                    return Err(Error::protocol(violation).in_phase(Phase::Section));
                }
                session.config_load_ready(&self.member.id).map(|()| true)
            }
            _ => Ok(false),
        }
    }

    fn on_tag(&mut self, tag: Tag, _data_len: u64) {
        if tag != Tag::EndOfState {
            trace::load_state(&self.member.id, tag.value());
        }
    }

    fn on_data(&mut self, data_len: u64, taken: &Result<()>) {
        trace::load_state_device_data(&self.member.id, data_len, Error::trace_errno(taken));
    }
}
