//! A program in C of under 200 lines migrates a device to a Rust destination, and takes it back from a Rust source: the
//! guide's two sides.

use std::{
    fs::{self, File},
    io::{Read, Seek},
    os::unix::net::{UnixListener, UnixStream},
    sync::{Arc, Mutex},
    time::Duration,
};

use vfio_migration::{
    Device, DeviceId, DeviceState, FdDevice, LoadSession, Settings, SourceChannels,
    migration::{Capabilities, DeviceSettings, MigratableDevice, vm},
};

#[path = "../../engine/examples/destination.rs"]
mod destination;
#[path = "support/library.rs"]
mod library;
#[path = "../../engine/examples/source.rs"]
mod source;

use library::{ROOT, With, library, program};

/// A device that is a file, with a config of 64 bytes.
fn device(content: &File, config: &Arc<Mutex<[u8; 64]>>) -> MigratableDevice {
    let (file, saved, loaded) = (content.try_clone().unwrap(), config.clone(), config.clone());
    let device = FdDevice::new(move |state| {
        if state == DeviceState::Resuming {
            file.set_len(0)?;
        }
        (&file).rewind()?;
        Ok(file.try_clone()?.into())
    })
    .with_config(
        move |writer| writer.write_all(&*saved.lock().unwrap()),
        move |reader| reader.read_exact(&mut *loaded.lock().unwrap()),
    );
    let id = DeviceId::new("nic", 0).unwrap();
    let device = Device::new(id, Box::new(device)).unwrap();
    MigratableDevice::new(device, DeviceSettings::default())
}

/// The main channel, and the channel, in the order in which the program connects them.
fn accept(listener: &UnixListener) -> (UnixStream, UnixStream) {
    let (main, channel) = (listener.accept().unwrap().0, listener.accept().unwrap().0);
    (main, channel)
}

fn there_and_back(with: With, backend: &str) {
    let path = library().join("socket");
    let _old = fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let mut program = program("tests/c/there_and_back.c", with);
    let mut child = program.arg(&path).arg(backend).spawn().unwrap();
    let name = library().join("content");
    let content = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(name);
    let (mut content, config) = (content.unwrap(), Arc::new(Mutex::new([0; 64])));
    let capabilities = Capabilities::default();

    let (main, channel) = accept(&listener);
    let session = LoadSession::builder().channel(channel);
    let devices = vec![device(&content, &config)];
    let (moved, devices) = destination::destination(devices, &main, session, &capabilities);
    moved.unwrap();
    assert_eq!(devices[0].state(), DeviceState::Running);
    let mut bytes = Vec::new();
    content.rewind().unwrap();
    content.read_to_end(&mut bytes).unwrap();
    let wanted: Vec<u8> = (0..2_500_000_u32)
        .map(|at| (at * 31 + at / 4096).to_le_bytes()[0])
        .collect();
    assert!(bytes == wanted);
    assert_eq!(*config.lock().unwrap(), [b'c'; 64]);

    let (main, channel) = accept(&listener);
    let channels = SourceChannels::greet(vec![channel.into()], &Settings::default()).unwrap();
    let patience = Duration::from_secs(600);
    let (runs, _) = source::source(
        devices,
        &main,
        channels,
        &capabilities,
        patience,
        |sources, _, _| vm::stop(sources, vm::Reason::FinishMigration),
    );
    if let source::Runs::Here(error) = &runs {
        panic!("{error}");
    }
    assert!(matches!(runs, source::Runs::There), "{runs:?}");
    assert_eq!(child.wait().unwrap().code(), Some(0), "{with:?}");
}

#[test]
fn a_device_of_a_program_in_c_moves_to_a_rust_destination_and_back() {
    let lines = fs::read_to_string(format!("{ROOT}/tests/c/there_and_back.c")).unwrap();
    assert!(lines.lines().count() < 200);
    there_and_back(With::Nothing, "0");
    there_and_back(With::AddressSanitizer, "0");
    there_and_back(With::Valgrind, "2");
}
