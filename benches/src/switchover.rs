//! What a switchover costs beside its bytes: from the VM's stop on the source to its start on the destination.
//!
//! ```text
//!   engine   the examples' source and destination, a VMM's whole integration, in one process over loopback TCP
//!   bare     the same calls and bytes: read each data fd, send, receive, write; the main channel; no engine
//! ```
//!
//! | from | to |
//! |---|---|
//! | just before the devices are asked to stop | the last device on the destination is asked to run |
//!
//! Everything is set up before, on either side, and has gone to sleep: this is not within the downtime.

use std::{
    fs::File,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use vfio_migration::{
    Channel, Device, DeviceId, FdDevice, LoadSession, SaveSession, SourceChannels,
    migration::{
        Capabilities, DeviceSettings, MigratableDevice,
        vm::{self, Reason},
    },
    wire::{self, DEVICE_PACKET_LEN, DeviceKey},
};

use crate::{
    engine,
    sink::{Kind, Sink},
    source,
};

#[path = "../../engine/examples/destination.rs"]
mod example_destination;
#[path = "../../engine/examples/source.rs"]
mod example_source;

use example_destination::destination;
use example_source::{Runs, source as run_source};

/// Channels of each.
const CHANNELS: u32 = 4;
/// Until everybody sleeps who waits, the memory of both sides included that is touched before.
const REST: Duration = Duration::from_millis(20);
/// What a section of the main channel takes, about.
const SECTION: usize = 96;

/// When the devices of the destination were last asked to run.
type Started = Arc<Mutex<Option<Instant>>>;

/// Devices over memfds of `len` bytes, and when the last of them was started.
fn devices(count: u32, len: usize) -> io::Result<(Vec<MigratableDevice>, Started)> {
    let started = Started::default();
    let device = |number: u32| {
        let sink = Sink::new(Kind::Memfd, len)?;
        let tell = started.clone();
        let inner = FdDevice::new(move |_state| {
            sink.rewind()?;
            Ok(sink.file()?.into())
        })
        .with_data_size(move || Ok(len as u64))
        .with_p2p()
        .on_change(move |_old, new| {
            if new == vfio_migration::DeviceState::Running {
                let mut place = tell.lock().unwrap_or_else(PoisonError::into_inner);
                *place = Some(Instant::now());
            }
            Ok(())
        });
        let id = DeviceId::new("0000:00:03.0/vfio", number).expect("a good name");
        let device = Device::new(id, Box::new(inner)).map_err(io::Error::other)?;
        Ok(MigratableDevice::new(device, DeviceSettings::default()))
    };
    let devices: io::Result<Vec<_>> = (0..count).map(device).collect();
    Ok((devices?, started))
}

/// Both ends of TCP connections.
fn connections(count: u32) -> io::Result<Vec<(TcpStream, TcpStream)>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let pair = |_| {
        let near = TcpStream::connect(address)?;
        let (far, _) = listener.accept()?;
        near.set_nodelay(true)?;
        far.set_nodelay(true)?;
        Ok((near, far))
    };
    (0..count).map(pair).collect()
}

/// The examples' main channel is a unix socket by type alone: they read, write and shut it down.
fn main_channel(stream: TcpStream) -> UnixStream {
    OwnedFd::from(stream).into()
}

/// One switchover of `count` devices of `len` bytes.
///
/// # Errors
///
/// The kernel's, or the engine's.
///
/// # Panics
///
/// Where a side does.
pub fn with_engine(count: u32, len: usize) -> io::Result<Duration> {
    let (here, _) = devices(count, len)?;
    let (there, started) = devices(count, len)?;
    let (near, far) = connections(1)?.pop().expect("one was asked for");
    let (main, main_there) = (main_channel(near), main_channel(far));
    let (channels, channels_there): (Vec<_>, Vec<_>) = connections(CHANNELS)?.into_iter().unzip();
    let settings = engine::settings();
    let channels = channels.into_iter().map(Channel::from).collect();
    let channels = SourceChannels::greet(channels, &settings).map_err(io::Error::other)?;
    let session = LoadSession::builder()
        .settings(settings.channels(CHANNELS))
        .channels(channels_there);
    let capabilities = Capabilities::default();
    let (stopped, (runs, _), (moved, _)) = thread::scope(|scope| {
        let here = scope.spawn(|| {
            let mut stopped = None;
            let ended = run_source(
                here,
                &main,
                channels,
                &capabilities,
                Duration::from_secs(10),
                |sources, _channels, _main| {
                    thread::sleep(REST);
                    stopped = Some(Instant::now());
                    vm::stop(sources, Reason::FinishMigration)
                },
            );
            (stopped, ended)
        });
        let there = destination(there, &main_there, session, &capabilities);
        let (stopped, ended) = here.join().expect("the source does not panic");
        (stopped, ended, there)
    });
    match runs {
        Runs::There => {}
        Runs::Here(error) => return Err(io::Error::other(error)),
        Runs::Unknown => return Err(io::Error::other("the destination has said nothing")),
    }
    moved.map_err(io::Error::other)?;
    let started = started.lock().unwrap_or_else(PoisonError::into_inner);
    let (from, to) = (stopped.expect("it was stopped"), started.expect("it runs"));
    Ok(to.saturating_duration_since(from))
}

/// The same without an engine.
///
/// # Errors
///
/// The kernel's.
///
/// # Panics
///
/// Where a side does.
pub fn bare(count: u32, len: usize) -> io::Result<Duration> {
    let states = Sink::several(Kind::Memfd, count, len)?;
    let loaded = Sink::several(Kind::Memfd, count, len)?;
    let files = |sinks: &[Sink]| -> io::Result<Vec<File>> {
        let rewound = |sink: &Sink| sink.rewind().and_then(|()| sink.file());
        sinks.iter().map(rewound).collect()
    };
    let (mut from, to) = (files(&states)?, files(&loaded)?);
    let (mut main, mut main_there) = connections(1)?.pop().expect("one was asked for");
    let (mut near, far): (Vec<_>, Vec<_>) = connections(CHANNELS)?.into_iter().unzip();
    let key = DeviceKey::new(&DeviceId::new("0000:00:03.0/vfio", 0).expect("a good name"));
    let config = wire::wrap_config(&[]);
    let (says, heard) = mpsc::channel();
    // Device n's packets are channel n % CHANNELS's.
    let mut shares: Vec<Vec<File>> = far.iter().map(|_| Vec::new()).collect();
    for (number, file) in to.into_iter().enumerate() {
        shares[number % CHANNELS as usize].push(file);
    }
    thread::scope(|scope| {
        for (mut stream, share) in far.into_iter().zip(shares) {
            let (says, config_len) = (says.clone(), config.len());
            scope.spawn(move || -> io::Result<()> {
                let mut buffer = vec![1; DEVICE_PACKET_LEN + len];
                for mut file in share {
                    stream.read_exact(&mut buffer)?;
                    file.write_all(&buffer[DEVICE_PACKET_LEN..])?;
                    stream.read_exact(&mut buffer[..DEVICE_PACKET_LEN + config_len])?;
                    // Who waits has gone only where it failed itself.
                    let _told = says.send(());
                }
                Ok(())
            });
        }
        let there = scope.spawn(move || -> io::Result<Instant> {
            let mut section = [0; SECTION];
            // SWITCHOVER_START, END and FULL of each device, the end.
            for _ in 0..2 * count + 2 {
                main_there.read_exact(&mut section)?;
            }
            for _ in 0..count {
                heard.recv().map_err(io::Error::other)?;
            }
            Ok(Instant::now())
        });
        let mut buffer = vec![1; len];
        thread::sleep(REST);
        let stopped = Instant::now();
        main.write_all(&[0; SECTION])?;
        for (number, file) in from.iter_mut().enumerate() {
            let stream = &mut near[number % CHANNELS as usize];
            file.read_exact(&mut buffer)?;
            let data_len = u32::try_from(len).expect("a packet is far below 4 GiB");
            let header = wire::encode_packet(&key, 0, false, data_len);
            source::write_both(stream, &header, &buffer)?;
            let config_len = u32::try_from(config.len()).expect("it is short");
            let header = wire::encode_packet(&key, 1, true, config_len);
            source::write_both(stream, &header, &config)?;
        }
        for _ in 0..2 * count + 1 {
            main.write_all(&[0; SECTION])?;
        }
        let started = there.join().expect("it does not panic")?;
        Ok(started.saturating_duration_since(stopped))
    })
}

/// From STOP_COPY to the first packet's last byte on the wire, for a device of `len` bytes that copies. What can be
/// made before the VM stops is there.
///
/// # Errors
///
/// The kernel's, or the engine's.
///
/// # Panics
///
/// Never: the device is there, and its state is not empty.
pub fn first_byte(sink: &Sink, len: usize) -> io::Result<Duration> {
    let id = DeviceId::new("0000:00:03.0/vfio", 0).expect("a good name");
    let (near, far): (Vec<_>, Vec<_>) = connections(CHANNELS)?.into_iter().unzip();
    let mut builder = SaveSession::builder().settings(engine::settings());
    builder = builder.device(crate::sink::device(&id, sink, len).0);
    for stream in near {
        builder = builder.channel(Channel::from(stream));
    }
    builder.prepare(1, 1 << 20).map_err(io::Error::other)?;
    thread::scope(|scope| {
        for mut stream in far {
            scope.spawn(move || {
                let mut buffer = vec![0; 1 << 20];
                while stream.read(&mut buffer).is_ok_and(|count| count > 0) {}
            });
        }
        thread::sleep(REST);
        let session = builder
            .start()
            .map_err(|failed| io::Error::other(failed.error))?;
        let report = session.join();
        report.result.map_err(io::Error::other)?;
        Ok(report.stats.devices[0].phases.first_out)
    })
}
