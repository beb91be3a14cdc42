//! One migration channel: a stream, and QEMU's multifd framing on it.
//!
//! | file | what |
//! |---|---|
//! | `channel/stream.rs` | the bytes: sockets, the VMM's own streams, and how they end |
//! | `channel/tls.rs` | TLS as such a stream, by rustls or the kernel (feature `rustls`) |
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
//! | within a packet, for the next byte | the socket's time-out |
//! | within a packet, from a peer that trickles | the most time that a packet may take |
//! | any | a hang-up by another thread, which shuts the connection down |

use std::{
    fmt, io,
    io::{Read, Write},
    time::Duration,
};

mod receiver;
mod sender;
mod stream;
#[cfg(feature = "rustls")]
mod tls;

pub use self::stream::ChannelStream;
use self::stream::{Custom, ReadOnly};
#[cfg(feature = "rustls")]
pub use self::tls::{KernelRefused, KernelTlsStream, TlsStream};
pub(crate) use self::{
    receiver::{PacketSink, Receiver, STAGING, Space},
    sender::Sender,
    stream::Finished,
};
use crate::{error::Result, first_failure::Hangup, settings::Settings, wire::PageSize};

/// Takes the packets on a shared channel that are not device state.
///
/// The channel's thread calls the sink, in the channel's order. A sink that blocks holds up its own channel
/// only. In [`sync`](Self::sync) it may block until the VMM's main thread has seen the SYNC of all channels.
pub trait RamSink: Send {
    /// Takes a RAM packet. `pages` gives exactly the packet's page data; the engine skips what is left unread.
    ///
    /// # Errors
    ///
    /// Fail the migration.
    fn ram(&mut self, header: &[u8], pages: &mut dyn Read) -> io::Result<()>;

    /// Takes a SYNC packet.
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
/// A session bounds each wait within a packet. Between packets a channel may be silent for as long as the VM
/// runs, so only the socket can find out that a TCP peer's host has vanished. The socket is the VMM's, which
/// should set both kinds of option:
///
/// | option | finds a vanished host |
/// |---|---|
/// | `SO_KEEPALIVE`, with `TCP_KEEPIDLE`, `TCP_KEEPINTVL` and `TCP_KEEPCNT` | while no bytes are under way |
/// | `TCP_USER_TIMEOUT` | while the peer does not acknowledge bytes; keepalive does not begin then |
///
/// The command sets both from its `--timeout`, also on the sockets that it accepts.
#[must_use = "a channel carries nothing until a session has it"]
pub struct Channel {
    stream: Box<dyn ChannelStream>,
    sink: Option<Box<dyn RamSink>>,
    page_size: PageSize,
}

impl Channel {
    /// Makes a channel over a stream: a socket, TLS, or a VMM's own [`ChannelStream`].
    pub fn new(stream: impl ChannelStream + 'static) -> Self {
        Self {
            stream: Box::new(stream),
            sink: None,
            page_size: PageSize::new(4096).expect("4 KiB is a page size"),
        }
    }

    /// Makes a channel over a stream of the VMM's.
    ///
    /// The engine calls `hangup`, from any thread and perhaps twice, when the stream's reads and writes must
    /// return soon. A stream's own time-out is an error of kind `WouldBlock` or `TimedOut`. A non-blocking
    /// stream
    /// returns `WouldBlock` at once, and the channel asks it again every few milliseconds.
    ///
    /// When all has been sent the channel flushes the stream. The peer reads the channel's end when the
    /// stream is
    /// dropped, at the end of the source's [`Report`](crate::Report) or migration. For a stream that can
    /// end its
    /// sending side earlier, use [`Channel::from_stream_with_finish`].
    pub fn from_stream(
        stream: impl Read + Write + Send + 'static,
        hangup: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        Self::from_stream_with_finish(stream, Write::flush, hangup)
    }

    /// As [`Channel::from_stream`], for a stream that can end its sending side and still be read, such as a TLS
    /// session.
    ///
    /// The channel's thread calls `finish` to end the sending side: on the source when all has been sent,
    /// on the
    /// destination when it has read the source's end. If `finish` returns `WouldBlock` it is called again.
    ///
    /// Before the stream is dropped, the engine reads what the peer has written, to its end: 1 MiB at most, and
    /// for a second at most for all channels together, after which it calls `hangup`. A stream that is dropped
    /// with unread bytes, such as a TLS 1.3 server's session tickets, resets its connection, and the peer loses
    /// what it has not read yet.
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
        Self::new(Custom::new(stream, finish, hangup))
    }

    /// Makes a channel for receiving only, from a reader that never waits for long: a file, memory.
    pub fn from_reader(reader: impl Read + Send + 'static) -> Self {
        Self::from_stream(ReadOnly(reader), || {})
    }

    /// Hands this channel's RAM and SYNC packets to `sink`. Without a sink a RAM packet is an error, and a SYNC
    /// packet is counted and skipped. (Every channel begins with a SYNC packet.)
    ///
    /// A sink may hold its channel at a SYNC until all channels reach it. A held channel may carry the packet
    /// that another one waits for, so device state on a channel with a sink is spilled instead of waiting for
    /// memory, unless [`Settings::spill`](crate::Settings::spill) forbids it.
    pub fn with_ram_sink(mut self, sink: impl RamSink + 'static) -> Self {
        self.sink = Some(Box::new(sink));
        self
    }

    /// Sets the target's page size, on which the size of RAM and SYNC packets depends. Default: 4 KiB.
    ///
    /// # Errors
    ///
    /// If `bytes` is not a page size.
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
        self.stream.hangup()
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

impl ChannelLimits {
    /// Those of a session with so many channels.
    pub(crate) const fn new(settings: &Settings, channels: u32) -> Self {
        Self {
            uuid: settings.uuid,
            channels,
            max_packet: settings.max_packet,
            hello_timeout: settings.hello_timeout,
            no_progress: settings.no_progress,
            packet_timeout: settings.packet_timeout,
        }
    }
}

/// Whether a stream has run out of its time.
fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}
