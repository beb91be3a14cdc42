//! Sessions that a test waits for.

use std::{os::unix::net::UnixStream, time::Duration};

use vfio_migration::{SaveBuilder, SaveSession, Settings, SourceChannels};

/// A save over one channel that has been greeted.
pub fn greeted(near: UnixStream) -> SaveBuilder {
    let channels = SourceChannels::greet(vec![near.into()], &quick()).unwrap();
    SaveSession::builder()
        .settings(quick())
        .greeted_channels(channels)
}

/// The settings of a session that a test waits for.
pub fn quick() -> Settings {
    let mut settings = Settings::default();
    settings.grace = Duration::from_millis(500);
    settings
}
