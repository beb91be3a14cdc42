//! `inspect`: the packets of captured multifd channels, a line or an object for each.
//!
//! ```text
//!   file ──▶ Walker ──┬──▶ a line ─────────────▶ stdout
//!                     └──▶ Object, an element ─▶ the one JSON object
//! ```
//!
//! A capture may have more packets than fit in memory, so the object is printed while the files are read. If a
//! file ends in a damaged packet, `error` follows the packets before it.
//!
//! Runs on the main thread alone.

use std::{
    cell::RefCell,
    fmt::Write as _,
    fs::File,
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::anyhow;
use serde::{Serialize, Serializer, ser::SerializeMap};
use vfio_migration::{
    text::Printable,
    wire::{FLAG_DEVICE_STATE, FLAG_SYNC, PACKET_FLAG_CONFIG, PageSize},
};

use crate::{
    args,
    capture::{Damage, Packet, Walker, What},
    failure::Failure,
    json,
    output::{Stdout, hex},
};

/// Show the packets of captured multifd channels, one line each
///
/// A FILE holds what one multifd connection of QEMU carried from the source to the destination. Each
/// line shows the packet's offset in bytes, its kind, its flags, and the size of its payload after the
/// headers; for a device's packet also the device, the instance id and the idx.
///
///   hello   the channel's beginning: its id and the VM's uuid
///   sync    a SYNC packet
///   ram     a RAM packet: pages sent and zero pages, and the RAM block's name
///   device  a piece of a device's state
///   config  a device's config, always its last packet
///   digest  the end of a file of `vfio-migrate save`: the sha256 of all before it
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Options {
    /// A captured multifd channel
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// The page size of the VM's architecture, on which the size of RAM and SYNC packets depends
    #[arg(long, value_name = "SIZE", default_value = "4KiB", value_parser = args::page_size)]
    page_size: PageSize,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

fn line(packet: &Packet) -> String {
    let mut line = format!("{:>12}  ", packet.offset);
    let size = packet.payload;
    // A String takes whatever is written.
    let _infallible = match &packet.what {
        What::Hello(hello) => write!(
            line,
            "hello   flags -         channel {} uuid {} size {size}",
            hello.id,
            hex(&hello.uuid)
        ),
        What::Sync { packet_num } => write!(
            line,
            "sync    flags {FLAG_SYNC:#06x}    number {packet_num} size {size}"
        ),
        What::Ram {
            flags,
            pages,
            zero_pages,
            block,
        } => write!(
            line,
            "ram     flags {flags:#06x}    pages {pages} zero {zero_pages} block {block:?} size {size}"
        ),
        What::Digest(sha256) => write!(
            line,
            "digest  flags -         sha256 {} of the bytes before it",
            hex(sha256)
        ),
        What::Device { key, index, config } => {
            let (kind, inner) = if *config {
                ("config", PACKET_FLAG_CONFIG)
            } else {
                ("device", 0)
            };
            let idstr = String::from_utf8_lossy(key.idstr());
            let instance = key.instance();
            write!(
                line,
                "{kind}  flags {FLAG_DEVICE_STATE:#06x}/{inner:#x} {idstr:?} instance {instance} \
                 idx {index} size {size}"
            )
        }
    };
    line
}

/// Why a file's packets end early, with the file's name.
fn damaged(path: &Path, damage: &Damage) -> anyhow::Error {
    anyhow!("{}: {damage}", path.display())
}

/// Runs `inspect`.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    if options.json {
        return print_object(options);
    }
    let mut output = BufWriter::new(io::stdout().lock());
    for path in &options.files {
        let mut walker = Walker::open(path, options.page_size)?;
        if options.files.len() > 1 {
            let name = path.display().to_string();
            writeln!(output, "{}:", Printable(&name)).map_err(Stdout)?;
        }
        loop {
            match walker.step() {
                Ok(Some(packet)) => writeln!(output, "{}", line(&packet)).map_err(Stdout)?,
                Ok(None) => break,
                Err(damage) => {
                    output.flush().map_err(Stdout)?;
                    return Err(damaged(path, &damage));
                }
            }
        }
    }
    output.flush().map_err(Stdout)?;
    Ok(())
}

// ---------------------------------------------------------------------------------------- JSON

/// A packet, as JSON has it: the words of the lines.
#[derive(Debug, Serialize)]
struct Object<'a> {
    offset: u64,
    #[serde(flatten)]
    kind: Kind<'a>,
    /// What follows the headers, in bytes.
    size: u32,
}

#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Kind<'a> {
    Hello {
        id: u8,
        uuid: String,
    },
    Sync {
        flags: u32,
        number: u64,
    },
    Ram {
        flags: u32,
        pages: u32,
        zero_pages: u32,
        block: &'a str,
    },
    Device(DevicePacket),
    Config(DevicePacket),
    Digest {
        sha256: String,
    },
}

#[derive(Debug, Serialize)]
struct DevicePacket {
    flags: u32,
    device_flags: u32,
    idstr: String,
    instance: u32,
    idx: u32,
}

impl<'a> From<&'a Packet> for Object<'a> {
    fn from(packet: &'a Packet) -> Self {
        let kind = match &packet.what {
            What::Hello(hello) => Kind::Hello {
                id: hello.id,
                uuid: hex(&hello.uuid),
            },
            What::Sync { packet_num } => Kind::Sync {
                flags: FLAG_SYNC,
                number: *packet_num,
            },
            What::Ram {
                flags,
                pages,
                zero_pages,
                block,
            } => Kind::Ram {
                flags: *flags,
                pages: *pages,
                zero_pages: *zero_pages,
                block,
            },
            What::Digest(sha256) => Kind::Digest {
                sha256: hex(sha256),
            },
            What::Device { key, index, config } => {
                let packet = DevicePacket {
                    flags: FLAG_DEVICE_STATE,
                    device_flags: if *config { PACKET_FLAG_CONFIG } else { 0 },
                    idstr: String::from_utf8_lossy(key.idstr()).into_owned(),
                    instance: key.instance(),
                    idx: *index,
                };
                if *config {
                    Kind::Config(packet)
                } else {
                    Kind::Device(packet)
                }
            }
        };
        Self {
            offset: packet.offset,
            kind,
            size: packet.payload,
        }
    }
}

/// All files, read while they are serialized: once.
struct Inspection<'a> {
    options: &'a Options,
    failure: &'a RefCell<Option<anyhow::Error>>,
}

/// One of them, and its packets.
struct Packets<'a> {
    walker: RefCell<Walker<File>>,
    path: &'a Path,
    failure: &'a RefCell<Option<anyhow::Error>>,
}

impl Serialize for Inspection<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("files", &Files(self))?;
        if let Some(error) = &*self.failure.borrow() {
            map.serialize_entry("error", &Failure::new(error))?;
        }
        map.end()
    }
}

struct Files<'a>(&'a Inspection<'a>);

impl Serialize for Files<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Inspection { options, failure } = self.0;
        serializer.collect_seq(options.files.iter().map_while(|path| {
            if failure.borrow().is_some() {
                return None;
            }
            match Walker::open(path, options.page_size) {
                Ok(walker) => Some(Packets {
                    walker: RefCell::new(walker),
                    path,
                    failure,
                }),
                Err(error) => {
                    failure.replace(Some(error));
                    None
                }
            }
        }))
    }
}

impl Serialize for Packets<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("file", &self.path.display().to_string())?;
        map.serialize_entry("packets", &Steps(self))?;
        map.end()
    }
}

struct Steps<'a>(&'a Packets<'a>);

/// A packet that its object borrows from.
struct Step(Packet);

impl Serialize for Step {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Object::from(&self.0).serialize(serializer)
    }
}

impl Serialize for Steps<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Packets {
            walker,
            path,
            failure,
        } = self.0;
        let mut walker = walker.borrow_mut();
        let next = || match walker.step() {
            Ok(packet) => packet.map(Step),
            Err(damage) => {
                failure.replace(Some(damaged(path, &damage)));
                None
            }
        };
        serializer.collect_seq(std::iter::from_fn(next))
    }
}

fn print_object(options: &Options) -> anyhow::Result<()> {
    let failure = RefCell::new(None);
    json::print_at_length(&Inspection {
        options,
        failure: &failure,
    })?;
    failure.into_inner().map_or(Ok(()), Err)
}
