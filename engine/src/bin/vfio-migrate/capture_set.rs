//! What the captured channels of one migration hold together: which device has which packets, what
//! is missing, and where in the files what the engine says of a packet is to be found.
//!
//! Nothing here reads a file, starts a thread or waits: [`Scan`] has looked. So the fuzz target
//! `replay` runs this file and `capture.rs` as they are.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{anyhow, bail};
use vfio_migration::{Error, ErrorKind, Phase, Settings, wire::DeviceKey};

use crate::capture::{Place, Scan, show_key};

/// The packets of one device in all files.
#[derive(Debug, Default)]
pub(crate) struct Packets {
    indices: BTreeSet<u32>,
    config: Option<u32>,
}

impl Packets {
    /// The first idx that is missing, if one is.
    fn first_missing(&self) -> Option<u32> {
        let expected = (0..).zip(&self.indices);
        let gap = { expected }.find(|(expected, index)| expected != *index);
        let next = gap.map_or_else(
            || u32::try_from(self.indices.len()).unwrap_or(u32::MAX),
            |(expected, _)| expected,
        );
        (self.config.is_none() || gap.is_some()).then_some(next)
    }
}

/// Every device's packets in all files.
pub(crate) fn by_device(scans: &[Scan]) -> BTreeMap<DeviceKeyOrder, Packets> {
    let mut devices = BTreeMap::<DeviceKeyOrder, Packets>::new();
    for scan in scans {
        for place in &scan.places {
            let key = DeviceKeyOrder(scan.keys[place.device]);
            let packets = devices.entry(key).or_default();
            packets.indices.insert(place.index);
            if place.config {
                packets.config.get_or_insert(place.index);
            }
        }
    }
    devices
}

/// A key, in the order of the names.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct DeviceKeyOrder(pub(crate) DeviceKey);

impl Ord for DeviceKeyOrder {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.as_bytes().cmp(other.0.as_bytes())
    }
}

impl PartialOrd for DeviceKeyOrder {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// How many of the devices or places that a message is about it names: files may hold any number.
const NAMED: usize = 8;

/// The first [`NAMED`] of `parts`, and how many more there are.
fn join(parts: &[String], separator: &str) -> String {
    let mut text = parts[..parts.len().min(NAMED)].join(separator);
    if parts.len() > NAMED {
        text.push_str(&format!("{separator}{} more", parts.len() - NAMED));
    }
    text
}

/// What is said of the devices that the files do not hold all of.
fn lacking(scans: &[Scan]) -> String {
    let mut parts = Vec::new();
    for (DeviceKeyOrder(key), packets) in by_device(scans) {
        if let Some(index) = packets.first_missing() {
            let config = if packets.config.is_none() {
                " and its config"
            } else {
                ""
            };
            parts.push(format!(
                "device {} lacks idx {index}{config}",
                show_key(&key)
            ));
        }
    }
    if parts.is_empty() {
        String::new()
    } else {
        format!("; {}", join(&parts, "; "))
    }
}

/// Where all files end.
fn ends(scans: &[Scan]) -> String {
    let ends = scans
        .iter()
        .map(|scan| format!("{} ends at byte {}", scan.name(), scan.end));
    ends.collect::<Vec<_>>().join(", ")
}

/// What the engine said, with the places in the files that it is about.
pub(crate) fn explain(error: Error, scans: &[Scan]) -> anyhow::Error {
    let mut text = String::new();
    if let Some(channel) = error.channel()
        && let Some(scan) = usize::try_from(channel).ok().and_then(|at| scans.get(at))
    {
        text.push_str(&format!("{}: ", scan.name()));
    }
    let key = error.device().map(DeviceKey::new);
    let places = scans.iter().flat_map(|scan| {
        let places = scan.places.iter();
        let here = places.filter(|place| Some(scan.keys[place.device]) == key);
        let meant = |place: &&Place| match error.index() {
            Some(index) => place.index == index,
            // What is wrong with a config's content is said without its idx.
            None => place.config && error.phase() == Phase::Config,
        };
        here.filter(meant)
            .map(move |place| format!("{} byte {}", scan.name(), place.offset))
    });
    let places: Vec<String> = places.collect();
    if *error.kind() == ErrorKind::Missing {
        text.push_str(&ends(scans));
        text.push_str(&lacking(scans));
    } else if !places.is_empty() {
        text.push_str("at ");
        text.push_str(&join(&places, " and "));
    }
    if text.is_empty() {
        anyhow!(error)
    } else {
        anyhow!(error).context(text.trim_end_matches(": ").to_owned())
    }
}

/// Refuses files that are cut or damaged.
pub(crate) fn check(scans: &[Scan]) -> anyhow::Result<()> {
    let damaged = scans
        .iter()
        .find_map(|scan| scan.damage.as_ref().map(|damage| (scan, damage)));
    if let Some((scan, damage)) = damaged {
        bail!("{}: {damage}{}", scan.name(), lacking(scans));
    }
    Ok(())
}

/// What a load of these files must expect: their uuid, their channels, their largest packet.
pub(crate) fn settings(scans: &[Scan]) -> Settings {
    let hellos = scans.iter().filter_map(|scan| scan.hello);
    let highest = hellos.clone().map(|hello| hello.id).max().unwrap_or(0);
    let files = u32::try_from(scans.len()).unwrap_or(u32::MAX);
    let largest = scans.iter().map(|scan| scan.largest).max().unwrap_or(0);
    let mut settings = Settings::default();
    settings.channels = files.max(u32::from(highest) + 1);
    settings.uuid = { hellos }.next().map_or([0; 16], |hello| hello.uuid);
    let largest = largest.saturating_add(12); // the header inside
    settings.max_packet = settings.max_packet.max(largest);
    settings
}
