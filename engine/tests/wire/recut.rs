//! A recorded source's device state, cut anew by this engine's save side: into pieces of 10 bytes,
//! last idx first, in the place of the recorded packets, among the recorded RAM and SYNC packets. A
//! destination loads the same state, with and without a relay on the way.
//!
//! With `VFIO_MIGRATE_RECUT=DIR` in the environment the connections' bytes are also written to DIR,
//! for a real QEMU destination: `.ci/guest/qemu` does that.

use std::{
    collections::BTreeMap,
    env, fs,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    thread,
};

use vfio_migration::{
    Channel, LoadSession, RamSink, Relay, SaveSession, Settings,
    wire::{DEFAULT_MAX_PACKET, Frame, Framer, Located, PageSize, Walk, config_body},
};

use crate::{mock::Mock, pipes::collect, watchdog::Watchdog};

/// The most bytes of a device's state in a packet.
const PIECE: usize = 10;

fn walk(bytes: &[u8]) -> impl Iterator<Item = Located<'_>> {
    let framer = Framer::new(Some(PageSize::new(4096).unwrap()), DEFAULT_MAX_PACKET);
    Walk::new(bytes, framer).map(Result::unwrap)
}

fn whole(located: &Located<'_>) -> Vec<u8> {
    [located.header, located.payload].concat()
}

/// A device as its packets carry it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Image {
    state: Vec<u8>,
    /// Without framing tags.
    config: Vec<u8>,
}

/// The devices of a migration, by the number in their name.
fn images(channels: &[Vec<u8>]) -> BTreeMap<u32, Image> {
    let mut pieces = BTreeMap::new();
    for located in channels.iter().flat_map(|channel| walk(channel)) {
        if let Frame::DeviceState(packet) = located.frame {
            let number = (1..9).find(|&number| {
                let id = crate::names::id(number);
                id.idstr().as_bytes() == packet.header.idstr && packet.header.instance == 0
            });
            let place = (number.unwrap(), packet.packet.index);
            let before = pieces.insert(place, (packet.packet.config, located.payload));
            assert!(before.is_none());
        }
    }
    let mut images = BTreeMap::<u32, Image>::new();
    for ((number, _), (config, data)) in pieces {
        let image = images.entry(number).or_default();
        if config {
            image.config = config_body(data).unwrap().to_vec();
        } else {
            image.state.extend(data);
        }
    }
    images
}

/// Cuts a device's state with a save session. Its packets, in the order of their idx.
fn cut(number: u32, image: &Image) -> Vec<Vec<u8>> {
    let (state, mut writer) = io::pipe().unwrap();
    let bytes = image.state.clone();
    let writing = thread::spawn(move || writer.write_all(&bytes).unwrap());
    let mut mock = Mock::new(state);
    let config = image.config.clone();
    mock.save = Some(Box::new(move |writer| writer.write_all(&config)));
    let (near, mut far) = UnixStream::pair().unwrap();
    let mut settings = Settings::default();
    settings.data_len = Some(PIECE);
    settings.budget = Some(1 << 20);
    let save = SaveSession::builder()
        .settings(settings)
        .device(mock.device(number))
        .channel(near)
        .start()
        .unwrap();
    let mut sent = Vec::new();
    far.read_to_end(&mut sent).unwrap();
    save.join().result.unwrap();
    writing.join().unwrap();
    let frames = walk(&sent);
    let packets = frames.filter(|it| matches!(it.frame, Frame::DeviceState(_)));
    packets.map(|it| whole(&it)).collect()
}

/// The channels with `packets` in the place of those that were recorded: shared out in turn, and
/// each channel's share where its first packet was, or else at its end.
fn replace(channels: &[Vec<u8>], packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let replace = |(at, channel): (usize, &Vec<u8>)| {
        let mut share = Some(packets.iter().skip(at).step_by(channels.len()).flatten());
        let mut bytes = Vec::new();
        for located in walk(channel) {
            if matches!(located.frame, Frame::DeviceState(_)) {
                bytes.extend(share.take().into_iter().flatten());
            } else {
                bytes.extend(whole(&located));
            }
        }
        bytes.extend(share.take().into_iter().flatten());
        bytes
    };
    channels.iter().enumerate().map(replace).collect()
}

struct PassOver;

impl RamSink for PassOver {
    fn ram(&mut self, _header: &[u8], _pages: &mut dyn Read) -> io::Result<()> {
        Ok(())
    }

    fn sync(&mut self, _header: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

/// Loads what the channels carry, as a destination does.
fn load(channels: Vec<Channel>, numbers: impl Iterator<Item = u32>) -> BTreeMap<u32, Image> {
    let mut builder = LoadSession::builder();
    let mut devices = Vec::new();
    for number in numbers {
        let (reader, writer) = io::pipe().unwrap();
        let mock = Mock::new(writer);
        devices.push((number, collect(reader), mock.log.clone()));
        builder = builder.device(mock.device(number));
    }
    let session = builder.start_with(channels);
    session.join().result.unwrap();
    let image = |(number, state, log): (u32, thread::JoinHandle<Vec<u8>>, _)| {
        let log: std::sync::Arc<std::sync::Mutex<crate::mock::Log>> = log;
        let config = log.lock().unwrap().config.clone();
        let state = state.join().unwrap();
        (number, Image { state, config })
    };
    devices.into_iter().map(image).collect()
}

/// Starts a load whose switchover has begun.
trait Start {
    fn start_with(self, channels: Vec<Channel>) -> LoadSession;
}

impl Start for vfio_migration::LoadBuilder {
    fn start_with(self, channels: Vec<Channel>) -> LoadSession {
        let add =
            |builder: Self, channel: Channel| builder.channel(channel.with_ram_sink(PassOver));
        let session = channels.into_iter().fold(self, add).start().unwrap();
        session.switchover_start();
        session
    }
}

/// The channels' bytes on their way through a relay, to be loaded from there.
fn through_a_relay(channels: &[Vec<u8>]) -> (Relay, Vec<Channel>) {
    let relay = Relay::builder().start().unwrap();
    let far = channels.iter().map(|bytes| {
        let (near, far) = UnixStream::pair().unwrap();
        let source = Channel::from_reader(io::Cursor::new(bytes.clone()));
        relay.add_channel(source, near).unwrap();
        far.into()
    });
    let far = far.collect();
    relay.no_more_channels();
    (relay, far)
}

/// For a destination elsewhere: a directory of connections, as the captures are kept.
fn write(directory: &Path, main: &Path, channels: &[Vec<u8>]) {
    fs::create_dir_all(directory).unwrap();
    fs::copy(main, directory.join("00-c2s.bin")).unwrap();
    for (number, bytes) in (1..).zip(channels) {
        fs::write(directory.join(format!("{number:02}-c2s.bin")), bytes).unwrap();
    }
}

/// The same with an unknown version in every device packet.
fn spoil(channels: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let spoil = |channel: &Vec<u8>| {
        let frames = walk(channel).flat_map(|located| {
            let mut bytes = whole(&located);
            if matches!(located.frame, Frame::DeviceState(_)) {
                bytes[276 + 3] = 1;
            }
            bytes
        });
        frames.collect()
    };
    channels.iter().map(spoil).collect()
}

#[test]
fn a_state_that_is_cut_anew_is_the_same_state() {
    let _watchdog = Watchdog::new();
    let data = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let out = env::var_os("VFIO_MIGRATE_RECUT").map(PathBuf::from);
    let mut count = 0;
    for entry in fs::read_dir(&data).unwrap() {
        let folder = entry.unwrap().path();
        let channel = |number: u32| fs::read(folder.join(format!("{number:02}-c2s.bin")));
        let recorded: Vec<_> = (1..).map_while(|number| channel(number).ok()).collect();
        if recorded.is_empty() {
            continue;
        }
        count += 1;
        let images = images(&recorded);
        let packets = images.iter().flat_map(|(number, image)| {
            let packets = cut(*number, image);
            // A short read, at the state's end, makes the last piece.
            assert_eq!(packets.len(), image.state.len().div_ceil(PIECE) + 1);
            packets.into_iter().rev()
        });
        let packets: Vec<_> = packets.collect();
        let channels = replace(&recorded, &packets);
        assert!(channels != recorded);

        let of_memory = |bytes: &Vec<u8>| Channel::from_reader(io::Cursor::new(bytes.clone()));
        let direct = channels.iter().map(of_memory).collect();
        assert!(load(direct, images.keys().copied()) == images, "{folder:?}");
        let (relay, far) = through_a_relay(&channels);
        assert!(load(far, images.keys().copied()) == images, "{folder:?}");
        relay.join().result.unwrap();

        if let Some(out) = &out {
            let main = folder.join("00-c2s.bin");
            let name = folder.file_name().unwrap();
            write(&out.join(name), &main, &channels);
            if name.to_str().unwrap().starts_with("01") {
                write(&out.join("bad-version"), &main, &spoil(&recorded));
            }
        }
    }
    assert!(count >= 4);
}
