//! How a source ends its channels: the destination reads all that was sent and a clean end, also where
//! it has written bytes that nobody reads, as a TLS 1.3 server does with its session tickets.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use nix::sys::socket::{setsockopt, sockopt};
use rustls::{ClientConnection, ServerConnection, StreamOwned};
use vfio_migration::{
    Channel, Device, DeviceId, DeviceState, LoadSession, Relay, Report, SaveSession, TlsStream,
    migration::{Outgoing, OutgoingDevice, SwitchoverAck, SwitchoverAcks},
    sim::{SimConfig, SimDevice, SimHandle},
};

use crate::{
    barrier::sync,
    packets::{config_packet, hello, packet},
    tls::{configs, name},
    watchdog::Watchdog,
};

fn device(seed: u64, len: u64) -> (Device, SimHandle) {
    let config = SimConfig {
        seed,
        len,
        ..SimConfig::default()
    };
    let sim = SimDevice::new(config).unwrap();
    let handle = sim.handle();
    let id = DeviceId::new("0000:00:03.0/vfio", 0).unwrap();
    (Device::new(id, Box::new(sim)).unwrap(), handle)
}

// ------------------------------------------------------------------------------------------ TLS

fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

fn hang_up(socket: &TcpStream) -> impl Fn() + Send + Sync + 'static {
    let socket = socket.try_clone().unwrap();
    move || {
        let _closed = socket.shutdown(Shutdown::Both);
    }
}

/// The two ends of a channel: rustls's own stream, or the engine's.
fn ends(own: bool, near: TcpStream, far: TcpStream) -> (Channel, Channel) {
    let (client, server) = configs();
    if own {
        let near = TlsStream::client(near, client, name()).unwrap();
        return (near.into(), TlsStream::server(far, server).unwrap().into());
    }
    let near = StreamOwned::new(ClientConnection::new(client, name()).unwrap(), near);
    let far = StreamOwned::new(ServerConnection::new(server).unwrap(), far);
    (near.into(), far.into())
}

#[test]
fn five_hundred_loads_over_tls_whose_tickets_nobody_reads() {
    let next = AtomicU32::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let number = next.fetch_add(1, SeqCst)
                    && number < 500
                {
                    let _watchdog = Watchdog::new();
                    tls_load(number % 2 == 0);
                }
            });
        }
    });
}

fn tls_load(own: bool) {
    let (from, saved) = device(1, 400_000);
    let (to, loaded) = device(2, 400_000);
    let mut load = LoadSession::builder().device(to);
    let mut save = SaveSession::builder().device(from);
    for _ in 0..2 {
        let (near, far) = tcp();
        // So that some is still on its way when all has been sent.
        setsockopt(&near, sockopt::SndBuf, &(1 << 20)).unwrap();
        let (near, far) = ends(own, near, far);
        save = save.channel(near);
        load = load.channel(far);
    }
    let load = load.start().unwrap();
    let save = save.start().unwrap();
    load.switchover_start();
    save.join().result.unwrap();
    load.join().result.unwrap();
    assert_eq!(saved.digest(), loaded.digest());
    assert_eq!(saved.config_digest(), loaded.config_digest());
}

// -------------------------------------------------------------------------------- plain sockets

/// What a peer has written and nobody reads.
const NOISE: &[u8] = &[7; 500];

/// A pair of which the near end can hold much that the far end has no room for.
fn narrow() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    setsockopt(&listener, sockopt::RcvBuf, &4096).unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    setsockopt(&near, sockopt::SndBuf, &(1 << 20)).unwrap();
    (near, listener.accept().unwrap().0)
}

/// Reads to the end, which must be a clean one, but begins only when the other end had time to close.
fn late(mut far: impl Read) -> usize {
    thread::sleep(Duration::from_millis(100));
    let mut bytes = Vec::new();
    far.read_to_end(&mut bytes).expect("a clean end");
    bytes.len()
}

const LEN: usize = 100_000;

/// Saves into a channel whose peer reads only when all has been sent and the report is being dropped.
fn saved_into(near: impl Into<Channel>, mut far: impl Read + Write + Send) {
    far.write_all(NOISE).unwrap();
    let (from, _) = device(1, LEN as u64);
    let save = SaveSession::builder().device(from).channel(near);
    let report = save.start().unwrap().join();
    report.result.clone().unwrap();
    thread::scope(|scope| {
        let reading = scope.spawn(|| late(far));
        drop(report);
        assert!(reading.join().unwrap() > LEN, "all of it");
    });
}

#[test]
fn bytes_that_a_peer_has_written_and_nobody_reads_cost_it_nothing() {
    let _watchdog = Watchdog::new();
    let (near, far) = narrow();
    saved_into(near, far);
    let (near, far) = UnixStream::pair().unwrap();
    saved_into(near, far);
    // An embedder's stream, without an end of its own: the peer reads it when the stream is dropped.
    let (near, far) = narrow();
    let hang_up = hang_up(&near);
    let near = Channel::from_stream(near, hang_up);
    far.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    saved_into(near, far);
}

/// As above, of the life cycle: until its cleanup, and not until its abort.
#[test]
fn a_migrations_channels_live_until_it_is_cleaned_up_or_aborted() {
    let _watchdog = Watchdog::new();
    for clean in [true, false] {
        let (near, mut far) = UnixStream::pair().unwrap();
        let setup = crate::vm::Setup {
            len: LEN as u64,
            ..crate::vm::Setup::default()
        };
        let (migratable, handle) = setup.admit(1, setup.config(1));
        let acks = SwitchoverAcks::new(SwitchoverAck::Off);
        let source =
            OutgoingDevice::setup(migratable, &setup.capabilities(), &acks, io::sink()).unwrap();
        let mut outgoing = Outgoing::begin(vec![source], crate::quick::greeted(near)).unwrap();
        outgoing.write_state(&crate::vm::id(1), io::sink()).unwrap();
        outgoing
            .write_config(&crate::vm::id(1), io::sink())
            .unwrap();
        let saved = outgoing.finish().unwrap();
        far.write_all(NOISE).unwrap();
        if clean {
            thread::scope(|scope| {
                let reading = scope.spawn(|| late(far));
                let _stopped = saved.cleanup().unwrap();
                assert!(reading.join().unwrap() > LEN);
            });
            assert_eq!(handle.state(), DeviceState::Stop);
        } else {
            let _running = saved.abort();
            // Closed with the noise unread: the peer is reset, and need not be waited for.
            let mut bytes = Vec::new();
            let error = far.read_to_end(&mut bytes).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
            assert_eq!(handle.state(), DeviceState::Running);
        }
    }
}

/// As above, through a relay.
#[test]
fn nor_do_they_behind_a_relay() {
    let _watchdog = Watchdog::new();
    for unix in [false, true] {
        let relay = Relay::builder().start().unwrap();
        let (mut source, near) = UnixStream::pair().unwrap();
        let (out, destination): (Channel, Box<dyn ReadWrite>) = if unix {
            let (out, destination) = UnixStream::pair().unwrap();
            (out.into(), Box::new(destination))
        } else {
            let (out, destination) = narrow();
            (out.into(), Box::new(destination))
        };
        let mut destination = destination;
        destination.write_all(NOISE).unwrap();
        relay.add_channel(near, out).unwrap();
        let sent = [
            hello(0),
            sync(),
            packet(1, 0, &[1; LEN]),
            config_packet(1, 1, b"config"),
        ]
        .concat();
        source.write_all(&sent).unwrap();
        drop(source);
        let report = relay.join();
        report.result.clone().unwrap();
        thread::scope(|scope| {
            let reading = scope.spawn(|| late(destination));
            drop(report);
            assert_eq!(reading.join().unwrap(), sent.len());
        });
    }
}

trait ReadWrite: Read + Write + Send {}

impl<T: Read + Write + Send> ReadWrite for T {}

// --------------------------------------------------------------------------------------- bounds

/// A peer's end is read as soon as it comes, and the channels' is told before the report is dropped.
#[test]
fn the_end_is_told_when_all_has_been_sent_and_the_peers_end_ends_the_wait() {
    let _watchdog = Watchdog::new();
    let (near, mut far) = UnixStream::pair().unwrap();
    let (from, _) = device(1, LEN as u64);
    let save = SaveSession::builder().device(from).channel(near);
    let report = save.start().unwrap().join();
    let mut bytes = Vec::new();
    far.read_to_end(&mut bytes).unwrap();
    assert!(bytes.len() > LEN);
    // Both may still be done: the channel is open.
    far.write_all(NOISE).unwrap();
    drop(far);
    drop(report);
}

/// Of a stream that is read from without an end: whoever hangs up ends that.
struct Endless {
    socket: UnixStream,
    floods: bool,
}

impl Read for Endless {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.floods {
            return Ok(bytes.len());
        }
        self.socket.read(bytes)
    }
}

impl Write for Endless {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_peer_that_ends_nothing_is_not_waited_for_without_an_end() {
    let _watchdog = Watchdog::new();
    let save = |channel: Channel| {
        let (from, _) = device(1, 10_000);
        let save = SaveSession::builder().device(from).channel(channel);
        let report = save.start().unwrap().join();
        report.result.clone().unwrap();
        report
    };
    // That it lasts at all shows that it waits; the watchdog, that it ends.
    let dropped = |report: Report| {
        let since = Instant::now();
        drop(report);
        since.elapsed()
    };
    let (near, _far) = UnixStream::pair().unwrap();
    assert!(dropped(save(near.into())) >= Duration::from_millis(900));
    for floods in [false, true] {
        let (socket, _far) = UnixStream::pair().unwrap();
        let other = socket.try_clone().unwrap();
        let hung_up = Arc::new(AtomicU32::new(0));
        let counted = hung_up.clone();
        let channel = Channel::from_stream(Endless { socket, floods }, move || {
            counted.fetch_add(1, SeqCst);
            let _closed = other.shutdown(Shutdown::Both);
        });
        dropped(save(channel));
        // Bounded by its bytes, the one; by the time, the other.
        assert_eq!(hung_up.load(SeqCst), u32::from(!floods));
    }
    // A peer that floods a socket.
    let (near, mut far) = UnixStream::pair().unwrap();
    let report = save(near.into());
    let flood = thread::spawn(move || while far.write_all(&[0; 1 << 16]).is_ok() {});
    dropped(report);
    flood.join().unwrap();
}

/// A migration that is off keeps nobody waiting.
#[test]
fn a_failed_save_closes_its_channels_at_once() {
    let _watchdog = Watchdog::new();
    let (near, mut far) = UnixStream::pair().unwrap();
    let (from, _) = device(1, 64 << 20);
    let save = SaveSession::builder().device(from).channel(near);
    let save = save.start().unwrap();
    save.cancel();
    let report = save.join();
    assert!(report.result.is_err());
    let mut bytes = Vec::new();
    far.read_to_end(&mut bytes).unwrap();
    assert!(bytes.len() < 64 << 20);
}
