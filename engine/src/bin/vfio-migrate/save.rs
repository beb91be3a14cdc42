//! `save`: devices' states into one file.
//!
//! ```text
//!   FILE can be written? ─▶ devices, PRE_COPY ─▶ what they give while they run ──┐
//!     ─▶ they stop, STOP_COPY ─▶ SaveSession over one channel ──────────────────┴─▶ a file without a name
//!     ─▶ the devices go on ─▶ the digest, fsync, the name FILE ─▶ what was saved
//! ```
//!
//! The file has no name while the devices stand still, and gets it when it is whole (`state_files`). Whatever
//! fails or interrupts a save before that, nothing stands at FILE, and the devices are back in the state in
//! which they came. The fsync is outside of the devices' downtime.
//!
//! The main thread reads in PRE_COPY and watches over the session; the session's threads do the rest. A wait
//! ends with the session, which bounds it by `--timeout`, or with Ctrl-C.

use std::{
    io,
    os::fd::AsFd,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail};
use vfio_migration::{
    Device, Error, SaveSession, Settings, SourceChannels, Stats,
    migration::{
        Capabilities, DeviceSettings, MigratableDevice, OnOffAuto, Outgoing, OutgoingDevice,
        SwitchoverAck, SwitchoverAcks, vm,
    },
};

use crate::{
    Interrupted, Usage,
    args::{self, BackendArg},
    device::{self, Left, Spec, Subject},
    host_memory::{Need, of_save},
    interrupt, limits,
    moved::{Kept, Times, Transfer},
    network,
    output::hex,
    progress::Progress,
    save_file::{self, Sum},
    state_files::{self, StateFile, Target},
};

/// Save devices' states to a file
///
/// Writes every device's state and config to FILE, which `vfio-migrate restore` loads. A device with
/// PRE_COPY gives what it can while it still runs. Then all devices stop, give the rest, and go back to the
/// state in which they came.
///
/// FILE is what one multifd channel carries, so `inspect` and `replay` read it. A sha256 of all of it stands
/// at its end. FILE appears when it is whole and on the disk; its mode is 0600. If the save fails or is
/// interrupted, FILE is as it was before, and the devices are in the state in which they came.
#[derive(Debug, clap::Args)]
#[command(after_help = device::HELP_OF_FILE)]
pub(crate) struct Options {
    /// Where the states go: a path at which nothing stands yet
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// A device, as below; once for each
    #[arg(long = "device", value_name = "SPEC", required = true)]
    devices: Vec<Spec>,
    /// Replace an existing file
    #[arg(long)]
    force: bool,
    /// The most data in a packet [default: the state's size, 64KiB to 1MiB]
    #[arg(long, value_name = "SIZE", value_parser = args::packet)]
    packet: Option<usize>,
    /// The memory in which packets may wait
    #[arg(long, value_name = "SIZE", value_parser = args::memory)]
    budget: Option<usize>,
    /// What moves the bytes out of the devices
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
    fn settings(&self) -> Settings {
        let mut settings = Settings::default();
        settings.backend = self.backend.into();
        settings.budget = self.budget;
        settings.no_progress = self.timeout;
        settings
    }
}

/// What a save is told.
pub(crate) struct Plan {
    pub(crate) settings: Settings,
    /// The most data in a packet.
    pub(crate) packet: Option<usize>,
    /// Whether bars are drawn.
    pub(crate) progress: bool,
}

/// Sets the devices up: those with PRE_COPY are in it then.
fn set_up(plan: &Plan, devices: Vec<Device>) -> anyhow::Result<Vec<OutgoingDevice>> {
    let mut capabilities = Capabilities::default();
    capabilities.precopy_over_channels = true;
    let acks = SwitchoverAcks::new(SwitchoverAck::Off);
    let mut settings = DeviceSettings::default();
    settings.transfer = OnOffAuto::On;
    settings.buffer_len = plan.packet;
    let set_up = |device| {
        let migratable = MigratableDevice::new(device, settings.clone());
        // There is no main channel: what is said there of a device is its state alone.
        let set_up = OutgoingDevice::setup(migratable, &capabilities, &acks, io::sink());
        Ok(set_up.map_err(Error::from)?)
    };
    devices.into_iter().map(set_up).collect()
}

/// Writes what the devices give while they still run. Returns how many bytes.
fn iterate(sources: &mut [OutgoingDevice], channels: &mut SourceChannels) -> anyhow::Result<u64> {
    let mut written = 0;
    // Ends: what is read lowers a device's estimate, which is not asked for anew, and one that has
    // nothing for now has none.
    while sources
        .iter()
        .any(|source| source.pending_estimate().precopy() > 0)
    {
        for source in &mut *sources {
            if source.pending_estimate().precopy() > 0 {
                written += source.iterate_over(channels, io::sink())?.bytes as u64;
            }
            if interrupt::requested() {
                bail!(Interrupted);
            }
        }
    }
    Ok(written)
}

/// Watches over the session until all is written, or it has failed.
fn write_all(plan: &Plan, outgoing: &mut Outgoing, subjects: &[Subject]) -> anyhow::Result<()> {
    for Subject { id, .. } in subjects {
        outgoing.write_state(id, io::sink())?;
        outgoing.write_config(id, io::sink())?;
    }
    let lens: Vec<_> = subjects
        .iter()
        .map(|subject| (subject.id.clone(), subject.len))
        .collect();
    let progress = Progress::new(plan.progress, &lens);
    while !outgoing.is_finished() && outgoing.failure().is_none() {
        if interrupt::requested() {
            outgoing.cancel();
            break;
        }
        if let Some(progress) = &progress {
            progress.update(&outgoing.stats());
        }
        let writing: Vec<_> = outgoing.session().map(AsFd::as_fd).into_iter().collect();
        network::tick(network::TICK, &writing, Vec::new())?;
    }
    Ok(())
}

/// What a save has come to.
pub(crate) struct Written {
    pub(crate) stats: Stats,
    pub(crate) precopy: u64,
    /// How long that took.
    pub(crate) precopy_took: Duration,
    /// From the devices' stop to their last byte.
    pub(crate) took: Duration,
}

/// Writes everything but the digest. The devices are back in the state in which they came, whatever happens.
pub(crate) fn write(
    plan: &Plan,
    devices: Vec<Device>,
    subjects: &[Subject],
    channel: vfio_migration::Channel,
) -> anyhow::Result<Written> {
    let mut channels = SourceChannels::greet(vec![channel], &plan.settings)?;
    let mut sources = set_up(plan, devices)?;
    let began = Instant::now();
    let precopy = iterate(&mut sources, &mut channels)?;
    let precopy_took = began.elapsed();
    let mut session = SaveSession::builder()
        .settings(plan.settings.clone())
        .greeted_channels(channels);
    Outgoing::prepare(&sources, &mut session)?;
    let began = Instant::now();
    vm::stop(&mut sources, vm::Reason::FinishMigration)?;
    let mut outgoing = Outgoing::begin(sources, session).map_err(Error::from)?;
    let watched = write_all(plan, &mut outgoing, subjects);
    if watched.is_err() {
        outgoing.cancel();
    }
    let (back, result) = match outgoing.finish() {
        Ok(saved) => {
            let (stats, took) = (saved.stats().clone(), began.elapsed());
            let written = Written {
                stats,
                precopy,
                precopy_took,
                took,
            };
            // Nothing was sent anywhere: the VM goes on here.
            (saved.abort(), Ok(written))
        }
        Err(failed) => {
            let (error, back) = failed.into_parts();
            let interrupted = interrupt::requested() && error.is_cancelled();
            (
                back,
                Err(if interrupted {
                    Interrupted.into()
                } else {
                    anyhow!(error)
                }),
            )
        }
    };
    let result = watched.and(result);
    if back.iter().map(Left::from).all(|it| it.is_whole()) {
        return result;
    }
    let told = device::told(back.iter().map(Left::from));
    match result {
        Ok(_) => bail!("the devices have not gone back to where they were: {told}"),
        Err(error) => Err(error.context(told)),
    }
}

/// Ends the file, and gives it its name. What can fail here does no more to the devices.
fn keep(
    options: &Options,
    target: &Target,
    file: StateFile,
    sum: &Sum,
) -> anyhow::Result<(String, u64)> {
    let path = || options.file.display().to_string();
    let (sha256, len) = save_file::seal(&file, sum).with_context(path)?;
    if interrupt::requested() {
        bail!(Interrupted);
    }
    state_files::publish(vec![(target, file)])?;
    Ok((hex(&sha256), len))
}

/// Runs `save`.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let _in_order = interrupt::in_order();
    limits::allow_migration(1, options.devices.len())?;
    let need = Need {
        budgets: of_save(options.budget, options.devices.len()),
        devices: options.devices.len(),
        behind: options.devices.len(),
        channels: 1,
    };
    let plan = Plan {
        settings: options.settings(),
        packet: options.packet,
        progress: !options.json,
    };
    need.check(&plan.settings)?;
    let target = Target::new(&options.file)?.private();
    if target.exists() && !options.force {
        bail!(Usage(format!(
            "{} is there already: --force replaces it",
            options.file.display()
        )));
    }
    let path = || options.file.display().to_string();
    let file = target.create().with_context(path)?;
    let (devices, subjects): (Vec<_>, Vec<_>) =
        device::open(&options.devices, true)?.into_iter().unzip();
    let (channel, sum) = save_file::channel(&file).with_context(path)?;
    let Written {
        stats,
        precopy,
        took,
        ..
    } = write(&plan, devices, &subjects, channel).map_err(|error| in_file(error, options))?;
    let checked = device::check(&subjects, &stats)?;
    let (sha256, file_bytes) = keep(options, &target, file, &sum)?;
    interrupt::settled("all is saved");
    let devices = device::describe(checked, |id| Times::new(stats.device(id), None));
    let mut transfer = Transfer::new("saved", devices, &stats, took);
    transfer.totals.precopy_bytes = Some(precopy);
    Kept {
        transfer,
        file: options.file.display().to_string(),
        file_bytes,
        file_sha256: sha256,
    }
    .tell(options.json);
    Ok(())
}

/// A channel's failure is the file's.
fn in_file(error: anyhow::Error, options: &Options) -> anyhow::Error {
    let channel = error
        .downcast_ref::<Error>()
        .is_some_and(|error| *error.kind() == vfio_migration::ErrorKind::Channel);
    if channel {
        error.context(format!("cannot write {}", options.file.display()))
    } else {
        error
    }
}
