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
    io::{self, Read, Seek},
    path::PathBuf,
    str::FromStr,
};

use anyhow::{Context, bail, ensure};
use sha2::{Digest, Sha256};
use vfio_migration::{
    Device, DeviceId, DeviceState, DeviceStats, Duty, MigrationDevice, Stats,
    migration::MigratableDevice,
    sim::{Image, SimConfig, SimDevice, SimHandle},
    wire::PACKET_HEADER_LEN,
};

use crate::{
    Usage, args,
    config_digest::{Config, ConfigDigest, DigestingDevice},
    file::{self, Written},
    kernel,
    moved::{Moved, Times},
    output::{hex, say},
    state_files::{self, StateFile, Target},
};

/// What is said of each kind of SPEC.
macro_rules! kinds {
    ($end:literal) => {
        concat!(
            "\
SPEC is one of:
  sim:id=ID[,size=SIZE][,seed=N][,precopy=SIZE]
                                  a simulated device. On a source, size (1MiB) and seed (0) choose
                                  the state, and precopy (0) chooses how much of it the device
                                  gives while it runs. A destination takes what comes
  file:PATH[,id=ID]               a device whose state is a file: a source reads it, a
                                  destination writes it. PATH is a regular file, or does not exist
                                  yet. It changes only when the whole migration has passed. A new
                                  file has mode 0600, an old one keeps its mode. The default id is
                                  file/NAME, where NAME is the last part of PATH
  vfio:SYSFS_PATH[,id=ID]         a device of the kernel's, bound to a VFIO driver and not in use;
                                  or its character device, vfio:/dev/vfio/devices/vfioN.
                                  The default id is vfio/NAME. Only what the driver saves is
                                  moved, and no digest of it is known. The kernel may reset the
                                  device when it is closed at the end
",
            $end
        )
    };
}

/// What is said of SPEC in `send` and `receive`.
pub(crate) const HELP: &str = kinds!(
    "\
Each also takes instance=N, the instance id (0). Source and destination must name the same
devices: the same ids and instances, in any order."
);

/// The same in `save` and `restore`.
pub(crate) const HELP_OF_FILE: &str = kinds!(
    "\
Each also takes instance=N, the instance id (0). A save is a source here, a restore a destination:
both must name the same devices, the same ids and instances, in any order."
);

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

/// Where a device is, when what was done with it is over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Left<'a> {
    id: &'a DeviceId,
    state: DeviceState,
    reset: bool,
    duty: Duty,
}

impl<'a> From<&'a Device> for Left<'a> {
    fn from(device: &'a Device) -> Self {
        Self {
            id: device.id(),
            state: device.state(),
            reset: device.was_reset(),
            duty: device.duty(),
        }
    }
}

impl<'a> From<&'a MigratableDevice> for Left<'a> {
    fn from(device: &'a MigratableDevice) -> Self {
        Self {
            id: device.id(),
            state: device.state(),
            reset: device.was_reset(),
            duty: device.duty(),
        }
    }
}

impl Left<'_> {
    /// Whether it is as before, and nothing is to be done about it.
    pub(crate) fn is_whole(&self) -> bool {
        !self.reset && self.duty == Duty::Nothing
    }
}

/// Where the devices are, and what is to be done about those that something is to be done about.
pub(crate) fn told<'a>(devices: impl Iterator<Item = Left<'a>>) -> String {
    let told = devices.map(
        |Left {
             id,
             state,
             reset,
             duty,
         }| {
            let reset = if reset { ", reset" } else { "" };
            let duty = match duty {
                Duty::Nothing => String::new(),
                duty => format!(": {duty}"),
            };
            format!("{id} in {state}{reset}{duty}")
        },
    );
    told.collect::<Vec<_>>().join("; ")
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
    DeviceId::new(id, instance).map_err(|error| error.to_string())
}

impl Spec {
    fn sim(fields: &str) -> Result<Self, String> {
        let (mut id, mut instance, mut size, mut seed, mut precopy) = (None, 0, 1 << 20, 0, 0);
        for field in fields.split(',') {
            match field.split_once('=') {
                Some(("id", value)) => id = Some(value),
                Some(("instance", value)) => instance = number("instance", value)?,
                Some(("size", value)) => {
                    size = args::state(value).map_err(|error| format!("size={value}: {error}"))?;
                }
                Some(("seed", value)) => seed = number("seed", value)?,
                Some(("precopy", value)) => {
                    precopy =
                        args::state(value).map_err(|error| format!("precopy={value}: {error}"))?;
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

    /// The device's name.
    pub(crate) const fn id(&self) -> &DeviceId {
        &self.id
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
    /// On a source.
    Read(PathBuf),
    /// On a destination.
    Written(Written),
    /// Nowhere: it is its driver's.
    Vfio,
}

/// What stays with the command of a device that it has given to a session.
pub(crate) struct Subject {
    pub(crate) id: DeviceId,
    /// How long a source's state is, where that is known.
    pub(crate) len: Option<u64>,
    state: State,
    config: ConfigDigest,
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
                    let opened = state_files::open_regular(path);
                    opened.with_context(|| path.display().to_string())?;
                    let device = file::source(path.clone());
                    (Box::new(device), State::Read(path.clone()))
                } else {
                    let written = Written::new(Target::new(path)?);
                    let device = file::destination(written.clone());
                    (Box::new(device), State::Written(written))
                }
            }
            Kind::Vfio(path) => (kernel::open(path)?.device, State::Vfio),
        };
        let config = ConfigDigest::default();
        let observed = DigestingDevice::new(inner, config.clone());
        let device = Device::new(spec.id.clone(), Box::new(observed))?;
        let subject = Subject {
            id: spec.id.clone(),
            len: source.then(|| spec.len()).flatten(),
            state,
            config,
        };
        Ok((device, subject))
    };
    let opened: Vec<(Device, Subject)> = specs.iter().map(open).collect::<anyhow::Result<_>>()?;
    let targets: Vec<_> = opened
        .iter()
        .filter_map(|(_, subject)| match &subject.state {
            State::Written(written) => Some(written.target()),
            State::Sim(_) | State::Read(_) | State::Vfio => None,
        })
        .collect();
    state_files::check_distinct(&targets).map_err(|error| Usage(error.to_string()))?;
    Ok(opened)
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

fn digest_file(mut file: &File) -> io::Result<(u64, String)> {
    file.rewind()?;
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

/// What was moved of a device, checked, before anybody is told so.
pub(crate) struct Checked<'a> {
    subject: &'a Subject,
    packets: u64,
    state_bytes: u64,
    config: Config,
    /// The file that holds a destination's state, which has no name yet.
    written: Option<(&'a Target, StateFile)>,
    /// The same, to look at when it has its name: PATH may be another's by then.
    file: Option<File>,
}

impl Subject {
    /// Whether all that was moved of it has arrived, as far as that can be seen from outside.
    fn check(&self, stats: &DeviceStats) -> anyhow::Result<Checked<'_>> {
        let config = self.config.get();
        let config = config.with_context(|| format!("device {}: no config was moved", self.id))?;
        let moved = data_bytes(stats, config.bytes);
        let (mut written, mut kept) = (None, None);
        let state_bytes = match &self.state {
            State::Sim(handle) => {
                // What came says itself which image it is; its digest says whether it was all.
                let image = handle.image();
                if handle.has_loaded() && handle.digest() != image.digest() {
                    bail!(
                        "device {}: what was loaded is not what its header says",
                        self.id
                    );
                }
                image.len()
            }
            State::Read(path) => {
                let meta = std::fs::metadata(path);
                meta.with_context(|| path.display().to_string())?.len()
            }
            State::Written(state) => {
                let file = state.take();
                let file = file.with_context(|| format!("device {}: was never loaded", self.id))?;
                let path = || state.target().path().display().to_string();
                let len = file.file().metadata().with_context(path)?.len();
                kept = Some(file.file().try_clone().with_context(path)?);
                written = Some((state.target(), file));
                len
            }
            State::Vfio => moved,
        };
        ensure!(
            state_bytes == moved,
            "device {}: its state has {state_bytes} bytes, but {moved} were moved",
            self.id
        );
        Ok(Checked {
            subject: self,
            packets: stats.packets,
            state_bytes,
            config,
            written,
            file: kept,
        })
    }
}

impl Checked<'_> {
    /// The state's length in bytes, without headers and config.
    pub(crate) const fn state_bytes(&self) -> u64 {
        self.state_bytes
    }

    /// The sha256 of the state as it is now. Nobody's but its driver's of a device of the kernel's.
    fn digest(&self) -> anyhow::Result<Option<String>> {
        let path = match &self.subject.state {
            State::Sim(handle) => return Ok(Some(digest_image(handle.image()).1)),
            State::Vfio => return Ok(None),
            State::Read(path) => path,
            State::Written(written) => written.target().path(),
        };
        let read = || match &self.file {
            Some(file) => digest_file(file),
            None => digest_file(&state_files::open_regular(path)?),
        };
        let digest = read().with_context(|| path.display().to_string());
        digest.map(|(_, digest)| Some(digest))
    }
}

/// Checks what was moved of all of them.
pub(crate) fn check<'a>(
    subjects: &'a [Subject],
    stats: &Stats,
) -> anyhow::Result<Vec<Checked<'a>>> {
    let check = |subject: &'a Subject| {
        let stats = stats.device(&subject.id);
        subject.check(stats.context("a device without counters")?)
    };
    subjects.iter().map(check).collect()
}

/// Gives the files of a destination their names: all, or none.
pub(crate) fn keep(checked: &mut [Checked<'_>]) -> anyhow::Result<()> {
    let files = checked.iter_mut().filter_map(|it| it.written.take());
    state_files::publish(files.collect())
}

/// What has been moved of all of them, and when. What cannot be read any more is only said.
pub(crate) fn describe(
    checked: Vec<Checked<'_>>,
    times: impl Fn(&DeviceId) -> Times,
) -> Vec<Moved> {
    let describe = |it: Checked<'_>| Moved {
        idstr: it.subject.id.idstr().to_owned(),
        instance: it.subject.id.instance(),
        packets: it.packets,
        state_bytes: it.state_bytes,
        state_sha256: it.digest().unwrap_or_else(|error| {
            say(&format!("warning: no digest of the state: {error:#}"));
            None
        }),
        config_bytes: it.config.bytes,
        config_sha256: hex(&it.config.sha256),
        state_file: None,
        times: Some(times(&it.subject.id)),
    };
    checked.into_iter().map(describe).collect()
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
