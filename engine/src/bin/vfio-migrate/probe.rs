//! `vfio-migrate probe`: what the kernel's device at a path can do, or why it cannot migrate.
//!
//! Opens the device, asks, and closes it; its state is not changed. One thread, no waits of its own.

use std::{io, path::PathBuf};

use anyhow::{Context, anyhow};
use clap::Args;
use nix::errno::Errno;
use serde::Serialize;
use vfio_migration::{
    DeviceState, MigrationFlags,
    vfio::{self, Ability, Support},
};

use crate::output;

/// Says what the VFIO device at a sysfs path can do, or why its migration is refused.
///
/// The device must be bound to a VFIO driver, such as mlx5-vfio-pci, and not in use.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The device: /sys/bus/pci/devices/0000:3b:00.2, or /sys/bus/mdev/devices/UUID.
    #[arg(value_name = "SYSFS_PATH")]
    path: PathBuf,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

/// What it found.
#[derive(Debug, Serialize)]
struct Found {
    device: String,
    state: String,
    /// The states that it can be asked for.
    states: Vec<String>,
    precopy: bool,
    p2p: bool,
    dma_logging: &'static str,
    precopy_info_flags: &'static str,
    /// Bytes that STOP_COPY would give now, by the driver's estimate.
    estimated_bytes: Option<u64>,
}

const fn say(support: Support) -> &'static str {
    match support {
        Support::Yes => "yes",
        Support::NotThisKernel => "no: the kernel knows nothing of it",
        Support::NotThisDevice => "no: this device does not have it",
    }
}

impl Found {
    fn new(options: &Options, ability: &Ability) -> Self {
        let states = DeviceState::ALL.into_iter();
        Self {
            device: options.path.display().to_string(),
            state: ability.state.to_string(),
            states: states
                .filter(|state| *state != DeviceState::Error && ability.flags.supports(*state))
                .map(|state| state.to_string())
                .collect(),
            precopy: ability.flags.contains(MigrationFlags::PRE_COPY),
            p2p: ability.flags.contains(MigrationFlags::P2P),
            dma_logging: say(ability.dma_logging),
            precopy_info_flags: say(ability.precopy_info_v2),
            estimated_bytes: ability.data_size,
        }
    }

    fn text(&self) -> String {
        let yes = |is: bool| if is { "yes" } else { "no" };
        let size = self.estimated_bytes.map_or_else(
            || "the kernel cannot tell".to_owned(),
            |bytes| format!("{bytes} bytes"),
        );
        format!(
            "{}\n  state        {}\n  states       {}\n  PRE_COPY     {}\n  P2P          {}\n  \
             DMA logging  {}\n  info flags   {}\n  estimate     {size}\n",
            self.device,
            self.state,
            self.states.join(" "),
            yes(self.precopy),
            yes(self.p2p),
            self.dma_logging,
            self.precopy_info_flags,
        )
    }
}

/// Why a device that can be opened cannot migrate.
fn refused(error: io::Error) -> anyhow::Error {
    let why = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOTTY) => "the kernel has no migration for this device",
        Some(Errno::EINVAL) => "this device or its driver has no migration",
        Some(Errno::EOPNOTSUPP) => "this device has no STOP_COPY",
        _ => return error.into(),
    };
    anyhow!("migration is refused: {why} ({error})")
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let device = vfio::open(&options.path).context("cannot open the device")?;
    let ability = device
        .probe()
        .map_err(refused)
        .with_context(|| options.path.display().to_string())?;
    let found = Found::new(options, &ability);
    if options.json {
        output::print_json(&found)
    } else {
        output::print(&found.text())
    }
}
