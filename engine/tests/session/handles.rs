//! What an embedder may do with the handles of a migration: share them, move them between threads, and pass their
//! errors on with `?`.

use std::{error::Error as _, io, os::unix::net::UnixStream, thread};

use nix::errno::Errno;
use vfio_migration::{
    Canceller, Channel, Device, DeviceReport, DeviceSpec, Error, ErrorKind, Failed,
    InvalidDeviceId, LoadBuilder, LoadSession, Phase, Publisher, Relay, RelayBuilder, RelayReport,
    Report, SaveBuilder, SaveSession, Settings, SourceChannels, Stats, Task, UnknownState,
    migration::{
        Capabilities, Incoming, Loaded, MigratableDevice, MigrationBlockers, Outgoing,
        OutgoingDevice, Saved, SwitchoverAcks,
    },
    wire,
};

use crate::{mock::Mock, names::id, pipes::collect};

fn shared<T: Send + Sync + 'static>() {}
fn moved<T: Send + 'static>() {}
fn passed_on<T: std::error::Error + Send + Sync + 'static>() {}

/// A check that the compiler makes.
#[test]
fn handles_are_shared_and_errors_leave_their_thread() {
    shared::<Canceller>();
    shared::<(LoadSession, SaveSession, Relay)>();
    shared::<(Report, DeviceReport, RelayReport, Stats)>();
    shared::<(Device, MigratableDevice, SourceChannels)>();
    shared::<(OutgoingDevice, Outgoing, Saved)>();
    shared::<(Incoming, Loaded)>();
    shared::<(Capabilities, Settings, SwitchoverAcks, MigrationBlockers)>();
    moved::<(LoadBuilder, SaveBuilder, RelayBuilder, DeviceSpec)>();
    moved::<(Publisher, Channel, Task)>();
    passed_on::<Error>();
    passed_on::<Failed<Vec<Device>>>();
    passed_on::<Failed<Vec<MigratableDevice>>>();
    passed_on::<Failed<MigratableDevice>>();
    passed_on::<InvalidDeviceId>();
    passed_on::<UnknownState>();
}

#[test]
fn a_publisher_moves_between_threads() {
    let (reader, writer) = io::pipe().unwrap();
    let written = collect(reader);
    let load = LoadSession::builder().device(Mock::new(writer).device(3));
    let load = load.start().unwrap();
    load.switchover_start();
    let mut publisher = load.publisher();
    load.no_more_channels();
    let mut expected = Vec::new();
    for index in 0..200 {
        let byte = u8::try_from(index).unwrap();
        expected.extend([byte; 1000]);
        publisher = thread::spawn(move || {
            let header = wire::PacketHeader {
                index,
                config: false,
            };
            let mut lease = publisher.lease(&id(3), header, 1000).unwrap();
            lease.bytes_mut().fill(byte);
            lease.publish().unwrap();
            publisher
        })
        .join()
        .unwrap();
    }
    let header = wire::PacketHeader {
        index: 200,
        config: true,
    };
    let mut config = header.encode().to_vec();
    config.extend(wire::wrap_config(b"config"));
    publisher.push(&id(3), &config).unwrap();
    drop(publisher);
    let report = load.join();
    report.result.as_ref().unwrap();
    drop(report);
    assert_eq!(written.join().unwrap(), expected);
}

#[test]
fn one_canceller_goes_from_the_greeting_to_the_session_and_ends_what_comes_later() {
    let canceller = Canceller::new();
    let (main, mut peer) = UnixStream::pair().unwrap();
    let hung_up = main.try_clone().unwrap();
    canceller.on_cancel(move || hung_up.shutdown(std::net::Shutdown::Both).unwrap());

    let (near, _far) = UnixStream::pair().unwrap();
    let settings = Settings::default();
    let channels = SourceChannels::greet_with(vec![near.into()], &settings, &canceller).unwrap();
    let (reader, _never_ends) = io::pipe().unwrap();
    let save = SaveSession::builder()
        .greeted_channels(channels)
        .device(Mock::new(reader).device(0));
    let save = save.start().unwrap();
    let joined = thread::spawn(move || save.join());
    canceller.cancel();
    let report = joined.join().unwrap();
    assert!(report.result.as_ref().is_err_and(Error::is_cancelled));
    // The VMM's own wait has ended too.
    assert_eq!(io::Read::read(&mut peer, &mut [0]).unwrap(), 0);

    // And every later step of this migration refuses.
    let (near, far) = UnixStream::pair().unwrap();
    let greeted = SourceChannels::greet_with(vec![near.into()], &settings, &canceller);
    assert!(greeted.is_err_and(|error| error.is_cancelled()));
    let load = LoadSession::builder()
        .device(Mock::new(tempfile()).device(0))
        .channel(far);
    let failed = load.cancelled_by(&canceller).start().unwrap_err();
    assert!(failed.error.is_cancelled());
    assert_eq!(failed.into_back().len(), 1);
    let relay = Relay::builder().cancelled_by(&canceller).start();
    assert!(relay.is_err_and(|error| error.is_cancelled()));
    assert!(canceller.check().is_err());
}

fn tempfile() -> io::PipeReader {
    io::pipe().unwrap().0
}

#[test]
fn an_errors_own_text_has_the_errno_and_what_is_missing() {
    let error = Error::new(ErrorKind::Device, Phase::Load)
        .on_device(&id(3))
        .at_index(7)
        .caused_by(Errno::EIO);
    assert_eq!(
        error.to_string(),
        "load, device 0000:00:03.0/vfio, idx 7: the device refused (EIO)"
    );
    assert_eq!(
        error.source().unwrap().to_string(),
        io::Error::from(Errno::EIO).to_string()
    );
    let error = Error::stalled(Phase::Receive, "no hello").on_channel(2);
    assert_eq!(
        error.to_string(),
        "receive, channel 2: no progress for the time allowed: no hello"
    );
    let error = Error::lacking(Phase::Setup, "thread for io", Errno::EAGAIN);
    assert_eq!(
        error.to_string(),
        "setup: the host has no thread for io (EAGAIN)"
    );
    let error =
        Error::new(ErrorKind::Device, Phase::Load).caused_by(io::Error::from_raw_os_error(4095));
    assert!(error.to_string().ends_with("(errno 4095)"), "{error}");
}
