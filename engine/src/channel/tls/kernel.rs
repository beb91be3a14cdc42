//! A TLS connection whose records the kernel makes and opens (kTLS): after the handshake a plain socket.
//!
//! ```text
//!   TlsStream, established, before its first read
//!     ─▶ TCP_ULP "tls"    refused: the stream as it was
//!     ─▶ the keys out of rustls, TLS_TX and TLS_RX   refused: the connection is lost
//!     ─▶ read, write: the socket's own calls
//! ```
//!
//! What is no data comes to a read as EIO, and is then received with its kind:
//!
//! | record | is |
//! |---|---|
//! | alert, close_notify | the end |
//! | another alert | an error |
//! | handshake: session tickets | passed over |
//! | handshake: a key update | an error: nobody has the next key |
//!
//! Nobody changes the keys, so a sender stops before the cipher's limit: 2²⁴ records, 256 GiB, with AES-GCM.
//!
//! One thread owns a stream; the hang-up is the socket's.
#![expect(
    unsafe_code,
    reason = "a record's kind goes out with sendmsg, for which nix has no message"
)]

use std::{
    fmt, io,
    io::{IoSlice, IoSliceMut, Read, Write},
    mem,
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::{Arc, PoisonError},
    time::Duration,
};

use nix::{
    errno::Errno,
    libc,
    sys::socket::{
        ControlMessageOwned, MsgFlags, TlsGetRecordType, recvmsg, setsockopt, sockopt,
        sockopt::TlsCryptoInfo,
    },
};
use rustls::{CipherSuite, ConnectionTrafficSecrets, SupportedCipherSuite};

use super::{Channel, ChannelStream, Shared, TlsStream};
use crate::first_failure::Hangup;

/// The most data in a record.
const FRAGMENT: usize = 16 << 10;

/// The longest control record that is taken in: its data.
const CONTROL: usize = FRAGMENT + 1;

/// The kind of a record, and of a message in it.
const ALERT: u8 = 21;
const NEW_SESSION_TICKET: u8 = 4;

/// close_notify, as a warning.
const CLOSE_NOTIFY: [u8; 2] = [1, 0];

/// A TLS connection that the kernel serves: [`TlsStream::into_kernel`].
///
/// Its calls are a plain socket's, and it needs no memory of its own. It is a [`ChannelStream`], and `Read + Write`.
pub struct KernelTlsStream {
    socket: TcpStream,
    /// What rustls had decrypted already, from `read` on.
    early: Vec<u8>,
    read: usize,
    /// How many records the keys may still send.
    records: u64,
    ended: bool,
    closed: bool,
}

/// The kernel's form of a cipher's keys for one direction.
fn crypto_info((sequence, secrets): &(u64, ConnectionTrafficSecrets)) -> Option<TlsCryptoInfo> {
    fn parts<const N: usize>(key: &[u8], iv: &[u8]) -> Option<([u8; N], [u8; 4], [u8; 8])> {
        let (salt, iv) = iv.split_at_checked(4)?;
        Some((
            key.try_into().ok()?,
            salt.try_into().ok()?,
            iv.try_into().ok()?,
        ))
    }
    let rec_seq = sequence.to_be_bytes();
    let info = |cipher_type| libc::tls_crypto_info {
        version: libc::TLS_1_3_VERSION,
        cipher_type,
    };
    Some(match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv } => {
            let (key, salt, iv) = parts(key.as_ref(), iv.as_ref())?;
            TlsCryptoInfo::Aes128Gcm(libc::tls12_crypto_info_aes_gcm_128 {
                info: info(libc::TLS_CIPHER_AES_GCM_128),
                iv,
                key,
                salt,
                rec_seq,
            })
        }
        ConnectionTrafficSecrets::Aes256Gcm { key, iv } => {
            let (key, salt, iv) = parts(key.as_ref(), iv.as_ref())?;
            TlsCryptoInfo::Aes256Gcm(libc::tls12_crypto_info_aes_gcm_256 {
                info: info(libc::TLS_CIPHER_AES_GCM_256),
                iv,
                key,
                salt,
                rec_seq,
            })
        }
        _ => return None,
    })
}

fn refused(stream: TlsStream, why: io::Error) -> KernelRefused {
    KernelRefused {
        stream: Some(stream),
        why,
    }
}

fn lost(why: impl Into<io::Error>) -> KernelRefused {
    KernelRefused {
        stream: None,
        why: why.into(),
    }
}

fn unsupported(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, what)
}

/// How many records the connection's cipher may send; none where the kernel has no such cipher.
fn record_limit(stream: &TlsStream) -> Option<u64> {
    match stream.session().common().negotiated_cipher_suite()? {
        SupportedCipherSuite::Tls13(suite)
            if matches!(
                suite.common.suite,
                CipherSuite::TLS13_AES_128_GCM_SHA256 | CipherSuite::TLS13_AES_256_GCM_SHA384
            ) =>
        {
            Some(suite.common.confidentiality_limit)
        }
        _ => None,
    }
}

/// See [`TlsStream::into_kernel`].
pub(super) fn take_over(stream: TlsStream) -> Result<KernelTlsStream, KernelRefused> {
    if !stream.shared.extractable {
        let why = unsupported("the configuration keeps the keys");
        return Err(refused(stream, why));
    }
    let Some(limit) = record_limit(&stream) else {
        let why = unsupported("no TLS 1.3 with AES-GCM has been agreed on");
        return Err(refused(stream, why));
    };
    let TlsStream { shared, timeout } = stream;
    let Shared {
        socket,
        session,
        extractable,
    } = match Arc::try_unwrap(shared) {
        Ok(shared) => shared,
        Err(shared) => {
            let why = unsupported("the connection has other handles");
            return Err(refused(TlsStream { shared, timeout }, why));
        }
    };
    let session = session.into_inner().unwrap_or_else(PoisonError::into_inner);
    let able = if session.is_between_records() {
        setsockopt(&socket, sockopt::TcpUlp::default(), b"tls").map_err(io::Error::from)
    } else {
        Err(unsupported("the connection is within a record"))
    };
    if let Err(why) = able {
        let shared = Arc::new(Shared {
            socket,
            session: session.into(),
            extractable,
        });
        return Err(refused(TlsStream { shared, timeout }, why));
    }
    let (early, secrets) = session
        .into_secrets()
        .map_err(|error| lost(io::Error::other(error)))?;
    let used = secrets.tx.0;
    let keys = crypto_info(&secrets.tx).zip(crypto_info(&secrets.rx));
    let (tx, rx) = keys.ok_or_else(|| lost(unsupported("the keys are of another cipher")))?;
    setsockopt(&socket, sockopt::TcpTlsTx, &tx).map_err(lost)?;
    setsockopt(&socket, sockopt::TcpTlsRx, &rx).map_err(lost)?;
    Ok(KernelTlsStream {
        socket,
        early,
        read: 0,
        records: limit.saturating_sub(used),
        ended: false,
        closed: false,
    })
}

/// That the kernel has not taken a connection over: [`TlsStream::into_kernel`].
#[derive(Debug)]
pub struct KernelRefused {
    stream: Option<TlsStream>,
    why: io::Error,
}

impl KernelRefused {
    /// The stream, as it was.
    ///
    /// # Errors
    ///
    /// Where it is lost: why.
    pub fn into_stream(self) -> io::Result<TlsStream> {
        self.stream.ok_or(self.why)
    }
}

impl fmt::Display for KernelRefused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the kernel does not do this connection's TLS")
    }
}

impl std::error::Error for KernelRefused {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.why)
    }
}

/// Whether a kernel has all that a connection needs: tried with keys that mean nothing.
fn probe() -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let socket = TcpStream::connect(listener.local_addr()?)?;
    setsockopt(&socket, sockopt::TcpUlp::default(), b"tls")?;
    let info = TlsCryptoInfo::Aes256Gcm(libc::tls12_crypto_info_aes_gcm_256 {
        info: libc::tls_crypto_info {
            version: libc::TLS_1_3_VERSION,
            cipher_type: libc::TLS_CIPHER_AES_GCM_256,
        },
        iv: [0; 8],
        key: [0; 32],
        salt: [0; 4],
        rec_seq: [0; 8],
    });
    setsockopt(&socket, sockopt::TcpTlsTx, &info)?;
    Ok(setsockopt(&socket, sockopt::TcpTlsRx, &info)?)
}

impl KernelTlsStream {
    /// Whether this host's kernel has TLS for TCP: both ways, TLS 1.3, AES-GCM. To be asked once, before a
    /// configuration lets the keys out: it makes a connection to itself over loopback.
    #[must_use]
    pub fn is_available() -> bool {
        probe().is_ok()
    }

    /// Another handle of the same connection. It must only write where this one reads, or the other way round:
    /// each knows only what it has read and written itself.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            socket: self.socket.try_clone()?,
            early: self.early[self.read..].to_vec(),
            read: 0,
            records: self.records,
            ended: self.ended,
            closed: self.closed,
        })
    }

    /// Takes in what is no data.
    fn control(&mut self) -> io::Result<()> {
        let mut bytes = vec![0; CONTROL];
        let mut room = nix::cmsg_space!(TlsGetRecordType);
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        let fd = self.socket.as_raw_fd();
        let message = recvmsg::<()>(fd, &mut buffers, Some(&mut room), MsgFlags::empty())?;
        let len = message.bytes;
        let kind = message.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::TlsGetRecordType(kind) => Some(kind),
            _ => None,
        });
        let record = &bytes[..len];
        match (kind, record) {
            // A close_notify; whatever its level, as TLS 1.3 has it.
            (Some(TlsGetRecordType::Alert), [_, 0, ..]) => {
                self.ended = true;
                Ok(())
            }
            (Some(TlsGetRecordType::Alert), [_, alert, ..]) => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                rustls::Error::AlertReceived((*alert).into()),
            )),
            (Some(TlsGetRecordType::Handshake), _) if are_tickets(record) => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a TLS record that is neither data, nor the end, nor a session ticket",
            )),
        }
    }

    /// Reads with `read`, past what is no data.
    fn read_with(
        &mut self,
        mut read: impl FnMut(&mut TcpStream) -> io::Result<usize>,
    ) -> io::Result<usize> {
        // Ends: with each round that goes on, the peer has sent a record.
        while !self.ended {
            match read(&mut self.socket) {
                Ok(0) => {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the peer has closed the connection without the end of TLS",
                    ));
                }
                Err(error) if error.raw_os_error() == Some(Errno::EIO as i32) => self.control()?,
                done => return done,
            }
        }
        Ok(0)
    }

    /// Counts what one call sends.
    fn count(&mut self, len: usize) -> io::Result<()> {
        let records = len.div_ceil(FRAGMENT) as u64;
        match self.records.checked_sub(records) {
            Some(left) => {
                self.records = left;
                Ok(())
            }
            None => Err(io::Error::other(
                "the connection's keys have sent as much as they may",
            )),
        }
    }
}

/// Whether a record of the handshake has whole session tickets, and nothing else.
fn are_tickets(mut record: &[u8]) -> bool {
    // Ends: each round passes a message.
    while let [kind, high, middle, low, rest @ ..] = record {
        let len = usize::from(*high) << 16 | usize::from(*middle) << 8 | usize::from(*low);
        match rest.get(len..) {
            Some(behind) if *kind == NEW_SESSION_TICKET => record = behind,
            _ => return false,
        }
    }
    record.is_empty()
}

/// Sends an alert: a record of its own kind.
fn send_alert(socket: BorrowedFd<'_>, mut alert: [u8; 2]) -> io::Result<()> {
    /// A control message with one byte.
    #[repr(C)]
    struct Control {
        header: libc::cmsghdr,
        kind: u8,
    }
    let mut bytes = libc::iovec {
        iov_base: alert.as_mut_ptr().cast(),
        iov_len: alert.len(),
    };
    // SAFETY: zeros are a valid `cmsghdr`: integers alone.
    let header = unsafe { mem::zeroed::<libc::cmsghdr>() };
    let mut control = Control {
        header,
        kind: ALERT,
    };
    control.header.cmsg_len = (mem::offset_of!(Control, kind) + 1) as _;
    control.header.cmsg_level = libc::SOL_TLS;
    control.header.cmsg_type = libc::TLS_SET_RECORD_TYPE;
    // SAFETY: zeros are a valid `msghdr`: integers, and null pointers.
    let mut message = unsafe { mem::zeroed::<libc::msghdr>() };
    message.msg_iov = &raw mut bytes;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<Control>() as _;
    loop {
        // SAFETY: the message, and all that it points to, live beyond the call, and are as long as it says.
        let sent =
            unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
        match Errno::result(sent) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

impl Read for KernelTlsStream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.read < self.early.len() {
            let count = (&self.early[self.read..]).read(bytes)?;
            self.read += count;
            return Ok(count);
        }
        if bytes.is_empty() {
            return Ok(0);
        }
        self.read_with(|socket| socket.read(bytes))
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        if self.read < self.early.len() || buffers.iter().all(|it| it.is_empty()) {
            return buffers.first_mut().map_or(Ok(0), |first| self.read(first));
        }
        self.read_with(|socket| socket.read_vectored(buffers))
    }
}

impl Write for KernelTlsStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.count(bytes.len())?;
        self.socket.write(bytes)
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        self.count(buffers.iter().map(|it| it.len()).sum())?;
        self.socket.write_vectored(buffers)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ChannelStream for KernelTlsStream {
    fn hangup(&self) -> io::Result<Hangup> {
        ChannelStream::hangup(&self.socket)
    }

    fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        ChannelStream::set_timeout(&self.socket, timeout)
    }

    fn finish(&mut self) -> io::Result<()> {
        if !mem::replace(&mut self.closed, true) {
            send_alert(self.socket.as_fd(), CLOSE_NOTIFY)?;
        }
        self.socket.shutdown(Shutdown::Write)
    }

    fn wait_readable(&self, timeout: Duration) -> Option<bool> {
        if self.read < self.early.len() || self.ended {
            return Some(true);
        }
        ChannelStream::wait_readable(&self.socket, timeout)
    }

    fn is_ended(&self) -> bool {
        ChannelStream::is_ended(&self.socket)
    }
}

impl AsFd for KernelTlsStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl From<KernelTlsStream> for Channel {
    fn from(stream: KernelTlsStream) -> Self {
        Self::new(stream)
    }
}

impl fmt::Debug for KernelTlsStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelTlsStream")
            .field("socket", &self.socket)
            .field("records", &self.records)
            .finish_non_exhaustive()
    }
}
