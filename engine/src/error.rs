//! What can go wrong, sorted by what a caller would do about it, and where it happened.
//!
//! An [`Error`] is one shared allocation: the session, the device and the statistics may all hold the same
//! one. A method returns each fact that a program may need; the text is for people.

use std::{
    error, fmt, io,
    sync::{Arc, Mutex, PoisonError},
};

use nix::errno::Errno;

use crate::{
    id::{DeviceId, InvalidDeviceId},
    state::DeviceState,
};

/// The engine's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a load, a save, or a call of the VMM's failed, and where.
#[derive(Clone)]
pub struct Error(Arc<Place>);

#[derive(Clone)]
struct Place {
    kind: ErrorKind,
    /// Another failure ended this: its own kind is `Cancelled`. Not seen outside of the crate.
    aborted: bool,
    phase: Phase,
    device: Option<DeviceId>,
    channel: Option<u32>,
    index: Option<u32>,
    states: Option<(DeviceState, DeviceState)>,
    /// What the host does not have; or, of a stall, what has not come.
    lacking: Option<Arc<str>>,
    source: Option<Arc<io::Error>>,
}

/// What went wrong. One variant for each thing that a caller would do differently.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A call or a setting of the VMM's was wrong; nothing was done.
    Misuse(&'static str),
    /// The peer broke the protocol; its stream cannot be trusted any more.
    Protocol(Violation),
    /// The input ended, or cannot go on, and a packet is missing: [`Error::index`] is the first.
    Missing,
    /// A migration channel's connection failed.
    Channel,
    /// The device refused a transfer or its config; [`Error::raw_os_error`] says why.
    Device,
    /// The device refused a change of its state: [`Error::states`] says which,
    /// [`Error::raw_os_error`] why. The device has been recovered to a state it may be used in.
    State,
    /// The device could not even be reset: it is lost, and every later call on it returns this.
    Lost,
    /// A callback of the VMM's panicked.
    Panicked,
    /// Nothing has moved for the time that the settings allow.
    Stalled,
    /// The device's driver did not return a transfer within the grace time. The memory that the kernel still
    /// holds has been leaked, and the device must not be touched again.
    Stuck,
    /// The spill file failed: [`Error::raw_os_error`] says how. The device that the error names lacks the
    /// packet.
    Spill,
    /// The host could not give the ring, a thread, or memory.
    Host,
    /// The device, or this VM with it, cannot be migrated.
    Unmigratable(Refusal),
    /// The device has new initial data and asks the switchover to wait, but the switchover was already decided.
    LateRequest,
    /// The embedder cancelled. Of one device or packet: or the session has failed for a reason that is not its
    /// own.
    Cancelled,
    /// A mistake of this engine's own, caught before it could do harm.
    Internal(&'static str),
}

/// Why a device, or a VM with it, cannot be migrated.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum Refusal {
    /// The VMM has switched migration off for the device.
    SwitchedOff,
    /// The kernel has no migration for any such device (`ENOTTY`).
    NoKernelSupport,
    /// The device has no migration, or not even STOP_COPY.
    NoDeviceSupport,
    /// Nothing tracks the memory to which the device writes.
    NoDirtyTracking,
    /// The device's addresses are a vIOMMU's.
    Viommu,
    /// The VM has several devices, and this one has no P2P state. In a P2P state a device leaves the others
    /// alone
    /// while they stop.
    SeveralWithoutP2p,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SwitchedOff => "migration is switched off for the device",
            Self::NoKernelSupport => "the kernel has no migration for the device",
            Self::NoDeviceSupport => "the device has no migration",
            Self::NoDirtyTracking => "nothing tracks the memory that the device writes to",
            Self::Viommu => "a vIOMMU is in the way",
            Self::SeveralWithoutP2p => {
                "several devices are migrated together only where each has P2P"
            }
        })
    }
}

/// The phase of a device's migration in which an error happened.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum Phase {
    /// Before any packet: settings, threads, the state change to RESUMING or STOP_COPY.
    Setup,
    /// A channel, from its hello to the packet's publication.
    Receive,
    /// The ordered writes to the data fd.
    Load,
    /// Saving or loading the device's config.
    Config,
    /// The ordered reads from the data fd.
    Save,
    /// A channel, from taking a packet to sending its last byte.
    Send,
    /// The device's section of the main channel.
    Section,
    /// A change of the device's state, outside the phases above.
    State,
    /// After the last byte: states, fds, threads.
    Cleanup,
}

/// A rule of the wire protocol that a peer's bytes broke.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Violation {
    /// A hello or a packet does not begin with the multifd magic.
    Magic(u32),
    /// A multifd version that this engine does not speak.
    Version(u32),
    /// The hello's VM uuid is not this VM's.
    Uuid,
    /// The hello's channel id is not below the number of channels.
    ChannelId {
        /// The id.
        id: u8,
        /// The number of channels.
        channels: u32,
    },
    /// Two channels' hellos had one id.
    ChannelIdTwice(u8),
    /// Unknown multifd flag bits, or flags that exclude each other.
    Flags(u32),
    /// A device-state packet says that it is compressed.
    Compressed(u32),
    /// The idstr has no NUL at its end.
    Idstr,
    /// `next_packet_size` is 0.
    EmptyPacket,
    /// `next_packet_size` is above the maximum.
    PacketTooLarge {
        /// What it says.
        len: u32,
        /// The maximum in force.
        max: u32,
    },
    /// The channel ended inside a packet.
    Truncated,
    /// A device-state payload is shorter than its 12-byte header.
    PacketTooShort(u32),
    /// A device-state payload of an unknown version.
    PacketVersion(u32),
    /// Unknown flag bits in a device-state payload.
    PacketFlags(u32),
    /// idx 0xffffffff.
    InvalidIndex,
    /// A packet with this idx has come before.
    DuplicateIndex,
    /// A packet with this idx has already been written.
    IndexAlreadyWritten,
    /// An idx above the config packet's.
    IndexAboveConfig {
        /// The config packet's idx.
        config: u32,
    },
    /// A config packet below an idx that has come before.
    ConfigBelowIndex {
        /// The highest idx so far.
        highest: u32,
    },
    /// A second config packet.
    SecondConfig {
        /// The first one's idx.
        first: u32,
    },
    /// No such device here.
    UnknownDevice {
        /// The idstr, made printable.
        idstr: String,
        /// The instance id.
        instance: u32,
    },
    /// This device's data does not come over multifd channels.
    MultifdNotInUse,
    /// A RAM or SYNC packet on a channel that was built without a sink for them.
    RamPacket,
    /// A RAM packet whose counts or sizes cannot be.
    RamLayout(&'static str),
    /// The config does not begin with its tag, or does not end where its loader stopped.
    ConfigFraming(&'static str),
    /// Bytes after the config's end tag.
    ConfigTrailing(u64),
    /// A tag that a device's section cannot have here.
    SectionTag(u64),
    /// PRE_COPY data over the channels
    /// ([`Capabilities::precopy_over_channels`](crate::migration::Capabilities::precopy_over_channels)) is on at one
    /// end alone.
    PrecopyOverChannels {
        /// At this one; otherwise at the source.
        here: bool,
    },
    /// Config-after-iterables is on at one end alone, for this device. Where that is the destination the
    /// engine sees only that the notice does not come ([`ErrorKind::Stalled`]): who reads the main channel
    /// sees that its FULL section brings none.
    ConfigAfterIterables {
        /// At this one; otherwise at the source.
        here: bool,
    },
    /// A section's structure is broken, or the main channel's.
    Section(&'static str),
    /// A section stands where it may not, or lacks what must stand there.
    SectionOrder {
        /// Its section id.
        section: u32,
        /// What is wrong.
        what: &'static str,
    },
    /// The main channel has something of an unknown type, or one that cannot stand here.
    SectionType(u8),
    /// A control message is broken, stands where it may not, or does not fit the devices here.
    Message(&'static str),
    /// A control message of a version that this engine does not speak.
    MessageVersion(u16),
    /// The main channel, or the return path, ended inside something.
    SectionTruncated {
        /// How many bytes had come since the reading began.
        offset: u64,
    },
}

impl Error {
    /// Makes an error of `kind`, met in `phase`.
    #[must_use]
    pub fn new(kind: ErrorKind, phase: Phase) -> Self {
        Self(Arc::new(Place {
            kind,
            aborted: false,
            phase,
            device: None,
            channel: None,
            index: None,
            states: None,
            lacking: None,
            source: None,
        }))
    }

    /// Makes an error for a wrong call or setting of the VMM's: `what` is wrong.
    #[must_use]
    pub fn misuse(phase: Phase, what: &'static str) -> Self {
        Self::new(ErrorKind::Misuse(what), phase)
    }

    /// Two devices of one migration have this name.
    pub(crate) fn two_devices_named(id: &DeviceId) -> Self {
        Self::misuse(Phase::Setup, "two devices of one name").on_device(id)
    }

    /// A broken rule of the wire, met while receiving.
    #[must_use]
    pub fn protocol(violation: Violation) -> Self {
        Self::new(ErrorKind::Protocol(violation), Phase::Receive)
    }

    /// A cancellation, met in `phase`.
    #[must_use]
    pub fn cancelled(phase: Phase) -> Self {
        Self::new(ErrorKind::Cancelled, phase)
    }

    /// Ended in `phase` because the session has failed, or does, for another reason: never that reason
    /// itself ([`FirstFailure::fail`](crate::first_failure::FirstFailure::fail)).
    pub(crate) fn aborted(phase: Phase) -> Self {
        Self::cancelled(phase).with(|place| place.aborted = true)
    }

    /// Time is up: `missing` says what has not come.
    #[must_use]
    pub fn stalled(phase: Phase, missing: impl Into<String>) -> Self {
        let missing: String = missing.into();
        Self::new(ErrorKind::Stalled, phase).with(|place| place.lacking = Some(missing.into()))
    }

    /// The host does not have `what`, and said why.
    #[must_use]
    pub fn lacking(phase: Phase, what: &str, source: impl Into<io::Error>) -> Self {
        Self::new(ErrorKind::Host, phase)
            .with(|place| place.lacking = Some(what.into()))
            .caused_by(source)
    }

    fn with(mut self, change: impl FnOnce(&mut Place)) -> Self {
        change(Arc::make_mut(&mut self.0));
        self
    }

    /// Names the device.
    #[must_use]
    pub fn on_device(self, device: &DeviceId) -> Self {
        self.with(|place| place.device = Some(device.clone()))
    }

    /// Names the channel, by its position in the order given to the session.
    #[must_use]
    pub fn on_channel(self, channel: u32) -> Self {
        self.with(|place| place.channel = Some(channel))
    }

    /// Names the packet.
    #[must_use]
    pub fn at_index(self, index: u32) -> Self {
        self.with(|place| place.index = Some(index))
    }

    /// Names the change of state: the state before, and the state that was asked for.
    #[must_use]
    pub fn between(self, from: DeviceState, to: DeviceState) -> Self {
        self.with(|place| place.states = Some((from, to)))
    }

    /// Replaces the kind, and keeps the place and the cause.
    #[must_use]
    pub fn with_kind(self, kind: ErrorKind) -> Self {
        self.with(|place| {
            (place.kind, place.aborted) = (kind, false);
            place.lacking = None;
        })
    }

    /// Names the phase anew.
    #[must_use]
    pub fn in_phase(self, phase: Phase) -> Self {
        self.with(|place| place.phase = phase)
    }

    /// Adds what the kernel, or a callback, said.
    #[must_use]
    pub fn caused_by(self, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        self.with(|place| place.source = Some(Arc::new(source)))
    }

    /// What went wrong.
    #[must_use]
    pub fn kind(&self) -> &ErrorKind {
        &self.0.kind
    }

    /// Where in the migration.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.0.phase
    }

    /// Returns the device, if the error is one device's.
    #[must_use]
    pub fn device(&self) -> Option<&DeviceId> {
        self.0.device.as_ref()
    }

    /// Returns the channel, if the error is one channel's.
    #[must_use]
    pub fn channel(&self) -> Option<u32> {
        self.0.channel
    }

    /// Returns the packet's idx, if the error is one packet's.
    #[must_use]
    pub fn index(&self) -> Option<u32> {
        self.0.index
    }

    /// Returns the old state and the requested state, if the error is a state change's.
    #[must_use]
    pub fn states(&self) -> Option<(DeviceState, DeviceState)> {
        self.0.states
    }

    /// Returns the kernel's errno, if one is the cause.
    #[must_use]
    pub fn raw_os_error(&self) -> Option<i32> {
        let source = self.0.source.as_ref()?;
        // An implementation may have put words around it.
        source.raw_os_error().or_else(|| {
            let inner = source.get_ref()?.source()?;
            inner.downcast_ref::<io::Error>()?.raw_os_error()
        })
    }

    /// What a trace says of a call: 0, or the negative errno; `EINVAL` where none is behind the error.
    pub(crate) fn trace_errno<T>(result: &Result<T>) -> i32 {
        let errno = |error: &Self| -error.raw_os_error().unwrap_or(Errno::EINVAL as i32);
        result.as_ref().map_or_else(errno, |_| 0)
    }

    /// Whether it is another failure that ended this.
    pub(crate) fn is_aborted(&self) -> bool {
        self.0.aborted
    }

    /// Converts the error for the VMM, to which an abort is a cancellation.
    pub(crate) fn into_public(self) -> Self {
        if self.0.aborted {
            return self.with(|place| place.aborted = false);
        }
        self
    }

    /// Whether the cause is a cancellation, not a failure.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.kind == ErrorKind::Cancelled
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("kind", &self.0.kind)
            .field("phase", &self.0.phase)
            .field("device", &self.0.device)
            .field("channel", &self.0.channel)
            .field("index", &self.0.index)
            .field("states", &self.0.states)
            .field("lacking", &self.0.lacking)
            .field("source", &self.0.source)
            .finish()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Lower case, no full stop. Of the source only the errno's name: reporters walk the chain themselves.
        write!(f, "{}", self.0.phase)?;
        if let Some(device) = &self.0.device {
            write!(f, ", device {device}")?;
        }
        if let Some(channel) = self.0.channel {
            write!(f, ", channel {channel}")?;
        }
        if let Some(index) = self.0.index {
            write!(f, ", idx {index}")?;
        }
        if let Some((from, to)) = self.0.states {
            write!(f, ", {from} to {to}")?;
        }
        match (&self.0.lacking, &self.0.kind) {
            (Some(what), ErrorKind::Host) => write!(f, ": the host has no {what}")?,
            (Some(what), ErrorKind::Stalled) => write!(f, ": {}: {what}", ErrorKind::Stalled)?,
            (_, kind) => write!(f, ": {kind}")?,
        }
        match self.raw_os_error() {
            Some(errno) => match Errno::from_raw(errno) {
                Errno::UnknownErrno => write!(f, " (errno {errno})"),
                errno => write!(f, " ({errno:?})"),
            },
            None => Ok(()),
        }
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

/// An error, together with the values that the caller had handed over.
///
/// It converts into an [`Error`] and is `Send + Sync`, so `?` works; the values are dropped then.
#[derive(Debug)]
#[non_exhaustive]
pub struct Failed<T> {
    /// Why.
    pub error: Error,
    /// Behind a lock that is never taken: a device may be `Send` alone.
    back: Mutex<T>,
}

impl<T> Failed<T> {
    pub(crate) const fn new(error: Error, back: T) -> Self {
        Self {
            error,
            back: Mutex::new(back),
        }
    }

    /// Returns the values that were handed over, put back. Each device says what must be done about it
    /// ([`Device::duty`](crate::Device::duty)). A missing device has a call stuck in it, and must not be
    /// touched.
    pub fn into_back(self) -> T {
        self.into_parts().1
    }

    /// Borrows the values that were handed over.
    pub fn back_mut(&mut self) -> &mut T {
        self.back.get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the error and the values that were handed over: see [`Failed::into_back`].
    pub fn into_parts(self) -> (Error, T) {
        let back = self
            .back
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        (self.error, back)
    }
}

impl<T> fmt::Display for Failed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<T: fmt::Debug> error::Error for Failed<T> {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        error::Error::source(&self.error)
    }
}

impl<T> From<Failed<T>> for Error {
    fn from(failed: Failed<T>) -> Self {
        failed.error
    }
}

impl From<InvalidDeviceId> for Error {
    fn from(_: InvalidDeviceId) -> Self {
        Self::misuse(Phase::Setup, InvalidDeviceId::TEXT)
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Misuse(what) => write!(f, "wrong use: {what}"),
            Self::Protocol(violation) => write!(f, "{violation}"),
            Self::Missing => f.write_str("the input has ended without this packet"),
            Self::Channel => f.write_str("the connection failed"),
            Self::Device => f.write_str("the device refused"),
            Self::State => f.write_str("the device refused the state"),
            Self::Lost => f.write_str("the device is lost: its reset failed"),
            Self::Panicked => f.write_str("a callback panicked"),
            Self::Stalled => f.write_str("no progress for the time allowed"),
            Self::Stuck => f.write_str("the device did not end its transfer within the grace time"),
            Self::Spill => f.write_str("the spill file failed"),
            Self::Host => f.write_str("the host has no means for this"),
            Self::Unmigratable(refusal) => write!(f, "no migration: {refusal}"),
            Self::LateRequest => f.write_str("new initial data after the switchover was decided"),
            Self::Cancelled => f.write_str("operation cancelled"),
            Self::Internal(what) => write!(f, "internal error: {what}"),
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Setup => "setup",
            Self::Receive => "receive",
            Self::Load => "load",
            Self::Config => "config",
            Self::Save => "save",
            Self::Send => "send",
            Self::Section => "section",
            Self::State => "state",
            Self::Cleanup => "cleanup",
        })
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic(magic) => write!(f, "magic {magic:#010x} is not multifd's"),
            Self::Version(version) => write!(f, "unknown multifd version {version}"),
            Self::Uuid => f.write_str("the hello's uuid is another VM's"),
            Self::ChannelId { id, channels } => {
                write!(f, "the hello's channel id {id} is not below {channels}")
            }
            Self::ChannelIdTwice(id) => write!(f, "a second hello with channel id {id}"),
            Self::Flags(flags) => write!(f, "impossible packet flags {flags:#x}"),
            Self::Compressed(flags) => {
                write!(f, "compressed packet, flags {flags:#x}")
            }
            Self::Idstr => f.write_str("idstr without a NUL at its end"),
            Self::EmptyPacket => f.write_str("packet of size 0"),
            Self::PacketTooLarge { len, max } => {
                write!(f, "packet of {len} bytes, the maximum is {max}")
            }
            Self::Truncated => f.write_str("the channel ended inside a packet"),
            Self::PacketTooShort(len) => {
                write!(f, "packet of {len} bytes is shorter than its header")
            }
            Self::PacketVersion(version) => write!(f, "unknown packet version {version}"),
            Self::PacketFlags(flags) => write!(f, "unknown packet flags {flags:#x}"),
            Self::InvalidIndex => f.write_str("idx 0xffffffff is not valid"),
            Self::DuplicateIndex => f.write_str("a second packet with this idx"),
            Self::IndexAlreadyWritten => f.write_str("this idx has been written already"),
            Self::IndexAboveConfig { config } => {
                write!(f, "idx above the config packet's, {config}")
            }
            Self::ConfigBelowIndex { highest } => {
                write!(
                    f,
                    "config packet below idx {highest}, which has come before"
                )
            }
            Self::SecondConfig { first } => {
                write!(f, "a second config packet, the first had idx {first}")
            }
            Self::UnknownDevice { idstr, instance } => {
                write!(f, "no device {idstr:?} with instance {instance} here")
            }
            Self::MultifdNotInUse => f.write_str("this device does not use multifd transfer"),
            Self::RamPacket => f.write_str("RAM or SYNC packet on a channel without a sink for it"),
            Self::RamLayout(what) => write!(f, "RAM packet: {what}"),
            Self::ConfigFraming(what) => write!(f, "the config has {what}"),
            Self::ConfigTrailing(len) => write!(f, "{len} bytes after the config's end"),
            Self::SectionTag(tag) => write!(f, "unexpected tag {tag:#018x} in a device's section"),
            Self::PrecopyOverChannels { here: true } => f.write_str(
                "PRE_COPY data over the channels is on here; the source does not send it",
            ),
            Self::PrecopyOverChannels { here: false } => {
                f.write_str("the source sends PRE_COPY data over the channels; that is off here")
            }
            Self::ConfigAfterIterables { here: true } => f.write_str(
                "config-after-iterables is on here; the source does not say when the config may \
                 be loaded",
            ),
            Self::ConfigAfterIterables { here: false } => f.write_str(
                "the source says when the config may be loaded, and config-after-iterables is off \
                 here",
            ),
            Self::Section(what) => f.write_str(what),
            Self::SectionOrder { section, what } => write!(f, "{what}, section id {section}"),
            Self::SectionType(kind) => write!(f, "unexpected section type {kind:#04x}"),
            Self::Message(what) => f.write_str(what),
            Self::MessageVersion(version) => {
                write!(f, "unknown version {version} of control messages")
            }
            Self::SectionTruncated { offset } => {
                write!(f, "the stream ended after {offset} bytes, inside something")
            }
        }
    }
}
