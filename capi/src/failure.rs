//! What a call came to, as C sees it. Plain values, any thread.

use std::{
    error::Error as _,
    ffi::{CStr, CString},
    fmt::Write,
};

use vfio_migration::{Error, ErrorKind, Refusal};

/// What a call came to: a value for each thing that a caller would do differently.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub enum Code {
    /// It succeeded.
    Ok = 0,
    /// The call or a setting is wrong: NULL, a number that is none, an order that cannot be, a second thread in
    /// one handle. Nothing was done; but a migration that is under way may have failed: see its functions.
    Misuse = 1,
    /// The peer broke the protocol.
    Protocol = 2,
    /// The input has ended, and a packet or a config is missing.
    Missing = 3,
    /// A connection failed, or its callback did.
    Channel = 4,
    /// The device refused a transfer or its config: `vfm_error_errno` says why.
    Device = 5,
    /// The device refused a change of its state, and was recovered: `vfm_error_states`, `vfm_error_errno`.
    State = 6,
    /// The device could not even be reset: it is lost.
    Lost = 7,
    /// A callback panicked. A callback in C cannot.
    Panicked = 8,
    /// Nothing has moved for the time that the settings allow.
    Stalled = 9,
    /// A driver keeps a transfer beyond the grace time. Its device does not come back and must not be touched.
    Stuck = 10,
    /// The spill file failed.
    Spill = 11,
    /// The host could not give memory, a thread, a file.
    Host = 12,
    /// The device, or the VM with it, cannot be migrated: `vfm_error_refusal`.
    Unmigratable = 13,
    /// The device has new initial data, and the switchover was already decided.
    LateRequest = 14,
    /// Somebody cancelled.
    Cancelled = 15,
    /// A mistake of the library's: it caught a panic of its own, say. Please report it.
    Internal = 16,
    /// An error that this version of the header has no name for.
    Other = 17,
}

/// Why a device, or a VM with it, cannot be migrated.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub enum RefusalCode {
    /// There is no refusal.
    None = 0,
    /// The VMM has switched migration off for the device.
    SwitchedOff = 1,
    /// The kernel has no migration for any such device.
    NoKernelSupport = 2,
    /// The device has no migration.
    NoDeviceSupport = 3,
    /// Nothing tracks the memory that the device writes to.
    NoDirtyTracking = 4,
    /// The device's addresses are a vIOMMU's.
    Viommu = 5,
    /// The VM has several devices, and one has no P2P state.
    SeveralWithoutP2p = 6,
    /// A reason that this version of the header has no name for.
    Other = 7,
}

impl From<Refusal> for RefusalCode {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::SwitchedOff => Self::SwitchedOff,
            Refusal::NoKernelSupport => Self::NoKernelSupport,
            Refusal::NoDeviceSupport => Self::NoDeviceSupport,
            Refusal::NoDirtyTracking => Self::NoDirtyTracking,
            Refusal::Viommu => Self::Viommu,
            Refusal::SeveralWithoutP2p => Self::SeveralWithoutP2p,
            _ => Self::Other,
        }
    }
}

pub(crate) fn code_of(error: &Error) -> Code {
    match error.kind() {
        ErrorKind::Misuse(_) => Code::Misuse,
        ErrorKind::Protocol(_) => Code::Protocol,
        ErrorKind::Missing => Code::Missing,
        ErrorKind::Channel => Code::Channel,
        ErrorKind::Device => Code::Device,
        ErrorKind::State => Code::State,
        ErrorKind::Lost => Code::Lost,
        ErrorKind::Panicked => Code::Panicked,
        ErrorKind::Stalled => Code::Stalled,
        ErrorKind::Stuck => Code::Stuck,
        ErrorKind::Spill => Code::Spill,
        ErrorKind::Host => Code::Host,
        ErrorKind::Unmigratable(_) => Code::Unmigratable,
        ErrorKind::LateRequest => Code::LateRequest,
        ErrorKind::Cancelled => Code::Cancelled,
        ErrorKind::Internal(_) => Code::Internal,
        _ => Code::Other,
    }
}

/// Why a call failed. Any number of threads may read one; its owner frees it with `vfm_error_free`.
#[derive(Debug)]
pub struct ErrorHandle {
    error: Error,
    text: CString,
    device: Option<CString>,
}

/// A text for C. What it cannot hold is left out.
pub(crate) fn c_text(text: &str) -> CString {
    CString::new(text.replace('\0', "")).unwrap_or_default()
}

impl ErrorHandle {
    pub(crate) fn new(error: Error) -> Self {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(source) = cause {
            let _infallible = write!(text, ": {source}");
            cause = source.source();
        }
        Self {
            text: c_text(&text),
            device: error.device().map(|id| c_text(id.idstr())),
            error,
        }
    }

    pub(crate) const fn error(&self) -> &Error {
        &self.error
    }

    pub(crate) fn text(&self) -> &CStr {
        &self.text
    }

    pub(crate) fn device(&self) -> Option<&CStr> {
        self.device.as_deref()
    }
}
