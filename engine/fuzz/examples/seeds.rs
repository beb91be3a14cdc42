//! Makes the seeds of the corpus from the recorded migrations: `cargo run --example seeds` in this
//! folder writes them below `corpus/`.
//!
//! RAM packets are left out but for one, and main channels cut where other devices' sections begin:
//! a seed is small, and a fuzzer finds the rest.

use std::{fs, io, path::Path};

use vfio_migration::wire::{self, Frame, Framer, PageSize, Walk};

/// How much of a main channel has but the VFIO devices' sections, about.
const MAIN: usize = 1000;
/// The longest RAM packet's data that is kept.
const RAM: usize = 4096;
/// How much of several channels fits into one input, beside the choices.
const INPUT: usize = 8000;

fn write(target: &str, name: &str, choices: &[u8], bytes: &[u8]) -> io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target);
    fs::create_dir_all(&folder)?;
    fs::write(folder.join(name), [choices, bytes].concat())
}

/// A channel without its RAM, but for so many packets.
fn thinned(channel: &[u8], most: usize) -> Vec<u8> {
    let page_size = PageSize::new(4096).expect("a page size");
    let framer = Framer::new(Some(page_size), wire::DEFAULT_MAX_PACKET);
    let (mut ram, mut syncs) = (0, 0);
    let mut kept = Vec::new();
    for located in Walk::new(channel, framer) {
        let located = located.expect("a recorded channel is good");
        match located.frame {
            Frame::Ram(_) if ram == most || located.payload.len() > RAM => continue,
            Frame::Ram(_) => ram += 1,
            Frame::Sync { .. } if syncs > 0 => continue,
            Frame::Sync { .. } => syncs += 1,
            Frame::Hello(_) | Frame::DeviceState(_) => {}
        }
        kept.extend(located.header);
        kept.extend(located.payload);
    }
    kept
}

/// A whole migration for `relay`: its channels, each sent at once.
fn relayed(channels: &[Vec<u8>]) -> Vec<u8> {
    // No hello of its own; three buffers, the largest window, 64 devices.
    let count = u8::try_from(channels.len() - 1).expect("few");
    let mut seed = vec![16, 2, 3, 2, count];
    for (at, channel) in (0..).zip(channels) {
        let len = u16::try_from(channel.len()).expect("small");
        seed.extend([190, at]);
        seed.extend(len.to_be_bytes());
        seed.push(20);
        seed.extend(channel);
    }
    seed
}

/// A whole migration for `replay`: its channels, a file each.
fn recorded(channels: &[Vec<u8>]) -> Vec<u8> {
    let mut seed = vec![u8::try_from(channels.len() - 1).expect("few"), 3];
    for channel in channels {
        let len = u16::try_from(channel.len()).expect("small");
        seed.extend(len.to_be_bytes());
        seed.extend(channel);
    }
    seed
}

fn main() -> io::Result<()> {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data");
    for capture in fs::read_dir(data)? {
        let capture = capture?;
        let number = capture.file_name().to_string_lossy()[..2].to_owned();
        let mut channels = Vec::new();
        let mut files = fs::read_dir(capture.path())?.collect::<io::Result<Vec<_>>>()?;
        files.sort_by_key(fs::DirEntry::file_name);
        for file in files {
            let name = file.file_name().to_string_lossy().into_owned();
            let bytes = fs::read(file.path())?;
            let seed = format!("{number}-{}", name.trim_end_matches(".bin"));
            if name == "00-c2s.bin" {
                write(
                    "section",
                    &seed,
                    &[2, 3, 20, 3, 0],
                    &bytes[..bytes.len().min(MAIN)],
                )?;
            } else if name.ends_with("-s2c.bin") {
                write("section", &seed, &[1, 7], &bytes)?;
            } else if name.ends_with(".bin") {
                let thinned = thinned(&bytes, 1);
                write("wire", &seed, &[0], &thinned)?;
                write("channel", &seed, &[1, 9, 255], &thinned)?;
                // Together they must fit into an input.
                channels.push(self::thinned(&bytes, 0));
            }
        }
        if channels.iter().map(Vec::len).sum::<usize>() < INPUT {
            write("relay", &number, &[], &relayed(&channels))?;
            write("replay", &number, &[], &recorded(&channels))?;
        }
    }
    Ok(())
}
