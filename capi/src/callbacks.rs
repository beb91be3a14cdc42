//! C's functions, as the traits that the engine calls.
//!
//! Longer than other files, so that what is unsafe stays together.
//!
//! The second of the two modules in which there is `unsafe`: every call of a function pointer is here, and what C
//! is given to call back with. Each rests on the rules that the header has for callbacks: the pointer and its
//! `opaque` are good until `release`, one thread at a time calls them (or any, where the header says so), and
//! nothing is thrown or jumped out of them. An answer that cannot be (more bytes than there was room for, a
//! positive error) is `EPROTO`.

#![expect(unsafe_code, reason = "calls into C")]

use std::{
    ffi::{c_int, c_void},
    io::{self, Read, Write},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    slice,
    sync::{Arc, Mutex},
};

use vfio_migration::{
    DeviceState, FdDevice, MigrationDevice, MigrationFlags, PrecopyInfo, RamSink, Result,
    StateEvent, vfio::VfioDevice,
};

use crate::border::{adopt_data_fd, given, lock, misuse, quiet};

const EPROTO: i32 = 71;
const ENOTTY: i32 = 25;
const EINVAL: i32 = 22;
const EIO: i32 = 5;

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// What a callback that returns 0 or a negative errno has said.
fn done(answer: c_int) -> io::Result<()> {
    match answer {
        0 => Ok(()),
        ..0 => Err(errno(answer.checked_neg().unwrap_or(EPROTO))),
        _ => Err(errno(EPROTO)),
    }
}

/// What a callback that returns a count, at most `most`, or a negative errno has said.
fn count(answer: isize, most: usize) -> io::Result<usize> {
    match usize::try_from(answer) {
        Ok(count) if count <= most => Ok(count),
        Ok(_) => Err(errno(EPROTO)),
        Err(_) => {
            let number = answer.checked_neg().and_then(|it| i32::try_from(it).ok());
            Err(errno(number.unwrap_or(EPROTO)))
        }
    }
}

/// The negative errno of an error, for a callback of ours.
fn negative(error: &io::Error) -> isize {
    let number = error.raw_os_error().filter(|number| *number > 0);
    -(number.unwrap_or(EIO) as isize)
}

/// C's pointer, which C wants back as it is.
#[derive(Clone, Copy)]
pub(crate) struct Opaque(*mut c_void);

// SAFETY: nobody here looks through it. The header asks that what C does with it may be done on any thread.
unsafe impl Send for Opaque {}
// SAFETY: as above.
unsafe impl Sync for Opaque {}

/// C's pointer, and the function that is told when the library is done with it.
pub(crate) struct Owned {
    pub(crate) opaque: Opaque,
    release: Option<Release>,
}

type Release = unsafe extern "C" fn(opaque: *mut c_void);

impl Owned {
    pub(crate) const fn new(opaque: *mut c_void, release: Option<Release>) -> Self {
        let opaque = Opaque(opaque);
        Self { opaque, release }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        if let Some(release) = self.release {
            // SAFETY: this is the last use of `opaque`, on whatever thread, as the header says of `release`.
            unsafe { release(self.opaque.0) };
        }
    }
}

// ------------------------------------------------------------------------------- bytes in and out

/// Where bytes come from. Passed by value. Who gets one calls `read` with its `opaque`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Input {
    /// As read(2): returns how many bytes it has put into `bytes`, 1 to `len`; 0 at the end; or a negative errno.
    /// Must block: -EAGAIN is an error. -EINTR is asked again.
    pub read:
        Option<unsafe extern "C" fn(opaque: *mut c_void, bytes: *mut c_void, len: usize) -> isize>,
    /// For `read`.
    pub opaque: *mut c_void,
}

/// Where bytes go. Passed by value. Who gets one calls `write` with its `opaque`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Output {
    /// As write(2): returns how many bytes it has taken, 1 to `len`, or a negative errno. Must block: -EAGAIN is an
    /// error. -EINTR is asked again. The library's own, which a callback is given, takes all of them.
    pub write: Option<
        unsafe extern "C" fn(opaque: *mut c_void, bytes: *const c_void, len: usize) -> isize,
    >,
    /// For `write`.
    pub opaque: *mut c_void,
}

/// An [`Input`] with its function.
#[derive(Clone, Copy)]
pub(crate) struct Source {
    read: unsafe extern "C" fn(opaque: *mut c_void, bytes: *mut c_void, len: usize) -> isize,
    opaque: Opaque,
}

impl Source {
    pub(crate) fn new(input: Input) -> Result<Self> {
        Ok(Self {
            read: given(input.read, "input: read is NULL")?,
            opaque: Opaque(input.opaque),
        })
    }
}

impl Read for Source {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        // SAFETY: the header's rules on `vfm_input`; the room is there for as long as the call.
        let answer = unsafe { (self.read)(self.opaque.0, bytes.as_mut_ptr().cast(), bytes.len()) };
        count(answer, bytes.len())
    }
}

/// An [`Output`] with its function.
#[derive(Clone, Copy)]
pub(crate) struct Sink {
    write: unsafe extern "C" fn(opaque: *mut c_void, bytes: *const c_void, len: usize) -> isize,
    opaque: Opaque,
}

impl Sink {
    pub(crate) fn new(output: Output) -> Result<Self> {
        Ok(Self {
            write: given(output.write, "output: write is NULL")?,
            opaque: Opaque(output.opaque),
        })
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // SAFETY: the header's rules on `vfm_output`; the bytes are there for as long as the call.
        let answer = unsafe { (self.write)(self.opaque.0, bytes.as_ptr().cast(), bytes.len()) };
        count(answer, bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The library's own `write`, for a callback.
unsafe extern "C" fn write_out(opaque: *mut c_void, bytes: *const c_void, len: usize) -> isize {
    quiet(-(EIO as isize), || {
        if opaque.is_null() || (bytes.is_null() && len > 0) {
            return -(EINVAL as isize);
        }
        // SAFETY: the opaque pointer of `with_output`, which outlives the callback that it was given to, and which
        // the header lets only that callback's thread use.
        let writer = unsafe { &mut *opaque.cast::<&mut dyn Write>() };
        let bytes = match len {
            0 => &[][..],
            // SAFETY: not NULL; the header asks for `len` bytes.
            _ => unsafe { slice::from_raw_parts(bytes.cast::<u8>(), len) },
        };
        match writer.write_all(bytes) {
            Ok(()) => len.cast_signed(),
            Err(error) => negative(&error),
        }
    })
}

/// The library's own `read`, for a callback.
unsafe extern "C" fn read_in(opaque: *mut c_void, bytes: *mut c_void, len: usize) -> isize {
    quiet(-(EIO as isize), || {
        if opaque.is_null() || bytes.is_null() {
            return if len == 0 { 0 } else { -(EINVAL as isize) };
        }
        // SAFETY: as in `write_out`.
        let reader = unsafe { &mut *opaque.cast::<&mut dyn Read>() };
        // SAFETY: not NULL; the header asks for room for `len` bytes, which every reader here only writes to.
        let room = unsafe { slice::from_raw_parts_mut(bytes.cast::<u8>(), len) };
        loop {
            match reader.read(room) {
                Ok(count) => return count.cast_signed(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return negative(&error),
            }
        }
    })
}

/// Lends a writer to a callback.
fn with_output<T>(mut writer: &mut dyn Write, call: impl FnOnce(Output) -> T) -> T {
    call(Output {
        write: Some(write_out),
        opaque: (&raw mut writer).cast(),
    })
}

/// Lends a reader to a callback.
fn with_input<T>(mut reader: &mut dyn Read, call: impl FnOnce(Input) -> T) -> T {
    call(Input {
        read: Some(read_in),
        opaque: (&raw mut reader).cast(),
    })
}

// --------------------------------------------------------------------------------------- devices

/// What is left in PRE_COPY, in bytes: `struct vfio_precopy_info`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Precopy {
    /// What the destination should have before the switchover.
    pub initial_bytes: u64,
    /// What has changed since it was read.
    pub dirty_bytes: u64,
    /// New initial bytes have appeared. Only after `enable_precopy_info_v2`.
    pub reinit: bool,
}

/// A device in C. There are two kinds, and one of `set_state` and `open` is given:
///
/// | | a device with states of its own | a device that the library keeps the states of |
/// |---|---|---|
/// | for | the kernel's, by the caller's own ioctls | a device model, a back-end in another process, a file |
/// | has to have | flags, state, set_state, reset | open |
///
/// All other functions may be NULL. `opaque` is passed to each. One thread at a time calls them: the library's
/// thread for this device while packets move, the caller's in the functions of this header that concern the device;
/// never the thread that moves the bytes. They may block; that device waits for them. They return 0, or a
/// negative errno.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct DeviceOps {
    /// sizeof(struct vfm_device_ops), so that a later header may have more.
    pub size: usize,
    /// Writes what the device can do, `VFM_FLAG_…`, once. With `open`: NULL is `VFM_FLAG_STOP_COPY`.
    pub flags: Option<unsafe extern "C" fn(opaque: *mut c_void, flags: *mut u64) -> c_int>,
    /// Writes the device's state (`enum vfm_state`). With `open`: asked once, RUNNING or STOP; NULL is RUNNING.
    pub state: Option<unsafe extern "C" fn(opaque: *mut c_void, state: *mut u32) -> c_int>,
    /// Sets a state, and nothing else: the library recovers a device that refuses. A data fd that comes with the
    /// state is written to `data_fd`, which holds -1; it is the library's from then on. It must have `FD_CLOEXEC`
    /// and not `O_NONBLOCK`.
    pub set_state:
        Option<unsafe extern "C" fn(opaque: *mut c_void, state: u32, data_fd: *mut c_int) -> c_int>,
    /// Opens the data fd with which a save (PRE_COPY, STOP_COPY) or a load (RESUMING) begins. The rules are those
    /// of `set_state`'s.
    pub open:
        Option<unsafe extern "C" fn(opaque: *mut c_void, state: u32, data_fd: *mut c_int) -> c_int>,
    /// With `open`: the state changes; a refusal keeps it as it was. To check what was loaded: out of RESUMING.
    pub change: Option<unsafe extern "C" fn(opaque: *mut c_void, from: u32, to: u32) -> c_int>,
    /// Resets the device: afterwards it is RUNNING, and its content is gone. A failure loses the device. Of a kernel's
    /// device: it has been reset, and its interrupts, its command register and its BARs have to be set again.
    pub reset: Option<unsafe extern "C" fn(opaque: *mut c_void) -> c_int>,
    /// Writes how many bytes STOP_COPY would give now. An estimate. NULL: the device cannot tell.
    pub data_size: Option<unsafe extern "C" fn(opaque: *mut c_void, bytes: *mut u64) -> c_int>,
    /// Writes what is left in PRE_COPY: `VFIO_MIG_GET_PRECOPY_INFO` on the data fd.
    pub precopy_info: Option<
        unsafe extern "C" fn(opaque: *mut c_void, data_fd: c_int, info: *mut Precopy) -> c_int,
    >,
    /// Asks the kernel for `reinit`. NULL, or -ENOTTY: it is not to be had.
    pub enable_precopy_info_v2: Option<unsafe extern "C" fn(opaque: *mut c_void) -> c_int>,
    /// Reads in PRE_COPY: a count, -ENOMSG where there is nothing for now, or another negative errno. NULL is
    /// read(2), but with `open` a device that has PRE_COPY needs it.
    pub read_precopy: Option<
        unsafe extern "C" fn(
            opaque: *mut c_void,
            data_fd: c_int,
            bytes: *mut c_void,
            len: usize,
        ) -> isize,
    >,
    /// Writes the config: what the VMM keeps of the device, opaque to the library. `output` is good during the
    /// call, on its thread. NULL: the config is empty.
    pub save_config: Option<unsafe extern "C" fn(opaque: *mut c_void, output: Output) -> c_int>,
    /// Reads the config, exactly the bytes that `save_config` wrote and none more. `input` is good during the call, on
    /// its thread; a read may return less than was asked for.
    pub load_config: Option<unsafe extern "C" fn(opaque: *mut c_void, input: Input) -> c_int>,
    /// The device is in `state` now; or, with `prepares`, PRE_COPY_P2P is about to be asked for. Only where
    /// VFM_DEVICE_SETTING_EVENTS is on. Quick: the device's next call waits.
    pub event: Option<unsafe extern "C" fn(opaque: *mut c_void, state: u32, prepares: bool)>,
    /// The library is done with `opaque`: called once, whatever became of the device, unless a call is stuck in it.
    /// Any thread.
    pub release: Option<unsafe extern "C" fn(opaque: *mut c_void)>,
}

/// A device of C's: its functions, and its pointer.
pub(crate) struct CDevice {
    ops: DeviceOps,
    owned: Owned,
}

impl CDevice {
    /// Takes `opaque` over at once, so that it is released whatever follows.
    pub(crate) fn new(ops: &DeviceOps, opaque: *mut c_void) -> Self {
        let owned = Owned::new(opaque, ops.release);
        Self { ops: *ops, owned }
    }

    /// As the engine wants it.
    pub(crate) fn into_device(self) -> Result<Box<dyn MigrationDevice>> {
        let ops = &self.ops;
        if ops.size < size_of::<DeviceOps>() {
            return Err(misuse("ops: size is not sizeof(struct vfm_device_ops)"));
        }
        match (ops.set_state.is_some(), ops.open.is_some()) {
            (true, false) => {
                let needed = ops.flags.is_some() && ops.state.is_some() && ops.reset.is_some();
                if !needed || ops.change.is_some() {
                    let what = "ops: set_state comes with flags, state and reset, without change";
                    return Err(misuse(what));
                }
                Ok(Box::new(self))
            }
            (false, true) => self.with_states(),
            _ => Err(misuse("ops: one of set_state and open")),
        }
    }

    /// A device that the engine keeps the states of.
    fn with_states(self) -> Result<Box<dyn MigrationDevice>> {
        let wrong = |error| misuse("ops: flags or state failed").caused_by(error);
        let flags = match self.ops.flags {
            Some(_) => MigrationDevice::flags(&self).map_err(wrong)?,
            None => MigrationFlags::STOP_COPY,
        };
        let state = match self.ops.state {
            Some(_) => MigrationDevice::state(&self).map_err(wrong)?,
            None => DeviceState::Running,
        };
        let precopy = flags.contains(MigrationFlags::PRE_COPY);
        if precopy && (self.ops.precopy_info.is_none() || self.ops.read_precopy.is_none()) {
            return Err(misuse(
                "ops: PRE_COPY comes with precopy_info and read_precopy",
            ));
        }
        let known = MigrationFlags::STOP_COPY | MigrationFlags::P2P | MigrationFlags::PRE_COPY;
        if !flags.contains(MigrationFlags::STOP_COPY) || !known.contains(flags) {
            return Err(misuse("ops: flags without STOP_COPY, or unknown ones"));
        }
        // One thread at a time calls the device, so nobody ever waits here.
        let device = Arc::new(Mutex::new(self));
        macro_rules! with {
            (|$it:ident $(, $argument:ident)*| $call:expr) => {{
                let device = device.clone();
                move |$($argument),*| {
                    let $it = &mut *lock(&device);
                    $call
                }
            }};
        }
        let mut made = FdDevice::new(with!(|it, state| it.open(state)))
            .on_change(with!(|it, from, to| it.change(from, to)))
            .with_data_size(with!(|it| MigrationDevice::data_size(it)));
        made = match state {
            DeviceState::Running => made,
            DeviceState::Stop => made.stopped(),
            _ => return Err(misuse("ops: with open, the state is RUNNING or STOP")),
        };
        if flags.contains(MigrationFlags::P2P) {
            made = made.with_p2p();
        }
        if precopy {
            let asked = device.clone();
            let info = move || lock(&asked).precopy_info_of(-1);
            let read_from = device.clone();
            let read = move |fd: BorrowedFd<'_>, bytes: &mut [u8]| {
                lock(&read_from).read_precopy(fd, bytes)
            };
            made = made.with_precopy(info, read);
        }
        Ok(Box::new(Shared {
            device: made,
            c: device,
        }))
    }

    fn open(&mut self, state: DeviceState) -> io::Result<OwnedFd> {
        let open = self.ops.open.ok_or_else(|| errno(ENOTTY))?;
        let mut fd = -1;
        // SAFETY: the header's rules on `vfm_device_ops`; `fd` is there for as long as the call.
        done(unsafe { open(self.owned.opaque.0, state.into(), &raw mut fd) })?;
        adopt_data_fd(fd).ok_or_else(|| errno(EPROTO))
    }

    fn change(&mut self, from: DeviceState, to: DeviceState) -> io::Result<()> {
        let Some(change) = self.ops.change else {
            return Ok(());
        };
        // SAFETY: the header's rules on `vfm_device_ops`.
        done(unsafe { change(self.owned.opaque.0, from.into(), to.into()) })
    }

    fn reset_if_it_can(&mut self) -> io::Result<()> {
        match self.ops.reset {
            Some(_) => MigrationDevice::reset(self),
            None => Ok(()),
        }
    }

    fn precopy_info_of(&self, data_fd: c_int) -> io::Result<PrecopyInfo> {
        let ask = self.ops.precopy_info.ok_or_else(|| errno(EINVAL))?;
        let mut info = Precopy::default();
        // SAFETY: the header's rules on `vfm_device_ops`; `info` is there for as long as the call.
        done(unsafe { ask(self.owned.opaque.0, data_fd, &raw mut info) })?;
        Ok(PrecopyInfo {
            initial_bytes: info.initial_bytes,
            dirty_bytes: info.dirty_bytes,
            reinit: info.reinit,
        })
    }
}

impl MigrationDevice for CDevice {
    fn flags(&self) -> io::Result<MigrationFlags> {
        let ask = self.ops.flags.ok_or_else(|| errno(ENOTTY))?;
        let mut flags = 0;
        // SAFETY: the header's rules on `vfm_device_ops`; `flags` is there for as long as the call.
        done(unsafe { ask(self.owned.opaque.0, &raw mut flags) })?;
        Ok(MigrationFlags::from_bits(flags))
    }

    fn state(&self) -> io::Result<DeviceState> {
        let ask = self.ops.state.ok_or_else(|| errno(ENOTTY))?;
        let mut state = u32::MAX;
        // SAFETY: the header's rules on `vfm_device_ops`; `state` is there for as long as the call.
        done(unsafe { ask(self.owned.opaque.0, &raw mut state) })?;
        let unknown = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        DeviceState::try_from(state).map_err(unknown)
    }

    fn set_state(&mut self, new: DeviceState) -> io::Result<Option<OwnedFd>> {
        let set = self.ops.set_state.ok_or_else(|| errno(ENOTTY))?;
        let mut fd = -1;
        // SAFETY: the header's rules on `vfm_device_ops`; `fd` is there for as long as the call.
        let answer = unsafe { set(self.owned.opaque.0, new.into(), &raw mut fd) };
        // Also where it failed: what it gave is ours to close.
        let fd = adopt_data_fd(fd);
        done(answer).map(|()| fd)
    }

    fn reset(&mut self) -> io::Result<()> {
        let reset = self.ops.reset.ok_or_else(|| errno(ENOTTY))?;
        // SAFETY: the header's rules on `vfm_device_ops`.
        done(unsafe { reset(self.owned.opaque.0) })
    }

    fn data_size(&self) -> io::Result<u64> {
        let ask = self.ops.data_size.ok_or_else(|| errno(ENOTTY))?;
        let mut size = 0;
        // SAFETY: the header's rules on `vfm_device_ops`; `size` is there for as long as the call.
        done(unsafe { ask(self.owned.opaque.0, &raw mut size) })?;
        Ok(size)
    }

    fn precopy_info(&self, fd: BorrowedFd<'_>) -> io::Result<PrecopyInfo> {
        self.precopy_info_of(fd.as_raw_fd())
    }

    fn enable_precopy_info_v2(&mut self) -> io::Result<()> {
        let enable = self
            .ops
            .enable_precopy_info_v2
            .ok_or_else(|| errno(ENOTTY))?;
        // SAFETY: the header's rules on `vfm_device_ops`.
        done(unsafe { enable(self.owned.opaque.0) })
    }

    fn read_precopy(&mut self, fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(read) = self.ops.read_precopy else {
            // read(2), on a file that lives on: only its number is read through.
            let mut file = std::fs::File::from(fd.try_clone_to_owned()?);
            return file.read(buffer);
        };
        let (room, len) = (buffer.as_mut_ptr().cast(), buffer.len());
        // SAFETY: the header's rules on `vfm_device_ops`; the room is there for as long as the call.
        count(
            unsafe { read(self.owned.opaque.0, fd.as_raw_fd(), room, len) },
            len,
        )
    }

    fn save_config(&mut self, writer: &mut dyn Write) -> io::Result<()> {
        let Some(save) = self.ops.save_config else {
            return Ok(());
        };
        let opaque = self.owned.opaque.0;
        // SAFETY: the header's rules on `vfm_device_ops`; the output is good during the call.
        done(with_output(writer, |output| unsafe {
            save(opaque, output)
        }))
    }

    fn load_config(&mut self, reader: &mut dyn Read) -> io::Result<()> {
        let Some(load) = self.ops.load_config else {
            return Ok(());
        };
        let opaque = self.owned.opaque.0;
        // SAFETY: the header's rules on `vfm_device_ops`; the input is good during the call.
        done(with_input(reader, |input| unsafe { load(opaque, input) }))
    }

    fn event(&mut self, event: StateEvent) {
        let Some(told) = self.ops.event else {
            return;
        };
        let (state, prepares) = match event {
            StateEvent::PreCopyP2pPrepare => (DeviceState::PreCopyP2p, true),
            StateEvent::State(state) => (state, false),
            _ => return,
        };
        // SAFETY: the header's rules on `vfm_device_ops`.
        unsafe { told(self.owned.opaque.0, state.into(), prepares) };
    }
}

/// A device whose states are not C's, and what C has of it: its config, what a reset undoes, its events.
struct Shared<D> {
    device: D,
    c: Arc<Mutex<CDevice>>,
}

impl<D: MigrationDevice> MigrationDevice for Shared<D> {
    fn flags(&self) -> io::Result<MigrationFlags> {
        self.device.flags()
    }

    fn state(&self) -> io::Result<DeviceState> {
        self.device.state()
    }

    fn set_state(&mut self, new: DeviceState) -> io::Result<Option<OwnedFd>> {
        self.device.set_state(new)
    }

    fn reset(&mut self) -> io::Result<()> {
        self.device.reset()?;
        lock(&self.c).reset_if_it_can()
    }

    fn data_size(&self) -> io::Result<u64> {
        self.device.data_size()
    }

    fn precopy_info(&self, fd: BorrowedFd<'_>) -> io::Result<PrecopyInfo> {
        self.device.precopy_info(fd)
    }

    fn enable_precopy_info_v2(&mut self) -> io::Result<()> {
        match self.device.enable_precopy_info_v2() {
            Err(error) if error.raw_os_error() == Some(ENOTTY) => {
                lock(&self.c).enable_precopy_info_v2()
            }
            done => done,
        }
    }

    fn read_precopy(&mut self, fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
        self.device.read_precopy(fd, buffer)
    }

    fn save_config(&mut self, writer: &mut dyn Write) -> io::Result<()> {
        lock(&self.c).save_config(writer)
    }

    fn load_config(&mut self, reader: &mut dyn Read) -> io::Result<()> {
        lock(&self.c).load_config(reader)
    }

    fn event(&mut self, event: StateEvent) {
        lock(&self.c).event(event);
    }
}

/// A device of the kernel's, with C's half.
pub(crate) fn kernels(
    device: VfioDevice<OwnedFd>,
    c: Option<CDevice>,
) -> Result<Box<dyn MigrationDevice>> {
    let Some(c) = c else {
        return Ok(Box::new(device));
    };
    if c.ops.size < size_of::<DeviceOps>() {
        return Err(misuse("ops: size is not sizeof(struct vfm_device_ops)"));
    }
    let c = Arc::new(Mutex::new(c));
    Ok(Box::new(Shared { device, c }))
}

// --------------------------------------------------------------------------------------- streams

/// A connection that is no socket: TLS, say. The channel's thread calls all but `hangup`, one at a time.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct StreamOps {
    /// sizeof(struct vfm_stream_ops), so that a later header may have more.
    pub size: usize,
    /// As of `vfm_input`. -EAGAIN is its own time-out, or says that it does not block: then it is asked again.
    pub read:
        Option<unsafe extern "C" fn(opaque: *mut c_void, bytes: *mut c_void, len: usize) -> isize>,
    /// As of `vfm_output`. -EAGAIN as for `read`.
    pub write: Option<
        unsafe extern "C" fn(opaque: *mut c_void, bytes: *const c_void, len: usize) -> isize,
    >,
    /// Ends the sending side, with all that was written before: 0, or a negative errno. The peer then reads the end.
    /// NULL: the peer reads the end when `release` closes the connection.
    pub finish: Option<unsafe extern "C" fn(opaque: *mut c_void) -> c_int>,
    /// Makes `read` and `write`, and the next ones, return soon. Any thread, while they run, and perhaps twice.
    pub hangup: Option<unsafe extern "C" fn(opaque: *mut c_void)>,
    /// The library is done with `opaque`: called once, when no call is under way. Any thread.
    pub release: Option<unsafe extern "C" fn(opaque: *mut c_void)>,
}

/// A stream of C's. Its clone hangs it up.
#[derive(Clone)]
pub(crate) struct CStream {
    source: Source,
    sink: Sink,
    finish: Option<unsafe extern "C" fn(opaque: *mut c_void) -> c_int>,
    hangup: unsafe extern "C" fn(opaque: *mut c_void),
    owned: Arc<Owned>,
}

impl CStream {
    pub(crate) fn new(ops: &StreamOps, opaque: *mut c_void) -> Result<Self> {
        let owned = Arc::new(Owned::new(opaque, ops.release));
        if ops.size < size_of::<StreamOps>() {
            let what = "ops: size is not sizeof(struct vfm_stream_ops)";
            return Err(misuse(what));
        }
        Ok(Self {
            source: Source::new(Input {
                read: ops.read,
                opaque,
            })?,
            sink: Sink::new(Output {
                write: ops.write,
                opaque,
            })?,
            finish: ops.finish,
            hangup: given(ops.hangup, "ops: hangup is NULL")?,
            owned,
        })
    }

    pub(crate) fn hang_up(&self) {
        // SAFETY: the header's rules on `vfm_stream_ops`: any thread, at any time before `release`, which `owned` holds
        // back.
        unsafe { (self.hangup)(self.owned.opaque.0) };
    }

    pub(crate) fn finish(&mut self) -> io::Result<()> {
        let Some(finish) = self.finish else {
            return Ok(());
        };
        // SAFETY: the header's rules on `vfm_stream_ops`.
        done(unsafe { finish(self.owned.opaque.0) })
    }
}

impl Read for CStream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.source.read(bytes)
    }
}

impl Write for CStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.sink.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Takes the packets of a channel that RAM shares. The channel's thread calls, in the channel's order. What blocks
/// here holds that channel up, and no other.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct RamOps {
    /// sizeof(struct vfm_ram_ops), so that a later header may have more.
    pub size: usize,
    /// A RAM packet: its header, and its pages, which `pages` gives and then ends. What is left unread is skipped.
    pub ram: Option<
        unsafe extern "C" fn(
            opaque: *mut c_void,
            header: *const c_void,
            header_len: usize,
            pages: Input,
        ) -> c_int,
    >,
    /// A SYNC packet. May block until all channels have had theirs.
    pub sync: Option<
        unsafe extern "C" fn(
            opaque: *mut c_void,
            header: *const c_void,
            header_len: usize,
        ) -> c_int,
    >,
    /// The library is done with `opaque`. Any thread.
    pub release: Option<unsafe extern "C" fn(opaque: *mut c_void)>,
}

/// C's RAM sink.
pub(crate) struct CRam {
    ops: RamOps,
    owned: Owned,
}

impl CRam {
    pub(crate) fn new(ops: &RamOps, opaque: *mut c_void) -> Result<Self> {
        let owned = Owned::new(opaque, ops.release);
        if ops.size < size_of::<RamOps>() || ops.ram.is_none() || ops.sync.is_none() {
            let what = "ops: size is sizeof(struct vfm_ram_ops), and ram and sync are not NULL";
            return Err(misuse(what));
        }
        Ok(Self { ops: *ops, owned })
    }
}

impl RamSink for CRam {
    fn ram(&mut self, header: &[u8], pages: &mut dyn Read) -> io::Result<()> {
        let ram = self.ops.ram.ok_or_else(|| errno(ENOTTY))?;
        let opaque = self.owned.opaque.0;
        let (bytes, len) = (header.as_ptr().cast(), header.len());
        // SAFETY: the header's rules on `vfm_ram_ops`; the bytes and the input are good during the call.
        let call = |pages| unsafe { ram(opaque, bytes, len, pages) };
        done(with_input(pages, call))
    }

    fn sync(&mut self, header: &[u8]) -> io::Result<()> {
        let sync = self.ops.sync.ok_or_else(|| errno(ENOTTY))?;
        // SAFETY: the header's rules on `vfm_ram_ops`; the bytes are good during the call.
        done(unsafe { sync(self.owned.opaque.0, header.as_ptr().cast(), header.len()) })
    }
}

// ------------------------------------------------------------------------------ single functions

/// A function of C's that takes its `opaque` alone.
pub(crate) struct Call {
    call: unsafe extern "C" fn(opaque: *mut c_void) -> c_int,
    owned: Owned,
}

impl Call {
    pub(crate) const fn new(
        call: unsafe extern "C" fn(opaque: *mut c_void) -> c_int,
        owned: Owned,
    ) -> Self {
        Self { call, owned }
    }

    pub(crate) fn call(&self) -> io::Result<()> {
        // SAFETY: the header's rules on the parameter that it came by.
        done(unsafe { (self.call)(self.owned.opaque.0) })
    }
}

/// The function of C's that puts a task on a thread.
pub(crate) type Spawn<T> = unsafe extern "C" fn(opaque: *mut c_void, task: *mut T) -> c_int;

/// Hands a task to C, which runs it on a thread of its own.
pub(crate) fn spawn<T>(spawn: Spawn<T>, owned: &Owned, task: T) -> io::Result<()> {
    let task = Box::into_raw(Box::new(task));
    // SAFETY: the header's rules on `vfm_settings_spawn_with`.
    let answer = unsafe { spawn(owned.opaque.0, task) };
    done(answer).inspect_err(|_| {
        // SAFETY: the header says that a task which is refused stays the library's: nobody else has it.
        drop(unsafe { Box::from_raw(task) });
    })
}

/// The function of C's that registers a blocker.
pub(crate) type Block = unsafe extern "C" fn(
    opaque: *mut c_void,
    idstr: *const std::ffi::c_char,
    instance: u32,
    refusal: u32,
) -> c_int;

/// Tells C of a blocker.
pub(crate) fn block(
    block: Block,
    opaque: *mut c_void,
    idstr: &std::ffi::CStr,
    instance: u32,
    refusal: u32,
) -> io::Result<()> {
    // SAFETY: the header's rules on the function that it was given to, during that call.
    done(unsafe { block(opaque, idstr.as_ptr(), instance, refusal) })
}
