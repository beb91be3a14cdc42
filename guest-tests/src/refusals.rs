//! What the driver refuses, and what the engine makes of it.
//!
//! mtty goes on taking bytes after it has refused some, and even goes to STOP then: that nothing is
//! written after the first errno is the engine's to see to.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    sync::{Arc, Condvar, Mutex},
};

use nix::errno::Errno;
use vfio_migration::{
    Backend, Channel, DeviceState, Error, ErrorKind, LoadSession, Phase, Publisher, Recover,
    SaveSession,
};

use crate::{
    Test,
    device::{Small, Subject, config, data, file, pair, settings, until},
    kernel::{HEADER, IMAGE},
};

pub const TESTS: &[Test] = &[
    ("a header that is garbage", garbage),
    ("one byte too many", too_long),
    ("a state cut short", cut_short),
    ("a state cut short, and then completed", completed_late),
    ("the data fd after a reset", reset_behind),
    ("a load whose device was reset", load_reset_behind),
    ("a save whose device was reset", save_reset_behind),
];

/// A load of one device, whose packets the test pushes.
pub struct Loading {
    pub load: LoadSession,
    pub publisher: Publisher,
    packets: u32,
}

impl Loading {
    pub fn start(backend: Backend, small: Small, subject: &Subject) -> Self {
        let load = LoadSession::builder()
            .settings(settings(backend, small, 16))
            .device(subject.device())
            .start()
            .unwrap();
        let publisher = load.publisher();
        load.no_more_channels();
        assert_eq!(subject.kernel.state(), DeviceState::Resuming);
        Self {
            load,
            publisher,
            packets: 0,
        }
    }

    /// Publishes one packet.
    pub fn push(&mut self, subject: &Subject, bytes: &[u8]) -> Result<(), Error> {
        let index = self.packets;
        self.packets += 1;
        self.publisher.push(&subject.id, &data(index, bytes))
    }

    /// Publishes one packet, and waits until it is in the device: it was one write.
    pub fn write(&mut self, subject: &Subject, bytes: &[u8]) {
        let before = self.load.stats().devices[0].transfers.count;
        self.push(subject, bytes).unwrap();
        until(|| self.load.stats().devices[0].transfers.count > before);
    }

    /// Publishes the config packet, which is the last.
    pub fn push_config(&mut self, subject: &Subject) -> Result<(), Error> {
        let payload = config(self.packets, b"config");
        self.publisher.push(&subject.id, &payload)
    }

    /// The end of a load that fails: its error, which the device has too. The device has been reset,
    /// and what was in it before is in it now.
    pub fn fails(self, subject: &Subject, before: &[u8]) -> Error {
        drop(self.publisher);
        let report = self.load.join();
        let error = report.result.unwrap_err();
        let device = report.devices.into_iter().next().unwrap();
        let own = device.result.unwrap_err();
        assert_eq!(own.kind(), error.kind());
        assert_eq!(own.device(), Some(&subject.id));
        let device = device.device.unwrap();
        subject.assert_in(&device, DeviceState::Running);
        assert_eq!(subject.kernel.image(), before);
        error
    }
}

fn garbage(backend: Backend) {
    // However the header comes, the write that completes it is the one that fails.
    let splits: [&[usize]; 5] = [&[24], &[8, 16], &[23, 1], &[96], &[10, 10, 76]];
    for split in splits {
        // One after the other, or all of them ready when the driver may begin.
        for ready in [None, Some(Small::Chained), Some(Small::Gathered)] {
            let subject = Subject::open(1, 1, 7);
            let before = subject.kernel.image();
            let mut loading = Loading::start(backend, ready.unwrap_or(Small::Chained), &subject);
            let (last, rest) = split.split_last().unwrap();
            if ready.is_none() {
                loading.load.switchover_start();
            }
            for len in rest {
                let bytes = vec![0xee; *len];
                match ready {
                    None => loading.write(&subject, &bytes),
                    Some(_) => loading.push(&subject, &bytes).unwrap(),
                }
            }
            loading.push(&subject, &vec![0xee; *last]).unwrap();
            loading.load.switchover_start();
            until(|| loading.load.failure().is_some());
            // Nothing that comes now gets anywhere.
            let late = loading.push(&subject, &[0; 16]).unwrap_err();
            let error = loading.fails(&subject, &before);
            let place = format!("{split:?} {ready:?}: {error}");
            assert_eq!(*error.kind(), ErrorKind::Device, "{place}");
            assert_eq!(error.raw_os_error(), Some(Errno::EFAULT as i32), "{place}");
            assert_eq!(error.phase(), Phase::Load, "{place}");
            // One write is refused as a whole: it is named by its first packet.
            let named = match ready {
                Some(Small::Gathered) => 0,
                _ => rest.len(),
            };
            assert_eq!(error.index(), u32::try_from(named).ok(), "{place}");
            assert!(late.is_cancelled() || late.kind() == error.kind(), "{late}");
        }
    }
}

fn too_long(backend: Backend) {
    let (source, subject) = pair();
    let image = source.kernel.image();
    let before = subject.kernel.image();
    let mut loading = Loading::start(backend, Small::Chained, &subject);
    loading.load.switchover_start();
    for piece in image.chunks(16) {
        loading.write(&subject, piece);
    }
    loading.push(&subject, &[0]).unwrap();
    until(|| loading.load.failure().is_some());
    let error = loading.fails(&subject, &before);
    assert_eq!(*error.kind(), ErrorKind::Device);
    assert_eq!(error.raw_os_error(), Some(Errno::ENOMEM as i32));
    assert_eq!(error.index(), u32::try_from(IMAGE / 16).ok());
}

fn cut_short(backend: Backend) {
    let (source, subject) = pair();
    let image = source.kernel.image();
    for len in [0, 10, HEADER, HEADER + 36, IMAGE - 1] {
        let before = subject.kernel.image();
        let mut loading = Loading::start(backend, Small::Chained, &subject);
        for piece in image[..len].chunks(16) {
            loading.push(&subject, piece).unwrap();
        }
        loading.push_config(&subject).unwrap();
        loading.load.switchover_start();
        let error = loading.fails(&subject, &before);
        assert_eq!(*error.kind(), ErrorKind::State, "{len}: {error}");
        assert_eq!(error.raw_os_error(), Some(Errno::EINVAL as i32));
        let states = (DeviceState::Resuming, DeviceState::Stop);
        assert_eq!(error.states(), Some(states));

        // And the device is as good as before.
        let mut loading = Loading::start(backend, Small::Chained, &subject);
        for piece in image.chunks(13) {
            loading.push(&subject, piece).unwrap();
        }
        loading.push_config(&subject).unwrap();
        loading.load.switchover_start();
        drop(loading.publisher);
        let report = loading.load.join();
        report.result.unwrap();
        let mut device = report.devices.into_iter().next().unwrap().device.unwrap();
        subject.assert_in(&device, DeviceState::Stop);
        device
            .set_state(DeviceState::Running, Recover::Reset)
            .unwrap();
        assert_eq!(subject.kernel.image(), image);
        assert_eq!(*subject.config.lock().unwrap(), b"config");
        drop(device);
        subject.kernel.fill(u8::try_from(len).unwrap());
    }
}

/// STOP is refused, the device stays in RESUMING with its data fd, and a caller who says so goes on.
fn completed_late(_backend: Backend) {
    let (source, subject) = pair();
    let image = source.kernel.image();
    let mut device = subject.device();
    device
        .set_state(DeviceState::Resuming, Recover::Reset)
        .unwrap();
    let mut fd = file(&*device.lend().unwrap());
    for (byte, rest) in image.iter().zip((0..IMAGE).rev()) {
        fd.write_all(&[*byte]).unwrap();
        let stopped = device.set_state(DeviceState::Stop, DeviceState::Resuming);
        if rest == 0 {
            stopped.unwrap();
            break;
        }
        let error = stopped.unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::State);
        assert_eq!(error.raw_os_error(), Some(Errno::EINVAL as i32));
        subject.assert_in(&device, DeviceState::Resuming);
    }
    subject.assert_in(&device, DeviceState::Stop);
    device
        .set_state(DeviceState::Running, Recover::Reset)
        .unwrap();
    assert_eq!(subject.kernel.image(), image);
}

fn dead<T: std::fmt::Debug>(result: io::Result<T>) {
    let error = result.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::ENODEV as i32));
}

fn reset_behind(_backend: Backend) {
    let subject = Subject::open(1, 1, 3);
    let mut device = subject.device();
    for state in [DeviceState::StopCopy, DeviceState::PreCopy] {
        device.set_state(state, Recover::Reset).unwrap();
        let mut fd = file(&*device.lend().unwrap());
        assert_eq!(fd.read(&mut [0; 8]).unwrap(), 8);
        device.reset().unwrap();
        subject.assert_in(&device, DeviceState::Running);
        dead(fd.read(&mut [0; 8]));
        assert_eq!(
            device.lend().unwrap_err().raw_os_error(),
            Some(Errno::EBADF as i32)
        );
    }
    device
        .set_state(DeviceState::Resuming, Recover::Reset)
        .unwrap();
    let mut fd = file(&*device.lend().unwrap());
    assert_eq!(fd.write(&[0; 8]).unwrap(), 8);
    device.reset().unwrap();
    subject.assert_in(&device, DeviceState::Running);
    dead(fd.write(&[0; 8]));
}

/// The driver's ENODEV comes through the ring too, and ends the load by name.
fn load_reset_behind(backend: Backend) {
    let subject = Subject::open(1, 1, 3);
    let image = subject.kernel.image();
    for written in [0, 30] {
        let mut loading = Loading::start(backend, Small::Chained, &subject);
        loading.load.switchover_start();
        if written > 0 {
            loading.write(&subject, &image[..written]);
        }
        subject.kernel.reset().unwrap();
        loading.push(&subject, &image[written..]).unwrap();
        until(|| loading.load.failure().is_some());
        let error = loading.fails(&subject, &image);
        assert_eq!(*error.kind(), ErrorKind::Device);
        assert_eq!(error.raw_os_error(), Some(Errno::ENODEV as i32));
        assert_eq!(error.index(), Some(u32::from(written > 0)));
    }
}

/// A stream that lets so many bytes out, and holds back the rest until it is opened or hung up.
#[derive(Clone)]
pub struct Gate(Arc<(Mutex<Passage>, Condvar)>, Arc<UnixStream>);

struct Passage {
    /// How many bytes may still pass, and whether a write waits for more.
    left: usize,
    waits: bool,
    hung_up: bool,
}

impl Gate {
    /// What is written into it comes out of the socket, for the first `left` bytes.
    pub fn new(left: usize) -> (Self, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        let passage = Passage {
            left,
            waits: false,
            hung_up: false,
        };
        let shared = Arc::new((Mutex::new(passage), Condvar::new()));
        (Self(shared, Arc::new(near)), far)
    }

    pub fn channel(&self) -> Channel {
        let gate = self.clone();
        Channel::from_stream(self.clone(), move || {
            gate.0.0.lock().unwrap().hung_up = true;
            gate.0.1.notify_all();
        })
    }

    pub fn open(&self) {
        self.0.0.lock().unwrap().left = usize::MAX;
        self.0.1.notify_all();
    }

    /// Waits until a write waits.
    pub fn wait(&self) {
        until(|| self.0.0.lock().unwrap().waits);
    }
}

impl Read for Gate {
    fn read(&mut self, _buffer: &mut [u8]) -> io::Result<usize> {
        Ok(0)
    }
}

impl Write for Gate {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut passage = self.0.0.lock().unwrap();
        while passage.left == 0 && !passage.hung_up {
            passage.waits = true;
            passage = self.0.1.wait(passage).unwrap();
        }
        passage.waits = false;
        if passage.hung_up {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let len = bytes.len().min(passage.left);
        passage.left -= len;
        drop(passage);
        (&*self.1).write(&bytes[..len])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A save with memory for a few packets of one byte, on a channel that takes none: it has read some
/// of the device, and stands.
pub fn stuck_save(
    backend: Backend,
    subject: &Subject,
    passes: usize,
) -> (SaveSession, Gate, UnixStream) {
    let mut settings = settings(backend, Small::Chained, 1);
    settings.budget = Some(8 << 10);
    let (gate, far) = Gate::new(passes);
    let save = SaveSession::builder()
        .settings(settings)
        .device(subject.device())
        .channel(gate.channel())
        .start()
        .unwrap();
    gate.wait();
    (save, gate, far)
}

fn save_reset_behind(backend: Backend) {
    let subject = Subject::open(1, 1, 3);
    let (save, gate, far) = stuck_save(backend, &subject, 0);
    subject.kernel.reset().unwrap();
    gate.open();
    let drain = std::thread::spawn(move || io::copy(&mut &far, &mut io::sink()));
    let report = save.join();
    let error = report.result.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Device, "{error}");
    assert_eq!(error.raw_os_error(), Some(Errno::ENODEV as i32));
    assert_eq!(error.device(), Some(&subject.id));
    assert_eq!(error.phase(), Phase::Save);
    let device = report.devices.into_iter().next().unwrap().device.unwrap();
    subject.assert_in(&device, DeviceState::Running);
    drop(gate);
    drain.join().unwrap().unwrap();
}
