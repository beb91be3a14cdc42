//! Where packets come from: preloaded memory, or sockets that threads feed from it.
//!
//! ```text
//!   memory   each channel copies a packet from here to where it would receive it: one copy, the
//!            same that a recv makes
//!   sockets  each channel has a feeder, which sends the packets whose numbers it draws
//! ```
//!
//! A feeder sends what a source sends: both headers and the data of one large packet with one call,
//! of several small ones too.

use std::{
    io::{self, IoSlice, IoSliceMut, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::unix::net::UnixStream,
};

use vfio_migration::{
    Channel,
    wire::{self, DEVICE_PACKET_LEN, DeviceKey, Hello},
};

use crate::plan::{Plan, Tickets};

/// Packets below this size are sent several at a time, and received through a buffer.
pub const SMALL: usize = 32 << 10;

/// How many small packets a feeder sends with one call.
const BATCH: u32 = 16;

/// Bytes to make packets of.
#[derive(Debug)]
pub struct Source(Vec<u8>);

impl Source {
    /// Makes one for packets of that size.
    #[must_use]
    pub fn new(packet: usize) -> Self {
        let byte = |at: usize| u8::try_from(at % 251).expect("below 251");
        Self((0..packet.max(1 << 20)).map(byte).collect())
    }

    /// The data of packet `number`.
    #[must_use]
    pub fn packet(&self, number: u32, len: usize) -> &[u8] {
        let places = self.0.len() / len;
        let start = number as usize % places * len;
        &self.0[start..start + len]
    }
}

/// Which sockets.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Wire {
    /// Unix sockets.
    Unix,
    /// TCP over loopback.
    Tcp,
}

/// One end of a connection.
#[derive(Debug)]
pub enum Stream {
    /// A unix socket.
    Unix(UnixStream),
    /// A TCP connection.
    Tcp(TcpStream),
}

impl Stream {
    /// Says that nothing more will be sent.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn finish(&self) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.shutdown(Shutdown::Write),
            Self::Tcp(stream) => stream.shutdown(Shutdown::Write),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(bytes),
            Self::Tcp(stream) => stream.read(bytes),
        }
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read_vectored(buffers),
            Self::Tcp(stream) => stream.read_vectored(buffers),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(bytes),
            Self::Tcp(stream) => stream.write(bytes),
        }
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write_vectored(buffers),
            Self::Tcp(stream) => stream.write_vectored(buffers),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl From<Stream> for Channel {
    fn from(stream: Stream) -> Self {
        match stream {
            Stream::Unix(stream) => stream.into(),
            Stream::Tcp(stream) => stream.into(),
        }
    }
}

/// Connections: the feeders' ends, and the receivers'.
///
/// # Errors
///
/// The kernel's.
pub fn connect(wire: Wire, count: u32) -> io::Result<(Vec<Stream>, Vec<Stream>)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let pair = |_| match wire {
        Wire::Unix => {
            let (near, far) = UnixStream::pair()?;
            Ok((Stream::Unix(near), Stream::Unix(far)))
        }
        Wire::Tcp => {
            let near = TcpStream::connect(address)?;
            let (far, _) = listener.accept()?;
            near.set_nodelay(true)?;
            Ok((Stream::Tcp(near), Stream::Tcp(far)))
        }
    };
    (0..count).map(pair).collect()
}

/// Says hello as channel `number`.
///
/// # Errors
///
/// The kernel's.
pub fn greet(stream: &mut Stream, number: u32) -> io::Result<()> {
    let id = u8::try_from(number).expect("few channels");
    let uuid = [0; 16];
    stream.write_all(&Hello { uuid, id }.encode())
}

/// Writes all of several buffers.
fn write_all(stream: &mut impl Write, mut buffers: &mut [IoSlice<'_>]) -> io::Result<()> {
    // Each round sends a byte at least, or ends.
    while !buffers.is_empty() {
        let count = stream.write_vectored(buffers)?;
        if count == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        IoSlice::advance_slices(&mut buffers, count);
    }
    Ok(())
}

/// Writes a header and its data with one call, or as many as it takes.
///
/// # Errors
///
/// The kernel's.
pub fn write_both(stream: &mut impl Write, header: &[u8], data: &[u8]) -> io::Result<()> {
    write_all(stream, &mut [IoSlice::new(header), IoSlice::new(data)])
}

/// Sends the packets whose numbers it draws, and then ends the stream.
///
/// # Errors
///
/// The kernel's.
pub fn feed(
    stream: &mut Stream,
    plan: &Plan,
    source: &Source,
    keys: &[DeviceKey],
    tickets: &Tickets,
) -> io::Result<()> {
    let batch = if plan.packet < SMALL { BATCH } else { 1 };
    let config = wire::wrap_config(&[]);
    let mut headers = Vec::with_capacity(batch as usize * DEVICE_PACKET_LEN);
    loop {
        let first = tickets.take(batch);
        let numbers = first..first + batch;
        headers.clear();
        let mut packets = Vec::with_capacity(batch as usize);
        for number in numbers {
            let Some(place) = plan.place(number) else {
                break;
            };
            let data = if place.config {
                &config
            } else {
                source.packet(number, plan.packet)
            };
            let len = u32::try_from(data.len()).expect("a packet is far below 4 GiB");
            let key = &keys[place.device];
            headers.extend(wire::encode_packet(key, place.index, place.config, len));
            packets.push(data);
        }
        if packets.is_empty() {
            return stream.finish();
        }
        let mut slices: Vec<_> = headers
            .chunks(DEVICE_PACKET_LEN)
            .zip(&packets)
            .flat_map(|(header, data)| [IoSlice::new(header), IoSlice::new(data)])
            .collect();
        write_all(stream, &mut slices)?;
    }
}

/// The names as they are on the wire.
#[must_use]
pub fn keys(plan: &Plan) -> Vec<DeviceKey> {
    plan.ids().iter().map(DeviceKey::new).collect()
}
