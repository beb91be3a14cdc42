//! `vfio-migrate probe`: what the kernel's device at a path can do, or why it cannot migrate.
//!
//! Opens the device, asks, and closes it; its state is not changed. One thread, no waits of its own.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use vfio_migration::{
    DeviceState, MigrationFlags,
    estimate::MAX_DATA_SIZE,
    vfio::{Ability, Support},
};

use crate::{kernel, output};

/// Show what the VFIO device at a sysfs path can do, or why it cannot migrate
///
/// The device must be bound to a VFIO driver, such as mlx5-vfio-pci, and not in use.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The device: /sys/bus/pci/devices/0000:3b:00.2, or /sys/bus/mdev/devices/UUID
    #[arg(value_name = "SYSFS_PATH")]
    path: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
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
            |bytes| match bytes {
                ..=MAX_DATA_SIZE => format!("{bytes} bytes"),
                _ => format!("{bytes} bytes, which is not to be believed"),
            },
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

/// Runs `probe`.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let (device, ability) = kernel::open(&options.path)?;
    drop(device);
    let found = Found::new(options, &ability);
    if options.json {
        output::print_json(&found)
    } else {
        output::print(&found.text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_estimates() {
        let mut found = Found {
            device: "/sys/x".into(),
            state: "RUNNING".into(),
            states: vec!["STOP".into(), "RUNNING".into()],
            precopy: false,
            p2p: true,
            dma_logging: say(Support::NotThisKernel),
            precopy_info_flags: say(Support::NotThisDevice),
            estimated_bytes: Some(96),
        };
        let text = found.text();
        for line in [
            "  state        RUNNING",
            "  states       STOP RUNNING",
            "  PRE_COPY     no",
            "  P2P          yes",
            "  DMA logging  no: the kernel knows nothing of it",
            "  info flags   no: this device does not have it",
            "  estimate     96 bytes",
        ] {
            assert!(text.lines().any(|it| it == line), "{line}: {text}");
        }
        found.estimated_bytes = Some(u64::MAX - 7);
        assert!(found.text().contains("not to be believed"));
        found.estimated_bytes = None;
        assert!(found.text().contains("cannot tell"));
    }
}
