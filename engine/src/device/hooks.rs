//! What a VMM does about a device beside the kernel's calls: four hooks, and the frame around its config.
//!
//! ```text
//!   Device ──▶ Hooked ─┬─▶ the device      every call
//!                      └─▶ Hooks           save_config, load_config, after_reset, event
//!
//!   the config, as the device's writer and reader have it:   length (be32) │ the hook's bytes
//! ```
//!
//! The hooks run on the device's own thread, one call at a time, as the device's calls do. A call lasts as long as
//! its hook takes; nothing here waits.
//!
//! The length is a peer's word: above [`MAX_CONFIG_LEN`] it is refused before any memory is taken, and up to there
//! only bytes that have come are touched.

use std::{
    fmt,
    io::{self, Read, Write},
    os::fd::{BorrowedFd, OwnedFd},
};

use super::{MigrationDevice, StateEvent};
use crate::state::{DeviceState, MigrationFlags, PrecopyInfo};

/// The longest config of [`Hooks::save_config`], in bytes: 16 MiB. Over the channels a config must also fit
/// [`Settings::max_packet`](crate::Settings::max_packet).
pub const MAX_CONFIG_LEN: usize = 16 << 20;

/// What a VMM does about a device beside the kernel's calls. Every method has a body that does nothing.
///
/// `VfioDevice::with_hooks` adds them to the kernel's device, and [`Hooked::new`] to any other.
///
/// # Threads
///
/// As for [`MigrationDevice`]: one call at a time, on the device's own thread, never on the I/O thread. A hook may
/// block, which holds up this device alone. A panic is caught, and is this device's error.
///
/// ```
/// # #[cfg(feature = "sim")] {
/// use std::{io, sync::{Arc, Mutex}};
/// use vfio_migration::{Device, DeviceId, Hooked, Hooks, sim::{SimConfig, SimDevice}};
///
/// /// The VMM's half of the device: its interrupts, its config space.
/// #[derive(Default)]
/// struct Half { config: String, armed: bool }
///
/// struct Shared(Arc<Mutex<Half>>);
///
/// impl Hooks for Shared {
///     fn save_config(&mut self) -> io::Result<Vec<u8>> {
///         Ok(self.0.lock().unwrap().config.clone().into())
///     }
///
///     fn load_config(&mut self, config: &[u8]) -> io::Result<()> {
///         let config = String::from_utf8(config.to_vec()).map_err(io::Error::other)?;
///         self.0.lock().unwrap().config = config;
///         Ok(())
///     }
///
///     fn after_reset(&mut self) -> io::Result<()> {
///         self.0.lock().unwrap().armed = true; // interrupts, PCI_COMMAND
///         Ok(())
///     }
/// }
///
/// let half = Arc::new(Mutex::new(Half::default()));
/// let sim = SimDevice::new(SimConfig::default())?;
/// let hooked = Hooked::new(sim, Shared(half.clone()));
/// let mut device = Device::new(DeviceId::new("0000:00:03.0/vfio", 0)?, Box::new(hooked))?;
/// device.load_config(&mut &b"\0\0\0\x05bar 0"[..])?;
/// device.reset()?;
/// assert!(half.lock().unwrap().armed);
/// assert_eq!(half.lock().unwrap().config, "bar 0");
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Hooks: Send {
    /// Returns what the VMM keeps of the device, in whatever form it likes; [`MAX_CONFIG_LEN`] bytes at most. The
    /// engine puts the length in front. The provided method returns nothing.
    ///
    /// # Errors
    ///
    /// The reason why it cannot be saved. The migration fails.
    fn save_config(&mut self) -> io::Result<Vec<u8>> {
        Ok(Vec::new())
    }

    /// Takes what [`Hooks::save_config`] returned on the source: all of it, in one piece. Its content is the peer's
    /// word and must be checked. The provided method refuses a config that is not empty.
    ///
    /// # Errors
    ///
    /// What is wrong with the config. The migration fails.
    fn load_config(&mut self, config: &[u8]) -> io::Result<()> {
        if config.is_empty() {
            return Ok(());
        }
        Err(invalid("a config for a device that keeps none"))
    }

    /// The device has been reset: its interrupts, its `PCI_COMMAND` and its BARs are as after power-on, and must be
    /// set again before the device is used. The provided method does nothing.
    ///
    /// Called after every reset of the engine's, also after one that a failed migration needed. [`Device::was_reset`]
    /// tells afterwards whether there was one.
    ///
    /// # Errors
    ///
    /// What cannot be set again. The device is then lost, as if the reset had failed ([`Duty::Close`]).
    ///
    /// [`Device::was_reset`]: crate::Device::was_reset
    /// [`Duty::Close`]: crate::Duty::Close
    fn after_reset(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// As [`MigrationDevice::event`]: the device's state has changed. The provided method ignores it.
    fn event(&mut self, event: StateEvent) {
        let _ = event;
    }
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// A device with [`Hooks`]: the hooks have the config, and everything else is the device's.
///
/// One thread at a time calls it, as every [`MigrationDevice`].
pub struct Hooked<D, H> {
    device: D,
    hooks: H,
}

impl<D, H> Hooked<D, H> {
    /// Adds hooks to a device. The device's own config, if it has one, is no longer used.
    pub const fn new(device: D, hooks: H) -> Self {
        Self { device, hooks }
    }
}

impl<D: MigrationDevice, H: Hooks> MigrationDevice for Hooked<D, H> {
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
        self.hooks.after_reset()
    }

    fn data_size(&self) -> io::Result<u64> {
        self.device.data_size()
    }

    fn precopy_info(&self, fd: BorrowedFd<'_>) -> io::Result<PrecopyInfo> {
        self.device.precopy_info(fd)
    }

    fn enable_precopy_info_v2(&mut self) -> io::Result<()> {
        self.device.enable_precopy_info_v2()
    }

    fn read_precopy(&mut self, fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
        self.device.read_precopy(fd, buffer)
    }

    fn save_config(&mut self, writer: &mut dyn Write) -> io::Result<()> {
        let config = self.hooks.save_config()?;
        let len = u32::try_from(config.len()).unwrap_or(u32::MAX);
        if len as usize > MAX_CONFIG_LEN {
            return Err(invalid("a config of more than 16 MiB"));
        }
        writer.write_all(&len.to_be_bytes())?;
        writer.write_all(&config)
    }

    fn load_config(&mut self, reader: &mut dyn Read) -> io::Result<()> {
        let mut len = [0; 4];
        reader.read_exact(&mut len)?;
        let len = u32::from_be_bytes(len) as usize;
        if len > MAX_CONFIG_LEN {
            return Err(invalid("a config of more than 16 MiB"));
        }
        let mut config = Vec::new();
        config.try_reserve_exact(len)?;
        if reader.take(len as u64).read_to_end(&mut config)? < len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.hooks.load_config(&config)
    }

    fn event(&mut self, event: StateEvent) {
        self.device.event(event);
        self.hooks.event(event);
    }
}

impl<D: fmt::Debug, H> fmt::Debug for Hooked<D, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hooked")
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::{
        device::{Device, Duty, FdDevice, Recover},
        error::ErrorKind,
        id::DeviceId,
    };

    /// What the hooks were asked, and what they answer.
    #[derive(Default)]
    struct Asked {
        config: Vec<u8>,
        loaded: Vec<Vec<u8>>,
        resets: usize,
        refuses: bool,
        events: Vec<StateEvent>,
    }

    #[derive(Clone, Default)]
    struct Vmm(Arc<Mutex<Asked>>);

    impl Hooks for Vmm {
        fn save_config(&mut self) -> io::Result<Vec<u8>> {
            Ok(self.0.lock().unwrap().config.clone())
        }

        fn load_config(&mut self, config: &[u8]) -> io::Result<()> {
            self.0.lock().unwrap().loaded.push(config.to_vec());
            Ok(())
        }

        fn after_reset(&mut self) -> io::Result<()> {
            let mut asked = self.0.lock().unwrap();
            asked.resets += 1;
            if asked.refuses {
                return Err(io::Error::other("no interrupts"));
            }
            Ok(())
        }

        fn event(&mut self, event: StateEvent) {
            self.0.lock().unwrap().events.push(event);
        }
    }

    struct None;

    impl Hooks for None {}

    fn device(hooks: impl Hooks + 'static) -> Device {
        let null = |_state| Ok(std::fs::File::open("/dev/null")?.into());
        let device = Hooked::new(FdDevice::new(null), hooks);
        Device::new(DeviceId::new("nic", 0).unwrap(), Box::new(device)).unwrap()
    }

    #[test]
    fn a_config_is_framed_by_its_length_and_taken_in_one_piece() {
        let vmm = Vmm::default();
        let mut device = device(vmm.clone());
        let mut saved = Vec::new();
        device.save_config(&mut saved).unwrap();
        assert_eq!(saved, [0; 4]);
        saved.clear();
        vmm.0.lock().unwrap().config = b"bars".to_vec();
        device.save_config(&mut saved).unwrap();
        assert_eq!(saved, b"\0\0\0\x04bars");
        // As on the main channel: other bytes follow, and stay.
        saved.extend(b"rest");
        let mut rest = &saved[..];
        assert_eq!(device.load_config(&mut rest).unwrap(), 8);
        assert_eq!(rest, b"rest");
        assert_eq!(vmm.0.lock().unwrap().loaded, [b"bars"]);
    }

    #[test]
    fn a_length_that_lies_is_refused_by_device() {
        let vmm = Vmm::default();
        let mut device = device(vmm.clone());
        let huge = u32::try_from(MAX_CONFIG_LEN + 1).unwrap().to_be_bytes();
        for (bytes, kind) in [
            (&huge[..], io::ErrorKind::InvalidData),
            (&[0xff; 9], io::ErrorKind::InvalidData),
            (b"\0\0\0\x05bars", io::ErrorKind::UnexpectedEof),
            (b"\0\0", io::ErrorKind::UnexpectedEof),
        ] {
            let error = device.load_config(&mut { bytes }).unwrap_err();
            assert_eq!(error.device().unwrap().idstr(), "nic");
            let source = std::error::Error::source(&error).unwrap();
            assert_eq!(source.downcast_ref::<io::Error>().unwrap().kind(), kind);
        }
        assert!(vmm.0.lock().unwrap().loaded.is_empty());
        vmm.0.lock().unwrap().config = vec![0; MAX_CONFIG_LEN + 1];
        device.save_config(&mut io::sink()).unwrap_err();
    }

    #[test]
    fn without_a_hook_only_an_empty_config_is_right() {
        let mut device = device(None);
        let mut saved = Vec::new();
        device.save_config(&mut saved).unwrap();
        device.load_config(&mut &saved[..]).unwrap();
        device.load_config(&mut &b"\0\0\0\x01x"[..]).unwrap_err();
        device.reset().unwrap();
    }

    #[test]
    fn every_reset_is_told_and_a_hook_that_fails_loses_the_device() {
        let vmm = Vmm::default();
        let mut device = device(vmm.clone());
        device.reset().unwrap();
        assert!(device.was_reset());
        device
            .set_state(DeviceState::PreCopy, Recover::Reset)
            .unwrap_err();
        assert_eq!(vmm.0.lock().unwrap().resets, 2);
        device.set_state(DeviceState::Stop, Recover::Reset).unwrap();
        let expected = [DeviceState::Stop].map(StateEvent::State);
        assert_eq!(vmm.0.lock().unwrap().events, expected);
        vmm.0.lock().unwrap().refuses = true;
        assert_eq!(*device.reset().unwrap_err().kind(), ErrorKind::Lost);
        assert_eq!(device.duty(), Duty::Close);
    }
}
