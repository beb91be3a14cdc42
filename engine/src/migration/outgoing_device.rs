//! One device's migration on the source, from its set-up to the switchover.
//!
//! ```text
//!   MigratableDevice ─ setup() ─▶ OutgoingDevice ─ iterate() … pending_estimate() … pending_exact() ─▶ Outgoing
//!                           └─ abort() ─▶ MigratableDevice, as at set-up   (dropped: the device too)
//! ```
//!
//! In PRE_COPY the device runs on and gives the data that it already has. Each iteration reads once, up to
//! a buffer, and writes the data into the body of the device's section. Each read lowers the estimates;
//! only [`OutgoingDevice::pending_exact`] asks the device for new ones.
//!
//! The channels are greeted at the set-up ([`SourceChannels`]), and may be silent until the switchover. If
//! both ends have agreed on it, [`OutgoingDevice::iterate_over`] sends the data over the channels, as
//! packets numbered from 0. The STOP_COPY packets continue the numbers.
//!
//! Everything here runs on the caller's thread. A call lasts as long as the device's driver and the main
//! channel take; nothing here waits for anything else.

use std::{
    io::Write,
    mem,
    ops::{Deref, DerefMut},
};

use nix::errno::Errno;

use super::{
    Capabilities, DeviceSettings, MigratableDevice, Off, SwitchoverAck, SwitchoverAcks, put_back,
};
use crate::{
    device::{
        Device,
        estimate::{MAX_DATA_SIZE, buffer_len, stop_copy_estimate},
    },
    error::{Error, ErrorKind, Failed, Phase, Result},
    host::zeroed,
    id::DeviceId,
    save::SourceChannels,
    section,
    settings::ConfigGate,
    state::{DeviceState, MigrationFlags},
    stats::DeviceCounters,
    trace,
};

/// What one iteration has done.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct Iteration {
    /// Bytes of the device's data that were written; 0 if the device had nothing for now.
    pub bytes: usize,
    /// Whether the destination was told that it has the initial data.
    pub init_data_sent: bool,
}

/// What a device still has to give, in bytes: three parts, of which no byte is in two. Sums of
/// these cannot overflow: no part is believed above [`MAX_DATA_SIZE`], 1 PiB.
///
/// | number | is compared with |
/// |---|---|
/// | [`total`](Self::total), summed over all devices | what the VM's downtime limit lets be sent: a stop now has to send this |
/// | [`precopy`](Self::precopy) | 0: there is nothing more to be sent while the VM runs |
/// | `initial` | 0: the destination has what it should have before the switchover |
///
/// The driver's own number for a stop now (`VFIO_DEVICE_FEATURE_MIG_DATA_SIZE`) includes what can be read in
/// PRE_COPY. It is not here: `stop_copy` is that number without the PRE_COPY parts.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct Pending {
    /// In PRE_COPY: the data that the destination should have before the switchover.
    pub initial: u64,
    /// In PRE_COPY: the data that has changed since it was read.
    pub dirty: u64,
    /// The data that only STOP_COPY gives: everything that a stop now would have to send, without the two parts
    /// above. 0 before the first [`OutgoingDevice::pending_exact`]. If a device cannot tell, its total is taken
    /// as 100 GiB.
    pub stop_copy: u64,
}

impl Pending {
    /// Returns the sum of all parts: what a stop now would have to send.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.initial + self.dirty + self.stop_copy
    }

    /// Returns what can be sent while the VM runs.
    #[must_use]
    pub const fn precopy(&self) -> u64 {
        self.initial + self.dirty
    }
}

/// One device's migration on the source, while the VM runs.
///
/// Dropping it puts the device back, as [`OutgoingDevice::abort`] does; only `abort` also returns the device.
#[derive(Debug)]
#[must_use = "the migration of a device under way: complete or abort it"]
pub struct OutgoingDevice {
    pub(super) device: ResumeOnDrop,
    pub(super) settings: DeviceSettings,
    pub(super) multifd: bool,
    /// Whether what is read in PRE_COPY goes over the channels too.
    over_channels: bool,
    /// How many packets of that have been sent.
    pub(super) precopy_packets: u32,
    /// When its config may be loaded, on the destination.
    pub(super) config_gate: ConfigGate,
    pub(super) buffer: Vec<u8>,
    pub(super) counters: Box<DeviceCounters>,
    acks: SwitchoverAcks,
    /// What the device has given of its own: from its last query, less what was read since.
    initial: u64,
    dirty: u64,
    /// All that a stop would have had to send when that was asked last, less what was read since.
    left: u64,
    /// Whether the device asks for a switchover ack at all.
    asks: bool,
    /// Whether it has said that its initial data is sent, since it asked last.
    init_sent: bool,
    /// Whether it has been iterated.
    iterated: bool,
    /// Whether the last read in PRE_COPY found nothing for now.
    empty: bool,
    /// Why its migration has failed, where that was at its set-up or when the VM stopped.
    failure: Option<Error>,
}

impl OutgoingDevice {
    /// Sets a device's migration up, and writes the body of its START section.
    ///
    /// A device with PRE_COPY whose VM runs goes to that state. This call also decides, for good, whether the
    /// device's data will go over the multifd channels.
    ///
    /// # Errors
    ///
    /// The device's refusal; [`ErrorKind::State`] with `EINVAL` in another state than RUNNING and
    /// STOP; [`ErrorKind::Misuse`] for what cannot work: postcopy, a background snapshot, a setting
    /// for multifd transfer that the terms do not allow; [`ErrorKind::Channel`]. The device is
    /// given back in the state that it came in.
    #[expect(clippy::result_large_err, reason = "the device itself comes back")]
    pub fn setup<W: Write>(
        migratable: MigratableDevice,
        capabilities: &Capabilities,
        acks: &SwitchoverAcks,
        body: W,
    ) -> Result<Self, Failed<MigratableDevice>> {
        let MigratableDevice {
            mut device,
            settings,
            ..
        } = migratable;
        trace::migration_state_notifier(device.id(), "setup");
        device.set_off();
        let mut source = Self {
            device: ResumeOnDrop(Some(device)),
            config_gate: capabilities.config_gate_of(&settings),
            settings,
            multifd: false,
            over_channels: false,
            precopy_packets: 0,
            buffer: Vec::new(),
            counters: Box::default(),
            acks: acks.clone(),
            initial: 0,
            dirty: 0,
            left: 0,
            asks: false,
            init_sent: false,
            iterated: false,
            empty: false,
            failure: None,
        };
        match source.set_up(capabilities, body) {
            Ok(()) => Ok(source),
            Err(error) => {
                let error = error.on_device(source.id());
                source.failed(&error);
                Err(Failed::new(error, source.abort()))
            }
        }
    }

    fn set_up(&mut self, capabilities: &Capabilities, body: impl Write) -> Result<()> {
        capabilities.prepare()?;
        self.settings.check()?;
        self.multifd = capabilities.decide(self.settings.transfer)?;
        self.over_channels = self.multifd && capabilities.precopy_over_channels;
        let mut writer = section::Writer::new(body);
        let state = self.device.state();
        if !matches!(state, DeviceState::Running | DeviceState::Stop) {
            let error = Error::new(ErrorKind::State, Phase::Setup).caused_by(Errno::EINVAL);
            return Err(error.between(state, DeviceState::PreCopy));
        }
        // Once, for the whole migration: packets are as large as this.
        let len = self.settings.buffer_len;
        let len = len.unwrap_or_else(|| buffer_len(self.device.data_size().ok()));
        self.buffer = zeroed(len, "buffer for the device's data")?;
        if self.over_channels {
            writer.setup_over_channels()?;
        } else {
            writer.setup()?;
        }
        let precopy = self.flags().contains(MigrationFlags::PRE_COPY);
        if precopy && state == DeviceState::Running {
            self.device
                .set_state(DeviceState::PreCopy, DeviceState::Running)?;
            self.query_precopy()?;
            if self.acks.mode() != SwitchoverAck::Off {
                self.acks.ask()?;
                self.asks = true;
            }
        }
        trace::save_setup(self.device.id(), len as u64);
        writer.end()?;
        trace::migration_state_notifier(self.device.id(), "active");
        Ok(())
    }

    /// The device's name.
    #[must_use]
    pub fn id(&self) -> &DeviceId {
        self.device.id()
    }

    /// What the device can do.
    #[must_use]
    pub fn flags(&self) -> MigrationFlags {
        self.device.flags()
    }

    /// The device's state as last known.
    #[must_use]
    pub fn state(&self) -> DeviceState {
        self.device.state()
    }

    /// Whether its data will go over the multifd channels.
    #[must_use]
    pub const fn uses_multifd(&self) -> bool {
        self.multifd
    }

    /// Whether there is anything to iterate: the device is in a PRE_COPY state.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.device.state().is_precopy()
    }

    /// Whether the device lets the switchover happen. It does if one of these holds:
    ///
    /// - The device has not asked to wait.
    /// - All requests have been answered ([`SwitchoverAcks::is_open`]).
    /// - The VM does not run ([`vm::stop`](super::vm::stop) with another reason than the migration's end), so
    ///   there is no downtime to keep short.
    #[must_use]
    pub fn is_switchover_ready(&self) -> bool {
        !self.asks || !self.vm_runs() || self.init_sent && self.acks.is_open()
    }

    /// Whether the VM's processors run, but for the migration's own stop of them.
    fn vm_runs(&self) -> bool {
        self.device.home() != DeviceState::Stop
    }

    /// Writes the body of a PART section: at most one block of data, and the end tag. One such tag, once, says
    /// that the initial data has been sent.
    ///
    /// Reads once, up to a buffer, and never waits for more, so it holds up no other device.
    ///
    /// # Errors
    ///
    /// The device's, if the read fails; [`ErrorKind::Channel`]. Nothing of the body can be taken back, so the
    /// migration has failed. [`ErrorKind::Misuse`] if the data is to go over the channels.
    pub fn iterate<W: Write>(&mut self, body: W) -> Result<Iteration> {
        if self.over_channels {
            return Err(
                Error::misuse(Phase::Save, "its PRE_COPY data goes over the channels")
                    .on_device(self.id()),
            );
        }
        let (count, all) = self.read()?;
        let data = &self.buffer[..count];
        section::Writer::new(body)
            .iterate(data, all)
            .map_err(|error| error.on_device(self.device.id()))?;
        self.counters.main_bytes.add(count as u64);
        Ok(self.iterated(count, all))
    }

    /// As [`OutgoingDevice::iterate`], for a VM that has channels. If the device uses the channels, this fails
    /// when they have ended ([`SourceChannels::failure`]). With [`Capabilities::precopy_over_channels`] the
    /// data
    /// is sent as a packet over the channels, and the body is only the end tag.
    ///
    /// Blocks while the destination takes nothing. A cancellation of `channels` ends the wait.
    ///
    /// # Errors
    ///
    /// As for [`OutgoingDevice::iterate`], and the failure of `channels`.
    pub fn iterate_over<W: Write>(
        &mut self,
        channels: &mut SourceChannels,
        body: W,
    ) -> Result<Iteration> {
        if self.multifd
            && let Some(error) = channels.failure()
        {
            return Err(error.on_device(self.id()));
        }
        if !self.over_channels {
            return self.iterate(body);
        }
        let (count, all) = self.read_and_send(channels)?;
        let mut writer = section::Writer::new(body);
        let counted = if all {
            writer.precopy_sent(self.precopy_packets)
        } else {
            Ok(())
        };
        counted
            .and_then(|()| writer.iterate(&[], all))
            .map_err(|error| error.on_device(self.device.id()))?;
        Ok(self.iterated(count, all))
    }

    /// Sends what the device has now, as a packet over the channels. The destination is told of the initial data's end
    /// otherwise: see [`OutgoingDevice::take_initial_sent`]. Returns how much it was.
    pub(super) fn send(&mut self, channels: &mut SourceChannels) -> Result<usize> {
        let (count, _all) = self.read_and_send(channels)?;
        trace::save_iterate(self.device.id(), self.initial, self.dirty);
        Ok(count)
    }

    fn read_and_send(&mut self, channels: &mut SourceChannels) -> Result<(usize, bool)> {
        let (count, all) = self.read()?;
        if count > 0 {
            let data = &self.buffer[..count];
            let sent = channels.send(self.device.id(), self.precopy_packets, data)?;
            self.precopy_packets += 1;
            self.counters.published();
            self.counters.taken(1);
            self.counters.bytes.add(sent as u64);
        }
        Ok((count, all))
    }

    /// Whether the last of the initial data has been sent, and nobody has been told.
    const fn is_initial_due(&self) -> bool {
        self.asks && !self.init_sent && self.initial == 0
    }

    /// The count of packets that carried the initial data, once it has been sent: to be told to the destination.
    pub(super) fn take_initial_sent(&mut self) -> Option<u32> {
        if !self.is_initial_due() {
            return None;
        }
        self.init_sent = true;
        trace::send_init_data_flag(self.device.id());
        Some(self.precopy_packets)
    }

    /// Whether no initial data of the device's is waited for.
    pub(super) fn has_sent_initial(&self) -> bool {
        !self.asks || self.init_sent || !self.vm_runs()
    }

    /// Whether all its data goes over the channels.
    pub(super) const fn is_over_channels(&self) -> bool {
        self.over_channels
    }

    /// Reads once. Returns how much, and whether that is the last of the initial data.
    fn read(&mut self) -> Result<(usize, bool)> {
        if !mem::replace(&mut self.iterated, true) {
            trace::save_iterate_start(self.device.id());
        }
        let mut count = 0;
        if self.is_active() {
            let read = self.device.read_precopy_once(&mut self.buffer)?;
            let empty = read.is_none();
            if empty && !self.empty {
                trace::save_block_precopy_empty_hit(self.device.id());
            }
            count = read.unwrap_or(0);
            // A driver that says 0 has found something no more than one that says ENOMSG.
            self.empty = empty || self.empty && count == 0;
            self.was_read(count);
        }
        Ok((count, self.is_initial_due()))
    }

    /// An iteration has been written.
    fn iterated(&mut self, bytes: usize, init_data_sent: bool) -> Iteration {
        if init_data_sent {
            self.init_sent = true;
            trace::send_init_data_flag(self.device.id());
        }
        trace::save_iterate(self.device.id(), self.initial, self.dirty);
        Iteration {
            bytes,
            init_data_sent,
        }
    }

    /// The estimates drop by what was read, the initial bytes first. A device that has nothing for
    /// now keeps what it has not given for STOP_COPY.
    fn was_read(&mut self, count: usize) {
        if count == 0 {
            (self.initial, self.dirty) = (0, 0);
            return;
        }
        trace::save_block(self.device.id(), count as u64);
        let count = count as u64;
        self.left = self.left.saturating_sub(count);
        let of_initial = self.initial.min(count);
        self.initial -= of_initial;
        self.dirty = self.dirty.saturating_sub(count - of_initial);
    }

    /// Returns an estimate of what is left. Cheap: it does not ask the device.
    ///
    /// The estimate is the last result of [`OutgoingDevice::pending_exact`], less the bytes read since. It does
    /// not include what has changed in the device since.
    #[must_use]
    pub fn pending_estimate(&self) -> Pending {
        let pending = self.pending();
        let Pending { initial, dirty, .. } = pending;
        trace::state_pending_estimate(self.id(), pending.total(), 0, initial, dirty);
        trace::state_pending(
            self.id(),
            pending.stop_copy,
            initial,
            dirty,
            self.asks_to_wait(),
            false,
            false,
        );
        pending
    }

    /// Asks the device what is left.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::LateRequest`] if the device has new initial data and asks the switchover to wait again, but
    /// the switchover was already decided. [`ErrorKind::Lost`], [`ErrorKind::Panicked`]. A device that cannot
    /// tell is not an error.
    pub fn pending_exact(&mut self) -> Result<Pending> {
        let size = self.device.data_size();
        let ret = Error::trace_errno(&size);
        self.left = stop_copy_estimate(known(size)?);
        trace::query_stop_copy_size(self.device.id(), self.left, ret);
        if self.is_active() {
            self.query_precopy()?;
        }
        let pending = self.pending();
        let Pending {
            initial,
            dirty,
            stop_copy,
        } = pending;
        self.left = pending.total();
        trace::state_pending_exact(self.id(), pending.total(), 0, stop_copy, initial, dirty);
        let asks = self.asks_to_wait();
        trace::state_pending(self.id(), stop_copy, initial, dirty, asks, true, false);
        Ok(pending)
    }

    /// Whether it asks the switchover to wait: its initial data has not been sent.
    const fn asks_to_wait(&self) -> bool {
        self.asks && !self.init_sent
    }

    /// Tells what is left by the counts, once the VM has stopped: no device is asked in the downtime.
    pub(super) fn trace_last(&self) {
        let Pending {
            initial,
            dirty,
            stop_copy,
        } = self.pending();
        trace::state_pending(
            self.id(),
            stop_copy,
            initial,
            dirty,
            self.asks_to_wait(),
            false,
            true,
        );
    }

    /// What is left by the counts: what STOP_COPY alone gives is what is left beyond the rest.
    fn pending(&self) -> Pending {
        let of = |bytes: u64| {
            if self.is_active() {
                bytes.min(MAX_DATA_SIZE)
            } else {
                0
            }
        };
        let (initial, dirty) = (of(self.initial), of(self.dirty));
        Pending {
            initial,
            dirty,
            stop_copy: self.left.saturating_sub(initial + dirty),
        }
    }

    /// Asks the device what it has in PRE_COPY. Where it does not know it has nothing. Where new
    /// initial bytes have appeared, the destination must have those too before the switchover.
    fn query_precopy(&mut self) -> Result<()> {
        let info = self.device.precopy_info();
        let ret = Error::trace_errno(&info);
        let info = known(info)?.unwrap_or_default();
        (self.initial, self.dirty) = (info.initial_bytes, info.dirty_bytes);
        trace::query_precopy_size(self.device.id(), self.initial, self.dirty, ret);
        if !info.reinit || !self.asks || self.acks.mode() != SwitchoverAck::Reusable {
            return Ok(());
        }
        if self.acks.is_decided() {
            let late = Error::new(ErrorKind::LateRequest, Phase::Save);
            return Err(late.on_device(self.id()));
        }
        if self.init_sent {
            self.init_sent = false;
            self.acks
                .ask()
                .map_err(|error| error.on_device(self.id()))?;
        }
        Ok(())
    }

    /// The VM is about to stop for the migration's end: from now on no device may ask it to wait.
    pub(super) fn decide(&self) -> Result<()> {
        self.acks
            .decide(self.vm_runs())
            .map_err(|error| error.on_device(self.id()))
    }

    /// The last look before the device stops.
    pub(super) fn decided(&mut self) -> Result<()> {
        if self.is_active() && self.acks.mode() == SwitchoverAck::Reusable {
            self.query_precopy()?;
        }
        Ok(())
    }

    /// Its migration has failed.
    pub(super) fn failed(&mut self, error: &Error) {
        self.failure.get_or_insert_with(|| error.clone());
    }

    /// Fails if the device left its saving states after PRE_COPY data was sent: a new session starts from the
    /// beginning, and the destination would receive that data twice.
    pub(super) fn check(&self) -> Result<()> {
        if let Some(error) = &self.failure {
            return Err(error.clone());
        }
        let sent = self.counters.main_bytes.get() > 0 || self.precopy_packets > 0;
        if sent && !self.device.state().is_saving() {
            return Err(Error::misuse(
                Phase::Save,
                "the device's session has ended since it was iterated",
            )
            .on_device(self.id()));
        }
        Ok(())
    }

    /// Aborts the migration: puts the device back to the state at set-up, RUNNING or STOP. If the VM was paused
    /// since, the device goes to STOP; if it was started since, to RUNNING.
    pub fn abort(self) -> MigratableDevice {
        if self.asks && !self.init_sent {
            self.acks.withdraw();
        }
        let off = self.failure.as_ref().map_or(Off::Cancelled, Off::by);
        let mut migratable = self.into_migratable();
        put_back(&mut migratable.device, off);
        migratable
    }

    pub(super) fn into_migratable(self) -> MigratableDevice {
        MigratableDevice::new(self.device.take(), self.settings)
    }
}

/// A device whose migration is under way: goes back to the state at set-up where nobody takes it.
#[derive(Debug)]
pub(super) struct ResumeOnDrop(Option<Device>);

impl ResumeOnDrop {
    pub(super) fn take(mut self) -> Device {
        self.0.take().expect("taken once")
    }
}

impl Deref for ResumeOnDrop {
    type Target = Device;

    fn deref(&self) -> &Device {
        self.0.as_ref().expect("taken with its owner")
    }
}

impl DerefMut for ResumeOnDrop {
    fn deref_mut(&mut self) -> &mut Device {
        self.0.as_mut().expect("taken with its owner")
    }
}

impl Drop for ResumeOnDrop {
    fn drop(&mut self) {
        if let Some(device) = &mut self.0 {
            put_back(device, Off::Cancelled);
        }
    }
}

/// What a query has found, where the device could tell. Only a device that cannot be used any more
/// is an error.
fn known<T>(answer: Result<T>) -> Result<Option<T>> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(error) if *error.kind() == ErrorKind::Device => Ok(None),
        Err(error) => Err(error),
    }
}
