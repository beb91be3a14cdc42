//! A change of state with recovery, against a device that follows a script: every combination of
//! what SET, GET, the recovering SET and the reset can do.

use std::{
    collections::VecDeque,
    io::{self, PipeWriter, Read, Write},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    panic::resume_unwind,
    sync::{Arc, Mutex, MutexGuard},
};

use nix::errno::Errno;
use vfio_migration::{
    Device, DeviceId,
    DeviceState::{self, PreCopy, PreCopyP2p, Resuming, Running, Stop, StopCopy},
    ErrorKind, MigrationDevice, MigrationFlags, Phase, PrecopyInfo, Recover, StateEvent,
    migration::{DeviceSettings, MigratableDevice},
};

/// What the device does with one call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Step {
    /// As asked.
    Done,
    /// As asked, and a data fd comes with it.
    WithFd,
    /// Refused, and the device is in that state.
    Refused(Errno, Option<DeviceState>),
    Panics,
}

#[derive(Debug, Eq, PartialEq)]
enum Call {
    Get,
    Set(DeviceState),
    Reset,
}

struct Script {
    state: DeviceState,
    flags: MigrationFlags,
    sets: VecDeque<Step>,
    gets: VecDeque<Step>,
    resets: VecDeque<Step>,
    /// For every other callback.
    other: Option<Step>,
    calls: Vec<Call>,
    events: Vec<StateEvent>,
    panic_on: Option<StateEvent>,
    /// How often it was asked for the newer precopy info.
    opted: u32,
    /// The other ends of the data fds that were handed out.
    writers: Vec<PipeWriter>,
}

/// Written by hand, for an `FdDevice` keeps the kernel's rules: this one gives fds where no session begins,
/// and is in states that nobody asked for.
#[derive(Clone)]
struct Mock(Arc<Mutex<Script>>);

impl Mock {
    fn new(state: DeviceState) -> Self {
        Self(Arc::new(Mutex::new(Script {
            state,
            flags: MigrationFlags::from_bits(7),
            sets: VecDeque::new(),
            gets: VecDeque::new(),
            resets: VecDeque::new(),
            other: None,
            calls: Vec::new(),
            events: Vec::new(),
            panic_on: None,
            opted: 0,
            writers: Vec::new(),
        })))
    }

    /// A device that has done nothing yet, and whose first GET has been forgotten.
    fn device(state: DeviceState) -> (Self, Device) {
        let mock = Self::new(state);
        let id = DeviceId::new("mock", 0).unwrap();
        let device = Device::new(id, Box::new(mock.clone())).unwrap();
        mock.script().calls.clear();
        (mock, device)
    }

    fn script(&self) -> MutexGuard<'_, Script> {
        self.0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.script().calls)
    }

    /// Whether the data fd that was handed out as the `index`th is still open somewhere.
    fn is_open(&self, index: usize) -> bool {
        match self.script().writers[index].write_all(&[0]) {
            Ok(()) => true,
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
                false
            }
        }
    }

    fn other(&self) -> io::Result<()> {
        let step = self.script().other;
        match step {
            Some(Step::Refused(errno, _)) => Err(errno.into()),
            Some(Step::Panics) => told(),
            _ => Ok(()),
        }
    }
}

/// A panic without the message on stderr.
fn told() -> ! {
    resume_unwind(Box::new("as told"))
}

impl MigrationDevice for Mock {
    fn flags(&self) -> io::Result<MigrationFlags> {
        self.other()?;
        Ok(self.script().flags)
    }

    fn state(&self) -> io::Result<DeviceState> {
        let mut script = self.script();
        script.calls.push(Call::Get);
        match script.gets.pop_front() {
            Some(Step::Refused(errno, _)) => Err(errno.into()),
            Some(Step::Panics) => told(),
            _ => Ok(script.state),
        }
    }

    fn set_state(&mut self, new: DeviceState) -> io::Result<Option<OwnedFd>> {
        let mut script = self.script();
        script.calls.push(Call::Set(new));
        match script.sets.pop_front().unwrap_or(Step::Done) {
            Step::Done => {
                script.state = new;
                Ok(None)
            }
            Step::WithFd => {
                script.state = new;
                let (reader, writer) = io::pipe()?;
                script.writers.push(writer);
                Ok(Some(reader.into()))
            }
            Step::Refused(errno, leaves) => {
                script.state = leaves.unwrap_or(script.state);
                Err(errno.into())
            }
            Step::Panics => told(),
        }
    }

    fn reset(&mut self) -> io::Result<()> {
        let mut script = self.script();
        script.calls.push(Call::Reset);
        match script.resets.pop_front() {
            Some(Step::Refused(errno, _)) => Err(errno.into()),
            Some(Step::Panics) => told(),
            _ => {
                script.state = Running;
                Ok(())
            }
        }
    }

    fn data_size(&self) -> io::Result<u64> {
        self.other()?;
        Ok(u64::MAX - 5)
    }

    fn precopy_info(&self, _fd: BorrowedFd<'_>) -> io::Result<PrecopyInfo> {
        self.other()?;
        Ok(PrecopyInfo::default())
    }

    fn enable_precopy_info_v2(&mut self) -> io::Result<()> {
        self.script().opted += 1;
        Err(Errno::ENOTTY.into())
    }

    fn save_config(&mut self, writer: &mut dyn Write) -> io::Result<()> {
        self.other()?;
        writer.write_all(b"config")
    }

    fn load_config(&mut self, reader: &mut dyn Read) -> io::Result<()> {
        self.other()?;
        reader.read_exact(&mut [0; 6])
    }

    fn event(&mut self, event: StateEvent) {
        let mut script = self.script();
        script.events.push(event);
        if script.panic_on == Some(event) {
            told();
        }
    }
}

/// What [`Device::set_state`] is to do, said a second time and differently.
struct Expected {
    calls: Vec<Call>,
    kind: ErrorKind,
    /// `None` where a panic came first.
    errno: Option<Errno>,
    /// `None` for a lost device.
    state: Option<DeviceState>,
}

fn expected(
    to: DeviceState,
    (first, get, recover): (Step, Step, Recover),
    (second, reset): (Step, Step),
) -> Expected {
    let mut calls = vec![Call::Set(to)];
    let errno = match first {
        Step::Refused(errno, _) => Some(errno),
        _ => None,
    };
    let kind = if errno.is_some() {
        ErrorKind::State
    } else {
        ErrorKind::Panicked
    };
    let mut state = None;
    if errno.is_some() {
        calls.push(Call::Get);
        if get == Step::Done
            && let Recover::State(to) = recover
            && to != DeviceState::Error
        {
            calls.push(Call::Set(to));
            if matches!(second, Step::Done | Step::WithFd) {
                state = Some(to);
            }
        }
    }
    if state.is_none() {
        calls.push(Call::Reset);
        if reset == Step::Done {
            state = Some(Running);
        }
    }
    Expected {
        calls,
        kind: if state.is_some() {
            kind
        } else {
            ErrorKind::Lost
        },
        errno,
        state,
    }
}

#[test]
fn every_way_that_a_change_can_fail() {
    let refused = |errno| Step::Refused(errno, None);
    let firsts = [
        refused(Errno::EIO),
        Step::Refused(Errno::EIO, Some(Stop)),
        Step::Refused(Errno::EIO, Some(DeviceState::Error)),
        Step::Panics,
    ];
    let gets = [Step::Done, refused(Errno::ENXIO), Step::Panics];
    let recovers = [
        Recover::Reset,
        Recover::State(DeviceState::Error),
        Recover::State(Stop),
        Recover::State(Running),
    ];
    let seconds = [
        Step::Done,
        Step::WithFd,
        refused(Errno::EBUSY),
        Step::Refused(Errno::EBUSY, Some(DeviceState::Error)),
        Step::Panics,
    ];
    let resets = [Step::Done, refused(Errno::EPERM), Step::Panics];
    let changes = [
        (Running, Stop, Step::Done),
        (Running, StopCopy, Step::Done),
        (PreCopy, StopCopy, Step::WithFd),
        (StopCopy, Running, Step::WithFd),
        (Resuming, Stop, Step::WithFd),
    ];
    let mut count = 0;
    for (from, to, before) in changes {
        for first in firsts {
            for get in gets {
                for recover in recovers {
                    for second in seconds {
                        for reset in resets {
                            let what = (from, to, first, get, recover, second, reset);
                            let (mock, mut device) = Mock::device(Running);
                            if from != Running {
                                mock.script().sets.push_back(before);
                                device.set_state(from, Recover::Reset).unwrap();
                                assert!(device.lend().is_ok());
                                mock.calls();
                            }
                            mock.script().sets.extend([first, second]);
                            mock.script().gets.push_back(get);
                            mock.script().resets.push_back(reset);

                            let error = device.set_state(to, recover).unwrap_err();
                            let expected = expected(to, (first, get, recover), (second, reset));
                            assert_eq!(mock.calls(), expected.calls, "{what:?}");
                            assert_eq!(*error.kind(), expected.kind, "{what:?}");
                            let errno = expected.errno.map(|errno| errno as i32);
                            assert_eq!(error.raw_os_error(), errno, "{what:?}");
                            assert_eq!(error.states(), Some((from, to)), "{what:?}");
                            assert_eq!(error.device(), Some(device.id()));
                            check_after(&mock, &mut device, expected.state, from);
                            count += 1;
                        }
                    }
                }
            }
        }
    }
    assert_eq!(count, 5 * 4 * 3 * 4 * 5 * 3);
}

/// After a failure: the device is where it says, or lost, and no fd is open that should not be.
fn check_after(mock: &Mock, device: &mut Device, state: Option<DeviceState>, from: DeviceState) {
    let Some(state) = state else {
        return check_lost(mock, device);
    };
    assert!(!device.is_lost());
    assert_eq!(device.state(), state);
    assert_eq!(mock.script().state, state);
    // None of the states that recovery has led to has a session.
    let fds = mock.script().writers.len();
    for index in 0..fds {
        assert!(!mock.is_open(index), "fd {index} from {from}");
    }
    assert!(device.lend().is_err());
    mock.script().sets.clear();
    device.set_state(Stop, Recover::Reset).unwrap();
    assert_eq!(mock.script().state, Stop);
}

/// Every call says so, and none reaches the device.
fn check_lost(mock: &Mock, device: &mut Device) {
    assert!(device.is_lost());
    let fds = mock.script().writers.len();
    for index in 0..fds {
        assert!(!mock.is_open(index));
    }
    let state = device.state();
    let errors = [
        device.set_state(Running, Recover::Reset).unwrap_err(),
        device.set_state(state, Recover::Reset).unwrap_err(),
        device.reset().unwrap_err(),
        device.lend().unwrap_err(),
        device.data_size().unwrap_err(),
        device.precopy_info().unwrap_err(),
        device.enable_precopy_info_v2().unwrap_err(),
        device.read_precopy(&mut [0]).unwrap_err(),
        device.save_config(&mut Vec::new()).unwrap_err(),
        device.load_config(&mut [].as_slice()).unwrap_err(),
    ];
    for error in errors {
        assert_eq!(*error.kind(), ErrorKind::Lost);
        assert_eq!(error.device(), Some(device.id()));
    }
    assert_eq!(mock.calls(), []);
}

#[test]
fn a_state_that_is_the_current_one_is_not_asked_for() {
    let (mock, mut device) = Mock::device(Running);
    device.set_state(Running, Recover::Reset).unwrap();
    assert_eq!(mock.calls(), []);
    assert_eq!(mock.script().events, []);
}

#[test]
fn error_cannot_be_asked_for() {
    let (mock, mut device) = Mock::device(Running);
    let error = device
        .set_state(DeviceState::Error, Recover::State(Running))
        .unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Misuse(_)));
    assert_eq!(mock.calls(), []);
}

#[test]
fn a_session_keeps_its_fd_until_it_ends() {
    let (mock, mut device) = Mock::device(Running);
    assert_eq!(
        device.lend().unwrap_err().raw_os_error(),
        Some(Errno::EBADF as i32)
    );
    mock.script().sets.push_back(Step::WithFd);
    device.set_state(PreCopy, Running).unwrap();
    let fd = device.lend().unwrap().as_raw_fd();
    for state in [PreCopyP2p, StopCopy] {
        device.set_state(state, Running).unwrap();
        assert_eq!(device.lend().unwrap().as_raw_fd(), fd);
    }
    assert!(!device.is_lent());
    let lent = device.lend().unwrap();
    assert!(device.is_lent());
    drop(lent);
    assert!(mock.is_open(0));
    device.set_state(Stop, Recover::Reset).unwrap();
    assert!(!mock.is_open(0));

    // From one session straight into the next: the old fd goes, the new one stays.
    mock.script().sets.extend([Step::WithFd, Step::WithFd]);
    device.set_state(StopCopy, Stop).unwrap();
    device.set_state(Resuming, Stop).unwrap();
    assert!(!mock.is_open(1));
    assert!(mock.is_open(2));
    device.reset().unwrap();
    assert!(!mock.is_open(2));
    assert_eq!(device.state(), Running);
}

#[test]
fn a_second_fd_is_out_of_sync() {
    let (mock, mut device) = Mock::device(Running);
    mock.script().sets.extend([Step::WithFd, Step::WithFd]);
    device.set_state(PreCopy, Running).unwrap();
    mock.calls();
    let error = device.set_state(StopCopy, Stop).unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::State);
    assert_eq!(error.raw_os_error(), Some(Errno::EBADF as i32));
    assert_eq!(error.states(), Some((PreCopy, StopCopy)));
    // The change itself has happened, and is not undone.
    assert_eq!(device.state(), StopCopy);
    assert_eq!(mock.calls(), [Call::Set(StopCopy)]);
    assert!(mock.is_open(0));
    assert!(!mock.is_open(1));
}

#[test]
fn what_a_refusal_leaves_is_asked_not_assumed() {
    // An incomplete load: the device stays in RESUMING, and so does the session.
    let (mock, mut device) = Mock::device(Running);
    let refused = Step::Refused(Errno::EINVAL, None);
    mock.script().sets.extend([Step::WithFd, refused]);
    device.set_state(Resuming, Running).unwrap();
    let error = device
        .set_state(Stop, Recover::State(Resuming))
        .unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::EINVAL as i32));
    assert_eq!(device.state(), Resuming);
    assert!(mock.is_open(0));

    // A combination that has failed half way: the session was left on the way.
    let (mock, mut device) = Mock::device(Running);
    let half_way = Step::Refused(Errno::EIO, Some(Running));
    mock.script()
        .sets
        .extend([Step::WithFd, half_way, Step::WithFd]);
    device.set_state(PreCopy, Running).unwrap();
    device.set_state(Stop, Recover::State(PreCopy)).unwrap_err();
    assert_eq!(device.state(), PreCopy);
    assert!(!mock.is_open(0), "its session has ended");
    assert!(!mock.is_open(1), "came with the recovery");
    assert!(device.lend().is_err());
}

#[test]
fn an_explicit_reset() {
    let (mock, mut device) = Mock::device(DeviceState::Error);
    assert_eq!(device.state(), DeviceState::Error);
    device.reset().unwrap();
    assert_eq!(device.state(), Running);
    mock.script()
        .resets
        .push_back(Step::Refused(Errno::EPERM, None));
    let error = device.reset().unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Lost);
    assert_eq!(error.raw_os_error(), Some(Errno::EPERM as i32));
    mock.calls();
    check_lost(&mock, &mut device);

    let (mock, mut device) = Mock::device(Stop);
    mock.script().resets.push_back(Step::Panics);
    assert_eq!(*device.reset().unwrap_err().kind(), ErrorKind::Lost);
    mock.calls();
    check_lost(&mock, &mut device);
}

#[test]
fn a_device_is_refused_that_cannot_migrate() {
    let id = DeviceId::new("mock", 0).unwrap();
    let refused = |mock: &Mock| Device::new(id.clone(), Box::new(mock.clone())).unwrap_err();

    let mock = Mock::new(Running);
    mock.script().flags = MigrationFlags::P2P;
    let error = refused(&mock);
    assert_eq!(error.raw_os_error(), Some(Errno::EOPNOTSUPP as i32));
    assert_eq!(error.phase(), Phase::Setup);

    let mock = Mock::new(Running);
    mock.script().other = Some(Step::Refused(Errno::ENOTTY, None));
    assert_eq!(refused(&mock).raw_os_error(), Some(Errno::ENOTTY as i32));

    let mock = Mock::new(Running);
    mock.script().gets.push_back(Step::Panics);
    let error = refused(&mock);
    assert_eq!(*error.kind(), ErrorKind::Panicked);
    assert_eq!(error.device(), Some(&id));
}

#[test]
fn errors_carry_what_happened() {
    let (mock, mut device) = Mock::device(Running);
    mock.script()
        .sets
        .push_back(Step::Refused(Errno::EINVAL, None));
    let error = device.set_state(StopCopy, Stop).unwrap_err();
    assert_eq!(
        error.to_string(),
        "state, device mock, RUNNING to STOP_COPY: the device refused the state (EINVAL)"
    );
    mock.script().other = Some(Step::Refused(Errno::EIO, None));
    let error = device.data_size().unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Device);
    assert_eq!(error.raw_os_error(), Some(Errno::EIO as i32));
    let error = device.save_config(&mut Vec::new()).unwrap_err();
    assert_eq!(error.phase(), Phase::Config);
}

#[test]
fn the_config_is_counted() {
    let (_, mut device) = Mock::device(Stop);
    let mut config = Vec::new();
    assert_eq!(device.save_config(&mut config).unwrap(), 6);
    config.extend(b"what follows");
    let mut reader = config.as_slice();
    assert_eq!(device.load_config(&mut reader).unwrap(), 6);
    assert_eq!(reader, b"what follows");
    assert!(device.load_config(&mut b"conf".as_slice()).is_err());
}

#[test]
fn a_kernel_without_the_second_precopy_info_is_fine() {
    let (_, mut device) = Mock::device(Running);
    assert!(!device.enable_precopy_info_v2().unwrap());
}

#[test]
fn a_migratable_device_has_asked_for_the_newer_precopy_info_once() {
    let (mock, device) = Mock::device(Running);
    let migratable = MigratableDevice::new(device, DeviceSettings::default());
    assert_eq!(mock.script().opted, 1);
    let migratable = MigratableDevice::new(migratable.into_device(), DeviceSettings::default());
    assert!(!migratable.into_device().enable_precopy_info_v2().unwrap());
    assert_eq!(mock.script().opted, 1);
    // Where there is no PRE_COPY there is nothing to ask for.
    let mock = Mock::new(Running);
    mock.script().flags = MigrationFlags::STOP_COPY;
    let device = Device::new(DeviceId::new("mock", 0).unwrap(), Box::new(mock.clone())).unwrap();
    drop(MigratableDevice::new(device, DeviceSettings::default()));
    assert_eq!(mock.script().opted, 0);
}

#[test]
fn a_read_in_precopy_is_one_read() {
    let (mock, mut device) = Mock::device(Running);
    mock.script().sets.push_back(Step::WithFd);
    device.set_state(PreCopy, Running).unwrap();
    mock.script().writers[0].write_all(b"some").unwrap();
    let mut buffer = [0; 16];
    assert_eq!(device.read_precopy(&mut buffer).unwrap(), 4);
    assert_eq!(&buffer[..4], b"some");
    device.set_state(StopCopy, Stop).unwrap();
    let error = device.read_precopy(&mut buffer).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Misuse(_)));
}

#[test]
fn a_panic_outside_a_change_of_state_is_an_error_and_no_more() {
    type Callback = fn(&mut Device) -> vfio_migration::Error;
    let callbacks: [Callback; 4] = [
        |device| device.data_size().unwrap_err(),
        |device| device.precopy_info().unwrap_err(),
        |device| device.save_config(&mut Vec::new()).unwrap_err(),
        |device| device.load_config(&mut [].as_slice()).unwrap_err(),
    ];
    for callback in callbacks {
        let (mock, mut device) = Mock::device(Running);
        mock.script().sets.push_back(Step::WithFd);
        device.set_state(PreCopy, Running).unwrap();
        mock.script().other = Some(Step::Panics);
        let error = callback(&mut device);
        assert_eq!(*error.kind(), ErrorKind::Panicked);
        assert_eq!(error.device(), Some(device.id()));
        let source = std::error::Error::source(&error).unwrap();
        assert_eq!(source.to_string(), "as told");

        // Where the device stands is known: nothing is reset, and the next call is made.
        mock.script().other = None;
        mock.calls();
        assert!(device.data_size().is_ok());
        assert!(device.lend().is_ok());
        device.set_state(Stop, Recover::Reset).unwrap();
        assert_eq!(mock.calls().last(), Some(&Call::Set(Stop)));
        assert!(!mock.calls().contains(&Call::Reset));
        assert!(!mock.is_open(0));
    }
}

#[test]
fn a_panic_in_an_event() {
    // Before the request: it is not made.
    let (mock, mut device) = Mock::device(Running);
    mock.script().panic_on = Some(StateEvent::PreCopyP2pPrepare);
    let error = device.set_state(PreCopyP2p, Running).unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Panicked);
    assert_eq!(mock.calls(), [Call::Reset]);
    assert_eq!(device.state(), Running);

    // After the change: it has happened, and the device is reset before the next.
    let (mock, mut device) = Mock::device(Running);
    mock.script().panic_on = Some(StateEvent::State(StopCopy));
    mock.script().sets.push_back(Step::WithFd);
    let error = device.set_state(StopCopy, Stop).unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Panicked);
    assert_eq!(error.states(), Some((Running, StopCopy)));
    assert_eq!(device.state(), StopCopy);
    mock.calls();
    device.set_state(Stop, Recover::Reset).unwrap();
    assert_eq!(mock.calls(), [Call::Reset, Call::Set(Stop)]);
    assert!(!mock.is_open(0));
}

#[test]
fn events_tell_every_change_and_the_slow_one_before() {
    let (mock, mut device) = Mock::device(Running);
    device.set_state(PreCopy, Running).unwrap();
    device.set_state(PreCopyP2p, Running).unwrap();
    mock.script()
        .sets
        .push_back(Step::Refused(Errno::EIO, Some(Running)));
    device.set_state(StopCopy, Stop).unwrap_err();
    device.reset().unwrap();
    assert_eq!(
        mock.script().events,
        [
            StateEvent::State(PreCopy),
            StateEvent::PreCopyP2pPrepare,
            StateEvent::State(PreCopyP2p),
            StateEvent::State(Running), // said GET
            StateEvent::State(Stop),    // the recovery
            StateEvent::State(Running), // the reset
        ]
    );
}

#[test]
#[cfg(debug_assertions)]
fn a_session_that_ends_with_its_fd_lent_is_our_mistake() {
    let (mock, mut device) = Mock::device(Running);
    mock.script().sets.push_back(Step::WithFd);
    device.set_state(StopCopy, Stop).unwrap();
    let lent = device.lend().unwrap();
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        device.set_state(Stop, Recover::Reset)
    }));
    assert!(ended.is_err());
    drop(lent);
    assert!(!mock.is_open(0), "the device has let go of it all the same");
}

#[test]
fn the_vmm_gets_its_device_back() {
    let (mock, mut device) = Mock::device(Running);
    mock.script().sets.push_back(Step::WithFd);
    device.set_state(StopCopy, Stop).unwrap();
    let inner = device.into_inner();
    assert_eq!(inner.state().unwrap(), StopCopy);
    assert!(!mock.is_open(0));
}
