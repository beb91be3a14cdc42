//! The trace events: one function each, with the names that people of this field look for.
//!
//! ```text
//!   session, load, save, section, device ──▶ one function here ──▶ tracing ──▶ the subscriber
//!                                                                              of the embedder
//! ```
//!
//! Every thread of the engine calls these functions, at the moment that an event names. Without a
//! subscriber a call is a load and a branch. A subscriber runs in the caller's thread, and the engine waits
//! for it. [`TARGET`] says what an event looks like and how to filter.
//!
//! Names, moments and arguments are those of QEMU's trace events of its VFIO migration, without their `vfio_`.
//! `engine/tests/process_traces` compares them with recorded traces, and lists where they differ, and why.

use std::fmt;

use crate::{
    id::DeviceId,
    state::{DeviceState, MigrationFlags},
};

/// The target of every trace event of this engine, through the `tracing` crate.
///
/// An event has a name, the same text as its message, and the device's name as its first field,
/// `device`; the rest of the fields are named after what they are. Events that come once for every
/// packet or block are at `TRACE`, the rest at `DEBUG`; what somebody should look at is at `WARN`.
///
/// So an `EnvFilter` of `tracing-subscriber` reads `vfio_migration=debug` (or `=trace`). To follow
/// one event a filter asks the metadata for its name; to follow one device, a layer asks the event
/// for its field.
///
/// ```
/// use vfio_migration::trace;
///
/// // To hand to `tracing_subscriber::filter::filter_fn`.
/// let states_alone = |metadata: &tracing::Metadata<'_>| {
///     metadata.target() == trace::TARGET && metadata.name() == "migration_set_device_state"
/// };
/// # let _ = states_alone;
/// ```
pub const TARGET: &str = "vfio_migration";

/// One event: its level, its name, its device, its fields.
macro_rules! event {
    ($level:ident, $name:literal, $device:expr $(, $($fields:tt)+)?) => {
        tracing::event!(
            name: $name,
            target: TARGET,
            tracing::Level::$level,
            { device = %$device $(, $($fields)+)? },
            $name
        )
    };
}

// Load.

/// The loader may write the channels' packets: the switchover has started, or the loader was started early.
pub(crate) fn load_bufs_thread_start(device: &DeviceId) {
    event!(DEBUG, "load_bufs_thread_start", device);
}

/// The loader has ended, however it came to. Not if it was never started.
pub(crate) fn load_bufs_thread_end(device: &DeviceId) {
    event!(DEBUG, "load_bufs_thread_end", device);
}

/// The destination's setup.
pub(crate) fn load_setup(device: &DeviceId) {
    event!(DEBUG, "load_setup", device);
}

/// The destination's cleanup.
pub(crate) fn load_cleanup(device: &DeviceId) {
    event!(DEBUG, "load_cleanup", device);
}

/// The config is about to be loaded.
pub(crate) fn load_device_config_state_start(device: &DeviceId) {
    event!(DEBUG, "load_device_config_state_start", device);
}

/// The config has been loaded.
pub(crate) fn load_device_config_state_end(device: &DeviceId) {
    event!(DEBUG, "load_device_config_state_end", device);
}

/// A tag of the device's section has been read; not the one that ends it.
pub(crate) fn load_state(device: &DeviceId, data: u64) {
    event!(TRACE, "load_state", device, data = %format_args!("{data:#x}"));
}

/// A data block of the section, of `size` bytes, has gone to the data fd. `ret` is 0 or a negative errno.
pub(crate) fn load_state_device_data(device: &DeviceId, size: u64, ret: i32) {
    event!(TRACE, "load_state_device_data", device, size, ret);
}

/// A packet has arrived.
pub(crate) fn load_state_device_buffer_incoming(device: &DeviceId, idx: u32) {
    event!(TRACE, "load_state_device_buffer_incoming", device, idx);
}

/// The loader has the first data packet. Not where there is none.
pub(crate) fn load_state_device_buffer_start(device: &DeviceId) {
    event!(DEBUG, "load_state_device_buffer_start", device);
}

/// The loader is about to wait for packet `idx`.
pub(crate) fn load_state_device_buffer_starved(device: &DeviceId, idx: u32) {
    event!(TRACE, "load_state_device_buffer_starved", device, idx);
}

/// Packet `idx` goes to the data fd. Not for empty packets.
pub(crate) fn load_state_device_buffer_load_start(device: &DeviceId, idx: u32) {
    event!(TRACE, "load_state_device_buffer_load_start", device, idx);
}

/// Packet `idx` is in the device. Not for empty packets.
pub(crate) fn load_state_device_buffer_load_end(device: &DeviceId, idx: u32) {
    event!(TRACE, "load_state_device_buffer_load_end", device, idx);
}

/// The last data packet is in the device, and that it was the last is known: the config packet has come. Not
/// where there is no data packet.
pub(crate) fn load_state_device_buffer_end(device: &DeviceId) {
    event!(DEBUG, "load_state_device_buffer_end", device);
}

// Save.

/// The source's setup, with the length of its buffers in bytes.
pub(crate) fn save_setup(device: &DeviceId, data_buffer_size: u64) {
    event!(DEBUG, "save_setup", device, data_buffer_size);
}

/// A block of `size` bytes has been written to the main channel.
pub(crate) fn save_block(device: &DeviceId, size: u64) {
    event!(TRACE, "save_block", device, size);
}

/// A read in PRE_COPY has found nothing for now (`ENOMSG`), for the first time since it found something.
pub(crate) fn save_block_precopy_empty_hit(device: &DeviceId) {
    event!(TRACE, "save_block_precopy_empty_hit", device);
}

/// The first iteration. The later ones say only how they ended.
pub(crate) fn save_iterate_start(device: &DeviceId) {
    event!(DEBUG, "save_iterate_start", device);
}

/// An iteration has ended, with what is now thought to remain, in bytes.
pub(crate) fn save_iterate(device: &DeviceId, precopy_init_size: u64, precopy_dirty_size: u64) {
    event!(
        TRACE,
        "save_iterate",
        device,
        precopy_init_size,
        precopy_dirty_size
    );
}

/// The destination has been told that it has the initial data.
pub(crate) fn send_init_data_flag(device: &DeviceId) {
    event!(DEBUG, "send_init_data_flag", device);
}

/// The completion on the main channel begins. Not where the channels carry the device's data.
pub(crate) fn save_complete_precopy_start(device: &DeviceId) {
    event!(DEBUG, "save_complete_precopy_start", device);
}

/// The completion on the main channel has ended. `ret` is 0 or a negative errno.
pub(crate) fn save_complete_precopy(device: &DeviceId, ret: i32) {
    event!(DEBUG, "save_complete_precopy", device, ret);
}

/// The completion over the multifd channels begins.
pub(crate) fn save_complete_precopy_thread_start(device: &DeviceId) {
    event!(
        DEBUG,
        "save_complete_precopy_thread_start",
        device,
        idstr = device.idstr(),
        instance_id = device.instance()
    );
}

/// The completion over the multifd channels has ended. `ret` is 1 where it succeeded and 0 where it failed,
/// as QEMU has it.
pub(crate) fn save_complete_precopy_thread_end(device: &DeviceId, succeeded: bool) {
    let ret = i32::from(succeeded);
    event!(DEBUG, "save_complete_precopy_thread_end", device, ret);
}

/// The config is being saved.
pub(crate) fn save_device_config_state(device: &DeviceId) {
    event!(DEBUG, "save_device_config_state", device);
}

/// The source's cleanup.
pub(crate) fn save_cleanup(device: &DeviceId) {
    event!(DEBUG, "save_cleanup", device);
}

// Both.

/// What the device can do has been found out.
pub(crate) fn migration_init(
    device: &DeviceId,
    flags: MigrationFlags,
    precopy_v2: bool,
    dirty_tracking: bool,
) {
    event!(DEBUG, "migration_init", device, flags = %flags, precopy_v2, dirty_tracking);
}

/// The device has been admitted to migration.
pub(crate) fn migration_realize(device: &DeviceId) {
    event!(DEBUG, "migration_realize", device);
}

/// The device's state has changed to `state`.
pub(crate) fn migration_set_device_state(device: &DeviceId, state: DeviceState) {
    event!(DEBUG, "migration_set_device_state", device, state = %state);
}

/// A change of state was asked for; `recover` ERROR stands for a reset.
pub(crate) fn migration_set_state(device: &DeviceId, new: DeviceState, recover: DeviceState) {
    event!(DEBUG, "migration_set_state", device, new = %new, recover = %recover);
}

/// The migration as a whole has entered `state`, which is one of QEMU's names.
pub(crate) fn migration_state_notifier(device: &DeviceId, state: impl fmt::Display) {
    event!(DEBUG, "migration_state_notifier", device, state = %state);
}

/// How much is left, in bytes. `request_switchover_ack`: whether the device asks the switchover to wait. `exact`: whether
/// the device was asked. `last`, in the event `final`: the VM has stopped.
pub(crate) fn state_pending(
    device: &DeviceId,
    stopcopy_size: u64,
    precopy_init_size: u64,
    precopy_dirty_size: u64,
    request_switchover_ack: bool,
    exact: bool,
    last: bool,
) {
    event!(
        TRACE,
        "state_pending",
        device,
        stopcopy_size,
        precopy_init_size,
        precopy_dirty_size,
        request_switchover_ack,
        exact,
        "final" = last
    );
}

/// The cheap estimate, in bytes.
pub(crate) fn state_pending_estimate(
    device: &DeviceId,
    precopy: u64,
    postcopy: u64,
    precopy_init_size: u64,
    precopy_dirty_size: u64,
) {
    event!(
        TRACE,
        "state_pending_estimate",
        device,
        precopy,
        postcopy,
        precopy_init_size,
        precopy_dirty_size
    );
}

/// The exact estimate, in bytes.
pub(crate) fn state_pending_exact(
    device: &DeviceId,
    precopy: u64,
    postcopy: u64,
    stopcopy_size: u64,
    precopy_init_size: u64,
    precopy_dirty_size: u64,
) {
    event!(
        TRACE,
        "state_pending_exact",
        device,
        precopy,
        postcopy,
        stopcopy_size,
        precopy_init_size,
        precopy_dirty_size
    );
}

/// The device was asked for its precopy estimates, in bytes. `ret` is 0 or a negative errno.
pub(crate) fn query_precopy_size(device: &DeviceId, initial: u64, dirty: u64, ret: i32) {
    event!(TRACE, "query_precopy_size", device, initial, dirty, ret);
}

/// The device was asked for the size of its state, in bytes. `ret` is 0 or a negative errno.
pub(crate) fn query_stop_copy_size(device: &DeviceId, size: u64, ret: i32) {
    event!(TRACE, "query_stop_copy_size", device, size, ret);
}

/// The VM stops or starts: the step that devices with P2P take first.
pub(crate) fn vmstate_change_prepare(
    device: &DeviceId,
    running: bool,
    reason: impl fmt::Display,
    state: DeviceState,
) {
    event!(DEBUG, "vmstate_change_prepare", device, running, reason = %reason, state = %state);
}

/// The VM stops or starts: the step that every device takes.
pub(crate) fn vmstate_change(
    device: &DeviceId,
    running: bool,
    reason: impl fmt::Display,
    state: DeviceState,
) {
    event!(DEBUG, "vmstate_change", device, running, reason = %reason, state = %state);
}

// Ours alone: what the errors do not carry.

/// A step of a recovery has failed, and its errno is not the one that is returned.
pub(crate) fn recovery_failed(device: &DeviceId, step: &'static str, why: &dyn fmt::Display) {
    event!(WARN, "recovery_failed", device, step, why = %why);
}

/// Migration is on although nothing tracks the memory that the device writes to: all of it will be
/// sent again and again.
pub(crate) fn no_dirty_tracking(device: &DeviceId) {
    event!(WARN, "no_dirty_tracking", device);
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tracing::{
        Event, Metadata, Subscriber,
        field::{Field, Visit},
        span,
    };

    use super::*;

    /// Keeps every event as `name field=value …`.
    #[derive(Clone, Default)]
    struct Recorder(Arc<Mutex<Vec<String>>>);

    struct Fields(String);

    impl Visit for Fields {
        fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
            use fmt::Write as _;
            write!(self.0, " {}={value:?}", field.name()).unwrap();
        }
    }

    impl Subscriber for Recorder {
        fn enabled(&self, metadata: &Metadata<'_>) -> bool {
            metadata.target() == TARGET
        }

        fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
            span::Id::from_u64(1)
        }

        fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

        fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

        fn event(&self, event: &Event<'_>) {
            let mut fields = Fields(event.metadata().name().into());
            event.record(&mut fields);
            self.0.lock().unwrap().push(fields.0);
        }

        fn enter(&self, _: &span::Id) {}

        fn exit(&self, _: &span::Id) {}
    }

    fn recorded(f: impl FnOnce()) -> Vec<String> {
        let recorder = Recorder::default();
        tracing::subscriber::with_default(recorder.clone(), f);
        let events = recorder.0.lock().unwrap();
        events.clone()
    }

    #[test]
    fn every_event_has_its_name_and_its_device() {
        let id = &DeviceId::new("a", 1).unwrap();
        let state = DeviceState::StopCopy;
        let events = recorded(|| {
            load_bufs_thread_start(id);
            load_bufs_thread_end(id);
            load_setup(id);
            load_cleanup(id);
            load_device_config_state_start(id);
            load_device_config_state_end(id);
            load_state(id, 0xffff_ffff_ef10_0001);
            load_state_device_data(id, 1, -5);
            load_state_device_buffer_incoming(id, 2);
            load_state_device_buffer_start(id);
            load_state_device_buffer_starved(id, 3);
            load_state_device_buffer_load_start(id, 4);
            load_state_device_buffer_load_end(id, 4);
            load_state_device_buffer_end(id);
            save_setup(id, 6);
            save_block(id, 7);
            save_block_precopy_empty_hit(id);
            save_iterate_start(id);
            save_iterate(id, 8, 9);
            send_init_data_flag(id);
            save_complete_precopy_start(id);
            save_complete_precopy(id, 0);
            save_complete_precopy_thread_start(id);
            save_complete_precopy_thread_end(id, true);
            save_device_config_state(id);
            save_cleanup(id);
            migration_init(id, MigrationFlags::P2P, true, false);
            migration_realize(id);
            migration_set_device_state(id, state);
            migration_set_state(id, state, DeviceState::Error);
            migration_state_notifier(id, "active");
            state_pending(id, 1, 2, 3, true, false, true);
            state_pending_estimate(id, 1, 2, 3, 4);
            state_pending_exact(id, 1, 2, 3, 4, 5);
            query_precopy_size(id, 1, 2, 0);
            query_stop_copy_size(id, 1, 0);
            vmstate_change_prepare(id, false, "paused", state);
            vmstate_change(id, true, "running", state);
            recovery_failed(id, "reset", &"no");
            no_dirty_tracking(id);
        });
        let expected = "\
load_bufs_thread_start:
load_bufs_thread_end:
load_setup:
load_cleanup:
load_device_config_state_start:
load_device_config_state_end:
load_state: data=0xffffffffef100001
load_state_device_data: size=1 ret=-5
load_state_device_buffer_incoming: idx=2
load_state_device_buffer_start:
load_state_device_buffer_starved: idx=3
load_state_device_buffer_load_start: idx=4
load_state_device_buffer_load_end: idx=4
load_state_device_buffer_end:
save_setup: data_buffer_size=6
save_block: size=7
save_block_precopy_empty_hit:
save_iterate_start:
save_iterate: precopy_init_size=8 precopy_dirty_size=9
send_init_data_flag:
save_complete_precopy_start:
save_complete_precopy: ret=0
save_complete_precopy_thread_start: idstr=\"a\" instance_id=1
save_complete_precopy_thread_end: ret=1
save_device_config_state:
save_cleanup:
migration_init: flags=P2P precopy_v2=true dirty_tracking=false
migration_realize:
migration_set_device_state: state=STOP_COPY
migration_set_state: new=STOP_COPY recover=ERROR
migration_state_notifier: state=active
state_pending: stopcopy_size=1 precopy_init_size=2 precopy_dirty_size=3 request_switchover_ack=true exact=false final=true
state_pending_estimate: precopy=1 postcopy=2 precopy_init_size=3 precopy_dirty_size=4
state_pending_exact: precopy=1 postcopy=2 stopcopy_size=3 precopy_init_size=4 precopy_dirty_size=5
query_precopy_size: initial=1 dirty=2 ret=0
query_stop_copy_size: size=1 ret=0
vmstate_change_prepare: running=false reason=paused state=STOP_COPY
vmstate_change: running=true reason=running state=STOP_COPY
recovery_failed: step=\"reset\" why=no
no_dirty_tracking:";
        assert_eq!(events.len(), expected.lines().count());
        for (event, expected) in events.iter().zip(expected.lines()) {
            let (name, fields) = expected.split_once(':').unwrap();
            // The message is the name; the device comes before the rest.
            let expected = format!("{name} message={name} device=a#1{fields}");
            assert_eq!(*event, expected);
        }
    }
}
