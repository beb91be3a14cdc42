//! Every trace event comes in a migration that does everything, with its device.
#![cfg(feature = "sim")]
#![allow(missing_docs, reason = "a test")]

mod common;
mod vm;

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use common::Watchdog;
use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};
use vfio_migration::{
    DeviceId, TRACE_TARGET,
    migration::{Ack, Admission, DeviceSettings, Incoming, OnOffAuto, Surroundings, vm as state},
    sim::{SimConfig, SimDevice},
};
use vm::{Setup, migrate};

/// The names of the events that named a device.
#[derive(Clone, Default)]
struct Names(Arc<Mutex<BTreeSet<&'static str>>>);

impl Names {
    fn has(&self, name: &str) -> bool {
        self.0.lock().unwrap().contains(name)
    }
}

#[derive(Default)]
struct HasDevice(bool);

impl Visit for HasDevice {
    fn record_debug(&mut self, field: &Field, _value: &dyn std::fmt::Debug) {
        self.0 |= field.name() == "device";
    }
}

impl Subscriber for Names {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == TRACE_TARGET
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut device = HasDevice::default();
        event.record(&mut device);
        if device.0 {
            self.0.lock().unwrap().insert(event.metadata().name());
        }
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

const EVENTS: &[&str] = &[
    "load_bufs_thread_end",
    "load_bufs_thread_start",
    "load_cleanup",
    "load_device_config_state_end",
    "load_device_config_state_start",
    "load_setup",
    "load_state",
    "load_state_device_buffer_end",
    "load_state_device_buffer_incoming",
    "load_state_device_buffer_load_end",
    "load_state_device_buffer_load_start",
    "load_state_device_buffer_start",
    "load_state_device_buffer_starved",
    "load_state_device_data",
    "migration_init",
    "migration_realize",
    "migration_set_device_state",
    "migration_set_state",
    "migration_state_notifier",
    "query_precopy_size",
    "query_stop_copy_size",
    "save_block",
    "save_block_precopy_empty_hit",
    "save_cleanup",
    "save_complete_precopy",
    "save_complete_precopy_start",
    "save_complete_precopy_thread_end",
    "save_complete_precopy_thread_start",
    "save_device_config_state",
    "save_iterate",
    "save_iterate_start",
    "save_setup",
    "send_init_data_flag",
    "state_pending",
    "state_pending_estimate",
    "state_pending_exact",
    "vmstate_change",
    "vmstate_change_prepare",
];

#[test]
fn every_event_comes_with_its_device() {
    let _watchdog = Watchdog::new();
    let names = Names::default();
    tracing::subscriber::set_global_default(names.clone()).unwrap();

    let mut around = Surroundings::default();
    around.device_dirty_tracking = true;
    let _realized = Admission::default()
        .realize(
            DeviceId::new("vfio", 0).unwrap(),
            Box::new(SimDevice::new(SimConfig::default()).unwrap()),
            &DeviceSettings::default(),
            around,
            &mut |_, _| Ok(()),
        )
        .unwrap();
    for transfer in [OnOffAuto::On, OnOffAuto::Off] {
        let ended = migrate(&Setup {
            transfer,
            ack: Ack::Once,
            len: 8 << 20,
            ..Setup::default()
        });
        ended.check();
    }
    let ended = migrate(&Setup {
        precopy_initial: 0,
        ack: Ack::Once,
        ..Setup::default()
    });
    ended.check();
    // A load that waits for what never comes, and is given up.
    let setup = Setup::default();
    let (realized, _) = setup.realize(1, setup.config(1));
    let session = vfio_migration::LoadSession::builder();
    let incoming =
        Incoming::setup(vec![realized], &setup.terms(), session, Box::new(|| Ok(()))).unwrap();
    incoming.switchover_start().unwrap();
    // Ends with the driver's next round.
    while !names.has("load_state_device_buffer_starved") {
        thread::sleep(Duration::from_millis(1));
    }
    let mut back = incoming.abort();
    state::stop(&mut back, state::Reason::Other).unwrap();

    let seen = names.0.lock().unwrap().clone();
    let missing: Vec<_> = EVENTS.iter().filter(|name| !seen.contains(*name)).collect();
    assert!(missing.is_empty(), "{missing:?} of {seen:?}");
}
