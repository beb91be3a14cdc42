//! What the engine tells of, from all its threads, in order.

use std::{
    fmt,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};

use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};
use vfio_migration::trace;

/// One event: its name, its device, and its other fields.
#[derive(Clone, Debug, Default)]
pub struct Told {
    pub name: &'static str,
    pub device: String,
    fields: Vec<(&'static str, String)>,
}

impl Told {
    /// A field's value; numbers for yes and no, as QEMU prints them.
    pub fn field(&self, name: &str) -> &str {
        let found = self.fields.iter().find(|(known, _)| *known == name);
        let (_, value) = found.unwrap_or_else(|| panic!("{self:?} has no {name}"));
        match value.as_str() {
            "true" => "1",
            "false" => "0",
            value => value,
        }
    }
}

impl Visit for Told {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let value = format!("{value:?}");
        match field.name() {
            "message" => {}
            "device" => self.device = value,
            name => self.fields.push((name, value)),
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}

/// The process's subscriber. One test at a time has it.
pub struct Recorder {
    told: &'static Mutex<Vec<Told>>,
    _alone: MutexGuard<'static, ()>,
}

impl Recorder {
    pub fn new() -> Self {
        static TOLD: OnceLock<Mutex<Vec<Told>>> = OnceLock::new();
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let told = TOLD.get_or_init(|| {
            tracing::subscriber::set_global_default(Hook(&TOLD)).unwrap();
            Mutex::default()
        });
        told.lock().unwrap().clear();
        Self {
            told,
            _alone: alone,
        }
    }

    /// Everything so far.
    pub fn told(&self) -> Vec<Told> {
        self.told.lock().unwrap().clone()
    }

    /// How often something was told.
    pub fn count(&self, name: &str) -> usize {
        let told = self.told.lock().unwrap();
        told.iter().filter(|told| told.name == name).count()
    }

    /// Waits until there is what `look` looks for. Ends with that; or, should it not come, with the time that a
    /// session allows without progress.
    pub fn wait(&self, what: &str, look: impl Fn(&[Told]) -> bool) {
        let since = Instant::now();
        while !look(&self.told()) {
            assert!(
                since.elapsed() < Duration::from_secs(20),
                "{what}: {:?}",
                self.told()
            );
            thread::sleep(Duration::from_millis(1));
        }
    }
}

struct Hook(&'static OnceLock<Mutex<Vec<Told>>>);

impl Subscriber for Hook {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == trace::TARGET
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut told = Told {
            name: event.metadata().name(),
            ..Told::default()
        };
        event.record(&mut told);
        if let Some(all) = self.0.get() {
            all.lock().unwrap().push(told);
        }
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}
