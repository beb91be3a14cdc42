//! A captured multifd channel: its packets, and where in the file each stands.
//!
//! ```text
//!   file ──▶ Walker: header, header, …   payloads are passed over, not read
//!               │
//!               ├──▶ inspect: a line for each
//!               └──▶ Scan: which device has which idx, where; how the file ends
//! ```
//!
//! Runs on the command's main thread. It reads regular files only, and so waits for nothing but
//! the disk.

use std::{
    collections::HashMap,
    fmt,
    fs::File,
    io::{BufReader, Read, Seek},
    path::{Path, PathBuf},
};

use anyhow::Context;
use vfio_migration::{
    Violation,
    wire::{DeviceKey, Frame, Framer, Hello, PageSize, Step},
};

use crate::state_files::open_regular;

/// What a packet is.
#[derive(Clone, Debug)]
pub(crate) enum What {
    Hello(Hello),
    Sync {
        packet_num: u64,
    },
    Ram {
        flags: u32,
        pages: u32,
        zero_pages: u32,
        block: String,
    },
    Device {
        key: Box<DeviceKey>,
        index: u32,
        config: bool,
    },
    /// The sha256 of all that stands before it: a save file's last packet. To any other reader it is a
    /// RAM packet without pages.
    Digest([u8; 32]),
}

/// What the RAM block of a digest's packet is called, before the digits.
pub(crate) const DIGEST_BLOCK: &str = "vfio-migrate/sha256:";

/// The digest that a RAM packet of this block and so many pages is.
fn digest(block: &[u8], pages: u32) -> Option<[u8; 32]> {
    let digits = block.strip_prefix(DIGEST_BLOCK.as_bytes())?;
    let mut digest = [0; 32];
    if pages != 0 || digits.len() != 2 * digest.len() {
        return None;
    }
    for (byte, digits) in digest.iter_mut().zip(digits.chunks(2)) {
        let digits = std::str::from_utf8(digits).ok()?;
        *byte = u8::from_str_radix(digits, 16).ok()?;
    }
    Some(digest)
}

/// A packet and where it stands.
#[derive(Clone, Debug)]
pub(crate) struct Packet {
    /// How many bytes come before it.
    pub(crate) offset: u64,
    /// Its length, headers included.
    pub(crate) len: u64,
    /// The length of what follows its headers: of a device's packet, its data.
    pub(crate) payload: u32,
    pub(crate) what: What,
}

/// Why a file cannot be read any further, and where.
#[derive(Clone, Debug)]
pub(crate) struct Damage {
    pub(crate) offset: u64,
    pub(crate) why: String,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "byte {}: {}", self.offset, self.why)
    }
}

/// A device's name as it came from the wire, made printable.
pub(crate) fn show_key(key: &DeviceKey) -> String {
    let idstr = String::from_utf8_lossy(key.idstr());
    match key.instance() {
        0 => format!("{idstr:?}"),
        instance => format!("{idstr:?} instance {instance}"),
    }
}

/// Walks a captured channel, packet by packet.
#[derive(Debug)]
pub(crate) struct Walker<R> {
    input: BufReader<R>,
    len: u64,
    offset: u64,
    framer: Framer,
}

impl Walker<File> {
    /// Opens a captured channel.
    pub(crate) fn open(path: &Path, page_size: PageSize) -> anyhow::Result<Self> {
        let open = || -> anyhow::Result<(File, u64)> {
            let file = open_regular(path)?;
            let len = file.metadata()?.len();
            Ok((file, len))
        };
        let (file, len) = open().with_context(|| path.display().to_string())?;
        Ok(Self::new(file, len, page_size))
    }
}

impl<R: Read + Seek> Walker<R> {
    /// Begins at a captured channel's first byte, of `len`.
    pub(crate) fn new(input: R, len: u64, page_size: PageSize) -> Self {
        Self {
            input: BufReader::new(input),
            len,
            offset: 0,
            // The file's length is the bound here.
            framer: Framer::new(Some(page_size), u32::MAX),
        }
    }

    /// How far it has come: where the next packet, or the bad one, begins.
    pub(crate) const fn offset(&self) -> u64 {
        self.offset
    }

    fn damage(&self, why: impl Into<String>) -> Damage {
        Damage {
            offset: self.offset,
            why: why.into(),
        }
    }

    /// The next packet, or `None` where the channel ends as it should.
    pub(crate) fn step(&mut self) -> Result<Option<Packet>, Damage> {
        let left = self.len.saturating_sub(self.offset);
        if left == 0 {
            return match self.framer.end(0) {
                Ok(()) => Ok(None),
                Err(_) => Err(self.damage("the file is empty: a channel begins with a hello")),
            };
        }
        let mut header = Vec::new();
        // Each round asks for more, up to the largest header.
        loop {
            let step = self.framer.decode(&header);
            let step = step.map_err(|error| Damage {
                offset: self.offset,
                why: describe(error.kind(), &header),
            })?;
            let (frame, header_len, payload) = match step {
                Step::More(need) if need as u64 > left => {
                    let why = format!(
                        "the file ends {left} bytes into {}",
                        if need == vfio_migration::wire::HELLO_LEN {
                            "the hello"
                        } else {
                            "a packet's header"
                        }
                    );
                    return Err(self.damage(why));
                }
                Step::More(need) => {
                    let at = header.len();
                    header.resize(need, 0);
                    let read = self.input.read_exact(&mut header[at..]);
                    read.map_err(|error| Damage {
                        offset: self.offset,
                        why: format!("cannot read: {error}"),
                    })?;
                    continue;
                }
                Step::Frame {
                    frame,
                    header_len,
                    payload_len,
                } => (frame, header_len, payload_len),
            };
            let what = what(&frame);
            let len = header_len as u64 + u64::from(payload);
            if len > left {
                let why = format!(
                    "the file ends {} bytes short of the end of {what}",
                    len - left
                );
                return Err(self.damage(why));
            }
            let skipped = self.input.seek_relative(payload.into());
            skipped.map_err(|error| self.damage(format!("cannot read: {error}")))?;
            let offset = self.offset;
            self.offset += len;
            return Ok(Some(Packet {
                offset,
                len,
                payload,
                what,
            }));
        }
    }
}

/// Why a header was refused; `QEVM` is worth a hint.
fn describe(kind: &vfio_migration::ErrorKind, header: &[u8]) -> String {
    let main = vfio_migration::stream::MAIN_MAGIC.to_be_bytes();
    if header.starts_with(&main) {
        return "this is a main channel, not a multifd channel".into();
    }
    match kind {
        vfio_migration::ErrorKind::Protocol(Violation::Magic(_)) => {
            format!("no packet begins here: {kind}")
        }
        _ => kind.to_string(),
    }
}

fn what(frame: &Frame<'_>) -> What {
    match frame {
        Frame::Hello(hello) => What::Hello(*hello),
        Frame::Sync { packet_num } => What::Sync {
            packet_num: *packet_num,
        },
        Frame::Ram(ram) => match digest(ram.ramblock, ram.normal_pages + ram.zero_pages) {
            Some(digest) => What::Digest(digest),
            None => What::Ram {
                flags: match ram.kind {
                    vfio_migration::wire::Kind::Ram { flags } => flags,
                    _ => 0,
                },
                pages: ram.normal_pages,
                zero_pages: ram.zero_pages,
                block: String::from_utf8_lossy(ram.ramblock).into_owned(),
            },
        },
        Frame::DeviceState(packet) => What::Device {
            key: Box::new(packet.header.key()),
            index: packet.packet.index,
            config: packet.packet.config,
        },
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hello(_) => f.write_str("the hello"),
            Self::Sync { .. } => f.write_str("a SYNC packet"),
            Self::Ram { .. } => f.write_str("a RAM packet"),
            Self::Digest(_) => f.write_str("the digest"),
            Self::Device { key, index, config } => {
                let config = if *config { ", its config" } else { "" };
                write!(f, "device {}, idx {index}{config}", show_key(key))
            }
        }
    }
}

/// Where a device's packet stands.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// Which of [`Scan::keys`].
    pub(crate) device: usize,
    pub(crate) index: u32,
    pub(crate) config: bool,
    pub(crate) offset: u64,
}

/// What a captured channel holds.
#[derive(Debug)]
pub(crate) struct Scan {
    pub(crate) path: PathBuf,
    /// Unless the file ends before.
    pub(crate) hello: Option<Hello>,
    /// The devices, in the order of their first packets.
    pub(crate) keys: Vec<DeviceKey>,
    /// Where each of them is there: a file may name as many as it has packets.
    known: HashMap<DeviceKey, usize>,
    /// Their packets, in their order.
    pub(crate) places: Vec<Place>,
    /// The bytes of the devices' packets, headers included.
    pub(crate) device_bytes: u64,
    /// The largest payload of a device's packet, its 12-byte header left out.
    pub(crate) largest: u32,
    pub(crate) ram_packets: u64,
    pub(crate) syncs: u64,
    /// How often it says what its sha256 is: once, at the end of a save file.
    pub(crate) digests: u64,
    /// Where the last whole packet ends.
    pub(crate) end: u64,
    pub(crate) damage: Option<Damage>,
}

impl Scan {
    /// Looks through a whole file.
    pub(crate) fn new(path: &Path, page_size: PageSize) -> anyhow::Result<Self> {
        Ok(Self::of(path, Walker::open(path, page_size)?))
    }

    /// Looks through what `walker` walks over, which is called `path`.
    pub(crate) fn of<R: Read + Seek>(path: &Path, mut walker: Walker<R>) -> Self {
        let mut scan = Self {
            path: path.to_owned(),
            hello: None,
            keys: Vec::new(),
            known: HashMap::new(),
            places: Vec::new(),
            device_bytes: 0,
            largest: 0,
            ram_packets: 0,
            syncs: 0,
            digests: 0,
            end: 0,
            damage: None,
        };
        loop {
            match walker.step() {
                Ok(Some(packet)) => scan.add(packet),
                Ok(None) => break,
                Err(damage) => {
                    scan.damage = Some(damage);
                    break;
                }
            }
        }
        scan.end = walker.offset();
        scan
    }

    fn add(&mut self, packet: Packet) {
        match packet.what {
            What::Hello(hello) => self.hello = Some(hello),
            What::Sync { .. } => self.syncs += 1,
            What::Ram { .. } => self.ram_packets += 1,
            What::Digest(_) => self.digests += 1,
            What::Device { key, index, config } => {
                self.device_bytes += packet.len;
                self.largest = self.largest.max(packet.payload);
                let device = *self.known.entry(*key).or_insert_with(|| {
                    self.keys.push(*key);
                    self.keys.len() - 1
                });
                self.places.push(Place {
                    device,
                    index,
                    config,
                    offset: packet.offset,
                });
            }
        }
    }

    /// The file's name, for messages.
    pub(crate) fn name(&self) -> impl fmt::Display + '_ {
        self.path.display()
    }
}
