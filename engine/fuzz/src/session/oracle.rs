//! What must hold: while a load is under way, when everybody has had a turn, and at its end.

use std::{collections::BTreeSet, rc::Rc};

use vfio_migration::{DeviceState, ErrorKind, Report};

use super::model::{Dev, Push, Run, Seen, Sent};
use crate::{
    input::Input,
    steps::{self, Place},
    stream::Piece,
};

impl Dev {
    /// What reached the device is a prefix of the one right order. Looks at what is new.
    pub(super) fn check_prefix(&self) {
        let got = self.drain.got();
        let mut seen = self.seen.borrow_mut();
        let Seen {
            len, index, within, ..
        } = &mut *seen;
        let mut rest = &got.bytes[*len..];
        while !rest.is_empty() {
            assert!(
                self.data.contains(index),
                "{}: {} bytes beyond idx {index}, which nobody sent",
                self.id,
                rest.len()
            );
            let some = rest.len().min(self.size(*index) - *within);
            let right = self.data_of(*index).skip(*within).take(some);
            assert!(
                right.eq(rest[..some].iter().copied()),
                "{}: other bytes where idx {index} belongs",
                self.id
            );
            rest = &rest[some..];
            *len += some;
            *within += some;
            if *within == self.size(*index) {
                *index += 1;
                *within = 0;
            }
        }
        if let Some(config) = &got.config
            && !seen.config
        {
            // Empty packets leave no trace, so one that was sent may be there.
            let mut place = seen.index;
            let mut right = seen.within == 0;
            while right && (!self.configs.contains(&place) || *config != self.config_of(place)) {
                right = self.data.contains(&place) && self.size(place) == 0;
                place += 1;
            }
            assert!(right, "{}: a config that does not belong there", self.id);
            seen.config = true;
        }
    }
}

impl Run {
    /// Lets everybody get on as far as they can, and checks what must then hold.
    pub(super) fn settle(&self) {
        let drains: Vec<_> = self.devices.iter().map(|dev| dev.drain.clone()).collect();
        let drain = || {
            drains
                .iter()
                .map(|drain| drain.drain(65_536))
                .sum::<usize>()
                > 0
        };
        steps::settle(drain);
        steps::pass_bounds(drain);
        let stats = self.session.stats();
        assert_eq!(
            stats.late_wakeups,
            0,
            "nobody was told: {:?}",
            steps::sleeping()
        );
        assert!(stats.held_high <= stats.budget, "{stats:?}");
        for dev in &self.devices {
            dev.check_prefix();
        }
        if let Some(error) = self.session.failure() {
            let over = self.channels.iter().all(|chan| chan.over);
            assert!(self.wrong || over, "nothing was wrong, and yet: {error}");
            return;
        }
        let (accepted, waiting) = self.accepted(&stats);
        for (at, dev) in self.devices.iter().enumerate() {
            if !dev.started || dev.removed || self.hangs {
                continue;
            }
            let taken = |index, config| accepted.contains(&(at, index, config));
            let first = (0..).find(|&index| !taken(index, false)).expect("few");
            let whole: usize = (0..first).map(|index| dev.size(index)).sum();
            let got = dev.drain.got();
            assert!(
                got.bytes.len() >= whole,
                "{}: {} bytes of {whole} up to idx {first}: {:?}, {:?}, {stats:?}",
                dev.id,
                got.bytes.len(),
                steps::sleeping(),
                self.channels
                    .iter()
                    .map(|chan| &chan.sent)
                    .collect::<Vec<_>>(),
            );
            // A device's reserve may be held by half a packet that another channel has brought, or
            // brings: a wrong source's doing, which time ends.
            let mut halves = self.channels.iter().flat_map(|chan| chan.sent.last());
            let half = halves
                .any(|(packet, whole)| !whole && packet.device == at && packet.index <= first);
            for packet in waiting.iter().filter(|_| !half) {
                assert!(
                    (packet.device, packet.index) != (at, first),
                    "{}: idx {first} is next, and waits: {:?}, {:?}",
                    dev.id,
                    steps::sleeping(),
                    self.channels
                        .iter()
                        .map(|chan| &chan.sent)
                        .collect::<Vec<_>>(),
                );
            }
            let ready = dev.ready || !self.config_after_iterables;
            if taken(first, true) && ready {
                assert!(
                    got.config.is_some(),
                    "{}: the config is there, and waits",
                    dev.id
                );
                assert_eq!(got.states.last(), Some(&DeviceState::Stop));
            }
        }
    }

    /// What has been accepted by now, and what waits. Everybody has had a turn.
    pub(super) fn accepted(
        &self,
        stats: &vfio_migration::Stats,
    ) -> (BTreeSet<(usize, u32, bool)>, Vec<Sent>) {
        let mut accepted = BTreeSet::new();
        let mut waiting = Vec::new();
        let mut take = |packet: &Sent| {
            accepted.insert((packet.device, packet.index, packet.config));
        };
        for (at, chan) in self.channels.iter().enumerate() {
            let announced = usize::try_from(stats.channels[at].packets).expect("few");
            match steps::place(&format!("channel {at}")) {
                Some(Place::Wait) => {
                    chan.sent[..announced - 1]
                        .iter()
                        .for_each(|(packet, _)| take(packet));
                    waiting.push(chan.sent[announced - 1].0);
                }
                _ => chan
                    .sent
                    .iter()
                    .filter(|(_, whole)| *whole)
                    .for_each(|(packet, _)| take(packet)),
            }
        }
        if let Some(pushing) = &self.pushing {
            let done = pushing.done.borrow();
            done.iter()
                .filter(|(_, taken)| *taken)
                .for_each(|(packet, _)| take(packet));
        }
        (accepted, waiting)
    }

    /// Brings the load to an end, and checks its report.
    pub(super) fn end(mut self, input: &mut Input<'_>) {
        let how = input.below(8);
        if let Some(pushing) = &self.pushing {
            pushing.asked.borrow_mut().push(Push::Quit);
            pushing.over.set(true);
        }
        for chan in self.channels.iter_mut().filter(|chan| !chan.over) {
            chan.send_rest();
            chan.feed.push(Piece::End);
            chan.over = true;
        }
        if how < 6 {
            self.switchover();
            for at in 0..self.devices.len() {
                if self.config_after_iterables
                    && !self.devices[at].ready
                    && !self.devices[at].removed
                {
                    self.config_ready(at);
                }
            }
            self.settle();
        }
        if self.hangs || how == 6 {
            self.session.cancel();
            self.called_off = true;
            self.wrong = true;
            self.settle();
        }
        for &strand in &self.removing {
            assert!(steps::is_done(strand), "{:?}", steps::sleeping());
        }
        if self.waits_for_ever() {
            // For room that only time would end: a source that keeps to the order is never so.
            let good = self.orderly && !self.wrong;
            assert!(!good, "a deadlock: {:?}", steps::sleeping());
            self.wrong = true;
            self.called_off = true;
            self.session.cancel();
            self.settle();
        }
        let complete = self
            .devices
            .iter()
            .all(|dev| dev.removed || dev.configs.first() == Some(&dev.next));
        let Self {
            session,
            devices,
            wrong,
            called_off,
            ..
        } = self;
        let session = Rc::try_unwrap(session).expect("nobody else has it any more");
        let cleanup = how == 7;
        let report = steps::ended(
            move || {
                if cleanup {
                    session.cleanup()
                } else {
                    session.join()
                }
            },
            || devices.iter().any(|dev| dev.drain.drain(65_536) > 0),
        );
        let end = End {
            complete,
            wrong,
            called_off,
            cleanup,
        };
        end.check(&report, &devices);
        drop(report);
        for dev in &devices {
            dev.check_prefix();
        }
    }

    /// Whether some channel waits for room that nobody will make.
    pub(super) fn waits_for_ever(&self) -> bool {
        self.session.failure().is_none()
            && steps::sleeping().iter().any(|(name, place)| {
                (name.starts_with("channel") || name == "pushing") && *place == Place::Wait
            })
    }
}

/// How a load came to its end.
struct End {
    /// All packets of all devices were sent.
    complete: bool,
    wrong: bool,
    called_off: bool,
    cleanup: bool,
}

impl End {
    /// The report says what became of what was sent.
    fn check(&self, report: &Report, devices: &[Dev]) {
        let &Self {
            complete,
            wrong,
            called_off,
            cleanup,
        } = self;
        match &report.result {
            Ok(()) => assert!(complete || wrong, "not all was there"),
            Err(error) => {
                assert!(!error.to_string().is_empty());
                assert!(
                    wrong || !complete || cleanup,
                    "nothing was wrong, and yet: {error}"
                );
                let called_off = called_off || cleanup;
                assert!(called_off || !error.is_cancelled(), "who did? {error}");
                if *error.kind() == ErrorKind::Missing {
                    let dev = devices.iter().find(|dev| Some(&dev.id) == error.device());
                    let dev = dev.expect("it names a device");
                    let index = error.index().expect("it names an idx");
                    let whole: usize = (0..index).map(|index| dev.size(index)).sum();
                    assert_eq!(
                        dev.drain.got().bytes.len(),
                        whole,
                        "idx {index} is the first"
                    );
                }
            }
        }
        assert_eq!(report.abandoned_threads, 0);
        assert_eq!(report.stats.late_wakeups, 0);
        for device in &report.devices {
            let dev = devices.iter().find(|dev| dev.id == device.id);
            let dev = dev.expect("one of ours");
            let state = device.device.as_ref().expect("none is stuck").state();
            let got = dev.drain.got();
            match &device.result {
                Ok(()) => {
                    assert!(got.config.is_some());
                    // Of a load that failed nothing is left in any device.
                    assert_ne!(state, DeviceState::Resuming);
                    match &report.result {
                        Ok(()) => assert_eq!(state, DeviceState::Stop),
                        Err(_) => assert!(got.resets > 0),
                    }
                }
                Err(_) => assert!(
                    state != DeviceState::Resuming && got.resets > 0 || state == DeviceState::Stop
                ),
            }
        }
    }
}
