//! The push API: packets that the VMM reads from its own connections.
//!
//! A publisher is one thread's: the engine's `Publisher` keeps that thread's registrations. So it is kept with the
//! number of its thread, and every other thread is refused; one that frees it leaves it to its thread's end.

#![expect(unsafe_code, reason = "the functions' names are exported")]

use std::{
    cell::RefCell,
    collections::HashMap,
    ffi::{c_char, c_void},
    mem::MaybeUninit,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use vfio_migration::{Publisher, Result, wire::PacketHeader};

use crate::{
    border::{Leasing, bytes, given, guard, misuse, quiet},
    device::device_id,
    failure::{Code, ErrorHandle},
};

thread_local! {
    /// This thread's publishers: a handle has the number of one.
    static MINE: RefCell<HashMap<u64, Leasing>> = RefCell::default();
}

static NEXT: AtomicU64 = AtomicU64::new(0);

/// Brings packets of one of the caller's own connections into a load. While there is one, the load's input has not
/// ended. Only the thread that made it may use it: another is refused. That thread frees it, with
/// `vfm_publisher_free`; or ends, which frees what it holds.
pub struct PublisherHandle(u64);

impl PublisherHandle {
    pub(crate) fn new(publisher: Publisher) -> Self {
        // Relaxed: only a number that no other has.
        let number = NEXT.fetch_add(1, Relaxed);
        MINE.with_borrow_mut(|mine| mine.insert(number, Leasing::new(publisher)));
        Self(number)
    }

    fn with<T>(&self, work: impl FnOnce(&mut Leasing) -> Result<T>) -> Result<T> {
        MINE.with(|mine| {
            let mut mine = mine
                .try_borrow_mut()
                .map_err(|_| misuse("publisher: it is in a call"))?;
            let it = mine.get_mut(&self.0);
            work(it.ok_or_else(|| misuse("publisher: it belongs to another thread"))?)
        })
    }
}

/// Publishes a packet of the device with this name. `payload` is the packet's payload as on the wire: its header of 12
/// bytes, then its data. It is copied. Waits while the budget is spent, but not for the packet that the device needs
/// next. A packet that breaks a rule fails the load.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_publisher_push(
    publisher: Option<&PublisherHandle>,
    idstr: *const c_char,
    instance: u32,
    payload: *const c_void,
    len: usize,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let publisher = given(publisher, "publisher: NULL")?;
        let id = device_id(idstr, instance)?;
        let payload = bytes(payload, len, "payload: NULL")?;
        publisher.with(|it| it.publisher()?.push(&id, payload))
    })
}

/// As `vfm_publisher_push`, but never waits: writes to `pushed` whether there was memory for it. Where there was not,
/// nothing is kept.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_publisher_try_push(
    publisher: Option<&PublisherHandle>,
    idstr: *const c_char,
    instance: u32,
    payload: *const c_void,
    len: usize,
    pushed: Option<&mut MaybeUninit<bool>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let publisher = given(publisher, "publisher: NULL")?;
        let pushed = given(pushed, "pushed: NULL")?;
        let id = device_id(idstr, instance)?;
        let payload = bytes(payload, len, "payload: NULL")?;
        pushed.write(publisher.with(|it| it.publisher()?.try_push(&id, payload))?);
        Ok(())
    })
}

/// Leases memory for a packet of `len` bytes of data, to be filled in place: `*data` is its first byte, or NULL where
/// `wait` is false and there is none now. Fill all of it, on this thread, then call `vfm_publisher_publish`; or
/// `vfm_publisher_release` to give it back. Until then this publisher does nothing else. `index` and `config` are those
/// of the packet's header. With `len` 0 `*data` is not NULL, and there is nothing to fill.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_publisher_lease(
    publisher: Option<&PublisherHandle>,
    idstr: *const c_char,
    instance: u32,
    index: u32,
    config: bool,
    len: usize,
    wait: bool,
    data: Option<&mut MaybeUninit<*mut c_void>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let publisher = given(publisher, "publisher: NULL")?;
        let data = given(data, "data: NULL")?;
        let id = device_id(idstr, instance)?;
        let header = PacketHeader { index, config };
        let first = publisher.with(|it| it.lease(&id, header, len, wait))?;
        data.write(first.map_or(std::ptr::null_mut(), <*mut u8>::cast));
        Ok(())
    })
}

/// Publishes the packet that was leased. The lease is over, also where this fails.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_publisher_publish(
    publisher: Option<&PublisherHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let publisher = given(publisher, "publisher: NULL")?;
        publisher.with(|it| it.take_lease()?.publish())
    })
}

/// Gives the leased memory back; the packet may be leased or pushed again.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_publisher_release(
    publisher: Option<&PublisherHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let publisher = given(publisher, "publisher: NULL")?;
        publisher.with(|it| it.take_lease().map(drop))
    })
}

/// Frees a publisher, and gives back what it leases. NULL is nothing. Its own thread; on another one it only frees
/// the handle, and the load's input stays open until the publisher's thread ends.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_publisher_free(publisher: Option<Box<PublisherHandle>>) {
    quiet((), || {
        if let Some(publisher) = publisher {
            // Out of the map first: it may call C when it goes.
            let gone = MINE.with(|mine| mine.try_borrow_mut().ok()?.remove(&publisher.0));
            drop(gone);
        }
    });
}
