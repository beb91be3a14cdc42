//! The host itself: its kernel, io_uring, limits, memory, and VFIO's files.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

use nix::{
    errno::Errno,
    sys::resource::{RLIM_INFINITY, Resource, getrlimit},
};
use procfs::{Current, KernelVersion, Meminfo};
use vfio_migration::{Settings, Spill};

use super::{Finding, Status};
use crate::{
    args::show,
    host_memory::{Need, of_load},
    limits,
};

/// Looks at everything, for a load of so many devices over so many channels: it needs more than a save.
pub(super) fn look(devices: u32, channels: u32) -> Vec<Finding> {
    vec![
        kernel(),
        io_uring(),
        open_files(devices, channels),
        threads(devices, channels),
        memory(devices, channels),
        huge_pages(),
        vfio(Path::new("/dev")),
    ]
}

fn kernel() -> Finding {
    const WHAT: &str = "kernel";
    match KernelVersion::current() {
        Ok(version) => of_version(version),
        Err(error) => Finding::bad(
            WHAT,
            Status::Limited,
            format!("its version is not known: {error}"),
            "mount /proc",
        ),
    }
}

fn of_version(version: KernelVersion) -> Finding {
    const WHAT: &str = "kernel";
    let at_least = |major, minor| version >= KernelVersion::new(major, minor, 0);
    let found = format!(
        "Linux {}.{}.{}",
        version.major, version.minor, version.patch
    );
    if !at_least(5, 18) {
        let advice =
            "Linux 5.18 or newer: before, VFIO devices cannot migrate by the states of today";
        return Finding::bad(WHAT, Status::Missing, found, advice);
    }
    if !at_least(6, 2) {
        let advice =
            "Linux 6.2 or newer has PRE_COPY, DMA logging, and the size of a device's state";
        return Finding::bad(WHAT, Status::Limited, found, advice);
    }
    Finding::good(WHAT, found)
}

fn sysctl(name: &str) -> Option<String> {
    let text = fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?;
    Some(text.trim().to_owned())
}

fn io_uring() -> Finding {
    of_io_uring(
        vfio_migration_uring::support(),
        sysctl("kernel/io_uring_disabled").as_deref(),
    )
}

/// From what a ring said, and `kernel.io_uring_disabled`.
fn of_io_uring(
    support: io::Result<vfio_migration_uring::Support>,
    disabled: Option<&str>,
) -> Finding {
    const WHAT: &str = "io_uring";
    const INSTEAD: &str = "until then plain calls on threads do the same (--backend blocking)";
    let names = |wanted: bool, operations: &[(&'static str, bool)]| {
        let names = operations
            .iter()
            .filter(|(_, is_there)| *is_there == wanted);
        names.map(|(name, _)| *name).collect::<Vec<_>>().join(" ")
    };
    match support {
        Ok(support) => {
            let lacking = names(false, &support.operations);
            if !lacking.is_empty() {
                let advice = format!("Linux 5.11 or newer; {INSTEAD}");
                let found = format!("lacks the operations {lacking}");
                return Finding::bad(WHAT, Status::Limited, found, advice);
            }
            let found = format!("allowed: {}", names(true, &support.operations));
            if support.restricted {
                Finding::good(WHAT, format!("{found}; a ring is restricted to these"))
            } else {
                let advice =
                    "nothing to do: it works; a ring that can be restricted gains a thief less";
                let found = format!("{found}; a ring cannot be restricted to these");
                Finding::bad(WHAT, Status::Limited, found, advice)
            }
        }
        Err(error) => {
            let advice = match disabled {
                Some("2") => format!("sysctl kernel.io_uring_disabled=0; {INSTEAD}"),
                Some("1") => format!(
                    "run in the group of kernel.io_uring_group, with CAP_SYS_ADMIN, or with sysctl \
                     kernel.io_uring_disabled=0; {INSTEAD}"
                ),
                _ if matches!(
                    Errno::from_raw(error.raw_os_error().unwrap_or(0)),
                    Errno::EPERM | Errno::ENOSYS
                ) =>
                {
                    format!(
                        "a container's or service's filter may forbid it: allow io_uring_setup, \
                     io_uring_enter and io_uring_register; {INSTEAD}"
                    )
                }
                _ => INSTEAD.to_owned(),
            };
            Finding::bad(
                WHAT,
                Status::Limited,
                format!("not to be had: {error}"),
                advice,
            )
        }
    }
}

fn open_files(devices: u32, channels: u32) -> Finding {
    let needed = limits::files(channels.into(), devices.into());
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or_default();
    of_open_files(needed, soft, hard)
}

fn of_open_files(needed: u64, soft: u64, hard: u64) -> Finding {
    const WHAT: &str = "open files";
    let found = format!("{needed} needed, {soft} allowed, {hard} at the most");
    if hard < needed {
        let advice = format!("ulimit -Hn {needed}, or LimitNOFILE={needed} in the unit");
        return Finding::bad(WHAT, Status::Missing, found, advice);
    }
    if soft < needed {
        let advice =
            format!("nothing for this command, which raises it; for a VMM ulimit -n {needed}");
        return Finding::bad(WHAT, Status::Limited, found, advice);
    }
    Finding::good(WHAT, found)
}

/// The lowest `pids.max` of the cgroups that the process is in.
fn most_tasks() -> Option<u64> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let root = Path::new("/sys/fs/cgroup");
    let folder = root.join(own);
    let within = folder.ancestors().take_while(|at| at.starts_with(root));
    let limits = within.filter_map(|at| {
        let text = fs::read_to_string(at.join("pids.max")).ok()?;
        text.trim().parse().ok()
    });
    limits.min()
}

fn threads(devices: u32, channels: u32) -> Finding {
    const WHAT: &str = "threads";
    let needed = u64::from(devices) + 2 * u64::from(channels) + 8;
    let (soft, _) = getrlimit(Resource::RLIMIT_NPROC).unwrap_or_default();
    let user = (soft != RLIM_INFINITY).then_some(soft);
    let most = user.into_iter().chain(most_tasks()).min();
    match most {
        Some(most) if most < needed => Finding::bad(
            WHAT,
            Status::Missing,
            format!("{needed} needed, {most} allowed"),
            format!(
                "ulimit -u, or TasksMax= in the unit: at least {needed} more than it runs already"
            ),
        ),
        Some(most) => Finding::good(WHAT, format!("{needed} needed, {most} allowed")),
        None => Finding::good(WHAT, format!("{needed} needed, no limit")),
    }
}

fn memory(devices: u32, channels: u32) -> Finding {
    const WHAT: &str = "memory";
    // Only channels that carry RAM too have anything to spill.
    let settings = Settings::default().channels(channels).spill(Spill::Off);
    let need = Need {
        budgets: of_load(None, devices as usize),
        devices: devices as usize,
        behind: 0,
        channels: channels as usize,
    };
    if let Err(error) = need.check(&settings) {
        let advice = "ulimit -v and -d, MemoryMax= in the unit; or a smaller --budget";
        return Finding::bad(WHAT, Status::Missing, format!("{error:#}"), advice);
    }
    let needed = settings
        .memory_bound(devices, channels)
        .map_or(0, |bound| bound.total());
    let available = Meminfo::current().ok().and_then(|it| it.mem_available);
    let found = format!(
        "a load takes {} at the most, {} available",
        show(needed),
        available.map_or("an unknown amount".into(), show)
    );
    if available.is_some_and(|available| available < needed) {
        let advice = "a smaller --budget, or fewer devices at a time";
        return Finding::bad(WHAT, Status::Limited, found, advice);
    }
    Finding::good(WHAT, found)
}

fn huge_pages() -> Finding {
    let path = "/sys/kernel/mm/transparent_hugepage/enabled";
    of_huge_pages(fs::read_to_string(path).ok().as_deref())
}

/// From what stands in `transparent_hugepage/enabled`.
fn of_huge_pages(enabled: Option<&str>) -> Finding {
    const WHAT: &str = "huge pages";
    const ADVICE: &str = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled: the budget lies in \
                          huge pages then, and a migration costs less of the processors";
    let chosen = enabled.and_then(|text| {
        let (_, rest) = text.split_once('[')?;
        Some(rest.split_once(']')?.0)
    });
    match chosen {
        Some(chosen @ ("always" | "madvise")) => {
            Finding::good(WHAT, format!("transparent, {chosen}"))
        }
        Some(other) => Finding::bad(
            WHAT,
            Status::Limited,
            format!("transparent, {other}"),
            ADVICE,
        ),
        None => Finding::bad(
            WHAT,
            Status::Limited,
            "this kernel has no transparent ones",
            ADVICE,
        ),
    }
}

/// How many entries of a folder have a name that is right.
fn count(folder: &Path, is_right: impl Fn(&str) -> bool) -> usize {
    let Ok(entries) = folder.read_dir() else {
        return 0;
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| is_right(name)).count()
}

/// VFIO, by the files below `/dev`.
fn vfio(dev: &Path) -> Finding {
    const WHAT: &str = "VFIO";
    let open = |path: &str| {
        let opened = File::options().read(true).write(true).open(dev.join(path));
        opened.map_err(|error| error.kind())
    };
    let groups = count(&dev.join("vfio"), |name| {
        name.parse::<u32>().is_ok() || name.starts_with("noiommu-")
    });
    let cdevs = count(&dev.join("vfio/devices"), |name| name.starts_with("vfio"));
    let (container, iommufd) = (open("vfio/vfio"), open("iommu"));
    let say = |opened: &Result<File, io::ErrorKind>| match opened {
        Ok(_) => "yes".to_owned(),
        Err(io::ErrorKind::NotFound) => "no".to_owned(),
        Err(kind) => format!("cannot be opened ({kind})"),
    };
    let found = format!(
        "containers {}, {groups} groups; iommufd {}, {cdevs} character devices",
        say(&container),
        say(&iommufd)
    );
    let refused = |opened: &Result<File, io::ErrorKind>| matches!(opened, Err(kind) if *kind != io::ErrorKind::NotFound);
    if container.is_ok() || (iommufd.is_ok() && cdevs > 0) {
        return Finding::good(WHAT, found);
    }
    if refused(&container) || refused(&iommufd) {
        let advice = "run as root, or give this user /dev/vfio/vfio and the device's group";
        return Finding::bad(WHAT, Status::Limited, found, advice);
    }
    let advice = "for a relay nothing; for devices: an IOMMU (intel_iommu=on, or the firmware's setting), then \
                  modprobe vfio-pci or the device's own VFIO driver, such as mlx5_vfio_pci";
    Finding::bad(WHAT, Status::Limited, found, advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_told_by_what_it_has() {
        let status = |major, minor| of_version(KernelVersion::new(major, minor, 0)).status;
        assert_eq!(status(5, 17), Status::Missing);
        assert_eq!(status(6, 1), Status::Limited);
        assert_eq!(status(6, 2), Status::Good);
        assert_eq!(status(7, 0), Status::Good);
    }

    #[test]
    fn limits_are_held_against_what_is_needed() {
        let finding = of_open_files(100, 50, 60);
        assert_eq!(finding.status, Status::Missing);
        assert!(
            finding
                .advice
                .is_some_and(|it| it.contains("LimitNOFILE=100"))
        );
        assert_eq!(of_open_files(100, 50, 100).status, Status::Limited);
        assert_eq!(of_open_files(100, 100, 100).status, Status::Good);
    }

    #[test]
    fn an_io_uring_that_is_forbidden_says_by_whom() {
        let forbidden = |disabled| {
            let refused = Err(Errno::EPERM.into());
            let finding = of_io_uring(refused, disabled);
            assert_eq!(finding.status, Status::Limited);
            finding.advice.expect("an advice")
        };
        assert!(forbidden(Some("2")).contains("io_uring_disabled=0"));
        assert!(forbidden(Some("1")).contains("io_uring_group"));
        assert!(forbidden(Some("0")).contains("filter"));
        assert!(forbidden(None).contains("filter"));
    }

    #[test]
    fn huge_pages_are_told_by_their_switch() {
        let status = |text| of_huge_pages(text).status;
        assert_eq!(status(Some("always [madvise] never\n")), Status::Good);
        assert_eq!(status(Some("[always] madvise never\n")), Status::Good);
        assert_eq!(status(Some("always madvise [never]\n")), Status::Limited);
        assert_eq!(status(None), Status::Limited);
    }
}
