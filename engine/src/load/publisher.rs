//! The push API, for packets that do not come over the session's channels.

use std::fmt;

use crossbeam_epoch::Collector;

use super::{IncomingPacket, LoadSink};
use crate::{
    channel::Space,
    error::{Error, Result, Violation},
    host::zeroed,
    id::DeviceId,
    lane::Buffer,
    wire,
};

/// Brings packets that came over the VMM's own connections. One thread at a time uses it; it may move to another.
///
/// ```
/// # #[cfg(feature = "sim")] {
/// use vfio_migration::{Device, DeviceId, LoadSession, sim::{SimConfig, SimDevice}, wire};
///
/// let id = DeviceId::new("0000:00:03.0/vfio", 0)?;
/// let device = SimDevice::new(SimConfig::default())?;
/// let mut load = LoadSession::builder()
///     .device(Device::new(id.clone(), Box::new(device))?)
///     .start()?;
/// let mut publisher = load.publisher();
/// load.no_more_channels();
///
/// // What a peer's handler gets: the packet's 12-byte header, then its data.
/// let mut payload = wire::PacketHeader { index: 0, config: false }.encode().to_vec();
/// payload.extend(b"state");
/// publisher.push(&id, &payload)?;
/// load.cancel();
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Publisher {
    sink: LoadSink<Collector>,
}

impl Publisher {
    /// `sink` counts as an open input until this is dropped.
    pub(super) const fn new(sink: LoadSink<Collector>) -> Self {
        Self { sink }
    }

    /// Copies a packet and publishes it. `payload` is the payload as on the wire, 12-byte header first. Waits
    /// while the budget is spent, unless the device needs this very packet. A packet of an unplugged device is
    /// dropped and counted ([`Stats::dropped_packets`](crate::Stats::dropped_packets)).
    ///
    /// # Errors
    ///
    /// The rule that the packet breaks, which also fails the session; a cancellation.
    pub fn push(&mut self, id: &DeviceId, payload: &[u8]) -> Result<()> {
        let (header, data) = self.split(id, payload)?;
        let incoming = self.announce(id, header, data.len())?;
        let pushed = self.push_data(incoming, data);
        self.fail_with(pushed)
    }

    /// As [`Publisher::push`], but never waits. Returns `false`, and keeps nothing, if there is no memory now.
    ///
    /// While the budget is full, a next packet larger than the device's reserve (64 KiB, or the device's share
    /// of a small budget) can only be accepted in pieces: use [`Publisher::push`], which does that.
    ///
    /// # Errors
    ///
    /// As for [`Publisher::push`].
    pub fn try_push(&mut self, id: &DeviceId, payload: &[u8]) -> Result<bool> {
        let (header, data) = self.split(id, payload)?;
        let Some(mut lease) = self.try_lease(id, header, data.len())? else {
            return Ok(false);
        };
        lease.bytes_mut().copy_from_slice(data);
        lease.publish()?;
        Ok(true)
    }

    /// Returns memory to fill with a packet's `len` bytes of data, or `None` if there is none now.
    ///
    /// # Errors
    ///
    /// As for [`Publisher::push`].
    pub fn try_lease(
        &mut self,
        id: &DeviceId,
        header: wire::PacketHeader,
        len: usize,
    ) -> Result<Option<PacketLease<'_>>> {
        let mut incoming = self.announce(id, header, len)?;
        if len == 0 {
            let near = self.sink.is_near(&mut incoming);
            let near = self.fail_with(near)?;
            return Ok(near.then(|| PacketLease::new(self, incoming, Memory::None)));
        }
        let found = self.sink.try_lease(&mut incoming);
        let memory = match self.fail_with(found)? {
            Some(Space::Memory(lease)) if lease.size() == len => Memory::Pool(lease),
            Some(Space::Nowhere) => Memory::Own(zeroed(len, "memory for a packet")?),
            _ => return Ok(None),
        };
        Ok(Some(PacketLease::new(self, incoming, memory)))
    }

    /// As [`Publisher::try_lease`], but waits for memory. A packet that can only pass in pieces, once it is
    /// next, is filled in memory of its own. So is a packet of an unplugged device. This takes memory for one
    /// packet per publisher at most.
    ///
    /// # Errors
    ///
    /// As for [`Publisher::push`].
    pub fn lease(
        &mut self,
        id: &DeviceId,
        header: wire::PacketHeader,
        len: usize,
    ) -> Result<PacketLease<'_>> {
        let mut incoming = self.announce(id, header, len)?;
        if len == 0 {
            return Ok(PacketLease::new(self, incoming, Memory::None));
        }
        let found = self.sink.lease(&mut incoming);
        let memory = match self.fail_with(found)? {
            Space::Memory(lease) if lease.size() == len => Memory::Pool(lease),
            found => {
                drop(found);
                self.sink.put_off();
                Memory::Own(self.fail_with(zeroed(len, "memory for a packet"))?)
            }
        };
        Ok(PacketLease::new(self, incoming, memory))
    }

    fn split<'a>(
        &self,
        id: &DeviceId,
        payload: &'a [u8],
    ) -> Result<(wire::PacketHeader, &'a [u8])> {
        let split = payload.split_first_chunk().map_or_else(
            || {
                let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
                Err(Error::protocol(Violation::PacketTooShort(len)))
            },
            |(header, data)| Ok((wire::PacketHeader::decode(header)?, data)),
        );
        self.fail_with(split.map_err(|error| error.on_device(id)))
    }

    fn announce(
        &mut self,
        id: &DeviceId,
        header: wire::PacketHeader,
        len: usize,
    ) -> Result<IncomingPacket> {
        let name = (id.idstr().as_bytes(), id.instance());
        let incoming = self.sink.announce(name, header, len);
        self.fail_with(incoming)
    }

    fn push_data(&mut self, mut incoming: IncomingPacket, mut data: &[u8]) -> Result<()> {
        self.sink.admit(&mut incoming)?;
        if data.is_empty() {
            return self.sink.publish_empty(&mut incoming);
        }
        // Each round publishes a byte at least.
        while !data.is_empty() {
            let mut lease = match self.sink.lease(&mut incoming)? {
                Space::Memory(lease) => lease,
                Space::Aside => {
                    let mut fill = |bytes: &mut [u8], _last| {
                        let (first, rest) = data.split_at(bytes.len());
                        bytes.copy_from_slice(first);
                        data = rest;
                        Ok(())
                    };
                    return self.sink.spill(&mut incoming, &mut fill);
                }
                Space::Nowhere => {
                    self.sink.count_dropped(&mut incoming, data.len());
                    return Ok(());
                }
            };
            let (piece, rest) = data.split_at(lease.size());
            lease.bytes_mut().copy_from_slice(piece);
            self.sink.publish(&mut incoming, lease)?;
            data = rest;
        }
        Ok(())
    }

    /// A packet that breaks a rule fails the migration.
    fn fail_with<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| {
            self.sink.load().fail(error.clone());
            error.into_public()
        })
    }
}

/// Where a leased packet's data is.
enum Memory {
    None,
    Pool(Buffer),
    Own(Vec<u8>),
}

/// A packet's memory: fill it, then publish it. Dropping it gives the memory back.
#[must_use = "a packet that is not published is missing"]
pub struct PacketLease<'a> {
    publisher: &'a mut Publisher,
    incoming: IncomingPacket,
    memory: Memory,
}

impl<'a> PacketLease<'a> {
    fn new(publisher: &'a mut Publisher, incoming: IncomingPacket, memory: Memory) -> Self {
        Self {
            publisher,
            incoming,
            memory,
        }
    }

    /// Returns the bytes for the packet's data. Fill all of them.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Memory::None => &mut [],
            Memory::Pool(lease) => lease.bytes_mut(),
            Memory::Own(bytes) => bytes,
        }
    }

    /// Publishes the packet.
    ///
    /// # Errors
    ///
    /// As for [`Publisher::push`].
    pub fn publish(self) -> Result<()> {
        let Self {
            publisher,
            mut incoming,
            memory,
        } = self;
        let published = match memory {
            Memory::Pool(lease) => publisher
                .sink
                .admit(&mut incoming)
                .and_then(|()| publisher.sink.publish(&mut incoming, lease)),
            Memory::Own(bytes) => publisher.push_data(incoming, &bytes),
            Memory::None => publisher.push_data(incoming, &[]),
        };
        publisher.fail_with(published)
    }
}

impl fmt::Debug for PacketLease<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PacketLease").finish_non_exhaustive()
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.sink.load().close_input();
    }
}

impl fmt::Debug for Publisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publisher").finish_non_exhaustive()
    }
}
