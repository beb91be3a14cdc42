//! Ingress: from the source's connection, a device's packets go into their slots; everything else is passed
//! on directly.
//!
//! ```text
//!   hello, RAM, SYNC ─▶ the egress channel
//!   device state     ─▶ announce ─▶ lease (waits for backpressure) ─▶ fill ─▶ headers in front ─▶ publish
//! ```

use std::{
    io::{self, IoSlice, Read},
    time::Instant,
};

use crossbeam_epoch::LocalHandle;

use super::{RelayDevice, Shared, egress_channel::EgressChannel};
use crate::{
    channel::{Channel, ChannelLimits, PacketSink, RamSink, Receiver, Space},
    error::{Error, Phase, Result, Violation},
    framed::{self, HEADROOM},
    host::zeroed,
    id::DeviceId,
    lane::Buffer,
    reorder::{
        pool::{LeaseCutter, Pool},
        slot::{Packet, Payload, Publish},
    },
    stats::ChannelCounters,
    sync::{Arc, Mutex, lock},
    trace, wire,
};

/// How much of a RAM packet's pages is read before it is sent on.
const CHUNK: usize = 128 << 10;

/// Serves one of the source's channels until the source ends it.
pub(super) fn serve(
    shared: &Arc<Shared>,
    source: Channel,
    egress_channel: &Arc<EgressChannel>,
    counters: Arc<ChannelCounters>,
    limits: ChannelLimits,
    greeted: &Mutex<Vec<u8>>,
) -> Result<()> {
    let sink = PassOn {
        shared: shared.clone(),
        egress_channel: egress_channel.clone(),
        chunk: zeroed(CHUNK, "memory for a channel")?.into(),
    };
    egress_channel.with_sender(|sender| sender.set_timeout(limits.no_progress))?;
    let receiver = Receiver::new(source.with_ram_sink(sink), egress_channel.number(), limits)?;
    let mut sink = RelaySink::new(shared.clone(), counters);
    receiver.run(&mut sink, |hello, bytes| {
        {
            let mut greeted = lock(greeted);
            if greeted.contains(&hello.id) {
                return Err(Error::protocol(Violation::ChannelIdTwice(hello.id)));
            }
            greeted.push(hello.id);
        }
        egress_channel.send(&mut [IoSlice::new(bytes)])
    })?;
    if egress_channel.syncs() == 0 {
        // A channel begins with hello and one SYNC: this one ended within its beginning.
        return Err(Error::protocol(Violation::Truncated).on_channel(egress_channel.number()));
    }
    Ok(())
}

/// Sends on what is not a device's.
struct PassOn {
    shared: Arc<Shared>,
    egress_channel: Arc<EgressChannel>,
    chunk: Box<[u8]>,
}

/// A destination that failed is why the relay fails, not what its source is told of it.
fn say(shared: &Shared, sent: Result<()>) -> io::Result<()> {
    sent.map_err(|error| {
        let text = io::Error::other(error.to_string());
        shared.fail(error);
        text
    })
}

impl RamSink for PassOn {
    fn ram(&mut self, header: &[u8], pages: &mut dyn Read) -> io::Result<()> {
        let Self {
            shared,
            egress_channel,
            chunk,
        } = self;
        egress_channel.with_sender(|sender| {
            let mut header = header;
            // Ends: with the packet, whose length the header has bounded.
            loop {
                let count = pages.read(chunk)?;
                if count == 0 && header.is_empty() {
                    return Ok(());
                }
                let buffers = [header, &chunk[..count]];
                let buffers = buffers.iter().filter(|bytes| !bytes.is_empty());
                let mut buffers: Vec<_> = buffers.map(|bytes| IoSlice::new(bytes)).collect();
                say(shared, sender.send(&mut buffers))?;
                header = &[];
            }
        })
    }

    fn sync(&mut self, header: &[u8]) -> io::Result<()> {
        say(&self.shared, self.egress_channel.sync(header))?;
        // Those that were ahead of this egress channel may be so no more.
        self.shared.outgoing.notify_all();
        Ok(())
    }
}

/// A packet on its way in.
pub(super) struct Arriving {
    device: Arc<RelayDevice>,
    index: u32,
    config: bool,
    /// Its bytes of data, until they are published.
    remaining: usize,
}

/// What an ingress thread has of its own.
pub(super) struct RelaySink {
    shared: Arc<Shared>,
    /// For the devices' slots.
    epoch: LocalHandle,
    /// For the router.
    routes: LocalHandle,
    cutter: LeaseCutter<Arc<Pool>>,
    /// The device of the packet before: most packets are for the same.
    recent: Option<Arc<RelayDevice>>,
    counters: Arc<ChannelCounters>,
}

impl RelaySink {
    fn new(shared: Arc<Shared>, counters: Arc<ChannelCounters>) -> Self {
        Self {
            epoch: shared.collector.register(),
            routes: shared.router.register(),
            cutter: LeaseCutter::new(shared.pool.clone()),
            shared,
            recent: None,
            counters,
        }
    }

    fn device(&mut self, idstr: &[u8], instance: u32) -> Result<Arc<RelayDevice>> {
        if let Some(recent) = &self.recent
            && recent.id.idstr().as_bytes() == idstr
            && recent.id.instance() == instance
        {
            return Ok(recent.clone());
        }
        let device = self.shared.device(idstr, instance, &self.routes.pin())?;
        self.recent = Some(device.clone());
        Ok(device)
    }

    /// Memory for a packet's headers and data; `None` where there is none now.
    fn try_lease(&mut self, packet: &Arriving) -> Result<Option<Buffer>> {
        if let Some(error) = self.shared.stopped() {
            return Err(error);
        }
        let reorder = &packet.device.reorder;
        if !reorder.in_window(packet.index) {
            return Ok(None);
        }
        let len = HEADROOM + packet.remaining;
        let pool = &self.shared.pool;
        if pool.layout().buffers > 0
            && let Some(lease) = self.cutter.lease(len)
        {
            return Ok(Some(lease));
        }
        if reorder.next() != packet.index {
            return Ok(None);
        }
        // The sequencer hands it on at once, and it comes back when it has been sent.
        let reserve = Pool::reserve(pool.clone(), 0);
        Ok(reserve.map(|mut lease| {
            lease.truncate(len);
            lease
        }))
    }

    /// As [`RelaySink::try_lease`], waiting for it. Ends with memory, or the relay's end.
    fn lease_all(&mut self, packet: &Arriving) -> Result<Buffer> {
        if let Some(lease) = self.try_lease(packet)? {
            return Ok(lease);
        }
        // A buffer that is not full would be held for as long as the wait lasts.
        self.release_buffer();
        let since = Instant::now();
        let shared = self.shared.clone();
        let found = shared.backpressure.wait(None, || {
            if packet.index < packet.device.reorder.next() {
                let device = &packet.device;
                return Some(Err(
                    device.refuse(Violation::IndexAlreadyWritten, packet.index)
                ));
            }
            self.try_lease(packet).transpose()
        });
        self.counters.blocked.add_time(since.elapsed());
        found.expect("a wait without a deadline ends with a look")
    }

    /// Writes the headers in front of the data, and publishes both. `buffer` has all of it.
    fn hand_over(&mut self, packet: &mut Arriving, mut buffer: Buffer) -> Result<()> {
        let (device, index) = (&packet.device, packet.index);
        let data_len = buffer.size() - HEADROOM;
        let len = u32::try_from(data_len).expect("a buffer is far below 4 GiB");
        let headers = wire::encode_packet(&device.key, index, packet.config, len);
        framed::frame(buffer.bytes_mut(), device.ordinal, &headers);
        device.counters.published();
        let filled = Packet {
            payload: Payload::Lease(buffer.into_token()),
            config: packet.config,
            more: false,
        };
        match device.reorder.publish(index, filled, &self.epoch.pin()) {
            Publish::Published => {}
            Publish::Duplicate(filled) | Publish::Full(filled) => {
                filled.recycle(&self.shared.pool);
                return Err(device.refuse(Violation::DuplicateIndex, index));
            }
            Publish::Closed(filled) => {
                filled.recycle(&self.shared.pool);
                let stopped = self.shared.stopped();
                return Err(stopped.unwrap_or_else(|| Error::aborted(Phase::Receive)));
            }
        }
        self.shared.arrivals.notify_all();
        packet.remaining = 0;
        self.counters.bytes.add(data_len as u64);
        Ok(())
    }
}

impl PacketSink for RelaySink {
    type Packet = Arriving;

    fn announce(
        &mut self,
        (idstr, instance): (&[u8], u32),
        header: wire::PacketHeader,
        data_len: usize,
    ) -> Result<Arriving> {
        let wire::PacketHeader { index, config } = header;
        let device = self
            .device(idstr, instance)
            .map_err(|error| error.at_index(index))?;
        device
            .reorder
            .admit(index, config)
            .map_err(|violation| device.refuse(violation, index))?;
        trace::load_state_device_buffer_incoming(&device.id, index);
        Ok(Arriving {
            device,
            index,
            config,
            remaining: data_len,
        })
    }

    fn place(packet: &Arriving) -> (&DeviceId, u32) {
        (&packet.device.id, packet.index)
    }

    fn remaining(&self, packet: &Arriving) -> usize {
        packet.remaining
    }

    fn lease(&mut self, packet: &mut Arriving) -> Result<Space> {
        let mut lease = self.lease_all(packet)?;
        lease.advance(HEADROOM);
        Ok(Space::Memory(lease))
    }

    fn spill(
        &mut self,
        _packet: &mut Arriving,
        _receive: &mut dyn FnMut(&mut [u8], bool) -> Result<()>,
    ) -> Result<()> {
        unreachable!("a relay spills nothing: its leases are never refused")
    }

    fn passed(&mut self, _packet: &mut Arriving) {
        unreachable!("a relay reads past nothing: no device is unplugged from it")
    }

    fn publish(&mut self, packet: &mut Arriving, mut filled: Buffer) -> Result<()> {
        filled.retreat(HEADROOM);
        self.hand_over(packet, filled)
    }

    fn publish_empty(&mut self, packet: &mut Arriving) -> Result<()> {
        // Its headers take room too.
        let buffer = self.lease_all(packet)?;
        self.hand_over(packet, buffer)
    }

    fn release_buffer(&mut self) {
        self.cutter.release();
        // What was left of a buffer may have been the last of it.
        self.shared.backpressure.notify_all();
    }

    fn before_sync(&mut self) {
        // What is left of the buffer stays: small packets that are early would hold a buffer each
        // between two SYNCs, and the one that is kept back lets the next of them pass in any case.
    }

    fn counters(&self) -> &ChannelCounters {
        &self.counters
    }
}

impl Drop for RelaySink {
    fn drop(&mut self) {
        self.release_buffer();
    }
}
