//! Chooses a ring, and makes it with one call.
//!
//! ```text
//!   Uring ────────────────────────────▶ KernelRing
//!                ▲
//!   Auto ────────┤ this host forbids or lacks io_uring
//!                ▼
//!   Blocking ─────────────────────────▶ BlockingRing
//! ```
//!
//! Called once per ring, from any thread; nothing here waits.

use std::{error, fmt, io, str::FromStr, time::Duration};

use crate::{Buffer, Ring, SpawnWorker, Waker, blocking::BlockingRing, kernel::KernelRing};

/// Which ring.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
pub enum Backend {
    /// The kernel's, or else the blocking one.
    #[default]
    Auto,
    /// The kernel's: [`KernelRing`].
    Uring,
    /// Plain system calls on threads of its own: [`BlockingRing`].
    Blocking,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Auto => "auto",
            Self::Uring => "uring",
            Self::Blocking => "blocking",
        })
    }
}

impl FromStr for Backend {
    type Err = UnknownBackend;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "auto" => Ok(Self::Auto),
            "uring" => Ok(Self::Uring),
            "blocking" => Ok(Self::Blocking),
            _ => Err(UnknownBackend),
        }
    }
}

/// A name that is not a [`Backend`]'s.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct UnknownBackend;

impl fmt::Display for UnknownBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a backend: expected auto, uring or blocking")
    }
}

impl error::Error for UnknownBackend {}

/// Makes a ring for `capacity` operations, woken by `waker`, that waits for `grace` at most when
/// it is dropped. Tells which ring it is: never [`Backend::Auto`].
///
/// [`Backend::Auto`] falls back to the blocking ring where io_uring is absent, forbidden, too old
/// or not affordable (`ENOSYS`, `EPERM`, `EACCES`, `EINVAL`, `ENOMEM`, a missing operation), and
/// nowhere else: a process that is out of file descriptors should hear of it.
///
/// # Errors
///
/// `InvalidInput` for a capacity of 0 or beyond [`MAX_CAPACITY`](crate::MAX_CAPACITY); otherwise what the kernel says.
pub fn open<B: Buffer>(
    backend: Backend,
    capacity: usize,
    waker: Waker,
    grace: Duration,
) -> io::Result<(Box<dyn Ring<B>>, Backend)> {
    open_with(backend, capacity, waker, grace, None)
}

/// As [`open`]; if this is the blocking ring, `spawn` puts its workers on threads.
///
/// # Errors
///
/// As for [`open`].
pub fn open_with<B: Buffer>(
    backend: Backend,
    capacity: usize,
    waker: Waker,
    grace: Duration,
    spawn: Option<SpawnWorker>,
) -> io::Result<(Box<dyn Ring<B>>, Backend)> {
    if backend != Backend::Blocking {
        match KernelRing::new(capacity, waker.clone(), grace) {
            Ok(ring) => return Ok((Box::new(ring), Backend::Uring)),
            Err(error) if backend == Backend::Auto && is_unavailable(&error) => {}
            Err(error) => return Err(error),
        }
    }
    let mut ring = BlockingRing::new(capacity, waker, grace)?;
    if let Some(spawn) = spawn {
        ring = ring.spawn_with(spawn);
    }
    Ok((Box::new(ring), Backend::Blocking))
}

/// Whether io_uring cannot be had here, whatever this process does.
fn is_unavailable(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Unsupported
        || matches!(
            error.raw_os_error(),
            Some(libc::ENOSYS | libc::EPERM | libc::EACCES | libc::EINVAL | libc::ENOMEM)
        )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::check_capacity;

    #[test]
    fn a_backend_is_its_name() {
        for backend in [Backend::Auto, Backend::Uring, Backend::Blocking] {
            assert_eq!(backend.to_string().parse(), Ok(backend));
        }
        assert_eq!("sqpoll".parse::<Backend>(), Err(UnknownBackend));
    }

    #[test]
    fn auto_falls_back_only_where_io_uring_cannot_be_had() {
        for errno in [
            libc::ENOSYS,
            libc::EPERM,
            libc::EACCES,
            libc::EINVAL,
            libc::ENOMEM,
            libc::EOPNOTSUPP,
        ] {
            assert!(is_unavailable(&io::Error::from_raw_os_error(errno)));
        }
        assert!(!is_unavailable(&io::Error::from_raw_os_error(libc::EMFILE)));
        assert!(!is_unavailable(&check_capacity(0).unwrap_err()));
    }
}
