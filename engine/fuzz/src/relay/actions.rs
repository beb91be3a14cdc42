//! What an input does: it sends, cuts, tells and cancels, and lets the destination take.

use std::io;

use vfio_migration::{
    Error, ErrorKind, Phase,
    wire::{self, DeviceKey, Hello, Kind, RamHeader},
};

use super::model::{MOST, Run, SIZES};
use crate::{
    input::Input,
    source::{Cut, id},
    steps,
    stream::Piece,
};

impl Run {
    /// A device's packet.
    pub(super) fn packet(&mut self, at: usize, input: &mut Input<'_>) -> Vec<u8> {
        let device = input.below(self.devices.len());
        let index = input.index(self.devices[device].next);
        let how = input.byte();
        let config = how & 7 == 7;
        let size = SIZES[usize::from(how >> 4) % SIZES.len()];
        // All that was sent is kept, to be compared.
        let sent: usize = self
            .channels
            .iter()
            .map(|channel| channel.bytes.len())
            .sum();
        let size = if sent < MOST { size } else { size % 4096 };
        let key = DeviceKey::new(&id(device));
        let len = u32::try_from(size).expect("small");
        let mut bytes = wire::encode_packet(&key, index, config, len).to_vec();
        bytes.extend(self.filler(size));
        let dev = &mut self.devices[device];
        self.orderly &= index == dev.next && self.channels[at].syncs > 0;
        if config {
            dev.config = dev.config.or(Some(index));
        } else {
            dev.data.insert(index);
        }
        while dev.data.contains(&dev.next) {
            dev.next += 1;
        }
        bytes
    }

    /// A RAM packet, or a SYNC.
    pub(super) fn other(&mut self, at: usize, sync: bool, input: &mut Input<'_>) -> Vec<u8> {
        let mine = self.channels[at].syncs;
        self.orderly &= self.channels.iter().all(|chan| chan.syncs >= mine);
        self.salt += 1;
        if sync {
            self.channels[at].syncs += 1;
            return wire::encode_sync(self.page_size, self.salt);
        }
        let pages = u32::from(input.byte()) % 9 % (self.page_size.pages() + 1);
        let zero_pages = u32::from(input.byte()) % (self.page_size.pages() - pages + 1);
        let compressed = input.byte();
        // A method's packets are as long as they say, an uncompressed one's as its pages.
        let (flags, size) = match compressed {
            0..200 => (0, pages * self.page_size.bytes()),
            _ => (2, u32::from(compressed - 200) * 100),
        };
        let header = RamHeader {
            kind: Kind::Ram { flags },
            pages_alloc: self.page_size.pages(),
            normal_pages: pages,
            next_packet_size: size,
            packet_num: self.salt,
            zero_pages,
            ramblock: b"pc.ram",
        };
        let mut bytes = header.encode().to_vec();
        bytes.extend(self.filler(8 * self.page_size.pages() as usize));
        bytes.extend(self.filler(size as usize));
        bytes
    }

    /// Sends a packet, in pieces as the input says.
    pub(super) fn send(&mut self, what: u8, input: &mut Input<'_>) {
        if self.channels.is_empty() {
            return;
        }
        let at = input.below(self.channels.len());
        if self.channels[at].over {
            return;
        }
        let bytes = match what {
            0 => self.packet(at, input),
            1 => self.other(at, false, input),
            _ => self.other(at, true, input),
        };
        let chan = &mut self.channels[at];
        chan.send_rest();
        let cut = match input.byte() {
            0..=127 => Cut::Whole,
            128..=191 => Cut::Two,
            192..=239 => Cut::Later,
            _ => Cut::Crumbs,
        };
        let (pieces, rest) = cut.pieces(&bytes, input);
        for piece in pieces {
            chan.push(piece);
        }
        chan.rest = rest.to_vec();
    }

    /// Sends a packet with a byte changed, or a part of it; whatever that is.
    pub(super) fn send_wrong(&mut self, input: &mut Input<'_>) {
        if self.channels.is_empty() {
            return;
        }
        let at = input.below(self.channels.len());
        if self.channels[at].over {
            return;
        }
        self.orderly = false;
        let mut bytes = match input.below(4) {
            0 => self.packet(at, input),
            1 => self.other(at, false, input),
            2 => self.other(at, true, input),
            _ => Hello {
                uuid: [0; 16],
                id: input.byte(),
            }
            .encode()
            .to_vec(),
        };
        let place = usize::from(input.byte()) * 2 % bytes.len();
        match input.below(4) {
            0 => bytes[place] ^= input.byte().max(1),
            1 => bytes[place..]
                .iter_mut()
                .take(4)
                .for_each(|byte| *byte = 0xff),
            2 => bytes.truncate(place),
            _ => {}
        }
        let chan = &mut self.channels[at];
        chan.send_rest();
        chan.push(&bytes);
    }

    /// Sends bytes of the input's own.
    pub(super) fn send_raw(&mut self, input: &mut Input<'_>) {
        let at = input.below(self.channels.len().max(1));
        let len = usize::from(input.byte()) << 8 | usize::from(input.byte());
        let piece = 1 + usize::from(input.byte()) * 16;
        let len = len.min(input.rest().len());
        let bytes = input.take(len);
        let Some(chan) = self.channels.get_mut(at).filter(|chan| !chan.over) else {
            return;
        };
        self.orderly = false;
        chan.send_rest();
        for piece in bytes.chunks(piece) {
            chan.push(piece);
        }
    }

    /// One step of the input.
    pub(super) fn step(&mut self, input: &mut Input<'_>) {
        let line = |run: &Self, input: &mut Input<'_>| {
            let lines = run.channels.len();
            (lines > 0).then(|| input.below(lines))
        };
        match input.byte() {
            0..=79 => self.send(0, input),
            80..=99 => self.send(1, input),
            100..=114 => self.send(2, input),
            115..=149 => {
                let at = input.below(steps::count());
                steps::resume(at);
            }
            150..=174 => {
                if let Some(at) = line(self, input) {
                    let credit = input.one_of(&[1, 64, 300, 5000, 100_000, usize::MAX]);
                    let mut board = self.destination.board();
                    let line = &mut board.lines[at];
                    line.credit = line.credit.saturating_add(credit);
                }
            }
            175..=189 => self.settle(),
            190..=204 => self.send_raw(input),
            205..=209 => {
                if let Some(at) = line(self, input) {
                    self.channels[at].send_rest();
                }
            }
            210..=215 => {
                if let Some(at) = line(self, input)
                    && !self.channels[at].over
                {
                    self.channels[at].rest.clear();
                    self.channels[at].end();
                }
            }
            216..=219 => {
                if self.channels.len() < 6 {
                    self.add_channel();
                }
            }
            220 | 221 => {
                if let Some(at) = line(self, input)
                    && !self.channels[at].over
                {
                    self.greet(at);
                }
            }
            222 => self.no_more_channels(),
            223 => {
                self.relay.cancel();
                self.called_off = true;
            }
            224 => {
                let error = Error::new(ErrorKind::Channel, Phase::Section);
                self.relay.fail(error);
                self.called_off = true;
            }
            225..=229 => {
                if let Some(at) = line(self, input) {
                    let kind = input.one_of(&[
                        io::ErrorKind::Interrupted,
                        io::ErrorKind::BrokenPipe,
                        io::ErrorKind::WouldBlock,
                    ]);
                    self.called_off |= kind != io::ErrorKind::Interrupted;
                    self.destination.board().lines[at].fails = Some(kind);
                }
            }
            230..=233 => {
                if let Some(at) = line(self, input)
                    && !self.channels[at].over
                {
                    let kind = input.one_of(&[
                        io::ErrorKind::Interrupted,
                        io::ErrorKind::ConnectionReset,
                        io::ErrorKind::TimedOut,
                    ]);
                    self.channels[at].failed |= kind != io::ErrorKind::Interrupted;
                    self.channels[at].feed.push(Piece::Fails(kind));
                }
            }
            234..=243 => self.send_wrong(input),
            244..=250 => {
                if let Some(at) = line(self, input) {
                    let most = input.one_of(&[1, 100, 4096, usize::MAX]);
                    self.destination.board().lines[at].most = most;
                }
            }
            _ => {
                let stats = self.relay.stats();
                assert!(stats.held_high <= stats.budget, "{stats:?}");
                let (channels, open) = self.relay.channels();
                assert_eq!(channels, self.channels.len());
                assert!(open <= channels);
            }
        }
    }
}
