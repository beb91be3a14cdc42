//! Device side: the I/O thread's part of a save, from a device's data fd to the send queue.
//!
//! ```text
//!   lease ─▶ submit reads, linked ─▶ … each comes back ─▶ write its headers in front of its data ─▶ publish
//! ```

use std::{io, time::Instant};

use crossbeam_epoch::Guard;
use vfio_migration_uring::{Completion, Fd, Ring};

use super::{Save, SaveDevice};
use crate::{
    error::{Error, ErrorKind, Phase, Result},
    framed::{self, HEADROOM},
    io_loop::{Context, Transfer, TransferState},
    lane::{Buffer, CHAIN, Direction, Filled, Lane, Progress},
    reorder::{
        pool::{LeaseCutter, Pool},
        slot::{Packet, Payload},
    },
    sync::{
        Arc,
        atomic::Ordering::{AcqRel, Relaxed},
        lock,
    },
    wire,
};

/// One device's bytes on their way out of its data fd. The I/O thread's.
pub(crate) struct SaveTransfer {
    save: Arc<Save>,
    device: Arc<SaveDevice>,
    lane: Lane,
    cutter: LeaseCutter<Arc<Pool>>,
    /// Memory that was leased and not used.
    spare: Vec<Buffer>,
    /// How many reads to link: more while they come back full.
    depth: usize,
    next: u32,
    ended: bool,
    started: Instant,
    starved: Option<Instant>,
    /// Last, so that the lane has given the data fd back before the result is there.
    outcome: ResultOnDrop,
}

/// Leaves a transfer's result when it goes away, however it does.
struct ResultOnDrop {
    save: Arc<Save>,
    device: Arc<SaveDevice>,
    drained: Option<Result<()>>,
}

impl Drop for ResultOnDrop {
    fn drop(&mut self) {
        let unfinished = || {
            let kind = ErrorKind::Internal("the I/O thread ended before this device's transfer");
            Err(Error::new(kind, Phase::Save).on_device(&self.device.id))
        };
        let drained = self.drained.take().unwrap_or_else(unfinished);
        let done = drained.is_ok();
        *lock(&self.device.drained) = Some(drained);
        self.device.flags.drained();
        // AcqRel: the last one ends the sequence that all have published to; and all are the
        // I/O thread's.
        if done && self.save.unfinished.fetch_sub(1, AcqRel) == 1 {
            self.save.queue.end();
        }
    }
}

impl SaveTransfer {
    pub(super) fn new(save: Arc<Save>, device: Arc<SaveDevice>, fd: Fd) -> Self {
        let started = Instant::now();
        device.counters.phases.read.begin(started);
        Self {
            lane: Lane::new(fd, Direction::Read, device.ordinal),
            cutter: LeaseCutter::new(save.pool.clone()),
            outcome: ResultOnDrop {
                save: save.clone(),
                device: device.clone(),
                drained: None,
            },
            next: device.first,
            save,
            device,
            spare: Vec::with_capacity(CHAIN as usize),
            depth: 2,
            ended: false,
            started,
            starved: None,
        }
    }

    fn aborted(&self) -> Error {
        Error::aborted(Phase::Save)
            .on_device(&self.device.id)
            .at_index(self.next)
    }

    fn error(&self, kind: ErrorKind) -> Error {
        Error::new(kind, Phase::Save)
            .on_device(&self.device.id)
            .at_index(self.next)
    }

    /// Leases up to `depth` buffers.
    fn lease(&mut self) {
        while self.spare.len() < self.depth {
            let Some(mut buffer) = self.cutter.lease(HEADROOM + self.device.data_len) else {
                return;
            };
            buffer.advance(HEADROOM);
            self.spare.push(buffer);
        }
    }

    /// Encodes a packet's headers in front of its data, and publishes it.
    fn publish(&mut self, mut buffer: Buffer, len: usize, guard: &Guard) -> Result<()> {
        if self.next == wire::INVALID_INDEX {
            return Err(self.error(ErrorKind::Misuse("more packets than idx can count")));
        }
        buffer.retreat(HEADROOM);
        self.cutter.shorten(&mut buffer, HEADROOM + len);
        let data_len = u32::try_from(len).expect("a buffer is far below 4 GiB");
        let headers = wire::encode_packet(&self.device.key, self.next, false, data_len);
        framed::frame(buffer.bytes_mut(), self.device.ordinal, &headers);
        self.device.count_published();
        let packet = Packet {
            payload: Payload::Lease(buffer.into_token()),
            config: false,
            more: false,
        };
        self.hand_over(packet, guard)?;
        self.next += 1;
        Ok(())
    }

    fn hand_over(&self, packet: Packet, guard: &Guard) -> Result<()> {
        self.save.queue.publish(packet, guard).map_err(|packet| {
            packet.recycle(&self.save.pool);
            match self.save.first_failure.failure() {
                Some(_) => self.aborted(),
                None => self.error(ErrorKind::Misuse("more packets than the queue can count")),
            }
        })
    }

    /// Publishes the config packet, whose idx is the count of the others.
    fn publish_config(&self, guard: &Guard) -> Result<()> {
        let config = self.device.config.get().expect("its notice came");
        let data_len = u32::try_from(config.len()).expect("bounded when it was saved");
        let headers = wire::encode_packet(&self.device.key, self.next, true, data_len);
        self.device
            .config_headers
            .set(headers)
            .expect("a device has one config packet");
        self.device.count_published();
        let packet = Packet {
            payload: Payload::External(self.device.ordinal.into()),
            config: true,
            more: false,
        };
        self.hand_over(packet, guard)
    }
}

impl Transfer for SaveTransfer {
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
        let _quit_or_exit = self.device.flags.stop()?;
        Some(self.aborted())
    }

    fn advance(&mut self, context: &mut Context<'_>) -> TransferState {
        if self.ended {
            if !self.device.flags.is_config_ready() {
                return TransferState::Held;
            }
            return TransferState::Finished(self.publish_config(context.guard));
        }
        self.lease();
        if self.spare.is_empty() {
            return TransferState::Held;
        }
        if let Some(since) = self.starved.take() {
            self.device.counters.starved.add_time(since.elapsed());
        }
        let (next, batch) = (self.next, self.spare.drain(..));
        let numbered = (next..).zip(batch);
        self.lane
            .submit(numbered, context.ring, &self.device.counters);
        TransferState::Busy
    }

    fn part_done(&mut self, filled: Vec<Filled>, guard: &Guard) -> Result<()> {
        // At once: a channel is free, and the destination waits.
        for Filled { buffer, len, .. } in filled {
            self.publish(buffer, len, guard)?;
        }
        Ok(())
    }

    fn batch_done(&mut self, filled: Vec<Filled>, guard: &Guard) -> Result<()> {
        let whole = filled
            .iter()
            .all(|filled| filled.len == self.device.data_len);
        for Filled { buffer, len, end } in filled {
            if end {
                self.ended = true;
                let phases = &self.device.counters.phases;
                phases.read.add_since(self.started);
            }
            if len > 0 {
                self.publish(buffer, len, guard)?;
            } else if !self.ended {
                self.spare.push(buffer);
            }
        }
        self.depth = if whole {
            (self.depth * 2).min(CHAIN as usize / 2)
        } else {
            1
        };
        self.spare.truncate(self.depth);
        if self.ended {
            self.spare.clear();
            self.cutter.release();
        }
        Ok(())
    }

    fn failed(&self, index: u32, _moved: usize, source: io::Error) -> Error {
        self.error(ErrorKind::Device)
            .at_index(index)
            .caused_by(source)
    }

    fn starve(&mut self) {
        if !self.ended {
            self.starved.get_or_insert_with(Instant::now);
            // Relaxed: ordered by the bell's fence. Never taken back: a channel that rings for a
            // I/O thread with enough memory wakes it once too often.
            self.save.dry.store(true, Relaxed);
        }
    }

    fn is_ready(&mut self, _guard: &Guard) -> bool {
        if self.ended {
            return self.device.flags.is_config_ready();
        }
        self.lease();
        !self.spare.is_empty()
    }

    fn stalled(&self) -> Error {
        self.error(ErrorKind::Stalled)
    }

    fn finish(mut self, result: Result<()>) {
        // Of a save that fails while it waits.
        if let Some(since) = self.starved.take() {
            self.device.counters.starved.add_time(since.elapsed());
        }
        self.outcome.drained = Some(result);
    }
}
