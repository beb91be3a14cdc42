//! What we tell of a migration is what QEMU has told of the same one: event by event, with its arguments.
//!
//! The recorded trace leads: whatever it tells of next is what the test makes happen next, on the source or on the
//! destination, with the recorded bytes; and it waits until we have told of it too. [`DIFFERENCES`] are all that
//! there are, and each of them is seen.

use std::{
    collections::{BTreeSet, VecDeque},
    io::Write,
    os::unix::net::UnixStream,
    sync::{Arc, atomic::AtomicU32},
};

use vfio_migration::{
    Channel, DeviceId, LoadSession, SaveSession, Settings, SourceChannels,
    migration::{
        Admitted, Incoming, Loaded, MigratableDevice, MigrationBlockers, OnOffAuto, Outgoing,
        OutgoingDevice, PlatformSupport, SwitchoverAck, SwitchoverAcks, vm,
    },
    stream::{Command, Event, Reader},
    wire::{DEFAULT_MAX_PACKET, Frame, Framer, PageSize, Walk},
};

use crate::{
    capture::{list, number, text, vfio_only},
    capture_devices::{Case, Contents, Ram, cases},
    recorder::{Recorder, Told},
    watchdog::Watchdog,
};

/// Where we differ from the recorded QEMUs, and why.
const DIFFERENCES: [(&str, &str); 16] = [
    (
        "load_setup",
        "ours alone: the recorded QEMUs do not tell of it",
    ),
    (
        "migration_init",
        "QEMU 11's, told beside the captures of QEMU 10 too",
    ),
    (
        "state_pending, send_init_data_flag",
        "QEMU 11's, told beside those of QEMU 10 too",
    ),
    (
        "state_pending_estimate, state_pending_exact",
        "QEMU 10's, told beside those of QEMU 11 too",
    ),
    (
        "query_precopy_size, query_stop_copy_size",
        "QEMU 11's, and not among the events that were recorded",
    ),
    (
        "migration_state_notifier, on the destination",
        "QEMU's destination has no such notifier",
    ),
    (
        "migration_state_notifier: active, device",
        "QEMU's devices hear of the set-up and the end alone",
    ),
    (
        "migration_state_notifier: names",
        "QEMU prints its number, which is another in 10 and 11",
    ),
    (
        "the VM's first start",
        "QEMU starts devices that run already; our VM's devices run when it is admitted",
    ),
    (
        "the VM's last stop",
        "a VMM's own reason is `other`; QEMU's was `shutdown`",
    ),
    (
        "starved",
        "QEMU's loader wakes for every packet, and waits again; ours for its next packet alone",
    ),
    (
        "load_end",
        "packets go to the ring in one chain, and are in the device when that is",
    ),
    (
        "save_setup: data buffer size",
        "never below 64 KiB: a buffer of 0 would lose the state",
    ),
    (
        "state_pending_*: precopy",
        "QEMU prints the sum of the whole VM, its RAM included",
    ),
    (
        "state_pending: stopcopy size, not exact",
        "our devices are not asked before the first exact estimate",
    ),
    (
        "state_pending: final",
        "by the counts: no device is asked in the downtime",
    ),
];

/// Which of them were seen.
#[derive(Default)]
struct Seen(BTreeSet<&'static str>);

impl Seen {
    fn note(&mut self, difference: &str) {
        let known = DIFFERENCES.iter().find(|(what, _)| *what == difference);
        let (what, _) = known.unwrap_or_else(|| panic!("{difference} is not listed"));
        self.0.insert(what);
    }
}

/// An event in QEMU's words, without its prefix: who, what, and the rest of the line.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Line {
    device: DeviceId,
    name: String,
    args: String,
}

/// The arguments as QEMU prints them: words, and between them our fields.
const ARGUMENTS: [(&str, &str); 19] = [
    (
        "migration_init",
        "mig_flags {flags}, precopy_info_v2_used {precopy_v2}, dirty_pages_supported {dirty_tracking}",
    ),
    (
        "migration_set_state",
        "new state {new}, recover state {recover}",
    ),
    ("migration_set_device_state", "state {state}"),
    ("migration_state_notifier", "state {state}"),
    (
        "vmstate_change_prepare",
        "running {running} reason {reason} device state {state}",
    ),
    (
        "vmstate_change",
        "running {running} reason {reason} device state {state}",
    ),
    ("load_state", "data {data}"),
    ("load_state_device_data", "size {size} ret {ret}"),
    ("load_state_device_buffer_incoming", "idx {idx}"),
    ("load_state_device_buffer_starved", "idx {idx}"),
    ("load_state_device_buffer_load_start", "idx {idx}"),
    ("load_state_device_buffer_load_end", "idx {idx}"),
    ("save_setup", "data buffer size {data_buffer_size}"),
    ("save_block", "data_size {size}"),
    (
        "save_iterate",
        "precopy initial size {precopy_init_size} precopy dirty size {precopy_dirty_size}",
    ),
    ("save_complete_precopy", "ret {ret}"),
    (
        "save_complete_precopy_thread_start",
        "idstr {idstr} instance {instance_id}",
    ),
    ("save_complete_precopy_thread_end", "ret {ret}"),
    (
        "state_pending",
        "stopcopy size {stopcopy_size}, precopy initial size {precopy_init_size}, \
         precopy dirty size {precopy_dirty_size}, \
         request switchover ack {request_switchover_ack}, exact {exact}, final {final}",
    ),
];

/// Two more, of QEMU 10: what they say of the device.
const ESTIMATES: [(&str, &str); 2] = [
    (
        "state_pending_estimate",
        "postcopy {postcopy} precopy initial size {precopy_init_size} \
         precopy dirty size {precopy_dirty_size}",
    ),
    (
        "state_pending_exact",
        "postcopy {postcopy} stopcopy size {stopcopy_size} \
         precopy initial size {precopy_init_size} precopy dirty size {precopy_dirty_size}",
    ),
];

fn arguments(told: &Told) -> String {
    let mut all = ARGUMENTS.iter().chain(&ESTIMATES);
    let format = all.find(|(name, _)| *name == told.name);
    let mut rest = format.map_or("", |(_, format)| *format);
    let mut args = String::new();
    while let Some((words, after)) = rest.split_once('{') {
        let (field, after) = after.split_once('}').unwrap();
        args += words;
        args += match (field, told.field(field)) {
            ("flags", "STOP_COPY|P2P|PRE_COPY") => "0x7",
            (_, value) => value,
        };
        rest = after;
    }
    args + rest
}

/// One side of one capture: what QEMU has told there.
struct Record {
    /// Of QEMU 11.
    newer: bool,
    source: bool,
    lines: Vec<Line>,
}

impl Record {
    /// Reads it; the differences that are QEMU's own are taken out of it.
    fn read(case: &Case, side: &str, seen: &mut Seen) -> Self {
        let source = side == "src";
        let newer = case.name.contains("qemu11");
        let mut devices = Vec::new();
        let mut setup = false;
        let mut lines = Vec::new();
        let recorded = case.capture.file(&format!("{side}.trace"));
        for line in String::from_utf8(recorded).unwrap().lines() {
            let (name, rest) = line.split_once("  (").unwrap();
            let name = name.strip_prefix("vfio_").unwrap();
            let (device, args) = rest.split_once(')').unwrap();
            // In the order in which they came.
            if !devices.contains(&device) {
                devices.push(device);
            }
            let at = devices.iter().position(|it| *it == device).unwrap();
            let mut args = args.trim().to_owned();
            setup |= name == "migration_state_notifier";
            if source && !setup && (name.contains("set_") || name.starts_with("vmstate")) {
                seen.note("the VM's first start");
                continue;
            }
            if name == "migration_state_notifier" {
                seen.note("migration_state_notifier: names");
                args = match (args.as_str(), newer) {
                    ("state 0", _) => "state setup",
                    ("state 1", false) | ("state 2", true) => "state completed",
                    other => panic!("{other:?}"),
                }
                .into();
            }
            if args.contains("reason shutdown") {
                seen.note("the VM's last stop");
                args = args.replace("shutdown", "other");
            }
            if let Some(size) = args.strip_prefix("data buffer size ")
                && size.parse::<u32>().unwrap() < 64 << 10
            {
                seen.note("save_setup: data buffer size");
                args = format!("data buffer size {}", 64 << 10);
            }
            if name == "state_pending_estimate" || name == "state_pending_exact" {
                seen.note("state_pending_*: precopy");
                let at = args.find("postcopy").unwrap();
                args.drain(..at);
            }
            lines.push(Line {
                device: case.ids[at].clone(),
                name: name.into(),
                args: estimated(name, args, seen),
            });
        }
        Self {
            newer,
            source,
            lines,
        }
    }

    /// Whether an event of ours is one that the recorded QEMU would tell of.
    fn has(&self, line: &Line, seen: &mut Seen) -> bool {
        let notifies = line.name == "migration_state_notifier";
        let difference = match line.name.as_str() {
            "load_setup" => "load_setup",
            "migration_init" if !self.newer => "migration_init",
            "state_pending" | "send_init_data_flag" if !self.newer => {
                "state_pending, send_init_data_flag"
            }
            "state_pending_estimate" | "state_pending_exact" if self.newer => {
                "state_pending_estimate, state_pending_exact"
            }
            "query_precopy_size" | "query_stop_copy_size" => {
                "query_precopy_size, query_stop_copy_size"
            }
            _ if notifies && !self.source => "migration_state_notifier, on the destination",
            _ if notifies && matches!(line.args.as_str(), "state active" | "state device") => {
                "migration_state_notifier: active, device"
            }
            _ => return true,
        };
        seen.note(difference);
        false
    }

    /// What we have told, in QEMU's words.
    fn ours(&self, told: &[Told], seen: &mut Seen) -> Vec<Line> {
        let mut lines = Vec::new();
        for told in told {
            let (idstr, instance) = told.device.rsplit_once('#').unwrap_or((&told.device, "0"));
            let line = Line {
                device: DeviceId::new(idstr, instance.parse().unwrap()).unwrap(),
                name: told.name.into(),
                args: estimated(told.name, arguments(told), seen),
            };
            if self.has(&line, seen) {
                lines.push(line);
            }
        }
        lines
    }

    /// Waits until we have told of a line as often as QEMU has, up to and with line `at`.
    fn wait(&self, recorder: &Recorder, at: usize) {
        let line = &self.lines[at];
        let what = format!("{line:?}, which QEMU has told of next");
        recorder.wait(&what, |told| self.is_told(told, at));
    }

    fn is_told(&self, told: &[Told], at: usize) -> bool {
        let line = &self.lines[at];
        let ours = self.ours(told, &mut Seen::default());
        let count = |lines: &[Line]| lines.iter().filter(|it| *it == line).count();
        let most = match line.name.as_str() {
            // However often a loader wakes.
            "load_state_device_buffer_starved" => 1,
            _ => usize::MAX,
        };
        count(&ours) >= count(&self.lines[..=at]).min(most)
    }

    /// Compares what each device has been told of.
    fn compare(&self, case: &Case, recorder: &Recorder, seen: &mut Seen) {
        let ours = self.ours(&recorder.told(), seen);
        for id in &case.ids {
            for incoming in [true, false] {
                let of_device = |lines: &[Line]| -> Vec<Line> {
                    let of_channels = |it: &Line| it.name.ends_with("buffer_incoming");
                    let lines = lines.iter().filter(|it| it.device == *id);
                    // Receive threads tell of those, whatever the loader does meanwhile.
                    let lines = lines.filter(|it| of_channels(it) == incoming);
                    lines.cloned().collect()
                };
                let theirs = in_turn(&of_device(&self.lines), seen);
                let ours = in_turn(&of_device(&ours), seen);
                let text = |lines: &[Line]| -> Vec<String> {
                    let text = |it: &Line| format!("{} {}", it.name, it.args);
                    lines.iter().map(text).collect()
                };
                let (theirs, ours) = (text(&theirs), text(&ours));
                let place = theirs.iter().zip(&ours).position(|(a, b)| a != b);
                let place = place.unwrap_or(theirs.len().min(ours.len()));
                assert_eq!(
                    ours[place..],
                    theirs[place..],
                    "{}, {id}, behind {:?}",
                    case.name,
                    &ours[..place]
                );
            }
        }
    }
}

/// The estimates' arguments, as far as both mean the same.
fn estimated(name: &str, args: String, seen: &mut Seen) -> String {
    if name != "state_pending" {
        return args;
    }
    if args.ends_with("final 1") {
        seen.note("state_pending: final");
        return args.replace("exact 1", "exact 0");
    }
    if args.contains("exact 0") {
        seen.note("state_pending: stopcopy size, not exact");
        let (_, rest) = args.split_once(", ").unwrap();
        return rest.into();
    }
    args
}

/// A loader's events, one packet after the other, and without its waits.
fn in_turn(lines: &[Line], seen: &mut Seen) -> Vec<Line> {
    let mut turn: Vec<Line> = Vec::new();
    for line in lines {
        if line.name == "load_state_device_buffer_starved" {
            seen.note("starved");
            continue;
        }
        if line.name != "load_state_device_buffer_load_end" {
            turn.push(line.clone());
            continue;
        }
        let begun = |it: &Line| it.name.ends_with("load_start") && it.args == line.args;
        let at = turn.iter().position(begun).expect("its load has begun") + 1;
        if at < turn.len() {
            seen.note("load_end");
        }
        turn.insert(at, line.clone());
    }
    turn
}

/// A device, as its VMM realizes it.
fn realize(case: &Case, at: usize, contents: Contents) -> MigratableDevice {
    let mut around = PlatformSupport::default();
    around.device_dirty_tracking = true;
    let (device, _) = case.device(contents);
    let mut blockers = MigrationBlockers::default();
    let id = case.ids[at].clone();
    let device = Box::new(device);
    let block = &mut |_: &_, _| Ok(());
    match blockers.admit(id, device, &case.settings(), around, block) {
        Ok(Admitted::Migratable(migratable)) => migratable,
        other => panic!("{other:?}"),
    }
}

/// A channel of the destination's: the recorded bytes up to and with each packet of a device.
struct Feed {
    socket: UnixStream,
    parts: VecDeque<(DeviceId, u32, Vec<u8>)>,
    rest: Vec<u8>,
}

impl Feed {
    fn new(socket: UnixStream, channel: &[u8]) -> Self {
        let framer = Framer::new(Some(PageSize::new(4096).unwrap()), DEFAULT_MAX_PACKET);
        let mut parts = VecDeque::new();
        let mut rest = Vec::new();
        for located in Walk::new(channel, framer) {
            let located = located.unwrap();
            rest.extend(located.header);
            rest.extend(located.payload);
            if let Frame::DeviceState(packet) = located.frame {
                let id = packet.header.key().id().unwrap();
                parts.push_back((id, packet.packet.index, std::mem::take(&mut rest)));
            }
        }
        Self {
            socket,
            parts,
            rest,
        }
    }
}

/// The destination, as its VMM drives it.
struct Destination<'a> {
    incoming: Option<Incoming>,
    loaded: Option<Loaded>,
    devices: Vec<MigratableDevice>,
    feeds: Vec<Feed>,
    main: Reader<&'a [u8]>,
}

impl Destination<'_> {
    fn setup(&mut self, case: &Case) {
        let mut session = LoadSession::builder();
        if case.transfer == OnOffAuto::On {
            for channel in case.capture.channels() {
                let (near, far) = UnixStream::pair().unwrap();
                let ram = Ram(Arc::new(AtomicU32::new(0)));
                session = session.channel(Channel::from(far).with_ram_sink(ram));
                self.feeds.push(Feed::new(near, &channel));
            }
        }
        let devices = std::mem::take(&mut self.devices);
        let approve = Box::new(|| Ok(()));
        let incoming = Incoming::setup(devices, &case.capabilities, session, approve);
        self.incoming = Some(incoming.unwrap());
    }

    /// The main channel's next event. Returns whether the switchover has started with it.
    fn read_main(&mut self) -> bool {
        let incoming = self.incoming.as_ref().unwrap();
        match self.main.next_event().unwrap() {
            Some(Event::Section(section)) => {
                let device = incoming.device(&section.owner).unwrap();
                device.load_state(self.main.body().unwrap()).unwrap();
                self.main.footer().unwrap();
                false
            }
            Some(Event::Command(Command::SwitchoverStart)) => {
                incoming.switchover_start().unwrap();
                true
            }
            Some(_) => false,
            None => panic!("the main channel has ended"),
        }
    }

    fn feed(&mut self, line: &Line) {
        let mut feeds = self.feeds.iter_mut();
        let is_next = |feed: &&mut Feed| {
            let part = feed.parts.front();
            part.is_some_and(|(id, idx, _)| *id == line.device && line.args == format!("idx {idx}"))
        };
        let feed = feeds.find(is_next).expect("a channel has it next");
        let (_, _, bytes) = feed.parts.pop_front().unwrap();
        feed.socket.write_all(&bytes).unwrap();
    }

    /// All has come.
    fn finish(&mut self) {
        loop {
            let incoming = self.incoming.as_ref().unwrap();
            match self.main.next_event().unwrap() {
                None | Some(Event::Eof) => break,
                Some(Event::Section(section)) => {
                    let device = incoming.device(&section.owner).unwrap();
                    device.load_state(self.main.body().unwrap()).unwrap();
                    self.main.footer().unwrap();
                }
                Some(_) => {}
            }
        }
        for mut feed in std::mem::take(&mut self.feeds) {
            feed.socket.write_all(&feed.rest).unwrap();
        }
        self.loaded = Some(self.incoming.take().unwrap().finish().unwrap());
    }

    /// Makes happen what QEMU has told of next.
    fn act(&mut self, case: &Case, record: &Record, recorder: &Recorder, at: usize) {
        let line = &record.lines[at];
        let is_told = || record.is_told(&recorder.told(), at);
        match line.name.as_str() {
            "migration_realize" | "migration_init" if !is_told() => {
                let at = self.devices.len();
                self.devices.push(realize(case, at, Contents::default()));
            }
            "migration_set_state" if !is_told() => {
                if line.args.contains("RESUMING") {
                    self.setup(case);
                } else if let Some(loaded) = &mut self.loaded {
                    vm::start(loaded.devices_mut()).unwrap();
                } else if self.incoming.is_some() {
                    self.finish();
                    vm::start(self.loaded.as_mut().unwrap().devices_mut()).unwrap();
                } else {
                    vm::stop(&mut self.devices, vm::Reason::Other).unwrap();
                }
            }
            "load_state" | "load_state_device_data" => {
                while !is_told() {
                    self.read_main();
                }
            }
            "load_bufs_thread_start" if !is_told() => while !self.read_main() {},
            "load_device_config_state_start" if case.transfer == OnOffAuto::Off => {}
            "load_state_device_buffer_incoming" => self.feed(line),
            "load_cleanup" if !is_told() => {
                if self.incoming.is_some() {
                    self.finish();
                }
                let loaded = self.loaded.take().unwrap();
                self.devices = loaded.join().unwrap();
            }
            _ => {}
        }
        record.wait(recorder, at);
    }
}

/// The source, as its VMM drives it.
struct Source {
    at_rest: Vec<MigratableDevice>,
    acks: SwitchoverAcks,
    under_way: Vec<OutgoingDevice>,
    channels: Option<SourceChannels>,
    outgoing: Option<Outgoing>,
    /// What a VMM would send over the main channel.
    main: Vec<u8>,
}

impl Source {
    fn of(&mut self, id: &DeviceId) -> &mut OutgoingDevice {
        let mut all = self.under_way.iter_mut();
        all.find(|it| it.id() == id).expect("under way")
    }

    fn begin(&mut self, case: &Case) {
        let mut session = SaveSession::builder();
        if case.transfer == OnOffAuto::On {
            session = session.greeted_channels(self.channels.take().unwrap());
        }
        let sources = std::mem::take(&mut self.under_way);
        self.outgoing = Some(Outgoing::begin(sources, session).unwrap());
    }

    /// Makes happen what QEMU has told of next.
    fn act(&mut self, case: &Case, record: &Record, recorder: &Recorder, at: usize) {
        let line = &record.lines[at];
        if !record.is_told(&recorder.told(), at) {
            match line.name.as_str() {
                "migration_realize" | "migration_init" => {
                    let at = self.at_rest.len();
                    self.at_rest.push(realize(case, at, held(case, at)));
                }
                "migration_state_notifier" if line.args == "state setup" => {
                    let its = self.at_rest.iter().position(|it| *it.id() == line.device);
                    let migratable = self.at_rest.remove(its.unwrap());
                    let (capabilities, acks) = (&case.capabilities, &self.acks);
                    let set_up =
                        OutgoingDevice::setup(migratable, capabilities, acks, &mut self.main);
                    self.under_way.push(set_up.unwrap());
                }
                "save_iterate_start" | "save_iterate" => {
                    self.of(&line.device).iterate(Vec::new()).unwrap();
                }
                "state_pending_estimate" => drop(self.of(&line.device).pending_estimate()),
                "state_pending_exact" => {
                    self.of(&line.device).pending_exact().unwrap();
                }
                "state_pending" if line.args.ends_with("final 1") => self.begin(case),
                "state_pending" if line.args.contains("exact 1") => {
                    self.of(&line.device).pending_exact().unwrap();
                }
                "state_pending" => drop(self.of(&line.device).pending_estimate()),
                "migration_set_state" if line.args.contains("new state PRE_COPY_P2P") => {
                    self.acks.received();
                    vm::stop(&mut self.under_way, vm::Reason::FinishMigration).unwrap();
                }
                "save_complete_precopy_thread_start" | "save_complete_precopy_start" => {
                    // A paused VM has stopped long before.
                    self.acks.received();
                    self.begin(case);
                }
                "save_block" => {
                    let outgoing = self.outgoing.as_mut().unwrap();
                    outgoing.write_state(&line.device, &mut self.main).unwrap();
                }
                "save_device_config_state" if case.transfer == OnOffAuto::Off => {
                    let outgoing = self.outgoing.as_mut().unwrap();
                    outgoing.write_config(&line.device, &mut self.main).unwrap();
                }
                "migration_set_state" if line.args.contains("new state STOP,") => {
                    let mut outgoing = self.outgoing.take().unwrap();
                    if case.transfer == OnOffAuto::On {
                        // The sections that say that the channels have it.
                        for id in &case.ids {
                            outgoing.write_state(id, &mut self.main).unwrap();
                            outgoing.write_config(id, &mut self.main).unwrap();
                        }
                    }
                    let saved = outgoing.finish().unwrap();
                    drop(saved.cleanup().unwrap());
                }
                _ => {}
            }
        }
        record.wait(recorder, at);
    }
}

/// What a source's device holds: as much as QEMU's has sent.
fn held(case: &Case, at: usize) -> Contents {
    let expected = &case.capture.expected["devices"][at];
    Contents {
        whole: vec![7; number(&expected["whole_bytes"])],
        precopy: 24,
        ..Contents::default()
    }
}

#[test]
fn both_sides_tell_what_qemus_have_told() {
    let _watchdog = Watchdog::new();
    let mut seen = Seen::default();
    for case in cases() {
        let record = Record::read(&case, "dst", &mut seen);
        let recorder = Recorder::new();
        let main = case.capture.file(text(&case.capture.expected["main"]));
        let main = vfio_only(&case.capture, &main);
        let mut destination = Destination {
            incoming: None,
            loaded: None,
            devices: Vec::new(),
            feeds: Vec::new(),
            main: Reader::open(&main[..]).unwrap(),
        };
        for at in 0..record.lines.len() {
            destination.act(&case, &record, &recorder, at);
        }
        record.compare(&case, &recorder, &mut seen);
        drop(destination);
        drop(recorder);

        let record = Record::read(&case, "src", &mut seen);
        let recorder = Recorder::new();
        let (mut near, mut far) = (Vec::new(), Vec::new());
        for _ in list(&case.capture.expected["channels"]) {
            let (ours, theirs) = UnixStream::pair().unwrap();
            near.push(ours.into());
            far.push(std::thread::spawn(move || {
                std::io::copy(&mut { theirs }, &mut std::io::sink())
            }));
        }
        let uses = case.transfer == OnOffAuto::On;
        let channels = uses.then(|| SourceChannels::greet(near, &Settings::default()).unwrap());
        let mut source = Source {
            at_rest: Vec::new(),
            acks: SwitchoverAcks::new(SwitchoverAck::Once),
            under_way: Vec::new(),
            channels,
            outgoing: None,
            main: Vec::new(),
        };
        for at in 0..record.lines.len() {
            source.act(&case, &record, &recorder, at);
        }
        record.compare(&case, &recorder, &mut seen);
        for far in far {
            far.join().unwrap().unwrap();
        }
    }
    let listed: BTreeSet<_> = DIFFERENCES.iter().map(|(what, _)| *what).collect();
    assert_eq!(seen.0, listed, "each difference that is listed was seen");
    assert!(DIFFERENCES.iter().all(|(_, reason)| !reason.is_empty()));
}
