//! What does TLS cost, and does the engine's lead survive it?
//!
//! Every row moves 64 MiB of one device's state over loopback TCP, from memory to memory, through whole saves and
//! loads; the handshakes are done before the clock starts. The engine has 4 channels, the peers' algorithm its one
//! connection. Encryption and decryption share the machine: read the ratio between rows, not the numbers. Without
//! the kernel's TLS (`modprobe tls`) its rows are left out, and that is said.

use std::{
    hint::black_box,
    net::{TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rustls::{ClientConnection, ServerConnection, StreamOwned};
use vfio_migration::{
    Channel, ChannelStream, KernelTlsStream, LoadSession, SaveSession, TlsStream,
};
use vfio_migration_benches::{
    plan::Plan,
    sink::{self, Kind, Sink},
    yardstick::whole::{self, Shape},
};

#[path = "../../engine/tests/support/tls.rs"]
mod tls;

const BYTES: usize = 64 << 20;
const CHANNELS: u32 = 4;
const TIME: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, Debug)]
enum Transport {
    Tcp,
    /// rustls's own stream.
    StreamOwned,
    TlsStream,
    Kernel,
}

type Stream = Box<dyn ChannelStream>;

fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let near = TcpStream::connect(listener.local_addr().expect("bound")).expect("it listens");
    let far = listener.accept().expect("it has come").0;
    for socket in [&near, &far] {
        socket.set_nodelay(true).expect("TCP");
    }
    (near, far)
}

/// Both ends of a connection, as the type that serves it.
macro_rules! ends {
    ($transport:expr, $into:ident) => {{
        let (near, far) = tcp();
        let (client, server) = tls::configs();
        match $transport {
            Transport::Tcp => ($into(near), $into(far)),
            Transport::StreamOwned => {
                let client = ClientConnection::new(client, tls::name()).expect("a configuration");
                let server = ServerConnection::new(server).expect("a configuration");
                let mut near = StreamOwned::new(client, near);
                let mut far = StreamOwned::new(server, far);
                thread::scope(|scope| {
                    scope.spawn(|| far.conn.complete_io(&mut far.sock).expect("a handshake"));
                    near.conn.complete_io(&mut near.sock).expect("a handshake");
                });
                ($into(near), $into(far))
            }
            Transport::TlsStream | Transport::Kernel => {
                let mut near =
                    TlsStream::client(near, client, tls::name()).expect("a configuration");
                let mut far = TlsStream::server(far, server).expect("a configuration");
                thread::scope(|scope| {
                    scope.spawn(|| far.handshake(TIME).expect("a handshake"));
                    near.handshake(TIME).expect("a handshake");
                });
                if matches!($transport, Transport::Kernel) {
                    let near = near.into_kernel().expect("the kernel's TLS");
                    let far = far.into_kernel().expect("the kernel's TLS");
                    ($into(near), $into(far))
                } else {
                    ($into(near), $into(far))
                }
            }
        }
    }};
}

/// Moves one state over such a transport, and says how long that took.
type Moves = fn(&Plan, &[Sink], &[Sink], Transport) -> Duration;

fn boxed(stream: impl ChannelStream + 'static) -> Stream {
    Box::new(stream)
}

fn channel(stream: impl ChannelStream + 'static) -> Channel {
    Channel::new(stream)
}

/// The engine on both sides.
fn engine(plan: &Plan, from: &[Sink], to: &[Sink], transport: Transport) -> Duration {
    let (near, far): (Vec<_>, Vec<_>) = (0..CHANNELS).map(|_| ends!(transport, channel)).unzip();
    let ids = plan.ids();
    let (mut save, mut load) = (SaveSession::builder(), LoadSession::builder());
    for ((id, from), to) in ids.iter().zip(from).zip(to) {
        save = save.device(sink::device(id, from, plan.device_bytes()).0);
        load = load.device(sink::device(id, to, 0).0);
    }
    let load = load.channels(far).start().expect("a load starts");
    load.switchover_start();
    let begun = Instant::now();
    let save = save.channels(near).start().expect("a save starts");
    let sent = save.join();
    let loaded = load.join();
    let took = begun.elapsed();
    sent.result.expect("all is sent");
    loaded.result.expect("all is loaded");
    took
}

/// What the peers do.
fn peers(plan: &Plan, from: &[Sink], to: &[Sink], transport: Transport) -> Duration {
    let (mut near, mut far) = ends!(transport, boxed);
    let begun = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            whole::save(Shape::Whole, from, plan.device_bytes(), &mut near).expect("it is sent");
            near.finish().expect("and ended");
        });
        whole::load(Shape::Whole, to, &mut far).expect("it is loaded");
        begun.elapsed()
    })
}

fn transports(c: &mut Criterion) {
    let mut group = c.benchmark_group("tls");
    group
        .throughput(Throughput::Bytes(BYTES as u64))
        .sample_size(10);
    let plan = Plan::of_bytes(1, CHANNELS, 1 << 20, BYTES);
    let sinks = || Sink::several(Kind::Memfd, plan.devices, plan.device_bytes());
    let (from, to) = (sinks().expect("files"), sinks().expect("files"));
    let mut transports = vec![Transport::Tcp, Transport::StreamOwned, Transport::TlsStream];
    if KernelTlsStream::is_available() {
        transports.push(Transport::Kernel);
    } else {
        println!("the kernel has no TLS: its rows are left out");
    }
    for transport in transports {
        for (who, moves) in [("engine", engine as Moves), ("peers", peers)] {
            group.bench_function(BenchmarkId::new(who, format!("{transport:?}")), |b| {
                b.iter_custom(|n| {
                    let rounds = (0..n).map(|_| black_box(moves(&plan, &from, &to, transport)));
                    rounds.sum()
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, transports);
criterion_main!(benches);
