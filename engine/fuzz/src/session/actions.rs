//! What an input does: it sends, cuts, pushes, plugs, tells and cancels.

use std::{cell::Cell, io, rc::Rc};

use vfio_migration::{
    Error, ErrorKind, Phase,
    wire::{self, DeviceKey, Hello, PageSize},
};

use super::model::{Push, Pushing, Run, Sent, make};
use crate::{
    input::Input,
    source::{Cut, id},
    steps,
    stream::Piece,
};

impl Run {
    /// Notes a packet that is sent, and whether a good source would have sent it.
    pub(super) fn note(&mut self, packet: Sent) {
        let dev = &mut self.devices[packet.device];
        let Sent { index, config, .. } = packet;
        let fresh = !dev.data.contains(&index) && !dev.configs.contains(&index);
        let in_place = fresh
            && index < 0x1000_0000
            && match dev.configs.first() {
                Some(&last) => !config && index < last,
                // Packets overtake each other, but a config is a source's last.
                None => !config || dev.data.last().is_none_or(|&last| last < index),
            };
        // What comes for a device that has gone is read past, whatever it is.
        self.wrong |= !in_place && !dev.removed;
        self.orderly &= index == dev.next || dev.removed;
        if config {
            dev.configs.insert(index);
        } else {
            dev.data.insert(index);
        }
        while dev.data.contains(&dev.next) {
            dev.next += 1;
        }
    }

    pub(super) fn send(&mut self, input: &mut Input<'_>) {
        let at = input.below(self.channels.len());
        let device = input.below(self.devices.len());
        let how = input.byte();
        if self.channels[at].over {
            return;
        }
        self.channels[at].send_rest();
        let packet = Sent {
            device,
            index: input.index(self.devices[device].next),
            config: how & 7 == 7,
        };
        let frame = self.devices[device].frame(packet);
        self.note(packet);
        let chan = &mut self.channels[at];
        chan.sent.push((packet, true));
        let cut = match how >> 4 {
            0..=7 => Cut::Whole,
            8..=11 => Cut::Two,
            12..=14 => Cut::Later,
            _ => Cut::Crumbs,
        };
        let (pieces, rest) = cut.pieces(&frame, input);
        for piece in pieces {
            chan.push(piece);
        }
        chan.rest = rest.to_vec();
        if let Some((_, whole)) = chan.sent.last_mut() {
            *whole = chan.rest.is_empty();
        }
    }

    /// Sends what must be refused, on a channel that sends nothing after it.
    pub(super) fn send_wrong(&mut self, input: &mut Input<'_>) {
        let at = input.below(self.channels.len());
        if self.channels[at].over {
            return;
        }
        self.channels[at].send_rest();
        let key = DeviceKey::new(&self.devices[0].id);
        let mut bytes = wire::encode_packet(&key, 0, false, 5).to_vec();
        let place = input.below(bytes.len());
        match input.below(5) {
            0 => bytes[place] ^= input.byte().max(1),
            1 => bytes[272..276].copy_from_slice(&(input.word() | 1 << 31).to_be_bytes()),
            2 => bytes = wire::Kind::Ram { flags: 0 }.encode().to_vec(),
            3 => bytes.truncate(place),
            _ => {
                self.channels[at]
                    .feed
                    .push(Piece::Fails(io::ErrorKind::ConnectionReset));
                bytes.clear();
            }
        }
        // One that is still good would be somebody's packet.
        let mut framer = wire::Framer::new(PageSize::new(4096).ok(), wire::DEFAULT_MAX_PACKET);
        let hello = Hello {
            uuid: [0; 16],
            id: 0,
        }
        .encode();
        framer.decode(&hello).expect("a good hello");
        if let Ok(wire::Step::Frame {
            frame: wire::Frame::DeviceState(packet),
            ..
        }) = framer.decode(&bytes)
            && self
                .devices
                .iter()
                .any(|dev| packet.header.key() == DeviceKey::new(&dev.id))
        {
            return;
        }
        self.wrong = true;
        let chan = &mut self.channels[at];
        chan.push(&bytes);
        chan.feed.push(Piece::End);
        chan.over = true;
    }

    pub(super) fn push(&mut self, input: &mut Input<'_>) {
        let pushing = match &self.pushing {
            Some(pushing) => pushing.clone(),
            None => self.begin_pushing(),
        };
        if pushing.over.get() {
            return;
        }
        let device = input.below(self.devices.len());
        let how = input.byte();
        let packet = Sent {
            device,
            index: input.index(self.devices[device].next),
            config: how & 7 == 7,
        };
        if packet.index == u32::MAX {
            return;
        }
        let dev = &self.devices[device];
        let header = wire::PacketHeader {
            index: packet.index,
            config: packet.config,
        };
        let mut payload = header.encode().to_vec();
        payload.extend(dev.payload(packet));
        let push = match how >> 6 {
            0 => Push::Try(device, packet, payload),
            1 => Push::Lease(device, packet, payload),
            _ => Push::Wait(device, packet, payload),
        };
        // A packet that could not be had now is not there, and nobody sends it again.
        self.wrong |= matches!(push, Push::Try(..));
        self.note(packet);
        pushing.asked.borrow_mut().push(push);
    }

    pub(super) fn begin_pushing(&mut self) -> Rc<Pushing> {
        // Where the input has ended before, nothing can be brought any more.
        self.wrong |= self.channels.iter().all(|chan| chan.over);
        let pushing = Rc::new(Pushing::default());
        self.pushing = Some(pushing.clone());
        let (session, shared) = (self.session.clone(), pushing.clone());
        let ids: Vec<_> = (0..8).map(id).collect();
        steps::spawn("pushing".into(), move || {
            let mut publisher = session.publisher();
            drop(session);
            loop {
                shared.busy.set(false);
                let push = steps::wait_for(|| {
                    let mut asked = shared.asked.borrow_mut();
                    (!asked.is_empty()).then(|| asked.remove(0))
                });
                shared.busy.set(true);
                let (packet, taken) = match push {
                    Push::Quit => return,
                    Push::Wait(device, packet, payload) => {
                        (packet, publisher.push(&ids[device], &payload).is_ok())
                    }
                    Push::Try(device, packet, payload) => (
                        packet,
                        matches!(publisher.try_push(&ids[device], &payload), Ok(true)),
                    ),
                    Push::Lease(device, packet, payload) => {
                        let header = wire::PacketHeader {
                            index: packet.index,
                            config: packet.config,
                        };
                        let data = &payload[wire::PACKET_HEADER_LEN..];
                        let lease = publisher.lease(&ids[device], header, data.len());
                        let published = lease.and_then(|mut lease| {
                            lease.bytes_mut().copy_from_slice(data);
                            lease.publish()
                        });
                        (packet, published.is_ok())
                    }
                };
                shared.done.borrow_mut().push((packet, taken));
            }
        });
        pushing
    }

    pub(super) fn remove(&mut self, input: &mut Input<'_>) {
        let at = input.below(self.devices.len());
        if self.devices[at].removed {
            return;
        }
        self.devices[at].removed = true;
        // What has failed because of it before is not taken back.
        self.wrong |= self.session.failure().is_some();
        let session = self.session.clone();
        let id = self.devices[at].id.clone();
        let strand = steps::spawn(format!("removing {id}"), move || {
            // A device that failed before is gone as well.
            let _device = session.remove_device(&id);
        });
        self.removing.push(strand);
    }

    pub(super) fn add(&mut self, input: &mut Input<'_>) {
        let at = self.devices.len();
        let (dev, device, bad) = make(at, input, false, true);
        let session = self.session.clone();
        let added = Rc::new(Cell::new(false));
        let result = added.clone();
        let strand = steps::spawn(format!("adding {at}"), move || {
            result.set(session.add_device(device).is_ok());
        });
        assert!(steps::is_done(strand), "a device is there at once");
        if added.get() {
            self.wrong |= bad;
            self.devices.push(dev);
        }
    }

    pub(super) fn switchover(&mut self) {
        self.session.switchover_start();
        for dev in &mut self.devices {
            dev.started = true;
        }
    }

    pub(super) fn config_ready(&mut self, at: usize) {
        let dev = &mut self.devices[at];
        let told = self.session.config_load_ready(&dev.id);
        let good = self.config_after_iterables && !dev.ready && !dev.removed;
        assert!(
            told.is_err() || good,
            "a second notice, or one that nobody wants"
        );
        dev.ready = true;
        // One for a device that has gone is refused, and that is all.
        self.wrong |= !good && !dev.removed;
    }

    /// One step of the input.
    pub(super) fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() {
            0..=99 => self.send(input),
            100..=149 => {
                let at = input.below(steps::count());
                steps::resume(at);
            }
            150..=169 => {
                let at = input.below(self.devices.len());
                let most = input.one_of(&[1, 100, 4096, 65_536]);
                self.devices[at].drain.drain(most);
            }
            170..=199 => self.push(input),
            200..=209 => self.switchover(),
            210..=214 => {
                let at = input.below(self.channels.len());
                self.channels[at].send_rest();
            }
            215..=234 => self.settle(),
            235..=239 => {
                let at = input.below(self.devices.len());
                self.config_ready(at);
            }
            240..=243 => self.send_wrong(input),
            244..=246 => {
                let at = input.below(self.channels.len());
                let chan = &mut self.channels[at];
                self.wrong |= !chan.rest.is_empty();
                chan.rest.clear();
                chan.feed.push(Piece::End);
                chan.over = true;
            }
            247 | 248 => self.remove(input),
            249..=251 => self.add(input),
            252 => {
                self.session.cancel();
                self.called_off = true;
                self.wrong = true;
            }
            253 => {
                let error = Error::new(ErrorKind::Channel, Phase::Section);
                self.session.fail(error);
                self.wrong = true;
            }
            254 => {
                let at = input.below(self.devices.len());
                let len = 1 + input.below(100);
                // It fails where the device is not there, or has begun.
                if self.devices[at].data.is_empty() && !self.devices[at].started {
                    let _told = self.session.write_iterable(&id(99), &vec![0; len]);
                }
            }
            _ => {
                let _stats = self.session.stats();
                let _fd = self.session.is_finished();
            }
        }
        for dev in &self.devices {
            dev.check_prefix();
        }
    }
}
