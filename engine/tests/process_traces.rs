//! Every trace event comes in a migration that does everything, with its device.
//!
//! Alone in its process, whose subscriber it is.
#![cfg(feature = "sim")]
#![allow(missing_docs, reason = "a test")]

#[path = "support/mock.rs"]
mod mock;
#[path = "support/names.rs"]
mod names;
#[path = "support/vm.rs"]
mod vm;
#[path = "support/watchdog.rs"]
mod watchdog;

use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};
use vfio_migration::{
    DeviceId, DeviceState,
    migration::{
        DeviceSettings, Incoming, MigrationBlockers, OnOffAuto, PlatformSupport, SwitchoverAck,
        vm as state,
    },
    sim::{SimConfig, SimDevice},
    trace,
};

use crate::{
    mock::Mock,
    vm::{Setup, migrate},
    watchdog::Watchdog,
};

/// The names of the events that named a device, and what they said had been returned.
#[derive(Clone, Default)]
struct Names(
    Arc<Mutex<BTreeSet<&'static str>>>,
    Arc<Mutex<BTreeSet<(&'static str, i64)>>>,
);

impl Names {
    fn has(&self, name: &str) -> bool {
        self.0.lock().unwrap().contains(name)
    }
}

#[derive(Default)]
struct Fields {
    device: bool,
    ret: Option<i64>,
}

impl Visit for Fields {
    fn record_i64(&mut self, field: &Field, value: i64) {
        if field.name() == "ret" {
            self.ret = Some(value);
        }
    }

    fn record_debug(&mut self, field: &Field, _value: &dyn std::fmt::Debug) {
        self.device |= field.name() == "device";
    }
}

impl Subscriber for Names {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == trace::TARGET
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let name = event.metadata().name();
        if fields.device {
            self.0.lock().unwrap().insert(name);
        }
        if let Some(ret) = fields.ret {
            self.1.lock().unwrap().insert((name, ret));
        }
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// The module that has all events: one function each.
const SOURCE: &str = include_str!("../src/trace.rs");

/// The names of all events, as that module has them.
fn events() -> BTreeSet<&'static str> {
    let (source, _tests) = SOURCE.split_once("#[cfg(").expect("its tests come last");
    let name = |call: &'static str| {
        let (level, rest) = call.split_once(',')?;
        let levels = ["TRACE", "DEBUG", "INFO", "WARN", "ERROR"];
        levels.contains(&level.trim()).then_some(())?;
        rest.trim_start().strip_prefix('"')?.split('"').next()
    };
    let names: Vec<_> = source.split("event!(").skip(1).filter_map(name).collect();
    let functions = source.matches("pub(crate) fn ").count();
    assert_eq!(names.len(), functions, "one event for each function");
    let events: BTreeSet<_> = names.iter().copied().collect();
    assert_eq!(events.len(), names.len(), "one function for each event");
    events
}

#[test]
fn every_event_comes_with_its_device() {
    let _watchdog = Watchdog::new();
    let names = Names::default();
    tracing::subscriber::set_global_default(names.clone()).unwrap();

    let mut around = PlatformSupport::default();
    around.device_dirty_tracking = true;
    // As by itself, and as told to although nothing tracks what it writes.
    let mut told = DeviceSettings::default();
    told.enable = OnOffAuto::On;
    let mut untracked = PlatformSupport::default();
    untracked.device_dirty_tracking = false;
    untracked.iommu_dirty_tracking = false;
    for (settings, around) in [(DeviceSettings::default(), around), (told, untracked)] {
        let _admitted = MigrationBlockers::default()
            .admit(
                DeviceId::new("vfio", 0).unwrap(),
                Box::new(SimDevice::new(SimConfig::default()).unwrap()),
                &settings,
                around,
                &mut |_, _| Ok(()),
            )
            .unwrap();
    }
    // A device that refuses to recover, too.
    let mut refuses = Mock::new(io::pipe().unwrap().0);
    refuses.set = Some(Box::new(|_| Err(io::ErrorKind::Other.into())));
    let refused = refuses
        .device(1)
        .set_state(DeviceState::StopCopy, DeviceState::Stop);
    refused.unwrap_err();
    for transfer in [OnOffAuto::On, OnOffAuto::Off] {
        let ended = migrate(&Setup {
            transfer,
            ack: SwitchoverAck::Once,
            len: 8 << 20,
            ..Setup::default()
        });
        ended.check();
    }
    let ended = migrate(&Setup {
        precopy_initial: 0,
        ack: SwitchoverAck::Once,
        ..Setup::default()
    });
    ended.check();
    // 1 for success, as QEMU's has; the other's is an errno's place.
    let returned = names.1.lock().unwrap().clone();
    assert!(returned.contains(&("save_complete_precopy", 0)));
    let of_threads = returned
        .iter()
        .filter(|(name, _)| *name == "save_complete_precopy_thread_end");
    assert!(of_threads.eq(&[("save_complete_precopy_thread_end", 1)]));
    // A load that waits for what never comes, and is given up.
    let setup = Setup::default();
    let (migratable, _) = setup.admit(1, setup.config(1));
    let session = vfio_migration::LoadSession::builder();
    let incoming = Incoming::setup(
        vec![migratable],
        &setup.capabilities(),
        session,
        Box::new(|| Ok(())),
    )
    .unwrap();
    incoming.switchover_start().unwrap();
    // Ends with the I/O thread's next round.
    while !names.has("load_state_device_buffer_starved") {
        thread::sleep(Duration::from_millis(1));
    }
    let mut back = incoming.abort();
    state::stop(&mut back, state::Reason::Other).unwrap();

    let seen = names.0.lock().unwrap().clone();
    assert_eq!(seen, events());
}
