//! Device side: the driver's part, from a device's slots to its data fd.
//!
//! ```text
//!   take what is there ─▶ gather small ones, chain large ones ─▶ submit ─▶ … ─▶ batch done
//! ```

use super::*;

/// Packets up to this many bytes are gathered into one write where several are ready.
const GATHER_MAX: usize = 32 << 10;

/// The most bytes of a chain of large packets: enough to keep the device busy, little enough to
/// stay in the cache.
const CHAIN_BYTES: usize = 4 << 20;

/// One device's packets on their way into its data fd. The driver's.
pub(crate) struct LoadFlow {
    load: Arc<Load>,
    device: Arc<LoadDevice>,
    lane: Lane,
    cursor: Cursor,
    /// The config packet's data so far, once it is next.
    config: Vec<u8>,
    config_taken: bool,
    /// The chain that is being put together, or in flight: where each packet of it ends in its
    /// operation's buffer, and its idx.
    batch: Vec<(u32, Buffer)>,
    gathered: Vec<(usize, u32)>,
    /// The idx of the first packet in `gathered`.
    gathered_at: Option<u32>,
    in_flight: Vec<u32>,
    in_flight_bytes: u64,
    started: Option<Instant>,
    starved: Option<Instant>,
    /// Last, so that the lane has given the data fd back before the result is there.
    outcome: Outcome,
}

/// Leaves a flow's result when it goes away, however it does.
struct Outcome {
    load: Arc<Load>,
    device: Arc<LoadDevice>,
    drained: Option<Drained>,
}

impl Drop for Outcome {
    fn drop(&mut self) {
        // Nothing is stored any more: later packets are refused, and those that nobody took are
        // recycled.
        let epoch = self.load.collector.register();
        let pool = &self.load.pool;
        self.device
            .inbox
            .close(&epoch.pin(), |packet| packet.recycle(pool));
        self.load.room.notify_all();
        let unfinished = || {
            let kind = ErrorKind::Internal("the driver ended before this device's transfer");
            Err(Error::new(kind, Phase::Load).on_device(&self.device.id))
        };
        self.device
            .leave(self.drained.take().unwrap_or_else(unfinished));
    }
}

impl LoadFlow {
    pub(crate) fn new(load: Arc<Load>, device: Arc<LoadDevice>, fd: Fd) -> Self {
        let lane = Lane::new(fd, Direction::Write, device.ordinal);
        let outcome = Outcome {
            load: load.clone(),
            device: device.clone(),
            drained: None,
        };
        Self {
            load,
            device,
            lane,
            cursor: Cursor::new(),
            config: Vec::new(),
            config_taken: false,
            batch: Vec::with_capacity(CHAIN as usize),
            gathered: Vec::new(),
            gathered_at: None,
            in_flight: Vec::new(),
            in_flight_bytes: 0,
            started: None,
            starved: None,
            outcome,
        }
    }

    fn internal(&self, what: &'static str, index: u32) -> Error {
        Error::new(ErrorKind::Internal(what), Phase::Load)
            .on_device(&self.device.id)
            .at_index(index)
    }

    fn cancelled(&self) -> Error {
        Error::cancelled(Phase::Load)
            .on_device(&self.device.id)
            .at_index(self.position())
    }

    /// The first idx that is not in the device.
    fn position(&self) -> u32 {
        let in_flight = self.in_flight.first().copied();
        in_flight.unwrap_or_else(|| self.cursor.next())
    }

    /// Takes a piece of the config packet out of the pool: it waits for the device's thread, and
    /// must not hold up other packets meanwhile. Its size is bounded by the maximum of a packet.
    fn take_config(&mut self, packet: Packet) {
        if let Payload::Piece(piece) = packet.payload {
            let lease = Pool::adopt(&*self.load.pool, piece);
            self.config.extend_from_slice(lease.bytes());
        }
        self.config_taken = !packet.more;
    }

    /// Takes what is there, as far as it makes one chain.
    fn gather(&mut self, guard: &Guard) -> Result<()> {
        // A buffer that small packets are copied to, one after the other.
        let mut staging: Option<(u32, Buffer, usize)> = None;
        let mut bytes = 0;
        let mut taken = 0;
        while !self.config_taken && self.batch.len() < CHAIN as usize && bytes < CHAIN_BYTES {
            if let Some((_, buffer, used)) = &staging
                && buffer.size() - used < GATHER_MAX
            {
                break;
            }
            let (index, packet) = match self.cursor.take(&self.device.inbox, guard) {
                Next::Packet(index, packet) => (index, packet),
                Next::Starved(_) | Next::Closed => break,
            };
            taken += u64::from(!packet.more);
            if packet.config {
                self.take_config(packet);
                continue;
            }
            let len = match packet.payload {
                Payload::Empty => {
                    self.in_flight_bytes += wire::PACKET_HEADER_LEN as u64;
                    continue;
                }
                Payload::Aside(_) => {
                    return Err(self.internal("nothing is spilled by this version", index));
                }
                Payload::Piece(piece) => {
                    let len = piece.size();
                    let small = len <= GATHER_MAX;
                    if small && staging.is_none() && self.gathered_at.is_none() {
                        let another = self.cursor.is_ready(&self.device.inbox, guard);
                        staging = another.then(|| self.stage(index)).flatten();
                    }
                    match &mut staging {
                        Some((_, buffer, used)) if small => {
                            // Gathered by a copy, and recycled at once.
                            let lease = Pool::adopt(&*self.load.pool, piece);
                            buffer.bytes_mut()[*used..*used + len].copy_from_slice(lease.bytes());
                            *used += len;
                            self.gathered.push((*used, index));
                        }
                        _ => {
                            self.batch.extend(close_staging(&mut staging));
                            let lease = Pool::adopt(self.load.pool.clone(), piece);
                            self.batch.push((index, lease));
                        }
                    }
                    len
                }
            };
            if self.in_flight.last() != Some(&index) {
                self.in_flight.push(index);
                self.in_flight_bytes += wire::PACKET_HEADER_LEN as u64;
                trace::load_state_device_buffer_load_start(&self.device.id, index);
            }
            self.in_flight_bytes += len as u64;
            bytes += len;
        }
        self.batch.extend(close_staging(&mut staging));
        if taken > 0 {
            self.device.counters.taken(taken);
        }
        Ok(())
    }

    /// A staging buffer, if one is free. There are few for all devices; without one small packets
    /// go as they are.
    fn stage(&mut self, index: u32) -> Option<(u32, Buffer, usize)> {
        let layout = self.load.staging.layout();
        if layout.buffers == 0 {
            return None;
        }
        let buffer = Packer::new(self.load.staging.clone()).lease(layout.buffer_len)?;
        self.gathered_at = Some(index);
        Some((index, buffer, 0))
    }
}

/// Cuts a staging buffer to what is in it.
fn close_staging(staging: &mut Option<(u32, Buffer, usize)>) -> Option<(u32, Buffer)> {
    let (index, mut buffer, used) = staging.take()?;
    buffer.truncate(used);
    Some((index, buffer))
}

impl Flow for LoadFlow {
    fn lane(&mut self) -> &mut Lane {
        &mut self.lane
    }

    fn complete(
        &mut self,
        completion: Completion<Buffer>,
        ring: &mut dyn Ring<Buffer>,
    ) -> Progress {
        self.lane.complete(completion, ring, &self.device.counters)
    }

    fn stop(&self) -> Option<Error> {
        let _quit_or_exit = self.device.control.stop()?;
        Some(self.cancelled())
    }

    fn pump(&mut self, context: &mut Context<'_>) -> Pump {
        if !self.device.control.is_started() {
            return Pump::Held;
        }
        let first = self.cursor.next() == 0;
        let started = *self.started.get_or_insert_with(Instant::now);
        // Before the look at the slots: what was published before the last input ended is seen.
        let ended = self.load.input_ended();
        if let Err(error) = self.gather(context.guard) {
            return Pump::Finished(Err(error));
        }
        if first && self.cursor.next() > 0 {
            trace::load_state_device_buffer_start(&self.device.id);
        }
        if !self.batch.is_empty() {
            if let Some(since) = self.starved.take() {
                self.device.counters.starved.add_time(since.elapsed());
            }
            self.lane
                .submit(self.batch.drain(..), context.ring, &self.device.counters);
            return Pump::Busy;
        }
        if self.config_taken {
            let phases = &self.device.counters.phases;
            phases.transfer.add_time(started.elapsed());
            trace::load_state_device_buffer_end(&self.device.id);
            return Pump::Finished(Ok(()));
        }
        if ended {
            // Channels that were hung up on have ended too: then this is no news.
            if self.load.failure().is_some() {
                return Pump::Finished(Err(self.cancelled()));
            }
            let error = Error::new(ErrorKind::Missing, Phase::Load)
                .on_device(&self.device.id)
                .at_index(self.cursor.next());
            return Pump::Finished(Err(error));
        }
        Pump::Starved
    }

    fn batch_done(&mut self, _filled: Vec<Filled>, _guard: &Guard) -> Result<()> {
        for index in self.in_flight.drain(..) {
            trace::load_state_device_buffer_load_end(&self.device.id, index);
        }
        self.device
            .counters
            .bytes
            .add(mem::take(&mut self.in_flight_bytes));
        self.gathered.clear();
        self.gathered_at = None;
        Ok(())
    }

    fn failed(&self, index: u32, moved: usize, source: io::Error) -> Error {
        // Within a gathered write the packet is the one that the bytes moved so far end in.
        let index = match self.gathered_at {
            Some(at) if at == index => {
                let at = self.gathered.partition_point(|&(end, _)| end <= moved);
                self.gathered.get(at).map_or(index, |&(_, index)| index)
            }
            _ => index,
        };
        Error::new(ErrorKind::Device, Phase::Load)
            .on_device(&self.device.id)
            .at_index(index)
            .caused_by(source)
    }

    fn starve(&mut self) {
        if self.started.is_some() && self.starved.is_none() {
            self.starved = Some(Instant::now());
            trace::load_state_device_buffer_starved(&self.device.id, self.cursor.next());
        }
        self.cursor.starve(&self.device.inbox);
    }

    fn is_ready(&mut self, guard: &Guard) -> bool {
        self.device.control.is_started()
            && (self.cursor.is_ready(&self.device.inbox, guard) || self.load.input_ended())
    }

    fn stalled(&self) -> Error {
        Error::new(ErrorKind::Stalled, Phase::Load)
            .on_device(&self.device.id)
            .at_index(self.position())
    }

    fn finish(mut self, result: Result<()>) {
        let config = mem::take(&mut self.config);
        let bytes = mem::take(&mut self.in_flight_bytes);
        self.device.counters.bytes.add(bytes);
        if result.is_ok() {
            let len = config.len() + wire::PACKET_HEADER_LEN;
            self.device.counters.bytes.add(len as u64);
        }
        self.outcome.drained = Some(result.map(|()| config));
    }
}
