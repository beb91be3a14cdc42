//! `inspect`: the packets of captured multifd channels, a line for each.
//!
//! ```text
//!   file ──▶ Walker ──▶ a line ──▶ stdout
//! ```
//!
//! Runs on the main thread alone.

use std::{
    fmt::Write as _,
    io::{self, BufWriter, Write},
    path::PathBuf,
};

use anyhow::bail;
use vfio_migration::{
    text::Printable,
    wire::{FLAG_DEVICE_STATE, FLAG_SYNC, PACKET_FLAG_CONFIG, PageSize},
};

use crate::{
    args,
    capture::{Packet, Walker, What},
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

/// Runs `inspect`.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
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
                    bail!("{}: {damage}", path.display());
                }
            }
        }
    }
    output.flush().map_err(Stdout)?;
    Ok(())
}
