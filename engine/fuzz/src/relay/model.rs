//! A relay under way: its channels, its devices, what was sent, and how it starts.

use std::{collections::BTreeSet, time::Duration};

use vfio_migration::{
    Relay, Settings,
    wire::{self, Framer, Hello, PageSize},
};

use crate::{
    input::Input,
    outgoing::Destination,
    source::{self, HOUR},
    steps,
    stream::{Feed, Piece},
};

/// Data sizes: none, tiny, about a page, about a channel's staging, the largest.
pub(super) const SIZES: [usize; 10] = [0, 1, 7, 100, 4095, 4096, 20_000, 32_768, 70_001, 1 << 20];

/// How many bytes may be sent before packets get small.
pub(super) const MOST: usize = 32 << 20;

/// The budget's buffers, each of the largest packet with its headers, in whole pages.
pub(super) const BUFFER: usize = (1 << 20) + 4096;

/// One device of the source's.
#[derive(Default)]
pub(super) struct Dev {
    pub(super) data: BTreeSet<u32>,
    pub(super) config: Option<u32>,
    /// The next idx that a good source would send.
    pub(super) next: u32,
}

/// One channel of the source's.
pub(super) struct Chan {
    pub(super) feed: Feed,
    /// All that was sent.
    pub(super) bytes: Vec<u8>,
    /// What of the last packet has not been sent.
    pub(super) rest: Vec<u8>,
    /// Its SYNCs, whole or not.
    pub(super) syncs: u32,
    /// Nothing more may be sent.
    pub(super) over: bool,
    /// A read has failed.
    pub(super) failed: bool,
}

impl Chan {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.bytes.extend(bytes);
            self.feed.push(Piece::Bytes(bytes.to_vec()));
        }
    }

    pub(super) fn send_rest(&mut self) {
        let rest = std::mem::take(&mut self.rest);
        self.push(&rest);
    }

    pub(super) fn end(&mut self) {
        self.over = true;
        self.feed.push(Piece::End);
    }
}

/// A relay under way.
pub(super) struct Run {
    pub(super) relay: Relay,
    pub(super) destination: Destination,
    pub(super) channels: Vec<Chan>,
    pub(super) devices: Vec<Dev>,
    pub(super) page_size: PageSize,
    pub(super) max_devices: usize,
    /// Lines have credit only where the input gives it.
    pub(super) credits: bool,
    /// No further channel may be added.
    pub(super) complete: bool,
    /// Something else than the source's bytes gave it a reason to fail.
    pub(super) called_off: bool,
    /// The source kept to what a relay may rely on.
    pub(super) orderly: bool,
    /// Each packet's data is its own.
    pub(super) salt: u64,
}

impl Run {
    pub(super) fn start(input: &mut Input<'_>) -> Self {
        let flags = input.byte();
        let mut settings = Settings::default();
        settings.max_packet = wire::LEAST_MAX_PACKET;
        settings.budget = Some(BUFFER * input.one_of(&[1, 2, 3, 6]));
        settings.window = input.one_of(&[1, 2, 5, 1 << 16]);
        settings.max_devices = Some(input.one_of(&[3, 1, 64]));
        settings.grace = Duration::ZERO;
        settings.no_progress = HOUR;
        settings.hello_timeout = HOUR;
        settings.packet_timeout = HOUR;
        let spawn = |task: vfio_migration::Task| {
            let name = task.thread_name().to_owned();
            steps::spawn(name, move || task.run());
            Ok(())
        };
        let relay = Relay::builder()
            .settings(settings.clone())
            .spawn_with(spawn)
            .start()
            .expect("all that a relay needs");
        let page_size = if flags & 2 == 0 { 4096 } else { 65_536 };
        let mut run = Self {
            relay,
            destination: Destination::default(),
            channels: Vec::new(),
            devices: (0..4).map(|_| Dev::default()).collect(),
            page_size: PageSize::new(page_size).expect("a page size"),
            max_devices: settings.max_devices.expect("set") as usize,
            credits: flags & 4 != 0,
            complete: false,
            called_off: false,
            orderly: true,
            salt: 0,
        };
        {
            let mut board = run.destination.board();
            board.barriers = flags & 1 != 0;
            board.gone_at_end = flags & 8 != 0;
        }
        for _ in 0..=input.below(4) {
            run.add_channel();
            if flags & 16 == 0 {
                run.greet(run.channels.len() - 1);
            }
        }
        if flags & 32 == 0 {
            run.no_more_channels();
        }
        run
    }

    pub(super) fn framer(&self) -> Framer {
        Framer::new(Some(self.page_size), wire::LEAST_MAX_PACKET)
    }

    pub(super) fn add_channel(&mut self) {
        let feed = Feed::default();
        let source = feed.channel();
        let source = source
            .with_page_size(self.page_size.bytes())
            .expect("a page size");
        let to = self
            .destination
            .channel(self.page_size, wire::LEAST_MAX_PACKET);
        if self.credits {
            let mut board = self.destination.board();
            board.lines.last_mut().expect("one").credit = 0;
        }
        let added = self.relay.add_channel(source, to);
        assert_eq!(added.is_err(), self.complete, "{added:?}");
        if added.is_err() {
            self.destination.board().lines.pop();
            return;
        }
        self.orderly &= self.channels.iter().all(|chan| chan.syncs == 0);
        self.channels.push(Chan {
            feed,
            bytes: Vec::new(),
            rest: Vec::new(),
            syncs: 0,
            over: false,
            failed: false,
        });
    }

    /// What every channel begins with.
    pub(super) fn greet(&mut self, at: usize) {
        let hello = Hello {
            uuid: [7; 16],
            id: u8::try_from(at).unwrap_or(255),
        };
        let chan = &mut self.channels[at];
        chan.push(&hello.encode());
        chan.push(&wire::encode_sync(self.page_size, 0));
        chan.syncs += 1;
    }

    pub(super) fn no_more_channels(&mut self) {
        self.relay.no_more_channels();
        self.complete = true;
    }

    pub(super) fn filler(&mut self, len: usize) -> impl Iterator<Item = u8> + use<> {
        self.salt += 1;
        source::bytes(self.salt.wrapping_mul(0x9e37_79b9_7f4a_7c15), len)
    }
}
