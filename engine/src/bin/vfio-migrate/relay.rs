//! `relay`: a migration's connections in on one side and out on the other, QEMU's on both, say.
//!
//! ```text
//!   source                       relay                          destination
//!     main channel  ════▶ pump ═══════════════════════════▶ ════▶  main channel
//!                   ◀════ ◀═══════════════════════════ pump ◀════
//!     channel 0 … N ════▶ Relay: RAM and SYNC untouched,   ════▶  channel 0 … N
//!                         device state by slots and queue
//! ```
//!
//! All come to one address, and are told apart by their first bytes; for each, one connection is
//! made to the destination. The main channel may also go another way: then the number of multifd
//! channels has to be given, for its end is what says that no more will come.
//!
//! Whether the migration has passed is the destination's to say. On the return path it says SHUT with
//! 0 or another number, and a `receive` says why it has failed: that is read on the way (`main_channel`). A
//! main channel that carries no replies leaves it open.
//!
//! # Threads
//!
//! Two pump the main channel, and the `Relay` has threads of its own. The main thread takes connections in and watches over all that. It ends with
//! the last connection, a failure, Ctrl-C, or the time-outs of the options.

mod main_channel;
mod output;

use std::{
    os::fd::AsFd,
    time::{Duration, Instant},
};

use anyhow::{bail, ensure};
use vfio_migration::{Relay, Settings, Side, wire::PageSize};

use self::{main_channel::MainChannel, output::Output};
use crate::{
    Interrupted,
    acceptor::{self, Acceptor, Identified},
    args,
    connect::connect,
    host_memory::{Need, is_the_hosts},
    interrupt, limits,
    listen::Listener,
    main_channel::main_failed,
    network::{self, Address, Connection},
    observe::{ObserveArgs, Observer},
    output::{say, say_of_stranger, warn},
    tls::{self, TlsArgs, ToTlsArgs, WhoArgs},
};

/// Pass a migration on, with its devices' states through the engine
///
/// Listens on ADDR for one source, and connects to the destination once for each connection of the
/// source. It passes the main channel through, both ways. On each multifd channel it passes hello, RAM
/// and SYNC packets on untouched and in their order. It receives device-state packets, puts them in the
/// order of their idx, and sends each on the first free channel.
///
/// It ends when the source has ended all its connections, and then prints the packets of each device
/// and channel. It fails if the destination reports that the migration has failed, or replies but never
/// reports that all is loaded.
///
/// Without --tls-cert there is no authentication: anyone who can connect can send. Then it listens on a loopback
/// address or a unix socket only, or with --insecure. TLS is each side's own: --tls-... are the source's side,
/// --to-tls-... the destination's.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Where to listen: HOST:PORT (port 0: any that is free), unix:PATH, or stdin: a socket that listens
    /// already, as a service manager passes it
    #[arg(long, value_name = "ADDR")]
    listen: Address,
    #[command(flatten)]
    who: WhoArgs,
    /// Where the destination listens: HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR")]
    to: Address,
    #[command(flatten)]
    to_tls: ToTlsArgs,
    /// The number of multifd channels that will come [default: as many as come before the destination
    /// reports that all is loaded, or the main channel ends]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=255))]
    channels: Option<u32>,
    /// The memory in which packets may wait [default: 64MiB]
    ///
    /// One packet of the largest size is enough for a source that hands out each device's packets in
    /// order, as QEMU does. With more memory the channels can proceed side by side.
    #[arg(long, value_name = "SIZE", value_parser = args::memory)]
    budget: Option<usize>,
    /// The largest packet that is passed on (at least 1MiB); the budget is cut into pieces of this size
    #[arg(long, value_name = "SIZE", default_value = "1MiB", value_parser = args::packet)]
    max_packet: usize,
    /// The most devices that may come
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1024))]
    max_devices: u32,
    /// The page size of the VM's architecture, on which the size of RAM and SYNC packets depends
    #[arg(long, value_name = "SIZE", default_value = "4KiB", value_parser = args::page_size)]
    page_size: PageSize,
    /// PRE_COPY data comes over the channels too: a device's state may be incomplete for as long as the
    /// source's VM runs. Must be the same on the source and the destination
    #[arg(long)]
    precopy_over_channels: bool,
    /// The longest time without progress within a packet, a write, or an incomplete device, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = args::seconds)]
    timeout: Duration,
    /// How long to wait for a source to connect, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "600", value_parser = args::seconds)]
    accept_timeout: Duration,
    /// How long to try to connect to the destination, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = args::seconds)]
    connect_timeout: Duration,
    #[command(flatten)]
    observe: ObserveArgs,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// As many multifd channels as a migration can have: a channel's id is a byte.
const MOST_CHANNELS: u32 = 256;

impl Options {
    fn settings(&self) -> Settings {
        let mut settings = Settings::default();
        settings.budget = self.budget;
        settings.max_devices = Some(self.max_devices);
        let packet = u32::try_from(self.max_packet).unwrap_or(u32::MAX);
        settings.max_packet = packet.saturating_add(12); // the header inside
        settings.precopy_over_channels = self.precopy_over_channels;
        settings.no_progress = self.timeout;
        settings.hello_timeout = acceptor::hello_timeout(self.timeout);
        settings
    }

    fn connect(&self, tls: Option<&tls::Client>) -> anyhow::Result<Connection> {
        let (patience, timeout) = (self.connect_timeout, self.timeout);
        let mut made = connect(&self.to, tls, 1, patience, timeout, None)?;
        Ok(made.remove(0))
    }
}

// --------------------------------------------------------------------------------------- watch

/// The main thread's part.
struct Supervisor<'a> {
    options: &'a Options,
    /// Towards the destination.
    tls: Option<tls::Client>,
    observer: &'a Observer,
    acceptor: Acceptor,
    relay: &'a Relay,
    main: Option<MainChannel>,
    /// Since when nothing has been open.
    idle_since: Instant,
    /// When the main channel was seen to have ended.
    main_ended: Option<Instant>,
}

impl Supervisor<'_> {
    /// Takes in those who have come.
    fn admit(&mut self) -> anyhow::Result<()> {
        while let Some(caller) = self.acceptor.answer()? {
            match caller {
                Identified::Main(_) if self.main.is_some() => {
                    say_of_stranger("a second main channel was closed");
                }
                Identified::Main(source) => {
                    let destination = self.options.connect(self.tls.as_ref())?;
                    self.main = Some(MainChannel::start(source, destination)?);
                }
                Identified::Channel(source) => {
                    let (count, _) = self.relay.channels();
                    // A channel's id is a byte.
                    let most = self.options.channels.unwrap_or(MOST_CHANNELS) as usize;
                    ensure!(
                        count < most,
                        "the source makes more than {most} multifd channels: see --channels"
                    );
                    let destination = self.options.connect(self.tls.as_ref())?;
                    let destination = destination.into_channel()?;
                    let page_size = self.options.page_size.bytes();
                    let source = source.with_page_size(page_size)?;
                    self.relay.add_channel(source, destination)?;
                }
            }
        }
        Ok(())
    }

    /// Whether every channel has come. Looked at after those who had come were taken in.
    fn all_have_come(&self) -> bool {
        match self.options.channels {
            Some(expected) => self.relay.channels().0 >= expected as usize,
            None => {
                let main = self.main.as_ref();
                let loaded = main.is_some_and(MainChannel::is_loaded);
                (loaded || self.main_ended.is_some()) && self.acceptor.is_empty()
            }
        }
    }

    fn main_is_over(&self) -> bool {
        self.main.as_ref().is_none_or(MainChannel::is_ended)
    }

    /// Nothing may be waited for that does not come.
    ///
    /// | waits for | no longer than |
    /// |---|---|
    /// | the first connection; the channels, where no main channel has come | `--accept-timeout` |
    /// | the channels that were announced, once the main channel has ended | `--timeout` |
    /// | the channels' ends, once the main channel has ended | `--timeout` |
    /// | the other end of the main channel, once its one end and all channels have ended | `--timeout` |
    fn check_patience(&mut self) -> anyhow::Result<()> {
        let (count, open) = self.relay.channels();
        let timeout = self.options.timeout;
        let expected = self
            .options
            .channels
            .filter(|expected| count < *expected as usize);
        let ended = self.main.as_ref().map(MainChannel::ended);
        if open > 0 || ended == Some([false, false]) {
            self.idle_since = Instant::now();
        }
        if self
            .main_ended
            .is_some_and(|since| since.elapsed() > timeout)
        {
            let seconds = timeout.as_secs_f64();
            if let Some(expected) = expected {
                bail!(
                    "the main channel has ended, and {count} of {expected} multifd channels have \
                     come within {seconds} s"
                );
            }
            ensure!(
                open == 0,
                "the main channel has ended, but {open} multifd channels have not within {seconds} s"
            );
        }
        let idle = self.idle_since.elapsed();
        match ended {
            Some([source, destination]) if source != destination && idle > timeout => {
                let (gone, there) = if source {
                    ("source", "destination")
                } else {
                    ("destination", "source")
                };
                bail!(
                    "the {gone} has ended everything, and the {there} has not ended its main \
                     channel within {} s",
                    timeout.as_secs_f64()
                )
            }
            None if idle > self.options.accept_timeout => {
                let seconds = self.options.accept_timeout.as_secs_f64();
                match self.options.channels {
                    Some(expected) => {
                        bail!("{count} of {expected} multifd channels have come within {seconds} s")
                    }
                    None if count == 0 => bail!("no source has connected within {seconds} s"),
                    None => bail!(
                        "no main channel has come within {seconds} s: without one, --channels says \
                         how many multifd channels there are"
                    ),
                }
            }
            _ => Ok(()),
        }
    }

    /// Until all is over.
    fn run(&mut self) -> anyhow::Result<()> {
        loop {
            // Before a look at who has come: whoever came before the main channel's end is seen.
            if self.main.is_some() && self.main_is_over() {
                self.main_ended.get_or_insert_with(Instant::now);
            }
            self.admit()?;
            if self.all_have_come() {
                self.relay.no_more_channels();
            }
            if interrupt::requested() {
                self.relay.cancel();
                bail!(Interrupted);
            }
            if let Some(error) = self.relay.failure() {
                bail!(error);
            }
            if let Some(error) = self.main.as_mut().and_then(MainChannel::failure) {
                return Err(error);
            }
            if self.main_is_over() {
                // A migration that has failed brings no more channels.
                self.main.as_ref().map_or(Ok(()), MainChannel::check)?;
                if self.relay.is_finished() {
                    return Ok(());
                }
            }
            self.check_patience()?;
            let stats = || vec![(Side::Relay, self.relay.stats())];
            self.observer.look(stats);
            network::tick(
                self.observer.tick(),
                &[self.relay.as_fd()],
                self.acceptor.fds(),
            )?;
        }
    }
}

/// Runs `relay`.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let _in_order = interrupt::in_order();
    let files = limits::allow_relay(options.channels)?;
    let settings = options.settings();
    let need = Need {
        budgets: options
            .budget
            .unwrap_or_else(|| (64 << 20).max(4 * options.max_packet)),
        devices: 0,
        behind: 0,
        channels: options.channels.unwrap_or(4) as usize,
    };
    need.check(&settings)?;
    let tls = TlsArgs::from(options.to_tls.clone()).client(&options.to)?;
    let observer = options.observe.start()?;
    let relay = Relay::builder().settings(settings.clone()).start()?;
    let listener = Listener::bind(&options.listen, &options.who)?;
    say(&format!("listening on {}", listener.address()));
    let mut watch = Supervisor {
        options,
        tls,
        observer: &observer,
        acceptor: Acceptor::new(listener, options.timeout, limits::strangers(files)),
        relay: &relay,
        main: None,
        idle_since: Instant::now(),
        main_ended: None,
    };
    let watched = watch.run();
    let main = watch.main.take();
    if watched.is_err() {
        relay.fail(main_failed());
    }
    // And the listener with it.
    drop(watch);
    let (channels, _) = relay.channels();
    let verdict = main.as_ref().map_or(Ok(()), |main| match &watched {
        Ok(()) => main.check_all(channels),
        // Why it failed is known, here or by the destination where it says so.
        Err(_) => main.check_words(),
    });
    let main = main.map(MainChannel::close);
    let report = relay.join();
    observer.look(|| vec![(Side::Relay, report.stats.clone())]);
    let failure = watched.as_ref().err().or(verdict.as_ref().err());
    observer.finish(failure);
    // The destination knows why, if anybody does; of this host it knows nothing.
    if watched
        .as_ref()
        .is_err_and(|error| !error.is::<Interrupted>() && !is_the_hosts(error))
    {
        verdict?;
        watched?;
    } else {
        watched?;
        if let Err(error) = report.result {
            bail!(error);
        }
        verdict?;
    }
    interrupt::settled(DONE);
    warn(DONE, Output::new(&report.stats, main).print(options.json));
    Ok(())
}

const DONE: &str = "the migration has been passed on";
