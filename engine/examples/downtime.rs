//! When to stop the VM: when all that is left can be sent within the downtime limit.

use std::{
    os::unix::net::UnixStream,
    thread,
    time::{Duration, Instant},
};

use vfio_migration::{
    Error, Phase, Result, SourceChannels,
    migration::{
        OutgoingDevice,
        vm::{self, Reason},
    },
    stream::{SectionKind, Writer},
};

/// What the VM's owner has set.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How long the VM may stand still.
    pub downtime: Duration,
    /// What the connections carry, in bytes a second, until that has been measured.
    pub bandwidth: u64,
    /// How long the VM may run on before the migration is given up.
    pub precopy: Duration,
}

/// A rate is measured over this time at least, and over this many bytes: fewer only fill buffers.
const WINDOW: (Duration, u64) = (Duration::from_millis(100), 4 << 20);

/// Iterates while the VM runs; stops it when little enough is left.
pub fn converge(
    sources: &mut [OutgoingDevice],
    channels: &mut SourceChannels,
    main: &mut Writer<&UnixStream>,
    limits: &Limits,
) -> Result<()> {
    let (began, mut bandwidth) = (Instant::now(), limits.bandwidth);
    let (mut since, mut sent) = (began, 0);
    loop {
        let mut round = 0;
        for (id, source) in (0..).zip(sources.iter_mut()) {
            // Also a device that has nothing: this is how it says that its initial data is sent.
            let owner = source.id().clone();
            let part = main.device_section(SectionKind::Part, id, &owner, |body| {
                source.iterate_over(channels, body)
            })?;
            round += part.bytes as u64;
        }
        // … a round of RAM's dirty pages; their bytes belong to `round`, and what is left to `left` …
        if let Some(error) = channels.failure() {
            return Err(error);
        }
        sent += round;
        let elapsed = since.elapsed();
        if elapsed >= WINDOW.0 {
            if sent >= WINDOW.1 {
                bandwidth = u64::try_from(u128::from(sent) * 1_000_000 / elapsed.as_micros())
                    .unwrap_or(u64::MAX);
            }
            (since, sent) = (Instant::now(), 0);
        }
        let fits = u128::from(bandwidth) * limits.downtime.as_micros() / 1_000_000;
        let mut left: u64 = sources.iter().map(|it| it.pending_estimate().total()).sum();
        if round == 0 || u128::from(left) <= fits {
            // Asks the drivers, so not in every round.
            left = 0;
            for source in sources.iter_mut() {
                left += source.pending_exact()?.total();
            }
            let ready = sources.iter().all(OutgoingDevice::is_switchover_ready);
            if ready && u128::from(left) <= fits {
                // … the processors stop …
                return vm::stop(sources, Reason::FinishMigration);
            }
        }
        if began.elapsed() > limits.precopy {
            return Err(Error::stalled(
                Phase::Save,
                format!("{left} bytes are left, {fits} fit the downtime limit"),
            ));
        }
        if round == 0 {
            thread::sleep(Duration::from_millis(20)); // they have nothing now
        }
    }
}
