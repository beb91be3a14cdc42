//! One migration channel: a stream, and QEMU's multifd framing on it.
//!
//! | file | what |
//! |---|---|
//! | `channel/stream.rs` | the bytes: sockets, the VMM's own streams, and how they end |
//! | `channel/receiver.rs` | the destination's side: headers, payloads into leased buffers, RAM, SYNCs |
//! | `channel/sender.rs` | the source's side: the hello, whole packets with one call |
//!
//! One thread owns a channel and serves it.
//!
//! # What ends each wait
//!
//! | wait | ended by |
//! |---|---|
//! | for the peer's bytes | bytes; the channel's end |
//! | within a packet | the socket's time-out; for a peer that sends a byte now and then, the time that a packet may take |
//! | any | a hang-up by another thread, which shuts the connection down |

use std::{
    fmt, io,
    io::{Read, Write},
    time::Duration,
};

mod receiver;
mod sender;
mod stream;

use self::stream::{Custom, ReadOnly, Stream};
pub(crate) use self::{
    receiver::{PacketSink, Receiver, STAGING, Space},
    sender::Sender,
    stream::Finished,
};
use crate::{error::Result, first_failure::Hangup, wire::PageSize};

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
    /// A sink may hold its channel at a SYNC until all channels reach it. A held channel may carry the packet
    /// that another one waits for, so device state on a channel with a sink is spilled instead of waiting for
    /// memory, unless [`Settings::spill`](crate::Settings::spill) forbids it.
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
pub(crate) struct ChannelLimits {
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
