//! The source's channels before its session. They are greeted when the migration is set up. While the VM
//! runs they are silent, or carry PRE_COPY data.
//!
//! ```text
//!   greet() ─▶ SourceChannels ─ OutgoingDevice::iterate_over() … failure() ─▶ SaveBuilder::greeted_channels()
//! ```
//!
//! A destination waits a limited time for a channel's hello, and then any time for what follows. So the
//! source sends the hello at once, however long the VM runs on. The source can also see, before the VM
//! stops, whether the destination has ended a channel.
//!
//! The caller's thread owns the channels. It sends PRE_COPY packets on the channels in turn. All earlier
//! packets, of all devices, have been sent by then, so the destination can always load what it has. Any
//! thread may cancel.
//!
//! # What ends each wait
//!
//! | who waits | for | ended by |
//! |---|---|---|
//! | the caller, in a send | the peer, to take bytes | the peer; the time without progress; a cancellation, which hangs up all channels |

use std::{fmt, io::IoSlice, sync::Arc};

#[cfg(doc)]
use crate::error::ErrorKind;
use crate::{
    channel::{Channel, ChannelLimits, Sender},
    error::{Error, Phase, Result},
    first_failure::FirstFailure,
    id::DeviceId,
    session::{Canceller, host},
    settings::Settings,
    wire,
};

/// A source's multifd channels after the hello and before the session.
///
/// Make them when the migration is set up: the destination waits for a channel's hello no longer than its
/// [`Settings::hello_timeout`]. Dropping them closes the channels.
///
/// ```
/// use std::os::unix::net::UnixStream;
/// use vfio_migration::{SourceChannels, SaveSession, Settings};
///
/// let (near, far) = UnixStream::pair()?;
/// let channels = SourceChannels::greet(vec![near.into()], &Settings::default())?;
/// // … `OutgoingDevice::iterate_over(&mut channels, body)` for each device, for as long as it takes; then:
/// let session = SaveSession::builder().greeted_channels(channels);
/// # drop((session, far));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "dropping it closes the channels"]
pub struct SourceChannels {
    senders: Vec<Sender>,
    /// Which channel has the next packet.
    turn: usize,
    first_failure: Arc<FirstFailure>,
    canceller: Canceller,
}

impl SourceChannels {
    /// Greets the channels: sends a hello and one SYNC on each. `settings` are the session's.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Misuse`] for no channel, or more than 255; [`ErrorKind::Channel`] if a channel fails, or
    /// the destination has ended one; [`ErrorKind::Host`].
    pub fn greet(channels: Vec<Channel>, settings: &Settings) -> Result<Self> {
        let count = u8::try_from(channels.len()).unwrap_or(0);
        if count == 0 {
            return Err(Error::misuse(Phase::Setup, "a save has 1 to 255 channels"));
        }
        settings.check_numbers()?;
        let limits = ChannelLimits::new(settings, count.into());
        let first_failure = Arc::new(FirstFailure::default());
        let mut senders = Vec::with_capacity(channels.len());
        for (id, channel) in (0..count).zip(channels) {
            let mut sender = Sender::new(channel, id.into());
            first_failure.add(sender.adopt().map_err(host)?);
            sender.greet(&limits, id)?;
            senders.push(sender);
        }
        let failing = first_failure.clone();
        let canceller = Canceller::new(Phase::Save, move |error| {
            failing.fail(error);
        });
        let channels = Self {
            senders,
            turn: 0,
            first_failure,
            canceller,
        };
        channels.failure().map_or(Ok(channels), Err)
    }

    /// Returns a handle that cancels, also while another thread sends. The handle does nothing any more once a
    /// session has the channels.
    #[must_use]
    pub fn canceller(&self) -> Canceller {
        self.canceller.clone()
    }

    /// Returns why the channels have ended, if they have: a cancellation, a broken connection, or the
    /// destination's end. A destination ends a channel when it has failed, or refused the hello. This
    /// checks the
    /// channels now, without a wait; call it before the VM stops. The end of a VMM's own stream is only
    /// seen by a
    /// write.
    #[must_use]
    pub fn failure(&self) -> Option<Error> {
        if let Some(ended) = self.senders.iter().find(|sender| sender.is_ended()) {
            self.first_failure.fail(ended.ended());
        }
        self.first_failure.failure()
    }

    /// How many there are.
    pub(super) const fn count(&self) -> usize {
        self.senders.len()
    }

    /// Sends a packet of a device's data. Returns the bytes of its payload.
    pub(crate) fn send(&mut self, id: &DeviceId, index: u32, data: &[u8]) -> Result<usize> {
        let place = |error: Error| error.on_device(id).at_index(index);
        if let Some(error) = self.failure() {
            return Err(place(error));
        }
        let len = u32::try_from(data.len());
        let fits = u32::try_from(data.len() + wire::DEVICE_PACKET_LEN).is_ok();
        let (Ok(len), true) = (len, fits && index != wire::INVALID_INDEX) else {
            return Err(place(Error::misuse(
                Phase::Save,
                "more packets than idx can count, or too large a one",
            )));
        };
        let headers = wire::encode_packet(&wire::DeviceKey::new(id), index, false, len);
        let turn = self.turn % self.senders.len();
        self.turn = turn + 1;
        let sent = self.senders[turn].send(&mut [IoSlice::new(&headers), IoSlice::new(data)]);
        sent.map_err(|error| {
            // Part of the packet may have gone: nothing can go behind it.
            self.first_failure.fail(place(error));
            self.first_failure.failure().expect("it has just failed")
        })?;
        Ok(wire::PACKET_HEADER_LEN + data.len())
    }

    /// Gives the channels to a session, which hangs them up from now on.
    pub(super) fn hand_over(mut self) -> Vec<Sender> {
        self.canceller.retire();
        std::mem::take(&mut self.senders)
    }
}

impl Drop for SourceChannels {
    fn drop(&mut self) {
        self.canceller.retire();
    }
}

impl fmt::Debug for SourceChannels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SourceChannels")
            .field("channels", &self.senders.len())
            .field("failure", &self.failure())
            .finish_non_exhaustive()
    }
}
