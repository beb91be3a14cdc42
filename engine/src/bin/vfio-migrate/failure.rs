//! How a command reports a failure: by its exit status, by one line on stderr, and with `--json` by one object
//! on stdout in place of the result.
//!
//! ```text
//!   { "version", "command",
//!     "error": { "message":  the line on stderr, without the command's name
//!                "chain":    its parts, from what was tried to what caused it
//!                "status":   the exit status
//!                "kind":     usage, interrupted, or the engine's: protocol, device, stalled, …
//!                "phase":    where in the migration: setup, receive, load, section, …
//!                "device":   { "idstr", "instance" }
//!                "channel", "idx", "errno" } }
//! ```
//!
//! The fields from `kind` on are there only if they are known. A demo whose states differ, and an inspection
//! that ends at a damaged packet, have `error` beside their result.
//!
//! The line is written before the object, so it is not lost if nobody reads stdout. Any thread may report the
//! failure; only the first report counts.

use std::{fmt, io, os::fd::AsFd, time::Duration};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use serde::Serialize;
use vfio_migration::{DeviceId, Error, ErrorKind, Phase};

use crate::{
    Interrupted, Usage, interrupt, json,
    output::{self, one_line},
    stderr,
};

/// An error about a device that no error of the engine's names.
#[derive(Debug)]
pub(crate) struct About {
    pub(crate) device: DeviceId,
    pub(crate) what: String,
}

impl fmt::Display for About {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for About {}

/// An error, and what was heard of it besides.
#[derive(Debug)]
pub(crate) struct Both {
    pub(crate) first: anyhow::Error,
    pub(crate) besides: String,
}

impl fmt::Display for Both {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}; {}", self.first, self.besides)
    }
}

impl std::error::Error for Both {}

/// The first error of a type, of all that an error was made of.
fn find<T: std::error::Error + Send + Sync + 'static>(error: &anyhow::Error) -> Option<&T> {
    error.chain().find_map(|cause| {
        cause
            .downcast_ref()
            .or_else(|| find(&cause.downcast_ref::<Both>()?.first))
    })
}

/// Whether it was the user's arguments that were wrong, in the engine's eyes or the command's.
fn is_usage(error: &anyhow::Error) -> bool {
    let engine = find(error).is_some_and(|error: &Error| {
        error.phase() == Phase::Setup && matches!(error.kind(), ErrorKind::Misuse(_))
    });
    engine || find::<Usage>(error).is_some()
}

/// The exit status.
pub(crate) fn status(error: &anyhow::Error) -> u8 {
    if is_usage(error) {
        2
    } else if error.downcast_ref::<Interrupted>().is_some() {
        interrupt::STATUS
    } else {
        1
    }
}

/// A variant's name as JSON has it: `LateRequest { .. }` is `late_request`.
fn snake_case(debug: &str) -> String {
    let mut text = String::new();
    for char in debug.chars().take_while(char::is_ascii_alphanumeric) {
        if char.is_ascii_uppercase() && !text.is_empty() {
            text.push('_');
        }
        text.push(char.to_ascii_lowercase());
    }
    text
}

#[derive(Debug, Serialize)]
struct Device {
    idstr: String,
    instance: u32,
}

/// What the object says.
#[derive(Debug, Serialize)]
pub(crate) struct Failure {
    message: String,
    chain: Vec<String>,
    status: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    phase: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<Device>,
    #[serde(skip_serializing_if = "Option::is_none")]
    channel: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    idx: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    errno: Option<i32>,
}

impl Failure {
    pub(crate) fn new(error: &anyhow::Error) -> Self {
        let status = status(error);
        let engine = find::<Error>(error);
        let device = engine.and_then(Error::device);
        let device = device.or_else(|| find(error).map(|about: &About| &about.device));
        let errno = engine
            .and_then(Error::raw_os_error)
            .or_else(|| find::<io::Error>(error)?.raw_os_error())
            .or_else(|| find::<Errno>(error).map(|errno| *errno as i32));
        Self {
            message: one_line(&format!("{error:#}")),
            chain: error.chain().map(|it| one_line(&it.to_string())).collect(),
            status,
            kind: match status {
                2 => Some("usage".into()),
                interrupt::STATUS => Some("interrupted".into()),
                _ => engine.map(|error| snake_case(&format!("{:?}", error.kind()))),
            },
            phase: engine.map(|error| error.phase().to_string()),
            device: device.map(|id| Device {
                idstr: id.idstr().to_owned(),
                instance: id.instance(),
            }),
            channel: engine.and_then(Error::channel),
            idx: engine.and_then(Error::index),
            errno,
        }
    }

    fn object(self) -> anyhow::Result<String> {
        #[derive(Serialize)]
        struct Object {
            error: Failure,
        }
        json::text(&Object { error: self })
    }
}

/// Prints why the command has failed, where an object is still wanted. The line is written already.
pub(crate) fn print(error: &anyhow::Error) {
    if json::take()
        && let Ok(text) = Failure::new(error).object()
    {
        // Where stdout is gone there is still the status.
        let _lost = output::print_raw(&text);
    }
}

/// Says that the command was interrupted, by a thread that waits for nobody: neither for whoever holds stdout
/// now nor for whoever should read it, and for whoever reads stderr no longer than `patience`.
pub(crate) fn tell_interrupted_at_once(patience: Duration) {
    output::say("interrupted");
    stderr::finish(patience);
    let stdout = io::stdout();
    if json::take()
        && let Ok(text) = Failure::new(&anyhow::anyhow!(Interrupted)).object()
    {
        let mut fds = [PollFd::new(stdout.as_fd(), PollFlags::POLLOUT)];
        // A pipe that is writable takes this much at once.
        if poll(&mut fds, PollTimeout::ZERO) == Ok(1) {
            let _lost = nix::unistd::write(stdout.as_fd(), text.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::*;

    #[test]
    fn what_is_known_of_an_error_is_in_its_object() {
        let id = DeviceId::new("0000:00:03.0/vfio", 7).expect("a good name");
        let engine = Error::new(ErrorKind::LateRequest, Phase::Load)
            .on_device(&id)
            .on_channel(3)
            .at_index(5)
            .caused_by(io::Error::from(Errno::ENOSPC));
        let error = Err::<(), _>(engine.clone()).context("destination");
        let besides = "the source has failed: it has".to_owned();
        let both = anyhow!(Both {
            first: anyhow!(engine),
            besides
        });
        for error in [error.expect_err("it is one"), both] {
            let text = Failure::new(&error).object().expect("JSON");
            let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
            let json = &json["error"];
            assert_eq!(json["message"], format!("{error:#}"));
            assert_eq!(json["status"], 1);
            assert_eq!(json["kind"], "late_request");
            assert_eq!(json["phase"], "load");
            assert_eq!(json["device"]["idstr"], id.idstr());
            assert_eq!(json["device"]["instance"], 7);
            assert_eq!(json["channel"], 3);
            assert_eq!(json["idx"], 5);
            assert_eq!(json["errno"], Errno::ENOSPC as i32);
        }
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        let error = anyhow!("neither \u{202e} here").context("nor \n there");
        let text = Failure::new(&error).object().expect("JSON");
        let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let expected = serde_json::json!({ "version": 1, "error": {
            "message": "nor   there: neither   here",
            "chain": ["nor   there", "neither   here"],
            "status": 1,
        } });
        assert_eq!(json, expected);
    }
}
