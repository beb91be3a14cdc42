//! The devices and the settings of the recorded migrations, as their VMMs had them.

use std::{
    array,
    fs::File,
    io::{self, Read},
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
};

use nix::sys::memfd;
use vfio_migration::{
    DeviceId, DeviceState, FdDevice, PrecopyInfo, RamSink,
    migration::{Capabilities, DeviceSettings, OnOffAuto, SwitchoverAck},
};

use crate::capture::{Capture, id, list, number, text};

const CAPTURES: [&str; 6] = [
    "01-xfer-on-1dev-2ch",
    "05-xfer-on-2dev-3ch",
    "06-xfer-on-1dev-big-2.5MB-4ch",
    "09-xfer-off-1dev-big-2.5MB",
    "10-xfer-on-1dev-paused",
    "22-qemu11-xfer-on-cfg-after-iter-on",
];

/// What a device holds, as the kernel's driver and the VMM would.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    pub whole: Vec<u8>,
    /// How much of it can be read in PRE_COPY.
    pub precopy: usize,
    pub config: Vec<u8>,
    pub states: Vec<DeviceState>,
}

/// A device with contents given, or to be got, in a file.
#[derive(Clone)]
struct Buffered {
    contents: Arc<Mutex<Contents>>,
    /// The session's file, and how much of it was read in PRE_COPY.
    session: Arc<Mutex<(Option<File>, usize)>>,
}

impl Buffered {
    /// `config_len` is the VMM's own knowledge of its config.
    fn device(contents: Arc<Mutex<Contents>>, config_len: usize) -> FdDevice {
        let session = Arc::default();
        let buffered = Self { contents, session };
        let [opens, changes, info, reads, size, saves, loads] =
            array::from_fn(|_| buffered.clone());
        FdDevice::new(move |state| opens.begin(state))
            .with_p2p()
            .with_precopy(
                move || {
                    Ok(PrecopyInfo {
                        initial_bytes: info.left() as u64,
                        ..PrecopyInfo::default()
                    })
                },
                move |fd, buffer| reads.read(fd, buffer),
            )
            .with_data_size(move || Ok(size.contents.lock().unwrap().whole.len() as u64))
            .with_config(
                move |writer| writer.write_all(&saves.contents.lock().unwrap().config),
                move |reader| {
                    let mut config = vec![0; config_len];
                    reader.read_exact(&mut config)?;
                    loads.contents.lock().unwrap().config = config;
                    Ok(())
                },
            )
            .on_change(move |from, to| changes.change(from, to))
    }

    fn begin(&self, state: DeviceState) -> io::Result<OwnedFd> {
        let file = File::from(memfd::memfd_create("device", memfd::MFdFlags::MFD_CLOEXEC)?);
        if state.is_saving() {
            file.write_all_at(&self.contents.lock().unwrap().whole, 0)?;
        }
        let theirs = file.try_clone()?;
        *self.session.lock().unwrap() = (Some(file), 0);
        Ok(theirs.into())
    }

    fn change(&self, from: DeviceState, to: DeviceState) -> io::Result<()> {
        let mut contents = self.contents.lock().unwrap();
        if from == DeviceState::Resuming {
            let file = self.session.lock().unwrap().0.take().unwrap();
            contents.whole = vec![0; usize::try_from(file.metadata()?.len()).unwrap()];
            file.read_exact_at(&mut contents.whole, 0)?;
        }
        contents.states.push(to);
        Ok(())
    }

    fn left(&self) -> usize {
        self.contents.lock().unwrap().precopy - self.session.lock().unwrap().1
    }

    fn read(&self, fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.left().min(buffer.len());
        if len == 0 {
            // As the kernel's sample driver says it.
            return Ok(0);
        }
        let count = nix::unistd::read(fd, &mut buffer[..len])?;
        self.session.lock().unwrap().1 += count;
        Ok(count)
    }
}

/// A VMM's RAM migrator, as far as it matters here.
pub struct Ram(pub Arc<AtomicU32>);

impl RamSink for Ram {
    fn ram(&mut self, _header: &[u8], pages: &mut dyn Read) -> io::Result<()> {
        self.0.fetch_add(1, SeqCst);
        io::copy(pages, &mut io::sink()).map(|_| ())
    }

    fn sync(&mut self, _header: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

pub struct Case {
    pub name: &'static str,
    pub capture: Capture,
    pub transfer: OnOffAuto,
    pub capabilities: Capabilities,
    pub ids: Vec<DeviceId>,
}

pub fn cases() -> impl Iterator<Item = Case> {
    CAPTURES.into_iter().map(|name| {
        let capture = Capture::open(name);
        let mut capabilities = Capabilities::default();
        capabilities.switchover_ack = SwitchoverAck::Once;
        capabilities.config_after_iterables = if name.contains("cfg-after-iter-on") {
            OnOffAuto::On
        } else {
            OnOffAuto::Off
        };
        let transfer = if name.contains("xfer-off") {
            OnOffAuto::Off
        } else {
            OnOffAuto::On
        };
        let ids = list(&capture.expected["devices"]).iter().map(id).collect();
        Case {
            name,
            capture,
            transfer,
            capabilities,
            ids,
        }
    })
}

impl Case {
    /// Bytes of a config, without its tags.
    fn config_len(&self) -> usize {
        let packets = number(&self.capture.expected["devices"][0]["config_bytes"]);
        let sections = list(&self.capture.expected["sections"]).iter();
        let mut tags = sections.flat_map(|section| list(&section["tags"]));
        let section = tags.find(|tag| text(&tag[0]) == "CONFIG");
        section.map_or_else(|| packets - 16, |tag| number(&tag[1]))
    }

    /// How the device's VMM has it set.
    pub fn settings(&self) -> DeviceSettings {
        let mut settings = DeviceSettings::default();
        settings.transfer = self.transfer;
        settings
    }

    pub fn device(&self, contents: Contents) -> (FdDevice, Arc<Mutex<Contents>>) {
        let contents = Arc::new(Mutex::new(contents));
        let device = Buffered::device(contents.clone(), self.config_len());
        (device, contents)
    }
}
