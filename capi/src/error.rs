//! Errors: a code, a text, and where it happened.

#![expect(unsafe_code, reason = "the functions' names are exported")]

use std::{
    ffi::{CStr, c_char, c_int},
    io,
    mem::MaybeUninit,
    ptr,
};

use vfio_migration::{Error, ErrorKind, Phase};

use crate::{
    border::{given, guard, hand_out, misuse, quiet, text},
    failure::{Code, ErrorHandle, RefusalCode, code_of},
};

/// Makes an error of the caller's own, for the `…_fail` functions: why a migration ends that nothing in here has
/// ended. `code` is one of VFM_CODE_CHANNEL, DEVICE, HOST, MISSING, STALLED and CANCELLED. Free it with
/// `vfm_error_free`; `…_fail` does not take it.
///
/// Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_error_new(
    code: u32,
    reason: *const c_char,
    made: Option<&mut MaybeUninit<*mut ErrorHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let made = given(made, "made: NULL")?;
        let reason = text(reason, "reason: NULL")?;
        let is = |known: Code| code == known as u32;
        let kind = match () {
            () if is(Code::Channel) => ErrorKind::Channel,
            () if is(Code::Device) => ErrorKind::Device,
            () if is(Code::Host) => ErrorKind::Host,
            () if is(Code::Missing) => ErrorKind::Missing,
            () if is(Code::Stalled) => ErrorKind::Stalled,
            () if is(Code::Cancelled) => ErrorKind::Cancelled,
            () => return Err(misuse("code: none that a caller may make")),
        };
        let cause = io::Error::other(reason.to_owned());
        let error = Error::new(kind, Phase::Section).caused_by(cause);
        hand_out(made, ErrorHandle::new(error));
        Ok(())
    })
}

/// Returns an error's code; VFM_CODE_OK for NULL. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_error_code(error: Option<&ErrorHandle>) -> Code {
    quiet(Code::Internal, || {
        error.map_or(Code::Ok, |error| code_of(error.error()))
    })
}

/// Returns what an error says, with its cause, in English, on one line. The text is the error's: it lives as long.
/// For NULL it says that all is well. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_error_text(error: Option<&ErrorHandle>) -> *const c_char {
    quiet(ptr::null(), || {
        error.map_or(c"success".as_ptr(), |error| error.text().as_ptr())
    })
}

/// Returns the errno behind an error, or 0. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_error_errno(error: Option<&ErrorHandle>) -> c_int {
    quiet(0, || {
        error
            .and_then(|error| error.error().raw_os_error())
            .unwrap_or(0)
    })
}

/// Returns where in the migration it happened: "setup", "receive", "load", "config", "save", "send", "section",
/// "state" or "cleanup". A constant text. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_error_phase(error: Option<&ErrorHandle>) -> *const c_char {
    quiet(c"".as_ptr(), || {
        let Some(error) = error else {
            return c"".as_ptr();
        };
        let phase: &'static CStr = match error.error().phase() {
            Phase::Setup => c"setup",
            Phase::Receive => c"receive",
            Phase::Load => c"load",
            Phase::Config => c"config",
            Phase::Save => c"save",
            Phase::Send => c"send",
            Phase::Section => c"section",
            Phase::State => c"state",
            Phase::Cleanup => c"cleanup",
            _ => c"",
        };
        phase.as_ptr()
    })
}

/// Returns the idstr of the device that failed, or NULL where the error is no device's; writes its instance id.
/// The text is the error's. `instance` may be NULL. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_error_device(
    error: Option<&ErrorHandle>,
    instance: Option<&mut MaybeUninit<u32>>,
) -> *const c_char {
    quiet(ptr::null(), || {
        let Some(error) = error else {
            return ptr::null();
        };
        if let (Some(instance), Some(id)) = (instance, error.error().device()) {
            instance.write(id.instance());
        }
        error.device().map_or(ptr::null(), CStr::as_ptr)
    })
}

/// Returns the channel that failed, in the order in which the channels were given, or -1. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_error_channel(error: Option<&ErrorHandle>) -> i64 {
    quiet(-1, || {
        error
            .and_then(|error| error.error().channel())
            .map_or(-1, i64::from)
    })
}

/// Returns the idx of the packet that failed, or is missing; or -1. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_error_index(error: Option<&ErrorHandle>) -> i64 {
    quiet(-1, || {
        error
            .and_then(|error| error.error().index())
            .map_or(-1, i64::from)
    })
}

/// Returns whether the error is a state change's, and writes its two states (`enum vfm_state`): the one before,
/// and the one that was asked for. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_error_states(
    error: Option<&ErrorHandle>,
    from: Option<&mut MaybeUninit<u32>>,
    to: Option<&mut MaybeUninit<u32>>,
) -> bool {
    quiet(false, || {
        let Some((old, new)) = error.and_then(|error| error.error().states()) else {
            return false;
        };
        for (out, state) in [(from, old), (to, new)] {
            if let Some(out) = out {
                out.write(state.into());
            }
        }
        true
    })
}

/// Returns why the device cannot be migrated, where that is the error. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_error_refusal(error: Option<&ErrorHandle>) -> RefusalCode {
    quiet(RefusalCode::Other, || {
        match error.map(|error| error.error().kind()) {
            Some(ErrorKind::Unmigratable(refusal)) => (*refusal).into(),
            _ => RefusalCode::None,
        }
    })
}

/// Frees an error. NULL is nothing. The owner's thread, when no other uses it.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_error_free(error: Option<Box<ErrorHandle>>) {
    quiet((), || drop(error));
}
