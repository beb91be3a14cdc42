//! QEMU as the peer: migrations that were recorded between two of them end in our destination as
//! they did in QEMU's, and our source sends for the same devices what QEMU's has sent, byte for
//! byte, save for which channel a packet takes.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    os::unix::net::UnixStream,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    thread,
};

use vfio_migration::{
    Channel, Device, DeviceId, DeviceState, LoadSession, SaveSession, Settings, SourceChannels,
    migration::{
        Incoming, MigratableDevice, OnOffAuto, Outgoing, OutgoingDevice, SwitchoverAck,
        SwitchoverAcks, vm,
    },
    stream::{Command, Event, MainChannelOrder, Reader, Section, SectionKind, Writer},
    wire::{DEFAULT_MAX_PACKET, Frame, Framer, PageSize, Walk, wrap_config},
};

use crate::{
    capture::{id, list, number, sha256, text, vfio_only},
    capture_devices::{Case, Contents, Ram, cases},
    watchdog::Watchdog,
};

impl Case {
    fn admit(&self, id: &DeviceId, contents: Contents) -> (MigratableDevice, Arc<Mutex<Contents>>) {
        let (device, contents) = self.device(contents);
        let device = Device::new(id.clone(), Box::new(device)).unwrap();
        (MigratableDevice::new(device, self.settings()), contents)
    }

    /// Reads everything, as a destination does, and gives what the devices have got.
    fn load(&self) -> Vec<Contents> {
        let (devices, contents): (Vec<_>, Vec<_>) = self
            .ids
            .iter()
            .map(|id| self.admit(id, Contents::default()))
            .unzip();
        let pages = Arc::new(AtomicU32::new(0));
        let mut session = LoadSession::builder();
        let mut sources = Vec::new();
        for bytes in self.capture.channels() {
            let (mut near, far) = UnixStream::pair().unwrap();
            session = session.channel(Channel::from(far).with_ram_sink(Ram(pages.clone())));
            sources.push(thread::spawn(move || near.write_all(&bytes)));
        }
        let acks = Arc::new(AtomicU32::new(0));
        let counted = acks.clone();
        let approve = move || {
            counted.fetch_add(1, SeqCst);
            Ok(())
        };
        let incoming =
            Incoming::setup(devices, &self.capabilities, session, Box::new(approve)).unwrap();

        let main = self.capture.file(text(&self.capture.expected["main"]));
        let main = vfio_only(&self.capture, &main);
        let mut reader = Reader::open(&main[..]).unwrap();
        let ids = list(&self.capture.expected["devices"]).iter();
        let mut order = MainChannelOrder::new(ids.map(id));
        while let Some(event) = reader.next_event().unwrap() {
            order.event(&event).unwrap();
            match event {
                Event::Section(section) => {
                    let device = incoming.device(&section.owner).unwrap();
                    assert_eq!(device.uses_multifd(), self.transfer == OnOffAuto::On);
                    let piece = device.load_state(reader.body().unwrap()).unwrap();
                    order.body(&section, &piece).unwrap();
                    reader.footer().unwrap();
                }
                Event::Command(Command::SwitchoverStart) => incoming.switchover_start().unwrap(),
                _ => {}
            }
        }
        assert_eq!(acks.load(SeqCst), 1, "{}: as on its return path", self.name);
        let mut loaded = incoming.finish().unwrap();
        vm::start(loaded.devices_mut()).unwrap();
        let back = loaded.join().unwrap();
        assert!(back.iter().all(|it| it.state() == DeviceState::Running));
        for source in sources {
            source.join().unwrap().unwrap();
        }
        // From 06 and 09 they are cut.
        let has_ram = self.capture.expected["cut"].is_null();
        assert_eq!(pages.load(SeqCst) > 0, has_ram);
        let contents = contents.iter();
        contents.map(|it| it.lock().unwrap().clone()).collect()
    }
}

#[test]
fn our_destination_ends_as_qemus_did() {
    let _watchdog = Watchdog::new();
    for case in cases() {
        let expected = list(&case.capture.expected["devices"]);
        for (contents, expected) in case.load().iter().zip(expected) {
            assert_eq!(contents.whole.len(), number(&expected["whole_bytes"]));
            let whole = sha256(&contents.whole);
            assert_eq!(whole, text(&expected["whole_sha256"]), "{}", case.name);
            if case.transfer == OnOffAuto::On {
                let config = sha256(&wrap_config(&contents.config));
                assert_eq!(config, text(&expected["config_sha256"]), "{}", case.name);
            } else {
                let main = case.capture.file("00-c2s.bin");
                let tag = wrap_config(&contents.config);
                let mut bodies = case.capture.sections(&main).map(|(bytes, _)| bytes);
                assert!(bodies.any(|bytes| bytes[..bytes.len() - 5].ends_with(&tag)));
            }
            // As QEMU's: no stay in STOP.
            assert_eq!(
                contents.states,
                [
                    DeviceState::Resuming,
                    DeviceState::RunningP2p,
                    DeviceState::Running
                ]
            );
        }
    }
}

/// The frames of device state by device and idx, and the channels' hellos.
type Frames = (BTreeMap<(DeviceId, u32), Vec<u8>>, Vec<Vec<u8>>);

fn frames(channels: &[Vec<u8>]) -> Frames {
    let page_size = PageSize::new(4096).unwrap();
    let (mut packets, mut hellos) = (BTreeMap::new(), Vec::new());
    for channel in channels {
        let mut sync = 0;
        let framer = Framer::new(Some(page_size), DEFAULT_MAX_PACKET);
        for (at, located) in Walk::new(channel, framer).enumerate() {
            let located = located.unwrap();
            match located.frame {
                Frame::Hello(_) => hellos.push(located.header.to_vec()),
                Frame::Sync { .. } if at == 1 => sync += 1,
                Frame::DeviceState(packet) => {
                    let key = packet.header.key().id().unwrap();
                    let bytes = [located.header, located.payload].concat();
                    let twice = packets.insert((key, packet.packet.index), bytes);
                    assert!(twice.is_none());
                }
                _ => {}
            }
        }
        assert_eq!(sync, 1, "a channel begins with a hello and a SYNC");
    }
    hellos.sort_unstable();
    (packets, hellos)
}

#[test]
fn our_source_sends_what_qemus_did() {
    use DeviceState::{PreCopy, PreCopyP2p, Stop, StopCopy};
    let _watchdog = Watchdog::new();
    for case in cases() {
        let main = case.capture.file("00-c2s.bin");
        let acks = SwitchoverAcks::new(SwitchoverAck::Once);
        let mut at_rest: Vec<_> = case
            .load()
            .into_iter()
            .zip(&case.ids)
            .map(|(contents, id)| {
                let contents = Contents {
                    precopy: 24,
                    states: Vec::new(),
                    ..contents
                };
                Some(case.admit(id, contents))
            })
            .collect();
        let mut under_way = Vec::new();
        let mut contents = Vec::new();

        let count = case.capture.channels().len().max(1);
        let mut channels = Vec::new();
        let mut readers = Vec::new();
        for _ in 0..count {
            let (near, mut far) = UnixStream::pair().unwrap();
            channels.push(near.into());
            readers.push(thread::spawn(move || {
                let mut bytes = Vec::new();
                far.read_to_end(&mut bytes).map(|_| bytes)
            }));
        }
        let mut session = SaveSession::builder();
        if case.transfer == OnOffAuto::On {
            let channels = SourceChannels::greet(channels, &Settings::default()).unwrap();
            session = session.greeted_channels(channels);
        } else {
            drop(channels);
        }
        let mut session = Some(session);
        let mut outgoing: Option<Outgoing> = None;
        // Each of QEMU's sections in its turn.
        for (expected, section) in case.capture.sections(&main) {
            let owner = id(section);
            let at = case.ids.iter().position(|id| *id == owner).unwrap();
            let kind = match number(&section["type"]) {
                1 => SectionKind::Start,
                2 => SectionKind::Part,
                3 => SectionKind::End,
                4 => SectionKind::Full,
                other => panic!("{other}"),
            };
            if kind == SectionKind::End && outgoing.is_none() {
                acks.received();
                // A paused VM has stopped long before.
                if !case.name.contains("paused") {
                    vm::stop(&mut under_way, vm::Reason::FinishMigration).unwrap();
                }
                let sources = std::mem::take(&mut under_way);
                let begun = Outgoing::begin(sources, session.take().unwrap());
                outgoing = Some(begun.unwrap());
            }
            let mut writer = Writer::open(Vec::new()).unwrap();
            let number = u32::try_from(number(&section["section_id"])).unwrap();
            writer
                .write(&Event::Section(Section {
                    kind,
                    id: number,
                    owner: owner.clone(),
                    version: 1,
                }))
                .unwrap();
            let body = writer.body();
            match kind {
                SectionKind::Start => {
                    let (migratable, its) = at_rest[at].take().unwrap();
                    contents.push(its);
                    let source = OutgoingDevice::setup(migratable, &case.capabilities, &acks, body);
                    under_way.push(source.unwrap());
                }
                SectionKind::Part => {
                    under_way[at].iterate(body).unwrap();
                }
                SectionKind::End => {
                    let outgoing = outgoing.as_mut().unwrap();
                    outgoing.write_state(&owner, body).unwrap();
                }
                SectionKind::Full => {
                    let outgoing = outgoing.as_mut().unwrap();
                    outgoing.write_config(&owner, body).unwrap();
                }
            }
            writer.footer(number).unwrap();
            let ours = writer.into_inner();
            assert!(ours[8..] == *expected, "{}: {kind:?} of {owner}", case.name);
        }
        let saved = outgoing.unwrap().finish().unwrap();
        let devices = saved.cleanup().unwrap();
        assert!(devices.iter().all(|it| it.state() == Stop));
        let sent: Vec<_> = readers
            .into_iter()
            .map(|reader| reader.join().unwrap().unwrap())
            .collect();
        if case.transfer == OnOffAuto::On {
            let (ours, our_hellos) = frames(&sent);
            let (theirs, their_hellos) = frames(&case.capture.channels());
            assert!(ours.keys().eq(theirs.keys()), "{}", case.name);
            for (key, bytes) in &ours {
                assert!(theirs[key] == *bytes, "{}: {key:?}", case.name);
            }
            assert_eq!(our_hellos, their_hellos, "{}", case.name);
        } else {
            assert!(sent.iter().all(Vec::is_empty), "the channels are not used");
        }
        // The states that QEMU's trace tells of.
        let expected: &[DeviceState] = if case.name.contains("paused") {
            &[PreCopy, StopCopy, Stop]
        } else {
            &[PreCopy, PreCopyP2p, StopCopy, Stop]
        };
        for contents in contents {
            assert_eq!(contents.lock().unwrap().states, expected, "{}", case.name);
        }
    }
}
