//! `restore`: devices' states out of a file of `save`.
//!
//! ```text
//!   FILE: is its digest right? are these its devices, with all their packets?     no device is open yet
//!     ─▶ devices, RESUMING ─▶ LoadSession over one channel, FILE's body, digested once more
//!     ─▶ still right ─▶ the drivers check the states, the devices run ─▶ what was restored
//! ```
//!
//! A file that is damaged, cut, or of other devices touches no device. If the load fails, also because FILE
//! has changed meanwhile, no device has left RESUMING: each is reset and goes back to the state in which it
//! came. If a driver refuses its state, all devices are reset and stopped.
//!
//! The main thread checks the file, and watches over the session. A wait ends with the session, which bounds
//! it by `--timeout`, or with Ctrl-C.

use std::{
    os::fd::AsFd,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail};
use vfio_migration::{
    Device, Error, ErrorKind, LoadSession, Settings, Spill, Stats, migration::vm,
};

use crate::{
    Interrupted,
    args::{self, BackendArg},
    device::{self, Left, Spec, Subject},
    host_memory::{Need, of_load},
    interrupt, limits,
    moved::{Kept, Times, Transfer},
    network,
    output::hex,
    progress::Progress,
    save_file::{Contents, SaveFile},
};

/// Restore devices' states from a file of `vfio-migrate save`
///
/// Checks the sha256 of FILE, and that it holds the devices that are given, each complete, and no others.
/// Only then opens the devices, loads them and starts them.
///
/// A file that is damaged or cut, or that holds other devices, touches no device. If a load fails, every
/// device is reset and goes back to the state in which it came. If a driver refuses its state at the end,
/// all devices are reset and stopped. The sha256 finds damage; it does not say who wrote FILE.
#[derive(Debug, clap::Args)]
#[command(after_help = device::HELP_OF_FILE)]
pub(crate) struct Options {
    /// What `save` has written
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// A device, as below; once for each
    #[arg(long = "device", value_name = "SPEC", required = true)]
    devices: Vec<Spec>,
    /// The memory in which packets may wait [default: 32MiB; more from 33 devices on, 128MiB for 1024]
    #[arg(long, value_name = "SIZE", value_parser = args::memory)]
    budget: Option<usize>,
    /// What moves the bytes into the devices
    #[arg(long, value_enum, default_value_t)]
    backend: BackendArg,
    /// The longest time without progress, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = args::seconds)]
    timeout: Duration,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

impl Options {
    fn settings(&self, contents: &Contents) -> Settings {
        let mut settings = Settings::default();
        settings.backend = self.backend.into();
        settings.budget = self.budget;
        settings.no_progress = self.timeout;
        settings.max_packet = contents.max_packet;
        settings.uuid = contents.uuid;
        // Nothing in the file waits for anything behind it.
        settings.spill = Spill::Off;
        // No device leaves RESUMING before the whole file was right.
        settings.stop_after_load = Some(false);
        settings
    }
}

/// Loads the devices, which are in RESUMING then; otherwise as they came, after a reset.
fn load(
    options: &Options,
    settings: Settings,
    contents: &Contents,
    file: &SaveFile,
    devices: Vec<Device>,
    subjects: &[Subject],
) -> anyhow::Result<(Vec<Device>, Stats)> {
    let session = LoadSession::builder()
        .settings(settings)
        .devices(devices)
        .channel(file.channel()?)
        .start()
        .map_err(Error::from)?;
    session.no_more_channels();
    session.switchover_start();
    let lens = subjects.iter().zip(&contents.lens);
    let lens: Vec<_> = lens
        .map(|(subject, len)| (subject.id.clone(), Some(*len)))
        .collect();
    let progress = Progress::new(!options.json, &lens);
    let mut watched = Ok(());
    while !session.is_finished() && watched.is_ok() {
        if interrupt::requested() {
            session.cancel();
        }
        if let Some(progress) = &progress {
            progress.update(&session.stats());
        }
        watched = network::tick(network::TICK, &[session.as_fd()], Vec::new());
    }
    if watched.is_err() {
        session.cancel();
    }
    let report = session.join();
    watched?;
    if let Err(error) = report.result {
        if interrupt::requested() && error.is_cancelled() {
            bail!(Interrupted);
        }
        let back = report.devices.iter();
        let told = device::told(back.filter_map(|it| it.device.as_ref()).map(Left::from));
        let path = options.file.display();
        return Err(match error.kind() {
            ErrorKind::Channel => anyhow!(error).context(format!("cannot read {path} ({told})")),
            _ => anyhow!(error).context(format!("{path} was not loaded ({told})")),
        });
    }
    let devices = report.devices.into_iter().filter_map(|it| it.device);
    Ok((devices.collect(), report.stats))
}

/// Runs `restore`.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    // Until here Ctrl-C ends the process at once: nothing was touched.
    let file = SaveFile::open(&options.file)?;
    let ids: Vec<_> = options.devices.iter().map(Spec::id).collect();
    let contents = file.check(&ids)?;
    let settings = options.settings(&contents);
    let _in_order = interrupt::in_order();
    limits::allow_migration(1, options.devices.len())?;
    let need = Need {
        budgets: of_load(options.budget, options.devices.len()),
        devices: options.devices.len(),
        behind: options.devices.len(),
        channels: 1,
    };
    need.check(&settings)?;
    let (devices, subjects): (Vec<_>, Vec<_>) =
        device::open(&options.devices, false)?.into_iter().unzip();
    let began = Instant::now();
    let (mut devices, stats) = load(options, settings, &contents, &file, devices, &subjects)?;
    let took = began.elapsed();
    if let Err(error) = vm::start(&mut devices) {
        let left = device::told(devices.iter().map(Left::from));
        return Err(anyhow!(error).context(format!("no device was restored ({left})")));
    }
    let kept = || -> anyhow::Result<_> {
        let mut checked = device::check(&subjects, &stats)?;
        device::keep(&mut checked)?;
        Ok(checked)
    };
    let checked = kept().context("all devices are loaded and run, but")?;
    interrupt::settled("all is restored");
    let devices = device::describe(checked, |id| Times::new(None, stats.device(id)));
    Kept {
        transfer: Transfer::new("restored", devices, &stats, took),
        file: options.file.display().to_string(),
        file_bytes: file.len(),
        file_sha256: hex(&file.sha256),
    }
    .tell(options.json);
    Ok(())
}
