//! One channel to the destination, shared by the two threads that send on it.
//!
//! A destination's channel stops at a SYNC until all channels have reached theirs. An egress channel that
//! has sent more SYNCs than another is *ahead*: nobody may be reading at its other end until the other
//! channel has sent its SYNC too. So device state is sent only on egress channels that are not ahead
//! (`Shared::may_send`). The sender checks this and takes the packet under the sender's lock, so the packet
//! cannot end up behind a barrier that waits for it.
//!
//! # Edges
//!
//! There is none. The sender's lock orders what is sent, and each egress channel's count is written by its
//! own ingress thread alone. An old count of another channel can only be too low; then an egress thread
//! waits for the next notification.

use std::io::IoSlice;

use crate::{
    channel::{Channel, Sender},
    error::Result,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
        lock_across_waits,
    },
};

/// One channel's way out.
pub(super) struct EgressChannel {
    number: u32,
    /// How many SYNCs have been sent. Written under the sender's lock.
    syncs: AtomicU32,
    sender: Mutex<Sender>,
    /// How many threads of all egress channels have something to send now.
    sending: Arc<AtomicU32>,
}

impl EgressChannel {
    pub(super) fn new(number: u32, sender: Sender, sending: Arc<AtomicU32>) -> Self {
        Self {
            number,
            syncs: AtomicU32::new(0),
            sender: Mutex::new(sender),
            sending,
        }
    }

    pub(super) const fn number(&self) -> u32 {
        self.number
    }

    /// Sends one packet with one call.
    pub(super) fn send(&self, buffers: &mut [IoSlice<'_>]) -> Result<()> {
        self.with_sender(|sender| sender.send(buffers))
    }

    /// Runs `send` with the sender, for one packet that is sent with several calls.
    pub(super) fn with_sender<R>(&self, send: impl FnOnce(&mut Sender) -> R) -> R {
        // Relaxed: a count, for whoever has waited for long.
        self.sending.fetch_add(1, Ordering::Relaxed);
        let sent = send(&mut lock_across_waits(&self.sender));
        // Relaxed: as above.
        self.sending.fetch_sub(1, Ordering::Relaxed);
        sent
    }

    /// Ends the channel's sending side. A destination that has closed first is no failure: all
    /// was sent, and whether it has been read is for the main channel to say.
    pub(super) fn finish(&self) -> Result<()> {
        match lock_across_waits(&self.sender).finish() {
            Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ENOTCONN as i32) => {
                Ok(())
            }
            finished => finished,
        }
    }

    /// The channel, once it is finished.
    pub(super) fn into_channel(self) -> Channel {
        let sender = self.sender.into_inner();
        sender
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .into_channel()
    }

    /// Sends a SYNC, and counts it. The ingress thread.
    pub(super) fn sync(&self, header: &[u8]) -> Result<()> {
        self.with_sender(|sender| {
            sender.send(&mut [IoSlice::new(header)])?;
            // Relaxed: under the lock; for others a count that only grows.
            self.syncs.fetch_add(1, Ordering::Relaxed);
            Ok(())
        })
    }

    /// How many SYNCs have been sent: with the first, the channel is open for device state.
    pub(super) fn syncs(&self) -> u32 {
        // Relaxed: as above.
        self.syncs.load(Ordering::Relaxed)
    }
}
