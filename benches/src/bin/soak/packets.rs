//! What our source sends on a channel, packet by packet: for those who stand between.
//!
//! Blocking reads, one thread's. A channel that ends within a packet is an error, as is anything that
//! our source does not send.

use std::io::{self, Read};

use vfio_migration::{
    DeviceId,
    wire::{DEVICE_STATE_HEADER_LEN, DeviceStateHeader, HELLO_LEN, Kind, PREFIX_LEN, PageSize},
};

/// The pages' size that both sides have unless it is set.
pub fn page_size() -> PageSize {
    PageSize::new(4096).expect("a page")
}

/// One packet.
pub enum Packet {
    /// The hello, or a SYNC: all of its bytes.
    Other(Vec<u8>),
    /// A piece of a device's state: all of its bytes, and where the payload begins in them.
    Device {
        id: DeviceId,
        bytes: Vec<u8>,
        payload: usize,
    },
}

/// A channel's packets.
pub struct Packets<R> {
    input: R,
    greeted: bool,
}

impl<R: Read> Packets<R> {
    pub const fn new(input: R) -> Self {
        Self {
            input,
            greeted: false,
        }
    }

    /// Where they come from.
    pub const fn input(&self) -> &R {
        &self.input
    }

    /// The next one, or the end.
    pub fn next(&mut self) -> io::Result<Option<Packet>> {
        let mut prefix = [0; PREFIX_LEN];
        // One byte tells the end from a packet that is cut off.
        loop {
            match self.input.read(&mut prefix[..1]) {
                Ok(0) => return Ok(None),
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.input.read_exact(&mut prefix[1..])?;
        if !std::mem::replace(&mut self.greeted, true) {
            return self.rest(&prefix, HELLO_LEN).map(Some);
        }
        match Kind::decode(&prefix).map_err(io::Error::other)? {
            Kind::Sync => self.rest(&prefix, page_size().ram_header_len()).map(Some),
            Kind::Ram { .. } => Err(io::Error::other("our source has no RAM")),
            Kind::DeviceState => {
                let mut header = [0; DEVICE_STATE_HEADER_LEN];
                header[..PREFIX_LEN].copy_from_slice(&prefix);
                self.input.read_exact(&mut header[PREFIX_LEN..])?;
                let decoded = DeviceStateHeader::decode(&header, u32::MAX);
                let decoded = decoded.map_err(io::Error::other)?;
                let id = decoded.key().id().expect("our source's");
                let mut bytes = header.to_vec();
                bytes.resize(header.len() + decoded.len as usize, 0);
                self.input.read_exact(&mut bytes[header.len()..])?;
                Ok(Some(Packet::Device {
                    id,
                    bytes,
                    payload: header.len(),
                }))
            }
        }
    }

    fn rest(&mut self, prefix: &[u8], len: usize) -> io::Result<Packet> {
        let mut bytes = prefix.to_vec();
        bytes.resize(len, 0);
        self.input.read_exact(&mut bytes[prefix.len()..])?;
        Ok(Packet::Other(bytes))
    }
}
