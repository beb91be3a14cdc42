//! One migration channel: exact reads and writes, QEMU's multifd framing.
//!
//! ```text
//!   receive    socket ─▶ staging (headers, small packets) ─┐
//!                  │                                       ├─▶ a leased buffer ─▶ publish
//!                  └─────────── payload, directly ─────────┘
//!   send       a leased buffer, headers already in it ─▶ socket
//! ```
//!
//! Receiving, one call reads the rest of a payload straight into its leased buffer and what follows
//! it into a small staging area of the channel's own: after a large packet just the next header,
//! after a small one as much as there is. So a large packet is never copied and costs one system
//! call, and many small ones share one.
//!
//! A header is read, and its packet checked, before memory is leased for its payload: a packet
//! beyond the budget waits in the socket, and holds the source back.
//!
//! Each channel is served by one thread, which owns it. What ends its waits: the peer's bytes or its
//! end; within a packet the socket's time-out, and for a peer that brings a byte now and then the time
//! that a packet may take; [`Hangup`], which shuts the connection down.

use std::{
    fmt, io,
    io::{IoSlice, IoSliceMut, Read, Write},
    time::{Duration, Instant},
};

use vfio_migration_uring::deadline;

mod stream;

pub(crate) use self::stream::Finished;
use self::stream::{Custom, ReadOnly, Stream};
use crate::{
    error::{Error, ErrorKind, Phase, Result, Violation},
    host::zeroed,
    id::DeviceId,
    lane::Buffer,
    stats::ChannelCounters,
    verdict::Hangup,
    wire::{self, Frame, Framer, Hello, PacketHeader, PageSize, Step},
};

/// How much a channel reads ahead of what it needs, at most.
pub(crate) const STAGING: usize = 64 << 10;

/// Packets from this size on are received without reading ahead beyond the next header.
const LARGE: usize = 32 << 10;

/// What a VMM does with the packets on a shared channel that are not device state.
///
/// Called on the channel's thread, in the order of the channel. A sink that blocks holds up this
/// channel alone; that of a SYNC may, until the VMM's main thread has seen the SYNC of all.
pub trait RamSink: Send {
    /// A RAM packet: its header, and exactly its page data to be read. What is left unread is
    /// skipped.
    ///
    /// # Errors
    ///
    /// Fail the migration.
    fn ram(&mut self, header: &[u8], pages: &mut dyn Read) -> io::Result<()>;

    /// A SYNC packet.
    ///
    /// # Errors
    ///
    /// Fail the migration.
    fn sync(&mut self, header: &[u8]) -> io::Result<()>;
}

/// One connection of a migration, not yet in use.
///
/// ```
/// use std::os::unix::net::UnixStream;
/// use vfio_migration::Channel;
///
/// let (ours, theirs) = UnixStream::pair()?;
/// let channel = Channel::from(ours);
/// # drop((channel, theirs));
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// A session bounds each wait for a peer that is silent within a packet, but between packets a channel may
/// be silent for as long as the VM runs. That a TCP peer's host has vanished is for the socket to find, and
/// the socket is the embedder's: `SO_KEEPALIVE` (with `TCP_KEEPIDLE`, `TCP_KEEPINTVL` and `TCP_KEEPCNT`) where
/// nothing is under way, and `TCP_USER_TIMEOUT` where bytes are that the peer never acknowledges, for
/// keepalive does not begin while there are any. The command sets both, on sockets that it accepts
/// too, from its `--timeout`.
#[must_use = "a channel carries nothing until a session has it"]
pub struct Channel {
    stream: Box<dyn Stream>,
    sink: Option<Box<dyn RamSink>>,
    page_size: PageSize,
}

impl Channel {
    fn new(stream: Box<dyn Stream>) -> Self {
        Self {
            stream,
            sink: None,
            page_size: PageSize::new(4096).expect("4 KiB is a page size"),
        }
    }

    /// A channel over a stream of the embedder's. `hangup` is called, from any thread and perhaps
    /// twice, to make the stream's reads and writes return soon; they must. A stream's own time-out is an
    /// error of kind `WouldBlock` or `TimedOut`; one that does not block says `WouldBlock` at once, and is
    /// asked again every few milliseconds.
    ///
    /// When all has been sent the stream is flushed. The peer reads the channel's end when the stream
    /// is dropped, at the end of the source's [`Report`](crate::Report) or migration: one that can say
    /// so before is given to [`Channel::from_stream_with_finish`].
    pub fn from_stream(
        stream: impl Read + Write + Send + 'static,
        hangup: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        Self::from_stream_with_finish(stream, Write::flush, hangup)
    }

    /// As [`Channel::from_stream`], for a stream that can say that nothing more will be sent and still
    /// be read from: a TLS session. `finish` says so, on the channel's thread: of the source when all
    /// has been sent, of the destination when it has read the source's end. Where it says `WouldBlock` it
    /// is called again.
    ///
    /// Before the stream is dropped, what the peer has written is read: to its end, but not more than
    /// 1 MiB, and no longer than a second for all channels together, when `hangup` is called. A stream
    /// that is dropped with bytes unread, such as a TLS 1.3 server's session tickets, resets its
    /// connection, and the peer loses what it has not read yet.
    ///
    /// ```no_run
    /// # use std::{io::{self, Read, Write}, net::{Shutdown, TcpStream}};
    /// # use vfio_migration::Channel;
    /// # struct Tls(TcpStream);
    /// # impl Tls { fn send_close_notify(&mut self) -> io::Result<()> { Ok(()) } }
    /// # impl Read for Tls {
    /// #     fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> { self.0.read(bytes) }
    /// # }
    /// # impl Write for Tls {
    /// #     fn write(&mut self, bytes: &[u8]) -> io::Result<usize> { self.0.write(bytes) }
    /// #     fn flush(&mut self) -> io::Result<()> { self.0.flush() }
    /// # }
    /// # fn channel(tls: Tls) -> io::Result<Channel> {
    /// let socket = tls.0.try_clone()?;
    /// let finish = |tls: &mut Tls| {
    ///     tls.send_close_notify()?;
    ///     tls.flush()?;
    ///     tls.0.shutdown(Shutdown::Write)
    /// };
    /// Ok(Channel::from_stream_with_finish(tls, finish, move || {
    ///     let _closed = socket.shutdown(Shutdown::Both);
    /// }))
    /// # }
    /// ```
    pub fn from_stream_with_finish<S: Read + Write + Send + 'static>(
        stream: S,
        finish: impl FnMut(&mut S) -> io::Result<()> + Send + 'static,
        hangup: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        Self::new(Box::new(Custom::new(stream, finish, hangup)))
    }

    /// A channel that is only received from, and whose reads never wait for long: a file, memory.
    pub fn from_reader(reader: impl Read + Send + 'static) -> Self {
        Self::from_stream(ReadOnly(reader), || {})
    }

    /// Hands this channel's RAM and SYNC packets to `sink`. Without one a RAM packet is an error,
    /// and a SYNC packet, with which every channel begins, is counted and passed over.
    ///
    /// A sink that makes one channel wait for others, as a barrier does, must not also wait for a
    /// packet that such a channel brings: so device state that comes over a channel with a sink is
    /// spilled where the budget does not hold it, unless [`Settings::spill`](crate::Settings::spill)
    /// says otherwise.
    pub fn with_ram_sink(mut self, sink: impl RamSink + 'static) -> Self {
        self.sink = Some(Box::new(sink));
        self
    }

    /// The target's page size, on which the size of RAM and SYNC packets depends. 4 KiB unless set.
    ///
    /// # Errors
    ///
    /// Where `bytes` is no page size.
    pub fn with_page_size(mut self, bytes: u32) -> Result<Self> {
        self.page_size = PageSize::new(bytes)?;
        Ok(self)
    }

    /// Whether a RAM migrator's packets come over it too.
    pub(crate) const fn is_shared(&self) -> bool {
        self.sink.is_some()
    }

    /// Makes it ready for its thread, which waits in it. Returns what ends those waits.
    pub(crate) fn adopt(&self) -> io::Result<Hangup> {
        self.stream.adopt()
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel")
            .field("shared_with_ram", &self.sink.is_some())
            .finish_non_exhaustive()
    }
}

/// What a channel's waits are bounded by, and what its hello must say.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    pub(crate) uuid: [u8; 16],
    pub(crate) channels: u32,
    pub(crate) max_packet: u32,
    pub(crate) hello_timeout: Duration,
    pub(crate) no_progress: Duration,
    pub(crate) packet_timeout: Duration,
}

/// Whether a stream has run out of its time.
fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

// --------------------------------------------------------------------------------- receive

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
pub(crate) trait Inlet {
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

    /// Spills what [`Inlet::lease`] said is to be, and publishes it. `receive` fills the bytes that it
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
    fn rest(&mut self);

    /// Before a SYNC is handed on, for which the sink may keep the channel waiting until the other
    /// channels have come as far.
    fn stand(&mut self);

    /// The channel's counters.
    fn counters(&self) -> &ChannelCounters;
}

/// A channel's receiving side, on its thread.
pub(crate) struct Receiver {
    channel: Channel,
    number: u32,
    terms: Terms,
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
    pub(crate) fn new(channel: Channel, number: u32, terms: Terms) -> Result<Self> {
        let staging = zeroed(STAGING, "memory for a channel");
        let staging = staging.map_err(|error| error.on_channel(number))?;
        Ok(Self {
            framer: Framer::new(Some(channel.page_size), terms.max_packet),
            channel,
            number,
            terms,
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
        if self.waited > self.terms.packet_timeout {
            return Err(self.broken(io::ErrorKind::TimedOut.into()));
        }
        Ok(())
    }

    fn truncated(&self) -> Error {
        self.name(Error::protocol(Violation::Truncated))
    }

    /// Receives packets until the peer ends the channel, and hands them on: receive → decode →
    /// publish. `greeted` gets the hello, read and as it came, and says whether it is welcome.
    pub(crate) fn run<I: Inlet>(
        mut self,
        inlet: &mut I,
        greeted: impl FnOnce(&Hello, &[u8]) -> Result<()>,
    ) -> Result<()> {
        self.hello(greeted)?;
        let timeout = self.terms.no_progress.min(self.terms.packet_timeout);
        self.channel
            .stream
            .set_timeout(timeout)
            .map_err(|error| self.broken(error))?;
        loop {
            let mut need = wire::PREFIX_LEN;
            self.waited = Duration::ZERO;
            if !self.fill(need, Some(&mut || inlet.rest()))? {
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
                        let packet = inlet
                            .announce(name, packet.packet, len)
                            .map_err(|error| self.name(error))?;
                        self.filled.start += header_len;
                        self.device_state(inlet, packet)
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
                            inlet.stand();
                        }
                        self.ram(inlet.counters(), sync, header_len, payload_len)?;
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
        let deadline = deadline(self.terms.hello_timeout);
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
                && !self.channel.stream.is_readable()
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
                    // Between packets a silent peer is the driver's to judge: only it knows
                    // whether anything is missing.
                    if !(waits && timed_out) {
                        return Err(self.broken(error));
                    }
                }
            }
        }
        Ok(true)
    }

    fn device_state<I: Inlet>(&mut self, inlet: &mut I, mut packet: I::Packet) -> Result<()> {
        let large = inlet.remaining(&packet) >= LARGE;
        self.ahead = if large {
            wire::DEVICE_PACKET_LEN
        } else {
            STAGING
        };
        inlet.counters().packets.add(1);
        inlet.counters().bytes.add(wire::DEVICE_PACKET_LEN as u64);
        if inlet.remaining(&packet) == 0 {
            return inlet.publish_empty(&mut packet);
        }
        // Each round publishes a byte at least, or reads past the rest.
        while inlet.remaining(&packet) > 0 {
            let received = match inlet.lease(&mut packet)? {
                Space::Memory(mut lease) => {
                    let last = lease.size() == inlet.remaining(&packet);
                    let ahead = if last { self.ahead } else { 0 };
                    match self.receive(lease.bytes_mut(), ahead) {
                        Ok(()) => {
                            inlet.publish(&mut packet, lease)?;
                            continue;
                        }
                        broken => broken,
                    }
                }
                Space::Aside => {
                    let ahead = self.ahead;
                    let mut receive =
                        |bytes: &mut [u8], last| self.receive(bytes, if last { ahead } else { 0 });
                    inlet.spill(&mut packet, &mut receive)?;
                    continue;
                }
                Space::Nowhere => self.skip(inlet.remaining(&packet)),
            };
            received.map_err(|error| {
                let (device, index) = I::place(&packet);
                error.on_device(device).at_index(index)
            })?;
            inlet.passed(&mut packet);
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

// ------------------------------------------------------------------------------------ send

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
    pub(crate) fn greet(&mut self, terms: &Terms, id: u8) -> Result<()> {
        if std::mem::replace(&mut self.greeted, true) {
            return Ok(());
        }
        self.set_timeout(terms.no_progress)?;
        let mut bytes = Hello {
            uuid: terms.uuid,
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
