//! The relay as an embedder uses it: its window, its end, its cancellation, and what is left over.
//!
//! The tests take turns, for they count their process's threads and files: each of this crate takes `Alone`.
#![allow(missing_docs, reason = "a test")]

#[path = "../support/barrier.rs"]
mod barrier;
#[path = "../support/leftovers.rs"]
mod leftovers;
#[path = "../support/names.rs"]
mod names;
#[path = "../support/packets.rs"]
mod packets;
#[path = "../support/watchdog.rs"]
mod watchdog;

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    sync::{Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use vfio_migration::{Channel, ErrorKind, Relay, Settings};

use crate::{
    barrier::sync,
    leftovers::leftovers,
    packets::{config_packet, hello, packet},
    watchdog::Watchdog,
};

/// One test at a time: what is left over is the process's.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Nothing of a relay may be left when a test is over.
struct Alone {
    before: (usize, usize),
    _alone: MutexGuard<'static, ()>,
    _watchdog: Watchdog,
}

impl Alone {
    fn new() -> Self {
        let alone = ONE_AT_A_TIME.lock();
        Self {
            _alone: alone.unwrap_or_else(PoisonError::into_inner),
            before: leftovers(),
            _watchdog: Watchdog::new(),
        }
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        if thread::panicking() {
            return;
        }
        // A thread that was joined may be listed for a moment more.
        let deadline = Instant::now() + Duration::from_secs(10);
        while leftovers() != self.before && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(leftovers(), self.before, "threads and files");
    }
}

/// A channel's two ends that are the test's: the source's, the destination's.
fn channel(relay: &Relay) -> (UnixStream, UnixStream) {
    let (source, near) = UnixStream::pair().unwrap();
    let (far, destination) = UnixStream::pair().unwrap();
    relay.add_channel(near, far).unwrap();
    (source, destination)
}

fn wait_for(what: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(50);
    while !what() {
        assert!(Instant::now() < deadline, "it never comes to that");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_packet_beyond_the_window_goes_on_as_soon_as_it_may() {
    let _alone = Alone::new();
    let mut settings = Settings::default();
    settings.window = 1;
    let relay = Relay::builder().settings(settings.clone()).start().unwrap();
    let (mut first, mut out) = channel(&relay);
    let (mut second, mut other) = channel(&relay);
    for (id, source) in (0..).zip([&mut first, &mut second]) {
        source.write_all(&[hello(id), sync()].concat()).unwrap();
    }
    second.write_all(&packet(1, 1, b"later")).unwrap();
    let received = |relay: &Relay| -> u64 {
        let channels = relay.stats().channels;
        channels.iter().map(|channel| channel.packets).sum()
    };
    wait_for(|| received(&relay) == 1);
    // More than a socket holds, and nobody reads: it is on its way for as long as the test likes.
    first.write_all(&packet(1, 0, &[7; 1 << 20])).unwrap();
    // Longer than a re-check: what would only be found by one counts as late.
    thread::sleep(Duration::from_millis(1500));
    let collect = thread::spawn(move || {
        let mut bytes = Vec::new();
        out.read_to_end(&mut bytes).unwrap();
        bytes.len()
    });
    let collect_other = thread::spawn(move || {
        let mut bytes = Vec::new();
        other.read_to_end(&mut bytes).unwrap();
        bytes.len()
    });
    first.write_all(&config_packet(1, 2, b"config")).unwrap();
    drop((first, second));
    let report = relay.join();
    report.result.unwrap();
    assert_eq!(report.stats.late_wakeups, 0);
    assert_eq!(report.stats.devices[0].packets, 3);
    assert!(collect.join().unwrap() + collect_other.join().unwrap() > 1 << 20);
}

#[test]
fn a_cancellation_ends_every_wait_and_leaves_nothing() {
    let _alone = Alone::new();
    for dropped in [false, true] {
        let relay = Relay::builder().start().unwrap();
        // One says nothing, one stands within a packet, one is not read from.
        let (silent, silent_out) = channel(&relay);
        let (mut cut, mut cut_out) = channel(&relay);
        let beginning = [hello(1), sync(), packet(1, 0, b"state")].concat();
        cut.write_all(&beginning[..beginning.len() - 1]).unwrap();
        let (mut full, full_out) = channel(&relay);
        full.write_all(&[hello(2), sync()].concat()).unwrap();
        full.write_all(&packet(2, 0, &[1; 1 << 20])).unwrap();
        wait_for(|| relay.stats().channels[2].packets == 1);
        assert_eq!(relay.channels(), (3, 3));
        assert!(!relay.is_finished());
        if dropped {
            drop(relay);
        } else {
            relay.cancel();
            let report = relay.join();
            assert_eq!(*report.result.unwrap_err().kind(), ErrorKind::Cancelled);
            assert_eq!(report.abandoned_threads, 0);
            assert_eq!(report.stats.late_wakeups, 0, "all were told");
        }
        // Both sides were let go.
        let mut rest = Vec::new();
        cut_out.read_to_end(&mut rest).unwrap();
        assert!(cut.write_all(&[0; 1 << 20]).is_err());
        drop((silent, silent_out, cut, cut_out, full, full_out));
    }
}

/// A connection that stands still within its last packet, says so, and brings the rest when it has been
/// hung up on: that was on its way.
struct Late {
    first: io::Cursor<Vec<u8>>,
    rest: io::Cursor<Vec<u8>>,
    stands: mpsc::Sender<()>,
    hung_up: mpsc::Receiver<()>,
}

impl Read for Late {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.first.read(bytes)?;
        if count > 0 {
            return Ok(count);
        }
        if self.rest.position() == 0 {
            self.stands.send(()).unwrap();
            self.hung_up.recv().unwrap();
            // The other threads have ended by now, or find the packet where they look.
            thread::sleep(Duration::from_millis(20));
        }
        self.rest.read(bytes)
    }
}

impl Write for Late {
    fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_new_devices_packet_that_comes_too_late_is_refused() {
    let _alone = Alone::new();
    for _ in 0..20 {
        let relay = Relay::builder().start().unwrap();
        // One device keeps the sequencer from looking for others.
        let mut many = [hello(0), sync()].concat();
        for index in 0..20_000 {
            many.extend(packet(1, index, b"state"));
        }
        let (far, first_out) = UnixStream::pair().unwrap();
        // And of the other the first packet is under way when the relay ends.
        let late = packet(2, 0, b"state");
        let (header, rest) = late.split_at(late.len() - 5);
        let (hang_up, hung_up) = mpsc::channel();
        let (stands, is_standing) = mpsc::channel();
        let late = Late {
            first: io::Cursor::new([&hello(1), &sync(), header].concat()),
            rest: io::Cursor::new(rest.to_vec()),
            stands,
            hung_up,
        };
        let hang_up = move || {
            // Nobody waits any more, the second time.
            let _again = hang_up.send(());
        };
        let (second_far, second_out) = UnixStream::pair().unwrap();
        let source = Channel::from_reader(io::Cursor::new(many));
        relay.add_channel(source, far).unwrap();
        wait_for(|| relay.stats().channels[0].packets > 0);
        let source = Channel::from_stream(late, hang_up);
        relay.add_channel(source, second_far).unwrap();
        is_standing.recv().unwrap();
        relay.cancel();
        let report = relay.join();
        assert!(report.result.unwrap_err().is_cancelled());
        assert_eq!(report.stats.held, 0);
        assert_eq!(report.stats.late_wakeups, 0, "all were told");
        drop((first_out, second_out));
    }
}

#[test]
fn a_canceller_ends_a_join_and_then_does_nothing() {
    let _alone = Alone::new();
    let relay = Relay::builder().start().unwrap();
    let (_source, near) = UnixStream::pair().unwrap();
    let (far, _destination) = UnixStream::pair().unwrap();
    relay.add_channel(near, far).unwrap();
    let canceller = relay.canceller();
    assert!(!canceller.is_over());
    let joined = thread::spawn(move || relay.join());
    canceller.cancel();
    let report = joined.join().unwrap();
    assert!(report.result.unwrap_err().is_cancelled());
    assert!(canceller.is_over());
    canceller.cancel();
}

#[test]
fn a_device_is_known_from_its_first_packet_though_that_waits() {
    let _alone = Alone::new();
    let mut settings = Settings::default();
    settings.window = 1;
    settings.no_progress = Duration::from_millis(100);
    let relay = Relay::builder().settings(settings.clone()).start().unwrap();
    let (mut source, out) = channel(&relay);
    let early = [hello(0), sync(), packet(1, 5, b"early")].concat();
    source.write_all(&early).unwrap();
    // Its time began with the packet, not with a re-check.
    let report = relay.join();
    let error = report.result.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Stalled, "{error}");
    assert_eq!(error.index(), Some(0), "{error}");
    assert_eq!(report.stats.late_wakeups, 0);
    drop((source, out));
}

#[test]
fn what_a_channel_leaves_of_a_buffer_is_anothers_at_once() {
    let _alone = Alone::new();
    let mut settings = Settings::default();
    // One buffer, and the one that is kept back.
    settings.max_packet = 12 + (1 << 20);
    settings.budget = Some(2 * ((1 << 20) + 4096));
    let relay = Relay::builder().settings(settings.clone()).start().unwrap();
    // A stream of the embedder's always has more to come, as far as the relay knows.
    let (mut first, near) = UnixStream::pair().unwrap();
    let (far, out) = UnixStream::pair().unwrap();
    let (hanging, going) = (near.try_clone().unwrap(), far.try_clone().unwrap());
    let near = Channel::from_stream(near, move || {
        let _closed = hanging.shutdown(std::net::Shutdown::Both);
    });
    relay.add_channel(near, far).unwrap();
    let (mut second, other) = channel(&relay);
    let packets = |relay: &Relay, at: usize| relay.stats().channels[at].packets;
    let begin = [hello(0), sync(), packet(1, 0, b"a")].concat();
    second.write_all(&[hello(1), sync()].concat()).unwrap();
    first.write_all(&begin).unwrap();
    wait_for(|| {
        relay
            .stats()
            .devices
            .iter()
            .any(|device| device.packets == 1)
    });
    second.write_all(&packet(2, 1, b"early")).unwrap();
    wait_for(|| packets(&relay, 1) == 1);
    thread::sleep(Duration::from_millis(20));
    let before = relay.stats().channels[1].bytes;
    drop(first);
    wait_for(|| relay.stats().channels[1].bytes > before);
    assert_eq!(relay.stats().late_wakeups, 0, "it was told");
    relay.cancel();
    let report = relay.join();
    assert_eq!(report.stats.held, 0);
    drop((going, out, other, second));
}

/// Pseudo-random numbers, splitmix64.
fn random(state: &mut u64) -> usize {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut word = *state;
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    usize::try_from((word ^ (word >> 31)) & 0x7fff_ffff).unwrap()
}

#[test]
fn whatever_a_source_sends_it_comes_to_an_end() {
    let _alone = Alone::new();
    let mut settings = Settings::default();
    settings.budget = Some(9 << 20);
    let whole: [Vec<u8>; 2] = [
        [
            hello(0),
            sync(),
            packet(1, 0, b"a"),
            packet(2, 1, b"b"),
            sync(),
        ]
        .concat(),
        [
            hello(1),
            sync(),
            packet(2, 0, b"c"),
            config_packet(2, 2, b"d"),
        ]
        .concat(),
    ];
    let (mut passed, mut failed) = (0, 0);
    for seed in 0..400 {
        let mut state = seed;
        let mut channels = whole.clone();
        channels[0].extend(config_packet(1, 1, b"e"));
        for channel in &mut channels {
            // Nothing, a byte changed, a field of ones, a cut, a part twice.
            let len = channel.len();
            let at = random(&mut state) % len;
            match random(&mut state) % 6 {
                0 => channel[at] ^= 1 << (random(&mut state) % 8),
                1 => channel[at..]
                    .iter_mut()
                    .take(4)
                    .for_each(|byte| *byte = 0xff),
                2 => channel.truncate(at),
                3 => channel.extend_from_within(at..),
                _ => {}
            }
        }
        let relay = Relay::builder().settings(settings.clone()).start().unwrap();
        let mut reading = Vec::new();
        for bytes in &channels {
            let (far, mut destination) = UnixStream::pair().unwrap();
            let source = Channel::from_reader(io::Cursor::new(bytes.clone()));
            relay.add_channel(source, far).unwrap();
            reading.push(thread::spawn(move || {
                let mut received = Vec::new();
                // Hung up on, perhaps.
                let _ended = destination.read_to_end(&mut received);
                received.len()
            }));
        }
        let report = relay.join();
        assert_eq!(report.abandoned_threads, 0);
        let received: usize = reading.into_iter().map(|it| it.join().unwrap()).sum();
        let sent: usize = channels.iter().map(Vec::len).sum();
        match report.result {
            Ok(()) => {
                passed += 1;
                assert_eq!(received, sent, "seed {seed}: what passes passes whole");
            }
            Err(error) => {
                failed += 1;
                let place = error.channel().is_some() || error.device().is_some();
                assert!(place, "seed {seed}: {error} is nowhere");
                assert!(received <= sent, "seed {seed}");
            }
        }
    }
    assert!(
        passed > 50 && failed > 50,
        "{passed} passed, {failed} failed"
    );
}

#[test]
fn nothing_is_added_after_the_last() {
    let _alone = Alone::new();
    let relay = Relay::builder().start().unwrap();
    relay.no_more_channels();
    let (mut source, near) = UnixStream::pair().unwrap();
    let (far, mut destination) = UnixStream::pair().unwrap();
    let error = relay.add_channel(near, far).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Misuse(_)), "{error}");
    for refused in [&mut source, &mut destination] {
        refused.set_nonblocking(true).unwrap();
        assert_eq!(refused.read(&mut [0]).unwrap(), 0, "it was let go");
    }
    let report = relay.join();
    report.result.unwrap();
    assert!(report.stats.channels.is_empty());
}

#[test]
fn settings_that_cannot_be_are_refused() {
    let _alone = Alone::new();
    let refused = |change: fn(&mut Settings)| {
        let mut settings = Settings::default();
        change(&mut settings);
        let error = Relay::builder()
            .settings(settings.clone())
            .start()
            .unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Misuse(_)), "{error}");
    };
    refused(|settings| settings.budget = Some(1 << 20));
    refused(|settings| settings.max_packet = 1 << 20);
    refused(|settings| settings.max_packet = 17 << 20);
    refused(|settings| settings.max_devices = Some(0));
    refused(|settings| settings.window = 0);
}

#[test]
fn a_targets_page_size_is_its_own() {
    let _alone = Alone::new();
    let relay = Relay::builder().start().unwrap();
    let page_size = vfio_migration::wire::PageSize::new(65536).unwrap();
    let sent = [hello(0), vfio_migration::wire::encode_sync(page_size, 0)].concat();
    let (far, mut destination) = UnixStream::pair().unwrap();
    let source = Channel::from_reader(io::Cursor::new(sent.clone()));
    relay
        .add_channel(source.with_page_size(65536).unwrap(), far)
        .unwrap();
    relay.join().result.unwrap();
    let mut received = Vec::new();
    destination.read_to_end(&mut received).unwrap();
    assert_eq!(received, sent);
}
