//! `replay`: devices' states out of captured multifd channels, through the engine.
//!
//! ```text
//!   FILE … ─┬─▶ Scan: is it whole? which devices? where is which idx?
//!           │
//!           └─▶ Channel::from_reader ══▶ LoadSession ──▶ a device ──────▶ pipe ──────▶ Recorders
//!                                                           │                            │
//!                                                           ▼                            ▼
//!                                                     config, sha256      state, sha256, DIR/…
//! ```
//!
//! The files are looked through first: what the engine says of a packet can then be said of a
//! place in a file, and a file that is cut or damaged is found before anything is written.
//!
//! # Threads
//!
//! The session has its own, as always; a few more take all devices' states out of their pipes
//! (`recorder.rs`). The main thread waits for the session.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    io::{self, BufReader, Read, Write},
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use anyhow::{Context, anyhow, bail};
use serde::Serialize;
use sha2::{Digest, Sha256};
use vfio_migration::{
    Channel, Device, DeviceId, LoadSession, RamSink, Report, Settings, Side,
    text::is_printable,
    wire::{DeviceKey, PageSize},
};

use crate::{
    Interrupted, Usage,
    args::{self, BackendArg, SpillArgs, WriterArg},
    capture::{Scan, show_key},
    capture_set::{self, DeviceKeyOrder, by_device, check, explain},
    host_memory::{Need, of_load},
    interrupt, json,
    moved::{self, Moved},
    network,
    observe::{ObserveArgs, Observer},
    output::{self, hex},
    progress::Progress,
    recorder::{self, Kept, Recorders, lock},
    save_file::SaveFile,
    state_files::{self, Directory, StateFile, Target},
};

/// Receive captured multifd channels, and show the devices' states that they carry
///
/// A FILE holds what one multifd connection of QEMU carried from the source to the destination; give
/// all files of a migration. The engine receives them at once, as a destination would. For each device
/// it prints the packets, and the bytes and sha256 of the state (the packets' data in idx order) and of
/// the config (its packet's data, framing tags included). RAM and SYNC packets are counted and skipped.
///
/// Device state that the main channel carried is not in these files.
///
/// A file of `vfio-migrate save` is such a FILE too, by itself. Its sha256 is checked first.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// A captured multifd channel
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Write each device's state and config to DIR/<idstr>-<instance>.state and .config
    ///
    /// Every / of an idstr, and each character that a terminal would not show, becomes _. A name that
    /// is too long, or that two devices would share, ends in a part of the idstr's sha256 instead. The
    /// output says which file belongs to which device. The files appear together, when all has been
    /// loaded; their mode is 0600. The directory is made if it does not exist.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Replace existing files
    #[arg(long, requires = "out")]
    force: bool,
    #[command(flatten)]
    observe: ObserveArgs,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    /// The page size of the VM's architecture, on which the size of RAM and SYNC packets depends
    #[arg(long, value_name = "SIZE", default_value = "4KiB", value_parser = args::page_size)]
    page_size: PageSize,
    /// What moves the bytes into the devices
    #[arg(long, value_enum, default_value_t)]
    backend: BackendArg,
    /// Which thread writes to the devices
    #[arg(long, value_enum, default_value_t)]
    writer: WriterArg,
    #[command(flatten)]
    spill: SpillArgs,
}

/// Passes over what is not a device's: the session counts it.
struct PassOver;

impl RamSink for PassOver {
    fn ram(&mut self, _header: &[u8], _pages: &mut dyn Read) -> io::Result<()> {
        Ok(())
    }

    fn sync(&mut self, _header: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

// -------------------------------------------------------------------------------------- output

/// Where all files go.
struct Out<'a> {
    path: &'a Path,
    directory: Directory,
}

/// Where the files of one device go.
#[derive(Debug)]
struct Files {
    state: Arc<Target>,
    config: Target,
}

/// A device's file name, without its ending: one that no device before it has.
fn stem(key: &DeviceKey, taken: &mut HashSet<String>) -> String {
    /// Of the 255 bytes that a name can have: room for what follows, and for the endings.
    const LONGEST: usize = 200;
    let idstr = String::from_utf8_lossy(key.idstr());
    let safe = |c: char| if c == '/' || !is_printable(c) { '_' } else { c };
    let mut name: String = idstr.chars().map(safe).collect();
    let plain = name.len() <= LONGEST && !taken.contains(&format!("{name}-{}", key.instance()));
    if !plain {
        let ends = (0..=LONGEST.min(name.len())).rev();
        let end = ends.into_iter().find(|end| name.is_char_boundary(*end));
        name.truncate(end.unwrap_or(0));
        let digest = hex(&Sha256::digest(key.idstr())[..8]);
        name = format!("{name}-{digest}");
    }
    let mut stem = format!("{name}-{}", key.instance());
    let mut number = 1_u32;
    // Ends: each round is another name, and so many are not taken.
    while !taken.insert(stem.clone()) {
        number += 1;
        stem = format!("{name}.{number}-{}", key.instance());
    }
    stem
}

impl Files {
    fn new(out: &Out<'_>, stem: &str, force: bool) -> anyhow::Result<Self> {
        let target = |ending: &str| {
            let path = out.path.join(format!("{stem}.{ending}"));
            let target = Target::within(out.directory.clone(), &path)?;
            if target.exists() && !force {
                bail!(Usage(format!(
                    "{} is there already: --force replaces it",
                    target.path().display()
                )));
            }
            Ok(target)
        };
        Ok(Self {
            state: Arc::new(target("state")?),
            config: target("config")?,
        })
    }
}

/// One device of the replay.
struct Subject {
    key: DeviceKey,
    id: DeviceId,
    files: Option<Files>,
    kept: Arc<Mutex<Kept>>,
}

impl Subject {
    fn device(&self, recorders: &Recorders) -> anyhow::Result<Device> {
        let target = self.files.as_ref().map(|files| files.state.clone());
        let recorder = recorder::device(target, self.kept.clone(), recorders.pipes().clone());
        Ok(Device::new(self.id.clone(), Box::new(recorder))?)
    }

    /// Why the device's state could not be kept, where that is why the load failed.
    fn failure(&self) -> Option<anyhow::Error> {
        let recorded = lock(&self.kept).state.as_ref()?.try_recv();
        let error = recorded.ok()?.err()?;
        let files = self.files.as_ref()?;
        Some(anyhow!(error).context(format!("cannot write {}", files.state.path().display())))
    }

    /// What has come of it, and its files, which have no names yet.
    fn finish(&self, packets: u64) -> anyhow::Result<(Moved, Vec<(&Target, StateFile)>)> {
        let (state, file, config) = {
            let mut kept = lock(&self.kept);
            (kept.state.take(), kept.file.take(), kept.config.take())
        };
        let state = state.context("the device was never loaded")?;
        // Comes when the engine has closed the pipe, which it has.
        let state = state.recv().map_err(|_| anyhow!("a thread panicked"))??;
        let config = config.context("the device's config was never loaded")?;
        let mut written = Vec::new();
        if let (Some(files), Some(file)) = (&self.files, file) {
            written.push((&*files.state, file));
            let file = files.config.create()?;
            let mut writer = file.file();
            let path = || files.config.path().display().to_string();
            writer.write_all(&config).with_context(path)?;
            written.push((&files.config, file));
        }
        let moved = Moved {
            idstr: self.id.idstr().to_owned(),
            instance: self.id.instance(),
            packets,
            state_bytes: state.bytes,
            state_sha256: Some(state.sha256),
            config_bytes: config.len() as u64,
            config_sha256: hex(&Sha256::digest(&config)),
            state_file: self
                .files
                .as_ref()
                .map(|files| files.state.path().display().to_string()),
            times: None,
        };
        Ok((moved, written))
    }
}

#[derive(Serialize)]
struct Output {
    devices: Vec<Moved>,
    channels: Vec<moved::Channel>,
}

impl Output {
    fn print(&self, json: bool) -> anyhow::Result<()> {
        if json {
            return json::print(self);
        }
        let mut text: String = self.devices.iter().map(Moved::text).collect();
        if self.devices.is_empty() {
            text.push_str("no device's packets\n");
        }
        text.push('\n');
        text.push_str(&moved::channel_table(&self.channels));
        output::print(&text)
    }
}

// ----------------------------------------------------------------------------------------- run

/// Where a device is first named.
fn first_place(scans: &[Scan], key: &DeviceKey) -> String {
    let mut named = scans.iter().filter_map(|scan| {
        let places = scan.places.iter();
        let place = { places }.find(|place| scan.keys[place.device] == *key)?;
        Some(format!("{} byte {}", scan.name(), place.offset))
    });
    named.next().unwrap_or_default()
}

fn subjects(scans: &[Scan], out: Option<&Path>, force: bool) -> anyhow::Result<Vec<Subject>> {
    let mut subjects = Vec::new();
    let mut names = HashSet::new();
    let open = |path| -> anyhow::Result<_> {
        let directory = Directory::open(path)?;
        Ok(Out { path, directory })
    };
    let out = out.map(open).transpose()?;
    for (DeviceKeyOrder(key), _) in by_device(scans) {
        let id = key.id().with_context(|| {
            let (place, key) = (first_place(scans, &key), show_key(&key));
            format!("{place}: device {key}: this idstr is no name")
        })?;
        let files = out
            .as_ref()
            .map(|out| Files::new(out, &stem(&key, &mut names), force));
        subjects.push(Subject {
            key,
            id,
            files: files.transpose()?,
            kept: Arc::default(),
        });
    }
    Ok(subjects)
}

fn load(
    options: &Options,
    scans: &[Scan],
    subjects: &[Subject],
    settings: Settings,
    recorders: &Recorders,
    observer: &Observer,
) -> anyhow::Result<Report> {
    let mut builder = LoadSession::builder().settings(settings);
    for subject in subjects {
        builder = builder.device(subject.device(recorders)?);
    }
    for scan in scans {
        let file =
            state_files::open_regular(&scan.path).with_context(|| scan.name().to_string())?;
        let channel = Channel::from_reader(BufReader::new(file))
            .with_ram_sink(PassOver)
            .with_page_size(options.page_size.bytes())?;
        builder = builder.channel(channel);
    }
    let session = builder.start()?;
    session.no_more_channels();
    session.switchover_start();
    let lens: Vec<_> = subjects
        .iter()
        .map(|subject| (subject.id.clone(), None))
        .collect();
    let progress = Progress::new(!options.json, &lens);
    while !session.is_finished() {
        if interrupt::requested() {
            session.cancel();
        }
        if let Some(progress) = &progress {
            progress.update(&session.stats());
        }
        observer.look(|| vec![(Side::Destination, session.stats())]);
        network::tick(observer.tick(), &[session.as_fd()], Vec::new())?;
    }
    let report = session.join();
    observer.look(|| vec![(Side::Destination, report.stats.clone())]);
    Ok(report)
}

/// Runs `replay`.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    if options.files.len() > 256 {
        bail!(Usage("a migration has 256 channels at most".into()));
    }
    let mut scans = Vec::new();
    for path in &options.files {
        scans.push(Scan::new(path, options.page_size)?);
    }
    check(&scans)?;
    for scan in scans.iter().filter(|scan| scan.digests > 0) {
        SaveFile::open(&scan.path)?;
    }
    if let Some(directory) = &options.out {
        fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    }
    let subjects = subjects(&scans, options.out.as_deref(), options.force)?;
    let mut devices = Vec::new();
    if !subjects.is_empty() {
        let _in_order = interrupt::in_order();
        let observer = options.observe.start()?;
        let received = receive(options, &scans, &subjects, &observer);
        observer.finish(received.as_ref().err());
        devices = received?;
    }
    let channels = (0..).zip(&scans).map(|(channel, scan)| moved::Channel {
        channel,
        file: Some(scan.path.display().to_string()),
        id: Some(scan.hello.map_or(0, |hello| hello.id)),
        bytes: scan.device_bytes,
        packets: scan.places.len() as u64,
        ram_packets: scan.ram_packets,
        syncs: scan.syncs,
        blocked_seconds: None,
    });
    let channels = channels.collect();
    Output { devices, channels }.print(options.json)
}

fn receive(
    options: &Options,
    scans: &[Scan],
    subjects: &[Subject],
    observer: &Observer,
) -> anyhow::Result<Vec<Moved>> {
    let mut settings = capture_set::settings(scans);
    settings.backend = options.backend.into();
    settings.writer = options.writer.into();
    options.spill.set(&mut settings);
    let need = Need {
        budgets: of_load(settings.budget, subjects.len()),
        devices: subjects.len(),
        behind: Recorders::threads(subjects.len()),
        channels: scans.len(),
    };
    need.check(&settings)?;
    let recorders = Recorders::start(subjects.len())?;
    let report = load(options, scans, subjects, settings, &recorders, observer)?;
    if let Err(error) = report.result {
        if interrupt::requested() && error.is_cancelled() {
            bail!(Interrupted);
        }
        // The engine sees a closed pipe; here is why.
        if let Some(failure) = subjects.iter().find_map(Subject::failure) {
            return Err(failure);
        }
        return Err(explain(error, scans));
    }
    let by_id: BTreeMap<&DeviceId, u64> = report
        .stats
        .devices
        .iter()
        .map(|device| (&device.device, device.packets))
        .collect();
    let (mut devices, mut files) = (Vec::new(), Vec::new());
    for subject in subjects {
        let packets = by_id.get(&subject.id).copied().unwrap_or(0);
        let (moved, written) = subject
            .finish(packets)
            .with_context(|| format!("device {}", show_key(&subject.key)))?;
        devices.push(moved);
        files.extend(written);
    }
    state_files::publish(files)?;
    Ok(devices)
}
