//! A migration through the whole life cycle: set-up, PRE_COPY, the switchover, both sides' ends.
//!
//! This thread is both VMMs' migration thread: it writes each section of the main channel into memory
//! and has the destination read it at once. The sessions' threads move what goes over the channels.
//! Whatever fails, here or there, the first error ends it, and both sides are put back.

use std::{
    thread,
    time::{Duration, Instant},
};

use vfio_migration::{
    Channel, DeviceId, DeviceState, Error, LoadBuilder, LoadSession, Phase, SaveSession,
    SourceChannels,
    migration::{
        DeviceSettings, Incoming, Loaded, MigratableDevice, OnOffAuto, Outgoing, OutgoingDevice,
        Saved, SwitchoverAcks, vm,
    },
};

use crate::{
    path::channels,
    plan::{Cycle, Plan, RingKind, Scene, Side, id},
    subject::{self, PUT_BACK, Subject, with_backend},
    verify,
};

/// Runs it. Returns whether it succeeded, as judged.
pub fn run(plan: &Plan, cycle: &Cycle) -> Result<bool, String> {
    let (mut here, mut there) = (Vec::new(), Vec::new());
    let (mut saved, mut loaded) = (Vec::new(), Vec::new());
    for (at, (source, destination)) in plan.devices.iter().enumerate() {
        for (config, devices, looked) in [
            (source, &mut here, &mut saved),
            (destination, &mut there, &mut loaded),
        ] {
            let (device, look) = subject::device(at, config)?;
            let Some(device) = device else {
                return Ok(false);
            };
            let (main, waits) = cycle.devices[at];
            let mut settings = DeviceSettings::default();
            settings.buffer_len = plan.save.data_len;
            settings.config_after_iterables = waits;
            if main {
                settings.transfer = OnOffAuto::Off;
            }
            devices.push(MigratableDevice::new(device, settings));
            looked.push(look);
        }
    }
    let migration = Migration {
        plan,
        cycle,
        began: Instant::now(),
    };
    let (near, far) = channels(plan).map_err(|error| error.to_string())?;
    let ended = migration
        .run(here, there, near, far)
        .and_then(|(gone, come)| start(&saved, &loaded, gone, come));
    let ended = ended.map_err(|error| verify::clear(&error).map(|()| error));
    for (source, destination) in saved.iter().zip(&loaded) {
        verify::check(
            source.handle.digest() == source.before,
            "a source has changed",
        )?;
        verify::whole_or_not(source.before, destination)?;
    }
    match ended {
        Ok(compared) => compared.map(|()| true),
        Err(unclear) => {
            let error = unclear?;
            verify::check(
                !plan.scene.must_succeed(),
                &format!("nothing went wrong, and it failed: {error:?}"),
            )?;
            if plan.scene != Scene::DeviceFault {
                for look in saved.iter().chain(&loaded) {
                    let state = look.handle.state();
                    // A destination may have been done when its source failed: it was stopped then.
                    let stopped = state == DeviceState::Stop;
                    verify::check(
                        state == PUT_BACK || stopped,
                        &format!("in {state} after {error:?}"),
                    )?;
                }
            }
            Ok(false)
        }
    }
}

/// The VM's start on the destination, and the source's end. What was not as it must be is within.
fn start(
    saved: &[Subject],
    loaded: &[Subject],
    gone: Saved,
    mut come: Loaded,
) -> Result<Result<(), String>, Error> {
    vm::start(come.devices_mut())?;
    for (source, destination) in saved.iter().zip(loaded) {
        let config = source.handle.config_digest();
        if let Err(why) = verify::holds(source.before, config, destination) {
            return Ok(Err(why));
        }
    }
    verify::spilled(&come.stats());
    let _running = come.join()?;
    let _stopped = gone.cleanup()?;
    let in_state = |all: &[Subject], state| all.iter().all(|look| look.handle.state() == state);
    Ok(
        verify::check(in_state(loaded, DeviceState::Running), "not RUNNING there")
            .and_then(|()| verify::check(in_state(saved, DeviceState::Stop), "not in STOP here")),
    )
}

/// Has the destination read a section's body.
fn read(incoming: &Incoming, owner: &DeviceId, body: &[u8]) -> Result<(), Error> {
    let _piece = incoming.device(owner)?.load_state(&mut &*body)?;
    Ok(())
}

struct Migration<'a> {
    plan: &'a Plan,
    cycle: &'a Cycle,
    began: Instant,
}

impl Migration<'_> {
    /// Cancels, when it is time for that.
    fn look(&self, incoming: &Incoming) -> Result<(), Error> {
        if self.plan.scene == Scene::Cancel && self.began.elapsed() >= self.plan.after {
            if self.plan.victim == Side::Load {
                incoming.cancel();
            }
            return Err(Error::cancelled(Phase::Save));
        }
        Ok(())
    }

    fn run(
        &self,
        here: Vec<MigratableDevice>,
        there: Vec<MigratableDevice>,
        near: Vec<Channel>,
        far: Vec<Channel>,
    ) -> Result<(Saved, Loaded), Error> {
        let (plan, capabilities) = (self.plan, self.cycle.capabilities());
        let acks = SwitchoverAcks::new(self.cycle.ack);
        let approve = {
            let acks = acks.clone();
            Box::new(move || {
                acks.received();
                Ok(())
            })
        };
        let mut load = LoadSession::builder().settings(with_backend(&plan.load, &plan.load_ring));
        let mut save = SaveSession::builder().settings(with_backend(&plan.save, &plan.save_ring));
        if let RingKind::Simulated(ring) = &plan.load_ring {
            load = load.simulated_ring(ring.clone());
        }
        if let RingKind::Simulated(ring) = &plan.save_ring {
            save = save.simulated_ring(ring.clone());
        }
        let load = far.into_iter().fold(load, LoadBuilder::channel);
        let incoming = Incoming::setup(there, &capabilities, load, approve)?;
        // Where no device uses the channels the destination has none.
        let used = self.cycle.devices.iter().any(|(main, _)| !main);
        let mut channels = used
            .then(|| SourceChannels::greet(near, &plan.save))
            .transpose()?;
        let mut sources = Vec::new();
        for device in here {
            let mut body = Vec::new();
            let source = OutgoingDevice::setup(device, &capabilities, &acks, &mut body)?;
            read(&incoming, source.id(), &body)?;
            sources.push(source);
        }
        // Ends: what is read lowers the estimates, and acks are approved as they are asked for.
        loop {
            for source in sources.iter_mut().filter(|source| source.is_active()) {
                self.look(&incoming)?;
                let mut body = Vec::new();
                match &mut channels {
                    Some(channels) => source.iterate_over(channels, &mut body)?,
                    None => source.iterate(&mut body)?,
                };
                read(&incoming, source.id(), &body)?;
            }
            let mut all = sources.iter();
            if all.all(|it| it.pending_estimate().precopy() == 0 && it.is_switchover_ready()) {
                break;
            }
        }
        let mut save = match channels {
            Some(channels) => save.greeted_channels(channels),
            None => save,
        };
        Outgoing::prepare(&sources, &mut save)?;
        vm::stop(&mut sources, vm::Reason::FinishMigration)?;
        let mut outgoing = Outgoing::begin(sources, save)?;
        incoming.switchover_start()?;
        for at in 0..plan.devices.len() {
            let mut body = Vec::new();
            outgoing.write_state(&id(at), &mut body)?;
            read(&incoming, &id(at), &body)?;
        }
        for at in 0..plan.devices.len() {
            let mut body = Vec::new();
            outgoing.write_config(&id(at), &mut body)?;
            read(&incoming, &id(at), &body)?;
        }
        // Ends: each side ends by itself, or with the other.
        while !(outgoing.is_finished() && incoming.is_finished()) {
            self.look(&incoming)?;
            if outgoing.failure().is_some() || incoming.failure().is_some() {
                break;
            }
            thread::sleep(Duration::from_micros(500));
        }
        let saved = outgoing.finish();
        match (saved, incoming.finish()) {
            (Ok(saved), Ok(loaded)) => Ok((saved, loaded)),
            (Ok(saved), Err(failed)) => {
                let _running = saved.abort();
                Err(failed.error)
            }
            (Err(failed), _) => Err(failed.error),
        }
    }
}
