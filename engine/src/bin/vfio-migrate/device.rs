//! The devices of a `SPEC`: what a user names, as the engine takes it.
//!
//! ```text
//!   sim:id=…,size=…,seed=…   ┐                 ┌─▶ Device, for the session
//!   file:PATH,id=…           ├─▶ Spec ──open───┤
//!   vfio:SYSFS_PATH,id=…     ┘                 │
//!                                              └─▶ Subject ── describe ──▶ Moved
//! ```
//!
//! Used from the command's main thread, before the session and after it.

use std::{
    collections::HashSet,
    fs::File,
    io::{self, Read},
    path::PathBuf,
    str::FromStr,
};

use anyhow::{Context, bail, ensure};
use sha2::{Digest, Sha256};
use vfio_migration::{
    Device, DeviceId, DeviceStats, MigrationDevice, Stats,
    sim::{Image, SimConfig, SimDevice, SimHandle},
    wire::PACKET_HEADER_LEN,
};

use crate::{
    Usage, args,
    file::FileDevice,
    kernel,
    observed::{ConfigSeen, Observed},
    output::{Moved, hex},
};

/// What is said of SPEC in `send` and `receive`.
pub(crate) const HELP: &str = "\
SPEC is one of:
  sim:id=ID[,size=SIZE][,seed=N][,precopy=SIZE]
                                  a simulated device; size (1MiB) and seed (0) say what state
                                  a source has, and precopy (0) how much of it it gives while it
                                  runs; a destination takes what comes
  file:PATH[,id=ID]               a device whose state is a file: a source reads it, a
                                  destination writes it (PATH.partial until it is whole);
                                  its id is file/NAME unless given, NAME being PATH's last part
  vfio:SYSFS_PATH[,id=ID]         a device of the kernel's, bound to a VFIO driver and not in use;
                                  its id is vfio/NAME unless given. Only what its driver saves is
                                  moved, and no digest of that is known; the kernel may reset the
                                  device when it is closed in the end
All take instance=N as well, the instance id (0). Source and destination must name the same
devices: the same ids and instances, in any order.";

/// Where a device's state is.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Kind {
    Sim { size: u64, seed: u64, precopy: u64 },
    File(PathBuf),
    Vfio(PathBuf),
}

/// A device, as a user names it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Spec {
    id: DeviceId,
    kind: Kind,
}

impl FromStr for Spec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(fields) = text.strip_prefix("sim:") {
            Self::sim(fields)
        } else if let Some(rest) = text.strip_prefix("file:") {
            Self::path("file", rest, Kind::File)
        } else if let Some(rest) = text.strip_prefix("vfio:") {
            Self::path("vfio", rest, Kind::Vfio)
        } else {
            Err(
                "a device is sim:id=ID[,size=SIZE][,seed=N][,precopy=SIZE], file:PATH[,id=ID] \
                 or vfio:SYSFS_PATH[,id=ID]"
                    .into(),
            )
        }
    }
}

fn number<T: FromStr>(name: &str, value: &str) -> Result<T, String> {
    let number = value.parse();
    number.map_err(|_| format!("{name}={value}: not a number that this can be"))
}

fn name(id: &str, instance: u32) -> Result<DeviceId, String> {
    DeviceId::new(id, instance).map_err(|error| error.kind().to_string())
}

impl Spec {
    fn sim(fields: &str) -> Result<Self, String> {
        let (mut id, mut instance, mut size, mut seed, mut precopy) = (None, 0, 1 << 20, 0, 0);
        for field in fields.split(',') {
            match field.split_once('=') {
                Some(("id", value)) => id = Some(value),
                Some(("instance", value)) => instance = number("instance", value)?,
                Some(("size", value)) => {
                    size = args::size(value).map_err(|error| format!("size={value}: {error}"))?;
                }
                Some(("seed", value)) => seed = number("seed", value)?,
                Some(("precopy", value)) => {
                    precopy =
                        args::size(value).map_err(|error| format!("precopy={value}: {error}"))?;
                }
                _ => {
                    return Err(format!(
                        "{field:?}: not id=, instance=, size=, seed= or precopy="
                    ));
                }
            }
        }
        let id = id.ok_or("a simulated device needs id=ID")?;
        Ok(Self {
            id: name(id, instance)?,
            kind: Kind::Sim {
                size,
                seed,
                precopy,
            },
        })
    }

    /// What stands behind the path is taken from its end, for a path may hold commas itself.
    fn path(kind: &str, rest: &str, make: fn(PathBuf) -> Kind) -> Result<Self, String> {
        let (mut path, mut id, mut instance) = (rest, None, 0);
        while let Some((before, field)) = path.rsplit_once(',') {
            match field.split_once('=') {
                Some(("id", value)) => id = Some(value),
                Some(("instance", value)) => instance = number("instance", value)?,
                _ => break,
            }
            path = before;
        }
        let path = PathBuf::from(path);
        let base = path.file_name().and_then(|base| base.to_str());
        let id = match (id, base) {
            (Some(id), _) => id.to_owned(),
            (None, Some(base)) => format!("{kind}/{base}"),
            (None, None) => return Err("this path ends in no name; give id=ID".into()),
        };
        Ok(Self {
            id: name(&id, instance)?,
            kind: make(path),
        })
    }

    /// How long the state is, where that is known.
    fn len(&self) -> Option<u64> {
        match &self.kind {
            Kind::Sim { size, .. } => Some((*size).max(Image::HEADER_LEN)),
            Kind::File(path) => std::fs::metadata(path).ok().map(|meta| meta.len()),
            Kind::Vfio(_) => None,
        }
    }
}

/// Where to look at a device's state from outside.
enum State {
    Sim(SimHandle),
    File(PathBuf),
    /// Nowhere: it is its driver's.
    Vfio,
}

/// What stays with the command of a device that it has given to a session.
pub(crate) struct Subject {
    pub(crate) id: DeviceId,
    /// How long a source's state is, where that is known.
    pub(crate) len: Option<u64>,
    state: State,
    config: ConfigSeen,
}

/// Makes the devices. Those of a source must have their files.
pub(crate) fn open(specs: &[Spec], source: bool) -> anyhow::Result<Vec<(Device, Subject)>> {
    let mut names = HashSet::new();
    let mut files = HashSet::new();
    for spec in specs {
        if !names.insert(&spec.id) {
            bail!(Usage(format!("two devices are named {}", spec.id)));
        }
        if let Kind::File(path) | Kind::Vfio(path) = &spec.kind
            && !files.insert(path)
        {
            bail!(Usage(format!(
                "two devices have the path {}",
                path.display()
            )));
        }
    }
    let open = |spec: &Spec| {
        let (inner, state): (Box<dyn MigrationDevice>, _) = match &spec.kind {
            Kind::Sim {
                size,
                seed,
                precopy,
            } => {
                let config = SimConfig {
                    seed: *seed,
                    len: *size,
                    precopy_initial: *precopy,
                    ..SimConfig::default()
                };
                let device = SimDevice::new(config)?;
                let handle = device.handle();
                (Box::new(device), State::Sim(handle))
            }
            Kind::File(path) => {
                if source {
                    let open = || {
                        let file = File::open(path)?;
                        ensure!(file.metadata()?.is_file(), "not a regular file");
                        Ok(())
                    };
                    open().with_context(|| path.display().to_string())?;
                }
                let device = FileDevice::new(path.clone());
                (Box::new(device), State::File(path.clone()))
            }
            Kind::Vfio(path) => {
                let (device, _) = kernel::open(path)?;
                (Box::new(device), State::Vfio)
            }
        };
        let config = ConfigSeen::default();
        let observed = Observed::new(inner, config.clone());
        let device = Device::new(spec.id.clone(), Box::new(observed))?;
        let subject = Subject {
            id: spec.id.clone(),
            len: source.then(|| spec.len()).flatten(),
            state,
            config,
        };
        Ok((device, subject))
    };
    specs.iter().map(open).collect()
}

/// The bytes of a device's state among all that were moved of it.
fn data_bytes(stats: &DeviceStats, config: u64) -> u64 {
    let headers = PACKET_HEADER_LEN as u64 * stats.packets;
    stats.bytes.saturating_sub(headers + config)
}

/// The length and the sha256 of a simulated state.
fn digest_image(image: Image) -> (u64, String) {
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    let mut at = 0;
    while at < image.len() {
        let left = usize::try_from(image.len() - at).unwrap_or(usize::MAX);
        let bytes = &mut buffer[..left.min(256 << 10)];
        image.fill(at, bytes);
        digest.update(&*bytes);
        at += bytes.len() as u64;
    }
    (image.len(), hex(&digest.finalize()))
}

fn digest_file(path: &PathBuf) -> io::Result<(u64, String)> {
    let mut file = File::open(path)?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    let mut bytes = 0;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok((bytes, hex(&digest.finalize()))),
            Ok(count) => {
                digest.update(&buffer[..count]);
                bytes += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

impl Subject {
    /// What of it has been moved, when all is over: its state is looked at as it is now.
    fn describe(&self, stats: &DeviceStats) -> anyhow::Result<Moved> {
        let config = self.config.get();
        let config = config.with_context(|| format!("device {}: no config was moved", self.id))?;
        let moved = data_bytes(stats, config.bytes);
        let (state_bytes, state_sha256) = match &self.state {
            State::Sim(handle) => {
                // What came says itself which image it is; its digest says whether it was all.
                let image = handle.image();
                if handle.has_loaded() && handle.digest() != image.digest() {
                    bail!(
                        "device {}: what was loaded is not what its header says",
                        self.id
                    );
                }
                let (bytes, digest) = digest_image(image);
                (bytes, Some(digest))
            }
            State::File(path) => {
                let digest = digest_file(path).with_context(|| path.display().to_string())?;
                (digest.0, Some(digest.1))
            }
            State::Vfio => (moved, None),
        };
        ensure!(
            state_bytes == moved,
            "device {}: its state has {state_bytes} bytes, but {moved} were moved",
            self.id
        );
        Ok(Moved {
            idstr: self.id.idstr().to_owned(),
            instance: self.id.instance(),
            packets: stats.packets,
            state_bytes,
            state_sha256,
            config_bytes: config.bytes,
            config_sha256: hex(&config.sha256),
        })
    }
}

/// What has been moved of all of them.
pub(crate) fn describe(subjects: &[Subject], stats: &Stats) -> anyhow::Result<Vec<Moved>> {
    let describe = |subject: &Subject| {
        let stats = stats
            .devices
            .iter()
            .find(|stats| stats.device == subject.id);
        subject.describe(stats.context("a device without counters")?)
    };
    subjects.iter().map(describe).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Spec, String> {
        text.parse()
    }

    #[test]
    fn simulated_devices() {
        let spec = parse("sim:id=a/b,size=2MiB,seed=7,instance=3,precopy=64KiB");
        let spec = spec.expect("it is right");
        assert_eq!(spec.id, DeviceId::new("a/b", 3).expect("a name"));
        assert_eq!(
            spec.kind,
            Kind::Sim {
                size: 2 << 20,
                seed: 7,
                precopy: 64 << 10,
            }
        );
        for wrong in [
            "sim:",
            "sim:size=1",
            "sim:id=",
            "sim:id=a,seed=-1",
            "sim:id=a,size=x",
            "sim:id=a,precopy=-1",
            "sim:id=a,colour=red",
            "disk:a",
            "",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn files() {
        let spec = parse("file:/a,b/c.state").expect("it is right");
        assert_eq!(spec.id.idstr(), "file/c.state");
        assert_eq!(spec.kind, Kind::File("/a,b/c.state".into()));
        let spec = parse("file:/a,id=x,instance=2").expect("it is right");
        assert_eq!(spec.id, DeviceId::new("x", 2).expect("a name"));
        assert_eq!(spec.kind, Kind::File("/a".into()));
        let spec = parse("vfio:/sys/bus/mdev/devices/83b8").expect("it is right");
        assert_eq!(spec.id.idstr(), "vfio/83b8");
        assert_eq!(spec.kind, Kind::Vfio("/sys/bus/mdev/devices/83b8".into()));
        assert!(parse("vfio:").is_err());
        assert!(parse("file:").is_err());
        assert!(parse("file:/").is_err());
    }
}
