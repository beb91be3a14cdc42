//! A device's name on the wire.

use std::{error, fmt, sync::Arc};

use crate::text::Printable;

/// Names a device on the wire and in every error: the `idstr` of its section and the instance id.
///
/// Two devices of one VM never share both. Cloning is a reference count.
///
/// ```
/// use vfio_migration::DeviceId;
///
/// let id = DeviceId::new("0000:00:03.0/vfio", 0)?;
/// assert_eq!(id.to_string(), "0000:00:03.0/vfio");
/// assert!(DeviceId::new("x".repeat(256), 0).is_err());
/// # Ok::<(), vfio_migration::InvalidDeviceId>(())
/// ```
#[derive(Clone, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct DeviceId {
    idstr: Arc<str>,
    instance: u32,
}

impl DeviceId {
    /// The most bytes that an idstr has: 256 on the wire, the last of them 0.
    pub const MAX_IDSTR: usize = 255;

    /// Makes a name.
    ///
    /// # Errors
    ///
    /// Where `idstr` is empty, longer than [`DeviceId::MAX_IDSTR`] bytes, or holds a NUL. It converts
    /// into an [`Error`](crate::Error) of kind [`Misuse`](crate::ErrorKind::Misuse).
    pub fn new(idstr: impl Into<Arc<str>>, instance: u32) -> Result<Self, InvalidDeviceId> {
        let idstr = idstr.into();
        if idstr.is_empty() || idstr.len() > Self::MAX_IDSTR || idstr.contains('\0') {
            return Err(InvalidDeviceId(()));
        }
        Ok(Self { idstr, instance })
    }

    /// The section's idstr, for a VFIO PCI device `0000:00:03.0/vfio`.
    #[must_use]
    pub fn idstr(&self) -> &str {
        &self.idstr
    }

    /// The instance id, 0 for every device that has an idstr of its own.
    #[must_use]
    pub const fn instance(&self) -> u32 {
        self.instance
    }
}

/// As its two parts; an instance of 0 may be left out.
#[cfg(feature = "serde")]
mod parts {
    use std::borrow::Cow;

    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

    use super::DeviceId;

    #[derive(Deserialize, Serialize)]
    #[serde(rename = "DeviceId", deny_unknown_fields)]
    struct Parts<'a> {
        idstr: Cow<'a, str>,
        #[serde(default)]
        instance: u32,
    }

    impl Serialize for DeviceId {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            let (idstr, instance) = (Cow::Borrowed(self.idstr()), self.instance());
            Parts { idstr, instance }.serialize(serializer)
        }
    }

    impl<'de> Deserialize<'de> for DeviceId {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            let Parts { idstr, instance } = Parts::deserialize(deserializer)?;
            Self::new(&*idstr, instance).map_err(D::Error::custom)
        }
    }
}

/// A text that is no idstr: see [`DeviceId::new`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct InvalidDeviceId(());

impl InvalidDeviceId {
    pub(crate) const TEXT: &str = "an idstr has 1 to 255 bytes and no NUL";
}

impl fmt::Display for InvalidDeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::TEXT)
    }
}

impl error::Error for InvalidDeviceId {}

impl fmt::Display for DeviceId {
    /// A name may be a peer's: what would steer a terminal is escaped.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Printable(&self.idstr))?;
        if self.instance != 0 {
            write!(f, "#{}", self.instance)?;
        }
        Ok(())
    }
}

impl fmt::Debug for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceId({self})")
    }
}
