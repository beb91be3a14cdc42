//! The sequencer: takes each device's next packet from its slot and appends it to the queue.
//!
//! ```text
//!   slots of device a   [0][1][ ][3]        ┐
//!   slots of device b   [0][ ][2]           ┼─▶  a0 a1 b0 … ─▶ egress threads
//! ```
//!
//! This one thread owns every device's reader, and it alone publishes to the queue. It waits for packets
//! and for nothing else. It ends with the last input, once every device's config packet is on its way; with
//! a packet that cannot come any more; or with the relay.

use crossbeam_epoch::LocalHandle;
use vfio_migration_uring::deadline;

use super::{RelayDevice, Shared};
use crate::{
    error::{Error, ErrorKind, Phase, Result},
    reorder::{
        reorder_buffer::{Next, ReorderReader},
        slot::Packet,
    },
    sync::{Arc, lock},
};

/// How often nothing at all may move for the time allowed while something is being sent.
const PATIENCE: u32 = 4;

/// Moves packets until there will be no more.
pub(super) fn run(shared: &Shared) {
    let mut sequencer = Sequencer {
        shared,
        epoch: shared.collector.register(),
        moved: Vec::new(),
        packets: 0,
    };
    if let Err(error) = sequencer.run() {
        shared.fail(error);
    }
    // Later packets are refused, and those that nobody took are recycled; of all devices: those that
    // are made after this last look are refused themselves.
    sequencer.adopt_new_devices();
    for Moved { device, .. } in &sequencer.moved {
        let abandon = |packet: Packet| packet.recycle(&shared.pool);
        device.reorder.close(&sequencer.epoch.pin(), abandon);
    }
}

/// One device, and how far it has been moved.
struct Moved {
    device: Arc<RelayDevice>,
    reader: ReorderReader,
    /// Whether its config packet has been: then it is complete.
    complete: bool,
}

struct Sequencer<'a> {
    shared: &'a Shared,
    epoch: LocalHandle,
    moved: Vec<Moved>,
    /// How many packets have been moved.
    packets: u64,
}

impl Sequencer<'_> {
    fn run(&mut self) -> Result<()> {
        let shared = self.shared;
        let mut still = 0;
        loop {
            // Before the look at the slots: what was published before the last input ended is seen.
            let ended = shared.input_ended();
            self.adopt_new_devices();
            while self.pass()? {
                shared.outgoing.notify_all();
                // What a device needs next has changed, and with it who may have the reserve.
                shared.backpressure.notify_all();
            }
            if let Some(error) = shared.stopped() {
                return Err(error);
            }
            if ended {
                return self.end();
            }
            let incomplete = self.moved.iter().any(|moved| !moved.complete);
            let before = (incomplete || shared.queue.waiting() > 0).then(|| shared.activity());
            let deadline = before.map(|_| deadline(shared.settings.no_progress));
            let found = shared.arrivals.wait(deadline, || self.look().then_some(()));
            if found.is_some() || before != Some(shared.activity()) {
                still = 0;
                continue;
            }
            if shared.settings.precopy_over_channels
                && shared.received() == self.packets
                && shared.queue.waiting() == 0
            {
                // All that has come has gone: the source's VM may run on.
                still = 0;
                continue;
            }
            still += 1;
            // A destination that takes nothing is for its connection to name, which does so sooner.
            if !shared.is_sending() || still >= PATIENCE {
                return Err(self.missing(ErrorKind::Stalled));
            }
        }
    }

    /// Gets to know the devices that have come since.
    fn adopt_new_devices(&mut self) {
        let devices = lock(&self.shared.devices);
        let new = devices.iter().skip(self.moved.len());
        self.moved.extend(new.map(|device| Moved {
            device: device.clone(),
            reader: ReorderReader::new(),
            complete: false,
        }));
    }

    /// Whether there is something to do.
    fn look(&self) -> bool {
        let guard = self.epoch.pin();
        let shared = self.shared;
        shared.input_ended()
            || shared.stopped().is_some()
            || lock(&shared.devices).len() > self.moved.len()
            || self.moved.iter().any(|moved| {
                !moved.complete && moved.reader.is_ready(&moved.device.reorder, &guard)
            })
    }

    /// Moves one packet of each device that has its next. Whether there was one.
    fn pass(&mut self) -> Result<bool> {
        let guard = self.epoch.pin();
        let mut any = false;
        for moved in self.moved.iter_mut().filter(|moved| !moved.complete) {
            let Next::Packet(index, packet) = moved.reader.take(&moved.device.reorder, &guard)
            else {
                continue;
            };
            moved.complete = packet.config;
            any = true;
            self.packets += 1;
            if let Err(packet) = self.shared.queue.publish(packet, &guard) {
                packet.recycle(&self.shared.pool);
                let stopped = self.shared.stopped();
                return Err(stopped.unwrap_or_else(|| {
                    Error::misuse(Phase::Send, "more packets than the queue can count")
                        .on_device(&moved.device.id)
                        .at_index(index)
                }));
            }
        }
        Ok(any)
    }

    /// All inputs have ended, and what they brought has been moved.
    fn end(&self) -> Result<()> {
        if self.moved.iter().all(|moved| moved.complete) {
            self.shared.queue.end();
            self.shared.end_moving();
            Ok(())
        } else {
            Err(self.missing(ErrorKind::Missing))
        }
    }

    /// Names the first packet that is missing, of the first device that lacks one.
    fn missing(&self, kind: ErrorKind) -> Error {
        let error = Error::new(kind, Phase::Receive);
        match self.moved.iter().find(|moved| !moved.complete) {
            Some(moved) => error
                .on_device(&moved.device.id)
                .at_index(moved.reader.next()),
            None => error,
        }
    }
}
