//! One migration, in this process or with a peer.

use std::thread;

use vfio_migration::{Channel, Error, LoadSession, SaveSession};

use crate::{
    lifecycle,
    path::{Path, channels},
    peer,
    plan::{Plan, Scene, Side, Way},
    processes, push_api,
    subject::{go, loading, saving},
    verify,
};

/// Runs it. Returns whether it succeeded, as judged; an error says which promise was broken.
pub fn run(plan: &Plan) -> Result<bool, String> {
    if plan.scene.has_peer() {
        return peer::run(plan);
    }
    match &plan.way {
        Way::Direct => {
            let (near, far) = channels(plan).map_err(|error| error.to_string())?;
            sessions(plan, near, far)
        }
        Way::Shared { .. } | Way::Relayed => {
            let (between, near, far) = Path::new(plan)?;
            let success = sessions(plan, near, far)?;
            between.end(plan, success)?;
            Ok(success)
        }
        Way::Pushed => push_api::run(plan),
        Way::Whole(cycle) => lifecycle::run(plan, cycle),
        Way::Processes(cast) => processes::run(plan, cast),
    }
}

/// A save and a load, with these connections.
fn sessions(plan: &Plan, near: Vec<Channel>, far: Vec<Channel>) -> Result<bool, String> {
    let (save, saved) = saving(plan, near)?;
    let (load, loaded) = loading(plan, far)?;
    let (save, load) = match (plan.scene, plan.victim) {
        (Scene::Drop, Side::Save) => {
            let load = load.start().map_err(Error::from);
            go(plan, &load);
            let save = save.start().map_err(Error::from);
            thread::sleep(plan.after);
            drop(save);
            (None, Some(load.map(LoadSession::join)))
        }
        (Scene::Drop, Side::Load) => {
            let load = load.start().map_err(Error::from);
            go(plan, &load);
            let save = save.start().map_err(Error::from);
            thread::sleep(plan.after);
            drop(load);
            (Some(save.map(SaveSession::join)), None)
        }
        (scene, victim) => match load.start().map_err(Error::from) {
            Err(error) => {
                // Its channels went with it.
                let save = save.start().map_err(Error::from).map(SaveSession::join);
                (Some(save), Some(Err(error)))
            }
            Ok(load) => {
                let load = Ok(load);
                go(plan, &load);
                let save = save.start().map_err(Error::from);
                if scene == Scene::Cancel {
                    thread::sleep(plan.after);
                    match (&save, &load, victim) {
                        (Ok(save), _, Side::Save) => save.cancel(),
                        (_, Ok(load), Side::Load) => load.cancel(),
                        _ => {}
                    }
                }
                let save = save.map(SaveSession::join);
                (Some(save), Some(load.map(LoadSession::join)))
            }
        },
    };
    verify::both(plan, &saved, &loaded, save, load)
}
