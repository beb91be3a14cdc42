//! A TLS session's state, without its connection: bytes in, bytes out.
//!
//! ```text
//!   space() ─▶ received() ─▶ incoming ─▶ advance() ─▶ the reader's buffers, or `plain`
//!                                           │
//!   encrypt(), close() ─────────────────────┴───────▶ outgoing() ─▶ sent()
//! ```
//!
//! Nothing here waits. Whoever has the session has its lock (`tls.rs`).
//!
//! Up to its first read the session takes in one record at a time and no byte more: what the kernel is given
//! (`tls/kernel.rs`) must begin with a record.

use std::{fmt, io, ops::Range, sync::Arc};

use rustls::{
    ClientConfig, CommonState, Error, ExtractedSecrets, ServerConfig,
    client::UnbufferedClientConnection,
    pki_types::ServerName,
    server::UnbufferedServerConnection,
    unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus, WriteTraffic},
};

/// A record's header: its kind, its version, the length of its body.
const RECORD_HEADER: usize = 5;

/// The longest record that TLS 1.3 allows.
const RECORD: usize = RECORD_HEADER + (16 << 10) + 256;

/// What is received with one call, once the session serves a channel.
pub(super) const INCOMING: usize = 128 << 10;

/// What a peer may have sent of its handshake that is not complete: one message of the largest size.
const HANDSHAKE: usize = (64 << 10) + RECORD;

/// The most that one call encrypts: the session's memory for what has not been sent.
pub(super) const OUTGOING: usize = 128 << 10;

/// What a record adds to its data, at most.
const PER_RECORD: usize = 64;

/// The most data in a record.
const FRAGMENT: usize = 16 << 10;

enum Connection {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

/// Where data goes: a reader's buffers, the second when the first is full.
#[derive(Default)]
pub(super) struct Sink<'a> {
    pub(super) first: &'a mut [u8],
    pub(super) second: &'a mut [u8],
    /// How much they have got.
    pub(super) count: usize,
}

impl Sink<'_> {
    fn is_full(&self) -> bool {
        self.count == self.first.len() + self.second.len()
    }

    /// Takes what there is room for. Returns how much that was.
    fn push(&mut self, bytes: &[u8]) -> usize {
        let len = self.first.len();
        let mut taken = 0;
        if self.count < len {
            taken = bytes.len().min(len - self.count);
            self.first[self.count..self.count + taken].copy_from_slice(&bytes[..taken]);
            self.count += taken;
        }
        if self.count >= len {
            let room = &mut self.second[self.count - len..];
            let more = room.len().min(bytes.len() - taken);
            room[..more].copy_from_slice(&bytes[taken..taken + more]);
            self.count += more;
            taken += more;
        }
        taken
    }
}

/// What to send, once the handshake allows it.
enum Send<'a> {
    Nothing,
    Data(&'a [u8]),
    CloseNotify,
}

/// What one turn of the state machine has come to.
enum Turn {
    /// There may be more to do.
    Again,
    /// It wants bytes of the peer, or has nothing to do.
    Idle,
    /// What was to be sent is in `outgoing`.
    Encrypted,
    /// The peer has ended its side.
    Ended,
}

/// A session, on either side.
pub(super) struct Session {
    connection: Connection,
    /// What has been received and not taken in, in the part `filled`.
    incoming: Vec<u8>,
    filled: Range<usize>,
    /// Whether it may receive more than the record that it is in.
    greedy: bool,
    /// Data that no reader had room for, from `read` on.
    plain: Vec<u8>,
    read: usize,
    outgoing: Outgoing,
    /// Whether the peer has ended its side, and whether we have.
    ended: bool,
    closed: bool,
    /// Why the session is over.
    failure: Option<Error>,
}

fn invalid(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl Session {
    pub(super) fn client(
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
    ) -> Result<Self, Error> {
        let connection = UnbufferedClientConnection::new(config, name)?;
        Ok(Self::new(Connection::Client(connection)))
    }

    pub(super) fn server(config: Arc<ServerConfig>) -> Result<Self, Error> {
        let connection = UnbufferedServerConnection::new(config)?;
        Ok(Self::new(Connection::Server(connection)))
    }

    const fn new(connection: Connection) -> Self {
        Self {
            connection,
            incoming: Vec::new(),
            filled: 0..0,
            greedy: false,
            plain: Vec::new(),
            read: 0,
            outgoing: Outgoing {
                bytes: Vec::new(),
                filled: 0..0,
            },
            ended: false,
            closed: false,
            failure: None,
        }
    }

    pub(super) fn common(&self) -> &CommonState {
        match &self.connection {
            Connection::Client(connection) => connection,
            Connection::Server(connection) => connection,
        }
    }

    pub(super) fn is_handshaking(&self) -> bool {
        self.common().is_handshaking()
    }

    /// Whether the peer has ended its side, and all before that has been read.
    pub(super) fn is_ended(&self) -> bool {
        self.ended && self.plain().is_empty()
    }

    /// Data that has been decrypted and not read.
    pub(super) fn plain(&self) -> &[u8] {
        &self.plain[self.read..]
    }

    /// What is to be sent.
    pub(super) fn outgoing(&self) -> &[u8] {
        &self.outgoing.bytes[self.outgoing.filled.clone()]
    }

    pub(super) fn sent(&mut self, count: usize) {
        self.outgoing.filled.start += count;
        if self.outgoing.filled.is_empty() {
            self.outgoing.filled = 0..0;
        }
    }

    /// From now on it receives as much as there is.
    pub(super) fn receive_greedily(&mut self) {
        self.greedy = true;
    }

    /// How much more its current record has, or its header.
    fn wanted(&self) -> usize {
        let mut rest = &self.incoming[self.filled.clone()];
        // Ends: each round passes a record. Several wait here where a message of the handshake has as many.
        loop {
            let Some((header, body)) = rest.split_at_checked(RECORD_HEADER) else {
                return RECORD_HEADER - rest.len();
            };
            let len = usize::from(u16::from_be_bytes([header[3], header[4]]));
            match body.get(len..) {
                Some(behind) => rest = behind,
                None => return len - body.len(),
            }
        }
    }

    /// Where to receive: at least a byte.
    pub(super) fn space(&mut self) -> io::Result<&mut [u8]> {
        let (most, want) = if self.greedy {
            (INCOMING, RECORD)
        } else {
            (HANDSHAKE, self.wanted())
        };
        if self.filled.is_empty() {
            self.filled = 0..0;
        }
        if self.filled.start > 0 && self.filled.end + want > most {
            self.incoming.copy_within(self.filled.clone(), 0);
            self.filled = 0..self.filled.len();
        }
        let end = if self.greedy {
            INCOMING
        } else {
            self.filled.end + want
        };
        if end > most || end == self.filled.end {
            // No message of a peer that keeps to the protocol is so long.
            return Err(invalid(Error::General("a message is too long".into())));
        }
        if self.incoming.len() < end {
            self.incoming.resize(end, 0);
        }
        Ok(&mut self.incoming[self.filled.end..end])
    }

    pub(super) fn received(&mut self, count: usize) {
        self.filled.end += count;
    }

    /// Takes in what was received: data goes to the sink while there is room.
    pub(super) fn advance(&mut self, into: &mut Sink<'_>) -> io::Result<()> {
        if self.read < self.plain.len() {
            self.read += into.push(&self.plain[self.read..]);
            if self.read < self.plain.len() {
                return Ok(());
            }
            self.plain.clear();
            self.read = 0;
        }
        if let Some(failure) = &self.failure {
            return Err(invalid(failure.clone()));
        }
        // Ends: each round but the last takes a record in, or puts one out.
        while self.plain.is_empty() && !(into.count > 0 && into.is_full()) {
            match self.turn(into, &Send::Nothing)? {
                Turn::Again => {}
                Turn::Idle | Turn::Ended | Turn::Encrypted => return Ok(()),
            }
        }
        Ok(())
    }

    /// Encrypts data: some of it, of a whole that is sent. The handshake must be complete.
    pub(super) fn encrypt(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.put_out(&Send::Data(bytes))
    }

    /// Says that nothing more will be sent. Nothing the second time.
    pub(super) fn close(&mut self) -> io::Result<()> {
        if std::mem::replace(&mut self.closed, true) || self.is_handshaking() {
            return Ok(());
        }
        self.put_out(&Send::CloseNotify)
    }

    fn put_out(&mut self, what: &Send<'_>) -> io::Result<()> {
        if let Some(failure) = &self.failure {
            return Err(invalid(failure.clone()));
        }
        // Data that arrives meanwhile waits for its reader. Ends: see `advance`.
        loop {
            match self.turn(&mut Sink::default(), what)? {
                Turn::Again | Turn::Ended => {}
                Turn::Encrypted => return Ok(()),
                Turn::Idle => return Err(io::ErrorKind::BrokenPipe.into()),
            }
        }
    }

    fn process(&mut self, into: &mut Sink<'_>, what: &Send<'_>) -> Result<Turn, Error> {
        let incoming = &mut self.incoming[self.filled.clone()];
        let (outgoing, plain) = (&mut self.outgoing, &mut self.plain);
        let (discard, turn) = match &mut self.connection {
            Connection::Client(connection) => {
                let status = connection.process_tls_records(incoming);
                take(status, outgoing, plain, into, what)
            }
            Connection::Server(connection) => {
                let status = connection.process_tls_records(incoming);
                take(status, outgoing, plain, into, what)
            }
        };
        self.filled.start += discard;
        turn
    }

    fn turn(&mut self, into: &mut Sink<'_>, what: &Send<'_>) -> io::Result<Turn> {
        let turn = self.process(into, what);
        match turn {
            Ok(Turn::Ended) => self.ended = true,
            Ok(_) => {}
            Err(error) => {
                self.failure = Some(error.clone());
                self.explain();
                return Err(invalid(error));
            }
        }
        turn.map_err(invalid)
    }

    /// Puts out what a session that has failed tells its peer: an alert that says why.
    fn explain(&mut self) {
        // What waits to be sent comes before anything is taken in. So what has failed is not looked at again.
        // Ends: a failed session has no more to say than that.
        while self.common().wants_write() {
            if !matches!(
                self.process(&mut Sink::default(), &Send::Nothing),
                Ok(Turn::Again)
            ) {
                return;
            }
        }
    }

    /// Whether the records that follow can be another's: it neither stands within one nor has one to send.
    pub(super) fn is_between_records(&self) -> bool {
        let at_rest = self.filled.is_empty() && self.outgoing().is_empty();
        let over = self.ended || self.closed || self.failure.is_some();
        at_rest && !over && !self.is_handshaking()
    }

    /// The data that was decrypted and not read, and the keys, for whoever goes on with the records that follow.
    pub(super) fn into_secrets(self) -> Result<(Vec<u8>, ExtractedSecrets), Error> {
        let plain = self.plain[self.read..].to_vec();
        let secrets = match self.connection {
            Connection::Client(connection) => connection
                .dangerous_into_kernel_connection()
                .map(|(secrets, _)| secrets),
            Connection::Server(connection) => connection
                .dangerous_into_kernel_connection()
                .map(|(secrets, _)| secrets),
        };
        Ok((plain, secrets?))
    }
}

/// Does what a connection asks for.
fn take<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    outgoing: &mut Outgoing,
    plain: &mut Vec<u8>,
    into: &mut Sink<'_>,
    what: &Send<'_>,
) -> (usize, Result<Turn, Error>) {
    let mut discard = status.discard;
    let turn = status.state.and_then(|state| match state {
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                let record = record?;
                discard += record.discard;
                let taken = into.push(record.payload);
                plain.extend_from_slice(&record.payload[taken..]);
            }
            Ok(Turn::Again)
        }
        ConnectionState::EncodeTlsData(mut data) => {
            put(outgoing, |room| match data.encode(room) {
                Ok(count) => Ok(Ok(count)),
                Err(EncodeError::InsufficientSize(size)) => Ok(Err(size.required_size)),
                Err(error) => Err(Error::General(error.to_string())),
            })?;
            Ok(Turn::Again)
        }
        ConnectionState::TransmitTlsData(data) => {
            // It is the first that will be sent.
            data.done();
            Ok(Turn::Again)
        }
        ConnectionState::WriteTraffic(mut traffic) => match what {
            Send::Nothing => Ok(Turn::Idle),
            Send::Data(bytes) => encrypt(outgoing, bytes.len(), &mut traffic, |traffic, room| {
                traffic.encrypt(bytes, room)
            }),
            Send::CloseNotify => encrypt(outgoing, 0, &mut traffic, |traffic, room| {
                traffic.queue_close_notify(room)
            }),
        },
        ConnectionState::PeerClosed => Ok(Turn::Ended),
        // We have ended our side, and read on; or the handshake goes on.
        ConnectionState::Closed | ConnectionState::BlockedHandshake => Ok(Turn::Idle),
        // Nobody is offered to send early.
        state => Err(Error::General(format!("{state:?} where it cannot be"))),
    });
    (discard, turn)
}

fn encrypt<Data>(
    outgoing: &mut Outgoing,
    len: usize,
    traffic: &mut WriteTraffic<'_, Data>,
    mut write: impl FnMut(&mut WriteTraffic<'_, Data>, &mut [u8]) -> Result<usize, EncryptError>,
) -> Result<Turn, Error> {
    outgoing.room(len + (len / FRAGMENT + 1) * PER_RECORD);
    put(outgoing, |room| match write(traffic, room) {
        Ok(count) => Ok(Ok(count)),
        Err(EncryptError::InsufficientSize(size)) => Ok(Err(size.required_size)),
        Err(error) => Err(Error::General(error.to_string())),
    })?;
    Ok(Turn::Encrypted)
}

/// Appends what is written into the room that it asks for.
fn put(
    outgoing: &mut Outgoing,
    mut write: impl FnMut(&mut [u8]) -> Result<Result<usize, usize>, Error>,
) -> Result<(), Error> {
    let mut room = 0;
    // Once more where the room was too small: then it is what was asked for.
    for _ in 0..2 {
        match write(outgoing.room(room))? {
            Ok(count) => {
                outgoing.filled.end += count;
                return Ok(());
            }
            Err(required) => room = required,
        }
    }
    Err(Error::General("a record has no end of its size".into()))
}

/// What is to be sent.
struct Outgoing {
    bytes: Vec<u8>,
    filled: Range<usize>,
}

impl Outgoing {
    /// Room behind it: so much, or more.
    fn room(&mut self, len: usize) -> &mut [u8] {
        let end = self.filled.end;
        if self.bytes.len() < end + len {
            self.bytes.resize(end + len, 0);
        }
        &mut self.bytes[end..]
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("handshaking", &self.is_handshaking())
            .field("ended", &self.ended)
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}
