//! `vfio-migrate probe`: what the kernel's device at a path can do, or why it cannot migrate.
//!
//! Opens the device, asks, and closes it; its state is not changed. One thread, no waits of its own. With
//! `--measure` the device is saved to nowhere as well (`measure`).

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use vfio_migration::{DeviceState, MigrationFlags, estimate::MAX_DATA_SIZE, vfio::Support};

use crate::{
    json,
    kernel::{self, Opened},
    measure::{self, Measured},
    output,
};

/// Show what the VFIO device at a sysfs path can do, or why it cannot migrate
///
/// The device must be bound to a VFIO driver, such as mlx5-vfio-pci, and not in use. It is opened by its
/// group, or by its character device and an iommufd.
///
/// With --measure the device is also stopped, its state is read and thrown away, and the device goes back to
/// the state in which it came: how large the state is, how fast it is read, and what downtime that means.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The device: /sys/bus/pci/devices/0000:3b:00.2, /sys/bus/mdev/devices/UUID, or its character
    /// device, /dev/vfio/devices/vfio0
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// Stop the device and read its state, to measure that; only for a device that is not in use
    #[arg(long)]
    measure: bool,
    /// The bandwidth of the network, in Gbit/s [default: 10, 25 and 100]
    #[arg(long, value_name = "GBIT", requires = "measure", value_parser = measure::gbit)]
    bandwidth: Vec<f64>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// What it found.
#[derive(Debug, Serialize)]
struct Found {
    path: String,
    driver: Option<String>,
    /// How it was opened.
    opened_by: String,
    state: String,
    /// The states that it can be asked for.
    states: Vec<String>,
    precopy: bool,
    p2p: bool,
    dma_logging: &'static str,
    precopy_info_flags: &'static str,
    /// Bytes that STOP_COPY would give now, by the driver's estimate.
    estimated_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    measured: Option<Measured>,
}

pub(crate) const fn say(support: Support) -> &'static str {
    match support {
        Support::Yes => "yes",
        Support::NotThisKernel => "no: the kernel knows nothing of it",
        Support::NotThisDevice => "no: this device does not have it",
    }
}

impl Found {
    fn new(options: &Options, opened: &Opened) -> Self {
        let ability = &opened.ability;
        let states = DeviceState::ALL.into_iter();
        Self {
            path: options.path.display().to_string(),
            driver: kernel::driver(&options.path),
            opened_by: opened.way.to_string(),
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
            measured: None,
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
            "{}\n  driver       {}\n  opened by    {}\n  state        {}\n  states       {}\n  PRE_COPY     {}\n  P2P          {}\n  \
             DMA logging  {}\n  info flags   {}\n  estimate     {size}\n",
            self.path,
            self.driver.as_deref().unwrap_or("(none)"),
            self.opened_by,
            self.state,
            self.states.join(" "),
            yes(self.precopy),
            yes(self.p2p),
            self.dma_logging,
            self.precopy_info_flags,
        ) + &self
            .measured
            .as_ref()
            .map_or_else(String::new, Measured::text)
    }
}

/// Runs `probe`.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let opened = kernel::open(&options.path)?;
    let mut found = Found::new(options, &opened);
    // Before it is opened again.
    drop(opened);
    if options.measure {
        let spec = format!("vfio:{}", options.path.display());
        found.measured = Some(Measured::of(&spec, &options.bandwidth, !options.json)?);
    }
    if options.json {
        json::print(&found)
    } else {
        output::print(&found.text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema;

    #[test]
    fn words_and_estimates() {
        let mut found = Found {
            path: "/sys/x".into(),
            driver: Some("mtty".into()),
            opened_by: "its group".into(),
            state: "RUNNING".into(),
            states: vec!["STOP".into(), "RUNNING".into()],
            precopy: false,
            p2p: true,
            dma_logging: say(Support::NotThisKernel),
            precopy_info_flags: say(Support::NotThisDevice),
            estimated_bytes: Some(96),
            measured: None,
        };
        let text = found.text();
        for line in [
            "  driver       mtty",
            "  opened by    its group",
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
        let mut object = serde_json::to_value(&found).expect("JSON");
        object["version"] = 1.into();
        object["command"] = "probe".into();
        assert_eq!(schema::misfit(&object), None, "{object}");
        found.estimated_bytes = Some(u64::MAX - 7);
        assert!(found.text().contains("not to be believed"));
        found.estimated_bytes = None;
        assert!(found.text().contains("cannot tell"));
    }
}
