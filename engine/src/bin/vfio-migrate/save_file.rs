//! The file that `save` writes and `restore` reads: what one multifd channel carries, and its digest.
//!
//! ```text
//!   hello │ SYNC │ device packets, each device's in idx order, its config last │ digest
//!   ╰─────────────────────── the body: the sha256 is of these bytes ──────────╯
//! ```
//!
//! The digest is a RAM packet without pages. Its RAM block is named `vfio-migrate/sha256:` and 64 digits, so
//! a reader of channels passes over it. It is always [`DIGEST_LEN`] bytes long and stands at the file's end:
//! a file that was cut has none.
//!
//! ```text
//!   save     session ──▶ Digesting ──▶ file        seal(): the digest, when all has been sent
//!   restore  SaveFile::open    length, digest     ┐ before a device is opened
//!            SaveFile::check   which devices, idx ┘
//!            SaveFile::channel ──▶ Checked ──▶ session      the same bytes, digested again
//! ```
//!
//! A file may change between the first look and the load. So [`Checked`] digests what it hands on, and gives
//! the last bytes only if all of them are right: otherwise the load fails, with every device in RESUMING,
//! and each is reset.
//!
//! The digest finds damage. It does not say who wrote the file. A file by a hostile hand is bounded: it is
//! read in pieces, a packet has [`MAX_PACKET`] bytes at most, and nothing is kept for a packet or a name of
//! the file, only for a device that was given.
//!
//! [`Digesting`] and [`Checked`] run on the channel's thread; the rest on the command's main thread. Nothing
//! here waits but for the disk.

use std::{
    collections::HashMap,
    fmt, fs,
    io::{self, IoSlice, Read, Seek, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context, bail, ensure};
use sha2::{Digest, Sha256};
use vfio_migration::{
    Channel, DeviceId,
    wire::{DEFAULT_MAX_PACKET, DeviceKey, Hello, Kind, PageSize, RamHeader},
};

use crate::{
    args::MAX_PACKET,
    capture::{DIGEST_BLOCK, Packet, Walker, What, show_key},
    output::hex,
    state_files::{self, StateFile},
};

type Sha = [u8; 32];

/// How much is read at a time.
const PIECE: usize = 1 << 20;

/// The length of the digest's packet in bytes.
pub(crate) const DIGEST_LEN: usize = 1344;

fn page_size() -> PageSize {
    let size = PageSize::new(4096).expect("4 KiB is a page size");
    assert_eq!(size.ram_header_len(), DIGEST_LEN);
    size
}

/// The digest's packet.
fn encode(sha256: &Sha) -> Vec<u8> {
    let block = format!("{DIGEST_BLOCK}{}", hex(sha256));
    let header = RamHeader {
        kind: Kind::Ram { flags: 0 },
        pages_alloc: 0,
        normal_pages: 0,
        next_packet_size: 0,
        packet_num: 0,
        zero_pages: 0,
        ramblock: block.as_bytes(),
    };
    let mut bytes = header.encode().to_vec();
    bytes.resize(page_size().ram_header_len(), 0);
    bytes
}

// --------------------------------------------------------------------------------------- save

/// The digest of what a session has written so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sum(Arc<Mutex<Sha256>>);

impl Sum {
    fn add(&self, bytes: &[u8]) {
        let mut sum = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sum.update(bytes);
    }

    fn get(&self) -> Sha {
        let sum = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sum.clone().finalize().into()
    }
}

/// Writes to the file, and digests what it has taken.
struct Digesting {
    file: fs::File,
    sum: Sum,
}

impl Write for Digesting {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.sum.add(&bytes[..count]);
        Ok(count)
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        let count = self.file.write_vectored(buffers)?;
        let mut left = count;
        for buffer in buffers {
            let taken = buffer.len().min(left);
            self.sum.add(&buffer[..taken]);
            left -= taken;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Digesting {
    fn read(&mut self, _bytes: &mut [u8]) -> io::Result<usize> {
        Ok(0)
    }
}

/// A channel into a file that is empty, and the digest of what goes there.
pub(crate) fn channel(file: &StateFile) -> io::Result<(Channel, Sum)> {
    let sum = Sum::default();
    let stream = Digesting {
        file: file.file().try_clone()?,
        sum: sum.clone(),
    };
    // A write to a file ends by itself: nothing has to wake it.
    Ok((Channel::from_stream(stream, || {}), sum))
}

/// Ends a file with its digest, when its channel has sent all. Returns that, and the file's length.
pub(crate) fn seal(file: &StateFile, sum: &Sum) -> io::Result<(Sha, u64)> {
    let sha256 = sum.get();
    let mut file = file.file();
    file.write_all(&encode(&sha256))?;
    Ok((sha256, file.metadata()?.len()))
}

// ------------------------------------------------------------------------------------ restore

/// A file whose digest is right.
#[derive(Debug)]
pub(crate) struct SaveFile {
    path: PathBuf,
    file: fs::File,
    /// How long the body is.
    body: u64,
    pub(crate) sha256: Sha,
}

/// What the packets of a file say.
#[derive(Debug)]
pub(crate) struct Contents {
    pub(crate) uuid: [u8; 16],
    /// The largest payload, or what every load accepts.
    pub(crate) max_packet: u32,
    /// Each device's bytes of data, its config's included, in the order of the names that were given.
    pub(crate) lens: Vec<u64>,
}

/// How far a device's packets have come.
#[derive(Default)]
struct Seen {
    next: u32,
    complete: bool,
    bytes: u64,
}

impl SaveFile {
    /// Opens a file and checks its digest.
    ///
    /// # Errors
    ///
    /// By its path: no regular file, cut, or damaged.
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        let open = || -> anyhow::Result<Self> {
            let file = state_files::open_regular(path)?;
            let len = file.metadata()?.len();
            let Some(body) = len.checked_sub(DIGEST_LEN as u64) else {
                bail!("{len} bytes are no file of `vfio-migrate save`");
            };
            let mut end = vec![0; DIGEST_LEN];
            file.read_exact_at(&mut end, body)?;
            let Some(expected) = digest_at(&end) else {
                bail!(
                    "no digest stands at its end, byte {body}: the file was cut or has grown, or \
                     `vfio-migrate save` has not written it"
                );
            };
            let sha256 = digest(&file, body)?;
            ensure!(
                sha256 != expected || end == encode(&sha256),
                "the file is damaged: its last packet, from byte {body} on"
            );
            ensure!(
                sha256 == expected,
                "the file is damaged: its sha256 is {}, and its last packet says {}",
                hex(&sha256),
                hex(&expected)
            );
            Ok(Self {
                path: path.to_owned(),
                file,
                body,
                sha256,
            })
        };
        open().with_context(|| path.display().to_string())
    }

    /// How long the file is.
    pub(crate) const fn len(&self) -> u64 {
        self.body + DIGEST_LEN as u64
    }

    /// Checks that the file holds all packets of these devices, each device's in order, and nothing else.
    ///
    /// # Errors
    ///
    /// By the file's path and byte, and the device's name and idx as far as they are known.
    pub(crate) fn check(&self, devices: &[&DeviceId]) -> anyhow::Result<Contents> {
        let check = || -> anyhow::Result<Contents> {
            let mut seen: HashMap<DeviceKey, Seen> = devices
                .iter()
                .map(|id| (DeviceKey::new(id), Seen::default()))
                .collect();
            let mut uuid = [0; 16];
            let mut largest = 0;
            let mut file = self.file.try_clone()?;
            file.rewind()?;
            let mut walker = Walker::new(file, self.body, page_size());
            while let Some(packet) = walker
                .step()
                .map_err(|damage| anyhow::anyhow!("{damage}"))?
            {
                let place = || format!("byte {}", packet.offset);
                match &packet.what {
                    What::Hello(Hello { uuid: vm, id }) => {
                        ensure!(*id == 0, "its hello is of channel {id}, not of channel 0");
                        uuid = *vm;
                    }
                    What::Sync { .. } => {}
                    What::Device { .. } => add(&mut seen, &packet).with_context(place)?,
                    other => bail!("byte {}: {other} does not belong here", packet.offset),
                }
                largest = largest.max(packet.payload);
            }
            let mut lens = Vec::with_capacity(devices.len());
            for id in devices {
                let Seen {
                    next,
                    complete,
                    bytes,
                } = &seen[&DeviceKey::new(id)];
                ensure!(*next > 0, "device {id} is not in this file");
                ensure!(*complete, "device {id} lacks idx {next} and its config");
                lens.push(*bytes);
            }
            Ok(Contents {
                uuid,
                max_packet: DEFAULT_MAX_PACKET.max(largest.saturating_add(12)), // the header inside
                lens,
            })
        };
        check().with_context(|| self.path.display().to_string())
    }

    /// The body, as a channel that ends well only if it still has the digest.
    pub(crate) fn channel(&self) -> io::Result<Channel> {
        Ok(Channel::from_reader(self.reader()?))
    }

    fn reader(&self) -> io::Result<Checked> {
        Ok(Checked {
            file: self.file.try_clone()?,
            at: 0,
            len: self.body,
            sum: Sha256::new(),
            expected: self.sha256,
        })
    }
}

/// The digest in a digest's packet.
fn digest_at(end: &[u8]) -> Option<Sha> {
    let mut hello = Hello {
        uuid: [0; 16],
        id: 0,
    }
    .encode()
    .to_vec();
    hello.extend_from_slice(end);
    let len = hello.len() as u64;
    let mut walker = Walker::new(io::Cursor::new(hello), len, page_size());
    walker.step().ok()??;
    match walker.step().ok()??.what {
        What::Digest(sha256) if walker.offset() == len => Some(sha256),
        _ => None,
    }
}

/// The sha256 of a file's first `len` bytes.
fn digest(file: &fs::File, len: u64) -> io::Result<Sha> {
    let mut sum = Sha256::new();
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    while at < len {
        let most = usize::try_from(len - at).map_or(PIECE, |left| left.min(PIECE));
        file.read_exact_at(&mut piece[..most], at)?;
        sum.update(&piece[..most]);
        at += most as u64;
    }
    Ok(sum.finalize().into())
}

/// Takes a device's packet into account.
fn add(seen: &mut HashMap<DeviceKey, Seen>, packet: &Packet) -> anyhow::Result<()> {
    let What::Device { key, index, config } = &packet.what else {
        return Ok(());
    };
    let device = show_key(key);
    let Some(seen) = seen.get_mut(&**key) else {
        bail!("device {device}: no --device names it");
    };
    ensure!(
        !seen.complete,
        "device {device}, idx {index}: its config stood before"
    );
    ensure!(
        *index == seen.next,
        "device {device}: idx {index} stands where idx {} belongs",
        seen.next
    );
    ensure!(
        packet.payload as usize <= MAX_PACKET,
        "device {device}, idx {index}: a packet of {} bytes",
        packet.payload
    );
    seen.next += 1;
    seen.complete = *config;
    seen.bytes += u64::from(packet.payload);
    Ok(())
}

/// Reads the body, and hands on its last bytes only if all were right.
struct Checked {
    file: fs::File,
    at: u64,
    len: u64,
    sum: Sha256,
    expected: Sha,
}

/// The file is another than the one that was looked at.
#[derive(Debug)]
struct Changed;

impl fmt::Display for Changed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the file has changed since its digest was checked")
    }
}

impl std::error::Error for Changed {}

impl Read for Checked {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let changed = || Err(io::Error::new(io::ErrorKind::InvalidData, Changed));
        let left = usize::try_from(self.len - self.at).unwrap_or(usize::MAX);
        let most = left.min(bytes.len());
        if most == 0 {
            return Ok(0);
        }
        let count = self.file.read_at(&mut bytes[..most], self.at)?;
        if count == 0 {
            return changed();
        }
        self.sum.update(&bytes[..count]);
        self.at += count as u64;
        if self.at == self.len && Sha::from(self.sum.clone().finalize()) != self.expected {
            return changed();
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests;
