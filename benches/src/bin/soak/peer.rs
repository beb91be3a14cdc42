//! A migration with a process of its own on the other side, which may be killed at any moment.
//!
//! This process listens, the peer connects all its channels to it, whichever way the bytes go. Both
//! make their devices from the same plan, so digests need not be sent.

use std::{
    env, io,
    net::{SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use vfio_migration::{Channel, Error, LoadSession, SaveSession};

use crate::{
    plan::{Plan, Scene, Side},
    subject::{go, loading, never, saving},
    verify,
};

/// Which side the peer is.
fn peers(plan: &Plan) -> Side {
    match plan.scene {
        Scene::SourceKilled => Side::Save,
        Scene::DestinationKilled => Side::Load,
        _ => plan.victim,
    }
}

/// Runs the migration with a peer. Returns whether this side succeeded.
pub fn run(plan: &Plan) -> Result<bool, String> {
    let text = |error: io::Error| error.to_string();
    let listener = TcpListener::bind(("127.0.0.1", 0)).map_err(text)?;
    let address = listener.local_addr().map_err(text)?;
    let mut peer = Command::new(env::current_exe().map_err(text)?)
        .args(["--peer", &address.to_string()])
        .args(["--seed", &plan.seed.to_string()])
        .stdout(Stdio::null())
        .spawn()
        .map_err(text)?;
    let result = with(plan, &listener, &mut peer);
    let _dead = peer.kill();
    let _status = peer.wait();
    result
}

fn with(plan: &Plan, listener: &TcpListener, peer: &mut Child) -> Result<bool, String> {
    let text = |error: io::Error| error.to_string();
    let kills = plan.scene != Scene::TwoProcesses;
    let channels = accept(plan, listener).map_err(text)?;
    let ours = match peers(plan) {
        Side::Save => Side::Load,
        Side::Load => Side::Save,
    };
    let success = thread::scope(|scope| {
        if kills {
            scope.spawn(|| {
                thread::sleep(plan.after);
                let _gone = peer.kill();
            });
        }
        match ours {
            Side::Load => {
                let (load, loaded) = loading(plan, channels)?;
                let load = load.start().map_err(Error::from);
                go(plan, &load);
                let ended = Some(load.map(LoadSession::join));
                let success = verify::side(Side::Load, &loaded, ended)?;
                let unsent = saving(plan, Vec::new())?.1;
                for (source, destination) in unsent.iter().zip(&loaded) {
                    verify::whole_or_not(source.before, destination)?;
                    if success {
                        let config = source.handle.config_digest();
                        verify::loaded_from(source.before, config, destination)?;
                    }
                }
                Ok::<_, String>(success)
            }
            Side::Save => {
                let (save, saved) = saving(plan, channels)?;
                let ended = Some(save.start().map_err(Error::from).map(SaveSession::join));
                verify::side(Side::Save, &saved, ended)
            }
        }
    })?;
    if kills {
        return Ok(success);
    }
    let status = peer.wait().map_err(text)?;
    if success && status.success() {
        Ok(true)
    } else {
        Err(format!(
            "nothing went wrong, and it failed: {success}, {status}"
        ))
    }
}

fn accept(plan: &Plan, listener: &TcpListener) -> io::Result<Vec<Channel>> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + Duration::from_secs(120);
    let mut channels = Vec::new();
    while channels.len() < plan.channels {
        match listener.accept() {
            Ok((socket, _)) => {
                socket.set_nonblocking(false)?;
                channels.push(socket.into());
            }
            Err(error)
                if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline =>
            {
                thread::sleep(Duration::from_micros(200));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(channels)
}

/// The peer's own work.
pub fn serve(plan: &Plan, address: SocketAddr) -> ExitCode {
    let connect = || -> io::Result<Vec<Channel>> {
        (0..plan.channels)
            .map(|_| Ok(TcpStream::connect(address)?.into()))
            .collect()
    };
    let ended = connect()
        .map_err(|error| error.to_string())
        .and_then(|channels| match peers(plan) {
            Side::Save => {
                let (save, saved) = saving(plan, channels)?;
                let ended = save.start().map_err(Error::from).map(SaveSession::join);
                verify::side(Side::Save, &saved, Some(ended.or_else(|_| never())))
            }
            Side::Load => {
                let (load, loaded) = loading(plan, channels)?;
                let load = load.start().map_err(Error::from);
                go(plan, &load);
                let ended = load.map(LoadSession::join);
                verify::side(Side::Load, &loaded, Some(ended.or_else(|_| never())))
            }
        });
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}
