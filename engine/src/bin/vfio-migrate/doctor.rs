//! `doctor`: what this host can do for a migration, and what is to be mended.
//!
//! ```text
//!   kernel, io_uring, limits, memory, /dev ──▶ Finding: a status, what was found, an advice
//!   /sys/bus/*/devices with a VFIO driver ──▶ opened and asked ──▶ Checkup
//! ```
//!
//! | status | meaning |
//! |---|---|
//! | good | as it should be |
//! | limited | works; slower, or not for everything |
//! | missing | a migration as was asked for cannot run here |
//!
//! It changes nothing: no limit is raised, no module loaded. A device that nobody uses is opened, asked and
//! closed, which resets a PCI function; one that is in use cannot be opened. One thread; a call lasts as long as
//! a device's driver takes for it.

mod checkup;
mod host;

use anyhow::anyhow;
use serde::Serialize;

use self::checkup::Checkup;
use crate::{failure::Failure, json, output};

/// Show what this host can do for a migration, and what is missing
///
/// Looks at the kernel, io_uring, the limits of this process against what so many devices and channels need,
/// huge pages, VFIO, and every device that is bound to a VFIO driver: whether it can migrate. Each line that is
/// not good has an advice. The limits are those of this process: run it as the VMM or the service runs.
///
/// A device that is not in use is opened and closed. That resets a PCI function.
///
/// The status is 1 if anything is missing.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// For so many devices
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    devices: u32,
    /// For so many channels
    #[arg(long, value_name = "M", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=255))]
    channels: u32,
    /// Do not open the devices
    #[arg(long)]
    leave_devices: bool,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// See the table above.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Good,
    Limited,
    Missing,
}

impl Status {
    const fn name(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Limited => "limited",
            Self::Missing => "missing",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
struct Finding {
    what: &'static str,
    status: Status,
    found: String,
    /// Where it is not good.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

impl Finding {
    fn good(what: &'static str, found: impl Into<String>) -> Self {
        Self {
            what,
            status: Status::Good,
            found: found.into(),
            advice: None,
        }
    }

    fn bad(
        what: &'static str,
        status: Status,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self {
            what,
            status,
            found: found.into(),
            advice: Some(advice.into()),
        }
    }
}

/// All of it.
#[derive(Debug, Serialize)]
struct Report {
    status: Status,
    findings: Vec<Finding>,
    devices: Vec<Checkup>,
    /// What is missing, if anything is.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Failure>,
}

impl Report {
    fn text(&self) -> String {
        let mut text = String::new();
        let mut add = |what: &str, status: Status, found: &str, advice: Option<&String>| {
            text.push_str(&format!("{what:<12} {:<8} {found}\n", status.name()));
            if let Some(advice) = advice {
                text.push_str(&format!("{:21} -> {advice}\n", ""));
            }
        };
        for it in &self.findings {
            add(it.what, it.status, &it.found, it.advice.as_ref());
        }
        for it in &self.devices {
            add("device", it.status, &it.found(), it.advice.as_ref());
        }
        text
    }
}

/// Runs `doctor`.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let findings = host::look(options.devices, options.channels);
    let devices = checkup::all("/sys".as_ref(), !options.leave_devices);
    let all = findings.iter().map(|it| it.status);
    // A device that cannot migrate is that device's matter.
    let status = all.max().unwrap_or(Status::Good);
    let missing = findings.iter().filter(|it| it.status == Status::Missing);
    let missing: Vec<_> = missing.map(|it| it.what).collect();
    let error = (!missing.is_empty()).then(|| {
        anyhow!(
            "missing for {} devices and {} channels: {}",
            options.devices,
            options.channels,
            missing.join(", ")
        )
    });
    let report = Report {
        status,
        findings,
        devices,
        error: error.as_ref().map(Failure::new),
    };
    if options.json {
        json::print(&report)?;
    } else {
        output::print(&report.text())?;
    }
    error.map_or(Ok(()), Err)
}
