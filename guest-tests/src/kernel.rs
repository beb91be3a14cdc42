//! A device as the kernel shows it: opened through its group, driven by plain calls.
//!
//! Nothing here is the engine's, so that a test can hold what the engine says of a device against
//! what the kernel says. Any thread; a call lasts as long as the driver takes for it.
#![expect(unsafe_code, reason = "ioctls")]

use std::{
    env,
    ffi::CString,
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{errno::Errno, sys::uio};
use vfio_migration::DeviceState;

/// The size of an mtty's state: 24 bytes of header, 36 for each of its two ports.
pub const IMAGE: usize = 96;
/// The header, which is what it gives in PRE_COPY.
pub const HEADER: usize = 24;

const PORTS: u8 = 2;
const GET: u32 = 1 << 16;
const SET: u32 = 1 << 17;
const MIG_DEVICE_STATE: u32 = 2;
const TYPE1: i32 = 1;

/// `struct vfio_device_feature` with eight bytes of data.
#[repr(C)]
struct Feature {
    argsz: u32,
    flags: u32,
    data: [u32; 2],
}

/// `_IO(';', 100 + number)`.
const fn request(number: u64) -> u64 {
    0x3b64 + number
}

nix::ioctl_write_int_bad!(set_iommu, request(2));
nix::ioctl_write_ptr_bad!(set_container, request(4), RawFd);
nix::ioctl_write_ptr_bad!(get_device_fd, request(6), std::ffi::c_char);
nix::ioctl_none_bad!(reset, request(11));
nix::ioctl_readwrite_bad!(feature, request(17), Feature);

/// A device that was made anew, open.
pub struct Kernel {
    device: File,
    _group: File,
    _container: File,
}

impl Kernel {
    /// Makes the guest's device of this number (from 1) anew, and opens it.
    pub fn open(number: usize) -> Arc<Self> {
        let path = renew(number);
        let group = fs::read_link(path.join("iommu_group")).unwrap();
        let group = open(&Path::new("/dev/vfio").join(group.file_name().unwrap()));
        let container = open(Path::new("/dev/vfio/vfio"));
        let name = CString::new(path.file_name().unwrap().as_bytes()).unwrap();
        // SAFETY: the argument is a pointer to a file descriptor that outlives the call.
        unsafe { set_container(group.as_raw_fd(), &container.as_raw_fd()) }.unwrap();
        // SAFETY: the argument is a number.
        unsafe { set_iommu(container.as_raw_fd(), TYPE1) }.unwrap();
        // SAFETY: the argument is a string that ends in 0 and outlives the call.
        let device = unsafe { get_device_fd(group.as_raw_fd(), name.as_ptr()) }.unwrap();
        // SAFETY: the kernel has just made this descriptor for us.
        let device = unsafe { OwnedFd::from_raw_fd(device) };
        Arc::new(Self {
            device: device.into(),
            _group: group,
            _container: container,
        })
    }

    /// The open device once more, for the engine.
    pub fn fd(&self) -> OwnedFd {
        self.device.try_clone().unwrap().into()
    }

    /// GET of the state.
    pub fn state(&self) -> DeviceState {
        let [state, fd] = self.feature(GET | MIG_DEVICE_STATE, [0; 2]).unwrap();
        assert_eq!(fd.cast_signed(), -1);
        DeviceState::try_from(state).unwrap()
    }

    /// SET of the state, to a number that may be none.
    pub fn set_number(&self, number: u32) -> Result<Option<OwnedFd>, Errno> {
        let [_, fd] = self.feature(SET | MIG_DEVICE_STATE, [number, u32::MAX])?;
        let fd = fd.cast_signed();
        // SAFETY: the kernel has just made this descriptor for us.
        Ok((fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// SET of the state.
    pub fn set(&self, state: DeviceState) -> Result<Option<OwnedFd>, Errno> {
        self.set_number(state.into())
    }

    /// RESET.
    pub fn reset(&self) -> Result<(), Errno> {
        // SAFETY: it has no argument.
        unsafe { reset(self.device.as_raw_fd()) }?;
        Ok(())
    }

    fn feature(&self, flags: u32, data: [u32; 2]) -> Result<[u32; 2], Errno> {
        let mut argument = Feature {
            argsz: 16,
            flags,
            data,
        };
        // SAFETY: the argument is a structure of the size that it says, which outlives the call.
        unsafe { feature(self.device.as_raw_fd(), &raw mut argument) }?;
        Ok(argument.data)
    }

    /// Gives the device a state that depends on `seed`: its scratch registers, its FIFOs.
    pub fn fill(&self, seed: u8) {
        for port in 0..PORTS {
            self.write(port, 7, seed.wrapping_add(port));
            for byte in 0..10 {
                self.write(port, 0, seed.wrapping_add(16 * port + byte));
            }
        }
    }

    /// The scratch registers, read as the VM would.
    pub fn scratch(&self) -> [u8; PORTS as usize] {
        let read = |port| {
            let mut byte = [0];
            let read = uio::pread(&self.device, &mut byte, register(port, 7));
            assert_eq!(read, Ok(1));
            byte[0]
        };
        [read(0), read(1)]
    }

    fn write(&self, port: u8, number: i64, value: u8) {
        let written = uio::pwrite(&self.device, &[value], register(port, number));
        assert_eq!(written, Ok(1));
    }

    /// The device's whole state. It must be RUNNING or STOP, and is RUNNING afterwards.
    pub fn image(&self) -> Vec<u8> {
        let fd = self.set(DeviceState::StopCopy).unwrap().unwrap();
        let mut image = Vec::new();
        File::from(fd).read_to_end(&mut image).unwrap();
        assert_eq!(image.len(), IMAGE);
        self.set(DeviceState::Running).unwrap();
        image
    }
}

/// Makes the guest's device of this number (from 1) anew, and gives its path. It waits until the last
/// file of the device is closed.
pub fn renew(number: usize) -> PathBuf {
    let path = env::var_os(format!("MDEV{number}"))
        .map(PathBuf::from)
        .expect("not enough devices, or not in the guest");
    let uuid = path.file_name().unwrap();
    let kind = fs::canonicalize(path.join("mdev_type")).unwrap();
    fs::write(path.join("remove"), "1").unwrap();
    fs::write(kind.join("create"), uuid.as_bytes()).unwrap();
    path
}

/// The offset of a port's register in the device's file: each port is a BAR.
fn register(port: u8, number: i64) -> i64 {
    i64::from(port) << 40 | number
}

fn open(path: &Path) -> File {
    let opened = OpenOptions::new().read(true).write(true).open(path);
    opened.unwrap_or_else(|error: io::Error| panic!("{}: {error}", path.display()))
}
