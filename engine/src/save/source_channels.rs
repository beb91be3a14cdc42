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

use std::{
    fmt,
    io::IoSlice,
    sync::{Arc, PoisonError},
};

#[cfg(doc)]
use crate::error::ErrorKind;
use crate::{
    canceller::{Attached, Canceller},
    channel::{Channel, ChannelLimits, Sender},
    error::{Error, Phase, Result},
    first_failure::FirstFailure,
    id::DeviceId,
    session::host,
    settings::Settings,
    sync::{Mutex, lock},
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
    /// Behind a lock, for [`SourceChannels::failure`]: a stream of the VMM's may be `Send` alone.
    senders: Mutex<Vec<Sender>>,
    /// Which channel has the next packet.
    turn: usize,
    first_failure: Arc<FirstFailure>,
    canceller: Attached,
}

impl SourceChannels {
    /// Greets the channels: sends a hello and one SYNC on each. `settings` are the session's.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Misuse`] for no channel, or more than 255; [`ErrorKind::Channel`] if a channel fails, or
    /// the destination has ended one; [`ErrorKind::Host`].
    pub fn greet(channels: Vec<Channel>, settings: &Settings) -> Result<Self> {
        Self::greet_with(channels, settings, &Canceller::new())
    }

    /// As [`SourceChannels::greet`], ended by `canceller`: the whole migration's. It also ends this call, what is
    /// sent on the channels later, and the session that they are given to.
    ///
    /// # Errors
    ///
    /// As for [`SourceChannels::greet`]; the canceller's reason.
    pub fn greet_with(
        channels: Vec<Channel>,
        settings: &Settings,
        canceller: &Canceller,
    ) -> Result<Self> {
        canceller.check_in(Phase::Setup)?;
        let count = u8::try_from(channels.len()).unwrap_or(0);
        if count == 0 {
            return Err(Error::misuse(Phase::Setup, "a save has 1 to 255 channels"));
        }
        settings.check_numbers()?;
        let limits = ChannelLimits::new(settings, count.into());
        let first_failure = Arc::new(FirstFailure::default());
        let failing = first_failure.clone();
        let canceller = canceller.attach(Phase::Save, move |error| {
            failing.fail(error);
        });
        let mut senders = Vec::with_capacity(channels.len());
        for (id, channel) in (0..count).zip(channels) {
            let mut sender = Sender::new(channel, id.into());
            first_failure.add(sender.adopt().map_err(host)?);
            let greeted = sender.greet(&limits, id);
            greeted.map_err(|error| first_failure.failure().unwrap_or(error))?;
            senders.push(sender);
        }
        let channels = Self {
            senders: Mutex::new(senders),
            turn: 0,
            first_failure,
            canceller,
        };
        channels.failure().map_or(Ok(channels), Err)
    }

    /// Returns a handle that cancels, also while another thread sends. It goes on with the session that the
    /// channels are given to.
    #[must_use]
    pub fn canceller(&self) -> Canceller {
        self.canceller.canceller().clone()
    }

    /// Returns why the channels have ended, if they have: a cancellation, a broken connection, or the
    /// destination's end. A destination ends a channel when it has failed, or refused the hello. This
    /// checks the
    /// channels now, without a wait; call it before the VM stops. The end of a VMM's own stream is only
    /// seen by a
    /// write.
    #[must_use]
    pub fn failure(&self) -> Option<Error> {
        let ended = {
            let senders = lock(&self.senders);
            let ended = senders.iter().find(|sender| sender.is_ended());
            ended.map(Sender::ended)
        };
        if let Some(ended) = ended {
            self.first_failure.fail(ended);
        }
        self.first_failure.failure()
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        lock(&self.senders).len()
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
        let senders = self
            .senders
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        let turn = self.turn % senders.len();
        self.turn = turn + 1;
        let sent = senders[turn].send(&mut [IoSlice::new(&headers), IoSlice::new(data)]);
        sent.map_err(|error| {
            // Part of the packet may have gone: nothing can go behind it.
            self.first_failure.fail(place(error));
            self.first_failure.failure().expect("it has just failed")
        })?;
        Ok(wire::PACKET_HEADER_LEN + data.len())
    }

    /// Gives the channels to a session, which hangs them up from now on.
    pub(super) fn hand_over(self) -> Vec<Sender> {
        self.canceller.retire();
        std::mem::take(&mut *lock(&self.senders))
    }
}

impl fmt::Debug for SourceChannels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SourceChannels")
            .field("channels", &self.count())
            .field("failure", &self.failure())
            .finish_non_exhaustive()
    }
}
