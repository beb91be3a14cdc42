//! What every exported function passes through: no panic gets out, no NULL gets in.
//!
//! One of the two modules in which there is `unsafe`: C's pointers to text and bytes, its file descriptors, and
//! a lease that lives beside its publisher. The other one is `callbacks`. Each block rests on what the header
//! asks of its caller, and says on what.

#![expect(unsafe_code, reason = "what C hands over")]

use std::{
    any::Any,
    ffi::{CStr, c_char, c_int, c_void},
    io,
    mem::{self, MaybeUninit},
    os::fd::{BorrowedFd, FromRawFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    slice,
    sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use vfio_migration::{Error, ErrorKind, PacketLease, Phase, Publisher, Result, wire::PacketHeader};

use crate::failure::{Code, ErrorHandle, code_of};

/// Where a function puts its error.
pub(crate) type ErrorOut<'a> = Option<&'a mut MaybeUninit<*mut ErrorHandle>>;

/// Runs an exported function. Whatever it ends with, `error` is set: to NULL where it succeeds.
pub(crate) fn guard(error: ErrorOut<'_>, work: impl FnOnce() -> Result<()>) -> Code {
    let done = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(panicked(panic)));
    let (code, handle) = match done {
        Ok(()) => (Code::Ok, None),
        Err(failed) => (code_of(&failed), Some(failed)),
    };
    if let Some(error) = error {
        let handle = handle.map(ErrorHandle::new);
        error.write(handle.map_or(std::ptr::null_mut(), |it| Box::into_raw(Box::new(it))));
    }
    code
}

/// Runs an exported function that has no error to give: `otherwise` where it panics.
pub(crate) fn quiet<T>(otherwise: T, work: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        forget_panic(panic);
        otherwise
    })
}

/// What a panic says.
fn panicked(panic: Box<dyn Any + Send>) -> Error {
    let text = match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => (*text).to_owned(),
        (_, Some(text)) => text.clone(),
        _ => "it does not say why".to_owned(),
    };
    forget_panic(panic);
    Error::new(ErrorKind::Internal("a panic"), Phase::Cleanup).caused_by(io::Error::other(text))
}

/// Drops what a panic carried, which can panic as well; what that carries is left alone.
fn forget_panic(panic: Box<dyn Any + Send>) {
    if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(panic))) {
        mem::forget(again);
    }
}

/// A wrong call.
pub(crate) fn misuse(what: &'static str) -> Error {
    Error::misuse(Phase::Setup, what)
}

/// Refuses NULL; `what` names the parameter.
pub(crate) fn given<T>(pointer: Option<T>, what: &'static str) -> Result<T> {
    pointer.ok_or_else(|| misuse(what))
}

/// Hands a handle out: C owns it until the function that the header names takes it back.
pub(crate) fn hand_out<T>(to: &mut MaybeUninit<*mut T>, handle: T) {
    to.write(Box::into_raw(Box::new(handle)));
}

/// A text of C's, until the function that it was given to returns.
pub(crate) fn text<'a>(pointer: *const c_char, what: &'static str) -> Result<&'a str> {
    if pointer.is_null() {
        return Err(misuse(what));
    }
    // SAFETY: not NULL; the header asks for a text with a NUL at its end that stays as it is during the call,
    // and no function keeps what this returns.
    let text = unsafe { CStr::from_ptr(pointer) };
    text.to_str()
        .map_err(|_| misuse("a text is not UTF-8").caused_by(io::Error::other(what)))
}

/// Bytes of C's, until the function that they were given to returns. No bytes may be NULL.
pub(crate) fn bytes<'a>(
    pointer: *const c_void,
    len: usize,
    what: &'static str,
) -> Result<&'a [u8]> {
    if len == 0 {
        return Ok(&[]);
    }
    if pointer.is_null() || isize::try_from(len).is_err() {
        return Err(misuse(what));
    }
    // SAFETY: not NULL, and no longer than an allocation can be; the header asks for `len` bytes that stay as
    // they are during the call, and no function keeps what this returns.
    Ok(unsafe { slice::from_raw_parts(pointer.cast(), len) })
}

/// Room of C's, until the function that it was given to returns.
pub(crate) fn room<'a>(
    pointer: *mut c_void,
    len: usize,
    what: &'static str,
) -> Result<&'a mut [u8]> {
    if len == 0 {
        return Ok(&mut []);
    }
    if pointer.is_null() || isize::try_from(len).is_err() {
        return Err(misuse(what));
    }
    // SAFETY: not NULL, and no longer than an allocation can be; the header asks for `len` bytes that nobody
    // else touches during the call. Every bit pattern is a byte, and only writes are done to them.
    Ok(unsafe { slice::from_raw_parts_mut(pointer.cast(), len) })
}

/// Handles of C's in a row.
pub(crate) fn handles<'a, T>(
    pointer: *const *const T,
    count: usize,
    what: &'static str,
) -> Result<Vec<&'a T>> {
    let bytes = count.checked_mul(size_of::<*const T>());
    if count == 0 || pointer.is_null() || bytes.is_none_or(|bytes| isize::try_from(bytes).is_err())
    {
        return Err(misuse(what));
    }
    // SAFETY: not NULL, and no longer than an allocation can be; the header asks for `count` handles, each NULL
    // or one that this library has given out and that is not freed during the call.
    let all = unsafe { slice::from_raw_parts(pointer.cast::<Option<&T>>(), count) };
    all.iter().map(|one| given(*one, what)).collect()
}

/// Takes a file descriptor over. Where it is none, C keeps what it has.
pub(crate) fn adopt(fd: c_int, what: &'static str) -> Result<OwnedFd> {
    check_open(fd, what)?;
    // SAFETY: it is open, and the header says that it is the library's from here on.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes a file descriptor of the library's own, for the same open file.
pub(crate) fn duplicate(fd: c_int, what: &'static str) -> Result<OwnedFd> {
    check_open(fd, what)
}

fn check_open(fd: c_int, what: &'static str) -> Result<OwnedFd> {
    if fd < 0 {
        return Err(misuse(what));
    }
    // SAFETY: not -1. It is only duplicated, which fails with EBADF where it is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let duplicate = borrowed.try_clone_to_owned();
    duplicate.map_err(|error| misuse(what).caused_by(error))
}

/// Takes over a data fd that a callback has given; a negative one is none.
pub(crate) fn adopt_data_fd(fd: c_int) -> Option<OwnedFd> {
    if fd < 0 {
        return None;
    }
    // SAFETY: not -1; the header says that it is the library's from here on.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A publisher, and the lease that has been taken from it.
pub(crate) struct Leasing {
    /// First, so that it goes first. Borrows what `publisher` points to.
    lease: Option<PacketLease<'static>>,
    publisher: *mut Publisher,
}

impl Leasing {
    pub(crate) fn new(publisher: Publisher) -> Self {
        Self {
            lease: None,
            publisher: Box::into_raw(Box::new(publisher)),
        }
    }

    /// The publisher, while nothing is leased.
    pub(crate) fn publisher(&mut self) -> Result<&mut Publisher> {
        if self.lease.is_some() {
            return Err(misuse(
                "publisher: a lease is neither published nor given back",
            ));
        }
        // SAFETY: it came from a box that only `drop` takes back, and there is no lease that borrows it.
        Ok(unsafe { &mut *self.publisher })
    }

    /// Leases a packet's memory. Returns its first byte, or `None` where there is no memory now.
    pub(crate) fn lease(
        &mut self,
        id: &vfio_migration::DeviceId,
        header: PacketHeader,
        len: usize,
        waits: bool,
    ) -> Result<Option<*mut u8>> {
        self.publisher()?;
        // SAFETY: as in `publisher`, which has just looked. The reference lives as long as the lease: `drop`
        // drops the lease before the publisher, and until the lease is gone `publisher` gives out no other.
        let publisher: &'static mut Publisher = unsafe { &mut *self.publisher };
        let lease = if waits {
            Some(publisher.lease(id, header, len)?)
        } else {
            publisher.try_lease(id, header, len)?
        };
        self.lease = lease;
        let first = |lease: &mut PacketLease<'_>| lease.bytes_mut().as_mut_ptr();
        Ok(self.lease.as_mut().map(first))
    }

    /// Takes the lease, to publish it or to drop it.
    pub(crate) fn take_lease(&mut self) -> Result<PacketLease<'_>> {
        let lease = self.lease.take();
        lease.ok_or_else(|| misuse("publisher: nothing is leased"))
    }
}

impl Drop for Leasing {
    fn drop(&mut self) {
        self.lease = None;
        // SAFETY: it came from a box, this is the one place that takes it back, and nothing borrows it now.
        drop(unsafe { Box::from_raw(self.publisher) });
    }
}

/// Whatever a panic has left behind a lock is a stage that is over.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is behind a lock, by the one who owns it.
pub(crate) fn unlocked<T>(mutex: Mutex<T>) -> T {
    mutex.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// As [`unlocked`], by the one who has it alone.
pub(crate) fn alone<T>(mutex: &mut Mutex<T>) -> &mut T {
    mutex.get_mut().unwrap_or_else(PoisonError::into_inner)
}

/// As [`lock`], but refuses where another thread has it: `what` says whose.
pub(crate) fn lock_at_once<'a, T>(
    mutex: &'a Mutex<T>,
    what: &'static str,
) -> Result<MutexGuard<'a, T>> {
    match mutex.try_lock() {
        Ok(guard) => Ok(guard),
        Err(std::sync::TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
        Err(std::sync::TryLockError::WouldBlock) => Err(misuse(what)),
    }
}

/// To look at a stage: refused while another thread changes it.
pub(crate) fn look<'a, T>(
    stage: &'a RwLock<T>,
    what: &'static str,
) -> Result<RwLockReadGuard<'a, T>> {
    match stage.try_read() {
        Ok(guard) => Ok(guard),
        Err(std::sync::TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
        Err(std::sync::TryLockError::WouldBlock) => Err(misuse(what)),
    }
}

/// To change a stage: waits for the calls that look at it.
pub(crate) fn change<T>(stage: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    stage.write().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain() -> Result<()> {
        panic!("a text")
    }

    fn formatted() -> Result<()> {
        let text = "text";
        panic!("a {text}")
    }

    #[test]
    fn a_panic_becomes_an_error_with_its_text() {
        for panic in [plain, formatted] {
            let mut error = MaybeUninit::uninit();
            assert_eq!(guard(Some(&mut error), panic), Code::Internal);
            // SAFETY: `guard` always writes it, and where it fails it came from a box.
            let error = unsafe { error.assume_init() };
            // SAFETY: as above; nobody else has it.
            let error = unsafe { Box::from_raw(error) };
            let says = error.text().to_string_lossy();
            assert!(says.contains("a text"), "{says}");
        }
        assert_eq!(guard(None, plain), Code::Internal);
        assert_eq!(quiet(7, || panic!("nobody listens")), 7);
    }

    /// What a panic carries may panic as well when it goes.
    #[test]
    fn a_panic_within_a_panics_end_does_not_get_out() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                panic!("again");
            }
        }
        let code = guard(None, || std::panic::panic_any(Bomb));
        assert_eq!(code, Code::Internal);
        assert!(!quiet(false, || std::panic::panic_any(Bomb)));
    }

    #[test]
    fn success_clears_the_error() {
        let mut error = MaybeUninit::new(std::ptr::dangling_mut());
        assert_eq!(guard(Some(&mut error), || Ok(())), Code::Ok);
        // SAFETY: it was written before the call, and by it.
        assert!(unsafe { error.assume_init() }.is_null());
    }
}
