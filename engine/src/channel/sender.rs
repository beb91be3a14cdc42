//! The sending side of a channel: sends the hello, then whole packets, each with one call.
//!
//! ```text
//!   greet() ─▶ send(headers, data)… ─▶ finish() ─▶ the channel, half-closed
//! ```
//!
//! A packet's headers stand in front of its data in the same buffer, or beside it. Either way one `writev`
//! sends both. One thread owns a sender. `channel.rs` says what ends its waits.

use std::{
    io,
    io::{IoSlice, Write},
    time::Duration,
};

use super::{Channel, ChannelLimits, is_timeout};
use crate::{
    error::{Error, ErrorKind, Phase, Result},
    first_failure::Hangup,
    wire::{self, Hello},
};

/// A channel's sending side, on its thread.
pub(crate) struct Sender {
    channel: Channel,
    number: u32,
    greeted: bool,
}

impl Sender {
    pub(crate) const fn new(channel: Channel, number: u32) -> Self {
        Self {
            channel,
            number,
            greeted: false,
        }
    }

    /// Makes it ready for its thread. Returns what ends its waits.
    pub(crate) fn adopt(&self) -> io::Result<Hangup> {
        self.channel.adopt()
    }

    /// Whether the peer has ended its side: nothing comes back on a channel, so it reads no more.
    pub(crate) fn is_ended(&self) -> bool {
        self.channel.stream.is_ended()
    }

    fn broken(&self, source: io::Error) -> Error {
        let error = if is_timeout(&source) {
            Error::stalled(Phase::Send, "the peer takes nothing")
        } else {
            Error::new(ErrorKind::Channel, Phase::Send).caused_by(source)
        };
        error.on_channel(self.number)
    }

    /// The error of a channel whose peer has ended its side.
    pub(crate) fn ended(&self) -> Error {
        self.broken(io::Error::new(
            io::ErrorKind::ConnectionAborted,
            "the destination has ended the channel",
        ))
    }

    /// Bounds its waits.
    pub(crate) fn set_timeout(&self, timeout: Duration) -> Result<()> {
        let set = self.channel.stream.set_timeout(timeout);
        set.map_err(|error| self.broken(error))
    }

    /// Opens the channel: hello and one SYNC. Nothing the second time.
    pub(crate) fn greet(&mut self, limits: &ChannelLimits, id: u8) -> Result<()> {
        if std::mem::replace(&mut self.greeted, true) {
            return Ok(());
        }
        self.set_timeout(limits.no_progress)?;
        let mut bytes = Hello {
            uuid: limits.uuid,
            id,
        }
        .encode()
        .to_vec();
        bytes.extend(wire::encode_sync(self.channel.page_size, 0));
        self.send(&mut [IoSlice::new(&bytes)])
    }

    /// Sends all bytes of all buffers, in their order.
    pub(crate) fn send(&mut self, mut buffers: &mut [IoSlice<'_>]) -> Result<()> {
        // Each round sends a byte at least, or ends.
        while !buffers.is_empty() {
            match self.channel.stream.write_vectored(buffers) {
                Ok(0) => return Err(self.broken(io::ErrorKind::WriteZero.into())),
                Ok(count) => IoSlice::advance_slices(&mut buffers, count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.broken(error)),
            }
        }
        Ok(())
    }

    /// Ends the channel, at a packet's boundary: its peer reads the end. It must not be closed yet, see
    /// [`Finished`].
    pub(crate) fn finish(&mut self) -> Result<()> {
        let finished = self.channel.stream.finish();
        finished.map_err(|error| self.broken(error))
    }

    /// The channel, once it is finished.
    pub(crate) fn into_channel(self) -> Channel {
        self.channel
    }
}
