//! Channel side: what a channel's thread does with each packet, from the header to the slot.
//!
//! ```text
//!   announce ─▶ admit ─▶ lease (waits for backpressure) ─▶ the caller fills it ─▶ publish ─▶ ring the bell
//!                          └─▶ spill (where it must not wait for long) ─────▲
//! ```
//!
//! A device may be unplugged at each of these steps. From then on its packets are *dropped*: the packet's
//! memory is given back, the caller skips the rest of the payload, and the packet is counted. No other
//! device notices.

use std::time::{Duration, Instant};

use crossbeam_epoch::{Collector, LocalHandle};
use vfio_migration_uring::deadline;

use super::{Epoch, Load, LoadDevice, Route, through};
use crate::{
    channel::{PacketSink, Space},
    error::{Error, Phase, Result, Violation},
    id::DeviceId,
    lane::Buffer,
    reorder::{
        memory_policy::{MemoryGrant, MemoryRequest},
        pool::{LeaseCutter, Pool},
        slot::{Packet, Payload, Publish},
        turn::Passed,
    },
    settings::Writer,
    spill::{SpillExtent, SpillFile},
    stats::ChannelCounters,
    sync::Arc,
    trace, wire,
};

mod elsewhere;

/// How long a packet waits for the budget before it is spilled: as long as devices that get on are
/// unlikely to need, and little next to a downtime. Those behind it do not wait again before one has
/// found room at once.
const SPILL_AFTER: Duration = Duration::from_millis(20);

/// A packet that has been announced: its header, and the device that it is for.
pub(crate) struct IncomingPacket {
    pub(crate) device: Arc<LoadDevice>,
    pub(crate) index: u32,
    pub(crate) config: bool,
    /// Bytes of data still to come.
    remaining: usize,
    /// Whether nothing of it has been published yet.
    first: bool,
    /// Whether its device has been unplugged: the rest is read past.
    dropped: bool,
}

/// What a thread that brings packets has of its own: one for each.
pub(crate) struct LoadSink<E: Epoch = LocalHandle> {
    load: Arc<Load>,
    /// For the devices' slots.
    epoch: E,
    /// For the router.
    routes: E,
    cutter: LeaseCutter<Arc<Pool>>,
    /// The device of the packet before: most packets are for the same.
    recent: Option<Arc<LoadDevice>>,
    counters: Arc<ChannelCounters>,
    /// Whether its packets wait for their turn, see `backpressure.rs`.
    within_read_ahead: bool,
    /// Where it may spill to.
    spill: Option<Arc<SpillFile>>,
    /// Whether the packet before was spilled.
    spilling: bool,
    /// Space for the packet that is to be spilled now.
    aside: Option<SpillExtent>,
    /// For its bytes. There once something has been spilled.
    bounce: Box<[u8]>,
}

impl LoadSink {
    pub(crate) fn new(
        load: Arc<Load>,
        counters: Arc<ChannelCounters>,
        spill: Option<Arc<SpillFile>>,
    ) -> Self {
        let epochs = (load.collector.register(), load.router.register());
        Self::with(epochs, load, counters, spill)
    }
}

impl LoadSink<Collector> {
    /// One that may move between threads, and registers for each packet.
    pub(crate) fn to_move(
        load: Arc<Load>,
        counters: Arc<ChannelCounters>,
        spill: Option<Arc<SpillFile>>,
    ) -> Self {
        let epochs = (load.collector.clone(), load.router.collector().clone());
        Self::with(epochs, load, counters, spill)
    }
}

impl<E: Epoch> LoadSink<E> {
    fn with(
        (epoch, routes): (E, E),
        load: Arc<Load>,
        counters: Arc<ChannelCounters>,
        spill: Option<Arc<SpillFile>>,
    ) -> Self {
        let cutter = LeaseCutter::new(load.pool.clone());
        Self {
            load,
            epoch,
            routes,
            cutter,
            recent: None,
            counters,
            within_read_ahead: true,
            spill,
            spilling: false,
            aside: None,
            bounce: Box::default(),
        }
    }

    /// The device of that name, and whether it has been unplugged.
    fn device(&mut self, idstr: &[u8], instance: u32) -> Result<(Arc<LoadDevice>, bool)> {
        if let Some(recent) = &self.recent
            && recent.id.idstr().as_bytes() == idstr
            && recent.id.instance() == instance
            && recent.flags.stop().is_none()
        {
            return Ok((recent.clone(), false));
        }
        let route = self.load.router.get(idstr, instance, &self.routes.pin());
        match route.as_deref() {
            Some(Route::Device(device)) => {
                self.recent = Some(device.clone());
                Ok((device.clone(), false))
            }
            Some(Route::Unplugged(device)) => Ok((device.clone(), true)),
            Some(Route::NotMultifd(id)) => {
                Err(Error::protocol(Violation::MultifdNotInUse).on_device(id))
            }
            None => Err(Error::protocol(Violation::UnknownDevice {
                idstr: idstr.escape_ascii().to_string(),
                instance,
            })),
        }
    }

    /// Finds the device of a packet, and checks its length. Nothing is remembered of it yet.
    ///
    /// # Errors
    ///
    /// [`Violation::UnknownDevice`], [`Violation::MultifdNotInUse`],
    /// [`Violation::PacketTooLarge`].
    pub(crate) fn announce(
        &mut self,
        (idstr, instance): (&[u8], u32),
        header: wire::PacketHeader,
        data_len: usize,
    ) -> Result<IncomingPacket> {
        let wire::PacketHeader { index, config } = header;
        let (device, dropped) = self
            .device(idstr, instance)
            .map_err(|error| error.at_index(index))?;
        let max = self.load.settings.max_packet;
        let len = data_len.saturating_add(wire::PACKET_HEADER_LEN);
        if len > max as usize {
            let len = u32::try_from(len).unwrap_or(u32::MAX);
            let violation = Violation::PacketTooLarge { len, max };
            return Err(device.refuse(violation, index));
        }
        Ok(IncomingPacket {
            device,
            index,
            config,
            remaining: data_len,
            first: true,
            dropped,
        })
    }

    /// Checks a packet's idx against all that came before, and remembers it.
    ///
    /// # Errors
    ///
    /// The rule that it breaks.
    pub(crate) fn admit(&self, packet: &mut IncomingPacket) -> Result<()> {
        if packet.dropped {
            return Ok(());
        }
        let (device, index) = (&packet.device, packet.index);
        let admitted = device.reorder.admit(index, packet.config);
        let admitted = admitted.map_err(|violation| device.refuse(violation, index));
        if admitted.is_ok() {
            trace::load_state_device_buffer_incoming(&device.id, index);
        }
        self.unless_unplugged(packet, admitted).map(drop)
    }

    /// Memory for the rest of a packet, or for as much of it as can be had: at most a
    /// buffer, and for the packet that the device needs next at the least its reserve. `None` where
    /// there is none now.
    pub(crate) fn try_lease(&mut self, packet: &mut IncomingPacket) -> Result<Option<Space>> {
        if packet.dropped {
            return Ok(Some(Space::Nowhere));
        }
        let found = self.find(packet, false);
        Ok(match self.unless_unplugged(packet, found)? {
            Some(found) => found.map(Space::Memory),
            None => Some(Space::Nowhere),
        })
    }

    /// Where the packet's memory may come from.
    fn grant(&self, packet: &IncomingPacket, within_read_ahead: bool) -> MemoryGrant {
        let device = &packet.device;
        self.load.backpressure.rule().grant(MemoryRequest {
            len: packet.remaining,
            first: packet.first,
            next: device.reorder.next() == packet.index,
            in_window: device.reorder.in_window(packet.index),
            started: device.flags.is_started(),
            within_read_ahead,
            spills: self.spill.is_some(),
        })
    }

    fn find(&mut self, packet: &IncomingPacket, within_read_ahead: bool) -> Result<Option<Buffer>> {
        if let Some(error) = self.stopped(&packet.device) {
            return Err(error);
        }
        let grant = self.grant(packet, within_read_ahead);
        let whole = self.load.pool.layout().buffer_len;
        if let Some(limit) = grant.buffer
            && let Some(lease) = self.cutter.lease_within(packet.remaining.min(whole), limit)
        {
            return Ok(Some(lease));
        }
        if !grant.reserve {
            return Ok(None);
        }
        let reserve = Pool::reserve(self.load.pool.clone(), packet.device.ordinal);
        Ok(reserve.map(|mut lease| {
            lease.truncate(packet.remaining.min(lease.size()));
            lease
        }))
    }

    /// As [`LoadSink::try_lease`], waiting for it. Ends with memory, with space to spill it to, or with the
    /// packet's, its device's or the load's end.
    pub(crate) fn lease(&mut self, packet: &mut IncomingPacket) -> Result<Space> {
        if packet.dropped {
            return Ok(Space::Nowhere);
        }
        let found = self.wait_for_space(packet);
        Ok(match self.unless_unplugged(packet, found)? {
            Some(Some(lease)) => Space::Memory(lease),
            Some(None) => Space::Aside,
            None => Space::Nowhere,
        })
    }

    /// Memory; or `None`, where the packet is to be spilled, and has space for that.
    fn wait_for_space(&mut self, packet: &IncomingPacket) -> Result<Option<Buffer>> {
        if let Some(lease) = self.find(packet, true)? {
            self.within_read_ahead = true;
            self.spilling = false;
            return Ok(Some(lease));
        }
        if self.spilling {
            let lease = self.find(packet, false)?;
            if lease.is_some() || self.set_aside(packet) {
                return Ok(lease);
            }
        }
        // A buffer that is not full would be held for as long as the wait lasts.
        self.release_buffer();
        let since = Instant::now();
        let load = self.load.clone();
        let mut found = None;
        if self.within_read_ahead {
            found = load.backpressure.wait_patiently(|| self.look(packet, true));
            self.within_read_ahead = found.is_some();
        }
        let mut found = found.map(|found| found.map(Some));
        if found.is_none() && self.spill.is_some() {
            let until = deadline(SPILL_AFTER);
            let look = || self.look(packet, false);
            found = load
                .backpressure
                .wait_until(until, look)
                .map(|found| found.map(Some));
        }
        // From here on it is spilled at once, or waits for space in either.
        let found = found.unwrap_or_else(|| {
            load.backpressure.wait(|| match self.look(packet, false) {
                Some(found) => Some(found.map(Some)),
                None => self.set_aside(packet).then_some(Ok(None)),
            })
        });
        self.counters.blocked.add_time(since.elapsed());
        load.backpressure.pass_on();
        found
    }

    /// What a channel that waits looks for.
    fn look(&mut self, packet: &IncomingPacket, within_read_ahead: bool) -> Option<Result<Buffer>> {
        let device = &packet.device;
        device.reorder.wait_for(packet.index);
        if packet.index < device.reorder.next() {
            return Some(Err(
                device.refuse(Violation::IndexAlreadyWritten, packet.index)
            ));
        }
        // What the I/O thread tells of, and nothing else.
        if self.stopped(device).is_none() && !self.is_told(packet, within_read_ahead) {
            return None;
        }
        self.find(packet, within_read_ahead).transpose()
    }

    /// Whether a packet without data can be published now: its slot costs memory too, so it must be
    /// inside the window as any other.
    ///
    /// # Errors
    ///
    /// The load's end, or the device's.
    pub(crate) fn is_near(&self, packet: &mut IncomingPacket) -> Result<bool> {
        if packet.dropped {
            return Ok(true);
        }
        let near = self.look_near(packet);
        Ok(self.unless_unplugged(packet, near)?.unwrap_or(true))
    }

    fn look_near(&self, packet: &IncomingPacket) -> Result<bool> {
        match self.stopped(&packet.device) {
            Some(error) => Err(error),
            None => Ok(packet.device.reorder.in_window(packet.index)),
        }
    }

    /// Waits until a packet without data can be published. Ends with that, or the packet's or the
    /// load's end.
    fn come_near(&mut self, packet: &IncomingPacket) -> Result<()> {
        if self.look_near(packet)? {
            return Ok(());
        }
        self.release_buffer();
        let since = Instant::now();
        let load = self.load.clone();
        let found = load.backpressure.wait(|| {
            packet.device.reorder.wait_for(packet.index);
            match self.look_near(packet) {
                // What the I/O thread tells of, and nothing else.
                Ok(near) if near && self.is_told(packet, false) => Some(Ok(())),
                Ok(_) => None,
                Err(error) => Some(Err(error)),
            }
        });
        self.counters.blocked.add_time(since.elapsed());
        load.backpressure.pass_on();
        found
    }

    /// Whether the I/O thread tells of what this packet waits for, should it be there.
    fn is_told(&self, packet: &IncomingPacket, within_read_ahead: bool) -> bool {
        packet.index <= packet.device.reorder.next()
            || self.load.backpressure.has_room(within_read_ahead)
    }

    /// Publishes what a lease of this packet was filled with.
    pub(crate) fn publish(&mut self, packet: &mut IncomingPacket, lease: Buffer) -> Result<()> {
        let len = lease.size();
        if packet.dropped {
            self.count_dropped(packet, len);
            return Ok(());
        }
        let filled = Packet {
            payload: Payload::Lease(lease.into_token()),
            config: packet.config,
            more: len < packet.remaining,
        };
        self.hand_over_or_drop(packet, filled, len)
    }

    /// Publishes a packet without data. Waits for it to come near enough.
    pub(crate) fn publish_empty(&mut self, packet: &mut IncomingPacket) -> Result<()> {
        if !packet.dropped {
            let near = self.come_near(packet);
            self.unless_unplugged(packet, near)?;
        }
        if packet.dropped {
            self.count_dropped(packet, 0);
            return Ok(());
        }
        let filled = Packet {
            payload: Payload::Empty,
            config: packet.config,
            more: false,
        };
        self.hand_over_or_drop(packet, filled, 0)
    }

    fn hand_over_or_drop(
        &mut self,
        packet: &mut IncomingPacket,
        filled: Packet,
        len: usize,
    ) -> Result<()> {
        let handed_over = self.hand_over(packet, filled, len);
        if self.unless_unplugged(packet, handed_over)?.is_none() {
            self.count_dropped(packet, len);
        }
        Ok(())
    }

    fn hand_over(&mut self, packet: &mut IncomingPacket, filled: Packet, len: usize) -> Result<()> {
        let device = &packet.device;
        let index = packet.index;
        let published = if packet.first {
            device.counters.published();
            let guard = self.epoch.pin();
            device.reorder.publish(index, filled, &guard)
        } else {
            self.publish_rest(device, index, filled)
        };
        match published {
            Publish::Published => {}
            Publish::Duplicate(filled) | Publish::Full(filled) => {
                self.load.recycle(filled);
                return Err(device.refuse(Violation::DuplicateIndex, index));
            }
            Publish::Closed(filled) => {
                self.load.recycle(filled);
                // A device that has got all closes too: then this is one that it has got.
                let written = || index < device.reorder.next();
                return Err(match self.stopped(device) {
                    Some(error) => error,
                    None if written() => device.refuse(Violation::IndexAlreadyWritten, index),
                    None => Error::aborted(Phase::Receive)
                        .on_device(&device.id)
                        .at_index(index),
                });
            }
        }
        let io = &self.load.io;
        // Where the turn is another channel's, that one sees what has been published.
        let passed = match self.load.settings.writer {
            Writer::Ring => Passed::Io,
            Writer::Auto => through::write(&self.load, device, &self.epoch),
        };
        match passed {
            Passed::Done => {}
            Passed::Io => io.wake_if(device.reorder.ring(index, &io.doorbell)),
            Passed::Ring => io.wake(),
        }
        packet.first = false;
        packet.remaining -= len;
        self.counters.bytes.add(len as u64);
        Ok(())
    }

    /// Publishes a further piece, once the one before has been taken. Ends with that, or with the
    /// load.
    fn publish_rest(&mut self, device: &LoadDevice, index: u32, filled: Packet) -> Publish {
        let load = self.load.clone();
        let mut waiting = Some(filled);
        load.backpressure.wait(|| {
            let filled = waiting.take().expect("put back below");
            if self.stopped(device).is_some() {
                return Some(Publish::Closed(filled));
            }
            device.reorder.wait_for(index);
            match device
                .reorder
                .publish_rest(index, filled, &self.epoch.pin())
            {
                Publish::Full(filled) => {
                    waiting = Some(filled);
                    None
                }
                done => Some(done),
            }
        })
    }

    /// Why nothing more should be received for `device`, if so.
    fn stopped(&self, device: &LoadDevice) -> Option<Error> {
        if let Some(error) = self.load.failure() {
            return Some(error);
        }
        device
            .flags
            .stop()
            .map(|_| Error::aborted(Phase::Receive).on_device(&device.id))
    }

    /// Gives up memory that is not in use.
    fn release_buffer(&mut self) {
        self.cutter.release();
        self.load.backpressure.pass_on();
    }

    /// The load that it brings packets for.
    pub(crate) fn load(&self) -> &Arc<Load> {
        &self.load
    }
}

impl<E: Epoch> PacketSink for LoadSink<E> {
    type Packet = IncomingPacket;

    fn announce(
        &mut self,
        name: (&[u8], u32),
        header: wire::PacketHeader,
        data_len: usize,
    ) -> Result<IncomingPacket> {
        let mut packet = self.announce(name, header, data_len)?;
        self.admit(&mut packet)?;
        Ok(packet)
    }

    fn place(packet: &IncomingPacket) -> (&DeviceId, u32) {
        (&packet.device.id, packet.index)
    }

    fn remaining(&self, packet: &IncomingPacket) -> usize {
        packet.remaining
    }

    fn lease(&mut self, packet: &mut IncomingPacket) -> Result<Space> {
        self.lease(packet)
    }

    fn spill(
        &mut self,
        packet: &mut IncomingPacket,
        receive: &mut dyn FnMut(&mut [u8], bool) -> Result<()>,
    ) -> Result<()> {
        self.spill(packet, receive)
    }

    fn passed(&mut self, packet: &mut IncomingPacket) {
        let rest = packet.remaining;
        self.count_dropped(packet, rest);
    }

    fn publish(&mut self, packet: &mut IncomingPacket, filled: Buffer) -> Result<()> {
        self.publish(packet, filled)
    }

    fn publish_empty(&mut self, packet: &mut IncomingPacket) -> Result<()> {
        self.publish_empty(packet)
    }

    fn release_buffer(&mut self) {
        self.release_buffer();
    }

    fn before_sync(&mut self) {
        // The others may need what is left of it before they come to theirs.
        self.release_buffer();
    }

    fn counters(&self) -> &ChannelCounters {
        &self.counters
    }
}

impl<E: Epoch> Drop for LoadSink<E> {
    fn drop(&mut self) {
        self.release_buffer();
    }
}
