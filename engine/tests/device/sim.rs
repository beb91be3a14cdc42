//! The simulated device: its states under `Device`, its bytes through every kind of data fd, and
//! its faults. No test here measures time: what should last is held until it is released.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::AsFd,
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use vfio_migration::{
    Device, DeviceId,
    DeviceState::{self, PreCopy, PreCopyP2p, Resuming, Running, Stop, StopCopy},
    ErrorKind, MigrationDevice, MigrationFlags, Recover, StateEvent,
    sim::{
        CallFault, Callback, Fault, Faults, Image, On, SimConfig, SimDevice, SimHandle, Stall,
        Stream, TransitionFault, Which,
    },
};

const STREAMS: [Stream; 4] = [
    Stream::Pipe,
    Stream::Socket,
    Stream::PlainWrite,
    Stream::Memfd,
];

fn device(config: SimConfig) -> (Device, SimHandle) {
    let sim = SimDevice::new(config).unwrap();
    let handle = sim.handle();
    let id = DeviceId::new("sim", 0).unwrap();
    (Device::new(id, Box::new(sim)).unwrap(), handle)
}

fn with(change: impl FnOnce(&mut SimConfig)) -> SimConfig {
    let mut config = SimConfig {
        seed: 5,
        len: 300_001,
        ..SimConfig::default()
    };
    change(&mut config);
    config
}

/// The data fd, as a file of its own that the test may keep.
fn data(device: &Device) -> File {
    device.lend().unwrap().try_clone().unwrap().into()
}

fn bytes(image: Image) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(image.len()).unwrap()];
    image.fill(0, &mut bytes);
    bytes
}

fn save(device: &mut Device) -> Vec<u8> {
    device.set_state(StopCopy, Stop).unwrap();
    let mut state = Vec::new();
    data(device).read_to_end(&mut state).unwrap();
    state
}

fn errno(error: &io::Error) -> Option<Errno> {
    error.raw_os_error().map(Errno::from_raw)
}

/// A socket may say first that what was in it has been lost.
fn is_closed(error: &io::Error) -> bool {
    matches!(errno(error), Some(Errno::EPIPE | Errno::ECONNRESET))
}

#[test]
fn what_is_saved_is_the_image() {
    for stream in STREAMS {
        for (piece, buffer) in [(None, None), (Some(4096), Some(4096)), (Some(13), None)] {
            for len in [0, 24, 25, 10_000, 300_001] {
                let config = with(|config| {
                    config.len = len;
                    config.stream = stream;
                    config.piece = piece;
                    config.buffer = buffer;
                });
                let image = config.image();
                let (mut device, handle) = device(config);
                assert_eq!(device.data_size().unwrap(), image.len());
                let state = save(&mut device);
                assert!(state == bytes(image), "{stream:?}, {piece:?}, {len} bytes");
                assert_eq!(Image::digest_of(&state), handle.digest());
                assert_eq!(handle.bytes(), image.len());
                device.set_state(Running, Recover::Reset).unwrap();
                assert_eq!(handle.bytes(), image.len());
            }
        }
    }
}

#[test]
fn what_is_loaded_is_what_was_saved_and_can_be_saved_again() {
    for stream in STREAMS {
        for piece in [None, Some(7)] {
            for size in [1, 100, 65_536, 1 << 20] {
                let image = Image::new(77, 70_007);
                let config = with(|config| {
                    config.stream = stream;
                    config.piece = piece;
                });
                let (mut device, handle) = device(config);
                device.set_state(Resuming, Running).unwrap();
                for chunk in bytes(image).chunks(size) {
                    data(&device).write_all(chunk).unwrap();
                }
                assert!(!handle.has_loaded());
                device.set_state(Stop, Recover::Reset).unwrap();
                assert!(handle.has_loaded());
                assert_eq!(handle.digest(), image.digest());
                assert_eq!(handle.image(), image);
                assert_eq!(handle.bytes(), image.len());
                assert!(save(&mut device) == bytes(image));
            }
        }
    }
}

#[test]
fn memory_that_is_had_before_changes_nothing() {
    for stream in STREAMS {
        let mut sim = SimDevice::new(with(|config| config.stream = stream)).unwrap();
        let handle = sim.handle();
        sim.prefill_save().unwrap();
        sim.prefill_load().unwrap();
        let mut device = Device::new(DeviceId::new("sim", 0).unwrap(), Box::new(sim)).unwrap();
        let own = handle.image();
        assert!(save(&mut device) == bytes(own));
        let image = Image::new(8, own.len() - 100_000);
        device.set_state(Resuming, Stop).unwrap();
        data(&device).write_all(&bytes(image)).unwrap();
        device.set_state(Stop, Recover::Reset).unwrap();
        assert_eq!(handle.digest(), image.digest());
        assert!(save(&mut device) == bytes(image));
    }
}

#[test]
fn a_wrong_byte_shows_in_the_digest() {
    for stream in STREAMS {
        let (mut device, handle) = device(with(|config| config.stream = stream));
        let mut state = bytes(Image::new(1, 5000));
        state[4321] ^= 1;
        device.set_state(Resuming, Running).unwrap();
        data(&device).write_all(&state).unwrap();
        device.set_state(Stop, Recover::Reset).unwrap();
        assert_eq!(handle.digest(), Image::digest_of(&state));
        assert_ne!(handle.digest(), Image::new(1, 5000).digest());
    }
}

#[test]
fn an_incomplete_state_is_refused_and_can_be_completed() {
    for stream in STREAMS {
        for have in [0, 5, 24, 40_000, 69_999] {
            let (mut device, handle) = device(with(|config| config.stream = stream));
            let state = bytes(Image::new(3, 70_000));
            device.set_state(Resuming, Running).unwrap();
            data(&device).write_all(&state[..have]).unwrap();
            for to in [Stop, Running] {
                let error = device.set_state(to, Recover::State(Resuming)).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(Errno::EINVAL as i32));
                assert_eq!(device.state(), Resuming);
                assert_eq!(handle.state(), Resuming);
            }
            data(&device).write_all(&state[have..]).unwrap();
            device.set_state(Stop, Recover::Reset).unwrap();
            assert_eq!(handle.digest(), Image::digest_of(&state));
        }
    }
}

#[test]
fn an_incomplete_state_whose_writer_has_gone_is_refused() {
    for stream in STREAMS {
        let mut sim = SimDevice::new(with(|config| config.stream = stream)).unwrap();
        let mut fd = File::from(sim.set_state(Resuming).unwrap().unwrap());
        fd.write_all(&bytes(Image::new(3, 1000))[..999]).unwrap();
        drop(fd);
        for _ in 0..2 {
            let error = sim.set_state(Stop).unwrap_err();
            assert_eq!(errno(&error), Some(Errno::EINVAL));
            assert_eq!(sim.state().unwrap(), Resuming);
        }
        sim.reset().unwrap();
        assert_eq!(sim.state().unwrap(), Running);
    }
}

#[test]
fn what_is_no_state_or_too_much_is_refused() {
    let whole = bytes(Image::new(3, 300_001));
    let too_much = [whole.as_slice(), b"!"].concat();
    let garbage = vec![0; 300_001];
    for state in [too_much, garbage] {
        for stream in STREAMS {
            let (mut device, _) = device(with(|config| config.stream = stream));
            device.set_state(Resuming, Running).unwrap();
            // Some kinds of fd refuse it at once, some later.
            let _ = data(&device).write_all(&state);
            let error = device.set_state(Stop, Recover::Reset);
            if stream == Stream::PlainWrite && state[0] != 0 {
                // There was no room for what was too much, and the writer has been told.
                error.unwrap();
                continue;
            }
            assert_eq!(
                error.unwrap_err().raw_os_error(),
                Some(Errno::EINVAL as i32)
            );
            assert_eq!(device.state(), Running);
        }
    }
}

#[test]
fn when_the_state_is_left_the_fd_is_dead() {
    // Of a plain write: `sim_late_write.rs`.
    for stream in [Stream::Pipe, Stream::Socket] {
        let (mut device, _) = device(with(|config| config.stream = stream));
        device.set_state(Resuming, Running).unwrap();
        let mut fd = data(&device);
        fd.write_all(&[0; 10]).unwrap();
        device.reset().unwrap();
        let error = fd.write(&[0; 10]).unwrap_err();
        assert!(is_closed(&error), "{stream:?}: {error}");

        device.set_state(StopCopy, Stop).unwrap();
        let mut fd = data(&device);
        device.set_state(Stop, Recover::Reset).unwrap();
        let mut rest = Vec::new();
        fd.read_to_end(&mut rest).unwrap();
        assert!(rest.len() <= 300_001);
    }
}

#[test]
fn precopy_gives_what_there_is_and_then_nothing() {
    for stream in STREAMS {
        let config = with(|config| {
            config.stream = stream;
            config.precopy_initial = 1000;
        });
        let image = config.image();
        let (mut device, handle) = device(config);
        assert!(device.enable_precopy_info_v2().unwrap());
        assert_eq!(handle.dirty(1), 0, "not in PRE_COPY");
        device.set_state(PreCopy, Running).unwrap();
        let mut state = Vec::new();
        let mut buffer = [0; 600];

        let info = device.precopy_info().unwrap();
        assert_eq!(
            (info.initial_bytes, info.dirty_bytes, info.reinit),
            (1000, 0, false)
        );
        let drain = |device: &mut Device, state: &mut Vec<u8>, buffer: &mut [u8]| {
            loop {
                match device.read_precopy(buffer).unwrap() {
                    0 => break,
                    n => state.extend(&buffer[..n]),
                }
            }
        };
        drain(&mut device, &mut state, &mut buffer);
        assert_eq!(state.len(), 1000);
        assert_eq!(device.precopy_info().unwrap().initial_bytes, 0);

        assert_eq!(handle.dirty(500), 500);
        device.set_state(PreCopyP2p, Running).unwrap();
        assert_eq!(handle.reinit(200), 200);
        let info = device.precopy_info().unwrap();
        assert_eq!(
            (info.initial_bytes, info.dirty_bytes, info.reinit),
            (200, 500, true)
        );
        assert!(!device.precopy_info().unwrap().reinit, "told once");
        drain(&mut device, &mut state, &mut buffer);
        assert_eq!(state.len(), 1700);
        assert_eq!(device.data_size().unwrap(), image.len() - 1700);

        assert_eq!(handle.dirty(u64::MAX), image.len() - 1700);
        device.set_state(StopCopy, Stop).unwrap();
        let error = device.precopy_info().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::EINVAL as i32));
        data(&device).read_to_end(&mut state).unwrap();
        assert!(state == bytes(image), "{stream:?}");
        device.set_state(Stop, Recover::Reset).unwrap();
        assert_eq!(
            handle.events()[..4],
            [
                StateEvent::State(PreCopy),
                StateEvent::PreCopyP2pPrepare,
                StateEvent::State(PreCopyP2p),
                StateEvent::State(StopCopy),
            ]
        );
    }
}

/// What a read or write that may block would find, without waiting for it.
fn is_ready(file: &File, events: PollFlags) -> bool {
    let mut fds = [PollFd::new(file.as_fd(), events)];
    poll(&mut fds, PollTimeout::ZERO).unwrap() > 0
}

#[test]
fn a_stall_lasts_until_it_is_released_or_the_session_ends() {
    for stream in [Stream::Pipe, Stream::Socket] {
        let stall = |at| {
            with(|config| {
                config.stream = stream;
                config.faults.stall = Some(Stall { at, time: None });
            })
        };
        let (mut source, handle) = device(stall(1000));
        source.set_state(StopCopy, Stop).unwrap();
        let mut state = vec![0; 1000];
        data(&source).read_exact(&mut state).unwrap();
        assert!(!is_ready(&data(&source), PollFlags::POLLIN));
        // The thread counts what it has moved after it has moved it.
        while handle.bytes() < 1000 {
            thread::yield_now();
        }
        assert_eq!(handle.bytes(), 1000);
        handle.release();
        data(&source).read_to_end(&mut state).unwrap();
        assert!(state == bytes(handle.image()));

        // A load: the device is asked while it stalls, says no, and goes on when it is let go.
        let image = Image::new(1, 70_000);
        let (mut target, handle) = device(stall(100));
        target.set_state(Resuming, Running).unwrap();
        data(&target).write_all(&bytes(image)).unwrap();
        target
            .set_state(Stop, Recover::State(Resuming))
            .unwrap_err();
        assert_eq!(handle.bytes(), 100);
        handle.release();
        target.set_state(Stop, Recover::Reset).unwrap();
        assert_eq!(handle.digest(), image.digest());

        // A writer that sits in a full buffer is let go by the session's end.
        let (mut target, _) = device(stall(0));
        target.set_state(Resuming, Running).unwrap();
        let mut fd = data(&target);
        let writer = thread::spawn(move || fd.write_all(&vec![0; 16 << 20]));
        while is_ready(&data(&target), PollFlags::POLLOUT) {
            thread::yield_now();
        }
        target.reset().unwrap();
        assert!(is_closed(&writer.join().unwrap().unwrap_err()));

        // So is the device's thread, by the device's.
        let (mut source, _) = device(stall(1000));
        source.set_state(StopCopy, Stop).unwrap();
        let mut fd = data(&source);
        drop(source);
        let mut state = Vec::new();
        fd.read_to_end(&mut state).unwrap();
        assert!(state.len() <= 1000);
    }
}

#[test]
fn a_stall_with_a_time_ends_by_itself() {
    let stall = Stall {
        at: 100,
        time: Some(Duration::from_millis(1)),
    };
    for stream in [Stream::Pipe, Stream::Socket] {
        let config = with(|config| {
            config.stream = stream;
            config.faults.stall = Some(stall);
        });
        let (mut device, handle) = device(config);
        assert!(save(&mut device) == bytes(handle.image()));
        device.set_state(Resuming, Stop).unwrap();
        data(&device)
            .write_all(&bytes(Image::new(2, 1000)))
            .unwrap();
        device.set_state(Stop, Recover::Reset).unwrap();
        assert_eq!(handle.image(), Image::new(2, 1000));
    }
}

#[test]
fn the_data_fd_fails_where_it_is_told_to() {
    let config = |stream| {
        with(|config| {
            config.stream = stream;
            config.faults.fail_at = Some(100_000);
        })
    };
    for stream in STREAMS {
        let (mut device, handle) = device(config(stream));
        device.set_state(StopCopy, Stop).unwrap();
        let mut state = Vec::new();
        let end = data(&device).read_to_end(&mut state);
        match stream {
            Stream::Socket => assert_eq!(errno(&end.unwrap_err()), Some(Errno::ECONNRESET)),
            _ => assert_eq!(end.unwrap(), 100_000),
        }
        assert!(state == bytes(handle.image())[..100_000]);

        device.set_state(Resuming, Stop).unwrap();
        let mut fd = data(&device);
        let mut written = 0;
        let whole = bytes(handle.image());
        let error = loop {
            // Small writes, so that a pipe's buffer does not hide the failure.
            match fd.write(&whole[written % whole.len()..][..1]) {
                Ok(n) => written += n,
                Err(error) => break error,
            }
        };
        assert!(written >= 100_000);
        match stream {
            Stream::Pipe => assert_eq!(errno(&error), Some(Errno::EPIPE)),
            Stream::Socket => assert!(is_closed(&error)),
            Stream::PlainWrite => {
                assert_eq!((written, errno(&error)), (100_000, Some(Errno::EIO)));
            }
            Stream::Memfd => {
                assert_eq!((written, errno(&error)), (100_000, Some(Errno::EPERM)));
            }
        }
        let error = device.set_state(Stop, Recover::Reset).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::EINVAL as i32));
        assert_eq!(device.state(), Running);
    }
}

#[test]
fn a_plain_write_is_short_at_the_fault_and_then_fails() {
    let (mut device, _) = device(with(|config| {
        config.stream = Stream::PlainWrite;
        config.faults.fail_at = Some(5000);
    }));
    device.set_state(Resuming, Running).unwrap();
    let mut fd = data(&device);
    assert_eq!(fd.write(&[1; 4000]).unwrap(), 4000);
    assert_eq!(fd.write(&[1; 4000]).unwrap(), 1000);
    assert_eq!(errno(&fd.write(&[1; 4000]).unwrap_err()), Some(Errno::EIO));
}

#[test]
fn calls_fail_or_panic_as_they_are_told() {
    let faulty = |callback, which, fault| {
        with(|config| {
            config.faults.calls.push(CallFault {
                callback,
                which,
                fault,
            });
        })
    };
    let refused = Fault::Errno(Errno::ENXIO as i32);

    let (mut dev, handle) = device(faulty(Callback::DataSize, Which::Nth(1), refused));
    assert!(dev.data_size().is_ok());
    assert_eq!(
        dev.data_size().unwrap_err().raw_os_error(),
        Some(Errno::ENXIO as i32)
    );
    assert!(dev.data_size().is_ok());
    assert_eq!(handle.calls(Callback::DataSize), 3);

    let (mut dev, handle) = device(faulty(Callback::SetState, Which::From(1), refused));
    dev.set_state(Stop, Recover::Reset).unwrap();
    dev.set_state(StopCopy, Stop).unwrap_err();
    assert_eq!(
        dev.state(),
        Running,
        "the recovery failed too, so it was reset"
    );
    assert_eq!(handle.calls(Callback::Reset), 1);
    let changes = handle.changes();
    assert_eq!(
        (changes[2].from, changes[2].asked, changes[2].to),
        (Stop, Stop, Stop)
    );
    assert_eq!(changes[2].errno, Some(Errno::ENXIO as i32));

    for fault in [refused, Fault::Panic] {
        let mut config = faulty(Callback::Reset, Which::Every, fault);
        config.faults.calls.push(CallFault {
            callback: Callback::LoadConfig,
            which: Which::Every,
            fault: Fault::Panic,
        });
        let (mut dev, _) = device(config);
        let error = dev.load_config(&mut [0; 100].as_slice()).unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::Panicked);
        dev.set_state(Stop, Recover::Reset).unwrap();
        let error = dev.reset().unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::Lost);
        assert!(dev.is_lost());
    }

    for callback in Callback::ALL {
        let faulty = SimDevice::new(faulty(callback, Which::Every, Fault::Panic)).unwrap();
        let handle = faulty.handle();
        let id = DeviceId::new("sim", 0).unwrap();
        let error = Device::new(id, Box::new(faulty)).and_then(|mut dev| {
            dev.enable_precopy_info_v2()?;
            dev.data_size()?;
            dev.set_state(PreCopy, Running)?;
            dev.precopy_info()?;
            dev.read_precopy(&mut [0])?;
            dev.save_config(&mut Vec::new())?;
            dev.load_config(&mut [0; 4].as_slice())?;
            dev.reset()
        });
        assert!(matches!(
            error.unwrap_err().kind(),
            ErrorKind::Panicked | ErrorKind::Lost
        ));
        assert_eq!(handle.calls(callback), 1, "{callback:?}");
    }

    let (mut dev, _) = device(with(|config| config.data_size = Some(u64::MAX - 1)));
    assert_eq!(dev.data_size().unwrap(), u64::MAX - 1);
}

#[test]
fn the_config_goes_across_and_is_read_to_its_last_byte() {
    for config_len in [0, 1, 10_000] {
        let (mut source, from) = device(with(|config| config.config_len = config_len));
        let (mut target, to) = device(with(|config| config.seed = 6));
        assert_ne!(from.config_digest(), to.config_digest());
        let mut config = Vec::new();
        let len = u64::from(config_len) + 4;
        assert_eq!(source.save_config(&mut config).unwrap(), len);
        assert_eq!(config.len() as u64, len);
        config.push(0);
        let mut reader = config.as_slice();
        assert_eq!(target.load_config(&mut reader).unwrap(), len);
        assert_eq!(reader, [0]);
        assert_eq!(from.config_digest(), to.config_digest());
        // A config that stops too early, or says that it is too long.
        let cut = &config[..config.len() - 2];
        target.load_config(&mut &*cut).unwrap_err();
        target.load_config(&mut [0xff; 8].as_slice()).unwrap_err();
        assert_eq!(from.config_digest(), to.config_digest());
    }
}

#[test]
fn a_slow_arc_is_waited_for() {
    let (mut device, _) = device(with(|config| {
        config.faults.delays = vec![(StopCopy, Duration::from_millis(2))];
    }));
    let begin = std::time::Instant::now();
    device.set_state(StopCopy, Stop).unwrap();
    assert!(begin.elapsed() >= Duration::from_millis(2));
}

#[test]
fn a_config_that_cannot_be_is_refused() {
    let refused = |config| SimDevice::new(config).unwrap_err();
    for state in [StopCopy, Resuming, PreCopy] {
        let error = refused(with(|config| config.state = state));
        assert_eq!(errno(&error), Some(Errno::EINVAL));
    }
    let error = refused(with(|config| {
        config.state = DeviceState::RunningP2p;
        config.flags = MigrationFlags::STOP_COPY;
    }));
    assert_eq!(errno(&error), Some(Errno::EINVAL));
}

/// Takes a device to `state`, if it has it.
fn reach(device: &mut Device, state: DeviceState) -> bool {
    if state == DeviceState::Error || !device.flags().supports(state) {
        return false;
    }
    device.set_state(state, Recover::Reset).unwrap();
    true
}

/// Every pair of states, every combination of optional states, a fault in every place: what is
/// remembered is what is.
#[test]
fn the_remembered_state_is_always_the_real_one() {
    let mut faults: Vec<Option<(On, Option<DeviceState>)>> = vec![None];
    for leaves in [None].into_iter().chain(DeviceState::ALL.map(Some)) {
        faults.push(Some((On::Any, leaves)));
    }
    for from in DeviceState::ALL {
        for to in DeviceState::ALL {
            faults.push(Some((On::Arc { from, to }, None)));
            faults.push(Some((On::Arc { from, to }, Some(DeviceState::Error))));
        }
    }
    let recovers = [
        Recover::Reset,
        Recover::State(Running),
        Recover::State(Stop),
    ];
    let mut count = 0;
    for bits in [1, 3, 5, 7] {
        for from in DeviceState::ALL {
            for to in DeviceState::ALL {
                for fault in &faults {
                    for recover in recovers {
                        count += u32::from(walk(bits, from, to, *fault, recover));
                    }
                }
            }
        }
    }
    assert!(count > 10_000, "{count} walks");
}

fn walk(
    bits: u64,
    from: DeviceState,
    to: DeviceState,
    fault: Option<(On, Option<DeviceState>)>,
    recover: Recover,
) -> bool {
    let flags = MigrationFlags::from_bits(bits);
    if to == DeviceState::Error || !flags.supports(from) || from == DeviceState::Error {
        return false;
    }
    // The first request leads to `from`, where that is not where the device begins.
    let requests_before = u64::from(from != Running);
    let transitions = fault.map(|(on, leaves)| TransitionFault {
        on,
        which: match on {
            On::Any => Which::Nth(requests_before),
            _ => Which::Every,
        },
        errno: Errno::EIO as i32,
        leaves: leaves.filter(|state| flags.supports(*state)),
    });
    let (mut device, handle) = device(SimConfig {
        flags,
        stream: Stream::Memfd,
        len: 100,
        faults: Faults {
            transitions: transitions.into_iter().collect(),
            ..Faults::default()
        },
        ..SimConfig::default()
    });
    let what = format!("{flags}: {from} to {to}, {fault:?}, {recover:?}");
    if device.set_state(from, Recover::Reset).is_err() {
        // The fault is on the way to where this walk begins.
        assert_eq!(device.state(), handle.state(), "{what}");
        return false;
    }
    assert_eq!(device.state(), handle.state(), "{what}");
    if from == Resuming {
        data(&device).write_all(&bytes(Image::new(4, 100))).unwrap();
    }
    let result = device.set_state(to, recover);
    assert_eq!(device.state(), handle.state(), "{what}");
    assert!(!device.is_lost());
    match result {
        Ok(()) => assert_eq!(device.state(), to, "{what}"),
        Err(error) => {
            assert_eq!(*error.kind(), ErrorKind::State, "{what}");
            assert_eq!(error.states(), Some((from, to)), "{what}");
            let expected = if !flags.supports(to) || (from == StopCopy && to.is_precopy()) {
                // The fault may also have come first.
                [Some(Errno::EINVAL as i32), Some(Errno::EIO as i32)].to_vec()
            } else {
                vec![Some(Errno::EIO as i32)]
            };
            assert!(
                expected.contains(&error.raw_os_error()),
                "{what}: {error:?}"
            );
        }
    }
    // Whatever happened, a fd is held only in a session, and the device can be used again.
    let in_session = device.state().is_saving() || device.state() == Resuming;
    assert!(in_session || device.lend().is_err(), "{what}");
    device.reset().unwrap();
    assert_eq!(device.state(), handle.state(), "{what}");
    assert!(reach(&mut device, Running));
    true
}
