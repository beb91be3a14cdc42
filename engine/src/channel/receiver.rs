//! The receiving side of a channel: reads headers, and reads payloads straight into leased buffers.
//!
//! ```text
//!   socket ─▶ staging (headers, small packets) ─┐
//!       │                                       ├─▶ a leased buffer ─▶ publish
//!       └─────────── payload, directly ─────────┘
//! ```
//!
//! One call reads the rest of a payload straight into its leased buffer, and what follows into the
//! channel's small staging area: only the next header after a large packet, as much as there is after a
//! small one. So a large packet is never copied and costs one system call, and many small packets share one
//! call.
//!
//! The receiver reads a header and checks the packet before it leases memory for the payload. A packet
//! beyond the budget waits in the socket and holds the source back.
//!
//! One thread owns a receiver. `channel.rs` says what ends its waits.

use std::{
    io,
    io::{IoSliceMut, Read},
    time::{Duration, Instant},
};

use vfio_migration_uring::deadline;

use super::{Channel, ChannelLimits, is_timeout};
use crate::{
    error::{Error, ErrorKind, Phase, Result, Violation},
    host::zeroed,
    id::DeviceId,
    lane::Buffer,
    stats::ChannelCounters,
    wire::{self, Frame, Framer, Hello, PacketHeader, Step},
};

/// How much a channel reads ahead of what it needs, at most.
pub(crate) const STAGING: usize = 64 << 10;

/// Packets from this size on are received without reading ahead beyond the next header.
const LARGE: usize = 32 << 10;

/// Where the rest of a packet goes.
pub(crate) enum Space {
    /// Into memory: this much of it.
    Memory(Buffer),
    /// It is to be spilled, all of it.
    Aside,
    /// Nowhere: its device is gone, and it is to be read past.
    Nowhere,
}

/// Where a channel's packets go: announce, lease, fill, publish; and announce again.
pub(crate) trait PacketSink {
    /// A packet on its way in.
    type Packet;

    /// Checks a packet of this name, header and length of data, before any of it is received.
    fn announce(
        &mut self,
        name: (&[u8], u32),
        header: PacketHeader,
        data_len: usize,
    ) -> Result<Self::Packet>;

    /// Which packet it is, for errors.
    fn place(packet: &Self::Packet) -> (&DeviceId, u32);

    /// How many bytes of its data have not been published.
    fn remaining(&self, packet: &Self::Packet) -> usize;

    /// Space for those, or for the first of them. Waits for it.
    fn lease(&mut self, packet: &mut Self::Packet) -> Result<Space>;

    /// Spills what [`PacketSink::lease`] said is to be, and publishes it. `receive` fills the bytes that it
    /// is given with the next ones of the packet, and is told whether they are its last.
    fn spill(
        &mut self,
        packet: &mut Self::Packet,
        receive: &mut dyn FnMut(&mut [u8], bool) -> Result<()>,
    ) -> Result<()>;

    /// Hears that the rest has been read past.
    fn passed(&mut self, packet: &mut Self::Packet);

    /// Publishes what a lease was filled with.
    fn publish(&mut self, packet: &mut Self::Packet, filled: Buffer) -> Result<()>;

    /// Publishes a packet without data.
    fn publish_empty(&mut self, packet: &mut Self::Packet) -> Result<()>;

    /// Gives up memory that is not in use: before a wait of unknown length.
    fn release_buffer(&mut self);

    /// Before a SYNC is handed on, for which the sink may keep the channel waiting until the other
    /// channels have come as far.
    fn before_sync(&mut self);

    /// The channel's counters.
    fn counters(&self) -> &ChannelCounters;
}

/// A channel's receiving side, on its thread.
pub(crate) struct Receiver {
    channel: Channel,
    number: u32,
    limits: ChannelLimits,
    framer: Framer,
    staging: Box<[u8]>,
    /// The part of `staging` that has been read and not used.
    filled: std::ops::Range<usize>,
    /// How far to read ahead.
    ahead: usize,
    /// How long the peer has been waited for within this packet.
    waited: Duration,
}

impl Receiver {
    pub(crate) fn new(channel: Channel, number: u32, limits: ChannelLimits) -> Result<Self> {
        let staging = zeroed(STAGING, "memory for a channel");
        let staging = staging.map_err(|error| error.on_channel(number))?;
        Ok(Self {
            framer: Framer::new(Some(channel.page_size), limits.max_packet),
            channel,
            number,
            limits,
            staging: staging.into(),
            filled: 0..0,
            ahead: wire::HELLO_LEN,
            waited: Duration::ZERO,
        })
    }

    fn name(&self, error: Error) -> Error {
        error.on_channel(self.number)
    }

    fn broken(&self, source: io::Error) -> Error {
        self.name(if is_timeout(&source) {
            Error::stalled(Phase::Receive, "the rest of the packet has not come")
        } else {
            Error::new(ErrorKind::Channel, Phase::Receive).caused_by(source)
        })
    }

    /// Counts a wait for the peer within a packet, which all together must not last for ever.
    fn waited_since(&mut self, since: Instant) -> Result<()> {
        self.waited += since.elapsed();
        if self.waited > self.limits.packet_timeout {
            return Err(self.broken(io::ErrorKind::TimedOut.into()));
        }
        Ok(())
    }

    fn truncated(&self) -> Error {
        self.name(Error::protocol(Violation::Truncated))
    }

    /// Receives packets until the peer ends the channel, and hands them on: receive → decode →
    /// publish. `greeted` gets the hello, read and as it came, and says whether it is welcome.
    pub(crate) fn run<I: PacketSink>(
        mut self,
        sink: &mut I,
        greeted: impl FnOnce(&Hello, &[u8]) -> Result<()>,
    ) -> Result<()> {
        self.hello(greeted)?;
        let timeout = self.limits.no_progress.min(self.limits.packet_timeout);
        self.channel
            .stream
            .set_timeout(timeout)
            .map_err(|error| self.broken(error))?;
        loop {
            let mut need = wire::PREFIX_LEN;
            self.waited = Duration::ZERO;
            if !self.fill(need, Some(&mut || sink.release_buffer()))? {
                // So the source knows that all has been read, and may close. It may have done so.
                let _told = self.channel.stream.finish();
                return Ok(());
            }
            // Ends: each round asks for more, up to the largest header.
            loop {
                let staged = &self.staging[self.filled.clone()];
                match self
                    .framer
                    .decode(staged)
                    .map_err(|error| self.name(error))?
                {
                    Step::More(more) => need = more,
                    Step::Frame {
                        frame: Frame::DeviceState(packet),
                        header_len,
                        ..
                    } => {
                        let name = (packet.header.idstr, packet.header.instance);
                        let len = packet.data_len as usize;
                        let packet = sink
                            .announce(name, packet.packet, len)
                            .map_err(|error| self.name(error))?;
                        self.filled.start += header_len;
                        self.device_state(sink, packet)
                            .map_err(|error| self.name(error))?;
                        break;
                    }
                    Step::Frame {
                        frame,
                        header_len,
                        payload_len,
                    } => {
                        let sync = matches!(frame, Frame::Sync { .. });
                        if sync {
                            sink.before_sync();
                        }
                        self.ram(sink.counters(), sync, header_len, payload_len)?;
                        break;
                    }
                }
                if !self.fill(need, None)? {
                    return Err(self.truncated());
                }
            }
        }
    }

    fn no_hello(&self) -> Error {
        self.name(Error::stalled(Phase::Receive, "its hello has not come"))
    }

    fn hello(&mut self, greeted: impl FnOnce(&Hello, &[u8]) -> Result<()>) -> Result<()> {
        let deadline = deadline(self.limits.hello_timeout);
        while self.filled.len() < wire::HELLO_LEN {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.no_hello());
            }
            self.channel
                .stream
                .set_timeout(left.max(Duration::from_millis(1)))
                .map_err(|error| self.broken(error))?;
            let bytes = &mut self.staging[self.filled.end..wire::HELLO_LEN];
            match self.channel.stream.read(bytes) {
                Ok(0) => return Err(self.truncated()),
                Ok(count) => self.filled.end += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The time that was left was this read's.
                Err(error) if is_timeout(&error) => return Err(self.no_hello()),
                Err(error) => return Err(self.broken(error)),
            }
        }
        let staged = &self.staging[..wire::HELLO_LEN];
        let frame = self
            .framer
            .decode(staged)
            .map_err(|error| self.name(error))?;
        let Step::Frame {
            frame: Frame::Hello(hello),
            ..
        } = frame
        else {
            unreachable!("64 bytes are a hello or an error");
        };
        greeted(&hello, staged).map_err(|error| self.name(error))?;
        self.filled = 0..0;
        self.ahead = STAGING;
        Ok(())
    }

    /// Has at least `need` bytes staged. False where the stream ends before the first of them; an
    /// error where it ends inside. `resting` is given where this is a packet's begin, before which
    /// a channel may wait for as long as the peer likes, and is called before it does.
    fn fill(&mut self, need: usize, mut resting: Option<&mut dyn FnMut()>) -> Result<bool> {
        if self.filled.is_empty() {
            self.filled = 0..0;
        }
        let begin = self.filled.is_empty();
        if self.filled.start + need > self.staging.len() {
            self.staging.copy_within(self.filled.clone(), 0);
            self.filled = 0..self.filled.len();
        }
        // Ends: with bytes, the stream's end, or its time-out.
        while self.filled.len() < need {
            if self.filled.is_empty()
                && let Some(rest) = resting.as_mut()
                && self.channel.stream.wait_readable(Duration::ZERO) == Some(false)
            {
                rest();
            }
            let end = (self.filled.start + need.max(self.ahead)).min(self.staging.len());
            let bytes = &mut self.staging[self.filled.end..end];
            let waits = resting.is_some() && self.filled.is_empty();
            let since = Instant::now();
            match self.channel.stream.read(bytes) {
                Ok(0) if self.filled.is_empty() && begin => return Ok(false),
                Ok(0) => return Err(self.truncated()),
                Ok(count) => {
                    self.filled.end += count;
                    if !waits {
                        self.waited_since(since)?;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    let timed_out = is_timeout(&error);
                    // Between packets a silent peer is the I/O thread's to judge: only it knows
                    // whether anything is missing.
                    if !(waits && timed_out) {
                        return Err(self.broken(error));
                    }
                }
            }
        }
        Ok(true)
    }

    fn device_state<I: PacketSink>(&mut self, sink: &mut I, mut packet: I::Packet) -> Result<()> {
        let large = sink.remaining(&packet) >= LARGE;
        self.ahead = if large {
            wire::DEVICE_PACKET_LEN
        } else {
            STAGING
        };
        sink.counters().packets.add(1);
        sink.counters().bytes.add(wire::DEVICE_PACKET_LEN as u64);
        if sink.remaining(&packet) == 0 {
            return sink.publish_empty(&mut packet);
        }
        // Each round publishes a byte at least, or reads past the rest.
        while sink.remaining(&packet) > 0 {
            let received = match sink.lease(&mut packet)? {
                Space::Memory(mut lease) => {
                    let last = lease.size() == sink.remaining(&packet);
                    let ahead = if last { self.ahead } else { 0 };
                    match self.receive(lease.bytes_mut(), ahead) {
                        Ok(()) => {
                            sink.publish(&mut packet, lease)?;
                            continue;
                        }
                        broken => broken,
                    }
                }
                Space::Aside => {
                    let ahead = self.ahead;
                    let mut receive =
                        |bytes: &mut [u8], last| self.receive(bytes, if last { ahead } else { 0 });
                    sink.spill(&mut packet, &mut receive)?;
                    continue;
                }
                Space::Nowhere => self.skip(sink.remaining(&packet)),
            };
            received.map_err(|error| {
                let (device, index) = I::place(&packet);
                error.on_device(device).at_index(index)
            })?;
            sink.passed(&mut packet);
        }
        Ok(())
    }

    /// Reads past so many bytes, over the staging area.
    fn skip(&mut self, mut left: usize) -> Result<()> {
        let staged = self.filled.len().min(left);
        self.filled.start += staged;
        left -= staged;
        // Each round reads a byte at least, or ends. Nothing is staged while bytes are left.
        while left > 0 {
            let most = left.min(self.staging.len());
            let since = Instant::now();
            match self.channel.stream.read(&mut self.staging[..most]) {
                Ok(0) => return Err(self.truncated()),
                Ok(count) => {
                    left -= count;
                    self.waited_since(since)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.broken(error)),
            }
        }
        Ok(())
    }

    /// Fills `bytes`, from what is staged and then from the stream; and stages up to `ahead` bytes
    /// of what follows, where it comes with the same read.
    fn receive(&mut self, bytes: &mut [u8], ahead: usize) -> Result<()> {
        let staged = self.filled.len().min(bytes.len());
        let (first, mut rest) = bytes.split_at_mut(staged);
        first.copy_from_slice(&self.staging[self.filled.start..self.filled.start + staged]);
        self.filled.start += staged;
        if rest.is_empty() {
            return Ok(());
        }
        self.filled = 0..0;
        // Each round reads a byte at least, or ends.
        while !rest.is_empty() {
            let len = rest.len();
            let mut buffers = [
                IoSliceMut::new(rest),
                IoSliceMut::new(&mut self.staging[..ahead]),
            ];
            let buffers = if ahead == 0 {
                &mut buffers[..1]
            } else {
                &mut buffers[..]
            };
            let since = Instant::now();
            match self.channel.stream.read_vectored(buffers) {
                Ok(0) => return Err(self.truncated()),
                Ok(count) if count >= len => {
                    self.filled = 0..count - len;
                    return Ok(());
                }
                Ok(count) => {
                    rest = &mut rest[count..];
                    self.waited_since(since)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.broken(error)),
            }
        }
        Ok(())
    }

    /// Hands a packet that is not device state to the sink, and skips what that leaves.
    fn ram(
        &mut self,
        counters: &ChannelCounters,
        sync: bool,
        header_len: usize,
        len: u32,
    ) -> Result<()> {
        let header = self.staging[self.filled.start..self.filled.start + header_len].to_vec();
        self.filled.start += header_len;
        let counter = if sync {
            &counters.syncs
        } else {
            &counters.ram_packets
        };
        counter.add(1);
        let mut sink = self.channel.sink.take();
        if sink.is_none() && !sync {
            return Err(self.name(Error::protocol(Violation::RamPacket)));
        }
        self.ahead = STAGING;
        let mut pages = Pages {
            receiver: self,
            left: len as usize,
            failure: None,
        };
        let handled = match &mut sink {
            Some(sink) if sync => sink.sync(&header),
            Some(sink) => sink.ram(&header, &mut pages),
            None => Ok(()),
        };
        let skipped = io::copy(&mut pages, &mut io::sink());
        let failure = pages.failure.take();
        self.channel.sink = sink;
        if let Some(error) = failure {
            return Err(error);
        }
        match handled.and(skipped) {
            Ok(_) => Ok(()),
            Err(error) => {
                Err(self.name(Error::new(ErrorKind::Channel, Phase::Receive).caused_by(error)))
            }
        }
    }
}

/// A RAM packet's page data.
struct Pages<'a> {
    receiver: &'a mut Receiver,
    left: usize,
    failure: Option<Error>,
}

impl Read for Pages<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = bytes.len().min(self.left);
        if count == 0 {
            return Ok(0);
        }
        match self.receiver.receive(&mut bytes[..count], 0) {
            Ok(()) => {
                self.left -= count;
                Ok(count)
            }
            Err(error) => {
                self.left = 0;
                let text = error.to_string();
                self.failure = Some(error);
                Err(io::Error::other(text))
            }
        }
    }
}
