//! `replay`: devices' states out of captured multifd channels, through the engine.
//!
//! ```text
//!   FILE … ─┬─▶ Scan: is it whole? which devices? where is which idx?
//!           │
//!           └─▶ Channel::from_reader ══▶ LoadSession ──▶ Recorder, a device ──▶ pipe
//!                                                           │                    │ its thread
//!                                                           ▼                    ▼
//!                                                     config, sha256      state, sha256, DIR/…
//! ```
//!
//! The files are looked through first: what the engine says of a packet can then be said of a
//! place in a file, and a file that is cut or damaged is found before anything is written.
//!
//! # Threads
//!
//! The session has its own, as always. Behind each device is one more, which takes the state out
//! of the pipe, and ends when the engine closes the pipe. The main thread waits for the session.

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File},
    io::{self, BufReader, PipeReader, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
};

use anyhow::{Context, anyhow, bail, ensure};
use nix::{errno::Errno, fcntl};
use serde::Serialize;
use sha2::{Digest, Sha256};
use vfio_migration::{
    Channel, Device, DeviceId, DeviceState, LoadSession, MigrationDevice, MigrationFlags,
    PrecopyInfo, RamSink, Report,
    wire::{self, DeviceKey, PageSize},
};

use crate::{
    Interrupted, Usage,
    args::{self, BackendArg, SpillArgs},
    capture::{Scan, show_key},
    contents::{self, DeviceKeyOrder, by_device, check, explain},
    interrupt, network,
    output::{self, Moved, hex},
    progress::Progress,
};

/// Receive captured multifd channels, and show the devices' states that they carry
///
/// A FILE is what one multifd connection of QEMU carried from the source to the destination; give
/// all of a migration. They are received at once, by the engine, as a destination would. Of each
/// device it prints the packets, and the bytes and sha256 of the state (the packets' data in idx
/// order) and of the config (its packet's data, framing tags included). RAM and SYNC packets are
/// counted and passed over.
///
/// What the main channel carried of a device's state is not in these files.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// A captured multifd channel
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Write each device's state and config to DIR/<idstr>-<instance>.state and .config
    ///
    /// Every / of an idstr becomes _. The directory is made where it is not there.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// The page size of the VM's architecture, on which the size of RAM and SYNC packets depends
    #[arg(long, value_name = "SIZE", default_value = "4KiB", value_parser = args::page_size)]
    page_size: PageSize,
    /// What moves the bytes into the devices
    #[arg(long, value_enum, default_value_t)]
    backend: BackendArg,
    #[command(flatten)]
    spill: SpillArgs,
}

// ----------------------------------------------------------------------------------- the device

/// What came out of a device's pipe.
struct Recorded {
    bytes: u64,
    sha256: String,
}

/// What is left of a device when it has been loaded.
#[derive(Default)]
struct Kept {
    state: Option<JoinHandle<io::Result<Recorded>>>,
    /// Framing tags included.
    config: Option<Vec<u8>>,
}

/// A device that takes any state, and keeps its digest.
struct Recorder {
    state: DeviceState,
    /// Where the state is written to as well.
    file: Option<PathBuf>,
    kept: Arc<Mutex<Kept>>,
}

fn lock(kept: &Mutex<Kept>) -> std::sync::MutexGuard<'_, Kept> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes a state out of the pipe until the engine closes it.
fn record(mut pipe: PipeReader, mut file: Option<File>) -> io::Result<Recorded> {
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    let mut bytes = 0;
    loop {
        let count = match pipe.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        digest.update(&buffer[..count]);
        if let Some(file) = &mut file {
            file.write_all(&buffer[..count])?;
        }
        bytes += count as u64;
    }
    Ok(Recorded {
        bytes,
        sha256: hex(&digest.finalize()),
    })
}

impl MigrationDevice for Recorder {
    fn flags(&self) -> io::Result<MigrationFlags> {
        Ok(MigrationFlags::STOP_COPY)
    }

    fn state(&self) -> io::Result<DeviceState> {
        Ok(self.state)
    }

    fn set_state(&mut self, new: DeviceState) -> io::Result<Option<OwnedFd>> {
        let fd = match new {
            DeviceState::Resuming => {
                let (reader, writer) = io::pipe()?;
                // A larger pipe is only faster.
                let _as_it_is = fcntl::fcntl(&writer, fcntl::FcntlArg::F_SETPIPE_SZ(1 << 20));
                let file = self.file.as_ref().map(File::create).transpose()?;
                let thread = thread::Builder::new().name("state".into());
                lock(&self.kept).state = Some(thread.spawn(move || record(reader, file))?);
                Some(writer.into())
            }
            DeviceState::Stop | DeviceState::Running => None,
            _ => return Err(Errno::EINVAL.into()),
        };
        self.state = new;
        Ok(fd)
    }

    fn reset(&mut self) -> io::Result<()> {
        self.state = DeviceState::Running;
        Ok(())
    }

    fn data_size(&self) -> io::Result<u64> {
        Err(Errno::ENOTTY.into())
    }

    fn precopy_info(&self, _fd: BorrowedFd<'_>) -> io::Result<PrecopyInfo> {
        Err(Errno::EINVAL.into())
    }

    fn load_config(&mut self, reader: &mut dyn Read) -> io::Result<()> {
        let mut body = Vec::new();
        reader.read_to_end(&mut body)?;
        lock(&self.kept).config = Some(wire::wrap_config(&body));
        Ok(())
    }
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

/// The files of one device, which get their names when all is well.
#[derive(Clone, Debug)]
struct Files {
    /// Without an ending.
    stem: PathBuf,
}

impl Files {
    fn new(directory: &Path, key: &DeviceKey) -> Self {
        let idstr = String::from_utf8_lossy(key.idstr()).replace('/', "_");
        Self {
            stem: directory.join(format!("{idstr}-{}", key.instance())),
        }
    }

    fn with(&self, ending: &str) -> PathBuf {
        let mut path = self.stem.clone().into_os_string();
        path.push(ending);
        path.into()
    }

    fn finish(&self, config: &[u8]) -> anyhow::Result<()> {
        let path = self.with(".config");
        fs::write(&path, config).with_context(|| path.display().to_string())?;
        let path = self.with(".state");
        fs::rename(self.with(".state.partial"), &path).with_context(|| path.display().to_string())
    }

    fn discard(&self) {
        // Perhaps it has never been there.
        let _gone = fs::remove_file(self.with(".state.partial"));
    }
}

/// One device of the replay.
struct Target {
    key: DeviceKey,
    id: DeviceId,
    files: Option<Files>,
    kept: Arc<Mutex<Kept>>,
}

impl Target {
    fn device(&self) -> anyhow::Result<Device> {
        let recorder = Recorder {
            state: DeviceState::Stop,
            file: self
                .files
                .as_ref()
                .map(|files| files.with(".state.partial")),
            kept: self.kept.clone(),
        };
        Ok(Device::new(self.id.clone(), Box::new(recorder))?)
    }

    /// Why the device's state could not be kept, where that is why the load failed.
    fn failure(&self) -> Option<anyhow::Error> {
        let thread = lock(&self.kept)
            .state
            .take_if(|thread| thread.is_finished())?;
        let error = thread.join().ok()?.err()?;
        let files = self.files.as_ref()?;
        Some(anyhow!(error).context(format!("{}", files.with(".state.partial").display())))
    }

    fn finish(&self, packets: u64) -> anyhow::Result<Moved> {
        let (state, config) = {
            let mut kept = lock(&self.kept);
            (kept.state.take(), kept.config.take())
        };
        let state = state.context("the device was never loaded")?;
        let state = state.join().map_err(|_| anyhow!("a thread panicked"))??;
        let config = config.context("the device's config was never loaded")?;
        if let Some(files) = &self.files {
            files.finish(&config)?;
        }
        Ok(Moved {
            idstr: self.id.idstr().to_owned(),
            instance: self.id.instance(),
            packets,
            state_bytes: state.bytes,
            state_sha256: Some(state.sha256),
            config_bytes: config.len() as u64,
            config_sha256: hex(&Sha256::digest(&config)),
        })
    }
}

#[derive(Serialize)]
struct ChannelOutput {
    file: String,
    id: u8,
    bytes: u64,
    packets: u64,
    ram_packets: u64,
    syncs: u64,
}

#[derive(Serialize)]
struct Output {
    devices: Vec<Moved>,
    channels: Vec<ChannelOutput>,
}

impl Output {
    fn print(&self, json: bool) -> anyhow::Result<()> {
        if json {
            return output::print_json(self);
        }
        let mut text: String = self.devices.iter().map(Moved::text).collect();
        let rows = self.channels.iter().map(|channel| {
            vec![
                channel.file.clone(),
                channel.id.to_string(),
                channel.packets.to_string(),
                channel.bytes.to_string(),
                channel.ram_packets.to_string(),
                channel.syncs.to_string(),
            ]
        });
        let rows: Vec<Vec<String>> = rows.collect();
        if self.devices.is_empty() {
            text.push_str("no device's packets\n");
        }
        text.push('\n');
        text.push_str(&output::table(
            &["channel", "id", "device packets", "bytes", "RAM", "SYNC"],
            &rows,
        ));
        output::print(&text)
    }
}

// ----------------------------------------------------------------------------------------- run

fn targets(scans: &[Scan], out: Option<&Path>) -> anyhow::Result<Vec<Target>> {
    let mut targets = Vec::new();
    let mut names = HashSet::new();
    for (DeviceKeyOrder(key), _) in by_device(scans) {
        let id = key
            .id()
            .with_context(|| format!("device {}: this idstr is no name", show_key(&key)))?;
        let files = out.map(|directory| Files::new(directory, &key));
        if let Some(Files { stem }) = &files {
            let new = names.insert(stem.clone());
            ensure!(new, "two devices' files would be {}", stem.display());
        }
        targets.push(Target {
            key,
            id,
            files,
            kept: Arc::default(),
        });
    }
    Ok(targets)
}

fn load(options: &Options, scans: &[Scan], targets: &[Target]) -> anyhow::Result<Report> {
    let mut settings = contents::settings(scans);
    settings.backend = options.backend.into();
    options.spill.set(&mut settings);
    let mut builder = LoadSession::builder().settings(settings);
    for target in targets {
        builder = builder.device(target.device()?);
    }
    for scan in scans {
        let file = File::open(&scan.path).with_context(|| scan.name().to_string())?;
        let channel = Channel::from_reader(BufReader::new(file))
            .with_ram_sink(PassOver)
            .with_page_size(options.page_size.bytes())?;
        builder = builder.channel(channel);
    }
    let mut session = builder.start()?;
    session.no_more_channels();
    session.switchover_start();
    let lens: Vec<_> = targets
        .iter()
        .map(|target| (target.id.clone(), None))
        .collect();
    let progress = Progress::new(!options.json, &lens);
    while !session.is_finished() {
        if interrupt::requested() {
            session.cancel();
        }
        if let Some(progress) = &progress {
            progress.update(&session.stats());
        }
        network::tick(&[session.as_fd()], &[])?;
    }
    Ok(session.join())
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
    let targets = targets(&scans, options.out.as_deref())?;
    let mut devices = Vec::new();
    if !targets.is_empty() {
        if let Some(directory) = &options.out {
            fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
        }
        let _in_order = interrupt::in_order();
        let loaded = receive(options, &scans, &targets, &mut devices);
        if let Err(error) = loaded {
            targets
                .iter()
                .filter_map(|target| target.files.as_ref())
                .for_each(Files::discard);
            return Err(error);
        }
    }
    let channels = scans.iter().map(|scan| ChannelOutput {
        file: scan.path.display().to_string(),
        id: scan.hello.map_or(0, |hello| hello.id),
        bytes: scan.device_bytes,
        packets: scan.places.len() as u64,
        ram_packets: scan.ram_packets,
        syncs: scan.syncs,
    });
    let channels = channels.collect();
    Output { devices, channels }.print(options.json)
}

fn receive(
    options: &Options,
    scans: &[Scan],
    targets: &[Target],
    devices: &mut Vec<Moved>,
) -> anyhow::Result<()> {
    let report = load(options, scans, targets)?;
    if let Err(error) = report.result {
        if interrupt::requested() && error.is_cancelled() {
            bail!(Interrupted);
        }
        // The engine sees a closed pipe; here is why.
        if let Some(failure) = targets.iter().find_map(Target::failure) {
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
    for target in targets {
        let packets = by_id.get(&target.id).copied().unwrap_or(0);
        let moved = target.finish(packets);
        devices.push(moved.with_context(|| format!("device {}", show_key(&target.key)))?);
    }
    Ok(())
}
