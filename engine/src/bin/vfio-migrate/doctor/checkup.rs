//! The devices that are bound to a VFIO driver: found below `/sys`, opened, asked.

use std::path::{Path, PathBuf};

use serde::Serialize;
use vfio_migration::{MigrationFlags, estimate::MAX_DATA_SIZE, vfio::Support};

use super::Status;
use crate::{
    args::show,
    kernel::{self, Opened},
    probe,
};

/// What is known of one.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Checkup {
    path: String,
    driver: Option<String>,
    /// The number of its IOMMU group.
    group: Option<String>,
    /// Its character device.
    cdev: Option<String>,
    pub(super) status: Status,
    /// `null` if it was not asked.
    can_migrate: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ability: Option<Features>,
    /// Why it cannot, or was not asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) advice: Option<String>,
}

/// What it can do.
#[derive(Clone, Debug, Serialize)]
struct Features {
    precopy: bool,
    p2p: bool,
    dma_logging: &'static str,
    estimated_bytes: Option<u64>,
}

/// The devices below a `/sys` that are bound to a VFIO driver, by their paths.
///
/// A driver of VFIO makes a `vfio-dev` in the device's folder, from Linux 6.1 on; before, it is told by its name.
fn found(sys: &Path) -> Vec<PathBuf> {
    let entries = |folder: PathBuf| {
        let entries = folder.read_dir().into_iter().flatten();
        entries.filter_map(|entry| Some(entry.ok()?.path()))
    };
    let is_vfio = |path: &PathBuf| {
        path.join("vfio-dev").is_dir()
            || kernel::driver(path).is_some_and(|driver| driver.contains("vfio"))
    };
    let buses = entries(sys.join("bus"));
    let devices = buses.flat_map(|bus| entries(bus.join("devices")));
    let mut found: Vec<_> = devices.filter(is_vfio).collect();
    found.sort();
    found
}

/// All of them, in the order of their paths.
pub(super) fn all(sys: &Path, ask: bool) -> Vec<Checkup> {
    let found = found(sys).into_iter();
    found.map(|path| Checkup::new(&path, ask)).collect()
}

impl Checkup {
    fn new(path: &Path, ask: bool) -> Self {
        let group = path.join("iommu_group").read_link().ok();
        let group = group.and_then(|link| Some(link.file_name()?.to_string_lossy().into_owned()));
        let cdev = vfio_migration::vfio::cdev(path);
        let mut checkup = Self {
            path: path.display().to_string(),
            driver: kernel::driver(path),
            group,
            cdev: cdev.map(|path| path.display().to_string()),
            status: Status::Limited,
            can_migrate: None,
            ability: None,
            reason: None,
            advice: None,
        };
        if !ask {
            checkup.reason = Some("not asked".into());
            checkup.advice = Some(format!("vfio-migrate probe {}", checkup.path));
            return checkup;
        }
        match kernel::open(path) {
            Ok(opened) => checkup.judge(&opened),
            Err(error) => checkup.refuse(&format!("{error:#}")),
        }
        checkup
    }

    fn judge(&mut self, opened: &Opened) {
        let ability = &opened.ability;
        let features = Features {
            precopy: ability.flags.contains(MigrationFlags::PRE_COPY),
            p2p: ability.flags.contains(MigrationFlags::P2P),
            dma_logging: probe::say(ability.dma_logging),
            estimated_bytes: ability.data_size,
        };
        self.can_migrate = Some(true);
        self.advice = if !features.p2p {
            Some("without P2P it migrates only where it is the VM's one device".into())
        } else if !features.precopy {
            Some("without PRE_COPY all of its state moves in the downtime: probe --measure says how long".into())
        } else if ability.dma_logging != Support::Yes {
            Some("without DMA logging the VMM needs the IOMMU's own tracking of memory, or sends all of it".into())
        } else {
            None
        };
        if self.advice.is_none() {
            self.status = Status::Good;
        }
        self.ability = Some(features);
    }

    fn refuse(&mut self, why: &str) {
        let driver = self.driver.as_deref().unwrap_or_default();
        let in_use = ["os error 16", "busy"].iter().any(|it| why.contains(it));
        let forbidden = why.contains("os error 13") || why.contains("os error 1)");
        self.can_migrate = why.contains("migration is refused").then_some(false);
        self.advice = Some(if in_use {
            "it is in use: ask when its VM is off, or ask the VMM".into()
        } else if forbidden {
            "run as root, or give this user the device's group".into()
        } else if self.can_migrate.is_some() && driver == "vfio-pci" {
            "vfio-pci moves no state: bind the vendor's VFIO driver (mlx5_vfio_pci, virtio_vfio_pci, \
             pds_vfio_pci, hisi_acc_vfio_pci, qat_vfio_pci, ...) by driver_override"
                .into()
        } else if self.can_migrate.is_some() {
            "newer firmware, kernel or driver; or the function must be made able to migrate first (mlx5: devlink \
             port function set ... migratable enable)"
                .into()
        } else {
            format!("vfio-migrate probe {}", self.path)
        });
        self.status = if in_use {
            Status::Limited
        } else {
            Status::Missing
        };
        self.reason = Some(why.to_owned());
    }

    /// For people.
    pub(super) fn found(&self) -> String {
        let driver = self.driver.as_deref().unwrap_or("no driver");
        let group = self.group.as_deref().unwrap_or("none");
        let cdev = self.cdev.as_deref().unwrap_or("no character device");
        let known = match (&self.ability, &self.reason) {
            (Some(it), _) => {
                let yes = |is: bool| if is { "yes" } else { "no" };
                let size = it.estimated_bytes.filter(|bytes| *bytes <= MAX_DATA_SIZE);
                let size = size.map_or("unknown".to_owned(), show);
                format!(
                    "can migrate; PRE_COPY {}, P2P {}, DMA logging {}, estimate {size}",
                    yes(it.precopy),
                    yes(it.p2p),
                    it.dma_logging,
                )
            }
            (None, Some(reason)) => reason.clone(),
            (None, None) => String::new(),
        };
        format!("{} ({driver}, group {group}, {cdev}): {known}", self.path)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    /// Of a tree that looks like `/sys`: by their `vfio-dev`, or by their driver's name.
    #[test]
    fn devices_are_found_by_what_vfio_makes_and_by_their_drivers_names() {
        let sys = std::env::temp_dir().join(format!("vfio-migrate-sys-{}", std::process::id()));
        let device = |bus: &str, name: &str, driver: &str| {
            let path = sys.join("bus").join(bus).join("devices").join(name);
            fs::create_dir_all(&path).expect("a folder");
            let drivers = sys.join("bus").join(bus).join("drivers").join(driver);
            symlink(drivers, path.join("driver")).expect("a link");
            path
        };
        let nic = device("pci", "0000:3b:00.2", "mlx5_vfio_pci");
        let _other = device("pci", "0000:00:1f.0", "e1000e");
        let mdev = device("mdev", "83b8f4f2", "mtty");
        fs::create_dir_all(mdev.join("vfio-dev/vfio0")).expect("a folder");
        symlink("../../iommu_groups/7", nic.join("iommu_group")).expect("a link");
        let all = all(&sys, false);
        let _gone = fs::remove_dir_all(&sys);
        let paths: Vec<_> = all.iter().map(|it| Path::new(&it.path)).collect();
        assert_eq!(paths, [&*mdev, &*nic]);
        assert_eq!(all[1].driver.as_deref(), Some("mlx5_vfio_pci"));
        assert_eq!(all[1].group.as_deref(), Some("7"));
        assert!(all[1].found().contains("group 7"));
    }

    #[test]
    fn a_refusal_has_its_advice() {
        let advice = |driver: &str, why: &str| {
            let mut checkup = Checkup {
                path: "/sys/x".into(),
                driver: Some(driver.into()),
                group: None,
                cdev: None,
                status: Status::Good,
                can_migrate: None,
                ability: None,
                reason: None,
                advice: None,
            };
            checkup.refuse(why);
            (
                checkup.status,
                checkup.can_migrate,
                checkup.advice.expect("an advice"),
            )
        };
        let refused = "migration is refused: this kernel has no support for it";
        let (status, can, text) = advice("vfio-pci", refused);
        assert_eq!((status, can), (Status::Missing, Some(false)));
        assert!(text.contains("mlx5_vfio_pci"));
        let (_, can, text) = advice("mlx5_vfio_pci", refused);
        assert!(can == Some(false) && text.contains("migratable"));
        let busy = "cannot open the device: Device or resource busy (os error 16)";
        let (status, can, text) = advice("mtty", busy);
        assert_eq!((status, can), (Status::Limited, None));
        assert!(text.contains("in use"));
        let (_, _, text) = advice("mtty", "Permission denied (os error 13)");
        assert!(text.contains("root"));
    }
}
